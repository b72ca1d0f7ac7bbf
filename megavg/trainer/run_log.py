"""What a run leaves behind: metrics.jsonl (the source of truth), TensorBoard, pictures, and the console."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Mapping

from megavg.evaluation.figures import HEADLINES
from megavg.trainer.board import Board
from megavg.trainer.console import Console, clock
from megavg.trainer.reason_table import ReasonTable

_TO_LOOK_AT = ("metrics.jsonl", "pictures", "heat_maps", "evaluation", "checkpoints", "hf")


class RunLog:
    """Writes on one process and is silent on the others. As a context manager it draws the bar and closes itself.

    Args:
        folder: the run's output folder.
        is_writer: whether this process writes.
        num_steps: for the progress display.
        start_step: lines of metrics.jsonl after this step are dropped, as a resumed run writes them again; 0 drops all.
        log_every: steps between plain lines where the console is no terminal.
    """

    def __init__(self, folder: Path, is_writer: bool, num_steps: int, start_step: int, log_every: int,
                 tensorboard: bool):
        self.folder, self.is_writer, self.num_steps, self.log_every = Path(folder), is_writer, num_steps, log_every
        self._start_step, self._started = start_step, time.monotonic()
        self._reasons = ReasonTable()
        self._headlines: dict[str, tuple[str, str]] = {}  # of the sets this process evaluated: figure and its name
        self._board, self._finished = None, False
        if not is_writer:
            return
        _keep_steps(self._metrics_path, start_step)
        self._metrics = self._metrics_path.open("a")
        self._console = Console(num_steps, start_step, log_every)
        if tensorboard:
            self._board = Board(self.folder / "tensorboard", start_step)

    def __enter__(self) -> RunLog:
        if self.is_writer:
            self._console.start()
        return self

    def __exit__(self, *error) -> None:
        self.close()

    @property
    def _metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    def say(self, text: str) -> None:
        """One line to the console."""
        if self.is_writer:
            self._console.say(text)

    def configuration(self, tree: Mapping[str, Any]) -> None:
        """Show the resolved configuration in TensorBoard, and its hyperparameters in the HParams tab."""
        if self._board is not None:
            self._board.configuration(tree)

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl and send its numbers to TensorBoard; ``step`` counts from 1.

        The counts under "reasons" are kept for the table that :meth:`progress` shows.
        """
        if not self.is_writer:
            return
        if "reasons" in values:
            self._reasons.add(values["reasons"])
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        self._metrics.flush()
        self._show(step, values)

    def evaluated(self, step: int, name: str, result: Mapping[str, Any]) -> None:
        """Record the figures of an evaluation set as ``eval/<name>/<figure>``, and show the best of its headline."""
        if not self.is_writer:
            return
        figure, _ = self._headlines[name] = HEADLINES[result.get("task", "rec")]
        self.record(step, {f"eval/{name}/{key}": value for key, value in result.items()
                           if isinstance(value, (int, float)) and key != "step"})
        if values := _values(f"eval/{name}/{figure}", self._lines()):
            self._show(step, {f"best/{name}_{figure}": max(values.values())})

    def _show(self, step: int, values: Mapping[str, Any]) -> None:
        if self._board is not None:
            self._board.scalars(step, values)

    def has(self, step: int, prefix: str) -> bool:
        """Whether the writing process finds a line of ``step`` with figures named ``prefix``... in metrics.jsonl."""
        return any(line["step"] == step and any(name.startswith(prefix) for name in line) for line in self._lines())

    def progress(self, step: int, values: dict[str, Any]) -> None:
        """Show where the training is, a bar on a terminal, a line now and then elsewhere; and why answers scored."""
        if not self.is_writer:
            return
        self._console.progress(step, values)
        if step % self.log_every == 0 or step == self.num_steps:
            self._show_reasons(step)

    def _show_reasons(self, step: int) -> None:
        table = self._reasons.take()
        if table is None:
            return
        for line in table.lines():
            self.say(line)
        self.text(step, "reasons", table.markdown())

    def text(self, step: int, name: str, markdown: str) -> None:
        """Show a text in TensorBoard, where it is switched on."""
        if self._board is not None:
            self._board.text(step, name, markdown)

    def picture(self, step: int, name: str, image) -> Path | None:
        """Keep a PIL image as PNG and in TensorBoard."""
        if not self.is_writer:
            return None
        path = self.folder / "pictures" / f"{name.replace('/', '_')}-{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(path.name + ".tmp")
        image.save(partial, "PNG")
        os.replace(partial, path)
        if self._board is not None:
            self._board.picture(step, name, image)
        return path

    def histograms(self, step: int, values: dict[str, Any]) -> None:
        """Send the distribution of each tensor's values to TensorBoard, where it is switched on."""
        if self._board is not None:
            for name, numbers in values.items():
                self._board.histogram(step, name, numbers)

    def page(self, step: int, name: str, html: str) -> Path | None:
        """Keep an HTML page in the folder ``name``, which belongs to a run; written beside and renamed."""
        if not self.is_writer:
            return None
        path = self.folder / name / f"step-{step:06d}.html"
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(path.name + ".tmp")
        partial.write_text(html, encoding="utf-8")
        os.replace(partial, path)
        return path

    def finish(self) -> None:
        """Take the bar away and say how long it took, what was best and where things are; the run has succeeded."""
        if not self.is_writer:
            return
        self._finished = True
        self._console.stop()
        lines = self._lines()
        last = max((line["step"] for line in lines), default=self._start_step)
        before = f" (and {self._start_step} before)" if self._start_step else ""
        parts = [f"done: {last - self._start_step} steps{before} in {clock(time.monotonic() - self._started)}",
                 *(_best(name, *headline, lines) for name, headline in self._headlines.items())]
        self.say("; ".join(parts))
        found = [name for name in _TO_LOOK_AT if (self.folder / name).exists()]
        board = f"; tensorboard --logdir {self.folder / 'tensorboard'}" if self._board is not None else ""
        self.say(f"{', '.join(found)} in {self.folder}{board}")

    def close(self) -> None:
        """Give the terminal back and write what is left; may be called twice."""
        if not self.is_writer:
            return
        self._console.stop()
        self._metrics.close()
        if self._board is not None:
            self._board.close(self._finished)
            self._board = None

    def _lines(self) -> list[dict]:
        return [json.loads(line) for line in self._metrics_path.read_text().splitlines()]


def write_json(path: Path, content: Any) -> None:
    """Write JSON beside and rename."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


def _values(key: str, lines: list[dict]) -> dict[int, float]:
    """A figure by step, over the whole run."""
    return {line["step"]: line[key] for line in lines if key in line}


def _best(name: str, figure: str, title: str, lines: list[dict]) -> str:
    """The best value of an evaluation set over the whole run, of equal ones the earliest, and the last."""
    values = _values(f"eval/{name}/{figure}", lines)
    if not values:
        return f"{name} {title} is not defined"
    step = max(values, key=values.__getitem__)
    return f"{name} best {title} {values[step]:.3f} at step {step}, last {values[max(values)]:.3f}"


def _keep_steps(path: Path, last_step: int) -> None:
    if not path.is_file():
        return
    kept = [line for line in path.read_text().splitlines() if last_step and _step_of(line) <= last_step]
    partial = path.with_name(path.name + ".tmp")
    partial.write_text("".join(line + "\n" for line in kept))
    os.replace(partial, path)


def _step_of(line: str) -> float:
    """The step of a line; infinite for one that was cut off when the run was killed."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
