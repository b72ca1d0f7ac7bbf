"""A training whose ranks are killed at chosen moments and started again, and how it compares with one left in peace."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tools.forked_ranks import Job

POLL_SECONDS = 0.003
START_TIMEOUT = 900.0
"""Seconds after which a run that nobody kills counts as hanging."""
_WIDTH = 16


@dataclass(frozen=True)
class Moment:
    """``delay`` seconds after ``phase`` has begun for the ``count``-th time in a process; None is the start."""

    phase: str | None
    count: int
    delay: float


@dataclass(frozen=True)
class End:
    """How a start of a run ended.

    Attributes:
        phase: in which rank 0 was killed; "end" where it was not.
        step: the last one in metrics.jsonl.
        half_written: whether a checkpoint of this start lay there unfinished.
        newest: name of the newest whole checkpoint, "" where there is none.
    """

    killed: bool
    phase: str
    step: int
    half_written: bool
    newest: str


@dataclass
class Timeline:
    """When the phases of one start began, in seconds."""

    began: list[tuple[float, str]] = field(default_factory=list)
    written: list[float] = field(default_factory=list)
    total: float = 0.0

    def seconds_of(self, phase: str) -> float:
        """How long a phase takes, on average; a tenth of a second where it has never been seen."""
        if phase == "writing":
            found = self.written
        else:
            ends = [when for when, _ in self.began[1:]] + [self.total]
            found = [end - when for (when, name), end in zip(self.began, ends) if name == phase]
        return sum(found) / len(found) if found else 0.1


class KilledRun:
    """One run, started as often as it takes.

    Attributes:
        problems: what was wrong with its checkpoints after a kill.
        timeline: of the last start.
    """

    def __init__(self, folder: Path, num_ranks: int, tree: dict):
        self.folder, self.num_ranks, self.problems, self.ends = folder, num_ranks, [], []
        self._checkpoints, self._newest = folder / "checkpoints", ""
        self._config, self._phase = (folder.with_name(folder.name + end) for end in (".yaml", ".phase"))
        self._log, self._num_steps = folder.with_name(folder.name + ".log"), tree["trainer"]["num_steps"]
        self._config.write_text(yaml.safe_dump(tree, sort_keys=False))
        self.timeline = Timeline()

    def share_done(self) -> float:
        """How much of the training the newest checkpoint holds."""
        return int(self._newest.split("-")[1]) / self._num_steps if self._newest else 0.0

    def start(self, moment: Moment | None) -> End:
        """Start the run's command, and kill all its ranks at ``moment``.

        Raises:
            RuntimeError: a rank failed by itself; with the last lines of what it said.
        """
        self._phase.write_text("start-up".ljust(_WIDTH))
        left = self._half_written()
        with Job(self._log, self.num_ranks, train, str(self._config), str(self._phase)) as job:
            self._watch(job, moment, left)
            job.kill()
            codes = job.exit_codes
        if set(codes) - {0, -9} or moment is None and set(codes) != {0}:
            raise RuntimeError(f"{self.folder.name}: ranks ended with {codes}:\n{job.last_lines()}")
        end = End(-9 in codes, self._read_phase(), _last_step(self.folder), bool(self._half_written() - left),
                  self._check())
        self.ends.append(end)
        return end

    def _watch(self, job: Job, moment: Moment | None, left: set[int]) -> None:
        """Return when a rank has failed, all have ended, or ``moment`` has come."""
        started, line, count, phase, writing = time.monotonic(), Timeline(), 0, "", None
        due = moment.delay if moment and moment.phase is None else None
        while job.running and not set(job.exit_codes) - {None, 0}:
            now, found, half = time.monotonic() - started, self._read_phase(), bool(self._half_written() - left)
            begun = set()
            if found != phase:
                phase = found
                line.began.append((now, phase))
                begun.add(phase)
            if half and writing is None:
                writing = now
                begun.add("writing")
            elif not half and writing is not None:
                line.written.append(now - writing)
                writing = None
            if moment and due is None and moment.phase in begun:
                count += 1
                due = now + moment.delay if count == moment.count else None
            if due is not None and now >= due:
                return
            if now > START_TIMEOUT:
                raise RuntimeError(f"{self.folder.name} hangs:\n{job.last_lines()}")
            time.sleep(POLL_SECONDS)
        line.total = time.monotonic() - started
        self.timeline = line

    def _half_written(self) -> set[int]:
        """Which unfinished checkpoints lie there; also notices when there is none but those."""
        try:
            entries = [(entry.name, entry.inode()) for entry in os.scandir(self._checkpoints)]
        except FileNotFoundError:
            return set()
        if self._newest and all("." in name for name, _ in entries):
            self.problems.append(f"no checkpoint was there, although {self._newest} had been whole")
            self._newest = ""
        return {inode for name, inode in entries if name.endswith(".tmp")}

    def _check(self) -> str:
        """The newest checkpoint, of which every byte is looked at."""
        from megavg.checkpoint.manifest import read_manifest, wrong_files
        from megavg.checkpoint.train_state import checkpoints

        there = checkpoints(self._checkpoints)
        newest = there[-1].name if there else ""
        if newest < self._newest:
            self.problems.append(f"the newest checkpoint was {self._newest}, and is now {newest or 'none'}")
        if there:
            self.problems += wrong_files(there[-1], read_manifest(there[-1])["files"])
        self._newest = newest
        return newest

    def _read_phase(self) -> str:
        return self._phase.read_text().strip()


def train(config: str, phase: str) -> int:
    """What ``megavg/train.py --config CONFIG`` does on a rank; rank 0 keeps the name of its phase in a file."""
    from megavg.trainer.config import parse_command_line
    from megavg.trainer.entry import part, run

    def make(settings):
        from megavg.trainer.trainer import Trainer

        trainer = Trainer(settings)
        if trainer.context.rank == 0:
            _tell_phases(trainer, phase)
        return trainer

    return part(run(lambda: parse_command_line(["--config", config]), make))


def _tell_phases(trainer, path: str) -> None:
    """Have the trainer's parts say when they begin and end; they do what they did."""
    file = os.open(path, os.O_WRONLY)

    def tell(phase: str) -> None:
        os.pwrite(file, phase.ljust(_WIDTH).encode(), 0)

    def observe(owner, name: str, phase: str) -> None:
        method = getattr(owner, name)

        def observed(*args, **options):
            tell(phase)
            try:
                return method(*args, **options)
            finally:
                tell("in between")

        setattr(owner, name, observed)

    observe(trainer.collector, "collect", "rollout")
    observe(trainer, "score", "scoring")
    observe(trainer, "update", "update")
    observe(trainer.evaluator, "run", "evaluation")
    observe(trainer.state, "save", "save")
    observe(trainer.state, "wait", "save")
    observe(trainer.policy, "export_hf", "export")
    tell("in between")


def prepare(folder: Path) -> None:
    """Draw scenes, and train a tiny model on them until its answers are boxes that still vary; what is there stays."""
    if (folder / "warm-up" / "hf").is_dir() and (folder / "scenes").is_dir():
        return
    with Job(folder / "warm-up.log", 1, _warm_up, str(folder)) as job:
        if job.wait(START_TIMEOUT) != [0]:
            raise RuntimeError(f"the model to start from cannot be trained:\n{job.last_lines()}")


def _warm_up(folder: str) -> int:
    from megavg.data.scenes import scenes
    from megavg.data.writer import write_shards
    from megavg.models.tiny import TinySpec, make_tiny_checkpoint
    from megavg.trainer.config import resolve
    from megavg.trainer.trainer import Trainer

    out = Path(folder)
    write_shards(scenes(8, seed=0), str(out / "scenes"), "scenes", 8)
    # the deepstack's two additions have to fit on the first of two stages
    make_tiny_checkpoint(out / "tiny", TinySpec(
        "qwen3_vl", hidden_size=64, intermediate_size=128, num_layers=4, vision_depth=2, vocab_size=515,
        min_pixels=3136, max_pixels=16384))
    tree = _tree(out, out / "tiny", out / "warm-up")
    tree["algorithm"] = {"name": "sft"}
    tree["optimizer"] = {"lr": 1e-2, "warmup_steps": 5, "schedule": "cosine"}
    tree["data"]["prompts_per_step"] = 16
    tree["trainer"] |= {"num_steps": 60, "micro_batch_size": 16}
    return Trainer(resolve(tree)).run()


def _tree(folder: Path, model: Path, out: Path) -> dict[str, Any]:
    return {"model": {"path": str(model), "dtype": "float32"},
            "data": {"shards": [str(folder / "scenes")], "prompt": "Locate {expression}.", "check_frame": "off"},
            "rollout": {"group_size": 4, "max_new_tokens": 32},
            "rewards": [{"name": "iou"}, {"name": "format", "weight": 0.5}],
            "evaluation": {"at_start": False, "at_end": False},
            "trainer": {"output_dir": str(out), "tensorboard": False, "picture_every": 0, "diagnostics_every": 0}}


def run_tree(folder: Path, out: Path, ranks: int = 2, tp: int = 1, pp: int = 1, steps: int = 6, save_every: int = 1,
             background: bool = False) -> dict[str, Any]:
    """The configuration of a run in which the algorithm's memory and the place in the data matter."""
    num_data = ranks // (tp * pp)
    tree = _tree(folder, folder / "warm-up" / "hf", out)
    tree["parallel"] = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    tree["data"]["prompts_per_step"] = num_data * -(-4 // num_data)
    tree["algorithm"] = {"name": "ecvgpo+two_stage+dapo", "resample_tries": 1, "target_entropy": 1.0, "kappa": 0.1}
    tree["optimizer"] = {"lr": 1e-4}
    tree["evaluation"] = {"sets": {"seen": [str(folder / "scenes")]}, "every": 2, "limit": 2, "at_start": True,
                          "at_end": True, "pictures": 0}
    tree["trainer"] |= {"num_steps": steps, "micro_batch_size": 4, "save_every": save_every, "resume": "auto",
                        "save_in_background": background, "log_every": 1}
    return tree


def differences(expected: Path, found: Path, checkpoints: bool = True) -> list[str]:
    """One line for everything that a finished run has otherwise than another; the last checkpoint on wish."""
    wrong = _different_metrics(expected, found)
    for name in ("evaluation", "hf"):
        files = [{path.name: path.read_bytes() for path in (folder / name).iterdir()} for folder in (expected, found)]
        wrong += [f"{name}/{file} differs" for file in sorted(files[0].keys() | files[1].keys())
                  if files[0].get(file) != files[1].get(file)]
    return wrong + (_different_checkpoints(expected / "checkpoints", found / "checkpoints") if checkpoints else [])


def _different_metrics(expected: Path, found: Path) -> list[str]:
    here, there = ([without_times(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
                   for folder in (expected, found))
    for number, (ours, theirs) in enumerate(zip(here, there), 1):
        # as text: NaN equals NaN, and 0 is not 0.0
        names = [name for name in {**ours, **theirs} if json.dumps(ours.get(name)) != json.dumps(theirs.get(name))]
        if names:
            return [f"metrics.jsonl, line {number}: {names[0]} is {theirs.get(names[0])} instead of "
                    f"{ours.get(names[0])} ({len(names)} figures differ)"]
    return [] if len(here) == len(there) else [f"metrics.jsonl has {len(there)} lines instead of {len(here)}"]


def without_times(line: str) -> dict[str, Any]:
    """A line of metrics.jsonl without what depends on the clock or on the process."""
    return {key: value for key, value in json.loads(line).items()
            if not key.startswith(("time/", "memory/")) and key != "tokens_per_second"}


def _different_checkpoints(expected: Path, found: Path) -> list[str]:
    import torch

    from megavg.checkpoint.sharded import ShardedFolder
    from megavg.checkpoint.train_state import STATE, TRAINER, checkpoints

    here, there = checkpoints(expected)[-1], checkpoints(found)[-1]
    if here.name != there.name:
        return [f"the last checkpoint is {there.name} instead of {here.name}"]
    wrong = [] if (here / TRAINER).read_text() == (there / TRAINER).read_text() else [f"{there / TRAINER} differs"]
    ours, theirs = ShardedFolder(here / STATE), ShardedFolder(there / STATE)
    if ours.tensors != theirs.tensors:
        return [*wrong, f"{there} holds other tensors"]
    different = [name for name in ours.tensors if not torch.equal(
        *(folder.read(name).reshape(-1).view(torch.uint8) for folder in (ours, theirs)))]
    if different:
        wrong.append(f"{there.name}: {different[0]} differs, one of {len(different)} tensors of {len(ours.tensors)}")
    return wrong


def _last_step(folder: Path) -> int:
    path, step = folder / "metrics.jsonl", 0
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            step = json.loads(line)["step"]
        except ValueError:
            continue  # it was killed while it wrote
    return step
