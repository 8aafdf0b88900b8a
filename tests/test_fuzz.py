"""Mutated images, chunks, indexes and tars: never a crash, a hang, a wrong neighbour or a failure that nobody named.

In a child, so that a crash is seen. `--fuzz-seconds=600` goes on for longer, `--fuzz-seed=N` does others; what failed
is done again alone by `python tests/fuzzing.py FOLDER --only KIND:NUMBER --seed N`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fuzzing
import numpy as np
import process_memory
import pytest
from fuzz_mutations import mutate, mutate_in_place

MOST_MEGABYTES = 1500.0
STARTING = 120.0  # seconds that a child may take beyond those it is given, on a busy machine


@pytest.mark.timeout(0)
def test_damaged_bytes_do_no_harm(tmp_path: Path, request: pytest.FixtureRequest, capsys) -> None:
    seconds, seed = request.config.getoption("--fuzz-seconds"), request.config.getoption("--fuzz-seed")
    command = [sys.executable, fuzzing.__file__, str(tmp_path), "--seconds", str(seconds), "--seed", str(seed)]
    limit = seconds + fuzzing.HANG + STARTING
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        pytest.fail(f"hangs: {under_way(tmp_path)}")
    results = [line for line in done.stdout.splitlines() if line.startswith("FUZZ ")]
    ended = f"ended with {done.returncode} in {under_way(tmp_path)}\n{done.stderr[-1500:]}"
    assert done.returncode == 0 and results, ended
    result = json.loads(results[0].removeprefix("FUZZ "))
    with capsys.disabled():
        made = ", ".join(f"{count} {kind}" for kind, count in result["counts"].items())
        print(f"\nfuzz, seed {seed}: {made}; peak {result['peak']:.0f} MB", end="")
    assert not result["found"], "\n\n".join(result["found"])
    assert all(result["counts"].values()), result["counts"]
    assert result["peak"] < MOST_MEGABYTES


def under_way(folder: Path) -> str:
    now, hang = folder / "now", folder / "hang"
    text = now.read_text().strip() if now.exists() else "the start"
    return f"{text}\n{hang.read_text()[-3000:] if hang.exists() else ''}"


def test_mutations_are_pure_and_change_something() -> None:
    data = np.random.default_rng(0).bytes(3000)
    for make in (
        lambda rng: mutate(data, rng, head=300, others=[data[:500]]),
        lambda rng: mutate_in_place(data, rng, head=300),
    ):
        made = [make(np.random.default_rng([1, i])) for i in range(300)]
        assert made == [make(np.random.default_rng([1, i])) for i in range(300)]
        assert len(set(made)) > 250 and sum(each == data for each in made) < 30
    assert all(len(mutate_in_place(data, np.random.default_rng(i), head=300)) == len(data) for i in range(300))
    assert mutate(b"", np.random.default_rng(3)) is not None


def test_the_peak_of_a_child_is_its_own() -> None:
    large = np.ones(400 << 20, np.uint8)  # the parent's would be the child's too, by getrusage
    command = [sys.executable, "-c", "import process_memory; print(process_memory.peak())"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(fuzzing.__file__).parent)
    assert float(done.stdout) < large.nbytes / (1 << 20) < process_memory.peak()


HARNESS = """
import os, sys, time
import fuzzing

folder, what = sys.argv[1:]


class Kind:
    def __init__(self, folder):
        pass

    def check(self, rng):
        if what == "crash":
            os.kill(os.getpid(), 11)
        if what == "hang":
            time.sleep(60)
        assert what != "wrong", "another's bytes"
        raise KeyError("unnamed")


fuzzing.HANG = 1.0
fuzzing.KINDS = {"images": Kind, "other": Kind}
sys.argv = ["fuzzing", folder, "--only", "other:7"]
sys.exit(fuzzing.main())
"""


def test_a_crash_a_hang_and_a_wrong_answer_are_seen(tmp_path: Path) -> None:
    def run(what: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", HARNESS, str(tmp_path), what]
        folder = Path(fuzzing.__file__).parent
        return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=folder)

    assert run("crash").returncode == -11
    assert under_way(tmp_path).startswith("other:7\n") and "Segmentation fault" in under_way(tmp_path)
    assert run("hang").returncode == 1
    assert "Timeout" in under_way(tmp_path)
    for what, named in (("wrong", "AssertionError: another's bytes"), ("error", "KeyError: 'unnamed'")):
        (found,) = json.loads(run(what).stdout.removeprefix("FUZZ "))["found"]
        assert found.startswith(f"other:7: {named}")
