"""What a run is: one frozen pydantic model a section, in megatron-core's spelling where it has one.

Nothing here imports torch: a config can be read, checked and printed on any machine. Counts start `num_`; sizes are
in tokens, frames or samples, never bytes; times are in seconds unless the name says otherwise.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megaspeech.config.computation import OptimizerSection, ParallelSection, PrecisionSection
from megaspeech.config.preparation import AugmentationSection, PreparationSection, SourceSection
from megaspeech.config.section import Natural, Positive, Section


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
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layers of TransformerEngine, or megatron-core's own; "auto" takes TransformerEngine's where it can run."""
    depth_graph_multiple: Natural = 0
    """Launch the depth transformer's layers as one graph of kernels, one graph for each number of frames that comes up,
    rounded up to a multiple of this. A graph has memory of its own for activations and gradients. 0 makes none."""
    layernorm_epsilon: float = Field(1e-8, gt=0)


class StreamsSection(Section):
    """The rows of tokens a model reads: text, its own codebooks (predicted), the codebooks it hears (given).

    With `num_codebooks = 0` it writes text alone, and has no depth transformer (Kyutai's speech to text models).
    """

    text_cardinality: Positive
    text_pad_id: Natural = 3
    text_end_pad_id: Natural = 0
    num_codebooks: Natural
    num_given_codebooks: Natural
    cardinality: Positive
    delays: tuple[Natural, ...]

    @property
    def num_streams(self) -> int:
        """Rows of a sample: text, predicted codebooks, given codebooks."""
        return 1 + self.num_codebooks + self.num_given_codebooks

    @property
    def num_codec_codebooks(self) -> int:
        """Codebooks that audio is encoded in: those of the model's own voice, or of what it hears if it has none."""
        return self.num_codebooks or self.num_given_codebooks

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

    @property
    def head_width(self) -> int:
        """Of one attention head."""
        return self.hidden_size // self.num_attention_heads


class TemporalSection(TransformerSection):
    """The transformer over frames. `context` frames are visible to a position, itself included.

    With `num_moe_experts` the feed-forward layers are mixtures of experts, each of `moe_ffn_hidden_size`.
    `kv_channels`, `add_qkv_bias` and `qk_layernorm` are what some text models have, to start from them; the moshi
    runtime knows none of the three.
    `num_extra_heads` linear heads of `extra_heads_dim` classes are kept with the model for the moshi runtime, as they
    came (`extra_heads_num_heads`; Kyutai's tell when a speaker pauses), and are not trained.
    """

    context: Positive = 3000
    rotary_base: Positive = 10000
    kv_channels: Positive | None = None
    """Width of a head (Qwen3); unset, hidden_size / num_attention_heads."""
    add_qkv_bias: bool = False
    """Queries, keys and values have a bias (Qwen2)."""
    qk_layernorm: bool = False
    """Queries and keys are normalised, each head by itself, before RoPE (Qwen3; arXiv 2302.05442)."""
    num_moe_experts: Positive | None = None
    moe_ffn_hidden_size: Positive | None = None
    moe_router_topk: Positive = 2
    moe_aux_loss_coeff: float = Field(0.01, ge=0)
    """Weight of the loss that balances the experts' loads (Switch Transformer, arXiv 2101.03961)."""
    moe_token_dispatcher_type: Literal["allgather", "alltoall"] = "alltoall"
    num_extra_heads: Natural = 0
    extra_heads_dim: Positive = 6

    @property
    def head_width(self) -> int:
        """Of one attention head."""
        return self.kv_channels or super().head_width


class DepthSection(TransformerSection):
    """The transformer over the codebooks of one frame; every codebook has weights of its own, unless told otherwise."""

    weights_per_step_schedule: tuple[Natural, ...] | None = None
    """Which set of weights each codebook uses, `[Q]`; moshi's `depformer_weights_per_step_schedule`. It applies to the
    layers and to the input's projection; embeddings and heads are each codebook's own. Unset, all are."""
    multi_linear: bool = True
    """Project the temporal transformer's output for each set of weights by itself, or once for all codebooks; moshi's
    `depformer_multi_linear`."""
    low_rank_embeddings: Positive | None = None
    """Width of the embedding tables, from which a matrix for each stream leads to `hidden_size`; moshi's
    `depformer_low_rank_embeddings`. Unset, the tables have `hidden_size`."""


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
    """Which codec the codes come from, `streams.num_codebooks` of them. The trainer refuses shards of another."""

    name: Literal["spectral", "mimi", "encodec", "dac", "wavtokenizer"] = "spectral"
    path: str = ""
    """Its folder; for all but "spectral" also its name in the Hugging Face cache, such as "kyutai/mimi"."""


class DataSection(Section):
    """Shards, their mixture and the batches made of them."""

    directory: str = "shards"
    """Holds `train/NAME/` and `valid/NAME/`, sets of shards, for every NAME of the mixture."""
    index_cache: str = ""
    """Local folder for the indexes of shards whose `directory` is in S3 ("s3://BUCKET/KEY"), 28 bytes a sample."""
    mixture: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Weight of each set of shards, by name; weights need not sum to 1. Empty, the weights of `[[sources]]`."""
    mixture_by: Literal["samples", "hours", "epochs"] = "samples"
    """Of what a weight is a share: of the samples drawn, of the audio in them; or how often each sample is seen,
    beside those of the other sets."""
    mixture_temperature: float = Field(1.0, gt=0)
    """Shares are raised to 1 / it: above 1, small sets are drawn more often."""
    shuffle_shards: Positive = 32
    """Shards whose samples are shuffled together; twice as many of a set are kept open."""
    pack: bool = False
    """Put samples one after the other in rows of at most `num_frames`, where none sees another, instead of side by
    side; `micro_batch_size` is 1, and a step's samples are `global_batch_size` all the same."""
    tokenizer: str = "tokenizer.model"
    num_frames: Positive = 64
    """Longest sample that is trained on, and longest packed row. A microbatch is as long as its longest row."""
    length_multiple: Positive = 16
    """Lengths of microbatches are rounded up to it, to what the layout splits frames by, and to what FP8 products
    take on every rank."""
    task_delay: Natural = 3
    """Frames from the end of a heard word to its text."""
    speech_lead: Natural = 1
    """Frames from the text of a word to its sound, where the model speaks."""
    num_workers: Natural = 2
    """Processes that load batches ahead, on every rank that reads them; 0 loads in the step itself."""
    valid_samples: Natural = 1000
    """Of each set that a validation runs, evenly spread over it and always the same; 0 runs all of them."""
    codebook_dropout: float = Field(0.0, ge=0, le=1)
    """Share of the training samples that hear only the first few codebooks, the rest being zero tokens: a residual
    codec's later ones tell voices apart more than words (quantizer dropout, SoundStream, arXiv 2107.03312)."""


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
    fp8_health_interval: Natural = 0
    """Steps between records of the temporal matrices' largest values, FP8 scales and shares of numbers that FP8 loses;
    0 means none. A run without FP8 shows what "fp8-tensorwise" would do."""


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
    preparation: PreparationSection
    augmentation: AugmentationSection
    sources: tuple[SourceSection, ...] = ()
    """`[[sources]]`, as many as there are."""

    @property
    def num_weight_sets(self) -> int:
        """Sets of weights of the depth transformer's layers: one a codebook, or those that the schedule names."""
        schedule = self.depth.weights_per_step_schedule
        return self.streams.num_codebooks if schedule is None else max(schedule, default=-1) + 1

    @property
    def num_input_sets(self) -> int:
        """Projections of the temporal transformer's output for the depth transformer."""
        return self.num_weight_sets if self.depth.multi_linear else 1


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation for name, field in Config.model_fields.items() if name != "sources"
}
