"""Read numbers out of a model's text: plain decimal numbers only, of bounded length and size, nothing evaluated."""

from __future__ import annotations

import re

MAX_COORDINATE = 1e6
"""A coordinate beyond this is no position in any picture; it would only invite overflow."""
MAX_DIGITS = 64
"""Characters of one number; converting a longer one can cost more than linear time."""

_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)


def number_fault(part: str) -> str | None:
    """Say why the text is not one usable coordinate: "not a number", "not finite" or "huge number"; None when it is."""
    if len(part) > MAX_DIGITS:
        return "huge number" if _NUMBER.fullmatch(part) else "not a number"
    if _NUMBER.fullmatch(part):
        return "huge number" if abs(float(part)) > MAX_COORDINATE else None
    return "not finite" if _NOT_FINITE.fullmatch(part) else "not a number"


def split_numbers(text: str) -> tuple[str, ...]:
    """The parts of "1, 2, 3" without the blanks around them; no part is looked at."""
    return tuple(part.strip() for part in text.split(","))
