"""A source read by other processes and by many threads at once."""

from __future__ import annotations

import multiprocessing
import threading
from typing import Any

import numpy as np


def _child(source: Any, queue: Any) -> None:
    queue.put([view.tobytes() for view in source.read([11, 0])])


def check_other_readers(source: Any, other: Any, method: str, images: list[bytes]) -> None:
    """`images`, of all samples, are what a child made by this method reads from the source, and eight threads from the
    other; 12 samples or more."""
    context: Any = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_child, args=(source, queue))
    child.start()
    assert queue.get(timeout=120) == [images[11], images[0]]
    child.join()
    results = []

    def work(seed: int) -> None:
        ids = np.random.default_rng(seed).integers(0, len(images), 50)
        results.append(other.values(ids, "image") == [images[n] for n in ids])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8
