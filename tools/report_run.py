"""Read what runs left in their folders: facts, configuration, metrics, evaluations; whatever is missing is said."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SIGNS_OF_A_RUN = ("metrics.jsonl", "run.json")
_EVALUATION = re.compile(r"(.+)-(\d{6,})\.json")
_LARGEST = 1e100
_QUIET_SECONDS = 600  # a run that wrote nothing for so long is not called running


@dataclass
class Run:
    """One run.

    Attributes:
        series: metric -> {step: value}, by rising step; a step that was written twice counts as it was written last.
        reasons: step -> {"reward: reason": answers}.
        evaluations: set -> {step: file}.
        questions: task -> the text the model was asked with.
        heat_map: the newest page of coloured tokens.
        notes: what could not be read, in words.
    """

    name: str
    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    series: dict[str, dict[int, float]] = field(default_factory=dict)
    reasons: dict[int, dict[str, int]] = field(default_factory=dict)
    evaluations: dict[str, dict[int, Path]] = field(default_factory=dict)
    questions: dict[str, str] = field(default_factory=dict)
    heat_map: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        """The last training step that is in metrics.jsonl, 0 where there is none."""
        return max((max(steps) for name, steps in self.series.items() if not name.startswith("eval/")), default=0)

    def option(self, *keys: str) -> Any:
        """A value of the resolved configuration, None where it is not there."""
        found: Any = self.config
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found


def read_runs(folders: list[str]) -> list[Run]:
    """The runs in ``folders``, each once, with names that tell them apart.

    Raises:
        ValueError: a folder holds no run; the message names those below it that do.
    """
    paths = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    for path in paths:
        if not any((path / name).is_file() for name in SIGNS_OF_A_RUN):
            raise ValueError(_no_run(path))
    return [_read(path, name) for path, name in zip(paths, distinct_names(paths))]


def distinct_names(paths: list[Path]) -> list[str]:
    """The shortest ends of different paths that no two of them share."""
    depth = 1
    names = [path.name for path in paths]
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(path.parts[-depth:]) if names.count(name) > 1 else name for path, name in zip(paths, names)]
    return names


def status(run: Run) -> tuple[str, str]:
    """(good, open or bad; a few words) on whether the run came to its end."""
    planned, step = run.option("trainer", "num_steps"), run.last_step
    of = f"{step} of {planned} steps" if planned else f"{step} steps"
    stopped = _json(run.folder / "stopped.json")
    if isinstance(stopped, dict) and stopped:
        return "open", f"stopped by {stopped.get('signal', 'a signal')} after {of}; trainer.resume=auto goes on"
    if planned and step >= planned:
        return "good", f"finished, {of}"
    if _goals_reached(run):
        return "good", f"ended after {of}: every goal of evaluation.stop_at was reached"
    if (age := time.time() - _written(run)) < _QUIET_SECONDS:
        return "open", f"not finished: {of}, the last line {age:.0f} s before this report"
    return "bad", f"not finished: {of}, and nothing new for {_duration(age)}"


def when(run: Run) -> str:
    """When metrics.jsonl was last written, and how long the steps took together."""
    seconds = sum(value for value in run.series.get("time/step", {}).values() if math.isfinite(value))
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime(_written(run)))
    return f"{written}, {_duration(seconds)} of training steps" if seconds else written


def load_evaluation(run: Run, name: str, step: int) -> dict | None:
    """One result with its rows; None, with a note, where the file is no such thing."""
    path = run.evaluations[name][step]
    found = _json(path)
    if isinstance(found, dict) and isinstance(found.get("rows"), list) and "correct_rate" in found:
        return found
    note = f"evaluation/{path.name} cannot be read and is left out"
    if note not in run.notes:
        run.notes.append(note)
    return None


def _read(path: Path, name: str) -> Run:
    run = Run(name, path)
    run.facts, run.config = _dict(_json(path / "run.json")), _dict(_yaml(path / "config.yaml"))
    run.questions = {task: text for task, text in _dict(_yaml(path / "prompts.yaml")).items() if isinstance(text, str)}
    _read_metrics(run)
    for file in sorted((path / "evaluation").glob("*.json")):
        if match := _EVALUATION.fullmatch(file.name):
            run.evaluations.setdefault(match[1], {})[int(match[2])] = file
    run.heat_map = max((path / "heat_maps").glob("step-*.html"), default=None)
    for there, words in ((run.config, "no config.yaml that can be read"), (run.facts, "no run.json that can be read"),
                         (run.series, "no training step in metrics.jsonl"), (run.evaluations, "no evaluation")):
        if not there:
            run.notes.append(words)
    return run


def _read_metrics(run: Run) -> None:
    path, torn = run.folder / "metrics.jsonl", []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    found: dict[str, dict[int, float]] = {}
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            step = int(values["step"])
        except (ValueError, KeyError, TypeError, OverflowError):
            torn.append(number)
            continue
        for name, value in values.items():
            if name == "reasons" and isinstance(value, dict):
                run.reasons[step] = {str(key): count for key, count in value.items() if isinstance(count, int)}
            elif name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                # what no axis can hold is drawn as infinite values are: not at all
                found.setdefault(name, {})[step] = float(value) if abs(value) < _LARGEST else math.inf
    run.series = {name: dict(sorted(steps.items())) for name, steps in found.items()}
    if torn:
        where = "the last line" if torn == [len(lines)] else f"line {', '.join(map(str, torn[:5]))}"
        run.notes.append(f"metrics.jsonl: {where} cannot be read and {'are' if len(torn) > 1 else 'is'} left out")
    strange = {name: bad for name, steps in run.series.items()
               if (bad := sum(not math.isfinite(value) for value in steps.values()))}
    if strange:
        run.notes.append("values that are no finite number are gaps in the curves: "
                         + ", ".join(f"{name} ({count})" for name, count in strange.items()))


def _goals_reached(run: Run) -> bool:
    from megavg.evaluation.figures import headline

    goals = _dict(run.option("evaluation", "stop_at"))
    for name, goal in goals.items():
        if run.last_step not in run.evaluations.get(name, {}):
            return False
        result = load_evaluation(run, name, run.last_step)
        if result is None or (headline(result)[1] or 0.0) < goal:
            return False
    return bool(goals)


def _written(run: Run) -> float:
    return max((run.folder / name).stat().st_mtime for name in SIGNS_OF_A_RUN if (run.folder / name).is_file())


def _no_run(path: Path) -> str:
    if not path.is_dir():
        return f"{path} is no folder; give the trainer.output_dir of a run"
    below = sorted({file.parent for sign in SIGNS_OF_A_RUN for file in path.glob(f"*/{sign}")})
    remedy = "give " + " or ".join(map(str, below[:4])) if below else "give the trainer.output_dir of a run"
    return f"{path} holds no run (no {' and no '.join(SIGNS_OF_A_RUN)}); {remedy}"


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _dict(found: Any) -> dict:
    return found if isinstance(found, dict) else {}


def _duration(seconds: float) -> str:
    hours, minutes = int(seconds) // 3600, int(seconds) // 60 % 60
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if seconds >= 120 else f"{seconds:.0f} s"
