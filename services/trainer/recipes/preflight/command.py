"""What `opd preflight` does, from its settings to its report."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from rich.console import Console
from transformers.utils import logging as transformers_logging

from opd.errors import ConfigError
from opd.types import TeacherInfo
from services.trainer.batch import ScoredRollout
from services.trainer.loss import DistillLoss
from services.trainer.models import LoadedModel, load_model
from services.trainer.objectives.config import ObjectiveKind
from services.trainer.objectives.dispatch import build_objective
from services.trainer.recipes.preflight.findings import Findings, accuracy_difference, find_out
from services.trainer.recipes.preflight.gradient import BatchGradient, batch_gradient
from services.trainer.recipes.preflight.measuring import Measuring, Progress, engine_of
from services.trainer.recipes.preflight.page import print_findings, write_report
from services.trainer.recipes.preflight.pilots import pilot_slopes, run_pilot, trained_student
from services.trainer.recipes.preflight.prompt_sets import PromptSets, draw_prompts, told_of
from services.trainer.recipes.preflight.records import RecordFile
from services.trainer.recipes.preflight.rules import PilotSlopes
from services.trainer.recipes.preflight.settings import AS_IS, PreflightSettings
from services.trainer.recipes.preflight.teachers import MetTeacher, meet_teachers, name_teachers
from services.trainer.stop import StopRequested, StopSignal
from services.trainer.student import Student


def preflight_command(settings: PreflightSettings, console: Console) -> int:
    """Prints the tables, writes the report; the exit code. Ctrl-C loses at most the chunk of prompts under way."""
    with StopSignal() as stop:
        try:
            found = preflight(settings, console, stop)
        except StopRequested as request:
            console.print("stopped; the same command goes on", markup=False)
            return request.exit_code
    print_findings(found, console)
    return 0


def preflight(settings: PreflightSettings, console: Console, stop: StopSignal) -> Findings:
    """Measures what is missing in `output_dir` and writes the report there."""
    _check(settings)
    transformers_logging.disable_progress_bar()
    say = _progress_lines(console)
    with ExitStack() as opened:
        with stop.interruptible():
            named = name_teachers(settings)
            student = load_model(settings.student, device=settings.device)
            sets = draw_prompts(settings, student.tokenizer)
            fitted = _fitted(settings, student, sets)
            teachers = meet_teachers(fitted, named, student, opened)
            records = RecordFile.open(settings.output_dir, _identity(fitted, student, teachers, sets))
            measuring = Measuring(fitted, student, teachers, sets, records, say)
            measuring.measure()
            gradients = _gradients(fitted, student, sets, measuring)
            starts_from = {"student": _identity_of(student), "prompts": sets.digest}
        pilots = _pilots(fitted, teachers, starts_from, measuring, records, stop, console)
    found = find_out(fitted, student.name, teachers, records, gradients, pilots, sets.same_as_is)
    written = write_report(found, settings.output_dir, fitted.model_dump(mode="json"))
    console.print("wrote " + ", ".join(str(path) for path in written), markup=False, soft_wrap=True)
    return found


def _check(settings: PreflightSettings) -> None:
    objective = settings.objective
    if objective.kind not in (ObjectiveKind.TOP_K, ObjectiveKind.SAMPLED_TOKEN):
        lacks = "has no teacher to judge" if not objective.uses_teacher else "needs more than the scores asked for here"
        raise ConfigError(f"objective.kind={objective.kind}: {lacks}; choose top_k or sampled_token")
    if objective.uses_outcome:
        raise ConfigError(
            f"objective.outcome.weight={objective.outcome.weight}: a preflight judges the teacher's signal alone; "
            "leave it at 0"
        )
    if settings.probe_rollouts > settings.batch_rollouts:
        raise ConfigError(
            f"probe_rollouts={settings.probe_rollouts} is above batch_rollouts={settings.batch_rollouts}, of which "
            "they are; lower it"
        )


def _fitted(settings: PreflightSettings, student: LoadedModel, sets: PromptSets) -> PreflightSettings:
    """Limits as narrow as the prompts allow, so that no teacher is refused for room that nobody needs."""
    longest = max(prompt.prompt_token_ids.size for prompts in sets.by_template.values() for prompt in prompts)
    if settings.pilot.steps:
        # A pilot draws from all prompts below the limit, not from those of the preflight alone.
        longest = max(longest, settings.max_prompt_tokens)
    room = engine_of(student, settings, score_top_k=None).max_context - longest
    if room < 1:
        raise ConfigError(
            f"max_prompt_tokens={longest}: leaves no room for a response in the student's context; lower it"
        )
    response = min(settings.max_response_tokens, room)
    return settings.model_copy(update={"max_prompt_tokens": longest, "max_response_tokens": response})


def _identity(
    settings: PreflightSettings, student: LoadedModel, teachers: Sequence[MetTeacher], sets: PromptSets
) -> dict[str, Any]:
    """Everything that decides what is measured of a prompt."""
    fields = ("rollouts_per_prompt", "temperature", "max_response_tokens", "seed")
    return {
        "student": _identity_of(student),
        "teachers": {teacher.name: _identity_of(teacher.info) if teacher.info else [] for teacher in teachers},
        "prompts": {name: [told_of(prompt) for prompt in prompts] for name, prompts in sets.by_template.items()},
        "k": settings.objective.score_top_k,
        "teacher_temperature": settings.objective.teacher_temperature,
        **{name: getattr(settings, name) for name in fields},
    }


def _identity_of(model: LoadedModel | TeacherInfo) -> list[Any]:
    """What a model answers is decided by its weights and by the tokens that end a response."""
    return [model.fingerprint, sorted(model.eos_token_ids)]


def _gradients(
    settings: PreflightSettings, model: LoadedModel, sets: PromptSets, measuring: Measuring
) -> dict[str, BatchGradient]:
    """Of the first prompts' rollouts, for every teacher."""
    num_prompts = -(-settings.batch_rollouts // settings.rollouts_per_prompt)
    prompts = sets.by_template[AS_IS][:num_prompts]
    items = [item for group in measuring.scored(prompts, range(len(prompts))) for item in group]
    student = Student(
        model.model,
        num_defined_ids=model.num_defined_ids,
        temperature=settings.objective.student_temperature or settings.temperature,
    )
    loss = DistillLoss(student, build_objective(settings.objective), settings.objective)
    return {
        name: batch_gradient(
            student,
            loss,
            [ScoredRollout(rollout=item.rollout, scores=item.scores[name]) for item in items][
                : settings.batch_rollouts
            ],
            aggregation=settings.objective.aggregation,
            max_micro_batch_tokens=settings.max_micro_batch_tokens,
            num_probe_rollouts=settings.probe_rollouts,
        )
        for name in (items[0].scores if items else ())
    }


def _pilots(
    settings: PreflightSettings,
    teachers: Sequence[MetTeacher],
    starts_from: Mapping[str, Any],
    measuring: Measuring,
    records: RecordFile,
    stop: StopSignal,
    console: Console,
) -> dict[str, PilotSlopes]:
    """Trains with every teacher that was not refused, and has the trained students answer the same prompts."""
    found: dict[str, PilotSlopes] = {}
    for teacher in teachers if settings.pilot.steps else ():
        if teacher.router is None:
            continue
        # Not interruptible as a whole: the run itself says where it can be stopped without being torn.
        run_dir = run_pilot(settings, teacher, starts_from, stop, lambda line: console.print(line, markup=False))
        with stop.interruptible():
            measuring.answer(run_dir.name, load_model(str(trained_student(run_dir)), device=settings.device))
        gain = accuracy_difference(records.answers_of(run_dir.name), records.prompts_in(AS_IS), settings.seed)
        found[teacher.name] = pilot_slopes(run_dir, gain, seed=settings.seed)
    return found


def _progress_lines(console: Console) -> Progress:
    """One line that changes where there is a terminal, a line per tenth elsewhere."""
    last: dict[str, int] = {}

    def say(name: str, done: int, total: int) -> None:
        tenth = 10 * done // max(1, total)
        if last.get(name) == tenth:
            return
        last[name] = tenth
        console.print(f"{name}: {done}/{total} prompts", markup=False, highlight=False)

    return say
