"""Several streams as one: whatever ends one of them ends all, at once."""

import asyncio

import pytest

from treeline.rpc.merged import merged


async def numbers(count: int, end: BaseException | None = None):
    for number in range(count):
        await asyncio.sleep(0)
        yield number
    if end is not None:
        raise end


async def read(*streams):
    async with asyncio.timeout(2):
        return [item async for item in merged(streams)]


def test_items_of_all_streams_come_in_the_order_of_each():
    items = asyncio.run(read(numbers(3), numbers(2)))
    assert [[n for place, n in items if place == stream] for stream in range(2)] == [[0, 1, 2], [0, 1]]


@pytest.mark.parametrize("error", [RuntimeError("broken"), asyncio.CancelledError()])
@pytest.mark.parametrize("others", [0, 2])
def test_a_stream_that_raises_ends_all(error, others):
    with pytest.raises(type(error)):
        asyncio.run(read(numbers(1, error), *(numbers(1000) for _ in range(others))))
