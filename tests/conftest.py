"""What every test shares: where the photographs are, and which tests a process can run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-seconds", type=float, default=10.0, help="how long tests/test_fuzz.py mutates (10)")
    parser.addoption("--fuzz-seed", type=int, default=0, help="what its mutations are drawn from (0)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # The interpreter and triton.compile cannot share a process, so the marked tests have a run of their own.
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    other_run = [item for item in items if ("interpret" in item.keywords) != interpreting]
    config.hook.pytest_deselected(items=other_run)
    items[:] = [item for item in items if ("interpret" in item.keywords) == interpreting]
    for item in items:
        if "gpu" in item.keywords and not _has_cuda():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    # `make test PYTEST_ARGS=FILE` runs all of its parts, and FILE may have nothing for one of them.
    part = os.environ.get("TRITON_INTERPRET") == "1" or "compiled" in session.config.option.keyword
    if part and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    # Sets that are unpacked or indexed would stay in the user's own cache.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIPSTREAM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(
    params=[pytest.param("interpreter", marks=pytest.mark.interpret), "compiled"],
)
def triton_on_cpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """Triton's kernels run on CPU tensors: in its interpreter, and compiled."""
    if request.param == "compiled":
        from compiled import running_compiled

        with running_compiled():
            yield request.param
    else:
        yield request.param


@pytest.fixture(scope="session")
def photos() -> list[Path]:
    """The real photographs beside the checkout, or in $SLIPSTREAM_PHOTOS, if they are there."""
    folder = Path(os.environ.get("SLIPSTREAM_PHOTOS") or SHARED / "photos")
    found = sorted(folder.rglob("*.jpg")) + sorted(folder.rglob("*.jpeg"))
    if not found:
        pytest.skip("../shared/photos is not here")
    return found


@pytest.fixture(scope="session")
def hostile() -> list[Path]:
    """The damaged and odd JPEGs beside the checkout, or in $SLIPSTREAM_HOSTILE, if they are there."""
    folder = Path(os.environ.get("SLIPSTREAM_HOSTILE") or SHARED / "hostile")
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".csv")
    if not found:
        pytest.skip("../shared/hostile is not here")
    return found


@pytest.fixture(scope="session")
def scenes() -> list[np.ndarray]:
    """Eight images that need no files, uint8 [H, W, 3]: noise over gradients, portrait, landscape, thin and tiny."""
    rng = np.random.default_rng(20)
    scenes = []
    for height, width in [(240, 320), (333, 187), (64, 500), (500, 64), (1, 1), (1, 90), (75, 1), (31, 33)]:
        y, x = np.mgrid[0:height, 0:width]
        gradient = np.stack([x * 255 / width, y * 255 / height, (x + y) % 256], axis=2)
        noise = rng.normal(0, 40, (height, width, 3))
        scenes.append(np.clip(gradient + noise, 0, 255).astype(np.uint8))
    return scenes


@pytest.fixture
def arena(monkeypatch: pytest.MonkeyPatch):
    """Every decoder's pipeline writes into it."""
    from decode_arena import Arena

    arena = Arena()
    monkeypatch.setattr("slipstream.decode.DaliPipeline.run", lambda self, encoded, stream: arena.run(encoded, stream))
    return arena


@pytest.fixture
def decoder():
    """A decoder on the CPU, closed after the test."""
    from decode_samples import make_decoder

    decoder = make_decoder()
    yield decoder
    decoder.close()


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """A store that speaks S3, in this process; gives its endpoint."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between tries of a store that fails."""
    import botocore.retries.standard

    from slipstream import source_cache, source_s3

    monkeypatch.setattr(botocore.retries.standard.ExponentialBackoff, "delay_amount", lambda *_: 0.01)
    monkeypatch.setattr(source_s3, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(source_cache, "_FIRST_WAIT", 0.01)


@pytest.fixture
def options(server: str) -> dict[str, str]:
    """The `storage_options` of that store."""
    from s3_store import KEYS

    return {"endpoint_url": server, "region_name": "us-east-1", **KEYS}
