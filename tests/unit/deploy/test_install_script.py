"""install.sh with the real pip, on wheels that this test makes: who gets which torch, and what else."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "deploy/docker/install.sh"
PROJECT = """
[project]
dependencies = ["core-part"]

[project.optional-dependencies]
http = ["http-part"]
tracing = ["tracing-part"]
models = ["torch==2.13.0"]
train = ["train-part"]
"""


def make_wheel(folder: Path, name: str, version: str = "1.0") -> None:
    """The smallest thing that pip installs."""
    folder.mkdir(exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder as the Dockerfiles make it, an index without torch's CPU build, and a Python to install into."""
    (tmp_path / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
    (tmp_path / "tmp").mkdir()
    for name in ("core-part", "http-part", "tracing-part", "train-part"):
        make_wheel(tmp_path / "index", name)
    make_wheel(tmp_path / "index", "torch", "2.13.0")
    make_wheel(tmp_path / "wheels", "torch", "2.13.0+cpu")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "opd")], check=True, timeout=100)
    return tmp_path


def install(place: Path, *arguments: str, backend: str) -> set[str]:
    """Runs it; what lies there then, as name==version."""
    environment = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "HOME": str(place),
        "TMPDIR": str(place / "tmp"),
        "TARGET": str(place / "opd/bin/python"),
        "TORCH_BACKEND": backend,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(place / "index"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    done = subprocess.run(
        ["sh", str(SCRIPT), *arguments], cwd=place, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert not list((place / "tmp").iterdir()), "leaves files in the layer"
    (site,) = place.glob("opd/lib/python*/site-packages")
    return {path.name.removesuffix(".dist-info").replace("-", "==") for path in site.glob("*.dist-info")}


@pytest.mark.parametrize(("backend", "torch"), [("cpu", "torch==2.13.0+cpu"), ("cuda", "torch==2.13.0")])
def test_wheels_that_lie_here_are_for_cpu_images_alone(place: Path, backend: str, torch: str) -> None:
    found = install(place, "models", "tracing", backend=backend)
    assert found == {"core_part==1.0", "http_part==1.0", "tracing_part==1.0", torch}


def test_the_layer_of_all_images_has_what_they_share(place: Path) -> None:
    assert install(place, "core", "http", backend="cpu") == {"core_part==1.0", "http_part==1.0"}
