"""What all Treeline services share: draft trees, plans, requests, configuration, contracts and clients.

Nothing here imports torch or ray, so a client installs just this package, as treeline-client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from treeline.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client", "__version__"]
__version__ = "0.1.0"
"""Version of both distributions, treeline-client and treeline-serve."""


def __getattr__(name: str) -> Any:
    """Import the clients on first use: the planner's fast path needs no grpc."""
    if name not in __all__:
        raise AttributeError(f"module 'treeline' has no attribute {name!r}")
    import treeline.client

    return getattr(treeline.client, name)
