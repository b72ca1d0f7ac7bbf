"""Which rank am I, in every direction: one frozen object, handed down and never fetched from a global."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class ParallelContext:
    """Ranks, sizes and process groups of this process.

    The world is ordered tensor-parallel fastest, then data, then pipeline, as megatron-core orders it.

    Attributes:
        world_size, rank: of all processes.
        tp_size, tp_rank, tp_group: tensor parallelism; shards of one layer.
        pp_size, pp_rank, pp_group: pipeline stages.
        dp_size, dp_rank, dp_group: data parallelism; ZeRO-3 partitions over it.
        device: where parameters and activations live.
    """

    world_size: int
    rank: int
    tp_size: int
    tp_rank: int
    tp_group: dist.ProcessGroup
    pp_size: int
    pp_rank: int
    pp_group: dist.ProcessGroup
    dp_size: int
    dp_rank: int
    dp_group: dist.ProcessGroup
    device: torch.device

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_writer(self) -> bool:
        """True on the one process that writes logs: it holds the loss, so it is on the last stage."""
        return self.is_last_stage and self.tp_rank == 0 and self.dp_rank == 0

    @property
    def layout(self) -> str:
        """The layout in words, such as "TP2 x PP1 x DP2"."""
        return f"TP{self.tp_size} x PP{self.pp_size} x DP{self.dp_size}"

    def sum_over_data(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of ``tensor`` over the data-parallel ranks; the input is not changed."""
        if self.dp_size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total, group=self.dp_group)
        return total

    def max_over_data(self, number: int) -> int:
        """The largest ``number`` of the data-parallel ranks."""
        if self.dp_size == 1:
            return number
        largest = torch.tensor(number, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.dp_group)
        return int(largest)

    def max_over_world(self, number: int) -> int:
        """The largest ``number`` of all ranks."""
        if self.world_size == 1:
            return number
        largest = torch.tensor(number, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def gather_values(self, values: torch.Tensor) -> torch.Tensor:
        """Concatenate the data-parallel ranks' vectors [n], of any lengths, in rank order, on every rank."""
        if self.dp_size == 1:
            return values
        counts = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(self.dp_size)]
        dist.all_gather(counts, counts[0].new_tensor([values.numel()]), group=self.dp_group)
        sizes = [int(count) for count in counts]
        padded = values.new_zeros(max(sizes))
        padded[:values.numel()] = values
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.dp_group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes)])

    def gather_rows(self, rows: list) -> list:
        """Concatenate the data-parallel ranks' lists of plain objects, in rank order, on every rank."""
        if self.dp_size == 1:
            return list(rows)
        parts: list = [None] * self.dp_size
        dist.all_gather_object(parts, rows, group=self.dp_group)
        return [row for part in parts for row in part]
