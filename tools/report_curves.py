"""Choose and draw the curves of a report: one small chart for each metric, all runs over each other, as inline SVG."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Sequence

from tools.report_run import Run
from tools.report_text import NUM_COLOURS, number, table, text
from tools.study_chart import ticks

BINS = 120  # of a long curve; each keeps its lowest and its highest point
NUM_ROWS = 12  # of the table under a chart
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 350, 210, 50, 10, 10, 24
EVALUATION, OTHER = "Evaluation", "Of the algorithm"

_ROOMS = {
    "Reward and IoU": ("reward", "iou"), EVALUATION: ("eval",),
    "Entropy": ("entropy", "self_information", "jsd"),
    "Policy": ("loss", "gradient_norm", "lr", "policy", "kl", "ratio", "clip", "clipped", "selected", "rollout",
               "head"),
    OTHER: (), "Data": ("data", "response", "resampling"),
    "Tokens and time": ("tokens", "tokens_per_second", "time"), "Memory": ("memory",)}
_UNITS = {"entropy": "nats", "self_information": "nats", "jsd": "nats", "kl": "nats", "time": "s", "response": "tokens",
          "tokens": "tokens", "tokens_per_second": "tokens/s"}
_FIRST = ("reward/mean", "iou/mean", "entropy/mean", "loss", "gradient_norm", "tokens_per_second")


@dataclass
class Line:
    """One run's curve: what was recorded at which steps, and its mean over the last values; NaN is a gap."""

    run: int
    steps: list[int]
    values: list[float]
    smooth: list[float]


@dataclass
class Chart:
    """One metric of all runs that have it."""

    metric: str
    lines: list[Line]

    @property
    def unit(self) -> str:
        if self.metric.startswith("memory/"):
            return "GB" if self.metric.endswith("_gb") else ""
        return "" if self.metric.startswith(("entropy/ratio", "head/")) else _UNITS.get(self.metric.split("/")[0], "")


def room_of(metric: str) -> str:
    """The group of charts that a metric stands in."""
    prefix = metric.split("/")[0]
    return next((room for room, prefixes in _ROOMS.items() if prefix in prefixes), OTHER)


def rooms(runs: Sequence[Run], smooth: int, headlines: dict[str, str]) -> tuple[dict[str, list[Chart]], dict]:
    """(room -> charts, metric -> {run: value} of lesser ones that never changed), both in the page's order.

    Args:
        smooth: values to take the mean of.
        headlines: evaluation set -> the figure that says most; of a set only this, the IoU and the parse rate are
            drawn, and only where some run was evaluated more than twice.
    """
    names = dict.fromkeys(name for run in runs for name in run.series)
    charts: dict[str, list[Chart]] = {room: [] for room in _ROOMS}
    constant: dict[str, dict[int, float]] = {}
    for name in sorted(names, key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name)):
        if not _is_drawn(name, runs, headlines):
            continue
        window = 1 if room_of(name) == EVALUATION else smooth
        lines = [Line(i, list(run.series[name]), values, moving_mean(values, window))
                 for i, run in enumerate(runs) if (values := list(run.series.get(name, {}).values()))]
        if name not in _FIRST and all(len(line.values) > 1 and len(set(line.values)) == 1 for line in lines):
            constant[name] = {line.run: line.values[0] for line in lines}
        else:
            charts[room_of(name)].append(Chart(name, lines))
    return {room: found for room, found in charts.items() if found}, constant


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and the ``window - 1`` before it, over those that are finite; NaN where none is."""
    exact = [Fraction(value) if math.isfinite(value) else None for value in values]  # a running sum must not drift
    means, total, count = [], Fraction(0), 0
    for i, value in enumerate(exact):
        gone = exact[i - window] if i >= window else None
        total += (value or 0) - (gone or 0)
        count += (value is not None) - (gone is not None)
        means.append(float(total / count) if count else math.nan)
    return means


def thin(line: Line, bins: int = BINS) -> Line:
    """The lowest and the highest point of each of ``bins`` pieces, and both ends: real values at their real steps."""
    count = len(line.steps)
    if count <= 2 * bins:
        return line
    kept = {0, count - 1}
    for b in range(bins):
        piece = range(b * count // bins, (b + 1) * count // bins)
        finite = [i for i in piece if math.isfinite(line.values[i])]
        kept |= {piece[0]} if len(finite) < len(piece) else set()  # a gap stays one
        kept |= {min(finite, key=line.values.__getitem__), max(finite, key=line.values.__getitem__)} if finite else {
            next(iter(piece))}
    order = sorted(kept)
    return Line(line.run, *([values[i] for i in order] for values in (line.steps, line.values, line.smooth)))


def figure(chart: Chart, index: int, names: Sequence[str]) -> tuple[str, dict]:
    """(HTML of a chart with its table, what the script needs to show values at the pointer)."""
    lines = [thin(line) for line in chart.lines]
    shown = [value for line in lines for value in (*line.values, *line.smooth) if math.isfinite(value)]
    low, high = _limits(shown)
    first, last = min(line.steps[0] for line in lines), max(line.steps[-1] for line in lines)
    last = max(last, first + 1)
    smoothed = any(line.smooth != line.values for line in lines)
    ends = "; ".join(f"{names[line.run]} {number(line.values[0])} to {number(line.values[-1])}" for line in lines)
    drawing = _svg(chart, lines, (first, last, low, high), smoothed, ends)
    unit = f' <span class="unit">{text(chart.unit)}</span>' if chart.unit else ""
    html = (f'<figure class="chart" data-chart="{index}" tabindex="0">\n<figcaption><b>{text(chart.metric)}</b>{unit}'
            f'</figcaption>\n<div class="plot">{drawing}<div class="tip" role="status" hidden></div></div>\n'
            f'<details class="numbers"><summary>Numbers</summary>{_numbers(chart, names)}</details>\n</figure>')
    data = {"axes": [first, last, low, high], "lines": [
        [line.run, line.steps, [_exact(v) for v in line.values], [_exact(v) for v in line.smooth] if smoothed else 0]
        for line in lines]}
    return html, data


def as_script(data: list[dict], names: Sequence[str]) -> str:
    """The charts' numbers as a block of JSON that cannot end the block."""
    frame = {"width": WIDTH, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM}
    content = json.dumps({"runs": list(names), "frame": frame, "charts": data}, separators=(",", ":"), allow_nan=False)
    return '<script type="application/json" id="numbers">' + content.replace("<", "\\u003c") + "</script>"


def legend(names: Sequence[str], smoothed: int) -> str:
    """A bar of buttons that show and hide runs, and the values behind the smooth curves."""
    buttons = "".join(f'<button type="button" aria-pressed="true" data-hides="run{i}">{swatch(i)}{text(name)}</button>'
                      for i, name in enumerate(names))
    raw = (f'<button type="button" aria-pressed="true" data-hides="raw">single steps behind the mean of the last '
           f"{smoothed}</button>" if smoothed > 1 else "")
    return f'<div class="legend" role="group" aria-label="Curves to show">{buttons}{raw}</div>'


def swatch(run: int) -> str:
    """A short piece of a run's line."""
    return (f'<svg class="swatch" viewBox="0 0 24 8" aria-hidden="true"><path class="line c{run % NUM_COLOURS}'
            f'{_dash(run)}" d="M0 4H24"/></svg>')


def constants(found: dict[str, dict[int, float]], names: Sequence[str]) -> str:
    """A table of the metrics that need no curve."""
    rows = [[name, *(number(of[i]) if i in of else "-" for i in range(len(names)))] for name, of in found.items()]
    return table(["metric", *names], rows) if rows else ""


def _is_drawn(name: str, runs: Sequence[Run], headlines: dict[str, str]) -> bool:
    room, parts = room_of(name), name.split("/")
    if room == EVALUATION:
        figure_name, of_set = parts[-1], "/".join(parts[1:-1])
        return (figure_name in (headlines.get(of_set, "correct_rate"), "mean_iou", "parse_rate")
                and max(len(run.series.get(name, {})) for run in runs) > 2)
    return room != "Tokens and time" or parts[0] != "time" or name == "time/step"  # phases are stacked elsewhere


def _limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 0.1
    return (low - room if low < 0 or low - room > 0 else 0.0), high + room


def _svg(chart: Chart, lines: list[Line], axes: tuple, smoothed: bool, ends: str) -> str:
    first, last, low, high = axes

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(chart.metric)} by step: {text(ends)}">',
             '<g class="grid">']
    for value in ticks(low, high, 4):
        parts.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}"/>'
                     f'<text x="{LEFT - 6}" y="{y(value) + 3.5:.1f}" text-anchor="end">{_tick(value)}</text>')
    for step in (value for value in ticks(first, last, 5) if value == int(value)):
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{_tick(step)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'
                 f'<text x="{LEFT - 6}" y="{HEIGHT - BOTTOM + 15}" text-anchor="end">step</text></g>')
    for line in lines:
        pen = f"line c{line.run % NUM_COLOURS}{_dash(line.run)}"
        raw = _path(line.steps, line.values, x, y)
        parts.append(f'<g class="run{line.run}">')
        if smoothed:
            parts.append(f'<path class="{pen} raw" d="{raw}"/>')
            raw = _path(line.steps, line.smooth, x, y)
        parts.append(f'<path class="{pen}" d="{raw}"/>')
        if len(line.steps) <= 30:
            parts += [f'<circle class="dot c{line.run % NUM_COLOURS}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="2.4"/>'
                      for s, v in zip(line.steps, line.smooth if smoothed else line.values) if math.isfinite(v)]
        parts.append("</g>")
    return "".join([*parts, f'<path class="cross" d="M0 {TOP}V{HEIGHT - BOTTOM}" hidden></path></svg>'])


def _path(steps: Sequence[int], values: Sequence[float], x, y) -> str:
    """A path with a gap where a value is no finite number."""
    parts, pen = [], "M"
    for step, value in zip(steps, values):
        if math.isfinite(value):
            parts.append(f"{pen}{x(step):.1f} {y(value):.1f}")
            pen = "L"
        else:
            pen = "M"
    return "".join(parts)


def _numbers(chart: Chart, names: Sequence[str]) -> str:
    """Evenly spread steps and what every run recorded there."""
    found = [(names[line.run], dict(zip(line.steps, line.values))) for line in chart.lines]
    steps = sorted(set().union(*(values for _, values in found)))
    places = sorted({round(i * (len(steps) - 1) / (NUM_ROWS - 1)) for i in range(NUM_ROWS)})
    rows = [[str(steps[i]), *(number(values[steps[i]]) if steps[i] in values else "-" for _, values in found)]
            for i in places]
    return table(["step", *(name for name, _ in found)], rows)


def _dash(run: int) -> str:
    return f" dash{run // (NUM_COLOURS // 2) % 3}" if run >= NUM_COLOURS // 2 else ""


def _tick(value: float) -> str:
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if sign == 'k' else size):g}{sign}"
    return f"{value:g}"


def _exact(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
