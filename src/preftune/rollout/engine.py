"""The local engine: N responses to each of many prompts with any model the toolkit loads.

A prompt is read once for all its responses. Every step reads one packed row of one token for each response under way; a response that
ends leaves at once, and waiting prompts take the place of those that ended while the cache has room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from preftune.errors import UserError
from preftune.models.logprobs import finished
from preftune.models.policy import LanguageModel, language_head
from preftune.packing.batch import common_prefix
from preftune.rollout.blocks import Blocks
from preftune.rollout.cache import Cache, Decode, Prefill
from preftune.rollout.decoder import Decoder
from preftune.rollout.padded import generate as padded
from preftune.rollout.samples import Row, Sample
from preftune.rollout.sampling import Sampling, draw, uniforms
from preftune.rollout.weights import prepared, product, room_for_copies

CACHE_BYTES = 2 * 2**30
"""Keys and values kept at once, unless a caller says otherwise."""
PREFILL_TOKENS = 2048
"""Prompt tokens read in one pass."""


@dataclass
class Engine:
    """Draws responses from `model`; `turn_ends` are the ids that end a turn, `decode` makes text of ids where stop texts are used."""

    model: LanguageModel
    turn_ends: frozenset[int]
    decode: Callable[[Sequence[int]], str] | None = None
    cache_bytes: int = CACHE_BYTES
    on_token: Callable[[int, int, int], None] | None = None
    """Called with prompt, number and id of each token as it is drawn."""
    stop: tuple[str, ...] = field(default=(), init=False)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seed: int = 0,
        *,
        numbers: Sequence[Sequence[int]] | None = None,
        give_up: Callable[[], bool] = lambda: False,
    ) -> Iterator[Sample]:
        """Yield the responses 0 .. n-1 to each prompt (token ids) as they end, in no promised order.

        A response depends on seed, prompt and number alone. `numbers[i]` asks only for those of prompt i, so that what is there need not
        be drawn again. `give_up` is asked at every token; when it says so, what is under way is dropped. Raises UserError for an empty
        prompt or one that fills the model's window.
        """
        asked = [list(range(n)) for _ in prompts] if numbers is None else [list(one) for one in numbers]
        self._judge(prompts, asked)
        if sampling.stop and self.decode is None:
            raise ValueError("stop texts need a `decode`")
        self.stop = sampling.stop
        waiting = deque(sorted((i for i in range(len(prompts)) if asked[i]), key=lambda i: (-len(prompts[i]), i)))
        if not self.model.backbone.packed:
            yield from padded(self, prompts, asked, waiting, sampling, seed, give_up)
            return
        self.model.eval()
        with prepared(self.model.hf, self.model.backbone.compute), self.model.backbone.precision():
            yield from _Run(self, prompts, asked, waiting, sampling, seed).samples(give_up)

    @property
    def window(self) -> int | None:
        """Tokens of prompt and response together that the model can read; None where it does not say."""
        return getattr(self.model.hf.config.get_text_config(), "max_position_embeddings", None)

    def _judge(self, prompts: Sequence[Sequence[int]], asked: Sequence[Sequence[int]]) -> None:
        for i, prompt in enumerate(prompts):
            if asked[i] and not len(prompt):
                raise UserError("a prompt has no token, so there is nothing to go on from", where=f"prompt {i + 1}")
            if asked[i] and self.window is not None and len(prompt) >= self.window:
                raise UserError(
                    f"a prompt of {len(prompt)} tokens fills the model's window of {self.window}",
                    where=f"prompt {i + 1}",
                    fix="Shorten it.",
                )

    def room(self, prompt: Sequence[int], sampling: Sampling) -> int:
        """New tokens a response to this prompt may have: the window cuts what `max_new_tokens` allows."""
        left = sampling.max_new_tokens if self.window is None else self.window - len(prompt)
        return min(sampling.max_new_tokens, left)

    def advance(self, rows: Sequence[Row], tokens: Tensor, logp: Tensor, drawn: Tensor) -> list[int]:
        """Give each row its next token ([B] tensors), say which rows have ended, and return the indices of those that go on."""
        staying = []
        for at, (row, token, one, other) in enumerate(zip(rows, tokens.tolist(), logp.tolist(), drawn.tolist(), strict=True)):
            row.ids.append(token)
            row.logp.append(one)
            row.drawn.append(other)
            if self.on_token is not None:
                self.on_token(row.prompt, row.number, token)
            if token in self.turn_ends:
                row.finish = "stop"
            elif (text_end := self._stop_text(row.ids)) is not None:
                row.finish, row.text_end = "stop", text_end
            elif len(row.ids) == len(row.uniform):
                row.finish = "length"
            else:
                staying.append(at)
        return staying

    def _stop_text(self, ids: Sequence[int]) -> int | None:
        """Where the first stop text begins in the decoded response."""
        if not self.stop:
            return None
        assert self.decode is not None
        text = self.decode(ids)
        return min((at for at in map(text.find, self.stop) if at >= 0), default=None)


class _Run:
    """One call of `generate`: the rows under way and their caches."""

    def __init__(
        self, engine: Engine, prompts: Sequence[Sequence[int]], asked: list[list[int]], waiting: deque[int], sampling: Sampling, seed: int
    ) -> None:
        self.engine, self.prompts, self.asked, self.waiting = engine, prompts, asked, waiting
        self.sampling, self.seed = sampling, seed
        self.device = engine.model.backbone.device
        config = engine.model.hf.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        size = 2 if engine.model.backbone.compute == torch.bfloat16 else 4
        self.places = max(1, engine.cache_bytes // (2 * config.num_hidden_layers * heads * width * size))
        like = torch.empty((heads, 0, width), dtype=engine.model.backbone.compute, device=self.device)
        self.blocks = Blocks.of(config.num_hidden_layers, like)
        self.cache = Cache(config.num_hidden_layers, self.blocks)
        weight, self.head = language_head(engine.model.backbone)
        copied = self.head["compute"] != torch.float32 or room_for_copies(engine.model.hf)
        self.vocabulary, self.times = len(weight), product(weight.to(self.head["compute"]), copied=copied)
        self.decoder = Decoder(engine.model.backbone, self.blocks)
        self.rows: list[Row] = []
        self.groups: list[int] = []  # prompt of each slot of the prompt cache
        self.group = torch.zeros(0, dtype=torch.long)  # [B] slot of each row's prompt
        self.own = torch.zeros(0, dtype=torch.long)  # [B] tokens of each row that are in the cache
        self.states = torch.zeros(0)  # [S, D] what next tokens are drawn from, one for all that begin a response to the same prompt
        self.source = torch.zeros(0, dtype=torch.long)  # [B] which of them each row's is
        self.seen: Tensor | None = None  # [B, V] tokens that a repetition penalty bears on

    def samples(self, give_up: Callable[[], bool]) -> Iterator[Sample]:
        """Draw until nothing is under way and nothing waits."""
        while self.waiting or self.rows:
            if give_up():
                return
            self._admit()
            ended = self._draw()
            yield from ended
            if self.rows:
                self._forward()

    def _cost(self, prompt: int) -> int:
        """Places in the cache that a prompt and its responses may come to take."""
        each = 1 if self.blocks is None else self.blocks.tokens
        rounded = lambda tokens: -(-tokens // each) * each
        room = self.engine.room(self.prompts[prompt], self.sampling)
        return rounded(len(self.prompts[prompt])) + len(self.asked[prompt]) * rounded(room)

    def _admit(self) -> None:
        """Read as many waiting prompts as the cache has room for; one that needs more than all of it goes alone."""
        taken = sum(self._cost(i) for i in self.groups)
        new: list[int] = []
        while self.waiting and (taken + self._cost(self.waiting[0]) <= self.places or not (self.groups or new)):
            taken += self._cost(self.waiting[0])
            new.append(self.waiting.popleft())
        while new:
            part = [new.pop(0)]
            while new and sum(len(self.prompts[i]) for i in part) + len(self.prompts[new[0]]) <= PREFILL_TOKENS:
                part.append(new.pop(0))
            self._prefill(part)

    def _prefill(self, part: list[int]) -> None:
        lengths = tuple(len(self.prompts[i]) for i in part)
        shared = common_prefix([np.asarray(self.prompts[i]) for i in part])
        counts = [len(self.asked[i]) for i in part]
        plan = Prefill(self.cache, lengths, len(self.groups), counts, shared)
        whole = torch.tensor([t for i in part for t in self.prompts[i]]), torch.cat([torch.arange(length) for length in lengths])
        ids, positions = (plan.layout.gathered(x).to(self.device) for x in whole)
        ends = shared + torch.tensor(plan.layout.own, device=self.device).cumsum(0) - 1
        last = self.decoder(ids, positions, plan, ends)
        slots = torch.arange(len(part), device=self.device) + len(self.groups)
        each = torch.tensor(counts, device=self.device)
        grown = lambda old, new: torch.cat([old.to(new), new]) if len(old) else new
        self.source = grown(self.source, len(self.states) + torch.arange(len(part), device=self.device).repeat_interleave(each))
        self.states = grown(self.states, last)
        self.group = grown(self.group, slots.repeat_interleave(each))
        self.own = grown(self.own, torch.zeros(sum(counts), dtype=torch.long, device=self.device))
        self.groups += part
        for i in part:
            room = self.engine.room(self.prompts[i], self.sampling)
            self.rows += [Row(i, number, uniforms(self.seed, self.prompts[i], number, room)) for number in self.asked[i]]
        if self.sampling.repetition_penalty != 1:
            marks = torch.zeros((len(part), self.vocabulary), dtype=torch.bool, device=self.device)
            for row, i in enumerate(part):
                marks[row, torch.tensor(self.prompts[i], device=self.device)] = True
            marks = marks.repeat_interleave(each, 0)
            self.seen = marks if self.seen is None else torch.cat([self.seen, marks])

    def _logits(self) -> Tensor:
        """[B, V] logits of every row's next token; the products themselves where nothing is to be done to them."""
        products = self.times(self.states.to(self.head["compute"]))
        if len(products) < len(self.rows):
            products = products[self.source]
        plain = self.head["bias"] is None and self.head["softcap"] is None and self.head["scale"] == 1
        return products if plain else finished(products, **self.head)[0]

    def _draw(self) -> list[Sample]:
        """The next token of every row; rows that end are taken out and returned."""
        uniform = torch.tensor([row.uniform[len(row.ids)] for row in self.rows], dtype=torch.float64, device=self.device)
        tokens, logp, drawn = draw(self._logits(), uniform, self.sampling, self.seen)
        if self.seen is not None:
            self.seen[torch.arange(len(tokens), device=self.device), tokens] = True
        self.tokens, self.states, self.source = tokens, self.states[:0], self.source[:0]
        staying = self.engine.advance(self.rows, tokens, logp, drawn)
        ended = [row.sample() for row in self.rows if row.finish is not None]
        if ended:
            self._compact(staying)
        return ended

    def _compact(self, staying: list[int]) -> None:
        """Keep these rows, at the front of the cache, and the prompts that still have any."""
        kept = len(staying)
        holes = sorted(set(range(kept)) - set(staying))
        movers = [at for at in staying if at >= kept]
        self.cache.move("own", movers, holes, int(self.own[movers].max()) if movers else 0)
        order = list(range(kept))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        if self.blocks is not None:
            self.blocks.keep("rows", order)
        index = torch.tensor(order, dtype=torch.long, device=self.device)
        self.rows = [self.rows[at] for at in order]
        self.group, self.own, self.tokens = self.group[index], self.own[index], self.tokens[index]
        self.seen = None if self.seen is None else self.seen[index]
        used = set(self.group.tolist())
        if len(used) == len(self.groups):
            return
        slots = [slot for slot in range(len(self.groups)) if slot in used]
        holes = [slot for slot in range(len(slots)) if slot not in used]
        movers = [slot for slot in slots if slot >= len(slots)]
        self.cache.move("prompt", movers, holes, max((len(self.prompts[self.groups[slot]]) for slot in movers), default=0))
        renamed = torch.arange(len(self.groups), device=self.device)
        renamed[movers] = torch.tensor(holes, dtype=torch.long, device=self.device)
        order = list(range(len(slots)))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        if self.blocks is not None:
            self.blocks.keep("prompts", order)
        self.groups = [self.groups[slot] for slot in order]
        self.group = renamed[self.group] if len(self.group) else self.group

    def _forward(self) -> None:
        """Read the tokens just drawn."""
        prompts = torch.tensor([len(self.prompts[i]) for i in self.groups], device=self.device)
        plan = Decode(self.cache, self.group, self.own, prompts)
        self.states = self.decoder(self.tokens, plan.position, plan)
        self.source = torch.arange(len(self.states), device=self.device)
        self.own = self.own + 1
