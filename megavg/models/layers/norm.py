"""Qwen's RMSNorm, by the fastest kernel at hand: NVIDIA apex, torch's fused one, or plain operations on the CPU."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

from megavg.parallel.apex import has_nvidia_apex
from megavg.parallel.core import tensor_parallel


def plain_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis, statistics in fp32 and rounding as transformers has it."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def torch_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The same in one kernel, rounded once at the end."""
    return F.rms_norm(x, weight.shape, weight, eps)


@functools.cache
def rms_norm_name(device: str) -> str:
    """Who normalises on a kind of device: "NVIDIA apex", "torch (fused)" or "torch"."""
    if device != "cuda":
        return "torch"
    return "NVIDIA apex" if has_nvidia_apex() else "torch (fused)"


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of the last axis by whoever ``rms_norm_name`` says."""
    name = rms_norm_name(x.device.type)
    if name == "torch":
        return plain_rms_norm(x, weight, eps)
    if name == "torch (fused)":
        return torch_rms_norm(x, weight, eps)
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    return fused_rms_norm_affine(x, weight, weight.shape, eps)


class RMSNorm(nn.Module):
    """RMSNorm with a learned weight.

    Args:
        sees_part: each tensor-parallel rank normalises a part (its heads, its tokens) with one shared weight, whose
            gradient is summed over the ranks.
    """

    def __init__(self, dim: int, eps: float, dtype: torch.dtype, sees_part: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, dtype=dtype))
        self.eps, self.sees_part = eps, sees_part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if self.sees_part:
            weight = tensor_parallel.copy_to_tensor_model_parallel_region(weight)
        return rms_norm(x, weight, self.eps)
