"""The model in all its roles: trained under ZeRO-3, copied for rollout and scoring, frozen as a reference."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator, Sequence

import torch
import torch.distributed as dist

from megavg.checkpoint.hf import write_checkpoint
from megavg.models.base import DTYPES, copy_weights, load_model
from megavg.models.inputs import InputBuilder, scatter_rows
from megavg.models.processor import Processor
from megavg.parallel.context import ParallelContext
from megavg.parallel.engine import MicroBatchLoss, ZeroEngine
from megavg.protocols.batch import EncodedPrompt, ModelInputs, TokenScores
from megavg.protocols.options import HeadOptions, OptimizerConfig, ZeroConfig
from megavg.rollout.native import NativeGenerator
from megavg.trainer.config import ModelConfig


class Policy:
    """Owns every copy of the model.

    Args:
        with_reference: keep a frozen copy of the starting model, partitioned by ZeRO-3.
        prompts_per_pass: see ``NativeGenerator``.
    """

    def __init__(self, config: ModelConfig, optimizer: OptimizerConfig, zero: ZeroConfig, context: ParallelContext,
                 with_reference: bool, prompts_per_pass: int, head: HeadOptions = HeadOptions()):
        self.context, self.dtype = context, DTYPES[config.dtype]
        self.model = load_model(config.path, head)
        self.processor = Processor.from_pretrained(config.path, self.model.spec.box_format, config.min_pixels,
                                                   config.max_pixels)
        self.builder = InputBuilder(self.processor.image_token_id, self.processor.pad_token_id,
                                    self.model.config.vision_config.spatial_merge_size, self.dtype, context.device)
        self.generator = NativeGenerator(self.model, self.builder, context, self.dtype, self.processor.end_token_ids,
                                         self.processor.forbidden_token_ids, prompts_per_pass)
        self.engine = self._engine(zero, optimizer)
        self.reference = self._engine(zero, None) if with_reference else None
        self._copy_is_current = False

    def _engine(self, zero: ZeroConfig, optimizer: OptimizerConfig | None) -> ZeroEngine:
        stage = self.model.build_stage(self.context, self.dtype)
        copy_weights(stage, self.model.hf_weights(stage, self.context))
        return ZeroEngine(stage, self.model.dims.hidden_size, self.context, self.dtype, zero, optimizer)

    def sync(self) -> NativeGenerator:
        """The generator with the trained weights, which are gathered once after each update."""
        if not self._copy_is_current:
            self.generator.load_weights(self.engine.weights())
            self._copy_is_current = True
        return self.generator

    def score(self, prompts: Sequence[EncodedPrompt], prompt_of_row: Sequence[int], responses: Sequence[Sequence[int]],
              rows: Sequence[range], width: int, temperature: float) -> TokenScores:
        """Log-probs and entropies [B, width] of given answers under the trained weights, without a gradient."""
        generator = self.sync()
        parts = [generator.score(*_select(prompts, prompt_of_row, responses, r), width, temperature) for r in rows]
        return TokenScores(torch.cat([p.logprobs for p in parts]), torch.cat([p.entropy for p in parts]))

    def reference_logprobs(self, prompts, prompt_of_row, responses, rows: Sequence[range], width: int,
                           temperature: float) -> torch.Tensor:
        """Log-probs [B, width] of given answers under the frozen starting model."""
        parts = []
        for r in rows:
            selected = _select(prompts, prompt_of_row, responses, r)
            logprobs, _ = self.reference.scores(self.builder.build(*selected), temperature)
            parts.append(scatter_rows(logprobs, [len(response) for response in selected[2]], width))
        return torch.cat(parts)

    def update(self, prompts, prompt_of_row, responses, rows: Sequence[range], loss: MicroBatchLoss,
               temperature: float, lr: float) -> tuple[float, float]:
        """One optimiser step on all micro-batches ``rows``; returns (loss, gradient norm before clipping)."""
        def build(i: int) -> ModelInputs:
            return self.builder.build(*_select(prompts, prompt_of_row, responses, rows[i]))

        value = self.engine.forward_backward(len(rows), build, loss, temperature)
        norm = self.engine.step(lr)
        self._copy_is_current = False
        return value, norm

    def take_dropped_mass(self) -> float:
        """Probability that the backwards since the last call left out, summed over all tokens and all ranks."""
        head = self.engine.stage.head
        mass = self.context.sum_over_data(head.dropped_mass.to(self.context.device).float())
        if self.context.tp_size > 1:
            dist.all_reduce(mass, group=self.context.tp_group)  # each rank counts its own rows of the vocabulary
        head.dropped_mass.zero_()
        return float(mass)

    def load(self, folder: Path) -> None:
        """Restore weights and optimiser state from a checkpoint's folder."""
        self.engine.load(folder)
        self._copy_is_current = False

    def export_hf(self, out_dir: Path) -> None:
        """Write the trained model as a Hugging Face checkpoint like the one it started from; all ranks call it."""
        tensors = self._hf_tensors()
        if self.context.rank == 0:
            write_checkpoint(out_dir, tensors, self.model.checkpoint)
        else:
            for _ in tensors:  # the gathers are collective
                pass
        dist.barrier()

    def _hf_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        weight_map = self.model.weight_map(self.context.tp_size)
        for name, shard in self.engine.weights():
            entry = weight_map[name]
            shards = [shard]
            if entry.axis is not None and self.context.tp_size > 1:
                shards = [torch.empty_like(shard) for _ in range(self.context.tp_size)]
                dist.all_gather(shards, shard.contiguous(), group=self.context.tp_group)
            yield from entry.to_hf(shards).items()


def _select(prompts, prompt_of_row, responses, rows: range):
    """The rows of a micro-batch with just the prompts they answer, so that each image is encoded once."""
    used = sorted({prompt_of_row[b] for b in rows})
    place = {p: i for i, p in enumerate(used)}
    return [prompts[p] for p in used], [place[prompt_of_row[b]] for b in rows], [responses[b] for b in rows]
