"""Ablation: exact counts, the same mask in both forms, and masks of other tensors refused."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.edits.ablate import ablate
from davylamp.models import vectors_walk
from davylamp.models.vectors import names
from tests import tiny


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    base = tiny.jittered("llama")
    models = [base, tiny.near(base, 1)]
    return models, [tiny.save(model, root / str(i), "20KB") for i, model in enumerate(models)]


def inner(folder):
    return [name for name in names(folder) if "_proj" in name]


def test_rows_give_up_exactly_their_share(pair, tmp_path):
    out = tiny.weights(ablate(pair[1][0], out=tmp_path / "out", fraction=0.1, rng=rng()))
    before = tiny.weights(pair[1][0])
    for name, tensor in out.items():
        if name in inner(pair[1][0]):
            width = tensor.shape[1]
            assert ((tensor == 0).sum(1) == width - int(width * 0.9)).all()  # 4 of 32, as Antidote counts
            assert torch.equal(tensor[tensor != 0], before[name][tensor != 0])
        else:
            assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("block", [1 << 18, 100])
def test_tensors_and_all_together_give_up_exactly_their_share(block, pair, tmp_path, monkeypatch):
    from davylamp.edits import ablate as module  # noqa: F401

    monkeypatch.setattr(vectors_walk, "BLOCK", block)
    monkeypatch.setattr("davylamp.edits.ablate.BLOCK", block)
    single = tiny.weights(ablate(pair[1][0], out=tmp_path / "t", fraction=0.3, by="tensor", rng=rng()))
    assert all(int((single[name] == 0).sum()) == int(0.3 * single[name].numel()) for name in inner(pair[1][0]))
    whole = tiny.weights(ablate(pair[1][0], out=tmp_path / "g", fraction=0.3, by="global", rng=rng()))
    zeros = {name: int((whole[name] == 0).sum()) for name in inner(pair[1][0])}
    assert sum(zeros.values()) == int(0.3 * sum(whole[name].numel() for name in zeros))
    assert any(zeros[name] != int(0.3 * whole[name].numel()) for name in zeros)  # which tensor gives how much is drawn


def test_a_random_mask_is_uniform():
    hits = torch.zeros(6, 50)
    for seed in range(300):
        layer = torch.nn.Linear(50, 6, bias=False)
        layer.config, layer.weight.data = {}, torch.ones(6, 50)
        ablate(layer, fraction=0.2, by="global", targets=("*",), rng=rng(seed))
        hits += layer.weight.detach() == 0
    expected, deviation = 60.0, np.sqrt(300 * 0.2 * 0.8)
    assert hits.mean() == expected and (hits - expected).abs().max() < 5 * deviation
    assert 0.8 < float(hits.var()) / deviation**2 < 1.25


@pytest.mark.parametrize("by", ["row", "tensor", "global"])
def test_both_forms_give_equal_bytes(by, pair, tmp_path):
    for family in ("gpt2", "mixtral"):
        model = tiny.load(tiny.save(tiny.jittered(family, 0, torch.bfloat16), tmp_path / f"{family} new"))
        folder = tiny.save(model, tmp_path / family, "20KB")
        out = ablate(folder, out=tmp_path / f"{family} out", fraction=0.25, by=by, rng=rng())
        saved = tiny.save(ablate(model, fraction=0.25, by=by, rng=rng()), tmp_path / f"{family} saved", "20KB")
        assert tiny.file_bytes(out) == tiny.file_bytes(saved)


def test_back_to_the_base_and_rescaled(pair, tmp_path):
    tuned, base = pair[1][1], pair[1][0]
    out = tiny.weights(ablate(tuned, base, out=tmp_path / "1", fraction=0.5, by="tensor", rescale=True, rng=rng()))
    mine, theirs = tiny.weights(tuned), tiny.weights(base)
    for name in inner(base):
        back = out[name] == theirs[name]
        assert int(back.sum()) == out[name].numel() // 2
        want = theirs[name] + 2 * (mine[name] - theirs[name])
        assert torch.allclose(out[name][~back], want[~back], atol=1e-6)
    whole = ablate(tuned, base, out=tmp_path / "2", fraction=1.0, by="tensor", targets=("*",), rng=rng())
    assert tiny.file_bytes(whole) == tiny.file_bytes(base)
    none = ablate(tuned, base, out=tmp_path / "3", fraction=0.0, rng=rng())
    assert tiny.file_bytes(none) == tiny.file_bytes(tuned)


def masks(folder, path, dtype=torch.bool, share=0.2):
    generator = torch.Generator().manual_seed(3)
    made = {
        name: (torch.rand(tensor.shape, generator=generator) < share).to(dtype)
        for name, tensor in tiny.weights(folder).items()
        if "mlp" in name
    }
    save_file(made, path)
    return made


def test_a_given_mask_and_a_random_one_of_equal_size(pair, tmp_path):
    folder = pair[1][0]
    made = masks(folder, tmp_path / "mask.safetensors")
    path = str(tmp_path / "mask.safetensors")
    out = tiny.weights(ablate(folder, out=tmp_path / "given", mask=path, rng=rng()))
    assert all(torch.equal(out[name] == 0, mask) for name, mask in made.items())
    assert sum(int((tensor == 0).sum()) for tensor in out.values()) == sum(int(mask.sum()) for mask in made.values())
    for by, axis in (("row", 1), ("tensor", (0, 1))):
        like = tiny.weights(ablate(folder, out=tmp_path / by, mask=path, like=True, by=by, rng=rng()))
        for name, mask in made.items():
            assert torch.equal((like[name] == 0).sum(axis), mask.sum(axis))
            assert not torch.equal(like[name] == 0, mask)
    masks(folder, tmp_path / "bytes.safetensors", torch.uint8)
    same = ablate(folder, out=tmp_path / "bytes", mask=str(tmp_path / "bytes.safetensors"), rng=rng())
    assert tiny.file_bytes(same) == tiny.file_bytes(tmp_path / "given")


def test_masks_and_options_that_do_not_fit(pair, tmp_path):
    folder = pair[1][0]
    made = masks(folder, tmp_path / "mask.safetensors")
    name = next(iter(made))
    path = tmp_path / "wrong.safetensors"
    save_file({**made, "nope": made[name].clone()}, path)
    with pytest.raises(InputError, match=r"1 tensors that are not edited \(nope\)"):
        ablate(folder, out=tmp_path / "out", mask=str(path), rng=rng())
    save_file({**made, name: made[name].T.contiguous()}, path)
    with pytest.raises(InputError, match="the mask of"):
        ablate(folder, out=tmp_path / "out", mask=str(path), rng=rng())
    save_file({name: made[name].float()}, path)
    with pytest.raises(InputError, match="bool or uint8"):
        ablate(folder, out=tmp_path / "out", mask=str(path), rng=rng())
    for options, match in (
        ({"fraction": 1.1}, r"\[0, 1\]"),
        ({"like": True}, "needs a mask"),
        ({"targets": ("*.nothing",)}, "no tensor"),
    ):
        with pytest.raises(InputError, match=match):
            ablate(folder, out=tmp_path / "out", rng=rng(), **options)
    with pytest.raises(UnknownNameError, match="row"):
        ablate(folder, out=tmp_path / "out", by="rows", rng=rng())
    with pytest.raises(InputError, match="one base at most"):
        ablate(folder, folder, folder, out=tmp_path / "out", rng=rng())
