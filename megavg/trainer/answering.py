"""A checkpoint that answers: its model, its processor and a generator, in any layout, without an optimiser."""

from __future__ import annotations

from megavg.models.base import DTYPES, Model, load_model
from megavg.models.inputs import InputBuilder
from megavg.models.processor import Processor
from megavg.parallel.context import ParallelContext
from megavg.protocols.options import StageOptions
from megavg.rollout.native import NativeGenerator
from megavg.trainer.bad_data import told_to_all
from megavg.trainer.config import ModelConfig


class Answering:
    """The part of a model's roles that answering takes; ``Policy`` trains beside it.

    Args:
        model: as ``load_model`` gives it; its weights are not read here.
        prompts_per_pass: see ``NativeGenerator``.

    Attributes:
        processor: between pictures with texts and token ids.
        builder: makes the model's inputs.
        generator: this rank's stage, without weights yet.
        dtype: of parameters and activations.
    """

    def __init__(self, model: Model, config: ModelConfig, context: ParallelContext, prompts_per_pass: int):
        self.model, self.context, self.dtype = model, context, DTYPES[config.dtype]
        self.processor = Processor.from_pretrained(
            model.checkpoint.directory, config.box_format or model.spec.box_format, config.min_pixels,
            config.max_pixels)
        self.builder = InputBuilder(self.processor.image_token_id, self.processor.pad_token_id,
                                    model.config.vision_config.spatial_merge_size, self.processor.patch_dim,
                                    self.dtype, context.device, with_images=context.is_first_stage)
        self.generator = NativeGenerator(model, self.builder, context, self.dtype, self.processor.end_token_ids,
                                         self.processor.forbidden_token_ids, prompts_per_pass)


class LoadedModel(Answering):
    """A checkpoint as it lies on the disk, ready to answer; the memory of one copy of its weights, no optimiser.

    Raises:
        ValueError: the checkpoint is incomplete, or does not fit the layout.
    """

    def __init__(self, config: ModelConfig, context: ParallelContext, prompts_per_pass: int,
                 options: StageOptions = StageOptions()):
        model = load_model(config.path, options)
        model.check_weights()
        super().__init__(model, config, context, prompts_per_pass)
        with told_to_all(context):  # a stage reads only its own tensors
            self.generator.load_weights(model.hf_weights(self.generator.stage, context))

    def sync(self) -> NativeGenerator:
        """The generator with the checkpoint's weights, as ``Policy.sync`` gives it with the trained ones."""
        return self.generator
