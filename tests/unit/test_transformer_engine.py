"""Real TransformerEngine modules and recipes, built and not computed with: that takes a GPU (`tests/gpu`). Skipped
where TransformerEngine cannot be imported, as beside a torch without CUDA."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer.spec_utils import build_module
from one_rank import make_config, one_rank  # noqa: F401

from megaspeech.checkpoint.state import load_model
from megaspeech.config import Config
from megaspeech.model import attention
from megaspeech.model.counting import count_parameters
from megaspeech.model.speech_text_model import SpeechTextModel
from megaspeech.model.temporal import layer_spec, transformer_config
from megaspeech.parallel.fused_adam import MAIN, make_reshardable
from megaspeech.parallel.optimizer import optimizer_config

pytestmark = [pytest.mark.skipif(not HAVE_TE, reason="no TransformerEngine"), pytest.mark.usefixtures("one_rank")]

TE = "model.transformer_impl=transformer_engine"


@pytest.fixture(autouse=True)
def a_gpu_to_build_for(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """TransformerEngine's modules ask for one when they are built; without, they are told of an H100."""
    if torch.cuda.is_available():
        return
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)


@pytest.mark.parametrize(
    "recipe, name, form",
    [
        ("fp8-delayed", "TEDelayedScaling", "HYBRID"),
        ("fp8-tensorwise", "Float8CurrentScaling", "HYBRID"),
        ("fp8-blockwise", "Float8BlockScaling", "E4M3"),
        ("mxfp8", "MXFP8BlockScaling", "E4M3"),
    ],
)
def test_recipes_are_transformer_engines(recipe: str, name: str, form: str, tmp_path: Path) -> None:
    from megatron.core.fp8_utils import get_fp8_recipe

    overrides = (f"precision.recipe={recipe}", "precision.fp8_margin=1", "precision.fp8_amax_history_len=32")
    found = get_fp8_recipe(transformer_config(make_config(tmp_path, TE, *overrides)))
    assert (type(found).__name__, found.fp8_format.name) == (name, form)
    if recipe == "fp8-delayed":
        assert (found.margin, found.amax_history_len, found.amax_compute_algo) == (1, 32, "max")


def build_layer(config: Config, *, device: str) -> torch.nn.Module:
    megatron = transformer_config(config)
    if device == "meta":
        megatron.use_cpu_initialization, megatron.init_model_with_meta_device = False, True
        megatron.perform_initialization = False
    return build_module(layer_spec(config), config=megatron, layer_number=1)


def test_a_layer_is_fused(tmp_path: Path) -> None:
    config = make_config(tmp_path, TE, "precision.recipe=bf16")
    layer = build_layer(config, device="cpu")
    attention, mlp = layer.self_attention, layer.mlp
    for fused in (attention.linear_qkv, mlp.linear_fc1):
        assert type(fused).__name__ == "TELayerNormColumnParallelLinear"
        assert fused.normalization == "RMSNorm" and fused.eps == config.model.layernorm_epsilon
    for linear in (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2):
        assert linear.fuse_wgrad_accumulation and linear.weight.dtype == torch.bfloat16
    assert attention.core_attention.window_size == (config.temporal.context - 1, 0)
    assert attention.core_attention.attn_mask_type == "causal"
    assert layer.config.apply_rope_fusion and layer.config.rotary_interleaved
    assert layer.config.bias_activation_fusion and layer.config.bias_dropout_fusion


TEXT_MODEL = ("temporal.add_qkv_bias=true", "temporal.qk_layernorm=true", "temporal.kv_channels=24")


@pytest.mark.parametrize("preset, more", [("tiny", ()), ("tiny", TEXT_MODEL), ("digits", ()), ("moshi-7b", ())])
@pytest.mark.parametrize("recipe", ["fp32", "bf16", "fp8-tensorwise"])
def test_a_layer_has_as_many_parameters_as_are_counted(
    preset: str, more: tuple[str, ...], recipe: str, tmp_path: Path
) -> None:
    config = make_config(tmp_path, TE, f"precision.recipe={recipe}", *more, preset=preset)
    counted = count_parameters(config)["temporal"] - config.temporal.hidden_size  # the final norm
    layer = build_layer(config, device="meta")
    assert config.temporal.num_layers * sum(each.numel() for each in layer.parameters()) == counted


def saved(config: Config) -> set[tuple[str, str]]:
    model = SpeechTextModel(config, pre_process=True, post_process=True)
    metadata = {"dp_cp_group": torch.distributed.group.WORLD}
    return {(type(each).__name__, each.key) for each in nested_values(model.sharded_state_dict(metadata=metadata))}


@pytest.mark.parametrize("preset, more", [("tiny", ()), ("tiny", TEXT_MODEL), ("tiny-moe", ())])
def test_checkpoints_are_the_local_layers(preset: str, more: tuple[str, ...], tmp_path: Path) -> None:
    ours, theirs = (
        saved(make_config(tmp_path, f"model.transformer_impl={impl}", "precision.recipe=bf16", *more, preset=preset))
        for impl in ("local", "transformer_engine")
    )
    assert {key for key in ours if not key[1].endswith("_extra_state")} == {
        key for key in theirs if not key[1].endswith("_extra_state")
    }


def test_an_optimizer_of_few_bits(tmp_path: Path) -> None:
    overrides = ("use_precision_aware_optimizer=true", "exp_avg_dtype=bf16", "exp_avg_sq_dtype=fp8")
    config = make_config(tmp_path, "precision.recipe=bf16", *(f"optimizer.{each}" for each in overrides))
    found = optimizer_config(config)
    assert found.use_precision_aware_optimizer_no_fp8_or_ds_fp8 and found.store_param_remainders
    assert (found.exp_avg_dtype, found.exp_avg_sq_dtype) == (torch.bfloat16, torch.uint8)


def test_its_state_is_whole_in_checkpoints() -> None:
    """FusedAdam's own methods, on a host's tensors: only its constructor and its step want a GPU."""
    from transformer_engine.pytorch.optimizers import FusedAdam

    adam: Any = FusedAdam.__new__(FusedAdam)
    torch.optim.Optimizer.__init__(adam, [torch.nn.Parameter(torch.randn(64).bfloat16())], {})
    adam.store_param_remainders = adam.master_weights = True
    adam.name_to_dtype_map = {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.float32, MAIN: torch.float32}
    adam._scales = {}
    make_reshardable(adam)
    ((param,),) = (group["params"] for group in adam.param_groups)
    adam.initialize_state(param)
    assert adam.state[param][MAIN].dtype == torch.int16
    assert torch.equal(adam.get_unscaled_state(param, MAIN), param.detach().float())
    loaded = torch.randn(64)
    adam.set_scaled_state(param, MAIN, loaded)
    adam.set_scaled_state(param, "exp_avg_sq", loaded)
    assert torch.equal(adam.get_unscaled_state(param, MAIN), loaded)
    assert torch.equal(adam.get_unscaled_state(param, "exp_avg_sq"), loaded)


def test_scales_of_the_same_run_alone_are_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.fp8_utils import get_fp8_recipe

    monkeypatch.delenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", raising=False)
    config = make_config(tmp_path, TE, "precision.recipe=fp8-delayed", "precision.fp8_amax_history_len=4")
    trained, own, other = (build_layer(config, device="cpu").mlp for _ in range(3))
    linear = trained.linear_fc1
    linear.fp8_meta.update(recipe=get_fp8_recipe(trained.config), fp8_checkpoint=True, num_gemms=1)
    linear.init_fp8_meta_tensors(linear.fp8_meta["recipe"])
    linear.fp8_meta["scaling_fwd"].scale.fill_(8.0)
    state = trained.state_dict()
    load_model(own, state, with_scales=True)
    assert (own.linear_fc1.fp8_meta["scaling_fwd"].scale == 8).all()
    load_model(other, state, with_scales=False)
    assert "scaling_fwd" not in other.linear_fc1.fp8_meta
    assert torch.equal(other.linear_fc1.weight, linear.weight)
    with pytest.raises(RuntimeError, match="Refusing to load pickled"):  # what is not asked for is still refused
        other.load_state_dict(state)


def test_packed_rows_reach_its_attention_without_the_axis_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own attention needs a GPU: what it would be given."""
    given = {}

    def forward(self: object, query: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        given.update(options, shape=query.shape)
        return query.flatten(1)

    monkeypatch.setattr(attention.TEDotProductAttention, "forward", forward)
    core = attention.TransformerEngineAttention.__new__(attention.TransformerEngineAttention)
    torch.nn.Module.__init__(core)
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    query, key = torch.randn(12, 1, 4, 16), torch.randn(12, 1, 2, 16)
    out = core(query, key, key, None, packed_seq_params=attention.packed_attention(bounds, longest=64))
    packed = given["packed_seq_params"]
    assert out.shape == (12, 1, 64) and given["shape"] == (12, 4, 16)
    assert packed.qkv_format == "thd" and packed.max_seqlen_q == 64 and packed.cu_seqlens_kv is bounds
