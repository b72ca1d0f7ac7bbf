"""Set-up of torch.distributed and megatron-core's process groups and layers' configuration."""

from __future__ import annotations

import datetime
import os
import sys

import torch
import torch.distributed as dist

from megavg.parallel.context import ParallelContext
from megavg.parallel.launcher import read_launcher
from megavg.parallel.quiet import quieten
from megavg.parallel.stale_locks import stale_locks_removed


def check_world_size(world_size: int, tensor: int, pipeline: int) -> None:
    """Refuse a world that the layout does not divide, before anything is started."""
    if world_size % (tensor * pipeline):
        raise ValueError(
            f"world size {world_size} is not divisible by tensor_model_parallel_size * pipeline_model_parallel_size = "
            f"{tensor} * {pipeline}; change parallel.tensor_model_parallel_size or "
            "parallel.pipeline_model_parallel_size, or start another number of processes")


def _device() -> torch.device:
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda":
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"LOCAL_RANK={local_rank}, but this machine has {torch.cuda.device_count()} GPUs; start "
                             "at most one process per GPU (deepspeed --num_gpus), or set DS_ACCELERATOR=cpu")
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    # DeepSpeed would look for accelerators of other makers and warn; there is none
    os.environ["DS_ACCELERATOR"] = "cpu"
    _use_own_ninja()
    return torch.device("cpu")


def _use_own_ninja() -> None:
    """Have DeepSpeed compile its CPU extension with the ninja beside this Python, also where no one activated it.

    Another ninja on PATH does not read this one's log and would compile everything again, at every change of hands.
    """
    folder = os.path.dirname(sys.executable)
    if os.path.exists(os.path.join(folder, "ninja")):
        os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", "")])


def start_processes(timeout_minutes: float = 30.0) -> torch.device:
    """Join the process group that the launcher's environment describes; alone when there is no launcher.

    NCCL for CUDA, gloo for CPU. On CPU each process takes its share of the machine's cores.
    """
    os.environ.update(read_launcher(dict(os.environ)))
    device = _device()
    quieten()
    if not dist.is_initialized():
        import deepspeed

        with stale_locks_removed():  # on a CPU it loads an extension
            deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False,
                                       timeout=datetime.timedelta(minutes=timeout_minutes))
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    return device


def stop_processes() -> None:
    """Leave the process group, as the last thing a process does.

    Its threads would otherwise run into the end of the interpreter, which now and then aborts a finished process.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def make_context(tensor: int, pipeline: int, device: torch.device, timeout_minutes: float = 30.0) -> ParallelContext:
    """Build megatron-core's groups over the running processes and return this process' place in them.

    They do not take over the time-out of ``start_processes``.
    """
    from megavg.parallel.core import parallel_state

    check_world_size(dist.get_world_size(), tensor, pipeline)
    if parallel_state.model_parallel_is_initialized():
        _leave_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout_minutes)
    if device.type == "cuda":
        # megatron-core initialises layers on the GPU from its own random state, and refuses where there is none
        from megavg.parallel.core import tensor_parallel

        tensor_parallel.model_parallel_cuda_manual_seed(0)
    return ParallelContext(
        world_size=dist.get_world_size(), rank=dist.get_rank(),
        tp_size=tensor, tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_size=pipeline, pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_size=parallel_state.get_data_parallel_world_size(), dp_rank=parallel_state.get_data_parallel_rank(),
        dp_group=parallel_state.get_data_parallel_group(), device=device)


def _leave_groups() -> None:
    """Give up megatron-core's groups of an earlier layout in this process.

    megatron-core only forgets them. A gloo group keeps three threads and a layout has a dozen groups, so a process that
    goes through many layouts would spend its time on them.
    """
    from megavg.parallel.core import parallel_state

    groups = [value for value in vars(parallel_state).values() if isinstance(value, dist.ProcessGroup)]
    parallel_state.destroy_model_parallel()
    for group in dict.fromkeys(groups):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def layer_config(context: ParallelContext, dtype: torch.dtype, sequence_parallel: bool = False):
    """megatron-core's configuration for its tensor-parallel layers."""
    from megavg.parallel.core import ModelParallelConfig

    # perform_initialization=False would skip the tensor-parallel marks that the gradient norm counts by
    return ModelParallelConfig(
        tensor_model_parallel_size=context.tp_size, use_cpu_initialization=context.device.type == "cpu",
        perform_initialization=True, params_dtype=dtype, pipeline_dtype=dtype, gradient_accumulation_fusion=False,
        sequence_parallel=sequence_parallel)


class DeepSpeedMpu:
    """megatron-core's parallel_state with the three calls that DeepSpeed expects and megatron-core dropped."""

    def __init__(self, context: ParallelContext):
        self._context = context

    def __getattr__(self, name):
        from megavg.parallel.core import parallel_state

        return getattr(parallel_state, name)

    def get_model_parallel_group(self):
        from megavg.parallel.core import parallel_state

        return parallel_state.get_model_parallel_group()

    def get_model_parallel_world_size(self) -> int:
        return self._context.tp_size * self._context.pp_size

    def get_model_parallel_rank(self) -> int:
        return self._context.pp_rank * self._context.tp_size + self._context.tp_rank
