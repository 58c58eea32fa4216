"""Export a checkpoint to Kyutai's moshi runtime: `python tools/export_moshi.py CHECKPOINT OUTPUT`.

CHECKPOINT is a folder `step_...` of any layout. Writes OUTPUT/config.json and OUTPUT/model.safetensors, loads them with
the real runtime and prints the largest difference of logits on the same codes; more than 1e-4 (FP32) is a failure.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

TOLERANCE = 1e-4


def main(arguments: list[str]) -> int:
    """Run; returns the exit status."""
    if len(arguments) != 2:
        print(__doc__)
        return 2
    warnings.filterwarnings("ignore")
    checkpoint, output = map(Path, arguments)
    try:
        difference = _export(checkpoint, output)
    except ValueError as error:
        print(f"export_moshi: {error}", file=sys.stderr)
        return 1
    print(f"{output}: logits differ from the runtime's by at most {difference:.1e} (text and audio)")
    return 0 if difference <= TOLERANCE else 1


def _export(checkpoint: Path, output: Path) -> float:
    from megaspeech.checkpoint import moshi, state
    from megaspeech.parallel import groups
    from megaspeech.streaming.agreement import largest_difference
    from megaspeech.streaming.runtime import load_runtime

    try:
        model, config = state.load_whole_model(checkpoint)
        moshi.write_moshi(model.state_dict(), output, config=config)
        return largest_difference(model, load_runtime(output), streams=config.streams)
    finally:
        groups.shut_down()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
