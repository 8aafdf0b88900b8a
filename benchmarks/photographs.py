"""The photographs that the benchmarks run on: a folder of classes, or those that ship in packages."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).parents[1]
FOLDER = REPOSITORY.parent / "shared" / "photos" / "imagenet"
MEMORY = Path("/dev/shm")  # a warm page cache may be dropped between two epochs; a tmpfs is not


@contextlib.contextmanager
def in_memory(given: Path | None) -> Iterator[Path]:
    """A copy in RAM of a folder with one folder of JPEGs a class.

    given: None is SLIPSTREAM_PHOTOS, else the project's photographs where they are, else some that ship in packages.
    Raises FileNotFoundError for a folder without photographs.
    """
    with tempfile.TemporaryDirectory(prefix="slipstream-bench-", dir=MEMORY if MEMORY.is_dir() else None) as temporary:
        folder = Path(temporary) / "photographs"
        source = given
        if source is None and os.environ.get("SLIPSTREAM_PHOTOS"):
            source = Path(os.environ["SLIPSTREAM_PHOTOS"])
        if source is None and FOLDER.is_dir():
            source = FOLDER
        if source is None:
            _write_packaged(folder / "packaged")
        else:
            if not source.is_dir():
                raise FileNotFoundError(f"the photographs' folder {str(source)!r} is not there")
            shutil.copytree(source, folder)
        if not paths(folder):
            raise FileNotFoundError(f"{source} holds no .jpg in a folder for each class")
        yield folder


def paths(folder: Path) -> list[Path]:
    """The photographs of a folder of classes, in the order of torchvision's ImageFolder."""
    return sorted(path for path in folder.glob("*/*") if path.suffix.lower() in (".jpg", ".jpeg"))


def decoded(path: Path) -> np.ndarray:
    """One photograph as Pillow decodes it, uint8 [H, W, 3]."""
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def two_passes(pixels: np.ndarray, box: tuple[int, int, int, int], size: tuple[int, int], bicubic: bool) -> np.ndarray:
    """The oracle: crop, then two one-axis Pillow resizes, horizontal first; uint8 [h, w, 3].

    box: (top, left, height, width) of pixels [H, W, 3]; size: (h, w).
    """
    top, left, height, width = box
    kind = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    crop = Image.fromarray(np.ascontiguousarray(pixels[top : top + height, left : left + width]))
    return np.asarray(crop.resize((size[1], height), kind).resize((size[1], size[0]), kind))


def _write_packaged(folder: Path) -> None:
    from skimage import data
    from sklearn.datasets import load_sample_images

    folder.mkdir(parents=True)
    pictures = [np.asarray(image) for image in load_sample_images().images]
    pictures += [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    for index, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(folder / f"{index}.jpg", quality=95)
