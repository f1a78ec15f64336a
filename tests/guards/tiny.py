"""Tiny random models of real architectures with a word-level tokenizer, made on the spot; a rigged one says one of two words."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = (  # noqa: SIM905  a list of forty strings is no easier to read
    "<pad> <s> </s> <unk> safe unsafe yes no Yes No User Agent hello bread weapon how to make a the is of and S1 S2 O3 , . : { } \" ' - "
    "[INST] [/INST] <|user|> <|assistant|> harm less ful"
).split()
TEMPLATE = "{{ bos_token }}{% for m in messages %} {{ m['role'] }} : {{ m['content'] }}{% endfor %} assistant :"
SIZE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tokenizer(template=TEMPLATE, words=(), pad=True):
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*WORDS, *words]))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>" if pad else None,
        model_max_length=10**6,
    )
    made.chat_template = template
    return made


def config(name, **more):
    import transformers

    kind = getattr(transformers, name + "Config")
    options = {
        "vocab_size": len(WORDS),
        "max_position_embeddings": 2048,
        **SIZE,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if name.startswith("Gemma"):
        options |= {"head_dim": 8}
    if name == "Llama4Text":
        options |= {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 256}
    return kind(**{**options, **more})


def causal(name, seed=0, **more):
    import transformers

    torch.manual_seed(seed)
    kind = getattr(transformers, ("Llama4" if name == "Llama4Text" else name) + "ForCausalLM")
    return kind(config(name, **more)).eval()


def rigged(name, words, seed=0, **more):
    """A random model whose first word is one of `words`; which of them depends on the prompt."""
    model = causal(name, seed, **more)
    ids = [WORDS.index(word) for word in words]
    head = torch.nn.Linear(SIZE["hidden_size"], model.config.vocab_size, bias=True)
    with torch.no_grad():
        head.weight.normal_(0, 0.3)
        head.bias.zero_()
        head.bias[ids] = 12.0
    model.lm_head = head
    return model.eval()


def classifier(name, labels, seed=0, **more):
    import transformers

    torch.manual_seed(seed)
    names = dict(enumerate(labels))
    made = config(name, num_labels=len(labels), id2label=names, label2id={v: k for k, v in names.items()}, **more)
    return getattr(transformers, name + "ForSequenceClassification")(made).eval()
