"""How long the rest of a sweep will take."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from bench.sweep import Block, BlockRun, Settings


def seconds_left(done: Sequence[BlockRun], left: Sequence[Block], settings: Settings) -> float:
    """Of these blocks, from at least one that has been run.

    A block is taken to last as those of its policy did at its load, or as all did at its load. Of a load that has not
    been seen nothing is known but that its prompts take their time, in proportion to the streams, and that it is then
    measured for a block's seconds: rather too long than too short.
    """
    seen: dict[tuple[object, ...], list[float]] = {}
    for run in done:
        place = (run.block.loop, run.block.load)
        seen.setdefault(place, []).append(run.seconds)
        seen.setdefault((*place, run.block.policy), []).append(run.seconds)
    per_stream_s = mean(run.prompts_s / run.block.load for run in done if run.block.loop == "closed")

    def expected_s(block: Block) -> float:
        place = (block.loop, block.load)
        known = seen.get((*place, block.policy)) or seen.get(place)
        if known:
            return mean(known)
        streams = block.load if block.loop == "closed" else 1
        return settings.block_s + per_stream_s * streams

    return sum(map(expected_s, left))
