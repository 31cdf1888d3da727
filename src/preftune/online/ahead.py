"""The next rollout, drawn while this one is learned: one rollout of staleness at most, by a copy of the policy in a thread of its own."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import torch

from preftune.models.policy import LanguageModel


class Ahead:
    """At most one rollout under way beside the training."""

    def __init__(self, policy: LanguageModel) -> None:
        self.policy = policy
        self.copy: LanguageModel | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, draw: Callable[[LanguageModel], None]) -> None:
        """Call `draw` with a copy of the policy as it stands, in the background."""
        self.settle()
        self._take_weights()
        self._thread = threading.Thread(target=self._run, args=(draw,), name="rollout-ahead", daemon=True)
        self._thread.start()

    @torch.no_grad()
    def _take_weights(self) -> None:
        if self.copy is None:
            inner = copy.deepcopy(self.policy.hf)
            self.copy = LanguageModel(inner, compute=self.policy.backbone.compute, packed=self.policy.backbone.packed)
            self.copy.requires_grad_(False)
            return
        for mine, theirs in zip(self.copy.hf.parameters(), self.policy.hf.parameters(), strict=True):
            mine.copy_(theirs)

    def _run(self, draw: Callable[[LanguageModel], None]) -> None:
        assert self.copy is not None
        try:
            draw(self.copy)
        except BaseException as error:  # told to the main thread, which waits for what is drawn here
            self._error = error

    def settle(self) -> None:
        """Wait until nothing is under way; raise what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
