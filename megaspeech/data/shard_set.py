"""Many shards as one set of samples, of any size: one catalogue to open, and few shards open at a time.

A directory holds `000000.{bin,idx,xxh64,json}`, `000001...` and a catalogue of them, so that opening a million hours
reads one file. An epoch draws every sample once: the shards in an order of its own, and the samples of some
`shuffle_shards` of them, a window, in any order. So whatever the size of the set, a process has the indexes of a window
in memory, and every shard is opened once an epoch.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from megaspeech.data.shards import REMEDY, Shard, ShardHeader, write_shard
from megaspeech.data.whole_files import replacing

CATALOGUE = "catalogue.json"


@dataclass(frozen=True)
class Catalogue:
    """The shards of a directory in order, and what they have in common.

    `header` has the sums of samples and frames; `num_samples` and `num_frames` are those of each shard `[C]` int64.
    """

    directory: Path
    header: ShardHeader
    names: tuple[str, ...]
    num_samples: np.ndarray
    num_frames: np.ndarray

    @classmethod
    def read(cls, directory: str | Path) -> Catalogue:
        """Of a directory. Raises ValueError naming a catalogue that is missing or not whole, and the remedy."""
        path = Path(directory) / CATALOGUE
        if not path.is_file():
            raise ValueError(
                f"data.mixture: there is no set of shards {directory} ({path} is missing); run tools/prepare_data.py"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            counts = [np.asarray(values["shards"][name], dtype=np.int64) for name in ("num_samples", "num_frames")]
            names = tuple(values["shards"]["names"])
            header = ShardHeader.of(values["header"], path=path)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"set of shards {directory}: {path} is not a whole catalogue ({error}); {REMEDY}"
            ) from error
        return cls(Path(directory), header, names, *counts)

    def prefix(self, place: int) -> Path:
        """Of shard `place`, without suffix."""
        return self.directory / self.names[place]


def write_catalogue(directory: str | Path) -> Catalogue:
    """Write the catalogue of all shards in `directory`; whoever does it writes the same bytes.

    Raises:
        ValueError: there is no shard, one is not whole, or two were made with another codec, tokenizer or layout.
    """
    directory = Path(directory)
    names = sorted(path.stem for path in directory.glob("*.json") if path.name != CATALOGUE)
    if not names:
        raise ValueError(f"set of shards {directory}: there is no shard in it; run tools/prepare_data.py")
    headers = {name: ShardHeader.read(directory / name) for name in names}
    first = _shared(headers[names[0]])
    for name, header in headers.items():
        if (shared := _shared(header)) != first:
            key = next(key for key, value in vars(shared).items() if value != getattr(first, key))
            raise ValueError(
                f"set of shards {directory}: the {key} of {name} is {getattr(header, key)}, that of {names[0]} "
                f"{getattr(first, key)}; remove the shards of the older preparation"
            )
    counts = {key: [getattr(header, key) for header in headers.values()] for key in ("num_samples", "num_frames")}
    total = replace(first, num_samples=sum(counts["num_samples"]), num_frames=sum(counts["num_frames"]))
    content = json.dumps({"header": asdict(total), "shards": {"names": names, **counts}})
    with replacing(directory / CATALOGUE) as aside:
        aside.write_text(content, encoding="utf-8")
    return Catalogue.read(directory)


def write_shard_set(directory: str | Path, samples: Iterable[np.ndarray], *, header: ShardHeader) -> Catalogue:
    """A set of one shard with `samples` `[S, T]`."""
    write_shard(Path(directory) / "000000", samples, header=header)
    return write_catalogue(directory)


def _shared(header: ShardHeader) -> ShardHeader:
    return replace(header, num_samples=0, num_frames=0, num_bytes={}, checksums={})


class ShardSet:
    """The samples of a set: drawn in epochs without end, and read one by one.

    Args:
        directory: with shards and their catalogue.
        seed: of the order of the epochs.
        shuffle_shards: shards of a window, whose samples are shuffled together. Twice as many are kept open.
    """

    def __init__(self, directory: str | Path, *, seed: int = 0, shuffle_shards: int = 32) -> None:
        self.catalogue = Catalogue.read(directory)
        if self.catalogue.header.num_samples == 0:
            raise ValueError(f"set of shards {directory} holds no samples; look into rejected.jsonl, or drop it")
        self.seed, self.shuffle_shards = seed, shuffle_shards
        self._starts = np.concatenate([[0], np.cumsum(self.catalogue.num_samples)])
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._epoch: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0), np.empty(0))
        self._window: tuple[tuple[int, int], np.ndarray] = ((-1, -1), np.empty(0))

    @property
    def header(self) -> ShardHeader:
        """Of the whole set."""
        return self.catalogue.header

    def __len__(self) -> int:
        return self.header.num_samples

    def places(self, numbers: np.ndarray) -> np.ndarray:
        """Which samples of the set are the `numbers`-th that are drawn, counted over all epochs `[D]` int64."""
        found = np.empty(len(numbers), dtype=np.int64)
        epochs, drawn = np.divmod(numbers, len(self))
        for epoch in np.unique(epochs).tolist():
            order, ends = self._order(epoch)
            windows = np.where(epochs == epoch, np.searchsorted(ends, drawn, side="right"), -1)
            for window in np.unique(windows[windows >= 0]).tolist():
                mine, first = windows == window, ends[window - 1] if window else 0
                if self._window[0] != (epoch, window):
                    self._window = ((epoch, window), self._shuffled(epoch, window, order=order))
                found[mine] = self._window[1][drawn[mine] - first]
        return found

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(the shards of an epoch in order, how many samples are drawn by the end of each window)."""
        if self._epoch[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.catalogue.names))
            ends = np.cumsum(self.catalogue.num_samples[order])
            last = np.arange(self.shuffle_shards, len(order) + self.shuffle_shards, self.shuffle_shards) - 1
            self._epoch = (epoch, order, ends[np.minimum(last, len(order) - 1)])
        return self._epoch[1:]

    def _shuffled(self, epoch: int, window: int, *, order: np.ndarray) -> np.ndarray:
        """The samples of a window, in the order in which they are drawn."""
        shards = order[window * self.shuffle_shards : (window + 1) * self.shuffle_shards]
        samples = np.concatenate([np.arange(self._starts[shard], self._starts[shard + 1]) for shard in shards])
        return np.random.default_rng([self.seed, epoch, window]).permutation(samples)

    def name(self, index: int) -> str:
        """Of sample `index`, as "shard:index"."""
        shard, within = self._find(index)
        return f"{self.catalogue.names[shard]}:{within}"

    def lengths(self, indexes: np.ndarray) -> np.ndarray:
        """Frames of samples, without reading them `[D]` int64."""
        shards, found = np.searchsorted(self._starts, indexes, side="right") - 1, np.empty(len(indexes), dtype=np.int64)
        for shard in np.unique(shards).tolist():
            mine = shards == shard
            found[mine] = self._shard(shard).lengths(indexes[mine] - self._starts[shard])
        return found

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample `index` `[S, T]`. Raises DamagedSampleError if it is not whole."""
        shard, within = self._find(index)
        return self._shard(shard)[within]

    def _find(self, index: int) -> tuple[int, int]:
        """(shard, sample within it)."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, int(index - self._starts[shard])

    def _shard(self, place: int) -> Shard:
        """Kept open, until others were wanted more lately."""
        if place not in self._open:
            self._open[place] = Shard(self.catalogue.prefix(place))
            if len(self._open) > 2 * self.shuffle_shards:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(place)
        return self._open[place]
