"""A proxy on loopback that spoils answers on their way from a store, as networks do; counts every request."""

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

# reset: closed by RST before any answer. truncate and break: half of the body, then FIN or RST. short: half of the
# body, and a header that says so. whole: the whole file, whatever range was asked for. stall: half, then nothing until
# `gate` is set. Numbers are answers with that status, whose text repeats the request's headers.
FAULTS = ("delay", "reset", "truncate", "break", "short", "503", "404")


class FaultyProxy:
    """Forwards GET and HEAD to `target`, spoiling some answers.

    Which ones is a pure function of the seed, the file and the number of the request for it: either with the
    probability `rate` any of `faults`, or as `script` says, (method, file name) -> faults of its requests in order,
    after which all is well; "*" as a fault's last letter repeats it for ever.
    """

    def __init__(
        self,
        target: str,
        *,
        script: Mapping[tuple[str, str], Sequence[str]] | None = None,
        faults: Sequence[str] = (),
        rate: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.target = urlsplit(target).netloc
        self.script = dict(script or {})
        self.faults, self.rate, self.seed = faults, rate, seed
        self.requests: list[tuple[str, str, str]] = []
        self.gate, self.stalled = threading.Event(), threading.Event()
        self._counts: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.proxy = self  # pyright: ignore[reportAttributeAccessIssue]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def count(self, method: str, name: str) -> int:
        return sum(request[:2] == (method, name) for request in self.requests)

    def choose(self, method: str, name: str) -> str:
        """Note the request and give its fault, "" for none."""
        with self._lock:
            number = self._counts[method, name] = self._counts.get((method, name), -1) + 1
            fault = self._fault(method, name, number)
            self.requests.append((method, name, fault))
        return fault

    def _fault(self, method: str, name: str, number: int) -> str:
        planned = self.script.get((method, name), ())
        if planned and planned[-1].endswith("*"):
            return planned[min(number, len(planned) - 1)].rstrip("*")
        if number < len(planned):
            return planned[number]
        dice = random.Random(f"{self.seed} {method} {name} {number}")
        if dice.random() >= self.rate:
            return ""
        fault = dice.choice(self.faults)
        # Nobody can tell that a text is half of one which its sender says is whole.
        return "truncate" if fault == "short" and name == "index.json" else fault

    def close(self) -> None:
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> "FaultyProxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        proxy: FaultyProxy = self.server.proxy  # pyright: ignore[reportAttributeAccessIssue]
        fault = proxy.choose(self.command, urlsplit(self.path).path.rpartition("/")[2])
        if fault == "reset":
            self._hang_up(reset=True)
            return
        if fault.isdigit():
            text = f"<Error><Code>{_CODES[fault]}</Code><Message>{self.headers}</Message></Error>"
            self._answer(int(fault), {"Content-Type": "application/xml"}, text.encode())
            return
        if fault == "delay":
            time.sleep(0.1)
        headers = dict(self.headers.items())
        if fault == "whole":
            headers.pop("Range", None)
        upstream = http.client.HTTPConnection(proxy.target, timeout=20)
        upstream.request(self.command, self.path, headers=headers)
        answer = upstream.getresponse()
        body = answer.read()
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in _OWN_HEADERS}
        size = int(answer.headers.get("Content-Length", len(body)))
        upstream.close()
        half = len(body) // 2
        if fault == "short" and half:
            # The store's checksum would give it away; many stores send none.
            kept = {name: value for name, value in kept.items() if "checksum" not in name.lower()}
            self._answer(answer.status, kept, body[:half])
        elif fault in ("truncate", "break") and half:
            self._answer(answer.status, kept, body[:half], size=size)
            self._hang_up(reset=fault == "break")
        elif fault == "stall":
            self._answer(answer.status, kept, body[:half], size=size)
            proxy.stalled.set()
            proxy.gate.wait(30)
            self.wfile.write(body[half:])
        else:
            self._answer(answer.status, kept, body, size=size)

    do_HEAD = do_GET  # noqa: N815

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes, size: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if size is None else size))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()

    def _hang_up(self, *, reset: bool) -> None:
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True
        self.connection.close()

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, ValueError):
            self.close_connection = True  # a client that went away, or a connection that was closed on purpose

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def log_message(self, format: str, *_: object) -> None:
        pass


_CODES = {"503": "SlowDown", "404": "NoSuchKey", "403": "InvalidAccessKeyId", "400": "ExpiredToken"}
_CODES["429"] = "TooManyRequests"
_OWN_HEADERS = ("content-length", "transfer-encoding", "connection")
