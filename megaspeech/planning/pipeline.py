"""How long a pipeline takes when its stages are uneven: megatron-core's schedules, event by event.

With the depth transformer on the last chunk no formula holds: an interleaved schedule lets stages run ahead of each
other by a few microbatches, no more. Orders are those of `schedules.py` of megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

FORWARD = 1 / 3
"""Share of a microbatch's time in the forward pass; what is recomputed makes it less."""

Seconds = Sequence[Sequence[float]]
"""Of one microbatch, forward and backward, by stage and chunk."""


def pipeline_seconds(seconds: Seconds, *, num_microbatches: int) -> float:
    """From the first forward to the last backward pass, sends taken to cost nothing.

    After the pipeline has filled every round of microbatches takes as long: only four rounds are played.
    """
    num_stages = len(seconds)
    if num_stages == 1:
        return num_microbatches * sum(seconds[0])
    played = min(num_microbatches, 4 * num_stages)
    whole = _play(seconds, num_microbatches=played)
    if played == num_microbatches:
        return whole
    before = _play(seconds, num_microbatches=played - num_stages)
    return whole + (num_microbatches - played) * (whole - before) / num_stages


def least_seconds(seconds: Seconds, *, num_microbatches: int) -> float:
    """No schedule of these stages takes less: each works through all microbatches, after the first has come through the
    stages before it, and before the last has gone back through them."""
    works = [num_microbatches * sum(chunks) for chunks in seconds]
    return max(work + sum(chunks[0] for chunks in seconds[:stage]) for stage, work in enumerate(works))


def _play(seconds: Seconds, *, num_microbatches: int) -> float:
    num_stages, num_chunks = len(seconds), len(seconds[0])
    orders = [list(_order(stage, num_stages, num_chunks, num_microbatches)) for stage in range(num_stages)]
    done: dict[tuple[bool, int, int, int], float] = {}
    places, clocks = [0] * num_stages, [0.0] * num_stages
    moved = True
    while moved:
        moved = False
        for stage in range(num_stages):
            while places[stage] < len(orders[stage]):
                backward, chunk, microbatch = orders[stage][places[stage]]
                needed = _needed(backward, stage, chunk, num_stages, num_chunks)
                ready = 0.0 if needed is None else done.get((*needed, microbatch))
                if ready is None:
                    break
                share = 1 - FORWARD if backward else FORWARD
                clocks[stage] = max(clocks[stage], ready) + share * seconds[stage][chunk]
                done[backward, stage, chunk, microbatch] = clocks[stage]
                places[stage] += 1
                moved = True
    assert places == [len(order) for order in orders], "the schedule waits for itself"
    return max(clocks)


def _needed(backward: bool, stage: int, chunk: int, stages: int, chunks: int) -> tuple[bool, int, int] | None:
    """(backward, stage, chunk) that must have run of the same microbatch; None for the model's first chunk."""
    place = chunk * stages + stage
    if backward:
        last = place == stages * chunks - 1
        return (False, stage, chunk) if last else (True, (place + 1) % stages, (place + 1) // stages)
    return None if place == 0 else (False, (place - 1) % stages, (place - 1) // stages)


def _order(stage: int, stages: int, chunks: int, microbatches: int) -> Iterator[tuple[bool, int, int]]:
    """(backward, chunk, microbatch) of a stage, in turn: some forward, then one forward and one back, then the rest."""
    total = microbatches * chunks
    ahead = stages - stage - 1 if chunks == 1 else 2 * (stages - stage - 1) + (chunks - 1) * stages
    ahead = min(ahead, total)

    def item(backward: bool, index: int) -> tuple[bool, int, int]:
        if chunks == 1:
            return backward, 0, index
        round_, rest = divmod(index, stages * chunks)
        chunk = rest // stages
        return backward, chunks - 1 - chunk if backward else chunk, round_ * stages + rest % stages

    yield from (item(False, index) for index in range(ahead))
    for index in range(total - ahead):
        yield item(False, ahead + index)
        yield item(True, index)
    yield from (item(True, index) for index in range(total - ahead, total))
