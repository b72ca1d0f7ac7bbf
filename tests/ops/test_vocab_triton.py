"""The Triton backend of the vocabulary op in Triton's interpreter, against float64; and its kernels compiled for a GPU.

Triton decides when it is imported whether it interprets, for the whole process. So this file starts itself again with
TRITON_INTERPRET=1, where the functions marked ``interpreted`` are the tests; to run one of them, set that variable.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import pytest
import torch

from megavg.ops import vocab_torch
from megavg.ops.vocab_inputs import make_rows
from megavg.ops.vocab_parallel import token_scores
from megavg.ops.vocab_rows import NATS, Blocks, LogitGradient
from megavg.ops.vocab_shard import VocabShard
from megavg.protocols.batch import IGNORE
from megavg.protocols.options import HeadOptions
from tests.ops import vocab_examples
from tests.ops.vocab_examples import dense_log_softmax, gradients, relative, with_offset

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHARED_MEMORY = 227 * 1024  # of one program on an H100 or H200
if importlib.util.find_spec("triton") is None:  # not importorskip, which would import it, not interpreting
    pytest.skip("triton is not installed", allow_module_level=True)
if INTERPRETED:
    from megavg.ops import vocab_triton


def interpreted(test):
    """A test where Triton interprets, nothing elsewhere."""
    return test if INTERPRETED else None


def example(num_tokens: int, dim: int, vocab_size: int, dtype=torch.float32, offset: float = 0.0):
    """hidden [N, D + 1], weight [V, D + 1], targets [N], upstream gradients [2, N]; ``offset`` is in all logits."""
    hidden, weight, targets, upstream = vocab_examples.example(num_tokens, dim, vocab_size, dtype, scale=2.0)
    return *with_offset(hidden, weight, offset), targets, upstream


def dense(hidden, weight, targets, temperature=1.0, bias=None):
    """(log-prob, entropy, all log-probs) in float64, with all logits stored."""
    logp = dense_log_softmax(hidden, weight, None, temperature, bias)
    return *vocab_examples.dense(hidden, weight, targets, None, temperature, bias), logp


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def check(hidden, weight, targets, upstream, temperature=1.0, bias=None, tolerance=2e-5, grad_tolerance=1e-5,
          backend="triton", blocks=Blocks(16, 300), **options):
    """Values and gradients against float64; the scores and gradients, for more."""
    given = [t for t in (hidden, weight, bias) if t is not None]
    ours, theirs = leaves(*given), leaves(*(t.double() for t in given))
    scores = token_scores(*ours[:2], targets, VocabShard.whole(weight.shape[0]), temperature, top1=True,
                          sum_squares=True, bias=ours[2] if len(ours) > 2 else None, blocks=blocks,
                          options=HeadOptions(backend, **options))
    logprobs, entropy, all_logprobs = dense(*theirs[:2], targets, temperature, theirs[2] if len(theirs) > 2 else None)
    assert scores.logprobs.dtype == scores.entropy.dtype == torch.float32
    assert float((scores.logprobs - logprobs).detach().abs().max()) < tolerance
    assert float((scores.entropy - entropy).detach().abs().max()) < tolerance
    best = all_logprobs.detach().amax(1)
    torch.testing.assert_close(scores.top_logprobs.double(), best, atol=tolerance, rtol=0)
    found = all_logprobs.detach().gather(1, scores.top_ids[:, None])[:, 0]
    torch.testing.assert_close(found, best, atol=tolerance, rtol=0)
    squares = (2 * all_logprobs.detach()).exp().sum(1)
    torch.testing.assert_close(scores.sum_squares.double(), squares, atol=1e-6, rtol=2 * tolerance)
    grads = gradients((scores.logprobs, scores.entropy), ours, upstream)
    for ours, theirs in zip(grads, gradients((logprobs, entropy), theirs, upstream)):
        assert relative(ours, theirs) < grad_tolerance
    return scores, grads


@interpreted
@pytest.mark.parametrize("dtype, grad_tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2),
                                                   (torch.float16, 1e-2)], ids=str)
def test_equals_dense_where_nothing_divides(dtype, grad_tolerance):
    """With a bias and a temperature per row; and what the torch backend gives."""
    hidden, weight, targets, upstream = example(37, 32, 1000, dtype)
    bias = torch.linspace(-1, 1, 1000).to(dtype)
    fields = dict(temperature=torch.linspace(0.5, 2, 37), bias=bias, grad_tolerance=grad_tolerance)
    scores, grads = check(hidden, weight, targets, upstream, **fields)
    others, other_grads = check(hidden, weight, targets, upstream, **fields, backend="torch")
    assert torch.equal(scores.top_ids, others.top_ids)
    for ours, theirs in zip((scores.logprobs, scores.entropy, *grads), (others.logprobs, others.entropy, *other_grads)):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5 if dtype == torch.float32 else grad_tolerance)


@interpreted
@pytest.mark.parametrize("shape, columns", [((1, 1, 2), 256), ((5, 3, 64), 64), ((16, 31, 5), 1), ((17, 40, 128), 100),
                                            ((3, 7, 300), 128)], ids=str)
def test_equals_dense_at_the_borders_of_tiles(shape, columns):
    check(*example(*shape), temperature=0.7, blocks=Blocks(7, columns))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_dense_with_the_tiles_of_a_gpu(monkeypatch, dtype):
    tiles = vocab_triton.Tiles.of(dtype, interpreted=False)
    monkeypatch.setattr(vocab_triton.Tiles, "of", lambda dtype: tiles)
    check(*example(130, 70, 2700, dtype), blocks=Blocks(1, 2400), cache_bytes=2 * 130 * 2400, grad_tolerance=1e-2)


@interpreted
@pytest.mark.parametrize("vocab_size, offset, tolerance", [
    (2304, -12.0, 2e-5),  # verl's kernel counts columns beyond the head, with logits 0
    (2048, -130.0, 1e-4),  # verl's kernel starts its maximum at 0, and gives -inf
    (300, 300.0, 2e-4), (300, -300.0, 2e-4), (300, 3e4, 2e-2), (300, -3e4, 2e-2)])
def test_an_offset_of_all_logits_changes_nothing(vocab_size, offset, tolerance):
    """The tolerance is what fp32 logits of that size are rounded by."""
    hidden, weight, targets, upstream = example(6, 8, vocab_size, offset=offset)
    scores, _ = check(hidden, weight, targets, upstream, tolerance=tolerance, grad_tolerance=10 * tolerance,
                      blocks=Blocks(16, 1024))
    weight[:, -1] = 0
    for ours, theirs in zip((scores.logprobs, scores.entropy), dense(hidden, weight, targets)):
        torch.testing.assert_close(ours.detach().double(), theirs, atol=tolerance, rtol=0)


@interpreted
def test_a_certain_token_has_no_entropy():
    hidden, weight = torch.ones(2, 1), torch.full((200, 1), -300.0)
    weight[130] = 300.0
    hidden, weight = leaves(hidden, weight)
    scores = token_scores(hidden, weight, torch.tensor([130, 0]), VocabShard.whole(200), options=HeadOptions("triton"))
    assert scores.logprobs.tolist() == [0.0, -600.0]
    assert scores.entropy.tolist() == [0.0, 0.0]
    grads = gradients((scores.logprobs, scores.entropy), (hidden, weight), torch.ones(2, 2))
    assert all(torch.isfinite(grad).all() for grad in grads)


@interpreted
def test_padding_rows_have_no_probability_and_no_gradient():
    hidden, weight, targets, upstream = example(8, 3, 5)
    padded = torch.cat([weight, torch.full((4, 4), 100.0)])
    hidden, weight, padded = leaves(hidden, weight, padded)
    scores = token_scores(hidden, padded, targets, VocabShard(0, 9, 5), options=HeadOptions("triton"))
    expected = dense(hidden, weight, targets)
    for ours, theirs in zip((scores.logprobs, scores.entropy), expected):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=0)
    grad = gradients((scores.logprobs, scores.entropy), padded, upstream)[0]
    torch.testing.assert_close(grad[:5], gradients(expected, weight, upstream)[0], atol=1e-5, rtol=1e-5)
    assert not grad[5:].any()


@interpreted
@pytest.mark.parametrize("cached_blocks", [1, 100], ids=["first block", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_from_the_cache_are_rounded_like_bf16(dtype, cached_blocks):
    hidden, weight, targets, upstream = example(37, 32, 1000, dtype)
    check(hidden, weight, targets, upstream, grad_tolerance=1e-2 if dtype == torch.bfloat16 else 2e-3,
          cache_bytes=2 * 37 * 300 * cached_blocks, temperature=torch.linspace(0.5, 2, 37))


@interpreted
def test_the_cache_holds_what_lies_far_below():
    """Entries that are 0 in bf16, and a maximum that is far below that of later columns."""
    hidden, weight, targets, upstream = example(5, 4, 700)
    weight[:, -1] = torch.linspace(-200, 200, 700)
    check(hidden, weight, targets, upstream, cache_bytes=2**20, tolerance=2e-4, grad_tolerance=3e-3)


@interpreted
@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_blocks_of_little_mass_are_left_out(cache_bytes):
    hidden, weight, targets, upstream = example(20, 8, 1000)
    weight[::7] *= 4
    found = []
    for backend in ("triton", "torch"):
        scores, _ = check(hidden, weight, targets, upstream, backend=backend, blocks=Blocks(16, 64), skip_mass=1e-4,
                          cache_bytes=cache_bytes, tolerance=1e-4, grad_tolerance=3e-3 if cache_bytes else 1e-3)
        found.append(scores.dropped_mass)
    assert float(found[0].max()) > 0
    torch.testing.assert_close(*found, atol=1e-7, rtol=1e-3)


@interpreted
@pytest.mark.parametrize("index", [0, 1], ids=["logprobs", "entropy"])
@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_one_output_alone_has_its_gradient(index, cache_bytes):
    hidden, weight, targets, upstream = example(6, 4, 200)
    ours, theirs = leaves(hidden, weight), leaves(hidden.double(), weight.double())
    scores = token_scores(*ours, targets, VocabShard.whole(200), 0.7, options=HeadOptions("triton", cache_bytes))
    grads = gradients([(scores.logprobs, scores.entropy)[index]], ours, upstream)
    for found, expected in zip(grads, gradients([dense(*theirs, targets, 0.7)[index]], theirs, upstream)):
        assert float((found - expected).norm() / expected.norm()) < (2e-3 if cache_bytes else 1e-5)


@interpreted
def test_ignored_rows_and_rows_without_upstream_gradient():
    hidden, weight, targets, upstream = example(20, 4, 200)
    targets[::3] = IGNORE
    upstream[:, 4:9] = 0
    hidden, weight = leaves(hidden, weight)
    scores = token_scores(hidden, weight, targets, VocabShard.whole(200), options=HeadOptions("triton", 2 * 20 * 64),
                          blocks=Blocks(16, 64))
    kept = targets != IGNORE
    expected = dense(hidden[kept], weight, targets[kept])
    for ours, theirs in zip((scores.logprobs, scores.entropy), expected):
        torch.testing.assert_close(ours[kept].double(), theirs, atol=2e-5, rtol=0)
        assert not ours[~kept].any()
    grads = gradients((scores.logprobs, scores.entropy), (hidden, weight), upstream)
    for found, theirs in zip(grads, gradients(expected, (hidden, weight), upstream[:, kept])):
        assert float((found - theirs).norm() / theirs.norm()) < 2e-3
    assert not grads[0][~kept].any() and not grads[0][4:9].any()


@interpreted
def test_the_top_token_is_the_lowest_id_among_equals():
    """Equal logits in one tile, in two tiles of a program, in two programs and in two blocks."""
    weight = torch.zeros(700, 1)
    for row, ids in enumerate([(3, 9), (70, 10), (200, 120), (600, 100)]):
        weight[:] = 0
        weight[list(ids)] = 2.0
        scores = token_scores(torch.ones(2, 1), weight, torch.tensor([0, 1]), VocabShard.whole(700), top1=True,
                              options=HeadOptions("triton"), blocks=Blocks(16, 256))
        assert scores.top_ids.tolist() == [min(ids)] * 2


@interpreted
@pytest.mark.parametrize("change", ["hidden", "weight", "product"])
def test_what_is_not_finite_is_refused(change):
    hidden, weight, targets, _ = example(5, 4, 200)
    {"hidden": hidden, "weight": weight}.get(change, torch.zeros(5, 1))[3, 0] = torch.nan
    if change == "product":
        hidden[2], weight[100] = 1e30, -1e30
    with pytest.raises(ValueError, match={"hidden": "row 3", "weight": "finite head", "product": "overflow"}[change]):
        token_scores(hidden, weight, targets, VocabShard.whole(200), options=HeadOptions("triton"))


@interpreted
@pytest.mark.parametrize("shape", [(0, 4, 9), (5, 4, 0), (5, 4, 150)], ids=["no rows", "empty shard", "no target here"])
def test_statistics_equal_those_of_torch(shape):
    hidden, weight, _, _ = example(shape[0], shape[1], max(1, shape[2]))
    rows = make_rows(hidden, weight[:shape[2]], None, VocabShard(100, 100 + shape[2], 100 + shape[2]), 1 / NATS,
                     torch.arange(5)[:shape[0]] * 30)
    found = [backend.statistics(rows, Blocks(2, 100), True, True, True, 0) for backend in (vocab_triton, vocab_torch)]
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[0][1].log_mass, found[1][1].log_mass, atol=1e-5, rtol=0)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_the_gradient_of_logits_in_the_operands_dtype(dtype, with_entropy):
    """As on a GPU; and of rows that lie apart in memory. A likely target's a (1 - p) is exact before it is rounded."""
    hidden, weight, targets, upstream = example(19, 32, 200, dtype)
    hidden, weight = hidden.repeat(1, 2)[:, :33], weight.T.contiguous().T
    targets[0], weight[targets[0]] = 77, 4 * hidden[0] / hidden[0].norm()
    rows = make_rows(hidden, weight, None, VocabShard.whole(200), 1 / (0.25 * NATS), targets)
    table, record = vocab_triton.statistics(rows, Blocks(8, 150), cache_bytes=2**20)
    logprobs, entropy, logp = dense(hidden, weight, targets, 0.25)
    gradient = LogitGradient.of_scores(upstream[0], upstream[1] if with_entropy else None, table[0], table[1],
                                       entropy.float(), rows.scale)
    b = upstream[1].double() * with_entropy
    chosen = torch.zeros_like(logp).scatter_(1, targets[:, None], 1)
    expected = 4 * (upstream[0][:, None] * chosen - logp.exp() * (upstream[0] + b * entropy + b * logp.T).T)
    blocks, room = Blocks(8, 150), vocab_triton.gradient_room(rows, dtype, Blocks(8, 150))
    rounding = 2**-7 if dtype == torch.bfloat16 else 2**-10  # the interpreter cuts bf16 off; a GPU rounds to nearest
    for block, cached in zip((slice(0, 150), slice(150, 200)), record.cached):
        out = torch.empty(19, block.stop - block.start, dtype=dtype)
        vocab_triton.fill_gradient(out, rows, block, weight[block], gradient, blocks, room)
        torch.testing.assert_close(out.double(), expected[:, block], atol=1e-5, rtol=rounding)
        vocab_triton.fill_gradient_from_cache(out, cached, rows, block, gradient, blocks, room)
        torch.testing.assert_close(out.double(), expected[:, block], atol=1e-5, rtol=rounding + 2**-6)


@interpreted
def test_float64_is_refused():
    hidden, weight, targets, _ = example(5, 4, 20, torch.float64)
    with pytest.raises(ValueError, match="got torch.float64; take backend 'torch'"):
        token_scores(hidden, weight, targets, VocabShard.whole(20), options=HeadOptions("triton"))


def fresh_environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    return {**kept, "OMP_NUM_THREADS": "1", **changes}


@pytest.mark.skipif(INTERPRETED, reason="this is the run in the interpreter")
def test_in_the_interpreter():
    result = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__], cwd=ROOT,
                            env=fresh_environment(TRITON_INTERPRET="1"), capture_output=True, text=True)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-8000:] + result.stderr[-2000:]


def compile_kernels(dtype: torch.dtype) -> None:
    """Compile what the backend launches, without a GPU, and print a line of JSON for each kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from megavg.ops import vocab_triton

    driver.set_active(types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32),
                                            get_current_device=lambda: 0, get_current_stream=lambda device: 0))

    def compile_only(kernel, grid, **arguments):
        compiled = kernel.warmup(grid=grid, **arguments, enable_fp_fusion=False)
        print(json.dumps({"name": compiled.name, "shared": compiled.metadata.shared, **resources(compiled)}))

    vocab_triton._launch = compile_only
    hidden, weight, targets, upstream = example(300, 511, 5120, dtype)
    of_rows, block, out = torch.ones(300), slice(4096, 5120), torch.empty(300, 1024, dtype=dtype)
    gradient = LogitGradient(of_rows, of_rows, of_rows, of_rows)
    rows = make_rows(hidden, weight, None, VocabShard.whole(5120), 0.7, targets)
    vocab_triton.statistics(rows, Blocks(1, 4096))
    rows = make_rows(hidden, weight, weight[:, 0], VocabShard.whole(5120), torch.ones(300), targets)
    _, record = vocab_triton.statistics(rows, Blocks(1, 4096), True, True, True, 2**30)
    vocab_triton.fill_gradient(out, rows, block, weight[block], gradient, None, None)
    vocab_triton.fill_gradient_from_cache(out, record.cached[1], rows, block, gradient, None, None)


def resources(compiled) -> dict[str, int]:
    """Registers, bytes that were spilled, and how often the innermost loop goes to memory for what was spilled."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        texts = [subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
                 for option in ("-res-usage", "-sass")]
    lines = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", texts[1])]
    jumps = [(at, int(to.group(1), 16)) for at, what in lines if (to := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", what))]
    loops = [[what for at, what in lines if to <= at <= end] for end, to in jumps if to < end]
    loops = [loop for loop in loops if any("HGMMA" in what or "FFMA" in what for what in loop)]
    products = min(loops, key=len, default=[])
    return {"registers": int(re.search(r"REG:(\d+)", texts[0]).group(1)),
            "spilled": int(re.search(r"STACK:(\d+)", texts[0]).group(1)), "loop": len(products),
            "tensor_cores": sum("HGMMA" in what for what in products),
            "spills_in_loop": sum(bool(re.search(r"\b(STL|LDL)\b", what)) for what in products)}


@pytest.mark.skipif(INTERPRETED, reason="Triton interprets")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_compile_for_a_gpu(tmp_path, dtype):
    """For sm_90, with the tiles that are used on a GPU and the arguments as they are bound there."""
    binaries = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin"
    if not all((binaries / name).is_file() for name in ("ptxas", "cuobjdump")):
        pytest.skip("this triton comes without ptxas and cuobjdump")
    code = f"import torch\nfrom tests.ops.test_vocab_triton import compile_kernels\ncompile_kernels(torch.{dtype})"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                            env=fresh_environment(TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=str(ROOT)))
    assert result.returncode == 0, result.stderr[-4000:]
    print(result.stdout)
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    names = ["statistics_kernel", "statistics_kernel", "gradient_kernel", "cached_gradient_kernel"]
    assert [kernel["name"] for kernel in kernels] == names
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY
        assert kernel["spilled"] <= 1024  # bytes a thread, outside of the loop that takes the time
        if "cached" not in kernel["name"]:
            assert kernel["loop"] and kernel["spills_in_loop"] <= 2
            assert bool(kernel["tensor_cores"]) == (dtype == "bfloat16")
