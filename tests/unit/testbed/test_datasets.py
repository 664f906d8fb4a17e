"""Problem files: form, sizes, splits, and the files of the repository as the seed writes them."""

import json
from pathlib import Path

import pytest

from services.trainer.templates import TEMPLATES
from testbed.datasets import DATA_FOLDER, FILES, TRAIN_NAMES, draw_items_of, read_items, write_files
from testbed.problems import LEVELS, LONG, Split

MAX_FILE_BYTES = 500_000


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_files(folder, 0)
    return folder


def test_the_repository_holds_what_seed_0_writes(written: Path) -> None:
    names = {path.name for path in written.iterdir()}
    assert names == {path.name for path in DATA_FOLDER.glob("*.jsonl")}
    for name in names:
        assert (written / name).read_bytes() == (DATA_FOLDER / name).read_bytes()
        assert (written / name).stat().st_size < MAX_FILE_BYTES


def test_records_have_the_form_of_the_paper_s_data(written: Path) -> None:
    for path in written.iterdir():
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            extra = record["extra_info"]
            question = TEMPLATES[extra["template"]].match(record["prompt"][0]["content"])
            assert question == extra["question"]
            assert record["prompt"][0]["role"] == "user"
            assert str(int(record["reward_model"]["ground_truth"])) == record["reward_model"]["ground_truth"]
            level = extra["level"]
            assert record["data_source"] == ("testbed/long" if level == LONG else f"testbed/level{level}")


def test_sizes_and_levels(written: Path) -> None:
    sizes = {path.name: len(read_items(path)) for path in written.iterdir()}
    assert sum(sizes[name] for name in TRAIN_NAMES) == 2048
    assert (sizes["heldout.jsonl"], sizes["train_long.jsonl"], sizes["heldout_long.jsonl"]) == (256, 256, 64)
    for name in (*TRAIN_NAMES, "heldout.jsonl"):
        levels = [item.level for item in read_items(written / name)]
        assert [levels.count(level) for level in LEVELS] == [len(levels) // 4] * 4


def test_files_read_back_as_drawn_and_share_no_problem(written: Path) -> None:
    for file in FILES:
        read = [item for name in file.names for item in read_items(written / name)]
        assert read == draw_items_of(file, 0)
    train, held_out = (
        {
            tuple(filter(str.isdigit, item.question))
            for file in FILES
            if file.split is split
            for item in draw_items_of(file, 0)
        }
        for split in Split
    )
    assert len(train) > 2000
    assert not train & held_out


def test_another_seed_writes_other_problems() -> None:
    assert draw_items_of(FILES[1], 1) != draw_items_of(FILES[1], 0)
