"""The Triton kernels behind ``vocab_triton``: statistics of the logits, and their gradient made anew or from a cache.

They work on tiles of ROWS x COLUMNS logits x = (h w + bias) scale, in bits and in fp32 registers. A column beyond the
head is masked after the product, so that it has no probability. Rows are multiplied by strides in 64 bits.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # load_backend refuses before a kernel is wanted; the modules can still be imported
    triton = tl = None

LOWEST = tl.constexpr(-3e38) if tl else None


def kernel(*free: str):
    """Compile the decorated function with Triton, and not anew for other values of the arguments named in ``free``."""
    return triton.jit(do_not_specialize=free) if triton else (lambda function: function)


@kernel()
def place(program, num_row_tiles, num_column_tiles, GROUP: tl.constexpr):
    """Row tile and column tile of a program: GROUP row tiles at a time go through all columns, which L2 then serves."""
    programs_of_group = GROUP * num_column_tiles
    first = program // programs_of_group * GROUP
    height = tl.minimum(num_row_tiles - first, GROUP)
    inside = program % programs_of_group
    return first + inside % height, inside // height


@kernel()
def row_scales(row_scale, scale, row, in_rows, ROWS: tl.constexpr):
    """[ROWS] log2 e / temperature, from [n] ``row_scale`` or, where that is None, from one number."""
    if row_scale is not None:
        return tl.load(row_scale + row, mask=in_rows, other=1.0)
    else:
        return tl.full((ROWS,), scale, tl.float32)


@kernel()
def logits(hidden, weight, bias, depth, hidden_stride, weight_stride, row, column, in_rows, in_columns, scales,
           ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr):
    """[ROWS, COLUMNS] logits in bits; what lies outside of the rows or columns is of no meaning."""
    hidden_rows = hidden + row.to(tl.int64)[:, None] * hidden_stride
    weight_rows = weight + column.to(tl.int64)[None, :] * weight_stride
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, depth, DEPTH):
        inner = first + tl.arange(0, DEPTH)
        h = tl.load(hidden_rows + inner[None, :], mask=in_rows[:, None] & (inner < depth)[None, :], other=0.0)
        w = tl.load(weight_rows + inner[:, None], mask=in_columns[None, :] & (inner < depth)[:, None], other=0.0)
        if UPCAST:
            h, w = h.to(tl.float32), w.to(tl.float32)
        sums = tl.dot(h, w, sums, input_precision="ieee")
    if bias is not None:
        sums += tl.load(bias + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    return sums * scales[:, None]


@kernel()
def remember(cache, references, e, m, block, num_rows, width, row, column, in_rows, in_columns, tile, num_tiles):
    """Store a tile of e in cache [blocks, n, width] and what it is relative to in references [blocks, n, num_tiles]."""
    cached_row = block.to(tl.int64) * num_rows + row
    place_in_cache = cache + cached_row[:, None] * width + column[None, :]
    tl.store(place_in_cache, e.to(tl.bfloat16), in_rows[:, None] & in_columns[None, :])
    tl.store(references + cached_row * num_tiles + tile, m, in_rows)


@kernel("num_rows", "splits", "num_parts", "num_cached", "num_row_tiles")
def statistics_kernel(hidden, weight, bias, row_scale, target_columns, parts, cache, references, num_rows, num_columns,
                      depth, hidden_stride, weight_stride, scale, width, splits, num_parts, num_cached, num_row_tiles,
                      ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SPLIT: tl.constexpr,
                      GROUP: tl.constexpr, TOP1: tl.constexpr, SUM_SQUARES: tl.constexpr, UPCAST: tl.constexpr):
    """parts [R, P, n] of (m, s, u, x_y[, top id][, sum of squares]).

    Part p is split p % splits of block p // splits; one that begins beyond its block is empty: (-inf, 0, 0, 0). The
    blocks before ``num_cached`` are remembered.
    """
    row_tile, part = place(tl.program_id(0), num_row_tiles, num_parts, GROUP)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    in_rows = row < num_rows
    scales = row_scales(row_scale, scale, row, in_rows, ROWS)
    target_column = tl.load(target_columns + row, mask=in_rows, other=-1).to(tl.int32)
    block = part // splits
    begin = block * width + part % splits * SPLIT
    end = tl.minimum(tl.minimum(begin + SPLIT, block * width + width), num_columns)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    zero = tl.zeros((ROWS,), tl.float32)
    s, u, target, squares = zero, zero, zero, zero
    top = tl.zeros((ROWS,), tl.int32)
    for start in range(begin, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        in_columns = column < end
        x = logits(hidden, weight, bias, depth, hidden_stride, weight_stride, row, column, in_rows, in_columns, scales,
                   ROWS, COLUMNS, DEPTH, UPCAST)
        if end - start < COLUMNS:
            x = tl.where(in_columns[None, :], x, LOWEST)
        highest = tl.max(x, 1)
        if TOP1:
            lowest_id = tl.min(tl.where(x == highest[:, None], column[None, :], 2**31 - 1), 1)
            top = tl.where(highest > m, lowest_id, top)
        raised = tl.maximum(m, highest)
        shift = tl.where(m == float("-inf"), 0.0, m - raised)  # nothing is summed up yet: -inf * 0 would be NaN
        shrink = tl.exp2(shift)
        here = tl.where((target_column >= start) & (target_column < end), target_column, -1)
        if tl.max(here, 0) >= 0:  # most tiles hold none of their rows' targets
            target += tl.sum(tl.where(column[None, :] == here[:, None], x, 0.0), 1)
        x -= raised[:, None]
        e = tl.exp2(x)
        u = shrink * (u + shift * s) + tl.sum(e * x, 1)
        s = shrink * s + tl.sum(e, 1)
        if SUM_SQUARES:
            squares = shrink * shrink * squares + tl.sum(e * e, 1)
        m = raised
        if cache is not None:
            if block < num_cached:
                remember(cache, references, e, m, block, num_rows, width, row, column - block * width, in_rows,
                         in_columns, (start - block * width) // COLUMNS, tl.cdiv(width, COLUMNS))
    of_part = parts + part.to(tl.int64) * num_rows + row
    step = num_parts.to(tl.int64) * num_rows
    tl.store(of_part, m, in_rows)
    tl.store(of_part + step, s, in_rows)
    tl.store(of_part + 2 * step, u, in_rows)
    tl.store(of_part + 3 * step, target, in_rows)
    if TOP1:
        tl.store(of_part + 4 * step, top.to(tl.float32), in_rows)
    if SUM_SQUARES:
        tl.store(of_part + (4 + TOP1) * step, squares, in_rows)


@kernel("num_rows", "block_start", "num_row_tiles", "num_column_tiles")
def gradient_kernel(out, hidden, weight, bias, row_scale, target_columns, reference, k0, k1, at_target, num_rows,
                    num_columns, depth, out_stride, hidden_stride, weight_stride, scale, block_start, num_row_tiles,
                    num_column_tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
                    GROUP: tl.constexpr, UPCAST: tl.constexpr):
    """out [n, c] = 2^(x - m) (k0 + k1 (x - m)) + at_target at the target, of one block; k1 None where it is zero."""
    row_tile, column_tile = place(tl.program_id(0), num_row_tiles, num_column_tiles, GROUP)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = row < num_rows, column < num_columns
    x = logits(hidden, weight, bias, depth, hidden_stride, weight_stride, row, column, in_rows, in_columns,
               row_scales(row_scale, scale, row, in_rows, ROWS), ROWS, COLUMNS, DEPTH, UPCAST)
    x -= tl.load(reference + row, mask=in_rows, other=0.0)[:, None]
    add_up_gradient(out, x, tl.exp2(x), target_columns, k0, k1, at_target, row, column, in_rows, in_columns, out_stride,
                    block_start)


@kernel("num_rows", "block_start")
def cached_gradient_kernel(out, cache, references, target_columns, reference, k0, k1, at_target, num_rows, num_columns,
                           out_stride, cache_stride, references_stride, block_start, ROWS: tl.constexpr,
                           COLUMNS: tl.constexpr):
    """The same from cache [n, c], 2^(x - m') with m' of each row and tile of COLUMNS in references [n, tiles]."""
    tile = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = row < num_rows, column < num_columns
    inside = in_rows[:, None] & in_columns[None, :]
    wide_row = row.to(tl.int64)
    e = tl.load(cache + wide_row[:, None] * cache_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(references + wide_row * references_stride + tile, mask=in_rows, other=0.0)
    shift -= tl.load(reference + row, mask=in_rows, other=0.0)
    x = e
    if k1 is not None:  # of an entry that is 0 it matters not, but must be finite
        x = tl.log2(tl.maximum(e, 2e-38)) + shift[:, None]
    add_up_gradient(out, x, e * tl.exp2(shift)[:, None], target_columns, k0, k1, at_target, row, column, in_rows,
                    in_columns, out_stride, block_start)


@kernel()
def add_up_gradient(out, x, e, target_columns, k0, k1, at_target, row, column, in_rows, in_columns, out_stride,
                    block_start):
    """Store e (k0 + k1 x) + at_target, rounded as a sum: a (1 - p) of a likely target is a small difference."""
    factor = tl.load(k0 + row, mask=in_rows, other=0.0)[:, None]
    if k1 is not None:
        dz = e * (factor + tl.load(k1 + row, mask=in_rows, other=0.0)[:, None] * x)
    else:
        dz = e * factor
    target_column = tl.load(target_columns + row, mask=in_rows, other=-1).to(tl.int32) - block_start
    added = tl.load(at_target + row, mask=in_rows, other=0.0)
    dz += tl.where(column[None, :] == target_column[:, None], added[:, None], 0.0)
    place_in_out = out + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(place_in_out, dz.to(out.dtype.element_ty), in_rows[:, None] & in_columns[None, :])
