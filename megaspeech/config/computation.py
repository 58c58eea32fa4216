"""How a run is computed: its layout over ranks, the precision of its numbers, its optimizer.

Spelt as megatron-core spells it, so that its documents can be searched.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from megaspeech.config.section import Natural, Positive, Section


def expand_layout(text: str) -> list[str]:
    """The stages of a `pipeline_model_parallel_layout`, one letter a layer: "Et*3|(t|)*2L" is Ettt, t, t, L.

    "(...)*n" and "x*n" repeat, commas mean nothing, as in megatron-core's PipelineParallelLayerLayout.
    """
    text = text.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        text = re.sub(pattern, lambda match: match.group(1) * int(match.group(2)), text)
    return text.split("|")


class ParallelSection(Section):
    """The layout. The data parallel size is what the world size leaves."""

    tensor_model_parallel_size: Positive = 1
    sequence_parallel: bool = False
    pipeline_model_parallel_size: Positive = 1
    virtual_pipeline_model_parallel_size: Positive | None = None
    """Chunks of layers a stage holds, run interleaved."""
    num_layers_in_first_pipeline_stage: Positive | None = None
    num_layers_in_last_pipeline_stage: Positive | None = None
    """The last stage also runs the depth transformer: give it fewer layers."""
    pipeline_model_parallel_layout: str | None = None
    """Which layers each stage holds, in megatron-core's letters: "Et*3|t*4|tL" for embedding, transformer, loss."""
    context_parallel_size: Positive = 1
    expert_model_parallel_size: Positive = 1
    expert_tensor_parallel_size: Positive | None = None
    """Ranks that share one expert; unset, see `expert_tensor_size`."""
    data_parallel: Literal["ddp", "fsdp2", "megatron_fsdp"] = "ddp"
    """Whole replicas, or torch's or Megatron's fully sharded data parallelism."""
    use_distributed_optimizer: bool = True
    """Optimizer state sharded over the data parallel ranks of "ddp"; both kinds of FSDP shard it in any case."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over the data parallel ranks of "ddp" while the backward pass goes on, bucket by bucket."""
    overlap_param_gather: bool = False
    """Gather the weights that the distributed optimizer's ranks have updated while the next forward pass goes on."""
    tp_comm_overlap: bool = False
    """Send what tensor parallel ranks exchange while matrices are multiplied, by TransformerEngine's user buffers.
    Microbatches must all be as long: set `data.length_multiple` to `data.num_frames`."""
    grad_reduce_in_fp32: bool = True
    """Whether "ddp" sums gradients, over microbatches and ranks, in FP32; in BF16 they take half the memory."""
    recompute_granularity: Literal["selective", "full"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: Positive | None = None
    recompute_modules: tuple[str, ...] | None = None

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one replica together."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def expert_tensor_size(self) -> int:
        """Ranks that share one expert: 1 where experts are spread, else all of the tensor parallel ones."""
        spread = self.expert_model_parallel_size > 1
        return self.expert_tensor_parallel_size or (1 if spread else self.tensor_model_parallel_size)

    @property
    def num_chunks(self) -> int:
        """Chunks of layers that a stage holds: 1, or more under an interleaved pipeline."""
        if self.pipeline_model_parallel_layout is None:
            return self.virtual_pipeline_model_parallel_size or 1
        return max(1, len(expand_layout(self.pipeline_model_parallel_layout)) // self.pipeline_model_parallel_size)

    def describe(self, data_parallel_size: int) -> str:
        """The layout in words, sizes of 1 left out: "tensor 2 x pipeline 2 x data 4, sequence parallel"."""
        sizes = {
            "tensor": self.tensor_model_parallel_size,
            "pipeline": self.pipeline_model_parallel_size,
            "context": self.context_parallel_size,
            "expert": self.expert_model_parallel_size,
        }
        words = [f"{name} {size}" for name, size in sizes.items() if size > 1]
        rest = [self.data_parallel] if self.data_parallel != "ddp" else []
        rest += ["sequence parallel"] if self.sequence_parallel else []
        rest += ["interleaved"] if self.num_chunks > 1 else []
        return ", ".join([" x ".join([*words, f"data {data_parallel_size}"]), *rest])


class PrecisionSection(Section):
    """In which numbers the model is kept and multiplied.

    "bf16" has BF16 parameters, FP32 main gradients and master weights. The FP8 recipes are TransformerEngine's, and on
    top of that multiply the temporal transformer's matrices in FP8: "fp8-delayed" scales by the largest values of
    past steps, "fp8-tensorwise" by the present ones, "fp8-blockwise" each block of 128 by its own, "mxfp8" each 32
    (Blackwell). The depth transformer, whose products are small, stays in BF16, and so does attention.
    """

    recipe: Literal["fp32", "bf16", "fp8-delayed", "fp8-tensorwise", "fp8-blockwise", "mxfp8"] = "fp32"
    fp8_margin: Natural = 0
    """Bits of headroom in the scale of "fp8-delayed"."""
    fp8_amax_history_len: Positive = 1024
    """Steps whose largest values "fp8-delayed" looks back at."""
    fp8_amax_compute_algo: Literal["max", "most_recent"] = "max"
    num_layers_at_start_in_bf16: Natural = 0
    """Layers that stay in BF16, the most sensitive ones; not with "fp8-delayed"."""
    num_layers_at_end_in_bf16: Natural = 0
    fp8_param_gather: bool = False
    """Keep the weights that are multiplied in FP8 in FP8 alone, and gather them so from the distributed optimizer."""
    shadow_interval: Natural = 0
    """Steps between comparisons with BF16, for which the first microbatch of the step also goes forward with FP8 turned
    off; 0 compares never."""
    shadow_band: float = Field(0.05, gt=0)
    """Relative difference of the text's or the audio's loss from that in BF16 beyond which a run has drifted. Twenty
    times the 0.25% within which DeepSeek-V3's smoothed curves lay (arXiv 2412.19437), for one microbatch is noisy; a
    broken scale shows as far more."""

    @property
    def params_dtype(self) -> Literal["fp32", "bf16"]:
        """In which parameters are kept."""
        return "fp32" if self.recipe == "fp32" else "bf16"

    @property
    def fp8_recipe(self) -> str | None:
        """megatron-core's name of the recipe; None without FP8."""
        return None if self.recipe in ("fp32", "bf16") else self.recipe.removeprefix("fp8-")

    @property
    def frame_multiple(self) -> int:
        """Frames on a rank must be a multiple of it: FP8 products take 16 numbers at a time, or a block."""
        return {None: 1, "delayed": 16, "tensorwise": 16, "mxfp8": 32, "blockwise": 128}[self.fp8_recipe]


class OptimizerSection(Section):
    """AdamW with warm-up and decay, as megatron-core's OptimizerConfig and OptimizerParamScheduler spell it."""

    lr: float = Field(1e-3, gt=0)
    min_lr: float = Field(0.0, ge=0)
    lr_warmup_steps: Natural = 100
    lr_decay_style: Literal["linear", "cosine", "constant"] = "cosine"
    weight_decay: float = Field(0.1, ge=0)
    adam_beta1: float = Field(0.9, gt=0, lt=1)
    adam_beta2: float = Field(0.95, gt=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    clip_grad: float = Field(1.0, ge=0)
    use_precision_aware_optimizer: bool = False
    """TransformerEngine's Adam, which can keep its state in fewer bits: the keys below say how."""
    exp_avg_dtype: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32"
    exp_avg_sq_dtype: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32"
    store_param_remainders: bool = True
    """Of the FP32 main weights keep the 16 bits alone that the BF16 weights lack. Not under the FP8 recipes, but for
    "fp8-delayed": there the main weights stay whole."""
