"""An installation without some of the parts, as the images are, says in one line where the part is to be had."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from services.parts import missing_part

ROOT = Path(__file__).parents[3]


def test_a_command_without_its_part_is_one_line(tmp_path: Path) -> None:
    for package in ("opd", "services"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("trainer", "__pycache__"))
    for arguments, said in (
        (
            ["train", "student.model=x"],
            "opd: services.trainer: is not part of this installation; the image opd-trainer ",
        ),
        (["demo"], "opd: testbed: is not part of this installation; the image opd-trainer has it"),
    ):
        code = f"import sys; sys.path[0] = {str(tmp_path)!r}; from services.cli import main; main()"
        # -P and -I keep this checkout out of the way; site-packages stay, without an editable install of ours.
        found = subprocess.run(
            [sys.executable, "-I", "-c", _WITHOUT_EDITABLE + code, *arguments],
            capture_output=True, text=True, cwd=tmp_path, timeout=50, check=False,
        )  # fmt: skip
        assert found.returncode == 2
        assert found.stderr.startswith(said)
        assert found.stderr.count("\n") == 1


_WITHOUT_EDITABLE = (
    "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
    "sys.path_hooks[:] = [h for h in sys.path_hooks if 'editable' not in repr(h)]\n"
)


def test_a_package_that_is_missing_is_named_with_its_extra() -> None:
    assert missing_part(ModuleNotFoundError("no", name="torch")) == (
        "torch: is not installed; install opd-services[models], or use an image that has it"
    )
    assert "opd-services[train]" in missing_part(ModuleNotFoundError("no", name="pyarrow.parquet"))


def test_a_module_of_ours_that_is_missing_is_a_fault_of_ours() -> None:
    with pytest.raises(ModuleNotFoundError):
        missing_part(ModuleNotFoundError("no", name="services.teacher_server.poool"))
