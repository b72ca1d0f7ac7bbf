"""Bring a model's shards from all ranks together as HF tensors, one at a time."""

from __future__ import annotations

from typing import Iterable, Iterator

import torch
import torch.distributed as dist

from megavg.checkpoint.weight_map import WeightMap
from megavg.parallel.context import ParallelContext


def hf_tensors(shards: Iterable[tuple[str, torch.Tensor]], weight_map: WeightMap,
               context: ParallelContext) -> Iterator[tuple[str, torch.Tensor]]:
    """The whole model's tensors by HF name on rank 0, this stage's on the other ranks; all ranks walk together.

    Args:
        shards: this rank's shard of every parameter of its stage, whole along data parallelism, by megavg name. A
            tensor need only be valid until the next one is asked for; so is what comes out.
    """
    for stage in range(context.pp_size):
        if context.pp_rank == stage:
            for name, tensor in _of_stage(shards, weight_map, context):
                if stage and _is_column(context):
                    _send(name, tensor, context)
                yield name, tensor
            if stage and _is_column(context):
                _send(None, None, context)
        elif context.is_first_stage and _is_column(context):
            yield from _received(stage, context)


def _is_column(context: ParallelContext) -> bool:
    """Whether this rank is in the pipeline of rank 0, through which all stages' tensors come."""
    return context.tp_rank == 0 and context.dp_rank == 0


def _of_stage(shards, weight_map: WeightMap, context: ParallelContext) -> Iterator[tuple[str, torch.Tensor]]:
    copied = {name for entry in weight_map.entries.values() if entry.name != "head.weight" for name in entry.hf_names}
    for name, shard in shards:
        entry = weight_map[name]
        if name == "head.weight" and entry.hf_names[0] in copied:
            continue  # a tied model's last stage holds a copy of the embedding
        parts = [shard]
        if entry.axis is not None and context.tp_size > 1:
            parts = [torch.empty_like(shard) for _ in range(context.tp_size)]
            dist.all_gather(parts, shard.contiguous(), group=context.tp_group)
        yield from entry.to_hf(parts).items()


def _send(name: str | None, tensor: torch.Tensor | None, context: ParallelContext) -> None:
    first = dist.get_global_rank(context.pp_group, 0)
    about = None if tensor is None else (name, tuple(tensor.shape), tensor.dtype)
    dist.send_object_list([about], first, context.pp_group, context.device)
    if tensor is not None:
        dist.send(tensor.contiguous(), first, group=context.pp_group)


def _received(stage: int, context: ParallelContext) -> Iterator[tuple[str, torch.Tensor]]:
    sender = dist.get_global_rank(context.pp_group, stage)
    while True:
        about: list = [None]
        dist.recv_object_list(about, sender, context.pp_group, context.device)
        if about[0] is None:
            return
        name, shape, dtype = about[0]
        tensor = torch.empty(shape, dtype=dtype, device=context.device)
        dist.recv(tensor, sender, group=context.pp_group)
        yield name, tensor
