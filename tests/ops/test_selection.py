"""The choice of tokens over the whole optimiser batch, against sorting and plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from megavg.ops.selection import covariances, largest, num_valid
from tests.rollout_batches import on_ranks, random_batch


def same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@pytest.mark.parametrize("count", [0, 1, 5, 17, 10**6])
@pytest.mark.parametrize("levels", [0, 4])  # 4 levels: most values tie
def test_largest_takes_the_count_and_its_ties(count, levels):
    batch, stats = random_batch(3)
    values = (stats.entropy * levels).round() if levels else stats.entropy - 1
    among = batch.mask & batch.answer_mask
    candidates = sorted((float(v) for v in values[among]), reverse=True)
    found = largest(values, among, count, same)
    for b in range(len(values)):
        for t in range(values.shape[1]):
            above = sum(v > float(values[b, t]) for v in candidates)
            assert bool(found[b, t]) is (bool(among[b, t]) and above < count)
    if count in (1, 5, 17) and not levels:
        assert int(found.sum()) == count
    if levels and count == 5:
        assert int(found.sum()) > count


def test_largest_among_none():
    batch, stats = random_batch()
    assert not largest(stats.entropy, torch.zeros_like(batch.mask), 3, same).any()


def test_largest_on_ranks_of_which_one_has_no_candidate():
    batch, stats = random_batch(4)
    among = batch.mask.clone()
    among[:4] = False
    expected = largest(stats.entropy, among, 9, same)

    def on_rank(part, part_stats, start, stop):
        return largest(part_stats.entropy, among[start:stop], 9, part.all_gather)

    assert torch.equal(torch.cat(on_ranks(batch, stats, [4, 16], on_rank)), expected) and int(expected.sum()) == 9


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_covariances(dtype, tolerance):
    batch, stats = random_batch(5, dtype=dtype)
    advantages = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0), dtype=dtype) * batch.mask
    tokens = batch.mask.nonzero().tolist()
    mean_a = math.fsum(float(advantages[b, t]) for b, t in tokens) / len(tokens)
    mean_l = math.fsum(float(stats.logprobs[b, t]) for b, t in tokens) / len(tokens)
    found = covariances(advantages, stats.logprobs, batch.mask, same)
    assert found.dtype is dtype and (found[~batch.mask] == 0).all()
    for b, t in tokens:
        expected = (float(advantages[b, t]) - mean_a) * (float(stats.logprobs[b, t]) - mean_l)
        assert float(found[b, t]) == pytest.approx(expected, abs=tolerance)

    def on_rank(part, part_stats, start, stop):
        return covariances(advantages[start:stop], part_stats.logprobs, part.mask, part.all_sum)

    assert torch.allclose(torch.cat(on_ranks(batch, stats, [4, 8], on_rank)), found, rtol=0, atol=tolerance)


def test_num_valid():
    batch, stats = random_batch()
    assert num_valid(batch.mask, same) == sum(batch.mask.sum(1).tolist())
    assert set(on_ranks(batch, stats, [12], lambda part, *_: num_valid(part.mask, part.all_sum))) == {
        int(batch.mask.sum())}
