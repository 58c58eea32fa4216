"""Reading a run: every fault named at once with its key, value and remedy; presets; overrides; and back to TOML."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from megaspeech.config import PRESETS, Config, ConfigError, read_config, write_config

Read = Callable[..., Config]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """`read(overrides..., text=TOML)`: the config of a file with that text."""

    def read(*overrides: str, text: str = '[model]\npreset = "tiny"\n', world_size: int | None = None) -> Config:
        path = tmp_path / "run.toml"
        path.write_text(text)
        return read_config(path, overrides, world_size=world_size)

    return read


def faults_of(read: Read, *overrides: str, **settings: object) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        read(*overrides, **settings)
    return caught.value.faults


def the_fault(read: Read, *overrides: str, **settings: object) -> str:
    """The one fault there is."""
    (fault,) = faults_of(read, *overrides, **settings)
    return fault


@pytest.mark.parametrize(
    "override, fault",
    [
        ("training.train_step=1", "training.train_step: no such key; did you mean 'train_steps'?"),
        ("parallel.tensor_parallel_size=1", "did you mean 'tensor_model_parallel_size'?"),
        ("trainin.train_steps=1", "trainin: no such section; did you mean 'training'?"),
        ("codec.zzz=1", "codec.zzz: no such key; there are name, path"),
        ("model.preset=tinny", "model.preset: no preset 'tinny'; did you mean 'tiny'?"),
    ],
)
def test_unknown_names_have_the_nearest_known_beside_them(read: Read, override: str, fault: str) -> None:
    assert any(fault in line for line in faults_of(read, override))


def test_all_faults_come_at_once(read: Read) -> None:
    text = """
    [model]
    preset = "tiny"
    kernels = "fast"
    [optimizer]
    lr = -1.0
    weight_decai = 0.1
    [parallel]
    tensor_model_parallel_size = 3
    [loss]
    text = nan
    """
    with pytest.raises(ConfigError) as caught:
        read("training.train_steps=0", "nonsense", text=text)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith(f"run.toml: {len(caught.value.faults)} faults") and len(lines) == 1 + len(
        caught.value.faults
    )
    for expected in (
        "model.kernels: 'fast'",
        "optimizer.lr: -1.0",
        "optimizer.weight_decai: no such key; did you mean 'weight_decay'?",
        "loss.text: nan",
        "training.train_steps: 0",
        "'nonsense': overrides are written section.field=value",
        "temporal.num_attention_heads: 4 is not divisible by parallel.tensor_model_parallel_size = 3",
    ):
        assert sum(expected in line for line in lines) == 1, expected


def test_override_with_a_second_dot_is_told_how_tables_are_written(read: Read) -> None:
    fault = the_fault(read, "data.mixture.asr-en=2.0")
    assert fault.startswith("data.mixture.asr-en: overrides are section.field=value")
    assert "data.mixture={key = value, ...}" in fault


def test_one_fault_is_counted_as_one(read: Read) -> None:
    with pytest.raises(ConfigError, match=r"run\.toml: 1 fault\n  training\.train_steps: 0"):
        read("training.train_steps=0")


def test_overrides_are_typed_as_toml_is(read: Read) -> None:
    config = read(
        "training.train_steps=700",
        "optimizer.lr=2e-4",
        "parallel.use_distributed_optimizer=false",
        'run.name="a b"',
        "run.directory=runs/x-1",
        "data.mixture={asr-en = 1, tts-en = 2.5}",
        "streams.delays=[0, 0, 2, 2, 2, 0, 1, 1, 1]",
        "checkpoint.seed_checkpoint=",
        "codec.path=a=b",
    )
    assert (config.training.train_steps, config.optimizer.lr) == (700, 2e-4)
    assert config.parallel.use_distributed_optimizer is False
    assert (config.run.name, config.run.directory) == ("a b", "runs/x-1")
    assert config.data.mixture == {"asr-en": 1.0, "tts-en": 2.5}
    assert config.streams.delays == (0, 0, 2, 2, 2, 0, 1, 1, 1)
    assert (config.checkpoint.seed_checkpoint, config.codec.path) == ("", "a=b")


def test_the_last_word_wins(read: Read) -> None:
    text = '[model]\npreset = "tiny"\n[training]\ntrain_steps = 200\n'
    assert read(text=text).training.train_steps == 200
    assert read("training.train_steps=201", "training.train_steps=202", text=text).training.train_steps == 202
    # A preset named by override, and one of its values changed: the rest of the preset stays.
    config = read("model.preset=digits", "temporal.num_layers=2", text=text)
    assert config.temporal.num_layers == 2 and config.temporal.hidden_size == 192


@pytest.mark.parametrize("override", ["train_steps=1", "training=1", "training.train_steps", ".a=1", "training.=1", ""])
def test_malformed_overrides(read: Read, override: str) -> None:
    assert "section.field=value" in the_fault(read, override)


@pytest.mark.parametrize(
    "overrides, world_size, words",
    [
        (["parallel.tensor_model_parallel_size=2"], 3, "tensor 2 x pipeline 1 = 2 ranks does not divide the 3"),
        (
            ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"],
            6,
            "2 x pipeline 2 = 4 ranks does not divide the 6",
        ),
        (["parallel.sequence_parallel=true"], None, "parallel.sequence_parallel: true needs"),
        (["temporal.hidden_size=66"], None, "temporal.hidden_size: 66 is not divisible by num_attention_heads = 4"),
        (["temporal.kv_channels=15"], None, "temporal.kv_channels: 15 must be even, because RoPE rotates pairs"),
        (["depth.hidden_size=30"], None, "depth.hidden_size: 30 is not divisible by num_attention_heads = 4"),
        (["temporal.num_query_groups=3"], None, "temporal.num_query_groups: 3 does not divide"),
        (["depth.num_query_groups=3"], None, "depth.num_query_groups: 3 does not divide"),
        (["parallel.pipeline_model_parallel_size=3"], None, "temporal.num_layers: 4 is not divisible by"),
        (["training.global_batch_size=36"], None, "global_batch_size: 36 is not divisible by micro_batch_size 8"),
        (["training.global_batch_size=8"], 2, "global_batch_size: 8 is not divisible by micro_batch_size 8 x data"),
        (["optimizer.lr_warmup_steps=1000"], None, "optimizer.lr_warmup_steps: 1000 leaves nothing of"),
        (["streams.delays=[0, 0, 1]"], None, "streams.delays: 3 entries, but there are 9 streams"),
        (["streams.text_pad_id=48"], None, "streams.text_pad_id: 48 is not below text_cardinality = 48"),
        (["model.embedding_gradient=atomic"], None, 'model.embedding_gradient: "atomic" is for kernels = "triton"'),
        (["logging.profile_step_start=3"], None, "logging.profile_step_end: 0 does not follow profile_step_start = 3"),
        (["logging.profile_step_end=3"], None, "logging.profile_step_end: 3 does not follow profile_step_start = 0"),
        (["streams.text_end_pad_id=50"], None, "streams.text_end_pad_id: 50 is not below"),
    ],
)
def test_faults_between_sections(read: Read, overrides: list[str], world_size: int | None, words: str) -> None:
    assert words in the_fault(read, *overrides, world_size=world_size)


@pytest.mark.parametrize(
    "override, key",
    [
        ("temporal.num_attention_heads=2", "temporal.num_attention_heads: 2"),
        ("temporal.ffn_hidden_size=178", "temporal.ffn_hidden_size: 178"),
        ("streams.text_cardinality=50", "streams.text_cardinality: 50"),
    ],
)
def test_what_tensor_parallelism_splits_must_divide(read: Read, override: str, key: str) -> None:
    whole = ["temporal.num_query_groups=4", "parallel.tensor_model_parallel_size=4"]
    assert read(*whole).parallel.tensor_model_parallel_size == 4
    faults = faults_of(read, *whole, override)
    assert any(f"{key} is not divisible by parallel.tensor_model_parallel_size = 4" in fault for fault in faults)


def test_heads_of_odd_width_are_refused(read: Read) -> None:
    """RoPE rotates pairs; the depth transformer has none."""
    read("depth.hidden_size=36")
    fault = the_fault(read, "temporal.hidden_size=36")
    assert "temporal.hidden_size: 36" in fault and "even" in fault


def test_the_depth_transformer_is_not_split(read: Read) -> None:
    read("parallel.tensor_model_parallel_size=2", "depth.ffn_hidden_size=87", "depth.num_attention_heads=1",
         "depth.num_query_groups=1")  # fmt: skip


def test_embedding_rows_split_over_powers_of_two_only(read: Read) -> None:
    sizes = ["temporal.hidden_size=96", "temporal.num_attention_heads=12", "temporal.num_query_groups=6"]
    fault = the_fault(
        read,
        *sizes,
        "temporal.ffn_hidden_size=192",
        "parallel.tensor_model_parallel_size=6",
    )
    assert "parallel.tensor_model_parallel_size: 6 must be a power of two" in fault


def test_world_size_is_checked_only_in_a_launch(read: Read) -> None:
    overrides = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]
    assert read(*overrides) == read(*overrides, world_size=4) == read(*overrides, world_size=8)


def test_a_broken_section_does_not_hide_the_checks_of_the_others(read: Read) -> None:
    faults = faults_of(read, "temporal.num_layers=x", "training.global_batch_size=9")
    assert len(faults) == 2 and "temporal.num_layers: 'x'" in faults[0] and "global_batch_size: 9" in faults[1]


@pytest.mark.parametrize("text", ['training = 3\n[model]\npreset = "tiny"\n', "model = 1\n"])
def test_a_value_in_place_of_a_section(read: Read, text: str) -> None:
    name = text.split(" ")[0]
    assert any(fault.startswith(f"{name}: is a section, not a value") for fault in faults_of(read, text=text))


def test_override_of_a_value_in_place_of_a_section(read: Read) -> None:
    """The file's fault is named; the override does not end in a traceback."""
    text = 'training = 3\n[model]\npreset = "tiny"\n'
    assert any("training: is a section" in fault for fault in faults_of(read, "training.train_steps=4", text=text))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_resolve(read: Read, preset: str) -> None:
    config = read(f"model.preset={preset}")
    assert len(config.streams.delays) == config.streams.num_streams == len(config.streams.cardinalities)
    assert config.temporal.hidden_size == PRESETS[preset]["temporal"]["hidden_size"]


def test_moshi_7b_is_kyutais(read: Read) -> None:
    config = read("model.preset=moshi-7b")
    streams, temporal, depth = config.streams, config.temporal, config.depth
    assert streams.delays == tuple([0] + ([0] + [1] * 7) * 2) and streams.cardinalities == (32000,) + (2048,) * 16
    assert (streams.num_codebooks, streams.text_pad_id, streams.text_end_pad_id) == (8, 3, 0)
    assert (temporal.hidden_size, temporal.num_layers, temporal.num_attention_heads) == (4096, 32, 32)
    assert (temporal.ffn_hidden_size, temporal.context, temporal.rotary_base) == (11264, 3000, 10000)
    assert (depth.hidden_size, depth.num_layers, depth.num_attention_heads, depth.ffn_hidden_size) == (
        1024,
        6,
        16,
        2816,
    )
    assert temporal.num_query_groups == 32 and depth.num_query_groups == 16


def test_preset_without_given_codebooks_has_no_delays_for_them(read: Read) -> None:
    config = read("streams.num_given_codebooks=0", "streams.delays=[0, 0, 1, 1, 1]")
    assert config.streams.num_streams == 5


@pytest.mark.parametrize("preset", PRESETS)
def test_resolved_run_reads_back_equal(read: Read, tmp_path: Path, preset: str) -> None:
    config = read(f"model.preset={preset}", "data.mixture={asr-en = 0.3, st-ja-en = 2}", 'run.name="日本語 \\"x\\""')
    write_config(config, tmp_path / "resolved.toml")
    again = read_config(tmp_path / "resolved.toml")
    assert again == config and again.data.mixture == {"asr-en": 0.3, "st-ja-en": 2.0}


def test_config_is_frozen(read: Read) -> None:
    config = read()
    with pytest.raises(ValidationError):
        config.training.train_steps = 3
    with pytest.raises(ValidationError):
        config.training = None


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: 1 fault\n.*no such file"):
        read_config(tmp_path / "absent.toml", ["training.train_steps=x"])
    with pytest.raises(ConfigError, match="no such file"):
        read_config(tmp_path)


def test_invalid_toml_names_the_place(read: Read) -> None:
    fault = the_fault(read, text='[model]\npreset = "tiny\n')
    assert fault.startswith("not valid TOML") and "line 2" in fault


def test_what_editors_write_before_and_between_is_no_riddle(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b'\xef\xbb\xbf[model]\npreset = "tiny"\n')
    assert read_config(tmp_path / "config.toml").model.preset == "tiny"
    (tmp_path / "config.toml").write_bytes(b"# caf\xe9\n")
    with pytest.raises(ConfigError, match=r"config\.toml: 1 fault\n  not UTF-8: byte 5; convert it with iconv"):
        read_config(tmp_path / "config.toml")


def test_a_schedule_names_a_set_for_every_codebook(read: Read) -> None:
    fault = the_fault(read, "depth.weights_per_step_schedule=[0, 1]")
    assert fault.startswith("depth.weights_per_step_schedule: 2 entries for streams.num_codebooks = 4; give one")


@pytest.mark.parametrize("section, key", [("streams", "cardinality"), ("temporal", "num_layers")])
def test_counts_are_positive_whole_numbers(read: Read, section: str, key: str) -> None:
    for value in ("0", "-1", "1.5", "nan", '"many"'):
        assert any(fault.startswith(f"{section}.{key}: ") for fault in faults_of(read, f"{section}.{key}={value}"))


@pytest.mark.parametrize(
    "override",
    [
        "data.mixture={asr-en = 0}",
        "data.mixture={asr-en = -1.0}",
        "loss.silence_fraction=1.5",
        "loss.speech_fraction=0",
        "optimizer.lr=inf",
    ],
)
def test_weights_and_rates_are_bounded(read: Read, override: str) -> None:
    assert the_fault(read, override).startswith(override.split("=")[0])


TWO_SOURCES = """
[model]
preset = "tiny"
[[sources]]
name = "read-speech"
train = "a.jsonl"
[[sources]]
name = "calls"
format = "moshi"
train = "calls/*.jsonl"
weight = 2.5
"""


def test_sources_are_a_list_that_survives_writing(read: Read, tmp_path: Path) -> None:
    config = read(text=TWO_SOURCES)
    assert [(source.name, source.format, source.weight) for source in config.sources] == [
        ("read-speech", "nemo", 1.0),
        ("calls", "moshi", 2.5),
    ]
    write_config(config, tmp_path / "again.toml")
    assert read_config(tmp_path / "again.toml") == config


@pytest.mark.parametrize(
    "text, fault",
    [
        (TWO_SOURCES.replace("read-speech", "calls"), "sources: 'calls' is the name of several; give each its own"),
        (TWO_SOURCES.replace("weight", "weigth"), "sources[1].weigth: no such key; did you mean 'weight'?"),
        (TWO_SOURCES.replace('"read-speech"', '"../up"'), "sources[0].name: '../up'"),
        ('sources = "a.jsonl"\n[model]\npreset = "tiny"\n', "sources: is a list of tables; write [[sources]]"),
    ],
)
def test_faults_of_sources(read: Read, text: str, fault: str) -> None:
    assert fault in the_fault(read, text=text)
