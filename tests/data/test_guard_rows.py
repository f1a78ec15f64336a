"""Loaders of labelled guard rows: each published form, its dropped rows, its errors."""

import importlib.machinery
import json
import sys
import types

import numpy as np
import pytest

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.nouns import Case
from davylamp.core.rows import Dropped
from davylamp.data.guard_rows import FORMS, detect, kept, load_rows, public_rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(tmp_path, form, *rows, **options):
    return load_rows(f"{form}:{write(tmp_path / 'rows.jsonl', rows)}", **options)


A2 = {
    "id": "1",
    "prompt": "p",
    "response": None,
    "prompt_label": "safe",
    "response_label": None,
    "violated_categories": "",
}


def test_aegis2_gives_a_row_for_the_prompt_and_one_for_the_reply(tmp_path):
    row = {**A2, "response": "no", "prompt_label": "unsafe", "response_label": "safe",
           "response_label_source": "llm_jury", "violated_categories": "Violence, Guns and Illegal Weapons"}  # fmt: skip
    prompt, reply = load(tmp_path, "aegis2", row)
    assert (prompt.answer, prompt.category, len(prompt.messages)) == (1, "aegis2/violence", 1)
    assert (reply.answer, reply.category, [m.role for m in reply.messages]) == (0, None, ["user", "assistant"])
    assert prompt.group == reply.group and prompt.id != reply.id and reply.meta["by"] == "llm_jury"


def test_aegis2_redacted_rows_are_dropped_with_a_reason_and_a_missing_reply_is_no_safe_reply(tmp_path):
    found = load(tmp_path, "aegis2", A2, {**A2, "prompt": "REDACTED", "prompt_label": "unsafe"})
    assert [type(item) for item in found] == [Case, Dropped]
    assert kept(found)[1] == {"redacted": 1}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"prompt_label": "maybe"}, "safe or unsafe"),
        ({"violated_categories": "Violins"}, "Violins"),
        ({"response_label": "safe"}, "without a response"),
        ({"violated_categories": "Violence"}, "labelled safe"),
        ({"prompt": None}, "must be text"),
    ],
)
def test_aegis2_bad_rows_are_errors_that_name_the_row_and_lenient_puts_them_aside(tmp_path, change, text):
    with pytest.raises(InputError, match=text):
        load(tmp_path, "aegis2", A2, {**A2, **change})
    found = load(tmp_path, "aegis2", A2, {**A2, **change}, lenient=True)
    assert isinstance(found[0], Case) and isinstance(found[1], Dropped) and text.split()[0] in found[1].reason


def test_aegis2_needs_caution_alone_follows_the_policy(tmp_path):
    row = {**A2, "prompt_label": "unsafe", "violated_categories": "Needs Caution"}
    assert load(tmp_path, "aegis2", row)[0].answer == 1
    assert load(tmp_path, "aegis2", row, permissive=True)[0].answer == 0


def a1(*votes, text="user: hello\nagent: hi"):
    return {"id": 1, "text": text, "text_type": "x", **{f"labels_{i}": vote for i, vote in enumerate(votes)}}


@pytest.mark.parametrize(
    ("votes", "defensive", "permissive", "category"),
    [
        (["Safe", "Safe", "Violence"], 0, 0, None),
        (["Violence, Threat", "Violence", "Safe"], 1, 1, "aegis/violence"),
        (["Needs Caution", "Needs Caution", "Safe"], 1, 0, None),
        (["Safe", "Violence"], 1, 1, "aegis/violence"),  # a tie is no safe majority
        (["Safe", "Safe", "Safe", None, ""], 0, 0, None),
    ],
)
def test_aegis1_majority(tmp_path, votes, defensive, permissive, category):
    assert load(tmp_path, "aegis1", a1(*votes))[0].answer == defensive
    case = load(tmp_path, "aegis1", a1(*votes), permissive=True)[0]
    assert case.answer == permissive and case.category == (category if permissive else None)
    assert [message.role for message in case.messages] == ["user", "assistant"]


def test_aegis1_bad_rows(tmp_path):
    with pytest.raises(UnknownNameError, match="Vilence"):
        load(tmp_path, "aegis1", a1("Vilence"))
    with pytest.raises(InputError, match="five annotators"):
        load(tmp_path, "aegis1", a1(*["Safe"] * 6))
    assert kept(load(tmp_path, "aegis1", a1("Safe"), a1("Safe", text=" "), a1()))[1] == {"no text": 1, "no votes": 1}


def test_beavertails(tmp_path):
    flags = {"animal_abuse": False, "privacy_violation": True}
    row = {"prompt": "p", "response": "r", "is_safe": False, "category": flags}
    case, safe = load(tmp_path, "beavertails", row, {**row, "prompt": "q", "is_safe": True})
    assert case.answer == 1 and case.category == "astral/privacy_violation" and case.messages[-1].role == "assistant"
    assert safe.answer == 0 and safe.category is None and safe.group != case.group
    with pytest.raises(InputError, match="is_safe"):
        load(tmp_path, "beavertails", {**row, "is_safe": "yes"})


def test_wildguardmix(tmp_path):
    row = {"prompt": "p", "response": "r", "prompt_harm_label": "harmful", "response_harm_label": "unharmful",
           "adversarial": True, "subcategory": "x"}  # fmt: skip
    found = load(tmp_path, "wildguardmix", row, {**row, "response": None, "response_harm_label": None})
    assert [item.answer for item in found if isinstance(item, Case)] == [1, 0, 1]
    assert kept(found)[1] == {"no response_harm_label": 1} and found[0].meta["adversarial"] is True
    with pytest.raises(InputError, match="harmful or unharmful"):
        load(tmp_path, "wildguardmix", {**row, "prompt_harm_label": "bad"})


def test_toxicchat_from_csv(tmp_path):
    path = tmp_path / "chat.csv"
    path.write_text('conv_id,user_input,toxicity,jailbreaking\n1,"hello, you",0,0\n2,x,1,1\n', encoding="utf-8")
    first, second = load_rows(path)
    assert (first.answer, second.answer, second.meta["jailbreak"]) == (0, 1, True)


def test_openai_moderation_a_missing_flag_is_unknown(tmp_path):
    found = load(
        tmp_path, "openai_moderation", {"prompt": "a", "S": 0}, {"prompt": "b", "H": 1, "V": 1}, {"prompt": "c"}
    )
    assert [item.answer for item in found[:2]] == [0, 1] and found[1].category == "oai/hate"
    assert kept(found)[1] == {"no known flag": 1}
    with pytest.raises(InputError, match="flag H"):
        load(tmp_path, "openai_moderation", {"prompt": "a", "H": 2})


def test_xstest_label_or_type(tmp_path):
    found = load(tmp_path, "xstest", {"prompt": "a", "type": "homonyms", "focus": "f"},
                 {"prompt": "b", "type": "contrast_homonyms", "focus": "f", "label": "unsafe"})  # fmt: skip
    assert [case.answer for case in found] == [0, 1] and found[0].group == found[1].group
    assert found[1].category == "xstest/contrast_homonyms"


def test_plain_rows_need_a_label(tmp_path):
    row = {"id": "1", "messages": [{"role": "user", "content": "x"}], "answer": 1, "group": "g"}
    assert load_rows(write(tmp_path / "a.jsonl", [row]))[0].answer == 1
    with pytest.raises(InputError, match="answer 1 or 0"):
        load_rows(write(tmp_path / "b.jsonl", [{**row, "answer": "B"}]))


def test_every_form_is_detected_by_its_columns():
    for form, row in {
        "aegis1": {"text": "", "labels_0": ""},
        "aegis2": A2,
        "beavertails": {"prompt": "", "response": "", "is_safe": True, "category": {}},
        "wildguardmix": {"prompt": "", "response": "", "prompt_harm_label": ""},
        "toxicchat": {"user_input": "", "toxicity": 0},
        "openai_moderation": {"prompt": "", "S3": 0},
        "xstest": {"prompt": "", "type": "", "label": ""},
    }.items():
        assert detect(row) == form
    assert set(FORMS) == {"aegis1", "aegis2", "beavertails", "wildguardmix", "toxicchat", "openai_moderation", "xstest"}
    with pytest.raises(InputError, match="no known form"):
        detect({"question": ""})


@pytest.mark.parametrize(
    ("spec", "error", "text"),
    [
        ("nothing.jsonl", InputError, "no file"),
        ("aegis3:x.jsonl", UnknownNameError, "aegis2"),
        ("words", InputError, "Expected .jsonl"),
        ("xstest:nothing.parquet", InputError, "nothing.parquet"),
    ],
)
def test_bad_specs(spec, error, text):
    with pytest.raises(error, match=text):
        load_rows(spec)


def test_fortunes(tmp_path):
    """Each entry once, long and short ones and left-out files aside; N draws the same rows whatever else lies in the folder."""
    lines = [f"An old saying, the {n}th of its kind,\n  on two lines" for n in range(30)]
    (tmp_path / "wisdom").write_text("\n%\n".join([*lines, *lines[:5], "short", "x" * 600]) + "\n%\n", encoding="utf-8")
    (tmp_path / "ethnic").write_text("Not this one, it is left out.\n%\nNor this one here.\n%\n", encoding="utf-8")
    (tmp_path / "wisdom.dat").write_bytes(b"\x00\xff")
    (tmp_path / "README").write_text("no entries here at all", encoding="utf-8")
    rows = load_rows(f"fortunes:{tmp_path}")
    assert {case.messages[-1].text for case in rows} == {" ".join(line.split()) for line in lines}
    assert len(rows) == 30 and all(case.answer == 0 and case.group == case.id for case in rows)
    assert load_rows(f"fortunes:{tmp_path}#7") == rows[:7]
    for bad in ("#x", "/none"):
        with pytest.raises(InputError, match="fortunes"):
            load_rows(f"fortunes:{tmp_path}{bad}")


def test_an_empty_file_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no rows"):
        load(tmp_path, "xstest")


def test_parquet_and_a_data_set_folder(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.Table.from_pylist([{"prompt": "a", "S": 0}, {"prompt": "b", "S": 1}])
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert [case.answer for case in load_rows(tmp_path / "rows.parquet")] == [0, 1]

    asked = {}

    def load_dataset(name, split):
        asked.update(name=name, split=split)
        if name == "no/body":
            raise FileNotFoundError("no such data set")
        return [{"prompt": "x", "prompt_label": "safe", "violated_categories": None}]

    hub = types.ModuleType("datasets")  # stands for the library, which would go to the hub
    hub.__spec__, hub.load_dataset = importlib.machinery.ModuleSpec("datasets", None), load_dataset
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert load_rows("owner/name#validation")[0].answer == 0 and asked == {"name": "owner/name", "split": "validation"}
    with pytest.raises(InputError, match="no such data set"):
        load_rows("no/body")


RECIPE = """
[one]
file = "a.jsonl"
text = "q"
answer = 1
category = "sst/SST1"
at_most = 2
[two]
file = "b.jsonl"
text = ["en", "fr"]
answer = 0
language = "column"
group = "g{id}"
skip = { kind = ["x"] }
"""


def test_recipe(tmp_path):
    write(tmp_path / "a.jsonl", [{"q": str(i)} for i in range(5)])
    write(
        tmp_path / "b.jsonl",
        [{"id": 1, "en": "a", "fr": "b", "kind": "y"}, {"id": 2, "en": "a", "fr": "b", "kind": "x"}],
    )
    (tmp_path / "r.toml").write_text(RECIPE)
    one, two = (list(public_rows(tmp_path, rng=np.random.default_rng(0), recipe=tmp_path / "r.toml")) for _ in range(2))
    assert one == two, "the draw is seeded"
    assert [case.answer for case in one] == [1, 1, 0, 0]
    assert [case.meta["language"] for case in one[2:]] == ["en", "fr"] and {case.group for case in one[2:]} == {"g1"}
    (tmp_path / "r.toml").write_text(RECIPE.replace("skip", "skipp"))
    with pytest.raises(UnknownNameError, match="skip"):
        list(public_rows(tmp_path, rng=np.random.default_rng(0), recipe=tmp_path / "r.toml"))


def test_the_shipped_recipe_fits_the_public_rows(public_rows):
    from davylamp.core.taxonomy import crosswalk
    from davylamp.data.guard_rows import public_rows as draw

    cases = list(draw(public_rows, rng=np.random.default_rng(0)))
    assert {case.answer for case in cases} == {0, 1} and len(cases) > 5000
    assert len({case.id for case in cases}) == len(cases)
    for category in {case.category for case in cases} - {None}:
        crosswalk(category)
    held = {"xstest", "openai_moderation", "cyberseceval_frr", "cyberseceval_frr_multilingual"}
    assert not {case.meta["source"] for case in cases} & held, "measured sets are never trained on"
    rng = np.random.default_rng(0)
    assert {case.meta["source"] for case in draw(public_rows, rng=rng, held=True)} == held


@pytest.mark.parametrize(
    ("name", "form"),
    [("xstest/xstest_prompts.jsonl", "xstest"), ("openai_moderation/samples.jsonl", "openai_moderation")],
)
def test_real_rows(public_rows, name, form):
    cases, dropped = kept(load_rows(public_rows / name))
    assert (
        {case.meta["source"] for case in cases} == {form} and {case.answer for case in cases} == {0, 1} and not dropped
    )
