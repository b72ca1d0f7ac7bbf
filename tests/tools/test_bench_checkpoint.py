"""The benchmark of checkpoints reads back what it wrote, and its figures are those of the work it names."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tools import bench_checkpoint
from tools.checkpoint_state import KINDS, State, entries, num_bytes_of, width_of
from tools.checkpoint_turns import _measured


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """(figures, printed text) of a run on two ranks."""
    out = tmp_path_factory.mktemp("bench") / "figures.json"
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr(bench_checkpoint, "NUM_LAYERS", 10)
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        assert bench_checkpoint.main(["--size-gb", "0.05", "--ranks", "2", "--turns", "1", "--folder", str(out.parent),
                                      "--json", str(out)]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["figures.json"], "nothing is left on the disk"
    return json.loads(out.read_text()), "\n".join(lines)


def test_every_way_is_measured(bench):
    figures, text = bench
    assert figures["equal"] and figures["ranks"] == 2
    assert figures["bytes"] == num_bytes_of(figures["width"], figures["num_layers"])
    assert abs(figures["bytes"] / 0.05e9 - 1) < 0.2 and figures["bytes_of_rank"] >= figures["bytes"] / 2
    for name, title in {**bench_checkpoint.SAVES, **bench_checkpoint.LOADS}.items():
        row = figures["rows"][name]
        assert row["seconds"] > 0 and 0 <= row["sync_seconds"] < row["seconds"] and f"| {title} |" in text
        assert row["processor_seconds"] > 0
        assert math.isclose(row["mb_per_s"], figures["bytes"] / row["seconds"] / 1e6)
    rows = figures["rows"]
    assert all(rows[name]["sync_seconds"] > 0 for name in ("save", "torch_save", "safetensors_save", "plain_write"))
    assert rows["background"]["seconds"] > rows["held_up"]["seconds"]


def test_memory_is_what_each_way_must_take(bench):
    figures = bench[0]
    share = {name: row["growth_bytes"] / figures["bytes_of_rank"] for name, row in figures["rows"].items()}
    assert share["torch_load"] > 0.9 and share["safetensors_load"] > 0.9, "they hold all of it twice"
    assert share["held_up"] > 0.9, "so does a copy for the background"
    assert share["plain_write"] < 0.2 and share["plain_read"] < 0.2 and share["check"] < 0.2
    assert share["read"] < 0.7, "a part at a time"


def test_every_rank_holds_its_share_and_forgets_it():
    total, width = 0, 16
    for rank in range(3):
        state = State(width, 2, rank, 3)
        assert state.is_as_filled() and len(state.tensors()) == len(state.parts)
        total += sum(part.num_bytes for part in state.parts)
        view = state.parts[-1].fetch().reshape(-1)
        before = view[-1].clone()
        view[-1] = 2.0
        assert not state.is_as_filled(), "one wrong number is seen"
        view[-1] = before
        assert state.is_as_filled()
        state.wipe()
        assert all(part.fetch().isnan().all() for part in state.parts)
        state.fill()
        assert state.is_as_filled()
    assert total == num_bytes_of(width, 2) == 4 * len(KINDS) * sum(math.prod(s) for _, s in entries(width, 2))
    assert width_of(num_bytes_of(96, 2), 2) == 96


def test_memory_and_waits_are_seen():
    """64 MiB that are taken and let go count as growth; what was there before does not."""
    kept = torch.ones(2**23)
    with _measured() as found:
        torch.ones(2**24)
    assert abs(found["growth_bytes"] - 2**26) < 2**22 and kept.nbytes == 2**25
    assert found["seconds"] > 0 and found["sync_seconds"] == 0


@pytest.mark.parametrize("arguments, words", [
    (["--size-gb", "0"], "at least 0.001"), (["--ranks", "0"], "at least 1"),
    (["--size-gb", "5000"], "--size-gb: 5"),
])
def test_what_does_not_fit_is_refused(arguments, words, capsys):
    try:
        status = bench_checkpoint.main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2 and words in capsys.readouterr().err
