"""tools/measure_loading.py, on a small set: the simulated shards are shards, and the figures are written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from launching import environment

from megaspeech.data.shard_set import ShardSet

TOOL = Path(__file__).parents[2] / "tools" / "measure_loading.py"


def test_figures_of_a_hundred_hours(tmp_path: Path) -> None:
    command = [TOOL, "--directory", tmp_path / "set", "--hours", 100, "--samples-per-shard", 4000, "--draws", 400]
    command += ["--steps", 1, "--json", tmp_path / "loading.json"]
    finished = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment(), timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    values = json.loads((tmp_path / "loading.json").read_text())
    index, loader = values["index"], values["loader"]
    assert 90 < index["hours"] < 110 and index["num_shards"] == 8 and len(index["resident_bytes"]) == 5
    assert [one["dp_size"] for one in loader] == [1, 64] and all(0 < one["padding"] < 0.05 for one in loader)
    assert all(one["alone"] > 1000 and one["worker"] > 1000 and one["eaten"] > 5000 for one in loader)
    assert "the model eats" in (tmp_path / "loading.md").read_text()

    shards = ShardSet(tmp_path / "set" / "train" / "simulated")
    codes = shards[31_999]  # checksum and all
    lengths = shards.lengths(np.arange(31_999, 0, -40))
    assert codes.shape == (33, lengths[0]) and not codes.any()
    assert lengths.min() >= 13 and lengths.max() <= 500 and len(set(lengths.tolist())) > 50
