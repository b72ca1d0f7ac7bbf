"""Checkpoints of a running job, for going on in the same layout: written beside, renamed when whole.

A folder ``step-000100`` holds the engine's state and ``trainer_state.json`` (step, data position, algorithm). There is
no other hidden state: all randomness is derived from (seed, step, sample, answer).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Callable

import torch.distributed as dist

from megavg.checkpoint.hf import replace_directory

_STATE = "trainer_state.json"


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of ``folder``, oldest first."""
    return sorted(p for p in Path(folder).glob("step-*") if p.suffix == "" and (p / _STATE).is_file())


def save_train_state(folder: Path, step: int, state: dict, save_engine: Callable[[Path], None], keep_last: int) -> Path:
    """Write ``folder/step-<step>``; all processes call it together, and the oldest beyond ``keep_last`` go."""
    final = Path(folder) / f"step-{step:06d}"
    partial = final.with_name(final.name + ".tmp")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    save_engine(partial)
    dist.barrier()  # every rank's part is there before the folder gets its name
    if dist.get_rank() == 0:
        (partial / _STATE).write_text(json.dumps({"step": step, **state}, indent=2) + "\n")
        replace_directory(partial, final)
        for old in checkpoints(folder)[:-keep_last]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def read_train_state(checkpoint: Path, layout: str) -> dict:
    """The trainer's part of a checkpoint, refused when it was written in another layout."""
    path = Path(checkpoint) / _STATE
    try:
        state = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); remove {checkpoint} to resume from the one before") from error
    if state["layout"] != layout:
        raise ValueError(f"{checkpoint} was written by {state['layout']} and this run is {layout}; resume in the same "
                         "layout, or start from the exported hf folder")
    return state
