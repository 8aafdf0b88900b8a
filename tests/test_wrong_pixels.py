"""A loader whose decoder gets an image wrong: that is told between batches, and none of them is lost."""

from __future__ import annotations

import functools
import logging
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from decode_arena import DRAWN, OTHERS, Arena, settle
from decode_samples import encode, picture
from litdata_samples import photos, plain, write
from own_source import ImageSource

from slipstream import DecodeError, SlipstreamDataset, SlipstreamLoader, WrongPixelsError, loader
from slipstream.bad_samples import Report
from slipstream.decode import Decoder


@pytest.fixture(autouse=True)
def verifying_loaders(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(loader, "Decoder", functools.partial(Decoder, verify=True))


class Source(ImageSource):
    """Pictures by id."""

    def __len__(self) -> int:
        return 200

    def read(self, ids, field="image"):
        return [encode(picture(int(i), (150, 100))) for i in ids]


class Epochs(NamedTuple):
    """What a loader gave in three epochs: ids by batch, what its errors named, how often the wrong decoder ran."""

    ids: list[list[int]]
    named: list[tuple[int, str]]
    times: int
    report: Report


def epochs_with_one_wrong(what: str, policy: str, ids: list[int], arena: Arena, monkeypatch) -> Epochs:
    """Three epochs, in batches of 4, of a decoder that always gets the tenth of these wrong."""
    dataset = SlipstreamDataset(Source(), indices=ids)
    arena.victim, arena.what = bytes(dataset.source.read([ids[9]])[0]), what
    given, named = [], []
    with SlipstreamLoader(dataset, 4, device="cpu", verbose=False, on_error=policy) as made:
        decoder = made._resources.decoder
        decode_locked = decoder._decode_locked

        def settled(*args):
            settle(decoder)
            return decode_locked(*args)

        monkeypatch.setattr(decoder, "_decode_locked", settled)
        for _ in range(3):
            batches = iter(made)
            while True:
                try:
                    batch = next(batches, None)
                except DecodeError as error:
                    named += [(number, path) for number, path, _ in error.failures]
                    continue
                if batch is None:
                    break
                given.append(batch["_indices"].tolist())
        return Epochs(given, named, arena.times, made.report())


@pytest.mark.parametrize("policy", ["raise", "replace", "skip", "resample"])
def test_a_loader_raises_for_unwritten_images_and_loses_no_batch(
    policy: str, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = OTHERS[:24]
    found = epochs_with_one_wrong("skipped", policy, ids, arena, monkeypatch)
    assert found.named == [(ids[9], f"memory:{ids[9]}")]
    assert found.ids == 3 * [ids[first : first + 4] for first in range(0, 24, 4)]
    assert found.times == 1  # from then on the CPU decodes it


@pytest.mark.parametrize("policy", ["replace", "skip", "resample"])
def test_a_policy_takes_what_two_decoders_see_otherwise(
    policy: str, arena: Arena, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ids = [*OTHERS[:9], DRAWN[0], *OTHERS[9:23]]
    found = epochs_with_one_wrong("another", policy, ids, arena, monkeypatch)
    assert found.named == []
    assert found.ids == 3 * [ids[first : first + 4] for first in range(0, 24, 4)]
    assert [(number, path) for number, path, _ in found.report.bad] == [(ids[9], f"memory:{ids[9]}")]
    assert "from the CPU's pixels on average" in found.report.bad[0][2]
    assert (found.report.replaced, found.report.skipped, found.report.resampled) == (0, 0, 0)
    assert f"sample {ids[9]} (memory:{ids[9]}): decoded wrongly" in caplog.text
    assert "from now on the CPU decodes it" in caplog.text
    assert found.times == 1


@pytest.mark.parametrize("end", ["shutdown", "next epoch"])
def test_an_error_that_nobody_takes_is_in_the_log(end: str, arena: Arena, caplog: pytest.LogCaptureFixture) -> None:
    dataset = SlipstreamDataset(Source(), indices=OTHERS[:24])
    arena.victim, arena.what = bytes(dataset.source.read([OTHERS[9]])[0]), "skipped"
    with SlipstreamLoader(dataset, 4, device="cpu", verbose=False, on_error="replace", prefetch=4) as made:
        batches = iter(made)
        for _ in range(3):
            next(batches)
        deadline = time.monotonic() + 20
        while not caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
        if end == "next epoch":
            assert len(list(made)) == 6
    logged = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(logged) == 1
    assert f"sample {OTHERS[9]} (memory:{OTHERS[9]}): decoded wrongly" in logged[0].getMessage()


def test_a_set_that_is_fetched_loses_no_batch_either(tmp_path: Path, arena: Arena) -> None:
    """What fetches its files ahead stays at the batch, and comes to an end."""
    ids = [*range(24)]
    samples = plain([{**one, "image": bytes(Source().read([i])[0])} for i, one in enumerate(photos(24))])
    dataset = SlipstreamDataset(remote_dir=str(write(tmp_path / "set", samples)), cache_dir=tmp_path / "cache")
    arena.victim, arena.what = bytes(dataset.source.read([OTHERS[9]])[0]), "skipped"
    seen, named = [], []
    with SlipstreamLoader(dataset, 4, device="cpu", verbose=False, on_error="replace") as made:
        batches = iter(made)
        while len(seen) < 24:
            try:
                seen += next(batches)["_indices"].tolist()
            except WrongPixelsError as error:
                named += [number for number, _, _ in error.failures]
        assert next(batches, None) is None
        if not named:  # it was the last to be checked
            with pytest.raises(WrongPixelsError):
                next(iter(made))
    assert seen == ids
    assert named in ([OTHERS[9]], [])
