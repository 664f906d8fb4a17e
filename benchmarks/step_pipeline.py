"""Does a step wait for its teacher? `python -m benchmarks.step_pipeline [--quick] [--no-real]`

Two parts, each with the trainer on one core, Redis and the teacher on the other.
- Stages of known duration: the real loop, score client, queue and teacher service around a sampler, an engine and a
  student that sleep as long as they are told. 256 rollouts a step in 32 slots; response lengths are log-normal with
  median 128 and sigma 0.8, cut at 16 and 1,024; prompts of 32 tokens. The teacher's time and the student's are each
  half the sampling time, or the teacher's is all of it. The ideal is the shortest makespan that these durations allow
  (`pipeline_ideal`); a share is the ideal's time over the measured one, over all steps but the first (and the last).
- The bundled student and teacher as processes: `opd train` in each way on the same prompts and seed.

`exposed_wait_share` is `timing/score_wait` over the step, streaming, with the teacher at half the sampling time;
`real_streaming_speedup` the sequential step's time over the streaming one's, `real_lag1_speedup` the same for a lag,
where both have the weight for staleness that it needs; medians of rounds that take turns.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmarks.pipeline_ideal import (
    RolloutLoad,
    StepLoad,
    elsewhere_steps,
    end_times,
    sampling_s,
    sequential_steps,
    streaming_steps,
)
from benchmarks.pool_scaling import start
from benchmarks.report import say, show
from opd.queue.embedded import EmbeddedRedis

NUM_PROMPTS, PER_PROMPT, SLOTS = 64, 4, 32
PROMPT_TOKENS = 32
MEDIAN, SIGMA, SHORTEST, LONGEST = 128, 0.8, 16, 1024
TRAINING_SHARE = 0.5
TEACHER_SHARES = (0.5, 1.0)
PART_TOKENS = 4096
BATCH_TOKENS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One way of going through a step."""

    name: str
    mode: str = "streaming"
    lag: int = 0
    samples_elsewhere: bool = False

    def ideal_s(self, loads: Sequence[StepLoad]) -> list[float]:
        """The shortest makespan of each step."""
        if self.samples_elsewhere:
            return elsewhere_steps(loads)
        return sequential_steps(loads) if self.mode == "sequential" else streaming_steps(loads, lag=self.lag)


CASES = (
    Case(name="sequential", mode="sequential"),
    Case(name="streaming"),
    Case(name="lag 1", lag=1),
    Case(name="streaming, sampler elsewhere", samples_elsewhere=True),
)


def main() -> None:
    """Parses before anything heavy is imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="of each case (default 6)")
    parser.add_argument("--decode-ms", type=float, default=1.5, help="of one token in all slots (default 1.5)")
    parser.add_argument("--quick", action="store_true", help="3 steps at a third of the time")
    parser.add_argument("--no-real", action="store_true", help="without the bundled models")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.decode_ms = 3, 0.5
    trainer_core, teacher_core = _pin()
    found = {share: _timed_cases(args, share, teacher_core) for share in TEACHER_SHARES}
    real = {} if args.no_real else _real_steps(args.steps, trainer_core, teacher_core)
    by_case = found[TEACHER_SHARES[0]]
    result: dict[str, Any] = {
        "streaming_share_of_ideal": by_case["streaming"]["share_of_ideal"],
        "lag1_share_of_ideal": by_case["lag 1"]["share_of_ideal"],
        "exposed_wait_share": by_case["streaming"]["wait_share"],
        "real_streaming_speedup": round(real["sequential"] / real["streaming"], 3) if real else None,
        "real_lag1_speedup": round(real["sequential, weighted"] / real["lag 1"], 3) if real else None,
        "real_step_s": real,
        "by_teacher_share": {str(share): cases for share, cases in found.items()},
        "decode_step_ms": args.decode_ms,
        "steps": args.steps,
    }
    rows = [
        [share, name, case["step_s"], case["ideal_s"], case["share_of_ideal"], case["wait_share"]]
        for share, cases in found.items()
        for name, case in cases.items()
    ]
    rows += [["real", name, seconds, "", "", ""] for name, seconds in real.items()]
    show(["teacher", "case", "step s", "ideal s", "share", "wait"], rows, result)


def _pin() -> tuple[int, int]:
    """This process to one core; returns it and the other one, or the same where there is but one."""
    cores = sorted(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = "1"
    os.sched_setaffinity(0, {cores[0]})
    return cores[0], cores[-1]


def lengths_of(step: int) -> list[int]:
    """Response lengths, the same for every case."""
    drawn = np.random.default_rng(step).lognormal(np.log(MEDIAN), SIGMA, NUM_PROMPTS * PER_PROMPT)
    return [int(length) for length in drawn.clip(SHORTEST, LONGEST)]


def _timed_cases(args: argparse.Namespace, teacher_share: float, teacher_core: int) -> dict[str, dict[str, float]]:
    """By case. The teacher's rate is such that it scores a step in `teacher_share` of the time of its sampling."""
    loads = [_load(step, args.decode_ms / 1000, teacher_share) for step in range(args.steps)]
    num_tokens = sum(length + PROMPT_TOKENS for step in range(args.steps) for length in lengths_of(step))
    scoring_s = sum(item.scoring for load in loads for item in load)
    with ExitStack() as opened:
        redis = opened.enter_context(EmbeddedRedis(Path(opened.enter_context(tempfile.TemporaryDirectory())) / "redis"))
        os.sched_setaffinity(redis.pid, {teacher_core})
        replica = start("sleeping_replica", redis.url, "r0", num_tokens / scoring_s, BATCH_TOKENS)
        opened.callback(replica.wait, 30)
        opened.callback(replica.terminate)
        os.sched_setaffinity(replica.pid, {teacher_core})
        assert replica.stdout is not None
        opened.callback(replica.stdout.close)
        if replica.stdout.readline() != "ready\n":
            raise RuntimeError("the replica did not start")
        return {case.name: _timed_case(case, args, loads, redis.url) for case in CASES}


def _load(step: int, decode_s: float, teacher_share: float) -> StepLoad:
    lengths = lengths_of(step)
    ends = end_times(lengths, SLOTS, decode_s)
    token_s = max(ends) / sum(length + PROMPT_TOKENS for length in lengths)
    items = [
        RolloutLoad(
            ends=end,
            scoring=teacher_share * token_s * (length + PROMPT_TOKENS),
            training=TRAINING_SHARE * token_s * (length + PROMPT_TOKENS),
        )
        for length, end in zip(lengths, ends, strict=True)
    ]
    return sorted(items, key=lambda item: item.ends)


def _timed_case(case: Case, args: argparse.Namespace, loads: Sequence[StepLoad], url: str) -> dict[str, float]:
    say(f"{case.name}, {args.steps} steps")
    records = _run_loop(case, args, loads, url)
    # The first step fills what runs ahead, and the last one samples nothing.
    kept = range(1, len(records) - (1 if case.lag else 0))
    steps_s = [records[step].timings_s["step"] for step in kept]
    ideal_s = [case.ideal_s(loads)[step] for step in kept]
    wait_s = sum(records[step].timings_s["score_wait"] for step in kept)
    return {
        "step_s": round(statistics.median(steps_s), 3),
        "ideal_s": round(statistics.median(ideal_s), 3),
        "share_of_ideal": round(sum(ideal_s) / sum(steps_s), 3),
        "wait_share": round(wait_s / sum(steps_s), 4),
        "sampling_s": round(statistics.fmean(sampling_s(loads[step]) for step in kept), 3),
    }


def _run_loop(case: Case, args: argparse.Namespace, loads: Sequence[StepLoad], url: str) -> list[Any]:
    import torch

    from benchmarks.sleeping import TEACHER
    from benchmarks.timed_stages import TimedEngine, TimedLoss, timed_student
    from opd.client import SyncScoreClient
    from services.trainer.config import OptimSettings
    from services.trainer.loop import LoopSettings, StepRecord, TrainingLoop
    from services.trainer.loss import DistillLoss
    from services.trainer.pipeline import PipelineMode
    from services.trainer.rollout.base import SamplingParams
    from services.trainer.student import StudentOptimizer
    from services.trainer.weights import SharedWeights

    weight = torch.nn.Linear(1, 1, bias=False)
    token_s = sum(item.training for load in loads for item in load) / sum(
        length + PROMPT_TOKENS for step in range(len(loads)) for length in lengths_of(step)
    )
    engine = TimedEngine(
        lengths_of, slots=SLOTS, step_s=args.decode_ms / 1000, samples_elsewhere=case.samples_elsewhere
    )
    settings = LoopSettings(
        run=f"pipeline-{case.name.split(',')[0].replace(' ', '-')}-{len(loads)}-{int(case.samples_elsewhere)}",
        num_steps=len(loads),
        rollouts_per_prompt=PER_PROMPT,
        sampling=SamplingParams(),
        seed=0,
        max_micro_batch_tokens=PART_TOKENS,
        mode=PipelineMode(case.mode),
        max_policy_lag=case.lag,
    )
    records: list[StepRecord] = []
    with SyncScoreClient.connect(url, teacher=TEACHER, tenant="default") as client:
        TrainingLoop(
            settings,
            prompts=_Prompts(),
            engine=engine,
            teachers=_Queue(client),
            student=timed_student(),
            loss=cast(DistillLoss, TimedLoss(weight.weight, token_s=token_s)),
            optimizer=StudentOptimizer(weight, OptimSettings()),
            weights=SharedWeights(engine),
        ).run(records.append)
    return records


class _Prompt:
    prompt_token_ids = teacher_prompt_token_ids = np.arange(PROMPT_TOKENS, dtype=np.int32)
    teacher = template = ""
    answer = None


class _Prompts:
    def step_prompts(self, step: int) -> Sequence[_Prompt]:
        del step
        return [_Prompt()] * NUM_PROMPTS


class _Queue:
    """The real client; the sleeping teacher gives the sampled tokens' log-probs and nothing else."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def pin(self) -> dict[str, str]:
        return {"": self._client.info().fingerprint}

    def send(self, rollout: Any, prompt: Any) -> "Future[Any]":
        from benchmarks.sleeping import TEACHER
        from opd.types import ScoreRequest

        reply: Future[Any] = self._client.submit(
            ScoreRequest(
                rollout_id=rollout.rollout_id,
                tenant="default",
                teacher=TEACHER,
                prompt_token_ids=prompt.teacher_prompt_token_ids,
                response_token_ids=rollout.response_token_ids,
            )
        )
        return reply

    def accept(self, rollout: Any, prompt: Any, reply: Any, pinned: Any) -> Any:
        del rollout, prompt, pinned
        return reply.scores


@dataclass(frozen=True, kw_only=True, slots=True)
class RealCase:
    """One way of running `opd train`."""

    name: str
    mode: str
    lag: int = 0
    is_weighted: bool = False
    """With a weight for staleness, which a lag needs: its loss reads the whole output head."""

    def settings(self) -> list[str]:
        weight = ["objective.staleness_cap=2.0"] if self.is_weighted else []
        return [f"pipeline.mode={self.mode}", f"pipeline.max_policy_lag={self.lag}", *weight]


REAL_CASES = (
    RealCase(name="sequential", mode="sequential"),
    RealCase(name="streaming", mode="streaming"),
    RealCase(name="sequential, weighted", mode="sequential", is_weighted=True),
    RealCase(name="lag 1", mode="streaming", lag=1, is_weighted=True),
)
REAL_ROUNDS = 3


def _real_steps(steps: int, trainer_core: int, teacher_core: int) -> dict[str, float]:
    """Median seconds of a step by case, of `opd train` on the bundled student and teacher. The cases take turns."""
    from testbed.processes import Processes
    from testbed.stack import start_teacher

    found: dict[str, list[float]] = {case.name: [] for case in REAL_CASES}
    with tempfile.TemporaryDirectory() as name, EmbeddedRedis(Path(name) / "redis") as redis:
        folder = Path(name)
        os.sched_setaffinity(redis.pid, {teacher_core})
        with Processes(log_dir=folder / "logs") as processes:
            os.sched_setaffinity(0, {teacher_core})
            start_teacher(processes, folder / "teacher", redis.url, "teacher-post")
            os.sched_setaffinity(0, {trainer_core})
            for turn in range(REAL_ROUNDS):
                for index, case in enumerate(REAL_CASES):
                    say(f"opd train, {case.name}, {steps} steps, turn {turn + 1}")
                    found[case.name] += _real_case(processes, folder / f"run-{turn}-{index}", redis.url, case, steps)
    return {name: round(statistics.median(seconds), 3) for name, seconds in found.items()}


def _real_case(processes: Any, run_dir: Path, url: str, case: RealCase, steps: int) -> list[float]:
    """Seconds of each step but the first, and with a lag but the last, which samples nothing."""
    from testbed.stack import DATA, MODELS

    settings = [
        f"student.model={json.dumps(str(MODELS / 'student-base'))}", f"run_dir={json.dumps(str(run_dir))}",
        f"data.files={json.dumps([str(DATA / 'train.jsonl')])}",
        f"teacher.url={json.dumps(url)}", "teacher.pool=teacher-post",
        f"steps={steps}", *case.settings(),
        "student.device=cpu", "checkpoint.every_steps=0", "optim.warmup_steps=0", "metrics.coherence_every_steps=0",
    ]  # fmt: skip
    config = Path(__file__).parents[1] / "testbed" / "demo.toml"
    trainer = processes.start("trainer", ["-m", "services.trainer", "--config", str(config), *settings])
    if trainer.process.wait(900) != 0:
        raise RuntimeError(f"the trainer failed: {trainer.last_line()}")
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    seconds: list[float] = [record["timing/step"] for record in map(json.loads, lines) if "timing/step" in record]
    return seconds[1 : len(seconds) - bool(case.lag)]


if __name__ == "__main__":
    main()
