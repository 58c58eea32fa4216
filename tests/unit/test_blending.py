"""Shares by samples, by hours and by epochs, tempered; and draws that need no index of the whole run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from one_rank import make_config

from megaspeech.config import Config
from megaspeech.data import blending
from megaspeech.data.blending import Blend, find_sets, shares_of
from megaspeech.data.samples import ShardSamples
from megaspeech.data.shard_set import write_shard_set
from megaspeech.data.synthetic import synthetic_header

SETS = {"ja/asr-ja": (30, 10), "en/asr-en": (10, 20), "en/tts-en": (20, 5)}  # samples, frames of each


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("blend")
    streams = make_config(directory).streams
    for name, (count, frames) in SETS.items():
        samples = [np.zeros((streams.num_streams, frames), dtype=int)] * count
        write_shard_set(directory / "train" / name, samples, header=synthetic_header("asr-en", streams=streams))
    return directory


def config_of(home: Path, *overrides: str) -> Config:
    return make_config(home, f"data.directory={home}", *overrides)


def shares(home: Path, *overrides: str) -> dict[str, float]:
    found = shares_of(config_of(home, *overrides), home / "train")
    assert sum(found.values()) == pytest.approx(1)
    return {name: round(share, 4) for name, share in found.items()}


def test_a_name_is_a_set_or_all_those_below_it(home: Path) -> None:
    assert list(find_sets(home / "train", "en")) == ["en/asr-en", "en/tts-en"]
    assert list(find_sets(home / "train", "en/tts-en")) == ["en/tts-en"]
    with pytest.raises(ValueError, match="there is no set of shards .*train/de"):
        find_sets(home / "train", "de")


def test_shares(home: Path) -> None:
    mixture = "data.mixture={ja = 0.6, en = 0.4}"
    by_samples = shares(home, mixture)
    assert by_samples == {"ja/asr-ja": 0.6, "en/asr-en": 0.1333, "en/tts-en": 0.2667}
    # 60% of the hours: 300 of 500 frames would need 30 and 0.4 * 500 / 10 = 20 samples of the English mean of 10 frames
    by_hours = shares(home, mixture, "data.mixture_by=hours")
    assert by_hours == {"ja/asr-ja": 0.6, "en/asr-en": 0.1333, "en/tts-en": 0.2667}
    frames = {name: share * SETS[name][1] for name, share in by_hours.items()}
    assert frames["ja/asr-ja"] / sum(frames.values()) == pytest.approx(0.6, abs=1e-3)
    assert shares(home, "data.mixture={ja = 1, en = 2}", "data.mixture_by=epochs") == {
        "ja/asr-ja": 0.3333,
        "en/asr-en": 0.2222,
        "en/tts-en": 0.4444,
    }


def test_hours_are_not_samples(home: Path) -> None:
    found = shares(home, 'data.mixture={"en/asr-en" = 1, "en/tts-en" = 1}', "data.mixture_by=hours")
    assert found == {"en/asr-en": 0.2, "en/tts-en": 0.8}  # a fourth of the length, four times as many


def test_temperature_draws_small_sets_more_often(home: Path) -> None:
    mixture = ['data.mixture={"en/asr-en" = 1, "ja" = 9}']
    assert shares(home, *mixture, "data.mixture_temperature=2") == {"en/asr-en": 0.25, "ja/asr-ja": 0.75}
    assert shares(home, *mixture, "data.mixture_temperature=1e9") == {"en/asr-en": 0.5, "ja/asr-ja": 0.5}


def test_without_a_mixture_the_weights_of_the_sources_count(home: Path) -> None:
    path = home / "sources.toml"
    path.write_text(f"""
        [model]
        preset = "tiny"
        [data]
        directory = "{home}"
        [[sources]]
        name = "ja"
        weight = 3
        [[sources]]
        name = "en"
    """)
    from megaspeech.config import read_config

    found = shares_of(read_config(path), home / "train")
    assert found["ja/asr-ja"] == pytest.approx(0.75) and len(found) == 3
    with pytest.raises(ValueError, match="data.mixture: no shards are named"):
        shares_of(config_of(home), home / "train")


def test_draws_beyond_a_period_go_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draw of a set comes once, in order, over many periods; shares hold in each."""
    monkeypatch.setattr(blending, "PERIOD", 100)
    config = config_of(home, "data.mixture={ja = 0.61, en = 0.39}")
    found = shares_of(config, home / "train")
    samples = {name: ShardSamples(home / "train", name=name, config=config) for name in found}
    blend = Blend(samples, shares=found, num_draws=1050)
    draws = list(zip(*map(np.ndarray.tolist, blend(np.arange(1050))), strict=True))
    for number, (name, share) in enumerate(found.items()):
        own = [draw for dataset, draw in draws if dataset == number]
        assert own == list(range(len(own))) and abs(len(own) - 1050 * share) < 11, name
    counts = Counter(dataset for dataset, _ in draws)
    assert blend.draws(1050) == [counts[number] for number in range(len(found))]
    assert blend.draws(0) == [0, 0, 0] and sum(blend.draws(77)) == 77
