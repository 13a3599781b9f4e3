import math
from dataclasses import replace

import numpy as np
import pytest

from planner.fast.builtin_plan import builtin_plan
from tests.trees import tree_of
from treeline.config import MAX_TREE_DEPTH, LimitsConfig
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
from treeline.sampling import SamplingParams

PLAN = builtin_plan(LimitsConfig())
SAMPLING = SamplingParams(0.75, 0.5, 40, 1.25, 2**64 - 1, 0.5, -0.25, 0.125, {7: 1.5, 49151: -2.0})
SEQUENCE = DraftSequence(2**63, 5, [1, 2, 49151], SAMPLING, "eagle2:5,4,16", 16, 5, 2.0)
TREE = tree_of([5, 6, 7], [-1, 0, -1], [0.5, 0.25, 0.125])


def over_the_wire(message):
    return type(message).FromString(message.SerializeToString())


def test_requests_arrive_as_they_were_sent():
    request = DraftRequest(9, PLAN, [SEQUENCE, DraftSequence(1, 0, [3], SamplingParams(), "off", 0, 0)], [4, 5])
    received = request_from_proto(over_the_wire(request_to_proto(request)))
    assert replace(received, plan=PLAN) == request
    assert received.plan.cost == PLAN.cost
    assert np.array_equal(received.plan.calibration.acceptance, PLAN.calibration.acceptance)


def test_features_arrive_bit_for_bit():
    features = np.arange(0x7F80 - 6, 0x7F80, dtype=np.uint16).reshape(2, 3)
    sent = DraftSequence(1, 5, [1, 2], SAMPLING, "smart", 8, 4, features=features)
    (received,) = request_from_proto(over_the_wire(request_to_proto(DraftRequest(1, PLAN, [sent])))).sequences
    assert np.array_equal(received.features, features)


@pytest.mark.parametrize(("rows", "size"), [(2, 7), (2, 0), (3, 12)])
def test_features_that_make_no_sense_are_refused(rows, size):
    message = request_to_proto(DraftRequest(1, PLAN, [DraftSequence(1, 0, [1, 2, 3], SAMPLING, "smart", 8, 4)]))
    message.sequences[0].feature_rows, message.sequences[0].features = rows, bytes(size)
    with pytest.raises(ValueError, match="features of"):
        request_from_proto(message)


ASKED = DraftRequest(9, PLAN, [SEQUENCE, replace(SEQUENCE, session_id=12, start=400)])


def received(reply: DraftReply) -> DraftReply:
    return reply_from_proto(over_the_wire(reply_to_proto(reply)), ASKED, 100)


def test_replies_arrive_as_they_were_sent():
    stats = DraftStats(0.5, (1, 4), 17, (0.25, 0.125))
    sent = DraftReply(9, Forest.join([TREE, Forest.empty(1)]), {12: 300}, stats)
    got = received(sent)
    assert (got.step_id, got.held, got.stats, got.refused) == (sent.step_id, sent.held, sent.stats, 0)
    assert got.forest.sizes.tolist() == [3, 0]
    assert got.forest.parents.tolist() == [-1, 0, -1]


def test_a_bad_tree_costs_that_tree_and_is_counted():
    got = received(DraftReply(9, Forest.join([TREE, tree_of([100], [-1])])))
    assert (got.forest.sizes.tolist(), got.refused) == ([3, 0], 1)


@pytest.mark.parametrize(
    "bad",
    [
        DraftReply(9, TREE),
        DraftReply(9, Forest.empty(2), {7: 1}),
        DraftReply(9, Forest.empty(2), {12: 403}),
        DraftReply(9, Forest.empty(2), stats=DraftStats(math.nan)),
        DraftReply(9, Forest.empty(2), stats=DraftStats(-1.0)),
        DraftReply(9, Forest.empty(2), stats=DraftStats(0.0, (), 0, (math.inf,))),
        DraftReply(9, Forest.empty(2), stats=DraftStats(0.0, (1,) * (MAX_TREE_DEPTH + 1))),
    ],
)
def test_what_is_no_answer_to_the_request_is_refused(bad):
    with pytest.raises(ValueError, match=r"trees|session|statistics|out of range"):
        received(bad)


def test_features_must_be_finite():
    for bits in (0x7F80, 0xFF80, 0x7FC0):
        sent = replace(SEQUENCE, features=np.asarray([[bits, 0]], np.uint16))
        with pytest.raises(ValueError, match="finite"):
            request_from_proto(request_to_proto(DraftRequest(1, PLAN, [sent])))


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": []},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.nan},
        {"presence_penalty": math.inf},
        {"frequency_penalty": math.nan},
        {"min_p": math.nan},
        {"weight": -1.0},
        {"weight": math.nan},
    ],
)
def test_senseless_sequences_are_refused(change):
    message = request_to_proto(DraftRequest(1, PLAN, [SEQUENCE]))
    for name, value in change.items():
        if name == "token_ids":
            del message.sequences[0].token_ids[:]
        elif name == "weight":
            message.sequences[0].weight = value
        else:
            setattr(message.sequences[0].sampling, name, value)
    with pytest.raises(ValueError, match=str(2**63)):
        request_from_proto(message)


def test_a_session_may_occur_once():
    with pytest.raises(ValueError, match="twice"):
        request_from_proto(request_to_proto(DraftRequest(1, PLAN, [SEQUENCE, SEQUENCE])))


def test_a_plan_is_sent_once_and_holds_until_another_one_is_sent():
    first, second = (
        over_the_wire(request_to_proto(DraftRequest(n, PLAN, []), sent)) for n, sent in [(1, None), (2, PLAN)]
    )
    received = request_from_proto(first)
    assert request_from_proto(second, received.plan).plan is received.plan
    with pytest.raises(ValueError, match="no plan"):
        request_from_proto(second)
