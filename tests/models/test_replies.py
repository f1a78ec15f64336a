"""Replies from a file: scored as the model's own would be, by conversation and seed; what is not there fails its row."""

import asyncio
import json

import pytest

from davylamp.core.errors import InputError, TargetError
from davylamp.core.evaluate import evaluate, load_suite
from davylamp.core.judges import load_judge
from davylamp.core.nouns import Message
from davylamp.models.targets import load_target


def lines(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_file_scores_as_the_model_would(tmp_path):
    """The same replies by a function and by a file: the same estimates, and a prompt without a reply is failed, not wrong."""
    prompts = lines(
        tmp_path / "p.jsonl",
        *({"prompt": f"请写一句关于石头的话{i}", "type": "Insult" if i < 6 else "Goal_Hijacking"} for i in range(9)),
    )
    (tmp_path / "t.py").write_text(
        "def f(messages, **settings):\n    return 'I cannot help.' if messages[-1].text[-1] in '0124' else 'Sure, here it is.'\n"
    )
    suite, judge = load_suite("safety_prompts", {"rows": str(prompts)}), load_judge("refusal")
    own = load_target(f"python/{tmp_path / 't.py'}:f")

    async def go(target, runs):
        return (await evaluate(suite, target, judge, runs=tmp_path / runs, quiet=True))[1]

    first = asyncio.run(go(own, "a"))
    said = [(case.messages, asyncio.run(own(case.messages)).text) for case in suite.suite.cases]
    rows = [{"prompt": messages[0].text, "response": text} for messages, text in said]
    file = lines(tmp_path / "r.jsonl", *rows)
    second = asyncio.run(go(load_target(f"file/{file}"), "b"))
    assert [(e.name, e.category, e.value, e.n) for e in first.estimates] == [
        (e.name, e.category, e.value, e.n) for e in second.estimates
    ]
    assert next(e for e in second.estimates if e.name == "macro_unsafe_rate").value == pytest.approx((2 / 6 + 1) / 2)
    third = asyncio.run(go(load_target(f"file/{lines(tmp_path / 's.jsonl', *rows[1:])}"), "c"))
    assert third.counts["failed"] == 1 and third.status != "finished"


def test_several_replies_go_by_seed_and_messages_are_matched_whole(tmp_path):
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    file = lines(
        tmp_path / "r.jsonl",
        {"prompt": "q", "reply": "one"},
        {"prompt": "q", "reply": "two"},
        {"messages": [*talk, {"role": "assistant", "content": "three", "reasoning": "hm"}]},
    )
    target = load_target(f"file/{file}")

    def ask(*messages, seed=0):
        return asyncio.run(target(messages, seed=seed))

    assert ask(Message("user", "q")).text == "one" and ask(Message("user", "q"), seed=1).text == "two"
    assert ask(Message("system", "s"), Message("user", "q")).reasoning == "hm"
    with pytest.raises(TargetError, match="2 replies"):
        ask(Message("user", "q"), seed=2)
    with pytest.raises(TargetError, match="no reply"):
        ask(Message("system", "other"), Message("user", "q"))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "secret"}, "line 1: a row needs prompt and reply"),
        ({"prompt": "secret", "reply": 3}, "as text"),
        ({"messages": [{"role": "user", "content": "secret"}]}, "end in the assistant's reply"),
    ],
)
def test_bad_rows(tmp_path, row, says):
    with pytest.raises(InputError, match=says) as caught:
        load_target(f"file/{lines(tmp_path / 'r.jsonl', row)}")
    assert "secret" not in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(InputError, match="no file"):
        load_target(f"file/{tmp_path / 'none.jsonl'}")
    with pytest.raises(InputError, match="no replies"):
        load_target(f"file/{lines(tmp_path / 'e.jsonl')}")
