"""Train a run: `torchrun --nproc-per-node N -m megaspeech.train CONFIG.toml [section.field=value ...]`.

The same command again goes on from the newest checkpoint. SIGTERM and SIGUSR1 save one. The exit status is 0 when the
run is done, 75 when it was stopped and wants to be started again, 2 for a fault of the config, 1 for any other.
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
    from megaspeech.training.signals import StopSignals


SECONDS_FOR_RANK_0 = 30


def main(arguments: list[str]) -> int:
    """Run; returns the exit status. What a user can mend is one message, on one rank, without a traceback."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 2 if not arguments else 0
    _silence_known_warnings()
    from megaspeech.config import read_config
    from megaspeech.parallel.launch import take_variables_from_slurm
    from megaspeech.parallel.lifeline import end_with_parent
    from megaspeech.training.signals import StopSignals

    take_variables_from_slurm()
    signals = StopSignals()
    signals.listen()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun, which would leave it behind when killed
        end_with_parent()

    try:
        config = read_config(arguments[0], arguments[1:], world_size=int(os.environ.get("WORLD_SIZE", "1")))
    except ValueError as error:  # every rank reads the same file and finds the same faults
        return _refuse(str(error), signals)
    try:
        return _train(config, signals)
    finally:
        signals.ignore()  # the status stands


def _silence_known_warnings() -> None:
    """What 64 ranks would each print at start, and no user can act on."""
    # megatron-core's about its own defaults; those about missing packages nobody hears (megaspeech/__init__.py).
    warnings.filterwarnings("ignore", module="megatron")
    # parallel/host.py calls torch's functions where there is no GPU.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|megaspeech\.parallel\.host")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)


def _refuse(message: str, signals: StopSignals) -> int:
    from megaspeech.parallel.launch import tell_torchrun

    if os.environ.get("RANK", "0") == "0":
        print(f"megaspeech.train: {message}", file=sys.stderr, flush=True)
    else:  # a launcher ends all ranks when the first one exits: leave that to the one that has said why
        signals.exit_at_once(2)
        time.sleep(SECONDS_FOR_RANK_0)
    tell_torchrun(message)
    return 2


def _train(config: Config, signals: StopSignals) -> int:
    from megaspeech.parallel import failure, groups
    from megaspeech.parallel.launch import REQUEUE
    from megaspeech.parallel.watchdog import Watchdog, collective_timeout
    from megaspeech.training.trainer import Trainer

    try:
        limit = config.training.hang_timeout
        grid = groups.initialise(config.parallel, seed=config.run.seed, timeout=collective_timeout(limit))
        with Watchdog(directory=config.run.directory, timeout=limit) as watchdog:
            is_done = Trainer(config, grid=grid, signals=signals, watchdog=watchdog).run()
    except Exception as error:
        is_consequence = failure.is_lost_peer(error)
        if is_consequence:  # a launcher that ends the ranks has the cause in its own words
            signals.exit_at_once(1)
        rank, is_plain = f"rank {os.environ.get('RANK', '0')}", isinstance(error, ValueError)
        failure.speak(
            f"{rank}: {error if is_plain else traceback.format_exc()}",
            summary=f"{rank}: {error if is_plain else repr(error)}",
            is_consequence=is_consequence,
        )
        # At once: to leave the process group, NCCL waits for what the other ranks will never join
        # (torch's ProcessGroupNCCL::shutdown), and the launcher for this rank.
        os._exit(1)
    groups.shut_down()
    return 0 if is_done else REQUEUE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
