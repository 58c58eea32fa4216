"""Models that write text alone, and depth transformers that share weights, train the same on every layout.

Fewer layouts than `test_layouts` has: what these models do otherwise lies within the last stage.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import check_layouts

from megaspeech.training.layouts import BANDS

TIMEOUT = 600  # seconds; they took 100 on two busy cores, with twice as many layouts
MODELS = {
    "text alone": """
[streams]
num_codebooks = 0
delays = [0, 0, 1, 1, 1]
[temporal]
num_extra_heads = 2
""",
    "shared weights": """
[depth]
weights_per_step_schedule = [0, 1, 2, 2]
multi_linear = false
low_rank_embeddings = 8
""",
}
LAYOUT = "tp=2,sp=1 > pp=2"


@pytest.mark.parametrize("name", MODELS)
def test_a_layout_trains_the_same_model(name: str, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'[model]\npreset = "tiny"\n{MODELS[name]}')
    options = (str(config), "--steps", "12")
    (verdict,) = check_layouts([LAYOUT], *options, figures=tmp_path / "figures.json", timeout=TIMEOUT).values()
    assert verdict["fault"] in (None, "") and max(verdict["loss"], verdict["grad_norm"]) <= BANDS["fp32"]
