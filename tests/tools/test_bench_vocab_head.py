"""The benchmark of the vocabulary op: its methods compute the same, and one run gives every figure it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ops.vocab_examples import dense, gradients, relative
from tools.bench_vocab_head import main, measure_memory, parse_arguments, ratios_of
from tools.vocab_head_methods import METHODS, make_problem

ROOT = Path(__file__).resolve().parents[2]
RATIOS = {"forward_vs_gemm", "forward_vs_dense", "forward_vs_chunks", "both_vs_3gemm", "both_vs_dense",
          "cached_vs_3gemm", "cached_vs_chunks", "tau_vs_exact"}
WITHOUT_ENTROPY = {"torch F.linear_cross_entropy", "DeepSpeed linear_cross_entropy"}
WITHOUT_ENTROPY_GRADIENT = WITHOUT_ENTROPY | {"vocabulary chunks"}


@pytest.mark.parametrize("peaked", [False, True])
@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith("products")])
def test_every_method_computes_the_same(name, peaked):
    problem = make_problem(600, 24, 2100, torch.float32, "cpu", peaked)
    inputs = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    expected = dense(*inputs, problem.targets)
    upstream = torch.stack([problem.upstream_logprob, problem.upstream_entropy])
    if name in WITHOUT_ENTROPY_GRADIENT:
        upstream[1] = 0
    theirs = gradients(expected, inputs, upstream)
    run = METHODS[name](problem)
    *scores, grad_hidden, grad_weight = run.both()
    for values in (scores, run.forward()):
        torch.testing.assert_close(values[0].double(), expected[0], atol=2e-4, rtol=0)
        if name not in WITHOUT_ENTROPY:
            torch.testing.assert_close(values[1].double(), expected[1], atol=2e-4, rtol=0)
    bound = {"ours, cached": 4e-3, "ours, tau 1e-5": 1e-3}.get(name, 1e-4)
    assert relative(grad_hidden, theirs[0]) < bound and relative(grad_weight, theirs[1]) < bound


def test_the_floor_makes_all_products():
    problem = make_problem(600, 24, 2100, torch.float32, "cpu", False)
    z = problem.hidden @ problem.weight.T
    *_, grad_hidden, grad_weight = METHODS["products, small tiles"](problem).both()
    assert relative(grad_hidden, z @ problem.weight) < 1e-5 and relative(grad_weight, z.T @ problem.hidden) < 1e-5


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A small run as a user starts it: (what it printed, its JSON)."""
    path = tmp_path_factory.mktemp("bench") / "report.json"
    methods = ["ours", "ours, cached", "ours, tau 1e-5", "dense", "gradient in forward", "products, small tiles"]
    command = [sys.executable, "tools/bench_vocab_head.py", "--tokens", "64", "--width", "32", "--vocab", "9000",
               "--repeats", "2", "--threads", "1", "--json", str(path), "--methods", *methods]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text())


def test_all_figures_are_there(report):
    printed, figures = report
    assert set(figures["transient_mb"]) == {"forward", "both"}
    assert set(figures["ratios"]) == RATIOS and all(value > 0 for value in figures["ratios"].values())
    assert figures["collectives"] == {"forward": 1, "backward": 1}
    assert figures["collective_calls"] == {"forward": ["all_gather_into_tensor"], "backward": ["all_reduce"]}
    assert figures["shape"] == {"tokens": 64, "width": 32, "vocab": 9000}
    assert all(len(turns) == 2 for turns in figures["all_seconds"]["ours"].values())
    assert all(name in printed for name in figures["seconds"])


def test_memory_of_the_op_is_below_that_of_the_logits():
    """At 2,000 tokens by 16,000 columns, 128 MB of logits: within the 24 and 40 MB that hold for any vocabulary."""
    arguments = parse_arguments(["--tokens", "2000", "--width", "64", "--vocab", "16000", "--threads", "1"])
    gradients_mb = (2000 + 16000) * 64 * 4 / 1e6
    memory = measure_memory(arguments, "ours")
    assert memory["forward"] < 24 and memory["both"] - gradients_mb < 40
    assert measure_memory(arguments, "dense")["both"] - gradients_mb > 2 * 128


def test_ratios_of_methods_that_were_not_run_are_left_out():
    assert ratios_of({"ours": {"forward": 2.0, "both": 6.0}, "dense": {"forward": 4.0, "both": 8.0}}) == {
        "forward_vs_dense": 0.5, "both_vs_dense": 0.75}


@pytest.mark.parametrize("argv, message", [(["--methods", "dens"], "unknown method 'dens'; there are ours, "),
                                           (["--device", "cuda"], "--device cuda, but torch sees no GPU here")])
def test_bad_arguments(argv, message):
    if torch.cuda.is_available() and "cuda" in argv:
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match=message):
        main(argv)


def test_the_sizes_must_be_positive(capsys):
    with pytest.raises(SystemExit):
        main(["--tokens", "0"])
    assert "--tokens must be at least 1" in capsys.readouterr().err
