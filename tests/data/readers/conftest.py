"""Pictures on disk, and the playing cards where they are at hand."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from PIL import Image

CARDS = Path(__file__).parents[4] / "shared" / "data" / "playing_cards"


@pytest.fixture
def picture(tmp_path):
    """Factory of a picture file of random pixels below tmp_path; returns its path."""
    def draw(name: str, width: int = 40, height: int = 30) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.Random(name).randbytes(width * height * 3)
        Image.frombytes("RGB", (width, height), pixels).save(path)
        return str(path)
    return draw


@pytest.fixture
def cards() -> tuple[Path, list[dict]]:
    """The folder of the playing cards and the rows of their annotations, 40 of them, with one to five cards each."""
    if not CARDS.is_dir():
        pytest.skip(f"{CARDS.name} is not beside the repository")
    rows = [json.loads(line) for line in (CARDS / "annotations.jsonl").read_text(encoding="utf-8").splitlines()]
    many = [row for row in rows if len(row["objects"]) > 1][:30]
    return CARDS, many + [row for row in rows if len(row["objects"]) == 1][:10]
