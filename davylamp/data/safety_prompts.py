"""SafetyPrompts' generator: a model goes on with a numbered list of seed prompts, and each line that comes back is checked.
Source: arXiv:2304.10436, section 3.3. Differs: every line has a reason if it is dropped; a class probe fitted on the seeds takes the place
of reading by people; replies are judged if a judge is named; words of the templates are ours."""

from __future__ import annotations

import asyncio
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tomllib import loads
from typing import TYPE_CHECKING, Any, Literal

from davylamp.core import Case, InputError, Message, data
from davylamp.core.judges import load_judge
from davylamp.core.rows import CaseFile, Dropped
from davylamp.core.taxonomy import Node, taxonomy
from davylamp.metrics.near import grams, jaccard
from davylamp.metrics.text import cjk_share
from davylamp.models.retry import patiently
from davylamp.models.targets import load_target

if TYPE_CHECKING:
    from numpy.random import Generator

PROMPTS = Path(__file__).parent.parent / "assets" / "safety_prompts" / "prompts.toml"
SHOTS, ITEMS = 3, 10  # seeds shown, and the length of the list that they open
LEAST, MOST = 10, 200  # characters of a prompt
CHINESE = 0.6  # share of its characters
NEAR = 0.7  # Jaccard of character 3-grams from which two prompts are the same
SAME = 13  # characters in a row that a prompt may not share with a test prompt
ROUNDS = 4  # times the number of questions that would do if every line were good
NUMBERED = re.compile(r"^\s*(\d{1,3})\s*[.、．)）:：]\s*(.*\S)\s*$")
NAMES_ITSELF = re.compile(
    r"ChatGPT|OpenAI|文心一言|通义千问|as an? (AI|artificial)|作为一?个?.{0,6}(语言模型|人工智能|AI)", re.IGNORECASE
)
Ask = Callable[[str], Awaitable[str]]


@data(
    version=1,
    source="arXiv:2304.10436",
    licence="Apache-2.0",
    stage="data",
    threats=("harmful-compliance", "jailbreak"),
    systems=("34",),
)
def safety_prompts(
    rows: Iterable[Case],
    *,
    rng: Generator,
    model: str,
    responder: str = "",
    judge: str = "",
    template: Literal["zh", "en"] = "zh",
    per_category: int = 20,
    apart: str = "",
    probe: bool = True,
    max_tokens: int = 1024,
) -> Iterator[Case | Dropped]:
    """More prompts of each category of the seeds, written by a model, and if wanted a reply to each, as rows to train on.

    rows: the seeds: `category` is one of the fourteen (cn/insult, Insult, …), the last user turn is the prompt; three or more of each.
    model: the target that goes on with the list.  responder: the target that replies; empty: prompts alone.  judge: of the replies, such
    as `llm_judge:model=openai/M,rubric=scenario`; unsafe ones go aside and are not lost.  template: language of the words around the
    list.  per_category: new prompts wanted of each; fewer come if the model's lines do not pass.  apart: a .jsonl file of test prompts
    that must not come back.  probe: drop prompts that read like another category's seeds.  max_tokens: length of one answer.

    Dropped with a reason: numbering, length, language, copied, duplicate, in_test, category, empty_reply, names_itself, unsafe_reply,
    unjudged. Raises InputError for an unknown category, fewer than three seeds, and options out of range.
    """
    if per_category < 1 or max_tokens < 1:
        raise InputError(f"per_category and max_tokens must be 1 or more, got {per_category} and {max_tokens}")
    if judge and not responder:
        raise InputError("judge looks at replies: name a responder too")
    seeds = by_category(rows)
    words = loads(PROMPTS.read_text(encoding="utf-8"))[template]
    tests = [prompt_of(case) for case in CaseFile(apart)] if apart else []

    async def go() -> list[Case | Dropped]:
        writer = load_target(model)
        replier = load_target(responder) if responder else None
        judging = load_judge(judge) if judge else None
        try:
            ask = _asker(writer, max_tokens, temperature=1.0, top_p=0.95)
            out = await augment(seeds, ask, words, rng=rng, per_category=per_category, tests=tests, probe=probe)
            if replier is None:
                return out
            answer = _asker(replier, max_tokens, temperature=0.7)
            return [item if isinstance(item, Dropped) else await respond(item, answer, words, judging) for item in out]
        finally:
            for thing in (writer, replier, judging):
                if (close := getattr(thing, "close", None)) is not None:
                    await close()

    yield from asyncio.run(go())


def by_category(rows: Iterable[Case]) -> dict[str, list[str]]:
    """Category -> prompts of the seeds. Raises InputError for an unknown or missing category and fewer than three of one."""
    known = taxonomy("cn")
    out: dict[str, list[str]] = {}
    for case in rows:
        if not case.category:
            raise InputError(f"seed {case.id} needs a category, one of {', '.join(node.label for node in known.nodes)}")
        node = known.find(case.category.removeprefix("cn/"))
        out.setdefault(node.id, []).append(prompt_of(case))
    if not out:
        raise InputError(f"no seeds: each category needs {SHOTS} or more")
    for name, prompts in out.items():
        if len(prompts) < SHOTS:
            raise InputError(f"{len(prompts)} seeds of {name}, and {SHOTS} are shown at a time")
    return out


def prompt_of(case: Case) -> str:
    """A row's last user turn."""
    said = [message.text.strip() for message in case.messages if message.role == "user"]
    if not said or not said[-1]:
        raise InputError(f"row {case.id} has no user turn")
    return said[-1]


def _asker(target: Any, max_tokens: int, **settings: Any) -> Ask:
    async def ask(prompt: str) -> str:
        message = (Message("user", prompt),)
        said = await patiently(lambda: target(message, max_tokens=max_tokens, **settings), who=str(target.name))
        return str(said.text)

    return ask


# --- prompts ----------------------------------------------------------------------------------------------------------------------------
async def augment(
    seeds: Mapping[str, Sequence[str]],
    ask: Ask,
    words: Mapping[str, str],
    *,
    rng: Generator,
    per_category: int,
    tests: Sequence[str] = (),
    probe: bool = True,
    near: float = NEAR,
) -> list[Case | Dropped]:
    """New prompts of each category from lists that `ask` goes on with, each line checked, kept and dropped ones in the order they came.

    near: similarity from which two prompts are the same; above 1 nothing is.
    """
    known = taxonomy("cn")
    out: list[Case | Dropped] = []
    kept: list[frozenset[str]] = []
    guess = Probe(seeds) if probe and len(seeds) > 1 else None
    shown = {name: [grams(plain(text)) for text in prompts] for name, prompts in seeds.items()}
    taken = {part for test in tests for part in _parts(plain(test))}
    for name, prompts in seeds.items():
        node, have = known.find(name), 0
        for _ in range(ROUNDS * math.ceil(per_category / (ITEMS - SHOTS))):
            if have >= per_category:
                break
            picked = [prompts[i] for i in rng.choice(len(prompts), size=SHOTS, replace=False)]
            for text, fault in numbered(await ask(question(node, picked, words))):
                reason = fault or _why_not(text, shown[name], kept, taken, near)
                if not reason and guess is not None and guess(text) != name:
                    reason = "category"
                if not reason and have >= per_category:
                    break
                meta = {"view": "attack" if node.kind == "attack" else "typical", "type": node.label}
                case = Case(f"{name}-new-{len(out)}", (Message("user", text[:2000]),), category=f"cn/{name}", meta=meta)
                out.append(Dropped(case, reason) if reason else case)
                if not reason:
                    kept.append(grams(plain(text)))
                    have += 1
    return out


def question(node: Node, picked: Sequence[str], words: Mapping[str, str]) -> str:
    """The opening of a numbered list that the model is to go on with.

    >>> words = {"typical": "{n} of {what}:\\n{seeds}"}
    >>> question(taxonomy("cn").find("insult"), ["一", "二", "三"], words).splitlines()[1:]
    ['1. 一', '2. 二', '3. 三', '4.']
    """
    text = words["attack" if node.kind == "attack" else "typical"]
    lines = [f"{number}. {' '.join(seed.split())}" for number, seed in enumerate(picked, 1)]
    values = {"n": str(ITEMS), "what": f"{node.label}: {node.about}", "least": str(LEAST)}
    for key, value in values.items():
        text = text.replace("{" + key + "}", value)
    return text.replace("{seeds}", "\n".join([*lines, f"{len(picked) + 1}."])).strip()


def numbered(text: str) -> Iterator[tuple[str, str]]:
    """(prompt, what is wrong with it) of each line of an answer: numbers 4 to 10, rising. The first may lack its own, as "4." was given.

    >>> list(numbered("新的一条\\n5、另一条\\n5. 又一条\\n没有号码"))
    [('新的一条', ''), ('另一条', ''), ('又一条', 'numbering'), ('没有号码', 'numbering')]
    """
    last = SHOTS
    for place, line in enumerate(line for line in text.splitlines() if line.strip()):
        found = NUMBERED.match(line)
        if found is None:
            yield line.strip(), "" if place == 0 else "numbering"
            last = max(last, SHOTS + 1) if place == 0 else last
            continue
        number = int(found[1])
        yield found[2], "" if last < number <= ITEMS else "numbering"
        last = max(last, min(number, ITEMS))


def plain(text: str) -> str:
    """The form in which prompts are compared: full-width and compatibility characters made one, lower case, no blanks.

    >>> plain("ＡＢ　一")
    'ab一'
    """
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _why_not(
    text: str, seeds: Sequence[frozenset[str]], kept: Sequence[frozenset[str]], taken: set[str], near: float
) -> str:
    """Why a line is dropped; nothing if it is good."""
    if not LEAST <= len(text) <= MOST:
        return "length"
    if cjk_share(text) < CHINESE:
        return "language"
    form = plain(text)
    if any(part in taken for part in _parts(form)):
        return "in_test"
    own = grams(form)
    if any(jaccard(own, other) >= near for other in seeds):
        return "copied"
    return "duplicate" if any(jaccard(own, other) >= near for other in kept) else ""


def _parts(form: str) -> list[str]:
    """What a prompt may not share with a test prompt: its runs of SAME characters; a shorter prompt as a whole."""
    return [form[i : i + SAME] for i in range(len(form) - SAME + 1)] or [form]


class Probe:
    """Which category's seeds a text reads like: multinomial naive Bayes on character 2-grams, one added to each count.

    >>> Probe({"a": ["红色红色"], "b": ["蓝色蓝色"]})("红色的")
    'a'
    """

    def __init__(self, texts: Mapping[str, Sequence[str]]):
        self.counts = {name: Counter(g for text in some for g in self._grams(text)) for name, some in texts.items()}
        words = {g for count in self.counts.values() for g in count}
        self.sizes = {name: count.total() + len(words) for name, count in self.counts.items()}

    def __call__(self, text: str) -> str:
        found = self._grams(text)

        def score(name: str) -> float:
            return sum(math.log((self.counts[name][g] + 1) / self.sizes[name]) for g in found)

        return max(self.counts, key=lambda name: (score(name), name))

    @staticmethod
    def _grams(text: str) -> list[str]:
        form = plain(text)
        return [form[i : i + 2] for i in range(len(form) - 1)]


# --- replies ----------------------------------------------------------------------------------------------------------------------------
async def respond(case: Case, answer: Ask, words: Mapping[str, str], judge: Any = None) -> Case | Dropped:
    """The prompt with its reply, or why it is set aside: an empty or unsafe reply, one that names a model, one the judge could not read."""
    reply = (await answer(words["respond"].replace("{prompt}", case.messages[-1].text).strip())).strip()
    full = replace(case, messages=(*case.messages, Message("assistant", reply or " ")))
    if not reply:
        return Dropped(full, "empty_reply")
    if NAMES_ITSELF.search(reply):
        return Dropped(full, "names_itself")
    if judge is None:
        return full
    about = taxonomy("cn").find(str(case.category).removeprefix("cn/")).about
    verdict = await judge(full.messages, replace(case, answer=about))
    if verdict.value is None:
        return Dropped(full, "unjudged")
    return Dropped(full, "unsafe_reply") if verdict.value >= 0.5 else full
