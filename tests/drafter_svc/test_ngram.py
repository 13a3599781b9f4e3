import random

from drafter_svc.ngram import MAX_GRAM, MAX_MATCHES, MIN_GRAM, NgramIndex, NgramProposer
from drafter_svc.sessions import Session
from tests.drafter_svc.doubles import grown, sequence
from treeline.tree import ROOT, Source


def index_of(tokens: list[int]) -> NgramIndex:
    index = NgramIndex()
    index.extend(tokens)
    return index


def occurrences(tokens: list[int], n: int) -> set[int]:
    """Brute force: where the last n tokens occurred before, as the index of the token that followed."""
    end = tokens[-n:]
    return {i for i in range(n, len(tokens)) if tokens[i - n : i] == end}


def test_matches_are_all_earlier_occurrences_longest_first():
    generator = random.Random(1)
    for _ in range(300):
        tokens = [generator.randrange(4) for _ in range(generator.randrange(2, 40))]
        matches = index_of(tokens).matches()
        lengths = [n for _, n in matches]
        assert lengths == sorted(lengths, reverse=True)
        expected = {i: n for n in range(MIN_GRAM, MAX_GRAM + 1) for i in occurrences(tokens, n)}
        assert len(matches) == min(MAX_MATCHES, len(expected))
        assert all(expected[i] == n for i, n in matches)


def test_truncation_equals_never_having_seen_the_tokens():
    generator = random.Random(2)
    index, tokens = NgramIndex(), []
    for _ in range(300):
        length = generator.randrange(len(tokens) + 1) if generator.random() < 0.3 else len(tokens)
        new = [generator.randrange(3) for _ in range(generator.randrange(6))]
        tokens = tokens[:length] + new
        index.truncate(length)
        index.extend(new)
        assert index.matches() == index_of(tokens).matches()
        assert index.tokens == tokens


def test_short_sequences_have_no_matches():
    for tokens in ([], [1], [1, 1]):
        assert index_of(tokens).matches() == []


def test_work_for_a_token_does_not_depend_on_the_length():
    """A million-token history: matching looks at a bounded number of chain links, however common the n-gram."""

    class CountingArray:
        def __init__(self, array):
            self.array, self.reads = array, 0

        def __getitem__(self, i):
            self.reads += 1
            return self.array[i]

    index = index_of([1, 2] * 20_000)
    index._previous = {n: CountingArray(previous) for n, previous in index._previous.items()}
    index.matches()
    assert sum(counting.reads for counting in index._previous.values()) <= 3 * MAX_MATCHES


def propose(tokens: list[int], policy: str = "static:3-3-3", max_nodes: int = 32):
    return grown(NgramProposer(), None, Session(1, tokens), sequence(policy, tokens, max_nodes))


def test_a_repeat_is_continued():
    tree = propose([7, 1, 2, 3, 4, 5, 6, 7, 1, 2, 3], "chain:5")
    assert tree.token_ids.tolist() == [4, 5, 6, 7, 1]
    assert tree.parents.tolist() == [-1, 0, 1, 2, 3]
    assert set(tree.sources.tolist()) == {Source.NGRAM}
    assert (tree.draft_probs > 0.6).all()


def test_the_continuation_ends_where_the_sequence_does():
    assert propose([1, 2, 3, 1, 2], "chain:8").token_ids.tolist() == [3, 1, 2]


def test_several_continuations_make_a_tree_ordered_by_votes():
    tokens = [1, 2, 8, 9, 1, 2, 5, 6, 1, 2, 5, 7, 1, 2]
    tree = propose(tokens)
    top = [(t, r) for t, r, p in zip(tree.token_ids, tree.ranks, tree.parents, strict=True) if p == ROOT]
    assert top == [(5, 0), (8, 1)]
    five = tree.token_ids.tolist().index(5)
    assert {int(t) for t, p in zip(tree.token_ids, tree.parents, strict=True) if p == five} == {6, 7}


def test_longer_matches_and_agreement_raise_the_probability():
    def first_prob(tokens):
        return float(propose(tokens, "chain:1").draft_probs[0])

    two = first_prob([1, 2, 3, 9, 9, 1, 2])
    four = first_prob([8, 7, 1, 2, 3, 9, 9, 8, 7, 1, 2])
    agreed = first_prob([1, 2, 3, 9, 1, 2, 3, 8, 1, 2])
    split = first_prob([1, 2, 3, 9, 1, 2, 4, 8, 1, 2])
    assert split < two < four < 1
    assert two < agreed < 1


def test_nothing_is_proposed_without_a_repeat():
    assert len(propose(list(range(50)))) == 0


def test_a_changed_session_is_followed():
    proposer, session = NgramProposer(), Session(1)
    session.update(0, [1, 2, 3, 4, 1, 2])
    assert grown(proposer, None, session, sequence("chain:1", session.tokens)).token_ids.tolist() == [3]
    session.update(2, [9, 9, 1, 2])  # the 3 was never committed after all
    assert grown(proposer, None, session, sequence("chain:1", session.tokens)).token_ids.tolist() == [9]
    proposer.release(1)
    session.update(0, [5, 6, 7, 5, 6])
    session.unchanged = 0
    assert grown(proposer, None, session, sequence("chain:1", session.tokens)).token_ids.tolist() == [7]
