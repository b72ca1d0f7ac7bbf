"""Tell the tokens of an answer apart: its thinking, the digits of its boxes, and the format around them."""

from __future__ import annotations

import re
from typing import Sequence

import torch

from megavg.models.processor import Processor
from megavg.protocols.batch import DIGITS, FORMAT, THINK

NAMES = {THINK: "think", DIGITS: "digits", FORMAT: "format"}
"""How each kind is called in the log."""

_THOUGHT = re.compile(r"<think>(.*?)(?:</think>|\Z)", re.DOTALL)
_NUMBER = re.compile(r"(?<![A-Za-z_0-9])[0-9]+(?![A-Za-z_0-9])")


def kinds(texts: Sequence[str], is_digit: Sequence[bool], opening: str = "") -> list[int]:
    """The kind of each token of ONE answer: FORMAT, THINK or DIGITS of ``megavg.protocols.batch``.

    Between <think> and </think> every token is THINK, digits too; an unclosed <think> counts to the end. A tag may be
    spread over several tokens, and a token that holds any part of it is FORMAT. Digit tokens elsewhere are DIGITS, but
    for those that belong to a word, such as the 2 of bbox_2d; all others are FORMAT.

    Args:
        texts: of each token, decoded alone.
        is_digit: whether the token is digits and nothing else.
        opening: what the prompt has begun the answer with, such as "<think>".
    """
    whole = opening + "".join(texts)
    thoughts = [match.span(1) for match in _THOUGHT.finditer(whole)]
    in_number = {place for match in _NUMBER.finditer(whole) for place in range(*match.span())}
    found, end = [], len(opening)
    for text, digit in zip(texts, is_digit):
        start, end = end, end + len(text)
        thinks = any(first <= start and end <= last for first, last in thoughts)
        found.append(THINK if thinks else DIGITS if digit and start in in_number else FORMAT)
    return found


class TokenKinds:
    """Kinds and texts of tokens by their ids, for one checkpoint's tokenizer; what was decoded once is kept."""

    def __init__(self, processor: Processor):
        self.pad_token_id = processor.pad_token_id
        self._tokenizer = processor.tokenizer
        self._digits = frozenset(processor.digit_token_ids)
        self._opening = processor.opening
        self._texts: dict[int, str] = {}

    def text(self, token: int) -> str:
        """The token decoded alone; what is no whole character reads as U+FFFD."""
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode([token], skip_special_tokens=False,
                                                        clean_up_tokenization_spaces=False)
        return self._texts[token]

    def of(self, answer: Sequence[int]) -> list[int]:
        """The kind of each token of one answer."""
        return kinds([self.text(token) for token in answer], [token in self._digits for token in answer], self._opening)

    def batch(self, answers: Sequence[Sequence[int]], width: int) -> torch.Tensor:
        """Kinds of several answers [B, width] int8 on the CPU, FORMAT on padding."""
        padded = torch.full((len(answers), width), FORMAT, dtype=torch.int8)
        for row, answer in zip(padded, answers):
            row[:len(answer)] = torch.tensor(self.of(answer), dtype=torch.int8)
        return padded
