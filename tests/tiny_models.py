"""Real models of every family with tiny random weights, and the tokenizers and folders that weight-space tests need."""

import contextlib
import json

import torch
import transformers
from safetensors.torch import load_file
from transformers.utils import logging

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
T = transformers


def _llava():
    vision = T.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    return T.LlavaForConditionalGeneration(
        T.LlavaConfig(vision_config=vision, text_config=T.LlamaConfig(**SIZES), image_token_index=47)
    )


def _qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8}
    config = T.Qwen2VLConfig(
        text_config={**SIZES, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=45,
        video_token_id=46,
        vision_start_token_id=44,
    )
    return T.Qwen2VLForConditionalGeneration(config)


MOE = {"num_experts_per_tok": 2}
MAKE = {
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**SIZES)),
    "llama_tied": lambda: T.LlamaForCausalLM(T.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2": lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**SIZES)),
    "qwen3": lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**SIZES, head_dim=8)),
    "mistral": lambda: T.MistralForCausalLM(T.MistralConfig(**SIZES)),
    "gemma2": lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**SIZES, head_dim=8)),
    "gpt2": lambda: T.GPT2LMHeadModel(
        T.GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=64, **TOKENS)
    ),
    "phi3": lambda: T.Phi3ForCausalLM(T.Phi3Config(**SIZES)),
    "qwen2_moe": lambda: T.Qwen2MoeForCausalLM(
        T.Qwen2MoeConfig(**SIZES, **MOE, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=24)
    ),
    "mixtral": lambda: T.MixtralForCausalLM(T.MixtralConfig(**SIZES, **MOE, num_local_experts=4)),
    "t5": lambda: T.T5ForConditionalGeneration(
        T.T5Config(vocab_size=48, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ),
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
}


def make(name, seed=0, dtype=torch.float32):
    """A model of the family with random weights (biases and norms too, so that no tensor is constant)."""
    with torch.random.fork_rng(devices=[]), contextlib.suppress(AttributeError):
        torch.manual_seed(seed)
        model = MAKE[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.to(dtype).eval()


def near(model, seed, size=0.01):
    """A copy a small random step away, as a fine-tune is."""
    import copy

    other = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_((torch.randn(parameter.shape) * size).to(parameter.dtype))
    return other


def save(model, folder, shard="50GB", tokens=None):
    """save_pretrained, quietly; with a word-level tokenizer of these tokens where they are given."""
    logging.disable_progress_bar()
    model.save_pretrained(folder, max_shard_size=shard)
    if tokens is not None:
        tokenizer(tokens).save_pretrained(folder)
    return folder


def load(folder):
    """The model of a folder in its stored dtype. Save and load once before comparing files: a model that was never
    loaded is saved in another order."""
    logging.disable_progress_bar()
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(T, architecture).from_pretrained(folder, dtype="auto").eval()


def tokenizer(tokens, template="{{ messages[0]['content'] }}"):
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    inner = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return T.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=tokens[0], chat_template=template)


def weights(folder):
    """{name: tensor} of all safetensors of a folder."""
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        out |= load_file(file)
    return out


def file_bytes(folder):
    """{file: bytes} of the weights and their index."""
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors*"))}
