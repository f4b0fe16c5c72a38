"""``imm study``: what a study writes, that it resumes, and that a broken premise fails its criteria."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import torch
from command_line import call

from imm.cli import commands
from imm.studies import STUDIES, Criterion, axes, capacity, losses


def test_a_criterion_says_its_figure_and_fails_outside_its_bounds() -> None:
    assert str(Criterion("spread", 0.71234, low=0.6)) == "PASSED: spread: 0.7123 (wanted at least 0.6)"
    assert str(Criterion("spread", 0.5, low=0.6, high=0.9)) == "FAILED: spread: 0.5 (wanted at least 0.6 and at most 0.9)"
    assert not Criterion("spread", math.nan, low=0.6).holds
    assert Criterion("spread", 0.5).holds


def test_the_study_of_losses_runs_resumes_and_fails_where_a_premise_is_broken(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(losses, "QUICK", losses._Plan(("imm", "fm"), (0,), 4, 2, 20, (16,)))
    out = tmp_path / "study"
    output = call("study", "losses", "--quick", f"--out={out}").output
    assert "imm, seed 0, step 2: label match" in output
    rows = json.loads((out / "rows.json").read_text())
    assert [(r["loss"], r["step"], r["evaluations"]) for r in rows] == [
        *(("imm", 2, n) for n in (1, 2)),
        *(("imm", 4, n) for n in (1, 2, 4, 8)),
        *(("fm", 2, n) for n in (1, 2)),
        *(("fm", 4, n) for n in (1, 2, 4, 8, 16)),
    ]
    assert {r["method"] for r in rows if r["loss"] == "fm"} == {"ddim"}
    (out / "fm-0" / losses.ROWS_FILE).unlink()  # as if it had been stopped there
    again = call("study", "losses", "--quick", f"--out={out}").output
    assert "fm, seed 0, step 4" in again
    assert "imm, seed 0" not in again
    assert json.loads((out / "rows.json").read_text()) == rows
    assert "label match" in (out / "report.html").read_text()

    good = {"label_match": 0.9, "spread": 0.8, "mmd": 0.001, "step": losses.STEPS, "seed": 0}
    table = [{**good, "loss": loss, "evaluations": n} for loss in losses.FULL.losses for n in (1, 64)]
    table = [{**row, "spread": 0.2} if (row["loss"], row["evaluations"]) == ("fm", 1) else row for row in table]
    assert all(one.holds for one in losses.criteria(table, losses.FULL))
    broken = [{**row, "spread": 0.3} if row["loss"] == "imm" else row for row in table]
    assert [one.claim for one in losses.criteria(broken, losses.FULL) if not one.holds] == ["imm, one step: spread"]
    sharp = [{**row, "spread": 0.8} for row in table]
    assert [one.claim for one in losses.criteria(sharp, losses.FULL) if not one.holds] == [
        "fm, one step is the class blur: spread"
    ]
    assert STUDIES.keys() == set(commands.STUDIES)


def test_the_study_of_two_axes_runs_resumes_and_fails_where_a_premise_is_broken(tmp_path, monkeypatch) -> None:
    counts = {"flow matching": (1, 2), "energy score, latent": (1,), "IMM on frozen z": (2,)}
    monkeypatch.setattr(axes, "QUICK", axes._Plan(4, 4, 20, counts))
    out = tmp_path / "study"
    call("study", "axes", "--quick", f"--out={out}")
    rows = json.loads((out / "rows.json").read_text())
    sampled = [(row["head"], row["order"], row["steps"], row["passes"]) for row in rows if "slope" in row]
    assert sampled == [
        *(("flow matching", "raster", n, 16) for n in (1, 2)),
        ("energy score, latent", "raster", 1, 16),
        ("IMM on frozen z", "raster", 2, 16),
        *(("energy score, latent", "swap", n, 32) for n in (1, 2)),
        *(("energy score, latent", "masked", 1, n) for n in (1, 4, 16)),
    ]
    assert [row["visible"] for row in rows if "forced" in row] == [0, 4, 8, 12] * 4
    (out / "masked.safetensors").unlink()  # as if it had been stopped there
    output = call("study", "axes", "--quick", f"--out={out}").output
    assert "masked: step 4 of 4" in output
    assert "fm: step" not in output
    timeless = lambda rows: [{key: value for key, value in row.items() if key not in ("us", "seconds")} for row in rows]
    assert timeless(json.loads((out / "rows.json").read_text())) == timeless(rows)

    real = {"label_match": 0.8, "spread": 0.9, "mmd": 0.002, "slope": 0.8}
    heads = ("flow matching", "energy score, latent", "IMM on frozen z")
    table = [{**real, "head": head, "order": "raster", "steps": n, "passes": 16} for head in heads for n in (1, 2)]
    table[0]["spread"] = 0.45
    table.append({**real, "slope": 0.05, "head": "energy score, latent", "order": "masked", "steps": 1, "passes": 1})
    assert all(one.holds for one in axes.criteria(table, axes.FULL))
    shuffled = [{**row, "slope": 0.0} for row in table]  # tokens that do not fit together pass all other scores
    broken = [one.claim for one in axes.criteria(shuffled, axes.FULL) if not one.holds]
    assert broken == ["energy score with a latent, one step: slope", "IMM on frozen z, two steps: slope"]


def test_the_masked_order_draws_every_token_once_and_more_passes_see_more() -> None:
    torch.manual_seed(0)
    backbone, labels = axes.Masked().eval(), torch.tensor([1, 2, 3])
    head = axes._head(axes.DIM, parametrization="identity").eval()
    for parameter in (*backbone.parameters(), *head.parameters()):
        torch.nn.init.normal_(parameter, std=0.2)
    seen: list[torch.Tensor] = []
    backbone.register_forward_hook(lambda module, inputs, output: seen.append(inputs[2].sum(1).clone()))
    for iterations, hidden in ((1, [0]), (4, [0, 2, 5, 10]), (16, list(range(16)))):
        seen.clear()
        made = axes.sample_masked(backbone, head, 3, labels, iterations)
        assert made.shape == (3, 16, 16)
        assert bool((made != 0).all())
        assert [int(count[0]) for count in seen] == hidden
        alone = axes.sample_masked(backbone, head, 1, labels[:1], iterations)
        torch.testing.assert_close(alone, made[:1], rtol=1e-4, atol=1e-5)


def test_the_documentations_tables_are_those_of_the_committed_rows() -> None:
    docs = Path(__file__).parent.parent / "docs"
    rows = json.loads((docs / "studies" / "losses.json").read_text())
    assert losses.summary(rows) in (docs / "losses.md").read_text()
    assert {"imm", "fm", "consistency", "shortcut", "progressive"} <= {row["loss"] for row in rows}
    held = [one for one in losses.criteria(rows, losses.FULL) if one.holds]
    assert len(held) == 6
    section = (docs / "losses.md").read_text().split("At equal seconds")[1]
    found = re.findall(r"^\| `(\w+)` \| (\d+) \| (.+) \| (.+) \|$", section, re.MULTILINE)
    assert [line[0] for line in found] == losses.FULL.losses
    for loss, step, *cells in found:
        for evaluations, cell in enumerate(cells, 1):
            where = {"loss": loss, "seed": 0, "step": int(step), "evaluations": evaluations}
            (row,) = [row for row in rows if row.items() >= where.items()]
            assert cell == f"{row['label_match']:.0%} / {row['spread']:.0%} / {row['mmd'] * 1000:.1f}"
    rows = json.loads((docs / "studies" / "axes.json").read_text())
    assert axes.summary(rows) in (docs / "learn" / "tokens.md").read_text()
    assert all(one.holds for one in axes.criteria(rows, axes.FULL))


def test_the_exact_velocity_and_map_of_a_mixture_agree() -> None:
    mixture = capacity.mixtures()["ring of 8"]
    generator = torch.Generator().manual_seed(0)
    data, noise = mixture.sample(20000, generator), 0.5 * torch.randn(20000, 2, dtype=torch.float64, generator=generator)
    t = torch.full((20000, 1), 0.6, dtype=torch.float64)
    x = (1 - t) * data + t * noise
    v = mixture.velocity(x, t)  # the mean of z - x given x_t: what is left does not correlate with any function of x_t
    for function in (x, x.square(), v):
        assert ((noise - data - v) * function).mean().abs() < 0.02
    start, h = x[:50], 1e-4
    moved = mixture.flow(start, t[:50], t[:50] - h, 1)
    torch.testing.assert_close((start - moved) / h, v[:50], rtol=1e-2, atol=1e-3)
    half = torch.full((50, 1), 0.3, dtype=torch.float64)
    through = mixture.flow(mixture.flow(start, t[:50], half), half, torch.zeros_like(half))
    torch.testing.assert_close(through, mixture.flow(start, t[:50], torch.zeros_like(half)), rtol=1e-6, atol=1e-6)


def test_the_study_of_capacity_holds_and_fails_where_the_map_does_not_see_s(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(capacity, "POINTS", 300)
    monkeypatch.setattr(capacity, "SUBSTEPS", 40)
    result = capacity.run(tmp_path, True, torch.device("cpu"), lambda line: None)
    of_data = "energy distance"  # whose figures say little of so few points
    assert [str(one) for one in result.criteria if not one.holds and of_data not in one.claim] == []
    assert {row["rms"] for row in result.rows if row["sampler"] == "flow map" and row["steps"] == 1} == {0.0}
    assert max(row["rms"] for row in result.rows if row["sampler"] == "flow map") < 1e-3
    monkeypatch.setattr(capacity, "flow_map", lambda mixture, given_s, make=capacity.flow_map: make(mixture, False))
    broken = capacity.run(tmp_path, True, torch.device("cpu"), lambda line: None)
    failed = [one.claim for one in broken.criteria if not one.holds]
    assert sum("one step of the flow map" in claim for claim in failed) == 2
