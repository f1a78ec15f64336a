"""Ships over all heads x 100 prompts: the engine beside a naive hook loop and, where installed, TransformerLens. One thread.

python benchmarks/heads.py [--json] [--prompts 100] [--only SIZE] [--install-peers]

naive: one prompt at a time, one head at a time, plain torch hooks on the library's model, as the reference does; of the large model
25 of the prompts, and its time in proportion.
transformer_lens: the same ablations with all prompts in one batch, on a model of its own with equal weights.
prescreened: an approximate pass on 32 prompts picks 8 heads, which are scored exactly on all; their top 5 must be those of exact scores.
The arithmetic limit is the time that the matrix products alone would take at the speed this core reaches on one such product, each whole:
that the engine takes an ablated head's part through the norm and the MLP behind it in a head's size is not in it.
from_float64: the greatest difference from the same scores of the model in float64.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
import transformers

from davylamp.interp._scores import kl, prescreen, ranked, score_heads

SIZES = {"4x8x128": (4, 8, 128), "8x8x256": (8, 8, 256)}
TOKENS, VOCABULARY, EPSILON, EXACT = 24, 787, 1e-5, 8  # the vocabulary of the organisms
PEERS_AT = Path(__file__).parent.parent / "build" / "peers" / "transformer_lens"
PEERS = (
    "transformer-lens",
    "jaxtyping",
    "better-abc",
    "fancy-einsum",
    "einops",
    "beartype",
    "typeguard",
    "rich",
    "wadler-lindig",
)


def build(layers, heads, width):
    """The embedded organism where it has this shape, else random weights with heads of unlike size, as trained ones have."""
    if (layers, heads, width) == (4, 8, 128):
        from davylamp.models import organism

        return organism.load("aligned")[0]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=int(2.75 * width),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=64,
        initializer_range=0.06,  # the usual 0.02 is for widths of thousands: heads would hardly matter
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.view(width, heads, -1).mul_(torch.randn(heads, 1).exp())
    return model


def scaled(head, size):
    def hook(module, args, output):
        output = output.clone()
        output[..., head * size : head * size + size] *= EPSILON
        return output

    return hook


def naive(model, prompts, rows):
    """(prompts, layers, heads) Ships; `rows` prompts in one batch."""
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    out = np.zeros((len(prompts), config.num_hidden_layers, config.num_attention_heads))
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        for at in range(0, len(prompts), rows):
            part = ids[at : at + rows]
            plain = model(input_ids=part, use_cache=False, logits_to_keep=1).logits[:, -1]
            for layer in range(config.num_hidden_layers):
                for head in range(config.num_attention_heads):
                    handle = model.model.layers[layer].self_attn.q_proj.register_forward_hook(scaled(head, size))
                    logits = model(input_ids=part, use_cache=False, logits_to_keep=1).logits[:, -1]
                    handle.remove()
                    out[at : at + rows, layer, head] = kl(plain, logits).double().numpy()
    return out


def lens(layers, heads, width, prompts):
    """The same by TransformerLens, all prompts in one batch: (scores, seconds). Raises ImportError where it is absent.

    Its bridge wraps the library's own modules, so that it gets a model of its own with the same weights.
    """
    from davylamp.models import organism

    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformer_lens.model_bridge import TransformerBridge

    with tempfile.TemporaryDirectory() as folder:
        model = build(layers, heads, width)
        model.save_pretrained(folder)
        organism.tokenizer().save_pretrained(folder)  # it wants one; ids alone are used
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(folder, hf_model=model, device="cpu", tokenizer=tokenizer)
    ids = torch.tensor(prompts)
    out = np.zeros((len(prompts), layers, heads))

    def ablate(head):
        def hook(q, hook):
            q = q.clone()
            q[:, :, head] *= EPSILON
            return q

        return hook

    with torch.inference_mode():
        bridge(ids[:4])
        seconds = np.inf
        for _ in range(2 if layers < 8 else 1):  # a large one takes a minute
            start = time.process_time()
            plain = bridge(ids)[:, -1]
            for layer in range(layers):
                for head in range(heads):
                    hooks = [(f"blocks.{layer}.attn.q.hook_out", ablate(head))]
                    out[:, layer, head] = kl(plain, bridge.run_with_hooks(ids, fwd_hooks=hooks)[:, -1]).double().numpy()
            seconds = min(seconds, time.process_time() - start)
    return out, seconds


def gemm_speed(width):
    """Multiply-adds x 2 per second of one product of the engine's shape."""
    a, b = torch.randn(1024, width), torch.randn(width, int(2.75 * width))
    best = 0.0
    for _ in range(5):
        start = time.process_time()
        for _ in range(20):
            a @ b
        best = max(best, 20 * 2 * a.numel() * b.shape[1] / (time.process_time() - start))
    return best


def products(layers, heads, width, prompts):
    """Floating-point operations of the engine's matrix products, all heads x all prompts, without attention's own."""
    square, mlp, tokens = width * width, 3 * int(2.75 * width) * width, TOKENS * prompts
    whole, total = (
        4 * square + mlp,
        layers * tokens * (4 * square + mlp + 4 * square),
    )  # plain pass, and attention once more
    for layer in range(layers - 1):
        between = layers - 2 - layer
        per = mlp * TOKENS + between * whole * TOKENS + 3 * square * (TOKENS - 1) + whole + VOCABULARY * width
        total += heads * prompts * per
    return 2 * (total + heads * prompts * (mlp + VOCABULARY * width))


def timed(function, *args, times=1, **options):
    best, out = np.inf, None
    for _ in range(times):
        start = time.process_time()
        out = function(*args, **options)
        best = min(best, time.process_time() - start)
    return out, best


def prescreened(model, prompts):
    """Scores of the heads that the approximate pass picks, exact."""
    rough, _ = prescreen(model, prompts, rng=np.random.default_rng(0))
    wanted = ranked(rough)[:EXACT]
    return score_heads(model, prompts, heads=wanted, generalized=False)


def measure(name, prompts):
    layers, heads, width = SIZES[name]
    model = build(layers, heads, width)
    rows = torch.randint(4, VOCABULARY, (prompts, TOKENS), generator=torch.Generator().manual_seed(1)).tolist()
    score_heads(model, rows[:8])  # warm up
    times = 3 if layers < 8 else 1
    ours, ours_s = timed(score_heads, model, rows, generalized=False, times=times)
    quick, quick_s = timed(prescreened, model, rows, times=times)
    # One prompt after another takes the time of each, and of a large model minutes.
    looped = rows[: 100 if layers < 8 else 25]
    loop, loop_s = timed(naive, model, looped, 1)
    loop_s *= len(rows) / len(looped)
    top = ranked(ours.mean())[:5]
    limit = products(layers, heads, width, prompts) / gemm_speed(width)
    exact = score_heads(
        model.double(), looped, generalized=False
    ).ships  # what float32 rounds away, of ours and of the loop
    model.float()
    figures = {
        "naive_s": loop_s,
        "ours_s": ours_s,
        "prescreened_s": quick_s,
        "naive_over_ours": loop_s / ours_s,
        "naive_over_prescreened": loop_s / quick_s,
        "same_top_5": ranked(ours.ships[: len(looped)].mean(0))[:5] == ranked(loop.mean(0))[:5],
        "same_top_5_prescreened": ranked(quick.mean())[:5] == top,
        "max_abs_diff": float(np.abs(ours.ships[: len(looped)] - loop).max()),
        "ours_from_float64": float(np.abs(ours.ships[: len(looped)] - exact).max()),
        "naive_from_float64": float(np.abs(loop - exact).max()),
        "highest_nats": float(loop.max()),
        "fraction_of_arithmetic_limit": limit / ours_s,
    }
    try:
        theirs, seconds = lens(layers, heads, width, rows)
        figures |= {"transformer_lens_s": seconds, "transformer_lens_over_ours": seconds / ours_s}
        figures["transformer_lens_max_abs_diff"] = float(np.abs(theirs - ours.ships).max())
    except Exception as problem:  # absent, or of another transformers: the figure is left out
        print(f"{name}: no transformer_lens: {type(problem).__name__}: {str(problem)[:200]}", file=sys.stderr)
    return figures


def together(found):
    """Flat figures: the worse of the sizes under the plain name, then each size's own."""
    out = {}
    for key in ("naive_over_ours", "transformer_lens_over_ours", "naive_over_prescreened", "max_abs_diff",
                "ours_from_float64", "naive_from_float64", "fraction_of_arithmetic_limit", "same_top_5",
                "same_top_5_prescreened"):  # fmt: skip
        worse = max if "diff" in key or "float64" in key else min
        values = [figures[key] for figures in found.values() if key in figures]
        if values:
            out[key] = worse(values)
    for name, figures in found.items():
        out |= {f"{key}, {name}": value for key, value in figures.items()}
    return {key: int(value) if isinstance(value, bool) else float(f"{value:.4g}") for key, value in out.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", choices=list(SIZES))
    parser.add_argument("--install-peers", action="store_true", help=f"put TransformerLens into {PEERS_AT} first")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.install_peers:  # apart from this environment's packages, and without what it would replace there
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(PEERS_AT), *PEERS]
        subprocess.run(command, check=False)
    if PEERS_AT.is_dir():
        sys.path.append(str(PEERS_AT))
    figures = together({name: measure(name, args.prompts) for name in SIZES if args.only in (None, name)})
    if args.json:
        print(json.dumps({"figures": figures}))
        return
    for key, value in figures.items():
        print(f"| {key} | {value} |")


if __name__ == "__main__":
    main()
