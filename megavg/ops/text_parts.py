"""Find the part of a model's text that is its answer."""

from __future__ import annotations

MAX_LABEL = 200
"""Characters of a class name; a longer text is no name."""


def answer_part(text: str) -> str | None:
    """The text that counts as the answer; None while the model is still thinking.

    The part inside ``<answer>`` where there is one (the last one), else the part after ``</think>``, else everything.
    """
    if "<answer>" in text:
        return text.rpartition("<answer>")[2].partition("</answer>")[0]
    if "</think>" in text:
        return text.rpartition("</think>")[2]
    return None if "<think>" in text else text


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
