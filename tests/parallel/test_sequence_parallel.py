"""Sequence parallelism gives the scores and gradients of plain tensor parallelism.

megatron-core's mappings ask CUDA for a device, and for nothing else that is CUDA's: told the CPU, they run on gloo. So
the project's part of sequence parallelism is tested here; on a GPU it has not been run yet.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import run_ranks
from tests.tiny_models import builder_of, encode_pictures, processor_of, random_answers, sharpened

# copies of key-value heads; deepstack
CASES = {"qwen2_5_vl": {"num_kv_heads": 1}, "qwen3_vl": {"num_layers": 4, "vision_depth": 2}}
PROMPT_OF_ROW, LENGTHS = [0, 2, 1], [5, 8, 4]


@pytest.fixture(scope="module")
def measured(checkpoints):
    folders = {family: str(sharpened(checkpoints(family, **fields))) for family, fields in CASES.items()}
    return run_ranks(2, _measure, folders)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", CASES)
def test_equals_tensor_parallelism(measured, family, recompute):
    for figures in measured:
        found = figures[family, recompute]
        assert found["num_tokens"] % 2, "the tokens must not divide by the ranks, so that padding is seen"
        assert found["scores"] <= 1e-5
        assert found["gradients"] <= 1e-5


def _measure(folders: dict[str, str]) -> dict:
    from megavg.models import base
    from megavg.parallel.mcore import make_context

    context = make_context(2, 1, torch.device("cpu"))
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
        patch.setattr(base, "check_sequence_parallel", lambda context: None)
        for family, folder in folders.items():
            plain = _scores_and_gradients(Path(folder), context, sequence_parallel=False, recompute=False)
            for recompute in (False, True):
                split = _scores_and_gradients(Path(folder), context, sequence_parallel=True, recompute=recompute)
                found[family, recompute] = {
                    "num_tokens": split[0],
                    "scores": max(float((a - b).abs().max()) for a, b in zip(plain[1], split[1])),
                    "gradients": max(_relative(g, plain[2][name]) for name, g in split[2].items())}
    return found


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-3))


def _scores_and_gradients(folder: Path, context, **options):
    from megavg.models.base import copy_weights, load_model
    from megavg.protocols.options import StageOptions

    model = load_model(folder, StageOptions(**options))
    stage = model.build_stage(context, torch.float32)
    copy_weights(stage, model.hf_weights(stage, context))
    processor = processor_of(folder, model)
    inputs = builder_of(model, processor, context).build(
        encode_pictures(processor), PROMPT_OF_ROW, random_answers(processor, LENGTHS))
    logprobs, entropy = stage(**inputs.as_kwargs(), temperature=0.7)
    (logprobs.sum() + 0.3 * entropy.square().sum()).backward()
    gradients = {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}
    return inputs.input_ids.numel(), (logprobs.detach(), entropy.detach()), gradients
