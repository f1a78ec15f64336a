"""Four defences: without their term each is plain fine-tuning, step for step; with it, what the term is about moves the right way."""

import copy

import numpy as np
import pytest

pytest.importorskip("transformers")

import torch
from torch.nn import functional as F

from davylamp.core.errors import InputError
from davylamp.core.nouns import Case, Message
from davylamp.models.adapters import Lora, put_on
from davylamp.models.fit import answer_loss, encode
from davylamp.train.finetune_defences import _answer_places, _discrepancy, _outputs, ldifs, lisa, repnoise, vaccine
from tests import tiny

TOK = tiny.tokenizer()


def rows(part, count=6, seed=0):
    rng = np.random.default_rng(seed)
    words = lambda: " ".join(f"w{i}" for i in rng.integers(0, 60, size=4))  # noqa: E731
    return [
        Case(f"{part}{i}", (Message("user", words()), Message("assistant", words())), meta={"part": part})
        for i in range(count)
    ]


def plain(model, cases, seed, steps, lr, batch):
    """Fine-tuning written out: AdamW without decay, mean over the answers' tokens, gradients cut at length 1."""
    encoded, rng = encode(model, TOK, cases, None)[0], np.random.default_rng(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for _ in range(steps):
        loss, count = 0.0, 0
        for i in rng.choice(len(encoded), size=min(batch, len(encoded)), replace=False):
            prompt, answer = encoded[i]
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            loss, count = loss + F.cross_entropy(logits, torch.tensor(answer), reduction="sum"), count + len(answer)
        optimiser.zero_grad()
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return model


@pytest.mark.parametrize(("defence", "off"), [(vaccine, {"rho": 0.0}), (ldifs, {"weight": 0.0})])
def test_without_its_term_it_is_plain_fine_tuning(defence, off):
    cases, words = rows("task"), {"steps": 4, "lr": 1e-2, "batch": 3}
    found = defence(tiny.model("llama"), cases, tokenizer=TOK, rng=np.random.default_rng(3), **words, **off)
    wanted = plain(tiny.model("llama"), cases, 3, **words)
    for (name, a), b in zip(found.named_parameters(), wanted.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-5), name


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_all_four_learn_on_an_adapter_and_leave_the_rest(name):
    cases = [*rows("safe"), *rows("harmful", seed=1), *rows("task", seed=2)]
    for defence in (vaccine, repnoise, lisa, ldifs):
        model = put_on(tiny.model(name), Lora(4), np.random.default_rng(0))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        words = {"align_steps": 2, "task_steps": 2} if defence is lisa else {}
        model = defence(model, cases, tokenizer=TOK, rng=np.random.default_rng(0), steps=4, lr=1e-2, batch=3, **words)
        for key, parameter in model.named_parameters():
            assert torch.equal(parameter, before[key]) == ("lora_" not in key or not parameter.requires_grad), (
                defence,
                key,
            )
        assert not any(m._forward_hooks for m in model.modules())


def loss_on(model, cases):
    encoded = encode(model, TOK, cases, None)[0]
    with torch.no_grad():
        return float(answer_loss(model, TOK, encoded) / sum(len(a) for _, a in encoded))


def test_vaccine_learns_under_the_worst_shift():
    """After it, a shift of the layers' outputs along the loss's gradient costs less than after plain fine-tuning."""
    cases, words = rows("safe"), {"steps": 40, "lr": 5e-3, "batch": 6}

    def under_shift(model):
        encoded, seen = encode(model, TOK, cases, None)[0], []
        with _outputs(model, seen.append):
            slopes = torch.autograd.grad(answer_loss(model, TOK, encoded) / 30, seen)
        length = sum(float(s.square().sum()) for s in slopes) ** 0.5
        shifts = iter([s * (2.0 / length) for s in slopes])
        with _outputs(model, lambda out: out + next(shifts)):
            return loss_on(model, cases)

    kept = vaccine(tiny.model("llama"), cases, tokenizer=TOK, rng=np.random.default_rng(0), rho=2.0, **words)
    other = vaccine(tiny.model("llama"), cases, tokenizer=TOK, rng=np.random.default_rng(0), rho=0.0, **words)
    assert loss_on(kept, cases) < 0.7 * loss_on(tiny.model("llama"), cases), "it learns all the same"
    assert under_shift(kept) - loss_on(kept, cases) < 0.5 * (under_shift(other) - loss_on(other, cases))


def test_repnoise_makes_noise_of_harmful_answers_and_unlearns_them():
    cases, bad = [*rows("safe"), *rows("harmful", seed=1)], rows("harmful", seed=1)

    def far_from_noise(model):
        encoded, seen = encode(model, TOK, bad, None)[0], []
        with torch.no_grad(), _outputs(model, seen.append):
            answer_loss(model, TOK, encoded)
        places = _answer_places(encoded)
        return float(sum(_discrepancy(out[places], np.random.default_rng(0)) for out in seen))

    found = {}
    for alpha, beta in ((0.0, 0.0), (4.0, 0.0), (0.0, 1.0)):
        found[alpha, beta] = repnoise(
            tiny.model("llama"), cases, tokenizer=TOK, rng=np.random.default_rng(0), steps=25, lr=8e-3, batch=6, alpha=alpha, beta=beta
        )  # fmt: skip
    assert far_from_noise(found[4.0, 0.0]) < 0.7 * far_from_noise(found[0.0, 0.0])
    assert loss_on(found[0.0, 1.0], bad) > 1.2 * loss_on(found[0.0, 0.0], bad)
    assert all(loss_on(model, rows("safe")) < 3.0 for model in found.values())


def test_the_discrepancy_is_its_definition():
    rng = np.random.default_rng(0)
    x = rng.normal(2.0, 1.0, size=(20, 5))
    draws = np.random.default_rng(7)
    order, noise = draws.permutation(20), draws.standard_normal((20, 5))
    both = np.concatenate([x[order], noise])
    squares = ((both[:, None] - both[None]) ** 2).sum(-1)
    kernel = np.mean([np.exp(-squares / (squares.mean() * scale)) for scale in (0.25, 0.5, 1, 2, 4)], axis=0)
    wanted = kernel[:20, :20].mean() + kernel[20:, 20:].mean() - 2 * kernel[:20, 20:].mean()
    assert float(_discrepancy(torch.tensor(x), np.random.default_rng(7))) == pytest.approx(wanted, rel=1e-4)


def test_lisa_takes_turns_and_stays_near(monkeypatch):
    from davylamp.train import finetune_defences as module

    asked = []
    draw = module._Run.draw
    monkeypatch.setattr(module._Run, "draw", lambda self, *parts: asked.append(parts) or draw(self, *parts))
    cases, start = [*rows("safe"), *rows("task", seed=2)], tiny.model("llama")
    moved = {}
    for rho in (0.0, 100.0):
        model = lisa(copy.deepcopy(start), cases, tokenizer=TOK, rng=np.random.default_rng(0), steps=10, lr=1e-3, batch=3,
                     rho=rho, align_steps=2, task_steps=3)  # fmt: skip
        moved[rho] = sum(
            float((a - b).detach().square().sum()) for a, b in zip(model.parameters(), start.parameters(), strict=True)
        )
    turns = [("safe",)] * 2 + [("task",)] * 3
    assert asked == turns * 4 and moved[100.0] < 0.7 * moved[0.0]


def test_ldifs_keeps_features_where_they_were():
    cases, start = rows("task"), tiny.model("llama")

    def features(model):
        seen = []
        with torch.no_grad(), _outputs(model, seen.append):
            answer_loss(model, TOK, encode(model, TOK, cases, None)[0])
        return torch.cat([out.flatten() for out in seen])

    moved = {}
    for weight in (0.0, 10.0):
        model = ldifs(
            copy.deepcopy(start),
            cases,
            tokenizer=TOK,
            rng=np.random.default_rng(0),
            steps=30,
            lr=5e-3,
            batch=6,
            weight=weight,
        )
        moved[weight] = float((features(model) - features(start)).norm())
    assert moved[10.0] < 0.3 * moved[0.0]


def test_bad_input():
    model, rng = tiny.model("llama"), np.random.default_rng(0)
    with pytest.raises(InputError, match="needs rows of part harmful"):
        repnoise(model, rows("safe"), tokenizer=TOK, rng=rng, steps=1)
    with pytest.raises(InputError, match="needs rows of part safe"):
        lisa(model, rows("task"), tokenizer=TOK, rng=rng, steps=1)
    with pytest.raises(InputError, match=r"meta\.part must be one of safe, harmful, task, got 'x'"):
        ldifs(model, rows("x"), tokenizer=TOK, rng=rng, steps=1)
    with pytest.raises(InputError, match="rho must be a finite number"):
        vaccine(model, rows("safe"), tokenizer=TOK, rng=rng, steps=1, rho=float("nan"))
    with pytest.raises(InputError, match="lr must be a finite number above 0"):
        ldifs(model, rows("task"), tokenizer=TOK, rng=rng, steps=1, lr=0)
    with pytest.raises(InputError, match="align_steps and task_steps"):
        lisa(model, [*rows("safe"), *rows("task")], tokenizer=TOK, rng=rng, steps=1, task_steps=0)
    with pytest.raises(InputError, match="no parameter of the model asks for gradients"):
        vaccine(tiny.model("llama").requires_grad_(False), rows("safe"), tokenizer=TOK, rng=rng, steps=1)
