"""The real entry point with one fault put into its forward step, as the environment variable INJECT has it in JSON.

`what` is nan or spike (the loss), gradient (NaN in the last stage's gradients alone), sleep or raise; `step` counts from
1; `rank` limits it to one, `times` to so many forward-backward passes, `sample` to the microbatch that holds it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

FACTORS = {"nan": float("nan"), "spike": 1e4}


class Injection:
    """The fault, and where the trainer is."""

    def __init__(self, *, what: str, step: int = 0, rank: int | None = None, times: int = 99, sample: str = "") -> None:
        self.what, self.step, self.rank, self.times, self.sample = what, step, rank, times, sample
        self.current_step, self.num_passes, self.num_microbatches = 0, 0, 0
        self.sample_ids: list[list[str]] = []

    def begin_step(self, trainer: Any) -> None:
        """A training step begins."""
        self.current_step, self.num_passes = trainer.step + 1, 0
        self.sample_ids = trainer.batches.sample_ids(trainer.step)

    def begin_pass(self) -> None:
        """A forward-backward pass, or the replay of one, begins."""
        self.num_passes, self.num_microbatches = self.num_passes + 1, 0

    def begin_microbatch(self) -> bool:
        """Whether the microbatch that begins has the fault."""
        self.num_microbatches += 1
        if self.sample:
            return bool(self.current_step) and self.sample in self.sample_ids[self.num_microbatches - 1]
        return self.is_due() and self.num_microbatches == 2

    def is_due(self) -> bool:
        """Whether this rank has the fault in this pass."""
        is_mine = self.rank is None or self.rank == int(os.environ["RANK"])
        return is_mine and self.current_step == self.step and self.num_passes <= self.times


def inject(injection: Injection) -> None:
    """Wrap what the trainer calls."""
    from megaspeech.training import guarded_step, trainer

    make_forward_step, train_step = trainer.make_forward_step, trainer.Trainer.train_step
    gradient_norm = guarded_step.gradient_norm

    def make_faulty_forward_step(**arguments: Any) -> Callable:
        forward_step = make_forward_step(**arguments)
        injection.begin_pass()

        def faulty_forward_step(batches: Any, model: Any) -> tuple[Any, Callable]:
            is_faulty = injection.begin_microbatch()
            if is_faulty and injection.what == "sleep":
                time.sleep(3600)
            if is_faulty and injection.what == "raise":
                raise RuntimeError("injected: a matrix fell over")
            output, loss_function = forward_step(batches, model)
            if not is_faulty or injection.what not in FACTORS:
                return output, loss_function
            factor = FACTORS[injection.what]
            return output, lambda losses: loss_function((losses[0] * factor, losses[1]))

        return faulty_forward_step

    def noted_train_step(self: Any, batches: Any) -> Any:
        injection.begin_step(self)
        result = train_step(self, batches)
        injection.current_step = 0
        return result

    def faulty_gradient_norm(optimizer: Any) -> float:
        if injection.what == "gradient" and injection.is_due():
            parameter = optimizer.chained_optimizers[0].get_parameters()[-1]
            (parameter.main_grad if hasattr(parameter, "main_grad") else parameter.grad).fill_(float("nan"))
        return gradient_norm(optimizer)

    trainer.make_forward_step, trainer.Trainer.train_step = make_faulty_forward_step, noted_train_step
    guarded_step.gradient_norm = faulty_gradient_norm


def main() -> int:
    """Inject, and train."""
    from megaspeech.train import main as train

    if "INJECT" in os.environ:
        inject(Injection(**json.loads(os.environ["INJECT"])))
    return train(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
