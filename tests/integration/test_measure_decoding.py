"""tools/measure_decoding.py in small: every format by every decoder that is here, and decoders that are not or err."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from launching import environment

from megaspeech.benchmarks.decoders import PROVIDERS, Decode, Provider
from megaspeech.benchmarks.decoding import FORMATS, SOURCES, measure_decoding

for package in ("nvidia.dali", "soundfile", "soxr", "espeakng_loader"):
    pytest.importorskip(package)

TOOL = Path(__file__).parents[2] / "tools" / "measure_decoding.py"
HOURS = 0.06


def test_every_format_by_every_decoder(tmp_path: Path) -> None:
    command = [TOOL, "--hours", HOURS, "--rounds", 1, "--json", tmp_path / "decoding.json", "--note", "A test."]
    finished = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment(), timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    values = json.loads((tmp_path / "decoding.json").read_text())
    rows = values["rows"]
    assert len(rows) == len(FORMATS) * len(SOURCES) * len(PROVIDERS)
    for row in rows:
        if row["provider"] in ("ours", "soundfile + soxr"):
            assert not row["fault"], row
        if row["fault"]:
            assert row["fault"].startswith(("not installed: ", "does not load: ")), row
        else:  # a CPU-second decodes some 100 to 4,000 s
            assert 0.005 < row["to_codes"][0] < 3 and 0.005 < row["to_waveform"][0] < 10, row
    whole = values["end_to_end"]
    assert HOURS < whole["hours"] < 2 * HOURS and 0.001 < whole["per_cpu_second"] < 3
    assert 0 <= whole["share_waited"] <= 1 and whole["num_windows"] >= 1
    text = (tmp_path / "decoding.md").read_text()
    assert "| Ogg Vorbis, 48 kHz stereo | 0." in text and "A test." in text


def test_who_cannot_is_a_row_with_the_reason(tmp_path: Path) -> None:
    def missing() -> Decode:
        import no_such_decoder

        return no_such_decoder

    def refusing() -> Decode:
        def decode(paths: Sequence[Path], sample_rate: int) -> Iterator[np.ndarray]:
            if paths[0].suffix == ".opus":
                raise RuntimeError("no Opus\nhere")
            return PROVIDERS[0].load()(paths, sample_rate)

        return decode

    def altering(change) -> Decode:
        return lambda paths, sample_rate: map(change, PROVIDERS[0].load()(paths, sample_rate))

    loaders = {
        "missing": missing,
        "refusing": refusing,
        "shorter": lambda: altering(lambda waveform_N: waveform_N[:-4000]),
        "louder": lambda: altering(lambda waveform_N: 1.2 * waveform_N),
    }
    providers = [Provider(name, "", load) for name, load in loaders.items()]
    figures = measure_decoding(tmp_path, hours=HOURS, num_rounds=1, say=lambda _: None, providers=providers)
    faults = {(row.format, row.source, row.provider): row.fault for row in figures.rows}
    for format in FORMATS:
        place = (format, "16 kHz mono")
        assert faults[(*place, "missing")] == "not installed: No module named 'no_such_decoder'"
        assert faults[(*place, "refusing")] == ("cannot read it: no Opus" if format == "Opus" else "")
        assert faults[(*place, "shorter")].startswith("wrong: ") and faults[(*place, "louder")].startswith("wrong: ")
    assert all(bool(row.to_waveform) == bool(row.to_codes) == (not row.fault) for row in figures.rows)


def test_too_few_hours(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hours: 0.01 is too little to fit a codec on; give at least 0.06"):
        measure_decoding(tmp_path, hours=0.01, num_rounds=1, say=lambda _: None)
