"""The weight-space engine: both forms give equal bytes on every family, and what does not fit is refused before a byte is written."""

import errno
import itertools
import json
import os
import shutil
import warnings

import numpy as np
import pytest
import torch

from davylamp.core.errors import InputError, RunError
from davylamp.models import vectors, vectors_out, vectors_select, vectors_sources
from davylamp.models.vectors import edit, edit_folder, edit_model, names, read, scan
from tests import tiny

STEP = {"operation": "step", "options": {"weight": 0.3}}
WORDS = [f"w{i}" for i in range(64)]


def step(part, tensors):
    return tensors[0].lerp_(tensors[1], 0.3)


def by_norm(part, tensors):  # needs the whole tensor
    return tensors[0] + 0.1 * tensors[1] / tensors[1].norm()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    base = tiny.jittered("llama")
    return tiny.save(base, root / "base", "20KB"), tiny.save(tiny.near(base, 1), root / "tuned", "20KB")


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=["bf16", "f32"]
)
@pytest.mark.parametrize("family", tiny.STREAMED)
def test_both_forms_give_equal_bytes(family, dtype, tmp_path):
    models = [tiny.load(tiny.save(tiny.jittered(family, seed, dtype), tmp_path / f"new{seed}")) for seed in (0, 1)]
    folders = [tiny.save(model, tmp_path / str(i), "20KB") for i, model in enumerate(models)]
    assert names(models[0]) == names(folders[0]) == sorted(tiny.weights(folders[0]))
    ids = torch.arange(8)[None]
    for rule, blocks in ((step, True), (by_norm, False)):
        out = edit(folders[0], folders[1:], rule, out=tmp_path / rule.__name__, lineage=STEP, blocks=blocks)
        edited = edit(models[0], models[1:], rule, lineage=STEP, blocks=blocks)
        assert edited is models[0]
        assert tiny.file_bytes(tiny.save(edited, tmp_path / f"{rule.__name__} saved", "20KB")) == tiny.file_bytes(out)
        loaded = tiny.load(out)
        inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if family == "t5" else {})}
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, edited(**inputs).logits)
        models[0] = tiny.load(folders[0])


@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_nothing_done_copies_every_byte(shard, tmp_path):
    source = tiny.save(tiny.jittered("qwen2", dtype=torch.bfloat16), tmp_path / "a", shard, WORDS)
    (source / "README.md").write_text("the card of other weights")
    out = edit_folder(source, [], lambda part, tensors: tensors[0], tmp_path / "out", lineage=STEP)
    mine, theirs = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in (out, source))
    lineage = json.loads(mine.pop("lineage.json"))
    assert theirs.pop("README.md") and mine == theirs
    assert lineage["tensors"]["copied"] == 0 and lineage["logits"] == "finite on a short prompt"
    assert lineage["sources"][0]["sha256"] == vectors_out.weights_sha256(source)


def test_the_arithmetic_is_float32_rounded_once(tmp_path):
    models = [tiny.jittered("gpt2", seed, torch.bfloat16) for seed in (0, 1)]
    folders = [tiny.save(model, tmp_path / str(i)) for i, model in enumerate(models)]
    out = tiny.weights(edit_folder(folders[0], folders[1:], step, tmp_path / "out", lineage=STEP, blocks=True))
    for name, tensor in out.items():
        a, b = (tiny.weights(folder)[name].double() for folder in folders)
        exact = a + 0.3 * (b - a)
        assert tensor.dtype == torch.bfloat16
        assert ((tensor.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-9).all()  # half a unit in the last place


def test_only_some_tensors_and_the_rest_byte_by_byte(pair, tmp_path):
    base, tuned = pair
    out = edit_folder(base, [tuned], step, tmp_path / "out", lineage=STEP, only=lambda name: "mlp" in name)
    before, after = tiny.weights(base), tiny.weights(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "mlp" in name}
    with pytest.raises(InputError, match="no tensor"):
        edit_folder(base, [tuned], step, tmp_path / "none", lineage=STEP, only=lambda name: False)


def test_threads_do_not_change_a_byte(pair, tmp_path):
    base, tuned = pair
    outs = [edit_folder(base, [tuned], by_norm, tmp_path / str(n), lineage=STEP, threads=n) for n in (1, 3)]
    assert tiny.file_bytes(outs[0]) == tiny.file_bytes(outs[1])
    assert torch.get_num_threads() >= 1


def test_scan_is_in_order_and_sees_blocks(pair, monkeypatch):
    base, tuned = pair
    from davylamp.models import vectors_walk

    monkeypatch.setattr(vectors_walk, "BLOCK", 100)
    monkeypatch.setattr(vectors_walk, "BUNDLE", 300)
    found = list(scan(base, [tuned], lambda part, tensors: float((tensors[1] - tensors[0]).abs().sum()), threads=3))
    parts = [part for part, _ in found]
    assert max((part.stop - part.start) * part.shape[-1] for part in parts if len(part.shape) > 1) <= 128
    for name in names(base):
        rows = [(part.start, part.stop) for part in parts if part.name == name]
        assert rows[0][0] == 0 and all(a[1] == b[0] for a, b in itertools.pairwise(rows))
    ours, theirs = tiny.weights(base), tiny.weights(tuned)
    total = sum(float((theirs[name] - ours[name]).abs().double().sum()) for name in ours)
    assert sum(value for _, value in found) == pytest.approx(total, rel=1e-5)


def test_small_blocks_give_the_same_bytes_for_elementwise_rules(pair, tmp_path, monkeypatch):
    from davylamp.models import vectors_walk

    base, tuned = pair
    one = edit_folder(base, [tuned], step, tmp_path / "1", lineage=STEP, blocks=True)
    monkeypatch.setattr(vectors_walk, "BLOCK", 64)
    two = edit_folder(base, [tuned], step, tmp_path / "2", lineage=STEP, blocks=True)
    assert tiny.file_bytes(one) == tiny.file_bytes(two)


def test_read_and_names(pair):
    base, _ = pair
    assert torch.equal(read(base, "model.norm.weight"), tiny.weights(base)["model.norm.weight"])
    model = tiny.jittered("mixtral")
    view = read(model, "model.norm.weight")
    view.zero_()
    assert not model.model.norm.weight.any()
    with pytest.raises(InputError, match="has no tensor"):
        read(base, "nope")


def test_buffers_and_integers_are_copied(pair, tmp_path):
    from safetensors.torch import save_file

    base, tuned = (shutil.copytree(folder, tmp_path / folder.name) for folder in pair)
    for number, folder in enumerate((base, tuned)):
        kept = tiny.weights(folder)
        kept["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.full((4,), float(number + 1))
        kept["steps"] = torch.tensor([number + 7])
        for file in folder.glob("model*"):
            file.unlink()
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
    out = tiny.weights(edit_folder(base, [tuned], step, tmp_path / "out", lineage=STEP, check=False))
    assert out["steps"].item() == 7 and out["model.layers.0.self_attn.rotary_emb.inv_freq"].tolist() == [1.0] * 4


# --- tied heads -------------------------------------------------------------------------------------------------------
def both_ways(model, folder):
    """The same tied model as transformers saves it, and as other savers do: with the head written out as well."""
    from safetensors.torch import save_file

    once = tiny.save(model, folder / "once")
    twice = shutil.copytree(once, folder / "twice")
    kept = tiny.weights(twice)
    embedding = next(name for name in kept if name.endswith(("embed_tokens.weight", "wte.weight", "shared.weight")))
    kept["lm_head.weight"] = kept[embedding].clone()
    save_file(kept, twice / "model.safetensors", {"format": "pt"})
    return once, twice, embedding


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
def test_a_tied_head_is_edited_once_however_it_is_saved(family, tmp_path):
    base = tiny.jittered(family)
    sides = [both_ways(model, tmp_path / str(i)) for i, model in enumerate((base, tiny.near(base, 1)))]
    seen = []

    def counted(part, tensors):
        seen.append(part.name)
        return step(part, tensors)

    want = tiny.weights(edit_folder(sides[0][0], [sides[1][0]], step, tmp_path / "want", lineage=STEP))
    for left in (0, 1):
        for right in (0, 1):
            out = edit_folder(sides[0][left], [sides[1][right]], counted, tmp_path / f"{left}{right}", lineage=STEP)
            got = tiny.weights(out)
            if left:
                assert torch.equal(got.pop("lm_head.weight"), want[sides[0][2]])
            assert set(got) == set(want) and all(torch.equal(got[name], want[name]) for name in want)
    assert "lm_head.weight" not in seen
    parts = [part.name for part, _ in scan(sides[0][1], [sides[1][1]], lambda part, tensors: None)]
    assert sorted(parts) == sorted(want)


def test_tied_against_untied_is_refused(tmp_path):
    tied = tiny.save(tiny.jittered("llama_tied"), tmp_path / "tied")
    free = tiny.save(tiny.jittered("llama"), tmp_path / "free")
    with pytest.raises(InputError, match=r"lm_head\.weight.*ties its head"):
        edit_folder(tied, [free], step, tmp_path / "out", lineage=STEP)


# --- vocabularies -----------------------------------------------------------------------------------------------------
def test_rows_meet_by_token_and_not_by_number(tmp_path):
    base = tiny.jittered("llama")
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    tuned = tiny.near(base, 1)
    shuffled = tiny.near(base, 1)
    with torch.no_grad():
        for side in (shuffled.model.embed_tokens.weight, shuffled.lm_head.weight):
            side.copy_(side[order])
    folders = [
        tiny.save(base, tmp_path / "base", "50GB", WORDS),
        tiny.save(tuned, tmp_path / "tuned", "50GB", WORDS),
        tiny.save(shuffled, tmp_path / "shuffled", "50GB", [WORDS[i] for i in order.tolist()]),
    ]
    one = edit_folder(folders[0], [folders[1]], step, tmp_path / "1", lineage=STEP)
    two = edit_folder(folders[0], [folders[2]], step, tmp_path / "2", lineage=STEP)
    assert tiny.file_bytes(one) == tiny.file_bytes(two)
    assert json.loads((two / "lineage.json").read_text())["notes"]["vocabulary"]["shuffled to base"]["moved"] > 40


def longer(model, seed):
    """The model with three more tokens, and their rows random."""
    other = tiny.near(model, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        other.resize_token_embeddings(67, mean_resizing=False)
    return other


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "qwen2_moe"])
def test_three_new_tokens(family, tmp_path):
    base = tiny.jittered(family)
    tuned = longer(base, 1)
    words = [*WORDS, "new1", "new2", "new3"]
    folders = [tiny.save(base, tmp_path / "a", "20KB", WORDS), tiny.save(tuned, tmp_path / "b", "20KB", words)]
    embedding = next(n for n in names(base) if n.endswith(("embed_tokens.weight", "wte.weight")))
    # The model's vocabulary: the other's new rows have nowhere to go.
    out = edit_folder(folders[0], folders[1:], step, tmp_path / "0", lineage=STEP)
    assert tiny.weights(out)[embedding].shape[0] == 64
    # The other's vocabulary: the model's new rows start from zero.
    out = edit_folder(folders[0], folders[1:], step, tmp_path / "1", lineage=STEP, vocabulary_of=1)
    got, theirs = tiny.weights(out), tiny.weights(folders[1])
    assert torch.allclose(got[embedding][64:], 0.3 * theirs[embedding][64:])
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == 67 and "new3" in (out / "tokenizer.json").read_text()
    assert type(base).from_pretrained(out).get_input_embeddings().weight.shape[0] == 67
    maps = [{w: i for i, w in enumerate(side)} for side in (WORDS, words)]
    edited = edit_model(base, [tuned], step, vocabulary_of=1, vocabularies=maps)
    assert tiny.file_bytes(tiny.save(edited, tmp_path / "saved", "20KB")) == tiny.file_bytes(out)
    assert edited.config.vocab_size == 67
    # Tokens that would be lost are named.
    with pytest.raises(InputError, match="new1"):
        edit_folder(folders[1], folders[:1], step, tmp_path / "2", lineage=STEP, vocabulary_of=1)
    out = edit_folder(folders[1], folders[:1], step, tmp_path / "2", lineage=STEP, vocabulary_of=1, missing="copy")
    assert tiny.weights(out)[embedding].shape[0] == 64
    # Rows that the other lacks are the model's own.
    out = edit_folder(folders[1], folders[:1], step, tmp_path / "3", lineage=STEP)
    assert torch.equal(tiny.weights(out)[embedding][64:], theirs[embedding][64:])


def test_vocabularies_that_do_not_meet(tmp_path):
    base = tiny.jittered("llama")
    plain = tiny.save(base, tmp_path / "plain")
    named = tiny.save(base, tmp_path / "named", "50GB", WORDS)
    other = tiny.save(base, tmp_path / "other", "50GB", [f"x{i}" for i in range(64)])
    wider = tiny.save(longer(base, 1), tmp_path / "wider")
    with pytest.raises(InputError, match="not of one family"):
        edit_folder(named, [other], step, tmp_path / "out", lineage=STEP)
    with pytest.raises(InputError, match=r"64 rows.*67"):
        edit_folder(plain, [wider], step, tmp_path / "out", lineage=STEP)
    out = edit_folder(plain, [named], step, tmp_path / "out", lineage=STEP)
    assert "not checked" in json.loads((out / "lineage.json").read_text())["notes"]["vocabulary"]["named to plain"]


def test_padding_rows_meet_by_number(tmp_path):
    from davylamp.models.vectors_plan import match_rows

    own = {"a": 0, "b": 1}
    rows, facts = match_rows(own, 4, own, 6)
    assert rows.tolist() == [0, 1, 2, 3, -1, -1] and facts["moved"] == 0


# --- vision-language models meet their language models --------------------------------------------------------------------
def test_a_llama_meets_the_llama_inside_a_llava(tmp_path):
    whole, text = tiny.jittered("llava", 0), tiny.jittered("llama", 1)
    folders = [tiny.save(whole, tmp_path / "vl"), tiny.save(text, tmp_path / "text")]
    out = tiny.weights(edit_folder(folders[0], folders[1:], step, tmp_path / "out", lineage=STEP))
    before, other = (tiny.weights(folder) for folder in folders)
    for name, tensor in out.items():
        if "vision" in name or "projector" in name:
            assert torch.equal(tensor, before[name])
        else:
            theirs = other[name.removeprefix("language_model.")]
            assert torch.equal(tensor, before[name].lerp(theirs, 0.3)), name
    edited = edit_model(whole, [text], step)
    assert tiny.file_bytes(tiny.save(edited, tmp_path / "saved")) == tiny.file_bytes(tmp_path / "out")


# --- adapters -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def _quiet_peft():
    """peft asks transformers for an attribute that is to go, and tells what it saves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


peft_tests = pytest.mark.usefixtures("_quiet_peft")


def adapter(model, folder, seed, **settings):
    peft = pytest.importorskip("peft")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        targets = settings.pop("target_modules", ["q_proj", "v_proj", "down_proj"])
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **settings))
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    wrapped.save_pretrained(folder)
    return wrapped


@peft_tests
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True, "alpha_pattern": {"v_proj": 3}, "rank_pattern": {"q_proj": 2}}),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    ],
    ids=["plain", "rank-stabilised", "head saved", "embedding", "transposed"],
)
def test_an_adapter_is_merged_as_it_is_read(family, settings, tmp_path):
    base = tiny.jittered(family)
    folder = tiny.save(base, tmp_path / "base")
    wrapped = adapter(tiny.jittered(family), tmp_path / "lora", 1, **settings)
    want = tiny.save(wrapped.merge_and_unload(), tmp_path / "merged")
    halves = edit_folder(folder, [tmp_path / "lora"], step, tmp_path / "1", lineage=STEP, base=folder)
    wanted = edit_folder(folder, [want], step, tmp_path / "2", lineage=STEP)
    ours, theirs = tiny.weights(halves), tiny.weights(wanted)
    assert set(ours) == set(theirs)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
    whole = edit_folder(
        tmp_path / "lora", [], lambda part, tensors: tensors[0], tmp_path / "3", lineage=STEP, base=folder
    )
    assert all(torch.allclose(a, tiny.weights(want)[name], atol=1e-6) for name, a in tiny.weights(whole).items())
    assert "adapter" in json.loads((whole / "lineage.json").read_text())["sources"][0]


@peft_tests
def test_an_adapter_is_kept_an_adapter(tmp_path):
    wrapped = [adapter(tiny.jittered("llama"), tmp_path / str(seed), seed) for seed in (1, 2)]
    out = edit(tmp_path / "1", [tmp_path / "2"], step, out=tmp_path / "out", lineage=STEP, adapters="keep")
    assert (out / "adapter_config.json").read_bytes() == (tmp_path / "1" / "adapter_config.json").read_bytes()
    assert names(wrapped[0]) == names(tmp_path / "1")
    edit(wrapped[0], wrapped[1:], step, lineage=STEP)
    wrapped[0].save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter_model.safetensors").read_bytes() == (
        out / "adapter_model.safetensors"
    ).read_bytes()


@peft_tests
def test_adapters_that_do_not_fit(tmp_path):
    adapter(tiny.jittered("llama"), tmp_path / "lora", 1)
    folder = tiny.save(tiny.jittered("gpt2"), tmp_path / "gpt2")
    with pytest.raises(InputError, match="another base"):
        edit_folder(folder, [tmp_path / "lora"], step, tmp_path / "out", lineage=STEP, base=folder)
    with pytest.raises(InputError, match="Say where the base is"):
        edit_folder(folder, [tmp_path / "lora"], step, tmp_path / "out", lineage=STEP)
    adapter(tiny.jittered("llama"), tmp_path / "dora", 1, use_dora=True)
    base = tiny.save(tiny.jittered("llama"), tmp_path / "base")
    with pytest.raises(InputError, match="no plain LoRA"):
        edit_folder(base, [tmp_path / "dora"], step, tmp_path / "out", lineage=STEP, base=base)
    inside = tiny.jittered("llama")
    adapter(inside, tmp_path / "again", 1)
    with pytest.raises(InputError, match="merge_and_unload"):
        edit_model(inside, [tiny.jittered("llama")], step)


# --- bad input ------------------------------------------------------------------------------------------------------------
def left_behind(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".") or path.name == "out"]


def refused(base, tuned, out, match, error=InputError, rule=step, **options):
    with pytest.raises(error, match=match):
        edit_folder(base, [tuned], rule, out, lineage=STEP, **options)
    assert not left_behind(out.parent)


def test_damaged_checkpoints(pair, tmp_path):
    def broken(name):
        return shutil.copytree(pair[1], tmp_path / name)

    one = broken("cut")
    shard = sorted(one.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    refused(pair[0], one, tmp_path / "out", f"{shard.name} is cut off.*its header promises")
    shard.write_bytes(b"\xff" * 4)
    refused(pair[0], one, tmp_path / "out", "not a safetensors file")
    shard.write_bytes(b"\x08\0\0\0\0\0\0\0notjson!")
    refused(pair[0], one, tmp_path / "out", "header cannot be read")
    shard.unlink()
    refused(pair[0], one, tmp_path / "out", f"no file .*{shard.name}")
    two = broken("no index")
    (two / "model.safetensors.index.json").unlink()
    refused(pair[0], two, tmp_path / "out", "shards but no model.safetensors.index.json")
    three = broken("wrong index")
    index = json.loads((three / "model.safetensors.index.json").read_text())
    index["weight_map"]["nope"] = sorted(index["weight_map"].values())[0]
    (three / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(pair[0], three, tmp_path / "out", "places nope in")
    four = broken("quantised")
    config = json.loads((four / "config.json").read_text())
    (four / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    refused(pair[0], four, tmp_path / "out", "quantised.*unquantised")
    refused(pair[0], tmp_path / "nowhere", tmp_path / "out", "there is no folder")
    (tmp_path / "empty").mkdir()
    refused(pair[0], tmp_path / "empty", tmp_path / "out", "holds no safetensors")
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"")
    refused(pair[0], tmp_path / "empty", tmp_path / "out", "save_pretrained it first")


def test_models_of_another_family(pair, tmp_path):
    other = tiny.save(tiny.jittered("gpt2"), tmp_path / "gpt2")
    refused(
        pair[0],
        other,
        tmp_path / "out",
        r"only in base \(19\): model.layers.0.*only in gpt2 \(27\): transformer.*a llama and a gpt2",
    )
    bias = tiny.save(tiny.jittered("qwen2"), tmp_path / "qwen2")
    refused(bias, pair[0], tmp_path / "out", r"only in qwen2 \(6\): model.layers.0.self_attn.k_proj.bias")
    out = edit_folder(bias, [pair[0]], step, tmp_path / "allowed", lineage=STEP, missing="copy")
    assert len(json.loads((out / "lineage.json").read_text())["notes"]["missing"]["base"]["copied from the model"]) == 6
    wide = tiny.config("llama")
    wide.intermediate_size = 64
    import transformers

    wider = tiny.save(transformers.LlamaForCausalLM(wide), tmp_path / "wider")
    refused(pair[0], wider, tmp_path / "out", r"mlp.*: base \(32, 48\), wider \(32, 64\).*different sizes")


def test_numbers_that_are_not_finite(pair, tmp_path):
    broken = tiny.near(tiny.jittered("llama"), 1)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 4:6] = torch.tensor([float("nan"), float("inf")])
    folder = tiny.save(broken, tmp_path / "broken")
    refused(pair[0], folder, tmp_path / "out", r"broken: model.layers.1.mlp.up_proj.weight has 2 entries of 1536")
    model = tiny.jittered("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=r"up_proj\.weight has 2 entries"):
        edit_model(model, [broken], step)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    half = tiny.save(tiny.jittered("llama", dtype=torch.float16), tmp_path / "half")
    refused(half, half, tmp_path / "out", "too large for float16", rule=lambda part, tensors: tensors[0] * 1e8)


def test_logits_that_are_not_finite(tmp_path):
    model = tiny.jittered("llama")
    folder = tiny.save(model, tmp_path / "a")

    def huge(part, tensors):
        return tensors[0] * (1e30 if part.name in ("model.norm.weight", "lm_head.weight") else 1)

    refused(folder, folder, tmp_path / "out", "logits that are not finite", rule=huge)
    out = edit_folder(folder, [], huge, tmp_path / "b", lineage=STEP, check=False)
    assert json.loads((out / "lineage.json").read_text())["logits"] == "not asked for"


def test_a_used_folder_is_not_overwritten(pair, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert edit_folder(pair[0], [pair[1]], step, out, lineage=STEP) == out
    before = tiny.file_bytes(out)
    with pytest.raises(InputError, match="not empty"):
        edit_folder(pair[0], [pair[1]], step, out, lineage=STEP)
    assert tiny.file_bytes(out) == before


def test_a_full_disk_leaves_nothing(pair, tmp_path, monkeypatch):
    real, calls = os.pwrite, []

    def full(file, data, offset):
        calls.append(len(data))
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    refused(*pair, tmp_path / "out", "the disk is full", RunError)


def test_too_little_room_is_seen_beforehand(pair, tmp_path, monkeypatch):
    from davylamp.models import vectors_io

    class Little:
        f_bavail, f_frsize = 1, 4096

    monkeypatch.setattr(vectors_io.os, "statvfs", lambda path: Little)
    refused(*pair, tmp_path / "out", "Nothing was written", RunError)


def test_ctrl_c_and_failing_rules_leave_nothing(pair, tmp_path):
    def stops(part, tensors):
        if "layers.1" in part.name:
            raise KeyboardInterrupt("stop here")
        return tensors[0]

    refused(*pair, tmp_path / "out", "stop here", KeyboardInterrupt, rule=stops)
    refused(*pair, tmp_path / "out", "gave .* expected|rule gave", rule=lambda part, tensors: tensors[0][:1])
    refused(*pair, tmp_path / "out", "division", ZeroDivisionError, rule=lambda part, tensors: 1 / 0)
    assert edit_folder(*[pair[0], [pair[1]]], step, tmp_path / "out", lineage=STEP).is_dir()


def test_a_killed_run_goes_on_from_its_finished_shards(pair, tmp_path, monkeypatch):
    base, tuned = pair
    want = tiny.file_bytes(edit_folder(base, [tuned], step, tmp_path / "want", lineage=STEP))
    seen = []

    def dies(part, tensors):
        if len(seen) >= 12:
            raise KeyboardInterrupt
        seen.append(part.name)
        return step(part, tensors)

    with monkeypatch.context() as patched:  # a killed process cleans nothing up
        patched.setattr(vectors_out.Staging, "_remove", lambda self: os.close(self._lock))
        with pytest.raises(KeyboardInterrupt):
            edit_folder(base, [tuned], dies, tmp_path / "out", lineage=STEP, threads=1)
    finished = [path.name for path in (tmp_path / ".out.part").glob("*.safetensors")]
    assert finished

    def counted(part, tensors):
        seen.append(part.name)
        return step(part, tensors)

    seen.clear()
    out = edit_folder(base, [tuned], counted, tmp_path / "out", lineage=STEP)
    assert tiny.file_bytes(out) == want and 0 < len(seen) < len(names(base))
    # Another edit of the same name starts over.
    with monkeypatch.context() as patched:
        patched.setattr(vectors_out.Staging, "_remove", lambda self: os.close(self._lock))
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            edit_folder(base, [tuned], dies, tmp_path / "again", lineage=STEP, threads=1)
    seen.clear()
    edit_folder(base, [tuned], counted, tmp_path / "again", lineage={"operation": "other", "options": {}})
    assert len(seen) == len(names(base))


def test_one_writer_at_a_time(pair, tmp_path):
    def inner(part, tensors):
        with pytest.raises(RunError, match="another process"):
            edit_folder(pair[0], [pair[1]], step, tmp_path / "out", lineage=STEP)
        return tensors[0]

    edit_folder(pair[0], [pair[1]], inner, tmp_path / "out", lineage=STEP, threads=1)


def test_forms_are_not_mixed(pair, tmp_path):
    model = tiny.jittered("llama")
    with pytest.raises(InputError, match="needs out"):
        edit(pair[0], [pair[1]], step, lineage=STEP)
    with pytest.raises(InputError, match="one sort"):
        edit(model, [pair[1]], step, lineage=STEP)
    with pytest.raises(InputError, match="in place"):
        edit(model, [model], step, out=tmp_path / "out", lineage=STEP)


def test_differing_configurations_are_noted(pair, tmp_path):
    other = shutil.copytree(pair[1], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    out = edit_folder(pair[0], [other], step, tmp_path / "out", lineage=STEP)
    noted = json.loads((out / "lineage.json").read_text())["notes"]["configurations differ"]
    assert noted == {"other": {"rms_norm_eps": [1e-06, 0.5]}}


# --- order statistics -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.8, 1.0])
def test_thresholds_are_exact(share, monkeypatch):
    rng = torch.Generator().manual_seed(0)
    layer = torch.nn.Module()
    for number, size in enumerate((3000, 70_000, 11)):
        layer.register_parameter(f"w{number}", torch.nn.Parameter(torch.randn(size, generator=rng) * 10.0**number))
    layer.w1.data[:30_000] = 0.0  # many equal entries
    layer.config = {}
    every = np.sort(np.concatenate([p.detach().abs().numpy() for p in layer.parameters()]))
    rank = max(1, int(share * every.size))
    plan = vectors.make_plan(layer, [], only=lambda name: True)
    want = [float(every[rank - 1]), float(every[rank - 1]) * 2]

    def score(part, tensors):
        return [tensors[0].abs(), tensors[0].abs() * 2]

    assert vectors_select.kth_smallest(plan, score, rank) == want
    monkeypatch.setattr(vectors_select, "ALL_AT_ONCE", 0)
    for blocks in (1 << 18, 1000):
        monkeypatch.setattr(vectors_select, "BLOCK", blocks)
        assert vectors_select.kth_smallest(plan, score, rank) == want
    with pytest.raises(InputError, match="rank"):
        vectors_select.kth_smallest(plan, score, every.size + 1)
    layer.w0.data[5] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        vectors_select.kth_smallest(plan, score, rank)


def test_gathered_experts_are_written_back(tmp_path):
    model = tiny.jittered("mixtral")
    source = vectors_sources.Model(model)
    name = "model.layers.0.block_sparse_moe.experts.1.w3.weight"
    source.write(name, torch.full(source.tensors[name].shape, 7.0))
    assert (tiny.weights(tiny.save(model, tmp_path / "a"))[name] == 7.0).all()
    assert int((model.state_dict()["model.layers.0.mlp.experts.gate_up_proj"] == 7.0).sum()) == 48 * 32
