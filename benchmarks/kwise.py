"""Training on K responses to one prompt: a shared prompt beside plain transformers on K padded rows, in one run: part of `make bench`.

Both sides are the same learner with the same objective, weights, optimizer, precision, micro-batches and allocator. They differ in how
the model is called: ours reads each prompt once with its responses behind it and gives log-probabilities of response tokens alone; the
plain side calls AutoModelForCausalLM on K right-padded rows a prompt and takes log_softmax over all logits, or calls
AutoModelForSequenceClassification. First losses and gradients of both are compared in fp32; then sides alternate (A B A B), each in its
own process; the first step of each process warms up and is not counted. A record is a real prompt and K texts of the data, in an order that
means nothing: texts as people wrote them and a prompt about as long as their mean, or (--response-tokens) all cut to one length, where
padding costs the plain side nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks.common import (
    DTYPES,
    HH,
    configured,
    data_file,
    hand_over,
    our_learner,
    own_process,
    settled_precision,
    timed,
    unpack,
    with_optimizer,
)
from preftune import formats
from preftune.methods import METHODS, Method, Outputs, find
from preftune.models import load
from preftune.models.policy import RewardModel
from preftune.models.save import save_model
from preftune.packing.batch import Batch, Totals, collate, microbatches
from preftune.packing.chat import SCORE, ChatTokenizer, Tree
from preftune.training.distributed import World
from preftune.training.learner import Learner

PREFTUNE, PLAIN = "preftune", "transformers"
NATURAL_MOST = 512
"""Tokens of the longest text that is taken as it is."""
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-3
"""Relative, in fp32: the largest for a loss, and for any one tensor's gradient in its norm."""


# --- records ------------------------------------------------------------------------------------------------------------------


def records(path: Path, tokenizer: ChatTokenizer, *, count: int, width: int, prompt: int, response: int) -> list[dict[str, Any]]:
    """`count` prompts with `width` texts each, as token ids: prompts within an eighth of `prompt` tokens and texts cut to `response`.

    With `response` 0 the texts are as long as people wrote them, to 512 tokens, and a prompt is within an eighth of its texts' mean.
    """
    prompts: list[list[int]] = []
    texts: list[list[int]] = []
    near = lambda ids, length: 7 * length <= 8 * len(ids) <= 9 * length
    for example in formats.read(path, on_error="skip").examples:
        tree, *_ = tokenizer.encode(example, None)
        if tree is None:
            continue
        texts += [r[: response or None].tolist() for r in tree.responses if (len(r) > response if response else len(r) <= NATURAL_MOST)]
        if not response or near(tree.prompt, prompt):
            prompts.append(tree.prompt.tolist())
        if response and len(prompts) >= count and len(texts) >= count * width:
            break
    found: list[dict[str, Any]] = []
    for start in range(0, len(texts) - width + 1, width):
        mine = texts[start : start + width]
        mean = sum(map(len, mine)) / width
        at = next((i for i, ids in enumerate(prompts) if response or near(ids, mean)), None)
        if at is not None:
            found.append({"prompt": prompts.pop(at), "responses": mine})
        if len(found) == count:
            return found
    raise SystemExit(f"{path} has only {len(found)} such prompts with {width} such texts; {count} are needed")


def trees_of(rows: Sequence[dict[str, Any]], method: Method) -> list[Tree]:
    """The rows as the method keeps them: ranked and rated, the first response best, the last the worst."""
    trees = []
    for index, row in enumerate(rows):
        n = len(row["responses"])
        scores = -np.arange(n, dtype=float)
        tree = Tree(
            id=str(index),
            where="",
            prompt=np.asarray(row["prompt"]),
            responses=tuple(np.asarray(r) for r in row["responses"]),
            finished=(False,) * n,
            scores=scores,
            preference=np.triu(np.ones((n, n)), 1),
            labels=(scores == 0).astype(float),
            ratings={SCORE: scores},
        )
        kept = method.keep(tree, method.knobs())
        if isinstance(kept, str):
            raise SystemExit(f"{method.name} keeps nothing of ranked responses: {kept}")
        trees.append(kept)
    return trees


# --- the plain side -----------------------------------------------------------------------------------------------------------


@dataclass
class PlainLearner(Learner):
    """The learner with plain transformers in place of the packed row: everything but the model's call is the same."""

    frozen: Any = None
    compute: torch.dtype = torch.float32

    def outputs(self, batch: Batch) -> Outputs:
        """Log-probabilities or rewards from K padded rows a prompt."""
        ids, mask = rows_of(batch, self.model.config.pad_token_id or 0)
        if self.method.model == "reward":
            with torch.autocast(ids.device.type, dtype=self.compute, enabled=self.compute != torch.float32):
                rewards = self.model(input_ids=ids, attention_mask=mask).logits
            return Outputs(rewards=batch.on_grid(rewards.squeeze(-1).float()))
        reference = None
        if self.frozen is not None:
            with torch.no_grad():
                reference = batch.per_response(self._logprobs(self.frozen, batch, ids, mask))
        return Outputs(token_logp=self._logprobs(self.model, batch, ids, mask), reference_logp=reference)

    def _logprobs(self, model: Any, batch: Batch, ids: Tensor, mask: Tensor) -> Tensor:
        """[M] log-probabilities of the response tokens, row after row, from the logits of every position."""
        with torch.autocast(ids.device.type, dtype=self.compute, enabled=self.compute != torch.float32):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logp = torch.log_softmax(logits[:, :-1].float(), -1).gather(2, ids[:, 1:, None]).squeeze(2)
        return torch.cat([logp[i, p - 1 : p + r - 1] for i, (_, p, _, r) in enumerate(batch.layout.rows())])


def rows_of(batch: Batch, pad: int) -> tuple[Tensor, Tensor]:
    """Each response behind its own copy of the prompt, right-padded: ids and mask."""
    rows = [torch.cat([batch.input_ids[start : start + p], batch.input_ids[at : at + r]]) for start, p, at, r in batch.layout.rows()]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    return ids, (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()


def plain_learner(method: Method, model: Path, *, precision: str, budget: int, steps: int) -> Learner:
    """The plain side, from the same folder."""
    knobs, world = configured(method, model=str(model)).method, World.join()
    if method.survey is not None or (method.model == "reward" and method.language_head(knobs)):
        raise SystemExit(f"the plain side cannot train {method.name}: it needs more of the model than log-probabilities or rewards")
    kind = AutoModelForSequenceClassification if method.model == "reward" else AutoModelForCausalLM
    build = lambda: kind.from_pretrained(model, dtype=torch.float32).to(world.device)
    frozen = build().eval().requires_grad_(False) if method.compares(knobs) else None
    return with_optimizer(PlainLearner(method, knobs, build(), world, budget, frozen=frozen, compute=DTYPES[precision]), steps)


# --- one process --------------------------------------------------------------------------------------------------------------


def make_learner(side: str, method: Method, options: argparse.Namespace, trees: Sequence[Tree], precision: str) -> Learner:
    """One side's learner, with a budget that puts `prompts_per_microbatch` records into each micro-batch."""
    budget = options.prompts_per_microbatch * max(t.tokens for t in trees)
    make = our_learner if side == PREFTUNE else plain_learner
    return make(method, options.folder / method.model, precision=precision, budget=budget, steps=options.steps)


def one_side(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time the steps of one side."""
    method = find(options.method)
    trees = trees_of(json.loads(options.rows.read_text()), method)
    learner = make_learner(side, method, options, trees, options.precision)
    size = options.prompts_per_step
    steps = [trees[i * size : (i + 1) * size] for i in range(options.steps)]
    cuts = [[[part[i] for i in cut] for cut in microbatches(part, learner.tokens_per_microbatch)] for part in steps]
    tokens = [sum(_tokens(side, cut) for cut in step) for step in cuts]
    return {**timed(learner, steps), "tokens": tokens, "microbatches": [len(cut) for cut in cuts]}


def _tokens(side: str, trees: Sequence[Tree]) -> int:
    """Tokens that go through the model for one micro-batch, padding among them."""
    if side == PREFTUNE:
        return sum(t.tokens for t in trees)
    rows = [len(t.prompt) + len(r) for t in trees for r in t.responses]
    return len(rows) * max(rows)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Loss of both sides on one micro-batch, and the largest relative difference of any tensor's gradient, in fp32."""
    method = find(options.method)
    trees = trees_of(json.loads(options.rows.read_text())[: options.prompts_per_microbatch], method)
    losses, gradients = [], []
    for side in (PREFTUNE, PLAIN):
        learner = make_learner(side, method, options, trees, "fp32")
        loss, _ = learner.loss(collate(trees, Totals.of(trees), method.reduction).to(learner.world.device))
        loss.backward()
        losses.append(loss.item())
        gradients.append({name.removeprefix("backbone.hf."): p.grad for name, p in learner.parameters.items() if p.grad is not None})
        del learner
    ours, theirs = gradients
    if ours.keys() != theirs.keys():
        raise SystemExit(f"the sides train other tensors: {sorted(ours.keys() ^ theirs.keys())[:4]}")
    gaps = {name: float((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-12)) for name in ours}
    worst = max(gaps, key=lambda name: gaps[name])
    return {"losses": losses, "gap": gaps[worst], "tensor": worst, "tensors": len(gaps)}


# --- the whole ----------------------------------------------------------------------------------------------------------------


def options_of() -> argparse.Namespace:
    """The command line; `--part` is how this program calls itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="rrhf,pro,reward_listwise", help="separated by commas")
    parser.add_argument("--responses", default="4,8", help="values of K, separated by commas")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", type=Path, default=HH)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--response-tokens", type=int, default=0, help="cut every response to so many; 0 takes them as they are")
    parser.add_argument("--prompts-per-step", type=int, default=4)
    parser.add_argument("--prompts-per-microbatch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="steps a process; the first is not counted")
    parser.add_argument("--precision", default="auto", choices=["auto", *DTYPES])
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--part", choices=["compare", PREFTUNE, PLAIN], help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def run(part: str, method: str, width: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One part in a process of its own."""
    words = ["--part", part, "--method", method, "--folder", str(folder), "--rows", str(folder / f"rows-{width}.json")]
    for name in ("prompts_per_step", "prompts_per_microbatch", "steps", "precision"):
        words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return own_process("benchmarks.kwise", words, mimalloc=not torch.cuda.is_available())


def say(text: str) -> None:
    """How it goes, beside the table on stdout."""
    print(text, file=sys.stderr, flush=True)


def measure(method: str, width: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Equality first, then the alternating sides; ends the program where the sides do not train the same thing."""
    found = run("compare", method, width, folder, options)
    if found:
        (ours, theirs), gap = found["losses"], found["gap"]
        text = f"loss {ours:.7f} and {theirs:.7f}, gradients of {found['tensors']} tensors within {gap:.1e} ({found['tensor']})"
        say(f"{method}, K = {width}: {text}")
        if not (abs(ours - theirs) <= LOSS_TOLERANCE * max(1.0, abs(theirs)) and gap <= GRADIENT_TOLERANCE):
            raise SystemExit(f"{method}, K = {width}: the sides differ: {text}")
    sides: dict[str, list[dict[str, Any]]] = {PREFTUNE: [], PLAIN: []}
    for number in range(options.rounds):
        for side, done in sides.items():
            one = run(side, method, width, folder, options)
            if one:
                done.append(one)
            steps = ", ".join(f"{s:.2f}" for s in one.get("seconds", ()))
            say(
                f"{method}, K = {width}, round {number + 1}, {side}: "
                + (f"steps {steps} s" if one else "out of memory, killed by the system")
            )
    return {"method": method, "responses": width, "equality": found, "sides": sides}


def show(results: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """The table: medians over all counted steps, peak memory, tokens, and the plain side in units of ours."""
    print(
        f"\n{options.model}, {options.precision}, {options.prompts_per_step} prompts a step, "
        f"{options.prompts_per_microbatch} a micro-batch, "
        + (
            f"prompts of about {options.prompt_tokens} tokens, responses of {options.response_tokens}"
            if options.response_tokens
            else "responses as people wrote them, prompts about as long as their mean"
        )
    )
    print("| method | K | side | step, s | peak memory, GB | tokens a step | first loss | largest gradient gap |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    ratios = []
    for one in results:
        found: dict[str, tuple[float, float, float]] = {}
        for side, runs in one["sides"].items():
            if not runs:
                continue
            step = statistics.median(s for run in runs for s in run["seconds"][1:])
            found[side] = step, max(run["peak_memory"] for run in runs), statistics.mean(runs[0]["tokens"][1:])
            gap = f"{one['equality']['gap']:.1e}" if one["equality"] else "not compared"
            cells = f"{step:.2f} | {found[side][1] / 1e9:.2f} | {found[side][2]:.0f} | {runs[0]['losses'][0]:.6f} | {gap}"
            print(f"| `{one['method']}` | {one['responses']} | {side} | {cells} |")
        if len(found) == len(one["sides"]):
            time, memory, tokens = (found[PLAIN][i] / found[PREFTUNE][i] for i in range(3))
            words = f"{time:.2f}x the time, {memory:.2f}x the memory, {tokens:.2f}x the tokens"
            ratios.append(f"{one['method']}, K = {one['responses']}: {PLAIN} takes {words} of {PREFTUNE}")
    print("\n" + "\n".join(ratios))


def main() -> None:
    """Prepare model and records, measure every method and K, print the table."""
    options = options_of()
    if options.part:
        hand_over(compare(options) if options.part == "compare" else one_side(options.part, options))
        return
    names, widths = options.methods.split(","), [int(k) for k in options.responses.split(",")]
    unknown = [name for name in names if name not in METHODS]
    if unknown or options.steps < 2:
        raise SystemExit(f"no such method: {', '.join(unknown)}" if unknown else "--steps must be at least 2: the first is not counted")
    data_file(options.data)
    options.precision = settled_precision(options.precision)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer, _ = unpack(options.model, folder / "policy")
        if any(METHODS[name].model == "reward" for name in names):
            torch.manual_seed(0)
            start = load.load_causal_lm(load.locate(str(folder / "policy")))
            save_model(RewardModel(start), tokenizer, folder / "reward")
            del start
        sizes = {"prompt": options.prompt_tokens, "response": options.response_tokens}
        for width in widths:
            rows = records(options.data, tokenizer, count=options.prompts_per_step * options.steps, width=width, **sizes)
            (folder / f"rows-{width}.json").write_text(json.dumps(rows))
        results = [measure(name, width, folder, options) for width in widths for name in names]
        show(results, options)
        if options.out:
            options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
