"""Optimiser steps in any layout equal those of one process that trains transformers' model with torch's AdamW."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megavg.models.base import load_model
from tests.distributed import run_ranks
from tests.tiny_models import (builder_of, encode_pictures, hf_model, hf_scores, loaded_stage, processor_of,
                               random_answers, sharpened)

PROMPT_OF_ROW, LENGTHS = [0, 0, 2, 1, 3, 1, 1, 0], [5, 1, 9, 4, 12, 3, 2, 7]
TEMPERATURE, ENTROPY_COEFFICIENT, CLIP = 0.7, 0.3, 0.5
LEARNING_RATES = (1e-2, 4e-3)
# With AdamW's usual eps the first step is the sign of the gradient: a factor on it would not be seen, while the noise
# of vanishing entries would. This eps is as large as the gradients, so a step answers to their size.
ADAMW = {"betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.1}
MODES = [(1, 0), (3, 100_000)]  # rows of a micro-batch, param_persistence_threshold: partition all, keep all whole

UNTIED, TIED = {}, {"tie_embeddings": True}
TWO_STAGES = {"vision_depth": 2, "num_layers": 4}  # the deepstack's two additions fit on the first of two stages
LAYOUTS = {"TP2 x DP2": (2, 1), "TP1 x DP2": (1, 1), "PP2": (1, 2)}  # tensor, pipeline
WORLDS = {4: ("TP2 x DP2",), 2: ("TP1 x DP2", "PP2")}
CASES = {
    ("TP2 x DP2", "qwen2_5_vl"): TIED, ("TP2 x DP2", "qwen3_vl"): UNTIED,
    ("TP1 x DP2", "qwen2_5_vl"): UNTIED, ("TP1 x DP2", "qwen3_vl"): TIED,
    ("PP2", "qwen2_5_vl"): UNTIED, ("PP2", "qwen3_vl"): TWO_STAGES,
}
# fault -> the layout it is made in, the figure that must show it
FAULTS = {"query norms not summed over ranks": ((2, 1), "weights"), "shards not marked": ((2, 1), "norm"),
          "replicated parameters not marked": ((1, 2), "norm")}


@pytest.fixture(scope="module")
def reference(checkpoints, tmp_path_factory):
    """``reference(family, fields)`` -> (sharpened checkpoint, file with what one process gets from it)."""
    folder, made = tmp_path_factory.mktemp("one_process"), {}

    def make(family: str, fields: dict) -> tuple[str, str]:
        directory = sharpened(checkpoints(family, **fields))
        if directory not in made:
            made[directory] = folder / f"{len(made)}.pt"
            torch.save(_one_process(directory), made[directory])
        return str(directory), str(made[directory])

    return make


@pytest.fixture(scope="module")
def measured(reference):
    """Differences by layout, family and mode, as every rank of the layout found them."""
    found = {}
    for world, layouts in WORLDS.items():
        jobs = [(layout, family, mode, reference(family, fields)) for (layout, family), fields in CASES.items()
                if layout in layouts for mode in MODES]
        ranks = run_ranks(world, _measure_all, jobs)
        found.update({key: [rank[key] for rank in ranks] for key in ranks[0]})
    return found


@pytest.fixture(scope="module")
def faulty(reference):
    """Differences by fault, as both of two ranks found them."""
    return run_ranks(2, _measure_faulty, reference("qwen3_vl", TWO_STAGES))


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: f"micro{mode[0]}-persist{mode[1]}")
@pytest.mark.parametrize("layout, family", CASES)
def test_two_clipped_steps_equal_one_process(measured, layout, family, mode):
    for figures in measured[layout, family, mode]:
        assert min(figures["norms"]) > CLIP, "clipping must be active"
        assert figures["loss"] <= 1e-5
        assert figures["norm"] <= 1e-5
        assert figures["weights"] <= 1e-5


def test_every_weight_was_compared(measured):
    for ranks in measured.values():
        assert set().union(*(figures["names"] for figures in ranks)) == ranks[0]["all_names"]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_sees_faults(faulty, fault):
    assert max(figures[fault][FAULTS[fault][1]] for figures in faulty) > 1e-4


def _row_weights() -> list[torch.Tensor]:
    """What each token of a row counts in the loss: a share of the mean over all tokens times the row's advantage."""
    total = sum(LENGTHS)
    return [torch.full((n,), (-1.0) ** b * (0.5 + b / 8) / total) for b, n in enumerate(LENGTHS)]


def _loss(logprobs: torch.Tensor, entropy: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return -(weights * logprobs).sum() - ENTROPY_COEFFICIENT * (weights.abs() * entropy).sum()


def _one_process(directory: Path) -> dict:
    model = hf_model(directory)
    processor = processor_of(directory, load_model(directory))
    prompts, answers = encode_pictures(processor), random_answers(processor, LENGTHS)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW([
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}], **ADAMW)
    losses, norms = [], []
    for lr in LEARNING_RATES:
        total = 0.0
        for p, answer, weights in zip(PROMPT_OF_ROW, answers, _row_weights()):
            loss = _loss(*hf_scores(model, prompts[p], answer, TEMPERATURE), weights)
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, CLIP)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "norms": norms, "weights": dict(model.state_dict())}


def _measure_all(jobs: list[tuple]) -> dict:
    from megavg.parallel.mcore import make_context

    found = {}
    for layout, family, mode, files in jobs:
        context = make_context(*LAYOUTS[layout], torch.device("cpu"))
        found[layout, family, mode] = _differences(*files, context, *mode)
    return found


def _measure_faulty(files: tuple) -> dict:
    from megavg.parallel.mcore import make_context

    found = {}
    for fault, (layout, _) in FAULTS.items():
        context = make_context(*layout, torch.device("cpu"))
        with pytest.MonkeyPatch.context() as patch:
            _break(fault, patch)
            found[fault] = _differences(*files, context, *MODES[0])
    return found


def _break(fault: str, patch: pytest.MonkeyPatch) -> None:
    """Take one of the measures away that make layouts equal."""
    from megavg.models import base
    from megavg.models.layers import language_model

    if fault == "query norms not summed over ranks":
        patch.setattr(language_model, "HeadNorm", language_model.RMSNorm)
        return
    mark = {"shards not marked": "tensor_model_parallel", "replicated parameters not marked": "model_parallel"}[fault]
    build = base.Model.build_stage

    def unmarked(*args):
        stage = build(*args)
        for parameter in stage.parameters():
            if hasattr(parameter, mark):
                delattr(parameter, mark)
        return stage

    patch.setattr(base.Model, "build_stage", unmarked)


def _differences(directory: str, expected_file: str, context, size: int, threshold: int) -> dict:
    from megavg.parallel.engine import ZeroEngine
    from megavg.protocols.options import OptimizerConfig, ZeroConfig

    expected = torch.load(expected_file)
    model, stage = loaded_stage(Path(directory), context)
    engine = ZeroEngine(stage, model.dims.hidden_size, context, torch.float32,
                        ZeroConfig(param_persistence_threshold=threshold),
                        OptimizerConfig(**ADAMW, gradient_clipping=CLIP))
    inputs, weights = _micro_batches(Path(directory), model, context, size)
    losses, norms = [], []
    for lr in LEARNING_RATES:
        losses.append(engine.forward_backward(
            len(inputs), inputs.__getitem__, lambda i, logprobs, entropy: _loss(logprobs, entropy, weights[i]),
            TEMPERATURE))
        norms.append(engine.step(lr))
    weight_map = model.weight_map(context.tp_size)
    worst, names = 0.0, set()
    for name, tensor in engine.weights():
        entry = weight_map[name]
        names.update(entry.hf_names)
        theirs = entry.to_megavg([expected["weights"][n] for n in entry.hf_names], context.tp_size, context.tp_rank)
        worst = max(worst, float((tensor - theirs).abs().max()))
    return {"loss": _largest(losses, expected["losses"]), "norm": _largest(norms, expected["norms"]),
            "weights": worst, "norms": norms, "names": names, "all_names": set(weight_map.hf_names)}


def _largest(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def _micro_batches(directory: Path, model, context, size: int):
    """This data-parallel rank's rows in micro-batches: (inputs, token weights) of each; the last may be smaller."""
    processor = processor_of(directory, model)
    builder = builder_of(model, processor, context)
    prompts, answers = encode_pictures(processor), random_answers(processor, LENGTHS)
    share = len(LENGTHS) // context.dp_size
    inputs, weights = [], []
    for start in range(context.dp_rank * share, (context.dp_rank + 1) * share, size):
        rows = range(start, min(start + size, (context.dp_rank + 1) * share))
        used = sorted({PROMPT_OF_ROW[b] for b in rows})
        inputs.append(builder.build([prompts[p] for p in used], [used.index(PROMPT_OF_ROW[b]) for b in rows],
                                    [answers[b] for b in rows]))
        weights.append(torch.cat([_row_weights()[b] for b in rows]))
    return inputs, weights
