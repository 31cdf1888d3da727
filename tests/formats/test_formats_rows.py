"""One row at a time: what each format means, by hand-worked examples, and the named reason of every way to get it wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preftune.errors import UserError
from preftune.formats import REASONS, read, strict_pairs
from preftune.records import Comparison, Example, Message

U = lambda text: Message("user", text)
A = lambda text: Message("assistant", text)
S = lambda text: Message("system", text)
user = lambda text: {"role": "user", "content": text}
bot = lambda text: {"role": "assistant", "content": text}


@pytest.fixture
def one(tmp_path: Path):
    """Read a single row; the example, or the reason why there is none."""

    def read_one(row: Any, format: str = "auto") -> Example | str:
        path = tmp_path / "row.jsonl"
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        try:
            return read(path, format=format).examples[0]
        except UserError as error:
            assert "row.jsonl:1" in str(error) and "\n" not in str(error)
            return next(reason for reason in REASONS if f"1 {reason} (" in str(error))

    return read_one


def texts(example: Example) -> list[str]:
    return [response.text for response in example.responses]


# ---------------------------------------------------------------- HH


def test_hh_response_that_extends_the_other_leaves_the_prompt_alone(one) -> None:
    """A character prefix would cut inside the response (methods M, N.28); role boundaries do not."""
    example = one({"chosen": "\n\nHuman: hi\n\nAssistant: I am fine", "rejected": "\n\nHuman: hi\n\nAssistant: I am"})
    assert example.prompt == (U("hi"),)
    assert texts(example) == ["I am fine", "I am"]


def test_hh_several_turns_and_one_leading_blank_only(one) -> None:
    opening = "\n\nHuman: a\n\nAssistant:  b \n\nHuman: c  \n\nAssistant:"
    example = one({"chosen": opening + "  d", "rejected": opening + " e"})
    assert example.prompt == (U("a"), A(" b "), U("c  "))
    assert texts(example) == [" d", "e"]


def test_hh_role_marker_inside_a_response_stays_in_it(one) -> None:
    opening = "\n\nHuman: q"
    example = one({"chosen": opening + "\n\nAssistant: x", "rejected": opening + "\n\nAssistant: y\n\nAssistant:  z"})
    assert example.prompt == (U("q"),)
    assert texts(example) == ["x", "y\n\nAssistant:  z"]


def test_hh_response_that_extends_the_other_by_a_turn_leaves_both_a_response(one) -> None:
    short = "\n\nHuman: q\n\nAssistant: x"
    example = one({"chosen": short, "rejected": short + "\n\nAssistant: y"})
    assert example.prompt == (U("q"),) and texts(example) == ["x", "x\n\nAssistant: y"]


def test_hh_human_without_a_blank_line_is_text(one) -> None:
    row = {"chosen": "\n\nHuman: q\nHuman: r\n\nAssistant: x\nHuman: s", "rejected": "\n\nHuman: q\nHuman: r\n\nAssistant: y"}
    example = one(row)
    assert example.prompt == (U("q\nHuman: r"),) and texts(example)[0] == "x\nHuman: s"


def test_hh_shared_assistant_turn_before_the_last_is_prompt(one) -> None:
    opening = "\n\nHuman: q\n\nAssistant: wait"
    example = one({"chosen": opening + "\n\nAssistant: x", "rejected": opening + "\n\nAssistant: y"})
    assert example.prompt == (U("q"), A("wait")) and texts(example) == ["x", "y"]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("\n\nHuman: q\n\nAssistant: ", "\n\nHuman: q\n\nAssistant: y", "empty_response"),
        ("\n\nHuman: q\n\nAssistant: x", "\n\nHuman: q\n\nAssistant:", "empty_response"),
        (None, "\n\nHuman: q\n\nAssistant: y", "empty_response"),
        ("\n\nHuman: q\n\nAssistant: x", "\n\nHuman: q\n\nAssistant: x", "identical_responses"),
        ("\n\nHuman: q\n\nAssistant: x", "\n\nHuman: r\n\nAssistant: x", "prompts_differ"),
        ("\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant: s", "\n\nHuman: q\n\nAssistant: y", "diverges_before_response"),
        ("\n\nHuman: q\n\nAssistant: x\n\nHuman: r", "\n\nHuman: q\n\nAssistant: x\n\nHuman: s", "diverges_before_response"),
        ("plain", "text", "not_a_transcript"),
        ("\n\nHuman: \n\nAssistant: x", "\n\nHuman: \n\nAssistant: y", "empty_prompt"),
        (3, "\n\nHuman: q\n\nAssistant: y", "wrong_type"),
    ],
)
def test_hh_reasons(one, chosen: Any, rejected: Any, reason: str) -> None:
    assert one({"chosen": chosen, "rejected": rejected}, "hh") == reason


# ---------------------------------------------------------------- TRL


def test_trl_plain_strings_stay_as_they_are(one) -> None:
    example = one({"prompt": "Q: 1+1?\nA:", "chosen": " 2", "rejected": " 3"})
    assert example.prompt == "Q: 1+1?\nA:" and texts(example) == [" 2", " 3"]


def test_trl_prompt_with_hh_markers_becomes_turns(one) -> None:
    example = one({"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " x", "rejected": "y"})
    assert example.prompt == (U("q"),) and texts(example) == ["x", "y"]


def test_trl_messages_explicit_and_implicit_are_the_same_record(one) -> None:
    explicit = one({"prompt": [user("a"), bot("b"), user("c")], "chosen": [bot("x")], "rejected": [bot("y")]})
    opening = [user("a"), bot("b"), user("c")]
    implicit = one({"chosen": [*opening, bot("x")], "rejected": [*opening, bot("y")]})
    assert explicit == implicit
    assert explicit.prompt == (U("a"), A("b"), U("c")) and [response.rank for response in explicit.responses] == [1, 2]


def test_ultrafeedback_binarized_does_not_repeat_its_prompt(one) -> None:
    row = {
        "prompt": "q",
        "prompt_id": "7",
        "chosen": [user("q"), bot("x")],
        "rejected": [user("q"), bot("y")],
        "messages": [user("q"), bot("x")],
        "score_chosen": 8.5,
        "score_rejected": 6,
    }
    example = one(row)
    assert example.prompt == (U("q"),) and texts(example) == ["x", "y"]
    assert [response.score for response in example.responses] == [8.5, 6.0]
    assert example.meta == {"prompt_id": "7", "messages": row["messages"]}


def test_trl_margin_is_the_strength_of_the_comparison(one) -> None:
    example = one({"prompt": "p", "chosen": "x", "rejected": "y", "margin": 2})
    assert example.comparisons == (Comparison(0, 1, 1.0, strength=2.0),)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": None, "chosen": "x", "rejected": "y"}, "empty_prompt"),
        ({"prompt": " ", "chosen": "x", "rejected": "y"}, "empty_prompt"),
        ({"prompt": [], "chosen": [bot("x")], "rejected": [bot("y")]}, "empty_prompt"),
        ({"prompt": "p", "chosen": "x", "rejected": None}, "empty_response"),
        ({"prompt": "p", "chosen": "x", "rejected": "x"}, "identical_responses"),
        ({"prompt": "p", "chosen": 1, "rejected": "x"}, "wrong_type"),
        ({"prompt": [user("p")], "chosen": [user("x")], "rejected": [bot("y")]}, "no_response"),
        ({"prompt": [user("p")], "chosen": [bot("x"), user("z"), bot("w")], "rejected": [bot("y")]}, "prompts_differ"),
        ({"chosen": [user("q"), bot("x"), user("r"), bot("s")], "rejected": [user("q"), bot("y")]}, "diverges_before_response"),
        ({"chosen": [user("q"), {"role": "robot", "content": "x"}], "rejected": [user("q"), bot("y")]}, "unknown_role"),
        ({"prompt": "p", "chosen": "x", "rejected": "y", "margin": "big"}, "bad_score"),
    ],
)
def test_trl_preference_reasons(one, row: dict, reason: str) -> None:
    assert one(row) == reason


@pytest.mark.parametrize(
    ("written", "meant"), [(True, True), (1, True), ("true", True), ("False", False), (0, False), (0.0, False), ("1", True)]
)
def test_kto_labels(one, written: Any, meant: bool) -> None:
    assert one({"prompt": "p", "completion": "c", "label": written}).responses[0].label is meant


def test_kto_bad_label(one) -> None:
    assert one({"prompt": "p", "completion": "c", "label": "good"}) == "bad_label"


def test_messages_keep_every_assistant_turn_and_tools(one) -> None:
    row = {
        "messages": [{"role": "system", "content": "s"}, user("a"), bot("<think>t</think>\nb"), user("c"), bot("d")],
        "tools": [{"name": "f"}],
    }
    example = one(row)
    assert example.prompt == (S("s"), U("a"), A("<think>t</think>\nb"), U("c")) and texts(example) == ["d"]
    assert example.meta == {"tools": [{"name": "f"}]}


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([user("a")], "no_response"),
        ([user("a"), bot(None)], "empty_response"),
        ([user("a"), {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}], "not_text"),
        ([{"role": "user", "content": [{"type": "image"}]}, bot("b")], "not_text"),
        ([bot("b")], "empty_prompt"),
        ([], "no_response"),
        ("hello", "wrong_type"),
        (["hello"], "wrong_type"),
    ],
)
def test_messages_reasons(one, turns: Any, reason: str) -> None:
    assert one({"messages": turns}) == reason


def test_text_parts_are_joined(one) -> None:
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, bot("c")]}
    assert one(row).prompt == (U("ab"),)


def test_name_of_a_turn_goes_to_meta(one) -> None:
    assert one({"messages": [{"role": "user", "content": "a", "name": "Ann"}, bot("b")]}).meta == {
        "turn_fields": [{"turn": 0, "name": "Ann"}]
    }


# ---------------------------------------------------------------- Alpaca, ShareGPT


def test_alpaca_with_system_and_history(one) -> None:
    example = one({"instruction": "i", "input": "", "output": "o", "system": "s", "history": [["a", "b"], ["c", "d"]]})
    assert example.prompt == (S("s"), U("a"), A("b"), U("c"), A("d"), U("i")) and texts(example) == ["o"]


def test_alpaca_preference_and_kto_tag(one) -> None:
    pair = one({"instruction": "i", "input": "x", "chosen": "b", "rejected": "w"})
    assert pair.prompt == (U("i\nx"),) and texts(pair) == ["b", "w"]
    assert one({"instruction": "i", "output": "o", "kto_tag": False}).responses[0].label is False


def test_sharegpt_maps_tools(one) -> None:
    turns = [("human", "a"), ("function_call", '{"f": 1}'), ("observation", "7"), ("gpt", "b")]
    example = one({"conversations": [{"from": role, "value": text} for role, text in turns]})
    assert [turn.role for turn in example.prompt] == ["user", "assistant", "tool"] and texts(example) == ["b"]


# ---------------------------------------------------------------- PaddleNLP


@pytest.mark.parametrize(("sort", "order"), [([1, 0], ["x", "y"]), ([0, 1], ["y", "x"]), ([2, 7.5], ["y", "x"]), (["1", "0"], ["x", "y"])])
def test_paddlenlp_higher_sort_wins(one, sort: list, order: list[str]) -> None:
    """Oracle of methods M: [1, 0] ranks the first response 1, [0, 1] the second."""
    example = one({"src": ["q"], "tgt": [], "response": ["x", "y"], "sort": sort})
    assert texts(example) == order and [response.rank for response in example.responses] == [1, 2]


def test_regression_42_paddlenlp_multi_turn_decodes_to_the_dialogue(one) -> None:
    """PaddleNLP's own reader put the last src in again and lost its place in tgt."""
    row = {"src": ["u1", "u2", "u3"], "tgt": ["a1", "a2"], "response": ["good", "bad"], "sort": [1, 0]}
    example = one(row)
    spoken = " / ".join(f"{turn.role[0].upper()} {turn.content}" for turn in (*example.prompt, A(example.responses[0].text)))
    assert spoken == "U u1 / A a1 / U u2 / A a2 / U u3 / A good"
    sft = one({"src": ["u1", "u2", "u3"], "tgt": ["a1", "a2", "a3"]})
    assert (*sft.prompt, A(sft.responses[0].text)) == (U("u1"), A("a1"), U("u2"), A("a2"), U("u3"), A("a3"))


def test_paddlenlp_strings_for_a_single_turn(one) -> None:
    assert one({"src": "q", "tgt": "", "response": ["x", "y"], "sort": [1, 0]}).prompt == (U("q"),)
    assert one({"src": "q", "tgt": "r"}).prompt == (U("q"),)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tgt": ["a"]}, "turns_mismatch"),
        ({"src": ["q", "r"]}, "turns_mismatch"),
        ({"sort": [1, 1]}, "no_winner"),
        ({"sort": [1]}, "scores_mismatch"),
        ({"sort": [1, None]}, "scores_mismatch"),
        ({"response": ["x"]}, "wrong_response_count"),
        ({"response": ["x", "y", "z"]}, "wrong_response_count"),
        ({"response": ["x", ""]}, "empty_response"),
        ({"response": "x"}, "wrong_type"),
        ({"src": [""]}, "empty_prompt"),
    ],
)
def test_paddlenlp_reasons(one, change: dict, reason: str) -> None:
    assert one({"src": ["q"], "tgt": [], "response": ["x", "y"], "sort": [1, 0]} | change) == reason


@pytest.mark.parametrize(
    ("row", "reason"), [({"src": ["a", "b"], "tgt": ["c"]}, "turns_mismatch"), ({"src": "a", "tgt": None}, "empty_response")]
)
def test_paddlenlp_sft_reasons(one, row: dict, reason: str) -> None:
    assert one(row) == reason


# ---------------------------------------------------------------- K-wise


def test_ultrafeedback_scores_by_aspect_and_not_annotated(one) -> None:
    completion = {
        "model": "m",
        "response": "r",
        "overall_score": 7.5,
        "fine-grained_score": 4.25,
        "annotations": {"helpfulness": {"Rating": "4", "Rationale": "why"}, "honesty": {"Rating": "N/A"}},
    }
    bare = {"model": "n", "response": "s", "overall_score": None, "annotations": {}}
    example = one({"instruction": "i", "completions": [completion, bare], "source": "evol"})
    assert example.responses[0].score == {"overall": 7.5, "fine_grained": 4.25, "helpfulness": 4.0}
    assert example.responses[1].score is None and example.source == "evol"
    assert example.responses[0].meta["annotations"]["helpfulness"]["Rationale"] == "why"


def test_pro_prefix_pieces_and_strings(one) -> None:
    pieces = ["<|prompter|>", "a", "<|assistant|>", "b", "<|prompter|>", "c", "<|assistant|>"]
    example = one({"prefix": [pieces, pieces], "suffix": ["x", "y"], "reward": [0.5, 2], "sft_index": 0})
    assert example.prompt == (U("a"), A("b"), U("c"))
    assert [(response.text, response.score) for response in example.responses] == [("x", 0.5), ("y", 2.0)]
    assert example.meta == {"sft_index": 0}
    plain = one({"prefix": ["POST TL;DR:", "POST TL;DR:"], "suffix": [" x", " y"], "reward": [1, 0]})
    assert plain.prompt == "POST TL;DR:" and texts(plain) == [" x", " y"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"query": "q", "responses": ["a", "b"], "scores": [1]}, "scores_mismatch"),
        ({"query": "q", "responses": ["a", "b"], "scores": [1, "x"]}, "bad_score"),
        ({"query": "q", "responses": ["a", "b"], "scores": [1, float("inf")]}, "bad_score"),
        ({"query": "q", "responses": ["a", True], "scores": [1, 0]}, None),
        ({"query": "q", "responses": ["a", "  "], "scores": [1, 0]}, "empty_response"),
        ({"query": "", "responses": ["a", "b"], "scores": [1, 0]}, "empty_prompt"),
        ({"query": "q", "responses": [], "scores": []}, "no_response"),
        ({"prefix": ["a", "b"], "suffix": ["x", "y"], "reward": [1, 0]}, "prompts_differ"),
        ({"text": ["\n\nHuman: q\n\nAssistant: x"], "score": [1]}, "wrong_response_count"),
    ],
)
def test_kwise_reasons(one, row: dict, reason: str | None) -> None:
    if reason is None:  # a list that mixes kinds is no row of this format: named, it is refused by type
        assert one(row, "kwise") == "wrong_type"
    else:
        assert one(row) == reason


def test_question_answer(one) -> None:
    example = one({"question": "q", "answer": "2 #### no\n#### 1,234 "})
    assert example.reference_answer == "1,234" and texts(example) == ["2 #### no\n#### 1,234 "]
    assert one({"question": "q", "answer": "yes"}).reference_answer is None


# ---------------------------------------------------------------- our own


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"promt": 1}, "unknown_field"),
        ({"responses": [{"text": "a", "scor": 1}]}, "unknown_field"),
        ({"responses": [{"text": 3}]}, "wrong_type"),
        ({"responses": [{"text": "a"}, {"score": 3}]}, "missing_field"),
        ({"responses": [{"text": "a", "rank": 0}]}, "bad_rank"),
        ({"responses": [{"text": "a", "score": float("nan")}]}, "bad_score"),
        ({"responses": [{"text": "a", "spans": [{"start": 0, "end": 2, "attribute": "x", "value": 1}]}]}, "bad_span"),
        ({"comparisons": [{"first": 0, "second": 1}]}, "bad_comparison"),
        ({"responses": [{"text": "a"}, {"text": "b"}], "comparisons": [{"first": 0, "second": 1, "outcome": 2}]}, "bad_comparison"),
        ({"responses": [{"text": ""}]}, "empty_response"),
        ({"prompt": [{"role": "user"}]}, "missing_field"),
    ],
)
def test_own_reasons(one, change: dict, reason: str) -> None:
    assert one({"prompt": "p", "responses": [{"text": "a"}]} | change) == reason


# ---------------------------------------------------------------- who beats whom


def test_strict_pairs_of_a_ranking(one) -> None:
    """Oracles of methods A.1: four different scores give 6 pairs, nine 36; (.9, .6, .6) gives 2."""
    example = lambda scores: one({"query": "q", "responses": [f"r{i}" for i in range(len(scores))], "scores": scores})
    assert len(strict_pairs(example([4, 2, 3, 1]))) == 6 and len(strict_pairs(example(list(range(9))))) == 36
    assert strict_pairs(example([0.6, 0.9, 0.6])) == [(1, 0), (1, 2)]


def test_strict_pairs_of_comparisons_average_annotators() -> None:
    base = {"prompt": "p", "responses": ()}
    judged = Example(**base, comparisons=(Comparison(0, 1, 1.0), Comparison(1, 0, 1.0), Comparison(2, 1, 0.0), Comparison(1, 2, 0.5)))
    assert strict_pairs(judged) == [(1, 2)]
