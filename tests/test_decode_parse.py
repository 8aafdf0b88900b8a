"""An image that DALI's parser refuses is in no batch of DALI's: there it can end the process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from decode_samples import by_pillow, encode, jpegs, make_decoder, picture

from slipstream.decode_parse import dali_can_parse

GREY = np.full((8, 8, 3), 128, np.uint8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "JPEG2000"])
def test_whole_images_pass(kind: str) -> None:
    assert dali_can_parse(encode(picture(3), kind))


def test_a_jpeg_passes_once_its_header_is_whole() -> None:
    data = encode(picture(3))
    scan = data.tobytes().index(b"\xff\xda")
    passed = [dali_can_parse(data[:end]) for end in range(3, len(data), 7)]
    assert passed == [end >= scan + 2 for end in range(3, len(data), 7)]


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"\xff\xd8\xff", b"no image at all", b"\x89PNG\r\n\x1a\n", b"BM"])
def test_what_is_no_image_does_not(data: bytes) -> None:
    assert not dali_can_parse(np.frombuffer(data, np.uint8))


def test_what_the_parser_refuses_is_decoded_beside_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder(max_batch=64)
    encoded = jpegs(40)
    whole = encode(picture(9)).tobytes()
    scan = whole.index(b"\xff\xda")
    encoded[5] = np.frombuffer(whole[:scan], np.uint8)
    encoded[7] = np.frombuffer(whole[:20] + b"\0\0" + whole[20:], np.uint8)  # stray bytes, no matter to Pillow
    seen, run = [], decoder._pipeline.run
    monkeypatch.setattr(decoder._pipeline, "run", lambda some, stream: (seen.append(len(some)), run(some, stream))[1])
    batch, reasons = decoder.decode_or_stand_in(encoded, range(len(encoded)), str, stand_in=GREY)
    assert seen == [38] and list(reasons) == [5]
    assert np.array_equal(batch.image(5).permute(1, 2, 0).numpy(), GREY)
    for row in (0, 7, 39):
        assert np.array_equal(batch.image(row).permute(1, 2, 0).numpy(), by_pillow(encoded[row]))
    decoder.close()


SCRIPT = textwrap.dedent(
    """
    import sys
    sys.path[:0] = [{tests!r}]
    from decode_samples import encode, jpegs, make_decoder, picture
    from test_decode_parse import GREY

    encoded = jpegs(64)
    encoded[5] = encode(picture(5), sys.argv[1])
    encoded[5] = encoded[5][: encoded[5].tobytes().index(b"\\xff\\xda") if sys.argv[1] == "JPEG" else 40]
    for _ in range(20):
        decoder = make_decoder(max_batch=64)  # a new one: DALI 2.4 died in its first batch most often
        for _ in range(3):
            _, reasons = decoder.decode_or_stand_in(encoded, range(len(encoded)), str, stand_in=GREY)
            assert list(reasons) == [5], reasons
        decoder.close()
    """
)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
def test_a_cut_off_header_does_not_end_the_process(kind: str, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    done = subprocess.run([sys.executable, script, kind], timeout=200, env=os.environ, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
