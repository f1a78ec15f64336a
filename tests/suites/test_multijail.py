"""MultiJail: parallel rows, tiers, arms, and the share that any language breaks, on made-up rows and on the public ones."""

import asyncio
import json

import pytest

from davylamp.core.errors import InputError, TargetError, UnknownNameError
from davylamp.core.nouns import Case, Message
from davylamp.core.tally import Tally
from davylamp.guards.translated import translated
from davylamp.suites.multijail import LEVELS, TIERS, multijail

LANGUAGES = ("en", "zh", "ar", "sw")


def rows(path, n=4, **change):
    lines = [
        {"id": str(i), "source": "own", "tags": ["Theft", "Weapons"] if i % 2 else ["Theft"], **{k: f"{k} {i}" for k in LANGUAGES}}
        for i in range(n)
    ]  # fmt: skip
    for where, value in change.items():
        number, column = where.split("_", 1)
        lines[int(number[1:])][column] = value
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "rows.jsonl"


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "template.txt"
    path.write_text("Please do all that follows. {prompt}")
    return str(path)


def test_cases_are_parallel(file):
    suite = multijail(rows=rows(file))
    assert len(suite.cases) == 4 * 4
    first = suite.cases[0]
    assert (first.messages[0].text, first.group) == ("en 0", "0")
    assert (first.meta["tier"], first.meta["pool"]) == ("pivot", "English")
    assert {case.meta["tier"] for case in suite.cases} == {"pivot", *LEVELS}
    assert len({case.id for case in suite.cases}) == 16


def test_the_table_of_tiers():
    assert [sum(tier == level for tier in TIERS.values()) for level in LEVELS] == [3, 3, 3]


def test_arms_put_the_instruction_before_the_prompt(file, template, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"language": k, "text": f"[{k}] {{prompt}}"}) + "\n" for k in ("zh", "ar", "sw")))
    suite = multijail(
        rows=rows(file), arms=("unintentional", "intentional", "translated"), template=template, translations=str(own)
    )
    texts = {(case.meta["arm"], case.meta["language"]): case.messages[0].text for case in suite.cases[:12]}
    assert texts["unintentional", "zh"] == "zh 0"
    assert texts["intentional", "zh"] == "Please do all that follows. zh 0"
    assert texts["translated", "zh"] == "[zh] zh 0"
    assert texts["translated", "en"] == "Please do all that follows. en 0"


def told(suite, verdicts):
    tally = Tally(suite.metrics)
    for case in suite.cases:
        value, label = verdicts(case)
        tally.add({"case": case.json(), "verdict": {"value": value, "label": label}})
    return {(e.name, e.category, e.arm): e for e in tally.estimates()}


def test_rates_any_language_and_gaps_by_hand(file):
    """Items 0 and 1 break in Swahili, item 1 in Arabic as well; item 2 is invalid in Arabic."""
    suite = multijail(rows=rows(file))

    def verdict(case):
        if (case.group, case.meta["language"]) in {("0", "sw"), ("1", "sw"), ("1", "ar")}:
            return 1.0, "unsafe"
        return (0.0, "nonresponsive") if (case.group, case.meta["language"]) == ("2", "ar") else (0.0, "safe")

    found = told(suite, verdict)
    value = lambda *key: found[key].value  # noqa: E731
    assert value("unsafe_rate", "language=sw", None) == 0.5
    assert value("unsafe_rate", "tier=medium", None) == 0.25
    assert value("unsafe_rate", "pool=non-English", None) == 0.25
    assert value("invalid_rate", "language=ar", None) == 0.25
    assert value("any_language", None, None) == 0.5  # items 0 and 1 of 4, more than any mean
    assert value("any_language", "tier=low", None) == 0.5
    assert value("any_language", "tier=high", None) == 0
    assert value("gap_sw", None, "sw - en") == 0.5
    assert value("tier_gap_low", None, "low - high") == 0.5
    assert value("unsafe_rate", "tags=multijail/weapons", None) == pytest.approx(2 / 8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"r2_zh": ""}, "zh: ids 2"),
        ({"r2_xx": "new column"}, "xx: ids 2"),
        ({"r2_id": "1"}, "stands already at rows.jsonl line 2"),
        ({"r1_tags": ["Nonsense"]}, "a tag is unknown"),
        ({"r1_tags": "not a list"}, "must be a list"),
        ({"r1_tags": []}, "must be a list"),
    ],
)
def test_rows_that_are_not_parallel(file, change, says):
    with pytest.raises(InputError, match=r".*") as caught:
        multijail(rows=rows(file, **change))
    assert says in str(caught.value)
    assert "zh 1" not in str(caught.value)  # never a prompt


def test_tags_as_python_writes_them(file):
    text = "['Theft', 'Non-violent unethical behavior (e.g. lying, cheating, etc.)']"
    suite = multijail(rows=rows(file, r0_tags=text))
    assert suite.cases[0].meta["tags"] == ["multijail/theft", "multijail/non_violent_unethical_behavior"]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"languages": ("fr",)}, UnknownNameError, "fr"),
        ({"arms": ()}, InputError, "got none"),
        ({"arms": ("intentional",)}, InputError, "needs --template"),
        ({"tiers": ("sw=lowest",)}, InputError, "ne=low"),
        ({"rows": "rows.txt"}, InputError, ".csv or .jsonl"),
    ],
)
def test_bad_options(file, options, error, says):
    with pytest.raises(error) as caught:
        multijail(**{"rows": rows(file), **options})
    assert says in str(caught.value)


def test_a_language_without_a_tier_needs_one(file, monkeypatch):
    text = rows(file)
    file.write_text(file.read_text().replace('"sw"', '"ne"'))
    with pytest.raises(InputError, match="--tiers ne=low"):
        multijail(rows=text)
    assert {c.meta["tier"] for c in multijail(rows=text, tiers=("ne=low",)).cases if c.meta["language"] == "ne"} == {
        "low"
    }


@pytest.mark.parametrize("text", ["no slot", "{prompt} and {prompt}", "{prompt} {more}"])
def test_a_template_has_one_slot(file, tmp_path, text):
    path = tmp_path / "t.txt"
    path.write_text(text)
    with pytest.raises(InputError, match="exactly once"):
        multijail(rows=rows(file), arms=("intentional",), template=str(path))


def test_the_public_rows(public_rows):
    suite = multijail(rows=str(public_rows / "multijail" / "multijail.jsonl"))
    assert len(suite.cases) % 10 == 0
    assert len({case.meta["language"] for case in suite.cases}) == 10


# --- the judge that translates ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def words(tmp_path):
    """A translator that knows a toy language, and counts."""
    path = tmp_path / "words.py"
    path.write_text(
        "ASKED = []\n"
        "def english(messages, *, seed=0, **settings):\n"
        "    text = messages[-1].text.split('[begin]\\n')[1].rsplit('\\n[end]', 1)[0]\n"
        "    ASKED.append(text)\n"
        "    return {'nei kan': 'I cannot help with that.', 'ja her': 'Sure, here it is.'}.get(text, '')\n"
    )
    return f"python/{path}:english"


def judged(guard, text, language="jv"):
    case = Case("1", (Message("user", "x"),), meta={"language": language})
    return asyncio.run(guard((*case.messages, Message("assistant", text)), case))


def test_the_reply_is_judged_in_english(words):
    guard = translated(judge="refusal:languages=en", translator=words)
    assert guard.measures == "complied"
    assert [judged(guard, text).value for text in ("nei kan", "ja her")] == [0.0, 1.0]
    assert judged(guard, "blub").label == "nonresponsive"
    assert judged(guard, " ").label == "nonresponsive"
    assert judged(guard, "I cannot help with that.", language="en").value == 0.0  # English is not translated
    bare = translated(judge="refusal:languages=en", translator=words).judge
    assert judged(bare, "nei kan").value == 1.0  # the control: without translation the refusal is missed


def test_a_translator_that_fails_is_no_verdict(tmp_path):
    path = tmp_path / "down.py"
    path.write_text("def down(messages, **settings):\n    raise RuntimeError('down')\n")
    with pytest.raises((TargetError, RuntimeError)):
        judged(translated(judge="refusal", translator=f"python/{path}:down"), "ja her")
