"""TRL's PPOTrainer as a side of `benchmarks.grpo --method ppo`. TRL took it out in September 2026; 1.12.0 is the last release that has it,
and runs on the transformers of this project:

    pip install --no-deps --target FOLDER trl==1.12.0
    python -m benchmarks.grpo --method ppo --trl-ppo FOLDER
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from benchmarks.common import DTYPES, synchronise
from preftune.packing.chat import ChatTokenizer
from preftune.packing.order import steps
from preftune.records import Message


def side(options: argparse.Namespace, never: int) -> dict[str, Any]:
    """TRL's trainer, its defaults but for what must be equal: the reward model, the prompts of each step, one epoch, no early end.

    Its policy and critic train in fp32 under autocast, or with `--weights bf16` in bf16 throughout, which is faster and less exact than
    what we do; reference and reward model are always read in the step's precision.
    """
    sys.path.insert(0, str(options.trl_ppo))
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    seconds: list[float] = []
    scores: list[float] = []
    losses: list[float] = []
    phases: list[dict[str, float]] = []
    clock = {"start": 0.0, "sampling": 0.0}

    def timed(*args: Any, **kwargs: Any) -> Any:
        synchronise()
        start = time.perf_counter()
        found = batch_generation(*args, **kwargs)
        synchronise()
        clock["sampling"] += time.perf_counter() - start
        if found[0].shape[1] - args[1].shape[1] != options.tokens:
            raise SystemExit(f"TRL's responses have another length than {options.tokens}")
        return found

    batch_generation, ppo_trainer.batch_generation = ppo_trainer.batch_generation, timed

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            clock["start"] = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            synchronise()
            seconds.append(time.perf_counter() - clock["start"])
            phases.append({"sampling": clock["sampling"], "judging": 0.0, "looking": 0.0, "training": seconds[-1] - clock["sampling"]})
            clock.update(start=time.perf_counter(), sampling=0.0)

        def on_log(self, _: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "objective/scores" in logs:
                scores.append(logs["objective/scores"])
                losses.append(logs["loss/policy_avg"] + arguments.vf_coef * logs["loss/value_avg"])

    words = AutoTokenizer.from_pretrained(options.folder / "model", padding_side="left")
    encode = lambda prompt: list(ChatTokenizer(words).encode_prompt(tuple(Message(**message) for message in prompt)))
    rows = [json.loads(line)["prompt"] for line in (options.folder / "prompts.jsonl").read_text().splitlines()]
    read = [[encode(rows[i]) for i in chosen] for chosen, _ in steps(len(rows), options.prompts, 1, 0)]
    whole = options.prompts * options.responses
    frozen = DTYPES[options.precision]
    weights = DTYPES[options.weights]
    classifier = lambda dtype: AutoModelForSequenceClassification.from_pretrained(options.folder / "reward", dtype=dtype)
    policy = lambda dtype: AutoModelForCausalLM.from_pretrained(options.folder / "model", dtype=dtype)
    arguments = PPOConfig(
        output_dir=str(options.folder / "scratch"), per_device_train_batch_size=options.rows, num_ppo_epochs=1,
        gradient_accumulation_steps=whole // options.rows, total_episodes=whole * options.steps, response_length=options.tokens,
        local_rollout_forward_batch_size=options.rows, temperature=1.0, kl_coef=0.04, num_sample_generations=0, learning_rate=1e-6,
        lr_scheduler_type="constant", bf16=options.precision == "bf16", gradient_checkpointing=options.checkpointing, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, **({} if torch.cuda.is_available() else {"use_cpu": True}),
    )  # fmt: skip
    trainer = PPOTrainer(
        args=arguments, processing_class=words, model=policy(weights), ref_model=policy(frozen), reward_model=classifier(frozen),
        value_model=classifier(weights), train_dataset=datasets.Dataset.from_list([{"input_ids": ids} for one in read for ids in one]),
        eval_dataset=datasets.Dataset.from_list([{"input_ids": read[0][0]}]), callbacks=[Clock()],
    )  # fmt: skip
    trainer.policy_model.generation_config.eos_token_id = never
    padded = [words.pad({"input_ids": [ids for ids in one for _ in range(options.responses)]}, return_tensors="pt") for one in read]
    trainer.dataloader = padded  # the prompts of our steps, in their order
    trainer.train()
    tokens = [sum(map(len, one)) for one in read]
    return {"seconds": seconds, "phases": phases, "losses": losses, "prompt_tokens": tokens, "scores": scores}
