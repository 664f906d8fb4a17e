"""Stand-ins in an engine that holds real images of the same tags: those stay, and nothing else does.

The engine is one of our own that is treated as somebody else's; images are next to empty, and nothing is run.
"""

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.e2e.engine import Docker, NoEngineError, own_engine
from tests.e2e.standins import LABEL, PROMETHEUS, PYTHON, REDIS, label_of, make_stand_in, refuse_real, stand_ins

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """In it a base for stand-ins, of one file."""
    with tarfile.open(tmp_path / "python-3.11-slim.tar", "w") as archive:
        entry = tarfile.TarInfo("etc/stand-in")
        archive.addfile(entry, io.BytesIO(b""))
    return tmp_path


@pytest.fixture
def somebodys(tmp_path: Path, cache: Path) -> Iterator[Docker]:
    """With a real Redis and Prometheus of its owner's, and what a killed run has left of Python."""
    try:
        # A socket's path is short.
        with own_engine(Path(f"/tmp/opd-e2e-{os.getpid()}-s")) as docker:
            archive = str(cache / "python-3.11-slim.tar")
            for tag in (REDIS, PROMETHEUS, "owners:1"):
                docker.run("import", "--message", tag, archive, tag)
            docker.run("import", "--change", f"LABEL {LABEL}={PYTHON}", archive, PYTHON)
            yield replace(docker, is_ours=False)
    except NoEngineError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))


def ids(docker: Docker) -> dict[str, str]:
    lines = docker.run("image", "ls", "--no-trunc", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}").splitlines()
    found: dict[str, str] = dict(line.split(" ") for line in lines)
    return found


def test_real_images_keep_their_tags_and_stand_ins_are_gone_at_the_end(somebodys: Docker, cache: Path) -> None:
    before = ids(somebodys)
    for tag in (REDIS, PROMETHEUS):
        assert label_of(somebodys, tag) == ""
        with pytest.raises(AssertionError, match=f"image={tag}: is a real one"):
            make_stand_in(somebodys, tag, cache)
    assert label_of(somebodys, "no-such-image:1") is None
    refuse_real(somebodys, "no-such-image:1")
    with pytest.raises(RuntimeError, match="a test"), stand_ins(somebodys, cache) as made:
        assert made == [PYTHON] and label_of(somebodys, PYTHON) == PYTHON
        # Whatever is built on a stand-in is one, at any distance.
        for tag, base in (("opd-trainer:latest", PYTHON), ("further:1", "opd-trainer:latest")):
            somebodys.run("build", "--tag", tag, "-", stdin=f'FROM {base}\nENV A=b\nCMD ["x"]\n')
            assert label_of(somebodys, tag) == PYTHON
        somebodys.run("tag", PYTHON, "second-name:1")
        raise RuntimeError("a test")
    assert ids(somebodys) == {tag: before[tag] for tag in (REDIS, PROMETHEUS, "owners:1")}
    assert somebodys.run("image", "ls", "--all", "--quiet", "--filter", f"label={LABEL}") == ""


def test_in_an_engine_of_ours_they_stay_for_the_next_run(somebodys: Docker, cache: Path) -> None:
    ours = replace(somebodys, is_ours=True)
    with stand_ins(ours, cache):
        pass
    assert label_of(ours, PYTHON) == PYTHON
