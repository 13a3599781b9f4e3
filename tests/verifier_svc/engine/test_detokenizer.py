"""Streamed text of every kind of tokenizer, whatever the tokens."""

from os.path import commonprefix

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from verifier_svc.engine.detokenizer import Detokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁", "a", "b", "▁a", "▁▁", "1", "é", "▁漢", "END", ".", "\ufffd"]


def byte_level() -> Tokenizer:
    """One token a byte, and some of several, not all of which are whole characters."""
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)}
    merges = []
    for text, cut in (("🌲", 3), (" the", 2), ("éé", 3)):
        spelled = pre.pre_tokenize_str(text)[0][0][:cut]
        for end in range(2, len(spelled) + 1):
            merges.append((spelled[: end - 1], spelled[end - 1]))
            vocab.setdefault(spelled[:end], len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As of Llama 2, Mistral and Gemma."""
    vocab = {token: i for i, token in enumerate(BYTES + PIECES)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def sentencepiece() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in PIECES], unk_id=0))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def wordpiece() -> Tokenizer:
    words = ["[UNK]", "un", "##believ", "##able", "END", ".", "'", "n't", "a", "##🌲"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


TOKENIZERS = {make.__name__: make() for make in (byte_level, byte_fallback, sentencepiece, wordpiece)}
for _tokenizer in TOKENIZERS.values():
    _tokenizer.add_special_tokens(["<s>", "</s>"])


def stream(tokenizer: Tokenizer, token_ids: list[int], *stop: str, prompt=()) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(tokenizer, stop, prompt)
    pieces = []
    for token_id in token_ids:
        pieces.append(detokenizer.feed(token_id))
        if detokenizer.matched_stop is not None:
            break
    return [*pieces, detokenizer.flush()], detokenizer


def feed(text: str, *stop: str) -> tuple[list[str], Detokenizer]:
    return stream(TOKENIZERS["byte_level"], [TOKENIZERS["byte_level"].token_to_id(c) for c in spelled(text)], *stop)


def spelled(text: str) -> str:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_pieces_are_the_decoded_whole_less_the_prompt(kind, data):
    tokenizer = TOKENIZERS[kind]
    size = tokenizer.get_vocab_size() + 1  # An id beyond the vocabulary, as padded logits have, is no text.
    ids = st.lists(st.integers(0, size - 1) | st.integers(max(0, size - 20), size - 1), max_size=20)
    prompt, answer = data.draw(ids), data.draw(ids)
    whole = tokenizer.decode(prompt + answer)
    expected = whole[len(commonprefix((tokenizer.decode(prompt), whole))) :]  # noqa: RUF071
    pieces, _ = stream(tokenizer, answer, prompt=prompt)
    assert "".join(pieces) == expected

    cuts = st.integers(0, len(expected))
    stops = [expected[a:b] for a, b in data.draw(st.lists(st.tuples(cuts, cuts), max_size=3)) if a < b] + ["nowhere"]
    pieces, detokenizer = stream(tokenizer, answer, *stops, prompt=prompt)
    ends = [(expected.find(stop) + len(stop), expected.find(stop), stop) for stop in stops if stop in expected]
    assert "".join(pieces) == (expected[: min(ends)[1]] if ends else expected)
    assert detokenizer.matched_stop == (min(ends)[2] if ends else None)


def test_bytes_that_are_no_text_are_marked_and_the_stream_goes_on():
    tokenizer = TOKENIZERS["byte_fallback"]
    pieces, _ = stream(tokenizer, [tokenizer.token_to_id(token) for token in ("<0x31>", "<0x99>", "a")])
    assert "".join(pieces) == "\ufffd\ufffda"


def test_an_answer_keeps_the_space_that_parts_it_from_its_prompt():
    tokenizer = TOKENIZERS["sentencepiece"]
    pieces, _ = stream(tokenizer, [tokenizer.token_to_id("▁a")], prompt=[tokenizer.token_to_id("b")])
    assert "".join(pieces) == " a"


def test_no_piece_holds_half_a_character():
    pieces, _ = feed("🌲é漢")
    assert [p for p in pieces if p] == ["🌲", "é", "漢"]


def test_an_unfinished_character_at_the_end_is_marked_not_lost():
    tokenizer = TOKENIZERS["byte_level"]
    pieces, _ = stream(tokenizer, [tokenizer.token_to_id(c) for c in spelled("a🌲")][:-1])
    assert pieces == ["a", "", "", "", "\ufffd"]


@pytest.mark.parametrize("stop", ["END", "🌲", "\n\n"])
def test_a_stop_string_never_leaks_not_even_in_part(stop):
    pieces, detokenizer = feed(f"one two{stop}three", stop)
    assert "".join(pieces) == "one two"
    assert detokenizer.matched_stop == stop


def test_special_tokens_are_text_where_asked_for():
    tokenizer = TOKENIZERS["byte_level"]
    ids = [tokenizer.token_to_id(token) for token in ("<s>", "a", "</s>")]
    detokenizer = Detokenizer(tokenizer, skip_special=False)
    assert "".join(map(detokenizer.feed, ids)) + detokenizer.flush() == "<s>a</s>"
    assert "".join(map(Detokenizer(tokenizer).feed, ids)) == "a"


def test_the_text_of_the_least_tokens_is_not_looked_at():
    tokenizer = TOKENIZERS["byte_level"]
    ids = [tokenizer.token_to_id(c) for c in "xyxyxy"]
    for least, text in ((0, ""), (1, "xy"), (2, "xy"), (5, "xyxyxy")):
        detokenizer = Detokenizer(tokenizer, ("xy",), min_tokens=least)
        pieces = []
        for token_id in ids:
            pieces.append(detokenizer.feed(token_id))
            if detokenizer.matched_stop:
                break
        assert "".join([*pieces, detokenizer.flush()]) == text


def test_what_only_looked_like_a_stop_string_is_released():
    pieces, detokenizer = feed("aENaEND", "ENDED")
    assert "".join(pieces) == "aENaEND"
    assert detokenizer.matched_stop is None


@pytest.mark.parametrize(("stops", "text", "matched"), [(("Y", "XY"), "abc", "XY"), (("bcXYd", "cX"), "ab", "cX")])
def test_of_several_stop_strings_the_one_that_ends_first_wins(stops, text, matched):
    pieces, detokenizer = feed("abcXYdef", *stops)
    assert "".join(pieces) == text
    assert detokenizer.matched_stop == matched
