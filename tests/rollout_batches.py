"""Random batches of answers for tests of algorithms and of the reduction, whole or split over simulated ranks."""

from __future__ import annotations

import math
import threading
from dataclasses import fields, is_dataclass, replace
from typing import Any, Callable, NamedTuple, Sequence

import torch

from megavg.protocols.batch import DIGITS, THINK, PerturbedScores, RolloutBatch, TokenScores


class Peers(NamedTuple):
    """How simulated ranks talk: the functions that a rank's batch is given."""

    all_sum: Callable[[torch.Tensor], torch.Tensor]
    all_gather: Callable[[torch.Tensor], torch.Tensor]


ALONE = Peers(lambda tensor: tensor, lambda tensor: tensor)


def random_batch(seed: int = 0, num_prompts: int = 5, group_size: int = 4, width: int = 7,
                 dtype: torch.dtype = torch.float32) -> tuple[RolloutBatch, TokenScores]:
    """Answers of unequal length with all that a batch may hold, and the behaviour policy's scores, zeros on padding."""
    generator = torch.Generator().manual_seed(seed)
    rows = num_prompts * group_size
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    lengths[seed % rows] = width
    mask = torch.arange(width)[None] < lengths
    digits = (torch.rand(rows, width, generator=generator) < 0.5) & mask

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=dtype)

    logprobs, entropy = -4 * uniform(rows, width) * mask, 3 * uniform(rows, width) * mask
    rewards = uniform(rows)
    jsd = math.log(2) * (1 - uniform(rows, width)) * mask  # above 0
    perturbed = PerturbedScores(-4 * uniform(rows, width) * mask, 3 * uniform(rows, width) * mask, jsd,
                                (2 * jsd + uniform(rows, width)) * mask)
    thinks = (uniform(rows, width) < 0.5) & mask & ~digits
    noisy = (uniform(num_prompts) < 0.5).repeat_interleave(group_size)
    batch = RolloutBatch(
        torch.zeros(rows, width, dtype=torch.int64), mask, rewards, group_size, digits,
        token_kinds=(THINK * thinks + DIGITS * digits).to(torch.int8), noisy=noisy, max_new_tokens=width,
        streams=[f"{seed}/step/sample{b // group_size}/{b % group_size}" for b in range(rows)])
    return batch, TokenScores(logprobs, entropy, perturbed=perturbed)


def rows_of(batch: RolloutBatch, stats: TokenScores, start: int, stop: int,
            peers: Peers = ALONE) -> tuple[RolloutBatch, TokenScores]:
    """The rollouts ``start:stop`` as one rank of several holds them."""
    return replace(_cut(batch, start, stop), **peers._asdict()), _cut(stats, start, stop)


def _cut(whole: Any, start: int, stop: int) -> Any:
    """The same dataclass with the rows ``start:stop`` of its tensors and lists, those of nested ones too."""
    if is_dataclass(whole):
        return replace(whole, **{f.name: _cut(getattr(whole, f.name), start, stop) for f in fields(whole)})
    return whole[start:stop] if isinstance(whole, (torch.Tensor, list)) else whole


def on_ranks(batch: RolloutBatch, stats: TokenScores, cuts: Sequence[int], function: Callable) -> list[Any]:
    """``function(batch, stats, start, stop)`` on one simulated rank for each part of the rows between ``cuts``."""
    bounds = [0, *cuts, len(batch.rewards)]

    def on_rank(rank: int, peers: Peers) -> Any:
        start, stop = bounds[rank], bounds[rank + 1]
        return function(*rows_of(batch, stats, start, stop, peers), start, stop)

    return on_threads(len(bounds) - 1, on_rank)


def on_threads(num_ranks: int, function: Callable[[int, Peers], Any]) -> list[Any]:
    """``function(rank, peers)`` on one thread per rank; the functions of ``peers`` really meet the other threads."""
    barrier = threading.Barrier(num_ranks, timeout=30)
    given: list[Any] = [None] * num_ranks
    results: list[Any] = [None] * num_ranks
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        def meet(kind: str, tensor: torch.Tensor, combine: Callable[[list], torch.Tensor]) -> torch.Tensor:
            given[rank] = kind, tensor.clone()
            barrier.wait()
            kinds, tensors = zip(*given)
            assert set(kinds) == {kind}, "ranks met in different collectives"
            combined = combine(list(tensors))
            barrier.wait()  # all have read before one of them gives the next
            return combined

        peers = Peers(lambda tensor: meet("sum", tensor, lambda all_: torch.stack(all_).sum(0)),
                      lambda tensor: meet("gather", tensor, torch.cat))
        try:
            results[rank] = function(rank, peers)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return results
