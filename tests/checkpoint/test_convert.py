"""The parts of a conversion: files like safetensors' own, cutting into files, little memory, and what a check sees."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megavg.checkpoint.convert import Source, do_file, finish_hf, plan_files, write_saved
from megavg.checkpoint.convert_check import CompareJob, do_compare
from megavg.checkpoint.convert_file import Entry, write_file
from megavg.checkpoint.hf import SINGLE
from tests.distributed import run_ranks

SHAPES = {"a.b": (7, 3), "scalar": (), "nothing": (0, 4), "b": (5,), "Z": (2, 2, 2), "a": (1,)}
DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)


def drawn(shapes: dict, dtypes=DTYPES) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtypes[i % len(dtypes)])
            for i, (name, shape) in enumerate(shapes.items())}


def directory_of(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A Hugging Face directory as far as this room looks at it."""
    folder.mkdir()
    (folder / "config.json").write_text('{"dtype": "float32"}\n')
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def ignore(num_bytes: int) -> None:
    pass


def test_a_file_is_the_one_that_safetensors_writes(tmp_path):
    tensors = drawn(SHAPES)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    wrote = []
    write_file(tmp_path / "ours", [Entry(name, name, tuple(t.shape), t.dtype) for name, t in tensors.items()],
               tensors.__getitem__, wrote.append)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert sum(wrote) == sum(tensor.nbytes for tensor in tensors.values())


def test_a_tensor_that_changed_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a: expected \[3\] in torch.float32, got \[2\] in torch.float32"):
        write_file(tmp_path / "file", [Entry("a", "a", (3,), torch.float32)], lambda name: torch.zeros(2))


@pytest.mark.parametrize("max_bytes, expected", [
    (1, [["a"], ["b"], ["c"], ["d"]]), (24, [["a", "b"], ["c"], ["d"]]), (10**6, [["a", "b", "c", "d"]])])
def test_files_are_filled_up_to_the_limit(tmp_path, max_bytes, expected):
    folder = directory_of(tmp_path / "hf", drawn({"a": (2,), "b": (4,), "c": (5,), "d": (9,)}, (torch.float32,)))
    source = Source(folder)
    jobs = plan_files(source, source.names, tmp_path / "out", max_bytes)
    assert [[entry.name for entry in job.entries] for job in jobs] == expected


def test_float16_must_hold_the_numbers(tmp_path):
    folder = directory_of(tmp_path / "hf", {"a": torch.tensor([1.0, 7e4, float("inf")])})
    with pytest.raises(ValueError, match="a holds numbers up to inf, which do not fit into float16"):
        Source(folder, torch.float16).read("a")
    assert Source(folder, torch.bfloat16).read("a").isfinite().tolist() == [True, True, False]


def test_a_check_sees_one_bit_a_shape_a_dtype_and_a_loss(tmp_path):
    tensors = drawn({name: (8, 8) for name in ("bit", "dtype", "lost", "nan", "shape", "zero")}, (torch.float32,))
    tensors["nan"][0], tensors["zero"][0] = float("nan"), 0.0
    source = directory_of(tmp_path / "source", tensors)
    damaged = {name: tensor.clone() for name, tensor in tensors.items() if name != "lost"}
    damaged["bit"].view(torch.int32)[3, 4] ^= 1
    damaged["dtype"] = damaged["dtype"].double()
    damaged["shape"] = damaged["shape"].reshape(4, 16)
    damaged["zero"][0] = -0.0
    out = directory_of(tmp_path / "out", damaged)
    names = tuple(sorted(tensors))
    wrong = do_compare(CompareJob(source, None, out, names), ignore)
    assert [line.split()[0] for line in wrong if "lost" not in line] == ["bit", "dtype", "shape", "zero"]
    assert any("tensor lost is missing in" in line for line in wrong) and len(wrong) == 5
    assert "differs from that of" in wrong[0] and "in 1 of 64 numbers" in wrong[0]
    assert do_compare(CompareJob(source, None, source, names), ignore) == []
    assert do_compare(CompareJob(source, torch.bfloat16, source, ("nan",)), ignore)


def test_memory_is_that_of_few_tensors(tmp_path):
    """A checkpoint of 201 MB in tensors of 4 MB, there and back, cast and compared, in a process of its own."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{i:02d}": torch.randint(2**31, (1024, 1024), generator=generator, dtype=torch.int32)
               .bitwise_and(0x3FFFFFFF).view(torch.float32) for i in range(48)}
    source = directory_of(tmp_path / "source", tensors)
    growth, total = run_ranks(1, _convert_there_and_back, source, tmp_path)[0]
    print(f"grew by {growth / 1e6:.1f} MB for {total / 1e6:.0f} MB")
    assert total > 200e6 and growth < total / 3
    back = load_file(tmp_path / "back" / SINGLE)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name].view(torch.int32), tensors[name].view(torch.int32)) for name in tensors)


def _convert_there_and_back(source: Path, folder: Path) -> tuple[int, int]:
    _convert(directory_of(folder / "small", {"a": torch.zeros(3)}), folder, "warm-up-")  # loads what is loaded late
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    _convert(source, folder, "")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak - before, (source / SINGLE).stat().st_size


def _convert(source: Path, folder: Path, name: str) -> None:
    opened = Source(source)
    write_saved(folder / f"{name}saved", opened, opened.names, {"family": "any"}, ignore)
    for out, dtype in (("back", None), ("half", torch.bfloat16)):
        saved, out = Source(folder / f"{name}saved", dtype), folder / f"{name}{out}"
        out.mkdir()
        jobs = plan_files(saved, saved.names, out, 10**9)
        for job in jobs:
            do_file(job, ignore)
        finish_hf(out, jobs, saved)
        assert do_compare(CompareJob(source, dtype, out, tuple(opened.names)), ignore) == []
