"""What another process sends may be anything: it is taken as it is meant, or refused with a ValueError."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from drafter_svc.drafter import DrafterInfo
from drafter_svc.server import check_request
from planner.policies import parse_policy
from planner.service.loop import PlanMaker, VerifierState
from tests.planner.builders import Drafted, linear_cost, outcomes, plan_with, prices_of, prune, random_tree, record
from tests.trees import tree_of
from treeline.config import Config
from treeline.drafting import (
    DraftReply,
    DraftRequest,
    DraftSequence,
    DraftStats,
    reply_from_proto,
    reply_to_proto,
    request_from_proto,
    request_to_proto,
)
from treeline.forest import Forest
from treeline.plan import (
    PaperFit,
    Plan,
    VerifierProfile,
    plan_from_proto,
    plan_to_proto,
    profile_from_proto,
    profile_to_proto,
)
from treeline.sampling import SamplingParams
from treeline.step_record import StepRecord, step_from_proto, step_to_proto
from treeline.v1 import drafting_pb2

CONFIG = Config()
PLAN = plan_with(replace(linear_cost(), paper=PaperFit(0.1, 0.2, 0.3, 0.4)), price=20.0)
RECORD = record(
    tokens=4,
    drafted_nodes=3,
    verified_nodes=3,
    draft_s=0.01,
    drafter_s=0.008,
    draft_layer_nodes=(1, 2),
    predicted_verify_s=0.03,
    goodput=40.0,
    outcomes=outcomes(np.asarray([0.25, 0.5, 0.9]), np.asarray([True, False, True])),
)
PROFILE = VerifierProfile(linear_cost().verify, 0.004, 0.0002)
REQUEST = DraftRequest(
    7,
    PLAN,
    [
        DraftSequence(3, 0, [5, 6, 7], SamplingParams(), "smart", 8, 4),
        DraftSequence(4, 2, [9], SamplingParams(), "smart", 8, 4),
    ],
    [1],
)
REPLY = DraftReply(
    7,
    Forest.join([tree_of([1, 2, 3], [-1, 0, 0], [0.9, 0.5, 0.2]), tree_of([], [])]),
    {4: 1},
    DraftStats(0.01, (1, 2), 3, (0.002, 0.003)),
)
KILLERS = (math.nan, math.inf, -math.inf, -1.0, -5, 0, 1, 3, 1e-300, 1e9, 1e300, 2**31, 2**32 - 1, 2**63)
INPUTS = 600
"""Of each kind of message: a few seconds of CPU for all of them."""


def use_plan(plan: Plan) -> None:
    rng = np.random.default_rng(0)
    for spec in ("smart", "smart-paper", "chain:4"):
        policy = parse_policy(spec)
        policy.layers(plan, 2, True)
        prune([Drafted(random_tree(rng, 8), policy, 1.0, sampled) for sampled in (False, True)], plan, 0.01, 64, 1)
    prices_of(plan, 1).surplus([0.1])
    assert 0 <= plan.max_nodes <= 256
    assert 64 / 40 < 64 * plan.cost.prompt_ratio < 64 * 40


def use_state(state: VerifierState) -> None:
    use_plan(plan_from_proto(plan_to_proto(PlanMaker(CONFIG.limits, CONFIG.planner).make(state))))


def use_step(step: StepRecord) -> None:
    state = VerifierState(PROFILE, "")
    for _ in range(3):
        state.observe(RECORD)
        state.observe(step)
    use_state(state)


def use_profile(profile: VerifierProfile) -> None:
    state = VerifierState(profile, "")
    state.observe(RECORD)
    use_state(state)


def request_checked(message: drafting_pb2.DraftRequest) -> DraftRequest:
    request = request_from_proto(message)
    check_request(request, CONFIG.limits, DrafterInfo("none", vocab_size=100))
    return request


def use_request(request: DraftRequest) -> None:
    use_plan(request.plan)
    assert all(0 <= token < 100 for sequence in request.sequences for token in sequence.token_ids)


def reply_checked(message: drafting_pb2.DraftResponse) -> DraftReply:
    return reply_from_proto(message, REQUEST, vocab_size=100)


def use_reply(reply: DraftReply) -> None:
    assert reply.forest.path_products(reply.forest.draft_probs).shape == reply.forest.depths.shape
    assert (reply.forest.sources < 3).all()
    step_from_proto(step_to_proto(replace(RECORD, drafter_s=reply.stats.draft_s)))


KINDS: dict[str, tuple[Message, Callable, Callable]] = {
    "plan": (plan_to_proto(PLAN), plan_from_proto, use_plan),
    "step": (step_to_proto(RECORD), step_from_proto, use_step),
    "profile": (profile_to_proto(PROFILE), profile_from_proto, use_profile),
    "draft request": (request_to_proto(REQUEST), request_checked, use_request),
    "draft reply": (reply_to_proto(REPLY), reply_checked, use_reply),
}
"""A message that makes sense, the border it crosses, and what is done with it behind that."""


def is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def messages_within(message: Message) -> Iterator[Message]:
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None and not is_map(field):
            for one in value if field.is_repeated else (value,):
                yield from messages_within(one)


def spoil(message: Message, rng: random.Random) -> None:
    """Change one field, somewhere: a killer for a number, other bytes, another length, or nothing at all."""
    within = rng.choice(list(messages_within(message)))
    field = rng.choice(list(within.DESCRIPTOR.fields))
    values = getattr(within, field.name)
    kind = rng.randrange(4)
    try:
        if kind == 0:
            within.ClearField(field.name)
        elif is_map(field):
            values[rng.choice(KILLERS)] = rng.choice(KILLERS)
        elif field.is_repeated and values:
            if field.message_type is not None or kind == 1:
                values.extend([values[0]] * rng.choice((1, 3, 2000)))
            elif kind == 2:
                values.pop(rng.randrange(len(values)))
            else:
                values[rng.randrange(len(values))] = rng.choice(KILLERS)
        elif field.type == field.TYPE_BYTES:
            spoilt = bytearray(values or b"\0")
            spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
            setattr(within, field.name, bytes(spoilt[: rng.choice((None, -1))]))
        elif field.message_type is None and not field.is_repeated:
            setattr(within, field.name, rng.choice(KILLERS))
    except (TypeError, ValueError, OverflowError):  # such a number does not fit the field: it cannot be sent
        return


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_any_message_is_refused_with_value_error_or_safe_to_use(kind):
    original, check, use = KINDS[kind]
    rng, refused = random.Random(kind), 0
    for _ in range(INPUTS):
        message = type(original)()
        message.CopyFrom(original)
        for _ in range(rng.randint(1, 3)):
            spoil(message, rng)
        if rng.random() < 0.2:
            data = bytearray(message.SerializeToString())
            data[rng.randrange(len(data))] = rng.randrange(256)
            try:
                message = type(original).FromString(bytes(data))
            except DecodeError:
                continue
        try:
            checked = check(message)
        except ValueError:
            refused += 1
            continue
        use(checked)
    assert 0.1 * INPUTS < refused < 0.9 * INPUTS, "some are refused, some are not"


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        ("cost", "prompt_ratio", 1e9),
        ("cost", "prompt_ratio", -5.0),
        ("cost", "prompt_ratio", math.nan),
        ("cost", "verify_scale", math.inf),
        ("", "price", math.nan),
        ("", "max_nodes", 2**32 - 1),
        ("", "lifetime_s", math.nan),
    ],
)
def test_a_plan_with_a_number_out_of_range_is_refused_and_its_field_named(where, name, value):
    message = plan_to_proto(PLAN)
    setattr(getattr(message, where) if where else message, name, value)
    with pytest.raises(ValueError, match=name):
        plan_from_proto(message)


def test_curves_that_would_end_an_engine_are_refused():
    for name, value in (("seconds", 0.0), ("seconds", math.nan), ("tokens", 0)):
        message = plan_to_proto(PLAN)
        getattr(message.cost.verify[0], name)[5] = value
        with pytest.raises(ValueError, match=name):
            plan_from_proto(message)
    message = plan_to_proto(PLAN)
    message.cost.verify[0].seconds[5] = 9.0
    with pytest.raises(ValueError, match="falls"):
        plan_from_proto(message)
    message = plan_to_proto(PLAN)
    message.calibration.acceptance[500] = math.nan
    with pytest.raises(ValueError, match="acceptance"):
        plan_from_proto(message)


def test_the_built_in_plan_crosses_the_border():
    from planner.fast.builtin_plan import builtin_plan

    plan = builtin_plan(CONFIG.limits)
    assert plan_from_proto(plan_to_proto(plan)).lifetime_s == math.inf


@pytest.mark.parametrize(
    "field", ["temperature", "repetition_penalty", "presence_penalty", "frequency_penalty", "weight", "logit_bias"]
)
@pytest.mark.parametrize("value", [1e300, -1e300, 1e39, 1e-300])
def test_what_float32_cannot_hold_is_no_draft_request(field, value):
    message = request_to_proto(REQUEST)
    sequence = message.sequences[0]
    if field == "logit_bias":
        sequence.sampling.logit_bias[3] = value
    else:
        setattr(sequence if field == "weight" else sequence.sampling, field, value)
    if abs(value) < 1 and field in ("presence_penalty", "frequency_penalty", "logit_bias"):
        request_from_proto(message)  # added, not multiplied by: as good as 0
        return
    with pytest.raises(ValueError, match="out of range"):
        request_from_proto(message)
