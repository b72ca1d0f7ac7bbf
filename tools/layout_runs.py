"""Build a training engine in a layout and run steps on it, as one of the ranks that ``tools/local_ranks.py`` starts."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import Callable

from tools.layouts import read_layout

VARIANTS = {
    "recompute": "run each block again in the backward",
    "no_prefetch": "do not gather parameters ahead",
    "keep_gathered": "gather a stage's parameters once a step",
    "frozen_vision": "do not train the vision tower",
}


@dataclass(frozen=True)
class Layout:
    """Sizes of the three parallelisms, and options that are not the default; written like tp2pp2dp2+recompute."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    variants: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Read a layout's name; "one" is a single process."""
        name, *variants = text.split("+")
        sizes = read_layout("tp1" if name == "one" else name)
        for variant in variants:
            if variant not in VARIANTS:
                raise ValueError(f"layout {text!r}: no option {variant!r}; there are {', '.join(VARIANTS)}")
        return cls(*sizes, tuple(variants))

    @property
    def world(self) -> int:
        """How many processes it takes."""
        return self.tensor * self.pipeline * self.data


@dataclass(frozen=True)
class Work:
    """What every layout does in a step; crosses to the ranks as a dict.

    Attributes:
        checkpoint: folder of the model.
        dtype: float32 or bfloat16.
        image_side: pixels; each micro-batch is one row of an image, a question and an answer.
        answer_length: scored tokens of a row.
        rows: of a step, over all data-parallel ranks.
    """

    checkpoint: str
    dtype: str
    image_side: int
    answer_length: int
    rows: int


class Run:
    """One layout on this rank: its engine and its micro-batches."""

    def __init__(self, name: str, work: Work, num_micro_batches: int, device):
        from megavg.models.base import DTYPES, copy_weights, load_model
        from megavg.parallel.engine import ZeroEngine
        from megavg.parallel.mcore import make_context
        from megavg.protocols.options import OptimizerConfig, StageOptions, ZeroConfig

        _number_modules_from_zero()
        layout = Layout.parse(name)
        self.context = make_context(layout.tensor, layout.pipeline, device)
        self.dtype = DTYPES[work.dtype]
        self.model = load_model(work.checkpoint, StageOptions(recompute="recompute" in layout.variants,
                                                              freeze_vision_tower="frozen_vision" in layout.variants))
        stage = self.model.build_stage(self.context, self.dtype)
        copy_weights(stage, self.model.hf_weights(stage, self.context))
        zero = ZeroConfig(keep_gathered="keep_gathered" in layout.variants,
                          **({"prefetch_bucket_size": 0} if "no_prefetch" in layout.variants else {}))
        self.engine = ZeroEngine(stage, self.context, self.dtype, zero, OptimizerConfig(lr=1e-5))
        self.inputs = self._inputs(work, num_micro_batches)

    def _inputs(self, work: Work, num_micro_batches: int) -> list:
        import numpy as np
        from PIL import Image

        from megavg.models.inputs import InputBuilder
        from megavg.models.processor import Processor

        processor = Processor.from_pretrained(work.checkpoint, self.model.spec.box_format)
        builder = InputBuilder(processor.image_token_id, processor.pad_token_id,
                               self.model.config.vision_config.spatial_merge_size, processor.patch_dim, self.dtype,
                               self.context.device, with_images=self.context.is_first_stage)
        allowed = sorted(set(range(processor.vocab_size)) - set(processor.forbidden_token_ids))
        inputs = []
        for i in range(num_micro_batches):
            random = np.random.default_rng((self.context.dp_rank, i))
            pixels = random.integers(0, 256, (work.image_side, work.image_side, 3), dtype=np.uint8)
            prompt = processor.encode_prompt(Image.fromarray(pixels), "Locate the small green square in the image.")
            inputs.append(builder.build([prompt], [0], [random.choice(allowed, work.answer_length).tolist()]))
        return inputs

    def accumulate(self) -> None:
        """Forward and backward of all micro-batches."""
        self.engine.forward_backward(len(self.inputs), self.inputs.__getitem__,
                                     lambda i, logprobs, entropy: -(logprobs + 0.01 * entropy).sum() / 1000)

    def step(self) -> None:
        """A whole training step."""
        self.accumulate()
        self.engine.step(1e-5)

    def close(self) -> None:
        """Give the memory back."""
        self.engine._engine.destroy()
        self.__dict__.clear()
        gc.collect()


def _number_modules_from_zero() -> None:
    """Have DeepSpeed number the next engine's modules and parameters as in a fresh process.

    It counts over all engines of a process and compares the numbers between ranks, which differ after a layout whose
    stages have unequally many of them.
    """
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    Init.param_id = 0

    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0


def measure_memory(name: str, work: Work, num_micro_batches: int, device) -> dict:
    """Bytes of this rank's stage, {kind: [measured, predicted]}, beside where in the layout it is."""
    from tools.layout_memory import KINDS, measured_activations, measured_state, predicted, sizes_of

    run = Run(name, work, num_micro_batches, device)
    activations = measured_activations(run.engine, run.accumulate)
    run.engine.step(1e-5)  # the optimiser makes its state
    measured = {**measured_state(run.engine), "activations": activations}
    sizes = sizes_of(run.model, run.context, run.dtype, num_micro_batches)
    expected = predicted(sizes, run.inputs[0])
    found = {"stage": run.context.pp_rank, "layers": sizes.layers, "tokens": run.inputs[0].input_ids.numel(),
             "patches": run.inputs[0].pixel_values.shape[0], "in_flight": sizes.in_flight,
             "bytes": {kind: [measured[kind], expected[kind]] for kind in KINDS}}
    run.close()
    return found


def measure_seconds(name: str, work: Work, num_steps: int, device) -> list[float]:
    """Seconds of each of ``num_steps`` steps after a first one that is not counted."""
    import torch
    import torch.distributed as dist

    run = Run(name, work, work.rows // Layout.parse(name).data, device)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        return time.perf_counter()

    run.step()
    times = [now()]
    for _ in range(num_steps):
        run.step()
        times.append(now())
    run.close()
    return [stop - start for start, stop in zip(times, times[1:])]


def worker(spec: dict, device, report: Callable[[str], None]) -> dict:
    """What one rank does: {layout: memory} and {layout: seconds of every step, layouts taking turns}."""
    work = Work(**spec["work"])
    found: dict = {"memory": {}, "seconds": {name: [] for name in spec["timed"]}}
    for name in spec["measured"]:
        report(f"memory of {name}")
        found["memory"][name] = measure_memory(name, work, spec["memory_micro_batches"], device)
    for turn in range(spec["repeats"]):
        for name in spec["timed"]:
            seconds = measure_seconds(name, work, spec["steps"], device)
            found["seconds"][name] += seconds
            report(f"turn {turn + 1}, {name}: " + ", ".join(f"{s:.2f}" for s in seconds) + " s")
    return found
