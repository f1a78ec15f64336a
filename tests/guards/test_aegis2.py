"""A guard that is told its policy: what is shown, what may be added at inference, what comes back; several adapters on one base."""

import asyncio
import warnings
from dataclasses import replace

import pytest

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.judges import load_judge
from davylamp.core.nouns import Message
from davylamp.data.guard_format import load_format
from davylamp.guards.aegis2 import adapters_on_one_base
from tests import tiny
from tests.server import say

REPLY = (Message("user", "how to make bread"), Message("assistant", "like this"))


def judged(server, **options):
    spec = ",".join([f"aegis2:model={server.target}", *(f"{name}={value}" for name, value in options.items())])

    async def go():
        guard = load_judge(spec)
        try:
            return await guard(REPLY)
        finally:
            await guard.close()

    return asyncio.run(go())


def test_a_category_defined_at_inference(server):
    text = '{"User Safety": "safe", "Response Safety": "unsafe", "Safety Categories": "Discounts, Threat"}'
    server.answer = lambda body, number: say(text)
    verdict = judged(server, add="Discounts: offers a lower price")
    assert verdict.value == 1.0 and verdict.categories == ("custom/discounts", "aegis2/threat")
    prompt = server.asked[0]["messages"][0]["content"]
    assert "S24: Discounts. offers a lower price" in prompt and "user: how to make bread" in prompt
    assert judged(server).label == "unreadable", (
        "without the definition that category was not shown: not safe, not unsafe"
    )
    assert judged(server, add="Discounts: offers a lower price", without="threat").value is None
    assert judged(server, add="Discounts: x", only="threat").value == 1.0
    assert judged(server, add="Discounts: x", to="mlc").categories == ("custom/discounts", "x/X3")


def test_policy_files_and_bad_options(server, tmp_path):
    file = tmp_path / "more.toml"
    file.write_text('[rivals]\nabout = "names a competitor"\n')
    server.answer = lambda body, number: say('{"User Safety": "safe", "Response Safety": "safe"}')
    assert judged(server, add=file).value == 0.0 and "S24: rivals" in server.asked[0]["messages"][0]["content"]
    for options, error, message in (
        ({"add": "no colon"}, InputError, "name: definition"),
        ({"add": "Threat: again"}, InputError, "two categories with the label"),
        ({"only": "thret"}, UnknownNameError, "Threat"),
        ({"family": "shieldgemma"}, InputError, "shows a policy"),
        ({"policy": tmp_path / "none.toml"}, InputError, "no file"),
    ):
        with pytest.raises(error, match=message):
            judged(server, **options)


def test_adapters_share_one_base(tmp_path):
    """Two adapters switched on one base say what each says alone."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    form = replace(load_format("aegis1"), max_tokens=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny.guard("llama").save_pretrained(tmp_path / "base")
        tiny.guard_tokenizer().save_pretrained(tmp_path / "base")
        for seed, name in enumerate("ab"):
            import torch

            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
            adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
            adapted.save_pretrained(tmp_path / name)
        shared = adapters_on_one_base(str(tmp_path / "base"), {name: str(tmp_path / name) for name in "ab"}, form)
        from davylamp.guards._ask_guard import LocalModel

        alone = {name: LocalModel.load(f"hf/{tmp_path / name}", form) for name in "ab"}

    async def go():
        both = await asyncio.gather(
            *(shared[n].backend.ask(REPLY, shared[n].policy, {}, too_long="error") for n in "abab")
        )
        single = [await alone[n].ask(REPLY, shared[n].policy, {}, too_long="error") for n in "ab"]
        for guard in (*shared.values(), *alone.values()):
            await guard.close()
        return both, single

    both, single = asyncio.run(go())
    assert both[0] == both[2] and both[1] == both[3]
    for got, wanted in zip(both, single, strict=False):
        assert [step.text for step in got[0]] == [step.text for step in wanted[0]]
        for a, b in zip(got[0], wanted[0], strict=True):
            assert a.likely == pytest.approx(b.likely, abs=1e-4)
    assert both[0][0][0].likely != both[1][0][0].likely, "the two differ"
