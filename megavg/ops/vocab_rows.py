"""What the backends of the vocabulary ops work on: rows, blocks of columns, and the two scalars of a row's gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

NATS = math.log(2)
"""One bit in nats: inside the ops logarithms are to base 2."""


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """In which logits and statistics are held: fp32, or fp64 for fp64 input."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Blocks:
    """Size of the tiles of logits: ``rows`` tokens at a time, ``columns`` of the vocabulary."""

    rows: int
    columns: int

    def __post_init__(self):
        if self.rows < 1 or self.columns < 1:
            raise ValueError(f"tiles need at least one row and one column, got {self.rows} x {self.columns}")

    @classmethod
    def default(cls, num_rows: int, device: torch.device, skips: bool = False) -> "Blocks":
        """What was the fastest among what is small (on a CPU; the sizes for a GPU are not yet measured).

        The gradient of one block of columns is held for all rows; never fewer than 256 columns, however many rows, as
        narrow products are bound by memory. Where blocks are to be skipped on a GPU they are narrower, as few wide ones
        hold little.
        """
        num_rows = max(1, num_rows)
        if device.type == "cpu":
            return cls(1024, max(256, min(1024, 2**22 // num_rows)))
        return cls(1024, 2048 if skips else max(2048, min(16384, 2**27 // num_rows // 256 * 256)))


@dataclass(frozen=True)
class HeadRows:
    """Rows to be scored under this rank's part of the head.

    Attributes:
        hidden: [n, D].
        weight: [v, D], the real rows of the shard.
        bias: [v] or None.
        columns: [n] int64, the target's row of ``weight``, or -1 where another rank holds it.
        scale: log2 e / temperature, a number or [n].
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    columns: torch.Tensor
    scale: float | torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        """In which logits and statistics are held: fp32, or fp64 for fp64 input."""
        return compute_dtype(self.hidden)

    def select(self, rows: torch.Tensor) -> "HeadRows":
        """A copy of the given rows [k]; everything as it is where these are all."""
        if rows.numel() == self.hidden.shape[0]:
            return self
        scale = self.scale.index_select(0, rows) if isinstance(self.scale, torch.Tensor) else self.scale
        return HeadRows(self.hidden.index_select(0, rows), self.weight, self.bias, self.columns.index_select(0, rows),
                        scale)

    @property
    def operand_dtype(self) -> torch.dtype:
        """Of what the matrix products take."""
        return self.dtype if self.hidden.device.type == "cpu" else self.hidden.dtype

    def operand(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` as the matrix products take it: bf16 products on a CPU are slower than fp32 ones and round."""
        return tensor.to(self.operand_dtype)

    def scale_of(self, rows) -> float | torch.Tensor:
        """The scale of a slice of rows."""
        return self.scale[rows] if isinstance(self.scale, torch.Tensor) else self.scale


@dataclass
class BlockRecord:
    """What the forward remembers of the blocks for the backward.

    Attributes:
        log_mass: [number of blocks, n] log2 sum_block 2^x, or None.
        cached: for the first blocks (2^(x-m) [n, c] bf16, m [n, ...] as the backend has it), which need no second
            matrix product.
    """

    log_mass: torch.Tensor | None = None
    cached: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def tensors(self) -> list[torch.Tensor | None]:
        """Everything as one list, as autograd keeps it (and lets go of it after the backward)."""
        return [self.log_mass, *(tensor for block in self.cached for tensor in block)]

    @classmethod
    def of_tensors(cls, tensors: list[torch.Tensor | None]) -> "BlockRecord":
        """The inverse of ``tensors``."""
        return cls(tensors[0], list(zip(tensors[1::2], tensors[2::2])))

    def mass_of(self, number: int, rows: torch.Tensor | None) -> torch.Tensor:
        """[k] log2 mass of a block, of the given rows or of all."""
        return self.log_mass[number] if rows is None else self.log_mass[number].index_select(0, rows)

    def cached_of(self, number: int, rows: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """A cached block, of the given rows or of all; only one block is ever copied."""
        e, m = self.cached[number]
        return (e, m) if rows is None else (e.index_select(0, rows), m.index_select(0, rows))


def column_blocks(num_columns: int, width: int) -> list[slice]:
    """Consecutive slices of at most ``width``."""
    return [slice(start, min(start + width, num_columns)) for start in range(0, num_columns, width)]


@dataclass(frozen=True)
class LogitGradient:
    """dz_j = e_j (k0 + k1 x_j) + at_target [j = y] with x = logits in bits - reference, e = 2^x; each [n].

    ``k1`` is None where entropy has no gradient.
    """

    reference: torch.Tensor
    k0: torch.Tensor
    k1: torch.Tensor | None
    at_target: torch.Tensor

    @classmethod
    def of_scores(cls, upstream_logprob, upstream_entropy, reference, total, entropy, scale) -> "LogitGradient":
        """From a = dL/dlog p_y and b = dL/dH: dz_j = (1/T) (a [j = y] - p_j (a + b H + b log p_j)).

        Worked out in fp64: the two scalars of a row are all that is kept of the softmax.
        """
        dtype = reference.dtype
        inverse_temperature = scale * NATS
        a = upstream_logprob.double() * inverse_temperature
        if upstream_entropy is None:
            return cls(reference, (-a / total.double()).to(dtype), None, a.to(dtype))
        s, b = total.double(), upstream_entropy.double() * inverse_temperature
        slope = -b * NATS
        constant = -(a + b * entropy.double()) - slope * s.log2()
        return cls(reference, (constant / s).to(dtype), (slope / s).to(dtype), a.to(dtype))

    def select(self, rows: torch.Tensor) -> "LogitGradient":
        return LogitGradient(self.reference.index_select(0, rows), self.k0.index_select(0, rows),
                             None if self.k1 is None else self.k1.index_select(0, rows),
                             self.at_target.index_select(0, rows))

    def rebased(self, reference: torch.Tensor) -> "LogitGradient":
        """The same for x relative to another reference [n]."""
        shift = reference - self.reference
        scale = shift.exp2()
        if self.k1 is None:
            return LogitGradient(reference, self.k0 * scale, None, self.at_target)
        return LogitGradient(reference, (self.k0 + self.k1 * shift) * scale, self.k1 * scale, self.at_target)
