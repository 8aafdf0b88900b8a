"""LitData sets and images that the tests of sources share."""

import io
import json
from pathlib import Path

import numpy as np
from litdata.streaming.writer import BinaryWriter
from litdata.types import Text
from PIL import Image


def jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (8 + number % 5, 9, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def write(folder: Path, samples: list, *, chunk_size: int = 4, **options) -> Path:
    writer = BinaryWriter(str(folder), chunk_size=chunk_size, **options)
    for number, sample in enumerate(samples):
        writer[number] = sample
    writer.done()
    writer.merge()
    return folder


def photos(count: int) -> list[dict]:
    return [{"image": jpeg(i), "label": i % 3, "path": f"class/{i}.jpg"} for i in range(count)]


def largest_chunk(folder: Path) -> int:
    """Bytes of the largest chunk of a set."""
    return max(path.stat().st_size for path in folder.glob("*.bin"))


def edit_index(folder: Path, change) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def maps_of(folder: Path) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]


def plain(samples: list[dict]) -> list[dict]:
    """Keep litdata from storing the rows as an Arrow table, which it does where pyarrow is installed."""
    return [{**sample, "path": Text(text=sample["path"])} for sample in samples]
