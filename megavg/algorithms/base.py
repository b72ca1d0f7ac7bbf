"""What an algorithm is: a handful of methods whose defaults are GRPO; a method overrides only what it changes.

Adding one is a file: a module here (or anywhere, named with dots) that defines a subclass of ``Algorithm`` under the
name ``ALGORITHM``. The trainer is blind to which one runs. Modules of this room import torch only inside functions, so
that a typo in an option is answered before torch is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    import torch

    from megavg.protocols.batch import PolicySignal, RolloutBatch, TokenScores


class Algorithm:
    """GRPO with its usual options [exact].

    Per token, maximised: min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) - kl_coefficient * KL(k3), with
    rho = pi / pi_old and A the advantage of the whole answer inside its group.

    Attributes:
        mark: where the definition comes from: [exact], [reported] or [ours].
        uses_rollouts: False for methods that learn from written answers.
        metrics: numbers of the last batch for the log.
    """

    mark: ClassVar[str] = "[exact]"
    uses_rollouts: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Config:
        """Options of every method.

        Attributes:
            clip_low, clip_high: how far the ratio may move from 1.
            kl_coefficient: weight of the KL to the starting model (beta); 0 keeps no reference model.
            entropy_coefficient: weight of the mean entropy, which is maximised when positive.
            aggregation: ``response_mean`` is the mean over answers of the mean over tokens (GRPO), ``token_mean`` the
                mean over all valid tokens of the optimiser batch (DAPO).
            normalize_std: divide a group's advantages by their standard deviation.
            std_eps: added to that deviation.
        """

        clip_low: float = 0.2
        clip_high: float = 0.2
        kl_coefficient: float = 0.0
        entropy_coefficient: float = 0.0
        aggregation: Literal["response_mean", "token_mean"] = "response_mean"
        normalize_std: bool = True
        std_eps: float = 1e-4

    def __init__(self, config: Config):
        self.config = config
        self.metrics: dict[str, float] = {}

    def advantages(self, batch: RolloutBatch, stats: TokenScores) -> torch.Tensor:
        """Advantage of every token [B, T], detached; ``stats`` are of the behaviour policy."""
        from megavg.ops.grouped import group_advantages

        per_answer = group_advantages(batch.rewards, batch.group_size, self.config.normalize_std, self.config.std_eps)
        return per_answer[:, None] * batch.mask

    def weights(self, batch: RolloutBatch, stats: TokenScores, progress: float) -> torch.Tensor:
        """Weight of every token's loss [B, T]; 0 drops it. ``progress`` runs from 0 to 1 over the training."""
        return batch.mask.float()

    def entropy_coefficient(self, progress: float) -> float:
        """Weight of the mean entropy in the objective; signed."""
        return self.config.entropy_coefficient

    def token_loss(self, new: TokenScores, signal: PolicySignal) -> torch.Tensor:
        """Loss of every token [B, T], to be minimised, not reduced; differentiable to ``new``.

        With pipeline stages it is called on the last one only: state that must survive belongs in ``advantages`` or
        ``weights``, which every rank calls.
        """
        ratio = (new.logprobs - signal.old_logprobs).exp()
        clipped = ratio.clamp(1 - self.config.clip_low, 1 + self.config.clip_high)
        loss = -(ratio * signal.advantages).minimum(clipped * signal.advantages)
        if signal.reference_logprobs is not None:
            difference = signal.reference_logprobs - new.logprobs
            loss = loss + self.config.kl_coefficient * (difference.exp() - difference - 1)
        return loss

    def state_dict(self) -> dict:
        """What must survive a restart, as plain numbers."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of ``state_dict``."""
