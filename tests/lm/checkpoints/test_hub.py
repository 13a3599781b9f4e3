"""The Hugging Face hub where it does not answer: one clear line, and soon."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from lm.checkpoints import hub
from lm.store import resolve_head, resolve_model
from treeline.errors import ConfigError


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub that takes connections and says nothing."""
    monkeypatch.setattr(hub, "ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(hub.constants, "ENDPOINT", address)
        yield address


@pytest.mark.parametrize("resolve", [resolve_head, resolve_model])
def test_a_hub_that_says_nothing_is_waited_for_briefly(silent: str, resolve) -> None:
    started_s = time.monotonic()
    with pytest.raises(ConfigError, match=f"'nowhere' from the Hugging Face hub: {silent}.* not answer") as caught:
        resolve("nowhere")
    assert time.monotonic() - started_s < 2
    assert "\n" not in str(caught.value)


def test_what_was_fetched_before_serves_without_the_hub(silent: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    kept = tmp_path / "models--someone--model"
    (kept / "snapshots/abc").mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs/main").write_text("abc")
    assert hub.fetch("someone/model") == kept / "snapshots/abc"
