"""What a run is: one frozen pydantic model a section, in megatron-core's spelling where it has one.

Nothing here imports torch: a config can be read, checked and printed on any machine. Counts start `num_`; sizes are
in tokens, frames or samples, never bytes; times are in seconds unless the name says otherwise.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Base of every section: frozen, and unknown keys are faults."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunSection(Section):
    """Where a run lives. `directory` holds its logs, checkpoints and resolved config."""

    name: str = "run"
    directory: str = "runs/run"
    seed: Natural = 1


class ModelSection(Section):
    """Which shape the model has and which code computes it."""

    preset: str = "digits"
    kernels: Literal["reference", "triton"] = "reference"
    """Plain torch, or the Triton kernels of `kernels/`, which run on GPUs (and in Triton's interpreter)."""
    embedding_gradient: Literal["sorted", "atomic"] = "sorted"
    """How "triton" sums the gradient of the stream embeddings: the same bits every time, or in any order."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    layernorm_epsilon: float = Field(1e-8, gt=0)
    init_method_std: float = Field(0.02, gt=0)


class StreamsSection(Section):
    """The rows of tokens a model reads: text, its own codebooks (predicted), the codebooks it hears (given)."""

    text_cardinality: Positive
    text_pad_id: Natural = 3
    text_end_pad_id: Natural = 0
    num_codebooks: Positive
    num_given_codebooks: Natural
    cardinality: Positive
    delays: tuple[Natural, ...]

    @property
    def num_streams(self) -> int:
        """Rows of a sample: text, predicted codebooks, given codebooks."""
        return 1 + self.num_codebooks + self.num_given_codebooks

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """Tokens of each stream `[S]`, initial token not counted. The initial token's id equals the cardinality."""
        return (self.text_cardinality,) + (self.cardinality,) * (self.num_streams - 1)


class TransformerSection(Section):
    """Shape of a transformer. `ffn_hidden_size` is the width of the SwiGLU gate."""

    num_layers: Positive
    hidden_size: Positive
    ffn_hidden_size: Positive
    num_attention_heads: Positive
    num_query_groups: Positive


class TemporalSection(TransformerSection):
    """The transformer over frames. `context` frames are visible to a position, itself included.

    With `num_moe_experts` the feed-forward layers are mixtures of experts, each of `moe_ffn_hidden_size`.
    """

    context: Positive = 3000
    rotary_base: Positive = 10000
    num_moe_experts: Positive | None = None
    moe_ffn_hidden_size: Positive | None = None
    moe_router_topk: Positive = 2
    moe_aux_loss_coeff: float = Field(0.01, ge=0)
    """Weight of the loss that balances the experts' loads (Switch Transformer, arXiv 2101.03961)."""
    moe_token_dispatcher_type: Literal["allgather", "alltoall"] = "alltoall"


class DepthSection(TransformerSection):
    """The transformer over the codebooks of one frame; every codebook has weights of its own."""


class LossSection(Section):
    """Weights of the cross entropies. Text and audio losses are weighted means of their own, and then added."""

    text: float = Field(1.0, ge=0)
    text_padding: float = Field(0.5, ge=0)
    semantic: float = Field(100.0, ge=0)
    acoustic: float = Field(1.0, ge=0)
    silence_fraction: float = Field(1.0, ge=0, le=1)
    """Share of the frames in which the model is silent that the depth transformer is trained on. Silence is one code
    a codebook and soon learned; leaving most of it out saves the depth transformer's work (compare compute
    amortisation in Sesame's CSM, 2025)."""
    speech_fraction: float = Field(1.0, gt=0, le=1)


class CodecSection(Section):
    """Which codec the codes come from. The trainer refuses shards written with another."""

    name: str = "spectral"
    path: str = ""


class DataSection(Section):
    """Shards, their mixture and the batches made of them."""

    directory: str = "shards"
    """Holds `train/NAME.{bin,idx,json}` and `valid/NAME...` for every NAME of the mixture."""
    mixture: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Weight of each shard, by name; weights need not sum to 1."""
    tokenizer: str = "tokenizer.model"
    num_frames: Positive = 64
    """Longest sample that is trained on. A microbatch is as long as its longest sample."""
    length_multiple: Positive = 16
    """Lengths of microbatches are rounded up to it, to what the layout splits frames by, and to what FP8 products
    take on every rank."""
    task_delay: Natural = 3
    """Frames from the end of a heard word to its text."""
    speech_lead: Natural = 1
    """Frames from the text of a word to its sound, where the model speaks."""
    num_workers: Natural = 2
    """Processes that load batches ahead, on every rank that reads them; 0 loads in the step itself."""
    codebook_dropout: float = Field(0.0, ge=0, le=1)
    """Share of the training samples that hear only the first few codebooks, the rest being zero tokens: a residual
    codec's later ones tell voices apart more than words (quantizer dropout, SoundStream, arXiv 2107.03312)."""


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
    recompute_granularity: Literal["selective", "full"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: Positive | None = None
    recompute_modules: tuple[str, ...] | None = None

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


class TrainingSection(Section):
    """How long and in what portions. A step is one optimizer step over `global_batch_size` samples."""

    train_steps: Positive = 1000
    exit_step: Natural = 0
    """Stop (with a checkpoint) at this step though the schedule goes on to `train_steps`; 0 means no early stop.
    It lets a run change its layout half way."""
    micro_batch_size: Positive = 8
    global_batch_size: Positive = 32
    eval_interval: Natural = 200
    max_skipped_steps: Positive = 5
    """Steps in a row that may be skipped, for a gradient that is not finite or a spike, before the run stops."""
    spike_factor: float = Field(0.0, ge=0)
    """A gradient norm of more than so many times the median of the last ones is a spike; 0 looks for none."""
    manual_gc_interval: Natural = 0
    """Steps between Python's garbage collections, the same on all ranks; 0 lets each rank collect when it likes."""
    hang_timeout: float = Field(600.0, gt=0)
    """Seconds without a step, a validation or a checkpoint after which the run is taken to hang."""


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


class CheckpointSection(Section):
    """When to save, how many to keep, what to start from."""

    save_interval: Natural = 200
    """Steps between checkpoints; 0 saves at the end only. The end is always saved."""
    keep_last: Positive = 2
    keep_every: Natural = 0
    """Checkpoints of steps that it divides are kept for good; 0 keeps none."""
    async_save: bool | None = None
    """Write in the background while training goes on; unset, where there is a GPU."""
    save_seed: bool = False
    """Save the untrained weights too, as step 0, for other layouts to start from."""
    seed_checkpoint: str = ""
    """Weights to start from when the run has no checkpoint of its own: only the model is read."""


class LoggingSection(Section):
    """What is written while training."""

    log_interval: Positive = 10
    tensorboard: bool = True
    sample_interval: Natural = 0
    """Steps between audio samples and spectrograms of what the model says; 0 means none."""
    profile_step_start: Natural = 0
    """First and last step that torch's profiler records, on `profile_ranks`; 0 means none."""
    profile_step_end: Natural = 0
    profile_ranks: tuple[Natural, ...] = (0,)


class Config(Section):
    """A whole run."""

    run: RunSection
    model: ModelSection
    streams: StreamsSection
    temporal: TemporalSection
    depth: DepthSection
    loss: LossSection
    codec: CodecSection
    data: DataSection
    parallel: ParallelSection
    optimizer: OptimizerSection
    training: TrainingSection
    precision: PrecisionSection
    checkpoint: CheckpointSection
    logging: LoggingSection


SECTIONS: dict[str, type[Section]] = {name: field.annotation for name, field in Config.model_fields.items()}
