"""The demo: real photographs from installed packages as a LitData set, streamed as DINO's crops, timed and drawn."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import __version__
from .crop import MultiRandomResizedCrop
from .dataset import SlipstreamDataset
from .device import usable_cores
from .loader import SlipstreamLoader
from .pack import pack
from .plot import plot_crops
from .sampler import Sampler
from .source import Source
from .stage import MultiCropPipeline, Normalize
from .stage_flip import RandomHorizontalFlip
from .yuv420 import decode_image

# Each distribution's photographs, by their place in its package; those that are no JPEG are encoded as one.
PHOTOGRAPHS = {
    ("scikit-learn", "sklearn"): ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
    ("scikit-image", "skimage"): (
        "data/rocket.jpg",
        "data/retina.jpg",
        "data/hubble_deep_field.jpg",
        "data/astronaut.png",
        "data/chelsea.png",
        "data/coffee.png",
    ),
}
DEFAULT_OUT = Path("out/demo")
_WARM_UP = 3  # batches that are not timed: they compile, allocate and fill the queues
_SHOWN = 6  # images on the contact sheet: with more, a person no longer tells six boxes apart


class MissingPackagesError(ImportError):
    """The demo's extra packages are not installed; the message has the command that installs them."""


def check_packages(*, photographs: bool) -> None:
    """Raise MissingPackagesError unless matplotlib is there and, with `photographs`, the packages that ship them."""
    needed = [("matplotlib", "matplotlib"), *(PHOTOGRAPHS if photographs else ())]
    missing = [distribution for distribution, package in needed if find_spec(package) is None]
    if missing:
        raise MissingPackagesError(f"the demo needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def make_photographs(folder: str | os.PathLike[str] = DEFAULT_OUT / "photographs") -> str:
    """Write the photographs inside scikit-learn and scikit-image as a LitData set into `folder`, unless it has one.

    Fields: image (JPEG), label (which of the two packages) and path. Nothing is downloaded; a photograph that the
    installed versions do not ship is left out. Gives `folder` as a str. Raises MissingPackagesError.
    """
    folder = os.fspath(folder)
    if not os.path.exists(os.path.join(folder, "index.json")):
        with tempfile.TemporaryDirectory() as images:
            for (distribution, package), paths in PHOTOGRAPHS.items():
                _copy_photographs(distribution, package, paths, Path(images, distribution))
            pack(images, folder, num_workers=1, progress=False)
    return folder


def dino_stages() -> list[Any]:
    """DINO's geometry with four local crops: 2x224 + 4x96, bicubic, flipped at random, the global ones normalised."""
    global_crop = {"size": 224, "scale": (0.4, 1.0), "interpolation": "bicubic"}
    local_crop = {"size": 96, "scale": (0.05, 0.4), "interpolation": "bicubic"}
    names = {f"global_{i}": global_crop for i in range(2)} | {f"local_{i}": local_crop for i in range(4)}
    stages = {name: [RandomHorizontalFlip()] + [Normalize()] * name.startswith("global") for name in names}
    return [MultiRandomResizedCrop(names, return_boxes=True), MultiCropPipeline(stages)]


def run_demo(
    data: str | None = None,
    *,
    device: str | None = None,
    batch_size: int = 32,
    steps: int = 20,
    out: str | os.PathLike[str] = DEFAULT_OUT,
) -> Path:
    """Stream `data` (a folder or s3:// URL; None makes the photographs) as six crops; print shapes and images/s.

    Gives the path of the contact sheet, out/crops.png. Raises MissingPackagesError; ValueError or OSError for an
    argument; ReadError or DecodeError for samples.
    """
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, got {steps}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    check_packages(photographs=data is None)
    Path(out).mkdir(parents=True, exist_ok=True)
    place = make_photographs(Path(out, "photographs")) if data is None else data
    remote = "://" in place
    whole = SlipstreamDataset(place)
    field = _image_field(whole.fields)
    # A few samples from anywhere in the set, repeated where it has too few; the first ones where each must be fetched.
    wanted = (_WARM_UP + steps) * batch_size
    order = Sampler(len(whole), shuffle=not remote, seed=0)
    ids = order.sample_ids(0, np.arange(min(wanted, len(whole))))
    dataset = SlipstreamDataset(whole.source, indices=np.resize(ids, wanted))
    threads = usable_cores()

    def loader(pipelines: dict[str, Any]) -> SlipstreamLoader:
        return SlipstreamLoader(
            dataset,
            batch_size,
            pipelines=pipelines,
            exclude_fields=[name for name in whole.fields if name != field],
            device=device,
            num_threads=threads,
            verbose=remote,
        )

    with loader({}) as decoding, loader({field: dino_stages()}) as cropping:
        print(f"Slipstream {__version__} on {_describe(cropping.device)}, {threads} CPU thread(s)")
        part = f"{len(ids):,} of them used"
        if len(ids) < wanted:
            part = f"repeated to fill {_WARM_UP + steps} batches of {batch_size}"
        print(f"{place}: {len(whole):,} images, {part}\n", flush=True)
        decode = _measure(decoding, field)
        crops = _measure(cropping, field)
    print(f"{_crop_table(crops.first)}\n")
    print(f"decode only            {decode.images_per_second:>9,.0f} images/s")
    share = crops.images_per_second / decode.images_per_second
    print(f"decode and six crops   {crops.images_per_second:>9,.0f} images/s  ({share:.0%} of decode only)")
    print(f"  batch size {batch_size}, {threads} CPU thread(s), {steps} steps after {_WARM_UP} of warm-up,")
    print(f"  {decode.pixels / decode.images / 1e6:.2f} megapixels an image on average; one run of each\n")
    sheet = _write_sheet(crops.first, whole.source, field, Path(out))
    print(f"contact sheet: {sheet}")
    return sheet


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measured:
    first: dict[str, Any]
    images: int
    seconds: float
    pixels: int

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds


def _measure(loader: SlipstreamLoader, field: str) -> _Measured:
    batches = iter(loader)
    first = next(batches)
    for _ in range(_WARM_UP - 1):
        next(batches)
    _wait(loader.device)
    images = pixels = 0
    begin = time.perf_counter()
    for batch in batches:
        images += len(batch["_indices"])
        pixels += sum(image.shape[1] * image.shape[2] for image in batch.get(field, ()))
    _wait(loader.device)
    return _Measured(first=first, images=images, seconds=time.perf_counter() - begin, pixels=pixels)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _describe(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _image_field(fields: Mapping[str, str]) -> str:
    for field, kind in fields.items():
        if kind == "image":
            return field
    raise ValueError(f"the data must have an image field, its fields are {dict(fields)}")


def _crop_names(batch: Mapping[str, Any]) -> list[str]:
    return [name for name in batch if f"{name}_box" in batch]


def _crop_table(batch: Mapping[str, Any]) -> str:
    rows = [("crop", "shape", "dtype", "range", "flipped")]
    for name in _crop_names(batch):
        crop = batch[name]
        low, high = crop.min().item(), crop.max().item()
        values = f"{low:.2f} to {high:.2f}" if crop.is_floating_point() else f"{low} to {high}"
        flipped = f"{int(batch[f'{name}_flip'].sum())} of {len(crop)}"
        rows.append((name, str(list(crop.shape)), str(crop.dtype).removeprefix("torch."), values, flipped))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _write_sheet(batch: Mapping[str, Any], source: Source, field: str, out: Path) -> Path:
    # A small set comes round again within one batch: each image once.
    _, positions = np.unique(batch["_indices"], return_index=True)
    shown = np.sort(positions)[:_SHOWN].tolist()
    # Not from a dataset, which reads every field of a sample, pickled ones too.
    encoded = source.read(batch["_indices"].numpy()[shown], field)
    figure = plot_crops(
        {name: values[shown] for name, values in batch.items()},
        sources=[torch.from_numpy(decode_image(data)).permute(2, 0, 1) for data in encoded],
        samples=len(shown),
        title="Each box on a source is the crop of its colour below",
    )
    figure.savefig(out / "crops.png", dpi=120)
    return out / "crops.png"


def _copy_photographs(distribution: str, package: str, paths: tuple[str, ...], folder: Path) -> None:
    from PIL import Image

    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingPackagesError(f"the photographs come with {distribution}: pip install {distribution}")
    folder.mkdir()
    for path in _found(Path(spec.origin).parent, paths):
        target = folder / f"{path.stem}.jpg"
        if path.suffix == ".jpg":
            target.write_bytes(path.read_bytes())
        else:
            with Image.open(path) as image:
                image.convert("RGB").save(target, quality=90)


def _found(package: Path, paths: tuple[str, ...]) -> Iterator[Path]:
    return (package / path for path in paths if (package / path).is_file())
