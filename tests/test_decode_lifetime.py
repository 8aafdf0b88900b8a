"""What a CPU decoder holds and lets go: pixels, encoded bytes, threads, descriptors, and what a forked child gets."""

import gc
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from decode_samples import (
    assert_equal,
    by_pillow,
    decode,
    encode,
    jpegs,
    make_decoder,
    picture,
    pixels,
)

from slipstream.decode import DecodeError


def test_held_pixels_outlive_later_batches_and_the_decoder():
    decoder = make_decoder(max_batch=8)
    encoded = jpegs(8)
    expected = [by_pillow(data) for data in encoded]
    held = [decode(decoder, encoded), decode(decoder, [*encoded[:3], encode(picture(4).convert("P"), "GIF")])]
    single = decode(decoder, encoded[:1]).image(0)  # the view alone keeps its memory
    for i in range(10):
        decode(decoder, jpegs(8, first=20 + 8 * i))
    with pytest.raises(DecodeError):
        decode(decoder, [encoded[0], encoded[1][:200]])
    decoder.close()
    del decoder
    gc.collect()
    another = make_decoder(max_batch=8)
    decode(another, jpegs(8, first=200))
    assert_equal(pixels(held[0]), expected)
    assert_equal(pixels(held[1])[:3], expected[:3])
    np.testing.assert_array_equal(single.permute(1, 2, 0).numpy(), expected[0])
    another.close()


def test_encoded_bytes_are_let_go_when_the_call_returns(tmp_path, decoder):
    encoded = jpegs(6)
    (tmp_path / "data.bin").write_bytes(b"".join(bytes(data) for data in encoded))
    with open(tmp_path / "data.bin", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    whole = np.frombuffer(mapped, np.uint8)
    ends = np.cumsum([len(data) for data in encoded])
    views = [whole[end - len(data) : end] for data, end in zip(encoded, ends, strict=True)]
    batch = decode(decoder, views)
    with pytest.raises(DecodeError):
        decode(decoder, [views[0], views[1][:300]])
    del whole, views
    gc.collect()
    mapped.close()  # raises BufferError while anyone holds a view; afterwards DALI would crash if it read one
    assert_equal(pixels(batch), [by_pillow(data) for data in encoded])
    assert_equal(pixels(decode(decoder, encoded)), pixels(batch))


def test_a_failed_batch_leaves_nothing_to_the_collector(decoder):
    """Pixels on a GPU do not press the collector to run."""
    encoded = [*jpegs(3), encode(picture(3))[:300]]
    held = weakref.ref(encoded[0])
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(DecodeError) as caught:
            decode(decoder, encoded)
        del caught, encoded
        assert held() is None
    finally:
        gc.enable()


def test_encoded_bytes_are_held_until_a_device_has_read_them(decoder, monkeypatch):
    """Also where the batch itself is dropped unread; the stream and its events are stand-ins."""
    passed = False

    class Event:
        def record(self, stream):
            pass

        def query(self):
            return passed

        def synchronize(self):
            pass

    run = decoder._pipeline.run
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(decoder._pipeline, "run", lambda encoded, stream: run(encoded, None))
    monkeypatch.setattr(decoder, "_stream", object())
    encoded = jpegs(2)
    held = weakref.ref(encoded[0])
    decode(decoder, encoded)
    del encoded
    decode(decoder, jpegs(2))
    assert held() is not None
    passed = True
    decode(decoder, jpegs(2))
    assert held() is None


def test_other_threads_run_while_a_batch_is_decoded(decoder):
    encoded = [encode(picture(i, (700, 500))) for i in range(32)]
    decode(decoder, encoded)
    ticks = 0
    thread = threading.Thread(target=decode, args=(decoder, encoded))
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        ticks += 1
    assert ticks >= 10  # with the GIL held it would be one or two


def test_threads_may_share_a_decoder(decoder):
    results = {}

    def work(number):
        for i in range(5):
            encoded = jpegs(4 + number, first=number)
            results[number, i] = (pixels(decode(decoder, encoded)), [by_pillow(data) for data in encoded])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    for got, expected in results.values():
        assert_equal(got, expected)


def held_by_process():
    gc.collect()
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's /proc")
@pytest.mark.parametrize("how", ["close", "drop"])
def test_nothing_stays_after_close_or_drop(how):
    def use():
        decoder = make_decoder()
        decode(decoder, jpegs(5))
        with pytest.raises(DecodeError):
            decode(decoder, [np.zeros(9, np.uint8), *jpegs(2), jpegs(1)[0][:100]])
        if how == "close":
            decoder.close()
            decoder.close()

    use()
    use()
    before = held_by_process()
    for _ in range(5):
        use()
    assert held_by_process() == before


def test_a_closed_decoder_says_so(decoder):
    decoder.close()
    with pytest.raises(RuntimeError, match="closed"):
        decode(decoder, jpegs(1))


def in_forked_child(work):
    """Run `work` in a forked child and return its exit status; a hang ends it with SIGALRM."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_is_refused_and_does_not_hang():
    decoder = make_decoder()
    encoded = jpegs(3)
    expected = pixels(decode(decoder, encoded))

    def child():
        nonlocal decoder
        with pytest.raises(RuntimeError, match="fork"):
            decode(decoder, encoded)
        decoder.close()
        decoder = None
        gc.collect()
        own = make_decoder()
        assert_equal(pixels(decode(own, encoded)), expected)
        own.close()

    assert in_forked_child(child) == 0
    assert_equal(pixels(decode(decoder, encoded)), expected)  # the parent's goes on
    decoder.close()


ENDS = """
import os, signal, sys
from decode_samples import decode, jpegs, make_decoder

decoder = make_decoder()
if sys.argv[1] == "used":
    batch = decode(decoder, jpegs(3))
child = os.fork()
if not child:
    signal.alarm(20)
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("state", ["made", "used"])
def test_a_forked_child_with_its_parents_decoder_ends_as_any_other(state):
    """DALI ends all pipelines with the interpreter: the parent's, whose threads are not there, hung or crashed it."""
    command = [sys.executable, "-W", "ignore", "-c", ENDS, state]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.strip(), done.returncode) == ("7", 0), done.stderr


def test_importing_does_not_load_dali():
    code = "import sys, slipstream.decode; sys.exit('nvidia.dali' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
