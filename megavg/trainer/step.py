"""One optimiser step: the ONE home of the reduction, and the loss of a micro-batch.

The share of each token in the loss is fixed for the whole optimiser batch, over all ranks, before the first
micro-batch. So the loss and its gradient do not depend on the micro-batch size, on the data-parallel size, or on how
tokens fall on ranks.
"""

from __future__ import annotations

from typing import Callable, Sequence

import torch

from megavg.algorithms.base import Algorithm
from megavg.models.inputs import scatter_rows
from megavg.protocols.batch import PolicySignal, RolloutBatch, TokenScores


def coefficients(batch: RolloutBatch, aggregation: str) -> torch.Tensor:
    """Share of every token in the mean over the optimiser batch [B, T]; shares sum to 1 over all ranks.

    ``token_mean``: 1 / number of valid tokens. ``response_mean``: 1 / (number of answers * tokens of this answer).
    """
    mask = batch.mask.float()
    lengths = mask.sum(1, keepdim=True)
    if aggregation == "token_mean":
        return mask / batch.all_sum(lengths.sum()).clamp_min(1)
    if aggregation == "response_mean":
        num_answers = batch.all_sum((lengths > 0).sum().float())
        return mask / lengths.clamp_min(1) / num_answers.clamp_min(1)
    raise ValueError(f"algorithm.aggregation={aggregation!r} is not one of response_mean, token_mean")


def make_signal(algorithm: Algorithm, batch: RolloutBatch, stats: TokenScores | None,
                reference_logprobs: torch.Tensor | None, progress: float) -> PolicySignal:
    """Ask the algorithm for everything that is fixed before the update."""
    advantages = algorithm.advantages(batch, stats)
    old = torch.zeros_like(advantages) if stats is None else stats.logprobs
    return PolicySignal(advantages.detach(), coefficients(batch, algorithm.config.aggregation),
                        algorithm.weights(batch, stats, progress), old, reference_logprobs)


def micro_batches(tokens: Sequence[int], patches: Sequence[int], prompt_of_row: Sequence[int], max_rows: int,
                  max_tokens: int = 0, max_patches: int = 0,
                  agree: Callable[[int], int] = lambda count: count) -> list[range]:
    """Rows of each micro-batch: consecutive, as many as the limits allow; a row beyond a limit stands alone.

    Args:
        tokens: of each row, prompt and answer.
        patches: of the images of each prompt, which a micro-batch encodes once however many rows ask about them.
        max_rows, max_tokens, max_patches: limits of a micro-batch; 0 sets none.
        agree: this rank's number of micro-batches -> the number that all data-parallel ranks take (their largest).
    """
    parts: list[range] = []
    start = 0
    for stop in range(1, len(tokens) + 1):
        row = stop - 1
        wanted = sum(patches[p] for p in {prompt_of_row[b] for b in range(start, stop)})
        too_much = stop - start > max_rows or 0 < max_tokens < sum(tokens[start:stop]) or 0 < max_patches < wanted
        if too_much and row > start:
            parts.append(range(start, row))
            start = row
    parts.append(range(start, len(tokens)))
    count = agree(len(parts))
    while len(parts) < count:
        longest = max((part for part in parts if len(part) > 1), key=lambda part: sum(tokens[b] for b in part))
        at, middle = parts.index(longest), longest.start + len(longest) // 2
        parts[at:at + 1] = [range(longest.start, middle), range(middle, longest.stop)]
    return parts


def micro_batch_loss(algorithm: Algorithm, signal: PolicySignal, batch: RolloutBatch, rows: Sequence[range],
                     progress: float) -> Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]:
    """``loss(i, logprobs [N], entropy [N])`` of micro-batch i, as the engine takes it."""
    lengths = batch.mask.sum(1).tolist()
    width = batch.mask.shape[1]
    entropy_coefficient = algorithm.entropy_coefficient(progress)

    def loss(i: int, logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        start, stop = rows[i].start, rows[i].stop
        part = signal.rows(start, stop)
        new = TokenScores(*(scatter_rows(values, lengths[start:stop], width) for values in (logprobs, entropy)))
        token_loss = part.weights * algorithm.token_loss(new, part)
        if entropy_coefficient:
            token_loss = token_loss - entropy_coefficient * new.entropy
        return (part.coefficients * token_loss).sum()

    return loss
