"""The watchdog with real processes: what hangs is found and named, what is only slow is left alone."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megavg.parallel.watchdog import HANG_STATUS, Watchdog
from megavg.parallel.watchdog_rank import RankState, Wait
from megavg.parallel.watchdog_report import Missing, diagnose
from tests.tiny_runs import run_tree
from tools.forked_ranks import Job

pytestmark = pytest.mark.slow

TIMEOUT = 3.0  # seconds without a move
SLACK = 20.0  # of a busy machine


def meet() -> int:
    from megavg.parallel.mcore import start_processes

    start_processes(timeout_minutes=3)
    return dist.get_rank()


def loop(folder: Path, timeout_s: float, disturb, steps: int = 4) -> int:
    """Steps of an all_reduce over the world, then one over the first two ranks; ``disturb(rank, step)`` in between.

    A third rank receives from the second one meanwhile.
    """
    rank = meet()
    pair = dist.new_group([0, 1], group_desc="PAIR")
    with Watchdog(folder, timeout_s).start() as watchdog:
        for step in range(1, steps + 1):
            watchdog.beat(step, "rollout")
            dist.all_reduce(torch.ones(5, 7))
            watchdog.beat(step, "update")
            time.sleep(1)  # until the others have heard of it
            disturb(rank, step)
            if rank < 2:
                dist.all_reduce(torch.ones(3, 2), group=pair)
            if dist.get_world_size() == 3 and rank:
                dist.send(torch.ones(4), 2) if rank == 1 else dist.recv(torch.ones(4), 1)
        dist.barrier()
    print(f"rank {rank} went through", flush=True)
    return 0


def sleep_on_1(rank: int, step: int) -> None:
    if (rank, step) == (1, 2):
        print(f"asleep at {time.time()}", flush=True)
        time.sleep(600)  # the planted one


def stop_1(rank: int, step: int) -> None:
    if (rank, step) == (1, 3):
        os.kill(os.getpid(), signal.SIGSTOP)


def stop_0(rank: int, step: int) -> None:
    if (rank, step) == (0, 3):
        os.kill(os.getpid(), signal.SIGSTOP)


def kill_2(rank: int, step: int) -> None:
    if (rank, step) == (2, 3):
        os.kill(os.getpid(), signal.SIGKILL)


def fail_on_1(rank: int, step: int) -> None:
    if (rank, step) == (1, 2):
        raise ValueError("a fault of rank 1\nand its second line")


def slow_on_1(rank: int, step: int) -> None:
    """Twice as long as the time-out, each nap half of it; the others wait in one collective all the time."""
    if (rank, step) == (1, 2):
        for _ in range(4):
            time.sleep(TIMEOUT / 4)
            time.sleep(TIMEOUT / 4)


def regex_on_1(rank: int, step: int) -> None:
    """A call that never gives the interpreter free."""
    if (rank, step) == (1, 2):
        re.match(r"(a+)+$", "a" * 60 + "b")


def alone(folder: Path, timeout_s: float) -> int:
    """A process without others, which is stuck for twice the time-out of the tests."""
    with Watchdog(folder, timeout_s).start() as watchdog:
        watchdog.beat(1, "data")
        time.sleep(2 * TIMEOUT)
    return 0


def read_slowly(folder: Path, told: bool) -> int:
    """A process alone whose loop over a slow transfer takes three times the time-out, in one line of code."""
    from megavg.data.urls import UrlStream
    from megavg.protocols import life

    stream = UrlStream("pipe:for i in $(seq 23); do head -c 1000 /dev/zero; sleep 0.2; done")
    if not told:  # as if the reader said nothing
        life.watch = lambda watcher: lambda: None
        import megavg.parallel.watchdog

        megavg.parallel.watchdog.watch = life.watch
    with Watchdog(folder, TIMEOUT / 2).start() as watchdog:
        watchdog.beat(1, "data")
        while len(stream.read(1000)) == 1000:
            pass
    return 0


def train_with_a_sleeper(tree: dict) -> int:
    from megavg.trainer.config import resolve
    from megavg.trainer.trainer import Trainer

    trainer = Trainer(resolve(tree))
    update = trainer.update

    def observed(rollouts, signal, step: int):
        sleep_on_1(trainer.context.rank, step + 1)
        return update(rollouts, signal, step)

    trainer.update = observed
    return trainer.run()


def ends(log: Path, world_size: int, function, *args, still: int | None = None) -> tuple[list[int | None], str]:
    """(the exit status of each rank, the log); the rank ``still`` is expected not to end by itself."""
    with Job(log, world_size, function, *args) as job:
        deadline = time.monotonic() + 120
        while any(code is None for rank, code in enumerate(job.exit_codes) if rank != still):
            assert time.monotonic() < deadline, job.last_lines()
            time.sleep(0.05)
        return job.exit_codes, log.read_text()


def stacks(folder: Path, rank: int) -> str:
    return (folder / f"rank-{rank:05d}.txt").read_text()


def line_of(function) -> str:
    """file:line of a function's last line."""
    lines = function.__code__.co_lines()
    return f"{__file__}:{max(line for *_, line in lines if line)}"


def test_a_sleeping_rank_is_named_with_the_collective_that_the_others_wait_in(tmp_path):
    folder = tmp_path / "hang"
    codes, log = ends(tmp_path / "log", 3, loop, folder, TIMEOUT, sleep_on_1)
    assert codes == [HANG_STATUS] * 3
    found = [line for line in log.splitlines() if line.startswith("hang: ")]
    place = f"rank 1, in step 2 (update), is in `time.sleep(600)  # the planted one` at {line_of(sleep_on_1)} "
    assert len(found) == 2 and log.rstrip().endswith(found[1]), log
    assert re.match(r"hang: rank 1 has not entered all_reduce of \[3, 2\] \(PAIR; ranks 0, 1; collective 2 of this "
                    r"group\) in step 2 \(update\), that rank 0 waits in since \d+ s; ", found[0])
    assert found[0].endswith(f"{place}(sleep_on_1)")
    assert str(folder) in found[1] and f"exit status {HANG_STATUS}" in found[1]
    assert "time.sleep(600)" in stacks(folder, 1) and "waits in: no collective" in stacks(folder, 1)
    assert "dist.all_reduce(torch.ones(3, 2), group=pair)" in stacks(folder, 0)
    assert "\nwaits in: recv of [4] (default_pg; ranks 1, 2)\n" in stacks(folder, 2)
    assert all("thread watchdog" in stacks(folder, rank) for rank in range(3))
    assert sorted(path.name for path in folder.glob("*.txt")) == [f"rank-{rank:05d}.txt" for rank in range(3)]
    began = float(re.search(r"asleep at (\S+)", log)[1])
    waited = max(path.stat().st_mtime for path in folder.glob("*.txt")) - began
    assert TIMEOUT < waited < TIMEOUT + SLACK


def test_a_rank_that_was_killed_is_named(tmp_path):
    codes, log = ends(tmp_path / "log", 3, loop, tmp_path / "hang", TIMEOUT, kill_2)
    assert codes == [HANG_STATUS, HANG_STATUS, -signal.SIGKILL], log
    found = [line for line in log.splitlines() if line.startswith("lost: ")]
    assert len(found) == 2, log
    assert re.fullmatch(r"lost: rank 2 is gone: no heartbeat since \d+ s \(killed, stopped or frozen\); it was last "
                        r"heard of in step 3 \(update\)", found[0])
    assert re.match(r"lost: rank [01] noticed in step [34] \(\w+\): RuntimeError: .*exit status 76", found[1])


def test_a_rank_that_was_stopped_is_named(tmp_path):
    codes, log = ends(tmp_path / "log", 2, loop, tmp_path / "hang", TIMEOUT, stop_1, still=1)
    assert codes == [HANG_STATUS, None], log
    assert re.search(r"hang: rank 1 is gone: no heartbeat since \d+ s \(killed, stopped or frozen\); rank 1 has not "
                     r"entered all_reduce of \[3, 2\] \(PAIR; ranks 0, 1; collective 3 of this group\) in step 3 "
                     r"\(update\), that rank 0 waits in since \d+ s; it was last heard of in step 3 \(update\)\n",
                     log), log


def test_a_stopped_rank_that_holds_the_store_is_named(tmp_path):
    codes, log = ends(tmp_path / "log", 3, loop, tmp_path / "hang", TIMEOUT, stop_0, still=0)
    assert codes == [None, HANG_STATUS, HANG_STATUS], log
    found = [line for line in log.splitlines() if line.startswith("hang: ")]
    assert len(found) == 2, log
    assert re.match(r"hang: rank 0 is gone: its store has not answered for \d+ s .*rank 0 has not entered all_reduce "
                    r"of \[3, 2\] .* that rank 1 waits in since", found[0])
    assert (tmp_path / "hang" / "rank-00002.txt").exists()


def test_a_call_that_keeps_the_interpreter_is_named_by_its_line(tmp_path):
    codes, log = ends(tmp_path / "log", 2, loop, tmp_path / "hang", TIMEOUT, regex_on_1, still=1)
    assert codes == [HANG_STATUS, None], log
    place = r"at .*re/__init__\.py:\d+ \(match\), called by `re\.match\(.*` at .*test_watchdog\.py:\d+ \(regex_on_1\)"
    last = r"it was last heard of in step 2 \(update\); it is stuck in .*"
    assert re.search(r"hang: rank 1 is gone: .*; " + last + place, log), log


def test_a_rank_that_fails_is_named_by_those_that_lose_it_and_they_do_not_start_again(tmp_path):
    codes, log = ends(tmp_path / "log", 2, loop, tmp_path / "hang", TIMEOUT, fail_on_1)
    assert codes == [1, 1], log
    assert "lost: rank 1 has left: ValueError: a fault of rank 1; it was last heard of in step 2 (update)\n" in log
    assert "and its second line" in log and f"exit status {HANG_STATUS}" not in log
    assert not (tmp_path / "hang").exists()


def test_a_rank_that_is_slow_but_moves_is_left_alone(tmp_path):
    codes, log = ends(tmp_path / "log", 2, loop, tmp_path / "hang", TIMEOUT, slow_on_1)
    assert codes == [0, 0], log
    assert "went through" in log and "hang: " not in log and not (tmp_path / "hang").exists()


@pytest.mark.parametrize("timeout_s, code", [(TIMEOUT / 2, HANG_STATUS), (0.0, 0)])
def test_a_process_alone_is_watched_and_0_switches_it_off(tmp_path, timeout_s, code):
    codes, log = ends(tmp_path / "log", 1, alone, tmp_path / "hang", timeout_s)
    assert codes == [code], log
    told = re.search(r"hang: rank 0 has not moved for \d s; rank 0, in step 1 \(data\), is in `time\.sleep\(", log)
    assert bool(told) == bool(code) == (tmp_path / "hang").exists()


@pytest.mark.parametrize("told, code", [(True, 0), (False, HANG_STATUS)])
def test_a_slow_transfer_that_goes_on_is_no_hang(tmp_path, told, code):
    """The loop looks alike at every look; the reader's signs of life tell it from a read that never ends."""
    codes, log = ends(tmp_path / "log", 1, read_slowly, tmp_path / "hang", told)
    assert codes == [code], log


def test_a_training_whose_rank_sleeps_in_its_step_is_ended(checkpoints, scene_shards, tmp_path):
    tree = run_tree(checkpoints("qwen3_vl", num_layers=2, vision_depth=2), scene_shards(16), tmp_path / "run",
                    "algorithm={name: sft}", "parallel.hang_timeout_s=6")
    codes, log = ends(tmp_path / "log", 2, train_with_a_sleeper, tree)
    assert codes == [HANG_STATUS] * 2, log
    found = [line for line in log.splitlines() if line.startswith("hang: ")]
    assert len(found) == 2 and log.rstrip().endswith(found[1]), log
    assert re.match(r"hang: rank 1 has not entered \w+ (?:of \[.*\] )?\(.*ranks 0, 1; collective \d+ of this group\) "
                    r"in step 2 \(update\), that rank 0 waits in since [67] s; ", found[0])
    assert found[0].endswith(f" at {line_of(sleep_on_1)} (sleep_on_1)")
    assert "sleep_on_1" in stacks(tmp_path / "run" / "hang", 1)
    assert "dist.all_reduce(" in stacks(tmp_path / "run" / "hang", 0)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 1


def state(rank: int, waits: Wait | None, **begun: int) -> RankState:
    return RankState(rank, "host", 1, 7, "update", 61.0, waits, begun, [f"`line {rank}` at file:{rank} (f)"])


def test_the_rank_at_the_end_of_a_chain_is_named_not_those_that_wait_for_it_through_others():
    tensor, data = Wait("all_reduce", "a", "TP", [0, 1], "[4]", 9), Wait("all_gather", "b", "DP", [1, 3], "", 5)
    lines = diagnose({0: state(0, tensor, a=9), 1: state(1, data, a=8, b=5), 3: state(3, None, b=4)}, {})
    assert lines == ["rank 3 has not entered all_gather (DP; ranks 1, 3; collective 5 of this group) in step 7 "
                     "(update), that rank 1 waits in since 61 s; "
                     "rank 3, in step 7 (update), is in `line 3` at file:3 (f)"]
    lines = diagnose({0: state(0, tensor, a=9), 1: state(1, data, a=8, b=5)}, {3: Missing("is gone")})
    assert len(lines) == 1 and lines[0].startswith("rank 3 is gone; rank 3 has not entered all_gather")


def test_ranks_in_different_collectives_of_one_group_and_ranks_that_all_entered_are_told_apart():
    reduce, send = Wait("all_reduce", "a", "TP", [0, 1], "[4]", 9), Wait("broadcast", "a", "TP", [0, 1], "[4]", 9)
    assert "different collectives" in diagnose({0: state(0, reduce, a=9), 1: state(1, send, a=9)}, {})[0]
    assert "a device or the network" in diagnose({0: state(0, reduce, a=9), 1: state(1, reduce, a=9)}, {})[0]
    later = Wait("barrier", "a", "TP", [0, 1], "", 10)
    lines = diagnose({0: state(0, later, a=10), 1: state(1, reduce, a=9)}, {})
    assert [line[:24] for line in lines] == ["rank 1 has not entered b"]


def test_a_rank_that_waits_for_a_transfer_does_not_hide_the_one_that_does_not_send():
    lines = diagnose({0: state(0, None), 1: state(1, Wait("what `work.wait()` waits for"))}, {})
    assert lines == ["rank 0 has not moved for 61 s; rank 1 waits in what `work.wait()` waits for; rank 0, in step 7 "
                     "(update), is in `line 0` at file:0 (f)"]


def test_a_state_survives_json():
    before = state(3, Wait("all_reduce", "a", "TP", [0, 1], "[4]", 9), a=9)
    assert RankState.from_json(before.to_json()) == before
    assert RankState.from_json(state(1, None).to_json()).waits is None
