"""`python -m tests.chaos.fuzz [--inputs N] [--seed S]`: mutated messages to every RPC of every port.

All four services run in this process with a tiny model, and talk to each other meanwhile. Each input is a valid
message, or a stream of them, spoilt in its fields or its bytes. A service may take it, or refuse it with a code that
says why; it may not fail, and holds nothing when the last call has ended. The last line is "N passed, M failed".
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from tests.treeline.test_borders import PROFILE, RECORD, REQUEST, messages_within, spoil
from tests.verifier_svc.services import Services, drafting_config, running_services, save_tiny_model
from treeline.config import InternalConfig
from treeline.drafting import request_to_proto
from treeline.plan import profile_to_proto
from treeline.step_record import step_to_proto
from treeline.v1 import drafting_pb2, planning_pb2
from treeline.v1 import generation_pb2 as pb

SECRET = "of-the-services"
OPEN_S, TIMEOUT_S = 0.2, 60.0
"""Streams that never end by themselves are left after OPEN_S, or after MAX_READ messages; others must end."""
MAX_READ, AT_ONCE = 3, 32
PROGRESS = 10_000
ALLOWED = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "RESOURCE_EXHAUSTED", "LEFT"}
ENDLESS = {"WatchPlan", "Watch", "ReportSteps", "Draft", "ServerReflectionInfo"}
"""Methods that wait for more."""
STRINGS = (  # each has ended some service somewhere
    "",
    "\0",
    "x" * 5000,
    "é\u202e\ufeff",
    "{",
    "[" * 3000,
    "(a+)+$",
    "../..",
    "{{ 1/0 }}",
    "9" * 400,
    "nan",
    "𝔘" * 40,
)
GENERATE = [
    pb.GenerateRequest(
        request_id="r",
        prompt="one two three",
        sampling=pb.SamplingParams(temperature=0.8, top_p=0.9, top_k=20, seed=4, min_p=0.01, repetition_penalty=1.1),
        stopping=pb.StoppingParams(max_tokens=20, stop=["zq"], stop_token_ids=[7], min_tokens=2),
        output=pb.OutputOptions(logprobs=2, explain=True, explain_tree=True),
        speculation=pb.SpeculationOptions(policy="eagle2:5,4,16", max_nodes=9, max_depth=3),
        target_time_per_output_token_ms=50,
    ),
    pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[1, 2, 3, 4]),
        sampling=pb.SamplingParams(logit_bias={5: 2.0}, presence_penalty=0.5, frequency_penalty=0.5, seed=1),
        stopping=pb.StoppingParams(max_tokens=20, ignore_eos=True),
        resume=pb.Resume(token_ids=[5, 6, 7], elapsed_s=0.5, time_to_first_token_s=0.1),
        priority=2,
    ),
    pb.GenerateRequest(
        chat=pb.Chat(
            messages=[pb.ChatMessage(role="user", content="hi", fields='{"name": "x"}')],
            template_arguments='{"tools": [{"type": "function"}]}',
            add_generation_prompt=True,
        ),
        stopping=pb.StoppingParams(max_tokens=20),
        grammar=pb.Grammar(json_schema='{"type": "object", "properties": {"a": {"type": "integer"}}}'),
    ),
    pb.GenerateRequest(prompt="x", grammar=pb.Grammar(choice=pb.Choice(texts=["yes", "no"]))),
]
GENERATION: dict[str, list[list[Message]]] = {
    "Generate": [[request] for request in GENERATE],
    "Abort": [[pb.AbortRequest(request_ids=["r", "s"])]],
    "GetLoad": [[pb.GetLoadRequest()]],
    "GetPlan": [[pb.GetPlanRequest()]],
    "GetModelInfo": [[pb.GetModelInfoRequest()]],
    "Tokenize": [[pb.TokenizeRequest(prompt="one")], [pb.TokenizeRequest(chat=GENERATE[2].chat)]],
    "Detokenize": [[pb.DetokenizeRequest(token_ids=[1, 2, 3])]],
}
HELLO = planning_pb2.ReportStepsRequest(
    verifier_id="v", metrics_url="http://127.0.0.1:1/metrics", profile=profile_to_proto(PROFILE)
)
STEPS = planning_pb2.ReportStepsRequest(verifier_id="v", steps=[step_to_proto(RECORD)] * 2)
SERVICES: dict[str, dict[str, list[list[Message]]]] = {
    "treeline.v1.GenerationService": GENERATION,
    "treeline.v1.PlanningService": {
        "WatchPlan": [[planning_pb2.WatchPlanRequest(verifier_id="v")]],
        "ReportSteps": [[HELLO, STEPS, STEPS]],
    },
    "treeline.v1.DraftingService": {
        "Draft": [[request_to_proto(REQUEST)] * 2],
        "GetDrafterInfo": [[drafting_pb2.GetDrafterInfoRequest()]],
    },
    "grpc.health.v1.Health": {
        "Check": [[health_pb2.HealthCheckRequest()]],
        "Watch": [[health_pb2.HealthCheckRequest()]],
    },
    "grpc.reflection.v1alpha.ServerReflection": {
        "ServerReflectionInfo": [[reflection_pb2.ServerReflectionRequest(list_services="")]]
    },
}
OWN = {"door": "GenerationService", "verifier": "GenerationService", "planner": "Planning", "drafter": "Drafting"}


def mutated(message: Message, rng: random.Random) -> bytes:
    copy = type(message)()
    copy.CopyFrom(message)
    for _ in range(rng.randint(0, 3) if copy.DESCRIPTOR.fields else 0):
        (spoil_text if rng.random() < 0.3 else spoil)(copy, rng)
    data = bytearray(copy.SerializeToString())
    while data and rng.random() < 0.3:
        at = rng.randrange(len(data))
        data[at : at + rng.choice((0, 1, 1, 4))] = rng.randbytes(rng.choice((0, 1, 1, 4)))
    return bytes(data)


def spoil_text(message: Message, rng: random.Random) -> None:
    fields = [
        (within, field)
        for within in messages_within(message)
        for field in within.DESCRIPTOR.fields
        if field.type == field.TYPE_STRING
    ]
    if fields:
        within, field = rng.choice(fields)
        if field.is_repeated:
            getattr(within, field.name).append(rng.choice(STRINGS))
        else:
            setattr(within, field.name, rng.choice(STRINGS))


async def code_of(channel: grpc.aio.Channel, path: str, messages: Sequence[bytes], timeout_s: float) -> str:
    """How a call ends; "LEFT" if it was left. Over the wire a unary call is a stream of one message."""

    async def sent():
        for message in messages:
            yield message

    metadata = (("authorization", f"Bearer {SECRET}"),)
    call = channel.stream_stream(path)(sent(), timeout=timeout_s, metadata=metadata)
    try:
        for _ in range(MAX_READ):
            if await call.read() is grpc.aio.EOF:
                return (await call.code()).name
    except grpc.aio.AioRpcError as error:
        # What grpc.aio says when the call had ended before the last message was written: the server's code is lost.
        return "LEFT" if error.details() == "Internal error from Core" else error.code().name
    except asyncio.CancelledError:  # The same, or this task is to end.
        if not call.cancelled():
            raise
        return "LEFT"
    finally:
        call.cancel()
    return "LEFT"


class Fuzzer:
    """Sends inputs to `services`, drawn from `seed`, and counts how they ended, by port and method."""

    def __init__(self, services: Services, seed: int) -> None:
        endpoints = {kind: getattr(services, kind).endpoint for kind in OWN}
        self._channels = {kind: grpc.aio.insecure_channel(endpoint) for kind, endpoint in endpoints.items()}
        self._rng = random.Random(seed)
        self.ended: Counter[tuple[str, str, str]] = Counter()
        self.failures: list[str] = []
        self._methods = [
            (kind, service, method)
            for kind, own in OWN.items()
            for service, methods in SERVICES.items()
            if own in service or service.startswith("grpc.")
            for method in methods
            for _ in range(4 if method in ("Generate", "Draft", "ReportSteps") else 1)
        ]

    async def run(self, inputs: int) -> None:
        for begin in range(0, inputs, AT_ONCE):
            if begin and begin % PROGRESS < AT_ONCE:
                print(f"{begin} inputs, {len(self.failures)} failures so far", flush=True)
            await asyncio.gather(*(self._one() for _ in range(min(AT_ONCE, inputs - begin))))

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()

    async def _one(self) -> None:
        rng = self._rng
        kind, service, method = rng.choice(self._methods)
        messages = [mutated(message, rng) for message in rng.choice(SERVICES[service][method])]
        timeout_s = OPEN_S if method in ENDLESS else TIMEOUT_S
        code = await code_of(self._channels[kind], f"/{service}/{method}", messages, timeout_s)
        self.ended[kind, method, code] += 1
        if not (code in ALLOWED or (code == "DEADLINE_EXCEEDED" and method in ENDLESS)):
            self.failures.append(f"{kind} {method} {code}: {[message[:2000] for message in messages]}")


async def leftovers(services: Services) -> str:
    """What idle services still hold, once they have had a few seconds; empty if nothing."""
    metadata, held = (("authorization", f"Bearer {SECRET}"),), ""
    for _ in range(100):
        async with grpc.aio.insecure_channel(services.verifier.endpoint) as channel:
            ask = channel.unary_unary("/treeline.v1.GenerationService/GetLoad", None, pb.GetLoadResponse.FromString)
            load = await ask(b"", metadata=metadata)
        async with grpc.aio.insecure_channel(services.drafter.endpoint) as channel:
            ask = channel.unary_unary(
                "/treeline.v1.DraftingService/GetDrafterInfo", None, drafting_pb2.GetDrafterInfoResponse.FromString
            )
            info = await ask(b"", metadata=metadata)
        held = (load.num_requests_running, load.num_requests_waiting, load.kv_blocks_used, info.sessions)
        if not any(held) and info.streams == 1 and load.drafter_ready:
            return ""
        await asyncio.sleep(0.1)
    return f"running, waiting, blocks, sessions: {held}; streams {info.streams}, drafter ready {load.drafter_ready}"


async def fuzz(folder: Path, inputs: int, seed: int) -> Fuzzer:
    """Failures are in the result: wrong codes, something left over, another text than before."""
    (folder / "secret").write_text(SECRET)
    config = drafting_config(save_tiny_model(folder / "target"))
    config = config.model_copy(update={"internal": InternalConfig(token_file=folder / "secret")})
    async with running_services(config) as services:
        await services.door.until_serving()
        fuzzer = Fuzzer(services, seed)
        before = [response.chunk.text async for response in services.stub.Generate(GENERATE[0])]
        await fuzzer.run(inputs)
        await fuzzer.close()
        if problem := await leftovers(services):
            fuzzer.failures.append(problem)
        after = [response.chunk.text async for response in services.stub.Generate(GENERATE[0])]
        if "".join(after) != "".join(before):
            fuzzer.failures.append(f"{after} where {before} was written before")
        for server in (services.planner, services.verifier, services.door):
            await server.check()
    return fuzzer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="treeline-fuzz-") as folder:
        fuzzer = asyncio.run(fuzz(Path(folder), options.inputs, options.seed))
    for (kind, method, code), count in sorted(fuzzer.ended.items()):
        print(f"{kind:9} {method:22} {code:20} {count}")
    for failure in fuzzer.failures[:20]:
        print(failure)
    print(f"{fuzzer.ended.total() - len(fuzzer.failures)} passed, {len(fuzzer.failures)} failed")
    return bool(fuzzer.failures)


if __name__ == "__main__":
    sys.exit(main())
