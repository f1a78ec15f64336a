"""Every merge rule against its formula in float64, in both forms; peft's own rules where the definitions agree."""

import json

import numpy as np
import pytest
import torch

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.registry import find
from davylamp.edits.merge import merge
from davylamp.models import vectors_rules as rules
from davylamp.models.vectors import Part, names, read
from tests import tiny


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    root = tmp_path_factory.mktemp("three")
    base = tiny.jittered("llama")
    models = [base, tiny.near(base, 1), tiny.near(base, 2)]
    return models, [tiny.save(model, root / str(i), "20KB") for i, model in enumerate(models)]


def arrays(folders):
    """[{name: float64 array}] of folders."""
    return [{name: tensor.double().numpy() for name, tensor in tiny.weights(folder).items()} for folder in folders]


def flat(side):
    return np.concatenate([side[name].ravel() for name in sorted(side)])


def compare(out, want, limit=1e-6):
    got = tiny.weights(out)
    assert set(got) == set(want)
    for name, tensor in got.items():
        assert np.abs(tensor.double().numpy() - want[name]).max() <= limit, name


def both(three, tmp_path, count=2, **options):
    """The streamed merge, after checking that the merge in memory gives the same bytes."""
    import copy

    models, folders = three
    out = merge(folders[0], *folders[1 : 1 + count], out=tmp_path / "out", rng=rng(), **options)
    edited = merge(copy.deepcopy(models[0]), *models[1 : 1 + count], rng=rng(), **options)
    saved = tiny.weights(tiny.save(edited, tmp_path / "saved"))
    streamed = tiny.weights(out)
    assert set(saved) == set(streamed) and all(torch.equal(saved[name], streamed[name]) for name in saved)
    return out


def test_linear(three, tmp_path):
    a, b, c = arrays(three[1])
    compare(both(three, tmp_path / "1", 1, weight=0.3), {n: 0.7 * a[n] + 0.3 * b[n] for n in a})
    compare(both(three, tmp_path / "2", 2, weight="0.2;0.5"), {n: 0.3 * a[n] + 0.2 * b[n] + 0.5 * c[n] for n in a})
    compare(both(three, tmp_path / "3", 2), {n: (a[n] + b[n] + c[n]) / 3 for n in a})
    compare(both(three, tmp_path / "4", 2, base=True, weight=0.4), {n: 0.2 * a[n] + 0.4 * (b[n] + c[n]) for n in a})


def test_average(three, tmp_path):
    a, b, c = arrays(three[1])
    compare(both(three, tmp_path / "1", method="average"), {n: (a[n] + b[n] + c[n]) / 3 for n in a})
    compare(both(three, tmp_path / "2", method="average", base=True), {n: (b[n] + c[n]) / 2 for n in a})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_weights_0_and_1_give_the_ingredients_bit_for_bit(dtype, tmp_path):
    base = tiny.jittered("qwen2", dtype=dtype)
    with torch.no_grad():
        base.model.norm.weight[:4] = -0.0
    models = [base, tiny.near(base, 1)]
    folders = [tiny.save(model, tmp_path / str(i), "20KB") for i, model in enumerate(models)]
    for method in ("linear", "slerp"):
        for weight in (0, 1):
            out = merge(*folders, out=tmp_path / f"{method}{weight}", method=method, weight=weight, rng=rng())
            assert tiny.file_bytes(out) == tiny.file_bytes(folders[weight])
    for method in ("task_arithmetic", "ties", "dare"):
        out = merge(*folders, out=tmp_path / method, method=method, weight=0.0, rng=rng())
        assert tiny.file_bytes(out) == tiny.file_bytes(folders[0])


def test_slerp(three, tmp_path):
    a, b, _ = arrays(three[1])
    want = {}
    for name in a:
        x, y = a[name].ravel(), b[name].ravel()
        angle = np.arccos(np.clip(x @ y / np.linalg.norm(x) / np.linalg.norm(y), -1, 1))
        want[name] = (np.sin(0.6 * angle) * a[name] + np.sin(0.4 * angle) * b[name]) / np.sin(angle)
        assert angle > 1e-3
    compare(both(three, tmp_path, 1, method="slerp", weight=0.4), want)


def test_slerp_of_what_has_no_direction(tmp_path):
    left, right = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    left.config, right.config = {}, {}
    left.bias.data.zero_()
    with pytest.raises(InputError, match="bias is zero in one of the two"):
        merge(left, right, method="slerp", rng=rng())
    kept = right.bias.detach().clone()
    merge(left, right, method="slerp", weight="bias:1,weight:0.5", rng=rng())
    assert torch.equal(left.bias, kept)
    right.bias.data.zero_()
    left.bias.data.zero_()
    left.weight.data.copy_(right.weight)  # parallel: the straight line
    want = right.weight.detach().clone()
    merge(left, right, method="slerp", rng=rng())
    assert torch.allclose(left.weight, want) and not left.bias.any()


def test_task_arithmetic_and_its_constants(three, tmp_path):
    a, b, c = arrays(three[1])
    both_tasks = {n: a[n] + 0.3 * (b[n] - a[n] + c[n] - a[n]) for n in a}
    compare(both(three, tmp_path / "1", method="task_arithmetic"), both_tasks)
    compare(both(three, tmp_path / "2", 1, method="task_arithmetic"), b)  # one task: unscaled
    uneven = {n: a[n] + 0.9 * (b[n] - a[n]) + 0.1 * (c[n] - a[n]) for n in a}
    compare(both(three, tmp_path / "3", method="task_arithmetic", weight="0.9;0.1"), uneven)
    compare(
        both(three, tmp_path / "4", base=False, method="task_arithmetic", weight=0.5),
        {n: (a[n] + b[n] + c[n]) / 2 for n in a},
    )


def dense_ties(vectors, density, combine="sum"):
    """TIES on an n x P matrix: as written down, in float64."""
    matrix = np.stack(vectors)
    count = matrix.shape[1]
    for row in matrix:
        rank = count - int(density * count)
        limit = np.sort(np.abs(row))[rank - 1] if rank else 0.0
        row[np.abs(row) < limit] = 0
    sign = np.sign(matrix.sum(0))
    sign[sign == 0] = np.sign(sign.sum())
    agree = np.where(sign > 0, matrix > 0, matrix < 0)
    total = (matrix * agree).sum(0)
    return total if combine == "sum" else total / np.maximum(1, agree.sum(0))


@pytest.mark.parametrize("combine", ["sum", "mean"])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.9])
def test_ties(three, combine, density, tmp_path):
    a, b, c = arrays(three[1])
    # The engine subtracts in float32, so the reference ranks what float32 gives.
    tasks = [flat(side).astype(np.float32) - flat(a).astype(np.float32) for side in (b, c)]
    merged = dense_ties([task.astype(np.float64) for task in tasks], density, combine)
    want, at = {}, 0
    for name in sorted(a):
        want[name] = a[name] + 0.4 * merged[at : at + a[name].size].reshape(a[name].shape)
        at += a[name].size
    compare(both(three, tmp_path, method="ties", density=density, combine=combine), want, 1e-7)


def test_ties_keeps_one_more_than_the_share_and_one_task_unscaled(three, tmp_path):
    out = both(three, tmp_path, 1, method="ties")
    a, b = arrays(three[1])[:2]
    got = arrays([out])[0]
    changed = flat(got) != flat(a)
    assert changed.sum() == int(0.2 * changed.size) + 1
    assert np.abs(flat(got) - flat(b))[changed].max() < 1e-7


def test_what_cancels_takes_the_majority():
    one, two = torch.nn.Linear(6, 1, bias=False), torch.nn.Linear(6, 1, bias=False)
    base = torch.nn.Linear(6, 1, bias=False)
    for layer, values in (
        (base, [0.0] * 6),
        (one, [2.0, 1.0, 1.0, 3.0, -4.0, 1.0]),
        (two, [-2.0, 1.0, 1.0, 1.0, 1.0, 0.0]),
    ):
        layer.config, layer.weight.data = {}, torch.tensor([values])
    merge(base, one, two, method="ties", density=1.0, weight=1.0, rng=rng())
    assert base.weight.tolist() == [[2.0, 2.0, 2.0, 4.0, -4.0, 1.0]]  # the first cancels; the majority is positive
    for layer in (one, two):
        layer.weight.data.neg_()
    base.weight.data.zero_()
    merge(base, one, two, method="ties", density=1.0, weight=1.0, rng=rng())
    assert base.weight.tolist() == [[-2.0, -2.0, -2.0, -4.0, 4.0, -1.0]]


def test_dare(three, tmp_path):
    a, b, c = arrays(three[1])
    out = both(three, tmp_path, method="dare")
    got = arrays([out])[0]
    kept = 0
    for name in a:
        change = (got[name] - a[name]) / 0.3
        tasks = [(side[name] - a[name]) / 0.8 for side in (b, c)]
        options = [np.zeros_like(tasks[0]), tasks[0], tasks[1], tasks[0] + tasks[1]]
        distance = np.stack([np.abs(change - option) for option in options])
        assert distance.min(0).max() < 1e-5
        kept += (distance.argmin(0) >= 2).sum()
    share = kept / flat(a).size
    assert abs(share - 0.8) < 5 * np.sqrt(0.16 / flat(a).size)
    again = arrays([merge(*three[1], out=tmp_path / "again", method="dare", rng=rng())])[0]
    other = arrays([merge(*three[1], out=tmp_path / "other", method="dare", rng=rng(1))])[0]
    assert (flat(again) == flat(got)).all() and (flat(other) != flat(got)).any()


def test_dare_scales_one_task_too_and_keeps_the_mean(three, tmp_path):
    a, b = arrays(three[1])[:2]
    got = arrays([both(three, tmp_path, 1, method="dare", drop=0.5)])[0]
    task, change = flat(b) - flat(a), flat(got) - flat(a)
    assert change @ task / (task @ task) == pytest.approx(0.3, abs=0.02)
    assert abs((change == 0).mean() - 0.5) < 0.02


def test_dare_ties_agrees_with_its_parts(three, tmp_path):
    folders = three[1]
    out = both(three, tmp_path, method="dare_ties")
    seed = json.loads((out / "lineage.json").read_text())["options"]["seed"]
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        sides = [read(folder, name) for folder in folders]
        part = Part(name, tuple(sides[0].shape), 0, sides[0].shape[0])
        thin = [
            rules.drop_and_rescale(side - sides[0], 0.2, rules.generator(seed, part, task))
            for task, side in enumerate(sides[1:])
        ]
        want = sides[0] + 0.4 * torch.from_numpy(dense_ties([t.double().numpy().ravel() for t in thin], 1.0)).view(
            sides[0].shape
        )
        assert torch.allclose(read(out, name), want.float(), atol=1e-7)


def test_peft_agrees_where_the_definitions_do(three):
    utils = pytest.importorskip("peft.utils.merge_utils")
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(5, 400, generator=generator) for _ in range(3)]
    for density in (0.1, 0.5):
        trimmed = []
        for vector in vectors:
            count = int(density * vector.numel())
            limit = float(vector.abs().flatten().sort(descending=True).values[count - 1])
            trimmed.append(rules.trim(vector, limit))
            assert torch.equal(trimmed[-1], utils.magnitude_based_pruning(vector, density))
        want = utils.ties(vectors, torch.full((3,), 0.4), density=density)  # the mean of what agrees
        assert torch.allclose(rules.consensus(trimmed, combine="mean") * 0.4, want, atol=1e-6)
    want = utils.task_arithmetic(vectors, torch.tensor([0.2, 0.3, 0.5]))
    assert torch.allclose(sum(w * v for w, v in zip((0.2, 0.3, 0.5), vectors, strict=True)), want, atol=1e-6)


# --- weights by layer and name --------------------------------------------------------------------------------------------------
def test_weights_by_layer_and_name(three, tmp_path):
    a, b, _ = arrays(three[1])
    out = both(three, tmp_path, 1, weight="0:0.2,1-:0.7,*embed*:1")

    def weight(name):
        return 0.2 if "layers.0" in name else 0.7 if "layers.1" in name else 1.0 if "embed" in name else 0.0

    compare(out, {n: (1 - weight(n)) * a[n] + weight(n) * b[n] for n in a})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weight": 1.5}, r"weights must be in \[0, 1\].*extrapolate"),
        ({"weight": -0.1}, "extrapolate"),
        ({"weight": float("nan")}, "must be finite"),
        ({"weight": "0-3:0.2"}, "numbered 0 to 1"),
        ({"weight": "*.nothing:0.2"}, "fits no tensor"),
        ({"weight": "much"}, "must be a number"),
        ({"weight": "0.1;0.2;0.3"}, "3 parts"),
        ({"method": "ties", "density": 0.0}, r"density must be in \(0, 1\]"),
        ({"method": "ties", "density": 1.2}, "density"),
        ({"method": "dare", "drop": 1.0}, r"drop must be in \[0, 1\)"),
        ({"method": "slerp", "base": True}, "slerp"),
    ],
    ids=str,
)
def test_options_out_of_range(three, options, match, tmp_path):
    with pytest.raises(InputError, match=match):
        merge(*three[1][:2], out=tmp_path / "out", rng=rng(), **options)
    assert not list(tmp_path.iterdir())


def test_unknown_methods_and_lonely_models(three, tmp_path):
    with pytest.raises(UnknownNameError, match="Did you mean 'ties'"):
        merge(*three[1], out=tmp_path / "out", method="tias", rng=rng())
    with pytest.raises(InputError, match="at least one other"):
        merge(three[1][0], out=tmp_path / "out", rng=rng())
    with pytest.raises(InputError, match="2 others"):
        merge(*three[1], out=tmp_path / "out", method="slerp", rng=rng())


def test_extrapolation_goes_beyond(three, tmp_path):
    a, b, _ = arrays(three[1])
    compare(both(three, tmp_path, 1, weight=-0.5, extrapolate=True), {n: 1.5 * a[n] - 0.5 * b[n] for n in a})


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_vision_parts_are_kept_unless_asked_for(family, tmp_path):
    models = [tiny.jittered(family, seed) for seed in (0, 1)]
    folders = [tiny.save(model, tmp_path / str(i)) for i, model in enumerate(models)]
    kept = tiny.weights(merge(*folders, out=tmp_path / "kept", rng=rng()))
    merged = tiny.weights(merge(*folders, out=tmp_path / "merged", vision="merge", rng=rng()))
    before = tiny.weights(folders[0])
    vision = [name for name in before if "vis" in name or "projector" in name]
    assert len(vision) > 10
    for name, tensor in before.items():
        assert torch.equal(kept[name], tensor) == (name in vision)
        assert not torch.equal(merged[name], tensor)


@pytest.mark.parametrize("family", tiny.STREAMED)
@pytest.mark.slow
def test_every_rule_on_every_family(family, tmp_path):
    base = tiny.load(tiny.save(tiny.jittered(family, 0, torch.bfloat16), tmp_path / "new"))
    models = [base, tiny.near(base, 1, 0.05), tiny.near(base, 2, 0.05)]
    folders = [tiny.save(model, tmp_path / str(i), "20KB") for i, model in enumerate(models)]
    for method in ("linear", "average", "slerp", "task_arithmetic", "ties", "dare", "dare_ties"):
        many = 2 if method == "slerp" else 3
        out = merge(*folders[:many], out=tmp_path / method, method=method, rng=rng())
        edited = merge(tiny.load(folders[0]), *models[1:many], method=method, rng=rng())
        assert tiny.file_bytes(tiny.save(edited, tmp_path / f"{method} saved", "20KB")) == tiny.file_bytes(out)


def test_the_lineage_tells_how_to_do_it_again(three, tmp_path):
    out = merge(*three[1], out=tmp_path / "out", method="ties", weight=0.4, rng=rng())
    lineage = json.loads((out / "lineage.json").read_text())
    assert lineage["operation"] == "merge" and lineage["options"]["method"] == "ties"
    assert [source["name"] for source in lineage["sources"]] == ["0", "1", "2"]
    assert all(len(source["sha256"]) == 64 for source in lineage["sources"])
    assert lineage["tensors"]["edited"] == len(names(three[1][0]))


def test_the_command_line_finds_it():
    entry = find("edit", "merge")
    assert entry.options({"method": "slerp", "weight": "0-3:0.2"})["weight"] == "0-3:0.2"
    assert entry.options({"weight": "none"})["weight"] is None
