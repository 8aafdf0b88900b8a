"""DALI's image decoder as a pipeline of one batch a call: the only file that imports DALI."""

from __future__ import annotations

import ctypes
import io
import os
import weakref
from typing import Any

import numpy as np
import torch
from PIL import Image

from .header import Header

# Of one picture with profile, alpha and metadata; more belong to an animation.
_MAX_WEBP_CHUNKS = 16
# Where a PNG says how many bits a value has; the byte after it is 0 for grey.
_PNG_DEPTH = 24
# The share of a batch's JPEGs that goes to the GPU's JPEG engines, where it has any: all that these can decode. With a
# smaller one the rest goes to CUDA, which may round otherwise, and which images those are depends on their neighbours.
_HW_DECODER_LOAD = 1.0

# All that exist in this process.
_pipelines: weakref.WeakSet[DaliPipeline] = weakref.WeakSet()


def takes(header: Header, data: np.ndarray) -> bool:
    """Tell whether DALI gets an image (uint8 [n_bytes] with this header): where it does what Pillow does.

    Not for JPEG 2000: there are damaged files that end the process. BMPs that lack their last bytes and two-channel and
    float TIFFs come out as wrong pixels without an error, PNM values are not scaled when their maximum is not 255, and
    a TIFF's orientation is not what Pillow makes of it. It mends JPEGs and WebPs that Pillow refuses, and rounds PNGs
    of 16-bit colours, of which Pillow takes the high bytes (both round those of 16-bit grey).
    """
    if header.format == "jpeg":
        from .jpeg_scan import is_in_order  # imports Numba

        return is_in_order(data)
    if header.format == "webp":
        return _is_whole_webp(data)
    return header.format == "png" and (data[_PNG_DEPTH] != 16 or data[_PNG_DEPTH + 1] == 0)


def _is_whole_webp(data: np.ndarray) -> bool:
    # Whether its chunks fill the file, which says how long it is.
    view = data.data
    if int.from_bytes(view[4:8], "little") + 8 != len(view):
        return False
    at = 12
    for _ in range(_MAX_WEBP_CHUNKS):
        if at >= len(view):
            break
        size = int.from_bytes(view[at + 4 : at + 8], "little")
        at += 8 + size + (size & 1)
    return at == len(view)


def _small_jpeg() -> np.ndarray:
    out = io.BytesIO()
    Image.new("RGB", (64, 64)).save(out, "JPEG")
    return np.frombuffer(out.getvalue(), np.uint8)


class DaliPipeline:
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
        _pipelines.add(self)

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
            if self.on_gpu and self._options["batch_size"] > 1:
                # How many images a batch may give to the engines is settled by a pipeline's first.
                self.run([_small_jpeg()] * self._options["batch_size"], None)
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
        self._pipeline = None

    def leave_to_parent(self) -> None:
        """In a forked child: forget the parent's pipeline without ending it."""
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            getattr(type(pipeline), "_pipes", set()).discard(weakref.ref(pipeline))
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(pipeline))


def _leave_to_parent() -> None:
    # Their threads do not exist in the child: ending a pipeline waits for them for ever, or crashes. It would be ended
    # with its last reference, and by DALI, which ends all that it knows, when the interpreter ends.
    for pipeline in list(_pipelines):
        pipeline.leave_to_parent()


os.register_at_fork(after_in_child=_leave_to_parent)
