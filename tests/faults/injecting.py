"""The real entry point with faults put into its forward step, as the environment variable INJECT lists them in JSON.

`what` is nan or spike (the loss), gradient (NaN in the last gradient of that rank alone), sleep, raise, signal, or stay
(leaving the process group takes forever); `step` counts from 1, and with `on` the fault stays; `rank` limits it to one,
`times` to so many forward-backward passes, `sample` to the microbatch that holds it; a signal comes `during` a method
of the trainer, once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FACTORS = {"nan": float("nan"), "spike": 1e4}


@dataclass
class Fault:
    """One fault."""

    what: str
    step: int = 0
    on: bool = False
    rank: int | None = None
    times: int = 99
    sample: str = ""
    during: str = ""

    def is_due(self, place: Place) -> bool:
        """Whether this rank has the fault in this forward-backward pass."""
        is_mine = self.rank is None or self.rank == int(os.environ["RANK"])
        is_time = place.step == self.step or (self.on and place.step > self.step > 0)
        return is_mine and is_time and place.num_passes <= self.times

    def hits_microbatch(self, place: Place) -> bool:
        """Whether the microbatch that begins has the fault: the second one, or the one of the sample."""
        if self.sample and place.step:
            return self.sample in place.sample_ids[place.num_microbatches - 1]
        return self.is_due(place) and place.num_microbatches == 2


class Place:
    """Where the trainer is: step from 1 on (0 outside training steps), pass of the step, microbatch of the pass."""

    def __init__(self) -> None:
        self.step, self.num_passes, self.num_microbatches = 0, 0, 0
        self.sample_ids: list[list[str]] = []


def inject(faults: list[Fault]) -> None:
    """Wrap what the trainer calls."""
    from megaspeech.parallel import groups
    from megaspeech.training import trainer

    place = Place()
    _wrap_train_step(trainer.Trainer, place)
    trainer.make_forward_step = _faulty_forward_steps(trainer.make_forward_step, place, faults)
    _wrap_gradient_norm(place, [fault for fault in faults if fault.what == "gradient"])
    for fault in faults:
        if fault.what == "stay":
            groups.shut_down = lambda: time.sleep(3600)
        if fault.what == "signal":
            owner = trainer.Checkpointing if fault.during == "save" else trainer.Trainer
            _signal_during(owner, fault.during)


def _wrap_train_step(owner: Any, place: Place) -> None:
    train_step = owner.train_step

    def noted(self: Any, batches: Any) -> Any:
        place.step, place.num_passes = self.step + 1, 0
        place.sample_ids = self.batches.sample_ids(self.step)
        result = train_step(self, batches)
        place.step = 0
        return result

    owner.train_step = noted


def _faulty_forward_steps(make: Callable, place: Place, faults: list[Fault]) -> Callable:
    def make_faulty(**arguments: Any) -> Callable:
        forward_step = make(**arguments)
        place.num_passes, place.num_microbatches = place.num_passes + 1, 0

        def faulty(batches: Any, model: Any) -> tuple[Any, Callable]:
            place.num_microbatches += 1
            hits = {fault.what for fault in faults if fault.hits_microbatch(place)}
            if "sleep" in hits:
                time.sleep(3600)
            if "raise" in hits:
                raise RuntimeError("injected: a matrix fell over")
            output, loss_function = forward_step(batches, model)
            factors = [FACTORS[what] for what in hits if what in FACTORS]
            return output, _scaled(loss_function, factors[0]) if factors else loss_function

        return faulty

    return make_faulty


def _scaled(loss_function: Callable, factor: float) -> Callable:
    def scaled(losses: Any) -> tuple:
        weighted, statistics = losses
        return loss_function((weighted * factor, statistics))

    return scaled


def _wrap_gradient_norm(place: Place, faults: list[Fault]) -> None:
    from megaspeech.training import guarded_step

    gradient_norm = guarded_step.gradient_norm

    def faulty(optimizer: Any) -> float:
        if any(fault.is_due(place) for fault in faults):
            *_, parameter = optimizer.chained_optimizers[0].model_chunks[0].parameters()
            parameter.main_grad.fill_(float("nan"))
        return gradient_norm(optimizer)

    guarded_step.gradient_norm = faulty


def _signal_during(owner: Any, name: str) -> None:
    method = getattr(owner, name)

    def interrupted(self: Any, *arguments: Any, **options: Any) -> Any:
        setattr(owner, name, method)
        os.kill(os.getpid(), signal.SIGUSR1)
        return method(self, *arguments, **options)

    setattr(owner, name, interrupted)


def main() -> int:
    """Inject, and train."""
    from megaspeech.train import main as train

    if "INJECT" in os.environ:
        inject([Fault(**fault) for fault in json.loads(os.environ["INJECT"])])
    return train(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
