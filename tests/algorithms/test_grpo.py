"""GRPO against plain Python in double precision: advantages, clip, k3."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from megavg.algorithms.base import Algorithm
from megavg.algorithms.grpo import GRPO
from megavg.protocols.batch import PolicySignal, TokenScores
from tests.rollout_batches import random_batch


def slow_advantages(rewards: list[float], group_size: int, normalize_std: bool, eps: float) -> list[float]:
    out = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start:start + group_size]
        scale = statistics.stdev(group) + eps if normalize_std else 1.0
        out += [(reward - statistics.fmean(group)) / scale for reward in group]
    return out


def slow_loss(new: float, old: float, advantage: float, low: float, high: float, beta: float = 0.0,
              reference: float = 0.0) -> float:
    ratio = math.exp(new - old)
    clipped = max(1 - low, min(1 + high, ratio))
    difference = reference - new
    return -min(ratio * advantage, clipped * advantage) + beta * (math.exp(difference) - difference - 1)


def signal(advantages, old, reference=None) -> PolicySignal:
    ones = torch.ones_like(advantages)
    return PolicySignal(advantages, ones, ones, old, reference, ones.bool(), torch.zeros_like(ones))


def test_grpo_is_the_base():
    own = {name for name in vars(GRPO) if not name.startswith("__")}
    assert issubclass(GRPO, Algorithm) and not own


@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_advantages(seed, normalize_std):
    batch, stats = random_batch(seed)
    found = GRPO(GRPO.Config(normalize_std=normalize_std)).advantages(batch, stats)
    expected = slow_advantages([float(r) for r in batch.rewards], batch.group_size, normalize_std, 1e-4)
    for b, advantage in enumerate(expected):
        for t in range(batch.mask.shape[1]):
            assert float(found[b, t]) == pytest.approx(advantage if batch.mask[b, t] else 0.0, abs=2e-6)


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_clip_and_k3(beta):
    generator = torch.Generator().manual_seed(1)
    old, new, reference = (-2 * torch.rand(40, 9, generator=generator, dtype=torch.float64) for _ in range(3))
    advantages = torch.randn(40, 9, generator=generator, dtype=torch.float64)
    grpo = GRPO(GRPO.Config(clip_low=0.2, clip_high=0.28, kl_coefficient=beta))
    new.requires_grad_()
    found = grpo.token_loss(TokenScores(new, old), signal(advantages, old, reference if beta else None))
    found.sum().backward()
    found, slopes, new = found.detach(), new.grad, new.detach()
    ratio = (new - old).exp()
    assert min((ratio < 0.8).sum(), (ratio > 1.28).sum(), ((ratio > 0.8) & (ratio < 1.28)).sum()) > 20
    for b in range(40):
        for t in range(9):
            at = (float(old[b, t]), float(advantages[b, t]), 0.2, 0.28, beta, float(reference[b, t]))
            assert float(found[b, t]) == pytest.approx(slow_loss(float(new[b, t]), *at), abs=1e-12)
            step = 1e-6
            slope = (slow_loss(float(new[b, t]) + step, *at) - slow_loss(float(new[b, t]) - step, *at)) / (2 * step)
            assert float(slopes[b, t]) == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("advantage, new, has_gradient", [
    (1.0, 0.5, False), (1.0, -0.5, True), (-1.0, -0.5, False), (-1.0, 0.5, True),  # the clip only stops the good way
])
def test_where_the_clip_stops_the_gradient(advantage, new, has_gradient):
    logprobs = torch.tensor([[new]], requires_grad=True)
    old = torch.zeros(1, 1)
    given = signal(torch.full((1, 1), advantage), old)
    GRPO(GRPO.Config()).token_loss(TokenScores(logprobs, old), given).sum().backward()
    assert bool(logprobs.grad != 0) is has_gradient


def test_first_update_is_the_policy_gradient():
    batch, stats = random_batch()
    grpo = GRPO(GRPO.Config())
    advantages = grpo.advantages(batch, stats)
    logprobs = stats.logprobs.clone().requires_grad_()
    grpo.token_loss(TokenScores(logprobs, stats.entropy), signal(advantages, stats.logprobs)).sum().backward()
    assert torch.allclose(logprobs.grad, -advantages, atol=1e-7)


def test_k3_is_zero_at_the_reference_and_positive_elsewhere():
    batch, stats = random_batch()
    grpo = GRPO(GRPO.Config(kl_coefficient=1.0))
    nothing = torch.zeros_like(stats.logprobs)
    assert (grpo.token_loss(stats, signal(nothing, stats.logprobs, stats.logprobs)) == 0).all()
    assert (grpo.token_loss(stats, signal(nothing, stats.logprobs, stats.logprobs - 0.3)) > 0.03).all()
    assert (grpo.token_loss(stats, signal(nothing, stats.logprobs, stats.logprobs + 0.3)) > 0.04).all()
