"""The backward of a vocabulary-parallel head: blocks of columns, all rows that have a gradient, one reduction.

A block's gradient with respect to its logits, dz [n, c], lives only while its two products are taken: dW's rows are
written once, dH is summed up in fp32. dH's reduction over the ranks starts before the last block's dW product, which
hides it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Callable

import torch
import torch.distributed as dist

from megavg.ops.vocab_rows import BlockRecord, Blocks, HeadRows, LogitGradient, column_blocks


class HeadGradients:
    """Gradients of hidden states, weight and bias, summed up block by block.

    Args:
        num_rows: rows of the whole batch; those without an upstream gradient stay zero and cost nothing.
        active: [k] int64, the rows that are worked on.
        weight, bias: the parameters, padding rows included; None where no gradient is wanted.
        hidden: [*, D], for dtype and width; None where no gradient is wanted.
    """

    def __init__(self, num_rows: int, active: torch.Tensor, hidden: torch.Tensor | None, weight: torch.Tensor | None,
                 bias: torch.Tensor | None, num_valid: int, dtype: torch.dtype):
        self.active, self.num_rows = active, num_rows
        self.weight = None if weight is None else torch.empty_like(weight)
        self.bias = None if bias is None else torch.zeros_like(bias)
        if weight is not None:
            self.weight[num_valid:] = 0
        self._whole = None if hidden is None else hidden.new_zeros(num_rows, hidden.shape[1], dtype=dtype)

    def add_to_hidden(self, dz: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor | None) -> None:
        """dH += dz W in fp32; ``rows`` are those of dz among the active, None for all."""
        if self._whole is None:
            return
        grad = self._whole[:self.active.numel()]  # side by side until all blocks are done
        if rows is not None:
            grad.index_add_(0, rows, project_back(dz, weight, grad.dtype))
        elif dz.dtype == grad.dtype:
            grad.addmm_(dz, weight)
        else:
            torch.addmm(grad, dz, weight, out_dtype=grad.dtype, out=grad)

    def write_weight(self, block: slice, dz: torch.Tensor, hidden: torch.Tensor) -> None:
        """This block's rows of dW and db, each rounded once."""
        if self.weight is not None:
            if dz.dtype == self.weight.dtype:
                torch.mm(dz.t(), hidden, out=self.weight[block])
            else:
                self.weight[block] = torch.mm(dz.t(), hidden)
        if self.bias is not None:
            self.bias[block] = dz.sum(0, dtype=torch.float64 if dz.dtype == torch.float64 else torch.float32)

    def whole_hidden(self) -> torch.Tensor | None:
        """[num_rows, D], zero where no row was active; to be asked for once, after the last block."""
        count = self.active.numel()
        if self._whole is None or count == self.num_rows:
            return self._whole
        # rows only move down, so from the last to the first none is overwritten before it has moved
        for part in reversed(column_blocks(count, 512)):
            moved = self._whole[part].clone()
            self._whole.index_copy_(0, self.active[part], moved)
        inactive = torch.ones(self.num_rows, dtype=torch.bool, device=self.active.device)
        inactive[self.active] = False
        return self._whole.masked_fill_(inactive[:, None], 0)


def project_back(dz: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """dz [k, c] times weight [c, D] in ``dtype``."""
    return torch.mm(dz, weight) if dz.dtype == dtype else torch.mm(dz, weight, out_dtype=dtype)


class HiddenReduction:
    """The one reduction of the hidden states' gradient over the ranks of a group, begun early and waited for."""

    def __init__(self, group, world_size: int, scatter: bool):
        self.group, self.world_size, self.scatter = group, world_size, scatter
        self.result: torch.Tensor | None = None
        self._work = None

    def start(self, grad: torch.Tensor | None) -> None:
        """Sum over ranks; with ``scatter`` each keeps its own equal part of the rows (sequence parallelism)."""
        self.result = grad
        if grad is None or self.world_size == 1:
            return
        if self.scatter:
            self.result = grad.new_empty(grad.shape[0] // self.world_size, grad.shape[1])
            self._work = dist.reduce_scatter_tensor(self.result, grad, group=self.group, async_op=True)
            self._kept = grad
        else:
            self._work = dist.all_reduce(grad, group=self.group, async_op=True)

    def wait(self) -> torch.Tensor | None:
        if self._work is not None:
            self._work.wait()
        return self.result


def sweep(rows: HeadRows, blocks: Blocks, grads: HeadGradients, reduction: HiddenReduction, fill: Callable) -> None:
    """Work through all blocks of this rank's columns.

    Args:
        rows: the active rows.
        fill: (number of the block, its columns, its weight [c, D], room for dz) -> (dz [k, c], which of the rows these
            are [k] or None for all, their hidden states [k, D]).
    """
    n, num_columns = rows.hidden.shape[0], rows.weight.shape[0]
    slices = column_blocks(num_columns, blocks.columns) if n else []
    if not slices:
        if grads.weight is not None:
            grads.weight.zero_()
        reduction.start(grads.whole_hidden())
        return
    room = torch.empty(n * min(blocks.columns, num_columns), dtype=rows.operand_dtype, device=rows.hidden.device)
    for number, block in enumerate(slices):
        weight = rows.operand(rows.weight[block])
        dz, chosen, hidden = fill(number, block, weight, room)
        grads.add_to_hidden(dz, weight, chosen)
        if number == len(slices) - 1:
            reduction.start(grads.whole_hidden())
        grads.write_weight(block, dz, hidden)


class ScoreGradient:
    """dz of log-probs and entropies, block by block.

    Args:
        rows, gradient: of the active rows only.
        record: of all rows that were scored.
        active: [k] which of those are active, None where all are.
        skip_below: [k] log2 mass under which a row's block is left out, or None. A target's block is never left out.
    """

    def __init__(self, backend: ModuleType, rows: HeadRows, gradient: LogitGradient, record: BlockRecord,
                 blocks: Blocks, active: torch.Tensor | None, skip_below: torch.Tensor | None):
        self.backend, self.rows, self.gradient, self.record, self.blocks = backend, rows, gradient, record, blocks
        self.active, self.skip_below = active, skip_below
        self.hidden = rows.operand(rows.hidden)
        self.tile = backend.gradient_room(rows, rows.operand_dtype, blocks)

    def fill(self, number: int, block: slice, weight: torch.Tensor, room: torch.Tensor):
        """See ``sweep``."""
        chosen = self._worth_it(number, block)
        rows, gradient, hidden, recorded = self.rows, self.gradient, self.hidden, self.active
        if chosen is not None:
            rows, gradient, hidden = rows.select(chosen), gradient.select(chosen), hidden.index_select(0, chosen)
            recorded = chosen if recorded is None else recorded[chosen]
        dz = room[:hidden.shape[0] * weight.shape[0]].view(-1, weight.shape[0])
        if number < len(self.record.cached):
            cached = self.record.cached_of(number, recorded)
            self.backend.fill_gradient_from_cache(dz, cached, rows, block, gradient, self.blocks, self.tile)
        else:
            self.backend.fill_gradient(dz, rows, block, weight, gradient, self.blocks, self.tile)
        return dz, chosen, hidden

    def _worth_it(self, number: int, block: slice) -> torch.Tensor | None:
        """Rows whose mass in the block reaches the threshold or whose target is in it; None for all rows."""
        if self.skip_below is None:
            return None
        columns = self.rows.columns
        in_block = (columns >= block.start) & (columns < block.stop)
        mass = self.record.mass_of(number, self.active)
        chosen = ((mass >= self.skip_below) | in_block).nonzero()[:, 0]
        return None if chosen.numel() == columns.numel() else chosen
