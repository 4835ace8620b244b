"""An HTTP proxy on this machine that stands before a storage and breaks requests by a plan with a seed."""

from __future__ import annotations

import http.client
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import IO, Literal
from urllib.parse import parse_qs, urlsplit

Kind = Literal[
    "error",
    "slow_down",
    "reset",
    "lost_answer",
    "hang",
    "short_answer",
    "short_request",
    "wrong_byte",
    "no_such_upload",
]
"""What can go wrong with a request:

error, slow_down: an answer of 500 or 503, the storage has done nothing; reset: the connection breaks, nothing was done;
lost_answer: it is done, and the connection breaks before the answer; hang: nothing is done and nothing is answered;
short_answer: the connection ends in the middle of the answer's body; short_request: in the middle of the request's;
wrong_byte: one of the answer's body, which nothing on the way notices; no_such_upload: S3's answer of 404 to an upload
in parts that it does not know, or that it has finished already.
"""
KINDS: tuple[Kind, ...] = ("error", "slow_down", "reset", "lost_answer", "hang", "short_answer", "short_request")
"""Those that fit any request."""

_HOP = {"connection", "expect", "keep-alive", "transfer-encoding", "content-length"}  # the proxy writes these anew
_REFUSALS: dict[str, tuple[int, str]] = {
    "error": (500, "InternalError"),
    "slow_down": (503, "SlowDown"),
    "no_such_upload": (404, "NoSuchUpload"),
}


@dataclass(frozen=True)
class Plan:
    """Which requests break, and how.

    Attributes:
        kinds: one of them is drawn for each request that breaks.
        rate: the share of the requests that break. The draw depends on the seed, the request and how often it came
            before, and not on how threads interleave.
        seed: of the draw.
        where: a pattern, searched in "METHOD /key?query"; only what matches is counted and can break.
        at: of those, only these break, counted from 0; None: any.
        is_lasting: after the first one every request breaks, whatever it asks for.
    """

    kinds: tuple[Kind, ...]
    rate: float = 1.0
    seed: int = 0
    where: str = ""
    at: Container[int] | None = None
    is_lasting: bool = False


class FaultyProxy:
    """Forwards to one endpoint; see Plan. ``injected`` counts the faults by kind, ``requests`` lists what was asked."""

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream)
        self.injected: Counter[str] = Counter()
        self.requests: list[str] = []
        self._plan = Plan(())
        self._matched = 0
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._released = threading.Event()
        proxy = self

        class Handler(_Handler):
            def handle_one_request(self) -> None:
                self.proxy = proxy
                super().handle_one_request()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=[0.05], daemon=True).start()

    def follow(self, plan: Plan) -> None:
        """From now on this plan counts; the counts begin anew."""
        with self._lock:
            self._plan, self._matched = plan, 0
            self.injected, self._seen, self.requests = Counter(), Counter(), []

    def close(self) -> None:
        """Ends the hanging requests and the server."""
        self._released.set()
        self._server.shutdown()
        self._server.server_close()

    def draw(self, method: str, target: str) -> Kind | None:
        """What happens to a request; the bucket's name and an upload's id are no part of the draw."""
        url = urlsplit(target)
        query = "&".join(f"{key}={value[0]}" for key, value in parse_qs(url.query, True).items() if key != "uploadId")
        request = f"{method} /{url.path.lstrip('/').partition('/')[2]}?{query}".rstrip("?")
        with self._lock:
            self.requests.append(request)
            plan = self._plan
            if plan.is_lasting and self.injected:
                return plan.kinds[0]
            if not plan.kinds or not re.search(plan.where, request):
                return None
            self._matched += 1
            if plan.at is not None and self._matched - 1 not in plan.at:
                return None
            self._seen[request] += 1
            draw = random.Random(f"{plan.seed} {request} {self._seen[request]}")
            return draw.choice(plan.kinds) if draw.random() < plan.rate else None

    def count(self, kind: Kind) -> None:
        with self._lock:
            self.injected[kind] += 1

    def wait(self) -> None:
        self._released.wait(120)


@contextmanager
def faulty_proxy(upstream: str) -> Iterator[FaultyProxy]:
    """A proxy before an endpoint for the length of the block; at first it breaks nothing."""
    proxy = FaultyProxy(upstream)
    try:
        yield proxy
    finally:
        proxy.close()


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client; http.server answers ``Expect: 100-continue`` itself."""

    protocol_version = "HTTP/1.1"
    proxy: FaultyProxy

    def _forward(self) -> None:
        body = _read_body(self.rfile, self.headers)
        kind = self.proxy.draw(self.command, self.path)
        match kind:
            case "error" | "slow_down" | "no_such_upload":
                self.proxy.count(kind)
                status, code = _REFUSALS[kind]
                xml = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>as planned</Message></Error>'.encode()
                self._answer(status, [("Content-Type", "application/xml")], b"" if self.command == "HEAD" else xml)
            case "reset":
                self.proxy.count(kind)
                self._reset()
            case "hang":
                self.proxy.count(kind)
                self.proxy.wait()
                self._reset()
            case "short_request" if body:
                self.proxy.count(kind)
                self._ask(body, len(body) // 2)
                self._reset()
            case "lost_answer":
                self.proxy.count(kind)
                self._ask(body)
                self._reset()
            case _:
                status, headers, content, length = self._ask(body)
                if kind == "short_answer" and content:
                    self.proxy.count(kind)
                    self._answer(status, headers, content[: len(content) // 2], len(content))
                    self.close_connection = True
                    return
                if kind == "wrong_byte" and content:
                    self.proxy.count(kind)
                    content = content[:-1] + bytes([content[-1] ^ 1])
                self._answer(status, headers, content, length)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward  # noqa: N815

    def _ask(self, body: bytes, part: int | None = None) -> tuple[int, list[tuple[str, str]], bytes, int]:
        """The storage's answer to a request or to a part of its body: status, headers, body, the length it names."""
        upstream = http.client.HTTPConnection(self.proxy.upstream.netloc, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP:
                    upstream.putheader(name, value)
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                upstream.putheader("Transfer-Encoding", "chunked")
            elif "Content-Length" in self.headers:
                upstream.putheader("Content-Length", str(len(body)))
            upstream.endheaders()
            upstream.send(body[:part])
            if part is not None:
                return 0, [], b"", 0
            answer = upstream.getresponse()
            content = answer.read()
            length = int(answer.getheader("Content-Length") or len(content))
            return answer.status, [pair for pair in answer.getheaders() if pair[0].lower() not in _HOP], content, length
        finally:
            upstream.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, length: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def _reset(self) -> None:
        """Closes with RST and not with FIN."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        pass


def _read_body(stream: IO[bytes], headers: http.client.HTTPMessage) -> bytes:
    """A request's body as it stands on the wire, with the frames of its chunks."""
    if "chunked" not in headers.get("Transfer-Encoding", ""):
        return stream.read(int(headers.get("Content-Length", 0)))
    lines = [stream.readline()]
    while size := int(lines[-1].partition(b";")[0], 16):
        lines += [stream.read(size + 2), stream.readline()]
    while lines[-1] not in (b"\r\n", b""):  # the trailer
        lines.append(stream.readline())
    return b"".join(lines)
