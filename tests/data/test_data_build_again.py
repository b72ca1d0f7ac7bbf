"""A build that is run again: what has changed since is built again, and ``overwrite`` begins anew."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from PIL import Image

from megavg.data.builder.build import build_shards
from megavg.data.builder.options import BuildOptions
from megavg.data.readers.base import Draft, ImageFile
from megavg.data.sample import SampleError
from megavg.data.shards import iterate_all


@pytest.fixture
def make_draft(tmp_path):
    """Factory of drafts with a picture file of random pixels."""
    def make(number: int) -> Draft:
        path = tmp_path / f"{number}.png"
        Image.frombytes("RGB", (24, 18), random.Random(number).randbytes(24 * 18 * 3)).save(path)
        return Draft(f"list: row {number}", f"k{number:03d}", ImageFile(str(path)),
                     {"width": 24, "height": 18, "expression": "it", "boxes_xyxy_px": [[1, 2, 5 + number, 9]]})
    return make


def red(path: str) -> None:
    Image.new("RGB", (24, 18), (255, 0, 0)).save(path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_picture_that_was_changed_is_read_again(tmp_path, make_draft, overwrite):
    drafts = [make_draft(number) for number in range(6)]
    good = Path(drafts[4].image.path).read_bytes()
    Path(drafts[4].image.path).write_bytes(b"broken")
    options = BuildOptions(samples_per_shard=2)
    with pytest.raises(SampleError, match="2 finished shards are kept.*without --overwrite, continues"):
        build_shards(drafts, str(tmp_path / "s"), options)
    kept = tmp_path / "s" / ".unfinished" / "000001.tar"
    before = kept.stat().st_mtime_ns
    red(drafts[0].image.path)
    with pytest.raises(SampleError):
        build_shards(drafts, str(tmp_path / "s"), options, overwrite=overwrite)
    assert (kept.stat().st_mtime_ns == before) != overwrite  # the shard whose pictures are as they were is taken, or not
    Path(drafts[4].image.path).write_bytes(good)
    build_shards(drafts, str(tmp_path / "s"), options, overwrite=overwrite)
    assert next(iterate_all(str(tmp_path / "s"))).image.getpixel((0, 0)) == (255, 0, 0)


def test_overwrite_looks_at_pictures_whose_size_and_time_are_as_before(tmp_path, make_draft):
    drafts = [make_draft(number) for number in range(4)]
    bad, options = drafts[3].image.path, BuildOptions(samples_per_shard=2)
    good = Path(bad).read_bytes()
    Path(bad).write_bytes(b"broken")
    with pytest.raises(SampleError):
        build_shards(drafts, str(tmp_path / "s"), options)
    first = Path(drafts[0].image.path)
    state, size = first.stat(), len(first.read_bytes())
    red(str(first))
    first.write_bytes(first.read_bytes().ljust(size, b"\0"))
    os.utime(first, ns=(state.st_atime_ns, state.st_mtime_ns))
    Path(bad).write_bytes(good)
    build_shards(drafts, str(tmp_path / "s"), options, overwrite=True)
    assert next(iterate_all(str(tmp_path / "s"))).image.getpixel((0, 0)) == (255, 0, 0)


def test_an_interrupted_overwrite_continues_without_it(tmp_path, make_draft):
    drafts = [make_draft(number) for number in range(4)]
    build_shards(drafts[:1], str(tmp_path / "s"))
    bad, options = drafts[3].image.path, BuildOptions(samples_per_shard=2)
    good = Path(bad).read_bytes()
    Path(bad).write_bytes(b"broken")
    with pytest.raises(SampleError):
        build_shards(drafts, str(tmp_path / "s"), options, overwrite=True)
    Path(bad).write_bytes(good)
    assert build_shards(drafts, str(tmp_path / "s"), options)["num_samples"] == 4


def test_a_job_that_starts_again_keeps_the_shards_it_has_built(tmp_path, make_draft, monkeypatch):
    """Slurm repeats the command, with its --overwrite."""
    drafts, kept = [make_draft(number) for number in range(4)], tmp_path / "s" / ".unfinished" / "000000.tar"
    Path(drafts[3].image.path).write_bytes(b"broken")

    def build(job: str) -> int:
        monkeypatch.setenv("MEGAVG_JOB", job)
        with pytest.raises(SampleError):
            build_shards(drafts, str(tmp_path / "s"), BuildOptions(samples_per_shard=2), overwrite=True)
        return kept.stat().st_mtime_ns

    first = build("c-1")
    assert build("c-1") == first and build("c-2") != first
