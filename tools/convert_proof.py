"""Ask transformers and megavg about one drawn scene, each with a folder of its own, and compare their logits."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from megavg.checkpoint.convert import Source
    from megavg.protocols.batch import EncodedPrompt

TOLERANCE = 1e-3
"""Largest difference of two logits, as a share of the largest logit: both sum the same products in another order."""
_BESIDE = 2**30
"""Bytes that libraries and activations take beside the weights."""


def why_not(source: Source, out: Source) -> str | None:
    """Why the logits cannot be compared; None where they can."""
    if source.manifest is not None and out.manifest is not None:
        return "neither folder is one that transformers loads"
    needed = 4 * sum(math.prod(out.facts(name)[0]) for name in out.names) * 11 // 10 + _BESIDE
    free = available_bytes()
    if needed > free:
        return f"the model needs about {needed / 1e9:.1f} GB of memory in fp32, {free / 1e9:.1f} GB are free"
    return None


def available_bytes() -> int:
    """Memory that this process can still take, on the machine and within its control groups."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min(free + _left_by_groups(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup")))


def _left_by_groups(told: str, root: Path) -> list[int]:
    """What each control group of memory, and each above it, has left; ``told`` is what the kernel says of a process.

    Slurm sets the limit of a job above that of its task, and older machines have version 1 of the groups.
    """
    left = []
    for line in told.splitlines():
        _, controllers, group = line.split(":", 2)
        top, limit, used = root, "memory.max", "memory.current"
        if "memory" in controllers.split(","):
            top, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        elif controllers:
            continue
        folder = top / group.lstrip("/")
        for each in (folder, *folder.parents):
            try:
                left.append(int((each / limit).read_text()) - int((each / used).read_text()))
            except (OSError, ValueError):
                pass  # no limit, or none of this kind
            if each == top:
                break
    return left


def logits_differ(source: Source, out: Source) -> tuple[float, float]:
    """(largest difference of two logits, largest logit) of transformers, with the Hugging Face side, and megavg.

    Both compute in fp32 on the CPU, one after the other, from weights rounded to the dtype of ``source``.

    Raises:
        ValueError: the two sides' processors make different inputs of the scene, or transformers misses a tensor.
    """
    import torch

    hf, other = (out, source) if out.manifest is None else (source, out)
    _be_alone()
    from megavg.models.base import load_model

    model = dataclasses.replace(load_model(other.folder), checkpoint=other)
    prompt, theirs_prompt = (_prompt(folder, model.spec.box_format) for folder in (other.directory, hf.directory))
    if prompt.input_ids != theirs_prompt.input_ids or not torch.equal(prompt.pixel_values, theirs_prompt.pixel_values):
        raise ValueError(f"the processors of {other.directory} and {hf.directory} make different inputs of a scene")
    with torch.no_grad():
        theirs = _transformers_logits(hf.directory, source.dtype, prompt)
        gc.collect()
        ours = _megavg_logits(model, prompt)
    return float((ours - theirs).abs().max().nan_to_num(math.inf)), float(theirs.abs().max())


def _be_alone() -> None:
    """Be a world of one process on the CPU, whatever started this one."""
    import torch.distributed as dist

    if not dist.is_initialized():
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    from megavg.parallel.mcore import start_processes

    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed tells of what it has compiled
        start_processes()


def _prompt(directory: Path, box_format: str) -> EncodedPrompt:
    from megavg.data.scenes import scenes
    from megavg.models.processor import Processor

    (scene,) = scenes(1, seed=0)
    return Processor.from_pretrained(directory, box_format).encode_prompt(scene.image, f"Locate {scene.expression}.")


def _transformers_logits(directory: Path, dtype: torch.dtype | None, prompt: EncodedPrompt) -> torch.Tensor:
    """Logits [S, V] as transformers computes them."""
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, about = AutoModelForImageTextToText.from_pretrained(directory, local_files_only=True, dtype=torch.float32,
                                                               output_loading_info=True)
    lost = sorted(about["missing_keys"]) + sorted(map(str, about["mismatched_keys"]))
    if lost:
        raise ValueError(f"transformers finds no {lost[0]} in {directory}, {len(lost)} in all")
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype or parameter.dtype))
    ids = torch.tensor([prompt.input_ids])
    return model.eval()(input_ids=ids, pixel_values=prompt.pixel_values,
                        image_grid_thw=torch.tensor(prompt.image_grid_thw),
                        mm_token_type_ids=(ids == model.config.image_token_id).int()).logits[0].float()


def _megavg_logits(model, prompt: EncodedPrompt) -> torch.Tensor:
    """Logits [S, V] of the stage that holds all of a model."""
    import torch

    from megavg.models.base import copy_weights
    from megavg.models.inputs import InputBuilder
    from megavg.parallel.mcore import make_context

    context = make_context(1, 1, torch.device("cpu"))
    stage = model.build_stage(context, torch.float32)
    copy_weights(stage, model.hf_weights(stage, context))
    builder = InputBuilder(model.config.image_token_id, 0, model.config.vision_config.spatial_merge_size,
                           prompt.pixel_values.shape[1], torch.float32, context.device)
    inputs = builder.build([prompt], [0], [[]])
    x, deepstack = stage.embed(inputs.input_ids, inputs.pixel_values, inputs.image_grid_thw, inputs.feature_index)
    hidden = stage.decode(x, inputs.position_ids, deepstack=deepstack)
    return stage.head.local_logits(hidden.flatten(0, 1))[:, :model.dims.vocab_size].float()
