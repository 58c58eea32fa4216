"""From the seconds of a step to figures that can be compared: frames, operations, shares of what the machine can do.

Operations are the model's, forward and backward: three times `model.counting.count_flops`, causal attention as the half
that is used, nothing that is recomputed (model FLOPs utilisation; PaLM, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from megaspeech.benchmarks.case import MOSHI, OURS, Case
from megaspeech.benchmarks.parts import DEPTH, EMBEDDING, HEADS, TEMPORAL, TEXT
from megaspeech.benchmarks.planned import planned_figures
from megaspeech.benchmarks.step import Measured, quartiles
from megaspeech.config import Config
from megaspeech.kernels.benchmarks.rows import MEASURED
from megaspeech.model.counting import count_flops
from megaspeech.planning.gpus import Gpu

EXTRAPOLATED = "extrapolated"
"""How the status of a row begins that was not measured itself."""
FRAME_RATE = 12.5
"""Frames in a second of sound, as Mimi has them: what "x real time" means."""
PASSES = 3
"""Forward, and twice as much backward."""
BF16_PRODUCT, FP8_PRODUCT = "TFLOP/s", "FP8 TFLOP/s"
"""Floors that `share_of_product` is of."""


@dataclass(frozen=True)
class Row:
    """What was found of a case. `status` is "measured", or says why there are no figures, or whence.

    `step_ms` is the median, `tflops` are TFLOP/s, `mfu` their share of the data sheet's, `share_of_product` of a large
    matrix product measured in the same run, both in the recipe's own numbers: FP8 for an FP8 recipe, BF16 for BF16.
    `planned_ms` and `planned_bytes` are what the planner says of our step and its peak.
    `parts_ms` are means over the steps taken apart, which they sum to; those steps' median is `step_by_part_ms`.
    The depth transformer's shares are of the two passes, heads and their losses included; the optimizer is in neither.
    """

    provider: str
    model: str
    num_layers: int
    recipe: str
    frames: int
    sample_frames: int
    micro_batch_size: int
    status: str
    overrides: tuple[str, ...] = ()
    num_parameters: int | None = None
    step_ms: float | None = None
    quartiles_ms: tuple[float, float] | None = None
    frames_per_second: float | None = None
    x_real_time: float | None = None
    tflops: float | None = None
    mfu: float | None = None
    share_of_product: float | None = None
    peak_bytes: int | None = None
    planned_ms: float | None = None
    planned_bytes: int | None = None
    last_loss: float | None = None
    step_by_part_ms: float | None = None
    quartiles_by_part_ms: tuple[float, float] | None = None
    parts_ms: dict[str, float] = field(default_factory=dict)
    depth_share_of_time: float | None = None
    depth_share_of_flops: float | None = None

    @property
    def is_fp8(self) -> bool:
        """Whether our products were in FP8."""
        return self.provider == OURS and self.recipe not in ("fp32", "bf16")

    @property
    def name(self) -> str:
        """Who it is and how it computes."""
        return f"{self.provider} {self.recipe}"

    @property
    def has_figures(self) -> bool:
        """Whether it was measured, or follows from what was."""
        return self.frames_per_second is not None


def row_of(case: Case, config: Config, outcome: Measured | str, *, floors: dict[str, Any], gpu: Gpu | None) -> Row:
    """The row of a case.

    Args:
        case: what was measured.
        config: of it.
        outcome: what was found, or why nothing was.
        floors: by unit; of FP8, None where there are no such products.
        gpu: whose data sheet counts; None without one.
    """
    sizes = {
        "provider": case.provider,
        "model": case.model,
        "num_layers": config.temporal.num_layers,
        "recipe": case.recipe,
        "frames": step_frames(config),
        "sample_frames": config.data.num_frames,
        "micro_batch_size": config.training.micro_batch_size,
        "overrides": case.overrides,
    }
    if isinstance(outcome, str):
        return Row(**sizes, status=outcome)
    low, median, high = quartiles(outcome.seconds)
    return Row(
        **sizes,
        status=MEASURED,
        num_parameters=outcome.num_parameters,
        quartiles_ms=(1e3 * low, 1e3 * high),
        peak_bytes=outcome.peak_bytes,
        **(planned_figures(config, gpu=gpu) if case.provider == OURS else {}),
        last_loss=outcome.losses[-1],
        **_rates_of(config, median, floors=floors, gpu=gpu),
        **_by_part(outcome.parts_ms, flops=count_flops(config, num_frames=config.data.num_frames)),
    )


def extrapolated(rows: list[Row], config: Config, *, floors: dict[str, Any], gpu: Gpu | None) -> Row | None:
    """A step of a deeper model than fits, from the two deepest measured: every further layer takes as long again.

    Args:
        rows: of one provider and recipe, model and frames alike.
        config: of the deeper model.
        floors, gpu: see `row_of`.

    Returns:
        A row without memory or quartiles, whose status names where it comes from; None where it is measured, or two
        others are not.
    """
    measured = sorted((row for row in rows if row.status == MEASURED), key=lambda row: row.num_layers)
    layers = config.temporal.num_layers
    if len(measured) < 2 or any(row.num_layers == layers for row in measured):
        return None
    fewer, more = measured[-2:]
    a_layer = (more.step_ms - fewer.step_ms) / (more.num_layers - fewer.num_layers)
    status = f"{EXTRAPOLATED} from {fewer.num_layers} and {more.num_layers} layers"
    figures = _rates_of(config, (more.step_ms + a_layer * (layers - more.num_layers)) / 1e3, floors=floors, gpu=gpu)
    sizes = {name: getattr(more, name) for name in ("provider", "model", "recipe", "frames", "sample_frames")}
    return Row(**sizes, micro_batch_size=more.micro_batch_size, num_layers=layers, status=status, **figures)


def step_frames(config: Config) -> int:
    """Frames of a step."""
    return config.training.global_batch_size * config.data.num_frames


def step_flops(config: Config) -> int:
    """Operations of a step, forward and backward."""
    return PASSES * step_frames(config) * sum(count_flops(config, num_frames=config.data.num_frames).values())


def by_provider(rows: list[Row], *, num_layers: int) -> tuple[Row | None, Row | None, Row | None]:
    """Of the rows with figures of so many layers: our BF16, our fastest FP8, the peer's; None where there is none."""
    measured = [row for row in rows if row.num_layers == num_layers and row.has_figures]
    bf16 = next((row for row in measured if row.provider == OURS and row.recipe == "bf16"), None)
    fp8 = max((row for row in measured if row.is_fp8), key=lambda row: row.frames_per_second, default=None)
    peer = next((row for row in measured if row.provider == MOSHI), None)
    return bf16, fp8, peer


def _rates_of(config: Config, seconds: float, *, floors: dict[str, Any], gpu: Gpu | None) -> dict[str, float | None]:
    """The figures of a step that takes so long."""
    frames, tflops = step_frames(config), step_flops(config) / seconds / 1e12
    sheet, floor = _products(config, floors=floors, gpu=gpu)
    return {
        "step_ms": 1e3 * seconds,
        "frames_per_second": frames / seconds,
        "x_real_time": frames / seconds / FRAME_RATE,
        "tflops": tflops,
        "mfu": tflops / sheet if sheet else None,
        "share_of_product": tflops / floor if floor else None,
    }


def _products(config: Config, *, floors: dict[str, Any], gpu: Gpu | None) -> tuple[float | None, float | None]:
    """TFLOP/s of products in the recipe's numbers: of the data sheet, and measured. Of FP32 none are."""
    if config.precision.recipe == "fp32":
        return None, None
    if config.precision.fp8_recipe:
        return gpu and gpu.fp8_tflops, floors[FP8_PRODUCT]
    return gpu and gpu.bf16_tflops, floors[BF16_PRODUCT]


def _by_part(steps: list[dict[str, float]], *, flops: dict[str, int]) -> dict[str, Any]:
    if not steps:
        return {}
    low, median, high = quartiles([sum(step.values()) for step in steps])
    means = {part: statistics.mean(step[part] for step in steps) for part in steps[0]}
    passes = sum(means[part] for part in (EMBEDDING, TEMPORAL, TEXT, DEPTH, HEADS))
    return {
        "step_by_part_ms": median,
        "quartiles_by_part_ms": (low, high),
        "parts_ms": means,
        "depth_share_of_time": (means[DEPTH] + means[HEADS]) / passes,
        "depth_share_of_flops": flops["depth"] / sum(flops.values()),
    }
