"""Show answers on their pictures: the best and the worst of the last evaluation, and what changed most since the first.

Pictures come from the shards that the run read, each one is in the page once, and the boxes are drawn over it as lines.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Sequence

from tools.report_evaluation import SetStory
from tools.report_run import Run
from tools.report_text import cut, fold, text

MAX_SIDE = 320  # pixels of a picture in the page
_QUALITY = 72
_LINES = {"true": "true box", "now": "answer of the last evaluation", "first": "answer of the first evaluation"}


@dataclass
class Pictures:
    """The pictures of a page by (shard, key) of a row; ``missing`` says why some are not there."""

    found: dict[tuple[str, str], tuple[str, int, int, str]] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    _names: dict[str, str] = field(default_factory=dict)  # of samples that share a picture it is stored once

    def load(self, run: Run, rows: Sequence[dict]) -> None:
        """Fetch the pictures of rows from local shards; of URLs and commands nothing is fetched or run."""
        wanted: dict[str, dict[str, dict]] = {}
        for row in rows:
            if (row["shard"], row["key"]) not in self.found:
                wanted.setdefault(row["shard"], {})[row["key"]] = row
        for shard, of_key in wanted.items():
            path = local_shard(run, shard)
            if path is None:
                self._miss(f"{shard} is not on this machine, or behind a URL", len(of_key))
            else:
                self._read(path, shard, dict(of_key))

    def definitions(self) -> str:
        """The pictures as SVG images to be used by their names."""
        images = "".join(f'<image id="{name}" width="{width}" height="{height}" preserveAspectRatio="none" '
                         f'href="{data}"/>' for name, width, height, data in dict.fromkeys(self.found.values()))
        return f'<svg class="pictures" aria-hidden="true"><defs>{images}</defs></svg>' if images else ""

    def _read(self, path: Path, shard: str, of_key: dict[str, dict]) -> None:
        from megavg.data.sample import SampleError, parse_record, with_image
        from megavg.data.tars import read_records

        records = read_records(str(path))
        while of_key:
            try:
                record = next(records, None)
            except (SampleError, OSError) as error:
                return self._miss(f"{shard} cannot be read ({error})", len(of_key))
            if record is None:
                return self._miss(f"{shard} does not hold them any more", len(of_key))
            try:
                sample = parse_record(record)
                row = of_key.pop(sample.key, None)
                if row is not None and [list(box) for box in sample.boxes_xyxy_px] != row["true_boxes_px"]:
                    self._miss(f"{shard} holds other samples than the run read", 1)
                elif row is not None:
                    image = with_image(sample, record).image
                    name = self._names.setdefault(data := thumbnail(image), f"picture{len(self._names)}")
                    self.found[shard, sample.key] = name, *image.size, data
            except SampleError:
                continue  # a record that the run left out, too

    def _miss(self, why: str, count: int) -> None:
        self.missing[why] = self.missing.get(why, 0) + count


def local_shard(run: Run, shard: str) -> Path | None:
    """The file of a shard, seen from here, or from the folder that the run was started in; None where there is none."""
    output = Path(str(run.option("trainer", "output_dir") or ""))
    starts = [Path()]
    if output.parts and not output.is_absolute() and run.folder.parts[-len(output.parts):] == output.parts:
        starts.insert(0, Path(*run.folder.parts[:-len(output.parts)]))
    return next((start / shard for start in starts if (start / shard).is_file()), None)


def thumbnail(image: Any) -> str:
    """A picture as a small WebP data URI."""
    small = image.convert("RGB")
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=_QUALITY, lossless=_is_small(*image.size))
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def gallery(runs: Sequence[Run], stories: Sequence[SetStory], limit: int) -> tuple[str, Pictures]:
    """(HTML of the answers of every set, the pictures that it uses)."""
    pictures, parts = Pictures(), []
    for story in stories:
        groups = chosen(story, limit)
        rows = [row for _, pairs in groups for _, row in pairs]
        pictures.load(runs[story.run], rows)
        of = f"{story.name}, {runs[story.run].name}" if len(runs) > 1 else story.name
        content = "".join(f"<h4>{text(title)}</h4>" + '<div class="answers">' + "".join(
            _article(before, row, pictures, (story.first_step, story.last_step)) for before, row in pairs) + "</div>"
            for title, pairs in groups if pairs)
        parts.append(fold(f"{of}: {len(rows)} answers of step {story.last_step}",
                          _asked(runs[story.run], story) + content, story is stories[0]))
    why = "".join(f"<li>no picture for {count} of the answers: {text(reason)}</li>"
                  for reason, count in pictures.missing.items())
    key = "".join(f'<span><svg viewBox="0 0 32 8" aria-hidden="true"><path class="{kind}" d="M0 4H32"/></svg>{words}'
                  "</span>" for kind, words in _LINES.items())
    return ((f'<ul class="notes">{why}</ul>' if why else "")
            + (f'<div class="key">{key}</div>' if pictures.found else "") + "".join(parts)), pictures


def chosen(story: SetStory, limit: int) -> list[tuple[str, list[tuple[dict | None, dict]]]]:
    """(heading, [(row of the first evaluation or None, row of the last)]) of the answers that are worth a look."""
    from megavg.evaluation.worst import worst_rows

    rows = story.last["rows"]
    order = worst_rows(rows, len(rows))
    num_worst = min(limit, (len(rows) + 1) // 2)
    groups = [(f"The worst at step {story.last_step}", [(None, row) for row in order[:num_worst]]),
              (f"The best at step {story.last_step}", [(None, row) for row in order[num_worst:][::-1][:limit]])]
    if story.first_step == story.last_step:
        return groups
    before = {(row["shard"], row["key"]): row for row in story.first["rows"]}
    pairs = [(before[row["shard"], row["key"]], row) for row in rows if (row["shard"], row["key"]) in before]
    pairs.sort(key=gain)
    since = f"from step {story.first_step} to step {story.last_step}"
    return [(f"Gained most {since}", [pair for pair in pairs[::-1][:limit] if gain(pair) > 0]),
            (f"Lost most {since}", [pair for pair in pairs[:limit] if gain(pair) < 0]), *groups]


def gain(pair: tuple[dict, dict]) -> float:
    """How much better the second answer is than the first: 1 for becoming right, and what the IoU rose by."""
    before, after = pair
    return after["correct"] - before["correct"] + after["iou"] - before["iou"]


def _asked(run: Run, story: SetStory) -> str:
    questions = {task: run.questions[task] for task in dict.fromkeys(row["task"] for row in story.last["rows"])
                 if task in run.questions}
    return "".join(f'<p class="asked">Asked ({text(task)}): <q>{text(cut(question))}</q></p>'
                   for task, question in questions.items())


def _article(before: dict | None, row: dict, pictures: Pictures, steps: tuple[int, int]) -> str:
    first, last = steps
    said = _said(before, "first", first) + _said(row, "now", last) if before else _said(row)
    return (f'<article class="answer">{_drawing(before, row, pictures)}<h5 dir="auto">{text(cut(row["expression"]))}'
            f'</h5>{said}<p class="facts">{text(row["key"])}</p></article>')


def _said(row: dict, kind: str = "", step: int = 0) -> str:
    label = f'<i class="{kind}">step {step}</i> ' if kind else ""
    return (f'<p class="verdict {"right" if row["correct"] else "wrong"}">{label}<b>{text(verdict(row))}</b></p>'
            f'<pre dir="auto">{text(cut(row["text"])) or "(nothing)"}</pre>')


def verdict(row: dict) -> str:
    """What an answer is worth, in words: with a sign, so that it does not need its colour."""
    sign = "\u2713" if row["correct"] else "\u2717"
    if row["task"] == "classification":
        return f"{sign} {row['reason']}, it is {' or '.join(row.get('true_labels', []))}"
    if row["task"] == "point":
        miss = row.get("miss_px")
        return f"{sign} {row['reason']}" + (f", {miss:.0f} px off" if miss else "")
    return f"{sign} IoU {row['iou']:.2f}, {row['reason']}"


def _drawing(before: dict | None, row: dict, pictures: Pictures) -> str:
    found = pictures.found.get((row["shard"], row["key"]))
    if found is None:
        return '<p class="no-picture">no picture</p>'
    name, width, height, _ = found
    layers = [("true", {"predicted_boxes_px": row["true_boxes_px"]}), *([("first", before)] if before else []),
              ("now", row)]
    shapes = [(kind, shape) for kind, marked in layers for shape in _shapes(marked, max(width, height) / 50)]
    # All light lines first, or that of one box hides another box that it lies on.
    halos = [("halo", shape) for _, shape in shapes]
    marks = "".join(f'<{shape} class="{kind}"/>' for kind, shape in [*halos, *shapes])
    small = " pixels" if _is_small(width, height) else ""
    return (f'<svg class="picture{small}" viewBox="0 0 {width} {height}" role="img" aria-label="the picture with the '
            f'true and the predicted boxes"><use href="#{name}"/>{marks}</svg>')


def _shapes(row: dict, radius: float) -> list[str]:
    """The boxes and points of a row, without what makes them visible."""
    boxes = [f'rect x="{x0:.2f}" y="{y0:.2f}" width="{max(x1 - x0, 0):.2f}" height="{max(y1 - y0, 0):.2f}"'
             for x0, y0, x1, y1 in row["predicted_boxes_px"]]
    return boxes + [f'circle cx="{x:.2f}" cy="{y:.2f}" r="{radius:.2f}"'
                    for x, y in row.get("predicted_points_px", ())]


def _is_small(width: int, height: int) -> bool:
    """Whether a picture is shown enlarged: smoothed pixels would hide by how much a box is off."""
    return max(width, height) <= MAX_SIDE // 2
