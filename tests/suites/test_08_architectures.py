"""Six architecture families, tiny and random, asked the stand-in suite; one of them has a chat template without a system role."""

import asyncio
import json

import pytest

from davylamp.core.evaluate import evaluate, load_suite
from davylamp.core.judges import load_judge
from davylamp.core.run import Limits
from tests import sst

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("davylamp.models.hf")

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ROPED = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 512}
CONFIGS = {
    "Llama": ROPED,
    "Mistral": ROPED,
    "GPTNeoX": {**SMALL, "intermediate_size": 64, "max_position_embeddings": 512},
    "Falcon": {**SMALL, "new_decoder_architecture": False, "multi_query": True, "alibi": False},
    "Mpt": {"vocab_size": 96, "d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 512},
    "Gemma": {**ROPED, "head_dim": 16},
}
TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
)


def save(family, folder):
    """A random model of the family with a word-level tokenizer and a chat template, as a local checkpoint."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [
        "<pad>",
        "<unk>",
        "<s>",
        "</s>",
        "[user]",
        "[system]",
        "[assistant]",
        "How",
        "do",
        "I",
        "fold",
        "paper",
        "bird",
        "number",
        "?",
    ]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = NO_SYSTEM if family == "Gemma" else TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**CONFIGS[family], pad_token_id=0, bos_token_id=2, eos_token_id=3)
    getattr(transformers, f"{family}ForCausalLM")(config).eval().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", CONFIGS)
def test_a_tiny_random_model_of_the_family_is_asked(family, tmp_path):
    folder = save(family, tmp_path / family)
    system_as = "user" if family == "Gemma" else "system"
    options = {"rows": sst.write(tmp_path / "mine.csv", sst.rows()), "system_as": system_as}
    loaded, judge = load_suite("simple_safety_tests", options, limit=6), load_judge(sst.write_guard(tmp_path))
    target = hf.load(str(folder))

    async def go():
        try:
            return await evaluate(
                loaded,
                target,
                judge,
                runs=tmp_path / "runs",
                settings={"max_tokens": 8},
                limits=Limits(tries=1),
                quiet=True,
            )
        finally:
            closing = getattr(target, "close", None)
            if closing:
                await closing()

    run, record = asyncio.run(go())
    assert record.status == "finished" and record.counts["rows"] == 6 and record.counts["failed"] == 0
    rows = [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]
    assert all(row["reply"][-1]["role"] == "assistant" for row in rows)
    assert any(e.name == "system_prompt_effect" and e.n + e.unscored == 3 for e in record.estimates)
