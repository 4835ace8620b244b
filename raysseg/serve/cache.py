"""What is made once and asked for often: bounded by bytes, and made by one caller while the others wait."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Cache(Generic[Value]):
    """Values by key, of one event loop; the least recently used go first.

    Args:
        size: of a value, in bytes.
        max_bytes: of all; a larger value is handed out, and not kept.

    Attributes:
        num_made: values that were made.
    """

    def __init__(self, size: Callable[[Value], int], max_bytes: int) -> None:
        self._size, self._max_bytes, self._bytes = size, max_bytes, 0
        self._values: OrderedDict[str, Value] = OrderedDict()
        self._pending: dict[str, asyncio.Task[Value]] = {}
        self.num_made = 0

    def find(self, key: str) -> Value | None:
        """The value, if it is still there."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def drop(self, key: str) -> None:
        """Forgets a value."""
        if key in self._values:
            self._bytes -= self._size(self._values.pop(key))

    async def get(self, key: str, make: Callable[[], Awaitable[Value]]) -> Value:
        """The value; made if it is not there, once for all who ask meanwhile, whoever of them goes away."""
        if (value := self.find(key)) is not None:
            return value
        if key not in self._pending:
            self._pending[key] = asyncio.create_task(self._make(key, make))
        return await asyncio.shield(self._pending[key])

    async def _make(self, key: str, make: Callable[[], Awaitable[Value]]) -> Value:
        try:
            value = await make()
        finally:
            del self._pending[key]
        self.num_made += 1
        if (size := self._size(value)) <= self._max_bytes:
            self._values[key] = value
            self._bytes += size
            while self._bytes > self._max_bytes:
                _, oldest = self._values.popitem(last=False)
                self._bytes -= self._size(oldest)
        return value
