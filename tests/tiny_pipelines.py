"""Random text-to-image pipelines of every family, as diffusers builds them, small enough for a test: 16 x 16 pixels."""

from itertools import pairwise

import torch

from davylamp.models.painter import quiet

LENGTH = 24  # tokens of the CLIP encoders, both ends included
FAMILIES = ("sd", "sdxl", "pixart", "sd3", "flux")
WORDS = ["a", "red", "circle", "square", "on", "black", "dot", "big"]
MORE = (
    "the of in at road bread river music summer winter house coat letter disk ball round box tile cross plus green blue"
)


def clip_tokenizer():
    """A CLIPTokenizer in which each of these words is one token; other text falls into letters and parts of words."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    table, merges = [*letters, *(letter + "</w>" for letter in letters)], []
    for word in sorted({*WORDS, *MORE.split()}):
        parts = joined(word, merges)
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = joined(word, merges)
    table += [a + b for a, b in merges] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(dict.fromkeys(table))}, merges=merges, model_max_length=LENGTH
    )


def joined(word, merges):
    """Byte-pair encoding of one word: the pair with the earliest merge is joined, again and again."""
    parts, rank = [*word[:-1], word[-1] + "</w>"], {pair: i for i, pair in enumerate(merges)}
    while True:
        known = [(rank[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in rank]
        if not known:
            return parts
        _, i = min(known)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def t5_tokenizer():
    """Words as tokens, an end mark behind them, padded with 0: T5's ways."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )


def t5(tok, width=16):
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=len(tok), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).eval()


def clip_text(tok, *, projected=False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tok), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, projection_dim=16,
        max_position_embeddings=LENGTH, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def vae(channels=4, **more):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, sample_size=16, norm_num_groups=4, layers_per_block=1,
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **more,
    ).eval()  # fmt: skip


def unet(width, **more):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, cross_attention_dim=width, norm_num_groups=4, layers_per_block=1,
        block_out_channels=(8, 16), attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **more,
    ).eval()  # fmt: skip


def pipeline(family, seed=0):
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        import diffusers

        tok = clip_tokenizer()
        parts = {"vae": vae(), "scheduler": diffusers.DPMSolverMultistepScheduler()}
        if family == "sd":
            pipe = diffusers.StableDiffusionPipeline(
                **parts, text_encoder=clip_text(tok), tokenizer=tok, unet=unet(16), safety_checker=None, feature_extractor=None,
                requires_safety_checker=False,
            )  # fmt: skip
        elif family == "sdxl":
            second = clip_tokenizer()
            second.pad_token = "a"  # as SDXL's second tokenizer, which pads with another token than the first
            more = {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 16 + 6 * 8,
            }
            pipe = diffusers.StableDiffusionXLPipeline(
                **parts, text_encoder=clip_text(tok), text_encoder_2=clip_text(tok, projected=True), tokenizer=tok, tokenizer_2=second,
                unet=unet(32, **more), add_watermarker=False,
            )  # fmt: skip
        elif family == "pixart":
            words = t5_tokenizer()
            core = diffusers.PixArtTransformer2DModel(
                sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=16, in_channels=4,
                cross_attention_dim=16, out_channels=8, norm_type="ada_norm_single",
            ).eval()  # fmt: skip
            pipe = diffusers.PixArtAlphaPipeline(**parts, text_encoder=t5(words), tokenizer=words, transformer=core)
        elif family == "sd3":
            words = t5_tokenizer()
            core = diffusers.SD3Transformer2DModel(
                sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
                joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
            ).eval()  # fmt: skip
            pipe = diffusers.StableDiffusion3Pipeline(
                vae=vae(shift_factor=0.06), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), transformer=core,
                text_encoder=clip_text(tok, projected=True), tokenizer=tok, text_encoder_2=clip_text(tok, projected=True),
                tokenizer_2=clip_tokenizer(), text_encoder_3=t5(words, 32), tokenizer_3=words,
            )  # fmt: skip
        else:
            words = t5_tokenizer()
            core = diffusers.FluxTransformer2DModel(
                patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
            ).eval()  # fmt: skip
            pipe = diffusers.FluxPipeline(
                vae=vae(channels=1, shift_factor=0.06), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), transformer=core,
                text_encoder=clip_text(tok), tokenizer=tok, text_encoder_2=t5(words), tokenizer_2=words,
            )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe
