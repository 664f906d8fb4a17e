"""Where the teachers of a study are: a local folder or hub name, or a pool by URL#POOL.

Each is checked when it is found, before anything is sampled; the weights of a local one are loaded when it is its turn,
so that several need not fit side by side.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from opd.client import SyncScoreClient
from opd.credentials import Credentials
from opd.types import TeacherInfo
from opd.vocabulary import Vocabulary, check_same_vocabulary, describe_vocabulary
from services.trainer.evaluation.logprobs import LocalSource, LogprobSource, PoolSource
from services.trainer.evaluation.opening import Loading, labels, open_model
from services.trainer.models import LoadedModel, load_tokenizer

_log = logging.getLogger(__name__)
_PATIENCE_S = 60.0


class TeacherPlace(Protocol):
    """A teacher that has been found."""

    def open(self, loading: Loading) -> LogprobSource:
        """Ready to be asked."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class _LocalPlace:
    path: str
    label: str

    def open(self, loading: Loading) -> LogprobSource:
        opened = open_model(self.path, loading, label=self.label)
        return LocalSource(opened.loaded, name=self.label, temperature=1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class _PoolPlace:
    source: PoolSource

    def open(self, loading: Loading) -> LogprobSource:
        return self.source


def find_teachers(
    names: Sequence[str],
    student: LoadedModel,
    student_name: str,
    tenant: str,
    credentials: Credentials | None,
    opened: ExitStack,
) -> list[TeacherPlace]:
    """Every teacher, checked; what is connected is closed with `opened`.

    Raises `ConfigError` for one that is not there, `VocabularyMismatchError` for one with another id map and what the
    client raises for a pool that cannot be reached.
    """
    shown = labels(names)
    return [
        _find_pool(name, student, student_name, tenant, credentials, opened)
        if "://" in name
        else _find_local(name, label, student, student_name)
        for name, label in zip(names, shown, strict=True)
    ]


def check_vocabulary(student: LoadedModel, student_name: str, teacher: Vocabulary, teacher_name: str) -> None:
    """`VocabularyMismatchError` naming both for different id maps; another chat template is a warning."""
    info = TeacherInfo(
        teacher=teacher_name,
        fingerprint="",
        model=teacher_name,
        engine="local",
        vocab_rows=teacher.num_defined_ids,
        num_defined_ids=teacher.num_defined_ids,
        id_map_hash=teacher.id_map_hash,
        chat_template_hash=teacher.chat_template_hash,
    )
    for warning in check_same_vocabulary(student.vocabulary, student_name, info):
        _log.warning("%s", warning)


def _find_local(path: str, label: str, student: LoadedModel, student_name: str) -> TeacherPlace:
    check_vocabulary(student, student_name, describe_vocabulary(load_tokenizer(path)), label)
    return _LocalPlace(path=path, label=label)


def _find_pool(
    name: str, student: LoadedModel, student_name: str, tenant: str, credentials: Credentials | None, opened: ExitStack
) -> TeacherPlace:
    url, _, pool = name.partition("#")
    teacher = pool or "teacher"
    client = SyncScoreClient.connect(
        url, teacher=teacher, tenant=tenant, patience_s=_PATIENCE_S, credentials=credentials
    )
    opened.callback(client.close)
    info = client.info()
    for warning in check_same_vocabulary(student.vocabulary, student_name, info):
        _log.warning("%s", warning)
    source = PoolSource(
        client, teacher=teacher, tenant=tenant, fingerprint=info.fingerprint, name=f"{info.model} ({teacher})"
    )
    return _PoolPlace(source=source)
