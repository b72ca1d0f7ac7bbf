"""Turn a record into a sample with its picture, here or as a worker process: ``python -m megavg.data.decode``.

A worker reads pickled ``(number, record)`` from its standard input, writes ``(number, answer)`` to its standard output
and ends with its input, so it never outlives the process that feeds it. It imports Pillow and nothing heavier.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import sys
import traceback
from typing import BinaryIO

from PIL import Image

from megavg.data.sample import RawRecord, SampleError, parse_record, with_image
from megavg.protocols.sample import Sample


def decode_record(record: RawRecord) -> Sample:
    """Read, check and decode ``record``; raises ``SampleError``."""
    return with_image(parse_record(record), record)


def pack(record: RawRecord) -> tuple:
    """The answer of a worker: ("sample", sample without image, size, RGB bytes), ("error", ...) or ("crash", text)."""
    try:
        sample = decode_record(record)
        return "sample", dataclasses.replace(sample, image=None), sample.image.size, sample.image.tobytes()
    except SampleError as error:
        return "error", error.args
    except Exception:
        return "crash", traceback.format_exc()


def unpack(answer: tuple) -> Sample | SampleError | str:
    """What ``pack`` packed: a sample, why the record gives none, or the traceback of an error nobody expected."""
    if answer[0] == "sample":
        _, sample, size, pixels = answer
        return dataclasses.replace(sample, image=Image.frombytes("RGB", size, pixels))
    return SampleError(*answer[1]) if answer[0] == "error" else answer[1]


def serve(tasks: BinaryIO, answers: BinaryIO) -> None:
    """Answer tasks until there are no more, or until nobody listens."""
    try:
        while True:
            number, record = pickle.load(tasks)
            pickle.dump((number, pack(record)), answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()
    except (EOFError, BrokenPipeError):
        return


def main() -> None:
    """Serve on the standard streams; what libraries print goes to the standard error."""
    # for the parent, which then closes the input: Ctrl-C and what Slurm sends reach all processes
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb", buffering=1 << 16)
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)
    os._exit(0)  # a pipe that nobody reads any more is no error at exit


if __name__ == "__main__":
    main()
