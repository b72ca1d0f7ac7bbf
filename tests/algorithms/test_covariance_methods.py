"""Clip-Cov and KL-Cov against plain loops over the whole optimiser batch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megavg.algorithms.clip_cov import ClipCov
from megavg.algorithms.kl_cov import KLCov
from megavg.ops.chance import uniforms
from megavg.protocols.batch import RolloutBatch
from megavg.protocols.config import ConfigError, build
from megavg.trainer.step import make_signal
from tests.algorithms.slow_losses import Plain, Token, assert_equals_loops, loss_and_slopes, moved
from tests.rollout_batches import random_batch


def covariances(plain: Plain) -> dict[Token, float]:
    mean_a = math.fsum(plain.advantages[b] for b, _ in plain.tokens) / len(plain.tokens)
    mean_l = math.fsum(plain.old[b][t] for b, t in plain.tokens) / len(plain.tokens)
    return {(b, t): (plain.advantages[b] - mean_a) * (plain.old[b][t] - mean_l) for b, t in plain.tokens}


def drawn(plain: Plain, share: float, low: float, high: float) -> set[Token]:
    """The candidates with the smallest lots; each answer draws one for every token from its own stream."""
    lots = [uniforms(f"{stream}/clip_cov", length).tolist() for stream, length in zip(plain.streams, plain.lengths)]
    candidates = [token for token, value in covariances(plain).items() if low < value < high]
    count = max(1, int(share * len(plain.tokens)))
    return set(sorted(candidates, key=lambda token: lots[token[0]][token[1]])[:count])


def slow_clip_cov(plain: Plain, dropped: set[Token]) -> float:
    return plain.loss(lambda b, t: 0.0 if (b, t) in dropped else plain.clipped(b, t))


@pytest.mark.parametrize("options, num_dropped", [({}, 1), ({"clip_cov_share": 0.06}, 5),
                                                  ({"clip_cov_share": 1.0, "clip_cov_low": 0.2}, None)])
def test_clip_cov_equals_loops(options, num_dropped):
    batch, stats = random_batch(1, dtype=torch.float64)
    bounds = (options.get("clip_cov_share", 2e-4), options.get("clip_cov_low", 1.0), 5.0)
    dropped = drawn(Plain(batch, stats, stats), *bounds)
    candidates = drawn(Plain(batch, stats, stats), 1.0, *bounds[1:])
    assert len(candidates) > 4 and (num_dropped is None or len(dropped) == num_dropped)
    algorithm, signal, _ = assert_equals_loops(lambda: ClipCov(ClipCov.Config(**options)), batch, stats,
                                               moved(stats, batch.mask, 0.3),
                                               lambda plain: slow_clip_cov(plain, dropped))
    assert {tuple(token) for token in (batch.mask & (signal.weights == 0)).nonzero().tolist()} == dropped
    assert algorithm.metrics["clip_cov/dropped_tokens"] == len(dropped)


def test_clip_cov_draws_others_in_another_step():
    batch, stats = random_batch(1, num_prompts=20)

    def choice(of: RolloutBatch) -> torch.Tensor:
        return make_signal(ClipCov(ClipCov.Config(clip_cov_share=0.05)), of, stats, None, 0.0).weights

    other = replace(batch, streams=[f"next/{stream}" for stream in batch.streams])
    assert torch.equal(choice(batch), choice(batch)) and not torch.equal(choice(batch), choice(other))


@pytest.mark.parametrize("equal", [True, False])
def test_clip_cov_without_candidates_is_grpo(equal):
    batch, stats = random_batch(2, dtype=torch.float64)
    options = {} if equal else {"clip_cov_low": 100.0, "clip_cov_high": 200.0}
    if equal:
        batch = replace(batch, rewards=torch.full_like(batch.rewards, 0.5))
    algorithm, signal, _ = assert_equals_loops(lambda: ClipCov(ClipCov.Config(**options)), batch, stats,
                                               moved(stats, batch.mask, 0.3), lambda plain: plain.loss(plain.clipped))
    assert torch.equal(signal.weights, batch.mask.float()) and algorithm.metrics["clip_cov/dropped_tokens"] == 0


def highest(plain: Plain, share: float) -> set[Token]:
    values = covariances(plain)
    best = sorted((value for value in values.values() if value > 0), reverse=True)[:max(1, int(share * len(values)))]
    return {token for token, value in values.items() if best and value >= best[-1]}


def slow_kl_cov(plain: Plain, held: set[Token], weight: float) -> float:
    def objective(b: int, t: int) -> float:
        penalty = weight * abs(plain.new[b][t] - plain.old[b][t]) if (b, t) in held else 0.0
        return plain.ratio(b, t) * plain.advantages[b] - penalty

    return plain.loss(objective)


@pytest.mark.parametrize("options", [{}, {"kl_cov_share": 0.15, "kl_cov_coefficient": 0.3}, {"kl_cov_share": 1.0}])
def test_kl_cov_equals_loops(options):
    batch, stats = random_batch(3, dtype=torch.float64)
    held = highest(Plain(batch, stats, stats), options.get("kl_cov_share", 2e-3))
    positive = sum(value > 0 for value in covariances(Plain(batch, stats, stats)).values())
    assert len(held) == min(positive, max(1, int(options.get("kl_cov_share", 2e-3) * int(batch.mask.sum()))))
    assert_equals_loops(lambda: KLCov(KLCov.Config(**options)), batch, stats, moved(stats, batch.mask, 0.6),
                        lambda plain: slow_kl_cov(plain, held, options.get("kl_cov_coefficient", 1.0)))


def test_kl_cov_acts_only_off_policy():
    batch, stats = random_batch(4, dtype=torch.float64)
    slopes = [loss_and_slopes(KLCov(KLCov.Config(kl_cov_share=0.5, kl_cov_coefficient=c)), batch, stats, stats, 4)[1]
              for c in (0.0, 9.0)]
    assert torch.equal(*slopes) and slopes[0].abs().max() > 1e-3


def test_one_token():
    batch, stats = random_batch(0, num_prompts=1, group_size=1, width=1, dtype=torch.float64)
    signal = make_signal(KLCov(KLCov.Config()), batch, stats, None, 0.0)
    assert signal.extra["kl_cov"].tolist() == [[False]], "its covariance is 0, like that of groups of equal rewards"
    assert make_signal(ClipCov(ClipCov.Config()), batch, stats, None, 0.0).weights.tolist() == [[1.0]]


@pytest.mark.parametrize("cls, options", [
    (ClipCov, {"clip_cov_share": 0.0}), (ClipCov, {"clip_cov_low": 5.0}), (KLCov, {"kl_cov_share": 1.5}),
    (KLCov, {"kl_cov_coefficient": -1.0})])
def test_options_that_make_no_sense_are_refused(cls, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        build(cls.Config, options, "algorithm")
