"""Where the time of a step goes, stacked by phase over a run, and how much memory each phase takes."""

from __future__ import annotations

import math
from typing import Sequence

from tools.report_run import Run
from tools.report_text import number, table, text
from tools.study_chart import ticks

BINS = 48
WHOLE = "time/step"
OTHER = "other"
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 220, 46, 8, 8, 28
_NUM_COLOURS = 8


def phases_of(runs: Sequence[Run]) -> list[str]:
    """The phases that some run recorded, in the order of a step, and "other" for what they leave of it."""
    found = dict.fromkeys(name.removeprefix("time/") for run in runs for name in run.series
                          if name.startswith("time/") and name != WHOLE)
    return [*found, OTHER] if found else []


def seconds(run: Run, phases: Sequence[str]) -> list[tuple[int, int, list[float]]]:
    """(first step, last step, mean seconds of each phase) of up to 48 pieces of a run."""
    whole = run.series.get(WHOLE, {})
    steps = [step for step, value in whole.items() if math.isfinite(value)]
    pieces = []
    count = min(BINS, len(steps))
    for b in range(count):
        piece = steps[b * len(steps) // count:(b + 1) * len(steps) // count]
        means = [_sum(run, phase, piece) / len(piece) for phase in phases if phase != OTHER]
        rest = max(0.0, sum(whole[step] for step in piece) / len(piece) - sum(means))
        pieces.append((piece[0], piece[-1], [*means, rest]))
    return pieces


def time_by_phase(runs: Sequence[Run], names: Sequence[str]) -> str:
    """A stacked picture of each run on one scale, a legend, and a table; empty where no time was recorded."""
    phases = phases_of(runs)
    found = [seconds(run, phases) for run in runs]
    top = max((sum(means) for pieces in found for *_, means in pieces), default=0.0)
    if not phases or not top:
        return ""
    key = "".join(f'<span><i class="p{i % _NUM_COLOURS}"></i>{text(phase)}</span>' for i, phase in enumerate(phases))
    pictures = "".join(
        f"<figure class=\"stack\"><figcaption><b>{text(name)}</b> <span class=\"unit\">s per step</span></figcaption>"
        f"{_svg(pieces, phases, top, name)}</figure>" for name, pieces in zip(names, found) if pieces)
    return f'<div class="key">{key}</div><div class="stacks">{pictures}</div>{_table(runs, names, phases)}'


def memory_by_phase(runs: Sequence[Run], names: Sequence[str]) -> str:
    """The largest value of every memory metric; empty where none was recorded."""
    metrics = dict.fromkeys(name for run in runs for name in run.series if name.startswith("memory/"))
    rows = [[name.removeprefix("memory/"), *(number(_largest(run, name)) for run in runs)] for name in metrics]
    return table(["largest value in the run", *names], rows) if rows else ""


def _svg(pieces: Sequence[tuple[int, int, list[float]]], phases: Sequence[str], top: float, name: str) -> str:
    scale = (_HEIGHT - _TOP - _BOTTOM) / top
    wide = (_WIDTH - _LEFT - _RIGHT) / len(pieces)
    base = _HEIGHT - _BOTTOM
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{text(name)}: seconds by phase">',
             '<g class="grid">']
    for value in ticks(0.0, top, 4):
        parts.append(f'<path d="M{_LEFT} {base - value * scale:.1f}H{_WIDTH - _RIGHT}"/><text x="{_LEFT - 6}" '
                     f'y="{base - value * scale + 4:.1f}" text-anchor="end">{value:g}</text>')
    parts.append("</g>")
    for b, (first, last, means) in enumerate(pieces):
        x, y = _LEFT + b * wide, float(base)
        steps = f"step {first}" if first == last else f"steps {first} to {last}"
        for i, mean in enumerate(means):
            y -= mean * scale
            if mean * scale >= 0.05:
                parts.append(f'<rect class="p{i % _NUM_COLOURS}" x="{x:.1f}" y="{y:.1f}" '
                             f'width="{wide - min(1.0, wide / 6):.1f}" height="{mean * scale:.1f}"><title>'
                             f"{text(phases[i])} {number(mean)} s, {steps}</title></rect>")
    for b in sorted({round(i * (len(pieces) - 1) / 5) for i in range(6)}):
        parts.append(f'<text x="{_LEFT + (b + 0.5) * wide:.1f}" y="{base + 16}" text-anchor="middle" class="at">'
                     f"{pieces[b][0]}</text>")
    return "".join([*parts, "</svg>"])


def _table(runs: Sequence[Run], names: Sequence[str], phases: Sequence[str]) -> str:
    """Mean seconds of a step, and the share of each phase, over the whole run."""
    rows = []
    for run, name in zip(runs, names):
        steps = [step for step, value in run.series.get(WHOLE, {}).items() if math.isfinite(value)]
        if not steps:
            continue
        total = sum(run.series[WHOLE][step] for step in steps)
        own = [_sum(run, phase, steps) for phase in phases if phase != OTHER]
        own.append(max(0.0, total - sum(own)))
        rows.append([name, number(total / len(steps)),
                     *(f"{number(part / len(steps))} ({part / total:.0%})" if part else "-" for part in own)])
    return table(["run", "s per step", *phases], rows)


def _sum(run: Run, phase: str, steps: Sequence[int]) -> float:
    recorded = run.series.get(f"time/{phase}", {})
    return sum(value for step in steps if math.isfinite(value := recorded.get(step, 0.0)))


def _largest(run: Run, name: str) -> float | None:
    return max(filter(math.isfinite, run.series.get(name, {}).values()), default=None)
