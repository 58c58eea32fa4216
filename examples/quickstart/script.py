"""The script of the quickstart's corpus: who says which digits, how fast, how loud, with which noise.

Everything random is drawn here, from one seed, before a sound is made. A string is in one split only, whatever its
language and task; a speaker who is heard in one split is heard in no other. Choices belong on the
validation split.
"""

from dataclasses import dataclass

import numpy as np
from people import TEST_VARIANTS, TRAIN_VARIANTS, VALID_VARIANTS

from megaspeech.preparation.synthesis.speech import Voice
from megaspeech.preparation.synthesis.variants import DRAWN

ENGLISH = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
JAPANESE = ("零", "一", "二", "三", "四", "五", "六", "七", "八", "九")
KANA = ("ぜろ", "いち", "に", "さん", "よん", "ご", "ろく", "なな", "はち", "きゅう")
WRITTEN = {"en": ENGLISH, "ja": JAPANESE}
SPOKEN = {"en": ENGLISH, "ja": KANA}

ACCENTS = {
    "en-us": 6,
    "en-gb": 4,
    "en-us-nyc": 2,
    "en-gb-x-gbclan": 2,
    "en-gb-x-rp": 2,
    "en-gb-scotland": 2,
    "en-029": 1,
}
# Open JTalk's one voice as many: (factor on the resonances, semitones), from a big low voice to a child's.
TRAIN_BODIES = (
    *((0.78, -12), (0.78, -10), (0.78, -8), (0.8, -6), (0.82, -6), (0.82, -4), (0.86, -12), (0.86, -10), (0.86, -8)),
    *((0.86, -4), (0.88, -4), (0.91, -10), (0.91, -6), (0.96, -8), (0.96, -4), (0.96, 1), (0.96, 5), (1.0, -2)),
    *((1.0, 3), (1.0, 6), (1.06, 4), (1.06, 7), (1.12, 2), (1.12, 4), (1.12, 6)),
)
VALID_BODIES = ((0.82, -10), (0.91, -2), (1.06, 0))
TEST_BODIES = ((0.8, -9), (0.84, -7), (0.89, -8), (0.98, 2), (1.09, 3))
BODIES = {"train": TRAIN_BODIES, "valid": VALID_BODIES, "test": TEST_BODIES}
VARIANTS = {"train": TRAIN_VARIANTS, "valid": VALID_VARIANTS, "test": TEST_VARIANTS}
BODY_PACES = (0.75, 0.9, 1.05)  # few, because each word of a body is synthesised once per pace
BODY_SPREAD = 0.06  # bodies to train on run by up to this much faster or slower, which costs next to nothing

OWN_VOICE = {"en": Voice("espeak", "en-us+klatt5"), "ja": Voice("open_jtalk", "mei")}


@dataclass(frozen=True)
class CorpusSettings:
    """How much of what; the defaults are the quickstart's.

    Attributes:
        seed: of everything drawn.
        heard: training strings heard, each language (every one an `asr` and an `st` line).
        own: training strings in the model's own voice, each language (`tts`).
        pairs: training pairs, Japanese heard and English answered (`s2st`).
        valid: validation lines of each task and direction.
        test_heard, test_own_en, test_own_ja, test_pairs: test strings.
        noisy: share of heard training clips with noise.
        snr_low, snr_high: dB, range of the noise.
        drawn: share of espeak-ng's training clips in a voice drawn for that clip.
        tract_spread: espeak-ng's training voices have their resonances moved by up to this factor either way.
        longest, longest_speaking: seconds, of what is only heard, and of what the model says.
        processes: that share the work. espeak-ng's samples depend on it in the last digits.
    """

    seed: int = 0
    heard: int = 9000
    own: int = 700
    pairs: int = 1200
    valid: int = 24
    test_heard: int = 60
    test_own_en: int = 40
    test_own_ja: int = 20
    test_pairs: int = 40
    noisy: float = 0.6
    snr_low: float = 10.0
    snr_high: float = 30.0
    drawn: float = 0.75
    tract_spread: float = 0.12
    longest: float = 3.9
    longest_speaking: float = 4.8
    processes: int = 2


@dataclass(frozen=True)
class Clip:
    """One recording as drawn, before it is made.

    Attributes:
        kind: "heard", "own" or "pair".
        gaps, lead, trail: seconds of silence between, before and after the words.
        pace, pitch: as in `words.speak`.
        peak_db: level of the loudest sample, dB of full scale.
        snr: dB of speech over noise while words sound; None for none.
        pink: pink noise rather than white.
        noise_seed: of the noise's samples.
        longest: seconds; a clip that comes out longer is spoken faster.
    """

    name: str
    kind: str
    split: str
    language: str
    digits: str
    voice: Voice
    pace: float
    pitch: int
    gaps: tuple[float, ...]
    lead: float
    trail: float
    peak_db: float
    snr: float | None
    pink: bool
    noise_seed: int
    longest: float


def _draw_strings(rng: np.random.Generator, count: int, *, longest: int, taken: set[str], unique: bool) -> list[str]:
    """`count` digit strings of 3 to `longest` digits, none in `taken`; if `unique`, they are put there."""
    found: list[str] = []
    while len(found) < count:
        digits = "".join(str(d) for d in rng.integers(0, 10, rng.integers(3, longest + 1)))
        if digits not in taken:
            found.append(digits)
            if unique:
                taken.add(digits)
    return found


def _draw_voice(
    rng: np.random.Generator, *, language: str, split: str, settings: CorpusSettings
) -> tuple[Voice, float]:
    """A voice and its pace."""
    if language == "ja" and rng.random() < 0.5:
        tract, half_tone = BODIES[split][rng.integers(len(BODIES[split]))]
        speed = float(rng.uniform(1 - BODY_SPREAD, 1 + BODY_SPREAD)) if split == "train" else 1.0
        return Voice("open_jtalk", "mei", tract, half_tone, round(speed, 3)), float(rng.choice(BODY_PACES))
    variant, tract = VARIANTS[split][rng.integers(len(VARIANTS[split]))], 1.0
    if split == "train":
        if rng.random() < settings.drawn:
            variant = f"{DRAWN}{rng.integers(1_000_000):06d}"
        tract = round(1.0 + float(rng.integers(-4, 5)) / 4 * settings.tract_spread, 4)
    weights = np.array(list(ACCENTS.values())) / sum(ACCENTS.values())
    accent = "ja" if language == "ja" else str(rng.choice(list(ACCENTS), p=weights))
    return Voice("espeak", f"{accent}+{variant}" if variant else accent, tract), float(rng.uniform(0.75, 1.25))


def _draw_gaps(rng: np.random.Generator, count: int, *, kind: str, voice: Voice) -> tuple[float, ...]:
    """Silences between words, s. espeak-ng pauses now and then in running speech; single words always have a little."""
    if kind == "pair":
        return tuple(rng.uniform(0.25, 0.5, count))
    if kind == "own":
        return (0.0,) * count
    if voice.engine == "open_jtalk":
        return tuple(rng.uniform(0.0, 0.3, count))
    pausing = rng.choice([0.0, 0.3, 0.8])  # share of the gaps, of this speaker today
    return tuple(np.where(rng.random(count) < pausing, rng.uniform(0.05, 0.3, count), 0.0))


def _draw_clip(rng: np.random.Generator, digits: str, *, name: str, kind: str, split: str, language: str,
               noisy: bool, settings: CorpusSettings) -> Clip:  # fmt: skip
    """Draw how `digits` are said."""
    own = kind == "own"
    voice, pace = _draw_voice(rng, language=language, split=split, settings=settings)
    if own:
        voice, pace = OWN_VOICE[language], 1.0
    return Clip(
        name=name,
        kind=kind,
        split=split,
        language=language,
        digits=digits,
        voice=voice,
        pace=pace,
        pitch=50 if own else int(rng.integers(20, 86)),
        gaps=_draw_gaps(rng, len(digits) - 1, kind=kind, voice=voice),
        lead=0.0 if own else float(rng.uniform(0.1, 0.5)),
        # After its own last word the model learns to stay silent, for a while of any length.
        trail=float(rng.uniform(0.2, 1.6)) if own else float(rng.uniform(0.1, 0.5)),
        peak_db=float(rng.uniform(-16, -1)),
        snr=float(rng.uniform(settings.snr_low, settings.snr_high)) if noisy else None,
        pink=bool(rng.random() < 0.5),
        noise_seed=int(rng.integers(1 << 31)),
        longest=settings.longest if kind == "heard" else settings.longest_speaking,
    )


def draw_clips(settings: CorpusSettings) -> list[Clip]:
    """All clips. Test and validation strings are drawn first, each once; training strings avoid them."""
    counts = {
        "test": (settings.test_heard, settings.test_own_en, settings.test_own_ja, settings.test_pairs),
        "valid": (settings.valid,) * 4,
        "train": (settings.heard, settings.own, settings.own, settings.pairs),
    }
    rng = np.random.default_rng(settings.seed)
    taken: set[str] = set()
    clips: list[Clip] = []
    for split, (heard, own_en, own_ja, pairs) in counts.items():
        wanted = (("heard", "en", heard), ("heard", "ja", heard), ("own", "en", own_en), ("own", "ja", own_ja),
                  ("pair", "ja", pairs))  # fmt: skip
        for kind, language, count in wanted:
            longest = 5 if kind == "pair" else 6
            strings = _draw_strings(rng, count, longest=longest, taken=taken, unique=split != "train")
            for index, digits in enumerate(strings):
                share = settings.noisy if split == "train" else 0.5
                noisy = rng.random() < share if split == "train" else index % 2 == 1
                name = f"{split}-{kind}-{language}-{index:04d}"
                clips.append(_draw_clip(rng, digits, name=name, kind=kind, split=split, language=language,
                                        noisy=noisy and kind != "own", settings=settings))  # fmt: skip
    return clips
