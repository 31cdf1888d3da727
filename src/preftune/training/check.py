"""Prove before step 1, on the user's own model and records, what must hold; each line passes or fails with its cause."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from rich.console import Console

from preftune.errors import UserError
from preftune.models.policy import TOLERANCE, layout_gap
from preftune.packing.batch import Totals, collate, microbatches
from preftune.packing.chat import Tree
from preftune.packing.turns import one_record_a_turn, spoken
from preftune.records import Example
from preftune.training.config import RunConfig
from preftune.training.distributed import World
from preftune.training.setup import Setup, prepare

FEW = 64
"""Records looked at by the checks of a run; `preftune check` looks at all."""


@dataclass(frozen=True)
class Line:
    """One thing that was checked."""

    name: str
    passed: bool
    detail: str


def checks(setup: Setup, *, everything: bool) -> Iterator[Line]:
    """Check lines in the order a run depends on them; the costly ones only when `everything` is asked for."""
    setup.learner.model.eval()  # an adapter's dropout would make every comparison fail
    trees = setup.train.trees
    first = {_record(tree) for tree in trees[:FEW]}  # whole records, of which some have several trees
    some = trees if everything else [tree for tree in trees if _record(tree) in first]
    yield Line("records", bool(trees), setup.train.sentence())
    yield _one_bos(setup, some)
    yield _turn_ends(setup, some)
    yield _round_trip(setup, some)
    yield _loss_carried(some)
    shortest = sorted(trees, key=lambda t: t.tokens)[: 8 if everything else 2]
    yield _layouts(setup, shortest)
    yield _first_loss(setup, shortest)
    if everything:
        yield _longest_fits(setup)


def _one_bos(setup: Setup, trees: Sequence[Tree]) -> Line:
    bos = setup.tokenizer.bos_id
    if bos is None or bos in setup.tokenizer.turn_ends or not setup.tokenizer._adds_bos:
        return Line("one BOS", True, "this tokenizer puts no BOS of its own before a text")
    for tree in trees:
        count = int((tree.prompt == bos).sum()) + sum(int((r == bos).sum()) for r in tree.responses)
        if count != 1 or tree.prompt[0] != bos:
            return Line("one BOS", False, f"{tree.where}: {count} BOS tokens, the first token is {tree.prompt[0]}")
    return Line("one BOS", True, f"exactly one, at position 0, in {len(trees)} records")


def _turn_ends(setup: Setup, trees: Sequence[Tree]) -> Line:
    end = setup.tokenizer.turn_end
    for tree in trees:
        for ids, finished in spoken(tree):
            if finished and ids[-1] != end:
                return Line("EOS on finished responses", False, f"{tree.where}: a finished response does not end with {end}")
    text = setup.tokenizer.decode([end], special=True)
    return Line("EOS on finished responses", True, f"{text!r} ends every finished response and carries loss; a cut response has none")


def _round_trip(setup: Setup, trees: Sequence[Tree]) -> Line:
    """Each finished turn that carries loss is one of the record's, verbatim and in order, and none that fits the window is missing."""
    name, examples = "responses survive tokenising", {(e.id, e.where): e for e in setup.train.examples}
    looked, odd, lost = 0, [], []
    for key, parts in groupby(trees, key=_record):
        found = [turn for tree in parts for turn in spoken(tree)]
        history, responses = _written(setup, examples[key])
        kept = len(found) - len(history)
        if kept < bool(responses):
            lost.append(key[1])
        for n, (ids, finished) in enumerate(found):
            if not finished:
                continue
            looked += 1
            # where the method kept some of the responses, which they are is not known here
            wanted = history[n : n + 1] or (responses[n - len(history) :][:1] if kept == len(responses) else responses)
            if setup.tokenizer.decode(ids[:-1].tolist(), special=True).strip() not in wanted:
                odd.append(key[1])
    if odd:
        return Line(name, False, f"{len(odd)} responses decode to another text, for instance {odd[0]}")
    if lost:
        return Line(name, False, f"{len(lost)} records lack a turn that should carry loss, for instance {lost[0]}")
    return Line(name, True, f"tokens decode to the response's own text in {looked} finished responses")


def _record(tree: Tree) -> tuple[str, str]:
    """Which record a tree is of."""
    return tree.id, tree.where


def _written(setup: Setup, example: Example) -> tuple[list[str], list[str]]:
    """The texts of the history's turns that carry loss, and of the responses; what lies behind max_length is left out."""
    if not setup.method.every_turn(setup.config.method):
        return [], [r.text.strip() for r in example.responses]
    fits = lambda turn: len(setup.tokenizer.encode_prompt(turn.prompt)) < setup.config.max_length
    *history, last = one_record_a_turn(example)
    texts = [turn.responses[0].text.strip() for turn in history if fits(turn)]
    return texts, [r.text.strip() for r in last.responses] if fits(last) else []


def _loss_carried(trees: Sequence[Tree]) -> Line:
    for tree in trees:
        if tree.response_tokens == 0:
            return Line("every record carries loss", False, f"{tree.where}: no token carries loss")
    return Line("every record carries loss", True, f"{sum(t.response_tokens for t in trees):,} response tokens")


def _layouts(setup: Setup, trees: Sequence[Tree]) -> Line:
    model = setup.learner.model
    if not model.backbone.packed:
        return Line("packed = padded", True, "this model is read as padded rows; there is nothing to compare")
    gap = layout_gap(model, trees)
    return Line("packed = padded", gap < TOLERANCE[setup.compute], f"hidden states differ by {gap:.1e} on {len(trees)} real records")


def _first_loss(setup: Setup, trees: Sequence[Tree]) -> Line:
    learner, expected = setup.learner, setup.method.first_loss(trees, setup.config.method)
    found = learner.evaluate(list(trees))["loss"]
    if not math.isfinite(found):
        return Line("first loss", False, f"{found} on {len(trees)} records: the model's numbers are not finite")
    if expected is None or setup.config.reference is not None:
        return Line("first loss", True, f"{found:.4f}, finite")
    cached = trees[0].reference is not None and setup.compute != torch.float32
    good = abs(found - expected) < (1e-3 if cached else 1e-6) * max(1.0, abs(expected))
    return Line("first loss", good, f"{found:.7f}, theory says {expected:.7f}: policy and reference {'agree' if good else 'differ'}")


def _longest_fits(setup: Setup) -> Line:
    learner = setup.learner
    ordered = sorted(setup.train.trees, key=lambda t: -t.tokens)[: setup.config.prompts_per_step]
    part = [ordered[i] for i in microbatches(ordered, setup.config.tokens_per_microbatch)[0]]
    try:
        learner.model.train()
        loss, _ = learner.loss(collate(part, Totals.of(part), setup.method.reduction).to(setup.world.device), learner.survey(part))
        loss.backward()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and "allocate memory" not in str(error):  # what torch raises on a CPU
            raise
        return Line("the longest micro-batch fits", False, f"{sum(t.tokens for t in part)} tokens: {str(error).splitlines()[0][:160]}")
    finally:
        for parameter in learner.parameters.values():
            parameter.grad = None
    tokens = sum(t.tokens for t in part)
    return Line("the longest micro-batch fits", True, f"forward and backward of {tokens} tokens in {len(part)} records")


def show(line: Line, console: Console) -> None:
    """Print a check line."""
    mark = "[green]pass[/green]" if line.passed else "[red]FAIL[/red]"
    from rich.markup import escape

    console.print(f"{mark}  [bold]{escape(line.name)}[/bold]: {escape(line.detail)}", soft_wrap=True)


def check(method_name: str, config: RunConfig, console: Console) -> bool:
    """`preftune check`: all lines; True when every one passes."""
    world = World.join(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    setup = prepare(method_name, config, world, console)
    for notice in setup.notices:
        console.print(notice, soft_wrap=True)
    passed = True
    for line in checks(setup, everything=True):
        show(line, console)
        passed &= line.passed
    return passed


def fast_check(setup: Setup, console: Console) -> None:
    """The quick lines before a run; the first that fails stops it."""
    for line in checks(setup, everything=False):
        if not line.passed:
            raise UserError(
                f"check failed: {line.name}: {line.detail}",
                fix=f"`preftune check {setup.method.name} ...` shows all lines.",
            )
