"""Random batches of answers for tests of algorithms and of the reduction, whole or split over simulated ranks."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any, Callable

import torch

from megavg.protocols.batch import RolloutBatch, TokenScores


def random_batch(seed: int = 0, num_prompts: int = 5, group_size: int = 4, width: int = 7,
                 dtype: torch.dtype = torch.float32) -> tuple[RolloutBatch, TokenScores]:
    """Answers of unequal length with rewards, digit marks and the behaviour policy's scores, zeros on padding."""
    generator = torch.Generator().manual_seed(seed)
    rows = num_prompts * group_size
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    lengths[seed % rows] = width
    mask = torch.arange(width)[None] < lengths
    digits = (torch.rand(rows, width, generator=generator) < 0.5) & mask
    stats = TokenScores(-4 * torch.rand(rows, width, generator=generator, dtype=dtype) * mask,
                        3 * torch.rand(rows, width, generator=generator, dtype=dtype) * mask)
    batch = RolloutBatch(torch.zeros(rows, width, dtype=torch.int64), mask,
                         torch.rand(rows, generator=generator, dtype=dtype), group_size, digits)
    return batch, stats


def rows_of(batch: RolloutBatch, stats: TokenScores, start: int, stop: int,
            all_sum) -> tuple[RolloutBatch, TokenScores]:
    """The rollouts ``start:stop`` as one rank of several holds them."""
    part = replace(batch, response_ids=batch.response_ids[start:stop], mask=batch.mask[start:stop],
                   rewards=batch.rewards[start:stop], answer_mask=batch.answer_mask[start:stop], all_sum=all_sum)
    return part, TokenScores(stats.logprobs[start:stop], stats.entropy[start:stop])


def on_threads(num_ranks: int, function: Callable[[int, Callable], Any]) -> list[Any]:
    """``function(rank, all_sum)`` on one thread per rank; ``all_sum`` really sums over the threads."""
    barrier = threading.Barrier(num_ranks, timeout=30)
    given: list[Any] = [None] * num_ranks
    results: list[Any] = [None] * num_ranks
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        def all_sum(tensor: torch.Tensor) -> torch.Tensor:
            given[rank] = tensor.clone()
            barrier.wait()
            total = torch.stack(given).sum(0)
            barrier.wait()  # all have read before one of them gives the next
            return total

        try:
            results[rank] = function(rank, all_sum)
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
