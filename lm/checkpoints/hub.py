"""Repositories of the Hugging Face hub, fetched once."""

from __future__ import annotations

import threading
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import get_session

FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
ANSWER_S = 3.0
"""Limit for the hub's first answer. Its library waits forever if DNS or the host does not answer."""


def fetch(repository: str) -> Path:
    """The folder of a repository's files, as the hub has them; the local copy if the hub does not answer.

    Raises:
        OSError: there is no such repository, or the hub does not answer and there is no local copy.
        ValueError: this is not a repository name.
        RuntimeError: the library cannot fetch it.
    """
    problem = _problem()
    try:
        return Path(snapshot_download(repository, allow_patterns=FILES, local_files_only=bool(problem)))
    except LocalEntryNotFoundError as error:
        raise OSError(problem or str(error)) from error


def _problem() -> str:
    """Why the hub is unreachable; empty if reachable."""
    found = [f"{constants.ENDPOINT} does not answer within {ANSWER_S:g} s"]

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=2 * ANSWER_S)  # the wait below ends first
            found[0] = ""
        except Exception as error:  # DNS, connection, certificate, proxy, or offline mode
            found[0] = f"{constants.ENDPOINT}: {error}"

    asking = threading.Thread(target=ask, name="ask-hub", daemon=True)
    asking.start()
    asking.join(ANSWER_S)
    return found[0]
