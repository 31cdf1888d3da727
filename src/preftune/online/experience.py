"""A rollout made ready to learn from: trees whose tokens know their log-probabilities, advantages and values, kept in one file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from preftune.online.losses import ADVANTAGE, DRAWN, RETURN
from preftune.packing.batch import Batch, collate, microbatches
from preftune.packing.chat import Tree
from preftune.rollout.samples import Sample, as_tree
from preftune.training.durable import explained, replace_file


@dataclass(frozen=True)
class Experience:
    """What a rollout's steps are made of, and what it says of itself."""

    trees: list[Tree]
    figures: dict[str, float]
    taken: int
    """Prompts that were drawn for it, those that were replaced among them."""

    def save(self, path: Path) -> None:
        """Write it to `path`, whole or not at all."""
        flat = lambda parts: torch.from_numpy(np.concatenate([np.asarray(p) for p in parts]))
        responses = [r for t in self.trees for r in t.responses]
        tensors = {
            "prompt_lengths": torch.tensor([len(t.prompt) for t in self.trees]),
            "prompts": flat([t.prompt for t in self.trees]),
            "counts": torch.tensor([len(t.responses) for t in self.trees]),
            "response_lengths": torch.tensor([len(r) for r in responses]),
            "responses": flat(responses),
            "finished": torch.tensor([f for t in self.trees for f in t.finished]),
            "scores": flat([t.scores for t in self.trees]),
            "weights": flat([np.ones(len(t.responses)) if t.weights is None else t.weights for t in self.trees]),
            **{f"told/{name}": flat([v for t in self.trees for v in t.told[name]]) for name in self.trees[0].told},
        }
        facts = {"names": [[t.id, t.where] for t in self.trees], "figures": self.figures, "taken": self.taken}
        with explained("keeping a rollout", path):
            replace_file(path, save(tensors, {"facts": json.dumps(facts)}))

    @classmethod
    def load(cls, path: Path) -> Experience:
        """What `save` wrote."""
        with explained("reading a rollout", path), safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            found = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118  (no mapping)
        counts, lengths = found["counts"], found["response_lengths"]
        prompts = _split(found["prompts"], found["prompt_lengths"])
        responses, owners = _split(found["responses"], lengths), _split(np.arange(len(lengths)), counts)
        told = {name.removeprefix("told/"): _split(values, lengths) for name, values in found.items() if name.startswith("told/")}
        trees = []
        for prompt, mine, (name, where) in zip(prompts, owners, facts["names"], strict=True):
            tree = Tree(
                name, where, prompt, tuple(responses[r] for r in mine), tuple(found["finished"][mine].tolist()), found["scores"][mine],
                np.zeros((len(mine), len(mine))), weights=found["weights"][mine],
                told={key: tuple(values[r] for r in mine) for key, values in told.items()},
            )  # fmt: skip
            trees.append(tree)
        return cls(trees, facts["figures"], facts["taken"])


def _split(values: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []


def trees_of(prompts: Sequence[tuple[str, str, Sequence[int]]], samples: Sequence[Sequence[Sample]]) -> list[Tree]:
    """A tree for each prompt (its name, place and tokens) with its samples, which know what the sampler said of their tokens."""
    out = []
    for (name, where, ids), mine in zip(prompts, samples, strict=True):
        tree = as_tree(ids, mine, name=name, where=where)
        out.append(replace(tree, told={DRAWN: tuple(s.drawn_logp for s in mine)}))
    return out


def grid(trees: Sequence[Tree], name: str) -> tuple[Tensor, Tensor]:
    """What the trees' tokens were told by `name`, as [R, T] float64 with zeros behind, and the [R, T] mask."""
    rows = [values for tree in trees for values in tree.told[name]]
    width = max(map(len, rows))
    out, mask = torch.zeros(len(rows), width, dtype=torch.float64), torch.zeros(len(rows), width, dtype=torch.bool)
    for row, values in enumerate(rows):
        out[row, : len(values)] = torch.from_numpy(np.asarray(values, dtype=np.float64))
        mask[row, : len(values)] = True
    return out, mask


def tell(trees: Sequence[Tree], **known: Tensor | None) -> list[Tree]:
    """The trees with more known of their tokens: [R, T] numbers by name; None tells nothing."""
    given = {name: values.double().numpy() for name, values in known.items() if values is not None}
    out, row = [], 0
    for tree in trees:
        lengths = [len(r) for r in tree.responses]
        mine = {name: tuple(values[row + n, :length] for n, length in enumerate(lengths)) for name, values in given.items()}
        out.append(replace(tree, told={**tree.told, **mine}))
        row += len(lengths)
    return out


def forget(trees: Sequence[Tree], *names: str) -> list[Tree]:
    """The trees without what their tokens were told by these names."""
    return [replace(t, told={name: values for name, values in t.told.items() if name not in names}) for t in trees]


@torch.no_grad()
def passes(
    trees: Sequence[Tree], groups: Sequence[Sequence[int]], budget: int, temperature: float, device: torch.device
) -> Iterator[tuple[list[int], Batch]]:
    """Indices and batches for a forward pass over all trees, packed as the first pass's steps (`groups`) will be.

    The same packing gives the same numbers to the last bit on a CPU, so that a step's first ratio is 1.
    """
    for group in groups:
        for part in microbatches([trees[i] for i in group], budget):
            chosen = [group[i] for i in part]
            yield chosen, replace(collate([trees[i] for i in chosen]).to(device), temperature=temperature)


def by_tree(trees: Sequence[Tree], chosen: Sequence[int], values: Tensor) -> Mapping[int, tuple[np.ndarray, ...]]:
    """[M] values of a batch of these trees, as one array for each response of each."""
    flat, at = values.float().cpu().numpy().astype(np.float64), 0
    out: dict[int, tuple[np.ndarray, ...]] = {}
    for i in chosen:
        parts = []
        for response in trees[i].responses:
            parts.append(flat[at : at + len(response)])
            at += len(response)
        out[i] = tuple(parts)
    return out


def learned(
    trees: Sequence[Tree], *, advantages: Tensor, returns: Tensor | None, weights: np.ndarray, scores: np.ndarray, useless: Sequence[str]
) -> list[Tree]:
    """The trees as the steps read them, without what was told of their tokens and is `useless` to them."""
    found = tell(trees, **{ADVANTAGE: advantages, RETURN: returns})
    found = [replace(t, weights=weights[g], scores=scores[g]) for g, t in enumerate(found)]
    return forget(found, *useless)


def sample_line(index: int, one: Sample, text: str) -> dict[str, Any]:
    """A sample as it stands in a rollout's journal."""
    numbers = {"logp": [float(x) for x in one.logp], "drawn": [float(x) for x in one.drawn_logp]}
    said = {"ids": list(one.ids), "finish": one.finish, "text": text, "text_end": one.text_end}
    return {"prompt": str(index), "number": one.number, **said, **numbers}


def sample_of(line: Mapping[str, Any]) -> Sample:
    """What `sample_line` wrote."""
    logp, drawn = np.array(line["logp"]), np.array(line["drawn"])
    return Sample(int(line["prompt"]), line["number"], tuple(line["ids"]), line["finish"], logp, drawn, line["text_end"])
