"""Fine-tuning: the loss by hand, the adapter by its formula, ten architectures, and what is refused."""

import math

import numpy as np
import pytest

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.nouns import Case, Message

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from davylamp.models import adapters, cost  # noqa: E402
from davylamp.models import fit as fitting  # noqa: E402
from davylamp.models.adapters import Lora  # noqa: E402
from davylamp.models.fit import IGNORED, answer_loss, fit  # noqa: E402
from davylamp.models.turns import encode_turn, ends_of, usable  # noqa: E402
from tests import tiny  # noqa: E402


def rows(n=6, words=3):
    def reply(i):
        return " ".join(f"w{(i + k) % 9 + 20}" for k in range(words + i % 2))

    return [Case(str(i), (Message("user", f"w{i} w{i + 1}"), Message("assistant", reply(i)))) for i in range(n)]


def rng(seed=0):
    return np.random.default_rng(seed)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logits(model, words="w1 w2 w3"):
    ids = torch.tensor([tiny.tokenizer()(words)["input_ids"]])
    with torch.no_grad():
        extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        return model(input_ids=ids, **extra).logits


# --- the loss ---------------------------------------------------------------------------------------------------------------------------
def test_the_loss_is_the_cross_entropy_of_the_answer_alone_by_hand():
    model, tok = tiny.model("llama"), tiny.tokenizer()
    ends = ends_of(model, tok)
    encoded = [encode_turn(tok, case.messages[:-1], case.messages[-1].text, ends) for case in rows()]
    by_hand = 0.0
    for prompt, answer in encoded:
        assert answer[-1] == tok.eos_token_id, "the end is learnt"
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].detach().double()
        for k, token in enumerate(answer):
            at = logits[len(prompt) - 1 + k]
            by_hand -= float(at[token] - at.logsumexp(-1))
    assert float(answer_loss(model, tok, encoded).detach()) == pytest.approx(by_hand, rel=1e-5)


def test_the_prompt_is_what_is_asked_at_inference_and_gives_no_gradient():
    from davylamp.models.hf import prompt_ids

    model, tok = tiny.model("llama"), tiny.tokenizer()
    case = rows()[3]
    prompt, answer = encode_turn(tok, case.messages[:-1], case.messages[-1].text, ends_of(model, tok))
    assert prompt == prompt_ids(tok, case.messages[:-1])
    assert tok.decode(answer, skip_special_tokens=True) == case.messages[-1].text
    logits = model(input_ids=torch.tensor([prompt + answer])).logits
    logits.retain_grad()
    labels = torch.tensor([[IGNORED] * len(prompt) + answer])
    torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=IGNORED).backward()
    touched = logits.grad.abs().sum(-1)[0] > 0
    assert touched.nonzero().flatten().tolist() == list(range(len(prompt) - 1, len(prompt) + len(answer) - 1))


def test_micro_batches_and_padding_change_nothing():
    one, two = tiny.model("llama"), tiny.model("llama")
    plan = {"tokenizer": tiny.tokenizer(), "lr": 1e-2, "batch": 6, "steps": 2}
    fit(one, rows(), rng=rng(), **plan)
    fit(two, rows(), rng=rng(), micro=1, **plan)
    for name, value in one.state_dict().items():
        assert torch.allclose(value, two.state_dict()[name], atol=1e-5), name


def test_a_template_that_hides_nothing_and_one_that_does():
    """A template that drops part of the prompt once a reply follows: the reply's own words are learnt, behind the prompt as asked."""
    tok = tiny.tokenizer(tiny.CHAT.replace("'<s> assistant '", "'<s> assistant w59 '"))
    ends = ends_of(tiny.model("llama"), tok)
    prompt, answer = encode_turn(tok, [Message("user", "w1")], "w2 w3", ends)
    assert tok.decode(prompt).endswith("w59") and tok.decode(answer) == "w2 w3 </s>"
    merged = tiny.tokenizer(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + tiny.CHAT
    )
    prompt, answer = encode_turn(merged, [Message("system", "w7"), Message("user", "w1")], "w2", ends)
    assert "w7" in merged.decode(prompt) and merged.decode(answer) == "w2 </s>"


# --- the adapter ------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_merged_delta_is_alpha_over_r_ba(name):
    model, tok = tiny.model(name), tiny.tokenizer()
    before = weights(model)
    lora = Lora(rank=3, alpha=5.0)
    wrapped = fit(
        model, rows(), tokenizer=tok, rng=rng(), method="lora", lora=lora, lr=1e-2, batch=3, steps=4, keep_adapter=True
    ).model
    parts = {n: p.detach().clone() for n, p in wrapped.named_parameters() if "lora_" in n}
    unmerged = logits(wrapped)
    merged = adapters.merge(wrapped, {})
    assert merged is model and torch.allclose(logits(merged), unmerged, atol=1e-5)
    modules = adapters.linear_modules(model)
    assert len(parts) == 2 * len(modules)
    for path, (inputs, outputs) in modules.items():
        a = parts[f"base_model.model.{path}.lora_A.default.weight"]
        b = parts[f"base_model.model.{path}.lora_B.default.weight"]
        assert a.shape == (3, inputs) and b.shape == (outputs, 3)
        delta = 5.0 / 3 * b @ a
        found = merged.get_submodule(path).weight.detach()
        wanted = before[f"{path}.weight"] + (delta.T if name == "gpt2" else delta)
        assert torch.allclose(found, wanted, atol=1e-6), path
        assert (found != before[f"{path}.weight"]).any()


@pytest.mark.parametrize("name", tiny.TRAINED)
def test_architectures(name):
    """Full and LoRA, one step each: weights move, step 0 and a learning rate of 0 give the base's logits to the bit."""
    tok, plan = tiny.tokenizer(), {"lr": 1e-2, "batch": 6}
    model = tiny.model(name)
    base = logits(model)
    seen = {}
    found = fit(model, rows(), tokenizer=tok, rng=rng(), method="lora", lora=Lora(rank=2), steps=1, at=(0, 1),
                watch=lambda step, m: seen.update({step: logits(m)}), **plan)  # fmt: skip
    assert torch.equal(seen[0], base) and not torch.equal(seen[1], base)
    assert found.trainable == adapters.adapter_parameters(tiny.model(name), Lora(rank=2))
    still = tiny.model(name)
    fit(still, rows(), tokenizer=tok, rng=rng(), method="lora", lora=Lora(rank=2), steps=3, batch=6, lr=0.0)
    assert torch.equal(logits(still), base)
    fit(still, rows(), tokenizer=tok, rng=rng(), steps=2, batch=6, lr=0.0)
    assert torch.equal(logits(still), base)
    found = fit(still, rows(), tokenizer=tok, rng=rng(), epochs=1, **plan)
    assert found.steps == 1 and not torch.equal(logits(still), base) and math.isfinite(found.losses[0])


def test_targets():
    llama = tiny.model("llama")
    assert (
        len(adapters.chosen_modules(llama, Lora())) == 14
        and len(adapters.chosen_modules(llama, Lora(targets="attention"))) == 8
    )
    assert len(adapters.chosen_modules(llama, Lora(targets=("q_proj", "v_proj")))) == 4
    assert {p.rpartition(".")[2] for p in adapters.chosen_modules(tiny.model("phi3"), Lora(targets="attention"))} == {
        "qkv_proj",
        "o_proj",
    }
    assert {p.rpartition(".")[2] for p in adapters.chosen_modules(tiny.model("gpt2"), Lora())} == {
        "c_attn",
        "c_proj",
        "c_fc",
    }
    assert len(adapters.chosen_modules(tiny.model("gpt_neox"), Lora(targets="attention"))) == 4
    assert not any("vision" in path for path in adapters.linear_modules(tiny.model("llava")))
    with pytest.raises(UnknownNameError, match="q_proj"):
        adapters.chosen_modules(llama, Lora(targets=("q_porj",)))
    with pytest.raises(InputError, match=r"rank 33 is larger than model\.layers\.0\.self_attn\.q_proj allows"):
        adapters.chosen_modules(llama, Lora(rank=33))
    for bad in (Lora(rank=0), Lora(alpha=0.0), Lora(dropout=1.0)):
        with pytest.raises(InputError):
            adapters.chosen_modules(llama, bad)
    assert Lora(rank=4).scale == 2.0 and Lora(rank=8, alpha=32).scale == 4.0


def test_an_adapter_is_gone_after_its_block_also_after_ctrl_c(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model, tok = tiny.model("llama"), tiny.tokenizer()
    before, asked = weights(model), {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(KeyboardInterrupt), adapters.adapter(model, Lora(rank=2), rng=rng()) as wrapped:
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                torch.nn.init.ones_(parameter)
        raise KeyboardInterrupt

    def stop(step, _):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, rows(), tokenizer=tok, rng=rng(), method="lora", lr=1.0, batch=2, steps=5, at=(3,), watch=stop)
    assert equal(weights(model), before) and {n: p.requires_grad for n, p in model.named_parameters()} == asked
    assert not any("lora" in n for n, _ in model.named_modules()) and not list(tmp_path.iterdir())


def test_two_adapters_take_turns_on_one_model():
    """Runs that share a model do not disturb each other: interleaved, each ends as it does alone."""
    tok = tiny.tokenizer()

    def runs(model):
        wrapped, loops = model, []
        for i, name in enumerate(("a", "b")):
            wrapped = adapters.put_on(wrapped, Lora(rank=2), rng(i), name)
            wrapped.set_adapter(name)
            mine = [p for n, p in wrapped.named_parameters() if f".{name}." in n]
            encoded, _ = fitting.encode(model, tok, rows(), None)
            loops.append(
                fitting.Loop(wrapped, encoded, tok, rng(10 + i), fitting.Plan(1e-2, 3, total=6), mine,
                             activate=lambda name=name, w=wrapped: w.set_adapter(name))
            )  # fmt: skip
        return loops

    mixed, alone = runs(tiny.model("llama")), runs(tiny.model("llama"))
    for part in (2, 1, 3):
        for loop in mixed:
            loop.advance(part)
    for loop in alone:
        loop.advance(6)
    for one, other in zip(mixed, alone, strict=True):
        assert one.losses == other.losses
        assert all(torch.equal(p, q) for p, q in zip(one.parameters, other.parameters, strict=True))


# --- the plan ---------------------------------------------------------------------------------------------------------------------------
def test_equal_seeds_give_equal_weights_and_the_global_generators_stay():
    state = torch.get_rng_state()
    made = []
    for seed in (0, 0, 1):
        model = tiny.model("t5")  # dropout in training
        fit(model, rows(), tokenizer=tiny.tokenizer(), rng=rng(seed), lr=1e-2, batch=2, epochs=2)
        made.append(weights(model))
        torch.rand(3)
        torch.set_rng_state(state)
    assert equal(made[0], made[1]) and not equal(made[0], made[2])
    torch.set_rng_state(state)
    fit(tiny.model("llama"), rows(), tokenizer=tiny.tokenizer(), rng=rng(), lr=1e-2, batch=2, epochs=2, method="lora")
    assert torch.equal(torch.get_rng_state(), state)


def test_watching_changes_nothing_and_comes_at_the_steps_named():
    quiet, watched, seen = tiny.model("t5"), tiny.model("t5"), []
    plan = {"tokenizer": tiny.tokenizer(), "lr": 1e-2, "batch": 4, "steps": 5}
    fit(quiet, rows(), rng=rng(), **plan)

    def watch(step, model):
        assert not model.training
        torch.rand(10)
        seen.append(step)

    found = fit(watched, rows(), rng=rng(), at=(0, 2, 5), watch=watch, **plan)
    assert seen == [0, 2, 5] and equal(weights(quiet), weights(watched)) and len(found.losses) == 5
    assert found.tokens > 0 and found.trainable == found.total


def test_learning_learns_and_frozen_parts_stay():
    model, tok = tiny.model("llama"), tiny.tokenizer()
    before = weights(model)
    found = fit(model, rows(), tokenizer=tok, rng=rng(), lr=1e-2, batch=6, steps=60, freeze=("*embed_tokens*", "*.0.*"))
    after = weights(model)
    assert found.losses[-1] < 0.2 * found.losses[0]
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved and not any("embed_tokens" in name or ".0." in name for name in moved)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_rows_that_cannot_be_used():
    good = rows(30)
    bad = [
        Case("b1", (Message("user", "w1"),)),
        Case("b2", (Message("system", "w1"), Message("system", "w1"), Message("user", "w1"), Message("assistant", "w1"))),
        Case("b3", (Message("user", "w1"), Message("user", "w2"), Message("assistant", "w1"))),
        Case("b4", (Message("user", "w1"), Message("assistant", " "))),
        Case("b5", (Message("user", "w1"), Message("system", "w1"), Message("assistant", "w1"))),
    ]  # fmt: skip
    kept, dropped = usable([*good, bad[0]])
    assert kept == good and [d.case.id for d in dropped] == ["b1"]
    with pytest.raises(InputError, match=r"5 of 35 rows.*row 31 \(b1\): it does not end in a reply"):
        usable([*good, *bad])
    assert len(usable([*good, *bad], most=1.0)[1]) == 5
    with pytest.raises(InputError, match="no rows"):
        usable([])
    found = fit(
        tiny.model("llama"),
        [*good, *bad],
        tokenizer=tiny.tokenizer(),
        rng=rng(),
        lr=0.0,
        batch=5,
        epochs=1,
        skip_bad=True,
    )
    assert len(found.dropped) == 5 and found.steps == 6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 0}, "epochs must be 1"),
        ({"epochs": None}, "give epochs or steps"),
        ({"steps": 3}, "give epochs or steps"),
        ({"batch": 7}, "a batch of 7 needs as many"),
        ({"lr": -1.0}, "lr and weight_decay"),
        ({"lr": math.nan}, "lr and weight_decay"),
        ({"method": "dora"}, "method must be"),
        ({"schedule": "step"}, "schedule must be"),
        ({"at": (9,)}, "there are 2 steps"),
        ({"freeze": ("*nothing*",)}, "no parameter to freeze"),
        ({"freeze": ("*",)}, "leaves nothing to train"),
        ({"freeze": ("*",), "method": "lora"}, "freeze goes with method full"),
    ],
)
def test_plans_that_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        fit(
            tiny.model("llama"),
            rows(),
            tokenizer=tiny.tokenizer(),
            rng=rng(),
            **{"lr": 1e-3, "batch": 3, "epochs": 1, **options},
        )


def test_models_and_tokenizers_that_are_refused():
    import transformers

    small = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**small))
    with pytest.raises(InputError, match="BertForSequenceClassification cannot be fine-tuned"):
        fit(bert, rows(), tokenizer=tiny.tokenizer(), rng=rng(), lr=1e-3, batch=2, epochs=1)
    with pytest.raises(InputError, match="no chat template"):
        fit(tiny.model("llama"), rows(), tokenizer=tiny.tokenizer(None), rng=rng(), lr=1e-3, batch=2, epochs=1)
    with pytest.raises(InputError, match="its prompt has"):
        long = Case("l", (Message("user", "w1 " * 80), Message("assistant", "w2")))
        fit(tiny.model("llama"), [long], tokenizer=tiny.tokenizer(), rng=rng(), lr=1e-3, batch=1, epochs=1)
    cut = fit(tiny.model("llama"), rows(2, words=80), tokenizer=tiny.tokenizer(), rng=rng(), lr=0.0, batch=2, epochs=1)
    assert cut.cut == 2


def test_nf4_without_a_gpu_says_so_and_goes_on(tmp_path):
    tiny.model("llama").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.warns(UserWarning, match="there is no GPU"):
        model, _, notes = adapters.load_quantized(str(tmp_path), "nf4")
    assert model.dtype == torch.float32 and "float32" in notes[0]
    with pytest.raises(UnknownNameError):
        adapters.load_quantized(str(tmp_path), "nf5")


def test_operations_against_the_flop_counter():
    from torch.utils.flop_counter import FlopCounterMode

    tok, found = tiny.tokenizer(), {}
    for name, lora in (("full", None), ("lora", Lora(rank=4))):
        model = tiny.model("llama")
        # Only the matrices' share is counted on both sides: short rows, so that attention's own part is small.
        encoded, _ = fitting.encode(model, tok, rows(), None)
        trained = adapters.put_on(model, lora, rng()) if lora else model
        with FlopCounterMode(display=False) as counter:
            answer_loss(trained, tok, [encoded[0]] * 4).backward()
        tokens = 4 * (len(encoded[0][0]) + len(encoded[0][1]))
        found[name] = counter.get_total_flops() / cost.train_flops(tiny.model("llama"), tokens, lora=lora)
    assert all(0.75 < ratio < 1.35 for ratio in found.values()), found


def test_active_parameters_of_experts_and_ties():
    mixtral, llama = tiny.model("mixtral"), tiny.model("llama")
    experts = sum(p.numel() for n, p in mixtral.named_parameters() if ".experts." in n)
    embedding = mixtral.get_input_embeddings().weight.numel()
    assert experts > 0
    assert cost.active_parameters(mixtral) == sum(p.numel() for p in mixtral.parameters()) - experts // 2 - embedding
    assert (
        cost.active_parameters(llama)
        == sum(p.numel() for p in llama.parameters()) - llama.get_input_embeddings().weight.numel()
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_engine_of_trl_gives_the_light_loops_weights(tmp_path, monkeypatch):
    pytest.importorskip("trl").SFTTrainer  # noqa: B018  # its import draws from Python's generator
    import random

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tok, made, seen = tiny.tokenizer(), {}, {}
    states = random.getstate(), torch.get_rng_state()
    for engine in ("light", "trl"):
        for method in ("full", "lora"):
            model = tiny.model("llama")
            steps = seen.setdefault(engine, [])
            plan = {
                "lr": 1e-2,
                "batch": 6,
                "micro": 3,
                "steps": 4,
                "schedule": "linear",
                "weight_decay": 0.1,
                "at": (0, 2),
            }
            found = fit(
                model,
                rows(),
                tokenizer=tok,
                rng=rng(),
                method=method,
                lora=Lora(rank=2),
                engine=engine,
                watch=lambda step, _, steps=steps: steps.append(step),
                **plan,
            )
            made[engine, method] = weights(model), found
    for method in ("full", "lora"):
        (one, light), (other, trl) = made["light", method], made["trl", method]
        assert trl.losses == pytest.approx(light.losses, rel=1e-4) and trl.steps == light.steps == 4
        for name in one:
            assert torch.allclose(one[name], other[name], atol=2e-5), (method, name)
    assert seen == {"light": [0, 2, 0, 2], "trl": [0, 2, 0, 2]} and not list(tmp_path.iterdir())
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
