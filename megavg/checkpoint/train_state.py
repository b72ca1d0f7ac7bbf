"""Checkpoints of a running job: written beside and renamed when whole, checked when read, for any layout.

A folder ``step-000100`` holds
  state/          parameters (fp32 master copies) and optimiser state by HF name, in files of every rank
  rng/            the generators of each rank
  model/          configuration, tokenizer and processor of the model
  trainer.json    step, place in the data, state of the algorithm, updates made
  config.yaml     the resolved options of the run
  manifest.json   sizes and checksums of all of them; written last
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

import torch.distributed as dist

from megavg.checkpoint import swap
from megavg.checkpoint.errors import CheckpointError, first_line
from megavg.checkpoint.hf import copy_side_files
from megavg.checkpoint.manifest import (MANIFEST, facts_of, read_manifest, sync_file, sync_folder, wrong_files,
                                        write_manifest, write_synced)
from megavg.checkpoint.parts import Part
from megavg.checkpoint.rng import rng_state, set_rng_state
from megavg.checkpoint.sharded import read_parts, write_parts
from megavg.parallel.context import ParallelContext

STATE, TRAINER, RNG, MODEL, CONFIG = "state", "trainer.json", "rng", "model", "config.yaml"
PARTIAL, REPLACED, REMOVED = ".tmp", ".replaced", ".removed"
"""Ends of the names of folders that are no checkpoints: half written, giving way to another, on their way out."""

logger = logging.getLogger(__name__)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of ``folder`` that were finished, oldest first; their files are not looked at."""
    return sorted((path for path in Path(folder).glob("step-*")
                   if re.fullmatch(r"step-\d{6,}", path.name) and (path / MANIFEST).is_file()), key=step_of)


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """All of a checkpoint but its tensors, the same on every rank.

    Attributes:
        about: goes into the manifest (layout, family, ...).
        trainer: goes into trainer.json.
        config: text of config.yaml.
        model_files: directory whose configuration, tokenizer and processor files are copied.
    """

    step: int
    about: dict[str, Any]
    trainer: dict[str, Any]
    config: str
    model_files: Path


class Checkpoints:
    """The checkpoints of one run. All ranks make it, and call its methods, together.

    Args:
        folder: where ``step-*`` folders lie.
        keep_last: the newest so many are kept ...
        keep_every: ... and those whose step is a multiple of this; 0 keeps no others.
        in_background: copy the state in memory and write it while the training goes on.
        timeout_minutes: how long a rank waits for the others, such as one that writes to a slow disk.
    """

    def __init__(self, folder: Path, context: ParallelContext, keep_last: int = 2, keep_every: int = 0,
                 in_background: bool = False, timeout_minutes: float = 30):
        self.folder, self._rank, self._world = Path(folder), context.rank, context.world_size
        self._keep_last, self._keep_every, self._in_background = keep_last, keep_every, in_background
        # of its own, so that a background write never comes between the training's collectives
        self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes)) \
            if context.world_size > 1 else None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, snapshot: Snapshot, parts: Iterable[Part]) -> None:
        """Write ``step-<step>``. In the background this returns when the state is copied.

        Raises:
            CheckpointError: on every rank, when one could not write, or the write before this one failed in the
                background. Checkpoints that were there before are as they were.
        """
        self.wait()
        parts, rng = [part for part in parts if part.owned], rng_state()
        if not self._in_background:
            self._write(snapshot, parts, rng)
            return
        parts = [_held(part) for part in parts]
        self._thread = threading.Thread(target=self._try_to_write, args=(snapshot, parts, rng), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when what is being written is whole; raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _try_to_write(self, *args) -> None:
        try:
            self._write(*args)
        except BaseException as error:  # ``wait`` raises it where it is seen
            self._failure = error

    def _write(self, snapshot: Snapshot, parts: Sequence[Part], rng: dict) -> None:
        final = self.folder / f"step-{snapshot.step:06d}"
        partial = final.with_name(final.name + PARTIAL)
        try:
            self._on_first(lambda: self._prepare(partial, snapshot))
            write_parts(partial / STATE, parts, self._group)
            facts = self._together(lambda: self._own_facts(partial, rng))
            self._on_first(lambda: self._finish(partial, final, snapshot, facts))
        except CheckpointError as error:
            if self._rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            there = checkpoints(self.folder)
            last = f"the last whole one is {there[-1]}" if there else "there is none before it"
            raise CheckpointError(f"the checkpoint {final} could not be written ({error}); make room or mend the "
                                  f"folder's permissions, and resume: {last}") from error
        if self._rank == 0:
            try:
                self._remove_old(snapshot.step)
            except OSError as error:  # what was to be saved is saved
                logger.warning("an old checkpoint could not be removed: %s", error)

    def _prepare(self, partial: Path, snapshot: Snapshot) -> None:
        self._clear_left_overs()
        swap.remove(partial)
        (partial / RNG).mkdir(parents=True)
        (partial / MODEL).mkdir()
        copy_side_files(snapshot.model_files, partial / MODEL)
        for path in (partial / MODEL).iterdir():
            sync_file(path)

    def _clear_left_overs(self) -> None:
        """Remove what a run that was killed left half written, half removed, or replaced; others' names are let be."""
        for left in sorted(self.folder.glob("step-*")):
            if not re.fullmatch(rf"step-\d{{6,}}({PARTIAL}|{REPLACED}|{REMOVED})", left.name):
                continue
            try:
                if left.suffix == REPLACED and not left.with_suffix("").exists():
                    left.rename(left.with_suffix(""))
                else:
                    swap.remove(left)
            except OSError as error:  # it is in nobody's way
                logger.warning("%s could not be removed: %s", left, error)

    def _own_facts(self, partial: Path, rng: dict) -> dict:
        path = partial / RNG / f"rank-{self._rank:05d}.json"
        write_synced(path, json.dumps(rng) + "\n")
        return facts_of(partial, [path, *partial.glob(f"{STATE}/__{self._rank}_*")])

    def _finish(self, partial: Path, final: Path, snapshot: Snapshot, facts: list[dict]) -> None:
        write_synced(partial / TRAINER, json.dumps({"step": snapshot.step, **snapshot.trainer}, indent=1) + "\n")
        write_synced(partial / CONFIG, snapshot.config)
        first = facts_of(partial, [partial / TRAINER, partial / CONFIG, partial / STATE / ".metadata",
                                   *sorted((partial / MODEL).iterdir())])
        files = {name: fact for part in (first, *facts) for name, fact in part.items()}
        write_manifest(partial, files, {"step": snapshot.step, **snapshot.about})
        for folder in (partial / STATE, partial / RNG, partial / MODEL, partial):
            sync_folder(folder)
        swap.replace(partial, final, final.with_name(final.name + REPLACED))

    def _remove_old(self, step: int) -> None:
        """Keep what is to be kept of the checkpoints up to ``step``.

        Later ones are of what the run has left behind (it went on from an earlier one, where they were damaged): they
        are set aside as ``step-000300.passed``, and are not gone on from any more.
        """
        there = checkpoints(self.folder)
        for later in (path for path in there if step_of(path) > step):
            aside = later.with_name(later.name + ".passed")
            swap.remove(aside)
            later.rename(aside)
        for old in [path for path in there if step_of(path) <= step][:-self._keep_last]:
            if not self._keep_every or step_of(old) % self._keep_every:
                # first no checkpoint any more, then gone: a kill in between leaves none that only looks whole
                gone = old.with_name(old.name + REMOVED)
                old.rename(gone)
                swap.remove(gone)

    def listed(self) -> list[Path]:
        """The checkpoints that were finished, oldest first, as rank 0 sees them; left-overs are cleared away before."""
        self._on_first(self._clear_left_overs)
        # file systems that machines share may show each of them another list
        names = self._together(lambda: [path.name for path in checkpoints(self.folder)])[0]
        return [self.folder / name for name in names]

    def newest_whole(self, tell: Callable[[str], None]) -> Path | None:
        """The newest checkpoint whose files all are as they were written; None where there has been none yet.

        Raises:
            CheckpointError: there are checkpoints, and every one is damaged.
        """
        there, problem = self.listed(), None
        for path in reversed(there):
            try:
                self.check(path)
                return path
            except CheckpointError as error:
                problem = problem or error
                tell(f"{path} is passed over: {error}")
        if problem is not None:
            raise CheckpointError(f"none of the {len(there)} checkpoints in {self.folder} is whole; the newest: "
                                  f"{problem}")
        return None

    def check(self, path: Path) -> dict:
        """Compare all files of a checkpoint with its manifest, the ranks sharing the work; returns the manifest."""
        def look() -> list[str]:
            files = sorted(read_manifest(path)["files"].items())
            return wrong_files(path, dict(files[self._rank::self._world]))

        wrong = [line for lines in self._together(look) for line in lines]
        if wrong:
            more = f" ({len(wrong)} files in all)" if len(wrong) > 1 else ""
            raise CheckpointError(f"{wrong[0]}{more}; take the checkpoint before (trainer.resume=auto does), or copy "
                                  "it again")
        return read_manifest(path)

    def read(self, path: Path, parts: Iterable[Part]) -> None:
        """Fill the views of ``parts`` from a checkpoint of any layout."""
        self._together(lambda: read_parts(Path(path) / STATE, list(parts)))

    def restore_rng(self, path: Path) -> None:
        """Set this rank's generators as the rank of this number had them, where there was one."""
        file = Path(path) / RNG / f"rank-{self._rank:05d}.json"
        if file.exists():
            set_rng_state(json.loads(file.read_text()))

    def _together(self, function: Callable[[], Any]) -> list:
        """What ``function`` gives on every rank, in rank order; its error on one is raised on all."""
        answer = error = None
        try:
            answer = function()
        except CheckpointError as caught:
            error = str(caught)
        except (OSError, ValueError, shutil.Error) as caught:
            error = first_line(caught)
        answers = [(answer, error)]
        if self._group is not None:
            answers = [None] * self._world
            dist.all_gather_object(answers, (answer, error), group=self._group)
        for rank, (_, problem) in enumerate(answers):
            if problem is not None:
                raise CheckpointError(f"rank {rank}: {problem}" if self._world > 1 else problem)
        return [value for value, _ in answers]

    def _on_first(self, function: Callable[[], None]) -> None:
        self._together(lambda: function() if self._rank == 0 else None)


def read_trainer_state(path: Path) -> dict:
    """The content of trainer.json of a checkpoint that was checked.

    Raises:
        CheckpointError: it is a model that was converted, with no state of a training.
    """
    try:
        return json.loads((Path(path) / TRAINER).read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} holds a model and no state of a training: it was converted. Start from it with "
                              "model.path instead of trainer.resume") from error


def _held(part: Part) -> Part:
    """The part with its values as they are now, in the host's memory."""
    values = part.fetch().detach().to("cpu", copy=True)
    return dataclasses.replace(part, fetch=lambda: values)
