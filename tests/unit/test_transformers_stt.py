"""Models that write alone as transformers' KyutaiSpeechToText: logits, generation, processor, round trips, refusals."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from moshi_folders import write_moshi
from one_rank import make_config, one_rank  # noqa: F401
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
from megaspeech.conversion.deferred import Deferred
from megaspeech.conversion.moshi import open_moshi
from megaspeech.conversion.native import check_native, native_shapes
from megaspeech.conversion.rules import to_foreign, to_native
from megaspeech.conversion.stored import StoredModel
from megaspeech.conversion.transformers_folders import open_transformers, transformers_files
from megaspeech.conversion.transformers_stt import stt_rules, stt_sections
from megaspeech.conversion.transformers_verify import largest_difference, load_transformers
from megaspeech.model.speech_text_model import SpeechTextModel

pytestmark = [
    pytest.mark.usefixtures("one_rank"),
    pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed"),
]

TOLERANCE = 5e-5
HEARS_FOUR = ("streams.num_codebooks=0", "streams.num_given_codebooks=4", "streams.delays=[0,0,0,0,0]")
SAMPLES = 96 * 25


def heard(processor: Any, *, num_frames: int) -> dict[str, torch.Tensor]:
    """Of what the processor makes of a sound the first frames: the second of silence that it adds is 250 of them."""
    from small_codecs import sounds

    found = processor(audio=sounds(SAMPLES, batch=1)[0].numpy())["input_values"]
    return {"input_values": found[..., : 96 * num_frames]}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("transformers_stt")


@pytest.fixture(scope="module")
def tiny(room: Path, one_rank: None) -> tuple[Config, SpeechTextModel, StoredModel, Path]:  # noqa: F811
    """(config, native model, the same stored, transformers' folder of it)."""
    config = make_config(room, *HEARS_FOUR, "data.task_delay=5")
    native = native_model(config)
    model = stored(native, config=config, beside=companions(room))
    return config, native, model, write_transformers(model, room / "tiny")


@pytest.fixture(scope="module")
def loaded(tiny: Any) -> Any:
    return load_transformers(tiny[-1])


@pytest.fixture(scope="module")
def processor(tiny: Any) -> Any:
    from transformers import KyutaiSpeechToTextProcessor

    return KyutaiSpeechToTextProcessor.from_pretrained(tiny[-1])


def test_logits_agree_beyond_the_context(tiny: Any, loaded: Any) -> None:
    config, native, _, _ = tiny
    assert type(loaded).__name__ == "KyutaiSpeechToTextForConditionalGeneration"
    assert largest_difference(native, loaded, streams=config.streams, num_frames=30) < TOLERANCE


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
def test_around(recipe: str, room: Path) -> None:
    config = make_config(room, *HEARS_FOUR, f"precision.recipe={recipe}", "streams.text_end_pad_id=2")
    model = stored(native_model(config), config=config, beside=companions(room))
    folder = write_transformers(model, room / recipe)
    back = open_transformers(folder)
    check_native(back)
    assert unequal(model, back) == [] and back.companions.tokenizer == folder / "tokenizer.model"
    assert back.config.model_copy(update={"codec": config.codec}) == config
    difference = largest_difference(as_native(model), load_transformers(folder), streams=config.streams, num_frames=8)
    assert difference < TOLERANCE


def test_around_by_moshi(tiny: Any, room: Path) -> None:
    config, native, _, folder = tiny
    first = write_moshi(native.state_dict(), room / "first", config=config)
    back = open_transformers(folder)
    assert unequal(open_moshi(first), back) == []
    second = write_moshi({name: one.read() for name, one in back.weights.items()}, room / "second", config=back.config)
    for name in ("model.safetensors", "config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_a_difference_is_noticed(tiny: Any, loaded: Any) -> None:
    config, native, _, _ = tiny
    tensor = loaded.state_dict()["model.embed_tokens.embed_tokens.weight"]
    tensor[-2] += 1.0  # the last codebook's initial token
    try:
        assert largest_difference(native, loaded, streams=config.streams, num_frames=2) > 1e-3
    finally:
        tensor[-2] -= 1.0


def test_ids_follow_the_sizes(tiny: Any) -> None:
    config = json.loads((tiny[-1] / "config.json").read_text())
    assert (config["vocab_size"], config["codebook_vocab_size"], config["num_codebooks"]) == (49, 33, 4)
    assert (config["bos_token_id"], config["audio_bos_token_id"], config["pad_token_id"]) == (48, 32, 3)
    assert config["audio_pad_token_id"] == 49 + 4 * 33
    assert config["codec_config"]["num_quantizers"] == 4  # of the Mimi's six: `generate` takes all that it has


def test_processor(tiny: Any, processor: Any) -> None:
    """The prompt as silence before, the text's delay after the sound; the tokenizer as in sentencepiece."""
    import sentencepiece
    from transformers import AutoFeatureExtractor, AutoProcessor, AutoTokenizer

    config, _, model, folder = tiny
    seconds = 96 / 24000
    assert processor.feature_extractor.audio_silence_prefix_seconds == pytest.approx(2 * seconds)
    assert processor.feature_extractor.audio_delay_seconds == pytest.approx(5 * seconds)
    own = sentencepiece.SentencePieceProcessor(model_file=str(model.companions.tokenizer))
    assert AutoTokenizer.from_pretrained(folder).encode("three four", add_special_tokens=False) == own.encode(
        "three four"
    )
    assert type(AutoProcessor.from_pretrained(folder)) is type(processor)
    assert AutoFeatureExtractor.from_pretrained(folder).sampling_rate == 24000
    assert processor.batch_decode([[3, *own.encode("three four"), 3, 48]], skip_special_tokens=True) == ["three four"]


@pytest.mark.skipif(find_spec("moshi") is None, reason="moshi is not installed")
def test_generation_is_the_runtimes(tiny: Any, loaded: Any, processor: Any, room: Path) -> None:
    config, native, _, _ = tiny
    inputs = heard(processor, num_frames=40)
    codes_BQT = loaded.codec_model.encode(inputs["input_values"]).audio_codes
    folder = write_moshi(native.state_dict(), room / "runtime", config=config)
    expected = runtime_answer(folder, codes_BQT)[0]
    found = loaded.generate(**inputs)[0, 1:]
    assert len(expected.unique()) > 5 and len(found) == 40
    assert torch.equal(found, expected[: len(found)])


def test_initial_token_is_never_written(room: Path) -> None:
    """Where all logits are negative, the row of zeros of transformers' head would win."""
    from transformers import KyutaiSpeechToTextProcessor

    config = make_config(room, *HEARS_FOUR)
    native = native_model(config)
    with torch.no_grad():
        native.text_head.weight.zero_()
        native.text_head.weight[:, 0] = -1e-3
        native.temporal.block.final_layernorm.weight.zero_()
        native.temporal.block.final_layernorm.weight[0] = 1.0
        native.embedding.weight[:, 0] = 50.0  # so that the one feature that is left is positive
    folder = write_transformers(stored(native, config=config, beside=companions(room)), room / "negative")
    model = load_transformers(folder)
    inputs = heard(KyutaiSpeechToTextProcessor.from_pretrained(folder), num_frames=4)
    found = model.generate(**inputs, return_dict_in_generate=True, output_logits=True)
    logits_TV = torch.cat(found.logits)
    assert logits_TV[:, :48].max() < 0 == logits_TV[:, 48].max()
    assert (found.sequences[0, 1:] < 48).all()


def test_kyutais_2_6_billion_on_no_memory(room: Path) -> None:
    """transformers' default config is the sizes of Kyutai's stt-2.6b-en: every name and shape is one of ours."""
    from transformers import KyutaiSpeechToTextConfig, KyutaiSpeechToTextForConditionalGeneration

    theirs = KyutaiSpeechToTextConfig(
        codec_config={"model_type": "mimi"}, bos_token_id=48000
    )  # as published: no text token
    with torch.device("meta"):
        state = KyutaiSpeechToTextForConditionalGeneration(theirs).state_dict()
    language = {name: x for name, x in state.items() if not name.startswith("codec_model.")}
    sections = stt_sections(theirs)
    assert sections["streams"]["num_given_codebooks"] == 32 and sections["temporal"]["ffn_hidden_size"] == 5632
    values = [(f"{key}.{name}", value) for key in ("streams", "temporal") for name, value in sections[key].items()]
    overrides = [f"{key}={json.dumps(value)}" for key, value in values if value is not None]
    config = make_config(room, *overrides)
    rules = stt_rules(config)
    assert {name for rule in rules for name in rule.foreign} == language.keys()
    native = to_native({name: Deferred.of(x) for name, x in language.items()}, rules)
    assert {name: one.shape for name, one in native.items()} == {
        name: shape for name, (shape, _) in native_shapes(config).items()
    }
    again = to_foreign(native, rules)
    assert {name: one.shape for name, one in again.items()} == {name: tuple(x.shape) for name, x in language.items()}


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["streams.num_given_codebooks=1", "streams.delays=[0,0]"], "num_given_codebooks: 1"),
        (["streams.num_given_codebooks=4", "streams.delays=[0,0,1,1,1]"], "streams.delays"),
        (["streams.num_given_codebooks=8", f"streams.delays={[0] * 9}"], "8 codebooks a speaker, but the Mimi has 6"),
    ],
)
def test_what_it_cannot_hold_is_refused(overrides: list[str], message: str, room: Path) -> None:
    config = make_config(room, "streams.num_codebooks=0", *overrides)
    weights = {"text_head.weight": Deferred.of(torch.zeros(48, 64))}
    with pytest.raises(ValueError, match=f"{message}.*convert it to moshi instead"):
        transformers_files(StoredModel(config, weights, companions(room)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"audio_pad_token_id": 69569}, "audio_pad_token_id = 69569.*should be 181"),
        ({"num_codebooks": 3, "audio_pad_token_id": 148}, "there should be 149 rows, not 182"),
    ],
)
def test_ids_of_another_model_are_named(changes: dict[str, Any], message: str, tiny: Any, tmp_path: Path) -> None:
    values = json.loads((tiny[-1] / "config.json").read_text()) | changes
    (tmp_path / "model.safetensors").write_bytes((tiny[-1] / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        open_transformers(tmp_path)


def test_a_wrong_first_token_is_said(tiny: Any, tmp_path: Path) -> None:
    """Kyutai's 2.6B on the hub names 48000, where its text has 4000 pieces."""
    _, _, model, folder = tiny
    values = json.loads((folder / "config.json").read_text()) | {"bos_token_id": 48000}
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(values))
    back = open_transformers(tmp_path)
    assert "bos_token_id = 48000" in " ".join(back.notes) and unequal(model, back) == []
    assert "bos_token_id" not in " ".join(open_transformers(folder).notes)


@pytest.mark.parametrize(
    "file, inner", [("preprocessor_config.json", None), ("processor_config.json", "feature_extractor")]
)
def test_delays_of_a_folder_of_others(file: str, inner: str | None, tiny: Any, tmp_path: Path) -> None:
    """Kyutai's 2.6B: text 2.5 s late, a second of silence first. The small Mimi has 250 frames a second."""
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((tiny[-1] / name).read_bytes())
    values = {"audio_delay_seconds": 2.5, "audio_silence_prefix_seconds": 1.0}
    (tmp_path / file).write_text(json.dumps({inner: values} if inner else values))
    back = open_transformers(tmp_path)
    assert back.config.data.task_delay == 625
    assert "audio_silence_prefix_seconds = 1.0 is not kept" in " ".join(back.notes)
