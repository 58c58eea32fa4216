"""Parameters and operations from the config alone, against models that were built and products that were run."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from one_rank import make_config, one_rank  # noqa: F401
from torch.utils.flop_counter import FlopCounterMode

from megaspeech.model.counting import count_flops, count_parameters, padded_rows
from megaspeech.model.embedding import table_offsets
from megaspeech.model.speech_text_model import SpeechTextModel

GROUPED = ["depth.num_query_groups=2", "depth.ffn_hidden_size=70", "streams.num_codebooks=3"]
GROUPED += ["streams.delays=[0, 0, 1, 1, 0, 1, 1, 1]", "streams.text_cardinality=60"]
SHARED = ["depth.weights_per_step_schedule=[0, 1, 2, 2]", "depth.multi_linear=false", "depth.low_rank_embeddings=8"]
SHAPES = {
    "tiny": ("tiny", []),
    "digits": ("digits", []),
    "all different": ("tiny", GROUPED),
    "shared depth weights": ("tiny", SHARED),
    "a set for several": ("tiny", SHARED[:1]),
    "text alone": ("tiny", ["streams.num_codebooks=0", "streams.delays=[0, 0, 1, 1, 1]"]),
}
EXPERTS = {"experts": ("tiny-moe", ["temporal.num_moe_experts=3"])}
ATTENTION = {  # as of text models
    "biases": ("tiny", ["temporal.add_qkv_bias=true"]),
    "norms, wide heads": ("tiny", ["temporal.qk_layernorm=true", "temporal.kv_channels=24"]),
    "all of it, experts": (
        "tiny-moe",
        ["temporal.add_qkv_bias=true", "temporal.qk_layernorm=true", "temporal.kv_channels=10"],
    ),
}


HAND = {
    # Embedding: (48,001 + 32 x 2,049) x H. Temporal: L (2 H^2 + 2 H (H G / A) + 3 H F + 2 H) + H. Text head: 48,000 H.
    # Depth: 16 H D + (48,001 + 15 x 2,049) D + 6 (16 (4 D^2 + 3 D E) + 2 D) + 16 x 2,048 D.
    "8b": (465_178_624, 6_979_588_096, 196_608_000, 1_414_426_624),
    "13b": (581_473_280, 11_010_462_720, 245_760_000, 1_431_203_840),
    "40b": (930_357_248, 37_648_801_792, 393_216_000, 5_429_321_728),
    "70b": (930_357_248, 68_452_360_192, 393_216_000, 5_429_321_728),
}
"""Parameters by part, worked out apart from the code: width H, L layers of gate F, A heads, G groups; D and E depth."""


@pytest.mark.skipif(find_spec("moshi") is None, reason="moshi is not installed")
@pytest.mark.usefixtures("one_rank")
def test_moshi_7b_tensor_by_tensor(tmp_path: Path) -> None:
    """The preset's model holds every tensor of Kyutai's, by name and shape, and no other; no number of it is there."""
    from moshi_folders import packed

    from megaspeech.conversion import moshi
    from megaspeech.conversion.deferred import Deferred
    from megaspeech.conversion.moshi_config import LEGACY
    from megaspeech.conversion.rules import to_foreign
    from megaspeech.streaming.runtime import import_moshi

    config = make_config(tmp_path, preset="moshi-7b")
    with torch.device("meta"):
        model = SpeechTextModel(config, pre_process=True, post_process=True)
        kyutai = packed(import_moshi().LMModel(**LEGACY).state_dict())
    weights = {name: Deferred.of(tensor) for name, tensor in model.state_dict().items() if tensor is not None}
    ours = {name: one.shape for name, one in to_foreign(weights, moshi.rules(config)).items()}
    assert ours == {name: tuple(tensor.shape) for name, tensor in kyutai.items()}
    assert sum(tensor.numel() for tensor in kyutai.values()) == sum(count_parameters(config).values()) == 7_687_729_152


@pytest.mark.parametrize("preset", HAND)
def test_the_larger_presets(preset: str, tmp_path: Path) -> None:
    config = make_config(tmp_path, preset=preset)
    assert tuple(count_parameters(config).values()) == HAND[preset]
    assert config.streams.text_cardinality % 128 == 0 and len(config.streams.delays) == 33


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", SHAPES | EXPERTS | ATTENTION)
def test_parameters_equal_those_of_the_model(name: str, tmp_path: Path) -> None:
    preset, overrides = (SHAPES | EXPERTS | ATTENTION)[name]
    config = make_config(tmp_path, *overrides, preset=preset)
    model = SpeechTextModel(config, pre_process=True, post_process=True)
    built = {
        part: sum(parameter.numel() for parameter in module.parameters()) if module else 0
        for part, module in (
            ("embedding", model.embedding),
            ("temporal", model.temporal),
            ("text_head", model.text_head),
            ("depth", model.depth),
        )
    }
    streams = config.streams
    read = streams.cardinalities[: streams.num_codebooks]
    for part, cardinalities, width in (
        ("embedding", streams.cardinalities, config.temporal.hidden_size),
        ("depth", read, config.depth.low_rank_embeddings or config.depth.hidden_size),
    ):
        built[part] -= (padded_rows(cardinalities) - sum(cardinalities) - len(cardinalities)) * width
    assert count_parameters(config) == built


@pytest.mark.skipif(find_spec("moshi") is None, reason="moshi is not installed")
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", SHAPES)
def test_parameters_equal_those_of_the_runtime(name: str, tmp_path: Path) -> None:
    from moshi_folders import write_moshi

    from megaspeech.streaming.runtime import load_runtime

    preset, overrides = SHAPES[name]
    config = make_config(tmp_path, *overrides, preset=preset)
    model = SpeechTextModel(config, pre_process=True, post_process=True)
    runtime = load_runtime(write_moshi(model.state_dict(), tmp_path / "export", config=config))
    parts = {"emb": "embedding", "text_emb": "embedding", "transformer": "temporal", "out_norm": "temporal"}
    parts["text_linear"] = "text_head"
    counted = {"depth": 0}
    for key, parameter in runtime.named_parameters():
        part = parts.get(key.split(".")[0], "depth")
        counted[part] = counted.get(part, 0) + parameter.numel()
    assert count_parameters(config) == counted


def test_table_offsets_and_padding() -> None:
    assert table_offsets((48, 32, 32)) == [0, 49, 82]
    assert padded_rows((48, 32, 32)) == 128 and padded_rows((125, 1)) == 128 and padded_rows((126, 1)) == 256


def test_flops_of_a_case_computed_by_hand(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    # Temporal layer: q 64 x 64, k and v 64 x 32 each, out 64 x 64, gate, up, down 64 x 176 each = 46,080 weights.
    # 8 frames see 1 to 8 frames, 4.5 in the mean; scores and their products with the values: 2 x 64 x 4.5 = 576.
    # Depth, a codebook: in 64 x 32; two layers of 4 x 32 x 32 + 3 x 32 x 88 = 12,544; head 32 x 32; sum 28,160.
    # 4 codebooks see 2.5 in the mean: 2 layers x 2 x 32 x 2.5 = 320.
    assert count_flops(config, num_frames=8) == {
        "temporal": 2 * 4 * (46_080 + 576),
        "text_head": 2 * 48 * 64,
        "depth": 2 * 4 * (28_160 + 320),
    }


def test_flops_of_a_sample_longer_than_the_window(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    seen = sum(min(frame + 1, 12) for frame in range(60)) / 60  # 10.9, not 6.5
    assert count_flops(config, num_frames=60)["temporal"] == int(2 * 4 * (46_080 + 2 * 64 * seen))


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", [*SHAPES, "biases", "norms, wide heads"])
def test_matrix_products_equal_those_that_are_run(name: str, tmp_path: Path) -> None:
    """torch counts the products of a forward pass; attention's own are taken off, torch counts both halves of them."""
    preset, overrides = (SHAPES | ATTENTION)[name]
    config = make_config(tmp_path, *overrides, preset=preset)
    model = SpeechTextModel(config, pre_process=True, post_process=True)
    batch, frames = 2, 8
    codes_BST = torch.ones(batch, config.streams.num_streams, frames, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(codes_BST, torch.ones(batch, 1 + config.streams.num_codebooks, frames))
    products = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    seen, codebooks = (frames + 1) / 2, config.streams.num_codebooks
    attended = config.temporal.num_attention_heads * config.temporal.head_width
    scores = 2 * config.temporal.num_layers * 2 * attended * seen
    scores += 2 * codebooks * config.depth.num_layers * 2 * config.depth.hidden_size * (codebooks + 1) / 2
    # A delayed codebook's first frames are initial tokens without weight, but the frame enters with the others.
    assert products == batch * frames * (sum(count_flops(config, num_frames=frames).values()) - scores)
