"""A decoder that gets images wrong, in memory that batches share; which samples are compared anyway."""

from __future__ import annotations

import numpy as np
import torch
from decode_samples import by_pillow

from slipstream.decode import Decoder
from slipstream.decode_check import is_drawn

DRAWN = [int(i) for i in np.flatnonzero(is_drawn(np.arange(20_000)))]
OTHERS = [int(i) for i in np.flatnonzero(~is_drawn(np.arange(200)))]


class Arena:
    """A decoder's outputs, always in the same memory, as a pool gives them; `wrong` says which it gets wrong.

    So does `victim`, an image's bytes, wherever it comes, and `what` then becomes of it; `times`: how often it came.
    """

    def __init__(self) -> None:
        self.memory = np.zeros(1 << 20, np.uint8)
        self.wrong: dict[int, str] = {}  # by row, in every batch
        self.victim, self.what, self.times = b"", "", 0

    def run(self, encoded, stream):
        outputs = Outputs()
        at = 0
        for row, data in enumerate(encoded):
            image = by_pillow(bytes(data))
            place = self.memory[at : at + image.size].reshape(image.shape)
            what = self.wrong.get(row, "")
            if bytes(data) == self.victim:
                what, self.times = self.what, self.times + 1
            if what == "another":
                image = image[::-1]
            elif what == "noisy":
                image = np.clip(image.astype(int) + np.random.default_rng(0).integers(-2, 3, image.shape), 0, 255)
            elif what == "brighter":
                image = np.clip(image.astype(int) + 5, 0, 255)
            if what != "skipped":
                place[:] = image
            outputs.append(place)
            at += -(-image.size // 256) * 256
        return outputs


class Outputs(list):
    """As much of DALI's list as a batch's rows look at."""

    def shape(self):
        return [array.shape for array in self]

    def __getitem__(self, index):
        return torch.from_numpy(super().__getitem__(index))


def settle(decoder: Decoder) -> None:
    """Wait until all that was decoded is checked."""
    assert decoder._check is not None
    for task in list(decoder._check._pending):
        task.result()
