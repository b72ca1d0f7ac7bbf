"""Qwen's decoder layer on megatron-core's tensor-parallel linears; attention itself is handed in.

Shapes: B sequences, S tokens, D width, Hq / Hk query and key heads OF THIS RANK, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from torch import nn

from megavg.parallel.context import ParallelContext
from megavg.parallel.mcore import layer_config

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""``attend(layer, q [B, Hq, S, d], k [B, Hk, S, d], v) -> [B, Hq, S, d]``; rollout passes one with a cache."""


@dataclass(frozen=True)
class DecoderDims:
    """Sizes of a Qwen decoder, in the terms of its HF text configuration."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    qkv_bias: bool
    qk_norm: bool
    tie_embeddings: bool

    def check(self, tp_size: int) -> None:
        """Refuse a tensor-parallel size that the heads or the feed-forward width do not divide by."""
        for name, value in (("attention heads", self.num_heads), ("key-value heads", self.num_kv_heads),
                            ("intermediate size", self.intermediate_size)):
            if value % tp_size:
                raise ValueError(f"{value} {name} of this model are not divisible by "
                                 f"parallel.tensor_model_parallel_size={tp_size}; choose a divisor")

    def padded_vocab_size(self, tp_size: int) -> int:
        """Rows of the embedding and head, all ranks together, when each holds equally many."""
        return -(-self.vocab_size // tp_size) * tp_size


def causal_attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Full causal attention; right padding needs no mask, since no real token looks to its right."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps), statistics in fp32 as the Qwen models take them."""

    def __init__(self, dim: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, dtype=dtype))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.normalise(x, self.weight)

    def normalise(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return weight * y.to(x.dtype)


class HeadNorm(RMSNorm):
    """RMSNorm over the head width, shared by all heads while this rank sees only its own.

    Its gradient on one rank is a part of the whole, so it is summed over the tensor-parallel group.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.normalise(x, tensor_parallel.copy_to_tensor_model_parallel_region(self.weight))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [B, H, S, d] by cos, sin [B, S, d]."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos[:, None] + turned * sin[:, None]


def zeros_(weight: torch.Tensor) -> torch.Tensor:
    """Fill a weight with zeros: weights come from a checkpoint, but megatron-core sets its marks as it initialises."""
    return nn.init.zeros_(weight)


def _column(inputs: int, outputs: int, bias: bool, config) -> nn.Module:
    return tensor_parallel.ColumnParallelLinear(inputs, outputs, config=config, init_method=zeros_, bias=bias,
                                                gather_output=False)


def _row(inputs: int, outputs: int, config) -> nn.Module:
    return tensor_parallel.RowParallelLinear(inputs, outputs, config=config, init_method=zeros_, bias=False,
                                             input_is_parallel=True, skip_bias_add=False)


class Attention(nn.Module):
    """Self-attention of one layer. This rank's ``qkv`` rows are [its queries | its keys | its values]."""

    def __init__(self, index: int, dims: DecoderDims, context: ParallelContext, dtype: torch.dtype):
        super().__init__()
        config = layer_config(context, dtype)
        self.index, self.head_dim = index, dims.head_dim
        self.num_heads, self.num_kv_heads = dims.num_heads // context.tp_size, dims.num_kv_heads // context.tp_size
        self.qkv = _column(dims.hidden_size, (dims.num_heads + 2 * dims.num_kv_heads) * dims.head_dim,
                           dims.qkv_bias, config)
        self.out = _row(dims.num_heads * dims.head_dim, dims.hidden_size, config)
        self.query_norm = HeadNorm(dims.head_dim, dims.norm_eps, dtype) if dims.qk_norm else None
        self.key_norm = HeadNorm(dims.head_dim, dims.norm_eps, dtype) if dims.qk_norm else None

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend) -> torch.Tensor:
        batch, length, _ = x.shape
        heads = self.qkv(x)[0].view(batch, length, -1, self.head_dim)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mixed = attend(self.index, rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, -1))[0]


class FeedForward(nn.Module):
    """SwiGLU; this rank's ``gate_up`` rows are [its gate | its up]."""

    def __init__(self, dims: DecoderDims, context: ParallelContext, dtype: torch.dtype):
        super().__init__()
        config = layer_config(context, dtype)
        self.gate_up = _column(dims.hidden_size, 2 * dims.intermediate_size, False, config)
        self.down = _row(dims.intermediate_size, dims.hidden_size, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x)[0].chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)[0]


class DecoderLayer(nn.Module):
    """x + attention(norm x), then + feed-forward(norm x): [B, S, D] -> [B, S, D]."""

    def __init__(self, index: int, dims: DecoderDims, context: ParallelContext, dtype: torch.dtype):
        super().__init__()
        self.input_norm = RMSNorm(dims.hidden_size, dims.norm_eps, dtype)
        self.attention = Attention(index, dims, context, dtype)
        self.post_norm = RMSNorm(dims.hidden_size, dims.norm_eps, dtype)
        self.feed_forward = FeedForward(dims, context, dtype)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend) -> torch.Tensor:
        x = x + self.attention(self.input_norm(x), cos, sin, attend)
        return x + self.feed_forward(self.post_norm(x))
