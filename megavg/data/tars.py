"""Walk through the records of a tar and notice when it is torn, which ``tarfile`` alone does not always say.

Of a local tar only the headers are read: a record refers to its members by their places, and whoever needs one reads
it. A tar that comes through a pipe or from a server is read as it comes, and records hold the bytes.
"""

from __future__ import annotations

import itertools
import logging
import re
import tarfile
import time
from typing import BinaryIO, Iterable, Iterator

from megavg.data import urls
from megavg.data.sample import IMAGE_SUFFIXES, RawRecord, SampleError
from megavg.data.spans import Span, version_of
from megavg.data.urls import TransportError, UrlStream, is_url
from megavg.protocols.life import goes_on

logger = logging.getLogger(__name__)

_HEADER_BUFFER = 4096  # two headers and the JSON between them are one read
_NAME = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)")  # a member's key and suffix: the file name is cut at its first dot
_META = re.compile(r"__[^/]*__($|/)")  # members that webdataset leaves out
_KEPT = {"json", *IMAGE_SUFFIXES}


class _Blocks:
    """What ``tarfile`` reads a tar from; it keeps the block that was read last.

    ``tarfile`` ends quietly when a header is cut off, missing or damaged. The last block it read is then the one it
    stopped at: in a whole tar that is the block of zeros which marks the end.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.last = file, b""
        self.tell, self.seek = file.tell, file.seek

    def read(self, size: int) -> bytes:
        self.last = self.file.read(size)
        goes_on()
        return self.last

    def check_end(self) -> None:
        if self.last != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError("no end-of-archive block where the members end")


class _Forward:
    """A stream as a file that goes forward only, but for the byte before: ``tarfile`` looks at it again."""

    def __init__(self, stream: UrlStream):
        self.stream, self.place, self.before, self.again = stream, 0, b"", b""

    def tell(self) -> int:
        return self.place

    def seek(self, place: int) -> None:
        if place == self.place - 1 and self.before and not self.again:
            self.place, self.again = place, self.before
        while self.place < place and self.read(min(place - self.place, 1 << 20)):
            pass

    def read(self, size: int) -> bytes:
        data = self.again[:size]
        self.again = b""
        data += self.stream.read(size - len(data)) if size > len(data) else b""
        self.place, self.before = self.place + len(data), data[-1:] or self.before
        return data


def _members(shard: str, file: BinaryIO | _Forward, version: tuple[int, int, int] | None
             ) -> Iterator[tuple[str, bytes | Span]]:
    """(name, data) of the members, with a ``Span`` for data where the file has a ``version``.

    The check runs before the grouping hands out the last, perhaps incomplete, record.
    """
    blocks = _Blocks(file)
    tar = tarfile.open(fileobj=blocks, mode="r:")
    while (member := tar.next()) is not None:
        tar.members = []  # tarfile would keep them all
        name = member.name
        if not member.isreg() or _META.match(name):
            continue
        if member.issparse():
            raise tarfile.ReadError(f"member {name} is stored with holes (GNU sparse)")
        if version is not None:
            data: Span | bytes = Span(shard, member.offset_data, member.size, version)
        else:
            data = file.read(member.size) if name.rpartition("/")[2].partition(".")[2].lower() in _KEPT else b""
        yield name, data
    blocks.check_end()
    if isinstance(file, _Forward):
        file.stream.finish()


def _by_key(shard: str, members: Iterable[tuple[str, bytes | Span]]) -> Iterator[RawRecord]:
    """Put neighbouring members that share a key together, as webdataset does; a repeated member spoils that record."""
    key, files, problem, index = None, {}, None, 0
    for name, data in members:
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        if match[1] != key:
            if key is not None:
                yield RawRecord(shard, key, index, files, problem)
                index += 1
            key, files, problem = match[1], {}, None
        suffix = match[2].lower()
        if suffix in files:
            problem = problem or ("duplicate key", f"{name} occurs again in the record of its key, so which members "
                                  "belong together is not known")
        elif not suffix.startswith("__"):
            files[suffix] = data
    if key is not None:
        yield RawRecord(shard, key, index, files, problem)


def _grouped(shard: str, members: Iterable[tuple[str, bytes | Span]]) -> Iterator[RawRecord]:
    """The records of ``members``; raises ``SampleError`` "torn shard" where the tar ends before its end."""
    try:
        yield from _by_key(shard, members)
    except TransportError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        cause = getattr(error, "strerror", None) or (error.args[0] if error.args else type(error).__name__)
        raise SampleError(shard, "", "torn shard",
                          f"not a whole uncompressed tar ({cause}); copy or build it again") from error


def read_records(shard: str) -> Iterator[RawRecord]:
    """Yield the undecoded records of the uncompressed tar ``shard``, a path or a URL, in its order.

    The members of a file are ``Span``s that read themselves, those of a URL are bytes (empty where neither JSON nor
    image). One record is in memory at a time.

    Raises:
        SampleError: "torn shard", after the records before the damage, when the tar cannot be read to its end.
        TransportError: the same, when a URL could not be fetched to its end in ``urls.ATTEMPTS`` attempts.
    """
    if is_url(shard):
        yield from _fetched(shard)
        return
    try:
        file = open(shard, "rb", buffering=_HEADER_BUFFER)
    except OSError as error:
        raise SampleError(shard, "", "torn shard", f"it cannot be opened ({error.strerror}); copy or build it "
                          "again") from error
    with file:
        yield from _grouped(shard, _members(shard, file, version_of(file.fileno())))


def _fetched(url: str) -> Iterator[RawRecord]:
    """The records of a URL; after a failure it is fetched from its start again and goes on where it was."""
    done, last = 0, None
    for attempt in itertools.count(1):
        try:
            for record in _streamed(url):
                if record.index >= done:
                    done, last = record.index + 1, record.key
                    yield record
                elif record.index == done - 1 and record.key != last:
                    raise TransportError(url, f"it holds something else than at the first attempt: {record.key!r} "
                                         f"instead of {last!r}", retry=False)
            return
        except TransportError as error:
            if not error.retry or attempt == urls.ATTEMPTS:
                raise TransportError(url, f"{error.detail} (attempt {attempt}, after {done} records)") from error
            seconds = urls.RETRY_SECONDS * 2 ** (attempt - 1)
            logger.warning("%s; trying again in %.0f s", error, seconds)
            time.sleep(seconds)


def _streamed(url: str) -> Iterator[RawRecord]:
    stream = UrlStream(url)
    try:
        yield from _grouped(url, _members(url, _Forward(stream), None))
    finally:
        stream.close()


def walk_shards(shards: Iterable[str]) -> Iterator[RawRecord | SampleError]:
    """Yield the records of all ``shards`` and, where one is torn, the error in the place of its missing records."""
    for shard in shards:
        try:
            yield from read_records(shard)
        except SampleError as error:
            yield error
