"""Exit code 0 if the front door on this machine serves: the image's health check, `python -m deploy.health`."""

from __future__ import annotations

import contextlib
import http.client
import ssl
import sys
import urllib.request

TIMEOUT_S = 3.0


def serves(port: int = 8000) -> bool:
    """Whether /health of the HTTP port answers 200, with or without TLS."""
    anybody = ssl._create_unverified_context()  # the certificate is not for 127.0.0.1
    for scheme in ("http", "https"):
        url = f"{scheme}://127.0.0.1:{port}/health"
        with (
            contextlib.suppress(OSError, http.client.HTTPException),
            urllib.request.urlopen(url, timeout=TIMEOUT_S, context=anybody) as answer,
        ):
            return answer.status == 200
    return False


if __name__ == "__main__":
    sys.exit(not serves())
