"""One pipeline stage under DeepSpeed ZeRO-3: forward and backward of micro-batches, the optimiser step, its state."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn

from megavg.parallel.context import ParallelContext
from megavg.parallel.mcore import DeepSpeedMpu
from megavg.parallel.schedule import one_forward_one_backward
from megavg.parallel.zero import (deepspeed_config, forget_backward, gather_as_one, gathered, make_optimizer,
                                  remove_world_broadcast)
from megavg.protocols.batch import ModelInputs
from megavg.protocols.options import OptimizerConfig, ZeroConfig

MicroBatchLoss = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""``loss(i, logprobs [N], entropy [N])`` of micro-batch i; the sum over all micro-batches and ranks is THE loss."""


class ZeroEngine:
    """A stage whose parameters, gradients and optimiser state are partitioned over the data-parallel group.

    With ``optimizer=None`` the stage is frozen: parameters are partitioned and only ``scores`` can be asked for.
    """

    def __init__(self, stage: nn.Module, hidden_size: int, context: ParallelContext, dtype: torch.dtype,
                 zero: ZeroConfig, optimizer: OptimizerConfig | None):
        import deepspeed

        self.context, self.stage, self.hidden_size, self.dtype = context, stage, hidden_size, dtype
        self.config = deepspeed_config(zero, optimizer.gradient_clipping if optimizer else 0.0, dtype)
        if optimizer is None:
            stage.requires_grad_(False)
        gather_as_one(stage.blocks)
        self._engine, *_ = deepspeed.initialize(
            model=stage, optimizer=make_optimizer(stage, optimizer, context) if optimizer else None,
            config=self.config, mpu=DeepSpeedMpu(context), dist_init_required=False)
        if context.pp_size > 1:
            remove_world_broadcast(self._engine)
        self._sends: list[tuple] = []

    def forward_backward(self, num_micro_batches: int, micro_batch: Callable[[int], ModelInputs],
                         loss: MicroBatchLoss, temperature: float = 1.0) -> float:
        """Accumulate the gradient of the summed loss; returns the loss over all ranks and micro-batches.

        ``micro_batch(i)`` is asked for when its turn comes, so that only those in flight are on the device.
        Every data-parallel rank must bring equally many micro-batches: ZeRO-3 gathers parameters together.
        """
        total = torch.zeros((), device=self.context.device)

        def forward(i: int):
            inputs = micro_batch(i)
            received = None if self.context.is_first_stage else self._receive(inputs)
            output = self._run(inputs, received, temperature)
            if not self.context.is_last_stage:
                self._send(output.detach(), self.context.pp_rank + 1)
                return received, output
            value = loss(i, *output)
            total.add_(value.detach())
            # ZeRO averages gradients over the data-parallel ranks; the loss is a sum
            return received, value * self.context.dp_size

        def backward(passed, is_last: bool):
            received, output = passed
            self._engine.set_gradient_accumulation_boundary(is_last)
            forget_backward(self._engine)
            if self.context.is_last_stage:
                self._engine.backward(output)
            else:
                output.backward(self._receive_like(output))
            if received is not None:
                self._send(received.grad, self.context.pp_rank - 1)

        one_forward_one_backward(num_micro_batches, self.context.pp_rank, self.context.pp_size, forward, backward)
        for work, _ in self._sends:
            work.wait()
        self._sends.clear()
        return self._reduce_loss(total)

    def step(self, lr: float) -> float:
        """Clip, update, zero the gradients; returns the global gradient norm before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    @torch.no_grad()
    def scores(self, inputs: ModelInputs, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probs [N], entropies [N]) of the scored positions, without a gradient. One stage only."""
        return self._run(inputs, None, temperature)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter of this stage by name, whole along data parallelism; valid until the next is asked for."""
        return gathered(self.stage)

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

    def _peer(self, stage: int) -> int:
        return dist.get_global_rank(self.context.pp_group, stage)

    def _send(self, tensor: torch.Tensor, stage: int) -> None:
        tensor = tensor.contiguous()  # kept until it has left
        self._sends.append((dist.isend(tensor, self._peer(stage), group=self.context.pp_group), tensor))

    def _receive(self, inputs: ModelInputs) -> torch.Tensor:
        hidden = torch.empty(*inputs.input_ids.shape, self.hidden_size, dtype=self.dtype, device=self.context.device)
        dist.recv(hidden, self._peer(self.context.pp_rank - 1), group=self.context.pp_group)
        return hidden.requires_grad_()

    def _receive_like(self, output: torch.Tensor) -> torch.Tensor:
        grad = torch.empty_like(output)
        dist.recv(grad, self._peer(self.context.pp_rank + 1), group=self.context.pp_group)
        return grad

    def _reduce_loss(self, total: torch.Tensor) -> float:
        total = self.context.sum_over_data(total)
        if self.context.pp_size > 1:
            total = total.clone()
            dist.broadcast(total, self._peer(self.context.pp_size - 1), group=self.context.pp_group)
        return float(total)
