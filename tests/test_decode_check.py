"""Pixels compared with the CPU's: wrong and unwritten ones are found and named, good ones never."""

from __future__ import annotations

import gc
import logging
import threading

import numpy as np
import pytest
import torch
from decode_arena import DRAWN, OTHERS, Arena, settle
from decode_samples import assert_equal, by_pillow, decode, encode, jpegs, make_decoder, picture, pixels
from PIL import Image
from slipstream_kernels.bytes_at import bytes_at
from slipstream_kernels.reference import bytes_at_reference

from slipstream import DecodeError, WrongPixelsError
from slipstream.decode import Decoder
from slipstream.decode_check import BOUND, ONE_IN, DecodeCheck, Probes, image_keys, is_drawn, probe_addresses


@pytest.fixture
def verifying():
    decoder = make_decoder(verify=True)
    yield decoder
    decoder.close()


def failures_of(decoder: Decoder, encoded, ids):
    """What the next call says of these."""
    decoder.decode(encoded, ids, lambda i: f"file-{i}.jpg")
    settle(decoder)
    with pytest.raises(WrongPixelsError) as caught:
        decode(decoder, [])
    return caught.value.failures


def test_one_in_256_is_drawn_by_its_id_alone() -> None:
    ids = np.arange(1 << 18)
    drawn = is_drawn(ids)
    assert abs(drawn.sum() - len(ids) / ONE_IN) < 5 * (len(ids) / ONE_IN) ** 0.5
    order = np.random.default_rng(1).permutation(len(ids))
    assert np.array_equal(is_drawn(ids[order]), drawn[order])
    assert np.array_equal(is_drawn(np.array([10**15 + 7])), is_drawn(np.array([5, 10**15 + 7]))[1:])
    gaps = np.diff(np.flatnonzero(drawn))
    assert 0.8 < gaps.std() / gaps.mean() < 1.2  # geometric, not every 256th


def test_probes_lie_inside_their_images_and_on_common_addresses() -> None:
    rng = np.random.default_rng(2)
    addresses = rng.integers(1 << 40, 1 << 41, 300)
    lengths = np.concatenate([rng.integers(1, 3000, 150), rng.integers(3000, 10_000_000, 150)])
    places, whose = probe_addresses(addresses, lengths)
    assert (places >= addresses[whose]).all() and (places < (addresses + lengths)[whose]).all()
    assert (places % 256 == 0).all()
    counts = np.bincount(whose, minlength=300)
    assert counts.max() <= 33 and (counts[lengths > 3000] >= 11).all()
    one, _ = probe_addresses(np.array([1 << 20]), np.array([150_000]))
    two, _ = probe_addresses(np.array([(1 << 20) + 3 * 12_345]), np.array([150_000]))
    assert len(np.intersect1d(one, two)) > 10  # another layout of the same memory
    assert len(probe_addresses(np.array([1001]), np.array([3]))[0]) == 0
    assert len(probe_addresses(np.zeros(0, np.int64), np.zeros(0, np.int64))[0]) == 0


def test_probes_tell_what_is_as_it_was_before() -> None:
    probes = Probes()
    places, whose = probe_addresses(np.array([1 << 20, 2 << 20]), np.array([100_000, 100_000]))
    values = np.random.default_rng(3).integers(0, 256, len(places)).astype(np.uint8)
    assert not probes.unchanged(places, whose, values, np.array([1, 2])).any()  # nothing is known yet
    assert probes.unchanged(places, whose, values, np.array([3, 4])).tolist() == [True, True]
    assert probes.unchanged(places, whose, values, np.array([3, 4])).tolist() == [True, True]
    probes.found_right(places[whose == 0])
    for second in (5, 6):
        assert probes.unchanged(places, whose, values, np.array([3, second])).tolist() == [False, True]
    assert probes.unchanged(places, whose, values, np.array([9, 9])).tolist() == [True, True]  # another image
    assert probes.unchanged(places, whose, values, np.array([3, 9])).tolist() == [True, True]  # not found right there
    changed = values.copy()
    changed[np.flatnonzero(whose == 1)[-1]] ^= 1
    assert probes.unchanged(places, whose, changed, np.array([6, 7])).tolist() == [True, False]
    # three are equal by chance too often
    assert not probes.unchanged(places[:3], whose[:3], changed[:3], np.array([8])).any()


def test_images_of_one_sample_have_keys_of_their_own() -> None:
    """As far as their lengths tell them apart; and no other sample has them."""
    ids, encoded = np.array([3, 3, 4, 10**15]), [np.zeros(length, np.uint8) for length in (5, 6, 5, 5)]
    keys = image_keys(ids, encoded)
    assert len(set(keys.tolist())) == 4
    assert np.array_equal(keys[2:3], image_keys(ids[2:3], encoded[2:3]))


def test_bytes_of_any_memory_are_read_by_the_reference() -> None:
    memory = np.random.default_rng(4).integers(0, 256, 9000).astype(np.uint8)
    at = np.random.default_rng(5).integers(0, 9000, 700)
    assert np.array_equal(bytes_at_reference(torch.from_numpy(memory.ctypes.data + at)).numpy(), memory[at])


@pytest.mark.usefixtures("triton_on_cpu")
@pytest.mark.parametrize("count", [0, 1, 255, 256, 700])
def test_bytes_of_any_memory_are_read_by_the_kernel(count: int) -> None:
    memory = np.random.default_rng(4).integers(0, 256, 9000).astype(np.uint8)
    at = torch.from_numpy(memory.ctypes.data + np.random.default_rng(5).integers(0, 9000, count))
    assert torch.equal(bytes_at(at), bytes_at_reference(at))


@pytest.mark.gpu
def test_bytes_of_any_memory_are_read_on_the_gpu() -> None:
    memory = torch.randint(0, 256, (9000,), dtype=torch.uint8, device="cuda")
    at = torch.randint(0, 9000, (700,), device="cuda")
    assert torch.equal(bytes_at(memory.data_ptr() + at), memory[at])


def test_good_pixels_of_every_kind_pass(verifying: Decoder) -> None:
    flat = [encode(Image.new("RGB", (90, 60), "white")) for _ in range(4)]  # suspects each time: flat as before
    kinds = [encode(picture(i, (200, 150)).convert("CMYK")) for i in range(2)]
    kinds += [encode(picture(3, (200, 150)), format) for format in ("PNG", "WEBP", "JPEG2000", "BMP", "GIF")]
    encoded = [*flat, *kinds, *jpegs(4)]
    for _ in range(5):
        verifying.decode(encoded, DRAWN[: len(encoded)], str)
        settle(verifying)
        batch = verifying.decode(encoded, OTHERS[: len(encoded)], str)
        settle(verifying)
    expected = [by_pillow(data) for data in encoded]
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(pixels(batch), expected, strict=True)) <= 1
    decode(verifying, [])


def test_good_photographs_pass_again_and_again(photos, verifying: Decoder) -> None:
    encoded = [np.fromfile(path, np.uint8) for path in photos[:48]]
    for turn in range(3):
        decode(verifying, encoded[turn:])
    settle(verifying)
    decode(verifying, [])


def test_an_image_that_was_not_written_is_named(verifying: Decoder, arena: Arena) -> None:
    big = [encode(picture(i, (150, 100))) for i in range(8)]
    verifying.decode(big[:4], OTHERS[:4], str)
    settle(verifying)
    arena.wrong = {2: "skipped"}
    ((sample_id, path, reason),) = failures_of(verifying, big[4:], OTHERS[4:8])
    assert (sample_id, path) == (OTHERS[6], f"file-{OTHERS[6]}.jpg")
    assert "decoded wrongly" in reason and "of 255" in reason and "memory is as it was before" in reason
    arena.wrong = {}
    assert_equal(pixels(verifying.decode(big[:4], OTHERS[:4], str)), [by_pillow(data) for data in big[:4]])


def test_one_that_was_not_written_where_others_lay_otherwise_is_named(verifying: Decoder, arena: Arena) -> None:
    verifying.decode([encode(picture(i, (110 + i, 90 + 7 * i))) for i in range(6)], OTHERS[:6], str)
    settle(verifying)
    arena.wrong = {1: "skipped"}
    ((sample_id, _, reason),) = failures_of(
        verifying, [encode(picture(9 + i, (160, 110))) for i in range(3)], OTHERS[:3]
    )
    assert sample_id == OTHERS[1] and "as it was before" in reason


@pytest.mark.parametrize(("what", "found"), [("another", True), ("brighter", True), ("noisy", False), ("", False)])
def test_a_drawn_sample_that_is_wrong_is_named(what: str, found: bool, verifying: Decoder, arena: Arena) -> None:
    arena.wrong = {1: what}
    verifying.decode([encode(picture(i, (150, 100))) for i in range(3)], [OTHERS[0], DRAWN[3], OTHERS[1]], str)
    settle(verifying)
    if found:
        with pytest.raises(DecodeError, match=f"sample {DRAWN[3]} .*from the CPU's pixels on average"):
            decode(verifying, [])
    decode(verifying, [])  # told once


def test_a_sample_of_another_size_or_that_the_cpu_refuses_is_wrong(decoder: Decoder) -> None:
    check = DecodeCheck(lambda data: by_pillow(bytes(data)), torch.device("cpu"))
    whole = encode(picture(1, (60, 40)))
    batch = decoder.decode([whole], [0], str)
    assert "(40, 60) pixels, (30, 60) on the CPU" in check._compare(batch, 0, encode(picture(1, (60, 30))))
    assert "the CPU refuses it (OSError" in check._compare(batch, 0, whole[:-200])
    assert check._compare(batch, 0, whole) == ""
    check.close()


def test_the_bound_is_above_rounding_and_far_below_another_picture() -> None:
    noise = np.random.default_rng(6).integers(-3, 4, (100, 100, 3))
    others = [by_pillow(encode(picture(i, (100, 100)))).astype(int) for i in range(6)]
    nearest = min(np.abs(a - b).mean() for i, a in enumerate(others) for b in others[:i])
    assert np.abs(noise).mean() < BOUND < nearest / 10


def test_what_pillow_decoded_is_not_compared_with_itself(verifying: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verifying._check is not None
    seen: list[int] = []

    def count(data: np.ndarray) -> np.ndarray:
        seen.append(1)
        return by_pillow(bytes(data))

    monkeypatch.setattr(verifying._check, "_decode", count)
    verifying.decode([encode(picture().convert("P"), "GIF")], DRAWN[:1], str)
    verifying.decode(jpegs(1), DRAWN[:1], str)
    settle(verifying)
    assert seen == [1]


def test_the_last_batch_is_logged_at_the_end(arena: Arena, caplog: pytest.LogCaptureFixture) -> None:
    decoder = make_decoder(verify=True)
    arena.wrong = {0: "another"}
    decoder.decode([encode(picture(1, (150, 100)))], DRAWN[:1], lambda i: f"file-{i}.jpg")
    with caplog.at_level(logging.ERROR, "slipstream"):
        decoder.close()
    assert [record.getMessage() for record in caplog.records if f"sample {DRAWN[0]} (file" in record.getMessage()]


def test_the_decoder_waits_where_checks_fall_behind(verifying: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only there: two batches may be under way."""
    assert verifying._check is not None
    go = threading.Event()

    def slow(data: np.ndarray) -> np.ndarray:
        go.wait(20)
        return by_pillow(bytes(data))

    monkeypatch.setattr(verifying._check, "_decode", slow)
    encoded = jpegs(1)
    for _ in range(2):
        verifying.decode(encoded, DRAWN[:1], str)
    third = threading.Thread(target=verifying.decode, args=(encoded, DRAWN[:1], str))
    third.start()
    third.join(0.3)
    assert third.is_alive()
    go.set()
    third.join(20)
    assert not third.is_alive()
    settle(verifying)
    decode(verifying, [])


def checking() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("slipstream-check")]


@pytest.mark.parametrize("how", ["close", "drop"])
def test_its_thread_ends(how: str) -> None:
    decoder = make_decoder(verify=True)
    decoder.decode(jpegs(1), DRAWN[:1], str)
    settle(decoder)
    threads = checking()
    assert threads
    if how == "close":
        decoder.close()
        decoder.close()
        with pytest.raises(RuntimeError, match="closed"):
            decode(decoder, [])
    del decoder
    gc.collect()
    for thread in threads:
        thread.join(10)
    assert checking() == []


@pytest.mark.usefixtures("arena")
def test_one_batch_again_and_again_is_compared_once(verifying: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is as it was before, by its own pixels."""
    assert verifying._check is not None
    compared: list[int] = []
    monkeypatch.setattr(verifying._check, "_compare", lambda batch, row, data: compared.append(row) or "")
    encoded = [encode(picture(i, (150, 100))) for i in range(8)]
    for _ in range(6):
        verifying.decode(encoded, OTHERS[:8], str)
        settle(verifying)
    assert compared == [*range(8)]


def test_the_cpu_is_not_checked_unless_asked(decoder: Decoder) -> None:
    assert decoder._check is None
