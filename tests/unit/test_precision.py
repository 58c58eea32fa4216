"""What a recipe means to megatron-core, and that one which cannot run is refused by naming what is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from launching import train, write_tiny_run
from megatron.core.extensions.transformer_engine import HAVE_TE
from one_rank import make_config

from megaspeech.config import Config, ConfigError
from megaspeech.model.temporal import transformer_config
from megaspeech.parallel.requirements import require_machine, require_recipe

TE = "model.transformer_impl=transformer_engine"
RECIPES = {"fp8-delayed": "hybrid", "fp8-tensorwise": "hybrid", "fp8-blockwise": "e4m3", "mxfp8": "e4m3"}


def config_of(directory: Path, recipe: str, *overrides: str) -> Config:
    return make_config(directory, f"precision.recipe={recipe}", TE, *overrides)


@pytest.mark.parametrize("recipe, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_without_fp8(recipe: str, dtype: torch.dtype, tmp_path: Path) -> None:
    megatron = transformer_config(config_of(tmp_path, recipe))
    assert megatron.params_dtype is dtype and megatron.bf16 == (recipe == "bf16") and not megatron.fp8
    require_recipe(recipe, megatron=megatron)


@pytest.mark.parametrize("recipe, form", RECIPES.items())
def test_recipes_are_megatron_cores(recipe: str, form: str, tmp_path: Path) -> None:
    options = ["precision.fp8_margin=1", "precision.fp8_amax_history_len=32"]
    megatron = transformer_config(config_of(tmp_path, recipe, *options))
    assert (megatron.fp8, megatron.fp8_recipe) == (form, recipe.removeprefix("fp8-"))
    assert megatron.params_dtype is torch.bfloat16 and megatron.bf16
    assert (megatron.fp8_margin, megatron.fp8_amax_history_len, megatron.fp8_amax_compute_algo) == (1, 32, "max")
    assert not megatron.first_last_layers_bf16


def test_layers_that_stay_in_bf16(tmp_path: Path) -> None:
    megatron = transformer_config(config_of(tmp_path, "fp8-tensorwise", "precision.num_layers_at_end_in_bf16=2"))
    assert megatron.first_last_layers_bf16
    assert (megatron.num_layers_at_start_in_bf16, megatron.num_layers_at_end_in_bf16) == (0, 2)


@pytest.mark.parametrize(
    "recipe, overrides, words",
    [
        ("fp8-delayed", ["model.transformer_impl=local"], '"fp8-delayed" is TransformerEngine\'s'),
        ("fp8-delayed", ["precision.num_layers_at_start_in_bf16=1"], '1, but "fp8-delayed" takes every layer'),
        (
            "mxfp8",
            ["precision.num_layers_at_end_in_bf16=3", "parallel.pipeline_model_parallel_size=2"],
            "precision.num_layers_at_end_in_bf16: 3 is more than the 2 layers of a pipeline stage",
        ),
        ("fp8", [], "precision.recipe: 'fp8'"),
    ],
)
def test_what_does_not_go_together(recipe: str, overrides: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, recipe, *overrides)
    assert words in "\n".join(caught.value.faults) and len(caught.value.faults) == 1


def test_a_machine_without_gpu_says_so_in_one_line(tmp_path: Path) -> None:
    config = write_tiny_run(tmp_path)
    places = (f"data.directory={tmp_path}/shards", f"run.directory={tmp_path}/run")
    finished = train(config, *places, "precision.recipe=fp8-delayed", TE, variables={"CUDA_VISIBLE_DEVICES": ""})
    assert finished.returncode != 0
    assert 'rank 0: precision.recipe: "fp8-delayed" needs a GPU, and here is none; use "bf16"' in finished.stderr
    assert "trainer.py" not in finished.stderr  # no trace of our code


@pytest.mark.parametrize(
    "override, words",
    [
        ("optimizer.use_precision_aware_optimizer=true", "optimizer.use_precision_aware_optimizer needs a GPU"),
        ("model.depth_graph_multiple=64", "model.depth_graph_multiple needs a GPU, and here is none; set it to 0"),
        ("parallel.data_parallel=megatron_fsdp", 'parallel.data_parallel: "megatron_fsdp" needs a GPU'),
    ],
)
def test_a_machine_without_gpu_refuses_what_needs_one(override: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        require_machine(make_config(tmp_path, override))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says of an H100."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")


@pytest.mark.usefixtures("hopper")
def test_a_gpu_without_transformer_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(ValueError, match="needs TransformerEngine, which is not installed; install megaspeech"):
        require_recipe("fp8-delayed", megatron=transformer_config(config_of(tmp_path, "fp8-delayed")))


@pytest.mark.usefixtures("hopper")
@pytest.mark.skipif(HAVE_TE, reason="TransformerEngine is installed")
def test_an_optimizer_of_few_bits_without_transformer_engine(tmp_path: Path) -> None:
    config = make_config(tmp_path, "optimizer.use_precision_aware_optimizer=true", "precision.recipe=bf16")
    with pytest.raises(ValueError, match="use_precision_aware_optimizer needs TransformerEngine; install megaspeech"):
        require_machine(config)


@pytest.mark.usefixtures("hopper")
def test_a_gpu_that_does_not_know_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TransformerEngine, which this machine cannot load, says why; its words are handed on with the GPU's name."""
    import megatron.core.fp8_utils as fp8_utils

    def refuse(recipe: str) -> None:
        raise RuntimeError(f"{recipe} requires compute capability 10.0.")

    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.quantization"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["transformer_engine.pytorch.quantization"].check_recipe_support = refuse
    monkeypatch.setattr(fp8_utils, "get_fp8_recipe", lambda megatron: megatron.fp8_recipe, raising=False)
    words = 'precision.recipe: "mxfp8": mxfp8 requires compute capability 10.0. This is NVIDIA H100, compute'
    with pytest.raises(ValueError, match=words):
        require_recipe("mxfp8", megatron=transformer_config(config_of(tmp_path, "mxfp8")))
