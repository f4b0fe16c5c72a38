"""Lists of seeds and labels as text: "0-63,70"."""

from __future__ import annotations

import re
from collections.abc import Sequence


def parse_integers(text: str, name: str) -> list[int]:
    """ "0-63,70" -> [0, ..., 63, 70]. Raises ValueError for anything else."""
    out: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", item)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise ValueError(f"{name}: expected numbers and ranges such as 0-63,70, got {text!r}")
        if last >= 2**63 or last - first >= 10**8:
            raise ValueError(f"{name}: expected numbers below 2^63, at most 10^8 of them, got {text!r}")
        out.extend(range(first, last + 1))
    return out


def format_integers(values: Sequence[int]) -> str:
    """[0, 1, 2, 7] -> "0-2,7": the shortest text that :func:`parse_integers` reads as these."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
