"""From the configuration to connected teachers, by name: one connection for each queue, pool and tenant.

Names that lead to the same place share its connection, so that a hundred names of one pool cost no hundred heartbeats.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from opd.client import SyncScoreClient
from opd.credentials import load_credentials
from opd.errors import ConfigError
from opd.settings import read_secret
from opd.types import Capability
from opd.vocabulary import Vocabulary
from services.trainer.config import TeacherSettings, TrainSettings
from services.trainer.objectives.dispatch import build_objective
from services.trainer.prompts import TokenizedPrompt
from services.trainer.recipes.self_distillation.settings import TeacherKind
from services.trainer.teacher_client import ScoreClient, ScoreWants, TeacherClient
from services.trainer.teachers import TeacherRouter
from services.trainer.training_run import close_within


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherLink:
    """A teacher as configured, and the open connection to it."""

    settings: TeacherSettings
    client: ScoreClient


def connect_teachers(settings: TrainSettings, opened: ExitStack) -> dict[str, TeacherLink]:
    """Connects every teacher that is a pool; what is connected is closed with `opened`."""
    clients: dict[tuple[str | Path | None, ...], SyncScoreClient] = {}
    links = {}
    for name, teacher in settings.teachers_by_name().items():
        if teacher.kind is not TeacherKind.POOL:
            continue
        url = teacher.url or read_secret("OPD_REDIS_URL")
        if not url:
            field = f"teachers.{name}.url" if name else "teacher.url"
            raise ConfigError(f"{field}: is empty and OPD_REDIS_URL is not set; set one to redis://HOST:PORT/DB")
        files = teacher.token_file, teacher.ca_file, teacher.cert_file, teacher.key_file
        place = url, teacher.pool, teacher.tenant, *files
        if place not in clients:
            clients[place] = _connect(url, teacher, opened)
        links[name] = TeacherLink(settings=teacher, client=clients[place])
    return links


def _connect(url: str, teacher: TeacherSettings, opened: ExitStack) -> SyncScoreClient:
    credentials = load_credentials(
        token_file=teacher.token_file,
        ca_file=teacher.ca_file,
        cert_file=teacher.cert_file,
        key_file=teacher.key_file,
        trust_network=teacher.trust_network,
    )
    client = SyncScoreClient.connect(
        url, teacher=teacher.pool, tenant=teacher.tenant, patience_s=teacher.patience_s, credentials=credentials
    )
    # A queue that is gone must not hold up the end of the run for its whole patience.
    opened.callback(close_within, client.close, "score client")
    return client


def build_router(
    settings: TrainSettings,
    links: dict[str, TeacherLink],
    *,
    vocabulary: Vocabulary,
    student_name: str,
    longest: Mapping[str, TokenizedPrompt] | None = None,
) -> TeacherRouter:
    """The router over all links; nobody has been met yet.

    `longest` has each teacher's longest prompt; without it teachers are taken to see what the student sees.
    """
    longest = longest or {}
    return TeacherRouter(
        {
            name: TeacherClient(
                link.client,
                _wants(settings, link.settings, longest.get(name)),
                vocabulary=vocabulary,
                student_name=student_name,
            )
            for name, link in links.items()
        }
    )


def _wants(settings: TrainSettings, teacher: TeacherSettings, longest: TokenizedPrompt | None) -> ScoreWants:
    max_response_tokens = settings.rollout.max_response_tokens
    return ScoreWants(
        tenant=teacher.tenant,
        teacher=teacher.pool,
        score_top_k=settings.objective.score_top_k,
        needs=_needs(settings),
        teacher_temperature=settings.objective.teacher_temperature,
        encoding=teacher.encoding,
        batch_invariant=settings.deterministic,
        timeout_ms=round(teacher.timeout_s * 1000),
        max_context=settings.rollout.max_prompt_tokens + max_response_tokens,
        longest_prompt="" if longest is None else longest.problem.name,
        longest_context=0 if longest is None else longest.teacher_prompt_token_ids.size + max_response_tokens,
    )


def _needs(settings: TrainSettings) -> frozenset[Capability]:
    """What the run cannot do without: what the loss is made of, and what moves the horizon."""
    needs = build_objective(settings.objective).needs.capabilities
    return needs | {Capability.TEACHER_TOP_K} if settings.objective.horizon is not None else needs
