"""The model in all its roles: trained under ZeRO-3, copied for rollout and scoring, frozen as a reference."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist

from megavg.checkpoint.export import hf_tensors
from megavg.checkpoint.hf import write_checkpoint
from megavg.checkpoint.parts import Part, parts_of_run
from megavg.models.base import check_sequence_parallel, copy_weights, load_model
from megavg.models.inputs import scatter_rows
from megavg.parallel.apex import has_nvidia_apex
from megavg.parallel.context import ParallelContext
from megavg.parallel.engine import MicroBatchLoss, ZeroEngine
from megavg.parallel.optimizer import choose_implementation
from megavg.parallel.zero import check_deepspeed
from megavg.parallel.zero_state import LocalState
from megavg.protocols.batch import EncodedPrompt, ModelInputs, PerturbedScores, TokenScores
from megavg.protocols.options import OptimizerConfig, StageOptions, ZeroConfig
from megavg.rollout.native import NativeGenerator
from megavg.trainer.answering import Answering
from megavg.trainer.bad_data import told_to_all
from megavg.trainer.config import ModelConfig


class Policy(Answering):
    """Owns every copy of the model.

    Args:
        with_reference: keep a frozen copy of the starting model, partitioned by ZeRO-3.
        prompts_per_pass: see ``NativeGenerator``.
    """

    def __init__(self, config: ModelConfig, optimizer: OptimizerConfig, zero: ZeroConfig, context: ParallelContext,
                 with_reference: bool, prompts_per_pass: int, options: StageOptions = StageOptions()):
        self.context, self.model = context, load_model(config.path, options)
        self._check(optimizer, zero, options)
        super().__init__(self.model, config, context, prompts_per_pass)
        self.engine = self._engine(zero, optimizer)
        self.reference = self._engine(zero, None) if with_reference else None
        self._copy_is_current = False

    def _check(self, optimizer: OptimizerConfig, zero: ZeroConfig, options: StageOptions) -> None:
        """Refuse what cannot work before anything large is built; every rank comes to the same answer."""
        check_deepspeed()
        if options.sequence_parallel:
            check_sequence_parallel(self.context)
        device = self.context.device.type
        choose_implementation(optimizer.implementation, device, zero.offload_optimizer,
                              device == "cuda" and has_nvidia_apex())
        self.model.check_weights()

    def _engine(self, zero: ZeroConfig, optimizer: OptimizerConfig | None) -> ZeroEngine:
        stage = self.model.build_stage(self.context, self.dtype)
        with told_to_all(self.context):  # a stage reads only its own tensors
            copy_weights(stage, self.model.hf_weights(stage, self.context))
        return ZeroEngine(stage, self.context, self.dtype, zero, optimizer)

    def sync(self) -> NativeGenerator:
        """The generator with the trained weights, which are gathered once after each update."""
        if not self._copy_is_current:
            self.generator.load_weights(self.engine.weights())
            self._copy_is_current = True
        return self.generator

    def score(self, prompts: Sequence[EncodedPrompt], prompt_of_row: Sequence[int], responses: Sequence[Sequence[int]],
              rows: Sequence[range], width: int, temperature: float) -> TokenScores:
        """Log-probs and entropies [B, width] of given answers under the trained weights, without a gradient."""
        return self._scores(self.sync().score, (prompts, prompt_of_row, responses), rows, width, temperature)

    def score_pairs(self, prompts: Sequence[EncodedPrompt], prompt_of_row: Sequence[int],
                    responses: Sequence[Sequence[int]], rows: Sequence[range], width: int, temperature: float,
                    perturbed: Callable[[int], EncodedPrompt]) -> TokenScores:
        """``score``, with ``TokenScores.perturbed``: the same answers to the prompt ``perturbed(b)`` of each row b."""
        def build(i: int) -> ModelInputs:
            chosen, places, answers = _select(prompts, prompt_of_row, responses, rows[i])
            # other stages get no pixels
            others = [perturbed(b) if self.builder.with_images else prompts[prompt_of_row[b]] for b in rows[i]]
            return self.builder.build([*chosen, *others], [*places, *range(len(chosen), len(chosen) + len(others))],
                                      [*answers, *answers])

        lengths = [[len(responses[b]) for b in part] for part in rows]
        found = self.sync().score_pairs([sum(part) for part in lengths], build, temperature)
        logprobs, entropy, *others = _to_rows(found, lengths, width)
        return TokenScores(logprobs, entropy, perturbed=PerturbedScores(*others))

    def entropy_gradients(self, prompts: Sequence[EncodedPrompt], prompt_of_row: Sequence[int],
                          responses: Sequence[Sequence[int]], rows: Sequence[range], weights: torch.Tensor,
                          temperature: float) -> list[torch.Tensor]:
        """The gradient of sum(weights * entropy) to the ``pixel_values`` of each prompt, fp32, on every stage.

        ``weights`` is [B, T]. The generator's copy is differentiated, whose parameters take no gradient.
        """
        used = [sorted({prompt_of_row[b] for b in part}) for part in rows]
        parts = [torch.cat([weights[b, :len(responses[b])] for b in part]) for part in rows]
        found = self.sync().entropy_gradients(
            [part.numel() for part in parts], [sum(prompts[p].pixel_values.shape[0] for p in part) for part in used],
            lambda i: self.builder.build(*_select(prompts, prompt_of_row, responses, rows[i])), parts, temperature)
        gradients = [torch.zeros(prompt.pixel_values.shape) for prompt in prompts]
        for part, gradient in zip(used, found):
            sizes = [prompts[p].pixel_values.shape[0] for p in part]
            for p, piece in zip(part, gradient.cpu().split(sizes)):
                gradients[p] += piece
        return gradients

    def reference_logprobs(self, prompts, prompt_of_row, responses, rows: Sequence[range], width: int,
                           temperature: float) -> torch.Tensor:
        """Log-probs [B, width] of given answers under the frozen starting model."""
        scores = self._scores(self.reference.scores, (prompts, prompt_of_row, responses), rows, width, temperature)
        return scores.logprobs

    def _scores(self, score: Callable, answers: tuple, rows: Sequence[range], width: int,
                temperature: float) -> TokenScores:
        lengths = [[len(answers[2][b]) for b in part] for part in rows]
        found = score([sum(part) for part in lengths],
                      lambda i: self.builder.build(*_select(*answers, rows[i])), temperature)
        return TokenScores(*_to_rows(found, lengths, width))

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
        head = self.engine.stage.head if self.context.is_last_stage else None
        mass = torch.zeros((), device=self.context.device) if head is None else \
            head.dropped_mass.to(self.context.device).float()
        mass = self.context.sum_over_data(mass)
        if self.context.tp_size > 1:
            dist.all_reduce(mass, group=self.context.tp_group)  # each rank counts its own rows of the vocabulary
        if head is not None:
            head.dropped_mass.zero_()
        return float(self.from_last(mass))

    def from_last(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the last pipeline stage knows, on every stage; the others bring the same shape and dtype."""
        return self.engine.link.from_last(tensor)

    def parts(self, states: Iterable[LocalState] | None = None) -> Iterator[Part]:
        """What this rank holds of the model and its optimiser state, as boxes of HF tensors; views.

        ``states`` are those of the engine; None takes them as they are now.
        """
        context, weight_map = self.context, self.model.weight_map(self.context.tp_size)
        tied = self.model.dims.tie_embeddings
        for state in self.engine.state() if states is None else states:
            entry = weight_map[state.name]
            copies = context.tp_size if entry.axis is None else entry.copies
            # a tied model's last stage holds a copy of the embedding, which the first one writes
            owned = context.tp_rank % copies == 0 and not (tied and state.name == "head.weight")
            yield from parts_of_run(entry, state.shape, state.start, state.values, context.tp_size, context.tp_rank,
                                    owned)

    def load(self, read: Callable[[Iterable[Part]], None], optimizer_steps: int) -> None:
        """Restore weights and optimiser state: ``read`` fills the views it is given; all ranks call it."""
        with self.engine.loading(optimizer_steps) as states:
            read(self.parts(states))
        self._copy_is_current = False

    def export_hf(self, out_dir: Path) -> None:
        """Write the trained model as a Hugging Face checkpoint like the one it started from; all ranks call it."""
        tensors = hf_tensors(self.engine.weights(), self.model.weight_map(self.context.tp_size), self.context)
        with told_to_all(self.context):
            try:
                if self.context.rank == 0:
                    write_checkpoint(out_dir, tensors, self.model.checkpoint)
            finally:
                for _ in tensors:  # the gathers are collective, also where the first rank cannot write
                    pass


def _to_rows(found: Sequence[Sequence[torch.Tensor]], lengths: Sequence[Sequence[int]],
             width: int) -> list[torch.Tensor]:
    """Scores [N] of each micro-batch, several kinds of them -> [B, width] of each kind."""
    return [torch.cat([scatter_rows(values, part, width) for values, part in zip(all_values, lengths)])
            for all_values in zip(*found)]


def _select(prompts, prompt_of_row, responses, rows: range):
    """The rows of a micro-batch with just the prompts they answer, so that each image is encoded once."""
    used = sorted({prompt_of_row[b] for b in rows})
    place = {p: i for i, p in enumerate(used)}
    return [prompts[p] for p in used], [place[prompt_of_row[b]] for b in rows], [responses[b] for b in rows]
