"""Write samples into webdataset tars whose bytes depend on the samples alone, with an index of counts and checksums."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import tarfile
from typing import Iterable, Iterator, NamedTuple

from PIL import Image

from megavg.data.sample import SampleError, check_sample, record_json
from megavg.protocols.sample import Sample

# suffix -> how Pillow saves it; png and webp keep every pixel, jpg does not.
IMAGE_FORMATS = {"png": {"format": "PNG"}, "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
                 "webp": {"format": "WEBP", "lossless": True}}
INDEX_NAME = "index.json"
FORMAT_VERSION = 1
OWNER = "megavg"


class Written(NamedTuple):
    """One finished tar: its samples, its size in bytes and its checksum."""

    num_samples: int
    num_bytes: int
    sha256: str


def write_shards(samples: Iterable[Sample], out_dir: str, prefix: str, samples_per_shard: int,
                 image_format: str = "png") -> dict:
    """Write ``samples`` as ``<prefix>-000000.tar``, ... and ``index.json`` into ``out_dir``; return the index.

    For samples made in memory. From files on disk, ``megavg.data.builder.build.build_shards`` uses many processes,
    continues after a kill and keeps the pictures' own bytes.

    Every file is first written beside its place (".tmp"); all are renamed when the last sample has been written, so
    that a failure leaves the folder as it was. Older shards of the same prefix are replaced as a set.

    Args:
        samples: read one at a time; each is checked on its way in.
        samples_per_shard: the last shard may hold fewer.
        image_format: "png" or "webp" (bit-equal pixels), or "jpg" (quality 95).

    Returns:
        {"format_version", "image_format", "num_samples", "bytes",
        "shards": [{"name", "num_samples", "bytes", "sha256"}, ...]}.

    Raises:
        SampleError: a sample that could not be read back, or a key that occurs twice.
        ValueError: a wrong argument, or no sample at all.
    """
    if image_format not in IMAGE_FORMATS:
        raise ValueError(f"image_format={image_format!r}: expected one of {sorted(IMAGE_FORMATS)}")
    check_names(prefix, samples_per_shard)
    os.makedirs(out_dir, exist_ok=True)
    names: list[str] = []
    try:
        index = _write_beside(samples, out_dir, prefix, samples_per_shard, image_format, names)
    except BaseException:
        _discard(_beside(out_dir, name) for name in names + [INDEX_NAME])
        raise
    _publish(out_dir, prefix, names)
    return index


def check_names(prefix: str, samples_per_shard: int) -> None:
    """Raise ``ValueError`` unless shards can be named after ``prefix`` and hold ``samples_per_shard`` samples."""
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard={samples_per_shard}: expected at least 1")
    if not re.fullmatch(r"[\w-]+", prefix):
        raise ValueError(f"prefix={prefix!r}: expected letters, digits, '_' and '-'")


def write_tar(path: str, records: Iterable[tuple[str, dict[str, bytes]]]) -> Written:
    """Write (key, {suffix: bytes}) records as one tar at ``path``, byte for byte as webdataset's own writer does.

    Members carry a fixed owner, mode and time, and a record's suffixes are sorted, so the bytes depend on the records
    alone. The file is on the disk, not only in a buffer, when the function returns.
    """
    count = 0
    with open(path, "wb") as file:
        counted = _Hashed(file)
        with tarfile.open(fileobj=counted, mode="w|", format=tarfile.PAX_FORMAT) as tar:
            for key, members in records:
                for suffix in sorted(members):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size, info.mtime, info.mode = len(members[suffix]), 0, 0o444
                    info.uname = info.gname = OWNER
                    tar.addfile(info, io.BytesIO(members[suffix]))
                count += 1
        file.flush()
        os.fsync(file.fileno())
    return Written(count, counted.num_bytes, counted.digest.hexdigest())


class _Hashed:
    """A file that is written once, from its beginning; knows the checksum without reading the file again."""

    def __init__(self, file):
        self.file, self.digest, self.num_bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.num_bytes += len(data)
        return self.file.write(data)


def encode_image(image: Image.Image, image_format: str) -> bytes:
    """The bytes of an image file of ``image_format`` (one of ``IMAGE_FORMATS``) that holds nothing but the pixels."""
    buffer = io.BytesIO()
    # Pillow would write a leftover ICC profile or EXIF block; only pixels belong in a shard.
    bare = image.copy()
    bare.info.clear()
    bare.save(buffer, **IMAGE_FORMATS[image_format])
    return buffer.getvalue()


def file_sha256(path: str) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_beside(samples: Iterable[Sample], out_dir: str, prefix: str, samples_per_shard: int, image_format: str,
                  names: list[str]) -> dict:
    """Write all tars and the index under their ".tmp" names; ``names`` lists each shard before it is begun."""
    entries: list[dict] = []
    keys: set[str] = set()
    numbered = itertools.groupby(enumerate(samples), key=lambda pair: pair[0] // samples_per_shard)
    for number, group in numbered:
        names.append(f"{prefix}-{number:06d}.tar")
        written = write_tar(_beside(out_dir, names[-1]), _records((sample for _, sample in group), image_format, keys))
        entries.append({"name": names[-1], "num_samples": written.num_samples, "bytes": written.num_bytes,
                        "sha256": written.sha256})
    if not entries:
        raise ValueError(f"no sample to write to {out_dir!r}; check the source and its filters")
    index = {"format_version": FORMAT_VERSION, "image_format": image_format,
             "num_samples": sum(entry["num_samples"] for entry in entries),
             "bytes": sum(entry["bytes"] for entry in entries), "shards": entries}
    with open(_beside(out_dir, INDEX_NAME), "w", encoding="utf-8") as file:
        json.dump(index, file, indent=1)
        file.write("\n")
    return index


def _records(samples: Iterable[Sample], image_format: str,
             keys: set[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The members of each sample; ``keys`` collects the keys of the whole set."""
    for sample in samples:
        check_sample(sample)
        if sample.key in keys:
            raise SampleError(sample.shard, sample.key, "bad key", "this key occurs twice in the shard set")
        keys.add(sample.key)
        yield sample.key, {image_format: encode_image(sample.image, image_format), "json": record_json(sample)}


def _publish(out_dir: str, prefix: str, names: list[str]) -> None:
    """Rename the finished files into place; the index goes last, so where it stands the set is complete."""
    stale = [name for name in os.listdir(out_dir)
             if re.fullmatch(re.escape(prefix) + r"-\d{6}\.tar", name) and name not in names]
    _discard([os.path.join(out_dir, name) for name in stale + [INDEX_NAME]])
    for name in names + [INDEX_NAME]:
        os.replace(_beside(out_dir, name), os.path.join(out_dir, name))


def _beside(out_dir: str, name: str) -> str:
    return os.path.join(out_dir, name + ".tmp")


def _discard(paths: Iterable[str]) -> None:
    for path in paths:
        if os.path.exists(path):
            os.remove(path)
