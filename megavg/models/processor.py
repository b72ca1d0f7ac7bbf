"""Everything between an image with a text and token ids, for one checkpoint of any Qwen-VL family."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megavg.models.processor_files import PROCESSOR_FILES, Parts, load_parts
from megavg.protocols.batch import EncodedPrompt
from megavg.protocols.pixels import PixelLayout
from megavg.protocols.sample import Frame

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from PIL.Image import Image

END_TURN = "<|im_end|>"
END_TEXT = "<|endoftext|>"

# A prompt and an answer may hold these: Qwen2-VL names objects and writes boxes with them.
_GROUNDING_TOKENS = frozenset({
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
})
_MAX_ASPECT_RATIO = 200
_OPENING = re.compile(r"(?:<think>\s*)?\Z")


class Processor:
    """Turn images and texts into token ids and token ids into texts; make one with ``from_pretrained``.

    Attributes:
        tokenizer: the checkpoint's transformers tokenizer.
        image_processor: its ``Qwen2VLImageProcessorPil``, the one Pillow path for every family.
        box_format: name of the format that the family writes boxes in.
        frame_kind: kind of the frame of coordinates that goes with it.
        vocab_size: rows of the model's embedding, padding rows included.
        image_token_id, pad_token_id: ids of ``<|image_pad|>`` and of the padding token.
        end_token_ids: ids that end an answer; the first is ``<|im_end|>``.
        forbidden_token_ids: ids that must never be sampled: vision tokens, ``<|im_start|>`` and every row of the
            embedding that the tokenizer has no token for. End tokens and box tokens are not among them.
        digit_token_ids: ids of tokens that are digits and nothing else: what coordinates are written with.
        opening: how the chat template begins the answer, "<think>\\n" with a Thinking edition of Qwen3-VL, else "". The
            ids of an answer begin behind it, its text begins with it.
    """

    def __init__(self, parts: Parts, box_format: str, frame_kind: str):
        self.tokenizer, self.image_processor = parts.tokenizer, parts.image_processor
        self.box_format, self.frame_kind = box_format, frame_kind
        self.vocab_size, self.image_token_id = parts.vocab_size, parts.image_token_id
        self._folder, self._chat_template = parts.folder, parts.chat_template
        self._image_token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        vocab = self.tokenizer.get_vocab()
        self.end_token_ids = _end_token_ids(vocab, parts.eos_token_ids)
        self.pad_token_id = vocab[END_TEXT] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        ends = set(self.end_token_ids)
        control = {i: str(token) for i, token in self.tokenizer.added_tokens_decoder.items()
                   if token.special and str(token) not in _GROUNDING_TOKENS}
        self._control_tokens = tuple(control.values())
        unused = set(range(self.vocab_size)) - set(vocab.values())
        self.forbidden_token_ids = tuple(sorted((set(control) | unused) - ends))
        self.opening = _OPENING.search(self.rendered("", num_images=0))[0]
        self.digit_token_ids = tuple(sorted(i for token, i in vocab.items() if token.isascii() and token.isdigit()))

    @classmethod
    def from_pretrained(
        cls, checkpoint_dir: str | Path, box_format: str, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> Processor:
        """Read the processor of the checkpoint in ``checkpoint_dir``; nothing is downloaded.

        Args:
            checkpoint_dir: folder in Hugging Face format; the weights are not needed.
            box_format: how the family writes boxes: ``json_relative_1000`` (Qwen3-VL), ``json_resized_px``
                (Qwen2.5-VL) or ``tokens_relative_1000`` (Qwen2-VL).
            min_pixels, max_pixels: limits of an image's size after the resize, in pixels, instead of those in
                preprocessor_config.json.

        Raises:
            ValueError: a file is missing or two of them disagree; the message names the file and the remedy.
        """
        from megavg.ops.box_text import FRAME_KIND
        from megavg.protocols.plugin import nearest

        if box_format not in FRAME_KIND:
            raise ValueError(f"box_format={box_format!r} does not exist{nearest(box_format, FRAME_KIND)}")
        return cls(load_parts(Path(checkpoint_dir), min_pixels, max_pixels), box_format, FRAME_KIND[box_format])

    def encode_prompt(self, images: Image | Sequence[Image], text: str) -> EncodedPrompt:
        """Encode one user turn of an image, several or none and ``text`` in the checkpoint's chat template.

        Boxes of the answer belong to the last image.

        Raises:
            ValueError: an image is a video, or its sides differ by more than 200 to 1, or ``text`` holds a control
                token.
        """
        import torch

        images = list(images) if isinstance(images, (list, tuple)) else [images]
        self._check_text(text)
        for image in images:
            _check_image(image)
        ids = self._tokenize(self.rendered(text, len(images)))
        if ids.count(self.image_token_id) != len(images):
            raise ValueError(f"the chat template of {self._folder} gives {ids.count(self.image_token_id)} image tokens "
                             f"({self._image_token}) for {len(images)} images; use the family's own template")
        if not images:
            return EncodedPrompt(ids, torch.zeros(0, self.patch_dim), (), None)
        # a list of images is one batch for some releases of the image processor and several for others
        patches = [self.image_processor(images=[image], return_tensors="pt") for image in images]
        grids = tuple(tuple(int(size) for size in part["image_grid_thw"][0]) for part in patches)
        patch, (_, height, width) = self.image_processor.patch_size, grids[-1]
        frame = Frame(self.frame_kind, images[-1].width, images[-1].height, width * patch, height * patch)
        return EncodedPrompt(self._expand(ids, grids), torch.cat([part["pixel_values"] for part in patches]), grids,
                             frame)

    def rendered(self, text: str, num_images: int = 1) -> str:
        """One user turn of images and ``text`` in the checkpoint's chat template, as it is before it is tokenised."""
        turn = {"role": "user", "content": [{"type": "image"}] * num_images + [{"type": "text", "text": text}]}
        return self.tokenizer.apply_chat_template(
            [turn], chat_template=self._chat_template, tokenize=False, add_generation_prompt=True
        )

    @property
    def patch_dim(self) -> int:
        """Numbers of one patch in ``pixel_values``: 3 colours, its frames in time, its pixels."""
        processor = self.image_processor
        return 3 * processor.temporal_patch_size * processor.patch_size**2

    @property
    def pixel_layout(self) -> PixelLayout:
        """What the numbers of ``pixel_values`` mean."""
        processor = self.image_processor
        mean, std = (tuple(float(x) for x in values) for values in (processor.image_mean, processor.image_std))
        return PixelLayout(mean, std, processor.temporal_patch_size, processor.patch_size)

    def _expand(self, ids: list[int], grids: Sequence[tuple[int, int, int]]) -> list[int]:
        """Repeat each image's token once for every feature of it."""
        counts = iter(time * height * width // self.image_processor.merge_size**2 for time, height, width in grids)
        return [i for token in ids for i in [token] * (next(counts) if token == self.image_token_id else 1)]

    def encode_answer(self, text: str) -> list[int]:
        """Ids of an answer that the model should learn, with the end token ``<|im_end|>`` after it.

        Where the prompt has begun a thought, a ``text`` without one closes it at once, as Qwen3 does.

        Raises:
            ValueError: ``text`` holds a control token; box and reference tokens are allowed.
        """
        self._check_text(text)
        if self.opening:
            text = text.removeprefix("<think>") if text.startswith("<think>") else f"\n</think>\n\n{text}"
        return self._tokenize(text) + [self.end_token_ids[0]]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of an answer up to its first end token, box and reference tokens included, behind ``opening``."""
        answer: list[int] = []
        for token in ids:
            if int(token) in self.end_token_ids:
                break
            answer.append(int(token))
        return self.opening + self.tokenizer.decode(answer, skip_special_tokens=False,
                                                    clean_up_tokenization_spaces=False)

    def save_pretrained(self, out_dir: str | Path) -> None:
        """Copy the tokenizer, chat template and preprocessor files to ``out_dir``, byte for byte.

        Pixel limits given to ``from_pretrained`` are not part of the files, so they are not saved.
        """
        out_dir = Path(out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        for name in PROCESSOR_FILES:
            if (self._folder / name).is_file():
                partial = out_dir / (name + ".tmp")
                shutil.copyfile(self._folder / name, partial)
                os.replace(partial, out_dir / name)

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _check_text(self, text: str) -> None:
        # Otherwise an expression in a data set could end the turn or add image tokens that no image belongs to.
        for token in self._control_tokens:
            if token in text:
                raise ValueError(f"the text holds the control token {token!r}: {text[:200]!r}; remove it from the data")


def _end_token_ids(vocab: dict[str, int], eos_token_ids: list[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys([vocab[END_TURN], *eos_token_ids, vocab[END_TEXT]]))


def _check_image(image: Any) -> None:
    if not hasattr(image, "size") or not hasattr(image, "convert"):
        raise ValueError(f"expected an image, got {type(image).__name__}; videos are not supported: give single frames "
                         "as images")
    longer, shorter = max(image.size), min(image.size)
    if longer > _MAX_ASPECT_RATIO * shorter:
        raise ValueError(f"an image of {image.width} x {image.height} pixels is too extreme: its longer side may be at "
                         f"most {_MAX_ASPECT_RATIO} times the shorter one; crop or pad it, or drop the sample")
