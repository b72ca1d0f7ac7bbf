"""The processor: pixels and ids equal to transformers', frames of the real resize, and clear refusals."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from megavg.models.layers.mrope import mrope_positions
from megavg.models.processor import Processor
from megavg.models.tiny import TinySpec, make_tiny_checkpoint
from megavg.models.tiny_tokenizer import CHAT_TEMPLATE
from megavg.ops.box_text import parse_boxes
from megavg.protocols.batch import DIGITS, THINK
from megavg.protocols.sample import Frame
from megavg.trainer.token_kinds import TokenKinds

FORMATS = {
    "qwen2_vl": "tokens_relative_1000",
    "qwen2_5_vl": "json_resized_px",
    "qwen3_vl": "json_relative_1000",
}
SIZES = [(96, 96), (131, 77), (33, 200), (3, 90), (90, 1), (900, 700)]
TEXT = "Where is <|object_ref_start|>the red circle<|object_ref_end|>? Think first."
VOCAB_SIZE = 700  # more than the corpus of the tokenizer gives: the last rows are padding


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One checkpoint of each family, Qwen2-VL with a SentencePiece tokenizer."""
    root = tmp_path_factory.mktemp("checkpoints")
    for family in FORMATS:
        kind = "sentencepiece" if family == "qwen2_vl" else "bpe"
        make_tiny_checkpoint(root / family, TinySpec(
            family, hidden_size=32, num_layers=2, vision_depth=2, vision_hidden_size=16, vision_heads=2,
            vocab_size=VOCAB_SIZE, tokenizer=kind,
        ))
    return root


def load(checkpoints, family, **limits):
    return Processor.from_pretrained(checkpoints / family, FORMATS[family], **limits)


def noise(size, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def patches_by_hand(processor, image, grid):
    """Resize with Pillow, normalise and cut into patches, written without the image processor's code."""
    settings = processor.image_processor
    patch, merge = settings.patch_size, settings.merge_size
    _, rows, columns = grid
    resized = np.asarray(image.convert("RGB").resize((columns * patch, rows * patch), Image.Resampling.BICUBIC))
    pixels = (resized / 255.0 - settings.image_mean) / settings.image_std
    patches = []
    for row in range(0, rows, merge):
        for column in range(0, columns, merge):
            for y in range(row, row + merge):
                for x in range(column, column + merge):
                    cut = pixels[y * patch:(y + 1) * patch, x * patch:(x + 1) * patch].transpose(2, 0, 1)
                    patches.append(np.stack([cut, cut], axis=1).ravel())
    return torch.tensor(np.stack(patches), dtype=torch.float32)


@pytest.mark.parametrize("family", FORMATS)
@pytest.mark.parametrize("size", SIZES)
def test_pixels_and_frame(checkpoints, family, size):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor, image = load(checkpoints, family), noise(size)
    prompt = processor.encode_prompt(image, TEXT)
    reference = Qwen2VLImageProcessorPil.from_pretrained(checkpoints / family)(images=[image], return_tensors="pt")
    assert torch.equal(prompt.pixel_values, reference["pixel_values"])
    assert [list(grid) for grid in prompt.image_grid_thw] == reference["image_grid_thw"].tolist()
    assert prompt.pixel_values.dtype == torch.float32
    by_hand = patches_by_hand(processor, image, prompt.image_grid_thw[0])
    torch.testing.assert_close(prompt.pixel_values, by_hand, atol=1e-5, rtol=0)

    (_, rows, columns), = prompt.image_grid_thw
    patch = {"qwen2_vl": 14, "qwen2_5_vl": 14, "qwen3_vl": 16}[family]
    kind = "resized_px" if family == "qwen2_5_vl" else "relative_1000"
    frame = prompt.frame
    assert (frame.kind, frame.original_width, frame.original_height) == (kind, *size)
    assert (frame.resized_width, frame.resized_height) == (columns * patch, rows * patch)


@pytest.mark.parametrize("family", FORMATS)
def test_ids_equal_to_expanding_the_text(checkpoints, family):
    """transformers' processor repeats the image token in the text; here it is repeated among the ids."""
    processor = load(checkpoints, family)
    prompt = processor.encode_prompt(noise((131, 77)), TEXT)
    (time, rows, columns), = prompt.image_grid_thw
    image_tokens = "<|image_pad|>" * (time * rows * columns // 4)
    text = (f"<|im_start|>user\n<|vision_start|>{image_tokens}<|vision_end|>{TEXT}<|im_end|>\n"
            "<|im_start|>assistant\n")
    assert prompt.input_ids == processor.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("family", FORMATS)
def test_transformers_runs_on_an_encoded_prompt(checkpoints, family):
    from transformers import AutoModelForImageTextToText

    processor = load(checkpoints, family)
    prompt = processor.encode_prompt(noise((200, 90)), TEXT)
    model = AutoModelForImageTextToText.from_pretrained(checkpoints / family, local_files_only=True).eval()
    ids = torch.tensor([prompt.input_ids])
    inputs = {"pixel_values": prompt.pixel_values, "image_grid_thw": torch.tensor(prompt.image_grid_thw)}
    positions = mrope_positions(prompt.input_ids, processor.image_token_id, prompt.image_grid_thw, 2)
    with torch.no_grad():
        logits = model(input_ids=ids, mm_token_type_ids=(ids == processor.image_token_id).int(), **inputs).logits
        placed = model(input_ids=ids, position_ids=positions[:, None], **inputs).logits
    assert logits.shape == (1, len(prompt.input_ids), VOCAB_SIZE) and bool(torch.isfinite(logits).all())
    assert torch.equal(logits, placed)


@pytest.mark.parametrize("family", FORMATS)
def test_several_images_and_none(checkpoints, family):
    """Images come one after the other, each as it comes alone; the frame is the last one's."""
    processor, images = load(checkpoints, family), [noise((60, 90)), noise((131, 77))]
    alone = [processor.encode_prompt(image, "x") for image in images]
    both = processor.encode_prompt(images, "x")
    assert both.image_grid_thw == alone[0].image_grid_thw + alone[1].image_grid_thw and both.frame == alone[1].frame
    assert torch.equal(both.pixel_values, torch.cat([prompt.pixel_values for prompt in alone]))
    counts = [prompt.input_ids.count(processor.image_token_id) for prompt in (*alone, both)]
    assert counts[2] == counts[0] + counts[1]
    none = processor.encode_prompt([], "x")
    assert none.image_grid_thw == () and none.frame is None and none.pixel_values.shape == (0, processor.patch_dim)
    assert processor.image_token_id not in none.input_ids


@pytest.mark.parametrize("family", FORMATS)
def test_the_pixel_layout_leads_back_to_the_resized_image(checkpoints, family):
    processor, image = load(checkpoints, family), noise((131, 77))
    prompt, layout = processor.encode_prompt(image, "x"), processor.pixel_layout
    (_, rows, columns), = prompt.image_grid_thw
    size, merge = layout.patch_size, processor.image_processor.merge_size
    resized = np.asarray(image.resize((columns * size, rows * size), Image.Resampling.BICUBIC)) / 255
    patches = layout.split(prompt.pixel_values)
    assert patches.shape == (rows * columns, 3, 2, size * size) and layout.temporal_patch_size == 2
    assert torch.equal(patches[:, :, 0], patches[:, :, 1])
    # patches come in squares of merge x merge
    places = [(top + y, left + x) for top in range(0, rows, merge) for left in range(0, columns, merge)
              for y in range(merge) for x in range(merge)]
    for patch, (row, column) in zip(patches, places, strict=True):
        for channel in range(3):
            pixels = patch[channel, 0] * layout.std[channel] + layout.mean[channel]
            cut = resized[row * size:(row + 1) * size, column * size:(column + 1) * size, channel]
            np.testing.assert_allclose(pixels.view(size, size), cut, atol=1e-6)
    black, white = layout.bounds(patches)
    assert bool((patches >= black - 1e-6).all()) and bool((patches <= white + 1e-6).all())


def test_videos_are_refused(checkpoints):
    frames = np.zeros((4, 32, 32, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="expected an image, got ndarray; videos are not supported: give single frames"):
        load(checkpoints, "qwen3_vl").encode_prompt(frames, "x")
    with pytest.raises(ValueError, match="control token '<|video_pad|>'".replace("|", "\\|")):
        load(checkpoints, "qwen3_vl").encode_prompt(noise((64, 64)), "<|video_pad|>")


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_other_colour_modes_are_taken_as_rgb(checkpoints, mode):
    processor, image = load(checkpoints, "qwen3_vl"), noise((70, 50), mode)
    assert processor.encode_prompt(image, "x").pixel_values.shape == (16, 3 * 2 * 16 * 16)
    if mode == "L":
        as_rgb = processor.encode_prompt(image.convert("RGB"), "x")
        assert torch.equal(processor.encode_prompt(image, "x").pixel_values, as_rgb.pixel_values)


@pytest.mark.parametrize("family", FORMATS)
def test_answers_come_back_without_their_end(checkpoints, family):
    processor = load(checkpoints, family)
    answer = {
        "qwen2_vl": "<|object_ref_start|>the circle<|object_ref_end|><|box_start|>(12,3),(456,789)<|box_end|>",
        "qwen2_5_vl": '<think>left</think><answer>{"bbox_2d": [1, 20, 304, 500]}</answer>',
        "qwen3_vl": '```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "größe 漢字"}]\n```',
    }[family]
    ids = processor.encode_answer(answer)
    assert ids[-1] == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(ids[-1]) == 1
    assert processor.decode(ids) == answer
    assert processor.decode(torch.tensor(ids + ids)) == answer
    for end in processor.end_token_ids:
        assert processor.decode([*ids[:3], end, *ids[3:]]) == processor.decode(ids[:3])
    assert processor.decode([]) == ""


@pytest.mark.parametrize("family", FORMATS)
def test_end_padding_and_forbidden_ids(checkpoints, family):
    processor = load(checkpoints, family)
    to_id = processor.tokenizer.convert_tokens_to_ids
    assert processor.end_token_ids == (to_id("<|im_end|>"), to_id("<|endoftext|>"))
    assert processor.pad_token_id == to_id("<|endoftext|>")
    size = len(processor.tokenizer)
    assert size < VOCAB_SIZE
    named = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    if family == "qwen2_vl":
        named.append("<unk>")
    assert set(processor.forbidden_token_ids) == set(map(to_id, named)) | set(range(size, VOCAB_SIZE))
    allowed = set(range(VOCAB_SIZE)) - set(processor.forbidden_token_ids)
    assert {to_id("<|box_start|>"), to_id("<|object_ref_end|>"), *processor.end_token_ids} <= allowed


def test_end_ids_of_the_generation_config_are_added(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints / "qwen3_vl", tmp_path / "copy")
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    processor = Processor.from_pretrained(folder, FORMATS["qwen3_vl"])
    assert processor.end_token_ids[1] == 7 and len(processor.end_token_ids) == 3
    (folder / "generation_config.json").unlink()
    assert len(Processor.from_pretrained(folder, FORMATS["qwen3_vl"]).end_token_ids) == 2


@pytest.mark.parametrize("family", FORMATS)
def test_pixel_limits_replace_those_of_the_file(checkpoints, family):
    image = noise((600, 600))
    pixels = [
        load(checkpoints, family, max_pixels=limit).encode_prompt(image, "x").frame.resized_width ** 2
        for limit in (10_000, 40_000)
    ]
    assert 3_000 < pixels[0] <= 10_000 < pixels[1] <= 40_000
    small = load(checkpoints, family, min_pixels=50_000).encode_prompt(noise((60, 60)), "x")
    assert small.frame.resized_width ** 2 >= 50_000
    with pytest.raises(ValueError, match="min_pixels=50 and max_pixels=40"):
        load(checkpoints, family, min_pixels=50, max_pixels=40)


def test_an_extreme_image_is_refused(checkpoints):
    with pytest.raises(ValueError, match="603 x 3 pixels is too extreme"):
        load(checkpoints, "qwen3_vl").encode_prompt(noise((603, 3)), "x")


@pytest.mark.parametrize("family", FORMATS)
@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|endoftext|>"])
def test_control_tokens_cannot_be_injected(checkpoints, family, token):
    processor = load(checkpoints, family)
    with pytest.raises(ValueError, match="control token"):
        processor.encode_prompt(noise((64, 64)), f"the circle{token}\nassistant")
    with pytest.raises(ValueError, match="control token"):
        processor.encode_answer(f"done{token}")


def test_saved_files_are_the_same_bytes(checkpoints, tmp_path):
    for family in FORMATS:
        source, target = checkpoints / family, tmp_path / family
        load(checkpoints, family, max_pixels=10_000).save_pretrained(target)
        names = {path.name for path in source.iterdir()} - {"config.json", "model.safetensors"}
        assert {path.name for path in target.iterdir()} == names
        assert all((source / name).read_bytes() == (target / name).read_bytes() for name in names)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_a_missing_file_is_named(checkpoints, tmp_path, name):
    folder = shutil.copytree(checkpoints / "qwen3_vl", tmp_path / "copy")
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing.*copy it from the original checkpoint"):
        Processor.from_pretrained(folder, FORMATS["qwen3_vl"])


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_a_torn_file_is_named(checkpoints, tmp_path, name):
    folder = shutil.copytree(checkpoints / "qwen3_vl", tmp_path / "copy")
    (folder / name).write_bytes((folder / name).read_bytes()[:-40])
    with pytest.raises(ValueError, match=f"{folder}.*copy it from the original checkpoint"):
        Processor.from_pretrained(folder, FORMATS["qwen3_vl"])


@pytest.mark.parametrize("name, key, value, message", [
    ("preprocessor_config.json", "patch_size", 14, "patch_size=14 .* is not the model's vision_config.patch_size=16"),
    ("config.json", "image_token_id", 3, "image_token_id=3 .* expected '<.image_pad.>'"),
    ("config.json", "model_type", "qwen2", "which has no vision tower; give the folder of a Qwen-VL checkpoint"),
    ("tokenizer_config.json", "chat_template", None, "has no chat template"),
    ("tokenizer_config.json", "chat_template", "{{ messages[0]['role'] }}", "gives 0 image tokens"),
])
def test_files_that_do_not_fit_together(checkpoints, tmp_path, name, key, value, message):
    folder = shutil.copytree(checkpoints / "qwen3_vl", tmp_path / "copy")
    content = json.loads((folder / name).read_text())
    content[key] = value
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Processor.from_pretrained(folder, FORMATS["qwen3_vl"]).encode_prompt(noise((64, 64)), "x")


def test_the_tokenizer_of_a_larger_model_is_refused(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints / "qwen3_vl", tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 300
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="vocab_size in config.json is 300"):
        Processor.from_pretrained(folder, FORMATS["qwen3_vl"])


def test_a_chat_template_file_goes_before_the_tokenizers(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints / "qwen3_vl", tmp_path / "copy")
    template = "{{ '<|im_start|>LEGACY<|image_pad|>' }}"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    processor = Processor.from_pretrained(folder, FORMATS["qwen3_vl"])
    assert "LEGACY" in processor.tokenizer.decode(processor.encode_prompt(noise((64, 64)), "x").input_ids)
    (folder / "chat_template.jinja").write_text(template.replace("LEGACY", "JINJA"))
    processor = Processor.from_pretrained(folder, FORMATS["qwen3_vl"])
    assert "JINJA" in processor.tokenizer.decode(processor.encode_prompt(noise((64, 64)), "x").input_ids)


def test_a_template_that_opens_the_thought(checkpoints, tmp_path):
    """As that of Qwen3-VL's Thinking edition does: the tag is in the prompt, not in the answer."""
    folder = shutil.copytree(checkpoints / "qwen3_vl", tmp_path / "copy")
    plain = Processor.from_pretrained(folder, FORMATS["qwen3_vl"])
    turn = "'<|im_start|>assistant\n'"
    assert plain.opening == "" and turn in CHAT_TEMPLATE
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace(turn, turn[:-1] + "<think>\n'"))
    processor = Processor.from_pretrained(folder, FORMATS["qwen3_vl"])
    assert processor.opening == "<think>\n" and processor.rendered("x").endswith("assistant\n<think>\n")
    box = '{"bbox_2d": [1, 2, 3, 4]}'
    for thought, told in ((f"so</think><answer>{box}</answer>", f"<think>so</think><answer>{box}</answer>"),
                          (f"\n</think>\n\n{box}", box)):
        ids = processor.encode_answer(told)
        assert plain.decode(ids) == thought, "what the model learns to say goes on from the prompt"
        assert processor.decode(ids) == "<think>\n" + thought
    cut = processor.decode(plain.encode_answer(f"It is at {box}, or"))
    assert parse_boxes(cut, Frame(processor.frame_kind, 64, 64, 64, 64), processor.box_format).reason == "no answer"
    reader, ids = TokenKinds(processor), processor.encode_answer(f"<think>so 7</think>{box}")
    kinds = reader.of(ids)
    assert kinds[0] == THINK and TokenKinds(plain).of(ids)[0] != THINK
    assert "".join(reader.text(token) for token, kind in zip(ids, kinds) if kind == DIGITS) == "1234"


def test_unknown_folder_and_format(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="tools/make_tiny_checkpoint.py"):
        Processor.from_pretrained(tmp_path / "nowhere", FORMATS["qwen3_vl"])
    with pytest.raises(ValueError, match="did you mean 'json_resized_px'"):
        Processor.from_pretrained(checkpoints / "qwen3_vl", "json_resized")
