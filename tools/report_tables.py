"""The parts of a report that stand in words and numbers: the runs, their configurations, reasons for rewards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Sequence

from tools.report_curves import swatch
from tools.report_evaluation import SetStory
from tools.report_run import Run, status, when
from tools.report_text import Html, fold, fraction, number, table, text

NUM_PERIODS = 8  # columns of the table of reasons
_NOT_COMPARED = ("trainer.output_dir",)  # differs between any two runs and says nothing


def cards(runs: Sequence[Run], stories: Sequence[SetStory], smooth: int) -> str:
    """One card for each run, side by side: what it is, how it ended, and its final figures."""
    return '<div class="cards">' + "".join(
        _card(i, run, [story for story in stories if story.run == i], smooth) for i, run in enumerate(runs)) + "</div>"


def configurations(runs: Sequence[Run]) -> str:
    """What differs between the runs, and every option, folded."""
    flat = [flatten(run.config) for run in runs]
    names = list(dict.fromkeys(name for options in flat for name in options))
    differing = [name for name in names if name not in _NOT_COMPARED
                 and len({json.dumps(options.get(name), default=str) for options in flat}) > 1]
    parts = []
    if len(runs) > 1:
        rows = [[name, *(_option(options, name) for options in flat)] for name in differing]
        parts.append("<h3>What differs</h3>" + (table(["option", *(run.name for run in runs)], rows, len(runs) + 1)
                                                if rows else "<p>Nothing but the output folder.</p>"))
    same = [name for name in names if name not in differing or len(runs) == 1]
    rows = [[name, *dict.fromkeys(_option(options, name) for options in flat)] for name in same]
    header = ["option", "value"] if len(runs) == 1 else ["option", "value of all runs"]
    rows = [[row[0], " | ".join(row[1:])] for row in rows]
    what = "The whole configuration" if len(runs) == 1 else "The rest"
    parts.append(fold(f"{what}: {len(rows)} options", table(header, rows, 2)) if rows
                 else "<p>No configuration was found.</p>")
    return "".join(parts)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A configuration as dotted option -> value."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree} if prefix else {}
    return {name: value for key, branch in tree.items()
            for name, value in flatten(branch, f"{prefix}.{key}" if prefix else str(key)).items()}


def reasons(run: Run) -> str:
    """How often each reward gave each reason, over the run; a cell is the share of this reward's answers, in percent.

    Empty where the run counted none.
    """
    if not run.reasons:
        return ""
    steps = sorted(run.reasons)
    count = min(NUM_PERIODS, len(steps))
    periods = [steps[p * len(steps) // count:(p + 1) * len(steps) // count] for p in range(count)]
    sums: list[dict[str, int]] = []
    for period in periods:
        sums.append({})
        for step in period:
            for name, answers in run.reasons[step].items():
                sums[-1][name] = sums[-1].get(name, 0) + answers
    names = {name: sum(of.get(name, 0) for of in sums) for of in sums for name in of}
    by_count = sorted(names, key=lambda name: (-names[name], name))
    rewards = list(dict.fromkeys(name.partition(": ")[0] for name in by_count))
    rows = []
    for reward in rewards:
        own = [name for name in by_count if name.partition(": ")[0] == reward]
        totals = [sum(of.get(name, 0) for name in own) for of in sums]
        for i, name in enumerate(own):
            cells = [_share(of.get(name, 0), total) for of, total in zip(sums, totals)]
            rows.append([reward if i == 0 else "", name.partition(": ")[2] or name, *cells, f"{names[name]:,}"])
    header = [f"{period[0]}\u2013{period[-1]}" if len(period) > 1 else str(period[0]) for period in periods]
    return table(["reward", "reason", *(f"steps {header[0]}", *header[1:]), "answers"], rows, 2)


def notes(runs: Sequence[Run]) -> str:
    """What is missing or could not be read."""
    found = "".join(f"<li><b>{text(run.name)}</b>: {text(note)}</li>" for run in runs for note in run.notes)
    return f'<ul class="notes">{found}</ul>' if found else ""


def _card(index: int, run: Run, stories: Sequence[SetStory], smooth: int) -> str:
    kind, words = status(run)
    facts = run.facts
    algorithm = facts.get("algorithm") or run.option("algorithm", "name") or "unknown algorithm"
    what = [("algorithm", f"{algorithm} {facts.get('algorithm_mark', '')}".strip()),
            ("model", f"{facts.get('family', '')} from {run.option('model', 'path') or 'an unknown model'}".strip()),
            ("layout", f"{facts.get('layout', 'unknown')}, {facts.get('device', 'unknown device')}, "
                       f"{run.option('model', 'dtype') or 'unknown dtype'}"),
            ("written", when(run)), ("folder", _from_here(run))]
    lines = "".join(f"<dt>{name}</dt><dd>{text(value)}</dd>" for name, value in what)
    figures = "".join(_figure(*figure) for figure in _figures(run, stories, smooth))
    return (f'<article class="card"><h2>{swatch(index)}{text(run.name)}</h2><p class="status {kind}">{text(words)}</p>'
            f'<div class="figures">{figures}</div><dl>{lines}</dl></article>')


def _from_here(run: Run) -> str:
    """The folder as somebody would write it who stands where the report is made."""
    here = Path.cwd()
    return str(run.folder.relative_to(here) if run.folder.is_relative_to(here) else run.folder)


def _figures(run: Run, stories: Sequence[SetStory], smooth: int) -> list[tuple[str, str, str]]:
    """(name, value, what it was) of the figures that say most."""
    found = [(f"{story.name}, {story.figure}", fraction(story.last_value),
              f"{fraction(story.first_value)} at step {story.first_step}" if story.first_step != story.last_step
              else f"at step {story.last_step}") for story in stories]
    for name, words in (("reward/mean", "reward"), ("entropy/mean", "entropy, nats")):
        values = list(run.series.get(name, {}).values())
        if values:
            last = values[-smooth:]
            found.append((words, number(sum(last) / len(last)),
                          f"mean of the last {len(last)} steps" if len(last) > 1 else "the last step"))
    return found


def _figure(name: str, value: str, note: str) -> str:
    return f"<div><span>{text(name)}</span><strong>{text(value)}</strong><small>{text(note)}</small></div>"


def _share(count: int, total: int) -> Html | str:
    if not total:
        return "-"
    share = count / total
    return Html(f'<td class="n heat" style="--share:{100 * share:.0f}%">{100 * share:.1f}</td>')


def _option(options: dict[str, Any], name: str) -> str:
    if name not in options:
        return "-"
    value = options[name]
    return value if isinstance(value, str) and value else json.dumps(value, default=str)
