"""The model card of `lamp`, written from what is measured: `python -m davylamp.guards._lamp_card FOLDER` measures the shipped weights.

FOLDER holds the public rows (docs/guards.md). Three of its sets are never trained on, and near copies of their rows are taken out of the
training rows: XSTest, the OpenAI moderation set, and the harmless technical prompts of CyberSecEval (English and seven languages). A fourth
part is every tenth group of the training sources, which the training holds out for the calibration.
"""

from __future__ import annotations

import ast
import json
import sys
import sysconfig
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from numpy.random import default_rng

from davylamp.core import Case, Estimate, Message
from davylamp.core.rows import read_objects
from davylamp.core.stats import clopper_pearson
from davylamp.data.guard_rows import kept, load_rows, public_rows
from davylamp.guards._lamp_hash import read_weights
from davylamp.guards._lamp_own import own_rows
from davylamp.guards._lamp_rows import bucket
from davylamp.guards._lamp_train import PARTS
from davylamp.guards.lamp import ASSETS, Lamp, find_encoder, lamp
from davylamp.metrics.detection import detection
from davylamp.metrics.operating import headline

DRAWS = 500
LOOKED_AT = (
    "XSTest",
    "OpenAI moderation",
    "CyberSecEval harmless",
)  # one half of these (bucket 0 of 2) was looked at while the training was designed
LICENCES = {  # of the public sources, as their folders state them
    "advbench": "MIT", "ailuminate": "CC-BY-4.0", "catqa": "Apache-2.0", "harmbench": "MIT", "jailbreakbench": "MIT", "jbb": "MIT",
    "multijail": "MIT", "jade": "MIT", "medsafetybench": "MIT (its README asks for research use)", "simple_safety_tests": "CC-BY-4.0",
    "cyberseceval": "MIT", "labsafety": "MIT", "anthropic_ai_risk": "CC-BY-4.0", "bbq": "CC-BY-4.0", "bipia": "MIT",
    "safeagentbench": "MIT", "fortunes": "BSD", "cvalues": "Apache-2.0", "safetybench": "MIT", "korean_square": "MIT",
}  # fmt: skip


def measured_sets(folder: Path) -> dict[str, list[Case]]:
    """The rows that are measured on, by name."""
    harmless = []
    for name in ("mitre_frr_en", "mitre_frr_multilingual"):
        for number, row in read_objects(folder / "cyberseceval_frr" / f"{name}.jsonl"):
            meta = {"language": str(row.get("language", "English"))}
            group = str(row.get("english") or row["prompt"])
            harmless.append(Case(f"{name}-{number}", (Message("user", row["prompt"]),), None, 0, group, meta))
    ours = Path(__file__).parent.parent / "assets" / "overrefusal" / "rows.jsonl"
    rng = default_rng(0)
    both = [*own_rows(rng=rng), *public_rows(folder, rng=rng)]
    return {
        "XSTest": kept(load_rows(f"xstest:{folder / 'xstest' / 'xstest_prompts.jsonl'}"))[0],
        "OpenAI moderation": kept(load_rows(f"openai_moderation:{folder / 'openai_moderation' / 'samples.jsonl'}"))[0],
        "CyberSecEval harmless": harmless,
        "docstrings": docstrings(),
        "own contrast pairs": [
            contrast_case(json.loads(line)) for line in ours.read_text(encoding="utf-8").splitlines()
        ],
        "held-out groups": [case for case in both if bucket(str(case.group or case.id), PARTS) == 0],
    }


def contrast_case(row: dict[str, str]) -> Case:
    """A row of the suite `overrefusal`, which is never trained on."""
    return Case(row["id"], (Message("user", row["prompt"]),), row["type"], int(row["label"] == "unsafe"))


def docstrings(count: int = 1000) -> list[Case]:
    """Plain technical prose that nobody wrote for a guard: first paragraphs in Python's standard library, of 25 to 300 characters."""
    found: dict[str, str] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and (text := ast.get_docstring(node)):
                text = " ".join(text.split("\n\n")[0].split())
                if 25 <= len(text) <= 300:
                    found.setdefault(text, path.stem)
    texts = sorted(found)
    drawn = sorted(default_rng(0).permutation(len(texts))[:count].tolist())
    return [Case(f"doc-{i}", (Message("user", texts[i]),), None, 0, found[texts[i]]) for i in drawn]


def ask(guard: Lamp, cases: Sequence[Case]) -> list[float | None]:
    """The guard's value for each case."""
    return [verdict.value for verdict in guard.batch([case.messages for case in cases])]


def ends(estimate: Estimate) -> str:
    """An estimate as the card shows it.

    >>> ends(Estimate(0.5, 0.25, 0.75, 10))
    '0.50 [0.25, 0.75]'
    """
    if estimate.value is None:
        return "-"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.2f}"
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def rows_of(name: str, cases: Sequence[Case], scores: Sequence[float | None]) -> list[str]:
    """The lines of the card for one set: overall, then by category and language."""
    labels = [int(case.answer) for case in cases]
    groups = [case.group or case.id for case in cases]
    found = {e.name: e for e in headline(labels, scores, groups, threshold=0.5, rng=default_rng(0), draws=DRAWS)}
    shown = [ends(found[key]) for key in ("f1", "auprc", "auroc", "tpr", "fpr")]
    return [f"| {name} | {sum(labels)} / {len(labels) - sum(labels)} | {' | '.join(shown)} |"]


def slices_of(cases: Sequence[Case], scores: Sequence[float | None], by: str) -> list[str]:
    """Caught and falsely flagged by category or by language."""
    parts: dict[str, list[int]] = {}
    for i, case in enumerate(cases):
        key = (case.category or "none") if by == "category" else str(case.meta.get("language", ""))
        if key:
            parts.setdefault(key, []).append(i)
    out = []
    for key, rows in sorted(parts.items()):
        labels = [int(cases[i].answer) for i in rows]
        found = detection(labels, [scores[i] for i in rows])
        caught = ends(found["recall"]) if any(labels) else "-"
        safe = [value for i in rows if not cases[i].answer and (value := scores[i]) is not None]
        alarms, unread = "-", sum(scores[i] is None for i in rows)
        if safe:
            hits = sum(value >= 0.5 for value in safe)
            low, high = clopper_pearson(hits, len(safe))
            alarms = f"{hits / len(safe):.2f} [{low:.2f}, {high:.2f}]"
        out.append(f"| {key} | {len(rows)} | {unread} | {caught} | {alarms} |")
    return out


THRESHOLDS = (0.5, 0.7, 0.9, 0.95, 0.98)


def trade(sets: dict[str, list[Case]], scores: dict[str, list[float | None]]) -> list[str]:
    """What other thresholds than 0.5 give."""
    out = [
        "| threshold | XSTest F1 | XSTest false alarms | OpenAI moderation false alarms | CyberSecEval harmless (English) |",
        "|---|---|---|---|---|",
    ]
    english = [i for i, case in enumerate(sets["CyberSecEval harmless"]) if case.meta["language"] == "English"]
    for threshold in THRESHOLDS:
        x, o = (
            detection([int(case.answer) for case in sets[name]], scores[name], threshold=threshold)
            for name in ("XSTest", "OpenAI moderation")
        )
        flagged = sum((scores["CyberSecEval harmless"][i] or 0.0) >= threshold for i in english)
        alarms = [1 - (found["specificity"].value or 0.0) for found in (x, o)]
        f1 = "-" if x["f1"].value is None else f"{x['f1'].value:.2f}"
        out.append(f"| {threshold} | {f1} | {alarms[0]:.2f} | {alarms[1]:.2f} | {flagged / len(english):.3f} |")
    return out


def main(folder: Path) -> str:
    """Measure both heads and give the numbers of the card as Markdown."""
    sets = measured_sets(folder)
    lines = []
    guards = {"hashed": lamp(encoder="hashed")}
    if find_encoder("auto") is not None:
        guards["both heads (int8)"] = lamp()
    columns = "| set | unsafe / safe | F1 | AUPRC | AUROC | caught (TPR) | false alarms (FPR) |"
    for head, guard in guards.items():
        lines += [f"### {head}", "", columns, "|---|---|---|---|---|---|---|"]
        scores = {name: ask(guard, cases) for name, cases in sets.items()}
        for name, cases in sets.items():
            lines += rows_of(name, cases, scores[name])
            if name in LOOKED_AT:  # the half that no decision was taken on
                unseen = [
                    i
                    for i, case in enumerate(cases)
                    if bucket(case.group or case.id, 2) == 1 and case.meta.get("language", "English") == "English"
                ]
                english = ", English" * (name == "CyberSecEval harmless")
                lines += rows_of(
                    f"{name}{english}, half B", [cases[i] for i in unseen], [scores[name][i] for i in unseen]
                )
        lines += ["", *trade(sets, scores)]
        for name, by in (
            ("XSTest", "category"),
            ("OpenAI moderation", "category"),
            ("CyberSecEval harmless", "language"),
            ("held-out groups", "language"),
        ):
            lines += [
                "",
                f"{name}, by {by}:",
                "",
                f"| {by} | rows | unread | caught | false alarms |",
                "|---|---|---|---|---|",
            ]
            lines += slices_of(sets[name], scores[name], by)
        lines.append("")
    return "\n".join(lines)


def sources() -> str:
    """The training rows by source, from what the weights say of themselves."""
    _, about = read_weights(ASSETS / "hashed.npz")
    count: Counter[tuple[str, str]] = Counter()
    for key, n in about["counts"].items():
        source, _, label = key.rpartition(" ")
        count[source, label] += n
    lines = ["| source | unsafe | safe | licence |", "|---|---|---|---|"]
    for source in sorted({source for source, _ in count}):
        licence = next(
            (text for name, text in LICENCES.items() if source.startswith(name)), "Apache-2.0 (this repository)"
        )
        lines.append(f"| {source} | {count[source, '1']} | {count[source, '0']} | {licence} |")
    return "\n".join(lines)


if __name__ == "__main__":
    head = (ASSETS / "card_head.md").read_text(encoding="utf-8")
    _, hashed = read_weights(ASSETS / "hashed.npz")
    _, minilm = read_weights(ASSETS / "minilm.npz")
    head = head.format(hashed=hashed["rows"], minilm=minilm["rows"], encoder=minilm["encoder"])
    text = f"{head}\n## Training rows of the hashed head\n\n{sources()}\n\n## Measured\n\n{main(Path(sys.argv[1]))}"
    (ASSETS / "card.md").write_text(text.rstrip() + "\n", encoding="utf-8")
