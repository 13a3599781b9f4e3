"""Messages as plain dictionaries, for JSON."""

from __future__ import annotations

import inspect
import json
from typing import Any

from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message

_NAMES = inspect.signature(MessageToJson).parameters
ZEROS = next(n for n in ("always_print_fields_with_no_presence", "including_default_value_fields") if n in _NAMES)
"""protobuf 5.26 renamed it."""
UINT64 = ("seed", "plan_version", "version")
"""Fields that protobuf's JSON quotes. A service's version has letters or dots, and stays a string."""


def as_dict(message: Message) -> dict[str, Any]:
    """The fields by their names in the contract. Zeros are kept, and 64-bit integers become numbers."""
    options: dict[str, Any] = {"preserving_proto_field_name": True, ZEROS: True}
    return json.loads(MessageToJson(message, **options), object_hook=_unquoted)


def _unquoted(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: int(value) if name in UINT64 and value.isdigit() else value for name, value in fields.items()}
