"""The time model against published tables of NVIDIA's own runs, whose shapes it is given."""

from __future__ import annotations

from pathlib import Path

import pytest
from one_rank import make_config

from megaspeech.config import Config
from megaspeech.planning.activations import TRANSFORMER_ENGINE
from megaspeech.planning.gpus import GPUS
from megaspeech.planning.memory import stage_memory
from megaspeech.planning.nodes import find_node
from megaspeech.planning.step_time import StepTime, step_time

H100 = next(gpu for gpu in GPUS if gpu.key == "h100-80gb")

# heads, hidden, layers, tp, pp, gpus, batch, TFLOP/s of a GPU. README of NVIDIA/Megatron-LM, images/model_table.png of
# commit 937571cfd4 (2024): H100s, BF16, 4,096 tokens, a vocabulary of 131,072, all communication overlapped.
MEGATRON = {
    "1.7B": (16, 2048, 24, 1, 1, 48, 192, 408.8),
    "7.1B": (32, 4096, 30, 2, 1, 96, 192, 465.9),
    "16B": (48, 6144, 32, 4, 1, 192, 192, 489.1),
    "32B": (56, 7168, 48, 8, 1, 384, 192, 459.6),
    "70B": (64, 8192, 84, 8, 2, 768, 384, 419.7),
    "119B": (80, 10240, 92, 8, 4, 1536, 768, 420.5),
    "177B": (96, 12288, 96, 8, 6, 2304, 1152, 432.8),
    "314B": (128, 16384, 96, 8, 8, 3072, 1536, 474.4),
    "462B": (144, 18432, 112, 8, 16, 6144, 3072, 459.9),
}


def gpt(
    directory: Path, *, heads: int, hidden: int, layers: int, gate: int, groups: int, vocabulary: int, **more
) -> Config:
    """A text model as one of ours: its vocabulary as text, and next to nothing of codebooks."""
    fields = {
        **{"temporal.num_layers": layers, "temporal.hidden_size": hidden, "temporal.num_attention_heads": heads},
        **{"temporal.num_query_groups": groups, "temporal.ffn_hidden_size": gate, "temporal.context": 1 << 20},
        **{"streams.text_cardinality": vocabulary, "streams.num_codebooks": 1, "streams.num_given_codebooks": 0},
        **{"streams.cardinality": 64, "streams.delays": "[0, 0]", "depth.num_layers": 1, "depth.hidden_size": 64},
        **{"depth.num_attention_heads": 1, "depth.num_query_groups": 1, "depth.ffn_hidden_size": 64},
        **{"parallel.overlap_grad_reduce": "true", "parallel.overlap_param_gather": "true"},
        **more,
    }
    return make_config(directory, *(f"{key}={value}" for key, value in fields.items()))


def predict(config: Config, *, gpus: int) -> StepTime:
    replicas = gpus // config.parallel.model_parallel_size
    memory = stage_memory(config, data_parallel_size=replicas, layer_kind=TRANSFORMER_ENGINE)
    return step_time(config, memory, gpu=H100, node=find_node(8), num_gpus=gpus)


def layout(tp: int, pp: int, chunks: int, **more) -> dict[str, object]:
    found = {"parallel.tensor_model_parallel_size": tp, "parallel.pipeline_model_parallel_size": pp}
    if tp > 1:
        found |= {"parallel.sequence_parallel": "true", "parallel.tp_comm_overlap": "true"}
    if chunks > 1:
        found["parallel.virtual_pipeline_model_parallel_size"] = chunks
    return found | more


@pytest.mark.parametrize("name", MEGATRON)
def test_megatron_on_h100s(name: str, tmp_path: Path) -> None:
    """The table tells neither microbatch nor virtual stages. Assumed are: without a pipeline all four sequences of a
    rank at once, else one, and as many virtual stages as leave two layers each, or one of an odd number of layers."""
    heads, hidden, layers, tp, pp, gpus, batch, expected = MEGATRON[name]
    each = layers // pp
    chunks = 1 if pp == 1 else each // 2 if each % 2 == 0 else each
    micro = 4 if pp == 1 else 1
    config = gpt(
        tmp_path,
        **{"heads": heads, "hidden": hidden, "layers": layers, "groups": heads, "vocabulary": 131072},
        gate=round(8 * hidden / 3 / tp) * tp,  # gated, as many weights as 4 h without a gate
        **layout(tp, pp, chunks),
        **{"data.num_frames": 4096, "data.length_multiple": 4096, "precision.recipe": "bf16"},
        **{"training.micro_batch_size": micro, "training.global_batch_size": batch},
    )
    found = predict(config, gpus=gpus)
    # Their count: arXiv 2104.04473, equation 3, without recomputation; scores are counted whole.
    flops = 72 * batch * 4096 * layers * hidden**2 * (1 + 4096 / (6 * hidden) + 131072 / (12 * layers * hidden))
    assert flops / found.seconds / gpus / 1e12 == pytest.approx(expected, rel=0.15)


# heads, groups, hidden, gate, layers, vocabulary, tokens, tp, pp, virtual, cp, micro, batch, gpus, tokens/s of a GPU;
# NeMo 24.07's docs/source/performance/performance_summary.md: DGX H100, FP8; shapes are those of the models' papers.
NEMO = {
    "GPT3 175B": (96, 96, 12288, 32768, 96, 51200, 2048, 4, 8, 6, 1, 1, 256, 128, 716),
    "Llama 2 7B": (32, 32, 4096, 11008, 32, 32000, 4096, 1, 1, 1, 1, 1, 128, 8, 16934),
    "Llama 2 13B": (40, 40, 5120, 13824, 40, 32000, 4096, 1, 4, 10, 1, 1, 128, 16, 8715),
    "Llama 2 70B": (64, 8, 8192, 28672, 80, 32000, 4096, 4, 4, 20, 1, 1, 128, 64, 1728),
    "Llama 3 8B": (32, 8, 4096, 14336, 32, 128256, 8192, 1, 1, 1, 2, 1, 128, 8, 12273),
    "Llama 3 70B": (64, 8, 8192, 28672, 80, 128256, 8192, 4, 4, 5, 2, 1, 128, 64, 1524),
}


@pytest.mark.parametrize("name", NEMO)
def test_nemo_on_h100s_in_fp8(name: str, tmp_path: Path) -> None:
    expected = NEMO[name][-1]
    config, gpus = nemo_config(name, tmp_path)
    found = predict(config, gpus=gpus)
    assert found.frames_per_second / gpus == pytest.approx(expected, rel=0.15)


def nemo_config(name: str, directory: Path) -> tuple[Config, int]:
    """(its run as one of ours, GPUs)."""
    heads, groups, hidden, gate, layers, vocabulary, tokens, tp, pp, chunks, cp, micro, batch, gpus, _ = NEMO[name]
    config = gpt(
        directory,
        **{
            "heads": heads,
            "hidden": hidden,
            "layers": layers,
            "groups": groups,
            "vocabulary": vocabulary,
            "gate": gate,
        },
        **layout(tp, pp, chunks, **{"parallel.context_parallel_size": cp}),
        **{"data.num_frames": tokens, "data.length_multiple": tokens, "precision.recipe": "fp8-delayed"},
        **{"training.micro_batch_size": micro, "training.global_batch_size": batch},
    )
    return config, gpus
