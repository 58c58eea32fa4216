"""The Triton kernels train the model that the reference kernels train, in their interpreter, under layouts too.

What differs by layout is what the kernels are given: rows of a sharded table (tensor parallel), some frames (context
parallel), no main gradient (FSDP). The interpreter is slow, so steps are of two samples of eight frames.
"""

from __future__ import annotations

import pytest
from launching import check_layouts

from megaspeech.training.layouts import Plan

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
    options = {"figures": tmp_path_factory.mktemp("kernels") / "figures.json", "timeout": TIMEOUT}
    return check_layouts(LAYOUTS, "--frames", "8", variables={"TRITON_INTERPRET": "1"}, **options)


@pytest.mark.parametrize("text", LAYOUTS)
def test_losses_are_the_reference_kernels(text: str, verdicts: dict[str, dict]) -> None:
    verdict = verdicts[Plan.parse(text).name]
    assert not verdict["fault"], verdict["fault"]
    assert verdict["loss"] <= verdict["band"] and verdict["grad_norm"] <= verdict["band"]
