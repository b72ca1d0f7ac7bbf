"""Stream the records of one tar and notice when the tar is torn, which ``tarfile`` alone does not always say."""

from __future__ import annotations

import tarfile
from typing import BinaryIO, Iterable, Iterator

from megavg.data.sample import RawRecord, SampleError


class _Blocks:
    """A stream that gives one tar block at a time and keeps the last one.

    ``tarfile`` ends quietly when a header is cut off, missing or damaged. Because it can never read ahead here, the
    last block is the one it stopped at: in a whole tar that is the block of zeros which marks the end.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.last = b""

    def read(self, size: int = tarfile.BLOCKSIZE) -> bytes:
        self.last = self.file.read(min(size, tarfile.BLOCKSIZE))
        return self.last

    def check_end(self) -> None:
        if self.last != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError("no end-of-archive block where the members end")


def _members(shard: str, blocks: _Blocks) -> Iterator[dict]:
    """Members of the tar; the check runs before webdataset hands out the last, perhaps incomplete, record."""
    from webdataset.tariterators import tar_file_expander  # late: webdataset brings torch with it

    yield from tar_file_expander([{"url": shard, "stream": blocks}], eof_value=None)
    blocks.check_end()


def read_records(shard: str) -> Iterator[RawRecord]:
    """Yield the undecoded records of the uncompressed tar at path ``shard``, in its order, one in memory at a time.

    Raises:
        SampleError: "torn shard", after the records before the damage, when the tar cannot be read to its end.
    """
    from webdataset.tariterators import group_by_keys

    try:
        with open(shard, "rb") as file:
            for index, found in enumerate(group_by_keys(_members(shard, _Blocks(file)))):
                files = {suffix: data for suffix, data in found.items() if not suffix.startswith("__")}
                yield RawRecord(shard, found["__key__"], index, files)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        cause = getattr(error, "strerror", None) or (error.args[0] if error.args else type(error).__name__)
        raise SampleError(shard, "", "torn shard",
                          f"not a whole uncompressed tar ({cause}); copy or build it again") from error


def chain_shards(shards: Iterable[str], on_torn) -> Iterator[RawRecord]:
    """Yield the records of all ``shards``; ``on_torn(error)`` raises, or returns to go on with the next shard."""
    for shard in shards:
        try:
            yield from read_records(shard)
        except SampleError as error:
            on_torn(error)
