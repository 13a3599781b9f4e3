"""What every Treeline service speaks: the draft tree, the plan, requests, configuration, contracts, the client.

Nothing here imports torch or ray, so a client installs just this package, as treeline-client.
"""

__version__ = "0.1.0"
"""Of both distributions, treeline-client and treeline-serve."""
