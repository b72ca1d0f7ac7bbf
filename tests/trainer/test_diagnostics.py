"""Kinds of tokens, figures and histograms by kind against slow loops, and the pages that a step writes."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

from megavg.models.processor import Processor
from megavg.protocols.batch import DIGITS, FORMAT, THINK, PerturbedScores, PolicySignal, RolloutBatch, TokenScores
from megavg.protocols.sample import Sample
from megavg.rewards.base import load_rewards
from megavg.trainer.diagnostics import diagnose, histograms, kind_metrics, token_page
from megavg.trainer.rollouts import Rollouts, encode, judge
from megavg.trainer.run_folder import WRITTEN, remove_run
from megavg.trainer.run_log import RunLog
from megavg.trainer.token_kinds import TokenKinds, kinds
from tests.rollout_batches import on_ranks

LETTERS = {THINK: "T", DIGITS: "D", FORMAT: "F"}


def letters(texts, digits=None) -> str:
    digits = [text.isdigit() for text in texts] if digits is None else digits
    return "".join(LETTERS[kind] for kind in kinds(texts, digits))


@pytest.mark.parametrize("texts, expected", [
    (["<think>", "a", "1", "</think>", "1", " x"], "FTTFDF"),
    (["bbox", "_", "2", "d", "[", "1", "2", ",", "3"], "FFFFFDDFD"),
    (["a1", "2", "x ", "4"], "FFFD"),
    (["<", "th", "ink", ">", "a", "2", "</", "think", ">", "3"], "FFFFTTFFFD"),
    (["<think", ">I", " see", ".</", "think><", "answer>"], "FFTFFF"),
    (["1", "<think>", "a", "3"], "DFTT"),
    (["<think>", "a", "</think>", "4", "<think>", "5", "</think>"], "FTFDFTF"),
    (["<think>", "<think>", "a", "</think>", "b", "</think>"], "FTTFFF"),
    (["</think>", "5", "<thin", "k", " 5"], "FDFFF"),
    (["<think>", "</think>", "6"], "FFD"),
    (["<think>", "a\n", "\n", "", "\ufffd", "</think>", "", "7"], "FTTTTFFD"),
    ([], ""),
])
def test_kinds(texts, expected):
    assert letters(texts) == expected


def slow_kinds(text: str, lengths: list[int], digits: list[bool]) -> list[int]:
    """Walk through the characters with a flag, then look at each token's characters."""
    marks, inside, i = [], False, 0
    while i < len(text):
        tag = "</think>" if inside else "<think>"
        if text.startswith(tag, i):
            marks += ["tag"] * len(tag)
            i, inside = i + len(tag), not inside
        else:
            marks.append("in" if inside else "out")
            i += 1
    found, start = [], 0
    for length, digit in zip(lengths, digits):
        part = set(marks[start:start + length])
        found.append(THINK if part == {"in"} else DIGITS if digit and stands_alone(text, start) else FORMAT)
        start += length
    return found


def stands_alone(text: str, place: int) -> bool:
    """Whether the run of digits around ``place`` touches no letter and no underscore."""
    first = last = place
    while first and text[first - 1].isdigit():
        first -= 1
    while last + 1 < len(text) and text[last + 1].isdigit():
        last += 1
    around = text[max(first - 1, 0):first] + text[last + 1:last + 2]
    return not any(c.isalpha() or c == "_" for c in around)


def test_kinds_of_text_that_is_cut_anywhere():
    rng = random.Random(0)
    seen = set()
    for _ in range(3000):
        text = "".join(rng.choice(["<think>", "</think>", "ab ", "17", "<", "think>", "</"]) for _ in range(8))
        cuts = [0, *sorted(rng.sample(range(1, len(text)), min(6, len(text) - 1))), len(text)]
        texts = [text[a:b] for a, b in zip(cuts, cuts[1:])]
        digits = [part.isdigit() for part in texts]
        expected = slow_kinds(text, [len(part) for part in texts], digits)
        assert kinds(texts, digits) == expected, texts
        seen |= set(expected)
    assert seen == {THINK, DIGITS, FORMAT}


@pytest.fixture(scope="module", params=["bpe", "sentencepiece"])
def processor(request, checkpoints) -> Processor:
    if request.param == "bpe":
        return Processor.from_pretrained(checkpoints("qwen3_vl"), "json_relative_1000")
    return Processor.from_pretrained(checkpoints("qwen2_vl", tokenizer="sentencepiece", vocab_size=700),
                                     "tokens_relative_1000")


ANSWER = '<think>I see 3 gr\u00fcne \u4e2d\U0001f600 <b>.</think><answer>{"bbox_2d": [1, 22, 333, 440]}</answer>'


def test_kinds_of_a_real_tokenizer(processor):
    reader, ids = TokenKinds(processor), processor.encode_answer(ANSWER)
    found, texts = reader.of(ids), [reader.text(token) for token in ids]
    assert len(found) == len(ids)
    assert not any("<think>" == text for text in texts), "this tokenizer spreads the tag over several tokens"
    thought = "".join(text for text, kind in zip(texts, found) if kind == THINK)
    assert "see" in thought and "3" in thought and "think" not in thought and "\ufffd" in thought
    assert "".join(text for text, kind in zip(texts, found) if kind == DIGITS) == "122333440"
    assert found[0] == found[-1] == FORMAT
    padded = reader.batch([ids, ids[:5], []], len(ids) + 2)
    assert padded.dtype == torch.int8 and padded.shape == (3, len(ids) + 2)
    assert padded[0].tolist() == found + [FORMAT] * 2 and padded[1, :5].tolist() == reader.of(ids[:5])
    assert padded[2].eq(FORMAT).all() and padded[1, 5:].eq(FORMAT).all()


def example(seed=0, rows=8, width=9, perturbed=True):
    """A batch with its scores and signal; padding holds rubbish that must not be counted."""
    generator = torch.Generator().manual_seed(seed)

    def numbers():
        return torch.rand(rows, width, generator=generator) * 3

    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    mask = torch.arange(width)[None] < lengths
    batch = RolloutBatch(torch.zeros(rows, width, dtype=torch.int64), mask, torch.zeros(rows), 2,
                         token_kinds=torch.randint(0, 3, (rows, width), generator=generator).to(torch.int8))
    scores = PerturbedScores(*(numbers() for _ in range(4))) if perturbed else None
    stats = TokenScores(-numbers(), numbers().where(mask, float("nan")), perturbed=scores)
    weights = (numbers() > 1.5).float() * mask
    signal = PolicySignal(numbers() - 1, numbers(), weights, stats.logprobs, None, mask, numbers())
    return batch, stats, signal


def slow_values(batch, stats, signal) -> dict[str, dict[int, list[float]]]:
    """quantity -> kind -> values of the valid tokens, one by one."""
    found = {name: {kind: [] for kind in LETTERS} for name in
             ("entropy", "self_information", "weight", "advantage", "jsd", "selected")}
    for b in range(batch.mask.shape[0]):
        for t in range(batch.mask.shape[1]):
            if batch.mask[b, t]:
                kind = int(batch.token_kinds[b, t])
                found["entropy"][kind].append(float(stats.entropy[b, t]))
                found["self_information"][kind].append(-float(stats.logprobs[b, t]))
                found["weight"][kind].append(float(signal.weights[b, t]))
                found["advantage"][kind].append(float(signal.advantages[b, t]))
                found["selected"][kind].append(float(signal.weights[b, t] != 0))
                if stats.perturbed is not None:
                    found["jsd"][kind].append(float(stats.perturbed.jsd[b, t]))
    return found


NAMES = {THINK: "think", DIGITS: "digits", FORMAT: "format"}


@pytest.mark.parametrize("perturbed", [True, False])
def test_figures_by_kind(perturbed):
    batch, stats, signal = example(perturbed=perturbed)
    slow = slow_values(batch, stats, signal)
    expected = {f"{name}/{NAMES[kind]}": math.fsum(values) / len(values)
                for name in ("entropy", "self_information", "jsd", "selected")
                for kind, values in slow[name].items() if values}
    assert len(expected) == 3 * (4 if perturbed else 3)
    assert kind_metrics(batch, stats, signal) == pytest.approx(expected)


def test_kinds_without_a_token_and_batches_without_scores():
    batch, stats, signal = example()
    batch.token_kinds = batch.token_kinds.where(batch.token_kinds != THINK, FORMAT)
    batch.token_kinds[~batch.mask] = THINK
    assert {name.split("/")[1] for name in kind_metrics(batch, stats, signal)} == {"digits", "format"}
    assert not any(name.endswith("think") for name in histograms(batch, stats, signal))
    assert set(kind_metrics(batch, None, signal)) == {"selected/digits", "selected/format"}
    assert {name.split("/")[1] for name in histograms(batch, None, signal)} == {"weight", "advantage"}
    batch.token_kinds = None
    with pytest.raises(ValueError, match="token_kinds"):
        kind_metrics(batch, stats, signal)


def test_figures_and_histograms_are_of_all_ranks():
    batch, stats, signal = example(rows=9)
    slow, figures = slow_values(batch, stats, signal), kind_metrics(batch, stats, signal)

    def on_rank(part, scores, start, stop):
        calls = []

        def counted(tensor):
            calls.append(tensor)
            return part.all_sum(tensor)

        mine = signal.rows(start, stop)
        found = kind_metrics(replace(part, all_sum=counted), scores, mine)
        assert len(calls) == 1
        return found, histograms(part, scores, mine)

    for found, values in on_ranks(batch, stats, [2, 8], on_rank):
        assert found == pytest.approx(figures)
        assert len(values) == 5 * 4
        for name in ("entropy", "self_information", "weight", "advantage", "jsd"):
            for kind, expected in slow[name].items():
                assert sorted(values[f"tokens/{name}/{NAMES[kind]}"].tolist()) == pytest.approx(sorted(expected))
            everything = sorted(x for kind in LETTERS for x in slow[name][kind])
            assert sorted(values[f"tokens/{name}/all"].tolist()) == pytest.approx(everything)


def answered(processor, rewards=True):
    """Two prompts with two written answers each, and numbers for their tokens."""
    pictures = [Image.new("RGB", (96, 64), color) for color in ("#aa0000", "#0000aa")]
    samples = [Sample(f"s{i}", "x.tar", picture, 96, 64, f"box <{i}>", ((8.0, 8.0, 40.0, 40.0),))
               for i, picture in enumerate(pictures)]
    prompts = encode(samples, processor, lambda text: f"Find {text}")
    responses = [processor.encode_answer(f"<think>it is {text}</think>[{i}0, 20, 30, 40]")
                 for i, text in enumerate(("here", "there", "nowhere & <b>", "where?"))]
    rollouts = Rollouts(samples, prompts, responses, [False] * 4, 2)
    _, stats, signal = example(3, 4, rollouts.width)
    mask = torch.tensor([[t < len(response) for t in range(rollouts.width)] for response in responses])
    stats = replace(stats, entropy=stats.entropy.nan_to_num(0.25))
    batch = RolloutBatch(torch.zeros_like(mask, dtype=torch.int64), mask, torch.zeros(4), 2,
                         token_kinds=TokenKinds(processor).batch(responses, rollouts.width))
    judgement = judge(rollouts, processor, load_rewards([{"name": "iou"}])) if rewards else None
    return rollouts, batch, stats, replace(signal, mask=mask, weights=signal.weights * mask), judgement


def spans(page: str) -> list[tuple[str, str]]:
    """(class, tip) of every token of a page."""
    return re.findall(r'<span class="(t[^"]*)" style="[^"]*" data-tip="([^"]*)">', page)


def test_the_page_shows_the_numbers_of_its_answers(processor):
    rollouts, batch, stats, signal, judgement = answered(processor)
    page = token_page("Step 7", rollouts, batch, stats, signal, judgement, TokenKinds(processor))
    found = spans(page)
    assert len(found) == sum(map(len, rollouts.responses))
    places = [(b, t) for b, response in enumerate(rollouts.responses) for t in range(len(response))]
    for (classes, tip), (b, t) in zip(found, places):
        assert classes.split()[1] == NAMES[int(batch.token_kinds[b, t])]
        assert ("selected" in classes.split()) == bool(signal.weights[b, t])
        for line in (f"entropy {stats.entropy[b, t]:.4g} nats", f"self-information {-stats.logprobs[b, t]:.4g} nats",
                     f"weight {signal.weights[b, t]:.4g}", f"advantage {signal.advantages[b, t]:.4g}",
                     f"JSD {stats.perturbed.jsd[b, t]:.4g} nats"):
            assert line in tip.split("&#10;"), (line, tip)
    assert page.count('<img src="data:image/png;base64,') == 4 and "<b>" not in page
    assert all(f"reward {reward:.4g}" in page for reward in judgement.rewards)


def test_the_page_takes_one_answer_of_each_prompt_first(processor):
    rollouts, batch, stats, signal, _ = answered(processor, rewards=False)
    page = token_page("h", rollouts, batch, None, signal, None, TokenKinds(processor), limit=3)
    assert re.findall(r"(s\d), answer (\d) of 2", page) == [("s0", "1"), ("s0", "2"), ("s1", "1")]
    page = token_page("h", rollouts, batch, None, signal, None, TokenKinds(processor), limit=2)
    assert re.findall(r"(s\d), answer (\d) of 2", page) == [("s0", "1"), ("s1", "1")]
    assert "entropy" not in page and "<img" not in page


def test_diagnose_writes_one_page_and_the_histograms(processor, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rollouts, batch, stats, signal, judgement = answered(processor)
    for writer in (False, True):
        log = RunLog(tmp_path, writer, 10, 0, 1, tensorboard=True)
        diagnose(log, 4, rollouts, batch, stats, signal, judgement, TokenKinds(processor))
        log.close()
        assert (tmp_path / "heat_maps").exists() == writer
    assert [path.name for path in (tmp_path / "heat_maps").iterdir()] == ["step-000004.html"]
    assert "Answers at step 4" in (tmp_path / "heat_maps" / "step-000004.html").read_text(encoding="utf-8")
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    tags = board.Tags()["histograms"]
    assert set(tags) == set(histograms(batch, stats, signal)) and "tokens/jsd/think" in tags
    event, = board.Histograms("tokens/entropy/all")
    assert event.step == 4 and event.histogram_value.num == batch.mask.sum()
    assert event.histogram_value.sum == pytest.approx(float(stats.entropy[batch.mask].sum()), rel=1e-5)
    assert "heat_maps" in WRITTEN
    remove_run(tmp_path)
    assert not list(tmp_path.iterdir())
