"""Makes every part of a run and puts them together: the only place of the trainer that knows all of them.

What can be refused cheaply comes first: the run folder, the queue, the model folder, the prompts, the teacher. Whatever
was opened before a refusal is closed again.
"""

import logging
import os
import re
import secrets
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from opd.client import SyncScoreClient
from opd.errors import ConfigError
from services.trainer.alarms.desk import AlarmDesk, require_horizon
from services.trainer.alarms.watch import AlarmWatch
from services.trainer.batch import ScoredRollout, build_batch
from services.trainer.checkpoint import Checkpoint, CheckpointStore, TrainerState
from services.trainer.config import ONLY_TEACHER, OnScoreFailure, TrainSettings
from services.trainer.console import RunConsole
from services.trainer.continuity import begin_anew, check_continuity, public_config, restore, starting_point
from services.trainer.distributed.first_rank import evaluated_once, run_console, run_log
from services.trainer.distributed.pins import SharedPins
from services.trainer.distributed.process_group import TorchRanks
from services.trainer.distributed.ranks import Alone, Ranks, together
from services.trainer.distributed.saving import save_together
from services.trainer.distributed.sharding import gathered, shard_student
from services.trainer.distributed.step_scope import step_scope
from services.trainer.evaluator import Evaluator
from services.trainer.horizon import Horizon
from services.trainer.http_api import RunStatus, StatusServer
from services.trainer.loggers.build import open_loggers
from services.trainer.loggers.config import LoggerSettings
from services.trainer.loggers.contract import Loggers
from services.trainer.loop import LoopSettings, TrainingLoop
from services.trainer.lora import Adapter
from services.trainer.loss import DistillLoss
from services.trainer.models import LoadedModel
from services.trainer.objectives.config import ObjectiveKind
from services.trainer.objectives.dispatch import build_objective
from services.trainer.pipeline import PipelineMode
from services.trainer.probe import PROBE_FILE, GradientProbe
from services.trainer.prompt_files import PreparedPrompts, prepare_prompts
from services.trainer.recipes.self_distillation.held import extra_state, followed, held_teacher
from services.trainer.recipes.self_distillation.teacher import LocalTeacher
from services.trainer.rewards import AnswerReward
from services.trainer.rollout.base import RolloutEngine, SamplingParams
from services.trainer.rollout.build import Engines, build_engines, completed, measured_too
from services.trainer.run_log import RunLog
from services.trainer.step_metrics import StepMetrics
from services.trainer.step_rollouts import Scorer
from services.trainer.stop import StopSignal
from services.trainer.student import Student, StudentOptimizer
from services.trainer.student_start import open_student
from services.trainer.teacher_head import TeacherHead
from services.trainer.teacher_links import TeacherLink, build_router, connect_teachers
from services.trainer.teachers import NoTeachers, TeacherRouter
from services.trainer.training_run import TrainingRun, close_within

_log = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"
LOGGERS_CLOSE_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parts:
    """What has been opened, read and checked before anything is trained."""

    settings: TrainSettings
    stop: StopSignal
    status: RunStatus
    console: RunConsole
    log: RunLog
    store: CheckpointStore
    checkpoint: Checkpoint | None
    loaded: LoadedModel
    adapter: Adapter | None
    prompts: PreparedPrompts
    engines: Engines
    evaluate: Callable[[int], dict[str, float]] | None
    ranks: Ranks
    held: LocalTeacher | None
    teachers: Scorer
    teacher_head: TeacherHead | None


def assemble(settings: TrainSettings, stop: StopSignal, ranks: Ranks | None = None, *, resume: bool) -> TrainingRun:
    """A run that is ready to train; an `OpdError` or a signal here leaves nothing open."""
    require_horizon(settings.alarms, settings.objective.horizon)
    with ExitStack() as opened:
        run = _wire(_prepare(settings, stop, ranks or Alone(), opened, resume=resume), opened)
        run.own(opened.pop_all())
    return run


def _prepare(settings: TrainSettings, stop: StopSignal, ranks: Ranks, opened: ExitStack, *, resume: bool) -> _Parts:
    transformers_logging.disable_progress_bar()
    _make_deterministic(settings)
    if settings.student.threads is not None:
        torch.set_num_threads(settings.student.threads)
    status, console = RunStatus(), run_console(ranks)
    log = run_log(ranks, settings.run_dir)
    store = CheckpointStore(settings.run_dir / CHECKPOINTS, keep_last=settings.checkpoint.keep_last)
    with together(ranks), stop.interruptible():
        checkpoint = starting_point(log, store, resume=resume)
        if ranks.rank == 0:
            _serve_status(settings, status, opened)
        links = connect_teachers(settings, opened) if settings.objective.uses_teacher else {}
        loaded, adapter = open_student(settings, checkpoint, on_host=ranks.num_ranks > 1)
        prompts = prepare_prompts(settings, loaded.tokenizer)
        if checkpoint is not None:
            check_continuity(checkpoint, prompts, settings)
    if isinstance(ranks, TorchRanks):
        with ranks.in_step():
            shard_student(loaded.model, ranks.mesh)
    with gathered(loaded.model, ranks), together(ranks), stop.interruptible():
        first_prompt = prompts.schedule.step_prompts(0)[0].prompt_token_ids
        engines = build_engines(settings, loaded, opened, probe_prompt=first_prompt, ranks=ranks)
        _check_context(settings, engines.training.max_context)
        held = None
        if settings.objective.uses_teacher:
            held = held_teacher(settings, loaded, checkpoint, in_step=ranks.in_step)
        if held is not None:
            links = {ONLY_TEACHER: TeacherLink(settings=settings.teacher, client=held)}
        # Teachers may be long in coming, so they are met last.
        of_rank_0 = _evaluator(settings, loaded, log, engines.evaluation)
        evaluate = evaluated_once(ranks, loaded.model, of_rank_0, stop.interruptible)
        status.enter("waiting")
        teachers, teacher_head = _meet_teachers(settings, links, loaded, prompts, console)
    return _Parts(
        settings=settings,
        stop=stop,
        status=status,
        console=console,
        log=log,
        store=store,
        checkpoint=checkpoint,
        loaded=loaded,
        adapter=adapter,
        prompts=prompts,
        engines=engines,
        evaluate=evaluate,
        ranks=ranks,
        held=held,
        teachers=teachers,
        teacher_head=teacher_head,
    )


def _wire(parts: _Parts, opened: ExitStack) -> TrainingRun:
    settings, loaded, log = parts.settings, parts.loaded, parts.log
    student = Student(
        loaded.model,
        num_defined_ids=loaded.num_defined_ids,
        temperature=settings.objective.student_temperature or settings.rollout.temperature,
        row_chunk=settings.student.row_chunk,
        gradient_checkpointing=settings.student.gradient_checkpointing,
    )
    optimizer = StudentOptimizer(loaded.model, settings.optim, in_step=parts.ranks.in_step)
    config = public_config(settings)
    log.create(config)
    if parts.checkpoint is not None:
        restore(parts.checkpoint, optimizer, log, settings)
    else:
        begin_anew(log)
    # What is read of the run from here on is what rank 0 has left of it.
    parts.ranks.gather(None)
    loss = DistillLoss(student, build_objective(settings.objective), settings.objective, parts.teacher_head)
    first_step = parts.checkpoint.state.step if parts.checkpoint else 0
    horizon = _horizon(settings, log)
    num_steps = settings.steps or parts.prompts.schedule.num_steps
    pins = SharedPins(parts.teachers, parts.ranks) if parts.ranks.num_ranks > 1 else None
    loop = TrainingLoop(
        _loop_settings(settings, num_steps, parts.ranks),
        prompts=parts.prompts.schedule,
        engine=completed(parts.engines, student, settings),
        teachers=pins or parts.teachers,
        student=student,
        loss=loss,
        optimizer=optimizer,
        weights=followed(parts.engines.weights, parts.held),
        reward=AnswerReward(_decoder(loaded.tokenizer)) if settings.objective.uses_outcome else None,
        horizon=horizon,
        first_step=first_step,
        interruptible=parts.stop.interruptible,
        scope=step_scope(parts.ranks, student, reduces_each_round=settings.distributed.reduces_each_round, pins=pins),
    )
    loggers = _loggers(parts, opened, config=config, first_step=first_step)
    return TrainingRun(
        settings,
        num_steps=num_steps,
        loop=loop,
        metrics=_step_metrics(parts, student, loss),
        log=log,
        save=_saver(parts, optimizer, config),
        evaluate=parts.evaluate,
        status=parts.status,
        console=parts.console,
        ranks=parts.ranks,
        alarms=_alarms(parts, loggers, horizon),
        loggers=loggers,
    )


def _saver(parts: _Parts, optimizer: StudentOptimizer, config: dict[str, Any]) -> Callable[[int], Path]:
    loaded = parts.loaded

    def save(step: int) -> Path:
        state = TrainerState(step=step, seed=parts.settings.seed, prompts_digest=parts.prompts.digest, config=config)
        extra, adapter = extra_state(parts.held), parts.adapter
        return save_together(parts.ranks, parts.store, loaded.model, loaded.tokenizer, optimizer, state, extra, adapter)

    return save


def _loggers(parts: _Parts, opened: ExitStack, *, config: dict[str, Any], first_step: int) -> Loggers:
    wanted = parts.settings.loggers if parts.ranks.rank == 0 else LoggerSettings()
    loggers = open_loggers(wanted, parts.settings.run_dir, config=config, first_step=first_step)
    # One that sends over a network may hang when the other side is gone.
    opened.callback(close_within, loggers.close, "loggers", limit_s=LOGGERS_CLOSE_S)
    return loggers


def _alarms(parts: _Parts, loggers: Loggers, horizon: Horizon | None) -> AlarmDesk:
    settings = parts.settings.alarms
    return AlarmDesk(
        settings,
        AlarmWatch(settings, parts.log.steps()),
        log=parts.log,
        say=parts.console.say,
        note=loggers.log_text,
        status=parts.status,
        shorten=horizon.shorten if horizon else None,
    )


def _step_metrics(parts: _Parts, student: Student, loss: DistillLoss) -> StepMetrics:
    settings = parts.settings

    def loss_of(scored: Sequence[ScoredRollout]) -> torch.Tensor:
        return loss(build_batch(scored, student.device)).loss_sum

    probe = GradientProbe(
        loss_of,
        student.model.parameters(),
        objective=settings.objective,
        # A gradient of one rollout alone does not exist where weights are in shards.
        every_steps=settings.metrics.coherence_every_steps if parts.ranks.num_ranks == 1 else 0,
        num_rollouts=settings.metrics.coherence_rollouts,
        path=settings.run_dir / PROBE_FILE,
    )
    return StepMetrics(
        weight=settings.objective.weight,
        decode=_decoder(parts.loaded.tokenizer) if settings.data.grade else None,
        fraction=settings.metrics.fraction,
        seed=settings.seed,
        probe=measured_too(parts.engines, probe.measure),
        ranks=parts.ranks,
    )


def _make_deterministic(settings: TrainSettings) -> None:
    torch.manual_seed(settings.seed)
    if settings.deterministic:
        # cuBLAS reads this when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _serve_status(settings: TrainSettings, status: RunStatus, opened: ExitStack) -> None:
    if not settings.http.enabled:
        return
    server = StatusServer(status, host=settings.http.host, port=settings.http.port)
    opened.callback(server.close)
    server.start()
    _log.info("status on http://%s:%d/v1/run", settings.http.host, server.port)


def _meet_teachers(
    settings: TrainSettings,
    links: dict[str, TeacherLink],
    loaded: LoadedModel,
    prompts: PreparedPrompts,
    console: RunConsole,
) -> tuple[Scorer, TeacherHead | None]:
    """Whoever is to score, willing to, and the output head where the objective needs one."""
    if not settings.objective.uses_teacher:
        return NoTeachers(), None
    teachers = build_router(
        settings, links, vocabulary=loaded.vocabulary, student_name=loaded.name, longest=prompts.longest
    )
    teachers.shake_hands(wait_s=settings.teacher.wait_s, on_wait=console.say)
    if settings.objective.kind is not ObjectiveKind.FULL_VOCABULARY:
        return teachers, None
    teachers.try_scoring(f"probe-{secrets.token_hex(4)}.0")
    return teachers, _teacher_head(settings, links, teachers, loaded)


def _teacher_head(
    settings: TrainSettings, links: dict[str, TeacherLink], teachers: TeacherRouter, loaded: LoadedModel
) -> TeacherHead:
    """Fetched before anything is sampled, unless it is cached already."""
    device = next(loaded.model.parameters()).device
    client = links[ONLY_TEACHER].client
    assert isinstance(client, SyncScoreClient)
    head = TeacherHead(client, lambda: teachers.info(ONLY_TEACHER), folder=settings.teacher.head_cache, device=device)
    head()
    return head


def _check_context(settings: TrainSettings, max_context: int) -> None:
    rollout = settings.rollout
    if rollout.max_prompt_tokens + rollout.max_response_tokens > max_context:
        raise ConfigError(
            f"rollout.max_prompt_tokens={rollout.max_prompt_tokens} and "
            f"max_response_tokens={rollout.max_response_tokens} are above the student's context of {max_context} "
            "tokens; lower one of them"
        )


def _mode(settings: TrainSettings, ranks: Ranks) -> PipelineMode:
    # Which rollouts are trained together must not depend on when their scores come; and ranks train in lock-step, so
    # not before the last of them has its scores.
    waits = settings.deterministic or ranks.num_ranks > 1
    return PipelineMode.SEQUENTIAL if waits else settings.pipeline.mode


def _loop_settings(settings: TrainSettings, num_steps: int, ranks: Ranks) -> LoopSettings:
    rollout = settings.rollout
    # A step that is taken again after a resume must not be answered with replies to its first attempt.
    run = f"{re.sub(r'[^a-z0-9-]+', '-', settings.run_dir.name.lower())[:32]}-{secrets.token_hex(4)}"
    run = ranks.gather(run)[0]
    return LoopSettings(
        run=run,
        num_steps=num_steps,
        rollouts_per_prompt=rollout.rollouts_per_prompt,
        sampling=SamplingParams(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_response_tokens=rollout.max_response_tokens,
            seed=settings.seed,
        ),
        seed=settings.seed,
        max_micro_batch_tokens=settings.student.max_micro_batch_tokens,
        aggregation=settings.objective.aggregation,
        has_entropy_bonus=settings.objective.entropy_bonus > 0,
        drops_unscored=settings.teacher.on_score_failure is OnScoreFailure.DROP,
        mode=_mode(settings, ranks),
        max_policy_lag=settings.pipeline.max_policy_lag,
    )


def _horizon(settings: TrainSettings, log: RunLog) -> Horizon | None:
    """Where the last step of a resumed run left it."""
    config = settings.objective.horizon
    if config is None:
        return None
    return Horizon(config, longest=settings.rollout.max_response_tokens, records=log.steps())


def _evaluator(
    settings: TrainSettings, loaded: LoadedModel, log: RunLog, engine: RolloutEngine
) -> Callable[[int], dict[str, float]] | None:
    if not settings.evaluation.files:
        return None
    evaluator = Evaluator(settings, loaded, engine=engine, decode=_decoder(loaded.tokenizer), log=log)
    return evaluator.evaluate


def _decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    def decode(token_ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    return decode
