"""Chance that depends on a name alone: the same on every rank, in every layout and after a restart."""

from __future__ import annotations

import hashlib

import torch


def generator(stream: str) -> torch.Generator:
    """A CPU generator seeded by the text ``stream``, such as "seed/step/shard/sample/answer"."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(stream.encode()).digest()[:7], "big"))


def uniforms(stream: str, count: int) -> torch.Tensor:
    """``count`` numbers in [0, 1) that depend on ``stream`` alone: [count] fp64 on the CPU; fewer are the first."""
    return torch.rand(count, generator=generator(stream), dtype=torch.float64)
