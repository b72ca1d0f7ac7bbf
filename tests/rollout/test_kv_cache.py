"""Attention with the shared-prefix cache equals full attention over each answer's own sequence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megavg.rollout.kv_cache import SharedPrefixCache

LENGTHS, STEPS, DIM = (7, 3, 5), 4, 8


@pytest.mark.parametrize("num_heads, num_kv", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("num_answers", [1, 3])
def test_equals_full_attention(num_heads, num_kv, num_answers):
    torch.manual_seed(0)
    prompts, rows, longest = len(LENGTHS), len(LENGTHS) * num_answers, max(LENGTHS)
    layers = [tuple(torch.randn(prompts, heads, longest, DIM) for heads in (num_heads, num_kv, num_kv))
              for _ in range(2)]
    steps = [[tuple(torch.randn(rows, heads, 1, DIM) for heads in (num_heads, num_kv, num_kv)) for _ in layers]
             for _ in range(STEPS)]
    cache = SharedPrefixCache(torch.tensor(LENGTHS), num_answers, STEPS)
    first = [cache.prefill(i, *qkv) for i, qkv in enumerate(layers)]
    later = []
    for step in steps:
        later.append([cache.step(i, *qkv) for i, qkv in enumerate(step)])
        cache.advance()
    for i, (prompt_q, prompt_k, prompt_v) in enumerate(layers):
        for b in range(rows):
            p, n = b // num_answers, LENGTHS[b // num_answers]
            q, k, v = (torch.cat([prompt[p, :, :n], *(step[i][j][b] for step in steps)], 1)
                       for j, prompt in enumerate((prompt_q, prompt_k, prompt_v)))
            expected = full_attention(q, k, v)
            torch.testing.assert_close(first[i][p, :, :n], expected[:, :n], atol=1e-5, rtol=0)
            ours = torch.cat([out[i][b] for out in later], 1)
            torch.testing.assert_close(ours, expected[:, n:], atol=1e-5, rtol=0)


def full_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention written out: q [Hq, S, d], k and v [Hk, S, d] -> [Hq, S, d]."""
    shared = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return F.softmax(scores.masked_fill(future, -torch.inf), -1) @ v


def test_padding_of_a_prompt_is_never_seen():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, 4, DIM), torch.randn(2, 2, 4, DIM), torch.randn(2, 2, 4, DIM)
    token = torch.randn(2, 2, 1, DIM)
    outputs = []
    for filler in (0.0, 100.0):
        k[1, :, 3], v[1, :, 3] = filler, filler
        cache = SharedPrefixCache(torch.tensor([4, 3]), 1, 1)
        cache.prefill(0, q, k, v)
        outputs.append(cache.step(0, token, token, token))
    assert torch.equal(outputs[0], outputs[1])
