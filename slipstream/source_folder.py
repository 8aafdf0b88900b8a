"""Image files in a folder, laid out as torchvision's ImageFolder wants them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from .source import Kept, ReadError, as_ids, check_field, map_file, raise_if_ours

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Files are rarely read twice soon, so the maps kept serve only the fields and the threads of one moment.
_KEPT_MAPS = 64


class FolderSource:
    """A folder of images as a Source with the fields `image`, `label` (int) and `path` (str, relative to the folder).

    As in torchvision's ImageFolder each folder right below `folder` is a class, the sorted classes are the labels 0,
    1, ... and a class's images may lie at any depth in it; image files beside the class folders are not part of the
    set. A folder without subfolders is a flat one: its images have no `label`. Raises FileNotFoundError or
    NotADirectoryError for `folder`, OSError for a folder below it that cannot be read and for a link to nothing (but an
    image's, which is a bad sample), ValueError for a link to a folder that holds it, and where `folder` or a class of
    it holds no image. `scan_seconds` is how long the scan for the files took.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        begin = time.monotonic()
        self._folder = os.path.abspath(os.path.expanduser(folder))
        with os.scandir(self._folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        self.classes = tuple(entry.name for entry in found if entry.is_dir())
        for entry in found:
            _check_link(entry.path)
        self._paths: list[str] = []
        counts = []
        for name in self.classes:
            self._paths += _images(self._folder, name)
            counts.append(len(self._paths) - sum(counts))
        if not self.classes:
            self._paths = [entry.name for entry in found if entry.name.lower().endswith(EXTENSIONS)]
        empty = [name for name, count in zip(self.classes, counts, strict=True) if not count]
        if empty or not self._paths:
            where = f"class folder {empty[0]!r} of {self._folder}" if empty else f"folder {self._folder}"
            raise ValueError(f"{where} holds no image file ({' '.join(EXTENSIONS)})")
        self._labels = np.repeat(np.arange(len(self.classes)), counts)
        kinds = {"image": "image", "label": "int", "path": "str"}
        if not self.classes:
            del kinds["label"]
        self.fields: Mapping[str, str] = kinds
        self._opened: Kept[int, np.ndarray] = Kept(_KEPT_MAPS)
        self.scan_seconds = time.monotonic() - begin

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, ids: Sequence[int] | np.ndarray, field: str = "image") -> list[np.ndarray]:
        """Give the image files' bytes as read-only uint8 views [n_bytes]; see Source.read."""
        check_field(field, self.fields)
        if field != "image":
            raise ValueError(f"field {field!r} has no bytes in a folder of images; values() gives it")
        checked = as_ids(ids, len(self)).tolist()
        views = self._all_of(checked, self._opened.get(checked, self._open))
        for view in views:
            if len(view):
                # The pages are read here, in the background, and not under whoever decodes.
                _ = view[0], view[-1]
        return views

    def _open(self, sample_id: int) -> np.ndarray:
        return map_file(self.describe(sample_id))

    def _content(self, sample_id: int) -> bytes | OSError:
        path = self.describe(sample_id)
        try:
            with open(path, "rb", buffering=0) as file:
                return file.read()
        except OSError as error:
            raise_if_ours(error, path)
            return error

    def _all_of(self, ids: list[int], opened: list[Any]) -> list[Any]:
        """Give `opened`, one for each id; ReadError where some are exceptions."""
        failures = [
            (sample_id, self.describe(sample_id), getattr(one, "strerror", None) or str(one))
            for sample_id, one in zip(ids, opened, strict=True)
            if isinstance(one, Exception)
        ]
        if failures:
            raise ReadError(failures)
        return opened

    def values(self, ids: Sequence[int] | np.ndarray, field: str) -> list[Any]:
        """Give labels as ints, paths as str and images as bytes; see Source.values."""
        check_field(field, self.fields)
        checked = as_ids(ids, len(self))
        if field == "image":
            # Read and not mapped: it is faster, and threads wait for the disk side by side, while one that waits in a
            # page fault may hold Python's lock.
            numbers = checked.tolist()
            return self._all_of(numbers, [self._content(sample_id) for sample_id in numbers])
        if field == "label":
            return self._labels[checked].tolist()
        return [self._paths[sample_id] for sample_id in checked.tolist()]

    def describe(self, sample_id: int) -> str:
        """Give the sample's file; never raises."""
        if not 0 <= sample_id < len(self):
            return f"no sample {sample_id} in {self._folder}"
        return os.path.join(self._folder, self._paths[sample_id])

    def fingerprint(self) -> str:
        """The same for the same files below the folder, wherever that is."""
        return "\n".join(self._paths)

    def close(self) -> None:
        """Forget the maps; see Source.close."""
        self._opened.close()

    def __repr__(self) -> str:
        return f"FolderSource({self._folder!r}, {len(self)} samples, {len(self.classes)} classes)"


def _images(folder: str, name: str) -> Iterator[str]:
    """Walk one class in torchvision's order: folders and the files in each sorted by name, links followed."""
    for base, files in sorted(_walk(os.path.join(folder, name))):
        below = os.path.relpath(base, folder)
        for file in sorted(files):
            if file.lower().endswith(EXTENSIONS):
                yield os.path.join(below, file)


def _walk(top: str) -> Iterator[tuple[str, list[str]]]:
    # What os.walk leaves out in silence, or gives forty times, would be samples that are lost, or come as often.
    for base, folders, files in os.walk(top, followlinks=True, onerror=_fail):
        for path in (os.path.join(base, name) for name in folders):
            if os.path.islink(path) and _leads_back(path, base, top):
                raise ValueError(f"{path} is a link to a folder that holds it: its images would have no end")
        for name in files:
            _check_link(os.path.join(base, name))
        yield base, files


def _leads_back(link: str, base: str, top: str) -> bool:
    # To a folder that the walk has come through, from `top` to `base`.
    target = f"{os.path.realpath(link)}/"
    while not f"{os.path.realpath(base)}/".startswith(target):
        if base == top:
            return False
        base = os.path.dirname(base)
    return True


def _fail(error: OSError) -> NoReturn:
    raise error


def _check_link(path: str) -> None:
    # A link to an image that is not there is a bad sample; any other may be one to a folder of them.
    if not path.lower().endswith(EXTENSIONS) and os.path.islink(path) and not os.path.exists(path):
        raise FileNotFoundError(f"{path} is a link to {os.readlink(path)!r}, which is not there")
