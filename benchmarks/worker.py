"""One side of a comparison, in a process of its own so that its peak memory is its own. Prints one JSON line.

Run by benchmarks/dpo.py; the records come from a JSON file of {"prompt": messages, "chosen": text, "rejected": text}, 8 a step.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import hand_over, our_learner, synchronise, timed
from preftune.methods import find
from preftune.models import load
from preftune.packing.batch import collate, microbatches
from preftune.records import Example, Message, Response

PER_STEP = 8


def preftune(method_name: str, model: str, rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Our side: the learner that `preftune train` uses, on the same pairs."""
    examples = [
        Example(tuple(Message(**m) for m in r["prompt"]), (Response(r["chosen"], rank=1), Response(r["rejected"], rank=2)), id=str(i))
        for i, r in enumerate(rows)
    ]
    trees = load.load_tokenizer(load.locate(model)).tokenize(examples, options.max_length).trees
    learner = our_learner(
        find(method_name),
        Path(model),
        precision=options.precision,
        budget=options.tokens_per_microbatch,
        steps=options.steps,
        checkpointing=options.gradient_checkpointing,
    )
    steps = [trees[i * PER_STEP : (i + 1) * PER_STEP] for i in range(options.steps)]
    batches = [[collate([part[i] for i in one]) for one in microbatches(part, options.tokens_per_microbatch)] for part in steps]
    tokens = [sum((batch if method_name == "reward" else batch.predicting).tokens for batch in one) for one in batches]
    responses = [sum(t.response_tokens for t in part) for part in steps]
    return {**timed(learner, steps), "tokens": tokens, "response_tokens": responses}


def trl(method_name: str, model: str, rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """TRL's trainer with its own defaults, but for what must be equal: data order, batch, length, precision, learning rate."""
    import datasets
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    seconds: list[float] = []
    losses: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            synchronise()
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            synchronise()
            seconds.append(time.perf_counter() - self.start)

        def on_log(self, arguments: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                losses.append(logs["loss"])

    assistant = lambda text: [{"role": "assistant", "content": text}]
    data = datasets.Dataset.from_list(
        [{"prompt": r["prompt"], "chosen": assistant(r["chosen"]), "rejected": assistant(r["rejected"])} for r in rows]
    )
    shared: dict[str, Any] = {
        "output_dir": str(options.scratch),
        "per_device_train_batch_size": PER_STEP // options.accumulate,
        "gradient_accumulation_steps": options.accumulate,
        "max_steps": options.steps,
        "max_length": options.max_length,
        "bf16": options.precision == "bf16",
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "gradient_checkpointing": options.gradient_checkpointing,
        "dataset_num_proc": None,
        **({} if torch.cuda.is_available() else {"use_cpu": True}),
    }
    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)
    if method_name == "dpo":
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        kind: Any = DPOTrainer
        arguments: Any = DPOConfig(beta=0.1, **shared)
        limit = {"ref_model": AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)}
    else:
        tokenizer.pad_token = tokenizer.unk_token
        loaded = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
        loaded.config.pad_token_id = tokenizer.pad_token_id
        kind, arguments, limit = RewardTrainer, RewardConfig(**shared), {}

    class Ordered(kind):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            tokens.append(inputs["input_ids"].numel())
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = Ordered(model=loaded, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()], **limit)
    trainer.train()
    whole = [sum(tokens[i : i + options.accumulate]) for i in range(0, len(tokens), options.accumulate)]
    return {"seconds": seconds, "losses": losses, "tokens": whole}


def main() -> None:
    """Run one side and print what it took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=["preftune", "trl"])
    parser.add_argument("--method", default="dpo", choices=["dpo", "reward"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--tokens-per-microbatch", type=int, default=1024)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--accumulate", type=int, default=1, help="TRL: batches that make one step of 8 pairs")
    options = parser.parse_args()
    rows = json.loads(options.rows.read_text())
    side = preftune if options.side == "preftune" else trl
    hand_over(side(options.method, options.model, rows, options))


if __name__ == "__main__":
    main()
