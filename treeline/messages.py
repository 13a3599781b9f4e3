"""Messages between services: fields copied to and from dataclasses by name, numbers checked before they are used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from enum import Enum
from typing import Any, TypeVar

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

Bounds = Mapping[str, tuple[float, float]]
"""(least, most) by field name."""
MAX_SECONDS = 1e6
"""Eleven days: a process may have been stopped for that long; a longer time means a broken clock."""
MAX_RATE = 1e9
"""Largest rate in tokens per second, or other real number: beyond every machine, and a product of two is finite."""
MAX_COUNT = 2**31 - 1
"""Largest signed 32-bit integer: numpy's default integer holds it on every platform."""
_REAL = (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT)
_WHOLE = (FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_INT32)
M = TypeVar("M", bound=Message)
T = TypeVar("T")


def to_message(value: Any, kind: type[M], **given: Any) -> M:
    """The dataclass `value` as a message of `kind`.

    Every field of `value` that `kind` has by the same name is copied, None as unset.

    Args:
        given: fields of the message that have another form or name in the dataclass.
    """
    return kind(**{name: getattr(value, name) for name, _ in _shared(type(value), kind)} | given)


def from_message(message: Message, kind: Callable[..., T], **given: Any) -> T:
    """`message` as a dataclass of `kind`: the inverse of `to_message`.

    Repeated fields become tuples and maps become dicts. An unset optional field becomes None. Any other field that is
    zero, which on the wire is the same as unset, takes the dataclass' default if it has one.

    Args:
        given: fields of the dataclass that have another form or name in the message.
    """
    for name, form in _shared(kind, type(message)):
        if name in given:
            continue
        value = getattr(message, name)
        if form is _Form.REPEATED:
            given[name] = tuple(value)
        elif form is _Form.MAP:
            given[name] = dict(value)
        elif form is _Form.OPTIONAL:
            given[name] = value if message.HasField(name) else None
        elif value or form is _Form.PLAIN:
            given[name] = value
    return kind(**given)


class _Form(Enum):
    """How a dataclass field is read off a message."""

    REPEATED = 0
    MAP = 1
    OPTIONAL = 2
    PLAIN = 3
    DEFAULTED = 4


_SHARED: dict[tuple[Any, type[Message]], list[tuple[str, _Form]]] = {}
"""The fields that a dataclass and a message type share. Cached: every step copies the same few types."""


def _shared(kind: Any, message: type[Message]) -> list[tuple[str, _Form]]:
    shared = _SHARED.get((kind, message))
    if shared is None:
        wire = message.DESCRIPTOR.fields_by_name
        shared = [(field.name, _form(field, wire[field.name])) for field in fields(kind) if field.name in wire]
        _SHARED[kind, message] = shared
    return shared


def _form(field: Field[Any], wire: Any) -> _Form:
    if wire.is_repeated:
        is_map = wire.message_type is not None and wire.message_type.GetOptions().map_entry
        return _Form.MAP if is_map else _Form.REPEATED
    if wire.has_presence:
        return _Form.OPTIONAL
    has_default = field.default is not MISSING or field.default_factory is not MISSING
    return _Form.DEFAULTED if has_default else _Form.PLAIN


def check_numbers(message: Message, bounds: Bounds) -> None:
    """Check every number that is set in `message` and in its nested messages, except 64-bit integers.

    A number that `bounds` does not name must lie between 0 and MAX_COUNT, MAX_SECONDS (names in `_s`) or MAX_RATE. NaN
    is always out of range.

    Raises:
        ValueError: a number is out of range; its field is named.
    """
    for field, value in message.ListFields():
        if field.message_type is not None:
            for one in value if field.is_repeated else (value,):
                check_numbers(one, bounds)
        elif field.cpp_type in _REAL or field.cpp_type in _WHOLE:
            least, most = bounds.get(field.name) or (0, _most(field))
            # Most numbers are scalars, and a numpy array of one value takes ten times as long as a comparison.
            values = np.asarray(value, np.float64) if field.is_repeated else None
            fits = least <= value <= most if values is None else ((values >= least) & (values <= most)).all()
            if not fits:
                raise ValueError(f"{field.full_name} is out of range")


def _most(field: FieldDescriptor) -> float:
    if field.cpp_type in _WHOLE:
        return MAX_COUNT
    return MAX_SECONDS if field.name.endswith("_s") else MAX_RATE
