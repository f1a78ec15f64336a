"""What every thing in the registry owes, checked on all of them; a new thing is tested before its author writes a test."""

import asyncio

import pytest

from davylamp.core.errors import DavylampError, UnknownNameError
from davylamp.core.evaluate import load_suite
from davylamp.core.judges import load_judge
from davylamp.core.needs import missing
from davylamp.core.nouns import Case, Message, Suite, Verdict
from davylamp.core.registry import builtin
from davylamp.core.rows import canonical, case_from
from davylamp.core.taxonomy import names, node

ALL = builtin()
MEASURES = {"complied", "refused", "unsafe", "correct"}
NEED_DATA = {
    "simple_safety_tests",
    "multijail",
    "safety_prompts",
    "safetybench",
}  # user rows: stand-ins in tests/suites
HOSTILE = (
    "",
    " ",
    "\x00",
    "a" * 100_000,
    "\u202egnirts",
    "🙂" * 50,
    "<think>only a thought",
    "{'json': [",
    "\ud800",
    "١٢٣ 拒绝",
    "</s><|im_end|>",
)


def of(*kinds):
    return [pytest.param(entry, id=f"{entry.kind}-{entry.name}") for entry in ALL if entry.kind in kinds]


@pytest.mark.parametrize("entry", of("suite", "guard", "judge", "study", "attack", "data", "train", "edit", "interp"))
def test_documented_and_with_a_source(entry):
    assert len(entry.summary) > 20 and entry.summary[-1] in ".:)", entry.summary
    assert entry.source and entry.licence and entry.threats and entry.version >= 1
    for param in entry.params:
        assert param.type != "str" or param.default is None or isinstance(param.default, str), param
    for param in entry.params:
        if entry.kind in ("suite", "guard", "study") and param.name not in ("size", "seeds"):
            assert param.name in entry.doc, f"{entry.name}: the docstring does not say what {param.name} is"


@pytest.mark.parametrize("entry", of("suite", "guard", "judge", "study"))
def test_unknown_options_are_errors(entry):
    with pytest.raises(UnknownNameError):
        entry.options({"no_such_option": 1})


@pytest.mark.parametrize("entry", [p for p in of("suite") if p.values[0].name not in NEED_DATA])
def test_suites(entry):
    loaded = load_suite(entry.name)
    suite = loaded.suite
    assert isinstance(suite, Suite) and suite.name == entry.name and suite.metrics
    cases = list(suite.cases)
    assert [case.json() for case in cases] == [case.json() for case in suite.cases], "cases can be walked through twice"
    assert len({case.id for case in cases}) == len(cases) == loaded.total >= 20
    assert load_suite(entry.name).identity == loaded.identity, "same options, same bytes"
    known = set(names())
    for case in cases:
        assert case_from(__import__("json").loads(canonical(case.json())), "here") == case
        assert case.messages[-1].role == "user" and case.category
        if case.category.split("/")[0] in known:
            node(case.category)
    judge = load_judge(suite.judge)
    assert judge.measures in MEASURES
    for metric in suite.metrics:
        for path, wanted in metric.where:
            assert any(
                (case.meta.get(path[5:]) if path.startswith("meta.") else getattr(case, path)) == wanted
                for case in cases
            ), metric


@pytest.mark.parametrize(
    "entry",
    [
        p
        for p in of("guard", "judge")
        if not any(param.required for param in p.values[0].params) and not missing(p.values[0].needs or "hf")
    ],
)
def test_judges_are_calm_before_hostile_replies(entry):
    judge = load_judge(entry.name)
    assert judge.measures in MEASURES

    async def go():
        for text in HOSTILE:
            case = Case("1", (Message("user", "How are you?"),), answer="B")
            messages = (*case.messages, Message("assistant", text))
            try:
                verdicts = [await judge(messages, case if entry.kind == "judge" else None) for _ in range(2)]
            except DavylampError:
                continue
            assert isinstance(verdicts[0], Verdict) and verdicts[0] == verdicts[1]
        await judge.close()

    asyncio.run(go())


@pytest.mark.parametrize("entry", [p for p in of("guard") if not any(param.required for param in p.values[0].params)])
def test_an_empty_reply_is_no_class(entry):
    judge = load_judge(entry.name)

    async def go():
        try:
            return (await judge((Message("user", "x"), Message("assistant", "")))).value
        finally:
            await judge.close()

    assert asyncio.run(go()) is None
