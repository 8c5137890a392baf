"""What metaflow-local-service promises, layer by layer, in the order of the module.

Most tests talk HTTP to a real server over a real root: `api` is one in this process (a millisecond
to start), `daemon` is one that the command line started. Nothing outside a test's own temporary
folders is read or written, and no process outlives its test.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlsplit

import pytest

if TYPE_CHECKING:
    from metaflow.client.core import MetaflowObject, Task

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
    """The command line, as a user with a home of their own has it, in a folder."""

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
        self, *arguments: object, cwd: Path | None = None, timeout: float = 120, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the program and wait for it."""
        return self.execute(self.command(*arguments), cwd=cwd, timeout=timeout, **environment)

    def execute(
        self,
        command: Sequence[object],
        cwd: Path | None = None,
        timeout: float = 120,
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


@contextlib.contextmanager
def command_line(folder: Path) -> Iterator[Cli]:
    """A command line below a folder; all services that it starts are stopped afterwards."""
    (folder / "home").mkdir()
    (folder / "project").mkdir(exist_ok=True)
    cli = Cli(folder / "project", folder / "home")
    try:
        yield cli
    finally:
        stopped = cli("stop", "--all")
        assert stopped.returncode == 0, stopped.stderr


@pytest.fixture
def cli(project: Path) -> Iterator[Cli]:
    """The command line in an empty project."""
    with command_line(project.parent) as cli:
        yield cli


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


# ==================================================================================================
# Real flows, recorded and read by both modes
# ==================================================================================================

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

from metaflow import FlowSpec, Parameter, step


class FailingFlow(FlowSpec):
    load = Parameter("load", default=7)

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

WIDE = '''\
"""A foreach as wide as asked."""

from metaflow import FlowSpec, Parameter, step


class WideFlow(FlowSpec):
    width = Parameter("width", default=8)

    @step
    def start(self):
        self.numbers = list(range(self.width))
        self.next(self.square, foreach="numbers")

    @step
    def square(self):
        self.squared = self.input**2
        self.next(self.join)

    @step
    def join(self, inputs):
        self.squares = sorted(each.squared for each in inputs)
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    WideFlow()
'''

FLOWS = {"ZooFlow": ZOO, "FailingFlow": FAILING, "ParallelFlow": GANG, "WideFlow": WIDE}


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


def everything() -> Iterator[MetaflowObject]:
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
    answers = {repr(thing): answers_of(thing) for thing in everything()}
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


@pytest.fixture
def flows(cli: Cli) -> Flows:
    """A project of one test."""
    return Flows(cli)


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

    recorded: dict[str, Recorded]
    answers: dict[str, Answers]  # by the provider that was asked

    def told(self, flow: str, metadata: str) -> RunAnswers:
        """What a provider tells of one of the recorded flows."""
        return RunAnswers(self.recorded[flow].run, self.answers[metadata])


@pytest.fixture(scope="session")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[History]:
    """One root in which both providers record at the same time, and resume each other's runs."""
    with command_line(tmp_path_factory.mktemp("history").resolve()) as cli:
        yield recorded_history(Flows(cli))


def recorded_history(flows: Flows) -> History:
    recorded: dict[str, Recorded] = {}

    with ThreadPoolExecutor() as pool:

        def record(**named: tuple[str, ...]) -> None:
            """Run flows at the same time, and keep them under the names given."""
            running = {name: pool.submit(flows.flow, *words) for name, words in named.items()}
            recorded.update({name: each.result() for name, each in running.items()})

        record(
            zoo_local=("local", "ZooFlow", "run", *ZOO_OPTIONS),
            zoo_service=("service", "ZooFlow", "run", *ZOO_OPTIONS),
            failed_local=("local", "FailingFlow", "run"),
            failed_service=("service", "FailingFlow", "run"),
        )
        flows.mend()
        resume = ("FailingFlow", "resume", "--origin-run-id")
        record(
            resumed_local=("local", *resume, recorded["failed_service"].id),
            resumed_service=("service", *resume, recorded["failed_local"].id),
            parallel=("service", "ParallelFlow", "run"),
            wide=("service", "WideFlow", "run", "--max-workers", "8"),
        )
        answers = dict(zip(METADATA, pool.map(flows.walk, METADATA)))

    return History(recorded, answers)


# -- the same answers both ways, whoever recorded --------------------------------------------------

# The runs of `history` take a while: with pytest-xdist one worker does all that needs them.
together = pytest.mark.xdist_group("history")

recorded_and_read_by = pytest.mark.parametrize(
    ("recorder", "reader"), [(one, other) for one in METADATA for other in METADATA]
)


@together
def test_local_mode_and_the_service_answer_everything_alike(history: History) -> None:
    assert differences(history.answers["local"], history.answers["service"]) == []


@together
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


@together
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


@together
@recorded_and_read_by
def test_each_attempt_of_a_task_is_told_apart(history: History, recorder: str, reader: str) -> None:
    told = history.told(f"zoo_{recorder}", reader)
    (latest,), (first,), (second,) = (told.tasks("shy", attempt) for attempt in (None, 0, 1))
    assert (first["stdout"], second["stdout"]) == ("attempt 0\n", "attempt 1\n")
    assert "the shy animal hides" in first["exception"]
    assert (first["successful"], second["successful"]) == (False, True)
    assert latest["current_attempt"] == 1
    assert (latest["successful"], latest["exception"]) == (True, None)
    assert told.data("shy", "shown") == ["1"]
    assert told.data("shy", "only_first") == []


@together
@recorded_and_read_by
def test_an_exception_that_was_caught_is_an_artifact(
    history: History, recorder: str, reader: str
) -> None:
    told = history.told(f"zoo_{recorder}", reader)
    (broken,) = told.tasks("broken")
    assert (broken["finished"], broken["successful"]) == (True, False)
    assert "the cage is broken: ☠" in told.data("broken", "trouble")[0]


@together
@recorded_and_read_by
def test_cards_are_found(history: History, recorder: str, reader: str) -> None:
    (guide,) = history.told(f"zoo_{recorder}", reader).tasks("guide")
    assert [(each["type"], each["id"]) for each in guide["cards"]] == [
        ("blank", "map"),
        ("default", "all"),
    ]
    assert all(each["length"] > 1000 for each in guide["cards"])


@together
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


@together
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


@together
@pytest.mark.parametrize(
    ("flow", "status"),
    [
        ("zoo_service", 0),
        ("failed_service", 1),
        ("resumed_service", 0),
        ("parallel", 0),
        ("wide", 0),
    ],
)
def test_flows_run_at_the_same_time_without_a_word_of_the_service(
    history: History, flow: str, status: int
) -> None:
    recorded = history.recorded[flow]
    assert recorded.status == status
    assert recorded.lines_with("HeartBeat", "Metaflow service", "Metadata request") == []


@together
@pytest.mark.parametrize("flow", ["resumed_service", "parallel", "wide"])
def test_a_flow_in_good_health_has_no_complaints(history: History, flow: str) -> None:
    assert history.recorded[flow].lines_with("Traceback", "Error", "arning", "failed") == []


@together
def test_a_wide_foreach_with_many_workers_keeps_every_task(history: History) -> None:
    told = history.told("wide", "service")
    assert sorted(each["index"] for each in told.tasks("square")) == list(range(8))
    assert told.data("join", "squares") == [repr([number**2 for number in range(8)])]


@together
def test_parallel_tasks_know_their_places(history: History) -> None:
    told = history.told("parallel", "service")
    assert len(told.tasks("train")) == 2
    assert told.data("collect", "places") == [repr([(0, 2), (1, 2)])]


@pytest.mark.parametrize("tagger", METADATA)
def test_tags_are_changed_from_the_command_line(flows: Flows, tagger: str) -> None:
    (recorder,) = set(METADATA) - {tagger}
    run = flows.flow(recorder, "FailingFlow", "run", "--tag", "first", "--tag", "second")

    def tag(*words: str, by: str = tagger) -> str:
        argv = (sys.executable, "FailingFlow.py", "tag", *words, "--run-id", run.id)
        done = flows.under(by, *argv)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    tag("add", "third", "mit Umlaut: ü")
    tag("remove", "first")
    tag("replace", "--remove", "second", "--add", "fourth")
    for reader in METADATA:
        listed = tag("list", "--flat", by=reader).split("\n")
        assert {"third", "mit Umlaut: ü", "fourth"} <= set(listed)
        assert {"first", "second"}.isdisjoint(listed)


def test_a_subdirectory_belongs_to_the_project_above_it(flows: Flows) -> None:
    (flows.folder / ".metaflow").mkdir()
    below = flows.folder / "some" / "where"
    below.mkdir(parents=True)
    run = flows.flow("service", "FailingFlow", "run", cwd=below)
    assert (flows.folder / ".metaflow" / run.run / "_meta" / "_self.json").exists()
    assert list(below.iterdir()) == []
