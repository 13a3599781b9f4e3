"""What a text that repeats itself goes on with."""

from __future__ import annotations

import pytest

from treeline.tree import DraftTree, Source
from verifier_svc.speculation.prompt_lookup import Copying


def chain(copying: Copying, token_ids: list[int], nodes: int = 4, session_id: int = 1) -> DraftTree:
    sure = copying.read(session_id, token_ids)
    tree = copying.chain(session_id, token_ids, nodes)
    assert tree.draft_probs[:1].tolist() == pytest.approx([sure] if sure and nodes else [])
    return tree


def copied(token_ids: list[int], nodes: int = 4) -> list[int]:
    return chain(Copying(), token_ids, nodes).token_ids.tolist()


def test_what_followed_before_is_proposed_again():
    assert copied([1, 2, 3, 4, 5, 6, 9, 2, 3]) == [4, 5, 6, 9]


def test_a_text_that_says_nothing_twice_is_not_drafted():
    assert copied([1, 2, 3, 4, 5]) == []
    assert copied([1, 2, 9, 2]) == [], "a single token is no repetition"
    assert copied([1, 2, 3, 1, 2], nodes=0) == []


def test_the_newest_of_several_places_is_followed():
    assert copied([1, 2, 3, 1, 2, 4, 1, 2], 1) == [4]


def test_a_copy_goes_on_where_it_is_although_its_end_stands_elsewhere_too():
    text = [1, 2, 3, 4, 5, 8, 3, 4, 6, 9, 1, 2, 3, 4]
    assert copied(text, 1) == [5], "four tokens agree there, two in the newer place"


def test_past_the_end_of_the_text_a_loop_goes_on():
    assert copied([7, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]


def test_a_growing_text_is_read_on_from_where_it_was():
    copying, text = Copying(), [1, 2, 3, 4, 5, 6, 1, 2]
    assert chain(copying, text, 2).token_ids.tolist() == [3, 4]
    assert chain(copying, [*text, 3, 4], 2).token_ids.tolist() == [5, 6]
    assert not len(chain(copying, [*text, 3, 4, 9]))
    assert chain(copying, text, 1, session_id=2).token_ids.tolist() == [3], "each session has a text of its own"
    copying.forget(1)
    assert not len(chain(copying, [1, 2, 3]))


def test_the_longer_a_copy_the_surer_it_is():
    short = chain(Copying(), [1, 2, 3, 1, 2], 1)
    long = chain(Copying(), [*range(1, 12), *range(1, 11)], 3)
    assert short.sources.tolist() == [Source.NGRAM]
    assert 0.3 < short.draft_probs[0] < 0.5
    assert 0.85 < long.draft_probs[0] < long.draft_probs[1] < 0.95
    assert long.parents.tolist() == [-1, 0, 1]
    long.check(100)
