"""TRL's side of `peer_step`, run by the Python of `.venv-peer`: `python -m benchmarks.peer_trl PLAN.json RESULT.json`.

Nothing of this project is imported: what is measured is `trl.DistillationTrainer` as its users run it, with clocks put
around three of its methods. Read from TRL 1.16.0: prompts are padded on the left and completions on the right, all rows
of a step decode until the last one has ended, the teacher's forward pass is part of the loss, and the loss is the sum
of the divergences over all completion tokens of the step divided by their number.
"""

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from trl import DistillationConfig, DistillationTrainer

_PACKAGES = ("trl", "transformers", "torch", "accelerate")


class Clock(TrainerCallback):
    """What each step took and gave; `steps` has one entry for each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.first: dict[str, Any] = {}
        self._begun_s = 0.0
        self._current = _nothing()

    def watch(self, trainer: Any) -> None:
        """Puts the trainer's own methods behind clocks; they are called through the instance, so this reaches all."""
        trainer._generate_and_score_completions = self._generating(trainer._generate_and_score_completions)
        trainer._get_last_hidden_state = self._scoring(trainer._get_last_hidden_state, trainer.teacher_model)
        trainer.compute_loss = self._losing(trainer.compute_loss)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._begun_s = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Comes after the step's end; the norm is the one before clipping."""
        if self.steps and "grad_norm" in logs:
            self.steps[-1]["grad_norm"] = float(logs["grad_norm"])

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.steps.append(self._current | {"step_s": now - self._begun_s})
        self._begun_s, self._current = now, _nothing()

    def _generating(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        def timed(inputs: Any) -> Any:
            begun = time.perf_counter()
            batch = generate(inputs)
            self._current["generate_s"] += time.perf_counter() - begun
            self._current["num_tokens"] += int(batch["num_items_in_batch"])
            if not self.first:
                self.first = {
                    "prompts": _unpadded(batch["prompt_ids"], batch["prompt_mask"]),
                    "responses": _unpadded(batch["completion_ids"], batch["completion_mask"]),
                }
            return batch

        return timed

    def _scoring(self, forward: Callable[..., Any], teacher: Any) -> Callable[..., Any]:
        def timed(model: Any, *args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            hidden = forward(model, *args, **kwargs)
            if model is teacher:
                self._current["score_s"] += time.perf_counter() - begun
            return hidden

        return timed

    def _losing(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def summed(*args: Any, **kwargs: Any) -> Any:
            loss = compute(*args, **kwargs)
            # Every micro-batch's sum is divided by the step's token count already, so their sum is the step's mean.
            self._current["loss"] += float(loss.detach())
            return loss

        return summed


def main() -> None:
    """Trains as the plan says and writes what was seen."""
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    clock = Clock()
    trainer = _trainer(plan, clock)
    clock.watch(trainer)
    trainer.train()
    found = clock.first.pop("prompts")
    if found != plan["prompt_token_ids"][: len(found)]:
        raise SystemExit("TRL has put the prompts into other tokens, so the two sides would not do the same")
    result = {
        "versions": {name: version(name) for name in _PACKAGES},
        "steps": clock.steps,
        "first_prompts": found,
        "first_responses": clock.first["responses"],
    }
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


def _trainer(plan: dict[str, Any], clock: Clock) -> Any:
    """As configured for speed on a CPU: fp32 without checkpointing or autocast, which TRL would switch on by itself."""
    config = DistillationConfig(
        output_dir=plan["folder"],
        beta=1.0,
        temperature=plan["temperature"],
        max_completion_length=plan["max_response_tokens"],
        per_device_train_batch_size=plan["trl_batch"],
        gradient_accumulation_steps=plan["rollouts"] // plan["trl_batch"],
        max_steps=plan["steps"],
        learning_rate=plan["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=plan["max_grad_norm"],
        disable_dropout=True,
        shuffle_dataset=False,
        seed=plan["seed"],
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    return DistillationTrainer(
        model=plan["student"],
        teacher_model=plan["teacher"],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": messages} for messages in plan["prompts"]]),
        callbacks=[clock],
    )


def _nothing() -> dict[str, float]:
    return {"generate_s": 0.0, "score_s": 0.0, "loss": 0.0, "num_tokens": 0.0}


def _unpadded(ids: Any, mask: Any) -> list[list[int]]:
    return [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]


if __name__ == "__main__":
    main()
