"""Whether numbers of two evaluations may stand side by side."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from imm.evaluation.evaluate import FORMAT_VERSION, METRICS

#: Fields of the protocol that must agree for every metric. What was generated (network, seeds, steps, guidance) may differ, for
#: that is what is compared; so may the machine, the number of processes and library versions, which change rounding only.
ALIKE = (
    ("images", "count"),
    ("images", "shape"),
    ("images", "resize"),
    ("reference", "digest"),
    ("quantisation",),
)
#: Fields of a feature network that must agree for the metrics that use it.
ALIKE_FEATURES = ("sha256", "preprocessing")
#: Fields that may differ but are reported.
SAID = (("reference", "split"), ("device",), ("processes",))


def read_result(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``imm eval --out`` wrote. Raises ValueError for another file or a newer format."""
    try:
        result = json.loads(Path(path).read_text())
        version = result["format_version"]
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ValueError(f"format {version}, newer than {FORMAT_VERSION}")
        numbers = result["metrics"].items()
        if any(not isinstance(value, int | float) or name.split(".")[0] not in METRICS for name, value in numbers):
            raise ValueError("metrics of another kind")
        for part in ("images", "reference", "features", "settings", "versions"):
            result["protocol"][part].items()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: expected what imm eval --out wrote, got {type(error).__name__}: {error}") from error
    return result


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Why the two results cannot be compared, one line a field; empty if they can be."""
    a, b = first["protocol"], second["protocol"]
    shared = [name for name in a["settings"] if name in b["settings"]]
    if not shared:
        return [f"metrics: {', '.join(a['settings'])} and {', '.join(b['settings'])} have none in common"]
    places: list[tuple[str, ...]] = list(ALIKE)
    for network in dict.fromkeys(METRICS[name].features for name in shared):
        if network is not None:
            places += [("features", network, field) for field in ALIKE_FEATURES]
    for name in shared:
        fields = dict.fromkeys([*a["settings"][name], *b["settings"][name]])
        places += [("settings", name, field) for field in fields if field != "what"]
    return _unlike(a, b, places)


def remarks(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """What differs and may, one line a field."""
    a, b = first["protocol"], second["protocol"]
    both = [one.get("generation") for one in (a, b)]
    # Where one is not of ours, one line, and not one for each of the other's fields.
    generation = dict.fromkeys([leaf for one in both for leaf in _flat(one)] if all(both) else [()])
    versions = dict.fromkeys([*a["versions"], *b["versions"]])
    packages = [("features", network, "package") for network in a["features"] if network in b["features"]]
    return _unlike(
        a,
        b,
        [
            ("images", "seeds"),
            *(("generation", *key) for key in generation),
            *packages,
            *(("versions", key) for key in versions),
            *SAID,
        ],
    )


def _unlike(a: dict[str, Any], b: dict[str, Any], places: list[tuple[str, ...]]) -> list[str]:
    out = []
    for place in places:
        values = [_at(one, place) for one in (a, b)]
        if values[0] != values[1]:
            out.append(f"{'.'.join(place)}: {_short(values[0])} and {_short(values[1])}")
    return out


def _at(value: Any, place: tuple[str, ...]) -> Any:
    for key in place:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _flat(value: Any, place: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in _flat(inner, (*place, key))]
    return [place] if place else []


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def side_by_side(first: dict[str, Any], second: dict[str, Any], names: tuple[str, str]) -> list[str]:
    """The numbers as aligned lines; "-" where one has none."""
    numbers = list(dict.fromkeys([*first["metrics"], *second["metrics"]]))
    show = lambda value: "-" if value is None else f"{value:.6g}"
    rows = [["", *names]] + [[n, show(first["metrics"].get(n)), show(second["metrics"].get(n))] for n in numbers]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in rows]
