"""Make a small random Qwen-VL checkpoint in Hugging Face format, with a tokenizer trained on the spot.

    python tools/make_tiny_checkpoint.py --family qwen3_vl --out runs/tiny --hidden-size 128 --num-layers 4
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from megavg.models.tiny import DTYPES, TinySpec, make_tiny_checkpoint
from megavg.models.tiny_config import FAMILIES
from megavg.models.tiny_tokenizer import TOKENIZER_KINDS

_HELP = {
    "intermediate_size": "width inside the language model's MLP (default: 3 * hidden size)",
    "head_dim": "width of one attention head (default: hidden size / heads; only qwen3_vl can differ)",
    "vision_hidden_size": "width inside the vision tower (default: hidden size)",
    "patch_size": "pixels of a patch's side (default: 14, qwen3_vl 16)",
    "vocab_size": "rows of the embedding, at least 270 (bpe) or 371 (sentencepiece) (default: 512)",
    "min_pixels": "smallest image after the resize, in pixels (default: 2 x 2 tokens)",
    "max_pixels": "largest image after the resize, in pixels (default: 16 x 16 tokens)",
}
_CHOICES = {"family": list(FAMILIES), "tokenizer": TOKENIZER_KINDS, "dtype": DTYPES}


def build_parser() -> argparse.ArgumentParser:
    """One option for every field of ``TinySpec``, with its default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is already there")
    for field in dataclasses.fields(TinySpec):
        flag = "--" + field.name.replace("_", "-")
        if field.name == "tie_embeddings":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default,
                                help="share the embedding with the output layer (default: no)")
        elif field.name in _CHOICES:
            required = field.default is dataclasses.MISSING
            parser.add_argument(flag, choices=_CHOICES[field.name], required=required,
                                default=None if required else field.default)
        else:
            text = _HELP.get(field.name, f"default: {field.default}")
            kind = float if field.type == "float" else int
            parser.add_argument(flag, type=kind, default=field.default, help=text)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status, 2 when the arguments do not fit together."""
    arguments = vars(build_parser().parse_args(argv))
    out, overwrite = arguments.pop("out"), arguments.pop("overwrite")
    try:
        spec = TinySpec(**arguments)
        _hide_progress_bars()
        path = make_tiny_checkpoint(out, spec, overwrite=overwrite)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = (path / "model.safetensors").stat().st_size
    print(f"{path}: {spec.family}, {size / 1e6:.1f} MB of weights, "
          f"{sum(1 for _ in path.iterdir())} files")
    return 0


def _hide_progress_bars():
    from transformers.utils import logging

    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
