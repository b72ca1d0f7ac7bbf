"""Figures of rewards over all ranks, where each judges only the tasks that it is for; time and memory of phases."""

from __future__ import annotations

import os
import time

import pytest

from megavg.protocols.sample import RELATIVE_1000, Completion, Frame, Sample
from megavg.rewards.base import load_rewards, score
from tests.distributed import run_ranks

REWARDS = [{"name": "iou", "tasks": ["rec"]}, {"name": "point_in_box", "tasks": ["point"]}, {"name": "format"},
           {"name": "classification", "tasks": ["classification"]}]
ANSWERS = (  # of each rank: (task, text); the first has boxes alone, the second one box among points
    [("rec", '{"bbox_2d": [0, 0, 100, 100]}'), ("rec", "no")],
    [("point", '{"point_2d": [50, 50]}'), ("point", '{"point_2d": [500, 50]}'), ("point", '{"point_2d": [10, 50]}'),
     ("rec", '{"bbox_2d": [0, 0, 50, 100]}')])


def judgement(answers):
    from megavg.evaluation.rows import answer_row
    from megavg.trainer.rollouts import Judgement

    rewards, rows, results = [], [], []
    for number, (task, text) in enumerate(answers):
        sample = Sample(str(number), "a.tar", None, 1000, 1000, "thing", ((0.0, 0.0, 100.0, 100.0),), {}, task)
        completion = Completion(text, "json_relative_1000", Frame(RELATIVE_1000, 1000, 1000, 560, 560))
        total, by_name = score(completion, sample, load_rewards(REWARDS))
        rewards.append(total)
        rows.append(answer_row(sample, completion))
        results.append(by_name)
    return Judgement(rewards, rows, results)


def on_rank(parts) -> dict:
    import torch
    import torch.distributed as dist

    from megavg.parallel.mcore import make_context
    from megavg.trainer.metrics import judgement_metrics

    return judgement_metrics(judgement(parts[dist.get_rank()]), make_context(1, 1, torch.device("cpu")))


@pytest.mark.parametrize("parts", [ANSWERS, ([*ANSWERS[0], *ANSWERS[1]],)], ids=["two ranks", "one rank"])
def test_a_reward_counts_the_answers_that_it_judges_alone(parts):
    """One of the two ranks has no answer for ``point_in_box``, and no rank has one for ``classification``."""
    for metrics in run_ranks(len(parts), on_rank, parts):
        assert metrics["reward/iou"] == pytest.approx((1 + 0 + 0.5) / 3)
        assert metrics["reward/point_in_box"] == pytest.approx(2 / 3)
        assert metrics["reward/format"] == pytest.approx(5 / 6), "a reward for all tasks counts all answers"
        assert "reward/classification" not in metrics, "nothing was judged, so there is no mean"
        assert not [name for name in metrics["reasons"] if "other task" in name]
        counts = {reward: sum(count for name, count in metrics["reasons"].items() if name.startswith(f"{reward}: "))
                  for reward in ("iou", "point_in_box", "format")}
        assert counts == {"iou": 3, "point_in_box": 3, "format": 6}
        assert metrics["reward/mean"] == pytest.approx((1.5 + 2 + 5) / 6)


def memory_on_rank(num_bytes: int) -> tuple[dict, int]:
    """What the clock finds, and what the kernel says of this process; the second rank takes more."""
    import torch
    import torch.distributed as dist

    from megavg.parallel.mcore import make_context
    from megavg.trainer.metrics import PhaseClock

    taken = torch.ones(num_bytes * dist.get_rank(), dtype=torch.uint8)
    clock = PhaseClock(torch.device("cpu"))
    clock.lap("data")
    found = clock.memory(make_context(1, 1, torch.device("cpu")))
    with open("/proc/self/status") as status:
        peak, = (int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    del taken
    return found, peak


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the kernel does not say")
def test_memory_is_that_of_the_rank_that_took_most():
    (first, peak_of_first), (second, peak_of_second) = run_ranks(2, memory_on_rank, 300_000_000)
    assert first == second and set(first) == {"memory/peak_gb"}
    assert peak_of_second - peak_of_first > 250_000_000, "only the second took it"
    assert first["memory/peak_gb"] == pytest.approx(peak_of_second / 1e9, rel=0.02)


def test_times_of_a_phase_add_up_and_begin_anew():
    import torch

    from megavg.trainer.metrics import PhaseClock

    clock = PhaseClock(torch.device("cpu"))
    started = time.monotonic()
    for phase in ("rollout", "reward", "rollout"):
        time.sleep(0.02)
        clock.lap(phase)
    assert list(clock.laps) == ["time/rollout", "time/reward"] and clock.laps["time/rollout"] >= 0.04
    assert 0.06 <= sum(clock.laps.values()) <= time.monotonic() - started
    clock.reset()
    assert not clock.laps


def test_memory_by_phase_on_a_gpu():
    import torch

    from megavg.parallel.context import ParallelContext
    from megavg.trainer.metrics import PhaseClock

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    device = torch.device("cuda", 0)
    before = torch.cuda.memory_allocated(device) / 1e9
    clock = PhaseClock(device)
    for phase, size in (("rollout", 4e8), ("update", 1e8), ("rollout", 2e8)):
        tensor = torch.empty(int(size), dtype=torch.uint8, device=device)
        del tensor  # a peak, not what is left
        clock.lap(phase)
    found = clock.memory(ParallelContext(1, 0, 1, 0, None, 1, 0, None, 1, 0, None, device))
    assert found["memory/rollout_gb"] - before == pytest.approx(0.4, rel=0.02)
    assert found["memory/update_gb"] - before == pytest.approx(0.1, rel=0.02)
    assert found["memory/peak_gb"] == found["memory/rollout_gb"] <= found["memory/reserved_gb"] + 1e-9
    assert found["memory/host_gb"] > 0.1
    clock.reset()
    assert clock.memory(ParallelContext(1, 0, 1, 0, None, 1, 0, None, 1, 0, None, device))["memory/peak_gb"] == 0
