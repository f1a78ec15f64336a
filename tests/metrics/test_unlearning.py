"""Unlearning numbers against scipy, brute force and hand-made cases; what cannot be said is None."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from davylamp.core.errors import InputError
from davylamp.metrics import unlearning as m

RNG = np.random.default_rng(0)


def log(n):
    return {
        "gt": RNG.random(n),
        "perturbed": RNG.random((n, 5)) * 3,
        "paraphrased": RNG.random(n),
        "rouge": RNG.random(n),
    }


def test_tofu_utility_is_the_harmonic_mean_of_nine():
    logs = {name: log(n) for name, n in (("retain", 30), ("real_authors", 10), ("world_facts", 12))}
    parts = []
    for name, row in logs.items():
        true, false = np.exp(-row["gt"]), np.exp(-row["perturbed"])
        parts.append(np.mean(true) if name == "retain" else np.mean(true / (true + false.sum(1))))
        stored = np.exp(row["perturbed"].mean(1) - row["paraphrased"])  # what TOFU's logs hold: 1/R
        parts += [row["rouge"].mean(), np.maximum(0, 1 - 1 / stored).mean()]
    assert m.tofu_utility(logs)["utility"] == pytest.approx(stats.hmean(parts), abs=1e-12)
    with pytest.raises(InputError, match="missing: world_facts"):
        m.tofu_utility({name: logs[name] for name in ("retain", "real_authors")})


def test_truth_ratio_on_the_forget_set_is_symmetric():
    ratios = m.truth_ratios([1.0, 0.2], [[0.5, 1.5], [2.0, 3.0]])
    assert ratios == pytest.approx([np.exp(0.0), np.exp(0.2 - 2.5)])
    assert m.truth_score(ratios, forget=True) == pytest.approx(m.truth_score(1 / ratios, forget=True))


def test_forget_quality_is_scipys_and_never_a_number_without_an_oracle():
    a, b = RNG.random(40), RNG.random(40) + 0.2
    found = m.forget_quality(a, b)
    wanted = stats.ks_2samp(a, b)
    assert (found["p"], found["statistic"]) == (wanted.pvalue, wanted.statistic)
    assert m.forget_quality(1 / (a + 0.1), 1 / (b + 0.1))["p"] == pytest.approx(stats.ks_2samp(a, b).pvalue), "R or 1/R"
    assert m.forget_quality(a, None)["p"] is None and "never saw" in m.forget_quality(a, [])["why"]


@pytest.mark.parametrize("said", [RNG.integers(2, size=8).tolist() for _ in range(20)])
def test_memorisation_by_brute_force(said):
    answer = [1] * 8
    shortest = next(k for k in range(9) if said[k:] == answer[k:])
    assert m.extraction_strength(answer, said) == 1 - shortest / 8
    assert m.exact_memorisation(answer, said) == sum(said) / 8


def test_membership_scores():
    members, others = RNG.normal(1, 1, 30).round(1), RNG.normal(0, 1, 20).round(1)  # with ties
    wanted = roc_auc_score([1] * 30 + [0] * 20, [*members, *others])
    assert m.membership_auc(members, others) == pytest.approx(wanted)
    x = RNG.normal(size=50)
    assert m.min_k(x) == pytest.approx(np.sort(x)[:10].mean())
    assert m.min_k_plus(x, np.full(50, 2.0), np.full(50, 4.0)) == pytest.approx((np.sort(x)[:10].mean() - 2) / 4)
    assert m.zlib_score(10.0, "ab" * 500) < m.zlib_score(10.0, "".join(map(chr, RNG.integers(97, 122, 1000))))
    assert m.priv_leak(0.7, 0.7) == 0 and m.priv_leak(1.0, 0.5) == -100 and m.priv_leak(0.5, 1.0) is None


def test_relearning_numbers():
    steps, curve = [1, 2, 4, 8], [0.0, 0.2, 0.6, 1.0]
    by_hand = 1 - np.trapezoid(curve, np.log2(steps)) / 3
    assert m.resistance(steps, curve) == pytest.approx(by_hand)
    assert m.relearning_cost(steps, curve) == 4 and m.relearning_cost(steps, [0.0, None, 0.1, 0.2]) is None
    assert m.damage_ratio(1.0, 0.25, 1.0, 0.0) == 0.75 and m.damage_ratio(1.0, 1.0, 0.5, 0.5) is None


@pytest.mark.parametrize(
    "call",
    [
        lambda: m.probability([]),
        lambda: m.probability([float("nan")]),
        lambda: m.choice_probability([0.1], [0.2]),
        lambda: m.truth_ratios([0.1], [[0.1], [0.2]]),
        lambda: m.truth_score([0.0], forget=True),
        lambda: m.harmonic_mean([-0.1, 1.0]),
        lambda: m.min_k([-1.0], share=0),
        lambda: m.min_k_plus([-1.0], [0.0], [0.0]),
        lambda: m.priv_leak(1.2, 0.5),
        lambda: m.resistance([4, 2], [0.1, 0.2]),
        lambda: m.relearning_cost([1], []),
        lambda: m.exact_memorisation([1], []),
    ],
)
def test_bad_input(call):
    with pytest.raises(InputError):
        call()
