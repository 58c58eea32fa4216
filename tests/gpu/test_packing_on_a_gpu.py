"""TransformerEngine's attention on packed rows: no sample sees another, delays and a window included.

Skipped where there is no GPU; `make gpu` runs it. tests/unit/test_packing.py asks the same of the local layers.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from one_rank import make_config, one_rank  # noqa: F401
from spec_agreement import build, draw_batch, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.usefixtures("one_rank"),
]

WIDE = ("model.preset=moshi-7b", "temporal.num_layers=2", "depth.num_layers=1", "streams.text_cardinality=4096")
BOUNDS = (0, 200, 201, 336, 512)


@pytest.mark.parametrize("window", [3000, 64])
@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_a_packed_row_is_its_samples(impl: str, window: int, tmp_path: Path) -> None:
    own = ("precision.recipe=bf16", f"model.transformer_impl={impl}", f"temporal.context={window}")
    config = make_config(tmp_path, *WIDE, *own, "data.num_frames=512")
    model = build(config)
    codes, _, _ = draw_batch(config, samples=1, frames=BOUNDS[-1], device=model.device)
    (chunk,) = model.chunks
    bounds = torch.tensor(BOUNDS, dtype=torch.int32, device=model.device)
    with torch.no_grad():
        text, audio = chunk(codes, bounds_D=bounds)
        for first, end in zip(BOUNDS, BOUNDS[1:], strict=False):
            alone_text, alone_audio = chunk(codes[..., first:end].contiguous())
            assert relative_error(text[:, first:end], alone_text) < 2**-6
            assert relative_error(audio[:, :, first:end], alone_audio) < 2**-6
        assert relative_error(chunk(codes)[0][:, BOUNDS[1] :], text[:, BOUNDS[1] :]) > 2**-5
    model.release()
