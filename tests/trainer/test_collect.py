"""Dynamic resampling: which groups are kept, how many draws are made, and that ranks do not matter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megavg.trainer.collect import Collector, Group
from megavg.trainer.rollouts import Judgement
from tests.rank_threads import Exchange, in_threads

WANTED, SIZE = 6, 3


def collected(teaching: list[set[int]], tries: int, dp: int) -> tuple[list[list[int]], list[dict], list[int]]:
    """(numbers of each rank's groups, its metrics, draws made) where draw d teaches with the groups ``teaching[d]``."""
    ranks, draws = Exchange(dp), [0] * dp
    collectors = [Collector.__new__(Collector) for _ in range(dp)]
    for rank, collector in enumerate(collectors):
        def draw(step: int, number: int, progress: float, rank=rank) -> list[Group]:
            draws[rank] += 1
            return [Group(number * WANTED + i, None, None, "", [], judged(i in teaching[number]))
                    for i in range(rank, WANTED, dp)]

        collector.context, collector.metrics, collector._draw = ranks.context(rank), {}, draw
        collector.algorithm = SimpleNamespace(resampling_tries=tries)
        collector.config = SimpleNamespace(data=SimpleNamespace(prompts_per_step=WANTED))

    kept = in_threads(collectors, lambda collector: collector.groups(0, 0.0))
    return [[group.number for group in groups] for groups in kept], [c.metrics for c in collectors], draws


def judged(teaches: bool) -> Judgement:
    return Judgement([0.0, 1.0 if teaches else 0.0, 0.0], [{}] * SIZE, [{}] * SIZE)


def in_order(parts: list[list[int]]) -> list[int]:
    """Groups of all ranks by their place: place k is on rank k % ranks."""
    return [parts[k % len(parts)][k // len(parts)] for k in range(sum(map(len, parts)))]


@pytest.mark.parametrize("dp", [1, 2, 3])
def test_groups_that_teach_nothing_are_replaced(dp):
    parts, metrics, draws = collected([{0, 2, 5}, {1, 3}, {0, 4, 5}, {0, 1, 2, 3, 4, 5}], tries=3, dp=dp)
    assert in_order(parts) == [0, 2, 5, 7, 9, 12]
    assert all(len(part) == WANTED // dp for part in parts) and draws == [3] * dp
    assert metrics == [{"resampling/draws": 3.0, "resampling/teaching": 8 / 18}] * dp


@pytest.mark.parametrize("dp", [1, 2, 3])
def test_tries_are_bounded_and_the_batch_is_filled_up(dp):
    parts, metrics, draws = collected([{4}, {3}, {0, 1, 2, 3, 4, 5}], tries=1, dp=dp)
    assert in_order(parts) == [0, 1, 2, 3, 4, 9] and draws == [2] * dp
    assert metrics[0] == {"resampling/draws": 2.0, "resampling/teaching": 2 / 12}


def test_a_batch_that_teaches_is_left_alone():
    parts, _, draws = collected([set(range(WANTED))], tries=5, dp=2)
    assert parts == [[0, 2, 4], [1, 3, 5]] and draws == [1, 1]


def test_without_tries_nothing_is_replaced():
    parts, metrics, draws = collected([set()], tries=0, dp=2)
    assert parts == [[0, 2, 4], [1, 3, 5]] and draws == [1, 1] and metrics == [{}, {}]
