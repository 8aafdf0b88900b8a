"""A device's pixels, decoded again on the CPU and compared: one sample in 256, and every image that looks unwritten.

A JPEG engine was seen to report success for an image that it had skipped (LichtFeld-Studio, pull request 1924): its
memory then shows what it held before. So bytes at certain addresses, the probes, are remembered from batch to batch.
An image all of whose known probes are what they were is a suspect: not written, or as flat as its predecessor.

The host does not wait: probes are read in the order of the decoder's stream, and a thread looks at them while the next
batch is decoded. What memory held that others wrote meanwhile is not known here; the one sample in 256 is for that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from slipstream_kernels.ragged import RaggedBatch

from .device import on_stream, to_device, use_device
from .draws import Draws, stream_key

ONE_IN = 256
# Of 255, over all values of an image. On the CPU, DALI and Pillow differ by 0; torchvision
# holds nvJPEG to 2 of libjpeg (its test_decode_jpeg_cuda). Another picture differs by tens.
BOUND = 2.0
_BEHIND = 2  # batches whose check may be under way before the decoder waits for one
_PROBES = 32  # of an image, at most
_NEEDED = 4  # known probes for a suspicion: fewer are equal by chance too often
_STEP = 256  # bytes between probes, at least
_REMEMBERED = 1 << 18


class Wrong(NamedTuple):
    """A sample that a device decoded otherwise than the CPU: (sample id, path, reason), as errors name it, and its key.

    unwritten: what its memory held before is there yet.
    """

    failure: tuple[int, str, str]
    key: int
    unwritten: bool


def image_keys(sample_ids: np.ndarray, encoded: Sequence[np.ndarray]) -> np.ndarray:
    """What tells an image from others, those of other fields of its sample too: int64 [n], of id and encoded length."""
    lengths = np.array([len(data) for data in encoded], np.int64)
    return (np.asarray(sample_ids, np.int64) << 24) + lengths % (1 << 24)


def is_drawn(sample_ids: np.ndarray) -> np.ndarray:
    """Which samples are always compared: bool [n], one in 256, a pure function of the sample id."""
    words = Draws(stream_key(0, "decode check"), np.asarray(sample_ids), 0).words(0)[:, 0]
    return words[:, 0] % ONE_IN == 0


def probe_addresses(addresses: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where to look into images at `addresses` of `lengths` bytes (int64 [n]): addresses int64 [N], and whose they are.

    They are multiples of a power of two, so that images that lie otherwise in the same memory share them.
    """
    steps = _STEP << np.ceil(np.log2(np.maximum(lengths / (_STEP * _PROBES), 1))).astype(np.int64)
    first = (addresses + steps - 1) // steps
    counts = np.maximum((addresses + lengths - 1) // steps - first + 1, 0)
    whose = np.repeat(np.arange(len(addresses)), counts)
    within = np.arange(len(whose)) - np.repeat(np.cumsum(counts) - counts, counts)
    return (first[whose] + within) * steps[whose], whose


class Probes:
    """The byte last seen at each address, of which image, and whether that was found right, as far as there is room."""

    def __init__(self) -> None:
        self._addresses = np.zeros(_REMEMBERED, np.int64)
        self._values = np.zeros(_REMEMBERED, np.uint8)
        self._keys = np.zeros(_REMEMBERED, np.int64)
        self._right = np.zeros(_REMEMBERED, bool)

    def unchanged(self, addresses: np.ndarray, whose: np.ndarray, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Which images (their keys, int64 [n]) show nothing but what was there before: bool [n]; `values` are kept.

        But where that was the same image, found right, it is no suspect: a set of few batches would be full of them.
        """
        slots = (addresses // _STEP) % _REMEMBERED
        there = self._addresses[slots] == addresses
        equal = there & (self._values[slots] == values)
        right = equal & (self._keys[slots] == keys[whose]) & self._right[slots]
        self._addresses[slots], self._values[slots], self._keys[slots] = addresses, values, keys[whose]
        self._right[slots] = right
        found = np.bincount(whose[there & ~right], minlength=len(keys))
        return (found >= _NEEDED) & (np.bincount(whose[equal & ~right], minlength=len(keys)) == found)

    def found_right(self, addresses: np.ndarray) -> None:
        """The values at these addresses, an image's, are what they should be."""
        slots = (addresses // _STEP) % _REMEMBERED
        self._right[slots[self._addresses[slots] == addresses]] = True


class Checked(NamedTuple):
    """A batch to look at: its rows from the device's decoder, and what they were decoded from."""

    batch: RaggedBatch
    rows: list[int]
    encoded: list[np.ndarray]
    sample_ids: np.ndarray


class DecodeCheck:
    """Compares batches, on a thread of its own, with what `decode` (bytes to uint8 [H, W, 3]) makes on the CPU."""

    def __init__(self, decode: Callable[[np.ndarray], np.ndarray], device: torch.device) -> None:
        self._decode = decode
        self._probes = Probes()
        self._thread = ThreadPoolExecutor(1, "slipstream-check", initializer=use_device, initargs=(device,))
        self._pending: deque[Future[list[Wrong]]] = deque()

    def add(self, checked: Checked, describe: Callable[[int], str], stream: Any) -> None:
        """Check this batch, holding its pixels and bytes until that is done; waits if two others are under way."""
        batch = checked.batch
        addresses, whose = probe_addresses(
            batch.addresses[checked.rows], 3 * batch.sizes[checked.rows].astype(np.int64).prod(1)
        )
        values, read = _read(addresses, batch.device, stream)
        task = self._thread.submit(self._look, checked, describe, (addresses, whose, values), read)
        self._pending.append(task)
        while len(self._pending) > _BEHIND and not self._pending[0].done():
            self._pending[0].exception()

    def failures(self, *, wait: bool = False) -> list[Wrong]:
        """What was found wrong since the last call; `wait` for all batches."""
        found: list[Wrong] = []
        while self._pending and (wait or self._pending[0].done()):
            found += self._pending.popleft().result()
        return found

    def close(self) -> list[Wrong]:
        """End the thread; gives the last failures."""
        try:
            return self.failures(wait=True)
        finally:
            self._thread.shutdown()

    def _look(
        self, checked: Checked, describe: Callable[[int], str], probes: tuple[np.ndarray, np.ndarray, Any], read: Any
    ) -> list[Wrong]:
        if read is not None:
            read.synchronize()
        addresses, whose, values = probes
        keys = image_keys(checked.sample_ids, checked.encoded)[checked.rows]
        suspects = self._probes.unchanged(addresses, whose, np.asarray(values), keys)
        failures = []
        for place in np.flatnonzero(suspects | is_drawn(checked.sample_ids[checked.rows])).tolist():
            row = checked.rows[place]
            reason = self._compare(checked.batch, row, checked.encoded[row])
            if not reason:
                self._probes.found_right(addresses[whose == place])
            else:
                held = "; its memory is as it was before" if suspects[place] else ""
                sample_id = int(checked.sample_ids[row])
                reason = f"decoded wrongly: {reason}{held}"
                failure = (sample_id, describe(sample_id), reason)
                failures.append(Wrong(failure, int(keys[place]), bool(suspects[place])))
        return failures

    def _compare(self, batch: RaggedBatch, row: int, data: np.ndarray) -> str:
        try:
            expected = self._decode(data)
        except Exception as error:
            return f"the CPU refuses it ({type(error).__name__}: {error})"
        got = _on_host(batch, row)
        if got.shape != expected.shape:
            return f"{got.shape[:2]} pixels, {expected.shape[:2]} on the CPU"
        difference = float(np.abs(got.astype(np.int16) - expected).mean())
        return "" if difference <= BOUND else f"{difference:.1f} of 255 from the CPU's pixels on average"


def _read(addresses: np.ndarray, device: torch.device, stream: Any) -> tuple[torch.Tensor, Any]:
    # The bytes there, on the host once the event has passed.
    if stream is None:
        from slipstream_kernels.reference import bytes_at_reference

        return bytes_at_reference(torch.from_numpy(addresses)), None
    from slipstream_kernels.bytes_at import bytes_at

    with on_stream(stream):
        values = torch.empty(len(addresses), dtype=torch.uint8, pin_memory=True)
        values.copy_(bytes_at(to_device(addresses, device)), non_blocking=True)
        read = torch.cuda.Event()
        read.record(stream)
    return values, read


def _on_host(batch: RaggedBatch, row: int) -> np.ndarray:
    if batch.device.type != "cuda":
        return batch.image(row).permute(1, 2, 0).numpy()
    # On a stream of this thread's own: the event of the probes, which has passed, was behind the decoding.
    with on_stream(torch.cuda.Stream(batch.device)):
        image = batch.image(row).permute(1, 2, 0)
        copy = torch.empty(image.shape, dtype=torch.uint8, pin_memory=True).copy_(image, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
    done.synchronize()
    return copy.numpy()
