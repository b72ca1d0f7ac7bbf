"""The state of a training without the training: weights and AdamW moments of a decoder, in ZeRO-3's flat runs."""

from __future__ import annotations

import math
from typing import Iterator

import torch

from megavg.checkpoint.parts import Part, parts_of_run
from megavg.checkpoint.weight_map import WeightEntry
from megavg.parallel.zero_state import MOMENTS

KINDS = ("weights", *MOMENTS)
_PIECE = 1 << 22
_VOCABULARY = 74
"""Rows of the embedding for each number in a token's width, as Qwen3-VL 2B has them."""


def entries(width: int, num_layers: int) -> Iterator[tuple[WeightEntry, tuple[int, ...]]]:
    """(entry, shape) of every parameter: Qwen3-VL's decoder at another width, half as many key-value heads."""
    text, rows = "model.language_model.", _VOCABULARY * width
    yield WeightEntry("embedding", (f"{text}embed_tokens.weight",)), (rows, width)
    for i in range(num_layers):
        layer, sizes = f"{text}layers.{i}.", (width, width // 2, width // 2)
        query, key, value = (f"{layer}self_attn.{n}_proj.weight" for n in "qkv")
        gate_up = tuple(f"{layer}mlp.{n}_proj.weight" for n in ("gate", "up"))
        yield WeightEntry(f"{i}.qkv", (query, key, value), 0, sizes), (2 * width, width)
        yield WeightEntry(f"{i}.out", (f"{layer}self_attn.o_proj.weight",)), (width, width)
        yield WeightEntry(f"{i}.gate_up", gate_up, 0, (3 * width,) * 2), (6 * width, width)
        yield WeightEntry(f"{i}.down", (f"{layer}mlp.down_proj.weight",)), (width, 3 * width)
        for name in ("self_attn.q_norm", "self_attn.k_norm"):
            yield WeightEntry(f"{i}.{name}", (f"{layer}{name}.weight",)), (width // 16,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield WeightEntry(f"{i}.{name}", (f"{layer}{name}.weight",)), (width,)
    yield WeightEntry("norm", (f"{text}norm.weight",)), (width,)
    yield WeightEntry("head", ("lm_head.weight",)), (rows, width)


def num_bytes_of(width: int, num_layers: int) -> int:
    """Bytes of all kinds of state together, in fp32."""
    return 4 * len(KINDS) * sum(math.prod(shape) for _, shape in entries(width, num_layers))


def width_of(num_bytes: float, num_layers: int) -> int:
    """The width, a multiple of 16, whose state is nearest to so many bytes."""
    about = int(1024 * math.sqrt(num_bytes / num_bytes_of(1024, num_layers))) // 16 * 16
    return min(range(max(16, about - 32), about + 48, 16),
               key=lambda width: abs(num_bytes_of(width, num_layers) - num_bytes))


class State:
    """What one of ``world_size`` data-parallel ranks holds, its parameters end to end in one buffer of each kind."""

    def __init__(self, width: int, num_layers: int, rank: int, world_size: int):
        self.rank, self.parts = rank, list[Part]()
        runs, total = [], 0
        for entry, shape in entries(width, num_layers):
            size = -(-math.prod(shape) // world_size)
            start = rank * size
            length = min(size, math.prod(shape) - start)
            if length > 0:
                runs.append((entry, shape, start, total, length))
                total += length
        self.flat = {kind: torch.empty(total) for kind in KINDS}
        for entry, shape, start, place, length in runs:
            values = {kind: flat[place:place + length] for kind, flat in self.flat.items()}
            self.parts += parts_of_run(entry, shape, start, values, 1, 0, True)
        self.fill()

    def _pieces(self) -> Iterator[tuple[torch.Tensor, torch.Generator]]:
        for number, flat in enumerate(self.flat.values()):
            generator = torch.Generator().manual_seed(1000 * self.rank + number)
            for piece in flat.split(_PIECE):
                yield piece, generator

    def fill(self) -> None:
        """Random numbers, the same at every call."""
        for piece, generator in self._pieces():
            piece.uniform_(-1, 1, generator=generator)

    def wipe(self) -> None:
        """Forget the numbers, so that a load has to bring them."""
        for flat in self.flat.values():
            flat.fill_(math.nan)

    def is_as_filled(self) -> bool:
        """Whether every number has the bits that ``fill`` gave it."""
        return all(torch.equal(piece, torch.empty_like(piece).uniform_(-1, 1, generator=generator))
                   for piece, generator in self._pieces())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every part by a name of its own: a rank may hold several boxes of a tensor."""
        return {f"{part.name}@{','.join(map(str, part.offsets))}": part.fetch() for part in self.parts}

    def largest_tensor_bytes(self) -> int:
        """Bytes of the largest whole tensor that this rank has a part of."""
        return max(math.prod(part.shape) * part.dtype.itemsize for part in self.parts)
