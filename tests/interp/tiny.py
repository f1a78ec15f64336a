"""Tiny random models of every architecture that system 27 names, made on the spot; weights spread enough that attention is not flat."""

import torch
import transformers

SMALL = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
SMALL |= {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**SMALL, "num_key_value_heads": 2}


def _llava():
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    return transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**GROUPED), image_token_index=49
    )


CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "llama_gqa": lambda: transformers.LlamaConfig(**GROUPED),
    "wide": lambda: transformers.LlamaConfig(
        **{**GROUPED, "vocab_size": 64}
    ),  # reads the words of tests/models/tiny.py
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=5),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(
        **GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=5, attn_logit_softcapping=5.0
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=32),
    "phi3": lambda: transformers.Phi3Config(**GROUPED),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
    "mixtral": lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "llava": _llava,
}
KV_HEADS = {"llama": 4, "gpt_neox": 4, "gpt2": 4}


def model(name, seed=0, attention=None, spread=8.0):
    """A model in eval mode. attention: eager or sdpa.  spread: what weights are multiplied by, so that heads do something."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = CONFIGS[name]()
        kind = transformers.AutoModelForImageTextToText if name == "llava" else transformers.AutoModelForCausalLM
        made = kind.from_config(config, **({"attn_implementation": attention} if attention else {})).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(spread)
    return made


def prompts(n, lengths=(5, 9), seed=0, shared=0):
    """n prompts of random tokens; the first `shared` tokens are the same in all."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.randint(3, 49, (shared,), generator=generator).tolist()
    out = []
    for i in range(n):
        length = lengths[0] + i % (lengths[1] - lengths[0] + 1)
        out.append(head + torch.randint(3, 49, (length - shared,), generator=generator).tolist())
    return out
