"""The Triton backend of the vocabulary ops: logits live in registers only, and each result is stored once.

Not yet run on a GPU: tested in Triton's interpreter, and compiled by Triton 3.7 for sm_90 (H100, H200) with the tiles
below: 144 KB of shared memory for bf16 and fp16, 32 KB for fp32, and next to nothing spilled within the loops of the
matrix products. Sums are relative to a running maximum: no tile is done twice, however large the logits.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from megavg.ops import vocab_triton_kernels as kernels
from megavg.ops.vocab_rows import BlockRecord, Blocks, HeadRows, LogitGradient, column_blocks
from megavg.ops.vocab_shard import REFERENCE, SUM, merge_tables

INTERPRETED = kernels.triton is not None and not any(
    isinstance(function, kernels.triton.JITFunction) for function in (kernels.statistics_kernel, kernels.tl.sum))
"""Whether kernels run in Triton's interpreter, on a CPU: TRITON_INTERPRET=1 was set when Triton was imported."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tiles:
    """What one program of a kernel works on.

    Attributes:
        rows, columns, depth: the tile of one step of a matrix product.
        split: columns that one program of the forward goes through, a multiple of ``columns``.
        cached_rows: rows of a tile of ``columns`` that is read from the cache.
        warps, stages: of a program that multiplies matrices.
        group: how many tiles of rows go through the columns together, so that both operands come from the L2 cache.
    """

    rows: int
    columns: int
    depth: int
    split: int
    cached_rows: int = 16
    warps: int = 8
    stages: int = 3
    group: int = 16

    @classmethod
    def of(cls, dtype: torch.dtype, interpreted: bool = INTERPRETED) -> "Tiles":
        """The largest tiles whose sums fit the registers; fp32 is multiplied exactly, without tensor cores."""
        if interpreted:  # small, so that small tests meet borders of tiles
            return cls(16, 64, 32, split=128, group=2)
        if dtype == torch.float32:
            return cls(128, 128, 16, split=2048)
        return cls(128, 256, 64, split=2048)

    def options(self) -> dict[str, int | bool]:
        """Keywords of a kernel that multiplies matrices. The interpreter's products of bf16 are wrong, hence UPCAST."""
        return dict(ROWS=self.rows, COLUMNS=self.columns, DEPTH=self.depth, GROUP=self.group, UPCAST=INTERPRETED,
                    num_warps=self.warps, num_stages=self.stages)


def statistics(rows: HeadRows, blocks: Blocks, top1: bool = False, sum_squares: bool = False, want_mass: bool = False,
               cache_bytes: int = 0) -> tuple[torch.Tensor, BlockRecord]:
    """(m, s, u, x_y) of every row over this rank's columns, [R, n]; an empty shard gives (-inf, 0, 0, 0).

    ``top1`` appends a row with the most likely column, ``sum_squares`` one with sum 2^(2 (x-m)).

    Raises:
        ValueError: a dtype without kernels, such as float64.
    """
    if rows.hidden.dtype not in _DTYPES:
        raise ValueError(f"backend 'triton' takes fp32, bf16 and fp16, got {rows.hidden.dtype}; take backend 'torch'")
    n, v = rows.hidden.shape[0], rows.weight.shape[0]
    slices = column_blocks(v, blocks.columns)
    table = torch.zeros(4 + top1 + sum_squares, n, dtype=torch.float32, device=rows.hidden.device)
    record = BlockRecord(table.new_empty(len(slices), n) if want_mass else None)
    if not n or not v:
        table[REFERENCE] = -torch.inf
        return table, record
    tiles, width = Tiles.of(rows.hidden.dtype), min(blocks.columns, v)
    splits = _ceil(width, tiles.split)
    num_parts, num_row_tiles = len(slices) * splits, _ceil(n, tiles.rows)
    parts = table.new_empty(len(table), len(slices), splits, n)
    cache, references = _make_cache(rows, slices[:cache_bytes // (2 * n * width)], width, tiles, record)
    _launch(kernels.statistics_kernel, (num_row_tiles * num_parts,), **_operands(rows, rows.weight, rows.bias),
            parts=parts, cache=cache, references=references, num_rows=n, num_columns=v, width=width, splits=splits,
            num_parts=num_parts, num_cached=len(record.cached), num_row_tiles=num_row_tiles, SPLIT=tiles.split,
            TOP1=top1, SUM_SQUARES=sum_squares, **tiles.options())
    of_blocks = merge_tables(parts.permute(2, 0, 1, 3).double(), top1, sum_squares)  # [R, blocks, n]
    if want_mass:
        record.log_mass = (of_blocks[REFERENCE] + of_blocks[SUM].log2()).float()
    return merge_tables(of_blocks.transpose(0, 1), top1, sum_squares).float(), record


def _make_cache(rows: HeadRows, slices: list[slice], width: int, tiles: Tiles,
                record: BlockRecord) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Room for the entries of some blocks and for what they are relative to, a number for each row and tile."""
    if not slices:
        return None, None
    cache = rows.hidden.new_empty(len(slices), rows.hidden.shape[0], width, dtype=torch.bfloat16)
    references = cache.new_empty(*cache.shape[:2], _ceil(width, tiles.columns), dtype=torch.float32)
    record.cached = [(cache[i, :, :s.stop - s.start], references[i]) for i, s in enumerate(slices)]
    return cache, references


def gradient_room(rows: HeadRows, out_dtype: torch.dtype, blocks: Blocks) -> torch.Tensor:
    """Nothing: the kernels need no room."""
    return rows.hidden.new_empty(0)


def fill_gradient(out: torch.Tensor, rows: HeadRows, block: slice, weight: torch.Tensor, gradient: LogitGradient,
                  blocks: Blocks, room: torch.Tensor) -> None:
    """out [n, c] = dz of one block of columns, from logits that are made anew."""
    if not out.numel():
        return
    tiles = Tiles.of(rows.hidden.dtype)
    num_row_tiles, num_column_tiles = _ceil(out.shape[0], tiles.rows), _ceil(out.shape[1], tiles.columns)
    _launch(kernels.gradient_kernel, (num_row_tiles * num_column_tiles,),
            **_operands(rows, weight, None if rows.bias is None else rows.bias[block]),
            **_gradient(out, gradient, block), num_row_tiles=num_row_tiles, num_column_tiles=num_column_tiles,
            **tiles.options())


def fill_gradient_from_cache(out: torch.Tensor, cached: tuple[torch.Tensor, torch.Tensor], rows: HeadRows,
                             block: slice, gradient: LogitGradient, blocks: Blocks, room: torch.Tensor) -> None:
    """out [n, c] = dz of one block of columns from (e [n, c] bf16, its references [n, tiles]) of the forward."""
    if not out.numel():
        return
    cache, references = cached
    tiles = Tiles.of(rows.hidden.dtype)
    grid = _ceil(out.shape[0], tiles.cached_rows), _ceil(out.shape[1], tiles.columns)
    _launch(kernels.cached_gradient_kernel, grid, cache=cache, references=references,
            target_columns=rows.columns.contiguous(), cache_stride=cache.stride(0),
            references_stride=references.stride(0), **_gradient(out, gradient, block), ROWS=tiles.cached_rows,
            COLUMNS=tiles.columns)


def _operands(rows: HeadRows, weight: torch.Tensor, bias: torch.Tensor | None) -> dict:
    """Arguments of which logits are made; rows may lie apart, but not the numbers of a row."""
    hidden, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (rows.hidden, weight))
    of_rows = isinstance(rows.scale, torch.Tensor)
    return dict(hidden=hidden, weight=weight, bias=None if bias is None else bias.contiguous(), depth=hidden.shape[1],
                hidden_stride=hidden.stride(0), weight_stride=weight.stride(0),
                row_scale=rows.scale.contiguous() if of_rows else None, scale=0.0 if of_rows else float(rows.scale),
                target_columns=rows.columns.contiguous())


def _gradient(out: torch.Tensor, gradient: LogitGradient, block: slice) -> dict:
    """Arguments of which the gradient is made out of logits."""
    k0, at_target, reference = (t.contiguous() for t in (gradient.k0, gradient.at_target, gradient.reference))
    return dict(out=out, reference=reference, k0=k0, k1=None if gradient.k1 is None else gradient.k1.contiguous(),
                at_target=at_target, num_rows=out.shape[0], num_columns=out.shape[1], out_stride=out.stride(0),
                block_start=block.start)


def _ceil(size: int, tile: int) -> int:
    return -(-size // tile)


def _launch(kernel, grid: tuple[int, ...], **arguments) -> None:
    """Run a kernel on its tensors' device; with fused multiply-adds the largest logit less itself would not be 0."""
    device = arguments["target_columns"].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](**arguments, enable_fp_fusion=False)
