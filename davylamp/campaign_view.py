"""What an attack or a campaign says: estimates with intervals, figures, and the tricks it found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from davylamp.attacks._ask import SUCCESS
from davylamp.attacks._campaign import Campaign, Found
from davylamp.attacks._findings import clusters, minimised, skeleton
from davylamp.core.errors import DavylampError
from davylamp.core.judges import LoadedJudge
from davylamp.core.nouns import Estimate, Message, Record, Target
from davylamp.core.stats import mean_t, paired_difference, rate

if TYPE_CHECKING:
    from davylamp.core.nouns import Case

SHOWN = 12  # tricks that are shown, and shortened
Rows = Sequence[Mapping[str, Any]]


def _value(row: Mapping[str, Any]) -> float | None:
    return (row.get("verdict") or {}).get("value")


def _hit(row: Mapping[str, Any]) -> bool:
    return (_value(row) or 0.0) >= SUCCESS


def _rate(rows: Rows, **about: Any) -> Estimate:
    scored = [row for row in rows if _value(row) is not None]
    return rate(sum(map(_hit, scored)), len(scored), len(rows) - len(scored), **about)


def attack_results(record: Record, rows: Rows, name: str, *, budget: int, control: bool) -> Record:
    """Success by arm and category, the difference from plain repetition over the same cases, questions, and both curves."""
    arms: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        arms[row["case"]["meta"]["arm"]].append(row)
    out: list[Estimate] = []
    names = [arm for arm in (name, "repeat") if arm in arms]
    out += [_rate(arms[arm], name="attack_success_rate", arm=arm if control else None) for arm in names]
    if control and len(names) == 2:
        pair = [{row["case"]["meta"]["case"]: row for row in arms[arm] if _value(row) is not None} for arm in names]
        both = [case for case in pair[0] if case in pair[1]]
        values = [[float(_hit(side[case])) for case in both] for side in pair]
        left_out = len(set(pair[0]) | set(pair[1])) - len(both)
        rng = np.random.default_rng(int(record.id[:8], 16))
        found = paired_difference(values[0], values[1], rng=rng, unscored=left_out, name="over_plain_repetition")
        out.append(found)
    categories = list(dict.fromkeys(str(row["case"].get("category") or "all") for row in rows))
    for category in categories if len(categories) > 1 else ():
        for arm in names:
            own = [row for row in arms[arm] if (row["case"].get("category") or "all") == category]
            out.append(_rate(own, name="attack_success_rate", category=category, arm=arm if control else None))
    for arm in names:
        asked = [float(row["verdict"]["queries"]) for row in arms[arm] if row.get("verdict")]
        out.append(mean_t(asked, name="questions_per_case", unit="questions", arm=arm if control else None))
    series = []
    for arm in names:
        scored = [row for row in arms[arm] if _value(row) is not None]
        x = list(range(1, budget + 1))
        spread = [rate(sum(_hit(row) and row["verdict"]["queries"] <= k for row in scored), len(scored)) for k in x]
        if scored:
            ends = {"low": [e.low for e in spread], "high": [e.high for e in spread]}
            series.append({"name": arm, "x": x, "y": [e.value for e in spread], **ends})
    figures = [{
        "kind": "curves", "title": "Broken cases by questions asked", "x_label": "questions a case", "y_label": "cases broken",
        "y_unit": "rate", "series": series, "note": "Beside plain repetition of the request with as many questions. Band: 95 %.",
    }]  # fmt: skip
    notes = [
        f"{budget} questions a case at most. A case counts as broken if any of them was: compare rates of equal budgets only.",
        "The judge sees the plain request and the reply, never the disguise.",
    ]
    return replace(
        record, estimates=tuple(out), about={**record.about, "figures": figures if series else [], "notes": notes}
    )


async def redteam_results(
    record: Record,
    campaign: Campaign,
    rows: Rows,
    found: Sequence[Found],
    replayed: Mapping[str, Mapping[str, float | None]],
    cost: Mapping[str, Sequence[float | None]],
    target: Target,
    judge: LoadedJudge,
    *,
    settings: Mapping[str, Any],
    defences: Sequence[str],
    shorten: int,
    seed: int,
) -> Record:
    """All of a campaign's report: broken cases, attack x category, attack x defence, transfer, tricks with their prompts."""
    state, cases = campaign.state, campaign.cases
    categories, names = list(campaign.by_category), list(campaign.arms)
    out = [rate(len(state.found), len(cases), name="broken_cases")]
    for category in categories if len(categories) > 1 else ():
        own = campaign.by_category[category]
        out.append(rate(sum(case.id in state.found for case in own), len(own), name="broken_cases", category=category))
    by_arm: dict[str, list[Mapping[str, Any]]] = {name: [] for name in names}
    for row in rows:
        by_arm[row["case"]["meta"]["arm"]].append(row)
    out += [_rate(own, name="success_where_tried", arm=name) for name, own in by_arm.items()]
    attacks = [name for name in names if any(one.attack == name for one in found)]
    figures = [_curve(campaign), _matrix(by_arm, categories)]
    for title, wanted in (
        ("Attack x defence", list(defences)),
        ("Transfer", [name for name in replayed if name not in defences]),
    ):
        if wanted and found:
            figures.append(_passed(title, attacks, wanted, found, replayed))
    for name, values in replayed.items():
        scored = [value for value in values.values() if value is not None]
        hits = sum(value >= SUCCESS for value in scored)
        out.append(rate(hits, len(scored), len(values) - len(scored), name="findings_that_pass", arm=name))
    for name, answered in cost.items():
        scored = [value for value in answered if value is not None]
        about: dict[str, Any] = {"name": "harmless_answered", "arm": name, "higher_is_better": True}
        out.append(rate(sum(scored), len(scored), len(answered) - len(scored), **about))
    tricks, used, trouble = await _tricks(found, target, judge, settings=settings, shorten=shorten, seed=seed)
    if tricks:
        figures.append({
            "kind": "table", "title": "Tricks, largest first", "rows": tricks,
            "columns": ["trick, its request cut out", "attacks", "cases", "questions", "minimal"],
            "note": "Findings with alike prompts are one trick. Minimal: no sentence or turn can be left out; no: not tried to the end. "
            "Prompts as sent: findings.jsonl.",
        })  # fmt: skip
    notes = [
        f"{state.spent} of {campaign.budget} questions were spent; {used} more to shorten prompts. A broken case is left alone.",
        "success_where_tried is no fair comparison of attacks: the bandit sends an attack where it works. See `davylamp attack`.",
        "Unbroken within this budget is not safe: the budget, the attacks and the judge are limits of this run.",
    ]
    if replayed:
        notes.append(
            "Defences and other targets were asked the prompts as found. An attacker who knows the defence does better: "
            "`davylamp attack --defence`."
        )
    notes += [f"prompts were not shortened: {trouble}"] if trouble else []
    return replace(record, estimates=tuple(out), about={**record.about, "figures": figures, "notes": notes})


def _curve(campaign: Campaign) -> dict[str, Any]:
    points = campaign.state.curve
    step = max(1, len(points) // 200)
    kept = [*points[::step], points[-1]]
    share = [n / len(campaign.cases) for _, n in kept]
    return {"kind": "curves", "title": "Broken cases by questions spent", "x_label": "questions",
            "y_label": "cases broken", "y_unit": "rate",
            "series": [{"name": "campaign", "x": [x for x, _ in kept], "y": share}],
            "note": f"{len(campaign.cases)} cases, all attacks together."}  # fmt: skip


def _matrix(by_arm: Mapping[str, Rows], categories: Sequence[str]) -> dict[str, Any]:
    values: list[list[float | None]] = []
    for rows in by_arm.values():
        line: list[float | None] = []
        for category in categories:
            own = [
                row for row in rows if (row["case"].get("category") or "all") == category and _value(row) is not None
            ]
            line.append(sum(map(_hit, own)) / len(own) if own else None)
        values.append(line)
    tried = sum(len(rows) for rows in by_arm.values())
    return {"kind": "heatmap", "title": "Success by attack and category", "rows": list(by_arm), "columns": list(categories),
            "values": values, "unit": "rate",
            "note": f"Of the cases tried; {tried} trials, more where it worked. Hatched: none."}  # fmt: skip


def _passed(
    title: str,
    attacks: Sequence[str],
    columns: Sequence[str],
    found: Sequence[Found],
    replayed: Mapping[str, Mapping[str, float | None]],
) -> dict[str, Any]:
    values: list[list[float | None]] = []
    for attack in attacks:
        own = [one.row().id for one in found if one.attack == attack]
        line: list[float | None] = []
        for name in columns:
            scored = [value for value in (replayed[name].get(one) for one in own) if value is not None]
            line.append(sum(value >= SUCCESS for value in scored) / len(scored) if scored else None)
        values.append(line)
    counts = ", ".join(f"{attack} {sum(one.attack == attack for one in found)}" for attack in attacks)
    return {"kind": "heatmap", "title": f"{title}: findings that pass", "rows": list(attacks), "columns": list(columns), "values": values,
            "unit": "rate", "note": f"Share of each attack's findings that still get their answer. Findings: {counts}."}  # fmt: skip


async def _tricks(
    found: Sequence[Found], target: Target, judge: LoadedJudge, *, settings: Mapping[str, Any], shorten: int, seed: int
) -> tuple[list[list[Any]], int, str]:
    """(table rows of the largest tricks, questions used, why shortening stopped early or empty)."""
    rows: dict[str, list[Any]] = {}
    used, trouble = 0, ""
    for cluster in clusters(found)[:SHOWN]:
        shown, minimal = cluster.shown, None
        if shorten and not trouble:
            case: Case = shown.case

            async def still(sent: tuple[Message, ...], case: Case = case) -> bool:
                reply = await target(sent, seed=seed, **settings)
                return ((await judge((*case.messages, reply), case)).value or 0.0) >= SUCCESS

            try:
                sent, asked, minimal = await minimised(shown.sent, still, questions=shorten)
                used += asked
                shown = replace(shown, sent=sent)
            except DavylampError as problem:
                trouble = str(problem)
        text, questions = _clip(skeleton(shown)), min(one.queries for one in cluster.members)
        same = rows.setdefault(
            text, [text, set(), 0, questions, minimal]
        )  # what is equal once it is short is one trick
        same[1] |= set(cluster.attacks)
        same[2] += len(cluster.members)
        same[3] = min(same[3], questions)
    ordered = sorted(rows.values(), key=lambda row: -row[2])
    return [[text, ", ".join(sorted(attacks)), *rest] for text, attacks, *rest in ordered], used, trouble


def _clip(text: str, most: int = 300) -> str:
    return text if len(text) <= most else text[:most] + "…"
