"""How the tools write a layout: the sizes of its parallelisms, such as tp2pp2dp2. Standard library only."""

from __future__ import annotations

import re
from typing import NamedTuple


class Layout(NamedTuple):
    """Sizes of tensor, pipeline and data parallelism."""

    tp: int
    pp: int
    dp: int

    @property
    def num_processes(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        return "".join(f"{name}{size}" for name, size in self._asdict().items() if size > 1) or "tp1"


def read_layout(text: str) -> Layout:
    """"tp2pp2" -> Layout(2, 2, 1)."""
    parts = re.findall(r"(tp|pp|dp)([1-9]\d*)", text)
    sizes = {name: int(size) for name, size in parts}
    if not parts or len(sizes) != len(parts) or "".join(map("".join, parts)) != text:
        raise ValueError(f"layout {text!r} must give sizes of tensor, pipeline and data parallelism, such as tp2pp2dp2 "
                         "or pp4")
    return Layout(*(sizes.get(name, 1) for name in ("tp", "pp", "dp")))
