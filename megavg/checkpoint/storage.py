"""The files of a sharded folder: boxes of tensors one behind the other, as torch.save writes them, and their list.

torch's own reader and writer of these files hold every box until the file is whole, and each box twice; these do not.
What they write, torch's read.
"""

from __future__ import annotations

import math
import os
import pickle
from collections import defaultdict
from pathlib import Path
from typing import Iterator, Sequence

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _create_file_view
from torch.futures import Future

from megavg.protocols.life import goes_on


class Writer(dcp.FileSystemWriter):
    """Lets each box go when it is written; torch's own ``write_data`` keeps them all until the file is whole."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        done: Future[list[WriteResult]] = Future()
        try:
            done.set_result(list(self._written(name, plan.items, planner)))
        except RuntimeError as error:  # what the system said, such as a full disk; torch's archive finds itself spoilt
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error
        return done

    def _written(self, name: str, items: Sequence[WriteItem], planner: SavePlanner) -> Iterator[WriteResult]:
        with open(Path(self.path) / name, "wb") as file:
            for item in items:
                start = file.tell()
                tensor = planner.resolve_data(item).to("cpu", item.tensor_data.properties.dtype)
                torch.save(_alone(tensor.contiguous()), file)
                length = file.tell() - start
                goes_on()
                yield WriteResult(item.index, length, _StorageInfo(name, start, length))
            file.flush()
            os.fsync(file.fileno())


class Reader(dcp.FileSystemReader):
    """Reads the list of tensors without running what a pickle may ask for: checkpoints are passed around."""

    def read_metadata(self, *args, **kwargs) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            return _PlainUnpickler(file).load()

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Straight from the files into the views; what is no run of a stored box goes through a copy of that box."""
        files = defaultdict(list)
        for item in plan.items:
            info = self.storage_data[item.storage_index]
            files[info.relative_path].append((info.offset, info.length, item))
        for name, items in files.items():
            with open(Path(self.path) / name, "rb", buffering=0) as file:
                for offset, length, item in sorted(items, key=lambda found: found[0]):
                    # the numbers lie as they are in torch's archive
                    archive = torch._C.PyTorchFileReader(_create_file_view(file, offset, length))
                    start = offset + archive.get_record_offset("data/0")
                    _read_item(file, start, item, planner.resolve_tensor(item), *planner.stored(item))
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _read_item(file, start: int, item: ReadItem, view: torch.Tensor, sizes: torch.Size, dtype: torch.dtype) -> None:
    whole_rows = tuple(item.lengths[1:]) == tuple(sizes[1:])
    if whole_rows and view.is_contiguous() and view.dtype == dtype and view.device.type == "cpu":
        row = math.prod(sizes[1:]) * dtype.itemsize
        _fill(file, start + item.storage_offsets[0] * row if sizes else start, view)
        return
    box = torch.empty(sizes, dtype=dtype)
    _fill(file, start, box)
    view.copy_(narrow_tensor_by_index(box, item.storage_offsets, item.lengths))


def _fill(file, start: int, tensor: torch.Tensor) -> None:
    file.seek(start)
    rest = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
    while rest:
        count = file.readinto(rest)
        if not count:
            raise EOFError("it ends too early")
        rest = rest[count:]
        goes_on()


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with a storage that is no larger than it is, without a copy: torch.save writes storages whole."""
    return torch.from_numpy(tensor.reshape(-1).view(torch.uint8).numpy()).view(tensor.dtype).view(tensor.shape)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) in _PLAIN:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no list of tensors needs")


# whole names only: a pickle may ask for "os.system" of any module that imports os
_PLAIN = {("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout"),
          ("pathlib", "PosixPath")}
_PLAIN |= {("torch.distributed.checkpoint.metadata", name) for name in (
    "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
    "_MEM_FORMAT_ENCODING")}
