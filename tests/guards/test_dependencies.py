"""What is imported is declared in pyproject.toml: as a dependency, or as an extra for files only its users need.

Without this a plain `pip install phalanx` may lack what every machine of a developer has, by an extra of another.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import phalanx

SOURCE = Path(phalanx.__file__).parent
PROJECT = SOURCE.parents[1] / "pyproject.toml"

COMES_WITH = {"starlette": "fastapi", "grpcio": "ray", "triton": "torch"}
"""Parts of others: fastapi is built on starlette, Ray on gRPC, and torch for CUDA brings triton."""

HOMES_OF_EXTRAS = {"ray": "executor/ray/", "gguf": "models/gguf.py"}
"""Where an extra is needed to import a file; what is there is imported only once a user has asked for it."""


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def third_party_imports(file: Path, distributions: Mapping[str, list[str]]) -> Iterator[str]:
    """The distributions that a file imports from, ours and Python's own left out."""
    for node in ast.walk(ast.parse(file.read_text())):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
        for package in {module.partition(".")[0] for module in modules}:
            if package not in sys.stdlib_module_names and package != "phalanx":
                name = canonicalize_name(distributions.get(package, [package])[0])
                yield COMES_WITH.get(name, name)


def test_every_import_is_declared() -> None:
    project = tomllib.loads(PROJECT.read_text())["project"]
    distributions = packages_distributions()
    always = names(project["dependencies"])
    extras = {home: names(project["optional-dependencies"][extra]) for extra, home in HOMES_OF_EXTRAS.items()}
    undeclared = []
    for file in sorted(SOURCE.rglob("*.py")):
        where = file.relative_to(SOURCE).as_posix()
        allowed = always.union(*(extra for home, extra in extras.items() if where.startswith(home)))
        undeclared += [f"{where}: {name}" for name in sorted({*third_party_imports(file, distributions)} - allowed)]
    assert undeclared == []
