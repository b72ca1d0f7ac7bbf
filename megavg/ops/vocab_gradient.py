"""The backward of a vocabulary-parallel head: blocks of columns, all rows that have a gradient, one reduction.

A block's gradient with respect to its logits, dz [n, c], lives only while its two products are taken: dW's rows are
written once, dH is summed up in fp32. dH's reduction over the ranks starts before the last block's dW product, which
hides it.
"""

from __future__ import annotations

from types import ModuleType

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
        self.hidden = None if hidden is None else hidden.new_zeros(active.numel(), hidden.shape[1], dtype=dtype)

    def add_to_hidden(self, dz: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor | None) -> None:
        """dH += dz W in fp32; ``rows`` are those of dz among the active, None for all."""
        if self.hidden is None:
            return
        if rows is None and dz.dtype == self.hidden.dtype:
            self.hidden.addmm_(dz, weight)
            return
        product = torch.mm(dz, weight) if dz.dtype == self.hidden.dtype else torch.mm(
            dz, weight, out_dtype=self.hidden.dtype)
        self.hidden.add_(product) if rows is None else self.hidden.index_add_(0, rows, product)

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
        """[num_rows, D], zero where no row was active."""
        if self.hidden is None or self.active.numel() == self.num_rows:
            return self.hidden
        whole = self.hidden.new_zeros(self.num_rows, self.hidden.shape[1])
        return whole.index_copy_(0, self.active, self.hidden)


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


def sweep(backend: ModuleType, rows: HeadRows, gradient: LogitGradient, record: BlockRecord, blocks: Blocks,
          grads: HeadGradients, reduction: HiddenReduction, skip_below: torch.Tensor | None = None) -> None:
    """Work through all blocks of this rank's columns.

    Args:
        rows, gradient, record: of the active rows only.
        skip_below: [k] log2 mass under which a row's block is left out, or None. A target's block is never left out.
    """
    n, num_columns = rows.hidden.shape[0], rows.weight.shape[0]
    hidden = rows.operand(rows.hidden)
    slices = column_blocks(num_columns, blocks.columns) if n else []
    if not slices:
        if grads.weight is not None:
            grads.weight.zero_()
        reduction.start(grads.whole_hidden())
        return
    flat = hidden.new_empty(n * min(blocks.columns, num_columns))
    room = backend.gradient_room(rows, hidden.dtype, blocks)
    for number, block in enumerate(slices):
        chosen = None if skip_below is None else _worth_it(rows, record.log_mass[number], skip_below, block)
        part, its_hidden, its_gradient = rows, hidden, gradient
        if chosen is not None:
            part, its_gradient = rows.select(chosen), gradient.select(chosen)
            its_hidden = rows.operand(part.hidden)
        weight = rows.operand(rows.weight[block])
        dz = flat[:its_hidden.shape[0] * weight.shape[0]].view(-1, weight.shape[0])
        if number < len(record.cached):
            cached = record.cached[number]
            if chosen is not None:
                cached = tuple(tensor.index_select(0, chosen) for tensor in cached)
            backend.fill_gradient_from_cache(dz, cached, part, block, its_gradient, blocks, room)
        else:
            backend.fill_gradient(dz, part, block, weight, its_gradient, blocks, room)
        grads.add_to_hidden(dz, weight, chosen)
        if number == len(slices) - 1:
            reduction.start(grads.whole_hidden())
        grads.write_weight(block, dz, its_hidden)


def _worth_it(rows: HeadRows, log_mass: torch.Tensor, skip_below: torch.Tensor, block: slice) -> torch.Tensor | None:
    """Rows whose mass in the block reaches the threshold or whose target is in it; None for all rows."""
    in_block = (rows.columns >= block.start) & (rows.columns < block.stop)
    chosen = ((log_mass >= skip_below) | in_block).nonzero()[:, 0]
    return None if chosen.numel() == rows.hidden.shape[0] else chosen
