"""Real shards of a small fitted codec, looked into: totals, words in time, sound of both parties, the command."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from one_rank import make_config

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("faiss")

from megaspeech.codecs import SpectralCodec, SpectralConfig, registry  # noqa: E402
from megaspeech.config import Config  # noqa: E402
from megaspeech.data.shard_set import write_catalogue  # noqa: E402
from megaspeech.data.shards import write_shard  # noqa: E402
from megaspeech.data.tasks import Task  # noqa: E402
from megaspeech.data.tokenizer import Tokenizer, train_tokenizer  # noqa: E402
from megaspeech.preparation.compose import compose, shard_header  # noqa: E402
from megaspeech.preparation.inspection import (  # noqa: E402
    Inspected,
    check_made_with,
    find_shards,
    inspect_sample,
    read_sample,
    stream_lines,
    summarise,
)
from megaspeech.preparation.recording import Recording  # noqa: E402
from megaspeech.preparation.sample_picture import draw_sample  # noqa: E402
from megaspeech.preparation.sample_sound import play  # noqa: E402
from megaspeech.preparation.utterance import Utterance, Word  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
RATE, FRAME, ORIGIN = 16000, 1280, 2
S2S, ASR = Task("s2s", "en", "en"), Task("asr", "en", "en")
USER, MODEL = Recording(Path("call.wav"), channel=1), Recording(Path("call.wav"), channel=0)
WORDS = (Word("three", 0.5, 0.9), Word("seven", 1.3, 1.6))


def voice(seconds: float, *, pitch: float) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    tone = sum(np.sin(2 * np.pi * n * pitch * time) / n for n in range(1, 12))
    return (0.1 * tone * (np.sin(9 * time) > -0.3)).astype(np.float32)


@pytest.fixture(scope="module")
def codec() -> SpectralCodec:
    voices = [torch.from_numpy(voice(4.1, pitch=pitch)) for pitch in (95.0, 130.0, 180.0, 240.0)]
    config = SpectralConfig(num_codebooks=4, cardinality=32, latent_dim=24, fit_frames=400)
    return SpectralCodec.fit(voices, config=config)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    return train_tokenizer([" ".join(digits[i:] + digits[:i]) for i in range(10)], vocabulary_size=48, languages=["en"])


@pytest.fixture(scope="module")
def codes(codec: SpectralCodec) -> dict[Recording, np.ndarray]:
    waves = {USER: voice(2.4, pitch=110), MODEL: voice(2.4, pitch=210)}
    return {recording: codec.encode(torch.from_numpy(wave)[None])[0].numpy() for recording, wave in waves.items()}


@pytest.fixture(scope="module")
def prepared(
    tmp_path_factory: pytest.TempPathFactory, codec: SpectralCodec, tokenizer: Tokenizer, codes: dict
) -> tuple[Path, Config]:
    """(directory of a run with codec, tokenizer, config and shards of two tasks, its config)."""
    directory = tmp_path_factory.mktemp("run")
    config = make_config(directory)
    codec.save(directory / "codec")
    (directory / "tokenizer.model").write_bytes(tokenizer.model)
    tools = {"config": config, "codec": codec, "tokenizer": tokenizer}
    call = Utterance(S2S, "three seven", WORDS, heard=USER, spoken=MODEL)
    heard = Utterance(ASR, "three seven", WORDS, heard=USER)
    short = {USER: codes[USER][:, :9]}
    late = replace(heard, text="three", words=WORDS[:1])
    for name, shards in {
        "s2s-en": [[compose(call, codes, **tools)]],
        "asr-en": [[compose(heard, codes, **tools)] * 2, [compose(late, short, **tools)]],
    }.items():
        for place, samples in enumerate(shards):
            header = shard_header(name, **tools)
            rows = [sample.codes_ST for sample in samples]
            write_shard(directory / "shards/train/calls" / name / f"{place:06d}", rows, header=header)
        write_catalogue(directory / "shards/train/calls" / name)
    (directory / "config.toml").write_text(
        f'[model]\npreset = "tiny"\n[codec]\nname = "spectral"\npath = "{directory}/codec"\n'
        f'[data]\ndirectory = "{directory}/shards"\ntokenizer = "{directory}/tokenizer.model"\n'
    )
    return directory / "shards/train/calls", config


def test_shards_are_found_by_any_name(prepared: tuple[Path, Config], tmp_path: Path) -> None:
    shards, _ = prepared
    first, second = shards / "asr-en/000000", shards / "asr-en/000001"
    for suffix in ("", ".bin", ".idx", ".json", ".xxh64"):
        assert find_shards(f"{second}{suffix}") == [second]
    assert find_shards(shards / "asr-en") == [first, second]
    with pytest.raises(ValueError, match="run tools/prepare_data.py"):
        find_shards(tmp_path)
    (bare := tmp_path / "bare").mkdir()
    for file in (shards / "asr-en").glob("0*"):
        os.link(file, bare / file.name)
    assert find_shards(bare) == [bare / "000000", bare / "000001"]  # not all prepared yet: no catalogue
    with pytest.raises(ValueError, match="name one of .*asr-en, .*s2s-en"):
        find_shards(shards)


def test_totals_are_those_of_the_samples(prepared: tuple[Path, Config]) -> None:
    shards, _ = prepared
    summary = summarise(find_shards(shards / "asr-en"))
    long = 2 + 30 + 3
    assert summary.lengths.tolist()[:2] == [long, long] and summary.num_samples == 3 and summary.num_shards == 2
    short = int(summary.lengths[2])
    assert summary.num_frames == 2 * long + short and summary.num_tokens == summary.num_frames * 9
    assert summary.hours == pytest.approx((2 * long + short) / 12.5 / 3600)
    assert summary.padding == pytest.approx((long - short) / (3 * long))
    with pytest.raises(ValueError, match="holds s2s-en, the first one asr-en"):
        summarise([shards / "asr-en/000000", shards / "s2s-en/000000"])


def inspected(shards: Path, index: int, *, codec: SpectralCodec, tokenizer: Tokenizer) -> Inspected:
    codes_ST, header, _ = read_sample(find_shards(shards), index)
    return inspect_sample(codes_ST, header=header, codec=codec, tokenizer=tokenizer)


def test_a_conversation_is_taken_apart(
    prepared: tuple[Path, Config], codec: SpectralCodec, tokenizer: Tokenizer, codes: dict
) -> None:
    sample = inspected(prepared[0] / "s2s-en", 0, codec=codec, tokenizer=tokenizer)
    lead = prepared[1].data.speech_lead
    wanted = [(word.word, ORIGIN + int(word.start * 12.5) - lead) for word in WORDS]
    assert [(word.word, word.first_frame) for word in sample.words] == wanted
    assert list(sample.parties) == ["heard", "said"]
    for name, recording in (("heard", USER), ("said", MODEL)):
        party, sound = sample.parties[name], codec.decode(torch.from_numpy(codes[recording])[None])[0].numpy()
        assert np.array_equal(party.codes[:, ORIGIN : ORIGIN + 30], codes[recording])
        assert party.waveform.shape == (32 * FRAME,)
        heard, alone = party.waveform[(ORIGIN + 1) * FRAME :], sound[FRAME:]
        assert abs(np.log(np.square(heard).mean() / np.square(alone).mean())) < 0.5  # its sound, where it belongs
        assert np.abs(party.waveform[: (ORIGIN - 1) * FRAME]).max() < 0.02  # silence during the prompt


def test_a_listening_task_has_one_party(
    prepared: tuple[Path, Config], codec: SpectralCodec, tokenizer: Tokenizer
) -> None:
    sample = inspected(prepared[0] / "asr-en", 2, codec=codec, tokenizer=tokenizer)
    assert list(sample.parties) == ["heard"] and [word.word for word in sample.words] == ["three"]
    with pytest.raises(ValueError, match="sample 3: there are 3, counted from 0"):
        read_sample(find_shards(prepared[0] / "asr-en"), 3)
    with pytest.raises(ValueError, match="sample -1"):
        read_sample(find_shards(prepared[0] / "asr-en"), -1)


def test_streams_are_printed_with_equal_frames_in_one(prepared: tuple[Path, Config], tokenizer: Tokenizer) -> None:
    codes_ST, header, _ = read_sample(find_shards(prepared[0] / "asr-en"), 0)
    lines = list(stream_lines(codes_ST, header=header, tokenizer=tokenizer))
    assert lines[0] == ("0", "<asr>", "silence", "-") and lines[1] == ("1", "<en>", "silence", "-")
    assert lines[2] == ("2", "<pad>", "silence", " ".join(map(str, codes_ST[5:, 2])))
    assert lines[-1][0].endswith(f"-{codes_ST.shape[1] - 1}") and lines[-1][1:] == ("<pad>", "silence", "silence")
    assert len(lines) < codes_ST.shape[1]


def test_another_codec_or_tokenizer_is_refused(
    prepared: tuple[Path, Config], codec: SpectralCodec, tokenizer: Tokenizer
) -> None:
    _, header, _ = read_sample(find_shards(prepared[0] / "asr-en"), 0)
    check_made_with(header, codec=codec, tokenizer=tokenizer)
    for key, word in (("codec_fingerprint", "codec"), ("tokenizer_fingerprint", "tokenizer")):
        with pytest.raises(ValueError, match=f"made with a {word} of fingerprint other"):
            check_made_with(replace(header, **{key: "other"}), codec=codec, tokenizer=tokenizer)


def test_text_alone_has_a_picture_too(codec: SpectralCodec, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tools = {"config": make_config(tmp_path), "codec": codec, "tokenizer": tokenizer}
    codes_ST = compose(Utterance(Task("text", "en", "en"), "three seven", ()), {}, **tools).codes_ST
    sample = inspect_sample(codes_ST, header=shard_header("text-en", **tools), codec=codec, tokenizer=tokenizer)
    assert not sample.parties and [word.word for word in sample.words] == ["three", "seven"]
    draw_sample(sample, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="text-en has no sound"):
        play(sample)


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools/inspect_shards.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_command(prepared: tuple[Path, Config], tmp_path: Path) -> None:
    shards, _ = prepared
    config = shards.parents[2] / "config.toml"
    shown = run(shards / "s2s-en", "--sample", 0, "--config", config, "--output", tmp_path)
    assert shown.returncode == 0, shown.stderr
    for part in ("s2s-en", "1 in 1 shards", "frames       samples", "frame    17", "three", "seven", "<s2s>"):
        assert part in shown.stdout, part
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["sample_000000.png", "sample_000000_heard.wav", "sample_000000_said.wav"]
    samples, rate = soundfile.read(tmp_path / "sample_000000_said.wav")
    assert rate == RATE and len(samples) == 32 * FRAME and np.abs(samples).max() > 0.05
    picture = (tmp_path / "sample_000000.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def test_the_codec_is_of_the_kind_that_the_config_names(
    prepared: tuple[Path, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, _ = prepared
    written = (shards.parents[2] / "config.toml").read_text()
    (tmp_path / "config.toml").write_text(written.replace('name = "spectral"', 'name = "dac"'))
    monkeypatch.setattr(registry, "LOADERS", {"dac": registry.LOADERS["spectral"]})
    main = runpy.run_path(str(ROOT / "tools/inspect_shards.py"))["main"]
    assert main([str(shards / "asr-en"), "--sample", "0", "--config", str(tmp_path / "config.toml")]) == 0


def test_the_codec_has_the_codebooks_that_are_heard_where_none_is_said(
    prepared: tuple[Path, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, _ = prepared
    written, asked = (shards.parents[2] / "config.toml").read_text(), []
    streams = "[streams]\nnum_codebooks = 0\nnum_given_codebooks = 4\ndelays = [0, 0, 1, 1, 1]\n"
    (tmp_path / "config.toml").write_text(streams + written)

    def load(*_: object, num_codebooks: int) -> SpectralCodec:
        asked.append(num_codebooks)
        raise ValueError("that is enough")

    monkeypatch.setattr(SpectralCodec, "load", load)
    main = runpy.run_path(str(ROOT / "tools/inspect_shards.py"))["main"]
    assert main([str(shards / "asr-en"), "--sample", "0", "--config", str(tmp_path / "config.toml")]) == 1
    assert asked == [4]


def test_a_sample_needs_the_config_that_it_was_made_with(prepared: tuple[Path, Config]) -> None:
    unnamed = run(prepared[0] / "asr-en", "--sample", 0)
    assert unnamed.returncode == 2 and "--sample needs --config" in unnamed.stderr
    with pytest.raises(ValueError, match="there is no shard"):
        summarise(find_shards(prepared[0] / "absent"))
