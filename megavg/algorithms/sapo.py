"""SAPO [reported] (Soft Adaptive Policy Optimization, arXiv 2511.20347): a smooth gate in place of the clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megavg.algorithms.base import Algorithm

if TYPE_CHECKING:
    import torch

    from megavg.protocols.batch import PolicySignal, TokenScores


class SAPO(Algorithm):
    """GRPO with f(rho) A, f = 4 / tau * sigmoid(tau (rho - 1)), whose slope is 1 at rho = 1 and fades on both sides.

    tau is tau_positive where A > 0, else tau_negative. [reported]
    """

    mark = "[reported]"

    @dataclass(frozen=True)
    class Config(Algorithm.Config):
        """Options of SAPO beside GRPO's, of which clip_low and clip_high are not used and dual_clip is refused.

        Attributes:
            tau_positive, tau_negative: how fast the gradient fades with the ratio, by the sign of the advantage.
        """

        tau_positive: float = 1.0
        tau_negative: float = 1.05

        def __post_init__(self):
            super().__post_init__()
            if min(self.tau_positive, self.tau_negative) <= 0:
                raise ValueError(f"tau_positive={self.tau_positive}, tau_negative={self.tau_negative} must be above 0")
            if self.dual_clip is not None:
                raise ValueError(f"dual_clip={self.dual_clip} bounds a ratio times an advantage, which sapo does not "
                                 "maximise; leave dual_clip out")

    def surrogate(self, new: TokenScores, signal: PolicySignal) -> torch.Tensor:
        """f(rho) A of every token [B, T]."""
        import torch

        ratio = (new.logprobs - signal.old_logprobs).exp()
        tau = torch.full_like(ratio, self.config.tau_negative)
        tau = tau.masked_fill(signal.advantages > 0, self.config.tau_positive)
        return 4 / tau * (tau * (ratio - 1)).sigmoid() * signal.advantages


ALGORITHM = SAPO
