"""Turn a model's folder into the other kind: Hugging Face directories and checkpoints of runs, a tensor at a time."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Sequence

import torch

from megavg.checkpoint.convert_file import Entry, write_file
from megavg.checkpoint.errors import CheckpointError
from megavg.checkpoint.hf import INDEX, SINGLE, HFCheckpoint, legacy_name, set_dtype, copy_side_files
from megavg.checkpoint.manifest import facts_of, write_manifest
from megavg.checkpoint.parts import whole
from megavg.checkpoint.saved import WEIGHTS, SavedCheckpoint, open_checkpoint
from megavg.checkpoint.sharded import write_parts
from megavg.checkpoint.train_state import MODEL, STATE

NO_LAYOUT = "none"
"""What the manifest of a converted folder says instead of a layout: it holds a model, and no state of a training."""


def computed_in(manifest: dict[str, Any] | None) -> str | None:
    """The dtype to which the weights of a checkpoint are rounded when they leave it: what its run computed in.

    Its tensors are fp32 master copies. None where there was no training, and weights are what is stored.
    """
    if manifest is None:
        return None
    return manifest["dtype"] if manifest["layout"] != NO_LAYOUT else manifest.get("computed_in")


class Source:
    """The tensors of a folder of either kind, cast to one dtype. What opens a checkpoint may use it in its place.

    Args:
        dtype: of all tensors; None leaves each as it is stored.

    Attributes:
        directory: the folder with the configuration, tokenizer and processor.
        legacy: whether its Hugging Face names are the older ones.
        manifest: of a checkpoint of a run; None of a Hugging Face directory.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype | None = None):
        self.folder, self.dtype = Path(folder), dtype
        self._opened = open_checkpoint(folder)
        self.directory, self.legacy = self._opened.directory, self._opened.legacy
        self.manifest = self._opened.manifest if isinstance(self._opened, SavedCheckpoint) else None

    @property
    def names(self) -> list[str]:
        return self._opened.names

    def facts(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """(shape, dtype) of one whole tensor as ``read`` gives it."""
        shape, dtype = self._opened.facts(name)
        return shape, self.dtype or dtype

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor on the CPU.

        Raises:
            ValueError: it is missing, its file is damaged, or a number does not fit into the dtype.
        """
        opened = self._opened
        if self.manifest is None:
            # a file is mapped into memory, and the pages that were read are this process' as long as it is open
            opened = HFCheckpoint(self.folder)
        return _cast(name, opened.read(name), self.dtype)


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype in (None, tensor.dtype):
        return tensor
    cast = tensor.to(dtype)
    if dtype == torch.float16 and cast.isfinite().sum() != tensor.isfinite().sum():
        raise ValueError(f"{name} holds numbers up to {float(tensor.abs().max()):.4g}, which do not fit into float16; "
                         "convert to bfloat16")
    return cast


@dataclass(frozen=True)
class FileJob:
    """One safetensors file to write: independent of all others."""

    source: Path
    dtype: torch.dtype | None
    path: Path
    entries: tuple[Entry, ...]

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries)


def plan_files(source: Source, names: Sequence[str], out: Path, max_bytes: int) -> list[FileJob]:
    """Cut the tensors, in the order of ``names``, into files of at most ``max_bytes``; a larger one has its own."""
    files: list[list[Entry]] = [[]]
    for name in names:
        entry = Entry(name, legacy_name(name) if source.legacy else name, *source.facts(name))
        if files[-1] and sum(other.num_bytes for other in files[-1]) + entry.num_bytes > max_bytes:
            files.append([])
        files[-1].append(entry)
    called = [SINGLE] if len(files) == 1 else [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
                                               for i in range(len(files))]
    return [FileJob(source.folder, source.dtype, out / name, tuple(entries)) for name, entries in zip(called, files)]


def do_file(job: FileJob, tick: Callable[[int], None]) -> str:
    """Write one file; ``tick`` is told of bytes. Returns the file's name."""
    write_file(job.path, job.entries, Source(job.source, job.dtype).read, tick)
    return job.path.name


def finish_hf(out: Path, jobs: Sequence[FileJob], source: Source) -> None:
    """Put all other files of a Hugging Face directory beside its weights."""
    _side_files(source, out)
    mode = (out / "config.json").stat().st_mode & 0o777
    for job in jobs:
        job.path.chmod(mode)
    if len(jobs) > 1:
        weight_map = {entry.stored: job.path.name for job in jobs for entry in job.entries}
        index = {"metadata": {"total_size": sum(job.num_bytes for job in jobs)},
                 "weight_map": dict(sorted(weight_map.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_saved(out: Path, source: Source, names: Sequence[str], about: dict[str, Any],
                wrote: Callable[[int], None]) -> None:
    """Write a folder that ``model.path`` takes as it takes a checkpoint of a run, in any layout.

    Args:
        about: goes into the manifest (family, box_format).
        wrote: is told how many bytes have been written.

    Raises:
        ValueError: a tensor of ``source`` cannot be read or cast.
        OSError: the folder cannot be written; what there is of it is left.
    """
    done = 0

    def fetch(name: str) -> torch.Tensor:
        nonlocal done
        tensor = source.read(name)
        done += tensor.nbytes
        wrote(done)
        return tensor

    facts = {name: source.facts(name) for name in names}
    parts = [whole(WEIGHTS + name, shape, dtype, lambda name=name: fetch(name))
             for name, (shape, dtype) in facts.items()]
    try:
        write_parts(out / STATE, parts)
    except CheckpointError as error:  # which tells of ranks; this process is alone
        cause, _ = getattr(error.__cause__, "failures", {}).get(0, (error, None))
        raise cause from error
    (out / MODEL).mkdir()
    _side_files(source, out / MODEL)
    held = Counter()
    for shape, dtype in facts.values():
        held[str(dtype).removeprefix("torch.")] += torch.Size(shape).numel()
    run_dtype = computed_in(source.manifest) if source.dtype is None else None
    files = facts_of(out, sorted(path for path in out.rglob("*") if path.is_file()))
    write_manifest(out, files, {"step": 0, "layout": NO_LAYOUT, "world_size": 1, "dtype": held.most_common(1)[0][0],
                                "legacy_names": source.legacy, **about,
                                **({"computed_in": run_dtype} if run_dtype else {})})


def _side_files(source: Source, out: Path) -> None:
    copy_side_files(source.directory, out)
    if source.dtype is not None:
        set_dtype(out / "config.json", source.dtype)
