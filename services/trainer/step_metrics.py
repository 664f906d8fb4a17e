"""A completed step in numbers: everything `metrics.jsonl` says of it.

`loss/reverse_kl` is eq 5's value over the student's support whatever the objective is, so that runs with different
objectives can be compared; `loss/objective` is what was differentiated. All but the latter are of the weights that
sampled.
"""

import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Callable, Container, Sequence

import numpy as np

from services.trainer.batch import ScoredRollout
from services.trainer.diagnostics import StepDiagnostics, StepSummary
from services.trainer.evaluation.grading import grade
from services.trainer.loop import StepRecord
from services.trainer.objectives.config import SupportWeight
from services.trainer.step_rollouts import StepPrompt

POLICY_LAG = "rollout/policy_lag"
"""Steps by which the weights that sampled are older than those that the step changes."""


class StepMetrics:
    """Turns step records into summaries. `decode` gives the text of response ids; without it nothing is graded."""

    def __init__(
        self,
        *,
        weight: SupportWeight,
        decode: Callable[[Sequence[int]], str] | None,
        fraction: float = 1.0,
        seed: int = 0,
        probe: Callable[[StepRecord], dict[str, float]] | None = None,
    ) -> None:
        """`fraction` of the rollouts, drawn by `seed` and step, are measured in full; `probe` adds its own metrics."""
        self._weight = weight
        self._decode = decode
        self._fraction = fraction
        self._seed = seed
        self._probe = probe

    def summarize(self, record: StepRecord) -> StepSummary:
        """Every metric of the step, means over positions or over rollouts."""
        begun = time.perf_counter()
        diagnostics = StepDiagnostics(weight=self._weight)
        in_full = self._sample(record)
        for index, item in enumerate(record.scored):
            prompt = record.prompts[item.rollout.group]
            diagnostics.add_rollout(
                item.rollout,
                item.scores,
                is_correct=self._grade(item, prompt),
                with_costly=index in in_full,
                teacher=prompt.teacher,
            )
        diagnostics.add_means(record.losses)
        summary = diagnostics.summary()
        lags = sorted(float(record.step - 1 - item.rollout.policy_version) for item in record.scored)
        values = summary.values | _step_values(record) | _sent_counts(record) | _teacher_counts(record)
        if self._probe is not None:
            values |= self._probe(record)
        values["timing/metrics"] = time.perf_counter() - begun
        values[POLICY_LAG] = statistics.fmean(lags)
        # One number for each rollout, where they are not all of the weights that the step changes.
        samples = {f"{POLICY_LAG}s": lags} if any(lags) else {}
        return dataclasses.replace(summary, values=values, samples=summary.samples | samples)

    def _sample(self, record: StepRecord) -> Container[int]:
        """Indices of the rollouts that are measured in full, at least one; the same again after a resume."""
        total = len(record.scored)
        if self._fraction >= 1:
            return range(total)
        generator = np.random.default_rng([self._seed, record.step])
        return set(generator.permutation(total)[: max(1, round(self._fraction * total))].tolist())

    def _grade(self, item: ScoredRollout, prompt: StepPrompt) -> bool | None:
        if self._decode is None or prompt.answer is None or not prompt.template:
            return None
        return grade(prompt.template, self._decode(item.rollout.response_token_ids.tolist()), prompt.answer)


def _step_values(record: StepRecord) -> dict[str, float]:
    """Optimizer, tokens, times and speed."""
    timings = {f"timing/{name}": seconds for name, seconds in record.timings_s.items()}
    num_tokens = sum(item.num_response_tokens for item in record.scored)
    sampling_s = record.timings_s["rollout"]
    # With a lag the last steps sample nothing.
    speed = {"timing/rollout_tokens_per_second": num_tokens / sampling_s} if sampling_s else {}
    return (
        timings
        | speed
        | {
            "optim/grad_norm": record.grad_norm,
            "optim/lr": record.lr,
            "rollout/response_tokens": float(num_tokens),
            "timing/tokens_per_second": num_tokens / record.timings_s["step"],
        }
    )


def _sent_counts(record: StepRecord) -> dict[str, float]:
    """What became of the rollouts that were sent; nothing is where there is no teacher to send them to."""
    if not record.fingerprints:
        return {}
    counts = record.counts
    named = (("sent", counts.sent), ("scored", counts.scored), ("lost", counts.lost))
    return {f"queue/rollouts_{name}": float(count) for name, count in named}


def _teacher_counts(record: StepRecord) -> dict[str, float]:
    """Rollouts and tokens by teacher, where there are several; a teacher without a prompt in the step has zeros."""
    rollouts: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for item in record.scored:
        teacher = record.prompts[item.rollout.group].teacher
        rollouts[teacher] += 1
        tokens[teacher] += item.num_response_tokens
    names = [name for name in record.fingerprints if name]
    return {f"queue/rollouts_scored/teacher/{name}": float(rollouts[name]) for name in names} | {
        f"rollout/response_tokens/teacher/{name}": float(tokens[name]) for name in names
    }
