"""Serve a converted folder to browsers, on Kyutai's `moshi.server`: `python tools/serve.py FOLDER --task s2st-ja-en`.

Open the address that it prints, and speak. One client is served at a time; the next one waits.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    warnings.filterwarnings("ignore")
    options = _parser().parse_args(arguments)
    try:
        _serve(options)
    except (ValueError, ImportError, OSError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="made by tools/convert_checkpoint.py --to moshi")
    parser.add_argument(
        "--task", help="what is asked, such as asr-en, st-ja-en, s2st-ja-en; none for Moshi's own models"
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets the network in (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8998, help="default: %(default)s")
    parser.add_argument("--static", type=Path, help="folder with another page, such as Kyutai's client, built")
    parser.add_argument("--device", default="auto", help="such as cuda (default: the accelerator, if there is one)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: bf16 on an accelerator, fp32 on a CPU")
    parser.add_argument("--temperature", type=float, help="draw tokens; without, a task gets the most likely ones")
    return parser


def _serve(options: argparse.Namespace) -> None:
    from megaspeech.streaming import server
    from megaspeech.streaming.folder import open_folder
    from megaspeech.streaming.live import task_of
    from megaspeech.streaming.runtime import place_of

    static = options.static or server.PAGE
    if not (static / "index.html").is_file():
        raise ValueError(f"--static {static}: there is no index.html in it; name the folder of a built page")
    device, dtype = place_of(options.device, dtype=options.dtype)
    served = open_folder(options.folder, device=device, dtype=dtype)
    speech_server = server.SpeechServer(served, task=task_of(options.task, served), temperature=options.temperature)
    speech_server.warm_up()
    server.run(speech_server.app(static), host=options.host, port=options.port)


if __name__ == "__main__":
    sys.exit(main())
