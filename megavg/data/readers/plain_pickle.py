"""Read a pickle of plain data without running anything that stands in it.

A pickle is a program: it may name any function of any module and call it. Plain data (lists, dictionaries, texts,
numbers) needs no name from any module, so here every name is refused.
"""

from __future__ import annotations

import pickle
from typing import Any


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_plain(path: str) -> Any:
    """The content of a pickle that holds lists, dictionaries, texts and numbers only; texts of Python 2 are bytes.

    Nothing of the file is run: a name of a module, as every object of a class or call of a function needs it, ends
    the reading.

    Raises:
        ValueError: the file is missing, torn, or holds anything else; names what it asks for.
    """
    try:
        with open(path, "rb") as file:
            # "bytes": only the caller knows which of the texts are UTF-8.
            return _PlainUnpickler(file, encoding="bytes").load()
    except OSError as error:
        raise ValueError(f"cannot read annotations {path!r}: {error}") from error
    except MemoryError as error:
        raise ValueError(f"{path}: refused, it asks for more memory than there is") from error
    except Exception as error:  # a broken pickle raises nearly every type there is
        raise ValueError(f"{path}: refused, {error or type(error).__name__}. Expected a pickle of lists, dictionaries, "
                         "texts and numbers alone; nothing of it was run. Take the file from its authors.") from error


def text_of(value: Any) -> Any:
    """A text from either Python: bytes are read as UTF-8, or else as Latin-1; anything else stays as it is."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value.decode("latin-1")


def with_text_keys(value: Any) -> Any:
    """A dictionary with its keys and the texts among its values as ``str``; anything else stays as it is."""
    if not isinstance(value, dict):
        return value
    return {text_of(name): text_of(entry) for name, entry in value.items()}
