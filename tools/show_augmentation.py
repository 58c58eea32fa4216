"""Hear and see what `[augmentation]` does, effect by effect, before a corpus is prepared with it.

    python tools/show_augmentation.py CONFIG.toml AUDIO_FOLDER --output DIR [augmentation.noise_files=FOLDER ...]

The first recording of the folder is altered by each effect alone, with the config's ranges and files, whatever its
chance; the others are heard behind it. DIR gets a WAV of each, and augmentation.png. Noise is left out where
`noise_files` names none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np

from megaspeech.config import read_config
from megaspeech.config.preparation import EFFECTS, AugmentationSection
from megaspeech.data.tasks import Task
from megaspeech.preparation.augmentation import Augmenter, others_of
from megaspeech.preparation.decode import Rejection, decode_files
from megaspeech.preparation.effects import alter
from megaspeech.preparation.recording import Plan, Recording
from megaspeech.preparation.sounds import find_sounds
from megaspeech.preparation.utterance import Utterance

RATE = 24000
MOST_FILES = 30


def main() -> int:
    """Run; 0 where it could."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("audio", help="a folder of two recordings or more")
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_intermixed_args()
    try:
        config = read_config(arguments.config, arguments.overrides)
        altered = dict(_altered(arguments.audio, settings=config.augmentation, seed=config.run.seed))
        _write(altered, arguments.output)
    except (ValueError, ImportError) as error:
        print(f"show_augmentation: {error}", file=sys.stderr)
        return 1
    print(arguments.output / "augmentation.png")
    return 0


def _altered(folder: str, *, settings: AugmentationSection, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """(what was done, waveform) of the first recording: as it is, then by each effect."""
    recordings = find_sounds(folder, key="AUDIO_FOLDER")[:MOST_FILES]
    unit = [Utterance(Task("asr", "en", "en"), text="", words=(), heard=one) for one in recordings]
    clean = _decoded(recordings[:1])
    if recordings[0] not in clean:
        raise ValueError(f"AUDIO_FOLDER: {recordings[0].path} cannot be decoded; put another first")
    yield "clean", clean[recordings[0]]
    for effect in EFFECTS:
        if effect == "noise" and not settings.noise_files:
            continue
        alone = settings.model_copy(update={**dict.fromkeys(EFFECTS, 0.0), effect: 1.0, "share": 1.0, "copies": 0})
        (version,) = Augmenter(alone, seed=seed, utterances=unit).versions(unit[0])
        if version.heard.plan is not None:
            background = _decoded(others_of([version.heard]))
            plan = version.heard.plan
            yield _title(plan), alter(clean[recordings[0]], plan, sample_rate=RATE, background=background)


def _title(plan: Plan) -> str:
    """The one thing that a plan does, and how much of it."""
    (effect,) = plan.effects
    amount = {"speed": f" x {plan.speed:g}", "level": f" {plan.level_db:+.0f} dB"}.get(effect, "")
    if effect == "room" and not isinstance(plan.room, Recording):
        amount = f", {plan.room.reverberation:.1f} s"
    return effect + amount + "".join(f", {layer.snr:.0f} dB" for layer in plan.layers)


def _decoded(recordings: list[Recording]) -> dict[Recording, np.ndarray]:
    """Waveforms of those that can be decoded."""
    waveforms = {}
    for index, result in decode_files([one.path for one in recordings], sample_rate=RATE):
        if not isinstance(result, Rejection):
            one = recordings[index]
            last = None if one.end is None else round(one.end * RATE)
            waveforms[one] = result[round(one.start * RATE) : last]
    return waveforms


def _write(waveforms: dict[str, np.ndarray], folder: Path) -> None:
    """WAVs, and the spectrograms of all up to 8 kHz on one scale of loudness."""
    import soundfile

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    rows = -(-len(waveforms) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(10, 1.7 * rows), sharex=True, sharey=True, layout="constrained")
    for axis in axes.flat[len(waveforms) :]:
        axis.axis("off")
    for axis, (title, waveform) in zip(axes.flat, waveforms.items(), strict=False):
        soundfile.write(folder / f"{title.split()[0].strip(',')}.wav", waveform, RATE, subtype="PCM_16")
        dither = np.random.default_rng(0).normal(0, 1e-6, len(waveform))  # exact silence has no logarithm
        axis.specgram(waveform + dither, NFFT=512, Fs=RATE, noverlap=256, vmin=-120, vmax=-40, cmap="magma")
        axis.set(title=title, ylim=(0, 8000), yticks=[0, 4000, 8000], yticklabels=["0", "4", "8 kHz"])
    for axis in axes[-1]:
        axis.set_xlabel("s")
    figure.savefig(folder / "augmentation.png", dpi=72)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
