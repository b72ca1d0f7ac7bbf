"""Pick tokens by their rank among all of the optimiser batch, so that the choice never depends on the layout."""

from __future__ import annotations

from typing import Callable

import torch

Reduce = Callable[[torch.Tensor], torch.Tensor]


def largest(values: torch.Tensor, among: torch.Tensor, count: int, all_gather: Reduce) -> torch.Tensor:
    """True on the ``count`` largest of the values that ``among`` marks, over all ranks; [B, T] -> [B, T] bool.

    Every tie with the last one is taken too, all of them where there are no more than ``count``, none for 0.

    Args:
        values: [B, T], of any sign; negate them to take the smallest.
        among: [B, T] bool, the candidates of this rank; a rank may have none.
        all_gather: concatenates the ranks' vectors; every rank must call this function.
    """
    candidates = all_gather(values[among])
    if count < 1 or not candidates.numel():
        return torch.zeros_like(among)
    threshold = candidates.topk(min(count, candidates.numel())).values[-1]
    return among & (values >= threshold)


def covariances(advantages: torch.Tensor, logprobs: torch.Tensor, mask: torch.Tensor, all_sum: Reduce) -> torch.Tensor:
    """(A - mean A)(log pi - mean log pi) of every token [B, T], means over all ranks' valid tokens; 0 on padding.

    Source: the entropy mechanism, arXiv 2505.22617, whose mean over tokens is the change of entropy to first order.
    """
    sums = all_sum(torch.stack([(advantages * mask).sum(dtype=torch.float64),
                                (logprobs * mask).sum(dtype=torch.float64), mask.sum().double()]))
    mean_advantage, mean_logprob = (sums[:2] / sums[2].clamp_min(1)).to(logprobs.dtype)
    return (advantages - mean_advantage) * (logprobs - mean_logprob) * mask


def share_of(share: float, total: torch.Tensor) -> torch.Tensor:
    """ceil(share * total), at least 1, int64; the share is meant as the decimal it is written as."""
    # less a little: 0.07 * 100 is 7.000000000000001 in floating point
    return (share * total.double() - 1e-9).ceil().clamp_min(1).long()


def num_valid(mask: torch.Tensor, all_sum: Reduce) -> int:
    """Valid tokens of the whole optimiser batch."""
    return int(all_sum(mask.sum()))
