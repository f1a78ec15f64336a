"""The hf target on tiny random models of real architectures: batches change nothing, seeds are per row, what is wrong is said."""

import asyncio

import pytest

from davylamp.core.errors import InputError, TargetError, UnknownNameError
from davylamp.core.nouns import Message

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from davylamp.models.hf import generate_batch, load  # noqa: E402

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<think>", "</think>", *(f"w{i}" for i in range(58))]
TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
)
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, num_key_value_heads=2, initializer_range=0.3),
    "olmo2": lambda: transformers.Olmo2Config(**SMALL, num_key_value_heads=2, initializer_range=0.3),
    "mistral": lambda: transformers.MistralConfig(
        **SMALL, num_key_value_heads=2, initializer_range=0.3, sliding_window=None
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL, initializer_range=0.3),
    "gemma": lambda: transformers.GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=8, initializer_range=0.3),
}


def save(folder, config, template=TEMPLATE, half=False):
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    (model.half() if half else model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name, **options):
        if name not in made:
            template = NO_SYSTEM if name == "gemma" else TEMPLATE
            made[name] = save(tmp_path_factory.mktemp(name), CONFIGS[name](), template, **options)
        return made[name]

    return folder


@pytest.fixture
def llama(folders):
    return load(folders("llama"))


PROMPTS = [(Message("user", " ".join(f"w{(3 * i + j) % 58}" for j in range(1 + 5 * i % 13))),) for i in range(12)]


def ask(target, prompts, seeds=None, **settings):
    async def go():
        seeds_ = seeds or [0] * len(prompts)
        return await asyncio.gather(
            *(target(prompt, seed=seed, **settings) for prompt, seed in zip(prompts, seeds_, strict=True)),
            return_exceptions=True,
        )

    return asyncio.run(go())


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_batch_says_what_each_row_says_alone(folders, name):
    target = load(folders(name))
    together = ask(target, PROMPTS, max_tokens=8)
    alone = [generate_batch(target.model, target.tokenizer, [prompt], max_tokens=8)[0] for prompt in PROMPTS]
    assert together == alone
    assert len({reply.text for reply in together}) > 3  # a model that says one thing to all would show nothing


def test_the_reply_is_that_of_a_plain_generate(llama):
    """Reference: transformers itself, unpadded."""
    for prompt in PROMPTS[:4]:
        turns = [message.json() for message in prompt]
        text = llama.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = llama.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        made = llama.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        expected = llama.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        assert generate_batch(llama.model, llama.tokenizer, [prompt], max_tokens=6)[0].text == expected.strip()


def test_sampling_depends_on_the_rows_own_seed_and_nothing_else(llama):
    settings = {"max_tokens": 8, "temperature": 1.0, "top_p": 0.95}
    together = ask(llama, PROMPTS, seeds=range(12), **settings)
    backwards = ask(llama, PROMPTS[::-1], seeds=range(12)[::-1], **settings)[::-1]
    alone = [
        generate_batch(llama.model, llama.tokenizer, [prompt], seeds=[seed], **settings)[0]
        for seed, prompt in enumerate(PROMPTS)
    ]
    assert together == backwards == alone
    assert together != ask(llama, PROMPTS, seeds=range(100, 112), **settings)
    draws = {reply.text for reply in ask(llama, PROMPTS[:1] * 12, seeds=range(12), **settings)}
    assert len(draws) > 6


def test_drawn_tokens_have_the_models_probabilities(llama):
    """Reference: the softmax at the temperature, by a chi-square test on 2,000 first tokens."""
    from scipy.stats import chisquare

    n, prompt = 2000, PROMPTS[3]
    replies = generate_batch(
        llama.model, llama.tokenizer, [prompt] * n, seeds=range(n), width=500, max_tokens=1, temperature=2.0, top_k=6
    )
    text = llama.tokenizer.apply_chat_template([m.json() for m in prompt], tokenize=False, add_generation_prompt=True)
    with torch.no_grad():
        logits = llama.model(
            **llama.tokenizer(text, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)
        ).logits
    top = (logits[0, -1] / 2.0).topk(6)
    names = [llama.tokenizer.decode([token], skip_special_tokens=True) for token in top.indices.tolist()]
    counts = [sum(reply.text == name for reply in replies) for name in names]
    assert sum(counts) == n
    assert chisquare(counts, (top.values.softmax(-1) * n).numpy(), sum_check=False).pvalue > 0.001


def test_finish_and_tokens(llama):
    replies = ask(llama, PROMPTS, max_tokens=5)
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        assert reply.tokens[0] == 3 + len(prompt[0].text.split())
        assert reply.finish in ("stop", "length") and (
            reply.tokens[1] == 5 if reply.finish == "length" else reply.tokens[1] <= 5
        )


def test_stop_texts_end_a_reply_and_are_not_in_it(llama):
    replies = ask(llama, PROMPTS, max_tokens=8)
    at = max(range(len(PROMPTS)), key=lambda i: len(set(replies[i].text.split())))
    whole = replies[at].text.split()
    cut = ask(llama, PROMPTS[at : at + 1], max_tokens=8, stop=[whole[2]])[0]
    assert cut.finish == "stop" and cut.text.split() == whole[: whole.index(whole[2])]


def test_a_system_turn_goes_into_the_users_where_the_template_takes_none(folders):
    gemma, llama = load(folders("gemma")), load(folders("llama"))
    system, user = Message("system", "w1 w2"), Message("user", "w3")
    merged = ask(gemma, [(Message("user", "w1 w2\n\nw3"),)], max_tokens=4)[0]
    assert ask(gemma, [(system, user)], max_tokens=4)[0] == merged
    assert ask(llama, [(system, user)], max_tokens=4)[0].tokens[0] > merged.tokens[0]
    assert isinstance(ask(gemma, [(system,)], max_tokens=4)[0], TargetError)


def test_a_prompt_too_long_fails_alone_and_room_caps_the_reply(llama):
    long = (Message("user", " ".join(["w1"] * 70)),)
    near = (Message("user", " ".join(["w1"] * 58)),)  # 61 of 64 tokens
    bad, good, short = ask(llama, [long, PROMPTS[0], near], max_tokens=8)
    assert isinstance(bad, TargetError) and "73 tokens; the model takes 64" in str(bad) and not bad.retry
    assert good == ask(llama, PROMPTS[:1], max_tokens=8)[0]
    assert short.tokens[0] + short.tokens[1] <= 64


def test_half_precision_is_widened_on_a_cpu(tmp_path):
    target = load(save(tmp_path, CONFIGS["llama"](), half=True))
    if not torch.cuda.is_available():
        assert target.model.dtype == torch.float32 and target.identity["dtype"] == "float32"


def test_identity_changes_with_the_weights_and_only_then(tmp_path):
    config = CONFIGS["llama"]()
    first = save(tmp_path / "a", config)
    assert load(first).identity["sha256"] == load(first).identity["sha256"]
    model = transformers.AutoModelForCausalLM.from_pretrained(first)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    before = load(first).identity["sha256"]
    model.save_pretrained(first)
    assert load(first).identity["sha256"] != before


def test_a_thought_that_the_template_opens_is_split_off(tmp_path):
    target = load(save(tmp_path, CONFIGS["llama"](), TEMPLATE.replace("{{ '<s>' }}", "{{ '<s> <think>' }}")))
    reply = ask(target, PROMPTS[:1], max_tokens=4)[0]
    assert reply.text == "" and reply.reasoning  # never closed: all of it is thought


def test_a_model_without_a_chat_template_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match=r"no chat template.*chat_template\.jinja"):
        load(save(tmp_path, CONFIGS["llama"](), template=None))


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"max_token": 3}, UnknownNameError, "max_tokens"),
        ({"max_tokens": 0}, InputError, "max_tokens must be a number of 1 or more"),
        ({"temperature": -1}, InputError, "temperature"),
        ({"top_p": 0}, InputError, r"top_p must be in \(0, 1\]"),
        ({"stop": 3}, InputError, "stop must be a text"),
    ],
)
def test_bad_settings(llama, settings, error, match):
    with pytest.raises(error, match=match):
        raise ask(llama, PROMPTS[:1], **settings)[0]


def test_pictures_are_refused(llama):
    found = ask(llama, [(Message("user", "w1", media=("a.png",)),)])[0]
    assert isinstance(found, InputError) and "text only" in str(found)


@pytest.mark.parametrize(
    ("path", "match"),
    [("no/such/folder", "no folder"), ("./nothing", "no folder"), ("org/model", "could not be loaded")],
)
def test_a_model_that_is_not_there(path, match):
    with pytest.raises(InputError, match=match):
        load(path)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="could not be loaded"):
        load(str(tmp_path))
