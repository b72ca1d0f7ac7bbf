"""Find the part of a model's text that is its answer, and see whether it breaks off."""

from __future__ import annotations

import re

MAX_LABEL = 200
"""Characters of a class name; a longer text is no name."""

_DOUBLE = r'"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"'
_SINGLE = r"'[^'\\\n]*+(?:\\.[^'\\\n]*+)*+'"
STRING = f"(?:{_DOUBLE}|{_SINGLE})"
"""A string on one line, in double or single quotes."""
# A bracket in a string opens nothing, and one before a word or a number is prose or a list of its own.
_STRUCTURE = re.compile(rf"""(?P<before>[\[{{,:])\s*+{STRING}|(?P<list>\[[^\[\]{{}}]*+\])"""
                        r"""|(?P<open>[\[{](?=\s*+(?:[\[\]{}"']|\Z)))|(?P<close>[\]}])""")
_NUMBERS = re.compile(r"[\s0-9.,+eExy=-]*")


def breaks_off(text: str) -> bool:
    """True where an object, or a list that holds more than words, is still open at the end of the text."""
    depth = 0
    for found in _STRUCTURE.finditer(text):
        kind, first = found.lastgroup, found.group()[0]
        if kind == "open" or (kind == "before" and first in "[{"):
            depth += 1
        elif kind == "close":
            depth = max(depth - 1, 0)
    return depth > 0 or _open_numbers(text, "[", "]")


def pair_breaks_off(text: str) -> bool:
    """True where the text ends inside of ``(x,y)`` or ``(x0,y0),(x1,y1)`` or a control token, or before a named box."""
    text = text.rstrip()
    _, bracket, rest = text.rpartition("(")
    if bracket and (_open_numbers(text, "(", ")") or rest.partition(")")[2].strip() == ","):
        return True
    if text.rfind("<|object_ref_start|>") > text.rfind("<|box_end|>") > -1:
        return True
    _, token, rest = text.rpartition("<|")
    return text.endswith("<") or (bool(token) and "|>" not in rest)


def _open_numbers(text: str, opening: str, closing: str) -> bool:
    _, found, rest = text.rpartition(opening)
    return bool(found) and closing not in rest and bool(_NUMBERS.fullmatch(rest))


def answer_part(text: str) -> str | None:
    """The text that counts as the answer; None while the model is still thinking.

    Of what stands after the last ``</think>`` (of everything where there is none) the part inside the last
    ``<answer>``, where there is one. Inside of thoughts ``<answer>`` is a draft, whether they are closed or broken off;
    one that ends a text whose thoughts were never closed is taken.
    """
    told = text.rpartition("</think>")[2]
    if "<think>" in told and not told.rstrip().endswith("</answer>"):
        return None
    return told.rpartition("<answer>")[2].partition("</answer>")[0] if "<answer>" in told else told


def inside_wrapper(body: str) -> str | None:
    """What stands between ``<answer>`` and ``</answer>``; None unless the wrapper is whole, single and not empty."""
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    if any(body.count(tag) != 1 for tag in tags) or not body.startswith(tags[0]) or not body.endswith(tags[3]):
        return None
    thought, _, rest = body[len(tags[0]):-len(tags[3])].partition(tags[1])
    between, found, answer = rest.partition(tags[2])
    return answer.strip() if found and thought.strip() and not between.strip() else None


def without_fence(body: str) -> str:
    """The text inside of a code fence that wraps the whole of it, else the text as it is."""
    if len(body) > 6 and body.startswith("```") and body.endswith("```"):
        return body[3:-3].removeprefix("json").strip()
    return body
