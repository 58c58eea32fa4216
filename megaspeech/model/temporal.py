"""The temporal transformer: megatron-core's TransformerBlock with interleaved RoPE, SwiGLU and RMSNorm."""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megaspeech.config import Config
from megaspeech.model.attention import CoreAttention
from megaspeech.model.norm import RMSNorm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(config: Config) -> TransformerConfig:
    """megatron-core's view of a run: the temporal transformer's shape and the layout.

    Initial weights are drawn from a normal of standard deviation 1 / sqrt(hidden), as moshi does, and those that
    write to the residual are scaled down by sqrt(2 * layers) (GPT-2; Radford et al. 2019).
    """
    shape, parallel = config.temporal, config.parallel
    dtype = DTYPES[config.training.params_dtype]
    std = shape.hidden_size**-0.5
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.hidden_size // shape.num_attention_heads,
        window_size=(shape.context - 1, 0),
        normalization="RMSNorm",
        layernorm_epsilon=config.model.layernorm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        rotary_interleaved=True,
        init_method_std=std,
        # The full weight is drawn on every rank and cut: all tensor parallel sizes start equal.
        use_cpu_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        # Fusions that need Apex or a compiler; TransformerEngine brings its own.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )


def layer_spec(transformer_impl: str) -> ModuleSpec:
    """The layer of `model.transformer_impl`. Raises ValueError where TransformerEngine is asked for and absent."""
    if transformer_impl == "local":
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
        spec.submodules.self_attention.submodules.core_attention = CoreAttention
        return spec
    try:
        return get_gpt_layer_with_transformer_engine_spec()
    except (ImportError, NameError) as error:
        raise ValueError(
            'model.transformer_impl = "transformer_engine", but TransformerEngine is not installed; '
            'install megaspeech[gpu], or set "local"'
        ) from error


class TemporalTransformer(MegatronModule):
    """This pipeline stage's layers over frames.

    Args:
        config: the run.
        megatron: `transformer_config(config)`, shared by the whole model.
        pre_process, post_process: whether this is the first, the last stage.
    """

    def __init__(self, config: Config, *, megatron: TransformerConfig, pre_process: bool, post_process: bool) -> None:
        super().__init__(megatron)
        layers = [layer_spec(config.model.transformer_impl)] * get_num_layers_to_build(megatron)
        self.block = TransformerBlock(
            megatron,
            TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm),
            pre_process=pre_process,
            post_process=post_process,
        )
        self.rope = RotaryEmbedding(
            megatron.kv_channels,
            rotary_percent=1.0,
            rotary_interleaved=True,
            rotary_base=config.temporal.rotary_base,
            use_cpu_initialization=True,
        )

    def set_input_tensor(self, hidden: Tensor | None) -> None:
        """Hand over what the previous stage sent; the pipeline schedule calls this."""
        self.block.set_input_tensor(hidden)

    def forward(self, hidden_TBH: Tensor | None, *, num_frames: int) -> Tensor:
        """`[T, B, H]` (under sequence parallelism this rank's frames of it) through this stage's layers.

        `num_frames` is T of the whole sample.
        """
        return self.block(hidden_TBH, attention_mask=None, rotary_pos_emb=self.rope(num_frames))
