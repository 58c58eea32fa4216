"""The Triton kernels train the model that the reference kernels train, in their interpreter, under layouts too.

What differs by layout is what the kernels are given: rows of a sharded table (tensor parallel), some frames (context
parallel), no main gradient (FSDP). The interpreter is slow, so steps are of two samples of eight frames.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launching import environment

from megaspeech.training.layouts import Plan

TOOL = Path(__file__).resolve().parents[2] / "tools" / "check_layouts.py"
SMALL = "kernels=triton,training.global_batch_size=2,data.length_multiple=8"
LAYOUTS = [
    f"{SMALL},tp=2,sp=1",
    f"{SMALL},cp=2",
    f"{SMALL},dp=2,micro=1,data=fsdp2,model.embedding_gradient=atomic",
    f"{SMALL},recipe=bf16",
]
TIMEOUT = 3000  # seconds, for all of them


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What the tool found, by layout."""
    figures = tmp_path_factory.mktemp("kernels") / "figures.json"
    command = [sys.executable, str(TOOL), "--layouts", ";".join(LAYOUTS), "--frames", "8", "--json", str(figures)]
    subprocess.run(command, env=environment() | {"TRITON_INTERPRET": "1"}, timeout=TIMEOUT)
    return {verdict["plan"]: verdict for verdict in json.loads(figures.read_text())}


@pytest.mark.parametrize("text", LAYOUTS)
def test_losses_are_the_reference_kernels(text: str, verdicts: dict[str, dict]) -> None:
    verdict = verdicts[Plan.parse(text).name]
    assert not verdict["fault"], verdict["fault"]
    assert verdict["loss"] <= verdict["band"] and verdict["grad_norm"] <= verdict["band"]
