"""The parts of vl_adaptation: angles and conflicts against numpy, the choice of a coefficient, the probe of modalities, the report."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("PIL")
torch.set_num_threads(1)

from davylamp.core.errors import InputError  # noqa: E402
from davylamp.models import organism, vision  # noqa: E402
from davylamp.models.four_way import FourWay, Outcome  # noqa: E402
from davylamp.report.figures import views  # noqa: E402
from davylamp.studies import _vl_arms as made  # noqa: E402
from davylamp.studies import _vl_layers as inside  # noqa: E402
from davylamp.studies import vl_adaptation as study  # noqa: E402
from tests import tiny  # noqa: E402


def scored(refusal, over_refusal, capability, task, n=100):
    out = []
    for part, label, other, share in (
        ("hazards", "refused", "complied", refusal),
        ("benign", "refused", "complied", over_refusal),
        ("capability", "complied", "nonresponsive", capability),
        ("task", "complied", "nonresponsive", task),
    ):
        out += [Outcome(f"{part}{i}", part, label if i < round(share * n) else other) for i in range(n)]
    return FourWay(tuple(out))


VL = scored(0.0, 0.0, 0.7, 0.9)


# --- choosing ---------------------------------------------------------------------------------------------------------------
def test_the_middle_of_the_coefficients_that_reach_every_goal_is_chosen():
    curve = {
        0.1: scored(0.5, 0, 0.7, 0.9),
        0.2: scored(0.86, 0, 0.7, 0.9),
        0.3: scored(0.95, 0.02, 0.7, 0.9),
        0.4: scored(1, 0.09, 0.66, 0.86),
        0.5: scored(1, 0.4, 0.6, 0.8),
    }
    assert made.choose(curve, VL) == (0.3, True)


def test_where_no_coefficient_reaches_the_goals_it_is_said():
    weight, reached = made.choose({0.2: scored(0.4, 0, 0.7, 0.9), 0.5: scored(1, 0.9, 0.1, 0.9)}, VL)
    assert weight == 0.2 and not reached


def test_the_sources_rule_takes_the_smallest_that_is_near_both_or_says_that_none_is():
    safe = scored(1.0, 0.9, 0.0, 0.3)
    curve = {0.1: scored(0.5, 0, 0.7, 0.9), 0.2: scored(0.9, 0, 0.69, 0.9), 0.3: scored(1, 0, 0.7, 0.9)}
    assert made.smallest(curve, VL, safe) == 0.2  # 0.69 is within 2 % of 0.7
    assert made.smallest({0.2: scored(0.9, 0, 0.68, 0.9), 0.3: scored(0.89, 0, 0.7, 0.9)}, VL, safe) is None


def test_the_front_holds_what_no_other_beats():
    curve = {
        0.1: scored(0.5, 0, 0.7, 0.9),
        0.2: scored(0.9, 0, 0.7, 0.9),
        0.3: scored(0.9, 0.1, 0.6, 0.9),
        0.4: scored(1, 0.4, 0.1, 0.8),
    }
    assert made.pareto(curve) == [0.2, 0.4]


# --- layers -----------------------------------------------------------------------------------------------------------------
def test_divergence_against_numpy():
    text = tiny.jittered("llama")
    adapted, safe = tiny.near(text, 1), None
    safe = tiny.near(adapted, 2)
    found = inside.divergence(text, adapted, safe)
    assert len(found) == 2
    for layer, row in enumerate(found):
        cosines, conflicts, moved = [], [], []
        for name, p in text.named_parameters():
            if f"layers.{layer}." not in name or p.dim() != 2:
                continue
            w0, w1, w2 = (
                dict(m.named_parameters())[name].detach().double().numpy().ravel() for m in (text, adapted, safe)
            )
            u, v = w1 - w0, w2 - w1
            cosines.append(u @ v / np.linalg.norm(u) / np.linalg.norm(v))
            k = round(0.2 * u.size)
            both = list(set(np.argsort(-abs(u))[:k]) & set(np.argsort(-abs(v))[:k]))
            conflicts.append(np.mean(np.sign(u[both]) != np.sign(v[both])))
            moved.append(np.linalg.norm(u) / np.linalg.norm(w0))
        assert row["cosine"] == pytest.approx(np.mean(cosines), abs=1e-9)
        assert row["conflict"] == pytest.approx(np.mean(conflicts), abs=1e-9)
        assert row["moved"] == pytest.approx(np.mean(moved), abs=1e-9)


def test_one_direction_is_seen_as_one_and_its_way_back_as_a_conflict():
    """The control of the layer claim: a safety update along the adaptation must not pass for a divergence."""
    text = tiny.jittered("llama")
    adapted = tiny.near(text, 1)
    further, back = copy.deepcopy(adapted), copy.deepcopy(adapted)
    with torch.no_grad():
        for p, q, r, s in zip(*(m.parameters() for m in (text, adapted, further, back)), strict=True):
            r.add_(q - p)
            s.sub_(q - p)
    assert all(row["cosine"] > 0.99 and row["conflict"] < 0.01 for row in inside.divergence(text, adapted, further))
    assert all(row["cosine"] < -0.99 and row["conflict"] > 0.99 for row in inside.divergence(text, adapted, back))


def test_nothing_adapted_and_nothing_tuned_are_errors():
    text = tiny.jittered("llama")
    adapted = tiny.near(text, 1)
    with pytest.raises(InputError, match="nothing was adapted"):
        inside.divergence(text, copy.deepcopy(text), adapted)
    with pytest.raises(InputError, match="nothing was tuned"):
        inside.divergence(text, adapted, copy.deepcopy(adapted))


# --- whole, as small as it can be -------------------------------------------------------------------------------------------
@pytest.fixture
def tiny_study(monkeypatch):
    monkeypatch.setattr(made, "PROBES", {"quick": {"hazards": 16, "lookalikes": 8, "benign": 12, "capability": 12}})
    monkeypatch.setattr(made, "SHOWN", {"quick": 12})
    monkeypatch.setattr(made, "RECIPE", {name: (2, lr) for name, (_, lr) in made.RECIPE.items()})
    monkeypatch.setattr(made, "ROWS", {name: 8 if name != "pictures" else 16 for name in made.ROWS})
    monkeypatch.setattr(made, "CHECKPOINTS", (1, 2))
    monkeypatch.setattr(study, "SCREENED", {"quick": (0.25,)})


@pytest.mark.slow
def test_arms_ends_and_methods_of_merging(tiny_study):
    arms = made.build(0, "quick", extra=True)
    assert set(arms.models) == {"stage 1", "VL", "VL-safe", "gentle", "multi-task", "VL-DPO"}
    assert set(arms.course) == {1} and set(arms.beside) == {0, 1, 2}
    vl, safe = arms.models["VL"], arms.models["VL-safe"]
    assert (
        study._apart(made.merged(arms, "VL-safe", 0.0), vl)
        == 0.0
        == study._apart(made.merged(arms, "VL-safe", 1.0), safe)
    )
    half = dict(made.merged(arms, "VL-safe", 0.5, method="task_arithmetic").named_parameters())
    for name, p in made.merged(arms, "VL-safe", 0.5).named_parameters():
        assert torch.allclose(p.detach(), half[name].detach(), atol=1e-5), (
            name
        )  # with a = 1 the task form is the linear one
    for method in ("slerp", "ties", "dare"):
        made.merged(arms, "VL-safe", 0.25, method=method)
    with pytest.raises(InputError, match="no ingredient"):
        made.merged(arms, "text", 0.25, method="ties")
    moved = made.random_direction(arms, "VL-safe", 1.0, np.random.default_rng(0))
    for (name, p), q, r in zip(moved.named_parameters(), vl.parameters(), safe.parameters(), strict=True):
        assert float((p - q).detach().norm()) == pytest.approx(float((r - q).detach().norm()), rel=1e-3, abs=1e-7), name
    probed = made.modality_probe(
        vl, arms.tokenizer, [c for c in arms.questions.test[0] if c.meta["set"] == "hazards"], np.random.default_rng(0)
    )
    assert set(probed) == {"text", "text, blank picture", "text, neutral picture", "typographic picture", "reading"}
    assert probed["reading"].estimate("task").value < 0.5  # blind, as an organism must be


@pytest.mark.slow
def test_the_study_gives_claims_and_figures_that_the_report_draws(tiny_study):
    pairs, figures = study.vl_adaptation(seeds=(0,))
    assert sum(claim is not None and claim.control for claim, _ in pairs) >= 5
    assert len(views(figures)) == 5
    apart = next(e for claim, e in pairs if claim is not None and claim.quantity == "apart")
    assert apart.value == 0.0
    with pytest.raises(InputError, match="seed"):
        study.vl_adaptation(seeds=())


def test_the_two_parts_share_no_item():
    asked = made.questions(0, "quick")
    groups = [{case.group or case.id for case in half[0]} for half in (asked.select, asked.test)]
    assert not groups[0] & groups[1] and all(len(group) > 8 for group in groups)
    assert not {c.messages[0].media for c in asked.select[1]} & {c.messages[0].media for c in asked.test[1]}


def test_gradients_of_one_batch_agree_with_themselves():
    vl = vision.build(*organism.load("aligned"), rng=np.random.default_rng(0))
    rows = vision.picture_rows(4, np.random.default_rng(1))
    tok = organism.tokenizer()
    assert inside.gradient_cosines(vl, tok, rows, rows) == pytest.approx([1.0] * 4)
    assert all(p.grad is None for p in vl.parameters())


@pytest.mark.slow
def test_what_the_full_size_adds(tiny_study, monkeypatch):
    monkeypatch.setattr(made, "PROBES", {"quick": {"hazards": 30, "benign": 30, "capability": 6}})
    monkeypatch.setattr(study, "GRID", (0.0, 0.05, 0.1, 0.5, 0.95, 1.0))  # its inner points, two by two: 0.1
    arms = made.build(0, "quick", extra=True)
    (ways,) = study._more_merges(arms)
    assert len(ways["rows"]) == 3 * 5 + 2 and {row[2] for row in ways["rows"]} == {0.1}
    drawn = study._inside(arms, 0)
    assert len(drawn) == 3 and len(views([ways, *drawn])) == 4  # where they part, how far each moved, what a swap does
