"""Every layout trains the same model: losses by stream and gradient norms of 20 steps from one seed checkpoint, and
of 40 where a run changes its layout on the way.

Run as a user runs them, by `tools/check_layouts.py`, on CPU ranks over gloo: FP32 within 1e-5 of one rank, BF16 within
its band. Layouts of as many ranks share their processes, because importing megatron-core takes seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from launching import LAYOUT_TOOL, check_layouts, environment

from megaspeech.training.layouts import BANDS, Plan

TIMEOUT = 3600  # seconds, for all of them; they took 25 minutes on two cores


def _products() -> list[str]:
    """Every product of tensor, pipeline, context and data parallelism that 2 and 4 ranks hold, with and without what
    rides on them."""
    found = []
    for sizes in product((1, 2, 4), repeat=4):
        tp, pp, cp, dp = sizes
        if tp * pp * cp * dp not in (2, 4):
            continue
        base = [f"{name}={size}" for name, size in zip(("tp", "pp", "cp", "dp"), sizes, strict=True) if size > 1]
        sequence = [[]] if tp == 1 else [[], ["sp=1"]]
        # Four interleaved stages of two chunks need eight layers.
        interleaved = [[]] if pp == 1 else [[], ["vp=2"] + ["temporal.num_layers=8"] * (pp == 4)]
        state = [[], ["data=fsdp2"]] + [["zero=0"]] * (dp * cp > 1)
        found += [",".join([*base, *s, *v, *d]) for s, v, d in product(sequence, interleaved, state)]
    return found


TEXT_MODEL = "temporal.add_qkv_bias=true,temporal.qk_layernorm=true,temporal.kv_channels=24"
OTHERS = [
    # uneven and drawn pipelines
    "pp=2,last=1,first=3",
    "pp=4,last=1",
    "pp=2,layout=Ett|ttL",
    "pp=2,layout=E|t|tt|tL",
    "pp=4,layout=Et|t|tt|L",
    # gradient accumulation, frames that do not divide
    "micro=1",
    "micro=8,tp=2",
    "tp=2,data.length_multiple=1",
    "tp=4,data.length_multiple=1,pp=1",
    "tp=2,sp=1,data.length_multiple=1",
    "tp=2,cp=2,sp=1,data.length_multiple=1",
    # samples packed into rows, none of which sees another
    "pack=1,row=48,micro=1",
    "pack=1,row=64,micro=1,tp=2,sp=1,pp=2",
    "pack=1,row=48,micro=1,pp=2,vp=2",
    "pack=1,row=48,micro=1,dp=2,data=fsdp2,recompute=full",
    # gradients reduced during the backward pass of the last microbatch
    "dp=2,overlap=1,micro=1",
    "dp=2,overlap=1,zero=0,micro=1",
    "pp=2,vp=2,dp=2,overlap=1,micro=1",
    "dp=2,overlap=1,gather=1,micro=1",
    # recomputation
    "recompute=selective",
    "tp=2,sp=1,recompute=selective,parallel.recompute_modules=['layernorm']",
    "tp=2,pp=2,sp=1,recompute=full",
    "pp=2,vp=2,recompute=full,parallel.recompute_method=block",
    "dp=2,data=fsdp2,recompute=full",
    # no GQA, no window
    "tp=4,temporal.num_query_groups=4",
    "tp=2,cp=2,temporal.context=3000",
    # what text models have: biases, norms of queries and keys, heads of their own width
    f"tp=2,{TEXT_MODEL}",
    f"tp=4,sp=1,{TEXT_MODEL}",
    f"pp=2,dp=2,data=fsdp2,{TEXT_MODEL}",
    # experts
    "model.preset=tiny-moe,ep=2,dp=2",
    "model.preset=tiny-moe,ep=4,dp=4",
    "model.preset=tiny-moe,ep=2,dp=2,zero=0",
    "model.preset=tiny-moe,ep=2,dp=2,temporal.moe_token_dispatcher_type=allgather",
    "model.preset=tiny-moe,tp=2,sp=1",
    "model.preset=tiny-moe,tp=2,sp=1,ep=2,pp=2",
    "model.preset=tiny-moe,tp=2,sp=1,etp=2",
    "model.preset=tiny-moe,cp=2,ep=2",
    "model.preset=tiny-moe,pp=2,vp=2",
    "model.preset=tiny-moe,pp=2,dp=2,ep=2,recompute=full",
    "model.preset=tiny-moe,dp=2,data=fsdp2",
    # BF16 parameters, FP32 main gradients
    "recipe=bf16,tp=2,sp=1",
    "recipe=bf16,pp=2,vp=2",
    "recipe=bf16,cp=2",
    "recipe=bf16,dp=2",
    "recipe=bf16,dp=2,zero=0",
    "recipe=bf16,dp=2,data=fsdp2",
    "recipe=bf16,tp=2,pp=2,sp=1",
    "recipe=bf16,tp=2,dp=2,data=fsdp2",
    "recipe=bf16,tp=2,dp=2 > recipe=bf16,dp=4,data=fsdp2 > recipe=bf16,dp=4,zero=0",
]
# One run that goes on from its checkpoint, optimizer and all, on another layout: 20 steps before, and 20 after.
RESHARDED = [
    "tp=2,pp=2,sp=1 > dp=4",
    "dp=4,overlap=1,gather=1,micro=1 > tp=4,sp=1 > pp=4",
    "dp=4,data=fsdp2 > tp=2,pp=2,sp=1",
    "tp=2,pp=2,sp=1 > tp=2,dp=2,data=fsdp2",
    "dp=2,cp=2,zero=0 > dp=4 > dp=4,data=fsdp2 > dp=4,zero=0",
    "pack=1,row=48,micro=1,dp=2 > pack=1,row=64,micro=1,tp=2,sp=1 > dp=2",
    "pp=2,vp=2,dp=2 > pp=2,dp=2,last=1 > cp=2,tp=2",
    f"tp=2,dp=2,data=fsdp2,{TEXT_MODEL} > dp=4,data=fsdp2,{TEXT_MODEL} > tp=4,{TEXT_MODEL}",
    "model.preset=tiny-moe,ep=4,dp=4 > model.preset=tiny-moe,tp=2,sp=1,pp=2 > model.preset=tiny-moe,dp=4,data=fsdp2",
]
STEPS = {text: 20 for text in (*_products(), *OTHERS)} | {text: 40 for text in RESHARDED}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What the tool found, by layout."""
    found = {}
    for steps in sorted(set(STEPS.values())):
        figures = tmp_path_factory.mktemp("layouts") / "figures.json"
        layouts = [text for text, count in STEPS.items() if count == steps]
        found |= check_layouts(layouts, "--steps", str(steps), figures=figures, timeout=TIMEOUT)
    return found


@pytest.mark.parametrize("text", STEPS)
def test_layout_equals_one_rank(text: str, verdicts: dict[str, dict]) -> None:
    verdict = verdicts[Plan.parse(text).name]
    assert not verdict["fault"], verdict["fault"]
    assert verdict["band"] == (BANDS["bf16"] if "bf16" in text else BANDS["fp32"])
    assert verdict["loss"] <= verdict["band"] and verdict["grad_norm"] <= verdict["band"]
    assert verdict["frames_per_second"] > 0


def test_inside_a_launch_and_out_of_its_band(tmp_path: Path) -> None:
    """As on a cluster, where the launch is there already; one layout needs more ranks, one changes what is trained."""
    figures = tmp_path / "figures.json"
    layouts = "pp=2; dp=2; tp=4; dp=2,optimizer.lr=1e-3 > dp=2"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(LAYOUT_TOOL)]
    options = ["--layouts", layouts, "--directory", str(tmp_path / "shared"), "--json", str(figures), "--steps", "10"]
    finished = subprocess.run([*launch, *options], env=environment(), capture_output=True, text=True, timeout=TIMEOUT)
    assert finished.returncode == 1
    good, also_good, impossible, other = json.loads(figures.read_text())
    assert max(good["loss"], good["grad_norm"], also_good["loss"], also_good["grad_norm"]) < BANDS["fp32"]
    assert "tensor 4 x pipeline 1 = 4 ranks does not divide the 2" in impossible["fault"]
    # Half-way the learning rate is another than the reference's: a breach.
    assert not other["fault"] and other["loss"] > BANDS["fp32"]
    assert "NO" in finished.stdout and impossible["fault"] in finished.stdout


def test_what_is_not_understood() -> None:
    command = [sys.executable, str(LAYOUT_TOOL), "--layouts", "tp=2; speed=9"]
    finished = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=TIMEOUT)
    assert finished.returncode == 1 and "Traceback" not in finished.stderr
    assert "layout 'speed=9': 'speed=9' is not understood" in finished.stderr
