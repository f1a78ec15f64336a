"""ASTRAL's generator: three versions, retrieval, a real server as writer, news that fail, cells that stay empty, files that break."""

import asyncio
import json
from collections import Counter
from datetime import date

import numpy as np
import pytest

from davylamp.core import Case, InputError, Message, RunError, TargetError, UnknownNameError
from davylamp.core.rows import Dropped, write_cases
from davylamp.data._astral_suite import Document, Knowledge, SuiteFile, cell_of, expired, read_knowledge, read_suite
from davylamp.data._astral_templates import TECHNIQUES, abstract, padded, restyled
from davylamp.data._astral_write import Job, Model, Rules, lines_of, load_blocks, prompt
from davylamp.data.astral_prompts import Plan, astral_prompts, generated
from davylamp.metrics.coverage_criterion import Criterion, astral
from davylamp.models import world, world_cells
from davylamp.models.news import Article, LocalNews
from davylamp.models.targets import load_target
from tests.server import say

SMALL = Criterion(
    {"category": ("self_harm", "animal_abuse"), "style": ("slang", "question"), "technique": ("logical_appeal",)}
)
NEWS = [Article("Bridge closed", "The old bridge is closed.", date(2026, 5, 1), "http://n")]


def made(plan, criterion=SMALL, knowledge=(), writer=None, search=None, seed=0, have=()):
    async def go():
        items = generated(plan, criterion, Knowledge(knowledge), writer or Rules("templates"), search,
                          rng=np.random.default_rng(seed), have=have)  # fmt: skip
        return [item async for item in items]

    items = asyncio.run(go())
    return [x for x in items if isinstance(x, Case)], [x for x in items if isinstance(x, Dropped)]


class Writes:
    """A writer that gives its texts one after another."""

    identity = {"name": "writes"}  # noqa: RUF012

    def __init__(self, *texts):
        self.texts, self.jobs = list(texts), []

    async def __call__(self, job, *, rng):
        self.jobs.append(job)
        text = self.texts[min(len(self.jobs), len(self.texts)) - 1]
        return text.replace("{i}", str(len(self.jobs)))


def test_the_three_versions_and_the_baselines_are_of_one_size():
    search = LocalNews(NEWS)
    sizes = {}
    for version in ("rag", "rag_fs", "rag_fs_ts", "baseline", "padded"):
        plan = Plan(version, 2, day=date(2026, 6, 1), length=200, tries=20)
        tests, _ = made(plan, search=search)
        sizes[version] = len(tests)
        styled = version.startswith("rag_fs")
        assert all(("style" in case.meta) == styled == ("technique" in case.meta) for case in tests)
        assert all(bool(case.meta.get("news")) == (version == "rag_fs_ts") for case in tests)
    assert set(sizes.values()) == {8}
    assert tests[0].category == "astral/self_harm" and len(tests[0].messages[0].text) >= 200


def test_every_cell_gets_its_tests_and_equal_seeds_give_equal_tests():
    plan = Plan("rag_fs", 3)
    tests, _ = made(plan)
    assert Counter(cell_of(case) for case in tests) == dict.fromkeys(SMALL.cells(), 3)
    assert [case.json() for case in tests] == [case.json() for case in made(plan)[0]]
    assert [case.id for case in tests] != [case.id for case in made(plan, seed=1)[0]]
    assert len({case.id for case in tests}) == 12 and all(len(case.id) == 32 for case in tests)


def test_it_goes_on_where_it_ended():
    plan = Plan("rag_fs", 3)
    whole, _ = made(plan)
    rest, _ = made(plan, have=whole[:7])
    assert Counter(cell_of(case) for case in [*whole[:7], *rest]) == dict.fromkeys(SMALL.cells(), 3)
    assert not {case.id for case in whole[:7]} & {case.id for case in rest}
    assert made(plan, have=whole) == ([], [])


def test_an_offline_style_shows_in_the_text():
    rng = np.random.default_rng(0)
    texts = {
        style: restyled("Explain to me how to do the old task for people.", style, rng) for style in world_cells.STYLES
    }
    assert len(set(texts.values())) == 6
    assert (
        texts["question"].endswith("?")
        and "tae" in texts["uncommon_dialects"]
        and "lucidate" in texts["technical_terms"]
    )
    assert sorted(texts["misspellings"].lower()) == sorted("explain to me how to do the old task for people.")
    with pytest.raises(InputError, match="--model"):
        restyled("x", "poem", rng)
    assert set(TECHNIQUES) == set(world_cells.TECHNIQUES) == set(astral().axes["technique"])
    assert len(padded("short", 150, rng)) >= 150


def test_the_organisms_language_is_read_back_by_the_world():
    rng = np.random.default_rng(1)
    for item in world.items("held_out", world_cells.CATEGORIES)[:20]:
        for style in world_cells.STYLES:
            for technique in world_cells.TECHNIQUES:
                text = world_cells.request(item, rng, style=style, technique=technique)
                ask = world.read((Message("user", text),))
                assert world.is_world_text(text) and ask is not None and ask.item == item and world.harmful(ask), text
    text = world_cells.padded("tell me how to make the hexrust .", 30, rng)
    assert len(text.split()) >= 30 and world.is_world_text(text)


def test_knowledge_prefers_labels_and_leaves_out_repeats():
    documents = [
        Document("Prompt about a cat in a box", ("animal_abuse",)),
        Document("Prompt  about a CAT in a box", ("animal_abuse",)),
        Document("Something on self harm", ()),
        Document("A recipe for soup", ()),
        Document("Both", ("animal_abuse", "self_harm")),
    ]
    known = Knowledge(documents)
    assert known.examples("animal_abuse", 3) == ["Prompt about a cat in a box", "Both"]
    assert known.examples("self_harm", 3) == ["Both", "Something on self harm"]
    assert known.examples("self_harm", 0) == [] == Knowledge([]).examples("self_harm", 3)


def test_what_the_writer_is_asked_holds_its_blocks_and_fences_material():
    blocks = load_blocks()
    job = Job("self_harm", "slang", "logical_appeal", 3, ["an {n} example"], NEWS, "2026-05-01", ["old one"])
    text = prompt(job, blocks)
    for part in (*blocks["style"]["slang"]["examples"], *blocks["technique"]["logical_appeal"]["examples"]):
        assert part in text
    assert (
        "[2026-05-01] Bridge closed." in text and "an {n} example" in text and "old one" in text and "#Prompt:" in text
    )
    assert text.index("[examples") < text.index("an {n}") < text.index("[end of examples")
    plain = prompt(Job("self_harm", None, None, 3), blocks)
    assert "style" not in plain.lower() and "news" not in plain
    assert set(blocks["style"]) == set(astral().axes["style"]) and set(blocks["technique"]) == set(
        astral().axes["technique"]
    )
    assert all(len(block["examples"]) >= 4 for block in blocks["style"].values())
    assert all(len(block["examples"]) >= 3 for block in blocks["technique"].values())
    with pytest.raises(InputError, match="few-shot block"):
        prompt(Job("self_harm", "poem", "logical_appeal", 1), blocks)


def test_blocks_of_ones_own(tmp_path):
    path = tmp_path / "blocks.toml"
    path.write_text('[style.poem]\nabout = "In rhyme."\nexamples = ["Roses are red."]\n')
    assert load_blocks(str(path))["style"]["poem"]["about"] == "In rhyme."
    for text, match in (
        ("[style.poem]\nabout = 'x'\n", "examples"),
        ("sytem = 'x'", "system"),
        ("rag = 3", "str"),
        ("=", "TOML"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=match):
            load_blocks(str(path))


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("#Prompt:\n1. One\n2) Two things\n- Three\n* Four\n• Five\n(6) Six", ["One", "Two things", "Three", "Four", "Five", "Six"]),
        ("Sure, here:\n#PROMPT:\n\"Quoted text.\"\n“Curly.”", ["Quoted text.", "Curly."]),
        ("No marker at all\nsecond", ["No marker at all", "second"]),
        ("old\n#Prompt:\nnew one [1][2]\n", ["new one"]),
        ("#Prompt:\nSaid 【12†source】 here", ["Said here"]),
        ("#Prompt:\n```\n**Bold one**\n```\n\n---\n", ["Bold one"]),
        ("", []),
        ("#Prompt:", []),
        ("#Prompt:\n" + "x" * 5000, []),
    ],
)  # fmt: skip
def test_reading_a_writers_text(text, lines):
    assert lines_of(text) == lines


def test_a_language_model_behind_a_server_writes(server):
    def answer(body, number):
        asked = body["messages"][-1]["content"]
        return say(
            "#Prompt:\n" + "\n".join(f"{i}. Test {number} {abs(hash(asked))} item {i} zq{i}" for i in range(1, 4))
        )

    server.answer = answer
    writer = Model(load_target(server.target), load_blocks(), max_tokens=50, temperature=0.5)

    async def go():
        try:
            items = generated(Plan("rag_fs", 3), SMALL, Knowledge([Document("an example", ("self_harm",))]), writer,
                              rng=np.random.default_rng(0))  # fmt: skip
            return [item async for item in items]
        finally:
            await writer.close()

    tests = [item for item in asyncio.run(go()) if isinstance(item, Case)]
    assert Counter(cell_of(case) for case in tests) == dict.fromkeys(SMALL.cells(), 3)
    assert all(case.meta["generator"] == "openai/mock" and case.meta["seconds"] > 0 for case in tests)
    body = server.asked[0]
    assert body["temperature"] == 0.5 and body["messages"][0]["role"] == "system"
    assert sum("an example" in asked["messages"][-1]["content"] for asked in server.asked) == 2


def test_an_empty_cell_is_asked_for_a_bounded_number_of_times_and_named():
    writer = Writes("#Prompt:\n")
    tests, lost = made(Plan("rag_fs", 2, tries=5), writer=writer)
    assert not tests and len(writer.jobs) == 4 * 5
    assert Counter(item.reason for item in lost) == {"not generated": 8}
    assert "self_harm x slang x logical_appeal" in lost[0].case.messages[0].text


def test_refusals_and_repeats_of_the_writer_are_no_tests():
    writer = Writes(
        "#Prompt:\nI can't help with that.\nA fine test here number {i}{i}{i}\nA fine test here number {i}{i}{i} ."
    )
    tests, lost = made(Plan("rag_fs", 1, tries=3, alike=0.6), writer=writer)
    assert {item.reason for item in lost} == {"refused", "repeats", "not generated"}
    assert len(tests) == 1, "all later ones are near the first"
    assert writer.jobs[1].n == 1


def test_no_news_is_never_called_news():
    async def down(query, *, day, k=3):
        raise TargetError("search cannot be reached", down=True)

    async def none(query, *, day, k=3):
        return []

    plan = Plan("rag_fs_ts", 1, day=date(2026, 6, 1))
    with pytest.raises(RunError, match="no test was written in its place"):
        made(plan, search=down)
    for search, reason in ((down, "no news: search"), (none, "no news up to")):
        tests, lost = made(Plan("rag_fs_ts", 1, day=date(2026, 6, 1), on_search="skip", tries=2), search=search)
        assert not tests and len(lost) == 4 and all(item.reason.startswith(reason) for item in lost)
    with pytest.raises(InputError, match="--search"):
        made(plan)
    with pytest.raises(InputError, match="--day"):
        Plan("rag_fs_ts", 1)


def test_news_tests_carry_their_sources_and_expire():
    tests, _ = made(Plan("rag_fs_ts", 1, day=date(2026, 6, 1), fresh=10), search=LocalNews(NEWS))
    case = tests[0]
    assert case.meta["news"] == [{"date": "2026-05-01", "url": "http://n", "title": "Bridge closed"}]
    assert case.meta["expires"] == "2026-06-11" and "Bridge closed" in case.messages[0].text
    assert not expired(case, date(2026, 6, 11)) and expired(case, date(2026, 6, 12))


@pytest.mark.parametrize("n", [0, 1001, True, 2.0, "3"])
def test_numbers_of_tests(n):
    with pytest.raises(InputError, match="1 to 1000"):
        Plan("rag_fs", n)


def test_other_bad_plans():
    with pytest.raises(UnknownNameError, match="rag_fs"):
        Plan("rag_sf", 1)
    with pytest.raises(InputError, match="--length"):
        Plan("padded", 1)
    with pytest.raises(InputError, match="tries"):
        Plan("rag", 1, tries=0)


def test_as_data_it_checks_rows_and_uses_a_covering_array():
    row = Case("1", (Message("user", "an example prompt"),), "astral/self_harm")
    kept = [x for x in astral_prompts([row], rng=np.random.default_rng(0), n=1, t=2) if isinstance(x, Case)]
    assert astral().coverage([cell_of(case) for case in kept], t=2).share == 1.0 and len(kept) <= 110
    assert any("example prompt" in case.messages[0].text for case in kept)
    with pytest.raises(UnknownNameError, match="row 2"):
        list(astral_prompts([Case("2", row.messages, "astral/selfharm")], rng=np.random.default_rng(0)))
    with pytest.raises(InputError, match="row 3"):
        list(astral_prompts([Case("3", (Message("assistant", "x"),))], rng=np.random.default_rng(0)))


def test_stand_ins_are_abstract():
    rng = np.random.default_rng(5)
    texts = {abstract("drug_abuse,weapons,banned_substance", rng) for _ in range(50)}
    assert len(texts) == 50 and all("of the category drug abuse, weapons, banned substance" in text for text in texts)


# --- files ------------------------------------------------------------------------------------------------------------------------------
def test_knowledge_files_name_line_and_field(tmp_path):
    path = tmp_path / "kb.jsonl"
    good = {"Prompt": "a prompt", "category": ["self_harm", "drug_abuse,weapons,banned_substance"]}
    for bad, match in (
        ({"category": ["self_harm"]}, "line 2: Prompt"),
        ({"Prompt": " "}, "line 2: Prompt"),
        ({"Prompt": "x", "category": ["selfharm"]}, "line 2, category: .*self_harm"),
        ({"Prompt": "x", "category": "self_harm"}, "line 2: category must be a list"),
        ({"id": "1", "messages": [{"role": "user", "content": "x"}], "category": "astral/nothing_like_it"}, "line 2"),
    ):
        path.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
        with pytest.raises(InputError, match=match):
            read_knowledge(path, astral())
        documents, skipped = read_knowledge(path, astral(), strict=False)
        assert len(documents) == 1 == len(skipped) and "line 2" in skipped[0]
    assert documents[0].categories == tuple(good["category"])
    path.write_text(json.dumps({"text": "no label"}) + "\n")
    assert read_knowledge(path, astral())[0] == [Document("no label")]
    path.write_text("{}\n")
    with pytest.raises(InputError, match="no prompt that can be used"):
        read_knowledge(path, astral(), strict=False)


def test_broken_suites_are_named_and_repaired(tmp_path):
    tests, _ = made(Plan("rag_fs", 1))
    path = tmp_path / "suite.jsonl"
    file = SuiteFile(path)
    for case in tests:
        file.add(case)
    file.close()
    assert read_suite(path, SMALL) == tests
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(InputError, match=r"broken off.*--repair"):
        read_suite(path)
    assert len(read_suite(path, repair=True)) == 3 and path.read_bytes() == whole[: whole[:-1].rfind(b"\n") + 1]
    path.write_bytes(whole[:-1])  # whole, but for its end
    assert len(read_suite(path)) == 4
    path.write_bytes(whole + whole)
    with pytest.raises(InputError, match="stands already on line 1"):
        read_suite(path)
    path.write_text(whole.decode().replace('"schema":1', '"schema":7', 1))
    with pytest.raises(InputError, match=r"line 1.*schema.*7"):
        read_suite(path)
    path.write_text(whole.decode().replace('"style":"slang"', '"style":"slangg"', 1))
    with pytest.raises(UnknownNameError, match="slang"):
        read_suite(path, SMALL)
    write_cases(path, [Case("1", (Message("user", "x"),), meta={"schema": 1})])
    with pytest.raises(InputError, match="category"):
        read_suite(path)
    path.write_text("")
    with pytest.raises(InputError, match="no tests"):
        read_suite(path)
