"""Memory does not follow the size of a shard: a tar of 220 MB is walked through in real processes."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
COUNT, PAYLOAD = 110, 2_000_000
BOUND_MIB = 48

PROGRAM = """
import json, resource, sys
from megavg.data.shards import PromptSource, iterate_all
import webdataset.tariterators
spec = json.loads(sys.argv[1])
options = dict(infinite=False, **spec["options"])
if spec["how"] == "all":
    samples = iterate_all(spec["shards"])
else:
    samples = (s for batch in PromptSource(spec["shards"], 2, 0, **options) for s in batch)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()  # with everything imported
count = sum(1 for _ in samples)
print(json.dumps([count, peak() - before]))
"""


def padded_png(number: int) -> bytes:
    """A small picture with a private chunk of random bytes, which decoders step over."""
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), (number, 0, 0)).save(buffer, "PNG")
    png, body = buffer.getvalue(), b"prVt" + os.urandom(PAYLOAD)
    return png[:33] + struct.pack(">I", PAYLOAD) + body + struct.pack(">I", zlib.crc32(body)) + png[33:]


@pytest.fixture(scope="module")
def large_tar(tmp_path_factory):
    """A tar of 220 MB, removed afterwards."""
    path = tmp_path_factory.mktemp("large") / "large.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(COUNT):
            fields = {"width": 20, "height": 10, "expression": "it", "boxes_xyxy_px": [[1, 2, 5, 6]]}
            for suffix, data in (("json", json.dumps(fields).encode()), ("png", padded_png(number))):
                member = tarfile.TarInfo(f"r{number:03d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    yield path
    path.unlink()


@pytest.mark.parametrize("how, shard, options", [
    ("all", "{path}", {}),
    ("all", "pipe:cat {path}", {}),
    ("batches", "{path}", {"shuffle_buffer": 1000}),
    ("batches", "{path}", {"shuffle_buffer": 1000, "num_workers": 1}),
    ("batches", "pipe:cat {path}", {"shuffle_buffer": 1000, "shuffle_bytes": 16 << 20}),
])
def test_a_whole_epoch_of_a_large_shard(large_tar, how, shard, options):
    assert large_tar.stat().st_size > 200e6
    spec = {"how": how, "shards": [shard.format(path=large_tar)], "options": options}
    result = subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(spec)], cwd=ROOT, capture_output=True, text=True,
                            timeout=240)
    assert result.returncode == 0, result.stderr
    count, growth_kib = json.loads(result.stdout)
    print(f"{how} {shard} {options}: the peak grew by {growth_kib / 1024:.1f} MiB")
    assert count == COUNT and growth_kib < BOUND_MIB * 1024
