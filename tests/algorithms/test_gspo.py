"""GSPO and GSPO-token against plain loops, and that they agree where they should."""

from __future__ import annotations

import math

import pytest
import torch

from megavg.algorithms.gspo import GSPO
from tests.algorithms.slow_losses import Plain, assert_equals_loops, loss_and_slopes, moved
from tests.rollout_batches import random_batch

LEVELS = ("sequence", "token")


def slow(plain: Plain, level: str, dual_clip: float = math.inf) -> float:
    def objective(b: int, t: int) -> float:
        values = plain.held if level == "token" else plain.new
        ratio = math.exp(math.fsum(values[b][i] - plain.old[b][i] for i in range(plain.lengths[b])) / plain.lengths[b])
        if level == "token":
            ratio *= math.exp(plain.new[b][t] - plain.held[b][t])
        advantage = plain.advantages[b]
        value = min(ratio * advantage, min(max(ratio, 1 - 3e-4), 1 + 4e-4) * advantage)
        return max(value, dual_clip * advantage) if advantage < 0 else value

    return plain.loss(objective)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("seed", [1, 2])
def test_equals_loops(level, seed):
    batch, stats = random_batch(seed, num_prompts=8, dtype=torch.float64)
    new = moved(stats, batch.mask, 1e-3)
    log_ratio = (new.logprobs - stats.logprobs).sum(1) / batch.mask.sum(1)
    assert min((log_ratio < -3e-4).sum(), (log_ratio.abs() < 3e-4).sum(), (log_ratio > 4e-4).sum()) > 2
    assert_equals_loops(lambda: GSPO(GSPO.Config(ratio_level=level)), batch, stats, new,
                        lambda plain: slow(plain, level))


@pytest.mark.parametrize("level", LEVELS)
def test_dual_clip(level):
    batch, stats = random_batch(3, dtype=torch.float64)
    new = moved(stats, batch.mask, 2.0)
    assert ((new.logprobs - stats.logprobs).sum(1) / batch.mask.sum(1)).exp().max() > 2
    assert_equals_loops(lambda: GSPO(GSPO.Config(ratio_level=level, dual_clip=1.5)), batch, stats, new,
                        lambda plain: slow(plain, level, 1.5))


def test_both_levels_have_the_same_gradient_where_an_answer_has_one_advantage():
    batch, stats = random_batch(4, dtype=torch.float64)
    new = moved(stats, batch.mask, 1e-3)
    sequence, token = (loss_and_slopes(GSPO(GSPO.Config(ratio_level=level)), batch, stats, new, 5)[1]
                       for level in LEVELS)
    assert sequence.abs().max() > 1e-3 and torch.allclose(sequence, token, rtol=1e-6, atol=1e-12)


def test_one_token_answers_are_plain_ratios():
    batch, stats = random_batch(0, num_prompts=3, width=1, dtype=torch.float64)
    new = moved(stats, batch.mask, 1e-3)
    for level in LEVELS:
        assert_equals_loops(lambda: GSPO(GSPO.Config(ratio_level=level)), batch, stats, new,
                            lambda plain: plain.loss(lambda b, t: plain.clipped(b, t, 3e-4, 4e-4)))
