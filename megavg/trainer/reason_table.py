"""Count why answers got their rewards, and show the most frequent reasons: where a reward stays at 0, this says why."""

from __future__ import annotations

from collections import Counter
from typing import Mapping

NUM_ROWS = 10


class ReasonTable:
    """The reasons since the last table, over all ranks; :meth:`take` gives the table and begins the next one."""

    def __init__(self):
        self._counts: Counter = Counter()
        self._num_steps = 0

    def add(self, reasons: Mapping[str, int]) -> None:
        """Count one step's ``{"reward: reason": answers}``."""
        self._counts.update(reasons)
        self._num_steps += 1

    def take(self) -> Table | None:
        """The table of the steps since the last one; None where nothing was counted, as in supervised fine-tuning."""
        if not self._counts:
            return None
        table = Table(self._counts, self._num_steps)
        self._counts, self._num_steps = Counter(), 0
        return table


class Table:
    """The most frequent reasons as rows ``(reward, reason, answers, share of this reward's answers)``.

    Args:
        counts: answers by "reward: reason".
        num_steps: optimiser batches they come from.
    """

    def __init__(self, counts: Mapping[str, int], num_steps: int):
        self.num_steps = num_steps
        split = [(*name.partition(": ")[::2], count) for name, count in counts.items()]
        totals: Counter = Counter()
        for reward, _, count in split:
            totals[reward] += count
        # Of equal counts in the order of the names, so that two runs print the same.
        rows = [(reward, reason, count, count / totals[reward]) for reward, reason, count in split]
        rows.sort(key=lambda row: (-row[2], row[0], row[1]))
        self.rows, self.num_left_out = rows[:NUM_ROWS], max(len(rows) - NUM_ROWS, 0)

    def lines(self) -> list[str]:
        """The table as plain text, one line each."""
        steps = "the last step" if self.num_steps == 1 else f"the last {self.num_steps} steps"
        width = max(len(reward) for reward, *_ in self.rows)
        lines = [f"  {reward:<{width}}  {share:6.1%}  {reason}  ({count})"
                 for reward, reason, count, share in self.rows]
        if self.num_left_out:
            lines.append(f"  and {self.num_left_out} rarer ones; all of them are in metrics.jsonl")
        return [f"reasons for the rewards of {steps}:", *lines]

    def markdown(self) -> str:
        """The table for TensorBoard's text page."""
        rows = "".join(f"\n| {reward} | {_escaped(reason)} | {count} | {share:.1%} |"
                       for reward, reason, count, share in self.rows)
        return f"| reward | reason | answers | share |\n|---|---|---|---|{rows}"


def _escaped(text: str) -> str:
    """Text that cannot end a cell or begin a tag."""
    return text.replace("|", "\\|").replace("<", "&lt;")
