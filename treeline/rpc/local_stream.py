"""Messages between processes of one machine and one user over a Unix socket, which wakes fewer threads than gRPC.

The socket lies in a folder that only this user may enter, which replaces a port's token and certificate.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import socketserver
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from google.protobuf.message import DecodeError, Message

logger = logging.getLogger(__name__)
Incoming = TypeVar("Incoming", bound=Message)
LENGTH_BYTES = 4
"""Size of the little-endian length before each message."""
CHUNK_BYTES = 1 << 16
CONNECT_S = 1.0
"""A running server accepts at once; a stopped one with a full queue would block the caller's event loop."""


class LocalStream(Generic[Incoming]):
    """One connection, for one thread."""

    def __init__(self, sock: socket.socket, incoming: type[Incoming], max_bytes: int) -> None:
        """`max_bytes`: limit of an incoming message."""
        self._socket, self._incoming, self._max_bytes = sock, incoming, max_bytes
        self._buffer = bytearray()

    def send(self, message: Message, timeout_s: float | None = None) -> None:
        """Raises OSError if the connection is broken or the other side has not taken the message in time."""
        content = message.SerializeToString()
        self._socket.settimeout(timeout_s)
        self._socket.sendall(len(content).to_bytes(LENGTH_BYTES, "little") + content)

    def receive(self, timeout_s: float | None = None) -> Incoming | None:
        """The next message, or None if it has not come within `timeout_s`.

        Raises:
            OSError: the connection has ended, or a message is malformed or too long.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while (message := self._whole()) is None:
            self._socket.settimeout(None if deadline_s is None else max(0.0, deadline_s - time.monotonic()))
            try:
                chunk = self._socket.recv(CHUNK_BYTES)
            except (TimeoutError, BlockingIOError):
                return None
            if not chunk:
                raise ConnectionError("the other side ended the connection")
            self._buffer += chunk
        return message

    def close(self) -> None:
        """End the connection; may be called from any thread, and wakes a waiting one."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _whole(self) -> Incoming | None:
        """Take the message at the front of the buffer, if it is complete."""
        if len(self._buffer) < LENGTH_BYTES:
            return None
        end = LENGTH_BYTES + int.from_bytes(self._buffer[:LENGTH_BYTES], "little")
        if end - LENGTH_BYTES > self._max_bytes:
            raise ConnectionError(f"a message of {end - LENGTH_BYTES} bytes, at most {self._max_bytes} are read")
        if len(self._buffer) < end:
            return None
        content = bytes(self._buffer[LENGTH_BYTES:end])
        del self._buffer[:end]
        try:
            return self._incoming.FromString(content)
        except DecodeError:
            raise ConnectionError("a message cannot be decoded") from None


def connect_local(path: str, incoming: type[Incoming], max_bytes: int) -> LocalStream[Incoming] | None:
    """A connection to `path`, or None if no process of this machine and user listens there."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        if os.stat(path).st_uid == os.getuid():
            sock.settimeout(CONNECT_S)
            sock.connect(path)
            return LocalStream(sock, incoming, max_bytes)
    except OSError:
        pass
    sock.close()
    return None


class LocalServer(socketserver.ThreadingUnixStreamServer, Generic[Incoming]):
    """Serves each connection in a thread of its own.

    Attributes:
        path: of the socket.
    """

    daemon_threads = True

    def __init__(
        self, serve: Callable[[LocalStream[Incoming]], None], incoming: type[Incoming], max_bytes: int
    ) -> None:
        """
        Args:
            serve: called for each connection, which ends when it returns; may raise OSError.

        Raises:
            OSError: the folder for temporary files cannot be used.
        """
        self._serve, self._incoming, self._max_bytes = serve, incoming, max_bytes
        self._open: set[LocalStream[Incoming]] = set()
        self._folder = tempfile.TemporaryDirectory(prefix="treeline-")
        self.path = str(Path(self._folder.name) / "socket")
        super().__init__(self.path, socketserver.BaseRequestHandler)
        threading.Thread(target=self.serve_forever, name="local-server", daemon=True).start()

    def finish_request(self, request: Any, client_address: Any) -> None:
        stream = LocalStream(request, self._incoming, self._max_bytes)
        self._open.add(stream)
        try:
            with contextlib.suppress(OSError):
                self._serve(stream)
        finally:
            self._open.discard(stream)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.exception("a local connection failed")

    def close(self) -> None:
        """End all connections. Takes up to half a second."""
        self.shutdown()
        self.server_close()
        for stream in list(self._open):
            stream.close()
        self._folder.cleanup()
