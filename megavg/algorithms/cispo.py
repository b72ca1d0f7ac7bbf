"""CISPO [exact] (MiniMax-M1, arXiv 2506.13585): clip the importance weight, not the token's gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megavg.algorithms.base import Algorithm

if TYPE_CHECKING:
    import torch

    from megavg.protocols.batch import PolicySignal, TokenScores


class CISPO(Algorithm):
    """REINFORCE with a bounded importance weight: sg[min(rho, ratio_max)] A log pi of every token. [exact]

    Every token keeps a gradient. clip_low and clip_high have no meaning here.
    """

    @dataclass(frozen=True)
    class Config(Algorithm.Config):
        """Options of CISPO beside GRPO's, of which clip_low and clip_high are not used and dual_clip is refused.

        Attributes:
            ratio_max: largest importance weight.
        """

        aggregation: Literal["response_mean", "token_mean", "constant"] = "token_mean"
        ratio_max: float = 5.0

        def __post_init__(self):
            super().__post_init__()
            if self.ratio_max < 1:
                raise ValueError(f"ratio_max={self.ratio_max} must be at least 1")
            if self.dual_clip is not None:
                raise ValueError(f"dual_clip={self.dual_clip} bounds a ratio times an advantage, which cispo does not "
                                 "maximise; leave dual_clip out")

    def surrogate(self, new: TokenScores, signal: PolicySignal) -> torch.Tensor:
        """sg[min(rho, ratio_max)] A log pi of every token [B, T]."""
        weight = (new.logprobs - signal.old_logprobs).exp().clamp_max(self.config.ratio_max).detach()
        return weight * signal.advantages * new.logprobs


ALGORITHM = CISPO
