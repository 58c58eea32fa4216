"""A model from one format to another: read, changed, written aside, verified, and put into place."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from megaspeech.checkpoint.checksums import Checksum, read_checksums
from megaspeech.config import read_config
from megaspeech.conversion import companions, verify
from megaspeech.conversion.deferred import Deferred
from megaspeech.conversion.formats import FORMATS, NATIVE, TARGETS, Format, function
from megaspeech.conversion.growth import grow_streams
from megaspeech.conversion.native_writing import write_native
from megaspeech.conversion.rules import forget
from megaspeech.conversion.safetensors_files import write_safetensors
from megaspeech.conversion.stored import StoredModel, kept_in
from megaspeech.conversion.verify import Agreement
from megaspeech.conversion.vocabulary import swap_vocabulary
from megaspeech.conversion.writing import Aside, Progress, aside, refuse_existing

REPORT = "conversion.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Conversion:
    """What the command asks for.

    Attributes:
        source, destination: folders; the source may be a safetensors file.
        source_format, target_format: of `formats.FORMATS`.
        dtype: a key of `DTYPES`; None keeps the source's.
        tokenizer: to go with the model; where it is another than the model's own, the vocabulary is changed.
        old_tokenizer: the model's own, where the source does not know it.
        codec: to go with the model, where the source does not know it, or instead.
        num_codebooks, num_given_codebooks: that the model is to have; None leaves them.
        config: file of a run's config, for a model that starts from a text model.
        drop: what the reader may leave out, by name.
        lora: low-rank changes to fold in.
        int8: matrices in eight bits.
        max_shard_bytes: of a safetensors file; None writes one.
        verify: compare both sides.
    """

    source: Path
    destination: Path
    source_format: str
    target_format: str
    dtype: str | None = None
    tokenizer: Path | None = None
    old_tokenizer: Path | None = None
    codec: Path | None = None
    num_codebooks: int | None = None
    num_given_codebooks: int | None = None
    config: Path | None = None
    drop: tuple[str, ...] = ()
    lora: Path | None = None
    int8: bool = False
    max_shard_bytes: int | None = None
    verify: bool = True


OF_A_READER = {"drop": (), "lora": None, "config": None}
"""Options that only some readers take, and their values when not given."""
OF_A_WRITER = {"int8": False}
"""Of some writers."""


@dataclass(frozen=True)
class Report:
    """What was done. Bytes are those of the tensors written; the peak is this process's resident memory."""

    num_tensors: int
    num_bytes: int
    seconds_of_converting: float
    seconds_of_verifying: float
    peak_memory_bytes: int
    files: Mapping[str, Checksum]
    agreements: tuple[Agreement, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def gigabytes_per_second(self) -> float:
        """Of tensors written, everything but the verification counted, the source's checksums too."""
        return self.num_bytes / self.seconds_of_converting / 1e9


def convert(conversion: Conversion, *, progress: Progress = lambda _: None, total: Progress = lambda _: None) -> Report:
    """Convert; the destination is there when all is written and verified, and not before.

    A conversion that was killed, or ran out of disk, goes on where it was when it is asked for again.

    Args:
        conversion: what is asked for.
        progress: is told how many bytes more of the tensors are written.
        total: is told, before, how many there will be.

    Raises:
        ValueError: names the file, tensor or key that is wrong, and the remedy; the destination is as it was.
        OSError: of the disk.
    """
    started = time.perf_counter()
    source_format = _source_format(conversion)
    conversion = replace(conversion, codec=conversion.codec and companions.codec_at(conversion.codec))
    refuse_existing(conversion.destination)
    given = {name: getattr(conversion, name) for name in source_format.options}
    if given.get("config"):
        given["config"] = read_config(given["config"])
    opened = function(source_format.opens)(conversion.source, **given)
    model = _changed(opened, conversion)
    writer = _NativeWriter(model, conversion) if conversion.target_format == NATIVE else _Foreign(model, conversion)
    total(writer.num_bytes)
    request = _request(conversion)
    with aside(conversion.destination, request=request, num_bytes=writer.num_bytes + writer.num_bytes_beside) as folder:
        (folder.path / REPORT).unlink(missing_ok=True)  # of a process that was killed after it
        files = writer.write(folder, progress=progress)
        forget()
        written, folder.keep = time.perf_counter(), True
        agreements, notes = _verify(opened, model, conversion, folder.path) if conversion.verify else ((), ())
        report = Report(
            num_tensors=writer.num_tensors,
            num_bytes=writer.num_bytes,
            seconds_of_converting=written - started,
            seconds_of_verifying=time.perf_counter() - written,
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            files=files,
            agreements=agreements,
            notes=(*model.notes, *writer.notes, *notes),
        )
        content = {"conversion": request, **asdict(report)}
        (folder.path / REPORT).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        folder.finish(conversion.destination)
    return report


def _changed(opened: StoredModel, conversion: Conversion) -> StoredModel:
    """The model as it is to be written."""
    model = _with_vocabulary(opened, conversion)
    own, given = conversion.num_codebooks, conversion.num_given_codebooks
    model = grow_streams(model, num_codebooks=own, num_given_codebooks=given)
    model = companions.with_companions(model, tokenizer=conversion.tokenizer, codec=conversion.codec)
    return in_precision(model, conversion.dtype)


def _with_vocabulary(model: StoredModel, conversion: Conversion) -> StoredModel:
    """With the rows of the tokenizer that is to go with the model, if it is known to be another than the model's."""
    beside = conversion.source / "tokenizer.json"  # of text models; no sentencepiece model lies there
    old = conversion.old_tokenizer or model.companions.tokenizer or (beside if beside.is_file() else None)
    new = conversion.tokenizer
    if new is None or old is None or new.read_bytes() == old.read_bytes():
        return model
    return swap_vocabulary(model, tokenizer=new, old_tokenizer=old)


def in_precision(model: StoredModel, dtype: str | None) -> StoredModel:
    """The model with all its numbers in another precision."""
    if dtype is None:
        return model
    weights = {name: one.to(DTYPES[dtype]) for name, one in model.weights.items()}
    return replace(model, config=kept_in(model.config, DTYPES[dtype]), weights=weights)


def _source_format(conversion: Conversion) -> Format:
    """The source's; options that the two formats have no use for are refused, and files that are not there."""
    source = FORMATS[conversion.source_format]
    for name, default in OF_A_READER.items():
        if getattr(conversion, name) != default and name not in source.options:
            takers = ", ".join(other for other, form in FORMATS.items() if name in form.options)
            raise ValueError(f"--{name}: is for --from {takers}, not for --from {conversion.source_format}")
    assert conversion.target_format in TARGETS, conversion.target_format
    target = FORMATS[conversion.target_format]
    for name, default in OF_A_WRITER.items():
        if getattr(conversion, name) != default and name not in target.writer_options:
            takers = ", ".join(other for other, form in FORMATS.items() if name in form.writer_options)
            raise ValueError(f"--{name}: is for --to {takers}, not for --to {conversion.target_format}")
    if conversion.max_shard_bytes is not None and not target.takes_shards:
        raise ValueError(f"--max-shard-size: what reads --to {conversion.target_format} wants one file; leave it out")
    for name in ("tokenizer", "old_tokenizer", "codec"):
        path = getattr(conversion, name)
        if path is not None and not (companions.codec_at(path) if name == "codec" else path.is_file()):
            raise ValueError(f"--{name.replace('_', '-')}: there is no {path}")
    if conversion.old_tokenizer is not None and conversion.tokenizer is None:
        raise ValueError("--old-tokenizer: it is for a change of vocabulary; name the new tokenizer by --tokenizer")
    if conversion.dtype == "fp16" and conversion.target_format == NATIVE:
        raise ValueError("--dtype fp16: no run keeps parameters in FP16; take bf16 or fp32")
    return source


def _request(conversion: Conversion) -> dict[str, Any]:
    """What is asked for, as JSON has it, with the sizes and times of the files that are read."""
    values: dict[str, Any] = {}
    for one in fields(conversion):
        value = getattr(conversion, one.name)
        values[one.name] = _seen(value) if isinstance(value, Path) and one.name != "destination" else value
    values.pop("destination")
    return json.loads(json.dumps(values))


def _seen(path: Path) -> list[Any]:
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [str(path.absolute()), *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]


class _NativeWriter:
    """Writes a checkpoint of ours."""

    num_bytes_beside = 0

    def __init__(self, model: StoredModel, conversion: Conversion) -> None:
        self.model, self.conversion = model, conversion
        self.num_tensors = len(model.weights)
        self.num_bytes = sum(one.num_bytes for one in model.weights.values())
        inside = model.companions.model_with_mimi
        self.notes = [f"a checkpoint of ours holds no codec: the Mimi inside {inside} stays there"] if inside else []

    def write(self, folder: Aside, *, progress: Progress) -> Mapping[str, Checksum]:
        write_native(self.model, folder, manifest=companions.manifest(self.model), progress=progress)
        return read_checksums(folder.path)


class _Foreign:
    """Writes weights as safetensors, small files, and what goes with the model."""

    def __init__(self, model: StoredModel, conversion: Conversion) -> None:
        self.conversion = conversion
        form = FORMATS[conversion.target_format]
        given = {name: getattr(conversion, name) for name in form.writer_options}
        self.files = function(form.files)(model, **given)
        self.notes = self.files.notes
        weights = [*self.files.weights.values()]
        weights += [one for others in self.files.weights_beside.values() for one in others.values()]
        self.num_tensors, self.num_bytes = len(weights), sum(one.num_bytes for one in weights)
        self.num_bytes_beside = companions.num_bytes(self.files.copies)

    def write(self, folder: Aside, *, progress: Progress) -> Mapping[str, Checksum]:
        weights: dict[str, Deferred] = self.files.weights
        size = self.conversion.max_shard_bytes
        written = write_safetensors(weights, folder, max_shard_bytes=size, progress=progress)
        for name, others in self.files.weights_beside.items():
            written |= write_safetensors(others, folder, name=name, progress=progress)
        for name, content in self.files.small_files.items():
            (folder.path / name).write_bytes(content)
        companions.copy(self.files.copies, folder.path)
        return folder.checksums(written)


def _verify(
    opened: StoredModel, model: StoredModel, conversion: Conversion, path: Path
) -> tuple[tuple[Agreement, ...], tuple[str, ...]]:
    """Both sides with the native model between them; (what agrees, what was not compared and why)."""
    lack = verify.lack_of_memory(model)
    sides = [(opened, conversion.source, conversion.source_format), (model, path, conversion.target_format)]
    if conversion.lora is not None or (conversion.drop and conversion.source_format == "moshi"):
        del sides[0]  # the source's runtime computes without what is folded in, and with what is left out
    if conversion.int8:
        del sides[-1]  # which has been rounded
    agreements, is_compared = [], False
    for side, files, name in sides:
        if FORMATS[name].difference and lack is None:
            difference = function(FORMATS[name].difference)
            agreements.append(verify.logits_agree(side, files, runtime=name, difference=difference))
            is_compared = files is path
    if not is_compared:
        written = function(FORMATS[conversion.target_format].opens)(path)
        agree = verify.rounded_tensors_agree if conversion.int8 else verify.tensors_agree
        agreements.append(agree(model, written, path=path))
    return tuple(agreements), (lack,) if lack else ()
