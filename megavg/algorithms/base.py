"""What an algorithm is: a handful of methods whose defaults are GRPO; a method overrides only what it changes.

Adding one is a file: a module here (or anywhere, named with dots) that defines a subclass of ``Algorithm`` under the
name ``ALGORITHM``. The trainer is blind to which one runs. Several are joined by "+" (``two_stage+dapo``), the first
one being asked first, so a method calls ``super()`` for what it does not replace. Modules of this room import torch
only inside functions, so that a typo in an option is answered before torch is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    import torch

    from megavg.protocols.batch import PolicySignal, RolloutBatch, TokenScores
    from megavg.protocols.options import Perturbation
    from megavg.protocols.policy import Answer, Explorer


class Algorithm:
    """GRPO with its usual options [exact].

    Per token, maximised: min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) - kl_coefficient * KL(k3), with
    rho = pi / pi_old and A the advantage of the whole answer inside its group.

    A step calls, in this order: ``explore``; ``rewards``, ``advantages``, ``weights``, ``counted_tokens``,
    ``entropy_coefficient`` and ``extra`` once for the optimiser batch, on every rank; ``token_loss`` for each
    micro-batch, on the last pipeline stage only. So state that must survive belongs into the former.

    Attributes:
        mark: where the definition comes from: [exact], [reported] or [ours].
        uses_rollouts: False for methods that learn from written answers.
        metrics: numbers of the last batch for the log; each method updates its own, named ``method/figure``.
    """

    mark: ClassVar[str] = "[exact]"
    uses_rollouts: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Config:
        """Options of every method.

        Attributes:
            clip_low, clip_high: how far the ratio may move from 1.
            dual_clip: where A < 0, the objective of a token is at least dual_clip * A (usually 3); None sets no bound.
            kl_coefficient: weight of the KL to the starting model (beta); 0 keeps no reference model.
            entropy_coefficient: weight of the mean entropy, which is maximised when positive.
            aggregation: ``response_mean`` is the mean over answers of the mean over tokens (GRPO), ``token_mean`` the
                mean over all counted tokens of the optimiser batch (DAPO), ``constant`` the sum over all tokens divided
                by what it would be if every answer had rollout.max_new_tokens (Dr. GRPO).
            normalize_std: divide a group's advantages by their standard deviation.
            std_eps: added to that deviation.
        """

        clip_low: float = 0.2
        clip_high: float = 0.2
        dual_clip: float | None = None
        kl_coefficient: float = 0.0
        entropy_coefficient: float = 0.0
        aggregation: Literal["response_mean", "token_mean", "constant"] = "response_mean"
        normalize_std: bool = True
        std_eps: float = 1e-4

        def __post_init__(self):
            if min(self.clip_low, self.clip_high) < 0:
                raise ValueError(f"clip_low={self.clip_low}, clip_high={self.clip_high} must not be negative")
            if self.dual_clip is not None and self.dual_clip <= 1:
                raise ValueError(f"dual_clip={self.dual_clip} must be above 1")

    def __init__(self, config: Config):
        self.config = config
        self.metrics: dict[str, float] = {}

    @property
    def perturbation(self) -> Perturbation | None:
        """The perturbed images on which the answers are scored a second time (``stats.perturbed``); None for none."""
        return None

    @property
    def resampling_tries(self) -> int:
        """How many further batches of prompts may be drawn to replace groups whose rewards are all equal."""
        return 0

    @property
    def entropy_aggregation(self) -> str:
        """What the mean entropy is a mean over: like the loss, and all tokens where that is no mean."""
        return "token_mean" if self.config.aggregation == "constant" else self.config.aggregation

    def check(self, group_size: int, max_new_tokens: int) -> None:
        """Refuse options that do not fit the rollouts, before anything is loaded.

        Raises:
            ValueError: it names both options.
        """

    def explore(self, explorer: Explorer, progress: float) -> list[list[Answer]]:
        """Sample G answers to each prompt: [P][G]. ``progress`` runs from 0 to 1 over the training."""
        return explorer.sample(explorer.group_size)

    def rewards(self, batch: RolloutBatch) -> torch.Tensor:
        """Rewards [B] that the advantages are made of."""
        return batch.rewards

    def advantages(self, batch: RolloutBatch, stats: TokenScores) -> torch.Tensor:
        """Advantage of every token [B, T], detached; ``stats`` are of the behaviour policy."""
        from megavg.ops.grouped import group_advantages

        per_answer = group_advantages(self.rewards(batch), batch.group_size, self.config.normalize_std,
                                      self.config.std_eps)
        return per_answer[:, None] * batch.mask

    def weights(self, batch: RolloutBatch, stats: TokenScores, advantages: torch.Tensor,
                progress: float) -> torch.Tensor:
        """Weight of every token's loss [B, T], its KL included; 0 drops it."""
        return batch.mask.float()

    def counted_tokens(self, batch: RolloutBatch, weights: torch.Tensor) -> torch.Tensor:
        """The tokens that the mean is taken over [B, T] bool: all valid ones, also those that ``weights`` drop."""
        return batch.mask

    def entropy_coefficient(self, batch: RolloutBatch, stats: TokenScores | None,
                            progress: float) -> float | torch.Tensor:
        """Weight of the mean entropy in the objective; signed; one number, or one an answer [B, 1]."""
        return self.config.entropy_coefficient

    def extra(self, batch: RolloutBatch, stats: TokenScores, advantages: torch.Tensor) -> dict[str, torch.Tensor]:
        """What ``surrogate`` and ``token_loss`` need beside: tensors [B, T] by name, in ``signal.extra``."""
        return {}

    def surrogate(self, new: TokenScores, signal: PolicySignal) -> torch.Tensor:
        """Policy objective of every token [B, T], to be maximised; only one of joined methods may replace it."""
        ratio = (new.logprobs - signal.old_logprobs).exp()
        clipped = ratio.clamp(1 - self.config.clip_low, 1 + self.config.clip_high)
        return (ratio * signal.advantages).minimum(clipped * signal.advantages)

    def token_loss(self, new: TokenScores, signal: PolicySignal) -> torch.Tensor:
        """Loss of every token [B, T], to be minimised, not reduced; differentiable to ``new``; rows are whole."""
        objective = self.surrogate(new, signal)
        if self.config.dual_clip is not None:
            bound = self.config.dual_clip * signal.advantages
            objective = objective.maximum(bound).where(signal.advantages < 0, objective)
        loss = -objective
        if signal.reference_logprobs is not None:
            loss = loss + self.config.kl_coefficient * k3(new.logprobs, signal.reference_logprobs)
        return loss

    def state_dict(self) -> dict:
        """What must survive a restart, as plain numbers."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of ``state_dict``."""


def k3(logprobs: torch.Tensor, other_logprobs: torch.Tensor) -> torch.Tensor:
    """The k3 estimate of KL(pi || other) from tokens of pi: exp(d) - d - 1 with d = log other - log pi; never < 0."""
    difference = other_logprobs - logprobs
    return difference.exp() - difference - 1
