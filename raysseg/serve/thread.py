"""The one thread that a model runs in, and what is known of its health."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_PROBE_AFTER_S = 20.0  # without a call that came to its result
_STUCK_AFTER_S = 300.0  # in one call


class ModelThread:
    """Runs calls one by one, in the order in which they come.

    Args:
        name: of the model, in messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._executor = ThreadPoolExecutor(1, f"model-{name}")
        self._began: float | None = None
        self._succeeded = float("-inf")

    async def run(
        self, call: Callable[Arguments, Result], *arguments: Arguments.args, **named: Arguments.kwargs
    ) -> Result:
        """The result of a call."""
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, lambda: self._call(call, *arguments, **named)
        )

    def _call(self, call: Callable[Arguments, Result], *arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        self._began = time.monotonic()
        try:
            result = call(*arguments, **named)
        finally:
            self._began = None
        self._succeeded = time.monotonic()
        return result

    async def check(self, probe: Callable[[], Awaitable[object]]) -> None:
        """Runs a probe, unless a call has just come to its result or is at work; raises where that is stuck."""
        began, now = self._began, time.monotonic()
        if began is not None:
            if now - began > _STUCK_AFTER_S:
                raise RuntimeError(f"{self._name}: one call has been running for {now - began:.0f} s")
        elif now - self._succeeded > _PROBE_AFTER_S:
            await probe()
