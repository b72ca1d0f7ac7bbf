"""Read and write Hugging Face checkpoint directories, one tensor at a time.

Tensors are named as transformers' modules name them (``model.visual.*``, ``model.language_model.*``). Files of the
older kind (``visual.*``, ``model.*``: Qwen2-VL and Qwen2.5-VL on the hub) are read under the new names and written
back under their own.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Iterable

import torch

from megavg.checkpoint import swap
from megavg.checkpoint.manifest import sync_file
from megavg.protocols.life import goes_on

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".tmp"}


def _modern_name(name: str) -> str:
    if name.startswith("visual."):
        return f"model.{name}"
    if name.startswith("model.") and not name.startswith(("model.visual.", "model.language_model.")):
        return f"model.language_model.{name.removeprefix('model.')}"
    return name


def legacy_name(name: str) -> str:
    """The older name of a tensor (Qwen2-VL and Qwen2.5-VL on the hub)."""
    for modern, legacy in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        if name.startswith(modern):
            return legacy + name.removeprefix(modern)
    return name


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is damaged: expected a JSON object with a weight_map, got {error!r}; copy the "
                         "checkpoint again") from error


class HFCheckpoint:
    """Lazily read the safetensors files of one checkpoint directory.

    Raises:
        FileNotFoundError: the directory, its config.json, its weights, or a shard named by the index is missing.
        ValueError: a file is truncated or is no safetensors file, or a tensor that is asked for is not there.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise FileNotFoundError(f"checkpoint directory {self.directory} does not exist; expected a local folder in "
                                    "Hugging Face format (a hub name is not downloaded: fetch it first)")
        if not (self.directory / "config.json").is_file():
            raise FileNotFoundError(f"{self.directory / 'config.json'} is missing; expected a Hugging Face checkpoint "
                                    "directory (tools/make_tiny_checkpoint.py makes a small one)")
        self._handles: dict[str, object] = {}
        self._file_of = self._read_index()
        self.legacy = any(name.startswith("visual.") for name in self._file_of)
        self._stored_name = {_modern_name(name): name for name in self._file_of}

    def _read_index(self) -> dict[str, str]:
        index = self.directory / INDEX
        if index.is_file():
            weight_map = _weight_map(index)
            for file in sorted(set(weight_map.values())):
                if not (self.directory / file).is_file():
                    raise FileNotFoundError(f"{self.directory / file} is missing, but {index} lists it; copy the "
                                            "checkpoint again")
            return weight_map
        if not (self.directory / SINGLE).is_file():
            raise FileNotFoundError(f"{self.directory} holds neither {SINGLE} nor {INDEX}")
        return {name: SINGLE for name in self._open(SINGLE).keys()}

    def _open(self, file: str):
        from safetensors import SafetensorError, safe_open

        if file not in self._handles:
            try:
                self._handles[file] = safe_open(self.directory / file, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{self.directory / file} cannot be read ({error}); it is truncated or no "
                                 "safetensors file: copy it again") from error
        return self._handles[file]

    @property
    def names(self) -> list[str]:
        return sorted(self._stored_name)

    def facts(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """(shape, dtype) of one whole tensor, from the header of its file."""
        stored = self._stored(name)
        held = self._ask(stored, lambda file: file.get_slice(stored))
        if held.get_dtype() not in _DTYPES:
            raise ValueError(f"tensor {name} in {self.directory} is stored in {held.get_dtype()}; only fp64, fp32, "
                             "bf16 and fp16 are read")
        return tuple(held.get_shape()), _DTYPES[held.get_dtype()]

    def _stored(self, name: str) -> str:
        stored = self._stored_name.get(name)
        if stored is None:
            raise ValueError(f"tensor {name} is missing in {self.directory}; the checkpoint is incomplete or of "
                             "another model than its config.json says")
        return stored

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor, on the CPU, as stored."""
        stored = self._stored(name)
        return self._ask(stored, lambda file: file.get_tensor(stored))

    def _ask(self, stored: str, question: Callable[[Any], Any]) -> Any:
        """What ``question`` finds of a tensor in its file."""
        from safetensors import SafetensorError

        file = self._file_of[stored]
        try:
            return question(self._open(file))
        except SafetensorError as error:
            raise ValueError(f"{self.directory / file} does not hold tensor {stored} ({error}), but {INDEX} says so; "
                             "copy the checkpoint again") from error


def write_checkpoint(out_dir: str | Path, tensors: Iterable[tuple[str, torch.Tensor]], source: HFCheckpoint,
                     max_shard_bytes: int = 5 * 2**30) -> None:
    """Write ``tensors`` (modern names, in any order) as a checkpoint directory like ``source``.

    Configuration, tokenizer and processor files are copied from ``source``; weights are streamed into shards of at most
    ``max_shard_bytes``. Everything is written beside ``out_dir`` and renamed at the end.
    """
    final = swap.place_of(out_dir)
    partial = swap.begin(final)
    copy_side_files(source.directory, partial)
    dtype = _write_shards(partial, tensors, source.legacy, max_shard_bytes)
    set_dtype(partial / "config.json", dtype)
    swap.finish(final)


def copy_side_files(directory: Path, out_dir: Path) -> None:
    """Copy what a checkpoint directory holds beside its weights: configuration, tokenizer, processor, generation."""
    for file in sorted(directory.iterdir()):
        if file.is_file() and file.suffix not in _WEIGHT_SUFFIXES and file.name != INDEX:
            shutil.copyfile(file, out_dir / file.name)


def set_dtype(config_path: Path, dtype: torch.dtype) -> None:
    """Have config.json say the dtype of the written weights; a file that says so already is left as it is."""
    text = config_path.read_text()
    config = json.loads(text)
    name = str(dtype).removeprefix("torch.")
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = name
    if config != json.loads(text):
        config_path.write_text(json.dumps(config, indent=2) + "\n")


def _write_shards(folder: Path, tensors, legacy: bool, max_shard_bytes: int) -> torch.dtype:
    """Stream tensors into files; returns the dtype of the last one."""
    from safetensors.torch import save_file

    shards: list[dict[str, int]] = []
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = 0

    def flush():
        nonlocal pending, pending_bytes
        path = folder / f"shard-{len(shards)}"
        save_file(pending, path, metadata={"format": "pt"})
        # safetensors writes files that only their owner can read; weights are for everyone who may read config.json
        path.chmod((folder / "config.json").stat().st_mode & 0o777)
        sync_file(path)  # not all of them at the end, which might take longer than a watchdog waits
        goes_on()
        shards.append({name: tensor.nbytes for name, tensor in pending.items()})
        pending, pending_bytes = {}, 0

    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > max_shard_bytes:
            flush()
        pending[legacy_name(name) if legacy else name] = tensor.detach().to("cpu", copy=True).contiguous()
        pending_bytes += tensor.nbytes
    flush()
    if len(shards) == 1:
        os.replace(folder / "shard-0", folder / SINGLE)
        return tensor.dtype
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"shard-{i}", folder / file)
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(size for shard in shards for size in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return tensor.dtype
