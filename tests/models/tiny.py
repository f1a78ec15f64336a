"""Tiny random models of real architectures with a word-level tokenizer, made on the spot."""

import torch
import transformers

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]
TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' ' + m['content'] + ' ' }}{% if m['role'] == 'assistant' %}{{ '</s> ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s> assistant ' }}{% endif %}"
)
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**SMALL, "num_key_value_heads": 2}


def _llava():
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    return transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**GROUPED), image_token_index=63
    )


CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL),
    "gemma": lambda: transformers.GemmaConfig(**{**GROUPED, "num_key_value_heads": 1}, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=32),
    "phi3": lambda: transformers.Phi3Config(**GROUPED),
    "mixtral": lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "t5": lambda: transformers.T5Config(
        vocab_size=64, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2
    ),
    "llava": _llava,
}  # fmt: skip
CLASSES = {"t5": "T5ForConditionalGeneration", "llava": "LlavaForConditionalGeneration"}


def tokenizer(template=TEMPLATE):
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = template
    return fast


def model(name, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = CONFIGS[name]()
        if name in CLASSES:
            return getattr(transformers, CLASSES[name])(config).eval()
        return transformers.AutoModelForCausalLM.from_config(config).eval()
