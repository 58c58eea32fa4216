"""A wrapped model on one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from one_rank import make_config, one_rank  # noqa: F401
from spec_agreement import build

from megaspeech.parallel import wrap

pytestmark = pytest.mark.usefixtures("one_rank")


def test_gathered_fp8_weights_are_transposed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TransformerEngine multiplies gradients by a transposed copy of a weight, which a gathering leaves as it was."""
    overrides = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
    wrapped = build(make_config(tmp_path, *overrides))
    (model,), transposed = wrapped.models, []
    in_fp8 = {id(layer.self_attention.linear_qkv.weight) for layer in model.temporal.block.layers}
    monkeypatch.setattr(wrap, "is_float8tensor", lambda parameter: id(parameter) in in_fp8)
    monkeypatch.setattr(wrap, "post_all_gather_processing", transposed.extend)
    wrapped.gather_parameters()
    assert {id(parameter) for parameter in transposed} == in_fp8
    assert all(isinstance(parameter, torch.nn.Parameter) for parameter in transposed)
    wrapped.release()
