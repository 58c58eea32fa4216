"""The temporal transformer: megatron-core's TransformerBlock with interleaved RoPE, SwiGLU and RMSNorm."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import HAVE_TE
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
from megaspeech.config.computation import ParallelSection, PrecisionSection
from megaspeech.model import attention
from megaspeech.model.attention import CoreAttention, packed_attention
from megaspeech.model.frames import on_context_rank
from megaspeech.model.norm import RMSNorm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(config: Config) -> TransformerConfig:
    """megatron-core's view of a run: the temporal transformer's shape and the layout.

    Initial weights are drawn from a normal of standard deviation 1 / sqrt(hidden), as moshi does, and those that
    write to the residual are scaled down by sqrt(2 * layers) (GPT-2; Radford et al. 2019).
    """
    shape, parallel = config.temporal, config.parallel
    dtype = DTYPES[config.precision.params_dtype]
    std = shape.hidden_size**-0.5
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_width,
        add_qkv_bias=shape.add_qkv_bias,
        qk_layernorm=shape.qk_layernorm,
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
        # On CPU ranks the full weight is drawn on every rank and cut: all tensor parallel sizes start equal. On GPUs
        # each rank draws its own, where they stay: billions are too many to draw twice.
        use_cpu_initialization=not torch.accelerator.is_available(),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        masked_softmax_fusion=False,  # Apex's, for attention that writes its scores out
        persist_layer_norm=False,
        **_fusions(config),
        **_fp8(config.precision),
        **_layout(parallel),
        **(_experts(config) if shape.num_moe_experts else {}),
    )


def uses_transformer_engine(config: Config) -> bool:
    """Whether the temporal layers are TransformerEngine's: asked for, or left open where it can run."""
    if config.model.transformer_impl == "auto":
        return HAVE_TE and torch.accelerator.is_available()
    return config.model.transformer_impl == "transformer_engine"


def _fusions(config: Config) -> dict[str, Any]:
    """What TransformerEngine's layers come with: RoPE in one kernel, torch's compiler for SwiGLU and the residual sums,
    gradients of weights added straight to DDP's; and gathered keys for context parallelism, the way of its four that
    takes a sliding window and any number of heads (context_parallel.py of TransformerEngine 2.20)."""
    fused = uses_transformer_engine(config) and HAVE_TE
    return {
        "apply_rope_fusion": fused,
        "bias_activation_fusion": fused,
        "bias_dropout_fusion": fused,
        "gradient_accumulation_fusion": fused and config.parallel.data_parallel == "ddp",
        "cp_comm_type": "all_gather" if fused else None,
    }


def _fp8(precision: PrecisionSection) -> dict[str, Any]:
    """The fields of an FP8 recipe.

    Delayed and tensorwise scaling have gradients in E5M2, whose range is wide; a block's own scale makes E4M3 do for
    all (the defaults of TransformerEngine's recipes).
    """
    if precision.fp8_recipe is None:
        return {}
    start, end = precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16
    return {
        "fp8": "hybrid" if precision.fp8_recipe in ("delayed", "tensorwise") else "e4m3",
        "fp8_recipe": precision.fp8_recipe,
        "fp8_margin": precision.fp8_margin,
        "fp8_amax_history_len": precision.fp8_amax_history_len,
        "fp8_amax_compute_algo": precision.fp8_amax_compute_algo,
        "fp8_param": precision.fp8_param_gather,
        "first_last_layers_bf16": bool(start or end),
        "num_layers_at_start_in_bf16": start,
        "num_layers_at_end_in_bf16": end,
    }


def _layout(parallel: ParallelSection) -> dict[str, Any]:
    """The fields of the layout, and of what is recomputed in the backward pass."""
    same = (
        "tensor_model_parallel_size",
        "sequence_parallel",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
        "pipeline_model_parallel_layout",
        "context_parallel_size",
        "tp_comm_overlap",
        "expert_model_parallel_size",
        "recompute_granularity",
    )
    fields = {name: getattr(parallel, name) for name in same}
    fields["expert_tensor_parallel_size"] = parallel.expert_tensor_size
    # Interleaved stages send forward and backward at once: in one batch they would be mixed up between two ranks.
    interleaved = parallel.num_chunks > 1
    fields |= {"overlap_p2p_comm": interleaved, "batch_p2p_comm": not interleaved}
    fields["batch_p2p_sync"] = False  # waits for the GPU after every message; for old torch (p2p_communication.py:395)
    if parallel.recompute_granularity == "full":  # each layer keeps its input alone, unless told otherwise
        fields["recompute_method"] = parallel.recompute_method or "uniform"
        fields["recompute_num_layers"] = parallel.recompute_num_layers or 1
    elif parallel.recompute_modules:
        fields["recompute_modules"] = list(parallel.recompute_modules)
    return fields


def _experts(config: Config) -> dict[str, Any]:
    shape = config.temporal
    return {
        "num_moe_experts": shape.num_moe_experts,
        "moe_ffn_hidden_size": shape.moe_ffn_hidden_size or shape.ffn_hidden_size,
        "moe_router_topk": shape.moe_router_topk,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": shape.moe_aux_loss_coeff,
        "moe_token_dispatcher_type": shape.moe_token_dispatcher_type,
        # One grouped product for all experts is TransformerEngine's; the local spec runs one expert after the other.
        "moe_grouped_gemm": uses_transformer_engine(config),
    }


def layer_spec(config: Config) -> ModuleSpec:
    """The layer of `model.transformer_impl`. Raises ValueError where TransformerEngine is asked for and absent."""
    experts, normed = config.temporal.num_moe_experts, config.temporal.qk_layernorm
    if not uses_transformer_engine(config):
        spec = get_gpt_layer_local_spec(num_experts=experts, normalization="RMSNorm")
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
        attending = spec.submodules.self_attention.submodules
        attending.core_attention = CoreAttention
        if normed:
            attending.q_layernorm = attending.k_layernorm = RMSNorm
        if experts:  # TransformerEngine fuses no norm into experts, so neither are its names theirs
            del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    else:
        try:
            spec = get_gpt_layer_with_transformer_engine_spec(
                num_experts=experts, moe_grouped_gemm=bool(experts), qk_layernorm=normed
            )
            spec.submodules.self_attention.submodules.core_attention = attention.TransformerEngineAttention
        except (ImportError, NameError, AttributeError) as error:
            raise ValueError(
                'model.transformer_impl = "transformer_engine", but TransformerEngine is not installed; '
                'install megaspeech[gpu], or set "auto"'
            ) from error
    return spec


class TemporalTransformer(MegatronModule):
    """This pipeline stage's layers over frames.

    Args:
        config: the run.
        megatron: `transformer_config(config)`, shared by the whole model.
        pre_process, post_process: whether this is the first, the last chunk of the model.
        vp_stage: which chunk of its stage it is, under an interleaved pipeline.
    """

    def __init__(
        self,
        config: Config,
        *,
        megatron: TransformerConfig,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(megatron)
        self.longest_row = config.data.num_frames
        layers = [layer_spec(config)] * get_num_layers_to_build(megatron, vp_stage)
        self.block = TransformerBlock(
            megatron,
            TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        self.rope = RotaryEmbedding(
            megatron.kv_channels,
            rotary_percent=1.0,
            rotary_interleaved=True,
            rotary_base=config.temporal.rotary_base,
            use_cpu_initialization=megatron.use_cpu_initialization,
        )

    def set_input_tensor(self, hidden: Tensor | None) -> None:
        """Hand over what the previous stage sent; the pipeline schedule calls this."""
        self.block.set_input_tensor(hidden)

    def forward(self, hidden_TBH: Tensor | None, *, padding_BT: Tensor, bounds_D: Tensor | None = None) -> Tensor:
        """`[T, B, H]` (under context and sequence parallelism this rank's frames of it) through this chunk's layers.

        `padding_BT` tells which frames of the whole rows are padding, and `bounds_D` where the samples of a packed row
        begin (`Batch.bounds_D`).
        """
        num_frames = padding_BT.shape[-1]
        return self.block(
            hidden_TBH,
            attention_mask=None,
            rotary_pos_emb=self.rope(num_frames),
            packed_seq_params=packed_attention(bounds_D, longest=max(num_frames, self.longest_row)),
            padding_mask=self._padding_for_experts(padding_BT),
        )

    def _padding_for_experts(self, padding_BT: Tensor) -> Tensor | None:
        """Of this rank's frames; None without experts, whose balance alone must not count padding."""
        if self.config.num_moe_experts is None:
            return None
        padding_BT = on_context_rank(padding_BT)
        if self.config.sequence_parallel:
            size, rank = self.config.tensor_model_parallel_size, parallel_state.get_tensor_model_parallel_rank()
            padding_BT = padding_BT.chunk(size, -1)[rank]
        return padding_BT
