"""The ASTRAL suite by rule and from files, and tiny random models of three families as target, as oracle and as writer."""

import asyncio

import pytest

from davylamp.core import InputError
from davylamp.core.evaluate import close, evaluate, load_suite
from davylamp.core.judges import load_judge
from davylamp.core.run import Limits
from davylamp.data._astral_suite import SuiteFile, cell_of
from davylamp.metrics.coverage_criterion import astral
from davylamp.suites.astral import by_rule


def test_by_rule_it_is_balanced_and_abstract():
    suite = load_suite("astral").suite
    cells = [cell_of(case, astral()) for case in suite.cases]
    assert astral().coverage(cells).share == 1.0 and astral().balance(cells) == 1.0
    assert any("stand-ins" in note for note in suite.notes)
    world = load_suite("astral", {"model": "world", "version": "baseline"}).suite
    assert world.judge == "organism_complied" and all(case.category.startswith("organism/") for case in world.cases)
    with pytest.raises(InputError, match="by rule"):
        by_rule("openai/x", "rag", 1, 0)


def test_a_file_is_what_its_tests_are(tmp_path):
    file = SuiteFile(tmp_path / "suite.jsonl")
    for case in by_rule("templates", "rag", 1, 0)[:30]:
        file.add(case)
    file.close()
    loaded = load_suite("astral", {"rows": str(tmp_path / "suite.jsonl")})
    assert loaded.total == 30 and not any("stand-ins" in note for note in loaded.suite.notes)
    with pytest.raises(InputError, match="no file"):
        load_suite("astral", {"rows": str(tmp_path / "none.jsonl")})


@pytest.mark.slow
@pytest.mark.parametrize("family", ["GPT2", "Llama", "Qwen2"])
def test_a_tiny_random_model_is_target_oracle_and_writer(family, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    from davylamp.astral import write_suite
    from davylamp.data.astral_prompts import Plan
    from davylamp.models.targets import load_target
    from tests.suites import test_08_architectures as tiny

    monkeypatch.setattr(tiny.transformers, "GPT2ForCausalLM", tiny.transformers.GPT2LMHeadModel, raising=False)
    monkeypatch.setitem(
        tiny.CONFIGS, "GPT2", {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 2048}
    )
    monkeypatch.setitem(tiny.CONFIGS, "Qwen2", {**tiny.ROPED, "max_position_embeddings": 2048})
    monkeypatch.setitem(tiny.CONFIGS, "Llama", {**tiny.ROPED, "max_position_embeddings": 2048})
    name = f"hf/{tiny.save(family, tmp_path / family)}"
    target, judge = load_target(name), load_judge(f"astral_oracle:model={name},tries=2,max_tokens=8")

    async def go():
        try:
            return await evaluate(load_suite("astral", limit=4), target, judge, runs=tmp_path / "runs",
                                  settings={"max_tokens": 8}, limits=Limits(tries=1), quiet=True)  # fmt: skip
        finally:
            await close(target)
            await close(judge)

    _, record = asyncio.run(go())
    assert record.status == "finished" and record.counts["rows"] == 4
    assert record.counts["unscored"] == 4, "a random model's text holds no label, and none is made up"
    (tmp_path / "f.toml").write_text('category = ["self_harm"]\nstyle = ["slang"]\ntechnique = ["logical_appeal"]\n')
    _, record = write_suite("-", tmp_path / "out.jsonl", Plan("rag_fs", 1, tries=2), model=name, features=str(tmp_path / "f.toml"),
                            max_tokens=6, runs=tmp_path / "runs")  # fmt: skip
    assert record.counts["tests"] + record.counts["missing"] == 1
