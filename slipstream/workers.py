"""The threads that make batches ahead of the consumer, and what they share.

One reads and decodes, one draws the plan and, on the CPU, cuts the crops. They know nothing of the loader, so that a
dropped loader ends them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from slipstream_kernels.ragged import RaggedBatch

from .bad_samples import Record
from .batch_stage import BatchStage, apply_batch_stages
from .collate import collate
from .crop import ImageSizeError
from .dataset import SlipstreamDataset
from .decode import DecodeError, Decoder, WrongPixelsError
from .device import to_device, use_device
from .fetch_ahead import NOT_THE_STEPS, FetchAhead, fetch_ahead
from .loading import Decoded, boxes_of, load_batch, sample_ids_of
from .pipeline import Pipeline
from .plan import Plan
from .sampler_windowed import Order
from .shares import Shares
from .source import ReadError, UnavailableError

_PATIENCE = 0.3  # seconds
_NO_END = 1 << 60


@dataclass(kw_only=True, slots=True, weakref_slot=True)
class Resources:
    """What a loader's threads share; it does not know the loader, so that a dropped loader ends."""

    dataset: SlipstreamDataset
    device: torch.device
    pipelines: dict[str, Pipeline]
    backends: dict[str, str]
    image_fields: list[str]
    other_fields: list[str]
    decoder: Decoder
    pool: ThreadPoolExecutor
    num_threads: int
    prefetch: int
    verbose: bool
    batch_stages: tuple[BatchStage, ...] = ()
    batch_keys: tuple[int, ...] = ()
    return_plan: bool = False
    on_error: str = "raise"
    tells_valid: bool = False
    stand_in: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((1, 1, 3), np.uint8))
    record: Record = dataclasses.field(default_factory=Record)
    work: Work | None = None
    held: deque[tuple[Any, Any]] = dataclasses.field(default_factory=deque)
    closed: bool = False
    pid: int = 0

    def __post_init__(self) -> None:
        self.pid = os.getpid()

    def check_usable(self) -> None:
        if os.getpid() != self.pid:
            raise RuntimeError("this loader belongs to the parent process: make a new one after fork")
        if self.closed:
            raise RuntimeError("this loader is shut down: make a new one")

    def hold(self, event: Any, owners: Any) -> None:
        """Keep what a stream still reads until its event has passed; not the iterator's, which may be gone before."""
        self.held.append((event, owners))
        self.let_go()

    def let_go(self) -> None:
        """Drop what no stream reads any more."""
        while self.held and self.held[0][0].query():
            self.held.popleft()

    def close(self) -> None:
        if self.closed or os.getpid() != self.pid:
            return
        self.closed = True
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with on_device:
            try:
                if self.work is not None:
                    self.work.stop()
                for event, _ in self.held:
                    event.synchronize()
            finally:  # a device that failed raises at every wait
                self.held.clear()
                self.pool.shutdown()
                self.decoder.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """A batch whose host work is done: images, plan and prepared launch of each image field (no plan: images as is)."""

    sample_ids: np.ndarray
    epoch: int
    images: dict[str, tuple[RaggedBatch, Plan | None, Any]]
    values: dict[str, list[Any]]
    valid: np.ndarray


@dataclass(frozen=True, slots=True)
class Outage:
    """In a batch's place: an error that is not its samples' (a store is down, an image of a batch before was decoded
    wrongly); the batch is read, or read again, when asked for."""

    error: UnavailableError | WrongPixelsError


class Work:
    """One epoch's two threads and the channels between them; more threads where files are to be fetched."""

    def __init__(self, resources: Resources, sampler: Order, epoch: int, shares: Shares) -> None:
        if resources.work is not None:
            resources.work.stop()
        resources.work = self
        self.stopped = False
        self._decoder = resources.decoder
        self._patience = _PATIENCE
        self._ahead = fetch_ahead(
            resources.dataset,
            lambda step: sample_ids_of(resources, sampler, epoch, shares.positions(step)[0]),
            len(shares),
            progress=resources.verbose,
        )
        self._decoded = Channel(1)
        self.batches = Channel(resources.prefetch)
        self._again = Channel(_NO_END)
        self._threads = [
            threading.Thread(
                target=decode_batches,
                args=(resources, self._decoded, self._again, sampler, epoch, shares, self._ahead),
                name="slipstream-decode",
                daemon=True,
            ),
            threading.Thread(
                target=crop_batches,
                args=(resources, self._decoded, self.batches, epoch, len(shares)),
                name="slipstream-plan",
                daemon=True,
            ),
        ]
        self._pid = os.getpid()
        for thread in self._threads:
            thread.start()

    def try_again(self) -> None:
        """Read the batch again that an Outage took the place of."""
        self._again.put(None)

    def stop(self) -> None:
        """End the threads, after the step that each is in; what was made ahead is dropped.

        A thread that waits for its source is left to end by itself: a store may take a minute to answer, or to fail.
        """
        if os.getpid() != self._pid:
            return
        self.stopped = True
        self._decoded.close()
        self.batches.close()
        self._again.close()
        if self._ahead is not None:
            self._ahead.stop()
        reading, planning = self._threads
        reading.join(self._patience)
        while reading.is_alive() and self._decoder.busy:
            reading.join(_PATIENCE)
        self._patience = 0.0
        planning.join()


def end_from_any_thread(end: Callable[[], None]) -> None:
    """Call `end`, which waits for threads of ours, as a finalizer: the collector may run it on such a thread."""
    if threading.current_thread().name.startswith("slipstream-"):
        threading.Thread(target=end, name="slipstream-end").start()
    else:
        end()


CLOSED = object()


class _Holder:
    made: Any = None


class Channel:
    """A bounded queue that can be closed: then what waits in put and get returns at once, and what it held is gone.

    For one thread that puts and one that takes. No lock is held by either, as Ctrl-C may come at any call of the
    consumer's and leave a lock behind; what wakes the other is a hint, upon which it looks for itself.
    """

    def __init__(self, capacity: int) -> None:
        self._items: deque[Any] = deque()
        self._capacity = capacity
        self.closed = False
        self._there: SimpleQueue[None] = SimpleQueue()
        self._room: SimpleQueue[None] = SimpleQueue()

    def put(self, item: Any) -> bool:
        """Add an item once there is room; False if the channel is closed."""
        while not self.closed and len(self._items) >= self._capacity:
            self._room.get()
        self._items.append(item)
        if self.closed:
            self._items.clear()
            return False
        _wake(self._there)
        return True

    def get(self) -> Any:
        """Take the oldest item once there is one; CLOSED if the channel is closed."""
        holder = _Holder()
        return holder.made if self.take(holder) else CLOSED

    def take(self, holder: Any) -> bool:
        """Move the oldest item, once there is one, to `holder.made`; False if the channel is closed.

        An exception at any point, as Ctrl-C is one, loses none: the item is here, or there, or both.
        """
        _wake(self._room)  # a call before may have been interrupted when it had made room
        while not self.closed:
            with contextlib.suppress(IndexError):  # there is none, or it was closed just now
                holder.made = self._items[0]
                self._items.popleft()
                _wake(self._room)
                return True
            self._there.get()
        return False

    def close(self) -> None:
        self.closed = True
        self._items.clear()
        _wake(self._there)
        _wake(self._room)


def _wake(hints: SimpleQueue[None]) -> None:
    # One is enough: who takes it looks for itself afterwards.
    if hints.empty():
        hints.put(None)


def decode_batches(
    resources: Resources,
    out: Channel,
    again: Channel,
    sampler: Order,
    epoch: int,
    shares: Shares,
    ahead: FetchAhead | None,
) -> None:
    # The first thread: ids, bytes, pixels. An error takes its batch's place; after an outage, which says nothing of the
    # batch, it is made once the consumer asks `again`: until then nobody knows of anything that has changed.
    use_device(resources.device)
    step = 0
    while step < len(shares):
        try:
            positions, valid = shares.positions(step)
            if out.closed:
                return
            with contextlib.nullcontext() if ahead is None else ahead.reading():
                made: Any = load_batch(resources, sampler, epoch, positions, valid, ahead)
        except BaseException as error:  # whatever it is, the consumer waits for this batch
            if isinstance(error, (ReadError, DecodeError)):
                resources.record.add("raise", error.failures)
            made = _without_locals(error)
            if isinstance(error, NOT_THE_STEPS):
                made = Outage(error)
        failed = isinstance(made, Outage)
        if not out.put(made):
            return
        del made
        if not failed:
            step += 1
        elif again.get() is CLOSED:
            return


def crop_batches(resources: Resources, source: Channel, out: Channel, epoch: int, num_batches: int) -> None:
    # The second thread: the plan, and on the CPU the crops too. Its batches have their numbers.
    use_device(resources.device)
    number = 0
    while number < num_batches:
        made = source.get()
        if made is CLOSED:
            return
        if isinstance(made, Decoded):
            try:
                made = _draw(resources, made, epoch)
                if resources.device.type == "cpu":
                    made = finish(resources, made)
            except BaseException as error:
                made = _without_locals(error)
        if not out.put((number, made)):
            return
        number += not isinstance(made, Outage)
        del made


def _without_locals(error: BaseException) -> BaseException:
    # A user may keep an error: not with it the bytes and pixels in the frames that it passed through.
    traceback.clear_frames(error.__traceback__)
    return error


def _draw(resources: Resources, decoded: Decoded, epoch: int) -> Drawn:
    images: dict[str, tuple[RaggedBatch, Plan | None, Any]] = {}
    for field, batch in decoded.images.items():
        pipeline = resources.pipelines.get(field)
        if pipeline is None:
            images[field] = (batch, None, None)
            continue
        try:
            boxes = {
                crop: boxes_of(of, decoded.values[of], decoded.sample_ids) for crop, of in pipeline.box_fields.items()
            }
            plan = pipeline.draw(batch.sizes, decoded.sample_ids, epoch, boxes)
        except ImageSizeError as error:
            sample_id = int(decoded.sample_ids[error.index])
            path = resources.dataset.source.describe(sample_id)
            failures = [(sample_id, path, str(error))]
            resources.record.add("raise", failures)
            raise DecodeError(failures) from error
        images[field] = (batch, plan, pipeline.prepare(batch, plan, resources.backends[field]))
    return Drawn(sample_ids=decoded.sample_ids, epoch=epoch, images=images, values=decoded.values, valid=decoded.valid)


def finish(resources: Resources, drawn: Drawn) -> dict[str, Any]:
    batch: dict[str, Any] = {}
    for field, (images, plan, prepared) in drawn.images.items():
        if plan is None:
            batch[field] = _as_rgb(resources, images)
            continue
        pipeline = resources.pipelines[field]
        crops = pipeline.run(images, prepared, resources.backends[field], resources.pool, resources.num_threads)
        batch.update(pipeline.outputs(crops, plan))
    labels = {stage.label for stage in resources.batch_stages}
    for field, values in drawn.values.items():
        # labels are checked on the host, by the stage that then moves them
        kind = resources.dataset.fields[field]
        batch[field] = collate(values, torch.device("cpu") if field in labels else resources.device, kind)
    if resources.tells_valid:
        batch["_valid"] = to_device(drawn.valid, resources.device)
    batch["_indices"] = torch.from_numpy(np.array(drawn.sample_ids, np.int64))
    plans: dict[str, Any] = {field: plan for field, (_, plan, _) in drawn.images.items() if plan is not None}
    if resources.batch_stages:
        batch, plans["_batch_stages"] = apply_batch_stages(
            resources.batch_stages, resources.batch_keys, batch, drawn.sample_ids, drawn.epoch
        )
    if resources.return_plan:
        batch["_plan"] = plans
    return batch


def _as_rgb(resources: Resources, images: RaggedBatch) -> list[torch.Tensor]:
    if images.device.type == "cpu" and images.has_planes:
        from slipstream_kernels.source_rows_cpu import images_as_rgb

        return images_as_rgb(images, resources.pool, resources.num_threads)
    images.wait_on_current_stream()
    views = [images.image(index) for index in range(len(images))]
    # DALI frees its GPU buffers in the order of its own streams: what a user may keep must be a copy
    return views if images.device.type == "cpu" else [view.clone() for view in views]
