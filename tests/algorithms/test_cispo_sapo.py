"""CISPO and SAPO, which have no hard clip, against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from megavg.algorithms.cispo import CISPO
from megavg.algorithms.sapo import SAPO
from megavg.protocols.config import ConfigError, build
from tests.algorithms.slow_losses import Plain, assert_equals_loops, loss_and_slopes, moved
from tests.rollout_batches import random_batch


def slow_cispo(plain: Plain, ratio_max: float) -> float:
    def objective(b: int, t: int) -> float:
        weight = min(math.exp(plain.held[b][t] - plain.old[b][t]), ratio_max)
        return weight * plain.advantages[b] * plain.new[b][t]

    return plain.loss(objective, "token_mean")


def slow_sapo(plain: Plain, positive: float, negative: float) -> float:
    def objective(b: int, t: int) -> float:
        tau = positive if plain.advantages[b] > 0 else negative
        return 4 / tau / (1 + math.exp(-tau * (plain.ratio(b, t) - 1))) * plain.advantages[b]

    return plain.loss(objective)


@pytest.mark.parametrize("options", [{}, {"ratio_max": 2.0}])
def test_cispo_equals_loops(options):
    batch, stats = random_batch(1, dtype=torch.float64)
    new = moved(stats, batch.mask, 1.5)
    assert ((new.logprobs - stats.logprobs).exp() > 5).sum() > 3
    algorithm, signal, slopes = assert_equals_loops(lambda: CISPO(CISPO.Config(**options)), batch, stats, new,
                                                    lambda plain: slow_cispo(plain, options.get("ratio_max", 5.0)))
    assert (slopes[batch.mask & (signal.advantages != 0)] != 0).all(), "no token loses its gradient"


@pytest.mark.parametrize("options", [{}, {"tau_positive": 0.5, "tau_negative": 3.0}])
def test_sapo_equals_loops(options):
    batch, stats = random_batch(2, dtype=torch.float64)
    taus = options.get("tau_positive", 1.0), options.get("tau_negative", 1.05)
    assert_equals_loops(lambda: SAPO(SAPO.Config(**options)), batch, stats, moved(stats, batch.mask, 0.8),
                        lambda plain: slow_sapo(plain, *taus))


@pytest.mark.parametrize("cls", [CISPO, SAPO])
def test_the_first_update_is_the_policy_gradient(cls):
    batch, stats = random_batch(3, dtype=torch.float64)
    _, slopes, _, signal = loss_and_slopes(cls(cls.Config()), batch, stats, stats, 5)
    assert torch.allclose(slopes, -signal.coefficients * signal.advantages, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("cls, options, message", [
    (CISPO, {"dual_clip": 3.0}, "dual_clip=3.0 bounds a ratio"), (CISPO, {"ratio_max": 0.5}, "ratio_max=0.5"),
    (SAPO, {"dual_clip": 3.0}, "dual_clip=3.0 bounds a ratio"), (SAPO, {"tau_negative": 0.0}, "tau_negative=0.0"),
    (SAPO, {"clip_low": -0.1}, "must not be negative"),
])
def test_options_without_a_meaning_are_refused(cls, options, message):
    with pytest.raises(ConfigError, match=message):
        build(cls.Config, options, "algorithm")
