"""Token swap: against brute force for one swap, its count, its controls, guards that only answer, proposals by a model."""

import asyncio

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, DebertaV2Config, DebertaV2ForMaskedLM

from davylamp.attacks.token_swap import token_swap
from davylamp.core.errors import InputError
from davylamp.core.nouns import Case, Message, Verdict
from davylamp.core.registry import find
from davylamp.data.fragile_stories import ROLES, breaks, same_role
from davylamp.guards.fragile_broken import fragile_broken
from davylamp.models.classifier import PairClassifier, tiny
from davylamp.models.filtered import Filtered
from davylamp.models.swaps import MaskedWords, proposals_of, search

TEXT = "mia knocked the vase off the table ."
CASE = Case("1", (Message("user", "the box stood on the shelf ."), Message("assistant", TEXT)), answer=1)


class Table:
    """A classifier whose score is the mean of its words' scores: every swap's effect is known."""

    threshold = 0.5

    def __init__(self, low=()):
        self.low, self.asked = set(low), 0

    def scores(self, pairs):
        self.asked += len(pairs)
        return np.array([0.9 - 0.2 * sum(word in self.low for word in text.split()) for _, text in pairs])


def attack(target, budget=20, case=CASE, judge=None, **options):
    rng = np.random.default_rng(0)
    return asyncio.run(token_swap(target, case, judge or fragile_broken(), budget=budget, rng=rng, **options))


def test_it_finds_what_is_to_be_found_and_counts_its_questions():
    found = attack(Table(["lena", "flask", "swept"]))
    assert found.verdict.value == 1.0 and breaks(found.messages[-1].text) and found.messages[0] == CASE.messages[0]
    assert found.queries == 3 and "3 edits" in found.verdict.why, "0.9 - 3 x 0.2 is below the guard's 0.5"
    held = attack(Table(), budget=7)
    assert held.verdict.value == 0.0 and held.queries == 7
    assert find("attack", "token_swap").threats == ("adversarial",)


def test_one_step_takes_the_best_single_swap_that_the_oracle_lets_pass():
    class Sums(Table):
        def scores(self, pairs):
            return np.array([0.6 + (sum(map(ord, text)) % 101) / 400 for _, text in pairs])

    classifier, words = Sums(), TEXT.split()

    async def oracle(prompt, text):
        return "vase" in text  # the object must stay

    singles = [" ".join([*words[:i], new, *words[i + 1 :]]) for i in range(len(words)) for new in same_role(words[i])]
    ranked = sorted(singles, key=lambda text: classifier.scores([("", text)])[0])
    wanted = next(text for text in ranked if "vase" in text)
    state = asyncio.run(
        search(classifier, oracle, [("", TEXT)], threshold=0.1, budget=ranked.index(wanted) + 1, propose=proposals_of("roles"),
               rng=np.random.default_rng(0), places=len(words))
    )[0]  # fmt: skip
    assert state.text == wanted and state.checks == ranked.index(wanted) + 1
    ((place, what, old, new, before, after),) = state.edits
    assert what == "swap" and words[place] == old and after < before + 1 and wanted.split()[place] == new


def test_no_text_is_asked_about_twice():
    asked = []

    async def judge(messages, case=None):
        asked.append(messages[-1].text)
        return Verdict(float(bool(breaks(messages[-1].text))))

    attack(Table(), budget=60, judge=judge)
    assert len(asked) == len(set(asked)) == 60 and TEXT not in asked


def test_a_guard_that_only_answers_is_attacked_by_leaving_words_out():
    async def guard(messages, case=None):
        return Verdict(0.2 if "flask" in messages[-1].text else 0.8)

    found = attack(guard)
    assert found.verdict.value == 1.0 and "leave-one-out" in found.verdict.why
    assert attack(Filtered(Nobody(), guard)).verdict.value == 1.0, "a filtered target: its guard is attacked"

    async def silent(messages, case=None):
        return Verdict(None)

    assert attack(silent, budget=3).verdict.value == 0.0, "what a guard cannot judge does not pass"


class Nobody:
    name, identity = "nobody", {}


def test_insertions_keep_the_words():
    fillers = {*ROLES["how"], *ROLES["look"]}
    found = attack(Table(["oddly", "pale"]), inserting=True)
    words = found.messages[-1].text.split()
    assert found.verdict.value == 1.0 and [word for word in words if word not in fillers] == TEXT.split()


@pytest.mark.parametrize("order", ["saliency", "random", "random-gradient"])
def test_a_real_classifier_in_any_order_and_the_same_again(order):
    classifier = PairClassifier(*tiny(width=32))
    classifier.threshold = float(classifier.scores([(CASE.messages[0].text, TEXT)])[0]) - 0.01
    first, second = (attack(classifier, order=order) for _ in range(2))
    assert first.messages == second.messages and first.queries == second.queries
    score = classifier.scores([(CASE.messages[0].text, first.messages[-1].text)])[0]
    assert bool(first.verdict.value) == (score < classifier.threshold)


@pytest.mark.parametrize("kind", ["bert", "deberta"])
def test_proposals_of_a_masked_language_model(kind, tmp_path):
    _, tokenizer = tiny()
    small = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**small)) if kind == "bert" else DebertaV2ForMaskedLM(DebertaV2Config(**small))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    propose = proposals_of(str(tmp_path))
    words = propose(TEXT.split(), 3)
    assert len(words) == len(set(words)) == 8 and "vase" not in words
    assert attack(Table(), budget=4, proposals=str(tmp_path)).queries <= 4
    with pytest.raises(InputError, match="1 or more"):
        MaskedWords(model, tokenizer, top=0)


def test_what_cannot_be_used(tmp_path):
    for bad in ({"budget": 0}, {"places": 0}, {"proposals": str(tmp_path)}):
        with pytest.raises(InputError):
            attack(Table(), **bad)

    class Odd(Table):
        threshold = 1.5

    with pytest.raises(InputError, match="between 0 and 1"):
        attack(Odd())
    for messages in [
        (Message("user", "x"),),
        (Message("assistant", "x"),),
        (Message("user", "x"), Message("assistant", " ")),
    ]:
        with pytest.raises(InputError, match="row 2"):
            attack(Table(), case=Case("2", messages))
