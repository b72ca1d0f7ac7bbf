"""Keep a model's answers on the disk from all of its ranks, and turn what a disk refuses into one message for all."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Callable, Iterator, Sequence

import torch.distributed as dist

from megavg.evaluation.answer_log import AnswerLog
from megavg.parallel.context import ParallelContext


@contextlib.contextmanager
def disk_told(folder: Path, remedy: str) -> Iterator[None]:
    """Turn an OSError of the block into a ValueError that names the folder, what happened and ``remedy``.

    Used inside of ``told_to_all``, which ends all ranks with the message of a ValueError.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot go on in {folder} ({error}); {remedy}") from error


class KeptAnswers:
    """The answers of one data-parallel rank on the disk: the first process of its model writes, the others hear of it.

    All ranks of the model make it, append and close together. Where the disk refuses, all of them raise ValueError:
    the others would wait for the first in the model's next pass. Other data-parallel ranks are not waited for.

    Args:
        folder: of the set.
    """

    def __init__(self, folder: Path, context: ParallelContext):
        self._folder, self._context, self._log = folder, context, None
        self._on_first(self._open)

    def append(self, answers: Sequence[dict]) -> None:
        """Write packed answers; they are on the disk when this returns."""
        self._on_first(lambda: self._log.append(answers))

    def close(self) -> None:
        """Close the file."""
        self._on_first(lambda: self._log.close())

    def _open(self) -> None:
        self._log = AnswerLog(self._folder, self._context.dp_rank)

    def _on_first(self, act: Callable[[], None]) -> None:
        context, message = self._context, None
        if context.tp_rank == 0 and context.is_first_stage:
            try:
                with disk_told(self._folder, "make room, and give the same command again: it answers what is missing"):
                    act()
            except ValueError as error:
                message = str(error)
        for size, group in ((context.tp_size, context.tp_group), (context.pp_size, context.pp_group)):
            if size > 1:
                messages: list = [None] * size
                dist.all_gather_object(messages, message, group=group)
                message = next((other for other in messages if other), None)
        if message:
            raise ValueError(message)
