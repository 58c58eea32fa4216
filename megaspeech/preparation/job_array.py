"""Which share of the work is this task's, of a job array that nobody coordinates."""

from __future__ import annotations

from collections.abc import Mapping


def share_of(array: str | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """(I, N): this task does every N-th unit from I on.

    Args:
        array: "I/N" as `--array` has it; None takes the Slurm array task that the environment tells of, or (0, 1).
        environment: of the process.

    Raises:
        ValueError: `array` is not I/N with 0 <= I < N, or the numbers of Slurm's tasks have gaps.
    """
    if array is None and (count := int(environment.get("SLURM_ARRAY_TASK_COUNT", 0))):
        task, first, step = (
            int(environment.get(f"SLURM_ARRAY_TASK_{name}", value))
            for name, value in (("ID", 0), ("MIN", 0), ("STEP", 1))
        )
        last = int(environment.get("SLURM_ARRAY_TASK_MAX", first + step * (count - 1)))
        if (last - first) // step + 1 != count:
            raise ValueError(
                f"SLURM_ARRAY_TASK_COUNT = {count}: of tasks numbered {first} to {last} with gaps none knows its "
                f"share; submit --array 0-{count - 1} (what is done is kept)"
            )
        return (task - first) // step % count, count
    index, _, count = (array or "0/1").partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"--array {array}: is not I/N with 0 <= I < N, such as 0/8 for the first of eight")
    return int(index), int(count)
