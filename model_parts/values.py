"""Types of configuration keys: what a value has to be, and the conversions that lose nothing."""

from __future__ import annotations

import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

NO = object()  # what `as_type` returns for a value that is not of the type


def alternatives(kind: Any) -> tuple:
    """The members of a union type, None first; (kind,) for any other type."""
    members = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    return tuple(sorted(members, key=lambda member: member is not type(None)))


def as_type(kind: Any, value: Any) -> Any:
    """`value`, a Python value or text, as `kind` where nothing is lost, else NO.

    1 → 1.0, '3e8' → 300000000, 'True' → True, 'None' → None; 1.5 is no int, True no number.
    """
    for member in alternatives(kind):
        converted = _as_member(member, value)
        if converted is not NO:
            return converted
    return NO


def _as_member(kind: Any, value: Any) -> Any:
    text = isinstance(value, str)
    if kind is type(None):
        return None if value is None or (text and value == "None") else NO
    if typing.get_origin(kind) is Literal:
        return value if value in typing.get_args(kind) else NO
    if kind is bool:
        if text and is_truth_value(value):
            return value.lower() in ("true", "1")
        return bool(value) if isinstance(value, bool) or (type(value) is int and value in (0, 1)) else NO
    if kind is str:
        return value if text else str(value) if isinstance(value, Path) else NO
    if isinstance(value, (bool, bytes)):
        return NO
    try:
        if kind is int:
            if type(value) is int or (text and re.fullmatch(r"[+-]?[0-9_]+", value.strip())):
                return int(value)
            number = float(value)
            return int(number) if number.is_integer() else NO
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return NO


def is_truth_value(text: str) -> bool:
    """Whether text stands for True or False."""
    return text.lower() in ("true", "false", "0", "1")


def type_in_words(kind: Any) -> str:
    """A type in words: 'a whole number', "'cosine' or 'linear'", 'True or False'; that it may be None is not said."""
    words = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}
    pieces = []
    for member in alternatives(kind):
        if member is not type(None):
            pieces += (
                [repr(value) for value in typing.get_args(member)] if typing.get_origin(member) is Literal else [words[member]]
            )
    return pieces[0] if len(pieces) == 1 else ", ".join(pieces[:-1]) + " or " + pieces[-1]


def is_key_type(kind: Any) -> bool:
    """Whether a key may have this type: int, float, str, bool, a Literal, or a union of those and None."""
    return all(
        member in (int, float, str, bool, type(None)) or typing.get_origin(member) is Literal for member in alternatives(kind)
    )
