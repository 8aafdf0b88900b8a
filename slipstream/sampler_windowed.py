"""An order that reads few chunks at a time: lanes of chunks in random order, samples shuffled in a window of them.

The chunks, in a keyed order of each epoch, lie one after another; that line of samples is cut into L lanes of equal
length (to a sample), and each lane into windows, within which a keyed bijection shuffles. Lane l's first window is
shorter by l / L of one, so that the lanes come to new chunks one after another: all at once would be a burst that no
network follows, and take twice the room. Position p is the (p // L)-th of lane p mod L. A rank that takes every W-th
position serves lanes r, r + W, ... where W divides L, so that all ranks together read each chunk once, but for those
that a lane's end cuts. Memory: a few numbers a chunk.
"""

from __future__ import annotations

import operator
import re
from dataclasses import KW_ONLY, dataclass, field

import numpy as np

from .dataset import SlipstreamDataset
from .draws import stream_key
from .sampler import Sampler, permute_within

LANES = 64
WINDOW = 4  # chunks of the mean size
BLOCK = 1024  # samples that count as a chunk where a source has none


def make_sampler(dataset: SlipstreamDataset, shuffle: bool | str, seed: int) -> Order:
    """The sampler of a loader's `shuffle`: True, False, "windowed" or "windowed:16". Raises ValueError or TypeError."""
    if isinstance(shuffle, bool):
        return Sampler(len(dataset), shuffle=shuffle, seed=seed)
    found = re.fullmatch(r"windowed(?::([1-9]\d*))?", shuffle) if isinstance(shuffle, str) else None
    if found is None:
        wrong = ValueError if isinstance(shuffle, str) else TypeError
        raise wrong(f'shuffle must be True, False or "windowed", got {shuffle!r}; "windowed:16" has 16 lanes')
    if dataset.sample_ids is not None:
        raise ValueError('shuffle="windowed" goes by the chunks of a whole source: not with indices=')
    ends = getattr(dataset.source, "chunk_ends", None)
    if ends is None:
        ends = np.append(np.arange(BLOCK, len(dataset), BLOCK), len(dataset))
    return WindowedSampler(ends, seed=seed, lanes=int(found[1] or LANES))


@dataclass(slots=True)
class WindowedSampler:
    """The windowed order of every epoch: a pure function of (seed, epoch, position), as Sampler's.

    ends: int64 [C], the number of samples up to and with each chunk. seed: as in `stream_key`. lanes: how many windows
    are open at a time, of all ranks together; a divisor of it where there is no window of chunks for each, so that the
    ranks that divide it still divide as many lanes as can be. window: how many chunks of the mean size are shuffled
    together.
    """

    ends: np.ndarray
    _: KW_ONLY
    seed: int
    lanes: int = LANES
    window: int = WINDOW
    _chunks: tuple[int, np.ndarray, np.ndarray] | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        self.ends = np.asarray(self.ends, np.int64)
        most = max(len(self.ends) // self.window, 1)
        self.lanes = next(lanes for lanes in range(min(self.lanes, most), 0, -1) if self.lanes % lanes == 0)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def window_size(self) -> int:
        """Samples of a whole window."""
        return max(self.window * len(self) // max(len(self.ends), 1), 1)

    def sample_ids(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The sample ids at these positions of this epoch, int64 [n] for whole numbers [n] in [0, length)."""
        given = np.asarray(positions).astype(np.int64)
        outside = (given < 0) | (given >= len(self))
        if outside.any():
            raise IndexError(f"positions must be in [0, {len(self)}), got {given[outside][0]}")
        begins, stops = self._order(operator.index(epoch))
        short, longer = divmod(len(self), self.lanes)  # the first `longer` lanes have one sample more
        lane, place = given % self.lanes, given // self.lanes
        first = lane * short + np.minimum(lane, longer)
        length = short + (lane < longer)
        size = self.window_size
        number = (place + lane * size // self.lanes) // size
        result = np.empty_like(given)
        for pair in {*zip(lane.tolist(), number.tolist(), strict=True)}:
            here = (lane == pair[0]) & (number == pair[1])
            stop = (pair[1] + 1) * size - pair[0] * size // self.lanes
            begin = max(stop - size, 0)
            count = min(stop, int(length[here][0])) - begin
            key = stream_key(self.seed, f"window\x1f{pair[0]}\x1f{pair[1]}")
            result[here] = first[here] + begin + permute_within(place[here] - begin, count, key, epoch)
        chunk = np.searchsorted(stops, result, side="right")
        return begins[chunk] + result - np.where(chunk > 0, stops[chunk - 1], 0)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        # This epoch's chunks in their order: the first sample id of each, and where the line of samples passes its end.
        # Kept in one piece: a thread of the epoch before may still ask.
        kept = self._chunks
        if kept is None or kept[0] != epoch:
            chunks = Sampler(len(self.ends), shuffle=True, seed=self.seed).sample_ids(epoch, np.arange(len(self.ends)))
            begins = np.concatenate(([0], self.ends[:-1]))[chunks]
            self._chunks = kept = epoch, begins, np.cumsum(self.ends[chunks] - begins)
        return kept[1:]


Order = Sampler | WindowedSampler
