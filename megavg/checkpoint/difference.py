"""How far the tensors of two folders lie apart: names, shapes, dtypes, norms of differences, equal bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Callable

import torch

from megavg.checkpoint.survey import PIECE, Holding, groups

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Difference:
    """Sums over pairs of tensors.

    Attributes:
        equal: tensors that are equal bit for bit.
        squares: sum of (a - b)^2 over numbers that are finite on both sides ...
        first_squares: ... and of a^2.
        largest: |a - b| of those.
        not_finite: numbers that differ and are NaN or Inf on a side.
    """

    tensors: int = 0
    equal: int = 0
    squares: float = 0.0
    first_squares: float = 0.0
    largest: float = 0.0
    not_finite: int = 0

    def add(self, other: Difference) -> None:
        """Take another pair's in."""
        self.tensors, self.equal = self.tensors + other.tensors, self.equal + other.equal
        self.squares, self.first_squares = self.squares + other.squares, self.first_squares + other.first_squares
        self.largest, self.not_finite = max(self.largest, other.largest), self.not_finite + other.not_finite

    def row(self, group: str) -> dict[str, Any]:
        """As a line of a table; ``relative`` is None where the first side is zero and the other is not."""
        norm, first = math.sqrt(self.squares), math.sqrt(self.first_squares)
        relative = norm / first if first else None if norm else 0.0
        return {"group": group, "tensors": self.tensors, "equal": self.equal, "norm": norm, "relative": relative,
                "largest": self.largest, "not_finite": self.not_finite}


def difference_of(first: torch.Tensor, second: torch.Tensor, dtype: torch.dtype | None) -> Difference:
    """Compare two tensors of one shape, piece by piece.

    Args:
        dtype: both are cast to it before; None takes the narrowest that holds both exactly.
    """
    dtype = dtype or torch.promote_types(first.dtype, second.dtype)
    found, equal = Difference(tensors=1), True
    for ours, theirs in zip(first.reshape(-1).split(PIECE), second.reshape(-1).split(PIECE), strict=True):
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        same = ours.view(_BITS[dtype.itemsize]) == theirs.view(_BITS[dtype.itemsize])
        equal = equal and bool(same.all())
        exact = ours.double()
        gap = torch.where(same, 0.0, exact - theirs.double())  # NaN - NaN of the same bits is no difference
        exact, fits = torch.where(exact.isfinite(), exact, 0.0), gap.isfinite()
        if not fits.all():
            found.not_finite += int((~fits).sum())
            gap = torch.where(fits, gap, 0.0)
        found.squares += float(gap.dot(gap))
        found.first_squares += float(exact.dot(exact))
        if gap.numel():
            found.largest = max(found.largest, float(gap.abs().max()))
    found.equal = int(equal)
    return found


def compare(first: Holding, second: Holding, by: str, dtype: torch.dtype | None,
            tick: Callable[[int], None]) -> dict[str, Any]:
    """Everything in which two folders differ, and tables by group; a pair of tensors is in memory at a time.

    Kinds of state that only one folder has at all (a Hugging Face directory has no optimiser's) are named, and are no
    difference; nor is a dtype, where the numbers are equal.

    Args:
        by: see ``megavg.checkpoint.survey.groups``.
        dtype: see ``difference_of``.
        tick: is told of the first folder's bytes as they are done.
    """
    kinds = [kind for kind in first.kinds if kind in second.kinds]
    ours, theirs = ({name for name in side.tensors if name.split("/", 1)[0] in kinds} for side in (first, second))
    both = ours & theirs
    facts = {name: (first.tensors[name], second.tensors[name]) for name in sorted(both)}
    shapes = [{"name": name, "first": list(a[0]), "second": list(b[0])} for name, (a, b) in facts.items()
              if a[0] != b[0]]
    dtypes = [{"name": name, "first": str(a[1]), "second": str(b[1])} for name, (a, b) in facts.items() if a[1] != b[1]]
    comparable, tables, total = both - {entry["name"] for entry in shapes}, {}, Difference()
    for kind in kinds:
        rows, of_kind = [], Difference()
        of_this = [name.split("/", 1)[1] for name in comparable if name.startswith(f"{kind}/")]
        for group, names in groups(of_this, by).items():
            of_group = Difference()
            for name in (f"{kind}/{name}" for name in names):
                of_group.add(difference_of(first.read(name), second.read(name), dtype))
                tick(math.prod(first.tensors[name][0]) * first.tensors[name][1].itemsize)
            rows.append(of_group.row(group))
            of_kind.add(of_group)
        tables[kind] = [*rows, of_kind.row("all")]
        total.add(of_kind)
    return {"equal": ours == theirs and not shapes and total.equal == total.tensors,
            "only_in_first": sorted(ours - theirs), "only_in_second": sorted(theirs - ours), "shapes": shapes,
            "dtypes": dtypes, "not_compared": sorted(set(first.kinds) ^ set(second.kinds)),
            "tensors": total.tensors, "equal_tensors": total.equal, "tables": tables}
