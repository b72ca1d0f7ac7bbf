"""Before and after: the first, the last and the best evaluation of each set of a run, and what lies behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Sequence

from tools.report_run import Run, load_evaluation
from tools.report_text import Html, fold, fraction, number, table, text

_NOT_FIGURES = ("step", "num_samples", "skipped")


@dataclass
class SetStory:
    """How one run did on one set; ``run`` is its place in the report, ``figure`` the name of what says most.

    ``first`` and ``last`` are the results as the run wrote them; they are the same where the set was measured once. A
    value is None where the figure is not defined, as mAP where no picture shows anything.
    """

    run: int
    name: str
    figure: str
    key: str
    first: dict[str, Any]
    last: dict[str, Any]
    best_step: int
    best_value: float | None

    @property
    def first_step(self) -> int:
        return int(self.first["step"])

    @property
    def last_step(self) -> int:
        return int(self.last["step"])

    @property
    def first_value(self) -> float | None:
        return self.first.get(self.key)

    @property
    def last_value(self) -> float | None:
        return self.last.get(self.key)

    def turned(self) -> tuple[int, int]:
        """(wrong answers that became right, right ones that became wrong) from the first to the last evaluation."""
        before = {(row["shard"], row["key"]): row["correct"] for row in self.first["rows"]}
        pairs = [(before[name], row["correct"]) for row in self.last["rows"]
                 if (name := (row["shard"], row["key"])) in before]
        return sum(now and not then for then, now in pairs), sum(then and not now for then, now in pairs)


def read_stories(runs: Sequence[Run]) -> list[SetStory]:
    """Every set of every run that was evaluated; what cannot be read becomes a note of the run."""
    return [story for i, run in enumerate(runs) for name in run.evaluations if (story := _story(i, run, name))]


def evaluation_table(stories: Sequence[SetStory], names: Sequence[str]) -> str:
    """One row for each set and run."""
    sets = dict.fromkeys(story.name for story in stories)
    ordered = [story for name in sets for story in stories if story.name == name]
    rows = []
    for story in ordered:
        better, worse = story.turned()
        once = story.first_step == story.last_step
        rows.append([
            story.name, *([names[story.run]] if len(names) > 1 else []), story.figure,
            fraction(story.first_value), fraction(story.last_value), "-" if once else change(story),
            "-" if story.best_value is None else f"{fraction(story.best_value)} ({story.best_step})",
            "-" if once else f"+{better} \u2212{worse}",
            _two(story, "mean_iou"), _two(story, "parse_rate"), str(story.last.get("num_samples", "-"))])
    run = ["run"] if len(names) > 1 else []
    return table(["set", *run, "figure", "first", "last", "change", "best (step)", "turned right, wrong", "mean IoU",
                  "parsed", "samples"], rows, 2 + len(run))


def details(stories: Sequence[SetStory], names: Sequence[str]) -> str:
    """Folded under the table: all figures of each set, by task, and by what the samples say of themselves."""
    parts = []
    for name in dict.fromkeys(story.name for story in stories):
        own = [story for story in stories if story.name == name]
        content = _all_figures(own, names)
        for story in own:
            content += "".join(f"<h4>{text(title)}{_of(story, names)}</h4>{found}" for title, found in _groups(story))
        parts.append(fold(f"{name}: every figure", content))
    return "".join(parts)


def change(story: SetStory) -> Html | str:
    """The difference from first to last, signed, with an arrow that does not need its colour; "-" where it has none."""
    if story.first_value is None or story.last_value is None:
        return "-"
    difference = story.last_value - story.first_value
    kind, sign = ("up", "\u25b2") if difference > 0 else ("down", "\u25bc") if difference < 0 else ("even", "=")
    return Html(f'<td class="n {kind}">{sign} {difference:+.3f}</td>')


def _story(index: int, run: Run, name: str) -> SetStory | None:
    from megavg.evaluation.figures import HEADLINES

    found: dict[int, dict] = {}
    steps = sorted(run.evaluations[name])
    for order in (steps, steps[::-1]):  # the first and the last that can be read
        for step in order:
            result = found.get(step) or load_evaluation(run, name, step)
            if result is not None:
                found[step] = {"step": step, **result}
                break
    if not found:
        return None
    last = found[max(found)]
    key, figure = HEADLINES.get(last.get("task", "rec"), HEADLINES["mixed"])
    recorded = run.series.get(f"eval/{name}/{key}", {})
    values = {**{step: recorded[step] for step in steps if step in recorded},
              **{step: value for step, result in found.items() if (value := result.get(key)) is not None}}
    best = max(values, key=lambda step: (values[step], -step), default=max(found))
    return SetStory(index, name, figure, key, found[min(found)], last, best, values.get(best))


def _two(story: SetStory, key: str) -> str:
    first, last = story.first.get(key), story.last.get(key)
    if last is None or first is None or story.first_step == story.last_step:
        return fraction(last)
    return f"{fraction(first)} \u2192 {fraction(last)}"


def _all_figures(stories: Sequence[SetStory], names: Sequence[str]) -> str:
    keys = [key for key, value in stories[0].last.items()
            if isinstance(value, (int, float)) and key not in _NOT_FIGURES]
    header, rows = ["figure"], [[key] for key in keys]
    for story in stories:
        columns = [story.first] * (story.first_step != story.last_step) + [story.last]
        header += [Html(f"step {result['step']}{_of(story, names)}") for result in columns]
        for row, key in zip(rows, keys):
            row += [number(result.get(key)) for result in columns]
    return table(header, rows)


def _groups(story: SetStory) -> list[tuple[str, str]]:
    """(by what, table) for tasks of a mixed set, and for each field of the samples that tells several groups apart."""
    from megavg.evaluation.figures import headline
    from megavg.evaluation.rows import GROUP_FIELDS
    from megavg.evaluation.tables import breakdown

    found = []
    if "tasks" in story.last:
        rows = []
        for task, result in story.last["tasks"].items():
            before = story.first.get("tasks", {}).get(task)
            rows.append([task, headline(result)[0], number(headline(before)[1] if before else None),
                         number(headline(result)[1]), number(result["parse_rate"]), str(result["num_samples"])])
        found.append(("By task", table(["task", "figure", "first", "last", "parsed", "samples"], rows, 2)))
    for field in GROUP_FIELDS:
        if len({str(row.get("meta", {}).get(field, "-")) for row in story.last["rows"]}) < 2:
            continue
        before = {part[field]: headline(part)[1] for part in breakdown(story.first["rows"], (field,))}
        rows = [[part[field], headline(part)[0], number(before.get(part[field])), number(headline(part)[1]),
                 number(part["parse_rate"]), str(part["num_samples"])]
                for part in breakdown(story.last["rows"], (field,))]
        found.append((f"By {field}", table([field, "figure", "first", "last", "parsed", "samples"], rows, 2)))
    return found


def _of(story: SetStory, names: Sequence[str]) -> str:
    return f", {text(names[story.run])}" if len(names) > 1 else ""
