"""Make a small random Qwen-VL checkpoint that transformers loads, for tests and for training from nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from megavg.models.tiny_config import FAMILIES, SPATIAL_MERGE_SIZE, model_config, preprocessor_config
from megavg.models.tiny_tokenizer import TOKENIZER_KINDS, write_tokenizer
from megavg.protocols.plugin import nearest

DTYPES = ("float32", "bfloat16")


@dataclass
class TinySpec:
    """The sizes of a checkpoint to make; ``None`` takes the default named beside the field.

    Raises:
        ValueError: sizes that no model of the family can have; the message names the option to change.
    """

    family: str
    hidden_size: int = 128
    intermediate_size: int | None = None  # 3 * hidden_size
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int | None = None  # hidden_size / num_heads; only Qwen3-VL can differ from it
    vision_depth: int = 3
    vision_hidden_size: int | None = None  # hidden_size
    vision_heads: int = 4
    patch_size: int | None = None  # pixels: 14 (Qwen2-VL, Qwen2.5-VL) or 16 (Qwen3-VL)
    vocab_size: int = 512  # rows of the embedding; the tokenizer may have fewer tokens
    # The released models use 1e6 or 5e6. Few frequencies fit a small head, and there they would all be too slow: with
    # 1e4 a tiny model learns to point sooner.
    rope_theta: float = 10_000.0
    initializer_range: float = 0.02  # deviation of the random weights; 0.05 makes narrow models learn faster
    seed: int = 0
    tie_embeddings: bool = False
    tokenizer: str = "bpe"  # bpe | sentencepiece
    min_pixels: int | None = None  # pixels of an image after the resize: 2 x 2 tokens
    max_pixels: int | None = None  # 16 x 16 tokens
    dtype: str = "float32"  # float32 | bfloat16

    def __post_init__(self):
        for option, known in (("family", FAMILIES), ("tokenizer", TOKENIZER_KINDS), ("dtype", DTYPES)):
            if getattr(self, option) not in known:
                raise ValueError(f"{option}={getattr(self, option)!r} does not exist"
                                 f"{nearest(str(getattr(self, option)), known)}")
        self._require_positive()
        self._fill_defaults()
        self._require_positive()
        self._check_heads()
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels={self.min_pixels} is more than max_pixels={self.max_pixels}; "
                             "lower min_pixels or raise max_pixels")

    def _fill_defaults(self):
        if self.head_dim is None:
            if self.hidden_size % self.num_heads:
                raise ValueError(f"hidden_size={self.hidden_size} is not divisible by num_heads={self.num_heads}; "
                                 "change one of them" + (" or give head_dim" if self.family == "qwen3_vl" else ""))
            self.head_dim = self.hidden_size // self.num_heads
        if self.patch_size is None:
            self.patch_size = FAMILIES[self.family].patch_size
        token_side = self.patch_size * SPATIAL_MERGE_SIZE
        defaults = {
            "intermediate_size": 3 * self.hidden_size,
            "vision_hidden_size": self.hidden_size,
            "min_pixels": (2 * token_side) ** 2,
            "max_pixels": (16 * token_side) ** 2,
        }
        for option, value in defaults.items():
            if getattr(self, option) is None:
                setattr(self, option, value)

    def _require_positive(self):
        for option, value in vars(self).items():
            if type(value) is int and option != "seed" and value < 1:
                raise ValueError(f"{option}={value} must be at least 1")

    def _check_heads(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}; "
                             "change one of them")
        if self.head_dim % 2 or self.head_dim < 8:
            raise ValueError(f"head_dim={self.head_dim} must be even and at least 8, to split rotary frequencies over "
                             "three axes; change head_dim, or hidden_size and num_heads")
        if self.family != "qwen3_vl" and self.head_dim * self.num_heads != self.hidden_size:
            raise ValueError(f"head_dim={self.head_dim} must be hidden_size / num_heads = "
                             f"{self.hidden_size} / {self.num_heads} for {self.family}; only qwen3_vl has a free one")
        if self.vision_hidden_size % (4 * self.vision_heads):
            raise ValueError(f"vision_hidden_size={self.vision_hidden_size} is not divisible by 4 * vision_heads = "
                             f"{4 * self.vision_heads} (two rotary axes per head); change one of them")


def make_tiny_checkpoint(out_dir: str | Path, spec: TinySpec, overwrite: bool = False) -> Path:
    """Write a random checkpoint with every file of a released one into ``out_dir`` and return its path.

    The folder holds config.json, model.safetensors (the initial values that the family's transformers class draws
    with ``spec.seed``), generation_config.json, the tokenizer trained on the spot with its chat template, and
    preprocessor_config.json. The same specification gives the same bytes. Nothing is downloaded, and an interrupted
    run leaves no half-made ``out_dir``.

    Raises:
        ValueError: ``out_dir`` holds something and ``overwrite`` is False, or it is not a checkpoint; or the
            tokenizer cannot be trained within ``spec.vocab_size``.
    """
    out_dir = Path(out_dir).resolve()
    _check_target(out_dir, overwrite)
    partial = out_dir.with_name(out_dir.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        tokenizer = write_tokenizer(partial, spec.tokenizer, spec.vocab_size)
        _write_model(partial, spec, tokenizer.get_vocab())
        _write_json(partial / "preprocessor_config.json", preprocessor_config(spec))
        if out_dir.exists():
            shutil.rmtree(out_dir)
        partial.rename(out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out_dir


def _check_target(out_dir: Path, overwrite: bool):
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"{out_dir} exists; name another folder, or overwrite it (--overwrite)")
    # A slip in the path must not cost a folder of other things.
    if not (out_dir / "config.json").is_file():
        raise ValueError(f"{out_dir} is no checkpoint (it has no config.json), so it is not overwritten; "
                         "remove it yourself or name another folder")


def _write_model(folder: Path, spec: TinySpec, token_ids: dict[str, int]):
    import torch
    from transformers import AutoModelForImageTextToText, GenerationConfig

    config = model_config(spec, token_ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.to(getattr(torch, spec.dtype))
    model.generation_config = GenerationConfig(
        bos_token_id=token_ids["<|endoftext|>"],
        eos_token_id=[token_ids["<|im_end|>"], token_ids["<|endoftext|>"]],
        pad_token_id=token_ids["<|endoftext|>"],
    )
    model.save_pretrained(folder)
    # safetensors writes files that only their owner can read; a checkpoint is for everyone who may read its config.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode & 0o777)


def _write_json(path: Path, content: dict):
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
