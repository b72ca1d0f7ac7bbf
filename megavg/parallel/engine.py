"""One pipeline stage under DeepSpeed ZeRO-3: forward and backward of micro-batches, the optimiser step, its state."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Callable, Iterator, Sequence

import torch
from torch import nn

from megavg.parallel import zero, zero_state
from megavg.parallel.context import ParallelContext
from megavg.parallel.frozen import frozen, release_leftovers
from megavg.parallel.mcore import DeepSpeedMpu
from megavg.parallel.optimizer import make_optimizer
from megavg.parallel.passes import StagePasses
from megavg.parallel.pipeline import StageLink
from megavg.protocols.batch import ModelInputs
from megavg.protocols.options import OptimizerConfig, ZeroConfig

MicroBatchLoss = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""``loss(i, logprobs [N], entropy [N])`` of micro-batch i; the sum over all micro-batches and ranks is THE loss."""


class ZeroEngine:
    """A stage whose parameters, gradients and optimiser state are partitioned over the data-parallel group.

    With ``optimizer=None`` the stage is frozen: parameters are partitioned and it only scores.

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
        self._passes = StagePasses(stage, self.link, context, dtype)
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
            output = self._engine(**inputs.as_kwargs(), hidden=received, temperature=temperature)
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

        with self._gathering():
            self._passes.work_through(num_micro_batches, micro_batch, forward, backward)
        if self.stage.tied_copy is not None:
            zero.sum_tied_gradient(self.stage.tied_copy)
        return float(self.link.from_last(self.context.sum_over_data(total)))

    def step(self, lr: float) -> float:
        """Clip, update, zero the gradients; returns the global gradient norm before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def scores(self, num_scored: Sequence[int], micro_batch: Callable[[int], ModelInputs],
               temperature: float = 1.0) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(log-probs [N], entropies [N]) of the scored positions of each micro-batch, on every stage, no gradient.

        ``num_scored`` are the N of the micro-batches.
        """
        return self._passes.scores(self._engine, num_scored, micro_batch, temperature)

    def entropy_gradients(self, num_scored: Sequence[int], num_patches: Sequence[int],
                          micro_batch: Callable[[int], ModelInputs], weights: Sequence[torch.Tensor],
                          temperature: float = 1.0) -> list[torch.Tensor]:
        """The gradient of sum(weights[i] * entropy) to the pixels of each micro-batch i; see ``StagePasses``.

        The trainer asks the generator's copy instead, which is there anyway; this is for those who keep none. No
        parameter receives a gradient, and those accumulated so far stay as they are. The modules are run without
        DeepSpeed's engine around them, which would count a backward. All data-parallel ranks bring equally many
        micro-batches.
        """
        with frozen(self.stage), self._gathering():
            return self._passes.entropy_gradients(num_scored, num_patches, micro_batch, weights, temperature,
                                                  lambda: release_leftovers(self._engine))

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter of this stage by name, whole along data parallelism; valid until the next is asked for."""
        return zero.gathered(self.stage)

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every trained parameter's gradient by name, fp32, whole along data parallelism, between the backward and
        ``step``."""
        return zero.gradients(self.stage)

    def state(self) -> Iterator[zero_state.LocalState]:
        """What this rank holds of every parameter and of its optimiser state, as views."""
        return zero_state.local_states(self.stage, self._engine.optimizer, self.context)

    @property
    def optimizer_steps(self) -> int:
        """Updates that the optimiser's moments have seen."""
        return zero_state.optimizer_steps(self._engine.optimizer)

    @contextlib.contextmanager
    def loading(self, optimizer_steps: int) -> Iterator[Iterator[zero_state.LocalState]]:
        """Views as :meth:`state` gives them, to be filled within the block; ``optimizer_steps`` is set beside them."""
        with zero_state.loading(self.stage, self._engine.optimizer, self.context, optimizer_steps) as states:
            yield states

    def _gathering(self) -> contextlib.AbstractContextManager:
        return zero.kept_gathered(self.stage) if self._keep_gathered else contextlib.nullcontext()
