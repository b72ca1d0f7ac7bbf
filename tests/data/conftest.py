"""Pictures, samples and shards that the tests of the data room share."""

from __future__ import annotations

import io
import json
import random
import tarfile

import pytest
from PIL import Image

from megavg.data.writer import write_shards
from megavg.protocols.sample import Sample


@pytest.fixture
def make_sample():
    """Factory of samples with random pixels, so that a mixed-up image cannot pass for the right one."""
    def make(index: int, width: int = 24, height: int = 18, **changes) -> Sample:
        rng = random.Random(index)
        image = Image.frombytes("RGB", (width, height), rng.randbytes(width * height * 3))
        box = (rng.uniform(0, 10), rng.uniform(0, 8), rng.uniform(11, width), rng.uniform(9, height))
        fields = {"key": f"s{index:05d}", "shard": "", "image": image, "width": width, "height": height,
                  "expression": f"Gegenstand № {index}", "boxes_xyxy_px": (box,),
                  "meta": {"kind": "noise", "n": index}}
        return Sample(**{**fields, **changes})
    return make


@pytest.fixture
def shard_set(tmp_path, make_sample):
    """Factory of a folder with ``count`` samples in shards of ``per_shard``."""
    def build(count: int = 40, per_shard: int = 7, name: str = "shards") -> str:
        write_shards((make_sample(i) for i in range(count)), str(tmp_path / name), "train", per_shard)
        return str(tmp_path / name)
    return build


@pytest.fixture
def raw_tar(tmp_path):
    """Factory of a tar from (name, bytes) members, written with the standard library."""
    def write(members: list[tuple[str, bytes]], name: str = "raw.tar") -> str:
        path = tmp_path / name
        with tarfile.open(path, "w") as tar:
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return str(path)
    return write


@pytest.fixture
def record():
    """Factory of the two members of a record; ``changes`` replace JSON fields, a value of None removes one."""
    def members(key: str, image: bytes | None = None, suffix: str = "png", **changes) -> list[tuple[str, bytes]]:
        if image is None:
            buffer = io.BytesIO()
            Image.new("RGB", (20, 10), (10, 200, 30)).save(buffer, "PNG")
            image = buffer.getvalue()
        fields = {"id": key, "width": 20, "height": 10, "expression": "it", "boxes_xyxy_px": [[1, 2, 5, 6]], **changes}
        fields = {name: value for name, value in fields.items() if value is not None}
        return [(f"{key}.json", json.dumps(fields).encode()), (f"{key}.{suffix}", image)]
    return members
