"""What a cast to FP8 loses, held against torch's own casts; what the hooks see, held against the tensors themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from one_rank import make_config, one_rank
from torch import Tensor
from torch.nn import functional as F

from megaspeech.config import Config, ConfigError
from megaspeech.model.speech_text_model import SpeechTextModel
from megaspeech.model.temporal import transformer_config
from megaspeech.training.fp8_arithmetic import OPERANDS, Cast, casts, count_lost, lost_in_cast, scale_for
from megaspeech.training.fp8_health import MATRICES, Fp8Health, Operand, Tally, curves
from megaspeech.training.fp8_shadow import Fp8Shadow, relative

__all__ = ["one_rank"]

E4M3, E5M2 = Cast(torch.float8_e4m3fn), Cast(torch.float8_e5m2)
FRAMES, SAMPLES = 16, 2


def lost_in_torch(x: Tensor, scale: Tensor | float, dtype: torch.dtype) -> list[int]:
    """As `count_lost`, of the numbers that torch's cast gives: off by more than half its last step, one saturates."""
    scaled = x * scale
    cast = scaled.to(dtype).float()
    half_step = {torch.float8_e4m3fn: 16, torch.float8_e5m2: 4096}[dtype]
    saturated = ~((cast - scaled).abs() <= half_step)  # torch's cast may well make it infinite
    return [int((x != 0).sum()), int(((cast == 0) & (x != 0)).sum()), int(saturated.sum())]


@pytest.mark.parametrize("cast", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_losses_are_those_of_torchs_cast(cast: Cast) -> None:
    nearly = 1 + torch.arange(-8, 9) * 2.0**-23
    spread = torch.randn(20_000) * torch.exp2(torch.randint(-24, 28, (20_000,)))
    x = torch.cat([cast.lower * nearly, cast.lower * -nearly, cast.upper * nearly, spread, torch.zeros(5)])
    x = x[x != cast.upper]  # a tie, which E5M2 takes up and E4M3 down
    for scale in (1.0, 3.7, 2.0**-9):
        counts = count_lost(x, scale=torch.tensor(scale), cast=cast).tolist()
        assert counts == lost_in_torch(x, scale, cast.dtype)
        assert min(counts) > 0
    assert lost_in_torch(cast.lower * nearly, 1.0, cast.dtype) == [17, 9, 0]
    assert lost_in_torch(cast.upper * nearly[9:], 1.0, cast.dtype) == [8, 0, 8]


def test_a_scale_takes_amax_to_the_formats_largest() -> None:
    amax = torch.tensor([1.0, 448.0, 3e-3, 0.0, float("inf"), float("nan"), 1e-40])
    largest = torch.finfo(torch.float32).max
    expected = [448.0, 1.0, 448 / 3e-3, 1.0, 1.0, 1.0, largest]
    assert scale_for(amax, E4M3).tolist() == pytest.approx(expected)
    assert scale_for(amax, E5M2)[0] == 57344
    assert scale_for(amax, replace(E4M3, margin=3))[0] == 56
    in_powers = scale_for(amax, replace(E4M3, block=(1, 32)))
    assert in_powers.tolist()[:3] == [256.0, 1.0, 2.0**17]  # the last ones up to 448, 1, 149333


def test_nothing_overflows_at_the_scale_of_amax() -> None:
    x = torch.randn(64, 64)
    for factor in torch.logspace(-20, 20, 41):
        scale = scale_for((x * factor).abs().amax(), E4M3)
        assert count_lost(x * factor, scale=scale, cast=E4M3)[2] == 0


@pytest.mark.parametrize("block", [(1, 32), (1, 128), (128, 128)])
def test_blocks_have_scales_of_their_own(block: tuple[int, int]) -> None:
    """Against a loop over the blocks, of a matrix that does not fill them."""
    x_NC, cast = torch.randn(130, 200) * torch.exp2(torch.randint(-14, 4, (130, 200))), replace(E4M3, block=block)
    x_NC[3, 5], expected = 1e4, torch.zeros(3, dtype=torch.int64)
    for rows in x_NC.split(block[0]):
        for part in rows.split(block[1], dim=1):
            expected += torch.tensor(lost_in_torch(part, scale_for(part.abs().amax(), cast), cast.dtype))
    found = lost_in_cast(x_NC, amax=torch.tensor(1.0), cast=cast)
    assert found.tolist() == expected.tolist()
    whole = lost_in_cast(x_NC, amax=x_NC.abs().amax(), cast=E4M3)
    assert whole[0] == found[0] and whole[1] > found[1] > 0


@pytest.mark.parametrize(
    "recipe, input_block, weight_block, gradient, margin",
    [
        ("bf16", None, None, torch.float8_e5m2, 0),
        ("fp8-delayed", None, None, torch.float8_e5m2, 2),
        ("fp8-tensorwise", None, None, torch.float8_e5m2, 0),
        ("fp8-blockwise", (1, 128), (128, 128), torch.float8_e4m3fn, 0),
        ("mxfp8", (1, 32), (1, 32), torch.float8_e4m3fn, 0),
    ],
)
def test_recipes(
    recipe: str, input_block: Any, weight_block: Any, gradient: torch.dtype, margin: int, tmp_path: Path
) -> None:
    impl = "local" if recipe == "bf16" else "transformer_engine"
    overrides = (f"precision.recipe={recipe}", f"model.transformer_impl={impl}", "precision.fp8_margin=2")
    found = casts(transformer_config(make_config(tmp_path, *overrides)))
    assert tuple(found) == OPERANDS
    assert found["input"] == Cast(torch.float8_e4m3fn, input_block, margin)
    assert found["weight"] == Cast(torch.float8_e4m3fn, weight_block, margin)
    assert found["gradient"] == Cast(gradient, input_block, margin)


class Records:
    """A journal that remembers."""

    is_main = True

    def __init__(self) -> None:
        self.figures: list[tuple[str, int, dict, dict | None]] = []
        self.said: list[str] = []

    def scalars(self, kind: str, step: int, values: dict, *, record: dict | None = None) -> None:
        self.figures.append((kind, step, values, record))

    def say(self, text: str) -> None:
        self.said.append(text)


def run_model(model: SpeechTextModel) -> None:
    """Two microbatches through the temporal transformer and back, the second one larger."""
    generator = torch.Generator().manual_seed(1)
    for size in (1.0, 2.0):
        hidden = size * torch.randn(FRAMES, SAMPLES, model.config.hidden_size, generator=generator)
        output = model.temporal(hidden.requires_grad_(), padding_BT=torch.zeros(SAMPLES, FRAMES, dtype=torch.bool))
        (output * torch.randn(output.shape, generator=generator)).sum().backward()


def look(directory: Path, *overrides: str, run: Callable[[SpeechTextModel], None] = run_model) -> tuple[Records, Any]:
    """(what was recorded of step 2 of a model that is looked at every other step, the model)."""
    config: Config = make_config(directory, "logging.fp8_health_interval=2", *overrides)
    torch.manual_seed(0)
    model, journal = SpeechTextModel(config, pre_process=True, post_process=True), Records()
    health = Fp8Health([model], config=config, journal=journal)
    for step in (1, 2):
        with health.step(step):
            run(model)
    assert not any(module._forward_hooks for module in model.modules())
    return journal, model


@pytest.mark.usefixtures("one_rank")
def test_hooks_see_what_is_multiplied(tmp_path: Path) -> None:
    """Of one matrix by hooks of our own: its inputs, its weight, and what its output's gradient makes of its inputs."""
    inputs, gradients = [], []

    def run(model: SpeechTextModel) -> None:
        inputs.clear(), gradients.clear()
        matrix = model.temporal.block.layers[2].mlp.linear_fc2

        def keep(_: Any, arguments: tuple, output: tuple) -> None:
            inputs.append(arguments[0].detach())
            output[0].register_hook(gradients.append)

        with torch.enable_grad():
            hook = matrix.register_forward_hook(keep)
            run_model(model)
            hook.remove()
        with torch.no_grad():  # what is validated, or compared, is not counted
            model.temporal(1e4 * torch.ones(FRAMES, SAMPLES, 64), padding_BT=torch.zeros(SAMPLES, FRAMES) > 0)

    journal, model = look(tmp_path, run=run)
    ((kind, step, values, record),) = journal.figures
    assert (kind, step, len(record["operands"])) == ("fp8", 2, 4 * len(MATRICES) * len(OPERANDS))
    weight = model.temporal.block.layers[2].mlp.linear_fc2.weight.detach()
    for name, seen, cast in (("input", inputs, E4M3), ("weight", [weight], E4M3), ("gradient", gradients, E5M2)):
        row = next(
            row for row in record["operands"] if (row["layer"], row["matrix"], row["name"]) == (3, "linear_fc2", name)
        )
        amax = max(float(x.abs().amax()) for x in seen)
        assert row["amax"] == pytest.approx(amax)
        assert row["scale"] == pytest.approx(torch.finfo(cast.dtype).max / amax) and row["scale_wanted"] is None
        counts = sum(torch.tensor(lost_in_torch(x, scale_for(x.abs().amax(), cast), cast.dtype)) for x in seen)
        assert row["underflow"] == pytest.approx(float(counts[1] / counts[0])) and row["overflow"] == 0
    assert values["underflow_worst"] == max(row["underflow"] for row in record["operands"]) > 0


@pytest.mark.usefixtures("one_rank")
def test_what_is_recomputed_is_counted_once(tmp_path: Path) -> None:
    plain, _ = look(tmp_path)
    again, _ = look(tmp_path, "parallel.recompute_granularity=full")
    assert again.figures == plain.figures


@pytest.mark.usefixtures("one_rank")
def test_other_steps_are_not_hooked(tmp_path: Path) -> None:
    counts = []
    look(tmp_path, run=lambda model: counts.append(sum(len(m._forward_hooks) for m in model.modules())))
    assert counts == [0, 4 * len(MATRICES)]


@pytest.mark.usefixtures("one_rank")
def test_nothing_is_asked_of_the_device_before_the_end(tmp_path: Path) -> None:
    """Tensors of the meta device have no values to ask for: so far all have stayed on the device."""
    model = SpeechTextModel(make_config(tmp_path), pre_process=True, post_process=True).to("meta")
    model.temporal.rope.inv_freq = model.temporal.rope.inv_freq.to("meta")  # no buffer
    for block in (None, (1, 32)):
        tally = Tally(4, casts=dict.fromkeys(OPERANDS, replace(E4M3, block=block)), device=torch.device("meta"))
        hooks = [
            layer.mlp.linear_fc2.register_forward_hook(partial(tally.forward, (layer.layer_number - 1, 3)))
            for layer in model.temporal.block.layers
        ]
        hidden = torch.empty(FRAMES, SAMPLES, 64, device="meta", requires_grad=True)
        padding = torch.empty(SAMPLES, FRAMES, dtype=torch.bool, device="meta")
        model.temporal(hidden, padding_BT=padding).sum().backward()
        with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
            tally.operands()
        for hook in hooks:
            hook.remove()


@pytest.mark.usefixtures("one_rank")
def test_layers_that_stay_in_bf16_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megaspeech.model import temporal

    spec = temporal.layer_spec(make_config(tmp_path))
    monkeypatch.setattr(temporal, "layer_spec", lambda _: spec)
    overrides = ("precision.recipe=fp8-tensorwise", "model.transformer_impl=transformer_engine")
    kept = ("precision.num_layers_at_start_in_bf16=1", "precision.num_layers_at_end_in_bf16=2")
    seen = []
    look(tmp_path, *overrides, *kept, run=lambda model: seen.append(_hooked_layers(model)))
    assert seen == [set(), {2}]


def _hooked_layers(model: SpeechTextModel) -> set[int]:
    layers = model.temporal.block.layers
    return {layer.layer_number for layer in layers if any(module._forward_hooks for module in layer.modules())}


@pytest.mark.usefixtures("one_rank")
def test_a_module_of_transformer_engine() -> None:
    """The names that its LayerNormLinear has: the norm within, and the scales of delayed scaling."""
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.randn(8, 6))
    module.layer_norm_weight, module.eps = torch.nn.Parameter(torch.rand(6) + 1), 1e-8
    scales = {"scaling_fwd": torch.tensor([300.0, 2.0**-20, 1.0]), "scaling_bwd": torch.tensor([7.0, 1.0])}
    module.fp8_meta = {key: SimpleNamespace(scale=scale) for key, scale in scales.items()}
    x = 100 * torch.randn(4, 3, 6, requires_grad=True)
    normed = F.rms_norm(x, (6,), module.layer_norm_weight, 1e-8)
    output = F.linear(normed, module.weight)

    tally = Tally(1, casts={"input": E4M3, "weight": E4M3, "gradient": E5M2}, device=torch.device("cpu"))
    tally.forward((0, 0), module, (x,), (output, None))
    (3 * output).sum().backward()
    tally.reduce()
    rows = {row.name: row for row in tally.operands()}

    assert rows["input"].amax == pytest.approx(float(normed.detach().abs().amax()))
    assert rows["input"].scale == 300 and rows["input"].scale_wanted == pytest.approx(448 / rows["input"].amax)
    overflow = float((normed.abs() * 300 > E4M3.upper).float().mean())
    assert rows["input"].overflow == pytest.approx(overflow) and overflow > 0
    assert rows["weight"].underflow == 1
    assert (rows["gradient"].amax, rows["gradient"].scale, rows["gradient"].underflow) == (3, 7, 0)


def test_curves_show_the_worst_matrix_of_a_layer() -> None:
    first = Operand(3, "linear_qkv", "input", 2.0, 200.0, 224.0, 0.1, 0.0)
    second = replace(first, matrix="linear_proj", amax=4.0, scale=100.0, underflow=0.0, overflow=0.2)
    other = replace(first, layer=12, name="weight", scale_wanted=None, underflow=0.5)
    values = curves([first, second, other])
    assert (values["underflow_worst"], values["overflow_worst"]) == (0.5, 0.2)
    mine = {key.rpartition("/")[2]: value for key, value in values.items() if key.startswith("layer_03/input/")}
    assert mine == {"amax": 4.0, "scale": 100.0, "underflow": 0.1, "overflow": 0.2}
    assert "layer_12/weight/underflow" in values and "layer_12/weight/overflow" not in values


def shadow_of(directory: Path, losses: list[tuple[float, float]]) -> list[str]:
    """What is said of (loss in FP8, loss in BF16) of the text, one comparison after the other, with a band of 0.1."""
    overrides = ("precision.recipe=fp8-tensorwise", "model.transformer_impl=transformer_engine")
    config, journal = make_config(directory, *overrides, "precision.shadow_band=0.1"), Records()
    shadow = Fp8Shadow(SimpleNamespace(), config=config, health=SimpleNamespace(worst="layer 7"), journal=journal)
    for step, (fp8, bf16) in enumerate(losses, 1):
        reports = [
            {"weighted": torch.tensor([text, 5.0]), "statistics": torch.tensor([[text, 1.0, 0.0]] * 5)}
            for text in (fp8, bf16)
        ]
        shadow.compare(step, (reports[1:], torch.ones(4)), reports=reports)
        assert journal.figures[-1][2]["text_drift"] == pytest.approx(relative(fp8, bf16), nan_ok=True)
    return journal.said


@pytest.mark.usefixtures("one_rank")
def test_a_drift_is_told_once_and_again_when_it_has_grown(tmp_path: Path) -> None:
    nan = float("nan")
    courses = [(1.05, []), (1.15, [2]), (1.16, []), (1.19, []), (1.25, [5]), (0.65, [6]), (1.3, []), (1.0, [])]
    courses += [(1.12, [9]), (nan, [10]), (nan, [])]
    said = shadow_of(tmp_path, [(fp8, 1.0) for fp8, _ in courses])
    assert [int(line.split()[1]) for line in said] == [step for _, steps in courses for step in steps]
    assert "loss of text 1.150 against 1.000" in said[0] and "off by 15.0%" in said[0]
    assert "FP8 loses most in layer 7" in said[0] and "num_layers_at_start_in_bf16" in said[0]


@pytest.mark.usefixtures("one_rank")
def test_a_model_that_is_broken_without_fp8_too_is_not_its_fault(tmp_path: Path) -> None:
    assert shadow_of(tmp_path, [(float("nan"), float("nan"))]) == []


def test_a_shadow_of_a_run_without_fp8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='precision.shadow_interval: 5, but "bf16" has no FP8'):
        make_config(tmp_path, "precision.recipe=bf16", "precision.shadow_interval=5")
