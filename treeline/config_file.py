"""Reads the configuration. Any mistake becomes one clear line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from treeline.config import Config, Section
from treeline.errors import ConfigError

ENVIRONMENT = "TREELINE_"


def load_config(path: Path | None, settings: Mapping[str, Any] | None = None) -> Config:
    """The configuration in `path` (else the defaults), overridden by the environment and then by `settings`.

    Settings have names like "server.port". Environment variables have names like TREELINE_SERVER__PORT and YAML values.

    Raises:
        ConfigError: the file is missing, is not YAML, or a field is unknown or wrong; the message is one line.
    """
    source = str(path or "configuration")
    try:
        data = yaml.safe_load(path.read_text()) if path else {}
        for name, value in {**_environment(), **(settings or {})}.items():
            data = _changed(data or {}, name.split("."), value)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except ConfigError:
        raise
    except Exception as error:  # the YAML reader raises anything on malformed dates and numbers, or deep nesting
        raise ConfigError(f"{source} is not YAML: {' '.join(str(error).split())}") from None
    if data is not None and not isinstance(data, dict):
        raise ConfigError(f"{source}: expected sections such as 'server:' at the top")
    try:
        return Config.model_validate(data or {})
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}{_meant(e)}" for e in error.errors())
        raise ConfigError(f"{source}: {problems}") from None


def _environment() -> dict[str, Any]:
    """Settings by their dotted names."""
    names = {name: name.removeprefix(ENVIRONMENT).lower().replace("__", ".") for name in os.environ if "__" in name}
    return {dotted: yaml.safe_load(os.environ[n]) for n, dotted in names.items() if n.startswith(ENVIRONMENT)}


def _changed(section: Any, path: list[str], value: Any) -> Any:
    """`section` with another value at `path`. A non-section stays as it is, and is refused later."""
    if not isinstance(section, dict):
        return section
    name, *below = path
    return section | {name: _changed(section.get(name) or {}, below, value) if below else value}


def _meant(error: Any) -> str:
    """The field that an unknown one may mean."""
    known = {name for section in Section.__subclasses__() for name in section.model_fields}
    close = difflib.get_close_matches(str(error["loc"][-1]), known, 1) if error["type"] == "extra_forbidden" else []
    return f"; did you mean {close[0]}?" if close else ""
