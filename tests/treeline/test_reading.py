import asyncio
from contextlib import aclosing

import grpc
import pytest

from treeline.rpc.reading import messages_of


class Call:
    """A call that brings one message, and then nothing until it is cancelled."""

    def __init__(self):
        self.brought, self.ended, self.lost_reads = False, asyncio.Event(), 0

    async def read(self):
        if not self.brought:
            self.brought = True
            return "a"
        try:
            await self.ended.wait()
        except asyncio.CancelledError:
            self.lost_reads += 1
            raise
        return grpc.aio.EOF

    def cancel(self):
        self.ended.set()


@pytest.mark.parametrize("how", ["cancelled", "closed"])
def test_giving_up_ends_the_call_and_cancels_no_read(how):
    async def run():
        call, seen = Call(), []

        async def read_all():
            async with aclosing(messages_of(call)) as messages:
                async for message in messages:
                    seen.append(message)
                    if how == "closed":
                        return

        reading = asyncio.create_task(read_all())
        await asyncio.sleep(0.01)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await asyncio.sleep(0.01)
        return seen, call.ended.is_set(), call.lost_reads

    assert asyncio.run(run()) == (["a"], True, 0)
