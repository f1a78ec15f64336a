"""Streamed weight-space edits against copying the same bytes, and against mergekit, on random bf16 Llama checkpoints in several shards.

Each edit runs as a user runs it: sources hashed, result checked for non-finite numbers, made durable (fsync) and renamed. Beside it in
every round, the same files warm in the page cache: `cp -r` of the checkpoints that the edit reads, made durable as well. An edit reads
all of them and writes one. Ratios are medians over paired rounds. `_over_one_cp` is against copying a single checkpoint, the harder
yardstick; `_cpu_over_cp_cpu` is of the CPU seconds of the two, which a busy machine disturbs less.

    python benchmarks/merge.py [--rounds 3] [--gb 1.0] [--json] [--mergekit-python PYTHON | --install-peers]

mergekit 0.1.5 (`linear` on the CPU, as installed) is compared as whole processes, imports included, in CPU seconds: `linear_over_mergekit`
is ours divided by its. Ours hashes the sources for its lineage, which mergekit does not; `linear_unhashed_over_mergekit` is of a run with
the hashing taken out, so of the same work. The two results are compared entry by entry. --install-peers makes an environment for it in the
temporary folder (needs a package index), with this one's torch.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HIDDEN, INTER, VOCABULARY, SHARDS = 2048, 5632, 32000, 5
EDITS = {
    "linear": ("base", "tuned"),
    "task_arithmetic": ("base", "tuned"),
    "ties": ("base", "tuned"),
    "residual": ("updated", "base", "tuned"),
}
WORKER = """
import json, sys, time
from pathlib import Path
import numpy, torch
from davylamp.edits.instruction_residual import instruction_residual
from davylamp.edits.merge import merge
name, out, *sources = sys.argv[1:]
sources, rng = [Path(source) for source in sources], numpy.random.default_rng(0)
def peak():  # not ru_maxrss: that one remembers the process it was forked from
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
if name == "linear_unhashed":
    import davylamp.models.vectors_out
    davylamp.models.vectors_out.file_sha256 = lambda path: "0" * 64
before = peak()
began, cpu = time.perf_counter(), time.process_time()
if name == "residual":
    instruction_residual(*sources, out=Path(out), rng=rng)
else:
    merge(*sources, out=Path(out), method=name.removesuffix("_unhashed"), weight=0.3, rng=rng)
print(json.dumps({"wall": time.perf_counter() - began, "cpu": time.process_time() - cpu,
                  "peak_mib": peak(), "imports_mib": before}))
"""
MERGEKIT = """
models:
  - model: {base}
    parameters: {{weight: 0.7}}
  - model: {tuned}
    parameters: {{weight: 0.3}}
merge_method: linear
parameters: {{normalize: false}}
dtype: bfloat16
"""


def shapes(layers):
    """{name: shape} of a Llama, in the order of its layers."""
    out = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        head = f"model.layers.{layer}"
        for part in "qkvo":
            out[f"{head}.self_attn.{part}_proj.weight"] = (HIDDEN, HIDDEN)
        out |= {f"{head}.mlp.{part}_proj.weight": (INTER, HIDDEN) for part in ("gate", "up")}
        out[f"{head}.mlp.down_proj.weight"] = (HIDDEN, INTER)
        out |= {f"{head}.{part}_layernorm.weight": (HIDDEN,) for part in ("input", "post_attention")}
    return {**out, "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def write(folder, layers, seed, near=None):
    """A checkpoint of random numbers; with `near`, a small step away from that folder's. One tensor in memory at a time."""
    import torch

    from davylamp.models.vectors import read
    from davylamp.models.vectors_io import INDEX, ShardWriter, Spec

    folder.mkdir(parents=True)
    generator, specs = torch.Generator().manual_seed(seed), shapes(layers)
    names = list(specs)
    groups = [names[i * len(names) // SHARDS : (i + 1) * len(names) // SHARDS] for i in range(SHARDS)]
    place = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05}-of-{SHARDS:05}.safetensors"
        writer = ShardWriter(folder / file, {n: Spec(torch.bfloat16, specs[n]) for n in group}, {"format": "pt"})
        for name in group:
            tensor = torch.randn(specs[name], generator=generator) * 0.02
            if near is not None:
                tensor = read(near, name).float() + tensor * 0.1
            writer.put(name, 0, tensor.bfloat16())
            place[name] = file
        writer.finish()
    size = sum((folder / file).stat().st_size for file in set(place.values()))
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": place}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def children(command, **options):
    """(wall seconds, CPU seconds, what it printed) of a whole process and its children."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{command[:3]} failed: {done.stderr[-2000:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def durable(folder):
    for file in folder.rglob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def copy(sources, room):
    """(wall, CPU) of cp -r of these checkpoints, made durable."""
    wall = cpu = 0.0
    for source in sources:
        target = room / "copy"
        one, two, _ = children(["cp", "-r", source, target])
        began = time.perf_counter()
        durable(target)
        wall, cpu = wall + one + time.perf_counter() - began, cpu + two
        shutil.rmtree(target)
    return wall, cpu


def warm(folders):
    for folder in folders:
        for file in folder.glob("*.safetensors"):
            with file.open("rb", buffering=0) as opened:
                while opened.read(1 << 24):
                    pass


def edit(name, sources, room):
    out = room / "out"
    _, whole, printed = children([sys.executable, "-c", WORKER, name, out, *sources], env=ENVIRONMENT)
    shutil.rmtree(out)
    return {**json.loads(printed), "whole_cpu": whole}


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def install(room):
    """An environment with mergekit 0.1.5 that sees this one's packages; None, and why, where it cannot be had."""
    subprocess.run([sys.executable, "-m", "venv", room / "peer"], check=True)
    python = room / "peer" / "bin" / "python"
    site = next((room / "peer" / "lib").glob("python*")) / "site-packages"
    mine = [path for path in sys.path if path.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(mine) + "\n")
    pins = Path(__file__).parent.parent / "constraints.txt"
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", "-c", pins, "mergekit==0.1.5"], capture_output=True, text=True
    )
    if done.returncode:
        print(f"mergekit cannot be had: {done.stderr.strip()[-300:]}", file=sys.stderr)
        return None
    return python


def mergekit(python, sources, room):
    """(CPU seconds, folder) of mergekit's linear merge."""
    (room / "linear.yaml").write_text(MERGEKIT.format(base=sources[0], tuned=sources[1]))
    out = room / "theirs"
    command = [python, "-m", "mergekit.scripts.run_yaml", room / "linear.yaml", out, "--no-copy-tokenizer"]
    _, cpu, _ = children(command, env=ENVIRONMENT)
    return cpu, out


def differences(ours, theirs, sources):
    """Largest |ours - theirs|, |ours - exact|, |theirs - exact|, in units of bf16's last place of the larger input."""
    import torch

    from davylamp.models.vectors import names, read

    worst = [0.0, 0.0, 0.0]
    for name in names(ours):
        a, b, mine, peer = (read(folder, name).double() for folder in (*sources, ours, theirs))
        exact = 0.7 * a + 0.3 * b
        unit = torch.exp2(torch.floor(torch.log2(torch.maximum(a.abs(), b.abs()).clamp(min=1e-30)))) * 2.0**-7
        for at, gap in enumerate((mine - peer, mine - exact, peer - exact)):
            worst[at] = max(worst[at], float((gap.abs() / unit).max()))
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--gb", type=float, default=1.0, help="size of a checkpoint; about six times that is needed on disk"
    )
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes; the system's by default")
    parser.add_argument("--mergekit-python", type=Path)
    parser.add_argument("--install-peers", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the temporary folder goes
    per_layer = 2 * (4 * HIDDEN**2 + 3 * HIDDEN * INTER)
    layers = max(1, round((args.gb * 1e9 - 4 * VOCABULARY * HIDDEN) / per_layer))
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="merge-bench-") as name:
        room = Path(name)
        if shutil.disk_usage(room).free < args.gb * 7e9:
            raise SystemExit(f"{room} has too little room: {args.gb * 7:.0f} GB are needed")
        folders = {"base": write(room / "base", layers, 0)}
        folders["tuned"] = write(room / "tuned", layers, 1, folders["base"])
        folders["updated"] = write(room / "updated", layers, 2, folders["base"])
        size = sum(file.stat().st_size for file in folders["base"].glob("*.safetensors"))
        found = {edit_name: [] for edit_name in EDITS}
        for _ in range(args.rounds):
            for edit_name, labels in EDITS.items():
                sources = [folders[label] for label in labels]
                warm(sources)
                one = copy(sources[:1], room)
                same = copy(sources, room)
                found[edit_name].append((edit(edit_name, sources, room), one, same))
        figures = {"gb": round(size / 1e9, 3), "cpus": len(os.sched_getaffinity(0))}
        for edit_name, rounds in found.items():
            figures[f"{edit_name}_over_cp"] = statistics.median(ours["wall"] / same[0] for ours, _, same in rounds)
            figures[f"{edit_name}_over_one_cp"] = statistics.median(ours["wall"] / one[0] for ours, one, _ in rounds)
            figures[f"{edit_name}_cpu_over_cp_cpu"] = statistics.median(o["cpu"] / same[1] for o, _, same in rounds)
            figures[f"{edit_name}_s"] = statistics.median(ours["wall"] for ours, _, _ in rounds)
            figures[f"{edit_name}_cpu_s"] = statistics.median(ours["cpu"] for ours, _, _ in rounds)
        largest = VOCABULARY * HIDDEN * 2 / 2**20
        peak = max(ours["peak_mib"] for rounds in found.values() for ours, _, _ in rounds)
        imports = min(ours["imports_mib"] for rounds in found.values() for ours, _, _ in rounds)
        figures["largest_tensor_mib"] = largest
        figures["peak_mib_over_largest_tensor_mib"] = peak - largest
        figures["peak_mib_over_imports_mib"] = peak - imports
        python = install(room) if args.install_peers else args.mergekit_python
        if python is not None:
            sources = [folders[label] for label in EDITS["linear"]]
            times = []
            for _ in range(args.rounds):
                ours = edit("linear", sources, room)["whole_cpu"]
                unhashed = edit("linear_unhashed", sources, room)["whole_cpu"]
                cpu, theirs = mergekit(python, sources, room)
                times.append((cpu, ours, unhashed))
                if len(times) < args.rounds:
                    shutil.rmtree(theirs)
            figures["linear_over_mergekit"] = statistics.median(ours / cpu for cpu, ours, _ in times)
            figures["linear_unhashed_over_mergekit"] = statistics.median(ours / cpu for cpu, _, ours in times)
            figures["mergekit_cpu_s"] = statistics.median(cpu for cpu, _, _ in times)
            figures["linear_whole_cpu_s"] = statistics.median(ours for _, ours, _ in times)
            figures["linear_unhashed_whole_cpu_s"] = statistics.median(ours for _, _, ours in times)
            children([sys.executable, "-c", WORKER, "linear", room / "mine", *sources], env=ENVIRONMENT)
            gaps = differences(room / "mine", theirs, sources)
            for label, gap in zip(
                ("linear_from_mergekit", "linear_from_exact", "mergekit_from_exact"), gaps, strict=True
            ):
                figures[f"{label}_bf16_units"] = gap
    figures = {key: round(value, 3) for key, value in figures.items()}
    if args.json:
        print(json.dumps({"figures": figures}))
    else:
        print(f"{figures['gb']} GB in {SHARDS} shards, median of {args.rounds} rounds, {figures['cpus']} CPUs\n")
        print("\n".join(f"| {key} | {value} |" for key, value in figures.items()))


if __name__ == "__main__":
    main()
