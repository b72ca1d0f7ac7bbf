"""What a run leaves behind: metrics.jsonl (the source of truth), TensorBoard, pictures, and the console."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from megavg.trainer.reason_table import ReasonTable

_SHOWN = ("loss", "reward/mean", "iou/mean", "entropy/mean", "eval/acc", "tokens_per_second")
_SHORT = {"reward/mean": "reward", "iou/mean": "IoU", "entropy/mean": "entropy", "tokens_per_second": "tok/s"}


# everything a run puts into its folder; replacing a run removes these and nothing else
WRITTEN = ("config.yaml", "prompts.yaml", "deepspeed_config.json", "run.json", "metrics.jsonl", "tensorboard",
           "pictures", "heat_maps", "evaluation", "checkpoints", "hf", "stopped.json")


def remove_run(folder: Path) -> None:
    """Remove what a run wrote into ``folder``, and leave what else lies there."""
    for name in WRITTEN:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


class RunLog:
    """Writes on one process and is silent on the others.

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
        self._board = self._progress = None
        self._start_step = start_step
        self._first: tuple[int, float] | None = None  # step and time of the first report
        self._reasons = ReasonTable()
        if not is_writer:
            return
        path = self.folder / "metrics.jsonl"
        _keep_steps(path, start_step)
        self._metrics = path.open("a")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=start_step + 1)
        if sys.stdout.isatty():
            self._progress = _progress_bar(num_steps, start_step)

    def say(self, text: str) -> None:
        """One line to the console."""
        if self.is_writer:
            print(f"[megavg] {text}", flush=True)

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
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, step)

    def has(self, step: int, prefix: str) -> bool:
        """Whether the writing process finds a line of ``step`` with figures named ``prefix``... in metrics.jsonl."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return any(line["step"] == step and any(name.startswith(prefix) for name in line) for line in lines)

    def progress(self, step: int, values: dict[str, Any]) -> None:
        """Show where the training is, a bar on a terminal, a line now and then elsewhere; and why answers scored."""
        if not self.is_writer:
            return
        self._first = self._first or (step, time.monotonic())
        shown = "  ".join(f"{_SHORT.get(name, name)} {_format(values[name])}" for name in _SHOWN if name in values)
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step, figures=shown)
        elif step % self.log_every == 0 or step in (self._start_step + 1, self.num_steps):
            self.say(f"step {step}/{self.num_steps}  {shown}{self._time_left(step)}")
        if step % self.log_every == 0 or step == self.num_steps:
            self._show_reasons(step)

    def _show_reasons(self, step: int) -> None:
        table = self._reasons.take()
        if table is None:
            return
        for line in table.lines():
            self.say(line)
        if self._board is not None:
            self._board.add_text("reasons", table.markdown(), step)

    def _time_left(self, step: int) -> str:
        done = step - self._first[0]
        if not done:
            return ""
        return f"  {(time.monotonic() - self._first[1]) / done * (self.num_steps - step):.0f} s left"

    def picture(self, step: int, name: str, image) -> Path | None:
        """Keep a PIL image as PNG and in TensorBoard."""
        if not self.is_writer:
            return None
        path = self.folder / "pictures" / f"{name.replace('/', '_')}-{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
        if self._board is not None:
            import numpy

            self._board.add_image(name, numpy.asarray(image), step, dataformats="HWC")
        return path

    def histograms(self, step: int, values: dict[str, Any]) -> None:
        """Send the distribution of each tensor's values to TensorBoard, where it is switched on."""
        if self._board is not None:
            for name, numbers in values.items():
                self._board.add_histogram(name, numbers, step)

    def page(self, step: int, name: str, html: str) -> Path | None:
        """Keep an HTML page in the folder ``name``, which is one of ``WRITTEN``; written beside and renamed."""
        if not self.is_writer:
            return None
        path = self.folder / name / f"step-{step:06d}.html"
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(path.name + ".tmp")
        partial.write_text(html, encoding="utf-8")
        os.replace(partial, path)
        return path

    def close(self) -> None:
        if not self.is_writer:
            return
        self._metrics.close()
        if self._board is not None:
            self._board.close()
        if self._progress is not None:
            self._progress.stop()


def write_json(path: Path, content: Any) -> None:
    """Write JSON beside and rename."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


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


def _format(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"


def _progress_bar(num_steps: int, start_step: int):
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    progress = Progress(TextColumn("[megavg]"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                        TextColumn("{task.fields[figures]}"))
    progress.add_task("training", total=num_steps, completed=start_step, figures="")
    progress.start()
    return progress
