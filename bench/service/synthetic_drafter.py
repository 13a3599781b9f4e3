"""A drafter of a given quality beside a real service, for verifiers that have its address in `drafter.endpoints`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bench.common import Prompt
from bench.load import Answer
from bench.local_engine import encode
from bench.synthetic import Acceptance, SyntheticProposer
from drafter_svc.drafter import DrafterInfo, TreeDrafter
from drafter_svc.server import DrafterServer
from lm.store import load_tokenizer, resolve_model
from treeline.config import Config


@contextmanager
def synthetic_drafter(config: Config, acceptance: Acceptance, answers: Sequence[Answer]) -> Iterator[str]:
    """Run a drafter that knows the target's `answers` to some prompts, on an event loop of its own; yields its
    endpoint. Of several answers to a prompt it knows the longest."""
    tokenizer, longest = load_tokenizer(resolve_model(config.verifier.target.model)), dict[Prompt, list[int]]()
    for answer in sorted(answers, key=lambda answer: len(answer.token_ids)):
        longest[answer.request.prompt] = answer.token_ids
    known = {tuple(encode(tokenizer, prompt)): token_ids for prompt, token_ids in longest.items()}
    proposer = SyntheticProposer(acceptance, known, len(tokenizer))

    def build(config: Config) -> TreeDrafter:
        return TreeDrafter(DrafterInfo("synthetic"), config.drafter.max_sessions, proposer)

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="synthetic-drafter")
    thread.start()
    try:
        server = asyncio.run_coroutine_threadsafe(DrafterServer.start(config, build), loop).result()
        try:
            yield server.endpoint
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(0), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
