"""The project's own generator: a plain copy of the tensor-parallel model with a key-value cache.

ZeRO-3 would gather every layer for every token; instead the weights are gathered once per rollout phase into this copy.
"""

from __future__ import annotations

from typing import Iterable, Sequence

import torch
import torch.distributed as dist

from megavg.models.base import Model, copy_weights
from megavg.models.inputs import InputBuilder, scatter_rows
from megavg.models.layers.mrope import next_position
from megavg.parallel.context import ParallelContext
from megavg.protocols.batch import EncodedPrompt, TokenScores
from megavg.protocols.options import SamplingParams
from megavg.rollout.base import Generation
from megavg.rollout.kv_cache import SharedPrefixCache
from megavg.rollout.sampling import draw, uniforms


class NativeGenerator:
    """Generates and scores with the weights it was last given.

    Args:
        prompts_per_pass: prompts that are generated for at once; bounds the cache and the logits of one step.
    """

    def __init__(self, model: Model, builder: InputBuilder, context: ParallelContext, dtype: torch.dtype,
                 end_token_ids: Sequence[int], forbidden_token_ids: Sequence[int], prompts_per_pass: int = 16):
        if context.pp_size > 1:
            raise ValueError("generation over pipeline stages is not there yet; set "
                             "parallel.pipeline_model_parallel_size=1")
        self.builder, self.context, self.prompts_per_pass = builder, context, prompts_per_pass
        self.stage = model.build_stage(context, dtype).eval().requires_grad_(False)
        self.vocab_size = model.dims.vocab_size
        self.end_token_ids = torch.tensor(end_token_ids, device=context.device)
        self.forbidden = torch.zeros(self.vocab_size, dtype=torch.bool, device=context.device)
        self.forbidden[list(forbidden_token_ids)] = True

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy the trained weights in, one tensor at a time."""
        copy_weights(self.stage, weights)

    @torch.no_grad()
    def generate(self, prompts: Sequence[EncodedPrompt], num_answers: int, params: SamplingParams,
                 streams: Sequence[str]) -> Generation:
        """Sample ``num_answers`` answers per prompt from one prefill of it.

        The same ``streams`` give the same answers whatever the pass size and the layout, up to rounding of logits.
        """
        passes = [self._generate_pass(prompts[i:i + self.prompts_per_pass], num_answers, params,
                                      streams[i:i + self.prompts_per_pass])
                  for i in range(0, len(prompts), self.prompts_per_pass)]
        width = max(part.logprobs.shape[1] for part in passes)
        logprobs = torch.cat([torch.nn.functional.pad(part.logprobs, (0, width - part.logprobs.shape[1]))
                              for part in passes])
        return Generation([r for part in passes for r in part.responses], logprobs,
                          [t for part in passes for t in part.truncated])

    @torch.no_grad()
    def score(self, prompts: Sequence[EncodedPrompt], prompt_of_row: Sequence[int], responses: Sequence[Sequence[int]],
              width: int, temperature: float) -> TokenScores:
        """Teacher-force given answers: log-probs and entropies [B, width], zeros on padding."""
        inputs = self.builder.build(prompts, prompt_of_row, responses)
        scores = self.stage(**inputs.as_kwargs(), temperature=temperature)
        lengths = [len(response) for response in responses]
        return TokenScores(*(scatter_rows(values, lengths, width) for values in scores))

    def _generate_pass(self, prompts, num_answers: int, params: SamplingParams, streams) -> Generation:
        rows = len(prompts) * num_answers
        noise = torch.stack([uniforms(f"{stream}/{g}", params.max_new_tokens)
                             for stream in streams for g in range(num_answers)]).to(self.context.device)
        hidden, cache, positions = self._prefill(prompts, num_answers, params.max_new_tokens)
        tokens = torch.full((rows, params.max_new_tokens), self.builder.pad_token_id, device=self.context.device)
        logprobs = torch.zeros(rows, params.max_new_tokens, device=self.context.device)
        lengths = torch.zeros(rows, dtype=torch.int64, device=self.context.device)
        running = torch.ones(rows, dtype=torch.bool, device=self.context.device)
        for t in range(params.max_new_tokens):
            token, logprob = draw(self._logits(hidden), noise[:, t], params, self.forbidden)
            self._agree(token)
            tokens[:, t] = torch.where(running, token, tokens[:, t])
            logprobs[:, t] = torch.where(running, logprob, 0.0)
            lengths += running
            running = running & ~torch.isin(token, self.end_token_ids)
            if t + 1 == params.max_new_tokens or not running.any():
                break
            x = self.stage.embedding(tokens[:, t:t + 1])
            hidden = self.stage.decode(x, (positions + t).expand(3, rows, 1), cache.step)[:, 0]
            cache.advance()
        responses = [row[:n] for row, n in zip(tokens.tolist(), lengths.tolist())]
        return Generation(responses, logprobs[:, :int(lengths.max())], running.tolist())

    def _prefill(self, prompts, num_answers: int, max_new_tokens: int):
        """Run the prompts once: (last hidden state per answer [B, D], cache, next position per answer [B, 1])."""
        inputs = self.builder.build(prompts, range(len(prompts)), [[]] * len(prompts))
        lengths = torch.tensor([len(prompt.input_ids) for prompt in prompts], device=self.context.device)
        cache = SharedPrefixCache(lengths, num_answers, max_new_tokens)
        x, deepstack = self.stage.embed(inputs.input_ids, inputs.pixel_values, inputs.image_grid_thw,
                                        inputs.feature_index)
        hidden = self.stage.decode(x, inputs.position_ids, cache.prefill, deepstack)
        last = hidden[torch.arange(len(prompts), device=hidden.device), lengths - 1]
        following = torch.tensor([[next_position(self.builder.positions(prompt))] for prompt in prompts],
                                 device=self.context.device)
        return last.repeat_interleave(num_answers, 0), cache, following.repeat_interleave(num_answers, 0)

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
