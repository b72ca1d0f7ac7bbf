"""The command line of tools/make_shards.py, run as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from megavg.data.shards import iterate_all
from tools.shard_formats import load_formats

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "make_shards.py"
SCREENS = ROOT / "examples" / "data" / "webdocs_gui" / "annotations.jsonl"


def run(*arguments, cwd) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], cwd=cwd, capture_output=True, text=True)


def cpu_seconds() -> float:
    """What ended children have used: the time a user waits, but for what else the machine does."""
    times = os.times()
    return times.children_user + times.children_system


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_help_is_quick_and_complete(tmp_path):
    start = cpu_seconds()
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0 and cpu_seconds() - start < 1.0
    for option in ("--format", "--count", "--annotations", "--crop", "--resize", "--overwrite", "--samples-per-shard",
                   "--processes", "--on-error", "--on-duplicate", "--dry-run", "--image-root", "--frame"):
        assert option in done.stdout
    for name in ("scenes", "jsonl", "coco", "refcoco", "voc", "screenspot", "vlm_r1", "llava", "parquet"):
        assert f"{name}: " in done.stdout


@pytest.mark.parametrize("arguments, words", [
    (["--format", "scenes"], "--out"),
    (["--format", "cocoa", "--out", "x"], "invalid choice: 'cocoa'"),
    (["--format", "coco", "--out", "x", "--annotations", "a"], "--format coco needs --image-root"),
    (["--format", "voc", "--out", "x", "--annotations", "a", "--frame", "pixels"], "--frame does not belong to"),
    (["--format", "scenes", "--out", "x"], "--format scenes needs --count"),
    (["--format", "jsonl", "--out", "x"], "--format jsonl needs --annotations"),
    (["--format", "jsonl", "--out", "x", "--annotations", "a", "--count", "3"], "--count does not belong to"),
    (["--format", "scenes", "--out", "x", "--count", "0"], "whole number of at least 1"),
    (["--format", "scenes", "--out", "x", "--count", "3", "--crop", "64"], "WxH"),
    (["--format", "scenes", "--out", "x", "--count", "3", "--crops-per-object", "2"], "needs --crop"),
    (["--format", "scenes", "--out", "x", "--count", "3", "--cuont", "2"], "unrecognized arguments: --cuont"),
])
def test_bad_arguments_answer_in_words_and_at_once(tmp_path, arguments, words):
    start = cpu_seconds()
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert cpu_seconds() - start < 1.0 and not (tmp_path / "x").exists()


def test_scenes_repeat_and_are_not_overwritten_by_accident(tmp_path):
    options = ["--format", "scenes", "--count", 10, "--seed", 3, "--max-objects", 3, "--samples-per-shard", 4]
    done = run(*options, "--out", "one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("wrote 10 samples in 3 shards")
    assert run(*options, "--out", "two", cwd=tmp_path).returncode == 0
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two and sorted(one) == ["index.json"] + [f"shard-{i:06d}.tar" for i in range(3)]
    refused = run(*options, "--out", "one", cwd=tmp_path)
    assert refused.returncode == 2 and "not empty" in refused.stderr and "--overwrite" in refused.stderr
    again = run("--format", "scenes", "--count", 2, "--out", "one", "--prefix", "new", "--overwrite", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["index.json", "new-000000.tar"]


def test_screens_become_crops(tmp_path):
    done = run("--format", "jsonl", "--annotations", SCREENS, "--split", "test", "--crop", "320x240", "--resize",
               "160x120", "--crops-per-object", 2, "--limit", 12, "--out", "screens", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    samples = list(iterate_all(str(tmp_path / "screens")))
    index = json.loads((tmp_path / "screens" / "index.json").read_text())
    assert len(samples) == index["num_samples"] == 12
    for sample in samples:
        x0, y0, x1, y1 = sample.meta["crop_xyxy_px"]
        assert sample.image.size == (160, 120) and (x1 - x0, y1 - y0) == (320, 240) and sample.meta["split"] == "test"
    assert {sample.key.rsplit("-", 1)[1] for sample in samples} == {"crop0", "crop1"}


def test_whole_pictures_resized(tmp_path):
    done = run("--format", "jsonl", "--annotations", SCREENS, "--resize", "200x100", "--limit", 3, "--out", "screens",
               cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [sample.image.size for sample in iterate_all(str(tmp_path / "screens"))] == [(200, 100)] * 3


@pytest.mark.parametrize("arguments, words", [
    (["--format", "jsonl", "--annotations", "gone.jsonl"], "gone.jsonl"),
    (["--format", "jsonl", "--annotations", str(SCREENS), "--split", "val"], "'val'"),
    (["--format", "scenes", "--count", "3", "--image-size", "8"], "at least 32 pixels"),
    (["--format", "scenes", "--count", "3", "--crop", "500x500"], "no sample"),
])
def test_failures_are_one_line_and_leave_no_file(tmp_path, arguments, words):
    done = run(*arguments, "--out", "out", cwd=tmp_path)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_every_option_of_a_format_says_what_it_is():
    for name, chosen in load_formats().items():
        assert not [argument.option for argument in chosen.arguments if not argument.help], name
        for argument in chosen.arguments:
            assert argument.kind in ("bool", "str", "int", "float", "list[str]", "Sequence[str]"), argument


def test_a_detection_set_is_byte_identical_with_processes_and_ranks(tmp_path):
    options = ["--format", "jsonl", "--annotations", SCREENS, "--task", "detection", "--split", "test",
               "--resize", "200x250", "--samples-per-shard", 2]
    assert run(*options, "--out", "one", cwd=tmp_path).returncode == 0
    done = run(*options, "--out", "two", "--processes", 2, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("wrote 13 samples in 7 shards"), done.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert {sample.task for sample in iterate_all(str(tmp_path / "one"))} == {"detection"}


def test_dry_run_counts_and_writes_nothing(tmp_path):
    done = run("--format", "jsonl", "--annotations", SCREENS, "--split", "test", "--dry-run", "--out", "out",
               cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("220 samples in 1 shards") and not (tmp_path / "out").exists()
    assert done.stdout.count("picture: ") == 5 and "boxes_xyxy_px: [[" in done.stdout


@pytest.fixture
def rows(tmp_path):
    """A JSONL file of eight pictures, the fifth of them broken and the last the same as the first."""
    lines = []
    for number in range(8):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (40, 30), (number * 20, 10, 200) if number != 7 else (0, 10, 200)).save(path)
        lines.append({"image": path.name, "width": 40, "height": 30,
                      "objects": [{"bbox": [1, 2, 30, 20], "expression": "the thing"}]})
    (tmp_path / "4.png").write_bytes(b"no picture")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["--format", "jsonl", "--annotations", "rows.jsonl", "--samples-per-shard", 2]


def test_bad_samples_and_duplicates_are_told_and_left_out(tmp_path, rows):
    stopped = run(*rows, "--out", "out", "--prefix", "a", cwd=tmp_path)
    assert stopped.returncode == 1 and "rows.jsonl: line 5" in stopped.stderr and "--on-error skip" in stopped.stderr
    assert "2 finished shards are kept" in stopped.stderr
    done = run(*rows, "--out", "out", "--prefix", "a", "--on-error", "skip", cwd=tmp_path)
    assert done.returncode == 0, done.stderr  # it continues: what to do with bad samples is no part of the set
    assert "wrote 7 samples in 4 shards" in done.stdout and "left out 1: broken image" in done.stdout
    assert "duplicates: 1 samples" in done.stdout and "are kept" in done.stdout
    done = run(*rows, "--out", "two", "--on-error", "skip", "--on-duplicate", "skip", "--processes", 2, cwd=tmp_path)
    assert done.returncode == 0 and "wrote 6 samples in 4 shards" in done.stdout, done.stderr
    listed = [json.loads(line) for line in (tmp_path / "two" / "left_out.jsonl").read_text().splitlines()]
    assert sorted(row["reason"] for row in listed) == ["broken image", "duplicate"]


def test_a_coco_file_becomes_detections_and_expressions(tmp_path, rows):
    coco = {"images": [{"id": n, "file_name": f"{n}.png", "width": 40, "height": 30} for n in (0, 1, 2)],
            "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}],
            "annotations": [{"id": n, "image_id": n // 2, "category_id": (3, 5)[n % 2], "bbox": [n, 1, 10, 12],
                             "iscrowd": 0} for n in range(4)]}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    options = ["--format", "coco", "--annotations", "coco.json", "--image-root", "."]
    done = run(*options, "--keep-empty", "--classes", "dog,cat", "--out", "detection", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    detections = list(iterate_all(str(tmp_path / "detection")))
    assert [len(sample.boxes_xyxy_px) for sample in detections] == [2, 2, 0]
    assert detections[1].boxes_xyxy_px == ((2, 1, 12, 13), (3, 1, 13, 13)) and detections[1].labels == ("cat", "dog")
    assert run(*options, "--task", "rec", "--out", "rec", cwd=tmp_path).returncode == 0
    assert [sample.expression for sample in iterate_all(str(tmp_path / "rec"))] == ["the cat", "the dog"] * 2
    bad = run(*options, "--task", "red", "--out", "bad", cwd=tmp_path)
    assert bad.returncode == 1 and "red" in bad.stderr and "Traceback" not in bad.stderr


def mpirun(number: int, *arguments, cwd) -> subprocess.CompletedProcess:
    launcher = shutil.which("mpirun", path=str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"])
    if launcher is None:
        pytest.skip("mpirun is not installed")
    command = [launcher, "--allow-run-as-root", "--oversubscribe", "-n", str(number), sys.executable, str(TOOL)]
    return subprocess.run(command + [str(word) for word in arguments], cwd=cwd, capture_output=True, text=True,
                          timeout=180)


def test_mpi_ranks_build_the_same_bytes(tmp_path, rows):
    options = [*rows, "--on-error", "skip"]
    assert run(*options, "--out", "one", cwd=tmp_path).returncode == 0
    done = mpirun(2, *options, "--out", "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote 7 samples in 4 shards") == 1
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    refused = mpirun(2, *options, "--out", "two", "--prefix", "x", "--overwrite", "--limit", 3, cwd=tmp_path)
    assert refused.returncode == 0 and sorted(contents(tmp_path / "two")) == [
        "index.json", "x-000000.tar", "x-000001.tar"]


@pytest.mark.parametrize("changes, words", [
    ([], "broken image"),  # on one rank alone
    (["--on-error", "skip", "--on-duplicate", "raise"], "set on_duplicate"),  # on all of them
    (["--split", "none"], "no line has split"),
])
def test_an_error_under_mpi_ends_all_ranks_with_one_message(tmp_path, rows, changes, words):
    done = mpirun(2, *rows, *changes, "--out", "out", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("make_shards: error") == 1 and words in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "index.json").exists()


def test_wrong_arguments_under_mpi_are_told_once(tmp_path):
    done = mpirun(2, "--format", "scenes", "--out", "x", cwd=tmp_path)
    assert done.returncode != 0 and done.stderr.count("--format scenes needs --count") == 1
    refused = {**os.environ, "OMPI_COMM_WORLD_SIZE": "", "PMI_SIZE": "3"}  # three were started, MPI knows of one
    alone = subprocess.run([sys.executable, str(TOOL), "--format", "scenes", "--count", "3", "--out", "x"],
                           cwd=tmp_path, capture_output=True, text=True, env=refused, timeout=120)
    assert alone.returncode == 1 and "PMI_SIZE=3, but mpi4py sees 1 rank" in alone.stderr
    assert not (tmp_path / "x").exists()


def test_stopped_by_the_keyboard_and_continued(tmp_path):
    options = ["--format", "scenes", "--count", "400", "--samples-per-shard", "10", "--processes", "2", "--out", "out"]
    # a shell's background jobs ignore the signal, and so would their children
    process = subprocess.Popen([sys.executable, str(TOOL), *options], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "out" / ".unfinished").glob("0*.json"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of its processes
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "without --overwrite, continues" in said and "Traceback" not in said
    assert run(*options, cwd=tmp_path).stdout.startswith("wrote 400 samples in 40 shards")


@pytest.mark.parametrize("clip", ["nan", "inf", "-1", "x"])
def test_clip_is_a_finite_number_of_pixels(tmp_path, clip):
    done = run("--format", "jsonl", "--annotations", "a", "--out", "x", f"--clip={clip}", cwd=tmp_path)
    assert done.returncode == 2 and f"'{clip}' is not a finite number of at least 0" in done.stderr


def test_a_bad_row_that_no_encoding_holds_is_reported(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    rows = [{"image": name, "width": 40, "height": 30, "objects": [{"bbox": [1, 2, 3, 4], "expression": "x"}]}
            for name in ("a.png", "\ud800.png")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("--format", "jsonl", "--annotations", "a.jsonl", "--out", "x", "--on-error", "skip", cwd=tmp_path)
    assert done.returncode == 0 and "left out 1: bad json" in done.stdout, done.stderr
    assert json.loads((tmp_path / "x" / "left_out.jsonl").read_text())["image"].endswith("\ud800.png")
