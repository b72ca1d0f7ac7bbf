"""Read a converted folder again and compare it with what it was made of: names, shapes, bytes, index, other files."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Sequence

import torch

from megavg.checkpoint.convert import NO_LAYOUT, Source
from megavg.checkpoint.convert_file import numbers
from megavg.checkpoint.hf import INDEX, SINGLE, copy_side_files
from megavg.checkpoint.manifest import MANIFEST, read_manifest, wrong_files

_DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class FilesJob:
    """Files of a checkpoint of a run whose checksums are to be looked at."""

    folder: Path
    files: tuple[str, ...]


def do_checksums(job: FilesJob, tick: Callable[[int], None]) -> list[str]:
    """One line for each file that is not as the manifest says; ``tick`` is told of bytes."""
    files, wrong = read_manifest(job.folder)["files"], []
    for name in job.files:
        wrong += wrong_files(job.folder, {name: files[name]})
        tick(files[name]["bytes"])
    return wrong


@dataclass(frozen=True)
class CompareJob:
    """Tensors of two folders that have to be equal, those of ``source`` cast to ``dtype``."""

    source: Path
    dtype: torch.dtype | None
    out: Path
    names: tuple[str, ...]


def do_compare(job: CompareJob, tick: Callable[[int], None]) -> list[str]:
    """One line for each tensor that differs in shape, dtype or a single bit; ``tick`` is told of bytes."""
    source, out, wrong = Source(job.source, job.dtype), Source(job.out), []
    for name in job.names:
        expected = source.read(name)
        try:
            found = out.read(name)
        except (ValueError, OSError) as error:
            wrong.append(str(error))
            continue
        if found.shape != expected.shape or found.dtype != expected.dtype:
            wrong.append(f"{name} is {list(found.shape)} in {found.dtype}, expected {list(expected.shape)} in "
                         f"{expected.dtype}")
        elif not torch.equal(numbers(found), numbers(expected)):
            count = int((found != expected).sum())
            wrong.append(f"{name} differs from that of {job.source} in {count} of {expected.numel()} numbers")
        tick(expected.nbytes)
    return wrong


def structure(out: Path, source: Source, names: Sequence[str]) -> list[str]:
    """One line for everything wrong with ``out`` but its numbers: names, index, manifest, other files."""
    try:
        made = Source(out)
        wrong = _names(set(made.names), set(names), out)
        if made.legacy != source.legacy:
            wrong.append(f"{out} has {'older' if made.legacy else 'newer'} names, unlike {source.folder}")
        wrong += _side_files(made.directory, source)
        if made.manifest is None:
            return wrong + _files_of_hf(out)
        if made.manifest["layout"] != NO_LAYOUT:
            wrong.append(f"the manifest of {out} tells of a layout, {made.manifest['layout']}")
        return wrong + wrong_files(out, made.manifest["files"])
    except (ValueError, OSError) as error:
        return [str(error)]


def _names(found: set[str], expected: set[str], where: Path) -> list[str]:
    return [f"tensor {name} is missing in {where}" for name in sorted(expected - found)] + [
        f"tensor {name} is in {where}, but no part of the model" for name in sorted(found - expected)]


def _files_of_hf(out: Path) -> list[str]:
    """Compare the index of a directory with its files, whose headers are read."""
    from safetensors import SafetensorError, safe_open

    held, total, wrong = {}, 0, []
    for path in sorted(out.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file, path.open("rb") as raw:
                names = list(file.keys())
                wrong += [f"tensor {name} is in {held[name]} and in {path.name}" for name in names if name in held]
                held |= dict.fromkeys(names, path.name)
                total += path.stat().st_size - 8 - int.from_bytes(raw.read(8), "little")
        except SafetensorError as error:
            wrong.append(f"{path} cannot be read ({error})")
    if not (out / INDEX).is_file():
        return wrong + ([] if set(held.values()) == {SINGLE} else [f"{out} has several files and no {INDEX}"])
    index = json.loads((out / INDEX).read_text())
    if index["weight_map"] != held:
        lost = sorted(set(index["weight_map"].items()) ^ set(held.items()))
        wrong.append(f"{out / INDEX} and the files disagree about {lost[0][0]}, {len(lost)} entries in all")
    if index["metadata"]["total_size"] != total:
        wrong.append(f"{out / INDEX} says {index['metadata']['total_size']:,} bytes, the files hold {total:,}")
    return wrong


def _side_files(folder: Path, source: Source) -> list[str]:
    """Compare configuration, tokenizer and processor; only the dtype in config.json may differ."""
    wrong = []
    with tempfile.TemporaryDirectory() as name:
        copy_side_files(source.directory, Path(name))
        expected = {path.name: path.read_bytes() for path in Path(name).iterdir()}
    found = {path.name: path.read_bytes() for path in folder.iterdir()
             if path.is_file() and path.suffix != ".safetensors" and path.name not in (INDEX, MANIFEST)}
    for name in sorted(expected.keys() | found.keys()):
        if name not in found or name not in expected:
            wrong.append(f"{folder / name} is missing" if name in expected else f"{folder / name} is not of the source")
        elif name == "config.json":
            wrong += _config(json.loads(found[name]), json.loads(expected[name]), source.dtype, folder / name)
        elif found[name] != expected[name]:
            wrong.append(f"{folder / name} is not that of {source.directory}")
    return wrong


def _config(ours: dict, theirs: dict, dtype: torch.dtype | None, path: Path) -> list[str]:
    for config in (ours, theirs):
        for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
            said = {key: part.pop(key) for key in _DTYPE_KEYS if key in part}
            wanted = str(dtype).removeprefix("torch.")
            if config is ours and dtype is not None and any(value != wanted for value in said.values()):
                return [f"{path} says dtype {said}, the weights are in {wanted}"]
    return [] if ours == theirs else [f"{path} differs from that of the source in more than its dtype"]
