"""Every assistant turn of a conversation: which tokens carry loss, in which context, and where a template makes a new row necessary."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preftune.methods import Outputs, find
from preftune.models.attention import NAME
from preftune.models.policy import LanguageModel
from preftune.packing.batch import Totals, collate
from preftune.packing.chat import REASONS, ChatTokenizer, Tree
from preftune.packing.turns import join, one_record_a_turn, spoken
from preftune.records import Example, Message, Response
from preftune.training.setup import Read, tokenise
from tests import tiny
from tests.training.test_check import line, setup_of

END = 2
THINKING = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{{ m['content'].split('</think>')[-1] if m['role'] == 'assistant' else m['content'] }}{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Thoughts of earlier turns are left out, as reasoning models have it."""
GENERATION = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""tests/tiny.py's template with the markers that TRL finds assistant turns by."""


def chat(template: str | None = tiny.TEMPLATE, **options) -> ChatTokenizer:
    return ChatTokenizer(tiny.tokenizer(template=template, **options))


def talk(*texts: str, roles: str = "ua", system: str = "", **fields) -> Example:
    """A conversation whose turns go round the roles (u, a, t); the last is the response."""
    names = {"u": "user", "a": "assistant", "t": "tool"}
    turns = [Message(names[roles[i % len(roles)]], text) for i, text in enumerate(texts)]
    opening = (Message("system", system),) if system else ()
    return Example((*opening, *turns[:-1]), (Response(turns[-1].content, **fields),), id="x", where="talk.jsonl:3")


TALK = talk("What is the sea?", "Water.", "And the sky?", "Air. ", "And I?", "Both, then.", system="Be brief.")


def rows(tokenizer: ChatTokenizer, example: Example, max_length: int | None = None) -> list[Tree]:
    result = tokenizer.tokenize([example], max_length, every_turn=True)
    assert result.kept == 1 and not result.dropped
    return result.trees


def said(tokenizer: ChatTokenizer, trees: list[Tree]) -> list[str]:
    return [tokenizer.decode(ids, special=True) for tree in trees for ids, _ in spoken(tree)]


# ---------------------------------------------------------------- which tokens


def test_every_assistant_turn_with_its_end_carries_loss_and_nothing_else_does() -> None:
    tokenizer = chat()
    (tree,) = rows(tokenizer, TALK)
    assert said(tokenizer, [tree]) == ["Water.<|end|>", "Air. <|end|>", "Both, then.<|end|>"]
    whole = tokenizer.tokenizer.apply_chat_template(
        [*({"role": m.role, "content": m.content} for m in TALK.prompt), {"role": "assistant", "content": "Both, then."}], tokenize=False
    )
    ids = [*tree.prompt, *tree.responses[0]]
    assert tokenizer.decode(ids, special=True) + "\n" == whole
    assert tree.prompt.tolist() == tokenizer.encode_prompt(TALK.prompt[:2])
    batch = collate([tree])
    assert batch.targets.tolist() == np.concatenate([ids for ids, _ in spoken(tree)]).tolist()
    assert (batch.targets == END).sum() == 3 == (batch.length.sum() > 0) * 3
    for at, target in zip(batch.predict.tolist(), batch.targets.tolist(), strict=True):
        assert batch.input_ids[at + 1] == target


def test_tools_and_systems_never_carry_loss() -> None:
    tokenizer = chat()
    trees = rows(tokenizer, talk("sum?", "call", "1 + 1 = 2", "Two.", "sure?", "call again", "2", "Yes.", roles="uata", system="Help."))
    assert said(tokenizer, trees) == ["call<|end|>", "Two.<|end|>", "call again<|end|>", "Yes.<|end|>"]


@pytest.mark.parametrize(
    "example", [talk("Sea?", "Water."), Example("Sea:", (Response("Water."),), id="x"), talk("a", "b", "c", roles="uua")]
)
def test_without_a_history_of_answers_all_is_as_before(example: Example) -> None:
    tokenizer = chat()
    (every,), (last,) = rows(tokenizer, example), tokenizer.tokenize([example], None).trees
    assert every.carries is None and every.prompt.tolist() == last.prompt.tolist()
    assert [r.tolist() for r in every.responses] == [r.tolist() for r in last.responses]


def test_a_greeting_answers_nothing_and_an_empty_turn_teaches_nothing() -> None:
    tokenizer = chat()
    assert said(tokenizer, rows(tokenizer, talk("Hello!", "Sea?", " ", "Well?", "Water.", roles="au"))) == ["Water.<|end|>"]


def test_of_several_responses_each_follows_its_prompt_and_history_is_learned_once() -> None:
    tokenizer = chat()
    example = dataclasses.replace(TALK, responses=(Response("Both."), Response("Neither.")))
    history, last = rows(tokenizer, example)
    assert said(tokenizer, [history]) == ["Water.<|end|>", "Air. <|end|>"] and said(tokenizer, [last]) == [
        "Both.<|end|>",
        "Neither.<|end|>",
    ]
    assert last.prompt.tolist() == tokenizer.encode_prompt(TALK.prompt)
    method = find("sft")
    knobs = method.knobs(turns="all")
    ranked = dataclasses.replace(example, responses=(Response("Both.", rank=2), Response("Neither.", rank=1)))
    result = tokenizer.tokenize([ranked], None, keep=lambda t: method.keep(t, knobs), every_turn=method.every_turn(knobs))
    assert said(tokenizer, result.trees) == ["Water.<|end|>", "Air. <|end|>", "Neither.<|end|>"] and len(result.trees) == 1


# ---------------------------------------------------------------- in which context


THOUGHTS = talk("1+1?", "<think>one more</think>2", "2+1?", "<think>again</think>3", "sure?", "Yes.")


def test_regression_26_a_template_that_drops_thoughts_gets_a_row_for_each_turn_it_rewrites() -> None:
    tokenizer = chat(THINKING)
    trees = rows(tokenizer, THOUGHTS)
    assert [len(spoken(t)) for t in trees] == [1, 1, 1]
    assert said(tokenizer, trees) == ["<think>one more</think>2<|end|>", "<think>again</think>3<|end|>", "Yes.<|end|>"]
    for tree, turn in zip(trees, (1, 3, 5), strict=True):
        assert tree.prompt.tolist() == tokenizer.encode_prompt(THOUGHTS.prompt[:turn])
    plain = dataclasses.replace(THOUGHTS, prompt=(*THOUGHTS.prompt[:3], Message("assistant", "3"), *THOUGHTS.prompt[4:]))
    assert [len(spoken(t)) for t in rows(tokenizer, plain)] == [1, 2]


def test_without_a_template_an_answers_end_is_not_in_its_history_so_each_turn_has_its_row() -> None:
    tokenizer = chat(None)
    trees = rows(tokenizer, TALK)
    assert said(tokenizer, trees) == [" Water.<|end|>", " Air. <|end|>", " Both, then.<|end|>"] and len(trees) == 3


TEXT = st.text(st.sampled_from("the in: an.\né<think></think> "), min_size=1, max_size=12).filter(str.strip)
TEMPLATES = {"plain": chat(), "thinking": chat(THINKING), "none": chat(None), "bos": chat("{{ bos_token }}" + THINKING)}


@pytest.mark.parametrize("name", TEMPLATES)
@given(st.lists(TEXT, min_size=2, max_size=8), st.sampled_from(["ua", "uaa", "uat"]), st.none() | st.integers(8, 90))
def test_regression_03_05_24_26_each_turn_has_its_own_prompt_text_and_one_end(name, texts, roles, max_length) -> None:
    """Brute force: of each turn the prompt as at inference, the text, the end token; cut at the window, and every turn exactly once."""
    tokenizer = TEMPLATES[name]
    example = talk(*texts, roles=roles)
    result = tokenizer.tokenize([example], max_length, every_turn=True)
    assert result.kept + sum(result.dropped.values()) == 1 and set(result.dropped) <= set(REASONS)
    expected = []
    for k, turn in enumerate((*example.prompt, Message("assistant", example.responses[0].text))):
        if k and (turn.role == "assistant" or k == len(example.prompt)):
            prompt = tokenizer.encode_prompt(example.prompt[:k])
            gap = " " if name == "none" else ""
            body = tokenizer.tokenize([Example(example.prompt[:k], (Response(turn.content),))], None).trees[0].responses[0].tolist()
            assert tokenizer.decode(body, special=True) == gap + turn.content + "<|end|>"
            body = body if max_length is None else body[: max(0, max_length - len(prompt))]
            expected += [(prompt, body)] if body else []
    found = []
    for tree in result.trees:
        ids, carries = tree.responses[0], tree.carries[0] if tree.carries else np.ones(len(tree.responses[0]), dtype=bool)
        assert max_length is None or tree.tokens <= max_length
        starts = [i for i in range(len(ids)) if carries[i] and (i == 0 or not carries[i - 1])]
        for start, (run, finished) in zip(starts, spoken(tree), strict=True):
            found.append(([*tree.prompt.tolist(), *ids[:start].tolist()], run.tolist()))
            assert finished == (run[-1] == END) and (run == END).sum() <= 1
    assert found == expected


def test_regression_25_only_what_carries_loss_keeps_a_record() -> None:
    """The window ends before the last turn, inside the second, and before the first."""
    tokenizer = chat()
    first, second, third = (len(tokenizer.encode_prompt(TALK.prompt[:k])) for k in (2, 4, 6))
    (tree,) = rows(tokenizer, TALK, third)
    assert said(tokenizer, [tree]) == ["Water.<|end|>", "Air. <|end|>"]
    result = tokenizer.tokenize([TALK], second + 1, every_turn=True)
    assert said(tokenizer, result.trees) == ["Water.<|end|>", "A"] and result.trees[0].finished == (False,)
    assert result.truncated_responses == 2, "one turn is cut, one lies behind the window"
    assert said(tokenizer, tokenizer.tokenize([TALK], second, every_turn=True).trees) == ["Water.<|end|>"]
    assert tokenizer.tokenize([TALK], first, every_turn=True).dropped == Counter(prompt_too_long=1)


def test_a_fault_in_any_turn_drops_the_record_by_name() -> None:
    broken = talk("Sea?", "Water.<|end|>\n<|user|>Sky?", "And the sky?", "Air.")
    result = chat().tokenize([broken, TALK], None, every_turn=True)
    assert result.dropped == Counter(text_after_turn_end=1) and result.kept == 1
    assert result.dropped_where == {"text_after_turn_end": ["talk.jsonl:3"]}


def test_regression_26_rows_are_records_kept_and_dropped_however_many_trees_they_give() -> None:
    method = find("sft")
    examples = [THOUGHTS, talk("a" * 100, "b"), TALK]
    side = Read(5, examples, Counter(bad=2), {}, "test", {})
    records = tokenise(side, chat(THINKING), method, method.knobs(turns="all"), 90)
    assert (records.rows, records.kept, dict(records.dropped)) == (5, 2, {"bad": 2, "prompt_too_long": 1}) and len(records.trees) == 4
    assert "2 kept in 4 parts" in records.sentence()
    last = tokenise(side, chat(THINKING), method, method.knobs(), 90)
    assert last.kept == len(last.trees) == 2 and "parts" not in last.sentence()


# ---------------------------------------------------------------- in training


def loss_and_gradient(trees: list[Tree], parts: list[list[Tree]] | None = None, inner=None):
    inner = inner or tiny.model(seed=1, max_position_embeddings=1024)
    inner.set_attn_implementation(NAME)
    model, method = LanguageModel(inner), find("sft")
    total = 0.0
    for part in parts or [trees]:
        batch = collate(part, Totals.of(trees), method.reduction)
        loss, _ = method.loss(Outputs(token_logp=model(batch)), batch, method.knobs())
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in inner.named_parameters()}


def assert_same(one, other, tolerance: float = 1e-4) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        size = gradient.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(other[1][name] / size, gradient / size, atol=tolerance, rtol=0)


def test_one_row_gives_the_loss_and_gradient_of_a_row_for_each_turn() -> None:
    tokenizer = chat()
    turns = [tokenizer.tokenize([turn], None).trees[0] for turn in one_record_a_turn(TALK)]
    joined = join(turns)
    assert len(turns) == 3 and len(joined) == 1 and joined[0].tokens < sum(t.tokens for t in turns) / 1.5
    assert_same(loss_and_gradient(joined), loss_and_gradient(turns))


def test_regression_22_a_records_loss_is_the_same_whatever_is_packed_beside_it() -> None:
    tokenizer = chat()
    others = [talk("why?", "x" * 30, "so?", "y" * 9), talk("no", "z"), tiny.tree(9, (4, 7))]
    trees = [*rows(tokenizer, TALK), *(t for o in others for t in (rows(tokenizer, o) if isinstance(o, Example) else [o]))]
    model = LanguageModel(tiny.model(seed=1, max_position_embeddings=1024))
    model.hf.set_attn_implementation(NAME)
    model.backbone.use_packed(True)
    alone = model(collate(trees[:1]))
    for beside, before in ((trees[:2], []), (trees, []), (trees[::-1], trees[1:])):
        batch, start = collate(beside), sum(t.response_tokens for t in before)
        torch.testing.assert_close(model(batch)[start : start + len(alone)], alone, atol=1e-4, rtol=1e-5)
    assert_same(loss_and_gradient(trees), loss_and_gradient(trees, [[t] for t in trees]))


def test_loss_and_gradient_equal_trl_with_assistant_only_loss(tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    examples = [TALK, talk("Sea?", "Water."), talk("sum?", "call", "1 + 1 = 2", "Two.", roles="uata"), talk("a", "b c d", "e", "the fine")]
    say = lambda e: [*({"role": m.role, "content": m.content} for m in e.prompt), {"role": "assistant", "content": e.responses[0].text}]
    policy = tiny.model(seed=1, max_position_embeddings=1024)
    trainer = trl.SFTTrainer(
        model=policy,
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=len(examples),
            assistant_only_loss=True,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
            max_length=None,
        ),
        train_dataset=datasets.Dataset.from_list([{"messages": say(e)} for e in examples]),
        processing_class=tiny.tokenizer(template=GENERATION),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model.train(), dict(batch), num_items_in_batch=(batch["labels"] != -100).sum())
    loss.backward()
    theirs = loss.item(), {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    tokenizer = chat(GENERATION)
    trees = [tree for e in examples for tree in rows(tokenizer, e)]
    targets = sorted(collate(trees).targets.tolist())
    assert targets == sorted(batch["labels"][batch["labels"] != -100].tolist())
    assert_same(loss_and_gradient(trees, inner=tiny.model(seed=1, max_position_embeddings=1024)), theirs)


# ---------------------------------------------------------------- preftune check


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory):
    """Conversations with every turn learned, under a template that rewrites and a window that cuts."""
    folder = tmp_path_factory.mktemp("turns")
    model = tiny.save(folder / "model", max_position_embeddings=1024)
    (folder / "template.jinja").write_text(THINKING)
    say = lambda e: [*({"role": m.role, "content": m.content} for m in e.prompt), {"role": "assistant", "content": e.responses[0].text}]
    talks = [TALK, THOUGHTS, talk("Sea?", "Water."), talk("a", "b" * 9, "c", "d" * 200, "e", "f"), talk("u", "Hm.", "x", "z", "v", "w")]
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": say(e)}) + "\n" for e in talks))
    words = ("method.turns=all", f"data.path={folder / 'talks.jsonl'}", "eval_fraction=0", "eval_every=null")
    return setup_of("sft", model, *words, f"chat_template={folder / 'template.jinja'}")


def test_check_passes_and_looks_at_every_turn(setup) -> None:
    turns = [t for tree in setup.train.trees for t in spoken(tree)]
    assert len(turns) > len(setup.train.trees) and any(not finished for _, finished in turns)
    found = line(setup, "responses survive tokenising")
    assert found.passed and f"in {sum(finished for _, finished in turns)} finished" in found.detail
    for name in ("one BOS", "EOS on finished responses", "every record carries loss", "packed = padded", "first loss"):
        assert line(setup, name).passed


def plant(setup, change):
    """The setup with one tree of several turns changed."""
    at, tree = next((i, t) for i, t in enumerate(setup.train.trees) if len(spoken(t)) > 1)
    trees = [*setup.train.trees[:at], *change(tree), *setup.train.trees[at + 1 :]]
    return tree, dataclasses.replace(setup, train=dataclasses.replace(setup.train, trees=trees))


def test_regression_26_check_fails_on_a_turn_that_is_changed_lost_or_without_its_end(setup) -> None:
    def changed(ids_and_carries):
        def change(tree: Tree) -> list[Tree]:
            ids, carries = tree.responses[0].copy(), tree.carries[0].copy()
            ids_and_carries(ids, carries)
            return [dataclasses.replace(tree, responses=(ids,), carries=(carries,))]

        return change

    end_of_first = lambda carries: int(np.flatnonzero(~carries)[0]) - 1
    name = "responses survive tokenising"

    def other_word(ids, carries):
        ids[1] = 300 if ids[1] != 300 else 301

    def muted(ids, carries):
        carries[: end_of_first(carries) + 1] = False

    def no_end(ids, carries):
        carries[end_of_first(carries)] = False

    def prompt_learned(ids, carries):
        carries[:] = True

    for planted in (other_word, muted, no_end, prompt_learned):
        tree, broken = plant(setup, changed(planted))
        found = line(broken, name)
        assert not found.passed and tree.where in found.detail, planted
    tree, broken = plant(setup, changed(no_end))
    assert not line(broken, "EOS on finished responses").passed
