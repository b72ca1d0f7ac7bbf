"""What a rollout engine gives back, and the seam it stands behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, Protocol, Sequence

import torch

from megavg.protocols.batch import EncodedPrompt
from megavg.protocols.options import SamplingParams


@dataclass(frozen=True)
class Generation:
    """Answers, G per prompt, rows by prompt.

    Attributes:
        responses: B lists of token ids, each up to and including its end token (or cut at the limit).
        logprobs: [B, T] fp32, under the whole vocabulary at the sampling temperature; 0 on padding.
        truncated: B flags, True where the limit came before an end token.
    """

    responses: list[list[int]]
    logprobs: torch.Tensor
    truncated: list[bool]


class Generator(Protocol):
    """A rollout engine: takes weights, then generates."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take this rank's tensor-parallel shard of every parameter, one at a time."""

    def generate(self, prompts: Sequence[EncodedPrompt], num_answers: int, params: SamplingParams,
                 streams: Sequence[str], first: int = 0) -> Generation:
        """Answers ``first`` to ``first + num_answers - 1`` of each prompt; ``streams[p]/g`` names answer g's chance."""
