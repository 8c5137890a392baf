"""The specification of metaflow-local-service, layer by layer, in the order of the module.

Sections bear the names of the module's layers, and a fact is tested once, in the section of the
lowest layer that can break it. Before them stand the tools of all tests and what can be said of the
source alone; behind them the package and the whole: real flows, and what only everything together
can lose. Nothing outside a test's own temporary folders is read or written, no process outlives its
test, and no test depends on another, on the order, or on how fast the machine is.

Where does a new test go?

* A route of the metadata API: a line in `test_every_route_of_the_protocol_answers`, one in
  `test_every_list_names_the_size_of_its_pages` if it lists, and its fields beside those of others
  at the beginning of API.
* A route of the UI: a row in GOLDEN (UI API). A frame over the socket: beside those of "sockets".
* A column, filter or order: a row in the tables of Queries. A field of a record: Store and API. A
  fact about a run or an attempt: Model; a new way to fail: CAUSES_FLOW and CAUSES.
* A command or option: Commands; it needs a help with an example, an exit code and one sentence for
  what is wrong. Output that must look alike everywhere: `printable` and `shorten` there.
* A Metaflow version: nothing, if all passes (`nox` runs every pair); what only newer ones have is
  asked of Metaflow itself, as in `can_name_the_last_step`.

What is there to start from? `store` and `local` (an empty root, through us and through local mode);
`api` and `ui` (a client of a service in this process, ready in a millisecond); `cli` and `daemon`
(the command line in an empty project, and a service that it has started, in a second); `library`
(the module as a script has it). Recorded once for a whole session, also with pytest-xdist:
`recorded` and `seen` (two flows), `failures` (every way to fail), `history` (both recorders).

A test hangs: run it alone with `pytest -n 0 -o faulthandler_timeout=60 -k NAME`, which prints the
stack of every thread; what a service was doing is in `.metaflow/metaflow-local-service.log` below
`--basetemp`, at length with METAFLOW_LOCAL_SERVICE_DEBUG=1.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import enum
import errno
import fcntl
import functools
import gzip
import hashlib
import http.client
import http.server
import importlib.metadata
import inspect
import io
import itertools
import json
import logging
import math
import os
import pickle
import pty
import py_compile
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import symtable
import sys
import sysconfig
import tarfile
import termios
import textwrap
import threading
import time
import tracemalloc
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl, quote, urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from metaflow.client.core import MetaflowObject, Task
    from playwright.sync_api import Browser
    from playwright.sync_api import Page as BrowserPage

MODULE = Path(__file__).with_name("metaflow_local_service.py")

structural = pytest.mark.structural

with contextlib.suppress(ImportError):  # the structural tests run without Metaflow
    import metaflow

    import metaflow_local_service as mls


# ==================================================================================================
# What tests are made of
# ==================================================================================================


class Reply(NamedTuple):
    """An answer of a service."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)


class Api:
    """A client of a running service: one keep-alive connection per thread, JSON in and out."""

    server: mls.Server  # only of a service in this process

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url
        self.host, self.port = urlsplit(url).hostname, urlsplit(url).port
        self._headers = {"x-api-key": key} if key else {}
        self._local = threading.local()

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Send a request; a `body` that is not bytes is sent as JSON."""
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = HTTPConnection(self.host, self.port, timeout=30)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, content, {**self._headers, **(headers or {})})
        answer = connection.getresponse()
        lower = {name.lower(): value for name, value in answer.getheaders()}
        return Reply(answer.status, lower, answer.read())

    def get(self, path: str, **headers: str) -> Reply:
        return self.request("GET", path, headers=headers)

    def post(self, path: str, body: Any = None) -> Reply:
        return self.request("POST", path, {} if body is None else body)

    def patch(self, path: str, body: Any) -> Reply:
        return self.request("PATCH", path, body)

    def close(self) -> None:
        """Close this thread's connection."""
        if hasattr(self._local, "connection"):
            self._local.connection.close()
            del self._local.connection

    # The objects that most tests need, made the way Metaflow's client makes them.

    def new_flow(self, name: str = "Flow") -> str:
        """Make a flow and return its path."""
        assert self.post(f"/flows/{quote(name, safe='')}").status == 200
        return f"/flows/{quote(name, safe='')}"

    def new_run(self, flow: str, **fields: Any) -> str:
        run = self.post(f"{flow}/run", {"tags": [], "system_tags": [], **fields})
        assert run.status == 200
        return f"{flow}/runs/{quote(str(run.json['run_number']), safe='')}"

    def new_step(self, run: str, name: str = "start") -> str:
        assert self.post(f"{run}/steps/{quote(name, safe='')}/step").status == 200
        return f"{run}/steps/{quote(name, safe='')}"

    def new_task(self, step: str, **fields: Any) -> str:
        task = self.post(f"{step}/task", {"tags": [], "system_tags": [], **fields})
        assert task.status == 200
        return f"{step}/tasks/{quote(str(task.json['task_id']), safe='')}"

    def new_task_of_its_own(self) -> str:
        """Make a flow, run, step and task, and return the path of the task."""
        return self.new_task(self.new_step(self.new_run(self.new_flow())))


def metadatum(field: str, value: Any = "value", attempt: int = 0, **fields: Any) -> dict[str, Any]:
    """A metadata row as Metaflow's client sends it."""
    tags = [f"attempt_id:{attempt}"]
    return {"field_name": field, "value": value, "type": field, "tags": tags, **fields}


def artifact(name: str, attempt: int = 0, **fields: Any) -> dict[str, Any]:
    """An artifact row as Metaflow's client sends it."""
    return {
        "name": name,
        "location": f":root:/somewhere/{name}",
        "ds_type": "local",
        "sha": f"sha-of-{name}-{attempt}",
        "type": "metaflow.artifact",
        "content_type": "gzip+pickle-v4",
        "attempt_id": attempt,
        "user_name": "tester",
        "tags": [],
        "system_tags": [],
        **fields,
    }


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """An empty folder, in which a user works."""
    folder = (tmp_path / "project").resolve()
    folder.mkdir()
    return folder


@pytest.fixture
def store(project: Path) -> mls.Store:
    """A store on an empty root."""
    (project / ".metaflow").mkdir()
    return mls.Store(str(project))


@contextlib.contextmanager
def run_server(server: mls.Server, service: Any, key: str | None = None) -> Iterator[Api]:
    """Let a server answer with a service, in this process, until the block ends."""
    thread = threading.Thread(target=server.serve, args=(service, lambda idle: True))
    thread.start()
    client = Api(server.url, key)
    client.server = server
    try:
        yield client
    finally:
        client.close()
        server.stop()
        thread.join()
        server.finish()


@contextlib.contextmanager
def serve(store: mls.Store, host: str = "127.0.0.1", key: str | None = None) -> Iterator[Api]:
    """Serve a store from this process."""
    with run_server(mls.Server(host, 0, key), mls.MetadataService(store), key) as client:
        yield client


@pytest.fixture
def api(store: mls.Store) -> Iterator[Api]:
    """A client of a service on an empty root, in this process."""
    with serve(store) as client:
        yield client


class Cli:
    """The command line, as a user with a home of their own has it, in a folder."""

    program = MODULE  # or its bytecode

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder = folder
        self.home = home
        self.environment = {
            # `@parallel` starts its other tasks with whatever `python` is on the path.
            "PATH": os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"])),
            "HOME": str(home),
            "LANG": "C.UTF-8",
            "METAFLOW_HOME": str(home / "metaflowconfig"),
            "METAFLOW_CLIENT_CACHE_PATH": str(home / "cache"),
            "METAFLOW_LOCAL_SERVICE_HOME": str(home / "services"),
            "METAFLOW_USER": "tester",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def __call__(
        self, *arguments: object, cwd: Path | None = None, timeout: float = 300, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the program and wait for it."""
        return self.execute(self.command(*arguments), cwd=cwd, timeout=timeout, **environment)

    def execute(
        self,
        command: Sequence[object],
        cwd: Path | None = None,
        timeout: float = 300,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run any command, as this user has it, and wait for it."""
        return subprocess.run(
            list(map(str, command)),
            cwd=cwd or self.folder,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=timeout,
            check=False,
        )

    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, str(self.program), *map(str, arguments)]

    def popen(self, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        """Start the program."""
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.folder,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def status(self, *arguments: object) -> Any:
        """What `status --json` says."""
        return json.loads(self("status", "--json", *arguments).stdout)


@pytest.fixture(scope="session", autouse=True)
def compiled_program(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let commands run from bytecode, as those of an installed package do.

    To compile the module takes longer than all else that most of them do, and there are hundreds.
    """
    bytecode = tmp_path_factory.mktemp("program") / f"{MODULE.name}c"
    Cli.program = Path(py_compile.compile(str(MODULE), str(bytecode), str(MODULE), doraise=True))


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Let Ctrl-C end what the tests start, even if they run in the background of a script.

    A shell has such commands ignore it, and what they start inherits that.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def command_line(folder: Path) -> Iterator[Cli]:
    """A command line below a folder; all services that it starts are stopped afterwards."""
    (folder / "home").mkdir()
    (folder / "project").mkdir(exist_ok=True)
    program = Cli(folder / "project", folder / "home")
    try:
        yield program
    finally:
        if (program.home / "services").exists():  # else none was started
            stopped = program("stop", "--all")
            assert stopped.returncode == 0, stopped.stderr


@pytest.fixture
def cli(project: Path) -> Iterator[Cli]:
    """The command line in an empty project; services that it starts are stopped in the end."""
    with command_line(project.parent) as program:
        yield program


@pytest.fixture
def daemon(cli: Cli) -> Iterator[Api]:
    """A client of the service that `start` has started in the project, which takes a second."""
    started = cli("start")
    assert started.returncode == 0, started.stderr
    client = Api(re.findall(r"http://[\w.:]+", started.stdout)[0])
    yield client
    client.close()


@contextlib.contextmanager
def serve_ui(store: mls.Store, key: str | None = None, **options: Any) -> Iterator[Api]:
    """Serve a store and its UI from this process."""
    server = mls.Server("127.0.0.1", 0, key)
    service = mls.UiService(store, credentials=server.access.credentials, **options)
    with run_server(server, service, key) as client:
        yield client


@pytest.fixture
def ui(store: mls.Store) -> Iterator[Api]:
    """A client of a service with a UI, on an empty root."""
    with serve_ui(store) as client:
        yield client


def new_store(tmp_path_factory: pytest.TempPathFactory) -> mls.Store:
    folder = tmp_path_factory.mktemp("shared").resolve()
    (folder / ".metaflow").mkdir()
    return mls.Store(str(folder))


def session_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder of that name which all workers of a session share."""
    folder = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        folder = folder.parent
    return folder.resolve() / name


@contextlib.contextmanager
def recording(folder: Path) -> Iterator[bool]:
    """Whether to record in the folder, made anew with a home; done by one worker for all."""
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        is_new = not (folder / "done").exists()
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "home").mkdir(parents=True)
        yield is_new
        (folder / "done").touch()


def eventually(condition: Any, seconds: float = 20) -> bool:
    """Whether a condition comes true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())


def all_paths(folder: Path) -> Sequence[Path]:
    """Every file and folder below a folder."""
    return sorted(folder.rglob("*"))


def ids_in(path: str) -> list[str]:
    return path.split("/")[2::2]


def by_local_mode(project: Path, what: str, *ids: str) -> list[dict[str, Any]]:
    """The runs, steps, tasks, metadata or artifacts of an object, as local mode reads them."""
    parents = ["root", "flow", "run", "step", "task"]
    provider = mls.local_metadata_provider(str(project))
    attempt = 0 if what == "artifact" else None
    return list(provider.get_object(parents[len(ids)], what, {}, attempt, *ids) or ())


def is_running(pid: int) -> bool:
    """Whether a process is there, and not only waits for its end to be noticed."""
    ps = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return ps.stdout.strip()[:1] not in ("", "Z")


def refuses_connections(api: Api) -> bool:
    try:
        socket.create_connection((api.host, api.port), 5).close()
    except ConnectionError:
        return True
    return False


class Wire:
    """A connection on which bytes go out as they are, and on which every answer is checked."""

    def __init__(self, api: Api, timeout: float = 30) -> None:
        self.socket = socket.create_connection((api.host, api.port), timeout)
        self._stream = self.socket.makefile("rb")

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self.socket.close()

    def send(self, content: bytes) -> None:
        """Send; a server that has answered and gone need not take all of it."""
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(content)

    def answer(self, to: str = "GET") -> Reply | None:
        """The next answer; None where the connection has ended instead."""
        try:
            line = self._stream.readline()
        except ConnectionError:
            return None
        if not line:
            return None
        status = int(line.split()[1])
        headers = {k.lower(): v for k, v in http.client.parse_headers(self._stream).items()}
        if status == 100:
            return Reply(status, headers, b"")
        has_body = to != "HEAD"
        reply = Reply(status, headers, self._stream.read(int(headers["content-length"]) * has_body))
        assert headers["metadata_service_version"] == mls.PROTOCOL_VERSION
        assert not any(name.startswith("access-control-") for name in headers)
        assert b"Traceback" not in reply.content
        if status >= 400 and has_body:
            assert headers["content-type"] == "application/json"
            assert list(reply.json) == ["message"]
            assert isinstance(reply.json["message"], str) and reply.json["message"]
        return reply


def http_request(line: str, *headers: str, body: bytes = b"", host: str = "localhost") -> bytes:
    """A request as bytes; without a word on the length of its body."""
    head = "\r\n".join((f"{line} HTTP/1.1", f"Host: {host}", *headers, "", ""))
    return head.encode("utf-8", "surrogateescape") + body


def exchange(api: Api, content: bytes) -> list[Reply]:
    """All answers that a client gets who sends this and then nothing any more."""
    with Wire(api) as wire:
        wire.send(content)
        with contextlib.suppress(OSError):
            wire.socket.shutdown(socket.SHUT_WR)
        return list(iter(wire.answer, None))


def answer_to(api: Api, line: str, *headers: str, body: bytes = b"", **options: str) -> Reply:
    """The one answer to a request; a body is announced."""
    length = [f"Content-Length: {len(body)}"] if body else []
    (reply,) = exchange(api, http_request(line, *length, *headers, body=body, **options))
    return reply


# ==================================================================================================
# The source
# ==================================================================================================

# Order, imports, words and lists that must agree, read from the text of the repository. These tests
# (`pytest -m structural`) need neither Metaflow nor the module and take a few seconds.

REPOSITORY = MODULE.parent
SOURCE = MODULE.read_text(encoding="utf-8")
SUBCOMMANDS = re.findall(r"^def do_(\w+)", SOURCE, re.MULTILINE)

LAYERS = (
    "Settings",
    "Store",
    "Datastore",
    "Queries",
    "Model",
    "Retention",
    "API",
    "Access",
    "Page",
    "UI API",
    "Server",
    "Registry",
    "Daemon",
    "Library",
    "Commands",
)
PROCESSES = {"argparse", "select", "signal", "subprocess"}
NETWORK = {"http", "socket", "socketserver"}
FOREIGN = {
    **dict.fromkeys(LAYERS[: LAYERS.index("Server")], PROCESSES | NETWORK),
    "Access": PROCESSES | NETWORK - {"socket"},
    "Server": {"argparse", "fcntl", "subprocess"},
    "Registry": NETWORK | {"argparse"},
    "Daemon": {"argparse"},
    "Library": NETWORK | {"argparse"},
}


class Statement(NamedTuple):
    """A statement at the top level of the module."""

    layer: str | None  # None above the first banner
    tree: ast.stmt
    defined: set[str]
    used: set[str]  # names of the module, of its imports and of Python itself
    imported: set[str]  # the modules, wherever the import stands


@functools.cache
def banners() -> dict[str, int]:
    """The titles of the layers, and the lines in which they stand."""
    found = re.finditer(r"^# =+\n# (\w+(?: \w+)?): .+\n# =+$", SOURCE, re.MULTILINE)
    return {banner[1]: SOURCE.count("\n", 0, banner.start()) for banner in found}


@functools.cache
def statements() -> list[Statement]:
    """The module, statement by statement; annotations count as uses."""
    found = []
    for tree in ast.parse(SOURCE).body:
        above = [layer for layer, line in banners().items() if line < tree.lineno]
        top = symtable.symtable(ast.unparse(tree), "", "exec")
        used = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_referenced()}
        tables = top.get_children()
        for table in tables:  # which grows meanwhile
            tables += table.get_children()
            used |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
        imported = {
            name.partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in (getattr(node, "module", None) or alias.name for alias in node.names)
        }
        defined = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned()}
        found.append(Statement(above[-1] if above else None, tree, defined, used, imported))
    return found


def text_of(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


@structural
def test_the_layers_stand_in_their_order_as_the_docstring_lists_them() -> None:
    docstring = ast.get_docstring(ast.parse(SOURCE))
    listed = re.findall(r"^    ([A-Z]\w+(?: \w+)?) {2,}\w", docstring, re.MULTILINE)
    assert tuple(listed) == tuple(banners()) == LAYERS


@structural
def test_the_sections_of_the_tests_stand_in_the_order_of_the_layers() -> None:
    titles = re.findall(r"^# =+\n# (.+)\n# =+$", text_of(Path(__file__).name), re.MULTILINE)
    assert tuple(title for title in titles if title in LAYERS) == LAYERS


@structural
def test_a_layer_names_only_what_is_defined_above_it_or_in_it() -> None:
    height = {layer: number for number, layer in enumerate((None, *LAYERS))}
    defining = {name: s.layer for s in statements() for name in s.defined}
    assert not [
        f"{s.layer} names {name} of {defining[name]}"
        for s in statements()
        for name in s.used & defining.keys()
        if height[defining[name]] > height[s.layer]
    ]


@structural
@pytest.mark.parametrize("path", [MODULE, Path(__file__)], ids=lambda path: path.stem)
def test_no_local_variable_bears_the_name_of_a_function_or_class(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    defined = {s.name: s for s in tree.body if isinstance(s, (ast.FunctionDef, ast.ClassDef))}
    decorators = {name: map(ast.unparse, s.decorator_list) for name, s in defined.items()}
    fixtures = {name for name, words in decorators.items() if "pytest.fixture" in " ".join(words)}
    shadows = []
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        arguments = function.args
        every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
        names = {argument.arg for argument in every} - fixtures  # which are asked for so
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
        shadows += [f"{name} in {function.name}" for name in names & defined.keys()]
    assert shadows == []


@structural
@pytest.mark.parametrize("layer", FOREIGN)
def test_a_layer_knows_nothing_of_what_is_not_its_business(layer: str) -> None:
    known = (s.used | s.imported for s in statements() if s.layer == layer)
    assert not set().union(*known) & FOREIGN[layer]


@structural
@pytest.mark.skipif(sys.version_info < (3, 10), reason="older Pythons do not list their library")
def test_nothing_is_imported_but_the_standard_library_and_metaflow() -> None:
    imported = {name: s.tree for s in statements() for name in s.imported}
    assert imported.keys() - sys.stdlib_module_names == {"metaflow", "pytest"}
    assert getattr(imported["pytest"], "name", None) == "pytest_configure"  # which pytest calls


@structural
def test_metaflow_is_imported_only_inside_functions_of_the_store() -> None:
    importing = [s for s in statements() if "metaflow" in s.imported]
    assert {(s.layer, type(s.tree)) for s in importing} == {("Store", ast.FunctionDef)}


@structural
def test_the_repository_holds_its_files_and_no_others() -> None:
    git = ["git", "ls-files"]
    if not shutil.which("git") or subprocess.run(git, cwd=REPOSITORY).returncode != 0:
        pytest.skip("this is not a git checkout")
    assert subprocess.check_output(git, cwd=REPOSITORY, text=True).split() == [
        ".ci/run",
        ".gitignore",
        "LICENSE",
        "README.md",
        "metaflow_local_service.py",
        "noxfile.py",
        "pyproject.toml",
        "test_metaflow_local_service.py",
    ]


@structural
@pytest.mark.parametrize("name", ["metaflow_local_service.py", "noxfile.py", "README.md"])
def test_nothing_is_left_to_be_done_later(name: str) -> None:
    assert not re.findall(r"\b(?:TODO|FIXME|XXX)\b.*", text_of(name))


@structural
def test_the_readme_names_every_environment_variable_and_subcommand() -> None:
    variables = re.findall(r'^ENV_\w+ = "(\w+)"$', SOURCE, re.MULTILINE)
    wanted = [*variables, *(f"metaflow-local-service {name}" for name in SUBCOMMANDS)]
    assert len(wanted) > 10
    assert [text for text in wanted if text not in text_of("README.md")] == []


@structural
def test_the_stories_of_the_readme_name_functions_that_exist() -> None:
    existing = set()
    for node in ast.parse(SOURCE).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            existing.add(node.name)
            inner = node.body if isinstance(node, ast.ClassDef) else ()
            existing |= {f"{node.name}.{s.name}" for s in inner if isinstance(s, ast.FunctionDef)}
    stories = text_of("README.md").partition("### Four stories")[2].partition("### How to add")[0]
    named = re.findall(r"`(\w+(?:\.\w+)*)`", stories)
    assert len(named) > 30
    assert [name for name in named if name not in existing | {"run"}] == []


@structural
def test_ci_runs_the_one_test_command_of_the_readme_and_ends_as_it_does(tmp_path: Path) -> None:
    command = r"^ *python3 -m venv .*pytest.*$"
    assert len(re.findall(command, text_of("README.md"), re.MULTILINE)) == 1
    (tmp_path / ".ci").mkdir()
    shutil.copy(REPOSITORY / ".ci" / "run", tmp_path / ".ci")
    pretended = "python3 -m venv --help > ran && echo 1 passed by pytest && exit 3"
    (tmp_path / "README.md").write_text(f"## Development\n\n    {pretended}\n")
    ran = subprocess.run([tmp_path / ".ci" / "run"], cwd="/", capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.splitlines()[-1]) == (3, "1 passed by pytest")
    assert (tmp_path / "ran").exists()


# ==================================================================================================
# Settings
# ==================================================================================================

# Which root, port and time-out are meant by options, variables and configuration files, and what is
# handed on to a command. Pure functions; one test asks Metaflow itself, in a process of its own.


@pytest.mark.parametrize(
    ("option", "environment", "expected"),
    [
        ("named", {"METAFLOW_DATASTORE_SYSROOT_LOCAL": "/set"}, "named"),
        (None, {"METAFLOW_DATASTORE_SYSROOT_LOCAL": "set"}, "set"),
        (None, {"METAFLOW_PROFILE": "work"}, "of-the-profile"),
        (None, {"METAFLOW_PROFILE": "missing"}, "."),
        (None, {}, "of-the-config"),
        (None, {"METAFLOW_DATASTORE_SYSROOT_LOCAL": ""}, "."),
        (None, {"METAFLOW_DATASTORE_SYSROOT_LOCAL": "~"}, "~"),
    ],
)
def test_the_most_direct_setting_of_the_root_wins(
    project: Path, option: str | None, environment: dict[str, str], expected: str
) -> None:
    for name, root in (("config", "of-the-config"), ("config_work", "of-the-profile")):
        content = {"METAFLOW_DATASTORE_SYSROOT_LOCAL": str(project / root)}
        (project / f"{name}.json").write_text(json.dumps(content))
    environment = {"METAFLOW_HOME": str(project), **environment}
    assert mls.root_folder(option, environment, str(project)) == str((project / expected).resolve())


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"METAFLOW_DATASTORE_SYSROOT_LOCAL": 5}'],
    ids=["empty", "half", "a list", "no text", "nested", "a number"],
)
def test_an_invalid_configuration_is_ignored(project: Path, content: bytes) -> None:
    (project / "config.json").write_bytes(content)
    assert mls.root_folder(None, {"METAFLOW_HOME": str(project)}, str(project)) == str(project)


def test_the_root_is_the_current_folder_by_default(project: Path) -> None:
    (project / ".metaflow").write_text("a file is no folder")
    assert mls.root_folder(None, {"METAFLOW_HOME": str(project)}, str(project)) == str(project)


def test_a_root_has_one_path_whatever_links_lead_to_it(project: Path, tmp_path: Path) -> None:
    (project / "sub").mkdir()
    (tmp_path / "real").mkdir()
    (project / ".metaflow").symlink_to(tmp_path / "real")
    link = tmp_path / "link"
    link.symlink_to(project)
    for option, here in ((str(link), "/"), (None, str(link)), (None, str(link / "sub"))):
        assert mls.root_folder(option, {"METAFLOW_HOME": "/nowhere"}, here) == str(project)


SYSROOT = "METAFLOW_DATASTORE_SYSROOT_LOCAL"


# What the environment, the project's configuration and that of the profile say.
SETTINGS: Sequence[tuple[dict[str, str], dict[str, str | None], dict[str, str | None]]] = [
    ({}, {}, {}),
    ({SYSROOT: "relative"}, {SYSROOT: "/project"}, {SYSROOT: "/profile"}),
    ({SYSROOT: ""}, {SYSROOT: "/project"}, {}),
    ({SYSROOT: "~/home"}, {}, {}),
    ({}, {SYSROOT: "~/home"}, {SYSROOT: "/profile"}),
    ({}, {SYSROOT: "relative"}, {SYSROOT: "/profile"}),
    ({}, {SYSROOT: ""}, {SYSROOT: "/profile"}),
    ({}, {SYSROOT: None}, {SYSROOT: "/profile"}),
    ({"METAFLOW_HOME": ""}, {"other": ""}, {SYSROOT: "/profile"}),
]

# Prints the folder that Metaflow takes as its root in each of the cases that are on stdin: one
# process for all, as an import of Metaflow takes as long as hundreds of other tests.
ROOTS_OF_METAFLOW = """
import importlib, json, os, sys
import metaflow.plugins.datastores.local_storage
NAMES = "metaflow_config_funcs", "metaflow_config", "plugins.datastores.local_storage"
roots = []
for folder, environment in json.load(sys.stdin):
    os.chdir(folder)
    os.environ.pop("METAFLOW_DATASTORE_SYSROOT_LOCAL", None)
    os.environ.update(environment)
    _, _, module = [importlib.reload(sys.modules[f"metaflow.{name}"]) for name in NAMES]
    find = module.LocalStorage.get_datastore_root_from_config
    roots.append(os.path.realpath(find(None, create_on_absent=False)))
print(json.dumps(roots))
"""


def test_metaflow_itself_would_use_the_same_root(tmp_path: Path) -> None:
    has_local_config = hasattr(metaflow.metaflow_config_funcs, "init_local_config")
    cases, ours = [], []
    for number, (environment, of_project, of_profile) in enumerate(SETTINGS):
        if of_project and not has_local_config:
            continue  # this Metaflow reads no configuration of a project
        home, below = tmp_path / f"home{number}", tmp_path / f"project{number}" / "a" / "b"
        for folder in (home, below, below.parents[1] / ".metaflow"):
            folder.mkdir(parents=True)
        (below.parents[1] / ".metaflow" / "config.json").write_text(json.dumps(of_project))
        for folder in (home, below):
            (folder / "config_work.json").write_text(json.dumps(of_profile))
        said = {"METAFLOW_HOME": str(home), "METAFLOW_PROFILE": "work", **environment}
        cases.append((str(below), said))
        ours.append(os.path.join(mls.root_folder(None, said, str(below)), ".metaflow"))
    asked = subprocess.run(
        [sys.executable, "-c", ROOTS_OF_METAFLOW],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert json.loads(asked.stdout) == ours


def test_exported_variables_are_not_the_users_own_unless_changed_since() -> None:
    user = {"PATH": "/bin", SYSROOT: "sub"}
    exports = {SYSROOT: "/here/sub", mls.ENV_KEY: "theirs"}
    within = {**user, **exports, mls.ENV_EXPORTED: mls.describe_exports(exports, user)}
    assert mls.user_environment(within) == user
    assert mls.user_environment({**within, SYSROOT: "/new"}) == {**user, SYSROOT: "/new"}
    same = mls.describe_exports({SYSROOT: "/set"}, {SYSROOT: "/set"})
    assert mls.user_environment({SYSROOT: "/set", mls.ENV_EXPORTED: same}) == {SYSROOT: "/set"}


@pytest.mark.parametrize("mark", ["", "{", "[]", "5", '{"a": 5}', '{"PATH": ["/bin", 5]}'])
def test_an_invalid_record_of_exports_is_ignored(mark: str) -> None:
    environment = {"HOME": "/", mls.ENV_EXPORTED: mark}
    assert mls.user_environment(environment) == {"HOME": "/"}


PROXIED = {"http_proxy": "http://proxy:3128"}


@pytest.mark.parametrize(
    ("host", "environment", "expected"),
    [
        ("127.0.0.1", {}, None),
        ("127.0.0.1", {"http_proxy": ""}, None),
        ("127.0.0.1", PROXIED, ["127.0.0.1", "127.0.0.1"]),
        ("127.0.0.1", {"ALL_PROXY": "socks5://p"}, ["127.0.0.1", "127.0.0.1"]),
        ("::1", PROXIED, ["::1,[::1]", "::1,[::1]"]),
        ("localhost", {**PROXIED, "no_proxy": "*"}, ["*", "*"]),
        ("localhost", {**PROXIED, "no_proxy": "a, b,"}, ["a, b,localhost", "a, b,localhost"]),
        ("localhost", {"no_proxy": "a", "NO_PROXY": "b"}, ["a,localhost", "b,localhost"]),
        ("localhost", {"no_proxy": "localhost,a"}, ["localhost,a", "localhost,a"]),
        ("localhost", {"no_proxy": "*,a"}, ["*,a,localhost", "*,a,localhost"]),
    ],
)
def test_the_host_is_added_to_the_exceptions_from_proxies(
    host: str, environment: dict[str, str], expected: list[str] | None
) -> None:
    exceptions = mls.proxy_exceptions(host, environment)
    assert (list(exceptions.values()) or None) == expected
    assert list(exceptions) == (["no_proxy", "NO_PROXY"] if expected else [])
    assert mls.proxy_exceptions(host, {**environment, **exceptions}) == exceptions
    assert not mls.has_proxy(host, 80, {**environment, **exceptions})


@pytest.mark.parametrize(
    ("exceptions", "is_caught"),
    [
        ("", True),
        ("localhost", True),
        ("127.0.0.1", False),
        ("a, 127.0.0.1", False),
        ("127.0.0.0/8", False),
        ("10.0.0.0/8", True),
        ("a/b", True),
        (" * ", False),
        ("7.0.0.1", True),
        ("127.0.0.1:80", False),
        ("127.0.0.1:81", True),
    ],
)
def test_a_proxy_is_detected_unless_the_host_is_excepted(exceptions: str, is_caught: bool) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        assert mls.has_proxy("127.0.0.1", 80, {**PROXIED, name: exceptions}) is is_caught
    assert not mls.has_proxy("127.0.0.1", 80, {"https_proxy": "http://proxy"})


@given(st.text(max_size=7) | st.integers(-9, 99999).map(str))
def test_a_port_is_a_number_from_0_to_65535_and_nothing_else(text: str) -> None:
    if re.fullmatch("[0-9]{1,5}", text) and int(text) < 65536:
        assert mls.parse_port(text) == int(text)
    else:
        with pytest.raises(ValueError, match=r"^a port is a number from 0 to 65535, not "):
            mls.parse_port(text)


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("300", 300), ("0.25", 0.25), ("007", 7)])
def test_an_idle_time_out_is_a_number_of_seconds(text: str, value: float) -> None:
    assert mls.parse_seconds(text) == value


@pytest.mark.parametrize("text", ["", "-1", "1e3", "nan", "inf", " 5", "5s", "1,5", "٣", "5\n"])
def test_an_invalid_idle_time_out_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^an idle time-out is a number of seconds"):
        mls.parse_seconds(text)


def test_an_empty_variable_counts_as_unset() -> None:
    assert mls.from_environment({"PORT": ""}, "PORT", mls.parse_port) is None
    assert mls.from_environment({}, "PORT", mls.parse_port) is None
    assert mls.from_environment({"PORT": "80"}, "PORT", mls.parse_port) == 80


@pytest.mark.parametrize(
    ("text", "expected"), [("1", True), ("yes", True), ("", False), ("0", False), ("False", False)]
)
def test_a_variable_turns_debugging_on(text: str, expected: bool) -> None:
    assert mls.is_debug({"METAFLOW_LOCAL_SERVICE_DEBUG": text}) is expected


def test_a_user_whom_the_system_does_not_know_has_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    assert mls.home_folder({}) == "/.metaflow-local-service"
    assert mls.home_folder({"METAFLOW_LOCAL_SERVICE_HOME": "here"}) == "here"


# ==================================================================================================
# Store
# ==================================================================================================

# Records on disk: the files of local mode, ids, tags, heartbeats, what others do to the files, and
# what a write that fails leaves. In this process, on an empty root; `local` is local mode's own
# recorder on the same root. A store of threads or of generated names takes a second or two.

Ids = tuple[str, ...]

in_one_store = settings(
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
"""For properties whose examples share the fixtures of one test."""


def labels(tags: Any = ("t",), system_tags: Any = ("user:tester",)) -> mls.Labels:
    return mls.Labels("tester", tags and list(tags), system_tags and list(system_tags))


def new_run(store: mls.Store, run_id: str | None = None, flow: str = "Flow") -> Ids:
    """Make a run, and its flow if need be, and return its ids."""
    with contextlib.suppress(mls.AlreadyExists):
        store.create_flow((flow,), labels())
    run = store.create_run((flow,), run_id, labels(), has_heartbeats=False)
    return (flow, str(run["run_number"]))


def new_task(store: mls.Store, run: Ids, step: str = "start", task_id: str | None = None) -> Ids:
    """Make a task, and its step if need be, and return its ids."""
    with contextlib.suppress(mls.AlreadyExists):
        store.create_step((*run, step), labels())
    task = store.create_task((*run, step), task_id, labels(), has_heartbeats=False)
    return (*run, step, str(task["task_id"]))


def metadatum_to_store(name: str, value: Any = "value", attempt: int = 0) -> mls.NewMetadatum:
    return mls.NewMetadatum(name, value, name, labels([f"attempt_id:{attempt}"], []))


def artifact_to_store(name: str, attempt: int = 0) -> mls.NewArtifact:
    return mls.NewArtifact(
        name, f":root:/{name!a}", "local", "sha", "metaflow.artifact", "pickle", attempt, labels()
    )


def folder_of(store: mls.Store, ids: Ids) -> Path:
    return Path(store.folder, *ids)


def api_path(ids: Ids) -> str:
    kinds = ("flows", "runs", "steps", "tasks")
    return "".join(f"/{kind}/{name}" for kind, name in zip(kinds, ids))


def record_file(store: mls.Store, ids: Ids) -> Path:
    return folder_of(store, ids) / "_meta" / "_self.json"


@pytest.fixture
def local(store: mls.Store, project: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Local mode's own recorder of the flow `Flow`, in the root of the store."""
    monkeypatch.setenv("SUDO_USER", "tester")  # Metaflow wants a name, and `root` is none
    about = dict.fromkeys(["runtime", "python_version_code", "metaflow_version", "script"], "x")
    environment = SimpleNamespace(get_environment_info=lambda: about)
    provider = mls.local_metadata_provider(str(project))
    return provider(environment, SimpleNamespace(name="Flow"), None, None)


def assert_alike(ours: Iterable[Any], theirs: Any) -> None:
    """Records of the store and of local mode tell the same of all that both tell."""
    ours = list(ours)
    theirs = [theirs] if isinstance(theirs, dict) else list(theirs)
    assert len(ours) == len(theirs) > 0
    shared = set(ours[0]) & set(theirs[0])

    def told(record: dict[str, Any]) -> str:
        of_tags = {key: sorted(record[key]) for key in shared & {"tags", "system_tags"}}
        of_ids = {key: str(record[key]) for key in shared & {"run_number", "task_id"}}
        kept = {key: record[key] for key in shared}
        return json.dumps({**kept, **of_tags, **of_ids}, sort_keys=True)

    assert sorted(map(told, ours)) == sorted(map(told, theirs))


def assert_both_tell_the_same(store: mls.Store, local: Any) -> None:
    """The store and local mode answer alike, from the list of flows down to the artifacts."""

    def ask(kind: str, what: str, *ids: str) -> Any:
        return local.get_object(kind, what, {}, 0 if what == "artifact" else None, *ids)

    assert_alike(store.flows(), ask("root", "flow"))
    assert_alike(store.runs(("Flow",)), ask("flow", "run", "Flow"))
    for run in store.runs(("Flow",)):
        ids = ("Flow", str(run["run_number"]))
        assert_alike([store.run(ids)], ask("run", "self", *ids))
        assert_alike(store.steps(ids), ask("run", "step", *ids))
        for step in store.steps(ids):
            below = (*ids, step["step_name"])
            assert_alike([store.step(below)], ask("step", "self", *below))
            assert_alike(store.tasks(below), ask("step", "task", *below))
            for record in store.tasks(below):
                task = (*below, str(record["task_id"]))
                assert_alike([store.task(task)], ask("task", "self", *task))
                assert_alike(store.metadata(task), ask("task", "metadata", *task))
                assert_alike(store.artifacts(task, 0), ask("task", "artifact", *task))
                for name in [found["name"] for found in store.artifacts(task, 0)]:
                    theirs = local.get_object("artifact", "self", {}, 0, *task, name)
                    assert_alike([store.artifact(task, name, 0)], theirs)


def test_the_folders_are_called_what_metaflow_calls_them() -> None:
    from metaflow.metaflow_config import DATASTORE_LOCAL_DIR
    from metaflow.plugins.datastores.local_storage import LocalStorage

    assert mls.DATASTORE_DIR == DATASTORE_LOCAL_DIR
    assert mls.META_DIR == LocalStorage.METADATA_DIR


def test_local_mode_reads_what_the_store_has_written(store: mls.Store, local: Any) -> None:
    for run in (new_run(store), new_run(store, "argo-1")):
        for task in (new_task(store, run), new_task(store, run, "end", "t-1")):
            rows = [
                metadatum_to_store("attempt", "0"),
                metadatum_to_store("name with spaces"),
                metadatum_to_store("ü", ["a", "b"]),
            ]
            store.create_metadata(task, rows)
            store.create_artifacts(
                task, [artifact_to_store("x"), artifact_to_store("ü"), artifact_to_store("_graph")]
            )
    store.change_tags(run, add=["new"], remove=["t"])
    assert_both_tell_the_same(store, local)


def test_the_store_reads_what_local_mode_has_written(store: mls.Store, local: Any) -> None:
    datum = {"field": "ds-type", "value": "local", "type": "ds-type", "tags": ["attempt_id:0"]}
    of_artifact = {"type": "pickle", "sha": "abc", "ds_type": "local", "url": None, "ds_root": "/d"}
    local.register_run_id("argo-1", tags=["own"])
    for run_id in (local.new_run_id(tags=["own"]), "argo-1"):
        local.register_task_id(run_id, "end", "t-1")
        for task_id in (local.new_task_id(run_id, "end"), "t-1"):
            local.register_metadata(run_id, "end", task_id, [SimpleNamespace(**datum)])
            artifacts = [SimpleNamespace(name=name, **of_artifact) for name in ("x", "_task_ok")]
            local.register_data_artifacts(run_id, "end", task_id, 0, artifacts)
    assert_both_tell_the_same(store, local)


@pytest.mark.parametrize("length", [1, 200, 201, 239])
def test_the_longest_artifact_names_of_local_mode_are_found_both_ways(
    store: mls.Store, local: Any, length: int
) -> None:
    task = new_task(store, new_run(store))
    ours, theirs = "o" * length, "t" * length
    store.create_artifacts(task, [artifact_to_store(ours)])
    detail = SimpleNamespace(name=theirs, type="", sha="", ds_type="local", url="u", ds_root="")
    local.register_data_artifacts(*task[1:], 0, [detail])
    for name in (ours, theirs):
        found = local.get_object("artifact", "self", {}, 0, *task, name)
        assert_alike([store.artifact(task, name)], found)


# -- ids -------------------------------------------------------------------------------------------


def test_a_run_id_is_the_microsecond_of_its_creation(store: mls.Store) -> None:
    before = time.time_ns() // 1000
    assert before <= int(new_run(store)[1]) <= time.time_ns() // 1000


def test_run_ids_increase_also_when_the_clock_goes_backwards(
    store: mls.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10**18 + 10**9, 0, -(10**6)))
    monkeypatch.setattr(time, "time_ns", lambda: next(clock))
    ids = [int(new_run(store)[1]) for _ in range(20)]
    assert ids == sorted(set(ids))


def test_a_run_is_later_than_those_on_disk_whoever_made_them(store: mls.Store) -> None:
    store.create_flow(("Flow",), labels())
    ahead = time.time_ns() // 1000 + 3600 * 10**6
    folder_of(store, ("Flow", str(ahead))).mkdir()
    assert int(new_run(store)[1]) > ahead


def test_task_ids_count_up_in_their_run_across_its_steps(store: mls.Store) -> None:
    first_run, second_run = new_run(store), new_run(store)
    assert [new_task(store, first_run, step)[3] for step in "aba"] == ["1", "2", "3"]
    assert new_task(store, second_run)[3] == "1"


def test_task_ids_go_on_from_what_is_on_disk(store: mls.Store, project: Path) -> None:
    run = new_run(store)
    new_task(store, run)
    new_task(store, run, task_id="named")
    folder_of(store, (*run, "other", "7")).mkdir(parents=True)
    again = mls.Store(str(project))
    assert new_task(again, run)[3] == "8"
    folder_of(store, (*run, "other", "9")).mkdir()  # by another process, meanwhile
    assert new_task(again, run)[3] == "10"


def test_tasks_made_by_64_threads_have_all_numbers_once(store: mls.Store) -> None:
    run = new_run(store)
    for step in ("a", "b"):
        store.create_step((*run, step), labels())
    with ThreadPoolExecutor(64) as pool:
        made = pool.map(lambda n: new_task(store, run, "ab"[n % 2])[3], range(128))
        assert sorted(map(int, made)) == list(range(1, 129))


def test_a_client_may_bring_an_id_once(store: mls.Store) -> None:
    run = new_run(store, "argo-flow.x:1")
    task = new_task(store, run, task_id="t é-1")
    assert (run[1], task[3]) == ("argo-flow.x:1", "t é-1")
    before = record_file(store, task).read_bytes()
    with pytest.raises(mls.AlreadyExists):
        new_run(store, run[1])
    with pytest.raises(mls.AlreadyExists):
        new_task(store, run, task_id=task[3])
    assert record_file(store, task).read_bytes() == before


def test_an_id_that_many_clients_bring_at_once_is_created_once(store: mls.Store) -> None:
    store.create_flow(("Flow",), labels())

    def is_made(_: int) -> bool:
        with contextlib.suppress(mls.AlreadyExists):
            return bool(store.create_run(("Flow",), "argo", labels(), has_heartbeats=True))
        return False

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(is_made, range(32))) == 1


@pytest.mark.parametrize("number", ["0", "12", "007", "²", "٣"])
def test_a_client_may_not_bring_a_number_as_an_id(store: mls.Store, number: str) -> None:
    run = new_run(store)
    store.create_step((*run, "start"), labels())
    before = all_paths(Path(store.folder))
    with pytest.raises(mls.NotStorable):
        new_run(store, number)
    with pytest.raises(mls.NotStorable):
        new_task(store, run, task_id=number)
    assert all_paths(Path(store.folder)) == before


# -- names -----------------------------------------------------------------------------------------

NO_FOLDER_NAMES = ["", ".", "..", "_meta", "a/b", "/", "a\0b", "x" * 256, "é" * 128, "\ud800"]


@pytest.mark.parametrize("name", NO_FOLDER_NAMES)
def test_an_id_that_cannot_name_a_folder_is_refused(store: mls.Store, name: str) -> None:
    run = new_run(store)
    step = (*run, "start")
    store.create_step(step, labels())
    before = all_paths(Path(store.folder).parent)
    for refused in (
        lambda: store.create_flow((name,), labels()),
        lambda: store.create_run(run[:1], name, labels(), has_heartbeats=True),
        lambda: store.create_step((*run, name), labels()),
        lambda: store.create_task(step, name, labels(), has_heartbeats=True),
        lambda: store.task((*step, name)),
    ):
        with pytest.raises(mls.NotStorable):
            refused()
    assert all_paths(Path(store.folder).parent) == before


def test_an_id_that_no_path_can_name_is_refused(store: mls.Store) -> None:
    """A lone surrogate can be in JSON, but is no UTF-8: nobody could ask for the run."""
    with pytest.raises(mls.NotStorable):
        new_run(store, "\udc80")


def test_a_flow_cannot_have_the_name_of_a_file_of_the_service(store: mls.Store) -> None:
    with pytest.raises(mls.NotStorable):
        store.create_flow((mls.PIDFILE,), labels())


@pytest.mark.parametrize("name", ["*", "?", "[ab]", "a*", "**", "[!x]", "%", "~", "$HOME", " a "])
def test_names_are_never_patterns(store: mls.Store, name: str) -> None:
    plain = new_task(store, new_run(store, "a", flow="a"), "a", "a")
    odd = new_task(store, new_run(store, name, flow=name), name, name)
    store.create_artifacts(plain, [artifact_to_store("a"), artifact_to_store("b")])
    store.create_metadata(plain, [metadatum_to_store("a")])
    assert store.artifact(plain, name) is None
    assert (list(store.artifacts(odd)), list(store.metadata(odd))) == ([], [])
    store.create_artifacts(odd, [artifact_to_store("a"), artifact_to_store(name)])
    store.create_metadata(odd, [metadatum_to_store(name)])
    assert store.artifact(odd, name)["name"] == name
    assert [m["field_name"] for m in store.metadata(odd)] == [name]
    assert len(store.artifacts(odd)) == len(store.artifacts(plain)) == 2
    assert [t["task_id"] for t in store.tasks(odd[:3])] == [name]
    assert len(list(store.flows())) == 2


any_text = st.text(st.characters(), max_size=20) | st.sampled_from(
    ["/", "..", "../../x", "a/b", ".", "\0", "\ud800", "\udcff", "x" * 300, "é" * 150, "a b", "a\n"]
)
"""Text, also such as no file can be called."""


@in_one_store
@given(st.lists(st.tuples(any_text, any_text | st.lists(any_text)), min_size=1, max_size=5))
def test_metadata_may_be_of_any_name_and_text(
    store: mls.Store, fields: list[tuple[str, Any]]
) -> None:
    task = new_task(store, new_run(store))
    assert store.create_metadata(task, [metadatum_to_store(*field) for field in fields]) == len(
        fields
    )
    read = [(m["field_name"], m["value"]) for m in store.metadata(task)]
    assert read == fields[::-1]  # newest first


@in_one_store
@given(st.lists(any_text, unique=True, min_size=1, max_size=5))
def test_artifacts_may_be_of_any_name(store: mls.Store, names: list[str]) -> None:
    task = new_task(store, new_run(store))
    store.create_artifacts(task, [artifact_to_store(name) for name in names])
    assert sorted(a["name"] for a in store.artifacts(task)) == sorted(names)
    for name in names:
        assert store.artifact(task, name)["location"] == artifact_to_store(name).location


def test_an_artifact_named_like_the_file_of_another_is_not_the_other(store: mls.Store) -> None:
    task = new_task(store, new_run(store))
    store.create_artifacts(task, [artifact_to_store("a/b")])
    (path,) = folder_of(store, task).glob("_meta/0_artifact_*")
    name = path.name[len("0_artifact_") : -len(".json")]
    assert store.artifact(task, name) is None
    store.create_artifacts(task, [artifact_to_store(name)])
    assert {a["name"] for a in store.artifacts(task)} == {"a/b", name}


# -- metadata and artifacts ------------------------------------------------------------------------


def test_metadata_of_one_millisecond_is_all_kept(
    store: mls.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = new_task(store, new_run(store))
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now)
    for start in (0, 50, 100):
        store.create_metadata(
            task, [metadatum_to_store("f", str(n)) for n in range(start, start + 50)]
        )
    read = list(store.metadata(task))
    assert [m["value"] for m in read] == [str(n) for n in reversed(range(150))]
    assert len({m["id"] for m in read}) == 150


def test_an_artifact_is_not_overwritten(store: mls.Store) -> None:
    task = new_task(store, new_run(store))
    first = artifact_to_store("x")
    assert (
        store.create_artifacts(task, [first, first._replace(sha="2"), artifact_to_store("y")]) == 2
    )
    assert store.create_artifacts(task, [first._replace(sha="3"), artifact_to_store("x", 1)]) == 1
    assert [store.artifact(task, "x", attempt)["sha"] for attempt in (0, 1)] == ["sha", "sha"]


# -- tags and heartbeats ---------------------------------------------------------------------------


def test_a_change_of_tags_keeps_all_else_of_the_record(store: mls.Store) -> None:
    run = new_run(store)
    path = record_file(store, run)
    record = {**json.loads(path.read_text()), "ts_epoch": 123, "user_name": "x", "of_others": [1]}
    path.write_text(json.dumps(record))
    assert store.change_tags(run, add=["new", "user:tester", "new"], remove=["t", "no"]) == ["new"]
    assert json.loads(path.read_text()) == {**record, "tags": ["new"]}


def test_a_run_without_tags_can_be_tagged(store: mls.Store) -> None:
    store.create_flow(("Flow",), labels(None, None))
    store.create_run(("Flow",), "argo", labels(None, None), has_heartbeats=True)
    assert store.change_tags(("Flow", "argo"), add=["new"], remove=["x"]) == ["new"]
    assert store.run(("Flow", "argo"))["system_tags"] is None


def test_tags_added_at_once_are_all_kept(store: mls.Store) -> None:
    run = new_run(store)
    gone = [f"gone-{n}" for n in range(80)]
    store.change_tags(run, add=["stays", *gone], remove=["t"])
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: store.change_tags(run, add=[str(n)], remove=[gone[n]]), range(80)))
    assert set(store.run(run)["tags"]) == {"stays", *map(str, range(80))}


def test_heartbeats_outlive_the_store(store: mls.Store, project: Path) -> None:
    task = new_task(store, new_run(store))
    assert store.task(task)["last_heartbeat_ts"] is None
    before = int(time.time())
    assert store.heartbeat(task)
    for reader in (store, mls.Store(str(project))):
        of_task, of_run = reader.task(task), reader.run(task[:2])
        assert before <= of_task["last_heartbeat_ts"] <= time.time()
        assert before <= of_run["last_heartbeat_ts"] <= time.time()
    store.change_tags(task[:2], add=["new"], remove=[])
    assert store.run(task[:2])["last_heartbeat_ts"] == of_run["last_heartbeat_ts"]


# -- what others do to the files -------------------------------------------------------------------


def test_records_written_by_local_mode_are_seen_at_once(store: mls.Store, local: Any) -> None:
    run = new_run(store)
    task = new_task(store, run)
    for n in range(5):
        assert len(list(store.runs(("Flow",)))) == 1 + n
        assert len(list(store.tasks(task[:3]))) == 1 + n
        local.new_run_id()
        local.register_task_id(run[1], "start", f"t{n}")
        datum = SimpleNamespace(field=f"f{n}", value="v", type="", tags=[])
        local.register_metadata(*task[1:], [datum])
        assert len(list(store.metadata(task))) == 1 + n
        local.mutate_user_tags_for_run(*run, tags_to_add=[f"tag{n}"])
        assert f"tag{n}" in store.run(run)["tags"]
        assert f"tag{n}" in store.task(task)["tags"]


@pytest.mark.parametrize("read", ["steps", "tasks", "metadata", "attempts_with_artifacts"])
def test_a_run_that_is_deleted_while_it_is_read_has_nothing(
    store: mls.Store, monkeypatch: pytest.MonkeyPatch, read: str
) -> None:
    task = new_task(store, new_run(store))
    folder, settled_version = Path(store.folder, *task[:2]), mls.settled_version

    def delete_and_tell_version(status: os.stat_result) -> mls.Version | None:
        shutil.rmtree(folder, ignore_errors=True)  # between the look at a folder and its listing
        return settled_version(status)

    monkeypatch.setattr(mls, "settled_version", delete_and_tell_version)
    of_ids = {"steps": task[:2], "tasks": task[:3]}.get(read, task)
    assert list(getattr(mls.Store(str(folder.parents[2])), read)(of_ids)) == []


def test_records_deleted_by_others_are_gone_at_once(store: mls.Store) -> None:
    run, other = new_run(store), new_run(store)
    task = new_task(store, run)
    assert store.task(task) and len(list(store.runs(("Flow",)))) == 2
    shutil.rmtree(folder_of(store, run))
    assert (store.run(run), store.task(task), list(store.steps(run))) == (None, None, [])
    assert [str(r["run_number"]) for r in store.runs(("Flow",))] == [other[1]]
    with pytest.raises(mls.NotFound):
        store.create_metadata(task, [metadatum_to_store("f")])


def test_changes_within_one_tick_of_the_time_stamps_are_seen(store: mls.Store) -> None:
    task = new_task(store, new_run(store))
    store.create_metadata(task, [metadatum_to_store("f")])
    record, meta = record_file(store, task[:2]), folder_of(store, task) / "_meta"
    stamp = (time.time() + 60,) * 2  # so that a slow machine does not take it for settled
    for n in range(5):
        staged = record.with_name("staged")
        staged.write_text(json.dumps({"ts_epoch": 1, "tags": [str(n)]}))
        os.utime(staged, stamp)
        staged.rename(record)
        assert store.run(task[:2])["tags"] == [str(n)]
        shutil.copytree(meta.parent, meta.parent.with_name(f"t{n}"))
        os.utime(meta.parent.parent, stamp)
        assert len(list(store.tasks(task[:3]))) == 2 + n
        shutil.copy(next(meta.glob("sysmeta_*")), meta / f"sysmeta_f_{n}.json")
        os.utime(meta, stamp)
        assert len(list(store.metadata(task))) == 2 + n


UNREADABLE: dict[str, Callable[[Path], object]] = {  # what stands in the place of a record
    "nothing": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(100)),
    "half a record": lambda path: path.write_bytes(b'{"ts_epoch": 1'),
    "another shape": lambda path: path.write_bytes(b"[]"),
    "null": lambda path: path.write_bytes(b"null"),
    "no UTF-8": lambda path: path.write_bytes(b"\xff\xfe"),
    "absurdly deep": lambda path: path.write_bytes(b"[" * 100_000),
    "no fields": lambda path: path.write_bytes(b'{"tags": []}'),
    "text for a number": lambda path: path.write_bytes(
        b'{"ts_epoch": "soon", "field_name": "", "value": "", "type": ""}'
    ),
    "a folder": lambda path: path.mkdir(),
    "a link to itself": lambda path: path.symlink_to(path),
    "a pipe": lambda path: os.mkfifo(path),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_unreadable_record_is_skipped_logged_and_kept(
    store: mls.Store, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    good = new_task(store, new_run(store))
    store.create_metadata(good, [metadatum_to_store("f")])
    bad = [
        record_file(store, ("Flow", "bad")),
        record_file(store, (*good[:3], "bad")),
        folder_of(store, good) / "_meta" / "sysmeta_x_1700000000000.json",
        folder_of(store, good) / "_meta" / "0_artifact_x.json",
    ]
    for path in bad:
        path.parent.mkdir(parents=True, exist_ok=True)
        UNREADABLE[kind](path)
    assert len(list(store.runs(("Flow",)))) == 1
    assert len(list(store.tasks(good[:3]))) == 1
    assert len(list(store.metadata(good))) == 1
    assert (store.artifacts(good), store.artifact(good, "x")) == ([], None)
    assert store.run(("Flow", "bad")) is None
    for path in bad:
        assert str(path) in caplog.text
        assert os.path.lexists(path)


@pytest.mark.parametrize(
    ("pattern", "field", "value"),
    [
        ("sysmeta_*", "field_name", None),
        ("sysmeta_*", "type", 5),
        ("sysmeta_*", "tags", [None]),
        ("sysmeta_*", "ts_epoch", 10**30),
        ("0_artifact_*", "name", []),
        ("0_artifact_*", "sha", math.nan),
        ("0_artifact_*", "ds_type", {}),
        ("0_artifact_*", "attempt_id", 10**30),
    ],
)
def test_a_record_with_a_field_of_another_type_is_skipped(
    store: mls.Store, pattern: str, field: str, value: Any
) -> None:
    task = new_task(store, new_run(store))
    store.create_metadata(task, [metadatum_to_store("f"), metadatum_to_store("g")])
    store.create_artifacts(task, [artifact_to_store("x"), artifact_to_store("y")])
    path = min((folder_of(store, task) / "_meta").glob(pattern))
    path.write_text(json.dumps({**json.loads(path.read_bytes()), field: value}))
    fresh = mls.Store(str(Path(store.folder).parent))
    counts = len(list(fresh.metadata(task))), len(fresh.artifacts(task))
    assert counts == ((1, 2) if pattern.startswith("sysmeta") else (2, 1))


def test_a_value_of_a_metadatum_that_is_no_text_is_read_as_json(store: mls.Store) -> None:
    task = new_task(store, new_run(store))
    store.create_metadata(task, [metadatum_to_store("f")])
    (path,) = (folder_of(store, task) / "_meta").glob("sysmeta_*")
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "value": {"a": 1}}))
    assert [row["value"] for row in mls.Store(str(Path(store.folder).parent)).metadata(task)] == [
        '{"a": 1}'
    ]


LISTS_OF_FILES: dict[str, Callable[[mls.Store, Ids], Iterable[Any]]] = {
    "argo/_meta/_self.json": lambda store, task: store.runs(task[:1]),
    "start/_meta/_self.json": lambda store, task: store.steps(task[:2]),
    "1/_meta/_self.json": lambda store, task: store.tasks(task[:3]),
    "1/_meta/sysmeta_*.json": lambda store, task: store.metadata(task),
    "1/_meta/0_artifact_*.json": lambda store, task: store.artifacts(task),
}


@pytest.mark.parametrize("pattern", LISTS_OF_FILES)
def test_a_file_changed_by_others_is_read_again(store: mls.Store, pattern: str) -> None:
    """Also when there was no record in it, and of flows, runs, steps and tasks also when the file's
    folder has not changed for long."""
    task = new_task(store, new_run(store, "argo"))
    store.create_metadata(task, [metadatum_to_store("f")])
    store.create_artifacts(task, [artifact_to_store("x")])
    (path,) = Path(store.folder).rglob(pattern)
    good = path.read_bytes()
    for moment, (content, users) in enumerate(
        (
            (good, ["tester"]),
            (good[:20], []),
            (good, ["tester"]),
            (good.replace(b"tester", b"other"), ["other"]),
        )
    ):
        path.write_bytes(content)
        changed = 1e9 if path.name == "_self.json" else 1e9 + moment
        for folder in (path.parent, path.parent.parent.parent):
            os.utime(folder, (changed, changed))
        found = LISTS_OF_FILES[pattern](store, task)
        assert [record["user_name"] for record in found] == users


def test_a_folder_vouches_for_its_metadata_and_artifacts_until_it_changes(
    store: mls.Store, api: Api, local: Any
) -> None:
    """Both modes put such files there by rename, which changes the folder; people may not."""
    task = new_task(store, new_run(store))
    store.create_metadata(task, [metadatum_to_store("f", "first")])
    store.create_artifacts(task, [artifact_to_store("x")])
    meta = folder_of(store, task) / "_meta"
    step = api_path(task[:3])

    def told() -> object:
        found = [m["value"] for m in store.metadata(task)]
        below = [m["value"] for m in store.metadata_below(task[:2])]
        listed = api.get(f"{step}/tasks/{task[3]}/metadata").json
        assert found == below == [m["value"] for m in listed]
        matching = {
            value
            for value in ("first", "other", "later")
            if api.get(f"{step}/filtered_tasks?metadata_field_name=f&pattern={value}").json
        }
        assert matching == set(found)
        return found, [a["user_name"] for a in store.artifacts_below(task[:2])]

    os.utime(meta, (1e9, 1e9))
    assert told() == (["first"], ["tester"])
    for path, old, new in (("sysmeta_f_*", b"first", b"other"), ("0_art*", b"tester", b"others")):
        (file,) = meta.glob(path)
        file.write_bytes(file.read_bytes().replace(old, new))
    os.utime(meta, (1e9, 1e9))
    assert told() == (["first"], ["tester"])
    local.register_metadata(
        *task[1:], [SimpleNamespace(field="f", value="later", type="", tags=[])]
    )
    assert told() == (["later", "other"], ["others"])
    shutil.rmtree(meta.parent)
    assert told() == ([], [])


def test_a_list_shows_new_heartbeats_and_tags(store: mls.Store, api: Api, local: Any) -> None:
    task = new_task(store, new_run(store))
    runs, tasks = f"/flows/{task[0]}/runs", f"{api_path(task[:3])}/tasks"
    for count in range(3):
        for path in (runs, tasks, f"{runs}?_limit=5", f"{tasks}?_limit=5"):
            (record,) = api.get(path).json
            assert len(record["tags"]) == 1 + count, path
            assert (record["last_heartbeat_ts"] is None) == (count == 0), path
        assert api.get(runs).json == [api.get(api_path(task[:2])).json]
        assert api.get(tasks).json == [api.get(api_path(task)).json]
        store.heartbeat(task)
        local.mutate_user_tags_for_run(*task[:2], tags_to_add=[f"tag{count}"])


def test_a_list_longer_than_a_batch_is_whole_and_ends_where_its_folder_is_deleted(
    store: mls.Store,
) -> None:
    run = new_run(store)
    made = [int(new_task(store, run)[3]) for _ in range(2 * mls.BATCH_SIZE + 5)]
    step = (*run, "start")
    assert [task["task_id"] for task in store.tasks(step)] == made[::-1]
    tasks = store.tasks(step)
    begun = [next(tasks)["task_id"], next(tasks)["task_id"]]
    shutil.rmtree(f"{store.folder}/{'/'.join(step)}")
    assert begun + [task["task_id"] for task in tasks] == made[: -mls.BATCH_SIZE - 2 : -1]


def test_a_step_that_is_deleted_while_its_values_are_read_has_none(
    store: mls.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = new_task(store, new_run(store))[:3]
    list_children = mls.Store._list_children

    def list_and_delete(*arguments: Any) -> mls.Listing:
        listing = list_children(*arguments)
        shutil.rmtree(folder_of(store, step))
        return listing

    monkeypatch.setattr(mls.Store, "_list_children", list_and_delete)
    assert store.values_of_tasks(step, None, mls.value_text) == {}


@pytest.mark.parametrize("kind", ["zeros", "a link to itself"])
@pytest.mark.parametrize("depth", range(1, 6))
def test_below_a_path_that_leads_nowhere_there_is_nothing(
    store: mls.Store, depth: int, kind: str
) -> None:
    task = new_task(store, new_run(store))
    store.create_metadata(task, [metadatum_to_store("f")])
    folder = folder_of(store, (*task, mls.META_DIR)[:depth])
    shutil.rmtree(folder)
    UNREADABLE[kind](folder)
    assert list(store.tasks(task[:3])) == list(store.metadata(task)) == store.artifacts(task) == []
    assert list(store.metadata_below(task[:2])) == list(store.metadata_below(task)) == []
    assert store.values_of_tasks(task[:3], None, mls.value_text) == {}
    assert store.version(task) is None


def test_links_that_lead_nowhere_are_left_out(store: mls.Store) -> None:
    new_run(store)
    folder_of(store, ("Flow", "broken")).symlink_to("nothing")
    folder_of(store, ("Flow", "loop")).symlink_to("loop")
    assert len(list(store.runs(("Flow",)))) == 1
    assert store.run(("Flow", "loop")) is None


# -- memory ----------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 9))), st.integers(1, 20))
def test_a_cache_weighs_no_more_than_its_limit_or_its_newest_entry(
    puts: list[Any], limit: int
) -> None:
    cache = mls.Cache(limit, weigh=lambda value: value)
    for key, value in puts:
        cache.put(key, value)
        assert sum(cache.values()) <= max(limit, value)
        assert cache[key] == value


def test_what_the_caches_have_dropped_is_read_again(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / ".metaflow").mkdir()
    for limit in ("RECORDS_IN_MEMORY", "LISTINGS_IN_MEMORY"):
        monkeypatch.setattr(mls, limit, 3000)
    own_store = mls.Store(str(project))
    run = new_run(own_store)
    tasks = [new_task(own_store, run) for _ in range(10)]
    for task in tasks:
        own_store.create_metadata(task, [metadatum_to_store("f", task[3])])
        own_store.heartbeat(task)
    assert [t["task_id"] for t in own_store.tasks((*run, "start"))] == list(range(10, 0, -1))
    assert [next(own_store.metadata(task))["value"] for task in tasks] == [t[3] for t in tasks]
    assert all(own_store.task(task)["last_heartbeat_ts"] for task in tasks)
    assert new_task(own_store, run)[3] == "11"


# -- long lists ------------------------------------------------------------------------------------


def test_those_who_wait_for_the_same_long_list_share_a_read_that_began_after_they_asked() -> None:
    reads, began = mls.LongReads(), [0]

    def read() -> int:
        began[0] += 1
        number = began[0]
        time.sleep(0.001)
        return number

    def ask(_: int) -> None:
        before = began[0]
        assert reads.read("tasks", read) > before

    with ThreadPoolExecutor(8) as threads:
        assert len(list(threads.map(ask, range(200)))) == 200
    assert began[0] < 200, "some have shared a read"
    assert reads._awaited == {}, "nothing is kept"


def test_long_lists_are_read_in_turn_and_one_that_fails_fails_alone() -> None:
    reads, reading = mls.LongReads(), threading.Lock()

    def read(number: int) -> int:
        assert reading.acquire(blocking=False), "two at a time"
        try:
            time.sleep(0.001)
            if number % 2:
                raise OSError(number)
            return number
        finally:
            reading.release()

    def ask(number: int) -> int:
        try:
            return reads.read(number % 5, lambda: read(number))
        except OSError as error:
            return error.args[0]

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(ask, range(100)))
    assert [number % 5 for number in found] == [number % 5 for number in range(100)]
    assert reads._awaited == {}


# -- on the disk -----------------------------------------------------------------------------------

WRITES: dict[str, Callable[[mls.Store, Ids], object]] = {
    "flow": lambda store, task: store.create_flow(("New",), labels()),
    "run": lambda store, task: store.create_run(task[:1], None, labels(), has_heartbeats=True),
    "run with an id": lambda store, task: store.create_run(
        task[:1], "x", labels(), has_heartbeats=True
    ),
    "step": lambda store, task: store.create_step((*task[:2], "new"), labels()),
    "task": lambda store, task: store.create_task(task[:3], None, labels(), has_heartbeats=True),
    "task with an id": lambda store, task: store.create_task(
        task[:3], "x", labels(), has_heartbeats=True
    ),
    "metadata": lambda store, task: store.create_metadata(task, [metadatum_to_store("f")] * 5),
    "artifacts": lambda store, task: store.create_artifacts(
        task, list(map(artifact_to_store, "abcde"))
    ),
    "tags": lambda store, task: store.change_tags(task[:2], add=["new"], remove=[]),
    "heartbeat": lambda store, task: store.heartbeat(task),
}
JSON_WRITES = [kind for kind in WRITES if kind != "heartbeat"]


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in all_paths(folder)}


@pytest.fixture(params=["unnamed", "named"])
def new_files(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """How new files are made: without a name, where that can be, and by a temporary name."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    return str(request.param)


@pytest.mark.parametrize("broken", ["name", "write", "half a write"])
@pytest.mark.parametrize("kind", JSON_WRITES)
def test_a_write_that_fails_leaves_nothing_behind(
    store: mls.Store, monkeypatch: pytest.MonkeyPatch, new_files: str, kind: str, broken: str
) -> None:
    task = new_task(store, new_run(store))
    before = contents(Path(store.folder))
    calls_until_then = 3 if kind in ("metadata", "artifacts") else 1
    calls = iter(range(1, 100))

    def failing_once(works: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(calls) != calls_until_then:
                return works(*arguments, **options)
            if broken == "half a write":
                return works(arguments[0], arguments[1][:10])
            raise OSError(errno.ENOSPC, "full")

        return call

    with monkeypatch.context() as patch:
        for works in (os.rename, os.link) if broken == "name" else (os.write,):
            patch.setattr(os, works.__name__, failing_once(works))
        with pytest.raises(OSError):
            WRITES[kind](store, task)
    assert contents(Path(store.folder)) == before
    WRITES[kind](store, task)
    assert contents(Path(store.folder)) != before


def test_a_task_is_made_once_also_if_its_run_cannot_have_its_heartbeat(store: mls.Store) -> None:
    run = new_run(store)
    step = new_task(store, run)[:3]
    meta, elsewhere = folder_of(store, run) / "_meta", folder_of(store, ("elsewhere",))
    meta.rename(elsewhere)
    meta.symlink_to(elsewhere)
    made = store.create_task(step, None, labels(), has_heartbeats=True)
    assert [task["task_id"] for task in store.tasks(step)] == [made["task_id"], 1]
    assert os.listdir(elsewhere) == ["_self.json"]


def test_what_was_replaced_stays_when_a_later_write_fails(
    store: mls.Store, monkeypatch: pytest.MonkeyPatch, new_files: str
) -> None:
    task = new_task(store, new_run(store))
    broken = [folder_of(store, task) / "_meta" / f"0_artifact_{name}.json" for name in "ac"]
    for path in broken:
        path.write_text("{")
    rename, renamed = os.rename, []

    def fails_at_last(source: str, target: str, **folders: int) -> None:
        renamed.append(target)
        if target == broken[1].name:
            raise OSError(errno.ENOSPC, "full")
        rename(source, target, **folders)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fails_at_last)
        with pytest.raises(OSError):
            store.create_artifacts(task, list(map(artifact_to_store, "abc")))
    assert [path.exists() for path in broken] == [True, True]
    assert store.artifact(task, "a") is not None
    store.create_artifacts(task, list(map(artifact_to_store, "abc")))
    assert sorted(a["name"] for a in store.artifacts(task)) == ["a", "b", "c"]


def test_a_clock_that_was_set_back_between_two_services_costs_no_record(
    store: mls.Store, project: Path, monkeypatch: pytest.MonkeyPatch, new_files: str
) -> None:
    task = new_task(store, new_run(store))
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now)
    for number, service in enumerate([store, mls.Store(str(project))]):
        service.create_metadata(task, [metadatum_to_store("f", f"{number}{n}") for n in range(2)])
    assert sorted(m["value"] for m in store.metadata(task)) == ["00", "01", "10", "11"]
    assert len({m["id"] for m in store.metadata(task)}) == 4


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize("linked", ["flow", "run", "step", "task", "_meta"])
def test_nothing_is_written_where_a_symbolic_link_leads(
    store: mls.Store, tmp_path: Path, linked: str, kind: str
) -> None:
    task = new_task(store, new_run(store))
    depth = ["flow", "run", "step", "task", "_meta"].index(linked) + 1
    inside = folder_of(store, (*task, "_meta")[:depth])
    outside = tmp_path / "outside"
    inside.rename(outside)
    inside.symlink_to(outside)
    before = contents(outside)
    assert store.task(task) is not None  # to read is fine
    with contextlib.suppress(mls.NotStorable):
        WRITES[kind](store, task)
    assert contents(outside) == before


def test_records_are_private_to_their_user(store: mls.Store) -> None:
    task = new_task(store, new_run(store))
    mask = os.umask(0)
    try:
        for kind in WRITES:
            WRITES[kind](store, task)
    finally:
        os.umask(mask)
    for path in all_paths(Path(store.folder)):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_temporary_files_of_a_killed_service_are_ignored(store: mls.Store, local: Any) -> None:
    task = new_task(store, new_run(store))
    store.create_metadata(task, [metadatum_to_store("name")])
    for depth in range(1, 5):
        folder = Path(store.folder, *task[:depth], mls.META_DIR)
        (folder / f"{mls.TEMPORARY}17").write_text('{"half')
    store.create_artifacts(task, [artifact_to_store("x")])
    assert_both_tell_the_same(store, local)


def test_a_link_in_the_way_of_a_record_is_not_followed(
    api: Api, project: Path, tmp_path: Path
) -> None:
    task = api.new_task_of_its_own()
    folder = project.joinpath(".metaflow", *task.split("/")[2::2])
    outside = tmp_path / "outside"
    for path in (
        project / ".metaflow" / "Other",
        folder.parent / "2",
        folder / "_meta" / "0_artifact_name.json",
        folder / "_meta" / "_heartbeat",
    ):
        path.symlink_to(outside)
    assert api.post("/flows/Other").status == 400
    assert api.new_task(task.rsplit("/tasks/", 1)[0]).endswith("/3")
    # A record that cannot be read counts as not there: the link itself is replaced.
    assert api.post(f"{task}/artifact", [artifact("name")]).json == {"artifacts_created": 1}
    api.post(f"{task}/heartbeat")
    assert not outside.exists()


def test_a_datastore_may_be_a_link(project: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (project / ".metaflow").symlink_to(tmp_path / "elsewhere")
    with serve(mls.Store(str(project))) as client:
        client.new_task_of_its_own()
    assert (tmp_path / "elsewhere" / "Flow").is_dir()


@pytest.mark.parametrize("content", [b"", b"[]"])
def test_an_unreadable_record_is_replaced_by_a_new_one(
    api: Api, project: Path, content: bytes
) -> None:
    task = api.new_task(api.new_step(api.new_run(api.new_flow(), run_number="run-1")), task_id="t")
    assert api.post(f"{task}/artifact", [artifact("x")]).json == {"artifacts_created": 1}
    flow, run, step = task.split("/runs")[0], task.split("/steps")[0], task.split("/tasks")[0]
    made = [
        (flow, flow, {}),
        (run, f"{flow}/run", {"run_number": "run-1"}),
        (step, f"{step}/step", {}),
        (task, f"{step}/task", {"task_id": "t"}),
    ]
    for path, way, body in made:
        (project / ".metaflow").joinpath(*ids_in(path), "_meta", "_self.json").write_bytes(content)
        assert api.get(path).status == 404
        assert api.post(way, body).status == 200
        assert (api.get(path).status, api.post(way, body).status) == (200, 409)
    (file,) = project.rglob("0_artifact_x.json")
    file.write_bytes(content)
    assert api.get(f"{task}/artifacts").json == []
    assert api.post(f"{task}/artifact", [artifact("x")]).json == {"artifacts_created": 1}
    assert [a["name"] for a in api.get(f"{task}/artifacts").json] == ["x"]
    assert [r["run_number"] for r in api.get(f"{flow}/runs").json] == ["run-1"]
    assert by_local_mode(project, "run", "Flow")


def test_a_folder_in_place_of_a_record_is_reported(api: Api, project: Path) -> None:
    (project / ".metaflow" / "Flow" / "_meta" / "_self.json").mkdir(parents=True)
    refused = api.post("/flows/Flow")
    assert refused.status in range(400, 500)
    assert "is a folder" in refused.json["message"]


def test_tags_are_flushed_to_disk_before_they_replace_others(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the order of the system calls; what a crash leaves then is the file system's promise."""
    run = api.new_run(api.new_flow())
    calls: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        calls.append(("fsync", "folder" if is_folder else "file"))
        fsync(descriptor)

    def note_rename(source: str, target: str, **folders: int) -> None:
        calls.append(("rename", os.path.basename(target)))
        rename(source, target, **folders)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    assert api.patch(f"{run}/tag/mutate", {"tags_to_add": ["new"]}).status == 200
    assert calls == [("fsync", "file"), ("rename", "_self.json"), ("fsync", "folder")]
    calls.clear()
    api.new_run("/flows/Flow")
    assert "fsync" not in [call for call, _ in calls]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("of", ["the file", "its folder"])
def test_a_record_without_read_permission_is_skipped_until_it_has_it(
    api: Api, project: Path, of: str
) -> None:
    flow = api.new_flow()
    api.new_run(flow)
    spoiled = project.joinpath(".metaflow", *api.new_run(flow).split("/")[2::2], "_meta")
    if of == "the file":
        spoiled /= "_self.json"
        os.utime(spoiled)  # or what is in memory of it would do
    mode = spoiled.stat().st_mode
    spoiled.chmod(0)
    reply = api.get(f"{flow}/runs")
    assert (reply.status, len(reply.json)) == (200, 1)
    spoiled.chmod(mode)
    assert len(api.get(f"{flow}/runs").json) == 2


def test_a_run_after_one_of_a_wrong_clock_shows_its_own_time(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / ".metaflow").mkdir()
    now, future = time.time_ns(), 2_208_988_800 * 10**9  # 2040
    monkeypatch.setattr(time, "time_ns", lambda: future)
    with serve(mls.Store(str(project))) as client:
        wrong = client.post(f"{client.new_flow()}/run").json
    monkeypatch.setattr(time, "time_ns", lambda: now)
    own_store = mls.Store(str(project))
    with serve(own_store) as client:
        right = [client.post("/flows/Flow/run").json for _ in range(3)]
        client.new_run(client.new_flow("Other"))
    ids = [run["run_number"] for run in (wrong, *right)]
    assert ids == sorted(set(ids))
    assert [run["ts_epoch"] // 10**6 for run in (wrong, *right)] == [
        moment // 10**12 for moment in (future, now, now, now)
    ]
    rows = list(mls.Model(own_store).runs.newest_first())
    assert [row["ts_epoch"] for row in rows] == sorted((r["ts_epoch"] for r in rows), reverse=True)
    assert {r["run_number"]: r["ts_epoch"] for r in rows if r["flow_id"] == "Flow"} == {
        run["run_number"]: run["ts_epoch"] for run in (wrong, *right)
    }
    listed = [run["run_number"] for run in own_store.runs(("Flow",))]
    assert listed == [ids[0], *ids[:0:-1]]


def test_later_pages_do_not_list_all_tasks_again(
    store: mls.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = new_task(store, new_run(store))
    store.create_metadata(task, [mls.NewMetadatum(n, n, "t", labels()) for n in "abc"])
    newest = next(store.metadata_below(task[:2]))
    looked: list[object] = []
    list_files = mls.Store._list_task_files
    monkeypatch.setattr(
        mls.Store, "_list_task_files", lambda *a: looked.append(a) or list_files(*a)
    )
    place = mls.metadatum_sort_key(newest)
    assert [m["field_name"] for m in store.metadata_below(task[:2], place)] == ["b", "a"]
    assert not looked
    monkeypatch.setattr(mls, "PAGING_SECONDS", 0.0)
    assert [m["field_name"] for m in store.metadata_below(task[:2], place)] == ["b", "a"]
    assert looked


def test_a_first_page_has_the_newest_metadata(store: mls.Store) -> None:
    task = new_task(store, new_run(store))
    for count in range(3):
        store.create_metadata(task, [mls.NewMetadatum("f", str(count), "t", labels())])
        assert [m["value"] for m in store.metadata_below(task[:2])] == list("210")[-count - 1 :]


# ==================================================================================================
# Datastore
# ==================================================================================================

# Files of the datastore are opened without leaving it, logs are merged, and values are shown
# without being unpickled. In this process, on files that a test writes; only root can try foreign
# owners.


# -- files -----------------------------------------------------------------------------------------


@pytest.fixture
def datastore(tmp_path: Path) -> Path:
    """A local datastore with a file, beside a secret that is not in it."""
    root = tmp_path / ".metaflow"
    (root / "Flow").mkdir(parents=True)
    (root / "Flow" / "file").write_text("here")
    (tmp_path / "secret").write_text("secret")
    return root


def content_of(root: Path | str, *names: str) -> str | None:
    """What is in a file of a datastore, None where there is none."""
    opener = mls.FileOpener(str(root))
    with contextlib.suppress(FileNotFoundError), opener.open_file(str(root), *names) as file:
        return mls.read_content(file, 1000).decode()
    return None


def test_a_datastore_is_left_neither_by_names_nor_by_links_to_files(datastore: Path) -> None:
    (datastore / "Flow" / "link").symlink_to(datastore.parent / "secret")
    (datastore / "Flow" / "inner").symlink_to("file")
    assert content_of(datastore, "Flow", "file") == "here"
    for names in (("Flow", "link"), ("Flow", "inner"), ("..", "secret"), ("Flow", "../../secret")):
        assert content_of(datastore, *names) is None
    for names in (
        ("Flow", "\0"),
        ("Flow", "\ud800"),
        ("Flow", "x" * 300),
        ("Flow",),
        ("None", "x"),
    ):
        assert content_of(datastore, *names) is None


def test_a_datastore_that_is_gone_is_looked_for_in_the_served_root(datastore: Path) -> None:
    opener = mls.FileOpener(str(datastore))
    moved = datastore.parent / "moved"
    with opener.open_file(str(moved / ".metaflow"), "Flow", "file") as file:
        assert file.read() == b"here"
    assert opener.stat_folder(str(moved / ".metaflow"), "Flow")
    for root in (moved, moved / ".metaflowconfig", moved / ".metaflow_spin"):
        with pytest.raises(FileNotFoundError):
            opener.open_file(str(root), "Flow", "file")
    (moved / ".metaflow").mkdir(parents=True)
    with pytest.raises(FileNotFoundError):
        opener.open_file(str(moved / ".metaflow"), "Flow", "file")


@pytest.mark.parametrize(
    "root", ["", "relative/.metaflow", "/", "/etc", "{root}\0", "{root}config"]
)
def test_a_folder_not_named_as_a_datastore_is_not_opened(datastore: Path, root: str) -> None:
    (datastore.parent / ".metaflowconfig").mkdir()
    (datastore.parent / ".metaflowconfig" / "passwd").write_text("secret")
    assert content_of(root.format(root=datastore), "passwd") is None


def test_links_to_folders_that_the_owner_has_made_are_followed(tmp_path: Path) -> None:
    other_disk, own_project = tmp_path / "disk", tmp_path / "project"
    for folder in (other_disk / ".metaflow" / "Flow", other_disk / "data", own_project):
        folder.mkdir(parents=True)
    (own_project / ".metaflow").symlink_to(other_disk / ".metaflow")
    (other_disk / ".metaflow" / "Flow" / "data").symlink_to("../../data")
    (other_disk / "data" / "blob").write_text("far away")
    assert content_of(own_project / ".metaflow", "Flow", "data", "blob") == "far away"


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")


@needs_root
@pytest.mark.parametrize("given_away", [".metaflow", ".metaflow/Flow", ".metaflow/Flow/file"])
def test_files_of_another_user_are_not_found(datastore: Path, given_away: str) -> None:
    with mls.FileOpener(str(datastore.parent)).open_file(str(datastore), "Flow", "file"):
        os.chown(datastore.parent / given_away, 1000, 1000)
    with pytest.raises(FileNotFoundError):
        mls.FileOpener(str(datastore.parent)).open_file(str(datastore), "Flow", "file")


@needs_root
def test_a_root_of_another_user_that_is_served_is_read(datastore: Path) -> None:
    for path in (datastore, datastore / "Flow", datastore / "Flow" / "file"):
        os.chown(path, 1000, 1000)
    assert content_of(datastore, "Flow", "file") == "here"


@needs_root
def test_a_link_of_another_user_leads_to_nothing_of_ours(datastore: Path) -> None:
    (datastore.parent / "ours").mkdir()
    (datastore.parent / "ours" / "file").write_text("secret")
    (datastore / "Flow" / "link").symlink_to(datastore.parent / "ours")
    assert content_of(datastore, "Flow", "link", "file") == "secret"
    os.chown(datastore / "Flow" / "link", 1000, 1000, follow_symlinks=False)
    os.chown(datastore, 1000, 1000)
    os.chown(datastore / "Flow", 1000, 1000)
    assert content_of(datastore, "Flow", "link", "file") is None


@needs_root
def test_a_root_that_is_a_link_of_another_user_leads_to_nothing_of_ours(datastore: Path) -> None:
    theirs = datastore.parent / "theirs"
    theirs.mkdir()
    (theirs / ".metaflow").symlink_to(datastore)
    assert content_of(theirs / ".metaflow", "Flow", "file") == "here"
    os.chown(theirs / ".metaflow", 1000, 1000, follow_symlinks=False)
    assert content_of(theirs / ".metaflow", "Flow", "file") is None
    os.chown(theirs / ".metaflow", 0, 0, follow_symlinks=False)
    os.chown(theirs, 1000, 1000)  # who may exchange the link while it is read
    assert content_of(theirs / ".metaflow", "Flow", "file") is None


@needs_root
def test_a_link_of_ours_may_lead_to_a_folder_of_any_owner_that_is_trusted(datastore: Path) -> None:
    (datastore.parent / "disk").mkdir()
    (datastore.parent / "disk" / "blob").write_text("far away")
    (datastore / "Flow" / "data").symlink_to(datastore.parent / "disk")
    for path in (datastore, datastore.parent / "disk"):
        os.chown(path, 1000, 1000)
    assert content_of(datastore, "Flow", "data", "blob") == "far away"


def test_in_a_folder_that_others_may_write_to_no_link_of_any_kind_is_followed(
    datastore: Path,
) -> None:
    (datastore.parent / "disk").mkdir()
    (datastore.parent / "disk" / "blob").write_text("far away")
    os.link(datastore.parent / "secret", datastore / "Flow" / "hard")
    (datastore / "Flow" / "soft").symlink_to(datastore.parent / "disk")
    for mode, hard, soft in ((0o755, "secret", "far away"), (0o777, None, None)):
        os.chmod(datastore / "Flow", mode)
        assert content_of(datastore, "Flow", "hard") == hard
        assert content_of(datastore, "Flow", "soft", "blob") == soft
        assert content_of(datastore, "Flow", "file") == "here"


def test_a_group_counts_as_others_unless_it_is_the_owners_own() -> None:
    def folder(mode: int, gid: int) -> os.stat_result:
        return os.stat_result((stat.S_IFDIR | mode, 1, 1, 2, 1000, gid, 0, 0, 0, 0))

    assert not mls.is_writable_by_others(folder(0o755, 100))
    assert not mls.is_writable_by_others(folder(0o775, 1000))
    assert mls.is_writable_by_others(folder(0o775, 100))
    assert mls.is_writable_by_others(folder(0o757, 1000))


def test_a_file_that_flips_between_itself_and_a_link_tells_no_secret(datastore: Path) -> None:
    folder, is_over = datastore / "Flow", threading.Event()

    def flip() -> None:
        for number in itertools.count():
            other = folder / f"other{number % 2}"
            if number % 2:
                other.symlink_to(datastore.parent / "secret")
            else:
                other.write_text("here")
            os.replace(other, folder / "file")
            if is_over.is_set():
                return

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        found = {content_of(datastore, "Flow", "file") for _ in range(3000)}
    finally:
        is_over.set()
        thread.join()
    assert "here" in found and found <= {"here", None}


def test_only_regular_files_are_read(datastore: Path) -> None:
    os.mkfifo(datastore / "Flow" / "pipe")
    before = len(os.listdir("/dev/fd"))
    assert content_of(datastore, "Flow", "pipe") is None
    assert content_of(datastore, "Flow") is None
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_read_permission_is_not_found(datastore: Path) -> None:
    os.chmod(datastore / "Flow" / "file", 0)
    assert content_of(datastore, "Flow", "file") is None


# -- logs ------------------------------------------------------------------------------------------


def log_line(text: str, second: int, source: str = "task") -> bytes:
    stamp = f"2026-01-01T00:00:{second:02}.000000Z"
    return f"[MFLOG|0|{stamp}|{source}|an-id]{text}\n".encode()


def test_the_lines_of_all_files_of_a_log_are_merged_by_time() -> None:
    task = log_line("second", 2) + log_line("fourth", 4)
    runtime = log_line("first", 1, "runtime") + log_line("third", 3, "runtime")
    lines = mls.merge_logs([task, runtime])
    assert [line["line"] for line in lines] == ["first", "second", "third", "fourth"]
    assert [line["row"] for line in lines] == [0, 1, 2, 3]
    assert lines[0]["timestamp"] == 1767225601000, "times of logs are in UTC"


def test_a_line_without_a_time_stays_behind_the_one_that_it_follows() -> None:
    lines = mls.merge_logs([log_line("one", 1) + b"[MFLOG|oops\n\xff\n" + log_line("two", 2)])
    assert [line["line"] for line in lines] == ["one", "[MFLOG|oops", "\ufffd", "two"]
    assert lines[1]["timestamp"] is None


@given(st.lists(st.binary(max_size=200), max_size=3))
@settings(deadline=None, max_examples=50)
def test_any_bytes_are_a_log(files: list[bytes]) -> None:
    for line in mls.merge_logs(files):
        assert "\n" not in line["line"]


def test_of_a_log_of_many_lines_the_last_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mls, "MOST_LOG_LINES", 3)
    lines = mls.merge_logs([b"".join(log_line(str(n), n) for n in range(9))])
    assert [line["line"] for line in lines] in (["6", "7", "8"], ["7", "8"])


# -- values ----------------------------------------------------------------------------------------


def format_pickled(value: object, protocol: int = 4) -> str:
    return mls.format_value(mls.PickleReader().read(pickle.dumps(value, protocol)))


# What numpy and pandas have pickled, packed, so that neither need be installed.
PICKLED_ELSEWHERE: dict[str, tuple[str, str]] = {
    "scalar of numpy 2, pandas 3": (
        "scalar",
        "eNprYJkawwABPWJ5pbkFlXrxyflFqXq5pTklmYlFRYmVPWzFyYk5iUWTe1jBCnpYU0oqC1In9zClWXR2tAdpeDP3"
        "MNr4+fl5/QcCMOHNUJLkzAExlsuhLUgPAEdGJTU=",
    ),
    "array of numpy 2, pandas 3": (
        "array",
        "eNprYJk6gwECesTySnMLKvXik/OLUvVyS3NKMhOLihIre3jii1KT8/OKS4pKk0sm97CClU3pYc9LActP9mZodWZM"
        "ag/S8Gb0ZvJmastg6GFNKaksSJ3cw5Rp0dkBkmHuYbTx8/Pz+g8EYMKboSSpw1mBEWo5M5RmgtIsULokSQ8A2Dsx"
        "cw==",
    ),
    "frame of numpy 2, pandas 3": (
        "frame",
        "eNp9U0Fv0zAUTtKkW7uOHZDGDgiu5ZIzB6SxrQKxiCCV82Q5qVtHS5wodrRmYhoc1m7SuzX8UG67wXOSUooQjhTb"
        "eZ+/930vz1/t77xj1AO6GRUTKivojaii73KasNWrbzdDsEkyy+FFE3bDNGduJBTLBY2lm1BBZyyXMDiN0/DyY7Nd"
        "wWELJ3EUyA0eDkghsii8jBkJ9IFVBYeiSLLSJTVzUsQqonlOSxiQnIWpkCovQoU4p8ZVsIPEGrCqPOPuzAyq5Xjo"
        "mfh0FrwDzkSVGUO4Fb1+uNehDphvKt/3z3/iqF+eoYKHsyOzcW5Y7dxWAoOwGxQRChESHBlHIdO5dI7l2LOWY25y"
        "i9uYnTt/5O6CNV2n5Dv/StjQPx43s/223d+qgO8ih7Xhh6db9av9SnhOSFbONxX0Ryc6cErDSzZBy/vtoRa+91nl"
        "kZidNMU6f9n9YftIbqwDo7ZS3axUPBXV+9vHRtFi/Je/zp1296l2V9UV/bLt7xj9XQzBnINZgnnNVLDQniyvs/a0"
        "xPDRdg9N2JxJN6CSQZ8IdkU+6E+rChU6zVJ33wS7kfd4/7f+PT74r9L9WgkFMwAzrJWALbCbK79A+BNk74+pmLF1"
        "Cn7g419WNFeeAbZUaYYGcWaZZ+IJthjjFcBSQU9LmeqLAT2SMEX1/gIcqlQub6BLpjGd4eIZjeP0SpJJkWHvUMVI"
        "TAMWy3tZBO4vMUs1rw==",
    ),
    "series of numpy 2, pandas 3": (
        "series",
        "eNpVUT2P1DAQTbKb3N6KAlHAVdShiTiJggIJxFVgkSJXr6xJMhdHOM7KHxxbrATFsXfSdMn9T/4BOAkNLuzxG4/n"
        "vTc/1o+rKJgXJXtQNZiRkmvULZrh1c9jSmveNZpeLrms6jVmrbKoFUiTdaCgQW3o2XWrGokfZV99/bKAvjzdjXTx"
        "f2WN39FkJRikLVd4yz9N0DCKgLYFqAb/3afOCjocc4qNBW1HFtDa2H4/smgK0Aeh+1XAjp4r1+0PGZ9bdE7aFrSG"
        "Az3hGqteGatdZQeK52cjnXk+U35gwd1VWJ6KMWUhi+7EhuLaHvY4UHTz9uH+VKRsReG7PM8///Fr3lhgy4erp4tl"
        "v98vZ/DBlrATkVgdU7HORcwCkbBInC0Mj5S8zi7fZJeTKPD6RUhJOVlldh5KvoF0Hjynjbeae9zQpnSt16GMVy/b"
        "Cj1XFrHwVDhwxpZ+Kp4oJWYeFJ3zDi3UYL0ZMZ9tA4rBWm18b34jofHBC5CyvzW8dnv/JVjkEkqU5t6ILYXGldlf"
        "Om6+AQ==",
    ),
    "scalar of numpy 1, pandas 1": (
        "scalar",
        "eNprYJkazQABPaJ5pbkFlXrJ+UWpermlOSWZiUVFiZU9bMXJiTmJRZN7WMHyPawpJZUFqZN7mNIsOjvagzS8mXsY"
        "bfz8/Lz+AwGY8GYoSXLmgJjK5dAWpAcAIt4k1A==",
    ),
    "array of numpy 1, pandas 1": (
        "array",
        "eNprYJk6nQECekTzSnMLKvWS84tS9XJLc0oyE4uKEit7eOKLUpPz84pLikqTSyb3sIJVTelhz0sBy0/2Zmh1Zkxq"
        "D9LwZvRm8mZqy2DoYU0pqSxIndzDlGnR2QGSYe5htPHz8/P6DwRgwpuhJKnDWYERajczlGaC0ixQuiRJDwCc2zES",
    ),
    "frame of numpy 1, pandas 1": (
        "frame",
        "eNqFUk1v1DAQjfPRdpdKiANQLpyXS84ckIooQoKIIOVeWXbWu47qeCPbUbuICjh0t5XmtuFvcuYG42RXtKgSjuSZ"
        "sV/eG8/Mt/jHzzDoFzxqmJ4ym5YLI9KZYbWA0Vvm2Dvvbl58v5xATOu5gee3gZV2wmimbFozzebCWDh8oxbl2cch"
        "3MCTLZyqitu/eHhIW91U5ZkSlPsfNh081m3dLAfiulWuYsawJRxSI8qFts60pUNY0sM62EdeD9h0WXB1Qni3LiYZ"
        "wS9ayRCSqVs2AuFh9fLm2l9FQF51eZ5/+I2r37LA8ZuTIzKUINiWIoi21nE44G2FiWgLiVVVKbyW11gXWbguZCCJ"
        "jFBdxre0EwhnO0m5d5/gQP/reLDx62381XG5jxzhf/k/9fxd/6YvdxWOUeF0AuQCyBLIZ9Fzhlm041zj5dHdFk7F"
        "hbApZ1Z0MKZanNP3/mzTyREkg+u7P8Vp+Cef6Eoe9GoMCAdSohrEGgemy9tVIcfw7D4lw/RcwLjwZkcvH+RYYseM"
        "ywKIrVs0+Da0oskIUolVgeOHHYWRT2M7n7QWjvn4FBLmnLGXsEdnis3RecqUWpxbOm0bbBxzgirGhbLXtuXpH2IR"
        "CuE=",
    ),
    "series of numpy 1, pandas 1": (
        "series",
        "eNptUbGO1DAQTbKb3IIo0EkIaBBlaCJOoqBAAnEVWKTI1atokviSCMeJPDbHFitBceydNF3Cf/IHMNlcARJTeEbP"
        "b+z3Zr6tfz4PvGPQ6QC6AkzK3sgEpWklUnRxzOOL7/uY1nlXG3r2N63VVhoNCpMONNTSIJ1etLpW8r3qy8+fFpDb"
        "4+1ET/7trORXiUkBKOl+ruVV/mGGxome/o9nQNdMzOZ0R5wlaejklFKIFoydhEdrtP0wiWAuJBe++5HBlh5p1w27"
        "5cnOKduCMbCjB7mRZa/RGlfakcIja6IT/n++H4V3fe4Xh2yKhS+C6+aEwsruBjlScPn69uaQxWJF/ps0TT/+5jge"
        "wrPF7fnDZaq/3i7Ze2cL2DZ+E+zjZpU2a+E1oQiaaBG4p+hlcvYqOZs9AfttPIqKeYS4ZSj6AsoxuKENryBnHGlT"
        "uJZ9aGTzqi0laxWB8A+ZA4e24G2xUIruFnkv76SFCiyLWAGFYK1B/jW/VFBz8RiU6q8wr9zAj4GVuYJCKrzBhg2i"
        "K5I/1UHI4A==",
    ),
}

SHOWN_AS = {
    "scalar": "3.25",
    "array": "array([[1, 2], [3, 4]], dtype=int64)",
    "series": "Series of 2 rows\nfloat64\n1.0\n2.0",
    "frame": "DataFrame of 3 rows and 3 columns\na: int64, b: float64, c: {text}\n"
    "1  1.5  x\n2  2.5  y\n3  nan  z",
}


@pytest.mark.parametrize("name", PICKLED_ELSEWHERE)
def test_arrays_and_tables_are_shown_for_what_they_hold(name: str) -> None:
    kind, packed = PICKLED_ELSEWHERE[name]
    content = zlib.decompress(base64.b64decode(packed))
    text = "StringDtype" if "pandas 3" in name else "object"
    assert mls.format_value(mls.PickleReader().read(content)) == SHOWN_AS[kind].format(text=text)


class Colour(enum.Enum):
    RED = "red"


@dataclass
class Point:
    x: int
    tags: list[str]


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Point(1, ["a"]), f"<{__name__}.Point x=1 tags=['a']>"),
        (Path("/a/b"), "/a/b"),
        (Decimal("1.50"), "1.50"),
        (datetime(2024, 1, 2, tzinfo=timezone.utc), "2024-01-02 00:00:00+00:00"),
        (timedelta(days=1, seconds=2), "1 day, 0:00:02"),
        (Counter("aab"), "{'a': 2, 'b': 1}"),
        (b"\x89PNG\r\n\x1a\n" + b"0" * 200, None),
        (b"x" * 5000, None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_objects_of_the_standard_library_are_shown_for_what_they_are(
    value: object, text: str | None, protocol: int
) -> None:
    if isinstance(value, bytes):
        kind = "image/png" if value.startswith(b"\x89PNG") else "application/octet-stream"
        assert format_pickled(value, protocol).startswith(f"<{len(value)} bytes, {kind}")
    else:
        assert format_pickled(value, protocol) == text


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_member_of_an_enum_is_shown_by_name_or_value(protocol: int) -> None:
    assert format_pickled(Colour.RED, protocol) in (
        f"<{__name__}.Colour('red')>",
        f"<{__name__}.Colour.RED>",
    )


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()


@given(
    st.recursive(
        SCALARS,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.tuples(inner)
            | st.tuples(inner, inner, inner, inner)
            | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
        ),
        max_leaves=10,
    ),
    st.integers(2, 5),
)
@settings(deadline=None, max_examples=60)
def test_a_value_is_shown_as_str_would_show_it(value: object, protocol: int) -> None:
    assert format_pickled(value, protocol) == str(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({1}, "{1}"),
        (set(), "set()"),
        (OrderedDict(a=1), "{'a': 1}"),
        (datetime(2026, 1, 2, 3, 4, 5), "2026-01-02 03:04:05"),
        (datetime(2026, 1, 2).date(), "2026-01-02"),
        (threading.Thread, "<class threading.Thread>"),
        (SimpleNamespace(a=1), "<types.SimpleNamespace a=1>"),
    ],
)
def test_values_of_other_types_are_shown_as_what_they_are(value: object, text: str) -> None:
    assert format_pickled(value) == text


def test_an_integer_whose_digits_nobody_can_wait_for_is_only_measured() -> None:
    assert format_pickled(2**20000) == "<integer of 20001 bits>"


class Bomb:
    """What runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", range(6))
def test_reading_a_pickle_runs_nothing(tmp_path: Path, protocol: int) -> None:
    pickled = pickle.dumps([Bomb(tmp_path / "boom")], protocol)
    value = mls.PickleReader().read(pickled)
    assert "system" in mls.format_value(value)
    assert not (tmp_path / "boom").exists()
    pickle.loads(pickled)
    assert (tmp_path / "boom").exists(), "it is a bomb"


def test_a_recursive_or_huge_value_is_cut() -> None:
    itself: list[Any] = []
    itself.append(itself)
    assert len(format_pickled(itself)) < 1000
    laughs: Any = ["ha"]
    for _ in range(40):
        laughs = [laughs, laughs]
    assert len(format_pickled(laughs)) <= mls.LONGEST_TEXT + 3


def test_a_small_pickle_becomes_no_large_json() -> None:
    value = mls.PickleReader().read(pickle.dumps(["x" * 100_000] * 10_000))
    with pytest.raises(ValueError, match="too large"):
        mls.to_json(value)
    plain = mls.PickleReader().read(pickle.dumps({"a": (1, None, {2}), 3: 1.5}))
    assert mls.to_json(plain) == {"a": [1, None, [2]], "3": 1.5}


@given(st.binary(max_size=100))
@settings(deadline=None, max_examples=200)
def test_any_bytes_are_a_pickle_or_refused(noise: bytes) -> None:
    for beginning in (b"", b"\x80\x04", pickle.dumps({"a": [1, (2,)]})[:-1]):
        with contextlib.suppress(ValueError):
            mls.format_value(mls.PickleReader().read(beginning + noise))


def test_a_gzip_bomb_is_not_blown_up() -> None:
    with pytest.raises(mls.TooLarge):
        mls.decompress(gzip.compress(bytes(50_000_000)), 1000)


# -- pickles that are hostile or make no sense -----------------------------------------------------


def nested_names(depth: int) -> bytes:
    """A pickle that names a class by tuples, each of which has the one before twice."""
    pairs = b"".join(b"h%ch%c\x86\x94" % (n, n) for n in range(depth))
    return b"]\x94" + pairs + b"\x8c\x01a\x93."


# Operations that push a value, to be put together. The parameters are such operations as well.


def push_text(text: bytes) -> bytes:
    return b"U%c%b" % (len(text), text)


def push_list(items: bytes) -> bytes:
    return b"(%bl" % items


def push_array(
    shape: bytes, code: bytes, content: bytes, state: bytes = b"", by: bytes = b"N"
) -> bytes:
    """An array of numpy; `by`: whether its items are stored by columns."""
    dtype = b"cnumpy\ndtype\n(%btR%b" % (push_text(code), state)
    made = b"cnumpy.core.multiarray\n_reconstruct\n(NNNtR"
    return made + b"(K\x01%b%b%b%btb" % (shape, dtype, by, content)


def push_index(items: bytes, count: int = 1) -> bytes:
    """The labels of a table of pandas."""
    data = push_array(b"K%c\x85" % count, b"O8", push_list(items))
    return b"cpandas\nIndex\n(N}%b%bstR" % (push_text(b"data"), data)


def push_range(stop: bytes) -> bytes:
    """The numbers to that one, as the labels of a table of pandas."""
    fields = (b"start", b"K\x00"), (b"stop", stop), (b"step", b"K\x01")
    items = b"".join(push_text(name) + value + b"s" for name, value in fields)
    return b"cpandas\nRangeIndex\n(N}%btR" % items


def push_frame(columns: bytes, rows: bytes, blocks: bytes = b"") -> bytes:
    """A DataFrame of pandas."""
    manager = b"cpandas\nManager\n(%b%btR" % (push_list(blocks), push_list(columns + rows))
    return b"cpandas\nDataFrame\n)R}%b%bsb" % (push_text(b"_mgr"), manager)


HUGE = b"\x8a\x10" + bytes(15) + b"\x01"
NO_UNIT = b"(%btb" % (b"N" * 7 + b"K\x01\x85")


@pytest.mark.parametrize(
    "pickled",
    [
        nested_names(60),
        b"}K\x01a.",  # appends to a dict
        b"\x8f(K\x01K\x02u.",  # sets items of a set
        b"cbuiltins\nset\n\x94(" + b"N" * 50000 + b"l\x94]" + b"h\x00h\x01\x85Ra" * 10000 + b".",
        b"c_codecs\nencode\n\x94\x8d" + (100_000).to_bytes(8, "little") + b"a" * 100_000 + b"\x94]"
        + b"h\x00h\x01\x85Ra" * 10000 + b".",
        push_array(b"K\x01\x85", b"", b"N") + b".",
        push_array(b"K\x01\x85", b"M8", b"C\x08" + bytes(8), NO_UNIT) + b".",
        push_array(b"K\x00\x8a\x08" + bytes(7) + b"\x40\x86", b"f8", b"C\x00", by=b"\x88") + b".",
        push_frame(push_index(b"N"), push_range(HUGE)) + b".",
        push_frame(push_index(b"]" * 5000 + b"a" * 4999), push_range(b"K\x01")) + b".",
        push_frame(b"cpandas\nIndex\n(N})" + b"\x85" * 190_000 + b"NstR", push_range(b"K\x01"))
        + b".",
    ],
    ids=[
        "nested names", "append to a dict", "items of a set", "copied sets", "copied bytes",
        "array of no type", "times of no unit", "wide array of no rows", "frame of too many rows",
        "nested label", "nested key",
    ],
)  # fmt: skip
def test_a_hostile_pickle_is_refused_or_cut(pickled: bytes) -> None:
    with contextlib.suppress(ValueError):
        value = mls.PickleReader().read(pickled)
        assert len(mls.format_value(value)) <= mls.LONGEST_TEXT + 3
        mls.to_json(value)


@pytest.mark.parametrize("called", [b"ccopyreg\n__newobj__\n", b"cpathlib\nPath\n"])
def test_calls_of_the_same_long_arguments_are_counted(called: bytes) -> None:
    arguments = b"(c__main__\nPoint\n" + b"N" * 2_000 + b"t\x94"
    pickled = called + b"\x94" + arguments + b"]" + b"h\x00h\x01Ra" * 3_000 + b"."
    with pytest.raises(mls.TooLarge):
        mls.PickleReader().read(pickled)


def test_constructors_of_constructors_do_not_copy_their_arguments_again_and_again() -> None:
    pickled = b"ccopyreg\n__newobj__\n\x94(" + b"h\x00" * 20_000 + b"tR."
    tracemalloc.start()
    try:
        mls.PickleReader().read(pickled)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "shape", [b"(" + b"K\x01" * 65 + b"t", b"J\xff\xff\xff\xff\x85", HUGE + b"\x85"]
)
def test_an_array_of_a_shape_that_numpy_does_not_have_is_shown_as_an_object(shape: bytes) -> None:
    value = mls.PickleReader().read(push_array(shape, b"f8", b"C\x08" + bytes(8)) + b".")
    assert mls.format_value(value) == "<numpy.ndarray(None, None, None)>"


def test_of_large_labels_and_items_of_a_table_no_more_is_read_than_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    large = push_list(b"K\x01" * 10_000) + b"\x94"
    items = push_array(b"K\x02K\x01\x86", b"O8", push_list(large + b"h\x00"))
    places = b"cbuiltins\nslice\n(K\x00K\x02K\x01tR"
    block = b"cpandas\nBlock\n(%b%btR" % (items, places)
    pickled = push_frame(push_index(b"h\x00K\x02", 2), push_range(b"K\x01"), block) + b"."
    value, pieces = mls.PickleReader().read(pickled), itertools.count()
    format_pieces = mls.format_pieces

    def count_pieces(value: Any, depth: int) -> Iterator[str]:
        return (piece for piece, _ in zip(format_pieces(value, depth), pieces))

    monkeypatch.setattr(mls, "format_pieces", count_pieces)
    cut = "[" + "1, " * 33 + "..."
    assert mls.format_value(value) == (
        f"DataFrame of 1 rows and 2 columns\n{cut}: object, 2: object\n{cut}  {cut}"
    )
    assert next(pieces) < 2000


def test_a_time_has_no_time_zone_of_any_length() -> None:
    zone = b"cdatetime\ntimezone\n(%btR" % push_list(b"K\x01" * 10_000)
    pickled = b"cdatetime\ndatetime\n(U\x0a\x07\xe8" + b"\x01" * 8 + zone + b"tR."
    assert len(mls.format_value(mls.PickleReader().read(pickled))) < 200


def test_of_an_object_with_very_many_attributes_few_are_read() -> None:
    value = mls.PickledObject("a.B")
    value.state = mls.PickledDict((f"a{n}", n) for n in range(10_000))
    assert len(value.attributes()) == mls.MOST_FIELDS


def test_an_attribute_whose_name_is_no_text_is_no_member_of_an_enum() -> None:
    pickled = b"cbuiltins\ngetattr\n(c__main__\nColour\n]tR."
    shown_as = mls.format_value(mls.PickleReader().read(pickled))
    assert shown_as == "<builtins.getattr(<class __main__.Colour>, [])>"


def test_long_bytes_of_an_old_pickle_are_shown() -> None:
    assert format_pickled(b"x" * 90, protocol=2) == str(b"x" * 90)


def test_of_an_object_only_few_attributes_are_shown() -> None:
    assert (
        format_pickled(SimpleNamespace(**{f"a{n}": n for n in range(100)}))
        == "<types.SimpleNamespace>"
    )


# ==================================================================================================
# Queries
# ==================================================================================================

# Filters, patterns, orders, cursors and limits: pure functions over rows, many checked by generated
# examples. Each new column or filter gets its row in one of the tables here.


def run_record(number: int | str, **fields: Any) -> dict[str, Any]:
    """A run as the store gives it."""
    return {
        "flow_id": "Flow",
        "run_number": number,
        "user_name": None,
        "ts_epoch": 0,
        "tags": None,
        "system_tags": None,
        "last_heartbeat_ts": None,
        **fields,
    }


SOME_RUNS = [
    run_record(
        1, user_name="Alice", user="Alice", ts_epoch=100, tags=["red"], system_tags=["user:Alice"]
    ),
    run_record(2, user_name="bob", ts_epoch=200, last_heartbeat_ts=20, tags=["red", "blü"]),
    run_record("argo-1", user_name="100%_a", ts_epoch=300, last_heartbeat_ts=30, status="failed"),
    run_record("argo-2", ts_epoch=400, last_heartbeat_ts=40, tags=[], system_tags=["red"]),
]


def select_runs(query: str, records: list[dict[str, Any]] = SOME_RUNS) -> list[Any]:
    """The numbers of the runs that a query lets pass."""
    parameters = parse_qsl(query, keep_blank_values=True)
    tests = [
        test for name, test in mls.parse_filters(parameters, mls.RUN_FIELDS) if name != "status"
    ]
    tests += mls.parse_tag_filters(parameters)
    return [run["run_number"] for run in records if all(test(run) for test in tests)]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("ts_epoch=200", [2]),
        ("ts_epoch:eq=200,300", [2, "argo-1"]),
        ("ts_epoch:ne=200", [1, "argo-1", "argo-2"]),
        ("ts_epoch:lt=200", [1]),
        ("ts_epoch:le=200", [1, 2]),
        ("ts_epoch:gt=300", ["argo-2"]),
        ("ts_epoch:ge=+300", ["argo-1", "argo-2"]),
        ("ts_epoch:ge=200&ts_epoch:lt=400", [2, "argo-1"]),
        ("ts_epoch=200&user_name=Alice", []),
        ("user_name=alice", []),
        ("user_name:co=LI", [1]),
        ("user_name:sw=al,B", [1, 2]),
        ("user_name:ew=OB", [2]),
        ("user_name:li=%25LI_e", [1]),
        ("user_name:co=%25", ["argo-1"]),  # no wildcard, but in li
        ("user_name:sw=1_0", []),
        ("user_name:ne=bob", [1, "argo-1"]),  # nothing compares with null
        ("user_name:gt=a", [2]),
        ("user_name=null", ["argo-2"]),
        ("user_name:is=null", ["argo-2"]),
        ("user_name:ne=null", [1, 2, "argo-1"]),
        ("user_name=null,bob", [2, "argo-2"]),
        ("user_name=", []),
        ("user=Alice", [1]),
        ("user:ne=Alice", []),
        ("user=null", [2, "argo-1", "argo-2"]),
        ("run_number=2", [2]),
        ("run_number:le=2", [1, 2]),
        ("run_id=argo-1", ["argo-1"]),
        ("run_id=null", [1, 2]),
        ("run_id:sw=ARGO", ["argo-1", "argo-2"]),
        ("last_heartbeat_ts:ge=30", ["argo-1", "argo-2"]),
        ("last_heartbeat_ts:is=null", [1]),
        ('tags=["red"]', [1]),
        ('tags:ne=["red"]', [2, "argo-2"]),
        ("tags=null", ["argo-1"]),
        ('tags=["red", "blü"]', [2]),
        ("_tags=red", [1, 2, "argo-2"]),
        ("_tags=red,blü", [2]),
        ("_tags:all=red,user:Alice", [1]),
        ("_tags:any=blü,user:Alice", [1, 2]),
        ("_tags=RED", []),
        ("_tags:likeany=ali,blü", [2]),
        ("_tags:likeany=Ali", [1]),
        ("_tags:likeall=r,e,lü", [2]),
        ("nothing=1&step_name:zz=1&_order=x", [1, 2, "argo-1", "argo-2"]),
    ],
)
def test_a_filter_selects_runs(query: str, expected: list[Any]) -> None:
    assert select_runs(query) == expected


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("ts_epoch:zz=1", "unsupported operator 'zz' for field 'ts_epoch'"),
        ("ts_epoch=abc", "invalid ts_epoch: expected integer epoch milliseconds, got 'abc'"),
        ("ts_epoch=1,", "invalid ts_epoch: expected integer epoch milliseconds, got ''"),
        (
            "last_heartbeat_ts:ge=1.5",
            "invalid last_heartbeat_ts: expected integer epoch seconds, got '1.5'",
        ),
        ("status=bogus", "unsupported status filter: bogus"),
        ("status=failed,Failed", "unsupported status filter: Failed"),
        ("run_number=argo", None),
        ("user_name:is=alice", None),
        ("ts_epoch:co=1", None),
        ("tags=red", None),
        ("tags:co=red", None),
        ("_tags:zz=red", None),
    ],
)
def test_an_invalid_filter_is_refused(query: str, sentence: str | None) -> None:
    with pytest.raises(mls.BadQuery) as refused:
        select_runs(query)
    assert sentence in (None, str(refused.value))


any_name = st.sampled_from(["alice", "Bob", "", "a%_", "ü"])
any_number = st.integers(0, 4)
any_run = st.builds(
    run_record,
    any_number | st.sampled_from(["argo-1", "x"]),
    user_name=st.none() | any_name,
    ts_epoch=any_number,
    last_heartbeat_ts=st.none() | any_number,
)
name_conditions = st.tuples(st.just("user_name"), any_name)
number_conditions = st.tuples(
    st.sampled_from(["ts_epoch", "last_heartbeat_ts", "run_number"]), any_number
)


@given(
    st.lists(any_run),
    name_conditions | number_conditions,
    st.sampled_from([("eq", "ne"), ("lt", "ge"), ("gt", "le")]),
)
def test_a_filter_and_its_complement_select_everything_but_nulls(
    records: list[Any], condition: tuple[str, Any], operators: tuple[str, str]
) -> None:
    field, value = condition
    for run in records:
        sides = [select_runs(f"{field}:{one}={quote(str(value))}", [run]) for one in operators]
        assert sum(map(len, sides)) == (0 if run[field] is None else 1)


@given(
    st.lists(any_run),
    st.lists(
        st.tuples(
            name_conditions | number_conditions | st.just(("user_name", "null")),
            st.sampled_from(["", ":eq", ":ne", ":lt", ":ge"]),
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_another_filter_never_selects_more(records: list[Any], conditions: list[Any]) -> None:
    parts = [f"{field}{how}={quote(str(value))}" for (field, value), how in conditions]
    fewer = select_runs("&".join(parts), records)
    more = iter(select_runs("&".join(parts[1:]), records))
    assert all(run in more for run in fewer)  # a subsequence of them


@given(st.text("aAb%_\\\n", max_size=8), st.text("aAb%_\\\n", max_size=6))
def test_like_is_the_like_of_sql(text: str, pattern: str) -> None:
    wildcards = {"%": ".*", "_": "."}
    parts = re.findall(r"\\.|.", pattern, re.DOTALL)
    reference = "".join(wildcards.get(part) or re.escape(part[-1]) for part in parts)
    assert mls.is_like(text, pattern) == bool(re.fullmatch(reference, text, re.DOTALL))


@pytest.mark.parametrize(
    ("pattern", "text", "is_found"),
    [
        ("w:1", "foreach:w:10", True),  # anywhere
        ("W", "w", False),
        ("(?i)W", "w", True),
        ("^b", "a\nb", False),  # the ends of the whole text
        ("a$", "a\n", False),
        ("a$", "ba", True),
        (r"a\$", "a$", True),
        ("[$]", "a$b", True),
        ("[^$a]", "a$", False),
        ("[]$]", "]", True),
        ("a.b", "a\nb", True),
        (r"\d{2}(?=x)", "12x", True),
        (r"\yfoo\y", "a foo b", True),
        (r"\yfoo\y", "afoo", False),
        (r"\Yoo", "foo", True),
        (r"\mfoo", "a foo", True),
        (r"o\m", "foo a", False),
        (r"foo\M", "foo a", True),
        (r"\Mfoo", "foo", False),
        (r"\bfoo", "a foo", False),  # a backspace
        (r"\bfoo", "\bfoo", True),
        (r"\\yfoo", r"\yfoo", True),
        ("^[[:digit:]_]+$", "1_2", True),
        ("[^[:space:]]", " ", False),
        (r"[[&&|\]~~]$", "[", True),
        ("", "", True),
    ],
)
def test_a_pattern_means_what_it_means_in_postgresql(
    pattern: str, text: str, is_found: bool
) -> None:
    assert mls.find_matches(pattern, [text], mls.search_in_place) == ({text} if is_found else set())


@pytest.mark.parametrize("pattern", ["(", "[", "[[", "*", "a{2,1}", "(?<=a*)b", "(" * 500, "\\"])
def test_an_invalid_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(mls.BadQuery):
        mls.find_matches(pattern, ["text"], mls.search_in_place)


@pytest.mark.parametrize(
    ("pattern", "text", "is_found"),
    [
        ("(foo|bar)+", "foobarfoo", True),
        ("(foo|bar)+", "foobaz", False),
        (".*a.*b.*", "xxaxxbxx" * 500, True),
        (r"\bfoo\b", "foo", True),  # a word boundary, as Python has it
        ("a.c", "a\nc", False),
        ("abc", "abc\n", False),  # `$` alone would match before the last line break
        ("a|ab", "ab", True),
        ("(?i)ABC", "abc", True),
        (r"(\w)\1", "aa", True),
        ("^a$", "a", True),
        (r"w:1,.*", "w:1,v:2", True),
        ("w:1", "w:10", False),
        ("a)|(?:b", "b", True),  # no pattern by itself; wrapped it is one
        ("[]x]", "]", True),
        ("", "", True),
    ],
)
def test_a_pattern_of_metaflows_client_means_what_it_does_in_local_mode(
    pattern: str, text: str, is_found: bool
) -> None:
    with contextlib.suppress(re.error):
        assert bool(re.fullmatch(pattern, text)) == is_found
    assert mls.find_matches(f"^(?:{pattern})$", [text], mls.search_in_place) == (
        {text} if is_found else set()
    )


@pytest.mark.parametrize(
    ("pattern", "is_cheap"),
    [
        ("w:1,.*", True),
        (r"a|b\.c|[abc]+$", True),
        ("^abc$", True),
        (r"\d", True),
        ("a*b*", False),
        ("a**", False),
        ("(a)", False),
        ("(?i)a", False),
        (r"\1", False),
        (r"\b", False),
        ("[a-z]", False),
        ("{2}", False),
        ("a" * 999 + "*", True),
    ],
)
def test_plain_patterns_are_searched_for_in_place(pattern: str, is_cheap: bool) -> None:
    reading = mls.Regex(pattern, 0, "search")
    assert mls.is_cheap(reading, ["a" * 200]) is is_cheap
    assert not mls.is_cheap(reading, ["a" * 20_000_000])


def test_a_pattern_has_at_most_1000_characters() -> None:
    with pytest.raises(mls.BadQuery, match="at most 1000"):
        mls.find_matches("a" * 1001, [], mls.search_in_place)


@settings(max_examples=200)
@given(st.text("ab.^$|*+?[]{}1,\\dwsZ-", max_size=8), st.lists(st.text("ab1-. \n^$", max_size=6)))
def test_a_search_in_place_finds_full_matches(pattern: str, texts: list[str]) -> None:
    reading = mls.candidate_regexes(f"^(?:{pattern})$")[0]
    if mls.is_cheap(reading, texts):
        found = mls.find_matches(f"^(?:{pattern})$", texts, mls.search_in_place)
        assert found == {text for text in texts if re.fullmatch(pattern, text)}


# -- places in lists -------------------------------------------------------------------------------

ids_on_the_wire = (st.text(max_size=5) | st.sampled_from(["-1", "+5", " 7", "1e3", "007"])).map(
    lambda name: mls.wire_id(name)
) | st.integers(0, 10**17)

any_record = st.fixed_dictionaries(
    {
        "ts_epoch": st.integers(0, 3) | st.integers(0, 10**15),
        "flow_id": st.text(max_size=5),
        "run_number": ids_on_the_wire,
        "task_id": ids_on_the_wire,
        "id": st.integers(0, 10**17),
        "name": any_text,
        "step_name": st.text(max_size=5),
    }
)
ORDERS = ["FLOW_ORDER", "RUN_ORDER", "STEP_ORDER", "TASK_ORDER", "METADATA_ORDER", "ARTIFACT_ORDER"]


@pytest.mark.parametrize("name", ORDERS)
@given(record=any_record)
def test_a_cursor_decodes_to_the_sort_key_of_its_record(name: str, record: Any) -> None:
    order = getattr(mls, name)
    assert mls.decode_cursor(order, mls.encode_cursor(order, record)) == order.sort_key(record)


json_texts = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
cursor_keys = st.sampled_from(
    ["ts_epoch", "flow_id", "run_number", "task_id", "id", "name", "step_name"]
)
any_cursor = st.text(max_size=20) | st.one_of(
    st.binary(max_size=20),
    (json_texts | st.dictionaries(cursor_keys, json_texts)).map(
        lambda value: json.dumps(value).encode()
    ),
).map(lambda content: base64.b64encode(content).decode())


@pytest.mark.parametrize("name", ORDERS)
@given(cursor=any_cursor, record=any_record)
def test_any_text_is_a_cursor_or_refused(name: str, cursor: str, record: Any) -> None:
    order = getattr(mls, name)
    with contextlib.suppress(mls.BadQuery):
        place, sort_key = mls.decode_cursor(order, cursor), order.sort_key(record)
        assert (place < sort_key) + (place == sort_key) + (place > sort_key) == 1


@pytest.mark.parametrize(
    "content",
    [
        '{"ts_epoch": NaN, "id": 1}',
        '{"ts_epoch": 1, "id": NaN}',
        '{"ts_epoch": 1e999, "id": 1}',
        '{"ts_epoch": true, "id": 1}',
        '{"ts_epoch": null, "id": 1}',
        '{"ts_epoch": 1}',
        "[]",
        "5",
        "null",
        "[" * 99_999,
    ],
)
def test_a_cursor_that_holds_no_numbers_is_refused(content: str) -> None:
    with pytest.raises(mls.BadQuery, match=r"^Invalid cursor$"):
        mls.decode_cursor(mls.METADATA_ORDER, base64.b64encode(content.encode()).decode())


def test_a_cursor_may_hold_its_numbers_as_text_or_fractions() -> None:
    cursor = base64.b64encode(b'{"ts_epoch": "12", "run_number": 3.0}').decode()
    assert mls.decode_cursor(mls.RUN_ORDER, cursor) == mls.RUN_ORDER.sort_key(
        run_record(3, ts_epoch=12)
    )


@pytest.mark.parametrize(
    ("text", "size"), [(None, 50), ("", 50), ("1", 1), ("500", 500), ("501", 500), ("9" * 99, 500)]
)
def test_a_page_has_50_records_or_up_to_500(text: str | None, size: int) -> None:
    assert mls.parse_limit([] if text is None else [("_limit", text), ("_limit", "3")]) == size


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "abc", "1 ", "٣", "1e2"])
def test_a_page_of_another_size_is_refused(text: str) -> None:
    with pytest.raises(mls.BadQuery):
        mls.parse_limit([("_limit", text)])


# ==================================================================================================
# Model
# ==================================================================================================

# What has become of runs, tasks and attempts, and why, piece by piece; values and cards are tested
# through the UI API, which shows them. Most tests write records through a service in this process.
# Causes are read from runs of real flows, once recorded (`recorded` and `failures`), which is what
# takes long: 10 and 20 seconds for the first test that needs them.

FLOWS_TO_SEE = {
    "zoo.py": '''
from metaflow import FlowSpec, Parameter, card, catch, current, project, retry, step

@project(name="zoo_project")
class ZooFlow(FlowSpec):
    """Two branches, a foreach, a retry, a caught failure and a card."""

    size = Parameter("size", default=3)

    @step
    def start(self):
        """Fans out."""
        print("hello from start", "\\u20ac <b>html</b>")
        self.names = ["a", "b"]
        self.next(self.left, self.right)

    @card(type="blank", id="report")
    @step
    def left(self):
        from metaflow.cards import Markdown
        current.card["report"].append(Markdown("# Report"))
        self.next(self.work, foreach="names")

    @retry(times=1, minutes_between_retries=0)
    @step
    def work(self):
        self.letter = self.input
        if self.input == "b" and current.retry_count == 0:
            raise ValueError("fails once")
        self.next(self.collect)

    @step
    def collect(self, inputs):
        self.letters = tuple(i.letter for i in inputs)
        self.next(self.join)

    @catch(var="problem", print_exception=False)
    @step
    def right(self):
        raise ValueError("caught")
        self.next(self.join)

    @step
    def join(self, inputs):
        self.next(self.end)

    @step
    def end(self):
        self.big = b"x" * 17_000_000

if __name__ == "__main__":
    ZooFlow()
''',
    "custom.py": """
from metaflow import FlowSpec, Parameter, step

class CustomFlow(FlowSpec):
    mode = Parameter("mode", default="fast")

    @step(start=True)
    def begin(self):
        self.next({"fast": self.fast, "slow": self.slow}, condition="mode")

    @step
    def fast(self):
        self.next(self.finish)

    @step
    def slow(self):
        self.next(self.finish)

    @step(end=True)
    def finish(self):
        pass

if __name__ == "__main__":
    CustomFlow()
""",
}


def can_name_the_last_step() -> bool:
    """Whether this Metaflow has `@step(end=True)`, and `condition` in `self.next`."""
    return "end" in inspect.signature(metaflow.step).parameters


def record_flows(folder: Path, home: Path) -> None:
    """Run the flows in a folder at the same time: one through the service, one in local mode."""
    program = Cli(folder, home)
    for name, text in FLOWS_TO_SEE.items():
        (folder / name).write_text(text)
    (folder / ".metaflow").mkdir()
    flows = [program.popen("run", sys.executable, "zoo.py", "run", "--tag", "demo")]
    if can_name_the_last_step():
        custom = subprocess.Popen(
            [sys.executable, "custom.py", "run"],
            cwd=folder,
            env={**program.environment, "METAFLOW_DEFAULT_METADATA": "local"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        flows.append(custom)
    try:
        for flow in flows:
            _, errors = flow.communicate(timeout=300)
            assert flow.returncode == 0, errors
    finally:
        program("stop", "--all")


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two flows have run: recorded once a session, in about ten seconds."""
    folder = session_folder(tmp_path_factory, "recorded")
    with recording(folder) as is_new:
        if is_new:
            record_flows(folder, folder / "home")
    return folder


@pytest.fixture(scope="session")
def seen(recorded: Path) -> mls.Model:
    """A model of the flows in `recorded`, a hundred seconds later."""
    return mls.Model(mls.Store(str(recorded)), lambda: time.time() + 100)


def runs_of(model: mls.Model, flow: str) -> list[Any]:
    """The runs of a flow, oldest first."""
    rows = [model.runs.judge(row) for row in model.runs.newest_first() if row["flow_id"] == flow]
    return rows[::-1]


def attempts_of(model: mls.Model, run: Any, step: str) -> list[Any]:
    tasks = model.attempts.of_run(mls.run_row_ids(run), model.clock())
    return [task for task in tasks if task["step_name"] == step]


def task_in(model: mls.Model, flow: str, step: str, which: int = 0) -> mls.Ids:
    """The ids of a task of the first run of a flow."""
    ids = mls.run_row_ids(runs_of(model, flow)[0])
    return model.store.task_ids((*ids, step))[which]


def artifact_text(model: mls.Model, ids: mls.Ids, name: str) -> Any:
    row = model.store.artifact(ids, name)
    assert row is not None
    return model.artifacts.with_value(mls.artifact_row(row)).get("content")


def end_task(ui: Api, task: str, kind: str = "local", is_ok: str = "True") -> None:
    """Record the only attempt of a task as Metaflow does, with its datastore."""
    told = [("attempt", "0"), ("ds-type", kind), ("attempt_ok", is_ok)]
    ui.post(f"{task}/metadata", [metadatum(name, value) for name, value in told])


def store_value(store: mls.Store, value: object) -> dict[str, str]:
    """Put a value into the datastore, and say where it is."""
    content = gzip.compress(pickle.dumps(value), mtime=0)  # the same at every time
    sha = hashlib.sha1(content).hexdigest()
    path = Path(store.folder, "Flow", "data", sha[:2], sha)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return {"location": f":root:{store.folder}", "sha": sha}


def make_running_task(ui: Api, ds_root: str) -> tuple[str, tuple[str, ...]]:
    task = ui.new_task_of_its_own()
    ui.post(f"{task}/metadata", [metadatum("attempt", "0"), metadatum("ds-root", ds_root)])
    return task, tuple(task.split("/")[2::2])


# -- logs ------------------------------------------------------------------------------------------


def store_log(datastore: str | Path, task: str) -> None:
    """Leave the files that the scheduler leaves when the process of an attempt has exited."""
    folder = Path(datastore, *task.split("/")[2::2])
    for name in ("runtime_stdout.log", "runtime_stderr.log"):
        (folder / f"0.{name}").write_bytes(b"")


def test_a_log_is_awaited_until_the_scheduler_has_stored_it_or_for_minutes(
    store: mls.Store, ui: Api
) -> None:
    run = ui.new_run(ui.new_flow())
    step = ui.new_step(run)
    awaited, remote, named = (
        ui.new_task(step),
        ui.new_task(step),
        ui.new_task(step, task_id="1_node_1"),
    )
    for task, kind in ((awaited, "local"), (remote, "s3"), (named, "local")):
        end_task(ui, task, kind)
    ids = tuple(run.split("/")[2::2])

    def stored_logs(delay: float = 0) -> list[bool]:
        model = mls.Model(store)
        return [t["is_log_stored"] for t in model.attempts.of_run(ids, time.time() + delay)]

    assert stored_logs() == [False, True, True]
    assert stored_logs(mls.STORING_SECONDS - 10) == [False, True, True]
    assert stored_logs(mls.STORING_SECONDS + 10) == [True, True, True]
    store_log(store.folder, awaited)
    assert stored_logs() == [True, True, True]


def test_a_log_is_not_awaited_from_a_scheduler_that_is_gone(store: mls.Store, ui: Api) -> None:
    run = ui.new_run(ui.new_flow(), system_tags=["metaflow_version:2.19.0"])
    task = ui.new_task(ui.new_step(run))
    end_task(ui, task)
    model = mls.Model(store)
    ids = tuple(task.split("/")[2::2])
    for delay, expected in ((0, False), (mls.TASK_HEARTBEAT_CUTOFF + 10, True)):
        (row,) = model.attempts.of_task(ids, time.time() + delay)
        assert row["is_log_stored"] is expected


# -- histories -------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["attempt", "attempt-done", "attempt_ok"]),
            st.integers(0, 4),
            st.booleans(),
            st.integers(0, 100),
        )
    )
)
@settings(deadline=None, max_examples=50)
def test_attempts_are_numbered_without_gaps_and_the_order_of_records_means_nothing(
    told: Any,
) -> None:
    rows: Any = [
        {
            "id": index,
            "field_name": field,
            "value": str(is_ok) if field == "attempt_ok" else str(number),
            "ts_epoch": at,
            "tags": [f"attempt_id:{number}"],
        }
        for index, (field, number, is_ok, at) in enumerate(told)
    ]
    attempts = mls.attempts_from_metadata(rows, [])
    assert len(attempts) == max((number for _, number, _, _ in told), default=-1) + 1
    assert mls.attempts_from_metadata(rows[::-1], []) == attempts
    for number, attempt in enumerate(attempts):
        oks = [
            r for r in rows if r["field_name"] == "attempt_ok" and r["tags"][0][11:] == str(number)
        ]
        newest = max(oks, key=lambda row: (row["ts_epoch"], row["id"]), default=None)
        assert attempt.is_ok == (None if newest is None else newest["value"] == "True")


def test_a_huge_attempt_number_makes_no_rows() -> None:
    rows: Any = [{"id": 1, "field_name": "attempt", "value": "99999", "ts_epoch": 1, "tags": None}]
    assert mls.attempts_from_metadata(rows, [3]) == [mls.Attempt()] * 4


@pytest.mark.parametrize(
    ("stack", "label"),
    [
        (["names=alpha"], "alpha"),
        (["names=a=b, c"], "a=b, c"),
        (["outer=a", "inner=3"], "outer=a, inner=3"),
        ([], None),
        ([1], None),
        (None, None),
        ("xs=b=c", "b=c"),  # as text, from older clients
    ],
)
def test_a_foreach_label_is_the_path_of_values_also_for_a_clone(
    store: mls.Store, ui: Api, stack: Any, label: str | None
) -> None:
    origin = ui.new_task_of_its_own()
    ui.post(f"{origin}/metadata", [metadatum("foreach-stack", stack)])
    flow, run, step, task = origin.split("/")[2::2]
    clone = ui.new_task(ui.new_step(ui.new_run(f"/flows/{flow}")))
    named = [metadatum("origin-run-id", run), metadatum("origin-task-id", task)]
    ui.post(f"{clone}/metadata", named)
    rows = [ui.get(f"/api{path}/attempts").json["data"][0] for path in (origin, clone)]
    assert [row["foreach_label"] for row in rows] == [label, label]
    assert rows[1]["origin_pathspec"] == "/".join((flow, run, step, task))


@pytest.mark.parametrize("name", ["..", "a/b", "None", ""])
def test_a_clone_of_an_invalid_task_has_no_label(ui: Api, name: str) -> None:
    task = ui.new_task_of_its_own()
    named = [metadatum("origin-run-id", name), metadatum("origin-task-id", name)]
    ui.post(f"{task}/metadata", named)
    (row,) = ui.get(f"/api{task}/attempts").json["data"]
    assert (row["foreach_label"], row["origin_pathspec"]) == (None, None)


def test_a_cloned_task_and_a_resumed_run_name_their_origins(ui: Api) -> None:
    task = ui.new_task_of_its_own()
    origin = [metadatum("origin-run-id", "1234"), metadatum("origin-task-id", "7")]
    ended = [metadatum("attempt", "0"), metadatum("attempt_ok", "True")]
    ui.post(f"{task}/metadata", [*ended, *origin])
    (row,) = ui.get(f"/api{task}/attempts").json["data"]  # 7 is no number of an attempt
    assert row["origin_pathspec"] == "Flow/1234/start/7"
    assert (row["attempt_id"], row["is_log_stored"]) == (0, True)
    run = task.split("/steps/")[0]
    assert ui.get(f"/api{run}").json["data"]["origin_run_id"] == "1234"


def test_a_run_that_was_not_resumed_has_no_origin(ui: Api) -> None:
    task = ui.new_task_of_its_own()
    ui.post(f"{task}/metadata", [metadatum("origin-run-id", "None")])
    assert ui.get(f"/api{task.split('/steps/')[0]}").json["data"]["origin_run_id"] is None


# -- graphs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decorators", "attempts"),
    [
        ([], 1),
        ([{"name": "retry", "attributes": {"times": 2}}], 3),
        ([{"name": "catch", "attributes": {}}], 4),
        ([{"name": "retry", "attributes": {"times": 9}}], 6),
        ([{"name": "retry", "attributes": {"times": "3"}}], 4),
        ([{"name": "retry", "attributes": {"times": "often"}}], 1),
        ([{"name": "retry"}, {"name": "card"}, "nonsense", None], 1),
    ],
)
def test_the_decorators_of_a_step_say_how_many_attempts_it_has(
    decorators: Any, attempts: int
) -> None:
    assert mls.attempts_allowed({"steps": {"s": {"decorators": decorators}}}, "s") == attempts


def test_a_retry_decorator_without_arguments_adds_three_attempts() -> None:
    from metaflow.plugins.retry_decorator import RetryDecorator

    decorator = {"name": "retry", "attributes": RetryDecorator.defaults}
    assert mls.attempts_allowed({"steps": {"s": {"decorators": [decorator]}}}, "s") == 4


def test_an_invalid_graph_is_not_found(store: mls.Store, ui: Api) -> None:
    run = ui.new_run(ui.new_flow())
    task = ui.new_task(ui.new_step(run, "_parameters"))
    sha = "a" * 40
    folder = Path(store.folder, "Flow", "data", "aa")
    folder.mkdir(parents=True)
    (folder / sha).write_bytes(gzip.compress(pickle.dumps({"steps": ["nonsense"]})))
    row = artifact("_graph_info", location=f":root:{store.folder}", sha=sha)
    assert ui.post(f"{task}/artifact", [row]).status == 200
    assert ui.get(f"/api{run}/dag").status == 404
    assert ui.get(f"/api{run}").json["data"]["status"] == "running"


@pytest.mark.parametrize(
    "graph",
    [
        {"steps": {"start": {"decorators": 5}}},
        {"steps": {"start": {"decorators": [{"name": "retry", "attributes": {"times": "x"}}]}}},
        {"steps": {}, "end_step": ["end"]},
        {"steps": {}, "end_step": "../.."},
    ],
)
def test_an_invalid_graph_hides_no_run(store: mls.Store, ui: Api, graph: Any) -> None:
    task, _ = make_running_task(ui, store.folder)
    ui.post(f"{task}/metadata", [metadatum("attempt_ok", "False")])
    parameters = ui.new_task(ui.new_step(task[: task.index("/steps")], "_parameters"))
    ui.post(f"{parameters}/artifact", [artifact("_graph_info", **store_value(store, graph))])
    ui.post(f"{parameters}/metadata", [metadatum("attempt-done", "0")])
    assert len(ui.get("/api/runs").json["data"]) == 1


# -- causes: runs that failed, each in a way of its own, by either recorder ------------------------

CAUSES_FLOW = """
import os, signal, sys, time
from metaflow import FlowSpec, Parameter, card, catch, current, retry, step, timeout

HOW = os.environ["HOW"]
if HOW == "import" and "step" in sys.argv:
    import nothing_of_this_name  # import
if HOW == "never" and "step" in sys.argv:
    sys.exit(5)

class CausesFlow(FlowSpec):
    speed = Parameter("speed", default=7)

    @step
    def start(self):
        print("on stdout")
        print("\\033[31mit is about to happen\\033[0m", file=sys.stderr)
        if HOW == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if HOW == "exit":
            sys.exit(3)
        if HOW == "pickle":
            self.unpicklable = (number for number in [1])
        with open(f"begun-{HOW}", "w") as begun:
            begun.write(current.run_id)
        if HOW in ("interrupt", "both"):
            time.sleep(100)
        while HOW == "scheduler" and not os.path.exists("scheduler-is-gone"):
            time.sleep(0.02)
        self.letters = ["a", "b", "c"] if HOW in ("fine", "foreach") else ["a"]
        self.next(self.each, foreach="letters")

    @step
    def each(self):
        if HOW == "foreach" and self.input == "b":
            self.reject()
        self.next(self.join)

    def reject(self):
        import json
        json.loads("no \\033[31mJSON")  # foreach

    @step
    def join(self, inputs):
        if HOW == "join":
            try:
                inputs[7]
            except IndexError as error:
                raise RuntimeError("two\\nlines") from error  # join
        self.next(self.limited)

    @timeout(seconds=1)
    @step
    def limited(self):
        if HOW == "timeout":
            time.sleep(100)  # timeout
        self.next(self.retried)

    @retry(times=1, minutes_between_retries=0)
    @step
    def retried(self):
        if HOW == "retry" or current.retry_count == 0:
            raise ValueError(f"attempt {current.retry_count}")  # retry
        self.next(self.caught)

    @card(type="blank", id="report")
    @catch(var="problem", print_exception=False)
    @step
    def caught(self):
        raise LookupError("caught")  # catch
        self.next(self.end)

    @step
    def end(self):
        pass

if __name__ == "__main__":
    CausesFlow()
"""


class Expected(NamedTuple):
    """What is to be told of a run that failed."""

    kind: str
    step: str | None
    attempt: str | None  # "1 of 2"
    type: str | None
    message: str
    line: str | None  # the comment that stands behind it


TIMEOUT_EXCEPTION = "metaflow.plugins.timeout_decorator.TimeoutException"

CAUSES = {
    "import": Expected(
        "raised", "start", "1 of 1", "ModuleNotFoundError", "nothing_of_this_name", "import"
    ),
    "kill": Expected("killed", "start", "1 of 1", None, "signal 9 (SIGKILL)", None),
    "exit": Expected("killed", "start", "1 of 1", None, "exit code 3", None),
    "never": Expected("never started", "start", "1 of 1", None, "exit code 5", None),
    "pickle": Expected("raised", "start", "1 of 1", None, "unpicklable", None),
    "foreach": Expected(
        "raised", "each", "1 of 1", "json.decoder.JSONDecodeError", "Expecting value", "foreach"
    ),
    "join": Expected("raised", "join", "1 of 1", "RuntimeError", "two\nlines", "join"),
    "timeout": Expected(
        "timed out", "limited", "1 of 1", TIMEOUT_EXCEPTION, "timed out after", "timeout"
    ),
    "retry": Expected("raised", "retried", "2 of 2", "ValueError", "attempt 1", "retry"),
    # A task that is slow to end after Ctrl-C is killed by its scheduler.
    "interrupt": Expected("killed", "start", "1 of 1", None, "interrupted|scheduler", None),
    "scheduler": Expected("scheduler gone", None, None, None, "without a word", None),
    "both": Expected("scheduler gone", None, None, None, "while start/", None),
}
if not hasattr(globals().get("metaflow"), "Config"):
    del CAUSES["pickle"]  # Metaflow 2.12.0 records such an attempt as successful
ENDED_BY_HAND = {"interrupt", "scheduler", "both"}
RECORDED: Mapping[str, Sequence[str]] = {
    "local": list(CAUSES),
    "service": ["kill", *sorted(ENDED_BY_HAND)],  # of which it has other traces
}


def record_causes(folder: Path, recorder: str) -> None:
    """Let the flow fail in every way, tagged with it, and in local mode once not at all."""
    program = Cli(folder, folder / "home")
    (folder / "causes.py").write_text(CAUSES_FLOW)
    (folder / ".metaflow").mkdir()

    def record(how: str) -> None:
        command = [sys.executable, "causes.py", "run", "--max-workers", "1", "--tag", how]
        run = subprocess.Popen(
            program.command("run", *command) if recorder == "service" else command,
            cwd=folder,
            env={**program.environment, "HOW": how, "METAFLOW_DEFAULT_METADATA": "local"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if how in ENDED_BY_HAND:
            end_by_hand(folder, run, how)
        assert (run.wait(timeout=300) == 0) == (how == "fine"), how

    hows = ["fine", *RECORDED[recorder]] if recorder == "local" else RECORDED[recorder]
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(record, hows))
    finally:
        program("stop")


def end_by_hand(folder: Path, process: subprocess.Popen[Any], how: str) -> None:
    """End a run while its first task runs: by Ctrl-C, or without a chance to say a word."""
    begun = folder / f"begun-{how}"
    try:
        assert eventually(begun.exists, seconds=120)
        if how == "scheduler":
            process.kill()
            (folder / "scheduler-is-gone").touch()
            of_task = f".metaflow/CausesFlow/{begun.read_text()}/start/*/{mls.META_DIR}"
            ended = f"{of_task}/sysmeta_attempt_ok*"
            assert eventually(lambda: list(folder.glob(ended)), seconds=120)
        elif how == "interrupt":
            os.killpg(process.pid, signal.SIGINT)
    finally:
        if how != "interrupt":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Find the folder in which a recorder has seen CAUSES_FLOW fail in every way.

    Recorded once a session and recorder, at the first call, in twenty seconds.
    """

    def recorded_by(recorder: str) -> Path:
        folder = session_folder(tmp_path_factory, f"failures-{recorder}")
        with recording(folder) as is_new:
            if is_new:
                record_causes(folder, recorder)
        return folder

    return recorded_by


EVERY_FAILURE = [(recorder, how) for recorder, hows in RECORDED.items() for how in hows]


def model_much_later(folder: Path) -> mls.Model:
    """Those runs as one sees them when all signs of life have ceased."""
    return mls.Model(mls.Store(str(folder)), lambda: time.time() + 4000)


def run_tagged(model: mls.Model, how: str) -> Any:
    (run,) = (row for row in model.runs.newest_first() if how in (row["tags"] or ()))
    return model.runs.judge(run)


@pytest.mark.parametrize(("recorder", "how"), EVERY_FAILURE)
def test_the_cause_of_a_failed_run_names_task_attempt_exception_and_line(
    failures: Callable[[str], Path], recorder: str, how: str
) -> None:
    folder, expected = failures(recorder), CAUSES[how]
    run = run_tagged(model_much_later(folder), how)
    cause = run["cause"]
    assert (run["status"], cause["kind"], cause["step_name"]) == (
        "failed",
        expected.kind,
        expected.step,
    )
    of_task = f"/{cause['step_name']}/{cause['task_id']}" if expected.step else ""
    assert cause["pathspec"] == f"CausesFlow/{run['run']}{of_task}"
    attempt = f"{cause['attempt_id'] + 1} of {cause['attempts']}" if expected.step else None
    assert (attempt, cause["type"]) == (expected.attempt, expected.type)
    told = [message for message in expected.message.split("|") if message in cause["message"]]
    assert told
    lines = CAUSES_FLOW.splitlines()
    line = lines[cause["line"] - 1].partition("  # ")[2] if cause["line"] else None
    assert line == expected.line
    assert cause["file"] == (str(folder / "causes.py") if line else None)
    assert not expected.line or f"causes.py:{cause['line']}" in cause["summary"]
    assert " ".join(told[0].split()) in cause["summary"]
    is_told = any("is about to happen" in text for text in cause["stderr"])
    has_begun = expected.step == "start" and how not in ("import", "never")
    # A scheduler that is itself interrupted may have no time to store what its task has written.
    assert is_told == has_begun or how == "interrupt"


def test_a_retried_or_caught_failure_is_the_cause_of_its_attempt_only(
    failures: Callable[[str], Path],
) -> None:
    model = model_much_later(failures("local"))
    run = run_tagged(model, "fine")
    assert (run["status"], run["cause"]) == ("completed", None)
    causes = {
        (t["step_name"], t["attempt_id"], t["status"]): t["cause"]["summary"]
        for t in model.attempts.of_run(mls.run_row_ids(run), model.clock())
        if t["cause"]
    }
    assert sorted(causes) == [("caught", 0, "completed"), ("retried", 0, "failed")]
    assert "LookupError: caught in caught/" in causes["caught", 0, "completed"]
    assert "ValueError: attempt 0 in retried/" in causes["retried", 0, "failed"]


def test_the_cause_of_a_run_is_that_of_the_attempt(failures: Callable[[str], Path]) -> None:
    model = model_much_later(failures("local"))
    for how, expected in CAUSES.items():
        if expected.step:
            run = run_tagged(model, how)
            ids = (*mls.run_row_ids(run), expected.step, str(run["cause"]["task_id"]))
            assert model.attempts.of_task(ids, model.clock())[0]["cause"] == run["cause"]


def test_a_run_without_tasks_never_started(store: mls.Store) -> None:
    ids = new_run(store)
    run = mls.Model(store, lambda: time.time() + 400).runs.get(ids)
    assert run and run["cause"]
    assert (run["status"], run["cause"]["kind"]) == ("failed", "never started")
    assert run["cause"]["pathspec"] == "/".join(ids)


def test_the_first_failed_task_is_the_cause() -> None:
    graph: Any = {"steps": {"s": {"decorators": [{"name": "retry", "attributes": {"times": 1}}]}}}

    def failed(number: int, finished_at: int, attempt: int = 1) -> Any:
        return {
            "step_name": "s",
            "task_id": number,
            "status": "failed",
            "finished_at": finished_at,
            "ts_epoch": 0,
            "attempt_id": attempt,
        }

    tasks = [failed(1, 50), failed(2, 10, attempt=0), failed(3, 20), failed(4, 40)]
    blamed = mls.first_failure(tasks, graph, lambda task: task["task_id"] == 3)
    assert blamed and blamed["task_id"] == 4  # 2 would have been tried again, 3 was ended
    assert mls.first_failure([], graph, lambda task: False) is None


def test_the_cause_is_judged_once(
    failures: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_much_later(failures("local"))
    assert eventually(lambda: model.runs.is_settled(run_tagged(model, "foreach")))
    monkeypatch.setattr(mls.Causes, "_find", None)
    assert run_tagged(model, "foreach")["cause"]["kind"] == "raised"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no traceback", None),
        (
            'Traceback (most recent call last):\n  File "/a/flow.py", line 3, in f\n    x\nE: m',
            ("E", "m", "/a/flow.py", 3),
        ),
        (
            'Traceback (most recent call last):\n  File "/a/flow.py", line 3, in f\n    g()\n'
            '  File "/v/lib/python3.11/site-packages/p/q.py", line 5, in g\n    h()\np.Odd',
            ("p.Odd", None, "/a/flow.py", 3),
        ),
        (
            'Traceback (most recent call last):\n  File "/a/flow.py", line 9, in <module>\n'
            '    Flow()\n  File "/src/metaflow/task.py", line 5, in run_step\n    h()\nE: m',
            ("E", "m", None, None),
        ),
        (
            'Traceback (most recent call last):\n  File "/a/flow.py", line 3, in f\n    x\nE: 1\n\n'
            "During handling of the above exception, another exception occurred:\n\n"
            'Traceback (most recent call last):\n  File "/a/flow.py", line 5, in f\n    y\nF: 2',
            ("F", "2", "/a/flow.py", 5),
        ),
        (
            "  + Exception Group Traceback (most recent call last):\n"
            '  |   File "/a/flow.py", line 3, in f'
            "\n  |     x\n  | ExceptionGroup: all (1 sub-exception)\n  +-+---- 1 ----\n"
            '    | Traceback (most recent call last):\n    |   File "/a/b.py", line 1, in g\n'
            "    | ValueError: inner\n    +----",
            ("ExceptionGroup", "all (1 sub-exception)", "/a/flow.py", 3),
        ),
        (
            'Traceback (most recent call last):\n  File "/a/flow.py", line 3, in f\n    import b\n'
            '  File "/a/b.py", line 1\n    x = = 3\n        ^\nSyntaxError: invalid syntax',
            ("SyntaxError", "invalid syntax", "/a/b.py", 1),
        ),
    ],
)
def test_a_traceback_is_read_for_the_innermost_line_of_the_users_own_code(
    text: str, expected: Any
) -> None:
    raised = mls.parse_traceback(text.split("\n"))
    assert (raised and raised[:4]) == expected


IN_STEP = ['  File "/a/flow.py", line 3, in work', "    x()"]
FROM_FLOW = ['  File "/a/flow.py", line 9, in <module>', "    Flow()"]
FROM_METAFLOW = ['  File "/lib/metaflow/cli.py", line 7, in main', "    start()"]


@pytest.mark.parametrize(
    ("frames", "after", "is_told"),
    [
        (IN_STEP, [], True),
        (IN_STEP, ["", "Task failed.", ""], True),
        (IN_STEP, ["tries again", "Task failed."], False),
        ([*FROM_FLOW, *IN_STEP], ["Exception ignored in: <x>"], True),
        ([*FROM_METAFLOW, *IN_STEP], ["a note"], True),
    ],
)
def test_an_exception_that_was_handled_long_before_has_not_ended_a_process(
    frames: list[str], after: list[str], is_told: bool
) -> None:
    lines = ["before", "Traceback (most recent call last):", *frames, "E: m", *after]
    raised = mls.parse_last_words(lines)
    assert (raised and raised[:4]) == (("E", "m", "/a/flow.py", 3) if is_told else None)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("Traceback", '\n  File "b.py", line 5, in g\nTraceback (most recent call last):\nE: k\n'),
        ("  + Exception Group Traceback", "two (2 sub-exceptions)"),
        ("Traceback", ""),
        ("Traceback", None),
    ],
)
def test_a_stored_exception_has_its_message_and_the_users_line(
    start: str, message: str | None
) -> None:
    lines = [f"{start} (most recent call last):", *IN_STEP, f"ValueError: {message}", ""]
    fields = {"type": "ValueError", "exception": message, "stacktrace": "\n".join(lines)}
    wrapper = mls.PickledObject(mls.WRAPPER_TYPE)
    wrapper.state = mls.PickledDict(fields.items())
    raised = mls.parse_exception_wrapper(wrapper)
    assert raised and raised[:4] == ("ValueError", message, "/a/flow.py", 3)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (-9, "signal 9 (SIGKILL)"),
        (-64, "signal 64"),
        (3, "exit code 3"),
        (137, "exit code 137 (SIGKILL)"),
        (None, "no sign of life any more"),
    ],
)
def test_the_end_of_a_process_is_described_by_signal_or_exit_code(
    code: int | None, text: str
) -> None:
    assert mls.describe_process_end(mls.ProcessEnd(code, False, False, 0)) == text


# -- attempts --------------------------------------------------------------------------------------


def test_every_attempt_has_a_row_with_its_own_status_and_times(seen: mls.Model) -> None:
    (run,) = runs_of(seen, "ZooFlow")
    retried = [t for t in attempts_of(seen, run, "work") if t["task_id"] == max_retried(seen, run)]
    assert [(t["attempt_id"], t["status"]) for t in retried] == [(0, "failed"), (1, "completed")]
    begun, ended = retried[0]["started_at"], retried[0]["finished_at"]
    assert begun <= ended <= retried[1]["started_at"] <= retried[1]["finished_at"]
    assert all(t["duration"] == t["finished_at"] - t["started_at"] for t in retried)


def max_retried(model: mls.Model, run: Any) -> Any:
    attempts = attempts_of(model, run, "work")
    return max(attempts, key=lambda task: task["attempt_id"])["task_id"]


def test_a_caught_failure_is_a_completed_task_that_shows_the_exception(seen: mls.Model) -> None:
    (run,) = runs_of(seen, "ZooFlow")
    assert [t["status"] for t in attempts_of(seen, run, "right")] == ["completed"]
    problem = artifact_text(seen, task_in(seen, "ZooFlow", "right"), "problem")
    assert "MetaflowExceptionWrapper" in problem and "'caught'" in problem


def test_a_task_without_heartbeats_lives_as_long_as_its_files_are_written(
    store: mls.Store, api: Api
) -> None:
    task = api.new_task_of_its_own()
    api.post(f"{task}/metadata", [metadatum("attempt", "0"), metadatum("ds-root", store.folder)])
    ids = tuple(task.split("/")[2::2])
    late = time.time() + 2 * mls.TASK_SILENCE_CUTOFF
    model = mls.Model(store, lambda: late)
    assert [t["status"] for t in model.attempts.of_task(ids, late)] == ["failed"]
    assert model.runs.judge(next(model.runs.newest_first()))["status"] == "failed"
    os.utime("/".join((store.folder, *ids)), (late, late))
    assert [t["status"] for t in model.attempts.of_task(ids, late)] == ["running"]
    assert model.runs.judge(next(model.runs.newest_first()))["status"] == "running"


def test_a_task_that_nobody_has_begun_is_pending(store: mls.Store, api: Api) -> None:
    ids = tuple(api.new_task_of_its_own().split("/")[2::2])
    (attempt,) = mls.Model(store).attempts.of_task(ids, time.time())
    assert (attempt["status"], attempt["attempt_id"]) == ("pending", 0)
    assert attempt["started_at"] is None and attempt["finished_at"] is None


def test_an_attempt_whose_process_was_killed_is_failed_when_its_scheduler_noticed(
    store: mls.Store, api: Api
) -> None:
    task = api.new_task_of_its_own()
    api.post(f"{task}/metadata", [metadatum("attempt", "0"), metadatum("ds-root", store.folder)])
    ids = tuple(task.split("/")[2::2])
    told = json.dumps({"return_code": -9, "killed": False, "success": False})
    Path(store.folder, *ids, "0.runtime").write_text(told)
    (attempt,) = mls.Model(store).attempts.of_task(ids, time.time())
    assert attempt["status"] == "failed"


def test_an_attempt_that_ends_with_0_is_completed_only_if_it_has_stored_all(
    store: mls.Store, ui: Api
) -> None:
    task, ids = make_running_task(ui, store.folder)
    told = json.dumps({"return_code": 0, "killed": False, "success": True})
    Path(store.folder, *ids, "0.runtime").write_text(told)
    (attempt,) = ui.get(f"/api{task}/attempts").json["data"]
    assert (attempt["status"], attempt["cause"]["message"]) == ("failed", "exit code 0")
    Path(store.folder, *ids, "0.DONE.lock").touch()
    (attempt,) = ui.get(f"/api{task}/attempts").json["data"]
    assert (attempt["status"], attempt["cause"]) == ("completed", None)


@pytest.mark.parametrize("told", ["[" * 100_000, "5", '{"success": '])
def test_an_invalid_file_of_the_scheduler_is_ignored(store: mls.Store, ui: Api, told: str) -> None:
    _, ids = make_running_task(ui, store.folder)
    Path(store.folder, *ids, "0.runtime").write_text(told)
    (run,) = ui.get("/api/runs").json["data"]
    assert run["status"] == "running"


def test_an_invalid_datastore_name_hides_no_run(ui: Api) -> None:
    task, _ = make_running_task(ui, "/\ud800/.metaflow")
    (run,) = ui.get("/api/runs").json["data"]
    assert run["status"] == "running"
    assert ui.get(f"/api{task}/logs/out?attempt_id=0").json["data"] == []
    assert ui.get(f"/api{task}/cards").json["data"] == []


# -- runs and verdicts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (None, True),
        ([], False),
        (["user:x", "version:2.19"], False),
        (["metaflow_version:2.2.12"], True),
        (["metaflow_version:2.2.11"], False),
        (["metaflow_version:2.19.38+local"], True),
        (["metaflow_version:2.3"], True),
        (["metaflow_version:1.14.0"], True),
        (["metaflow_version:1.13.9"], False),
        (["metaflow_version:2.0.0"], False),
        (["metaflow_version:unknown"], True),
        (["metaflow_version:"], True),
    ],
)
def test_newer_clients_send_heartbeats(tags: list[str] | None, expected: bool) -> None:
    assert mls.sends_heartbeats(tags) is expected


def test_a_run_that_reached_its_end_is_completed_when_its_last_task_was(seen: mls.Model) -> None:
    (run,) = runs_of(seen, "ZooFlow")
    (end,) = attempts_of(seen, run, "end")
    assert (run["status"], end["status"]) == ("completed", "completed")
    assert run["finished_at"] == end["finished_at"]
    assert run["duration"] == run["finished_at"] - run["ts_epoch"]
    assert (run["user"], run["tags"]) == ("tester", ["demo"])


def test_a_run_is_completed_by_its_own_last_step_whatever_that_is_called(
    seen: mls.Model,
) -> None:
    if not can_name_the_last_step():
        pytest.skip("this Metaflow has no @step(end=True)")
    (run,) = runs_of(seen, "CustomFlow")
    (finish,) = attempts_of(seen, run, "finish")
    assert (run["status"], run["finished_at"]) == ("completed", finish["finished_at"])
    assert run["last_heartbeat_ts"] is None, "it ran in local mode"
    assert attempts_of(seen, run, "slow") == []
    graph = seen.graphs.of_run(mls.run_row_ids(run))
    assert graph is not None and graph["steps"]["begin"]["type"] == "split-switch"


def test_a_run_that_was_killed_is_running_until_its_heartbeats_are_old(
    failures: Callable[[str], Path],
) -> None:
    own_store = mls.Store(str(failures("service")))
    (silent_run,) = (
        row for row in mls.Model(own_store).runs.newest_first() if "both" in (row["tags"] or ())
    )

    def seen_after(delay: float) -> tuple[Any, Any]:
        model = mls.Model(own_store, lambda: silent_run["last_heartbeat_ts"] + delay)
        run = run_tagged(model, "both")
        (attempt,) = attempts_of(model, run, "start")
        return run, attempt

    run, attempt = seen_after(1)
    for row in (run, attempt):
        assert (row["status"], row["finished_at"]) == ("running", None)
    assert attempt["started_at"] is not None
    run, attempt = seen_after(mls.TASK_HEARTBEAT_CUTOFF + 40)
    assert (run["status"], attempt["status"]) == ("failed", "failed")
    assert run["finished_at"] >= run["ts_epoch"]
    assert attempt["finished_at"] >= attempt["started_at"]


@pytest.mark.parametrize("recorder", RECORDED)
def test_a_run_has_failed_at_once_unless_it_fell_silent(
    failures: Callable[[str], Path], recorder: str
) -> None:
    now = mls.Model(mls.Store(str(failures(recorder))))
    for how in RECORDED[recorder]:
        if CAUSES[how].kind != "scheduler gone":
            assert run_tagged(now, how)["status"] == "failed", how


def test_a_failed_task_with_attempts_left_does_not_end_its_run() -> None:
    graph: Any = {"steps": {"s": {"decorators": [{"name": "retry", "attributes": {"times": 1}}]}}}
    failed: Any = {
        "step_name": "s",
        "task_id": 1,
        "status": "failed",
        "finished_at": 1,
        "attempt_id": 0,
    }
    assert not mls.cannot_go_on([failed], graph)
    assert mls.cannot_go_on([failed, {**failed, "attempt_id": 1}], graph)
    assert not mls.cannot_go_on([failed], {}), "without a graph nobody knows"
    other: Any = {**failed, "task_id": 2, "status": "running", "finished_at": None}
    assert not mls.cannot_go_on([{**failed, "attempt_id": 1}, other], graph)


def test_a_finished_run_is_judged_once_until_its_files_change(
    store: mls.Store, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mls, "SETTLED_NS", -(10**12))
    task = api.new_task(api.new_step(api.new_run(api.new_flow()), "end"))
    api.post(f"{task}/metadata", [metadatum("attempt", "0"), metadatum("attempt_ok", "True")])
    model = mls.Model(store)
    assert model.runs.judge(next(model.runs.newest_first()))["status"] == "completed"
    judged: list[object] = []
    completion = model.runs._completion
    monkeypatch.setattr(model.runs, "_completion", lambda *a: judged.append(a) or completion(*a))
    assert model.runs.judge(next(model.runs.newest_first()))["status"] == "completed"
    assert judged == []
    api.post(f"{task}/metadata", [metadatum("attempt_ok", "False", attempt=1)])
    assert model.runs.judge(next(model.runs.newest_first()))["status"] != "completed"
    assert judged != []


def test_a_verdict_on_a_running_run_looks_at_each_folder_and_record_once(
    store: mls.Store, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mls, "SETTLED_NS", -(10**12))
    run = api.new_run(api.new_flow())
    task = api.new_task(api.new_step(run, "start"))
    api.post(f"{task}/metadata", [metadatum("attempt", "0"), metadatum("attempt_ok", "True")])
    api.post(f"{task}/heartbeat")
    now = time.time()
    model = mls.Model(store, clock=lambda: now)
    assert model.runs.judge(next(model.runs.newest_first()))["status"] == "running"
    looked_at, stat = [], os.stat

    def noted(path: str, **options: Any) -> os.stat_result:
        looked_at.append(os.path.relpath(path, store.folder))
        return stat(path, **options)

    folders, records = ["", "/start", "/start/1/_meta"], ["", "/start/1"]
    below = {
        1.5 * mls.RUNNING_SECONDS: [
            *folders,
            *(f"{record}/_meta/_self.json" for record in records),
        ],
        0.5
        * mls.RUNNING_SECONDS: folders,  # the verdict before counts as long as these are the same
    }
    for elapsed, paths in below.items():
        now += elapsed
        row = next(model.runs.newest_first())
        with monkeypatch.context() as noting:
            noting.setattr(os, "stat", noted)
            assert model.runs.judge(row)["status"] == "running"
        folder = "/".join(mls.run_row_ids(row))
        assert sorted(looked_at) == sorted(folder + path for path in paths)
        looked_at.clear()


def test_a_running_run_ends_at_once_if_its_records_say_so_and_soon_if_its_heartbeats_stop(
    store: mls.Store, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mls, "SETTLED_NS", -(10**12))
    flow = api.new_flow()
    runs = [api.new_run(flow) for _ in range(2)]
    tasks = [api.new_task(api.new_step(run, step)) for run, step in zip(runs, ("end", "start"))]
    now = time.time()
    model = mls.Model(store, clock=lambda: now)

    def statuses() -> list[str]:
        return [model.runs.judge(row)["status"] for row in model.runs.newest_first()][::-1]

    for task in tasks:
        api.post(f"{task}/metadata", [metadatum("attempt", "0")])
        api.post(f"{task}/heartbeat")
    assert statuses() == ["running", "running"]
    api.post(f"{tasks[0]}/metadata", [metadatum("attempt_ok", "True")])
    assert statuses() == ["completed", "running"]
    now += mls.RUN_HEARTBEAT_CUTOFF - 10
    assert statuses() == ["completed", "running"]
    now += 20
    assert statuses() == ["completed", "failed"]


# -- comparing runs --------------------------------------------------------------------------------


def test_facts_of_runs_differ_by_section_and_name() -> None:
    nothing: dict[str, dict[str, Any]] = {section: {} for section in mls.COMPARED_SECTIONS}
    one = {**nothing, "parameters": {"n": 1, "m": 5}, "tags": {"x": True}}
    other = {**nothing, "parameters": {"n": 2, "m": 5}}
    assert mls.compare_facts([one, other]) == [
        {"section": "parameters", "name": "n", "values": [1, 2]},
        {"section": "tags", "name": "x", "values": [True, None]},
    ]
    assert [d["name"] for d in mls.compare_facts([one, other], True)] == ["m", "n", "x"]


@pytest.mark.parametrize(
    ("section", "values", "is_different"),
    [
        ("durations", [400, 900], False),
        ("durations", [10_000, 12_000], False),
        ("durations", [1000, 4000], True),
        ("durations", [1000, None], True),
        ("parameters", [1, True], True),
        ("parameters", [{"a": 1, "b": 2}, {"b": 2, "a": 1}], False),
    ],
)
def test_durations_differ_if_by_much_and_other_values_as_json(
    section: str, values: list[Any], is_different: bool
) -> None:
    assert mls.is_different(section, values) == is_different


# ==================================================================================================
# Retention
# ==================================================================================================

# What refers to what, what it takes on the disk, and that a deletion leaves nothing behind and all
# else as it was. Generated choices of runs are deleted from a copy (`replica`) of what real flows
# have recorded (`history`): copying and comparing thousands of files takes several seconds each.

LATER = 10 * 86_400
"""Seconds after which nothing is young, and nothing that was recorded before is running."""


def retention_much_later(folder: Path) -> mls.Retention:
    """What may be deleted in a project, as it is seen days after it was recorded."""
    return mls.Retention(mls.Model(mls.Store(str(folder)), lambda: time.time() + LATER))


def delete_runs(retention: mls.Retention, runs: Iterable[mls.Ids]) -> None:
    for _ in retention.delete_runs(runs):
        pass


def collect_garbage(retention: mls.Retention, flow: str | None = None) -> int:
    """Do what `gc` does without conditions, and return how many blobs that removed."""
    retention.finish_deletions()
    found = retention.find_garbage(flow=flow)
    return sum(1 for garbage in found for _ in retention.remove_garbage(garbage))


def create_ended_run(api: Api, name: str = "Flow", **fields: Any) -> mls.Ids:
    """Record a run of a flow that has succeeded."""
    api.post(f"/flows/{name}")
    run = api.new_run(f"/flows/{name}", **fields)
    end_task(api, api.new_task(api.new_step(run, "end")))
    return tuple(run.split("/")[2::2])


def create_living_run(api: Api) -> str:
    """Record the beginning of a run, and return its path."""
    api.post("/flows/Flow")
    return api.new_run("/flows/Flow", system_tags=["metaflow_version:2.15.0"])


def run_folder(store: mls.Store, ids: mls.Ids) -> Path:
    return Path(store.folder, *ids)


def refer(store: mls.Store, run: mls.Ids, sha: str, size: int = 1000) -> None:
    """Let the first task of a run name a blob, as Metaflow's datastore does."""
    told = {"objects": {"name": sha}, "info": {"name": {"size": size}}}
    (run_folder(store, run) / "end" / "1" / "0.data.json").write_text(json.dumps(told))


def blob_path(store: mls.Store, sha: str, flow: str = "Flow") -> Path:
    return Path(store.folder, flow, "data", sha[:2], sha)


# -- runs of real flows, deleted at random ---------------------------------------------------------


class Replica:
    """A copy of the root that real flows have left, put back as it was whenever that is asked for.

    What it is compared with is what was there before, by a reading of every file that knows
    nothing of Metaflow.
    """

    def __init__(self, recorded: Path, folder: Path) -> None:
        self.project = folder / "project"
        self._original = folder / "original"
        self.project.mkdir(parents=True)
        ignored = shutil.ignore_patterns("metaflow-local-service.*")
        for name in (".metaflow", "data"):
            if (recorded / name).exists():
                shutil.copytree(recorded / name, self._original / name, ignore=ignored)
        for path in self._original.rglob("*.json"):  # which say in what root they are
            content = path.read_text()
            if str(recorded) in content:
                path.write_text(content.replace(str(recorded), str(self.project)))
        original = self._original
        self.files = {p.relative_to(original) for p in original.rglob("*") if p.is_file()}
        self.mentions = {path: self._digests_in(original / path) for path in self.files}
        runs = original.glob(".metaflow/*Flow/[0-9]*")
        self.runs = sorted((path.parent.name, path.name) for path in runs)

    def _digests_in(self, path: Path) -> set[str]:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        digits = re.findall("[0-9a-f]{40,}", content.decode("latin-1"))
        return {run[at : at + 40] for run in digits for at in range(len(run) - 39)}

    def put_back(self) -> mls.Retention:
        for name in os.listdir(self._original):
            shutil.rmtree(self.project / name, ignore_errors=True)
            # Nothing but latest_run is ever written to, so links are as good as copies.
            shutil.copytree(self._original / name, self.project / name, copy_function=os.link)
        for path in self.project.glob(".metaflow/*Flow/latest_run"):
            content = path.read_text()
            path.unlink()
            path.write_text(content)
        return retention_much_later(self.project)

    @staticmethod
    def run_of(path: Path) -> mls.Ids | None:
        """The run that a file is of."""
        parts = path.parts[2:] if path.parts[1:2] == ("mf.cards",) else path.parts[1:]
        parts = (parts[0], *parts[2:]) if parts[1:2] == ("runs",) else parts
        return parts[:2] if len(parts) > 2 and parts[1].isdigit() else None

    @staticmethod
    def blob_of(path: Path) -> tuple[str, str] | None:
        """The flow and the digest of the blob that a file is, or is the _meta of."""
        match = re.fullmatch(r"([0-9a-f]{40})(_meta)?", path.name)
        flow = [part for part in path.parts if part.endswith("Flow")]
        return (flow[0], match[1]) if match else None

    def expected(self, runs: Collection[mls.Ids]) -> set[Path]:
        """The files that stay where only these runs stay."""
        blobs: dict[str, dict[str, list[Path]]] = {}  # by digest and flow
        stays = set()
        for path in self.files:
            blob, run = self.blob_of(path), self.run_of(path)
            if blob is not None:
                blobs.setdefault(blob[1], {}).setdefault(blob[0], []).append(path)
            elif run is None or run in runs:
                stays.add(path)
        unread = [path for path in stays if path.suffix == ".json" and "mf.cards" not in path.parts]
        while unread:
            path = unread.pop()
            run = self.run_of(path)
            for name in self.mentions[path] & blobs.keys():
                flows = blobs[name].keys() if run is None else {run[0]} & blobs[name].keys()
                for found in [blobs[name].pop(flow) for flow in list(flows)]:
                    stays.update(found)
                    unread += found
        return stays

    def present(self) -> set[Path]:
        folders = [self.project / name for name in os.listdir(self._original)]
        every = [path for folder in folders for path in folder.rglob("*")]
        return {path.relative_to(self.project) for path in every if path.is_file()}

    def check(self, runs: Collection[mls.Ids]) -> None:
        """All that is there is what is to stay with these runs, and is as it was."""
        expected = self.expected(runs)
        gone = {flow for flow, _ in self.runs} - {flow for flow, _ in runs}
        expected -= {Path(".metaflow", flow, "latest_run") for flow in gone}
        assert self.present() == expected
        for flow in {flow for flow, _ in runs}:
            before, now = (
                folder.joinpath(".metaflow", flow, "latest_run").read_text()
                for folder in (self._original, self.project)
            )
            newest = max(run for other, run in runs if other == flow)
            assert now == (before if (flow, before) in runs else newest)

    def facts(self, run: mls.Ids) -> object:
        """All that is told of a run, its attempts, artifacts, logs and cards."""
        model = mls.Model(mls.Store(str(self.project)), lambda: 2e9)
        told: list[object] = [model.runs.get(run)]
        for row in model.attempts.of_run(run, 2e9):
            task, attempt = mls.attempt_row_ids(row), row["attempt_id"]
            values = [
                model.artifacts.with_value(each) for each in model.artifacts.rows(task, attempt)
            ]
            logs = [model.logs.lines(task, attempt, stream) for stream in ("stdout", "stderr")]
            cards = [model.cards.html(task, card["hash"]) for card in model.cards.of_task(task)]
            told.append((row, values, logs, cards, mls.metadata_rows(model.store, task)))
        return told


@pytest.fixture(scope="session")
def replica(history: History, tmp_path_factory: pytest.TempPathFactory) -> Replica:
    """A copy of `history` in which runs may be deleted: read whole once, in some seconds."""
    return Replica(history.folder, tmp_path_factory.mktemp("replica").resolve())


# One copy is enough: with pytest-xdist one worker does all that needs it.
of_replica = pytest.mark.xdist_group("replica")


def deletable_runs(runs: Collection[mls.Ids], retention: mls.Retention) -> set[mls.Ids]:
    """Those of the runs that may go together."""
    return set(runs) - retention.reasons_to_stay(runs).keys()


@of_replica
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_a_deletion_leaves_nothing_behind_and_changes_nothing_else(
    replica: Replica, data: st.DataObject
) -> None:
    retention = replica.put_back()
    compared = data.draw(st.sampled_from(replica.runs))
    facts = replica.facts(compared)
    chosen = data.draw(st.sets(st.sampled_from(replica.runs)))
    if kept := retention.reasons_to_stay(chosen):
        with pytest.raises(mls.NotDeletable, match="was resumed from it"):
            delete_runs(retention, chosen)
        chosen -= kept.keys()
    planned = [garbage.usage() for garbage in retention.find_garbage(chosen)]
    delete_runs(retention, chosen)
    assert [garbage.usage() for garbage in retention.find_garbage()] == planned
    collect_garbage(retention)
    stay = set(replica.runs) - chosen
    replica.check(stay)
    assert compared in chosen or replica.facts(compared) == facts


@of_replica
def test_a_run_can_be_resumed_when_all_others_are_gone(
    replica: Replica, history: History, tmp_path: Path
) -> None:
    failed = tuple(history.recorded["failed_local"].run.split("/"))
    retention = replica.put_back()
    delete_runs(retention, [run for run in replica.runs if run != failed])
    collect_garbage(retention)
    flows = Flows(Cli(replica.project, tmp_path))
    flows.mend()
    resumed = flows.flow("local", "FailingFlow", "resume", "--origin-run-id", failed[1])
    assert resumed.status == 0, resumed.output


KILLED = """
import sys, time
import metaflow_local_service as mls
model = mls.Model(mls.Store(sys.argv[1]), lambda: time.time() + 10 * 86_400)
retention = mls.Retention(model)
runs = [tuple(name.split("/")) for name in sys.argv[2:]]
retention.reasons_to_stay(runs)
print("ready", flush=True)
for _ in retention.delete_runs(runs):
    pass
for garbage in retention.find_garbage():
    for _ in retention.remove_garbage(garbage):
        pass
print("done", flush=True)
"""


@of_replica
def test_a_kill_at_any_moment_of_a_deletion_leaves_runs_whole_or_gone(replica: Replica) -> None:
    """As often as KILLS says; with -s, prints in how many a run was being removed."""
    kills, halves, ended = int(os.environ.get("KILLS", "2")), 0, 0
    folder = replica.project / ".metaflow"
    for _ in range(kills):
        retention = replica.put_back()
        chosen = deletable_runs(random.sample(replica.runs, len(replica.runs) // 2), retention)
        names = ["/".join(run) for run in chosen]
        command = [sys.executable, "-c", KILLED, str(replica.project), *names]
        environment = {**os.environ, "PYTHONPATH": str(MODULE.parent)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        ended += process.communicate()[0] == b"done\n"
        gone = {run for run in replica.runs if not folder.joinpath(*run).exists()}
        assert gone <= chosen
        present = replica.present()
        whole = {
            p for p in replica.files if p.parts[0] == ".metaflow" and "mf.cards" not in p.parts
        }
        assert {p for p in whole if replica.run_of(p) not in (None, *gone)} <= present
        halves += any(folder.glob("*.trash/*"))
        collect_garbage(retention_much_later(replica.project))
        replica.check(set(replica.runs) - gone)
    print(f"{kills} kills, {halves} of them while a run was removed, {ended} after the end")


@of_replica
def test_sizes_are_those_that_du_reports(replica: Replica) -> None:
    retention = replica.put_back()
    told = subprocess.check_output(["du", "-sk", replica.project / ".metaflow"], text=True)
    total = retention.measure_all().bytes
    assert total == pytest.approx(int(told.split()[0]) * 1024, rel=0.05)
    flows = list(retention.measure_flows(retention.flow_folders()))
    assert sum(flow.held.bytes for flow in flows) == pytest.approx(total, rel=0.05)
    assert {flow.unreferenced.files for flow in flows} == {0}
    runs = list(retention.measure_runs("FailingFlow"))
    assert [run.ids for run in runs] == [r for r in replica.runs if r[0] == "FailingFlow"][::-1]
    assert all(run.own.bytes <= run.only.bytes <= run.own.bytes + run.data.bytes for run in runs)


# -- what stays ------------------------------------------------------------------------------------


def test_runs_are_deleted_all_or_none(store: mls.Store, api: Api) -> None:
    first, second = create_ended_run(api), create_ended_run(api)
    living = tuple(create_living_run(api).split("/")[2::2])
    task = f"/flows/Flow/runs/{second[1]}/steps/end/tasks/1"
    told = [("origin-run-id", first[1]), ("origin-task-id", "1")]
    for step in (task, api.new_task(api.new_step(task.split("/steps")[0]))):
        api.post(f"{step}/metadata", [metadatum(name, value) for name, value in told])
    retention = mls.Retention(mls.Model(store))
    before = all_paths(Path(store.folder))
    for runs, error in (
        ([second, living], mls.NotDeletable),
        ([first], mls.NotDeletable),
        ([second, ("Flow", "1")], mls.NotFound),
        ([second, ("None", "1")], mls.NotFound),
    ):
        with pytest.raises(error):
            delete_runs(retention, runs)
    assert all_paths(Path(store.folder)) == before
    delete_runs(retention, [first, second, first])
    assert [run["run_number"] for run in store.runs(("Flow",))] == [int(living[1])]


@pytest.mark.parametrize("has_begun", [False, True])  # about to start, or computing in silence
def test_a_run_of_a_client_without_heartbeats_stays_until_it_is_silent_for_a_day(
    store: mls.Store, api: Api, has_begun: bool
) -> None:
    api.post("/flows/Flow")
    run = api.new_run("/flows/Flow")
    if has_begun:
        task = api.new_task(api.new_step(run))
        assert api.post(f"{task}/metadata", [metadatum("attempt", "0")]).status == 200
    late = [
        mls.Retention(mls.Model(store, lambda hours=hours: time.time() + hours * 3600))
        for hours in (0, 2, 23, 25)
    ]
    for retention in late[:-1]:
        with pytest.raises(mls.NotDeletable, match=r"may go on|is running"):
            delete_runs(retention, [tuple(ids_in(run))])
    delete_runs(late[-1], [tuple(ids_in(run))])
    assert api.get(run).status == 404


def test_a_run_with_the_name_of_the_artifacts_folder_is_not_taken_for_it(
    store: mls.Store, api: Api
) -> None:
    run = create_ended_run(api)
    sha = store_value(store, "value")["sha"]
    refer(store, run, sha)
    artifacts = Path(store.folder, "Flow", "data")  # earlier versions of the service took that name
    shutil.copytree(run_folder(store, run), artifacts, dirs_exist_ok=True)
    assert api.request("DELETE", "/flows/Flow/runs/data").status == 409
    assert blob_path(store, sha).exists()


@pytest.mark.parametrize("name", ["data", "latest_run"])
def test_a_run_does_not_take_a_name_that_metaflow_uses_itself(api: Api, name: str) -> None:
    api.post("/flows/Flow")
    refused = api.request("POST", "/flows/Flow/run", {"run_number": name})
    assert (refused.status, name in refused.json["message"]) == (400, True)


def test_a_blob_stays_for_a_day_and_while_a_run_of_its_flow_lives(
    store: mls.Store, api: Api
) -> None:
    create_ended_run(api)
    path = blob_path(store, store_value(store, "value")["sha"])
    assert collect_garbage(mls.Retention(mls.Model(store))) == 0
    os.utime(path, (1, 1))
    living = create_living_run(api)
    assert collect_garbage(mls.Retention(mls.Model(store))) == 0
    end_task(api, api.new_task(api.new_step(living, "end")))
    assert collect_garbage(mls.Retention(mls.Model(store))) == 1 and not path.exists()


def test_a_blob_stays_when_a_run_begins_after_the_references_were_read(
    store: mls.Store, api: Api, project: Path
) -> None:
    create_ended_run(api)
    path = blob_path(store, store_value(store, "value")["sha"])
    retention = retention_much_later(project)
    (garbage,) = retention.find_garbage()
    create_ended_run(api)
    assert list(retention.remove_garbage(garbage)) == [] and path.exists()
    assert collect_garbage(retention) == 1


@pytest.mark.parametrize(
    "value", [{"deep": ["see ", {1: "local:///x/{}"}]}, "{}", b"\0{}", ["0" * 9 + "{}" + "f" * 9]]
)
def test_a_blob_stays_whose_digest_stands_in_a_value(
    store: mls.Store, api: Api, project: Path, value: object
) -> None:
    run = create_ended_run(api)
    inner = store_value(store, "inner")["sha"]
    middle = store_value(store, eval(repr(value).replace("{}", inner)))["sha"]
    outer = store_value(store, ["names the middle one", middle])["sha"]
    store_value(store, "nobody's")
    refer(store, run, outer)
    assert collect_garbage(retention_much_later(project)) == 1
    assert all(blob_path(store, sha).exists() for sha in (inner, middle, outer))
    refer(store, run, outer, size=39)  # said to be too small to name anything
    assert collect_garbage(retention_much_later(project)) == 2


def test_a_digest_is_found_across_the_pieces_in_which_a_blob_is_read(
    store: mls.Store, api: Api, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mls, "BLOB_CHUNK", 50)
    run = create_ended_run(api)
    inner = store_value(store, "inner")["sha"]
    refer(store, run, store_value(store, random.randbytes(1000).hex() + " " + inner)["sha"])
    assert collect_garbage(retention_much_later(project)) == 0 and blob_path(store, inner).exists()


def test_a_value_of_hexadecimal_digits_takes_no_memory_for_each_of_them(
    store: mls.Store, api: Api, project: Path
) -> None:
    run = create_ended_run(api)
    inner = store_value(store, "inner")["sha"]
    refer(store, run, store_value(store, random.randbytes(150_000).hex() + inner)["sha"])
    retention = retention_much_later(project)
    tracemalloc.start()
    try:
        assert collect_garbage(retention) == 0 and blob_path(store, inner).exists()
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()


def test_blobs_named_by_records_stay(store: mls.Store, api: Api, project: Path) -> None:
    run = create_ended_run(api)
    package, record = store_value(store, "package")["sha"], store_value(store, "of a record")["sha"]
    task = f"/flows/Flow/runs/{run[1]}/steps/end/tasks/1"
    api.post(f"{task}/metadata", [metadatum("code-package", json.dumps({"sha": package}))])
    api.post(f"{task}/artifact", [artifact("name", sha=record)])
    assert collect_garbage(retention_much_later(project)) == 0
    delete_runs(retention_much_later(project), [run])
    assert collect_garbage(retention_much_later(project)) == 2


def test_a_run_without_a_record_keeps_its_blobs(store: mls.Store, project: Path) -> None:
    sha = store_value(store, "value")["sha"]
    task = Path(store.folder, "Flow", "1", "start", "1")
    task.mkdir(parents=True)
    (task / "0.data.json").write_text(json.dumps({"objects": {"name": sha}}))
    assert collect_garbage(retention_much_later(project)) == 0


def test_files_that_are_not_metaflows_stay(store: mls.Store, api: Api, project: Path) -> None:
    create_ended_run(api)
    sha = store_value(store, "value")["sha"]
    content = b"text of a file that was included"
    named = hashlib.sha1(content).hexdigest()
    others = [
        blob_path(store, sha).with_name("notes.txt"),
        blob_path(store, sha).with_name("f" * 41),
        blob_path(store, sha).parent.parent / "zz" / ("a" * 40),
        project / "data" / "Flow" / ("b" * 40),  # which holds something else
        project / "data" / "Other" / named,
        project / ".metaflow" / "mf.cards" / "Flow" / "runs" / "1" / "card.html",
    ]
    included = [project / "data" / "Flow" / named, project / ".metaflow" / "data" / "Flow" / named]
    for path in (*others, *included):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content))
    Path(f"{blob_path(store, sha)}_meta").write_text("{}")
    assert collect_garbage(retention_much_later(project)) == 3
    assert all(path.exists() for path in others)
    assert not any(path.exists() for path in (*included, Path(f"{blob_path(store, sha)}_meta")))


def test_a_meta_file_that_was_left_alone_goes(store: mls.Store, api: Api, project: Path) -> None:
    create_ended_run(api)
    path = blob_path(store, store_value(store, "value")["sha"])
    path.rename(f"{path}_meta")
    assert collect_garbage(retention_much_later(project)) == 1 and not Path(f"{path}_meta").exists()


def test_no_link_is_followed(store: mls.Store, api: Api, project: Path) -> None:
    precious = project / "precious"
    (precious / "ab").mkdir(parents=True)
    (precious / "ab" / ("ab" * 20)).touch()
    run, behind_link = create_ended_run(api), create_ended_run(api)
    (run_folder(store, run) / "link").symlink_to(precious)
    moved = project / "elsewhere"
    run_folder(store, behind_link).rename(moved)
    run_folder(store, behind_link).symlink_to(moved)
    reply = api.request("DELETE", f"/flows/Flow/runs/{behind_link[1]}")
    assert (reply.status, "symbolic link" in reply.json["message"]) == (409, True)
    assert moved.exists()
    sha = store_value(store, "value")["sha"]
    (found,) = retention_much_later(project).find_garbage()
    assert found.size() == 0 and "is a symbolic link" in found.doubt
    run_folder(store, behind_link).unlink()
    assert api.request("DELETE", f"/flows/Flow/runs/{run[1]}").status == 200
    blob_path(store, sha).parent.with_name("ab").symlink_to(precious / "ab")
    assert collect_garbage(retention_much_later(project)) == 1
    assert (precious / "ab" / ("ab" * 20)).exists()


@pytest.mark.parametrize("kept", ["card.html", "latest_run"])
def test_an_interrupted_deletion_is_finished_by_the_next_one(
    store: mls.Store, api: Api, project: Path, kept: str
) -> None:
    first, second = create_ended_run(api), create_ended_run(api)
    card = Path(store.folder, "mf.cards", *first[:1], "runs", first[1], "card.html")
    card.parent.mkdir(parents=True)
    card.touch()
    latest = Path(store.folder, "Flow", "latest_run")
    latest.write_text(first[1])
    (Path(store.folder) / mls.TRASH_DIR).mkdir()
    run_folder(store, first).rename(Path(store.folder, mls.TRASH_DIR, f"{mls.TRASH_ENTRY}1"))
    (Path(store.folder) / mls.TRASH_DIR / f"{mls.TRASH_ENTRY}2").mkdir()
    collect_garbage(retention_much_later(project))
    assert not card.exists() and latest.read_text() == second[1]
    assert os.listdir(Path(store.folder) / mls.TRASH_DIR) == []
    delete_runs(retention_much_later(project), [second])
    assert not latest.exists() and store.flow(("Flow",)) is not None


def test_cards_in_another_root_go_unless_the_run_is_there_too(
    store: mls.Store, api: Api, project: Path
) -> None:
    runs = [create_ended_run(api), create_ended_run(api)]
    other = project / "sub" / ".metaflow"
    cards = [other / "mf.cards" / "Flow" / "runs" / run[1] / "card.html" for run in runs]
    for card in cards:
        card.parent.mkdir(parents=True)
        card.touch()
    (other / "Flow" / runs[1][1]).mkdir(parents=True)
    mls.note_card_root(store.folder, str(project / "sub"))
    delete_runs(mls.Retention(mls.Model(store)), runs)
    assert [card.exists() for card in cards] == [False, True]


def test_roots_with_cards_are_noted_by_several_commands_at_once(store: mls.Store) -> None:
    file = Path(store.folder, mls.CARD_ROOTS_FILE)
    file.write_text('["/one/.metaflow", 1, "/two/.metaflow"]\n"/three"\n["/thr')
    folders = [f"/none/{number}" for number in range(200)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(functools.partial(mls.note_card_root, store.folder), [*folders, *folders]))
    noted = mls.read_card_roots(store.folder)
    assert len(noted) == len(set(noted)) == mls.MOST_CARD_ROOTS
    file.write_text('["/one/.metaflow", 1, "/two/.metaflow"]\n"/three"\n["/thr')
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(functools.partial(mls.note_card_root, store.folder), folders[:90]))
    noted = mls.read_card_roots(store.folder)
    assert {*noted} == {f"{folder}/.metaflow" for folder in ("/one", "/two", *folders[:90])}


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_cards_are_found_in_the_root_alone_where_no_other_can_be_noted(
    store: mls.Store, project: Path, make: Any
) -> None:
    make(project / ".metaflow" / mls.CARD_ROOTS_FILE)
    (project / "sub" / ".metaflow").mkdir(parents=True)
    before = os.listdir(store.folder)
    mls.note_card_root(store.folder, str(project / "sub"))
    assert mls.read_card_roots(store.folder) in ([], [str(project / "sub" / ".metaflow")])
    assert os.listdir(store.folder) == before


# -- deleting where that is difficult --------------------------------------------------------------


def fill(disk: Path) -> Path:
    """Fill a disk, and return the file that does."""
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as f:
        while True:
            f.write(b"x" * 4096)
    return ballast


def test_a_run_is_deleted_on_a_full_disk(disk: Path) -> None:
    with serve(mls.Store(str(disk))) as client:
        first, second = create_ended_run(client), create_ended_run(client)
        latest = disk / ".metaflow" / "Flow" / "latest_run"
        latest.write_text(second[1])
        fill(disk)
        assert client.request("DELETE", f"/flows/Flow/runs/{second[1]}").status == 200
        assert latest.read_text() == first[1]


def test_a_run_is_deleted_where_no_folder_can_be_made(
    store: mls.Store, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create_ended_run(api)

    def make_no_folder(parent: int, name: str) -> bool:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)

    monkeypatch.setattr(mls, "make_folder", make_no_folder)
    delete_runs(mls.Retention(mls.Model(store)), [run])
    assert sorted(os.listdir(Path(store.folder, "Flow"))) == ["_meta"]
    assert os.listdir(Path(store.folder, "Flow", "_meta")) == ["_self.json"]


def test_what_cannot_be_removed_is_named_and_holds_up_nothing_else(
    store: mls.Store, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [create_ended_run(api) for _ in range(3)]
    files = [next(run_folder(store, run).glob("*/*/_meta/_self.json")) for run in runs[:2]]
    foreign = {file.stat().st_ino for file in files}  # of another user's, for example
    unlink = os.unlink

    def unlink_own(path: str, **folder: Any) -> None:
        if os.stat(path, **folder, follow_symlinks=False).st_ino in foreign:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        unlink(path, **folder)

    monkeypatch.setattr(os, "unlink", unlink_own)
    retention = mls.Retention(mls.Model(store))
    for run in runs[:2]:
        with pytest.raises(PermissionError) as refused:
            delete_runs(retention, [run])
        assert f"/{mls.TRASH_DIR}/" in str(refused.value.filename)
        assert store.run(run) is None
    sentences = retention.finish_deletions()
    ends = [sentence.partition(" cannot be ")[2] for sentence in sentences]
    assert ends == ["removed: Permission denied"] * 2
    foreign.clear()
    assert retention.finish_deletions() == []
    assert not any(Path(store.folder).glob("*.trash/*"))


def test_concurrent_deletions_delete_a_run_once(store: mls.Store, api: Api) -> None:
    runs = [create_ended_run(api) for _ in range(5)]

    def delete_each() -> int:
        retention, deleted = mls.Retention(mls.Model(store)), 0
        for run in runs:
            with contextlib.suppress(mls.NotFound):
                deleted += len(list(retention.delete_runs([run])))
            retention.finish_deletions()
        return deleted

    with ThreadPoolExecutor(4) as pool:
        deleted = [pool.submit(delete_each) for _ in range(4)]
        assert sum(each.result() for each in deleted) == len(runs)
    assert list(store.runs(("Flow",))) == [] and not any(Path(store.folder).glob("*.trash/*"))


# ==================================================================================================
# API
# ==================================================================================================

# The routes of the metadata service: records field by field, statuses, lists and pages, bodies, and
# what a disk that is full or gone answers. Through a service in this process (`api`). What a filter
# or a cursor means is a matter of Queries; what bytes are a request is one of the Server.


def is_recent(ts: int, unit: int) -> bool:
    """Whether a time stamp is one of the last minute."""
    return time.time() - 60 < ts / unit <= time.time() + 1


RUN_SHAPE = "flow_id run_number user_name ts_epoch tags system_tags last_heartbeat_ts"
STEP_SHAPE = "flow_id run_number step_name user_name ts_epoch tags system_tags"
TASK_SHAPE = (
    "flow_id run_number step_name task_id user_name ts_epoch tags system_tags last_heartbeat_ts"
)
METADATUM_SHAPE = (
    "id flow_id run_number step_name task_id field_name value type user_name ts_epoch tags "
    "system_tags"
)
ARTIFACT_SHAPE = (
    "flow_id run_number step_name task_id name location ds_type sha type content_type user_name "
    "attempt_id ts_epoch tags system_tags"
)


def stable_values(record: dict[str, Any], shape: str) -> list[Any]:
    """The values of a record but for its times and its metadatum id; its keys are those given."""
    assert list(record) == shape.split()
    assert is_recent(record["ts_epoch"], 1000)
    return [record[key] for key in record if key not in ("ts_epoch", "last_heartbeat_ts", "id")]


def test_a_flow_has_its_fields_in_their_order(api: Api) -> None:
    body = {"user_name": "x", "tags": ["t"], "system_tags": ["s"], "flow_id": "other", "odd": 1}
    flow = api.post("/flows/Flow", body).json
    shape = "flow_id user_name ts_epoch tags system_tags"
    assert stable_values(flow, shape) == ["Flow", "x", ["t"], ["s"]]
    assert [api.get("/flows/Flow").json] == [flow] == api.get("/flows").json
    assert (api.post("/flows/Flow").status, api.get("/flows/None").status) == (409, 404)


@pytest.mark.parametrize("own_id", [None, "argo-1"])
def test_runs_steps_and_tasks_have_their_fields_in_their_order(
    api: Api, own_id: str | None
) -> None:
    flow = api.new_flow()
    body = {"user_name": "x", "tags": ["t"], "system_tags": ["s"], "ts_epoch": 1}
    run = api.post(f"{flow}/run", {**body, "run_number": own_id}).json
    number = run["run_number"]
    assert number == own_id or isinstance(number, int)
    assert stable_values(run, RUN_SHAPE) == ["Flow", number, "x", ["t"], ["s"]]
    path = f"{flow}/runs/{number}"

    other = {"user_name": "y", "tags": ["not shown"], "system_tags": None, "run_number": 5}
    step = api.post(f"{path}/steps/start/step", other).json
    assert stable_values(step, STEP_SHAPE) == ["Flow", str(number), "start", "y", ["t"], ["s"]]

    task = api.post(f"{path}/steps/start/task", {**other, "task_id": own_id}).json
    expected = ["Flow", number, "start", own_id or 1, "y", ["t"], ["s"]]
    assert stable_values(task, TASK_SHAPE) == expected

    # The heartbeat of a task is one of its run, too.
    assert is_recent(task["last_heartbeat_ts"], 1)
    (listed_run,) = api.get(f"{flow}/runs").json
    assert is_recent(listed_run["last_heartbeat_ts"], 1)
    assert {**listed_run, "last_heartbeat_ts": run["last_heartbeat_ts"]} == run
    assert api.get(path).json == listed_run
    assert api.get(f"{path}/steps").json == [step] == [api.get(f"{path}/steps/start").json]
    below = f"{path}/steps/start/tasks"
    assert api.get(below).json == [task] == [api.get(f"{below}/{task['task_id']}").json]


def test_metadata_has_its_fields_in_their_order(api: Api) -> None:
    task = api.new_task_of_its_own()
    number = int(task.split("/")[4])
    row = metadatum("f", "v", user_name="x", system_tags=["s"], ts_epoch=1, flow_id="other")
    assert api.post(f"{task}/metadata", [row]).json == {"metadata_created": 1}
    (read,) = api.get(f"{task}/metadata").json
    expected = ["Flow", number, "start", 1, "f", "v", "f", "x", ["attempt_id:0"], ["s"]]
    assert stable_values(read, METADATUM_SHAPE) == expected
    assert isinstance(read["id"], int)


def test_an_artifact_has_its_fields_in_their_order(api: Api) -> None:
    task = api.new_task_of_its_own()
    number = int(task.split("/")[4])
    row = artifact("x", tags=["not shown"])
    assert api.post(f"{task}/artifact", [row, row]).json == {"artifacts_created": 1}
    read = api.get(f"{task}/artifacts/x").json
    own = ["x", ":root:/somewhere/x", "local", "sha-of-x-0", "metaflow.artifact", "gzip+pickle-v4"]
    expected = ["Flow", number, "start", 1, *own, "tester", 0, [], []]
    assert stable_values(read, ARTIFACT_SHAPE) == expected
    run = f"/flows/Flow/runs/{number}"
    for path in (f"{task}/artifacts", f"{task}/attempt/0/artifacts", f"{run}/artifacts"):
        assert api.get(path).json == [read]
    assert api.get(f"{run}/steps/start/artifacts").json == [read]
    assert api.get(f"{task}/artifacts/x/attempt/0").json == read


def test_missing_fields_have_defaults(api: Api) -> None:
    flow = api.post("/flows/Flow", {}).json
    run = api.post("/flows/Flow/run", {}).json
    path = f"/flows/Flow/runs/{run['run_number']}"
    step = api.post(f"{path}/steps/s/step", {}).json
    task = api.post(f"{path}/steps/s/task", {}).json
    assert [made["user_name"] for made in (flow, run, step, task)] == [None, None, "", None]
    for made in (flow, run, step, task):
        assert (made["tags"], made["system_tags"]) == (None, None)
    api.post(f"{path}/steps/s/tasks/1/metadata", [{}])
    (read,) = api.get(f"{path}/steps/s/tasks/1/metadata").json
    assert [read[key] for key in METADATUM_SHAPE.split()[5:9]] == [" ", " ", " ", None]
    assert (read["tags"], read["system_tags"]) == (None, None)
    api.post(f"{path}/steps/s/tasks/1/artifact", [{}])
    read = api.get(f"{path}/steps/s/tasks/1/artifacts/%20").json
    assert [read[key] for key in ARTIFACT_SHAPE.split()[4:12]] == [" "] * 7 + [0]


def test_a_verified_owner_is_shown_but_in_the_first_answer(api: Api) -> None:
    flow = api.new_flow()
    other = api.get(api.new_run(flow, user_name="x", system_tags=["user:y"])).json
    run = api.post(f"{flow}/run", {"user_name": "x", "system_tags": ["user:x"]}).json
    assert "user" not in (run.keys() | other.keys())
    for query, shape in (("user=x", RUN_SHAPE), ("user=x&status=failed", RUN_SHAPE + " status")):
        (verified,) = api.get(f"{flow}/runs?{query}").json
        assert list(verified) == [*shape.split(), "user"]
        assert verified["user"] == "x"


def test_steps_tasks_and_artifacts_show_the_tags_of_their_run(api: Api) -> None:
    task = api.new_task_of_its_own()
    step, run = task.rsplit("/", 2)[0], task.rsplit("/", 4)[0]
    api.post(f"{task}/artifact", [artifact("x")])
    api.post(f"{task}/metadata", [metadatum("f")])
    assert api.patch(f"{run}/tag/mutate", {"tags_to_add": ["new"]}).json == {"tags": ["new"]}
    one_by_one = [step, task, f"{task}/artifacts/x", f"{task}/artifacts/x/attempt/0", run]
    assert [api.get(path).json["tags"] for path in one_by_one] == [["new"]] * 5
    listings = [f"{run}/steps", f"{step}/tasks", f"{run}/artifacts", f"{task}/attempt/0/artifacts"]
    assert [api.get(path).json[0]["tags"] for path in listings] == [["new"]] * 4
    assert api.get(f"{task}/metadata").json[0]["tags"] == ["attempt_id:0"]


# -- what is not there, or not right ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/flows/None/run", {}, 404),
        ("/flows/None/runs/1/steps/s/step", {}, 404),
        ("{flow}/runs/1/steps/s/step", {}, 404),
        ("{flow}/runs/1/steps/s/task", {}, 404),
        ("{run}/steps/none/task", {}, 404),
        ("{run}/steps/none/task", {"task_id": "x"}, 404),
        ("{run}/steps/none/tasks/1/metadata", [{}], 400),
        ("{step}/tasks/7/metadata", [{}], 400),
        ("{step}/tasks/7/metadata", [], 400),
        ("{flow}/runs/1/steps/s/tasks/1/artifact", [{}], 400),
        ("{step}/tasks/7/artifact", [{}], 400),
        ("{flow}/runs/1/heartbeat", {}, 404),
        ("/flows/None/runs/1/steps/s/tasks/1/heartbeat", {}, 404),
        ("{flow}/run", {"run_number": "1"}, 400),
        ("{flow}/run", {"run_number": 0}, 400),
        ("{flow}/run", {"run_number": ""}, 400),
        ("{flow}/run", {"run_number": "a/b"}, 400),
        ("{flow}/run", {"user_name": 5}, 400),
        ("{flow}/run", {"tags": "red"}, 400),
        ("{flow}/run", {"system_tags": [1]}, 400),
        ("{flow}/run", [], 400),
        ("{step}/task", {"task_id": "12"}, 400),
        ("{step}/task", {"task_id": ["x"]}, 400),
        ("/flows/..", {}, 400),
        ("/flows/a%2Fb", {}, 400),
        ("/flows/" + "x" * 256, {}, 400),
        ("{run}/steps/_meta/step", {}, 400),
        ("{flow}", {}, 409),
        ("{step}/step", {}, 409),
    ],
)
def test_a_refused_post_is_one_sentence_and_leaves_nothing(
    api: Api, project: Path, path: str, body: Any, status: int
) -> None:
    flow = api.new_flow()
    run = api.new_run(flow)
    step = api.new_step(run)
    before = all_paths(project)
    reply = api.post(path.format(flow=flow, run=run, step=step), body)
    assert (reply.status, list(reply.json)) == (status, ["message"])
    assert all_paths(project) == before


@pytest.mark.parametrize(
    "missing",
    [
        "/flows/None",
        "/flows/File",
        "{flow}/runs/1",
        "{flow}/runs/File",
        "{run}/steps/none",
        "{run}/steps/File",
    ],
)
def test_a_missing_object_is_a_404_and_lists_below_it_are_empty(
    api: Api, store: mls.Store, missing: str
) -> None:
    flow = api.new_flow()
    path = missing.format(flow=flow, run=api.new_run(flow))
    place = Path(store.folder, *ids_in(path))
    if place.name == "File":  # of somebody else's
        place.touch()
    reply = api.get(path)
    assert (reply.status, list(reply.json)) == (404, ["message"])
    depth = path.count("/") // 2
    for below in ("/runs", "/runs/1/steps", "/runs/1/metadata", "/runs/1/artifacts") * (depth == 1):
        assert api.get(path + below).json == []
    for below in ("/steps", "/metadata", "/artifacts") * (depth == 2):
        assert api.get(path + below).json == []
    for below in ("/tasks", "/artifacts", "/filtered_tasks", "/tasks/1/metadata") * (depth == 3):
        assert api.get(path + below).json == []
    for below in ("/tasks/1", "/tasks/1/artifacts/x", "/tasks/1/artifacts/x/attempt/0"):
        assert api.get(path + below).status == 404


BAD_ROWS = {
    "metadata": [
        {"field_name": 5},
        {"field_name": None},
        {"value": {"a": 1}},
        {"value": [1]},
        {"tags": [1]},
        {"value": "a\0b"},
        "row",
        None,
    ],
    "artifact": [
        {"name": None},
        {"location": 5},
        {"sha": []},
        {"attempt_id": -1},
        {"attempt_id": 32768},
        {"attempt_id": 1.5},
        {"attempt_id": True},
        {"attempt_id": None},
        {"user_name": {}},
        "row",
    ],
}


@pytest.mark.parametrize(
    ("kind", "bad"), [(kind, bad) for kind, rows in BAD_ROWS.items() for bad in rows]
)
def test_a_bulk_post_with_one_bad_row_stores_nothing(
    api: Api, project: Path, kind: str, bad: Any
) -> None:
    task = api.new_task_of_its_own()
    before = all_paths(project)
    good = {"field_name": "f", "name": "x"}
    reply = api.post(f"{task}/{kind}", [good, {**good, **bad} if isinstance(bad, dict) else bad])
    assert (reply.status, list(reply.json)) == (400, ["message"])
    assert all_paths(project) == before


def test_what_the_reference_loses_in_a_bulk_post_is_kept(api: Api) -> None:
    task = api.new_task_of_its_own()
    given = [5, True, 1.5, "", ["a", "b"], "x" * 10_000, None]
    rows = [metadatum("n" * 300, value) for value in given]
    assert api.post(f"{task}/metadata", rows).json == {"metadata_created": 7}
    read = api.get(f"{task}/metadata").json
    assert [m["value"] for m in read[::-1]] == ["5", "true", "1.5", *given[3:]]
    assert {m["field_name"] for m in read} == {"n" * 300}
    row = artifact("x", location="s3://" + "x" * 1000, sha=None, type=None, content_type=None)
    assert api.post(f"{task}/artifact", [row]).json == {"artifacts_created": 1}
    read = api.get(f"{task}/artifacts/x").json
    assert {key: read[key] for key in row} == row


@pytest.mark.parametrize("name", ["a/b", "..", "a b", "ü+é", "*", "100%", "?x=1", "#", "a\nb"])
def test_names_are_percent_encoded_in_paths(api: Api, name: str) -> None:
    task = api.new_task_of_its_own()
    api.post(f"{task}/artifact", [artifact(name), artifact("plain")])
    assert api.get(f"{task}/artifacts/{quote(name, safe='')}").json["name"] == name
    if name not in ("a/b", ".."):
        run = api.new_run(api.new_flow(name), run_number=name)
        task = api.new_task(api.new_step(run, name), task_id=name)
        read = api.get(task).json
        assert [read[key] for key in TASK_SHAPE.split()[:4]] == [name] * 4


def test_a_number_in_a_path_may_have_zeros_in_front(api: Api) -> None:
    task = api.new_task_of_its_own()
    assert api.get(task[:-1] + "001").json == api.get(task).json


# -- attempts --------------------------------------------------------------------------------------


def test_the_artifacts_of_the_latest_attempt_are_those_that_count(api: Api) -> None:
    task = api.new_task_of_its_own()
    step, run = task.rsplit("/", 2)[0], task.rsplit("/", 4)[0]
    api.post(f"{task}/artifact", [artifact("x"), artifact("name"), artifact("once")])
    api.post(f"{task}/artifact", [artifact("x", 2), artifact("y", 2)])
    for path in (f"{task}/artifacts", f"{step}/artifacts", f"{run}/artifacts"):
        for query in ("", "?_limit=9"):
            found = api.get(path + query).json
            assert [(a["name"], a["attempt_id"]) for a in found] == [("y", 2), ("x", 2)]
    assert api.get(f"{task}/artifacts/x").json["sha"] == "sha-of-x-2"
    assert api.get(f"{task}/artifacts/once").status == 404  # an earlier attempt has it
    assert api.get(f"{task}/artifacts/once/attempt/0").json["name"] == "once"
    assert api.get(f"{task}/artifacts/x/attempt/0").json["sha"] == "sha-of-x-0"
    assert api.get(f"{task}/artifacts/x/attempt/1").status == 404
    assert len(api.get(f"{task}/attempt/0/artifacts").json) == 3
    assert api.get(f"{task}/attempt/99999/artifacts").json == []
    assert api.get(f"{task}/attempt/x/artifacts").status == 400
    assert api.get(f"{task}/artifacts/x/attempt/-1").status == 400


def test_tasks_of_one_name_have_latest_attempts_of_their_own(api: Api) -> None:
    run = api.new_run(api.new_flow())
    for step, attempt in (("a", 0), ("b", 3)):
        task = api.new_task(api.new_step(run, step), task_id="same")
        api.post(f"{task}/artifact", [artifact("x", attempt)])
        api.post(f"{task}/metadata", [metadatum("f", step, attempt)])
    found = api.get(f"{run}/artifacts").json
    assert {(a["step_name"], a["attempt_id"]) for a in found} == {("a", 0), ("b", 3)}
    assert [m["value"] for m in api.get(f"{run}/metadata").json] == ["b", "a"]


# -- heartbeats, tags, filtered tasks --------------------------------------------------------------


def test_a_heartbeat_is_answered_with_json_in_a_json_string(api: Api) -> None:
    task = api.new_task_of_its_own()
    for path in (task, task, task.rsplit("/", 4)[0]):  # also one that comes early
        reply = api.post(f"{path}/heartbeat", b"no JSON at all")
        assert (reply.status, json.loads(reply.json)) == (200, {"wait_time_in_seconds": 10})
    assert is_recent(api.get(task).json["last_heartbeat_ts"], 1)
    assert api.post(f"{task}0/heartbeat").status == 404


@pytest.mark.parametrize(
    ("system_tags", "beats"),
    [(None, True), (["metaflow_version:2.19.0"], True), (["metaflow_version:2.0.1"], False)],
)
def test_to_make_a_run_or_task_is_a_heartbeat_of_a_client_that_sends_them(
    api: Api, system_tags: list[str] | None, beats: bool
) -> None:
    flow = api.new_flow()
    run = api.post(f"{flow}/run", {"system_tags": system_tags}).json
    step = api.new_step(f"{flow}/runs/{run['run_number']}")
    task = api.post(f"{step}/task", {"system_tags": system_tags}).json
    assert [(record["last_heartbeat_ts"] is not None) for record in (run, task)] == [beats] * 2


@pytest.mark.parametrize(
    ("body", "status", "answer"),
    [
        ({"tags_to_add": ["c", "s", "a"], "tags_to_remove": ["b", "x"]}, 200, ["a", "c"]),
        ({"tags_to_add": ["b"], "tags_to_remove": ["b"]}, 200, ["a", "b"]),
        ({"tags_to_add": ["", "x" * 100_000]}, 200, ["", "a", "b", "x" * 100_000]),
        ({}, 200, ["a", "b"]),
        ({"tags_to_add": ["c"], "tags_to_remove": ["s"]}, 422, None),
        ({"tags_to_add": "c"}, 400, "tags_to_add must be a list"),
        ({"tags_to_remove": {}}, 400, "tags_to_remove must be a list"),
        ({"tags_to_add": None}, 400, "tags_to_add must be a list"),
        ({"tags_to_add": ["c", 1]}, 400, "All tag values must be strings"),
        ([], 400, None),
    ],
)
def test_tags_are_changed_as_asked_or_not_at_all(
    api: Api, body: Any, status: int, answer: Any
) -> None:
    run = api.new_run(api.new_flow(), tags=["a", "b"], system_tags=["s"])
    reply = api.patch(f"{run}/tag/mutate", body)
    assert reply.status == status
    if status == 200:
        assert sorted(reply.json["tags"]) == answer == sorted(api.get(run).json["tags"])
    else:
        assert answer in (None, reply.json["message"])
        assert api.get(run).json["tags"] == ["a", "b"]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", [1, 2, 3]),
        ("?metadata_field_name=&pattern=", [1, 2, 3]),
        ("?metadata_field_name=path", [1, 2]),
        ("?metadata_field_name=Path", []),
        ("?metadata_field_name=path&pattern=w:1", [1, 2]),  # anywhere in the value
        ("?metadata_field_name=path&pattern=w:1$", [1]),
        ("?metadata_field_name=other&pattern=w:10", []),  # both in one row
        ("?pattern=W:1", []),
        ("?pattern=a,%20b", []),
        ("?pattern=%22a%22,%20%22b%22", [3]),  # a list as JSON has it
    ],
)
def test_tasks_are_found_by_their_metadata(api: Api, query: str, expected: list[int]) -> None:
    step = api.new_step(api.new_run(api.new_flow()))
    for rows in (
        [metadatum("path", "w:1"), metadatum("path", "w:1")],
        [metadatum("path", "w:10"), metadatum("other", "w:2")],
        [metadatum("stack", ["a", "b"])],
        [],
    ):
        api.post(f"{api.new_task(step)}/metadata", rows)
    spec = step[len("/flows/") :].replace("/runs/", "/").replace("/steps/", "/")
    found = api.get(f"{step}/filtered_tasks{query}").json
    assert found == [f"{spec}/{task}" for task in expected]


# -- lists and pages -------------------------------------------------------------------------------


@pytest.fixture
def lists(api: Api, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Every list that comes in pages, by path: seven records each, some equally old."""
    clock = itertools.chain.from_iterable([t] * 23 for t in itertools.count(time.time_ns(), 10**6))
    monkeypatch.setattr(time, "time_ns", lambda: next(clock))
    for n in range(6):
        api.new_flow(f"Flow{n}")
    flow = api.new_flow()
    for n in range(6):
        api.new_run(flow, run_number=f"argo-{n}" if n % 2 else None)
    run = api.new_run(flow)
    step = [api.new_step(run, f"step{n}") for n in range(7)][-1]
    for n in range(6):
        api.new_task(step, task_id=f"t{n}" if n % 2 else None)
    task = api.new_task(step)
    for n in range(7):
        api.post(f"{task}/artifact", [artifact(f"x{n}")])
        api.post(f"{task}/metadata", [metadatum(f"f{n}")])
    paths = [
        "/flows",
        f"{flow}/runs",
        f"{step}/tasks",
        f"{task}/metadata",
        f"{run}/metadata",
        f"{run}/steps",
    ]
    paths += [f"{owner}/artifacts" for owner in (task, step, run)]
    return {path: api.get(path).json for path in paths}


def fetch_pages(api: Api, path: str, limit: int) -> Iterator[list[Any]]:
    cursor = ""
    while cursor is not None:
        reply = api.get(f"{path}?_limit={limit}&_cursor={quote(cursor, safe='')}")
        assert reply.headers["x-limit"] == str(limit)
        cursor = reply.headers.get("x-next-cursor")
        yield reply.json


@pytest.mark.parametrize("limit", [1, 3, 7])
def test_the_pages_of_a_list_make_the_list(
    api: Api, lists: dict[str, list[Any]], limit: int
) -> None:
    for path, whole in lists.items():
        assert len(whole) == 7
        assert [r["ts_epoch"] for r in whole] == sorted(r["ts_epoch"] for r in whole)[::-1]
        found = list(fetch_pages(api, path, limit))
        assert [record for page in found for record in page] == whole, path
        assert len(found) == -(-7 // limit)


def test_pages_are_complete_while_records_are_added(api: Api, lists: dict[str, list[Any]]) -> None:
    _, runs, tasks, metadata = list(lists)[:4]
    for path, add in (
        (runs, lambda: api.new_run(runs[: -len("/runs")])),
        (tasks, lambda: api.new_task(tasks[: -len("/tasks")])),
        (metadata, lambda: api.post(metadata, [metadatum("new")])),
    ):
        found = []
        for page in fetch_pages(api, path, 2):
            found += page
            add()
        assert [record for record in found if record in lists[path]] == lists[path]


@in_one_store
@given(
    st.dictionaries(
        st.integers(0, 99).map(str)
        | st.sampled_from(["-1", "+5", " 7", "007"])
        | st.text("ab-+ 1é", min_size=1, max_size=3),
        st.integers(0, 3),
        max_size=12,
    ),
    st.integers(1, 4),
)
def test_the_pages_of_tasks_of_any_id_make_the_list(
    store: mls.Store, tasks: dict[str, int], limit: int
) -> None:
    step = new_task(store, new_run(store))[:3]
    shutil.rmtree(folder_of(store, (*step, "1")))
    for name, ts_epoch in tasks.items():
        path = record_file(store, (*step, name))
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"ts_epoch": ts_epoch}))
    assert_pages_make_the_list(store, mls.TASK_ORDER, lambda place: store.tasks(step, place), limit)


def assert_pages_make_the_list(
    store: mls.Store, order: Any, records: Callable[[Any], Any], limit: int
) -> None:
    whole, found, query = list(records(None)), [], [("_limit", str(limit))]
    for _ in range(len(whole) + 1):
        answer = mls.paginate(mls.Model(store), mls.Request("GET", [], query, None), order, records)
        found += json.loads(answer.content)
        cursor = dict(answer.headers).get("X-Next-Cursor")
        if cursor is None:
            break
        query = [("_limit", str(limit)), ("_cursor", cursor)]
    assert found == whole


def test_pages_make_the_list_after_local_mode_has_changed_a_run(
    store: mls.Store, local: Any
) -> None:
    """Local mode gives a run a new ts_epoch when it changes its tags."""
    for name in "abc":
        run = new_run(store, name)
        path = record_file(store, run)
        record = {**json.loads(path.read_text()), "ts_epoch": 1 + "abc".index(name)}
        path.write_text(json.dumps(record))
    os.utime(folder_of(store, run[:1]), (1e9, 1e9))  # as if the last run had come long ago
    assert [r["run_number"] for r in store.runs(run[:1])] == ["c", "b", "a"]
    local.mutate_user_tags_for_run("Flow", "b", tags_to_add=["new"])
    assert [r["run_number"] for r in store.runs(run[:1])] == ["b", "c", "a"]
    assert_pages_make_the_list(store, mls.RUN_ORDER, lambda place: store.runs(("Flow",), place), 1)


def test_a_list_is_whole_unless_a_page_or_filter_is_requested(api: Api) -> None:
    flow = api.new_flow()
    for n in range(51):
        api.new_run(flow, run_number=f"argo-{n}")
    for query, length, limit in (
        ("", 51, None),
        ("?nothing=1", 51, None),
        ("?_limit=", 50, "50"),
        ("?_cursor=", 50, "50"),
        ("?ts_epoch:gt=0", 50, "50"),
        ("?_tags:any=x", 0, "50"),
        ("?status=failed", 50, "50"),
        ("?_limit=501", 51, "500"),
        ("?_limit=2&_limit=3", 2, "2"),
    ):
        reply = api.get(f"{flow}/runs{query}")
        assert (len(reply.json), reply.headers.get("x-limit")) == (length, limit), query
        assert ("x-next-cursor" in reply.headers) == (length in (2, 50))


def test_every_list_names_the_size_of_its_pages(api: Api) -> None:
    """Else Metaflow's client asks for the whole list once more."""
    run = api.new_run(api.new_flow())
    task = api.new_task(api.new_step(run))
    for path in (
        "/flows",
        run.rpartition("/")[0],
        f"{run}/steps",
        f"{run}/metadata",
        f"{run}/artifacts",
        f"{run}/steps/start/tasks",
        f"{run}/steps/start/artifacts",
        f"{task}/metadata",
        f"{task}/artifacts",
        f"{task}/attempt/0/artifacts",
    ):
        reply = api.get(f"{path}?_limit=100&_tags:all=nobody")
        assert (reply.status, reply.headers.get("x-limit")) == (200, "100"), path


def test_filtered_lists_come_in_pages(api: Api) -> None:
    flow = api.new_flow()
    for n in range(6):
        run = api.new_run(flow, run_number=f"argo-{n}", tags=["odd"] * (n % 2))
    for query in ("_tags=odd", "status=failed&_tags=odd"):
        first = api.get(f"{flow}/runs?{query}&_limit=2")
        cursor = quote(first.headers["x-next-cursor"], safe="")
        second = api.get(f"{flow}/runs?{query}&_limit=2&_cursor={cursor}")
        assert [run["run_number"] for run in first.json] == ["argo-5", "argo-3"]
        assert [run["run_number"] for run in second.json] == ["argo-1"]
        assert "x-next-cursor" not in second.headers
    step = api.new_step(run)
    for n in range(3):
        api.new_task(step, user_name=f"user{n}")
    found = api.get(f"{step}/tasks?user_name:ne=user1&step_name=ignored")
    assert ([t["task_id"] for t in found.json], found.headers["x-limit"]) == ([3, 1], "50")


def test_runs_are_found_by_their_status(api: Api) -> None:
    flow = api.new_flow()
    for name, value in (("good", "True"), ("bad", "False"), ("odd", "perhaps"), ("new", None)):
        task = api.new_task(api.new_step(api.new_run(flow, run_number=name), "end"))
        api.post(f"{task}/metadata", [metadatum("attempt", "0")])
        api.post(f"{task}/metadata", [metadatum("attempt_ok", value)] if value else [])
        if name == "odd":
            api.post(f"{task}/heartbeat")
    for status, expected in (
        ("completed", ["good"]),
        ("running", ["new", "odd"]),
        ("failed", ["bad"]),
    ):
        found = api.get(f"{flow}/runs?status={status}").json
        assert [(run["run_number"], run["status"]) for run in found] == [
            (name, status) for name in expected
        ]


@pytest.mark.parametrize(
    "query",
    [
        "/runs?_limit=0",
        "/runs?_cursor=any_cursor",
        "/runs?ts_epoch=x",
        "/runs?status=odd",
        "/runs?_tags:x=y",
        "/runs/1/steps/s/filtered_tasks?pattern=(",
    ],
)
def test_an_invalid_query_is_a_400(api: Api, query: str) -> None:
    reply = api.get(api.new_flow() + query)
    assert (reply.status, list(reply.json)) == (400, ["message"])


# -- routes ----------------------------------------------------------------------------------------


def test_every_route_of_the_protocol_answers(api: Api) -> None:
    task = api.new_task_of_its_own()
    flow, step, run = "/flows/Flow", task.rsplit("/", 2)[0], task.rsplit("/", 4)[0]
    api.post(f"{task}/artifact", [artifact("x")])
    gets = ["/ping", "/version", "/healthcheck", "/flows", flow, f"{flow}/runs", run]
    gets += [f"{run}/{of_run}" for of_run in ("metadata", "artifacts", "steps")]
    gets += [step, f"{step}/artifacts", f"{step}/tasks", f"{step}/filtered_tasks", task]
    gets += [f"{task}/{of_task}" for of_task in ("metadata", "artifacts", "artifacts/x")]
    gets += [f"{task}/artifacts/x/attempt/0", f"{task}/attempt/0/artifacts"]
    for path in gets:
        got, head = api.get(path), api.request("HEAD", path)
        assert (got.status, head.status, head.content) == (200, 200, b""), path
        kind = "text/plain" if path in ("/ping", "/version") else "application/json"
        assert got.headers["content-type"].startswith(kind)
        for header in ("content-length", "content-type", "metadata_service_version"):
            assert head.headers[header] == got.headers[header]
    for path, body in {
        f"{run}/heartbeat": {},
        f"{task}/heartbeat": {},
        f"{task}/metadata": [],
        f"{task}/artifact": [],
    }.items():
        assert api.post(path, body).status == 200


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/flows", {"GET", "HEAD"}),
        ("POST", "/ping", {"GET", "HEAD"}),
        ("PUT", "/flows/F", {"GET", "HEAD", "POST"}),
        ("GET", "/flows/F/run", {"POST"}),
        ("HEAD", "/flows/F/runs/1/steps/s/task", {"POST"}),
        ("POST", "/flows/F/runs/1/tag/mutate", {"PATCH"}),
        ("OPTIONS", "/flows/F/runs/1/steps/s/tasks/1/metadata", {"GET", "HEAD", "POST"}),
    ],
)
def test_a_405_lists_the_allowed_methods(
    api: Api, method: str, path: str, allowed: set[str]
) -> None:
    reply = api.request(method, path)
    assert reply.status == 405
    assert set(reply.headers["allow"].split(", ")) == allowed


@pytest.mark.parametrize(
    "path", ["/", "/nothing", "/flows/", "/flows//runs", "//ping", "/ping/", "/Ping", "/auth/token"]
)
def test_an_unknown_path_is_a_404(api: Api, path: str) -> None:
    reply = api.get(path)
    assert (reply.status, list(reply.json)) == (404, ["message"])


def test_the_version_is_that_of_the_protocol(api: Api) -> None:
    assert api.get("/version").content == b"2.6.1"


def test_the_health_is_whether_records_can_be_written(api: Api, project: Path) -> None:
    assert api.get("/healthcheck").json == {"status": "UP"}
    shutil.rmtree(project / ".metaflow")
    ill = api.get("/healthcheck")
    assert (ill.status, list(ill.json)) == (503, ["message"])
    (project / ".metaflow").mkdir()
    assert api.get("/healthcheck").status == 200


def test_a_run_is_deleted_over_http(store: mls.Store, api: Api) -> None:
    run, other = create_ended_run(api), create_ended_run(api)
    path = f"/flows/Flow/runs/{run[1]}"
    files = sum(1 for p in all_paths(run_folder(store, run)) if p.is_file())
    reply = api.request("DELETE", path)
    assert reply.status == 200 and reply.json.keys() == {"runs", "files", "bytes"}
    assert (reply.json["runs"], reply.json["files"], reply.json["bytes"] > 0) == (1, files, True)
    assert [api.get(path).status, api.request("DELETE", path).status] == [404, 404]
    assert [row["run_number"] for row in api.get("/flows/Flow/runs").json] == [int(other[1])]
    living = create_living_run(api)
    refused = api.request("DELETE", living)
    assert (refused.status, "is running" in refused.json["message"]) == (409, True)


# -- bodies, as they are parsed --------------------------------------------------------------------

BAD_BODIES = {
    "half": b"{",
    "form": b"user_name=me",
    "byte order mark": "\ufeff{}".encode(),
    "UTF-16": "{}".encode("utf-16"),
    "invalid UTF-8": b'{"user_name": "\xff"}',
    "NUL": b'{"user_name": "\0"}',
    "escaped NUL": b'{"user_name": "\\u0000"}',
    "NaN": b'{"anything": NaN}',
    "infinity": b'{"anything": -Infinity}',
    "endless number": b'{"anything": ' + b"9" * 5000 + b"e",
    "absurdly deep list": b"[" * 100_000,
    "absurdly deep object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "list": b"[]",
    "null": b"null",
    "string": b'"text"',
    "user_name is a number": b'{"user_name": 5}',
    "a tag is a number": b'{"tags": [1]}',
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=list(BAD_BODIES))
def test_a_bad_body_is_refused_and_nothing_is_stored(api: Api, body: bytes) -> None:
    assert api.post("/flows/Flow", body).status == 400
    assert api.get("/flows").json == []


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"[" + b"[]," * 1_000_000 + b"[]]", 413),
        (b'{"tags": [' + b'"a",' * 1_000_000 + b'""]}', 413),
        (b"{" * 2_000_000, 413),
        (b"[" * 100_000, 400),
        (b'{"user_name": "' + b"a,[{" * 1_000_000 + b'"}', 200),  # commas of a text count for one
        (b'{"user_name": "' + b'\\",' * 400_000 + b'"}', 200),
        (b'{"user_name": "\\\\", "tags": [' + b'"",' * 400_000 + b'""]}', 413),
        # A pattern for whole texts would begin anew at every quote of this, until the end of days.
        (b'["' + b'\\"' * 1_000_000 + b"," * 400_000, 400),
    ],
    ids=["lists", "texts", "open", "deep", "text", "escapes", "end of a text", "no end of a text"],
)
def test_a_body_of_too_many_values_is_refused_before_it_is_parsed(
    api: Api, body: bytes, status: int
) -> None:
    assert api.request("POST", "/flows/Flow", body).status == status


@pytest.mark.parametrize(
    ("text", "has_nul"),
    [
        (rb"\u0000", True),
        (rb"\\u0000", False),
        (rb"\\\u0000", True),
        (rb"\\\\u0000 \n\u0001", False),
        (rb"\"\u0000\"", True),
        (b"\\\\" * 1_000_000 + rb"\u0000", True),
    ],
    ids=["NUL", "text", "text and NUL", "texts", "in quotes", "after many"],
)
def test_a_nul_is_distinguished_from_text_that_looks_like_one(text: bytes, has_nul: bool) -> None:
    assert mls.has_nul(b'{"user_name": "%s"}' % text) == has_nul


def test_the_largest_bodies_of_metaflow_are_accepted(api: Api) -> None:
    task = api.new_task_of_its_own()
    many = api.post(f"{task}/artifact", [artifact(f"a{n}") for n in range(3000)])
    assert many.json == {"artifacts_created": 3000}
    large = api.post(f"{task}/metadata", [metadatum("text", "one, two\n" * 2_000_000)])
    assert large.json == {"metadata_created": 1}


# -- a disk that is full, read-only or gone --------------------------------------------------------


def temporary_files(project: Path) -> list[Path]:
    return [path for path in all_paths(project) if path.name.startswith(mls.TEMPORARY)]


def read_json_files(project: Path) -> list[Any]:
    """All files of the root that are JSON by name; all of them are by content."""
    return [json.loads(path.read_bytes()) for path in (project / ".metaflow").rglob("*.json")]


@pytest.fixture
def disk(project: Path) -> Iterator[Path]:
    """The project, on a file system of half a megabyte; skips where none can be mounted."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(project)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    (project / ".metaflow").mkdir()
    yield project
    subprocess.run(["umount", "-l", str(project)], check=True)


def test_a_full_disk_costs_single_requests(disk: Path) -> None:
    with serve(mls.Store(str(disk))) as client:
        task = client.new_task_of_its_own()
        ballast = fill(disk)
        run = task.split("/steps/")[0]
        for reply in (
            client.post(f"{task}/metadata", [metadatum("field")] * 3),
            client.post(f"{task}/artifact", [artifact("name")] * 3),
            client.post("/flows/Other"),
            client.post("/flows/Flow/run"),
            client.post(f"{run}/steps/end/step"),
            client.post(f"{run}/steps/start/task"),
            client.patch(f"{run}/tag/mutate", {"tags_to_add": ["tag"]}),
        ):
            assert (reply.status, list(reply.json)) == (507, ["message"])
        assert client.get("/healthcheck").status == 503
        before = read_json_files(disk)
        assert len(before) == 4  # the flow, run, step and task
        assert temporary_files(disk) == []
        assert client.get(task).status == 200
        ballast.unlink()
        assert client.post(f"{task}/metadata", [metadatum("field")] * 3).status == 200
        assert len(client.get(f"{task}/metadata").json) == 3
        assert client.new_task(f"{run}/steps/start") and client.get("/healthcheck").status == 200


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, None])
def test_a_disk_that_takes_no_more_is_a_507(
    api: Api, monkeypatch: pytest.MonkeyPatch, error: int | None
) -> None:
    write = os.write

    def write_half(descriptor: int, content: bytes) -> int:
        written = write(descriptor, content[: len(content) // 2])
        if error is not None:
            raise OSError(error, os.strerror(error))
        return written

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write_half)
        reply = api.post("/flows/Flow")
    assert (reply.status, list(reply.json)) == (507, ["message"])
    assert api.post("/flows/Flow").status == 200


def test_a_root_that_cannot_be_written_is_still_read(disk: Path) -> None:
    with serve(mls.Store(str(disk))) as client:
        task = client.new_task_of_its_own()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for reply in (
            client.post("/flows/Other"),
            client.post(f"{task}/metadata", [metadatum("field")]),
            client.post(f"{task}/heartbeat"),
        ):
            assert (reply.status, "Read-only" in reply.json["message"]) == (500, True)
        assert client.get("/healthcheck").status == 503
        assert client.get(task).status == 200
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert client.post(f"{task}/metadata", [metadatum("field")]).status == 200


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_root_that_may_not_be_written_is_still_read(api: Api, project: Path) -> None:
    api.new_flow()
    (project / ".metaflow").chmod(0o500)
    assert [api.post("/flows/Other").status, api.get("/flows/Flow").status] == [500, 200]
    (project / ".metaflow").chmod(0o700)
    assert api.post("/flows/Other").status == 200


def test_a_root_that_vanishes_may_come_back(api: Api, project: Path) -> None:
    task = api.new_task_of_its_own()
    run = task.split("/steps/")[0]
    (project / ".metaflow").rename(project / "away")
    for reply in (
        api.get("/flows"),
        api.get("/flows/Flow"),
        api.get(f"{run}/steps/end"),  # a 404 would be taken for an answer
        api.get(f"{task}/metadata"),
        api.post("/flows/Other"),
        api.post(f"{task}/heartbeat"),
        api.post(f"{task}/metadata", [metadatum("field")]),
        api.patch(f"{run}/tag/mutate", {"tags_to_add": ["tag"]}),
        api.get("/healthcheck"),
    ):
        assert (reply.status, list(reply.json)) == (503, ["message"])
    assert not (project / ".metaflow").exists()
    (project / "away").rename(project / ".metaflow")
    assert api.post(f"{task}/metadata", [metadatum("field")]).status == 200
    assert api.get("/flows/Flow").status == 200


# ==================================================================================================
# Access
# ==================================================================================================

# Who is let in: with which key, from which web pages, and as which user. The login is tested with
# the UI API, which offers it.


def test_a_limit_of_guesses_is_made_up_for_by_time() -> None:
    now = [0.0]
    limit = mls.GuessLimit(5, clock=lambda: now[0])
    assert [limit.allow() for _ in range(6)] == [True] * 5 + [False]
    now[0] = 0.4
    assert [limit.allow() for _ in range(3)] == [True, True, False]


OUR_HOSTS = ["localhost", "LocalHost:1", "127.0.0.1:65535", "127.1.2.3", "[::1]:80"]
FOREIGN_HOSTS = ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "127.evil"]
FOREIGN_HOSTS += ["evil.example#@localhost", "192.0.2.1", "0.0.0.0", "[::2]", "[", ""]
FOREIGN_HOSTS += ["evil@127.0.0.1", "127.0.0.1#x", "127.0.0.1/x", "127.0.0.1?x", "localhost\\x"]
FOREIGN_HOSTS += ["localhost:", "localhost:0", "localhost:65536", "localhost:8x", "localhost:80:80"]
FOREIGN_HOSTS += ["localhost, localhost", "localhost.", "localhost x", "::1", "[::1]x", "[::1%lo]"]
FOREIGN_HOSTS += ["[127.0.0.1]", "[localhost]", "127.1", "localhost@evil.example", "evil:localhost"]


@pytest.mark.parametrize("host", OUR_HOSTS + FOREIGN_HOSTS)
def test_only_a_host_header_that_means_us_is_answered(api: Api, host: str) -> None:
    assert (answer_to(api, "GET /ping", host=host).status == 403) == (host in FOREIGN_HOSTS)


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    ("host", "origin", "is_let_in"),
    [
        ("localhost:80", "http://localhost:80", True),
        ("localhost:80", "http://localhost:81", False),
        ("localhost:80", "http://127.0.0.1:80", False),
        ("localhost:80", "http://evil.example", False),
        ("localhost:80", "null", False),
        ("localhost:80", "", False),
        ("evil.example:80", "http://evil.example:80", False),  # whose name leads here
    ],
)
def test_a_page_of_another_origin_can_neither_read_nor_write(
    api: Api, host: str, origin: str, is_let_in: bool, method: str
) -> None:
    headers = [f"Origin: {origin}", "Content-Type: text/plain"]
    reply = answer_to(api, f"{method} /flows/Flow", *headers, body=b"{}", host=host)
    assert (reply.status != 403) == is_let_in
    assert len(api.get("/flows").json) == (is_let_in and method == "POST")


@pytest.mark.parametrize("line", ["GET /ping", "GET /flows", "POST /flows/Flow", "GET /nothing"])
def test_every_request_needs_the_key(store: mls.Store, line: str) -> None:
    with serve(store, key="the-key") as client:
        for headers in ([], ["x-api-key:"], ["x-api-key: the-keys"], ["x-api-key: \udcff"]):
            reply = answer_to(client, line, *headers, body=b"{}")
            assert reply.status == 401
            assert "the-key" not in str(reply)
        assert answer_to(client, line, "X-API-Key: the-key", body=b"{}").status in (200, 404)


@pytest.mark.parametrize("where", ["127.0.0.1", "0.0.0.0"])
def test_with_a_key_any_host_name_is_accepted(store: mls.Store, where: str) -> None:
    with serve(store, host=where, key="the-key") as client:
        for host in ("192.0.2.1:80", "[2001:db8::1]", "metadata", "host.docker.internal:1234"):
            assert answer_to(client, "GET /ping", "x-api-key: the-key", host=host).status == 200
            foreign = ["x-api-key: the-key", "Origin: http://evil.example"]
            assert answer_to(client, "GET /ping", *foreign, host=host).status == 403
            assert answer_to(client, "GET /ping", host=host).status == 401


def test_the_host_of_an_absolute_target_counts_in_place_of_the_header(api: Api) -> None:
    for scheme, host in itertools.product(("http", "HTTP"), OUR_HOSTS):
        assert answer_to(api, f"GET {scheme}://{host}/ping", host="evil.example").status == 200
    for host in ("evil.example", "evil@127.0.0.1", "localhost.evil.example:80", ""):
        assert answer_to(api, f"GET http://{host}/ping").status == 403


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    ("site", "is_let_in"),
    [("none", True), ("same-origin", True), ("same-site", False), ("cross-site", False)],
)
def test_a_cross_site_request_is_refused(api: Api, method: str, site: str, is_let_in: bool) -> None:
    reply = answer_to(api, f"{method} /flows/Flow", f"Sec-Fetch-Site: {site}", body=b"{}")
    assert (reply.status != 403) == is_let_in
    assert len(api.get("/flows").json) == (is_let_in and method == "POST")


# -- other users of this machine -------------------------------------------------------------------

AS_ANOTHER_USER = ("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups")

needs_other_users = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv") or not sys.platform.startswith("linux"),
    reason="only root of a Linux with setpriv can be another user",
)

CLIENT = "import sys, http.client as h; c = h.HTTPConnection(*sys.argv[1:3]); "
CLIENT += "c.request(*sys.argv[3:5], '{}'); r = c.getresponse(); print(r.status, r.read().decode())"


def status_for_another_user(api: Api, method: str, path: str) -> tuple[int, str]:
    """What another user of this machine is answered."""
    command = [*AS_ANOTHER_USER, "/usr/bin/env", "python3", "-c", CLIENT]
    command += [str(api.host), str(api.port), method, path]
    path_of_python = {"PATH": "/usr/bin:/bin:/usr/local/bin"}
    ran = subprocess.run(command, capture_output=True, text=True, cwd="/", env=path_of_python)
    if not ran.stdout:
        pytest.skip(f"there is no Python that another user may run: {ran.stderr}")
    status, _, content = ran.stdout.partition(" ")
    return int(status), content


@needs_other_users
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_another_user_of_this_machine_gets_nothing_but_the_way_to_get_it(
    store: mls.Store, host: str
) -> None:
    with serve(store, host=host) as client:
        for method, path in (("POST", "/flows/ByOther"), ("GET", "/flows"), ("GET", "/")):
            status, content = status_for_another_user(client, method, path)
            assert status == 403
            assert "--generate-key" in content
        assert client.get("/flows").json == []


@needs_other_users
def test_another_user_with_the_key_is_answered(store: mls.Store) -> None:
    with serve(store, key="a-key-that-others-have") as client:
        assert status_for_another_user(client, "GET", "/flows")[0] == 401


@contextlib.contextmanager
def connect_pair(family: str = "127.0.0.1") -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection over loopback: the one of the server first."""
    with socket.create_server(
        (family, 0), family=socket.AF_INET6 if ":" in family else 2
    ) as server:
        client = socket.create_connection(server.getsockname()[:2])
        ours, _ = server.accept()
        with ours, client:
            yield ours, client


linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux")


@linux_only
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("way", ["ask_kernel_for_owner", "read_owner_from_proc"])
def test_the_owner_of_a_connection_is_found_both_ways(host: str, way: str) -> None:
    with connect_pair(host) as (ours, client):
        inode = os.fstat(client.fileno()).st_ino
        ends = client.getsockname()[:2], ours.getsockname()[:2]
        owner = getattr(mls, way)(*ends)
        assert (owner.uid, owner.inode) == (os.geteuid(), inode)
        assert owner.state in mls.CONNECTED_STATES
        assert getattr(mls, way)((host, 1), ends[1]) is None


@linux_only
def test_an_ipv4_client_of_an_ipv6_service_is_found() -> None:
    with contextlib.ExitStack() as sockets:
        server = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        sockets.enter_context(server)
        address = ("127.0.0.1", server.getsockname()[1])
        sockets.enter_context(socket.create_connection(address))
        ours = sockets.enter_context(server.accept()[0])
        assert not mls.is_foreign(ours)


@linux_only
def test_a_closed_end_of_a_connection_proves_nothing() -> None:
    with connect_pair() as (ours, client):
        assert not mls.is_foreign(ours)
        client.close()
        assert mls.is_foreign(ours)


@linux_only
def test_without_netlink_proc_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unavailable(*_: object) -> None:
        raise OSError(errno.EPROTONOSUPPORT, "no netlink here")

    monkeypatch.setattr(mls, "ask_kernel_for_owner", unavailable)
    with connect_pair() as (ours, client):
        assert not mls.is_foreign(ours)
        monkeypatch.setattr(mls.os, "geteuid", lambda: 12345)
        assert mls.is_foreign(ours) == (os.fstat(client.fileno()).st_uid != 0)


def reset_connection(client: socket.socket) -> None:
    """End a connection at once, so that the other end is gone as well."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@linux_only
@pytest.mark.parametrize("has_netlink", [True, False])
@pytest.mark.parametrize("has_listener", [True, False])
def test_a_connection_reset_while_the_kernel_is_asked_proves_nothing(
    monkeypatch: pytest.MonkeyPatch, has_netlink: bool, has_listener: bool
) -> None:
    """What was sent before is still there to be read, and must not be taken for our user's."""
    find = mls.find_socket_owner
    with contextlib.ExitStack() as sockets, connect_pair() as (ours, client):
        port = client.getsockname()[1]

        def reset_and_find(*ends: Any) -> Any:
            if client.fileno() >= 0:
                reset_connection(client)
                if has_listener:  # of ours, at the very port that the other user has had
                    sockets.enter_context(socket.create_server(("127.0.0.1", port)))
            return find(*ends)

        monkeypatch.setattr(mls, "find_socket_owner", reset_and_find)
        if not has_netlink:
            monkeypatch.setattr(mls, "ask_kernel_for_owner", lambda *_: None)
        with pytest.raises(OSError):
            mls.is_foreign(ours)


@linux_only
def test_a_socket_that_listens_stands_for_no_end_of_a_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, connect_pair() as (ours, _):
        for way in (mls.ask_kernel_for_owner, mls.read_owner_from_proc):
            owner = way(server.getsockname(), ours.getsockname())
            assert owner is None or owner.state not in mls.CONNECTED_STATES


@linux_only
def test_a_listening_socket_shows_whether_the_kernel_can_be_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert mls.tells_owners(server)
        monkeypatch.setattr(mls, "ask_kernel_for_owner", lambda *_: None)
        assert mls.tells_owners(server)
        monkeypatch.setattr(mls, "read_owner_from_proc", lambda *_: None)
        assert not mls.tells_owners(server)


@linux_only
def test_where_the_kernel_cannot_be_asked_everybody_is_answered(
    store: mls.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mls, "find_socket_owner", lambda *_: None)
    with serve(store) as client:
        assert client.get("/ping").status == 200


# ==================================================================================================
# Page
# ==================================================================================================

# Our own page in a real browser (`nox -s browser`; not among the tests that run by default). Flows
# run once for all tests that only look (`seen_run` and `walked_run`, half a minute each).

browser = pytest.mark.browser

HOSTILE = "<img src=x onerror=alert(1)>"
SEEN_FLOW = """
import os, time
from metaflow import FlowSpec, Parameter, card, current, retry, step
from metaflow.cards import Markdown, Table
class SeenFlow(FlowSpec):
    text = Parameter("text", default="HOSTILE")
    @card(type="blank", refresh_interval=1)
    @step
    def start(self):
        print("hello", self.text)
        heading = Markdown("# Begun")
        current.card.append(heading)
        current.card.append(Table([[self.text, 1]]))
        while not os.path.exists("finish"):
            if os.path.exists("go on"):
                heading.update("# Halfway")
            current.card.refresh()
            time.sleep(0.1)
        self.hostile = {self.text: [1, 2.5, None]}
        self.letters = "ab"
        self.next(self.work, foreach="letters")
    @retry(times=1, minutes_between_retries=0)
    @step
    def work(self):
        print("attempt", current.retry_count, "on", self.input)
        if self.input == "b" and current.retry_count == 0:
            raise ValueError("fails once, " + self.text)
        self.result = self.input.upper()
        self.next(self.join)
    @step
    def join(self, inputs):
        self.next(self.end)
    @step
    def end(self):
        pass
if __name__ == "__main__":
    SeenFlow()
""".replace("HOSTILE", HOSTILE)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """A browser without any traffic of its own, which takes a second or two to start."""
    client = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"there is no browser here: none of {', '.join(names)} is on the path")
    switches = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    switches += " --disable-background-networking --disable-component-update"
    client.expect.set_options(timeout=90_000)  # a busy machine takes its time
    with client.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=switches.split())
        yield opened
        opened.close()


@contextlib.contextmanager
def new_page(
    chromium: Browser, permitted: str = "404.*/(dag|parameters) ", **options: Any
) -> Iterator[BrowserPage]:
    """A window of its own, in which nothing may go wrong, but what `permitted` matches: there are
    runs without a graph, of which our page asks all the same."""
    complaints: list[str] = []
    with contextlib.closing(chromium.new_context(**options)) as context:
        page = context.new_page()

        def answer_for_the_rest_of_the_world(route: Any) -> None:
            if route.request.frame == page.main_frame:  # a card may ask elsewhere, for a font
                complaints.append(f"asks {route.request.url}")
            route.fulfill(body="")

        context.route(re.compile(r"^https?://(?!127\.0\.0\.1:)"), answer_for_the_rest_of_the_world)

        def hear(said: Any) -> None:
            if said.type == "error":
                complaints.append(f"{said.text} at {said.location['url']} ")

        page.on("console", hear)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        yield page
    assert [said for said in complaints if not re.search(permitted, said)] == []


@pytest.fixture
def tab(chromium: Browser) -> Iterator[BrowserPage]:
    """An empty tab of the browser; what goes wrong in it fails the test."""
    with new_page(chromium) as page:
        yield page


def expect(what: Any) -> Any:
    """Playwright's assertion on a page or a part of it, which waits for its coming true."""
    from playwright.sync_api import expect

    return expect(what)


def visit(page: BrowserPage, url: str) -> None:
    """Open a view of our page, and wait until it hears of what happens."""
    page.goto(url)
    expect(page.locator("#live")).to_have_attribute("data-state", "live")


def run_row(page: BrowserPage, flow: str) -> Any:
    return page.locator(f"#runs tr[data-run^='{flow}/']")


def task_rows(page: BrowserPage, step: str) -> Any:
    return page.locator(f"#timeline a[data-task^='{step}/']")


class Seen(NamedTuple):
    """A service, and the views of a run that has finished under it."""

    home: str
    run: str
    retried: str


@pytest.fixture(scope="session")
def seen_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """The views of SeenFlow, which has run once a session, in about ten seconds."""
    with command_line(tmp_path_factory.mktemp("browser").resolve()) as program:
        (program.folder / "seen.py").write_text(SEEN_FLOW)
        (program.folder / "finish").touch()
        assert program("start", "--idle-timeout", 3600).returncode == 0
        ran = program("run", sys.executable, "seen.py", "run", "--tag", HOSTILE)
        assert ran.returncode == 0, ran.stderr
        home = program.status()["url"]
        client = Api(home)
        (run,) = client.get("/api/runs").json["data"]
        path = f"/SeenFlow/{run['run_number']}"
        tasks = f"/api/flows/SeenFlow/runs/{run['run_number']}/tasks?step_name=work"
        work = client.get(f"{tasks}&_order=-attempt_id").json["data"]
        client.close()
        yield Seen(f"{home}/#/", f"{home}/#{path}", f"{home}/#{path}/work/{work[0]['task_id']}")


@browser
def test_clicks_lead_from_the_list_to_the_log_of_a_task(tab: BrowserPage, seen_run: Seen) -> None:
    visit(tab, seen_run.home)
    expect(run_row(tab, "SeenFlow")).to_have_attribute("data-status", "completed")
    run_row(tab, "SeenFlow").click()
    expect(tab).to_have_url(seen_run.run)
    expect(tab.locator("#head h1")).to_contain_text("SeenFlow/")
    task_rows(tab, "start").click()
    expect(tab.locator("#log-out")).to_contain_text(f"hello {HOSTILE}")
    tab.go_back()
    tab.go_back()
    expect(run_row(tab, "SeenFlow")).to_be_visible()


@browser
def test_a_run_is_shown_with_its_graph_parameters_and_retries(
    tab: BrowserPage, seen_run: Seen
) -> None:
    visit(tab, seen_run.run)
    expect(tab.locator("#parameters")).to_contain_text(json.dumps(HOSTILE))
    names = ["start", "work", "join", "end"]
    nodes = tab.locator("#dag .node")
    expect(nodes).to_have_count(len(names))
    assert [node.get_attribute("data-step") for node in nodes.all()] == names
    expect(nodes.nth(1)).to_have_class(re.compile("many"))
    retried = task_rows(tab, "work").filter(has_text="2 tries")
    expect(retried.locator(".bar.s-failed")).to_have_count(1)
    expect(retried.locator(".bar.s-completed")).to_have_count(1)
    nodes.nth(1).click()
    expect(tab.locator(".step-head", has_text="work")).to_be_focused()
    nodes.nth(2).click()
    expect(tab.locator("#head h1")).to_contain_text("join/")


@browser
def test_each_attempt_has_its_own_status_and_log(tab: BrowserPage, seen_run: Seen) -> None:
    visit(tab, seen_run.retried)
    expect(tab.locator("#log-out")).to_contain_text("attempt 1 on b")
    expect(tab.locator("#log-out")).not_to_contain_text("attempt 0")
    tab.get_by_role("link", name="Attempt 0: failed").click()
    expect(tab.locator("#head")).to_have_attribute("data-status", "failed")
    expect(tab.locator("#log-out")).to_contain_text("attempt 0 on b")
    expect(tab.locator("#log-err")).to_contain_text(f"ValueError: fails once, {HOSTILE}")
    logs = tab.locator("[id^=log-]").evaluate_all("logs => logs.map(({id}) => id)")
    assert logs == ["log-err", "log-out"], "what it failed with comes first"


@browser
def test_what_a_task_made_stands_apart_from_what_it_inherited(
    tab: BrowserPage, seen_run: Seen
) -> None:
    visit(tab, seen_run.retried)
    expect(tab.locator("#artifacts tr", has_text="result")).to_contain_text("B")
    expect(tab.locator("#artifacts")).not_to_contain_text("letters")
    for part, name, value in (
        ("#inherited", "hostile", f"{{'{HOSTILE}': [1, 2.5, None]}}"),
        ("#inherited", "letters", "ab"),
        ("#metadata", "foreach-stack", '["letters=b"]'),
    ):
        row = tab.locator(f"{part} tr", has_text=name)
        expect(row).to_contain_text(value)
        expect(row).not_to_be_visible()
    tab.locator("#metadata summary").click()
    expect(tab.locator("#metadata tr", has_text="foreach-stack")).to_be_visible()


@browser
def test_a_card_is_rendered_by_its_own_scripts_that_cannot_act_as_the_page(
    tab: BrowserPage, seen_run: Seen
) -> None:
    visit(tab, seen_run.run)
    task_rows(tab, "start").click()
    card = tab.frame_locator("#cards iframe")
    expect(card.get_by_role("heading", name="Begun")).to_be_visible()
    expect(card.get_by_text(HOSTILE)).to_be_visible()
    expect(tab.locator("#cards iframe")).to_have_class("ready")
    frame = tab.frames[1]
    assert frame.evaluate("self.origin") == "null"
    assert eventually(
        lambda: frame.evaluate("document.documentElement.scrollHeight - innerHeight") <= 0
    ), "the card is as high as what it holds"


@browser
def test_output_of_flows_is_never_markup(tab: BrowserPage, seen_run: Seen) -> None:
    for view in seen_run:  # an image in it would not load, which is an error on the console
        visit(tab, view)
        expect(tab.get_by_text(HOSTILE).first).to_be_attached()
        assert tab.locator("main img").count() == 0


@browser
def test_a_run_appears_and_finishes_on_a_page_that_is_open(
    tab: BrowserPage, cli: Cli, daemon: Api
) -> None:
    (cli.folder / "seen.py").write_text(SEEN_FLOW)
    visit(tab, daemon.url)
    tab.evaluate("window.isTheSame = true")
    flow = cli.popen("run", sys.executable, "seen.py", "run")
    expect(run_row(tab, "SeenFlow")).to_have_attribute("data-status", "running")
    expect(tab).to_have_title("\u25b6 1 running \u00b7 Metaflow runs")
    run_row(tab, "SeenFlow").locator("a").click()
    task_rows(tab, "start").click()
    expect(tab.locator("#head")).to_have_attribute("data-status", "running")
    card = tab.frame_locator("#cards iframe.ready")  # its successor is loading beside it
    expect(card.get_by_role("heading", name="Begun")).to_be_visible()
    (cli.folder / "go on").touch()
    expect(card.get_by_role("heading", name="Halfway")).to_be_visible()
    (cli.folder / "finish").touch()
    expect(tab.locator("#head")).to_have_attribute("data-status", "completed")
    expect(tab.locator("#log-out")).to_contain_text("hello")
    expect(tab.locator("#artifacts tr", has_text="letters")).to_contain_text("ab")
    expect(card.get_by_role("heading", name="Halfway")).to_be_visible()
    tab.keyboard.press("Escape")
    expect(tab.locator("#head")).to_have_attribute("data-status", "completed")
    expect(tab).to_have_title(re.compile("^\u2713 SeenFlow/"))
    expect(task_rows(tab, "end")).to_have_attribute("data-status", "completed")
    tab.keyboard.press("Escape")
    expect(run_row(tab, "SeenFlow")).to_have_attribute("data-status", "completed")
    assert tab.evaluate("window.isTheSame"), "it was loaded anew"
    assert flow.communicate(timeout=60) and flow.returncode == 0


@browser
def test_a_run_that_ends_unseen_changes_the_title_and_the_icon(
    tab: BrowserPage, cli: Cli, daemon: Api
) -> None:
    (cli.folder / "seen.py").write_text(SEEN_FLOW)
    visit(tab, daemon.url)
    flow = cli.popen("run", sys.executable, "seen.py", "run")
    expect(tab).to_have_title(re.compile("running"))
    icon = tab.locator("#icon").get_attribute("href")
    tab.evaluate("Object.defineProperty(document, 'hidden', {value: true})")
    (cli.folder / "finish").touch()
    expect(tab).to_have_title("\u2713 completed: SeenFlow")
    assert tab.locator("#icon").get_attribute("href") != icon
    assert flow.communicate(timeout=60) and flow.returncode == 0


WALKED_FLOW = """
import sys
from metaflow import FlowSpec, Parameter, step
class WalkedFlow(FlowSpec):
    size = Parameter("size", default="big")
    @step
    def start(self):
        self.next({"big": self.big, "small": self.small}, condition="size")
    @step
    def big(self):
        self.count = 0
        self.next(self.loop)
    @step
    def small(self):
        self.count = 1
        self.next(self.loop)
    @step
    def loop(self):
        self.count += 1
        self.again = "yes" if self.count < 3 else "no"
        self.next({"yes": self.loop, "no": self.fan}, condition="again")
    @step
    def fan(self):
        for number in range(2100):
            print("line", number)
        for percent in (0, 50, 100):
            sys.stderr.write(f"\\r{percent}% done")
        sys.stderr.write("\\n\\x1b[31mred\\x1b[0m plain\\n")
        sys.stderr.write("\\x1b[38;5;1mone\\x1b[0m \\x1b[48;2;0;1;31mtwo")
        sys.stderr.write("\\x1b[38;2;0;128;255mthree\\n")
        link = "\\x1b]8;;%s\\x1b\\\\"
        sys.stderr.write(link % "https://example.org" + "link" + link % "" + " and \\x07text\\n")
        self.numbers = list(range(30))
        self.next(self.work, foreach="numbers")
    @step
    def work(self):
        self.square = self.input * self.input
        if self.input == 20:
            raise ValueError("twenty is too many")
        self.next(self.join)
    @step
    def join(self, inputs):
        self.next(self.end)
    @step
    def end(self):
        pass
if __name__ == "__main__":
    WalkedFlow()
"""


@pytest.fixture(scope="session")
def walked_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of WalkedFlow's failed run, recorded once a session in half a minute."""
    with command_line(tmp_path_factory.mktemp("walked").resolve()) as program:
        (program.folder / "walked.py").write_text(WALKED_FLOW)
        assert program("start", "--idle-timeout", 3600).returncode == 0
        ran = program("run", sys.executable, "walked.py", "run", "--max-workers", "2")
        assert ran.returncode == 1, ran.stderr
        home = program.status()["url"]
        client = Api(home)
        (run,) = client.get("/api/runs").json["data"]
        client.close()
        yield f"{home}/#/WalkedFlow/{run['run_number']}"


def open_task(page: BrowserPage, run: str, step: str) -> None:
    """Open the first task of a step."""
    visit(page, run)
    task_rows(page, step).first.click()
    expect(page.locator("#head h1")).to_contain_text(f"{step}/")


@browser
def test_the_graph_shows_which_way_a_run_went_and_how_far(
    tab: BrowserPage, walked_run: str
) -> None:
    visit(tab, walked_run)
    nodes = tab.locator("#dag .node")
    expect(nodes).to_have_count(8)
    for step, text in {
        "small": "not taken",
        "loop": "3 tasks",
        "work": "1 failed",
        "join": "not reached",
        "end": "not reached",
    }.items():
        node = tab.locator(f".node[data-step={step}]")
        expect(node).to_contain_text(text)
        expect(node).to_have_attribute("title", re.compile(f"^{step}: .*{text}"))
    expect(tab.locator("#dag path.back")).to_have_count(1)
    expect(tab.locator("#dag text")).to_have_text(["big", "small", "no", "yes"])
    tab.locator(".node[data-step=work]").click()
    expect(tab.locator("#head")).to_have_attribute("data-status", "failed")
    expect(tab.locator("#log-err")).to_contain_text("twenty is too many")


@browser
def test_a_failed_run_shows_its_cause_and_links_to_the_task(
    tab: BrowserPage, walked_run: str
) -> None:
    visit(tab, walked_run.split("#")[0])
    expect(tab.locator("#runs .why")).to_contain_text("ValueError: twenty is too many")
    visit(tab, walked_run)
    cause = tab.get_by_role("region", name="Why it failed")
    for text in ("ValueError: twenty is too many", "walked.py:"):
        expect(cause).to_contain_text(text)
    expect(cause.get_by_label("Last lines of standard error")).to_contain_text("in work")
    cause.get_by_role("link", name="Open the task").click()
    expect(tab.locator("#head h1")).to_contain_text("work/")
    expect(tab.locator("#log-err")).to_contain_text("twenty is too many")


@browser
def test_the_tasks_of_a_foreach_are_searched_sorted_and_only_the_failed_shown(
    tab: BrowserPage, walked_run: str
) -> None:
    visit(tab, walked_run)
    work = task_rows(tab, "work")
    shown = work.count()
    assert shown < 20, "a long foreach is folded"
    expect(tab.locator("#timeline a[data-status=failed]")).to_have_count(1)
    expect(tab.locator(".step-head", has_text="work").locator(".bar")).to_have_count(1)
    tab.get_by_role("button", name="Show all").click()
    assert work.count() > 20
    box = tab.get_by_label("Search tasks by value, id, or artifact:value")
    box.fill("square:81")
    expect(work).to_have_count(1)
    expect(tab.locator("#timeline a.nav")).to_have_count(1)
    expect(tab.locator("#timeline .title [role=status]")).to_have_text("1 task")
    box.fill("")
    tab.get_by_label("Only failed").check()
    expect(tab.locator("#timeline a.nav")).to_have_count(1)
    tab.get_by_label("Only failed").uncheck()
    bars = "rows => rows.map(row => row.querySelector('.bar').style.cssText.match(/[\\d.]+/g))"
    begun = [float(begin) for begin, _ in work.evaluate_all(bars)]
    assert len(begun) > 20 and begun == sorted(begun)
    tab.get_by_label("Order of tasks").select_option("longest")
    times = [round(float(end) - float(begin), 6) for begin, end in work.evaluate_all(bars)]
    assert len(times) > 20 and times == sorted(times, reverse=True)


@browser
def test_logs_are_shown_as_a_terminal_does_searched_and_linked_to(
    tab: BrowserPage, walked_run: str
) -> None:
    open_task(tab, walked_run, "fan")
    err = tab.locator("#log-err .line > span")
    expect(err.first).to_have_text("100% done")
    expect(err.nth(1)).to_have_text("red plain")
    expect(err.nth(1).locator(".c1")).to_have_text("red")
    expect(err.nth(2)).to_have_text("one twothree")
    for colour, text in ((".c1", "one"), (".c6", "three")):  # of 256 and of 2^24 colours
        expect(err.nth(2).locator(colour)).to_have_text(text)
    expect(err.nth(2).locator(".bold")).to_have_count(0)
    expect(err.nth(3)).to_have_text("link and text")
    lines = tab.locator("#log-out .line")
    expect(lines).to_have_count(1100)
    tab.get_by_role("button", name="Load earlier lines").click()
    expect(lines).to_have_count(2100)
    expect(tab.get_by_role("button", name="Load all")).to_have_count(0)
    tab.get_by_label("Search in standard output").fill("line 77")
    expect(tab.locator("#log-out .hit")).to_have_count(11)
    tab.keyboard.press("Enter")
    expect(tab.locator("#log-out .target")).to_contain_text("line 77")
    link = lines.nth(41).locator("a").get_attribute("href")
    visit(tab, tab.url.split("#")[0] + (link or ""))
    tab.reload()
    target = tab.locator("#log-out .line.target")
    expect(target).to_contain_text("line 41")
    expect(target).to_be_in_viewport()


@browser
def test_names_and_lines_of_code_are_copied(chromium: Browser, walked_run: str) -> None:
    with new_page(chromium, permissions=["clipboard-read", "clipboard-write"]) as page:
        visit(page, walked_run)
        pathspec = "/".join(walked_run.rsplit("/", 2)[1:])
        page.get_by_role("button", name="Copy pathspec").click()
        assert page.evaluate("navigator.clipboard.readText()") == pathspec
        page.locator("#code summary").click()
        expect(page.locator("#code")).to_contain_text(f'Run("{pathspec}")')
        expect(page.locator("#code")).to_contain_text("walked.py resume --origin-run-id")
        task_rows(page, "fan").click()
        page.get_by_role("button", name="Copy the Python that loads numbers").click()
        copied = page.evaluate("navigator.clipboard.readText()")
        assert re.fullmatch(rf'Task\("{pathspec}/fan/[0-9]+"\)\.data\.numbers', copied)


@browser
def test_tags_are_added_and_removed(tab: BrowserPage, daemon: Api) -> None:
    run = daemon.new_run(daemon.new_flow("Tagged"))
    visit(tab, f"{daemon.url}/#{run.replace('/flows', '').replace('/runs', '')}")
    tab.get_by_role("button", name="Add a tag").click()
    tab.get_by_label("New tag").fill("two words")
    tab.keyboard.press("Enter")
    expect(tab.locator("#tags .tag")).to_have_text(re.compile("two words"))
    assert daemon.get(run).json["tags"] == ["two words"]
    tab.get_by_role("button", name="Remove the tag two words").click()
    expect(tab.locator("#tags .tag")).to_have_count(0)
    assert daemon.get(run).json["tags"] == []


@browser
def test_a_run_is_deleted_from_its_menu_and_from_all_pages(
    chromium: Browser, cli: Cli, daemon: Api
) -> None:
    flow = daemon.new_flow("Deleted")
    beating = {"system_tags": ["metaflow_version:2.19.0"]}  # so that it is running for minutes
    gone, later, kept = (daemon.new_run(flow, **beating).split("/")[-1] for _ in range(3))
    permitted = "409|404.*/(dag|parameters) "
    with new_page(chromium, permitted) as page, new_page(chromium, permitted) as other:
        visit(other, daemon.url)
        expect(run_row(other, "Deleted")).to_have_count(3)
        visit(page, f"{daemon.url}/#/Deleted/{gone}")
        menu = page.locator("#head .menu summary")
        menu.click()
        opener = page.get_by_role("button", name="Delete this run")
        dialog = page.get_by_role("dialog")
        opener.click()
        expect(dialog).to_contain_text(f"Deleted/{gone}")
        expect(dialog).to_contain_text("cannot be undone")
        expect(dialog.get_by_role("button", name="Cancel")).to_be_focused()
        page.keyboard.press("Escape")
        expect(dialog).to_have_count(0)
        expect(menu).to_be_focused()
        assert daemon.get(f"/flows/Deleted/runs/{gone}").status == 200
        menu.click()
        opener.click()
        dialog.get_by_role("button", name="Delete").click()
        expect(dialog).to_contain_text("is running")
        dialog.get_by_role("button", name="Close").click()
        complete_run(cli, daemon, f"/flows/Deleted/runs/{gone}")
        menu.click()
        opener.click()
        dialog.get_by_role("button", name="Delete").click()
        expect(run_row(page, "Deleted")).to_have_count(2)
        expect(run_row(other, "Deleted")).to_have_count(2)
        run_row(other, "Deleted").first.get_by_role("link").first.click()
        expect(other).to_have_url(f"{daemon.url}/#/Deleted/{kept}")  # while the list is not live
        complete_run(cli, daemon, f"/flows/Deleted/runs/{later}")
        assert daemon.request("DELETE", f"/flows/Deleted/runs/{later}").status == 200
        other.go_back()
        expect(run_row(other, "Deleted")).to_have_count(1)
        expect(run_row(other, "Deleted")).to_have_attribute("data-run", f"Deleted/{kept}")


FILTERED = {
    "AlphaTrain": {"tags": ["experiment", "lr=0.1"], "user_name": "ada"},
    "AlphaScore": {"tags": ["two words", 'with"quote'], "user_name": "bob"},
    "Beta": {
        "tags": [],
        "user_name": "ada",
        "system_tags": ["project:fraud", "project_branch:test.branch"],
    },
}


def complete_run(cli: Cli, api: Api, run: str) -> None:
    task = api.new_task(api.new_step(run, "end"))
    end_task(api, task)
    store_log(cli.folder / ".metaflow", task)


@pytest.fixture(scope="session")
def filtered_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a service that has the runs of FILTERED, once a session, in a second."""
    with command_line(tmp_path_factory.mktemp("filtered").resolve()) as program:
        assert program("start", "--idle-timeout", 3600).returncode == 0
        client = Api(program.status()["url"])
        for flow, fields in FILTERED.items():
            complete_run(program, client, client.new_run(client.new_flow(flow), **fields))
        client.close()
        yield client.url


@browser
@pytest.mark.parametrize(
    ("query", "flows"),
    [
        ("ALPHA", ["AlphaScore", "AlphaTrain"]),
        ("flow:alpha -flow:score", ["AlphaTrain"]),
        ("flow:beta,score", ["Beta", "AlphaScore"]),
        ('tag:"two words"', ["AlphaScore"]),
        ('tag:"with"quote"', ["AlphaScore"]),
        ("tag:exper user:AD", ["AlphaTrain"]),
        ("-user:ada", ["AlphaScore"]),
        ("project:fra branch:test.", ["Beta"]),
        ("status:compl", ["Beta", "AlphaScore", "AlphaTrain"]),
        ("-status:completed", []),
        ("since:1h -before:today flow:beta", ["Beta"]),
        ("before:2h", []),
    ],
)
def test_one_rule_filters_by_every_field(
    tab: BrowserPage, filtered_runs: str, query: str, flows: Sequence[str]
) -> None:
    visit(tab, f"{filtered_runs}/#/?q={quote(query)}")
    rows = tab.locator("#runs tbody tr")
    expect(rows).to_have_count(len(flows))
    assert [row.split("/")[0] for row in rows.evaluate_all("a => a.map(r => r.dataset.run)")] == [
        *flows
    ]


@browser
@pytest.mark.parametrize(
    ("query", "answer"),
    [("colour:red", 'There is no field "colour"'), ("since:soon", '"soon" is no time')],
)
def test_an_invalid_filter_is_explained(
    tab: BrowserPage, filtered_runs: str, query: str, answer: str
) -> None:
    visit(tab, f"{filtered_runs}/#/?q={quote(query)}")
    expect(tab.get_by_role("alert")).to_contain_text(answer)


@browser
def test_text_typed_into_the_filter_is_completed(tab: BrowserPage, filtered_runs: str) -> None:
    visit(tab, filtered_runs)
    tab.keyboard.press("/")
    tab.keyboard.type("pro")
    for key in ("ArrowDown", "Enter", "ArrowDown", "Enter"):
        tab.keyboard.press(key)
    expect(tab.locator("#filter")).to_have_value("project:fraud ")
    expect(tab.locator("#runs tbody tr")).to_have_count(1)


@browser
def test_runs_are_sorted_grouped_and_marked(tab: BrowserPage, filtered_runs: str) -> None:
    visit(tab, filtered_runs)
    rows = tab.locator("#runs tbody tr[data-run]")
    expect(rows).to_have_count(3)
    tab.get_by_role("button", name="Flow", exact=True).click()
    expect(tab.get_by_role("columnheader", name="Flow")).to_have_attribute(
        "aria-sort", "descending"
    )
    expect(rows.first).to_have_attribute("data-run", re.compile("^Beta/"))
    tab.get_by_role("button", name="Flow", exact=True).click()
    expect(rows.first).to_have_attribute("data-run", re.compile("^AlphaScore/"))
    tab.get_by_role("button", name="Group by flow").click()
    expect(tab.locator("#runs tr.group")).to_have_count(3)
    tab.keyboard.press("j")
    tab.keyboard.press("x")
    expect(tab.locator("#marked")).to_contain_text("1 run marked")
    expect(tab.get_by_role("button", name="Compare")).to_be_disabled()
    tab.keyboard.press("j")
    tab.keyboard.press("x")
    tab.keyboard.press("c")
    expect(tab.locator("#compare tbody")).to_contain_text("experiment")
    tab.keyboard.press("Escape")
    expect(tab.locator("#runs tr.group")).to_have_count(3)


@browser
def test_ordinary_tags_leave_the_columns_whole(tab: BrowserPage, cli: Cli, daemon: Api) -> None:
    tags = [
        "nightly-build",
        "experiment",
        "a tag of several words",
        "learning_rate=0.001",
        "x" * 90,
    ]
    flow = daemon.new_flow("AFlowWithQuiteALongNameIndeed")
    complete_run(cli, daemon, daemon.new_run(flow, tags=tags, user_name="barbara"))
    tab.set_viewport_size({"width": 1600, "height": 900})
    visit(tab, daemon.url)
    row = run_row(tab, "AFlowWithQuiteALongNameIndeed")
    expect(row.locator(".tag")).to_have_count(3)
    expect(row).to_contain_text("+2")
    expect(row).to_contain_text("barbara")
    assert row.bounding_box()["height"] < 50, "nothing of it wraps"
    assert tab.locator("#runs").bounding_box()["width"] > 1500


@browser
@pytest.mark.parametrize("width", [800, 1150, 1400])
def test_long_names_leave_room_for_the_cause(
    tab: BrowserPage, cli: Cli, daemon: Api, width: int
) -> None:
    name = "AFlowWithANameThatGoesOnForAsLongAsAnyoneMayEverWantToType"
    tags = ["project:fraud_detection_of_all_of_europe", "project_branch:user.somebody"]
    run = daemon.new_run(
        daemon.new_flow(name), user_name="somebody.or.other@example.org", system_tags=tags
    )
    task = daemon.new_task(daemon.new_step(run, "end"))
    end_task(daemon, task, is_ok="False")
    store_log(cli.folder / ".metaflow", task)
    tab.set_viewport_size({"width": width, "height": 800})
    visit(tab, daemon.url)
    cause = run_row(tab, name).locator(".why")
    expect(cause).to_be_in_viewport(ratio=1)
    assert cause.bounding_box()["width"] > 80
    scrolled = (
        "[...document.querySelectorAll('.scrolled')].some(n => n.scrollWidth > n.clientWidth)"
    )
    assert not tab.evaluate(scrolled)


@browser
def test_the_list_has_tooltips(tab: BrowserPage, filtered_runs: str) -> None:
    visit(tab, filtered_runs)
    row = run_row(tab, "Beta")
    for part, tip in (
        ("time >> nth=0", r"\d{4}, \d\d:\d\d:\d\d .*(ago|now)$"),
        (".project", "^fraud / test.branch$"),
        (".badge", "^$"),
    ):
        row.locator(part).hover(force=True)  # the link of the row lies over it
        expect(row.locator("a.nav")).to_have_attribute("title", re.compile(tip))


@browser
def test_marks_outlive_filters_but_not_the_run(tab: BrowserPage, cli: Cli, daemon: Api) -> None:
    runs = [daemon.new_run(daemon.new_flow(flow)) for flow in ("First", "Second", "Third")]
    for run in runs:
        complete_run(cli, daemon, run)
    marked = tab.locator("#marked")
    visit(tab, daemon.url)
    for flow in ("First", "Second", "Third"):
        tab.locator("#filter").fill(f"flow:{flow}")
        expect(run_row(tab, flow)).to_be_visible()
        expect(tab.locator("#runs tr[data-run]")).to_have_count(1)
        run_row(tab, flow).get_by_role("checkbox").check()
    expect(marked).to_contain_text("3 runs marked")
    assert daemon.request("DELETE", runs[0]).status == 200
    expect(marked).to_contain_text("2 runs marked")
    marked.get_by_role("button", name="Compare").click()
    expect(tab).to_have_url(re.compile("compare=Second.*compare=Third"))


@browser
def test_a_narrow_list_names_the_parameters_that_it_shows(tab: BrowserPage, seen_run: Seen) -> None:
    tab.set_viewport_size({"width": 400, "height": 800})
    visit(tab, f"{seen_run.home}?columns=text")
    value = run_row(tab, "SeenFlow").locator(".value")
    expect(value).to_have_text(json.dumps(HOSTILE))
    assert "text" in value.evaluate("node => getComputedStyle(node, '::before').content")


@browser
def test_the_way_up_from_a_task_is_named_in_a_narrow_window(
    tab: BrowserPage, seen_run: Seen
) -> None:
    tab.set_viewport_size({"width": 844, "height": 390})
    visit(tab, seen_run.retried)
    for name in ("work", seen_run.retried.rsplit("/", 1)[1]):
        crumb = tab.locator("#crumbs").get_by_role("link", name=name, exact=True)
        assert crumb.evaluate("node => node.scrollWidth <= node.clientWidth"), name


@browser
def test_bars_are_seen_in_forced_colours(chromium: Browser, seen_run: Seen) -> None:
    with new_page(chromium, forced_colors="active") as page:
        visit(page, seen_run.run)
        colour = "node => getComputedStyle(node).backgroundColor"
        bar = page.locator(".bar.s-completed").first.evaluate(colour)
        assert bar not in (page.locator("body").evaluate(colour), "rgba(0, 0, 0, 0)")


@browser
def test_a_hidden_tab_draws_once_for_many_frames(tab: BrowserPage, filtered_runs: str) -> None:
    tab.add_init_script(
        "const Real = WebSocket; window.WebSocket = class extends Real {"
        "constructor(url) { super(url); window.opened = this; } };"
    )
    visit(tab, filtered_runs)
    client = Api(filtered_runs)
    row = client.get("/api/runs").json["data"][0]
    client.close()
    draws = tab.evaluate(
        """async (row) => {
          Object.defineProperty(document, "hidden", {value: true});
          const real = getComputedStyle; // which a view asks for a colour when it is drawn
          let draws = 0;
          window.getComputedStyle = (...of) => (draws += 1, real(...of));
          for (let number = 0; number < 50; number += 1) {
            const data = {...row, run: `other${number}`};
            opened.onmessage({data: JSON.stringify({type: "INSERT", uuid: "page-1", data})});
          }
          while (!draws) await new Promise((resolve) => setTimeout(resolve, 10));
          return draws;
        }""",
        row,
    )
    assert draws == 1
    expect(tab.locator("#runs tr[data-run]")).to_have_count(53)


@browser
def test_on_a_slow_connection_the_page_says_that_it_is_loading(
    tab: BrowserPage, seen_run: Seen
) -> None:
    visit(tab, seen_run.home)
    connection = tab.context.new_cdp_session(tab)

    def delay_answers(milliseconds: int) -> None:
        speed = {"offline": False, "downloadThroughput": -1, "uploadThroughput": -1}
        order = "Network.emulateNetworkConditions"
        connection.send(order, {**speed, "latency": milliseconds})

    connection.send("Network.enable")
    delay_answers(4000)
    run_row(tab, "SeenFlow").click()
    expect(tab.locator("#main")).to_have_attribute("aria-busy", "true")
    expect(task_rows(tab, "start")).to_be_visible()
    expect(tab.locator("#main")).not_to_have_attribute("aria-busy", "true")
    tab.goto(f"{seen_run.home}?q=nothing")
    expect(tab.locator("#runs")).to_contain_text("Loading")
    delay_answers(0)
    expect(tab.locator("#runs")).to_contain_text("No run matches")


@browser
def test_earlier_lines_that_cannot_be_loaded_are_asked_for_again(
    chromium: Browser, walked_run: str
) -> None:
    with new_page(chromium, permitted="ERR_FAILED") as page:
        open_task(page, walked_run, "fan")
        lines = page.locator("#log-out .line")
        expect(lines).to_have_count(1100)
        page.route("**/logs/out?**", lambda route: route.abort())
        page.get_by_role("button", name="Load all").click()
        expect(page.locator("#log-out [role=status]")).to_have_text("The service does not answer.")
        page.unroute("**/logs/out?**")
        page.get_by_role("button", name="Load all").click()
        expect(lines).to_have_count(2100)
        expect(page.locator("#log-out [role=status]")).to_have_text("")


@browser
def test_a_page_outlives_its_service_and_shows_what_it_has_missed(
    chromium: Browser, cli: Cli, daemon: Api
) -> None:
    with new_page(chromium, permitted="WebSocket connection") as page:
        gone = daemon.new_run(daemon.new_flow("Gone"))
        visit(page, daemon.url)
        expect(run_row(page, "Gone")).to_be_visible()
        assert cli("stop").returncode == 0
        expect(page.locator("#live")).to_have_attribute("data-state", "reconnecting")
        shutil.rmtree(Path(cli.folder, ".metaflow", *gone.split("/")[2::2]))
        daemon.close()
        assert cli("start", "--port", daemon.port).returncode == 0
        daemon.new_run(daemon.new_flow("Missed"))
        expect(run_row(page, "Missed")).to_be_visible()
        expect(run_row(page, "Gone")).to_have_count(0)


@browser
def test_the_keyboard_is_enough(tab: BrowserPage, daemon: Api) -> None:
    for flow in ("First", "Second", "Third"):
        daemon.new_run(daemon.new_flow(flow))
    visit(tab, daemon.url)
    links = tab.locator("#runs a.nav")
    expect(links).to_have_count(3)
    for key, at in (("j", 0), ("j", 1), ("ArrowDown", 2), ("k", 1)):
        tab.keyboard.press(key)
        expect(links.nth(at)).to_be_focused()
    tab.keyboard.press("Enter")
    expect(tab.locator("#head h1")).to_contain_text("Second/")
    tab.keyboard.press("Escape")
    expect(links.nth(1)).to_be_focused()
    tab.keyboard.press("?")
    expect(tab.locator("#keys")).to_be_visible()
    tab.keyboard.press("Escape")
    expect(tab.locator("#keys")).to_have_count(0)
    tab.keyboard.press("/")
    tab.keyboard.type("flow:third")
    expect(run_row(tab, "Second")).to_have_count(0)
    tab.keyboard.press("Enter")
    expect(links.first).to_be_focused()


@browser
def test_six_hundred_runs_and_a_thousand_tasks_are_all_within_reach(
    chromium: Browser, daemon: Api
) -> None:
    flow = daemon.new_flow("Many")
    for _ in range(599):
        daemon.new_run(flow)
    step = daemon.new_step(daemon.new_run(flow, tags=["wide"]))
    for _ in range(1000):
        task = daemon.new_task(step)
        daemon.post(f"{task}/metadata", [metadatum("attempt", "0")])
    with new_page(chromium) as page:
        visit(page, daemon.url)
        rows = run_row(page, "Many")
        expect(rows.first).to_be_visible()
        while rows.count() < 600:
            page.keyboard.press("End")  # again, if rows have grown in the meantime
            page.wait_for_timeout(100)
        opened = rows.nth(500).locator("a")
        opened.scroll_into_view_if_needed()
        scrolled = page.evaluate("scrollY")
        opened.click()
        expect(page.locator("#head h1")).to_contain_text("Many/")
        page.go_back()
        expect(opened).to_be_focused()
        assert page.evaluate("scrollY") == scrolled > 0
        page.evaluate("scrollTo(0, 0)")
        rows.first.locator("a").click()
        expect(task_rows(page, "start").first).to_be_visible()
        page.get_by_role("button", name="Show all 1,000").click()
        expect(task_rows(page, "start")).to_have_count(1000)


@browser
def test_the_key_is_asked_for_once(chromium: Browser, cli: Cli) -> None:
    assert cli("start", METAFLOW_SERVICE_AUTH_KEY="sesame").returncode == 0
    url = cli.status()["url"]
    service = Api(url, "sesame")
    service.new_run(service.new_flow("Locked"))
    service.close()
    with new_page(chromium, permitted="401") as page:
        page.goto(url)
        for key in ("wrong", "sesame"):
            page.get_by_label("Key", exact=True).fill(key)
            page.keyboard.press("Enter")
            expect(page.get_by_text("This key is wrong.")).to_have_count(int(key == "wrong"))
        expect(run_row(page, "Locked")).to_be_visible()
        visit(page, url)
        expect(run_row(page, "Locked")).to_be_visible()


@browser
def test_a_build_of_another_ui_has_its_routes_its_requests_and_its_socket(
    tab: BrowserPage, cli: Cli, tmp_path: Path
) -> None:
    ui_folder = tmp_path / "build"
    (ui_folder / "static").mkdir(parents=True)
    (ui_folder / "index.html").write_text(
        "<!doctype html><link rel=icon href=data:,><title>Another</title>"
        "<p id=runs></p><p id=heard></p><script src=/static/app.js></script>"
    )
    (ui_folder / "static" / "app.js").write_text(
        """
        const show = (id, text) => { document.getElementById(id).textContent = text; };
        const asked = fetch("/api/runs").then(answer => answer.json());
        asked.then(({data}) => show("runs", data.length));
        const socket = new WebSocket(`ws://${location.host}/api/ws`);
        socket.onmessage = ({data}) => show("heard", data);
        socket.onopen = () =>
          socket.send(JSON.stringify({type: "SUBSCRIBE", uuid: "it", resource: "/runs"}));
        """
    )
    assert cli("start", "--ui-dir", ui_folder).returncode == 0
    service = Api(cli.status()["url"])
    tab.goto(f"{service.url}/AFlow/17/view/timeline?direction=asc")
    expect(tab).to_have_title("Another")
    expect(tab.locator("#runs")).to_have_text("0")
    service.new_run(service.new_flow("AFlow"))
    expect(tab.locator("#heard")).to_contain_text('"INSERT"')
    service.close()


@browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("size", "width"), [("wide", 1280), ("narrow", 400)])
def test_every_view_fits_its_window(
    chromium: Browser, seen_run: Seen, tmp_path: Path, scheme: str, size: str, width: int
) -> None:
    """Leaves screenshots, to be looked at, in the folder that SCREENSHOTS names."""
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path)
    window = {"width": width, "height": 860}
    with new_page(chromium, viewport=window, color_scheme=scheme) as page:
        for name, view in seen_run._asdict().items():
            visit(page, view)
            expect(page.get_by_text(HOSTILE).first).to_be_attached()
            expect(page.get_by_text("Loading \u2026")).to_have_count(0)
            page.screenshot(path=folder / f"{name}-{size}-{scheme}.png", full_page=True)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name


@browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1600, 400])
def test_axe_finds_nothing(
    chromium: Browser, seen_run: Seen, walked_run: str, scheme: str, width: int
) -> None:
    axe = os.environ.get("AXE")
    if axe is None:
        pytest.skip("axe-core is not here: AXE has to name its file, as `nox -s browser` does")
    window = {"width": width, "height": 900}
    # The page's own policy would not let axe in.
    with new_page(chromium, viewport=window, color_scheme=scheme, bypass_csp=True) as page:
        for view in (*seen_run, walked_run):
            visit(page, view)
            expect(page.get_by_text("Loading \u2026")).to_have_count(0)
            page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
            page.add_script_tag(path=axe)
            found = page.evaluate(
                "axe.run(document, {iframes: false}).then(({violations}) => violations"
                ".map(({id, nodes}) => [id, ...nodes.map(({html}) => html)]))"
            )
            assert found == []


# ==================================================================================================
# UI API
# ==================================================================================================

# The routes of the official UI's backend, compared with rows that the real one has sent; what is
# told over sockets; the login and the files of a UI. Through a service in this process: `ui` on an
# empty root, `empty` where nothing is written, `five` for lists, `zoo` on recorded flows.


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A client of a service with a UI, on a root that stays empty: for tests that add nothing."""
    with serve_ui(new_store(tmp_path_factory)) as client:
        yield client


@pytest.fixture(scope="session")
def zoo(recorded: Path) -> Iterator[Api]:
    """A client of a service with a UI on the flows in `recorded`."""
    with serve_ui(mls.Store(str(recorded))) as client:
        yield client


def zoo_run(zoo: Api) -> str:
    (run,) = zoo.get("/api/runs?flow_id=ZooFlow").json["data"]
    return f"/api/flows/ZooFlow/runs/{run['run']}"


def zoo_task(zoo: Api, step: str) -> str:
    tasks = zoo.get(f"{zoo_run(zoo)}/tasks?step_name={step}").json["data"]
    return f"{zoo_run(zoo)}/steps/{step}/tasks/{tasks[0]['task_id']}"


def json_types(value: Any) -> Any:
    """The shape of a JSON value: the names and the types in it."""
    if isinstance(value, dict):
        return {name: json_types(item) for name, item in value.items()}
    if isinstance(value, list):
        return [json_types(item) for item in value[:1]]
    return type(value).__name__


# One row of each kind as the real backend sent it, without what differs from run to run.
TAGS = {"tags": ["demo"], "system_tags": ["user:alice"]}
OF_A_RUN = {"flow_id": "F", "run_number": 2, "run_id": None, "user_name": "alice", "ts_epoch": 1}
OF_A_TASK = {**OF_A_RUN, "step_name": "work", "task_id": 10, "task_name": None}
GOLDEN: Mapping[str, Any] = {
    "": {
        **OF_A_RUN,
        **TAGS,
        "user": "alice",
        "run": "2",
        "status": "completed",
        "finished_at": 2,
        "duration": 1,
        "last_heartbeat_ts": 1,
    },
    "/steps": {**OF_A_RUN, **TAGS, "run_id": "2", "step_name": "work", "duration": 1},
    "/tasks?step_name=work": {
        **OF_A_TASK,
        **TAGS,
        "status": "completed",
        "task_ok": None,
        "started_at": 1,
        "finished_at": 2,
        "duration": 1,
        "attempt_id": 1,
        "last_heartbeat_ts": 1,
    },
    "/metadata?step_name=start&field_name=attempt": {
        **OF_A_TASK,
        "id": 456,
        "attempt_id": 0,
        "field_name": "attempt",
        "value": "0",
        "type": "attempt",
        "tags": ["attempt_id:0"],
        "system_tags": [],
    },
    "/steps/{work}/attempts": {
        **OF_A_TASK,
        **TAGS,
        "status": "completed",
        "task_ok": None,
        "started_at": 1,
        "finished_at": 2,
        "duration": 1,
        "attempt_id": 1,
        "last_heartbeat_ts": 1,
    },
    "/steps/{start}/artifacts?attempt_id=0&postprocess=true&_limit=50": {
        **OF_A_TASK,
        **TAGS,
        "name": "names",
        "location": ":root:/home/tester/project/.metaflow",
        "ds_type": "local",
        "sha": "27a9c187db5f8b3ae4e0051322bfa3acf3af9bf5",
        "type": "metaflow.artifact",
        "content_type": "pickle-v4",
        "attempt_id": 0,
        "content": "['a', 'b']",
    },
    "/steps/{start}/logs/out?attempt_id=0&_limit=1000&_page=1&_order=-row": {
        "row": 1,
        "timestamp": 1795448669994,
        "line": "hello",
    },
    "/steps/{left}/cards": {
        "id": "report",
        "hash": "7a6350f5923a477d8eeb267add9c8101",
        "type": "blank",
    },
}


OUR_FIELDS = {"cause", "foreach_label", "origin_pathspec", "is_log_stored", "origin_run_id"}


@pytest.mark.parametrize("path", GOLDEN)
def test_rows_have_the_fields_and_types_of_the_real_backend(zoo: Api, path: str) -> None:
    step = re.search("{(.*)}", path)
    base = zoo_run(zoo)
    if step:
        base, path = zoo_task(zoo, step.group(1)), path.partition("}")[2]
    reply = zoo.get(base + path)
    body = reply.json
    assert (reply.status, body["status"]) == (200, 200)
    row = body["data"][0] if isinstance(body["data"], list) else body["data"]
    theirs = {name: value for name, value in row.items() if name not in OUR_FIELDS}
    assert json_types(theirs) == json_types(GOLDEN[next(p for p in GOLDEN if p.endswith(path))])


def test_a_list_has_the_envelope_of_the_real_backend(zoo: Api) -> None:
    body = zoo.get(f"{zoo_run(zoo)}/tasks?_order=%2Bts_epoch&_limit=1").json
    assert list(body) == ["data", "status", "links", "pages", "query"]
    assert body["pages"] == {"self": 1, "first": 1, "prev": 1, "next": None, "last": None}
    assert list(body["links"]) == ["self", "first", "prev", "next", "last"]
    assert body["query"] == {"_order": "+ts_epoch", "_limit": "1"}
    assert body["links"]["self"].startswith("/api/flows/ZooFlow/runs/")


@pytest.mark.parametrize(
    "path", ["/tasks", "/metadata?step_name=start", "{work}/metadata", "{work}/artifacts"]
)
def test_lists_that_the_ui_fetches_to_the_end_come_whole(zoo: Api, path: str) -> None:
    base = zoo_task(zoo, "work") if "{" in path else zoo_run(zoo)
    url = base + path.replace("{work}", "") + ("&" if "?" in path else "?") + "_limit=1"
    body = zoo.get(url).json
    assert body["links"]["next"] is None and len(body["data"]) > 1


def test_metadata_with_and_without_an_attempt_are_distinguished(zoo: Api) -> None:
    path = f"{zoo_task(zoo, 'work')}/metadata"
    fields = {row["field_name"] for row in zoo.get(f"{path}?attempt_id=0").json["data"]}
    assert {"attempt", "attempt_ok", "ds-root"} <= fields
    assert zoo.get(f"{path}?attempt_id:is=null").json["data"] == []
    assert all(isinstance(row["value"], str) for row in zoo.get(path).json["data"])


def test_the_task_that_waits_for_a_refined_status_gets_it(zoo: Api) -> None:
    path = f"{zoo_run(zoo)}/tasks"
    asked = [str(task["task_id"]) for task in zoo.get(path).json["data"]][:2]
    rows = zoo.get(f"{path}?taskId={','.join(asked)}&postprocess=true&_limit=500").json["data"]
    assert {str(row["task_id"]) for row in rows} == set(asked)


def test_parameters_and_graph_are_those_of_the_flow(zoo: Api) -> None:
    assert zoo.get(f"{zoo_run(zoo)}/parameters").json["data"] == {"size": {"value": 3}}
    graph = zoo.get(f"{zoo_run(zoo)}/dag").json["data"]
    assert graph["graph_structure"][0] == "start"
    assert graph["steps"]["left"]["decorators"][0]["name"] == "card"
    assert graph["steps"]["start"]["doc"] == "Fans out."


def test_a_local_datastore_is_no_reason_for_a_warning(zoo: Api) -> None:
    assert zoo.get(f"{zoo_run(zoo)}/artifacts?ds_type=local&_limit=1").json["data"] == []


def test_values_are_shown_or_why_they_are_not(zoo: Api) -> None:
    def value(step: str, name: str) -> Any:
        path = f"{zoo_task(zoo, step)}/artifacts?attempt_id=0&postprocess=true&name={name}"
        (row,) = zoo.get(path).json["data"]
        return row

    assert value("collect", "letters")["content"] == "('a', 'b')"
    assert value("end", "big")["postprocess_error"]["id"] == "artifact-too-large"


@pytest.mark.parametrize(
    ("step", "made", "inherited"),
    [
        ("start", {"names"}, {"name", "size"}),
        ("work", {"letter"}, {"name", "size", "names"}),
        ("collect", {"letters"}, {"name", "size"}),
        ("right", {"problem"}, {"name", "size", "names"}),
    ],
)
def test_artifacts_that_a_task_before_had_are_inherited(
    zoo: Api, step: str, made: set[str], inherited: set[str]
) -> None:
    rows = zoo.get(f"{zoo_task(zoo, step)}/artifacts?attempt_id=0&inherited=true").json["data"]
    shown = [(row["name"], row["is_inherited"]) for row in rows if row["name"][:1] != "_"]
    assert {name for name, is_inherited in shown if not is_inherited} == made
    assert {name for name, is_inherited in shown if is_inherited} == inherited


def test_runs_are_compared_by_what_differs(zoo: Api) -> None:
    run = zoo_run(zoo).removeprefix("/flows/").replace("/runs/", "/")
    run = run.removeprefix("/api/flows/")
    same = zoo.get(f"/api/compare?run={run}&run={run}").json["data"]
    assert same["differences"] == []
    whole = zoo.get(f"/api/compare?run={run}&run={run}&all=true").json["data"]
    sections = {difference["section"] for difference in whole["differences"]}
    assert {"parameters", "artifacts", "durations", "code"} <= sections
    for query in ("", f"run={run}", f"run={run}&run=nonsense"):
        assert zoo.get(f"/api/compare?{query}").status == 400
    missing = zoo.get(f"/api/compare?run={run}&run=None/1")
    assert (missing.status, missing.json) == (404, {"message": "There is no run None/1."})


def test_cards_that_are_recorded_but_cannot_be_found_are_counted(ui: Api) -> None:
    task = ui.new_task_of_its_own()
    uuid = "e22d3134c65f4295b6a40d9aece26fca"
    ui.post(f"{task}/metadata", [{**metadatum(uuid, "{}"), "type": "card-info"}])
    reply = ui.get(f"/api{task}/cards").json
    assert (reply["data"], reply["missing"]) == ([], 1)


def test_an_image_is_sent_as_one_and_nothing_else_is(store: mls.Store, ui: Api) -> None:
    task = ui.new_task_of_its_own()
    image = b"\x89PNG\r\n\x1a\n" + b"0" * 200
    page = b"<script>alert(1)</script>" * 10
    values = {"image": image, "page": page, "text": "text"}
    rows = [artifact(name, **store_value(store, value)) for name, value in values.items()]
    ui.post(f"{task}/artifact", rows)
    shown_rows = ui.get(f"/api{task}/artifacts?postprocess=true").json["data"]
    kinds = {row["name"]: row.get("content_kind") for row in shown_rows}
    assert kinds == {"image": "image/png", "page": "application/octet-stream", "text": None}
    reply = ui.get(f"/api{task}/artifacts/image/raw?attempt_id=0")
    assert (reply.content, reply.headers["content-type"]) == (image, "image/png")
    assert reply.headers["content-security-policy"] == "sandbox"
    for name in ("page", "text", "none"):
        assert ui.get(f"/api{task}/artifacts/{name}/raw").status == 404


def test_a_file_that_a_flow_includes_is_shown_as_its_text(store: mls.Store, ui: Api) -> None:
    task = ui.new_task_of_its_own()
    blob = Path(store.folder, "data", "Flow", "0" * 40)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(gzip.compress("Grüße".encode()))
    descriptor = {"type": "uploader-v2", "url": f"local://{blob}", "is_text": True}
    state = {"_descriptor": {**descriptor, "encoding": "utf-8"}}
    pickled = b"cmetaflow.includefile\nIncludedFile\n)\x81" + pickle.dumps(state, 2)[2:-1] + b"b."
    content = gzip.compress(pickled)
    sha = hashlib.sha1(content).hexdigest()
    path = Path(store.folder, "Flow", "data", sha[:2], sha)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    ui.post(f"{task}/artifact", [artifact("file", location=f":root:{store.folder}", sha=sha)])
    (row,) = ui.get(f"/api{task}/artifacts?postprocess=true").json["data"]
    assert row["content"] == "Grüße"


def test_a_card_is_listed_shown_and_its_data_too(zoo: Api) -> None:
    path = f"{zoo_task(zoo, 'left')}/cards"
    (card,) = zoo.get(path).json["data"]
    page = zoo.get(f"{path}/{card['hash']}?embed=true")
    assert page.headers["content-type"].startswith("text/html") and b"<html" in page.content
    data = zoo.get(f"{path}/{card['hash']}/data")
    if data.status == 200:  # Metaflow has live cards since 2.12
        assert set(data.json) == {"data", "id", "type"} and data.json["id"] == "report"
        assert data.json["data"]["reload_token"] == "final"
    assert zoo.get(f"{path}/0123456789abcdef").status == 404
    assert "error" in zoo.get(f"{path}/0123456789abcdef/data").json


def test_a_log_is_downloaded_as_a_text_file(zoo: Api) -> None:
    reply = zoo.get(f"{zoo_task(zoo, 'start')}/logs/out/download?attempt_id=0")
    assert reply.content.decode() == "hello from start \u20ac <b>html</b>"
    assert reply.headers["content-disposition"].startswith(
        "attachment; filename*=UTF-8''stdout_Zoo"
    )
    assert reply.headers["content-type"].startswith("text/plain")


def test_looking_changes_nothing(zoo: Api, recorded: Path) -> None:
    def files() -> list[tuple[str, float]]:
        return [(str(path), path.stat().st_mtime) for path in all_paths(recorded / ".metaflow")]

    before = files()
    for step in ("start", "left"):
        task = zoo_task(zoo, step)
        for path in ("logs/out", "logs/err", "cards", "artifacts?postprocess=true", "metadata"):
            assert zoo.get(f"{task}/{path}").status == 200
    assert files() == before


@pytest.mark.parametrize(
    ("path", "value"),
    [("/plugin", []), ("/notifications?start:le=1", []), ("/version", None), ("/links", None)],
)
def test_requests_at_the_start_of_the_ui_are_answered(empty: Api, path: str, value: Any) -> None:
    reply = empty.get(f"/api{path}")
    assert reply.status == 200
    assert value is None or reply.json == value


def test_optional_features_of_the_ui_are_on(empty: Api) -> None:
    assert empty.get("/api/features").json == {
        f"FEATURE_{name}": True
        for name in ("RUN_GROUPS", "ARTIFACT_TABLE", "ARTIFACT_SEARCH", "FOREACH_VAR_SEARCH")
    }


def test_missing_objects_are_answered_as_the_ui_expects(empty: Api) -> None:
    run = "/api/flows/None/runs/1"
    assert empty.get(run).status == 404 and empty.get(run).json["data"] == {}
    assert empty.get(f"{run}/dag").json["status"] == 404
    assert empty.get(f"{run}/parameters").status == 404
    for path in ("/steps", "/tasks", "/metadata?step_name=start", "/steps/start/tasks/1/metadata"):
        assert empty.get(run + path).json["data"] == [] and empty.get(run + path).status == 200
    log = empty.get(f"{run}/steps/start/tasks/1/logs/out?attempt_id=0")
    assert log.status == 404 and log.json["data"] == []
    assert empty.get(f"{run}/steps/start/tasks/1/cards").json["data"] == []


# -- the other reads of the backend, and the metadata API once more --------------------------------


def test_reads_that_the_official_ui_does_not_use_are_answered(tmp_path_factory: Any) -> None:
    with serve_ui(new_store(tmp_path_factory)) as client:
        run = client.new_run(client.new_flow("Flow"), tags=["x", "y"])
        step = client.new_step(run)
        task, other = client.new_task(step), client.new_task(step)
        client.post(f"{task}/artifact", [{"name": "a", "ds_type": "local"}])

        def data(path: str) -> Any:
            reply = client.get(f"/api{path}")
            assert (reply.status, reply.json["status"]) == (200, 200), path
            return reply.json["data"]

        assert [flow["flow_id"] for flow in data("/flows")] == ["Flow"]
        assert data("/flows/Flow")["flow_id"] == "Flow"
        assert [row["run"] for row in data("/flows/Flow/runs")] == [run.rpartition("/")[2]]
        assert data("/flows/Other/runs") == []
        assert data(step)["step_name"] == "start"
        assert data(task)["attempt_id"] == 0
        for parent in (run, step, task):
            assert [each["name"] for each in data(f"{parent}/artifacts")] == ["a"]
        assert data(f"{run}/artifacts?ds_type=s3") == []
        assert set(data("/tags")) >= {"x", "y"}
        newest = [str(row["task_id"]) for row in data(f"{step}/tasks?_order=-ts_epoch")]
        assert sorted(newest) == sorted((task.split("/")[-1], other.split("/")[-1]))
        page = client.get(f"/api{step}/tasks?_limit=1").json
        assert (len(page["data"]), page["pages"]["next"]) == (1, 2)
        assert len(data(f"{step}/tasks?_group=step_name&_group_limit=1")) == 1
        for path in ("/flows/Other", f"{run}/steps/none", f"{step}/tasks/77"):
            assert client.get(f"/api{path}").status == 404, path
        assert client.get("/api/ping").content == b"pong"
        assert client.get("/api/config").json == {}
        assert client.get("/api/status").json == {"cache": {}}
        assert (
            client.get("/api/plugin/any").status == client.get("/api/plugin/any/file").status == 404
        )


UI_LISTS = {
    "/runs": ("flow_id", "run", "run_id", "user_name", "user", "status"),
    "/flows": ("flow_id", "user_name"),
    "{run}/steps": ("step_name", "user_name"),
    "{run}/tasks": ("step_name", "task_id", "task_name", "user_name", "status"),
    "{run}/metadata": ("step_name", "task_id", "task_name", "user_name", "field_name", "value"),
    "{run}/artifacts": ("step_name", "task_id", "task_name", "user_name", "name", "location"),
    "{step}/tasks": ("step_name", "task_id", "task_name", "user_name", "status"),
    "{step}/artifacts": ("task_id", "task_name", "user_name", "name", "ds_type", "sha", "type"),
    "{task}/attempts": ("step_name", "task_name", "user_name", "status"),
    "{task}/metadata": ("user_name", "field_name", "value", "type"),
    "{task}/artifacts": ("user_name", "name", "location", "ds_type", "sha", "content_type"),
}


def test_every_list_of_the_ui_can_be_filtered(tmp_path_factory: Any) -> None:
    user = {"user_name": "tester", "system_tags": ["user:tester"]}
    with serve_ui(new_store(tmp_path_factory)) as client:
        client.post("/flows/Flow", user)
        run = client.new_run("/flows/Flow", run_number="named", **user)
        client.post(f"{run}/steps/start/step", user)
        step = f"{run}/steps/start"
        task = client.new_task(step, task_id="job", **user)
        client.post(f"{task}/artifact", [artifact("a", user_name="tester")])
        client.post(f"{task}/metadata", [metadatum("field", user_name="tester")])
        for template, columns in UI_LISTS.items():
            path = f"/api{template.format(run=run, step=step, task=task)}"
            [row] = client.get(path).json["data"]
            for name in columns:
                found = client.get(f"{path}?{name}={quote(row[name])}").json["data"]
                others = client.get(f"{path}?{name}:ne={quote(row[name])}").json["data"]
                assert (len(found), others) == (1, []), (template, name)


def test_whoever_counts_pages_gets_each_row_once(tmp_path_factory: Any) -> None:
    with serve_ui(new_store(tmp_path_factory)) as client:
        run = client.new_run(client.new_flow("Flow"))
        step = client.new_step(run)
        task, *_ = [client.new_task(step) for _ in range(3)]
        client.post(f"{task}/artifact", [{"name": name, "ds_type": "s3"} for name in "abc"])
        client.post(f"{task}/metadata", [metadatum("field", str(each)) for each in range(3)])
        for parent, name in (
            *((run, name) for name in ("tasks", "metadata", "artifacts")),
            *((step, name) for name in ("tasks", "artifacts")),
            *((task, name) for name in ("metadata", "artifacts")),
        ):
            pages = [
                client.get(f"/api{parent}/{name}?_limit=2&_page={number}").json
                for number in (1, 2, 3)
            ]
            assert [page["pages"]["self"] for page in pages] == [1, 2, 3], name
            assert [len(page["data"]) for page in pages] in ([2, 1, 0], [3, 0, 0]), name


@pytest.mark.parametrize("mount", ["/metadata", "/api/metadata"])
def test_the_metadata_api_can_be_read_at_two_more_places(tmp_path_factory: Any, mount: str) -> None:
    with serve_ui(new_store(tmp_path_factory)) as client:
        run = client.new_run(client.new_flow("Flow"))
        assert client.get(f"{mount}/ping").content == b"pong"
        assert client.get(mount + run).json == client.get(run).json
        assert client.get(f"{mount}/flows?_limit=5").headers["x-limit"] == "5"
        assert client.get(f"{mount}/flows/None").status == 404
        assert client.get(mount).status == 404
        for path in ("/flows/Other", "/flows/Flow/run"):
            reply = client.post(mount + path, {})
            assert (reply.status, reply.headers["allow"]) == (405, "GET, HEAD")
        assert client.get("/flows/Other").status == 404


@pytest.mark.parametrize("mount", ["", "/metadata", "/api/metadata"])
def test_access_is_the_same_at_every_mount(tmp_path_factory: Any, mount: str) -> None:
    with serve_ui(new_store(tmp_path_factory), key="secret") as client:
        assert client.get(f"{mount}/flows").status == 200
        assert client.get(f"{mount}/flows", **{"x-api-key": "wrong"}).status in (401, 403)
    with serve_ui(new_store(tmp_path_factory)) as client:
        assert client.get(f"{mount}/flows", Host="evil.example").status == 403


def test_both_apis_say_the_same_of_a_run(tmp_path_factory: Any) -> None:
    with serve_ui(new_store(tmp_path_factory)) as client:
        flow = client.new_flow("Flow")
        for name, value in (("good", "True"), ("bad", "False"), ("new", None)):
            task = client.new_task(client.new_step(client.new_run(flow, run_number=name), "end"))
            client.post(f"{task}/metadata", [metadatum("attempt", "0")])
            client.post(f"{task}/metadata", [metadatum("attempt_ok", value)] if value else [])
        client.new_run(flow, run_number="dead", system_tags=["runtime:dev"])
        told = {
            run["run_number"]: run["status"]
            for status in mls.STATUSES
            for run in client.get(f"{flow}/runs?status={status}").json
        }
        assert told == {row["run"]: row["status"] for row in client.get("/api/runs").json["data"]}
        assert told == {"good": "completed", "bad": "failed", "new": "running", "dead": "failed"}


# -- runs: filters, order, pages -------------------------------------------------------------------


@pytest.fixture(scope="session")
def five(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """Five runs, by name: their flows, owners and tags differ; only `c` has ended."""
    with serve_ui(new_store(tmp_path_factory)) as client:
        make_five_runs(client)
        yield client


def make_five_runs(ui: Api) -> None:
    runs = [
        ("a", "Flow", "alice", ["x"]),
        ("b", "Flow", "bob", ["x", "y"]),
        ("c", "Flow", None, []),
        ("d", "Other", "alice", ["y"]),
        ("e", "Other", None, ["x"]),
    ]
    for flow in ("Flow", "Other"):
        ui.new_flow(flow)
    for name, flow, user, tags in runs:
        system_tags = [f"user:{user}", "metaflow_version:2.19.0"] if user else ["runtime:dev"]
        fields = {"user_name": user, "tags": tags, "system_tags": system_tags}
        run = ui.new_run(f"/flows/{flow}", run_number=name, **fields)
        if name == "c":
            task = ui.new_task(ui.new_step(run, "end"))
            ui.post(f"{task}/metadata", [metadatum("attempt", "0"), metadatum("attempt_ok", True)])
        time.sleep(0.002)  # the order is by milliseconds


def run_names(reply: Reply) -> str:
    assert reply.status == 200, reply.content
    return "".join(row["run"] for row in reply.json["data"])


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", "edcba"),
        ("_order=-ts_epoch", "edcba"),
        ("_order=%2Bts_epoch", "abcde"),
        ("_order=+ts_epoch", "abcde"),
        ("_order=-flow_id,%2Bts_epoch", "deabc"),
        ("_order=%2Buser,ts_epoch", "dabec"),
        ("_order=-user,ts_epoch", "ecbda"),
        ("_order=-project", "edcba"),
        ("_order=%2Brun_number", "abcde"),
        ("_order=-last_heartbeat_ts,run", "ecdba"),
        ("_order=-finished_at&status=completed", "c"),
        ("flow_id=Other", "ed"),
        ("flow_id=Other,Flow", "edcba"),
        ("user=alice", "da"),
        ("user=alice,null", "edca"),
        ("user=null", "ec"),
        ("_tags=x", "eba"),
        ("_tags:any=x,y", "edba"),
        ("_tags=user:alice", "da"),
        ("status=completed", "c"),
        ("status=completed,failed", "ec"),
        ("status=running&flow_id=Flow", "ba"),
        ("status=unheard-of", ""),
        ("ts_epoch:le=0", ""),
        ("run=a,e", "ea"),
        ("nonsense=1&_nonsense=2", "edcba"),
    ],
)
def test_runs_are_found_and_put_in_order(five: Api, query: str, expected: str) -> None:
    assert run_names(five.get(f"/api/runs?{query}")) == expected


def test_pages_of_runs_say_whether_there_are_more(five: Api) -> None:
    pages = [
        five.get(f"/api/runs?_order={order}&_limit=2&_page={page}")
        for order in ("-ts_epoch", "%2Bts_epoch")
        for page in (1, 2, 3)
    ]
    assert [run_names(page) for page in pages] == ["ed", "cb", "a", "ab", "cd", "e"]
    assert [page.json["pages"]["next"] for page in pages] == [2, 3, None] * 2
    assert run_names(five.get(pages[0].json["links"]["next"])) == "cb"


@pytest.mark.parametrize(
    ("query", "expected", "following"),
    [
        ("_group=flow_id&_limit=1&_group_limit=2", "cb", 2),
        ("_group=flow_id&_limit=1&_group_limit=2&_page=2", "ed", None),
        ("_group=user&_group_limit=7&_order=%2Bts_epoch", "adbce", None),
        ("_group=user&_group_limit=1&_limit=2", "db", 2),
        ("_group=nonsense&_limit=3", "edc", 2),
    ],
)
def test_groups_of_runs_are_pages_and_cut_to_a_length(
    five: Api, query: str, expected: str, following: int | None
) -> None:
    reply = five.get(f"/api/runs?{query}")
    assert (run_names(reply), reply.json["pages"]["next"]) == (expected, following)


@pytest.mark.parametrize("query", ["ts_epoch:zz=1", "_limit=x", "_page=-1", "duration=x"])
def test_an_invalid_query_of_the_ui_is_refused(five: Api, query: str) -> None:
    assert five.get(f"/api/runs?{query}").status == 400


def test_only_runs_that_are_shown_are_judged(five: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = []
    judge = mls.Runs._verdict
    monkeypatch.setattr(mls.Runs, "_verdict", lambda *a: judged.append(a[1]["run"]) or judge(*a))
    five.get("/api/runs?_limit=2&_order=-ts_epoch")
    assert judged == ["e", "d"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/flows/autocomplete?_limit=5&flow_id:co=o", ["Flow", "Other"]),
        ("/flows/autocomplete?_limit=1&flow_id:co=o", ["Flow"]),
        ("/flows/Flow/runs/autocomplete?_limit=5&run:co=", ["a", "b", "c"]),
        ("/flows/Flow/runs/c/steps/autocomplete?_limit=5&step_name:co=EN", ["end"]),
        ("/flows/Flow/runs/c/artifacts/autocomplete?_limit=5&name:co=x", []),
        ("/tags/autocomplete?tag:co=ALI", ["user:alice"]),
        ("/tags/autocomplete?tag:re=user:.*b.*", ["user:bob"]),
        ("/tags/autocomplete?tag:re=project:.**.*", []),
        ("/tags/autocomplete?tag:re=(((.*a%2B)%2B)%2B.*%25", []),
    ],
)
def test_names_are_completed_and_no_text_is_a_bad_pattern(
    five: Api, path: str, expected: list[str]
) -> None:
    body = five.get(f"/api{path}").json
    assert (body["data"], body["status"]) == (expected, 200)


# -- pages of logs ---------------------------------------------------------------------------------


@pytest.fixture
def log_of_26(store: mls.Store, ui: Api) -> str:
    """The path of a task that has written 26 lines."""
    task = ui.new_task_of_its_own()
    ui.post(f"{task}/metadata", [metadatum("attempt", "0"), metadatum("ds-root", store.folder)])
    folder = Path(store.folder, *task.split("/")[2::2])
    (folder / "0.task_stdout.log").write_bytes(b"".join(log_line(str(i), i) for i in range(26)))
    return f"/api{task}/logs/out"


@pytest.mark.parametrize(
    ("order", "page", "rows"),
    [
        ("%2Brow", 1, range(10)),
        ("+row", 3, range(20, 26)),
        ("%2Brow", 4, ()),
        ("-row", 1, range(25, 19, -1)),
        ("-row", 3, range(9, -1, -1)),
        ("-row", 4, ()),
    ],
)
def test_pages_of_a_log_are_counted_from_its_beginning(
    ui: Api, log_of_26: str, order: str, page: int, rows: Any
) -> None:
    body = ui.get(f"{log_of_26}?attempt_id=0&_limit=10&_page={page}&_order={order}").json
    assert [line["row"] for line in body["data"]] == list(rows)
    assert body["pages"]["last"] == 3


def test_a_log_of_another_root_is_read_only_if_that_is_a_datastore(
    store: mls.Store, ui: Api, tmp_path: Path
) -> None:
    task = ui.new_task_of_its_own()
    ids = task.split("/")[2::2]
    for attempt, root in enumerate((tmp_path / "else" / ".metaflow", tmp_path / "secrets")):
        rows = [metadatum("ds-root", str(root), attempt), metadatum("attempt", str(attempt))]
        ui.post(f"{task}/metadata", rows)
        root.joinpath(*ids).mkdir(parents=True)
        root.joinpath(*ids, f"{attempt}.task_stdout.log").write_bytes(log_line("text", 1))
    replies = [ui.get(f"/api{task}/logs/out?attempt_id={n}").json["data"] for n in (0, 1)]
    assert [len(lines) for lines in replies] == [1, 0]


@pytest.mark.parametrize(
    ("location", "sha"),
    [
        (":root:/etc", "passwd"),
        ("/etc/passwd", "0" * 40),
        (":root:{root}", "../../../secret"),
        (":root:{root}", "0" * 40),
    ],
)
def test_an_artifact_that_points_elsewhere_is_not_read(
    store: mls.Store, ui: Api, location: str, sha: str
) -> None:
    task = ui.new_task_of_its_own()
    row = artifact("x", location=location.replace("{root}", store.folder), sha=sha)
    ids = tuple(task.split("/")[2::2])
    stored = mls.parse_artifact(row)
    store.create_artifacts(ids, [stored])
    (shown_row,) = ui.get(f"/api{task}/artifacts?postprocess=true").json["data"]
    assert "content" not in shown_row
    assert shown_row["postprocess_error"]["id"] == "artifact-handle-failed"


# -- sockets ---------------------------------------------------------------------------------------


class Page:
    """A browser's end of a WebSocket."""

    def __init__(self, api: Api, path: str = "/api/ws", **headers: str) -> None:
        self.socket = socket.create_connection((api.host, api.port), timeout=20)
        self.file = self.socket.makefile("rb")
        lines = {
            "Host": f"{api.host}:{api.port}",
            "Upgrade": "websocket",
            "Connection": "keep-alive, Upgrade",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
            "Sec-WebSocket-Version": "13",
            **headers,
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self.socket.sendall(f"GET {path} HTTP/1.1\r\n{head}\r\n".encode())
        self.status = int(self.file.readline().split()[1])
        self.headers = dict(line.split(": ", 1) for line in iter(self._header_line, ""))

    def _header_line(self) -> str:
        return self.file.readline().decode().strip()

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.socket.close()

    def send(self, message: Any) -> None:
        text = message if isinstance(message, str) else json.dumps(message)
        self.socket.sendall(client_frame(1, text.encode()))

    def subscribe(self, resource: str, uuid: str = "u", **more: Any) -> None:
        self.send({"type": "SUBSCRIBE", "uuid": uuid, "resource": resource, **more})

    def receive(self) -> tuple[int, bytes]:
        head = self.file.read(2)
        if len(head) < 2:
            return 0, b""
        size = head[1]
        if size >= 126:
            size = int.from_bytes(self.file.read(2 if size == 126 else 8), "big")
        return head[0] & 0x0F, self.file.read(size)

    def text(self) -> str:
        kind, payload = self.receive()
        assert kind == 1, (kind, payload)
        return payload.decode()

    def frame(self) -> Any:
        """The next frame that is about something."""
        return json.loads(self.text())

    def close_code(self) -> int:
        """The code with which the server closes, after what it says before."""
        while True:
            kind, payload = self.receive()
            if kind == 8:
                return int.from_bytes(payload[:2], "big")
            assert kind == 1

    def is_closed(self) -> bool:
        return self.receive() == (0, b"")


def client_frame(kind: int, payload: bytes, mask: bytes = b"\x01\x02\x03\x04") -> bytes:
    size = len(payload)
    if size < 126:
        length = bytes((0x80 | size,))
    elif size < 2**16:
        length = bytes((0x80 | 126,)) + size.to_bytes(2, "big")
    else:
        length = bytes((0x80 | 127,)) + size.to_bytes(8, "big")
    masked = bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))
    return bytes((0x80 | kind,)) + length + mask + masked


def test_the_handshake_is_that_of_the_rfc(empty: Api) -> None:
    with Page(empty) as page:
        assert page.status == 101
        assert page.headers["Sec-WebSocket-Accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


@pytest.mark.parametrize(
    "headers", [{"Upgrade": "h2c"}, {"Sec-WebSocket-Version": "8"}, {"Sec-WebSocket-Key": "short"}]
)
def test_an_invalid_handshake_is_a_426(empty: Api, headers: dict[str, str]) -> None:
    with Page(empty, **headers) as page:
        assert page.status == 426


def test_a_foreign_page_gets_no_socket(empty: Api) -> None:
    with Page(empty, Origin="http://evil.example") as page:
        assert page.status == 403


@given(
    st.lists(st.tuples(st.sampled_from([1, 2, 9]), st.binary(max_size=120)), max_size=5),
    st.integers(1, 40),
)
@settings(deadline=None, max_examples=50)
def test_messages_are_the_same_however_they_are_split(sent: Any, size: int) -> None:
    stream = b"".join(client_frame(kind, payload) for kind, payload in sent)
    decoder = mls.FrameDecoder()
    received = []
    for at in range(0, len(stream), size):
        received += decoder.feed(stream[at : at + size])
    assert received == sent


@pytest.mark.parametrize("size", [0, 125, 126, 65535, 65536])
def test_frames_of_all_lengths_are_made_and_read(size: int) -> None:
    if size <= mls.LARGEST_MESSAGE:
        assert mls.FrameDecoder().feed(client_frame(1, b"x" * size)) == [(1, b"x" * size)]
    frame = mls.encode_frame(1, b"x" * size)
    assert frame.endswith(b"x" * size) and len(frame) - size in (2, 4, 10)


def test_a_message_in_parts_is_put_together_around_a_ping() -> None:
    parts = [client_frame(1, b"a"), client_frame(9, b"p"), client_frame(0, b"b")]
    parts[0] = bytes((0x01,)) + parts[0][1:]  # not the last
    assert mls.FrameDecoder().feed(b"".join(parts)) == [(9, b"p"), (1, b"ab")]


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"\x81\x01a", 1002),  # without a mask
        (b"\xc1\x81\0\0\0\0a", 1002),  # compressed, which nobody agreed on
        (b"\x83\x81\0\0\0\0a", 1002),  # of an unknown kind
        (b"\x80\x81\0\0\0\0a", 1002),  # the rest of no message
        (b"\x09\x81\0\0\0\0a", 1002),  # a ping in parts
        (b"\x89\xfe\x00\x7e\0\0\0\0", 1002),  # a long ping
        (client_frame(1, b"\xff"), 1007),
        (b"\x81\xff\x7f" + b"\xff" * 7 + b"\0\0\0\0", 1009),
    ],
)
def test_a_protocol_error_closes_the_socket_with_its_code(
    empty: Api, frame: bytes, code: int
) -> None:
    with Page(empty) as page:
        page.socket.sendall(frame)
        assert page.close_code() == code
        assert page.is_closed()


def test_pings_of_the_ui_and_of_the_protocol_are_answered(empty: Api) -> None:
    with Page(empty) as page:
        page.send("__ping__")
        assert page.text() == "__pong__"
        page.socket.sendall(client_frame(9, b"hello"))
        assert page.receive() == (10, b"hello")
        page.socket.sendall(client_frame(8, b"\x03\xe8"))
        assert page.close_code() == 1000
        assert page.is_closed()


def test_a_run_appears_moves_and_ends_on_a_page(ui: Api) -> None:
    with Page(ui) as page:
        page.subscribe("/runs?flow_id=Flow&_limit=30&_order=-ts_epoch")
        run = ui.new_run(ui.new_flow(), system_tags=["user:t", "metaflow_version:2.19.0"])
        frame = page.frame()
        assert (frame["type"], frame["uuid"], frame["resource"]) == ("INSERT", "u", "/runs")
        assert frame["data"] == ui.get(f"/api{run}").json["data"] | {
            "duration": frame["data"]["duration"]
        }
        task = ui.new_task(ui.new_step(run, "end"))
        ui.post(f"{task}/metadata", [metadatum("attempt", "0"), metadatum("attempt_ok", "True")])
        frame = page.frame()
        assert (frame["type"], frame["data"]["status"]) == ("UPDATE", "completed")
        ui.patch(f"{run}/tag/mutate", {"tags_to_add": ["new"]})
        assert page.frame()["data"]["tags"] == ["new"]


def test_deletions_are_sent_over_exact_sockets(store: mls.Store, ui: Api, tmp_path: Path) -> None:
    flow = ui.new_flow()
    gone, kept = ui.new_run(flow), ui.new_run(flow)
    with Page(ui, "/api/ws?exact=true") as page, Page(ui) as official:
        for resource in ("/runs", gone, kept):
            page.subscribe(resource, uuid=resource)
        official.subscribe("/runs")
        assert {page.frame()["type"] for _ in range(4)} == {"INSERT", "UPDATE"}
        assert [official.frame()["type"] for _ in range(2)] == ["INSERT", "INSERT"]
        names = gone.split("/")[2::2]
        Path(store.folder, *names).rename(tmp_path / "gone")  # at once, and not file by file
        told = {frame["uuid"]: frame for frame in (page.frame(), page.frame())}
        assert {frame["type"] for frame in told.values()} == {"DELETE"}
        assert told["/runs"]["data"] == dict(zip(("flow_id", "run"), names))
        assert told[gone]["data"] == {}
        ui.patch(f"{kept}/tag/mutate", {"tags_to_add": ["later"]})
        assert official.frame()["type"] == "UPDATE", "to the official UI all frames are changes"


def test_steps_and_attempts_of_a_run_appear_in_their_order(store: mls.Store, ui: Api) -> None:
    run = ui.new_run(ui.new_flow())
    with Page(ui) as page:
        for part in ("", "/steps", "/tasks"):
            page.subscribe(run + part, uuid=part)
        assert page.frame()["type"] == "UPDATE", "of one object there is no INSERT"
        task = ui.new_task(ui.new_step(run, "end"))
        for number, is_ok in ((0, "False"), (1, "True")):
            ui.post(f"{task}/metadata", [metadatum("attempt", str(number), number)])
            ui.post(f"{task}/metadata", [metadatum("attempt_ok", is_ok, number)])
            scheduler_file = Path(store.folder, *task.split("/")[2::2], f"{number}.runtime")
            scheduler_file.write_text('{"success": true}')  # the log is stored
        told: list[tuple[str, Any, Any]] = []
        while ("", None, "completed") not in told or ("/tasks", 1, "completed") not in told:
            frame = page.frame()
            row = frame["data"]
            told.append((frame["uuid"], row.get("attempt_id"), row.get("status")))
        assert ("/steps", None, None) in told
        states = [status for uuid, attempt, status in told if (uuid, attempt) == ("/tasks", 1)]
        assert states[-1] == "completed" and "running" not in states[states.index("completed") :]


def test_metadata_and_parameters_appear_once_each(ui: Api) -> None:
    run = ui.new_run(ui.new_flow())
    task = ui.new_task(ui.new_step(run))
    with Page(ui) as page:
        page.subscribe(f"{run}/metadata?step_name=start", "of-run")
        page.subscribe(f"{task}/metadata?attempt_id=0", "of-task")
        ui.post(f"{task}/metadata", [metadatum("attempt", "0"), metadatum("other", "1", attempt=1)])
        frames = [page.frame() for _ in range(3)]
        assert {frame["type"] for frame in frames} == {"INSERT"}
        told = sorted((frame["uuid"], frame["data"]["field_name"]) for frame in frames)
        assert told == [("of-run", "attempt"), ("of-run", "other"), ("of-task", "attempt")]
        ui.post(f"{task}/metadata", [metadatum("more")])
        assert page.frame()["data"]["field_name"] == "more"


def test_an_end_is_sent_once_the_log_is_stored_and_the_run_last(
    store: mls.Store, ui: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mls, "RUN_END_DELAY_SECONDS", 1.5)
    run = ui.new_run(ui.new_flow())
    task = ui.new_task(ui.new_step(run, "end"))
    with Page(ui) as page:
        for part in ("", "/tasks"):  # the run first: it is told last all the same
            page.subscribe(run + part, uuid=part)
        for _ in range(2):
            assert page.frame()["data"]["status"] in ("running", "pending")
        end_task(ui, task)
        assert ui.get(f"/api{run}").json["data"]["status"] == "completed"
        begun = page.frame()["data"]
        assert (begun["status"], begun["finished_at"]) == ("running", None)
        ui.patch(f"{run}/tag/mutate", {"tags_to_add": ["later"]})
        for _ in range(2):
            told = page.frame()["data"]
            assert (told["status"], told["tags"]) == ("running", ["later"])
        store_log(store.folder, task)
        frames = [page.frame() for _ in range(2)]
        assert [frame["uuid"] for frame in frames] == ["/tasks", ""]
        for frame in frames:
            assert frame["data"]["status"] == "completed"
            assert frame["data"]["finished_at"] is not None


def test_an_exact_socket_tells_of_ends_at_once(store: mls.Store, ui: Api) -> None:
    run = ui.new_run(ui.new_flow())
    task = ui.new_task(ui.new_step(run, "end"))
    with Page(ui, "/api/ws?exact=true") as page:
        for part in ("", "/tasks"):
            page.subscribe(run + part, uuid=part)
        for _ in range(2):
            assert page.frame()["data"]["status"] in ("running", "pending")
        end_task(ui, task)
        told = [page.frame()["data"] for _ in range(2)]
        assert [row["status"] for row in told] == ["completed", "completed"]
        assert told[0]["is_log_stored"] is False
        store_log(store.folder, task)
        told = [page.frame()["data"]]
        assert (told[0]["status"], told[0]["is_log_stored"]) == ("completed", True)


def test_an_end_is_sent_after_a_while_also_without_a_log(
    ui: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mls, "LOG_WAIT_SECONDS", 0.0)
    run = ui.new_run(ui.new_flow())
    task = ui.new_task(ui.new_step(run, "end"))
    with Page(ui) as page:
        page.subscribe(f"{run}/tasks")
        assert page.frame()["data"]["status"] == "pending"
        end_task(ui, task)
        told = page.frame()["data"]
        assert (told["status"], told["is_log_stored"]) == ("completed", False)


def test_a_log_stored_after_the_end_of_its_run_is_sent(
    store: mls.Store, ui: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mls, "LOG_WAIT_SECONDS", 0.0)
    run = ui.new_run(ui.new_flow())
    task = ui.new_task(ui.new_step(run, "end"))
    end_task(ui, task)
    settle(store, run)
    with Page(ui) as page:
        page.subscribe(f"{run}/tasks")
        assert page.frame()["data"]["is_log_stored"] is False
        store_log(store.folder, task)
        assert page.frame()["data"]["is_log_stored"] is True


def settle(store: mls.Store, run: str) -> None:
    """Let the folders of a run be as old as those that are known not to change unnoticed."""
    for path in (Path(store.folder, *run.split("/")[2::2]), *all_paths(Path(store.folder))):
        if path.is_dir():
            os.utime(path, (time.time() - 5, time.time() - 5))


def test_artifacts_come_over_the_socket_with_their_values(store: mls.Store, ui: Api) -> None:
    task = ui.new_task_of_its_own()
    with Page(ui) as page:
        page.subscribe(f"{task}/artifacts?attempt_id=0&_limit=50")
        ui.post(f"{task}/artifact", [artifact("x", **store_value(store, [1, 2]), ds_type="local")])
        assert page.frame()["data"]["content"] == "[1, 2]"


def test_a_page_that_reconnects_gets_what_it_has_missed(zoo: Api) -> None:
    run = zoo_run(zoo)[len("/api") :]
    with Page(zoo) as page:
        page.subscribe(f"{run}/steps", "silent")
        page.subscribe(f"{run}/steps?step_name=end", "back", since=1)
        told = next(frame for frame in iter(page.frame, None) if frame["uuid"] == "back")
        assert told["data"]["step_name"] == "end"


def test_nothing_is_sent_after_unsubscribing(ui: Api) -> None:
    flow = ui.new_flow()
    with Page(ui) as page:
        page.subscribe("/runs", "first")
        ui.new_run(flow)
        assert page.frame()["uuid"] == "first"
        page.send({"type": "UNSUBSCRIBE", "uuid": "first"})
        page.send({"type": "UNSUBSCRIBE", "uuid": "unknown"})
        page.subscribe("/runs", "second")
        assert page.frame()["uuid"] == "second", "what is new is told to who comes now"
        ui.new_run(flow)
        assert page.frame()["uuid"] == "second"


@pytest.mark.parametrize(
    "message",
    [
        "",
        "not json",
        "[" * 10000,
        "[]",
        '{"type": "SUBSCRIBE"}',
        '{"type": "SUBSCRIBE", "uuid": 1, "resource": "/runs"}',
        '{"type": "SUBSCRIBE", "uuid": "u", "resource": 1}',
        '{"type": "SUBSCRIBE", "uuid": "u", "resource": "/nonsense"}',
        '{"type": "SUBSCRIBE", "uuid": "u", "resource": "/runs?ts_epoch:zz=1"}',
        '{"type": "SUBSCRIBE", "uuid": "u", "resource": "/flows/../runs/.."}',
        '{"type": "SUBSCRIBE", "uuid": "u", "resource": "/runs", "since": NaN}',
    ],
)
def test_an_invalid_message_is_ignored(empty: Api, message: str) -> None:
    with Page(empty) as page:
        page.send(message)
        page.send("__ping__")
        assert page.text() == "__pong__"


def test_the_official_ui_may_subscribe_to_each_run_of_a_long_list(ui: Api) -> None:
    run = ui.new_run(ui.new_flow())
    with Page(ui) as page:
        for number in range(1000):
            page.subscribe(f"{run}/metadata?step_name=start", str(number))
        ui.new_task(ui.new_step(run))
        page.subscribe("/runs", "last")
        assert page.frame()["uuid"] == "last"


def test_a_page_that_subscribes_without_end_is_cut_off(
    ui: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mls, "MOST_SUBSCRIPTIONS", 3)
    with Page(ui) as page:
        for number in range(4):
            page.subscribe("/runs", str(number))
        assert page.close_code() == 1008


def test_a_silent_page_is_closed(ui: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mls, "SILENT_SECONDS", 0.1)
    with Page(ui) as page:
        assert page.close_code() == 1001


def test_a_browser_that_takes_nothing_blocks_nobody(
    ui: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mls, "SEND_SECONDS", 0.3)
    task = ui.new_task_of_its_own()
    huge = [metadatum(f"field{n}", "x" * 1_000_000) for n in range(20)]
    ui.post(f"{task}/metadata", huge)
    with Page(ui) as page:
        page.subscribe(f"{task}/metadata")
        assert eventually(lambda: len(ui.server._pages) == 1)
        assert ui.get("/ping").status == 200
        assert eventually(lambda: not ui.server._pages)


def test_an_open_page_keeps_the_service_and_a_stop_closes_it(
    store: mls.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mls, "TICK_SECONDS", 0.05)
    idle: list[float] = []
    server = mls.Server("127.0.0.1", 0, None)
    thread = threading.Thread(
        target=server.serve, args=(mls.UiService(store), lambda s: idle.append(s) or True)
    )
    thread.start()
    with Page(Api(server.url)) as page:
        seen_before = len(idle)
        assert eventually(lambda: len(idle) > seen_before + 2)
        assert idle[-1] == 0.0
        server.stop()
        thread.join()
        server.finish()
        assert page.close_code() == 1001
        assert page.is_closed()


@pytest.mark.parametrize(
    ("query", "steps"),
    [
        ("key=letter&scope=ARTIFACT", ["work", "work"]),
        ("key=letter&value=B&scope=ARTIFACT", ["work"]),
        ("key=letter&value=%2522b%2522&scope=ARTIFACT,FOREACH_VARIABLE", ["work"]),
        ("key=letters&value=%22b%22&scope=ARTIFACT", []),
        ("key=nonsense&scope=ARTIFACT,FOREACH_VARIABLE", []),
    ],
)
def test_a_search_finds_tasks_by_the_names_and_values_of_their_artifacts(
    zoo: Api, query: str, steps: list[str]
) -> None:
    with Page(zoo, f"/api/search{zoo_run(zoo)[4:]}?{query}") as page:
        event = page.frame()["event"]
        assert event["type"] == "result"
        assert [match["step_name"] for match in event["matches"]] == steps
        assert all(isinstance(match["task_id"], str) for match in event["matches"])
        assert page.close_code() == 1001


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("key=names", ["1", "2"]),
        ("key=names&value=b", ["2"]),
        ("key=names&value=%22b%22", ["2"]),
        ("key=names&value=B", ["2"]),
        ("key=names&value=%22B%22", []),
        ("key=name", []),
        ("key=other", []),
    ],
)
def test_a_search_finds_tasks_by_where_they_are_in_a_foreach(
    ui: Api, query: str, found: list[str]
) -> None:
    run = ui.new_run(ui.new_flow())
    step = ui.new_step(run)
    for place in ("a", "b"):  # Metaflow sends the place as a list
        ui.post(f"{ui.new_task(step)}/metadata", [metadatum("foreach-stack", [f"names={place}"])])
    with Page(ui, f"/api/search{run}?scope=FOREACH_VARIABLE&{query}") as page:
        matches = page.frame()["event"]["matches"]
        assert sorted(match["task_id"] for match in matches) == found
    for row in ui.get(f"/api{run}/metadata").json["data"]:
        assert isinstance(row["value"], str)


# -- the page, the login, the files of the official UI ---------------------------------------------


def test_our_own_page_is_at_the_root_and_may_load_nothing_from_elsewhere(empty: Api) -> None:
    reply = empty.get("/")
    assert (reply.status, reply.content) == (200, mls.PAGE.encode())
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert empty.get("/nonsense").status == 404


def test_with_a_key_only_the_page_and_the_login_are_open(store: mls.Store) -> None:
    key = 'a;key="with%all, of it'
    with serve_ui(store, key=key.replace(" ", "_")) as client:
        key = key.replace(" ", "_")
        stranger = Api(client.url)
        assert stranger.get("/").content == mls.PAGE.encode()
        for path in ("/api/runs", "/api/features", "/ping", "/flows", "/api/ws", "/nonsense"):
            assert stranger.get(path).status == 401
        assert stranger.post("/api/login", {"key": "wrong"}).status == 401
        assert stranger.post("/api/login", {"key": None}).status == 401
        assert stranger.get("/api/login").status == 401
        login = stranger.post("/api/login", {"key": key})
        assert (login.status, login.content) == (204, b"")
        cookie, *attributes = login.headers["set-cookie"].split("; ")
        assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(attributes)
        assert stranger.get("/api/runs", cookie=f"other=1; {cookie}").status == 200
        assert stranger.get("/api/runs", cookie=f"{cookie}x").status == 401
        with Page(stranger, Cookie=cookie) as page:
            assert page.status == 101
        with Page(stranger) as page:
            assert page.status == 401
        stranger.close()


def log_in(api: Api, key: str) -> str:
    """The cookie that the login sets."""
    cookie: str = api.post("/api/login", {"key": key}).headers["set-cookie"].partition(";")[0]
    return cookie


def test_a_cookie_is_of_one_service_alone_and_does_not_hold_the_key(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    key = "one-key-of-two-services"
    stores = [new_store(tmp_path_factory) for _ in range(2)]
    with serve_ui(stores[0], key=key) as one, serve_ui(stores[1], key=key) as other:
        cookies = log_in(one, key), log_in(other, key)
        names = [cookie.partition("=")[0] for cookie in cookies]
        assert names == [f"{mls.PROGRAM}-{client.port}" for client in (one, other)]
        assert not [cookie for cookie in cookies if key in cookie]
        stranger = Api(one.url)
        assert stranger.get("/flows", cookie="; ".join(cookies)).status == 200
        forged = f"{names[0]}={cookies[1].partition('=')[2]}"
        assert stranger.get("/flows", cookie=forged).status == 401
        stranger.close()


def test_the_login_takes_few_bytes_and_few_guesses_and_shuts_nobody_out(store: mls.Store) -> None:
    with serve_ui(store, key="the-key-of-the-service") as client:
        stranger = Api(client.url)
        large = stranger.request("POST", "/api/login", b'{"key": "%s"}' % (b"x" * 5000))
        assert large.status == 413
        guesses = [stranger.post("/api/login", {"key": "wrong"}).status for _ in range(20)]
        assert guesses[0] == 401
        assert 429 in guesses
        assert guesses.count(401) < 10
        assert client.get("/ping").status == 200
        login = {"key": "the-key-of-the-service"}
        assert eventually(lambda: stranger.post("/api/login", login).status == 204)
        stranger.close()


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """The folder of a build of a UI, with a link that leads out of it."""
    folder = tmp_path / "build"
    (folder / "static" / "js").mkdir(parents=True)
    (folder / "index.html").write_text("<html>official")
    (folder / "favicon.png").write_bytes(b"png")
    (folder / "static" / "js" / "main.abc.js").write_text("js")
    (tmp_path / "secret").write_text("secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    return folder


@pytest.mark.parametrize(
    ("path", "content", "kind", "caching"),
    [
        ("/", b"<html>official", "text/html; charset=utf-8", "no-cache"),
        ("/MyFlow/1234/view/timeline", b"<html>official", "text/html; charset=utf-8", "no-cache"),
        ("/notifications", b"<html>official", "text/html; charset=utf-8", "no-cache"),
        ("/favicon.png", b"png", "image/png", "no-cache"),
        ("/static/js/main.abc.js", b"js", None, "public, max-age=31536000, immutable"),
        ("/link", b"<html>official", None, "no-cache"),
        ("/..%2Fsecret", b"<html>official", None, "no-cache"),
        ("/%2e%2e/secret", b"<html>official", None, "no-cache"),
    ],
)
def test_a_build_of_the_official_ui_is_served_and_nothing_beside_it(
    store: mls.Store, build: Path, path: str, content: bytes, kind: str | None, caching: str
) -> None:
    with serve_ui(store, ui_folder=str(build)) as client:
        reply = client.get(path)
        assert (reply.status, reply.content) == (200, content)
        assert kind is None or reply.headers["content-type"] == kind
        assert reply.headers["cache-control"] == caching


def test_with_a_build_the_service_answers_as_before(store: mls.Store, build: Path) -> None:
    with serve_ui(store, ui_folder=str(build)) as client:
        assert client.get("/ping").content == b"pong"
        for path in ("/flows/None", "/api/nonsense", "/static/none.js", "/auth/token"):
            assert client.get(path).status == 404
        assert client.post("/MyFlow").status == 404


def test_with_a_build_and_a_key_our_page_asks_for_it(store: mls.Store, build: Path) -> None:
    with serve_ui(store, key="key", ui_folder=str(build)) as client:
        stranger = Api(client.url)
        assert stranger.get("/MyFlow/1").content == mls.PAGE.encode()
        assert client.get("/MyFlow/1").content == b"<html>official"
        assert stranger.get("/flows").status == 401
        stranger.close()


@pytest.fixture
def card_url(store: mls.Store) -> str:
    """The path of a card of a task."""
    with serve_ui(store) as client:
        task, ids = make_running_task(client, store.folder)
    folder = Path(store.folder, "mf.cards", *place_of_cards(ids), "cards")
    folder.mkdir(parents=True)
    (folder / "blank-abc.html").write_text("<p>a card")
    return f"/api{task}/cards/abc"


def place_of_cards(ids: Sequence[str]) -> Sequence[str]:
    flow, run, step, task = ids
    return (flow, "runs", run, "steps", step, "tasks", task)


def test_a_card_in_a_tab_of_its_own_is_in_a_sandbox(
    store: mls.Store, build: Path, card_url: str
) -> None:
    for options in ({}, {"ui_folder": str(build)}):
        with serve_ui(store, **options) as client:
            for headers in ({}, {"Sec-Fetch-Dest": "document"}):
                reply = client.request("GET", card_url, headers=headers)
                assert "sandbox" in reply.headers["content-security-policy"]


def test_a_card_in_a_frame_of_the_official_ui_reaches_nothing(
    store: mls.Store, build: Path, card_url: str
) -> None:
    with serve_ui(store, ui_folder=str(build)) as client:
        reply = client.request("GET", card_url, headers={"Sec-Fetch-Dest": "iframe"})
        policy = reply.headers["content-security-policy"]
        assert "sandbox" not in policy  # the official UI's scripts look into it
        for directive in ("connect-src 'none'", "form-action 'none'", "frame-src 'none'"):
            assert directive in policy


@pytest.mark.parametrize(
    "headers", [{"Origin": "http://{host}"}, {"Sec-Fetch-Site": "same-origin"}]
)
def test_beside_the_official_ui_no_page_of_a_browser_writes(
    store: mls.Store, build: Path, headers: dict[str, str]
) -> None:
    with serve_ui(store, ui_folder=str(build)) as client:
        sent = {k: v.format(host=f"{client.host}:{client.port}") for k, v in headers.items()}
        assert client.request("POST", "/flows/ByCard", {}, sent).status == 403
        assert client.request("GET", "/flows", headers=sent).json == []
        assert client.post("/flows/ByClient").status == 200


@pytest.mark.parametrize("content", ["[" * 100_000, "not json", '{"a":' * 900 + "1" + "}" * 900])
def test_invalid_data_of_a_card_are_ignored(store: mls.Store, ui: Api, content: str) -> None:
    task, (flow, run, step, task_id) = make_running_task(ui, store.folder)
    folder = Path(store.folder, "mf.cards", flow, "runs", run, "steps", step, "tasks", task_id)
    (folder / "runtime").mkdir(parents=True)
    (folder / "runtime" / "blank-abc.data.json").write_text(content)
    (folder / "runtime" / "blank-def.data.json").mkdir()
    assert ui.get(f"/api{task}/cards/abc/data").status in (200, 404)
    assert ui.get(f"/api{task}/cards/def/data").status == 404


def test_an_unknown_order_of_artifacts_is_ignored(store: mls.Store, ui: Api) -> None:
    task = ui.new_task_of_its_own()
    large = store_value(store, b"x" * 1_000_000)
    ui.post(f"{task}/artifact", [artifact("x"), artifact("y", **large)])
    path = f"/api{task}/artifacts?postprocess=true&_order="
    assert ui.get(f"{path}postprocess_error").status == 200
    assert [row["name"] for row in ui.get(f"{path}-name").json["data"]] == ["y", "x"]


def test_a_downloaded_log_is_named_after_the_attempt_that_it_is_of(
    store: mls.Store, ui: Api
) -> None:
    task, ids = make_running_task(ui, store.folder)
    ui.post(f"{task}/metadata", [metadatum("attempt", "1", attempt=1)])
    Path(store.folder, *ids, "1.task_stdout.log").write_bytes(log_line("second", 1))
    reply = ui.get(f"/api{task}/logs/out/download")
    assert reply.content == b"second"
    assert reply.headers["content-disposition"].endswith("-1.txt")


def test_a_parameter_may_be_called_as_a_time_is(store: mls.Store, ui: Api) -> None:
    run = ui.new_run(ui.new_flow())
    task = ui.new_task(ui.new_step(run, "_parameters"))
    ui.post(f"{task}/artifact", [artifact("ts_epoch", **store_value(store, 5))])
    with Page(ui) as page:
        page.subscribe(f"{run}/parameters")
        assert page.frame()["data"] == {"ts_epoch": {"value": 5}}


@pytest.mark.parametrize("since", ["1e308", "-1e308", "1" + "0" * 400, "NaN", "Infinity"])
def test_an_invalid_time_in_a_subscription_is_ignored(empty: Api, since: str) -> None:
    with Page(empty) as page:
        subscription = '"type": "SUBSCRIBE", "uuid": "u", "resource": "/runs", "since"'
        page.send(f"{{{subscription}: {since}}}")
        page.send("__ping__")
        assert page.text() == "__pong__"


def test_a_page_stays_connected_while_nothing_can_be_read(
    ui: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(mls, "POLL_SECONDS", 0.01)
    flow = ui.new_flow()
    with Page(ui) as page:
        page.subscribe("/runs")
        with monkeypatch.context() as patch:
            patch.setattr(mls.Store, "flows", fail)
            for _ in range(3):
                page.send("__ping__")
                assert page.text() == "__pong__"
                time.sleep(0.1)
        ui.new_run(flow)
        assert page.frame()["type"] == "INSERT"


def test_changes_are_sent_after_a_read_error(
    store: mls.Store, ui: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mls, "SETTLED_NS", -(10**12))
    task = ui.new_task_of_its_own()
    ui.post(f"{task}/metadata", [metadatum("attempt", "0")])
    model = mls.Model(store)
    subscription = mls.Subscription("u", f"{task}/metadata", 0)
    read = mls.metadata_rows

    def fail(*which: Any) -> Any:
        yield from read(*which)
        raise OSError(errno.EMFILE, "too many")

    monkeypatch.setattr(mls, "metadata_rows", fail)
    with pytest.raises(OSError):
        subscription.poll(mls.Snapshot(model))
    monkeypatch.setattr(mls, "metadata_rows", read)
    assert len(subscription.poll(mls.Snapshot(model))) == 1
    assert len(subscription.poll(mls.Snapshot(model))) == 0


def test_a_search_in_an_invalid_run_is_an_error(empty: Api) -> None:
    with Page(empty, "/api/search/flows/../runs/1?key=x") as page:
        assert page.frame()["event"]["type"] == "error"
        assert page.close_code() == 1001


def test_more_pages_than_can_be_served_are_refused(
    ui: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mls, "MOST_PAGES", 1)
    with Page(ui) as page:
        assert page.status == 101
        with Page(ui) as other:
            assert other.status == 503
    assert eventually(lambda: not ui.server._pages)
    with Page(ui) as page:
        assert page.status == 101


# ==================================================================================================
# Server
# ==================================================================================================

# HTTP, byte by byte: bodies, paths, connections, deadlines and limits. Through a service in this
# process; a `Wire` sends any bytes. Clients that are stuck are waited for by limits that
# `impatient` makes short. Generated requests (700 of them) take several seconds.


# -- bodies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
def test_the_answer_to_a_body_that_is_too_large_names_the_limit(
    api: Api, monkeypatch: pytest.MonkeyPatch, chunked: bool
) -> None:
    monkeypatch.setattr(mls, "LARGEST_BODY", 1000)
    size = 20_000_000
    header = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
    with Wire(api) as wire:  # the client hears of it although it is still sending
        wire.send(http_request("POST /flows/Flow", header))
        wire.send(b"%x\r\n" % size * chunked + b"x" * size)
        reply = wire.answer()
    assert reply is not None and reply.status == 413
    assert "1000 bytes" in reply.json["message"]
    assert answer_to(api, "POST /flows/Flow", body=b"{}".ljust(1000)).status == 200


def test_a_post_without_a_length_is_a_411(api: Api) -> None:
    run = api.new_run(api.new_flow())
    assert answer_to(api, "POST /flows/Other").status == 411
    assert answer_to(api, "POST /flows/Other", "Content-Length: 0").status == 400
    assert answer_to(api, f"POST {run}/heartbeat").status == 200  # which has no body to read


UNCLEAR_LENGTHS = [
    ["Content-Length: 2", "Content-Length: 3"],
    ["Content-Length: -2"],
    ["Content-Length: +2"],
    ["Content-Length: 0x2"],
    ["Content-Length: 1_0"],
    ["Content-Length:"],
    ["Content-Length: " + "9" * 30],
    ["Content-Length: 2", "Transfer-Encoding: chunked"],
    ["Transfer-Encoding: gzip, chunked"],
    ["Transfer-Encoding: chunked", "Transfer-Encoding: identity"],
    ["no header at all", "Content-Length: 2"],
]


@pytest.mark.parametrize("headers", UNCLEAR_LENGTHS, ids=" & ".join)
def test_a_length_that_is_not_clear_is_refused_and_the_connection_closed(
    api: Api, headers: list[str]
) -> None:
    smuggled = http_request("POST /flows/Smuggled", "Content-Length: 2", body=b"{}")
    (reply,) = exchange(api, http_request("POST /flows/Flow", *headers, body=b"{}" + smuggled))
    assert (reply.status, reply.headers["connection"]) == (400, "close")
    assert api.get("/flows").json == []


CHUNKED_BODIES = {
    b"2\r\n{}\r\n0\r\n\r\n": 200,
    b"1\r\n{\r\n1\r\n}\r\n0\r\n\r\n": 200,
    b"0002;extension=1\r\n{}\r\n0\r\n\r\n": 200,
    b"A\r\n{        }\r\n0\r\nTrailer: value\r\n\r\n": 200,
    b"two\r\n{}\r\n0\r\n\r\n": 400,
    b"-2\r\n{}\r\n0\r\n\r\n": 400,
    b"0x2\r\n{}\r\n0\r\n\r\n": 400,
    b"\r\n": 400,
    b"2\r\n{}0\r\n\r\n": 400,
    b"5\r\n{}\r\n0\r\n\r\n": 400,
    b"2\r\n{}\r\n": 400,
    b"2;" + b"x" * 5000 + b"\r\n{}\r\n0\r\n\r\n": 400,
    b"f" * 16 + b"\r\n{}\r\n0\r\n\r\n": 413,
    b"2\r\n{}\r\n0\r\n" + b"Trailer: value\r\n" * 5000 + b"\r\n": 431,
}


@pytest.mark.parametrize("body", CHUNKED_BODIES, ids=lambda body: str(body[:25]))
def test_a_body_may_come_in_chunks_that_are_proper(api: Api, body: bytes) -> None:
    post = http_request("POST /flows/Flow", "Transfer-Encoding: chunked", body=body)
    replies = exchange(api, post + http_request("GET /ping"))
    is_good = CHUNKED_BODIES[body] == 200
    assert [reply.status for reply in replies] == [CHUNKED_BODIES[body]] + [200] * is_good
    assert len(api.get("/flows").json) == is_good


def test_a_body_that_ends_early_is_not_stored(api: Api) -> None:
    (reply,) = exchange(api, http_request("POST /flows/Flow", "Content-Length: 9", body=b"{}"))
    assert reply.status == 400
    assert api.get("/flows").json == []


def test_a_client_that_waits_for_a_continue_gets_one_unless_it_is_refused_anyway(api: Api) -> None:
    for header, statuses in {
        "Content-Length: 2": [100, 200],
        "Content-Length: 999999999999": [413],
        "Origin: http://evil.example": [403],
    }.items():
        with Wire(api) as wire:
            wire.send(
                http_request(
                    "POST /flows/Flow", "Expect: 100-continue", header, "Connection: close"
                )
            )
            assert wire.answer().status == statuses[0]
            wire.send(b"{}")
            assert [reply.status for reply in iter(wire.answer, None)] == statuses[1:]


# -- request lines, paths and methods --------------------------------------------------------------

FOUND = ["/ping", "/p%69ng", "/ping?", "http://localhost/ping", "/flows/Fl%6Fw"]
MISSING = ["http://localhost", "/./ping", "/flows/../ping"]
MISSING += ["/flows/Flow+", "/flows/%zz", "/flows/" + "x" * 255]
BAD = ["ping", "*", "/flows/..", "/flows/%2e%2E", "/flows/_meta", "/flows/..%2F..%2Fetc"]
BAD += ["/flows/Flow%00", "/flows/%FF", "/flows/\udcff", "/flows/%ED%A0%80", "/flows?_limit=%FF"]
BAD += ["/flows/" + "x" * 256, "/flows/" + "%C3%A4" * 128, "/flows?" + "x=1&" * 101]
TARGETS_OF_STATUS = {200: FOUND, 404: MISSING, 400: BAD, 414: ["/" + "x" * 70_000]}


@pytest.mark.parametrize(
    ("target", "status"),
    [(target, status) for status, targets in TARGETS_OF_STATUS.items() for target in targets],
    ids=lambda value: ascii(value)[:30],
)
def test_every_path_has_its_status(api: Api, target: str, status: int) -> None:
    api.new_flow("Flow")
    assert answer_to(api, f"GET {target}").status == status


def test_what_a_client_has_not_escaped_is_read_as_utf_8(api: Api) -> None:
    flow = api.new_flow("Flüsse")
    run = api.post(f"{flow}/run", {"tags": ["grün"], "system_tags": []}).json["run_number"]
    for target in ("/flows/Flüsse/runs?_tags=grün", f"{flow}/runs?_tags=gr%C3%BCn"):
        assert [found["run_number"] for found in answer_to(api, f"GET {target}").json] == [run]


STATUS_OF_REQUESTS = {
    b"GET /ping\r\n\r\n": 400,
    b"nonsense\r\n\r\n": 400,
    b"GET /a path HTTP/1.1\r\n\r\n": 400,
    b"GET /ping HTTP/x\r\n\r\n": 400,
    b"GET /ping HTTP/3.0\r\n\r\n": 505,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 the hello of TLS\r\n\r\n": 400,
    http_request("BREW /ping"): 501,
    http_request("get /ping"): 501,
    http_request("DELETE /ping"): 405,
    http_request("OPTIONS /ping"): 405,
    http_request("GET /ping", *["Name: value"] * 101): 431,
    http_request("GET /ping", "Name: " + "x" * 70_000): 431,
    http_request("GET /ping", "no header", "Origin: http://evil.example"): 400,
}


@pytest.mark.parametrize("sent", STATUS_OF_REQUESTS, ids=lambda sent: str(sent[:40]))
def test_an_invalid_request_is_refused(api: Api, sent: bytes) -> None:
    assert [reply.status for reply in exchange(api, sent)] == [STATUS_OF_REQUESTS[sent]]


@pytest.mark.parametrize("path", ["/ping", "/flows/Flow", "/nothing"])
def test_head_is_get_without_the_body(api: Api, path: str) -> None:
    api.new_flow("Flow")
    with Wire(api) as wire:
        wire.send(http_request(f"HEAD {path}") + http_request(f"GET {path}"))
        head, get = wire.answer(to="HEAD"), wire.answer()
    assert head.status == get.status
    for name in ("content-type", "content-length"):
        assert head.headers[name] == get.headers[name]


# -- connections -----------------------------------------------------------------------------------


def test_a_service_listens_on_ipv6(store: mls.Store) -> None:
    try:
        socket.socket(socket.AF_INET6).bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    with serve(store, host="::1") as client:
        assert client.url.startswith("http://[::1]:")
        assert client.get("/ping").status == 200
        assert answer_to(client, "GET /ping", host="evil.example").status == 403


@pytest.mark.parametrize("path", ["/ping", "{task}/heartbeat", "/nothing"])
def test_every_request_starts_the_idle_clock_anew(
    store: mls.Store, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(mls, "TICK_SECONDS", 0.05)
    server = mls.Server("127.0.0.1", 0, None)
    last_requests: list[float] = []  # when the last one was, each time that the server looks

    def note(idle_seconds: float) -> bool:
        last_requests.append(time.monotonic() - idle_seconds)
        return True

    thread = threading.Thread(target=server.serve, args=(mls.MetadataService(store), note))
    thread.start()
    with contextlib.closing(Api(server.url)) as client:
        task = client.new_task_of_its_own()
        before, looked = time.monotonic(), len(last_requests)
        client.post(path.format(task=task))
        assert eventually(lambda: len(last_requests) > looked + 1)
    server.stop()
    thread.join()
    server.finish()
    assert last_requests[-1] >= before


def test_a_server_that_has_finished_has_no_file_open(store: mls.Store) -> None:
    before = len(os.listdir("/dev/fd"))
    for _ in range(20):
        with serve(store) as client:
            client.get("/ping")
    assert len(os.listdir("/dev/fd")) < before + 20


def test_pipelined_requests_are_answered_in_order(api: Api) -> None:
    posts = [
        http_request(f"POST /flows/Flow{n}", "Content-Length: 2", body=b"{}") for n in range(20)
    ]
    replies = exchange(api, b"".join(posts))
    assert [reply.json["flow_id"] for reply in replies] == [f"Flow{n}" for n in range(20)]


def test_a_connection_is_kept_also_after_an_error(api: Api) -> None:
    bad = http_request("POST /flows/Flow", "Content-Length: 1", body=b"{")
    requests = bad + http_request("GET /flows/Flow") + http_request("BREW /ping")
    assert [r.status for r in exchange(api, requests + http_request("GET /ping"))] == [
        400,
        404,
        501,
    ]


@pytest.mark.parametrize(
    ("request_", "kept"),
    [
        (b"GET /ping HTTP/1.1\r\n\r\n", True),
        (b"GET /ping HTTP/1.1\r\nConnection: close\r\n\r\n", False),
        (b"GET /ping HTTP/1.0\r\n\r\n", False),
        (b"GET /ping HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", True),
    ],
)
def test_the_client_says_whether_the_connection_is_kept(
    api: Api, request_: bytes, kept: bool
) -> None:
    replies = exchange(api, request_ * 2)
    assert [reply.content for reply in replies] == [b"pong"] * (1 + kept)


# -- whatever comes --------------------------------------------------------------------------------

SEGMENTS = st.one_of(
    st.sampled_from(
        ["flows", "runs", "Flow", "known", "start", "metadata", "artifacts", "attempt"]
    ),
    st.sampled_from(
        ["0", "007", "²", "a%2Fb", "..", "%2e%2e", "_meta", "%00", "%ff", "%0d%0a", ""]
    ),
    st.text(max_size=8).map(lambda text: quote(text.encode("utf-8", "surrogatepass"), safe="")),
    st.text(st.characters(min_codepoint=33, max_codepoint=255), max_size=8),
)
ROUTES = [
    "/flows/Flow{}",
    "/flows/Flow/run{}",
    "/flows/Flow/runs/{}",
    "/flows/Flow/runs/known/tag/mutate{}",
    "/flows/Flow/runs/known/steps/{}/step",
    "/flows/Flow/runs/known/steps/start/task{}",
    "/flows/Flow/runs/known/steps/start/filtered_tasks{}",
    "/flows/Flow/runs/known/steps/start/tasks/known/metadata{}",
    "/flows/Flow/runs/known/steps/start/tasks/known/artifact{}",
    "/flows/Flow/runs/known/steps/start/tasks/known/artifacts/{}/attempt/0",
]
ANY_TARGET = st.one_of(
    st.lists(SEGMENTS, max_size=9).map(lambda segments: "/" + "/".join(segments)),
    st.builds(str.replace, st.sampled_from(ROUTES), st.just("{}"), st.just("") | SEGMENTS),
    st.text(st.characters(max_codepoint=255), max_size=20),
)
QUERIES = st.dictionaries(
    st.sampled_from(["_limit", "_cursor", "_tags:any", "status", "ts_epoch:ge", "pattern", "x"]),
    st.sampled_from(["", "1", "-1", "null", "a,b", "%", "e30=", "(", "1e9"]) | SEGMENTS,
    max_size=3,
).map(lambda query: "?" + "&".join("=".join(pair) for pair in query.items()))
FIELDS = ["user_name", "tags", "system_tags", "run_number", "task_id", "field_name", "value"]
FIELDS += ["name", "location", "attempt_id", "sha", "tags_to_add", "tags_to_remove"]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["..", "/etc", "a/../b", "_meta", "known", "\0", "\udcff", "x" * 300]),
    lambda values: (
        st.lists(values, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), values, max_size=5)
    ),
    max_leaves=8,
)
BODIES = JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=20)
LENGTHS = ["Content-Length: {}", "Content-Length: 5", "Transfer-Encoding: chunked", "no header"]
OTHERS = ["Expect: 100-continue", "Host: [", "Origin: null", "x-api-key: \udcff", ": x", "\0: \x7f"]
HEADERS = st.lists(st.sampled_from(LENGTHS[:1] * 5 + LENGTHS + OTHERS), max_size=3)
METHODS = st.sampled_from(
    ["GET", "POST", "POST", "PATCH", "HEAD", "PUT", "OPTIONS", "CONNECT", "X"]
)


def test_any_request_is_answered_without_a_failure_and_stays_in_the_root(
    api: Api, project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = api.new_run(api.new_flow(), run_number="known")
    api.new_task(api.new_step(run), task_id="known")
    outside = [p for p in all_paths(tmp_path) if project / ".metaflow" not in p.parents]

    @settings(max_examples=700, deadline=None)
    @given(METHODS, ANY_TARGET, QUERIES, HEADERS, BODIES)
    def send(method: str, target: str, query: str, headers: list[str], body: bytes) -> None:
        lines = [header.replace("{}", str(len(body))) for header in headers]
        with Wire(api) as wire:
            wire.send(http_request(f"{method} {target}{query}", *lines, body=body))
            with contextlib.suppress(OSError):
                wire.socket.shutdown(socket.SHUT_WR)
            while True:  # a body that was not announced is a request of its own
                reply = wire.answer(to=method)
                if reply is None or method == "HEAD":
                    break
                assert reply.status != 500, reply

    send()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert api.get("/ping").status == 200
    assert outside == [p for p in all_paths(tmp_path) if project / ".metaflow" not in p.parents]


# -- slow, stuck and many clients ------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the time limits of the server to what a test can wait for, 0.3 seconds."""
    for name in ("KEEP_ALIVE_SECONDS", "REQUEST_SECONDS", "SHUTDOWN_SECONDS"):
        monkeypatch.setattr(mls, name, 0.3)
    monkeypatch.setattr(mls, "TICK_SECONDS", 0.05)


def connect_stuck(api: Api, content: bytes) -> Wire:
    """A client that sends this, then nothing more, and never reads."""
    wire = Wire(api)
    wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    wire.send(content)
    return wire


STUCK = {
    "nothing": b"",
    "half a line": b"GET /pi",
    "half a head": b"GET /ping HTTP/1.1\r\nHost: loc",
    "half a body": b"POST /flows/Stuck HTTP/1.1\r\nContent-Length: 9\r\n\r\n{",
    "half a chunk": b"POST /flows/Stuck HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{",
    "a request, and then nothing": b"GET /ping HTTP/1.1\r\n\r\n",
    "a request, and never reads": b"GET /flows HTTP/1.1\r\n\r\n" * 1000,
}


@pytest.mark.parametrize("content", STUCK.values(), ids=list(STUCK))
def test_a_stuck_client_costs_one_thread_for_a_while_and_holds_up_nobody(
    store: mls.Store, impatient: None, content: bytes
) -> None:
    before = threading.active_count()
    with serve(store) as client, contextlib.ExitStack() as clients:
        for n in range(50):
            client.post(f"/flows/Flow{n}", {"tags": ["x" * 2000]})
        client.close()
        wires = [clients.enter_context(connect_stuck(client, content)) for _ in range(8)]
        assert eventually(lambda: threading.active_count() >= before + 8)
        assert client.get("/ping").status == 200
        client.close()
        # What is left in the end are the two threads of the server itself.
        assert eventually(lambda: threading.active_count() <= before + 2)
        assert len(wires) == 8
        assert client.get("/ping").status == 200


@contextlib.contextmanager
def serve_bytes(size: int) -> Iterator[Api]:
    """A service that answers every request with so many bytes."""

    class Answers:
        def answer(self, request: mls.Request) -> mls.Response:
            return mls.Response(bytes(size), kind="application/octet-stream")

        def is_public(self, method: str, path: Sequence[str]) -> bool:
            return True

    with run_server(mls.Server("127.0.0.1", 0, None), Answers()) as client:
        yield client


def test_a_slow_reader_that_goes_on_reading_is_not_cut_off(
    impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mls, "REQUEST_SECONDS", 1.0)
    size = 2**22
    with serve_bytes(size) as client, Wire(client) as wire:
        wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        wire.send(b"GET / HTTP/1.1\r\n\r\n")
        began, taken = time.monotonic(), 0
        while taken < size and (data := wire.socket.recv(2**14)):
            taken += len(data)
            time.sleep(len(data) / 2**21)
        assert taken >= size
        assert time.monotonic() - began > mls.REQUEST_SECONDS


def test_unsent_answers_are_bounded_in_total(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = 2**23
    monkeypatch.setattr(mls, "MOST_UNSENT", 3 * size)
    with serve_bytes(size) as client, contextlib.ExitStack() as clients:

        def waiting() -> int:
            return sum(list(client.server._unsent.values()))

        wires = [
            clients.enter_context(connect_stuck(client, b"GET / HTTP/1.1\r\n\r\n"))
            for _ in range(8)
        ]
        assert eventually(lambda: waiting() > size)
        refused = 0
        while client.get("/").status == 503:
            refused += 1
            assert 0 < waiting() <= mls.MOST_UNSENT
            # Others have read nothing for long: now there is room.
            monkeypatch.setattr(mls, "STALLED_SECONDS", 0)
        assert refused <= 1
        assert waiting() <= mls.MOST_UNSENT
        assert len(wires) == 8


@pytest.mark.parametrize("content", STUCK.values(), ids=list(STUCK))
def test_stuck_clients_do_not_keep_the_service_from_stopping(
    store: mls.Store, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(mls, "SHUTDOWN_SECONDS", 0.1)
    with contextlib.ExitStack() as clients:
        with serve(store) as client:
            for n in range(50):
                client.post(f"/flows/Flow{n}", {"tags": ["x" * 2000]})
            clients.enter_context(connect_stuck(client, content))
            assert client.get("/ping").status == 200
        assert refuses_connections(client)


def test_a_connection_that_is_idle_is_closed(store: mls.Store, impatient: None) -> None:
    with serve(store) as client, Wire(client) as wire:
        wire.send(http_request("GET /ping"))
        assert wire.answer().status == 200
        assert wire.answer() is None


class Held:
    """A method of the store that waits, once it is called, to be let go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: mls.Store, name: str) -> None:
        self.is_called, self.go_on = threading.Event(), threading.Event()
        self._method = getattr(store, name)
        monkeypatch.setattr(store, name, self)

    def __call__(self, *arguments: Any) -> Any:
        self.is_called.set()
        assert self.go_on.wait(20)
        return self._method(*arguments)


def test_an_answer_may_take_its_time(
    store: mls.Store, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch, store, "flows")
    with serve(store) as client, ThreadPoolExecutor() as pool:
        answer = pool.submit(client.get, "/flows")
        assert held.is_called.wait(20)
        with Wire(client) as wire:  # once this one is overdue, so would the other be
            assert wire.answer() is None
        held.go_on.set()
        assert answer.result().status == 200


def test_requests_in_flight_are_answered_when_the_service_stops(
    store: mls.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch, store, "create_flow")
    with ThreadPoolExecutor() as pool:
        with serve(store) as client:
            answer = pool.submit(client.post, "/flows/Flow")
            assert held.is_called.wait(20)
            pool.submit(
                lambda: eventually(lambda: refuses_connections(client)) and held.go_on.set()
            )
        reply = answer.result()
    assert (reply.status, reply.headers["connection"]) == (200, "close")


def test_connections_beyond_the_limit_are_a_503(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mls, "MOST_CONNECTIONS", 3)
    with contextlib.ExitStack() as clients:
        for _ in range(3):
            wire = clients.enter_context(Wire(api))
            wire.send(http_request("GET /ping"))
            assert wire.answer().status == 200
        reply = answer_to(api, "GET /ping")
        assert (reply.status, reply.headers["connection"]) == (503, "close")
        assert "too many connections" in reply.json["message"]
    assert eventually(lambda: answer_to(api, "GET /ping").status == 200)


def test_connections_that_have_asked_for_nothing_make_room_for_others(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mls, "MOST_CONNECTIONS", 3)
    with contextlib.ExitStack() as clients:
        for half in (b"", b"POST /flows/F HTTP/1.1\r\n", http_request("GET /ping")[:-2]):
            clients.enter_context(Wire(api)).send(half)
        for _ in range(5):
            assert eventually(lambda: answer_to(api, "GET /ping").status == 200)


def test_connections_without_the_key_make_room_for_those_with_it(
    store: mls.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mls, "MOST_CONNECTIONS", 3)
    with serve_ui(store, key="the-key-of-the-service") as client, contextlib.ExitStack() as clients:
        for _ in range(3):
            wire = clients.enter_context(Wire(client))
            wire.send(http_request("GET /"))
            assert wire.answer().status == 200
        assert client.get("/ping").status == 200


def test_too_many_open_files_cost_single_requests(cli: Cli) -> None:
    limited = ["sh", "-c", 'ulimit -n 40 && exec "$@"', "sh", *cli.command("start")]
    started = subprocess.run(limited, cwd=cli.folder, env=cli.environment, capture_output=True)
    assert started.returncode == 0
    with contextlib.closing(Api(cli.status()["url"])) as client, contextlib.ExitStack() as clients:
        wires = [clients.enter_context(Wire(client)) for _ in range(60)]
        for n, wire in enumerate(wires):
            wire.send(http_request(f"POST /flows/F{n}", "Content-Length: 2", body=b"{}"))
        replies: dict[str, int] = {}

        def collect() -> bool:
            """Answers come on as many connections as it could open, and not on the others."""
            for n, wire in enumerate(wires):
                wire.socket.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    if f"F{n}" not in replies and wire.socket.recv(1, socket.MSG_PEEK):
                        wire.socket.settimeout(30)
                        replies[f"F{n}"] = wire.answer().status
            return 503 in replies.values()

        assert eventually(collect)
        assert set(replies.values()) <= {200, 503}
        clients.close()
        stored = {name for name, status in replies.items() if status == 200}
        assert eventually(lambda: client.post("/flows/Later").status in (200, 409))
        listed = {flow["flow_id"] for flow in client.get("/flows").json}
        assert stored <= listed
        assert not listed & {name for name, status in replies.items() if status == 503}


# ==================================================================================================
# Registry
# ==================================================================================================

# One service per root: pidfile, lease, locks, namespaces, and what becomes of a service whose
# folder is moved, copied or deleted. Services are real ones of the command line, and each takes a
# second to start; that one stays, or does not come, is watched for one or two seconds.

only_root_can = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
URL = re.compile(r"http://[0-9.]+:[0-9]+")


def service_of(folder: Path) -> mls.Service | None:
    """The service of a folder."""
    return mls.find_service(str(folder))


def wait_for_service(folder: Path) -> mls.Service:
    """The service that is about to start in a folder."""
    assert eventually(lambda: service_of(folder))
    return service_of(folder)


def keeps_running(folder: Path, seconds: float = 1) -> bool:
    """Whether the service of a folder is the same all the time."""
    service = service_of(folder)
    return bool(service) and not eventually(lambda: service_of(folder) != service, seconds)


def pidfile_of(folder: Path) -> Path:
    return folder / ".metaflow" / mls.PIDFILE


def in_shell(
    cli: Cli, script: str, *arguments: object, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a shell script, in which PROGRAM stands for the program and its arguments."""
    return subprocess.run(
        ["sh", "-c", script.replace("PROGRAM", shlex.join(cli.command(*arguments)))],
        **{"cwd": cli.folder, "env": cli.environment, **options},
        capture_output=True,
        text=True,
        timeout=120,
    )


def without_mention(stderr: str) -> str:
    """What `start` or `run` has said on stderr, but for where runs are shown."""
    return re.sub(r"^metaflow-local-service: runs are shown at http://.+\n", "", stderr)


def is_refused(ran: subprocess.CompletedProcess[str], *words: object, code: int = 1) -> bool:
    """Whether a command has said in one sentence what is the matter, and nothing else."""
    assert (ran.returncode, ran.stdout) == (code, ""), ran
    assert re.fullmatch(r"metaflow-local-service: .+\n", ran.stderr), ran.stderr
    assert [word for word in words if str(word) not in ran.stderr] == [], ran.stderr
    return True


def test_a_folder_that_was_moved_gets_a_service_of_its_own(cli: Cli, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    one = Api(cli("url", "--root", old).stdout.strip())
    first = service_of(old)
    one.new_flow("OfOne")
    old.rename(new)
    (old / ".metaflow").mkdir(parents=True)
    assert one.get("/flows").status == 503
    assert cli("url", "--root", new).returncode == 0
    assert service_of(new).pid != first.pid
    assert [entry.name for entry in (old / ".metaflow").iterdir()] == []
    with contextlib.closing(Api(service_of(new).url)) as two:
        assert [flow["flow_id"] for flow in two.get("/flows").json] == ["OfOne"]
    one.close()


def test_a_folder_that_is_back_soon_is_served_again(daemon: Api, cli: Cli) -> None:
    service, metaflow_folder = service_of(cli.folder), cli.folder / ".metaflow"
    metaflow_folder.rename(cli.folder / "away")
    told = daemon.get("/flows")
    assert not eventually(lambda: daemon.get("/flows").status != 503, seconds=2)
    (cli.folder / "away").rename(metaflow_folder)
    assert (told.status, "not in its place" in told.json["message"]) == (503, True)
    assert daemon.get("/flows").status == 200
    assert service_of(cli.folder) == service


def test_a_folder_that_is_deleted_ends_its_service_and_frees_its_port(cli: Cli) -> None:
    assert cli("start", "--idle-timeout", 0).returncode == 0
    port = str(service_of(cli.folder).port)
    shutil.rmtree(cli.folder / ".metaflow")
    again = cli("start", "--port", port)
    assert again.stdout.startswith("Started"), again.stderr


def test_a_service_of_a_moved_folder_makes_room_for_one_at_the_new_place(cli: Cli) -> None:
    url = cli("url").stdout
    first = service_of(cli.folder)
    (cli.folder / ".metaflow").rename(cli.folder.parent / ".metaflow")
    assert cli("url", cwd=cli.folder.parent).stdout == url
    assert service_of(cli.folder.parent).pid != first.pid


@pytest.mark.parametrize("copy", [shutil.copy2, os.link])
def test_copies_of_a_root_have_services_of_their_own(cli: Cli, tmp_path: Path, copy: Any) -> None:
    assert cli("run", "true").returncode == 0
    service = service_of(cli.folder)
    shutil.copytree(cli.folder, tmp_path / "copy", copy_function=copy)
    assert service_of(tmp_path / "copy") is None
    with cli.popen("run", "--root", tmp_path / "copy", "cat") as command:
        assert wait_for_service(tmp_path / "copy").url != service.url
        leases = [path / ".metaflow" / mls.LEASE for path in (cli.folder, tmp_path / "copy")]
        assert not os.path.samefile(*leases)
        command.kill()
    assert service_of(cli.folder) == service


def test_a_pidfile_that_is_deleted_is_written_again(daemon: Api, cli: Cli) -> None:
    service = service_of(cli.folder)
    pidfile_of(cli.folder).unlink()
    assert eventually(lambda: service_of(cli.folder))
    assert service_of(cli.folder) == service
    assert cli("status", "--all").stdout.startswith(f"url    {service.url}\n")
    assert cli("stop").stdout.startswith("Stopped")


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux has prlimit")
def test_a_service_that_cannot_write_its_pidfile_again_goes_on(daemon: Api, cli: Cli) -> None:
    service, pidfile = service_of(cli.folder), pidfile_of(cli.folder)
    hard = resource.prlimit(service.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(service.pid, resource.RLIMIT_FSIZE, (0, hard))  # like a full disk
    pidfile.unlink()
    inode = (cli.folder / ".metaflow").stat().st_mtime_ns
    assert eventually(lambda: (cli.folder / ".metaflow").stat().st_mtime_ns != inode)  # it tries
    time.sleep(2 * mls.TICK_SECONDS)
    assert daemon.get("/ping").status == 200
    resource.prlimit(service.pid, resource.RLIMIT_FSIZE, (hard, hard))
    assert eventually(lambda: service_of(cli.folder) == service)


def test_a_root_keeps_its_port(daemon: Api, cli: Cli) -> None:
    assert cli("stop").returncode == 0
    assert cli("url").stdout.strip() == daemon.url
    assert cli("stop").returncode == 0
    (cli.folder / ".metaflow" / mls.PORT_FILE).write_text("many")
    assert cli("url").returncode == 0


def test_a_host_name_that_changes_proves_nothing(daemon: Api, cli: Cli) -> None:
    service = service_of(cli.folder)
    pidfile_of(cli.folder).write_text(json.dumps(service._replace(machine="other")._asdict()))
    assert cli("url").stdout.strip() == daemon.url
    assert cli("stop").stdout.startswith("Stopped")


def in_namespaces(cli: Cli, option: str, script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script in a namespace of its own, where the kernel allows that."""
    if shutil.which("unshare") is None or cli.execute(["unshare", option, "true"]).returncode != 0:
        pytest.skip("unshare makes no namespaces here")
    program = shlex.join(cli.command())
    return cli.execute(["unshare", option, "sh", "-c", script.replace("PROGRAM", program)])


def test_a_service_is_known_in_other_namespaces(daemon: Api, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    mount = f"mount --bind {cli.folder} {tmp_path}/other && cd {tmp_path}/other && PROGRAM url"
    assert in_namespaces(cli, "-m", mount).stdout.strip() == daemon.url
    assert is_refused(in_namespaces(cli, "-n", "PROGRAM status"), "cannot be reached", code=4)
    assert in_namespaces(cli, "-pf", "PROGRAM stop").stdout.startswith("Stopped")


WITHOUT_PIDFDS = """
import errno, os

def pidfd_open(pid):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

os.pidfd_open = pidfd_open
"""


@pytest.fixture(params=["this kernel", "an old kernel"])
def kernel(request: pytest.FixtureRequest, cli: Cli, tmp_path: Path) -> None:
    """This kernel, or one without pidfds, for all commands."""
    if request.param == "an old kernel":
        (tmp_path / "sitecustomize.py").write_text(WITHOUT_PIDFDS)
        cli.environment["PYTHONPATH"] = str(tmp_path)


@pytest.mark.usefixtures("kernel")
def test_a_command_that_closes_all_its_files_keeps_its_service(cli: Cli) -> None:
    program = "import os, time; os.closerange(3, 256); print(flush=True); time.sleep(60)"
    words = ("run", "--idle-timeout", 0.2, sys.executable, "-c", program)
    with cli.popen(*words) as command:
        assert command.stdout.readline() == "\n"
        assert keeps_running(cli.folder, 2)
        command.kill()
    assert eventually(lambda: not service_of(cli.folder))


def test_a_process_that_is_not_the_service_is_not_stopped(daemon: Api, cli: Cli) -> None:
    service = service_of(cli.folder)
    with subprocess.Popen(["sleep", "60"]) as bystander:
        others = service._replace(pid=bystander.pid, port=1, url="http://127.0.0.1:1")
        pidfile_of(cli.folder).write_text(json.dumps(others._asdict()))
        assert is_refused(cli("stop"), bystander.pid, "is not it")
        assert bystander.poll() is None
        bystander.kill()
    with pidfile_of(cli.folder).open() as not_locked:
        others = service._replace(pid=os.getpid(), port=1, url="http://127.0.0.1:1")
        pidfile_of(cli.folder).write_text(json.dumps(others._asdict()))
        assert is_refused(cli("stop"), os.getpid(), "is not it")
        assert not not_locked.closed
    pidfile_of(cli.folder).write_text(json.dumps(service._replace(pid=0)._asdict()))
    assert cli("stop").stdout.startswith("Stopped")


@pytest.mark.usefixtures("kernel")
def test_a_pidfile_of_an_earlier_version_will_do(daemon: Api, cli: Cli) -> None:
    service = service_of(cli.folder)
    told = {"pid": service.pid, "port": service.port}
    pidfile_of(cli.folder).write_text(json.dumps(told))
    assert cli("url", "--no-start").stdout.strip() == daemon.url
    assert cli("stop").stdout.startswith("Stopped")


def test_a_service_of_another_version_is_replaced_unless_it_is_in_use(
    cli: Cli, tmp_path: Path
) -> None:
    earlier = tmp_path / MODULE.name
    earlier.write_text(SOURCE.replace('__version__ = "', '__version__ = "0.0.', 1))
    command = [sys.executable, str(earlier), "run", "cat"]
    with subprocess.Popen(
        command, cwd=cli.folder, env=cli.environment, stdin=subprocess.PIPE
    ) as cat:
        old = wait_for_service(cli.folder)
        kept = cli("run", "printenv", "METAFLOW_SERVICE_URL")
        assert kept.stdout.strip() == old.url
        assert f"another version, {old.version}, and goes on" in kept.stderr
    assert cat.returncode == 0
    replaced = cli("run", "printenv", "METAFLOW_SERVICE_URL")
    assert replaced.stdout.strip() == old.url
    assert "goes on" not in replaced.stderr
    assert service_of(cli.folder).version == mls.__version__


@pytest.mark.parametrize(
    ("status", "content"), [(404, b"{}"), (200, b"[]"), (200, b"Hello!"), (200, b"\xff")]
)
def test_another_program_at_the_port_is_no_service(status: int, content: bytes) -> None:
    class Other(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # and so it keeps connections, unless told not to

        def do_POST(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(ConnectionRefusedError):
            mls.send_order(("127.0.0.1", other.server_port), "nonce", "identify", waits=True)
        other.shutdown()


def test_an_order_without_the_nonce_is_a_request_like_others(daemon: Api, cli: Cli) -> None:
    for nonce in ("", "guessed"):
        headers = {"x-local-service-nonce": nonce}
        assert daemon.request("POST", "/stop", headers=headers).status in (404, 405)
    assert keeps_running(cli.folder)


ASKING_SCRIPT = """
import subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(flush=True)
input()
"""


@pytest.mark.parametrize(
    "words",
    [
        ["sh", "-c", 'eval "$("$@")"; echo; read line', "sh"],
        [sys.executable, "-c", ASKING_SCRIPT],
    ],
    ids=["shell", "script"],
)
def test_a_service_stays_for_the_shell_or_script_that_asked_for_it(
    cli: Cli, words: list[str]
) -> None:
    shell = subprocess.Popen(
        [*words, *cli.command("env", "--idle-timeout", 0.2)],
        cwd=cli.folder,
        env=cli.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert shell.stdout is not None
    shell.stdout.readline()
    assert keeps_running(cli.folder, 2)
    shell.communicate("\n")
    assert eventually(lambda: not service_of(cli.folder))


def test_a_root_has_one_service(cli: Cli) -> None:
    first, second = cli("start").stdout, cli("start").stdout
    assert (first.split()[0], second.split()[0]) == ("Started", "Running")
    assert URL.findall(first) == URL.findall(second)


def test_two_roots_have_two_services_that_share_nothing(cli: Cli, tmp_path: Path) -> None:
    one, two = (Api(cli("url", "--root", tmp_path / name).stdout.strip()) for name in ("1", "2"))
    with contextlib.closing(one), contextlib.closing(two):
        one.new_flow("OfOne")
        assert [flow["flow_id"] for flow in one.get("/flows").json] == ["OfOne"]
        assert two.get("/flows").json == []


def test_simultaneous_commands_get_the_same_service(cli: Cli) -> None:
    ways = (("run", "printenv", "METAFLOW_SERVICE_URL"), ("url",), ("start",), ("env",))
    processes = [cli.popen(*way) for way in ways * 3]
    told = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * 12, told
    assert len({URL.search(output)[0] for output, _ in told}) == 1


@pytest.mark.parametrize("content", ["", "garbage", "[]", '{"pid": 1}'])
def test_a_pidfile_without_a_lock_is_no_service(project: Path, content: str) -> None:
    (project / ".metaflow").mkdir()
    pidfile_of(project).write_text(content)
    assert service_of(project) is None


def test_a_service_that_was_killed_needs_no_clean_up(daemon: Api, cli: Cli) -> None:
    killed = service_of(cli.folder)
    os.kill(killed.pid, signal.SIGKILL)
    assert eventually(lambda: not service_of(cli.folder))
    assert pidfile_of(cli.folder).exists()
    mls.stop_service(killed)  # as by a command that has found it before
    assert cli("start").stdout.startswith("Started")
    assert service_of(cli.folder).pid != killed.pid


def test_a_reused_pid_is_left_alone(daemon: Api, cli: Cli) -> None:
    service = service_of(cli.folder)
    assert cli("stop").returncode == 0
    with subprocess.Popen(["sleep", "60"]) as bystander:
        pidfile_of(cli.folder).write_text(json.dumps(service._replace(pid=bystander.pid)._asdict()))
        assert cli("stop").stdout.startswith("No service runs")
        assert cli("start").stdout.startswith("Started")
        assert bystander.poll() is None
        bystander.kill()


@pytest.mark.parametrize("name", [mls.PIDFILE, mls.LEASE, mls.LOCK_FILE])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("it")])
def test_a_folder_or_pipe_in_place_of_a_file_is_reported(cli: Cli, name: str, make: Any) -> None:
    metaflow_folder = cli.folder / ".metaflow"
    metaflow_folder.mkdir()
    make(metaflow_folder / name)
    assert is_refused(cli("run", "true", timeout=60), metaflow_folder / name)
    (metaflow_folder / name).rename(metaflow_folder / "other")


@pytest.mark.parametrize("name", [mls.PIDFILE, mls.LEASE, mls.LOCK_FILE])
def test_files_that_others_may_read_are_made_private(cli: Cli, name: str) -> None:
    path = cli.folder / ".metaflow" / name
    path.parent.mkdir()
    path.touch()
    path.chmod(0o644)
    with cli.popen("run", "cat") as command:
        assert wait_for_service(cli.folder)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        command.kill()


def test_a_lock_on_the_folder_changes_nothing(cli: Cli) -> None:
    metaflow_folder = cli.folder / ".metaflow"
    metaflow_folder.mkdir()
    descriptor = os.open(metaflow_folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert cli("run", "true").returncode == 0
    assert cli("stop").stdout.startswith("Stopped")
    os.close(descriptor)


def test_a_lock_that_is_not_released_is_reported_in_one_sentence(
    daemon: Api, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mls, "LOCK_SECONDS", 0.1)
    locked = pytest.raises(mls.ServiceError, match="locked by another process")
    with mls.registry_lock(str(cli.folder), fcntl.LOCK_EX), locked:
        service_of(cli.folder)


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_missing_file_locks_are_reported_in_one_sentence(
    cli: Cli, reason: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(mls.fcntl, "flock", flock)
    (cli.folder / ".metaflow").mkdir()
    pidfile_of(cli.folder).touch()
    with pytest.raises(mls.ServiceError, match="cannot be locked"):
        service_of(cli.folder)
    with pytest.raises(mls.ServiceError, match="cannot be locked"):
        mls.acquire_lease(str(cli.folder))


def test_a_pidfile_that_cannot_be_rewritten_says_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    pidfile = mls.LockedFile.acquire(str(tmp_path / mls.PIDFILE), fcntl.LOCK_EX)
    for text in ("a long text", "a text"):
        pidfile.write(text)
        assert pidfile.read() == text
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError):
        pidfile.write("another")
    assert pidfile.read() == "a text"
    pidfile.release()


def test_a_service_does_not_rewrite_its_pidfile_while_somebody_reads(daemon: Api, cli: Cli) -> None:
    service = service_of(cli.folder)
    with mls.registry_lock(str(cli.folder), fcntl.LOCK_SH):
        os.kill(service.pid, signal.SIGTERM)
        assert keeps_running(cli.folder)
    assert eventually(lambda: not service_of(cli.folder))


@pytest.mark.parametrize("home", ["file", "file/below", "read-only", "closed/home"])
def test_a_home_that_cannot_be_used_costs_nothing(cli: Cli, tmp_path: Path, home: str) -> None:
    if os.geteuid() == 0 and "file" not in home:
        pytest.skip("root may write everywhere")
    (tmp_path / "file").touch()
    (tmp_path / "read-only").mkdir(mode=0o500)
    (tmp_path / "closed").mkdir(mode=0o000)
    elsewhere = {"METAFLOW_LOCAL_SERVICE_HOME": str(tmp_path / home)}
    ran = cli("run", "--idle-timeout", 0.1, "true", **elsewhere)
    assert (ran.returncode, without_mention(ran.stderr)) == (0, "")
    assert cli("status", "--all", **elsewhere).stdout == "No service runs.\n"
    assert eventually(lambda: not service_of(cli.folder))


@only_root_can
def test_a_pidfile_or_a_home_of_another_user_is_refused(cli: Cli) -> None:
    (cli.folder / ".metaflow").mkdir()
    for anothers in (pidfile_of(cli.folder), cli.home / "services"):
        anothers.touch()
        os.chown(anothers, 1, 1)
        assert is_refused(cli("start"), anothers, "another user")
        anothers.unlink()


@only_root_can
def test_a_root_of_another_user_hides_no_other(daemon: Api, cli: Cli, tmp_path: Path) -> None:
    assert cli("start", "--root", tmp_path / "other").returncode == 0
    os.chown(pidfile_of(tmp_path / "other"), 1, 1)
    listed = cli("status", "--all")
    os.chown(pidfile_of(tmp_path / "other"), 0, 0)
    assert (listed.returncode, daemon.url in listed.stdout) == (0, True), listed


def test_stop_returns_when_all_but_the_log_and_the_port_is_gone(daemon: Api, cli: Cli) -> None:
    assert cli("stop").stdout == f"Stopped {daemon.url} for {cli.folder}\n"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((daemon.host, daemon.port))
    left = [path.name for path in (cli.folder / ".metaflow").iterdir() if path.is_file()]
    assert (sorted(left), list((cli.home / "services").iterdir())) == (
        [mls.LOG_FILE, mls.PORT_FILE],
        [],
    )


# ==================================================================================================
# Daemon
# ==================================================================================================

# How a service comes to be and ends: starting, signals, idling, what it keeps of its starter, its
# log, its searches. Services are real ones of the command line.


def test_commands_keep_their_service_past_its_time_out_until_the_last_is_killed(cli: Cli) -> None:
    with cli.popen("run", "--idle-timeout", 0.2, "sleep", 60) as first:
        assert wait_for_service(cli.folder)
        with cli.popen("run", "sh", "-c", "echo runs; exec sleep 60") as second:
            assert second.stdout.readline() == "runs\n"
            first.kill()
            assert keeps_running(cli.folder)
            second.kill()
    assert eventually(lambda: not service_of(cli.folder))


def test_an_idle_time_out_of_zero_is_never_and_wins_over_the_environment(cli: Cli) -> None:
    assert cli("start", "--idle-timeout", 0, METAFLOW_LOCAL_SERVICE_IDLE_TIMEOUT="0.1")
    assert keeps_running(cli.folder)


class SlowRequest:
    """A POST of a flow of which the service has got only a part."""

    def __init__(self, api: Api) -> None:
        self.socket = socket.create_connection((api.host, api.port), timeout=30)
        self.socket.sendall(b"POST /flows/Slow HTTP/1.1\r\nContent-Length: 2\r\n\r\n{")
        assert api.get("/ping").status == 200  # on a later connection: the first is accepted

    def finish(self) -> bytes:
        """Send the rest, and return all of the answer."""
        self.socket.sendall(b"}")
        with self.socket, self.socket.makefile("rb") as answer:
            return answer.read()


def is_stopping(folder: Path) -> bool:
    return json.loads(pidfile_of(folder).read_text() or "{}").get("is_stopping", False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_in_flight_finish(daemon: Api, cli: Cli, number: int) -> None:
    request = SlowRequest(daemon)
    os.kill(service_of(cli.folder).pid, number)
    assert eventually(lambda: is_stopping(cli.folder))
    answer = request.finish()
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"\r\nConnection: close\r\n" in answer
    assert (cli.folder / ".metaflow" / "Slow" / "_meta" / "_self.json").exists()
    assert service_of(cli.folder) is None


def test_a_run_that_comes_while_the_service_stops_gets_a_new_one(daemon: Api, cli: Cli) -> None:
    old, request = service_of(cli.folder), SlowRequest(daemon)
    os.kill(old.pid, signal.SIGTERM)
    assert eventually(lambda: is_stopping(cli.folder))
    with cli.popen("run", "printenv", "METAFLOW_SERVICE_URL") as command:
        assert not eventually(lambda: command.poll() is not None, seconds=0.5)
        assert request.finish().startswith(b"HTTP/1.1 200 ")
        told, _ = command.communicate(timeout=60)
    new = service_of(cli.folder)
    assert (command.returncode, told) == (0, f"{new.url}\n")
    assert new.pid != old.pid


def test_a_service_whose_root_is_gone_stops_like_any_other(cli: Cli) -> None:
    with cli.popen("serve") as command:
        with contextlib.closing(Api(wait_for_service(cli.folder).url)) as client:
            assert client.get("/ping").status == 200
        shutil.rmtree(cli.folder / ".metaflow")
        command.send_signal(signal.SIGTERM)
        _, log = command.communicate(timeout=60)
    assert (command.returncode, "Traceback" in log) == (0, False), log


def test_an_impossible_root_is_reported(cli: Cli) -> None:
    (cli.folder / ".metaflow").touch()
    for command in (["start"], ["serve"], ["run", "true"], ["url"]):
        assert is_refused(cli(*command), cli.folder / ".metaflow")
    (cli.folder / "closed").mkdir(mode=0o500)
    closed = ["closed"] if os.geteuid() != 0 else []  # root may write everywhere
    for root in (".metaflow", ".metaflow/below", *closed):
        assert is_refused(cli("start", "--root", root), cli.folder / root)


def test_a_service_that_cannot_listen_says_why_and_leaves_nothing(cli: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for command in ("start", "serve", "url"):
            assert is_refused(cli(command, "--port", port), port, "in use")
        assert is_refused(cli("run", "--port", port, "true"), port, "in use")
    for host in ("192.0.2.1", "ü..b"):
        assert is_refused(cli("start", "--generate-key", "--host", host), host)
    assert all_paths(cli.folder) == leftovers(cli) == []
    assert cli("start", "--port", port).returncode == 0


def test_only_a_port_that_a_service_may_release_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleep(seconds: float) -> None:
        raise LookupError("it waits")

    monkeypatch.setattr(mls.time, "sleep", sleep)
    index = mls.ServiceIndex(str(tmp_path / "services"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = mls.Options(str(tmp_path), "127.0.0.1", port, 0, None, False, None, False, index)
        with pytest.raises(OSError, match="in use"):
            mls.open_server(options)
        index.add(str(tmp_path / "deleted"))
        with pytest.raises(LookupError, match="it waits"):
            mls.open_server(options)


@pytest.mark.parametrize("command", ["start", "serve", "run true", "url"])
def test_a_python_without_metaflow_is_reported_in_one_sentence(cli: Cli, command: str) -> None:
    without = [sys.executable, "-S", str(MODULE), *command.split()]  # -S: without site-packages
    assert is_refused(in_shell(cli, shlex.join(without)), "Metaflow is not installed")
    assert all_paths(cli.folder) == []
    (cli.folder / ".metaflow").mkdir()  # perhaps to make the folder a project
    assert is_refused(in_shell(cli, shlex.join(without)), "Metaflow is not installed")
    assert (cli.folder / ".metaflow").exists()


@pytest.mark.parametrize("error", ["RuntimeError", "SystemExit"])
def test_a_broken_metaflow_is_reported_in_one_sentence(
    cli: Cli, tmp_path: Path, error: str
) -> None:
    (tmp_path / "metaflow.py").write_text(f"raise {error}('out of\\norder')")
    broken = {"PYTHONPATH": str(tmp_path)}
    assert is_refused(cli("start", **broken), "out of order")
    assert eventually(lambda: leftovers(cli) == [])
    with cli.popen("run", "sleep", 60, **broken) as command:
        with contextlib.closing(Api(wait_for_service(cli.folder).url)) as client:
            reply = client.post("/flows/Flow")
        command.kill()
    assert (reply.status, "out of order" in reply.json["message"]) == (500, True)
    assert cli("stop").returncode == 0
    assert cli("start").stdout.startswith("Started")  # for nothing is left of the other


def test_a_service_that_is_too_busy_to_answer_a_command_is_not_stopped(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = mls.parse_pidfile(json.dumps({"pid": os.getpid(), "port": api.port}), "its pidfile")
    stopped: list[mls.Service] = []
    monkeypatch.setattr(mls, "stop_service", stopped.append)
    monkeypatch.setattr(mls, "MOST_CONNECTIONS", 1)
    assert api.get("/ping").status == 200
    with pytest.raises(mls.ServiceError, match="too many connections"):
        mls.wait_until_ready(service)
    assert stopped == []


@pytest.mark.parametrize("way", ["metaflow_local_service.py", "-m metaflow_local_service"])
def test_modules_of_the_user_are_not_taken_for_the_standard_librarys(cli: Cli, way: str) -> None:
    shutil.copy(MODULE, cli.folder)
    for name in ("http", "json", "logging", "queue", "typing"):
        if name != "typing" or way[0] != "-" or sys.version_info >= (3, 10):
            # `python3.9 -m` imports typing itself, before it comes to us
            (cli.folder / f"{name}.py").write_text("raise RuntimeError('the wrong one')")
    started = in_shell(cli, f"{shlex.quote(sys.executable)} {way} start")
    assert (started.returncode, without_mention(started.stderr)) == (0, "")


def test_a_daemon_lets_the_pipes_and_files_of_its_starter_go(cli: Cli) -> None:
    reader, writer = os.pipe()
    piped = in_shell(cli, "PROGRAM | cat; url=$(PROGRAM); echo $url", "url", pass_fds=[writer])
    os.close(writer)
    with open(reader, "rb") as end:
        assert end.read() == b""  # nobody has the other end any more
    assert piped.stdout == f"{service_of(cli.folder).url}\n" * 2


@pytest.mark.parametrize(
    ("command", "closed"),
    [
        ("start", "<&-"),
        ("start", ">&-"),
        ("start", "2>&-"),
        ("start", "<&- >&- 2>&-"),
        ("run true", "<&- >&- 2>&-"),
    ],
)
def test_a_starter_may_lack_standard_streams(cli: Cli, command: str, closed: str) -> None:
    started = in_shell(cli, f"PROGRAM {closed}", *command.split())
    assert (started.returncode, without_mention(started.stderr)) == (0, "")
    assert service_of(cli.folder)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="looks into /proc")
def test_a_daemon_has_only_files_of_its_own_open(daemon: Api, cli: Cli) -> None:
    pid, log = service_of(cli.folder).pid, str(cli.folder / ".metaflow" / mls.LOG_FILE)

    def files() -> list[str]:
        links = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()]
        return sorted(link.partition(":")[0] for link in links)

    # The log is stdout and stderr; the pipes wake the main thread and the one that accepts.
    metaflow_folder = str(cli.folder / ".metaflow")  # held, so that it is known again
    pidfile_path = str(pidfile_of(cli.folder))
    own = ["/dev/null", *[log] * 2, metaflow_folder, pidfile_path, *["pipe"] * 4, "socket"]

    def known() -> list[str]:
        """All but shared libraries: libffi, which Metaflow loads, keeps its own file open."""
        return [file for file in files() if file != "anon_inode" and ".so." not in file]

    assert eventually(lambda: known() == sorted(own)), files()
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.getsid(pid) != os.getsid(0)


has_proc = pytest.mark.skipif(
    not os.path.isdir("/proc/self"), reason="/proc tells what a process has"
)


def command_words(pid: int) -> list[str]:
    """What `ps` shows of a process."""
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]


@has_proc
def test_a_service_inherits_nothing_but_the_root(cli: Cli) -> None:
    program = (
        "import os, resource, signal, sys;"
        "resource.setrlimit(resource.RLIMIT_CPU, (60, resource.getrlimit(resource.RLIMIT_CPU)[1]));"
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN);"
        "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals());"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    key = "a-key-that-nobody-sees"
    ran = cli.execute(
        [sys.executable, "-c", program, *cli.command("run", "true", "--token=secret")],
        TOKEN="secret",
        METAFLOW_SERVICE_AUTH_KEY=key,
        METAFLOW_SERVICE_HEADERS=json.dumps({"x-token": "secret"}),
        METAFLOW_LOCAL_SERVICE_EXPORTED=json.dumps({"METAFLOW_SERVICE_AUTH_KEY": [key, "secret"]}),
    )
    assert ran.returncode == 0, ran
    service = service_of(cli.folder)
    shown = [mls.PROGRAM, "--root", str(cli.folder)]
    assert eventually(lambda: command_words(service.pid)[-3:] == shown)
    assert "true" not in command_words(service.pid)
    environment = Path(f"/proc/{service.pid}/environ").read_text()
    assert ("secret" in environment, key in environment, service.key) == (False, False, "secret")
    with contextlib.closing(Api(service.url, "secret")) as client:
        wrong = {"x-api-key": key}
        assert client.get("/ping").status == 200
        assert client.request("GET", "/ping", headers=wrong).status in (401, 403)
    limits = Path(f"/proc/{service.pid}/limits").read_text()
    soft, hard = re.findall(r"Max cpu time +(\S+) +(\S+)", limits)[0]
    assert soft == hard
    states = dict(re.findall(r"(Sig\w+):\t(\w+)", Path(f"/proc/{service.pid}/status").read_text()))
    assert int(states["SigBlk"], 16) == 0
    assert not int(states["SigIgn"], 16) & 1 << signal.SIGCHLD - 1
    os.kill(service.pid, signal.SIGTERM)
    assert eventually(lambda: not service_of(cli.folder))


@has_proc
@pytest.mark.parametrize("way", ["in a zip", "in a zip, from Python", "by another name"])
def test_a_service_goes_on_in_a_new_interpreter_wherever_its_module_is(
    cli: Cli, tmp_path: Path, way: str
) -> None:
    shutil.copy(MODULE, tmp_path / "renamed")  # as in ~/bin
    with zipfile.ZipFile(tmp_path / "module.zip", "w") as archive:
        archive.write(MODULE, MODULE.name)
    words = {
        "in a zip": ["-m", MODULE.stem, "start"],
        "in a zip, from Python": ["-c", "import metaflow_local_service as m; m.ensure(); input()"],
        "by another name": [tmp_path / "renamed", "start"],
    }
    environment = {**cli.environment, "PYTHONPATH": str(tmp_path / "module.zip")}
    command = [sys.executable, *map(str, words[way])]
    with subprocess.Popen(command, cwd=cli.folder, env=environment, stdin=subprocess.PIPE) as ran:
        service = wait_for_service(cli.folder)
        assert eventually(lambda: mls.get_response(service, "/ping")[0] == 200)
        shown = ["-", mls.PROGRAM, "--root", str(cli.folder)]
        assert command_words(service.pid)[-4:] == shown
        ran.communicate(b"\n")
    assert ran.returncode == 0


@has_proc
def test_a_service_that_cannot_go_on_in_a_new_interpreter_goes_on_without(cli: Cli) -> None:
    program = "import sys; sys.executable = '/gone'; import metaflow_local_service as m; m.main()"
    words = [sys.executable, "-c", program, "start"]
    started = cli.execute(words, PYTHONPATH=str(MODULE.parent))
    assert (started.returncode, without_mention(started.stderr)) == (0, "")
    assert command_words(service_of(cli.folder).pid) == words


def test_a_service_does_not_compile_its_module_once_more(cli: Cli) -> None:
    shutil.copy(MODULE, cli.folder)
    words = [sys.executable, MODULE.name, "start"]
    assert cli.execute(words, PYTHONDONTWRITEBYTECODE="").returncode == 0
    assert not (cli.folder / "__pycache__").exists()


@has_proc
def test_a_service_keeps_no_file_of_processes_that_have_ended(daemon: Api, cli: Cli) -> None:
    service = service_of(cli.folder)
    for _ in range(3):
        with subprocess.Popen(["sleep", "60"]) as process:
            mls.hold_service(service, process.pid, waits=True)
            process.kill()
    links = [os.readlink(file) for file in Path(f"/proc/{service.pid}/fd").iterdir()]
    assert links.count("anon_inode:[pidfd]") <= 1  # the last is noticed later


def test_a_service_is_stopped_at_once_while_metaflow_is_imported(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "metaflow.py").write_text("import time; time.sleep(3600)")
    assert cli("url", PYTHONPATH=str(tmp_path)).returncode == 0
    assert cli("stop").stdout.startswith("Stopped")
    assert not pidfile_of(cli.folder).exists()
    client = Api(cli("url", PYTHONPATH=str(tmp_path)).stdout.strip())
    shutil.rmtree(cli.folder / ".metaflow")
    assert eventually(lambda: refuses_connections(client))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("other")])
def test_a_service_does_without_a_log_where_there_can_be_none(cli: Cli, make: Any) -> None:
    log = cli.folder / ".metaflow" / mls.LOG_FILE
    log.parent.mkdir()
    make(log)
    assert cli("start", timeout=60).returncode == 0
    assert not (log.parent / "other").exists()


def test_a_long_log_is_put_aside(cli: Cli) -> None:
    log = cli.folder / ".metaflow" / mls.LOG_FILE
    log.parent.mkdir()
    log.write_bytes(b"x" * (mls.LONGEST_LOG + 1))
    log.chmod(0o644)
    assert cli("start").returncode == 0
    assert log.with_name(f"{log.name}.1").read_bytes()[:1] == b"x"
    assert "serving" in log.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_a_log_that_was_deleted_is_begun_anew_before_it_grows_without_end(cli: Cli) -> None:
    assert cli("start", METAFLOW_LOCAL_SERVICE_DEBUG="1").returncode == 0
    log = cli.folder / ".metaflow" / mls.LOG_FILE
    log.unlink()
    with contextlib.closing(Api(service_of(cli.folder).url)) as client:
        for _ in range(mls.LONGEST_LOG // 60_000 + 2):
            client.get("/" + "x" * 60_000)
    assert 0 < log.stat().st_size <= mls.LONGEST_LOG


@pytest.mark.parametrize("debug", ["1", "0"])
def test_the_log_holds_every_request_when_debugging(cli: Cli, debug: str) -> None:
    assert cli("start", METAFLOW_LOCAL_SERVICE_DEBUG=debug).returncode == 0
    log = (cli.folder / ".metaflow" / mls.LOG_FILE).read_text()
    assert ("serving" in log, "GET /ping" in log) == (True, debug == "1")


def test_the_log_has_no_character_that_a_terminal_takes_for_a_command() -> None:
    record = logging.makeLogRecord(
        {"msg": "%s\u202e", "args": ("flow \x1b[31mred\nforged \x9b2J",)}
    )
    assert mls.escape_message(record)  # as a filter: the record is kept
    assert record.getMessage() == "flow \\x1b[31mred\\nforged \\x9b2J\\u202e"


def leftovers(cli: Cli) -> list[str]:
    """What a service has made and not removed, but for its log and the port that it keeps."""
    left = [*all_paths(cli.folder / ".metaflow"), *all_paths(cli.home / "services")]
    kept = ("metaflow-local-service.log", "metaflow-local-service.port")
    return [path.name for path in left if path.name not in kept]


@pytest.mark.skipif(not shutil.which("ps"), reason="there is no ps here")
@pytest.mark.parametrize("how", ["SIGTERM", "idle", "root removed"])
def test_a_service_that_has_stopped_leaves_nothing(cli: Cli, how: str) -> None:
    timeout = "60" if how == "SIGTERM" else "0.2"
    assert cli("start", METAFLOW_LOCAL_SERVICE_IDLE_TIMEOUT=timeout).returncode == 0
    (pid,) = {json.loads(path.read_text())["pid"] for path in cli.folder.glob(".metaflow/*.pid")}
    if how == "SIGTERM":
        os.kill(pid, signal.SIGTERM)
    elif how == "root removed":
        shutil.rmtree(cli.folder / ".metaflow")
    assert eventually(lambda: not is_running(pid))
    assert leftovers(cli) == []


def test_everything_that_a_service_makes_is_private_whatever_the_umask(cli: Cli) -> None:
    assert in_shell(cli, "umask 0; PROGRAM", "run", "true").returncode == 0
    with contextlib.closing(Api(service_of(cli.folder).url)) as client:
        client.post(f"{client.new_task_of_its_own()}/heartbeat")
    made = [*all_paths(cli.folder), *all_paths(cli.home)]
    assert len(made) > 10
    assert [p for p in made if not p.is_symlink() and p.stat().st_mode & 0o077] == []


def test_the_services_of_a_user_are_listed(daemon: Api, cli: Cli, tmp_path: Path) -> None:
    assert cli("start", "--root", tmp_path).returncode == 0
    other = cli.status("--root", tmp_path)
    rows = daemon.get("/api/services").json["data"]
    assert sorted(rows, key=lambda row: not row["is_this"]) == [
        {"root": str(cli.folder), "url": daemon.url, "is_this": True},
        {"root": other["root"], "url": other["url"], "is_this": False},
    ]


# -- searches --------------------------------------------------------------------------------------


def test_a_search_that_takes_for_ever_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mls, "SEARCH_SECONDS", 0.5)
    search = mls.PatternSearcher().search
    with pytest.raises(mls.BadQuery, match="takes more than"):
        mls.find_matches("^(?:(a+)+$)$", ["a" * 3000 + "!"], search)


def test_a_process_finds_what_a_search_in_place_finds() -> None:
    search, texts = mls.PatternSearcher().search, ["foobar", "foo\n", "\udcff", "baz", "aa"]
    for pattern in ("^(?:(foo|bar)+)$", "(?i)FOO", r"^(?:(\w)\1)$", r"\yba(r|z)"):
        found = mls.find_matches(pattern, texts, mls.search_in_place)
        assert mls.find_matches(pattern, texts, search) == found
    with pytest.raises(mls.BadQuery, match="is not a regular expression"):
        mls.find_matches("^(?:()$", texts, search)


def test_a_regular_expression_that_never_ends_holds_up_nobody(daemon: Api, cli: Cli) -> None:
    task = daemon.new_task_of_its_own()
    daemon.post(f"{task}/metadata", [metadatum("field", "a" * 50 + "!")])
    step = task.rsplit("/tasks/", 1)[0]
    pid = cli.status()["pid"]
    with ThreadPoolExecutor() as pool, contextlib.ExitStack() as on_failure:
        on_failure.callback(os.kill, pid, signal.SIGKILL)  # nothing else would end it
        endless = pool.submit(
            daemon.get, f"{step}/filtered_tasks?pattern={quote('^(a+)+$', safe='')}"
        )
        assert daemon.get("/ping").status == 200
        assert endless.result().status == 400
        on_failure.pop_all()


# ==================================================================================================
# Library
# ==================================================================================================

# What Python code may call, and the fixtures for pytest. In this process, or in scripts, a notebook
# and a pytest of their own, as a user has them; a kernel and pytest's workers take seconds to
# start.


@pytest.fixture
def library(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The module in this process, in the project; its services are this user's."""
    monkeypatch.chdir(cli.folder)
    monkeypatch.delenv("METAFLOW_USER", raising=False)
    for name, value in library_environment(cli).items():
        monkeypatch.setenv(name, value)
    return cli


def library_environment(cli: Cli) -> Mapping[str, str]:
    """The environment of Python that imports the module, whose bytecode all tests share."""
    bytecode = cli.home.parents[1] / "bytecode"
    return {
        **cli.environment,
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONPYCACHEPREFIX": str(bytecode),
        "PYTHONDONTWRITEBYTECODE": "",
    }


class Script:
    """A script of a user's that has a service, until its standard input is closed."""

    def __init__(self, cli: Cli, body: str) -> None:
        lines = "import sys, metaflow_local_service as mls"
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{lines}\n{textwrap.dedent(body)}"],
            cwd=cli.folder,
            env=library_environment(cli),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin and self.process.stdout
        self.root = Path(self.process.stdout.readline().strip())

    def end(self, number: int = 0) -> int:
        """End it, by a signal if one is given; the exit code."""
        with self.process:
            if number:
                self.process.send_signal(number)
                self.process.wait()
        return self.process.returncode


@structural
def test_what_the_library_offers_is_what_the_readme_names() -> None:
    (public,) = (ast.literal_eval(s.tree.value) for s in statements() if "__all__" in s.defined)
    assert public == sorted(public)
    assert [name for name in public if f"`{name}" not in text_of("README.md")] == []
    of_library = {name for s in statements() if s.layer == "Library" for name in s.defined}
    assert set(public) - of_library == {"Service", "ServiceError"}


def test_a_service_is_started_found_and_stopped_from_python(
    library: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mls.find() is None
    assert all_paths(library.folder) == []
    service = mls.ensure(idle_timeout=60, generate_key=True)
    assert (service.root, service.url) == (str(library.folder), library.status()["url"])
    assert repr(service) == f"<Service of {library.folder} at {service.url}>"  # without the key
    wanted = {"METAFLOW_SERVICE_URL": service.url, "METAFLOW_SERVICE_AUTH_KEY": service.key}
    assert service.environment.items() >= {**os.environ, **wanted}.items()
    assert mls.ensure() == mls.ensure(library.folder, port=service.port) == mls.find() == service
    with pytest.raises(mls.ServiceError, match="runs already, on port"):
        mls.ensure(port=1)
    with pytest.raises(mls.ServiceError, match=r"runs already, on 127\.0\.0\.1"):
        mls.ensure(host="127.0.0.2")
    assert capsys.readouterr().err == ""
    assert mls.ensure(idle_timeout=0) == service
    assert "runs already, with an idle time-out of 60 s\n" in capsys.readouterr().err
    mls.stop()
    assert mls.find() is None
    mls.stop()
    with pytest.raises(mls.ServiceError, match=r"^argument --port: a port is .*'70000'"):
        mls.ensure(tmp_path / "other", port=70000)


def test_folders_may_begin_with_a_tilde(library: Cli) -> None:
    (library.home / "ui").mkdir()
    (library.home / "ui" / "index.html").touch()
    service = mls.ensure("~/root", ui_dir="~/ui")
    assert (service.root, service.ui_folder) == (f"{library.home}/root", f"{library.home}/ui")


def test_threads_that_ask_at_once_get_one_service(library: Cli) -> None:
    with ThreadPoolExecutor(4) as pool:
        services = set(pool.map(lambda _: mls.ensure(), range(4)))
    assert len(services) == 1


def test_python_that_has_lost_its_folder_and_its_files_starts_one_too(cli: Cli) -> None:
    script = f"""
        import os
        os.mkdir("gone"), os.chdir("gone"), os.rmdir("../gone")
        for number in range(3):
            os.close(number)
        service = mls.ensure({str(cli.folder)!r})
        try:
            mls.ensure()
        except mls.ServiceError as error:
            open(service.root + "/said", "w").write(str(error))
    """
    assert Script(cli, script).end() == 0
    assert (cli.folder / "said").read_text() == "The current folder does not exist any more."
    assert service_of(cli.folder)


def test_a_python_that_cannot_be_started_is_reported_in_one_sentence(
    library: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    executables = {
        "": "no such interpreter here",
        "/usr/bin/false": "false cannot start",
        "/nowhere/python": "No such file",
    }
    for executable, sentence in executables.items():
        with monkeypatch.context() as here:
            here.setattr(sys, "executable", executable)
            with pytest.raises(mls.ServiceError, match=f"^.*{sentence}.*$"):
                mls.ensure()
    monkeypatch.setattr(mls, "START_SECONDS", 0.001)
    with pytest.raises(mls.ServiceError, match=r"^.* within 0\.001 seconds\.$"):
        mls.ensure()
    assert all_paths(library.folder) == []


def test_python_finds_metaflow_where_its_caller_does(cli: Cli) -> None:
    script = f"""
        import sys
        sys.path += [{str(MODULE.parent)!r}, {sysconfig.get_path("purelib")!r}]
        import metaflow_local_service as mls
        print(mls.ensure().url)
        mls.stop()
    """
    ran = cli.execute([sys.executable, "-S", "-c", textwrap.dedent(script)])
    assert (ran.stdout[:7], ran.stderr) == ("http://", "")


def test_a_service_stays_for_as_long_as_the_process_that_asked(cli: Cli) -> None:
    asking = Script(cli, "print(mls.ensure(idle_timeout=0.2).root, flush=True)\nsys.stdin.read()")
    assert asking.root == cli.folder
    assert keeps_running(cli.folder)
    asking.end(signal.SIGKILL)
    assert eventually(lambda: service_of(cli.folder) is None)


RUNNING = """
    with mls.running(idle_timeout=0.2) as service:
        print(service.root, flush=True)
        sys.exit(bool(sys.stdin.read()) or "no more")
"""


def test_a_service_for_a_block_ends_with_it_however_that_ends(cli: Cli) -> None:
    exit_codes = {0: 1, signal.SIGINT: -signal.SIGINT, signal.SIGKILL: -signal.SIGKILL}
    scripts = {number: Script(cli, RUNNING) for number in exit_codes}
    assert keeps_running(scripts[0].root)
    assert all(service_of(script.root) for script in scripts.values())
    assert {number: script.end(number) for number, script in scripts.items()} == exit_codes
    killed = scripts[signal.SIGKILL].root
    assert eventually(lambda: service_of(killed) is None)
    shutil.rmtree(killed)
    assert [script.root for script in scripts.values() if script.root.exists()] == []
    assert list((cli.home / "services").iterdir()) == []


FORKING = """
    import os, shutil
    with mls.running() as service:
        if not os.fork():
            sys.exit()
        os.wait()
        print(service.root, flush=True)
        sys.stdin.read()
        shutil.rmtree(service.root)
"""


def test_a_service_for_a_block_outlives_a_forked_process_and_its_folder(cli: Cli) -> None:
    script = Script(cli, FORKING)
    assert service_of(script.root)
    assert script.end() == 0


def test_a_service_for_a_block_is_left_to_others_that_have_it(library: Cli) -> None:
    with pytest.raises(ZeroDivisionError), mls.running("a") as first:
        with mls.running("a") as second:
            assert first == second == mls.find("a")
        assert mls.find("a") == first
        raise ZeroDivisionError
    assert mls.find("a") is None
    before = mls.ensure("a")
    with mls.running("a") as service:
        assert service == before
    assert mls.find("a") == before


USING = """
    import metaflow, os, pathlib, urllib.request
    from metaflow import Metaflow, get_metadata, namespace
    from metaflow.plugins.datastores.local_storage import LocalStorage

    pathlib.Path("of_local_mode/.metaflow/LocalFlow").mkdir(parents=True)
    os.chdir("of_local_mode")
    assert get_metadata() == f"local@{os.getcwd()}", get_metadata()
    namespace(None)
    before = dict(os.environ)
    for key in (False, True):
        name = "WithKey" if key else "Open"
        mls.ensure(f"../{name}", generate_key=key)
        service = mls.use(f"../{name}")
        for path in (name, f"{name}/run"):  # older clients do not list a flow without a run
            request = urllib.request.Request(f"{service.url}/flows/{path}", b"{}")
            if key:
                request.add_header("x-api-key", service.key)
            urllib.request.urlopen(request).close()
        assert get_metadata() == f"service@{service.url}"
        assert [flow.id for flow in Metaflow()] == [name]
        assert LocalStorage.get_datastore_root_from_config(print) == service.root + "/.metaflow"
        assert os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"] == service.root
    mls.use("../Open")
    assert [flow.id for flow in Metaflow()] == ["Open"]
    assert "METAFLOW_SERVICE_AUTH_KEY" not in os.environ
    with mls.running() as service, mls.using(service):
        assert list(Metaflow()) == []
        assert get_metadata() == f"service@{service.url}"
        own_cards = os.path.join(mls.current_folder(), ".metaflow")
        assert mls.read_card_roots(service.root + "/.metaflow") == [own_cards]
    assert [flow.id for flow in Metaflow()] == ["Open"]
    assert mls.user_environment(os.environ).keys() - before.keys() == {
        "METAFLOW_DEFAULT_METADATA", "METAFLOW_SERVICE_URL"
    }
    print("used", flush=True)
"""


def test_metaflow_that_is_imported_already_uses_one_service_after_the_other(cli: Cli) -> None:
    script = Script(cli, USING)
    assert (script.end(), str(script.root)) == (0, "used")


def readme_blocks(language: str, containing: str) -> list[str]:
    """The code blocks of the README in a language that contain a text."""
    blocks = re.findall(
        rf"^```{language}\n(.+?)^```", text_of("README.md"), re.MULTILINE | re.DOTALL
    )
    return [block for block in blocks if containing in block]


def test_a_notebook_does_what_the_readme_says_of_its_cell(cli: Cli) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    (cli.folder / "train.py").write_text(SHORT_FLOW.replace("Flow(", "TrainFlow("))
    (cell,) = readme_blocks("python", "mls.use()")
    cells = [cell, "print(running.run.data.value, running.run.pathspec)"]
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))
    client = nbclient.NotebookClient(notebook, resources={"metadata": {"path": cli.folder}})
    client.execute(env=library_environment(cli))
    last = notebook.cells[-1].outputs[0].text.split()
    assert last[0] == "42"
    assert (cli.folder / ".metaflow" / last[1]).is_dir()


CONFTEST = """
    import os

    pytest_plugins = ["metaflow_local_service"]

    def pytest_unconfigure():
        assert "METAFLOW_SERVICE_URL" not in os.environ
"""
TEST_OF_USER = """
    import metaflow_local_service, os, pathlib

    def test_of_user(metaflow_service, metaflow_root):
        assert metaflow_local_service.find(metaflow_root) == metaflow_service
        assert os.environ["METAFLOW_SERVICE_URL"] == metaflow_service.url
        with open(pathlib.Path(__file__).with_name("seen"), "a") as f:
            print(metaflow_service.root, file=f)
"""


def test_each_pytest_worker_has_a_service_of_its_own_and_leaves_nothing(cli: Cli) -> None:
    (cli.folder / "conftest.py").write_text(textwrap.dedent(CONFTEST))
    (cli.folder / "test_user.py").write_text(textwrap.dedent(TEST_OF_USER))
    command = f"{sys.executable} -m pytest -q -p xdist -n 3 --dist each -p no:cacheprovider"
    ran = cli.execute(
        [*command.split(), "--basetemp", cli.home / "pytest"],
        **library_environment(cli),
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
    )
    assert (ran.returncode, "3 passed" in ran.stdout) == (0, True), ran.stdout
    roots = (cli.folder / "seen").read_text().split()
    assert len(set(roots)) == 3
    assert not any(map(os.path.exists, roots))
    assert list((cli.home / "services").iterdir()) == []


# ==================================================================================================
# Commands
# ==================================================================================================

# Subcommands: output, exit codes, sentences on stderr. Each runs as a process of its own; those
# that only look do so on the flows that have failed (`failures`, see Model). `demo` and a few
# others run a real flow, which takes as many seconds as that has tasks.


def test_commands_do_not_import_what_only_few_of_them_need() -> None:
    program = "import metaflow_local_service, sys; print(*sys.modules)"
    without_site = [sys.executable, "-S", "-c", program]  # which may import anything
    imported = subprocess.check_output(without_site, cwd=REPOSITORY, text=True).split()
    assert not {"logging", "metaflow", "subprocess"} & set(imported)


@pytest.mark.parametrize(("end", "code"), [("exit 7", 7), ("kill -TERM $$", -signal.SIGTERM)])
def test_run_becomes_its_command_and_ends_as_it_does(cli: Cli, end: str, code: int) -> None:
    with cli.popen("run", "sh", "-c", f"echo $$; {end}") as command:
        assert int(command.stdout.readline()) == command.pid
    assert command.returncode == code


def test_run_passes_everything_after_the_command_on(daemon: Api, cli: Cli) -> None:
    printing = (sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))")
    arguments = ["--port", "5", "-h", "--", "--root", "", "*", "a b", "--", "--json"]
    for ours in ([], ["--"], ["--idle-timeout", "9"], ["--idle-timeout", "9", "--"]):
        ran = cli("run", *ours, *printing, *arguments)
        assert json.loads(ran.stdout) == arguments, ran.stderr


def test_run_leaves_input_and_broken_pipes_to_its_command(daemon: Api, cli: Cli) -> None:
    assert in_shell(cli, "echo through | PROGRAM", "run", "cat").stdout == "through\n"
    ran = cli("run", "sh", "-c", "kill -PIPE $$; echo survived")
    assert (ran.returncode, ran.stdout) == (-signal.SIGPIPE, "")


def test_run_reports_a_command_that_is_missing_or_not_executable(daemon: Api, cli: Cli) -> None:
    (cli.folder / "data").touch(mode=0o644)
    for missing in ("no-such-command", "./no-such-file"):
        assert is_refused(cli("run", missing, "-x"), missing, code=127)
    assert is_refused(cli("run", "", "-x"), "'': command not found", code=127)
    for not_executable in ("./data", "."):
        assert is_refused(cli("run", not_executable), not_executable, code=126)


def test_a_key_is_made_once_and_is_the_services_from_then_on(cli: Cli) -> None:
    key, name = "--generate-key", "METAFLOW_SERVICE_AUTH_KEY"
    first = cli("start", "--host", "0.0.0.0", key).stdout.splitlines()
    kept = service_of(cli.folder).key
    assert re.fullmatch(r"[\w-]{32}", kept)
    assert first[-1] == f"export {name}={kept}"
    assert first[1:] == cli("start", key).stdout.splitlines()[1:] == cli("env").stdout.splitlines()
    assert cli("run", key, "printenv", name).stdout == f"{kept}\n"


def test_run_gives_its_command_the_settings(daemon: Api, cli: Cli) -> None:
    told = cli("run", "env", METAFLOW_SERVICE_URL="http://other").stdout.splitlines()
    assert f"METAFLOW_SERVICE_URL={daemon.url}" in told
    assert "METAFLOW_DEFAULT_METADATA=service" in told
    assert f"{SYSROOT}={cli.folder}" in told


def test_a_root_on_the_command_line_is_where_artifacts_go_too(cli: Cli) -> None:
    command, root = ("run", "--root", "root", "printenv", SYSROOT), cli.folder / "root"
    told = cli(*command)
    assert (told.stdout, without_mention(told.stderr)) == (f"{root}\n", "")
    assert without_mention(cli(*command, **{SYSROOT: str(root)}).stderr) == ""
    over = cli(*command, **{SYSROOT: "/else"})
    assert over.stdout == f"{root}\n"
    assert re.fullmatch(r".*--root overrides.*'/else'\n", without_mention(over.stderr))


SHORT_FLOW = """
from metaflow import FlowSpec, step

class Flow(FlowSpec):
    @step
    def start(self):
        self.value = 42
        self.next(self.end)

    @step
    def end(self):
        pass

if __name__ == "__main__":
    Flow()
"""


def test_run_gives_its_command_the_root_of_its_service_as_an_absolute_path(cli: Cli) -> None:
    (cli.folder / "sub").mkdir()
    ran = cli("run", "printenv", SYSROOT, cwd=cli.folder / "sub", **{SYSROOT: "other"})
    assert ran.stdout == f"{cli.folder}/sub/other\n"
    assert service_of(cli.folder / "sub" / "other")


def test_within_another_projects_shell_run_means_the_project_it_is_in(
    cli: Cli, tmp_path: Path
) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        (folder / ".metaflow").mkdir(parents=True)
    key = cli("env", "--generate-key", cwd=a)
    assert "recorded in" in key.stderr
    script = f'eval "$(PROGRAM)"; printenv {SYSROOT}; PROGRAM >/dev/null; cd {b}; RUN'
    run = shlex.join(cli.command("run", "sh", "-c", f"printenv {SYSROOT}; env"))
    shell = in_shell(cli, script.replace("RUN", run), "env", cwd=a)
    told = shell.stdout.splitlines()
    assert told[:2] == [str(a), str(b)], shell
    assert not [line for line in told if line.startswith("METAFLOW_SERVICE_AUTH_KEY=")]
    assert f"METAFLOW_SERVICE_URL={service_of(b).url}" in told
    assert shell.stderr.count("flows of any folder are recorded") == 1
    url = shlex.join(cli.command("url"))
    nested = cli("run", "sh", "-c", f"cd {b}; {url}; cd {a}; {url}", cwd=a)
    assert nested.stdout.splitlines() == [service_of(b).url, service_of(a).url]


def test_settings_of_another_service_are_taken_back(cli: Cli, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        (folder / ".metaflow").mkdir(parents=True)
    assert cli("start", "--generate-key", cwd=a).returncode == 0
    both = f'cd {a}; eval "$(PROGRAM)"; cd {b}; eval "$(PROGRAM)"'
    key = "METAFLOW_SERVICE_AUTH_KEY"
    told = in_shell(cli, f"{both}; env; export {key}=; {both}; echo own key: ${key}", "env").stdout
    assert f"METAFLOW_SERVICE_URL={service_of(b).url}\n" in told
    assert f"{key}=" not in told
    assert told.endswith("own key:\n")


def test_a_proxy_is_bypassed(cli: Cli) -> None:
    proxy = {"http_proxy": "http://127.0.0.1:9", "all_proxy": "http://127.0.0.1:9"}
    proxy["NO_PROXY"] = "intern.example"
    ask = "import os, requests; print(requests.get(os.environ['METAFLOW_SERVICE_URL'] + '/ping'))"
    ran = cli("run", sys.executable, "-c", ask, **proxy)
    assert ran.stdout == "<Response [200]>\n", ran.stderr
    told = cli("run", "printenv", "no_proxy", "NO_PROXY", **proxy).stdout.split()
    assert told == ["intern.example,127.0.0.1"] * 2
    assert "export no_proxy=intern.example,127.0.0.1\n" in cli("env", **proxy).stdout
    url = cli("url", **proxy)
    assert (url.returncode, url.stdout) == (0, f"{service_of(cli.folder).url}\n")
    assert re.fullmatch(r".*proxy.*127\.0\.0\.1.*no_proxy\n", url.stderr)
    assert cli("url", **proxy, no_proxy="127.0.0.1").stderr == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_logs_on_stderr_and_ends_well_on_a_signal(cli: Cli, number: int) -> None:
    with cli.popen("serve") as command:
        service = wait_for_service(cli.folder)
        assert service.pid == command.pid
        with contextlib.closing(Api(service.url)) as client:
            assert client.get("/ping").status == 200
        assert is_refused(cli("serve"), service.url)
        command.send_signal(number)
        output, log = command.communicate(timeout=60)
    assert (command.returncode, output) == (0, "")
    assert f"serving {cli.folder} at {service.url}" in log
    assert not service_of(cli.folder)


def test_status_describes_the_service(daemon: Api, cli: Cli) -> None:
    status, told = cli.status(), cli("status").stdout
    assert (status["url"], "key" in status) == (daemon.url, False)
    for name in ("pid", "port", "url", "root", "log"):
        assert re.search(rf"^{name} +{re.escape(str(status[name]))}$", told, re.MULTILINE)
    assert re.search(r"^since +20", told, re.MULTILINE)


@pytest.mark.parametrize("options", [(), ("--all",)])
def test_without_a_service_status_exits_with_3_and_stop_with_0(
    cli: Cli, options: Sequence[str]
) -> None:
    told = cli("status", "--json", *options)
    assert (told.returncode, bool(json.loads(told.stdout))) == (3, False)
    for command, code in (("status", 3), ("stop", 0)):
        ran = cli(command, *options)
        assert (ran.returncode, ran.stdout[:15], ran.stderr) == (code, "No service runs", "")
    assert all_paths(cli.folder) == []


def test_all_services_of_a_user_are_listed_and_stopped(cli: Cli, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert cli("url", "--root", tmp_path / name).returncode == 0
    assert [Path(service["root"]).name for service in cli.status("--all")] == ["one", "two"]
    assert cli("status", "--all").stdout.count("url ") == 2
    assert cli("stop", "--all").stdout.count("Stopped ") == 2


def test_what_a_command_has_done_is_told_although_it_fails_later(cli: Cli, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert cli("url", "--root", tmp_path / name).returncode == 0
    pidfile = pidfile_of(tmp_path / "two")
    told = pidfile.read_text()
    elsewhere = {"pid": 2**30, "port": 1, "url": "http://127.0.0.1:1"}
    pidfile.write_text(json.dumps({**json.loads(told), **elsewhere}))
    stopped = cli("stop", "--all")
    pidfile.write_text(told)
    assert (stopped.returncode, stopped.stdout.count("Stopped ")) == (1, 1), stopped
    assert cli("stop", "--all").stdout.count("Stopped ") == 1


def test_url_prints_nothing_but_the_url_from_cold(cli: Cli) -> None:
    assert is_refused(cli("url", "--no-start"), cli.folder)
    told = cli("url")
    assert (told.stdout, told.stderr) == (f"{service_of(cli.folder).url}\n", "")
    ours = json.loads(pidfile_of(cli.folder).read_text())
    pidfile_of(cli.folder).write_text(json.dumps({**ours, "of a later version": 1}))
    assert cli("url", "--no-start").stdout == told.stdout


def test_start_and_env_print_the_settings_for_a_shell(cli: Cli, tmp_path: Path) -> None:
    root = tmp_path.resolve() / "it's $HOME"
    names = "METAFLOW_SERVICE_URL METAFLOW_DEFAULT_METADATA METAFLOW_DATASTORE_SYSROOT_LOCAL"
    shell = in_shell(cli, f'eval "$(PROGRAM)"; printenv {names}', "env", "--root", root)
    assert shell.stdout.splitlines() == [service_of(root).url, "service", str(root)]
    assert cli("start", "--root", root).stdout.endswith(cli("env", "--root", root).stdout)


def test_the_demo_reports_what_it_has_recorded(cli: Cli) -> None:
    ran = cli("demo", "here")
    assert (ran.returncode, "warning" in ran.stderr.lower()) == (0, False), ran.stderr
    assert (cli.folder / "here" / "demo_flow.py").exists()
    assert (cli.folder / "here" / ".metaflow" / "DemoFlow").exists()
    assert re.search(r"^Recorded as DemoFlow/[0-9]+: 9 tasks in the steps ", ran.stdout, re.M)


def test_another_port_is_refused_and_the_current_one_named(daemon: Api, cli: Cli) -> None:
    other = {"METAFLOW_LOCAL_SERVICE_PORT": str(1 + daemon.port % 60000)}
    for command in (["start"], ["url"], ["env"], ["run", "true"]):
        assert is_refused(cli(*command, **other), f"port {daemon.port}")
    assert cli("url", "--port", daemon.port, **other).returncode == 0
    for name in ("127.0.0.2", "localhost"):
        assert is_refused(cli("url", "--host", name), "runs already, on 127.0.0.1")
    assert cli("url", "--host", "127.0.0.1").stdout == f"{daemon.url}\n"


def test_another_idle_time_out_is_kept_and_named(daemon: Api, cli: Cli) -> None:
    for command in (["start"], ["url"], ["run", "true"]):
        ran = cli(command[0], "--idle-timeout", 7, *command[1:])
        assert (
            ran.returncode,
            ran.stderr.count("runs already, with an idle time-out of 300 s"),
        ) == (0, 1)
        same = cli(
            command[0], "--idle-timeout", 300, *command[1:], METAFLOW_LOCAL_SERVICE_IDLE_TIMEOUT="7"
        )
        assert (same.returncode, without_mention(same.stderr)) == (0, "")
    assert cli.status()["idle_timeout"] == 300


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "COMMAND"),
        ("dance", "dance"),
        ("run", "command"),
        ("start --port 65536", "65536"),
        ("start --idle-timeout nan", "nan"),
        ("runs --tag=", "not empty"),
        ("gc --yes --not-tag=", "not empty"),
    ],
)
def test_a_bad_command_line_is_reported_in_one_sentence(cli: Cli, words: str, said: str) -> None:
    assert is_refused(cli(*words.split()), said, code=2)
    assert all_paths(cli.folder) == []


@pytest.mark.parametrize("name", ["PORT", "IDLE_TIMEOUT"])
def test_a_bad_value_in_the_environment_is_reported_in_one_sentence(cli: Cli, name: str) -> None:
    variable = f"METAFLOW_LOCAL_SERVICE_{name}"
    assert is_refused(cli("start", **{variable: "many"}), variable, "many", code=2)
    assert all_paths(cli.folder) == []


@pytest.mark.parametrize("command", ["start", "status", "stop", "run true", "demo"])
def test_a_folder_that_is_gone_is_reported_in_one_sentence(cli: Cli, command: str) -> None:
    script = "mkdir gone && cd gone && rmdir ../gone && PROGRAM"
    code = 4 if command == "status" else 1  # as it cannot be told whether a service runs
    assert is_refused(in_shell(cli, script, *command.split()), "current folder", code=code)


def test_an_unknown_status_exits_with_4(daemon: Api, cli: Cli) -> None:
    written = pidfile_of(cli.folder).read_text()
    pidfile_of(cli.folder).write_text("{}")
    assert is_refused(cli("status"), "does not say", code=4)
    pidfile_of(cli.folder).write_text(written)  # so that it can be stopped
    assert cli("status").returncode == 0


# -- commands that only look -----------------------------------------------------------------------


def look(folder: Path, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Ask of what is recorded in a folder."""
    return Cli(folder, folder / "home")(*words, **environment)


def test_only_the_user_sees_the_key(cli: Cli, project: Path) -> None:
    key = {"METAFLOW_SERVICE_AUTH_KEY": "tell-nobody"}
    assert cli("start", METAFLOW_LOCAL_SERVICE_DEBUG="1", **key).returncode == 0
    service = cli.status()
    with contextlib.closing(Api(service["url"])) as client:
        assert client.get("/ping").status == 401
        assert client.get("/ping", **{"x-api-key": "tell-nobody"}).status == 200
        assert client.get("/ping", **{"x-api-key": "tell-nobody-else"}).status == 401
    pidfile = project / ".metaflow" / "metaflow-local-service.pid"
    assert pidfile.stat().st_mode & 0o777 == 0o600
    told = [Path(service["log"]).read_text(), json.dumps(service), cli("status").stdout]
    told.append(cli("start", "--port", 1, **key).stderr)
    told.append(cli("start", METAFLOW_SERVICE_AUTH_KEY="another").stderr)
    if shutil.which("ps"):
        ps = ["ps", "-ww", "-o", "args=", "-p", str(service["pid"])]
        told.append(subprocess.run(ps, capture_output=True, text=True).stdout)
    assert all(told)
    assert "tell-nobody" not in "".join(told)
    assert "export METAFLOW_SERVICE_AUTH_KEY=tell-nobody" in cli("env").stdout.splitlines()
    assert cli("run", "printenv", "METAFLOW_SERVICE_AUTH_KEY").stdout == "tell-nobody\n"


@pytest.mark.parametrize("command", [["start"], ["serve"], ["url"], ["run", "true"]])
def test_other_machines_are_not_let_in_without_a_key(
    cli: Cli, project: Path, command: list[str]
) -> None:
    refused = cli(command[0], "--host", "0.0.0.0", *command[1:])
    assert refused.returncode == 2
    assert "METAFLOW_SERVICE_AUTH_KEY" in refused.stderr
    assert all_paths(project) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device here")
@pytest.mark.parametrize("words", ["status", "--help", "url", "runs"])
def test_output_that_cannot_be_written_is_reported_in_one_sentence(cli: Cli, words: str) -> None:
    assert cli("start").returncode == 0
    with open("/dev/full", "w") as full:
        command = cli.command(*words.split())
        ran = subprocess.run(
            command, cwd=cli.folder, env=cli.environment, stdout=full, stderr=subprocess.PIPE
        )
    if words == "runs":  # there is none, and so nothing to be written
        assert ran.returncode == 0
    else:
        assert ran.returncode == 1
        assert ran.stderr.count(b"\n") == 1 and b"cannot be written" in ran.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8:strict"])
def test_output_that_cannot_be_encoded_is_as_in_paths(cli: Cli, encoding: str) -> None:
    folder = cli.folder / "a→b"
    folder.mkdir()
    started = cli("start", cwd=folder, PYTHONIOENCODING=encoding)
    assert (started.returncode, started.stdout.count("/a→b")) == (0, 2)
    assert cli("stop", cwd=folder, PYTHONIOENCODING=encoding).stdout.endswith("/a→b\n")


def test_commands_work_without_docstrings(cli: Cli) -> None:
    assert cli.execute([sys.executable, "-OO", MODULE, "status"]).returncode == mls.NOT_RUNNING
    listed = cli.execute([sys.executable, "-OO", MODULE, "--help"])
    assert (listed.returncode, "status" in listed.stdout) == (0, True)


@pytest.mark.parametrize("words", ["status", "du"])
def test_a_command_whose_reader_has_gone_says_nothing(cli: Cli, words: str) -> None:
    (cli.folder / ".metaflow").mkdir()
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as pipe:
        ran = subprocess.run(
            cli.command(words),
            cwd=cli.folder,
            env=cli.environment,
            stdout=pipe,
            stderr=subprocess.PIPE,
        )
    assert (ran.returncode, ran.stderr) == (1, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device here")
def test_what_is_said_of_a_command_may_be_unwritable(cli: Cli) -> None:
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            cli.command("run", "echo", "done"),
            cwd=cli.folder,
            env=cli.environment,
            stdout=subprocess.PIPE,
            stderr=full,
        )
    assert (run.returncode, run.stdout) == (0, b"done\n")


def test_an_error_is_one_line_whatever_it_names(cli: Cli) -> None:
    assert is_refused(cli("runs", "--root", "/no\nfolder\x1b[31m"), r"/no\nfolder\x1b[31m")


def look_as_json(folder: Path, *words: object) -> list[Any]:
    """The JSON that a command prints, line by line."""
    told = look(folder, *words, "--json")
    assert (told.returncode, told.stderr) == (0, ""), told
    return [json.loads(line) for line in told.stdout.splitlines()]


READING_COMMANDS = ("runs", "show", "logs", "artifact", "card")


@pytest.mark.parametrize("recorder", RECORDED)
def test_commands_api_and_model_give_the_same_cause(
    failures: Callable[[str], Path], recorder: str
) -> None:
    folder = failures(recorder)
    listed = {run["tags"][0]: run for run in look_as_json(folder, "runs")}
    assert listed.keys() - {"fine"} == set(RECORDED[recorder])
    table = look(folder, "runs").stdout
    own_store = mls.Store(str(folder))
    with serve_ui(own_store) as client:
        for how in RECORDED[recorder]:
            row = listed[how]
            if row["status"] == "running":  # it fell silent, which takes a while to be sure of
                assert CAUSES[how].kind == "scheduler gone"
                continue
            path = f"/api/flows/CausesFlow/runs/{row['run']}"
            assert client.get(path).json["data"]["cause"] == row["cause"]
            (shown,) = look_as_json(folder, "show", f"CausesFlow/{row['run']}")
            assert shown["cause"] == row["cause"]
            assert row["cause"]["summary"] in table
            text = look(folder, "show", row["run"]).stdout
            assert f"cause  {row['cause']['summary']}" in text


def test_two_commands_find_the_line_that_a_run_failed_in(
    failures: Callable[[str], Path],
) -> None:
    folder = failures("local")
    failed = look(folder, "runs", "CausesFlow", "--status", "failed", "--tag", "join").stdout
    (pathspec,) = re.findall(r"CausesFlow/\d+", failed)
    shown = look(folder, "show", pathspec).stdout
    line = CAUSES_FLOW.splitlines().index(
        '                raise RuntimeError("two\\nlines") from error  # join'
    )
    for text in (
        "RuntimeError",
        "two\\nlines",
        f"causes.py:{line + 1}",
        "attempt    0 (from 0) of 1",
    ):
        assert text in shown, shown


def test_two_to_five_runs_are_compared_by_a_command(recorded: Path) -> None:
    if not can_name_the_last_step():
        pytest.skip("this Metaflow cannot run CustomFlow")
    runs = ["ZooFlow/latest", "CustomFlow/latest"]
    (compared,) = look_as_json(recorded, "compare", *runs)
    difference = {"section": "parameters", "name": "size", "values": [3, None]}
    assert difference in compared["differences"]
    assert re.search("^parameters size +3", look(recorded, "compare", *runs).stdout, re.M)
    refused = look(recorded, "compare", *runs * 3)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.endswith("At most 5 runs are compared.\n")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--status completed", {"fine"}),
        ("--status failed --tag kill", {"kill"}),
        ("--tag user:tester --tag timeout", {"timeout"}),
        ("--user nobody", set()),
        ("CausesFlow --user tester --since 9w", {"fine", *CAUSES}),
        ("--since 0s", set()),
        ("--since 2999-01-01", set()),
    ],
)
def test_runs_are_filtered(
    failures: Callable[[str], Path], options: str, expected: set[str]
) -> None:
    runs = look_as_json(failures("local"), "runs", *options.split())
    assert {run["tags"][0] for run in runs} == expected
    assert [run["ts_epoch"] for run in runs] == sorted((r["ts_epoch"] for r in runs), reverse=True)


def test_a_limit_is_mentioned_and_can_be_lifted(failures: Callable[[str], Path]) -> None:
    limited = look(failures("local"), "runs", "--limit", 2)
    assert (len(limited.stdout.splitlines()), "--limit 0" in limited.stderr) == (3, True)
    whole = look(failures("local"), "runs", "--limit", 0)
    assert (len(whole.stdout.splitlines()), whole.stderr) == (len(CAUSES) + 2, "")


def test_a_run_a_step_and_a_task_are_shown(failures: Callable[[str], Path]) -> None:
    folder = failures("local")
    run = run_tagged(model_much_later(folder), "fine")["run"]
    shown = look(folder, "show", run).stdout
    for pattern in (r"/\d+  completed\n", r"speed  7\n", r"each .*  3 completed\n"):
        assert re.search(pattern, shown), shown
    shown = look(folder, "show", f"{run}/retried").stdout
    assert re.search(r"0 +failed .*ValueError: attempt 0", shown), shown
    assert re.search(r"1 +completed", shown), shown
    (step,) = look_as_json(folder, "show", f"{run}/each")
    assert [task["status"] for task in step["tasks"]] == ["completed"] * 3
    task_id = step["tasks"][0]["task_id"]
    shown = look(folder, "show", f"{run}/each/{task_id}").stdout
    for text in ("letters", "['a', 'b', 'c']", "ds-type", "local"):
        assert text in shown, shown
    (task,) = look_as_json(folder, "show", f"{run}/each/{task_id}")
    assert {"letters", "speed"} <= {row["name"] for row in task["artifacts"]}


def test_a_part_of_a_pathspec_is_enough(failures: Callable[[str], Path]) -> None:
    model = mls.Model(mls.Store(str(failures("local"))))
    runs = [mls.run_row_ids(row) for row in model.runs.newest_first()]
    newest, fine = runs[0], mls.run_row_ids(run_tagged(model, "fine"))
    unique = next(n for n in range(1, 17) if sum(r[1][:n] == fine[1][:n] for r in runs) == 1)
    beginning = fine[1][:unique]
    task = model.store.task_ids((*fine, "start"))[0]
    failed = next(r for r in runs if (model.runs.get(r) or {})["status"] == "failed")
    for pathspec, ids in {
        None: newest,
        "CausesFlow": newest,
        "latest": newest,
        "CausesFlow/latest": newest,
        "CausesFlow/latest-failed": failed,
        "/".join(fine): fine,
        beginning: fine,
        f"CausesFlow/{beginning}/end": (*fine, "end"),
        "start": (*newest, "start"),
        "CausesFlow/start": (*newest, "start"),
        f"{beginning}/start/{task[3]}": task,
        f"CausesFlow/{fine[1]}/start/{task[3]}/letters": (*task, "letters"),
    }.items():
        assert mls.resolve_pathspec(model, pathspec) == ids, pathspec


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("show NoFlow", 1, "NoFlow"),
        ("show CausesFlow/12", 1, "12"),
        ("show start/999", 1, "999"),
        ("show ../x", 1, "'..'"),
        ("show 1", 2, " or "),
        ("show a//b", 2, "a//b"),
        ("show a/b/c/d/e/f", 2, "pathspec"),
        ("logs latest/start/999/x/y/z", 2, "pathspec"),
        ("artifact CausesFlow", 2, "name a task"),
        ("artifact {fine}/start/nothing", 1, "nothing"),
        ("artifact {fine}/each", 2, " or "),
        ("logs {fine}/{start} --attempt 7", 1, "attempt 7"),
        ("card {fine}/start", 1, "card"),
        ("runs NoFlow", 1, "NoFlow"),
        ("runs CausesFlow/latest", 1, "CausesFlow/latest"),
        ("runs ..", 1, "'..'"),
        ("rm ..", 1, "'..'"),
        ("gc --flow ..", 1, "'..'"),
        ("runs --since yesterday", 2, "yesterday"),
        ("runs --status odd", 2, "odd"),
    ],
)
def test_a_missing_or_ambiguous_pathspec_is_reported(
    failures: Callable[[str], Path], words: str, code: int, said: str
) -> None:
    folder = failures("local")
    model = model_much_later(folder)
    run = mls.run_row_ids(run_tagged(model, "fine"))
    start = "/".join(model.store.task_ids((*run, "start"))[0][2:])
    told = look(folder, *words.format(fine="/".join(run), start=start).split())
    assert is_refused(told, said, code=code)


@pytest.mark.parametrize("command", READING_COMMANDS)
def test_a_folder_without_records_is_reported_in_one_sentence(cli: Cli, command: str) -> None:
    assert is_refused(cli(command), "Nothing is recorded", cli.folder)
    assert all_paths(cli.folder) == []


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("runs", 1),
        ("show", 1),
        ("du", 1),
        ("rm a/1", 1),
        ("run true", 1),
        ("url", 1),
        ("stop", 1),
        ("status", 4),
    ],
)
def test_a_folder_that_may_not_be_read_is_reported_in_one_sentence(
    cli: Cli, words: str, code: int
) -> None:
    (cli.folder / ".metaflow").mkdir(mode=0)
    unprivileged = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    if os.geteuid() == 0 and not shutil.which(unprivileged[0]):
        pytest.skip("root may read everything, and there is no setpriv")
    prefix = unprivileged if os.geteuid() == 0 else []
    told = cli.execute([*prefix, *cli.command(*words.split())])
    assert is_refused(told, "Permission denied", cli.folder, code=code)


@pytest.mark.parametrize("command", READING_COMMANDS)
def test_reading_commands_need_neither_metaflow_nor_a_service(
    failures: Callable[[str], Path], command: str
) -> None:
    folder = failures("local")
    before = all_paths(folder)
    run = run_tagged(model_much_later(folder), "fine")["run"]
    words = {"runs": [], "logs": [run]}.get(command, [f"{run}/caught"])
    told = Cli(folder, folder / "home").execute(
        [sys.executable, "-S", MODULE, command, *words, "--json"]  # -S: without site-packages
    )
    assert (told.returncode, told.stderr) == (0, "") and told.stdout
    assert all_paths(folder) == before


def test_logs_of_a_run_name_their_tasks(failures: Callable[[str], Path]) -> None:
    folder = failures("local")
    run = run_tagged(model_much_later(folder), "fine")["run"]
    lines = look(folder, "logs", run).stdout.splitlines()
    assert all(re.match(r"\[(start|retried|caught)/\d+\] ", line + " ") for line in lines), lines
    assert sum("on stdout" in line for line in lines) == 1
    start = look(folder, "logs", f"{run}/start/1", "--stderr")
    assert start.stdout == "it is about to happen\n"
    out = look(folder, "logs", f"{run}/start/1", "--stdout").stdout
    assert out == "on stdout\n"
    first = look_as_json(folder, "logs", f"{run}/retried", "--attempt", 0, "-n", 4)
    assert len(first) == 4
    assert {line["attempt_id"] for line in first} == {0}
    assert any("ValueError: attempt 0" in line["line"] for line in first)


def test_logs_are_followed_until_the_run_has_ended(cli: Cli) -> None:
    (cli.folder / "causes.py").write_text(CAUSES_FLOW)
    (cli.folder / ".metaflow").mkdir()
    environment = {**cli.environment, "HOW": "foreach", "METAFLOW_DEFAULT_METADATA": "local"}
    with subprocess.Popen(
        [sys.executable, "causes.py", "run"],
        cwd=cli.folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ):
        assert eventually(lambda: list(cli.folder.glob(".metaflow/CausesFlow/*/start")), 60)
        followed = cli("logs", "CausesFlow", "-f").stdout.splitlines()
    assert sum("it is about to happen" in line for line in followed) == 1
    assert any(re.match(r"\[each/\d+\] .*Expecting value", line) for line in followed), followed


def test_an_artifact_is_text_json_or_the_bytes_that_are_stored(
    failures: Callable[[str], Path],
) -> None:
    folder = failures("local")
    start = f"{run_tagged(model_much_later(folder), 'fine')['run']}/start/1"
    assert look(folder, "artifact", f"{start}/letters").stdout == "['a', 'b', 'c']\n"
    (letters,) = look_as_json(folder, "artifact", f"{start}/letters")
    assert (letters["name"], letters["value"]) == ("letters", ["a", "b", "c"])
    assert {row["name"] for row in look_as_json(folder, "artifact", start)} >= {"letters", "speed"}
    program = Cli(folder, folder / "home")
    raw = subprocess.run(
        program.command("artifact", f"{start}/letters", "--raw"),
        cwd=folder,
        env=program.environment,
        capture_output=True,
        check=True,
    )
    assert pickle.loads(gzip.decompress(raw.stdout)) == ["a", "b", "c"]


def test_a_card_is_a_file_that_a_browser_opens(
    failures: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = failures("local")
    run = run_tagged(model_much_later(folder), "fine")["run"]
    (path,) = look(folder, "card", run).stdout.splitlines()
    assert Path(path).suffix == ".html" and "<html" in Path(path).read_text().lower()
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    browser.chmod(0o755)
    told = look(folder, "card", f"{run}/caught", "--open", BROWSER=f"{browser} %s")
    assert (told.returncode, told.stdout) == (0, path + "\n")
    assert (tmp_path / "opened").read_text() == f"file://{path}\n"


CARD_FLOW = """
from metaflow import FlowSpec, card, step

class CardFlow(FlowSpec):
    @card(type="blank")
    @step
    def start(self):
        self.next(self.end)

    @step
    def end(self):
        pass

if __name__ == "__main__":
    CardFlow()
"""


def test_cards_are_found_that_go_where_the_command_works_and_not_into_the_root(cli: Cli) -> None:
    """Metaflow's card store takes the nearest .metaflow above the working directory."""
    (cli.folder / "flow.py").write_text(CARD_FLOW)
    (cli.folder / ".metaflow").mkdir()
    elsewhere = cli.folder.parent / "elsewhere"
    elsewhere.mkdir()
    ran = cli("run", "--root", elsewhere, sys.executable, "flow.py", "run")
    assert ran.returncode == 0, ran.stderr
    (flow,) = (path.parent for path in cli.folder.parent.rglob(".metaflow/*/data"))
    assert flow == elsewhere / ".metaflow" / "CardFlow"
    assert [path.name for path in flow.iterdir() if path.name.isdigit()]
    told = cli("card", "CardFlow/latest/start", "--root", elsewhere)
    assert told.returncode == 0, told.stderr
    assert Path(told.stdout.strip()).is_file()
    shutil.rmtree(cli.folder / ".metaflow" / "mf.cards", ignore_errors=True)
    gone = cli("card", "CardFlow/latest/start", "--root", elsewhere)
    if not (elsewhere / ".metaflow" / "mf.cards").exists():  # Metaflow may come to heed the root
        # The oldest Metaflow does not record cards.
        is_recorded = any('"card-info"' in file.read_text() for file in flow.rglob("sysmeta_*"))
        assert (gone.returncode, "1 recorded" in gone.stderr) == (1, is_recorded)


@contextlib.contextmanager
def terminal(width: int) -> Iterator[tuple[int, Callable[[], str]]]:
    """The descriptor of a terminal, and what was written to it so far."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    attributes = termios.tcgetattr(theirs)
    attributes[1] &= ~termios.OPOST  # a line ends as it was written
    termios.tcsetattr(theirs, termios.TCSANOW, attributes)

    def written() -> str:
        content = b""
        while select.select([ours], [], [], 0)[0]:
            content += os.read(ours, 65536)
        return content.decode()

    try:
        yield theirs, written
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize(("variables", "is_colored"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_a_table_fits_the_terminal_and_cuts_no_id(
    failures: Callable[[str], Path], variables: Mapping[str, str], is_colored: bool
) -> None:
    folder = failures("local")
    program = Cli(folder, folder / "home")
    with terminal(100) as (descriptor, written):
        subprocess.run(
            program.command("runs"),
            cwd=folder,
            env={**program.environment, "TERM": "xterm", **variables},
            stdout=descriptor,
            check=True,
        )
        text = written()
    assert ("\x1b[31mfailed\x1b[0m" in text) == is_colored
    lines = re.sub(r"\x1b\[\d*m", "", text).splitlines()
    assert max(map(len, lines)) <= 100
    assert len([line for line in lines if re.search(r"  CausesFlow/\d{16}  ", line)]) > len(CAUSES)
    assert any(re.search(r"\S\.\.\S", line) for line in lines)


def test_a_terminal_of_20_columns_cuts_values_but_no_pathspec(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mls, "terminal_width", lambda: 20)
    facts = {"message": "it has failed for good", "task": "Flow/1795448419531000/train/7"}
    mls.print_facts(facts.items(), whole=("task",))
    assert capsys.readouterr().out.splitlines() == [
        "message  it ha..good",
        "task     Flow/1795448419531000/train/7",
    ]


def test_output_of_a_flow_sends_no_escape_sequence(failures: Callable[[str], Path]) -> None:
    folder = failures("local")
    for how in ("foreach", "kill"):
        run = run_tagged(model_much_later(folder), how)["run"]
        for command in ("show", "logs"):
            told = look(folder, command, run).stdout
            assert told and not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", told)


@given(st.text())
def test_printable_text_is_one_line_without_control_characters(text: str) -> None:
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", mls.printable(text))


@given(st.text(), st.integers(8, 60))
def test_a_text_is_shortened_to_the_available_width(text: str, width: int) -> None:
    plain = mls.printable(text)
    short = mls.shorten(plain, width)
    assert mls.text_width(short) <= width
    assert short == plain or ".." in short


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (None, "-"),
        (1, "0.0s"),
        (59_949, "59.9s"),
        (65_000, "1m 05s"),
        (7_380_000, "2h 03m"),
        (93_600_000, "1d 2h"),
    ],
)
def test_a_duration_is_formatted_in_its_largest_units(milliseconds: int | None, text: str) -> None:
    assert mls.format_duration(milliseconds) == text


@pytest.mark.parametrize(("seconds", "is_told"), [(0, True), (100, False)])
def test_progress_is_shown_on_a_terminal_after_a_while(
    monkeypatch: pytest.MonkeyPatch, seconds: float, is_told: bool
) -> None:
    said = io.StringIO()
    monkeypatch.setattr(said, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setattr(mls, "PROGRESS_SECONDS", seconds)
    monkeypatch.setattr(mls, "PROGRESS_RATE", 1_000_000)
    assert list(mls.track("abc", "letters read", 3)) == ["a", "b", "c"]
    assert ("2 of 3 letters read" in said.getvalue()) == is_told
    assert said.getvalue()[-4:] == ("\r\x1b[K" if is_told else "")


def test_progress_is_not_shown_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mls, "PROGRESS_SECONDS", 0)
    assert list(mls.track("abc", "letters read", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_run_names_the_command_that_shows_what_it_does(daemon: Api, cli: Cli) -> None:
    assert "`metaflow-local-service show`" in cli("run", "true").stderr


def test_the_help_of_every_subcommand_has_an_example(cli: Cli) -> None:
    listed = re.findall(r"^ +([a-z]+) +[A-Z]", cli("--help").stdout, re.MULTILINE)
    assert set(listed) >= {"run", "start", "serve", "status", "url", "env", "stop", "demo"}
    for name in listed:
        told = cli(name, "--help").stdout
        assert f"metaflow-local-service {name}" in told.partition("\nExample: ")[2]


# -- du, rm and gc ---------------------------------------------------------------------------------


@pytest.fixture
def runs_to_delete(cli: Cli, store: mls.Store, api: Api) -> list[mls.Ids]:
    """Runs of two flows, oldest first, in the project of `cli`, and a blob of nobody's."""
    tagged = create_ended_run(api, tags=["keep"], system_tags=["user:me"])
    runs = [tagged, create_ended_run(api), create_ended_run(api), create_ended_run(api, "Other")]
    path = blob_path(store, store_value(store, "value")["sha"])
    os.utime(path, (1, 1))
    return runs


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ((), []),
        (("--flow", "Flow/"), []),
        (("--keep-last", "0"), [0, 1, 2, 3]),
        (("--keep-last", "1"), [0, 1]),
        (("--keep-last", "0", "--flow", "Other"), [3]),
        (("--status", "failed"), []),
        (("--status", "completed", "--tag", "keep", "--tag", "user:me"), [0]),
        (("--status", "completed", "--not-tag", "keep", "--flow", "Flow"), [1, 2]),
        (("--not-tag", "user:me", "--keep-last", "2"), []),
        (("--older-than", "1d"), []),
        (("--older-than", "0s"), [0, 1, 2, 3]),
    ],
)
def test_gc_deletes_the_runs_for_which_all_conditions_hold(
    cli: Cli, runs_to_delete: list[mls.Ids], conditions: Sequence[str], expected: list[int]
) -> None:
    told = json.loads(cli("gc", "--dry-run", "--json", *conditions).stdout)
    named = {(each["flow_id"], each["run"]) for each in told["runs"]}
    assert named == {runs_to_delete[number] for number in expected}
    assert told["dry_run"] is True and told["kept"] == []
    is_swept = "Other" not in conditions
    assert told["unreferenced"]["files"] == is_swept
    assert told["files"] == sum(each["files"] for each in told["runs"]) + is_swept


def test_gc_deletes_what_its_dry_run_lists(cli: Cli, runs_to_delete: list[mls.Ids]) -> None:
    before = all_paths(cli.folder)
    refused = cli("gc", "--keep-last", "1")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "takes --yes" in refused.stderr and "2 runs" in refused.stdout
    closed = in_shell(cli, "PROGRAM <&-", "gc", "--keep-last", "1")
    assert (closed.returncode, closed.stderr) == (2, refused.stderr)
    told = json.loads(cli("gc", "--keep-last", "1", "--dry-run", "--json").stdout)
    assert all_paths(cli.folder) == before
    done = json.loads(cli("gc", "--keep-last", "1", "--yes", "--json").stdout)
    assert {**told, "dry_run": False} == done
    assert cli("gc", "--yes").stdout == "To delete: nothing\n"


@pytest.mark.parametrize("bad", ["Flow/1", "Flow", "None/1", "Flow/latest/end", "", "a/b/c/d/e/f"])
def test_rm_deletes_all_that_are_named_or_nothing(
    cli: Cli, runs_to_delete: list[mls.Ids], bad: str
) -> None:
    names = ["/".join(run) for run in runs_to_delete]
    before = all_paths(cli.folder)
    refused = cli("rm", "--yes", names[0], bad)
    assert (refused.returncode in (1, 2), refused.stderr.count("\n")) == (True, 1)
    assert all_paths(cli.folder) == before
    done = cli("rm", "--yes", names[0], "Other/latest", names[0])
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "Deleted: 2 runs of" in done.stdout
    left = [json.loads(line)["run"] for line in cli("runs", "--json").stdout.splitlines()]
    assert left == [runs_to_delete[2][1], runs_to_delete[1][1]]


@pytest.mark.parametrize(("answer", "is_deleted"), [("y\n", True), ("\n", False), ("\x04", False)])
def test_rm_asks_on_a_terminal(
    cli: Cli, runs_to_delete: list[mls.Ids], answer: str, is_deleted: bool
) -> None:
    ours, theirs = pty.openpty()
    with open(ours, "r+b", buffering=0) as keyboard, open(theirs, "r+b", buffering=0) as screen:
        command = cli.command("rm", "Other/latest")
        process = subprocess.Popen(
            command,
            cwd=cli.folder,
            env=cli.environment,
            stdin=screen,
            stdout=subprocess.DEVNULL,
            stderr=screen,
        )
        keyboard.write(answer.encode())
        assert process.wait(timeout=60) == (0 if is_deleted else 1)
    assert Path(cli.folder, ".metaflow", *runs_to_delete[3]).exists() != is_deleted


def test_du_lists_flows_and_their_runs(cli: Cli, runs_to_delete: list[mls.Ids]) -> None:
    told = json.loads(cli("du", "--json").stdout)
    assert [(flow["flow_id"], flow["runs"]) for flow in told["flows"]] == [
        ("Flow", 3),
        ("Other", 1),
    ]
    assert told["unreferenced"]["files"] == 1 and told["runs"] == 4
    of_flow = json.loads(cli("du", "Flow", "--json").stdout)
    assert [run["run"] for run in of_flow["runs"]] == [run[1] for run in runs_to_delete[2::-1]]
    of_run = json.loads(cli("du", "Flow/latest", "--json").stdout)
    assert of_run == of_flow["runs"][0] and of_run["only"]["files"] == of_run["files"]
    assert [line.split()[0] for line in cli("du").stdout.splitlines()] == [
        "FLOW", "Flow", "Other", "all",
    ]  # fmt: skip
    missing = cli("du", "None")
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)


# ==================================================================================================
# The package
# ==================================================================================================

# What is built and installed is the command and the module.


def test_the_package_is_a_command_and_a_module(cli: Cli, tmp_path: Path) -> None:
    for needed in ("flit_core", "pip"):
        pytest.importorskip(needed)
    files = ("LICENSE", "README.md", "metaflow_local_service.py", "pyproject.toml")
    for name in files:
        shutil.copy(REPOSITORY / name, tmp_path)

    def built(kind: str) -> Path:
        program = f"from flit_core import buildapi; print(buildapi.build_{kind}('.'))"
        made = subprocess.check_output([sys.executable, "-c", program], cwd=tmp_path, text=True)
        return tmp_path / made.strip()

    with tarfile.open(built("sdist")) as archive:
        assert {Path(name).name for name in archive.getnames()} >= set(files)
    installed = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", installed, built("wheel")], check=True)
    assert [file.read_text() for file in installed.rglob("LICENSE")] == [text_of("LICENSE")]
    environment = {**cli.environment, "PYTHONPATH": str(installed)}
    for command in (f"{installed}/bin/metaflow-local-service", "python -m metaflow_local_service"):
        told = in_shell(cli, f"{command} --version", env=environment).stdout
        metaflows = importlib.metadata.version("metaflow")
        assert told == f"metaflow-local-service {mls.__version__} (Metaflow {metaflows})\n"


# ==================================================================================================
# The whole
# ==================================================================================================

# Everything together. Real flows are recorded once by local mode and by the service (`history`, the
# longest of all set-ups: about 30 tasks, 40 seconds), and Metaflow's client must answer alike over
# both. Then what only the whole can lose: records at a `kill -9`, flows whose service dies, clients
# by the dozen beside local mode, a worker on another machine.


# -- the flows -------------------------------------------------------------------------------------

ZOO = '''\
"""One of everything a flow on one machine can do, in as few tasks as will hold it."""

import sys
from collections import OrderedDict
from datetime import datetime, timedelta, timezone
from decimal import Decimal

from metaflow import FlowSpec, IncludeFile, JSONType, Parameter, Run
from metaflow import card, catch, current, retry, step
from metaflow.cards import Markdown, Table


class ZooFlow(FlowSpec):
    animal = Parameter("animal", help="Text, and not only ASCII", default="Löwe 🦁")
    visitors = Parameter("visitors", default=3)
    price = Parameter("price", default=12.5)
    open = Parameter("open", default=True)
    keepers = Parameter("keepers", type=JSONType, default='{"north": ["Ann", "Bo"]}')
    itself = IncludeFile("itself", default=__file__)

    @step
    def start(self):
        """Artifacts of every easy type, and a line on both streams."""
        self.nothing = None
        self.huge = 10**30
        self.infinite = float("inf")
        self.complex = 1 + 2j
        self.binary = b"\\x00\\xff"
        self.text = "naïve 漢字 🐘\\n\\ttab \\\\ \\" '"
        self.empty = ""
        self.nested = {"list": [1, [2.5, None]], "tuple": (True,), 3: {"set": {4}}}
        self.frozen = frozenset({"one"})
        self.ordered = OrderedDict(z=1, a=2)
        self.moment = datetime(2024, 2, 29, 12, 30, tzinfo=timezone(timedelta(hours=2)))
        self.money = Decimal("0.10")
        self.größe = "a name beyond ASCII"
        print("the zoo opens: 🐘")
        print("mind the gap: ⚠", file=sys.stderr)
        self.next(self.shy, self.broken)

    @retry(times=1, minutes_between_retries=0)
    @step
    def shy(self):
        """Fails the first time, and leaves an artifact that the second attempt does not have."""
        print("attempt", current.retry_count)
        if current.retry_count == 0:
            self.only_first = "gone after the retry"
            raise RuntimeError("the shy animal hides")
        self.shown = current.retry_count
        self.next(self.meet)

    @catch(var="trouble")
    @step
    def broken(self):
        """Fails for good, but the flow goes on."""
        self.before = "kept"
        if self.open:
            raise ValueError("the cage is broken: ☠")
        self.next(self.meet)

    @step
    def meet(self, inputs):
        """The join of the branches."""
        self.shown = inputs.shy.shown
        self.reason = str(inputs.broken.trouble)
        self.next(self.guide)

    @card(type="blank", id="map")
    @card(type="default", id="all")
    @step
    def guide(self):
        """Cards, and tags from inside the run."""
        self.tags_before = sorted(current.tags)
        Run("%s/%s" % (current.flow_name, current.run_id)).add_tags(["fed", "mit Umlaut: ü"])
        current.card["map"].append(Markdown("# The map of the zoo: 🗺"))
        current.card["map"].append(Table([["lion", 1], ["elephant", 2]], headers=["who", "cage"]))
        self.cages = ["lion", "elephant", "ibis"]
        self.next(self.visit, foreach="cages")

    @step
    def visit(self):
        print("cage", self.index, self.input)
        self.seen = (self.index, self.input)
        self.next(self.gather)

    @step
    def gather(self, inputs):
        self.seen = sorted(each.seen for each in inputs)
        self.merge_artifacts(inputs, include=["shown", "reason"])
        self.next(self.end)

    @step
    def end(self):
        print("the zoo closes", file=sys.stderr)


if __name__ == "__main__":
    ZooFlow()
'''

FAILING = '''\
"""A flow that fails in the middle until there is a file `mended` beside it."""

from pathlib import Path

import metaflow
from metaflow import FlowSpec, Parameter, step


class FailingFlow(FlowSpec):
    load = Parameter("load", default=7)
    if hasattr(metaflow, "Config"):  # since 2.13
        settings = metaflow.Config("settings", default_value='{"depth": 3}')

    @step
    def start(self):
        self.kept = self.load * 2
        self.next(self.middle)

    @step
    def middle(self):
        if not Path(__file__).with_name("mended").exists():
            raise RuntimeError("not mended yet")
        self.mended = True
        self.next(self.end)

    @step
    def end(self):
        self.total = self.kept + self.mended


if __name__ == "__main__":
    FailingFlow()
'''

GANG = '''\
"""Two tasks of one step that know of each other (`@parallel`)."""

from metaflow import FlowSpec, current, parallel, step


class ParallelFlow(FlowSpec):
    @step
    def start(self):
        self.next(self.train, num_parallel=2)

    @parallel
    @step
    def train(self):
        self.place = (current.parallel.node_index, current.parallel.num_nodes)
        self.next(self.collect)

    @step
    def collect(self, inputs):
        self.places = sorted(each.place for each in inputs)
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    ParallelFlow()
'''

FLOWS = {"ZooFlow": ZOO, "FailingFlow": FAILING, "ParallelFlow": GANG}


METADATA = ("local", "service")

ZOO_OPTIONS = ("--visitors", "5", "--tag", "zoo", "--tag", "zweiter tag: ß")

# What the first step of ZooFlow leaves behind, by name.
ZOO_ARTIFACTS = {
    "animal": "Löwe 🦁",
    "visitors": 5,
    "price": 12.5,
    "open": True,
    "keepers": {"north": ["Ann", "Bo"]},
    "itself": ZOO,
    "nothing": None,
    "huge": 10**30,
    "infinite": float("inf"),
    "complex": 1 + 2j,
    "binary": b"\x00\xff",
    "text": "naïve 漢字 🐘\n\ttab \\ \" '",
    "empty": "",
    "nested": {"list": [1, [2.5, None]], "tuple": (True,), 3: {"set": {4}}},
    "frozen": frozenset({"one"}),
    "ordered": OrderedDict(z=1, a=2),
    "moment": datetime(2024, 2, 29, 12, 30, tzinfo=timezone(timedelta(hours=2))),
    "money": Decimal("0.10"),
    "größe": "a name beyond ASCII",
}


# -- everything that Metaflow's client can be asked ------------------------------------------------

# What is told of each object: by its name (`Task('ZooFlow/17/start/1', attempt=0)`), then by the
# name of the property.
Answers = dict[str, dict[str, Any]]

COMMON_QUESTIONS = "created_at parent system_tags tags user_tags"

# The code package is asked for once a run: to open one takes as long as a hundred other questions.
QUESTIONS = {
    "Flow": "latest_run latest_successful_run",
    "Run": "code end_task finished finished_at origin_pathspec successful trigger",
    "Step": "control_task finished_at",
    "Task": """current_attempt exception finished finished_at index metadata_dict origin_pathspec
               runtime_name stderr stderr_size stdout stdout_size successful""",
    "DataArtifact": "finished_at sha",
}

# Not for `_parameters`, which is no step of the flow's graph; new in Metaflow 2.14.
RELATIVES = {
    "Step": "child_steps parent_steps",
    "Task": "child_tasks parent_tasks",
}


def walk_objects() -> Iterator[MetaflowObject]:
    """Each object that the client reaches from the top, and each attempt of each task."""
    from metaflow.client.core import Metaflow, Task

    for flow in Metaflow():
        yield flow
        for run in flow:
            yield run
            for step in [run["_parameters"], *run]:
                yield step
                for task in step:
                    for attempt in [None, *range(task.current_attempt + 1)]:
                        numbered = Task(task.pathspec, attempt=attempt)
                        yield numbered
                        yield from numbered


def answers_of(thing: MetaflowObject) -> dict[str, Any]:
    """All that an object tells of itself; what this version of Metaflow cannot tell is left out."""
    from metaflow.client.core import DataArtifact, Task

    kind = type(thing).__name__
    questions = f"{COMMON_QUESTIONS} {QUESTIONS[kind]}".split()
    if "/_parameters" not in thing.pathspec:
        questions += RELATIVES.get(kind, "").split()
    answers = {each: getattr(thing, each) for each in questions if hasattr(type(thing), each)}
    answers["record"] = common_part(thing._object)
    if isinstance(thing, DataArtifact):
        answers["data"] = repr(thing.data)
    if isinstance(thing, Task):
        entries = ([each.created_at, each.name, each.type, each.value] for each in thing.metadata)
        answers["metadata"] = sorted(entries, key=repr)
        answers["cards"] = cards_of(thing)
        for below in ("metadata", "artifact"):
            answers[f"{below} records"] = records_below(thing, below)
    return answers


def cards_of(task: Task) -> list[dict[str, Any]]:
    """The cards of a task, with the length of their pages."""
    from metaflow.plugins.cards import exception
    from metaflow.plugins.cards.card_client import get_cards

    try:
        cards = list(get_cards(task))
    except (exception.CardNotPresentException, exception.UnresolvableDatastoreException):
        return []
    described = [
        {"type": each.type, "id": each.id, "hash": each.hash, "length": len(each.get())}
        for each in cards
    ]
    return sorted(described, key=repr)


def records_below(task: Task, kind: str) -> list[dict[str, Any]]:
    """The provider's records of a task's metadata or artifacts, private ones included."""
    from metaflow.client.core import Metaflow

    provider = Metaflow().metadata
    records = provider.get_object("task", kind, None, task._attempt, *task.path_components)
    return sorted((common_part(each) for each in records), key=repr)


def common_part(record: dict[str, Any]) -> dict[str, Any]:
    """What a record says whichever provider is asked: the only place that forgives a difference.

    * Heartbeats, the verified user and the running number of metadata are the service's alone.
    * On the wire every record has every key; on disk a flow, for one, has no user and no tags.
    * Ids that are all digits are text on disk and numbers on the wire.
    * Tags are sets.
    """
    common = {}
    for key, value in record.items():
        if key in ("last_heartbeat_ts", "user", "id") or value in (None, []):
            continue
        if key in ("run_number", "task_id"):
            value = str(value)
        elif key in ("tags", "system_tags"):
            value = sorted(value)
        common[key] = value
    return common


def in_json(value: object) -> object:
    """Write down what JSON has no form for; what has no order gets one."""
    from metaflow.client.core import MetaflowCode
    from metaflow.exception import MetaflowNotFound

    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, Iterator):
        try:
            return sorted(value, key=repr)
        except MetaflowNotFound as error:  # A step that a failed run did not come to.
            return str(error)
    if isinstance(value, MetaflowCode):
        return {"path": value.path, "info": value.info, "flow": value.flowspec}
    return repr(value)


def print_answers() -> None:
    """Print the provider in use and all `Answers`, as JSON: the program of `Flows.walk`."""
    from metaflow.client.core import get_metadata, namespace

    namespace(None)
    answers = {repr(thing): answers_of(thing) for thing in walk_objects()}
    json.dump([get_metadata(), answers], sys.stdout, default=in_json)


def differences(one: Answers, other: Answers) -> list[str]:
    """A line for each question that two walks answer differently, or that only one was asked."""
    lines = [f"{thing} is told of by one only" for thing in sorted(one.keys() ^ other.keys())]
    for thing in sorted(one.keys() & other.keys()):
        for question in sorted(one[thing].keys() | other[thing].keys()):
            answers = (one[thing].get(question), other[thing].get(question))
            if answers[0] != answers[1]:
                ours, theirs = without_common(*answers)
                lines.append(f"{thing} {question}: {ours!r} != {theirs!r}")
    return lines


def without_common(one: Any, other: Any) -> tuple[Any, Any]:
    """Two different answers; of lists, which are long, only what the other has not."""
    if not (isinstance(one, list) and isinstance(other, list)):
        return one, other
    counts = Counter(map(repr, one)), Counter(map(repr, other))
    return list(counts[0] - counts[1]), list(counts[1] - counts[0])


# -- projects in which flows were recorded ---------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """A flow that was run to its end, good or bad."""

    run: str  # its path spec: "ZooFlow/1795502934607122"
    status: int
    output: str

    @property
    def id(self) -> str:
        return self.run.rpartition("/")[2]

    def lines_with(self, *words: str) -> list[str]:
        """The lines of the output that have one of these words."""
        # Metaflow 2.19 itself leaves a gzip file open, which Python 3.13 mentions: in any mode.
        output = re.sub(r"Exception ignored in: <gzip(.*\n)+?ValueError.*\n", "", self.output)
        return [line for line in output.splitlines() if any(word in line for word in words)]


class Flows:
    """A project with flows in it, and what its user types there.

    Wherever a `metadata` is asked for it is Metaflow's name of a provider: "local", which writes
    and reads the records by itself, or "service", which is the command under our `run`.
    """

    def __init__(self, cli: Cli) -> None:
        self.folder = cli.folder
        self._cli = cli
        for name, source in FLOWS.items():
            (cli.folder / f"{name}.py").write_text(source, encoding="utf-8")

    def under(
        self, metadata: str, *argv: object, cwd: Path | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command whose records are kept by `metadata`, in the project's folder."""
        # Newer versions of Metaflow can keep the code of a run that stays on this machine.
        env = {"METAFLOW_FEAT_ALWAYS_UPLOAD_CODE_PACKAGE": "1", **env}
        if metadata == "service":
            return self._cli("run", *argv, cwd=cwd, **env)
        return self._cli.execute(argv, cwd=cwd, METAFLOW_DEFAULT_METADATA=metadata, **env)

    def flow(self, metadata: str, name: str, *args: str, cwd: Path | None = None) -> Recorded:
        """Run or resume a flow: `flows.flow("local", "ZooFlow", "run", "--tag", "x")`."""
        script = self.folder / f"{name}.py"
        done = self.under(metadata, sys.executable, script, *args, cwd=cwd)
        output = done.stdout + done.stderr
        started = re.search(r"\(run-id (\w+)\)", output)
        assert started, output
        return Recorded(f"{name}/{started[1]}", done.returncode, output)

    def mend(self) -> None:
        """Let FailingFlow succeed from now on."""
        (self.folder / "mended").touch()

    def walk(self, metadata: str) -> Answers:
        """Ask a client for everything; in its own process, as Metaflow's provider is a global."""
        here = Path(__file__)
        program = f"import {here.stem} as tests; tests.print_answers()"
        done = self.under(metadata, sys.executable, "-c", program, PYTHONPATH=str(here.parent))
        assert done.returncode == 0, done.stderr
        answers: Answers
        provider, answers = json.loads(done.stdout)
        assert provider.startswith(f"{metadata}@")
        return answers


@dataclass(frozen=True)
class RunAnswers:
    """The answers of a walk that are about one run."""

    run: str
    answers: Answers

    def itself(self) -> dict[str, Any]:
        return self.answers[f"Run('{self.run}')"]

    def everything(self) -> Answers:
        return {name: each for name, each in self.answers.items() if self.run in name}

    def tasks(self, step: str, attempt: int | None = None) -> list[dict[str, Any]]:
        """What the tasks of a step tell, the oldest first."""
        suffix = ")" if attempt is None else f", attempt={attempt})"
        return self._of(rf"Task\('{self.run}/{step}/[^/]+'{re.escape(suffix)}")

    def data(self, step: str, name: str) -> list[str]:
        """The `repr` of an artifact in each of the tasks of a step that has it."""
        artifacts = self._of(rf"DataArtifact\('{self.run}/{step}/[^/]+/{name}'\)")
        return [each["data"] for each in artifacts]

    def _of(self, pattern: str) -> list[dict[str, Any]]:
        found = [each for name, each in self.answers.items() if re.fullmatch(pattern, name)]
        return sorted(found, key=lambda each: each["created_at"])


@dataclass(frozen=True)
class History:
    """A project in which both providers recorded, and what both tell of all of it."""

    folder: Path
    recorded: dict[str, Recorded]
    answers: dict[str, Answers]  # by the provider that was asked

    def told(self, flow: str, metadata: str) -> RunAnswers:
        """What a provider tells of one of the recorded flows."""
        return RunAnswers(self.recorded[flow].run, self.answers[metadata])


@pytest.fixture(scope="session")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    """One root in which both providers record at the same time, and resume each other's runs.

    Recorded once a session, also where tests run in parallel: some 40 tasks, in 40 seconds.
    """
    folder = session_folder(tmp_path_factory, "history")
    own_project, written = folder / "project", folder / "history.json"
    with recording(folder) as is_new:
        if is_new:
            own_project.mkdir()
            program = Cli(own_project, folder / "home")
            try:
                recordings, answers = record_history(Flows(program))
            finally:
                program("stop", "--all")
            rows = {name: astuple(each) for name, each in recordings.items()}
            written.write_text(json.dumps([rows, answers]))
    rows, answers = json.loads(written.read_text())
    return History(own_project, {name: Recorded(*row) for name, row in rows.items()}, answers)


def record_history(flows: Flows) -> tuple[dict[str, Recorded], dict[str, Answers]]:
    recordings: dict[str, Recorded] = {}

    with ThreadPoolExecutor() as pool:

        def record(**named: tuple[str, ...]) -> None:
            """Run flows at the same time, and keep them under the names given."""
            running = {name: pool.submit(flows.flow, *words) for name, words in named.items()}
            recordings.update({name: each.result() for name, each in running.items()})

        record(
            zoo_local=("local", "ZooFlow", "run", *ZOO_OPTIONS),
            zoo_service=("service", "ZooFlow", "run", *ZOO_OPTIONS),
            failed_local=("local", "FailingFlow", "run"),
            failed_service=("service", "FailingFlow", "run"),
        )
        flows.mend()
        resume = ("FailingFlow", "resume", "--origin-run-id")
        record(
            resumed_local=("local", *resume, recordings["failed_service"].id),
            resumed_service=("service", *resume, recordings["failed_local"].id),
            parallel=("service", "ParallelFlow", "run"),
        )
        answers = dict(zip(METADATA, pool.map(flows.walk, METADATA)))

    return recordings, answers


# -- the same answers both ways, whoever recorded --------------------------------------------------

recorded_and_read_by = pytest.mark.parametrize(
    ("recorder", "reader"), [(one, other) for one in METADATA for other in METADATA]
)


def test_local_mode_and_the_service_answer_everything_alike(history: History) -> None:
    assert differences(history.answers["local"], history.answers["service"]) == []


def test_a_run_leaves_the_same_objects_and_metadata_whoever_records(history: History) -> None:
    def outline(flow: str, metadata: str) -> Counter[str]:
        """The names of all objects of a run and of their metadata, without the ids."""
        told = history.told(flow, metadata)
        lines = []
        for name, answers in told.everything().items():
            lines.append(name)
            lines += [f"{name} {kind}" for _, _, kind, _ in answers.get("metadata", ())]
        # Metaflow uploads the code in the background: the first tasks may not know of it yet.
        lines = [line for line in lines if not line.endswith(" code-package")]
        return Counter(re.sub(r"/\d+", "", line) for line in lines)

    assert outline("zoo_service", "service") == outline("zoo_local", "local")


@recorded_and_read_by
def test_a_run_reads_back_whole(history: History, recorder: str, reader: str) -> None:
    told = history.told(f"zoo_{recorder}", reader)
    assert told.itself()["successful"]
    assert told.itself()["finished_at"] == told.tasks("end")[0]["finished_at"]
    for name, value in ZOO_ARTIFACTS.items():
        assert told.data("start", name) == [repr(value)]
    (start,) = told.tasks("start")
    assert (start["stdout"], start["stderr"]) == ("the zoo opens: 🐘\n", "mind the gap: ⚠\n")
    assert sorted(told.data("visit", "seen")) == ["(0, 'lion')", "(1, 'elephant')", "(2, 'ibis')"]
    assert {each["index"] for each in told.tasks("visit")} == {0, 1, 2}
    assert told.data("end", "shown") == ["1"]


@recorded_and_read_by
def test_the_attempts_of_a_task_are_distinguished(
    history: History, recorder: str, reader: str
) -> None:
    told = history.told(f"zoo_{recorder}", reader)
    (latest,), (first,), (second,) = (told.tasks("shy", attempt) for attempt in (None, 0, 1))
    assert (first["stdout"], second["stdout"]) == ("attempt 0\n", "attempt 1\n")
    assert "the shy animal hides" in first["exception"]
    assert (first["successful"], second["successful"]) == (False, True)
    assert latest["current_attempt"] == 1
    assert (latest["successful"], latest["exception"]) == (True, None)
    assert told.data("shy", "shown") == ["1"]
    assert told.data("shy", "only_first") == []


@recorded_and_read_by
def test_an_exception_that_was_caught_is_an_artifact(
    history: History, recorder: str, reader: str
) -> None:
    told = history.told(f"zoo_{recorder}", reader)
    (broken,) = told.tasks("broken")
    assert (broken["finished"], broken["successful"]) == (True, False)
    assert "the cage is broken: ☠" in told.data("broken", "trouble")[0]


@recorded_and_read_by
def test_cards_are_found(history: History, recorder: str, reader: str) -> None:
    (guide,) = history.told(f"zoo_{recorder}", reader).tasks("guide")
    assert [(each["type"], each["id"]) for each in guide["cards"]] == [
        ("blank", "map"),
        ("default", "all"),
    ]
    assert all(each["length"] > 1000 for each in guide["cards"])


@recorded_and_read_by
def test_tags_from_the_start_and_from_inside_are_on_all_of_a_run(
    history: History, recorder: str, reader: str
) -> None:
    told = history.told(f"zoo_{recorder}", reader)
    tags = ["fed", "mit Umlaut: ü", "zoo", "zweiter tag: ß"]
    assert told.itself()["user_tags"] == tags
    assert "user:tester" in told.itself()["system_tags"]
    assert {tuple(each["user_tags"]) for each in told.tasks("visit")} == {tuple(tags)}
    assert told.data("guide", "tags_before") == [repr(["zoo", "zweiter tag: ß"])]


@pytest.mark.parametrize("resumer", METADATA)
def test_a_failed_run_of_the_other_recorder_is_resumed(history: History, resumer: str) -> None:
    (failer,) = set(METADATA) - {resumer}
    failed = history.told(f"failed_{failer}", resumer)
    assert history.recorded[f"failed_{failer}"].status == 1
    assert (failed.itself()["finished"], failed.itself()["successful"]) == (False, False)
    assert "not mended yet" in failed.tasks("middle")[0]["exception"]

    resumed = history.told(f"resumed_{resumer}", resumer)
    assert history.recorded[f"resumed_{resumer}"].status == 0
    assert resumed.itself()["successful"]
    assert resumed.itself()["origin_pathspec"] == failed.run
    assert resumed.data("start", "kept") == failed.data("start", "kept") == ["14"]
    assert resumed.data("end", "total") == ["15"]


# -- flows under the service -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flow", "status"),
    [
        ("zoo_service", 0),
        ("failed_service", 1),
        ("resumed_service", 0),
        ("parallel", 0),
    ],
)
def test_flows_run_at_the_same_time_without_a_word_of_the_service(
    history: History, flow: str, status: int
) -> None:
    flow_run = history.recorded[flow]
    assert flow_run.status == status
    assert flow_run.lines_with("HeartBeat", "Metaflow service", "Metadata request") == []


@pytest.mark.parametrize("flow", ["resumed_service", "parallel"])
def test_a_flow_in_good_health_has_no_complaints(history: History, flow: str) -> None:
    assert history.recorded[flow].lines_with("Traceback", "Error", "arning", "failed") == []


def test_parallel_tasks_know_their_places(history: History) -> None:
    told = history.told("parallel", "service")
    assert len(told.tasks("train")) == 2
    assert told.data("collect", "places") == [repr([(0, 2), (1, 2)])]


def test_a_resumed_run_shows_the_tasks_that_it_took_over_as_completed(history: History) -> None:
    model = mls.Model(mls.Store(str(history.folder)))
    ids = tuple(history.recorded["resumed_service"].run.split("/"))
    run = model.runs.get(ids)
    assert run and run["status"] == "completed"
    assert {(t["step_name"], t["status"]) for t in model.attempts.of_run(ids, model.clock())} == {
        (name, "completed") for name in ("_parameters", "start", "middle", "end")
    }


@pytest.mark.parametrize("tagger", METADATA)
def test_tags_are_changed_from_the_command_line(history: History, cli: Cli, tagger: str) -> None:
    shutil.copytree(history.folder / ".metaflow", cli.folder / ".metaflow")
    flows = Flows(cli)
    (recorder,) = set(METADATA) - {tagger}
    run = history.recorded[f"failed_{recorder}"]

    def tag(*words: str, by: str = tagger) -> str:
        argv = (sys.executable, "FailingFlow.py", "tag", *words, "--run-id", run.id)
        done = flows.under(by, *argv)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    tag("add", "first", "mit Umlaut: ü")
    tag("replace", "--remove", "first", "--add", "second")
    for reader in METADATA:
        listed = tag("list", "--flat", by=reader).split("\n")
        assert {"mit Umlaut: ü", "second"} <= set(listed)
        assert "first" not in listed


# -- nothing lost ----------------------------------------------------------------------------------

FLOW_OF_LOCAL_MODE = textwrap.dedent(
    """
    import os, time
    from metaflow import FlowSpec, step

    class Flow(FlowSpec):
        @step
        def start(self):
            open("is-running", "w").close()
            while not os.path.exists("go-on"):
                time.sleep(0.02)
            self.value = 42
            self.next(self.end)

        @step
        def end(self):
            pass

    if __name__ == "__main__":
        Flow()
    """
)


class RunningFlow:
    """A run of a real flow, which waits in its first step to be told to go on."""

    def __init__(self, cli: Cli, *prefix: str, **environment: str) -> None:
        self._folder = cli.folder
        (cli.folder / "flow.py").write_text(FLOW_OF_LOCAL_MODE)
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "flow.py", "run"],
            cwd=cli.folder,
            env={**cli.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __enter__(self) -> RunningFlow:
        has_begun = self._folder / "is-running"
        assert eventually(lambda: has_begun.exists() or self._process.poll() is not None, 60)
        assert has_begun.exists(), self._process.communicate()[0]
        return self

    def go_on(self) -> None:
        (self._folder / "go-on").touch()

    def __exit__(self, *_: object) -> None:
        self.go_on()
        self.output, _ = self._process.communicate(timeout=90)
        self.exit_code = self._process.returncode


def test_64_clients_at_once_lose_nothing(api: Api, cli: Cli, project: Path) -> None:
    run = api.new_run(api.new_flow())
    steps = [api.new_step(run, name) for name in ("start", "middle", "end")]

    def work(number: int) -> list[str]:
        tasks = []
        for step in steps:
            task = api.new_task(step)
            for field in ("a", "b"):
                rows = [metadatum(field, str(number)) for _ in range(2)]
                assert api.post(f"{task}/metadata", rows).json == {"metadata_created": 2}
            rows = [artifact(name) for name in ("x", "y", "z")]
            assert api.post(f"{task}/artifact", rows).json == {"artifacts_created": 3}
            tasks.append(task)
        api.close()
        return tasks

    with RunningFlow(cli, METAFLOW_DEFAULT_METADATA="local") as local_mode:
        with ThreadPoolExecutor(64) as pool:
            tasks = [task for made in pool.map(work, range(64)) for task in made]
        local_mode.go_on()
    assert local_mode.exit_code == 0, local_mode.output
    assert sorted(int(ids_in(task)[-1]) for task in tasks) == list(range(1, 3 * 64 + 1))
    metadata = api.get(f"{run}/metadata").json
    assert len(metadata) == len({datum["id"] for datum in metadata}) == len(tasks) * 4
    assert len(api.get(f"{run}/artifacts").json) == len(tasks) * 3
    assert len(api.get("/flows/Flow/runs").json) == 2
    for task in tasks:
        fields = [m["field_name"] for m in by_local_mode(project, "metadata", *ids_in(task))]
        assert sorted(fields) == ["a", "a", "b", "b"]
        names = [a["name"] for a in by_local_mode(project, "artifact", *ids_in(task))]
        assert sorted(names) == ["x", "y", "z"]


class Acknowledged:
    """What clients have been told is stored."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.tasks: list[str] = []
        self.rows: list[tuple[str, str, str]] = []  # the list that must have it, a key, its value
        self.heartbeats: dict[str, int] = {}
        self.tags: list[str] = []

    def keep_writing(self, api: Api, run: str) -> None:
        """Write to a run, and more, until the service is gone."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            for number in itertools.count():
                task = api.new_task(f"{run}/steps/start")
                self.tasks.append(task)
                rows = [metadatum(f"{name}-{number}") for name in "ab"]
                assert api.post(f"{task}/metadata", rows).status == 200
                self.rows += [(f"{task}/metadata", "field_name", r["field_name"]) for r in rows]
                rows = [artifact(f"{name}{number}") for name in "xy"]
                assert api.post(f"{task}/artifact", rows).status == 200
                self.rows += [(f"{task}/artifacts", "name", row["name"]) for row in rows]
                now = int(time.time())
                assert api.post(f"{task}/heartbeat").status == 200
                self.heartbeats[task] = now
                tag = f"{threading.get_ident()}-{time.time_ns()}"
                assert api.patch(f"{run}/tag/mutate", {"tags_to_add": [tag]}).status == 200
                self.tags.append(tag)
                self.runs.append(api.new_run("/flows/Flow"))
        api.close()

    def check(self, api: Api, project: Path, run: str) -> None:
        """Whether all of it is there, through the service and through local mode."""
        assert len(set(self.tasks)) == len(self.tasks)
        assert len(set(self.runs)) == len(self.runs)
        assert set(self.tags) <= set(api.get(run).json["tags"])
        assert {*self.runs} <= {
            f"/flows/Flow/runs/{r['run_number']}" for r in api.get("/flows/Flow/runs").json
        }
        local_runs = by_local_mode(project, "run", "Flow")
        assert {*self.runs} <= {f"/flows/Flow/runs/{r['run_number']}" for r in local_runs}
        (local_run,) = (r for r in local_runs if str(r["run_number"]) == ids_in(run)[-1])
        assert set(self.tags) <= set(local_run["tags"])
        for task in self.tasks:
            heartbeat = api.get(task).json["last_heartbeat_ts"]
            assert (heartbeat or 0) >= self.heartbeats.get(task, 0)
        for listing, rows in itertools.groupby(sorted(self.rows), lambda row: row[0]):
            task, _, kind = listing.rpartition("/")
            here = api.get(listing).json
            there = by_local_mode(project, kind.rstrip("s"), *ids_in(task))
            for _, key, value in rows:
                assert value in [row[key] for row in here]
                assert value in [row[key] for row in there]


@pytest.mark.skipif(not shutil.which("ps"), reason="there is no ps here")
def test_what_was_acknowledged_outlives_a_kill_at_any_moment(cli: Cli, project: Path) -> None:
    """As often as KILLS says; with -s, prints how much there was to lose."""
    kills, acknowledged = int(os.environ.get("KILLS", "2")), 0
    assert cli("start").returncode == 0
    service = cli.status()
    client = Api(service["url"])
    run = client.new_run(client.new_flow())
    client.new_step(run)
    everything = Acknowledged()
    for _ in range(kills):
        told = Acknowledged()
        with ThreadPoolExecutor(4) as pool:
            writers = [pool.submit(told.keep_writing, client, run) for _ in range(4)]
            try:
                time.sleep(random.uniform(0, 0.5))
            finally:  # nothing else would end the writers
                os.kill(service["pid"], signal.SIGKILL)
        for writer in writers:
            writer.result()
        assert eventually(lambda pid=service["pid"]: not is_running(pid))
        client.close()
        restarted = cli("start", "--port", service["port"])
        assert restarted.returncode == 0, restarted.stderr
        service = cli.status()
        told.check(client, project, run)
        everything.tasks += told.tasks
        everything.runs += told.runs
        everything.tags += told.tags
        acknowledged += sum(map(len, (told.tasks, told.runs, told.rows, told.tags)))
    everything.check(client, project, run)
    on_disk = len(read_json_files(project))  # each of which can be read
    client.close()
    assert cli("run", "true").returncode == 0
    print(f"{kills} kills, {acknowledged} acknowledged records, {on_disk} files")
    assert acknowledged > kills or kills < 5


def test_a_flow_survives_its_service(cli: Cli, daemon: Api) -> None:
    with RunningFlow(
        cli, METAFLOW_SERVICE_URL=daemon.url, METAFLOW_DEFAULT_METADATA="service"
    ) as flow:
        os.kill(cli.status()["pid"], signal.SIGKILL)
        flow.go_on()  # from here on the flow asks a service that is not there
        assert eventually(lambda: refuses_connections(daemon))
        daemon.close()
        restarted = cli("start", "--port", daemon.port)
        assert restarted.returncode == 0, restarted.stderr
    assert flow.exit_code == 0, flow.output
    (run,) = daemon.get("/flows/Flow/runs?status=completed").json
    steps = daemon.get(f"/flows/Flow/runs/{run['run_number']}/steps").json
    assert {step["step_name"] for step in steps} == {"_parameters", "start", "end"}


def test_a_time_zone_changes_nothing(cli: Cli) -> None:
    assert cli("start", TZ="Asia/Tokyo").returncode == 0
    with contextlib.closing(Api(cli.status()["url"])) as client:
        task = client.new_task_of_its_own()
        client.post(f"{task}/heartbeat")
        run = client.get(task.split("/steps/")[0]).json
        assert abs(run["ts_epoch"] / 1000 - time.time()) < 3000
        assert abs(run["last_heartbeat_ts"] - time.time()) < 3000
        assert abs(client.get(task).json["last_heartbeat_ts"] - time.time()) < 3000
        assert len(client.get("/flows/Flow/runs?status=running").json) == 1
        assert client.get("/flows/Flow/runs?status=failed").json == []


# -- another machine -------------------------------------------------------------------------------


@pytest.fixture
def other_machine() -> Iterator[tuple[list[str], str]]:
    """How to run a command where only a network leads here, and our address in that network."""
    name = f"mls{os.getpid()}"
    ours, theirs = (f"198.18.{os.getpid() // 64 % 256}.{os.getpid() % 64 * 4 + n}" for n in (1, 2))
    there = ["ip", "netns", "exec", name]

    def ip(*words: str) -> bool:
        return subprocess.run(["ip", *words], capture_output=True).returncode == 0

    if not shutil.which("ip") or not ip("netns", "add", name):
        pytest.skip("network namespaces cannot be made here (ip netns add)")
    try:
        for words in (
            ["link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name],
            ["addr", "add", f"{ours}/30", "dev", name],
            ["link", "set", name, "up"],
            ["-n", name, "addr", "add", f"{theirs}/30", "dev", "eth0"],
            ["-n", name, "link", "set", "eth0", "up"],
        ):
            if not ip(*words):
                pytest.skip(f"two network namespaces cannot be joined here (ip {' '.join(words)})")
        yield there, ours
    finally:
        ip("netns", "del", name)


def test_a_worker_on_another_machine_runs_its_tasks_with_the_key_and_not_without(
    cli: Cli, other_machine: tuple[list[str], str]
) -> None:
    there, address = other_machine
    assert cli("start", "--host", address, "--generate-key").returncode == 0
    url = cli.status()["url"]
    exports = [line.partition("=") for line in cli("env").stdout.splitlines()]
    told = {name.replace("export ", ""): value for name, _, value in exports}
    assert told["METAFLOW_SERVICE_URL"] == url == f"http://{address}:{urlsplit(url).port}"
    cli.folder.joinpath("go-on").touch()
    with RunningFlow(cli, *there, **told) as flow:
        pass
    assert flow.exit_code == 0, flow.output
    key = {"x-api-key": told["METAFLOW_SERVICE_AUTH_KEY"]}
    with contextlib.closing(Api(url)) as client:
        assert len(client.get("/flows/Flow/runs?status=completed", **key).json) == 1
        assert client.get("/flows").status == 401
    del told["METAFLOW_SERVICE_AUTH_KEY"]
    ask = "import sys, urllib.request as r; r.urlopen(sys.argv[1] + '/ping', timeout=20)"
    refused = subprocess.run(
        [*there, sys.executable, "-c", ask, url], capture_output=True, text=True, timeout=60
    )
    assert "HTTP Error 401" in refused.stderr
