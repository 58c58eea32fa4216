"""Models of Kyutai's own class, saved as files: read into native models of the same logits, and written back."""

from __future__ import annotations

import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from moshi_folders import TINY, make, moshi_state, native, packed, save, write_moshi
from one_rank import make_config, one_rank  # noqa: F401
from safetensors.torch import save_file
from torch import Tensor

from megaspeech.conversion import moshi
from megaspeech.conversion.convert import Conversion, convert
from megaspeech.conversion.deferred import Deferred
from megaspeech.conversion.moshi import open_moshi
from megaspeech.conversion.moshi_config import LEGACY
from megaspeech.conversion.rules import to_foreign
from megaspeech.conversion.safetensors_files import open_safetensors
from megaspeech.conversion.stored import Companions
from megaspeech.model.speech_text_model import SpeechTextModel
from megaspeech.streaming.agreement import largest_difference, runtime_logits
from megaspeech.streaming.runtime import import_moshi, load_runtime, make_generator

pytestmark = [
    pytest.mark.usefixtures("one_rank"),
    pytest.mark.skipif(find_spec("moshi") is None, reason="moshi is not installed"),
]
TOLERANCE = 1e-5
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
    "unknown key": ({"dimm": 3}, "dimm is no key that moshi knows"),
    "conditioners": ({"conditioners": {"speaker": {}}}, "--drop conditioners"),
    "a schedule without sets": (
        {"depformer_weights_per_step": False, "depformer_weights_per_step_schedule": [0, 1, 1, 1]},
        "is for depformer_weights_per_step = true",
    ),
}


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


def test_a_folder_of_ours_comes_back_with_its_run(tmp_path: Path) -> None:
    config = make_config(tmp_path, "data.task_delay=5", "temporal.num_extra_heads=2", "model.layernorm_epsilon=1e-5")
    model = SpeechTextModel(config, pre_process=True, post_process=True)
    model.extra_heads.normal_()
    opened = open_moshi(write_moshi(model.state_dict(), tmp_path / "export", config=config))
    assert opened.config == config and not opened.notes
    state = model.state_dict()
    assert set(opened.weights) == {name for name, tensor in state.items() if isinstance(tensor, Tensor)}
    assert all(torch.equal(one.read(), state[name]) for name, one in opened.weights.items())


@pytest.mark.parametrize(
    "name", ["halves rotated, grouped queries", "shared by all", "shared, own projections", "low rank, a schedule"]
)
def test_what_is_written_back_streams_alike(name: str, tmp_path: Path) -> None:
    """The runtime itself can stream none of the shared ones as they come."""
    values = TINY | HELD[name]
    lm = make(values)
    opened = open_moshi(save(tmp_path / "model", values, lm.state_dict()))
    runtime = load_runtime(write_moshi(native(opened).state_dict(), tmp_path / "export", config=opened.config))
    codes = torch.stack([torch.randint(size, (1, 20)) for size in opened.config.streams.cardinalities], 1)
    for ours, theirs in zip(runtime_logits(runtime, codes), runtime_logits(lm, codes), strict=True):
        assert (ours - theirs).abs().max() < TOLERANCE
    assert streamed_difference(runtime, codes) < TOLERANCE


@torch.no_grad()
def streamed_difference(lm: Any, codes_BST: Tensor) -> float:
    """Largest difference of text logits, frame by frame through the runtime's generator, from those of one pass."""
    logits: list[Tensor] = []
    generator = make_generator(lm, on_text_logits_hook=lambda x: logits.append(x[:, 0, 0].clone()))
    heard_BQT = codes_BST[:, 1 + lm.dep_q :]
    frames: list[Tensor] = []
    with generator.streaming(1):
        for frame in range(heard_BQT.shape[2]):
            written = generator.step(heard_BQT[:, :, frame : frame + 1])
            frames.extend([] if written is None else [written])
    assert len(frames) == heard_BQT.shape[2] - max(lm.delays)
    said_BPT = torch.cat(frames, 2)
    replayed_BST = torch.cat([said_BPT, heard_BQT[:, :, 1 : 1 + said_BPT.shape[2]]], 1)
    once_BTV = runtime_logits(lm, replayed_BST)[0]
    return float((torch.stack(logits, 1)[:, : once_BTV.shape[1]] - once_BTV).abs().max())


def test_bf16_in_shards(tmp_path: Path) -> None:
    lm = make(TINY).to(torch.bfloat16)
    state = packed(lm.state_dict())
    folder, names = save(tmp_path / "model", TINY, {}), sorted(state)
    (folder / "model.safetensors").unlink()
    places = {}
    for shard, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: state[name].contiguous() for name in part}, folder / shard)
        places |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    opened = open_moshi(folder)
    assert opened.config.precision.recipe == "bf16"
    assert {one.dtype for one in opened.weights.values()} == {torch.bfloat16}
    written = moshi_state(native(opened).state_dict(), config=opened.config)
    assert written.keys() == state.keys() and all(torch.equal(written[name], state[name]) for name in state)


def test_numbers_in_other_precisions_are_read_in_that_of_the_model_and_named(tmp_path: Path) -> None:
    state = {name: tensor.to(torch.float16) for name, tensor in make(TINY).state_dict().items()}
    opened = open_moshi(save(tmp_path / "half", TINY, state))
    assert opened.config.precision.recipe == "fp32" and {one.dtype for one in opened.weights.values()} == {
        torch.float32
    }
    assert opened.notes == (f"{len(state)} tensors in another precision read as torch.float32",)


def test_without_a_config_it_is_moshi_7b(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its tensors by name and shape, none left over; no number of it is there."""
    with torch.device("meta"):
        lm = import_moshi().LMModel(**LEGACY, dtype=torch.bfloat16)
    released = packed(lm.state_dict())
    assert (
        len(lm.state_dict()) == 439
        and len(released) == 355
        and sum(tensor.numel() for tensor in released.values()) == 7_687_729_152
    )
    weights = {name: Deferred(tuple(x.shape), x.dtype, partial(pytest.fail, name)) for name, x in released.items()}
    monkeypatch.setattr(moshi, "open_safetensors", lambda _: weights)
    opened = open_moshi(tmp_path)
    expected = make_config(tmp_path, preset="moshi-7b")
    sections = ("streams", "temporal", "depth")
    assert all(getattr(opened.config, name) == getattr(expected, name) for name in sections)
    written = to_foreign(opened.weights, moshi.rules(opened.config))
    assert {name: one.shape for name, one in written.items()} == {name: one.shape for name, one in weights.items()}
    assert "taken to be Moshi 7B" in opened.notes[0]


def test_hibiki_never_ends_early(tmp_path: Path) -> None:
    lm = make(TINY)
    state = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    folder = save(tmp_path / "model", TINY | {"model_type": "hibiki"}, state)
    opened, runtime = open_moshi(folder), load_runtime(folder)
    assert torch.equal(runtime.text_emb.weight[2], state["text_emb.weight"][3])
    model = native(opened)
    assert largest_difference(model, runtime, streams=opened.config.streams) < TOLERANCE
    assert largest_difference(model, lm, streams=opened.config.streams) > 1e-3
    assert "text_emb.weight: row 2" in opened.notes[0]


CONDITIONED = TINY | {
    "extra_heads_num_heads": 2,
    "conditioners": {"speaker": {"type": "lut", "lut": {"n_bins": 4, "dim": 8, "tokenizer": "noop"}}},
    "fuser": {"sum": ["speaker"], "cross": []},
}
CONDITIONED["conditioners"]["speaker"]["lut"]["possible_values"] = ["a", "b"]


def test_what_is_dropped_is_left_out_and_named(tmp_path: Path) -> None:
    lm = make(json.loads(json.dumps(CONDITIONED)))
    state = lm.state_dict()
    assert {name.split(".")[0] for name in state} >= {"condition_provider", "extra_heads"}
    opened = open_moshi(save(tmp_path / "model", CONDITIONED, state), drop=("conditioners", "extra_heads"))
    assert opened.config.temporal.num_extra_heads == 0 and len(opened.notes) == 2
    model, lm.fuser = native(opened), None
    assert largest_difference(model, lm, streams=opened.config.streams) < TOLERANCE
    with pytest.raises(ValueError, match="--drop heads: of moshi's models only extra_heads and conditioners"):
        open_moshi(tmp_path / "model", drop=("heads",))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dim": 64, "num_heads": 8}, r"tensor text_emb.weight is \[25, 32\], and config.json makes it \[25, 64\]"),
        ({"text_card": 25}, r"tensor text_emb.weight is \[25, 32\], and config.json makes it \[26, 32\]"),
        ({"num_layers": 1, "depformer_num_layers": 2}, r"tensor transformer.layers.1.* \(6 such\) is none"),
        ({"num_layers": 3}, r"tensor transformer.layers.2.norm1.alpha \[1, 1, 32\] is missing"),
        ({"delays": [0, 1]}, "streams.delays: 2 entries"),
        ({"num_heads": 5}, "not divisible by num_attention_heads = 5"),
    ],
)
def test_a_config_of_another_model_is_found(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", TINY | change, make(TINY).state_dict())
    with pytest.raises(ValueError, match=f"(?s){words}"):
        open_moshi(folder)


def test_config_json_goes_before_the_runs_config(tmp_path: Path) -> None:
    """As the runtime has it, and everything else as the run had it."""
    config = make_config(tmp_path, "data.task_delay=5")
    model = SpeechTextModel(config, pre_process=True, post_process=True)
    folder = write_moshi(model.state_dict(), tmp_path / "export", config=config)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"context": 9}))
    opened = open_moshi(folder)
    assert opened.config.temporal.context == 9 and opened.config.data == config.data


@pytest.mark.parametrize(
    "content, words", [("{", "is not JSON"), ("[]", "is no table of keys"), ("{}", "dep_q is missing")]
)
def test_a_config_that_is_none_is_refused(content: str, words: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", {}, {})
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"config.json.*{words}"):
        open_moshi(folder)


def test_a_transcriber_says_how_late_it_writes(tmp_path: Path) -> None:
    values = TINY | HELD["text alone"] | {"stt_config": {"audio_delay_seconds": 0.5}, "model_id": {"sig": "x"}}
    folder = save(tmp_path / "model", values, make(TINY | HELD["text alone"]).state_dict())
    (folder / "tokenizer_spm.model").touch()
    (folder / "mimi.safetensors").touch()
    (folder / "config.json").write_text(
        json.dumps(values | {"tokenizer_name": "tokenizer_spm.model", "mimi_name": "mimi.safetensors"})
    )
    opened = open_moshi(folder)
    assert opened.config.data.task_delay == 6 and opened.config.codec.name == "mimi"
    assert opened.companions.tokenizer == folder / "tokenizer_spm.model"
    assert opened.companions.codec == folder / "mimi.safetensors"
    assert opened.notes == (f"model_id of {folder / 'config.json'} is not kept: the runtime will use its own",)


@pytest.mark.parametrize("num_frames", [0, 3, 29, 58])
def test_every_delay_comes_back(num_frames: int, tmp_path: Path) -> None:
    values = TINY | HELD["text alone"] | {"stt_config": {"audio_delay_seconds": num_frames * 0.08}}
    opened = open_moshi(save(tmp_path / "model", values, make(TINY | HELD["text alone"]).state_dict()))
    assert opened.config.data.task_delay == num_frames


def test_companions_are_found_by_moshis_names_and_anywhere(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", TINY, make(TINY).state_dict())
    mimi, tokenizer = folder / "tokenizer-e351c8d8-checkpoint125.safetensors", folder / "tokenizer_spm_32k_3.model"
    mimi.touch()
    tokenizer.touch()
    assert open_moshi(folder).companions == Companions(tokenizer=tokenizer, codec=mimi)
    elsewhere = {"mimi_name": f"file://{tmp_path}/m.safetensors", "tokenizer_name": f"file://{tmp_path}/t.model"}
    (folder / "config.json").write_text(json.dumps(TINY | elsewhere))
    (tmp_path / "m.safetensors").touch()
    (tmp_path / "t.model").touch()
    found = open_moshi(folder).companions
    assert found == Companions(tokenizer=tmp_path / "t.model", codec=tmp_path / "m.safetensors")


@pytest.mark.parametrize("name", ["one codebook", "text alone", "low rank, a schedule", "extra heads"])
def test_through_a_native_checkpoint_and_back(name: str, tmp_path: Path) -> None:
    values = TINY | HELD[name]
    state = packed(make(values).state_dict())
    source = save(tmp_path / "model", values, state)
    convert(Conversion(source, tmp_path / "native", "moshi", "native", verify=False))
    convert(Conversion(tmp_path / "native", tmp_path / "back", "native", "moshi"))
    back = open_safetensors(tmp_path / "back")
    assert back.keys() == state.keys() and all(torch.equal(back[key].read(), state[key]) for key in state)
