"""Rows in, parts out: order, resumption by content, and what is refused; the teacher's answers are plain formulas."""

import dataclasses
import json
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from opd.errors import ConfigError, DeadLetterError, QueueUnavailableError
from opd.types import Capability, ScoreReply, ScoreRequest, Scores, TeacherInfo
from services.score_file.parts import PartStore
from services.score_file.rows import RowReader
from services.score_file.scoring import Outcome, score_rows
from services.score_file.settings import Overlong, ScoreFileSettings

INFO = TeacherInfo(
    teacher="teacher", fingerprint="00ff", model="m", engine="e", vocab_rows=9, num_defined_ids=9, id_map_hash="h",
    max_context=12, capabilities=frozenset(Capability),
)  # fmt: skip


class Formula:
    """Scores that tell which request they belong to; counts what is open at a time."""

    def __init__(self, *, fails_at: int | None = None, error: Exception | None = None) -> None:
        self.asked: list[int] = []
        self._fails_at = fails_at
        self._error = error

    def submit(self, request: ScoreRequest) -> "Future[ScoreReply]":
        index = int(request.rollout_id.removeprefix("row."))
        self.asked.append(index)
        future: Future[ScoreReply] = Future()
        if index == self._fails_at and self._error is not None:
            future.set_exception(self._error)
            return future
        ids_R = request.response_token_ids
        topk_Rk = np.tile(np.arange(2, dtype=np.int32), (ids_R.size, 1))
        candidates = request.candidate_token_ids
        scores = Scores(
            sampled_logprobs=-(ids_R + index).astype(np.float32),
            topk_token_ids=topk_Rk,
            topk_logprobs=-topk_Rk.astype(np.float32),
            entropy=np.full(ids_R.size, index, np.float32),
            candidate_logprobs=None if candidates is None else -candidates.astype(np.float32),
        )
        future.set_result(ScoreReply(rollout_id=request.rollout_id, teacher_fingerprint="00ff", scores=scores))
        return future


def write(path: Path, num_rows: int, **changed: object) -> Path:
    rows = [{"prompt": [1, 2], "response": [3 + i % 5, 4, i % 7]} for i in range(num_rows)]
    for index, row in changed.items():
        rows[int(index.removeprefix("row"))] = row  # type: ignore[call-overload]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def settings(tmp_path: Path, **changes: object) -> ScoreFileSettings:
    base = ScoreFileSettings(
        source=tmp_path / "a.jsonl", target=tmp_path / "a.parquet", score_top_k=2, rows_per_part=4, max_in_flight=3
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def run(told: ScoreFileSettings, teacher: Formula | None = None, info: TeacherInfo = INFO) -> Outcome:
    store = PartStore(told)
    store.open(told.manifest(info.fingerprint))
    done: list[int] = []
    outcome = score_rows(RowReader(told, None, info).read(), teacher or Formula(), store, told, done.append)
    assert sum(done) == outcome.counts.total()
    return outcome


def test_every_row_is_in_the_output_in_order(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 10)
    assert run(settings(tmp_path)).counts == Counter(scored=10)
    found = pq.read_table(tmp_path / "a.parquet")
    assert found["row"].to_pylist() == list(range(10))
    assert found["sampled_logprobs"].to_pylist()[6] == [-10.0, -10.0, -12.0]
    assert found["topk_token_ids"].to_pylist()[6] == [[0, 1]] * 3
    assert found["topk_logprobs"].type.value_type.list_size == 2
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 3
    assert not (tmp_path / "a.parquet.parts").exists()


def test_a_run_cut_off_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 10)
    told = settings(tmp_path)
    with pytest.raises(QueueUnavailableError):
        run(told, Formula(fails_at=9, error=QueueUnavailableError("gone")))
    again = Formula()
    outcome = run(told, again)
    assert (outcome.num_known, again.asked, outcome.counts) == (8, [8, 9], Counter(scored=10))
    whole = settings(tmp_path, target=tmp_path / "whole.parquet")
    run(whole)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_a_finished_output_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 6)
    run(settings(tmp_path))
    again = Formula()
    assert run(settings(tmp_path), again).num_known == 6
    assert again.asked == []


@pytest.mark.parametrize(
    ("num_rows", "changed", "message"),
    [
        (10, {"row5": {"prompt": [1], "response": [2]}}, "row 5 was changed since it was scored"),
        (12, {}, r"ends a part of 2 rows that now has 4"),
        (14, {}, r"ends a part of 2 rows that now has 4"),
        (8, {}, "row 8 and those after it are gone"),
    ],
)
def test_another_file_is_refused_or_scored_anew(
    tmp_path: Path, num_rows: int, changed: dict[str, object], message: str
) -> None:
    write(tmp_path / "a.jsonl", 10)
    run(settings(tmp_path))
    write(tmp_path / "a.jsonl", num_rows, **changed)
    with pytest.raises(ConfigError, match=f"{message}.*--overwrite"):
        run(settings(tmp_path))
    assert run(settings(tmp_path, overwrite=True)).num_known == 0


def test_another_teacher_or_setting_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 3)
    run(settings(tmp_path))
    with pytest.raises(ConfigError, match=r"was made with teacher_fingerprint=00ff, not 00aa; .*--overwrite"):
        run(settings(tmp_path), info=dataclasses.replace(INFO, fingerprint="00aa"))
    with pytest.raises(ConfigError, match=r"was made with wants_entropy=True, not False"):
        run(settings(tmp_path, wants_entropy=False))


def test_rows_without_scores_say_why(tmp_path: Path) -> None:
    rows = {"row0": {"prompt": [1, 2], "response": []}, "row1": {"prompt": [1] * 5, "response": list(range(8))}}
    write(tmp_path / "a.jsonl", 4, **rows)
    teacher = Formula(fails_at=2, error=DeadLetterError("took three replicas down"))
    outcome = run(settings(tmp_path), teacher)
    assert outcome.counts == Counter(empty=1, too_long=1, failed=1, scored=1)
    assert outcome.listed == [
        (0, "empty", "response has no token"),
        (1, "too_long", "5 + 8 tokens are above the teacher's context of 12"),
        (2, "failed", "took three replicas down"),
    ]
    assert teacher.asked == [2, 3]
    found = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert [row["sampled_logprobs"] is None for row in found] == [True, True, True, False]
    cut = run(settings(tmp_path, overlong=Overlong.TRUNCATE, overwrite=True))
    assert cut.counts == Counter(scored=2, empty=1, truncated=1)
    assert pq.read_table(tmp_path / "a.parquet")["response_token_ids"].to_pylist()[1] == list(range(7))


def test_candidates_may_differ_in_number(tmp_path: Path) -> None:
    row = {"prompt": [1], "response": [2, 3], "ids": [[4, 5], [6]]}
    write(tmp_path / "a.jsonl", 1, row0=row)
    run(settings(tmp_path, candidates_column="ids"))
    (found,) = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert found["candidate_token_ids"] == [[4, 5], [6, -1]]
    assert found["candidate_logprobs"] == [[-4.0, -5.0], [-6.0, 1.0]]


def test_a_row_of_the_wrong_form_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 3, row2={"prompt": [1], "response": None})
    with pytest.raises(ConfigError, match=r"a\.jsonl: row 2: column response is None; give text or token ids"):
        run(settings(tmp_path))
    write(tmp_path / "a.jsonl", 3, row1={"prompt": "text", "response": [1]})
    with pytest.raises(ConfigError, match=r"row 1: column prompt is text; give the teacher's tokenizer"):
        run(settings(tmp_path))
