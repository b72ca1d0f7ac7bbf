"""Micro-batches on their way through the pipeline: 1F1B with its exchanges, scores, and gradients to the pixels."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from megavg.parallel.context import ParallelContext
from megavg.parallel.pipeline import StageLink
from megavg.parallel.schedule import Work, one_forward_one_backward
from megavg.protocols.batch import ModelInputs

MakeInputs = Callable[[int], ModelInputs]
"""``micro_batch(i)``, asked for when its turn comes, so that only those in flight are on the device."""

_NUM_SCORES, _NUM_PAIR_SCORES = 2, 6  # what the last stage returns of each scored position


@dataclass(frozen=True)
class StagePasses:
    """Takes micro-batches through one stage, each stage working on a different one at the same time.

    All stages of a pipeline must call the same method with as many micro-batches.

    Attributes:
        stage: maps the fields of ``ModelInputs`` and ``hidden`` to hidden states, or on the last stage to scores
            (``QwenVLStage``). A method's ``run`` is this stage or DeepSpeed's engine around it.
        dtype: of the hidden states.
    """

    stage: nn.Module
    link: StageLink
    context: ParallelContext
    dtype: torch.dtype

    def work_through(self, num_micro_batches: int, micro_batch: MakeInputs, forward: Callable,
                     backward: Callable) -> None:
        """Do all forwards and backwards in 1F1B order, with one exchange between each two of them.

        ``forward(i, inputs, received)`` gives what the next stage receives, ``backward(i, gradient)`` the gradient to
        what was received; both None where there is no such stage.
        """
        order = one_forward_one_backward(num_micro_batches, self.context.pp_rank, self.context.pp_size)
        ahead, behind = self.context.pp_rank + 1, self.context.pp_rank - 1
        inputs: dict[int, ModelInputs] = {}
        shapes: dict[int, torch.Size] = {}

        def expected(work: Work | None) -> list[tuple[torch.Tensor, int]]:
            if work is None:
                return []
            if work.is_forward:
                inputs[work.index] = micro_batch(work.index)
                return [] if self.context.is_first_stage else [(self._hidden_buffer(inputs[work.index]), behind)]
            return [] if self.context.is_last_stage else [
                (torch.empty(shapes.pop(work.index), dtype=self.dtype, device=self.context.device), ahead)]

        received = expected(order[0])
        self.link.exchange([], received)
        for work, following in zip(order, [*order[1:], None]):
            buffer = received[0][0] if received else None
            if work.is_forward:
                hidden = None if buffer is None else buffer.requires_grad_()
                output, to = forward(work.index, inputs.pop(work.index), hidden), ahead
                if output is not None:
                    shapes[work.index] = output.shape
            else:
                output, to = backward(work.index, buffer), behind
            received = expected(following)
            self.link.exchange([] if output is None else [(output, to)], received)
        self.link.flush()

    @torch.no_grad()
    def scores(self, run: Callable, num_scored: Sequence[int], micro_batch: MakeInputs, temperature: float,
               paired: bool = False) -> list[tuple[torch.Tensor, ...]]:
        """Each micro-batch's scores, forward only; every stage gets what the last one returned, in fp32.

        ``num_scored`` are the lengths of a micro-batch's scores; with ``paired`` see ``QwenVLStage.forward``.
        """
        count, results = _NUM_PAIR_SCORES if paired else _NUM_SCORES, []
        for i, n in enumerate(num_scored):
            inputs, received = micro_batch(i), None
            if not self.context.is_first_stage:
                received = self._hidden_buffer(inputs)
                self.link.exchange([], [(received, self.context.pp_rank - 1)])
            output = run(**inputs.as_kwargs(), hidden=received, temperature=temperature, paired=paired)
            if not self.context.is_last_stage:
                self.link.exchange([(output, self.context.pp_rank + 1)], [])
                output = torch.empty(count, n, device=self.context.device).unbind()
            results.append(output)
        self.link.flush()
        if self.context.pp_size == 1:
            return results
        joined = self.link.from_last(torch.cat([torch.stack([s.float() for s in scores]) for scores in results], 1))
        return [tuple(part.unbind()) for part in joined.split(list(num_scored), 1)]

    def entropy_gradients(self, num_scored: Sequence[int], num_patches: Sequence[int], micro_batch: MakeInputs,
                          weights: Sequence[torch.Tensor], temperature: float,
                          after_backward: Callable[[], None] = lambda: None) -> list[torch.Tensor]:
        """The gradient of sum(weights[i] * entropy) to the pixels of each micro-batch i, on every stage.

        No parameter of the stage may require a gradient. The sum is of this data-parallel rank alone.

        Args:
            num_scored: scored positions of each micro-batch.
            num_patches: rows of its ``pixel_values`` on the first stage, which alone has them; 0 without an image.
            weights: [n] of each micro-batch; the last stage reads them.

        Returns:
            [num_patches[i], C] fp32 of each micro-batch, the same on all stages and tensor-parallel ranks.
        """
        if [part.numel() for part in weights] != list(num_scored):
            raise ValueError(f"expected weights of {list(num_scored)} scored positions, got "
                             f"{[part.numel() for part in weights]}")
        in_flight: dict[int, tuple] = {}
        found: list[torch.Tensor] = []
        widths: set[int] = set()

        def forward(i: int, inputs: ModelInputs, received: torch.Tensor | None) -> torch.Tensor | None:
            leaf = received
            widths.add(inputs.pixel_values.shape[1])
            if self.context.is_first_stage:
                leaf = inputs.pixel_values.detach().requires_grad_()
                inputs = dataclasses.replace(inputs, pixel_values=leaf)
            output = self.stage(**inputs.as_kwargs(), hidden=received, temperature=temperature)
            if not self.context.is_last_stage:
                in_flight[i] = leaf, output
                return output.detach()
            entropy = output[1]
            in_flight[i] = leaf, (weights[i].to(entropy) * entropy).sum()
            return None

        def backward(i: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
            leaf, output = in_flight.pop(i)
            output.backward(gradient)
            after_backward()
            if not self.context.is_first_stage:
                return leaf.grad
            if num_patches[i] not in (0, len(leaf)):
                raise ValueError(f"micro-batch {i} has {len(leaf)} patches, but {num_patches[i]} were expected")
            found.append(leaf.grad[:num_patches[i]].float())  # none of the dummy image that stands for no image
            return None

        with torch.enable_grad():
            self.work_through(len(num_scored), micro_batch, forward, backward)
        return list(self._from_first(found, num_patches, widths.pop()).split(list(num_patches)))

    def _from_first(self, parts: list[torch.Tensor], num_rows: Sequence[int], width: int) -> torch.Tensor:
        """The first stage's ``parts`` one after the other, the same bits on all stages and tensor-parallel ranks."""
        joined = torch.cat(parts) if parts else torch.empty(sum(num_rows), width, device=self.context.device)
        if self.context.tp_size > 1 and joined.is_cuda:  # sums on a GPU may round differently from rank to rank
            dist.broadcast(joined, dist.get_global_rank(self.context.tp_group, 0), group=self.context.tp_group)
        return self.link.from_first(joined)

    def _hidden_buffer(self, inputs: ModelInputs) -> torch.Tensor:
        """Room for the hidden states that this stage receives for ``inputs``."""
        return torch.empty(self.stage.hidden_shape(inputs.input_ids), dtype=self.dtype, device=inputs.input_ids.device)
