"""Top-entropy tokens against sorting all of the optimiser batch in plain Python."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from megavg.algorithms.top_entropy import TopEntropy
from megavg.protocols.config import ConfigError, build
from megavg.trainer.config import algorithm_class
from megavg.trainer.step import make_signal
from tests.algorithms.slow_losses import Plain, assert_equals_loops, moved
from tests.rollout_batches import random_batch


def kept_tokens(plain: Plain, share: str, take: str) -> set[tuple[int, int]]:
    ordered = sorted((plain.old_entropy[b][t] for b, t in plain.tokens), reverse=take == "top")
    last = ordered[math.ceil(Fraction(share) * len(ordered)) - 1]
    return {(b, t) for b, t in plain.tokens
            if (plain.old_entropy[b][t] >= last if take == "top" else plain.old_entropy[b][t] <= last)}


@pytest.mark.parametrize("take", ["top", "bottom"])
@pytest.mark.parametrize("share", ["0.2", "0.07", "1.0", "0.0001"])
def test_equals_loops(take, share):
    batch, stats = random_batch(1, dtype=torch.float64)
    kept = kept_tokens(Plain(batch, stats, stats), share, take)

    def slow(plain: Plain) -> float:
        return plain.loss(lambda b, t: plain.clipped(b, t) if (b, t) in kept else 0.0)

    algorithm, signal, slopes = assert_equals_loops(
        lambda: TopEntropy(TopEntropy.Config(share=float(share), take=take)), batch, stats,
        moved(stats, batch.mask, 0.3), slow)
    total = int(batch.mask.sum())
    assert len(kept) == math.ceil(Fraction(share) * total)
    assert algorithm.metrics["top_entropy/kept_share"] == pytest.approx(len(kept) / total)
    assert float(signal.coefficients.sum()) == pytest.approx(1), "the mean is over all valid tokens"


def test_the_count_is_that_of_the_decimal_share():
    batch, _ = random_batch()
    mask = torch.ones(10, 10, dtype=torch.bool)
    _, stats = random_batch(num_prompts=10, group_size=1)
    stats = replace(stats, entropy=torch.randperm(100).view(10, 10).float())
    weights = TopEntropy(TopEntropy.Config(share=0.07)).weights(replace(batch, mask=mask), stats, mask.float(), 0.0)
    assert math.ceil(0.07 * 100) == 8 and int(weights.sum()) == 7


def test_ties_are_kept_on_every_rank():
    batch, stats = random_batch(2, dtype=torch.float64)
    stats = replace(stats, entropy=stats.entropy.round())
    kept = kept_tokens(Plain(batch, stats, stats), "0.2", "top")
    assert len(kept) > math.ceil(0.2 * int(batch.mask.sum())) + 1

    def slow(plain: Plain) -> float:
        return plain.loss(lambda b, t: plain.clipped(b, t) if (b, t) in kept else 0.0)

    assert_equals_loops(lambda: TopEntropy(TopEntropy.Config()), batch, stats, moved(stats, batch.mask, 0.3), slow)


def test_on_dapo_as_in_the_paper():
    batch, stats = random_batch(3, dtype=torch.float64)
    kept = kept_tokens(Plain(batch, stats, stats), "0.2", "top")
    cls = algorithm_class("top_entropy+dapo")

    def slow(plain: Plain) -> float:
        return plain.loss(lambda b, t: plain.clipped(b, t, 0.2, 0.28) if (b, t) in kept else 0.0, "token_mean")

    assert_equals_loops(lambda: cls(cls.Config()), batch, stats, moved(stats, batch.mask, 0.3), slow)


def test_one_token_is_always_kept():
    batch, stats = random_batch(0, num_prompts=1, group_size=1, width=1)
    signal = make_signal(TopEntropy(TopEntropy.Config(share=0.01)), batch, stats, None, 0.0)
    assert signal.weights.tolist() == [[1.0]]


@pytest.mark.parametrize("share", [0.0, -0.2, 1.1])
def test_a_share_outside_is_refused(share):
    with pytest.raises(ConfigError, match=f"share={share} must be in"):
        build(TopEntropy.Config, {"share": share}, "algorithm")
