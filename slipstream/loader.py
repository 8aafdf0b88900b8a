"""Iteration: batches of named tensors, read, decoded and cropped ahead. Wires the pieces and holds no image maths.

Two threads work ahead of the consumer: one reads and decodes, one draws the plan and, on the CPU, cuts the crops. On a
GPU the crop launch is made at `next()`, on the consumer's own stream, so a batch is ready in the order of that stream
and nothing has to wait on the host.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from slipstream_kernels.ragged import RaggedBatch

from . import checks
from .crop import ImageTooSmallError
from .dataset import SlipstreamDataset
from .decode import DecodeError, Decoder
from .pipeline import Pipeline, resolve_backend, to_device
from .plan import Plan
from .sampler import Sampler


class SlipstreamLoader:
    """Batches of a dataset's samples: named crops of every image, and the other fields.

    dataset: a SlipstreamDataset. batch_size: samples a batch; the last one is shorter, or left out with drop_last.
    shuffle: a new order each epoch. seed: of the order, the boxes and the stages. pipelines: image field -> stages,
    beginning with a crop stage; an image field without one gives a list of decoded uint8 [3, H, W] tensors.
    exclude_fields: fields not to read. device: None is SLIPSTREAM_DEVICE, else the current CUDA device (LOCAL_RANK's
    under torchrun), else the CPU. backend: None (Triton on CUDA, else the CPU kernels), "triton" or "cpu". num_threads:
    for decoding and for CPU crops, None is this process's share of the cores. prefetch: batches made ahead.
    apply_exif: turn images as their EXIF orientation says. verbose: a line about the data, and progress of downloads.

    Each `iter()` is the next epoch (0, 1, ...; `set_epoch(n)` sets the next one) and ends the iterator before it. The
    same seed gives the same bytes, whatever the batch size, the device's speed or the number of threads. Raises
    ValueError or TypeError that names the argument when made; DecodeError or ReadError, naming samples, at `next()`,
    after which iteration goes on with the next batch.
    """

    def __init__(
        self,
        dataset: SlipstreamDataset,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        pipelines: Mapping[str, Any] | None = None,
        exclude_fields: Sequence[str] = (),
        device: torch.device | str | None = None,
        backend: str | None = None,
        num_threads: int | None = None,
        prefetch: int = 2,
        drop_last: bool = False,
        apply_exif: bool = False,
        verbose: bool = True,
    ) -> None:
        if not isinstance(dataset, SlipstreamDataset):
            raise TypeError(f"dataset must be a SlipstreamDataset, got {type(dataset).__name__}")
        self.dataset = dataset
        self.batch_size = checks.whole("batch_size", batch_size, 1)
        self.drop_last = checks.flag("drop_last", drop_last)
        self.seed = checks.whole("seed", seed)
        self.device = _device(device)
        self.backend = resolve_backend(checks.one_of("backend", backend, checks.BACKENDS), self.device)
        checks.flag("verbose", verbose)
        num_threads = _own_cores() if num_threads is None else checks.whole("num_threads", num_threads, 1)
        prefetch = checks.whole("prefetch", prefetch, 1)

        fields = _read_fields(dataset.fields, exclude_fields)
        images = [name for name, kind in fields.items() if kind == "image"]
        compiled = _compile(pipelines or {}, fields, images, self.seed, exclude_fields)
        self._sampler = Sampler(len(dataset), shuffle=checks.flag("shuffle", shuffle), seed=self.seed)
        self._resources = _Resources(
            dataset=dataset,
            device=self.device,
            backend=self.backend,
            pipelines=compiled,
            image_fields=images,
            other_fields=[name for name in fields if name not in images],
            decoder=Decoder(
                device=self.device,
                max_batch=self.batch_size,
                num_threads=num_threads,
                max_pixels=dataset.max_pixels,
                apply_exif=checks.flag("apply_exif", apply_exif),
            ),
            pool=ThreadPoolExecutor(num_threads, thread_name_prefix="slipstream-crop"),
            num_threads=num_threads,
            prefetch=prefetch,
            verbose=verbose,
        )
        self._next_epoch = 0
        self._finalizer = weakref.finalize(self, self._resources.close)
        if verbose:
            print(f"slipstream: {len(dataset)} samples, batches of {self.batch_size} on {self.device}", flush=True)

    def __len__(self) -> int:
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full if self.drop_last or not rest else full + 1

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next `iter()` gives; the one running goes on."""
        self._next_epoch = checks.whole("epoch", epoch, 0)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The next epoch's batches; the iterator before it ends."""
        self._resources.check_usable()
        epoch, self._next_epoch = self._next_epoch, self._next_epoch + 1
        work = _Work(self._resources, self._sampler, epoch, self.batch_size, len(self))
        return _Epoch(self, work)

    def shutdown(self) -> None:
        """End the background threads and the decoder; a second call does nothing. Batches handed out stay valid."""
        self._finalizer()

    def __enter__(self) -> SlipstreamLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


@dataclass(kw_only=True, slots=True, weakref_slot=True)
class _Resources:
    """What a loader's threads share; it does not know the loader, so that a dropped loader ends."""

    dataset: SlipstreamDataset
    device: torch.device
    backend: str
    pipelines: dict[str, Pipeline]
    image_fields: list[str]
    other_fields: list[str]
    decoder: Decoder
    pool: ThreadPoolExecutor
    num_threads: int
    prefetch: int
    verbose: bool
    work: _Work | None = None
    closed: bool = False
    pid: int = 0

    def __post_init__(self) -> None:
        self.pid = os.getpid()

    def check_usable(self) -> None:
        if os.getpid() != self.pid:
            raise RuntimeError("this loader belongs to the parent process: make a new one after fork")
        if self.closed:
            raise RuntimeError("this loader is shut down: make a new one")

    def close(self) -> None:
        if self.closed or os.getpid() != self.pid:
            return
        self.closed = True
        if self.work is not None:
            self.work.stop()
        self.pool.shutdown()
        self.decoder.close()


class _Epoch:
    """The iterator of one epoch."""

    def __init__(self, loader: SlipstreamLoader, work: _Work) -> None:
        self._loader = loader
        self._work = work
        self._left = len(loader)
        self._held: deque[tuple[Any, Any]] = deque()
        weakref.finalize(self, work.stop)

    def __iter__(self) -> _Epoch:
        return self

    def __next__(self) -> dict[str, Any]:
        self._loader._resources.check_usable()
        if self._work.stopped and self._left:
            raise RuntimeError("this iterator was ended by a newer one of the same loader")
        if not self._left:
            self._work.stop()
            raise StopIteration
        made = self._work.batches.get()
        if made is _CLOSED:
            self._loader._resources.check_usable()
            raise RuntimeError("this iterator was ended by a newer one of the same loader")
        self._left -= 1
        if isinstance(made, BaseException):
            raise made
        if isinstance(made, _Drawn):
            made = self._launch(made)
        return made

    def _launch(self, drawn: _Drawn) -> dict[str, Any]:
        # On a GPU: crops on the current stream, and DALI's buffers held until that stream has read them.
        batch = _finish(self._loader._resources, drawn)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._loader.device))
        self._held.append((event, [images for images, _, _ in drawn.images.values()]))
        while self._held and self._held[0][0].query():
            self._held.popleft()
        return batch


@dataclass(frozen=True, kw_only=True, slots=True)
class _Decoded:
    sample_ids: np.ndarray
    images: dict[str, RaggedBatch]
    values: dict[str, list[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Drawn:
    """A batch whose host work is done: images, plan and prepared launch of each image field (no plan: images as is)."""

    sample_ids: np.ndarray
    images: dict[str, tuple[RaggedBatch, Plan | None, Any]]
    values: dict[str, list[Any]]


class _Work:
    """One epoch's two threads and the channels between them."""

    def __init__(self, resources: _Resources, sampler: Sampler, epoch: int, batch_size: int, num_batches: int) -> None:
        if resources.work is not None:
            resources.work.stop()
        resources.work = self
        self.stopped = False
        self._decoded = _Channel(1)
        self.batches = _Channel(resources.prefetch)
        self._threads = [
            threading.Thread(
                target=_decode_batches,
                args=(resources, self._decoded, sampler, epoch, batch_size, num_batches),
                name="slipstream-decode",
                daemon=True,
            ),
            threading.Thread(
                target=_crop_batches,
                args=(resources, self._decoded, self.batches, epoch, num_batches),
                name="slipstream-plan",
                daemon=True,
            ),
        ]
        self._pid = os.getpid()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads, after the step that each is in; what was made ahead is dropped."""
        if os.getpid() != self._pid:
            return
        self.stopped = True
        self._decoded.close()
        self.batches.close()
        for thread in self._threads:
            thread.join()


_CLOSED = object()


class _Channel:
    """A bounded queue that can be closed: then what waits in put and get returns at once, and what it held is gone."""

    def __init__(self, capacity: int) -> None:
        self._items: deque[Any] = deque()
        self._capacity = capacity
        self._closed = False
        self._changed = threading.Condition()

    def put(self, item: Any) -> bool:
        """Add an item once there is room; False if the channel is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._capacity)
            if self._closed:
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    def get(self) -> Any:
        """Take the oldest item once there is one; _CLOSED if the channel is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._items)
            if self._closed:
                return _CLOSED
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()


def _decode_batches(
    resources: _Resources, out: _Channel, sampler: Sampler, epoch: int, batch_size: int, num_batches: int
) -> None:
    # The first thread: ids, bytes, pixels. An error takes its batch's place.
    source, subset = resources.dataset.source, resources.dataset.sample_ids
    prefetch = getattr(source, "prefetch", None)
    for step in range(num_batches):
        try:
            begin = step * batch_size
            ahead = np.arange(begin, min(begin + (1 + resources.prefetch) * batch_size, len(sampler)))
            if prefetch is None:
                ahead = ahead[:batch_size]
            ids = sampler.sample_ids(epoch, ahead)
            if subset is not None:
                ids = subset[ids]
            if prefetch is not None:
                prefetch(ids, progress=resources.verbose)
            ids = ids[:batch_size]
            made: Any = _Decoded(
                sample_ids=ids,
                images={
                    field: resources.decoder.decode(source.read(ids, field), ids, source.describe)
                    for field in resources.image_fields
                },
                values={field: source.values(ids, field) for field in resources.other_fields},
            )
        except Exception as error:
            made = error
        if not out.put(made):
            return
        del made


def _crop_batches(resources: _Resources, source: _Channel, out: _Channel, epoch: int, num_batches: int) -> None:
    # The second thread: the plan, and on the CPU the crops too.
    for _ in range(num_batches):
        made = source.get()
        if made is _CLOSED:
            return
        if isinstance(made, _Decoded):
            try:
                made = _draw(resources, made, epoch)
                if resources.device.type == "cpu":
                    made = _finish(resources, made)
            except Exception as error:
                made = error
        if not out.put(made):
            return
        del made


def _draw(resources: _Resources, decoded: _Decoded, epoch: int) -> _Drawn:
    images: dict[str, tuple[RaggedBatch, Plan | None, Any]] = {}
    for field, batch in decoded.images.items():
        pipeline = resources.pipelines.get(field)
        if pipeline is None:
            images[field] = (batch, None, None)
            continue
        try:
            plan = pipeline.draw(batch.sizes, decoded.sample_ids, epoch)
        except ImageTooSmallError as error:
            sample_id = int(decoded.sample_ids[error.index])
            path = resources.dataset.source.describe(sample_id)
            raise DecodeError([(sample_id, path, str(error))]) from error
        images[field] = (batch, plan, pipeline.prepare(batch, plan, resources.backend))
    return _Drawn(sample_ids=decoded.sample_ids, images=images, values=decoded.values)


def _finish(resources: _Resources, drawn: _Drawn) -> dict[str, Any]:
    batch: dict[str, Any] = {}
    for field, (images, plan, prepared) in drawn.images.items():
        if plan is None:
            if images.ready is not None:
                torch.cuda.current_stream(images.device).wait_event(images.ready)
            views = [images.image(index) for index in range(len(images))]
            # DALI frees its GPU buffers in the order of its own streams: what a user may keep must be a copy
            batch[field] = views if images.device.type == "cpu" else [view.clone() for view in views]
            continue
        pipeline = resources.pipelines[field]
        crops = pipeline.run(images, prepared, resources.backend, resources.pool, resources.num_threads)
        batch.update(pipeline.outputs(crops, plan))
    for field, values in drawn.values.items():
        batch[field] = collate(values, resources.device)
    batch["_indices"] = torch.from_numpy(np.array(drawn.sample_ids, np.int64))
    return batch


def collate(values: Sequence[Any], device: torch.device) -> Any:
    """One field of a batch: int64, float32 or bool tensors of numbers, equal-shape arrays stacked, the rest as a list.

    Tensors go to the device without waiting for the copy.
    """
    kinds = {type(value) for value in values}
    if kinds <= {bool, np.bool_}:
        return to_device(np.array(values, bool), device)
    if all(issubclass(kind, (int, np.integer)) and kind is not bool for kind in kinds):
        if all(-(2**63) <= value < 2**63 for value in values):
            return to_device(np.array(values, np.int64), device)
        return list(values)
    if all(issubclass(kind, (int, float, np.number)) and kind is not bool for kind in kinds):
        if any(issubclass(kind, np.complexfloating) for kind in kinds):
            return list(values)
        return to_device(np.array(values, np.float32), device)
    if all(isinstance(value, (np.ndarray, torch.Tensor)) for value in values):
        tensors = [value if isinstance(value, torch.Tensor) else _tensor(value) for value in values]
        if all(t is not None and t.shape == tensors[0].shape and t.dtype == tensors[0].dtype for t in tensors):
            stacked = torch.stack(tensors)
            return stacked.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else stacked
    return list(values)


def _tensor(array: np.ndarray) -> Any:
    try:
        return torch.from_numpy(np.array(array))  # a copy: the array may be a read-only view of a map
    except TypeError:  # a dtype that torch does not have
        return None


def _device(given: torch.device | str | None) -> torch.device:
    name = "device"
    if given is None and os.environ.get("SLIPSTREAM_DEVICE"):
        given, name = os.environ["SLIPSTREAM_DEVICE"], "SLIPSTREAM_DEVICE"
    if given is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
    try:
        device = torch.device(given)
    except (RuntimeError, TypeError):
        raise ValueError(f'{name} must be "cpu", "cuda" or "cuda:N", got {given!r}') from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f'{name} must be "cpu", "cuda" or "cuda:N", got {given!r}')
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"{name} is {given!r}, but this machine has no CUDA device that torch can use")
    if device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    if device.index >= torch.cuda.device_count():
        raise ValueError(f"{name} must be below cuda:{torch.cuda.device_count()}, got {given!r}")
    return device


def _own_cores() -> int:
    # Under torchrun the processes of one machine share its cores.
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _read_fields(fields: Mapping[str, str], exclude_fields: Sequence[str]) -> dict[str, str]:
    if isinstance(exclude_fields, str):
        raise TypeError(f"exclude_fields must be a list of field names, got {exclude_fields!r}")
    unknown = [name for name in exclude_fields if name not in fields]
    if unknown:
        raise ValueError(f"exclude_fields names {unknown[0]!r}, the dataset has {', '.join(map(repr, fields))}")
    return {name: kind for name, kind in fields.items() if name not in exclude_fields}


def _compile(
    pipelines: Mapping[str, Any],
    fields: Mapping[str, str],
    images: Sequence[str],
    seed: int,
    exclude_fields: Sequence[str],
) -> dict[str, Pipeline]:
    if not isinstance(pipelines, Mapping):
        raise TypeError(f"pipelines must be a dict of image field -> stages, got {pipelines!r}")
    for name in pipelines:
        if name in exclude_fields:
            raise ValueError(f"pipelines names {name!r}, which exclude_fields leaves out")
        if name not in images:
            raise ValueError(f"pipelines names {name!r}, the dataset's image fields are {list(images)}")
    scopes = {name: name if len(images) > 1 else "" for name in pipelines}
    compiled = {name: Pipeline(stages, seed=seed, field=name, scope=scopes[name]) for name, stages in pipelines.items()}
    taken = {name: "a field" for name in fields if name not in pipelines} | {"_indices": "the sample ids"}
    for field, pipeline in compiled.items():
        for name in pipeline.output_names:
            if name in taken:
                raise ValueError(f"pipelines[{field!r}] gives {name!r}, which is also {taken[name]}: name it otherwise")
            taken[name] = f"given by pipelines[{field!r}]"
    return compiled
