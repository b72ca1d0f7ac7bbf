"""The two-stage schedule: its signs, variants by sample, the cap, the logged ratios, restarts and ranks."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from megavg.algorithms.grpo import GRPO
from megavg.algorithms.two_stage import TwoStage
from megavg.protocols.batch import RolloutBatch, TokenScores
from megavg.protocols.config import ConfigError, build
from megavg.trainer.step import make_signal
from tests.rollout_batches import on_ranks, random_batch

UP, DOWN = 0.03, -0.02
LAMBDAS = {"lambda_max": UP, "lambda_min": -DOWN}


def scaled(stats: TokenScores, factor: float) -> TokenScores:
    return replace(stats, entropy=factor * stats.entropy)


def slow_entropy(batch: RolloutBatch, stats: TokenScores) -> float:
    means = []
    for b in range(len(batch.mask)):
        own = [float(stats.entropy[b, t]) for t in range(batch.mask.shape[1]) if batch.mask[b, t]]
        if own:
            means.append(math.fsum(own) / len(own))
    return math.fsum(means) / len(means)


@pytest.mark.parametrize("variant, before, after", [("max_to_min", UP, DOWN), ("min_to_max", DOWN, UP),
                                                    ("max", UP, UP), ("min", DOWN, DOWN)])
def test_schedule(variant, before, after):
    batch, stats = random_batch()
    method = TwoStage(TwoStage.Config(variant=variant, **LAMBDAS))
    for progress, expected in ((0.0, before), (0.79, before), (0.8, after), (0.81, after), (1.0, after)):
        assert method.entropy_coefficient(batch, stats, progress) == expected
        assert method.metrics["two_stage/coefficient"] == expected


@pytest.mark.parametrize("variant, noisy, clean", [("noisy_max_clean_min", UP, DOWN),
                                                   ("noisy_min_clean_max", DOWN, UP)])
def test_by_sample(variant, noisy, clean):
    batch, stats = random_batch(1)
    assert batch.noisy.any() and not batch.noisy.all()
    method = TwoStage(TwoStage.Config(variant=variant, **LAMBDAS))
    for progress in (0.1, 0.9):
        found = method.entropy_coefficient(batch, stats, progress)
        expected = [noisy if flag else clean for flag in batch.noisy.tolist()]
        assert found.shape == (20, 1) and found[:, 0].tolist() == pytest.approx(expected)
        assert method.metrics["two_stage/coefficient"] == pytest.approx(math.fsum(expected) / 20)
    with pytest.raises(ValueError, match=f"{variant}.*data.noise"):
        method.entropy_coefficient(replace(batch, noisy=None), stats, 0.1)


@pytest.mark.parametrize("variant", ["max_to_min", "noisy_max_clean_min"])
def test_the_bonus_reaches_every_answer_as_the_mean_of_means(variant):
    """d objective / d H of each token, groups of equal rewards included."""
    batch, stats = random_batch(1)
    batch = replace(batch, rewards=torch.ones_like(batch.rewards))
    signal = make_signal(TwoStage(TwoStage.Config(variant=variant, **LAMBDAS)), batch, stats, None, 0.3)
    assert not signal.advantages.any()
    for b in range(20):
        own = UP if variant == "max_to_min" or batch.noisy[b] else DOWN
        length = int(batch.mask[b].sum())
        expected = [own / 20 / length if t < length else 0.0 for t in range(batch.mask.shape[1])]
        assert signal.entropy_weights[b].tolist() == pytest.approx(expected, rel=1e-5)


def test_it_adds_to_the_fixed_bonus_and_changes_nothing_else():
    batch, stats = random_batch(2)
    method = TwoStage(TwoStage.Config(entropy_coefficient=0.5, **LAMBDAS))
    assert method.entropy_coefficient(batch, stats, 0.9) == pytest.approx(0.5 + DOWN)
    assert method.metrics["two_stage/coefficient"] == DOWN
    plain = make_signal(GRPO(GRPO.Config()), batch, stats, None, 0.9)
    signal = make_signal(method, batch, stats, None, 0.9)
    for name in ("advantages", "weights", "coefficients", "old_logprobs"):
        assert torch.equal(getattr(signal, name), getattr(plain, name))


@pytest.mark.parametrize("seed", range(3))
def test_ratios(seed):
    batch, stats = random_batch(seed)
    batch.mask[3] = False  # an answer without tokens counts nowhere
    method = TwoStage(TwoStage.Config())
    first, peak = slow_entropy(batch, stats), 0.0
    for factor in (1.0, 2.5, 4.0, 0.5, 3.0):
        now = scaled(stats, factor)
        method.entropy_coefficient(batch, now, 0.5)
        own = slow_entropy(batch, now)
        peak = max(peak, own)
        assert method.metrics["two_stage/entropy_ratio"] == pytest.approx(own / first, rel=1e-6)
        assert method.metrics["two_stage/peak_share"] == pytest.approx(own / peak, rel=1e-6)
    assert method.metrics["two_stage/peak_share"] == pytest.approx(0.75, rel=1e-6)
    assert method.first_entropy == pytest.approx(first, rel=1e-6)


def test_the_cap_stops_the_bonus_and_only_the_bonus():
    batch, stats = random_batch(1)
    method = TwoStage(TwoStage.Config(cap=4.0, **LAMBDAS))
    steps = [(1.0, 0.1, UP), (3.9, 0.2, UP), (4.1, 0.3, 0.0), (3.0, 0.4, UP), (9.0, 0.9, DOWN)]
    for factor, progress, expected in steps:
        assert method.entropy_coefficient(batch, scaled(stats, factor), progress) == expected
    by_sample = TwoStage(TwoStage.Config(variant="noisy_max_clean_min", cap=4.0, **LAMBDAS))
    by_sample.entropy_coefficient(batch, stats, 0.0)
    found = by_sample.entropy_coefficient(batch, scaled(stats, 5.0), 0.5)[:, 0]
    assert found.tolist() == pytest.approx([0.0 if flag else DOWN for flag in batch.noisy.tolist()])


def test_a_restart_goes_on_as_before():
    batch, stats = random_batch(4)
    first, second = (TwoStage(TwoStage.Config(cap=2.0)) for _ in range(2))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))  # before the first step
    assert second.first_entropy is None
    for factor in (1.0, 3.0):
        first.entropy_coefficient(batch, scaled(stats, factor), 0.1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for factor in (1.5, 2.5):
        results = [m.entropy_coefficient(batch, scaled(stats, factor), 0.2) for m in (first, second)]
        assert results[0] == results[1] == (0.0 if factor > 2 else 1e-2)
        assert first.metrics == second.metrics
    assert first.metrics["two_stage/peak_share"] == pytest.approx(2.5 / 3, rel=1e-6)


@pytest.mark.parametrize("variant", ["max_to_min", "noisy_min_clean_max"])
def test_ranks_agree(variant):
    batch, stats = random_batch(5)

    def on_rank(part, scores, start, stop):
        method = TwoStage(TwoStage.Config(variant=variant, cap=1.5, **LAMBDAS))
        found = [method.entropy_coefficient(part, scaled(scores, factor), 0.1) for factor in (1.0, 1.4, 1.6)]
        return [torch.as_tensor(f) for f in found], method.metrics, method.state_dict()

    whole = on_rank(batch, stats, 0, 20)
    parts = on_ranks(batch, stats, (4, 12), on_rank)
    for found, metrics, state in parts:
        assert metrics == pytest.approx(whole[1]) and state == pytest.approx(whole[2])
    for i, expected in enumerate(whole[0]):
        own = [found[i] for found, _, _ in parts]
        assert torch.equal(torch.cat(own), expected) if expected.ndim else set(map(float, own)) == {float(expected)}


def test_options():
    config = TwoStage.Config()
    assert (config.lambda_max, config.lambda_min, config.switch, config.cap) == (1e-2, 1e-2, 0.8, None)
    for wrong in ({"lambda_max": -1.0}, {"lambda_min": -1.0}, {"switch": 1.1}, {"cap": 0.0}, {"variant": "min_max"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            build(TwoStage.Config, wrong, "algorithm")
