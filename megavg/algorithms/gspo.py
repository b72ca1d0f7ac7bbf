"""GSPO [exact] (arXiv 2507.18071): the ratio of a whole answer in place of each token's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megavg.algorithms.base import Algorithm

if TYPE_CHECKING:
    import torch

    from megavg.protocols.batch import PolicySignal, TokenScores


class GSPO(Algorithm):
    """GRPO with s = exp(mean over the answer's tokens of log pi - log pi_old) in place of rho, clipped. [exact]

    For ``ratio_level=token`` (GSPO-token) each token has sg[s] * pi / sg[pi]: the same number, whose gradient goes to
    this token alone. With one advantage and weight an answer both give the same gradient; a method that weighs or
    drops single tokens needs ``token``. Joined with DAPO it goes first, ``gspo+dapo``, as both set the clip.
    """

    @dataclass(frozen=True)
    class Config(Algorithm.Config):
        """Options of GSPO; its defaults of clip_low and clip_high are the paper's, for s.

        Attributes:
            ratio_level: ``sequence`` (GSPO) or ``token`` (GSPO-token).
        """

        clip_low: float = 3e-4
        clip_high: float = 4e-4
        ratio_level: Literal["sequence", "token"] = "sequence"

    def check(self, group_size: int, max_new_tokens: int) -> None:
        """Refuse one ratio for an answer whose tokens another method weighs apart: dropped ones would still learn."""
        super().check(group_size, max_new_tokens)
        if self.config.ratio_level == "sequence" and type(self).weights is not Algorithm.weights:
            raise ValueError("algorithm.ratio_level=sequence gives every token of an answer a gradient, also those "
                             "that a joined method drops; set algorithm.ratio_level=token")

    def surrogate(self, new: TokenScores, signal: PolicySignal) -> torch.Tensor:
        """min(s A, clip(s) A) of every token [B, T]."""
        mask = signal.mask
        moved = (new.logprobs - signal.old_logprobs) * mask
        log_ratio = moved.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
        if self.config.ratio_level == "token":
            log_ratio = log_ratio.detach() + (new.logprobs - new.logprobs.detach()) * mask
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - self.config.clip_low, 1 + self.config.clip_high)
        return (ratio * signal.advantages).minimum(clipped * signal.advantages)


ALGORITHM = GSPO
