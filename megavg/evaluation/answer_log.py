"""Keep a model's answers on disk as they come, so that an evaluation that was killed answers only what is missing.

Every data-parallel rank appends to a file of its own. What is kept is what the model said, not what it was worth:
figures are made of it at the end, by whatever version of the scoring is there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Iterable

from megavg.protocols.sample import Completion, Frame, Sample

ANSWERS = "answers"  # folder of the files of answers, in that of their set


class AnswerLog:
    """Append answers to ``folder``/answers/rank-<rank>.jsonl; what ``append`` was given is on the disk when it returns.
    """

    def __init__(self, folder: Path, rank: int):
        self.path = Path(folder) / ANSWERS / f"rank-{rank:05d}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")
        self._file.truncate(_whole_bytes(self.path))  # a line that a kill cut off would join with the next one

    def append(self, answers: Iterable[dict]) -> None:
        """Write answers (:func:`pack`) and wait until the disk has them."""
        self._file.write(b"".join(json.dumps(answer, ensure_ascii=True).encode() + b"\n" for answer in answers))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; harmless when it is closed."""
        self._file.close()


def pack(sample: Sample, completion: Completion) -> dict:
    """An answer as one line of the log."""
    frame = completion.frame
    return {"shard": sample.shard, "key": sample.key, "text": completion.text, "box_format": completion.box_format,
            "frame": [frame.kind, frame.original_width, frame.original_height, frame.resized_width,
                      frame.resized_height],
            "num_tokens": completion.num_tokens, "truncated": completion.truncated}


def unpack(answer: dict) -> Completion:
    """The answer that a line of the log holds."""
    return Completion(answer["text"], answer["box_format"], Frame(*answer["frame"]), answer["num_tokens"],
                      answer["truncated"])


def read_answers(folder: Path) -> dict[tuple[str, str], dict]:
    """Every answer under ``folder``, of all ranks and launches, by (shard, key); a torn last line is dropped.

    Raises:
        ValueError: a line in the middle is no answer; the message names it.
    """
    found: dict[tuple[str, str], dict] = {}
    for path in sorted((Path(folder) / ANSWERS).glob("rank-*.jsonl")):
        lines = path.read_bytes()[:_whole_bytes(path)].splitlines()
        for number, line in enumerate(lines, 1):
            try:
                answer = json.loads(line)
                unpack(answer)
                found.setdefault((answer["shard"], answer["key"]), answer)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: line {number} is no answer ({error!r}); remove this line, or set "
                                 "evaluation.overwrite=true to answer the whole set again") from error
    return found


def _whole_bytes(path: Path) -> int:
    """Bytes of a file up to its last line end."""
    return path.read_bytes().rfind(b"\n") + 1
