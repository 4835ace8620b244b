"""Requests to a server, from a process of their own, which holds neither torch nor Ray.

Closed loop: each of a number of clients sends its next request when it has the answer to the last one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Self
from urllib.parse import urlsplit

import aiohttp

_RETRY_PAUSE_S = 1.0
_SHUNNED_S = 10.0  # for which no request begins at a node that did not answer
_MAX_ODD = 20  # wrong answers that are kept


class Ask(NamedTuple):
    """A request, whose body lies in a file."""

    url: str
    body: str
    content_type: str


@dataclass(frozen=True)
class Load:
    """What the clients send.

    Attributes:
        asks: in this order, and again from the first one on.
        concurrency: clients.
        seconds: after which no request begins; None: `count` decides.
        count: of requests; None: `seconds` decides.
        retries: of a request that came to no answer 200.
        expected: by the `version` in an answer, the SHA-256 that it has to have, for each of `asks`.
        timeout_s: after which a try is given up.
        origins: of nodes that take requests in turns, such as http://node:8000, in place of those in the asks' URLs; as
            a balancer does, none goes for a while where no answer came.
    """

    asks: list[Ask]
    concurrency: int
    seconds: float | None = None
    count: int | None = None
    retries: int = 0
    expected: dict[str, list[str]] | None = None
    timeout_s: float = 300.0
    origins: tuple[str, ...] = ()


class Attempt(NamedTuple):
    """One try of one request.

    Attributes:
        request: its number; tries of one request share it.
        ask: its place in `asks`.
        at: when it was sent, as time.time() tells it.
        seconds: until its answer was there, or its failure.
        status: of HTTP; 0: no answer came.
        error: why none came.
        size: bytes of the answer.
        version: that the answer names.
        is_right: whether it is what was expected; true where nothing was.
    """

    request: int
    ask: int
    at: float
    seconds: float
    status: int
    error: str
    size: int
    version: str
    is_right: bool


class Outcome(NamedTuple):
    """What a load came to: all tries, in the order of their ends; and the first wrong answers."""

    attempts: list[Attempt]
    odd: list[tuple[int, str]]

    @property
    def answered(self) -> list[Attempt]:
        """Those that got their 200."""
        return [attempt for attempt in self.attempts if attempt.status == 200]

    @property
    def num_errors(self) -> int:
        """Tries that got another status, or no answer."""
        return len(self.attempts) - len(self.answered)

    @property
    def num_wrong(self) -> int:
        """Answers that are not what was expected."""
        return sum(not attempt.is_right for attempt in self.attempts)

    @property
    def rate(self) -> float:
        """Answers a second, from the first request to the last answer."""
        ends = [attempt.at + attempt.seconds for attempt in self.attempts]
        return len(self.answered) / (max(ends) - min(attempt.at for attempt in self.attempts))

    def latency_ms(self, share: float) -> float:
        """The latency below which this share of the answers stayed."""
        ordered = sorted(attempt.seconds for attempt in self.answered)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def write_form(path: Path, image: bytes, field: str = "image", prompt: str | None = None) -> tuple[str, str]:
    """Writes a multipart body to a file; returns its path and content type."""
    boundary = hashlib.sha256(image).hexdigest()[:32]
    parts = [_part(boundary, f'name="{field}"; filename="image"\r\nContent-Type: application/octet-stream', image)]
    if prompt is not None:
        parts.append(_part(boundary, 'name="prompt"', prompt.encode()))
    path.write_bytes(b"".join([*parts, f"--{boundary}--\r\n".encode()]))
    return str(path), f"multipart/form-data; boundary={boundary}"


def _part(boundary: str, head: str, content: bytes) -> bytes:
    return f"--{boundary}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + content + b"\r\n"


class Client:
    """A process that sends a load; it begins at once."""

    def __init__(self, load: Load) -> None:
        command = [sys.executable, "-m", "benchmarks.serve_load"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        with self._process.stdin as pipe:
            pipe.write(json.dumps(asdict(load)))

    def finish(self) -> Outcome:
        """Waits for its end."""
        assert self._process.stdout is not None
        with self._process.stdout as pipe:
            output = pipe.read()
        if self._process.wait():
            raise RuntimeError(f"the client came to {self._process.returncode}")
        content = json.loads(output)
        return Outcome([Attempt(*values) for values in content["attempts"]], [tuple(one) for one in content["odd"]])

    def stop(self) -> Outcome:
        """Lets no more requests begin, and waits for the end."""
        self._process.terminate()
        return self.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # where it has not come to its end
        self._process.wait()


def send(load: Load) -> Outcome:
    """Sends a load, to its end."""
    with Client(load) as client:
        return client.finish()


# --- the process --------------------------------------------------------------------------------------------------


class _Sender:
    def __init__(self, load: Load) -> None:
        self._load = load
        self._bodies = [Path(ask.body).read_bytes() for ask in load.asks]
        self._deadline = time.monotonic() + load.seconds if load.seconds is not None else float("inf")
        self._num_begun = 0
        self._shunned: dict[str, float] = {}
        self.attempts: list[Attempt] = []
        self.odd: list[tuple[int, str]] = []

    def stop(self) -> None:
        self._deadline = 0.0

    async def run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=self._load.timeout_s)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
            await asyncio.gather(*(self._work(session) for _ in range(self._load.concurrency)))

    async def _work(self, session: aiohttp.ClientSession) -> None:
        while time.monotonic() < self._deadline and self._num_begun != self._load.count:
            number, self._num_begun = self._num_begun, self._num_begun + 1
            for i in range(1 + self._load.retries):
                if i:
                    await asyncio.sleep(_RETRY_PAUSE_S)
                self.attempts.append(await self._try(session, number, i))
                if self.attempts[-1].status == 200:
                    break

    def _origin(self, turn: int) -> str:
        now = time.monotonic()
        likely = [one for one in self._load.origins if self._shunned.get(one, 0.0) < now] or self._load.origins
        return likely[turn % len(likely)] if likely else ""

    async def _try(self, session: aiohttp.ClientSession, number: int, tries: int) -> Attempt:
        place = number % len(self._load.asks)
        ask = self._load.asks[place]
        origin = self._origin(number + tries)
        url = origin + urlsplit(ask.url).path if origin else ask.url
        at, began, status, body, error = time.time(), time.perf_counter(), 0, b"", ""
        try:
            headers = {"Content-Type": ask.content_type}
            async with session.post(url, data=self._bodies[place], headers=headers) as response:
                body, status = await response.read(), response.status
        except (aiohttp.ClientError, TimeoutError, OSError) as failure:
            error = f"{type(failure).__name__}: {failure}"
            self._shunned[origin] = time.monotonic() + _SHUNNED_S
        seconds = time.perf_counter() - began
        if status not in (0, 200):
            error = body[:300].decode(errors="replace")
        version, is_right = self._judge(place, status, body)
        return Attempt(number, place, at, seconds, status, error, len(body), version, is_right)

    def _judge(self, place: int, status: int, body: bytes) -> tuple[str, bool]:
        if status != 200 or self._load.expected is None:
            return "", True
        version = json.loads(body)["version"]
        is_right = (
            version in self._load.expected and self._load.expected[version][place] == hashlib.sha256(body).hexdigest()
        )
        if not is_right and len(self.odd) < _MAX_ODD:
            self.odd.append((place, body.decode()))
        return version, is_right


async def _main(given: Mapping[str, object]) -> None:
    asks: Sequence[Sequence[str]] = given["asks"]  # type: ignore[assignment]
    sender = _Sender(Load(**{**given, "asks": [Ask(*ask) for ask in asks]}))  # type: ignore[arg-type]
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, sender.stop)
    await sender.run()
    print(json.dumps({"attempts": sender.attempts, "odd": sender.odd}))


if __name__ == "__main__":
    asyncio.run(_main(json.load(sys.stdin)))
