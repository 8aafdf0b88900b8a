"""Which device a loader takes where nothing is said, and how its threads get there."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from slipstream import device, yuv420
from slipstream.decode_rows import Rows
from slipstream.device import choose_device


@pytest.fixture
def four_devices(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("SLIPSTREAM_DEVICE", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    return monkeypatch


def test_the_current_device_or_the_local_ranks(four_devices: pytest.MonkeyPatch) -> None:
    assert choose_device(None) == torch.device("cuda", 2)
    four_devices.setenv("LOCAL_RANK", "3")
    assert choose_device(None) == torch.device("cuda", 3)
    four_devices.setenv("SLIPSTREAM_DEVICE", "cpu")
    assert choose_device(None) == torch.device("cpu")


def test_a_process_that_sees_one_device_takes_it_whatever_its_rank(four_devices: pytest.MonkeyPatch) -> None:
    four_devices.setattr(torch.cuda, "device_count", lambda: 1)
    four_devices.setattr(torch.cuda, "current_device", lambda: 0)
    four_devices.setenv("LOCAL_RANK", "3")
    assert choose_device(None) == torch.device("cuda", 0)


@pytest.mark.parametrize("rank", ["4", "-1", "first"])
def test_a_rank_without_a_device_is_named(four_devices: pytest.MonkeyPatch, rank: str) -> None:
    four_devices.setenv("LOCAL_RANK", rank)
    with pytest.raises(ValueError, match=f"LOCAL_RANK .* 0 to 3, got '{rank}'"):
        choose_device(None)


def test_a_stream_is_entered_on_its_own_device_which_a_thread_need_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.stream by itself leaves a context on GPU 0 behind."""
    inside: list[object] = []
    copied_inside = []

    def entering(what: object):
        @contextmanager
        def enter():
            inside.append(what)
            yield
            copied_inside.append([*inside])
            assert inside.pop() == what

        return enter()

    monkeypatch.setattr(torch.cuda, "device", entering)
    monkeypatch.setattr(torch.cuda, "stream", entering)
    stream = SimpleNamespace(device=torch.device("cuda", 3))
    rows = Rows(2, torch.device("cpu"), stream)
    rows.put_array(0, np.zeros((4, 5, 3), np.uint8))
    image = np.frombuffer(yuv420.encode(np.zeros((4, 6, 3), np.uint8)), np.uint8)
    rows.put_stored([1], [image], [(4, 6)])
    assert copied_inside == [[stream.device, stream], [stream.device]] * 2


@pytest.mark.parametrize(
    ("cpu_max", "v1", "cores"),
    [
        (None, None, 8),  # no container, or no limit
        ("max 100000\n", None, 8),
        ("200000 100000\n", None, 2),
        ("250000 100000\n", None, 3),
        ("50000 100000\n", None, 1),
        ("9900000 100000\n", None, 8),
        (None, ("-1\n", "100000\n"), 8),
        (None, ("300000\n", "100000\n"), 3),
        ("\n", ("300000\n", "0\n"), 8),
    ],
)
def test_a_containers_limit_on_time_is_a_limit_of_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu_max: str | None, v1: tuple[str, str] | None, cores: int
) -> None:
    files = [tmp_path / name for name in ("cpu.max", "quota", "period")]
    for file, text in zip(files, [cpu_max, *(v1 or (None, None))], strict=True):
        if text is not None:
            file.write_text(text)
    both, quota, period = map(str, files)
    monkeypatch.setattr(device, "_CPU_LIMITS", [(both, both), (quota, period)])
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    assert device.usable_cores() == cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert device.own_cores() == max(1, cores // 2)
