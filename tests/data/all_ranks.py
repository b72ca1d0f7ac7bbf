"""All data-parallel ranks of a source in one process."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from PIL import Image


def keys(batch: list) -> list[str]:
    return [sample.key for sample in batch]


def joined(shares: list[list]) -> list:
    """The global batch that the ranks' shares were cut from."""
    batch = [None] * sum(map(len, shares))
    for rank, share in enumerate(shares):
        batch[rank::len(shares)] = share
    return batch


def write_tar(path: Path, good: list[bool]) -> str:
    """A tar of one small record per flag, of which those with a False do not decode."""
    picture = io.BytesIO()
    Image.new("RGB", (20, 10), (10, 200, 30)).save(picture, "PNG")
    with tarfile.open(path, "w") as tar:
        for number, flag in enumerate(good):
            fields = {"width": 20, "height": 10, "expression": "it", "boxes_xyxy_px": [[1, 2, 5, 6]]}
            for suffix, data in (("json", json.dumps(fields).encode()), ("png", picture.getvalue() if flag else b"?")):
                member = tarfile.TarInfo(f"{path.stem}r{number}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(path)
