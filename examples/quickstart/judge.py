"""An independent judge of spoken English digits: pocketsphinx with a grammar that knows digits and nothing else.

It shares nothing with what is trained, so it can say whether a synthesised string is intelligible. The acoustic model
is the one inside the `pocketsphinx` wheel; nothing is downloaded.

As a command it is a judge for `tools/evaluate.py --judge "python examples/quickstart/judge.py"`: paths of wavs on its
standard input, a line of digits for each on its standard output.
"""

import functools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import soxr
from pocketsphinx import Decoder, get_model_path

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
JUDGE_RATE = 16000  # Hz, what the acoustic model was trained on
PEAK = 0.3  # every clip is brought to this peak: recognition fell at full scale
DITHER = 1e-3  # standard deviation; exact digital silence breaks the cepstra
MARGIN_SECONDS = 0.3  # quiet put around the clip, so that the first and last word have a context
LONGEST_PAUSE = 0.2  # seconds
PAUSE_DB = -45.0  # below the loudest 10 ms is silence

# Wide beams, because strings are short and cheap; a low word insertion penalty, because digits follow closely.
SEARCH = {"bestpath": False, "beam": 1e-80, "wbeam": 1e-60, "pbeam": 1e-80, "wip": 0.01}


@functools.cache
def _grammar_path() -> str:
    """Write the digit grammar once for this process and return where."""
    path = Path(tempfile.mkdtemp(prefix="digit_judge_")) / "digits.gram"
    path.write_text(f"#JSGF V1.0;\ngrammar digits;\npublic <digits> = ({' | '.join(DIGIT_WORDS)})+ ;\n")
    return str(path)


class DigitJudge:
    """Hears a waveform and writes the English digits in it."""

    def __init__(self) -> None:
        model = Path(get_model_path()) / "en-us"
        self._decoder = Decoder(
            hmm=str(model / "en-us"),
            dict=str(model / "cmudict-en-us.dict"),
            jsgf=_grammar_path(),
            samprate=JUDGE_RATE,
            loglevel="FATAL",
            **SEARCH,
        )

    def __call__(self, samples: np.ndarray, sample_rate: int) -> list[str]:
        """Recognise digits.

        Args:
            samples: mono waveform `[N]`, any scale.
            sample_rate: Hz.

        Returns:
            English digit words in order; empty if nothing was found. Equal for equal input, whatever was judged before.
        """
        self._decoder.reinit_feat()  # forget the running cepstral mean of earlier clips
        self._decoder.start_utt()
        self._decoder.process_raw(_prepare(samples, sample_rate).tobytes(), full_utt=True)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        return hypothesis.hypstr.split() if hypothesis else []


def _prepare(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """Resample, level, pad and dither; returns 16-bit samples at `JUDGE_RATE`."""
    wave = np.asarray(samples, dtype=np.float32).reshape(-1)
    if sample_rate != JUDGE_RATE:
        wave = soxr.resample(wave, sample_rate, JUDGE_RATE)
    wave = _without_long_pauses(wave)
    peak = float(np.abs(wave).max(initial=0.0))
    wave = np.pad(wave * (PEAK / max(peak, 1e-6)), int(MARGIN_SECONDS * JUDGE_RATE))
    dither = np.random.default_rng(0).normal(0.0, DITHER, len(wave))
    return (np.clip(wave + dither, -1, 1) * 32767).astype("<i2")


def _without_long_pauses(wave: np.ndarray) -> np.ndarray:
    """Shorten silences to `LONGEST_PAUSE`: its grammar has no word for silence, so it hears digits in long ones."""
    hop = JUDGE_RATE // 100
    num_frames = len(wave) // hop
    power = np.square(wave[: num_frames * hop].reshape(num_frames, hop), dtype=np.float64).mean(1)
    silent = power <= power.max(initial=0.0) * 10 ** (PAUSE_DB / 10)
    kept, run = np.ones(len(wave), dtype=bool), 0
    for frame, quiet in enumerate(silent):
        run = run + 1 if quiet else 0
        kept[frame * hop : (frame + 1) * hop] = run * hop <= LONGEST_PAUSE * JUDGE_RATE
    return wave[kept]


def word_errors(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """Substitutions, insertions and deletions between two word lists (Levenshtein distance)."""
    row = list(range(len(hypothesis) + 1))
    for i, wanted in enumerate(reference, start=1):
        diagonal, row[0] = row[0], i
        for j, heard in enumerate(hypothesis, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (wanted != heard))
    return row[-1]


def main() -> int:
    """Judge the wavs whose paths stand on standard input."""
    judge = DigitJudge()
    for line in sys.stdin:
        samples, sample_rate = soundfile.read(line.rstrip("\n"))
        print(" ".join(judge(samples, sample_rate)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
