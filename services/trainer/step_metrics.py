"""A completed step in numbers: everything `metrics.jsonl` says of it.

`loss/reverse_kl` is eq 5's value over the student's support whatever the objective is, so that runs with different
objectives can be compared; `loss/objective` is what was differentiated. All but the latter are of the weights that
sampled.
"""

import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from services.trainer.batch import ScoredRollout
from services.trainer.diagnostics import StepDiagnostics, StepSummary
from services.trainer.distributed.means import reduce_counts, slowest
from services.trainer.distributed.ranks import Alone, Ranks
from services.trainer.evaluation.grading import grade
from services.trainer.loop import StepRecord
from services.trainer.objectives.config import SupportWeight
from services.trainer.step_rollouts import StepPrompt
from services.trainer.support_pass import measured_places

TOKENS = "rollout/response_tokens"
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
        ranks: Ranks | None = None,
    ) -> None:
        """`fraction` of the rollouts, drawn by `seed` and step, are measured in full; `probe` adds its own metrics.

        Where there are other `ranks`, `summarize` is collective, and gives all of them the metrics of all rollouts.
        """
        self._ranks: Ranks = ranks or Alone()
        self._weight = weight
        self._decode = decode
        self._fraction = fraction
        self._seed = seed
        self._probe = probe

    def summarize(self, record: StepRecord) -> StepSummary:
        """Every metric of the step, means over positions or over rollouts."""
        begun = time.perf_counter()
        diagnostics = StepDiagnostics(weight=self._weight)
        in_full = measured_places(len(record.scored), fraction=self._fraction, seed=self._seed, step=record.step)
        for index, item in enumerate(record.scored):
            prompt = record.prompts[item.rollout.group]
            diagnostics.add_rollout(
                item.rollout,
                item.scores,
                is_correct=self._grade(item, prompt),
                with_costly=index in in_full,
                teacher=prompt.teacher,
            )
        diagnostics = self._of_all_ranks(diagnostics)
        # The losses of the record are those of all ranks.
        diagnostics.add_means(record.losses)
        summary = diagnostics.summary()
        local = [float(record.step - 1 - item.rollout.policy_version) for item in record.scored]
        lags = sorted(lag for lags in self._ranks.gather(local) for lag in lags)
        totals = reduce_counts(self._ranks, _sent_counts(record) | _teacher_counts(record) | _token_count(record))
        values = summary.values | _step_values(record, totals[TOKENS], slowest(self._ranks, record.timings_s)) | totals
        if self._probe is not None:
            values |= self._probe(record)
        values["timing/metrics"] = time.perf_counter() - begun
        values[POLICY_LAG] = statistics.fmean(lags)
        # One number for each rollout, where they are not all of the weights that the step changes.
        samples = {f"{POLICY_LAG}s": lags} if any(lags) else {}
        return dataclasses.replace(summary, values=values, samples=summary.samples | samples)

    def _of_all_ranks(self, local: StepDiagnostics) -> StepDiagnostics:
        if self._ranks.num_ranks == 1:
            return local
        everybody = StepDiagnostics(weight=self._weight)
        for parts in self._ranks.gather(local.parts()):
            everybody.add_parts(parts)
        return everybody

    def _grade(self, item: ScoredRollout, prompt: StepPrompt) -> bool | None:
        if self._decode is None or prompt.answer is None or not prompt.template:
            return None
        return grade(prompt.template, self._decode(item.rollout.response_token_ids.tolist()), prompt.answer)


def _step_values(record: StepRecord, num_tokens: float, timings_s: Mapping[str, float]) -> dict[str, float]:
    """Optimizer, times and speed."""
    sampling_s = timings_s["rollout"]
    # With a lag the last steps sample nothing.
    speed = {"timing/rollout_tokens_per_second": num_tokens / sampling_s} if sampling_s else {}
    return {
        **{f"timing/{name}": seconds for name, seconds in timings_s.items()},
        **speed,
        "optim/grad_norm": record.grad_norm,
        "optim/lr": record.lr,
        "timing/tokens_per_second": num_tokens / timings_s["step"],
    }


def _token_count(record: StepRecord) -> dict[str, float]:
    return {TOKENS: float(sum(item.num_response_tokens for item in record.scored))}


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
