"""Which layouts a model can have: what does not divide, or does not go together, is refused with its remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from one_rank import make_config

from megaspeech.config import ConfigError

PIPELINE = "parallel.pipeline_model_parallel_size=2"
OVERLAP = "parallel.overlap_grad_reduce=true"
SEQUENCE = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
ONE_LENGTH = ("data.num_frames=64", "data.length_multiple=64")
MXFP8 = ["precision.recipe=mxfp8", "precision.fp8_param_gather=true"]
GRAPHS = "model.depth_graph_multiple=256"
AWARE = "optimizer.use_precision_aware_optimizer=true"


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["temporal.num_query_groups=1", "parallel.tensor_model_parallel_size=2"], None),
        (
            ["temporal.num_attention_heads=8", "temporal.num_query_groups=2", "parallel.tensor_model_parallel_size=4"],
            None,
        ),
        (
            # 12 heads of 8 in 3 groups over 4 ranks
            [
                *("temporal.num_attention_heads=12", "temporal.num_query_groups=3", "temporal.hidden_size=96"),
                *("parallel.tensor_model_parallel_size=4", "temporal.ffn_hidden_size=176"),
            ],
            "temporal.num_query_groups: 3 and parallel.tensor_model_parallel_size = 4: one must divide the other",
        ),
        ([PIPELINE, "parallel.num_layers_in_last_pipeline_stage=1"], None),
        ([PIPELINE, "parallel.num_layers_in_last_pipeline_stage=5"], "with num_layers_in_last_pipeline_stage: -1"),
        (
            [
                *("parallel.pipeline_model_parallel_size=4", "parallel.num_layers_in_first_pipeline_stage=1"),
                "parallel.num_layers_in_last_pipeline_stage=2",
            ],
            "1 layers are left for 2 stages of 1 chunks",
        ),
        ([PIPELINE, "parallel.virtual_pipeline_model_parallel_size=2"], None),
        ([PIPELINE, "parallel.virtual_pipeline_model_parallel_size=4"], "4 layers are left for 2 stages of 4 chunks"),
        (["parallel.virtual_pipeline_model_parallel_size=2"], "needs a pipeline of 2 stages or more"),
        (
            [PIPELINE, "parallel.virtual_pipeline_model_parallel_size=2", "training.global_batch_size=24"],
            "3 microbatches on each data parallel rank",
        ),
        ([PIPELINE, "parallel.pipeline_model_parallel_layout=Ett|ttL"], None),
        ([PIPELINE, "parallel.pipeline_model_parallel_layout=E|(t|)*2t,tL"], None),
        ([PIPELINE, "parallel.pipeline_model_parallel_layout=Ett|tL"], "holds 3 layers (t), temporal.num_layers is 4"),
        ([PIPELINE, "parallel.pipeline_model_parallel_layout=Ett|t|tL"], "has 3 stages, not a multiple of"),
        ([PIPELINE, "parallel.pipeline_model_parallel_layout=ttE|ttL"], "must start with the embedding E"),
        ([PIPELINE, "parallel.pipeline_model_parallel_layout=Ettm|ttL"], "may hold E, t, L"),
        (
            [
                *(PIPELINE, "parallel.pipeline_model_parallel_layout=Ett|ttL"),
                "parallel.num_layers_in_last_pipeline_stage=2",
            ],
            "pipeline_model_parallel_layout says it already",
        ),
        (["parallel.expert_model_parallel_size=2"], "the model has no experts"),
        ([OVERLAP], None),
        (
            [OVERLAP, "parallel.data_parallel=fsdp2"],
            'parallel.overlap_grad_reduce: is for data_parallel = "ddp"',
        ),
        ([OVERLAP, "parallel.overlap_param_gather=true"], None),
        (["parallel.overlap_param_gather=true"], "parallel.overlap_param_gather: needs overlap_grad_reduce"),
        (
            [OVERLAP, "parallel.overlap_param_gather=true", "parallel.use_distributed_optimizer=false"],
            "parallel.overlap_param_gather: needs overlap_grad_reduce and use_distributed_optimizer",
        ),
        (["parallel.grad_reduce_in_fp32=false"], "false needs optimizer.use_precision_aware_optimizer"),
        ([AWARE, "parallel.grad_reduce_in_fp32=false", "optimizer.exp_avg_dtype=bf16"], None),
        ([AWARE, "parallel.data_parallel=fsdp2"], "optimizer.use_precision_aware_optimizer: needs parallel.use_dist"),
        (["optimizer.exp_avg_sq_dtype=fp8"], 'optimizer.exp_avg_sq_dtype: "fp8" needs use_precision_aware_optimizer'),
        (["parallel.tp_comm_overlap=true", *ONE_LENGTH], "parallel.tp_comm_overlap: is for sequence_parallel"),
        (["parallel.tp_comm_overlap=true", *SEQUENCE, *ONE_LENGTH], None),
        (["parallel.tp_comm_overlap=true", *SEQUENCE], "data.length_multiple: 16, but parallel.tp_comm_overlap has"),
        ([GRAPHS, "parallel.use_distributed_optimizer=false"], None),
        ([GRAPHS, "parallel.data_parallel=fsdp2"], "cannot hold what parallel.data_parallel = fsdp2 does"),
        ([GRAPHS, "parallel.recompute_granularity=full"], "what parallel.recompute_granularity = full does"),
        (["precision.fp8_param_gather=true"], "precision.fp8_param_gather: needs an FP8 recipe"),
        (MXFP8, None),
        (
            [*MXFP8, OVERLAP, "parallel.overlap_param_gather=true"],
            'parallel.overlap_param_gather: cannot gather FP8 weights of "mxfp8"',
        ),
        (["model.preset=tiny-moe", "parallel.expert_model_parallel_size=2"], None),
        (["model.preset=tiny-moe", "parallel.expert_model_parallel_size=3"], "num_moe_experts: 4 is not divisible"),
        (
            ["model.preset=tiny-moe", "parallel.expert_tensor_parallel_size=2"],
            "size: 2, but experts",
        ),
        (["model.preset=tiny-moe", "temporal.moe_router_topk=5"], "temporal.moe_router_topk: 5 of 4 experts"),
        (["model.preset=tiny-moe", "parallel.tensor_model_parallel_size=2"], "parallel.sequence_parallel: experts"),
        (
            ["model.preset=tiny-moe", "parallel.expert_model_parallel_size=2", "parallel.data_parallel=fsdp2"],
            "cannot spread experts over ranks",
        ),
        (["parallel.context_parallel_size=2"], None),
        (["parallel.data_parallel=megatron_fsdp"], None),
        (["parallel.data_parallel=megatron_fsdp", PIPELINE], "knows no pipeline"),
    ],
)
def test_layouts(tmp_path: Path, overrides: list[str], words: str | None) -> None:
    if words is None:
        make_config(tmp_path, *overrides)
        return
    with pytest.raises(ConfigError) as caught:
        make_config(tmp_path, *overrides)
    (fault,) = caught.value.faults
    assert words in fault


def test_a_layout_in_words(tmp_path: Path) -> None:
    assert make_config(tmp_path).parallel.describe(1) == "data 1"
    parallel = make_config(
        tmp_path, PIPELINE, "parallel.pipeline_model_parallel_layout=E|tt|t|tL", "parallel.data_parallel=fsdp2"
    ).parallel
    assert parallel.num_chunks == 2
    assert parallel.describe(8) == "pipeline 2 x data 8, fsdp2, interleaved"
