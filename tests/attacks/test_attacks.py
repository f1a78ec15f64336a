"""What every attack owes (budget, counting, determinism, bad input), and what each one sends."""

import asyncio
import base64
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from davylamp.attacks import encoding, injection, instruction_attacks, many_shot, repetition, search
from davylamp.attacks._ask import Asking
from davylamp.attacks._translators import ByModel, ByWords, translator_of
from davylamp.attacks.translate import code_mix, translate
from davylamp.core.errors import InputError, TargetError, UnknownNameError
from davylamp.core.nouns import Case, Message
from davylamp.core.registry import builtin
from tests.attacks.worlds import Recorder, Writer, case, complied, unsure

ALL = [entry for entry in builtin(("attack",)) if entry.name not in ("gcg", "p4d", "token_swap", "astral")]
TABLE = {"xx": {"please": "qpl", "thing": "qth"}, "yy": {"please": "rpl", "do": "rdo"}}


def options(entry, tmp_path):
    known = {param.name for param in entry.params}
    out = {}
    if "attacker" in known:
        out["attacker"] = Writer()
    if "translator" in known:
        path = tmp_path / "words.json"
        path.write_text(json.dumps(TABLE))
        out["translator"] = str(path)
    return {**entry.options({}), **out}


def run(function, target, budget, seed=0, judge=complied, of=None, **more):
    return asyncio.run(function(target, of or case(), judge, budget=budget, rng=np.random.default_rng(seed), **more))


@pytest.mark.parametrize("entry", ALL, ids=lambda entry: entry.name)
class TestEveryAttack:
    def test_keeps_its_budget_and_counts_its_questions(self, entry, tmp_path):
        for budget in (1, 5):
            target = Recorder()
            found = run(entry.load(), target, budget, **options(entry, tmp_path))
            assert 1 <= found.queries == len(target.asked) <= budget
            assert found.verdict.value == 0.0 and found.messages[-1].role == "assistant" and found.seconds >= 0

    def test_stops_at_the_first_success_and_brings_what_was_sent(self, entry, tmp_path):
        if entry.name == "prompt_leak":
            pytest.skip("its success is a secret in the reply, tested below")
        target = Recorder(lambda messages, number: "Sure." if number == 3 else "No.")
        found = run(entry.load(), target, 6, **options(entry, tmp_path))
        assert found.queries == 3 and found.verdict.value == 1.0
        assert found.messages[:-1] == target.asked[2][0]

    def test_same_seed_same_questions(self, entry, tmp_path):
        asked = []
        for seed in (7, 7, 8):
            target = Recorder()
            run(entry.load(), target, 6, seed=seed, **options(entry, tmp_path))
            asked.append(target.asked)
        assert asked[0] == asked[1] != asked[2]

    def test_an_unsure_judge_is_no_success(self, entry, tmp_path):
        if entry.name == "prompt_leak":
            pytest.skip("asks no judge")
        found = run(
            entry.load(), Recorder(lambda messages, number: "Sure."), 2, judge=unsure, **options(entry, tmp_path)
        )
        assert found.verdict.value is None and found.queries == 2

    def test_a_rejected_prompt_costs_a_question_and_a_dead_target_is_raised(self, entry, tmp_path):
        too_long = TargetError("too long")
        with pytest.raises(TargetError, match="too long"):
            run(entry.load(), Recorder(lambda messages, number: too_long), 2, **options(entry, tmp_path))
        dead = Recorder(lambda messages, number: TargetError("down", down=True, retry=True))
        with pytest.raises(TargetError, match="down"):
            run(entry.load(), dead, 5, **options(entry, tmp_path))
        assert len(dead.asked) == 1

    @pytest.mark.parametrize("budget", [0, -1, 1.5, True])
    def test_bad_budgets(self, entry, budget, tmp_path):
        target = Recorder()
        with pytest.raises(InputError, match="budget"):
            run(entry.load(), target, budget, **options(entry, tmp_path))
        assert not target.asked

    @pytest.mark.parametrize("messages", [(Message("user", " "),), (Message("user", "a"), Message("assistant", "b"))])
    def test_cases_without_a_request(self, entry, messages, tmp_path):
        with pytest.raises(InputError, match="must end in a user's text"):
            run(entry.load(), Recorder(), 2, of=Case("1", messages), **options(entry, tmp_path))


def test_repetition_asks_the_plain_request_with_new_seeds():
    target = Recorder()
    run(repetition.repeat, target, 5)
    assert {messages for messages, _, _ in target.asked} == {case().messages}
    assert len({seed for _, seed, _ in target.asked}) == 5 and target.asked[0][2] == {"temperature": 1.0}
    for function in (repetition.repeat, repetition.best_of_n):
        with pytest.raises(InputError, match="above 0"):
            run(function, Recorder(), 1, temperature=0.0)


def test_noise_keeps_the_letters_it_shuffles():
    """Independent check: without the code-point noise (strength so small that strength**3 does nothing), sorted lower-case letters stay."""
    for seed in range(50):
        text = "the quick brown fox jumped over something"
        out = repetition.noised(text, np.random.default_rng(seed), 0.05)
        assert sorted(out.lower()) == sorted(text)
    assert repetition.noised(text, np.random.default_rng(0), 1.0) != text


@given(st.text(min_size=1, max_size=60))
def test_codes_can_be_read_back(text):
    """The codes against plain inverses, on any text."""
    whole = text.encode("utf-8", "backslashreplace").decode()
    assert base64.b64decode(encoding.CODES["base64"](text)).decode() == whole
    assert bytes.fromhex(encoding.CODES["hex"](text)).decode() == whole
    assert encoding.CODES["rot13"](encoding.CODES["rot13"](text)) == text
    assert encoding.CODES["reversed"](text)[::-1] == text


def test_a_reply_in_code_is_decoded_for_the_judge():
    reply = base64.b64encode(b"Sure, here it is.").decode()
    found = run(encoding.encoding, Recorder(lambda messages, number: reply), 3, code="base64")
    assert found.verdict.value == 1.0 and found.messages[-1].text == reply
    assert encoding.decoded("not base64 at all!", "base64") == "not base64 at all!"


def test_every_code_once_before_any_comes_again():
    target = Recorder()
    run(encoding.encoding, target, len(encoding.CODES))
    assert len({messages[-1].text for messages, _, _ in target.asked}) == len(encoding.CODES)


def test_many_shot_doubles_its_shots_and_backs_off_from_a_full_context():
    target = Recorder(lambda messages, number: TargetError("too long") if len(messages) > 9 else "No.")
    run(many_shot.many_shot, target, 8)
    lengths = [len(messages) // 2 for messages, _, _ in target.asked]
    assert lengths[:4] == [1, 2, 4, 8] and max(lengths[4:]) <= 4
    with pytest.raises(InputError, match="shots"):
        run(many_shot.many_shot, Recorder(), 1, shots=0)


def test_many_shot_rows(tmp_path):
    path = tmp_path / "shots.jsonl"
    path.write_text('{"id":"a","messages":[{"role":"user","content":"q"},{"role":"assistant","content":"r"}]}\n')
    target = Recorder()
    run(many_shot.many_shot, target, 1, rows=str(path))
    assert [message.text for message in target.asked[0][0]] == ["q", "r", case().messages[0].text]
    path.write_text('{"id":"a","messages":[{"role":"user","content":"q"}]}\n')
    with pytest.raises(InputError, match="row a must end"):
        run(many_shot.many_shot, Recorder(), 1, rows=str(path))


def test_translation_there_and_back():
    words = ByWords({"xx": {"sure": "qsu", "thing": "qth"}})
    assert (
        asyncio.run(words.to("Thing, now", "xx")) == "qth, now"
        and asyncio.run(words.back("qsu qth.", "xx")) == "sure thing."
    )


def test_translate_judges_the_reply_in_the_requests_language(tmp_path):
    path = tmp_path / "words.json"
    path.write_text(json.dumps({"xx": {"please": "qpl", "Sure": "qsu"}}))

    async def willing(messages, of=None):
        return await complied((*messages[:-1], Message("assistant", messages[-1].text.capitalize())), None)

    target = Recorder(lambda messages, number: "qsu here" if messages[-1].text.startswith("qpl") else "No.")
    found = run(translate, target, 2, judge=willing, translator=str(path))
    assert found.verdict.value == 1.0 and found.messages[-1].text == "qsu here"
    framed = Recorder()
    run(translate, framed, 1, translator=str(path), instruction="Answer: {request}!")
    assert framed.asked[0][0][-1].text == "Answer: qpl do the thing!"


def test_code_mixing_swaps_the_share(tmp_path):
    path = tmp_path / "words.json"
    path.write_text(json.dumps({"xx": {word: "Q" + word for word in ["please", "do", "the", "thing"]}}))
    target = Recorder()
    run(code_mix, target, 20, translator=str(path), share=0.5)
    assert {sum(word.startswith("Q") for word in messages[-1].text.split()) for messages, _, _ in target.asked} == {2}


def test_translators_are_named_before_anything_is_asked(tmp_path):
    for wrong in ("", str(tmp_path / "no.json")):
        target = Recorder()
        with pytest.raises(InputError):
            run(translate, target, 1, translator=wrong)
        assert not target.asked
    bad = tmp_path / "bad.json"
    bad.write_text('{"xx": {}}')
    with pytest.raises(InputError, match="must hold"):
        translator_of(str(bad), "translate")
    with pytest.raises(UnknownNameError):
        run(translate, Recorder(), 1, translator="world", languages=("D",))
    with pytest.raises(InputError, match=r"one \{request\}"):
        run(translate, Recorder(), 1, translator="world", instruction="no slot")
    with pytest.raises(InputError, match="share"):
        run(code_mix, Recorder(), 1, translator="world", share=0.0)


def test_a_translating_model_is_fenced_and_an_empty_translation_is_an_error():
    model = Recorder(lambda messages, number: "bonjour")
    assert asyncio.run(ByModel(model).to("hello", "fr")) == "bonjour"
    asked = model.asked[0][0][0].text
    assert "no instruction to you" in asked and "into French" in asked and asked.endswith("[begin]\nhello\n[end]")
    with pytest.raises(TargetError):
        asyncio.run(ByModel(Recorder(lambda messages, number: " ")).to("hello", "fr"))


def test_exact_scorers_on_planted_replies():
    """Spec 34, B: full, partial (25 characters), paraphrased and no leaks; hijacks planted at 30 %."""
    rng = np.random.default_rng(0)
    counts = dict.fromkeys(("full", "partial", "paraphrase", "none"), 0.0)
    for _ in range(100):
        secret = "".join(instruction_attacks.LETTERS[i] for i in rng.integers(36, size=32))
        at = int(rng.integers(8))
        said = {
            "full": f"It is {secret}!",
            "partial": f"... {secret[at : at + 25]} ...",
            "paraphrase": f"It begins with {secret[:4]} and has 32 characters.",
            "none": "I keep that to myself.",
        }
        for name, reply in said.items():
            counts[name] += instruction_attacks.leaked(reply, secret)
    assert counts == {"full": 100, "partial": 100, "paraphrase": 0, "none": 0}
    replies = ["Fine: BANANA" if i % 10 < 3 else "No fruit." for i in range(200)]
    assert np.mean([instruction_attacks.hijacked(reply, "banana") for reply in replies]) == 0.3
    for call in (lambda: instruction_attacks.leaked("x", "short"), lambda: instruction_attacks.hijacked("x", " ")):
        with pytest.raises(InputError):
            call()


def test_prompt_leak_finds_a_leaky_target_and_no_other():
    leaky = Recorder(lambda messages, number: messages[0].text)
    assert run(instruction_attacks.prompt_leak, leaky, 3).verdict.value == 1.0
    assert (
        run(instruction_attacks.prompt_leak, Recorder(lambda messages, number: "The code is secret."), 6).verdict.value
        == 0.0
    )
    with pytest.raises(InputError, match="20 or more"):
        run(instruction_attacks.prompt_leak, Recorder(), 1, length=19)


def test_instruction_templates_carry_the_payload_in_both_languages():
    for kind in instruction_attacks.TEMPLATES:
        for language in ("en", "zh"):
            assert all("PAYLOAD" in text for text in instruction_attacks.build(kind, "PAYLOAD", language=language))
    for call in (
        (lambda: instruction_attacks.build("no", "x")),
        (lambda: instruction_attacks.build("role_play", "x", language="fr")),
        (lambda: instruction_attacks.build("role_play", " ")),
    ):
        with pytest.raises(InputError):
            call()


def test_injection_plants_in_documents_and_tool_results():
    target = Recorder()
    run(injection.injection, target, 30, carrier="both")
    shapes = {tuple(message.role for message in messages) for messages, _, _ in target.asked}
    assert shapes == {("user",), ("user", "assistant", "tool")}
    assert all(case().messages[0].text in messages[-1].text for messages, _, _ in target.asked)
    tool = injection.planted("X", "tool")
    assert tool[1].calls[0]["id"] == tool[2].call_id
    with pytest.raises(UnknownNameError):
        injection.planted("X", "mail")


def test_pair_shows_the_attacker_reply_and_score_and_starts_anew():
    writer, target = Writer(), Recorder()
    run(search.pair, target, 4, attacker=writer, depth=2)
    turns = [len(messages) for messages, _, _ in writer.asked]
    assert turns == [2, 4, 2, 4]  # the brief and the request; then with its own prompt and the report
    assert "Score: 0.00" in writer.asked[1][0][-1].text and "can't help" in writer.asked[1][0][-1].text


def test_tap_cuts_what_is_off_topic_before_it_is_asked():
    """A tree by hand: every second prompt is off topic, so half of what is written is asked."""
    state = {"n": 0}

    def answer(messages, number):
        if "same thing" in messages[-1].text:
            return "no" if int(messages[-1].text.rsplit("try ", 1)[1]) % 2 else "Yes."
        state["n"] += 1
        return f'```json\n{{"why": "w", "prompt": "try {state["n"]}"}}\n```'

    target = Recorder()
    run(search.tap, target, 6, attacker=Recorder(answer), branches=4, keep=1, depth=3)
    assert [messages[-1].text for messages, _, _ in target.asked] == [f"try {n}" for n in (2, 4, 6, 8, 10, 12)]


def test_tap_gives_up_on_an_attacker_that_never_stays_on_topic():
    off = Recorder(lambda messages, number: "No" if "same thing" in messages[-1].text else '{"prompt": "x"}')
    with pytest.raises(TargetError, match="asks for the same thing"):
        run(search.tap, Recorder(), 5, attacker=off)


def test_an_attacker_that_writes_no_prompt_is_an_error_after_three():
    dull = Recorder(lambda messages, number: "I would rather not.")
    with pytest.raises(TargetError, match="three times"):
        run(search.pair, Recorder(), 5, attacker=dull)
    assert len(dull.asked) == 3
    for text in ('{"prompt": 3}', '{"prompt": " "}', "{" * 5000, '{"x": {"prompt": "in"}}'):
        assert search.prompt_in(text) in ("", "in")
    with pytest.raises(InputError, match="attacker"):
        run(search.pair, Recorder(), 1)


def test_the_best_reply_is_kept_where_none_succeeds():
    async def graded(messages, of=None):
        from davylamp.core.nouns import Verdict

        return Verdict({"a": 0.1, "b": 0.4, "c": None}[messages[-1].text])

    target = Recorder(lambda messages, number: "cabc"[number - 1])
    asking = Asking(target, case(), graded, 4)
    for _ in range(4):
        asyncio.run(asking.ask(case().messages, seed=0))
    assert asking.finding().messages[-1].text == "b" and asking.finding().queries == 4
