"""A model's tensors in a checkpoint of a run (``step-000100``), read as those of a Hugging Face directory are."""

from __future__ import annotations

from pathlib import Path

import torch

from megavg.checkpoint.errors import CheckpointError
from megavg.checkpoint.hf import HFCheckpoint
from megavg.checkpoint.manifest import MANIFEST, read_manifest
from megavg.checkpoint.sharded import ShardedFolder
from megavg.checkpoint.train_state import MODEL, STATE

WEIGHTS = "weights/"


class SavedCheckpoint:
    """Lazily read the weights of one checkpoint by HF name; its optimiser state is left alone.

    Attributes:
        directory: the folder with the model's configuration, tokenizer and processor.
        folder: the checkpoint itself.
        manifest: its list of files, and what wrote it.
        legacy: whether the model that was trained had the older names, which are read as new ones.

    Raises:
        CheckpointError: it is incomplete or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.directory = self.folder / MODEL
        self.manifest = read_manifest(self.folder)
        self.legacy = bool(self.manifest.get("legacy_names", False))
        for name, fact in self.manifest["files"].items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != fact["bytes"]:
                raise CheckpointError(f"{path} is missing or truncated; take the checkpoint before, or copy it again")
        self._state = ShardedFolder(self.folder / STATE)
        self._weights = {name.removeprefix(WEIGHTS): facts for name, facts in self._state.tensors.items()
                         if name.startswith(WEIGHTS)}

    @property
    def names(self) -> list[str]:
        return sorted(self._weights)

    def facts(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """(shape, dtype) of one whole tensor; trained ones are stored in fp32, whatever the model's dtype."""
        self._check(name)
        return self._weights[name]

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor, on the CPU, as stored."""
        self._check(name)
        return self._state.read(WEIGHTS + name)

    def _check(self, name: str) -> None:
        if name not in self._weights:
            raise CheckpointError(f"tensor {name} is missing in {self.folder}; it is of another model than its "
                                  "config.json says")


def is_saved(directory: str | Path) -> bool:
    """Whether a folder is a checkpoint of a run and not a Hugging Face directory."""
    return (Path(directory) / MANIFEST).is_file()


def open_checkpoint(directory: str | Path) -> HFCheckpoint | SavedCheckpoint:
    """Open a model's folder of either kind."""
    return SavedCheckpoint(directory) if is_saved(directory) else HFCheckpoint(directory)
