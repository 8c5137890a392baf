"""What metaflow-local-service promises, layer by layer, in the order of the module.

Most tests talk HTTP to a real server over a real root: `api` is one in this process (a millisecond
to start), `daemon` is one that the command line started. Nothing outside a test's own temporary
folders is read or written, and no process outlives its test.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import pytest

MODULE = Path(__file__).with_name("metaflow_local_service.py")

structural = pytest.mark.structural

with contextlib.suppress(ImportError):  # the structural tests run without Metaflow
    import metaflow  # noqa: F401

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
def served(store: mls.Store, host: str = "127.0.0.1", key: str | None = None) -> Iterator[Api]:
    """Serve a store from this process."""
    server = mls.Server(host, 0, key)
    service = mls.MetadataService(store)
    thread = threading.Thread(target=server.serve, args=(service, lambda idle: True))
    thread.start()
    client = Api(server.url, key)
    try:
        yield client
    finally:
        client.close()
        server.stop()
        thread.join()
        server.finish()
        store.close()


@pytest.fixture
def api(store: mls.Store) -> Iterator[Api]:
    """A client of a service on an empty root, in this process."""
    with served(store) as client:
        yield client


class Cli:
    """The command line, as a user of a home of their own has it, in a folder."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder = folder
        self.home = home
        self.environment = {
            "PATH": os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"])),
            "HOME": str(home),
            "METAFLOW_HOME": str(home / "metaflowconfig"),
            "METAFLOW_LOCAL_SERVICE_HOME": str(home / "services"),
            "METAFLOW_USER": "tester",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def __call__(
        self, *arguments: object, cwd: Path | None = None, timeout: float = 120, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the program and wait for it."""
        return subprocess.run(
            self.command(*arguments),
            cwd=cwd or self.folder,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, str(MODULE), *map(str, arguments)]

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


@pytest.fixture
def cli(project: Path, tmp_path: Path) -> Iterator[Cli]:
    """The command line in an empty project; all services that it starts are stopped afterwards."""
    home = tmp_path / "home"
    home.mkdir()
    command_line = Cli(project, home)
    yield command_line
    stopped = command_line("stop", "--all")
    assert stopped.returncode == 0, stopped.stderr


@pytest.fixture
def daemon(cli: Cli) -> Iterator[Api]:
    """A client of the service that `start` has started in the project."""
    started = cli("start")
    assert started.returncode == 0, started.stderr
    client = Api(cli.status()["url"])
    yield client
    client.close()


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


# ==================================================================================================
# Settings
# ==================================================================================================


def test_the_root_is_the_nearest_folder_upwards_that_has_a_metaflow_folder(project: Path) -> None:
    (project / ".metaflow").mkdir()
    below = project / "a" / "b"
    below.mkdir(parents=True)
    assert mls.root_folder(None, {}, str(below)) == str(project)


def test_the_ping_says_the_version_that_clients_ask_for(api: Api) -> None:
    reply = api.get("/ping")
    assert (reply.status, reply.content) == (200, b"pong")
    assert reply.headers["metadata_service_version"] == "2.5.0"


def test_a_service_starts_and_stops(daemon: Api, cli: Cli) -> None:
    assert daemon.get("/ping").status == 200
    assert cli("stop").returncode == 0
    assert cli("status").returncode == 1
