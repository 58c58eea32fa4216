"""WavTokenizer: published names and shapes, numbers of its authors' code, Lightning checkpoints, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from small_codecs import sounds
from torch import Tensor

from megaspeech.codecs import Codec, load_codec
from megaspeech.codecs.wavtokenizer import WavTokenizerCodec
from megaspeech.codecs.wavtokenizer_model import WavTokenizerModel, WavTokenizerSizes, read_weights

PUBLISHED = json.loads((Path(__file__).parent / "wavtokenizer_weights.json").read_text(encoding="utf-8"))
SMALL = WavTokenizerSizes(
    ratios=(2, 3), num_filters=4, latent_dim=16, cardinality=32, hidden_size=32, ffn_size=48, num_blocks=2, window=24
)


def published_shapes(sizes: WavTokenizerSizes) -> dict[str, list[int]]:
    """The names of a published state dict, with the shapes that these sizes give."""
    encoder, channels, width = "feature_extractor.encodec.encoder.model.", sizes.num_filters, sizes.hidden_size
    shapes: dict[str, list[int]] = {}

    def convolution(name: str, out: int, into: int, kernel: int) -> None:
        shapes.update({f"{encoder}{name}.conv.conv.bias": [out], f"{encoder}{name}.conv.conv.weight_g": [out, 1, 1]})
        shapes[f"{encoder}{name}.conv.conv.weight_v"] = [out, into, kernel]

    def plain(name: str, *shape: int) -> None:
        shapes.update({f"{name}.weight": list(shape), f"{name}.bias": [shape[0]]})

    def by_bandwidth(name: str) -> None:
        shapes.update({f"{name}.scale.weight": [4, width], f"{name}.shift.weight": [4, width]})

    convolution("0", channels, 1, 7)
    for place, ratio in enumerate(sizes.ratios):
        convolution(f"{3 * place + 1}.block.1", channels // 2, channels, 3)
        convolution(f"{3 * place + 1}.block.3", channels, channels // 2, 1)
        convolution(f"{3 * place + 1}.shortcut", channels, channels, 1)
        convolution(f"{3 * place + 3}", 2 * channels, channels, 2 * ratio)
        channels *= 2
    lstm = 3 * len(sizes.ratios) + 1
    for layer in range(sizes.num_lstm_layers):
        for kind, shape in (("weight", [4 * channels, channels]), ("bias", [4 * channels])):
            shapes.update({f"{encoder}{lstm}.lstm.{kind}_{way}_l{layer}": shape for way in ("ih", "hh")})
    convolution(f"{lstm + 2}", sizes.latent_dim, channels, 7)
    book, entries = "feature_extractor.encodec.quantizer.vq.layers.0._codebook.", [sizes.cardinality, sizes.latent_dim]
    shapes.update({book + "inited": [1], book + "cluster_size": entries[:1]})
    shapes.update({book + "embed": entries, book + "embed_avg": entries})
    plain("backbone.embed", width, sizes.latent_dim, 7)
    by_bandwidth("backbone.norm")
    for block in range(sizes.num_blocks):
        name = f"backbone.convnext.{block}"
        shapes[f"{name}.gamma"] = [width]
        plain(f"{name}.dwconv", width, 1, 7)
        by_bandwidth(f"{name}.norm")
        plain(f"{name}.pwconv1", sizes.ffn_size, width)
        plain(f"{name}.pwconv2", width, sizes.ffn_size)
    plain("backbone.final_layer_norm", width)
    for block in (0, 1, 3, 4):
        for number in (1, 2):
            plain(f"backbone.pos_net.{block}.norm{number}", width)
            plain(f"backbone.pos_net.{block}.conv{number}", width, width, 3)
    plain("backbone.pos_net.2.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        plain(f"backbone.pos_net.2.{part}", width, width, 1)
    plain("backbone.pos_net.5", width)
    plain("head.out", sizes.window + 2, width)
    return {**shapes, "head.istft.window": [sizes.window]}


def made_weights(sizes: WavTokenizerSizes) -> dict[str, Tensor]:
    """A state dict whose numbers follow from the names."""
    weights = {}
    for name, shape in published_shapes(sizes).items():
        place = torch.arange(math.prod(shape), dtype=torch.float64)
        value = (0.6 * torch.sin(1.7 * place + len(name) + 0.01 * place * place)).float().view(shape)
        weights[name] = value + 1 if name.endswith("weight_g") else value
    return weights


class Settings(dict):
    """Stands for what Lightning keeps of classes that are not installed here."""

    def __reduce__(self) -> tuple:
        return forbidden, ("a checkpoint may run no code",)


def forbidden(reason: str) -> None:
    raise AssertionError(reason)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wavtokenizer")
    others = {
        "multiperioddisc.convs.0.weight": torch.zeros(3),
        "feature_extractor.encodec.decoder.model.0.x": torch.ones(2),
    }
    kept = {"state_dict": made_weights(SMALL) | others, "epoch": 3, "hyper_parameters": Settings(lr=1e-4)}
    torch.save({**kept, "callbacks": {"ModelCheckpoint": {"dirpath": Path("x")}}}, folder / "small_600.ckpt")
    return folder


@pytest.fixture(scope="module")
def codec(folder: Path) -> Codec:
    return load_codec(folder, name="wavtokenizer")


@pytest.mark.parametrize("rate", [40, 75])
def test_names_and_shapes_are_the_published_ones(rate: int) -> None:
    shapes = PUBLISHED["frame40"] | (PUBLISHED["frame75"] if rate == 75 else {})
    sizes, weights = read_weights({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert sizes == WavTokenizerSizes(**({} if rate == 40 else {"ratios": (2, 4, 5, 8), "window": 1280}))
    assert published_shapes(sizes) == shapes
    assert 24000 / sizes.frame_size == rate
    with torch.device("meta"):
        model = WavTokenizerModel(sizes)
    model.load_state_dict(weights, assign=True)  # every one, and no other


def test_numbers_are_those_of_the_authors_code(codec: Codec) -> None:
    """Computed once by github.com/jishengpeng/WavTokenizer at 5cf440d with these sizes and weights."""
    wave = 0.5 * torch.sin(0.7 * torch.arange(54, dtype=torch.float64) ** 1.3).float()[None]
    codes = codec.encode(wave)
    assert codes.tolist() == [[[25, 21, 25, 21, 25, 24, 25, 25, 25]]]
    theirs = [-0.00123, -0.27796, -0.56951, -0.17143, -0.48243, -0.40413, -0.43013, -0.31319, -0.13537]
    assert torch.allclose(codec.decode(codes)[0, ::6], torch.tensor(theirs), atol=2e-5)


def test_codec_meets_the_protocol(codec: Codec) -> None:
    assert isinstance(codec, Codec) and not codec.is_causal and not codec.can_stream
    assert (codec.sample_rate, codec.frame_size, codec.num_codebooks, codec.cardinality) == (24000, 6, 1, 32)
    assert codec.bitrate == 4000 * 5
    for num_samples in (1, 6, 13, 100):
        frames = math.ceil(num_samples / 6)
        codes = codec.encode(sounds(num_samples))
        assert codes.shape == (2, 1, frames) and codec.decode(codes).shape == (2, 6 * frames)
    vectors = codec.codebook_vectors()
    assert torch.equal(vectors[0][codes[:, 0]].transpose(1, 2), codec.dequantize(codes))
    padded = torch.nn.functional.pad(sounds(96), (0, 60))
    alone, longer = (codec.latents(wave[:, None]) for wave in (sounds(96), padded))
    assert not torch.allclose(longer[..., :16], alone, atol=1e-3), "an encoder that looks ahead hears the padding"
    assert codec.silence_codes.shape == (1,)


def test_bf16_computes_spectra_in_fp32(folder: Path) -> None:
    codec = load_codec(folder, name="wavtokenizer").to("cpu", dtype=torch.bfloat16)
    codes = codec.encode(sounds(60))
    assert codec.decode(codes).dtype == torch.float32 and codec.decode(codes).isfinite().all()


def test_a_checkpoint_alone_is_enough(folder: Path, codec: Codec) -> None:
    alone = WavTokenizerCodec.load(folder / "small_600.ckpt", num_codebooks=1)
    assert alone.fingerprint == codec.fingerprint and len(alone.fingerprint) == 16


def test_load_refuses_what_it_cannot_trust(folder: Path, tmp_path: Path) -> None:
    def load() -> None:
        load_codec(tmp_path, name="wavtokenizer")

    with pytest.raises(ValueError, match=r"holds no \*.ckpt; 'wavtokenizer' needs one of its \*.ckpt there"):
        load()
    with pytest.raises(ValueError, match=r"'nowhere': no such folder.*hf download novateur/WavTokenizer"):
        load_codec("nowhere", name="wavtokenizer")
    with pytest.raises(ValueError, match="streams.num_codebooks = 2: .*has 1 codebooks"):
        load_codec(folder, name="wavtokenizer", num_codebooks=2)
    file = tmp_path / "a.ckpt"
    file.write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"a.ckpt: not a checkpoint of WavTokenizer \(.*fetch it again"):
        load()
    whole = made_weights(SMALL)
    for lacking in ("head.out.bias", "backbone.convnext.0.pwconv1.weight", "backbone.pos_net.2.q.bias"):
        torch.save({"state_dict": {name: value for name, value in whole.items() if name != lacking}}, file)
        with pytest.raises(ValueError, match=r"a.ckpt: not a checkpoint of WavTokenizer"):
            load()
    torch.save({"state_dict": whole}, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match=r"a.ckpt, b.ckpt all match \*.ckpt; leave the one to use"):
        load()
