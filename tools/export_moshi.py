"""Export a checkpoint to Kyutai's moshi runtime: `python tools/export_moshi.py CHECKPOINT OUTPUT`.

CHECKPOINT is a folder `step_...` of any layout. Writes OUTPUT/config.json and OUTPUT/model.safetensors, loads them with
the real runtime and prints the largest difference of logits on the same codes; more than 1e-4 (FP32) is a failure.
"""

from __future__ import annotations

import shutil
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
    except (ValueError, ImportError) as error:
        print(f"export_moshi: {error}", file=sys.stderr)
        return 1
    print(f"{output}: logits differ from the runtime's by at most {difference:.1e} (text and audio)")
    return 0


def _export(checkpoint: Path, output: Path) -> float:
    """Export aside, check, and rename: a folder OUTPUT holds a model that was checked."""
    from safetensors.torch import save_file

    from megaspeech.checkpoint import state
    from megaspeech.conversion.deferred import Deferred
    from megaspeech.conversion.moshi import WEIGHTS_FILE, moshi_files
    from megaspeech.conversion.stored import StoredModel
    from megaspeech.parallel import groups
    from megaspeech.streaming.agreement import largest_difference
    from megaspeech.streaming.runtime import load_runtime

    aside = output.with_name(output.name + ".part")
    try:
        model, config = state.load_whole_model(checkpoint)
        weights = {name: Deferred.of(parameter.detach()) for name, parameter in model.named_parameters()}
        files = moshi_files(StoredModel(config, weights))
        aside.mkdir(parents=True, exist_ok=True)
        save_file({name: one.read().clone() for name, one in files.weights.items()}, aside / WEIGHTS_FILE)
        for name, content in files.small_files.items():
            (aside / name).write_bytes(content)
        difference = largest_difference(model, load_runtime(aside), streams=config.streams)
    finally:
        groups.shut_down()
    if not difference <= TOLERANCE:
        raise ValueError(f"{aside}: logits differ from the runtime's by {difference:.1e}, more than {TOLERANCE:.0e}")
    shutil.rmtree(output, ignore_errors=True)
    aside.rename(output)
    return difference


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
