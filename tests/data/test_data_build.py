"""A built set holds the same bytes for any number of processes, goes on after a kill, and names what is bad."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from megavg.data.builder.build import build_shards
from megavg.data.builder.options import BuildOptions
from megavg.data.builder.scenes import read as read_scenes
from megavg.data.readers.base import Draft, ImageFile, broken
from megavg.data.sample import SampleError, check_sample, parse_record
from megavg.data.scenes import scenes
from megavg.data.shards import iterate_all
from megavg.data.tars import read_records
from megavg.data.writer import write_shards

ROOT = Path(__file__).parents[2]


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def make_draft(tmp_path):
    """Factory of drafts with a picture file of random pixels; ``picture`` names another draft's file."""
    def make(number: int, kind: str = "png", picture: int | None = None, **fields) -> Draft:
        path = tmp_path / "pictures" / f"{number if picture is None else picture}.{kind}"
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            image = Image.frombytes("RGB", (24, 18), random.Random(number).randbytes(24 * 18 * 3))
            image.save(path, {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[kind])
        fields = {"width": 24, "height": 18, "expression": f"Ding № {number}", "split": "train",
                  "boxes_xyxy_px": [[1, 2, 5 + number, 9]], **fields}
        return Draft(f"list: row {number}", f"k{number:03d}", ImageFile(str(path)), fields)
    return make


@pytest.fixture
def mixed(make_draft):
    """Drafts of three picture formats, two samples a picture, two of them bad."""
    drafts = [make_draft(n, ("png", "jpg", "webp")[n // 2 % 3], picture=n // 2 * 2) for n in range(14)]
    Path(drafts[4].image.path).write_bytes(b"no picture")  # of drafts 4 and 5
    return drafts


SKIP = {"samples_per_shard": 3, "on_error": "skip"}


@pytest.mark.parametrize("changes", [{}, {"image_format": "webp"}, {"crop": (16, 12), "crops_per_sample": 2},
                                     {"resize": (30, 20), "limit": 11}])
def test_bytes_do_not_depend_on_the_number_of_processes(tmp_path, mixed, changes):
    options = BuildOptions(**SKIP, **changes)
    index = build_shards(mixed, str(tmp_path / "1"), options, 1)
    for number in (2, 3):
        assert build_shards(mixed, str(tmp_path / str(number)), options, number) == index
        assert contents(tmp_path / str(number)) == contents(tmp_path / "1")
    assert index["left_out"]["broken image"]["count"] == 2 * options.crops_per_sample
    names = {f"shard-{i:06d}.tar" for i in range(len(index["shards"]))}
    assert set(contents(tmp_path / "1")) == names | {"index.json", "left_out.jsonl"}


def test_what_is_left_out_moves_no_other_sample(tmp_path, mixed):
    index = build_shards(mixed, str(tmp_path / "s"), BuildOptions(**SKIP))
    held = [[record.key for record in read_records(str(tmp_path / "s" / shard["name"]))] for shard in index["shards"]]
    assert held == [["k000", "k001", "k002"], ["k003"], ["k006", "k007", "k008"], ["k009", "k010", "k011"],
                    ["k012", "k013"]]
    assert [shard["num_samples"] for shard in index["shards"]] == [3, 1, 3, 3, 2] and index["num_samples"] == 12
    rows = [json.loads(line) for line in (tmp_path / "s" / "left_out.jsonl").read_text().splitlines()]
    assert [(row["key"], row["where"], row["reason"]) for row in rows] == [
        ("k004", "list: row 4", "broken image"), ("k005", "list: row 5", "broken image")]
    assert all("4.webp" in row["detail"] and row["image"].endswith("4.webp") for row in rows)


def test_a_shard_without_samples_leaves_no_gap_in_the_names(tmp_path, make_draft):
    drafts = [make_draft(n) for n in range(6)]
    for draft in drafts[2:4]:
        Path(draft.image.path).write_bytes(b"")
    index = build_shards(drafts, str(tmp_path / "s"), BuildOptions(samples_per_shard=2, on_error="skip"))
    assert [shard["name"] for shard in index["shards"]] == ["shard-000000.tar", "shard-000001.tar"]
    assert [sample.key for sample in iterate_all(str(tmp_path / "s"))] == ["k000", "k001", "k004", "k005"]


def test_keep_stores_the_sources_bytes(tmp_path, make_draft):
    drafts = [make_draft(0), make_draft(1, "jpg"), make_draft(2, "webp")]
    path = Path(drafts[1].image.path)
    exif = Image.Exif()
    exif[0x010E] = "taken on a Tuesday"
    with Image.open(path) as image:
        image.save(path, "JPEG", exif=exif)
    for image_format, kept in (("keep", True), ("png", False)):
        build_shards(drafts, str(tmp_path / image_format), BuildOptions(image_format=image_format))
        for draft, record in zip(drafts, read_records(str(tmp_path / image_format / "shard-000000.tar"))):
            suffix = Path(draft.image.path).suffix[1:] if kept else "png"
            data = record.files[suffix]
            data = bytes(data) if isinstance(data, bytes) else data.read()
            assert (data == draft.image.read()) == (kept or draft is drafts[0]) and (b"Tuesday" in data) == (
                kept and draft is drafts[1])
            with Image.open(io.BytesIO(data)) as stored, Image.open(draft.image.path) as source:
                assert stored.convert("RGB").tobytes() == source.convert("RGB").tobytes()


def test_samples_are_those_that_the_drafts_load(tmp_path, make_draft):
    """The builder shares a decoded picture among drafts; what it writes must be what ``Draft.load`` gives."""
    drafts = [make_draft(n, picture=n % 2, **fields) for n, fields in enumerate([
        {}, {"task": "detection", "labels": ["a"]}, {"task": "classification", "labels": ["x"], "boxes_xyxy_px": []},
        {"task": "detection", "boxes_xyxy_px": [], "labels": []}])]
    relative = make_draft(5, boxes_xyxy_px=[[100, 200, 500, 900]])
    drafts.append(Draft(relative.where, relative.key, relative.image, relative.fields, box_frame="relative_1000"))
    over = make_draft(6, boxes_xyxy_px=[[3, 3, 24.5, 18]])
    drafts.append(Draft(over.where, over.key, over.image, over.fields, clip_px=1.0))
    unsized = make_draft(7)
    drafts.append(Draft(unsized.where, unsized.key, unsized.image, {name: value for name, value in
                                                                    unsized.fields.items() if name != "width"}))
    build_shards(drafts, str(tmp_path / "s"), BuildOptions())
    for draft, sample in zip(drafts, iterate_all(str(tmp_path / "s")), strict=True):
        wanted = draft.load()
        assert sample.image.tobytes() == wanted.image.tobytes()
        for name in ("key", "width", "height", "expression", "boxes_xyxy_px", "meta", "task", "labels"):
            assert getattr(sample, name) == getattr(wanted, name), name


def test_scenes_are_drawn_as_ever(tmp_path):
    options = {"min_objects": 1, "max_objects": 3, "shapes": ["circle", "square"]}
    write_shards(scenes(20, 5, 64, **options), str(tmp_path / "old"), "shard", 8)
    index = build_shards(read_scenes(20, 5, 64, **options), str(tmp_path / "new"), BuildOptions(samples_per_shard=8), 2)
    old, new = contents(tmp_path / "old"), contents(tmp_path / "new")
    assert {name: new[name] for name in new if name != "index.json"} == {
        name: old[name] for name in old if name != "index.json"}
    assert index["shards"] == json.loads(old["index.json"])["shards"]


def test_crops_hold_their_boxes_and_unfit_ones_are_listed(tmp_path, make_draft):
    drafts = [make_draft(n) for n in range(12)]  # boxes are 4 + n pixels wide, so the last three do not fit 12 pixels
    options = BuildOptions(crop=(12, 10), crops_per_sample=2, samples_per_shard=5)
    index = build_shards(drafts, str(tmp_path / "s"), options, 2)
    samples = list(iterate_all(str(tmp_path / "s")))
    assert [sample.key for sample in samples] == [f"k{n:03d}-crop{turn}" for n in range(9) for turn in range(2)]
    assert all(sample.image.size == (12, 10) for sample in samples)
    for sample in samples:
        check_sample(sample)
    assert index["left_out"]["window does not fit"]["count"] == 3 and index["num_samples"] == 18
    with pytest.raises(ValueError, match="no box to cut a window around"):
        build_shards([make_draft(13, task="classification", labels=["a"], boxes_xyxy_px=[])], str(tmp_path / "c"),
                     BuildOptions(crop=(12, 10)))


def test_index_counts(tmp_path, make_draft):
    drafts = [make_draft(n, split="val" if n % 3 else "test", label=f"label {n % 7}") for n in range(9)]
    index = build_shards(drafts, str(tmp_path / "s"), BuildOptions(samples_per_shard=4))
    assert json.loads((tmp_path / "s" / "index.json").read_text()) == index and index["format_version"] == 1
    assert index["totals"] == {"task": {"rec": 9}, "split": {"val": 6, "test": 3},
                               "label": {"label 0": 2, "label 1": 2} | {f"label {n}": 1 for n in range(2, 7)}}
    assert index["bytes"] == sum(os.path.getsize(tmp_path / "s" / shard["name"]) for shard in index["shards"])


@pytest.mark.parametrize("spoil, reason", [
    (lambda draft: Path(draft.image.path).unlink(), "missing image"),
    (lambda draft: Path(draft.image.path).write_bytes(draft.image.read()[:-40]), "broken image"),
    (lambda draft: draft.fields.update(boxes_xyxy_px=[[4, 4, 4, 9]]), "empty box"),
    (lambda draft: draft.fields.update(boxes_xyxy_px=[[4, 4, 24.5, 9]]), "box outside image"),
    (lambda draft: draft.fields.update(width=25), "size mismatch"),
    (lambda draft: draft.fields.update(expression=" "), "missing field"),
])
def test_bad_samples_stop_or_are_left_out(tmp_path, make_draft, spoil, reason):
    drafts = [make_draft(n) for n in range(4)]
    spoil(drafts[2])
    out = tmp_path / "s"
    with pytest.raises(SampleError, match=rf"list: row 2: sample 'k002': {reason}.*--on-error skip"):
        build_shards(drafts, str(out), BuildOptions())
    assert not list(out.iterdir())
    index = build_shards(drafts, str(out), BuildOptions(on_error="skip", max_skipped=1))
    assert index["num_samples"] == 3 and index["left_out"][reason]["count"] == 1
    assert index["left_out"][reason]["first"][0]["where"] == "list: row 2"
    with pytest.raises(ValueError, match="more than max_skipped=0.*list: row 2"):
        build_shards(drafts, str(tmp_path / "t"), BuildOptions(on_error="skip", max_skipped=0))


def test_rows_that_could_not_be_read_count_as_bad_samples(tmp_path, make_draft):
    drafts = [make_draft(0), broken("list: row 1", "row-1", "bad json", "expected an object"),
              broken("list: row 2", "row-2", "bad json", "expected an object")]
    with pytest.raises(SampleError, match="list: row 1: sample 'row-1': bad json"):
        build_shards(drafts, str(tmp_path / "s"), BuildOptions())
    index = build_shards(drafts, str(tmp_path / "s"), BuildOptions(on_error="skip"))
    assert index["left_out"]["bad json"]["count"] == 2 and index["duplicates"]["count"] == 0


def test_the_limit_of_bad_samples_is_one_for_all_processes(tmp_path, make_draft):
    drafts = [make_draft(n, boxes_xyxy_px=[[0, 0, 99, 9]] if n % 2 else [[0, 0, 9, 9]]) for n in range(8)]
    options = {"samples_per_shard": 2, "on_error": "skip"}
    assert build_shards(drafts, str(tmp_path / "s"), BuildOptions(max_skipped=4, **options), 2)["num_samples"] == 4
    with pytest.raises(ValueError, match="4 bad samples were left out .*'box outside image': 4.* max_skipped=3"):
        build_shards(drafts, str(tmp_path / "t"), BuildOptions(max_skipped=3, **options), 2)


def test_nothing_to_write(tmp_path, make_draft):
    with pytest.raises(ValueError, match="no sample to write"):
        build_shards([], str(tmp_path / "s"), BuildOptions())
    with pytest.raises(ValueError, match="all 1 were left out"):
        build_shards([make_draft(1, width=9)], str(tmp_path / "s"), BuildOptions(on_error="skip"))


def test_keys_that_occur_twice_name_both_places(tmp_path, make_draft):
    drafts = [make_draft(0), make_draft(1), make_draft(0)]
    drafts[2] = Draft("list: row 99", drafts[0].key, drafts[0].image, drafts[0].fields)
    with pytest.raises(ValueError, match="'k000' occurs twice: list: row 0 and list: row 99"):
        build_shards(drafts, str(tmp_path / "s"), BuildOptions())


def test_duplicates_by_bytes_question_and_answer(tmp_path, make_draft):
    same = {"expression": "it", "boxes_xyxy_px": [[1, 2, 3, 4]]}
    drafts = [make_draft(0, **same), make_draft(1, **same), make_draft(2, picture=0, **same),
              make_draft(3, **{**same, "boxes_xyxy_px": [[1.0, 2, 3, 4]]}), make_draft(4, picture=0, expression="it"),
              make_draft(5, picture=0, **same, task="detection", labels=["a"])]
    Path(drafts[3].image.path).write_bytes(drafts[0].image.read())  # another file, the same picture
    keep = build_shards(drafts, str(tmp_path / "keep"), BuildOptions(samples_per_shard=2))
    assert keep["duplicates"] == {"count": 2, "first": [["k000", "k002"], ["k000", "k003"]]}
    assert keep["num_samples"] == 6
    skip = build_shards(drafts, str(tmp_path / "skip"), BuildOptions(samples_per_shard=2, on_duplicate="skip"), 2)
    assert [sample.key for sample in iterate_all(str(tmp_path / "skip"))] == ["k000", "k001", "k004", "k005"]
    assert skip["left_out"]["duplicate"]["count"] == 2
    with pytest.raises(ValueError, match="2 samples are the same.*'k002' .list: row 2.*'k000' .list: row 0"):
        build_shards(drafts, str(tmp_path / "raise"), BuildOptions(on_duplicate="raise"))


@pytest.mark.parametrize("changes", [{"image_format": "gif"}, {"on_error": "ignore"}, {"on_duplicate": "drop"},
                                     {"samples_per_shard": 0}, {"prefix": "a/b"}, {"limit": 0}, {"max_skipped": -1},
                                     {"crops_per_sample": 2}])
def test_wrong_options(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        BuildOptions(**changes)


def test_a_folder_that_holds_something_is_refused_with_the_remedy(tmp_path, make_draft):
    drafts, out = [make_draft(n) for n in range(4)], tmp_path / "s"
    build_shards(drafts, str(out), BuildOptions(samples_per_shard=1))
    before = contents(out)
    with pytest.raises(ValueError, match="a finished set.*--overwrite"):
        build_shards(drafts[:1], str(out), BuildOptions(prefix="new"))
    assert contents(out) == before
    (out / "notes.txt").write_text("keep")
    build_shards(drafts[:1], str(out), BuildOptions(prefix="new"), overwrite=True)
    assert sorted(contents(out)) == ["index.json", "new-000000.tar", "notes.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        build_shards(drafts, str(tmp_path / "file"), BuildOptions(), overwrite=True)


def test_an_old_set_stands_until_the_new_one_is_whole(tmp_path, make_draft):
    drafts, out = [make_draft(n) for n in range(6)], tmp_path / "s"
    build_shards(drafts[:2], str(out), BuildOptions())
    before = contents(out)
    Path(drafts[5].image.path).write_bytes(b"")
    options = BuildOptions(samples_per_shard=2)
    with pytest.raises(SampleError, match="2 finished shards are kept in .*without --overwrite, continues"):
        build_shards(drafts, str(out), options, overwrite=True)
    assert {name: data for name, data in before.items() if (out / name).read_bytes() == data} == before
    with pytest.raises(ValueError, match="unfinished build of another source.*num_samples was 6, is 5.*--overwrite"):
        build_shards(drafts[:5], str(out), options)
    with pytest.raises(ValueError, match="samples_per_shard was 2, is 3"):
        build_shards(drafts, str(out), BuildOptions(samples_per_shard=3))
    drafts[0].fields["expression"] = "something else"
    with pytest.raises(ValueError, match="fields or pictures of its samples differ"):
        build_shards(drafts, str(out), options)
    build_shards(drafts[:5], str(out), options, overwrite=True)
    assert sorted(contents(out)) == ["index.json"] + [f"shard-{i:06d}.tar" for i in range(3)]


def test_after_a_bad_picture_the_finished_shards_serve_again(tmp_path, make_draft):
    drafts, out = [make_draft(n) for n in range(6)], tmp_path / "s"
    whole = build_shards(drafts, str(tmp_path / "whole"), BuildOptions(samples_per_shard=2))
    good = Path(drafts[5].image.path).read_bytes()
    Path(drafts[5].image.path).write_bytes(b"")
    with pytest.raises(SampleError):
        build_shards(drafts, str(out), BuildOptions(samples_per_shard=2))
    inodes = {path.name: path.stat().st_ino for path in (out / ".unfinished").glob("*.tar")}
    assert sorted(inodes) == ["000000.tar", "000001.tar"]
    (out / ".unfinished" / "000001.tar").write_bytes(b"damaged since")
    Path(drafts[5].image.path).write_bytes(good)
    assert build_shards(drafts, str(out), BuildOptions(samples_per_shard=2)) == whole
    assert contents(out) == contents(tmp_path / "whole")
    assert (out / "shard-000000.tar").stat().st_ino == inodes["000000.tar"]  # moved, not built again


def test_a_shard_that_left_bad_samples_out_does_not_serve_raise(tmp_path, make_draft):
    drafts, out = [make_draft(n, width=9 if n in (1, 5) else 24) for n in range(6)], str(tmp_path / "s")
    with pytest.raises(ValueError, match="max_skipped=1"):
        build_shards(drafts, out, BuildOptions(samples_per_shard=2, on_error="skip", max_skipped=1))
    with pytest.raises(SampleError, match="k001"):
        build_shards(drafts, out, BuildOptions(samples_per_shard=2))
    assert build_shards(drafts, out, BuildOptions(samples_per_shard=2, on_error="skip"))["num_samples"] == 4


def test_a_publication_that_failed_halfway_is_completed(tmp_path, make_draft):
    drafts, out, options = [make_draft(n) for n in range(4)], tmp_path / "s", BuildOptions(samples_per_shard=1)
    build_shards(drafts, str(tmp_path / "whole"), options)
    (out / "shard-000002.tar").mkdir(parents=True)  # in the way of the third shard
    (out / "shard-000002.tar" / "x").write_text("")
    with pytest.raises(OSError, match="the same command, without --overwrite, continues"):
        build_shards(drafts, str(out), options, overwrite=True)
    assert not (out / "index.json").exists() and (out / "shard-000001.tar").exists()
    (out / "shard-000002.tar" / "x").unlink()
    (out / "shard-000002.tar").rmdir()
    build_shards(drafts, str(out), options)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_in_the_middle_and_run_again(tmp_path, processes):
    tool = [sys.executable, str(ROOT / "tools" / "make_shards.py"), "--format", "scenes", "--count", "450", "--seed",
            "4", "--samples-per-shard", "15", "--processes", str(processes), "--out"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([*tool, str(killed)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list((killed / ".unfinished").glob("0*.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "index.json").exists() and not list(killed.glob("*.tar"))
    time.sleep(0.5)  # its processes end with it: nothing is written any more
    before = {path.name: path.stat().st_ino for path in (killed / ".unfinished").glob("??????.tar")}
    listing = sorted((killed / ".unfinished").iterdir())
    time.sleep(0.5)
    assert sorted((killed / ".unfinished").iterdir()) == listing and 3 <= len(before) < 30
    again = subprocess.run([*tool, str(killed)], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    build_shards(read_scenes(450, 4), str(whole), BuildOptions(samples_per_shard=15))
    assert contents(killed) == contents(whole)  # and no .unfinished, which could not be read as a file
    kept = [name for name, inode in before.items() if (killed / f"shard-{name}").stat().st_ino == inode]
    assert len(kept) >= 3  # continued, not begun anew


def test_a_killed_worker_is_one_clear_error(tmp_path):
    code = ("import os, signal\n"
            "from megavg.data.builder.pool import run_jobs\n"
            "if __name__ == '__main__':\n"
            "    list(run_jobs(os.kill, [], 2))\n"
            "    try:\n"
            "        list(run_jobs(die, [1, 2], 2))\n"
            "    except ChildProcessError as error:\n"
            "        print(error)\n")
    script = tmp_path / "script.py"
    script.write_text("def die(job, tick):\n    import os, signal\n    os.kill(os.getpid(), signal.SIGKILL)\n" + code)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and done.stdout.startswith("a building process was killed"), done.stderr


def test_records_read_back_as_records(tmp_path, make_draft):
    build_shards([make_draft(3)], str(tmp_path / "s"), BuildOptions(prefix="p"))
    (record,) = read_records(str(tmp_path / "s" / "p-000000.tar"))
    assert parse_record(record).boxes_xyxy_px == ((1.0, 2.0, 8.0, 9.0),)
