"""Read shards: as an endless, seeded, resumable source of training batches, or once in order for evaluation.

A shard is a local tar, or anything that ``webdataset.gopen`` opens: ``pipe:COMMAND``, ``http(s)://...``. Of a local tar
each rank reads the headers, and the records of its own samples; a URL is fetched whole by every rank that reads it.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import logging
import os
from collections import Counter
from typing import Iterable, Iterator

from megavg.data.batches import Agree, BatchSource, SourceOptions
from megavg.data.decode import decode_record
from megavg.data.order import Lane
from megavg.data.sample import RawRecord, SampleError
from megavg.data.skips import SkipLog
from megavg.data.tars import walk_shards
from megavg.data.urls import is_url
from megavg.protocols.options import LabelNoise
from megavg.protocols.sample import Sample

SHUFFLE_BYTES = 256 << 20


def expand_shards(patterns: str | list[str]) -> list[str]:
    """List the tar files that ``patterns`` name, in their order, each once.

    A pattern is a path, a glob ("data/*.tar"), a brace range ("data/train-{000000..000007}.tar"), a folder, which
    means its ``*.tar`` in name order, or a URL, also with brace ranges: ``http(s)://...`` or ``pipe:COMMAND``, whose
    command is run by the shell and must write a tar. Nothing is fetched here.

    Raises:
        ValueError: when a pattern, or one path of a brace range, matches no file.
    """
    import braceexpand

    shards: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for path in [pattern] if os.path.exists(pattern) else braceexpand.braceexpand(pattern):
            found = [path] if is_url(path) else _matches(path)
            if not found:
                part = "" if path == pattern else f" (part of {pattern!r})"
                raise ValueError(f"no shard matches {path!r}{part}: expected an existing tar file, a folder of *.tar "
                                 f"files, a glob or a brace range; the current folder is {os.getcwd()}")
            shards += found
    if not shards:
        raise ValueError("no shards given: expected at least one path, folder, glob or brace range")
    return list(dict.fromkeys(shards))


def _matches(path: str) -> list[str]:
    if os.path.isdir(path):
        return sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
    if os.path.isfile(path):
        return [path]
    return sorted(found for found in glob.glob(path) if os.path.isfile(found))


def iterate_all(shards: str | list[str], on_error: str = "raise", max_skipped: int = 100,
                skipped: Counter | None = None, rank: int = 0, num_ranks: int = 1) -> Iterator[Sample]:
    """Yield every sample of ``shards`` once, decoded and in stored order, as evaluation needs it.

    Args:
        shards: paths, patterns or URLs, see ``expand_shards``.
        on_error, max_skipped: as in ``PromptSource``.
        skipped: a ``Counter`` that receives the number of skipped records by reason, those of all ranks.
        rank, num_ranks: yield samples rank, rank + num_ranks, ... only. Records of the others are not even read, but
            in skip mode, where every rank decodes every record: all must leave out the same.
    """
    skips = SkipLog(on_error, max_skipped, skipped, level=logging.WARNING if rank == 0 else logging.DEBUG)
    return _owned(walk_shards(expand_shards(shards)), skips, rank, num_ranks)


def _owned(records: Iterable[RawRecord | SampleError], skips: SkipLog, rank: int, num_ranks: int) -> Iterator[Sample]:
    place = 0
    for record in records:
        if isinstance(record, SampleError):
            skips.handle(record)
            continue
        mine = place % num_ranks == rank
        if mine or skips.skipping:
            try:
                sample = decode_record(record)
            except SampleError as error:
                skips.handle(error, record.index)
                continue
            if mine:
                yield sample
        place += 1


class PromptSource(BatchSource):
    """Hand out this rank's share of seeded global batches, and resume exactly, also under another ``dp_size``.

    Rank r receives items r, r + dp_size, r + 2 dp_size, ... of each global batch. Epoch e shuffles the order of the
    shards, then the records through a buffer, both seeded by (seed, e); batches run on across the end of an epoch.
    Order and contents depend on none of the options from ``agree`` on.

    Args:
        shards: paths, patterns or URLs, see ``expand_shards``.
        batch_size: samples of a GLOBAL batch; a multiple of ``dp_size``.
        seed: of the order.
        dp_rank, dp_size: this rank's place among the data-parallel ranks.
        shuffle_buffer: records held for shuffling; 1 shuffles the shards only. They refer to their local tar.
        on_error: "raise" stops at a torn shard, on every rank, and at a bad record, on the rank that owns it. "skip"
            leaves out bad records and the rest of torn shards, on every rank alike; a URL that cannot be fetched stops
            the run even then (``megavg.data.urls.TransportError``).
        max_skipped: number of skipped records that is still accepted; a torn shard counts as one.
        infinite: what a training run uses. False ends with ``StopIteration`` after one epoch.
        noise: wrong labels for a share of the samples; none by default.
        drop_last: of a finite source: leave out a last batch that is not full. By default it is handed out like the
            others, place k to rank k % dp_size, so that no sample is lost: some ranks then get fewer, or none.
        shuffle_bytes: bound of what the buffer holds in memory of URLs; 0 sets none. It changes their order.
        agree: with "skip" and several ranks: joins the lists of small values of all data-parallel ranks, in rank order.
            Each rank then decodes its own records and tells the others of the bad ones. All ranks must call
            ``next_batch`` together. Without it every rank decodes every record of the global batch.
        num_workers: processes that decode ahead for this one; 0 decodes in this process.
        prefetch_batches: global batches that they are ahead; this rank's share of them is held in memory, decoded.
    """

    def __init__(self, shards: str | list[str], batch_size: int, seed: int, dp_rank: int = 0, dp_size: int = 1,
                 shuffle_buffer: int = 1000, on_error: str = "raise", max_skipped: int = 100, infinite: bool = True,
                 noise: LabelNoise = LabelNoise(), *, drop_last: bool = False, shuffle_bytes: int = SHUFFLE_BYTES,
                 agree: Agree | None = None, num_workers: int = 0, prefetch_batches: int = 2):
        super().__init__(SourceOptions(batch_size, dp_rank, dp_size, on_error, max_skipped, infinite, drop_last, noise,
                                       agree, num_workers, prefetch_batches))
        self.shards = expand_shards(shards)
        self._lanes = [Lane(self.shards, seed, shuffle_buffer, shuffle_bytes, self._skips, infinite)]
        self._order = order_fingerprint(seed, shuffle_buffer, shuffle_bytes, noise, self.shards)

    def _lane_of(self, place: int) -> int:
        return 0

    def state_dict(self) -> dict:
        """The position after the last batch that was handed out, as plain JSON; the same on every rank."""
        return {**self._lanes[0].state(), "fingerprint": {**self._order, **shards_fingerprint(self.shards)}}

    def load_state_dict(self, state: dict) -> None:
        """Continue after the batches that ``state`` had seen, under any ``dp_size``, ``batch_size`` and workers.

        The current epoch is walked again up to that position: of local tars only the headers are read.

        Raises:
            ValueError: when ``state`` belongs to other shards, or another seed, shuffle buffer or noise.
        """
        check_fingerprint(state["fingerprint"], {**self._order, **shards_fingerprint(self.shards)})
        self._lanes[0].load(state)


def order_fingerprint(seed: int, shuffle_buffer: int, shuffle_bytes: int, noise: LabelNoise, shards: list[str]) -> dict:
    """What fixes the order and the samples beside the shards."""
    bound = {"shuffle_bytes": shuffle_bytes} if any(map(is_url, shards)) else {}
    changed = {"noise": json.loads(json.dumps(vars(noise)))} if noise.probability else {}
    return {"seed": seed, "shuffle_buffer": shuffle_buffer, **bound, **changed}


def shards_fingerprint(shards: list[str]) -> dict:
    """Which shards these are: names and contents, not folders (they may move between machines); the text of a URL.

    What a local tar holds is told by its sha256 in the index.json beside it, where that lists it with its size. A tar
    without one is told by its size and a hash of parts of it: of one that was built anew some part differs.
    """
    listed = {folder: _listed(folder) for folder in {os.path.dirname(shard) for shard in shards if not is_url(shard)}}
    listing = json.dumps([[shard] if is_url(shard) else
                          [os.path.basename(shard), *_content_of(shard, listed[os.path.dirname(shard)])]
                          for shard in shards])
    return {"num_shards": len(shards), "shards": hashlib.sha256(listing.encode("utf-8")).hexdigest()}


def _listed(folder: str) -> dict[tuple, str]:
    """(name, bytes) -> sha256 of the shards in the folder's index; nothing without an index that can be read."""
    try:
        with open(os.path.join(folder, "index.json"), encoding="utf-8") as file:
            return {(shard["name"], shard["bytes"]): str(shard["sha256"]) for shard in json.load(file)["shards"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _content_of(shard: str, listed: dict[tuple, str]) -> tuple[int, str]:
    status = os.stat(shard)
    sha256 = listed.get((os.path.basename(shard), status.st_size))
    return status.st_size, sha256 or _hash_of_parts(shard, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1 << 16)
def _hash_of_parts(path: str, size: int, changed_ns: int) -> str:
    """Of the first and the last 64 KiB, and of 64 blocks of 4 KiB between them, evenly spaced; once for each change."""
    ends = 1 << 16
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for place, length in [(0, ends), *((size * part // 64, 1 << 12) for part in range(64)), (size - ends, ends)]:
            file.seek(max(place, 0))
            digest.update(file.read(length))
    return digest.hexdigest()


def check_fingerprint(saved: dict, own: dict) -> None:
    """Raise ``ValueError``, naming what differs, unless a saved position belongs to this order of samples."""
    differing = [f"{name}: saved {saved.get(name)!r}, now {own.get(name)!r}" for name in own | saved
                 if saved.get(name) != own.get(name)]
    if differing:
        raise ValueError("this position belongs to another order of samples (" + "; ".join(differing) + "); "
                         "give the same shards (rebuilt? their contents count), weights, seed, shuffle_buffer and "
                         "noise, or start from the beginning")
