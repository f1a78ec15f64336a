"""Tiny random models of the real architectures, made on the spot; their tokenizers, prompts and folders. The only such module of the tests.

Sizes and families stand in one table. `model` is as the library starts it; `spread` multiplies its weights, so that attention is not flat;
`jitter` moves every parameter, biases and norms too, so that no tensor is constant. Vision-language ones keep their language model's sizes.
"""

import contextlib
import copy
import json

import torch
import transformers as T
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.utils import logging

TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **TOKENS,
}
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
MOE = {"num_experts_per_tok": 2}
QWEN_MOE = {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
SOFT = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5}
QWEN_EYES = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8}
QWEN_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
# Family: the library's name of its configuration, and what it has beside the sizes.
FAMILIES = {
    "llama": ("Llama", {}),
    "llama_mha": ("Llama", {"num_key_value_heads": 4}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama4": ("Llama4Text", {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 256}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mixtral": ("Mixtral", {**MOE, "num_local_experts": 4}),
    "qwen2": ("Qwen2", {}),
    "qwen2_moe": ("Qwen2Moe", {**MOE, **QWEN_MOE}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma": ("Gemma", {"head_dim": 8, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2", SOFT),
    "gemma3": ("Gemma3Text", SOFT),
    "granite": ("Granite", {}),
    "phi3": ("Phi3", {}),
    "gpt_neox": ("GPTNeoX", {}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt2": ("GPT2", {}),
    "t5": ("T5", {"d_kv": 8, "decoder_start_token_id": 0}),
    "llava": ("Llava", {}),
    "qwen2_vl": ("Qwen2VL", {}),
}  # fmt: skip
OWN_NAMES = {
    "GPT2": {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    "T5": {
        "hidden_size": "d_model",
        "intermediate_size": "d_ff",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
    },
}
# What head scores and surgery are tested on; what weights are streamed of and trained.
WITH_HEADS = (
    "llama_mha", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt_neox", "gpt2", "mixtral", "llava",
)  # fmt: skip
TRAINED = ("llama", "qwen2", "gpt2", "gpt_neox", "gemma", "gemma2", "phi3", "mixtral", "t5", "llava")
STREAMED = (
    "llama", "llama_tied", "qwen2", "qwen3", "mistral", "gemma2", "gpt2", "phi3", "qwen2_moe", "mixtral", "t5", "llava", "qwen2_vl",
)  # fmt: skip
LACKS = {
    "GPT2": {"intermediate_size", "num_key_value_heads"},
    "T5": {"num_key_value_heads", "max_position_embeddings", "bos_token_id"},
    "GPTNeoX": {"num_key_value_heads"},
    "OPT": {"num_key_value_heads", "intermediate_size"},
}


def config(family, **more):
    """The configuration of a family; more: what differs from the table, by the names in SIZES."""
    kind, own = FAMILIES[family]
    sizes = {**SIZES, **own, **more}
    if kind == "Llava":
        text = T.LlamaConfig(**sizes)
        return T.LlavaConfig(vision_config=T.CLIPVisionConfig(**CLIP), text_config=text, image_token_index=47)
    if kind == "Qwen2VL":
        text = {**sizes, "rope_parameters": QWEN_ROPE}
        marks = {"image_token_id": 45, "video_token_id": 46, "vision_start_token_id": 44}
        return T.Qwen2VLConfig(text_config=text, vision_config=QWEN_EYES, **marks)
    names = OWN_NAMES.get(kind, {})
    sizes = {names.get(name, name): value for name, value in sizes.items() if name not in LACKS.get(kind, ())}
    return getattr(T, kind + "Config")(**sizes)


def model(family, seed=0, *, spread=1.0, jitter=0.0, attention=None, dtype=torch.float32, **more):
    """A model in eval mode with random weights. attention: eager or sdpa.  more: as of `config`."""
    made = config(family, **more)
    auto = T.AutoModelForCausalLM
    if family == "t5":
        auto = T.AutoModelForSeq2SeqLM
    elif family in ("llava", "qwen2_vl"):
        auto = T.AutoModelForImageTextToText
    with torch.random.fork_rng(devices=[]), contextlib.suppress(AttributeError):
        torch.manual_seed(seed)
        made = auto.from_config(made, **({"attn_implementation": attention} if attention else {}))
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(spread)
                if jitter:
                    parameter.add_(torch.randn_like(parameter) * jitter)
    return made.to(dtype).eval()


def jittered(family, seed=0, dtype=torch.float32, **more):
    """A model of which no tensor is constant."""
    return model(family, seed, jitter=0.02, dtype=dtype, **more)


def heads(family, seed=0, *, spread=8.0, **more):
    """A model of three layers whose heads do something."""
    cap = {"attn_logit_softcapping": 5.0} if family == "gemma2" else {}
    return model(family, seed, spread=spread, num_hidden_layers=3, **{**cap, **more})


def near(model, seed, size=0.01):
    """A copy a small random step away, as a fine-tune is."""
    other = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_((torch.randn(parameter.shape) * size).to(parameter.dtype))
    return other


def prompts(n, lengths=(5, 9), seed=0, shared=0):
    """n prompts of random tokens; the first `shared` tokens are the same in all."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.randint(3, 49, (shared,), generator=generator).tolist()
    out = []
    for i in range(n):
        length = lengths[0] + i % (lengths[1] - lengths[0] + 1)
        out.append(head + torch.randint(3, 49, (length - shared,), generator=generator).tolist())
    return out


# --- tokenizers: one token a word -------------------------------------------------------------------------------------------------------
WORDS = ("<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60)))
GUARD_WORDS = (  # noqa: SIM905  a list of forty strings is no easier to read
    "<pad> <s> </s> <unk> safe unsafe yes no Yes No User Agent hello bread weapon how to make a the is of and S1 S2 O3 , . : { } \" ' - "
    "[INST] [/INST] <|user|> <|assistant|> harm less ful"
).split()
CHAT = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' ' + m['content'] + ' ' }}{% if m['role'] == 'assistant' %}{{ '</s> ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s> assistant ' }}{% endif %}"
)
GUARD_CHAT = "{{ bos_token }}{% for m in messages %} {{ m['role'] }} : {{ m['content'] }}{% endfor %} assistant :"
BARE = "{{ messages[0]['content'] }}"


def tokenizer(template=CHAT, words=WORDS, *, marks=True, pad=True, punctuation=False):
    """marks: <s> and </s> are its special tokens.  punctuation: split off.  The unknown token is <unk>, or the first word."""
    unknown = "<unk>" if "<unk>" in words else words[0]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown))
    split = pre_tokenizers.WhitespaceSplit()
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.Punctuation()]) if punctuation else split
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>" if pad else None} if marks else {}
    made = T.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=unknown, **special)
    made.chat_template = template
    return made


def guard_tokenizer(template=GUARD_CHAT, words=(), pad=True):
    """With the words that guards answer in, and more."""
    made = tokenizer(template, tuple(dict.fromkeys([*GUARD_WORDS, *words])), pad=pad, punctuation=True)
    made.model_max_length = 10**6
    return made


# --- guards that answer in the words of `guard_tokenizer` -------------------------------------------------------------------------------
ROOMY = {"vocab_size": len(GUARD_WORDS), "max_position_embeddings": 2048}


def guard(family, seed=0, **more):
    """A random causal model that reads whole guard prompts."""
    wide = {"sliding_window": 2048} if "sliding_window" in FAMILIES[family][1] else {}
    return model(family, seed, **{**ROOMY, **wide, **more})


def rigged(family, words, seed=0, **more):
    """A random model whose first word is one of `words`; which of them depends on the prompt."""
    made = guard(family, seed, **more)
    head = torch.nn.Linear(SIZES["hidden_size"], made.config.vocab_size, bias=True)
    with torch.no_grad():
        head.weight.normal_(0, 0.3)
        head.bias.zero_()
        head.bias[[GUARD_WORDS.index(word) for word in words]] = 12.0
    made.lm_head = head
    return made.eval()


def classifier(family, labels, seed=0, **more):
    """A random sequence classifier with these labels."""
    torch.manual_seed(seed)
    names = dict(enumerate(labels))
    made = config(family, **{**ROOMY, **more})
    made.num_labels, made.id2label, made.label2id = len(labels), names, {label: i for i, label in names.items()}
    return T.AutoModelForSequenceClassification.from_config(made).eval()


# --- folders ----------------------------------------------------------------------------------------------------------------------------
def save(model, folder, shard="50GB", tokens=None):
    """save_pretrained, quietly; with a word-level tokenizer of these tokens where they are given."""
    logging.disable_progress_bar()
    model.save_pretrained(folder, max_shard_size=shard)
    if tokens is not None:
        tokenizer(BARE, tokens, marks=False).save_pretrained(folder)
    return folder


def load(folder):
    """The model of a folder in its stored dtype. Save and load once before comparing files: a model that was never
    loaded is saved in another order."""
    logging.disable_progress_bar()
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(T, architecture).from_pretrained(folder, dtype="auto").eval()


def weights(folder):
    """{name: tensor} of all safetensors of a folder."""
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        out |= load_file(file)
    return out


def file_bytes(folder):
    """{file: bytes} of the weights and their index."""
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors*"))}
