"""Draw tokens from logits with one uniform number per token, so that a draw depends on nothing but its own sequence."""

from __future__ import annotations

import torch

from megavg.protocols.options import SamplingParams


def draw(logits: torch.Tensor, noise: torch.Tensor, params: SamplingParams,
         forbidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row.

    Args:
        logits: [B, V] fp32, whole vocabulary.
        noise: [B] in [0, 1), one number per row.
        forbidden: [V] bool, tokens that are never drawn.

    Returns:
        (tokens [B], log-probs [B]): the log-prob under softmax(logits / temperature) over the WHOLE vocabulary, which
        is what the scorer computes; temperature 0 counts as 1 there.
    """
    scaled = logits / params.temperature if params.temperature > 0 else logits
    allowed = scaled.masked_fill(forbidden, -torch.inf)
    if params.temperature == 0:
        tokens = allowed.argmax(-1)
    else:
        tokens = _inverse_cdf(_filtered(allowed.softmax(-1), params), noise)
    logprobs = scaled.gather(1, tokens[:, None])[:, 0] - scaled.logsumexp(-1)
    return tokens, logprobs


def _filtered(probs: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    if params.top_k and params.top_k < probs.shape[1]:
        smallest_kept = probs.topk(params.top_k).values[:, -1:]
        probs = probs.masked_fill(probs < smallest_kept, 0)
    if params.top_p < 1:
        probs = probs / probs.sum(-1, keepdim=True)
        ordered, order = probs.sort(-1, descending=True)
        mass_before = ordered.cumsum(-1) - ordered  # the first token is always kept
        dropped = torch.zeros_like(probs, dtype=torch.bool).scatter(1, order, mass_before >= params.top_p)
        probs = probs.masked_fill(dropped, 0)
    return probs


def _inverse_cdf(probs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    cumulative = probs.double().cumsum(-1)
    point = noise[:, None] * cumulative[:, -1:]
    # right=True skips tokens without probability; the clamp only guards the last rounding
    return torch.searchsorted(cumulative, point, right=True)[:, 0].clamp_max(probs.shape[1] - 1)
