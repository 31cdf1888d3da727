"""The local engine beside transformers' `generate` (and vLLM, where it is given), in one run: part of `make bench`.

Same weights, prompts of real conversations, temperature 1, whole distribution. Workloads: (a) 8 prompts x 4 responses of 64 tokens,
(b) 16 x 8 of 64, (c) 16 x 8 that end where the model ends its turn, at most 256. `generate` is tried with several batch sizes and its best
one counts. Sides alternate (A B A B), each in its own process; the first pass of each process warms up and is not counted. The limit is the
larger of two times: matrix products at the measured rate, and the weights read once a token at the measured bandwidth.

    python -m benchmarks.rollout
    python -m benchmarks.rollout --vllm .venv-vllm/bin/python     a Python that has vLLM installed
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import DTYPES, HH, SYSTEM, beside, data_file, hand_over, own_process, settled_precision, synchronise, under, unpack
from benchmarks.dpo import matmul_rate
from preftune import formats
from preftune.models import load
from preftune.models.policy import LanguageModel
from preftune.rollout.engine import Engine
from preftune.rollout.sampling import Sampling

PREFTUNE, PLAIN, VLLM = "preftune", "transformers", "vllm"


@dataclass(frozen=True)
class Workload:
    """`prompts` x `n` responses of `tokens`; with `natural` they end where the model ends its turn."""

    prompts: int
    n: int
    tokens: int
    natural: bool = False


WORKLOADS = {"a": Workload(8, 4, 64), "b": Workload(16, 8, 64), "c": Workload(16, 8, 256, natural=True)}


def conversations(path: Path, tokenizer: Any, count: int) -> list[list[int]]:
    """The first so many different prompts of the data, as token ids, of at most 512 tokens."""
    found: list[list[int]] = []
    for example in formats.read_prompts([path], on_error="skip", limit=20 * count).examples:
        ids = tokenizer.encode_prompt(example.prompt)
        if len(ids) <= 512:
            found.append(ids)
        if len(found) == count:
            return found
    raise SystemExit(f"{path} has only {len(found)} such prompts, {count} are needed")


def ours(options: argparse.Namespace, work: Workload, prompts: Sequence[Sequence[int]], ends: Sequence[int]) -> Any:
    """A pass of the engine: how many tokens it drew."""
    compute = DTYPES[options.precision]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = LanguageModel(load.load_causal_lm(load.locate(str(options.folder / "model"))), compute=compute).to(device)
    engine = Engine(model, frozenset(ends) if work.natural else frozenset())
    return lambda seed: sum(len(s.ids) for s in engine.generate(prompts, work.n, Sampling(max_new_tokens=work.tokens), seed))


def plain(options: argparse.Namespace, work: Workload, prompts: Sequence[Sequence[int]], ends: Sequence[int]) -> Any:
    """A pass of `generate` in batches of `--batch` rows, longest prompts together."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(options.folder / "model", dtype=DTYPES[options.precision]).to(device).eval()
    rows = sorted(prompts, key=len, reverse=True)
    each = max(1, options.batch // work.n)
    stop = {"eos_token_id": list(ends)} if work.natural else {"eos_token_id": -1}

    def run(seed: int) -> int:
        torch.manual_seed(seed)
        drawn = 0
        for start in range(0, len(rows), each):
            part = rows[start : start + each]
            width = max(map(len, part))
            ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in part], device=device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=device)
            with torch.no_grad():
                out = model.generate(
                    input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, pad_token_id=0,
                    max_new_tokens=work.tokens, num_return_sequences=work.n, **stop,
                )[:, width:]  # fmt: skip
            ended = torch.isin(out, torch.tensor(list(ends), device=device)) if work.natural else torch.zeros_like(out, dtype=torch.bool)
            first = torch.where(ended.any(1), ended.long().argmax(1) + 1, out.shape[1])
            drawn += int(first.sum())
        return drawn

    return run


_VLLM = """
import json, sys, time, resource
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
told = json.loads(sys.argv[1])
rows = {} if told["rows"] is None else {"max_num_seqs": told["rows"]}
llm = LLM(told["model"], dtype=told["dtype"], max_model_len=1024, seed=0, **rows)
seconds, drawn = [], []
for seed in range(told["passes"]):
    params = SamplingParams(n=told["n"], temperature=1.0, max_tokens=told["tokens"], ignore_eos=not told["natural"],
                            stop_token_ids=told["ends"] if told["natural"] else None, seed=seed, detokenize=False)
    llm.reset_prefix_cache()  # or it would not read the prompts again, as the other sides do
    start = time.perf_counter()
    out = llm.generate([TokensPrompt(prompt_token_ids=p) for p in told["prompts"]], params, use_tqdm=False)
    seconds.append(time.perf_counter() - start)
    drawn.append(sum(len(o.token_ids) for one in out for o in one.outputs))
usage = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024
print("\\n" + json.dumps({"seconds": seconds, "drawn": drawn, "peak_memory": usage}))
"""


def vllm(options: argparse.Namespace, work: Workload, prompts: Sequence[Sequence[int]], ends: Sequence[int]) -> dict[str, Any]:
    """Passes of vLLM in the Python that `--vllm` names."""
    told = {
        "model": str(options.folder / "model"), "dtype": str(DTYPES[options.precision]).removeprefix("torch."), "prompts": prompts,
        "ends": list(ends), "passes": options.passes, "n": work.n, "tokens": work.tokens, "natural": work.natural,
        "rows": options.vllm_rows,
    }  # fmt: skip
    done = subprocess.run([str(options.vllm), "-c", _VLLM, json.dumps(told)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    lines = done.stdout.splitlines()  # vLLM may say good-bye behind our line
    found: dict[str, Any] = json.loads(next(line for line in reversed(lines) if line.startswith('{"seconds"')))
    return found


def one_side(options: argparse.Namespace) -> dict[str, Any]:
    """All passes of one side and workload, in this process."""
    told = json.loads((options.folder / "prompts.json").read_text())
    work = WORKLOADS[options.workload]
    prompts, ends = told["prompts"][: work.prompts], told["ends"]
    go = (ours if options.part == PREFTUNE else plain)(options, work, prompts, ends)
    seconds, drawn = [], []
    for seed in range(options.passes):
        synchronise()
        start = time.perf_counter()
        drawn.append(go(seed))
        synchronise()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "drawn": drawn}


def bandwidth() -> float:
    """Bytes a second that a product reads from memory (best of several)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    block = torch.randn(64 * 2**20, device=device)
    best = 0.0
    for _ in range(5):
        synchronise()
        start = time.perf_counter()
        block.sum()
        synchronise()
        best = max(best, 4 * block.numel() / (time.perf_counter() - start))
    return best


def limit(config: Any, work: Workload, prompts: Sequence[Sequence[int]], drawn: float, precision: str) -> tuple[float, float]:
    """Seconds that the matrix products alone, and reading the weights alone, would take."""
    d, width = config.hidden_size, config.num_key_value_heads * config.head_dim
    layer = 2 * d * config.num_attention_heads * config.head_dim + 2 * d * width + 3 * d * config.intermediate_size
    body, head = config.num_hidden_layers * layer, config.vocab_size * d
    products = 2 * body * (sum(map(len, prompts[: work.prompts])) + drawn) + 2 * head * drawn
    bytes_ = (body + head) * (2 if precision == "bf16" else 4) * work.tokens
    return products / matmul_rate(precision), bytes_ / bandwidth()


def say(text: str) -> None:
    """How it goes, beside the table on stdout."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Alternate the sides and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="a,b,c", help="separated by commas")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", type=Path, default=HH)
    parser.add_argument("--batches", default="32,128", help="rows that `generate` is tried with, separated by commas")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--passes", type=int, default=3, help="passes a process; the first is not counted")
    parser.add_argument("--precision", default="auto", choices=["auto", *DTYPES])
    parser.add_argument("--allocators", default="mimalloc,system", help="that every side but vLLM runs under, one after the other")
    parser.add_argument("--vllm", type=Path, help="a Python with vLLM in it; without it vLLM is left out")
    parser.add_argument("--vllm-rows", type=int, help="responses at a time at most; vLLM's CPU build has died of 128")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--part", choices=[PREFTUNE, PLAIN], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--workload", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=32, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        hand_over(one_side(options))
        return
    data_file(options.data)
    options.precision = settled_precision(options.precision)
    with tempfile.TemporaryDirectory() as scratch:
        options.folder = Path(scratch)
        tokenizer, config = unpack(options.model, options.folder / "model")
        prompts = conversations(options.data, tokenizer, 16)
        ends = sorted(tokenizer.turn_ends)
        (options.folder / "prompts.json").write_text(json.dumps({"prompts": prompts, "ends": ends}))
        results = {name: measure(name, prompts, ends, options) for name in options.workloads.split(",")}
        show(results, options, config, prompts)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))


def measure(name: str, prompts: Sequence[Sequence[int]], ends: Sequence[int], options: argparse.Namespace) -> dict[str, Any]:
    """Every side of one workload, round after round."""
    work = WORKLOADS[name]
    batches = sorted({min(int(b), work.prompts * work.n) for b in options.batches.split(",")})
    kinds = under(options.allocators)
    names = (PREFTUNE, *(f"{PLAIN}, batches of {b}" for b in batches))
    sides = {name + (SYSTEM if any(kinds) and not mimalloc else ""): mimalloc for mimalloc in kinds for name in names}
    if options.vllm:
        sides[VLLM] = False
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(options.rounds):
        for side, mimalloc in sides.items():
            if side == VLLM:
                one = vllm(options, work, prompts[: work.prompts], ends)
            else:
                part, _, batch = side.removesuffix(SYSTEM).partition(", batches of ")
                words = ["--part", part, "--folder", str(options.folder), "--workload", name, "--passes", str(options.passes)]
                words += ["--precision", options.precision, "--batch", batch or "0"]
                one = own_process("benchmarks.rollout", words, mimalloc=mimalloc)
            if one:
                found[side].append(one)
                rates = ", ".join(f"{t / s:.0f}" for t, s in zip(one["drawn"], one["seconds"], strict=True))
                say(f"({name}) round {number + 1}, {side}: {rates} tokens/s")
    return found


def show(results: dict[str, Any], options: argparse.Namespace, config: Any, prompts: Sequence[Sequence[int]]) -> None:
    """The table: medians over all counted passes, peak memory, and ours in units of each other side."""
    print(f"\n{options.model}, {options.precision}, prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens")
    print("| workload | side | tokens/s | peak memory, GB | ours is |")
    print("| --- | --- | --- | --- | --- |")
    for name, sides in results.items():
        rate = {
            side: statistics.median(t / s for run in runs for t, s in zip(run["drawn"][1:], run["seconds"][1:], strict=True))
            for side, runs in sides.items()
            if runs
        }
        for side, value in rate.items():
            memory = max(run["peak_memory"] for run in sides[side]) / 1e9
            mine = {"each as installed": PREFTUNE} if side == VLLM else beside(side, PREFTUNE, list(rate))
            ratios = "" if side.startswith(PREFTUNE) else ", ".join(f"{rate[one] / value:.2f}x ({how})" for how, one in mine.items())
            print(f"| {name} | {side} | {value:.0f} | {memory:.2f} | {ratios} |")
        drawn = statistics.mean(t for run in sides[PREFTUNE] for t in run["drawn"][1:])
        products, reading = limit(config, WORKLOADS[name], prompts, drawn, options.precision)
        taken = drawn / rate[PREFTUNE]
        say(
            f"({name}) limit: products {products:.2f} s, weights {reading:.2f} s; ours {taken:.2f} s, {taken / max(products, reading):.2f}x"
        )


if __name__ == "__main__":
    main()
