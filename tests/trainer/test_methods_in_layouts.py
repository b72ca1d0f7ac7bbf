"""Every method gives the same update in every layout as in one process: same answers, loss, gradient norm, gradients.

Sampling draws a token where a uniform number falls among the cumulated probabilities, so rounding changes one in many
thousands. Each layout samples for itself, and is then given the answers of the one process to go on with.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megavg.checkpoint.export import hf_tensors
from megavg.ops.chance import uniforms
from megavg.protocols.batch import PolicySignal, RolloutBatch
from megavg.protocols.config import build
from megavg.protocols.plugin import names_in
from megavg.trainer.config import algorithm_class, resolve
from megavg.trainer.rollouts import judge
from megavg.trainer.step import make_signal
from megavg.trainer.trainer import Trainer
from tests.distributed import run_ranks

pytestmark = pytest.mark.slow

METHODS: dict[str, dict] = {
    "grpo": {"dual_clip": 3.0, "entropy_coefficient": 0.01},
    "dapo": {"overlong_cache": 12, "resample_tries": 2},
    "dr_grpo": {},
    "gspo": {},
    "cispo": {},
    "sapo": {},
    "clip_cov": {"clip_cov_share": 0.05, "clip_cov_low": 0.0},
    "kl_cov": {"kl_cov_share": 0.1},
    "top_entropy+dapo": {},
    "papo": {"papo_gamma": 0.5},
    "adaptive_entropy": {"target_entropy": 5.0},
    "ecvgpo": {"alpha": 0.4},
    "vepo": {},
    "two_stage+dapo": {"lambda_max": 0.05},
    "two_stage": {"variant": "noisy_max_clean_min"},
    "saei": {"eps": 0.1, "report_gain": True},
    "noisy_rollout": {},
}
EXEMPT = {"sft"}  # learns from written answers: tests/trainer/test_training_runs.py
LAYOUTS = {"micro_batch_1": (1, 1, 1, 1), "tp2": (2, 1, 1, 4), "pp2": (1, 2, 1, 1), "dp2": (1, 1, 2, 4)}
"""Sizes of tensor, pipeline and data parallelism, and answers a micro-batch."""


def updates(tree: dict, answers: dict[str, list] | None = None) -> dict[str, dict] | None:
    """What each method's update is in this world: on rank 0 the answers, loss, norm, metrics and gradients.

    ``answers`` of all prompts, by method, replace those that are sampled.
    """
    trainer = Trainer(resolve(tree))
    policy, context, found = trainer.policy, trainer.context, {}
    step, weight_map = policy.engine.step, policy.model.weight_map(context.tp_size)
    gradients: dict[str, torch.Tensor] = {}

    def recorded_step(lr: float) -> float:
        gradients.update((name, tensor.clone()) for name, tensor in hf_tensors(policy.engine.gradients(), weight_map,
                                                                                context))
        return step(0.0)  # the weights stay, for the next method

    policy.engine.step = recorded_step
    for name, options in METHODS.items():
        cls = algorithm_class(name)
        trainer.algorithm = trainer.collector.algorithm = cls(build(cls.Config, options, "algorithm"))
        gradients.clear()
        rollouts, judgement = trainer.collector.collect(0, 0.25)
        sampled, size = context.gather_rows(rollouts.responses), rollouts.group_size
        if answers is not None:
            own = [answers[name][p * size + g] for p in range(context.dp_rank, 4, context.dp_size) for g in range(size)]
            rollouts = dataclasses.replace(rollouts, responses=own)
            judgement = judge(rollouts, policy.processor, trainer.rewards)
        batch = trainer._batch(rollouts, judgement.rewards)
        stats, reference = trainer.score(rollouts)
        signal = off_policy(make_signal(trainer.algorithm, batch, stats, reference, 0.25), batch)
        loss, norm, _ = trainer.update(rollouts, signal, 0)
        found[name] = {"loss": loss, "norm": norm, "metrics": trainer.algorithm.metrics | trainer.collector.metrics,
                       "answers": sampled,
                       "rewards": context.gather_rows(judgement.rewards),
                       "gradients": {key: tensor.numpy() for key, tensor in gradients.items()}}
    return found if context.rank == 0 else None


def off_policy(signal: PolicySignal, batch: RolloutBatch) -> PolicySignal:
    """Ratios away from 1, as after an update, so that clips and penalties act; the same ones in every layout."""
    moved = torch.stack([uniforms(f"{stream}/moved", batch.mask.shape[1]) for stream in batch.streams]).float() - 0.5
    return dataclasses.replace(signal, old_logprobs=signal.old_logprobs + moved * batch.mask)


def tree_of(grpo_tree, folder, tp: int, pp: int, micro_batch_size: int) -> dict:
    return grpo_tree(folder, "algorithm={name: grpo}", f"trainer.micro_batch_size={micro_batch_size}",
                     f"parallel.tensor_model_parallel_size={tp}", f"parallel.pipeline_model_parallel_size={pp}",
                     "data.noise={probability: 0.5}", "rollout.temperature=1.3",
                     "rewards=[{name: iou, threshold: 0.4}, {name: format, weight: 0.5}]")


@pytest.fixture(scope="module")
def one_process(grpo_tree, tmp_path_factory):
    """Every method's update in one process, 4 answers a micro-batch."""
    return run_ranks(1, updates, tree_of(grpo_tree, tmp_path_factory.mktemp("methods"), 1, 1, 4))[0]


def test_every_method_is_here():
    tested = {part for name in METHODS for part in name.split("+")}
    assert set(names_in("megavg.algorithms")) == tested | EXEMPT


def test_the_methods_differ(one_process):
    """Otherwise the comparison of layouts would say little."""
    norms = {name: result["norm"] for name, result in one_process.items()}
    assert all(norm > 1e-3 for norm in norms.values()), norms
    assert len({round(norm, 9) for norm in norms.values()}) == len(norms), norms


def test_some_groups_were_drawn_anew(one_process):
    assert one_process["dapo"]["metrics"]["resampling/draws"] > 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_what_one_process_does(layout, one_process, grpo_tree, tmp_path):
    tp, pp, dp, micro_batch_size = LAYOUTS[layout]
    tree = tree_of(grpo_tree, tmp_path / "run", tp, pp, micro_batch_size)
    answers = {name: result["answers"] for name, result in one_process.items()}
    found = run_ranks(tp * pp * dp, updates, tree, answers, timeout=400)[0]
    worst, others = {}, set()
    for name, ours in found.items():
        theirs = one_process[name]
        differing = {(tuple(a), tuple(b)) for a, b in zip(by_prompt(ours["answers"], dp), theirs["answers"], strict=True)
                     if a != b}
        others |= differing  # prompts come back, and their answers' chance with them
        if differing:  # these are of the answers as they were sampled
            ours["metrics"] = {key: theirs["metrics"][key] if key.startswith(("saei/", "resampling/")) else value
                               for key, value in ours["metrics"].items()}
        assert by_prompt(ours["rewards"], dp) == pytest.approx(theirs["rewards"]), name
        assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-4, abs=1e-5), name
        assert ours["gradients"].keys() == theirs["gradients"].keys()
        scale = max(abs(tensor).max() for tensor in theirs["gradients"].values())
        worst[name] = max(abs(tensor - theirs["gradients"][key]).max() / scale
                          for key, tensor in ours["gradients"].items())
        worst[name] = max(worst[name], abs(ours["loss"] - theirs["loss"]),
                          abs(ours["norm"] - theirs["norm"]) / theirs["norm"])
    print(layout, {name: f"{value:.1e}" for name, value in worst.items()})
    assert max(worst.values()) <= 1e-5, worst
    assert len(others) <= 2, "hardly an answer was sampled otherwise"


def by_prompt(rows: list, dp: int, group_size: int = 4) -> list:
    """Rows of all ranks in the order of their prompts: rank r holds prompts r, r + dp, ..."""
    share = len(rows) // dp
    prompts = [rows[rank * share + i * group_size:rank * share + (i + 1) * group_size]
               for i in range(share // group_size) for rank in range(dp)]
    return [row for prompt in prompts for row in prompt]
