"""Text models of transformers, small and random, become speech-text models that have their logits."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import make_config, one_rank  # noqa: F401
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

from megaspeech.config import Config, write_config  # noqa: E402
from megaspeech.conversion.convert import Conversion, convert  # noqa: E402
from megaspeech.conversion.moshi import open_moshi  # noqa: E402
from megaspeech.conversion.moshi_config import moshi_config  # noqa: E402
from megaspeech.conversion.native import check_native, load_weights, whole_model  # noqa: E402
from megaspeech.conversion.new_weights import new_depth  # noqa: E402
from megaspeech.conversion.stored import StoredModel  # noqa: E402
from megaspeech.conversion.text_config import read_text_model  # noqa: E402
from megaspeech.conversion.text_models import open_text_model, text_difference  # noqa: E402
from megaspeech.conversion.transformers_layers import refuse_unknown_layers  # noqa: E402
from megaspeech.data.tokenizer import train_tokenizer  # noqa: E402
from megaspeech.model.counting import used_rows  # noqa: E402
from megaspeech.model.embedding import table_offsets  # noqa: E402
from megaspeech.model.speech_text_model import SpeechTextModel  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_rank")

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied-own-heads": {"tie_word_embeddings": True, "head_dim": 20, "rms_norm_eps": 1e-5},
    "mistral-window": {"sliding_window": 16},
    "mistral": {"sliding_window": None, "num_key_value_heads": 4, "bos_token_id": None, "eos_token_id": None},
    "qwen2-tied": {"tie_word_embeddings": True, "rope_theta": 1e6, "eos_token_id": [5, 2], "bos_token_id": None},
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 0},
    "qwen3": {"head_dim": 16},
    "qwen3-tied": {"head_dim": 12, "tie_word_embeddings": True, "num_key_value_heads": 1},
}


def save(folder: Path, name: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A random text model, none of whose vectors are zeros or ones, in transformers' own files."""
    family = name.partition("-")[0]
    sizes = {**SIZES, **MODELS[name], **options}
    config = transformers.AutoConfig.for_model(family, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return folder


def run_config(directory: Path, *overrides: str, **shape: Any) -> Config:
    """The config of a run of the preset "tiny" whose temporal transformer is that of "llama"."""
    ours = {
        "num_layers": 2,
        "hidden_size": 48,
        "ffn_hidden_size": 80,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        **shape,
    }
    keys = [f"temporal.{key}={json.dumps(value)}" for key, value in ours.items()]
    return make_config(directory, "model.layernorm_epsilon=1e-6", *keys, *overrides)


def built(model: StoredModel) -> SpeechTextModel:
    check_native(model)
    native = whole_model(model.config)
    load_weights(native, model.weights)
    return native


@pytest.mark.parametrize("name", MODELS)
def test_text_logits_are_the_text_models(name: str, tmp_path: Path) -> None:
    path = save(tmp_path / "text", name)
    shape: dict[str, Any] = {}
    options = MODELS[name]
    shape["kv_channels"] = options.get("head_dim", 12)
    shape["num_query_groups"] = options.get("num_key_value_heads", 2)
    shape["rotary_base"] = int(options.get("rope_theta", 10000))
    shape["context"] = options.get("sliding_window") or 40
    shape["add_qkv_bias"], shape["qk_layernorm"] = name.startswith("qwen2"), name.startswith("qwen3")
    overrides = ["streams.delays=[1, 0, 1, 1, 1, 0, 1, 1, 1]"] if name == "mistral" else []
    epsilon = f"model.layernorm_epsilon={options.get('rms_norm_eps', 1e-6)}"
    config = run_config(tmp_path, epsilon, *overrides, **shape)
    model = open_text_model(path, config=config)
    assert model.config.streams.text_cardinality == 96 and model.config.depth == config.depth
    assert text_difference(built(model), path, model.config) < 1e-4


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In BF16 and several files."""
    folder = tmp_path_factory.mktemp("llama")
    save(folder, "llama", dtype=torch.bfloat16)
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    places = {name: f"model-0000{index % 2 + 1}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: state[name] for name in names if places[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def test_without_a_config_the_streams_are_moshis(llama: Path) -> None:
    model = open_text_model(llama)
    check_native(model)
    config = model.config
    assert (config.streams.num_codebooks, config.streams.num_given_codebooks, config.streams.cardinality) == (
        8,
        8,
        2048,
    )
    assert config.codec.name == "mimi" and config.precision.recipe == "bf16" and config.temporal.context == 64
    assert {one.dtype for one in model.weights.values()} == {torch.bfloat16}
    theirs = load_state(llama)
    assert torch.equal(model.weights["text_head.weight"].read(), theirs["lm_head.weight"])


@pytest.mark.parametrize(
    "special, first, pads",
    [
        ({"bos_token_id": 7, "eos_token_id": [5, 6], "pad_token_id": 8}, 7, (8, 5)),
        ({"bos_token_id": None, "eos_token_id": 5, "pad_token_id": -1}, 5, (5, 5)),
        ({"bos_token_id": 96, "eos_token_id": None, "pad_token_id": None}, None, (0, 0)),
    ],
)
def test_special_tokens(
    special: dict[str, Any], first: int | None, pads: tuple[int, int], llama: Path, tmp_path: Path
) -> None:
    values = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **special}))
    text = read_text_model(tmp_path)
    assert (text.first_token, text.pad_ids) == (first, pads)


def load_state(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}


def test_what_is_drawn_follows_from_the_seed_and_the_stated_rule(llama: Path, tmp_path: Path) -> None:
    first, again, other = (
        open_text_model(llama, config=run_config(tmp_path, f"run.seed={seed}")) for seed in (1, 1, 2)
    )
    for name in first.weights:
        assert torch.equal(first.weights[name].read(), again.weights[name].read()), name
    differing = {
        name for name in first.weights if not torch.equal(first.weights[name].read(), other.weights[name].read())
    }
    drawn = {name for name in first.weights if name.startswith("depth.") and not name.endswith("norm.weight")}
    assert differing == drawn | {"embedding.weight"}

    table, theirs = first.weights["embedding.weight"].read().float(), load_state(llama)["model.embed_tokens.weight"]
    streams = first.config.streams
    assert torch.equal(table[:96].bfloat16(), theirs) and torch.equal(table[96].bfloat16(), theirs[1])
    audio = torch.stack([table[offset : offset + 32] for offset in table_offsets(streams.cardinalities)[1:]])
    frames = audio[torch.arange(8)[:, None], torch.randint(32, (8, 4000))].sum(0)  # of random codes
    assert frames.pow(2).mean().sqrt().item() == pytest.approx(theirs.float().pow(2).mean().sqrt().item(), rel=0.1)
    for offset in table_offsets(streams.cardinalities)[1:]:
        assert not table[offset + 32].any()
    assert not table[used_rows(streams.cardinalities) :].any()


@pytest.mark.parametrize("more", [[], ["depth.low_rank_embeddings=24", "depth.weights_per_step_schedule=[0, 1, 1, 1]"]])
def test_the_depth_transformer_is_drawn_as_a_new_models(more: list[str], tmp_path: Path) -> None:
    config = make_config(tmp_path, "depth.ffn_hidden_size=120", *more)
    with torch.random.fork_rng():
        new = whole_model(config).state_dict()
    drawn = new_depth(config, seed=0, dtype=torch.float32)
    assert drawn.keys() == {name for name in new if name.startswith("depth.") and new[name] is not None}
    for name, one in drawn.items():
        ours, theirs = one.read(), new[name]
        assert ours.shape == theirs.shape
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.05, abs=1e-6), name
        assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.3), name
        assert torch.equal((ours == 0).all(-1), (theirs == 0).all(-1))


def test_a_config_of_another_model_names_every_key(llama: Path, tmp_path: Path) -> None:
    config = run_config(tmp_path, "model.layernorm_epsilon=1e-8", num_layers=3, add_qkv_bias=True, kv_channels=20)
    with pytest.raises(ValueError) as error:
        open_text_model(llama, config=config)
    for words in (
        "temporal.num_layers is 3 and must be 2",
        "temporal.add_qkv_bias is True and must be False",
        "temporal.kv_channels is 20 and must be left out",
        "model.layernorm_epsilon is 1e-08 and must be 1e-06",
    ):
        assert words in str(error.value)
    assert "\n" not in str(error.value) and "hidden_size" not in str(error.value)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MIXED = {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True, "sliding_window": 9}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is none of llama, mistral, qwen2, qwen3"),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 1e4}}, 'rope_scaling: "llama3" has no counterpart'),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, 'rope_scaling: "yarn"'),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.5}}, "rope_theta: 0.5 is no whole number"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"attention_bias": True}, "attention_bias: True"),
        ({"mlp_bias": True}, "mlp_bias: True"),
        ({"model_type": "qwen2", **MIXED}, "layer_types: some layers have a sliding window"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config: quantised weights"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"vocab_size": 97}, "tensor model.embed_tokens.weight has shape [96, 48]"),
        ({"tie_word_embeddings": True, "model_type": "qwen2"}, "self_attn.q_proj.bias is missing"),
        ({"num_hidden_layers": 1}, "tensor model.layers.1."),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(
    changes: dict[str, Any], words: str, llama: Path, tmp_path: Path
) -> None:
    for file in llama.iterdir():
        (tmp_path / file.name).symlink_to(file)
    values = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**values, **changes}))
    with pytest.raises(ValueError) as error:
        open_text_model(tmp_path)
    assert words in str(error.value)


@pytest.mark.parametrize("key", ["add_qkv_bias=true", "qk_layernorm=true", "kv_channels=24"])
def test_what_moshi_has_not_is_not_exported(key: str, tmp_path: Path) -> None:
    config = make_config(tmp_path, f"temporal.{key}")
    words = f"temporal.{key.partition('=')[0]}: {key.partition('=')[2]}, but Moshi"
    with pytest.raises(ValueError, match=words):
        moshi_config(config)
    if config.temporal.kv_channels:  # which transformers' Moshi and STT have
        refuse_unknown_layers(config.temporal)
    else:
        with pytest.raises(ValueError, match=words.partition(":")[0]):
            refuse_unknown_layers(config.temporal)


@pytest.mark.skipif(find_spec("moshi") is None, reason="moshi is not installed")
def test_from_a_text_model_to_a_duplex_one_of_another_vocabulary(tmp_path: Path) -> None:
    """As the command does it: both sides have the native model's logits."""
    path = save(tmp_path / "text", "llama", rms_norm_eps=1e-5)
    text = ["the cat sat on the mat", "a dog ran to the red house", "nine of ten birds sing in the morning"]
    for file, size in ((path / "tokenizer.model", 96), (tmp_path / "new.model", 64)):
        file.write_bytes(train_tokenizer(text, vocabulary_size=size, languages=["en"]).model)
    one_way = ("streams.num_given_codebooks=0", "streams.delays=[0, 0, 1, 1, 1]", "model.layernorm_epsilon=1e-5")
    write_config(run_config(tmp_path, *one_way), tmp_path / "run.toml")
    conversion = Conversion(
        source=path,
        destination=tmp_path / "moshi",
        source_format="llama",
        target_format="moshi",
        config=tmp_path / "run.toml",
        num_given_codebooks=6,
        tokenizer=tmp_path / "new.model",
    )
    report = convert(conversion)
    assert [agreement.what.split(" of ")[1].split()[0] for agreement in report.agreements] == ["llama", "moshi"]
    assert max(agreement.largest_difference or 0 for agreement in report.agreements) < 1e-4
    streams = open_moshi(tmp_path / "moshi").config.streams
    assert (streams.text_cardinality, streams.num_given_codebooks, streams.text_pad_id) == (64, 6, 3)
    assert (tmp_path / "moshi" / "tokenizer.model").read_bytes() == (tmp_path / "new.model").read_bytes()
    assert [note.split()[0] for note in report.notes[:3]] == ["temporal", "vocabulary:", "streams:"]


def test_what_may_be_left_out_is_noted(tmp_path: Path) -> None:
    rope = {**LLAMA3, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    path = save(tmp_path / "text", "llama", rope_parameters=rope)
    config = run_config(tmp_path, "model.layernorm_epsilon=1e-8", context=40)
    model = open_text_model(path, config=config, drop=("rope_scaling", "rms_norm_eps"))
    assert {note.split()[0] for note in model.notes} >= {"rope_scaling", "rms_norm_eps"}
    assert text_difference(built(model), path, model.config) < 1e-4
    with pytest.raises(ValueError, match="--drop biases"):
        open_text_model(path, config=config, drop=("biases",))


def test_a_tensor_that_nothing_reads_is_not_lost_in_silence(tmp_path: Path) -> None:
    path = save(tmp_path, "llama")
    state = load_file(path / "model.safetensors")
    save_file({**state, "model.layers.0.adapter.weight": torch.ones(2)}, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensor model\.layers\.0\.adapter\.weight is none of a llama model"):
        open_text_model(path)


def test_what_old_files_hold_besides_changes_nothing(tmp_path: Path) -> None:
    path = save(tmp_path, "llama", dtype=torch.bfloat16)
    state = load_file(path / "model.safetensors")
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    save_file(state | old, path / "model.safetensors")
    model = open_text_model(path)
    assert {one.dtype for one in model.weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_precision_is_kept(kind: torch.dtype, tmp_path: Path) -> None:
    model = open_text_model(save(tmp_path, "qwen3-tied", dtype=kind))
    exact = model.weights["text_head.weight"].read()
    assert torch.equal(exact.to(kind), load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"])
    assert model.config.precision.recipe == ("bf16" if kind is torch.bfloat16 else "fp32")
    assert any("FP16" in note for note in model.notes) is (kind is torch.float16)
