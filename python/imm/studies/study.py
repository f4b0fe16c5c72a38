"""What a study gives: rows, figures, criteria. Its page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Criterion:
    """A claim with its figure.

    Attributes:
        claim: in words. value: what was found. low, high: bounds that it must lie in; None for none.
    """

    claim: str
    value: float
    low: float | None = None
    high: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the figure lies within its bounds; NaN lies in none."""
        above = self.low is None or self.value >= self.low
        below = self.high is None or self.value <= self.high
        return self.value == self.value and above and below

    def __str__(self) -> str:
        bounds = [
            f"at least {self.low:g}" if self.low is not None else "",
            f"at most {self.high:g}" if self.high is not None else "",
        ]
        wanted = " and ".join(bound for bound in bounds if bound)
        return f"{'PASSED' if self.holds else 'FAILED'}: {self.claim}: {self.value:.4g}" + (
            f" (wanted {wanted})" if wanted else ""
        )


@dataclass
class Result:
    """What a study found.

    Attributes:
        rows: figures, one dictionary a row, of JSON's types. criteria: what must hold. columns: of the table, in order, as
            (name in a row, title). figures: PNG files of the study's folder with their captions. text: paragraphs that say what
            the study shows, where it does not hold, and why. summary: a short table in Markdown, for the documentation.
    """

    rows: list[dict[str, Any]]
    criteria: list[Criterion]
    columns: Sequence[tuple[str, str]]
    figures: list[tuple[Path, str]] = field(default_factory=list)
    text: Sequence[str] = ()
    summary: str = ""

    def table(self) -> list[list[str]]:
        """The rows as cells."""
        return [[_cell(row.get(name)) for name, _ in self.columns] for row in self.rows]


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table as Markdown has it."""
    rows = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


@dataclass(frozen=True)
class Study:
    """A title and what runs the study: (folder, quick, device, say) -> :class:`Result`. One with a ``short`` form, which
    ``imm study all`` runs, is long: stopped, it resumes in its folder."""

    title: str
    run: Callable[[Path, bool, Any, Callable[[str], None]], Result]
    short: Callable[[Path, Any, Callable[[str], None]], Result] | None = None


def plots() -> Any:
    """matplotlib's pyplot, which writes to files; None where it is not installed (the extra plots)."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
