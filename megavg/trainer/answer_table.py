"""Show some answers as text: what was asked and said, the reward and why; it goes with the answers' picture."""

from __future__ import annotations

from typing import Callable

from megavg.protocols.sample import Sample
from megavg.rewards.base import OTHER_TASK
from megavg.trainer.rollouts import Judgement, Rollouts

_LONGEST = 2000


def shown_answers(rollouts: Rollouts, limit: int = 8) -> list[int]:
    """Rows of the answers to look at: the first one to each of this rank's first ``limit`` prompts."""
    return list(range(0, len(rollouts.responses), rollouts.group_size))[:limit]


def answer_table(rollouts: Rollouts, judgement: Judgement, question: Callable[[Sample], str]) -> str:
    """A Markdown table of those answers; nothing that a model or a record says can leave its cell or become a tag."""
    rows = ["| sample | question | answer | reward | reasons |", "|---|---|---|---|---|"]
    for b in shown_answers(rollouts):
        sample, row = rollouts.samples[b // rollouts.group_size], judgement.rows[b]
        reasons = [f"{name}: {result.reason} ({result.score:.3g})" for name, result in judgement.results[b].items()
                   if result != OTHER_TASK]
        cells = [sample.key, question(sample), row["text"], f"{judgement.rewards[b]:.3f} at IoU {row['iou']:.2f}"]
        rows.append(f"| {' | '.join(map(_cell, [*cells, '; '.join(reasons)]))} |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    """Text as it is, whatever Markdown or HTML would make of it; a line's end shows as a sign."""
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return "".join(character if character.isalnum() or character in " ,:'\"" else
                   "\u21b5 " if character == "\n" else f"&#{ord(character)};" for character in text) or "(nothing)"
