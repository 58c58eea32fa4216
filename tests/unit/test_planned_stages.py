"""Counts of the planner against the real modules of single stages, built as fake ranks, and their real schedule."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from one_rank import make_config
from torch.distributed.fsdp import FSDPModule

from megaspeech.config import Config
from megaspeech.model.speech_text_model import SpeechTextModel
from megaspeech.parallel.fake_ranks import fake_rank
from megaspeech.parallel.wrap import wrap
from megaspeech.planning.activations import LOCAL, saved_bytes
from megaspeech.planning.memory import stage_memory
from megaspeech.planning.rehearsal import faults_between, ranks_of_a_replica, rehearse, without_gpu
from megaspeech.planning.stages import stages_of
from megaspeech.planning.truth import _buffers, measure_stage
from tools import rehearse as rehearse_tool

TENSOR = ("parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true")
PIPELINE = ("parallel.pipeline_model_parallel_size=2", "parallel.num_layers_in_last_pipeline_stage=3")
CASES = {
    "tp4 pp2": (*TENSOR, *PIPELINE),
    "tp4 pp2 full": (*TENSOR, *PIPELINE, "parallel.recompute_granularity=full"),
    "pp2 block": (
        *("parallel.pipeline_model_parallel_size=2", "parallel.recompute_granularity=full"),
        *("parallel.recompute_method=block", "parallel.recompute_num_layers=3"),
    ),
    "pp2 uniform": (
        *("parallel.pipeline_model_parallel_size=2", "parallel.recompute_granularity=full"),
        *("parallel.recompute_method=uniform", "parallel.recompute_num_layers=2"),
    ),
    "tp4 pp2 mlp": (
        *(*TENSOR, *PIPELINE, "parallel.recompute_granularity=selective"),
        'parallel.recompute_modules=["mlp"]',
    ),
    "pp2 interleaved": (
        "parallel.pipeline_model_parallel_size=2",
        'parallel.pipeline_model_parallel_layout="Et*3|t*2|t*2|tL"',
    ),
    "tp2, no sequence parallel": ("parallel.tensor_model_parallel_size=2",),
    "cp2 dp6": ("parallel.context_parallel_size=2",),
    "heads of their own width": ("temporal.kv_channels=256", "temporal.add_qkv_bias=true"),
    "norms of queries and keys": ("temporal.qk_layernorm=true",),
    "text alone": ("streams.num_codebooks=0", f"streams.delays={[0] * 17}"),
}


def run_of(directory: Path, *overrides: str, preset: str = "8b") -> Config:
    return make_config(
        directory,
        *(
            "precision.recipe=bf16",
            "data.num_frames=512",
            "training.micro_batch_size=1",
            "model.transformer_impl=local",
        ),
        *(() if preset == "tiny" else ("temporal.num_layers=8",)),
        *overrides,
        preset=preset,
    )


@pytest.mark.parametrize("name", CASES)
def test_the_8b_in_the_flesh(name: str, tmp_path: Path) -> None:
    """Parameters and bytes of state exactly, activations within 10% (they come out within 3%)."""
    config, replicas = run_of(tmp_path, *CASES[name], "training.global_batch_size=24"), 6
    parallel = config.parallel
    for planned in stage_memory(config, data_parallel_size=replicas, layer_kind=LOCAL):
        stage = planned.stage
        real = measure_stage(config, stage=stage.index, world_size=parallel.model_parallel_size * replicas)
        assert sum(planned.parameters.values()) == real.parameters
        assert planned.state["weights"] == real.weights and planned.state["gradients"] == real.gradients
        assert planned.state["main weights"] == pytest.approx(real.main_weights, abs=128 * 6 * 4 * 2)  # padding
        assert planned.state["moments"] == 2 * planned.state["main weights"]
        if parallel.context_parallel_size == 1:  # the local attention keeps keys and values gathered
            last = len(stage.chunks) - 1
            saved = sum(
                sum(
                    saved_bytes(
                        config,
                        num_layers=layers,
                        is_first=stage.is_first and chunk == 0,
                        is_last=stage.is_last and chunk == last,
                        layer_kind=LOCAL,
                    ).values()
                )
                for chunk, layers in enumerate(stage.chunks)
            )
            assert saved == pytest.approx(real.activations, rel=0.1)


@pytest.mark.parametrize("tensor, expert, expert_tensor", [(1, 4, 1), (1, 2, 1), (2, 2, 1), (2, 2, 2), (2, 1, 2)])
def test_experts_state_is_shared_by_the_ranks_that_hold_the_same(
    tensor: int, expert: int, expert_tensor: int, tmp_path: Path
) -> None:
    layout = {"tensor_model": tensor, "expert_model": expert, "expert_tensor": expert_tensor}
    keys = [f"parallel.{name}_parallel_size={size}" for name, size in layout.items()]
    config = run_of(tmp_path, *keys, f"parallel.sequence_parallel={str(tensor > 1).lower()}", preset="tiny-moe")
    with fake_rank(config, rank=0, world_size=8):
        wrapped = wrap(config, num_chunks=1, build=_whole(config), initialise=lambda model: None)
        real = _buffers(wrapped)
        wrapped.release()
    (planned,) = stage_memory(config, data_parallel_size=8 // tensor, layer_kind=LOCAL)
    for kind, name in (("weights", "weights"), ("gradients", "gradients"), ("main weights", "main_weights")):
        assert planned.state[kind] == pytest.approx(real[name], abs=2 * 128 * 8 * 4)  # padding


@pytest.mark.parametrize("preset", ["tiny", "8b"])
def test_what_fully_sharded_ranks_gather(preset: str, tmp_path: Path) -> None:
    """torch gathers layer by layer, and keeps what belongs to none: the heads, and some of the depth transformer."""
    config = run_of(tmp_path, "parallel.data_parallel=fsdp2", "parallel.tensor_model_parallel_size=2", preset=preset)
    with fake_rank(config, rank=0, world_size=16):
        wrapped = wrap(config, num_chunks=1, build=_whole(config), initialise=lambda model: None)
        sizes = {}
        for module in wrapped.chunks[0].modules():
            if isinstance(module, FSDPModule):
                groups = module._get_fsdp_state()._fsdp_param_groups
                sizes[module] = sum(one._orig_size.numel() for group in groups for one in group.fsdp_params)
        wrapped.release()
    root = sizes.pop(wrapped.models[0])
    (planned,) = stage_memory(config, data_parallel_size=8, layer_kind=LOCAL)
    del sizes[wrapped.models[0].embedding]  # its turn comes when no activations are left
    assert planned.state["gathered"] == pytest.approx((3 * 2 + 4) * max(sizes.values()) + 2 * 2 * root, rel=0.02)
    if (
        preset == "8b"
    ):  # the peak of real microbatches: what is gathered and the gradients are not at once at their most
        real = rehearse(config, world_size=16, rank=0)
        beside = planned.state["gathered"] + planned.state["gradients"] + planned.activations + planned.working
        assert not real.fault and 1 < beside / 1e9 / real.peak_gb < 1.25


def _whole(config: Config) -> Callable[[int | None], SpeechTextModel]:
    return lambda vp_stage: SpeechTextModel(config, pre_process=True, post_process=True)


@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.pipeline_model_parallel_size=4", "parallel.num_layers_in_last_pipeline_stage=2"),
        ("parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"),
    ],
    ids=["1F1B", "interleaved"],
)
def test_microbatches_in_flight(layout: tuple[str, ...], tmp_path: Path) -> None:
    """What the real schedule holds at its fullest is what the planner adds up, within 16%: it takes a layer's worst
    moment to fall together with the fullest of the pipeline."""
    config = run_of(tmp_path, *layout, "training.global_batch_size=8")
    world = config.parallel.pipeline_model_parallel_size
    for planned in stage_memory(config, data_parallel_size=1, layer_kind=LOCAL)[:: world - 1]:
        real = rehearse(config, world_size=world, rank=planned.stage.index)
        assert not real.fault
        assert (planned.activations + planned.working) / 1e9 == pytest.approx(real.peak_gb, rel=0.16)


@pytest.mark.parametrize(
    "keys",
    [
        {"parallel.pipeline_model_parallel_size": 4},
        {"parallel.pipeline_model_parallel_size": 4, "parallel.num_layers_in_last_pipeline_stage": 2},
        {"parallel.pipeline_model_parallel_size": 2, "parallel.virtual_pipeline_model_parallel_size": 4},
        {"parallel.pipeline_model_parallel_size": 2, "parallel.pipeline_model_parallel_layout": '"Et*3|t*2|t*2|tL"'},
    ],
)
def test_layers_are_dealt_out_as_megatron_does(keys: dict[str, object], tmp_path: Path) -> None:
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    from megaspeech.model.temporal import transformer_config

    config = run_of(tmp_path, *(f"{key}={value}" for key, value in keys.items()))
    world = config.parallel.pipeline_model_parallel_size
    for stage in stages_of(config):
        with fake_rank(config, rank=stage.index, world_size=world):
            chunks = range(len(stage.chunks)) if len(stage.chunks) > 1 else [None]
            megatron = transformer_config(config)
            assert stage.chunks == tuple(get_num_layers_to_build(megatron, chunk) for chunk in chunks)


def test_a_rehearsal_finds_what_does_not_fit_together(tmp_path: Path) -> None:
    layout = (
        *("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"),
        "parallel.pipeline_model_parallel_size=2",
    )
    config = run_of(tmp_path, *layout, "data.num_frames=32", preset="tiny")
    verdicts = [rehearse(config, world_size=8, rank=rank) for rank in ranks_of_a_replica(config, world_size=8)]
    assert [verdict.rank for verdict in verdicts] == [0, 1, 4, 5] and not any(each.fault for each in verdicts)
    assert verdicts[0].sent["next"] == {(16, 1, 64)}
    assert faults_between(verdicts, config=config, world_size=8) == []
    verdicts[2].received["prev"] = {(32, 1, 64)}
    assert any("sends, the next waits for" in fault for fault in faults_between(verdicts, config=config, world_size=8))
    verdicts[1].parts.clear()
    assert any(
        re.match("checkpoint: .*embedding", fault) for fault in faults_between(verdicts, config=config, world_size=8)
    )


def test_what_needs_a_gpu_is_named(tmp_path: Path) -> None:
    config = make_config(tmp_path, "precision.recipe=fp8-blockwise", "data.num_frames=200", preset="8b")
    plain, words = without_gpu(config)
    assert plain.precision.recipe == "bf16" and plain.data.num_frames == 256
    assert any("precision.recipe = fp8-blockwise" in line for line in words)
    assert any("padded to 256" in line for line in words)


def test_the_tool_gives_a_verdict_a_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_config(tmp_path)
    path, bf16 = str(tmp_path / "config.toml"), "precision.recipe=bf16"
    assert rehearse_tool.main([path, bf16, "parallel.pipeline_model_parallel_size=2", "--world-size", "2"]) == 0
    shown = capsys.readouterr().out
    assert len(re.findall(r"rank \d.*: runs:", shown)) == 2 and "make up one checkpoint" in shown
    assert rehearse_tool.main([path, "parallel.pipeline_model_parallel_size=3", "--world-size", "3"]) == 2
    assert "temporal.num_layers" in capsys.readouterr().err
    fsdp = [path, bf16, "parallel.data_parallel=fsdp2", "parallel.pipeline_model_parallel_size=2", "--world-size", "8"]
    assert rehearse_tool.main(fsdp) == 0 and "make up one checkpoint" in capsys.readouterr().out
    packed = ["data.pack=true", "training.micro_batch_size=1", "training.global_batch_size=3"]  # fewer than replicas
    turns = ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"]
    assert rehearse_tool.main([path, bf16, *packed, *turns, "--world-size", "8"]) == 0
    assert rehearse_tool.main([path, "model.preset=tiny-moe", "--world-size", "4"]) == 2
    assert "temporal.num_moe_experts: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        rehearse_tool.main([path, "--world-size", "0"])
    # 24 ranks do not divide the widths: torch's FSDP has no axis to cut.
    path24 = [path, "parallel.data_parallel=fsdp2", "training.global_batch_size=192", "--world-size", "24"]
    assert rehearse_tool.main(path24) == 1
    assert "cannot be shared out evenly" in capsys.readouterr().out
    assert not torch.distributed.is_initialized()
