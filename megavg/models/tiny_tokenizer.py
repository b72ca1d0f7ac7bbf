"""Train a small Qwen-style tokenizer on text made on the spot: byte-level BPE or SentencePiece, no download."""

from __future__ import annotations

import io
import json
import random
import string
from collections.abc import Iterator
from pathlib import Path

TOKENIZER_KINDS = ("bpe", "sentencepiece")

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)
"""The strings of Qwen2-VL's special tokens, in the order of their ids."""

MIN_BPE_SIZE = 256 + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_COLOURS = "red green blue yellow orange purple black white grey brown pink cyan".split()
_SHAPES = "circle square triangle star rectangle ellipse diamond cross hexagon ring".split()
_PLACES = ("on the left", "on the right", "at the top", "at the bottom", "in the middle", "next to the largest one")
_WIDGETS = "button icon link menu tab search box input field checkbox slider logo title toolbar image dialog".split()
_ACTIONS = "open close save delete edit cancel submit settings home back next login share download help".split()
_PROMPTS = (
    "Locate {} in the image and give its bounding box.",
    "Where is {}? Answer with the coordinates of the box in JSON.",
    "Outline the position of {} and output all the coordinates in JSON format.",
    "Find {}. First think about it between <think> and </think>, then answer between <answer> and </answer>.",
)


def grounding_corpus(num_lines: int = 3000, seed: int = 0) -> Iterator[str]:
    """Make ``num_lines`` lines of grounding prompts and answers; the same seed makes the same lines."""
    rng = random.Random(seed)
    yield string.printable
    for _ in range(num_lines):
        target = rng.choice((_drawn_target, _screen_target))(rng)
        x0, y0, x1, y1 = (rng.randrange(1000) for _ in range(4))
        box = json.dumps({"bbox_2d": [x0, y0, x1, y1]})
        labelled = json.dumps([{"bbox_2d": [x0, y0, x1, y1], "label": target}])
        yield "user\n" + rng.choice(_PROMPTS).format(target)
        yield rng.choice((
            f"assistant\n{box}",
            f"assistant\n```json\n{labelled}\n```",
            f"<think>I see {target} {rng.choice(_PLACES)}.</think><answer>{box}</answer>",
            f"({x0},{y0}),({x1},{y1})",
        ))


def _drawn_target(rng: random.Random) -> str:
    target = f"the {rng.choice(_COLOURS)} {rng.choice(_SHAPES)}"
    return f"{target} {rng.choice(_PLACES)}" if rng.random() < 0.3 else target


def _screen_target(rng: random.Random) -> str:
    return f'the "{rng.choice(_ACTIONS)}" {rng.choice(_WIDGETS)}'


def write_tokenizer(folder: Path, kind: str, max_size: int):
    """Train a tokenizer of at most ``max_size`` tokens into ``folder`` and return it as transformers loads it.

    Args:
        folder: an existing folder; gets tokenizer.json, tokenizer_config.json (with the chat template) and, for
            ``sentencepiece``, tokenizer.model.
        kind: ``bpe`` (byte-level, with Qwen2's splitting rule: every digit is a token, text is brought to NFC first)
            or ``sentencepiece`` (unigram with byte fallback; U+2581 stands for the space and reads back as one).
        max_size: special tokens included. The corpus gives a few hundred tokens, so that the result may be smaller;
            a model's rows beyond it are padding.

    Raises:
        ValueError: unknown kind, or ``max_size`` too small for the bytes and special tokens.
    """
    if kind not in TOKENIZER_KINDS:
        raise ValueError(f"tokenizer={kind!r} does not exist; use one of {', '.join(TOKENIZER_KINDS)}")
    tokenizer = _train_bpe(max_size) if kind == "bpe" else _train_sentencepiece(folder, max_size)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    return tokenizer


def _train_bpe(max_size: int):
    from tokenizers import pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    if max_size < MIN_BPE_SIZE:
        raise ValueError(f"vocab_size={max_size} is too small for a byte-level tokenizer: 256 bytes and "
                         f"{len(SPECIAL_TOKENS)} special tokens need at least {MIN_BPE_SIZE}")
    backend = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=max_size - len(SPECIAL_TOKENS), show_progress=False, special_tokens=[],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(grounding_corpus(), trainer)
    model = json.loads(backend.to_str())["model"]
    # As in Qwen's own tokenizers the special tokens follow the ordinary ones.
    vocab = model["vocab"] | {token: len(model["vocab"]) + i for i, token in enumerate(SPECIAL_TOKENS)}
    return Qwen2Tokenizer(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]], **_roles())


def _train_sentencepiece(folder: Path, max_size: int):
    import sentencepiece
    from transformers import PreTrainedTokenizerFast

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=grounding_corpus(), model_writer=model, vocab_size=max_size, hard_vocab_limit=False,
            model_type="unigram", byte_fallback=True, split_digits=True, character_coverage=1.0,
            user_defined_symbols=list(SPECIAL_TOKENS), unk_id=0, bos_id=-1, eos_id=-1, pad_id=-1, num_threads=1,
            # Nothing is trimmed, folded or put in front, so that decoding gives the text back.
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False, minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"vocab_size={max_size} does not suit the SentencePiece tokenizer, which holds 256 bytes, "
                         f"{len(SPECIAL_TOKENS)} special tokens and every character of the corpus ({error}); "
                         "use 512 or more") from error
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return PreTrainedTokenizerFast(tokenizer_object=_unigram(processor), unk_token="<unk>", **_roles())


def _unigram(processor):
    """The same unigram model for the tokenizers library, which is what transformers runs."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.get_piece_size())]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=processor.unk_id(), byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def _roles() -> dict:
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return {**named, "extra_special_tokens": list(SPECIAL_TOKENS), "model_max_length": 32768}
