"""Show answers token by token on one web page that needs nothing else: each token coloured by a quantity to choose."""

from __future__ import annotations

import math
from html import escape
from typing import Sequence

LOW, MIDDLE, HIGH = (253, 246, 227), (253, 184, 99), (240, 100, 45)
NEGATIVE, ZERO = (90, 162, 224), (244, 244, 244)
UNKNOWN = (208, 208, 208)
INK = (17, 17, 17)
"""Colours (red, green, blue). Text on a token is always INK, so every background is light."""

_NAMES = {"self_information": "self-information", "jsd": "JSD"}
_UNITS = {"entropy": "nats", "self_information": "nats", "jsd": "nats"}

_STYLE = """
:root { --page: #ffffff; --card: #f6f7f9; --text: #1c2024; --faint: #5f6872; --line: #d5dae0; --accent: #1f5fae;
  color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1e2226; --text: #e7eaee; --faint: #9aa4af;
  --line: #373e46; --accent: #7fb2f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 75rem; padding: 1.5rem 1.25rem 7rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .75rem; }
h2 { font-size: 1.05rem; margin: 0; overflow-wrap: anywhere; }
.pick { position: absolute; opacity: 0; }
.bar { position: sticky; top: 0; z-index: 1; background: var(--page); padding: .6rem 0; margin-bottom: 1rem;
  border-bottom: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: .4rem 1.5rem; align-items: center; }
.bar label { display: inline-block; padding: .2rem .7rem; border: 1px solid var(--line); border-radius: 1rem;
  cursor: pointer; }
.legend { display: none; align-items: center; gap: .5rem; font-variant-numeric: tabular-nums; }
.legend i { width: 10rem; height: .9rem; border-radius: .2rem; border: 1px solid var(--line); }
.key, .facts { color: var(--faint); font-size: .9rem; }
.key { margin: 0 0 1rem; }
.facts { margin: .1rem 0 .6rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
article { display: flex; flex-wrap: wrap; gap: 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; padding: 1rem; margin-bottom: 1rem; }
article img { max-width: 14rem; align-self: flex-start; border-radius: .25rem; }
article div { flex: 1 1 22rem; min-width: 0; }
.answer { margin: 0; font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.t { color: rgb(17, 17, 17); border-radius: .2rem; padding: .12rem 0 .2rem;
  box-shadow: inset 0 0 0 .5px rgb(0 0 0 / 18%); unicode-bidi: isolate; }
.t.think { font-style: italic; }
.t.digits { font-weight: 700; }
.t.selected { box-shadow: inset 0 -2.5px rgb(17, 17, 17); }
.t:hover { outline: 2px solid var(--accent); }
.t:hover::after { content: attr(data-tip); position: fixed; left: 50%; bottom: 1rem; transform: translateX(-50%);
  z-index: 2; max-width: 92vw; padding: .5rem .9rem; border-radius: .4rem; background: #1c2024; color: #ffffff;
  font: 400 13px/1.45 ui-monospace, monospace; white-space: pre-wrap; border: 1px solid #5f6872; }
"""


def heat_map_html(answers: Sequence[dict], heading: str) -> str:
    """Make one HTML page of answers whose tokens are coloured by the quantity that the reader picks.

    The page holds no script and loads nothing; every text is escaped. Pointing at a token shows all of its numbers.
    Tokens that an algorithm selected are underlined, unless it selected every token of the page. A quantity has one
    scale for the whole page, from its smallest to its largest value, or around 0 where there are negative ones. Grey is
    no finite number.

    Args:
        answers: one dictionary each: ``title``; ``tokens``, texts; ``values``, quantity -> one number a token, the same
            quantities in every answer; and where there are any: ``subtitle``, ``reward``, ``kinds`` (format, think or
            digits) and ``selected`` (flags) of the tokens, and ``image``, a data URI.
        heading: what the page is.

    Raises:
        ValueError: no answer, lists of unequal length, other quantities than the first answer's, or an image that is
            no data URI.
    """
    if not answers:
        raise ValueError("expected at least one answer to draw, got none")
    names = list(answers[0]["values"])
    for answer in answers:
        _check(answer, names)
    scales = [_Scale(name, [x for answer in answers for x in answer["values"][name]]) for name in names]
    underline = not all(flag for answer in answers for flag in answer.get("selected") or [True])
    picks = "".join(f'<input class="pick" type="radio" name="quantity" id="q{i}"{" checked" * (i == 0)}>\n'
                    for i in range(len(names)))
    labels = "".join(f'<label for="q{i}">{escape(scale.name)}</label>\n' for i, scale in enumerate(scales))
    legends = "".join(f'<span class="legend l{i}">{scale.legend()}</span>\n' for i, scale in enumerate(scales))
    chosen = "".join(
        f"#q{i}:checked ~ main .t {{ background: var(--c{i}); }} #q{i}:checked ~ .bar .l{i} {{ display: flex; }}\n"
        f"#q{i}:checked ~ .bar label[for=q{i}] {{ background: var(--accent); color: var(--page); }}\n"
        f"#q{i}:focus-visible ~ .bar label[for=q{i}] {{ outline: 2px solid var(--text); }}\n"
        for i in range(len(names)))
    key = "Thinking is italic, digits are bold. " + (
        "Selected tokens (weight not 0) are underlined." if underline else "Every token is selected (weight not 0).")
    articles = "\n".join(_article(answer, scales, underline) for answer in answers)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(heading)}</title>\n<style>{_STYLE}{chosen}</style>\n</head>\n<body>\n"
        f'<h1>{escape(heading)}</h1>\n{picks}<div class="bar">\n<span>{labels}</span>\n{legends}</div>\n'
        f'<p class="key">{key} Point at a token for all of its numbers.</p>\n'
        f"<main>\n{articles}\n</main>\n</body>\n</html>\n")


class _Scale:
    """From the values of one quantity to colours."""

    def __init__(self, quantity: str, values: Sequence[float]):
        finite = [float(x) for x in values if math.isfinite(x)]
        self.name, self.unit = _NAMES.get(quantity, quantity), _UNITS.get(quantity, "")
        self.least, self.most = min(finite, default=0.0), max(finite, default=0.0)
        self.signed = self.least < 0
        largest = max(-self.least, self.most)
        self.start, self.stop = (-largest, largest) if self.signed else (self.least, self.most)
        self.stops = (NEGATIVE, ZERO, HIGH) if self.signed else (LOW, MIDDLE, HIGH)

    def color(self, value: float) -> str:
        """CSS colour of a value."""
        if not math.isfinite(value):
            return _css(UNKNOWN)
        width = self.stop - self.start
        place = 2 * (value - self.start) / width if width else 0.0
        first = min(int(place), 1)
        part = place - first
        return _css(tuple(round(a + part * (b - a)) for a, b in zip(self.stops[first], self.stops[first + 1])))

    def legend(self) -> str:
        """The scale with its ends, and the range of the values."""
        unit = f" {self.unit}" if self.unit else ""
        if self.least == self.most:
            return f"{_number(self.least)}{unit} everywhere"
        bar = f'<i style="background: linear-gradient(90deg, {", ".join(map(_css, self.stops))})"></i>'
        seen = f" (values {_number(self.least)} to {_number(self.most)})" if self.signed else ""
        return f"{_number(self.start)} {bar} {_number(self.stop)}{unit}{seen}"


def _check(answer: dict, names: list[str]) -> None:
    count = len(answer["tokens"])
    if list(answer["values"]) != names:
        raise ValueError(f"expected the quantities {names} in every answer, got {list(answer['values'])}")
    for name, numbers in [*answer["values"].items(), *((key, answer.get(key)) for key in ("kinds", "selected"))]:
        if numbers is not None and len(numbers) != count:
            raise ValueError(f"{answer['title']!r}: expected {count} {name}, one a token, got {len(numbers)}")
    if answer.get("image") and not answer["image"].startswith("data:image/"):
        raise ValueError(f"{answer['title']!r}: the image must be a data URI, got {answer['image'][:40]!r}")


def _article(answer: dict, scales: Sequence[_Scale], underline: bool) -> str:
    count = len(answer["tokens"])
    kinds, selected = answer.get("kinds") or [""] * count, answer.get("selected")
    facts = [answer.get("subtitle") or "", f"{count} tokens"]
    if answer.get("reward") is not None:
        facts.append(f"reward {_number(answer['reward'])}")
    if selected is not None and underline:
        facts.append(f"{sum(map(bool, selected))} selected")
    spans = []
    for i, text in enumerate(answer["tokens"]):
        values = [numbers[i] for numbers in answer["values"].values()]
        chosen = bool(selected and selected[i])
        tip = [repr(text) + (f"  {kinds[i]}" if kinds[i] else "") + ("  selected" if chosen and underline else ""),
               *(f"{scale.name} {_number(x)} {scale.unit}".rstrip() for scale, x in zip(scales, values))]
        colors = ";".join(f"--c{j}:{scale.color(x)}" for j, (scale, x) in enumerate(zip(scales, values)))
        classes = " ".join(filter(None, ["t", kinds[i], "selected" if chosen and underline else ""]))
        spans.append(f'<span class="{escape(classes)}" style="{colors}" data-tip="{_attribute(tip)}">'
                     f"{escape(_visible(text))}</span>")
    image = f'<img src="{escape(answer["image"])}" alt="">\n' if answer.get("image") else ""
    return (f'<article>\n{image}<div>\n<h2>{escape(answer["title"])}</h2>\n'
            f'<p class="facts">{escape(" · ".join(filter(None, facts)))}</p>\n'
            f'<p class="answer">{"".join(spans)}</p>\n</div>\n</article>')


def _visible(text: str) -> str:
    """The text with a sign for what cannot be seen; a line still breaks where it did."""
    signs = {**{i: chr(0x2400 + i) for i in range(32)}, 127: "\u2421", ord("\n"): "\u21b5\n", ord("\t"): "\u21e5\t"}
    return text.encode("utf-8", "replace").decode("utf-8").translate(signs) or "\u2205"


def _attribute(lines: Sequence[str]) -> str:
    return "&#10;".join(escape(line) for line in lines)


def _number(value: float) -> str:
    return f"{value:.4g}"


def _css(color: Sequence[int]) -> str:
    return "#" + "".join(f"{part:02x}" for part in color)
