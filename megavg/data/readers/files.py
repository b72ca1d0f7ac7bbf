"""Open what a user named: folders and JSON files, with one clear error where they are missing or broken."""

from __future__ import annotations

import json
import os
from typing import Any, Callable, Iterable, Iterator


def existing_folder(path: str, option: str, what: str) -> str:
    """Return ``path`` if it is a folder.

    Raises:
        ValueError: naming ``option``, and ``what`` the folder should hold.
    """
    if not os.path.isdir(path):
        state = "is a file" if os.path.exists(path) else "does not exist"
        raise ValueError(f"{option}={path!r} {state}; name the folder that holds {what}")
    return path


def first_folder(candidates: Iterable[str], option: str, what: str) -> str:
    """The first of ``candidates`` that is a folder.

    Raises:
        ValueError: none is; names them all and the ``option`` that says where ``what`` is.
    """
    tried = [os.path.normpath(path) for path in candidates]
    found = next((path for path in tried if os.path.isdir(path)), None)
    if found is None:
        raise ValueError(f"found no folder of {what}, tried {', '.join(tried)}; name it with {option}")
    return found


def read_json(path: str, object_hook: Callable[[dict], Any] | None = None) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it is missing, no UTF-8 or no JSON.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file, object_hook=object_hook)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read annotations {path!r}: {error}") from error


def json_lines(path: str) -> Iterator[tuple[int, Any, str]]:
    """Yield (line number from 1, value, "") for every line that is not blank, or (number, None, error) for a bad one.

    Raises:
        ValueError: the file is missing or no UTF-8.
    """
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    value, problem = json.loads(line), ""
                except (ValueError, RecursionError) as error:
                    value, problem = None, str(error)
                yield number, value, problem
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read annotations {path!r}: {error}") from error


def rows_of(path: str) -> Iterator[tuple[str, int, Any, str]]:
    """Yield (place, number, value, error) of each row of a ``.jsonl`` file or of a ``.json`` file that holds a list.

    ``place`` is "line 3" or "item 2", for messages.

    Raises:
        ValueError: the file cannot be read, or a ``.json`` file holds no list.
    """
    if not path.endswith(".json"):
        yield from ((f"line {number}", number, value, problem) for number, value, problem in json_lines(path))
        return
    try:
        rows = read_json(path)
    except ValueError:
        # Some authors call JSON lines ".json".
        lines = list(json_lines(path))
        if len(lines) < 2 or lines[0][2]:
            raise
        yield from ((f"line {number}", number, value, problem) for number, value, problem in lines)
        return
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a JSON list of rows, got {type(rows).__name__}")
    yield from ((f"item {number}", number, row, "") for number, row in enumerate(rows))


def check_choice(value: str, choices: Iterable[str], option: str) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{option}={value!r} is none of {', '.join(choices)}")
