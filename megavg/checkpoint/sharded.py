"""Tensors of any layout in one folder: torch.distributed.checkpoint underneath, boxes of whole tensors on top.

Every rank writes the boxes that it owns, and reads those that it needs from whoever wrote them. A tensor is fetched
when its turn comes and let go after it, so that neither way needs more memory than one box.
"""

from __future__ import annotations

import pickle
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Sequence

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner,
                                                  TensorWriteData, WriteItem, WriteItemType)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megavg.checkpoint.errors import CheckpointError, first_line
from megavg.checkpoint.parts import Part
from megavg.checkpoint.storage import Reader, Writer


def write_parts(folder: Path, parts: Sequence[Part], group: dist.ProcessGroup | None = None) -> None:
    """Write what this rank owns of ``parts``; all ranks of ``group`` call it together, None is this process alone.

    Raises:
        CheckpointError: on every rank, when one of them could not write.
    """
    planner = _Saver([part for part in parts if part.owned])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "assuming the intent is to save in a single process"
        try:
            dcp.save({}, storage_writer=Writer(folder), planner=planner, process_group=group,
                     no_dist=group is None)
        except dcp.api.CheckpointException as error:  # a BaseException, with the traceback of each rank that failed
            rank, (cause, _) = next(iter(error.failures.items()))
            raise CheckpointError(f"rank {rank}: {first_line(cause)}") from error


def read_parts(folder: Path, parts: Sequence[Part]) -> None:
    """Fill the views of ``parts``, wherever in ``folder`` they lie. No collective: each rank reads for itself.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or cannot be read.
    """
    ShardedFolder(folder).read_into(parts)


class ShardedFolder:
    """A folder that ``write_parts`` has written, open for reading.

    Attributes:
        tensors: name -> (shape, dtype) of each whole tensor.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._reader = Reader(self.folder)
        try:
            self._metadata = self._reader.read_metadata()
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.folder / '.metadata'} is missing; the checkpoint is incomplete: take the one "
                                  "before, or copy it again") from error
        except Exception as error:  # unpickling damaged bytes raises anything
            raise CheckpointError(f"{self.folder / '.metadata'} is damaged ({error}); take the checkpoint before, or "
                                  "copy it again") from error
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self.tensors = {name: (tuple(tensor.size), tensor.properties.dtype)
                        for name, tensor in self._metadata.state_dict_metadata.items()}

    def read_into(self, parts: Sequence[Part]) -> None:
        """Fill the views of ``parts``."""
        planner = _Loader(parts)
        planner.set_up_planner({}, self._metadata)
        plan = planner.create_local_plan()
        try:
            self._reader.read_data(plan, planner).wait()
        except (OSError, RuntimeError, AssertionError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{self.folder} cannot be read ({first_line(error)}); a file is missing, truncated "
                                  "or damaged: take the checkpoint before, or copy it again") from error

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor, on the CPU, as stored."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder} holds no tensor {name}")
        shape, dtype = self.tensors[name]
        tensor = torch.empty(shape, dtype=dtype)
        self.read_into([Part(name, shape, (0,) * len(shape), shape, dtype, lambda: tensor)])
        return tensor


class _Saver(SavePlanner):
    """Plans to write the given parts."""

    def __init__(self, parts: Sequence[Part]):
        self._parts = {_index(part): part for part in parts}
        if len(self._parts) != len(parts):
            raise ValueError("a part is given twice")

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([WriteItem(_index(part), WriteItemType.SHARD, tensor_data=TensorWriteData(
            _chunk(part), TensorProperties(part.dtype), torch.Size(part.shape))) for part in self._parts.values()])
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        for name, tensor in metadata.state_dict_metadata.items():
            found, needed = sum(torch.Size(c.sizes).numel() for c in tensor.chunks), torch.Size(tensor.size).numel()
            if found != needed:
                raise ValueError(f"the ranks hold {found} of the {needed} numbers of {name}")
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        index = write_item.index
        return self._parts[MetadataIndex(index.fqn, index.offset)].fetch().detach()


class _Loader(LoadPlanner):
    """Plans to fill the views of the given parts."""

    def __init__(self, parts: Sequence[Part]):
        self._parts = {_index(part): part for part in parts}

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None:
        self._metadata = metadata
        self._sizes = {(name, tuple(chunk.offsets)): chunk.sizes
                       for name in {part.name for part in self._parts.values()}
                       if name in metadata.state_dict_metadata
                       for chunk in metadata.state_dict_metadata[name].chunks}

    def create_local_plan(self) -> LoadPlan:
        wanted = defaultdict(list)
        for part in self._parts.values():
            self._check(part)
            wanted[part.name].append(_chunk(part))
        return LoadPlan([item for name, chunks in wanted.items() for item in create_read_items_for_chunk_list(
            name, self._metadata.state_dict_metadata[name], chunks)])

    def _check(self, part: Part) -> None:
        stored = self._metadata.state_dict_metadata.get(part.name)
        if stored is None:
            raise CheckpointError(f"the checkpoint holds no {part.name}; it is of another model, or that parameter was "
                                  "not trained when it was written: keep model.freeze_*, or start anew with model.path")
        if tuple(stored.size) != part.shape:
            raise CheckpointError(f"{part.name} has shape {list(stored.size)} in the checkpoint and {list(part.shape)} "
                                  "in this model; the checkpoint is another model's")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value) -> None:
        raise AssertionError("checkpoints hold tensors only")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        index = read_item.dest_index
        tensor = self._parts[MetadataIndex(index.fqn, index.offset)].fetch().detach()
        for axis, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths)):
            tensor = tensor.narrow(axis, offset, length)
        return tensor

    def stored(self, item: ReadItem) -> tuple[torch.Size, torch.dtype]:
        """(sizes of the stored box, dtype) that an item reads from."""
        index = item.storage_index
        tensor = self._metadata.state_dict_metadata[index.fqn]
        return self._sizes[index.fqn, tuple(index.offset)], tensor.properties.dtype

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


def _index(part: Part) -> MetadataIndex:
    return MetadataIndex(part.name, torch.Size(part.offsets))


def _chunk(part: Part) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes))
