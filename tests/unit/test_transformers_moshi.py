"""Native models as transformers' MoshiForConditionalGeneration: logits, generation, round trips, what is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from moshi_folders import write_moshi
from one_rank import make_config, one_rank  # noqa: F401
from safetensors import safe_open
from transformers_folders import (
    as_native,
    companions,
    native_model,
    quiet,  # noqa: F401
    runtime_answer,
    stored,
    unequal,
    write_transformers,
)

from megaspeech.config import Config
from megaspeech.conversion.deferred import IN_FP16, Deferred
from megaspeech.conversion.mimi_files import open_mimi
from megaspeech.conversion.moshi import moshi_files, open_moshi
from megaspeech.conversion.native import check_native, native_shapes
from megaspeech.conversion.rules import to_foreign, to_native
from megaspeech.conversion.stored import Companions, StoredModel
from megaspeech.conversion.transformers_folders import open_transformers
from megaspeech.conversion.transformers_moshi import moshi_rules, moshi_sections
from megaspeech.conversion.transformers_verify import (
    delayed,
    depth_logits,
    largest_difference,
    load_transformers,
    temporal_outputs,
)
from megaspeech.model.speech_text_model import SpeechTextModel

pytestmark = [
    pytest.mark.usefixtures("one_rank"),
    pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed"),
]

TOLERANCE = 5e-5  # FP32; a hundred times less than any mistake made on purpose


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("transformers_moshi")


@pytest.fixture(scope="module")
def tiny(room: Path, one_rank: None) -> tuple[Config, SpeechTextModel, StoredModel, Path]:  # noqa: F811
    """(config, native model, the same stored, transformers' folder of it)."""
    config = make_config(room)
    native = native_model(config)
    model = stored(native, config=config, beside=companions(room))
    return config, native, model, write_transformers(model, room / "tiny")


@pytest.fixture(scope="module")
def loaded(tiny: Any) -> Any:
    return load_transformers(tiny[-1])


def test_folder_is_whole(tiny: Any, loaded: Any) -> None:
    """Every weight found, none left over: `load_transformers` refuses else. The names are those of flat files."""
    _, _, _, folder = tiny
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert {"audio_encoder.encoder.layers.0.conv.weight", "audio_encoder.downsample.conv.weight"} <= names
    assert {"decoder.lm_head.weight", "depth_decoder.input_projections.weight", "embed_tokens.7.weight"} <= names
    assert type(loaded).__name__ == "MoshiForConditionalGeneration"


def test_tokenizer_and_feature_extractor_load(tiny: Any) -> None:
    from transformers import AutoFeatureExtractor, AutoTokenizer

    from megaspeech.data.tokenizer import Tokenizer

    _, _, model, folder = tiny
    tokenizer, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.load(model.companions.tokenizer)
    for text in ("one two three", "  to  be "):
        assert tokenizer.encode(text, add_special_tokens=False) == ours.processor.encode(text)
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    sound = extractor(raw_audio=torch.zeros(960).numpy(), sampling_rate=24000, return_tensors="pt")
    assert sound["input_values"].shape == (1, 1, 960)


VARIANTS: dict[str, list[str]] = {
    "grouped queries in both": ["temporal.num_query_groups=1", "depth.num_query_groups=2"],
    "another rotary base, odd sizes": ["temporal.rotary_base=100", "temporal.ffn_hidden_size=175"],
    "ten codebooks": [
        "streams.num_codebooks=10",
        "streams.num_given_codebooks=10",
        f"streams.delays={[0, *[0, *[1] * 9] * 2]}",
    ],
    "shared sets of weights": ["depth.weights_per_step_schedule=[0, 1, 0, 1]", "depth.multi_linear=false"],
    "shared sets of inputs too": ["depth.weights_per_step_schedule=[0, 1, 1, 1]"],
    "another epsilon": ["model.layernorm_epsilon=0.01"],
    "heads of a width of their own": ["temporal.kv_channels=24"],
    "bf16": ["precision.recipe=bf16"],
}


def test_logits_agree_beyond_the_context(tiny: Any, loaded: Any) -> None:
    config, native, _, _ = tiny
    assert config.temporal.context == 12
    assert largest_difference(native, loaded, streams=config.streams, num_frames=30) < TOLERANCE


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_agree(name: str, room: Path) -> None:
    config = make_config(room, *VARIANTS[name])
    beside = companions(room, num_quantizers=12 if name == "ten codebooks" else 6)
    model = stored(native_model(config), config=config, beside=beside)
    folder = write_transformers(model, room / name.replace(" ", "_"))
    found = largest_difference(as_native(model), load_transformers(folder), streams=config.streams, num_frames=16)
    assert found < TOLERANCE
    back = open_transformers(folder)
    check_native(back)
    if "shared" in name:  # transformers has a copy for each codebook, and so has what is read from it
        assert back.config.depth.weights_per_step_schedule is None and back.config.depth.multi_linear
        again = largest_difference(as_native(back), load_transformers(folder), streams=config.streams, num_frames=16)
        assert again < TOLERANCE
    else:
        assert unequal(model, back) == []
        assert back.config.model_copy(update={"codec": config.codec}) == config


@pytest.mark.parametrize(
    "weight",
    ["decoder.model.layers.3.self_attn.k_proj.linear.weight", "depth_decoder.embed_tokens.2.weight",
     "depth_decoder.layers.1.mlp.fc2.weight", "embed_tokens.7.weight"],
)  # fmt: skip
def test_a_difference_is_noticed(weight: str, tiny: Any, loaded: Any) -> None:
    config, native, _, _ = tiny
    tensor = loaded.state_dict()[weight]
    before = tensor.clone()
    tensor[..., 5] += 1.0
    try:
        assert largest_difference(native, loaded, streams=config.streams, num_frames=8) > 1e-3
    finally:
        tensor.copy_(before)


def test_a_whole_sequence_at_once_has_no_window(tiny: Any, loaded: Any) -> None:
    """transformers' own trap, which `transformers_verify` goes round and `generate` does not fall into."""
    config, native, _, _ = tiny
    codes_BST = torch.stack([torch.randint(0, size, (1, 30)) for size in config.streams.cardinalities], dim=1)
    inputs_BST = delayed(codes_BST, streams=config.streams, more=1)
    with torch.no_grad():
        expected_BTV = native(codes_BST)[0]
        at_once_BTV = loaded(inputs_BST[:, 0], moshi_audio_codes=inputs_BST[:, 1:5], user_audio_codes=inputs_BST[:, 5:])
    wrong_T = (at_once_BTV.logits - expected_BTV).abs().amax((0, 2))
    assert wrong_T[:12].max() < TOLERANCE < 1e-2 < wrong_T[12:].max()
    assert (temporal_outputs(loaded, inputs_BST)[0] - expected_BTV).abs().max() < TOLERANCE


def test_eager_depth_decoder_needs_its_mask(tiny: Any, loaded: Any) -> None:
    config, native, _, _ = tiny
    hidden_BTH, read_BQT = torch.randn(1, 3, 64), torch.randint(0, 32, (1, 4, 3))
    expected = depth_logits(loaded, hidden_BTH, read_BQT)
    loaded.set_attn_implementation("eager")
    try:
        ids_NQ = read_BQT.transpose(1, 2).flatten(0, 1)
        bare = loaded.depth_decoder(input_ids=ids_NQ, last_hidden_state=hidden_BTH[0][:, None], use_cache=False).logits
        assert (bare.unflatten(0, (1, 3)).transpose(1, 2) - expected).abs().max() > 1e-2
        assert largest_difference(native, loaded, streams=config.streams, num_frames=14) < TOLERANCE
    finally:
        loaded.set_attn_implementation("sdpa")


def test_its_own_loss_is_another(tiny: Any, loaded: Any) -> None:
    """It pairs the output of a frame with that frame's own input tokens: losses are to be made of its logits."""
    config, native, _, _ = tiny
    codes_BST = torch.stack([torch.randint(0, size, (1, 10)) for size in config.streams.cardinalities], dim=1)
    own_BQT, given_BQT = codes_BST[:, 1:5], codes_BST[:, 5:]
    with torch.no_grad():
        labels = {"text_labels": codes_BST[:, 0], "audio_labels": own_BQT}
        found = loaded(codes_BST[:, 0], moshi_audio_codes=own_BQT, user_audio_codes=given_BQT, **labels)
        audio_BQTV = native(codes_BST)[1]
    ours = torch.nn.functional.cross_entropy(audio_BQTV[:, 0].transpose(1, 2), own_BQT[:, 0])
    assert abs(float(found.depth_loss - ours)) > 0.05


def test_it_knows_no_zero_token(loaded: Any) -> None:
    codes = torch.full((1, 4, 1), -1)
    with pytest.raises(IndexError):
        loaded(torch.tensor([[3]]), moshi_audio_codes=codes, user_audio_codes=codes)


def greedy(model: Any, num_frames: int, **inputs: Any) -> torch.Tensor:
    """What `generate` says: text and codes `[1 + Q, T]` of the frames that are whole."""
    found = model.generate(
        **inputs, max_new_tokens=num_frames, do_sample=False, depth_decoder_do_sample=False, return_audio_codes=True
    )
    codes_QT = found.audio_codes[0]
    return torch.cat([found.sequences[:, 1 : 1 + codes_QT.shape[-1]], codes_QT])


def silence(model: Any) -> torch.Tensor:
    """The codes `[1, Q, 1]` that `generate` takes the user to say."""
    config = model.config.audio_encoder_config
    return model.audio_encoder.encode(torch.zeros(1, 1, config.frame_size), num_quantizers=model.num_codebooks)[0]


@pytest.mark.skipif(find_spec("moshi") is None, reason="moshi is not installed")
def test_generation_is_the_runtimes(tiny: Any, loaded: Any, room: Path) -> None:
    """Greedy, 30 frames with a context of 12, the user silent: every token the same."""
    config, native, _, _ = tiny
    folder = write_moshi(native.state_dict(), room / "runtime", config=config)
    expected = runtime_answer(folder, silence(loaded).expand(-1, -1, 30))
    found = greedy(loaded, 30)
    assert len(expected.unique()) > 10 and torch.equal(found, expected[:, : found.shape[1]])
    bare = loaded.get_unconditional_inputs()  # before which `generate` would put the same once more, unless told
    assert torch.equal(greedy(loaded, 30, **bare, concat_unconditional_inputs=False), found)


@pytest.mark.skipif(find_spec("moshi") is None, reason="moshi is not installed")
def test_generation_with_more_codebooks_than_its_default_cache(room: Path) -> None:
    """depth_decoder_config.sliding_window is 8 unless it is set."""
    config = make_config(room, *VARIANTS["ten codebooks"])
    native = native_model(config)
    beside = companions(room, num_quantizers=12)
    model = load_transformers(write_transformers(stored(native, config=config, beside=beside), room / "ten"))
    folder = write_moshi(native.state_dict(), room / "runtime_ten", config=config)
    expected = runtime_answer(folder, silence(model).expand(-1, -1, 6))
    found = greedy(model, 6)
    assert found.shape[0] == 11 and torch.equal(found, expected[:, : found.shape[1]])


def test_generate_just_works(loaded: Any) -> None:
    """As people call it: sampled, with sound out."""
    found = loaded.generate(max_new_tokens=4)
    assert found.audio_sequences.shape[:2] == (1, 1) and found.audio_sequences.isfinite().all()
    assert loaded.generation_config.do_sample and loaded.generation_config.top_k == 25


def test_saved_by_transformers_itself(loaded: Any, tiny: Any, tmp_path: Path) -> None:
    """In shards, without our files, and with the config's keys of transformers 4."""
    config, _, model, _ = tiny
    loaded.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    values = json.loads((tmp_path / "config.json").read_text())
    values["rope_theta"] = values.pop("rope_parameters")["rope_theta"]
    values["torch_dtype"] = values.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(values))
    back = open_transformers(tmp_path)
    assert unequal(model, back) == []
    for section in ("streams", "temporal", "depth"):
        assert getattr(back.config, section) == getattr(config, section)
    assert back.companions == Companions(model_with_mimi=tmp_path) and "--tokenizer" in " ".join(back.notes)


def test_fp16_is_read_as_fp32(loaded: Any, tiny: Any, tmp_path: Path) -> None:
    _, native, model, _ = tiny
    folder = tmp_path / "half"
    copy.deepcopy(loaded).half().save_pretrained(folder)
    back = open_transformers(folder)
    check_native(back)
    halves = {name: Deferred.of(one.read().half().float()) for name, one in model.weights.items()}
    assert unequal(replace(model, weights=halves), back) == [] and IN_FP16 in back.notes


def test_around_by_moshi(tiny: Any, room: Path) -> None:
    """moshi -> native -> transformers -> native -> moshi, all bits."""
    config, native, _, _ = tiny
    first = write_moshi(native.state_dict(), room / "first", config=config)
    model = replace(open_moshi(first), companions=companions(room))
    back = open_transformers(write_transformers(model, room / "between"))
    second = write_moshi({name: one.read() for name, one in back.weights.items()}, room / "second", config=back.config)
    for name in ("model.safetensors", "config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_seven_billion_on_no_memory(room: Path) -> None:
    """Every name and shape of transformers' default config, which is Kyutai's 7B, is one of ours, and none is over."""
    from transformers import MoshiConfig, MoshiForConditionalGeneration

    config = make_config(room, preset="moshi-7b")
    theirs = MoshiConfig(audio_encoder_config={"model_type": "mimi"}, depth_decoder_config={})
    with torch.device("meta"):
        state = MoshiForConditionalGeneration(theirs).state_dict()
    language = {name: x for name, x in state.items() if not name.startswith("audio_encoder.")}
    weights = {name: Deferred.of(x) for name, x in language.items()}
    rules = moshi_rules(config)
    assert {name for rule in rules for name in rule.foreign} == language.keys()
    native = {name: one.shape for name, one in to_native(weights, rules).items()}
    assert native == {name: shape for name, (shape, _) in native_shapes(config).items()}
    again = to_foreign({name: Deferred.of(torch.empty(shape, device="meta")) for name, shape in native.items()}, rules)
    assert {name: one.shape for name, one in again.items()} == {name: tuple(x.shape) for name, x in language.items()}
    sections = moshi_sections(theirs)
    for name in ("streams", "temporal", "depth"):
        section = getattr(config, name)
        assert sections[name] == {key: getattr(section, key) for key in sections[name]}


def test_the_mimi_inside_goes_along_to_moshi(tiny: Any, room: Path) -> None:
    *_, folder = tiny
    files = moshi_files(open_transformers(folder))
    weights = files.weights_beside["codec/model.safetensors"]
    assert weights.keys() == open_mimi(folder).weights.keys() and "codec/config.json" in files.small_files
    own = companions(room, num_quantizers=12).codec
    given = replace(open_transformers(folder), companions=Companions(codec=own, model_with_mimi=folder))
    weights = moshi_files(given).weights_beside["codec/model.safetensors"]
    assert weights.keys() == open_mimi(own).weights.keys()  # the user's own goes before it
