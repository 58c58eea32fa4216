"""What a preparation will make and cost, reckoned before it is done."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("soundfile")
pytest.importorskip("nvidia.dali")
pytest.importorskip("faiss")

from small_corpus import line, make_codec, make_project, make_tokenizer, prepare, record, shown  # noqa: E402

from megaspeech.config import read_config  # noqa: E402
from megaspeech.preparation.estimate import estimate, estimate_planned, estimate_table  # noqa: E402
from megaspeech.preparation.sources import list_units  # noqa: E402
from megaspeech.preparation.units import Totals  # noqa: E402


def test_an_estimate_holds(tmp_path: Path) -> None:
    """Units, samples and shards exactly; hours and bytes nearly, where manifests name durations."""
    seconds = [0.6 + 0.1 * (index % 9) for index in range(30)]
    lines = [line(record(tmp_path, f"{i}", seconds=s).name, seconds=s) for i, s in enumerate(seconds)]
    config = make_project(tmp_path, "preparation.lines_per_shard=8", a=lines, b=[*lines[:5], "{", line("0.wav")])
    units = list_units(config.sources, lines_per_shard=8)
    guessed = estimate(config, units, frame_rate=12.5)
    preparation, _ = prepare(config, codec=make_codec(), tokenizer=make_tokenizer())
    for one, source in zip(guessed, ("a", "b"), strict=True):
        mine = [unit for unit in units if unit.source.name == source]
        done: Totals = preparation.store.sum(mine)
        assert (one.num_units, one.num_samples) == (len(mine), done.samples.total())
        files = list((tmp_path / f"shards/train/{source}/asr-en").glob("0*.*"))
        assert one.num_shards == len(files) / 4
        if source == "a":
            assert one.hours == pytest.approx(done.seconds / 3600, rel=0.02)
            size = sum(path.stat().st_size for path in files if path.suffix != ".json")
            assert one.num_bytes == pytest.approx(size, rel=0.1)
    assert guessed[1].num_unknown == 1 and guessed[1].num_refused == 1
    told = shown(estimate_table(guessed))
    assert "1 samples name no duration" in told and "1 lines are faulty" in told


def test_many_units_are_estimated_from_some(tmp_path: Path) -> None:
    lines = [line("absent.wav", seconds=0.5) for _ in range(100)]
    config = make_project(tmp_path, "preparation.lines_per_shard=1", a=lines)
    (guessed,) = estimate(config, list_units(config.sources, lines_per_shard=1), frame_rate=12.5)
    assert (guessed.num_units, guessed.num_read, guessed.num_samples) == (100, 20, 100)
    assert guessed.num_shards == 100
    assert "from 20 units of each source" in shown(estimate_table([guessed]))


def test_a_source_without_manifests_is_reckoned_by_its_hours(tmp_path: Path) -> None:
    """A million hours of the reference run: 33 streams at 12.5 frames a second, two bytes a token."""
    config = read_config(Path(__file__).parents[2] / "examples" / "reference" / "config.toml")
    planned = [estimate_planned(config, source, frame_rate=12.5) for source in config.sources]
    assert sum(one.hours for one in planned) == 1e6
    codes = 1e6 * 3600 * 12.5 * 33 * 2
    assert codes < sum(one.num_bytes for one in planned) < 1.06 * codes
    assert sum(one.num_units for one in planned) == 1e6 * 360 / 20_000
    assert "1,000,000" in (table := shown(estimate_table(planned, encode_rate=500))) and "2,000" in table
    with pytest.raises(ValueError, match="sources.ja-mined.train: names nothing"):
        list_units(config.sources, lines_per_shard=8)
