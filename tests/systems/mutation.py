"""Files that are damaged at random, for readers of files from strangers."""

from __future__ import annotations

from hypothesis import strategies as st


def mutated(content: bytes, data: st.DataObject) -> bytes:
    """Replace, insert and cut bytes in one to four places."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(changed) - 1)))
        how = data.draw(st.sampled_from(["replace", "insert", "cut"]))
        piece = data.draw(st.binary(min_size=1, max_size=4))
        if how == "cut":
            changed = changed[:at]
        else:
            changed[at : at + len(piece) * (how == "replace")] = piece
    return bytes(changed)
