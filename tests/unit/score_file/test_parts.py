"""What `--out` may name: never the source, never a file that is not ours, and what is replaced stays until the end."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opd.errors import ConfigError
from services.score_file.parts import PartStore
from services.score_file.settings import ScoreFileSettings


def store(folder: Path, **changes: Any) -> PartStore:
    source = folder / "set.jsonl"
    source.touch()
    return PartStore(
        ScoreFileSettings(**({"source": source, "target": folder / "out.parquet", "score_top_k": 4} | changes))
    )


def finish(folder: Path, **manifest: Any) -> None:
    made = store(folder)
    made.open(manifest)
    made.write(0, [])
    made.join(1)


def test_the_source_is_never_the_output(tmp_path: Path) -> None:
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="is the file that is read"):
            store(tmp_path, target=tmp_path / "set.jsonl", overwrite=overwrite).open({})
    assert (tmp_path / "set.jsonl").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_of_somebody_else_stays(tmp_path: Path, overwrite: bool) -> None:
    pq.write_table(pa.table({"theirs": [1]}), tmp_path / "out.parquet")
    with pytest.raises(ConfigError, match="no output of opd score"):
        store(tmp_path, overwrite=overwrite).open({"k": 4})
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(ConfigError, match="no output of opd score"):
        store(tmp_path, target=tmp_path / "folder.parquet", overwrite=overwrite).open({"k": 4})
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == [{"theirs": 1}]


def test_what_is_overwritten_stays_until_the_new_scores_are_whole(tmp_path: Path) -> None:
    finish(tmp_path, k=4)
    before = (tmp_path / "out.parquet").read_bytes()
    again = store(tmp_path, overwrite=True)
    again.open({"k": 8})
    assert not again.is_finished and (tmp_path / "out.parquet").read_bytes() == before
    again.write(0, [])
    again.join(1)
    assert again.is_finished
    with pytest.raises(ConfigError, match="was made with k=8, not 4"):
        store(tmp_path).open({"k": 4})


def test_a_run_that_finished_nothing_binds_nobody(tmp_path: Path) -> None:
    store(tmp_path).open({"response_column": "nope"})
    store(tmp_path).open({"response_column": "response"})
