"""`python tests/killing_conversions.py SRC DST FROM TO MOMENT...`: converts in processes that kill themselves.

Each is forked of this one, which has imported everything and started no thread, and converts in small portions until
the MOMENT-th of the calls in `MOMENTS`; 0 is never, `all` every seventh that there is and the last ones. Where DST
comes to be, its content is hashed and it is removed. Prints a list of JSON: [moment, whether killed, hash or null].
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megaspeech.conversion import native_writing, safetensors_files, writing
from megaspeech.conversion.convert import REPORT, Conversion, convert

MOMENTS = (
    (safetensors_files, "check_finite"),
    (native_writing, "check_finite"),
    (writing, "_append"),
    (writing, "_sync"),
    (os, "fsync"),
    (Path, "write_text"),
    (Path, "write_bytes"),
    (Path, "rename"),
    (Path, "unlink"),
)
"""Before each tensor, before and after each line of the journal, around small files and renames."""


def killed_at(moment: int, conversion: Conversion) -> int:
    """Convert, and die on the way; 0 if it did, else how many moments there were."""
    child = os.fork()
    if not child:
        status = 255
        try:
            status = _convert(moment, conversion)
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    if os.WIFSIGNALED(ended):
        assert os.WTERMSIG(ended) == signal.SIGKILL, ended
        return 0
    assert os.WEXITSTATUS(ended) < 255
    return os.WEXITSTATUS(ended)


def _convert(moment: int, conversion: Conversion) -> int:
    counted = 0

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            nonlocal counted
            counted += 1
            if counted == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return step

    writing.MARK_EVERY, native_writing.FILE_BYTES = 100_000, 400_000
    for place, name in MOMENTS:
        setattr(place, name, counting(getattr(place, name)))
    convert(conversion)
    return counted


def _taken(folder: Path) -> str | None:
    """The hash of a folder's files but for the report, which holds the time taken; the folder is removed."""
    if not folder.exists():
        return None
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file() and file.name != REPORT):
        digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    shutil.rmtree(folder)
    return digest.hexdigest()


def main(arguments: list[str]) -> None:
    """Run."""
    warnings.filterwarnings("ignore")
    source, destination, source_format, target_format, *moments = arguments
    conversion = Conversion(Path(source), Path(destination), source_format, target_format, verify=False)
    found: list[tuple[int, bool, str | None]] = []
    if moments == ["all"]:
        num_moments = killed_at(0, conversion)
        found.append((0, False, _taken(conversion.destination)))
        moments = [*map(str, [*range(1, num_moments, 7), *range(num_moments - 3, num_moments + 1)])]
    for moment in map(int, moments):
        found.append((moment, not killed_at(moment, conversion), _taken(conversion.destination)))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
