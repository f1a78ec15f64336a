"""Antidote's scores and masks against a dense computation of the published definition, in every mode, in memory and on folders."""

import copy
import json
import warnings

import numpy as np
import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file

from davylamp.core.errors import InputError
from davylamp.core.nouns import Case, Message
from davylamp.core.rows import write_cases
from davylamp.edits._masks import Threshold, kth_smallest, top_mask
from davylamp.edits.antidote import How, antidote, calibrate, check_disjoint, repair
from davylamp.models.activations import linear_weights
from davylamp.models.adapters import Lora, put_on
from tests import tiny
from tests.models.test_activations import build, dense

# transformers 5.24 warns when peft asks a model whether it checkpoints gradients
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
TOK = tiny.tokenizer()
QKV = Lora(rank=8, targets=("q_proj", "k_proj", "v_proj"))
FUSED = {"gpt2": Lora(rank=8, targets=("c_attn",)), "phi3": Lora(rank=8, targets=("qkv_proj",))}


def rows(count=6, seed=0):
    rng = np.random.default_rng(seed)
    words = lambda: " ".join(f"w{i}" for i in rng.integers(0, 60, size=rng.integers(2, 9)))  # noqa: E731
    return [Case(str(i), (Message("user", words()), Message("assistant", words()))) for i in range(count)]


def with_adapter(name, seed=0):
    """A model with a LoRA adapter whose B is not zero."""
    model = put_on(build(name), FUSED.get(name, QKV), np.random.default_rng(seed))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.05)
    return model.eval()


def reference_mask(matrix, squares, alpha):
    """The definition in numpy: |W| * sqrt(mean over texts of the squared norm); per row a stable ascending sort, all but the first
    int(c (1 - alpha)) columns go. matrix: (outputs, inputs).  squares: (texts, inputs)."""
    score = np.abs(matrix.astype(np.float64)) * np.sqrt(squares.mean(0))
    mask = np.zeros(score.shape, dtype=bool)
    for i, row in enumerate(score):
        mask[i, np.argsort(row, kind="stable")[int(len(row) * (1 - alpha)) :]] = True
    return mask


def read_rows(cases):
    """The token ids the template writes for each case: prompt, answer and end."""
    return [
        (c.id, TOK.apply_chat_template([m.json() for m in c.messages], tokenize=True, return_dict=True)["input_ids"])
        for c in cases
    ]


# --- masks -------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("columns", "alpha", "removed"), [(64, 0.1, 7), (8, 0.1, 1), (10, 0.05, 1), (4, 0.25, 1), (3, 0.01, 1)]
)
def test_the_cut_is_int_of_what_stays(columns, alpha, removed):
    assert columns - int(columns * (1 - alpha)) == removed
    assert top_mask(torch.rand(5, columns), alpha).sum(1).tolist() == [removed] * 5


@pytest.mark.parametrize("seed", range(20))
def test_masks_equal_a_stable_sort_with_many_ties(seed):
    rng = np.random.default_rng(seed)
    score = rng.integers(0, 4, size=(7, 33)).astype(np.float32)
    score[0] = 0
    alpha = float(rng.uniform(0.02, 0.98))
    wanted = reference_mask(score, np.ones((1, 33)), alpha)
    assert np.array_equal(top_mask(torch.tensor(score), alpha).numpy(), wanted)
    flat = reference_mask(score.reshape(1, -1), np.ones((1, score.size)), alpha).reshape(score.shape)
    assert np.array_equal(top_mask(torch.tensor(score), alpha, "tensor").numpy(), flat)
    parts = {"a": torch.tensor(score[:3]), "b": torch.tensor(score[3:])}
    edge = Threshold(lambda: parts.items(), alpha)
    both = np.concatenate([edge.mask(name, part).numpy() for name, part in parts.items()])
    assert np.array_equal(both, flat)


def test_n_of_m_takes_the_n_highest_of_every_m_columns():
    score = torch.tensor([[5.0, 1, 2, 3, 9, 9, 9, 9, 7, 8]])
    assert top_mask(score, 0.5, "1:4").int().tolist() == [[1, 0, 0, 0, 0, 0, 0, 1, 0, 0]]


def test_radix_selection_finds_the_kth_smallest():
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)).abs()
    values[:100] = 0
    ordered = values.sort().values
    for k in (1, 100, 101, 2500, 5000):
        assert kth_smallest(lambda: values.split(700), k) == float(ordered[k - 1])


# --- parity in every mode ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gemma", "opt", "gpt2", "mixtral", "qwen2_moe", "phi3"])
@pytest.mark.parametrize("mode", ["adapter", "full"])
def test_masks_are_the_definitions_on_every_architecture(name, mode):
    model = with_adapter(name) if mode == "adapter" else build(name)
    cases = rows()
    if mode == "adapter":
        weights = {key: w for key, w in linear_weights(model).items() if "lora_" in key}
    else:
        last = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "c_attn.weight", "qkv_proj.weight")
        weights = {key: w for key, w in linear_weights(model).items() if key.endswith(last)}
    squares = dense(model, read_rows(cases), weights)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    model, report = repair(model, cases, tokenizer=TOK, how=How(0.2))
    assert report.mode == mode and set(report.tensors) == set(weights) and report.removed > 0
    total = 0
    for key, parameter in model.named_parameters():
        if key not in weights:
            assert torch.equal(parameter, before[key]), f"{key} is none of the targets"
            continue
        turned = weights[key].transposed
        matrix = (before[key].T if turned else before[key]).numpy()
        mask = reference_mask(matrix, squares[key], 0.2)
        assert np.array_equal((parameter.T if turned else parameter).detach().numpy(), np.where(mask, 0, matrix)), key
        assert report.tensors[key]["removed"] == mask.sum()
        total += mask.sum()
    assert report.removed == total


def test_an_untrained_b_is_all_ties_and_the_true_fraction_is_reported():
    model = put_on(build("llama"), QKV, np.random.default_rng(0))
    cases = rows()
    _, report = repair(model, cases, tokenizer=TOK, how=How(0.1))
    row = next(row for key, row in report.tensors.items() if "lora_B" in key)
    assert row["fraction"] == 1 / 8 and row["zero_before"] == row["removed"]  # r=8, ratio 0.1: one in eight


def test_mean_norm_follows_the_paper():
    model, cases = build("llama"), rows()
    weights = {key: w for key, w in linear_weights(model).items() if key.endswith("q_proj.weight")}
    squares = dense(model, read_rows(cases), weights)
    before = {key: w.parameter.detach().clone().numpy() for key, w in weights.items()}
    repair(model, cases, tokenizer=TOK, how=How(0.2, norm="mean"), target=["q_proj"])
    for key, weight in weights.items():
        mask = reference_mask(before[key], np.sqrt(squares[key]).mean(0, keepdims=True) ** 2, 0.2)
        assert np.array_equal(weight.parameter.detach().numpy(), np.where(mask, 0, before[key]))


def test_merged_masks_the_sum_and_delta_only_what_the_fine_tune_added():
    model, cases = with_adapter("llama"), rows()
    base = build("llama")
    start = dict(base.named_parameters())
    whole = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    merged, report = repair(copy.deepcopy(model), cases, tokenizer=TOK, how=How(0.3), mode="merged")
    names = list(report.tensors)
    assert report.mode == "merged" and len(names) == 6 and all("q_proj" in n or "k_" in n or "v_" in n for n in names)
    for key, parameter in merged.named_parameters():
        gone = (parameter == 0) & (whole[key] != 0)  # the padding's embedding was zero before
        assert torch.equal(torch.where(gone, whole[key], parameter), whole[key])
        assert (int(gone.sum()) == report.tensors[key]["removed"]) if key in report.tensors else not gone.any()
    delta, report = repair(copy.deepcopy(model), cases, tokenizer=TOK, how=How(0.3), mode="delta")
    other, second = repair(
        copy.deepcopy(model).merge_and_unload(), cases, tokenizer=TOK, how=How(0.3), mode="delta",
        aligned=base, target=["q_proj", "k_proj", "v_proj"],
    )  # fmt: skip
    assert report.tensors == second.tensors
    for (key, parameter), (_, again) in zip(delta.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(parameter, again)
        if key in report.tensors:
            back = parameter == start[key]
            assert int(back.sum()) == report.tensors[key]["removed"]
            assert torch.equal(parameter[~back], whole[key][~back])
    assert not any(torch.equal(dict(merged.named_parameters())[n], dict(delta.named_parameters())[n]) for n in names)


def test_the_set_difference_leaves_what_benign_text_needs():
    cases, benign = rows(), rows(seed=5)
    plain, one = repair(build("llama"), cases, tokenizer=TOK, how=How(0.2))
    kept, other = repair(build("llama"), cases, tokenizer=TOK, how=How(0.2, benign_ratio=0.2), benign=benign)
    calm, _ = repair(build("llama"), benign, tokenizer=TOK, how=How(0.2))
    assert 0 < other.removed < one.removed
    for key in one.tensors:
        harmful, safe, both = (dict(m.named_parameters())[key] == 0 for m in (plain, calm, kept))
        assert torch.equal(both, harmful & ~safe)


def test_controls_are_of_equal_size_and_differ():
    sizes, zeros = set(), []
    for score in ("activations", "magnitude", "random"):
        model, report = repair(build("llama"), rows(), tokenizer=TOK, how=How(0.1, score=score, seed=3))
        sizes.add(report.removed)
        zeros.append(torch.cat([(p == 0).flatten() for p in model.parameters()]))
    assert len(sizes) == 1 and not any(torch.equal(a, b) for a in zeros for b in zeros if a is not b)


def test_one_pass_serves_several_ratios():
    cases, model = rows(), build("llama")
    weights = {
        k: w
        for k, w in linear_weights(model).items()
        if k.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    }
    norms = calibrate(model, TOK, cases, weights, How())
    for ratio in (0.05, 0.4):
        again, first = repair(copy.deepcopy(model), [], how=How(ratio), norms=norms)
        fresh, second = repair(copy.deepcopy(model), cases, tokenizer=TOK, how=How(ratio))
        assert first.tensors == second.tensors
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), fresh.parameters(), strict=True))


def test_an_expert_without_tokens_is_left_alone_and_named():
    model, cases = build("mixtral"), rows(2)
    gate = model.model.layers[0].mlp.gate.weight
    with torch.no_grad():
        gate.zero_()  # the same logit for every expert: the first two are always taken
    before = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    _, report = repair(model, cases, tokenizer=TOK, how=How(0.2), target=["down_proj", "gate_up_proj"])
    idle = [name for name in report.skipped if name.startswith("model.layers.0.mlp.experts.down_proj expert")]
    assert len(idle) == 2 and set(report.skipped.values()) == {"no token was routed to it"}
    after = model.model.layers[0].mlp.experts.down_proj
    for expert in range(4):
        same = torch.equal(after[expert], before[expert])
        assert same == (f"model.layers.0.mlp.experts.down_proj expert {expert}" in report.skipped)
    assert report.tensors["model.layers.0.mlp.experts.down_proj"]["entries"] == 2 * 32 * 48


def test_early_stopping_is_approximate_and_says_so():
    cases = [Case(str(i), case.messages) for i, case in enumerate(rows(1) * 60)]
    _, report = repair(build("llama"), cases, tokenizer=TOK, how=How(0.2, early=True))
    assert report.approximate and report.sequences < 60
    _, whole = repair(build("llama"), cases, tokenizer=TOK, how=How(0.2))
    assert not whole.approximate and whole.sequences == 60


# --- folders -----------------------------------------------------------------------------------------------------------------------------
def saved(model, folder, **how):
    model.save_pretrained(folder, **how)
    TOK.save_pretrained(folder)
    return folder


def tensors_of(folder):
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("scope", ["row", "tensor", "global", "1:4"])
def test_a_sharded_folder_gets_the_bytes_that_memory_gets(name, scope, tmp_path):
    target = ("down_proj", "gate_up_proj", "q_proj") if name == "mixtral" else ()
    source = saved(build(name), tmp_path / "in", max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    words = {"rows": rows(), "ratio": 0.2, "scope": scope, "target": target}
    out = antidote(source, out=tmp_path / "out", rng=np.random.default_rng(0), **words)
    model = antidote(build(name), tokenizer=TOK, rng=np.random.default_rng(0), **words)
    streamed, held = tensors_of(out), tensors_of(saved(model, tmp_path / "memory"))
    assert streamed.keys() == held.keys() and all(torch.equal(streamed[key], held[key]) for key in held)
    report = json.loads((out / "antidote.json").read_text())
    zeros = sum(int((v == 0).sum()) for v in streamed.values()) - sum(
        int((v == 0).sum()) for v in tensors_of(source).values()
    )
    assert report["removed"] == zeros > 0 and report["mode"] == "full"
    assert {"scoring", "masking"} == set(report["seconds"]) == set(report["peak_bytes"])
    assert json.loads((out / "lineage.json").read_text())["operation"] == "antidote"


@pytest.mark.parametrize("mode", ["adapter", "delta", "merged"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_adapters_folder(name, mode, tmp_path):
    base = saved(build(name), tmp_path / "base")
    model = with_adapter(name)
    model.peft_config["default"].base_model_name_or_path = str(base)
    source = saved(model, tmp_path / "in")
    out = antidote(source, rows=rows(), out=tmp_path / "out", rng=np.random.default_rng(0), ratio=0.2, mode=mode)
    repaired = antidote(model, rows=rows(), tokenizer=TOK, rng=np.random.default_rng(0), ratio=0.2, mode=mode)
    repaired.save_pretrained(tmp_path / "memory")
    streamed, held = tensors_of(out), tensors_of(tmp_path / "memory")
    assert (out / "adapter_config.json").is_file() == (mode == "adapter")
    assert streamed.keys() == held.keys()
    for key in held:
        assert torch.allclose(streamed[key], held[key], atol=1e-7), key
        assert torch.equal(streamed[key] == 0, held[key] == 0), key


def test_a_missing_shard_is_named(tmp_path):
    source = saved(build("llama"), tmp_path / "in", max_shard_size="20KB")
    gone = sorted(source.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(InputError, match=gone.name):
        antidote(source, out=tmp_path / "out", rng=np.random.default_rng(0), score="magnitude")
    assert not (tmp_path / "out").exists()


def test_an_adapter_for_another_base_is_refused_with_a_table(tmp_path):
    other = tiny.config("llama")
    other.hidden_size = 64
    with torch.random.fork_rng():
        base = saved(__import__("transformers").AutoModelForCausalLM.from_config(other), tmp_path / "base")
    model = with_adapter("llama")
    model.peft_config["default"].base_model_name_or_path = str(base)
    source = saved(model, tmp_path / "in")
    with pytest.raises(InputError, match=r"made for another base(.|\n)*tensor \| adapter \| base"):
        antidote(source, rows=rows(), out=tmp_path / "out", rng=np.random.default_rng(0))


# --- bad input ---------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ratio", [0, 1, 1.2, -0.1, float("nan"), True])
def test_a_ratio_outside_of_0_and_1(ratio):
    with pytest.raises(InputError, match=f"mask ratio must be between 0 and 1, got {ratio}"):
        antidote(build("llama"), rows=rows(), tokenizer=TOK, rng=np.random.default_rng(0), ratio=ratio)


def test_rows_that_cannot_serve():
    model, rng = build("llama"), np.random.default_rng(0)
    with pytest.raises(InputError, match="re-alignment set is empty"):
        antidote(model, tokenizer=TOK, rng=rng)
    bare = [Case(f"q{i}", (Message("user", "w1"),)) for i in range(9)]
    with pytest.raises(InputError, match=r"no row ends in one\. First ids: q0, q1, q2, q3, q4$"):
        antidote(model, rows=bare, tokenizer=TOK, rng=rng)
    mixed = [*rows(3), *bare]
    _, report = repair(model, mixed, tokenizer=TOK)
    assert report.sequences == 3 and report.dropped == 9


def test_rows_of_the_evaluation_are_refused(tmp_path):
    cases = rows(9)
    asked = [Case(f"e{i}", (Message("user", case.messages[0].text.upper()),)) for i, case in enumerate(cases)]
    with pytest.raises(InputError, match=r"9 rows .* evaluation rows: 0, 1, 2, 3, 4"):
        check_disjoint(cases, asked)
    write_cases(tmp_path / "held.jsonl", asked)
    with pytest.raises(InputError, match="evaluation rows"):
        antidote(
            build("llama"),
            rows=cases,
            tokenizer=TOK,
            rng=np.random.default_rng(0),
            held_out=str(tmp_path / "held.jsonl"),
        )
    check_disjoint(cases, [Case("x", (Message("user", "another"),))])


def test_a_ratio_too_small_to_mask_anything_warns():
    """int() cuts off what stays, so that any ratio that float64 can tell from 0 takes one weight of a row."""
    with pytest.warns(UserWarning, match=r"so small that no weight was masked \(count 0\)"):
        _, report = repair(build("llama"), rows(), tokenizer=TOK, how=How(1e-17))
    assert report.removed == 0


def test_targets_that_are_not_there_name_the_layers():
    with pytest.raises(InputError, match=r"no layers match c_attn.*down_proj, gate_proj, k_proj"):
        repair(build("llama"), rows(), tokenizer=TOK, target=["c_attn"])
    with pytest.raises(InputError, match=r"no LoRA adapter to mask\. Its layers: .*q_proj"):
        repair(build("llama"), rows(), tokenizer=TOK, mode="adapter")
    with pytest.raises(InputError, match="wears an adapter"):
        repair(with_adapter("llama"), rows(), tokenizer=TOK, mode="full")
    with pytest.raises(InputError, match="needs the aligned model"):
        repair(build("llama"), rows(), tokenizer=TOK, mode="delta")
    with pytest.raises(InputError, match="scope must be row, tensor, global or n:m"):
        How(scope="4:2")


def test_weights_that_are_not_finite_stop_with_layer_and_row():
    model = build("llama")
    model.model.layers[1].input_layernorm.weight.data[3] = float("nan")
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.q_proj.*at row 0"):
        repair(model, rows(), tokenizer=TOK)


def test_nothing_is_written_when_it_fails(tmp_path):
    source = saved(build("llama"), tmp_path / "in")
    with warnings.catch_warnings(), pytest.raises(InputError):
        antidote(source, rows=[], out=tmp_path / "out", rng=np.random.default_rng(0))
    assert not (tmp_path / "out").exists()
