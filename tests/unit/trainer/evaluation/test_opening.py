"""How models and problem sets are named to people."""

from pathlib import Path

from services.trainer.evaluation.opening import labels


def test_a_path_is_shown_by_its_last_part_unless_that_is_ambiguous(tmp_path: Path) -> None:
    for name in ("one/model", "two/model", "other"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "heldout.jsonl").write_text("")
    names = [f"{tmp_path}/one/model", f"{tmp_path}/two/model/", f"{tmp_path}/other/", f"{tmp_path}/heldout.jsonl"]
    assert labels([*names, "owner/name"]) == [names[0], names[1].rstrip("/"), "other", "heldout", "owner/name"]
