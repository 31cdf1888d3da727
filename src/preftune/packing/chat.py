"""Prompts and responses to token ids, by the rules of exactly one BOS, EOS on finished responses, and prompt ids as at inference.

A response is never passed through the chat template: a template may strip or rewrite assistant turns (think blocks, spaces). It is the
rendered prompt, as it stands at inference, then the response's own text, then the token that ends an assistant turn.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from preftune.errors import UserError
from preftune.formats.order import ordering, preferences
from preftune.packing.turns import join, one_record_a_turn
from preftune.records import Example, Message

log = logging.getLogger(__name__)

REASONS = {
    "prompt_too_long": "the prompt alone fills max_length, so no response token would be left",
    "no_response_tokens": "a response has no token at all",
    "text_after_turn_end": "a response goes on after an end-of-turn token in its text",
}
"""Why a record gives no tree."""

_PROBE = "preftune0probe"
_ROLES = {"system": "System", "user": "Human", "assistant": "Assistant", "tool": "Tool"}


@dataclass(frozen=True)
class Tree:
    """A tokenised record: one prompt, then N responses that each continue it.

    `scores[n]` is higher for better responses (NaN where nothing orders them); `preference[i, j]` is how strongly people hold that
    response i is better than j (1 and 0 for a strict pair, a probability for a soft one, 0 and 0 where nothing is known or it is a tie).
    What is None was never said of any response; a method's `keep` fills in what it derives (`rated`, `weights`, `carries`).
    """

    id: str
    where: str
    prompt: np.ndarray  # [P] int64
    responses: tuple[np.ndarray, ...]  # N arrays of [R_n] int64, end-of-turn included where the response is finished
    finished: tuple[bool, ...]
    scores: np.ndarray  # [N] float64
    preference: np.ndarray  # [N, N] float64
    reference: np.ndarray | None = None  # [N] float64, summed log-probabilities under the reference where they were computed before
    margin: np.ndarray | None = None  # [N, N] float64, strength of the preference of i over j as people gave it, 0 where they gave none
    labels: np.ndarray | None = None  # [N] float64: 1 desirable, 0 undesirable, NaN unlabelled
    ratings: Mapping[str, np.ndarray] = field(default_factory=dict)  # attribute -> [N] float64, NaN where unrated; a plain score: SCORE
    rated: np.ndarray | None = None  # [N, A] float64, the ratings a method learns, in the order of its heads; NaN where unrated
    weights: np.ndarray | None = None  # [N] float64, how much each response counts in a token loss; None is 1
    carries: tuple[np.ndarray, ...] | None = None  # N arrays of [R_n] bool, which tokens carry loss; None is all
    told: Mapping[str, tuple[np.ndarray, ...]] = field(default_factory=dict)  # name -> N arrays, a number for each token that carries loss
    source: str = ""

    def loss_tokens(self, n: int) -> int:
        """Tokens of response n that carry loss."""
        return len(self.responses[n]) if self.carries is None else int(self.carries[n].sum())

    @property
    def tokens(self) -> int:
        """Tokens this tree puts in a packed row."""
        return len(self.prompt) + sum(len(r) for r in self.responses)

    @property
    def response_tokens(self) -> int:
        """Tokens that carry loss."""
        return sum(self.loss_tokens(n) for n in range(len(self.responses)))

    def keep(self, indices: Sequence[int]) -> Tree:
        """The same tree with only these responses, in this order."""
        index = np.asarray(indices, dtype=int)
        some = lambda values: None if values is None else values[index]
        return replace(
            self,
            responses=tuple(self.responses[i] for i in indices),
            finished=tuple(self.finished[i] for i in indices),
            scores=self.scores[index],
            preference=self.preference[np.ix_(index, index)],
            reference=some(self.reference),
            margin=None if self.margin is None else self.margin[np.ix_(index, index)],
            labels=some(self.labels),
            ratings={name: values[index] for name, values in self.ratings.items()},
            rated=some(self.rated),
            weights=some(self.weights),
            carries=None if self.carries is None else tuple(self.carries[i] for i in indices),
            told={name: tuple(values[i] for i in indices) for name, values in self.told.items()},
        )


@dataclass
class Tokenization:
    """Trees, and why the records that gave none were dropped: kept + sum(dropped.values()) == records in."""

    trees: list[Tree] = field(default_factory=list)
    kept: int = 0
    """Records that gave trees: one each, or more where every turn of a conversation is learned."""
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_where: dict[str, list[str]] = field(default_factory=dict)
    truncated_responses: int = 0
    joined_apart: int = 0

    def drop(self, reason: str, example: Example) -> None:
        """Count a record that gives no tree, and remember where the first few stand."""
        self.dropped[reason] += 1
        places = self.dropped_where.setdefault(reason, [])
        if len(places) < 5:
            places.append(example.where or example.id)


class ChatTokenizer:
    """A model's tokenizer with the rules of this toolkit around it.

    `turn_ends` are all ids that end an assistant turn; `turn_end` the one written after a finished response.
    """

    def __init__(self, tokenizer: Any, *, eos_ids: Iterable[int] = (), template: str | None = None) -> None:
        self.tokenizer = tokenizer
        if template is not None:
            tokenizer.chat_template = template
        self.has_template = bool(tokenizer.chat_template)
        self.bos_id: int | None = tokenizer.bos_token_id
        self._special = set(tokenizer.all_special_ids)
        self.turn_end = self._turn_end()
        self.turn_ends = frozenset({self.turn_end, *eos_ids} | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()))
        self._adds_bos = self.bos_id is not None and tokenizer("a").input_ids[:1] == [self.bos_id]

    def _turn_end(self) -> int:
        """The special token that the template writes after an assistant turn, else EOS."""
        if self.has_template:
            messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
            try:
                text = self.tokenizer.apply_chat_template(messages, tokenize=False)
            except Exception as error:
                raise UserError(f"the chat template failed on a plain user/assistant exchange: {error}", where="chat_template") from error
            _, found, tail = text.rpartition(_PROBE)
            ends = [token for token in self._encode(tail) if token in self._special] if found else []
            if ends:
                return ends[0]
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no EOS token and its chat template ends an assistant turn with none, so a response could never end",
                where="model",
                fix="Set `eos_token` in the model's tokenizer_config.json.",
            )
        return int(self.tokenizer.eos_token_id)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def prompt_text(self, prompt: str | Sequence[Message]) -> str:
        """The prompt as the model reads it, up to where its response begins. A plain string is used as it stands."""
        if isinstance(prompt, str):
            return prompt
        if self.has_template:
            messages = [{"role": m.role, "content": m.content} for m in prompt]
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return "".join(f"\n\n{_ROLES.get(m.role, m.role.title())}: {m.content}" for m in prompt) + "\n\nAssistant:"

    def _with_bos(self, ids: list[int]) -> list[int]:
        """One BOS at position 0 where the tokenizer or the template puts one at all; something to start from where there is no text."""
        start = self.turn_end if self.bos_id is None else self.bos_id
        rest = ids
        while rest[:1] == [start]:
            rest = rest[1:]
        return [start, *rest] if self._adds_bos or len(rest) < len(ids) or not ids else rest

    def encode_prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """Token ids of the prompt exactly as used at inference."""
        return self._with_bos(self._encode(self.prompt_text(prompt)))

    def encode(self, example: Example, max_length: int | None) -> tuple[Tree | None, str, int, int]:
        """One record to a tree.

        Returns (tree or None, reason for None, responses truncated, responses whose first token would have merged with the prompt).
        Truncation keeps the start; a truncated response gets no end-of-turn token.
        """
        try:
            text = self.prompt_text(example.prompt)
        except Exception as error:
            message = f"the chat template refused this conversation: {error}"
            raise UserError(message, where=example.where, fix="Check the order of roles.") from error
        alone = self._encode(text)
        prompt = self._with_bos(alone)
        room = None if max_length is None else max_length - len(prompt)
        if room is not None and room <= 0:
            return None, "prompt_too_long", 0, 0
        gap = " " if not self.has_template and not isinstance(example.prompt, str) else ""
        responses, finished, cut, apart = [], [], 0, 0
        for response in example.responses:
            found, joined = self._continuation(text, alone, gap + response.text)
            ids = self._until_turn_end(found)
            if ids is None:
                return None, "text_after_turn_end", cut, apart
            apart += not joined
            if response.finished:
                ids = [*ids, self.turn_end]
            done = response.finished
            if room is not None and len(ids) > room:
                ids, done, cut = ids[:room], False, cut + 1
            responses.append(np.asarray(ids, dtype=np.int64))
            finished.append(done)
        if any(len(r) == 0 for r in responses):
            return None, "no_response_tokens", cut, apart
        tree = Tree(
            id=example.id,
            where=example.where,
            prompt=np.asarray(prompt, dtype=np.int64),
            responses=tuple(responses),
            finished=tuple(finished),
            **judgements(example),
        )
        return tree, "", cut, apart

    def _continuation(self, text: str, alone: list[int], body: str) -> tuple[list[int], bool]:
        """Token ids of `body` behind `text`, whose own ids are `alone`, and whether they are those of the joined text.

        Joining may change the last tokens of `text`, which at inference stand fixed before the response begins; then `body` goes alone.
        """
        joint = self._encode(text + body)
        if joint[: len(alone)] == alone:
            return joint[len(alone) :], True
        return self._encode(body), False

    def _until_turn_end(self, ids: list[int]) -> list[int] | None:
        """A response that brings its own end-of-turn token, without it; None where more text follows: that is no one response."""
        for at, token in enumerate(ids):
            if token in self.turn_ends:
                return None if self.decode(ids[at:]).strip() else ids[:at]
        return ids

    def tokenize(
        self,
        examples: Iterable[Example],
        max_length: int | None,
        *,
        keep: Callable[[Tree], Tree | str] = lambda tree: tree,
        every_turn: bool = False,
    ) -> Tokenization:
        """All records to trees; every record is among the `kept` or counted in `dropped` under a named reason.

        `keep` says what is used of a tree, or why nothing is. With `every_turn` the assistant turns of a prompt carry loss too.
        """
        result = Tokenization()
        for example in examples:
            found = self._trees(one_record_a_turn(example) if every_turn else [example], max_length, keep, result)
            if isinstance(found, str):
                result.drop(found, example)
            else:
                result.trees += found
                result.kept += 1
        if result.joined_apart:
            log.warning(
                "%d responses were tokenised on their own, because joined with their prompt they would change the prompt's last tokens",
                result.joined_apart,
            )
        return result

    def _trees(
        self, turns: Sequence[Example], max_length: int | None, keep: Callable[[Tree], Tree | str], result: Tokenization
    ) -> list[Tree] | str:
        """The trees of one record, given as a record for each turn that is learned, or why it is dropped.

        A fault in any turn drops the record; turns behind the window are cut off like tokens behind it.
        """
        trees, behind = [], 0
        for turn in turns:
            tree, reason, cut, apart = self.encode(turn, max_length)
            result.truncated_responses += cut
            result.joined_apart += apart
            told = reason if tree is None else keep(tree)
            if not isinstance(told, str):
                trees.append(told)
            elif told == "prompt_too_long":
                behind += 1
            else:
                return told
        if not trees:
            return "prompt_too_long"
        result.truncated_responses += behind
        return join(trees)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of these ids, without special tokens unless asked."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=not special)


SCORE = "score"
"""The attribute under which a response's plain score is kept."""


def judgements(example: Example) -> dict[str, Any]:
    """The fields of a Tree that say what people held of the record's responses; `scores` and `preference` from whatever they gave."""
    scores = np.array([np.nan if value is None else value for value in ordering(example)], dtype=float)
    count = len(scores)
    preference = np.zeros((count, count))
    for (i, j), share in preferences(example).items():
        if share != 0.5:
            preference[i, j], preference[j, i] = share, 1 - share
    ratings: dict[str, np.ndarray] = {}
    for n, response in enumerate(example.responses):
        given = response.score if isinstance(response.score, Mapping) else {} if response.score is None else {SCORE: response.score}
        for name, value in given.items():
            ratings.setdefault(name, np.full(count, np.nan))[n] = value
    labels = np.array([np.nan if r.label is None else float(r.label) for r in example.responses])
    return {
        "scores": scores,
        "preference": preference,
        "margin": _margin(example, preference),
        "labels": None if np.isnan(labels).all() else labels,
        "ratings": ratings,
        "source": example.source or "",
    }


def _margin(example: Example, preference: np.ndarray) -> np.ndarray | None:
    """[N, N] mean strength that people gave to the preference of i over j."""
    given: dict[tuple[int, int], list[float]] = {}
    for one in example.comparisons:
        if one.strength is not None and one.outcome != 0.5:
            pair = (one.first, one.second) if one.outcome > 0.5 else (one.second, one.first)
            given.setdefault(pair, []).append(one.strength)
    margin = np.zeros_like(preference)
    for pair, values in given.items():
        margin[pair] = sum(values) / len(values)
    return margin if given else None
