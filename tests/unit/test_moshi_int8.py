"""Matrices in eight bits: how far off they are, read back, and run by the real runtime where bitsandbytes is."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from moshi_folders import TINY, make, native, packed, save, stored
from one_rank import one_rank  # noqa: F401
from safetensors.torch import save_file
from torch import Tensor

from megaspeech.conversion.convert import Conversion, convert
from megaspeech.conversion.moshi import moshi_files, open_moshi
from megaspeech.conversion.stored import StoredModel
from megaspeech.conversion.verify import rounded_tensors_agree
from megaspeech.streaming.agreement import largest_difference
from megaspeech.streaming.runtime import load_runtime

pytestmark = [
    pytest.mark.usefixtures("one_rank"),
    pytest.mark.skipif(find_spec("moshi") is None, reason="moshi is not installed"),
]


def write(model: StoredModel, folder: Path) -> Path:
    """In eight bits."""
    files = moshi_files(model, int8=True)
    folder.mkdir()
    save_file({name: one.read().contiguous() for name, one in files.weights.items()}, folder / "model.safetensors")
    for name, content in files.small_files.items():
        (folder / name).write_bytes(content)
    return folder


def test_matrices_are_off_by_half_a_step_and_nothing_else_is(tmp_path: Path) -> None:
    exact = open_moshi(save(tmp_path / "exact", TINY, packed(make(TINY).state_dict())))
    files = moshi_files(exact, int8=True)
    kept = {name.split(".")[0] for name, one in files.weights.items() if one.dtype is not torch.int8}
    assert kept - {name.split(".")[0] for name in files.weights if name.endswith("_scb")} == {
        *("emb", "text_emb", "depformer_emb", "depformer_text_emb", "out_norm")
    }
    opened = open_moshi(write(exact, tmp_path / "int8"))
    for name, one in opened.weights.items():
        before, after = exact.weights[name].read(), one.read()
        if "norm" in name or "embedding" in name:
            assert torch.equal(after, before)
        else:
            assert 0 < (after - before).abs().max() <= 0.5001 * before.abs().max() / 127
    assert opened.notes == ("matrices were in eight bits; what that lost is not in them any more",)


def test_a_row_of_zeros_stays(tmp_path: Path) -> None:
    model = open_moshi(save(tmp_path / "exact", TINY, packed(make(TINY).state_dict())))
    state: dict[str, Tensor] = {name: one.read().clone() for name, one in model.weights.items()}
    state["text_head.weight"][3] = 0
    opened = open_moshi(write(stored(state, config=model.config), tmp_path / "int8"))
    assert opened.weights["text_head.weight"].read()[3].eq(0).all()


def test_the_runtime_takes_no_other_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(open_moshi(save(tmp_path / "exact", TINY, make(TINY).state_dict())), tmp_path / "int8")
    with pytest.raises(ValueError, match="int8: matrices in eight bits, which moshi runs in FP32 alone: give"):
        load_runtime(folder, dtype=torch.bfloat16)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match='Install it with `pip install "bitsandbytes'):
        load_runtime(folder)


def test_the_runtime_takes_it(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = write(open_moshi(save(tmp_path / "exact", TINY, make(TINY).state_dict())), tmp_path / "int8")
    opened = open_moshi(folder)
    # What moshi multiplies by them is rounded to eight bits too, and to FP16.
    assert largest_difference(native(opened), load_runtime(folder), streams=opened.config.streams) < 0.2


def test_a_conversion_to_eight_bits_is_verified(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in packed(make(TINY).state_dict()).items()}
    source = save(tmp_path / "exact", TINY, state)
    report = convert(Conversion(source, tmp_path / "int8", "moshi", "moshi", int8=True))
    assert "tensors read back, all within half a step of eight bits" in str(report.agreements[-1])
    assert json.loads((tmp_path / "int8/config.json").read_text())["quantize"] is True
    with pytest.raises(ValueError, match="--int8: is for --to moshi, not for --to native"):
        convert(Conversion(source, tmp_path / "native", "moshi", "native", int8=True))
    opened = open_moshi(source)
    wrong = stored({name: one.read().float() * 1.02 for name, one in opened.weights.items()}, config=opened.config)
    with pytest.raises(ValueError, match="is off by .* more than eight bits explain"):
        rounded_tensors_agree(wrong, open_moshi(tmp_path / "int8"), path=tmp_path)
