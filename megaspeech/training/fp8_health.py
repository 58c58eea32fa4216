"""How the matrices of the temporal transformer fare in FP8, every so many steps: amax, scale, shares of numbers lost.

Of every linear layer the input, the weight and the gradient of the output are looked at as they go into the cast. A run
without FP8 shows what the cast would do. Mixtures of experts are left out, and layers that a recipe keeps in BF16.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional as F

from megaspeech.config import Config
from megaspeech.parallel.precision import without_scales
from megaspeech.parallel.reductions import max_over_tensor_parallel, over_all_ranks
from megaspeech.training.fp8_arithmetic import OPERANDS, Cast, casts, lost_in_cast, scale_for
from megaspeech.training.journal import Journal

OWNERS = {"linear_qkv": "self_attention", "linear_proj": "self_attention", "linear_fc1": "mlp", "linear_fc2": "mlp"}
"""The matrices of a layer, and the parts of it that hold them, by megatron-core's names."""
MATRICES = tuple(OWNERS)


@dataclass(frozen=True)
class Operand:
    """What was seen of one operand in one step, over all microbatches and ranks.

    `layer` counts from 1 through the whole model. `amax` is the largest magnitude; `scale` what numbers are multiplied
    by before the cast (of blocks the smallest); `underflow` and `overflow` are the shares of the numbers other than 0
    that become 0, or saturate. With delayed scaling `scale` is the one in use, which past steps have set, and
    `scale_wanted` the one that `amax` asks for; None with other recipes, whose scale is always that.
    """

    layer: int
    matrix: str
    name: str
    amax: float
    scale: float
    scale_wanted: float | None
    underflow: float
    overflow: float

    @property
    def lost(self) -> float:
        """Share of the numbers other than 0 that FP8 turns to 0 or saturates."""
        return self.underflow + self.overflow


class Fp8Health:
    """Looks at the steps that `logging.fp8_health_interval` divides; in others nothing is hooked.

    `worst`: on the main rank, in words, the input or weight that lost most in the last of them; empty before.

    Args:
        models: this stage's chunks.
        config: the run.
        journal: is given the figures.
    """

    def __init__(self, models: Sequence[MegatronModule], *, config: Config, journal: Journal) -> None:
        self.interval, self.num_layers = config.logging.fp8_health_interval, config.temporal.num_layers
        self.models, self.journal, self.casts = models, journal, casts(models[0].config)
        self.worst = ""

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the `number`-th step, counted from 1; all ranks enter it."""
        if not self.interval or number % self.interval:
            yield
            return
        device = next(self.models[0].parameters()).device
        tally = Tally(self.num_layers, casts=self.casts, device=device)
        hooks = [
            module.register_forward_hook(partial(tally.forward, place)) for place, module in _matrices(self.models)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        tally.reduce()
        if self.journal.is_main and (operands := tally.operands()):
            worst = max((one for one in operands if one.name != "gradient"), key=lambda one: one.lost)
            place = f"layer {worst.layer} {worst.matrix} {worst.name}"
            self.worst = f"{place}, {100 * worst.lost:.3g}% of its numbers at step {number}"
            self.journal.scalars(
                "fp8", number, curves(operands), record={"operands": [asdict(one) for one in operands]}
            )


class Tally:
    """Figures of a step, summed up on the device.

    Args:
        num_layers: of the whole model.
        casts: by operand.
        device: of the model.
    """

    def __init__(self, num_layers: int, *, casts: Mapping[str, Cast], device: torch.device) -> None:
        self.casts, shape = casts, (num_layers, len(MATRICES), len(OPERANDS))
        self.largest = torch.full((*shape, 2), -1.0, device=device)  # amax, scale in use; -1 for none
        self.counts = torch.zeros(*shape, 3, dtype=torch.int64, device=device)  # see `count_lost`
        self._weighed: set[tuple[int, int]] = set()

    def forward(self, place: tuple[int, int], module: torch.nn.Module, arguments: Any, output: Any) -> None:
        """The forward hook of a matrix; `place` is its layer, from 0, and its index in MATRICES."""
        if not torch.is_grad_enabled():  # a forward pass whose activations are computed again later, or BF16's own
            return
        self._add((*place, 0), _normalised(module, arguments[0]), scale=_scale_in_use(module, "scaling_fwd", 0))
        if place not in self._weighed:  # it is the same in all microbatches; kept in FP8, it has been cast before
            self._weighed.add(place)
            self._add((*place, 1), without_scales(module.weight), scale=_scale_in_use(module, "scaling_fwd", 1))
        output[0].register_hook(
            lambda gradient: self._add((*place, 2), gradient, scale=_scale_in_use(module, "scaling_bwd", 0))
        )

    def reduce(self) -> None:
        """Over all ranks, which all call this. A number that several of them hold is counted several times, and so are
        all others of its operand: the shares stay."""
        over_all_ranks(largest=self.largest, sums=self.counts)

    def operands(self) -> list[Operand]:
        """Every operand that was seen, in the order of the layers. The one transfer from the device."""
        figures = torch.cat([self.largest.double(), self.counts.double()], -1).cpu()
        places = itertools.product(*map(range, figures.shape[:-1]))
        return [self._operand(place, figures[place].tolist()) for place in places if figures[place][0] != -1]

    def _add(self, place: tuple[int, int, int], x: Tensor, *, scale: Tensor | None) -> None:
        """Account for (a part of) the operand `x`, at its layer, matrix and operand: N rows, C columns."""
        x_NC, cast = x.detach().flatten(0, -2), self.casts[OPERANDS[place[2]]]
        # Of all tensor parallel ranks' parts, so that the shares do not depend on how many there are. TransformerEngine
        # itself scales a part that it does not gather by the amax of that part alone, which loses no more.
        amax = max_over_tensor_parallel(x_NC.abs().amax().float())
        self.counts[place] += lost_in_cast(x_NC, amax=amax, cast=cast, scale=scale)
        self.largest[place][0] = torch.maximum(self.largest[place][0], amax)
        if scale is not None:
            self.largest[place][1] = scale

    def _operand(self, place: tuple[int, int, int], figures: list[float]) -> Operand:
        layer, matrix, name = place[0] + 1, MATRICES[place[1]], OPERANDS[place[2]]
        amax, in_use, nonzero, underflow, overflow = figures
        wanted = float(scale_for(torch.tensor(amax), self.casts[name]))
        scales = (in_use, wanted) if in_use > 0 else (wanted, None)
        return Operand(layer, matrix, name, amax, *scales, underflow / max(1, nonzero), overflow / max(1, nonzero))


def curves(operands: Sequence[Operand]) -> dict[str, float]:
    """Curves for TensorBoard: of each layer's inputs, weights and gradients the worst of its four matrices."""
    values = {
        "underflow_worst": max(one.underflow for one in operands),
        "overflow_worst": max(one.overflow for one in operands),
    }
    for (layer, name), group in _grouped(operands).items():
        key = f"layer_{layer:02}/{name}"
        values[f"{key}/amax"] = max(one.amax for one in group)
        values[f"{key}/scale"] = min(one.scale for one in group)
        values[f"{key}/underflow"] = max(one.underflow for one in group)
        if group[0].scale_wanted is not None:  # a scale of the present amax lets nothing overflow
            values[f"{key}/overflow"] = max(one.overflow for one in group)
    return values


def _grouped(operands: Sequence[Operand]) -> dict[tuple[int, str], list[Operand]]:
    groups: dict[tuple[int, str], list[Operand]] = {}
    for one in operands:
        groups.setdefault((one.layer, one.name), []).append(one)
    return groups


def _matrices(models: Sequence[MegatronModule]) -> Iterator[tuple[tuple[int, int], torch.nn.Module]]:
    """((layer from 0, index in MATRICES), the module) of this stage's matrices that are multiplied in FP8, or would."""
    for model in models:
        for layer in model.temporal.block.layers:
            index = layer.layer_number - 1
            if model.config.fp8 and is_first_last_bf16_layer(model.config, index):
                continue
            for column, (name, owner) in enumerate(OWNERS.items()):
                module = getattr(getattr(layer, owner), name, None)
                if module is not None:
                    yield (index, column), module


def _scale_in_use(module: torch.nn.Module, key: str, index: int) -> Tensor | None:
    """The scale that delayed scaling keeps for an operand of a TransformerEngine module; no other recipe keeps one.

    Of a layer that is recomputed it is the next microbatch's: the old one is lent to the recomputation alone.
    """
    scale = getattr(getattr(module, "fp8_meta", {}).get(key), "scale", None)
    return None if scale is None else scale[index]


@torch.no_grad()
def _normalised(module: torch.nn.Module, x: Tensor) -> Tensor:
    """What the product of a module sees: TransformerEngine's LayerNormLinear applies its RMSNorm to `x` before."""
    weight = getattr(module, "layer_norm_weight", None)
    if weight is None:
        return x
    return F.rms_norm(x, x.shape[-1:], weight, module.eps)
