"""Instruction residual against its formula in float64; an unchanged base gives back the instruct model bit for bit."""

import json
import shutil

import numpy as np
import pytest
import torch

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.edits.instruction_residual import instruction_residual
from davylamp.models.vectors import names
from davylamp.models.vectors_out import weights_sha256
from davylamp.models.vectors_reports import compatibility, routes, variants
from davylamp.models.vectors_residual import Form
from davylamp.models.vectors_sources import Residual
from tests import tiny

WORDS = [f"w{i}" for i in range(64)]
EIGHT = ("llama", "llama_tied", "qwen2", "qwen3", "gpt2", "gemma2", "mixtral", "t5")


def rng(seed=0):
    return np.random.default_rng(seed)


def family(name, dtype, root, shard="20KB"):
    """(models, folders) of base, instruct and updated base; loaded once, so that files compare."""
    base = tiny.load(tiny.save(tiny.jittered(name, 0, dtype), root / "new"))
    models = [base, tiny.near(base, 1), tiny.near(base, 2)]
    labels = ("base", "instruct", "updated")
    return models, [tiny.save(m, root / label, shard) for m, label in zip(models, labels, strict=True)]


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    return family("llama", torch.bfloat16, tmp_path_factory.mktemp("trio"))


def extract(folders, out, **options):
    return instruction_residual(folders[1], folders[0], out=out, step="extract", rng=rng(), **options)


def apply(updated, *others, out, **options):
    return instruction_residual(updated, *others, out=out, rng=rng(), **options)


def test_the_formula(trio, tmp_path):
    base, instruct, updated = (tiny.weights(folder) for folder in trio[1])
    for scale in (1.0, 0.5, -1.25):
        out = tiny.weights(apply(trio[1][2], *trio[1][:2], out=tmp_path / str(scale), scale=scale))
        for name, tensor in out.items():
            b, i, u = (side[name].double().numpy() for side in (base, instruct, updated))
            want = u + scale * (i - b)
            assert (np.abs(tensor.double().numpy() - want) <= np.abs(want) * 2.0**-8 + 1e-8).all()


@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in EIGHT if n != "llama")])
def test_all_three_forms_give_equal_bytes_on_every_family(name, tmp_path):
    models, folders = family(name, torch.bfloat16, tmp_path)
    direct = apply(folders[2], *folders[:2], out=tmp_path / "direct")
    stored = apply(folders[2], extract(folders, tmp_path / "residual"), out=tmp_path / "stored")
    memory = instruction_residual(models[2], *models[:2], rng=rng())
    assert tiny.file_bytes(direct) == tiny.file_bytes(stored)
    assert tiny.file_bytes(direct) == tiny.file_bytes(tiny.save(memory, tmp_path / "memory", "20KB"))


# --- an unchanged base ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in EIGHT if n != "llama")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_an_unchanged_base_gives_back_the_instruct_model_bit_for_bit(name, dtype, tmp_path):
    models, folders = family(name, dtype, tmp_path)
    want = tiny.file_bytes(folders[1])
    assert tiny.file_bytes(apply(folders[0], *folders[:2], out=tmp_path / "1")) == want
    assert tiny.file_bytes(apply(folders[0], extract(folders, tmp_path / "r"), out=tmp_path / "2")) == want
    memory = instruction_residual(tiny.load(folders[0]), *models[:2], rng=rng())
    assert tiny.file_bytes(tiny.save(memory, tmp_path / "3", "20KB")) == want


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_also_where_float32_cannot_hold_the_difference(dtype, tmp_path):
    """Numbers of very different size, and zeros with a sign: base + (instruct - base) in float32 is then not instruct."""
    models, _ = family("llama", dtype, tmp_path / "x")
    generator = torch.Generator().manual_seed(0)
    small, large = (-40, 8) if dtype == torch.bfloat16 else (-20, 8)
    with torch.no_grad():
        for model in models[:2]:
            for parameter in model.parameters():
                wild = torch.randn(parameter.shape, generator=generator) * torch.exp2(
                    torch.randint(small, large, parameter.shape, generator=generator).float()
                )
                parameter.copy_(torch.where(torch.rand(parameter.shape, generator=generator) < 0.1, -0.0, wild))
    folders = [tiny.save(model, tmp_path / label, "20KB") for model, label in zip(models, "biu", strict=True)]
    plain, right = 0, 0
    for name, b in tiny.weights(folders[0]).items():
        i = tiny.weights(folders[1])[name]
        again = (b.float() + (i.float() - b.float())).to(dtype)
        plain += int((again.view(torch.int16) != i.view(torch.int16)).sum())
    assert plain > 1000  # what plain float32 gets wrong
    residual = extract(folders, tmp_path / "r")
    kept = Residual(residual)
    right = sum(len(places) for places, _, _ in kept.exact.values())
    kept.close()
    assert right >= plain
    for others, out in ((folders[:2], "1"), ([residual], "2")):
        got = instruction_residual(folders[0], *others, out=tmp_path / out, rng=rng())
        assert tiny.file_bytes(got) == tiny.file_bytes(folders[1])
    direct = apply(folders[2], *folders[:2], out=tmp_path / "3", scale=0.7)
    stored = apply(folders[2], residual, out=tmp_path / "4", scale=0.7)
    assert tiny.file_bytes(direct) == tiny.file_bytes(stored)


def test_in_float32_an_unchanged_base_is_off_by_one_unit_at_most(tmp_path):
    _, folders = family("llama", torch.float32, tmp_path)
    assert tiny.file_bytes(apply(folders[0], *folders[:2], out=tmp_path / "1")) == tiny.file_bytes(folders[1])
    got = tiny.weights(apply(folders[0], extract(folders, tmp_path / "r"), out=tmp_path / "2"))
    base, instruct = (tiny.weights(folder) for folder in folders[:2])
    for name, tensor in got.items():
        unit = torch.maximum(base[name].abs(), instruct[name].abs()) * 2.0**-23
        assert ((tensor - instruct[name]).abs() <= unit).all()


# --- tokens, templates, settings --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama", "llama_tied", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_three_new_tokens_and_the_instruct_models_voice(name, tmp_path):
    base = tiny.jittered(name, 0, torch.bfloat16)
    updated, instruct = tiny.near(base, 2), tiny.near(base, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        instruct.resize_token_embeddings(67, mean_resizing=False)
    instruct.generation_config.eos_token_id = [2, 66]
    instruct.config.eos_token_id = [2, 66]
    order = [*WORDS[:10], "new1", *WORDS[10:], "new2", "new3"]  # the new tokens stand between the old ones
    folders = [
        tiny.save(base, tmp_path / "base", "20KB", WORDS),
        tiny.save(instruct, tmp_path / "instruct", "20KB"),
        tiny.save(updated, tmp_path / "updated", "20KB", WORDS),
    ]
    tiny.tokenizer("{{ 'chat: ' + messages[0]['content'] }}", order, marks=False).save_pretrained(folders[1])
    direct = apply(folders[2], *folders[:2], out=tmp_path / "direct")
    residual = extract(folders, tmp_path / "residual")
    stored = apply(folders[2], residual, out=tmp_path / "stored")
    assert tiny.file_bytes(direct) == tiny.file_bytes(stored)
    embedding = next(n for n in names(base) if n.endswith(("embed_tokens.weight", "wte.weight")))
    got, b, i, u = (tiny.weights(folder)[embedding].float() for folder in (direct, *folders))
    assert got.shape[0] == 67
    for row, word in enumerate(order):
        old = WORDS.index(word) if word in WORDS else None
        want = i[row] if old is None else u[old] + (i[row] - b[old])
        assert torch.equal(got[row], want.bfloat16().float()), word
    for out in (direct, stored):
        assert (out / "tokenizer.json").read_bytes() == (folders[1] / "tokenizer.json").read_bytes()
        assert "chat: " in "".join(file.read_text() for file in out.glob("chat_template*"))
        assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 66]
        config = json.loads((out / "config.json").read_text())
        assert config["vocab_size"] == 67 and config["eos_token_id"] == [2, 66]
        assert tiny.load(out).get_input_embeddings().weight.shape[0] == 67
    # An unchanged base gives back the instruct model, new rows and all.
    assert tiny.weights(apply(folders[0], residual, out=tmp_path / "same")).keys() == tiny.weights(folders[1]).keys()
    for key, tensor in tiny.weights(tmp_path / "same").items():
        assert torch.equal(tensor, tiny.weights(folders[1])[key])


def test_in_memory_the_ends_of_replies_come_along(trio):
    import copy

    updated, base, instruct = (copy.deepcopy(trio[0][n]) for n in (2, 0, 1))
    instruct.generation_config.eos_token_id = 7
    instruct.config.eos_token_id = 7
    result = instruction_residual(updated, base, instruct, rng=rng())
    assert result is updated and result.generation_config.eos_token_id == 7 == result.config.eos_token_id


# --- ways to store and to scale -----------------------------------------------------------------------------------------------------
def differences(folders):
    base, instruct = (tiny.weights(folder) for folder in folders[:2])
    return {name: instruct[name].float() - base[name].float() for name in base}


def read_back(folder):
    opened = Residual(folder)
    out = {name: opened.raw(name, 0, spec.rows).view(spec.shape).float() for name, spec in opened.tensors.items()}
    opened.close()
    return out, opened.manifest


def relative(got, want):
    top = sum(float(((got[name] - want[name]).double() ** 2).sum()) for name in want)
    return (top / sum(float((want[name].double() ** 2).sum()) for name in want)) ** 0.5


def test_the_manifest(trio, tmp_path):
    got, manifest = read_back(extract(trio[1], tmp_path / "r"))
    want = differences(trio[1])
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert manifest["kind"] == "residual" and manifest["scale_default"] == 1.0 and manifest["relative_error"] == 0
    assert manifest["base_sha256"] == weights_sha256(trio[1][0])
    assert manifest["instruct_sha256"] == weights_sha256(trio[1][1])
    for name, about in manifest["tensors"].items():
        assert about["shape"] == list(want[name].shape) and about["dtype"] == "F32"
        assert about["l2"] == pytest.approx(float(want[name].double().norm()), rel=1e-9)


def test_half_the_size_with_its_error_on_record(trio, tmp_path):
    got, manifest = read_back(extract(trio[1], tmp_path / "r", dtype="bfloat16"))
    assert 0 < manifest["relative_error"] < 2**-8
    assert manifest["relative_error"] == pytest.approx(relative(got, differences(trio[1])), rel=1e-6)


def test_the_largest_entries_over_all_tensors(trio, tmp_path):
    got, manifest = read_back(extract(trio[1], tmp_path / "r", variant="top_k", density=0.3))
    want = differences(trio[1])
    every = np.sort(np.concatenate([t.numpy().ravel() for t in want.values()]).__abs__())
    limit = every[every.size - int(0.3 * every.size)]
    for name, tensor in want.items():
        kept = tensor if tensor.dim() == 1 else torch.where(tensor.abs() >= float(limit), tensor, 0.0)
        assert torch.equal(got[name], kept), name
    assert manifest["relative_error"] == pytest.approx(relative(got, want), rel=1e-6)
    assert "density" in manifest and "seed" not in manifest


def test_a_random_part_rescaled(trio, tmp_path):
    got, manifest = read_back(extract(trio[1], tmp_path / "r", variant="dare", drop=0.5))
    want = differences(trio[1])
    matrices = [name for name, tensor in want.items() if tensor.dim() > 1]
    for name in matrices:
        assert (torch.isclose(got[name], 2 * want[name]) | (got[name] == 0)).all()
    kept = sum(int((got[name] != 0).sum()) for name in matrices) / sum(
        int((want[name] != 0).sum()) for name in matrices
    )
    assert kept == pytest.approx(0.5, abs=0.02)
    assert manifest["relative_error"] == pytest.approx(relative(got, want), rel=1e-5)


def test_thin_factors_are_the_best_of_their_rank(trio, tmp_path):
    got, manifest = read_back(extract(trio[1], tmp_path / "r", variant="low_rank", rank=4))
    for name, tensor in differences(trio[1]).items():
        if tensor.dim() == 2:
            u, s, v = np.linalg.svd(tensor.double().numpy(), full_matrices=False)
            best = (u[:, :4] * s[:4]) @ v[:4]
            assert np.abs(got[name].numpy() - best).max() < 1e-5
        else:
            assert torch.equal(got[name], tensor)
    assert manifest["rank"] == 4 and 0.3 < manifest["relative_error"] < 1


def test_the_random_range_finder_is_nearly_the_best():
    from davylamp.models.vectors_residual import low_rank

    generator = torch.Generator().manual_seed(0)
    decay = torch.exp(-torch.arange(600) / 20.0)
    left, right = (torch.linalg.qr(torch.randn(600, 600, generator=generator)).Q for _ in range(2))
    matrix = (left * decay) @ right
    a, b = low_rank(matrix, 40, torch.Generator().manual_seed(1))
    error, best = float((matrix - a @ b).norm()), float(decay[40:].norm())
    assert best <= error * (1 + 1e-4) and error <= 1.02 * best


@pytest.mark.parametrize("variant", ["top_k", "dare", "low_rank"])
def test_stored_small_and_applied_in_blocks(variant, trio, tmp_path, monkeypatch):
    from davylamp.models import vectors_residual, vectors_walk

    folder = extract(trio[1], tmp_path / "r", variant=variant, rank=4)
    got, _ = read_back(folder)
    one = apply(trio[1][2], folder, out=tmp_path / "1")
    updated = tiny.weights(trio[1][2])
    for name, tensor in tiny.weights(one).items():
        assert torch.allclose(tensor.float(), updated[name].float() + got[name], rtol=2**-8, atol=1e-6)
    monkeypatch.setattr(vectors_walk, "BLOCK", 128)
    two = apply(trio[1][2], folder, out=tmp_path / "2")
    if variant != "low_rank":  # a product in blocks is rounded otherwise
        assert tiny.file_bytes(one) == tiny.file_bytes(two)
    monkeypatch.setattr(vectors_residual, "SHARD_BYTES", 5_000)
    split = extract(trio[1], tmp_path / "split", variant="top_k", rank=4)
    assert len(list(split.glob("residual-*.safetensors"))) > 2
    whole, _ = read_back(split)
    assert set(whole) == set(got)


def test_the_table_of_ways_matches_what_is_written(trio, tmp_path):
    forms = [Form(), Form(dtype=torch.bfloat16), Form("top_k", density=0.2), Form("low_rank", rank=4)]
    table = variants(trio[1][1], trio[1][0], forms=forms)
    for number, (row, form) in enumerate(zip(table, forms, strict=True)):
        options = {"variant": form.variant, "density": form.density, "rank": form.rank}
        dtype = "float32" if form.dtype == torch.float32 else "bfloat16"
        folder = extract(trio[1], tmp_path / str(number), dtype=dtype, **options)
        _, manifest = read_back(folder)
        size = sum(tensor.nbytes for tensor in tiny.weights(folder).values())
        assert row["bytes"] == size and row["relative_error"] == pytest.approx(manifest["relative_error"], rel=1e-9)
    assert table[0]["share"] == 1.0 and table[1]["share"] == 0.5
    assert len(variants(*trio[0][1::-1])) == 9  # in memory, all that there are


def test_scales_by_layer_and_name(trio, tmp_path):
    base, instruct, updated = (tiny.weights(folder) for folder in trio[1])
    out = tiny.weights(apply(trio[1][2], *trio[1][:2], out=tmp_path / "1", scale="0:0.5,*layers.1.mlp*:0"))
    for name, tensor in out.items():
        scale = 0.5 if "layers.0" in name else 0.0 if "layers.1.mlp" in name else 1.0
        want = updated[name].float() + scale * (instruct[name].float() - base[name].float())
        assert torch.allclose(tensor.float(), want, rtol=2**-8, atol=1e-7), name
    none = apply(trio[1][2], *trio[1][:2], out=tmp_path / "2", scale=0.0)
    assert tiny.file_bytes(none) == tiny.file_bytes(trio[1][2])
    bare = tiny.weights(apply(trio[1][2], *trio[1][:2], out=tmp_path / "3", token_rows=False))
    whole = tiny.weights(apply(trio[1][2], *trio[1][:2], out=tmp_path / "4"))
    same = {name for name in bare if torch.equal(bare[name], whole[name])}
    assert set(bare) - same == {"lm_head.weight", "model.embed_tokens.weight"}
    assert torch.equal(bare["lm_head.weight"], updated["lm_head.weight"])


def test_adapters_are_merged_first(tmp_path):
    peft = pytest.importorskip("peft")
    import warnings

    _, folders = family("llama", torch.float32, tmp_path, "50GB")
    tuned = tiny.load(folders[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(tuned, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.01)
        wrapped.save_pretrained(tmp_path / "lora")
        merged = tiny.save(wrapped.merge_and_unload(), tmp_path / "merged")
    one = tiny.weights(apply(tmp_path / "lora", *folders[:2], out=tmp_path / "1", adapter_base=str(folders[0])))
    two = tiny.weights(apply(merged, *folders[:2], out=tmp_path / "2"))
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in two)


# --- compatibility --------------------------------------------------------------------------------------------------------------------
def test_the_report_is_what_numpy_says(trio, tmp_path):
    base, instruct, updated = (tiny.weights(folder) for folder in trio[1])
    out = apply(trio[1][2], *trio[1][:2], out=tmp_path / "out", report=True)
    report = json.loads((out / "compatibility.json").read_text())
    assert report == json.loads(json.dumps(compatibility(trio[1][2], *trio[1][:2])))
    for name, found in report["tensors"].items():
        b, i, u = (side[name].double().numpy().ravel() for side in (base, instruct, updated))
        r, d = i - b, u - b
        assert found["cosine"] == pytest.approx(r @ d / np.linalg.norm(r) / np.linalg.norm(d), abs=1e-9)
        assert found["residual"] == pytest.approx(np.linalg.norm(r) / np.linalg.norm(b), rel=1e-9)
        assert found["update"] == pytest.approx(np.linalg.norm(d) / np.linalg.norm(b), rel=1e-9)
        both = (r != 0) & (d != 0)
        assert found["sign_conflict"] == pytest.approx((np.sign(r) != np.sign(d))[both].mean(), abs=1e-9)
        assert found["undone"] == pytest.approx(max(0.0, -(r @ d) / (r @ r)), abs=1e-9)
    assert set(report["layers"]) == {"0", "1", "outside of layers"}
    assert report["all"]["base_cosine"] > 0.9 and abs(report["all"]["cosine"]) < 0.05
    residual = extract(trio[1], tmp_path / "r")
    again = compatibility(trio[1][2], trio[1][0], residual)
    assert again["all"]["cosine"] == pytest.approx(report["all"]["cosine"], abs=1e-9)
    stored = apply(trio[1][2], residual, trio[1][0], out=tmp_path / "stored", report=True)
    assert json.loads((stored / "compatibility.json").read_text())["all"] == again["all"]


def test_strangers_and_opposites_are_seen(trio):
    import copy

    base, instruct, _ = trio[0]
    stranger = tiny.jittered("llama", 9, torch.bfloat16)
    assert abs(compatibility(stranger, base, instruct)["all"]["base_cosine"]) < 0.1
    back = copy.deepcopy(base)
    with torch.no_grad():
        for parameter, i, b in zip(back.parameters(), instruct.parameters(), base.parameters(), strict=True):
            parameter.copy_(b.float() - 0.5 * (i.float() - b.float()))
    found = compatibility(back, base, instruct)["all"]
    assert found["cosine"] < -0.95 and 0.4 < found["undone"] < 0.6 and found["sign_conflict"] > 0.95
    same = compatibility(base, base, instruct)["all"]
    assert same["cosine"] is None and same["update"] == 0 and same["sign_conflict"] is None


def test_routes():
    found = routes(parameters=8e9, update_tokens=5e8, tuning_tokens=1e9)
    assert found["route"] == "add the residual" and found["saved"] > 1000
    assert routes(parameters=1e9, update_tokens=1e9, tuning_tokens=1e9)["route"] == "tune again"
    with pytest.raises(InputError, match="positive"):
        routes(parameters=0, update_tokens=1, tuning_tokens=1)


# --- bad input ------------------------------------------------------------------------------------------------------------------------
def refused(match, *given, error=InputError, **options):
    with pytest.raises(error, match=match):
        instruction_residual(*given, rng=rng(), **options)
    if "out" in options:
        folder = options["out"].parent
        assert not [path for path in folder.iterdir() if path.name.startswith(".") or path == options["out"]]


def test_checkpoints_that_are_the_same(trio, tmp_path):
    base, _, updated = trio[1]
    sha = weights_sha256(base)
    out = tmp_path / "out"
    refused(f"residual is zero: these checkpoints are the same .sha256 {sha}", base, base, step="extract", out=out)
    refused(f"residual is zero.*{sha}", updated, base, base, out=out)
    models = trio[0]
    refused("residual is zero", models[2], models[0], models[0])
    with pytest.raises(InputError, match="residual is zero"):
        variants(base, base)


def test_the_wrong_base(trio, tmp_path):
    base, _, updated = trio[1]
    residual = extract(trio[1], tmp_path / "r")
    refused(
        f"made from a base with sha256 {weights_sha256(base)}.*Say force",
        updated,
        residual,
        updated,
        out=tmp_path / "out",
    )
    out = apply(updated, residual, updated, out=tmp_path / "out", force=True)
    assert tiny.file_bytes(out) == tiny.file_bytes(apply(updated, residual, base, out=tmp_path / "right"))


def test_models_and_files_that_do_not_fit(trio, tmp_path):
    base, instruct, updated = trio[1]
    out = tmp_path / "out"
    other = tiny.save(tiny.jittered("qwen2", 0, torch.bfloat16), tmp_path / "qwen2")
    refused(r"only in qwen2 \(6\).*k_proj.bias", other, base, instruct, out=out)
    refused("different tensors", instruct, other, out=out, step="extract")
    residual = extract(trio[1], tmp_path / "r")
    shard = next(residual.glob("residual-*.safetensors"))
    kept = shard.read_bytes()
    shard.write_bytes(kept[:-4])
    refused("is cut off", updated, residual, out=out)
    shard.unlink()
    refused("no file", updated, residual, out=out)
    shard.write_bytes(kept)
    manifest = json.loads((residual / "residual.json").read_text())
    (residual / "residual.json").write_text(json.dumps({**manifest, "format": 2}))
    refused("newer format", updated, residual, out=out)
    (residual / "residual.json").write_text(json.dumps({**manifest, "tensors": {"x": 1}}))
    refused("does not describe", updated, residual, out=out)
    broken = shutil.copytree(instruct, tmp_path / "broken")
    model = tiny.load(instruct)
    with torch.no_grad():
        model.model.norm.weight[:3] = float("inf")
    tiny.save(model, broken, "20KB")
    refused("broken: model.norm.weight has 3 entries", broken, base, step="extract", out=out)
    refused("broken: model.norm.weight has 3 entries", updated, base, broken, out=out)
    words = shutil.copytree(updated, tmp_path / "words")
    tiny.tokenizer(tiny.BARE, [*WORDS[:40], *(f"cpt{i}" for i in range(8))]).save_pretrained(words)
    for folder in (base, instruct):
        tiny.tokenizer(WORDS).save_pretrained(shutil.copytree(folder, tmp_path / f"{folder.name} words"))
    given = words, tmp_path / "base words", tmp_path / "instruct words"
    refused("8 tokens.*cpt0.*allow_missing", *given, out=out)
    assert instruction_residual(*given, out=out, allow_missing=True, rng=rng()) == out


def test_options_out_of_range(trio, tmp_path):
    base, instruct, updated = trio[1]
    out = tmp_path / "out"
    refused("scale must be finite", updated, base, instruct, out=out, scale=float("inf"))
    refused("scale must be finite", updated, base, instruct, out=out, scale="0:nan")
    refused("apply needs", updated, base, out=out)
    refused("extract needs", instruct, out=out, step="extract")
    refused("extract needs", trio[0][1], trio[0][0], step="extract")
    refused("report needs", *trio[0][::-1], report=True)
    refused("rank must be", instruct, base, out=out, step="extract", rank=0)
    refused("density", instruct, base, out=out, step="extract", density=0.0)
    refused("drop", instruct, base, out=out, step="extract", drop=1.0)
    for options, match in (
        ({"variant": "thin"}, "variant"),
        ({"dtype": "int8"}, "dtype"),
        ({"step": "aply"}, "'apply'"),
    ):
        refused(match, instruct, base, out=out, error=UnknownNameError, **options)


def test_a_merged_model_is_no_instruct_model(trio, tmp_path):
    from davylamp.edits.merge import merge

    merged = merge(trio[1][1], trio[1][2], out=tmp_path / "merged", rng=rng())
    _, manifest = read_back(extract([trio[1][0], merged], tmp_path / "r"))
    assert "instruct was itself made by merge" in manifest["warnings"][0]
