"""Unlearning: each loss against a closed form in numpy, the loop on tiny models of many families, and input that cannot be used."""

import copy
import math

import numpy as np
import pytest
import torch
import transformers

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.nouns import Case, Message
from davylamp.train import _unlearn_losses as losses
from davylamp.train.unlearn import METHODS, _Plan, rmu_parts, unlearn, unlearn_logged
from tests import tiny

RNG = np.random.default_rng(0)
LOGITS, REF = (torch.tensor(RNG.normal(size=(3, 5, 7)), dtype=torch.float32) for _ in range(2))
LABELS = torch.tensor([[-100, 2, 3, 6, -100], [-100, -100, 1, 0, 5], [4, 4, -100, -100, -100]])
WORDS = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(45))]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_hand(token, row=None):
    """Mean over rows of row([token values]) or over all labelled tokens; token(p, ref p, logits, ref logits, label)."""
    values = []
    for logits, ref, labels in zip(
        LOGITS.numpy().astype(float), REF.numpy().astype(float), LABELS.numpy(), strict=True
    ):
        values.append(
            [token(softmax(x), softmax(r), x, r, y) for x, r, y in zip(logits, ref, labels, strict=True) if y >= 0]
        )
    return float(np.mean([row(v) for v in values]) if row else np.mean([x for v in values for x in v]))


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def cross(target, p):
    return -float((target * np.log(p)).sum())


def without(p, y):
    rest = np.where(np.arange(len(p)) == y, 0.0, p)
    return rest / rest.sum()


NLL = losses.token_nll(LOGITS, LABELS)
REF_LOGP = -losses.token_nll(REF, LABELS).sum(1)
HOT = np.eye(7)
CASES = {
    "grad_diff": (-losses.mean_nll(NLL, LABELS), lambda: by_hand(lambda p, q, x, r, y: math.log(p[y]))),
    "npo": (
        losses.npo(-NLL.sum(1), REF_LOGP, 0.3),
        lambda: by_hand(lambda p, q, x, r, y: math.log(p[y] / q[y]), lambda v: -(2 / 0.3) * log_sigmoid(-0.3 * sum(v))),
    ),
    "dpo_idk": (
        losses.dpo_idk(REF_LOGP, -NLL.sum(1), -NLL.sum(1), REF_LOGP, 0.2),
        lambda: by_hand(lambda p, q, x, r, y: math.log(q[y] / p[y]), lambda v: -10 * log_sigmoid(0.2 * 2 * sum(v))),
    ),
    "simnpo": (
        losses.simnpo(NLL.sum(1), (LABELS >= 0).sum(1), 2.5, 0.4),
        lambda: by_hand(lambda p, q, x, r, y: -math.log(p[y]), lambda v: -0.8 * log_sigmoid(2.5 * (np.mean(v) - 0.4))),
    ),
    "wga": (losses.wga(NLL, LABELS, 0.7), lambda: by_hand(lambda p, q, x, r, y: p[y] ** 0.7 * math.log(p[y]))),
    "satimp": (
        losses.satimp(NLL, LABELS, 5.0, 1.0),
        lambda: by_hand(lambda p, q, x, r, y: p[y] ** 5 * (1 - p[y]) * math.log(p[y])),
    ),
    "undial": (
        losses.undial(LOGITS, REF, LABELS, 10.0),
        lambda: by_hand(lambda p, q, x, r, y: cross(softmax(r - 10 * HOT[y]), p)),
    ),
    "ceu": (losses.ceu(LOGITS, LABELS, 0), lambda: by_hand(lambda p, q, x, r, y: cross(without(p, y), p))),
    "pdu": (losses.pdu(LOGITS, LABELS), lambda: by_hand(lambda p, q, x, r, y: (x.max() - x.mean()) ** 2)),
    "kl": (losses.kl(REF, LOGITS, LABELS), lambda: by_hand(lambda p, q, x, r, y: float((q * np.log(q / p)).sum()))),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_are_the_formulas(name):
    ours, reference = CASES[name]
    assert float(ours) == pytest.approx(reference(), rel=2e-5)


def test_ceu_leaves_the_first_answer_tokens_alone():
    logits = LOGITS.clone().requires_grad_()
    losses.ceu(logits, LABELS, 1).backward()
    moved = logits.grad.abs().sum(-1) > 0
    assert moved.tolist() == [
        [False, False, True, True, False],
        [False, False, False, True, True],
        [False, True, False, False, False],
    ]


def test_npo_tends_to_gradient_difference():
    """The gradients' cosine is above 0.999 at beta = 1e-4 (answers of one length, as NPO sums and GradDiff averages)."""
    weights = torch.tensor(RNG.normal(size=(4, 7)), dtype=torch.float32, requires_grad=True)
    features, labels = (
        torch.tensor(RNG.normal(size=(6, 3, 4)), dtype=torch.float32),
        torch.tensor(RNG.integers(7, size=(6, 3))),
    )
    nll = losses.token_nll(features @ weights, labels)
    reference = nll.detach().sum(1) * -1 + torch.tensor(RNG.normal(size=6), dtype=torch.float32)
    (npo,) = torch.autograd.grad(losses.npo(-nll.sum(1), reference, 1e-4), weights, retain_graph=True)
    (plain,) = torch.autograd.grad(-losses.mean_nll(nll, labels), weights)
    assert float(torch.cosine_similarity(npo.flatten(), plain.flatten(), dim=0)) > 0.999
    far = nll.detach().sum(1) * -1 + 60.0  # p << p_ref: the pull is gone
    nll = losses.token_nll(features @ weights, labels)
    (gone,) = torch.autograd.grad(losses.npo(-nll.sum(1), far, 1.0), weights)
    assert float(gone.norm()) < 1e-6


def test_rmu_steers_to_c_u_and_stays_by_the_mean_over_width():
    hidden, mask = torch.tensor(RNG.normal(size=(2, 3, 8)), dtype=torch.float32), torch.tensor([[1, 1, 0], [1, 1, 1]])
    uniform = torch.tensor(RNG.random(8), dtype=torch.float32)
    target = losses.steering_target(8, 6.5, uniform)
    unit = uniform.numpy() / np.linalg.norm(uniform.numpy())
    assert np.allclose(target.numpy(), 6.5 * unit, rtol=1e-6) and (target >= 0).all()
    square = ((hidden.numpy() - 6.5 * unit) ** 2).mean(-1)
    assert float(losses.rmu(hidden, target, mask)) == pytest.approx(
        (square[0, :2].mean() + square[1].mean()) / 2, rel=1e-5
    )
    assert float(losses.rmu(hidden, hidden, mask)) == 0.0


def words():
    made = tiny.tokenizer(
        "{{ '<s> ' }}{% for m in messages %}{{ m['content'] + (' </s> ' if m['role'] == 'assistant' else ' w0 ') }}{% endfor %}",
        WORDS,
        marks=False,
    )
    made.pad_token, made.bos_token, made.eos_token = "<pad>", "<s>", "</s>"
    return made


def answer(i, k):
    return f"w{20 + (5 * i + k) % 8 + 8 * k}"


def rows():
    """Eight facts to forget, eight to keep; each a word that asks and a word that answers."""
    return [
        Case(f"{part}{i}", (Message("user", f"w{1 + i + 8 * k}"), Message("assistant", answer(i, k))), meta={"part": part})
        for k, part in enumerate(("forget", "retain"))
        for i in range(8)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def taught():
    """A tiny Llama that knows all the rows."""
    from davylamp.models.fit import fit

    model = tiny.jittered("llama", vocab_size=len(WORDS))
    fit(model, rows(), tokenizer=words(), rng=np.random.default_rng(0), lr=1e-2, batch=16, steps=60, engine="light")
    return model


def known(model, part):
    from davylamp.models.fit import encode
    from davylamp.train._unlearn_data import recall

    chosen = [row for row in rows() if row.meta["part"] == part]
    return sum(recall(model, words(), encode(model, words(), chosen, None)[0]))


SETTINGS = {"rmu": {"layer": 1, "steer": 6.0, "retain_weight": 10.0, "update": "all"}, "ceu": {"skip_tokens": 0, "retain_weight": 1.0},
            "undial": {"retain_weight": 1.0}, "negation": {"lr": 1e-3}, "satimp": {"forget_weight": 3.0}, "pdu": {"epsilon": 0.1},
            "simnpo": {"forget_weight": 1.0}, "dpo_idk": {"replies": ("w44",)}, "refusal": {"replies": ("w44",)}}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_method_forgets_and_says_so(method, taught):
    """On a model that knows both sets: the forget loss falls and the answers go; what is only a control behaves as one."""
    model, before = copy.deepcopy(taught), {n: p.clone() for n, p in taught.named_parameters()}
    options = {"lr": 2e-3, "steps": 40, "batch": 8, "clip": 1.0, **SETTINGS.get(method, {})}
    found = unlearn_logged(
        model, rows(), tokenizer=words(), rng=np.random.default_rng(1), method=method, stop=0.0, **options
    )
    assert found.model is model and found.verdict in ("reached", "all steps") and not model.training
    assert known(taught, "forget") == 8 == known(taught, "retain"), "the start model is as it was"
    assert all(p.requires_grad for p in model.parameters())
    if method == "retain_only":
        assert found.verdict == "all steps" and known(model, "retain") == 8
    elif method == "negation":
        assert found.steps == 40 and any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    else:
        assert known(model, "forget") <= 2, found.log
    assert found.log and found.log[-1]["recalled"] == known(model, "forget") / 8


def test_same_seed_same_bytes_and_the_report_on_stderr(taught, capsys):
    made = [
        unlearn(copy.deepcopy(taught), rows(), tokenizer=words(), rng=np.random.default_rng(3), lr=1e-3, steps=3)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True))
    assert "npo: all steps after 3 steps, recalls" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["npo", "grad_diff"])
def test_lora(method, taught):
    pytest.importorskip("peft")
    model = copy.deepcopy(taught)
    found = unlearn_logged(
        model,
        rows(),
        tokenizer=words(),
        rng=np.random.default_rng(1),
        method=method,
        lr=2e-2,
        steps=30,
        stop=0.0,
        rank=4,
    )
    assert known(found.model, "forget") <= 2 and not hasattr(found.model, "peft_config")
    assert not any("lora" in name for name, _ in found.model.named_parameters())


def gemma3():
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**tiny.SIZES, head_dim=8, layer_types=["full_attention"] * 2)
    )


FAMILIES = ["llama", "qwen2", "qwen3", "gpt2", "phi3", "gemma2", "gemma3", "mixtral"]


@pytest.mark.parametrize("family", FAMILIES)
def test_rmu_finds_its_layer_and_weights_in_every_family(family):
    """One module to steer; only down-projections move (a mixture's is one tensor of all experts)."""
    model = gemma3().eval() if family == "gemma3" else tiny.jittered(family)
    path, chosen = rmu_parts(model, _Plan("rmu", layer=1))
    assert path.endswith(".1") and len(chosen) >= 2
    expected = {n for n, _ in model.named_parameters() if ("mlp" in n) and ("down_proj" in n or "mlp.c_proj" in n)}
    assert chosen == expected
    before = {n: p.clone() for n, p in model.named_parameters()}
    unlearn_logged(
        model,
        rows(),
        tokenizer=words(),
        rng=np.random.default_rng(0),
        method="rmu",
        layer=1,
        lr=1e-2,
        steps=2,
        weight_decay=0.0,
        force=True,
    )
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and moved <= chosen


@pytest.mark.parametrize("family", FAMILIES)
def test_npo_runs_on_every_family(family):
    model = gemma3().eval() if family == "gemma3" else tiny.jittered(family)
    found = unlearn_logged(model, rows(), tokenizer=words(), rng=np.random.default_rng(0), lr=1e-4, steps=2, force=True)
    assert found.steps == 2 and math.isfinite(found.log[-1]["loss"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be above 0"),
        ({"method": "pdu", "epsilon": -0.1}, "epsilon must be 0 or more"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"steps": 0}, "steps must be 1"),
        ({"stop": 1.0}, "stop must be a share"),
        ({"retain": ("nothing",)}, "retain names parts"),
        ({"forget_weight": -1.0}, "forget_weight"),
        ({"method": "rmu", "layer": 9}, "layer must be from 0 to 1"),
        ({"method": "rmu", "layer": 0, "module": r"model\.layers\.\d+"}, "exactly one module, and matches 2"),
        ({"method": "rmu", "module": "nothing"}, "matches 0. There are: model.layers.0"),
        ({"method": "rmu", "rank": 4}, "without rank"),
    ],
)
def test_bad_options(options, message, taught):
    with pytest.raises(InputError, match=message):
        unlearn_logged(copy.deepcopy(taught), rows(), tokenizer=words(), rng=np.random.default_rng(0), **options)


def test_unknown_method_names_the_nearest(taught):
    with pytest.raises(UnknownNameError, match="Did you mean 'simnpo'"):
        unlearn_logged(taught, rows(), tokenizer=words(), rng=np.random.default_rng(0), method="simpno")


def test_bad_rows(taught, capsys):
    def go(given, **options):
        return unlearn_logged(
            copy.deepcopy(taught), given, tokenizer=words(), rng=np.random.default_rng(0), lr=1e-4, steps=1, **options
        )

    good = rows()
    twin = Case("twin", good[0].messages, meta={"part": "retain"})
    with pytest.raises(InputError, match=r"1 rows are both.*forget0 and twin"):
        go([*good, twin])
    go([*good, twin], allow_overlap=True)
    assert "as allowed: forget0 and twin" in capsys.readouterr().err
    with pytest.raises(InputError, match="nothing to forget"):
        go(good[8:])
    with pytest.raises(InputError, match="needs rows to retain"):
        go(good[:8])
    assert go(good[:8], method="grad_ascent").steps == 1
    with pytest.raises(InputError, match=r"row forget0: meta.part must be one of"):
        go([Case("forget0", good[0].messages), *good])
    empty = Case("e", (Message("user", "w1"), Message("assistant", " ")), meta={"part": "forget"})
    assert [d.reason for d in go([*good, empty]).dropped] == ["the assistant's reply is empty"]


def test_nothing_to_unlearn():
    """A model that never learnt the facts is refused, unless forced."""
    model = tiny.jittered("llama", seed=4)
    with pytest.raises(InputError, match="There is nothing to unlearn"):
        unlearn_logged(model, rows(), tokenizer=words(), rng=np.random.default_rng(0), steps=1)


def test_divergence_keeps_the_last_good_model(taught):
    model = copy.deepcopy(taught)
    found = unlearn_logged(
        model,
        rows(),
        tokenizer=words(),
        rng=np.random.default_rng(0),
        method="grad_ascent",
        lr=50.0,
        steps=20,
        check_every=1,
        clip=0.0,
    )
    assert found.verdict == "diverged" and found.steps < 20
    assert all(torch.isfinite(p).all() for p in model.parameters())
