"""DeepSpeed ZeRO-3 as this project uses it: its configuration, its optimiser, and the undocumented names relied on."""

from __future__ import annotations

import contextlib
from typing import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn

from megavg.parallel.context import ParallelContext
from megavg.protocols.options import ZeroConfig

_GATHER_BYTES = 256 * 2**20
_GATHER_COUNT = 64  # parameters in one collective


def deepspeed_config(zero: ZeroConfig, gradient_clipping: float, dtype: torch.dtype) -> dict:
    """The DeepSpeed configuration of a run. Gradient accumulation is ours, so DeepSpeed is told of none."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": gradient_clipping,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": zero.overlap_comm,
            "contiguous_gradients": False,
            "reduce_bucket_size": zero.reduce_bucket_size,
            "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
            "stage3_param_persistence_threshold": zero.param_persistence_threshold,
            "stage3_max_live_parameters": int(1e9),
            "stage3_max_reuse_distance": 0,
            # one sub-group: the norm's all-reduce spans stages, which must all make the same number of them
            "sub_group_size": int(1e12),
        },
    }
    if dtype == torch.bfloat16:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    for wanted, what in ((zero.offload_optimizer, "optimizer"), (zero.offload_parameters, "param")):
        if wanted:
            config["zero_optimization"][f"offload_{what}"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if zero.offload_optimizer:
        config["zero_force_ds_cpu_optimizer"] = False  # make_optimizer has chosen, and the log says what
    return config


def check_deepspeed() -> None:
    """Refuse a DeepSpeed without the undocumented names that this project stands on, before a model is loaded.

    Raises:
        ValueError: one of them is missing.
    """
    import deepspeed
    from deepspeed.runtime.zero import parameter_offload, stage3

    optimizer = getattr(stage3, "DeepSpeedZeroOptimizer_Stage3", None)
    offload = getattr(parameter_offload, "DeepSpeedZeRoOffload", None)
    hook, registry = "fwd_pre_hook", "ds_inflight_param_registry"
    needed = {"clear_backward_seen_flag": hasattr(optimizer, "clear_backward_seen_flag"),
              hook: hook in _mentioned(getattr(offload, "setup_zero_stage3_hooks", None)),
              registry: registry in _mentioned(getattr(offload, "__init__", None))}
    missing = [name for name, is_there in needed.items() if not is_there]
    if missing:
        raise ValueError(f"deepspeed {deepspeed.__version__} has no {' and no '.join(missing)} in its ZeRO-3; install "
                         "the version pinned in requirements.txt")


def _mentioned(function) -> set:
    """Names and texts in the code of a function."""
    code = getattr(function, "__code__", None)
    return {*code.co_names, *code.co_consts} if code else set()


def check_equal_groups(optimizer: torch.optim.Optimizer, context: ParallelContext) -> None:
    """Refuse stages whose optimisers differ in their number of groups: the gradient norm would wait for ever.

    Raises:
        ValueError: on every rank of the pipeline alike.
    """
    if context.pp_size == 1:
        return
    mine = torch.tensor([len(optimizer.param_groups)], device=context.device)
    counts = [torch.zeros_like(mine) for _ in range(context.pp_size)]
    dist.all_gather(counts, mine, group=context.pp_group)
    counts = [int(count) for count in counts]
    if len(set(counts)) > 1:
        raise ValueError(f"the pipeline stages train {counts} groups of parameters (matrices, vectors), which must be "
                         "equally many; freeze less, or divide parallel.pipeline_layers otherwise")


def gather_as_one(blocks: list[nn.Module]) -> None:
    """Have ZeRO-3 gather each block's parameters in one collective, not module by module.

    Without this every linear and norm has its own hooks, about a quarter of the step time of the demo's model.
    """
    from deepspeed.utils import set_z3_leaf_module

    for block in blocks:
        set_z3_leaf_module(block, True)


def forget_backward(engine) -> None:
    """Tell DeepSpeed that another backward of the same step follows; without it the second one loses gradients."""
    engine.optimizer.clear_backward_seen_flag()


def remove_world_broadcast(engine) -> None:
    """Drop ZeRO-3's root pre-forward hook, whose world-wide broadcast hangs pipeline stages."""
    # without an optimiser DeepSpeed puts the owner of the hook in its place
    getattr(engine.optimizer, "parameter_offload", engine.optimizer).fwd_pre_hook.remove()


def prefetch_next(chains: Sequence[Sequence[nn.Module]], root: nn.Module) -> None:
    """Have each block gather the parameters of the one that follows, or precedes in the backward, while it computes.

    DeepSpeed's own prefetch replays a recorded trace, which ends with the hook that ``remove_world_broadcast`` drops.

    Args:
        chains: blocks in the order of their forwards; each is a leaf module of ZeRO-3.
        root: the engine's module, which keeps what is in flight.
    """
    for chain in chains:
        for i, block in enumerate(chain):
            before, after = chain[i - 1] if i else None, chain[i + 1] if i + 1 < len(chain) else None
            block.register_forward_pre_hook(lambda module, args, a=after: _start_gathering(a, root))
            block.register_full_backward_pre_hook(lambda module, grads, b=before: _start_gathering(b, root))


def _start_gathering(block: nn.Module | None, root: nn.Module) -> None:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if block is None:
        return
    waiting = [p for p in block.parameters() if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    if waiting:
        handle = waiting[0].all_gather_coalesced(waiting)
        root.ds_inflight_param_registry.update(dict.fromkeys(waiting, handle))


@contextlib.contextmanager
def kept_gathered(module: nn.Module) -> Iterator[None]:
    """Gather all parameters of a partitioned module and keep ZeRO-3 from releasing them inside the block."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    parameters = list(module.parameters())
    user = -1  # DeepSpeed releases a parameter only when no module uses it, and numbers modules from 0
    for start in range(0, len(parameters), _GATHER_COUNT):
        part = [p for p in parameters[start:start + _GATHER_COUNT] if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        if part:
            part[0].all_gather_coalesced(part).wait()
    for parameter in parameters:
        parameter.ds_active_sub_modules.add(user)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.ds_active_sub_modules.discard(user)
            if parameter.ds_status == ZeroParamStatus.AVAILABLE and not parameter.ds_persist:
                parameter.partition()


def sum_tied_gradient(parameter: nn.Parameter) -> None:
    """Add up the gradients that the first and the last stage have for their copies of one tied matrix."""
    from deepspeed.utils import safe_get_local_grad, safe_set_local_grad
    from megavg.parallel.core import parallel_state

    gradient = safe_get_local_grad(parameter).clone()
    dist.all_reduce(gradient, group=parallel_state.get_embedding_group())
    safe_set_local_grad(parameter, gradient)


def gradients(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every trained parameter's accumulated gradient, whole along data parallelism, fp32; before the step."""
    from deepspeed.utils import safe_get_full_grad

    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield name, safe_get_full_grad(parameter).float()


def gathered(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Walk over a partitioned module's parameters whole (this rank's tensor-parallel shard), some at a time.

    A tensor is valid only until the next one is asked for. All data-parallel ranks must walk together.
    """
    import deepspeed

    group: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, parameter in module.named_parameters():
        group.append((name, parameter))
        size += getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        if size >= _GATHER_BYTES:
            with deepspeed.zero.GatheredParameters([p for _, p in group]):
                yield from ((n, p.detach()) for n, p in group)
            group, size = [], 0
    with deepspeed.zero.GatheredParameters([p for _, p in group]) if group else contextlib.nullcontext():
        yield from ((n, p.detach()) for n, p in group)
