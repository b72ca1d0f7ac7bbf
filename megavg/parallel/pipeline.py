"""What pipeline stages tell each other: tensors from stage to stage, and results of one stage to all."""

from __future__ import annotations

from typing import Sequence

import torch
import torch.distributed as dist

from megavg.parallel.context import ParallelContext


class StageLink:
    """Point-to-point between the stages of one pipeline.

    NCCL runs the transfers of two ranks in the order in which they are asked for, so a send and a receive that meet
    each other must be asked for together: what a stage sends between two pieces of work and what it receives for the
    next one is one ``exchange``.
    """

    def __init__(self, context: ParallelContext):
        self._context = context
        self._batched = context.device.type == "cuda"
        self._leaving: list[tuple] = []  # sends that gloo has not delivered yet, with their tensors

    def exchange(self, sends: Sequence[tuple[torch.Tensor, int]], receives: Sequence[tuple[torch.Tensor, int]]) -> None:
        """Send tensors and fill buffers, each with the stage it goes to or comes from; returns when they are filled."""
        sends = [(tensor.contiguous(), self._peer(stage)) for tensor, stage in sends]
        receives = [(buffer, self._peer(stage)) for buffer, stage in receives]
        group = self._context.pp_group
        if self._batched and (sends or receives):
            works = dist.batch_isend_irecv(
                [dist.P2POp(dist.isend, tensor, peer, group) for tensor, peer in sends]
                + [dist.P2POp(dist.irecv, buffer, peer, group) for buffer, peer in receives])
            for work in works:
                work.wait()
            return
        self._leaving = [(work, tensor) for work, tensor in self._leaving if not work.is_completed()]
        self._leaving += [(dist.isend(tensor, peer, group=group), tensor) for tensor, peer in sends]
        for work in [dist.irecv(buffer, peer, group=group) for buffer, peer in receives]:
            work.wait()

    def flush(self) -> None:
        """Wait until everything sent has left."""
        for work, _ in self._leaving:
            work.wait()
        self._leaving.clear()

    def from_last(self, tensor: torch.Tensor) -> torch.Tensor:
        """The last stage's ``tensor``, which replaces that of the other stages; all bring the same shape and dtype."""
        return self._from(self._context.pp_size - 1, tensor)

    def from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first stage's ``tensor``, likewise."""
        return self._from(0, tensor)

    def _from(self, stage: int, tensor: torch.Tensor) -> torch.Tensor:
        if self._context.pp_size > 1:
            tensor = tensor.contiguous()
            dist.broadcast(tensor, self._peer(stage), group=self._context.pp_group)
        return tensor

    def _peer(self, stage: int) -> int:
        return dist.get_global_rank(self._context.pp_group, stage)
