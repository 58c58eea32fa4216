"""Layouts that are found: they fit, are valid, and wait as little as the depth transformer lets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from one_rank import make_config

from megaspeech.config import read_config
from megaspeech.config.computation import expand_layout
from megaspeech.planning.balance import balanced_pipelines
from megaspeech.planning.gpus import GPUS
from megaspeech.planning.nodes import find_node, group_rate
from megaspeech.planning.pipeline import least_seconds, pipeline_seconds
from megaspeech.planning.search import Machine, candidates, is_valid, obvious, plan_of, plans
from megaspeech.planning.stages import num_microbatches
from tools import plan_layout

H100 = next(gpu for gpu in GPUS if gpu.key == "h100-96gb")


@pytest.mark.parametrize("stages, chunks, microbatches", [(4, 1, 16), (4, 1, 2), (2, 3, 8), (4, 2, 4), (8, 5, 64)])
def test_an_even_pipeline_takes_what_the_formula_says(stages: int, chunks: int, microbatches: int) -> None:
    """m + (p - 1) / v microbatches (arXiv 2104.04473, sections 2.2.1 and 2.2.2)."""
    seconds = [[1 / chunks] * chunks] * stages
    expected = microbatches + (stages - 1) / chunks
    assert pipeline_seconds(seconds, num_microbatches=microbatches) == pytest.approx(expected)


def test_a_slow_last_chunk_holds_up_an_interleaved_pipeline() -> None:
    """Stages do as much, but the last one's work comes in one piece: the bubble is larger than the formula's."""
    uneven = pipeline_seconds([[1.0, 1.0], [0.2, 1.8]], num_microbatches=16)
    assert uneven > 1.05 * pipeline_seconds([[1.0, 1.0], [1.0, 1.0]], num_microbatches=16)


@given(
    seconds=st.integers(1, 3).flatmap(
        lambda chunks: st.lists(st.lists(st.floats(0.1, 3), min_size=chunks, max_size=chunks), min_size=2, max_size=5)
    ),
    rounds=st.integers(1, 6),
)
def test_no_pipeline_beats_the_bound_by_which_layouts_are_left_out(seconds: list[list[float]], rounds: int) -> None:
    number = rounds * len(seconds)
    assert pipeline_seconds(seconds, num_microbatches=number) >= least_seconds(seconds, num_microbatches=number) - 1e-9


@pytest.mark.parametrize(
    "layers, stages, chunks, load", [(44, 4, 1, 9.0), (80, 8, 2, 3.5), (32, 2, 4, 0.0), (7, 3, 1, 50)]
)
def test_layers_are_balanced(layers: int, stages: int, chunks: int, load: float) -> None:
    for keys in balanced_pipelines(layers, num_stages=stages, num_chunks=chunks, last_load=load):
        drawn = keys.get("pipeline_model_parallel_layout")
        if drawn:
            counts = [text.count("t") for text in expand_layout(drawn)]
            assert sum(counts) == layers and len(counts) == stages * chunks and min(counts) > 0
        elif "num_layers_in_last_pipeline_stage" in keys:
            last = keys["num_layers_in_last_pipeline_stage"]
            assert (layers - last) % ((stages - 1) * chunks) == 0
            assert last < (layers - last) / (stages - 1) or not load


def test_groups_within_a_node_are_faster() -> None:
    node = find_node(4)
    inside, across = (group_rate(H100, node, size=4, stride=stride) for stride in (1, 4))
    assert inside > 10 * across
    assert group_rate(H100, node, size=64, stride=1) == pytest.approx(4 * across)  # four adapters together
    with pytest.raises(ValueError, match="--gpus-per-node: no node of 5"):
        find_node(5)


def test_what_is_found_fits_and_is_the_fastest(tmp_path: Path) -> None:
    size = ("data.num_frames=4096", "data.length_multiple=4096", "precision.recipe=bf16", "training.micro_batch_size=1")
    base = make_config(tmp_path, *size, "training.global_batch_size=128", preset="8b")
    machine = Machine(H100, find_node(4), 16)
    found = plans(base, machine, most=5)
    times = [plan.time.seconds for plan in found]
    assert len(found) == 5 and times == sorted(times)
    assert all(plan.fullest.total_gb <= H100.memory_gb for plan in found)
    alone = obvious(base, machine)["replicas alone"]
    assert alone.fullest.total_gb > H100.memory_gb  # 6 bytes of each of 9 billion parameters, and activations
    best = found[0]
    assert sum(best.time.parts.values()) == best.time.seconds
    assert plan_of(best.config, Machine(H100, find_node(4), 16)).time.seconds == best.time.seconds
    slower = plan_of(best.config, Machine(next(gpu for gpu in GPUS if gpu.key == "a100"), find_node(8), 16))
    assert slower.time.seconds > 2 * best.time.seconds


def test_the_tool_writes_what_our_own_config_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "8b", "--gpus", "8", "--gpu", "h200", "--global-batch", "64", "--frames", "2048"]
    arguments += ["--recipe", "fp8-tensorwise", "--best", "3", "--audio-hours", "1000"]
    files = [
        "--json",
        str(tmp_path / "plan.json"),
        "--chart",
        str(tmp_path / "plan.png"),
        "--write",
        str(tmp_path / "run"),
    ]
    assert plan_layout.main([*arguments, *files, "--sweep", "8,16", "optimizer.lr=2e-4", "temporal.num_layers=30"]) == 0
    shown = capsys.readouterr().out
    assert "layouts that fit" in shown and "not measured yet" in shown and "assumed: " in shown
    written = read_config(tmp_path / "run" / "config.toml", world_size=8)
    first = json.loads((tmp_path / "plan.json").read_text())[0]
    assert first["gpu_hours"] == 8 * first["hours"] and first["flops"] > 6 * sum(first["parameters"]) * 64 * 2048 / 2
    assert written.parallel.model_dump(mode="json", exclude_defaults=True) == first["parallel"]
    assert written.run.name == "8b-8" and written.optimizer.lr == 2e-4 and written.precision.recipe == "fp8-tensorwise"
    assert written.temporal.num_layers == 30  # what was overridden is written down
    assert "--nodes 1 --gpus-per-node 8" in (tmp_path / "run" / "submit.sh").read_text()
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


PACKED = """
[run]
name = "mine"
[model]
preset = "8b"
[temporal]
num_layers = 28
[data]
pack = true
num_frames = 2048
[parallel]
tensor_model_parallel_size = 4
sequence_parallel = true
grad_reduce_in_fp32 = false
[optimizer]
use_precision_aware_optimizer = true
[training]
global_batch_size = 640
micro_batch_size = 1
[precision]
recipe = "bf16"
"""


def test_a_config_of_ones_own_keeps_all_but_its_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, written = tmp_path / "mine.toml", tmp_path / "plan" / "config.toml"
    path.write_text(PACKED)
    arguments = ["--model", str(path), "--gpus", "16", "--gpu", "h200", "optimizer.lr=2e-4"]
    assert plan_layout.main(arguments) == 2 and "--global-batch: " in capsys.readouterr().err
    arguments += ["--global-batch", "64", "--write", str(written.parent)]
    assert plan_layout.main([*arguments, "--sweep", "16,1", "--gpu", "h100-80gb"]) == 0
    shown = capsys.readouterr().out
    assert f"as {path} has it: fits" in shown and "none fits, or the batch cannot be shared out" in shown
    own = read_config(path, ["optimizer.lr=2e-4"])
    planned = read_config(written, world_size=16)
    assert planned.parallel != own.parallel and not planned.parallel.grad_reduce_in_fp32
    assert planned.parallel.context_parallel_size == 1 and planned.training.micro_batch_size == 1  # it packs
    sizes = {"parallel": own.parallel, "training": own.training}
    assert planned.model_copy(update=sizes) == own and planned.training.global_batch_size == 640
    # A layout that the overridden model cannot have is left out, and no fault.
    assert plan_layout.main([*arguments, "temporal.num_attention_heads=2", "temporal.num_query_groups=2"]) == 0
    assert f"as {path} has it: sizes or the global batch cannot be shared out so" in capsys.readouterr().out


def test_a_packed_run_has_as_many_rows_on_every_replica(tmp_path: Path) -> None:
    """What `data.mixture` rounds up: 36 rows on 8 replicas are 5 microbatches each, or 6 for two interleaved stages."""
    base = make_config(tmp_path, "data.pack=true", "training.micro_batch_size=1", preset="8b")
    base = base.model_copy(update={"training": base.training.model_copy(update={"global_batch_size": 36})})
    interleaved = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    turns = base.model_copy(update={"parallel": base.parallel.model_copy(update=interleaved)})
    assert num_microbatches(base, replicas=8) == 5 and num_microbatches(turns, replicas=8) == 6
    few = turns.model_copy(update={"training": base.training.model_copy(update={"global_batch_size": 2})})
    assert num_microbatches(few, replicas=8) == 2
    assert plan_of(few, Machine(H100, find_node(4), 16)).time.seconds > 0.01


@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.use_distributed_optimizer=false",),
        ("model.depth_graph_multiple=512",),
        ("precision.recipe=mxfp8", "precision.fp8_param_gather=true"),
    ],
)
def test_weights_are_gathered_late_only_where_a_run_may(overrides: tuple[str, ...], tmp_path: Path) -> None:
    size = ("data.num_frames=4096", "data.length_multiple=4096", "precision.recipe=bf16", "training.micro_batch_size=1")
    small = ("temporal.num_layers=8", "training.global_batch_size=64")
    base = make_config(tmp_path, *size, *small, *overrides, preset="8b")
    b200 = next(gpu for gpu in GPUS if gpu.key == "b200")
    found = [plan.config.parallel for plan in plans(base, Machine(b200, find_node(8), 8), most=20)]
    ddp = [parallel for parallel in found if parallel.data_parallel == "ddp"]
    assert ddp and all(one.overlap_grad_reduce and not one.overlap_param_gather for one in ddp)


def parts_of(directory: Path, *overrides: str, gpus: int = 8) -> dict[str, float]:
    """Seconds by part of four layers of the 8B."""
    size = ("data.num_frames=4096", "data.length_multiple=4096", "precision.recipe=bf16", "training.micro_batch_size=1")
    base = make_config(
        directory, *size, "temporal.num_layers=4", "training.global_batch_size=64", *overrides, preset="8b"
    )
    return plan_of(base, Machine(H100, find_node(8), gpus)).time.parts


def test_what_is_sent(tmp_path: Path) -> None:
    tensor = ("parallel.tensor_model_parallel_size=8", "parallel.sequence_parallel=true")
    mlp = ("parallel.recompute_granularity=selective", 'parallel.recompute_modules=["mlp"]')
    plain, again = (parts_of(tmp_path, *tensor, *keys)["tensor parallel"] for keys in ((), mlp))
    assert again == pytest.approx(plain * 12 / 10)  # the feed-forward part gathers and reduces once more
    shared, whole = (parts_of(tmp_path, f"parallel.use_distributed_optimizer={word}") for word in ("true", "false"))
    assert whole["data parallel"] == pytest.approx(shared["data parallel"] * 4 / 3)  # 2 x 4 bytes, not 4 + 2
    assert whole["optimizer"] > 3 * shared["optimizer"]
    stages = ("parallel.pipeline_model_parallel_size=4", "parallel.tensor_model_parallel_size=4", tensor[1])
    inside = parts_of(tmp_path, stages[0])["pipeline sends"]
    assert parts_of(tmp_path, *stages, gpus=16)["pipeline sends"] > inside  # stages 1 and 2 are on different nodes


def test_what_no_run_could_use_is_left_out(tmp_path: Path) -> None:
    size = ("data.num_frames=512", "data.length_multiple=512", "precision.recipe=bf16", "training.micro_batch_size=1")
    base = make_config(tmp_path, *size, "training.global_batch_size=256", preset="tiny-moe")
    found = list(candidates(base, Machine(H100, find_node(4), 4)))
    assert found and not [one for one in found if one.parallel.recompute_modules]  # "mlp" is no mixture of experts
    normed = make_config(
        tmp_path, *size, "training.global_batch_size=256", "temporal.qk_layernorm=true", "parallel.data_parallel=fsdp2"
    )
    wide = normed.model_copy(
        update={name: getattr(normed, name).model_copy(update={"hidden_size": 1024}) for name in ("temporal", "depth")}
    )
    heads = wide.temporal.model_copy(update={"kv_channels": 64})
    wide = wide.model_copy(update={"temporal": heads})
    assert is_valid(wide, num_gpus=64) and not is_valid(wide, num_gpus=128)  # norms of 64 numbers


def test_the_tool_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--model", "70b", "--gpus", "2", "--global-batch", "2", "--frames", "4096"]
    assert plan_layout.main(few) == 1 and "no layout fits" in capsys.readouterr().err
    assert plan_layout.main([*few, "--recipe", "fp7"]) == 2 and "precision.recipe" in capsys.readouterr().err
    assert plan_layout.main(["--model", "9b", "--gpus", "2"]) == 2
    assert "--model: 9b is neither a config nor a preset; these are tiny" in capsys.readouterr().err
    for arguments, words in (
        (["--recipe", "mxfp8"], 'the H100 SXM 80 GB has no products of "mxfp8"; use "bf16"'),
        (["--recipe", "fp8-delayed", "--gpu", "a100"], "the A100 SXM 80 GB has no products"),
        (
            ["--recipe", "fp8-blockwise", "--frames", "4097"],
            "data.num_frames: fp8-blockwise pads 4097 to a multiple of 128; plan with 4224",
        ),
        (["data.length_multiple=16", "--frames", "4090"], "data.length_multiple pads 4090 to a multiple of 16"),
    ):
        assert plan_layout.main([*few, *arguments]) == 2 and words in capsys.readouterr().err
    assert plan_layout.main(["--model", "8b", "--gpus", "7"]) == 1
    assert "no layout shares model and global batch out" in capsys.readouterr().err
    (tmp_path / "value.toml").write_text("parallel = 3")
    assert plan_layout.main(["--model", str(tmp_path / "value.toml"), "--gpus", "8"]) == 2
    assert "parallel: is a section, not a value" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plan_layout.main(["--model", "8b", "--gpus", "0"])
    assert "0 is not positive" in capsys.readouterr().err
    twelve = ["--model", "8b", "--gpus", "12", "--gpu", "h200", "--global-batch", "12", "--best", "1"]
    assert plan_layout.main(twelve) == 2  # a job has whole nodes
    assert "--gpus: 12 are no whole nodes of 8" in capsys.readouterr().err
    assert plan_layout.main([*twelve, "--gpus-per-node", "4", "--json", "/no/folder.json"]) == 2
    assert "/no/folder.json" in capsys.readouterr().err
    plan_layout.main([*twelve, "--gpus-per-node", "4"])
    shown = capsys.readouterr().out
    assert "tensor 4, no pipeline: " in shown and "FSDP alone: sizes or the global batch cannot" in shown
