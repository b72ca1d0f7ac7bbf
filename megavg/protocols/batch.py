"""Tensors that cross rooms. Every shape and unit is defined here.

Legend of shapes: P prompts on this data-parallel rank, G answers per prompt, B = P * G rollouts, T response tokens,
S tokens of prompt and response, V vocabulary, Vs this rank's rows of it, D hidden width, N scored tokens.
Rows are ordered by prompt: rollout b answers prompt b // G. Natural logarithms, entropies in nats.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Callable, Sequence

import torch

from megavg.protocols.sample import Frame

IGNORE = -100
"""Target id of a position that is not scored."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A question about one image, several or none, as the model reads it.

    Attributes:
        input_ids: prompt tokens, image tokens expanded.
        pixel_values: [num_patches, channels * temporal * patch * patch] fp32, normalised; images one after the other.
        image_grid_thw: patches along time, height and width of each image.
        frame: the coordinates of the LAST image that the model's family writes; None without an image.
    """

    input_ids: list[int]
    pixel_values: torch.Tensor
    image_grid_thw: tuple[tuple[int, int, int], ...]
    frame: Frame | None


@dataclass(frozen=True)
class ModelInputs:
    """One micro-batch for the model.

    Attributes:
        input_ids: [B, S] int64, padded on the right. Attention is causal, so padding is never seen by real tokens.
            With ``row_lengths`` it is [1, S] instead: sequences laid end to end, without padding.
        position_ids: [3, B, S] int64, mrope positions (time, height, width).
        target_ids: [B, S] int64, the token that position s has to predict, IGNORE where nothing is scored.
        pixel_values: [num_patches, C] in the model's dtype; an image that several rows share comes once. Without any
            image a small dummy, so that the vision tower runs on every rank alike.
        image_grid_thw: [num_images, 3] int64.
        feature_index: [num_image_tokens] int64; for each image token, rows first, which of the image features
            (those of all images one after the other) stands there.
        row_lengths: lengths of the packed sequences, or None.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    target_ids: torch.Tensor
    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor
    feature_index: torch.Tensor
    row_lengths: tuple[int, ...] | None = None

    def as_kwargs(self) -> dict:
        return dict(self.__dict__)


@dataclass(frozen=True)
class TokenScores:
    """What the vocabulary op says of each scored token, fp32 and differentiable.

    Attributes:
        logprobs: [N] or [B, T], log pi(token), nats; self-information is its negative.
        entropy: same shape, Shannon entropy of the whole next-token distribution, nats.
        top_ids: same shape, int64, the most likely token; None unless asked for, like all that follow. No gradient.
        top_logprobs: its log-prob, nats.
        sum_squares: sum of p^2 over the vocabulary.
        dropped_mass: probability of the blocks of THIS RANK's vocabulary rows that the backward leaves out.
        perturbed: the same answers on perturbed images, where an algorithm asked for them.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None
    sum_squares: torch.Tensor | None = None
    dropped_mass: torch.Tensor | None = None
    perturbed: PerturbedScores | None = None


@dataclass(frozen=True)
class PerturbedScores:
    """Q, the next-token distributions of the same answers on perturbed images, beside P on the clean ones.

    Each [N] or [B, T], fp32, without a gradient.

    Attributes:
        logprobs: log Q(token), nats.
        entropy: H(Q), nats.
        jsd: Jensen-Shannon divergence of P and Q, nats, in 0..log 2.
        kl: KL(P || Q), nats.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor
    jsd: torch.Tensor
    kl: torch.Tensor


@dataclass(frozen=True)
class PairScores:
    """How far two distributions P and Q over the vocabulary are apart; each [N] fp32, nats.

    Attributes:
        jsd: Jensen-Shannon divergence, in 0..log 2; differentiable.
        entropy_gap: H(P) - H(Q); differentiable.
        entropy_p, entropy_q: H(P) and H(Q); no gradient of their own, like all that follow.
        kl: KL(P || Q).
        logprobs_p, logprobs_q: log P and log Q of the targets; None where none were given.
    """

    jsd: torch.Tensor
    entropy_gap: torch.Tensor
    entropy_p: torch.Tensor
    entropy_q: torch.Tensor
    kl: torch.Tensor
    logprobs_p: torch.Tensor | None = None
    logprobs_q: torch.Tensor | None = None


FORMAT, THINK, DIGITS = 0, 1, 2
"""Kinds of answer tokens: what is neither of the others, those between <think> and </think>, coordinates' digits."""


@dataclass
class RolloutBatch:
    """Answers of this data-parallel rank with their rewards, as an algorithm sees them.

    Whatever is taken over the whole optimiser batch goes through ``all_sum`` and ``all_gather``, so that it never
    depends on the layout.

    Attributes:
        response_ids: [B, T] int64, padded on the right.
        mask: [B, T] bool, True on valid tokens: up to and including the first end token.
        rewards: [B] fp32.
        group_size: G.
        answer_mask: [B, T] bool, True on digit tokens (the coordinates of the boxes).
        all_sum: sums a tensor over the data-parallel ranks.
        all_gather: concatenates the ranks' vectors [n], which may differ in length.
        token_kinds: [B, T] int8, FORMAT, THINK or DIGITS.
        noisy: [B] bool, True where the sample says that its label is noise; None where no sample of the batch says.
        max_new_tokens: the longest answer there can be.
        streams: name of each rollout's chance, which depends on (seed, step, sample, answer).
    """

    response_ids: torch.Tensor
    mask: torch.Tensor
    rewards: torch.Tensor
    group_size: int
    answer_mask: torch.Tensor | None = None
    all_sum: Callable[[torch.Tensor], torch.Tensor] = field(default=lambda tensor: tensor)
    all_gather: Callable[[torch.Tensor], torch.Tensor] = field(default=lambda tensor: tensor)
    token_kinds: torch.Tensor | None = None
    noisy: torch.Tensor | None = None
    max_new_tokens: int = 0
    streams: Sequence[str] = ()

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of ``values`` [B, T] over the valid tokens of the whole optimiser batch."""
        sums = self.all_sum(torch.stack([(values * self.mask).sum(), self.mask.sum().to(values.dtype)]))
        return sums[0] / sums[1].clamp_min(1)


@dataclass(frozen=True)
class PolicySignal:
    """Everything the loss needs beside the new log-probs; [B, T], detached.

    Attributes:
        advantages: per token, already reshaped by the algorithm.
        coefficients: share of each token in the mean over the whole optimiser batch, 0 on what is not counted.
        weights: what the algorithm multiplies each token's loss by, its KL included; 0 drops it. The entropy bonus
            ignores it.
        old_logprobs: of the behaviour policy.
        reference_logprobs: of the frozen reference, or None.
        mask: bool, True on valid tokens.
        entropy_weights: what each token's entropy is multiplied by in the objective, its share included.
        extra: further tensors that the algorithm gives itself, by name.
    """

    advantages: torch.Tensor
    coefficients: torch.Tensor
    weights: torch.Tensor
    old_logprobs: torch.Tensor
    reference_logprobs: torch.Tensor | None
    mask: torch.Tensor
    entropy_weights: torch.Tensor
    extra: dict[str, torch.Tensor] = field(default_factory=dict)

    def rows(self, start: int, stop: int) -> PolicySignal:
        """The rollouts ``start:stop``."""
        parts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        extra = {name: tensor[start:stop] for name, tensor in parts.pop("extra").items()}
        return PolicySignal(**{name: None if t is None else t[start:stop] for name, t in parts.items()}, extra=extra)
