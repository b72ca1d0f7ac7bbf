"""Keys and values of prompts, kept once per prompt and shared by its G answers, and of the answers themselves."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class SharedPrefixCache:
    """Attention with a cache for P prompts of G answers each; its methods are handed to the model as ``attend``.

    Shapes: Hq / Hk query and key heads of this rank, d head width, S prompt tokens, rows B = P * G.

    Args:
        prompt_lengths: [P]; prompts are padded on the right to S.
        num_answers: G.
        max_new_tokens: room for answers.
    """

    def __init__(self, prompt_lengths: torch.Tensor, num_answers: int, max_new_tokens: int):
        self.num_prompts, self.num_answers = len(prompt_lengths), num_answers
        self.capacity, self.length = max_new_tokens, 0
        positions = torch.arange(int(prompt_lengths.max()), device=prompt_lengths.device)
        self.padding = (positions >= prompt_lengths[:, None])[:, None, None]  # [P, 1, 1, S]
        self.prompt: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.answer: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def prefill(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Causal attention inside the prompts, whose keys and values [P, Hk, S, d] are kept."""
        self.prompt[layer] = (k, v.contiguous())  # a view would keep the projection of all heads alive
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    def step(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """One token of every answer against its prompt and its own past; q [B, Hq, 1, d] -> [B, Hq, 1, d]."""
        rows, num_heads, _, dim = q.shape
        num_kv = k.shape[1]
        shared = num_heads // num_kv
        prompt_k, prompt_v = self.prompt[layer]
        answer_k, answer_v = self._append(layer, k, v)
        q = q.reshape(rows, num_kv, shared, dim) * dim**-0.5

        on_prompt = self._by_prompt(q) @ prompt_k.transpose(2, 3)  # [P, Hk, G * shared, S]
        on_prompt = self._by_row(on_prompt.masked_fill(self.padding, -torch.inf), shared)
        on_answer = q @ answer_k.transpose(2, 3)  # [B, Hk, shared, length + 1]
        weights = torch.cat([on_prompt, on_answer], -1).float().softmax(-1).to(q.dtype)
        prompt_weights, answer_weights = weights.split([prompt_k.shape[2], answer_k.shape[2]], -1)
        out = self._by_row(self._by_prompt(prompt_weights) @ prompt_v, shared) + answer_weights @ answer_v
        return out.reshape(rows, num_heads, 1, dim)

    def advance(self) -> None:
        """All layers have seen this token."""
        self.length += 1

    def _append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer not in self.answer:
            shape = (k.shape[0], k.shape[1], self.capacity, k.shape[3])
            self.answer[layer] = (k.new_empty(shape), v.new_empty(shape))
        for store, new in zip(self.answer[layer], (k, v)):
            store[:, :, self.length] = new[:, :, 0]
        return tuple(store[:, :, :self.length + 1] for store in self.answer[layer])

    def _by_prompt(self, x: torch.Tensor) -> torch.Tensor:
        """[B, Hk, shared, n] -> [P, Hk, G * shared, n]: the answers of a prompt become rows of one product."""
        _, num_kv, shared, n = x.shape
        x = x.view(self.num_prompts, self.num_answers, num_kv, shared, n).transpose(1, 2)
        return x.reshape(self.num_prompts, num_kv, self.num_answers * shared, n)

    def _by_row(self, x: torch.Tensor, shared: int) -> torch.Tensor:
        """The inverse of ``_by_prompt``."""
        _, num_kv, _, n = x.shape
        x = x.view(self.num_prompts, num_kv, self.num_answers, shared, n).transpose(1, 2)
        return x.reshape(self.num_prompts * self.num_answers, num_kv, shared, n)
