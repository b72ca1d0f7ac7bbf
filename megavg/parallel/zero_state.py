"""What a rank holds of a model under ZeRO-3: flat runs of parameters and of their optimiser state, as views."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Iterator

import torch
from torch import nn

from megavg.parallel.context import ParallelContext

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of each parameter, as torch, DeepSpeed and apex all name it."""


@dataclass(frozen=True)
class LocalState:
    """This rank's run of one parameter.

    Attributes:
        name: of the parameter in its stage.
        shape: of the whole tensor-parallel shard.
        start: of the run in the flat shard.
        values: "weights" (the fp32 master copy of a trained parameter, the parameter itself of a frozen one) and, of a
            trained parameter, ``MOMENTS`` -> a view [n] without the padding that makes ranks equally long.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: dict[str, torch.Tensor]


def local_states(module: nn.Module, optimizer, context: ParallelContext) -> Iterator[LocalState]:
    """Every parameter of a stage; a rank whose run of a small one is all padding leaves it out."""
    for name, parameter in module.named_parameters():
        size = parameter.ds_tensor.ds_numel
        start = context.dp_rank * size
        length = min(size, math.prod(parameter.ds_shape) - start)
        if length > 0:
            values = {kind: run[:length] for kind, run in _runs(parameter, optimizer)}
            yield LocalState(name, tuple(parameter.ds_shape), start, values)


def _runs(parameter: nn.Parameter, optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    if not parameter.requires_grad:
        yield "weights", parameter.ds_tensor.detach().view(-1)
        return
    yield "weights", _run(parameter, optimizer, None)
    for kind in MOMENTS:
        yield kind, _run(parameter, optimizer, kind)


def _run(parameter: nn.Parameter, optimizer, kind: str | None) -> torch.Tensor:
    """A trained parameter's run of the fp32 master weights (None) or of a moment, padding included."""
    _make_moments(optimizer)
    return optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=kind)[0]


def _make_moments(optimizer) -> None:
    """Make the moments as the first step would make them: AdamW has none before."""
    for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        state = optimizer.optimizer.state[flat]
        if "exp_avg" not in state:
            _set_steps(optimizer, number, 0)
            state.update({kind: torch.zeros_like(flat) for kind in MOMENTS})


def optimizer_steps(optimizer) -> int:
    """Updates that the moments have seen."""
    _make_moments(optimizer)
    state = optimizer.optimizer.state[optimizer.fp32_partitioned_groups_flat[0]]
    return int(_group(optimizer, 0).get("step", 0) if _is_apex(optimizer) else state["step"])


def _set_steps(optimizer, number: int, steps: int) -> None:
    """Set the count of updates where the optimiser keeps it."""
    flat = optimizer.fp32_partitioned_groups_flat[number]
    if isinstance(optimizer.optimizer, torch.optim.AdamW):
        device = flat.device if _group(optimizer, number).get("fused") else "cpu"
        optimizer.optimizer.state[flat]["step"] = torch.tensor(float(steps), device=device)
    elif _is_apex(optimizer):
        _group(optimizer, number)["step"] = steps
    else:
        optimizer.optimizer.state[flat]["step"] = steps


def _is_apex(optimizer) -> bool:
    return type(optimizer.optimizer).__module__.startswith("apex.")


def _group(optimizer, number: int) -> dict:
    return optimizer.optimizer.param_groups[optimizer.sub_group_to_group_id[number]]


@contextlib.contextmanager
def loading(module: nn.Module, optimizer, context: ParallelContext,
            steps: int) -> Iterator[Iterator[LocalState]]:
    """Views to be filled within the block; afterwards the parameters hold what their master copies say."""
    optimizer.checkpoint_event_prologue()  # releases what is gathered
    yield local_states(module, optimizer, context)
    for number in range(len(optimizer.fp32_partitioned_groups_flat)):
        _set_steps(optimizer, number, steps)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.ds_tensor.view(-1).copy_(_run(parameter, optimizer, None))
    optimizer.checkpoint_event_epilogue()  # gathers the small parameters that are kept whole
