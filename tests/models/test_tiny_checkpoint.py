"""Tiny checkpoints: transformers loads each family, the tokenizers keep any text, wrong sizes are refused."""

from __future__ import annotations

import json
import unicodedata

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megavg.models.tiny import TinySpec, make_tiny_checkpoint
from megavg.models.tiny_config import FAMILIES, mrope_section
from megavg.models.tiny_tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, TOKENIZER_KINDS, write_tokenizer

SMALL = {"hidden_size": 32, "num_layers": 2, "vision_depth": 2, "vision_hidden_size": 16, "vision_heads": 2}
CLASSES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
ANSWER = '<think>the red circle</think><answer>{"bbox_2d": [12, 345, 678, 901]}</answer>'


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Both kinds as AutoTokenizer reads them from a whole checkpoint."""
    from transformers import AutoTokenizer

    loaded = {}
    for kind in TOKENIZER_KINDS:
        folder = tmp_path_factory.mktemp(kind)
        make_tiny_checkpoint(folder, TinySpec("qwen2_5_vl", tokenizer=kind, **SMALL))
        loaded[kind] = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return loaded


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("tied, dtype", [(False, "float32"), (True, "bfloat16")])
def test_transformers_loads_every_parameter(tmp_path, family, tied, dtype):
    from transformers import AutoModelForImageTextToText

    spec = TinySpec(family, tie_embeddings=tied, dtype=dtype, vocab_size=600, **SMALL)
    folder = make_tiny_checkpoint(tmp_path / "tiny", spec)
    model, loading = AutoModelForImageTextToText.from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    assert type(model).__name__ == CLASSES[family]
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.get_input_embeddings().weight.shape == (600, 32)
    assert model.generation_config.eos_token_id[0] == model.config.get_text_config().eos_token_id
    assert sum(model.config.get_text_config().rope_parameters["mrope_section"]) == 4


def test_weights_are_named_as_in_released_checkpoints(tmp_path):
    from safetensors import safe_open

    prefixes = {"qwen2_vl": "model.layers.1.", "qwen2_5_vl": "model.layers.1.",
                "qwen3_vl": "model.language_model.layers.1."}
    for family, prefix in prefixes.items():
        folder = make_tiny_checkpoint(tmp_path / family, TinySpec(family, **SMALL))
        with safe_open(folder / "model.safetensors", "pt") as weights:
            names = set(weights.keys())
        assert prefix + "self_attn.q_proj.weight" in names
        assert "lm_head.weight" in names


def test_qwen3_head_dim_is_free_and_deepstack_fits_the_layers(tmp_path):
    spec = TinySpec("qwen3_vl", head_dim=24, **{**SMALL, "num_layers": 1})
    config = json.loads((make_tiny_checkpoint(tmp_path / "tiny", spec) / "config.json").read_text())
    assert config["text_config"]["head_dim"] == 24
    assert config["vision_config"]["deepstack_visual_indexes"] == [0]


def test_same_specification_gives_the_same_bytes(tmp_path):
    for kind in TOKENIZER_KINDS:
        one = make_tiny_checkpoint(tmp_path / f"{kind}-1", TinySpec("qwen3_vl", tokenizer=kind, **SMALL))
        two = make_tiny_checkpoint(tmp_path / f"{kind}-2", TinySpec("qwen3_vl", tokenizer=kind, **SMALL))
        names = sorted(path.name for path in one.iterdir())
        assert names == sorted(path.name for path in two.iterdir())
        assert [name for name in names if (one / name).read_bytes() != (two / name).read_bytes()] == []


def test_the_seed_changes_the_weights_and_the_callers_generator_stays(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = make_tiny_checkpoint(tmp_path / "1", TinySpec("qwen3_vl", seed=1, **SMALL))
    assert torch.equal(torch.rand(3), expected)
    two = make_tiny_checkpoint(tmp_path / "2", TinySpec("qwen3_vl", seed=2, **SMALL))
    assert (one / "model.safetensors").read_bytes() != (two / "model.safetensors").read_bytes()
    assert (one / "tokenizer.json").read_bytes() == (two / "tokenizer.json").read_bytes()


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_bpe_keeps_any_text(tokenizers, text):
    decoded = tokenizers["bpe"].decode(encode(tokenizers["bpe"], text), clean_up_tokenization_spaces=False)
    assert decoded == unicodedata.normalize("NFC", text)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_sentencepiece_keeps_any_text(tokenizers, text):
    tokenizer = tokenizers["sentencepiece"]
    decoded = tokenizer.decode(encode(tokenizer, text), clean_up_tokenization_spaces=False)
    assert decoded == text.replace("\u2581", " ")


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.text(), st.text(alphabet='abcdet hilr0129[]{}",:<>/_ \n')))
def test_sentencepiece_json_equals_the_model_file(tokenizers, text):
    import sentencepiece

    assume("<unk>" not in text)  # a control token of the vocabulary; the processor refuses it in a text
    tokenizer = tokenizers["sentencepiece"]
    model = sentencepiece.SentencePieceProcessor(model_file=f"{tokenizer.name_or_path}/tokenizer.model")
    assert encode(tokenizer, text) == model.encode(text)


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_special_tokens_and_digits(tokenizers, kind):
    tokenizer = tokenizers[kind]
    for token in SPECIAL_TOKENS:
        assert encode(tokenizer, f"a{token}b")[1:-1] == [tokenizer.convert_tokens_to_ids(token)]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    pieces = tokenizer.convert_ids_to_tokens(encode(tokenizer, ANSWER))
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == list("2") + list("12345678901")
    assert len(pieces) < len(ANSWER) * 0.8, "the corpus should have taught some words of an answer"
    marked = "<|box_start|>(1,2),(30,44)<|box_end|> next"
    assert tokenizer.decode(encode(tokenizer, marked)) == marked


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_chat_template(tokenizers, kind):
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]}
    rendered = tokenizers[kind].apply_chat_template(
        [{"role": "system", "content": "Be brief."}, turn], tokenize=False, add_generation_prompt=True
    )
    assert tokenizers[kind].chat_template == CHAT_TEMPLATE
    assert rendered == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Where?"
        "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_vocabulary_larger_than_the_tokenizer(tmp_path):
    tokenizer = write_tokenizer(tmp_path, "bpe", 100_000)
    assert 500 < len(tokenizer) < 2000
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


@pytest.mark.parametrize("kind, smallest", [("bpe", 270), ("sentencepiece", 371)])
def test_the_smallest_vocabulary(tmp_path, kind, smallest):
    assert len(write_tokenizer(tmp_path, kind, smallest)) == smallest
    with pytest.raises(ValueError, match=f"vocab_size={smallest - 1}"):
        write_tokenizer(tmp_path, kind, smallest - 1)


@pytest.mark.parametrize("options, message", [
    ({"family": "qwen2_5"}, "did you mean 'qwen2_5_vl'"),
    ({"tokenizer": "wordpiece"}, "tokenizer='wordpiece' does not exist"),
    ({"dtype": "float16"}, "dtype='float16' does not exist"),
    ({"hidden_size": 30}, "hidden_size=30 is not divisible by num_heads=4"),
    ({"num_kv_heads": 3}, "num_heads=4 is not divisible by num_kv_heads=3"),
    ({"hidden_size": 36}, "head_dim=9 must be even"),
    ({"head_dim": 64}, "only qwen3_vl has a free one"),
    ({"vision_hidden_size": 20}, "not divisible by 4 \\* vision_heads = 16"),
    ({"num_layers": 0}, "num_layers=0 must be at least 1"),
    ({"min_pixels": 0}, "min_pixels=0 must be at least 1"),
    ({"min_pixels": 5000, "max_pixels": 4000}, "min_pixels=5000 is more than max_pixels=4000"),
])
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TinySpec(**{"family": "qwen2_5_vl", **options})


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("head_dim", [8, 10, 32, 64, 128])
def test_mrope_section_covers_half_a_head(family, head_dim):
    section = mrope_section(family, head_dim)
    assert sum(section) == head_dim // 2 and min(section) >= 1
    assert 3 * section[1] <= head_dim // 2 or family != "qwen3_vl", "interleaving takes every third frequency"


@pytest.mark.parametrize("family, released", [("qwen2_vl", [16, 24, 24]), ("qwen3_vl", [24, 20, 20])])
def test_mrope_section_of_released_models(family, released):
    assert mrope_section(family, 128) == released


def test_an_existing_folder_is_only_overwritten_on_request(tmp_path):
    spec = TinySpec("qwen2_vl", **SMALL)
    folder = make_tiny_checkpoint(tmp_path / "tiny", spec)
    (folder / "stale.txt").write_text("old")
    with pytest.raises(ValueError, match="--overwrite"):
        make_tiny_checkpoint(folder, spec)
    make_tiny_checkpoint(folder, spec, overwrite=True)
    assert not (folder / "stale.txt").exists()
    other = tmp_path / "photos"
    other.mkdir()
    (other / "one.jpg").write_bytes(b"1")
    with pytest.raises(ValueError, match="no checkpoint"):
        make_tiny_checkpoint(other, spec, overwrite=True)
    assert (other / "one.jpg").read_bytes() == b"1"


def test_a_failure_leaves_nothing_and_spares_the_old_checkpoint(tmp_path):
    spec = TinySpec("qwen2_vl", **SMALL)
    folder = make_tiny_checkpoint(tmp_path / "tiny", spec)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="too small"):
        make_tiny_checkpoint(folder, TinySpec("qwen2_vl", vocab_size=100, **SMALL), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    assert (folder / "model.safetensors").read_bytes() == before
