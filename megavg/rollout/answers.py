"""Answers that are being written to a group of prompts, as one pipeline stage sees them."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import nn

from megavg.models.inputs import InputBuilder
from megavg.models.layers.mrope import next_position
from megavg.ops.chance import uniforms
from megavg.protocols.batch import EncodedPrompt
from megavg.protocols.options import SamplingParams
from megavg.rollout.kv_cache import SharedPrefixCache


class Answers:
    """``num_answers`` answers to each of P prompts, rows = P * num_answers; every stage holds the same tokens.

    Answer g of a prompt, numbered from ``first``, draws its chance from the name ``streams[p]/g``.

    Attributes:
        tokens: [rows, max_new_tokens] int64, drawn so far.
        logprobs: same shape, fp32, known on the last stage only.
        lengths: [rows], tokens of each answer so far, the end token included.
        running: [rows] bool, True until an end token was drawn.
    """

    def __init__(self, stage: nn.Module, builder: InputBuilder, prompts: Sequence[EncodedPrompt], num_answers: int,
                 params: SamplingParams, streams: Sequence[str], device: torch.device, first: int = 0):
        self._stage, self._builder, self._prompts, self._num_answers = stage, builder, prompts, num_answers
        self._limit, rows = params.max_new_tokens, len(prompts) * num_answers
        self._noise = torch.stack([uniforms(f"{stream}/{g}", self._limit) for stream in streams
                                   for g in range(first, first + num_answers)]).to(device)
        self._prompt_lengths = torch.tensor([len(prompt.input_ids) for prompt in prompts], device=device)
        self._positions = torch.tensor([[next_position(builder.positions(prompt))] for prompt in prompts],
                                       device=device).repeat_interleave(num_answers, 0)
        self._cache = SharedPrefixCache(self._prompt_lengths, num_answers, self._limit)
        self._num_drawn = 0
        self.tokens = torch.full((rows, self._limit), builder.pad_token_id, device=device)
        self.logprobs = torch.zeros(rows, self._limit, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.running = torch.ones(rows, dtype=torch.bool, device=device)
        self.wants_more = True

    @property
    def responses(self) -> list[list[int]]:
        """The tokens of each answer."""
        return [row[:n] for row, n in zip(self.tokens.tolist(), self.lengths.tolist())]

    @property
    def next_noise(self) -> torch.Tensor:
        """[rows] numbers in [0, 1) that the next tokens are drawn with."""
        return self._noise[:, self._num_drawn]

    def wants(self, t: int) -> bool:
        """Whether token ``t`` of some answer is to be drawn, asked before it is."""
        return self.wants_more and t == self._num_drawn

    def hidden_buffer(self, t: int, dtype: torch.dtype) -> torch.Tensor:
        """Room for the hidden states that this stage receives for token ``t``."""
        rows, length = (self.tokens.shape[0], 1) if t else (len(self._prompts), int(self._prompt_lengths.max()))
        return torch.empty(rows, length, self._stage.hidden_size, dtype=dtype, device=self.tokens.device)

    def advance(self, t: int, received: torch.Tensor | None) -> torch.Tensor:
        """This stage's part of token ``t``: the prompts for the first one, else the token before it.

        Returns what the next stage receives, or on the last stage the hidden states to draw from [rows, D].
        """
        hidden = self._step(t, received) if t else self._prefill(received)
        if not self._stage.has_head:
            return hidden
        if t:
            return hidden[:, 0]
        last = hidden[torch.arange(len(self._prompts), device=hidden.device), self._prompt_lengths - 1]
        return last.repeat_interleave(self._num_answers, 0)

    def token_buffer(self) -> torch.Tensor:
        """Room for one token of every answer."""
        return torch.empty_like(self.lengths)

    def record(self, token: torch.Tensor, end_token_ids: torch.Tensor, logprob: torch.Tensor | None = None) -> None:
        """Take the tokens [rows] that were drawn; those of ended answers are dropped."""
        t = self._num_drawn
        self.tokens[:, t] = torch.where(self.running, token, self.tokens[:, t])
        if logprob is not None:
            self.logprobs[:, t] = torch.where(self.running, logprob, 0.0)
        self.lengths += self.running
        self.running = self.running & ~torch.isin(token, end_token_ids)
        self._num_drawn += 1
        self.wants_more = self._num_drawn < self._limit and bool(self.running.any())

    def _prefill(self, x: torch.Tensor | None) -> torch.Tensor:
        count = len(self._prompts)
        inputs = self._builder.build(self._prompts, range(count), [[]] * count, packed=False)
        deepstack = []
        if self._stage.has_embedding:
            x, deepstack = self._stage.embed(inputs.input_ids, inputs.pixel_values, inputs.image_grid_thw,
                                             inputs.feature_index)
        return self._stage.decode(x, inputs.position_ids, self._cache.prefill, deepstack)

    def _step(self, t: int, x: torch.Tensor | None) -> torch.Tensor:
        if self._stage.has_embedding:
            x = self._stage.embedding(self.tokens[:, t - 1:t])
        positions = (self._positions + t - 1).expand(3, -1, 1)
        hidden = self._stage.decode(x, positions, self._cache.step)
        self._cache.advance()
        return hidden
