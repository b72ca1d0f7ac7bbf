"""tools/check_shards.py finds what is wrong with a set, and draws and counts what is right."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from megavg.data.contact_sheet import COLOURS, contact_sheet
from megavg.data.shard_facts import inspect_shard, InspectJob
from megavg.data.writer import write_shards
from megavg.protocols.sample import Sample
from tools import check_shards

ROOT = Path(__file__).parents[2]


def make_sample(number: int, picture: int | None = None, **changes) -> Sample:
    rng = random.Random(number if picture is None else picture)
    image = Image.frombytes("RGB", (40, 20), rng.randbytes(40 * 20 * 3))
    fields = {"key": f"s{number:03d}", "shard": "", "image": image, "width": 40, "height": 20,
              "expression": f"thing {number}", "boxes_xyxy_px": ((0.0, 0.0, 20.0, 10.0),), "meta": {"split": "train"}}
    return Sample(**{**fields, **changes})


@pytest.fixture
def folder(tmp_path):
    write_shards([make_sample(n) for n in range(10)], str(tmp_path / "train"), "train", 4)
    return tmp_path / "train"


def check(capsys, *arguments) -> tuple[int, dict, str]:
    """Exit status, JSON report and printed text."""
    capsys.readouterr()
    status = check_shards.main([str(word) for word in arguments] + ["--json", "-"])
    report = json.loads(capsys.readouterr().out)
    assert check_shards.main([str(word) for word in arguments]) == status
    return status, report, capsys.readouterr().out


def members(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def rewrite(path: Path, held: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in held:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_a_sound_set(folder, capsys):
    status, report, text = check(capsys, folder)
    assert status == 0 and report["ok"] and report["problems"]["all"] == []
    held = report["set"]
    assert (held["num_samples"], held["num_shards"], held["pictures"]["distinct"]) == (10, 3, 10)
    assert held["tasks"] == {"rec": 10} and held["splits"] == {"train": 10}
    assert held["boxes"]["count"] == 10 and held["boxes"]["per_sample"] == {"1": 10}
    assert held["boxes"]["area_share"] == dict.fromkeys(held["boxes"]["area_share"], 0.25)
    assert held["boxes"]["aspect"]["50%"] == 2.0 and held["boxes"]["short_side_px"]["max"] == 10.0
    assert held["boxes"]["centres"][2][2] == 10 and sum(map(sum, held["boxes"]["centres"])) == 10
    assert held["pictures"]["width_px"]["min"] == 40 and held["bytes"] == sum(
        path.stat().st_size for path in folder.glob("*.tar"))
    assert "nothing is wrong" in text and "10 samples in 3 shards" in text


def test_quantiles_and_counts_of_different_boxes(tmp_path, capsys):
    samples = [make_sample(n, boxes_xyxy_px=((0.0, 0.0, 1.0 + n, 2.0),)) for n in range(10)]
    samples += [make_sample(10, task="detection", boxes_xyxy_px=(), labels=()),
                make_sample(11, task="detection", boxes_xyxy_px=((30.0, 15.0, 40.0, 20.0),) * 2, labels=("a", "b"))]
    write_shards(samples, str(tmp_path / "s"), "s", 5)
    held = check(capsys, tmp_path / "s")[1]["set"]
    assert held["boxes"]["per_sample"] == {"0": 1, "1": 10, "2": 1} and held["labels"] == {"a": 1, "b": 1}
    aspects = sorted([(1 + n) / 2 for n in range(10)] + [2.0, 2.0])
    assert held["boxes"]["aspect"] == {"min": 0.5, "1%": 0.5, "10%": aspects[1], "25%": aspects[3], "50%": aspects[6],
                                       "75%": aspects[9], "90%": aspects[10], "99%": 5.0, "max": 5.0}
    assert held["boxes"]["centres"][7][7] == 2


def test_one_changed_byte(folder, capsys):
    path = folder / "train-000001.tar"
    data = bytearray(path.read_bytes())
    place = data.index(b"thing 5")
    data[place:place + 7] = b"thing 6"
    path.write_bytes(data)
    status, report, text = check(capsys, folder)
    assert status == 1 and report["problems"]["by_kind"] == {"checksum": 1}
    assert "WRONG: checksum" in text and str(path) in text


def test_a_torn_tar(folder, capsys):
    path = folder / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:-11000])
    status, report, text = check(capsys, folder)
    assert status == 1 and report["problems"]["by_kind"] == {"torn shard": 1, "checksum": 2, "count": 1}
    assert f"WRONG: torn shard: {path}" in text and report["set"]["num_samples"] < 10


def test_every_bad_record_is_listed(folder, capsys):
    held = members(folder / "train-000000.tar")
    spoiled = [(name, b"{" if name == "s001.json" else b"\x89PNG" if name == "s002.png" else data)
               for name, data in held if name != "s003.png"]
    rewrite(folder / "train-000000.tar", spoiled)
    status, report, text = check(capsys, folder / "train-000000.tar")
    found = {(entry["kind"], entry["key"]) for entry in report["problems"]["all"]}
    assert status == 1 and {("bad json", "s001"), ("broken image", "s002"), ("missing image", "s003"),
                            ("count", "")} <= found
    assert report["set"]["num_samples"] == 1
    check_shards.main([str(folder), "--max-listed", "1"])
    assert capsys.readouterr().out.count("WRONG: ") == 1


def test_shards_beside_the_index(folder, capsys):
    (folder / "train-000001.tar").rename(folder / "old-000001.tar")
    status, report, _ = check(capsys, folder)
    assert status == 1 and report["problems"]["by_kind"] == {"not in the index": 1, "missing shard": 1}
    assert check(capsys, folder / "train-000000.tar")[0] == 0  # alone, it is as the index says
    (folder / ".unfinished").mkdir()
    (folder / "index.json").write_text("[]")
    assert check(capsys, folder)[1]["problems"]["by_kind"] == {"unfinished build": 1, "bad index": 1}
    (folder / "index.json").unlink()
    (folder / ".unfinished").rmdir()
    assert check(capsys, folder)[1]["problems"]["by_kind"] == {"no index": 1}
    for path in folder.glob("*.tar"):
        path.unlink()
    (folder / ".unfinished").mkdir()
    assert check(capsys, folder)[1]["problems"]["by_kind"] == {"unfinished build": 1}


def test_pictures_that_leak(tmp_path, folder, capsys):
    test = [make_sample(20 + n, meta={"split": "test"})
            for n in range(3)]
    write_shards(test, str(tmp_path / "clean"), "t", 2)
    status, report, text = check(capsys, folder, "--against", tmp_path / "clean")
    assert status == 0 and report["shared"] == {"pictures": 0, "samples": 0} and report["against"]["num_samples"] == 3
    write_shards(test + [make_sample(30, picture=7)], str(tmp_path / "leaky"), "t", 2, "webp")  # stored differently
    status, report, text = check(capsys, folder, "--against", tmp_path / "leaky")
    assert status == 1 and report["shared"] == {"pictures": 1, "samples": 1}
    assert "leak" in text and "s007" in text and "'s030'" in text
    assert check(capsys, folder, "--against", tmp_path / "clean", "--against", tmp_path / "leaky")[0] == 1


def test_repeated_keys_pictures_and_samples(tmp_path, folder, capsys):
    write_shards([make_sample(3, picture=50), make_sample(40, picture=1, meta={"split": "test"}),
                  make_sample(41, picture=2, expression="thing 2")], str(tmp_path / "more"), "m", 9)
    status, report, text = check(capsys, folder, tmp_path / "more")
    assert status == 1 and report["problems"]["by_kind"] == {"duplicate key": 1, "picture in two splits": 1}
    assert report["duplicates"] == {"count": 1, "first": [["s002", "s041"]]}
    assert "s002 and s041" in text


def test_the_sheet_shows_the_boxes_and_its_choice_repeats(tmp_path, folder, capsys):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert check_shards.main([str(folder), "--picture", str(tmp_path / f"{name}.png"), "--num-pictures", "3",
                                  "--seed", str(seed)]) == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c
    chosen = inspect_shard(InspectJob(str(folder / "train-000000.tar"), 1, 2)).chosen
    assert len(chosen) == 2 and chosen == sorted(chosen)


def test_outlines_lie_around_the_box():
    white = Image.new("RGB", (100, 50), (255, 255, 255))
    box = (20.0, 10.0, 60.0, 40.0)
    sample = Sample("k", "", white, 100, 50, "the box", (box, (80.0, 0.0, 100.0, 50.0)), {}, "detection", ("a", "b"))
    sheet = contact_sheet([sample], "title", tile_width=200)
    colours = {"a": COLOURS[0], "b": COLOURS[1]}
    pixels = {name: [(x, y) for y in range(60, sheet.height) for x in range(sheet.width)
                     if sheet.getpixel((x, y)) == colour] for name, colour in colours.items()}
    left, top = 16, 80  # where the picture begins: margin, title and legend
    xs, ys = {x - left for x, _ in pixels["a"]}, {y - top for _, y in pixels["a"]}
    # The scale is 2: the inner edge of a line of 2 pixels is the box.
    assert (min(xs), max(xs), min(ys), max(ys)) == (38, 121, 18, 81)
    assert not [(x, y) for x, y in pixels["a"] if 40 <= x - left < 120 and 20 <= y - top < 80]
    assert max(x - left for x, _ in pixels["b"]) == 199 and min(y - top for _, y in pixels["b"]) == 0
    many = [Sample(f"k{n}", "", white, 100, 50, "boxes", (box,), {}, "detection", (f"label {n}",)) for n in range(9)]
    assert contact_sheet(many, "title").width > 800
    with pytest.raises(ValueError, match="at least one sample"):
        contact_sheet([], "title")


def test_real_screens_and_processes(tmp_path):
    """The whole way: the carried screenshots to shards, checked by two processes."""
    tools = [sys.executable, str(ROOT / "tools" / "make_shards.py"), "--format", "jsonl", "--annotations",
             str(ROOT / "examples" / "data" / "webdocs_gui" / "annotations.jsonl"), "--task", "detection",
             "--resize", "160x200"]
    for split in ("train", "test"):
        subprocess.run([*tools, "--split", split, "--out", str(tmp_path / split), "--samples-per-shard", "20"],
                       check=True, capture_output=True)
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "check_shards.py"), str(tmp_path / "train"),
                           "--against", str(tmp_path / "test"), "--processes", "2", "--json",
                           str(tmp_path / "report.json"), "--picture", str(tmp_path / "sheet.png")],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    rows = [json.loads(line) for line in
            (ROOT / "examples" / "data" / "webdocs_gui" / "annotations.jsonl").read_text().splitlines()]
    objects = [thing for row in rows if row["split"] == "train" for thing in row["objects"]]
    assert report["set"]["boxes"]["count"] == len(objects) == sum(report["set"]["labels"].values())
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 1600


@pytest.mark.parametrize("arguments, status, words", [
    (["nowhere"], 1, "no shard matches 'nowhere'"),
    ([], 2, "SHARDS"),
    (["x", "--processes", "0"], 2, "at least 1"),
])
def test_bad_arguments(tmp_path, arguments, status, words):
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "check_shards.py"), *arguments], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == status and words in done.stderr and "Traceback" not in done.stderr


def test_bench_shards_measures(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "bench_shards.py"), "--num-pictures", "6",
                           "--picture-size", "32x24", "--samples-per-picture", "2", "--samples-per-shard", "4",
                           "--processes", "1,2", "--repeats", "1", "--out", str(tmp_path / "bench.json")],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert figures["samples"] == 12 and [row["processes"] for row in figures["runs"]] == [1, 2]
    assert all(row["samples_per_second"] > 0 for row in figures["runs"]) and figures["floor_samples_per_second"] > 0
    assert done.stdout.count("\n| ") >= 3


def test_a_folder_without_an_index_is_not_all_well(folder, capsys):
    (folder / "index.json").unlink()
    (folder / "train-000001.tar").unlink()
    status, report, text = check(capsys, folder)
    assert status == 1 and "WRONG: no index" in text and "counts and checksums unchecked" in text
    assert report["problems"]["by_kind"] == {"no index": 1} and report["without_index"] == []
    for pattern in (folder / "train-000000.tar", f"{folder}/*.tar"):
        status, report, text = check(capsys, pattern)
        assert status == 0 and report["without_index"] == [str(folder)]
        assert f"note: {folder}: no index.json" in text
