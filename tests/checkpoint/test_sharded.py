"""Tensors written by many and read by any: contents, what is refused, and nothing run that a file asks for."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from torch.distributed import checkpoint as dcp

from megavg.checkpoint.errors import CheckpointError
from megavg.checkpoint.parts import Part, whole
from megavg.checkpoint.sharded import ShardedFolder, read_parts, write_parts
from tests.distributed import run_ranks


def columns(tensor: torch.Tensor, start: int, stop: int, name: str = "a") -> Part:
    return Part(name, tuple(tensor.shape), (0, start), (tensor.shape[0], stop - start), tensor.dtype,
                lambda: tensor[:, start:stop])


def write_on_two(folder: str, gap: bool) -> None:
    import torch.distributed as dist

    rank, tensor = dist.get_rank(), torch.arange(12.0).view(3, 4)
    stop = 4 if rank and not gap else 3
    part = columns(tensor, 2 * rank, stop if rank else 2)
    write_parts(folder, [part, Part("b", (2,), (rank,), (1,), torch.bfloat16, lambda: torch.tensor([rank + 0.5]))],
                dist.group.WORLD)


def test_ranks_write_boxes_and_one_process_reads_others(tmp_path):
    run_ranks(2, write_on_two, str(tmp_path / "x"), False)
    into = torch.full((3, 4), -1.0)
    read_parts(tmp_path / "x", [columns(into, 1, 4)])
    assert torch.equal(into[:, 1:], torch.arange(12.0).view(3, 4)[:, 1:]) and (into[:, 0] == -1).all()
    assert ShardedFolder(tmp_path / "x").read("b").tolist() == [0.5, 1.5]


def test_a_tensor_that_is_not_whole_is_not_written(tmp_path):
    with pytest.raises(AssertionError, match="CheckpointError: rank 0: ValueError: the ranks hold 9 of the 12 numbers of a"):
        run_ranks(2, write_on_two, str(tmp_path / "x"), True)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_is_written_torch_reads(tmp_path):
    tensors = {"a": torch.arange(12.0).view(3, 4), "b": torch.randn(7).bfloat16(), "c": torch.randn(2, 3, 4)[:, 1:]}
    write_parts(tmp_path / "x", [whole(name, t.shape, t.dtype, lambda t=t: t) for name, t in tensors.items()])
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp.load(found, checkpoint_id=tmp_path / "x", no_dist=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.fixture
def written(tmp_path):
    tensor = torch.arange(12.0).view(3, 4)
    write_parts(tmp_path / "x", [whole("a", tensor.shape, tensor.dtype, lambda: tensor)])
    return tmp_path / "x"


def test_a_missing_tensor_and_another_shape(written):
    with pytest.raises(CheckpointError, match="the checkpoint holds no c; it is of another model"):
        read_parts(written, [columns(torch.zeros(3, 4), 0, 4, "c")])
    with pytest.raises(CheckpointError, match=r"a has shape \[3, 4\] in the checkpoint and \[3, 5\] in this model"):
        read_parts(written, [columns(torch.zeros(3, 5), 0, 4)])
    with pytest.raises(CheckpointError, match="holds no tensor c"):
        ShardedFolder(written).read("c")


def test_a_tensor_is_fetched_when_its_turn_comes(tmp_path):
    """Otherwise writing would need all of them in memory."""
    alive, most = set(), 0

    def fetch(number: int) -> torch.Tensor:
        nonlocal most
        tensor = torch.full((1000,), float(number))
        alive.add(number)
        most = max(most, len(alive))
        import weakref

        weakref.finalize(tensor, alive.discard, number)
        return tensor

    write_parts(tmp_path / "x", [whole(str(n), (1000,), torch.float32, lambda n=n: fetch(n)) for n in range(20)])
    assert most <= 2 and ShardedFolder(tmp_path / "x").read("7")[0] == 7


class Planted:
    """A pickle of it asks for a command to be run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def through_an_import(path) -> bytes:
    """A pickle that reaches the same command by a module that a list of tensors needs."""
    module, name = b"torch.distributed.checkpoint.metadata", b"os.mkdir"
    text = os.fsencode(path)
    return (b"\x80\x04\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(name)]) + name + b"\x93\x8c"
            + bytes([len(text)]) + text + b"\x85R.")


@pytest.mark.parametrize("asks", [lambda path: pickle.dumps(Planted(path)), through_an_import])
def test_what_a_pickle_asks_for_is_not_run(written, tmp_path, asks):
    content = asks(tmp_path / "made")
    pickle.loads(content)  # it would
    (tmp_path / "made").rmdir()
    (written / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r".metadata is damaged .*asks for .*mkdir"):
        ShardedFolder(written)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("damage", ["gone", "empty", "half", "other"])
def test_a_damaged_list_of_tensors(written, damage):
    path = written / ".metadata"
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "half": content[:len(content) // 2], "other": b"{}"}[damage])
    with pytest.raises(CheckpointError, match=r"\.metadata is (missing|damaged)"):
        ShardedFolder(written)


def test_a_truncated_file(written):
    path = next(written.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read .* truncated"):
        ShardedFolder(written).read("a")
