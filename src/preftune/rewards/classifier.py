"""A reward model, ours or another tool's classifier, as a judge."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from preftune.errors import UserError
from preftune.models import load
from preftune.models.policy import RewardModel, settle_layout
from preftune.models.values import response_values
from preftune.records import Example


class Classifier:
    """Scores with prefix sharing; a score depends on its own prompt and response alone, not on what is in the batch."""

    def __init__(
        self, word: str, *, compute: torch.dtype, device: torch.device, max_length: int = 2048, tokens_per_microbatch: int = 4096
    ) -> None:
        source = load.locate(word)
        classifier = load.load_classifier(source)
        if classifier is None:
            raise UserError("this is no reward model: it has no score head", where=word, fix="Train one with `preftune train reward`.")
        self.tokenizer = load.load_tokenizer(source)
        self.model = RewardModel(classifier, head=load.score_head(classifier)[1], compute=compute).to(device)
        self.notice = settle_layout(self.model)
        self.fingerprint = load.fingerprint(source)
        self.max_length, self.tokens_per_microbatch = max_length, tokens_per_microbatch

    def __call__(self, examples: Sequence[Example]) -> list[np.ndarray]:
        """Scores of all responses of the records. Raises UserError for a record that does not fit into `max_length`."""
        trees = []
        for example in examples:
            tree, reason, cut, _ = self.tokenizer.encode(example, self.max_length)
            if tree is None or cut:
                what = reason or "a response is longer than the judge may read"
                raise UserError(f"this record cannot be scored: {what}", where=example.where, fix="Raise the judge's max_length.")
            trees.append(tree)
        return response_values(self.model, trees, self.tokens_per_microbatch)
