"""Images of others that the compose file names: pulled, or made from Debian's packages where no registry is reached.

A stand-in has the tag, the folders and the way to start of the image that it stands for. It lets the images here be
built and the compose file run; it does not show that the official one works.
"""

import shutil
import subprocess
from pathlib import Path

from tests.e2e.engine import Docker, call

PYTHON, REDIS, PROMETHEUS = "python:3.11-slim", "redis:7", "prom/prometheus:v2.53.0"
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
_PULL_S = 120.0
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


def provide_images(docker: Docker, cache: Path) -> list[str]:
    """Sees to it that all of them are there; returns those that are stand-ins. `cache` keeps what is slow to make."""
    stand_ins = []
    for tag in (PYTHON, REDIS, PROMETHEUS):
        # Where one cannot be pulled, no other can: they come from one registry.
        if not stand_ins and _pull(docker, tag):
            continue
        if tag == PYTHON:
            _import_python(docker, cache)
        else:
            docker.run("build", *docker.build_options, "--tag", tag, "-", stdin=_DOCKERFILES[tag])
        stand_ins.append(tag)
    return stand_ins


def _pull(docker: Docker, tag: str) -> bool:
    if docker.run("image", "inspect", tag, check=False).strip() not in ("", "[]"):
        return True
    try:
        docker.run("pull", "--quiet", tag, timeout_s=_PULL_S)
    except (AssertionError, subprocess.TimeoutExpired):
        return False
    return True


def _import_python(docker: Docker, cache: Path) -> None:
    archive = cache / "python-3.11-slim.tar"
    if not archive.is_file():
        _bootstrap(archive)
    environment = ["--change", f"ENV PIP_CERT={_CERTIFICATES} SSL_CERT_FILE={_CERTIFICATES}"]
    docker.run("import", *environment, "--change", 'CMD ["python3"]', str(archive), PYTHON)


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
