"""Train a run: `torchrun --nproc-per-node N -m megaspeech.train CONFIG.toml [section.field=value ...]`.

The same command again goes on from the newest checkpoint.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megaspeech.config import Config


SECONDS_FOR_RANK_0 = 30


def main(arguments: list[str]) -> int:
    """Run; returns the exit status. What a user can mend is one message, on one rank, without a traceback."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 2 if not arguments else 0
    _silence_known_warnings()
    from megaspeech.config import read_config
    from megaspeech.parallel.lifeline import end_with_parent

    if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun, which would leave it behind when killed
        end_with_parent()

    try:
        config = read_config(arguments[0], arguments[1:], world_size=int(os.environ.get("WORLD_SIZE", "1")))
    except ValueError as error:  # every rank reads the same file and finds the same faults
        if os.environ.get("RANK", "0") == "0":
            print(f"megaspeech.train: {error}", file=sys.stderr, flush=True)
        else:  # torchrun ends all ranks when the first one exits: leave that to the one that has said why
            time.sleep(SECONDS_FOR_RANK_0)
        return 2
    return _train(config)


def _silence_known_warnings() -> None:
    """What 64 ranks would each print at start, and no user can act on."""
    # TransformerEngine and Apex are missing: model.transformer_impl has said so.
    warnings.filterwarnings("ignore", module="megatron")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    # The checkpoint writer's process imports all of it again.
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)


def _train(config: Config) -> int:
    from megaspeech.parallel import groups
    from megaspeech.training.trainer import Trainer

    try:
        grid = groups.initialise(config.parallel, seed=config.run.seed)
        Trainer(config, grid=grid).run()
    except Exception as error:
        if groups.speaks_for_failure():
            what = str(error) if isinstance(error, ValueError) else traceback.format_exc()
            print(f"megaspeech.train: rank {os.environ.get('RANK', '0')}: {what}", file=sys.stderr, flush=True)
        return 1
    finally:
        groups.shut_down()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
