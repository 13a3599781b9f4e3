"""The log of every service: one format, set up in one place. Searchable values are fields, not prose.

A line gets its fields from `extra` and from the context: `bind_contextvars(request_id=...)` names the request in all
lines of its task.
"""

from __future__ import annotations

import logging
import os
from logging.handlers import RotatingFileHandler
from pathlib import Path

import structlog
from structlog.typing import EventDict, WrappedLogger

from treeline.config import LoggingConfig

PACKAGES = ("drafter_svc", "front_door", "lm", "planner", "treeline", "verifier_svc")
"""Packages that `logging.level` applies to. Others log from WARNING on."""
MAX_BYTES, BACKUPS = 64 << 20, 4
"""Log rotation: 320 MiB in all, some 600,000 access lines of 500 bytes."""
_HANDLER = "treeline"


def configure(config: LoggingConfig, service: str, folder: Path | None = None) -> None:
    """Log this process's lines as `service`: to a rotating file in `folder`, else to standard error.

    Calling it again replaces what it set up before.
    """
    handler: logging.Handler = logging.StreamHandler()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        handler = RotatingFileHandler(folder / f"treeline-{service}-{os.getpid()}.log", "a", MAX_BYTES, BACKUPS)
    handler.set_name(_HANDLER)
    handler.setFormatter(_formatter(config, service))
    root = logging.getLogger()
    for old in [one for one in root.handlers if one.name == _HANDLER]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    for package in PACKAGES:
        logging.getLogger(package).setLevel(config.level.upper())


def _formatter(config: LoggingConfig, service: str) -> logging.Formatter:
    def name_service(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        return {**event, "service": service}

    def leave_out_rays(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        return {name: value for name, value in event.items() if not name.startswith("_ray")}

    as_text = [structlog.dev.ConsoleRenderer(colors=False, pad_event_to=0, pad_level=False, repr_native_str=True)]
    as_json = [
        name_service,
        structlog.processors.format_exc_info,
        structlog.processors.EventRenamer("message"),
        structlog.processors.JSONRenderer(default=str),
    ]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.ExtraAdder(),
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper("iso", utc=True),
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            leave_out_rays,
            *(as_json if config.format == "json" else as_text),
        ],
    )
