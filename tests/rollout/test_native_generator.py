"""The native generator: tokens of transformers' generate, log-probs of the scorer, in every pass size and layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megavg.models.inputs import scatter_rows
from megavg.protocols.options import SamplingParams
from tests.distributed import run_ranks
from tests.tiny_models import builder_of, encode_pictures, hf_images, hf_model, hf_scores, processor_of, sharpened

pytestmark = pytest.mark.slow

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FIELDS = {"vision_depth": 2, "num_layers": 5}  # the deepstack's two additions leave a layer for each of four stages
ONE = "TP1"
WORLDS = {2: {ONE: (1, 1), "TP2": (2, 1), "PP2": (1, 2)}, 4: {"TP4": (4, 1), "TP2 x PP2": (2, 2), "PP4": (1, 4)}}
FOUR_RANKS = "qwen3_vl"  # the family that goes through all layouts: its deepstack is what pipelines may lose
LAYOUTS = {layout: sizes for layouts in WORLDS.values() for layout, sizes in layouts.items()}
NUM_ANSWERS, MAX_NEW_TOKENS = 3, 14
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=MAX_NEW_TOKENS)
TEMPERATURES = (0.7, 1.0)
PASSES = (1, 3)  # prompts_per_pass for the five prompts, beside all at once


@pytest.fixture(scope="module")
def folders(checkpoints):
    return {family: sharpened(checkpoints(family, **FIELDS)) for family in FAMILIES}


@pytest.fixture(scope="module")
def measured(folders):
    """What every rank generated, by (family, layout): a list of ranks."""
    paths, found = {family: str(folder) for family, folder in folders.items()}, {}
    for world, layouts in WORLDS.items():
        chosen = paths if world == 2 else {FOUR_RANKS: paths[FOUR_RANKS]}
        ranks = run_ranks(world, _measure_all, chosen, list(layouts))
        found.update({key: [rank[key] for rank in ranks] for key in ranks[0]})
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_generate(measured, folders, family):
    """Prompts of different lengths and picture sizes in one pass; some answers end early, some are cut."""
    expected = _hf_greedy(folders[family])
    assert len({len(answer) for answer in expected}) > 1
    for layout in _layouts(family):
        for found in measured[family, layout]:
            assert found["greedy"].responses == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_logprobs_equal_the_scorers(measured, family):
    for found in (rank for layout in _layouts(family) for rank in measured[family, layout]):
        for temperature in TEMPERATURES:
            assert found["gap to scorer"][temperature] <= 1e-5
        assert found["gap between micro-batches"] <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_logprobs_equal_transformers(measured, folders, family):
    model = hf_model(folders[family])
    prompts = _prompts(_processor(folders[family]))
    for temperature in TEMPERATURES:
        found = measured[family, "TP2"][0]["sampled"][temperature]
        for b, response in enumerate(found.responses):
            with torch.no_grad():
                theirs, _ = hf_scores(model, prompts[b // NUM_ANSWERS], response, temperature)
            assert float((found.logprobs[b, :len(response)] - theirs).abs().max()) <= 1e-5
            assert not found.logprobs[b, len(response):].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_same_answers_in_every_pass_size_and_layout(measured, family):
    for temperature in TEMPERATURES:
        expected = measured[family, ONE][0]["sampled"][temperature]
        for found in (rank for layout in _layouts(family) for rank in measured[family, layout]):
            for other in [found["sampled"][temperature], *found["passes"][temperature]]:
                assert other.responses == expected.responses
                assert other.truncated == expected.truncated
                torch.testing.assert_close(other.logprobs, expected.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_streams_and_answers_differ(measured, family):
    sampled, other = (measured[family, ONE][0][key] for key in ("sampled", "other streams"))
    rows = sampled[1.0].responses
    assert len({tuple(row) for row in rows}) == len(rows)
    assert all(a != b for a, b in zip(rows, other.responses))


@pytest.mark.parametrize("family", FAMILIES)
def test_end_token_stops_and_limit_truncates(measured, folders, family):
    ends = set(_end_tokens(_processor(folders[family])))
    seen = set()
    for temperature in TEMPERATURES:
        found = measured[family, ONE][0]["sampled"][temperature]
        for response, truncated in zip(found.responses, found.truncated):
            assert not ends & set(response[:-1])
            assert truncated == (response[-1] not in ends)
            assert len(response) == MAX_NEW_TOKENS if truncated else len(response) <= MAX_NEW_TOKENS
            seen.add(truncated)
    assert seen == {True, False}, "both ways to end must occur"


@pytest.mark.parametrize("family", FAMILIES)
def test_forbidden_tokens_are_never_sampled(measured, folders, family):
    """Two forbidden rows of the head point in opposite directions, so one of them always has the largest logit."""
    forbidden = set(_processor(folders[family]).forbidden_token_ids)
    for found in measured[family, ONE][0]["forbidden best"]:
        assert not forbidden & {token for response in found.responses for token in response}
        steps = torch.cat([row[:len(response)] for row, response in zip(found.logprobs, found.responses)])
        assert float(steps.median()) < -5, "the forbidden tokens must hold most of the probability"


def _layouts(family: str) -> list[str]:
    return list(LAYOUTS) if family == FOUR_RANKS else list(WORLDS[2])


def _prompts(processor) -> list:
    """Four pictures and a question without one; an odd number, which stages cannot share evenly."""
    return [*encode_pictures(processor), processor.encode_prompt([], "which way is up?")]


def _processor(folder: Path):
    from megavg.models.base import load_model

    return processor_of(folder, load_model(folder))


def _end_tokens(processor) -> list[int]:
    """The family's end tokens and every 16th ordinary one: a random model would hardly ever stop by itself."""
    return sorted({*processor.end_token_ids, *range(0, processor.vocab_size, 16)} - set(processor.forbidden_token_ids))


@torch.no_grad()
def _hf_greedy(folder: Path) -> list[list[int]]:
    model, processor = hf_model(folder), _processor(folder)
    answers = []
    for prompt in _prompts(processor):
        ids = torch.tensor([prompt.input_ids])
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **hf_images(prompt),
            mm_token_type_ids=(ids == processor.image_token_id).int(), do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS, suppress_tokens=list(processor.forbidden_token_ids),
            eos_token_id=_end_tokens(processor), pad_token_id=processor.pad_token_id)
        answers.append(output[0, ids.shape[1]:].tolist())
    return answers


def _measure_all(folders: dict[str, str], layouts: list[str]) -> dict:
    from megavg.parallel.mcore import make_context

    found = {}
    for layout in layouts:
        context = make_context(*LAYOUTS[layout], torch.device("cpu"))
        for family, folder in folders.items():
            found[family, layout] = _measure(Path(folder), context)
    return found


def _measure(folder: Path, context) -> dict:
    from megavg.models.base import load_model
    from megavg.rollout.native import NativeGenerator

    model = load_model(folder)
    processor = processor_of(folder, model)
    generator = NativeGenerator(model, builder_of(model, processor, context), context, torch.float32,
                                _end_tokens(processor), processor.forbidden_token_ids)
    generator.load_weights(model.hf_weights(generator.stage, context))
    prompts = _prompts(processor)
    streams = [f"stream {p}" for p in range(len(prompts))]
    found = {"greedy": generator.generate(prompts, 1, GREEDY, streams), "sampled": {}, "passes": {},
             "gap to scorer": {}}
    for temperature in TEMPERATURES:
        params = SamplingParams(temperature=temperature, max_new_tokens=MAX_NEW_TOKENS)
        sampled = found["sampled"][temperature] = generator.generate(prompts, NUM_ANSWERS, params, streams)
        # every size in one layout, an uneven one in the others: processes that share cores take turns
        sizes = PASSES if context.tp_size * context.pp_size == 1 else PASSES[1:2]
        found["passes"][temperature] = [_in_passes(generator, size, prompts, params, streams) for size in sizes]
        found["gap to scorer"][temperature] = _gap_to_scorer(generator, prompts, sampled, temperature)
    found["gap between micro-batches"] = _gap_between_micro_batches(generator, prompts, sampled, temperature)
    found["other streams"] = generator.generate(prompts, NUM_ANSWERS, params, [f"other {s}" for s in streams])
    found["forbidden best"] = _with_forbidden_best(generator, processor, prompts, [GREEDY, params], streams)
    return found


def _in_passes(generator, size: int, prompts, params, streams):
    generator.prompts_per_pass, before = size, generator.prompts_per_pass
    try:
        return generator.generate(prompts, NUM_ANSWERS, params, streams)
    finally:
        generator.prompts_per_pass = before


def _gap_to_scorer(generator, prompts, sampled, temperature: float) -> float:
    """Largest difference of the log-probs of sampling and of the scorer."""
    together = _scores(generator, prompts, sampled, temperature, [list(range(len(sampled.responses)))])
    return float((together - sampled.logprobs).abs().max())


def _gap_between_micro_batches(generator, prompts, sampled, temperature: float) -> float:
    """Largest difference of the scorer's log-probs of all rows at once and one row at a time."""
    rows = range(len(sampled.responses))
    together, alone = (_scores(generator, prompts, sampled, temperature, parts)
                       for parts in ([list(rows)], [[b] for b in rows]))
    return float((together - alone).abs().max())


def _scores(generator, prompts, sampled, temperature: float, rows: list[list[int]]) -> torch.Tensor:
    """Log-probs [B, T] of the sampled answers, ``rows`` a micro-batch each."""
    lengths = [len(response) for response in sampled.responses]
    parts = generator.score(
        [sum(lengths[b] for b in part) for part in rows],
        lambda i: generator.builder.build(prompts, [b // NUM_ANSWERS for b in rows[i]],
                                          [sampled.responses[b] for b in rows[i]]), temperature)
    return scatter_rows(torch.cat([logprobs for logprobs, _ in parts]), lengths, sampled.logprobs.shape[1])


def _with_forbidden_best(generator, processor, prompts, all_params, streams) -> list:
    if generator.context.tp_size * generator.context.pp_size > 1:
        return []
    weight, (first, second) = generator.stage.head.weight, processor.forbidden_token_ids[:2]
    weight[first] = 100 * weight[0]
    weight[second] = -weight[first]
    return [generator.generate(prompts, NUM_ANSWERS, params, streams) for params in all_params]
