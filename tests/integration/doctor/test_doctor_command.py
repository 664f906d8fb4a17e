"""`opd doctor` as people and programs meet it: tables, JSON, exit codes, and never a traceback."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from opd.queue.embedded import EmbeddedRedis
from services.doctor.file_checks import check_folder, check_secret, check_tenants_file
from services.doctor.findings import Verdict
from services.doctor.plan import Plan
from services.teacher_server.tenants_file import add_tenant
from tests.integration.teacher_server.conftest import StartTeacher, start_teacher, teacher_folder

ROOT = Path(__file__).parents[3]
_NOBODY = 65_534
__all__ = ["start_teacher", "teacher_folder"]


def doctor(*arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    base = {name: value for name, value in os.environ.items() if not name.startswith("OPD_")}
    return subprocess.run(
        [sys.executable, "-m", "services.cli", "doctor", *arguments],
        capture_output=True, text=True, cwd=ROOT, env=base | environ, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_real_teacher_is_found_sound_over_both_ways(start_teacher: StartTeacher, tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis", options=("maxmemory 200mb",)) as server:
        teacher = start_teacher(f"redis_url={server.url}")
        port = teacher.wait_ready()["grpc_port"]
        done = doctor(
            "--redis-url", server.url, "--teacher", "tiny", "--grpc", f"grpc://127.0.0.1:{port}", "--score", "--json",
            "--folder", str(tmp_path),
        )  # fmt: skip
        assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
        report = json.loads(done.stdout)
        assert report["is_sound"] is True
        verdicts = {finding["check"]: finding["verdict"] for finding in report["findings"]}
        assert verdicts["score by tiny over unix"] == verdicts["score by tiny over grpc"] == "ok"
        assert verdicts["handshake of tiny"] == verdicts["replicas of tiny"] == "ok"
        assert verdicts[f"grpc grpc://127.0.0.1:{port}"] == "ok"
        assert teacher.end() == 0
        done = doctor("--redis-url", server.url, "--teacher", "tiny", "--folder", str(tmp_path))
        assert "none lives, nothing waits" in done.stdout and done.returncode == 0


def test_what_fails_is_an_exit_code_and_no_traceback(tmp_path: Path) -> None:
    done = doctor("--redis-url", "redis://127.0.0.1:1/0", "--teacher", "qwen", "--patience-s", "0.3",
                  "--tenants-file", str(tmp_path / "none.toml"), "--token-file", str(tmp_path / "none"),
                  "--folder", str(tmp_path), OPD_TOKEN="secret-token-in-plain-sight")  # fmt: skip
    assert done.returncode == 1 and done.stderr == ""
    assert "Traceback" not in done.stdout and "secret-token" not in done.stdout
    for words in ("not reachable", "stands in the environment", "tenants file"):
        assert words in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--teacher", "No Such"), "opd: teacher='No Such': must match"),
        (("--tenant", "No Such"), "opd: tenant='No Such': must match"),
        (("--cert-file", "x.pem"), "opd: cert_file=x.pem, key_file=None: give both or neither"),
    ],
)
def test_a_question_that_makes_no_sense_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = doctor(*arguments)
    assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1


def test_a_bracket_in_a_password_is_a_finding_with_the_way_out(tmp_path: Path) -> None:
    done = doctor("--redis-url", "redis://:sec[ret@127.0.0.1:1/0", "--folder", str(tmp_path), "--json")
    (found,) = [item for item in json.loads(done.stdout)["findings"] if item["check"] == "redis"]
    assert done.returncode == 1 and found["verdict"] == "fail" and "ret@" not in done.stdout
    assert "a bracket as %5B" in found["message"] and found["mend"] == "correct the setting that it names"


@pytest.mark.parametrize("url", ["http://host", "redis://host:notaport/0", "rediss://127.0.0.1:1/0", ""])
def test_a_url_that_is_none_is_a_finding(url: str, tmp_path: Path) -> None:
    done = doctor("--redis-url", url, "--patience-s", "0.3", "--folder", str(tmp_path))
    assert done.returncode == (1 if url else 0) and "Traceback" not in done.stdout + done.stderr


def test_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_folder(tmp_path / "not" / "there" / "yet").verdict is Verdict.OK
    (tmp_path / "file").touch()
    assert check_folder(tmp_path / "file").verdict is Verdict.FAIL
    # A real file system of the kernel's own that has no room and takes nothing.
    assert check_folder(Path("/proc/self/no-such-folder")).verdict is Verdict.FAIL


@pytest.mark.parametrize("place", ["~nosuchuser/x", "x" * 300, "a\0b/\0"])
def test_a_path_that_cannot_be_is_a_finding(tmp_path: Path, place: str) -> None:
    path = Path(place)
    found = [check_folder(path), check_secret("OPD_TOKEN_FILE", path), *check_tenants_file(Plan(tenants_file=path))]
    # The kernel never sees a zero byte: for a folder that is one that does not exist yet.
    assert [finding.verdict for finding in found[1:]] == [Verdict.FAIL, Verdict.FAIL]
    assert found[0].verdict is (Verdict.OK if "\0" in place else Verdict.FAIL)
    for finding in found:
        assert place in finding.message or finding.verdict is Verdict.OK
        assert bool(finding.mend) == (finding.verdict is Verdict.FAIL)


def test_the_command_survives_such_paths_wherever_they_are_given(tmp_path: Path) -> None:
    nowhere = "~nosuchuser/x"
    done = doctor("--folder", nowhere, "--secret", nowhere, "--tenants-file", nowhere, "--token-file", nowhere,
                  "--ca-file", nowhere, "--grpc", "grpcs://127.0.0.1:1", "--redis-url", "rediss://127.0.0.1:1/0",
                  "--json", OPD_TOKEN_FILE=nowhere)  # fmt: skip
    assert done.returncode == 1 and done.stderr == ""
    findings = {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert {finding["verdict"] for finding in findings.values()} == {"fail"} and len(findings) == 7
    assert all(nowhere in finding["message"] and finding["mend"] for finding in findings.values()), findings
    assert not any("a fault of this check" in finding["message"] for finding in findings.values())


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder that its owner may enter and we may not; root gives its power away for as long as the test lasts."""
    folder = tmp_path / "locked"
    folder.mkdir()
    for name in ("tenants.toml", "token"):
        (folder / name).write_text("")
    folder.chmod(0)
    own = os.geteuid()
    if own == 0:
        os.seteuid(_NOBODY)
    yield folder
    os.seteuid(own)
    folder.chmod(0o700)


def test_what_may_not_be_entered_is_a_finding(locked: Path) -> None:
    tenants, token = locked / "tenants.toml", locked / "token"
    found = [
        check_folder(locked / "runs"),
        check_secret("OPD_TOKEN_FILE", token),
        *check_tenants_file(Plan(tenants_file=tenants)),
    ]
    for finding, setting in zip(
        found, (f"folder={locked / 'runs'}", f"OPD_TOKEN_FILE={token}", f"tenants_file={tenants}"), strict=True
    ):
        assert finding.verdict is Verdict.FAIL and finding.mend
        assert finding.message.startswith(setting) and "Permission denied" in finding.message


@pytest.mark.parametrize(
    ("mode", "verdict"), [(0o600, Verdict.OK), (0o400, Verdict.OK), (0o640, Verdict.WARN), (0o622, Verdict.FAIL)]
)
def test_secrets_and_who_else_reads_them(tmp_path: Path, mode: int, verdict: Verdict) -> None:
    path = tmp_path / "token"
    path.write_text("a long enough secret\n")
    path.chmod(mode)
    found = check_secret("OPD_TOKEN_FILE", path)
    assert found.verdict is verdict and "enough secret" not in found.message
    assert verdict is Verdict.OK or f"chmod 600 {path}" in found.mend
    path.write_text("")
    assert check_secret("OPD_TOKEN_FILE", path).verdict is Verdict.FAIL
    path.unlink()
    assert check_secret("OPD_TOKEN_FILE", path).verdict is Verdict.FAIL


def test_the_tenants_file_and_whose_token_it_is(tmp_path: Path) -> None:
    from opd.credentials import Credentials

    path = tmp_path / "tenants.toml"
    for name in ("math", "code"):
        add_tenant(path, name, f"token of {name} {'x' * 30}", weight=1.0, max_inflight_tokens=None, hidden_states=False)

    def verdicts(token: str | None) -> list[tuple[Verdict, str]]:
        plan = Plan(tenants_file=path, tenant="math", credentials=Credentials(token=token))
        return [(finding.verdict, finding.message) for finding in check_tenants_file(plan)]

    assert verdicts(f"token of math {'x' * 30}")[1] == (Verdict.OK, "is valid by the tenants file")
    assert verdicts(f"token of code {'x' * 30}")[1] == (Verdict.FAIL, "is that of code")
    assert verdicts("another")[1] == (Verdict.FAIL, "is nobody's by the tenants file")
    assert verdicts(None)[1][0] is Verdict.SKIPPED
    path.write_text("[tenants.math\n")
    assert verdicts(None)[0][0] is Verdict.FAIL
