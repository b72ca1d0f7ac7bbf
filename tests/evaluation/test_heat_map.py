"""The page of coloured tokens: what stands in it is escaped, every number is shown, and dark text can be read on it."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import pytest

from megavg.evaluation.heat_map import HIGH, INK, LOW, MIDDLE, NEGATIVE, UNKNOWN, ZERO, heat_map_html

EVIL = '<script>alert("1")</script>'


class Reader(HTMLParser):
    """Elements with attributes, and the text of every token; fails where a tag is not closed."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.tokens: list[list] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "input", "img"):
            self.open.append(tag)
        if tag == "span" and (dict(attributes).get("class") or "").split()[:1] == ["t"]:
            self.tokens.append([dict(attributes), ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "span" and "article" in self.open:
            self.tokens[-1][1] += data
        self.text += data


def answer(tokens, title="t", **changes) -> dict:
    values = {"entropy": [0.1 * i for i in range(len(tokens))], "advantage": [(-1.0) ** i for i in range(len(tokens))]}
    return {"title": title, "tokens": tokens, "values": values, **changes}


def test_text_is_escaped_and_nothing_is_loaded():
    image = 'data:image/png;base64,AA"onload="x'
    page = heat_map_html([answer([EVIL, "&amp;", "a\nb", "", "\x1b\x00", "\ud800"], EVIL, subtitle=EVIL,
                                 kinds=[EVIL] * 6, image=image)], EVIL)
    assert "<script" not in page and "javascript:" not in page
    read = Reader(page)
    assert not {tag for tag, _ in read.elements} & {"script", "link", "iframe", "object"}
    assert {name for _, attributes in read.elements for name in attributes}.isdisjoint({"onload", "onclick", "href"})
    assert [a["src"] for tag, a in read.elements if tag == "img"] == [image]
    texts = [text for _, text in read.tokens]
    assert texts[:4] == [EVIL, "&amp;", "a\u21b5\nb", "\u2205"] and texts[4] == "\u241b\u2400" and texts[5] == "?"
    assert read.text.count(EVIL) == 5, "title, heading, title and subtitle of the answer, token"
    assert read.tokens[0][0]["data-tip"].startswith(f"{EVIL!r}  {EVIL}")
    assert not re.search(r"https?:|url\(|@import|src=\"(?!data:)", page)
    page.encode("utf-8")


def test_every_number_of_every_token_is_shown():
    answers = [answer(["a", "b", "c"], reward=0.125, kinds=["think", "digits", "format"], selected=[1, 0, 1]),
               answer(["d"], "second", subtitle="under")]
    answers[0]["values"]["entropy"] = [0.123456, 2.0, 1e-9]
    read = Reader(heat_map_html(answers, "heading"))
    tips = [attributes["data-tip"].split("\n") for attributes, _ in read.tokens]
    assert tips == [["'a'  think  selected", "entropy 0.1235 nats", "advantage 1"],
                    ["'b'  digits", "entropy 2 nats", "advantage -1"],
                    ["'c'  format  selected", "entropy 1e-09 nats", "advantage 1"],
                    ["'d'", "entropy 0 nats", "advantage 1"]]
    assert [attributes["class"] for attributes, _ in read.tokens] == ["t think selected", "t digits",
                                                                      "t format selected", "t"]
    for word in ("reward 0.125", "3 tokens", "2 selected", "second", "under", "heading"):
        assert word in read.text
    radios = [a for tag, a in read.elements if tag == "input"]
    assert len(radios) == 2 and ["checked" in a for a in radios] == [True, False]


def test_the_scale_is_one_for_the_page_and_its_ends_are_named():
    answers = [answer(["a", "b", "c"]), answer(["d", "e"])]
    answers[0]["values"] = {"entropy": [0.5, 1.0, math.nan], "advantage": [-1.0, 0.0, 0.5], "weight": [1.0, 1.0, 1.0]}
    answers[1]["values"] = {"entropy": [2.5, 1.5], "advantage": [0.5, math.inf], "weight": [1.0, 1.0]}
    read = Reader(heat_map_html(answers, "h"))
    colors = [dict(part.split(":") for part in attributes["style"].split(";")) for attributes, _ in read.tokens]

    def css(color):
        return "#%02x%02x%02x" % color

    assert [c["--c0"] for c in colors] == [css(LOW), css(tuple(round((a + b) / 2) for a, b in zip(LOW, MIDDLE))),
                                           css(UNKNOWN), css(HIGH), css(MIDDLE)]
    half = css(tuple(round((a + b) / 2) for a, b in zip(ZERO, HIGH)))
    assert [c["--c1"] for c in colors] == [css(NEGATIVE), css(ZERO), half, half, css(UNKNOWN)]
    assert {c["--c2"] for c in colors} == {css(LOW)}
    text = " ".join(read.text.split())
    assert "0.5 2.5 nats" in text and "-1 1 (values -1 to 0.5)" in text and "1 everywhere" in text


def test_underlines_only_where_a_choice_was_made():
    assert "Every token is selected" in heat_map_html([answer(["a", "b"], selected=[True, True])], "h")
    everything = Reader(heat_map_html([answer(["a", "b"], selected=[True, True])], "h"))
    assert not any("selected" in attributes["class"] for attributes, _ in everything.tokens)
    nothing = heat_map_html([answer(["a", "b"], selected=[False, False])], "h")
    assert "0 selected" in nothing and "are underlined" in nothing


def luminance(color) -> float:
    """Relative luminance by WCAG 2."""
    parts = [c / 255 for c in color]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("color", [LOW, MIDDLE, HIGH, NEGATIVE, ZERO, UNKNOWN])
def test_dark_text_can_be_read_on_every_colour(color):
    """Contrast above 4.5; what lies between two colours is no darker than both in each channel."""
    assert (luminance(color) + 0.05) / (luminance(INK) + 0.05) > 4.5
    assert "color: rgb%s;" % str(INK) in heat_map_html([answer(["a"])], "h")


@pytest.mark.parametrize("changes, words", [
    ({"selected": [True]}, "expected 2 selected, one a token, got 1"), ({"kinds": []}, "expected 2 kinds"),
    ({"values": {"entropy": [1.0], "advantage": [1.0, 2.0]}}, "expected 2 entropy"),
    ({"values": {"advantage": [1.0, 2.0]}}, "expected the quantities"),
    ({"image": "https://example.org/a.png"}, "must be a data URI")])
def test_wrong_answers_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        heat_map_html([answer(["x", "y"]), answer(["a", "b"], **changes)], "h")


def test_no_answer_is_refused():
    with pytest.raises(ValueError, match="at least one answer"):
        heat_map_html([], "h")
