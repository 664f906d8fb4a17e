"""One bench at a time in a folder, and none beside what an earlier one has left behind."""

import fcntl
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import bench
from opd.errors import ConfigError


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="other experiments run in it"), bench.open_bench(tmp_path):
            pass
    assert not (tmp_path / "session").exists()


def test_a_process_of_a_killed_bench_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import time; time.sleep(60)"
    left_behind = subprocess.Popen([sys.executable, "-c", code, "-m", "services.trainer", f"run_dir={tmp_path}/runs/x"])
    try:
        deadline = time.monotonic() + 30
        while not Path(f"/proc/{left_behind.pid}/cmdline").read_bytes() and time.monotonic() < deadline:
            time.sleep(0.01)
        monkeypatch.setattr(bench, "_ORPHAN_S", 0.5)
        with pytest.raises(ConfigError, match=f"process {left_behind.pid} "), bench.open_bench(tmp_path):
            pass
    finally:
        left_behind.kill()
        left_behind.wait(10)
    with bench.open_bench(tmp_path) as opened:
        assert opened.redis_url.startswith("unix://")
