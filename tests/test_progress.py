"""What is told of that which takes long."""

from __future__ import annotations

from pathlib import Path

import numba
import pytest
from PIL import Image

from slipstream import SlipstreamDataset, loader
from slipstream.progress import tell_compiling


def compile_in(module: str) -> None:
    def double(x):
        return x + x

    double.__module__ = module
    assert numba.njit(double)(2) == 4


def test_compiling_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    listener = tell_compiling()
    assert tell_compiling() is listener  # for the second loader too
    before, listener.told = listener.told, False
    try:
        compile_in("somebody.elses")
        assert capsys.readouterr().out == ""
        compile_in("slipstream_kernels.new")
        compile_in("slipstream_kernels.other")
    finally:
        listener.told = before
    assert capsys.readouterr().out == "slipstream: compiling CPU kernels, once on this machine (up to a minute)\n"


def test_loaders_that_print_tell_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "0.jpg")
    asked = []
    monkeypatch.setattr(loader, "tell_compiling", lambda: asked.append(True))
    for verbose in (False, True):
        loader.SlipstreamLoader(SlipstreamDataset(tmp_path), 1, device="cpu", verbose=verbose).shutdown()
    assert asked == [True]
