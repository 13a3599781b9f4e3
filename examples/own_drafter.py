"""A drafter of one's own, as a service: it goes on as the text mostly went on after the same token.

pip install ./treeline && python examples/own_drafter.py 127.0.0.1:9009

Verifiers use it with the configuration `drafter: {kind: ngram, endpoints: ["127.0.0.1:9009"]}`. What it drafts changes
the speed, never the text.
"""

import asyncio
import struct
import sys
import time
from collections import Counter, defaultdict
from itertools import pairwise

import grpc

from treeline.v1 import drafting_pb2 as pb
from treeline.v1.drafting_pb2_grpc import DraftingServiceServicer, add_DraftingServiceServicer_to_server

ANY_VOCABULARY = 2**31 - 1
"""It proposes only tokens that it was sent, so it serves every target."""


class Bigrams(DraftingServiceServicer):
    async def GetDrafterInfo(self, request, context):
        return pb.GetDrafterInfoResponse(drafter="bigrams", vocab_size=ANY_VOCABULARY)

    async def Draft(self, request_iterator, context):
        """One stream per verifier, one message per step; session ids are the verifier's own."""
        texts: dict[int, list[int]] = {}
        async for request in request_iterator:
            started_s = time.perf_counter()
            for session_id in request.released:
                texts.pop(session_id, None)
            chains, held = [], []
            for sequence in request.sequences:
                text = texts.setdefault(sequence.session_id, [])
                if len(text) < sequence.start:  # The verifier sends the missing tokens in the next step.
                    held.append(pb.HeldTokens(session_id=sequence.session_id, tokens=len(text)))
                    chains.append([])
                    continue
                text[sequence.start :] = sequence.token_ids
                chains.append(continuation(text, min(sequence.max_nodes, sequence.max_depth)))
            draft_s = time.perf_counter() - started_s
            yield pb.DraftResponse(step_id=request.step_id, forest=forest(chains), held=held, draft_s=draft_s)


def continuation(text: list[int], length: int) -> list[tuple[int, float]]:
    """(token, how often it followed) of each next token; ends where nothing ever followed."""
    followers = defaultdict(Counter)
    for token, following in pairwise(text):
        followers[token][following] += 1
    chain, token = [], text[-1]
    while len(chain) < length and followers[token]:
        counts = followers[token]
        token, count = counts.most_common(1)[0]
        chain.append((token, count / counts.total()))
    return chain


def forest(chains: list[list[tuple[int, float]]]) -> pb.Forest:
    """One tree per request, all nodes in one column each. In a chain, node i hangs from node i - 1; -1 is the root."""
    nodes = [(token, parent, prob) for chain in chains for parent, (token, prob) in enumerate(chain, -1)]
    tokens, parents, probs = zip(*nodes, strict=True) if nodes else ((), (), ())
    n = len(nodes)
    return pb.Forest(
        sizes=map(len, chains),
        token_ids=struct.pack(f"<{n}i", *tokens),
        parents=struct.pack(f"<{n}i", *parents),
        draft_probs=struct.pack(f"<{n}f", *probs),
        sources=bytes(n),  # 0: a draft model
    )


async def serve(address: str) -> None:
    server = grpc.aio.server()
    add_DraftingServiceServicer_to_server(Bigrams(), server)
    port = server.add_insecure_port(address)
    await server.start()
    print(f"drafting on {address.rpartition(':')[0]}:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
