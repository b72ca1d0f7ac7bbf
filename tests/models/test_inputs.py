"""Rows laid end to end give what rows alone give: with one image, several, none, and mixtures of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests.distributed import run_ranks
from tests.tiny_models import (builder_of, encode_pictures, hf_model, hf_scores, loaded_stage, processor_of,
                               random_answers, sharpened)

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
LENGTHS = [5, 1, 9, 4, 12, 3]
MIXTURES = {"images": [0, 0, 2, 1, 3, 1], "text and images": [0, 4, 5, 4, 2, 5], "text alone": [4, 4, 4, 4, 4, 4]}


@pytest.fixture(scope="module")
def measured(checkpoints):
    return run_ranks(1, _measure_all, {family: str(sharpened(checkpoints(family))) for family in FAMILIES})[0]


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_padded_rows_equal_transformers(measured, family, mixture):
    assert measured[family, mixture]["packed"] <= 1e-5
    assert measured[family, mixture]["padded"] <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_hold_no_padding(measured, family):
    for mixture in MIXTURES:
        found = measured[family, mixture]
        assert found["packed shape"] == (1, found["num_tokens"])
        assert found["padded shape"][0] == len(LENGTHS)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone_reaches_every_vision_parameter_with_zero_gradient(measured, family):
    """ZeRO-3's collectives must be the same on a rank whose micro-batch has no image."""
    gradients = measured[family, "text alone"]["vision gradients"]
    assert gradients and all(value == 0.0 for value in gradients.values())


def _measure_all(folders: dict[str, str]) -> dict:
    from megavg.parallel.mcore import make_context

    context = make_context(1, 1, torch.device("cpu"))
    return {(family, name): _measure(folder, rows, context)
            for family, folder in folders.items() for name, rows in MIXTURES.items()}


def _measure(folder: str, prompt_of_row: list[int], context) -> dict:
    from pathlib import Path

    model, stage = loaded_stage(Path(folder), context)
    processor = processor_of(Path(folder), model)
    noise = [Image.fromarray(np.random.default_rng(9 + i).integers(0, 256, (64, 60 + 30 * i, 3), dtype=np.uint8))
             for i in range(2)]
    prompts = [*encode_pictures(processor), processor.encode_prompt([], "what colour is the sky?"),
               processor.encode_prompt(noise, "the ball of the first picture")]
    answers = random_answers(processor, LENGTHS)
    used = sorted(set(prompt_of_row))
    chosen, rows = [prompts[p] for p in used], [used.index(p) for p in prompt_of_row]
    builder, reference = builder_of(model, processor, context), hf_model(Path(folder))
    with torch.no_grad():
        expected = [torch.cat(part) for part in zip(*(hf_scores(reference, prompts[p], answer, 0.7)
                                                      for p, answer in zip(prompt_of_row, answers)))]
    found = {"num_tokens": sum(len(prompts[p].input_ids) + n for p, n in zip(prompt_of_row, LENGTHS))}
    for name in ("packed", "padded"):
        inputs = builder.build(chosen, rows, answers, packed=name == "packed")
        scores = stage(**inputs.as_kwargs(), temperature=0.7)
        found[name] = max(float((ours - theirs).detach().abs().max()) for ours, theirs in zip(scores, expected))
        found[f"{name} shape"] = tuple(inputs.input_ids.shape)
        sum(values.sum() for values in scores).backward()
    found["vision gradients"] = {name: None if p.grad is None else float(p.grad.abs().max())
                                 for name, p in stage.visual.named_parameters()}
    return found
