"""Figures of rewards over all ranks, where each judges only the tasks that it is for."""

from __future__ import annotations

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
