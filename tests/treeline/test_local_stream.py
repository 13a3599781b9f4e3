"""Streams over a Unix socket: whole messages in any pieces, limits, ends that wake who waits, and who may enter."""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from treeline.rpc import local_stream
from treeline.rpc.local_stream import LENGTH_BYTES, LocalServer, LocalStream, connect_local
from treeline.v1 import drafting_pb2 as pb

MAX_BYTES = 1000


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, LocalStream[pb.DraftRequest]]]:
    raw, ours = socket.socketpair(socket.AF_UNIX)
    yield raw, LocalStream(ours, pb.DraftRequest, MAX_BYTES)
    raw.close()
    ours.close()


def on_wire(content: bytes, length: int | None = None) -> bytes:
    return (len(content) if length is None else length).to_bytes(LENGTH_BYTES, "little") + content


@pytest.fixture
def echo() -> Iterator[LocalServer[pb.DraftRequest]]:
    def serve(stream: LocalStream[pb.DraftRequest]) -> None:
        while message := stream.receive():
            stream.send(message)

    server = LocalServer(serve, pb.DraftRequest, MAX_BYTES)
    yield server
    server.close()


def test_messages_come_whole_in_any_pieces(pair) -> None:
    raw, stream = pair
    messages = [pb.DraftRequest(step_id=step, released=range(step)) for step in range(4)]
    sent = b"".join(on_wire(message.SerializeToString()) for message in messages)
    received = []
    for start in range(0, len(sent), 3):
        raw.send(sent[start : start + 3])
        while (message := stream.receive(0)) is not None:
            received.append(message)
    assert received == messages


@pytest.mark.parametrize(
    ("sent", "says"),
    [(on_wire(b"", MAX_BYTES + 1), "1001 bytes"), (on_wire(b"\xff\xff\xff"), "decoded"), (b"\x05\x00", "ended")],
)
def test_what_is_no_message_ends_the_stream(pair, sent: bytes, says: str) -> None:
    raw, stream = pair
    raw.send(sent)
    raw.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionError, match=says):
        stream.receive(1)


def test_nobody_waits_longer_than_asked(pair) -> None:
    _, stream = pair
    started_s = time.monotonic()
    assert stream.receive(0.05) is None
    with pytest.raises(TimeoutError):
        stream.send(pb.DraftRequest(released=range(10**6)), 0.05)
    assert time.monotonic() - started_s < 5


def test_answers_come_back_until_either_side_closes(echo: LocalServer[pb.DraftRequest]) -> None:
    stream = connect_local(echo.path, pb.DraftRequest, MAX_BYTES)
    assert stream is not None
    stream.send(pb.DraftRequest(step_id=5))
    assert stream.receive(5) == pb.DraftRequest(step_id=5)
    closing = threading.Timer(0.05, echo.close)
    closing.start()
    with pytest.raises(ConnectionError, match="ended"):
        stream.receive(5)
    closing.join()
    assert connect_local(echo.path, pb.DraftRequest, MAX_BYTES) is None
    assert not Path(echo.path).parent.exists()


def test_a_server_that_no_longer_accepts_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_stream, "CONNECT_S", 0.05)
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as stopped:
        stopped.bind(path)
        stopped.listen(0)
        queued = [connect_local(path, pb.DraftRequest, MAX_BYTES) for _ in range(3)]
    assert queued[0] is not None
    assert queued[-1] is None


def test_only_this_user_may_enter(echo: LocalServer[pb.DraftRequest], monkeypatch: pytest.MonkeyPatch) -> None:
    assert stat.S_IMODE(Path(echo.path).parent.stat().st_mode) == 0o700
    monkeypatch.setattr(os, "getuid", lambda: os.stat(echo.path).st_uid + 1)
    assert connect_local(echo.path, pb.DraftRequest, MAX_BYTES) is None
