"""The checks of this project: `nox` runs them on the Python at hand, `nox -l` lists all of them.

`nox -s tests` runs the tests on every supported Python that it finds, each with the oldest and the
newest supported Metaflow; `nox -s tests-3.9` on one of them. What follows `--` is pytest's:
`nox -s tests-3.13 -- -k lease`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Callable
from urllib.parse import quote

import nox

MODULE = "metaflow_local_service.py"
TESTS = "test_metaflow_local_service.py"
SOURCES = (MODULE, TESTS, "noxfile.py")
ESLINT = ("eslint@9", "@eslint/js@9", "globals@16")
ESLINT_CONFIG = """
import js from "@eslint/js";
import globals from "globals";
const rules = {
  "eqeqeq": "error",
  "max-len": ["error", 100],
  "no-control-regex": "off", // a terminal's codes are what is looked for
  "no-shadow": "error",
  "prefer-const": "error",
};
export default [js.configs.recommended, {languageOptions: {globals: globals.browser}, rules}];
"""

PYTHONS = ("3.9", "3.10", "3.11", "3.12", "3.13", "3.14")
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
    lint_page(session)


def lint_page(session: nox.Session) -> None:
    """What the page's script is written in, checked by Node.js and ESLint where those are."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        session.warn("There is no Node.js or npm here: the page's script is not checked.")
        return
    folder = Path(session.create_tmp())
    module = Path(MODULE).read_text()
    script = module.partition('<script type="module">\n')[2].partition("</script>")[0]
    (folder / "page.mjs").write_text(script)
    (folder / "eslint.config.mjs").write_text(ESLINT_CONFIG)
    npm_install(session, folder, *ESLINT)
    with session.chdir(folder):
        session.run("node", "--check", "page.mjs", external=True)
        session.run("npx", "eslint", "page.mjs", external=True)


def npm_install(session: nox.Session, folder: Path, *packages: str) -> None:
    """Install packages of the npm registry below a folder."""
    quiet = ("--silent", "--no-audit", "--no-fund")
    session.run("npm", "install", "--prefix", str(folder), *quiet, *packages, external=True)


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
    session.run("pytest", "-q", "-n", "auto", "--dist", "loadgroup", *session.posargs)


@nox.session(name="next")
def next_metaflow(session: nox.Session) -> None:
    """The tests with the Metaflow of a checkout, which $METAFLOW_NEXT names."""
    checkout = os.environ.get("METAFLOW_NEXT")
    if not checkout:
        session.skip("METAFLOW_NEXT names no checkout of Metaflow")
    session.install(".[dev]", checkout)
    session.run("python", "-c", "import metaflow; print('Metaflow', metaflow.__version__)")
    session.run("pytest", "-q", "-n", "auto", "--dist", "loadgroup", *session.posargs)


@nox.session
def kills(session: nox.Session) -> None:
    """`kill -9` of a service under load and of a deletion, 300 times each (or KILLS times)."""
    session.install(".[dev]")
    kills = os.environ.get("KILLS", "300")
    session.run("pytest", "-q", "-s", "-k", "kill_at", env={"KILLS": kills})


@nox.session
def browser(session: nox.Session) -> None:
    """The page in a real browser, and to axe; screenshots go to $SCREENSHOTS."""
    session.install(".[dev]", "playwright")
    screenshots = os.environ.get("SCREENSHOTS") or session.create_tmp()
    session.log(f"screenshots go to {screenshots}")
    env = {"SCREENSHOTS": screenshots}
    if shutil.which("npm") is not None:
        folder = Path(session.create_tmp())
        npm_install(session, folder, "axe-core@4")
        env["AXE"] = str(folder.absolute() / "node_modules" / "axe-core" / "axe.min.js")
    session.run("pytest", "-q", "-m", "browser", *session.posargs, env=env)


@nox.session
def bench(session: nox.Session) -> None:
    """The table of how fast it is, each row side by side with what it is held against."""
    session.install(".", "nox")
    session.run("python", "noxfile.py")


# -- the benchmark: `nox -s bench` runs this file as a script in the session's environment --------
#
# Each row is measured side by side with what it is compared to, in turn, and told as the median of
# the ratios: machines are noisy, and drift.


PROGRAM = [str(Path(sys.executable).with_name("metaflow-local-service"))]

CONSTANT_SERVER = """
import http.server, itertools, os
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"pong")
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        folder, files = "files", int(self.path[2:])
        if self.path[1] == "o":
            folder = f"files/{next(Handler.numbers)}"
            os.mkdir(folder)
            folder += "/_meta"
            os.mkdir(folder)
        for _ in range(files):
            name = next(Handler.numbers)
            descriptor = os.open(f"{folder}/.{name}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            os.write(descriptor, b"x" * 400)
            os.close(descriptor)
            os.rename(f"{folder}/.{name}", f"{folder}/{name}")
        self.do_GET()
    numbers = itertools.count()
    def log_message(self, *args):
        pass
os.makedirs("files")
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""

WIDE_FLOW = """
from metaflow import FlowSpec, step
class WideFlow(FlowSpec):
    @step
    def start(self):
        self.items = list(range(100))
        self.next(self.work, foreach="items")
    @step
    def work(self):
        self.result = self.input
        self.next(self.join)
    @step
    def join(self, inputs):
        self.next(self.end)
    @step
    def end(self):
        pass
if __name__ == "__main__":
    WideFlow()
"""

ROW = Callable[[], float]  # does a thing and returns the seconds it took
LABELS = {
    "user_name": "tester",
    "tags": ["bench"],
    "system_tags": ["metaflow_version:2.19.38", "python_version:3.11.7", "user:tester"],
}
METADATA = [
    {"field_name": f"field-{i}", "type": "text", "value": f"value {i}", "tags": ["attempt_id:0"]}
    for i in range(10)
]


def seconds_of(command: list[str], cwd: Path) -> float:
    """How long a command takes."""
    start = time.perf_counter()
    quiet = subprocess.DEVNULL
    subprocess.run(command, cwd=cwd, check=True, stdout=quiet, stderr=quiet)
    return time.perf_counter() - start


def ratio(ours: ROW, theirs: ROW, rounds: int = 15) -> float:
    """The median of the ratios of two things done in turn, after one round that does not count."""
    ours(), theirs()
    return statistics.median(ours() / theirs() for _ in range(rounds))


def report(what: str, value: float, limit: float) -> None:
    verdict = "" if value <= limit else "   <-- over"
    print(f"| {what:<58} | {value:6.2f} | {limit:6.2f} |{verdict}", flush=True)


class Client:
    """Requests over keep-alive connections, one a thread."""

    def __init__(self, port: int) -> None:
        self.port = port

    def burst(
        self,
        requests: Sequence[tuple[str, str, bytes | None]],
        threads: int,
        keeps_alive: bool = True,
    ) -> float:
        """Send all requests, spread over threads, and return the seconds that they took."""

        def work(mine: Sequence[tuple[str, str, bytes | None]]) -> None:
            connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
            for method, path, body in mine:
                connection.request(method, path, body)
                answer = connection.getresponse()
                answer.read()
                assert answer.status == 200, (path, answer.status)
                if not keeps_alive:
                    connection.close()
            connection.close()

        workers = [
            threading.Thread(target=work, args=(requests[n::threads],)) for n in range(threads)
        ]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return time.perf_counter() - start

    def json(self, method: str, path: str, body: object = None) -> Any:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request(method, path, None if body is None else json.dumps(body))
        answer = json.loads(connection.getresponse().read())
        connection.close()
        return answer

    def walk(self, path: str) -> None:
        """Fetch a list in pages of 100."""
        connection, cursor = HTTPConnection("127.0.0.1", self.port, timeout=600), ""
        while cursor is not None:
            connection.request("GET", f"{path}?_limit=100&_cursor={quote(cursor)}")
            answer = connection.getresponse()
            answer.read()
            cursor = answer.headers["X-Next-Cursor"]
        connection.close()


def bench_commands(folder: Path) -> None:
    """The commands against a bare interpreter that imports what any server needs."""
    bare = [sys.executable, "-c", "import http.server, argparse"]
    provider = "import metaflow.plugins.metadata_providers.local"
    here = str(folder)

    def cold(command: str, *rest: str) -> float:
        subprocess.run([*PROGRAM, "stop", "--root", here], check=True, stdout=subprocess.DEVNULL)
        return seconds_of([*PROGRAM, command, "--root", here, *rest], folder)

    def warm(command: str, *rest: str) -> ROW:
        return lambda: seconds_of([*PROGRAM, command, "--root", here, *rest], folder)

    def floor() -> float:
        return seconds_of(bare, folder)

    report(
        "`run true`, no service yet / a bare interpreter",
        ratio(lambda: cold("run", "true"), floor),
        2,
    )
    report("`run true`, service up", ratio(warm("run", "true"), floor), 1.5)
    report("`url`", ratio(warm("url"), floor), 1.5)
    report("`status`", ratio(warm("status"), floor), 1.5)
    importing = [sys.executable, "-c", provider]
    started = ratio(lambda: cold("start"), lambda: seconds_of(importing, folder), rounds=7)
    report("`start` / importing Metaflow's provider", started, 1.5)


def bench_requests(ours: Client, our_pid: int, bare: Client, bare_pid: int) -> None:
    """Single requests, by the processor time of the service, against a handler that does nothing
    but make as many files and folders; with eight clients, and with one.

    Eight threads hand Python's lock around: a constant takes up to 1.6 times as long with them. So
    it is the ratios with eight and with one that are compared.
    """
    labels, rows = json.dumps(LABELS).encode(), json.dumps(METADATA).encode()
    ours.json("POST", "/flows/Bench", LABELS)
    run = f"/flows/Bench/runs/{ours.json('POST', '/flows/Bench/run', LABELS)['run_number']}"
    step = f"{run}/steps/start"
    ours.json("POST", f"{step}/step", LABELS)
    task = f"{step}/tasks/{ours.json('POST', f'{step}/task', LABELS)['task_id']}"
    names = itertools.count()

    def artifacts() -> bytes:
        shared = {"location": ":root:/x/.metaflow", "ds_type": "local", "sha": "0" * 40}
        return json.dumps([{**shared, "name": f"a{next(names)}"} for _ in range(10)]).encode()

    def cost(pid: int, burst: Callable[[], object]) -> float:
        before = processor_seconds(pid)
        burst()
        return processor_seconds(pid) - before

    def compare(what: str, path: str, body: Any, bare_path: str, count: int) -> None:
        method, bare_body = ("GET", None) if body is None else ("POST", b"{}")

        def our_cost(threads: int, keeps_alive: bool = True) -> float:
            bodies = (body() if callable(body) else body for _ in range(count))
            requests = [(method, path, content) for content in bodies]
            return cost(our_pid, partial(ours.burst, requests, threads, keeps_alive))

        def bare_cost(threads: int, keeps_alive: bool = True) -> float:
            requests = [(method, bare_path, bare_body)] * count
            return cost(bare_pid, partial(bare.burst, requests, threads, keeps_alive))

        one, eight = (
            ratio(partial(our_cost, threads), partial(bare_cost, threads), rounds=5)
            for threads in (1, 8)
        )
        report(f"{what}, 1 client", one, 1.5)
        report(f"{what}, 8 clients", eight, 1.5)
        report(f"{what}, 8 clients in place of 1", eight / one, 1.2)
        if body is None:
            new = [partial(cost_of, 1, False) for cost_of in (our_cost, bare_cost)]
            report(f"{what}, a new connection each", ratio(*new, rounds=5), 1.5)

    # The path for the bare handler: "f" or, in new folders, "o", and how many files.
    compare("GET /ping / a constant", "/ping", None, "/", 2_000)
    compare("heartbeat / a constant", f"{task}/heartbeat", b"{}", "/f0", 2_000)
    compare("POST run / a file in new folders", "/flows/Bench/run", labels, "/o1", 800)
    compare("POST task / a file in new folders", f"{step}/task", labels, "/o1", 800)
    compare("POST metadata x10 / ten files", f"{task}/metadata", rows, "/f10", 250)
    compare("POST artifact x10 / ten files", f"{task}/artifact", artifacts, "/f10", 250)


def bench_lists(ours: Client, pid: int, size: int) -> None:
    """Whole lists, by the processor time of the service, against json.dumps of the same."""
    flow = f"/flows/Many{size}"
    ours.json("POST", flow, LABELS)
    labels = json.dumps(LABELS).encode()
    ours.burst([("POST", f"{flow}/run", labels)] * size, 4)
    run = ours.json("GET", f"{flow}/runs?_limit=1")[0]["run_number"]
    step = f"{flow}/runs/{run}/steps/start"
    ours.json("POST", f"{step}/step", LABELS)
    ours.burst([("POST", f"{step}/task", labels)] * size, 4)
    time.sleep(3)  # warm: a folder that has just changed is not yet believed to be as it was
    for what, path in (("runs", f"{flow}/runs"), ("tasks", f"{step}/tasks")):
        records = ours.json("GET", path)
        assert len(records) == size

        rounds = 20_000 // size

        def dump(records: Any = records, rounds: int = rounds) -> float:
            before = time.process_time()
            for _ in range(rounds):
                json.dumps(records)
            return time.process_time() - before

        def fetch(path: str = path, rounds: int = rounds) -> float:
            before = processor_seconds(pid)
            ours.burst([("GET", path, None)] * rounds, 1)
            return processor_seconds(pid) - before

        report(f"GET {size:,} {what} / json.dumps of them", ratio(fetch, dump, rounds=9), 2.5)


def bench_pages(ours: Client, pid: int, root: Path, size: int) -> None:
    """Lists in pages of 100 against the same lists at once, by the processor time of the service;
    the first page by status against one without a filter; and what has to look at all tasks or runs
    against a look at as many folders."""
    flow = "/flows/Pages"
    ours.json("POST", flow, LABELS)
    labels, ended = json.dumps(LABELS).encode(), []
    ours.burst([("POST", f"{flow}/run", labels)] * size, 4)
    for record in ours.json("GET", f"{flow}/runs"):
        step = f"{flow}/runs/{record['run_number']}/steps/end"
        ours.json("POST", f"{step}/step", LABELS)
        task = ours.json("POST", f"{step}/task", LABELS)["task_id"]
        rows = [{"field_name": "attempt_ok", "type": "t", "value": "True"}]
        ended.append(("POST", f"{step}/tasks/{task}/metadata", json.dumps(rows).encode()))
    ours.burst(ended, 4)
    run = f"{flow}/runs/{record['run_number']}"
    step = f"{run}/steps/wide"
    ours.json("POST", f"{step}/step", LABELS)
    ours.burst([("POST", f"{step}/task", labels)] * size, 4)
    rows = json.dumps(METADATA[:1]).encode()
    artifact = json.dumps([{"name": "a", "location": ":root:/x", "ds_type": "local"}]).encode()
    tasks = [f"{step}/tasks/{record['task_id']}" for record in ours.json("GET", f"{step}/tasks")]
    ours.burst([("POST", f"{task}/metadata", rows) for task in tasks], 4)
    ours.burst([("POST", f"{task}/artifact", artifact) for task in tasks], 4)
    time.sleep(3)

    def cost(work: Callable[[], object]) -> float:
        before = processor_seconds(pid)
        for _ in range(3):
            work()
        return processor_seconds(pid) - before

    for path in (f"{flow}/runs", f"{step}/tasks", f"{run}/metadata", f"{run}/artifacts"):
        walk, whole = partial(ours.walk, path), partial(ours.json, "GET", path)
        value = ratio(partial(cost, walk), partial(cost, whole), rounds=3)
        report(f"{size:,} {path.rpartition('/')[2]} in pages of 100 / at once", value, 2)
    page = [("GET", f"{flow}/runs?_limit=100", None)] * 20
    by_status = [("GET", f"{flow}/runs?_limit=100&status=completed", None)] * 20
    value = ratio(lambda: ours.burst(by_status, 1), lambda: ours.burst(page, 1), rounds=5)
    report(f"a page of {size:,} runs by status / without a filter", value, 5)
    folders = [root / ".metaflow" / task[len("/flows/") :] for task in tasks]
    below = [
        str(folder).replace("/runs/", "/").replace("/steps/", "/").replace("/tasks/", "/")
        for folder in folders
    ]

    def look() -> float:
        before = time.process_time()
        for folder in below * 3:
            os.stat(f"{folder}/_meta")
        return time.process_time() - before

    for what, path, limit in (
        ("filtered_tasks", f"{step}/filtered_tasks?metadata_field_name=field-0&pattern=value", 2.5),
        ("runs by a rare status", f"{flow}/runs?_limit=100&status=failed", 8),
    ):
        value = ratio(partial(cost, partial(ours.json, "GET", path)), look, rounds=5)
        report(f"{what}, of {size:,} / os.stat of as many", value, limit)


def bench_idle(folder: Path) -> None:
    """What a service costs whose runs have ended long ago: in wake-ups a second while nobody asks,
    and in hundredths of a core with a page open. These two rows are no ratios."""
    yesterday = int(time.time()) - 86400
    flow = folder / ".metaflow" / "Old"
    for place in (flow, *(flow / str(yesterday * 1_000_000 + number) for number in range(100))):
        (place / "_meta").mkdir(parents=True)
        (place / "_meta" / "_self.json").write_text(json.dumps({"ts_epoch": yesterday * 1000}))
    for path in folder.rglob("*"):  # which say when a run that has not told its end was last alive
        os.utime(path, (yesterday, yesterday))
    seconds_of([*PROGRAM, "start"], folder)
    told = subprocess.check_output([*PROGRAM, "status", "--json"], cwd=folder, text=True)
    service = json.loads(told)
    time.sleep(5)
    before = wake_ups(service["pid"])
    time.sleep(20)
    report("wake-ups a second, idle", (wake_ups(service["pid"]) - before) / 20, 1)
    with socket.create_connection((service["host"], service["port"])) as page:
        page.sendall(HANDSHAKE % service["port"])
        assert page.recv(2**16).startswith(b"HTTP/1.1 101 ")
        page.sendall(SUBSCRIPTION)
        time.sleep(5)
        spent = processor_seconds(service["pid"])
        time.sleep(60)
        percent = (processor_seconds(service["pid"]) - spent) / 60 * 100
    report("an open page of runs that have ended, % of a core", percent, 0.1)
    seconds_of([*PROGRAM, "stop"], folder)


HANDSHAKE = (
    b"GET /api/ws HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
SUBSCRIPTION = (
    b"\x81\xb7\0\0\0\0"  # a frame of 55 bytes, masked with zeros
    b'{"type": "SUBSCRIBE", "uuid": "u", "resource": "/runs"}'
)


def wake_ups(pid: int) -> int:
    """How often the threads of a process have waited for something until now; 0 if unknown."""
    statuses = Path(f"/proc/{pid}/task").glob("*/status")
    lines = (line for status in statuses for line in status.read_text().splitlines())
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt"))


def processor_seconds(pid: int) -> float:
    """The processor time that a process has taken."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    clock = subprocess.check_output(["ps", "-o", "time=", "-p", str(pid)], text=True)
    minutes, seconds = clock.split(":")  # as macOS has it, with hundredths
    return 60 * int(minutes) + float(seconds)


def bench_crowded_run(ours: Client, root: Path) -> None:
    """A run of 100,000 tasks against one of 10."""
    steps = []
    for size in (10, 100_000):
        run = ours.json("POST", "/flows/Bench/run", LABELS)["run_number"]
        step = f"/flows/Bench/runs/{run}/steps/start"
        ours.json("POST", f"{step}/step", LABELS)
        below = root / ".metaflow" / "Bench" / str(run) / "start"
        for number in range(1, size + 1):
            (below / str(number) / "_meta").mkdir(parents=True)
            record = {"ts_epoch": 1795448419531, "user_name": "tester", "task_id": str(number)}
            (below / str(number) / "_meta" / "_self.json").write_text(json.dumps(record))
        steps.append(step)
        ours.json("POST", f"{step}/task", LABELS)
    labels = json.dumps(LABELS).encode()
    few, many = steps
    posts = [
        ours.burst,
        [("POST", f"{many}/task", labels)] * 200,
        [("POST", f"{few}/task", labels)] * 200,
    ]
    gets = [
        ours.burst,
        [("GET", f"{many}/tasks/77", None)] * 400,
        [("GET", f"{few}/tasks/7", None)] * 400,
    ]
    for what, (burst, crowded, empty) in (("POST task into", posts), ("GET a task of", gets)):
        value = ratio(lambda: burst(crowded, 1), lambda: burst(empty, 1), rounds=9)  # noqa: B023
        report(f"{what} a run with 100,000 / with 10", value, 1.2)


def bench_flow(folder: Path) -> None:
    """A flow under the service against the same in local mode."""
    (folder / "wide.py").write_text(WIDE_FLOW)
    flow = [sys.executable, "wide.py", "--quiet", "run", "--max-workers", "8"]
    root = ["--root", str(folder)]
    value = ratio(
        lambda: seconds_of([*PROGRAM, "run", *root, *flow], folder),
        lambda: seconds_of(flow, folder),
        rounds=3,
    )
    report("a flow of 1 + foreach 100 + join / local mode", value, 1.05)


def resident_kilobytes(pid: int) -> float:
    """The memory that a process has in use."""
    return float(subprocess.check_output(["ps", "-o", "rss=", "-p", str(pid)]))


def bench_memory(when: str, pid: int, limit: float) -> None:
    """The memory of the service against that of a process that has imported Metaflow."""
    importing = "import metaflow, os, sys; print(os.getpid(), flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", importing], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        value = resident_kilobytes(pid) / resident_kilobytes(int(other.stdout.readline()))
        other.stdin.close()
    report(f"memory, {when} / of an import of Metaflow", value, limit)


def benchmark() -> None:
    """Print the table, in a folder of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        os.environ["METAFLOW_LOCAL_SERVICE_HOME"] = str(folder / "home")
        os.environ.setdefault("METAFLOW_USER", "tester")
        (folder / "project").mkdir()
        (folder / "constant").mkdir()
        project = folder / "project"
        print(f"| {'what / against what':<58} | {'ratio':>6} | {'limit':>6} |")
        print(f"|{'-' * 60}|{'-' * 8}|{'-' * 8}|")
        bench_commands(project)
        constant = subprocess.Popen(
            [sys.executable, "-c", CONSTANT_SERVER],
            cwd=folder / "constant",
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            seconds_of([*PROGRAM, "start"], project)
            told = subprocess.check_output([*PROGRAM, "status", "--json"], cwd=project, text=True)
            service = json.loads(told)
            ours = Client(service["port"])
            assert constant.stdout is not None
            bare = Client(int(constant.stdout.readline()))
            bench_memory("started", service["pid"], 1.3)
            bench_requests(ours, service["pid"], bare, constant.pid)
            bench_lists(ours, service["pid"], 1_000)
            bench_lists(ours, service["pid"], 10_000)
            bench_memory("after 22,000 records", service["pid"], 2)
            bench_pages(ours, service["pid"], project, 10_000)
            bench_crowded_run(ours, project)
            bench_memory("after all this", service["pid"], 3)
            bench_flow(project)
            bench_idle(folder / "quiet")
        finally:
            constant.kill()
            subprocess.run([*PROGRAM, "stop", "--all"], cwd=project, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    benchmark()
