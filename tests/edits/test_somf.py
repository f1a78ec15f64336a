"""SOMF's mask, its gradient, its merges and its loss against independent computations; fusion on folders against memory; bad input."""

import copy
import json

import numpy as np
import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.nouns import Case, Message
from davylamp.edits._concrete import Mask, load_mask, logit_noise, masked_vectors, save_mask, widen
from davylamp.edits._fusion import Merge, drop, fuse, prepare
from davylamp.edits._mask_learning import (
    Learner,
    Learning,
    dpo_loss,
    encode_pairs,
    learn,
    log_probabilities,
    preference,
    usable_pairs,
)
from davylamp.edits.somf import (
    check_adapters,
    content_hash,
    kept_fractions,
    learn_mask,
    lora_settings,
    merge_of,
    overlap,
    parameters_of,
    realign,
    somf,
    task_vectors,
)
from davylamp.models.adapters import Lora, put_on
from tests import tiny
from tests.models.test_activations import build

# transformers 5.24 warns when peft asks a model whether it checkpoints gradients
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
TOK = tiny.tokenizer()
ONE = Merge("none", 1)


def moved(model, seed, size=0.02):
    """A copy with every parameter moved a little, as a fine-tune would."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return other


def pairs(count=8, seed=0):
    rng = np.random.default_rng(seed)
    words = lambda: " ".join(f"w{i}" for i in rng.integers(0, 60, size=rng.integers(2, 7)))  # noqa: E731
    return [
        Case(str(i), (Message("user", words()),), meta={"chosen": words() + " w1", "rejected": words() + " w2"})
        for i in range(count)
    ]


def some_logits(model, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator).half().float() * scale for n, p in model.named_parameters()}


def mask_for(model, seed=0):
    logits = some_logits(model, seed)
    return Mask(logits, {n: tuple(v.shape) for n, v in logits.items()}).rounded()


# --- the mask ----------------------------------------------------------------------------------------------------------------------------
def test_a_draw_is_torchs_relaxed_bernoulli():
    """The same generator, tensors in dict order, temperature 0.5: equal masked vectors to 1e-6."""
    torch.manual_seed(3)
    phi = {"a": torch.randn(17, 5), "b": torch.randn(40), "c": torch.randn(3, 4, 5)}
    tau = {name: torch.randn_like(logits) for name, logits in phi.items()}
    torch.manual_seed(11)
    wanted = {}
    for name, logits in phi.items():
        mask = torch.distributions.RelaxedBernoulli(torch.tensor(0.5), logits=logits).rsample()
        wanted[name] = tau[name] * mask / mask.mean()
    generator = torch.Generator().manual_seed(11)
    found = masked_vectors(phi, [tau], noise=lambda name, shape: logit_noise(shape, generator), cap=1e9)
    for name in phi:
        assert (found[name][0] - wanted[name]).abs().max() < 1e-6


@pytest.mark.parametrize("cap", [1e9, 1.5])
def test_the_gradient_is_autograds(cap):
    torch.manual_seed(0)
    phi, noise = torch.randn(6, 7, dtype=torch.float64, requires_grad=True), torch.randn(6, 7, dtype=torch.float64)
    taus = [torch.randn(6, 7, dtype=torch.float64) for _ in range(2)]
    weights = [torch.randn(6, 7, dtype=torch.float64) for _ in range(2)]
    mask = torch.sigmoid((phi + noise) / 0.5)
    scale = (1 / mask.mean()).clamp_max(cap)
    sum((tau * mask * scale * weight).sum() for tau, weight in zip(taus, weights, strict=True)).backward()
    wanted, phi.grad = phi.grad.clone(), None
    out = masked_vectors({"a": phi}, [{"a": tau} for tau in taus], noise=lambda n, s: noise.clone(), cap=cap)["a"]
    sum((each * weight).sum() for each, weight in zip(out, weights, strict=True)).backward()
    assert torch.allclose(phi.grad, wanted, rtol=1e-10, atol=1e-12)


def test_a_constant_mask_is_the_identity_and_a_nearly_closed_one_is_capped():
    tau = {"a": torch.randn(50)}
    zero = lambda name, shape: torch.zeros(shape)  # noqa: E731
    for level, scale in ((0.0, 1.0), (3.0, 1.0), (-4.0, 10 * torch.sigmoid(torch.tensor(-8.0)))):
        out = masked_vectors({"a": torch.full((50,), level)}, [tau], noise=zero)["a"][0]
        assert torch.allclose(out, tau["a"] * scale, rtol=1e-5)


@pytest.mark.parametrize(
    ("coarse", "logits"), [("row", (6, 1)), ("block", (1, 2)), ("tensor", (1, 1)), ("entry", (6, 20))]
)
def test_coarse_masks(coarse, logits):
    torch.manual_seed(0)
    tau = {"w": torch.randn(6, 20), "v": torch.randn(5, 20)}
    phi = {"w": torch.randn(logits, requires_grad=True)}
    from davylamp.edits._concrete import logit_shape

    assert logit_shape("w", (6, 20), coarse) == logits
    phi["v"] = torch.randn(logit_shape("v", (5, 20), coarse), requires_grad=True)
    out = masked_vectors(phi, [tau], noise=lambda n, s: torch.zeros(s), coarse=coarse)
    sum(o[0].square().sum() for o in out.values()).backward()
    assert all(logit.grad is not None and bool(logit.grad.abs().sum() > 0) for logit in phi.values())
    masks = {n: widen(torch.sigmoid(phi[n] / 0.5), tau[n].shape, coarse) for n in phi}
    whole = torch.cat([masks[n].flatten() for n in phi]).mean()
    for name in phi:
        mean = whole if coarse == "tensor" else masks[name].mean()
        assert torch.allclose(out[name][0], tau[name] * masks[name] / mean, rtol=1e-5)


def test_rank_masks_are_for_adapters():
    from davylamp.edits._concrete import logit_shape

    assert logit_shape("q.lora_B.default.weight", (64, 8), "rank") == (1, 8)
    with pytest.raises(InputError, match="needs LoRA's A and B"):
        logit_shape("q.weight", (64, 8), "rank")
    with pytest.raises(InputError, match="coarse must be one of"):
        logit_shape("q.weight", (64, 8), "cell")


# --- merging -----------------------------------------------------------------------------------------------------------------------------
def reference_ties(vectors, share=0.2, weight=0.4):
    """TIES by its words, in numpy over the tensors one behind the other: (tasks, P) -> (P,)."""
    total = vectors.shape[1]
    kept = np.zeros_like(vectors)
    for t, row in enumerate(vectors):
        edge = np.sort(np.abs(row))[total - int(share * total) - 1]
        kept[t] = np.where(np.abs(row) >= edge, row, 0)
        assert (np.abs(row) >= edge).sum() == int(share * total) + 1
    sign = np.sign(kept.sum(0))
    sign[sign == 0] = np.sign(sign.sum())
    return np.where(np.sign(kept) == sign, kept, 0).sum(0) * weight


@pytest.mark.parametrize("tasks", [2, 3])
def test_ties_exactly(tasks):
    rng = np.random.default_rng(tasks)
    shapes = {"a": (13, 9), "b": (41,), "c": (2, 3, 4)}
    parts = {n: [torch.tensor(rng.normal(size=s).astype(np.float32)) for _ in range(tasks)] for n, s in shapes.items()}
    flat = np.stack([np.concatenate([parts[n][t].numpy().ravel() for n in shapes]) for t in range(tasks)])
    merge = Merge("ties", tasks)
    ties = prepare(merge, lambda: parts.values())
    found = np.concatenate([fuse(merge, parts[n], ties).numpy().ravel() for n in shapes])
    np.testing.assert_array_equal(found, reference_ties(flat).astype(np.float32))


def test_ties_is_no_mean_and_its_share_is_over_all_tensors():
    small, big = [torch.full((10,), 0.1)] * 2, [torch.full((10,), 1.0)] * 2
    merge = Merge("ties", 2, weight=1.0, density=0.4)
    ties = prepare(merge, lambda: [small, big])
    assert fuse(merge, small, ties).abs().sum() == 0 and fuse(merge, big, ties).tolist() == [2.0] * 10


def test_dare_is_pefts_random_pruning():
    from peft.utils.merge_utils import dare_linear

    vectors = [torch.randn(30, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    torch.manual_seed(5)
    wanted = dare_linear(vectors, torch.tensor([0.3, 0.3]), density=0.8)
    generator, merge = torch.Generator().manual_seed(5), Merge("dare", 2)
    drops = [drop(v.shape, 0.8, generator) for v in vectors]
    assert (fuse(merge, vectors, None, drops) - wanted).abs().max() < 1e-6


def test_task_arithmetic_is_pefts_and_one_task_is_left_alone_but_by_dare():
    from peft.utils.merge_utils import task_arithmetic

    vectors = [torch.randn(7, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for adapters, weight in ((True, 0.3), (False, 0.04)):
        wanted = task_arithmetic(vectors, torch.tensor([weight] * 3))
        assert torch.allclose(fuse(Merge("task_arithmetic", 3, adapters=adapters), vectors, None), wanted)
    for rule in ("none", "average", "task_arithmetic", "ties"):
        assert torch.equal(fuse(Merge(rule, 1), vectors[:1], None), vectors[0])
    once = fuse(Merge("dare", 1), vectors[:1], None, [torch.ones(7)])
    assert torch.allclose(once, vectors[0] / 0.8 * 0.3)


# --- the loss ----------------------------------------------------------------------------------------------------------------------------
def test_dpo_is_its_closed_form():
    rng = np.random.default_rng(0)
    chosen, rejected, chosen_ref, rejected_ref = rng.normal(-20, 6, size=(4, 50))
    margin = 0.1 * ((chosen - chosen_ref) - (rejected - rejected_ref))
    wanted = np.mean(np.log1p(np.exp(-margin)))
    found = dpo_loss(*(torch.tensor(x) for x in (chosen, rejected, chosen_ref, rejected_ref)), 0.1)
    assert abs(float(found) - wanted) < 1e-12


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_log_probabilities_are_those_of_the_answer_alone(name):
    model, rows = build(name), encode_pairs(build(name), TOK, usable_pairs(pairs())[0])
    both = [(prompt, answer) for prompt, answer, _ in rows]
    with torch.no_grad():
        found = log_probabilities(model, {}, both, 0)
        for (prompt, answer), value in zip(both, found, strict=True):
            logs = model(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
            wanted = sum(float(logs[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
            assert abs(wanted - float(value)) < 1e-4 and answer[-1] == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_loss_is_trls(tmp_path):
    """One batch through trl's DPOTrainer: policy and reference as whole models, equal loss to 1e-5."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    safe, task = build("llama"), moved(build("llama"), 1, 0.1)
    cases = pairs()
    rows = encode_pairs(safe, TOK, usable_pairs(cases)[0])
    data = [
        {"prompt": TOK.apply_chat_template([{"role": "user", "content": c.messages[0].text}], tokenize=False, add_generation_prompt=True),
         "chosen": c.meta["chosen"] + " </s>", "rejected": c.meta["rejected"] + " </s>"} for c in cases
    ]  # fmt: skip
    args = trl.DPOConfig(str(tmp_path), beta=0.1, per_device_train_batch_size=8, report_to=[], use_cpu=True, bf16=False,
                         disable_dropout=True, gradient_checkpointing=False)  # fmt: skip
    trainer = trl.DPOTrainer(task, safe, args, train_dataset=datasets.Dataset.from_list(data), processing_class=TOK)
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = float(trainer.compute_loss(task, batch).detach())
    with torch.no_grad():
        logs = [
            log_probabilities(m, {}, [(p, a) for p, a, _ in rows] + [(p, b) for p, _, b in rows], 0).chunk(2)
            for m in (task, safe)
        ]
    assert abs(float(dpo_loss(*logs[0], *logs[1], 0.1)) - theirs) < 1e-5


# --- learning ----------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reference", ["fixed", "resample", "task"])
@pytest.mark.parametrize("merge", [ONE, Merge("ties", 2), Merge("dare", 2), Merge("average", 2)])
def test_learning_lowers_the_loss_and_touches_no_weight(reference, merge):
    safe = build("llama")
    tasks = [moved(safe, seed, 0.1) for seed in range(merge.tasks)]
    before = {n: p.detach().clone() for n, p in safe.named_parameters()}
    how = Learning(steps=12, batch=8, lr=0.2, reference=reference, schedule="constant")
    mask, seen = learn_mask(safe, tasks, pairs(), tokenizer=TOK, merge=merge, how=how, rng=np.random.default_rng(0))
    assert len(seen) == 12 and np.mean([s["loss"] for s in seen[-3:]]) < np.mean([s["loss"] for s in seen[:3]])
    assert all(torch.equal(p, before[n]) and p.requires_grad and p.grad is None for n, p in safe.named_parameters())
    assert mask.about["pairs"] == 8 and len(mask.about["inputs"]) == merge.tasks + 1


def test_the_fixed_references_pass_is_made_once():
    safe = build("llama")
    rows, taus = encode_pairs(safe, TOK, usable_pairs(pairs())[0]), task_vectors(safe, [moved(safe, 0)])
    passes = []
    safe.register_forward_pre_hook(lambda *_: passes.append(1))
    for reference, wanted in (("fixed", 2 + 5), ("task", 2 + 5), ("resample", 2 * 5)):
        passes.clear()
        learn(Learner(safe, taus, rows, ONE, Learning(steps=5, batch=4, reference=reference), np.random.default_rng(0)))
        assert len(passes) == wanted, reference  # two batches of four hold all pairs


def test_equal_seeds_give_equal_masks():
    safe = build("llama")
    how = Learning(steps=3, batch=4, lr=0.1)
    one, two, other = (
        learn_mask(safe, [moved(safe, 0)], pairs(), tokenizer=TOK, merge=ONE, how=how, rng=np.random.default_rng(seed))[
            0
        ]
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(one.logits[n], two.logits[n]) for n in one.logits)
    assert any(not torch.equal(one.logits[n], other.logits[n]) for n in one.logits)


# --- fusion ------------------------------------------------------------------------------------------------------------------------------
def saved(model, folder, **how):
    model.save_pretrained(folder, **how)
    TOK.save_pretrained(folder)
    return folder


def tensors_of(folder):
    found = [load_file(f) for f in sorted(folder.glob("*.safetensors")) if f.name != "mask.safetensors"]
    return {name: value for part in found for name, value in part.items()}


def test_fusion_is_the_equation():
    safe = build("llama")
    task, mask = moved(safe, 1), mask_for(safe)
    start, end = ({n: p.detach().clone().double() for n, p in m.named_parameters()} for m in (safe, task))
    for mode in ("probability", "threshold"):
        fused = realign(copy.deepcopy(safe), [task], mask, mode=mode, merge=ONE)
        for name, parameter in fused.named_parameters():
            kept = mask.logits[name].double().sigmoid() if mode == "probability" else (mask.logits[name] > 0).double()
            wanted = start[name] + (end[name] - start[name]) * kept / kept.mean()
            assert torch.allclose(parameter.double(), wanted, rtol=1e-5, atol=1e-7), (mode, name)


ARCHITECTURES = ("llama", "qwen2", "gpt2", "mistral", "mixtral")


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    ("mode", "rule"), [("probability", "none"), ("binary", "ties"), ("soft", "dare"), ("threshold", "average")]
)
def test_streamed_fusion_is_memorys_to_the_byte(name, mode, rule, tmp_path):
    safe = build(name)
    tasks = [moved(safe, seed) for seed in range(1 if rule == "none" else 2)]
    merge, mask = Merge(rule, len(tasks)), mask_for(safe)
    if mode in ("soft", "binary"):
        generator = torch.Generator().manual_seed(0)
        mask = mask.draw(mode, lambda n, s: logit_noise(s, generator))
    folders = [saved(m, tmp_path / str(i), max_shard_size="30KB") for i, m in enumerate((safe, *tasks))]
    assert len(list(folders[0].glob("*.safetensors"))) > 1
    out = realign(folders[0], folders[1:], mask, mode=mode, merge=merge, seed=3, out=tmp_path / "out")
    held = realign(safe, tasks, mask, mode=mode, merge=merge, seed=3)
    streamed, memory = tensors_of(out), tensors_of(saved(held, tmp_path / "memory"))
    assert streamed.keys() == memory.keys() and all(torch.equal(streamed[key], memory[key]) for key in memory)
    assert json.loads((out / "somf.json").read_text())["mode"] == mode
    stored = load_mask(out / "mask.safetensors")
    assert all(torch.equal(stored.wide(n, mode), mask.wide(n, mode)) for n in mask.logits)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), "all-linear"])
def test_adapters_of_rank_8(name, targets, tmp_path):
    fused = "gpt2" if name == "gpt2" and targets != "all-linear" else ""
    lora = Lora(rank=8, targets=("c_attn",) if fused else targets)
    base = saved(build(name), tmp_path / "base")
    safe = put_on(build(name), lora, np.random.default_rng(0)).eval()
    safe.peft_config["default"].base_model_name_or_path = str(base)
    safe = moved(safe, 0)
    task = moved(safe, 1, 0.005)
    how = Learning(steps=2, batch=4, lr=0.1, coarse="rank")
    frozen = {n: p.detach().clone() for n, p in safe.named_parameters() if "lora_" not in n}
    mask, _ = learn_mask(safe, [task], pairs(4), tokenizer=TOK, merge=merge_of(safe, 1, "none", None, None), how=how,
                         rng=np.random.default_rng(0))  # fmt: skip
    assert mask.logits and all("lora_" in key for key in mask.logits)
    folders = [saved(m, tmp_path / str(i)) for i, m in enumerate((safe, task))]
    out = realign(folders[0], folders[1:], mask, mode="probability", merge=ONE, out=tmp_path / "out")
    held = realign(safe, [task], mask, mode="probability", merge=ONE)
    assert all(torch.equal(p, frozen[n]) for n, p in held.named_parameters() if n in frozen)
    streamed, memory = tensors_of(out), tensors_of(saved(held, tmp_path / "memory"))
    assert streamed.keys() == memory.keys() and all(torch.equal(streamed[key], memory[key]) for key in memory)


def test_the_edit_on_folders_and_in_memory(tmp_path):
    safe = build("llama")
    task = moved(safe, 1, 0.1)
    folders = [saved(m, tmp_path / str(i)) for i, m in enumerate((safe, task))]
    words = {"rows": pairs(), "steps": 3, "batch": 4, "lr": 0.1, "mode": "binary"}
    out = somf(*folders, rng=np.random.default_rng(0), out=tmp_path / "out", **words)
    held = somf(copy.deepcopy(safe), task, tokenizer=TOK, rng=np.random.default_rng(0), **words)
    streamed, memory = tensors_of(out), tensors_of(saved(held, tmp_path / "memory"))
    assert all(torch.equal(streamed[key], memory[key]) for key in memory)
    # The stored draw gives the same model again, whatever the seed.
    again = somf(
        *folders,
        rng=np.random.default_rng(9),
        out=tmp_path / "again",
        mode="binary",
        mask=str(out / "mask.safetensors"),
    )
    assert all(torch.equal(value, tensors_of(again)[key]) for key, value in streamed.items())
    other = somf(
        *folders,
        rng=np.random.default_rng(9),
        out=tmp_path / "other",
        mode="probability",
        mask=str(out / "mask.safetensors"),
    )
    assert any(not torch.equal(value, tensors_of(other)[key]) for key, value in streamed.items())


def test_without_a_mask_it_is_the_plain_merge():
    safe = build("llama")
    one, two = moved(safe, 1), moved(safe, 2)
    start, a, b = ({n: p.detach().clone() for n, p in m.named_parameters()} for m in (safe, one, two))
    merged = somf(copy.deepcopy(safe), one, two, rng=np.random.default_rng(0), mode="none", merge="average")
    for name, parameter in merged.named_parameters():
        assert torch.allclose(parameter, (a[name] + b[name]) / 2, atol=1e-6)
    merged = somf(copy.deepcopy(safe), one, two, rng=np.random.default_rng(0), mode="none", merge="task_arithmetic")
    for name, parameter in merged.named_parameters():
        assert torch.allclose(parameter, start[name] + 0.04 * (a[name] + b[name] - 2 * start[name]), atol=1e-6)


def test_a_tensor_that_is_masked_whole_stays_safe_with_a_note():
    safe = build("llama")
    task, mask = moved(safe, 1), mask_for(safe)
    name = "model.layers.0.mlp.up_proj.weight"
    mask.logits[name] = torch.full_like(mask.logits[name], -50.0)
    with pytest.warns(UserWarning, match=rf"1 tensors are masked whole and stay as in the safe model: {name}"):
        fused = realign(copy.deepcopy(safe), [task], mask, mode="threshold", merge=ONE)
    assert torch.equal(dict(fused.named_parameters())[name], dict(safe.named_parameters())[name])
    assert all(bool(p.isfinite().all()) for p in fused.parameters())


def test_the_cap_bounds_how_much_survivors_are_amplified():
    mask = Mask({"a": torch.cat([torch.full((99,), -20.0), torch.tensor([20.0])])}, {"a": (100,)}, cap=10.0)
    assert mask.means("threshold")["a"] == pytest.approx(0.01) and mask.scales("threshold")["a"] == 10.0
    mask.cap = 1000.0
    assert mask.scales("threshold")["a"] == pytest.approx(100.0)


def test_the_mask_file_keeps_all(tmp_path):
    safe = build("llama")
    mask = mask_for(safe)
    mask.about = {"seed": 3}
    generator = torch.Generator().manual_seed(0)
    for mode in ("soft", "binary"):
        drawn = mask.draw(mode, lambda n, s: logit_noise(s, generator))
        again = load_mask(save_mask(drawn, tmp_path / f"{mode}.safetensors"))
        assert again.about == {"seed": 3, "drawn": mode} and again.shapes == mask.shapes
        for name in mask.logits:
            for how in ("probability", "threshold", mode):
                assert torch.equal(again.values(name, how), drawn.values(name, how))
    bits, entries = (tmp_path / "binary.safetensors").stat().st_size, sum(v.numel() for v in mask.logits.values())
    assert bits < entries * (2 + 1 / 8) + 10_000  # float16 logits and one bit an entry


# --- analyses ----------------------------------------------------------------------------------------------------------------------------
def test_kept_fractions_and_overlap():
    shapes = {"model.layers.0.q.weight": (4, 5), "model.layers.1.q.weight": (4, 5), "model.norm.weight": (10,)}
    logits = {
        name: torch.full(shape, level) for (name, shape), level in zip(shapes.items(), (50.0, -50.0, 0.0), strict=True)
    }
    found = kept_fractions(Mask(logits, shapes))
    assert found["layers"] == {"0": pytest.approx(1), "1": pytest.approx(0), "none": pytest.approx(0.5)}
    assert found["modules"] == {"q": pytest.approx(0.5), "norm": pytest.approx(0.5)} and found["all"] == pytest.approx(
        0.5
    )
    generator = torch.Generator().manual_seed(0)
    one, two = (Mask({"a": torch.randn(4000, generator=generator)}, {"a": (4000,)}) for _ in range(2))
    assert overlap(one, one)["jaccard"] == 1.0
    assert abs(overlap(one, two)["jaccard"] - overlap(one, two)["by_chance"]) < 0.03


# --- bad input ---------------------------------------------------------------------------------------------------------------------------
def test_models_that_do_not_fit_are_named():
    import transformers

    safe = build("llama")
    config = tiny.config("llama")
    config.vocab_size = 70
    with pytest.raises(
        InputError, match=r"another vocabulary: model\.embed_tokens\.weight is \[70, 32\], not \[64, 32\]"
    ):
        task_vectors(safe, [transformers.LlamaForCausalLM(config)])
    config = tiny.config("llama")
    config.num_hidden_layers = 1
    with pytest.raises(InputError, match=r"Only in the safe model: model\.layers\.1\..*Only in the other: none"):
        task_vectors(safe, [transformers.LlamaForCausalLM(config)])
    config = tiny.config("llama")
    config.intermediate_size = 40
    with pytest.raises(
        InputError, match=r"other shapes\. model\.layers\.0\.mlp\.gate_proj\.weight: \[40, 32\], not \[48, 32\]"
    ):
        task_vectors(safe, [transformers.LlamaForCausalLM(config)])
    with pytest.raises(InputError, match="nothing to realign: task model 1 equals the safe model"):
        task_vectors(safe, [copy.deepcopy(safe)])
    broken = moved(safe, 1)
    broken.model.norm.weight.data[:3] = float("nan")
    with pytest.raises(InputError, match=r"model\.norm\.weight has 3 entries that are not finite"):
        task_vectors(safe, [broken])


def test_adapters_that_did_not_continue_the_safe_one_are_refused():
    def wear(seed, rank=8):
        return moved(
            put_on(build("llama"), Lora(rank=rank, targets=("q_proj",)), np.random.default_rng(seed)), seed, 0.001
        )

    safe, scaled = wear(0), wear(0)
    scaled.peft_config["default"].lora_alpha = 99
    with pytest.raises(InputError, match="another LoRA rank or scaling"):
        task_vectors(safe, [scaled])
    with pytest.raises(InputError, match="other shapes"):
        task_vectors(safe, [wear(0, rank=4)])
    with pytest.raises(InputError, match="did not start from the safe adapter"):
        task_vectors(safe, [wear(5)])
    whole = build("llama")
    with pytest.raises(InputError, match="both be adapters or both be whole"):
        check_adapters(
            lora_settings(safe), lora_settings(whole), parameters_of(safe), parameters_of(whole), "task model 1"
        )


def test_pairs_that_cannot_be_used_are_dropped_with_a_count():
    user = (Message("user", "w1"),)

    def pku(first, second, left="w2", right="w3"):
        return {"response_0": left, "response_1": right, "is_response_0_safe": first, "is_response_1_safe": second}

    rows = [
        Case("both", user, meta=pku(True, True)),
        Case("neither", user, meta=pku(False, False)),
        Case("empty", user, meta={"chosen": " ", "rejected": "w1"}),
        Case("same", user, meta={"chosen": "w1", "rejected": "w1 "}),
        Case("bare", user),
        Case("answered", (*user, Message("assistant", "w1")), meta={"chosen": "w1", "rejected": "w2"}),
    ]
    with pytest.raises(
        InputError, match=r"no preference pair is left .*2 rows: not exactly one of the two answers is safe"
    ):
        usable_pairs(rows)
    good = Case("good", user, meta=pku(False, True))
    kept, dropped = usable_pairs([*rows, good])
    assert preference(good) == ("w3", "w2") and len(kept) == 1 and sum(dropped.values()) == 6


def test_a_mask_of_other_models_is_refused(tmp_path):
    safe, how = build("llama"), Learning(steps=1, batch=4)
    task = moved(safe, 1)
    mask, _ = learn_mask(safe, [task], pairs(), tokenizer=TOK, merge=ONE, how=how, rng=np.random.default_rng(0))
    path = str(save_mask(mask, tmp_path / "mask.safetensors"))
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="learnt for other weights: task model 1 differs"):
        somf(copy.deepcopy(safe), moved(safe, 2), rng=rng, mask=path)
    with pytest.raises(InputError, match="learnt for other weights: the safe model differs"):
        somf(moved(safe, 3), task, rng=rng, mask=path)
    with pytest.raises(InputError, match="learnt for other weights: 1 task models"):
        somf(copy.deepcopy(safe), task, task, rng=rng, mask=path, merge="average")
    with pytest.raises(InputError, match=r"mask is for other tensors|lacks"):
        somf(
            build("qwen2"),
            moved(build("qwen2"), 1),
            rng=rng,
            mask=str(save_mask(mask_for(build("gpt2")), tmp_path / "g.safetensors")),
        )
    with pytest.raises(InputError, match="no mask file"):
        somf(safe, task, rng=rng, mask=str(tmp_path / "absent"))
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InputError, match="not a mask that davylamp wrote"):
        somf(safe, task, rng=rng, mask=str(tmp_path / "text"))


def test_a_folder_and_its_model_have_one_hash(tmp_path):
    safe = build("mixtral")
    mask = mask_for(safe)
    assert content_hash(safe, mask) == content_hash(saved(safe, tmp_path / "m", max_shard_size="20KB"), mask)
    assert content_hash(moved(safe, 1), mask) != content_hash(safe, mask)


def test_options_that_cannot_be():
    safe, rng = build("llama"), np.random.default_rng(0)
    task = moved(safe, 1)
    with pytest.raises(UnknownNameError, match=r"no merge rule named 'tie'\. Did you mean 'ties'"):
        somf(safe, task, task, rng=rng, merge="tie")
    with pytest.raises(InputError, match="2 task models need a merge rule: average"):
        somf(safe, task, task, rng=rng)
    with pytest.raises(InputError, match="weight of a merge must be a finite number, got inf"):
        somf(safe, task, rng=rng, weight=float("inf"))
    with pytest.raises(InputError, match=r"density of a merge must be in \(0, 1\], got 1.5"):
        somf(safe, task, rng=rng, density=1.5)
    with pytest.raises(InputError, match="got no fine-tune"):
        somf(safe, rng=rng)
    with pytest.raises(InputError, match="no preference pair is left"):
        somf(safe, task, tokenizer=TOK, rng=rng)
    for words in (
        {"lr": 0.0},
        {"batch": 0},
        {"reference": "x"},
        {"schedule": "x"},
        {"sft": -1.0},
        {"temperature": float("nan")},
    ):
        with pytest.raises(InputError):
            Learning(**words)
