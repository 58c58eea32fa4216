"""How fast neural codecs of full size encode, by batch and precision, and where the time goes.

The weights are random: they do not change the time. Shapes: B batch, N samples.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megaspeech.codecs.neural import NeuralCodec, import_transformers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = ("full", "tiny")
COPY, CONVOLUTIONS, QUANTISER = "copy to the device", "convolutions", "quantiser"
MEASURED = "measured"


@dataclass(frozen=True)
class Case:
    """What is measured: `batch_size` sounds of `seconds` each, encoded at once."""

    name: str
    num_codebooks: int | None
    dtype: str
    batch_size: int
    seconds: float


@dataclass(frozen=True)
class Row:
    """What came out; `status` says why there are no figures.

    `encode_x_real_time` is of whole calls of `encode`, from the host's memory, in seconds of sound a second, the median
    over repeats. `parts_ms` is of other calls, which wait at the end of each part: what overlapped is seen apart.
    """

    label: str
    case: Case
    status: str
    num_parameters: int = 0
    encode_x_real_time: float = math.nan
    decode_x_real_time: float = math.nan
    parts_ms: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None


def random_codec(name: str, *, num_codebooks: int | None, size: str = "full") -> NeuralCodec:
    """A codec of the published model's size ("full") or a small one, with random weights.

    Raises:
        ValueError: no codec of this name has a network.
        ImportError: transformers is not installed.
    """
    is_tiny = size == "tiny"
    if name == "wavtokenizer":
        from megaspeech.codecs.wavtokenizer import WavTokenizerCodec
        from megaspeech.codecs.wavtokenizer_model import WavTokenizerModel, WavTokenizerSizes

        small = {"num_filters": 4, "latent_dim": 32, "hidden_size": 32, "ffn_size": 64, "num_blocks": 2}
        return WavTokenizerCodec(
            WavTokenizerModel(WavTokenizerSizes(**small if is_tiny else {})), num_codebooks=num_codebooks
        )
    transformers = import_transformers()
    if name == "mimi":
        from megaspeech.codecs.mimi import MimiCodec

        small = {"num_filters": 4, "hidden_size": 32, "upsample_groups": 32, "num_hidden_layers": 2}
        small |= {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
        config = transformers.MimiConfig(**small if is_tiny else {})
        return MimiCodec(transformers.MimiModel(config), num_codebooks=num_codebooks)
    if name == "encodec":
        from megaspeech.codecs.encodec import EncodecCodec

        config = transformers.EncodecConfig(**{"num_filters": 4, "hidden_size": 16} if is_tiny else {})
        return EncodecCodec(transformers.EncodecModel(config), num_codebooks=num_codebooks)
    if name == "dac":
        from megaspeech.codecs.dac import DacCodec

        small = {"encoder_hidden_size": 4, "decoder_hidden_size": 32}
        config = transformers.DacConfig(sampling_rate=44100, **small if is_tiny else {})
        return DacCodec(transformers.DacModel(config), num_codebooks=num_codebooks)
    raise ValueError(f"--codecs {name}: must be mimi, encodec, dac or wavtokenizer, with @N the number of codebooks")


def measure(
    cases: Sequence[Case],
    *,
    device: torch.device,
    size: str = "full",
    repeats: int = 5,
    hear: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """A row a case. One that does not fit the memory is a row that says so.

    Args:
        cases: those of one codec and precision next to each other share its making.
        device: where codecs run.
        size: "full" or "tiny".
        repeats: timed calls, after one that is not.
        hear: told what is begun.

    Raises:
        ValueError, ImportError: as ``random_codec``.
    """
    rows: list[Row] = []
    made: tuple | None = None
    codec: NeuralCodec | None = None
    for case in cases:
        if made != (key := (case.name, case.num_codebooks, case.dtype)):
            codec = None  # lets go of the memory before the next takes its own
            codec = random_codec(case.name, num_codebooks=case.num_codebooks, size=size)
            codec.to(device, dtype=DTYPES[case.dtype])
            made = key
        hear(f"{case.name} {case.dtype}, {case.batch_size} x {case.seconds:g} s")
        try:
            rows.append(_measure(codec, case, repeats=repeats))
        except torch.OutOfMemoryError:
            rows.append(Row(_label(codec), case, "out of memory"))
    return rows


def _label(codec: NeuralCodec) -> str:
    return f"{codec.name}, {codec.sample_rate / 1000:g} kHz, {codec.num_codebooks} codebooks"


def _measure(codec: NeuralCodec, case: Case, *, repeats: int) -> Row:
    waveforms = 0.1 * torch.randn(case.batch_size, round(case.seconds * codec.sample_rate))
    on_accelerator = codec.device.type != "cpu"
    if on_accelerator:
        waveforms = waveforms.pin_memory()
        torch.accelerator.reset_peak_memory_stats(codec.device)
    codes = codec.encode(waveforms)
    encoding = _median(lambda: codec.encode(waveforms), codec, repeats=repeats)
    peak = torch.accelerator.max_memory_allocated(codec.device) if on_accelerator else None
    codec.decode(codes)
    decoding = _median(lambda: codec.decode(codes), codec, repeats=repeats)
    found = [_parts(codec, waveforms) for _ in range(repeats)]
    seconds = case.batch_size * case.seconds
    return Row(
        _label(codec),
        case,
        MEASURED,
        num_parameters=sum(weight.numel() for weight in codec.model.parameters()),
        encode_x_real_time=seconds / encoding,
        decode_x_real_time=seconds / decoding,
        parts_ms={name: 1000 * statistics.median(one[name] for one in found) for name in found[0]},
        peak_bytes=peak,
    )


def _median(call: Callable[[], Tensor], codec: NeuralCodec, *, repeats: int) -> float:
    """Seconds of a call until its result is there."""
    found = []
    for _ in range(repeats):
        began = _now(codec)
        call()
        found.append(_now(codec) - began)
    return statistics.median(found)


def _now(codec: NeuralCodec) -> float:
    """Seconds, when all that was asked of the device is done."""
    if codec.device.type != "cpu":
        torch.accelerator.synchronize(codec.device)
    return time.perf_counter()


@torch.no_grad()
def _parts(codec: NeuralCodec, waveforms_BN: Tensor) -> dict[str, float]:
    """Seconds of one encoding by part."""
    began = _now(codec)
    missing = -waveforms_BN.shape[1] % codec.frame_size
    waveforms = nn.functional.pad(waveforms_BN.to(codec.device), (0, missing))[:, None].to(codec.dtype)
    copied = _now(codec)
    with _timed(codec) as spent:
        latents = codec.latents(waveforms)
    encoded = _now(codec)
    codec.quantize(latents)
    done = _now(codec)
    inner = {name: sum(seconds) for name, seconds in spent.items()}
    rest = encoded - copied - sum(inner.values())
    return {COPY: copied - began, CONVOLUTIONS: rest, **inner, QUANTISER: done - encoded}


@contextmanager
def _timed(codec: NeuralCodec) -> Iterator[dict[str, list[float]]]:
    """Seconds of every call of the modules that the codec tells apart, by name."""
    spent: dict[str, list[float]] = {name: [] for name in codec.parts()}
    hooks = []
    for name, modules in codec.parts().items():
        for module in modules:
            hooks.append(module.register_forward_pre_hook(lambda *_, to=spent[name]: to.append(-_now(codec))))
            hooks.append(module.register_forward_hook(lambda *_, to=spent[name]: to.append(_now(codec))))
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()
