"""Estimates, limits and comparisons as the page shows them: suite by suite, metric by metric, each number as text and as a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from davylamp.core.errors import DavylampError
from davylamp.core.nouns import Estimate
from davylamp.core.policy import Decision
from davylamp.core.rows import digest
from davylamp.core.taxonomy import node
from davylamp.report import figures, plots
from davylamp.report.claims import beyond_claims
from davylamp.report.runs import JUDGE, SUITE, Run

OP_WORDS = {">": "above", ">=": "at or above", "<": "below", "<=": "at or below"}
TILE_ARMS = 4  # arms that a headline may show
FOLD = 60  # a table of slices longer than this is folded


def sections(runs: Sequence[Run], gates: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Suite by suite: tables of estimates (those that no claim shows already), figures and notes."""
    out = []
    labels = list(dict.fromkeys(run.label for run in runs))
    for suite in dict.fromkeys(run.suite for run in runs):
        own = [run for run in runs if run.suite == suite]
        found = [(run, estimate) for run in own for estimate in _distinct(beyond_claims(run.record))]
        tables = [
            _table([pair for pair in found if (pair[1].name, pair[1].unit) == key], labels, len(own) > 1, gates)
            for key in dict.fromkeys((estimate.name, estimate.unit) for _, estimate in found)
        ]
        drawn = [view for run in own for view in _figures(run, len(own) > 1)]
        setups = {digest([_setup(run.part(SUITE)), run.part(JUDGE)]) for run in own}
        notes = list(dict.fromkeys(str(note) for run in own for note in run.record.about.get("notes") or ()))
        out.append(
            {
                "suite": suite,
                "meta": _meta(own[0]),
                "mixed": len(setups) > 1,
                "notes": notes,
                "tables": tables,
                "figures": drawn,
            }
        )
    return [section for section in out if section["tables"] or section["figures"] or section["notes"]]


def _distinct(estimates: Sequence[Estimate]) -> list[Estimate]:
    """Without the slices by arm of a run that has but one arm: they say the same as the slices over all arms."""
    arms = {(estimate.name, estimate.arm) for estimate in estimates if estimate.arm is not None}
    single = {name for name, count in Counter(name for name, _ in arms).items() if count == 1}
    whole = [replace(estimate, arm=None) for estimate in estimates if estimate.arm is None]
    return [e for e in estimates if e.arm is None or e.name not in single or replace(e, arm=None) not in whole]


def _setup(suite: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in suite.items() if name != "metrics"}


def _meta(run: Run) -> str:
    judge, suite = run.part(JUDGE), run.part(SUITE)
    parts = [f"version {suite['version']}" if "version" in suite else ""]
    parts.append(f"judged by {judge.get('name')} (version {judge.get('version', '?')})" if judge else "")
    parts.append(plots.many(run.record.counts["rows"], "row") if run.record.counts.get("rows") else "")
    return " · ".join(part for part in parts if part)


def _figures(run: Run, several: bool) -> list[dict[str, Any]]:
    where = f"figures of {run.folder.name}"
    views = figures.views(run.record.about.get("figures"), where)
    return [{**view, "title": f"{run.label}: {view['title']}"} for view in views] if several else views


def _table(
    found: Sequence[tuple[Run, Estimate]], labels: Sequence[str], several: bool, gates: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """One metric in one unit: lanes grouped by category; a lane is an arm, a target, or both.

    Colour and shape tell targets apart, or arms where there is one target.
    """
    arms = list(dict.fromkeys(estimate.arm for _, estimate in found))
    arms.sort(key=lambda arm: arm is not None)
    first = found[0][1]
    limits = [
        gate["limit"]
        for gate in gates
        if gate["limit"] is not None
        and any(gate["run"] is run and gate["estimate"] == estimate for run, estimate in found)
    ]
    axis = plots.axis_for([estimate for _, estimate in found], limits)
    groups: dict[str | None, list[dict[str, Any]]] = {}
    for run, estimate in sorted(found, key=lambda pair: arms.index(pair[1].arm)):
        words = [run.label] if several else []
        if estimate.arm is not None or (not several and len(arms) > 1):
            words.append(estimate.arm or "all arms")
        label = " · ".join(words)
        series = labels.index(run.label) if several else arms.index(estimate.arm)
        own = [gate for gate in gates if gate["run"] is run and gate["estimate"] == estimate]
        where = ", ".join(word for word in (plain(first.name), category(estimate.category), label) if word)
        lane = {
            "estimate": estimate,
            "label": label,
            "series": series,
            "gates": [gate["view"] for gate in own],
            "svg": plots.lane_svg(
                estimate,
                axis,
                series=series,
                limits=[gate["limit"] for gate in own if gate["limit"] is not None],
                label=where,
            ),
        }
        groups.setdefault(estimate.category, []).append(lane)
    views: list[dict[str, Any]] = [
        {"title": category(name), "code": name or "", "slice": name is not None, "lanes": groups[name]}
        for name in sorted(groups, key=lambda name: name is not None)
    ]
    families: dict[str, list[dict[str, Any]]] = {}
    for group in views:
        families.setdefault(_family(group["code"]), []).append(group)
    for family, members in families.items():
        for group in members if family != "category" else ():  # the caption says what the value is a value of
            group |= {"title": group["code"].partition("=")[2] or group["title"], "code": ""}
    overall = families.get("", [])
    lanes = [lane for group in views for lane in group["lanes"]]
    return {
        "name": plain(first.name) or "estimate",
        "unit": first.unit,
        "direction": "higher is better" if first.higher_is_better else "lower is better",
        "axis": plots.axis_svg(axis),
        "parts": [
            {
                "caption": f"By {family}" if family else "All rows",
                "groups": part,
                "folded": bool(family) and sum(len(group["lanes"]) for group in part) > FOLD,
            }
            for family, part in families.items()
        ],
        "slices": len(views) - len(overall),
        "tile": _tile([lane for group in overall for lane in group["lanes"]]),
        "worded": first.unit not in ("", "rate", "difference", "p"),
        "columns": columns(lane["estimate"] for lane in lanes),
        "methods": methods(lane["estimate"] for lane in lanes),
        "uncorrected": ", ".join(dict.fromkeys(filter(None, (plots.uncorrected(lane["estimate"]) for lane in lanes)))),
        "limited": bool(limits),
    }


def _tile(lanes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the strip at the top shows of a metric: the numbers over all arms; where there are none, a handful of arms."""
    whole = [lane for lane in lanes if lane["estimate"].arm is None]
    if whole:
        return whole
    return list(lanes) if len(lanes) <= TILE_ARMS or all(x["estimate"].unit == "difference" for x in lanes) else []


def _family(code: str) -> str:
    """What a slice is a slice by, so that those of one kind stand together: `category`, or the name before its value.

    >>> _family("sst/scams"), _family("kind=advice"), _family("")
    ('category', 'kind', '')
    """
    name, equals, _ = code.partition("=")
    return "" if not code else plain(name) if equals and "/" not in name else "category"


def columns(estimates: Iterable[Estimate]) -> dict[str, bool]:
    """Which columns a table needs: a worst-case range, a corrected rate and a p value are shown where some estimate has one."""
    estimates = list(estimates)
    return {
        "worst": any(estimate.unscored and estimate.worst for estimate in estimates),
        "corrected": any(estimate.corrected or plots.uncorrected(estimate) for estimate in estimates),
        "p": any(estimate.p is not None for estimate in estimates),
    }


def methods(estimates: Iterable[Estimate]) -> str:
    """How the intervals were made, in short; the whole method stands in the title of each picture.

    >>> methods([Estimate(0.5, 0.4, 0.6, 90, method="wilson, 9 clusters (n_eff 8.1)"), Estimate(0.5, 0.4, 0.6, 9, method="wilson")])
    'wilson (clustered), wilson'
    """
    found = []
    for estimate in estimates:
        name, _, rest = estimate.method.partition(";")[0].partition(",")
        found.append(name + (" (clustered)" if "cluster" in rest or "group" in rest else ""))
    return ", ".join(name for name in dict.fromkeys(found) if name and name != "no scored rows")


def plain(name: str) -> str:
    return name.replace("_", " ")


def category(name: str | None) -> str:
    """A category as a person reads it: the label of a known taxonomy node, else as it stands."""
    if name is None:
        return "All rows"
    if "/" in name:
        try:
            return node(name).label
        except DavylampError:
            pass
    return name.replace("=", " = ")


# Limits


def gates(runs: Sequence[Run], decisions: Sequence[Decision]) -> list[dict[str, Any]]:
    """Each decision with the run it speaks of: the next one that holds just this estimate."""
    out: list[dict[str, Any]] = []
    taken: set[tuple[int, str, Estimate]] = set()
    for decision in decisions:
        estimate, rule = decision.estimate, decision.rule
        having = [run for run in runs if estimate in run.record.estimates]
        run = next(
            (run for run in having if (id(run), rule.text, estimate) not in taken), having[0] if having else None
        )
        taken.add((id(run), rule.text, estimate))
        counted = rule.field in ("n", "unscored", "p")
        words = [run.suite, run.label] if run else []
        where = " · ".join(word for word in (*words, estimate.category or "", estimate.arm or "") if word)
        state = "unsure" if decision.broken is None else "fail" if decision.broken else "pass"
        got, limit = decision.got, rule.limit
        field_words = {"low": "lower end", "high": "upper end", "p": "p value"}.get(rule.field, plain(rule.field))
        shown = "no number" if got is None else f"{got:.3g}" if counted else plots.number(got, estimate.unit)
        ends = {"value": (estimate.low, estimate.high), "corrected": (estimate.corrected or (None, None, None))[1:]}
        view = {
            "state": state,
            "where": where,
            "what": f"{plain(rule.name)}{'' if rule.field == 'value' else f', {field_words}'}",
            "got": shown,
            "ends": plots.interval(*ends.get(rule.field, (None, None)), estimate.unit),
            "limit": f"{OP_WORDS[rule.op]} {f'{limit:g}' if counted else plots.number(limit, estimate.unit)}",
        }
        out.append({"run": run, "estimate": estimate, "limit": None if counted else limit, "view": view})
    return out


def verdict(states: Sequence[str], noun: str, words: Mapping[str, str]) -> dict[str, str] | None:
    """One line over many states; the worst of them is its state. None where there is nothing to say.

    >>> verdict(["pass", "fail"], "limit", {"fail": "crossed", "unsure": "not decidable", "pass": "kept"})
    {'state': 'fail', 'text': '2 limits: 1 crossed, 1 kept'}
    """
    if not states:
        return None
    count = Counter(states)
    state = "fail" if count["fail"] else "unsure" if count["unsure"] else "pass"
    parts = [f"{count[name]} {text}" for name, text in words.items() if count[name]]
    return {"state": state, "text": f"{plots.many(len(states), noun)}: {', '.join(parts)}"}


# Comparisons


def comparison(item: Mapping[str, Any]) -> dict[str, Any]:
    """A comparison as it is shown, with words beside the picture: better, worse, or no difference shown."""
    arms = {row["arm"] for row in item["rows"] if row["arm"]}
    shown = [row for row in item["rows"] if len(arms) > 1 or not row["arm"]] or item[
        "rows"
    ]  # one arm only: said already
    sides = [[_estimate(row[side]) for row in shown] for side in ("a", "b", "difference")]
    axis = plots.axis_for(sides[2])
    groups: dict[str, list[dict[str, Any]]] = {}
    for row, a, b, difference in zip(shown, *sides, strict=True):
        p = row["p_holm"] if row.get("p_holm") is not None else difference.p
        if difference.value is None or p is None:
            state, words = "unsure", "not decidable"
        elif p >= 0.05 or difference.value == 0:
            state, words = "even", "no difference shown"
        else:
            better = (difference.value > 0) == bool(row["higher_is_better"])
            state, words = ("pass", "B is better") if better else ("fail", "B is worse")
        name = plain(row["metric"])
        parts = [category(row["category"]) if row["category"] else "", row["arm"] or ""]
        label = " · ".join(word for word in parts if word) or "All rows"
        groups.setdefault(name, []).append(
            {
                "label": label,
                "a": a,
                "b": b,
                "difference": difference,
                "p": p,
                "pairs": row["pairs"],
                "left_out": row["left_out"],
                "state": state,
                "words": words,
                "better": "higher is better" if row["higher_is_better"] else "lower is better",
                "svg": plots.lane_svg(difference, axis, series=1, label=f"{name}, {label}, B minus A"),
            }
        )
    states = Counter(row["state"] for rows in groups.values() for row in rows)
    found = (
        ("pass", "better in B"),
        ("fail", "worse in B"),
        ("even", "without a shown difference"),
        ("unsure", "not decidable"),
    )
    summary = ", ".join(f"{states[state]} {text}" for state, text in found if states[state])
    return {
        "suite": item["suite"],
        "a": item["a"],
        "b": item["b"],
        "groups": [{"title": name, "rows": rows} for name, rows in groups.items()],
        "summary": f"Of {plots.many(len(shown), 'number')}: {summary}." if shown else "",
        "axis": plots.axis_svg(axis),
        "left_out": any(row["left_out"] for row in shown),
    }


def _estimate(row: Mapping[str, Any]) -> Estimate:
    pairs = {name: tuple(row[name]) if row.get(name) else None for name in ("worst", "corrected")}
    return Estimate(**{**row, **pairs})
