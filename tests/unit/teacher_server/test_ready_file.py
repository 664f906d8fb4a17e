import json
import os
from pathlib import Path

import pytest

from opd.errors import ConfigError
from services.teacher_server.ready_file import write_ready_file


def test_the_note_is_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ready.json"
    write_ready_file(path, 7000, 8000, "f" * 16)
    write_ready_file(path, 7001, 8001, "e" * 16)
    assert json.loads(path.read_text()) == {
        "grpc_port": 7001,
        "http_port": 8001,
        "pid": os.getpid(),
        "fingerprint": "e" * 16,
    }
    assert list(path.parent.iterdir()) == [path]


def test_a_place_that_takes_no_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_ready_file(tmp_path / "file" / "ready.json", 1, 2, "f")
