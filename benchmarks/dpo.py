"""Preftune beside TRL on the same model, pairs, batch, length and precision: `make bench`.

Sides alternate (A B A B), each in its own process; the first step of each process warms up and is not counted. Printed: median step time,
peak memory, ratios, tokens through the model, and how far our step is from the time its matrix products alone would take.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import HH, data_file, own_process, settled_precision, under, unpack
from benchmarks.worker import PER_STEP
from preftune import formats


def records(path: Path, count: int, long_prompts: bool, tokenizer: Any) -> list[dict[str, Any]]:
    """The first `count` pairs of the file; with `long_prompts` only those whose prompt is most of their tokens."""
    chosen = []
    for example in formats.read(path, on_error="skip").examples:
        if isinstance(example.prompt, str) or example.prompt[-1].role != "user":
            continue
        tree, *_ = tokenizer.encode(example, None)
        if long_prompts and not (400 <= len(tree.prompt) <= 900 and tree.response_tokens < len(tree.prompt)):
            continue
        best, worst = example.responses
        messages = [{"role": m.role, "content": m.content} for m in example.prompt]
        chosen.append({"prompt": messages, "chosen": best.text, "rejected": worst.text})
        if len(chosen) == count:
            return chosen
    raise SystemExit(f"{path} has only {len(chosen)} such pairs, {count} are needed")


def matmul_rate(precision: str, width: int = 576, inner: int = 1536, rows: int = 1024) -> float:
    """Floating-point operations a second of this machine's matrix products in the model's own shapes (best of several)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    best = 0.0
    for m, k, n in ((rows, width, inner), (rows, inner, width)):
        a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
        out = torch.empty(m, n, device=device, dtype=dtype)
        for _ in range(8):
            start = time.perf_counter()
            for _ in range(10):
                torch.mm(a, b.T, out=out)
            if device == "cuda":
                torch.cuda.synchronize()
            best = max(best, 10 * 2 * m * k * n / (time.perf_counter() - start))
    return best


def operations(config: Any, tokens: float, response_tokens: float, method: str) -> float:
    """Floating-point operations of one step's matrix products: forward 2, backward 4 per weight and token, reference forward 2."""
    d, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    layer = 2 * d * config.num_attention_heads * config.head_dim + 2 * d * kv + 3 * d * config.intermediate_size
    body, head = config.num_hidden_layers * layer, config.vocab_size * d
    return tokens * body * (8 if method == "dpo" else 6) + (response_tokens * head * 8 if method == "dpo" else 0)


def run(side: str, options: argparse.Namespace, folder: Path, *, checkpointing: bool, accumulate: int, mimalloc: bool) -> dict[str, Any]:
    """One process of one side; {} where the system killed it for want of memory."""
    words = [side, "--method", options.method, "--model", str(folder / "model")]
    words += ["--rows", str(folder / "rows.json"), "--scratch", str(folder / "scratch"), "--steps", str(options.steps)]
    words += ["--precision", options.precision, "--max-length", str(options.max_length)]
    words += ["--tokens-per-microbatch", str(options.tokens_per_microbatch)]
    words += ["--accumulate", str(accumulate)]
    if checkpointing:
        words.append("--gradient-checkpointing")
    return own_process("benchmarks.worker", words, mimalloc=mimalloc)


SIDES = {
    "preftune": ("preftune", False, 1),
    "preftune, checkpointing on": ("preftune", True, 1),
    "trl, checkpointing off": ("trl", False, 1),
    "trl, checkpointing off, 2 batches of 4": ("trl", False, 2),
    "trl, its defaults": ("trl", True, 1),
}
"""Name -> program, gradient checkpointing, batches a step."""


def main() -> None:
    """Alternate the sides and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="dpo", choices=["dpo", "reward"])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", type=Path, default=HH)
    parser.add_argument("--long-prompts", action="store_true", help="pairs whose prompt is longer than both responses together")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="steps a process; the first is not counted")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--tokens-per-microbatch", type=int, default=2048)
    parser.add_argument("--allocators", default="system,mimalloc")
    parser.add_argument(
        "--sides", default=";".join(name for name in SIDES if name != "preftune, checkpointing on"), help="separated by semicolons"
    )
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    data_file(options.data)
    options.precision = settled_precision(options.precision)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer, config = unpack(options.model, folder / "model")
        (folder / "rows.json").write_text(json.dumps(records(options.data, PER_STEP * options.steps, options.long_prompts, tokenizer)))
        kinds = under(options.allocators)
        results: dict[tuple[str, bool], list[dict[str, Any]]] = {}
        for number in range(options.rounds):
            for mimalloc in kinds:
                for name in options.sides.split(";"):
                    side, checkpointing, accumulate = SIDES[name]
                    found = run(side, options, folder, checkpointing=checkpointing, accumulate=accumulate, mimalloc=mimalloc)
                    if not found:
                        print(f"round {number + 1}  {name}: out of memory, killed by the system", file=sys.stderr, flush=True)
                        continue
                    results.setdefault((name, mimalloc), []).append(found)
                    steps = ", ".join(f"{s:.1f}" for s in found["seconds"])
                    print(f"round {number + 1}  {name}, {found['allocator']} allocator: steps {steps} s", file=sys.stderr, flush=True)
        show(results, options, config)
        if options.out:
            plain = [{"side": n, "mimalloc": m, "runs": r} for (n, m), r in results.items()]
            options.out.write_text(json.dumps(plain, indent=1))


def show(results: dict[tuple[str, bool], list[dict[str, Any]]], options: argparse.Namespace, config: Any) -> None:
    """The table: medians over all counted steps, peak memory, ratios to ours, distance to the matmul limit."""
    medians = {key: statistics.median(s for run in runs for s in run["seconds"][1:]) for key, runs in results.items()}
    memory = {key: max(run["peak_memory"] for run in runs) for key, runs in results.items()}
    print(f"\n{options.method}, {options.model}, {options.precision}, {PER_STEP} pairs a step, max length {options.max_length}")
    print("| side | allocator | step, s | peak memory, GB | tokens a step | first loss |")
    print("| --- | --- | --- | --- | --- | --- |")
    for (name, mimalloc), runs in results.items():
        tokens = statistics.mean(runs[0]["tokens"][1:])
        label = "mimalloc" if mimalloc else "system"
        row = f"{medians[name, mimalloc]:.2f} | {memory[name, mimalloc] / 1e9:.2f} | {tokens:.0f} | {runs[0]['losses'][0]:.6f}"
        print(f"| {name} | {label} | {row} |")
    ours = {m: medians["preftune", m] for n, m in results if n == "preftune"}
    for (name, mimalloc), value in medians.items():
        if name != "preftune" and mimalloc in ours:
            label = "mimalloc" if mimalloc else "system allocator"
            ratio = f"{value / ours[mimalloc]:.1f}x the time and {memory[name, mimalloc] / memory['preftune', mimalloc]:.1f}x the memory"
            print(f"{name}, {label} under both: {ratio} of Preftune")
    system = [k for k in medians if not k[1] and k[0] != "preftune"]
    if True in ours and system:
        for key in system:
            ratio = f"{medians[key] / ours[True]:.1f}x the time and {memory[key] / memory['preftune', True]:.1f}x the memory"
            print(f"{key[0]}, both as installed (mimalloc comes with Preftune): {ratio} of Preftune")
    mine = results["preftune", max(ours)][0]
    work = operations(config, statistics.mean(mine["tokens"][1:]), statistics.mean(mine["response_tokens"][1:]), options.method)
    rate = matmul_rate(options.precision)
    limit = work / rate
    print(
        f"matmul limit of our step: {work / 1e12:.2f} Tflop at a measured {rate / 1e9:.0f} Gflop/s = {limit:.2f} s; "
        f"our step is {min(ours.values()) / limit:.2f}x that"
    )


if __name__ == "__main__":
    main()
