"""What the parties of one sample say, as files and through the loudspeakers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megaspeech.preparation.inspection import Inspected


def write_waves(sample: Inspected, prefix: str | Path) -> list[Path]:
    """Write `PREFIX_heard.wav` and `PREFIX_said.wav`, those there are, on one clock; returns their paths."""
    try:
        import soundfile
    except ImportError as error:
        raise ImportError(f"writing sound needs soundfile ({error}): pip install megaspeech[data]") from None
    paths = []
    for name, party in sample.parties.items():
        paths.append(Path(f"{prefix}_{name}.wav"))
        soundfile.write(paths[-1], party.waveform, sample.sample_rate, subtype="PCM_16")
    return paths


def play(sample: Inspected) -> None:
    """Play the sample to its end; of two parties the model is left, as in moshi's files, the heard one right."""
    if not sample.parties:
        raise ValueError(f"a sample of {sample.task.key} has no sound")
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # OSError: the package is there, PortAudio is not
        raise ImportError(
            f"playing needs sounddevice and PortAudio ({error}): pip install sounddevice; or listen to --output's files"
        ) from None
    waveforms = [party.waveform for party in reversed(sample.parties.values())]
    sounddevice.play(np.stack(waveforms, axis=1), sample.sample_rate, blocking=True)
