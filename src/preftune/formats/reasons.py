"""Why a row cannot be used: one short stable name each, with what it means and what to do about it."""

from __future__ import annotations

from typing import NamedTuple


class Reason(NamedTuple):
    """`meaning` says what is wrong with such a row, `fix` what its owner can do."""

    meaning: str
    fix: str


REASONS: dict[str, Reason] = {
    "bad_utf8": Reason("the line is not UTF-8 text", "save the file as UTF-8"),
    "bad_unicode": Reason("a string holds half of a surrogate pair, which no tokenizer can take", "remove the broken \\ud8xx escape"),
    "broken_json": Reason("the line is not JSON, or it was cut off", "write one complete JSON object a line"),
    "broken_csv": Reason("the line has more or fewer cells than the header", "quote cells that hold the separator or a line break"),
    "not_an_object": Reason("the row is JSON, but not an object with named fields", 'write each row as {"field": value, ...}'),
    "missing_field": Reason("a field that the format needs is not there", "add the field, or name the right format with data.format"),
    "unknown_field": Reason("a Preftune record has a field that does not exist", "correct the name, or move the field into meta"),
    "wrong_type": Reason("a field holds another kind of value than the format has there", "write it as docs/data-formats.md shows"),
    "not_text": Reason("a turn holds something other than text, such as an image or a tool call", "keep only text turns"),
    "empty_prompt": Reason("the prompt is null or blank", "give the row a prompt"),
    "empty_response": Reason("a response is null or blank", "remove the row, or write the response"),
    "identical_responses": Reason("chosen and rejected are the same text, so there is nothing to learn", "remove the row"),
    "no_response": Reason("the row has no response, or its conversation does not end with an assistant turn", "end it with the response"),
    "wrong_response_count": Reason("a pair must have exactly two responses", "split rankings into pairs, or use a K-wise format"),
    "no_winner": Reason("the two responses of a pair are ranked equal", "remove the row, or keep the tie in a K-wise format"),
    "not_a_transcript": Reason(
        "chosen and rejected come without a prompt and without role markers",
        "add a prompt field, or write turns as \\n\\nHuman: and \\n\\nAssistant:",
    ),
    "prompts_differ": Reason("the conversations of one row do not share their beginning", "give all responses of a row the same prompt"),
    "diverges_before_response": Reason(
        "the conversations part ways earlier than at the last response, so their last responses answer different prompts",
        "cut both where they part",
    ),
    "turns_mismatch": Reason("the user and assistant turns do not interleave", "give src exactly one turn more than tgt (SFT: as many)"),
    "unknown_role": Reason("a turn has a role that is not known", "use system, user, assistant or tool"),
    "scores_mismatch": Reason("there are not as many scores as responses", "give every response one score"),
    "bad_score": Reason("a score is not a finite number", "write scores as numbers"),
    "bad_label": Reason("a label is not true, false, 1 or 0", "write labels as true or false"),
    "bad_comparison": Reason("a comparison points to no response, or its outcome is not within 0 and 1", "correct its indices"),
    "bad_span": Reason("a span does not lie within its response", "count characters from 0, end exclusive"),
    "bad_rank": Reason("a rank is below 1", "count ranks from 1, the best"),
}


class RowError(Exception):
    """This row cannot be used: `reason` is a key of REASONS, `detail` says more about this row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        if reason not in REASONS:
            raise KeyError(reason)
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}" if detail else reason)
