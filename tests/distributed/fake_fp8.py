"""The real entry point with an FP8 that CPU ranks have: while megatron-core's config says so, the temporal matrices
round what they read to E4M3.

The scale is kept where TransformerEngine's delayed scaling keeps its own; from the step BROKEN_FROM on it is one that
has gone wrong. The layers are megatron-core's local ones, for TransformerEngine's need a GPU.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

BROKEN = 2.0**-12
"""A scale under which all that a layer reads here becomes 0: that of an amax of almost two million."""


def rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`x` as E4M3 holds it with a scale; its gradient is that of `x`."""
    cast = (x.detach().float() * scale).to(torch.float8_e4m3fn).float() / scale
    return x + (cast.to(x.dtype) - x).detach()


def install(broken_from: int) -> None:
    """Put it into the trainer."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from megaspeech.model import temporal
    from megaspeech.training import trainer

    layer_spec, place = temporal.layer_spec, {"step": 0}
    temporal.layer_spec = lambda config: layer_spec(
        config.model_copy(update={"model": config.model.model_copy(update={"transformer_impl": "local"})})
    )
    trainer.require_machine = lambda _: None
    train_step = trainer.Trainer.train_step

    def noted(self: Any, batches: Any) -> Any:
        place["step"] = self.step + 1
        return train_step(self, batches)

    trainer.Trainer.train_step = noted
    build = temporal.TemporalTransformer.__init__

    def built(self: Any, *arguments: Any, **options: Any) -> None:
        build(self, *arguments, **options)
        for module in self.modules():
            if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                module.forward = partial(_in_fp8, module, module.forward, place, broken_from)

    temporal.TemporalTransformer.__init__ = built


def _in_fp8(
    module: Any, forward: Any, place: dict[str, int], broken_from: int, x: torch.Tensor, *rest: Any, **options: Any
) -> Any:
    if module.config.fp8:
        scales = torch.stack([448 / each.detach().abs().amax().float() for each in (x, module.weight)])
        if place["step"] >= broken_from:
            scales[0] = BROKEN
        module.fp8_meta = {"scaling_fwd": SimpleNamespace(scale=scales)}
        x = rounded(x, scales[0])
    return forward(x, *rest, **options)


def main() -> int:
    """Install, and train."""
    from megaspeech.train import main as train

    install(int(os.environ["BROKEN_FROM"]))
    return train(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
