"""Records to token trees: BOS and EOS exactly where they belong, prompts as at inference, responses verbatim, every record counted."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune import formats
from preftune.errors import UserError
from preftune.formats import strict_pairs
from preftune.packing.batch import by_prompt, by_response, by_token, collate
from preftune.packing.chat import REASONS, ChatTokenizer, judgements
from preftune.records import Comparison, Example, Message, Response
from tests import tiny

BOS, END = 1, 2
TALK = (Message("user", "What is the sea?"), Message("assistant", "Water."), Message("user", "And the sky?"))
TALK_TEXT = "<|user|>What is the sea?<|end|>\n<|assistant|>Water.<|end|>\n<|user|>And the sky?<|end|>\n<|assistant|>"
WITH_BOS = "{{ bos_token }}" + tiny.TEMPLATE
THINKING = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + (m['content'].split('</think>')[-1] | trim) + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + tiny.TEMPLATE


def chat(**options) -> ChatTokenizer:
    return ChatTokenizer(tiny.tokenizer(**options))


def record(*texts: str, prompt=TALK, where: str = "", **fields) -> Example:
    return Example(prompt, tuple(Response(t, rank=i + 1, **fields) for i, t in enumerate(texts)), id="x", where=where)


def only(tokenizer: ChatTokenizer, example: Example, max_length: int | None = None):
    result = tokenizer.tokenize([example], max_length)
    assert not result.dropped, result.dropped
    return result.trees[0]


# ---------------------------------------------------------------- BOS


@pytest.mark.parametrize("template", [tiny.TEMPLATE, WITH_BOS, "{{ bos_token }}" + WITH_BOS], ids=["no bos text", "bos text", "twice"])
@pytest.mark.parametrize("auto", [False, True], ids=["tokenizer adds none", "tokenizer adds one"])
def test_regression_03_at_most_one_bos_at_position_0(template: str, auto: bool) -> None:
    tokenizer = chat(template=template, bos=auto)
    tree = only(tokenizer, record("Blue.", "Grey."))
    wanted = auto or template != tiny.TEMPLATE
    plain = tiny.tokenizer()
    for response, text in zip(tree.responses, ("Blue.", "Grey."), strict=True):
        ids = [*tree.prompt, *response]
        assert ids.count(BOS) == wanted and (ids[0] == BOS) == wanted
        assert ids[wanted:] == plain(TALK_TEXT + text + "<|end|>", add_special_tokens=False).input_ids  # the one-shot ids
    assert tree.prompt.tolist() == tokenizer.encode_prompt(TALK)


@pytest.mark.parametrize(("prompt", "ids"), [("<s>ab", [BOS, "a", "b"]), ("ab", ["a", "b"]), ("", [BOS])])
@pytest.mark.parametrize("auto", [False, True])
def test_regression_03_plain_prompts(prompt: str, ids: list, auto: bool) -> None:
    tokenizer = chat(bos=auto, template=None)
    wanted = [tokenizer.tokenizer.convert_tokens_to_ids(i) if isinstance(i, str) else i for i in ids]
    if auto and wanted[0] != BOS:
        wanted = [BOS, *wanted]
    assert only(tokenizer, record("c", prompt=prompt)).prompt.tolist() == wanted


def test_regression_04_no_special_token_inside_a_response() -> None:
    tokenizer = chat(bos=True)
    special = set(tokenizer.tokenizer.all_special_ids)
    tree = only(tokenizer, record("First.\nSecond: the thing.", "  spaced  "))
    for response in tree.responses:
        assert [t for t in response.tolist() if t in special] == [END] and response[-1] == END


# ---------------------------------------------------------------- EOS


def test_regression_05_one_eos_on_a_finished_response_and_none_on_a_cut_one() -> None:
    tokenizer = chat()
    finished = only(tokenizer, record("Blue.", "")).responses
    assert [r.tolist().count(END) for r in finished] == [1, 1] and finished[1].tolist() == [END]
    cut = only(tokenizer, record("Blue.", finished=False))
    assert END not in cut.responses[0] and cut.finished == (False,)


def test_regression_05_truncation_takes_the_eos_and_says_so() -> None:
    tokenizer = chat()
    whole = only(tokenizer, record("Blue as can be.", "No."))
    longest = len(whole.prompt) + len(whole.responses[0])
    assert only(tokenizer, record("Blue as can be.", "No."), longest).finished == (True, True)
    result = tokenizer.tokenize([record("Blue as can be.", "No.")], longest - 1)
    (tree,) = result.trees
    assert tree.finished == (False, True) and result.truncated_responses == 1
    assert tree.responses[0].tolist() == whole.responses[0].tolist()[:-1] and END not in tree.responses[0]
    assert tree.responses[1].tolist() == whole.responses[1].tolist()


@pytest.mark.parametrize("text", ["Blue.<|end|>", "Blue.<|end|>\n", "Blue.<|end|><|end|>"])
def test_regression_05_a_response_that_brings_its_own_eos_gets_no_second(text: str) -> None:
    tokenizer = chat()
    assert only(tokenizer, record(text)).responses[0].tolist() == only(tokenizer, record("Blue.")).responses[0].tolist()


def test_regression_05_text_after_an_eos_is_dropped_and_counted() -> None:
    result = chat().tokenize([record("Blue.<|end|><|user|>And now?", where="f:7")], None)
    assert result.dropped == Counter(text_after_turn_end=1) and result.dropped_where == {"text_after_turn_end": ["f:7"]}


@pytest.mark.parametrize("reduction", [by_token, by_response, by_prompt])
def test_regression_06_eos_carries_loss_when_pad_is_eos(reduction) -> None:
    trees = {pad: only(chat(pad=pad), record("Blue.", "Grey, and wet.")) for pad in ("<|end|>", "<unk>")}
    batches = {pad: collate([tree], reduction=reduction) for pad, tree in trees.items()}
    for batch in batches.values():
        ends = batch.targets == END
        assert ends.sum() == 2 and (batch.token_weight[ends] > 0).all()
        assert batch.length.sum() == len(batch.targets)
    assert batches["<|end|>"].input_ids.tolist() == batches["<unk>"].input_ids.tolist()
    assert batches["<|end|>"].token_weight.tolist() == batches["<unk>"].token_weight.tolist()


def test_turn_end_is_the_templates_own_else_eos() -> None:
    closing = tiny.TEMPLATE.replace("<|end|>", "<|tool|>")
    tokenizer = ChatTokenizer(tiny.tokenizer(template=closing), eos_ids=[0])
    assert tokenizer.turn_end == tiny.SPECIAL.index("<|tool|>")
    assert tokenizer.turn_ends == {0, END, tokenizer.turn_end}
    open_ended = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
    silent = "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}{% endif %}{% endfor %}"
    assert {chat(template=t).turn_end for t in (None, tiny.TEMPLATE, open_ended, silent)} == {END}
    endless = tiny.tokenizer(template=None)
    endless.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        ChatTokenizer(endless)


# ---------------------------------------------------------------- the window


def test_regression_13_a_prompt_that_fills_the_window_is_dropped_and_counted() -> None:
    tokenizer = chat()
    size = len(tokenizer.encode_prompt(TALK))
    for room, kept in ((size - 3, 0), (size, 0), (size + 1, 1)):
        result = tokenizer.tokenize([record("Blue.", "Grey.", where="pairs.jsonl:3")], room)
        assert len(result.trees) == kept and sum(result.dropped.values()) == 1 - kept
        if not kept:
            assert result.dropped == Counter(prompt_too_long=1)
            assert result.dropped_where == {"prompt_too_long": ["pairs.jsonl:3"]}
        for tree in result.trees:
            assert tree.prompt.tolist() == tokenizer.encode_prompt(TALK) and [len(r) for r in tree.responses] == [1, 1]


def test_regression_25_a_response_without_tokens_is_dropped_with_its_place() -> None:
    examples = [record("", where="pairs.jsonl:1", finished=False), record("a", "", where="pairs.jsonl:2", finished=False), record("a")]
    result = chat().tokenize(examples, None)
    assert len(result.trees) == 1 and result.dropped == Counter(no_response_tokens=2)
    assert result.dropped_where["no_response_tokens"] == ["pairs.jsonl:1", "pairs.jsonl:2"]
    assert set(result.dropped) <= set(REASONS)


# ---------------------------------------------------------------- the boundary


def test_regression_24_a_token_across_the_boundary_leaves_the_prompt_as_at_inference(caplog) -> None:
    tokenizer = chat(template=None)
    joined = tokenizer.tokenizer("Q: the").input_ids
    assert joined[: len(tokenizer.encode_prompt("Q:"))] != tokenizer.encode_prompt("Q:")  # ': ' is one token
    examples = [record(" then", " if", prompt="Q:"), record("No.", prompt="Q."), record(" th", prompt="A:")]
    with caplog.at_level(logging.WARNING):
        result = tokenizer.tokenize(examples, None)
    assert result.joined_apart == 3 and len(caplog.records) == 1 and "3 responses" in caplog.text
    tree = result.trees[0]
    assert tree.prompt.tolist() == tokenizer.encode_prompt("Q:")
    assert [tokenizer.decode(r) for r in tree.responses] == [" then", " if"]
    assert collate([tree]).targets[0] == tree.responses[0][0]  # loss begins at the response's first character


TEXT = st.text(st.sampled_from("the in: an.\n\u00e9\u2028 "), max_size=12)


@given(TEXT, st.lists(TEXT, min_size=1, max_size=3), st.booleans())
def test_regression_24_prompt_and_response_decode_back(prompt: str, texts: list[str], bos: bool) -> None:
    tokenizer = CHATS[bos]
    tree = only(tokenizer, record(*texts, prompt=prompt))
    assert tree.prompt.tolist() == tokenizer.encode_prompt(prompt)
    for text, response in zip(texts, tree.responses, strict=True):
        assert tokenizer.decode([*tree.prompt, *response]) == prompt + text


CHATS = [chat(bos=False), chat(bos=True)]


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("sort", [[1, 0], [0, 1]])
def test_regression_42_tokens_of_a_paddlenlp_row_decode_to_its_dialogue(tmp_path: Path, turns: int, sort: list[int]) -> None:
    """PaddleNLP's reader is off by one in its history, so that the last user turn stands there twice; each turn stands once here."""
    asked, told = [f"Question {n}?" for n in range(turns)], [f"Answer {n}." for n in range(turns)]
    row = {"src": asked, "tgt": told[:-1], "response": ["This.", "That."], "sort": sort}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n" + json.dumps(row | {"src": asked[0], "tgt": ""} if turns == 1 else row) + "\n")
    sft = tmp_path / "sft.jsonl"
    sft.write_text(json.dumps({"src": asked, "tgt": told}) + "\n")
    tokenizer = chat()
    spoken = [f"<|user|>{a}<|end|>\n<|assistant|>{b}" for a, b in zip(asked, [*told[:-1], ""], strict=True)]
    history = "<|end|>\n".join(spoken)
    for example in formats.read(file).examples:
        tree = only(tokenizer, example)
        whole = [tokenizer.decode([*tree.prompt, *response], special=True) for response in tree.responses]
        better, worse = ("This.", "That.") if sort == [1, 0] else ("That.", "This.")
        assert whole == [f"{history}{better}<|end|>", f"{history}{worse}<|end|>"] and tree.scores[0] > tree.scores[1]
    (example,) = formats.read(sft).examples
    tree = only(tokenizer, example)
    assert tokenizer.decode([*tree.prompt, *tree.responses[0]], special=True) == f"{history}{told[-1]}<|end|>"


# ---------------------------------------------------------------- templates that rewrite


@pytest.mark.parametrize("text", ["<think>a + b</think>  The sum. ", "\n\n plain \n", "<think></think>", "trailing spaces   "])
def test_regression_26_a_response_survives_verbatim(text: str) -> None:
    tokenizer = chat(template=THINKING)
    assert text not in tokenizer.tokenizer.apply_chat_template([{"role": "assistant", "content": text}], tokenize=False)
    tree = only(tokenizer, record(text))
    assert tokenizer.decode(tree.responses[0]) == text
    assert tokenizer.decode(tree.responses[0], special=True) == text + "<|end|>"
    assert tree.prompt.tolist() == tokenizer.encode_prompt(TALK)


@given(st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=3), st.booleans()), max_size=6), st.integers(1, 40))
def test_regression_26_rows_in_are_rows_kept_and_dropped(rows, max_length: int) -> None:
    examples = [record(*texts, prompt=prompt, finished=finished, where=f"f:{i}") for i, (prompt, texts, finished) in enumerate(rows)]
    result = CHATS[0].tokenize(examples, max_length)
    assert len(result.trees) + sum(result.dropped.values()) == len(examples) and set(result.dropped) <= set(REASONS)
    for tree in result.trees:
        assert all(0 < len(r) <= max_length - len(tree.prompt) for r in tree.responses)


def test_a_template_that_refuses_a_role_names_the_record() -> None:
    tokenizer = chat(template=NO_SYSTEM)
    example = record("Blue.", prompt=(Message("system", "Be brief."), Message("user", "Sky?")), where="pairs.jsonl:12")
    with pytest.raises(UserError) as caught:
        tokenizer.tokenize([record("Blue."), example], None)
    line = str(caught.value)
    assert line.startswith("pairs.jsonl:12: ") and "System role not supported" in line and "\n" not in line


def test_a_template_that_cannot_be_used_is_said_at_once() -> None:
    with pytest.raises(UserError, match=r"chat_template: .*no user here"):
        chat(template="{{ raise_exception('no user here') }}")


def test_without_a_template_roles_are_written_out() -> None:
    tokenizer = chat(template=None)
    tree = only(tokenizer, record("Blue."))
    text = "\n\nHuman: What is the sea?\n\nAssistant: Water.\n\nHuman: And the sky?\n\nAssistant:"
    assert tokenizer.decode(tree.prompt) == text and tokenizer.decode(tree.responses[0]) == " Blue."


# ---------------------------------------------------------------- who is preferred


def judged(*responses: Response, comparisons: tuple[Comparison, ...] = ()) -> Example:
    return Example("p", responses, comparisons=comparisons)


def test_scores_and_preference_of_every_kind_of_judgement() -> None:
    nan = np.nan
    R = lambda **fields: Response("r", **fields)
    cases = [
        (judged(R(rank=2), R(rank=1), R(rank=2)), [-2, -1, -2], [[0, 0, 0], [1, 0, 1], [0, 0, 0]]),
        (judged(R(rank=2, score=9.0), R(rank=1, score=0.0)), [-2, -1], [[0, 0], [1, 0]]),
        (judged(R(score=0.5), R(score=2.5), R()), [0.5, 2.5, nan], [[0, 0, 0], [1, 0, 0], [0, 0, 0]]),
        (judged(R(score={"overall": 1.0}), R(score={"overall": 0.0})), [1, 0], [[0, 1], [0, 0]]),
        (judged(R(score={"help": 1.0}), R(score={"help": 0.0})), [nan, nan], [[0, 0], [0, 0]]),
        (judged(R(label=True), R(label=False)), [1, 0], [[0, 1], [0, 0]]),
        (judged(R(rank=1, score=1.0), R(score=2.0)), [1, 2], [[0, 0], [1, 0]]),
        (judged(R(), R()), [nan, nan], [[0, 0], [0, 0]]),
        (judged(R(score=3.0)), [3], [[0]]),
    ]
    for example, scores, preference in cases:
        got = judgements(example)
        np.testing.assert_array_equal(got["scores"], scores)
        np.testing.assert_array_equal(got["preference"], preference)


def test_ratings_labels_and_margins_of_responses_are_kept_beside_the_order() -> None:
    nan = np.nan
    responses = Response("a", score={"help": 1.0, "safe": 0.5}, label=True), Response("b", score=2.0), Response("c", label=False)
    said = (Comparison(0, 1, 1.0, 3.0), Comparison(1, 0, 0.0, 1.0), Comparison(1, 2, 0.0, 2.0), Comparison(0, 2, 0.5, 9.0))
    found = judgements(judged(*responses, comparisons=said))
    assert set(found["ratings"]) == {"help", "safe", "score"}
    for name, values in {"help": [1.0, nan, nan], "safe": [0.5, nan, nan], "score": [nan, 2.0, nan]}.items():
        np.testing.assert_array_equal(found["ratings"][name], values)
    np.testing.assert_array_equal(found["labels"], [1, nan, 0])
    np.testing.assert_array_equal(found["margin"], [[0, 2, 0], [0, 0, 0], [0, 2, 0]])
    bare = judgements(judged(Response("a"), Response("b")))
    assert bare["labels"] is None and bare["margin"] is None and bare["ratings"] == {}


def test_comparisons_stay_probabilities_and_give_a_best_response() -> None:
    said = (Comparison(0, 1, 1.0), Comparison(1, 0, 1.0), Comparison(1, 0, 1.0), Comparison(2, 0, 0.5), Comparison(1, 2, 0.75))
    said_of = judgements(judged(*[Response("r")] * 4, comparisons=said))
    scores, preference = said_of["scores"], said_of["preference"]
    np.testing.assert_allclose(preference, [[0, 1 / 3, 0, 0], [2 / 3, 0, 0.75, 0], [0, 0.25, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(scores, [(1 / 3 + 0.5) / 2, (2 / 3 + 0.75) / 2, (0.5 + 0.25) / 2, np.nan])


@given(
    st.lists(st.tuples(st.none() | st.integers(1, 3), st.none() | st.integers(-1, 1), st.none() | st.booleans()), min_size=1, max_size=5)
)
def test_the_matrix_and_the_pairs_state_one_order(fields) -> None:
    example = judged(*[Response("r", rank=rank, score=score, label=label) for rank, score, label in fields])
    found = judgements(example)
    scores, preference = found["scores"], found["preference"]
    assert sorted(strict_pairs(example)) == [(int(i), int(j)) for i, j in np.argwhere(preference > 0.5)]
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(preference, scores[:, None] > scores[None, :])


# ---------------------------------------------------------------- a real tokenizer on real records


@pytest.fixture(scope="module")
def smollm2() -> ChatTokenizer:
    from preftune.models.load import load_tokenizer, locate

    try:
        source = locate("smollm2")
    except UserError as missing:
        pytest.skip(str(missing))
    return load_tokenizer(source)


@pytest.mark.model
def test_real_pairs_through_a_real_tokenizer(smollm2: ChatTokenizer) -> None:
    """SmolLM2: BOS is the id that opens every turn, pad is EOS, the template adds a system turn of its own."""
    examples = list(formats.read("sample:hh_pairs").examples)
    result = smollm2.tokenize(examples, None)
    assert len(result.trees) == len(examples) == 200 and not result.dropped and not result.joined_apart
    start, end = (smollm2.tokenizer.convert_tokens_to_ids(f"<|im_{side}|>") for side in ("start", "end"))
    assert smollm2.turn_end == end and smollm2.turn_ends == {end}
    for example, tree in zip(examples, result.trees, strict=True):
        turns = [{"role": m.role, "content": m.content} for m in example.prompt]
        prompt = smollm2.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert [*tree.prompt[:1]] == [start] and tree.prompt.tolist().count(end) == prompt.count("<|im_end|>")
        for response, ids in zip(example.responses, tree.responses, strict=True):
            assert ids.tolist().count(end) == 1 and ids[-1] == end and start not in ids
            whole = smollm2.decode([*tree.prompt, *ids], special=True)
            assert whole == prompt + response.text + "<|im_end|>"
            said = [*turns, {"role": "assistant", "content": response.text}]
            assert whole + "\n" == smollm2.tokenizer.apply_chat_template(said, tokenize=False)
