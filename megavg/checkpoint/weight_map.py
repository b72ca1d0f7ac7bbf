"""How each parameter of a stage is made of HF tensors, and back: one description, both directions derived from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import torch


@dataclass(frozen=True)
class Region:
    """Where, along the split axis, a part of one HF tensor lies in a rank's shard.

    Attributes:
        shard_start, length: in the shard.
        hf_start: in the HF tensor, whose full size is ``hf_size``.
    """

    hf_name: str
    hf_size: int
    hf_start: int
    shard_start: int
    length: int


@dataclass(frozen=True)
class WeightEntry:
    """One megavg parameter and the HF tensors that it holds.

    Attributes:
        name: the parameter's name in ``QwenVLStage``.
        hf_names: HF tensors, joined along ``axis`` in this order.
        axis: the axis that tensor parallelism splits; None when every rank holds the whole tensor.
        sizes: full length of each HF tensor along ``axis``.
        padded_size: full length of the joined tensor with padding rows, where it has any.
        copies: neighbouring ranks that hold the same shard (key-value heads that are fewer than ranks).
    """

    name: str
    hf_names: tuple[str, ...]
    axis: int | None = None
    sizes: tuple[int, ...] = ()
    padded_size: int | None = None
    copies: int = 1

    def to_megavg(self, tensors: Sequence[torch.Tensor], tp_size: int, tp_rank: int) -> torch.Tensor:
        """The shard of rank ``tp_rank``: [its part of the first | its part of the second | ...], zeros as padding."""
        if self.axis is None:
            return tensors[0]
        for name, size, tensor in zip(self.hf_names, self.sizes, tensors, strict=True):
            if tensor.shape[self.axis] != size:
                raise ValueError(f"{name}: expected {size} along axis {self.axis}, got shape {tuple(tensor.shape)}; "
                                 "config.json and the weights do not belong together")
        if self.padded_size is not None:
            (tensor,) = tensors
            shape = list(tensor.shape)
            shape[self.axis] = self.padded_size - tensor.shape[self.axis]
            tensors = [torch.cat([tensor, tensor.new_zeros(shape)], self.axis)]
        num_shards, shard = tp_size // self.copies, tp_rank // self.copies
        return torch.cat([tensor.chunk(num_shards, self.axis)[shard] for tensor in tensors], self.axis).contiguous()

    def regions(self, shard_shape: Sequence[int], tp_size: int, tp_rank: int) -> list[Region]:
        """Where the HF tensors lie in the shard of rank ``tp_rank``, in order; padding rows belong to none."""
        if self.axis is None:
            return [Region(self.hf_names[0], shard_shape[0], 0, 0, shard_shape[0])]
        num_shards, shard = tp_size // self.copies, tp_rank // self.copies
        regions, start = [], 0
        for name, size in zip(self.hf_names, self.sizes, strict=True):
            length = (self.padded_size or size) // num_shards
            first = shard * length
            regions.append(Region(name, size, first, start, max(0, min(length, size - first))))
            start += length
        return regions

    def to_hf(self, shards: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """All ranks' shards, in rank order, -> the HF tensors by name. The inverse of ``to_megavg``."""
        if self.axis is None:
            return {self.hf_names[0]: shards[0]}
        shards = shards[::self.copies]
        if self.padded_size is not None:
            whole = torch.cat(list(shards), self.axis)
            return {self.hf_names[0]: whole.narrow(self.axis, 0, self.sizes[0]).contiguous()}
        parts = [shard.split([size // len(shards) for size in self.sizes], self.axis) for shard in shards]
        return {name: torch.cat([part[i] for part in parts], self.axis).contiguous()
                for i, name in enumerate(self.hf_names)}


class WeightMap:
    """All entries of a model, by megavg name."""

    def __init__(self, entries: Sequence[WeightEntry]):
        self.entries = {entry.name: entry for entry in entries}
        if len(self.entries) != len(entries):
            raise ValueError("two entries of the weight map have one name")

    def __getitem__(self, name: str) -> WeightEntry:
        return self.entries[name]

    @property
    def hf_names(self) -> list[str]:
        """Every HF tensor that the model is made of."""
        return list(dict.fromkeys(name for entry in self.entries.values() for name in entry.hf_names))
