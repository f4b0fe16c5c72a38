"""``imm study``: what a study writes, that it resumes, and that a broken premise fails its criteria."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import torch
from command_line import call

from imm.cli import commands
from imm.studies import (
    STUDIES,
    TOYS,
    Criterion,
    Result,
    Study,
    axes,
    capacity,
    factorisation,
    losses,
    particles,
    second_time,
    toys,
)

CPU = torch.device("cpu")


def failed(result: Result) -> list[str]:
    """The claims that do not hold."""
    return [one.claim for one in result.criteria if not one.holds]


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
    assert {"all", *STUDIES} == set(commands.STUDIES)


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
    assert losses.summary(rows) in (docs / "learn" / "losses.md").read_text()
    assert {"imm", "fm", "consistency", "shortcut", "progressive"} <= {row["loss"] for row in rows}
    held = [one for one in losses.criteria(rows, losses.FULL) if one.holds]
    assert len(held) == 6
    section = (docs / "learn" / "losses.md").read_text().split("At equal seconds")[1]
    found = re.findall(r"^\| `(\w+)` \| (\d+) \| (.+) \| (.+) \|$", section, re.MULTILINE)
    assert [line[0] for line in found] == losses.FULL.losses
    for loss, step, *cells in found:
        for evaluations, cell in enumerate(cells, 1):
            where = {"loss": loss, "seed": 0, "step": int(step), "evaluations": evaluations}
            (row,) = [row for row in rows if row.items() >= where.items()]
            assert cell == f"{row['label_match']:.0%} / {row['spread']:.0%} / {row['mmd'] * 1000:.1f}"
    rows = json.loads((docs / "studies" / "axes.json").read_text())
    assert axes.summary(rows) in (docs / "learn" / "tokens.md").read_text()
    page, found = (docs / "learn" / "why.md").read_text(), {}
    rooms = {"capacity": capacity, "second-time": second_time, "particles": particles, "factorisation": factorisation}
    for name, room in rooms.items():
        found[name] = json.loads((docs / "studies" / f"{name}.json").read_text())
        assert room.summary(found[name]) in page
    checks = [*second_time.criteria(found["second-time"]), *factorisation.criteria(found["factorisation"])]
    checks += particles.criteria(found["particles"], particles.consistency_gap())
    assert len(checks) == 6 + 14 + 8
    assert all(one.holds for one in checks)


def test_all_runs_the_short_forms_and_quick_the_toys_and_fails_where_one_criterion_does(tmp_path, monkeypatch) -> None:
    ran: list[tuple[str, str, bool]] = []

    def study(name: str) -> Study:
        result = lambda holds=True: Result([{"a": 1.5}], [Criterion(f"{name} holds", float(holds), low=1)], [("a", "figure")])

        def run(folder: Path, quick: bool, device: torch.device, say: object) -> Result:
            ran.append((name, folder.name, quick))
            return result(name != "axes")

        def short(folder: Path, device: torch.device, say: object) -> Result:
            ran.append((name, folder.name, True))
            return result()

        return Study(f"Title of {name}", run, short if name == "losses" else None)

    for name in STUDIES:
        monkeypatch.setitem(STUDIES, name, study(name))
    call("study", "all", "--quick", f"--out={tmp_path / 'quick'}")
    assert ran == [(name, name, True) for name in TOYS]
    page = (tmp_path / "quick" / "report.html").read_text()
    assert [name for name in STUDIES if f"Title of {name}" in page and f"{name} holds" in page] == list(TOYS)
    assert json.loads((tmp_path / "quick" / "particles" / "rows.json").read_text()) == [{"a": 1.5}]
    ran.clear()
    output = call("study", "all", f"--out={tmp_path / 'long'}", ok=False).output  # that of axes
    assert ran == [(name, name, name == "losses") for name in STUDIES]
    assert output.count("PASSED") == len(STUDIES) - 1
    ran.clear()
    call("study", "losses", f"--out={tmp_path / 'losses'}")
    assert ran == [("losses", "losses", False)]


def test_the_short_form_of_the_losses_fails_where_flow_matching_needs_no_steps() -> None:
    good = {"step": losses.SHORT.steps, "seed": 0, "spread": 0.8}
    table = [{**good, "loss": "imm", "evaluations": n, "mmd": 0.005} for n in (1, 2, 4, 8)]
    table += [{**good, "loss": "fm", "evaluations": n, "mmd": 0.08 / n} for n in (1, 2, 4, 8)]
    table[4]["spread"] = 0.2
    assert [one.claim for one in losses.criteria(table, losses.SHORT) if not one.holds] == []
    table[4:] = [{**row, "loss": "fm"} for row in table[:4]]
    assert len([one for one in losses.criteria(table, losses.SHORT) if not one.holds]) == 2


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


def test_the_study_of_the_second_time_fails_where_s_is_hidden_in_the_run_that_is_given_it(tmp_path, monkeypatch) -> None:
    plan = second_time._Plan({second_time.SQUARES: 900}, 2048, 500)
    monkeypatch.setattr(second_time, "QUICK", plan)
    monkeypatch.setattr(second_time, "BATCH", 256)
    assert failed(second_time.run(tmp_path, True, CPU, print)) == []
    monkeypatch.setattr(second_time, "plots", lambda: None)
    monkeypatch.setattr(toys, "flow_map", lambda dim, given_s=True, make=toys.flow_map: make(dim, given_s=False))
    broken = failed(second_time.run(tmp_path, True, CPU, print))
    assert broken[0] == "least squares: energy distance of one step, s hidden over s given"


def test_one_particle_is_a_consistency_loss_and_more_are_not() -> None:
    assert particles.consistency_gap() < 1e-12
    assert particles.consistency_gap(4) > 0.01


def test_the_study_of_particles_fails_where_m_is_ignored(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(particles, "QUICK", particles._Plan({3: (0,)}, (1, 4, 16), 800))
    monkeypatch.setattr(particles, "BATCH", 128)
    monkeypatch.setattr(particles, "POINTS", 500)
    assert failed(particles.run(tmp_path, True, CPU, print)) == []
    monkeypatch.setattr(particles, "objective_of", lambda model, m, k, make=particles.objective_of: make(model, 1, k))
    monkeypatch.setattr(particles, "plots", lambda: None)
    broken = failed(particles.run(tmp_path, True, CPU, print))
    assert broken[:2] == [f"k = 3: energy distance of one step, M = {few} over M = {many}" for few, many in ((1, 4), (4, 16))]


def test_masked_diffusion_at_its_optimum_is_exact_one_token_at_a_time_and_a_product_in_one_step() -> None:
    generator = torch.Generator().manual_seed(0)
    for make, share in ((factorisation.hands, 13 / 18), (factorisation.mirror, 1 - 4**-4), (factorisation.walk, 1 - 0.4**7)):
        language = make()
        length = language.strings.shape[1]
        assert math.isclose(factorisation.independent(language), share, rel_tol=1e-12)
        for order in (None, torch.arange(length), torch.arange(length).flip(0)):
            one_by_one = factorisation.masked(language, factorisation.linear(length, length), 500, generator, order)
            assert language.scores(one_by_one)["invalid"] == 0
        at_once = factorisation.masked(language, axes.cosine(length, 1), 4000, generator)
        assert abs(language.scores(at_once)["invalid"] - share) < 0.03
        marginals = torch.stack([torch.bincount(column, minlength=len(language.letters)) for column in at_once.T]) / 4000
        torch.testing.assert_close(marginals.double(), language.one_hot.mean(0), rtol=0, atol=0.04)
    mirror = factorisation.mirror()
    halves = factorisation.masked(mirror, [0, 4, 8], 500, generator, torch.arange(8))
    assert mirror.scores(halves)["invalid"] == 0


def test_no_product_of_tokens_is_below_the_proved_bound_and_the_search_is_near_it() -> None:
    for make, found in ((factorisation.hands, 0.489), (factorisation.mirror, 0.9376)):
        language = make()
        least = factorisation.least_variation(language)
        logits = 3 * torch.randn(2000, *language.one_hot[0].shape, dtype=torch.float64)
        of_string = sum(logits.log_softmax(2)[:, i, language.strings[:, i]] for i in range(language.strings.shape[1])).exp()
        variation = 1 - of_string.clamp(max=1 / len(language.strings)).sum(1)
        tv, product = factorisation.best_product(language, 60, 400)
        assert least <= tv < found
        assert least <= variation.min()
        torch.testing.assert_close(product.sum(1), torch.ones(len(product), dtype=torch.float64))
    assert math.isclose(factorisation.least_variation(factorisation.mirror()), 15 / 16)
    assert math.isclose(factorisation.least_variation(factorisation.hands()), 1 - 3**-0.5)


def test_the_study_of_factorisation_fails_where_tokens_have_unlike_noise(tmp_path, monkeypatch) -> None:
    hands = dataclasses.replace(factorisation.hands(), training=400)
    monkeypatch.setattr(factorisation, "hands", lambda: hands)
    monkeypatch.setattr(factorisation, "QUICK", factorisation._Plan((factorisation.hands,), 5000, 20))
    assert failed(factorisation.run(tmp_path, True, CPU, print)) == []

    def unlike(model, language, seeds, steps, drawn=factorisation.drawn):
        count, length = len(seeds), language.strings.shape[1]
        whole = drawn(model, language, range(count * length), steps)
        return torch.stack([whole[i * count : (i + 1) * count, i] for i in range(length)], 1)

    monkeypatch.setattr(factorisation, "drawn", unlike)
    assert failed(factorisation.run(tmp_path, True, CPU, print)) == [
        "hands: flow map, one step: total variation over the least of any product",
        "hands: flow map, one step: invalid",
        "hands: flow map, one step: total variation",
    ]
