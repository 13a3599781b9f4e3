"""A few of the inputs of `python -m tests.chaos.fuzz`; its 100,000 take an hour."""

import asyncio

from tests.chaos.fuzz import fuzz

INPUTS = 250


def test_mutated_messages_to_every_rpc_of_every_port_are_taken_or_refused(tmp_path):
    fuzzer = asyncio.run(fuzz(tmp_path, INPUTS, seed=0))
    assert not fuzzer.failures
    codes = {code for _, _, code in fuzzer.ended}
    assert {"OK", "INVALID_ARGUMENT"} <= codes
    assert {kind for kind, _, _ in fuzzer.ended} == {"door", "verifier", "planner", "drafter"}
