"""Lhotse's cuts: JSONL of cuts with their recordings, and the cuts of Shar folders, whose audio lies in tars.

Lhotse reads the line; audio is only pointed at (a file, or bytes of a tar), so that it is decoded like all other. What
a cut's supervisions say is put together in order of time: words with the times of `alignment["word"]`, or, where there
is none or it does not fit the text, each supervision as one phrase. `custom` may hold `taskname`, `source_lang` and
`target_lang`; for `s2st` and `s2s` it holds `target_audio`, the recording that the model says, as in NeMo's data sets,
or else an `s2s` cut has two channels, the model's and the user's.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from megaspeech.config.preparation import SourceSection
from megaspeech.data.tasks import Task
from megaspeech.preparation.manifests.archive import find_archive, names_by_stem, span_of
from megaspeech.preparation.manifests.line import DAY, Line, is_number, is_unspaced, joined, squeezed
from megaspeech.preparation.recording import Recording
from megaspeech.preparation.utterance import Utterance, Word

NOT_A_FILE = "audio is not a file"
"""The kind of fault of cuts whose audio only lhotse could make."""
SLACK = 0.1
"""Seconds by which times may stick out of what they belong to, for rounding and frames of aligners."""
SILENCES = ("", "<eps>", "sil", "SIL", "<sil>", "sp", "spn")
"""What aligners write where nothing is said."""
MODEL_CHANNEL, USER_CHANNEL = 0, 1
MODEL_SPEAKERS = ("agent", "assistant")
"""As NeMo's conversations call it, whose user is heard in `recording`."""


def read_line(content: bytes, *, manifest: Path, source: SourceSection) -> list[Utterance]:
    """The utterance of one cut.

    Raises:
        ImportError: lhotse is not installed.
        ValueError: the line is not a cut, or its audio or text cannot be used; names what, and the remedy.
    """
    line = Line.parse(content, manifest=manifest, source=source)
    try:
        return [_utterance(_cut(line), manifest=manifest, source=source)]
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError) as error:  # lhotse checks little
        raise ValueError(f"not a cut: lhotse cannot read it ({type(error).__name__}: {error})") from None


def _utterance(cut: Any, *, manifest: Path, source: SourceSection) -> Utterance:
    said = sorted((one for one in cut.supervisions if (one.text or "").strip()), key=lambda one: one.start)
    if not said:
        raise ValueError(f"no text: no supervision of cut {cut.id!r} has one; leave such cuts out, or transcribe them")
    task = _task(cut, said[0], manifest=manifest, source=source)
    heard, spoken = _recordings(cut, task=task, manifest=manifest)
    own = [one for one in said if task.name != "s2s" or _is_model(one, cut=cut)]
    others = [one for one in said if task.name == "s2s" and not _is_model(one, cut=cut)]
    speakers = {one.speaker or "" for one in own}
    return Utterance(
        task=task,
        text=joined([one.text.strip() for one in own], language=task.target),
        words=_words(own, cut=cut, language=task.target),
        heard=heard,
        spoken=spoken,
        speaker=speakers.pop() if len(speakers) == 1 else "",
        source_words=_words(others, cut=cut, language=task.source),
    )


def import_lhotse() -> Callable[[dict[str, Any]], Any]:
    """Lhotse's function from a JSON object to its own record of a cut.

    Raises:
        ImportError: it is not installed; says what to install.
    """
    try:
        from lhotse.cut.set import deserialize_cut
    except ImportError as error:
        raise ImportError(f"reading Lhotse's cuts needs lhotse ({error}): pip install megaspeech[lhotse]") from None
    return deserialize_cut


def _cut(line: Line) -> Any:
    """The line as Lhotse's own record, which has a recording."""
    deserialize_cut = import_lhotse()
    kind = line.values.get("type")
    if kind in ("MixedCut", "PaddingCut"):
        raise ValueError(f"{NOT_A_FILE}: a {kind} is mixed by lhotse; write such cuts to Shar (cuts.to_shar)")
    if kind not in ("MonoCut", "MultiCut"):
        raise ValueError(
            f"not a cut: its 'type' is {kind!r}; join recordings and supervisions with `lhotse cut simple` first"
        )
    cut = deserialize_cut(line.values)
    _check_times(cut)
    if cut.duration > DAY:
        raise ValueError(f"too long: cut {cut.id!r} of {cut.duration} s is more than a day; give seconds")
    if cut.recording is None:
        raise ValueError(f"no recording: cut {cut.id!r} has none; make cuts of audio, not of features alone")
    return cut


def _check_times(cut: Any) -> None:
    """See that times are numbers."""
    items = [item for one in cut.supervisions for item in (one.alignment or {}).get("word", ())]
    for one in (cut, *cut.supervisions, *items):
        if not (is_number(one.start) and is_number(one.duration)):
            raise TypeError(f"start {one.start!r} or duration {one.duration!r} is not a number")


def _task(cut: Any, supervision: Any, *, manifest: Path, source: SourceSection) -> Task:
    custom = {"lang": supervision.language, **(supervision.custom or {}), **(cut.custom or {})}
    return Line(custom, manifest=manifest, source=source).task()


def _is_model(supervision: Any, *, cut: Any) -> bool:
    """Whether the model says it, in a conversation."""
    if cut.has_custom("target_audio"):
        return (supervision.speaker or "").lower() in MODEL_SPEAKERS
    return supervision.channel in (MODEL_CHANNEL, [MODEL_CHANNEL])


def _recordings(cut: Any, *, task: Task, manifest: Path) -> tuple[Recording | None, Recording | None]:
    """(heard, spoken)"""
    channels = cut.channel if isinstance(cut.channel, list) else [cut.channel]
    if not (task.hears and task.speaks):
        audio = _recording("recording", cut=cut, channels=channels, manifest=manifest)
        return (audio, None) if task.hears else (None, audio)
    if cut.has_custom("target_audio"):
        said = _recording("target_audio", cut=cut, channels=cut.target_audio.channel_ids, manifest=manifest)
        return _recording("recording", cut=cut, channels=channels, manifest=manifest), said
    if task.name == "s2s" and channels == [MODEL_CHANNEL, USER_CHANNEL]:
        sides = {one: _recording("recording", cut=cut, channels=[one], manifest=manifest) for one in channels}
        return sides[USER_CHANNEL], sides[MODEL_CHANNEL]
    raise ValueError(
        f"nothing to say: {task.name} needs what the model says in custom['target_audio'] of cut {cut.id!r}"
        + (" or two channels, the model's and the user's" if task.name == "s2s" else "")
    )


def _recording(field: str, *, cut: Any, channels: list[int], manifest: Path) -> Recording:
    """The stretch of a cut's recording, or of one in its custom fields, that the cut is of."""
    recording = getattr(cut, field)
    changed = [each["name"] for each in map(_as_dict, recording.transforms or ()) if each["name"] != "Resample"]
    if changed:
        raise ValueError(f"{NOT_A_FILE}: cut {cut.id!r} is changed by {', '.join(changed)}; write it to Shar first")
    audio = next((each for each in recording.sources if set(channels) <= set(each.channels)), None)
    if audio is None:
        raise ValueError(f"channels: no file of cut {cut.id!r} has {channels}; make cuts of one file each")
    if len(channels) not in (1, len(audio.channels)):
        raise ValueError(f"channels: cut {cut.id!r} is of {len(channels)} of {len(audio.channels)}; take one or all")
    path, span = _place(audio, field, cut=cut, manifest=manifest)
    is_whole = abs(cut.duration - recording.duration) < 1e-3
    return Recording(
        path,
        start=cut.start,
        end=None if is_whole else cut.end,
        channel=audio.channels.index(channels[0]) if len(channels) < len(audio.channels) else None,
        duration=cut.duration,
        span=span,
    )


def _as_dict(transform: Any) -> dict[str, Any]:
    return transform if isinstance(transform, dict) else transform.to_dict()


def _place(audio: Any, field: str, *, cut: Any, manifest: Path) -> tuple[Path, tuple[int, int] | None]:
    """(file, None), or (tar, where in it)."""
    if audio.type == "file":
        beside = manifest.parent / audio.source
        return (beside if beside.exists() else Path(audio.source)), None  # Lhotse's own are relative to where one is
    if audio.type != "shar":
        raise ValueError(f"{NOT_A_FILE}: audio of cut {cut.id!r} is of type {audio.type!r}; write such cuts to Shar")
    number = manifest.name.removeprefix("cuts").split(".jsonl")[0]
    archive = find_archive(f"{field}{number}.tar", manifest=manifest)
    name = names_by_stem(archive).get(cut.id, "")
    ending = name.rpartition(".")[2]
    if ending in ("", "nodata"):
        raise ValueError(f"not in its archive: there is no whole {field} of cut {cut.id!r} in {archive}")
    if ending in ("llc", "npy"):
        raise ValueError(
            f"{NOT_A_FILE}: the {field} of cut {cut.id!r} in {archive} is an array (.{ending}); "
            "write the Shar folder with flac, opus or wav"
        )
    return archive, span_of(name, archive=archive)


def _words(supervisions: list[Any], *, cut: Any, language: str) -> tuple[Word, ...]:
    """What supervisions say, in time, in order; each as one phrase where their words' times are not in order."""
    phrases = [_phrase(one, cut=cut) for one in supervisions]
    words = [
        word
        for one, phrase in zip(supervisions, phrases, strict=True)
        for word in _aligned(one, phrase, cut=cut, language=language) or [phrase]
    ]
    in_order = all(first.start <= second.start for first, second in pairwise(words))
    return tuple(words if in_order else phrases)


def _phrase(supervision: Any, *, cut: Any) -> Word:
    if supervision.start < -SLACK or supervision.end > cut.duration + SLACK:
        raise ValueError(
            f"text beyond the audio: supervision {supervision.id!r} reaches from {supervision.start} to "
            f"{supervision.end} s, but cut {cut.id!r} to {cut.duration} s; trim it (lhotse cut trim-to-supervisions)"
        )
    start = max(0.0, supervision.start)
    return Word(supervision.text.strip(), start, max(start, min(supervision.end, cut.duration)))


def _aligned(supervision: Any, phrase: Word, *, cut: Any, language: str) -> list[Word]:
    """The words of a supervision with their times; empty where they do not fit its text or its time."""
    items = [one for one in (supervision.alignment or {}).get("word", ()) if one.symbol.strip() not in SILENCES]
    items.sort(key=lambda one: one.start)
    spelled = _spelled(phrase.word, [one.symbol.strip() for one in items], language=language)
    # Lhotse counts alignments from the start of the recording and leaves them alone when it cuts; others count as for
    # supervisions, from the start of the cut.
    for origin in (cut.start, 0.0):
        times = [(one.start - origin, one.end - origin) for one in items]
        if all(phrase.start - SLACK <= start and end <= phrase.end + SLACK for start, end in times):
            return [
                Word(word, max(0.0, start), max(0.0, start, min(end, cut.duration)))
                for word, (start, end) in zip(spelled, times, strict=False)
            ]
    return []


def _spelled(text: str, symbols: list[str], *, language: str) -> list[str]:
    """The text cut into what the aligner took for words, which often leaves out case and punctuation; else empty."""
    if is_unspaced(language):
        return symbols if squeezed(text) == "".join(symbols) else []
    words = text.split()
    same = len(words) == len(symbols) and all(map(_same_letters, words, symbols))
    return words if same else []


def _same_letters(first: str, second: str) -> bool:
    letters = ["".join(filter(str.isalnum, each)).casefold() for each in (first, second)]
    return letters[0] == letters[1]
