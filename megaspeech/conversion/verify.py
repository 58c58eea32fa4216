"""Is what was written the model that was read? Logits of both sides on the same codes, or every tensor read back.

Both sides compute in FP32, whatever the files keep: numbers of BF16 are numbers of FP32, so the same tolerance holds
for all, and a difference is a mistake and not rounding. 1e-4 is a hundred times what FP32 sums in another order differ
by where logits are of the order of one (1.7e-6 was seen), and a hundredth of what the smallest mistake made on purpose
changes. Rounding grows with the numbers that are rounded, and trained models have logits of the order of ten: so it is
1e-4 of the largest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import xxhash

from megaspeech.config import Config
from megaspeech.config.computation import PrecisionSection
from megaspeech.conversion.deferred import Deferred
from megaspeech.conversion.native import load_weights, whole_model
from megaspeech.conversion.new_weights import ROWS_AT_ONCE
from megaspeech.conversion.rules import forget
from megaspeech.conversion.stored import StoredModel
from megaspeech.model.speech_text_model import SpeechTextModel

TOLERANCE = 1e-4
"""Of the largest text logit, or of 1 where that is less."""
ROOM_BESIDE = 1 << 30
"""Bytes for what the two models compute, and for everything else in the process."""

Difference = Callable[[SpeechTextModel, Path, Config], float]


@dataclass(frozen=True)
class Agreement:
    """What was compared, in words, and the largest difference beside what may be; None where bits were."""

    what: str
    largest_difference: float | None = None
    tolerance: float | None = None

    def __str__(self) -> str:
        """A line for the terminal."""
        if self.largest_difference is None:
            return self.what
        return f"{self.what}: largest difference {self.largest_difference:.1e} (tolerance {self.tolerance:.1e})"


def logits_agree(model: StoredModel, path: Path, *, runtime: str, difference: Difference) -> Agreement:
    """Compare a model's logits with those that a runtime computes of the files at `path`.

    Raises:
        ValueError: they differ by more than the tolerance.
    """
    config = model.config.model_copy(update={"precision": PrecisionSection(recipe="fp32")})
    native = whole_model(config)
    load_weights(native, model.weights)
    forget()
    largest = [1.0]
    native.text_head.register_forward_hook(lambda module, given, made: largest.append(float(made[0].abs().max())))
    found = difference(native, path, config)
    tolerance = TOLERANCE * max(largest)
    if not found <= tolerance:
        raise ValueError(
            f"{path}: the logits of {runtime} differ from the native model's by {found:.1e}, more than "
            f"{tolerance:.1e}; do not use it, and tell us of the config that it came of"
        )
    return Agreement(f"logits of {runtime} and of the native model on the same codes", found, tolerance)


def tensors_agree(model: StoredModel, written: StoredModel, *, path: Path) -> Agreement:
    """Compare a model with what is read back of the files at `path`, every bit of it, a tensor at a time.

    By checksums (XXH3 of 128 bits), so that the two sides of a large tensor need not be held together.

    Raises:
        ValueError: a tensor differs.
    """
    for name, one in model.weights.items():
        if _checksum(one.held()) != _checksum(written.weights[name]):
            raise ValueError(f"{path}: tensor {name} is not the one that was read; do not use it, and look at the disk")
    return Agreement(f"{len(model.weights)} tensors read back, all bits equal")


def rounded_tensors_agree(model: StoredModel, written: StoredModel, *, path: Path) -> Agreement:
    """The same of a model whose matrices were rounded to eight bits: within half a step of the largest row.

    Raises:
        ValueError: a tensor is farther off.
    """
    for name, one in model.weights.items():
        before, after = one.read(), written.weights[name].read()
        # Half a step of the eight bits, and of the precision that they are read back in.
        most = torch.stack(torch.aminmax(before)).float().abs().max() * (0.501 / 127 + torch.finfo(one.dtype).eps / 2)
        rows = zip(before.split(ROWS_AT_ONCE), after.split(ROWS_AT_ONCE), strict=True)
        if not (off := torch.stack([(a.float() - b.float()).abs().max() for b, a in rows]).max()) <= most:
            raise ValueError(f"{path}: tensor {name} is off by {off:.1e}, more than eight bits explain; do not use it")
    forget()
    return Agreement(f"{len(model.weights)} tensors read back, all within half a step of eight bits")


def _checksum(one: Deferred) -> bytes:
    tensor = one.read()
    forget()
    return xxhash.xxh3_128_digest(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def lack_of_memory(model: StoredModel) -> str | None:
    """Why logits cannot be compared here, in words; None where both models fit in FP32 into what is free."""
    needed = 2 * sum(torch.Size(one.shape).numel() for one in model.weights.values()) * torch.float32.itemsize
    free = psutil.virtual_memory().available
    if needed + ROOM_BESIDE <= free:
        return None
    return (
        f"logits are not compared: both models take {needed / 1e9:,.0f} GB in FP32, and {free / 1e9:,.0f} GB of memory "
        f"are free; tensors are, and the same command on a machine with more memory compares logits too"
    )


def moshi_difference(native: SpeechTextModel, path: Path, config: Config) -> float:
    """From the logits that Kyutai's runtime computes of a folder."""
    from megaspeech.streaming.agreement import largest_difference
    from megaspeech.streaming.runtime import load_runtime

    return largest_difference(native, load_runtime(path), streams=config.streams)
