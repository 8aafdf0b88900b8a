"""State: saved at any step, loaded with any batch size and world size, the rest is the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tar_samples
import torch
from litdata_samples import write
from PIL import Image

from slipstream import (
    ColorJitter,
    MixUp,
    MultiCropPipeline,
    MultiRandomResizedCrop,
    Normalize,
    RandomResizedCrop,
    SlipstreamDataset,
    SlipstreamLoader,
)

STAGES = [
    MultiRandomResizedCrop({"a": dict(size=16), "b": dict(size=8)}),
    MultiCropPipeline({"a": [ColorJitter(0.4, 0.4, 0.2, 0.1), Normalize()]}),
]
COUNT = 37


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (24, 30, 3), dtype=np.uint8)).save(folder / f"{index:02}.jpg")
    return folder


def make(folder: Path, **options) -> SlipstreamLoader:
    options = {"batch_size": 4, "shuffle": True, "seed": 9, "pipelines": {"image": STAGES}} | options
    return SlipstreamLoader(SlipstreamDataset(local_dir=folder), device="cpu", verbose=False, **options)


def samples(batches) -> list[tuple[int, torch.Tensor]]:
    return [
        (number, batch["a"][row])
        for batch in batches
        for row, number in enumerate(batch["_indices"].tolist())
        if "_valid" not in batch or batch["_valid"][row]
    ]


def same(a, b) -> bool:
    return [n for n, _ in a] == [n for n, _ in b] and all(
        torch.equal(x, y) for (_, x), (_, y) in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("steps", [0, 1, 5, 9])
def test_the_rest_is_the_same_bytes(folder: Path, steps: int) -> None:
    with make(folder) as loader:
        whole = samples(loader)
        second = samples(loader)
        loader.set_epoch(0)
        batches = iter(loader)
        taken = samples(next(batches) for _ in range(steps))
        state = json.loads(json.dumps(loader.state_dict()))  # plain numbers and texts
    assert same(taken, whole[: 4 * steps])
    for batch_size in (4, 3, 50):
        with make(folder, batch_size=batch_size) as other:
            other.load_state_dict(state)
            assert other.state_dict() == state
            assert same(samples(other), whole[4 * steps :])
            assert same(samples(other), second)  # and the next epoch after it


def test_many_ranks_go_on_where_one_stopped(folder: Path) -> None:
    with make(folder) as loader:
        whole = samples(loader)
        loader.set_epoch(0)
        batches = iter(loader)
        next(batches), next(batches)
        state = loader.state_dict()
    rest = []
    for rank in range(3):
        with make(folder, rank=rank, world_size=3, batch_size=2) as other:
            other.load_state_dict(state)
            rest += samples(other)
            assert other.state_dict()["epoch"] == 1
    expected = dict(whole[8:])
    assert sorted(number for number, _ in rest) == sorted(expected)
    assert all(torch.equal(crop, expected[number]) for number, crop in rest)


def test_setting_the_epoch_of_a_loaded_state_keeps_its_place(folder: Path) -> None:
    with make(folder) as loader:
        whole = samples(loader)
        second = iter(loader)
        next(second)
        state = loader.state_dict()
        rest = samples(second)
    with make(folder) as other:
        other.load_state_dict(state)
        other.set_epoch(1)  # as loops do before every epoch
        assert other.state_dict() == state
        assert same(samples(other), rest)
        other.load_state_dict(state)
        other.set_epoch(0)
        assert same(samples(other), whole)
        other.set_epoch(1)
        assert len(samples(other)) == COUNT  # all of it, now that the state's part is gone through


def test_what_is_made_ahead_is_not_counted(folder: Path) -> None:
    with make(folder, prefetch=3) as loader:
        assert loader.state_dict()["position"] == 0
        batches = iter(loader)
        assert loader.state_dict()["position"] == 0
        next(batches)
        assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (0, 4)
        for _ in batches:
            pass
        assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (1, 0)


def test_a_state_of_another_run_is_refused(folder: Path, tmp_path: Path) -> None:
    with make(folder) as loader:
        state = loader.state_dict()
    Image.new("RGB", (9, 9)).save(tmp_path / "0.jpg")
    others = {
        "seed": make(folder, seed=10),
        "shuffle": make(folder, shuffle=False),
        "apply_exif": make(folder, apply_exif=True),
        r"samples \(saved 37, here 1\).*dataset": make(tmp_path),
        r"different: batch_stages": make(folder, batch_stages=[MixUp(num_classes=3, label="path", crops=["a"])]),
        r"different: pipelines\['image'\]$": make(folder, pipelines={"image": STAGES[:1]}),
    }
    for message, other in others.items():
        with other, pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
    with make(folder, on_error="skip", truncated="grey") as loader:  # what a run goes on with that a bad sample ended
        loader.load_state_dict(state)
    with make(folder) as loader:
        with pytest.raises(TypeError, match="state must be what state_dict"):
            loader.load_state_dict({"epoch": 1})
        with pytest.raises(ValueError, match="position must be at most the 37 samples, got 38"):
            loader.load_state_dict({**state, "position": 38})
        with pytest.raises(ValueError, match="version"):
            loader.load_state_dict({**state, "version": 0})


@pytest.mark.parametrize("kind", ["tar", "arrow", "parquet", "litdata"])
def test_a_set_that_was_moved_is_the_same(tmp_path: Path, kind: str) -> None:
    """A job that goes on elsewhere finds its data under another path, such as one with the number of the job."""
    for place, count in (("scratch/job-1", 4), ("scratch/job-2", 4), ("other", 5)):
        folder = tmp_path / place
        images = [tar_samples.jpeg(number) for number in range(count)]
        for part in (0, 1) if kind != "litdata" else ():
            stem = folder / ("a", "b")[part] / "0"  # one name in two folders
            stem.parent.mkdir(parents=True)
            if kind == "tar":
                tar_samples.write(stem.with_suffix(".tar"), [(f"{n}.jpg", data) for n, data in enumerate(images)])
                continue
            pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            table = pa.table({"image": images})
            if kind == "parquet":
                pq.write_table(table, stem.with_suffix(".parquet"))
            else:
                with pa.ipc.new_file(stem.with_suffix(".arrow"), table.schema) as file:
                    file.write_table(table)
        if kind == "litdata":
            write(folder, [{"image": data} for data in images])

    def opened(place: str) -> SlipstreamLoader:
        where = tmp_path / place if kind == "litdata" else tmp_path / place / "*" / f"*.{kind}"
        return SlipstreamLoader(SlipstreamDataset(where), 2, device="cpu", verbose=False)

    with opened("scratch/job-1") as loader:
        next(iter(loader))
        state = loader.state_dict()
    with opened("scratch/job-2") as loader:
        loader.load_state_dict(state)
        assert next(iter(loader))["_indices"].tolist() == [2, 3]
    with opened("other") as loader, pytest.raises(ValueError, match=r"samples .*, dataset "):
        loader.load_state_dict(state)


class Shade:
    def __init__(self, amount: float) -> None:
        self.amount = amount
        self.table = torch.full((3,), amount)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return (images * self.amount).to(images.dtype)


def scaled(images: torch.Tensor, *, by: float) -> torch.Tensor:
    return (images * by).to(images.dtype)


def test_parameters_of_a_stage_of_ones_own_are_told_apart(folder: Path) -> None:
    for one, same_one, other in (
        (Shade(0.5), Shade(0.5), Shade(0.25)),
        (partial(scaled, by=0.5), partial(scaled, by=0.5), partial(scaled, by=0.25)),
    ):
        with make(folder, pipelines={"image": [RandomResizedCrop(8), one]}) as loader:
            state = loader.state_dict()
        with make(folder, pipelines={"image": [RandomResizedCrop(8), same_one]}) as loader:
            loader.load_state_dict(state)
        with (
            make(folder, pipelines={"image": [RandomResizedCrop(8), other]}) as loader,
            pytest.raises(ValueError, match=r"different: pipelines\['image'\]$"),
        ):
            loader.load_state_dict(state)


RUN = textwrap.dedent(
    """
    import json, os, sys
    sys.path[:0] = [{tests!r}]
    from pathlib import Path
    from test_resume import make, samples

    folder, log, batch_size, kill_at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    with make(folder, batch_size=batch_size) as loader:
        if log.exists():
            loader.load_state_dict(json.loads(log.read_text().splitlines()[-1])["state"])
        for step, batch in enumerate(loader):
            sums = [[number, float(crop.double().sum())] for number, crop in samples([batch])]
            with log.open("a") as file:  # the training step and its checkpoint
                file.write(json.dumps({{"sums": sums, "state": loader.state_dict()}}) + "\\n")
                file.flush()
                os.fsync(file.fileno())
            if step + 1 == kill_at:
                os.kill(os.getpid(), 9)
    """
)


def test_killed_and_resumed_runs_see_each_sample_once(folder: Path, tmp_path: Path) -> None:
    script, log = tmp_path / "run.py", tmp_path / "log"
    script.write_text(RUN.format(tests=str(Path(__file__).parent)))
    for batch_size, kill_at in ((4, 3), (3, 4), (5, 1000)):
        done = subprocess.run(
            [sys.executable, script, folder, log, str(batch_size), str(kill_at)],
            timeout=120,
            env=os.environ,
            check=False,
        )
        assert done.returncode == (-signal.SIGKILL if kill_at < 1000 else 0)
    seen = [tuple(pair) for line in log.read_text().splitlines() for pair in json.loads(line)["sums"]]
    with make(folder) as loader:
        expected = [(number, float(crop.double().sum())) for number, crop in samples(loader)]
    assert seen == expected


def test_a_far_step_is_reached_at_once() -> None:
    import time

    from slipstream.sampler import Sampler
    from slipstream.shares import Shares

    shares = Shares(length=10**10, batch_size=256, rank=3, world_size=64, tail="pad", start=9 * 10**9)
    sampler = Sampler(10**10, shuffle=True, seed=0)
    sampler.sample_ids(0, np.arange(2))  # compiled
    begin = time.perf_counter()
    positions, _ = shares.positions(50_000)
    sampler.sample_ids(3, positions)
    assert time.perf_counter() - begin < 0.05


AGAIN_AND_AGAIN = textwrap.dedent(
    """
    import json, os, random, signal, sys, time
    sys.path[:0] = [{tests!r}]
    from pathlib import Path
    from test_resume import make, samples

    folder, log, shuffle = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    dice = random.Random(sys.argv[3])

    def run(batch_size):
        lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\\n")]
        log.write_text("".join(lines))  # a last one may be half written
        with make(folder, batch_size=batch_size, shuffle=shuffle) as loader:
            if lines:
                loader.load_state_dict(json.loads(lines[-1])["state"])
            for batch in loader:
                sums = [[number, float(crop.double().sum())] for number, crop in samples([batch])]
                time.sleep(0.06)  # the training step; then its checkpoint
                with log.open("a") as file:
                    file.write(json.dumps({{"sums": sums, "state": loader.state_dict()}}) + "\\n")

    log.write_text("")
    with make(folder, shuffle=shuffle) as loader:
        list(loader)  # compiled and imported once, for all children
    killed, gone, status = 0, 0, 0
    while not gone:
        child = os.fork()
        if not child:
            run(dice.choice([3, 4, 5]))
            os._exit(0)
        limit = time.monotonic() + (dice.uniform(0.05, 0.3) if killed < 12 else 100)
        while not gone and time.monotonic() < limit:
            time.sleep(0.005)
            gone, status = os.waitpid(child, os.WNOHANG)
        if not gone:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            killed += 1
    assert status == 0, status
    print(killed)
    """
)


@pytest.mark.parametrize("shuffle", [True, "windowed", False])
def test_killed_at_any_moment_and_resumed_it_sees_each_sample_once(
    folder: Path, tmp_path: Path, shuffle: bool | str
) -> None:
    script, log = tmp_path / "run.py", tmp_path / "log"
    script.write_text(AGAIN_AND_AGAIN.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, script, folder, log, json.dumps(shuffle)]
    done = subprocess.run(command, timeout=200, env=os.environ, check=True, capture_output=True, text=True)
    assert int(done.stdout) >= 2
    seen = [tuple(pair) for line in log.read_text().splitlines() for pair in json.loads(line)["sums"]]
    with make(folder, shuffle=shuffle) as loader:
        assert seen == [(number, float(crop.double().sum())) for number, crop in samples(loader)]
