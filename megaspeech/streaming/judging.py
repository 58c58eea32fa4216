"""What spoken answers say, by a recogniser of the user's: a command that reads paths of wavs and prints texts.

    whisper_judge.py --language {language}

gets one path a line on its standard input and prints one line of text for each, in order, an empty one where it hears
nothing. `{language}` stands for the language that is spoken. It shares nothing with the model, so that it can say
whether speech is intelligible; its own errors count as the model's.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from megaspeech.data.tasks import LANGUAGE


def judges_of(options: Iterable[str]) -> dict[str, str]:
    """`{"en": command, "": command}` of `en=COMMAND` and `COMMAND`."""
    found = {}
    for option in options:
        language, equals, command = option.partition("=")
        named = bool(equals) and LANGUAGE.fullmatch(language)
        found[language if named else ""] = command if named else option
    return found


def judge(command: str, paths: Sequence[Path], *, language: str) -> list[str]:
    """The text that the command hears in each wav.

    Args:
        command: as a shell would split it; no shell is started.
        paths: of the wavs.
        language: such as `en`, put in place of `{language}`.

    Raises:
        ValueError: it cannot be started, fails, or does not print a line for each path; names the command.
    """
    if not paths:
        return []
    asked = [part.replace("{language}", language) for part in shlex.split(command)]
    lines = "".join(f"{path.resolve()}\n" for path in paths)
    try:
        done = subprocess.run(asked, input=lines, capture_output=True, encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"--judge {command}: it cannot be started ({error.strerror}); check its path") from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise ValueError(f"--judge {command}: it ended with status {done.returncode}: {said}")
    *heard, rest = done.stdout.split("\n")  # not splitlines, which parts lines at characters that a text may hold
    heard += [rest] if rest else []
    if len(heard) != len(paths):
        raise ValueError(
            f"--judge {command}: it printed {len(heard)} lines for {len(paths)} wavs; one a wav is wanted, empty where "
            f"nothing is heard, and nothing else on standard output"
        )
    return heard
