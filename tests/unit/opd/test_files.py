from pathlib import Path

import pytest

from opd.files import whole_file


def test_a_file_takes_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("before", encoding="utf-8")
    with pytest.raises(ValueError, match="cut off"), whole_file(path) as partial:
        partial.write_text("ha", encoding="utf-8")
        raise ValueError("cut off")
    assert path.read_text(encoding="utf-8") == "before"
    with whole_file(path) as partial:
        partial.write_text("after", encoding="utf-8")
        assert partial.parent == path.parent, "a rename across file systems would be a copy"
    assert path.read_text(encoding="utf-8") == "after" and list(tmp_path.iterdir()) == [path]
