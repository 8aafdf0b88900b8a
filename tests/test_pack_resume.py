"""Packing that is killed, shared by ranks, or both: in the end the same bytes as in one go."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from pack_sets import dies_at, files_in, in_child, pack_and_die, write_images

from slipstream import pack as module
from slipstream.dataset import SlipstreamDataset
from slipstream.pack import pack
from slipstream.shares import slurm_ranks
from slipstream.source import ReadError

OPTIONS = {"chunk_bytes": 10_000}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def expected(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    pack(photos, folder, **OPTIONS, progress=False)
    assert len(files_in(folder)) > 9
    return files_in(folder)


@pytest.fixture
def no_waiting(monkeypatch):
    """What is on disk after a kill does not depend on fsync, which takes most of the time of small files."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def test_killed_at_every_step_it_goes_on_to_the_same_bytes(photos, tmp_path, expected, no_waiting):
    steps = 0
    for count in range(1, 1000):
        dst = tmp_path / str(count)
        steps = count
        if not pack_and_die(count, photos, dst, num_workers=1, **OPTIONS):
            break
        index = dst / "index.json"
        if index.exists():
            assert len(SlipstreamDataset(dst)) == 100
        else:
            with pytest.raises((FileNotFoundError, ValueError), match=r"packed to the end|no image|not exist"):
                SlipstreamDataset(dst)
        done = pack(photos, dst, num_workers=1, **OPTIONS, progress=False)
        assert done.whole and done.samples == 100
        assert files_in(dst) == expected
        assert not (dst / ".pack").exists()
    assert steps > 60


def test_killed_again_and_again_by_any_number_of_threads(photos, tmp_path, expected, no_waiting):
    chance = random.Random(0)
    for trial in range(12):
        dst, runs, packed = tmp_path / str(trial), 1, 0
        while pack_and_die(chance.randrange(3, 40), photos, dst, num_workers=chance.choice([1, 2, 5]), **OPTIONS):
            runs += 1
            done = len(list((dst / ".pack").glob("block-*.json")))
            assert done >= packed or (dst / "index.json").exists()  # what is done stays
            packed = done
        assert files_in(dst) == expected
        assert runs > 1


def test_what_is_done_is_not_done_again(photos, tmp_path, expected, no_waiting):
    assert pack_and_die(45, photos, tmp_path / "set", num_workers=1, **OPTIONS)
    before = {path: path.stat().st_ino for path in (tmp_path / "set").glob("chunk-*")}
    blocks = len(list((tmp_path / "set" / ".pack").glob("block-*.json")))
    assert blocks > 2
    done = pack(photos, tmp_path / "set", **OPTIONS, progress=False)
    assert 0 < done.packed < 100 - 8 * blocks
    kept = [path for path, number in before.items() if path.stat().st_ino == number]
    assert len(kept) >= blocks
    assert files_in(tmp_path / "set") == expected


@pytest.mark.parametrize("harm", ["chunk gone", "chunk cut off", "record cut off"])
def test_what_a_crash_of_the_machine_took_is_made_again(photos, tmp_path, expected, harm):
    pack(photos, tmp_path / "set", rank=0, world_size=2, **OPTIONS, progress=False)
    chunk = tmp_path / "set" / "chunk-000001-0.bin"
    record = tmp_path / "set" / ".pack" / "block-000001.json"
    assert record.exists()
    if harm == "chunk gone":
        chunk.unlink()
    else:
        os.truncate(chunk if harm == "chunk cut off" else record, 20)
    assert pack(photos, tmp_path / "set", **OPTIONS, progress=False).whole
    assert files_in(tmp_path / "set") == expected


def test_another_number_of_ranks_may_go_on(photos, tmp_path, expected):
    for rank, world_size in ((1, 3), (4, 5), (0, 2), (0, 3)):
        done = pack(photos, tmp_path / "set", rank=rank, world_size=world_size, **OPTIONS, progress=False)
        assert not done.whole and done.blocks_left > 0
        assert not (tmp_path / "set" / "index.json").exists()
    left = done.blocks_left
    done = pack(photos, tmp_path / "set", rank=2, world_size=3, **OPTIONS, progress=False)
    assert done.whole and done.blocks_left == 0 < left
    assert files_in(tmp_path / "set") == expected


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_ranks_one_after_another(photos, tmp_path, expected, order):
    packed = []
    for rank in order:
        done = pack(photos, tmp_path / "set", rank=rank, world_size=3, **OPTIONS, progress=False)
        packed.append(done.packed)
        assert done.whole == (rank == order[-1])
        assert (done.rank, done.world_size) == (rank, 3)
    assert sum(packed) == 100 and min(packed) > 20
    assert files_in(tmp_path / "set") == expected
    # One that comes late, or a second time, finds nothing to do.
    done = pack(photos, tmp_path / "set", rank=1, world_size=3, **OPTIONS, progress=False)
    assert done.whole and done.packed == 0


def test_more_ranks_than_blocks(photos, tmp_path, expected):
    wholes = [
        pack(photos, tmp_path / "set", rank=rank, world_size=50, **OPTIONS, progress=False).whole for rank in range(50)
    ]
    assert wholes.index(True) > 10
    assert files_in(tmp_path / "set") == expected


def test_ranks_at_once_that_die_and_come_again(photos, tmp_path, expected, no_waiting):
    chance = random.Random(1)
    for trial in range(8):
        dst = tmp_path / str(trial)
        counts = {rank: chance.choice([chance.randrange(1, 40), 10**6]) for rank in range(3)}
        counts[trial % 3] = chance.randrange(2, 20)

        def work(rank: int, counts=counts, dst=dst) -> None:
            def one() -> None:
                dies_at(counts[rank])
                pack(photos, dst, rank=rank, world_size=3, num_workers=2, **OPTIONS, progress=False)

            assert in_child(one) in (0, -signal.SIGKILL)

        together([lambda rank=rank: work(rank) for rank in range(3)])
        assert not (dst / "index.json").exists() or files_in(dst) == expected
        for rank in range(3):
            pack(photos, dst, rank=rank, world_size=3, **OPTIONS, progress=False)
        assert files_in(dst) == expected


def together(works: list) -> None:
    failures = []

    def run(work) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_one_rank_twice_at_once(photos, tmp_path, expected):
    # As when a scheduler starts a job again whose old machine still works.
    for trial in range(5):
        dst = tmp_path / str(trial)
        together([lambda dst=dst: pack(photos, dst, **OPTIONS, progress=False)] * 4)
        assert files_in(dst) == expected


def test_ranks_of_unlike_arguments_do_not_mix(photos, tmp_path):
    pack(photos, tmp_path / "set", rank=0, world_size=2, **OPTIONS, progress=False)
    before = files_in(tmp_path / "set")
    with pytest.raises(FileExistsError, match="chunk_bytes was 10000 and is 64000000"):
        pack(photos, tmp_path / "set", rank=1, world_size=2, progress=False)
    assert files_in(tmp_path / "set") == before


def test_a_folder_without_hard_links(photos, tmp_path, expected, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    pack(photos, tmp_path / "set", **OPTIONS, progress=False)
    assert files_in(tmp_path / "set") == expected


def test_an_interrupt_keeps_what_is_done_and_no_thread(photos, tmp_path, expected, monkeypatch):
    items = module.Layout.items
    calls = []

    def slow(self, positions):
        calls.append(positions)
        if len(calls) == 20:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        return items(self, positions)

    monkeypatch.setattr(module.Layout, "items", slow)
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        pack(photos, tmp_path / "set", num_workers=2, **OPTIONS, progress=False)
    limit = time.monotonic() + 20
    while threading.active_count() > threads and time.monotonic() < limit:
        time.sleep(0.01)  # they end with what they have begun
    assert threading.active_count() == threads
    monkeypatch.setattr(module.Layout, "items", items)
    done = pack(photos, tmp_path / "set", **OPTIONS, progress=False)
    assert 0 < done.packed < 90
    assert files_in(tmp_path / "set") == expected


def test_a_failure_stops_the_other_threads_within_their_block(photos, tmp_path, monkeypatch):
    items, lock, seen = module.Layout.items, threading.Lock(), []

    def failing(self, positions):
        with lock:
            seen.append(positions)
            if len(seen) == 4:
                raise OSError("gone")
        time.sleep(0.02)
        return items(self, positions)

    monkeypatch.setattr(module, "_READ", 1)
    monkeypatch.setattr(module, "_PLACES", 1)
    monkeypatch.setattr(module.Layout, "items", failing)
    with pytest.raises(OSError, match="gone"):
        pack(photos, tmp_path / "set", num_workers=2, chunk_bytes="64KB", progress=False)
    assert len(seen) < 8


def test_a_full_disk_keeps_what_is_done(photos, tmp_path, expected, monkeypatch):
    replace, calls = os.replace, []

    def full(*paths: str) -> None:
        calls.append(paths)
        if len(calls) == 9:
            raise OSError(28, "No space left on device", paths[0])
        replace(*paths)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        pack(photos, tmp_path / "set", num_workers=3, **OPTIONS, progress=False)
    assert not list((tmp_path / "set" / ".pack").glob("*.part"))
    assert 0 < pack(photos, tmp_path / "set", **OPTIONS, progress=False).packed < 90
    assert files_in(tmp_path / "set") == expected


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, None),
        ({"ARRAY_TASK_ID": 7, "ARRAY_TASK_MIN": 5, "ARRAY_TASK_MAX": 8, "ARRAY_TASK_COUNT": 4}, (2, 4)),
        (
            {"ARRAY_TASK_ID": 6, "ARRAY_TASK_MIN": 0, "ARRAY_TASK_MAX": 6, "ARRAY_TASK_COUNT": 3, "ARRAY_TASK_STEP": 3},
            (2, 3),
        ),
        ({"ARRAY_TASK_ID": 3, "ARRAY_TASK_MIN": 3, "ARRAY_TASK_MAX": 3, "ARRAY_TASK_COUNT": 1}, (0, 1)),
        ({"STEP_ID": 0, "PROCID": 5, "NTASKS": 8}, (5, 8)),
        ({"PROCID": 0, "NTASKS": 8}, None),  # a batch script without srun: one process
        (
            {"ARRAY_TASK_ID": 1, "ARRAY_TASK_MIN": 0, "ARRAY_TASK_MAX": 1, "ARRAY_TASK_COUNT": 2}
            | {"STEP_ID": 0, "PROCID": 2, "NTASKS": 4},
            (6, 8),
        ),
    ],
)  # fmt: skip
def test_slurm_tells_which_share(monkeypatch, photos, tmp_path, environment, ranks):
    for name, value in environment.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert slurm_ranks() == ranks
    done = pack(photos, tmp_path / "set", **OPTIONS, progress=False)
    assert (done.rank, done.world_size) == (ranks or (0, 1))
    given = pack(photos, tmp_path / "other", rank=1, world_size=9, **OPTIONS, progress=False)
    assert (given.rank, given.world_size) == (1, 9)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = pack(photos, tmp_path / "third", **OPTIONS, progress=False)
    assert (done.rank, done.world_size) == (1, 2)


def test_a_slurm_array_with_gaps_is_refused(monkeypatch, photos, tmp_path):
    for name, value in {"ID": 3, "MIN": 1, "MAX": 7, "COUNT": 3}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    with pytest.raises(
        ValueError, match=r"must follow one another at even steps, got .*_MAX=7.* give rank and world_size"
    ):
        pack(photos, tmp_path / "set")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_PROCID", "3")
    with pytest.raises(ValueError, match="SLURM_PROCID must be below SLURM_NTASKS, got 3"):
        slurm_ranks()


COMMAND = [sys.executable, "-c", "import sys; from slipstream.cli import main; sys.exit(main())", "pack"]


def test_three_ranks_under_torchrun(photos, tmp_path, expected):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "--no-python"]
    command += [*COMMAND, str(photos), str(tmp_path / "set"), "--chunk-size", "10KB", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for rank in range(3):
        assert re.search(rf"^rank {rank} of 3: packed 3\d samples in ", done.stdout, re.MULTILINE)
    assert done.stdout.count("100 samples, ") >= 1
    assert files_in(tmp_path / "set") == expected


def test_a_command_that_is_killed_and_run_again(tmp_path):
    # Enough to be under way when it is killed, wherever that is.
    photos = write_images(tmp_path / "photos", 1500)
    pack(photos, tmp_path / "expected", chunk_bytes="20KB", progress=False)
    command = [*COMMAND, str(photos), str(tmp_path / "set"), "--chunk-size", "20KB", "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while len(list((tmp_path / "set").glob("chunk-*"))) < 7:
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    kept = len(list((tmp_path / "set" / ".pack").glob("block-*.json")))
    assert 0 < kept < 100 and not (tmp_path / "set" / "index.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = re.match(r"packed ([\d,]+) samples in .*\n1,500 samples, \d+ MB in \d+ chunks in ", done.stdout)
    assert found and 0 < int(found[1].replace(",", "")) < 1500
    assert "1500/1500" in done.stderr
    assert files_in(tmp_path / "set") == files_in(tmp_path / "expected")


def test_a_bad_sample_of_one_rank_ends_that_rank_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_RUN", 1)
    photos = write_images(tmp_path / "photos")
    bad = photos / "class1" / "052.jpg"
    bad.unlink()
    bad.symlink_to("nowhere")
    for rank in range(3):
        if rank == 1:
            with pytest.raises(ReadError, match=r"sample 51 .*052\.jpg"):
                pack(photos, tmp_path / "set", rank=1, world_size=3, **OPTIONS, progress=False)
        else:
            assert not pack(photos, tmp_path / "set", rank=rank, world_size=3, **OPTIONS, progress=False).whole
    done = pack(photos, tmp_path / "set", rank=1, world_size=3, on_error="skip", **OPTIONS, progress=False)
    assert done.whole and done.samples == 99 and Path(done.skipped[0][1]) == bad
