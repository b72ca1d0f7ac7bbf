"""The project's own generator: a plain copy of the model's stages with a key-value cache.

ZeRO-3 would gather every layer for every token; instead the weights are gathered once per rollout phase into this copy.
"""

from __future__ import annotations

import dataclasses
from typing import Callable, Iterable, Sequence

import torch
import torch.distributed as dist

from megavg.models.base import Model, copy_weights
from megavg.models.inputs import InputBuilder
from megavg.parallel.context import ParallelContext
from megavg.parallel.passes import StagePasses
from megavg.parallel.pipeline import StageLink
from megavg.protocols.batch import EncodedPrompt, ModelInputs
from megavg.protocols.options import SamplingParams
from megavg.rollout.answers import Answers
from megavg.rollout.base import Generation
from megavg.rollout.sampling import draw


class NativeGenerator:
    """Generates and scores with the weights it was last given.

    Args:
        prompts_per_pass: prompts that are generated for at once; bounds the cache and the logits of one step.
    """

    def __init__(self, model: Model, builder: InputBuilder, context: ParallelContext, dtype: torch.dtype,
                 end_token_ids: Sequence[int], forbidden_token_ids: Sequence[int], prompts_per_pass: int = 16):
        self.builder, self.context, self.dtype, self.prompts_per_pass = builder, context, dtype, prompts_per_pass
        options = dataclasses.replace(model.options, sequence_parallel=False)  # single tokens do not divide over ranks
        model = dataclasses.replace(model, options=options)
        self.stage = model.build_stage(context, dtype).eval().requires_grad_(False)
        self.link = StageLink(context)
        self._passes = StagePasses(self.stage, self.link, context, dtype)
        self.vocab_size = model.dims.vocab_size
        self.end_token_ids = torch.tensor(end_token_ids, device=context.device)
        self.forbidden = torch.zeros(self.vocab_size, dtype=torch.bool, device=context.device)
        self.forbidden[list(forbidden_token_ids)] = True

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy the trained weights in, one tensor at a time."""
        copy_weights(self.stage, weights)

    @torch.no_grad()
    def generate(self, prompts: Sequence[EncodedPrompt], num_answers: int, params: SamplingParams,
                 streams: Sequence[str], first: int = 0) -> Generation:
        """Sample ``num_answers`` answers per prompt from one prefill of it; every stage gets them all.

        They are numbered from ``first``; the number is part of an answer's chance. The same ``streams`` give the same
        answers whatever the pass size and the layout, up to rounding of logits.
        """
        parts = []
        for start in range(0, len(prompts), self.prompts_per_pass):
            chosen = slice(start, start + self.prompts_per_pass)
            parts += self._generate_pass(prompts[chosen], num_answers, params, streams[chosen], first)
        width = max(int(part.lengths.max()) for part in parts)
        logprobs = torch.cat([part.logprobs[:, :width] for part in parts])
        return Generation([response for part in parts for response in part.responses], self.link.from_last(logprobs),
                          [truncated for part in parts for truncated in part.running.tolist()])

    def score(self, num_scored: Sequence[int], micro_batch: Callable[[int], ModelInputs],
              temperature: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Teacher-force given answers: (log-probs [N], entropies [N]) of each micro-batch, on every stage."""
        return self._passes.scores(self.stage, num_scored, micro_batch, temperature)

    def score_pairs(self, num_scored: Sequence[int], micro_batch: Callable[[int], ModelInputs],
                    temperature: float) -> list[tuple[torch.Tensor, ...]]:
        """Teacher-force answers on clean images, P, and on perturbed ones, Q; on every stage, no gradient.

        Args:
            num_scored: n, the tokens of each micro-batch's answers, counted once.
            micro_batch: its rows are the answers on clean images and then the same answers on perturbed ones.

        Returns:
            (log P, H(P), log Q, H(Q), JSD, KL(P || Q)) of each micro-batch, each [n] fp32, nats.
        """
        return self._passes.scores(self.stage, num_scored, micro_batch, temperature, paired=True)

    def entropy_gradients(self, num_scored: Sequence[int], num_patches: Sequence[int],
                          micro_batch: Callable[[int], ModelInputs], weights: Sequence[torch.Tensor],
                          temperature: float) -> list[torch.Tensor]:
        """The gradient of sum(weights[i] * entropy) to the pixels of each micro-batch i; see ``StagePasses``."""
        return self._passes.entropy_gradients(num_scored, num_patches, micro_batch, weights, temperature)

    def _generate_pass(self, prompts, num_answers: int, params: SamplingParams, streams,
                       first: int) -> list[Answers]:
        """Answer ``prompts`` in as many groups as there are stages, so that every stage has one to work on.

        In tick n stage s does piece n - s; piece j is token j // stages of group j % stages. At the end of a tick
        hidden states go to the next stage and drawn tokens from the last stage to all. So when the first stage takes up
        a group again, its tokens have come back, and every stage sees by itself which answers have ended.
        """
        size, rank = self.context.pp_size, self.context.pp_rank
        per_group = -(-len(prompts) // size)
        groups = [Answers(self.stage, self.builder, prompts[i:i + per_group], num_answers, params,
                          streams[i:i + per_group], self.context.device, first)
                  for i in range(0, len(prompts), per_group)]

        def piece(j: int) -> Answers | None:
            """The group of piece j, or None where there is nothing to do."""
            group = groups[j % size] if j >= 0 and j % size < len(groups) else None
            return group if group is not None and group.wants(j // size) else None

        tick, received = 0, None
        while any(group.wants_more for group in groups):
            mine, tokens, hidden = piece(tick - rank), None, None
            if mine is not None:
                hidden = mine.advance((tick - rank) // size, received)
            # what others have made, as this stage knows before it hears of it
            drawn, following = piece(tick - size + 1), piece(tick + 1 - rank) if rank else None
            if self.context.is_last_stage and mine is not None:
                tokens = self._draw(mine, hidden, params)
            received = following and following.hidden_buffer((tick + 1 - rank) // size, self.dtype)
            self._exchange(hidden, tokens, received, None if self.context.is_last_stage else drawn)
            tick += 1
        self.link.flush()
        return groups

    def _exchange(self, hidden: torch.Tensor | None, tokens: torch.Tensor | None, received: torch.Tensor | None,
                  drawn: Answers | None) -> None:
        """The end of a tick: hand on what this stage made, and take what it needs for the next one.

        ``tokens`` are those that the last stage drew; on the other stages ``drawn`` is the group they belong to.
        """
        last, rank = self.context.pp_size - 1, self.context.pp_rank
        sends, receives = [], []
        if rank == last:
            sends = [(tokens, stage) for stage in range(last)] if tokens is not None else []
        elif hidden is not None:
            sends = [(hidden, rank + 1)]
        if received is not None:
            receives.append((received, rank - 1))
        if drawn is not None:
            tokens = drawn.token_buffer()
            receives.append((tokens, last))
        self.link.exchange(sends, receives)
        if drawn is not None:
            drawn.record(tokens, self.end_token_ids)

    def _draw(self, group: Answers, hidden: torch.Tensor, params: SamplingParams) -> torch.Tensor:
        """Draw the next token of each answer [rows] from the last hidden states [rows, D], and record it."""
        token, logprob = draw(self._logits(hidden), group.next_noise, params, self.forbidden)
        self._agree(token)
        group.record(token, self.end_token_ids, logprob)
        return token

    def _agree(self, token: torch.Tensor) -> None:
        """Take the first tensor-parallel rank's tokens: sums on a GPU may round differently from rank to rank."""
        if self.context.tp_size > 1 and token.is_cuda:
            dist.broadcast(token, dist.get_global_rank(self.context.tp_group, 0), group=self.context.tp_group)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] of one position, gathered from the tensor-parallel ranks."""
        local = self.stage.head.local_logits(hidden)
        if self.context.tp_size == 1:
            return local[:, :self.vocab_size]
        parts = local.new_empty(self.context.tp_size, *local.shape)
        dist.all_gather_into_tensor(parts.view(-1, local.shape[1]), local, group=self.context.tp_group)
        return parts.transpose(0, 1).reshape(local.shape[0], -1)[:, :self.vocab_size]
