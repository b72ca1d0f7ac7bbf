"""The adaptive entropy bonus against its recursion written in plain Python."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from megavg.algorithms.adaptive_entropy import AdaptiveEntropy
from megavg.protocols.config import ConfigError, build
from megavg.trainer.step import make_signal
from tests.algorithms.slow_losses import Plain, assert_equals_loops, moved
from tests.rollout_batches import random_batch


def with_entropy(mean: float, seed: int = 0):
    """A batch whose mean entropy over its valid tokens is ``mean``."""
    batch, stats = random_batch(seed, dtype=torch.float64)
    return batch, replace(stats, entropy=stats.entropy * (mean / (stats.entropy.sum() / batch.mask.sum())))


def run(algorithm: AdaptiveEntropy, entropies: list[float]) -> list[float]:
    """The coefficient of each step."""
    found = []
    for entropy in entropies:
        batch, stats = with_entropy(entropy)
        found.append(algorithm.entropy_coefficient(batch, stats, 0.5))
        assert algorithm.metrics == {"adaptive_entropy/coefficient": found[-1]}
    return found


PATH = [0.1] * 6 + [0.9, 0.1, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.1, 0.1, 0.3]


@pytest.mark.parametrize("bonus_max", [0.1, 0.02])
def test_the_recursion(bonus_max):
    c, expected = 0.0, []
    for entropy in PATH:
        c = min(max(c + (0.005 if entropy < 0.2 else -0.005), 0.0), bonus_max)
        expected.append(c if entropy <= 0.2 else 0.0)
    assert run(AdaptiveEntropy(AdaptiveEntropy.Config(bonus_max=bonus_max)), PATH) == pytest.approx(expected)
    assert max(expected) == pytest.approx(min(bonus_max, 0.03)) and 0.0 in expected


def test_at_the_target_the_bonus_still_acts_and_falls():
    """All tokens have the target's entropy, which a mean in double precision keeps."""
    batch, stats = random_batch(0, dtype=torch.float64)
    at = replace(stats, entropy=0.25 * batch.mask.double())
    algorithm = AdaptiveEntropy(AdaptiveEntropy.Config(target_entropy=0.25))
    algorithm.bonus = 0.05
    assert algorithm.entropy_coefficient(batch, at, 0.0) == pytest.approx(0.045)


def test_equals_loops_and_adds_to_the_fixed_bonus():
    batch, stats = with_entropy(0.1, seed=1)

    def slow(plain: Plain) -> float:
        return plain.loss(lambda b, t: plain.clipped(b, t) + (0.01 + 0.005) * plain.entropy[b][t])

    def make() -> AdaptiveEntropy:
        return AdaptiveEntropy(AdaptiveEntropy.Config(entropy_coefficient=0.01))

    assert_equals_loops(make, batch, stats, moved(stats, batch.mask, 0.3), slow)


def test_the_mean_is_over_valid_tokens_only():
    batch, stats = with_entropy(0.1)
    noise = replace(stats, entropy=stats.entropy.where(batch.mask, 50.0))
    assert run(AdaptiveEntropy(AdaptiveEntropy.Config()), [0.1]) == [
        AdaptiveEntropy(AdaptiveEntropy.Config()).entropy_coefficient(batch, noise, 0.5)]


def test_state_moves_once_a_step_and_survives_a_restart():
    algorithm, restored = (AdaptiveEntropy(AdaptiveEntropy.Config()) for _ in range(2))
    batch, stats = with_entropy(0.1)
    make_signal(algorithm, batch, stats, None, 0.5)
    assert algorithm.bonus == pytest.approx(0.005)
    restored.load_state_dict(json.loads(json.dumps(algorithm.state_dict())))
    assert run(restored, PATH) == run(algorithm, PATH)


@pytest.mark.parametrize("name", ["target_entropy", "delta", "bonus_max"])
def test_negative_options_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name}=-1.0"):
        build(AdaptiveEntropy.Config, {name: -1.0}, "algorithm")
    assert math.isclose(build(AdaptiveEntropy.Config, {name: 0.5}, "algorithm").__dict__[name], 0.5)
