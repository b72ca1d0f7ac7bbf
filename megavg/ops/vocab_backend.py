"""Which backend makes the tiles of logits: torch anywhere, Triton kernels on a GPU."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import torch


def load_backend(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> ModuleType:
    """The module of a backend: ``statistics``, ``gradient_room``, ``fill_gradient`` and ``fill_gradient_from_cache``.

    ``auto`` takes Triton for CUDA tensors below float64 where it is installed, torch otherwise. ``triton`` on a CPU
    needs Triton's interpreter (TRITON_INTERPRET=1 set before Triton is imported), which is for tests.
    """
    if name == "auto":
        fits = device.type == "cuda" and dtype != torch.float64
        name = "triton" if fits and importlib.util.find_spec("triton") else "torch"
    if name == "torch":
        from megavg.ops import vocab_torch

        return vocab_torch
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            raise ValueError("backend 'triton' needs the package triton; install it or take backend 'torch'")
        from megavg.ops import vocab_triton

        if device.type != "cuda" and not vocab_triton.INTERPRETED:
            raise ValueError(f"backend 'triton' needs CUDA tensors, got device {device}; take backend 'torch'")
        return vocab_triton
    raise ValueError(f"backend {name!r} is not one of auto, torch, triton")
