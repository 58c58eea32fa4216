"""Models of Kyutai's own class, saved as files: read into native models of the same logits, and written back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from moshi_folders import moshi_state
from one_rank import one_rank  # noqa: F401
from safetensors.torch import save_file
from torch import Tensor

from megaspeech.conversion.moshi import open_moshi
from megaspeech.conversion.stored import StoredModel
from megaspeech.model.speech_text_model import SpeechTextModel
from megaspeech.streaming.agreement import largest_difference
from megaspeech.streaming.runtime import import_moshi

pytestmark = [
    pytest.mark.usefixtures("one_rank"),
    pytest.mark.skipif(find_spec("moshi") is None, reason="moshi is not installed"),
]
TOLERANCE = 1e-5
TINY: dict[str, Any] = {
    "dim": 32,
    "num_heads": 4,
    "num_layers": 2,
    "hidden_scale": 4.125,
    "n_q": 8,
    "dep_q": 4,
    "card": 16,
    "text_card": 24,
    "context": 12,
    "delays": [0, 0, 1, 1, 1, 0, 1, 1, 1],
    "norm": "rms_norm_f32",
    "gating": "silu",
    "positional_embedding": "rope",
    "depformer_dim": 16,
    "depformer_num_heads": 2,
    "depformer_num_layers": 2,
    "depformer_dim_feedforward": 66,
    "depformer_multi_linear": True,
    "depformer_weights_per_step": True,
    "depformer_pos_emb": "none",
}
HELD: dict[str, dict[str, Any]] = {
    "duplex": {},
    "16 codebooks each": {"n_q": 32, "dep_q": 16, "delays": [0, *([0] + [1] * 15) * 2]},
    "one way": {"n_q": 4, "delays": [0, 0, 1, 1, 1]},
    "more heard than said": {"n_q": 6, "dep_q": 2, "delays": [0, 0, 1, 0, 1, 1, 1]},
    "any delays": {"delays": [2, 0, 7, 1, 3, 0, 0, 4, 1]},
    "a schedule": {"depformer_weights_per_step_schedule": [0, 1, 2, 2]},
    "a schedule out of order": {"depformer_weights_per_step_schedule": [1, 0, 2, 1]},
    "one set": {"depformer_weights_per_step_schedule": [0, 0, 0, 0]},
    "one projection": {"depformer_multi_linear": False},
    "one projection, a schedule": {
        "depformer_multi_linear": False,
        "depformer_weights_per_step_schedule": [0, 1, 1, 1],
    },
    "shared by all": {"depformer_multi_linear": False, "depformer_weights_per_step": False},
    "shared, own projections": {"depformer_weights_per_step": False},
    "low rank": {"depformer_low_rank_embeddings": 6},
    "low rank, a schedule": {
        "depformer_low_rank_embeddings": 6,
        "depformer_weights_per_step_schedule": [0, 1, 1, 1],
    },
    "grouped queries in both": {"kv_repeat": 2},
    "grouped queries": {"kv_repeat": 4, "depformer_kv_repeat": 1},
    "halves rotated": {"positional_embedding": "rope_concat"},
    "halves rotated, grouped queries": {"positional_embedding": "rope_concat", "kv_repeat": 2},
    "another period": {"max_period": 100000.0},
    "all in sight": {"context": 500},
    "gates of 21/8": {"hidden_scale": 4, "depformer_dim_feedforward": 64},
    "gates of both by hidden_scale": {"hidden_scale": 4.3, "depformer_dim_feedforward": None},
    "a list of equal gates": {"depformer_dim_feedforward": [66] * 4},
    "a list of gates by set": {
        "depformer_dim_feedforward": [66] * 2,
        "depformer_weights_per_step_schedule": [0, 1, 1, 1],
    },
    "rms_norm": {"norm": "rms_norm"},
    "text_card_out as text_card": {"text_card_out": 24},
    "text alone": {"dep_q": 0, "delays": [0] * 9, "extra_heads_num_heads": 4},
    "text alone, one projection": {"dep_q": 0, "delays": [0] * 9, "depformer_multi_linear": False},
    "one codebook": {"n_q": 2, "dep_q": 1, "delays": [0, 1, 0]},
    "extra heads": {"extra_heads_num_heads": 2, "extra_heads_dim": 3},
    "ignored keys": {"depformer_causal": True, "depformer_context": 8, "depformer_max_period": 10000},
}
CHANGED = {"halves rotated", "halves rotated, grouped queries", "shared by all", "shared, own projections"}
"""Models that are written back in another form, which the runtime streams."""
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "layer_norm": ({"norm": "layer_norm"}, "norm = 'layer_norm' cannot be held.*'rms_norm_f32'"),
    "gelu": ({"gating": "none", "depformer_weights_per_step": False}, "gating = 'none'"),
    "gelu in the depformer": ({"depformer_gating": "none"}, "depformer_gating = 'none'"),
    "layer_scale": ({"layer_scale": 0.1}, "layer_scale = 0.1"),
    "layer_scale of the depformer": ({"depformer_layer_scale": 0.1}, "depformer_layer_scale = 0.1"),
    "sin": ({"positional_embedding": "sin"}, "positional_embedding = 'sin'"),
    "sin_rope": ({"positional_embedding": "sin_rope"}, "'sin_rope'"),
    "no positions": ({"positional_embedding": "none"}, "positional_embedding = 'none'"),
    "norm_emb": ({"norm_emb": True}, "norm_emb = True"),
    "bias_proj": ({"bias_proj": True}, "bias_proj = True"),
    "depformer_norm": ({"depformer_norm": "layer_norm"}, "depformer_norm = 'layer_norm'"),
    "depformer_pos_emb": ({"depformer_pos_emb": "sin"}, "depformer_pos_emb = 'sin'"),
    "text_card_out": ({"text_card_out": 5}, "text_card_out = 5 cannot be held: native models have None or 24"),
    "demux": ({"demux_second_stream": True}, "demux_second_stream = True"),
    "cross attention": ({"cross_attention": True}, "cross_attention = True"),
    "gates of many widths": ({"depformer_dim_feedforward": [66, 66, 33, 33]}, r"\[66, 66, 33, 33\] cannot be held"),
    "int8": ({"quantize": True}, "quantize = True"),
    "unknown key": ({"dimm": 3}, "dimm is no key that moshi knows"),
    "conditioners": ({"conditioners": {"speaker": {}}}, "--drop conditioners"),
    "a schedule without sets": (
        {"depformer_weights_per_step": False, "depformer_weights_per_step_schedule": [0, 1, 1, 1]},
        "is for depformer_weights_per_step = true",
    ),
}


def make(values: Mapping[str, Any], *, seed: int = 1) -> Any:
    """An `LMModel` whose norms are no ones."""
    torch.manual_seed(seed)
    lm = import_moshi().loaders.get_moshi_lm(None, dict(values), device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return lm.eval()


def packed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As released: all sets of an attention's weights in one tensor."""
    found: dict[str, list[Tensor]] = {}
    for name, tensor in state.items():
        stem, projections, rest = name.partition("_projs.")
        stem += {"in": "_proj_weight", "ut": "_proj.weight"}[stem[-2:]] if projections else ""
        found.setdefault(stem if projections else name, []).append(tensor)
    return {name: torch.cat(tensors) if len(tensors) > 1 else tensors[0] for name, tensors in found.items()}


def save(folder: Path, values: Mapping[str, Any], state: Mapping[str, Tensor]) -> Path:
    """A folder that moshi opens."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


def native(model: StoredModel) -> SpeechTextModel:
    """With the weights, all of them and no others."""
    built = SpeechTextModel(model.config, pre_process=True, post_process=True)
    state = {name: tensor for name, tensor in built.state_dict().items() if isinstance(tensor, Tensor)}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        name: one.shape for name, one in model.weights.items()
    }
    with torch.no_grad():
        for name, one in model.weights.items():
            state[name].copy_(one.read())
    return built


@pytest.mark.parametrize("naming", ["split", "packed"])
@pytest.mark.parametrize("name", HELD)
def test_what_moshi_saved_is_read_and_written_back(name: str, naming: str, tmp_path: Path) -> None:
    values = TINY | HELD[name]
    lm = make(values)
    released = packed(lm.state_dict())
    folder = save(tmp_path / "model", values, lm.state_dict() if naming == "split" else released)
    opened = open_moshi(folder)
    model = native(opened)
    assert largest_difference(model, lm, streams=opened.config.streams, num_frames=20) < TOLERANCE
    written = moshi_state(model.state_dict(), config=opened.config)
    if name not in CHANGED:
        released.pop("depformer_in.0.weight" if not values["dep_q"] else "", None)
        assert written.keys() == released.keys()
        assert all(torch.equal(written[key], released[key]) for key in written)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_held_is_refused_by_name(name: str, tmp_path: Path) -> None:
    values, words = REFUSED[name]
    folder = save(tmp_path / "model", TINY | values, {"text_emb.weight": torch.zeros(25, 32)})
    with pytest.raises(ValueError, match=f"config.json: .*{words}"):
        open_moshi(folder)
