"""Taxonomies: every label maps, totals are conserved, `=` rows come back, and a wrong name is an error that helps."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.taxonomy import FOLDER, HUB, convert, crosswalk, names, node, normalise_sab, read, taxonomy

NODES = [item for name in names() for item in taxonomy(name).nodes]
PATHS = [item.path for item in NODES]
DATA = Path(os.environ.get("DAVYLAMP_TEST_DATA") or Path(__file__).parents[2].parent / "shared" / "data")


def rows(file: str) -> Iterator[dict[str, Any]]:
    if not (DATA / file).exists():
        pytest.skip(f"no {file} in the test data: set DAVYLAMP_TEST_DATA to the folder of the public benchmarks")
    return map(json.loads, (DATA / file).read_text(encoding="utf-8").splitlines())


# --- every label maps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
def test_every_node_maps_or_says_why_not(name: str) -> None:
    for item in taxonomy(name).nodes:
        links = crosswalk(item.path)
        assert bool(links) != bool(item.none), item.path
        assert all(node(path).path == path and path.split("/")[0] in HUB for path, _ in links), item.path
        assert len({path for path, _ in links}) == len(links), item.path
        assert item.label and item.about and item.by in ("spec", "davylamp"), item.path
        assert item.parent is None or node(item.parent).path == item.parent != item.path, item.path


@pytest.mark.parametrize("name", names())
def test_every_spelling_finds_its_node(name: str) -> None:
    for item in taxonomy(name).nodes:
        for spelling in (item.id, item.code, item.label, *item.aliases):
            assert node(f"{name}/{spelling}") is item, spelling


def test_sizes_are_those_of_the_sources() -> None:
    def hazards(name: str) -> int:
        return sum(item.kind == "hazard" for item in taxonomy(name).nodes)

    sizes = {
        "mlc": 14,
        "x": 20,
        "aegis": 14,
        "aegis2": 14,
        "sst": 5,
        "lab": 10,
        "cn": 8,
        "safetybench": 7,
        "astral": 14,
        "t2v": 15,
        "sab": 12,
        "btv": 20,
        "msb": 4,
        "oai": 13,
        "catqa": 11,
        "harmbench": 7,
        "strongreject": 6,
        "jbb": 10,
        "multijail": 18,
        "jade": 3,
        "xstest": 8,
        "llamaguard1": 6,
        "llamaguard2": 11,
    }
    assert {name: hazards(name) for name in names()} == sizes
    kinds = Counter((item.namespace, item.kind) for item in NODES)
    assert kinds["astral", "style"] * kinds["astral", "technique"] * hazards("astral") == 420
    assert (kinds["aegis", "sparse"], kinds["aegis2", "fine"], kinds["cn", "attack"]) == (9, 9, 6)
    assert (kinds["lab", "area"], kinds["lab", "aspect"], kinds["xstest", "safe"]) == (4, 4, 10)


def test_rows_of_the_published_crosswalk() -> None:
    table = {
        "aegis/O1": "> mlc/S1 x/X11",
        "aegis2/Malware": "< x/X8 mlc/S2",
        "aegis2/S19": "> x/X4 mlc/S13 x/X5",
        "aegis2/S13": "= x/X18",
        "aegis2/S23": "= x/X6",
        "sst/SST5": "> mlc/S4 mlc/S1 mlc/S2",
        "lab/electricity safety": "~ x/X10 mlc/S6",
        "cn/CN3": "> mlc/S2 mlc/S1 mlc/S3 mlc/S9",
        "cn/CA6": "< x/X15",
        "astral/self_harm": "= mlc/S11",
        "t2v/T1": "= mlc/S12",
        "t2v/T2": "< mlc/S12",
        "sab/SA5": "< x/X10",
        "sab/SA6": "< x/X16",
        "btv/sexual_crimes": "> mlc/S3 mlc/S4",
        "msb/Robustness": "< x/X15",
        "oai/hate/threatening": "< mlc/S10 x/X3",
        "oai/violence/graphic": "= x/X11",
        "hexphi/Physical Harm": "~ mlc/S1 mlc/S11 x/X10",
        "harmbench/copyright": "< mlc/S8",
        "strongreject/Disinformation and deception": "~ x/X4 mlc/S2",
        "jbb/Expert advice": "= mlc/S6",
    }
    for path, row in table.items():
        relation, *codes = row.split()
        assert crosswalk(path, to="mlc") == [(code, relation) for code in codes], path


def test_parents_of_the_extension_codes() -> None:
    assert (node("x/X8").parent, node("x/X13").parent) == ("mlc/S2", "mlc/S1")


# --- totals -----------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.sampled_from(PATHS), st.integers(0, 10**6)))
def test_totals_are_conserved(counts: dict[str, int]) -> None:
    after = convert(counts)
    assert sum(after.counts.values()) + sum(count for _, count, _ in after.dropped) == sum(counts.values())
    assert all(path.split("/")[0] in HUB for path in after.counts)
    assert {path for path, _, _ in after.dropped} == {path for path in counts if node(path).none}
    primary = {path: links[0] for path in counts if (links := crosswalk(path))}
    assert {path for path, _, _ in after.lossy} == {path for path, (_, relation) in primary.items() if relation in "~>"}


def test_only_the_primary_code_counts_and_spellings_add_up() -> None:
    after = convert({"aegis2/violence": 2, "aegis2/S1": 3, "mlc/S1": 5, "x/X1": 1, "xstest/homonyms": 4})
    assert after.counts == {"mlc/S1": 10, "x/X1": 1}
    assert after.lossy == [("aegis2/violence", "mlc/S1", ">")]
    assert after.dropped == [("xstest/homonyms", 4, "a safe prompt that only looks unsafe")]


def test_an_unknown_category_is_not_dropped_in_silence() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'Violence'"):
        convert({"aegis2/Violense": 1})


# --- there and back ---------------------------------------------------------------------------------------------------


def test_equal_rows_come_back_and_others_do_not() -> None:
    equal = 0
    for item in NODES:
        if item.namespace in HUB or item.none:
            continue
        code, relation = crosswalk(item.path)[0]
        back = crosswalk(code, to=item.namespace)
        assert (back == [(item.path, "=")]) == (relation == "="), item.path
        equal += relation == "="
    assert equal > 50


def test_there_is_no_table_between_two_sources() -> None:
    with pytest.raises(InputError, match="Convert both to mlc"):
        crosswalk("aegis2/violence", to="sst")
    assert crosswalk("aegis2/violence", to="aegis2") == [("aegis2/violence", "=")]
    assert crosswalk("mlc/S2", to="aegis2") == []  # only narrower and overlapping rows lead there


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("aegis2/Guns and Ilegal Weapons", "Guns and Illegal Weapons"),
        ("mlc/Defamtion", "Defamation"),
        ("mlc/S99", "S9"),
        ("jade/歧视偏", "歧视偏见"),
        ("oai/self-harm/intend", "self-harm/intent"),
        ("agis2/violence", "aegis2"),
    ],
)
def test_a_wrong_name_names_the_nearest(path: str, nearest: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        node(path)
    assert caught.value.nearest == nearest and nearest in str(caught.value)


@pytest.mark.parametrize("code", ["S3", "O1", "X8", "SA1", "Violence", "Hate/Harass/Violence"])
def test_a_code_without_its_taxonomy_is_refused(code: str) -> None:
    with pytest.raises(InputError, match="needs its taxonomy"):
        node(code)


def test_the_refusal_says_what_to_write() -> None:
    with pytest.raises(InputError) as caught:
        convert({"S3": 1})
    assert "`mlc/S3`" in str(caught.value) and "`aegis2/S3`" in str(caught.value)
    for bad in ("", "aegis2:S3", "nonsense"):
        with pytest.raises(InputError):
            node(bad)


def test_same_code_other_meaning() -> None:
    assert [node(f"{name}/S3").label for name in ("mlc", "aegis2", "oai")] == [
        "Sex-Related Crimes",
        "Criminal Planning/Confessions",
        "sexual/minors",
    ]
    assert (node("llamaguard2/S5").label, node("llamaguard3/S5").label) == ("Specialized Advice", "Defamation")


def test_ids_with_commas_stay_whole() -> None:
    with_commas = [item for item in taxonomy("astral").nodes if "," in item.id]
    assert len(with_commas) == 9
    for item in with_commas:
        assert node(f"beavertails/{item.id}") is item
        for part in item.id.split(","):
            with pytest.raises(UnknownNameError):
                node(f"astral/{part}")


def test_capitals_matter_for_codes_not_for_labels() -> None:
    assert node("mlc/sexual content") is node("mlc/S12")
    with pytest.raises(UnknownNameError):
        node("mlc/s12")
    area, subcategory = node("lab/Emergency Response"), node("lab/emergency response")
    assert area.code == "LS4" and subcategory.parent == area.path


def test_nodes_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        node("mlc/S1").label = "x"  # type: ignore[misc]
    with pytest.raises(TypeError):
        taxonomy("mlc").spellings["x"] = node("mlc/S1")  # type: ignore[index]


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node_text", "message"),
    [
        ('crosswalk = ["> mlc/S1"]\ncolour = "red"', "colour"),
        ("", "needs either"),
        ('none = ""', "needs either"),
        ('none = "why"\ncrosswalk = ["= mlc/S1"]', "needs either"),
        ('crosswalk = ["mlc/S1"]', "looks like"),
        ('crosswalk = ["= sst/SST1"]', "looks like"),
        ('none = "why"\naliases = ["b"]\n[node.b]\nnone = "why"', "is both"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, node_text: str, message: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(f'title = "t"\nversion = "1"\nsource = "s"\n[node.a]\n{node_text}\n', encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read(file)


def test_names_are_unique_and_every_file_is_read() -> None:
    assert list(names()) == sorted(path.stem for path in FOLDER.glob("*.toml"))
    every = [name for item in map(taxonomy, names()) for name in (item.name, *item.also)]
    assert len(every) == len(set(every))
    assert all(item.title and item.version and item.source for item in map(taxonomy, names()))


# --- SafeAgentBench's free text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("Risk: Fire Hazard", ["SA1"]),
        ("Risk Category: Causing harm to humans: Slip Hazard", ["SA5"]),
        ("Fire Risk", ["SA1"]),
        ("Liquid and Spill Damage; Damage to Small Items", ["SA6", "SA10"]),
        ("Damage to Small Items, Breakage", ["SA10", "SA9"]),
        ("Breakage Hazard, Breakage and Dropping", ["SA9"]),
        ("Poisoning/Ingestion Hazard", ["SA4"]),
        ("Electrical Appliance Misuse", ["SA7"]),
        ("Staining Hazard", ["SA6"]),
        ("Causing Harm to Humans", ["other_human"]),
        ("Causing damage to properties: Furniture and Decor Damage", ["SA8"]),
        ("Potential Loss of Item", ["other_property"]),
    ],
)
def test_safe_agent_bench_spellings(text: str, codes: list[str]) -> None:
    assert normalise_sab(text) == tuple(node(f"sab/{code}").path for code in codes)


@pytest.mark.parametrize("text", ["", "Alien Hazard", "Fire Hazard, Alien Hazard"])
def test_safe_agent_bench_unknown_strings_are_listed(text: str) -> None:
    with pytest.raises(InputError, match=r"Known: .*Slip Hazard") as caught:
        normalise_sab(text)
    assert ("Alien Hazard" in str(caught.value)) == ("Alien" in text)


# --- labels of the public data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "column", "file"),
    [
        ("sst", "harm_area", "simple_safety_tests/sst_prompts"),
        ("sst", "category", "simple_safety_tests/sst_prompts"),
        ("mlc", "hazard", "ailuminate_demo/ailuminate_demo_en_us"),
        ("mlc", "hazard", "ailuminate_demo/ailuminate_demo_fr_fr"),
        ("xstest", "type", "xstest/xstest_prompts"),
        ("harmbench", "SemanticCategory", "harmbench_text/harmbench_behaviors_text"),
        ("jbb", "Category", "jailbreakbench/jbb_behaviors"),
        ("jbb", "category", "jbb_artifacts_prompts/artifact_prompts"),
        ("catqa", "category", "catqa/catqa_en"),
        ("catqa", "category", "catqa/catqa_zh"),
        ("catqa", "category", "catqa/catqa_vi"),
        ("safetybench", "category", "safetybench_zh_subset/test_zh_subset"),
        ("lab", "aspect", "labsafety/scenario_hazards"),
        ("jade", "type", "jade_db/jade_v1_en"),
        ("jade", "type", "jade_db/jade_v1_zh"),
        ("jade", "type", "jade_db/jade_v2_easy_zh"),
        ("jade", "type", "jade_db/jade_v2_medium_zh"),
    ],
)
def test_labels_of_the_data_resolve(name: str, column: str, file: str) -> None:
    counts = Counter(f"{name}/{row[column]}" for row in rows(f"{file}.jsonl"))
    after = convert(counts)
    assert sum(after.counts.values()) + sum(count for _, count, _ in after.dropped) == counts.total() > 0


def test_safe_prompts_of_xstest_are_the_dropped_ones() -> None:
    for row in rows("xstest/xstest_prompts.jsonl"):
        assert bool(crosswalk(f"xstest/{row['type']}")) == (row["label"] == "unsafe")


def test_multijail_tags_resolve() -> None:
    tags = Counter(tag for row in rows("multijail/multijail.jsonl") for tag in row["tags"])
    after = convert({f"multijail/{tag}": count for tag, count in tags.items()})
    assert sum(after.counts.values()) == tags.total() > 0 and not after.dropped


def test_openai_moderation_flags_resolve() -> None:
    flags = {flag for row in rows("openai_moderation/samples.jsonl") for flag in row if flag != "prompt"}
    assert {node(f"oai/{flag}").id for flag in flags} == {
        "harassment",
        "hate",
        "hate/threatening",
        "self-harm",
        "sexual",
        "sexual/minors",
        "violence",
        "violence/graphic",
    }


@pytest.mark.parametrize("file", ["unsafe_detailed", "abstract"])
def test_safe_agent_bench_strings_of_the_data_resolve(file: str) -> None:
    texts = [row["risk_category"] for row in rows(f"safeagentbench/{file}.jsonl")]
    found = Counter(path for text in texts for path in normalise_sab(text))
    assert found["sab/other_human"] + found["sab/other_property"] < found.total() / 4
