"""What a model's folder holds, tensor by tensor: norms, largest values, NaNs, and what another folder has otherwise."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable

import torch

from megavg.checkpoint.errors import CheckpointError
from megavg.checkpoint.hf import HFCheckpoint
from megavg.checkpoint.manifest import MANIFEST, read_manifest, wrong_files
from megavg.checkpoint.saved import WEIGHTS, SavedCheckpoint, is_saved, open_checkpoint
from megavg.checkpoint.sharded import ShardedFolder
from megavg.checkpoint.train_state import STATE, TRAINER, checkpoints

PIECE = 1 << 19
"""Numbers that are looked at together: whole tensors in fp64 would need several times their memory."""

# in the order in which an image and its question go through the model
_LAYERS = [(re.compile(pattern), title) for pattern, title in (
    (r"model\.visual\.(?:patch_embed|pos_embed)\.", "vision embedding"),
    (r"model\.visual\.blocks\.(\d+)\.", "vision block {}"),
    (r"model\.visual\.merger\.", "merger"),
    (r"model\.visual\.deepstack_merger_list\.(\d+)\.", "deepstack merger {}"),
    (r"model\.language_model\.embed_tokens\.", "embedding"),
    (r"model\.language_model\.layers\.(\d+)\.", "decoder layer {}"),
    (r"model\.language_model\.norm\.", "final norm"),
    (r"lm_head\.", "head"))]


@dataclass(frozen=True)
class Holding:
    """The tensors of a folder of either kind.

    Attributes:
        path: the folder.
        directory: where config.json is.
        manifest: of a checkpoint of a run; None of a Hugging Face directory.
        tensors: name, such as ``exp_avg/lm_head.weight``, -> (shape, dtype).
        read: gives a whole tensor as it is stored; it is nobody else's.
        tied_head: whether the directory also stores, as lm_head.weight, the embedding that is its head. It is left
            out: nothing that loads the model reads it.
    """

    path: Path
    directory: Path
    manifest: dict[str, Any] | None
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    read: Callable[[str], torch.Tensor]
    tied_head: bool = False

    @property
    def kinds(self) -> list[str]:
        """Kinds of state: weights first, then the optimiser's."""
        return sorted({name.split("/", 1)[0] for name in self.tensors}, key=lambda kind: (kind != "weights", kind))

    def names(self, kind: str) -> list[str]:
        """Names of one kind's tensors, without the kind."""
        return [name.split("/", 1)[1] for name in self.tensors if name.startswith(f"{kind}/")]


def find_checkpoint(path: str | Path) -> Path:
    """The folder itself where it is a checkpoint or a Hugging Face directory; a run's output folder has its newest."""
    path = Path(path)
    if is_saved(path) or (path / STATE).is_dir():
        return path
    for folder in (path / "checkpoints", path):
        there = checkpoints(folder)
        if there:
            return there[-1]
    if (path / "config.json").is_file():
        return path
    raise CheckpointError(f"{path} holds no checkpoint; expected a folder such as checkpoints/step-000100, the output "
                          "folder of a run that saved one, or a Hugging Face directory")


def open_holding(path: Path) -> Holding:
    """Open what ``find_checkpoint`` gave.

    Raises:
        CheckpointError, ValueError, FileNotFoundError: it is incomplete or damaged.
    """
    if (path / STATE).is_dir():
        read_manifest(path)  # says what an unfinished checkpoint lacks
    opened = open_checkpoint(path)
    if isinstance(opened, SavedCheckpoint):
        state = ShardedFolder(path / STATE)
        return Holding(path, opened.directory, opened.manifest, state.tensors, state.read)
    tensors = {WEIGHTS + name: opened.facts(name) for name in opened.names}
    head = WEIGHTS + "lm_head.weight"
    tied = head in tensors and WEIGHTS + "model.language_model.embed_tokens.weight" in tensors and \
        _is_tied(opened.directory)
    if tied:
        del tensors[head]

    def read(name: str) -> torch.Tensor:
        # a file is mapped, and pages that were read count as this process' memory for as long as it is open
        return HFCheckpoint(path).read(name.removeprefix(WEIGHTS))

    return Holding(path, opened.directory, None, tensors, read, tied)


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy the folder again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is damaged: expected a JSON object; copy the folder again")
    return config


def _is_tied(directory: Path) -> bool:
    config = _config(directory)
    return bool(config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings", False)))


def describe(holding: Holding) -> dict[str, Any]:
    """What the folder is and what wrote it, as plain JSON; what is not known is left out."""
    manifest, found = holding.manifest or {}, {"path": str(holding.path)}
    found["what"] = "checkpoint of a run" if holding.manifest else "Hugging Face directory"
    found["family"] = manifest.get("family") or _config(holding.directory).get("model_type", "unknown")
    for key in ("step", "layout", "world_size", "dtype", "legacy_names", "written", "versions"):
        if key in manifest:
            found[key] = manifest[key]
    if (holding.path / TRAINER).is_file() and holding.manifest:
        state = json.loads((holding.path / TRAINER).read_text())
        found["algorithm"] = state.get("algorithm", {}).get("name", "unknown")
        found["optimizer_steps"] = state.get("optimizer_steps", 0)
        found["data"] = {key: value for key, value in state.get("data", {}).items() if key in ("epoch", "consumed")}
    found["bytes"] = sum(path.stat().st_size for path in holding.path.rglob("*") if path.is_file())
    found["state"] = {kind: _sizes(holding.tensors[f"{kind}/{name}"] for name in holding.names(kind))
                      for kind in holding.kinds}
    found["tied_head_left_out"] = holding.tied_head
    return found


def _sizes(facts: Iterable[tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Any]:
    facts = list(facts)
    dtypes = Counter(_dtype_name(dtype) for _, dtype in facts)
    return {"tensors": len(facts), "parameters": sum(math.prod(shape) for shape, _ in facts),
            "bytes": sum(math.prod(shape) * dtype.itemsize for shape, dtype in facts), "dtypes": dict(dtypes)}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_files(path: Path) -> tuple[list[str], list[str]]:
    """(one line for each damaged file of a checkpoint of a run, files that its manifest does not know); reads all."""
    files = read_manifest(path)["files"]
    there = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    return wrong_files(path, files), sorted(there - set(files) - {MANIFEST})


def groups(names: Iterable[str], by: str) -> dict[str, list[str]]:
    """Names of tensors by "layer", by "tensor", or by "kind" (the same tensor of all layers), in the model's order."""
    found: dict[str, list[str]] = {}
    for name in sorted(names, key=_place):
        group = {"layer": _layer(name), "tensor": name, "kind": re.sub(r"\.\d+\.", ".*.", name)}[by]
        found.setdefault(group, []).append(name)
    return found


def _match(name: str) -> tuple[int, int, str]:
    """(place of the pattern that fits, number of the layer, title)."""
    for place, (pattern, title) in enumerate(_LAYERS):
        found = pattern.match(name)
        if found:
            number = int(found.group(1)) if pattern.groups else 0
            return place, number, title.format(number)
    return len(_LAYERS), 0, name


def _place(name: str) -> tuple[int, int, str]:
    return (*_match(name)[:2], name)


def _layer(name: str) -> str:
    return _match(name)[2]


@dataclass
class Figures:
    """Sums over tensors: ``squares`` and ``largest`` are those of the finite numbers.

    Attributes:
        kinds: dtypes and shapes, each with the number of tensors that have it.
    """

    kinds: Counter = field(default_factory=Counter)
    parameters: int = 0
    bytes: int = 0
    squares: float = 0.0
    largest: float = 0.0
    nan: int = 0
    inf: int = 0

    def add(self, other: Figures) -> None:
        """Take another tensor's in."""
        self.kinds += other.kinds
        self.parameters, self.bytes = self.parameters + other.parameters, self.bytes + other.bytes
        self.squares, self.largest = self.squares + other.squares, max(self.largest, other.largest)
        self.nan, self.inf = self.nan + other.nan, self.inf + other.inf

    def row(self, group: str, tensors: int) -> dict[str, Any]:
        """As a line of a table."""
        dtypes = Counter()
        for (dtype, _), count in self.kinds.items():
            dtypes[dtype] += count
        shapes = list(dict.fromkeys(shape for _, shape in self.kinds))
        return {"group": group, "tensors": tensors, "dtypes": dict(dtypes),
                "shape": list(shapes[0]) if len(shapes) == 1 else None, "parameters": self.parameters,
                "bytes": self.bytes,
                "norm": math.sqrt(self.squares), "largest": self.largest, "nan": self.nan, "inf": self.inf}


def figures_of(tensor: torch.Tensor) -> Figures:
    """Measure one tensor in fp64, piece by piece."""
    found = Figures(Counter([(_dtype_name(tensor.dtype), tuple(tensor.shape))]), tensor.numel(), tensor.nbytes)
    for piece in tensor.reshape(-1).split(PIECE):
        if not piece.numel():
            continue
        low, high = piece.aminmax()  # a NaN goes through to both
        if not (low.isfinite() and high.isfinite()):
            found.nan, found.inf = found.nan + int(piece.isnan().sum()), found.inf + int(piece.isinf().sum())
            piece = piece[piece.isfinite()]
            if not piece.numel():
                continue
            low, high = piece.aminmax()
        exact = piece.double()
        found.squares += float(exact.dot(exact))
        found.largest = max(found.largest, -float(low), float(high))
    return found


def survey(holding: Holding, by: str, tick: Callable[[int], None]) -> dict[str, Any]:
    """Tables of every kind of state, and the tensors with NaN or Inf; reads everything, one tensor at a time.

    Args:
        by: see ``groups``.
        tick: is told of bytes as they are done.
    """
    tables, not_finite = {}, []
    for kind in holding.kinds:
        rows, total = [], Figures()
        for group, names in groups(holding.names(kind), by).items():
            of_group = Figures()
            for name in names:
                found = figures_of(holding.read(f"{kind}/{name}"))
                of_group.add(found)
                if found.nan or found.inf:
                    not_finite.append({"name": f"{kind}/{name}", "nan": found.nan, "inf": found.inf})
                tick(found.bytes)
            rows.append(of_group.row(group, len(names)))
            total.add(of_group)
        tables[kind] = [*rows, total.row("all", len(holding.names(kind)))]
    return {"tables": tables, "not_finite": not_finite}
