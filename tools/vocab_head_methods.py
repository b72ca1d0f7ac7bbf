"""The ways to compute log-probs and entropies of a head that bench_vocab_head.py compares, each in this project's
words.

A method is ``method(problem) -> Run`` with two functions: ``forward()`` returns (log-probs, entropies or None) without
a gradient; ``both()`` returns (log-probs, entropies or None, dL/dhidden, dL/dweight) for the upstream gradients of the
problem.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F

from megavg.ops import Blocks, HeadOptions, VocabShard, token_scores
from megavg.ops.vocab_torch import project


@dataclass
class Problem:
    """hidden [N, D], weight [V, D], targets [N], and the upstream gradients of log-prob and entropy [N]."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    upstream_logprob: torch.Tensor
    upstream_entropy: torch.Tensor


@dataclass
class Run:
    forward: Callable
    both: Callable


def make_problem(num_tokens: int, width: int, vocab_size: int, dtype: torch.dtype, device: str,
                 peaked: bool) -> Problem:
    """Random rows of logits of deviation 2.2.

    ``peaked``: of deviation 5 with the target 15 to 45 nats above, as after training: most rows are certain (median
    entropy below 0.1 nats), some are not (mean near 1).
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, width, generator=generator)
    weight = torch.randn(vocab_size, width, generator=generator) / width**0.5
    targets = torch.randint(vocab_size, (num_tokens,), generator=generator)
    if peaked:
        lift = 15 + 30 * torch.rand(num_tokens, 1, generator=generator)
        direction = weight[targets]
        hidden = 5 * hidden + lift * direction / direction.square().sum(1, keepdim=True)
    else:
        hidden *= 2.2
    upstream = torch.randn(2, num_tokens, generator=generator) * torch.tensor([[1.0], [0.1]])
    return Problem(hidden.to(device, dtype), weight.to(device, dtype), targets.to(device), *upstream.to(device))


def _with_autograd(problem: Problem, score: Callable) -> Run:
    """A method whose backward is autograd's: ``score(hidden, weight)`` -> (log-probs, entropies or None)."""

    def forward():
        with torch.no_grad():
            return score(problem.hidden, problem.weight)

    def both():
        hidden, weight = problem.hidden.detach().requires_grad_(), problem.weight.detach().requires_grad_()
        logprobs, entropy = score(hidden, weight)
        loss = (logprobs * problem.upstream_logprob).sum()
        if entropy is not None and entropy.requires_grad:
            loss = loss + (entropy * problem.upstream_entropy).sum()
        loss.backward()
        return logprobs.detach(), None if entropy is None else entropy.detach(), hidden.grad, weight.grad

    return Run(forward, both)


def ours(problem: Problem, options: HeadOptions = HeadOptions(), blocks: Blocks | None = None) -> Run:
    """megavg.ops.token_scores."""
    shard = VocabShard.whole(problem.weight.shape[0])

    def score(hidden, weight):
        scores = token_scores(hidden, weight, problem.targets, shard, options=options, blocks=blocks)
        return scores.logprobs, scores.entropy

    return _with_autograd(problem, score)


def ours_cached(problem: Problem) -> Run:
    """The same with room for all of exp(logits) in bf16."""
    return ours(problem, HeadOptions(cache_bytes=2 * problem.hidden.shape[0] * problem.weight.shape[0]))


def ours_tau(problem: Problem) -> Run:
    """The same without blocks of a row that hold less than 1e-5 of its probability."""
    return ours(problem, HeadOptions(skip_mass=1e-5))


def ours_by_torch(problem: Problem) -> Run:
    """The same by the torch backend, where Triton is the default."""
    return ours(problem, HeadOptions(backend="torch"))


def dense(problem: Problem) -> Run:
    """All logits, log-softmax and autograd."""

    def score(hidden, weight):
        logp = F.linear(hidden, weight).float().log_softmax(-1)
        return logp.gather(1, problem.targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    return _with_autograd(problem, score)


def _chunk_gradient(z, logp, p, entropy, targets, a, b):
    """dz of one chunk of rows from its stored softmax."""
    dz = p * (-(a + b * entropy)[:, None] - b[:, None] * logp)
    dz[torch.arange(len(targets), device=z.device), targets] += a
    return dz


def _chunk_scores(problem: Problem, rows: slice, hidden, weight):
    z = project(hidden[rows], weight, torch.float32)
    logp = z.log_softmax(-1)
    p = logp.exp()
    entropy = -(p * logp).sum(-1)
    return z, logp, p, logp.gather(1, problem.targets[rows, None])[:, 0], entropy


def _row_chunks(problem: Problem, height: int) -> list[slice]:
    return [slice(i, i + height) for i in range(0, problem.hidden.shape[0], height)]


def _forward_in_chunks(problem: Problem, height: int) -> Callable:
    def forward():
        parts = [_chunk_scores(problem, rows, problem.hidden, problem.weight)[3:] for rows in
                 _row_chunks(problem, height)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    return forward


def _backward_in_chunks(problem: Problem, height: int, known: Callable | None) -> tuple:
    """Gradients chunk by chunk of rows; the upstream gradients must be known by then."""
    hidden, weight = problem.hidden, problem.weight
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    logprobs, entropies = [], []
    for rows in _row_chunks(problem, height):
        z, logp, p, logprob, entropy = _chunk_scores(problem, rows, hidden, weight)
        dz = _chunk_gradient(z, logp, p, entropy, problem.targets[rows], problem.upstream_logprob[rows],
                             problem.upstream_entropy[rows]).to(hidden.dtype)
        grad_hidden[rows] = dz @ weight
        grad_weight.addmm_(dz.t(), hidden[rows])
        logprobs.append(logprob)
        entropies.append(entropy)
    if known is not None:
        return *known, grad_hidden, grad_weight
    return torch.cat(logprobs), torch.cat(entropies), grad_hidden, grad_weight


def token_chunks(problem: Problem, height: int = 512) -> Run:
    """Chunks of 512 tokens, logits made again in the backward (the scheme of verl's FusedLinearForPPO)."""
    forward = _forward_in_chunks(problem, height)
    return Run(forward, lambda: _backward_in_chunks(problem, height, forward()))


def gradient_in_forward(problem: Problem, height: int = 256) -> Run:
    """Chunks of 256 tokens whose gradient is made in the forward (Liger's scheme): three products."""
    return Run(_forward_in_chunks(problem, height), lambda: _backward_in_chunks(problem, height, None))


class _VocabChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, width):
        n = hidden.shape[0]
        m, s, t = (torch.full((n,), x, device=hidden.device) for x in (-torch.inf, 0.0, 0.0))
        at_target = torch.zeros_like(s)
        for start in range(0, weight.shape[0], width):
            z = project(hidden, weight[start:start + width], torch.float32)
            new = torch.maximum(m, z.amax(1))
            scale, e = (m - new).exp(), (z - new[:, None]).exp()
            s, t, m = s * scale + e.sum(1), t * scale + (e * z).sum(1), new
            hit = ((targets >= start) & (targets < start + width)).nonzero()[:, 0]
            at_target[hit] = z[hit, targets[hit] - start]
        normaliser = m + s.log()
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        ctx.width = width
        entropy = normaliser - t / s
        ctx.mark_non_differentiable(entropy)
        return at_target - normaliser, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, _):
        hidden, weight, targets, normaliser = ctx.saved_tensors
        grad_hidden, grad_weight = torch.zeros_like(hidden, dtype=torch.float32), torch.empty_like(weight)
        for start in range(0, weight.shape[0], ctx.width):
            part = weight[start:start + ctx.width]
            dz = (project(hidden, part, torch.float32) - normaliser[:, None]).exp() * -grad_logprobs[:, None]
            hit = ((targets >= start) & (targets < start + ctx.width)).nonzero()[:, 0]
            dz[hit, targets[hit] - start] += grad_logprobs[hit]
            dz = dz.to(hidden.dtype)
            grad_hidden += dz @ part
            grad_weight[start:start + ctx.width] = dz.t() @ hidden
        return grad_hidden.to(hidden.dtype), grad_weight, None, None


def vocabulary_chunks(problem: Problem) -> Run:
    """All tokens x 8192 columns, online sums, logits made again; no gradient of the entropy (TRL's scheme)."""
    return _with_autograd(problem, lambda h, w: _VocabChunks.apply(h, w, problem.targets, 8192))


def torch_linear_cross_entropy(problem: Problem) -> Run:
    """torch's F.linear_cross_entropy in chunks of 256 tokens: log-probs only."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256)
    return _with_autograd(problem, lambda h, w: (-F.linear_cross_entropy(h, w, problem.targets, reduction="none",
                                                                         options=options), None))


def deepspeed_linear_cross_entropy(problem: Problem) -> Run:
    """DeepSpeed's vocabulary-parallel linear cross-entropy in chunks of 256 tokens: log-probs only."""
    from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy

    return _with_autograd(problem, lambda h, w: (-vocab_parallel_linear_cross_entropy(
        h, w, problem.targets, reduction="none", chunk_size=256), None))


def bare_products(problem: Problem, height: int, columns: int) -> Run:
    """The floor: nothing but the matrix products, one for the forward and three for both, in tiles of a given size."""
    hidden, weight = problem.hidden, problem.weight
    n = hidden.shape[0]
    height = min(height, n)
    tile, dz = hidden.new_empty(height, columns), hidden.new_empty(n, columns)

    def forward():
        for start in range(0, weight.shape[0], columns):
            part = weight[start:start + columns].t()
            for rows in range(0, n, height):
                x = hidden[rows:rows + height]
                torch.mm(x, part, out=tile[:x.shape[0]] if part.shape[1] == columns else None)

    def both():
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.empty_like(weight)
        for start in range(0, weight.shape[0], columns):
            part = weight[start:start + columns]
            block = dz if part.shape[0] == columns else dz[:, :part.shape[0]].contiguous()
            torch.mm(hidden, part.t(), out=block)
            torch.mm(block.t(), hidden, out=grad_weight[start:start + columns])
            grad_hidden.addmm_(block, part)
        return None, None, grad_hidden, grad_weight

    return Run(forward, both)


METHODS = {
    "ours": ours,
    "ours, cached": ours_cached,
    "ours, tau 1e-5": ours_tau,
    "dense": dense,
    "token chunks": token_chunks,
    "gradient in forward": gradient_in_forward,
    "vocabulary chunks": vocabulary_chunks,
    "torch F.linear_cross_entropy": torch_linear_cross_entropy,
    "DeepSpeed linear_cross_entropy": deepspeed_linear_cross_entropy,
    "products, small tiles": lambda problem: bare_products(problem, 512, 1024),
    "products, large tiles": lambda problem: bare_products(problem, 1 << 30, 8192),
}
GPU_METHODS = {"ours, torch backend": ours_by_torch}


def methods_for(device: str) -> dict:
    """The methods that are compared on a device, by name."""
    return METHODS | GPU_METHODS if device == "cuda" else METHODS
