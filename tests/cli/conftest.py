import asyncio
import threading

import pytest

from tests.verifier_svc.fake_engine import FakeEngine, fake_verifier


@pytest.fixture
def service():
    """An engine that can be changed, and the "host:port" of a real server over it, in a thread of its own."""
    engine, ready, loop, endpoint = FakeEngine(), threading.Event(), asyncio.new_event_loop(), []

    async def run(stop: asyncio.Event):
        async with fake_verifier(engine) as verifier:
            endpoint.append(verifier.endpoint)
            ready.set()
            await stop.wait()

    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(run(stop)))
    thread.start()
    assert ready.wait(5)
    yield engine, endpoint[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(5)
    loop.close()
