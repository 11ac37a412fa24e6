"""What may import what: heavy packages stay where they are needed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mora_serve"
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if "v1" not in p.relative_to(PACKAGE).parts)
GRPC = ("grpc", "grpc_status", "grpc_health", "grpc_reflection")
HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "grpc", "google.protobuf", "numpy")


def imported(path: Path) -> set[str]:
    """The packages that a file imports anywhere, by their first name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def places(package: str) -> set[str]:
    """The parts of the server whose files import a package."""
    return {p.relative_to(PACKAGE).parts[0] for p in MODULES if package in imported(p)}


def test_only_the_engine_and_the_model_import_torch():
    assert places("torch") == {"engine", "model"}
    assert places("transformers") | places("bitsandbytes") | places("peft") <= {"engine", "model"}


def test_only_the_server_and_the_client_import_grpc():
    assert set().union(*map(places, GRPC)) == {"server", "client"}


@pytest.mark.parametrize("package", ["fastapi", "starlette", "uvicorn", "pydantic"])
def test_only_the_http_api_imports_what_its_extra_brings(package: str):
    assert places(package) == {"http"}


def test_only_the_cluster_imports_ray():
    assert places("ray") == {"cluster"}


def test_a_server_without_the_extras_ports_loads_none_of_them():
    """They may not be installed, and they take a second."""
    extras = ("fastapi", "starlette", "uvicorn", "pydantic", "opentelemetry", "ray")
    code = f"import sys, mora_serve.server.app; print([m for m in {extras} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_model_shape_and_the_scheduler_do_without_torch():
    for name in ("model/shape.py", "engine/scheduler.py"):
        assert "torch" not in imported(PACKAGE / name)


@pytest.mark.parametrize(
    "module",
    ["mora_serve", "mora_serve.cli", "mora_serve.client", "mora_serve.config", "mora_serve.core"],
)
def test_importing_loads_nothing_heavy(module: str):
    """Help, completion and a program's start do not wait for a tensor library."""
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_client_needs_no_tensor_library():
    """A program that only talks to a server stays small."""
    code = (
        "import sys; from mora_serve.client import AsyncClient, Client; "
        f"print([m for m in {HEAVY[:4]} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def declared(*extras: str) -> set[str]:
    """The distributions that pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in extras for line in optional[extra])]
    return {normal(re.match(r"[\w.-]+", line)[0]) for line in lines}


def normal(name: str) -> str:
    """A distribution's name as it is compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize(
    ("directory", "extras"),
    [
        ("mora_serve", ("gpu", "http", "otel", "ray")),
        ("router_training", ("train", "eval")),
        ("benchmarks", ("train", "eval", "dev", "ray")),
        ("tests", ("train", "http", "otel", "dev", "ray")),
    ],
)
def test_what_is_imported_is_asked_for(directory: str, extras: tuple[str, ...]):
    """No package is there only because another one brings it along."""
    distributions = packages_distributions()
    own = {"mora_serve", "router_training", "benchmarks", "tests"}
    results = ROOT / "benchmarks" / "results"  # of measurements, peers' code among them
    files = (p for p in (ROOT / directory).rglob("*.py") if results not in p.parents)
    modules = set().union(*map(imported, files))
    wanted = declared(*extras)
    for module in modules - own - sys.stdlib_module_names:
        # An extra that is not installed may be asked for by its module's own name.
        assert {normal(d) for d in distributions.get(module, [module])} & wanted, module
