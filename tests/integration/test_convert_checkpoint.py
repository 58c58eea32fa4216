"""Conversions as a user runs them: there and back bit for bit, killed at any moment, refused in one line."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import shutil
import subprocess
import sys
from collections import namedtuple
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from native_folders import write_random
from one_rank import one_rank  # noqa: F401  a fixture
from safetensors.torch import load_file, save_file
from small_codecs import save_small
from small_corpus import make_codec, make_tokenizer
from test_tools import ROOT, run_tool

from megaspeech.checkpoint.checksums import find_damage
from megaspeech.conversion import safetensors_files, verify, writing
from megaspeech.conversion.convert import Conversion, convert
from megaspeech.data.tokenizer import train_tokenizer

pytestmark = [
    pytest.mark.usefixtures("one_rank"),
    pytest.mark.skipif(find_spec("moshi") is None, reason="moshi is not installed"),
]
TOOL = "convert_checkpoint.py"
MAIN = runpy.run_path(str(ROOT / "tools" / TOOL))["main"]
TO_MOSHI, TO_NATIVE = ("--from", "native", "--to", "moshi"), ("--from", "moshi", "--to", "native")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`checkpoint/step_00000000` of a random tiny model, its tokenizer and codec."""
    folder = tmp_path_factory.mktemp("conversions")
    (folder / "tokenizer.model").write_bytes(make_tokenizer().model)
    make_codec().save(folder / "codec")
    paths = [f"data.tokenizer={folder}/tokenizer.model", f"codec.path={folder}/codec"]
    write_random(folder / "step_00000000", *paths)
    return folder


@pytest.fixture(scope="module")
def moshi(home: Path) -> Path:
    """The converted folder."""
    done = run_tool(TOOL, *TO_MOSHI, home / "step_00000000", home / "moshi")
    assert done.returncode == 0, done.stderr
    assert "logits of moshi and of the native model on the same codes: largest difference" in done.stdout
    assert "71 tensors, 1,302,016 bytes in" in done.stdout and "GiB of memory" in done.stdout
    return home / "moshi"


def content(folder: Path, *, but: tuple[str, ...] = ("conversion.json",)) -> dict[str, bytes]:
    """Of all files, by name."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name not in but)
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_a_converted_folder_is_whole(home: Path, moshi: Path) -> None:
    """Tokenizer, codec and the run's config go along; every file's checksum is reported."""
    assert (moshi / "tokenizer.model").read_bytes() == (home / "tokenizer.model").read_bytes()
    assert content(moshi / "codec") == content(home / "codec")
    report = json.loads((moshi / "conversion.json").read_text())
    assert report["files"].keys() == content(moshi).keys() >= {"config.json", "megaspeech.toml", "model.safetensors"}
    assert json.loads((moshi / "config.json").read_text())["tokenizer_name"] == "tokenizer.model"
    assert report["agreements"][0]["largest_difference"] < 1e-4 and report["num_bytes"] == 1302016
    assert not list(home.glob("*.part"))


def test_there_and_back(home: Path, moshi: Path) -> None:
    back = home / "back" / "step_00000000"
    assert MAIN([*TO_NATIVE, str(moshi), str(back)]) == 0
    report = json.loads((back / "conversion.json").read_text())
    assert report["agreements"][1]["what"] == "42 tensors read back, all bits equal"
    assert find_damage(back) is None
    first, second = content(home / "step_00000000"), content(back)
    assert first["__0_0.distcp"] == second["__0_0.distcp"]
    assert first["manifest.json"] == second["manifest.json"]  # codec and tokenizer are known by their files
    assert json.loads(first["manifest.json"])["codec"] == "spectral"


def test_another_precision(home: Path, moshi: Path) -> None:
    convert(Conversion(moshi, home / "bf16", "moshi", "native", dtype="bf16"))
    assert 'recipe = "bf16"' in (home / "bf16/config.toml").read_text()
    convert(Conversion(home / "bf16", home / "moshi16", "native", "moshi"))
    mine, theirs = load_file(home / "moshi16/model.safetensors"), load_file(moshi / "model.safetensors")
    assert all(torch.equal(mine[name], tensor.bfloat16()) for name, tensor in theirs.items())


@pytest.mark.parametrize("fits", [True, False])
def test_fp16(fits: bool, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verified either way; its config says what it is read as."""
    monkeypatch.setattr(verify, "ROOM_BESIDE", 0 if fits else 1 << 60)
    source = home / "bf16_run" / "step_00000000"
    if not source.exists():
        write_random(source, f"data.tokenizer={home}/tokenizer.model", "precision.recipe=bf16")
    convert(Conversion(source, tmp_path / "half", "native", "moshi", dtype="fp16"))
    assert {x.dtype for x in load_file(tmp_path / "half/model.safetensors").values()} == {torch.float16}
    assert 'recipe = "fp32"' in (tmp_path / "half/megaspeech.toml").read_text()
    convert(Conversion(tmp_path / "half", tmp_path / "step_00000000", "moshi", "native"))


def killed(source: Path, destination: Path, *formats_and_moments: object) -> list[tuple[int, bool, str | None]]:
    """(moment, whether it was killed, hash of what came out) of conversions that kill themselves."""
    script = [sys.executable, str(ROOT / "tests/killing_conversions.py")]
    command = [*script, *map(str, (source, destination, *formats_and_moments))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("source_format, target_format", [("native", "moshi"), ("moshi", "native")])
def test_killed_at_any_moment(source_format: str, target_format: str, home: Path, moshi: Path, tmp_path: Path) -> None:
    """Killed at one moment after the other, gone on with until it ends by itself: the same bytes as without."""
    source = home / "step_00000000" if source_format == "native" else moshi
    (_, _, expected), *found = killed(source, tmp_path / "out", source_format, target_format, "all")
    assert sum(was_killed for _, was_killed, _ in found) > 10
    results = [result for _, _, result in found if result is not None]
    assert len(results) > 1 and set(results) == {expected}


@pytest.fixture(scope="module")
def unfinished(home: Path) -> Path:
    """The folder of a killed conversion to moshi, `out.part`, and its journal."""
    folder = home / "killed"
    ((_, was_killed, _),) = killed(home / "step_00000000", folder / "out", "native", "moshi", 60)
    assert was_killed
    return folder


@pytest.mark.parametrize("is_damaged", [False, True])
def test_what_is_on_the_disk_is_kept_if_it_is_whole(
    is_damaged: bool, unfinished: Path, home: Path, moshi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(unfinished, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "out.part/model.safetensors"
    lines = [json.loads(line) for line in (tmp_path / "out.journal").read_text().splitlines()]
    kept = [line["ends"][-1] for line in lines if line.get("file") == file.name][-1]
    assert 100_000 <= kept <= file.stat().st_size
    if is_damaged:  # begun anew, or this would be in the result
        content = bytearray(file.read_bytes())
        content[kept - 10] ^= 1
        file.write_bytes(content)
    written: list[str] = []
    monkeypatch.setattr(safetensors_files, "check_finite", lambda _, *, name: written.append(name))
    convert(Conversion(home / "step_00000000", tmp_path / "out", "native", "moshi", verify=False))
    assert (tmp_path / "out" / file.name).read_bytes() == (moshi / file.name).read_bytes()
    assert len(written) == 71 if is_damaged else 0 < len(written) < 50


def failure(*arguments: object) -> str:
    """The one line that the tool, run in this process, ends with."""
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        assert MAIN([*map(str, arguments)]) == 1
    (line,) = errors.getvalue().splitlines()
    return line


def test_refusals(home: Path, moshi: Path, tmp_path: Path) -> None:
    """One line each; nothing is left behind."""
    source, out = home / "step_00000000", tmp_path / "out"
    assert "there is no checkpoint at" in failure(*TO_MOSHI, tmp_path / "step_0", out)
    assert f"{moshi} is there already; name another" in failure(*TO_MOSHI, source, moshi)
    assert "--lora: is for --from moshi" in failure(*TO_MOSHI, "--lora", source, source, out)
    line = failure(*TO_MOSHI, "--max-shard-size", 1, source, out)
    assert line.endswith("--max-shard-size: what reads --to moshi wants one file; leave it out")
    line = failure(*TO_NATIVE, "--dtype", "fp16", moshi, out)
    assert "--dtype fp16: no run keeps parameters in FP16" in line
    tokenizer = moshi / "tokenizer.model"
    assert "--old-tokenizer: " in failure(*TO_MOSHI, "--old-tokenizer", tokenizer, source, out)
    line = failure(*TO_MOSHI, "--tokenizer", tokenizer, "--old-tokenizer", home / "none.model", source, out)
    assert line.endswith(f"--old-tokenizer: there is no {home / 'none.model'}")
    assert not list(tmp_path.iterdir())


def test_ctrl_c(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors_files, "check_finite", interrupted)
    assert MAIN([*TO_MOSHI, str(home / "step_00000000"), str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "convert_checkpoint: stopped; the same command goes on where it was\n"
    monkeypatch.undo()
    assert MAIN([*TO_MOSHI, str(home / "step_00000000"), str(tmp_path / "out")]) == 0


@pytest.fixture
def broken(moshi: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(moshi, tmp_path / "broken"))


def refused(broken: Path, *options: object) -> str:
    """The line that a conversion of a damaged folder ends with."""
    line = failure(*TO_NATIVE, *options, broken, broken.parent / "out")
    assert {path.name for path in broken.parent.iterdir()} == {"broken"}
    return line


def test_a_truncated_file(broken: Path) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "model.safetensors is cut short" in refused(broken)


def test_numbers_that_are_not_finite(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    tensors["transformer.layers.1.gating.linear_out.weight"][3, 4] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    assert "temporal.block.layers.1.mlp.linear_fc2.weight holds nan" in refused(broken)


def test_a_config_that_disagrees_with_its_tensors(broken: Path) -> None:
    values = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**values, "num_layers": 5}))
    (broken / "megaspeech.toml").unlink()
    line = refused(broken)
    assert "transformer.layers.4" in line and "missing" in line


@pytest.fixture(scope="module")
def other_tokenizer(home: Path) -> Path:
    """Of 60 pieces, where the model has 48."""
    texts = ["one two three four five six seven eight nine ten eleven twelve"] * 20
    path = home / "other.model"
    path.write_bytes(train_tokenizer(texts, vocabulary_size=60, languages=("en",)).model)
    return path


def test_a_tokenizer_of_another_size(broken: Path, other_tokenizer: Path) -> None:
    (broken / "tokenizer.model").unlink()
    line = refused(broken, "--tokenizer", other_tokenizer)
    assert "other.model has 60 pieces, and the model's text has 48" in line and "--old-tokenizer" in line


def test_another_vocabulary_and_more_streams(home: Path, other_tokenizer: Path, tmp_path: Path) -> None:
    """The old tokenizer is known, so the rows are put together of its pieces'; new codebooks start from old ones."""
    more = {"tokenizer": other_tokenizer, "num_codebooks": 6, "num_given_codebooks": 6}
    report = convert(Conversion(home / "step_00000000", tmp_path / "out", "native", "moshi", **more))
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert (values["text_card"], values["dep_q"], values["n_q"]) == (60, 6, 12)
    assert (tmp_path / "out/tokenizer.model").read_bytes() == other_tokenizer.read_bytes()
    assert len(report.notes) == 2 and report.agreements[-1].largest_difference < 1e-4


def test_from_a_text_model_to_transformers(tmp_path: Path) -> None:
    """Llama to a native seed, that to transformers' Moshi with a Mimi, each compared with its own runtime."""
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**shape, num_key_value_heads=2, vocab_size=48, rms_norm_eps=1e-8)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    mimi = save_small("mimi", tmp_path / "mimi")
    run = tmp_path / "run.toml"
    run.write_text('[model]\npreset = "tiny"\n[codec]\nname = "mimi"\n')
    native = Conversion(tmp_path / "llama", tmp_path / "step_00000000", "llama", "native", config=run)
    first = convert(native).agreements
    assert [agreement.what.split()[2] for agreement in first[:1]] == ["llama"]
    (tmp_path / "tokenizer.model").write_bytes(make_tokenizer().model)
    beside = {"codec": mimi, "tokenizer": tmp_path / "tokenizer.model"}
    out = Conversion(native.destination, tmp_path / "out", "native", "transformers", max_shard_bytes=10**6, **beside)
    second = convert(out)
    assert second.agreements[0].what == "logits of transformers and of the native model on the same codes"
    assert "model.safetensors.index.json" in second.files


def test_too_small_a_disk(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: usage(10, 5, 1_000_000))
    with pytest.raises(
        ValueError, match=f"{tmp_path} has 1,000,000 bytes free, and the conversion takes .*; make room"
    ):
        convert(Conversion(home / "step_00000000", tmp_path / "out", "native", "moshi"))
    assert not list(tmp_path.iterdir())


def test_what_is_unfinished_is_another_s(unfinished: Path, home: Path, tmp_path: Path) -> None:
    source = home / "step_00000000"
    line = failure(*TO_MOSHI, "--dtype", "bf16", source, unfinished / "out")
    assert "out.part is an unfinished conversion with other dtype, verify; finish it by its own command" in line
    (tmp_path / "in_the_way.part").mkdir()
    line = failure(*TO_MOSHI, source, tmp_path / "in_the_way")
    assert "in_the_way.part is in the way and no unfinished conversion" in line


def test_logits_that_disagree(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written is left to be looked into, and is not put into place."""
    monkeypatch.setattr(verify, "moshi_difference", lambda *_: 2e-4)
    with pytest.raises(ValueError, match=r"out.part: the logits of moshi differ .* by 2.0e-04, more than 1.0e-04"):
        convert(Conversion(home / "step_00000000", tmp_path / "out", "native", "moshi"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.journal", "out.part"]


def test_two_models_do_not_fit(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "ROOM_BESIDE", 1 << 60)
    report = convert(Conversion(home / "step_00000000", tmp_path / "out", "native", "moshi"))
    assert [agreement.what for agreement in report.agreements] == ["42 tensors read back, all bits equal"]
    assert any("logits are not compared: both models take" in note for note in report.notes)


def test_what_is_read_back_and_differs(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "ROOM_BESIDE", 1 << 60)
    monkeypatch.setattr(safetensors_files, "check_finite", lambda tensor, **_: tensor.view(-1)[-1].add_(1))
    with pytest.raises(ValueError, match=r"out.part: tensor .* is not the one that was read; do not use it"):
        convert(Conversion(home / "step_00000000", tmp_path / "out", "native", "moshi"))
