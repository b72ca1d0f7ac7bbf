"""What a run keeps of itself, and how it goes on from it: the trainer's side of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Callable

import yaml

from megavg.checkpoint.manifest import read_manifest
from megavg.checkpoint.train_state import Checkpoints, Snapshot, read_trainer_state
from megavg.parallel.context import ParallelContext
from megavg.trainer.config import RunConfig
from megavg.trainer.policy import Policy

FOLDER = "checkpoints"


class RunState:
    """Saves and restores policy, place in the data and algorithm of one run; all ranks call it together.

    Args:
        source: where prompts come from; has ``state_dict`` and ``load_state_dict``, as the ``algorithm`` has.
        tell: prints one line on one rank.

    Attributes:
        has_own: whether :meth:`restore` has found checkpoints of this very run.
    """

    def __init__(self, config: RunConfig, policy: Policy, source, algorithm, context: ParallelContext,
                 tell: Callable[[str], None]):
        self.config, self.policy, self.source, self.algorithm = config, policy, source, algorithm
        self.context, self._tell, settings = context, tell, config.trainer
        self.folder = Path(settings.output_dir) / FOLDER
        self._store = Checkpoints(self.folder, context, settings.keep_last, settings.keep_every,
                                  settings.save_in_background, config.parallel.timeout_minutes)
        self._saved, self.has_own = -1, False

    def save(self, step: int) -> Path:
        """Keep a checkpoint that :meth:`restore` goes on from; returns where it is, or will be once it is written."""
        path = self.folder / f"step-{step:06d}"
        if step == self._saved:
            return path
        context, model = self.context, self.policy.model
        about = {"layout": context.layout, "world_size": context.world_size, "family": model.spec.family,
                 "dtype": self.config.model.dtype, "box_format": self.config.model.box_format or model.spec.box_format,
                 "legacy_names": model.checkpoint.legacy}
        trainer = {"data": self.source.state_dict(), "optimizer_steps": self.policy.engine.optimizer_steps,
                   "algorithm": {"name": self.config.algorithm_name, **self.algorithm.state_dict()}}
        config = yaml.safe_dump(self.config.tree(), sort_keys=False)
        self._store.save(Snapshot(step, about, trainer, config, model.checkpoint.directory), self.policy.parts())
        self._saved = step
        return path

    def wait(self) -> None:
        """Return when what is being written in the background is whole; raises what went wrong with it."""
        self._store.wait()

    def restore(self) -> int:
        """Go on as ``trainer.resume`` says; returns the step that was reached, 0 where there is nothing to go on from.

        Raises:
            CheckpointError: the checkpoint is damaged, incomplete, or another model's.
            ValueError: it is another algorithm's, or of other data.
        """
        self.has_own = bool(self._store.listed())
        path = self._chosen()
        if path is None:
            return 0
        about, state = read_manifest(path), read_trainer_state(path)
        family = self.policy.model.spec.family
        if about["family"] != family:
            raise ValueError(f"{path} is a checkpoint of a {about['family']} model and model.path="
                             f"{self.config.model.path} is a {family} model; resume with the model it was trained from")
        if state["algorithm"]["name"] != self.config.algorithm_name:
            raise ValueError(f"{path} was written by algorithm {state['algorithm']['name']}, this run is "
                             f"{self.config.algorithm_name}; choose another trainer.output_dir")
        self.source.load_state_dict(state["data"])
        self.algorithm.load_state_dict({k: v for k, v in state["algorithm"].items() if k != "name"})
        self.policy.load(lambda parts: self._store.read(path, parts), state["optimizer_steps"])
        if about["layout"] == self.context.layout:
            self._store.restore_rng(path)
        else:
            self._tell(f"the checkpoint of {about['layout']} goes on as {self.context.layout}")
        self._saved = state["step"]
        return state["step"]

    def _chosen(self) -> Path | None:
        resume = self.config.trainer.resume
        if resume in (True, "auto"):
            return self._store.newest_whole(self._tell)
        path, mine = Path(resume), self._store.listed()
        if not path.is_dir():
            raise ValueError(f"trainer.resume={resume} is no folder; give auto, or a folder such as "
                             f"{self.folder / 'step-000100'}")
        if mine and path.resolve().parent != self.folder.resolve():  # such as the same command after a requeue
            self._tell(f"this run has checkpoints of its own, which it goes on from instead of {resume}")
            return self._store.newest_whole(self._tell)
        if mine and path.resolve().parent == self.folder.resolve() and path.name != mine[-1].name:
            raise ValueError(f"trainer.resume={resume} is older than {mine[-1].name}, which this run has reached; to "
                             "branch off, choose another trainer.output_dir")
        self._store.check(path)
        return path
