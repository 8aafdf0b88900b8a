"""What the tests of pack share: images in folders, the bytes of a packed folder, processes that are killed."""

from __future__ import annotations

import io
import itertools
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from slipstream.pack import pack


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    size = (9 + number % 7, 8, 3)
    Image.fromarray(np.random.default_rng(number).integers(0, 256, size, np.uint8)).save(file, "JPEG")
    return file.getvalue()


def write_images(folder: Path, count: int = 100) -> Path:
    for number in range(count):
        path = folder / f"class{number % 3}" / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; a packed one is whole only if there is nothing else in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def in_child(work: Callable[[], Any]) -> int:
    """Run `work` in a forked child; gives its exit code, 1 for an exception, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def dies_at(count: int) -> None:
    """Have this process kill itself instead of the `count`-th step that it takes to make a file whole."""
    steps, lock = itertools.count(1), threading.Lock()

    def dying(step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with lock:
                if next(steps) == count:
                    os.kill(os.getpid(), signal.SIGKILL)
            return step(*arguments, **options)

        return call

    for name in ("fsync", "replace", "link", "makedirs", "rmdir", "unlink"):
        setattr(os, name, dying(getattr(os, name)))


def pack_and_die(count: int, src: Any, dst: Path, **options: Any) -> bool:
    """Pack in a child that dies at its `count`-th step; tells whether it did, and did not finish before."""

    def work() -> None:
        dies_at(count)
        pack(src, dst, progress=False, **options)

    code = in_child(work)
    assert code in (0, -signal.SIGKILL)
    return code != 0
