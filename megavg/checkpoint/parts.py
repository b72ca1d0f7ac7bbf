"""Which boxes of the whole model's tensors a rank holds: ZeRO-3's flat runs of tensor-parallel shards, by HF name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, Iterator, Sequence

import torch

from megavg.checkpoint.weight_map import WeightEntry

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, sizes) in an array."""


@dataclass(frozen=True)
class Part:
    """A box of one tensor of a checkpoint.

    Attributes:
        name: of the whole tensor, such as ``exp_avg/model.language_model.norm.weight``.
        shape: of the whole tensor.
        offsets, sizes: the box.
        dtype: as it is stored.
        fetch: gives the box's values, of shape ``sizes``; to load them it must give a view of where they go.
        owned: whether this rank is the one of those holding the box that writes it.
    """

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    fetch: Callable[[], torch.Tensor]
    owned: bool = True

    @property
    def num_bytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize


def whole(name: str, shape: Sequence[int], dtype: torch.dtype, fetch: Callable[[], torch.Tensor]) -> Part:
    """The part that is all of its tensor."""
    return Part(name, tuple(shape), (0,) * len(shape), tuple(shape), dtype, fetch)


def boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Cut the flat run [start, stop) of a row-major array into boxes, in order; each is contiguous in the array."""
    if start >= stop:
        return []
    if len(shape) == 1:
        return [((start,), (stop - start,))]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows

    def within(index: int, begin: int, end: int) -> list[Box]:
        return [((index, *offsets), (1, *sizes)) for offsets, sizes in boxes(shape[1:], begin, end)]

    if first > last:
        return within(last, start - last * row, stop - last * row)
    middle = [((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))] if first < last else []
    before = within(first - 1, start - (first - 1) * row, row) if start < first * row else []
    return [*before, *middle, *(within(last, 0, stop - last * row) if last * row < stop else [])]


def parts_of_run(entry: WeightEntry, shape: Sequence[int], start: int, values: dict[str, torch.Tensor], tp_size: int,
                 tp_rank: int, owned: bool) -> Iterator[Part]:
    """The parts of HF tensors that lie in one flat run of a tensor-parallel shard; padding rows are left out.

    Args:
        shape: of the whole shard.
        start: of the run in the flat shard.
        values: kind of state ("weights", "exp_avg", ...) -> the run [n], which parts are views of.
        owned: whether this rank writes what several ranks hold.
    """
    axis, stop = entry.axis or 0, start + next(iter(values.values())).numel()
    place = 0  # in the run
    for offsets, sizes in boxes(shape, start, stop):
        for region in entry.regions(shape, tp_size, tp_rank):
            low = max(offsets[axis], region.shard_start)
            high = min(offsets[axis] + sizes[axis], region.shard_start + region.length)
            if low >= high:
                continue
            inner = math.prod(sizes[axis + 1:])
            if axis and high - low != sizes[axis]:
                raise AssertionError(f"{entry.name}: only the first axis of a shard may be several tensors'")
            begin = place + (low - offsets[axis]) * inner
            box = (*sizes[:axis], high - low, *sizes[axis + 1:])
            where = (*offsets[:axis], region.hf_start + low - region.shard_start, *offsets[axis + 1:])
            whole_shape = (*shape[:axis], region.hf_size, *shape[axis + 1:])
            for kind, run in values.items():
                view = run[begin:begin + math.prod(box)].view(box)
                yield Part(f"{kind}/{region.hf_name}", whole_shape, where, box, run.dtype, lambda view=view: view,
                           owned)
        place += math.prod(sizes)
