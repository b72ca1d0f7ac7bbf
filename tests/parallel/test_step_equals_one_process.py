"""Optimiser steps in any layout equal those of one process that trains transformers' model with torch's AdamW."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from megavg.protocols.options import StageOptions, ZeroConfig
from tests.distributed import run_ranks
from tests.tiny_models import sharpened
from tools.check_layouts import FIGURES
from tools.layouts import read_layout

pytestmark = pytest.mark.slow

# 5 layers and 515 tokens divide by no size below; there are 2 key-value heads; deepstack enters the first 2 layers
SIZES = {"num_layers": 5, "vision_depth": 2}
SEEN = 1e-4
"""A fault changes the figure that must show it by more than this; without one all figures stay below 1e-5."""


class Case(NamedTuple):
    """A layout of a model, with options that must not change what it computes."""

    layout: str
    family: str
    tied: bool = False
    options: StageOptions = StageOptions()
    zero: ZeroConfig = ZeroConfig()

    def __str__(self) -> str:
        names = [name for name in ("recompute", "freeze_vision_tower", "freeze_projector")
                 if getattr(self.options, name)]
        names += [name for name in ("param_persistence_threshold", "keep_gathered") if getattr(self.zero, name)]
        return "-".join([self.layout, self.family, *(["tied"] if self.tied else []), *names])


RECOMPUTE, FROZEN = StageOptions(recompute=True), StageOptions(freeze_vision_tower=True)
BOTH = StageOptions(recompute=True, freeze_vision_tower=True)
PROJECTOR = StageOptions(freeze_projector=True)
ALL_VISION = StageOptions(freeze_vision_tower=True, freeze_projector=True)
WHOLE, KEPT = ZeroConfig(param_persistence_threshold=100_000), ZeroConfig(keep_gathered=True)
CASES = [
    Case("tp2dp2", "qwen2_vl"),
    Case("tp2dp2", "qwen2_5_vl", True, BOTH),
    Case("tp2dp2", "qwen3_vl", False, RECOMPUTE, WHOLE),
    Case("tp2dp2", "qwen3_vl", True, PROJECTOR),
    Case("tp4", "qwen2_5_vl"),
    Case("pp2dp2", "qwen2_vl", True, FROZEN),
    Case("pp2dp2", "qwen2_5_vl", True, ALL_VISION),
    Case("pp2dp2", "qwen2_5_vl", False, RECOMPUTE, KEPT),
    Case("pp2dp2", "qwen3_vl", True),
    Case("tp2pp2", "qwen2_vl", False, RECOMPUTE),
    Case("tp2pp2", "qwen2_5_vl", True, FROZEN, WHOLE),
    Case("tp2pp2", "qwen3_vl"),
    Case("pp4", "qwen3_vl", True, RECOMPUTE),
]
# fault -> the case in which it is made, the figure that must show it
FAULTS = {
    "query norms not summed over ranks": (Case("tp2dp2", "qwen3_vl"), "gradients"),
    "shards not marked": (Case("tp2dp2", "qwen3_vl"), "norm"),
    "sums over ranks summed again in the backward": (Case("tp2dp2", "qwen3_vl"), "gradients"),
    "replicated parameters not marked": (Case("pp2dp2", "qwen3_vl"), "norm"),
    "tied gradients not summed": (Case("pp2dp2", "qwen3_vl", True), "gradients"),
    "copies of key-value heads not summed": (Case("tp4", "qwen2_5_vl"), "gradients"),
}
LOST = "a second backward is lost"


@pytest.fixture(scope="module")
def reference(checkpoints, tmp_path_factory):
    """``reference(case)`` -> (checkpoint with noise on its weights, file with what one process gets from it)."""
    from tools.layout_gate import run_reference

    folder, made = tmp_path_factory.mktemp("one_process"), {}

    def make(case: Case) -> tuple[str, str]:
        directory = str(sharpened(checkpoints(case.family, tie_embeddings=case.tied, **SIZES)))
        frozen = case.options.freeze_vision_tower, case.options.freeze_projector
        if (directory, frozen) not in made:
            made[directory, frozen] = str(folder / f"{len(made)}.pt")
            torch.save(run_reference(directory, torch.device("cpu"), torch.float32, *frozen), made[directory, frozen])
        return directory, made[directory, frozen]

    return make


@pytest.fixture(scope="module")
def measured(reference):
    """Differences by case and by fault."""
    jobs: dict = {case: (case, None, reference(case)) for case in CASES}
    jobs |= {fault: (case, fault, reference(case)) for fault, (case, _) in FAULTS.items()}
    return _run(4, jobs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_three_clipped_steps_equal_one_process(measured, case):
    found = measured[case]
    assert {key: found[key] for key in FIGURES if not found[key] <= 1e-5} == {}, found


def test_clipping_is_active_in_every_step(reference):
    for case in CASES:
        expected = torch.load(reference(case)[1], mmap=True)
        assert min(expected["norms"]) > expected["clip"]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_sees_faults(measured, fault):
    assert measured[fault][FAULTS[fault][1]] > SEEN


def test_the_comparison_sees_a_lost_backward(reference):
    case = Case("pp2", "qwen2_5_vl")
    try:
        found = _run(2, {LOST: (case, LOST, reference(case))})[LOST]
    except AssertionError as error:  # DeepSpeed noticed
        assert "deepspeed/runtime/zero" in str(error)
    else:
        assert found["gradients"] > SEEN


def test_a_tensor_that_nobody_compares_is_an_error():
    from tools.layout_gate import _merge

    rank = {"logprobs": 0.0, "entropy": 0.0, "loss": 0.0, "norm": 0.0, "gradients": 0.0, "worst_gradient": "a",
            "weights": 0.0, "worst_weight": "a", "gradient names": {"a"}, "weight names": {"a"}}
    reference = {"gradients": {"a": torch.zeros(1)}, "weights": {"a": torch.zeros(1), "b": torch.zeros(1)}}
    with pytest.raises(RuntimeError, match="no rank compared the weights of b and 1 tensors"):
        _merge([rank, rank], reference)
    assert _merge([rank, rank | {"weight names": {"b"}, "norm": 1.0}], reference)["norm"] == 1.0


def _run(world: int, jobs: dict) -> dict:
    """Differences by key of ``jobs``; every rank knows those of all."""
    keys = sorted(jobs, key=lambda key: read_layout(jobs[key][0].layout).pp)  # an order that ``measure`` asks for
    return dict(zip(keys, run_ranks(world, _measure_all, [jobs[key] for key in keys], timeout=600)[0], strict=True))


def _measure_all(jobs: list[tuple[Case, str | None, tuple[str, str]]]) -> list[dict]:
    from megavg.parallel.mcore import make_context
    from tools import layout_gate

    found = []
    for case, fault, (directory, reference_file) in jobs:
        layout = read_layout(case.layout)
        context = make_context(layout.tp, layout.pp, torch.device("cpu"))
        expected = torch.load(reference_file, mmap=True)
        with pytest.MonkeyPatch.context() as patch:
            if fault is not None:
                _break(fault, context, patch)
                patch.setattr(layout_gate, "ROWS_OF_STEP", (2,))  # one step shows it
                expected["learning_rates"] = expected["learning_rates"][:1]
            found.append(layout_gate.measure(directory, expected, context, options=case.options, zero=case.zero))
    return found


def _break(fault: str, context, patch: pytest.MonkeyPatch) -> None:
    """Take one of the measures away that make layouts equal."""
    import megatron.core.tensor_parallel.layers as megatron_layers
    import torch.distributed.nn.functional as differentiable

    from megavg.models.layers import language_model
    from megavg.parallel import zero

    if fault == "sums over ranks summed again in the backward":
        patch.setattr(megatron_layers, "reduce_from_tensor_model_parallel_region",
                      lambda x, group=None: differentiable.all_reduce(x, group=context.tp_group))
    elif fault == "tied gradients not summed":
        patch.setattr(zero, "sum_tied_gradient", lambda parameter: None)
    elif fault == "copies of key-value heads not summed":
        patch.setattr(language_model, "summed_over_copies", lambda weight, *where: weight)
    elif fault == LOST:
        patch.setattr(zero, "forget_backward", lambda engine: None)
    else:
        _change_stages(patch, {"query norms not summed over ranks": _forget_parts,
                               "shards not marked": _without_mark("tensor_model_parallel"),
                               "replicated parameters not marked": _without_mark("model_parallel")}[fault])


def _change_stages(patch: pytest.MonkeyPatch, change) -> None:
    from megavg.models.base import Model

    build = Model.build_stage

    def changed(*args):
        stage = build(*args)
        change(stage)
        return stage

    patch.setattr(Model, "build_stage", changed)


def _forget_parts(stage) -> None:
    norms = [module for module in stage.modules() if getattr(module, "sees_part", False)]
    assert norms
    for norm in norms:
        norm.sees_part = False


def _without_mark(mark: str):
    def change(stage) -> None:
        marked = [parameter for parameter in stage.parameters() if hasattr(parameter, mark)]
        assert marked
        for parameter in marked:
            delattr(parameter, mark)

    return change
