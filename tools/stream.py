"""Speak to a converted folder, frame by frame: `python tools/stream.py FOLDER IN.wav --task st-ja-en`.

What the model writes is printed as it comes; what it says goes to --output, or to the speakers with --microphone.
`--task tts-ja --text "..."` says a text. Ctrl-C ends a session with the microphone.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from megaspeech.streaming.live import LiveSession, Said
    from megaspeech.streaming.sound import Play


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    warnings.filterwarnings("ignore")
    options = _parser().parse_args(arguments)
    try:
        _stream(options)
    except (ValueError, ImportError, OSError) as error:
        print(f"stream: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="made by tools/convert_checkpoint.py --to moshi")
    parser.add_argument("sound", nargs="?", help="what the model hears: a sound file of any rate and channels")
    parser.add_argument("--microphone", action="store_true", help="hear the microphone, and play what the model says")
    parser.add_argument("--task", help="what is asked, such as asr-en, st-ja-en, tts-ja; none for Moshi's own models")
    parser.add_argument("--text", help="what to say, for tts")
    parser.add_argument("--output", help="WAV for what the model says")
    parser.add_argument("--realtime", action="store_true", help="hear the file as fast as it was spoken")
    parser.add_argument("--timestamps", action="store_true", help="a line for every piece of text, with its time")
    parser.add_argument("--device", default="auto", help="such as cuda (default: the accelerator, if there is one)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: bf16 on an accelerator, fp32 on a CPU")
    parser.add_argument("--temperature", type=float, help="draw tokens; without, the most likely ones are taken")
    return parser


def _stream(options: argparse.Namespace) -> None:
    from megaspeech.streaming.folder import open_folder
    from megaspeech.streaming.live import LiveSession, task_of
    from megaspeech.streaming.runtime import place_of

    if (options.sound is not None) + options.microphone + (options.text is not None) != 1:
        raise ValueError("give one of a sound file, --microphone and --text")
    device, dtype = place_of(options.device, dtype=options.dtype)
    served = open_folder(options.folder, device=device, dtype=dtype)
    task = task_of(options.task, served)
    if not options.microphone and options.output is None and task is not None and task.speaks:
        raise ValueError(f"--output is missing: {task.key} speaks; name a WAV for what it says")
    with ExitStack() as opened:
        session = LiveSession(served, task=task, text=options.text, temperature=options.temperature)
        sound, plays = _ends(options, session=session, opened=opened)
        opened.enter_context(session)
        for said in session.run(sound):
            _show(said, seconds=said.frame / session.frame_rate if options.timestamps else None)
            for play in plays:
                play(said.samples_N)
    print()


def _ends(
    options: argparse.Namespace, *, session: LiveSession, opened: ExitStack
) -> tuple[Iterable[np.ndarray], list[Play]]:
    """Where the sound comes from, and where it goes."""
    from megaspeech.streaming.sound import in_real_time, microphone_and_speakers, read_frames, wav_writer

    shape, sound, plays = {"sample_rate": session.sample_rate, "frame_size": session.frame_size}, [], []
    if options.microphone:
        sound, speakers = opened.enter_context(microphone_and_speakers(**shape))
        plays.append(speakers)
    elif options.sound is not None:
        sound = read_frames(options.sound, **shape)
        sound = in_real_time(sound, frame_rate=session.frame_rate) if options.realtime else sound
    if options.output is not None:
        plays.append(opened.enter_context(wav_writer(options.output, sample_rate=session.sample_rate)))
    return sound, plays


def _show(said: Said, *, seconds: float | None) -> None:
    if said.text:
        stamped = said.text if seconds is None else f"{seconds:7.2f} s  {said.text.strip()}\n"
        print(stamped, end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
