"""A process that may open no more files: no fault of a sample, so UnavailableError, whatever the policy."""

from __future__ import annotations

import builtins
import errno
import importlib
import os
import pickle
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from decode_samples import encode, picture
from litdata_samples import photos, plain, write
from PIL import Image
from tar_samples import write_set

from slipstream import SlipstreamDataset, SlipstreamLoader, UnavailableError
from slipstream.source_arrow import open_arrow
from slipstream.source_folder import FolderSource
from slipstream.source_litdata import open_litdata
from slipstream.source_parquet import open_parquet
from slipstream.source_tar import open_tar

COUNT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("set"), plain(photos(COUNT)))


def test_a_local_set_that_is_copied_into_the_cache_may_want_files_too(folder, tmp_path, monkeypatch):
    """Where it is read is no part of the cache, and the want of files is none of its samples'."""
    opened, failing = builtins.open, [False]

    def limited(path, *more, **options):
        if failing[0] and str(path).startswith(str(folder)):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return opened(path, *more, **options)

    dataset = SlipstreamDataset(remote_dir=str(folder), cache_dir=tmp_path)
    monkeypatch.setattr(builtins, "open", limited)
    with SlipstreamLoader(dataset, 4, device="cpu", verbose=False, on_error="replace") as loader:
        failing[0] = True
        batches = iter(loader)
        with pytest.raises(UnavailableError, match="too many files open"):
            next(batches)
        failing[0] = False
        assert sum(len(batch["image"]) for batch in batches) == COUNT
        assert loader.report().bad == ()


@pytest.fixture
def no_more_files() -> Iterator[Callable[[], None]]:
    """Calling it leaves this process no file descriptor, until the test ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("kind", ["folder", "folder, whole files", "tar", "Arrow", "Parquet", "LitData"])
def test_a_process_that_may_open_no_more_files_is_no_fault_of_a_sample(kind, tmp_path, folder, no_more_files):
    source: Any
    if "folder" in kind:
        (tmp_path / "n").mkdir()
        Image.new("RGB", (9, 8)).save(tmp_path / "n" / "a.jpg")
        source = FolderSource(tmp_path)
    elif kind == "tar":
        source = open_tar(write_set(tmp_path), cache_dir=tmp_path / "cache")
    elif kind == "LitData":
        source = open_litdata(folder)
    else:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        table = pa.table({"image": [bytes(encode(picture()))]})
        if kind == "Parquet":
            pq.write_table(table, tmp_path / "a.parquet")
        else:
            with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as out:
                out.write_table(table)
        source = (open_parquet if kind == "Parquet" else open_arrow)(tmp_path)
    source = pickle.loads(pickle.dumps(source))  # without what it has open
    importlib.import_module("numpy.ma")  # by the first look at a table
    no_more_files()
    read = source.values if kind.endswith("whole files") else source.read
    with pytest.raises(UnavailableError, match="too many files open"):
        read([0], "image")
