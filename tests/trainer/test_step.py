"""The reduction: shares over the whole optimiser batch, so that neither ranks nor micro-batches change the result."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megavg.algorithms.ecvgpo import ECVGPO
from megavg.algorithms.grpo import GRPO
from megavg.algorithms.sft import SFT
from megavg.protocols.batch import TokenScores
from megavg.protocols.options import OptimizerConfig, ZeroConfig
from megavg.trainer.config import ModelConfig, algorithm_class
from megavg.trainer.step import coefficients, make_signal, micro_batch_loss, micro_batches
from tests.distributed import run_ranks
from tests.rollout_batches import on_ranks, on_threads, random_batch, rows_of

AGGREGATIONS = ("response_mean", "token_mean")
OPTIONS = {"alpha": 0.4, "entropy_coefficient": 0.01, "kl_coefficient": 0.04}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("cut", [4, 8])
def test_shares_sum_to_one_over_two_ranks(aggregation, cut):
    batch, stats = random_batch(3)
    rows = len(batch.rewards)

    def on_rank(rank, peers):
        part, _ = rows_of(batch, stats, *((0, cut) if rank == 0 else (cut, rows)), peers)
        return coefficients(part, aggregation)

    shares = torch.cat(on_threads(2, on_rank))
    assert float(shares.sum()) == pytest.approx(1, abs=1e-6)
    assert torch.allclose(shares, coefficients(batch, aggregation), rtol=1e-6, atol=0)
    assert (shares[batch.mask] > 0).all() and (shares[~batch.mask] == 0).all()


def test_shares_by_hand():
    batch, _ = random_batch()
    batch = replace(batch, mask=torch.tensor([[True, True, True, True], [True, False, False, False]]))
    assert coefficients(batch, "response_mean").tolist() == [[0.125] * 4, [0.5, 0, 0, 0]]
    assert coefficients(batch, "token_mean")[0].tolist() == pytest.approx([0.2] * 4)
    with pytest.raises(ValueError, match="algorithm.aggregation='sum' is not one of response_mean, token_mean, const"):
        coefficients(batch, "sum")


def test_constant_shares_by_hand():
    batch, stats = random_batch()
    batch = replace(batch, mask=torch.tensor([[True, True, True, True], [True, False, False, False]]),
                    rewards=torch.zeros(2), max_new_tokens=10)
    assert coefficients(batch, "constant").tolist() == [pytest.approx([0.05] * 4), pytest.approx([0.05, 0, 0, 0])]
    with pytest.raises(ValueError, match="written answers lack; take token_mean or response_mean"):
        coefficients(replace(batch, max_new_tokens=0), "constant")
    batch, stats = random_batch(3)
    shares = torch.cat(on_ranks(batch, stats, [4, 16], lambda part, *_: coefficients(part, "constant")))
    assert torch.allclose(shares, coefficients(batch, "constant"), rtol=1e-6, atol=0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_shares_of_counted_tokens(aggregation):
    """Only counted tokens share, and answers without any are no answers."""
    batch, stats = random_batch(5)
    counted = batch.answer_mask.clone()
    counted[:5] = False
    shares = coefficients(batch, aggregation, counted)
    per_answer = counted.sum(1).tolist()
    total, answers = sum(per_answer), sum(n > 0 for n in per_answer)
    assert answers < len(per_answer)
    for b, n in enumerate(per_answer):
        for t in range(batch.mask.shape[1]):
            expected = 1 / total if aggregation == "token_mean" else 1 / (answers * max(n, 1))
            assert float(shares[b, t]) == pytest.approx(expected if counted[b, t] else 0.0, abs=1e-7)

    def on_rank(part, part_stats, start, stop):
        return coefficients(part, aggregation, counted[start:stop])

    assert torch.allclose(torch.cat(on_ranks(batch, stats, [4, 16], on_rank)), shares, rtol=1e-6, atol=0)


def test_an_entropy_coefficient_of_each_answer():
    batch, stats = random_batch(6, dtype=torch.float64)
    algorithm = GRPO(GRPO.Config())
    each = torch.linspace(-1, 1, len(batch.rewards), dtype=torch.float64)[:, None]
    algorithm.entropy_coefficient = lambda *_: each
    signal = make_signal(algorithm, batch, stats, None, 0.5)
    expected = [float(each[b]) / (len(each) * int(batch.mask[b].sum())) for b in range(len(each))]
    for b, value in enumerate(expected):
        assert signal.entropy_weights[b].tolist() == pytest.approx([value * bool(m) for m in batch.mask[b]], rel=1e-6)


def cut_rows(num_rows: int, size: int) -> list[range]:
    return micro_batches([1] * num_rows, [0] * num_rows, range(num_rows), size)


def test_micro_batches_cover_every_row_once():
    for rows, size in ((8, 1), (8, 3), (8, 8), (8, 100), (1, 5)):
        cut = cut_rows(rows, size)
        assert [b for part in cut for b in part] == list(range(rows)) and max(map(len, cut)) <= size


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 6), st.integers(0, 80), st.integers(0, 60),
       st.integers(0, 20))
def test_micro_batches_keep_to_every_limit(tokens, group_size, max_tokens, max_patches, more):
    prompt_of_row = [b // group_size for b in range(len(tokens))]
    patches = [4 + 7 * p % 40 for p in range(prompt_of_row[-1] + 1)]
    wanted = []
    cut = micro_batches(tokens, patches, prompt_of_row, 4, max_tokens, max_patches,
                        lambda count: wanted.append(min(count + more, len(tokens))) or wanted[0])
    assert [b for part in cut for b in part] == list(range(len(tokens))) and all(cut)
    assert len(cut) == wanted[0], "every rank takes as many as the one that needs most"
    for part in cut:
        images = sum(patches[p] for p in {prompt_of_row[b] for b in part})
        assert len(part) <= 4
        assert len(part) == 1 or not max_tokens or sum(tokens[b] for b in part) <= max_tokens
        assert len({prompt_of_row[b] for b in part}) == 1 or not max_patches or images <= max_patches


def test_a_shared_image_counts_once():
    assert micro_batches([5] * 4, [100], [0] * 4, 8, max_patches=100) == [range(4)]
    assert micro_batches([5] * 4, [100, 100], [0, 0, 1, 1], 8, max_patches=150) == [range(2), range(2, 4)]


class TinyPolicy(torch.nn.Module):
    """Scores tokens of a vocabulary of 11, given a feature of each position; double precision."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(11, 6, generator=generator, dtype=torch.float64))

    def forward(self, features: torch.Tensor, tokens: torch.Tensor) -> TokenScores:
        logp = (features @ self.weight.t()).log_softmax(-1)
        return TokenScores(logp.gather(-1, tokens[..., None])[..., 0], -(logp.exp() * logp).sum(-1))


def loss_and_gradient(algorithm, batch, stats, reference, data, size: int):
    """Summed loss and gradient of one rank's rows, worked through in micro-batches of ``size``."""
    features, tokens = data
    signal = make_signal(algorithm, batch, stats, reference, 0.5)
    policy = TinyPolicy()
    rows = cut_rows(len(batch.rewards), size)
    loss = micro_batch_loss(algorithm, signal, rows)
    total = 0.0
    for i, part in enumerate(rows):
        keep = batch.mask[part.start:part.stop]
        new = policy(features[part.start:part.stop], tokens[part.start:part.stop])
        value = loss(i, new.logprobs[keep], new.entropy[keep])
        value.backward()
        total += float(value.detach())
    return total, policy.weight.grad


def tiny_problem():
    batch, stats = random_batch(6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(*batch.mask.shape, 6, generator=generator, dtype=torch.float64)
    tokens = torch.randint(11, batch.mask.shape, generator=generator)
    scores = TinyPolicy()(features, tokens)
    old = (scores.logprobs.detach() + 0.3 * torch.randn(batch.mask.shape, generator=generator)) * batch.mask
    stats = TokenScores(old, scores.entropy.detach() * batch.mask)
    reference = (old - 0.2) * batch.mask
    return batch, stats, reference, features, tokens


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("make", [lambda a: ECVGPO(ECVGPO.Config(aggregation=a, **OPTIONS)),
                                  lambda a: SFT(SFT.Config(aggregation=a, entropy_coefficient=0.01))])
def test_loss_and_gradient_do_not_depend_on_micro_batches_or_ranks(aggregation, make):
    batch, stats, reference, features, tokens = tiny_problem()
    rows = len(batch.rewards)
    loss, gradient = loss_and_gradient(make(aggregation), batch, stats, reference, (features, tokens), rows)
    assert abs(loss) > 1e-3 and gradient.abs().max() > 1e-3
    for size in (1, 3, 7):
        other, other_gradient = loss_and_gradient(make(aggregation), batch, stats, reference, (features, tokens), size)
        assert other == pytest.approx(loss, abs=1e-6) and torch.allclose(other_gradient, gradient, rtol=0, atol=1e-6)

    def on_rank(rank, peers):
        start, stop = (0, 8) if rank == 0 else (8, rows)
        part = rows_of(batch, stats, start, stop, peers)
        data = (features[start:stop], tokens[start:stop])
        return loss_and_gradient(make(aggregation), *part, reference[start:stop], data, 3)

    (one, first), (two, second) = on_threads(2, on_rank)
    assert one + two == pytest.approx(loss, abs=1e-6) and torch.allclose(first + second, gradient, rtol=0, atol=1e-6)


def test_reduction_against_plain_loops():
    batch, stats, reference, features, tokens = tiny_problem()
    algorithm = ECVGPO(ECVGPO.Config(**OPTIONS))
    signal = make_signal(algorithm, batch, stats, reference, 0.5)
    with torch.no_grad():
        new = TinyPolicy()(features, tokens)
    per_token = algorithm.token_loss(new, signal)
    means = []
    for b in range(len(batch.rewards)):
        valid = batch.mask[b]
        means.append(float((per_token[b][valid] - 0.01 * new.entropy[b][valid]).mean()))
    found, _ = loss_and_gradient(algorithm, batch, stats, reference, (features, tokens), 5)
    assert found == pytest.approx(sum(means) / len(means), abs=1e-6)


def test_a_dropped_token_still_gets_the_entropy_bonus():
    """``weights`` drop tokens from the policy loss; the bonus is on every token."""
    batch, stats, reference, features, tokens = tiny_problem()
    algorithm = SFT(SFT.Config(entropy_coefficient=0.5))
    algorithm.weights = lambda batch, *_: torch.zeros(batch.mask.shape, dtype=torch.float64)
    loss, _ = loss_and_gradient(algorithm, batch, stats, None, (features, tokens), 4)
    entropy = TinyPolicy()(features, tokens).entropy[batch.mask]
    assert loss == pytest.approx(-0.5 * float(entropy.detach().mean()), abs=1e-6)


def real_updates(checkpoint: str, sizes: list[int]) -> list[tuple[float, float, dict]]:
    """(loss, gradient norm, weights after one step) of the same 8 answers for each micro-batch size."""
    from megavg.data.scenes import scenes
    from megavg.parallel.mcore import make_context
    from megavg.trainer.policy import Policy
    from megavg.trainer.rollouts import Rollouts, encode, to_batch
    from megavg.trainer.token_kinds import TokenKinds

    context = make_context(1, 1, torch.device("cpu"))
    found = []
    for size in sizes:
        # a large eps: otherwise AdamW blows rounding of a zero gradient up to a whole step
        policy = Policy(ModelConfig(checkpoint, "float32"), OptimizerConfig(lr=1e-3, eps=1e-4), ZeroConfig(), context,
                        with_reference=False, prompts_per_pass=16)
        samples = list(scenes(2, seed=1))
        prompts = encode(samples, policy.processor, lambda sample: f"Locate {sample.expression}.")
        generator = torch.Generator().manual_seed(0)
        responses = [torch.randint(10, 200, (3 + 2 * b,), generator=generator).tolist() for b in range(8)]
        rollouts = Rollouts(samples, prompts, responses, [False] * 8, group_size=4)
        rewards = torch.rand(8, generator=generator).tolist()
        batch = to_batch(rollouts, rewards, TokenKinds(policy.processor), context)
        rows = cut_rows(8, size)
        where = (prompts, rollouts.prompt_of_row, responses, rows)
        stats = policy.score(*where, rollouts.width, 1.0)
        algorithm = ECVGPO(ECVGPO.Config(alpha=0.4, entropy_coefficient=0.01))
        loss = micro_batch_loss(algorithm, make_signal(algorithm, batch, stats, None, 0.0), rows)
        value, norm = policy.update(*where, loss, 1.0, 1e-3)
        found.append((value, norm, {name: tensor.numpy().copy() for name, tensor in policy.engine.weights()}))
    return found


def test_a_real_update_does_not_depend_on_the_micro_batch_size(checkpoints):
    whole, *others = run_ranks(1, real_updates, str(checkpoints("qwen3_vl")), [8, 1, 3])[0]
    assert abs(whole[0]) > 1e-2 and whole[1] > 1e-2
    for loss, norm, weights in others:
        assert loss == pytest.approx(whole[0], abs=1e-6) and norm == pytest.approx(whole[1], rel=1e-5)
        assert max(abs(weights[name] - whole[2][name]).max() for name in weights) <= 1e-6


@pytest.mark.parametrize("name, options, by_answer", [
    ("grpo", {}, True), ("dapo", {"entropy_coefficient": 0.3}, False), ("dr_grpo", {"entropy_coefficient": 0.3}, False),
    ("two_stage+dapo", {"lambda_max": 0.3}, True), ("two_stage+dr_grpo", {"lambda_max": 0.3}, True)])
def test_the_entropy_bonus_is_on_a_mean(name, options, by_answer):
    """Whatever the loss is divided by, the coefficient is that of a mean over the whole batch."""
    cls = algorithm_class(name)
    batch, stats = random_batch(3)
    algorithm = cls(cls.Config(**options or {"entropy_coefficient": 0.3}))
    weights = make_signal(algorithm, batch, stats, None, 0.0).entropy_weights
    assert float(weights.sum()) == pytest.approx(0.3, rel=1e-5)
    rows, tokens = len(batch.rewards), batch.mask.sum(1, keepdim=True)
    expected = 0.3 * batch.mask / (rows * tokens if by_answer else tokens.sum())
    assert torch.allclose(weights, expected, rtol=1e-5, atol=0)


def test_noise_is_unknown_where_no_sample_speaks_of_it(checkpoints):
    """A method that tells noisy samples apart must not take silence for clean."""
    from dataclasses import replace as changed
    from types import SimpleNamespace

    from megavg.data.scenes import scenes
    from megavg.models.processor import Processor
    from megavg.trainer.rollouts import Rollouts, to_batch
    from megavg.trainer.token_kinds import TokenKinds

    kinds = TokenKinds(Processor.from_pretrained(checkpoints("qwen3_vl"), "json_relative_1000"))
    samples = list(scenes(2, seed=1))
    for others, meta, expected in ((0, {}, None), (1, {}, [False] * 4), (0, {"noisy": True}, [True] * 2 + [False] * 2)):
        first = changed(samples[0], meta={**samples[0].meta, **meta})
        rollouts = Rollouts([first, samples[1]], [], [[5], [6], [7], [8]], [False] * 4, group_size=2)
        context = SimpleNamespace(device=torch.device("cpu"), sum_over_data=None, gather_values=None,
                                  max_over_data=lambda number: max(number, others))
        noisy = to_batch(rollouts, [0.0] * 4, kinds, context).noisy
        assert (None if noisy is None else noisy.tolist()) == expected
