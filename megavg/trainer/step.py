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
from megavg.parallel.context import ParallelContext
from megavg.protocols.batch import EncodedPrompt, PolicySignal, RolloutBatch, TokenScores
from megavg.trainer.config import TrainerConfig


def coefficients(batch: RolloutBatch, aggregation: str, counted: torch.Tensor | None = None) -> torch.Tensor:
    """Share of every token in the mean over the optimiser batch [B, T].

    ``token_mean``: 1 / number of counted tokens. ``response_mean``: 1 / (number of answers that have counted tokens *
    counted tokens of this answer). ``constant``: 1 / (number of answers * rollout.max_new_tokens). The first two sum to
    1 over all ranks. ``counted`` [B, T] defaults to the valid tokens; others get 0.
    """
    mask = (batch.mask if counted is None else counted).float()
    lengths = mask.sum(1, keepdim=True)
    if aggregation == "token_mean":
        return mask / batch.all_sum(lengths.sum()).clamp_min(1)
    if aggregation == "response_mean":
        num_answers = batch.all_sum((lengths > 0).sum().float())
        return mask / lengths.clamp_min(1) / num_answers.clamp_min(1)
    if aggregation == "constant":
        if batch.max_new_tokens < 1:
            raise ValueError("algorithm.aggregation=constant needs the length limit of the answers, which written "
                             "answers lack; take token_mean or response_mean")
        return mask / (batch.all_sum(lengths.new_tensor(mask.shape[0])) * batch.max_new_tokens)
    raise ValueError(f"algorithm.aggregation={aggregation!r} is not one of response_mean, token_mean, constant")


def make_signal(algorithm: Algorithm, batch: RolloutBatch, stats: TokenScores | None,
                reference_logprobs: torch.Tensor | None, progress: float) -> PolicySignal:
    """Ask the algorithm for everything that is fixed before the update."""
    aggregation = algorithm.config.aggregation
    advantages = algorithm.advantages(batch, stats).detach()
    weights = algorithm.weights(batch, stats, advantages, progress)
    entropy_weights = coefficients(batch, algorithm.entropy_aggregation) * algorithm.entropy_coefficient(
        batch, stats, progress)
    return PolicySignal(
        advantages, coefficients(batch, aggregation, algorithm.counted_tokens(batch, weights)), weights,
        torch.zeros_like(advantages) if stats is None else stats.logprobs, reference_logprobs, batch.mask,
        entropy_weights, algorithm.extra(batch, stats, advantages))


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


class MicroBatcher:
    """Cuts answers into the micro-batches that the run's configuration allows; all data-parallel ranks call it."""

    def __init__(self, settings: TrainerConfig, context: ParallelContext):
        self._settings, self._context = settings, context

    def rows(self, prompts: Sequence[EncodedPrompt], prompt_of_row: Sequence[int],
             responses: Sequence[Sequence[int]]) -> list[range]:
        """Rows of each micro-batch."""
        return self._cut([len(prompts[p].input_ids) + len(r) for p, r in zip(prompt_of_row, responses)],
                         [prompt.pixel_values.shape[0] for prompt in prompts], prompt_of_row)

    def paired_rows(self, prompts: Sequence[EncodedPrompt], prompt_of_row: Sequence[int],
                    responses: Sequence[Sequence[int]]) -> list[range]:
        """Rows of each micro-batch where every answer is scored on its prompt's image and on one of its own."""
        return self._cut([2 * (len(prompts[p].input_ids) + len(r)) for p, r in zip(prompt_of_row, responses)],
                         [2 * prompts[p].pixel_values.shape[0] for p in prompt_of_row], range(len(prompt_of_row)))

    def _cut(self, tokens: Sequence[int], patches: Sequence[int], image_of_row: Sequence[int]) -> list[range]:
        settings = self._settings
        return micro_batches(tokens, patches, image_of_row, settings.micro_batch_size, settings.micro_batch_tokens,
                             settings.micro_batch_patches, self._context.max_over_data)


def micro_batch_loss(algorithm: Algorithm, signal: PolicySignal,
                     rows: Sequence[range]) -> Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]:
    """``loss(i, logprobs [N], entropy [N])`` of micro-batch i, as the engine takes it."""
    lengths = signal.mask.sum(1).tolist()
    width = signal.mask.shape[1]
    has_bonus = bool(signal.entropy_weights.any())  # without one the entropy's gradient need not be computed

    def loss(i: int, logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        start, stop = rows[i].start, rows[i].stop
        part = signal.rows(start, stop)
        new = TokenScores(*(scatter_rows(values, lengths[start:stop], width) for values in (logprobs, entropy)))
        loss = part.coefficients * part.weights * algorithm.token_loss(new, part)
        if has_bonus:
            loss = loss - part.entropy_weights * new.entropy
        return loss.sum()

    return loss
