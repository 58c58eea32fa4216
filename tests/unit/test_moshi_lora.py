"""Low-rank changes as moshi-finetune saves them, folded into the model they change."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from moshi_folders import TINY, make, native, packed, save
from one_rank import one_rank  # noqa: F401
from safetensors.torch import save_file
from torch import Tensor

from megaspeech.conversion.moshi import open_moshi
from megaspeech.streaming.agreement import largest_difference

pytestmark = [
    pytest.mark.usefixtures("one_rank"),
    pytest.mark.skipif(find_spec("moshi") is None, reason="moshi is not installed"),
]
TOLERANCE = 1e-5
VARIANTS: dict[str, dict[str, Any]] = {
    "duplex": {},
    "a schedule": {"depformer_weights_per_step_schedule": [0, 1, 2, 2]},
    "shared by all": {"depformer_multi_linear": False, "depformer_weights_per_step": False},
}


@pytest.mark.parametrize("naming", ["split", "packed"])
@pytest.mark.parametrize("name", VARIANTS)
def test_low_rank_changes_are_folded_in_as_moshi_does(name: str, naming: str, tmp_path: Path) -> None:
    values = TINY | VARIANTS[name]
    lm, scaling = make(values), 1.5
    base = save(tmp_path / "base", values, packed(lm.state_dict()))
    from moshi.modules.lora import replace_all_linear_with_lora, replace_lora_with_linear

    replace_all_linear_with_lora(lm, 3, scaling)
    changes = {key: tensor for key, tensor in lm.state_dict().items() if "lora" in key}
    changes["emb.1.weight"] = torch.randn(17, 32)  # moshi-finetune's `ft_embed`
    lm.emb[1].weight.data.copy_(changes["emb.1.weight"])
    if naming == "packed":  # of files made before moshi had projections by step
        changes = packed_lora(changes)
    tuned = save(tmp_path / "tuned", values | {"lora": True, "lora_rank": 3, "lora_scaling": scaling}, {})
    save_file(changes, tuned / "lora.safetensors")
    opened = open_moshi(base, lora=tuned / "lora.safetensors")
    assert "folded in, scaled by 1.5" in opened.notes[0]
    replace_lora_with_linear(lm)
    assert largest_difference(native(opened), lm.eval(), streams=opened.config.streams) < TOLERANCE


def packed_lora(changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {}
    for name, tensor in changes.items():
        found.setdefault(re.sub(r"_projs\.\d+", "_proj", name), []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in found.items()}


@pytest.mark.parametrize(
    "broken, words",
    [
        (
            lambda x: x.pop("linears.0.lora_B.weight"),
            "linears.0.lora_B.weight is missing beside linears.0.lora_A",
        ),
        (
            lambda x: x.pop("linears.0.lora_A.weight"),
            "linears.0.lora_A.weight is missing beside linears.0.lora_B",
        ),
        (lambda x: x.update({"x.lora_A.weight": torch.ones(2, 2)}), "changes x.weight, which the model does not have"),
        (lambda x: x.update({"linears.0.lora_A.weight": torch.ones(2, 3)}), "not of rank 2 for the model's"),
        (
            lambda x: x.update({"emb.0.weight": torch.ones(3, 3)}),
            r"emb.0.weight \[3, 3\] is not of the model's",
        ),
    ],
)
def test_low_rank_changes_that_do_not_fit_are_named(broken: Any, words: str, tmp_path: Path) -> None:
    base = save(tmp_path / "base", TINY, make(TINY).state_dict())
    changes = {"linears.0.lora_A.weight": torch.ones(2, 16), "linears.0.lora_B.weight": torch.ones(16, 2)}
    broken(changes)
    save_file(changes, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=f"model.safetensors: tensors? .*{words}"):
        open_moshi(base, lora=tmp_path / "lora.safetensors")


def test_low_rank_changes_are_asked_for_where_there_are_none(tmp_path: Path) -> None:
    folder = save(tmp_path / "base", TINY | {"lora": True, "lora_rank": 3}, make(TINY).state_dict())
    with pytest.raises(ValueError, match="lora = true and names no file of it; give it by --lora"):
        open_moshi(folder)
