import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from verifier_svc.engine.detokenizer import Detokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One token a byte, so that every character of more than one byte is split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def feed(tokenizer: Tokenizer, text: str, *stop: str) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(tokenizer, stop)
    pieces = []
    for token_id in tokenizer.encode(text).ids:
        pieces.append(detokenizer.feed(token_id))
        if detokenizer.matched_stop is not None:
            break
    pieces.append(detokenizer.flush())
    return pieces, detokenizer


def test_text_comes_back_whole(tokenizer):
    pieces, _ = feed(tokenizer, "naïve café 🌲 done")
    assert "".join(pieces) == "naïve café 🌲 done"


def test_no_piece_holds_half_a_character(tokenizer):
    pieces, _ = feed(tokenizer, "🌲é漢")
    assert [p for p in pieces if p] == ["🌲", "é", "漢"]


def test_an_unfinished_character_at_the_end_is_marked_not_lost(tokenizer):
    detokenizer = Detokenizer(tokenizer, ())
    for token_id in tokenizer.encode("a🌲").ids[:-1]:
        last = detokenizer.feed(token_id)
    assert last == ""
    assert set(detokenizer.flush()) == {"\ufffd"}


@pytest.mark.parametrize("stop", ["END", "🌲", "\n\n"])
def test_a_stop_string_never_leaks_not_even_in_part(tokenizer, stop):
    pieces, detokenizer = feed(tokenizer, f"one two{stop}three", stop)
    assert "".join(pieces) == "one two"
    assert detokenizer.matched_stop == stop


def test_what_only_looked_like_a_stop_string_is_released(tokenizer):
    pieces, detokenizer = feed(tokenizer, "aENaEND", "ENDED")
    assert "".join(pieces) == "aENaEND"
    assert detokenizer.matched_stop is None


def test_the_earliest_of_several_stop_strings_wins(tokenizer):
    pieces, detokenizer = feed(tokenizer, "abcXYdef", "Y", "XY")
    assert "".join(pieces) == "abc"
    assert detokenizer.matched_stop == "XY"
