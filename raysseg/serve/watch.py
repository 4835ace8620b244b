"""Around every request: the token, the time it may take, the headers, the counts, and a plain 500 for bugs."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import re
import time
from collections.abc import Collection, Mapping
from http import HTTPStatus

import msgspec
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raysseg.hosting import Http
from raysseg.schema import InputError
from raysseg.serve.refusal import Refusal

logger = logging.getLogger(__name__)

_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_OPEN = ("/playground/", "/healthz", "/docs", "/redoc", "/openapi.json")  # the page asks for the token itself
_CLIENT_LEFT = 499  # nginx' number
_FOREIGN = ("/docs", "/redoc")  # whose pages load their parts from elsewhere
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Counts:
    """Requests and their seconds, by model, action and status.

    Args:
        names: of the models; what asks for another one is counted as `unknown`.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names, self._registry = frozenset(names), CollectorRegistry()
        labels = ("model", "action")
        self._requests = Counter("raysseg_requests", "Answered.", (*labels, "status"), registry=self._registry)
        self._seconds = Histogram(
            "raysseg_request_seconds", "From request to answer.", labels, registry=self._registry, buckets=_SECONDS
        )

    def add(self, path: str, status: int, seconds: float) -> None:
        """Counts one that has been answered, if it went to a model."""
        if match := re.fullmatch(r"/v1/models/([^/]+)/(segment|images|prompt|everything)", path):
            name = match[1] if match[1] in self._names else "unknown"
            self._requests.labels(name, match[2], status).inc()
            self._seconds.labels(name, match[2]).observe(seconds)

    def as_text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)


class Watch:
    """ASGI middleware.

    Args:
        app: what answers.
        counts: where requests are counted.
        token: that requests have to bear, but for the page and the description of the interface; None: none.
        timeout_s: for which a request is worked on.
    """

    def __init__(self, app: ASGIApp, counts: Counts, token: str | None, timeout_s: float) -> None:
        self._app, self._counts, self._timeout_s = app, counts, timeout_s
        self._expected = f"Bearer {token}".encode() if token is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status = time.perf_counter(), 0
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # of the application, wherever that is mounted

        async def pass_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not path.startswith(_FOREIGN):
                    MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        if not path.startswith(_OPEN) and path != "/" and not self._is_allowed(scope):
            refusal = Refusal(401, "the bearer token is missing or wrong; send `Authorization: Bearer TOKEN`")
            await to_problem(refusal)(scope, receive, pass_on)
        else:
            limit = asyncio.timeout(self._timeout_s)
            try:
                async with limit:
                    await self._app(scope, receive, pass_on)
            except ClientDisconnect:
                status = status or _CLIENT_LEFT
            except Exception:
                if not limit.expired():
                    logger.exception("%s %s failed", scope["method"], path)
                if status == 0:
                    await self._explain(limit)(scope, receive, pass_on)
        self._counts.add(path, status, time.perf_counter() - began)
        return None

    def _explain(self, limit: asyncio.Timeout) -> Response:
        if limit.expired():
            seconds = f"{self._timeout_s:g} s"
            return _problem(504, f"given up after {seconds}; ask for less, or have http.timeout of the server raised")
        return _problem(500, "this is a bug of the server; its log says more")

    def _is_allowed(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return self._expected is None or hmac.compare_digest(given, self._expected)


def to_problem(error: InputError) -> Response:
    """What can be mended, as RFC 9457 has it; an image that turns out not to be one is 422."""
    refusal = error if isinstance(error, Refusal) else Refusal(422, str(error))
    headers = {"Retry-After": str(refusal.retry_after_s)} if refusal.retry_after_s is not None else {}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return _problem(refusal.status, str(refusal), headers)


async def answer_problem(_: Request, error: Exception) -> Response:
    """`to_problem`, as FastAPI's handlers of exceptions are called; what Starlette refuses likewise."""
    if isinstance(error, HTTPException):
        return _problem(error.status_code, error.detail, error.headers)
    assert isinstance(error, InputError)
    return to_problem(error)


def _problem(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    body = msgspec.json.encode({"title": HTTPStatus(status).phrase, "status": status, "detail": detail})
    return Response(body, status, headers, media_type="application/problem+json")


def read_token(http: Http) -> str | None:
    """The token that is asked for.

    Raises:
        InputError: the environment lacks it.
    """
    if http.token_variable is None:
        return None
    token = os.environ.get(http.token_variable, "").strip()  # files of secrets often end in a new line
    if not token:
        raise InputError(
            f"http.token_variable: the environment variable {http.token_variable} is not set where requests come in; "
            "set it there, or leave this key out"
        )
    if not (token.isascii() and token.isprintable()):
        raise InputError(
            f"http.token_variable: what {http.token_variable} holds can't be a header; allowed: printable ASCII"
        )
    return token
