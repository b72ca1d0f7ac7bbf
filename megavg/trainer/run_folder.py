"""The folder of a run: whether it may be used, and what an earlier process of the run leaves in it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any, Callable

import yaml

from megavg.data.shards import expand_shards
from megavg.protocols.restarts import is_of_this_job, note_job
from megavg.trainer.config import RunConfig, save_resolved
from megavg.trainer.stop_signal import MARKER

WRITTEN = ("config.yaml", "prompts.yaml", "deepspeed_config.json", "run.json", "metrics.jsonl", "tensorboard",
           "pictures", "heat_maps", "evaluation", "checkpoints", "hf", "hang", "stopped.json")
"""Everything a run puts into its folder; replacing a run removes these and nothing else."""
_OF_STEPS = ("pictures", "heat_maps", "evaluation")
_SAME_RUN = ("model", "data", "algorithm", "rollout", "rewards", "optimizer")
"""Sections of the configuration that make a run what it is."""
_FREE = {"rollout": {"prompts_per_pass"},
         "data": {"num_workers", "prefetch_batches", "check_frame", "check_frame_samples", "on_error", "max_skipped"}}
"""Options of these that change no result."""
FINISHED = "finished"
"""Key of run.json that says that the run came to its end."""
_REMEDY = "set trainer.resume=false trainer.overwrite=true to replace it, or choose another trainer.output_dir"


class RunFolder:
    """``trainer.output_dir`` of one run; every process looks, one changes.

    Attributes:
        config: as it is asked for; but where an earlier start of this very job has begun the run, it is gone on with
            instead of replaced or refused.
    """

    def __init__(self, config: RunConfig):
        self._asked, self.path = config, Path(config.trainer.output_dir)
        if not config.trainer.resume and is_of_this_job(self.path):
            settings = dataclasses.replace(config.trainer, resume="auto", overwrite=False)
            config = dataclasses.replace(config, trainer=settings)
        self.config, self.settings = config, config.trainer

    @property
    def is_used(self) -> bool:
        """Whether a run has written into it."""
        return any((self.path / name).exists() for name in ("metrics.jsonl", "checkpoints"))

    def check(self) -> None:
        """Refuse to mix two runs in one folder, or to replace one that this run starts from."""
        if self.is_used and not (self.settings.resume or self.settings.overwrite):
            raise ValueError(f"{self.path} already holds a run; set trainer.resume=true to go on with it, "
                             "trainer.overwrite=true to replace it, or choose another trainer.output_dir")
        shards = [self.config.data.all_shards(), *self.config.evaluation.sets.values()]
        for path in (self.config.model.path, *(path for paths in shards for path in expand_shards(paths))):
            written = {self.path.resolve() / name for name in WRITTEN}
            if self.settings.overwrite and written & {Path(path).resolve(), *Path(path).resolve().parents}:
                raise ValueError(f"trainer.overwrite=true would remove {path}, which this run reads; choose another "
                                 "trainer.output_dir")

    def check_anew(self, tell: Callable[[str], None]) -> None:
        """Where there is nothing to go on from: refuse to replace what a finished or another run has left.

        Raises:
            ValueError: the steps in the folder are not the beginning of this very run.
        """
        steps, before = _last_step(self.path / "metrics.jsonl"), _read(self.path / "config.yaml")
        if not steps or not self.settings.resume:
            return
        other = _first_difference(before, yaml.safe_load(yaml.safe_dump(self.config.tree())))
        if other:
            raise ValueError(f"{self.path} holds {steps} steps of a run with other options ({other}), and no "
                             f"checkpoint to go on from; {_REMEDY}")
        if _read(self.path / "run.json").get(FINISHED):
            raise ValueError(f"{self.path} holds a finished run of {steps} steps, and no checkpoint to go on from; "
                             f"{_REMEDY}")
        tell(f"{self.path} holds {steps} steps of this run, but no checkpoint (trainer.save_every="
             f"{self.settings.save_every}): it starts anew")

    def prepare(self, start_step: int, anew: bool) -> None:
        """Make the folder, or empty it of what is replaced: an old run, or steps that are taken again.

        Args:
            start_step: after which the run goes on.
            anew: from no checkpoint of its own: nothing that is there is of steps that stay.
        """
        if self.is_used and self.settings.overwrite:
            remove_run(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / MARKER).unlink(missing_ok=True)
        if anew:
            (self.path / "metrics.jsonl").unlink(missing_ok=True)
        for folder in _OF_STEPS:
            for file in (self.path / folder).glob("*"):
                step = re.search(r"-(\d{6,})\.\w+$", file.name)
                if step and (anew or int(step[1]) > start_step):
                    file.unlink()
        note_job(self.path)
        save_resolved(self._asked, self.path / "config.yaml")


def remove_run(folder: Path) -> None:
    """Remove what a run wrote into ``folder``, and leave what else lies there."""
    for name in WRITTEN:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _last_step(path: Path) -> int:
    """The last step that metrics.jsonl knows of, 0 where there is none."""
    steps = [0]
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            steps.append(int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):  # it was killed while it wrote
            continue
    return max(steps)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _first_difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first option that makes another run of it, with both values; "" for the same run."""
    for section in (*_SAME_RUN, "trainer"):
        names = ("seed",) if section == "trainer" else None
        old, new = before.get(section), now.get(section)
        if isinstance(old, dict) and isinstance(new, dict):
            for name in names or (name for name in old if name not in _FREE.get(section, ())):
                if name in old and old[name] != new.get(name):  # one that is new came with a newer version
                    return f"{section}.{name}: {old[name]!r}, now {new.get(name)!r}"
        elif before and old != new:
            return f"{section}: {old!r}, now {new!r}"
    return ""
