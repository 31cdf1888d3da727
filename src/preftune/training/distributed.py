"""The processes of a run: one, or several under torchrun. Each holds the whole model; gradients are summed, never averaged."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from preftune.errors import UserError


@dataclass(frozen=True)
class World:
    """Which of how many processes this is, and where it computes."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @staticmethod
    def join(device: str = "auto") -> World:
        """The process group that torchrun describes, or this process alone. `device` is auto, cpu or cuda."""
        available = torch.cuda.is_available()
        if device == "cuda" and not available:
            raise UserError("there is no CUDA device here", where="device", fix="Use device=auto or device=cpu.")
        local = int(os.environ.get("LOCAL_RANK", 0))
        place = torch.device("cpu") if device == "cpu" or not available else torch.device("cuda", local)
        if place.type == "cuda":
            torch.cuda.set_device(place)
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
        return World(place, int(os.environ.get("RANK", 0)) if size > 1 else 0, size)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum gradients over the processes in place; one that had no micro-batch counts as zeros."""
        if self.size == 1:
            return
        waiting = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            waiting.append(dist.all_reduce(parameter.grad, async_op=True))
        for one in waiting:
            if one is not None:
                one.wait()

    def sum_numbers(self, numbers: dict[str, float]) -> dict[str, float]:
        """Sum named numbers over the processes; a name that a process lacks counts as 0."""
        if self.size == 1:
            return numbers
        everyone: list[dict[str, float]] = [{} for _ in range(self.size)]
        dist.all_gather_object(everyone, numbers)
        total: dict[str, float] = {}
        for one in everyone:
            for name, value in one.items():
                total[name] = total.get(name, 0.0) + value
        return dict(sorted(total.items()))

    def share(self, value: Any) -> Any:
        """What the first process has."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return self.sum_numbers({"flag": float(flag)})["flag"] > 0

    def leave(self) -> None:
        """End the process group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()
