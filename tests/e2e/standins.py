"""Images of others that the compose file names: pulled, or made from Debian's packages where no registry is reached.

A stand-in has the tag, the folders and the way to start of the image that it stands for. It lets the images here be
built and the compose file run; it does not show that the official one works. It has a label, which whatever is built on
it inherits, and never takes the tag of an image without. In an engine that is not ours all that has the label is gone
at the end, so that nobody builds on a stand-in believing it to be the real one.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.e2e.engine import Docker, call

PYTHON, REDIS, PROMETHEUS = "python:3.11-slim", "redis:7", "prom/prometheus:v2.53.0"
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
_PULL_S = 120.0
LABEL = "opd.e2e.stand-in"
_APT = (
    "apt-get update -qq && apt-get install -y -qq --no-install-recommends {} >/dev/null && rm -rf /var/lib/apt/lists/*"
)
_DOCKERFILES = {
    REDIS: f"""\
FROM {PYTHON}
RUN {_APT.format("redis-server")} && install -d -o 999 -g 999 /data
VOLUME /data
WORKDIR /data
CMD ["redis-server"]
""",
    PROMETHEUS: f"""\
FROM {PYTHON}
RUN {_APT.format("prometheus")} && install -d -o nobody -g nogroup /prometheus && rm -rf /etc/prometheus/*
USER nobody
VOLUME /prometheus
WORKDIR /prometheus
ENTRYPOINT ["/usr/bin/prometheus"]
CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
""",
}


@contextmanager
def stand_ins(docker: Docker, cache: Path) -> Iterator[list[str]]:
    """Sees to it that all images are there, and yields the tags of those that are stand-ins.

    `cache` keeps what is slow to make.
    """
    try:
        yield _provide(docker, cache)
    finally:
        if not docker.is_ours:
            remove_stand_ins(docker)


def _provide(docker: Docker, cache: Path) -> list[str]:
    made: list[str] = []
    for tag in (PYTHON, REDIS, PROMETHEUS):
        found = label_of(docker, tag)
        # Where one cannot be pulled, no other can: they come from one registry.
        if found == "" or (found is None and not made and _pull(docker, tag)):
            continue
        # One that an earlier run has left is made anew, which costs nothing where nothing has changed.
        make_stand_in(docker, tag, cache)
        made.append(tag)
    return made


def label_of(docker: Docker, tag: str) -> str | None:
    """What an image of the engine stands for, empty for a real one; None where there is no such image."""
    said = docker.run("image", "inspect", "--format", "{{json .Config.Labels}}", tag, check=False).strip()
    if said in ("", "[]"):
        return None
    labels: dict[str, str] = json.loads(said) or {}
    return labels.get(LABEL, "")


def refuse_real(docker: Docker, tag: str) -> None:
    """AssertionError where an image of that tag is there and no stand-in: another one in its place would lose it."""
    assert label_of(docker, tag) != "", f"image={tag}: is a real one; remove it, or stop this engine to test in another"


def make_stand_in(docker: Docker, tag: str, cache: Path) -> None:
    """AssertionError where a real image has the tag."""
    refuse_real(docker, tag)
    if tag == PYTHON:
        _import_python(docker, cache)
    else:
        label = ("--label", f"{LABEL}={tag}")
        docker.run("build", *docker.build_options, *label, "--tag", tag, "-", stdin=_DOCKERFILES[tag])


def remove_stand_ins(docker: Docker) -> None:
    """With all that was built on them, and with what an earlier run left; what a container still uses stays."""
    left = _labelled(docker)
    while left:
        # One that others are built on can go after these only.
        for image in left:
            docker.run("image", "rm", "--force", image, check=False)
        before, left = left, _labelled(docker)
        if len(left) >= len(before):
            return


def _labelled(docker: Docker) -> list[str]:
    listed = docker.run("image", "ls", "--quiet", "--no-trunc", "--filter", f"label={LABEL}").split()
    return list(dict.fromkeys(listed))


def _pull(docker: Docker, tag: str) -> bool:
    try:
        docker.run("pull", "--quiet", tag, timeout_s=_PULL_S)
    except (AssertionError, subprocess.TimeoutExpired):
        return False
    return True


def _import_python(docker: Docker, cache: Path) -> None:
    archive = cache / "python-3.11-slim.tar"
    if not archive.is_file():
        _bootstrap(archive)
    changes = (
        f"ENV PIP_CERT={_CERTIFICATES} SSL_CERT_FILE={_CERTIFICATES}", 'CMD ["python3"]', f"LABEL {LABEL}={PYTHON}",
    )  # fmt: skip
    docker.run("import", *(word for change in changes for word in ("--change", change)), str(archive), PYTHON)


def _bootstrap(archive: Path) -> None:
    """Debian with its Python and pip, and this machine's certificates, by which its package indexes are known."""
    assert shutil.which("mmdebstrap"), "mmdebstrap is missing: apt-get install mmdebstrap"
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_suffix(".partial.tar")
    hooks = [
        'rm -f "$1"/usr/lib/python3*/EXTERNALLY-MANAGED; ln -sf python3 "$1"/usr/bin/python',
        f"upload {_CERTIFICATES} {_CERTIFICATES}",
        'rm -rf "$1"/usr/share/doc "$1"/usr/share/man "$1"/usr/share/locale "$1"/var/cache/apt/*.bin',
    ]
    call(
        [
            *(
                "mmdebstrap",
                "--quiet",
                "--variant=minbase",
                "--include=python3,python3-pip,python3-venv,ca-certificates",
            ),
            *(f"--customize-hook={hook}" for hook in hooks),
            *("bookworm", str(partial)),
        ],
        {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
    )
    partial.replace(archive)
