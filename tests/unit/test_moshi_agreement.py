"""The native model is Kyutai's: logits of both on the same codes, and the loss against moshi-finetune's formula."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from moshi_folders import moshi_state, write_moshi
from one_rank import make_config, one_rank  # noqa: F401
from torch import Tensor
from torch.nn import functional as F

from megaspeech.config import Config
from megaspeech.conversion.moshi import RUN_FILE
from megaspeech.conversion.moshi_config import CONFIG_FILE, WEIGHTS_FILE
from megaspeech.model.speech_text_model import SpeechTextModel
from megaspeech.streaming.agreement import largest_difference
from megaspeech.streaming.runtime import load_runtime

# Not importorskip: moshi is for `streaming.runtime` to import, which sets what moshi reads when it is imported.
pytestmark = [
    pytest.mark.usefixtures("one_rank"),
    pytest.mark.skipif(find_spec("moshi") is None, reason="moshi is not installed"),
]

TOLERANCE = 2e-5  # FP32; a hundred times less than any mistake made on purpose
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "tiny": ("tiny", []),
    "digits": ("digits", ["temporal.num_layers=2"]),
    "no grouped queries": ("tiny", ["temporal.num_query_groups=4"]),
    "one group": ("tiny", ["temporal.num_query_groups=1"]),
    "odd cardinalities": ("tiny", ["streams.cardinality=31", "streams.text_cardinality=47"]),
    "depth with grouped queries": ("tiny", ["depth.num_query_groups=2"]),
    "delays": ("tiny", ["streams.delays=[0, 0, 1, 3, 3, 1, 0, 2, 5]"]),
    "delays, text too": ("tiny", ["streams.delays=[2, 0, 1, 3, 3, 1, 0, 2, 5]"]),
    "nothing heard": ("tiny", ["streams.num_given_codebooks=0", "streams.delays=[0, 0, 1, 1, 1]"]),
    "more heard than said": ("tiny", ["streams.num_codebooks=2", "streams.delays=[0, 0, 1, 0, 1, 1, 1]"]),
    "another rotary base": ("tiny", ["temporal.rotary_base=100"]),
    "window of 1": ("tiny", ["temporal.context=1"]),
    "window beyond the sample": ("tiny", ["temporal.context=400"]),
    # dim_feedforward = 4 * dim means a gate of 21/8 * dim to the runtime, not 8/3: both sides of the exception.
    "gate of 21/8": ("tiny", ["temporal.ffn_hidden_size=168", "depth.ffn_hidden_size=84"]),
    "gate of 8/3": (
        "tiny",
        ["temporal.hidden_size=48", "temporal.ffn_hidden_size=128", "depth.hidden_size=24", "depth.ffn_hidden_size=64"],
    ),
    # int(396 / 184 * 184) is 395.
    "a width whose hidden_scale rounds down": ("tiny", ["temporal.hidden_size=184", "temporal.ffn_hidden_size=264"]),
    "odd gates": ("tiny", ["temporal.ffn_hidden_size=175", "depth.ffn_hidden_size=87"]),
}


def build(config: Config) -> SpeechTextModel:
    """A whole model whose norms are no ones and whose tables are large enough to tell streams apart."""
    model = SpeechTextModel(config, pre_process=True, post_process=True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_agree(name: str, tmp_path: Path) -> None:
    preset, overrides = VARIANTS[name]
    config = make_config(tmp_path, *overrides, preset=preset)
    model = build(config)
    runtime = load_runtime(write_moshi(model.state_dict(), tmp_path / "export", config=config))
    assert largest_difference(model, runtime, streams=config.streams, num_frames=32) < TOLERANCE


@pytest.mark.parametrize(
    "weight",
    [
        "embedding.weight",
        "temporal.block.layers.3.self_attention.linear_qkv.weight",
        "temporal.block.layers.0.pre_mlp_layernorm.weight",
        "depth.embedding",
        "depth.layers.1.fc2.weight",
        "depth.heads.weight",
    ],
)
def test_difference_is_noticed(weight: str, tmp_path: Path) -> None:
    """The check itself can fail: one column of one weight is enough."""
    config = make_config(tmp_path)
    model = build(config)
    runtime = load_runtime(write_moshi(model.state_dict(), tmp_path / "export", config=config))
    with torch.no_grad():
        model.state_dict()[weight][..., 5] += 1.0
    assert largest_difference(model, runtime, streams=config.streams) > 1e-4


def test_a_gate_that_the_runtime_cannot_compute_is_refused(tmp_path: Path) -> None:
    # int(2 * dim_feedforward / 3) = 85 needs dim_feedforward = 128 = 4 * 32, for which the runtime computes 84.
    config = make_config(tmp_path, "depth.ffn_hidden_size=85")
    with pytest.raises(ValueError, match="ffn_hidden_size 85"):
        write_moshi(build(config).state_dict(), tmp_path / "export", config=config)
    assert not (tmp_path / "export" / CONFIG_FILE).exists()


def test_export_has_the_released_names_and_no_padding(tmp_path: Path) -> None:
    from safetensors import safe_open

    config = make_config(tmp_path)
    write_moshi(build(config).state_dict(), tmp_path / "export", config=config)
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == [CONFIG_FILE, RUN_FILE, WEIGHTS_FILE]
    assert "depformer_causal" not in json.loads((tmp_path / "export" / CONFIG_FILE).read_text())
    with safe_open(tmp_path / "export" / WEIGHTS_FILE, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes["text_emb.weight"] == (49, 64) and shapes["emb.7.weight"] == (33, 64)
    assert shapes["depformer_text_emb.weight"] == (49, 32) and shapes["depformer_emb.2.weight"] == (33, 32)
    assert "depformer_emb.3.weight" not in shapes and shapes["linears.3.weight"] == (32, 32)
    assert shapes["transformer.layers.0.self_attn.in_proj_weight"] == (64 + 2 * 32, 64)
    assert shapes["depformer.layers.1.self_attn.in_proj_weight"] == (4 * 3 * 32, 32)
    assert shapes["transformer.layers.0.norm1.alpha"] == (1, 1, 64)


def test_export_uses_every_weight_once(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    model = build(config)
    exported = moshi_state(model.state_dict(), config=config)
    ones = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items() if tensor is not None and
            isinstance(tensor, Tensor)}  # fmt: skip
    total = sum(int(tensor.sum()) for tensor in moshi_state(ones, config=config).values())
    padding = (model.embedding.weight.shape[0] - (48 + 8 * 32 + 9)) * 64
    padding += (model.depth.embedding.shape[0] - (48 + 3 * 32 + 4)) * 32
    assert total == sum(parameter.numel() for parameter in model.parameters()) - padding
    assert total == sum(tensor.numel() for tensor in exported.values())


def sample_codes(config: Config, *, num_frames: int = 24) -> Tensor:
    """Codes `[3, S, T]`, zero tokens and runs of PAD and EPAD among them."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(-1, size, (3, num_frames), generator=generator) for size in config.streams.cardinalities]
    codes_BST = torch.stack(rows, dim=1)
    codes_BST[:, 0, 3:9], codes_BST[:, 0, 9] = config.streams.text_pad_id, config.streams.text_end_pad_id
    codes_BST[2, :, -5:] = -1
    return codes_BST


def finetune_weights(codes_BST: Tensor, *, config: Config) -> Tensor:
    """moshi-finetune's weights `[B, P, T]`: text padding 0.5, first codebook 100; what falls off the end 0."""
    streams, loss = config.streams, config.loss
    predicted = codes_BST[:, : 1 + streams.num_codebooks]
    weights_BPT = torch.ones(predicted.shape)
    padding = (predicted[:, 0] == streams.text_pad_id) | (predicted[:, 0] == streams.text_end_pad_id)
    weights_BPT[:, 0][padding] = loss.text_padding
    weights_BPT[:, 1] = loss.semantic
    weights_BPT[predicted == -1] = 0
    for stream, delay in enumerate(streams.delays[: 1 + streams.num_codebooks]):
        weights_BPT[:, stream, weights_BPT.shape[-1] - delay :] = 0
    return weights_BPT


@pytest.mark.parametrize("delays", ["[0, 0, 1, 1, 1, 0, 1, 1, 1]", "[1, 0, 2, 3, 1, 4, 0, 0, 2]"])
def test_loss_is_that_of_moshi_finetune(delays: str, tmp_path: Path) -> None:
    config = make_config(tmp_path, f"streams.delays={delays}")
    model = build(config)
    runtime = load_runtime(write_moshi(model.state_dict(), tmp_path / "export", config=config))
    codes_BST = sample_codes(config)
    weights_BPT = finetune_weights(codes_BST, config=config)
    weighted, statistics = model(codes_BST, weights_BPT)
    sums = torch.stack([weights_BPT[:, 0].sum(), weights_BPT[:, 1:].sum()])

    with torch.no_grad():
        out = runtime(codes_BST)
    text = _masked_mean(out.text_logits, codes_BST[:, :1], out.text_mask, weights_BPT[:, :1])
    own = slice(1, 1 + config.streams.num_codebooks)
    audio = _masked_mean(out.logits, codes_BST[:, own], out.mask, weights_BPT[:, 1:])
    assert (weighted / sums).tolist() == pytest.approx([text, audio], rel=1e-5)
    _assert_statistics(statistics, out, codes_BST=codes_BST, own=own)


def _masked_mean(logits_BPTV: Tensor, targets_BPT: Tensor, mask_BPT: Tensor, weights_BPT: Tensor) -> float:
    """sum(w * cross entropy) / sum(w) over the runtime's own mask (moshi-finetune, finetune/loss.py)."""
    assert ((weights_BPT > 0) == mask_BPT).all()  # what is weighed is what the runtime defines
    losses = F.cross_entropy(logits_BPTV[mask_BPT], targets_BPT[mask_BPT], reduction="none")
    return float((losses * weights_BPT[mask_BPT]).sum() / weights_BPT[mask_BPT].sum())


def _assert_statistics(statistics_P3: Tensor, out: object, *, codes_BST: Tensor, own: slice) -> None:
    """Per predicted stream: sum of unweighted cross entropies, tokens counted, tokens right."""
    streams = [(out.text_logits[:, 0], codes_BST[:, 0], out.text_mask[:, 0])]
    streams += zip(out.logits.unbind(1), codes_BST[:, own].unbind(1), out.mask.unbind(1), strict=True)
    assert len(statistics_P3) == len(streams)
    for (loss, count, right), (logits, targets, mask) in zip(statistics_P3.tolist(), streams, strict=True):
        expected = F.cross_entropy(logits[mask], targets[mask], reduction="sum")
        assert loss == pytest.approx(float(expected), rel=1e-5)
        assert count == int(mask.sum()) > 0
        assert right == int((logits[mask].argmax(-1) == targets[mask]).sum())


def test_accuracy_counts_only_what_is_right_and_weighs(tmp_path: Path) -> None:
    """Text chosen by the model itself is right, moved by one it is wrong, and without weight it is not counted."""
    config = make_config(tmp_path)
    model = build(config).eval()
    codes_BST = sample_codes(config)
    with torch.no_grad():
        for frame in range(3):
            codes_BST[:, 0, frame] = model(codes_BST)[0][:, frame].argmax(-1)
        weights_BPT = torch.zeros(3, 5, codes_BST.shape[-1])
        weights_BPT[:, 0, :2] = 0.25  # the third frame is right too, and does not count
        assert model(codes_BST, weights_BPT).statistics[0, 1:].tolist() == [6, 6]
        codes_BST[:, 0, 1] = (codes_BST[:, 0, 1] + 1) % config.streams.text_cardinality
        statistics = model(codes_BST, weights_BPT).statistics
        assert statistics[0, 1:].tolist() == [6, 3] and statistics[1:].abs().sum() == 0


def test_zero_token_of_text_costs_nothing_whatever_its_weight(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    model = build(config)
    codes_BST = sample_codes(config)
    weights_BPT = finetune_weights(codes_BST, config=config)
    expected = model(codes_BST, weights_BPT)
    weights_BPT[:, 0][codes_BST[:, 0] == -1] = 9.0
    actual = model(codes_BST, weights_BPT)
    assert (weights_BPT[:, 0] == 9.0).any()
    assert torch.equal(actual.weighted, expected.weighted) and torch.equal(actual.statistics, expected.statistics)


def test_frames_without_weight_change_nothing(tmp_path: Path) -> None:
    """Frames that never enter the depth transformer: same loss and gradients as weight 0 on a full pass by hand."""
    config = make_config(tmp_path)
    model = build(config)
    codes_BST = sample_codes(config)
    weights_BPT = finetune_weights(codes_BST, config=config)
    weights_BPT[:, 1:, ::2] = 0
    weighted, _ = model(codes_BST, weights_BPT)
    _, audio_BQTV = model(codes_BST)
    total = torch.zeros(())
    for codebook, delay in enumerate(config.streams.delays[1:5]):
        frames = codes_BST.shape[-1] - delay
        targets, weights = codes_BST[:, 1 + codebook, :frames], weights_BPT[:, 1 + codebook, :frames]
        losses = F.cross_entropy(
            audio_BQTV[:, codebook, delay:].transpose(1, 2), targets.clamp(min=0), reduction="none"
        )
        total = total + (losses * weights * (targets >= 0)).sum()
    assert float(weighted[1]) == pytest.approx(float(total), rel=1e-5)
    wanted = torch.autograd.grad(total, model.depth.heads.weight, retain_graph=True)[0]
    actual = torch.autograd.grad(weighted[1], model.depth.heads.weight)[0]
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_batch_without_any_weight_has_no_loss_and_no_gradient(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    model = build(config)
    codes_BST = torch.full((2, config.streams.num_streams, 8), -1)
    weighted, statistics = model(codes_BST, torch.zeros(2, 5, 8))
    assert weighted.tolist() == [0, 0] and statistics.abs().sum() == 0
    weighted.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)
