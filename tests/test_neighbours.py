"""The loader beside what else a training script has: processes, DataLoader workers, parallel Numba code, other loaders.

Our own kernels use none of Numba's threading layers, so which one a machine has does not matter to them.
"""

from __future__ import annotations

import copy
import importlib
import multiprocessing
import os
import pickle
import pkgutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import slipstream_kernels
import torch
from litdata_samples import jpeg, photos, plain, write
from numba.core.registry import CPUDispatcher
from own_source import ImageSource

import slipstream
from slipstream import (
    ColorJitter,
    GaussianBlur,
    MixUp,
    MultiCropPipeline,
    MultiRandomResizedCrop,
    Normalize,
    RandomHorizontalFlip,
    RandomRotation,
    SlipstreamDataset,
    SlipstreamLoader,
)

STAGES = [
    MultiRandomResizedCrop({"a": dict(size=24), "b": dict(size=16)}),
    MultiCropPipeline(
        {
            "a": [RandomHorizontalFlip(), ColorJitter(0.4, 0.4, 0.2, 0.1), GaussianBlur(3), Normalize()],
            "b": [RandomRotation(30)],
        }
    ),
]
COUNT = 60


@pytest.fixture(scope="module")
def chunks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("chunks"), plain(photos(COUNT)))


def make(folder: Path, **options) -> SlipstreamLoader:
    options = {"pipelines": {"image": STAGES}, "device": "cpu", "verbose": False, "shuffle": True, **options}
    options.setdefault("batch_stages", [MixUp(num_classes=3, crops=["a"])])
    return SlipstreamLoader(SlipstreamDataset(local_dir=folder), 8, **options)


def digest(loader: SlipstreamLoader) -> list[str]:
    """What an epoch gives, without an operation of torch's: its own threads may hang in a forked child."""
    return [
        " ".join([*map(str, batch["_indices"].tolist()), *(str(batch[n].numpy().astype("f8").sum()) for n in "ab")])
        for batch in loader
    ]


def digest_of(folder: Path) -> list[str]:
    with make(folder) as loader:
        return digest(loader)


def digest_in_child(folder: Path, answers) -> None:
    answers.put(digest_of(folder))


def refused_in_child(answers, use) -> None:
    try:
        use()
        answers.put("it ran")
    except RuntimeError as error:
        answers.put(str(error))


def test_no_kernel_of_ours_is_in_numbas_parallel_layer() -> None:
    for package in (slipstream, slipstream_kernels):
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    found = [
        value
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in ("slipstream", "slipstream_kernels")
        for value in vars(module).values()
        if isinstance(value, CPUDispatcher)
    ]
    assert len(found) > 40
    assert all(kernel.targetoptions.get("nogil") and not kernel.targetoptions.get("parallel") for kernel in found)


RUN = textwrap.dedent(
    """
    import multiprocessing, os, sys, threading
    sys.path[:0] = [{tests!r}]
    from pathlib import Path
    import numba, numpy as np, pytest, torch
    from test_neighbours import COUNT, digest, digest_in_child, digest_of, make
    from slipstream import SlipstreamDataset

    folder, layer = Path(sys.argv[1]), sys.argv[2]

    @numba.njit(parallel=True)
    def user_sum(values):
        total = 0.0
        for i in numba.prange(len(values)):
            total += values[i]
        return total

    if __name__ == "__main__":
        expected = digest_of(folder)
        with pytest.raises(ValueError):  # nothing of ours has started one
            numba.threading_layer()

        ones = np.ones(10**6)
        with make(folder) as loader, make(folder) as other:
            batches, others = [], iter(other)
            assert user_sum(ones) == len(ones) and numba.threading_layer() == layer
            for batch in loader:  # the user's parallel code and two loaders' threads at once
                assert user_sum(ones) == len(ones)
                next(others)
                batches.append(batch)
            assert digest(batches) == expected and list(others) == []

        results = {{}}
        def run(number):
            results[number] = digest_of(folder)
        threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            assert user_sum(ones) == len(ones)
        assert results == {{number: expected for number in range(3)}}

        with make(folder) as loader:
            next(iter(loader))  # children of a process whose threads are at work
            for method in ("fork", "spawn"):
                context = multiprocessing.get_context(method)
                answers = context.Queue()
                child = context.Process(target=digest_in_child, args=(folder, answers))
                child.start()
                assert answers.get(timeout=100) == expected, method
                child.join(20)
                assert child.exitcode == 0, method
            dataset = SlipstreamDataset(local_dir=folder, decode_images=True)
            for method in ("fork", "spawn"):
                workers = torch.utils.data.DataLoader(
                    dataset, batch_size=None, num_workers=2, multiprocessing_context=method
                )
                seen = list(workers)
                assert len(seen) == COUNT
                assert all(np.array_equal(a["image"].numpy(), dataset[i]["image"].numpy()) for i, a in enumerate(seen))
        assert user_sum(ones) == len(ones)
        print("all is well")
    """
)


@pytest.mark.parametrize("layer", ["workqueue", "omp", "tbb"])
def test_each_threading_layer_of_numba_leaves_the_loader_alone(chunks: Path, tmp_path: Path, layer: str) -> None:
    if layer == "tbb":
        pytest.importorskip("numba.np.ufunc.tbbpool", reason="needs libtbb (pip install tbb)", exc_type=ImportError)
    script = tmp_path / "run.py"
    script.write_text(RUN.format(tests=str(Path(__file__).parent)))
    done = subprocess.run(
        [sys.executable, script, chunks, layer],
        env={**os.environ, "NUMBA_THREADING_LAYER": layer},
        timeout=280,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "all is well" in done.stdout, done.stderr[-3000:]


def test_a_loader_is_not_sent_to_another_process(chunks: Path) -> None:
    with make(chunks) as loader:
        for what in (loader, iter(loader)):
            for send in (pickle.dumps, copy.deepcopy):
                with pytest.raises(TypeError, match=r"belongs to its process.*send the dataset"):
                    send(what)
        context = multiprocessing.get_context("spawn")
        with pytest.raises(TypeError, match="belongs to its process"):
            context.Process(target=digest, args=(loader,)).start()
        assert len(pickle.loads(pickle.dumps(loader.dataset))) == COUNT
        assert len(list(loader)) == len(loader)


def test_everything_of_a_loader_is_refused_or_harmless_in_a_forked_child(chunks: Path) -> None:
    context = multiprocessing.get_context("fork")
    with make(chunks) as loader:
        batches = iter(loader)
        next(batches)
        answers = context.Queue()
        for use in (batches.__next__, loader.__iter__, lambda: list(loader)):
            child = context.Process(target=refused_in_child, args=(answers, use))
            child.start()
            assert "after fork" in answers.get(timeout=20)
            child.join(20)
            assert child.exitcode == 0
        for use in (loader.state_dict, loader.report, loader.explain, loader.shutdown, lambda: loader.set_epoch(3)):
            child = context.Process(target=refused_in_child, args=(answers, use))
            child.start()
            assert answers.get(timeout=20) == "it ran"
            child.join(20)
            assert child.exitcode == 0
        assert len(list(batches)) == len(loader) - 1


class Counting(ImageSource):
    """Images from memory; counts the batches that were read, and may take its time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.data = [np.frombuffer(jpeg(number), np.uint8) for number in range(COUNT)]
        self.seconds, self.batches = seconds, 0

    def __len__(self) -> int:
        return COUNT

    def read(self, ids, field="image"):
        time.sleep(self.seconds)
        self.batches += 1
        return [self.data[number] for number in ids]


def loader_of(source: Counting, batch_size: int = 2, **options) -> SlipstreamLoader:
    options = {"pipelines": {"image": STAGES}, "device": "cpu", "verbose": False, "num_threads": 1, **options}
    return SlipstreamLoader(SlipstreamDataset(source), batch_size, **options)


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_a_slow_consumer_is_not_run_away_from(prefetch: int) -> None:
    with loader_of(Counting(), prefetch=prefetch) as loader:
        batches = iter(loader)
        source = loader.dataset.source
        assert isinstance(source, Counting)
        for taken in (1, 2):
            next(batches)
            limit = time.monotonic() + 20
            while source.batches < taken + prefetch + 3 and time.monotonic() < limit:
                time.sleep(0.01)
            time.sleep(0.2)
            assert source.batches == taken + prefetch + 3  # as the loader's docstring says


def test_slow_and_fast_consumers_and_sources_get_the_same_bytes() -> None:
    with loader_of(Counting()) as loader:
        expected = digest(loader)
    with loader_of(Counting(seconds=0.02)) as loader:
        assert digest(loader) == expected
    with loader_of(Counting()) as loader:
        slow = []
        for batch in loader:
            time.sleep(0.02)
            slow.append(batch)
        assert digest(slow) == expected  # pyright: ignore[reportArgumentType]


def test_an_error_in_the_loop_leaves_a_loader_that_goes_on() -> None:
    with loader_of(Counting()) as loader:
        expected = digest(loader)
        loader.set_epoch(0)
        batches, taken = iter(loader), []
        for place in range(len(loader)):
            try:
                taken.append(next(batches))
                if place % 7 == 3:
                    raise torch.cuda.OutOfMemoryError("of the training step")
            except torch.cuda.OutOfMemoryError:
                continue
        assert digest(taken) == expected  # pyright: ignore[reportArgumentType]


def test_stages_called_during_iteration_change_nothing() -> None:
    with loader_of(Counting()) as loader:
        expected = digest(loader)
        loader.set_epoch(0)
        images = [torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8) for _ in range(4)]
        first = STAGES[0](images, sample_ids=range(4))
        taken = []
        for batch in loader:
            again = STAGES[0](images, sample_ids=range(4))
            assert all(torch.equal(again[name], first[name]) for name in first)
            taken.append(batch)
        assert digest(taken) == expected  # pyright: ignore[reportArgumentType]


def test_many_loaders_in_many_threads() -> None:
    source = Counting()
    with loader_of(source) as loader:
        expected = digest(loader)
    results: dict[int, list[str]] = {}

    def run(number: int) -> None:
        with loader_of(source, num_threads=2) as own:
            results[number] = digest(own)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert results == dict.fromkeys(range(6), expected)
