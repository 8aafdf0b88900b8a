"""Small WebDataset shards for tests."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def jpeg(number: int, size: tuple[int, int] = (9, 8)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def write(path: Path, members: list[tuple[str, bytes]], tar_format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(number: int) -> list[tuple[str, bytes]]:
    key = f"train/{number:05d}"
    return [
        (f"{key}.cls", str(number % 3).encode()),
        (f"{key}.jpg", jpeg(number)),
        (f"{key}.json", json.dumps({"n": number}).encode()),
        (f"{key}.txt", f"ü{number}".encode()),
        (f"{key}.Emb.npy", bytes([number])),
    ]


def write_set(folder: Path) -> Path:
    """Three shards of 4, 1 and 7 samples."""
    for shard, numbers in enumerate([range(4), range(4, 5), range(5, 12)]):
        write(folder / f"train-{shard:03d}.tar", [member for n in numbers for member in sample(n)])
    return folder
