"""Options of ZeRO-3 that move memory or traffic change nothing else: losses, norms and weights of two steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import run_ranks
from tests.tiny_models import builder_of, encode_pictures, loaded_stage, processor_of, random_answers, sharpened

SMALL = {"vision_depth": 2, "num_layers": 4}
KEPT = {"keep_gathered": True}
NO_PREFETCH = {"prefetch_bucket_size": 0}
OFFLOADED = {"offload_optimizer": True}
CASES = {  # (tensor, pipeline) -> options that must equal the plain ones there
    (1, 1): (KEPT, OFFLOADED, {"offload_optimizer": True, "offload_parameters": True}),
    (1, 2): (KEPT, OFFLOADED, NO_PREFETCH),
}
PROMPT_OF_ROW, LENGTHS = [0, 2, 1, 3], [5, 9, 4, 7]


@pytest.fixture(scope="module")
def measured(checkpoints):
    return run_ranks(2, _measure, str(sharpened(checkpoints("qwen3_vl", **SMALL))))


@pytest.mark.parametrize("sizes, options", [(sizes, options) for sizes, several in CASES.items() for options in several],
                         ids=str)
def test_same_steps(measured, sizes, options):
    for found in measured:
        plain, other = found[sizes, ()], found[sizes, tuple(options.items())]
        assert plain["losses"][1] != plain["losses"][0]
        assert other["losses"] == pytest.approx(plain["losses"], rel=1e-6)
        assert other["norms"] == pytest.approx(plain["norms"], rel=1e-6)
        for name, weight in plain["weights"].items():
            torch.testing.assert_close(other["weights"][name], weight, atol=1e-7, rtol=1e-6)


def test_weights_are_whole_only_during_a_step_that_keeps_them(measured):
    """Looked at where the loss is computed: on the last stage, which has done its forward."""
    last_stage = measured[1]
    assert last_stage[(1, 2), tuple(NO_PREFETCH.items())]["whole in loss"] < 1.0
    for sizes in CASES:
        kept = last_stage[sizes, tuple(KEPT.items())]
        assert kept["whole in loss"] == 1.0 and kept["whole after"] == 0.0


def _measure(folder: str) -> dict:
    from megavg.parallel.mcore import make_context

    found = {}
    for sizes, several in CASES.items():
        context = make_context(*sizes, torch.device("cpu"))
        for options in ({}, *several):
            found[sizes, tuple(options.items())] = _two_steps(Path(folder), context, options)
    return found


def _two_steps(folder: Path, context, options: dict) -> dict:
    from megavg.parallel.engine import ZeroEngine
    from megavg.protocols.options import OptimizerConfig, ZeroConfig

    model, stage = loaded_stage(folder, context)
    engine = ZeroEngine(stage, context, torch.float32, ZeroConfig(**options),
                        OptimizerConfig(eps=1e-3, gradient_clipping=0.5))
    processor = processor_of(folder, model)
    builder, prompts = builder_of(model, processor, context), encode_pictures(processor)
    answers = random_answers(processor, LENGTHS)
    rows = range(context.dp_rank, len(LENGTHS), context.dp_size)
    shares: list[float] = []

    def loss(i: int, logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        shares.append(_whole(stage))
        return (-logprobs.sum() - 0.3 * entropy.sum()) / sum(LENGTHS)

    losses, norms = [], []
    for _ in range(2):
        losses.append(engine.forward_backward(
            len(rows), lambda i: builder.build([prompts[PROMPT_OF_ROW[rows[i]]]], [0], [answers[rows[i]]]), loss))
        norms.append(engine.step(1e-2))
    weights = {name: tensor.clone() for name, tensor in engine.weights()}
    return {"losses": losses, "norms": norms, "weights": weights, "whole in loss": min(shares, default=None),
            "whole after": _whole(stage)}


def _whole(stage) -> float:
    """Share of the stage's parameters that are gathered on this rank."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    states = [parameter.ds_status == ZeroParamStatus.AVAILABLE for parameter in stage.parameters()]
    return sum(states) / len(states)
