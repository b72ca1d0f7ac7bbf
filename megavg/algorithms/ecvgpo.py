"""ECVGPO [ours, from the abstract of arXiv 2512.06726]: entropy control by self-information.

The paper reshapes the advantages of positive samples by their self-information I = -log pi_old; its code and formulas
were not available, so this is the project's own definition in its spirit. To first order (arXiv 2505.22617) entropy
changes by -eta Cov(log pi, pi A): more weight on surprising tokens of good answers raises it, less weight lowers it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megavg.algorithms.base import Algorithm

if TYPE_CHECKING:
    import torch

    from megavg.protocols.batch import RolloutBatch, TokenScores


class ECVGPO(Algorithm):
    """GRPO whose positive advantages are weighted by w(I); alpha < 0 lowers entropy, alpha > 0 raises it. [ours]

    Where A > 0: A' = A w / m, with w = clip(1 + alpha (I - Ibar) / (Ibar + eps), w_min, w_max) for the linear form and
    eps the option information_eps, Ibar the mean of I over the positive tokens of the whole optimiser batch, and
    m = sum(A w) / sum(A) over them, so that the sum of positive advantages stays as it was. Elsewhere A' = A. I is
    detached. alpha = 0 is GRPO bit for bit.
    """

    mark = "[ours]"

    @dataclass(frozen=True)
    class Config(Algorithm.Config):
        """Options of ECVGPO beside GRPO's.

        Attributes:
            alpha: strength and sign of the control.
            form: ``linear``, ``power`` (I / Ibar)^alpha or ``exponential`` exp(alpha I).
            level: weigh each ``token`` by its own I, a ``sequence`` by its mean I, or only the digit tokens of the
                boxes (``answer``).
            w_min, w_max: bounds of the weight before it is normalised.
            normalize: keep the sum of positive advantages.
            information_eps: nats, keeps the divisions by Ibar finite.
            target_entropy: closes the loop (nats): alpha moves by kappa (target - entropy) each step; None leaves it.
            kappa, alpha_max: gain and bound of that loop.
        """

        alpha: float = -0.25
        form: Literal["linear", "power", "exponential"] = "linear"
        level: Literal["token", "sequence", "answer"] = "token"
        w_min: float = 0.5
        w_max: float = 2.0
        normalize: bool = True
        information_eps: float = 1e-6
        target_entropy: float | None = None
        kappa: float = 0.05
        alpha_max: float = 0.5

        def __post_init__(self):
            super().__post_init__()
            if not 0 <= self.w_min <= 1 <= self.w_max:
                raise ValueError(f"expected w_min <= 1 <= w_max, got w_min={self.w_min}, w_max={self.w_max}")

    def __init__(self, config: Config):
        super().__init__(config)
        self.alpha = config.alpha

    def advantages(self, batch: RolloutBatch, stats: TokenScores) -> torch.Tensor:
        """GRPO's advantages, reshaped where they are positive; also moves alpha when the loop is closed."""
        advantages = super().advantages(batch, stats)
        chosen = batch.mask & (advantages > 0)
        if self.config.level == "answer":
            if batch.answer_mask is None:
                raise ValueError("algorithm.level=answer needs the digit tokens of the answers, which this batch lacks")
            chosen = chosen & batch.answer_mask
        weight = self._weight(batch, -stats.logprobs.detach(), chosen)
        self._record(batch, weight, chosen)
        if self.config.normalize:
            mass, weighted = self._sums(batch, advantages * chosen, advantages * weight * chosen)
            weight = weight * (mass / weighted).where(weighted > 0, 1.0)  # nothing to keep where no mass is left
        reshaped = (advantages * weight).where(chosen, advantages)
        self._close_loop(batch, stats)
        return reshaped

    def state_dict(self) -> dict:
        return super().state_dict() | {"alpha": self.alpha}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.alpha = state["alpha"]

    def _weight(self, batch: RolloutBatch, information: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """w(I) of every token [B, T], before normalisation."""
        config = self.config
        if config.level == "sequence":
            mean = (information * batch.mask).sum(1, keepdim=True) / batch.mask.sum(1, keepdim=True).clamp_min(1)
            information = mean.expand_as(information)
        total, count = self._sums(batch, information * chosen, chosen.to(information.dtype))
        mean = total / count.clamp_min(1)
        if config.form == "linear":
            weight = 1 + self.alpha * (information - mean) / (mean + config.information_eps)
        elif config.form == "power":
            weight = (information.clamp_min(config.information_eps) / (mean + config.information_eps)) ** self.alpha
        else:
            weight = (self.alpha * information).exp()
        return weight.clamp(config.w_min, config.w_max)

    @staticmethod
    def _sums(batch: RolloutBatch, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over the whole optimiser batch, all ranks, in one call."""
        both = first.new_empty(2)
        both[0], both[1] = first.sum(), second.sum()
        total = batch.all_sum(both)
        return total[0], total[1]

    def _record(self, batch: RolloutBatch, weight: torch.Tensor, chosen: torch.Tensor) -> None:
        """Log alpha, the mean of w before it is normalised, and the share of chosen tokens whose w hit a bound."""
        import torch

        at_bound = chosen & ((weight <= self.config.w_min) | (weight >= self.config.w_max))
        sums = torch.stack([x.sum().to(weight.dtype) for x in (chosen, weight * chosen, at_bound)])
        count, total, bounded = batch.all_sum(sums).tolist()
        self.metrics |= {"ecvgpo/alpha": self.alpha, "ecvgpo/weight_mean": total / max(count, 1.0),
                         "ecvgpo/weight_at_bounds": bounded / max(count, 1.0)}

    def _close_loop(self, batch: RolloutBatch, stats: TokenScores) -> None:
        config = self.config
        if config.target_entropy is None:
            return
        total, count = self._sums(batch, stats.entropy.detach() * batch.mask, batch.mask.to(stats.entropy.dtype))
        moved = self.alpha + config.kappa * (config.target_entropy - float(total / count.clamp_min(1)))
        self.alpha = min(max(moved, -config.alpha_max), config.alpha_max)


ALGORITHM = ECVGPO
