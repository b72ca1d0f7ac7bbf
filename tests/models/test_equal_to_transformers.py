"""The tensor-parallel stages compute what transformers' models compute: logits, log-probs and entropies."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks
from tests.tiny_models import (builder_of, encode_pictures, hf_logits, hf_model, hf_scores, loaded_stage, processor_of,
                               random_answers, sharpened)

# Rows that share an image, rows out of the prompts' order, an answer of one token; 515 tokens do not divide by 2.
PROMPT_OF_ROW, LENGTHS = [0, 0, 2, 1, 3, 1], [5, 1, 9, 4, 12, 3]
TEMPERATURE = 0.7
CASES = {"qwen2_5_vl": {}, "qwen2_5_vl tied": {"tie_embeddings": True}, "qwen3_vl": {},
         "qwen3_vl tied": {"tie_embeddings": True}}


@pytest.fixture(scope="module")
def measured(checkpoints):
    """Largest differences by (case, tensor-parallel size, dtype), as both of two ranks found them."""
    folders = {case: str(sharpened(checkpoints(case.split()[0], **fields))) for case, fields in CASES.items()}
    return run_ranks(2, _measure_all, folders)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_fp32_equals_transformers(measured, case, tp_size):
    for found in measured:
        figures = found[case, tp_size, "float32"]
        assert figures["spread"] > 0.5, "the logits must differ enough for the comparison to mean something"
        assert figures["picture"] > 0.01, "the logits must depend on the picture"
        assert figures["logits"] <= 1e-5
        assert figures["logprobs"] <= 1e-5
        assert figures["entropy"] <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_bf16_is_close_to_transformers_fp32(measured, case):
    figures = measured[0][case, 1, "bfloat16"]
    assert 0 < figures["logprobs"] <= 0.1
    assert figures["entropy"] <= 0.1


def test_all_ranks_get_the_same_bits(measured):
    for key in measured[0]:
        if key[1] == 2:
            assert measured[0][key]["checksum"] == measured[1][key]["checksum"]


def _measure_all(folders: dict[str, str]) -> dict:
    from megavg.parallel.mcore import make_context

    found = {}
    for tp_size in (1, 2):
        context = make_context(tp_size, 1, torch.device("cpu"))
        for case, folder in folders.items():
            for dtype in (torch.float32, torch.bfloat16) if tp_size == 1 else (torch.float32,):
                found[case, tp_size, str(dtype).removeprefix("torch.")] = _differences(Path(folder), context, dtype)
    return found


@torch.no_grad()
def _differences(folder: Path, context, dtype: torch.dtype) -> dict[str, float]:
    model, stage = loaded_stage(folder, context, dtype)
    processor = processor_of(folder, model)
    prompts, answers = encode_pictures(processor), random_answers(processor, LENGTHS)
    inputs = builder_of(model, processor, context, dtype).build(prompts, PROMPT_OF_ROW, answers)
    logprobs, entropy = stage(**inputs.as_kwargs(), temperature=TEMPERATURE)
    logits = _all_logits(stage, inputs, context)[..., :model.dims.vocab_size]

    reference = hf_model(folder)
    negative = dataclasses.replace(prompts[0], pixel_values=-prompts[0].pixel_values)
    rows = list(zip(PROMPT_OF_ROW, answers))
    expected = [hf_logits(reference, prompts[p], answer) for p, answer in rows]
    scores = [hf_scores(reference, prompts[p], answer, TEMPERATURE) for p, answer in rows]
    return {
        "logits": max(float((ours[:len(theirs)] - theirs).abs().max()) for ours, theirs in zip(logits, expected)),
        "logprobs": float((logprobs - torch.cat([s[0] for s in scores])).abs().max()),
        "entropy": float((entropy - torch.cat([s[1] for s in scores])).abs().max()),
        "spread": float(torch.cat(expected).std()),
        "picture": float((hf_logits(reference, negative, answers[0]) - expected[0])[-1].abs().max()),
        "checksum": (logprobs.tolist(), entropy.tolist()),
    }


def _all_logits(stage, inputs, context) -> torch.Tensor:
    """Logits [B, S, padded V] of every position, gathered from the tensor-parallel ranks."""
    x, deepstack = stage.embed(inputs.input_ids, inputs.pixel_values, inputs.image_grid_thw, inputs.feature_index)
    hidden = stage.decode(x, inputs.position_ids, deepstack=deepstack)
    local = stage.head.local_logits(hidden.flatten(0, 1))
    parts = [torch.empty_like(local) for _ in range(context.tp_size)]
    dist.all_gather(parts, local, group=context.tp_group)
    return torch.cat(parts, -1).unflatten(0, hidden.shape[:2])
