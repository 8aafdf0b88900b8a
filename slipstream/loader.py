"""Iteration: batches of named tensors, read, decoded and cropped ahead. Wires the pieces and holds no image maths.

Two threads work ahead of the consumer: one reads and decodes, one draws the plan and, on the CPU, cuts the crops. On a
GPU the crop launch is made at `next()`, on the consumer's own stream, so a batch is ready in the order of that stream
and nothing has to wait on the host.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from . import checks
from .bad_samples import POLICIES, Report
from .batch_stage import BatchStage, batch_stage_keys, check_mixing
from .dataset import SlipstreamDataset
from .decode import Decoder
from .decode_pillow import TRUNCATED
from .device import choose_device, default_threads, resolve_backend
from .fetch_ahead import check_fits
from .loading import make_stand_in
from .pipeline import Pipeline
from .progress import tell_compiling
from .sampler_windowed import WindowedSampler, make_sampler
from .shares import Shares, choose_ranks, choose_tail, distributed_ranks
from .state import fingerprint, make_state, read_state
from .workers import Drawn, Outage, Resources, Work, end_from_any_thread, finish

_log = logging.getLogger("slipstream")


class SlipstreamLoader:
    """Batches of a dataset's samples: named crops of every image, and the other fields.

    dataset: a SlipstreamDataset. batch_size: samples a batch, of this rank. tail: what becomes of a last, short one:
    "keep" it (one rank), "pad" it to the full size with samples that are False in `_valid` (the default of several
    ranks), "drop" it (drop_last=True), or "uneven": every sample once, so that ranks may differ by a sample and a step.
    rank, world_size: None is torch.distributed's, else torchrun's, else one rank. The samples of a step of all ranks
    together do not depend on how many they are. on_error: what becomes of a sample that cannot be read, decoded or
    cropped: "raise"; "replace" it by grey, False in `_valid`; "skip" it, which makes its batch shorter; or "resample"
    another one, as `_indices` shows. `report()` counts them. truncated: what becomes of a damaged image that Pillow can
    decode in part: "fail", which makes it such a sample, or "grey" for the rest; it is valid then, and in `report()`.
    shuffle: True for a new order of all samples each epoch; "windowed" for one that reads few chunks at a time (64
    lanes of chunks in random order, samples shuffled in windows of four chunks; "windowed:16" has 16 lanes): for a set
    larger than the dataset's max_cache_size. seed: of the order, the boxes and the stages. pipelines: image field ->
    stages, beginning with a crop stage; an image field without one gives a list of decoded uint8 [3, H, W] tensors.
    exclude_fields: fields not to read. device: None is SLIPSTREAM_DEVICE, else the current CUDA device (LOCAL_RANK's
    under torchrun), else the CPU. backend: None (Triton on CUDA, else the CPU kernels), "triton" or "cpu"; a crop
    stage's own goes before it. num_threads: for decoding and for CPU crops, None is this process's share of the cores
    (on a GPU 16 at most, for each takes memory there). prefetch: batches waiting to be taken; up to three more are
    being made. apply_exif: turn images as their EXIF orientation says. batch_stages: MixUp, CutMix, ... on the finished
    batch. return_plan: add `_plan`, a dict of image field -> Plan, what was drawn for the batch, and under
    `_batch_stages` what each batch stage drew. verbose: a line about the data and one where CPU kernels must be
    compiled (rank 0's), and progress of downloads.

    A batch is a dict: each crop by its name, [B, 3, h, w] (without names, under its field: a tensor, or a list of
    them); the other fields as int64, float32 or bool [B], equal-shape arrays stacked, anything else as a list;
    `_indices`, the sample ids, int64 [B]; and, with tail="pad" or on_error="replace", `_valid`, bool [B]. Tensors are
    on the device, ready on its current stream; `_indices` is on the CPU.

    Each `iter()` is the next epoch (0, 1, ...; `set_epoch(n)` sets the next one) and ends the iterator before it. The
    same seed gives the same bytes, whatever the batch size, the device's speed or the number of threads. Raises
    ValueError or TypeError that names the argument when made, and RuntimeError for a backend that cannot run there;
    at `next()` DecodeError or ReadError, naming samples, or ValueError for a pickled field that could run code, after
    which iteration goes on with the next batch; and, under every `on_error`, UnavailableError where a store does not
    answer or the cache folder is full or cannot be written, after which the next `next()` reads the same batch again.
    So it does after a WrongPixelsError, a DecodeError: a GPU's decoder failed in a batch made before.
    """

    def __init__(
        self,
        dataset: SlipstreamDataset,
        batch_size: int,
        *,
        shuffle: bool | str = False,
        seed: int = 0,
        pipelines: Mapping[str, Any] | None = None,
        exclude_fields: Sequence[str] = (),
        device: torch.device | str | None = None,
        backend: str | None = None,
        num_threads: int | None = None,
        prefetch: int = 2,
        drop_last: bool = False,
        tail: str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        on_error: str = "raise",
        truncated: str = "fail",
        apply_exif: bool = False,
        batch_stages: Sequence[BatchStage] = (),
        return_plan: bool = False,
        verbose: bool = True,
    ) -> None:
        if not isinstance(dataset, SlipstreamDataset):
            raise TypeError(
                f"dataset must be a SlipstreamDataset (its indices= makes a subset), got {type(dataset).__name__}"
            )
        self.dataset = dataset
        self.batch_size = checks.whole("batch_size", batch_size, 1)
        self.rank, self.world_size = choose_ranks(rank, world_size)
        self._finds_ranks = rank is None
        self.tail = choose_tail(tail, checks.flag("drop_last", drop_last), self.world_size)
        self.on_error = checks.one_of("on_error", on_error, POLICIES)
        self.seed = checks.whole("seed", seed)
        self.device = choose_device(device)
        self.backend = resolve_backend(checks.one_of("backend", backend, checks.BACKENDS), self.device)
        checks.flag("verbose", verbose)
        num_threads = (
            default_threads(self.device) if num_threads is None else checks.whole("num_threads", num_threads, 1)
        )
        prefetch = checks.whole("prefetch", prefetch, 1)

        tells_valid = self.tail == "pad" or self.on_error == "replace"
        added = {"_indices": True, "_valid": tells_valid, "_plan": checks.flag("return_plan", return_plan)}
        fields = _read_fields(dataset.fields, exclude_fields, [name for name, is_added in added.items() if is_added])
        images = [name for name, kind in fields.items() if kind == "image"]
        pipelines = {} if pipelines is None else pipelines
        compiled = _compile(pipelines, fields, images, self.seed, exclude_fields)
        crops = {name: dtype for each in compiled.values() for name, dtype in each.crop_dtypes.items()}
        mixing = check_mixing(batch_stages, crops, fields)
        backends = {
            name: self.backend if each.stage.backend is None else resolve_backend(each.stage.backend, self.device)
            for name, each in compiled.items()
        }
        self._sampler = make_sampler(dataset, shuffle, self.seed)
        check_fits(dataset, self._sampler, self.world_size, self.batch_size)
        self._resources = Resources(
            dataset=dataset,
            device=self.device,
            pipelines=compiled,
            backends=backends,
            image_fields=images,
            other_fields=[name for name in fields if name not in images],
            decoder=Decoder(
                device=self.device,
                max_batch=self.batch_size,
                num_threads=num_threads,
                max_pixels=dataset.max_pixels,
                apply_exif=checks.flag("apply_exif", apply_exif),
                truncated=checks.one_of("truncated", truncated, TRUNCATED),
            ),
            pool=ThreadPoolExecutor(num_threads, thread_name_prefix="slipstream-crop"),
            num_threads=num_threads,
            prefetch=prefetch,
            verbose=verbose,
            batch_stages=mixing,
            batch_keys=tuple(batch_stage_keys(mixing, self.seed)),
            return_plan=return_plan,
            on_error=self.on_error,
            tells_valid=tells_valid,
            stand_in=make_stand_in(list(compiled.values())),
        )
        self.pipelines = compiled
        order = self._sampler
        how = ["windowed", order.lanes, order.window] if isinstance(order, WindowedSampler) else shuffle
        self._fingerprint = fingerprint(dataset, pipelines, mixing, seed=self.seed, shuffle=how, apply_exif=apply_exif)
        self._next_epoch = self._next_start = 0
        self._progress: _Progress | None = None
        self._finalizer = weakref.finalize(self, end_from_any_thread, self._resources.close)
        if len(dataset) and not len(self._shares(0)):
            step = f"a step of {self.world_size} x {self.batch_size}"
            _log.warning("an epoch has no batch: tail='drop', and %d samples do not fill %s", len(dataset), step)
        if verbose and self.rank == 0:
            tell_compiling()
            took, classes = (getattr(dataset.source, name, None) for name in ("scan_seconds", "classes"))
            scan = "" if took is None else f" (found in {took:.2f} s)"
            scan = f" of {len(classes)} classes{scan}" if classes else scan  # 2 tells a folder of train/ and val/
            print(
                f"slipstream: {len(dataset)} samples{scan}, batches of {self.batch_size} on {self.device}", flush=True
            )

    def __len__(self) -> int:
        return len(self._shares(0))

    def _shares(self, start: int) -> Shares:
        return Shares(
            length=len(self.dataset),
            batch_size=self.batch_size,
            rank=self.rank,
            world_size=self.world_size,
            tail=self.tail,
            start=start,
        )

    def report(self) -> Report:
        """The bad samples met so far, each with its path and reason, and what was done about them."""
        return self._resources.record.report()

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands: a dict of whole numbers and marks, for `load_state_dict` of this or another process.

        The epoch, how many of its samples have been handed out to all ranks together (batches made ahead are not
        counted), and a fingerprint of dataset and pipelines. The same on every rank that has taken as many steps.
        """
        progress = self._progress
        if progress is None:
            return make_state(self._next_epoch, self._next_start, self._fingerprint)
        return make_state(progress.epoch, progress.shares.handed_out(progress.steps), self._fingerprint)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: the next `iter()` gives the rest of its epoch, whatever the batch size and world size.

        An iterator that runs goes on. Raises ValueError that says what differs for a state of another dataset, seed,
        order, pipeline or `apply_exif`, TypeError for what is no state.
        """
        self._next_epoch, self._next_start = read_state(state, self._fingerprint)
        self._progress = None

    def explain(self) -> str:
        """The launches of a batch, in words, a part for each image field with a pipeline (Pipeline.explain)."""
        parts = [pipeline.explain() for pipeline in self.pipelines.values()]
        return "\n".join(parts) or "no pipelines: images are handed out as they are decoded"

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next `iter()` gives; the one running goes on.

        It begins at its first sample, but for the epoch of a state just loaded, which goes on where it stood: a loop
        may set every epoch, the resumed one too. Raises TypeError or ValueError for what is no int in [0, 2**32).
        """
        epoch = checks.whole("epoch", epoch, 0)
        if epoch >= 2**32:
            raise ValueError(f"epoch must be in [0, 2**32), got {epoch}")
        if epoch != self._next_epoch:
            self._next_epoch, self._next_start = epoch, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The next epoch's batches; the iterator before it ends.

        Raises RuntimeError where torch.distributed was initialized after the loader was made, and has other ranks.
        """
        self._resources.check_usable()
        self._check_ranks()
        self._resources.let_go()
        progress = _Progress(self._next_epoch, self._shares(self._next_start))
        self._next_epoch, self._next_start = self._next_epoch + 1, 0
        work = Work(self._resources, self._sampler, progress.epoch, progress.shares)
        self._progress = progress
        return _Epoch(self, work, progress)

    def _check_ranks(self) -> None:
        # Made before init_process_group, and not under torchrun, every rank would take every sample.
        ranks = distributed_ranks() if self._finds_ranks else None
        if ranks not in (None, (self.rank, self.world_size)):
            raise RuntimeError(
                f"this loader was made as rank {self.rank} of {self.world_size}, and torch.distributed has rank "
                f"{ranks[0]} of {ranks[1]}: make it after init_process_group, or give rank= and world_size="
            )

    def shutdown(self) -> None:
        """End the background threads and the decoder; a second call does nothing. Batches handed out stay valid.

        A thread that still waits for an answer of its source (a store that stalls) is left, and ends with that answer.
        """
        self._finalizer()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a loader belongs to its process and cannot be pickled or copied: send the dataset, which can")

    def __enter__(self) -> SlipstreamLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


@dataclass(slots=True)
class _Progress:
    """How far an epoch has been handed out: steps of its shares."""

    epoch: int
    shares: Shares
    steps: int = 0


class _Epoch:
    """The iterator of one epoch."""

    def __init__(self, loader: SlipstreamLoader, work: Work, progress: _Progress) -> None:
        self._loader = loader
        self._work = work
        self._progress = progress
        self._left = len(progress.shares)
        self._outage = False  # was what the last next() ended with
        self.made: tuple[int, Any] | None = None  # the number of a batch, and what will be handed out
        weakref.finalize(self, end_from_any_thread, work.stop)

    def __iter__(self) -> _Epoch:
        return self

    def __next__(self) -> dict[str, Any]:
        self._loader._resources.check_usable()
        if self._work.stopped and self._left:
            raise RuntimeError("this iterator was ended by a newer one of the same loader")
        if not self._left:
            self._work.stop()
            self._loader._resources.let_go()
            if self._loader._progress is self._progress:
                self._loader._progress = None  # the next state is the next epoch's beginning
            raise StopIteration
        if self._outage:
            self._work.try_again()
            self._outage = False
        # Ctrl-C may come at any call: what was taken stays in `made` until it is counted and handed out.
        while self.made is None or self.made[0] < self._progress.steps:
            if not self._work.batches.take(self):
                self._loader._resources.check_usable()
                raise RuntimeError("this iterator was ended by a newer one of the same loader")
        made = self.made[1]
        if isinstance(made, Outage):
            # Not counted: the next call asks for the same batch.
            self.made, self._outage = None, True
            try:
                raise made.error
            finally:
                del made  # as below
        if isinstance(made, Drawn):
            try:
                made = self._launch(made)
            except Exception as error:
                made = error
        failed = isinstance(made, BaseException)
        # No call from here on, at whose end Ctrl-C could come.
        self._left, self._progress.steps, self.made = self._left - 1, self._progress.steps + 1, None
        if failed:
            try:
                raise made
            finally:
                del made  # its traceback has this frame: a cycle that would keep the loader until the collector runs
        return made

    def _launch(self, drawn: Drawn) -> dict[str, Any]:
        # On a GPU: crops on the current stream, and DALI's buffers held until that stream has read them.
        resources = self._loader._resources
        try:
            return finish(resources, drawn)
        finally:  # after an error too: what was launched before it still reads
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._loader.device))
            resources.hold(event, [images for images, _, _ in drawn.images.values()])


def _read_fields(fields: Mapping[str, str], exclude_fields: Sequence[str], added: Sequence[str]) -> dict[str, str]:
    # Those that are read; a batch adds these names of its own.
    if isinstance(exclude_fields, str) or not isinstance(exclude_fields, Collection):
        raise TypeError(f"exclude_fields must be a list of field names, got {exclude_fields!r}")
    unknown = [name for name in exclude_fields if not isinstance(name, str) or name not in fields]
    if unknown:
        raise ValueError(f"exclude_fields names {unknown[0]!r}, the dataset has {', '.join(map(repr, fields))}")
    read = {name: kind for name, kind in fields.items() if name not in exclude_fields}
    for name in added:
        if name in read:
            raise ValueError(
                f"the dataset has a field {name!r}, a name that batches need: leave it out, exclude_fields=[{name!r}]"
            )
    return read


def _compile(
    pipelines: Mapping[str, Any],
    fields: Mapping[str, str],
    images: Sequence[str],
    seed: int,
    exclude_fields: Sequence[str],
) -> dict[str, Pipeline]:
    if not isinstance(pipelines, Mapping):
        raise TypeError(f"pipelines must be a dict of image field -> stages, got {checks.brief(pipelines)}")
    for name in pipelines:
        if name in exclude_fields:
            raise ValueError(f"pipelines names {name!r}, which exclude_fields leaves out")
        if name not in images:
            kind = f" (a field of {fields[name]}, not of files such as JPEG's)" if name in fields else ""
            raise ValueError(f"pipelines names {name!r}{kind}, the dataset's image fields are {list(images)}")
    scopes = {name: name if len(images) > 1 else "" for name in pipelines}
    compiled = {name: Pipeline(stages, seed=seed, field=name, scope=scopes[name]) for name, stages in pipelines.items()}
    for name, pipeline in compiled.items():
        for crop, of in pipeline.box_fields.items():
            if of not in fields or of in images:
                others = [field for field in fields if field not in images]
                which = f", crop {crop!r}" if crop else ""
                raise ValueError(
                    f"pipelines[{name!r}]{which}: boxes must be a field that is read, one of {others}, got {of!r}"
                )
    taken = {name: "a field" for name in fields if name not in pipelines} | {
        "_indices": "the sample ids",
        "_valid": "what samples are themselves",
        "_plan": "the plan",
    }
    for field, pipeline in compiled.items():
        for name in pipeline.output_names:
            if name in taken:
                raise ValueError(f"pipelines[{field!r}] gives {name!r}, which is also {taken[name]}: name it otherwise")
            taken[name] = f"given by pipelines[{field!r}]"
    return compiled
