"""Datasets that nanoGPT's scripts wrote: what can be known of a folder with .bin files and perhaps a meta.pkl."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.files import DatasetError

LARGEST_PICKLE = 2**26  # bytes; a vocabulary of characters takes less than one
LARGEST_HIGH_HALF = 16  # of a uint32 id: vocabularies are below 2²⁰


@dataclass(frozen=True)
class Vocabulary:
    """What a meta.pkl says: how many ids there are, and the characters that they stand for ("" where it does not say)."""

    size: int
    characters: str


class _PlainUnpickler(pickle.Unpickler):
    """Reads strings, numbers and dictionaries. Whatever would call something is refused before it is called."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it asks for an object from elsewhere")


def read_vocabulary(path: Path) -> Vocabulary | None:
    """The vocabulary in a meta.pkl; None where it has no vocab_size.

    Only strings, numbers and dictionaries are read; a pickle that names any class or function is refused before anything of
    it is called. DatasetError where it holds anything else or contradicts itself.
    """
    advice = "Remove it if the folder is what you mean to read: its ids are then taken as they are."
    try:
        if path.stat().st_size > LARGEST_PICKLE:
            raise ValueError(f"it has more than {LARGEST_PICKLE:,} bytes")
        content = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        _check_plain(content)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror}).") from None
    except Exception as error:  # pickle raises a dozen kinds for damaged bytes
        raise DatasetError(
            f"{path} is not read: a vocabulary is made of strings, numbers and dictionaries, and this file is not"
            f" ({error}). {advice}"
        ) from None
    size = content.get("vocab_size")
    if size is None:
        return None
    itos, stoi = content.get("itos"), content.get("stoi")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise DatasetError(f"{path} has the vocab_size {size!r}, which is no number of ids. {advice}")
    if not isinstance(itos, dict) or not isinstance(stoi, dict) or set(itos) != set(range(size)):
        return Vocabulary(size, "")
    spelled = [itos[i] for i in range(size)]
    if not all(isinstance(text, str) and len(text) == 1 and stoi.get(text) == i for i, text in enumerate(spelled)):
        return Vocabulary(size, "")
    return Vocabulary(size, "".join(spelled))


def _check_plain(content: Any) -> None:
    """ValueError unless it is a dictionary of strings, numbers and dictionaries of strings and numbers."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds {type(content).__name__}, not a dictionary")
    for name, value in content.items():
        for item in [name, *(value.items() if isinstance(value, dict) else [(value,)])]:
            for plain in item if isinstance(item, tuple) else (item,):
                if plain is not None and type(plain) not in (str, int, float, bool):
                    raise ValueError(f"it holds {type(plain).__name__}")


def looks_like_uint32(head: bytes) -> bool:
    """Whether bytes from the start of a .bin file hold uint32 ids and not uint16 ones: every second half is next to nothing.

    An id below 2²⁰ has an upper half below 16. Where the lower halves are small as well, as in a vocabulary of a few
    characters, only zeros count. Of fewer than 64 halves nothing is concluded.
    """
    halves = np.frombuffer(head[: len(head) // 4 * 4], dtype="<u2")
    if len(halves) < 64:
        return False
    low, high = halves[::2], halves[1::2]
    return bool(low.any() and high.max() < LARGEST_HIGH_HALF and (low.max() >= 256 or not high.any()))
