"""From a folder of images to LitData chunks."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from . import checks
from .pack_format import Encode, image_encoder
from .progress import Bar
from .source_folder import FolderSource

_BLOCK = 32


def pack(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    num_workers: int | None = None,
    chunk_bytes: int | str = "64MB",
    format: str = "same",
    progress: bool = True,
) -> int:
    """Write the images below `src` (torchvision's ImageFolder layout, or a flat folder) as LitData chunks into `dst`.

    A sample is {'image': the file's bytes as they are, 'label': int, 'path': str relative to `src`}, in ImageFolder's
    order; a flat folder has no label. `format`: how images are stored, one of `pack_format.FORMATS`. `dst` must not
    exist or be empty, and has the set only once it is whole. `num_workers` threads read ahead (default: one per core,
    at most 8). Gives the number of samples. Raises FileExistsError for a `dst` with files in it, ValueError for
    arguments, OSError and ReadError for files.
    """
    if num_workers is None:
        num_workers = min(8, os.cpu_count() or 1)
    if isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 1:
        raise ValueError(f"num_workers must be a whole number >= 1, got {num_workers!r}")
    # Offsets within a chunk are 32-bit; half of that leaves room for the item that crosses the mark.
    size = checks.byte_count("chunk_bytes", chunk_bytes, most="2GB")
    encode = image_encoder(format)
    source = FolderSource(src)
    target = Path(dst).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"dst {str(target)!r} is not an empty folder; give a new one")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with Bar(total=len(source), unit="image", disable=not progress) as bar:
            _write(source, partial, size, num_workers, encode, bar)
        os.chmod(partial, 0o777 & ~_umask())
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        source.close()
    return len(source)


def _write(
    source: FolderSource, folder: str, chunk_bytes: int, num_workers: int, encode: Encode | None, bar: Any
) -> None:
    from litdata.streaming.writer import BinaryWriter
    from litdata.types import Text

    writer = BinaryWriter(folder, chunk_bytes=chunk_bytes)
    position = 0
    for samples in _read_ahead(source, num_workers, encode):
        for sample in samples:
            # As a plain str litdata would store the file itself where the path is one from the working directory, and
            # with pyarrow installed it would store the whole set as Arrow tables, which cannot be mapped.
            writer[position] = {**sample, "path": Text(text=sample["path"])}
            position += 1
        bar.update(len(samples))
    writer.done()
    writer.merge()


def _read_ahead(source: FolderSource, num_workers: int, encode: Encode | None) -> Iterator[list[dict[str, Any]]]:
    """Give blocks of samples in order, a few of them read ahead by threads."""

    def read(first: int) -> list[dict[str, Any]]:
        ids = range(first, min(first + _BLOCK, len(source)))
        columns = {field: source.values(ids, field) for field in source.fields}
        if encode is not None:
            columns["image"] = [bytes(encode(np.frombuffer(data, np.uint8))) for data in columns["image"]]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    with ThreadPoolExecutor(num_workers, "slipstream-pack") as pool:
        pending: deque[Future[list[dict[str, Any]]]] = deque()
        for first in range(0, len(source), _BLOCK):
            pending.append(pool.submit(read, first))
            if len(pending) > 2 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
