"""Worker processes: the same batches, errors where they belong, and no process that stays behind."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megavg.data.prefetch import DecodePool, WorkerError, result
from megavg.data.sample import SampleError
from megavg.data.shards import PromptSource
from megavg.data.tars import read_records
from megavg.protocols.options import LabelNoise
from tests.data.all_ranks import keys

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def contents(batch) -> list[tuple]:
    return [(s.key, s.shard, s.boxes_xyxy_px, s.meta, s.image.mode, s.image.tobytes()) for s in batch]


def gone(pid: int, seconds: float = 10) -> bool:
    """Whether the process ends in time, and does not stay as a zombie of this one."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not os.path.exists(f"/proc/{pid}"):
            return True
        time.sleep(0.05)
    return False


def wait_for_decoded(source: PromptSource) -> None:
    """Until the workers have nothing left to do."""
    while any(worker.waiting for worker in source._pool._workers):
        time.sleep(0.02)


@pytest.mark.parametrize("workers, ahead", [(1, 1), (2, 2), (3, 5)])
def test_contents_order_and_positions_do_not_depend_on_workers(shard_set, workers, ahead):
    folder = shard_set(40, 7)
    plain = PromptSource(folder, 12, 7, 1, 3, shuffle_buffer=9, noise=LabelNoise(0.5))
    with PromptSource(folder, 12, 7, 1, 3, shuffle_buffer=9, noise=LabelNoise(0.5), num_workers=workers,
                      prefetch_batches=ahead) as source:
        for _ in range(8):
            assert contents(source.next_batch()) == contents(plain.next_batch())
            assert source.state_dict() == plain.state_dict(), "what is decoded ahead does not count"


def test_a_finite_source_ends_alike(shard_set):
    folder = shard_set(22, 7)
    plain = [keys(batch) for batch in PromptSource(folder, 8, 1, 1, 2, infinite=False)]
    for num_workers in (1, 2):
        with PromptSource(folder, 8, 1, 1, 2, infinite=False, num_workers=num_workers) as source:
            assert [keys(batch) for batch in source] == plain
            assert list(source) == []


def test_a_restart_with_other_workers(shard_set):
    folder = shard_set(40, 7)
    plain = PromptSource(folder, 12, 7, shuffle_buffer=9)
    expected = [keys(plain.next_batch()) for _ in range(9)]
    seen, state = [], None
    for workers, count in ((2, 3), (0, 2), (1, 4)):
        with PromptSource(folder, 12, 7, shuffle_buffer=9, num_workers=workers) as source:
            if state:
                source.load_state_dict(state)
            seen += [keys(source.next_batch()) for _ in range(count)]
            state = json.loads(json.dumps(source.state_dict()))
    assert seen == expected


def test_a_position_loaded_into_a_running_source_drops_what_was_decoded(shard_set):
    with PromptSource(shard_set(40, 7), 12, 7, shuffle_buffer=9, num_workers=1) as source:
        start = source.state_dict()
        first = [keys(source.next_batch()) for _ in range(3)]
        source.load_state_dict(start)
        assert [keys(source.next_batch()) for _ in range(3)] == first


def test_bad_records_are_skipped_alike_and_an_error_comes_with_its_batch(raw_tar, record):
    bad = {4: {"expression": None}, 11: {"image": b"\x89PNG no picture"}, 17: {"boxes_xyxy_px": [[0, 0, 99, 5]]}}
    path = raw_tar([m for i in range(30) for m in record(f"r{i:02d}", **bad.get(i, {}))])
    plain = PromptSource(path, 6, 3, shuffle_buffer=10, on_error="skip")
    with PromptSource(path, 6, 3, shuffle_buffer=10, on_error="skip", num_workers=2, prefetch_batches=3) as source:
        for _ in range(9):
            assert keys(source.next_batch()) == keys(plain.next_batch())
            assert source.state_dict() == plain.state_dict()
    with PromptSource(path, 2, 3, shuffle_buffer=1, num_workers=1, prefetch_batches=4) as source:
        assert [keys(source.next_batch()) for _ in range(2)] == [["r00", "r01"], ["r02", "r03"]]
        wait_for_decoded(source)
        state = source.state_dict()
        for _ in range(2):
            with pytest.raises(SampleError, match="r04.*missing field.*on_error='skip'"):
                source.next_batch()
        assert source.state_dict() == state


def test_a_torn_shard_counts_with_the_batch_that_meets_it(shard_set):
    folder = shard_set(24, 6)
    os.truncate(f"{folder}/train-000001.tar", 5000)
    plain = PromptSource(folder, 4, 2, shuffle_buffer=1, on_error="skip")
    with PromptSource(folder, 4, 2, shuffle_buffer=1, on_error="skip", num_workers=1, prefetch_batches=6) as source:
        for _ in range(6):
            assert keys(source.next_batch()) == keys(plain.next_batch())
            assert source.state_dict() == plain.state_dict() and source.skipped == plain.skipped
    assert plain.skipped == {"torn shard": 1}


def test_shards_without_a_usable_sample_end_with_workers_too(raw_tar, record):
    path = raw_tar([m for i in range(2) for m in record(f"r{i}", image=b"?")])
    with PromptSource(path, 4, 0, on_error="skip", num_workers=1) as source:
        with pytest.raises(ValueError, match="no usable sample"):
            source.next_batch()


def test_what_is_ahead_is_bounded(shard_set):
    with PromptSource(shard_set(40, 7), 4, 0, 0, 2, num_workers=1, prefetch_batches=3) as source:
        source.next_batch()
        wait_for_decoded(source)
        ahead = [candidate for candidate in source._lanes[0]._queue if candidate.job is not None]
        assert len(ahead) == 3 * 2 and len(source._lanes[0]._queue) <= 3 * 4


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="looks into /proc")
def test_workers_load_no_torch_and_are_no_forks(shard_set):
    import torch  # noqa: F401  (a fork would have it)

    with PromptSource(shard_set(12, 12), 4, 0, num_workers=2) as source:
        source.next_batch()
        for pid in source._pool.pids:
            maps = Path(f"/proc/{pid}/maps").read_text()
            assert "PIL" in maps and "torch" not in maps and "numpy" not in maps
            assert "libtorch" in Path("/proc/self/maps").read_text()
            sockets = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
            assert len(sockets) < 10, sockets


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_killed_worker_is_one_clear_error(shard_set, on_error):
    source = PromptSource(shard_set(40, 7), 4, 0, num_workers=2, on_error=on_error)
    source.next_batch()
    state, pids = source.state_dict(), source._pool.pids
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(WorkerError, match=rf"data worker 0 \(process {pids[0]}\) was ended by signal 9.*num_workers"):
        for _ in range(9):
            state = source.state_dict()
            source.next_batch()
    assert source.state_dict() == state
    source.close()
    assert all(gone(pid) for pid in pids), "no zombie, and the other one has ended too"


def test_a_worker_that_is_killed_at_work(raw_tar, record):
    pool = DecodePool(1)
    records = [found for found in read_records(raw_tar([m for i in range(50) for m in record(f"r{i:02d}")]))]
    jobs = [pool.submit(found) for found in records]
    os.kill(pool.pids[0], signal.SIGKILL)
    late = pool.submit(records[0])
    answers = []
    for job, found in zip([*jobs, late], [*records, records[0]]):
        try:
            answers.append(result(job, found).key)
        except WorkerError as error:
            assert "signal 9" in str(error)
    assert answers == [found.key for found in records[:len(answers)]]
    pool.close()
    pool.close()


def test_an_unexpected_failure_in_a_worker_comes_with_its_traceback(raw_tar, record):
    pool = DecodePool(1)
    found, = read_records(raw_tar(record("r0")))
    with pytest.raises(WorkerError, match="sample 'r0'.*(?s:.*)Traceback(?s:.*)AttributeError"):
        broken = type(found)(found.shard, found.key, 0, {"json": 5.0, "png": b""})  # no record that a tar can hold
        result(pool.submit(broken), broken)
    assert result(pool.submit(found), found).key == "r0", "the worker goes on"
    pool.close()


def test_close_is_safe_and_final(shard_set):
    source = PromptSource(shard_set(40, 7), 4, 0, num_workers=2)
    source.close()
    source.close()
    with pytest.raises(ValueError, match="was closed"):
        source.next_batch()
    source = PromptSource(source.shards, 4, 0, num_workers=2)
    source.next_batch()
    pids, state = source._pool.pids, source.state_dict()
    source.close()
    assert all(gone(pid, 0.1) for pid in pids)
    for _ in range(2):
        with pytest.raises(ValueError, match="was closed"):
            next(source)
    assert source.state_dict() == state
    source.close()


def test_workers_end_with_a_source_that_nobody_holds(shard_set):
    source = PromptSource(shard_set(40, 7), 4, 0, num_workers=2)
    source.next_batch()
    pids = source._pool.pids
    del source
    gc.collect()
    assert all(gone(pid) for pid in pids)


PROGRAM = """
import os, sys, time
from megavg.data.shards import PromptSource
source = PromptSource(sys.argv[1], 4, 0, num_workers=2)
source.next_batch()
print(*source._pool.pids, flush=True)
if sys.argv[2] == "wait":
    time.sleep(60)
if sys.argv[2] == "error":
    raise RuntimeError("on purpose")
"""


@pytest.mark.parametrize("how", ["kill", "interrupt", "end", "error"])
def test_workers_end_with_their_parent(shard_set, how):
    waits = how in ("kill", "interrupt")
    parent = subprocess.Popen([sys.executable, "-c", PROGRAM, shard_set(40, 7), "wait" if waits else how], cwd=ROOT,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                              # a shell's background jobs ignore the signal, and so would their children
                              preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2
    if how == "kill":
        parent.kill()
    if how == "interrupt":
        os.killpg(parent.pid, signal.SIGINT)  # as Ctrl-C in a terminal, which reaches the workers too
    _, errors = parent.communicate(timeout=60)
    assert parent.returncode == {"kill": -9, "interrupt": -2, "end": 0, "error": 1}[how]
    assert all(gone(pid) for pid in pids)
    assert errors.count("Traceback") == (how in ("interrupt", "error")), errors
