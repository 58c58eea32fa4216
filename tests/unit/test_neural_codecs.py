"""Mimi, EnCodec and DAC, small and random, saved as they are published: codes, padding, streaming, what is refused."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_codecs import save_small, small_model, sounds
from torch import Tensor

from megaspeech.codecs import Codec, load_codec, mimi
from megaspeech.codecs.encodec import EncodecCodec

pytest.importorskip("transformers")
KINDS = ("mimi", "encodec", "dac")
CAUSAL = ("mimi", "encodec")
MAX_CODEBOOKS = {"mimi": 6, "encodec": 6, "dac": 5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("codecs")
    return {kind: save_small(kind, home / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def codecs(folders: dict[str, Path]) -> dict[str, Codec]:
    return {kind: load_codec(folder, name=kind, num_codebooks=4) for kind, folder in folders.items()}


@torch.no_grad()
def encode_by_transformers(kind: str, waveforms_BN: Tensor) -> Tensor:
    model, waveforms = small_model(kind), waveforms_BN[:, None]
    if kind == "mimi":
        return model.encode(waveforms, num_quantizers=4).audio_codes
    if kind == "encodec":
        return model.encode(waveforms, bandwidth=15.0).audio_codes[0][:, :4]
    return model.encode(waveforms, n_quantizers=4).audio_codes


@torch.no_grad()
def decode_by_transformers(kind: str, codes_BQT: Tensor) -> Tensor:
    model = small_model(kind)
    if kind == "encodec":
        return model.decode(codes_BQT[None], [None]).audio_values[:, 0]
    return model.decode(audio_codes=codes_BQT).audio_values.flatten(1)


def stream_encode(codec: Codec, waveforms_BN: Tensor) -> Tensor:
    encoder = codec.streaming_encoder(batch_size=len(waveforms_BN))
    return torch.stack([encoder.step(frame) for frame in waveforms_BN.split(codec.frame_size, dim=1)], dim=-1)


def stream_decode(codec: Codec, codes_BQT: Tensor) -> Tensor:
    decoder = codec.streaming_decoder(batch_size=len(codes_BQT))
    assert decoder.delay == 0
    return torch.cat([decoder.step(codes) for codes in codes_BQT.unbind(-1)], dim=1)


def nearly(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() < 1e-5 * b.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_sound_are_those_of_transformers(codecs: dict[str, Codec], kind: str) -> None:
    codec = codecs[kind]
    waveforms = sounds(codec.frame_size * 25)
    codes = codec.encode(waveforms)
    assert torch.equal(codes, encode_by_transformers(kind, waveforms))
    assert min(len(book.unique()) for book in codes.unbind(1)) > 4, "codes that are all the same would pass too"
    theirs = decode_by_transformers(kind, codes)
    assert nearly(codec.decode(codes)[:, : theirs.shape[1]], theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_codec_meets_the_protocol(codecs: dict[str, Codec], kind: str) -> None:
    codec = codecs[kind]
    assert isinstance(codec, Codec) and codec.name == kind and codec.device.type == "cpu"
    assert codec.frame_rate == codec.sample_rate / codec.frame_size == codec.bitrate / 4 / math.log2(32)
    for num_samples in (1, codec.frame_size, codec.frame_size * 9 + 1):
        codes = codec.encode(sounds(num_samples))
        frames = math.ceil(num_samples / codec.frame_size)
        assert codes.shape == (2, 4, frames) and codes.dtype == torch.int64
        sound = codec.decode(codes)
        assert sound.shape == (2, frames * codec.frame_size) and sound.dtype == torch.float32
        assert not sound.requires_grad and torch.equal(codes, codec.encode(sounds(num_samples)))
    assert codec.encode(torch.zeros(2, 0)).shape == (2, 4, 0) and codec.decode(torch.zeros(2, 4, 0)).shape == (2, 0)
    assert codec.encode(torch.zeros(0, 99)).shape[:2] == (0, 4)
    silence = codec.encode(torch.zeros(1, codec.sample_rate))[0]
    assert torch.equal(silence[:, silence.shape[1] // 2], codec.silence_codes)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_code_of_a_causal_codec(codecs: dict[str, Codec], kind: str) -> None:
    codec = codecs[kind]
    changed = False
    for frames in (1, 3, 6, 7, 8, 12, 30):
        waveforms = sounds(codec.frame_size * frames - 5)
        codes = codec.encode(waveforms)
        longer = torch.nn.functional.pad(waveforms, (0, codec.frame_size * 13))
        changed |= not torch.equal(codec.encode(longer)[..., :frames], codes)
    assert codec.is_causal is (kind in CAUSAL) is (not changed)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_of_a_row_do_not_depend_on_its_batch(codecs: dict[str, Codec], kind: str) -> None:
    codec = codecs[kind]
    waveforms = sounds(codec.frame_size * 20, batch=5)
    alone = torch.cat([codec.encode(row[None]) for row in waveforms])
    assert torch.equal(codec.encode(waveforms), alone)
    sound = codec.decode(alone)
    assert nearly(torch.cat([codec.decode(row[None]) for row in alone]), sound)


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_codebooks_are_the_first_ones(folders: dict[str, Path], codecs: dict[str, Codec], kind: str) -> None:
    waveforms = sounds(codecs[kind].frame_size * 9)
    whole = load_codec(folders[kind], name=kind)
    assert whole.num_codebooks == MAX_CODEBOOKS[kind]
    one = load_codec(folders[kind], name=kind, num_codebooks=1)
    assert torch.equal(whole.encode(waveforms)[:, :4], codecs[kind].encode(waveforms))
    assert torch.equal(one.encode(waveforms), codecs[kind].encode(waveforms)[:, :1])
    assert one.fingerprint == whole.fingerprint and one.silence_codes.shape == (1,)
    for wrong in (0, 7):
        with pytest.raises(ValueError, match=rf"streams.num_codebooks = {wrong}: .*choose 1 to {MAX_CODEBOOKS[kind]}"):
            load_codec(folders[kind], name=kind, num_codebooks=wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_sum_of_codebook_vectors_is_what_is_decoded(codecs: dict[str, Codec], kind: str) -> None:
    codec = codecs[kind]
    vectors = codec.codebook_vectors()
    assert vectors.shape[:2] == (4, 32) and not vectors.requires_grad
    codes = codec.encode(sounds(codec.frame_size * 9))
    total = sum(vectors[q][codes[:, q]] for q in range(4)).transpose(1, 2)
    assert nearly(total, codec.dequantize(codes)) and total.std() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_for_the_network_alone(folders: dict[str, Path], kind: str) -> None:
    codec = load_codec(folders[kind], name=kind, num_codebooks=4)
    waveforms = sounds(codec.frame_size * 40)
    codes = codec.encode(waveforms)
    assert codec.to("cpu", dtype=torch.bfloat16) is codec
    dtypes = {weight.dtype for weight in codec.model.encoder.parameters()}
    assert dtypes == {torch.bfloat16} and codec.codebook_vectors().dtype == torch.float32
    assert torch.bfloat16 not in {buffer.dtype for buffer in codec.model.buffers()}, "rotary frequencies"
    first = codec.encode(waveforms)[:, 0]
    assert (first == codes[:, 0]).float().mean() > 0.8
    assert codec.decode(codes).dtype == torch.float32
    if codec.can_stream:
        assert (stream_encode(codec, waveforms)[:, 0] == first).float().mean() > 0.8
        assert stream_decode(codec, codes).dtype == torch.float32
    with pytest.raises(AssertionError, match="do not come back"):
        codec.to("cpu")


def test_streamed_codes_and_sound_are_the_whole_ones(codecs: dict[str, Codec]) -> None:
    codec = codecs["mimi"]
    waveforms = sounds(codec.frame_size * 30)  # 60 steps of a transformer that sees 8
    codes = codec.encode(waveforms)
    assert torch.equal(stream_encode(codec, waveforms), codes)
    assert nearly(stream_decode(codec, codes), codec.decode(codes))
    assert nearly(stream_decode(codec, codes[..., :3]), codec.decode(codes[..., :3]))


def test_long_sounds_go_in_pieces(codecs: dict[str, Codec], monkeypatch: pytest.MonkeyPatch) -> None:
    codec = codecs["mimi"]
    waveforms = sounds(codec.frame_size * 30 - 3)
    codes, sound = codec.encode(waveforms), codec.decode(codec.encode(waveforms))
    monkeypatch.setattr(mimi, "PIECE_FRAMES", 7)
    assert torch.equal(codec.encode(waveforms), codes)
    assert nearly(codec.decode(codes), sound)


@pytest.mark.parametrize("kind", ("encodec", "dac"))
def test_codecs_that_cannot_stream_say_so(codecs: dict[str, Codec], kind: str) -> None:
    codec = codecs[kind]
    assert not codec.can_stream
    for streaming in (codec.streaming_encoder, codec.streaming_decoder):
        with pytest.raises(ValueError, match=f"codec.name = '{kind}': .*use 'mimi' or 'spectral'"):
            streaming()


def test_fingerprint_is_of_weights_and_config(folders: dict[str, Path], tmp_path: Path) -> None:
    first = load_codec(folders["dac"], name="dac").fingerprint
    copied = save_small("dac", tmp_path)
    assert len(first) == 16 and load_codec(copied, name="dac").fingerprint == first
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "transformers_version": "6.0"}))
    assert load_codec(copied, name="dac").fingerprint == first
    (copied / "config.json").write_text(json.dumps({**config, "sampling_rate": 16000}))
    assert load_codec(copied, name="dac").fingerprint != first
    (copied / "config.json").write_text(json.dumps(config))
    weights = load_file(copied / "model.safetensors")
    weights["encoder.conv1.bias"][0] += 1e-6
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    assert load_codec(copied, name="dac").fingerprint != first


def test_a_name_is_looked_up_in_the_hugging_face_cache(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"'kyutai/mimi': no such folder.*config.json and .*hf download kyutai/mimi"):
        load_codec("kyutai/mimi", name="mimi")
    with pytest.raises(ValueError, match=r"codec.path = '': no such folder"):
        load_codec("", name="dac")
    repository = tmp_path / "models--kyutai--mimi"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("0" * 40)).symlink_to(folders["mimi"])
    assert load_codec("kyutai/mimi", name="mimi").fingerprint == load_codec(folders["mimi"], name="mimi").fingerprint


def test_load_refuses_what_it_cannot_trust(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="codec.name = 'opus' is no known codec; known: spectral, mimi"):
        load_codec(tmp_path, name="opus")
    with pytest.raises(ValueError, match=r"config.json: no such file; 'mimi' needs .*Kyutai|config.json and"):
        load_codec(tmp_path, name="mimi")
    with pytest.raises(ValueError, match=r"config.json: model_type = 'dac', expected 'encodec'"):
        load_codec(folders["dac"], name="encodec")
    folder = save_small("encodec", tmp_path / "encodec")
    weights = load_file(folder / "model.safetensors")

    lacking = {key: value for key, value in weights.items() if key != "decoder.layers.0.conv.bias"}
    save_file(lacking, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.safetensors: decoder.layers.0.conv.bias and 0 other weights are miss"):
        load_codec(folder, name="encodec")
    save_file({**weights, "decoder.layers.0.conv.bias": torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"decoder.layers.0.conv.bias and 0 other weights are missing or of another"):
        load_codec(folder, name="encodec")
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"model.safetensors: cannot be read"):
        load_codec(folder, name="encodec")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no model.safetensors or pytorch_model.bin"):
        load_codec(folder, name="encodec")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: cannot be read"):
        load_codec(folder, name="encodec")


def test_stereo_encodec_is_refused() -> None:
    from transformers import EncodecConfig, EncodecModel

    model = EncodecModel(EncodecConfig(num_filters=2, hidden_size=4, audio_channels=2, sampling_rate=48000))
    with pytest.raises(ValueError, match="only the causal mono model is supported, not 48000 Hz stereo"):
        EncodecCodec(model)


def test_without_transformers_the_extra_is_named(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install megaspeech\[codecs\]"):
        load_codec(folders["dac"], name="dac")


@pytest.fixture(scope="module")
def kyutai_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Kyutai's file of a small Mimi: the runtime's own loader, its sizes made small."""
    pytest.importorskip("moshi")
    os.environ["NO_TORCH_COMPILE"] = "1"
    from moshi.models import loaders

    seanet = {**loaders._seanet_kwargs, "dimension": 16, "n_filters": 4, "ratios": [4, 3, 2, 2]}
    books = {**loaders._quantizer_kwargs, "dimension": 8, "bins": 32, "input_dimension": 16, "output_dimension": 16}
    layers = {"d_model": 16, "num_heads": 2, "num_layers": 2, "dim_feedforward": 32, "context": 100}
    layers = {**loaders._transformer_kwargs, **layers, "input_dimension": 16, "output_dimensions": [16]}
    sizes = {"sample_rate": 24000, "channels": 1, "frame_rate": 250.0}
    folder = tmp_path_factory.mktemp("kyutai")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaders, "_mimi_config", {**sizes, "seanet": seanet, "quantizer": books, "transformer": layers})
        torch.manual_seed(0)
        model = loaders.get_mimi(None, num_codebooks=32)
        for name, value in model.state_dict().items():
            if name.endswith(("embedding_sum", "embed_sum")):
                value.normal_(std=0.01)
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / KYUTAI)
        (folder / "config.json").write_text('{"model_type": "moshi"}')  # lies beside it where Moshi was fetched
        yield folder


KYUTAI = "tokenizer-e351c8d8-checkpoint125.safetensors"


def test_kyutais_own_file_is_opened_by_moshi(kyutai_folder: Path, tmp_path: Path) -> None:
    codec = load_codec(kyutai_folder, name="mimi", num_codebooks=4)
    assert isinstance(codec, Codec) and (codec.name, codec.frame_size, codec.cardinality) == ("mimi", 96, 32)
    waveforms = sounds(96 * 30)
    codes = codec.encode(waveforms)
    assert codes.shape == (2, 4, 30) and len(codes.unique()) > 8
    assert torch.equal(stream_encode(codec, waveforms), codes)
    assert nearly(stream_decode(codec, codes), codec.decode(codes))
    assert torch.equal(codec.encode(waveforms), codes), "streaming left nothing behind"
    vectors = codec.codebook_vectors()
    assert nearly(sum(vectors[q][codes[:, q]] for q in range(4)).transpose(1, 2), codec.dequantize(codes))
    whole = load_codec(kyutai_folder, name="mimi")
    assert whole.num_codebooks == 32 and torch.equal(whole.encode(waveforms)[:, :4], codes)
    assert nearly(whole.decode(whole.encode(waveforms)), whole.model.decode(whole.encode(waveforms))[:, 0])
    codec.to("cpu", dtype=torch.bfloat16)
    assert codec.decode(codes).dtype == stream_decode(codec, codes).dtype == torch.float32
    assert stream_encode(codec, waveforms).shape == codes.shape

    (tmp_path / KYUTAI).write_bytes(b"torn")
    with pytest.raises(ValueError, match=rf"{KYUTAI}: not Mimi's weights"):
        load_codec(tmp_path, name="mimi")
    (tmp_path / "tokenizer-2.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="all match tokenizer-"):
        load_codec(tmp_path, name="mimi")
