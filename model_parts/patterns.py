"""Layer patterns: which block each layer is, as a user writes it."""

from __future__ import annotations

from collections.abc import Sequence


def shortest_pattern(names: tuple[str, ...]) -> str:
    """One block name a layer → the shortest pattern, as a user types it: ('a', 'a', 'b', 'a', 'a', 'b') → 'a*2,b'."""
    period = next(p for p in range(1, len(names) + 1) if (names[:p] * len(names))[: len(names)] == names)
    pieces: list[list] = []
    for name in names[:period]:
        if pieces and pieces[-1][0] == name:
            pieces[-1][1] += 1
        else:
            pieces.append([name, 1])
    return ",".join(name if count == 1 else f"{name}*{count}" for name, count in pieces)


def expand_pattern(pattern: str | Sequence[str], n_layer: int) -> tuple[str, ...]:
    """A layer pattern, text or sequence, as one block name a layer, repeated up to n_layer.

    'a*2,b' with n_layer 6 → a a b a a b. Raises ValueError when it is empty, longer than n_layer or has a bad count.
    """
    pieces = pattern.split(",") if isinstance(pattern, str) else list(pattern)
    if not pieces:
        raise ValueError("layer_pattern is empty; name at least one block, e.g. 'transformer'.")
    names: list[str] = []
    for piece in (str(p).strip() for p in pieces):
        name, star, count = piece.partition("*")
        if not name or (star and not (count.strip().isdigit() and int(count) > 0)):
            raise ValueError(
                f"layer_pattern has the piece {piece!r}; write block names separated by commas, name*k for k of them."
            )
        names += [name.strip()] * (int(count) if star else 1)
    if len(names) > n_layer:
        raise ValueError(
            f"layer_pattern names {len(names)} layers but n_layer={n_layer}; shorten it or use n_layer={len(names)}."
        )
    return tuple((names * -(-n_layer // len(names)))[:n_layer])
