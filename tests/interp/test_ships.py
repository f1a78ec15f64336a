"""`interp ships` and `interp sahara` end to end on tiny models: against the naive loop, resumed, judged, and with bad input."""

import json

import numpy as np
import pytest
import torch

from davylamp.core.errors import InputError, RunError, UnknownNameError
from davylamp.core.nouns import Case, Estimate, Message
from davylamp.core.rows import write_cases
from davylamp.interp import sahara as sahara_module
from davylamp.interp._effect import Speaker, rise
from davylamp.interp._prompts import encode, split
from davylamp.interp.sahara import sahara
from davylamp.interp.ships import overlap, ships
from davylamp.models import hooks
from davylamp.report import figures
from tests import tiny
from tests.interp import naive

WRAPPER = "role {prompt} end"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny.heads("llama", spread=3.0)


def rows(n, kind="harmful", seed=0):
    rng = np.random.default_rng(seed)
    return [
        Case(
            f"{kind}-{i}",
            (Message("user", " ".join(f"w{k}" for k in rng.integers(60, size=3 + i % 3))),),
            answer="w1",
            group=f"g{i // 2}",
            meta={} if kind == "harmful" else {"label": "safe"},
        )
        for i in range(n)
    ]


def look(function, model, given, tokenizer, seed=0, **options):
    return function(model, given, tokenizer=tokenizer, rng=np.random.default_rng(seed), **options)


def test_ships_are_those_of_the_naive_loop(model, tokenizer):
    harmful, benign = rows(6), rows(4, "benign", seed=1)
    found = look(ships, model, harmful + benign, tokenizer, per_query=True, top=3)
    prompts, calm = encode(model, tokenizer, harmful), encode(model, tokenizer, benign)
    wanted, angles, _ = naive.scores(model, prompts)
    beside, _, _ = naive.scores(model, calm)
    assert np.allclose(found["ships"], wanted.mean(0), atol=1e-5)
    assert np.allclose(found["contrast"], wanted.mean(0) - beside.mean(0), atol=1e-5)
    assert np.allclose(found["generalized"]["degrees"], angles, atol=5e-3)
    assert np.allclose(found["per_query"]["harmful-3"], wanted[3], atol=1e-5)
    assert found["prompts"]["harmful"] == 6 and found["prompts"]["benign"] == 4
    assert found["parameters"] == {"per_head": 8 * 32, "of": sum(p.numel() for p in model.parameters()),
                                   "share": 8 * 32 / sum(p.numel() for p in model.parameters())}  # fmt: skip
    best = hooks.parse_heads([found["ranking"][0]["head"]])[0]
    first = next(e for e in found["estimates"] if e.name == "ships" and e.arm == f"head {found['ranking'][0]['head']}")
    assert first.value == pytest.approx(wanted.mean(0)[best], abs=1e-5) and first.low < first.value < first.high
    assert "3 groups" in first.method


def test_results_are_plain_and_drawable(model, tokenizer):
    for function, options in ((ships, {}), (ships, {"component": "k", "screen": 0.5}), (sahara, {"size": 2})):
        found = look(function, model, rows(9) + rows(9, "benign"), tokenizer, **options)
        assert all(isinstance(e, Estimate) for e in found.pop("estimates")) and found.pop("notes") is not None
        assert len(figures.views(found["figures"])) >= 2
        json.dumps(found, allow_nan=False)


def test_same_seed_same_answer(model, tokenizer):
    one, two = (look(ships, model, rows(9), tokenizer, screen=0.3) for _ in range(2))
    assert json.dumps({**one, "estimates": [e.json() for e in one["estimates"]]}) == json.dumps(
        {**two, "estimates": [e.json() for e in two["estimates"]]}
    )


def test_the_screen_leaves_gaps_and_says_so(model, tokenizer):
    found = look(ships, model, rows(9), tokenizer, screen=0.2)
    scored = sum(value is not None for line in found["ships"] for value in line)
    assert scored == len(found["ranking"]) == 5 and any("approximate" in note for note in found["notes"])
    assert found["screen"] is not None


def test_two_models_are_compared(model, tokenizer):
    other = tiny.heads("llama", seed=1, spread=3.0)
    same = look(ships, model, rows(9), tokenizer, other=model)["other"]
    assert same["shared"] == same["depth"] == 10 and same["rank_biased_overlap"] == pytest.approx(1.0)
    assert same["shared_by_chance"] == pytest.approx(100 / 12)
    found = look(ships, model, rows(9) + rows(8, "benign"), tokenizer, other=other)
    assert found["other"]["rank_biased_overlap"] < 1 and {"shared_top_heads", "rank_biased_overlap"} <= {
        e.name for e in found["estimates"]
    }
    with pytest.raises(InputError, match="share a vocabulary"):
        look(ships, model, rows(9), tokenizer, other=tiny.heads("llama", vocab_size=50))
    assert overlap([(0, 0), (0, 1)], [(0, 1), (1, 1)], depth=2)["shared"] == 1


def test_the_wrapper_is_the_users(model, tokenizer, tmp_path):
    given = [Case("1", (Message("user", "w1 w2"),)), Case("2", (Message("user", "w3"), Message("assistant", "w4")))]
    ids = encode(model, tokenizer, given, WRAPPER)
    assert [tokenizer.decode(row) for row in ids] == ["<unk> w1 w2 <unk>", "<unk> w3 <unk>"]
    assert encode(model, tokenizer, given[1:]) == [encode(model, tokenizer, [Case("x", given[1].messages[:1])])[0]]
    plain = tiny.tokenizer(template=None)
    with pytest.raises(InputError, match="no chat template"):
        encode(model, plain, given)
    assert encode(model, plain, given, WRAPPER) == ids
    write_cases(tmp_path / "benign.jsonl", rows(3, "benign"))
    harmful, benign = split(given, str(tmp_path / "benign.jsonl"))
    assert [len(harmful), len(benign)] == [2, 3]


# --- sahara ---------------------------------------------------------------------------------------------------------------
def greedy(model, prompts, calm, size):
    """Algorithm 1 by brute force: at each step the whole board by the naive loop, against the plain model."""
    group, boards = [], []
    plain = [np.array([naive.states(model, one, [])[0].numpy() for one in p]) for p in (prompts, calm)]
    for _ in range(size):
        board = naive.scores(model, prompts, group, against=plain[0])[1]
        if len(calm) > 1:
            board = board - naive.scores(model, calm, group, against=plain[1])[1]
        boards.append(board)
        group.append(tuple(int(i) for i in np.unravel_index(np.nanargmax(board), board.shape)))
    return group, boards


@pytest.mark.parametrize("benign", [0, 6])
def test_sahara_is_the_greedy_search(model, tokenizer, benign):
    harmful, calm = rows(6), rows(benign, "benign", seed=2)
    group, boards = greedy(model, encode(model, tokenizer, harmful), encode(model, tokenizer, calm), 2)
    found = look(sahara, model, harmful + calm, tokenizer, size=2)
    assert found["group"] == [hooks.head_name(head) for head in group]
    for step, board in zip(found["steps"], boards, strict=True):
        assert np.allclose(np.array(step["board"], dtype=float), board, atol=1e-2, equal_nan=True)
    assert found["steps"][1]["board"][group[0][0]][group[0][1]] is None


def test_a_search_goes_on_after_a_crash(model, tokenizer, tmp_path, monkeypatch):
    state = tmp_path / "state.json"
    whole = look(sahara, model, rows(9), tokenizer, size=3)
    step, calls = sahara_module._Search.step, []

    def crash(self, group):
        calls.append(list(group))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(self, group)

    monkeypatch.setattr(sahara_module._Search, "step", crash)
    with pytest.raises(KeyboardInterrupt):
        look(sahara, model, rows(9), tokenizer, size=3, state=str(state))
    assert len(json.loads(state.read_text())["steps"]) == 2
    again = look(sahara, model, rows(9), tokenizer, size=3, state=str(state))
    assert len(calls) == 4 and again["group"] == whole["group"]
    assert np.allclose(again["steps"][2]["degrees"], whole["steps"][2]["degrees"], atol=1e-3)
    with pytest.raises(InputError, match="another search"):
        look(sahara, model, rows(8), tokenizer, size=3, state=str(state))
    state.write_text("{}")
    with pytest.raises(InputError, match="no state"):
        look(sahara, model, rows(9), tokenizer, size=3, state=str(state))


def test_judged_answers_follow_the_ablation(model, tokenizer):
    found = look(sahara, model, rows(6) + rows(6, "benign"), tokenizer, size=2, judge="refusal", new_tokens=4)
    arms = {(e.name, e.arm) for e in found["estimates"]}
    assert {
        ("compliance", "0 heads ablated"),
        ("compliance", "2 heads ablated"),
        ("accuracy", "1 heads ablated"),
    } <= arms
    assert any(e.name == "compliance_rise" for e in found["estimates"]) and figures.views(found["figures"])
    drawn = look(sahara, model, rows(6), tokenizer, size=1, judge="refusal", new_tokens=4, top_k=5)
    assert {e.name for e in drawn["estimates"]} == {"generalized_ships", "compliance", "compliance_rise"}
    confirmed = look(ships, model, rows(6), tokenizer, judge="refusal")
    assert sum(e.name == "compliance_rise" for e in confirmed["estimates"]) == 4
    assert not confirmed["verdict"]["concentrated"]  # a random model never refuses, so that no ablation frees anything


def test_incoherent_answers_are_no_success(model, tokenizer):
    speaker = Speaker(model, tokenizer, "refusal", new_tokens=6, incoherent=-1.0)  # every answer counts as broken
    before, after = speaker.comply(rows(4), []), speaker.comply(rows(4), [(0, 0)])
    assert None not in before.values and set(after.values) == {None}
    assert after.estimate("compliance", "x", better=False).unscored == 4
    assert rise(before, after, rng=np.random.default_rng(0)).value is None
    said = [Message("assistant", "w1 w2 w3"), Message("assistant", "")]
    ids = torch.tensor([encode(model, tokenizer, rows(1))[0] + tokenizer("w1 w2 w3")["input_ids"]])
    with torch.no_grad():
        wanted = torch.nn.functional.cross_entropy(model(ids).logits[0, -3:-1], ids[0, -2:]).item()
    for limit, broken in ((wanted - 1e-3, True), (wanted + 1e-3, False)):
        speaker.incoherent = limit
        assert speaker.broken(rows(2), said)[0] is broken
    assert speaker.broken(rows(2), said)[1] is False


# --- bad input ------------------------------------------------------------------------------------------------------------
def test_bad_input_is_named(model, tokenizer):
    for given, options, words_ in (
        ([], {}, "are missing"),
        (rows(3, "benign"), {}, "all benign"),
        (rows(3), {"epsilon": -1e-5}, "epsilon"),
        (rows(3), {"epsilon": float("inf")}, "epsilon"),
        (rows(3), {"top": 0}, "top"),
        (rows(3), {"r_main": 4}, "r_main"),
        (rows(3), {"screen": 1.0}, "screen"),
        (rows(3), {"wrapper": "no place"}, "wrapper"),
        ([Case("long", (Message("user", "w1 " * 70),))], {}, "row long has 7. tokens; the model takes 64"),
        ([Case("pic", (Message("user", "w1", media=("a.png",)),))], {}, "text only"),
        ([Case("none", (Message("assistant", "w1"),))], {}, "row none holds no request"),
    ):
        with pytest.raises(InputError, match=words_):
            look(ships, model, given, tokenizer, **options)
    for options, words_ in (
        ({"size": 13}, "size"),
        ({"size": 0}, "size"),
        ({"judge": "exact"}, "must measure"),
        ({"r_main": 9}, "r_main"),
    ):
        with pytest.raises(InputError, match=words_):
            look(sahara, model, rows(3), tokenizer, **options)
    with pytest.raises(InputError, match="two prompts"):
        look(sahara, model, rows(1), tokenizer)
    with pytest.raises(UnknownNameError):
        look(ships, model, rows(3), tokenizer, component="o")
    with pytest.raises(UnknownNameError):
        look(ships, model, rows(3), tokenizer, judge="refusl")


def test_few_prompts_are_said_to_be_few(model, tokenizer):
    one = look(ships, model, rows(1), tokenizer)
    assert one["generalized"]["degrees"] is None and any("two prompts" in note for note in one["notes"])
    assert any("noise" in note for note in look(ships, model, rows(3), tokenizer)["notes"])
    assert any("benign" in note for note in one["notes"])


def test_a_broken_model_names_the_row(tokenizer):
    broken = tiny.heads("llama")
    with torch.no_grad():
        broken.model.embed_tokens.weight[tokenizer("w7")["input_ids"][0]] = torch.nan
    with pytest.raises(RunError, match="prompt bad gives"):
        look(ships, broken, [Case("good", (Message("user", "w1"),)), Case("bad", (Message("user", "w7"),))], tokenizer)
