"""One whole step of GRPO beside TRL's GRPOTrainer, in one run: part of `make bench`. `--method ppo` times PPO beside its own
limit and, where it is told of one, beside the last TRL that had PPO (see `benchmarks/trl_ppo.py`); a reward model of its size judges there.

A step is what a user waits for: sampling, judging, the reference's log-probabilities, forward and backward, the update. 4 prompts of real
conversations with 8 responses of 64 tokens each, temperature 1, KL 0.04 in the loss, one rule as judge, the same prompts in the same order
on both sides; no response ends early on either side. TRL generates with transformers, and is tried with several batch sizes, with gradient
checkpointing and without. Sides alternate (A B A B), each in its own process; the first step of each process warms up and is not counted.
The limit is the floating-point operations of all forward and backward passes of our step over the measured rate of matrix products.

    python -m benchmarks.grpo
    python -m benchmarks.grpo --long-prompts                prompts of about 512 tokens
    python -m benchmarks.grpo --method ppo                  our side alone, or with --trl-ppo FOLDER
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import trl_ppo
from benchmarks.common import DTYPES, HH, SYSTEM, beside, data_file, hand_over, own_process, settled_precision, synchronise, under, unpack
from benchmarks.dpo import matmul_rate
from preftune import formats
from preftune.configfile import load as load_config
from preftune.models.load import load_causal_lm, locate
from preftune.models.policy import RewardModel
from preftune.models.save import save_model
from preftune.online.methods import ONLINE, config_kind
from preftune.online.ready import prepare, ready
from preftune.online.run import OnlineRun
from preftune.packing.order import steps
from preftune.records import Example, Response
from preftune.training.distributed import World
from preftune.training.signals import GracefulStop

PREFTUNE, TRL = "preftune", "trl"
PHASES = ("sampling", "judging", "looking", "training")
"""Looking is what frozen weights say of the responses: the reference, old log-probabilities and values."""
WORDS = 20
LONG = range(448, 577)
"""Tokens of a prompt that counts as long."""
ROUNDING = 1e-3
NEVER = -1
"""An id that no token has: with None transformers takes the model's own ends."""


def near(text: str) -> float:
    """The reward of both sides: 1 for a response of `WORDS` words, less the farther from that."""
    return 1 - abs(len(text.split()) - WORDS) / WORDS


def rule(example: Example, response: Response) -> float:
    """`near`, as our judge calls it."""
    return near(response.text)


def conversations(path: Path, tokenizer: Any, count: int, long: bool) -> list[list[dict[str, str]]]:
    """The first so many different prompts of the data as messages, of at most 256 tokens, or (`long`) of about 512."""
    found: list[list[dict[str, str]]] = []
    for example in formats.read_prompts([path], on_error="skip").examples:
        tokens = len(tokenizer.encode_prompt(example.prompt))
        if not isinstance(example.prompt, str) and (tokens in LONG if long else tokens <= 256):
            found.append([{"role": m.role, "content": m.content} for m in example.prompt])
        if len(found) == count:
            return found
    raise SystemExit(f"{path} has only {len(found)} such prompts, {count} are needed")


def judge_of(folder: Path, tokenizer: Any) -> None:
    """Write the reward model that judges both sides' PPO: the model itself with a random head."""
    torch.manual_seed(0)
    save_model(RewardModel(load_causal_lm(locate(str(folder / "model")))), tokenizer, folder / "reward")


# --- one side -----------------------------------------------------------------------------------------------------------------


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """The run that `preftune train` makes, step by step, with an engine that no token ends."""
    row, knobs = ONLINE[options.method], {"kl": 0.04, "missing_eos": "keep"}
    settings = {
        "model": str(options.folder / "model"), "data": str(options.folder / "prompts.jsonl"),
        "output": tempfile.mkdtemp(dir=options.folder),  # another side's would be gone on with
        "judge": str(options.folder / "reward") if row.critic else "benchmarks.grpo:rule", "precision": options.precision,
        "method": knobs, "alarms": None, "keep_responses": None,
        "prompts_per_step": options.prompts, "tokens_per_microbatch": options.tokens_per_microbatch, "max_length": options.max_length,
        "gradient_checkpointing": options.checkpointing,
        "rollout": {"n": options.responses, "prompts": options.prompts, "max_new_tokens": options.tokens},
    }  # fmt: skip
    found = ready(row.name, load_config(config_kind(row.name), None, (), base=settings), World.join())
    setup = prepare(found, World.join())
    found.tokenizer.turn_ends = frozenset()
    run = OnlineRun(setup, None, Console(quiet=True), GracefulStop(), found=found)
    total, done, seconds, phases = run.plan(), [], [], []
    synchronise()
    start = time.perf_counter()
    for position, step in run.steps(total):
        run.position = position  # as its own loop does
        synchronise()
        seconds.append(time.perf_counter() - start)
        known = {name: step.metrics.get(f"seconds_{name}", 0.0) for name in PHASES[:-1]}
        phases.append(known | {"training": seconds[-1] - sum(known.values())})
        done.append(step)
        start = time.perf_counter()
    told = [step.metrics["response_tokens"] for step in done]
    if set(told) != {float(options.tokens)}:
        raise SystemExit(f"responses of {set(told)} tokens where {options.tokens} were asked for")
    responses = options.prompts * options.responses * options.tokens
    return {
        "seconds": seconds, "phases": phases, "losses": [s.loss for s in done], "prompt_tokens": [s.tokens - responses for s in done],
        "scores": [s.metrics["score"] for s in done],
    }  # fmt: skip


def trl(options: argparse.Namespace) -> dict[str, Any]:
    """TRL's trainer with its own defaults, but for what must be equal, and responses that do not end."""
    import datasets
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seconds: list[float] = []
    losses: list[float] = []
    scores: list[float] = []
    tokens: list[int] = []
    phases: list[dict[str, float]] = []
    clock: Counter[str] = Counter()

    @contextmanager
    def timed(phase: str) -> Iterator[None]:
        synchronise()
        start = time.perf_counter()
        yield
        synchronise()
        clock[phase] += time.perf_counter() - start

    class Timed(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
            each = prompt_ids[:: options.responses]
            tokens.append(sum(map(len, each)))
            with timed("sampling"):
                found = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            if {len(ids) for ids in found[0]} != {options.tokens}:
                raise SystemExit(f"TRL's responses have other lengths than {options.tokens}")
            return found

        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
            with timed("judging"):
                return super()._calculate_rewards(*args, **kwargs)

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                return super()._get_per_token_logps_and_entropies(*args, **kwargs)
            with timed("looking"):
                return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.clear()
            synchronise()
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            synchronise()
            seconds.append(time.perf_counter() - self.start)
            known = {name: clock[name] for name in PHASES[:-1]}
            phases.append(known | {"training": seconds[-1] - sum(known.values())})

        def on_log(self, arguments: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                losses.append(logs["loss"])
                scores.append(logs["reward"])

    rows = [json.loads(line) for line in (options.folder / "prompts.jsonl").read_text().splitlines()]
    count = options.prompts * options.steps
    order = [int(i) for chosen, _ in steps(count, options.prompts, 1, 0) for i in chosen]
    whole = options.prompts * options.responses
    arguments = GRPOConfig(
        output_dir=str(options.folder / "scratch"), beta=0.04, num_generations=options.responses, max_completion_length=options.tokens,
        per_device_train_batch_size=options.rows, gradient_accumulation_steps=whole // options.rows, max_steps=options.steps,
        bf16=options.precision == "bf16", gradient_checkpointing=options.checkpointing, learning_rate=1e-6, lr_scheduler_type="constant",
        generation_kwargs={"eos_token_id": NEVER}, model_init_kwargs={"dtype": "float32"}, shuffle_dataset=False, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, **({} if torch.cuda.is_available() else {"use_cpu": True}),
    )  # fmt: skip
    trainer = Timed(
        model=str(options.folder / "model"), reward_funcs=lambda completions, **_: [near(one[0]["content"]) for one in completions],
        args=arguments, train_dataset=datasets.Dataset.from_list([rows[i] for i in order]),
        processing_class=AutoTokenizer.from_pretrained(options.folder / "model"), callbacks=[Clock()],
    )  # fmt: skip
    trainer.eos_token_ids = [NEVER]  # else it would cut a response behind the first one that it drew
    trainer.train()
    return {"seconds": seconds, "phases": phases, "losses": losses, "prompt_tokens": tokens, "scores": scores}


# --- the whole ----------------------------------------------------------------------------------------------------------------


def operations(config: Any, prompt_tokens: float, drawn: float, critic: bool) -> dict[str, float]:
    """Floating-point operations of one of our steps by phase: 2 for each weight and token forward, 4 more backward.

    A prompt is read once for its responses in every pass. Sampling and looking are forward passes, looking one by the reference and, with
    a critic, one each by policy and critic; training is forward and backward, of the critic too.
    """
    d, width = config.hidden_size, config.num_key_value_heads * config.head_dim
    layer = 2 * d * config.num_attention_heads * config.head_dim + 2 * d * width + 3 * d * config.intermediate_size
    body, head = config.num_hidden_layers * layer * (prompt_tokens + drawn), config.vocab_size * d * drawn
    return {
        "sampling": 2 * (body + head),
        "looking": 2 * (body + head) + (2 * (body + head) + 2 * body if critic else 0.0),
        "training": 6 * (body + head) + (6 * body if critic else 0.0),
    }


def sides_of(options: argparse.Namespace) -> dict[str, list[str]]:
    """Each side with the words that make it."""
    ours_ = ["--checkpointing"] if options.checkpointing else []
    found = {PREFTUNE: ["--part", PREFTUNE, *ours_]}
    if options.method != "grpo" and not options.trl_ppo:
        return found
    for setting in options.trl.split(","):
        rows, _, checkpointing = setting.partition("+")
        name = f"{TRL}, batches of {rows}" + (", gradient checkpointing" if checkpointing else "")
        words = ["--part", TRL, "--rows", rows, *(["--checkpointing"] if checkpointing else [])]
        if options.method == "grpo":
            found[name] = words
            continue
        for weights in ("fp32", "bf16"):
            found[f"{name}, {weights} weights"] = [*words, "--trl-ppo", str(options.trl_ppo), "--weights", weights]
    return found


def say(text: str) -> None:
    """How it goes, beside the table on stdout."""
    print(text, file=sys.stderr, flush=True)


def measure(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Every side, round after round. Ends the program where the sides did not read the same prompts."""
    found: dict[str, list[dict[str, Any]]] = {}
    kinds = under(options.allocators)
    sides = [(side, words, mimalloc) for mimalloc in kinds for side, words in sides_of(options).items()]
    for number in range(options.rounds):
        for side, words, mimalloc in sides:
            side += SYSTEM if any(kinds) and not mimalloc else ""
            shared = ["--folder", str(options.folder), "--method", options.method, "--precision", options.precision]
            for name in ("prompts", "responses", "tokens", "steps", "max_length", "tokens_per_microbatch"):
                shared += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
            one = own_process("benchmarks.grpo", [*shared, *words], mimalloc=mimalloc)
            if not one:
                say(f"round {number + 1}, {side}: out of memory, killed by the system")
                continue
            found.setdefault(side, []).append(one)
            each = "; ".join(f"{s:.1f} s ({_in_phases(p)})" for s, p in zip(one["seconds"], one["phases"], strict=True))
            say(f"round {number + 1}, {side}: {each}")
    read = {side: runs[0]["prompt_tokens"] for side, runs in found.items()}
    if len({tuple(tokens) for tokens in read.values()}) > 1:
        raise SystemExit(f"the sides read other prompts: {read}")
    return found


def _in_phases(phases: dict[str, float]) -> str:
    return ", ".join(f"{name} {phases[name]:.2f}" for name in PHASES)


def show(results: dict[str, list[dict[str, Any]]], options: argparse.Namespace, config: Any) -> None:
    """The table: medians over all counted steps, phase by phase, peak memory, ratios to ours, and our distance to the limit."""
    counted: Callable[[list[dict[str, Any]], str], list[Any]] = lambda runs, key: [value for run in runs for value in run[key][1:]]
    whole = {side: statistics.median(counted(runs, "seconds")) for side, runs in results.items()}
    memory = {side: max(run["peak_memory"] for run in runs) / 1e9 for side, runs in results.items()}
    parts = {side: {p: statistics.median(one[p] for one in counted(runs, "phases")) for p in PHASES} for side, runs in results.items()}
    prompt_tokens = statistics.mean(results[PREFTUNE][0]["prompt_tokens"][1:])
    print(
        f"\n{options.method}, {options.model}, {options.precision}, {options.prompts} prompts ({prompt_tokens:.0f} tokens together) x "
        f"{options.responses} responses of {options.tokens} tokens, median of {len(counted(results[PREFTUNE], 'seconds'))} steps"
    )
    print(f"| side | step, s | {', s | '.join(PHASES)}, s | peak memory, GB | first score |")
    print("| --- |" + " --- |" * (len(PHASES) + 3))
    for side, runs in results.items():
        cells = [f"{whole[side]:.2f}", *(f"{parts[side][p]:.2f}" for p in PHASES), f"{memory[side]:.2f}", f"{runs[0]['scores'][0]:.3f}"]
        print(f"| {side} | {' | '.join(cells)} |")
    others = [side for side in results if not side.startswith(PREFTUNE)]
    for side in others:
        for how, mine in beside(side, PREFTUNE, list(results)).items():
            phases = ", ".join(f"{p} {parts[side][p] / max(parts[mine][p], ROUNDING):.1f}x" for p in PHASES if p != "judging")
            ratios = f"{whole[side] / whole[mine]:.2f}x our time ({phases}), {memory[side] / memory[mine]:.1f}x our memory"
            print(f"{side}, {how}: {ratios}")
    if others:
        best = min(others, key=lambda side: whole[side])
        print(f"its fastest setting, {best}, takes {whole[best] / whole[PREFTUNE]:.2f}x our time")
    work = operations(config, prompt_tokens, options.prompts * options.responses * options.tokens, ONLINE[options.method].critic)
    rate = matmul_rate(options.precision)
    limit = sum(work.values()) / rate
    told = ", ".join(f"{p} {work[p] / rate:.2f} s (ours takes {parts[PREFTUNE][p] * rate / work[p]:.1f}x)" for p in work)
    print(f"limit of our step: {sum(work.values()) / 1e12:.2f} Tflop at a measured {rate / 1e9:.0f} Gflop/s = {limit:.2f} s: {told}")
    print(f"our step is {whole[PREFTUNE] / limit:.2f}x that")


def options_of() -> argparse.Namespace:
    """The command line; `--part` is how this program calls itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="grpo", choices=["grpo", "ppo"])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", type=Path, default=HH)
    parser.add_argument("--long-prompts", action="store_true", help="prompts of about 512 tokens")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of every response")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="steps a process; the first is not counted")
    parser.add_argument("--precision", default="auto", choices=["auto", *DTYPES])
    parser.add_argument("--tokens-per-microbatch", type=int, default=2560, help="ours")
    parser.add_argument("--max-length", type=int, default=1024, help="ours: prompt and response")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, ours")
    parser.add_argument(
        "--trl", default="8+checkpointing,8,32+checkpointing,32",
        help="rows of TRL's batches, with `+checkpointing` behind them or without, separated by commas: what is no divisor is refused",
    )  # fmt: skip
    parser.add_argument("--allocators", default="mimalloc,system", help="that every side runs under, one after the other")
    parser.add_argument("--trl-ppo", type=Path, metavar="FOLDER", help="where `pip install --no-deps --target FOLDER trl==1.12.0` put it")
    parser.add_argument("--weights", choices=list(DTYPES), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--part", choices=[PREFTUNE, TRL], help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Alternate the sides and print the table."""
    options = options_of()
    if options.part:
        hand_over(ours(options) if options.part == PREFTUNE else trl(options) if options.method == "grpo" else trl_ppo.side(options, NEVER))
        return
    for setting in options.trl.split(","):
        if options.prompts * options.responses % int(setting.partition("+")[0]):
            raise SystemExit(f"--trl {setting}: a step has {options.prompts * options.responses} responses, no multiple of that")
    data_file(options.data)
    options.precision = settled_precision(options.precision)
    with tempfile.TemporaryDirectory() as scratch:
        options.folder = Path(scratch)
        tokenizer, config = unpack(options.model, options.folder / "model")
        if options.method == "ppo":
            judge_of(options.folder, tokenizer)
        prompts = conversations(options.data, tokenizer, options.prompts * options.steps, options.long_prompts)
        (options.folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in prompts))
        results = measure(options)
        show(results, options, config)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
