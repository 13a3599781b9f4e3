"""Bounds of the numbers in another process's message, checked before it is used."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

Bounds = Mapping[str, tuple[float, float]]
"""(least, most) by field name."""
MAX_SECONDS = 1e6
"""Eleven days: a process may have been stopped for long, but its clock is not broken."""
MAX_RATE = 1e9
"""Tokens per second, and any other real number: far beyond every machine, and its products stay finite."""
MAX_COUNT = 2**31 - 1
_REAL = (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT)
_WHOLE = (FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_INT32)


def check_numbers(message: Message, bounds: Bounds) -> None:
    """Check every number that is set in `message` and in the messages within it, 64-bit integers excepted.

    A number of which `bounds` says nothing lies from 0 to MAX_COUNT, MAX_SECONDS (names in `_s`) or MAX_RATE. NaN lies
    nowhere.

    Raises:
        ValueError: a number is out of range; its field is named.
    """
    for field, value in message.ListFields():
        if field.message_type is not None:
            for one in value if field.is_repeated else (value,):
                check_numbers(one, bounds)
        elif field.cpp_type in _REAL or field.cpp_type in _WHOLE:
            least, most = bounds.get(field.name) or (0, _most(field))
            # A numpy array of one costs ten times as much as a comparison, and most numbers are alone.
            values = np.asarray(value, np.float64) if field.is_repeated else None
            fits = least <= value <= most if values is None else ((values >= least) & (values <= most)).all()
            if not fits:
                raise ValueError(f"{field.full_name} is out of range")


def _most(field: FieldDescriptor) -> float:
    if field.cpp_type in _WHOLE:
        return MAX_COUNT
    return MAX_SECONDS if field.name.endswith("_s") else MAX_RATE
