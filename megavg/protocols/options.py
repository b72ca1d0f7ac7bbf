"""Options that several rooms share: plain dataclasses of the standard library, read straight from the configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ZeroConfig:
    """How ZeRO-3 partitions and communicates; sizes in elements, as DeepSpeed counts them.

    Attributes:
        param_persistence_threshold: parameters smaller than this stay whole on every rank. DeepSpeed gathers those one
            by one after each step while blocks are gathered whole, so 0 was the fastest on the demo's model, and with
            pipeline stages it is always 0.
        prefetch_bucket_size: how far ahead parameters are gathered; with pipeline stages it is one block ahead, or
            none for 0.
        reduce_bucket_size: gradients are reduced in buckets of this size.
        overlap_comm: reduce gradients beside the backward (CUDA).
        keep_gathered: keep the trained weights of a stage whole from the first to the last micro-batch of an update,
            which gathers them once instead of twice a micro-batch, for the memory of the stage's weights.
        offload_optimizer: keep gradients' and optimiser's partitions in host memory.
        offload_parameters: keep the parameters' partitions in host memory too.
    """

    param_persistence_threshold: int = 0
    prefetch_bucket_size: int = 50_000_000
    reduce_bucket_size: int = 50_000_000
    overlap_comm: bool = False
    keep_gathered: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False

    def __post_init__(self):
        if self.offload_parameters and not self.offload_optimizer:
            raise ValueError("offload_parameters needs offload_optimizer=true: DeepSpeed moves parameters only with "
                             "the optimiser")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate.

    Attributes:
        lr: peak learning rate.
        warmup_steps: steps of linear rise to it.
        schedule: what comes after: constant, or linear / cosine down to zero at the last step.
        betas, eps, weight_decay: AdamW's; vectors (norms, biases) do not decay.
        gradient_clipping: bound of the global gradient norm over all ranks; 0 switches it off.
        implementation: who computes AdamW: auto takes NVIDIA apex on a GPU where it is installed, else torch's fused
            one, and DeepSpeed's vectorised one for a GPU's optimiser in host memory. The log says which.
    """

    lr: float = 1e-6
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    gradient_clipping: float = 1.0
    implementation: Literal["auto", "torch", "deepspeed", "apex"] = "auto"

    def __post_init__(self):
        if len(self.betas) != 2:
            raise ValueError(f"betas={self.betas} must be two numbers")
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr} must be above 0")

    def lr_at(self, step: int, num_steps: int) -> float:
        """Learning rate of 0-based ``step``: linear warm-up, then constant, or linear / cosine to zero."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps)
        return self.lr * {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[
            self.schedule]


@dataclass(frozen=True)
class HeadOptions:
    """How the vocabulary op trades memory and exactness for time. The defaults are exact and the smallest in memory.

    Attributes:
        backend: auto takes Triton on CUDA where it is installed, torch otherwise.
        cache_bytes: room for exp(logits) of the forward in bf16, 2 bytes a token and column of this rank's vocabulary;
            what is cached needs no second matrix product in the backward and has gradients rounded like bf16. 0 keeps
            none.
        skip_mass: in the backward, leave out a token's blocks of columns that hold less probability than this; 0 leaves
            out none, 1e-5 is a good start. The probability left out is reported.
    """

    backend: Literal["auto", "torch", "triton"] = "auto"
    cache_bytes: int = 0
    skip_mass: float = 0.0

    def __post_init__(self):
        if not isinstance(self.cache_bytes, int) or self.cache_bytes < 0:
            raise ValueError(f"cache_bytes={self.cache_bytes} must be a whole number that is not negative")
        if not 0 <= self.skip_mass < 1:
            raise ValueError(f"skip_mass={self.skip_mass} must be in [0, 1)")


@dataclass(frozen=True)
class StageOptions:
    """How a model's stages are built and run, beside the layout's sizes; the result does not depend on it.

    Attributes:
        head: how log-probs and entropies are computed.
        recompute: keep only the input of each decoder layer and vision block, and run it again in the backward.
        sequence_parallel: split norms and residuals over the tensor-parallel ranks by token (CUDA only).
        freeze_vision_tower: do not train the vision tower.
        freeze_projector: do not train what maps vision features to the decoder's width (the mergers).
        pipeline_layers: decoder layers of each stage; empty divides them by cost.
        image_token_share: share of image tokens in the data, which weighs the vision tower against decoder layers when
            they are divided by cost.
    """

    head: HeadOptions = HeadOptions()
    recompute: bool = False
    sequence_parallel: bool = False
    freeze_vision_tower: bool = False
    freeze_projector: bool = False
    pipeline_layers: tuple[int, ...] = ()
    image_token_share: float = 0.75

    def __post_init__(self):
        if not 0 <= self.image_token_share <= 1:
            raise ValueError(f"image_token_share={self.image_token_share} must be in 0..1")
        if any(n < 1 for n in self.pipeline_layers):
            raise ValueError(f"pipeline_layers={list(self.pipeline_layers)}: every stage needs a decoder layer")


@dataclass(frozen=True)
class Perturbation:
    """How an image is perturbed, on its normalised pixels.

    Attributes:
        kind: ``gaussian`` adds noise of deviation ``std``; ``diffusion`` mixes the image with unit noise as a diffusion
            process has done after ``diffusion_step`` of 1000 steps (sigmoid schedule); ``no_image`` puts zeros, the
            mean colour; ``patch_mask`` blackens a share ``mask_share`` of the patches.
        std, diffusion_step, mask_share: see there.
    """

    kind: Literal["gaussian", "diffusion", "no_image", "patch_mask"] = "gaussian"
    std: float = 2.0
    diffusion_step: int = 500
    mask_share: float = 0.6

    def __post_init__(self):
        if self.std < 0:
            raise ValueError(f"std={self.std} must not be negative")
        if not 0 <= self.diffusion_step < 1000:
            raise ValueError(f"diffusion_step={self.diffusion_step} must be in 0..999")
        if not 0 <= self.mask_share <= 1:
            raise ValueError(f"mask_share={self.mask_share} must be in 0..1")


@dataclass(frozen=True)
class LabelNoise:
    """Wrong labels given on purpose to a share of the training samples, never to those of an evaluation.

    Attributes:
        probability: that a sample is noisy; 0 changes nothing and writes no flag, 1 takes every sample.
        seed: which samples are noisy, and how, depends on it and on the sample's name alone.
        classes: the classes a wrong one is taken from. Empty takes those that the expression of a detection or
            classification lists; where given, the ``label`` of a referring expression becomes another one, too.
    """

    probability: float = 0.0
    seed: int = 0
    classes: tuple[str, ...] = ()

    def __post_init__(self):
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability={self.probability} must be in 0..1")
        names = {name.strip().lower() for name in self.classes}
        if len(self.classes) == 1 or len(names) < len(self.classes) or "" in names:
            raise ValueError(f"classes={list(self.classes)} must be two or more different names, or none at all")


@dataclass(frozen=True)
class SamplingParams:
    """How answers are sampled.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_p: keep the smallest set of tokens that holds this share of the probability.
        top_k: keep this many tokens; 0 keeps all.
        max_new_tokens: longest answer, the end token included.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 64

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must not be negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (all) or more")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
