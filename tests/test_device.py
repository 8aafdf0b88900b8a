"""Which device a loader takes where nothing is said."""

from __future__ import annotations

import pytest
import torch

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
