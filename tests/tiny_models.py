"""Tiny models, prompts and answers that several rooms' tests share, with transformers' own model as the reference."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megavg.models.base import Model, copy_weights, load_model
from megavg.models.inputs import InputBuilder
from megavg.models.processor import Processor
from megavg.parallel.context import ParallelContext
from megavg.protocols.batch import EncodedPrompt

PICTURES = ((60, 90, "the red circle"), (128, 128, "box"), (150, 66, "where is the small green square in here?"),
            (84, 56, "it"))
"""Width and height in pixels and expression of each prompt; no two prompts are equally long."""


def sharpened(directory: Path, scale: float = 0.1) -> Path:
    """A copy of a tiny checkpoint whose every weight has ``scale`` * randn added; made once, beside it.

    Freshly drawn weights (deviation 0.02, biases 0, norms 1) give almost equal logits everywhere and hide mistakes.
    """
    out = directory.with_name(f"{directory.name}-sharp-{scale}")
    if not out.exists():
        model = hf_model(directory)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += scale * torch.randn(parameter.shape, generator=generator)
        save_like(model, directory, out)
    return out


def save_like(model, directory: Path, out: Path) -> None:
    """Write a transformers model to ``out``, with the other files of ``directory``."""
    import shutil

    partial = out.with_name(out.name + ".tmp")
    shutil.copytree(directory, partial)
    model.save_pretrained(partial)
    os.rename(partial, out)


def hf_model(directory: Path, dtype: torch.dtype = torch.float32):
    """transformers' model of a checkpoint, in evaluation mode."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(directory, local_files_only=True, dtype=dtype).eval()


def processor_of(directory: Path, model: Model) -> Processor:
    return Processor.from_pretrained(directory, model.spec.box_format)


def builder_of(model: Model, processor: Processor, context: ParallelContext,
               dtype: torch.dtype = torch.float32) -> InputBuilder:
    return InputBuilder(processor.image_token_id, processor.pad_token_id,
                        model.config.vision_config.spatial_merge_size, processor.patch_dim, dtype,
                        context.device)


def encode_pictures(processor: Processor, pictures=PICTURES) -> list[EncodedPrompt]:
    """One prompt per entry of ``pictures``, each with its own picture of coloured noise."""
    prompts = []
    for seed, (width, height, expression) in enumerate(pictures):
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        prompts.append(processor.encode_prompt(Image.fromarray(pixels), expression))
    return prompts


def random_answers(processor: Processor, lengths) -> list[list[int]]:
    """Answers of tokens that may be sampled, ``lengths`` long."""
    generator = torch.Generator().manual_seed(2)
    allowed = sorted(set(range(processor.vocab_size)) - set(processor.forbidden_token_ids))
    return [[allowed[i] for i in torch.randint(len(allowed), (n,), generator=generator).tolist()] for n in lengths]


def loaded_stage(directory: Path, context: ParallelContext, dtype: torch.dtype = torch.float32):
    """(model, stage) of a checkpoint with its weights, not partitioned."""
    model = load_model(directory)
    stage = model.build_stage(context, dtype)
    copy_weights(stage, model.hf_weights(stage, context))
    return model, stage


def hf_logits(model, prompt: EncodedPrompt, answer: list[int]) -> torch.Tensor:
    """Logits [S, V] of one prompt with its answer: one row, no padding, positions as transformers makes them."""
    ids = torch.tensor([prompt.input_ids + answer])
    return model(input_ids=ids, **hf_images(prompt, model.dtype),
                 mm_token_type_ids=(ids == model.config.image_token_id).int()).logits[0]


def hf_images(prompt: EncodedPrompt, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A prompt's images as transformers' models take them; nothing without any."""
    if not prompt.image_grid_thw:
        return {}
    return {"pixel_values": prompt.pixel_values.to(dtype), "image_grid_thw": torch.tensor(prompt.image_grid_thw)}


def hf_scores(model, prompt: EncodedPrompt, answer: list[int], temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs [T], entropies [T]) of the answer's tokens, differentiable."""
    logits = hf_logits(model, prompt, answer)[len(prompt.input_ids) - 1:-1].float()
    logp = (logits / temperature).log_softmax(-1)
    chosen = logp.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return chosen, -(logp.exp() * logp).sum(-1)
