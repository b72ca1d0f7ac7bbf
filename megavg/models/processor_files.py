"""Read the processor's files of a checkpoint folder and say clearly what is missing or does not fit together."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)
PREPROCESSOR_CONFIG = "preprocessor_config.json"
PROCESSOR_FILES = (
    *TOKENIZER_FILES, "chat_template.jinja", "chat_template.json", PREPROCESSOR_CONFIG,
    "video_preprocessor_config.json", "processor_config.json", "generation_config.json",
)
"""Every file that tells how to use the weights; a checkpoint holds those that its family needs."""

_REQUIRED_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_REMEDY = "copy it from the original checkpoint"


@dataclass(frozen=True)
class Parts:
    """What one checkpoint folder says about text and images.

    Attributes:
        folder: the checkpoint.
        tokenizer, image_processor: transformers objects.
        chat_template: Jinja source.
        vocab_size: rows of the model's embedding.
        image_token_id: the token that stands for image features.
        eos_token_ids: end tokens of generation_config.json, empty without that file.
    """

    folder: Path
    tokenizer: Any
    image_processor: Any
    chat_template: str
    vocab_size: int
    image_token_id: int
    eos_token_ids: list[int]


def load_parts(folder: Path, min_pixels: int | None = None, max_pixels: int | None = None) -> Parts:
    """Load the processor's parts from ``folder``; pixel limits given here replace the file's.

    Raises:
        ValueError: a file is missing, is not JSON, or contradicts another one.
    """
    from transformers import AutoConfig, PreTrainedConfig

    _check_files(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if not isinstance(getattr(config, "vision_config", None), PreTrainedConfig):
        raise ValueError(f"{folder / 'config.json'} is of model type {config.model_type!r}, which has no vision tower; "
                         "give the folder of a Qwen-VL checkpoint")
    tokenizer = _tokenizer(folder)
    vocab_size = config.get_text_config().vocab_size
    _check_tokenizer(folder, tokenizer, vocab_size, config.image_token_id)
    return Parts(
        folder=folder,
        tokenizer=tokenizer,
        image_processor=_image_processor(folder, config.vision_config, min_pixels, max_pixels),
        chat_template=_chat_template(folder, tokenizer),
        vocab_size=vocab_size,
        image_token_id=config.image_token_id,
        eos_token_ids=_eos_token_ids(folder),
    )


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"checkpoint folder {folder} does not exist; make one with tools/make_tiny_checkpoint.py or "
                         "give the path of a downloaded one")
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing; {_REMEDY}")
        _read_json(folder / name)
    _image_settings(folder)
    complete = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    if not complete and not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        raise ValueError(f"{folder / 'tokenizer.json'} is missing, and neither tokenizer.model nor vocab.json with "
                         f"merges.txt stands in for it; {_REMEDY}")


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises a bare Exception for a torn file
        raise ValueError(f"the tokenizer files of {folder} cannot be read ({error}); {_REMEDY}") from error


def _check_tokenizer(folder: Path, tokenizer: Any, vocab_size: int, image_token_id: int) -> None:
    vocab = tokenizer.get_vocab()
    missing = [token for token in _REQUIRED_TOKENS if token not in vocab]
    if missing:
        raise ValueError(f"the tokenizer of {folder} has no token {missing[0]!r}; use a Qwen-VL tokenizer")
    if max(vocab.values()) >= vocab_size:
        raise ValueError(f"the tokenizer of {folder} has ids up to {max(vocab.values())}, but vocab_size in "
                         f"config.json is {vocab_size}; the two files belong to different checkpoints")
    image_token = tokenizer.convert_ids_to_tokens(image_token_id)
    if image_token != "<|image_pad|>":
        raise ValueError(f"image_token_id={image_token_id} in {folder / 'config.json'} is {image_token!r} in the "
                         "tokenizer, expected '<|image_pad|>'; the two files belong to different checkpoints")


def _image_settings(folder: Path) -> dict:
    """What preprocessor_config.json says, or the part of processor_config.json that newer transformers write."""
    if (folder / PREPROCESSOR_CONFIG).is_file():
        return _read_json(folder / PREPROCESSOR_CONFIG)
    composite = folder / "processor_config.json"
    settings = _read_json(composite).get("image_processor") if composite.is_file() else None
    if not isinstance(settings, dict):
        raise ValueError(f"{folder / PREPROCESSOR_CONFIG} is missing; {_REMEDY}")
    return settings


def _image_processor(folder: Path, vision_config: Any, min_pixels: int | None, max_pixels: int | None) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    settings = _image_settings(folder)
    for key, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
        if value is not None:
            settings[key] = value
    processor = Qwen2VLImageProcessorPil.from_dict(settings)
    lower, upper = processor.size["shortest_edge"], processor.size["longest_edge"]
    if not 1 <= lower <= upper:
        raise ValueError(f"min_pixels={lower} and max_pixels={upper} for {folder} leave no image size; "
                         "give 1 <= min_pixels <= max_pixels")
    for here, there in (("patch_size", "patch_size"), ("merge_size", "spatial_merge_size"),
                        ("temporal_patch_size", "temporal_patch_size")):
        if getattr(processor, here) != getattr(vision_config, there):
            raise ValueError(f"{here}={getattr(processor, here)} in {folder / PREPROCESSOR_CONFIG} is not the model's "
                             f"vision_config.{there}={getattr(vision_config, there)} in config.json; {_REMEDY}")
    return processor


def _chat_template(folder: Path, tokenizer: Any) -> str:
    """The template in transformers' own order: chat_template.jinja, chat_template.json, tokenizer_config.json."""
    legacy = folder / "chat_template.json"
    if legacy.is_file() and not (folder / "chat_template.jinja").is_file():
        return _read_json(legacy)["chat_template"]
    if not isinstance(tokenizer.chat_template, str):
        raise ValueError(f"{folder} has no chat template: chat_template.jinja is missing, and so is the key "
                         f"'chat_template' of tokenizer_config.json; {_REMEDY}")
    return tokenizer.chat_template


def _eos_token_ids(folder: Path) -> list[int]:
    path = folder / "generation_config.json"
    ids = _read_json(path).get("eos_token_id") if path.is_file() else None
    if ids is None:
        return []
    return list(ids) if isinstance(ids, list) else [ids]


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {_REMEDY}") from error
