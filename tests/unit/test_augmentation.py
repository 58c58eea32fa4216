"""What is drawn follows from seed and recording alone; what a unit as a whole goes through."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile

from megaspeech.config import read_config
from megaspeech.config.preparation import EFFECTS, AugmentationSection
from megaspeech.data.tasks import Task
from megaspeech.preparation.augmentation import NUM_VOICES, Augmenter, others_of
from megaspeech.preparation.decode import Decoder
from megaspeech.preparation.effects import alter, change_speed
from megaspeech.preparation.recording import Plan, Recording
from megaspeech.preparation.sounds import find_sounds, stretch_of
from megaspeech.preparation.utterance import Utterance, Word

RATE = 24000
pytest.importorskip("soxr")
pytest.importorskip("pyroomacoustics")


def _speech(seconds: float = 2.0, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.1, 0.1, int(seconds * RATE)).astype(np.float32)


def _line(number: int, *, task: str = "asr", speaker: str = "", folder: str = "wav") -> Utterance:
    recording = Recording(Path(f"/data/{folder}/{number}.wav"), duration=2.0)
    return Utterance(
        Task(task, "ja", "ja"),
        text="a b",
        words=(Word("a", 0.2, 0.6), Word("b", 0.7, 1.5)),
        heard=None if task == "tts" else recording,
        spoken=Recording(Path(f"/data/{folder}/{number}-said.wav")) if task in ("tts", "s2st") else None,
        speaker=speaker,
        source_words=(Word("c", 0.1, 0.5),),
    )


UNIT = [_line(number) for number in range(40)]
ALL = AugmentationSection(copies=2, babble=0.5, talker=0.5, room=0.5, speed=0.5, telephone=0.3, level=0.5)


def _versions(section: AugmentationSection, unit=UNIT, *, seed: int = 0) -> list[Utterance]:
    augmenter = Augmenter(section, seed=seed, utterances=unit)
    return [version for line in unit for version in augmenter.versions(line)]


def test_words_follow_the_speed():
    """A click in the middle of each word is heard in the middle of the word's new time."""
    line, plan = UNIT[0], Plan(1, speed=1.1)
    waveform = np.zeros(2 * RATE, dtype=np.float32)
    for word in line.words:
        waveform[int((word.start + word.end) / 2 * RATE)] = 1.0
    heard, altered = change_speed(waveform, 1.1, sample_rate=RATE), line.altered(plan)
    for word in altered.words:
        first, last = int(word.start * RATE), int(word.end * RATE)
        click = first + int(np.abs(heard[first:last]).argmax())
        assert abs(click / RATE - (word.start + word.end) / 2) < 1e-3
    assert altered.source_words[0].end == pytest.approx(0.5 / 1.1)
    assert altered.heard == dataclasses.replace(line.heard, plan=plan) != line.heard
    assert line.words[0].start == 0.2


def test_the_same_is_drawn_in_any_order_and_another_by_another_seed():
    versions = _versions(ALL)
    shuffled = random.Random(1).sample(UNIT, len(UNIT))
    assert set(_versions(ALL, shuffled)) == set(versions)
    augmenter = Augmenter(ALL, seed=0, utterances=UNIT)
    assert augmenter.versions(UNIT[7]) == tuple(versions[21:24])
    assert versions != _versions(ALL, seed=1)
    assert others_of(version.heard for version in versions)


def test_a_unit_that_moves_keeps_its_plans():
    moved = [
        dataclasses.replace(
            line, heard=dataclasses.replace(line.heard, path=Path("/mnt/data/wav") / line.heard.path.name)
        )
        for line in UNIT
    ]
    here, there = ([version.heard.plan for version in _versions(ALL, unit)] for unit in (UNIT, moved))
    assert [plan and (plan.effects, plan.speed, plan.room) for plan in here] == [
        plan and (plan.effects, plan.speed, plan.room) for plan in there
    ]
    assert [one.path.name for plan in here if plan for one in plan.others] == [
        one.path.name for plan in there if plan for one in plan.others
    ]


def test_to_change_one_chance_leaves_the_draws_of_the_others():
    after = _versions(ALL.model_copy(update={"telephone": 1.0}))
    pairs = [(one.heard.plan, other.heard.plan) for one, other in zip(_versions(ALL), after, strict=True)]
    several = [(one, other) for one, other in pairs if one and len(one.effects) > 1]
    assert len(several) > 40
    assert all(dataclasses.replace(one, telephone=True) == other for one, other in several)


def test_copies_stand_beside_the_clean_one():
    versions = Augmenter(ALL, seed=0, utterances=UNIT).versions(UNIT[3])
    assert len(versions) == 3 and versions[0] == UNIT[3]
    assert [version.heard.plan.version for version in versions[1:]] == [1, 2]
    assert versions[1].heard.plan != dataclasses.replace(versions[2].heard.plan, version=1)
    assert all(version.heard.plan.effects for version in versions[1:])


def test_a_share_is_altered_in_place():
    unit = [_line(number) for number in range(400)]
    versions = _versions(AugmentationSection(share=0.3, telephone=0.2, level=0.2), unit)
    altered = [version.heard.plan for version in versions if version.heard.plan]
    assert len(versions) == 400 and 90 < len(altered) < 150
    assert all(plan.effects for plan in altered)
    both = AugmentationSection(share=1.0, copies=1, level=1.0)
    first, second = (version.heard.plan for version in Augmenter(both, seed=0, utterances=unit).versions(unit[0]))
    assert first and second and first != second


def test_chances_are_those_given():
    unit = [_line(number) for number in range(600)]
    section = AugmentationSection(copies=1, level=1.0, babble=0.5, speed=0.1)
    plans = [version.heard.plan for version in _versions(section, unit) if version.heard.plan]
    counts = {name: sum(name in plan.effects for plan in plans) for name in EFFECTS}
    assert counts["level"] >= 595 and 260 < counts["babble"] < 340 and 35 < counts["speed"] < 90
    babble = [layer for plan in plans for layer in plan.layers]
    assert {len(layer.recordings) for layer in babble} == {3, 4, 5, 6, 7, 8}
    assert all(5 <= layer.snr <= 20 for layer in babble)


def test_what_the_model_says_is_left_alone_and_its_clock_kept():
    section = AugmentationSection(copies=1, speed=1.0, level=1.0)
    pairs = [_line(number, task="s2st") for number in range(5)]
    for line in pairs:
        _, altered = Augmenter(section, seed=0, utterances=pairs).versions(line)
        assert altered.heard.plan.effects == ("level",) and altered.heard.plan.speed == 1.0
        assert altered.spoken == line.spoken and altered.words == line.words
    spoken = _line(0, task="tts")
    assert Augmenter(section, seed=0, utterances=[spoken]).versions(spoken) == (spoken,)


def test_none_is_slowed_to_more_than_can_be_trained_on():
    section = AugmentationSection(copies=8, speed=1.0)
    augmenter = Augmenter(section, seed=0, utterances=UNIT)  # of 2 s
    for most, slowest in ((1.9, 1.052), (2.0, 1.0), (2.1, 0.952)):
        speeds = [line.heard.plan.speed for line in augmenter.versions(UNIT[0], max_seconds=most)[1:]]
        assert len(speeds) == 8 and slowest <= min(speeds) and max(speeds) <= 1.1
    assert augmenter.versions(UNIT[0], max_seconds=1.8) == (UNIT[0],)  # it cannot be: it would have to be faster still
    assert min(line.heard.plan.speed for line in augmenter.versions(UNIT[0])[1:]) < 0.95


def test_two_tasks_of_one_recording_share_what_is_made():
    line = UNIT[0]
    translated = dataclasses.replace(line, task=Task("st", "ja", "en"))
    augmenter = Augmenter(ALL, seed=0, utterances=[*UNIT, translated])
    recordings = {version.heard for one in (line, translated) for version in augmenter.versions(one)}
    assert len(recordings) == 3


def test_nobody_talks_behind_himself():
    unit = [_line(number, speaker=f"s{number % 3}") for number in range(30)]
    speakers = {line.heard.path: line.speaker for line in unit}
    section = AugmentationSection(copies=3, babble=1.0, talker=1.0)
    for version in _versions(section, unit):
        if version.heard.plan:
            assert all(speakers[other.path] != version.speaker for other in version.heard.plan.others)
    alone = [_line(0), dataclasses.replace(_line(0), text="again")]
    assert _versions(section, alone) == alone  # nobody else is there, and nothing else was asked for


def test_voices_of_a_unit_are_few_and_short():
    long = [
        dataclasses.replace(_line(number), heard=Recording(Path(f"{number}.wav"), start=5.0, duration=900.0))
        for number in range(300)
    ]
    versions = _versions(AugmentationSection(copies=1, babble=1.0), long)
    others = others_of(version.heard for version in versions)
    assert NUM_VOICES / 2 < len(others) <= NUM_VOICES
    assert all((one.start, one.end, one.duration) == (5.0, 35.0, 30.0) for one in others)


@pytest.mark.parametrize("is_packed", [False, True])  # in an archive, where no header is looked at
def test_no_more_is_decoded_of_a_voice_whose_length_nobody_has_said(tmp_path, is_packed):
    pytest.importorskip("nvidia.dali")
    unit = []
    for number, seconds in enumerate((40.0, 3.0)):
        path = tmp_path / f"{number}.wav"
        soundfile.write(path, _speech(seconds, seed=number), RATE)
        span = (0, path.stat().st_size) if is_packed else None
        unit.append(dataclasses.replace(_line(number), heard=Recording(path, span=span)))
    others = others_of(version.heard for version in _versions(AugmentationSection(copies=2, babble=1.0), unit))
    decoded = {others[index].path.stem: sound for index, sound in Decoder(sample_rate=RATE).decode(others)}
    assert {name: len(sound) / RATE for name, sound in decoded.items()} == {"0": 30, "1": 3}


@pytest.fixture
def noises(tmp_path) -> Path:
    folder = tmp_path / "noise"
    (folder / "deep").mkdir(parents=True)
    for number, seconds in enumerate((1.0, 40.0, 2.0)):
        soundfile.write(folder / "deep" / f"{number}.wav", _speech(seconds, seed=number), RATE)
    (folder / "notes.txt").write_text("not audio")
    return folder


def test_noise_files_from_a_folder_and_a_manifest(noises, tmp_path):
    found = find_sounds(str(noises), key="augmentation.noise_files")
    assert [one.path.name for one in found] == ["0.wav", "1.wav", "2.wav"]
    section = AugmentationSection(copies=4, noise=1.0, noise_files=str(noises))
    others = others_of(version.heard for version in _versions(section))
    assert {one.path.name for one in others} == {"0.wav", "1.wav", "2.wav"}
    (cut,) = (one for one in others if one.path.name == "1.wav")
    assert cut.end - cut.start == pytest.approx(30.0) and 0 <= cut.start <= 10
    manifest = tmp_path / "noise.jsonl"
    lines = [{"audio_filepath": "noise/deep/1.wav", "offset": 3.0, "duration": 5.0}, {"audio_filepath": "/x.wav"}]
    manifest.write_text("\n".join(map(json.dumps, lines)) + "\n")
    listed = find_sounds(str(manifest), key="augmentation.noise_files")
    assert list(listed) == [Recording(noises / "deep/1.wav", 3.0, 8.0, duration=5.0), Recording(Path("/x.wav"))]
    assert stretch_of(listed[1], longest=30.0).path == Path("/x.wav")  # which the decoder will refuse, with its reason


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_noise_in_a_manifest_is_a_stretch_or_of_unknown_length(noises, tmp_path, offset):
    lines = [{"audio_filepath": "noise/deep/1.wav", "duration": seconds, "offset": offset} for seconds in (5.0, -1, "")]
    (tmp_path / "noise.jsonl").write_text("\n".join(map(json.dumps, lines)))
    known, *unknown = find_sounds(str(tmp_path / "noise.jsonl"), key="augmentation.noise_files")
    assert (known.start, known.end) == (offset, offset + 5.0)
    assert [(one.start, one.end, one.duration) for one in unknown] == [(offset, None, None)] * 2
    assert stretch_of(unknown[0], longest=30.0).end == offset + 30.0


def test_names_of_noise_need_not_be_utf8(tmp_path):
    path = tmp_path / os.fsdecode(b"l\xe4rm.wav")
    soundfile.write(tmp_path / "x.wav", _speech(40.0), RATE)
    (tmp_path / "x.wav").rename(path)
    assert stretch_of(Recording(path), longest=30.0).end == 30.0


def test_files_that_are_not_there_are_named(tmp_path):
    for path, complaint in ((tmp_path / "none", "neither a folder"), (tmp_path, "holds no audio")):
        section = AugmentationSection(copies=1, noise=1.0, noise_files=str(path))
        with pytest.raises(ValueError, match=rf"augmentation\.noise_files: .*{complaint}"):
            Augmenter(section, seed=0, utterances=UNIT)
    (tmp_path / "bad.jsonl").write_text('{"audio_filepath": "x.wav"}\n{"path": 3}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: key 'audio_filepath': is missing"):
        find_sounds(str(tmp_path / "bad.jsonl"), key="augmentation.noise_files")


def test_a_whole_unit_as_the_preparation_does_it(noises):
    """Plans first, then what they need is decoded once, then every waveform; windows of any size give the same."""
    section = ALL.model_copy(update={"noise": 0.5, "noise_files": str(noises), "reverberation": (0.2, 0.25)})
    recordings = [version.heard for version in _versions(section)]
    waveforms = {one.heard: _speech(2.0, seed=number) for number, one in enumerate(UNIT)}
    waveforms |= {
        Recording(path): soundfile.read(path, dtype="float32")[0] for path in (noises / "deep").glob("[02].wav")
    }
    background = {one: waveforms[one] for one in others_of(recordings) if one in waveforms}  # 1.wav is not read
    made = {}
    for one in random.Random(0).sample(recordings, len(recordings)):
        clean = waveforms[dataclasses.replace(one, plan=None)]
        made[one] = clean if one.plan is None else alter(clean, one.plan, sample_rate=RATE, background=background)
    assert len(made) == len(recordings) == 120
    assert all(np.array_equal(made[one.heard], waveforms[one.heard]) for one in UNIT)
    for one, waveform in made.items():
        assert one.plan is None or (np.abs(waveform).max() <= 0.9901 and len(waveform) == round(48000 / one.plan.speed))


CONFIG = Path(__file__).parents[2] / "examples" / "quickstart" / "config.toml"


@pytest.mark.parametrize(
    "keys, complaint",
    [
        (["noise_snr=[10,0]"], r"noise_snr: \[10\.0, 0\.0\] is the wrong way round"),
        (["speed_factor=[0.1,1]"], r"speed_factor: .* out of 0\.5 to 2"),
        (["reverberation=[0.1,1]"], r"reverberation: .* out of 0\.2 to 2"),
        (["babble=0.5"], r"babble: alters nothing while share and copies are 0"),
        (["copies=1"], r"copies: 1, but no effect has a chance; set speed or room"),
        (["copies=1", "noise=0.5"], r"noise: noise_files names none"),
        (["share=1.5"], r"share"),
    ],
)
def test_faults_of_the_config(keys, complaint):
    with pytest.raises(ValueError, match=rf"augmentation\.{complaint}"):
        read_config(CONFIG, [f"augmentation.{key}" for key in keys])


def test_it_is_off_unless_asked_for():
    config = read_config(CONFIG, [])
    assert not config.augmentation.is_on
    assert _versions(config.augmentation) == UNIT
    assert read_config(CONFIG, ["augmentation.share=0.5", "augmentation.babble=0.5"]).augmentation.is_on
