"""Which layers each pipeline stage holds, how many microbatches a step has, and how many are kept in flight."""

from __future__ import annotations

from dataclasses import dataclass

from megaspeech.config import Config
from megaspeech.config.computation import expand_layout


@dataclass(frozen=True)
class Stage:
    """A stage of `num_stages`: the temporal layers of each of its chunks, in the order in which they run.

    Its first chunk has the embedding where it is the first stage, its last chunk the heads where it is the last.
    """

    index: int
    num_stages: int
    chunks: tuple[int, ...]

    @property
    def is_first(self) -> bool:
        """Whether it holds the embedding."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it holds the text head and the depth transformer."""
        return self.index == self.num_stages - 1

    @property
    def num_layers(self) -> int:
        """Of all its chunks."""
        return sum(self.chunks)

    def in_flight(self, chunk: int, *, num_microbatches: int) -> int:
        """Microbatches whose activations of `chunk` are kept at once.

        1F1B keeps as many as there are stages from here to the end (arXiv 2104.04473, section 2.2). Interleaved, stage
        i has run 2 (p - i - 1) + (v - 1) p chunks forward before it begins to go back, one chunk of p microbatches
        after the other (megatron-core's `get_pp_rank_microbatches`), and runs one more.
        """
        p, v = self.num_stages, len(self.chunks)
        if v == 1:
            return min(num_microbatches, p - self.index)
        ahead = min(2 * (p - self.index - 1) + (v - 1) * p + 1, num_microbatches * v)
        rounds, rest = divmod(ahead, p * v)  # a round runs every chunk for p microbatches
        return min(num_microbatches, rounds * p + min(max(rest - chunk * p, 0), p))


def num_microbatches(config: Config, *, replicas: int) -> int:
    """Of a step, on each replica. Samples come out even (`config.checks`); packed rows are rounded up, as
    `data.mixture` does: as many for every replica, and under interleaving a multiple of the stages."""
    training, parallel = config.training, config.parallel
    number = -(-training.global_batch_size // (training.micro_batch_size * replicas))
    return number + (-number % parallel.pipeline_model_parallel_size if parallel.num_chunks > 1 else 0)


def stages_of(config: Config) -> list[Stage]:
    """The stages of a layout, first to last; as megatron-core's `get_num_layers_to_build` deals layers out."""
    parallel, layers = config.parallel, config.temporal.num_layers
    size, num_chunks = parallel.pipeline_model_parallel_size, parallel.num_chunks
    if parallel.pipeline_model_parallel_layout is not None:
        drawn = [text.count("t") for text in expand_layout(parallel.pipeline_model_parallel_layout)]
        return [Stage(index, size, tuple(drawn[index::size])) for index in range(size)]
    ends = {0: parallel.num_layers_in_first_pipeline_stage, size - 1: parallel.num_layers_in_last_pipeline_stage}
    ends = {index: count for index, count in ends.items() if count is not None}
    rest = (layers - sum(ends.values())) // max(1, size - len(ends))
    return [Stage(i, size, (ends.get(i, rest) // num_chunks,) * num_chunks) for i in range(size)]
