"""The quickstart's speech: word times where the sound is, held-out strings and speakers, one corpus from one seed."""

import dataclasses
import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("espeakng_loader")
pytest.importorskip("pyopenjtalk")
pytest.importorskip("pocketsphinx")
soundfile = pytest.importorskip("soundfile")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "quickstart"))

from corpus import ANSWER_DELAY, ANSWER_GAP, FRAME, SAMPLE_RATE, make_corpus, settings_from  # noqa: E402
from judge import DIGIT_WORDS, DigitJudge, word_errors  # noqa: E402
from script import BODIES, ENGLISH, JAPANESE, KANA, OWN_VOICE, VARIANTS, CorpusSettings, draw_clips  # noqa: E402

from megaspeech.preparation.manifests.nemo import read_manifest  # noqa: E402
from megaspeech.preparation.synthesis import words as synthesis  # noqa: E402
from megaspeech.preparation.synthesis.speech import Voice  # noqa: E402
from megaspeech.preparation.synthesis.variants import DRAWN, drawn_variant  # noqa: E402

speak = functools.partial(synthesis.speak, sample_rate=SAMPLE_RATE)

SMALL = CorpusSettings(heard=8, own=4, pairs=4, valid=2, test_heard=6, test_own_en=4, test_own_ja=2, test_pairs=3)
SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("made") / "corpus", settings=SMALL)


def _lines(corpus: Path) -> list[tuple[str, dict]]:
    return [(split, json.loads(line)) for split in SPLITS for line in open(corpus / f"{split}.jsonl", encoding="utf-8")]


def _digits(line: dict) -> str:
    return "".join(
        str((ENGLISH if word["word"] in ENGLISH else JAPANESE).index(word["word"])) for word in line["words"]
    )


def _level(samples: np.ndarray, start: float, end: float) -> float:
    piece = samples[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
    return 10 * np.log10(np.mean(piece**2) + 1e-12)


def _assert_sounds_at(samples: np.ndarray, times: list[tuple[float, float]]) -> None:
    """Loud within each word from edge to edge, silent before, between (where there is a gap) and after."""
    loud = max(_level(samples, a, b) for a, b in times)
    for start, end in times:
        assert _level(samples, start, end) > loud - 20
        assert max(_level(samples, start, start + 0.03), _level(samples, end - 0.03, end)) > loud - 45
    quiet = [(0.0, times[0][0]), (times[-1][1], len(samples) / SAMPLE_RATE)]
    quiet += [(a, b) for (_, a), (b, _) in zip(times, times[1:], strict=False)]
    for start, end in quiet:
        if end - start > 0.05:  # 15 ms on each side: the resolution and the fade
            # A word is cut 40 dB below its peak, and its mean lies up to 6 dB below that.
            assert _level(samples, start + 0.015, end - 0.015) < loud - 34


VOICES = [
    (Voice("espeak", "en-us"), ENGLISH),
    (Voice("espeak", "en-gb-scotland+m1", 1.08), ENGLISH),
    (Voice("espeak", "ja+klatt4"), KANA),
    (Voice("open_jtalk", "mei", 0.86, -7), KANA),
]


@pytest.mark.parametrize("voice, words", VOICES, ids=lambda value: getattr(value, "label", ""))
def test_word_times_are_where_the_words_sound(voice, words):
    spoken = [words[digit] for digit in (3, 7, 0, 8, 2)]
    speech = speak(spoken, voice=voice, gaps=[0.2, 0.15, 0.2, 0.3])
    _assert_sounds_at(speech.samples, list(speech.times))
    gaps = [b - a for (_, a), (b, _) in zip(speech.times, speech.times[1:], strict=False)]
    assert min(gaps) > 0.1  # every gap was heard as one


def test_continuous_speech_has_the_boundaries_of_its_words():
    """In one breath nothing is silent between words; a word cut out at its times is still that word."""
    judge, errors = DigitJudge(), 0
    for digit in range(10):
        speech = speak([ENGLISH[1], ENGLISH[digit], ENGLISH[1]], voice=OWN_VOICE["en"])
        start, end = speech.times[1]
        errors += word_errors([ENGLISH[digit]], judge(speech.samples[round(start * 16000) : round(end * 16000)], 16000))
    assert errors <= 2


def test_tract_moves_resonances_and_keeps_the_pace():
    low, high = (speak([KANA[7]], voice=Voice("open_jtalk", "mei", tract)) for tract in (0.85, 1.15))
    centres = []
    for speech in (low, high):
        power = np.abs(np.fft.rfft(speech.samples)) ** 2
        hertz = np.fft.rfftfreq(len(speech.samples), 1 / SAMPLE_RATE)
        band = hertz > 500
        centres.append((power * hertz)[band].sum() / power[band].sum())
    assert centres[1] > 1.15 * centres[0]
    assert len(high.samples) == pytest.approx(len(low.samples), rel=0.15)


@pytest.mark.parametrize("voice", [Voice("espeak", "xx-yy"), Voice("espeak", "en-us+nobody"), Voice("tape", "x")])
def test_an_unknown_voice_is_named(voice):
    with pytest.raises(ValueError, match=r"voice.*(xx-yy|nobody|tape)"):
        speak(["one"], voice=voice)


def test_times_of_every_line_fit_its_sound(corpus):
    checked = 0
    for _, line in _lines(corpus):
        key = "target_audio_filepath" if line["taskname"] == "s2st" else "audio_filepath"
        samples, rate = soundfile.read(corpus / line[key], dtype="float32")
        assert rate == SAMPLE_RATE and soundfile.info(corpus / line[key]).subtype == "PCM_16"
        assert len(samples) / rate == pytest.approx(line["duration"])
        assert line["duration"] <= (SMALL.longest if line["taskname"] in ("asr", "st") else SMALL.longest_speaking)
        noisy = _level(samples, 0, 0.1) > -70 and line["taskname"] in ("asr", "st")
        if not noisy:
            _assert_sounds_at(samples, [(word["start"], word["end"]) for word in line["words"]])
            checked += 1
    assert checked > 30


def test_held_out_strings_and_speakers(corpus):
    strings, speakers = {split: set() for split in SPLITS}, {split: set() for split in SPLITS}
    for split, line in _lines(corpus):
        strings[split].add(_digits(line))
        if line["taskname"] != "tts":
            name, _, rest = line["speaker"].partition("+")
            speakers[split].add(line["speaker"] if name.startswith("mei") else rest.partition("*")[0])
    assert not strings["test"] & (strings["train"] | strings["valid"])
    assert not strings["valid"] & strings["train"]
    assert not speakers["test"] & (speakers["train"] | speakers["valid"])
    assert not speakers["valid"] & speakers["train"]


def test_the_whole_script_is_held_out_too():
    clips = draw_clips(CorpusSettings())
    held = {clip.digits for clip in clips if clip.split != "train"}
    assert len(held) == sum(clip.split != "train" for clip in clips)
    assert not held & {clip.digits for clip in clips if clip.split == "train"}
    heard = [clip for clip in clips if clip.kind == "heard" and clip.split == "train"]
    assert 0.57 < np.mean([clip.snr is not None for clip in heard]) < 0.63
    assert all(clip.snr is None for clip in clips if clip.kind == "own")
    assert len({clip.voice.label for clip in heard if clip.language == "ja"}) > 100
    assert {len(clip.digits) for clip in heard} == {3, 4, 5, 6}


def test_voices_of_the_splits_are_apart():
    for splits in (VARIANTS, BODIES):
        everyone = [voice for voices in splits.values() for voice in voices]
        assert len(set(everyone)) == len(everyone)
    voices = {split: [] for split in SPLITS}
    for clip in draw_clips(CorpusSettings()):
        if clip.kind != "own":
            voices[clip.split].append(clip.voice)
    drawn = [voice for voice in voices["train"] if DRAWN in voice.name]
    assert len({voice.name for voice in drawn}) > 0.95 * len(drawn)
    assert 0.72 < len(drawn) / sum(voice.engine == "espeak" for voice in voices["train"]) < 0.78
    assert not [voice for split in ("valid", "test") for voice in voices[split] if DRAWN in voice.name]
    assert all(voice.speed == voice.tract == 1.0 for voice in voices["test"] if voice.engine == "espeak")


def test_drawn_voices_are_people_apart_who_are_understood():
    assert drawn_variant(5) == drawn_variant(5) != drawn_variant(6)
    judge, spoken = DigitJudge(), [DIGIT_WORDS[digit] for digit in (4, 0, 9, 1, 7, 5, 2, 8, 3, 6)]
    voices = [Voice("espeak", f"en-us+{DRAWN}{number}") for number in range(8)]
    said = [speak(spoken, voice=voice).samples for voice in voices]
    assert len({len(samples) for samples in said}) > 4
    assert np.mean([word_errors(spoken, judge(samples, SAMPLE_RATE)) for samples in said]) < 0.35 * len(spoken)


def test_the_models_own_voice_is_clean_and_starts_at_once(corpus):
    own = [line for _, line in _lines(corpus) if line["taskname"] == "tts"]
    assert own and {line["speaker"] for line in own} == {voice.label for voice in OWN_VOICE.values()}
    for line in own:
        assert line["words"][0]["start"] < 0.04
        assert 0.15 < line["duration"] - line["words"][-1]["end"] < 1.65


def test_answers_follow_what_is_heard(corpus):
    pairs = [line for _, line in _lines(corpus) if line["taskname"] == "s2st"]
    assert len(pairs) == SMALL.pairs + SMALL.valid + SMALL.test_pairs
    for line in pairs:
        assert soundfile.info(corpus / line["target_audio_filepath"]).frames == round(line["duration"] * SAMPLE_RATE)
        free = 0.0
        for heard, said in zip(line["source_words"], line["words"], strict=True):
            assert JAPANESE.index(heard["word"]) == ENGLISH.index(said["word"])
            earliest = max(heard["end"] + ANSWER_DELAY, free)
            assert earliest - 1e-3 <= said["start"] < earliest + FRAME + 1e-3
            assert said["start"] / FRAME == pytest.approx(round(said["start"] / FRAME), abs=0.01)
            free = said["end"] + ANSWER_GAP


def test_translations_are_one_to_one(corpus):
    by_audio: dict[str, dict[str, dict]] = {}
    for _, line in _lines(corpus):
        by_audio.setdefault(line["audio_filepath"], {})[line["taskname"]] = line
    both = [tasks for tasks in by_audio.values() if "asr" in tasks]
    assert len(both) == 2 * (SMALL.heard + SMALL.valid + SMALL.test_heard)
    for tasks in both:
        assert _digits(tasks["asr"]) == _digits(tasks["st"])
        assert tasks["asr"]["target_lang"] == tasks["asr"]["source_lang"] != tasks["st"]["target_lang"]
        assert [word["start"] for word in tasks["asr"]["words"]] == [word["start"] for word in tasks["st"]["words"]]


def test_megaspeech_reads_the_manifests(corpus):
    for split in SPLITS:
        for utterance in read_manifest(corpus / f"{split}.jsonl"):
            assert utterance.recordings[0].path.is_file()


def test_same_seed_same_corpus_and_another_seed_another(corpus, tmp_path):
    again = make_corpus(tmp_path / "again", settings=SMALL)
    files = sorted(path.relative_to(corpus) for path in corpus.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((corpus / file).read_bytes() == (again / file).read_bytes() for file in files)
    assert draw_clips(SMALL) != draw_clips(dataclasses.replace(SMALL, seed=1))


def test_made_once_and_never_over_something_else(corpus, tmp_path):
    before = (corpus / "corpus.json").stat().st_mtime_ns, corpus.stat().st_ino
    assert make_corpus(corpus, settings=SMALL) == corpus
    assert ((corpus / "corpus.json").stat().st_mtime_ns, corpus.stat().st_ino) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"OUT_DIR: .* is not a corpus; name a new"):
        make_corpus(tmp_path, settings=SMALL)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_killed_run_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    few = CorpusSettings(heard=1, own=1, pairs=0, valid=0, test_heard=0, test_own_en=0, test_own_ja=0, test_pairs=0)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("corpus.os.replace", killed)
        make_corpus(tmp_path / "corpus", settings=few)
    assert not (tmp_path / "corpus").exists()
    assert len(_lines(make_corpus(tmp_path / "corpus", settings=few))) == 6
    assert not (tmp_path / "corpus.partial").exists()


def test_settings_on_the_command_line():
    assert settings_from(["seed=3", "noisy=0.5"]) == CorpusSettings(seed=3, noisy=0.5)
    with pytest.raises(ValueError, match=r"heared=3: no setting 'heared'; did you mean 'heard'"):
        settings_from(["heared=3"])
    with pytest.raises(ValueError, match=r"heard=many: 'many' is not a whole number"):
        settings_from(["heard=many"])


def test_the_judge_understands_the_models_voice_and_not_noise():
    judge = DigitJudge()
    spoken = [DIGIT_WORDS[digit] for digit in (4, 0, 9, 1, 7, 5)]
    samples = speak(spoken, voice=OWN_VOICE["en"]).samples
    assert judge(samples, SAMPLE_RATE) == spoken == judge(0.1 * samples, SAMPLE_RATE)
    noise = np.random.default_rng(0).normal(0, 0.1, len(samples)).astype(np.float32)
    assert word_errors(spoken, judge(noise, SAMPLE_RATE)) >= 4
    assert judge(samples[::-1], SAMPLE_RATE) != spoken


@pytest.mark.parametrize("heard, errors", [("one two", 0), ("one", 1), ("one two two", 1), ("two one", 2), ("", 2)])
def test_word_errors(heard, errors):
    assert word_errors(["one", "two"], heard.split()) == errors
