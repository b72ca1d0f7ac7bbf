"""Put the parts of a report together as one HTML page that loads nothing and runs only its own script."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import time
from pathlib import Path
from typing import Sequence

from tools.report_answers import gallery
from tools.report_curves import as_script, constants, figure, legend, rooms
from tools.report_evaluation import SetStory, details, evaluation_table, read_stories
from tools.report_phases import memory_by_phase, time_by_phase
from tools.report_run import Run
from tools.report_tables import cards, configurations, notes, reasons
from tools.report_text import fold, text

_HERE = Path(__file__).parent
_DATA_URI = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=]+)")


def page(runs: Sequence[Run], title: str, smooth: int, max_answers: int) -> str:
    """The whole report; ``smooth`` values make a mean in the curves, 0 takes a twenty-fifth of the shortest run."""
    names = [run.name for run in runs]
    smooth = smooth or max(1, round(min((run.last_step for run in runs if run.last_step), default=0) / 25))
    stories = read_stories(runs)
    answers, pictures = gallery(runs, stories, max_answers)
    curves, data = _curves(runs, stories, smooth)
    sections = [
        ("evaluation", "Before and after", evaluation_table(stories, names) + details(stories, names)
         if stories else "<p>No evaluation was found.</p>"),
        ("curves", "Curves", curves),
        ("answers", "Answers", answers or "<p>No evaluation was found, and only evaluations keep answers.</p>"),
        ("reasons", "Why answers scored", _reasons(runs)),
        ("phases", "Time and memory", _phases(runs, names)),
        ("tokens", "Tokens", _heat_maps(runs)),
        ("configuration", "Configuration", configurations(runs))]
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{heading}</h2>{content}</section>\n'
                   for name, heading, content in sections)
    style, script = (_HERE / "report.css").read_text(), (_HERE / "report.js").read_text()
    style += "".join(f".hide-run{i} .run{i} {{ display: none; }}\n" for i in range(len(runs)))
    made = time.strftime("%Y-%m-%d %H:%M")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" '
        'content="width=device-width, initial-scale=1">\n<meta http-equiv="Content-Security-Policy" content="'
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_hash(script)}'\">\n"
        f"<title>{text(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{pictures.definitions()}\n<header>"
        f"<h1>{text(title)}</h1><p>{_plural(len(runs), 'run')}, report of {made}</p><nav>{links}</nav></header>\n"
        f"<main>\n{cards(runs, stories, smooth)}{notes(runs)}{body}\n</main>\n{as_script(data, names)}\n"
        f"<script>{script}</script>\n</body>\n</html>\n")


def _curves(runs: Sequence[Run], stories: Sequence[SetStory], smooth: int) -> tuple[str, list[dict]]:
    names = [run.name for run in runs]
    found, constant = rooms(runs, smooth, {story.name: story.key for story in stories})
    parts, data = [], []
    for room, charts in found.items():
        drawn = []
        for chart in charts:
            html, numbers = figure(chart, len(data), names)
            drawn.append(html)
            data.append(numbers)
        parts.append(f'<h3>{text(room)}</h3><div class="charts">{"".join(drawn)}</div>')
    if constant:
        parts.append(fold(f"{_plural(len(constant), 'metric')} that never changed", constants(constant, names)))
    return (legend(names, smooth) + "".join(parts) if parts else "<p>No training step was found.</p>"), data


def _reasons(runs: Sequence[Run]) -> str:
    tables = [(run.name, reasons(run)) for run in runs]
    tables = [(name, content) for name, content in tables if content]
    if not tables:
        return "<p>No run counted reasons: supervised fine-tuning has no rewards, and old runs did not count them.</p>"
    head = "<p>Percent of each reward's answers by reason: where a reward stays at 0, this says why.</p>"
    return head + "".join(f"<h3>{text(name)}</h3>{content}" if len(runs) > 1 else content for name, content in tables)


def _phases(runs: Sequence[Run], names: Sequence[str]) -> str:
    memory = memory_by_phase(runs, names)
    return ((time_by_phase(runs, names) or "<p>No times were recorded.</p>")
            + (f"<h3>Memory</h3>{memory}" if memory else ""))


def _heat_maps(runs: Sequence[Run]) -> str:
    """The newest page of coloured tokens of each run, in a frame of its own that runs no script."""
    parts = []
    for run in runs:
        if run.heat_map is None:
            continue
        try:
            content = _DATA_URI.sub(_smaller, run.heat_map.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            run.notes.append(f"{run.heat_map.name} cannot be read ({error})")
            continue
        frame = f'<iframe sandbox loading="lazy" title="coloured tokens" srcdoc="{text(content)}"></iframe>'
        where = f"{run.name}, " if len(runs) > 1 else ""
        parts.append(fold(f"{where}{run.heat_map.parent.name}/{run.heat_map.name}", frame, len(runs) == 1))
    return "".join(parts) or "<p>No page of coloured tokens was found; trainer.diagnostics_every=50 writes them.</p>"


def _smaller(match: re.Match) -> str:
    """A PNG of a page as WebP, a fifth of its size."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(match[1]))).save(buffer, "WEBP", quality=75)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
