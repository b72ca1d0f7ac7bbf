"""Write samples into webdataset tars whose bytes depend on the samples alone, with an index of counts and checksums."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
from typing import Iterable

from megavg.data.sample import SampleError, check_sample, record_json
from megavg.protocols.sample import Sample

# suffix -> how Pillow saves it; png and webp keep every pixel, jpg does not.
IMAGE_FORMATS = {"png": {"format": "PNG"}, "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
                 "webp": {"format": "WEBP", "lossless": True}}
INDEX_NAME = "index.json"


def write_shards(samples: Iterable[Sample], out_dir: str, prefix: str, samples_per_shard: int,
                 image_format: str = "png") -> dict:
    """Write ``samples`` as ``<prefix>-000000.tar``, ... and ``index.json`` into ``out_dir``; return the index.

    Every file is first written beside its place (".tmp"); all are renamed when the last sample has been written, so
    that a failure leaves the folder as it was. Older shards of the same prefix are replaced as a set.

    Args:
        samples: read one at a time; each is checked on its way in.
        samples_per_shard: the last shard may hold fewer.
        image_format: "png" or "webp" (bit-equal pixels), or "jpg" (quality 95).

    Returns:
        {"image_format", "num_samples", "bytes", "shards": [{"name", "num_samples", "bytes", "sha256"}, ...]}.

    Raises:
        SampleError: a sample that could not be read back, or a key that occurs twice.
        ValueError: a wrong argument, or no sample at all.
    """
    if image_format not in IMAGE_FORMATS:
        raise ValueError(f"image_format={image_format!r}: expected one of {sorted(IMAGE_FORMATS)}")
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard={samples_per_shard}: expected at least 1")
    if not re.fullmatch(r"[\w-]+", prefix):
        raise ValueError(f"prefix={prefix!r}: expected letters, digits, '_' and '-'")
    os.makedirs(out_dir, exist_ok=True)
    names: list[str] = []
    try:
        index = _write_beside(samples, out_dir, prefix, samples_per_shard, image_format, names)
    except BaseException:
        _discard(_beside(out_dir, name) for name in names + [INDEX_NAME])
        raise
    _publish(out_dir, prefix, names)
    return index


def _write_beside(samples: Iterable[Sample], out_dir: str, prefix: str, samples_per_shard: int, image_format: str,
                  names: list[str]) -> dict:
    """Write all tars and the index under their ".tmp" names; ``names`` lists each shard before it is begun."""
    entries: list[dict] = []
    keys: set[str] = set()
    numbered = itertools.groupby(enumerate(samples), key=lambda pair: pair[0] // samples_per_shard)
    for number, group in numbered:
        names.append(f"{prefix}-{number:06d}.tar")
        path = _beside(out_dir, names[-1])
        count = _write_tar(path, (sample for _, sample in group), image_format, keys)
        entries.append({"name": names[-1], "num_samples": count, "bytes": os.path.getsize(path),
                        "sha256": _sha256(path)})
    if not entries:
        raise ValueError(f"no sample to write to {out_dir!r}; check the source and its filters")
    index = {"image_format": image_format, "num_samples": sum(entry["num_samples"] for entry in entries),
             "bytes": sum(entry["bytes"] for entry in entries), "shards": entries}
    with open(_beside(out_dir, INDEX_NAME), "w", encoding="utf-8") as file:
        json.dump(index, file, indent=1)
        file.write("\n")
    return index


def _publish(out_dir: str, prefix: str, names: list[str]) -> None:
    """Rename the finished files into place; the index goes last, so where it stands the set is complete."""
    stale = [name for name in os.listdir(out_dir)
             if re.fullmatch(re.escape(prefix) + r"-\d{6}\.tar", name) and name not in names]
    _discard([os.path.join(out_dir, name) for name in stale + [INDEX_NAME]])
    for name in names + [INDEX_NAME]:
        os.replace(_beside(out_dir, name), os.path.join(out_dir, name))


def _write_tar(path: str, samples: Iterable[Sample], image_format: str, keys: set[str]) -> int:
    """Write one tar and return its number of samples; ``keys`` collects the keys of the whole set."""
    from webdataset import TarWriter  # late: webdataset brings torch with it

    count = 0
    with open(path, "wb") as file, TarWriter(file, encoder=False, mtime=0, user="megavg", group="megavg") as tar:
        for sample in samples:
            check_sample(sample)
            if sample.key in keys:
                raise SampleError(sample.shard, sample.key, "bad key", "this key occurs twice in the shard set")
            keys.add(sample.key)
            tar.write({"__key__": sample.key, image_format: _encode(sample, image_format), "json": record_json(sample)})
            count += 1
    return count


def _encode(sample: Sample, image_format: str) -> bytes:
    buffer = io.BytesIO()
    # Pillow would write a leftover ICC profile or EXIF block; only pixels belong in a shard.
    bare = sample.image.copy()
    bare.info.clear()
    bare.save(buffer, **IMAGE_FORMATS[image_format])
    return buffer.getvalue()


def _beside(out_dir: str, name: str) -> str:
    return os.path.join(out_dir, name + ".tmp")


def _discard(paths: Iterable[str]) -> None:
    for path in paths:
        if os.path.exists(path):
            os.remove(path)


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
