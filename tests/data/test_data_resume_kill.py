"""Processes that are killed in the middle of an epoch and started again on another number of ranks lose nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "data" / "consume_batches.py"
NUM_BATCHES = 24


def start(spec: dict) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(PROGRAM), json.dumps(spec)], cwd=ROOT, stderr=subprocess.PIPE,
                            text=True)


def logged(spec: dict) -> list[list[str]]:
    path = Path(spec["log"])
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def run(spec: dict) -> None:
    process = start(spec)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors


def run_and_kill(spec: dict, after: int) -> None:
    """Kill the program with SIGKILL once ``after`` batches are in its log."""
    process = start({**spec, "pause": 0.03})
    end = time.monotonic() + 240
    while len(logged(spec)) < after and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, f"it ended before it was killed:\n{errors}"
    assert after <= len(logged(spec)) < NUM_BATCHES


def chain(spec: dict, folder: Path, stages: list[tuple[int, int]]) -> list[list[str]]:
    """The log of runs of (dp_size, num_workers) that follow each other, each but the last killed on its way."""
    spec = {**spec, "log": str(folder / "killed.jsonl"), "checkpoint": str(folder / "killed.json")}
    for number, (dp_size, num_workers) in enumerate(stages):
        stage = {**spec, "dp_size": dp_size, "num_workers": num_workers}
        if number == len(stages) - 1:
            run(stage)
        else:
            run_and_kill(stage, after=5 + 5 * number)
    return logged(spec)


@pytest.fixture
def spec(tmp_path) -> dict:
    return {"batch_size": 12, "seed": 3, "shuffle_buffer": 20, "num_batches": NUM_BATCHES, "pause": 0.0,
            "dp_size": 1, "num_workers": 0, "agree": False, "log": str(tmp_path / "whole.jsonl"),
            "checkpoint": str(tmp_path / "whole.json")}


CHAINS = {"DP 1": [(1, 0), (1, 0)], "DP 2 -> 4 -> 3": [(2, 0), (4, 0), (3, 0)],
          "DP 2 -> 4 -> 3 with workers": [(2, 2), (4, 1), (3, 2)], "workers come and go": [(1, 2), (1, 0), (2, 1)]}


@pytest.mark.parametrize("name", CHAINS)
def test_killed_and_resumed_equals_uninterrupted(shard_set, tmp_path, spec, name):
    spec["shards"] = [shard_set(140, 23)]  # more than two epochs in 24 batches of 12
    run(spec)
    whole = logged(spec)
    assert len(whole) == NUM_BATCHES
    seen = chain(spec, tmp_path, CHAINS[name])
    assert seen == whole, "the order"
    flat = [key for batch in seen for key in batch]
    every = Counter(f"train-{i // 23:06d}.tar/s{i:05d}" for i in range(140))
    assert Counter(flat[:140]) == every and Counter(flat[140:280]) == every, "each sample once in each epoch"


@pytest.mark.parametrize("agree, stages", [(False, [(2, 1), (4, 0), (3, 1)]), (True, [(2, 0), (2, 1), (3, 0)])])
def test_a_mixture_with_bad_records_is_resumed_too(shard_set, raw_tar, record, tmp_path, spec, agree, stages):
    """With ``agree`` each rank decodes its own records and the others hear of the bad ones; the order is the same."""
    bad = {i: {"image": b"?"} for i in range(0, 50, 7)}
    damaged = raw_tar([m for i in range(50) for m in record(f"r{i:02d}", **bad.get(i, {}))], "damaged.tar")
    spec["mixture"] = {"clean": [[shard_set(60, 23)], 1.0], "damaged": [[damaged], 1.0]}
    run(spec)
    whole = logged(spec)
    assert chain({**spec, "agree": agree}, tmp_path, stages) == whole
    first = [key for batch in whole for key in batch if key.startswith("damaged")][:42]
    assert Counter(first) == Counter(f"damaged.tar/r{i:02d}" for i in range(50) if i % 7)
