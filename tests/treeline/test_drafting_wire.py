import math
from dataclasses import replace

import numpy as np
import pytest

from planner.fast.builtin_plan import builtin_plan
from treeline.config import LimitsConfig
from treeline.drafting import DraftReply, DraftRequest, DraftSequence, DraftStats
from treeline.drafting_wire import (
    map_sessions,
    reply_from_proto,
    reply_to_proto,
    request_from_proto,
    request_to_proto,
    unmap_sessions,
)
from treeline.sampling import SamplingParams
from treeline.tree import DraftTree, Source
from treeline.v1 import drafting_pb2 as pb

PLAN = builtin_plan(LimitsConfig())
SAMPLING = SamplingParams(temperature=0.75, top_p=0.5, top_k=40, repetition_penalty=1.25, seed=2**64 - 1)
SEQUENCE = DraftSequence(2**63, 5, [1, 2, 49151], SAMPLING, "eagle2:5,4,16", 16, 5, 2.0)
TREE = DraftTree(
    np.array([5, 6, 7], np.int32),
    np.array([-1, 0, -1], np.int32),
    np.array([0.5, 0.25, 0.125], np.float32),
    np.array([0, 0, 1], np.uint8),
    np.array([Source.MODEL, Source.NGRAM, Source.NGRAM], np.uint8),
)


def over_the_wire(message):
    return type(message).FromString(message.SerializeToString())


def test_requests_arrive_as_they_were_sent():
    request = DraftRequest(9, PLAN, [SEQUENCE, DraftSequence(1, 0, [3], SamplingParams(), "off", 0, 0)], [4, 5])
    received = request_from_proto(over_the_wire(request_to_proto(request)))
    assert replace(received, plan=PLAN) == request
    assert received.plan.cost == PLAN.cost
    assert np.array_equal(received.plan.calibration.acceptance, PLAN.calibration.acceptance)


def test_features_arrive_bit_for_bit():
    features = np.arange(2**16 - 8, 2**16 - 2, dtype=np.uint16).reshape(2, 3)
    sent = DraftSequence(1, 5, [1, 2], SAMPLING, "smart", 8, 4, features=features)
    (received,) = request_from_proto(over_the_wire(request_to_proto(DraftRequest(1, PLAN, [sent])))).sequences
    assert np.array_equal(received.features, features)


@pytest.mark.parametrize(("rows", "size"), [(2, 7), (2, 0), (3, 12)])
def test_features_that_make_no_sense_are_refused(rows, size):
    message = request_to_proto(DraftRequest(1, PLAN, [DraftSequence(1, 0, [1, 2, 3], SAMPLING, "smart", 8, 4)]))
    message.sequences[0].feature_rows, message.sequences[0].features = rows, bytes(size)
    with pytest.raises(ValueError, match="features of"):
        request_from_proto(message)


def test_replies_arrive_as_they_were_sent():
    stats = DraftStats(0.5, (1, 4), 17, (0.25, 0.125))
    sent = DraftReply(9, {7: TREE, 8: DraftTree.empty()}, {11: 0, 12: 300}, stats)
    got = reply_from_proto(over_the_wire(reply_to_proto(sent)))
    assert (got.step_id, got.held, got.stats) == (sent.step_id, sent.held, sent.stats)
    assert len(got.trees[8]) == 0
    for name in ("token_ids", "parents", "draft_probs", "ranks", "sources"):
        ours, theirs = getattr(sent.trees[7], name), getattr(got.trees[7], name)
        assert ours.dtype == theirs.dtype
        assert ours.tolist() == theirs.tolist()
    got.trees[7].check(vocab_size=8)


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


def test_token_ids_do_not_wrap_around():
    message = pb.DraftResponse(
        trees=[pb.Tree(session_id=1, token_ids=[2**32 - 1], parents=[-1], draft_probs=[1], ranks=b"\0", sources=b"\0")]
    )
    with pytest.raises(ValueError, match="vocabulary"):
        reply_from_proto(message).trees[1].check(vocab_size=100)


def test_sessions_are_renamed_both_ways():
    request = map_sessions(DraftRequest(1, PLAN, [SEQUENCE], [3]), 1 << 64)
    assert request.sequences[0].session_id == 2**63 + 2**64
    assert request.released == [3 + 2**64]
    reply = unmap_sessions(DraftReply(1, {2**63 + 2**64: TREE}, {3 + 2**64: 5}), 1 << 64)
    assert list(reply.trees) == [2**63]
    assert reply.held == {3: 5}


def test_a_plan_is_sent_once_and_holds_until_another_one_is_sent():
    first, second = (
        over_the_wire(request_to_proto(DraftRequest(n, PLAN, []), sent)) for n, sent in [(1, None), (2, PLAN)]
    )
    received = request_from_proto(first)
    assert request_from_proto(second, received.plan).plan is received.plan
    with pytest.raises(ValueError, match="no plan"):
        request_from_proto(second)
