"""The `treeline` command."""

import os

# Read when grpc is loaded. Without it, grpc warns whenever a command starts another program.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
