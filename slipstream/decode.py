"""Encoded images to a ragged batch of RGB pixels, on the GPU or the CPU: the only file that imports DALI.

One bad sample fails DALI's whole batch, and its message does not say which one. So sizes are read from the headers
before any decoder sees the bytes, and after a failed batch every sample is decoded alone: by DALI, then by Pillow.
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from slipstream_kernels.ragged import RaggedBatch

from .header import HeaderError, read_header

# DALI also takes TIFF and PNM, but not rightly: two-channel and float TIFFs come out as wrong pixels without an error,
# PNM values are not scaled when their maximum is not 255, and a TIFF's orientation is not what Pillow makes of it.
_DALI_FORMATS = frozenset({"jpeg", "png", "bmp", "webp", "jpeg2000"})
# Pillow also opens formats that run other programs (EPS) or that are no photographs; these are enough for images.
_PILLOW_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "JPEG2000", "PPM", "GIF", "AVIF")
# The share of a batch's baseline JPEGs that goes to the GPU's JPEG engines, where it has any; the rest goes to CUDA.
_HW_DECODER_LOAD = 0.65

# By process: a lock that another thread held at a fork stays locked in the child.
_pillow_locks: dict[int, threading.Lock] = {}
# Pipelines inherited through a fork: their threads do not exist in the child, and ending them would wait for ever.
_inherited: list[Any] = []


class DecodeError(RuntimeError):
    """Some images of a batch could not be decoded.

    `failures` holds one (sample_id, path, reason) for each of them, in the batch's order; the message names them all.
    """

    def __init__(self, failures: Sequence[tuple[int, str, str]]) -> None:
        self.failures = tuple(failures)
        super().__init__(self.failures)

    def __str__(self) -> str:
        lines = (f"sample {sample_id} ({path}): {reason}" for sample_id, path, reason in self.failures)
        return "\n  ".join((f"{len(self.failures)} image(s) could not be decoded:", *lines))


def decode_with_pillow(data: np.ndarray, *, max_pixels: int | None = None, apply_exif: bool = False) -> np.ndarray:
    """Decode one image as `Image.open(...).convert("RGB")` does, refusing damaged data.

    `data` is uint8 [n_bytes]; the result is uint8 [H, W, 3]. 16-bit grey is scaled to 8 bits by rounding v / 257 as
    DALI does (Pillow's own conversion clips it). Raises ValueError for more than `max_pixels` pixels and for 32-bit or
    float pixels, and whatever Pillow raises for data that it cannot decode whole; Pillow's own limit,
    twice Image.MAX_IMAGE_PIXELS, holds too.
    """
    # Pillow warns of large and oddly made images; where users turn warnings into errors that would fail a good sample.
    # catch_warnings changes state of the whole process, hence the lock.
    with _pillow_locks.setdefault(os.getpid(), threading.Lock()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.init()  # loads the plugins once; which ones there are depends on how Pillow was built
        formats = [name for name in _PILLOW_FORMATS if name in Image.OPEN]
        stream = io.BytesIO(data)  # pyright: ignore[reportArgumentType]  (its stubs know no buffers before Python 3.12)
        try:
            opened = Image.open(stream, formats=formats)
        except UnidentifiedImageError:
            # Pillow's own message names the stream by its address.
            reason = f"no image that Pillow knows: {len(data)} bytes, beginning {bytes(data[:8])!r}"
            raise UnidentifiedImageError(reason) from None
        with opened as image:
            _check_pixels(image.height, image.width, max_pixels)
            image.load()
            if apply_exif:
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I;16"):
                grey = np.asarray(image).astype(np.uint32)
                return np.repeat(((grey + 128) // 257).astype(np.uint8)[:, :, None], 3, axis=2)
            if image.mode in ("I", "F"):
                raise ValueError(f"pixels of Pillow's mode {image.mode!r} have no 8-bit form: store 8 or 16 bits")
            return np.array(image.convert("RGB"))


def _check_pixels(height: int, width: int, max_pixels: int | None) -> None:
    if max_pixels is not None and height * width > max_pixels:
        raise ValueError(
            f"the header says height {height} and width {width}: {height * width} pixels, max_pixels is {max_pixels}"
        )


class Decoder:
    """Decodes batches of encoded images into ragged batches of RGB pixels with DALI.

    `device` is where the pixels go. `max_batch` is the most images in a call, `num_threads` the number of DALI's CPU
    threads. An image whose header says more than `max_pixels` pixels is refused before any decoder sees it.
    `apply_exif` turns images as their EXIF orientation says; without it pixels come as stored, as torchvision loads
    them.

    Calls release the GIL while DALI works, and one call runs at a time. A forked child must make its own Decoder: use
    of the parent's raises RuntimeError. Raises ValueError for an argument out of range.
    """

    def __init__(
        self, *, device: torch.device, max_batch: int, num_threads: int, max_pixels: int, apply_exif: bool = False
    ) -> None:
        for name, value in (("max_batch", max_batch), ("num_threads", num_threads), ("max_pixels", max_pixels)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device must be a CPU or CUDA device, got {device}")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._device = device
        self._max_batch = max_batch
        self._max_pixels = max_pixels
        self._apply_exif = apply_exif
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._closed = False
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._reading: deque[tuple[Any, tuple[np.ndarray, ...]]] = deque()  # encoded bytes until the GPU has read them
        self._pipeline = _Pipeline(device, max_batch=max_batch, num_threads=num_threads, apply_exif=apply_exif)
        self._pipeline.build()

    def decode(
        self, encoded: Sequence[np.ndarray], sample_ids: Sequence[int] | np.ndarray, describe: Callable[[int], str]
    ) -> RaggedBatch:
        """Decode one batch; the pixels stay in DALI's memory.

        `encoded` holds uint8 [n_bytes] arrays, read in place. `describe` tells where a sample_id came from, for errors.
        A sample's pixels do not depend on its neighbours' being good or bad.

        On the CPU the pixels are there on return, and live as long as the batch's `owners`.
        On the GPU the call returns when the host's part is done: make the stream that reads the pixels wait for the
        event `ready`, and keep `owners` until an event recorded on that stream after the last kernel that reads them
        has passed. Only then drop them: DALI frees and reuses the memory in the order of its own streams, which know
        nothing of the reader's. The encoded bytes, which the GPU may still read, the decoder holds itself, so that a
        batch that nobody reads can be dropped at any time.

        Raises DecodeError naming every sample that neither DALI nor Pillow could decode, or that has more than
        max_pixels; the decoder goes on with the next batch. Raises ValueError for more than max_batch images, and
        RuntimeError after close() or in a forked child.
        """
        if len(encoded) != len(sample_ids):
            raise ValueError(
                f"encoded and sample_ids must have one length of at most max_batch={self._max_batch}, "
                f"got {len(encoded)} and {len(sample_ids)}"
            )
        batch, reasons = self._decode_locked(encoded, None)
        if reasons:
            rows = ((int(sample_ids[row]), row) for row in sorted(reasons))
            raise DecodeError([(sample_id, describe(sample_id), reasons[row]) for sample_id, row in rows])
        assert batch is not None
        return batch

    def decode_or_stand_in(
        self, encoded: Sequence[np.ndarray], stand_in: np.ndarray
    ) -> tuple[RaggedBatch, dict[int, str]]:
        """The same, with the stand-in (uint8 [H, W, 3]) for what cannot be decoded; and why, by row of the batch."""
        batch, reasons = self._decode_locked(encoded, stand_in)
        assert batch is not None
        return batch, reasons

    def _decode_locked(
        self, encoded: Sequence[np.ndarray], stand_in: np.ndarray | None
    ) -> tuple[RaggedBatch | None, dict[int, str]]:
        if os.getpid() != self._pid:
            raise RuntimeError("this Decoder belongs to the parent process: make a new one after fork")
        if len(encoded) > self._max_batch:
            raise ValueError(f"encoded must hold at most max_batch={self._max_batch} images, got {len(encoded)}")
        with self._lock:
            if self._closed:
                raise RuntimeError("this Decoder is closed")
            try:
                batch, reasons = self._decode(encoded, stand_in)
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
            return batch, reasons

    def close(self) -> None:
        """End DALI's threads; pixels already handed out stay as they are. A second call does nothing."""
        if os.getpid() == self._pid:
            with self._lock:
                self._closed = True
                self._pipeline.close()
                for ready, _ in self._reading:
                    ready.synchronize()
                self._reading.clear()

    def _decode(
        self, encoded: Sequence[np.ndarray], stand_in: np.ndarray | None
    ) -> tuple[RaggedBatch | None, dict[int, str]]:
        reasons: dict[int, str] = {}
        known: list[int] = []  # rows for DALI
        alone: list[int] = []
        for row, data in enumerate(encoded):
            try:
                header = read_header(data)
            except HeaderError:
                alone.append(row)  # Pillow may know the format
                continue
            try:
                _check_pixels(header.height, header.width, self._max_pixels)
            except ValueError as error:
                reasons[row] = str(error)
                continue
            (known if header.format in _DALI_FORMATS else alone).append(row)

        table = _Table(len(encoded), self._device, self._stream)
        failure = ""
        if known:
            self._pipeline.build()  # outside: that a new pipeline cannot be made is no image's fault
            try:
                outputs = self._pipeline.run([encoded[row] for row in known], self._stream)
            except RuntimeError as error:  # DALI's only answer to an image that it refuses
                failure = str(error) or type(error).__name__  # not itself: it has this frame, a cycle that holds pixels
                alone = sorted(alone + known)
            else:
                table.put_outputs(known, outputs)
        if alone:
            refused = self._decode_each_alone(encoded, alone, set(known), table, reasons)
            if failure and not refused:  # want of memory, say: right, but slow from now on
                warnings.warn(
                    f"DALI failed on a batch and then decoded each of its images alone: {failure}",
                    RuntimeWarning,
                    stacklevel=3,
                )
        if reasons and stand_in is None:
            return None, reasons
        for row in reasons:
            assert stand_in is not None
            table.put_array(row, stand_in)
        return table.batch(), reasons

    def _decode_each_alone(
        self, encoded: Sequence[np.ndarray], rows: list[int], known: set[int], table: _Table, reasons: dict[int, str]
    ) -> int:
        """Decode `rows` one by one; returns how many of the `known` ones DALI refused."""
        devices = [self._device] if self._stream is None else [self._device, torch.device("cpu")]
        single = [_Pipeline(device, max_batch=1, num_threads=1, apply_exif=self._apply_exif) for device in devices]
        refused = 0
        for row in rows:
            data = encoded[row]
            if row in known:
                if self._accepts(single[0], data, row, table):
                    continue
                refused += 1
                if any(self._accepts(pipeline, data, row, table) for pipeline in single[1:]):
                    continue
            try:
                pixels = decode_with_pillow(data, max_pixels=self._max_pixels, apply_exif=self._apply_exif)
            except Exception as error:  # hostile bytes make Pillow raise struct.error, IndexError and many more
                reasons[row] = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            else:
                table.put_array(row, pixels)
        return refused

    def _accepts(self, pipeline: _Pipeline, data: np.ndarray, row: int, table: _Table) -> bool:
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


class _Pipeline:
    """One DALI pipeline, image bytes to RGB pixels; after a failure it is built anew, for DALI calls it invalid."""

    def __init__(self, device: torch.device, *, max_batch: int, num_threads: int, apply_exif: bool) -> None:
        self.on_gpu = device.type == "cuda"
        self._options = {
            "device_id": device.index if self.on_gpu else None,
            "batch_size": max_batch,
            "num_threads": num_threads,
        }
        self._apply_exif = apply_exif
        self._pipeline: Any = None
        self._pid = os.getpid()

    def build(self) -> Any:
        if self._pipeline is None:
            try:
                from nvidia.dali import fn
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    "decoding needs DALI: pip install nvidia-dali-cuda130 (or nvidia-dali-cuda120 for an older driver)"
                ) from error
            from nvidia.dali.pipeline import Pipeline
            from nvidia.dali.types import DALIDataType, DALIImageType

            # A call runs one batch, so a longer queue would only hold memory.
            self._pipeline = Pipeline(prefetch_queue_depth=1, exec_dynamic=True, **self._options)
            decoding = {"output_type": DALIImageType.RGB, "adjust_orientation": self._apply_exif}
            if self.on_gpu:
                # Fancy upsampling brings chroma closest to libjpeg's, that is to the CPU decoder's and Pillow's.
                decoding |= {"hw_decoder_load": _HW_DECODER_LOAD, "jpeg_fancy_upsampling": True}
            with self._pipeline:
                data = fn.external_source(name="encoded", no_copy=True, dtype=DALIDataType.UINT8, ndim=1)
                pixels = fn.decoders.image(data, device="mixed" if self.on_gpu else "cpu", **decoding)
                self._pipeline.set_outputs(pixels)
            self._pipeline.build()
        return self._pipeline

    def run(self, encoded: list[np.ndarray], stream: Any) -> Any:
        """Decode `encoded`, which the caller keeps alive; with a stream, it and not the host waits for the pixels."""
        pipeline = self.build()
        try:
            pipeline.feed_input("encoded", encoded)
            (outputs,) = pipeline.run(stream)
        except BaseException:
            self.close()
            raise
        return outputs

    def close(self) -> None:
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None and os.getpid() != self._pid:
            _inherited.append(pipeline)

    def __del__(self) -> None:
        self.close()


class _Table:
    """The rows of a ragged batch while they are filled in; every image is contiguous [H, W, 3]."""

    def __init__(self, count: int, device: torch.device, stream: Any) -> None:
        self._addresses = np.zeros(count, np.int64)
        self._sizes = np.zeros((count, 2), np.int32)
        self._device = device
        self._stream = stream
        self.owners: list[Any] = []

    def put_outputs(self, rows: list[int], outputs: Any) -> None:
        """Take a DALI TensorList of uint8 [H, W, 3] samples; addresses and shapes are host data, so nothing waits."""
        shapes = np.array(outputs.shape())
        if shapes.shape != (len(rows), 3) or (shapes[:, 2] != 3).any():
            raise AssertionError(f"DALI gave samples of shapes {shapes.tolist()}, not [H, W, 3]")
        self._addresses[rows] = [outputs[i].data_ptr() for i in range(len(rows))]
        self._sizes[rows] = shapes[:, :2]
        self.owners.append(outputs)

    def put_array(self, row: int, pixels: np.ndarray) -> None:
        self._sizes[row] = pixels.shape[:2]
        if self._stream is None:
            self._addresses[row] = pixels.ctypes.data
            self.owners.append(pixels)
            return
        with torch.cuda.stream(self._stream):
            copied = torch.from_numpy(pixels).to(self._device)
        self._addresses[row] = copied.data_ptr()
        self.owners.append(copied)

    def batch(self) -> RaggedBatch:
        strides = np.empty((len(self._sizes), 3), np.int64)
        strides[:, 0], strides[:, 2] = 1, 3
        strides[:, 1] = 3 * self._sizes[:, 1].astype(np.int64)
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record(self._stream)
        return RaggedBatch(
            addresses=self._addresses,
            sizes=self._sizes,
            strides=strides,
            device=self._device,
            owners=tuple(self.owners),
            ready=ready,
        )
