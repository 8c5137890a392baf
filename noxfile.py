"""The checks of this project: `nox` runs them on the Python at hand, `nox -l` lists all of them.

`nox -s tests` runs the tests on every supported Python that it finds, each with the oldest and the
newest supported Metaflow; `nox -s tests-3.9` on one of them. What follows `--` is pytest's:
`nox -s tests-3.13 -- -k lease`.
"""

from __future__ import annotations

import sys

import nox

MODULE = "metaflow_local_service.py"
TESTS = "test_metaflow_local_service.py"
SOURCES = (MODULE, TESTS, "noxfile.py")

PYTHONS = ("3.9", "3.10", "3.11", "3.12", "3.13")
METAFLOWS = ("2.12.0", "newest")
PYTHON_AT_HAND = f"{sys.version_info.major}.{sys.version_info.minor}"

nox.options.sessions = ["lint", "types", "structural", f"tests-{PYTHON_AT_HAND}"]
nox.options.error_on_missing_interpreters = False  # a missing Python is skipped, and said so
nox.options.default_venv_backend = "virtualenv"


@nox.session
def lint(session: nox.Session) -> None:
    """Style, and what is likely a mistake."""
    session.install("ruff")
    session.run("ruff", "check", *SOURCES)
    session.run("ruff", "format", "--check", *SOURCES)


@nox.session
def types(session: nox.Session) -> None:
    """Types, as the oldest supported Python sees them (pyproject.toml says which)."""
    session.install("mypy<2")  # the last that can be told to check for Python 3.9
    session.run("mypy")


@nox.session
def structural(session: nox.Session) -> None:
    """What can be said of the source alone; Metaflow is not even installed."""
    session.install("pytest", "hypothesis")
    session.run("pytest", "-q", "-m", "structural", *session.posargs)


@nox.session(python=list(dict.fromkeys((*PYTHONS, PYTHON_AT_HAND))))
@nox.parametrize("metaflow", METAFLOWS)
def tests(session: nox.Session, metaflow: str) -> None:
    """The tests, against an installed package and one Metaflow."""
    wanted = "metaflow" if metaflow == "newest" else f"metaflow=={metaflow}"
    session.install(".[dev]", wanted)
    session.run("python", "-c", "import metaflow; print('Metaflow', metaflow.__version__)")
    session.run("pytest", "-q", "-n", "auto", *session.posargs)
