"""Fine-tune an aligned model on a skill, see what that did to its safety, and give the refusals back without the skill's loss.

    python examples/realign_after_finetune.py runs/realigned

Takes some three minutes on one core. The same on the command line: davylamp train sft, davylamp check, davylamp repair.
"""

import sys
from pathlib import Path

from davylamp.apply import run_data, run_train
from davylamp.check import run_check
from davylamp.core.rows import CaseFile, write_cases
from davylamp.repair import run_repair

ALIGNED, UNALIGNED = "organism/aligned", "organism/helpful"


def main(desk: Path, steps: int = 200, only: tuple[str, ...] = ("alignment",)) -> int:
    runs = desk / "runs"

    # 1. Rows of the new skill and harmless requests. None is about a hazard, and yet they will cost refusals.
    rows = {"skill": {"what": "skill", "skill": "count", "n": 300}, "benign": {"what": "benign", "n": 900}}
    for name, options in rows.items():
        run_data("organism_rows", "-", desk / f"{name}.jsonl", options=options, runs=runs)
    held_out = {"what": "skill", "skill": "count", "n": 200}
    run_data("organism_rows", "-", desk / "task.jsonl", seed=9, options=held_out, runs=runs)
    write_cases(desk / "rows.jsonl", [case for name in rows for case in CaseFile(desk / f"{name}.jsonl")])

    # 2. The fine-tune, and the check before and after it.
    tuning = {"lr": 6e-4, "batch": 16, "steps": steps}
    run_train("sft", ALIGNED, desk / "rows.jsonl", desk / "tuned", options=tuning, runs=runs)
    _, record, _ = run_check([ALIGNED, f"hf/{desk / 'tuned'}"], runs=runs, quiet=True)
    for found in record.estimates:
        print(f"{found.arm}: {found.name} {found.value:.3f} [{found.low:.3f}, {found.high:.3f}]")

    # 3. The repair: every candidate edit is measured on probes that its choice never saw; the chosen model is written.
    folder, record = run_repair(
        str(desk / "tuned"), ALIGNED, desk / "fixed", unaligned=UNALIGNED, task=desk / "task.jsonl", only=only, runs=runs, quiet=True
    )  # fmt: skip
    for claim in record.claims:
        print("held    " if claim["held"] else "not held", claim["text"])
    print(folder / "report.html")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/realigned")))
