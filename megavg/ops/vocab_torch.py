"""The torch backend of the vocabulary ops: statistics and gradients of one block of logits, on any device.

Logits are made in tiles of rows x columns that fit the cache, in two buffers that are used again and again. They are
made in bits, x = (h w + b) scale with scale = log2 e / T, since exp2 is cheaper than exp, and relative to a reference
m of each row.
"""

from __future__ import annotations

import torch

from megavg.ops.vocab_rows import BlockRecord, Blocks, HeadRows, LogitGradient, column_blocks
from megavg.ops.vocab_shard import MOMENT, REFERENCE, SUM, TARGET, TOP_ID

_GROWN = 2.0**8  # a block's sum above this moves the reference
_TOO_FAR = 2.0**24  # a block's sum above this has cost precision


def project(hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """hidden [N, D] times weight^T [D, Vs] in ``dtype``; logits of bf16 operands are never rounded to bf16."""
    if hidden.dtype == dtype:
        return torch.mm(hidden, weight.t())
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=dtype)
    return torch.mm(hidden.to(dtype), weight.t().to(dtype))


def scaled_logits(out: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                  scale: float | torch.Tensor, reference: torch.Tensor | None) -> torch.Tensor:
    """out [n, c] = (hidden weight^T + bias) scale - reference, with reference [n] or None.

    The reference is subtracted from the rounded product, so that forward and backward, which may differ in it, see the
    very same logits: the probabilities of a row then sum to one and its gradient to zero.
    """
    if hidden.dtype == out.dtype:
        alpha = scale
        if isinstance(scale, torch.Tensor):
            hidden, alpha = hidden * scale[:, None], 1.0
        torch.addmm(out, hidden, weight.t(), beta=0, alpha=alpha, out=out)
    elif isinstance(scale, torch.Tensor):
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out).mul_(scale[:, None])
    else:
        torch.addmm(out, hidden, weight.t(), out_dtype=out.dtype, beta=0, alpha=scale, out=out)
    if bias is not None:
        bias = bias.to(out.dtype)
        out.addr_(scale, bias) if isinstance(scale, torch.Tensor) else out.add_(bias, alpha=scale)
    return out if reference is None else out.sub_(reference[:, None])


def statistics(rows: HeadRows, blocks: Blocks, top1: bool = False, sum_squares: bool = False, want_mass: bool = False,
               cache_bytes: int = 0) -> tuple[torch.Tensor, BlockRecord]:
    """(m, s, u, x_y) of every row over this rank's columns, [R, n]; an empty shard gives (-inf, 0, 0, 0).

    ``top1`` appends a row with the most likely column, ``sum_squares`` one with sum 2^(2 (x-m)).
    """
    n, v = rows.hidden.shape[0], rows.weight.shape[0]
    table = torch.zeros(4 + top1 + sum_squares, n, dtype=rows.dtype, device=rows.hidden.device)
    table[REFERENCE] = -torch.inf
    slices = column_blocks(v, blocks.columns)
    record = BlockRecord(table.new_empty(len(slices), n) if want_mass else None)
    if not n or not v:
        return table, record
    width = min(blocks.columns, v)
    record.cached = [(table.new_empty(n, s.stop - s.start, dtype=torch.bfloat16), table.new_empty(n))
                     for s in slices[:cache_bytes // (2 * n * width)]]
    sweep = _Sweep(rows, table, record, top1, sum_squares, min(blocks.rows, n), width)
    table[REFERENCE] = 0
    for number, block in enumerate(slices):
        weight = rows.operand(rows.weight[block])
        for tile in column_blocks(n, blocks.rows):
            sweep.add(number, block, tile, weight)
    return table, record


class _Sweep:
    """One pass over blocks of columns and tiles of rows that fills a table of statistics.

    The reference m of a row follows its sums, so that no pass for a maximum is needed before it is subtracted. Where a
    block turns out to lie far above it, that tile is worked out again from its maximum. With ``top1``, and on a GPU,
    where looking would wait, m is always the exact maximum.
    """

    def __init__(self, rows: HeadRows, table: torch.Tensor, record: BlockRecord, top1: bool, sum_squares: bool,
                 height: int, width: int):
        self.rows, self.table, self.record = rows, table, record
        self.top1, self.sum_squares = top1, sum_squares
        self.exact = top1 or table.device.type != "cpu"
        self.x, self.e = table.new_empty(2, height * width)

    def add(self, number: int, block: slice, tile: slice, weight: torch.Tensor) -> None:
        """Take one tile into the table."""
        rows, shape = self.rows, (tile.stop - tile.start, block.stop - block.start)
        m, s, u, target = (self.table[i, tile] for i in (REFERENCE, SUM, MOMENT, TARGET))
        x, e = (buffer[:shape[0] * shape[1]].view(shape) for buffer in (self.x, self.e))
        bias = None if rows.bias is None else rows.bias[block]
        scaled_logits(x, rows.operand(rows.hidden[tile]), weight, bias, rows.scale_of(tile), m if number else None)
        if self.exact or number == 0:
            self._raise_reference(number, block, tile, x)
        block_sum = torch.exp2(x, out=e).sum(1)
        if not self.exact and not bool((block_sum < _TOO_FAR).all()):  # a NaN is too far as well
            self._raise_reference(number, block, tile, x)
            block_sum = torch.exp2(x, out=e).sum(1)
        column, inside = _target_in(block, rows.columns[tile])
        target += torch.where(inside, x.gather(1, column)[:, 0] + m, 0)
        s += block_sum
        u += x.mul_(e).sum(1)
        if self.sum_squares:
            self.table[-1, tile] += torch.mul(e, e, out=x).sum(1)
        self._remember(number, tile, e, m, block_sum)
        if not self.exact:
            grown = torch.where(block_sum > _GROWN, block_sum, 1).log2_()
            self._move(m + grown, m, s, u, tile)

    def _raise_reference(self, number: int, block: slice, tile: slice, x: torch.Tensor) -> None:
        """Make the maximum so far the reference, and x relative to it."""
        m, s, u = (self.table[i, tile] for i in (REFERENCE, SUM, MOMENT))
        best = x.amax(1)
        if self.top1:
            better = (best > 0).nonzero()[:, 0] if number else slice(None)
            self.table[TOP_ID, tile][better] = (x[better].argmax(1) + block.start).to(x.dtype)
        if number == 0:
            m.copy_(best)
            x.sub_(best[:, None])
        else:
            raised = m + best.clamp_min(0)
            x.sub_((raised - m)[:, None])
            self._move(raised, m, s, u, tile)

    def _remember(self, number: int, tile: slice, e, m, block_sum) -> None:
        if self.record.log_mass is not None:
            self.record.log_mass[number, tile] = m + block_sum.log2()
        if number < len(self.record.cached):
            cached, reference = self.record.cached[number]
            cached[tile], reference[tile] = e, m

    def _move(self, new: torch.Tensor, m, s, u, tile: slice) -> None:
        """Make ``new`` the reference of what is summed up so far."""
        shift = m - new  # exact, so that the sums stay relative to the very m that is stored
        scale = shift.exp2()
        u.add_(shift * s).mul_(scale)
        s.mul_(scale)
        if self.sum_squares:
            self.table[-1, tile].mul_(scale**2)
        m.copy_(new)


def gradient_room(rows: HeadRows, out_dtype: torch.dtype, blocks: Blocks) -> torch.Tensor:
    """Working room of ``fill_gradient`` and ``fill_gradient_from_cache``, to be used for block after block."""
    height = min(blocks.rows, rows.hidden.shape[0])
    return torch.empty(1 if out_dtype == rows.dtype else 2, height * min(blocks.columns, rows.weight.shape[0]),
                       dtype=rows.dtype, device=rows.hidden.device)


def fill_gradient(out: torch.Tensor, rows: HeadRows, block: slice, weight: torch.Tensor, gradient: LogitGradient,
                  blocks: Blocks, room: torch.Tensor) -> None:
    """out [n, c] = dz of one block of columns, from logits that are made anew."""
    bias = None if rows.bias is None else rows.bias[block]
    for tile in column_blocks(out.shape[0], blocks.rows):
        part = out[tile]
        e = room[0, :part.numel()].view(part.shape)
        x = part if len(room) == 1 else room[1, :part.numel()].view(part.shape)
        scaled_logits(x, rows.operand(rows.hidden[tile]), weight, bias, rows.scale_of(tile), gradient.reference[tile])
        if gradient.k1 is None:
            x.exp2_().mul_(gradient.k0[tile, None])
        else:
            torch.exp2(x, out=e)
            x.mul_(gradient.k1[tile, None]).add_(gradient.k0[tile, None]).mul_(e)
        _add_at_target(x, rows.columns[tile], block, gradient.at_target[tile])
        if x is not part:
            part.copy_(x)


def fill_gradient_from_cache(out: torch.Tensor, cached: tuple[torch.Tensor, torch.Tensor], rows: HeadRows,
                             block: slice, gradient: LogitGradient, blocks: Blocks, room: torch.Tensor) -> None:
    """out [n, c] = dz of one block of columns from (e [n, c] bf16, its reference [n]) of the forward."""
    cached, reference = cached
    gradient = gradient.rebased(reference)
    for tile in column_blocks(out.shape[0], blocks.rows):
        part = out[tile]
        x = room[0, :part.numel()].view(part.shape)
        e = part if len(room) == 1 else room[1, :part.numel()].view(part.shape)
        e.copy_(cached[tile])
        if gradient.k1 is None:
            e.mul_(gradient.k0[tile, None])
        else:
            torch.log2(e.clamp_min_(1e-38), out=x)
            e.mul_(x.mul_(gradient.k1[tile, None]).add_(gradient.k0[tile, None]))
        _add_at_target(e, rows.columns[tile], block, gradient.at_target[tile])
        if e is not part:
            part.copy_(e)


def _add_at_target(dz: torch.Tensor, columns: torch.Tensor, block: slice, at_target: torch.Tensor) -> None:
    """Before dz is rounded to the operands' dtype: a (1 - p) of a likely token is a small difference of large terms."""
    column, inside = _target_in(block, columns)
    dz.scatter_add_(1, column, torch.where(inside, at_target, 0)[:, None])


def _target_in(block: slice, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(column of the block [n, 1], whether the target is there [n]); a search for the rows would wait for a GPU."""
    inside = (columns >= block.start) & (columns < block.stop)
    return (columns - block.start).clamp(0, block.stop - block.start - 1)[:, None], inside
