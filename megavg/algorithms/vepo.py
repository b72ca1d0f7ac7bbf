"""VEPO [exact] (arXiv 2606.03937): learn only from the tokens that look at the image.

The same answers are scored twice by the old policy: P on the image, Q on a perturbed one. Tokens whose distribution
changes and which are uncertain at once are anchored in the image; the others keep their advantage but are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megavg.algorithms.base import Algorithm
from megavg.protocols.options import Perturbation

if TYPE_CHECKING:
    import torch

    from megavg.protocols.batch import RolloutBatch, TokenScores


class VEPO(Algorithm):
    """GRPO on the top ceil(keep * T) tokens of each answer, by divergence under perturbation times entropy. [exact]

    j = JSD(P, Q), d = |H(Q) - H(P)|, h = H(P), each min-max normalised over the valid tokens of its answer; the score
    is [1 - (1 - j)^a (1 - d)^(1 - a)] h. Equal scores go by position, the earlier first. The loss is the mean over the
    selected tokens. The noise is drawn afresh for each answer, where the released code lets it pile up.
    """

    mark = "[exact]"

    @dataclass(frozen=True)
    class Config(Algorithm.Config):
        """Options of VEPO beside GRPO's; the mean is over tokens and the entropy bonus 1e-3, as published.

        Attributes:
            keep: share of each answer's tokens that is selected, rounded up.
            divergence_share: the paper's a: the weight of the divergence against the gap of the entropies.
            score: D is the published one, the others its ablations: A 1-(1-j)(1-h)(1-d); B (1-(1-j)(1-h)) d; C is D
                with only the positive part of H(Q) - H(P); E is D without the factor h; F (1-(a(1-j)+(1-a)(1-d))) h;
                G j d h; H is D with KL(P||Q) in place of JSD.
            take: ``bottom`` selects the lowest scores instead, as a control.
            selected_bonus: None trains on the selected tokens alone; a number trains on all, the selected ones with
                weight 1 + selected_bonus.
            perturbation: of the images that Q sees.
        """

        aggregation: Literal["response_mean", "token_mean", "constant"] = "token_mean"
        entropy_coefficient: float = 1e-3
        keep: float = 0.2
        divergence_share: float = 0.7
        score: Literal["A", "B", "C", "D", "E", "F", "G", "H"] = "D"
        take: Literal["top", "bottom"] = "top"
        selected_bonus: float | None = None
        perturbation: Perturbation = Perturbation()

        def __post_init__(self):
            super().__post_init__()
            if not 0 < self.keep <= 1:
                raise ValueError(f"keep={self.keep} must be in (0, 1]")
            if not 0 <= self.divergence_share <= 1:
                raise ValueError(f"divergence_share={self.divergence_share} must be in 0..1")
            if self.selected_bonus is not None and self.selected_bonus < 0:
                raise ValueError(f"selected_bonus={self.selected_bonus} must not be negative; null trains on the "
                                 "selected tokens alone")

    @property
    def perturbation(self) -> Perturbation | None:
        return self.config.perturbation

    def weights(self, batch: RolloutBatch, stats: TokenScores, advantages: torch.Tensor,
                progress: float) -> torch.Tensor:
        """1 on selected tokens and 0 elsewhere, or 1 + selected_bonus and 1, times what another method says."""
        selected = self._selected(batch, stats)
        self._record(batch, stats, selected)
        bonus = self.config.selected_bonus
        factor = selected.float() if bonus is None else 1 + bonus * selected.float()
        return super().weights(batch, stats, advantages, progress) * factor

    def counted_tokens(self, batch: RolloutBatch, weights: torch.Tensor) -> torch.Tensor:
        """The tokens that are trained on; all valid ones when the selected ones only weigh more."""
        counted = super().counted_tokens(batch, weights)
        return counted & (weights > 0) if self.config.selected_bonus is None else counted

    def _scores(self, batch: RolloutBatch, stats: TokenScores) -> torch.Tensor:
        """Score of every token [B, T]; anything on padding."""
        other, a = stats.perturbed, self.config.divergence_share
        if other is None:
            raise ValueError("vepo needs the answers' scores on perturbed images (stats.perturbed), which are missing")
        gap = other.entropy - stats.entropy.detach()
        j = _min_max(other.kl if self.config.score == "H" else other.jsd, batch.mask)
        d = _min_max(gap.clamp_min(0) if self.config.score == "C" else gap.abs(), batch.mask)
        h = _min_max(stats.entropy.detach(), batch.mask)
        formulas = {"A": lambda: 1 - (1 - j) * (1 - h) * (1 - d), "B": lambda: (1 - (1 - j) * (1 - h)) * d,
                    "E": lambda: 1 - (1 - j) ** a * (1 - d) ** (1 - a),
                    "F": lambda: (1 - (a * (1 - j) + (1 - a) * (1 - d))) * h, "G": lambda: j * d * h}
        # C and H differ from D in j and d alone
        return formulas.get(self.config.score, lambda: formulas["E"]() * h)()

    def _selected(self, batch: RolloutBatch, stats: TokenScores) -> torch.Tensor:
        """[B, T] bool, True on the selected tokens: at least one of every answer that has any."""
        import torch

        from megavg.ops.selection import share_of

        lowest = self.config.take == "bottom"
        scores = self._scores(batch, stats).masked_fill(~batch.mask, torch.inf if lowest else -torch.inf)
        places = scores.argsort(dim=1, descending=not lowest, stable=True).argsort(dim=1)
        return (places < share_of(self.config.keep, batch.mask.sum(1, keepdim=True))) & batch.mask

    def _record(self, batch: RolloutBatch, stats: TokenScores, selected: torch.Tensor) -> None:
        """Log the share of selected tokens, the means of JSD and |H(Q) - H(P)|, and JSD's over selected tokens."""
        import torch

        jsd, gap = stats.perturbed.jsd, (stats.perturbed.entropy - stats.entropy).abs()
        sums = [x.double().sum() for x in (batch.mask, selected, jsd * batch.mask, gap * batch.mask, jsd * selected)]
        valid, chosen, jsd_sum, gap_sum, jsd_chosen = batch.all_sum(torch.stack(sums)).tolist()
        self.metrics |= {"vepo/selected_share": chosen / max(valid, 1.0), "vepo/jsd_mean": jsd_sum / max(valid, 1.0),
                         "vepo/gap_mean": gap_sum / max(valid, 1.0), "vepo/jsd_selected": jsd_chosen / max(chosen, 1.0)}


def _min_max(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(x - min) / max(max - min, 1e-8) over the valid tokens of each row; 0 on padding."""
    import torch

    low = values.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    high = values.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    return ((values - low) / (high - low).clamp_min(1e-8)).masked_fill(~mask, 0.0)


ALGORITHM = VEPO
