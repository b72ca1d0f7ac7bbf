"""Scores of answers on clean and on perturbed images in one pass, against float64 from transformers' logits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.distributed import run_ranks
from tests.tiny_models import (builder_of, encode_pictures, hf_logits, hf_model, processor_of, random_answers,
                               sharpened)

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FIELDS = {"vision_depth": 2, "num_layers": 5}  # the deepstack enters the first 2 layers
WORLD = 4
LAYOUTS = {"TP1 (DP4)": (1, 1), "TP2 x DP2": (2, 1), "PP2 x DP2": (1, 2), "TP2 x PP2": (2, 2)}
NAMES = "log P", "H(P)", "log Q", "H(Q)", "JSD", "KL"
BOUNDS = dict(zip(NAMES, (1e-5, 1e-5, 1e-5, 1e-5, 2e-6, 1e-5)))  # nats
PROMPT_OF_ROW, LENGTHS = (0, 0, 2, 1, 3), (5, 1, 9, 4, 12)
PARTS = (range(0, 3), range(3, 4), range(4, 5))
"""Rows of each micro-batch; the first packs three of two images, twice."""
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def folders(checkpoints):
    return {family: sharpened(checkpoints(family, **FIELDS)) for family in FAMILIES}


@pytest.fixture(scope="module")
def expected(folders):
    return {family: _by_transformers(folder) for family, folder in folders.items()}


@pytest.fixture(scope="module")
def measured(folders):
    """What every rank found, by (family, layout)."""
    ranks = run_ranks(WORLD, _measure_all, {family: str(folder) for family, folder in folders.items()}, timeout=400)
    return {key: [rank[key] for rank in ranks] for key in ranks[0] if key != "refusal"} | {
        "refusal": [rank["refusal"] for rank in ranks]}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(measured, expected, family, layout):
    for rank in measured[family, layout]:
        for part, theirs in zip(rank["pairs"], expected[family], strict=True):
            assert [ours.dtype for ours in part] == [torch.float32] * 6
            errors = {name: float((ours.double() - exact).abs().max())
                      for name, ours, exact in zip(NAMES, part, theirs, strict=True)}
            assert {name: error for name, error in errors.items() if error > BOUNDS[name]} == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_half_are_the_scores_of_the_clean_images(measured, family):
    for rank in (rank for layout in LAYOUTS for rank in measured[family, layout]):
        for (logprobs, entropy, *_), (alone, entropy_alone) in zip(rank["pairs"], rank["scores"], strict=True):
            torch.testing.assert_close(logprobs, alone, atol=1e-5, rtol=0)
            torch.testing.assert_close(entropy, entropy_alone, atol=1e-5, rtol=0)


def test_the_images_matter(expected):
    for parts in expected.values():
        apart = torch.cat([part[4] for part in parts])
        assert float(apart.min()) > 0 and float(apart.mean()) > 1e-3
        assert float((torch.cat([part[5] for part in parts]) - 4 * apart).abs().max()) > 1e-4, "KL must not be JSD's"


def test_other_answers_on_the_perturbed_images_are_refused(measured):
    assert all("must have the answers of those on clean ones" in refusal for refusal in measured["refusal"])


def _examples(processor):
    """(clean prompts, perturbed prompts, answers)."""
    clean = encode_pictures(processor)
    generator = torch.Generator().manual_seed(4)
    perturbed = [dataclasses.replace(prompt, pixel_values=0.5 * prompt.pixel_values + 0.5 * torch.randn(
        prompt.pixel_values.shape, generator=generator)) for prompt in clean]
    return clean, perturbed, random_answers(processor, LENGTHS)


@torch.no_grad()
def _by_transformers(folder: Path) -> list[tuple[torch.Tensor, ...]]:
    """The six scores of each micro-batch, from the formulas."""
    from megavg.models.base import load_model

    model = hf_model(folder, torch.float64)
    clean, perturbed, answers = _examples(processor_of(folder, load_model(folder)))

    def log_softmax(prompts, row: int) -> torch.Tensor:
        prompt = prompts[PROMPT_OF_ROW[row]]
        logits = hf_logits(model, prompt, answers[row])[len(prompt.input_ids) - 1:-1].double()
        return (logits / TEMPERATURE).log_softmax(-1)

    found = []
    for rows in PARTS:
        p, q = (torch.cat([log_softmax(prompts, row) for row in rows]) for prompts in (clean, perturbed))
        targets = torch.tensor([token for row in rows for token in answers[row]])[:, None]
        m = ((p.exp() + q.exp()) / 2).log()
        jsd = ((p.exp() * (p - m)).sum(1) + (q.exp() * (q - m)).sum(1)) / 2
        found.append((p.gather(1, targets)[:, 0], -(p.exp() * p).sum(1), q.gather(1, targets)[:, 0],
                      -(q.exp() * q).sum(1), jsd, (p.exp() * (p - q)).sum(1)))
    return found


def _measure_all(folders: dict[str, str]) -> dict:
    from megavg.parallel.mcore import make_context

    found: dict = {}
    for layout, sizes in LAYOUTS.items():
        context = make_context(*sizes, torch.device("cpu"))
        for family, folder in folders.items():
            found[family, layout], refusal = _measure(Path(folder), context)
        if layout == "TP1 (DP4)":
            found["refusal"] = refusal()
    return found


def _measure(folder: Path, context):
    from megavg.models.base import load_model
    from megavg.rollout.native import NativeGenerator

    model = load_model(folder)
    processor = processor_of(folder, model)
    builder = builder_of(model, processor, context)
    builder.with_images = context.is_first_stage
    generator = NativeGenerator(model, builder, context, torch.float32, processor.end_token_ids,
                                processor.forbidden_token_ids)
    generator.load_weights(model.hf_weights(generator.stage, context))
    clean, perturbed, answers = _examples(processor)

    def build(i: int, paired: bool, last: list[int] | None = None):
        rows = [PROMPT_OF_ROW[row] for row in PARTS[i]]
        chosen = [answers[row] for row in PARTS[i]]
        if not paired:
            return builder.build(clean, rows, chosen)
        others = [*chosen[:-1], last or chosen[-1]]
        return builder.build([*clean, *perturbed], [*rows, *(len(clean) + p for p in rows)], [*chosen, *others])

    counts = [sum(LENGTHS[row] for row in rows) for rows in PARTS]
    found = {"pairs": generator.score_pairs(counts, lambda i: build(i, True), TEMPERATURE),
             "scores": generator.score(counts, lambda i: build(i, False), TEMPERATURE)}

    def refusal() -> str:
        with pytest.raises(ValueError) as error:
            other = [answers[PARTS[0][-1]][0] + 1, *answers[PARTS[0][-1]][1:]]
            generator.score_pairs(counts[:1], lambda i: build(i, True, other), TEMPERATURE)
        return str(error.value)

    return found, refusal
