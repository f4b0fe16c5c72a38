"""What a checkpoint says about its classes and its sampler, and the class that a user asks for."""

from __future__ import annotations

import difflib
from typing import Any

from imm.objectives import SAMPLED_BY

#: ``--class`` without a class: unconditional images.
NONE = "none"


def class_names_of(extra: Any) -> list[str]:
    """The names that a checkpoint keeps; none for one without."""
    data = extra.get("data") if isinstance(extra, dict) else None
    names = data.get("class_names") if isinstance(data, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else []


def method_of(extra: Any, given: str | None) -> str:
    """The sampling method: as given, or what belongs to the loss that a checkpoint's settings name."""
    if given is not None:
        return given
    objective = extra.get("objective") if isinstance(extra, dict) else None
    loss = objective.get("loss") if isinstance(objective, dict) else None
    return SAMPLED_BY.get(str(loss), "pushforward")


def find_class(name: int | str, classes: int, class_names: list[str], net: object) -> int:
    """The label for ``--class``: a class's number, the number of the class of that name, or ``classes`` for "none".

    Raises ValueError for others; for an unknown name with the names that are alike.
    """
    if name == NONE:
        return classes
    if classes == 0:
        raise ValueError("class: expected a class-conditional checkpoint, got one without classes")
    if isinstance(name, int):
        if name >= classes:
            raise ValueError(f"class: expected 0..{classes - 1}, a class's name or {NONE}, got {name}")
        return name
    found = [number for number, known in enumerate(class_names) if known == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"class: expected a name that one class has, got {name!r}, the name of {found}; a number tells")
    if not class_names:
        raise ValueError(f"class: expected a number, for {net} keeps no class names, got {name!r}")
    lowered = {known.lower(): known for known in class_names}
    close = [lowered[one] for one in difflib.get_close_matches(name.lower(), lowered, n=5)] or class_names[:5]
    more = ", ..." if len(class_names) > len(close) else ""
    raise ValueError(f"class: expected a number or a name of {net}, such as {', '.join(close)}{more}, got {name!r}")
