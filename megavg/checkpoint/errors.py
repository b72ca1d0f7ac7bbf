"""The one error of checkpoints."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be written or used; the message names the file and the remedy. Raised on every rank alike."""


def first_line(error: BaseException) -> str:
    """An error's type and the first line of its message, which libraries like to follow with pages."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
