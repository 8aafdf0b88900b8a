"""Encoded images to a ragged batch of pixels, on the GPU or the CPU.

One bad sample fails DALI's whole batch, and its message does not say which one. So sizes are read from the headers
before any decoder sees the bytes, and after a failed batch every sample is decoded alone: by DALI, then by Pillow.
JPEGs whose markers are not in order go to Pillow at once: DALI mends some that Pillow refuses. Images that yuv420.py
stored are not decoded at all.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from slipstream_kernels.ragged import RaggedBatch

from .decode_check import Checked, DecodeCheck, Wrong, image_keys
from .decode_dali import DaliPipeline, takes
from .decode_parse import dali_can_parse
from .decode_pillow import TRUNCATED, check_size, decode_with_pillow
from .decode_rows import Rows
from .header import HeaderError, read_header
from .yuv420 import is_yuv420, stored_size

_log = logging.getLogger("slipstream")


class DecodeError(RuntimeError):
    """Some images of a batch could not be decoded.

    `failures` holds one (sample_id, path, reason) for each of them, in the batch's order; the message names them all.
    """

    _what = "could not be decoded"

    def __init__(self, failures: Sequence[tuple[int, str, str]]) -> None:
        self.failures = tuple(failures)
        super().__init__(self.failures)

    def __str__(self) -> str:
        lines = (f"sample {sample_id} ({path}): {reason}" for sample_id, path, reason in self.failures)
        return "\n  ".join((f"{len(self.failures)} image(s) {self._what}:", *lines))


class WrongPixelsError(DecodeError):
    """The same of images in batches made before: the device decoded them otherwise than the CPU."""

    _what = "of batches before this one are not what the CPU makes of them"


def _log_all(wrong: Sequence[Wrong]) -> None:
    for each in wrong:
        _log.error("sample %d (%s): %s", *each.failure)


class Decoder:
    """Decodes batches of encoded images into ragged batches of RGB pixels with DALI; stored YUV stays as it is.

    `device` is where the pixels go. `max_batch` is the most images in a call, `num_threads` the number of DALI's CPU
    threads. An image whose header says more than `max_pixels` pixels is refused before any decoder sees it.
    `apply_exif` turns images as their EXIF orientation says; without it pixels come as stored, as torchvision loads
    them, and stored YUV always. `truncated` is what becomes of a damaged image that Pillow can decode in part: "fail",
    or "grey" for the rest. `verify` compares one sample in 256, and what looks unwritten, with the CPU's pixels; None
    does so on a GPU.

    Calls release the GIL while DALI works, and one call runs at a time. A forked child must make its own Decoder: use
    of the parent's raises RuntimeError. Raises ValueError for an argument out of range.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        max_batch: int,
        num_threads: int,
        max_pixels: int,
        apply_exif: bool = False,
        truncated: str = "fail",
        verify: bool | None = None,
    ) -> None:
        for name, value in (("max_batch", max_batch), ("num_threads", num_threads), ("max_pixels", max_pixels)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if truncated not in TRUNCATED:
            raise ValueError(f"truncated must be one of {', '.join(map(repr, TRUNCATED))}, got {truncated!r}")
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device must be a CPU or CUDA device, got {device}")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._device = device
        self._max_batch = max_batch
        self._max_pixels = max_pixels
        self._apply_exif = apply_exif
        self._truncated = truncated
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._closed = False
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._reading: deque[tuple[Any, tuple[np.ndarray, ...]]] = deque()  # encoded bytes until the GPU has read them
        self._pipeline = DaliPipeline(device, max_batch=max_batch, num_threads=num_threads, apply_exif=apply_exif)
        self._pipeline.build()
        self._for_cpu: set[int] = set()  # keys of images that the device's decoder refused, or decoded wrongly
        self._differing: list[Wrong] = []
        self._check: DecodeCheck | None = None
        if device.type == "cuda" if verify is None else verify:
            options: dict[str, Any] = {"max_pixels": max_pixels, "apply_exif": apply_exif}
            self._check = DecodeCheck(lambda data: decode_with_pillow(data, **options), device)

    def decode(
        self,
        encoded: Sequence[np.ndarray],
        sample_ids: Sequence[int] | np.ndarray,
        describe: Callable[[int], str],
        *,
        partial: dict[int, str] | None = None,
    ) -> RaggedBatch:
        """Decode one batch; the pixels stay in DALI's memory.

        `encoded` holds uint8 [n_bytes] arrays, read in place. `describe` tells where a sample_id came from, for errors.
        A sample's pixels do not depend on its neighbours' being good or bad. Into `partial` goes, by row of the batch,
        why an image is there only in part (`truncated="grey"`).

        On the CPU the pixels are there on return, and live as long as the batch's `owners`; those of stored YUV are
        `encoded` itself. On a GPU all stored YUV of a batch goes there in one copy.
        On the GPU the call returns when the host's part is done: make the stream that reads the pixels wait for the
        event `ready`, and keep `owners` until an event recorded on that stream after the last kernel that reads them
        has passed. Only then drop them: DALI frees and reuses the memory in the order of its own streams, which know
        nothing of the reader's. The encoded bytes, which the GPU may still read, the decoder holds itself, so that a
        batch that nobody reads can be dropped at any time.

        Raises DecodeError naming every sample that neither DALI nor Pillow could decode or that has more than
        max_pixels; the decoder goes on with the next batch. Raises WrongPixelsError, before it decodes anything, for
        samples of batches before that were decoded wrongly; they are told once, and decoded by the CPU from then on.
        Raises ValueError for more than max_batch images, and RuntimeError after close() or in a forked child.
        """
        if len(encoded) != len(sample_ids):
            raise ValueError(
                f"encoded and sample_ids must have one length of at most max_batch={self._max_batch}, "
                f"got {len(encoded)} and {len(sample_ids)}"
            )
        batch, reasons = self._decode_locked(encoded, sample_ids, describe, None, partial)
        if reasons:
            rows = ((int(sample_ids[row]), row) for row in sorted(reasons))
            raise DecodeError([(sample_id, describe(sample_id), reasons[row]) for sample_id, row in rows])
        assert batch is not None
        return batch

    def decode_or_stand_in(
        self,
        encoded: Sequence[np.ndarray],
        sample_ids: Sequence[int] | np.ndarray,
        describe: Callable[[int], str],
        *,
        stand_in: np.ndarray,
        partial: dict[int, str] | None = None,
    ) -> tuple[RaggedBatch, dict[int, str]]:
        """The same, with the stand-in (uint8 [H, W, 3]) for what cannot be decoded; and why, by row of the batch.

        Raises WrongPixelsError for what was not written at all; other wrong pixels are told by `differing()`.
        """
        batch, reasons = self._decode_locked(encoded, sample_ids, describe, stand_in, partial)
        assert batch is not None
        return batch, reasons

    def _decode_locked(
        self,
        encoded: Sequence[np.ndarray],
        sample_ids: Sequence[int] | np.ndarray,
        describe: Callable[[int], str],
        stand_in: np.ndarray | None,
        partial: dict[int, str] | None,
    ) -> tuple[RaggedBatch | None, dict[int, str]]:
        if os.getpid() != self._pid:
            raise RuntimeError("this Decoder belongs to the parent process: make a new one after fork")
        if len(encoded) > self._max_batch:
            raise ValueError(f"encoded must hold at most max_batch={self._max_batch} images, got {len(encoded)}")
        with self._lock:
            if self._closed:
                raise RuntimeError("this Decoder is closed")
            ids = np.asarray(sample_ids, np.int64)
            self._look_at_the_check(tolerant=stand_in is not None)
            try:
                batch, reasons, on_device = self._decode(encoded, ids, stand_in, {} if partial is None else partial)
            except BaseException:
                if self._stream is not None:
                    self._stream.synchronize()  # the caller lets go of the encoded bytes
                raise
            if self._stream is not None:
                if batch is None:
                    self._stream.synchronize()  # the caller lets go of the encoded bytes
                else:
                    self._reading.append((batch.ready, tuple(encoded)))
                while self._reading and self._reading[0][0].query():
                    self._reading.popleft()
            if self._check is not None and batch is not None and on_device:
                checked = Checked(batch, on_device, list(encoded), ids)
                self._check.add(checked, describe, self._stream)
            return batch, reasons

    def _look_at_the_check(self, tolerant: bool) -> None:
        found = self._check.failures() if self._check is not None else []
        wrong = [each for each in found if each.key not in self._for_cpu]  # not again
        self._for_cpu.update(each.key for each in wrong)
        told = [each for each in wrong if each.unwritten or not tolerant]
        self._differing += [each for each in wrong if each not in told]
        if told:
            _log_all(told)  # whoever gets the error may have gone
            raise WrongPixelsError([each.failure for each in told])

    def differing(self) -> list[tuple[int, str, str]]:
        """(sample id, path, reason) of images of batches before that the CPU decodes otherwise, since the last call.

        Only those that were written: where data are damaged, two decoders may make two pictures of them.
        """
        with self._lock:
            differing, self._differing = self._differing, []
        return [each.failure for each in differing]

    @property
    def busy(self) -> bool:
        """Whether a batch is being decoded now."""
        return self._lock.locked()

    def close(self) -> None:
        """End DALI's threads; pixels already handed out stay as they are. A second call does nothing."""
        if os.getpid() == self._pid:
            with self._lock:
                self._closed = True
                self._pipeline.close()
                try:
                    # no batch comes that it could stop
                    _log_all([*self._differing, *(self._check.close() if self._check is not None else ())])
                    for ready, _ in self._reading:
                        ready.synchronize()
                finally:  # a device that failed raises at every wait
                    self._reading.clear()

    def _decode(
        self, encoded: Sequence[np.ndarray], ids: np.ndarray, stand_in: np.ndarray | None, partial: dict[int, str]
    ) -> tuple[RaggedBatch | None, dict[int, str], list[int]]:
        reasons: dict[int, str] = {}
        table = Rows(len(encoded), self._device, self._stream)
        keys = image_keys(ids, encoded).tolist()
        known, for_cpu, alone, stored = self._sort(encoded, keys, reasons)
        failure = ""
        if stored:
            table.put_stored(list(stored), [encoded[row] for row in stored], list(stored.values()))
        if known:
            self._pipeline.build()  # outside: that a new pipeline cannot be made is no image's fault
            try:
                outputs = self._pipeline.run([encoded[row] for row in known], self._stream)
            except RuntimeError as error:  # DALI's only answer to an image that it refuses
                failure = str(error) or type(error).__name__  # not itself: it has this frame, a cycle that holds pixels
            else:
                table.put_outputs(known, outputs)
        decoders = dict.fromkeys(alone, 2) | dict.fromkeys(for_cpu, 1) | (dict.fromkeys(known, 0) if failure else {})
        if decoders:
            refused = self._decode_each_alone(encoded, decoders, table, reasons, partial)
            if len(refused) < len(known):
                self._for_cpu.update(keys[row] for row in refused)
            # No fault of the images, but want of memory, say: right, but slow.
            all_refused = len(refused) == len(known) > 1 and not reasons.keys() >= set(refused)
            if failure and (not refused or all_refused):
                how = "and on each of its images, which Pillow decoded" if refused else "and then decoded each alone"
                warnings.warn(f"DALI failed on a batch, {how}: {failure}", RuntimeWarning, stacklevel=3)
        if reasons and stand_in is None:
            return None, reasons, []
        for row in reasons:
            assert stand_in is not None
            table.put_array(row, stand_in)
        return table.batch(), reasons, table.on_device

    def _sort(
        self, encoded: Sequence[np.ndarray], keys: Sequence[int], reasons: dict[int, str]
    ) -> tuple[list[int], list[int], list[int], dict[int, tuple[int, int]]]:
        """Which rows DALI takes, which of them on the CPU only, which are Pillow's and which are stored YUV (with their
        sizes), by their headers and what is known of them; the rest is refused: into `reasons`."""
        known: list[int] = []
        for_cpu: list[int] = []
        alone: list[int] = []
        stored: dict[int, tuple[int, int]] = {}
        for row, data in enumerate(encoded):
            if is_yuv420(data):
                try:
                    stored[row] = stored_size(data, max_pixels=self._max_pixels)
                except ValueError as error:
                    reasons[row] = str(error)
                continue
            try:
                header = read_header(data)
            except HeaderError:
                alone.append(row)  # Pillow may know the format
                continue
            try:
                check_size(header.format, header.height, header.width, len(data), self._max_pixels)
            except ValueError as error:
                reasons[row] = str(error)
                continue
            if not takes(header, data) or not dali_can_parse(data):
                alone.append(row)
            elif keys[row] in self._for_cpu:
                for_cpu.append(row)
            else:
                known.append(row)
        return known, for_cpu, alone, stored

    def _decode_each_alone(
        self,
        encoded: Sequence[np.ndarray],
        decoders: dict[int, int],
        table: Rows,
        reasons: dict[int, str],
        partial: dict[int, str],
    ) -> list[int]:
        """Decode rows one by one, each from its decoder on: the device's (0), DALI's on the CPU (1), Pillow (2).

        Returns which ones the device's refused.
        """
        devices = [self._device] if self._stream is None else [self._device, torch.device("cpu")]
        single = [DaliPipeline(device, max_batch=1, num_threads=1, apply_exif=self._apply_exif) for device in devices]
        refused = []
        for row, first in sorted(decoders.items()):
            data = encoded[row]
            taken = next((k for k in range(first, len(single)) if self._accepts(single[k], data, row, table)), 2)
            if first == 0 < taken:
                refused.append(row)
            if taken < 2:
                continue
            pixels, reason = self._by_pillow(data, "fail")
            if pixels is None and self._truncated == "grey":
                pixels, _ = self._by_pillow(data, "grey")
                if pixels is not None:
                    partial[row] = reason
            if pixels is None:
                reasons[row] = reason
            else:
                table.put_array(row, pixels)
        return refused

    def _by_pillow(self, data: np.ndarray, truncated: str) -> tuple[np.ndarray | None, str]:
        options: dict[str, Any] = {"max_pixels": self._max_pixels, "apply_exif": self._apply_exif}
        try:
            return decode_with_pillow(data, truncated=truncated, **options), ""
        except Exception as error:  # hostile bytes make Pillow raise struct.error, IndexError and many more
            return None, f"{type(error).__name__}: {error}" if str(error) else type(error).__name__

    def _accepts(self, pipeline: DaliPipeline, data: np.ndarray, row: int, table: Rows) -> bool:
        pipeline.build()
        try:
            outputs = pipeline.run([data], self._stream if pipeline.on_gpu else None)
        except RuntimeError:
            return False
        if pipeline.on_gpu or self._stream is None:
            table.put_outputs([row], outputs)
        else:  # decoded on the host for a batch on the GPU
            table.put_array(row, np.array(outputs[0]))
        return True
