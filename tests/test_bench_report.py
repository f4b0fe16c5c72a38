"""Figures and the page of a bench run, from synthetic rows: what is drawn, what is written, and what it never contains."""

from __future__ import annotations

import re
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from harness import environment, plots, report, rows
from harness.case import COPY, MATMUL
from harness.rows import OK, Row

HOSTILE = '<script>alert(1)</script> & "$x_'


def timed(op: str, peer: str, us: float, shape: str, *, error: float | None = 1e-6, **values: Any) -> Row:
    """A row whose rounds all took about ``us`` microseconds; without an error a ceiling."""
    values = {"cache": "cold", "commit": "c0ffee", **values}
    row = Row(
        op, "forward", shape, "float32", "cpu", peer=peer, status=OK, threads=2, machine="Some CPU", error=error, **values
    )
    row.bytes, row.flops, row.peak_bytes = 10_000_000, 5_000_000, None if error is None else 20_000_000
    row.timed([[1e-6 * us * factor for factor in (0.9, 1.0, 1.1)]], [[1e-4] * 3])
    return row


def a_run() -> list[Row]:
    """An op with cold and warm buffers, one of products with a hostile name, and one of another commit."""
    shape = "G=8 M=2 D=100"
    found = [timed("mmd", COPY, 10.0, shape, error=None, cache=cache) for cache in ("cold", "warm")]
    for cache in ("cold", "warm"):
        names = ("imm", "imm out=", "eager", "torch.compile of eager", "part: a little")
        found += [timed("mmd", name, 13.7 * (i + 1), shape, cache=cache) for i, name in enumerate(names)]
    refused = timed("mmd", HOSTILE, 1.0, shape)
    refused.status, refused.median_us, refused.peak_bytes = f"refused: {HOSTILE}", None, None
    products = [timed("attention", name, us, "B=2 T=16", error=None) for name, us in ((COPY, 9.0), (MATMUL, 51.0))]
    products += [timed("attention", "imm", 77.0, "B=2 T=16"), timed("attention", "SDPA", 70.0, "B=2 T=16")]
    products += [timed("attention", HOSTILE, 81.0, "B=2 T=16")]
    return [*found, refused, *products, timed("noise", "imm", 123.4, "B=1", commit="0ld")]


def results(folder: Path, found: list[Row]) -> Path:
    rows.write(folder, found)
    recorded = environment.record(torch.device("cpu"))
    recorded.update(commit="c0ffee", machine=f"Some CPU {HOSTILE}", after={"load": 0.1, "clocks": None})
    environment.write(folder, recorded)
    return folder


def text_of(path: Path) -> str:
    """The words of a page, whose elements are all closed."""
    page = path.read_text()
    for tag in ("html", "head", "style", "body", "nav", "a", "h1", "h2", "h3", "p", "pre", "figure", "figcaption"):
        assert len(re.findall(f"<{tag}[ >]", page)) == page.count(f"</{tag}>"), tag
    return unescape(re.sub(r"<[^>]*>", "", re.sub(r"(?s)<style>.*?</style>", "", page)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run, with its figures."""
    return report.make(results(tmp_path_factory.mktemp("results"), a_run()))


def test_figures_are_pngs_of_a_readable_size_and_the_same_rows_give_the_same_bytes(made: Path, tmp_path: Path) -> None:
    found = {path.name: path for path in (made.parent / "plots").iterdir()}
    assert set(found) == {"times-attention-forward.png", "times-mmd-forward.png"}
    again = report.make(results(tmp_path, a_run()))
    for name, path in found.items():
        with Image.open(path) as image:
            assert 600 <= image.width <= 1200
            assert 150 <= image.height <= 1500
            assert len(image.convert("RGB").getcolors(2**24) or ()) > 20  # not an empty sheet
        assert (again.parent / "plots" / name).read_bytes() == path.read_bytes()


def test_the_page_has_every_row_the_summary_and_the_published_ratios(made: Path) -> None:
    text = text_of(made)
    assert all(rows.table(case) in text for case in rows.cases(a_run()[:-1]))
    assert "123.4 us" not in text  # of another commit
    lines = [" ".join(line.split()) for line in text.splitlines()]
    about, rivals = "mmd forward, G=8 M=2 D=100, float32, cold", "4.00 x (torch.compile of eager) 3.00 x (eager)"
    assert f"{about} imm 13.7 us {rivals} 73 % (copy) 1e-06" in lines
    assert any(line.endswith("66 % (product in float32) 1e-06") for line in lines)
    assert f"{about}, {HOSTILE}: refused: {HOSTILE}" in text
    assert f"Some CPU {HOSTILE}" in text
    assert "SDPA / imm, at least 0.95: 0.91 (DOES NOT HOLD)" in text


def test_the_page_is_one_file_and_hostile_names_stay_text(made: Path) -> None:
    page = made.read_text()
    assert set(re.findall(r"<(\w+)", page)) & {"script", "link", "iframe", "object", "base", "form"} == set()
    assert not re.search(r"https?://|url\(|@import|<[^>]* on\w+=", page)
    pictures, links = re.findall('src="([^"]*)"', page), re.findall('href="([^"]*)"', page)
    assert len(pictures) == len(list((made.parent / "plots").iterdir()))
    assert all(source.startswith("data:image/png;base64,") for source in pictures)
    assert links == [f"#{name}" for name in re.findall('<h2 id="([^"]*)"', page)]


def test_a_folder_without_rows_is_an_error_and_matplotlib_is_not_needed(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"results: expected a folder with rows\.csv and environment\.json"):
        report.make(tmp_path)
    with pytest.raises(ValueError, match="results: expected timed rows of commit c0ffee, got none"):
        report.make(results(tmp_path / "none", []))
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said: list[str] = []
    text = text_of(report.make(results(tmp_path, a_run()), said.append))
    assert [line.startswith("no figures: ") and "pip install matplotlib" in line for line in said] == [True]
    assert "matplotlib is not installed" in text


def test_the_table_of_the_page_is_that_of_the_committed_rows() -> None:
    root = Path(__file__).parents[1]
    (results,) = (root / "bench" / "results").glob("*/rows.csv")
    page = (root / "docs" / "internals" / "performance.md").read_text()
    assert rows.overview(rows.read(results)) in page
    assert len(page.splitlines()) <= 150


def test_the_overview_compares_with_the_fastest_of_each_kind(tmp_path) -> None:
    table = rows.overview(a_run()).splitlines()
    assert table[0] == "| op | case | imm | torch.compile | eager torch | roofline |"
    assert len(table) == 2 + len(rows.first_cases(a_run()))
    pytest.importorskip("matplotlib")
    plots.overview(a_run(), tmp_path / "overview.png")
    assert (tmp_path / "overview.png").read_bytes().startswith(b"\x89PNG")
