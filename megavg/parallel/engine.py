"""One pipeline stage under DeepSpeed ZeRO-3: forward and backward of micro-batches, the optimiser step, its state."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Callable, Iterator, Sequence

import torch
from torch import nn

from megavg.parallel import zero
from megavg.parallel.context import ParallelContext
from megavg.parallel.mcore import DeepSpeedMpu
from megavg.parallel.optimizer import make_optimizer
from megavg.parallel.pipeline import StageLink
from megavg.parallel.schedule import Work, one_forward_one_backward
from megavg.protocols.batch import ModelInputs
from megavg.protocols.options import OptimizerConfig, ZeroConfig

MicroBatchLoss = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""``loss(i, logprobs [N], entropy [N])`` of micro-batch i; the sum over all micro-batches and ranks is THE loss."""


class ZeroEngine:
    """A stage whose parameters, gradients and optimiser state are partitioned over the data-parallel group.

    With ``optimizer=None`` the stage is frozen: parameters are partitioned and only ``scores`` can be asked for.

    Args:
        stage: a module that maps the fields of ``ModelInputs`` and ``hidden`` to hidden states, or on the last stage to
            (log-probs, entropies); it names its ``blocks``, ``chains``, ``tied_copy`` and ``hidden_shape``
            (``QwenVLStage``).

    Attributes:
        config: the configuration that DeepSpeed was given.
        optimizer_name: who computes AdamW, for the log.
    """

    def __init__(self, stage: nn.Module, context: ParallelContext, dtype: torch.dtype,
                 options: ZeroConfig, optimizer: OptimizerConfig | None):
        import deepspeed

        zero.check_deepspeed()
        if context.pp_size > 1:  # without the hook that is removed below DeepSpeed releases every parameter it has used
            options = dataclasses.replace(options, param_persistence_threshold=0)
        self.context, self.stage, self.dtype = context, stage, dtype
        self.config = zero.deepspeed_config(options, optimizer.gradient_clipping if optimizer else 0.0, dtype)
        self.link = StageLink(context)
        self._keep_gathered, adamw, self.optimizer_name = options.keep_gathered, None, ""
        if optimizer is None:
            stage.requires_grad_(False)
        else:
            adamw, self.optimizer_name = make_optimizer(stage, optimizer, context, options.offload_optimizer)
            zero.check_equal_groups(adamw, context)
        zero.gather_as_one(stage.blocks)
        self._engine, *_ = deepspeed.initialize(model=stage, optimizer=adamw, config=self.config,
                                                mpu=DeepSpeedMpu(context), dist_init_required=False)
        if context.pp_size > 1:
            zero.remove_world_broadcast(self._engine)
            if options.prefetch_bucket_size:
                zero.prefetch_next(stage.chains, stage)

    def forward_backward(self, num_micro_batches: int, micro_batch: Callable[[int], ModelInputs],
                         loss: MicroBatchLoss, temperature: float = 1.0) -> float:
        """Accumulate the gradient of the summed loss; returns the loss over all ranks and micro-batches.

        ``micro_batch(i)`` is asked for when its turn comes, so that only those in flight are on the device; ``loss`` is
        called on the last stage only. Every data-parallel rank must bring equally many micro-batches: ZeRO-3 gathers
        parameters together.
        """
        total = torch.zeros((), device=self.context.device)
        in_flight: dict[int, tuple] = {}

        def forward(i: int, inputs: ModelInputs, received: torch.Tensor | None) -> torch.Tensor | None:
            output = self._run(inputs, received, temperature)
            if self.context.is_last_stage:
                value = loss(i, *output)
                total.add_(value.detach())
                # ZeRO averages gradients over the data-parallel ranks; the loss is a sum
                output = value * self.context.dp_size
            in_flight[i] = received, output
            return None if self.context.is_last_stage else output.detach()

        def backward(i: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
            received, output = in_flight.pop(i)
            self._engine.set_gradient_accumulation_boundary(i == num_micro_batches - 1)
            zero.forget_backward(self._engine)
            if self.context.is_last_stage:
                self._engine.backward(output)
            else:
                output.backward(gradient)
            return None if received is None else received.grad

        order = one_forward_one_backward(num_micro_batches, self.context.pp_rank, self.context.pp_size)
        with zero.kept_gathered(self.stage) if self._keep_gathered else contextlib.nullcontext():
            self._work_through(order, micro_batch, forward, backward)
        if self.stage.tied_copy is not None:
            zero.sum_tied_gradient(self.stage.tied_copy)
        return float(self.link.from_last(self.context.sum_over_data(total)))

    def step(self, lr: float) -> float:
        """Clip, update, zero the gradients; returns the global gradient norm before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    @torch.no_grad()
    def scores(self, num_scored: Sequence[int], micro_batch: Callable[[int], ModelInputs],
               temperature: float = 1.0) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(log-probs [N], entropies [N]) of the scored positions of each micro-batch, on every stage, no gradient.

        ``num_scored`` are the N of the micro-batches.
        """
        return scores_through_stages(self._engine, self.stage, self.link, self.context, self.dtype, num_scored,
                                     micro_batch, temperature)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter of this stage by name, whole along data parallelism; valid until the next is asked for."""
        return zero.gathered(self.stage)

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every trained parameter's gradient by name, fp32, whole along data parallelism, between the backward and
        ``step``."""
        return zero.gradients(self.stage)

    def save(self, folder: str | Path) -> None:
        """Write parameters and optimiser state, each rank its own part, for the same layout."""
        self._engine.save_checkpoint(str(folder), tag="zero", save_latest=False)

    def load(self, folder: str | Path) -> None:
        """Read what ``save`` wrote; the layout must be the same."""
        path, _ = self._engine.load_checkpoint(str(folder), tag="zero")
        if path is None:
            raise ValueError(f"{folder}/zero holds no state for {self.context.layout}; it was written by another "
                             "layout or is incomplete")

    def _run(self, inputs: ModelInputs, hidden: torch.Tensor | None, temperature: float):
        return self._engine(**inputs.as_kwargs(), hidden=hidden, temperature=temperature)

    def _work_through(self, order: list[Work], micro_batch, forward, backward) -> None:
        """Do the work of ``order``, with one exchange between each two pieces of it."""
        ahead, behind = self.context.pp_rank + 1, self.context.pp_rank - 1
        inputs: dict[int, ModelInputs] = {}
        shapes: dict[int, torch.Size] = {}

        def expected(work: Work | None) -> list[tuple[torch.Tensor, int]]:
            if work is None:
                return []
            if work.is_forward:
                inputs[work.index] = micro_batch(work.index)
                return [] if self.context.is_first_stage else [
                    (hidden_buffer(self.stage, inputs[work.index], self.dtype), behind)]
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


def hidden_buffer(stage: nn.Module, inputs: ModelInputs, dtype: torch.dtype) -> torch.Tensor:
    """Room for the hidden states that a stage receives for ``inputs``."""
    return torch.empty(stage.hidden_shape(inputs.input_ids), dtype=dtype, device=inputs.input_ids.device)


def scores_through_stages(run: Callable, stage: nn.Module, link: StageLink, context: ParallelContext,
                          dtype: torch.dtype, num_scored: Sequence[int], micro_batch: Callable[[int], ModelInputs],
                          temperature: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Run micro-batches forward through the pipeline; every stage gets the last one's (log-probs, entropies).

    Stages work on different micro-batches at the same time. ``run`` is ``stage`` or the engine around it.
    """
    results = []
    for i, n in enumerate(num_scored):
        inputs = micro_batch(i)
        received = None
        if not context.is_first_stage:
            received = hidden_buffer(stage, inputs, dtype)
            link.exchange([], [(received, context.pp_rank - 1)])
        output = run(**inputs.as_kwargs(), hidden=received, temperature=temperature)
        if not context.is_last_stage:
            link.exchange([(output, context.pp_rank + 1)], [])
            output = torch.empty(2, n, device=context.device).unbind()
        results.append(output)
    link.flush()
    if context.pp_size == 1:
        return results
    joined = link.from_last(torch.cat([torch.stack([scores.float() for scores in pair]) for pair in results], 1))
    return [tuple(part.unbind()) for part in joined.split(list(num_scored), 1)]
