"""Requests into batches: what waits when the model becomes free goes through it together, by shape and pixels.

Nothing waits for company: while one batch runs, the next one gathers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from raysseg.serve.thread import ModelThread

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False)
class _Waiting(Generic[Item, Result]):
    item: Item
    group: Hashable
    pixels: int
    result: asyncio.Future[Result] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher(Generic[Item, Result]):
    """Gathers what tasks of one event loop submit, and runs it batch by batch.

    Args:
        run: takes a batch to its results, in order.
        thread: that it runs in.
        max_pixels: of a batch; a larger item goes alone.
    """

    def __init__(self, run: Callable[[Sequence[Item]], Sequence[Result]], thread: ModelThread, max_pixels: int) -> None:
        self._run, self._thread, self._max_pixels = run, thread, max_pixels
        self._waiting: list[_Waiting[Item, Result]] = []
        self._task: asyncio.Task[None] | None = None

    async def submit(self, item: Item, group: Hashable, pixels: int) -> Result:
        """The result of one item, which shares a batch with items of its group alone."""
        waiting = _Waiting[Item, Result](item, group, pixels)
        self._waiting.append(waiting)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())
        return await waiting.result

    async def _work(self) -> None:
        while batch := self._next():
            if not await self._settle(batch) and len(batch) > 1:
                for waiting in batch:  # one of them may be to blame: each for itself
                    await self._settle([waiting])

    async def _settle(self, batch: Sequence[_Waiting[Item, Result]]) -> bool:
        """Runs a batch; whether it came to results. The error of a batch of one goes to whoever waits."""
        items = [waiting.item for waiting in batch]
        try:
            results = await self._thread.run(self._run, items)
        except Exception as error:
            if len(batch) == 1 and not batch[0].result.done():
                batch[0].result.set_exception(error)
            return False
        for waiting, result in zip(batch, results, strict=True):
            if not waiting.result.done():
                waiting.result.set_result(result)
        return True

    def _next(self) -> list[_Waiting[Item, Result]]:
        """The oldest request, and those of its group that fit beside it, in order."""
        self._waiting = [waiting for waiting in self._waiting if not waiting.result.done()]  # others have gone away
        batch: list[_Waiting[Item, Result]] = []
        for waiting in self._waiting:
            is_kin = not batch or waiting.group == batch[0].group
            if is_kin and (not batch or sum(one.pixels for one in batch) + waiting.pixels <= self._max_pixels):
                batch.append(waiting)
        self._waiting = [waiting for waiting in self._waiting if waiting not in batch]
        return batch
