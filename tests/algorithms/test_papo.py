"""PAPO against plain loops: the KL to the masked image is maximised."""

from __future__ import annotations

import math

import pytest
import torch

from megavg.algorithms.grpo import GRPO
from megavg.algorithms.papo import PAPO
from megavg.protocols.config import ConfigError, build
from megavg.protocols.options import Perturbation
from tests.algorithms.slow_losses import Plain, assert_equals_loops, loss_and_slopes, moved
from tests.rollout_batches import random_batch


@pytest.mark.parametrize("gamma", [0.01, 0.3])
def test_equals_loops(gamma):
    batch, stats = random_batch(1, dtype=torch.float64)
    masked = stats.perturbed.logprobs.tolist()

    def slow(plain: Plain) -> float:
        def objective(b: int, t: int) -> float:
            difference = masked[b][t] - plain.new[b][t]
            return plain.clipped(b, t) + gamma * (math.exp(difference) - difference - 1)

        return plain.loss(objective)

    assert_equals_loops(lambda: PAPO(PAPO.Config(papo_gamma=gamma)), batch, stats, moved(stats, batch.mask, 0.3), slow)


def test_gamma_zero_is_grpo():
    batch, stats = random_batch(2)
    new = moved(stats, batch.mask, 0.3)
    plain, without = (loss_and_slopes(a, batch, stats, new, 4) for a in
                      (GRPO(GRPO.Config()), PAPO(PAPO.Config(papo_gamma=0.0))))
    assert plain[0] == without[0] and torch.equal(plain[1], without[1])


def test_which_image_it_asks_for():
    assert PAPO(PAPO.Config()).perturbation == Perturbation(kind="patch_mask", mask_share=0.6)
    config = build(PAPO.Config, {"perturbation": {"kind": "patch_mask", "mask_share": 0.8}}, "algorithm")
    assert PAPO(config).perturbation.mask_share == 0.8
    with pytest.raises(ConfigError, match="papo_gamma=-0.1 must not be negative"):
        build(PAPO.Config, {"papo_gamma": -0.1}, "algorithm")
