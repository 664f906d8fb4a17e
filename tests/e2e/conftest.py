"""Images built once, the compose file brought up once; whatever happens, containers and engine are gone at the end."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.engine import Docker, NoEngineError, docker_engine
from tests.e2e.stack import POOL_IMAGE, TEACHER_IMAGE, TRAINER_IMAGE, Stack, build_images
from tests.e2e.standins import refuse_real, stand_ins

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".e2e"


@pytest.fixture(scope="session")
def engine() -> Iterator[Docker]:
    """A Docker engine; a machine that can have none skips, and fails under CI=true.

    OPD_E2E_ENGINE=FOLDER keeps the images of an engine of our own there: the next run builds only what has changed.
    """
    kept = os.environ.get("OPD_E2E_ENGINE")
    folder = Path(kept or f"{tempfile.gettempdir()}/opd-e2e-{os.getpid()}")
    try:
        with docker_engine(folder, keeps_data=bool(kept)) as docker:
            yield docker
    except NoEngineError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone holds, and a torch wheel where pip has one at hand: images are built from there."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        target = folder / name
        if (ROOT / name).is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    return folder


@pytest.fixture(scope="session")
def docker(engine: Docker, checkout: Path) -> Iterator[Docker]:
    """The engine with all images, in its own network."""
    with stand_ins(engine, CACHE) as made:
        if made and not engine.is_ours:
            # What is built on a stand-in goes with it: nobody's own images are to be among that.
            for image in (POOL_IMAGE, TEACHER_IMAGE, TRAINER_IMAGE):
                refuse_real(engine, image)
        sizes = build_images(engine, checkout)
        lines = [f"{image}: {size / 1e6:.0f} MB" for image, size in sizes.items()]
        CACHE.mkdir(exist_ok=True)
        (CACHE / "images.txt").write_text("\n".join([*lines, f"stand-ins: {', '.join(made) or 'none'}", ""]))
        engine.start_running()
        yield engine


@pytest.fixture(scope="session")
def stack(docker: Docker, checkout: Path) -> Iterator[Stack]:
    """The compose file of the checkout, not up yet."""
    found = Stack(docker=docker, folder=checkout)
    try:
        yield found
    finally:
        found.compose("--profile", "observability", "down", "--volumes", "--timeout", "5", check=False)
