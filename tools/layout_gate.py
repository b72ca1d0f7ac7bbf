"""Measure how far training in a layout is from one process that trains transformers' own model with torch's AdamW.

``run_reference`` gives what the one process gets, ``measure`` how far this layout is from it, over all ranks. Both run
the same examples: rows that share an image, of one image, of two and of none, out of the prompts' order.
"""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from megavg.checkpoint.weight_map import WeightEntry, WeightMap
from megavg.models.base import Model, copy_weights, load_model
from megavg.models.inputs import InputBuilder
from megavg.models.processor import Processor
from megavg.models.tiny import TinySpec, make_tiny_checkpoint
from megavg.parallel.context import ParallelContext
from megavg.parallel.engine import ZeroEngine
from megavg.protocols.batch import EncodedPrompt, ModelInputs
from megavg.protocols.options import OptimizerConfig, StageOptions, ZeroConfig

PROMPTS = (
    (((60, 90),), "the red circle"),
    (((128, 128),), "box"),
    (((150, 66),), "where is the small green square in here?"),
    ((), "which is larger, a circle or a square?"),
    (((84, 56), (56, 112)), "the second one"),
)
"""Width and height in pixels of each prompt's pictures, and its text."""
PROMPT_OF_ROW = (0, 0, 2, 1, 3, 4, 1, 0)
LENGTHS = (5, 1, 9, 4, 12, 3, 2, 7)
ADVANTAGES = (1.0, -0.5, 0.7, -1.2, 1.1, 1.4, 0.9, 0.6)
NUM_ROWS = len(PROMPT_OF_ROW)
TEMPERATURE, ENTROPY_COEFFICIENT = 0.7, 0.3

ROWS_OF_STEP = (1, 3, 3)
"""Rows of a micro-batch in each optimiser step: alone, so that one is of text only, and packed in unequal numbers."""
LEARNING_RATES = (0.05, 0.02, 0.05)
"""Of each optimiser step, as shares of the weights' root mean square."""
CLIP = 0.25
"""Bound of the gradient norm, as a share of the first one: clipping is active, in the later steps too."""
BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.1
_TOWER, _PROJECTOR = "model.visual.", "merger"


@dataclass(frozen=True)
class Examples:
    """Prompts and answers, with what each of an answer's tokens counts in the loss."""

    prompts: list[EncodedPrompt]
    answers: list[list[int]]
    weights: list[torch.Tensor]


def make_examples(processor: Processor) -> Examples:
    """The rows that reference and layouts train on; the same for every call on one checkpoint."""
    noise = np.random.default_rng(0)
    prompts = [processor.encode_prompt([_noise(noise, *size) for size in sizes], text) for sizes, text in PROMPTS]
    generator = torch.Generator().manual_seed(0)
    allowed = sorted(set(range(processor.vocab_size)) - set(processor.forbidden_token_ids))
    answers = [[allowed[i] for i in torch.randint(len(allowed), (n,), generator=generator).tolist()] for n in LENGTHS]
    weights = [torch.full((n,), advantage / sum(LENGTHS)) for n, advantage in zip(LENGTHS, ADVANTAGES)]
    return Examples(prompts, answers, weights)


def _noise(generator: np.random.Generator, width: int, height: int) -> Image.Image:
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def make_tiny(out_dir: Path, family: str, tied: bool) -> Path:
    """A tiny checkpoint of a family whose every weight has noise added.

    Freshly drawn weights (deviation 0.02, biases 0, norms 1) give almost equal logits everywhere and hide mistakes. The
    sizes make layouts work hard: 515 tokens do not divide by 4, nor 2 key-value heads, and deepstack features enter the
    first 2 of 6 layers.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    directory = make_tiny_checkpoint(out_dir, TinySpec(
        family, hidden_size=64, intermediate_size=128, num_layers=6, num_heads=4, num_kv_heads=2,
        head_dim=32 if family == "qwen3_vl" else None, vision_depth=2, vocab_size=515, tie_embeddings=tied))
    model = _transformers_model(directory)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(directory)
    return directory


def _transformers_model(directory: Path):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(directory, local_files_only=True, dtype=torch.float32).eval()


def loss_of(logprobs: torch.Tensor, entropy: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """A share of the loss: log-probs under advantages of both signs, and an entropy bonus."""
    return -(weights * logprobs).sum() - ENTROPY_COEFFICIENT * (weights.abs() * entropy).sum()


def run_reference(directory: str | Path, device: torch.device, dtype: torch.dtype = torch.float32,
                  frozen_tower: bool = False, frozen_projector: bool = False) -> dict:
    """What one process gets: scores before the first step, losses, norms, the first gradients, the last weights.

    It computes in fp32 from the checkpoint's weights rounded to ``dtype``. The tensors come back on the CPU.
    """
    directory, box_format = Path(directory), load_model(directory).spec.box_format
    model = _transformers_model(directory).to(device)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(parameter.to(dtype))
            if name.startswith(_TOWER) and (frozen_projector if _PROJECTOR in name else frozen_tower):
                parameter.requires_grad_(False)
    examples = make_examples(Processor.from_pretrained(directory, box_format))
    with torch.no_grad():
        scores = [_row_scores(model, examples, row) for row in range(NUM_ROWS)]
    found = {"logprobs": [pair[0].cpu() for pair in scores], "entropy": [pair[1].cpu() for pair in scores]}
    found |= _train(model, examples, {name: p for name, p in parameters.items() if p.requires_grad})
    return found | {"weights": {name: parameter.detach().cpu() for name, parameter in parameters.items()}}


def _train(model, examples: Examples, trained: dict[str, torch.nn.Parameter]) -> dict:
    """Losses, norms, first gradients and the options of the optimiser, which are chosen to suit any model."""
    count = sum(parameter.numel() for parameter in trained.values())
    weight_rms = (sum(float(p.detach().double().pow(2).sum()) for p in trained.values()) / count) ** 0.5
    found: dict = {"losses": [], "norms": [], "learning_rates": [weight_rms * share for share in LEARNING_RATES]}
    for step, lr in enumerate(found["learning_rates"]):
        total = 0.0
        for row in range(NUM_ROWS):
            logprobs, entropy = _row_scores(model, examples, row)
            loss = loss_of(logprobs, entropy, examples.weights[row].to(logprobs.device))
            loss.backward()
            total += float(loss.detach())
        found["losses"].append(total)
        if step == 0:
            found["gradients"] = {name: (torch.zeros_like(p) if p.grad is None else p.grad).detach().cpu().clone()
                                  for name, p in trained.items()}
            norm = sum(float(g.double().pow(2).sum()) for g in found["gradients"].values()) ** 0.5
            # With AdamW's usual eps the first step is the sign of the gradient: a factor on it would not be seen, while
            # the noise of vanishing entries would. This eps is as large as the gradients, so a step answers to their
            # size.
            found |= {"clip": CLIP * norm, "eps": CLIP * norm / count**0.5, "gradient_rms": norm / count**0.5}
            optimizer = torch.optim.AdamW([
                {"params": [p for p in trained.values() if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
                {"params": [p for p in trained.values() if p.dim() <= 1], "weight_decay": 0.0}],
                betas=BETAS, eps=found["eps"])
        found["norms"].append(float(torch.nn.utils.clip_grad_norm_(trained.values(), found["clip"])))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    return found


def _row_scores(model, examples: Examples, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs [T], entropies [T]) of a row's answer: one row, no padding, positions as transformers makes them."""
    prompt, answer = examples.prompts[PROMPT_OF_ROW[row]], examples.answers[row]
    ids = torch.tensor([prompt.input_ids + answer], device=model.device)
    images = {}
    if prompt.image_grid_thw:
        images = {"pixel_values": prompt.pixel_values.to(ids.device),
                  "image_grid_thw": torch.tensor(prompt.image_grid_thw, device=ids.device)}
    logits = model(input_ids=ids, mm_token_type_ids=(ids == model.config.image_token_id).int(), **images).logits[0]
    logp = (logits[len(prompt.input_ids) - 1:-1].float() / TEMPERATURE).log_softmax(-1)
    chosen = logp.gather(1, torch.tensor(answer, device=ids.device)[:, None])[:, 0]
    return chosen, -(logp.exp() * logp).sum(-1)


def measure(directory: str | Path, reference: dict, context: ParallelContext, dtype: torch.dtype = torch.float32,
            options: StageOptions = StageOptions(), zero: ZeroConfig = ZeroConfig()) -> dict:
    """Largest differences between this layout and ``reference``, over all ranks and on every rank.

    DeepSpeed numbers modules through a process' life and, without a pipeline, insists on equal numbers on all ranks: in
    one process, layouts of one stage come before those of several.

    Returns logprobs and entropy (nats), loss and norm (relative), gradients and weights (relative to each HF tensor's
    largest entry; a gradient's at least to the root mean square of all) with worst_gradient and worst_weight, the names
    of the tensors; or refused, the reason why the model cannot be laid out so.

    Raises:
        RuntimeError: some tensor of the model was compared by no rank.
    """
    model, stage, refused = load_model(directory, options), None, ""
    try:
        if NUM_ROWS % context.dp_size:
            raise ValueError(f"the {NUM_ROWS} examples do not divide over {context.dp_size} data-parallel ranks")
        stage = model.build_stage(context, dtype)
    except ValueError as error:
        refused = str(error)
    refusals = [reason for reason in _from_all_ranks(refused, context) if reason]
    if refusals:
        return {"refused": refusals[0]}
    copy_weights(stage, model.hf_weights(stage, context))
    engine = ZeroEngine(stage, context, dtype, zero, OptimizerConfig(
        betas=BETAS, eps=reference["eps"], weight_decay=WEIGHT_DECAY, gradient_clipping=reference["clip"]))
    found = _differences(engine, _Batches(model, context, dtype), model.weight_map(context.tp_size), reference)
    merged = _merge(_from_all_ranks(found, context), reference)
    del engine, stage
    gc.collect()  # the engine's hooks refer to one another; the next layout needs their memory
    if context.device.type == "cuda":
        torch.cuda.empty_cache()
    return merged


class _Batches:
    """This data-parallel rank's examples in micro-batches of any number of rows."""

    def __init__(self, model: Model, context: ParallelContext, dtype: torch.dtype):
        processor = Processor.from_pretrained(model.checkpoint.directory, model.spec.box_format)
        self.examples, self.device = make_examples(processor), context.device
        self._builder = InputBuilder(processor.image_token_id, processor.pad_token_id,
                                     model.config.vision_config.spatial_merge_size, processor.patch_dim, dtype,
                                     context.device, with_images=context.is_first_stage)
        share = NUM_ROWS // context.dp_size
        self._rows = range(context.dp_rank * share, (context.dp_rank + 1) * share)

    def parts(self, size: int) -> list[range]:
        """The rows of each micro-batch; the last may be smaller."""
        return [self._rows[start:start + size] for start in range(0, len(self._rows), size)]

    def inputs(self, rows: range) -> ModelInputs:
        used = sorted({PROMPT_OF_ROW[row] for row in rows})
        return self._builder.build([self.examples.prompts[p] for p in used],
                                   [used.index(PROMPT_OF_ROW[row]) for row in rows],
                                   [self.examples.answers[row] for row in rows])

    def weights(self, rows: range) -> torch.Tensor:
        return torch.cat([self.examples.weights[row] for row in rows]).to(self.device)


def _differences(engine: ZeroEngine, batches: _Batches, weight_map: WeightMap, reference: dict) -> dict:
    """Score, then train as the reference did; the largest differences that this rank sees."""
    found = _score(engine, batches, batches.parts(max(ROWS_OF_STEP)), reference)
    found |= {"loss": 0.0, "norm": 0.0}
    for step, (size, lr) in enumerate(zip(ROWS_OF_STEP, reference["learning_rates"], strict=True)):
        parts = batches.parts(size)

        def loss(i: int, logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
            if step == 0:
                _keep_largest(found, _compare_scores(logprobs, entropy, parts[i], reference))
            return loss_of(logprobs, entropy, batches.weights(parts[i]))

        total = engine.forward_backward(len(parts), lambda i: batches.inputs(parts[i]), loss, TEMPERATURE)
        if step == 0:
            found |= _compare(engine.gradients(), weight_map, engine.context, reference["gradients"], "gradient",
                              reference["gradient_rms"])
        _keep_largest(found, {"loss": _relative(total, reference["losses"][step]),
                              "norm": _relative(engine.step(lr), reference["norms"][step])})
    return found | _compare(engine.weights(), weight_map, engine.context, reference["weights"], "weight", 0.0)


def _score(engine: ZeroEngine, batches: _Batches, parts: list[range], reference: dict) -> dict[str, float]:
    counts = [sum(LENGTHS[row] for row in rows) for rows in parts]
    found: dict[str, float] = {}
    for rows, scores in zip(parts, engine.scores(counts, lambda i: batches.inputs(parts[i]), TEMPERATURE)):
        _keep_largest(found, _compare_scores(*scores, rows, reference))
    return found


def _compare_scores(logprobs: torch.Tensor, entropy: torch.Tensor, rows: range, reference: dict) -> dict[str, float]:
    return {key: _largest(ours.detach().float().cpu() - torch.cat([reference[key][row] for row in rows]))
            for key, ours in (("logprobs", logprobs), ("entropy", entropy))}


def _keep_largest(found: dict[str, float], differences: dict[str, float]) -> None:
    for key, difference in differences.items():
        found[key] = max(found.get(key, 0.0), difference)


def _compare(tensors: Iterable[tuple[str, torch.Tensor]], weight_map: WeightMap, context: ParallelContext,
             expected: dict[str, torch.Tensor], kind: str, least: float) -> dict:
    """Largest difference of this rank's shards to those of ``expected``, relative to each HF tensor's largest entry."""
    worst, worst_name, compared = 0.0, "", set()
    for name, tensor in tensors:
        entry = weight_map[name]
        theirs = entry.to_megavg([expected[n] for n in entry.hf_names], context.tp_size, context.tp_rank)
        difference = tensor.float().cpu() - theirs
        for hf_name, part in _parts(entry, difference, context.tp_size):
            scale = max(_largest(expected[hf_name]), least)
            relative = _relative_to(scale, _largest(part))
            compared.add(hf_name)
            if not worst_name or relative > worst:
                worst, worst_name = relative, hf_name
    return {f"{kind}s": worst, f"worst_{kind}": worst_name, f"{kind} names": compared}


def _parts(entry: WeightEntry, shard: torch.Tensor, tp_size: int) -> list[tuple[str, torch.Tensor]]:
    """(HF name, its part of this rank's shard) of each HF tensor that a parameter is made of."""
    if len(entry.hf_names) == 1:
        return [(entry.hf_names[0], shard)]
    num_shards = tp_size // entry.copies
    return list(zip(entry.hf_names, shard.split([size // num_shards for size in entry.sizes], entry.axis), strict=True))


def _merge(ranks: list[dict], reference: dict) -> dict:
    """The worst of all ranks; refuses to speak of a model that was not compared whole."""
    merged: dict = {key: max(rank[key] for rank in ranks) for key in ("logprobs", "entropy", "loss", "norm")}
    for kind in ("gradient", "weight"):
        missing = set(reference[f"{kind}s"]) - set().union(*(rank[f"{kind} names"] for rank in ranks))
        if missing:
            raise RuntimeError(f"no rank compared the {kind}s of {', '.join(sorted(missing)[:3])} and {len(missing)} "
                               "tensors in all; the weight map does not hold them")
        worst = max(ranks, key=lambda rank: rank[f"{kind}s"])
        merged |= {key: worst[key] for key in (f"{kind}s", f"worst_{kind}")}
    return merged


def _from_all_ranks(value, context: ParallelContext) -> list:
    found: list = [None] * context.world_size
    dist.all_gather_object(found, value)
    return found


def _largest(tensor: torch.Tensor) -> float:
    """The largest magnitude; infinite where something is not a number, so that every comparison sees it."""
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    return math.inf if math.isnan(largest) else largest


def _relative(ours: float, theirs: float) -> float:
    return _relative_to(abs(theirs), math.inf if math.isnan(ours) else abs(ours - theirs))


def _relative_to(scale: float, difference: float) -> float:
    """0 where both are 0, as for a parameter that is nothing but zeros."""
    return difference / scale if scale else (0.0 if difference == 0.0 else math.inf)
