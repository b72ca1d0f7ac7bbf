"""Small heads with float64 answers, shared by the tests of the vocabulary ops."""

from __future__ import annotations

import math

import torch


def dense(hidden, weight, targets, vocab_size: int | None = None, temperature=1.0, bias=None):
    """(log-prob, entropy), each [N] float64, with all logits stored."""
    logp = dense_log_softmax(hidden, weight, vocab_size, temperature, bias)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def dense_log_softmax(hidden, weight, vocab_size=None, temperature=1.0, bias=None):
    """[N, V] float64."""
    z = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.double()[:, None]
    return (z[:, :vocab_size] / temperature).log_softmax(-1)


def dense_pair(hidden_p, hidden_q, weight, temperature=1.0):
    """(JSD, H(P) - H(Q)), each [N] float64."""
    p, q = (dense_log_softmax(h, weight, None, temperature) for h in (hidden_p, hidden_q))
    m = torch.logaddexp(p, q) - math.log(2)
    jsd = ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1)) / 2
    return jsd, (q.exp() * q).sum(-1) - (p.exp() * p).sum(-1)


def example(num_tokens: int, dim: int, vocab_size: int, dtype=torch.float32, rows: int | None = None,
            scale: float = 1.0):
    """hidden [N, D], weight [rows, D], targets [N], and upstream gradients of log-prob and entropy [2, N].

    Logits have deviation ``scale``, whatever the width.
    """
    generator = torch.Generator().manual_seed(num_tokens + dim + vocab_size)
    hidden = (scale * torch.randn(num_tokens, dim, generator=generator, dtype=torch.float64) / dim**0.5).to(dtype)
    weight = torch.randn(rows or vocab_size, dim, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(vocab_size, (num_tokens,), generator=generator)
    upstream = torch.randn(2, num_tokens, generator=generator, dtype=torch.float64)
    return hidden, weight, targets, upstream


def with_offset(hidden, weight, offset: float):
    """The same head with ``offset`` added to every logit, by one more column of both."""
    one = torch.ones(hidden.shape[0], 1, dtype=hidden.dtype)
    column = torch.full((weight.shape[0], 1), offset, dtype=weight.dtype)
    return torch.cat([hidden, one], 1), torch.cat([weight, column], 1)


def gradients(outputs, inputs, upstream):
    """d(sum of outputs weighted by upstream) / d(inputs)."""
    loss = sum((output.double() * part).sum() for output, part in zip(outputs, upstream))
    return torch.autograd.grad(loss, inputs)


def both_gradients(score, reference, inputs, upstream):
    """Gradients of our (log-prob, entropy) and of the dense float64 ones, to the same inputs."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    return gradients(score(*inputs), inputs, upstream), gradients(reference(*inputs), inputs, upstream)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-300))
