"""Reads several streams concurrently."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def merged(streams: Sequence[AsyncIterator[T]], first_alone: bool = False) -> AsyncGenerator[tuple[int, T], None]:
    """The items of all streams as they arrive, each with its stream's index.

    Streams are async generators. If one raises, all end with its exception; closing this closes them all.

    Args:
        first_alone: the others begin when the first one has yielded an item or ended.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as items:  # type: ignore[type-var]
            async for item in items:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue(maxsize=len(streams))
    begun = asyncio.Event()

    async def read(place: int, stream: AsyncIterator[T]) -> None:
        task = asyncio.current_task()
        assert task is not None
        if first_alone and place:
            await begun.wait()
        try:
            async with aclosing(stream) as items:  # type: ignore[type-var]
                async for item in items:
                    begun.set()
                    await queue.put((place, item))
            begun.set()
            await queue.put(None)
        except (Exception, asyncio.CancelledError) as error:
            if task.cancelling():  # Nobody reads the queue any more.
                raise
            await queue.put(error)

    tasks = [asyncio.create_task(read(place, stream)) for place, stream in enumerate(streams)]
    try:
        open_streams = len(tasks)
        while open_streams:
            entry = await queue.get()
            if isinstance(entry, BaseException):
                raise entry
            if entry is None:
                open_streams -= 1
            else:
                yield entry
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
