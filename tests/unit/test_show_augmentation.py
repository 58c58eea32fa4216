"""tools/show_augmentation.py: a picture and a WAV of each effect, as the config has them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("nvidia.dali")
pytest.importorskip("pyroomacoustics")
ROOT = Path(__file__).parents[2]


def test_every_effect_is_heard_and_seen(tmp_path):
    for number in range(3):
        (tmp_path / "audio").mkdir(exist_ok=True)
        samples = np.random.default_rng(number).normal(0, 0.1, 16000)
        soundfile.write(tmp_path / "audio" / f"{number}.flac", samples, 16000)
    config, out = ROOT / "examples/quickstart/config.toml", tmp_path / "shown"
    command = [sys.executable, ROOT / "tools/show_augmentation.py", config, tmp_path / "audio", "--output", out]
    command += [f"augmentation.noise_files={tmp_path / 'audio'}", "augmentation.speed_factor=[1.25,1.25]"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {"clean", "speed", "room", "talker", "babble", "noise", "telephone", "level"}
    assert {path.stem for path in out.glob("*.wav")} == names
    assert (out / "augmentation.png").stat().st_size > 10_000
    waveforms = {name: soundfile.read(out / f"{name}.wav")[0] for name in names}
    lengths = {name: len(waveform) for name, waveform in waveforms.items()}
    assert lengths == {**dict.fromkeys(names, 24000), "speed": 19200}
    for name in names - {"clean", "speed"}:
        assert not np.allclose(waveforms[name], waveforms["clean"], atol=1e-3), name
