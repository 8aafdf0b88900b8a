"""A set of small files in a cache folder, made in place of being fetched."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from slipstream.source_cache import CachedFiles

SIZE = 1000


class Files(CachedFiles):
    """Files 0, 1, ... of a number's text, of SIZE bytes."""

    def __init__(self, cache: Path, home: str = "0" * 32, *, limit: int | None = None, count: int = 100) -> None:
        super().__init__(home, [SIZE] * count, cache_dir=cache, max_cache_size=limit)
        self.made: list[int] = []
        self.blocks = 0  # to come, a hundredth of a second each
        self.lost: set[int] = set()
        self.before: Callable[[], object] = lambda: None

    def place(self, number):
        return f"store/{number}"

    def _target(self, number):
        return os.path.join(str(self.folder), f"{number:04}")

    def _find(self, number):
        path = self._target(number)
        return path if os.path.exists(path) else None

    def _make(self, number, part, on_bytes):
        self.made.append(number)
        if number in self.lost:
            raise OSError("no route")
        Path(part).write_text(f"{number:04}" + " " * (SIZE - 4))
        Path(part + ".other").write_text("")
        for _ in range(self.blocks):
            time.sleep(0.01)
            on_bytes(1)
        self.before()
        return part, self._target(number)


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def text(path: str) -> str:
    return Path(path).read_text().rstrip()


def used(cache: Path) -> int:
    """Bytes of the files in the cache, of what is being written too."""
    total = 0
    for path in cache.rglob("*"):
        if path.suffix != ".room":
            try:
                total += path.stat().st_size if path.is_file() else 0
            except FileNotFoundError:
                continue
    return total
