"""What an algorithm may ask of the model before the answers of an optimiser batch are complete."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Sequence

if TYPE_CHECKING:
    import torch

    from megavg.protocols.batch import EncodedPrompt, TokenScores
    from megavg.protocols.pixels import PixelLayout


@dataclass(frozen=True)
class Answer:
    """One sampled answer.

    Attributes:
        tokens: its ids, the end token included.
        logprobs: [T] fp32, as reported while sampling, nats.
        truncated: whether the length limit came before an end token.
        on_clean: False when it was sampled from another image than the one that it is scored and trained on.
    """

    tokens: list[int]
    logprobs: torch.Tensor
    truncated: bool
    on_clean: bool = True


class Explorer(Protocol):
    """The behaviour policy with this rank's prompts of one optimiser batch. All of its methods are collective.

    Attributes:
        prompts: P, on the clean images.
        group_size: G, answers wanted for each.
        pixels: how ``pixel_values`` are laid out.
    """

    prompts: Sequence[EncodedPrompt]
    group_size: int
    pixels: PixelLayout

    def sample(self, num_answers: int, first: int = 0,
               prompts: Sequence[EncodedPrompt] | None = None) -> list[list[Answer]]:
        """[P][num_answers] answers, numbered from ``first``; ``prompts`` may bring other images of the same sizes.

        An answer's chance depends on its number: answers 0..G-1 are the same however they are divided over calls.
        """

    def scores(self, answers: Sequence[Sequence[Answer]],
               prompts: Sequence[EncodedPrompt] | None = None) -> tuple[TokenScores, torch.Tensor]:
        """Teacher-force [P][n] answers: (scores [P * n, T], mask [P * n, T] of valid tokens), without a gradient."""

    def entropy_gradients(self, answers: Sequence[Sequence[Answer]], weights: torch.Tensor,
                          prompts: Sequence[EncodedPrompt] | None = None) -> list[torch.Tensor]:
        """The gradient of sum(weights * entropy) to each prompt's ``pixel_values``; ``weights`` is [P * n, T].

        No parameter of the model receives a gradient.
        """

    def generator(self, prompt: int, purpose: str) -> torch.Generator:
        """Chance that depends on the run's seed, the step, the sample and ``purpose`` alone."""
