"""Labels by vote: people's votes on dialogues, a jury of language models on responses, and the rule that splits one into the other.

Source: arXiv:2501.09004 (dialogue votes of three or more people; where the dialogue is unsafe, three different models judge the response)
and arXiv:2404.05993 (category sets of up to five annotators). The jury itself asks any guards or judges, such as `llm_judge` or `hf_guard`.

A vote on a dialogue is safe, needs caution or unsafe, with categories if unsafe. What is not decided (fewer than three votes, a tie)
goes to adjudication: it is left out of training, with its reason, and never guessed.

Longer than 400 lines because votes, their statistics and the split of what is unsure are one method and share their types.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from davylamp.core import Case, InputError, Message, TargetError, UnknownNameError, Verdict, data
from davylamp.core.judges import LoadedJudge, load_judge
from davylamp.core.nouns import Estimate
from davylamp.core.rows import Dropped
from davylamp.core.stats import rate
from davylamp.metrics.agreement import cohen_kappa, krippendorff_alpha

if TYPE_CHECKING:
    from numpy.random import Generator

VOTES = ("safe", "needs caution", "unsafe")
LEAST = 3  # votes of people on a dialogue
SOURCES = ("human", "llm_jury", "refusal_data_augmentation")
Vote = str | None  # safe, unsafe, or None: abstained


# --- people -------------------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Dialogue:
    """The votes of people on one dialogue. status: decided | adjudicate.  label: safe | needs caution | unsafe, None if not decided.
    categories: nodes by how many of those who said unsafe named them, most first.  why: what adjudication is for."""

    status: str
    label: str | None
    categories: tuple[str, ...] = ()
    why: str = ""


def count_votes(votes: Sequence[Vote], categories: Sequence[Sequence[str]] = (), *, least: int = LEAST) -> Dialogue:
    """The majority of the votes given. categories: for each vote, the nodes its annotator named (those of a vote that is not unsafe
    count not).

    Unsafe and needs caution together outvote safe, as needs caution, if neither has a majority alone. Raises InputError for a vote
    nobody knows.

    >>> count_votes(["unsafe", "unsafe", "safe"], [["aegis2/threat"], ["aegis2/threat", "aegis2/violence"], []]).categories
    ('aegis2/threat', 'aegis2/violence')
    >>> count_votes(["safe", "unsafe"]).why
    '2 votes of the 3 that are needed'
    """
    for vote in votes:
        if vote is not None and vote not in VOTES:
            raise UnknownNameError("vote", str(vote), VOTES)
    if categories and len(categories) != len(votes):
        raise InputError(
            f"categories must be given for every vote or for none, got {len(categories)} for {len(votes)} votes"
        )
    given = [vote for vote in votes if vote is not None]
    if len(given) < least:
        return Dialogue("adjudicate", None, why=f"{len(given)} votes of the {least} that are needed")
    count = Counter(given)
    label = next((name for name in VOTES if 2 * count[name] > len(given)), None)
    if label is None and 2 * (count["unsafe"] + count["needs caution"]) > len(given):
        label = "needs caution"
    if label is None:
        return Dialogue(
            "adjudicate", None, why="a tie: " + ", ".join(f"{n} {name}" for name, n in sorted(count.items()))
        )
    named: Counter[str] = Counter()
    for vote, nodes in zip(votes, categories, strict=False):
        if vote == "unsafe":
            named.update(list(dict.fromkeys(nodes)))  # an annotator counts once for a category
    order = [node for node, _ in named.most_common()] if label == "unsafe" else []
    return Dialogue("decided", label, tuple(order))


def majority_labels(annotators: Sequence[Sequence[str]], *, tie: str = "Needs Caution") -> tuple[str, ...]:
    """The label set of up to five annotators' label lists: every category that half of them or more chose; Safe if strictly more than half
    say nothing but Safe; `tie` where neither holds (arXiv:2404.05993). Raises InputError for none or more than five.

    >>> majority_labels([["Threat", "Violence"], ["Threat"], ["Safe"]]), majority_labels([["Safe"], ["Threat"], ["Violence"]])
    (('Threat',), ('Needs Caution',))
    """
    voted = [list(dict.fromkeys(labels)) for labels in annotators if labels]
    if not voted or len(voted) > 5:
        raise InputError(f"one to five annotators, got {len(voted)}")
    if 2 * sum({label.casefold() for label in labels} == {"safe"} for labels in voted) > len(voted):
        return ("Safe",)
    count = Counter(label for labels in voted for label in labels if label.casefold() != "safe")
    chosen = tuple(label for label, n in count.most_common() if 2 * n >= len(voted))
    return chosen or (tie,)


def reading(labels: Sequence[str], policy: Literal["permissive", "defensive"]) -> int:
    """1 (unsafe) or 0 of a label set. Needs Caution alone is safe to the permissive reading, unsafe to the defensive one.

    >>> reading(["Needs Caution"], "permissive"), reading(["Needs Caution"], "defensive")
    (0, 1)
    """
    plain = {label.casefold() for label in labels} - {"safe"}
    return int(bool(plain - {"needs caution"}) or (policy == "defensive" and "needs caution" in plain))


def fleiss_kappa(votes: Sequence[Sequence[Vote]]) -> float | None:
    """(P - Pe) / (1 - Pe) of nominal votes; rows may have unequal numbers of votes, those with fewer than two are left out. None if
    undefined.

    P is the mean over rows of the share of agreeing pairs, Pe the sum of squared shares of the labels over all votes (Fleiss 1971; with
    unequal numbers the shares are over all votes counted).

    >>> round(fleiss_kappa([["a", "a", "b"], ["b", "b", "b"], ["a", "a", "a"]]), 3)
    0.55
    """
    rows = [[vote for vote in row if vote is not None] for row in votes]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        return None
    agree = [sum(n * (n - 1) for n in Counter(row).values()) / (len(row) * (len(row) - 1)) for row in rows]
    total = Counter(itertools.chain.from_iterable(rows))
    size = sum(total.values())
    expected = sum((n / size) ** 2 for n in total.values())
    return None if expected >= 1 else (sum(agree) / len(agree) - expected) / (1 - expected)


# --- the split rule -----------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Labels:
    """What a dialogue's row says: prompt and response label (safe, unsafe, or None), each with who said so; status and why as in
    Dialogue."""

    prompt: str | None
    response: str | None
    prompt_by: str = "human"
    response_by: str | None = None
    categories: tuple[str, ...] = ()
    why: str = ""


def derive_labels(dialogue: Dialogue, *, has_response: bool, jury: Vote = None, defensive: bool = True) -> Labels:
    """Prompt and response labels: a safe dialogue makes both safe (human); an unsafe one makes the prompt unsafe (human), and the
    response is what the jury says (llm_jury), or None. A response that is not there has no label: null is not safe. Categories are the
    dialogue's.

    >>> derive_labels(count_votes(["unsafe"] * 3), has_response=True, jury="safe").response_by
    'llm_jury'
    """
    if jury not in (None, "safe", "unsafe"):
        raise InputError(f"the jury says safe, unsafe or nothing, got {jury!r}")
    if dialogue.label is None:
        return Labels(None, None, why=dialogue.why)
    unsafe = dialogue.label == "unsafe" or (dialogue.label == "needs caution" and defensive)
    if not has_response:
        return Labels("unsafe" if unsafe else "safe", None, categories=dialogue.categories if unsafe else ())
    if not unsafe:
        return Labels("safe", "safe", response_by="human")
    if jury is None:
        return Labels("unsafe", None, categories=dialogue.categories, why="the jury did not decide")
    return Labels("unsafe", jury, response_by="llm_jury", categories=dialogue.categories)


# --- the jury -----------------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class JuryVerdict:
    """label: safe, unsafe, or None (fewer than two judges said anything, or a tie).  votes: judge -> vote, None = abstained."""

    label: Vote
    votes: Mapping[str, Vote]
    why: str = ""

    @property
    def split(self) -> bool:
        """Whether those who voted did not all say the same."""
        return len({vote for vote in self.votes.values() if vote is not None}) > 1


def annotate_response(votes: Mapping[str, Vote], *, least: int = 2) -> JuryVerdict:
    """The majority of the judges that said something; None below `least` of them or at a tie.

    >>> annotate_response({"a": "unsafe", "b": None, "c": "unsafe"}).label, annotate_response({"a": "unsafe", "b": "safe"}).why
    ('unsafe', 'a tie')
    """
    if wrong := [vote for vote in votes.values() if vote not in (None, "safe", "unsafe")]:
        raise InputError(f"a judge's vote is safe, unsafe or None, got {wrong[0]!r}")
    count = Counter(vote for vote in votes.values() if vote is not None)
    given = sum(count.values())
    if given < least:
        return JuryVerdict(None, dict(votes), f"{given} of {len(votes)} judges said anything, {least} are needed")
    if 2 * count["unsafe"] == given:
        return JuryVerdict(None, dict(votes), "a tie")
    return JuryVerdict("unsafe" if 2 * count["unsafe"] > given else "safe", dict(votes))


class Jury:
    """Three or more judges of different models that all measure `unsafe`. `await jury(messages)` gives a JuryVerdict; one that cannot be
    reached or read abstains, and `failures` counts it."""

    def __init__(self, judges: Mapping[str, LoadedJudge], *, least: int = 2):
        if len(judges) < 3:
            raise InputError(f"a jury needs three judges or more, got {len(judges)}")
        wrong = [f"{name} measures {judge.measures}" for name, judge in judges.items() if judge.measures != "unsafe"]
        if wrong:
            raise InputError(f"a jury's judges must measure unsafe: {', '.join(wrong)}")
        models = [json.dumps(dict(judge.identity), sort_keys=True, default=str) for judge in judges.values()]
        if len(set(models)) < len(models):
            raise InputError(
                "two judges of the jury are the same model: their errors are the same too. Choose different ones"
            )
        self.judges, self.least, self.failures = dict(judges), least, Counter[str]()

    async def __call__(self, messages: Sequence[Message]) -> JuryVerdict:
        given = await asyncio.gather(*(self._vote(name, messages) for name in self.judges))
        return annotate_response(dict(zip(self.judges, given, strict=True)), least=self.least)

    async def _vote(self, name: str, messages: Sequence[Message]) -> Vote:
        try:
            verdict: Verdict = await self.judges[name](messages)
        except TargetError:
            self.failures[name] += 1
            return None
        if verdict.value is None:
            self.failures[name] += 1
            return None
        return "unsafe" if verdict.value > 0.5 else "safe"

    async def close(self) -> None:
        for judge in self.judges.values():
            await judge.close()


def load_jury(judges: str, *, least: int = 2) -> Jury:
    """Judges joined by `+`, options of one parted by `;`, as for `panel`."""
    specs = [part.strip().replace(";", ",") for part in judges.split("+") if part.strip()]
    if len(set(specs)) < len(specs):
        raise InputError("two judges of the jury are the same: choose different ones")
    return Jury({spec: load_judge(spec) for spec in specs}, least=least)


@data(
    version=1,
    source="arXiv:2501.09004",
    licence="Apache-2.0",
    stage="data",
    threats=("harmful-compliance",),
    systems=("11",),
)
def jury(
    rows: Iterable[Case], *, rng: Generator, judges: str, least: int = 2, width: int = 16
) -> Iterator[Case | Dropped]:
    """Label conversations that end in a reply by a jury of models: `answer` 1 (unsafe) or 0, every judge's vote in `meta.votes`.

    judges: three guards or judges of different models that measure unsafe, joined by `+` (options parted by `;`), such as
    `llm_judge:model=openai/a+llm_judge:model=openai/b+hf_guard:model=openai/c`.  least: judges that must say something.  width: rows at
    a time. A row whose jury does not decide is dropped with its reason, and so is one without a reply.
    """
    if least < 1 or width < 1:
        raise InputError(f"least and width must be 1 or more, got {least} and {width}")
    bench = load_jury(judges, least=least)
    yield from asyncio.run(_labelled(bench, list(rows), width))


async def _labelled(bench: Jury, rows: Sequence[Case], width: int) -> list[Case | Dropped]:
    gate = asyncio.Semaphore(width)

    async def one(case: Case) -> Case | Dropped:
        if case.messages[-1].role != "assistant" or not case.messages[-1].text.strip():
            return Dropped(case, "no reply to judge")
        async with gate:
            found = await bench(case.messages)
        meta = {**case.meta, "votes": dict(found.votes), "response_label_source": "llm_jury", "split": found.split}
        if found.label is None:
            return Dropped(
                replace(case, meta=meta), found.why.partition(":")[0] if found.why == "a tie" else "too few judges"
            )
        return replace(case, answer=int(found.label == "unsafe"), meta=meta)

    try:
        return list(await asyncio.gather(*(one(case) for case in rows)))
    finally:
        await bench.close()


# --- how far they agree -------------------------------------------------------------------------------------------------------------------
def jury_report(verdicts: Sequence[Mapping[str, Vote]], people: Sequence[Vote] | None = None) -> dict[str, Any]:
    """How a jury agreed: Fleiss' kappa, Krippendorff's alpha, Cohen's kappa of each pair, disagreement and abstention rates; against
    people's labels where there are some: each judge's and the majority's error, and the correlation of each pair's errors. Plain types.

    Judges whose errors go together gain little from a vote: independent errors e make 3 e^2 - 2 e^3 of three, equal ones stay e.

    >>> report = jury_report([{"a": "safe", "b": "safe", "c": "unsafe"}, {"a": "unsafe", "b": "unsafe", "c": "unsafe"}], ["safe", "unsafe"])
    >>> report["errors"]["c"]["value"], report["majority_error"]["value"]
    (0.5, 0.0)
    """
    if not verdicts:
        raise InputError("there is no verdict to report on")
    names = list(verdicts[0])
    if any(list(row) != names for row in verdicts):
        raise InputError("every row must have the votes of the same judges, in the same order")
    table = [[row[name] for name in names] for row in verdicts]
    voted = [[vote for vote in row if vote is not None] for row in table]
    several = [row for row in voted if len(row) > 1]
    pairs = {
        f"{a} / {b}": cohen_kappa([row[i] for row in table], [row[j] for row in table])
        for (i, a), (j, b) in itertools.combinations(enumerate(names), 2)
    }
    out: dict[str, Any] = {
        "fleiss_kappa": fleiss_kappa(table),
        "krippendorff_alpha": krippendorff_alpha(table),
        "cohen_kappa": pairs,
        "disagreement": rate(sum(len(set(row)) > 1 for row in several), len(several)).json(),
        "abstained": {
            name: rate(sum(row[i] is None for row in table), len(table)).json() for i, name in enumerate(names)
        },
    }
    if people is None:
        return out
    if len(people) != len(table):
        raise InputError(f"people's labels must be as many as the rows, got {len(people)} and {len(table)}")
    wrong = [
        [
            None if vote is None or truth is None else int(vote != truth)
            for vote, truth in zip(column, people, strict=True)
        ]
        for column in zip(*table, strict=True)
    ]
    decided = [annotate_response(row).label for row in verdicts]
    return {
        **out,
        "errors": {name: _share(column).json() for name, column in zip(names, wrong, strict=True)},
        "majority_error": _share(
            [None if vote is None or t is None else int(vote != t) for vote, t in zip(decided, people, strict=True)]
        ).json(),
        "error_correlation": {
            f"{names[i]} / {names[j]}": _correlation(wrong[i], wrong[j])
            for i, j in itertools.combinations(range(len(names)), 2)
        },
    }


def majority_error(errors: Sequence[float]) -> float:
    """Exact chance that the majority of an odd number of judges with independent errors is wrong.

    >>> round(majority_error([0.1, 0.1, 0.1]), 3), round(majority_error([0.2, 0.15, 0.1]), 4)
    (0.028, 0.059)
    """
    if len(errors) % 2 == 0:
        raise InputError(f"an even number of judges can tie: give an odd one, got {len(errors)}")
    total = 0.0
    for wrong in itertools.product((False, True), repeat=len(errors)):
        if 2 * sum(wrong) > len(errors):
            chance = 1.0
            for is_wrong, e in zip(wrong, errors, strict=True):
                chance *= e if is_wrong else 1 - e
            total += chance
    return total


def _share(values: Sequence[int | None]) -> Estimate:
    known = [value for value in values if value is not None]
    return rate(sum(known), len(known), len(values) - len(known))


def _correlation(a: Sequence[int | None], b: Sequence[int | None]) -> float | None:
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    n = len(pairs)
    if not n:
        return None
    mx, my = sum(x for x, _ in pairs) / n, sum(y for _, y in pairs) / n
    spread = mx * (1 - mx) * my * (1 - my)
    return None if spread <= 0 else (sum(x * y for x, y in pairs) / n - mx * my) / spread**0.5
