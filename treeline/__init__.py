"""What every Treeline service speaks: the draft tree, the plan, requests, configuration, contracts, the client.

Nothing here imports torch or ray, so a client installs just this package.
"""

__version__ = "0.1.0"
