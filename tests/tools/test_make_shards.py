"""The command line of tools/make_shards.py, run as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megavg.data.shards import iterate_all

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "make_shards.py"
SCREENS = ROOT / "examples" / "data" / "webdocs_gui" / "annotations.jsonl"


def run(*arguments, cwd) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], cwd=cwd, capture_output=True, text=True)


def test_help_is_quick_and_complete(tmp_path):
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = run("--help", cwd=tmp_path)
        times.append(time.perf_counter() - start)
    assert done.returncode == 0 and min(times) < 1.0
    for option in ("--format", "--count", "--annotations", "--crop", "--resize", "--overwrite", "--samples-per-shard"):
        assert option in done.stdout


@pytest.mark.parametrize("arguments, words", [
    (["--format", "scenes"], "--out"),
    (["--format", "coco", "--out", "x"], "invalid choice: 'coco'"),
    (["--format", "scenes", "--out", "x"], "--format scenes needs --count"),
    (["--format", "jsonl", "--out", "x"], "--format jsonl needs --annotations"),
    (["--format", "jsonl", "--out", "x", "--annotations", "a", "--count", "3"], "--count does not belong to"),
    (["--format", "scenes", "--out", "x", "--count", "0"], "whole number of at least 1"),
    (["--format", "scenes", "--out", "x", "--count", "3", "--crop", "64"], "WxH"),
    (["--format", "scenes", "--out", "x", "--count", "3", "--crops-per-object", "2"], "needs --crop"),
    (["--format", "scenes", "--out", "x", "--count", "3", "--cuont", "2"], "unrecognized arguments: --cuont"),
])
def test_bad_arguments_answer_in_words_and_at_once(tmp_path, arguments, words):
    start = time.perf_counter()
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert time.perf_counter() - start < 2.0 and not (tmp_path / "x").exists()


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
    assert list((tmp_path / "out").iterdir()) == []
