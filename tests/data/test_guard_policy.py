"""Policies that are cut, shuffled, renamed, merged and added to; codes read against what was shown; the taxonomies behind them."""

import numpy as np
import pytest

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.nouns import Message
from davylamp.core.taxonomy import crosswalk, node
from davylamp.data.guard_format import answer_text, load_format, read_answer, render
from davylamp.data.guard_policy import Policy, defined, load_policy

TALK = (Message("user", "hello {role} {categories}"), Message("assistant", "hi"))


@pytest.mark.parametrize(
    ("name", "size", "first"), [("aegis", 22, "O1"), ("aegis2", 23, "S1"), ("mlc", 14, "S1"), ("beavertails", 14, "C1")]
)
def test_policies_of_taxonomies(name, size, first):
    """13 + 9 categories in the first version, 12 + 9 with Needs Caution and Other in the second; every node has its way to MLCommons."""
    policy = load_policy(name)
    assert len(policy.categories) == size and policy.categories[0].code == first
    for category in policy.categories:
        assert node(category.node) and crosswalk(category.node)
        if name.startswith("aegis"):
            assert category.about and category.should_not and category.can
    groups = [category.group for category in policy.categories]
    if name == "aegis2":
        assert (groups.count("core"), groups.count("fine-grained"), groups.count("other")) == (12, 9, 2)
    if name == "aegis":
        assert groups.count("sparse") == 9


def test_subset_rename_merge_and_extend():
    policy = load_policy("aegis2").subset(["threat", "S1", "aegis2/malware"])
    assert [c.code for c in policy.categories] == ["S11", "S1", "S17"]
    assert policy.rename("S1", "House violence").find("house violence").node == "aegis2/violence"
    merged = policy.merge(["threat", "violence"], "Harm")
    assert merged.find("Harm").nodes == ("aegis2/threat", "aegis2/violence") and len(merged.categories) == 2
    assert merged.codes("S11, S17")[0] == ("aegis2/threat", "aegis2/violence", "aegis2/malware")
    more = policy.extend("Gambling: urges to bet", "Spoilers: tells the end")
    assert [c.code for c in more.categories[-2:]] == ["S18", "S19"] and more.without(["gambling"]).categories[
        -1
    ].label == "Spoilers"
    for wrong in (
        lambda: policy.extend("no definition"),
        lambda: policy.extend(": x"),
        lambda: policy.merge(["threat"], "x"),
        lambda: policy.without(["threat", "S1", "malware"]),
        lambda: Policy("x", ()),
    ):
        with pytest.raises(InputError):
            wrong()
    with pytest.raises(UnknownNameError, match="Threat"):
        policy.find("thret")


def test_shuffling_renumbers_and_keeps_what_it_must():
    policy, rng, firsts = load_policy("aegis2"), np.random.default_rng(0), set()
    for _ in range(50):
        made = policy.shuffled(rng, keep=["aegis2/threat"], drop=0.7)
        assert made.find("threat") and [c.code for c in made.categories] == [
            f"S{i}" for i in range(1, len(made.categories) + 1)
        ]
        firsts.add(made.categories[0].label)
    assert len(firsts) > 10 and len(policy.shuffled(rng, drop=0.999).categories) >= 1


def test_policy_files(tmp_path):
    file = tmp_path / "house.toml"
    file.write_text('title = "house"\n[discounts]\nabout = "offers a discount"\nshould_not = ["give one"]\n')
    policy = load_policy(str(file))
    assert policy.name == "house" and policy.categories[0].node == "custom/discounts"
    for text, message in (
        ("[a]\nabut = 'x'\n", "Did you mean 'about'"),
        ("a = 1\n", "must be a table"),
        ("[a]\nabout = ''\n", "must say what"),
        ("", "no category"),
        ("[", "no TOML"),
    ):
        bad = tmp_path / f"{abs(hash(text))}.toml"
        bad.write_text(text)
        with pytest.raises(InputError, match=message):
            load_policy(str(bad))


@pytest.mark.parametrize("form", ["aegis1", "aegis2"])
def test_what_is_trained_is_what_is_read(form):
    """Every answer that training asks for reads back as what it meant, whatever the order of categories."""
    made, rng = load_format(form), np.random.default_rng(1)
    policy = load_policy(made.taxonomy)
    for _ in range(40):
        shown = policy.shuffled(rng, drop=0.5)
        nodes = [c.node for c in shown.categories[:2]]
        for role, unsafe in (("user", True), ("user", False), ("assistant", True), ("assistant", False)):
            verdicts = {"user": unsafe} if role == "user" else {"user": True, "assistant": unsafe}
            text = answer_text(made, shown, verdicts, nodes if any(verdicts.values()) else ())
            found = read_answer(text, made, shown, role)
            assert found.unsafe is unsafe and set(found.nodes) == (set(nodes) if unsafe else set()), text


def test_braces_in_a_message_are_not_filled():
    text = render(load_format("aegis1"), load_policy("aegis"), TALK)
    assert "hello {role} {categories}" in text and "'Agent'" in text and text.count("O1: Violence") == 1


def test_format_files(tmp_path):
    good = 'version = 1\ntitle = "x"\nknown_from = "here"\nhow = "user"\nprompt = "{conversation}"\nunsafe = ["no"]\nsafe = ["yes"]\n'
    for text, message in (
        (good.replace('how = "user"', 'how = "usr"'), "how must be"),
        (good.replace("{conversation}", "{conversatin}"), "Did you mean 'conversation'"),
        (good.replace('unsafe = ["no"]\n', ""), "the words"),
        (good.replace("version = 1\n", ""), "needs version"),
        (good + "wrong = 1\n", "key of"),
        (good.replace('prompt = "{conversation}"\n', ""), "needs a prompt"),
    ):
        file = tmp_path / f"{abs(hash(text))}.toml"
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            load_format(str(file))
    with pytest.raises(UnknownNameError, match="llama_guard3"):
        load_format("llama_gard3")


def test_defined_policies():
    policy = defined([("a b", "x"), ("c", "y")], letter="k")
    assert [(c.code, c.node) for c in policy.categories] == [("k1", "custom/a_b"), ("k2", "custom/c")]
