"""Files of bearer tokens, and what stands behind a token."""

from __future__ import annotations

import math

import pytest

from treeline.errors import ConfigError
from treeline.rpc.tokens import Client, TokenFile, read_clients, read_tokens


def test_files_that_hold_nothing_are_refused(tmp_path):
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(ConfigError, match="holds no token"):
        read_tokens(tmp_path / "empty")
    with pytest.raises(ConfigError, match="cannot read"):
        read_tokens(tmp_path / "missing")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_may_be_spelled_in_any_case(tmp_path, scheme):
    (tmp_path / "tokens").write_text("secret")
    tokens = TokenFile(tmp_path / "tokens")
    assert tokens.client(f"{scheme} secret")
    assert not tokens.client("Basic secret")
    assert not tokens.client("secret")


def test_a_file_is_read_again_when_it_changes(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("old")
    tokens = TokenFile(path)
    (tmp_path / "new").write_text("newer\nsecond")
    (tmp_path / "new").replace(path)
    assert tokens.client("Bearer second")
    assert not tokens.client("Bearer old")
    path.write_text("# none")
    assert tokens.client("Bearer second"), "a file without tokens locks nobody out"
    path.write_text("third rate=fast")
    assert tokens.client("Bearer second"), "nor does a mistake in it"
    path.unlink()
    assert tokens.client("Bearer second")


def test_a_line_may_say_whose_token_it_is_and_what_that_one_may(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(
        "plain\n# of a team\n  a1 name=team weight=2 rate=0.5 concurrent=3 priority=-1 expires=2001-09-09T01:46:40\n"
        "a2 name=team expires=2001-09-09T03:46:40+02:00\n"
    )
    clients = read_clients(path)
    assert clients["a1"] == Client("team", 2.0, 0.5, 3, -1, 1e9)
    assert clients["a2"] == Client("team", expires_unix_s=1e9)
    plain = clients["plain"]
    assert (plain.weight, plain.rate, plain.concurrent, plain.priority) == (1.0, math.inf, math.inf, 4)
    assert "plain" not in plain.name, "a name goes into logs"


@pytest.mark.parametrize(
    "option",
    [
        *["rate", "rate=0", "rate=nan", "weight=-1", "weight=inf", "concurrent=0", "concurrent=1.5", "priority=5"],
        *["expires=soon", "name=a/b", "name=", "colour=red", "words"],
    ],
)
def test_a_wrong_option_is_named_with_its_line_and_without_the_token(tmp_path, option):
    path = tmp_path / "tokens"
    path.write_text(f"fine\ns3cret {option}\n")
    with pytest.raises(ConfigError, match="line 2") as caught:
        read_clients(path)
    assert "s3cret" not in str(caught.value)


def test_a_token_counts_until_it_expires(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("old expires=2001-09-09T01:46:40\nnew\n")
    now = 1e9 - 1
    tokens = TokenFile(path, lambda: now)
    assert tokens.client("Bearer old")
    assert tokens.token == "old"
    now = 1e9
    assert not tokens.client("Bearer old")
    assert tokens.token == "new"
    assert read_tokens(path) == ["new"]
    path.write_text("old expires=2001-09-09")
    with pytest.raises(ConfigError, match="expired"):
        read_tokens(path)
