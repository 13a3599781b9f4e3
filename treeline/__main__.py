"""The `treeline` command: all of it where treeline-serve is installed, else the client's part."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points


def main() -> None:
    """Run the command that treeline-serve registers if it is installed, else the client's."""
    for whole_command in entry_points(group="treeline.command"):
        whole_command.load()()
        return
    from treeline.client.command import client_command  # late: `cli` first sets what grpc reads on import

    sys.exit(client_command(sys.argv[1:]))


if __name__ == "__main__":
    main()
