"""``head.*`` of the configuration: what trades memory or exactness for time reaches the op and is reported."""

from __future__ import annotations

import pytest

from megavg.protocols.config import ConfigError
from megavg.trainer.config import resolve
from tests.distributed import run_ranks
from tests.tiny_runs import run_tree, train, training_lines

CHOICES = {"exact": (), "cached": ("head.cache_bytes=100000000",), "skipping": ("head.skip_mass=0.02",)}


def train_all(trees: list[dict]) -> None:
    for tree in trees:
        train(tree)


@pytest.fixture(scope="module")
def runs(grpo_tree, tmp_path_factory):
    """Folder of one run per choice and layout."""
    folder = tmp_path_factory.mktemp("head")
    layouts = {"dp": "parallel.tensor_model_parallel_size=1", "tp": "parallel.tensor_model_parallel_size=2"}
    run_ranks(2, train_all, [grpo_tree(folder / f"{choice}_{layout}", "trainer.num_steps=2", option, *options)
                             for layout, option in layouts.items() for choice, options in CHOICES.items()])
    return folder


@pytest.mark.parametrize("layout", ["dp", "tp"])
def test_cached_gradients_are_those_of_exact_ones_up_to_bf16(runs, layout):
    exact, cached = (training_lines(runs / f"{choice}_{layout}") for choice in ("exact", "cached"))
    assert cached[0]["loss"] == exact[0]["loss"], "the forward is the same"
    assert cached[0]["gradient_norm"] == pytest.approx(exact[0]["gradient_norm"], rel=4e-3)
    assert cached[0]["gradient_norm"] != exact[0]["gradient_norm"]
    assert "head/dropped_mass" not in exact[0]


def test_dropped_mass_is_reported_and_the_same_in_every_layout(runs):
    """The model's vocabulary is one block on one rank and two on two, so more is left out there."""
    dp, tp = (training_lines(runs / f"skipping_{layout}") for layout in ("dp", "tp"))
    exact = training_lines(runs / "exact_tp")
    assert dp[0]["head/dropped_mass"] == 0 and 0 < tp[0]["head/dropped_mass"] < 0.02
    assert tp[0]["gradient_norm"] == pytest.approx(exact[0]["gradient_norm"], rel=0.05)


@pytest.mark.parametrize("override, message", [
    ("head.cache_byte=1", "unknown option head.cache_byte .did you mean .cache_bytes."),
    ("head.backend=cuda", "head.backend"),
    ("head.skip_mass=-1", "skip_mass=-1"),
])
def test_bad_options_are_refused(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        resolve(run_tree(tmp_path, tmp_path, tmp_path, override))
