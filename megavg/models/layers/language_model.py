"""Qwen's decoder layer on megatron-core's tensor-parallel linears; attention itself is handed in.

Shapes: B sequences, S tokens, D width, Hq / Hk query and key heads OF THIS RANK, d head width. Under sequence
parallelism the hidden states of a layer are this rank's rows [n, D] of the B * S tokens, padded to divide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from megavg.models.layers.norm import RMSNorm
from megavg.parallel.context import ParallelContext
from megavg.parallel.core import tensor_parallel
from megavg.parallel.mcore import layer_config
from megavg.parallel.tensor import padded_rows, summed_over_copies

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

    @property
    def layer_numel(self) -> int:
        """Weights of one decoder layer's matrices."""
        heads = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        return self.hidden_size * (heads + 3 * self.intermediate_size)

    def check(self, tp_size: int) -> None:
        """Refuse a tensor-parallel size that the heads or the feed-forward width do not divide by."""
        for name, value in (("attention heads", self.num_heads), ("intermediate size", self.intermediate_size)):
            if value % tp_size:
                raise ValueError(f"{value} {name} of this model are not divisible by "
                                 f"parallel.tensor_model_parallel_size={tp_size}; choose a divisor")
        if self.num_kv_heads % tp_size and tp_size % self.num_kv_heads:
            raise ValueError(f"{self.num_kv_heads} key-value heads of this model neither divide by "
                             f"parallel.tensor_model_parallel_size={tp_size} nor divide it; choose another")

    def kv_copies(self, tp_size: int) -> int:
        """Tensor-parallel ranks that hold the same key-value head; 1 where there are heads for all."""
        return max(1, tp_size // self.num_kv_heads)

    def padded_vocab_size(self, tp_size: int) -> int:
        """Rows of the embedding and head, all ranks together, when each holds equally many."""
        return -(-self.vocab_size // tp_size) * tp_size


def causal_attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Full causal attention; right padding needs no mask, since no real token looks to its right."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def packed_attention(lengths: Sequence[int]) -> Attend:
    """Causal attention inside each of the sequences that are laid end to end: B = 1, S = sum of ``lengths``."""
    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = zip(*(t.split(list(lengths), 2) for t in (q, k, v)))
        return torch.cat([causal_attention(layer, *row) for row in rows], 2)

    return attend


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


class CopiedKeysValues(nn.Module):
    """Keys and values where there are fewer heads than tensor-parallel ranks: neighbours hold copies of one head.

    A copy sees only the queries of its own rank, so the copies' gradients are summed.

    Attributes:
        weight: [2 d, D], keys over values of one head. bias: [2 d] or None.
    """

    def __init__(self, dims: DecoderDims, context: ParallelContext, dtype: torch.dtype, sequence_parallel: bool):
        super().__init__()
        copies = dims.kv_copies(context.tp_size)
        self.context, self.sequence_parallel = context, sequence_parallel
        self.head, self.num_heads = context.tp_rank // copies, dims.num_kv_heads
        self.weight = nn.Parameter(torch.zeros(2 * dims.head_dim, dims.hidden_size, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(2 * dims.head_dim, dtype=dtype)) if dims.qkv_bias else None
        for parameter in self.parameters():
            # the gradient norm counts a head once
            parameter.model_parallel = context.tp_rank % copies == 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.sequence_parallel:
            x = tensor_parallel.gather_from_sequence_parallel_region(x)
        else:
            x = tensor_parallel.copy_to_tensor_model_parallel_region(x)
        weight, bias = (None if p is None else summed_over_copies(p, self.head, self.num_heads, self.context.tp_group)
                        for p in (self.weight, self.bias))
        return F.linear(x, weight, bias)


class Attention(nn.Module):
    """Self-attention of one layer. This rank's ``qkv`` rows are [its queries | its keys | its values].

    Where key-value heads are fewer than tensor-parallel ranks, ``qkv`` holds queries only and ``kv`` the rest.
    """

    def __init__(self, index: int, dims: DecoderDims, context: ParallelContext, dtype: torch.dtype,
                 sequence_parallel: bool = False):
        super().__init__()
        config = layer_config(context, dtype, sequence_parallel)
        self.index, self.head_dim, self.sequence_parallel = index, dims.head_dim, sequence_parallel
        self.tp_size = context.tp_size
        copies = dims.kv_copies(context.tp_size)
        self.num_heads, self.num_kv_heads = (n // context.tp_size for n in (dims.num_heads, dims.num_kv_heads * copies))
        rows = dims.num_heads + (2 * dims.num_kv_heads if copies == 1 else 0)
        self.qkv = _column(dims.hidden_size, rows * dims.head_dim, dims.qkv_bias, config)
        self.kv = CopiedKeysValues(dims, context, dtype, sequence_parallel) if copies > 1 else None
        self.out = _row(dims.num_heads * dims.head_dim, dims.hidden_size, config)
        self.query_norm = RMSNorm(dims.head_dim, dims.norm_eps, dtype, sees_part=True) if dims.qk_norm else None
        self.key_norm = RMSNorm(dims.head_dim, dims.norm_eps, dtype, sees_part=True) if dims.qk_norm else None

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend) -> torch.Tensor:
        batch, length = cos.shape[:2]
        heads = self.qkv(x)[0]
        if self.kv is not None:
            heads = torch.cat([heads, self.kv(x)], -1)
        heads = heads.flatten(0, -2)[:batch * length].view(batch, length, -1, self.head_dim)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mixed = attend(self.index, rotate(q, cos, sin), rotate(k, cos, sin), v)
        mixed = mixed.transpose(1, 2).reshape(batch, length, -1)
        return self.out(padded_rows(mixed.flatten(0, 1), self.tp_size) if self.sequence_parallel else mixed)[0]


class FeedForward(nn.Module):
    """SwiGLU; this rank's ``gate_up`` rows are [its gate | its up]."""

    def __init__(self, dims: DecoderDims, context: ParallelContext, dtype: torch.dtype,
                 sequence_parallel: bool = False):
        super().__init__()
        config = layer_config(context, dtype, sequence_parallel)
        self.gate_up = _column(dims.hidden_size, 2 * dims.intermediate_size, False, config)
        self.down = _row(dims.intermediate_size, dims.hidden_size, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x)[0].chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)[0]


class DecoderLayer(nn.Module):
    """x + attention(norm x), then + feed-forward(norm x): [B, S, D] -> [B, S, D], or [n, D] -> [n, D]."""

    def __init__(self, index: int, dims: DecoderDims, context: ParallelContext, dtype: torch.dtype,
                 sequence_parallel: bool = False):
        super().__init__()
        self.input_norm = RMSNorm(dims.hidden_size, dims.norm_eps, dtype, sees_part=sequence_parallel)
        self.attention = Attention(index, dims, context, dtype, sequence_parallel)
        self.post_norm = RMSNorm(dims.hidden_size, dims.norm_eps, dtype, sees_part=sequence_parallel)
        self.feed_forward = FeedForward(dims, context, dtype, sequence_parallel)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend) -> torch.Tensor:
        x = x + self.attention(self.input_norm(x), cos, sin, attend)
        return x + self.feed_forward(self.post_norm(x))
