"""A Metaflow metadata service for one machine, in one file, with nothing to set up.

`metaflow-local-service run python flow.py run` starts a daemon when the project has none, runs the
command against it, and the daemon goes away when nobody needs it any more. It speaks the HTTP API
of Metaflow's metadata service and keeps every record in the files of Metaflow's own local mode, so
both modes read and write the same runs.

The file is read from top to bottom. Each layer uses only what stands above it:

    Settings   names, defaults, environment variables, which root is meant
    Store      records on disk, through LocalMetadataProvider; ids, tags, heartbeats
    Datastore  the other files that Metaflow keeps in a root; values read without unpickling
    Queries    filters, orders, cursors, pages: pure functions over rows
    Model      runs, steps and attempts as a person means them: statuses, times, causes
    Retention  what refers to what; what it takes on the disk; deleting runs and what nothing needs
    API        the route table: a method and a path, and a small handler over the store
    Access     who may ask: the key and the login, web pages, whose connection it is
    Page       the page of our own, one document that needs nothing but the UI API
    UI API     the routes of the official UI's backend, and its sockets
    Server     HTTP itself: parsing, limits, errors as JSON, in-flight requests
    Registry   which service runs where: pidfile locks and leases
    Daemon     becoming one: binding, the double fork, the log file, the idle stop
    Library    what Python calls: in notebooks, scripts and tests; fixtures for pytest
    Commands   the command line

A record is a dict, because it is JSON; the TypedDicts say which. An object is addressed by its
`ids`, the parts of its pathspec: ("MyFlow", "1795448419531000", "start", "1").

What this design is bad at. It ends at one machine: the locks, and the check whose a connection is,
are those of one kernel. Every record is a small file of its own, so that a root with many runs is
slow to copy and to delete. There is no index on the disk: a list looks at every record that it
shows with a stat, and one of tens of thousands takes tenths of a second. Nobody records the end of
a run, so that its status has to be inferred from what its tasks have left. And flows of many short
tasks run faster in local mode, because Metaflow's client starts a process for the heartbeats of
each task in service mode.

PYTEST_DONT_REWRITE: as a plugin of pytest's this is taken as it stands, its bytecode too.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    # Run as a file or with `python -m`, Python looks for modules in the user's folder first, where
    # a json.py or queue.py of theirs would be taken for the standard library's.
    del sys.path[0]

import argparse
import base64
import bisect
import codecs
import contextlib
import email.utils
import errno
import fcntl
import http.client
import http.server
import importlib.util
import io
import itertools
import json
import math
import operator
import os
import re
import select
import shutil
import signal
import socket
import socketserver
import stat
import struct
import threading
import time
import urllib.parse
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache, partial
from re import Match
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    NamedTuple,
    NoReturn,
    Optional,
    Protocol,
    TextIO,
    TypedDict,
    TypeVar,
    Union,
    cast,
)

if TYPE_CHECKING:
    import logging

__version__ = "1.0.0"

__all__ = ["Service", "ServiceError", "ensure", "find", "running", "stop", "use", "using"]

# ==================================================================================================
# Settings: names, defaults, environment variables, and which root is meant
# ==================================================================================================
#
# Rules of this layer:
#
# - The environment and the current folder are parameters of all functions that depend on them. No
#   file is read but Metaflow's configuration.
# - A wrong value is a ValueError with a sentence. from_environment and the parser of the command
#   line turn it into an error that names the variable or the option.
#
# Which root is meant: the one whose .metaflow Metaflow's local mode would use, for the two must see
# the same runs (root_folder says in which order it is looked for). Commands export the root and the
# key to what they run. So that a nested command finds the user's own settings and not the exported
# ones, ENV_EXPORTED carries along what was exported over what: describe_exports writes it, and
# user_environment undoes the exports.

PROGRAM = "metaflow-local-service"
PROTOCOL_VERSION = "2.6.1"
"""The release of the metadata service whose API this is; Metaflow's client checks it."""

DATASTORE_DIR = ".metaflow"
"""The folder of Metaflow's local mode in a root (DATASTORE_LOCAL_DIR)."""

META_DIR = "_meta"
"""The folder in which the folder of an object holds its records (LocalStorage.METADATA_DIR)."""

TEMPORARY = f".{PROGRAM}-"
"""The prefix of files that are being written. Each is created in its final folder, where readers of
records ignore it. With one folder for all of them, ext4 would keep the inodes of all records near
that folder, and beyond some 8,000 take ten times as long to find a free one (0.4 ms, not 0.04)."""

DEFAULT_HOST = "127.0.0.1"
DEFAULT_IDLE_TIMEOUT = 300.0

ENV_PORT = "METAFLOW_LOCAL_SERVICE_PORT"
ENV_IDLE_TIMEOUT = "METAFLOW_LOCAL_SERVICE_IDLE_TIMEOUT"
ENV_DEBUG = "METAFLOW_LOCAL_SERVICE_DEBUG"
ENV_HOME = "METAFLOW_LOCAL_SERVICE_HOME"
ENV_UI_DIR = "METAFLOW_LOCAL_SERVICE_UI_DIR"
ENV_SYSROOT = "METAFLOW_DATASTORE_SYSROOT_LOCAL"
ENV_KEY = "METAFLOW_SERVICE_AUTH_KEY"
ENV_EXPORTED = "METAFLOW_LOCAL_SERVICE_EXPORTED"
"""The settings that a command of this program has exported, as JSON; see `describe_exports`."""

Environment = Mapping[str, str]


@cache  # requests log too, and to look it up takes 2 us
def logger() -> logging.Logger:
    """The logger of this program. Most commands log nothing, and are spared the import: 5 ms."""
    import logging

    return logging.getLogger(PROGRAM)


class ServiceError(Exception):
    """Something that cannot be done as the user asked: a sentence for them, and an exit code."""

    def __init__(self, sentence: str, exit_code: int = 1) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


def parse_port(text: str) -> int:
    """A TCP port, from 0 (any free one) to 65535; ValueError."""
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise ValueError(f"a port is a number from 0 to 65535, not {text!r}")
    return int(text)


def parse_seconds(text: str) -> float:
    """A number of seconds, 0 or more; ValueError."""
    if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", text):
        raise ValueError(f"an idle time-out is a number of seconds, 0 or more, not {text!r}")
    return float(text)


def parse_key(text: str) -> str:
    """A key that can be sent as a header; ValueError."""
    if not re.fullmatch("[!-~]{1,1000}", text):
        raise ValueError("a key is made of printable ASCII characters, without spaces")
    return text


def parse_ui_folder(text: str) -> str:
    """A folder with a build of the official UI, as a real path; ValueError."""
    folder = os.path.realpath(os.path.expanduser(text))
    if not os.path.isfile(os.path.join(folder, "index.html")):
        raise ValueError(f"a build of the official UI has an index.html, and {folder} has none")
    return folder


T = TypeVar("T")


def from_environment(environment: Environment, name: str, convert: Callable[[str], T]) -> T | None:
    """The converted value of a variable, or None if it is unset or empty."""
    text = environment.get(name)
    if not text:
        return None
    try:
        return convert(text)
    except ValueError as error:
        raise ServiceError(f"{name}: {error}", exit_code=2) from None


def is_debug(environment: Environment) -> bool:
    """Whether every request is to be logged."""
    return environment.get(ENV_DEBUG, "").lower() not in ("", "0", "false", "no")


def home_folder(environment: Environment) -> str:
    """Where the index of running services is kept.

    A user whom the system does not know, as in containers, has / for a home, as Docker has it.
    """
    folder = environment.get(ENV_HOME) or f"~/.{PROGRAM}"
    return re.sub("^~(?=/)", "", os.path.expanduser(folder))


def describe_exports(settings: Mapping[str, str], user: Environment) -> str:
    """The value of ENV_EXPORTED for settings that are exported over a user's environment.

    It maps each variable to the exported value and the user's own, or null if the user had none.
    Only variables that this program reads itself are in it, and only if the values differ.
    """
    return json.dumps(
        {
            name: (settings[name], user.get(name))
            for name in (ENV_SYSROOT, ENV_KEY)
            if name in settings and settings[name] != user.get(name)
        }
    )


def user_environment(environment: Environment) -> dict[str, str]:
    """The environment as it was before `run` or `env` exported settings into it.

    A variable that no longer has the exported value has been set by the user since, and is kept.
    """
    user = dict(environment)
    try:
        for name, (exported, before) in json.loads(user.pop(ENV_EXPORTED, "{}")).items():
            if user.get(name) == exported:
                del user[name]
                if isinstance(before, str):
                    user[name] = before
    except (ValueError, TypeError, AttributeError):
        logger().debug("%s was not written by this program", ENV_EXPORTED)
    return user


def nearest_project(here: str) -> str | None:
    """The nearest folder from `here` upwards that has a .metaflow, or None if none has."""
    folder = os.path.realpath(here)
    while not os.path.isdir(os.path.join(folder, DATASTORE_DIR)):
        if folder == os.path.dirname(folder):
            return None
        folder = os.path.dirname(folder)
    return folder


def read_configuration(path: str) -> dict[str, object]:
    """The content of a configuration file of Metaflow's; empty if it is missing or not valid.

    There is no need to report that: Metaflow does so itself when it is imported.
    """
    try:
        with open(path, encoding="utf-8") as f:
            configuration = json.load(f)
    except (OSError, ValueError, RecursionError):
        return {}
    return configuration if isinstance(configuration, dict) else {}


def configured_sysroot(environment: Environment, here: str) -> str | None:
    """Metaflow's setting DATASTORE_SYSROOT_LOCAL, as it is for a process in the folder `here`.

    It is taken from the environment, the project's configuration or the profile's, the first that
    has it, even if it is null there. As in Metaflow, a `~` in it is not expanded.
    """
    if ENV_SYSROOT in environment:
        return environment[ENV_SYSROOT]
    project = nearest_project(here)
    profile = environment.get("METAFLOW_PROFILE")
    home = environment.get("METAFLOW_HOME", "~/.metaflowconfig")
    file = f"config_{profile}.json" if profile else "config.json"
    paths = [os.path.join(project, DATASTORE_DIR, "config.json")] if project else []
    paths.append(os.path.join(here, os.path.expanduser(os.path.join(home, file))))
    for path in paths:
        configuration = read_configuration(path)
        if ENV_SYSROOT in configuration:
            sysroot = configuration[ENV_SYSROOT]
            return sysroot if isinstance(sysroot, str) else None
    return None


def root_folder(option: str | None, environment: Environment, here: str) -> str:
    """The folder whose .metaflow is used, as a real path: the one that local mode would use.

    That is the option --root, or Metaflow's DATASTORE_SYSROOT_LOCAL if the user has set it, or the
    nearest folder from `here` upwards that has a .metaflow, or `here` itself.
    """
    if option:
        return os.path.realpath(os.path.join(here, os.path.expanduser(option)))
    sysroot = configured_sysroot(user_environment(environment), here)
    if sysroot is not None:
        return os.path.realpath(os.path.join(here, sysroot))
    return nearest_project(here) or os.path.realpath(here)


def has_proxy(host: str, port: int, environment: Environment) -> bool:
    """Whether clients that respect the usual variables use a proxy for http://`host`:`port`."""
    names = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
    exceptions = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    if not any(map(environment.get, names)) or exceptions.strip() == "*":
        return False
    return not any(is_exempt(host, port, name.strip()) for name in exceptions.split(","))


def is_exempt(host: str, port: int, exception: str) -> bool:
    """Whether a host and port are exempt from proxies by a name, address or network in no_proxy."""
    if "/" not in exception:
        name = re.sub(rf"(?<=[^:]):{port}$", "", exception).strip("[]").lstrip(".").lower()
        return name != "" and (host == name or host.endswith(f".{name}"))
    import ipaddress

    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(exception, strict=False)
    except ValueError:
        return False


def proxy_exceptions(host: str, environment: Environment) -> dict[str, str]:
    """New values for no_proxy and NO_PROXY, which include `host`; empty if no proxy is set.

    Programs differ in which of the two they read first, so both contain everything. A `*`, which
    exempts all hosts, only works alone, and is left as it is.
    """
    if not any(name.lower().endswith("_proxy") and environment[name] for name in environment):
        return {}
    names = (host, f"[{host}]") if ":" in host else (host,)  # some want an IPv6 address in brackets
    exceptions = {}
    for name, other in (("no_proxy", "NO_PROXY"), ("NO_PROXY", "no_proxy")):
        current = (environment.get(name) or environment.get(other) or "").strip(", ")
        listed = [exception.strip() for exception in current.split(",")]
        added = [] if current == "*" else [n for n in names if n not in listed]
        exceptions[name] = ",".join(filter(None, (current, *added)))
    return exceptions


# ==================================================================================================
# Store: records on disk, through LocalMetadataProvider; ids, tags, heartbeats
# ==================================================================================================
#
# Rules of this layer:
#
# - The files are the only state, and they are those of local mode. Whatever is in memory is a
#   cache: to lose it costs time and nothing else.
# - Other processes change files at any moment: local mode, other tools, people. So every call looks
#   at the disk before it believes a cache. There are two exceptions: the pages of a long list (see
#   PAGING_SECONDS), and heartbeats, which nobody but the service of the root records.
# - What goes into a record is decided by Metaflow's LocalMetadataProvider, and is completed here.
#   Only writing imports Metaflow.
# - A request that cannot be carried out is a StoreError with a sentence for the client. A failure
#   of the machine is an OSError, and a write that fails so while it creates records leaves none.
#
# Where things are. The ids of an object are the path of its folder: FLOW/RUN/STEP/TASK. Beside the
# folders of its children it has a folder _meta, in which are
#
#     _self.json                      the record of the object
#     _heartbeat                      of a run or task: its mtime is the time of the last heartbeat
#     sysmeta_NAME_TIMESTAMP.json     of a task: a metadatum
#     ATTEMPT_artifact_NAME.json      of a task: an artifact
#
# Versions. The version of a file or folder consists of its mtime, inode and size. A file is read
# again if its version has changed. That is enough for files, since both modes replace them by a
# rename, which brings a new inode. A folder keeps its inode, and it may change twice within one
# tick of the file system's clock. So its version only counts once it is settled, that is, once the
# last change is longer ago than any tick takes (SETTLED_NS). Until then None stands in its place,
# which is equal to no version, and so the folder is listed again at every call.
#
# What the version of a folder vouches for. That of an object's folder vouches for the names of its
# children and no more: the record of each child is still looked at, one stat for each. That of the
# _meta of a task also vouches for the contents of its metadata and artifacts, which neither mode
# changes in place; these are not looked at again while the version stays the same.
#
# What is cached, by what, and up to which limit; beyond it, the oldest entries are forgotten:
#
#     _records         records, by path                            RECORDS_IN_MEMORY
#     _listings        the children of an object, by its folder    LISTINGS_IN_MEMORY
#     _task_files      the files of a task, by their folder        TASK_FILES_IN_MEMORY
#     _task_values     the texts of one metadata field, by step    VALUES_IN_MEMORY
#     _indexes         lists over several tasks, by kind and ids   INDEXES_IN_MEMORY
#     _last_task_ids   the last number of a task, by run           NUMBERS_IN_MEMORY
#     _step_folders    the names of the steps, by run              STEP_FOLDERS_IN_MEMORY
#     _newest_runs     the newest run at first sight, by flow      none: one number for each flow
#
# Locks. `_writing` is held by whoever creates an object, adds metadata or artifacts, or changes
# tags, and so these happen one after another. Other processes do not take it. Against them new ids
# and files are safe because mkdir and link fail if the name is taken; of two changes of tags at the
# same time, one in each process, one may be lost. A heartbeat only sets a time and takes no lock.
# Reading takes none either, except that long lists are read in turn: see LongReads. The locks in
# Cache and TimestampGenerator are held for a few operations in memory, never while the disk is
# used.
#
# How files are written. A new record is written to a file without a name, which is then linked into
# its place, so that nobody ever sees half a record. Where the system has no such files, the file
# has a temporary name (TEMPORARY) until it is renamed; whether its final name is free is checked
# before. As in local mode, it is left to the kernel when a new record reaches the disk itself. A
# record that replaces another is synced before it is renamed, and its folder is synced afterwards.
#
# Symbolic links are followed for reading, and those that lead nowhere or in a circle are left out.
# Nothing is written where one leads: not through a linked folder, and not through a linked file.
#
# What a crash leaves, by what has crashed:
#
#     the service   every record that was acknowledged. Of a write that was not: folders without a
#                   record, which are in no list and whose numbers are not given again; some of the
#                   metadata or artifacts that came together; perhaps a file with a temporary name,
#                   which nobody reads or removes
#     the machine   the same, but the new records of the last seconds may be lost, or be files that
#                   cannot be read. Such a file counts as none, and a record can take its place.
#                   A record whose tags were being changed has either the old or the new ones

# -- records ---------------------------------------------------------------------------------------

Ids = tuple[str, ...]
Id = Union[int, str]
Tags = Optional[list[str]]  # None if the client has not said anything of tags
RawRecord = dict[str, Any]
"""A record as it is in its file, by whatever version of Metaflow or other client it was made."""


MetadatumValue = Union[str, list[str], None]
"""A text, as a rule. Metaflow gives the position in a foreach (`foreach-stack`) as a list, and null
where a value is missing; local mode stores both as they are."""

if TYPE_CHECKING:  # at run time a record is a dict; to make its types would take 1 ms

    class Flow(TypedDict):
        flow_id: str
        user_name: str | None
        ts_epoch: int
        tags: Tags
        system_tags: Tags

    class BaseRun(TypedDict):
        """The columns that every run has."""

        flow_id: str
        run_number: Id
        user_name: str | None
        ts_epoch: int
        tags: Tags
        system_tags: Tags
        last_heartbeat_ts: int | None

    class Run(BaseRun, total=False):
        status: str
        user: str

    class Step(TypedDict):
        flow_id: str
        run_number: Id
        step_name: str
        user_name: str | None
        ts_epoch: int
        tags: Tags
        system_tags: Tags

    class Task(TypedDict):
        flow_id: str
        run_number: Id
        step_name: str
        task_id: Id
        user_name: str | None
        ts_epoch: int
        tags: Tags
        system_tags: Tags
        last_heartbeat_ts: int | None

    class Metadatum(TypedDict):
        id: int
        flow_id: str
        run_number: Id
        step_name: str
        task_id: Id
        field_name: str
        value: MetadatumValue
        type: str
        user_name: str | None
        ts_epoch: int
        tags: Tags
        system_tags: Tags

    class Artifact(TypedDict):
        flow_id: str
        run_number: Id
        step_name: str
        task_id: Id
        name: str
        location: str
        ds_type: str
        sha: str | None
        type: str | None
        content_type: str | None
        user_name: str | None
        attempt_id: int
        ts_epoch: int
        tags: Tags
        system_tags: Tags

    class RunTags(TypedDict):
        """The tags of a run, which its steps, tasks and artifacts show as their own."""

        tags: Tags
        system_tags: Tags


class Record(dict[str, Any]):
    """A cached record, which is never changed.

    Its JSON is made only once, since that would be a third of what a list of records takes.
    """

    __slots__ = ("_json",)
    _json: bytes  # set by the first call of json()

    def json(self) -> bytes:
        try:
            return self._json
        except AttributeError:
            self._json = json.dumps(self).encode()
            return self._json


def serialize(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """A list of records or of other rows as JSON."""
    texts = [row.json() if isinstance(row, Record) else json.dumps(row).encode() for row in rows]
    return b"[%b]" % b", ".join(texts)


class Labels(NamedTuple):
    """The user and the tags that a client gives for an object; None for what it does not give."""

    user_name: str | None
    tags: Tags
    system_tags: Tags


class NewMetadatum(NamedTuple):
    """A metadatum as a client brings it."""

    field_name: str
    value: MetadatumValue
    type: str
    labels: Labels


class NewArtifact(NamedTuple):
    """An artifact as a client brings it."""

    name: str
    location: str
    ds_type: str
    sha: str | None
    type: str | None
    content_type: str | None
    attempt_id: int
    labels: Labels


class StoreError(Exception):
    """A request that the store cannot carry out; its text is one sentence for the client."""


class NotFound(StoreError):
    """The record does not exist, or an object above it does not."""


class AlreadyExists(StoreError):
    """There already is a record with these ids."""


class NotStorable(StoreError):
    """A name or value cannot be stored."""


class SystemTagRemoval(StoreError):
    """System tags cannot be removed."""


# -- ids and sort keys -----------------------------------------------------------------------------

RUN_DEPTH, TASK_DEPTH = 2, 4
"""How many parts the ids of a run and of a task have."""

KINDS = ("flow", "run", "step", "task")
"""What Metaflow calls an object whose ids have one, two, three or four parts."""

MIN_TIMESTAMP_ID = 10**15
"""Numeric ids from here on (16 digits) are timestamps in microseconds: of runs in both modes, and
of our metadata."""

FUTURE_ID_STEP = 1000
"""A run gets an id in the future if an earlier run of its flow, made while the clock was wrong, has
one. Such an id is a multiple of this, which shows that it does not say when the run was created."""

IdSortKey = tuple[bool, Id]
SortKey = tuple[int, Any]
"""The position of a record among its siblings, oldest first: its ts_epoch, and then something that
is unique among them, so that the order is total."""


def wire_id(name: str) -> Id:
    """A run or task id as it is sent to clients: a number if its folder's name is one."""
    if name.isascii() and name.isdigit() and (name[0] != "0" or name == "0"):
        return int(name)
    return name


def numeric_ids(names: Iterable[str]) -> Iterator[int]:
    """The numbers among some names: ids as the service and local mode give them."""
    return (int(name) for name in names if wire_id(name) != name)


def id_sort_key(identifier: Id) -> IdSortKey:
    """Sorts numbers by value and puts names after them, sorted by code point."""
    return (isinstance(identifier, str), identifier)


def run_sort_key(run: Run) -> SortKey:
    """Sorts the runs of a flow by when they were created, and then by id.

    A timestamp as id says when that was. To rely on it saves looking at the file, and also holds
    when local mode changes the tags of the run, which overwrites its ts_epoch. If the id may be in
    the future, the ts_epoch counts if it is earlier.
    """
    number = run["run_number"]
    if not isinstance(number, int) or number < MIN_TIMESTAMP_ID:
        return (run["ts_epoch"], id_sort_key(number))
    created = number // 1000
    if not is_certain_timestamp(number):
        created = min(created, run["ts_epoch"])
    return (created, id_sort_key(number))


def is_certain_timestamp(number: int) -> bool:
    """Whether a numeric run id is certain to say when the run was created."""
    return number >= MIN_TIMESTAMP_ID and number % FUTURE_ID_STEP != 0


def follows_from_id(key: SortKey) -> bool:
    """Whether the sort key of a run depends on its id alone, so that it never changes."""
    number = key[1][1]
    return isinstance(number, int) and number >= MIN_TIMESTAMP_ID and key[0] == number // 1000


def name_in_key(key: SortKey) -> str:
    """The name of the flow, run, step or task that has this sort key."""
    return str(key[1][1])


def flow_sort_key(flow: Flow) -> SortKey:
    return (flow["ts_epoch"], id_sort_key(flow["flow_id"]))


def task_sort_key(task: Task) -> SortKey:
    return (task["ts_epoch"], id_sort_key(task["task_id"]))


def step_sort_key(step: Step) -> SortKey:
    return (step["ts_epoch"], id_sort_key(step["step_name"]))


def artifact_sort_key(artifact: Artifact) -> SortKey:
    return (
        artifact["ts_epoch"],
        (id_sort_key(artifact["task_id"]), artifact["name"], artifact["step_name"]),
    )


def metadatum_sort_key(metadatum: Metadatum) -> SortKey:
    return (metadatum["ts_epoch"], metadatum["id"])


EntryT = TypeVar("EntryT", bound="tuple[Any, ...]")


def entries_before(entries: Sequence[EntryT], before: SortKey | None) -> Iterator[EntryT]:
    """The entries of a list, from the newest on; only those older than `before`, if given.

    The list is sorted, oldest first.
    """
    end = len(entries) if before is None else bisect.bisect_left(entries, before)
    return map(entries.__getitem__, range(end - 1, -1, -1))


class TimestampGenerator:
    """Gives timestamps in microseconds that increase even if the machine's clock does not."""

    def __init__(self, step: int = 1) -> None:
        """`step`: a timestamp that is not the current time is a multiple of this."""
        self._step = step
        self._lock = threading.Lock()
        self._last = 0  # guarded by _lock

    def next(self, after: int = 0) -> int:
        """The current time, or a later one if that is not above `after` and all that were given."""
        with self._lock:
            now, last = time.time_ns() // 1000, max(self._last, after)
            self._last = now if now > last else (last // self._step + 1) * self._step
            return self._last


# -- names of files --------------------------------------------------------------------------------

SELF_FILE = "_self.json"
HEARTBEAT_FILE = "_heartbeat"
"""Beside the record of a run or task. Its mtime is the time of the last heartbeat; that of the
first is in the record itself."""

# Patterns that are matched many times for a request are compiled here. The others are strings, and
# re compiles them when they are first used: to compile all would take 2 ms of every command.
METADATUM_FILE_NAME = re.compile(r"sysmeta_.*_([0-9]+)\.json", re.DOTALL)
ARTIFACT_FILE_NAME = re.compile(r"([0-9]+)_artifact_.*\.json", re.DOTALL)

NAME_BYTES = 255
DIGEST_NAME = re.compile(r".*~[0-9a-f]{32}", re.DOTALL)
"""What a file name has in place of a field's or artifact's name that cannot be part of it."""


def check_name(name: str) -> None:
    """Raise NotStorable if no flow, run, step or task can have a name, because no folder can."""
    if name in ("", ".", "..", META_DIR) or "/" in name or "\0" in name:
        raise NotStorable(f"{name!r} cannot be a name: it cannot name a folder.")
    try:
        if len(os.fsencode(name)) > NAME_BYTES:
            raise NotStorable(f"A name has at most {NAME_BYTES} bytes.")
    except UnicodeEncodeError:
        raise NotStorable(f"{name!r} cannot be a name: it is not valid Unicode.") from None


@lru_cache(maxsize=4096)  # takes 3 us, and a request needs the same few paths several times
def object_folder(ids: Ids) -> str:
    """The path of an object's folder, from the .metaflow on, with a slash before each name.

    NotStorable if there cannot be one.
    """
    for name in ids:
        check_name(name)
    return "".join(f"/{name}" for name in ids)


DATA_DIR = "data"
LATEST_RUN_FILE = "latest_run"
NAMES_BESIDE_RUNS = frozenset((DATA_DIR, LATEST_RUN_FILE))
"""What Metaflow keeps beside the runs of a flow: its artifacts, and the id of its newest run."""


def validate_client_id(identifier: str, kind: str) -> str:
    """Return an id that a client brings, or raise NotStorable if it cannot be used.

    It may be any name that is not a number, since the service gives those, nor in use otherwise.
    """
    if identifier.isnumeric():
        raise NotStorable(f"A {kind} id that the client brings must not be a number.")
    if kind == "run" and identifier in NAMES_BESIDE_RUNS:
        raise NotStorable(f"No run can be called {identifier!r}: Metaflow uses that name itself.")
    try:
        identifier.encode()  # a file name may have surrogates in it, a path of a request may not
    except UnicodeEncodeError:
        raise NotStorable(f"{identifier!r} cannot be a name: it is not valid Unicode.") from None
    check_name(identifier)
    return identifier


def metadatum_file_name(field_name: str, timestamp: int) -> str:
    return encode_file_name("sysmeta_", field_name, f"_{timestamp}.json")


def artifact_file_name(attempt: int, name: str) -> str:
    return encode_file_name(f"{attempt}_artifact_", name, ".json")


def encode_file_name(prefix: str, name: str, suffix: str) -> str:
    """A file name that contains the name of a field or artifact, which may be any text.

    The name is left as it is wherever local mode could have written it, so that each mode finds the
    files of the other. Otherwise its beginning is quoted and a digest of the whole follows, so that
    no two names share a file.
    """
    encoded = name.encode("utf-8", "surrogatepass")
    is_short = len(prefix) + len(encoded) + len(suffix) <= NAME_BYTES
    if is_short and "/" not in name and "\0" not in name and not DIGEST_NAME.fullmatch(name):
        try:
            name.encode()  # fails if there are surrogates, which not every file system takes
            return prefix + name + suffix
        except UnicodeEncodeError:
            pass
    return f"{prefix}{urllib.parse.quote(encoded, safe='')[:80]}~{digest(encoded, 16)}{suffix}"


@lru_cache(maxsize=256)
def metadatum_prefixes(field_names: tuple[str, ...]) -> frozenset[str]:
    """What precedes the timestamp in the file names of these fields, both ours and local mode's."""
    ours = (metadatum_file_name(name, MIN_TIMESTAMP_ID).rpartition("_")[0] for name in field_names)
    return frozenset(itertools.chain(ours, (f"sysmeta_{name}" for name in field_names)))


def digest(content: bytes, size: int) -> str:
    """A digest of `size` bytes, in hexadecimal digits."""
    from hashlib import blake2b

    return blake2b(content, digest_size=size).hexdigest()


def metadatum_id(ids: Ids) -> int:
    """The id of the metadatum in the file `ids[4]` of a task, a number unique in the root.

    It is the timestamp in the file's name if that is in microseconds, as ours are. Local mode's are
    in milliseconds, and several files may have the same; their id is a digest of the path, which is
    always smaller than a timestamp.
    """
    match = METADATUM_FILE_NAME.fullmatch(ids[4])
    timestamp = int(match.group(1)) if match else 0
    if timestamp >= MIN_TIMESTAMP_ID:
        return timestamp
    return int(digest("/".join(ids).encode("utf-8", "surrogatepass"), 6), 16)


# -- parsing records -------------------------------------------------------------------------------

RecordParser = Callable[[Ids, RawRecord], T]
"""Makes a record of its ids and of what its file contains. It raises whatever Python raises for
data of the wrong shape; `Store._load_record` takes that as the sign that the file contains no
record."""


LARGEST_ATTEMPT = 32767
"""The reference keeps attempts in a smallint of PostgreSQL's."""

LATEST_TS_EPOCH = 2**53
"""In milliseconds. Times beyond that cannot be told exactly in JSON, nor be written as a date."""


def parse_ts_epoch(raw: RawRecord) -> int:
    """The ts_epoch of a record. ValueError if it is no time that can be shown."""
    value = raw["ts_epoch"]
    if not isinstance(value, int) or abs(value) > LATEST_TS_EPOCH:
        raise ValueError("its ts_epoch is not a number of milliseconds")
    return value


def read_optional_text(raw: RawRecord, field: str) -> str | None:
    """A text or null of a record. ValueError if the field is neither."""
    value = raw.get(field)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"its {field} is not text")
    return value


def read_user(raw: RawRecord) -> str | None:
    """The user of a record, as one text for all of theirs, which saves 55 bytes for each."""
    name = read_optional_text(raw, "user_name")
    return None if name is None else sys.intern(name)


def read_text(raw: RawRecord, field: str) -> str:
    """A text of a record. ValueError if the field is none."""
    value = raw[field]
    if not isinstance(value, str):
        raise ValueError(f"its {field} is not text")
    return value


def read_tags(raw: RawRecord, field: str) -> Tags:
    """The tags of a record. ValueError if they are not a list of text."""
    value = raw.get(field)
    if value is not None and not is_text_list(value):
        raise ValueError(f"its {field} are not a list of text")
    return cast(Tags, value)


def is_text_list(value: object) -> bool:
    return isinstance(value, list) and {*map(type, value)} <= {str}


def read_heartbeat(raw: RawRecord) -> int | None:
    """The epoch seconds of the last heartbeat, if a record has them."""
    value = raw.get("last_heartbeat_ts")
    return value if isinstance(value, int) else None


def read_value(raw: RawRecord) -> MetadatumValue:
    """The value of a metadatum; what is neither text, a list of text nor null, as JSON."""
    value = raw["value"]
    if value is None or isinstance(value, str) or is_text_list(value):
        return cast(MetadatumValue, value)
    return json.dumps(value)


def read_attempt(raw: RawRecord) -> int:
    """The number of an attempt, which some clients send as text. ValueError if it is none."""
    attempt = int(raw["attempt_id"])
    if not 0 <= attempt <= LARGEST_ATTEMPT:
        raise ValueError("its attempt_id is not that of an attempt")
    return attempt


def shared_tags(tags: Tags) -> Tags:
    """These tags as one list for all runs with equal ones, which saves 400 bytes for each run."""
    return None if tags is None else shared_list(*tags)


@lru_cache(maxsize=256)
def shared_list(*texts: str) -> list[str]:
    """A list of some texts, the same one at every call."""
    return list(texts)


def parse_flow_record(ids: Ids, raw: RawRecord) -> Flow:
    return {
        "flow_id": ids[0],
        "user_name": read_user(raw),
        "ts_epoch": parse_ts_epoch(raw),
        "tags": read_tags(raw, "tags"),
        "system_tags": read_tags(raw, "system_tags"),
    }


def parse_run_record(ids: Ids, raw: RawRecord) -> Run:
    run: Run = {
        "flow_id": sys.intern(ids[0]),
        "run_number": wire_id(ids[1]),
        "user_name": read_user(raw),
        "ts_epoch": parse_ts_epoch(raw),
        "tags": shared_tags(read_tags(raw, "tags")),
        "system_tags": shared_tags(read_tags(raw, "system_tags")),
        "last_heartbeat_ts": read_heartbeat(raw),
    }
    if run["user_name"] and f"user:{run['user_name']}" in (run["system_tags"] or ()):
        run["user"] = run["user_name"]
    return run


def parse_step_record(ids: Ids, raw: RawRecord) -> Step:
    return {
        "flow_id": ids[0],
        "run_number": ids[1],
        "step_name": ids[2],
        "user_name": read_user(raw),
        "ts_epoch": parse_ts_epoch(raw),
        "tags": None,
        "system_tags": None,
    }


def parse_task_record(ids: Ids, raw: RawRecord) -> Task:
    return {
        "flow_id": sys.intern(ids[0]),
        "run_number": wire_id(ids[1]),
        "step_name": sys.intern(ids[2]),
        "task_id": wire_id(ids[3]),
        "user_name": read_user(raw),
        "ts_epoch": parse_ts_epoch(raw),
        "tags": None,
        "system_tags": None,
        "last_heartbeat_ts": read_heartbeat(raw),
    }


def parse_metadatum_record(ids: Ids, raw: RawRecord) -> Metadatum:
    return {
        "id": metadatum_id(ids),
        "flow_id": ids[0],
        "run_number": wire_id(ids[1]),
        "step_name": ids[2],
        "task_id": wire_id(ids[3]),
        "field_name": read_text(raw, "field_name"),
        "value": read_value(raw),
        "type": read_text(raw, "type"),
        "user_name": read_user(raw),
        "ts_epoch": parse_ts_epoch(raw),
        "tags": read_tags(raw, "tags"),
        "system_tags": read_tags(raw, "system_tags"),
    }


def parse_artifact_record(ids: Ids, raw: RawRecord) -> Artifact:
    return {
        "flow_id": ids[0],
        "run_number": wire_id(ids[1]),
        "step_name": ids[2],
        "task_id": wire_id(ids[3]),
        "name": read_text(raw, "name"),
        "location": read_text(raw, "location"),
        "ds_type": read_text(raw, "ds_type"),
        "sha": read_optional_text(raw, "sha"),
        "type": read_optional_text(raw, "type"),
        "content_type": read_optional_text(raw, "content_type"),
        "user_name": read_user(raw),
        "attempt_id": read_attempt(raw),
        "ts_epoch": parse_ts_epoch(raw),
        "tags": None,
        "system_tags": None,
    }


def run_tags(run: Run) -> RunTags:
    return {"tags": run["tags"], "system_tags": run["system_tags"]}


def add_labels(raw: RawRecord, labels: Labels, ts_epoch: int) -> RawRecord:
    """Set what a client gave in a record that local mode's code has made, and return it.

    Tags that were not given are left out, which local mode reads as none. It fails at a null.
    """
    raw.update(user_name=labels.user_name, ts_epoch=ts_epoch)
    for key, tags in (("tags", labels.tags), ("system_tags", labels.system_tags)):
        raw.pop(key, None)
        if tags is not None:
            raw[key] = tags
    return raw


# -- reading files ---------------------------------------------------------------------------------

MISSING_ERRNOS = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP))
"""Errors of a path that leads nowhere: through a file, or in a circle of symbolic links."""

UNREADABLE_ERRNOS = frozenset((errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP))
"""Errors that come from one file, and not from the state of the machine."""

Version = int
"""The mtime, the inode and, in the last 64 bits, the size. A tuple of them would take 110 bytes
more, and there are three or more versions in memory for each task."""

FolderVersion = tuple[str, Optional[Version]]
"""The path of a folder, and the version that it had; None if that was not settled."""

FolderVersions = list[FolderVersion]

SETTLED_NS = 2_000_000_000
"""Two changes of a folder less than this apart may leave the same mtime, since there are file
systems whose clock ticks every two seconds."""


def file_version(status: os.stat_result) -> Version:
    return (status.st_mtime_ns << 64 | status.st_ino) << 64 | status.st_size


def settled_version(status: os.stat_result) -> Version | None:
    """The version of a folder; None if the folder may change without getting a new one.

    The status must be that of now.
    """
    is_settled = time.time_ns() - status.st_mtime_ns > SETTLED_NS
    return file_version(status) if is_settled else None


def is_version(version: Version | None, path: str, folder: int | None = None) -> bool:
    """Whether a file or folder has a version. A path may be relative to `folder`, a descriptor."""
    try:
        return file_version(os.stat(path, dir_fd=folder)) == version
    except OSError:
        return False


def are_unchanged(folders: FolderVersions) -> bool:
    """Whether these folders, given by their paths, still have the versions that they had."""
    return all(is_version(version, path) for path, version in folders)


def unless_missing(call: Callable[..., T], *arguments: Any) -> T | None:
    """What a function returns, or None if it finds that a file or folder does not exist."""
    try:
        return call(*arguments)
    except OSError as error:
        if error.errno not in MISSING_ERRNOS:
            raise
        return None


def stat_or_none(path: str) -> os.stat_result | None:
    """The status of a file or folder, or None if there is none."""
    return unless_missing(os.stat, path)


def list_folders(folder: str) -> list[str]:
    """The names of the folders in an object's folder, without the one for its own records."""
    with os.scandir(folder) as entries:
        return [e.name for e in entries if is_folder(e) and e.name != META_DIR]


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one. A link that leads to itself is not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


# -- writing files ---------------------------------------------------------------------------------

NO_TMPFILE_ERRNOS = frozenset(
    (
        errno.EOPNOTSUPP,
        errno.EISDIR,
        errno.EINVAL,
        errno.ENOENT,
        errno.EXDEV,
        errno.EACCES,
        errno.EPERM,
    )
)
"""Errors of systems that have no files without names, or cannot link them for want of /proc."""


@contextlib.contextmanager
def writable_folder(path: str) -> Iterator[int]:
    """A descriptor of a folder to write in. NotStorable if the path goes through a symbolic link.

    Writing by names relative to an open folder takes a sixth less time than by paths, and the path
    is checked once for all of them.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if is_behind_link(descriptor, path):
            raise NotStorable(f"{path} is behind a symbolic link, and nothing is written there.")
        yield descriptor
    finally:
        os.close(descriptor)


def is_behind_link(descriptor: int, path: str) -> bool:
    """Whether the path by which a folder has been opened goes through a symbolic link."""
    try:
        if os.readlink(f"/proc/self/fd/{descriptor}") == path:
            return False
    except OSError:
        pass  # there is no /proc, or the folder has no path any more
    return os.path.realpath(path) != path


def make_folder(parent: int, name: str) -> bool:
    """Make a private folder in an open one. False if the name is taken, by whatever it may be."""
    try:
        os.mkdir(name, 0o700, dir_fd=parent)
        return True
    except FileExistsError:
        return False


def ensure_folder(parent: int, name: str) -> bool:
    """Make a private folder in an open one unless there is one; return whether it was made.

    NotStorable if there is a file or link of that name.
    """
    if make_folder(parent, name):
        return True
    if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
        raise NotStorable(f"{os.path.basename(name)!r} cannot be used: it is a file or link.")
    return False


def create_files(folder: int, records: Mapping[str, RawRecord]) -> list[str]:
    """Write new records into an open folder, and return which names were taken.

    If one cannot be written, none is there afterwards; only a crash may leave some of them. A file
    that has one of the names is left alone. As in local mode, nobody waits until the records are on
    the disk: a flow would have to do so at every step.
    """
    created: list[str] = []
    taken: list[str] = []
    try:
        for name, raw in records.items():
            is_taken = create_file(folder, name, raw) is None
            (taken if is_taken else created).append(name)
    except OSError:
        remove_files(folder, created)
        raise
    return taken


def create_file(folder: int, name: str, raw: RawRecord) -> Version | None:
    """Make a private file that has its whole record once it has its name, and return its version.

    The name is relative to `folder`, a descriptor. None if it is taken, by whatever it may be.

    The file has no name until then if the system can do that. On ext4 this takes a fifth less of
    the processor than a temporary name does, it finds out whether the name is free, and it leaves
    nothing behind when the service is killed.
    """
    content = json.dumps(raw).encode()
    try:
        return create_unnamed_file(folder, name, content)
    except FileExistsError:
        return None
    except OSError as error:
        if error.errno not in NO_TMPFILE_ERRNOS:
            raise
    return None if exists(folder, name) else rename_into_place(folder, name, content)


def create_unnamed_file(folder: int, name: str, content: bytes) -> Version:
    """Write a file that has no name, and then link it to one. FileExistsError if that is taken."""
    if not hasattr(os, "O_TMPFILE"):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    parent = name.rpartition("/")[0] or "."
    descriptor = os.open(parent, os.O_TMPFILE | os.O_WRONLY, 0o600, dir_fd=folder)
    try:
        write_all(descriptor, content)
        os.link(f"/proc/self/fd/{descriptor}", name, dst_dir_fd=folder, follow_symlinks=True)
        return file_version(os.fstat(descriptor))
    finally:
        os.close(descriptor)


def replace_file(folder: int, name: str, raw: RawRecord) -> Version:
    """Replace a record below an open folder by another, which is on the disk first.

    So a crash of the machine leaves one of the two. Returns the version of the new file.
    """
    version = rename_into_place(folder, name, json.dumps(raw).encode(), is_synced=True)
    os.fsync(folder)
    return version


def rename_into_place(folder: int, name: str, content: bytes, is_synced: bool = False) -> Version:
    """Write a file with a temporary name, and then rename it, which replaces what has that name.

    Returns the version of the file.
    """
    temporary = os.path.join(os.path.dirname(name), temporary_name())
    try:
        version = write_file(folder, temporary, content, is_synced)
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        return version
    except OSError:
        remove_files(folder, [temporary])
        raise


def temporary_name() -> str:
    """A file name that no other thread uses now, and that no earlier service has left behind."""
    return f"{TEMPORARY}{time.time_ns()}-{threading.get_ident()}"


def write_file(folder: int, name: str, content: bytes, is_synced: bool = False) -> Version:
    """Make a private file in an open folder, and return its version.

    With `is_synced`, it is on the disk by then.
    """
    descriptor = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600, dir_fd=folder)
    try:
        write_all(descriptor, content)
        if is_synced:
            os.fsync(descriptor)
        return file_version(os.fstat(descriptor))
    finally:
        os.close(descriptor)


def write_all(descriptor: int, content: bytes) -> None:
    """Write to a file at once. OSError if only a part could be written, as on a full disk."""
    if os.write(descriptor, content) != len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def exists(folder: int, name: str) -> bool:
    """Whether there is anything of a name in an open folder, even a link that leads nowhere."""
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
        return True
    except FileNotFoundError:
        return False


def remove_folder(parent: int, name: str) -> None:
    """Remove a folder from an open one if it is empty."""
    with contextlib.suppress(OSError):
        os.rmdir(name, dir_fd=parent)


def remove_files(folder: int, names: Iterable[str]) -> None:
    """Remove those of the files that there are in an open folder."""
    for name in names:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=folder)


def remove_file(path: str) -> None:
    """Remove a file if there is one."""
    with contextlib.suppress(OSError):
        os.unlink(path)


# -- caches ----------------------------------------------------------------------------------------

RECORDS_IN_MEMORY = 26 * 2**20  # all these are bytes, about
LISTINGS_IN_MEMORY = 3 * 2**20
TASK_FILES_IN_MEMORY = 6 * 2**20
VALUES_IN_MEMORY = 3 * 2**20
INDEXES_IN_MEMORY = 4 * 2**20
NUMBERS_IN_MEMORY = 2**19
STEP_FOLDERS_IN_MEMORY = 2**19
"""Enough for a run of 10,000 tasks and a list of 10,000 runs. A list that is longer than its cache
is read from the disk each time: 10,000 runs take 0.2 s then, in place of 0.07."""

BATCH_SIZE = 50
"""How many records of a list are read at a time. Pages have 50 or 100, and take one record more to
see whether there is another page, which is why the first batch has one."""

PAGING_SECONDS = 30.0
"""For this long, the pages after the first are taken from the same index without a look at the
folders of all its tasks. What has been added since belongs on pages before them anyway."""


class Cache(dict[str, T]):
    """A dict that forgets its oldest entries when all together take more memory than a limit.

    The newest stays, whatever it takes: a long list must not be made again for each of its pages.
    """

    def __init__(self, limit: int, weigh: Callable[[T], int]) -> None:
        """`limit`: bytes; `weigh`: returns about how many of them an entry takes."""
        super().__init__()
        self._limit = limit
        self._weigh = weigh
        self._weight = 0
        self._lock = threading.Lock()  # guards every change; readers need none

    def put(self, key: str, value: T) -> None:
        with self._lock:
            self._evict(key)
            self[key] = value
            self._weight += self._weigh(value)
            while self._weight > self._limit and len(self) > 1:
                self._evict(next(iter(self)))

    def modify(self, key: str, change: Callable[[T], T]) -> T | None:
        """Replace a value by what `change` makes of it, and return that; None if it is not there.

        The new value must weigh the same.
        """
        with self._lock:
            if key not in self:
                return None
            self[key] = change(self[key])
            return self[key]

    def _evict(self, key: str) -> None:
        if key in self:
            self._weight -= self._weigh(self.pop(key))


class CachedRecord(NamedTuple):
    """What a file contained."""

    version: Version
    record: Any  # None if there was no record in the file
    folder_version: Version | None = None  # of the file's folder, if that vouches for the file

    def weight(self) -> int:
        """About how many bytes it takes: the fields and the JSON of a record, and its path."""
        size = self.version % 2**64
        return 540 + 2 * size

    def with_fields(self, fields: Mapping[str, Any]) -> CachedRecord:
        """The same with other values of some fields of the record, if there is one."""
        if self.record is None:
            return self
        return self._replace(record=Record({**self.record, **fields}))


class Listing(NamedTuple):
    """The children of an object."""

    version: Version | None  # of the object's folder, if settled
    sort_keys: list[SortKey]  # oldest first; each contains the child's name
    unrecorded: list[str]  # the names of folders that have no record so far

    def weight(self) -> int:
        return 500 + 190 * len(self.sort_keys) + 80 * len(self.unrecorded)


NO_CHILDREN = Listing(None, [], [])

DatedFile = tuple[int, int, str]
"""A file with a metadatum: its ts_epoch, its id, and the name of the file."""


class TaskFiles(NamedTuple):
    """The names of the files in the _meta folder of a task, by what they hold."""

    version: Version | None  # of the folder, if settled
    folder: str
    has_record: bool
    metadata: list[DatedFile]  # oldest first
    undated: list[str]  # other metadata, as local mode names them: the ts_epoch is in the file
    artifacts: dict[int, list[str]]  # by attempt

    @classmethod
    def from_names(cls, version: Version | None, folder: str, names: Sequence[str]) -> TaskFiles:
        """Sort the names in the folder into those of metadata and of artifacts."""
        metadata: list[DatedFile] = []
        undated: list[str] = []
        artifacts: dict[int, list[str]] = {}
        for name in names:
            if artifact := ARTIFACT_FILE_NAME.fullmatch(name):
                artifacts.setdefault(int(artifact.group(1)), []).append(name)
            elif metadatum := METADATUM_FILE_NAME.fullmatch(name):
                timestamp = int(metadatum.group(1))
                if timestamp >= MIN_TIMESTAMP_ID:
                    metadata.append((timestamp // 1000, timestamp, name))
                else:
                    undated.append(name)
        metadata.sort()
        return cls(version, folder, SELF_FILE in names, metadata, undated, artifacts)

    def folder_version(self) -> FolderVersion:
        return self.folder, self.version

    def latest_attempt(self) -> int:
        """The latest attempt that has artifacts; 0 if none has."""
        return max(self.artifacts, default=0)

    def weight(self) -> int:
        artifacts = sum(map(len, self.artifacts.values()))
        return 700 + 220 * len(self.metadata) + 100 * (len(self.undated) + artifacts)


class TaskValues(NamedTuple):
    """What a task says in its metadata of one field."""

    version: Version | None  # of its _meta folder, if settled
    texts: tuple[str, ...]


def values_weight(values: Mapping[str, TaskValues]) -> int:
    """About how many bytes the values of a step's tasks take in memory."""
    return sum(200 + sum(map(len, of_task.texts)) for of_task in values.values())


IndexEntry = tuple[int, Any, Ids, FolderVersion, str]
"""A metadatum or artifact: its sort key (two values), the ids of its task, the folder that it is in
(one for all entries of the task), and the name of its file."""


class RecordIndex(NamedTuple):
    """A list of the metadata or artifacts of several tasks."""

    verified_at: float  # monotonic seconds
    folders: FolderVersions  # of all folders that it was made from
    entries: list[IndexEntry]  # oldest first

    def weight(self) -> int:
        return 300 + 400 * len(self.folders) + 250 * len(self.entries)


# -- reading long lists ----------------------------------------------------------------------------


class LongReads:
    """Has long lists read in turn, and lets those share one who wait for the same.

    Threads that make system calls at the same time hand Python's lock around at each of them: 8
    that list 1,000 runs take 25 ms of the processor for each list, and in turn only 8 ms. All tasks
    of a foreach may ask the same at the same time.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._awaited: dict[object, list[Any]] = {}  # by what is to be read; empty until it is

    def read(self, key: object, read: Callable[[], T]) -> T:
        """What `read` returns, or what it returns to another thread that asks for the same key.

        In any case it is called after this was, and so misses nothing that there is by now.
        """
        shared = self._awaited.setdefault(key, [])
        with self._turn:
            if not shared:
                self._awaited.pop(key, None)  # who asks from now on has to wait for the next one
                shared.append(read())
            found: T = shared[0]
            return found


# -- the store -------------------------------------------------------------------------------------


def local_metadata_provider(root: str) -> Any:
    """Metaflow's LocalMetadataProvider, set to the .metaflow in `root`.

    This is the only place that knows Metaflow's versions: the class was moved in 2.12.29. The
    import takes most of a second, and so nothing else imports Metaflow.
    """
    try:
        from metaflow.plugins.metadata_providers.local import LocalMetadataProvider
    except ImportError:
        from metaflow.plugins.metadata.local import LocalMetadataProvider
    LocalMetadataProvider.INFO = root
    return LocalMetadataProvider


class Store:
    """The records of one root.

    Any thread may call any method. When a method that writes returns, its records are in their
    files. What a method that reads returns may be the cached record, which must not be changed.
    Lists are newest first, and their `before` is a sort key: only what is older than that follows.
    """

    def __init__(self, root: str) -> None:
        """Open the .metaflow in `root`, which must exist."""
        self._root = root
        self.folder = os.path.realpath(os.path.join(root, DATASTORE_DIR))
        self._provider_class: Any = None  # None until something is to be written
        # The caches; the head of this layer says by what each is keyed.
        self._records = Cache(RECORDS_IN_MEMORY, CachedRecord.weight)
        self._listings = Cache(LISTINGS_IN_MEMORY, Listing.weight)
        self._task_files = Cache(TASK_FILES_IN_MEMORY, TaskFiles.weight)
        self._task_values = Cache(VALUES_IN_MEMORY, values_weight)
        self._indexes = Cache(INDEXES_IN_MEMORY, RecordIndex.weight)
        self._last_task_ids: Cache[int] = Cache(NUMBERS_IN_MEMORY, lambda number: 250)
        self._step_folders: Cache[tuple[Version | None, list[str]]] = Cache(
            STEP_FOLDERS_IN_MEMORY, lambda known: 400 + 80 * len(known[1])
        )
        self._newest_runs: dict[str, int] = {}
        self._writing = threading.Lock()
        self.long_reads = LongReads()
        self._run_timestamps = TimestampGenerator(FUTURE_ID_STEP)
        self._metadatum_timestamps = TimestampGenerator()

    def prepare_to_write(self) -> None:
        """Import Metaflow, which otherwise the first write does."""
        self._provider_class = local_metadata_provider(self._root)

    # -- objects ---------------------------------------------------------------------------------

    def flow(self, ids: Ids) -> Flow | None:
        return self._read_object(ids, parse_flow_record)

    def run(self, ids: Ids) -> Run | None:
        return self._read_object(ids, parse_run_record)

    def step(self, ids: Ids) -> Step | None:
        run = self._read_object(ids[:2], parse_run_record)
        step = self._read_object(ids, parse_step_record)
        return {**step, **run_tags(run)} if run and step else None

    def task(self, ids: Ids) -> Task | None:
        run = self._read_object(ids[:2], parse_run_record)
        task = self._read_object(ids, parse_task_record)
        return {**task, **run_tags(run)} if run and task else None

    def flows(self, before: SortKey | None = None) -> Iterator[Flow]:
        """All flows, newest first."""
        return self._read_children((), parse_flow_record, before)

    def runs(self, ids: Ids, before: SortKey | None = None) -> Iterator[Run]:
        """The runs of a flow, newest first."""
        return self._read_children(ids, parse_run_record, before)

    def steps(self, ids: Ids, before: SortKey | None = None) -> Iterator[Step]:
        """The steps of a run, newest first."""
        run = self._read_object(ids, parse_run_record)
        if run is not None:
            yield from self._read_children(ids, parse_step_record, before, run_tags(run))

    def tasks(self, ids: Ids, before: SortKey | None = None) -> Iterator[Task]:
        """The tasks of a step, newest first."""
        run = self._read_object(ids[:2], parse_run_record)
        if run is not None:
            yield from self._read_children(ids, parse_task_record, before, run_tags(run))

    def run_ids(self) -> Iterator[Ids]:
        """The ids of all runs, in no particular order."""
        for flow_key in self._list_children((), parse_flow_record).sort_keys:
            flow = (name_in_key(flow_key),)
            for run_key in self._list_children(flow, parse_run_record).sort_keys:
                yield (*flow, name_in_key(run_key))

    def task_ids(self, step: Ids) -> list[Ids]:
        """The ids of the tasks of a step, oldest first."""
        return self.list_below(step)[1]

    def list_below(self, ids: Ids) -> tuple[Version | None, list[Ids]]:
        """The version that vouches for the children of a run or step, and their ids, oldest first.

        The version is None if it is not settled.
        """
        parse = parse_step_record if len(ids) == RUN_DEPTH else parse_task_record
        listing = self._list_children(ids, parse)
        return listing.version, [(*ids, name_in_key(key)) for key in listing.sort_keys]

    def read_tasks(self, run: Ids, tasks: Collection[Ids]) -> Iterator[Task]:
        """The tasks of a run that have these ids, as far as they exist."""
        run_record = self._read_object(run, parse_run_record) if tasks else None
        if run_record is not None:
            tags = run_tags(run_record)
            for ids in tasks:
                task = self._read_object(ids, parse_task_record)
                if task is not None:
                    yield self._with_tags(self._self_path(ids), task, tags)

    def version(self, ids: Ids) -> Version | None:
        """The version of an object, which changes when children of it are added or removed.

        That of a task changes with its metadata and artifacts. None if it is not settled, or if
        there is no such object.
        """
        status = stat_or_none(self.versioned_folder(ids))
        return None if status is None else settled_version(status)

    def versioned_folder(self, ids: Ids) -> str:
        """The path of the folder whose version is that of an object."""
        return self._meta_path(ids) if len(ids) == TASK_DEPTH else self._folder_path(ids)

    def _folder_path(self, ids: Ids) -> str:
        """The folder of an object. NotStorable if there cannot be one."""
        return self.folder + object_folder(ids)

    def _meta_path(self, ids: Ids) -> str:
        return f"{self._folder_path(ids)}/{META_DIR}"

    def _self_path(self, ids: Ids) -> str:
        return f"{self._folder_path(ids)}/{META_DIR}/{SELF_FILE}"

    def _look(self, call: Callable[..., T], *arguments: Any) -> T | None:
        """What a function returns, or None if it finds that a file or folder does not exist."""
        found = unless_missing(call, *arguments)
        if found is None:
            self._require_root()
        return found

    def _require_root(self) -> None:
        """Raise FileNotFoundError if the whole root is gone, and not just something in it."""
        os.stat(self.folder)

    def _read_object(self, ids: Ids, parse: RecordParser[T]) -> T | None:
        """The record of a flow, run, step or task, as it is cached, without tags of its run."""
        return self._read_record(self._self_path(ids), ids, parse)

    def _read_record(self, path: str, ids: Ids, parse: RecordParser[T]) -> T | None:
        """The record that is in a file now; None if there is none.

        If there is something else, that is logged.
        """
        try:
            status = os.stat(path)
            version = file_version(status)
            cached = self._records.get(path)
            if cached is None or cached.version != version:
                if not stat.S_ISREG(status.st_mode):
                    raise IsADirectoryError(errno.EISDIR, "It is no file", path)
                cached = CachedRecord(version, self._load_record(path, ids, parse))
                self._records.put(path, cached)
            record: T | None = cached.record
            return record
        except (FileNotFoundError, NotADirectoryError):
            self._require_root()
            return None
        except OSError as error:
            if error.errno not in UNREADABLE_ERRNOS:
                raise
            logger().warning("%s cannot be read and is left out: %s", path, error)
            return None  # this is not cached: the file may be readable the next time

    def _load_record(self, path: str, ids: Ids, parse: RecordParser[T]) -> T | None:
        try:
            with open(path, "rb", buffering=0) as f:
                record = Record(cast("dict[str, Any]", parse(ids, json.loads(f.read()))))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            name = type(error).__name__
            logger().warning("%s is not a record and is left out: %s: %s", path, name, error)
            return None
        if "last_heartbeat_ts" in record:
            heartbeat = stat_or_none(os.path.join(os.path.dirname(path), HEARTBEAT_FILE))
            if heartbeat is not None:
                record["last_heartbeat_ts"] = int(heartbeat.st_mtime)
        return cast(T, record)

    def _read_children(
        self,
        ids: Ids,
        parse: RecordParser[T],
        before: SortKey | None = None,
        tags: RunTags | None = None,
    ) -> Iterator[T]:
        """The records of the children of an object, newest first; with the tags, if given.

        They are read in batches: the newest alone, which is often all that is wanted, and then so
        many at a time as a page has. No descriptor is open in between.
        """
        keys = entries_before(self._list_children(ids, parse).sort_keys, before)
        size = 1
        while names := list(map(name_in_key, itertools.islice(keys, size))):
            yield from self._read_batch(ids, names, parse, tags)
            size = BATCH_SIZE

    def _read_batch(
        self, ids: Ids, names: Iterable[str], parse: RecordParser[T], tags: RunTags | None
    ) -> list[T]:
        """The records of those children of an object that exist, in the order of their names.

        They are looked at by paths relative to the open folder, and cached ones right here: with
        whole paths and a call of _read_record for each, a list takes a third longer.
        """
        folder, records = self._folder_path(ids), []
        start = len(folder) + 1
        descriptor = self._look(os.open, folder, os.O_RDONLY | os.O_DIRECTORY)
        if descriptor is None:
            return []
        try:
            for name in names:
                path = f"{folder}/{name}/{META_DIR}/{SELF_FILE}"
                cached = self._records.get(path)
                if cached is not None and is_version(cached.version, path[start:], descriptor):
                    record = cached.record
                else:
                    record = self._read_record(path, (*ids, name), parse)
                if record is not None:
                    records.append(record if tags is None else self._with_tags(path, record, tags))
        finally:
            os.close(descriptor)
        return records

    def _list_children(self, ids: Ids, parse: RecordParser[Any]) -> Listing:
        """The children of an object, as they are now."""
        folder = self._folder_path(ids)
        status = self._look(os.stat, folder)
        if status is None:
            return NO_CHILDREN
        cached = self._listings.get(folder, NO_CHILDREN)
        if cached.version == file_version(status) and not any(
            self._read_object((*ids, name), parse) for name in cached.unrecorded
        ):
            return cached
        version = settled_version(status)
        names = self._look(list_folders, folder)
        if names is None:
            return NO_CHILDREN
        sort_keys, unrecorded = [], []
        for name in names:
            key = self._child_sort_key((*ids, name), parse)
            if key is None:
                unrecorded.append(name)
            else:
                sort_keys.append(key)
        if len(ids) + 1 == RUN_DEPTH and not all(map(follows_from_id, sort_keys)):
            version = None  # local mode changes the ts_epoch of a run along with its tags
        listing = Listing(version, sorted(sort_keys), unrecorded)
        self._listings.put(folder, listing)
        return listing

    def _child_sort_key(self, ids: Ids, parse: RecordParser[Any]) -> SortKey | None:
        """The sort key of an object; None if it has no record.

        A run whose id is certain to say when it was created is not looked at: see run_sort_key.
        """
        name, is_run = ids[-1], len(ids) == RUN_DEPTH
        identifier = wire_id(name) if len(ids) in (RUN_DEPTH, TASK_DEPTH) else name
        if is_run and isinstance(identifier, int) and is_certain_timestamp(identifier):
            return (identifier // 1000, id_sort_key(identifier))
        record = self._read_object(ids, parse)
        if record is None:
            return None
        return run_sort_key(record) if is_run else (record["ts_epoch"], id_sort_key(identifier))

    # -- metadata and artifacts ------------------------------------------------------------------

    def metadata(
        self, ids: Ids, before: SortKey | None = None, fields: tuple[str, ...] | None = None
    ) -> Iterator[Metadatum]:
        """The metadata of all attempts of a task, newest first; only of `fields`, if given."""
        prefixes = None if fields is None else metadatum_prefixes(fields)
        return self._read_metadata(self._list_task_files(ids), ids, before, prefixes)

    def artifacts(self, ids: Ids, attempt: int | None = None) -> list[Artifact]:
        """The artifacts of an attempt of a task, newest first.

        If no attempt is given, it is the latest one that has artifacts.
        """
        run, files = self._read_object(ids[:2], parse_run_record), self._list_task_files(ids)
        if run is None or not files.artifacts:
            return []
        names = files.artifacts.get(files.latest_attempt() if attempt is None else attempt, ())
        tags = run_tags(run)
        found = (
            self._read_task_file(files.folder_version(), name, ids, parse_artifact_record, tags)
            for name in names
        )
        return sorted(
            (artifact for artifact in found if artifact is not None),
            key=artifact_sort_key,
            reverse=True,
        )

    def artifact(self, ids: Ids, name: str, attempt: int | None = None) -> Artifact | None:
        """An artifact of an attempt of a task.

        If no attempt is given, it is the latest one that has artifacts, whichever these are.
        """
        files = self._list_task_files(ids)
        if attempt is None:
            attempt = files.latest_attempt()
        file_name = artifact_file_name(attempt, name)
        if file_name not in files.artifacts.get(attempt, ()):
            return None
        run = self._read_object(ids[:2], parse_run_record)
        if run is None:
            return None
        return self._read_task_file(
            files.folder_version(), file_name, ids, parse_artifact_record, run_tags(run)
        )

    def attempts_with_artifacts(self, ids: Ids) -> list[int]:
        """The attempts of a task that have artifacts, in no particular order."""
        return list(self._list_task_files(ids).artifacts)

    def values_of_tasks(
        self, step: Ids, field: str | None, convert: Callable[[Metadatum], str]
    ) -> dict[str, TaskValues]:
        """What each task of a step says in its metadata of a field, by task id, oldest task first.

        `field`: None stands for all fields. `convert` makes a text of a metadatum. Tasks whose
        folder has not changed are not read again.
        """
        tasks = self._list_children(step, parse_task_record).sort_keys
        if not tasks:
            return {}
        folder = self._folder_path(step)
        cache_key = repr((folder, field))
        cached, values = self._task_values.get(cache_key, {}), {}
        descriptor = self._look(os.open, folder, os.O_RDONLY | os.O_DIRECTORY)
        if descriptor is None:
            return {}
        try:
            for name in map(name_in_key, tasks):
                of_task = cached.get(name)
                meta = f"{name}/{META_DIR}"
                if of_task is None or not is_version(of_task.version, meta, descriptor):
                    of_task = self._read_values((*step, name), field, convert)
                values[name] = of_task
        finally:
            os.close(descriptor)
        if values != cached:
            self._task_values.put(cache_key, values)
        return values

    def _read_values(
        self, ids: Ids, field: str | None, convert: Callable[[Metadatum], str]
    ) -> TaskValues:
        files = self._list_task_files(ids)
        prefixes = None if field is None else metadatum_prefixes((field,))
        metadata = self._read_metadata(files, ids, None, prefixes) if files.has_record else ()
        texts = {convert(m) for m in metadata if field in (None, m["field_name"])}
        return TaskValues(files.version, tuple(texts))

    def _list_task_files(self, ids: Ids) -> TaskFiles:
        """The files of a task, as they are now; of one that does not exist, none."""
        folder = self._meta_path(ids)
        status = self._look(os.stat, folder)
        if status is None:
            return TaskFiles.from_names(None, folder, ())
        cached = self._task_files.get(folder)
        if cached is not None and cached.version == file_version(status):
            return cached
        version = settled_version(status)  # before the names are listed, which may change then
        names = self._look(os.listdir, folder)
        if names is None:
            return TaskFiles.from_names(None, folder, ())
        files = TaskFiles.from_names(version, folder, names)
        self._task_files.put(folder, files)
        return files

    def _read_metadata(
        self,
        files: TaskFiles,
        ids: Ids,
        before: SortKey | None = None,
        prefixes: Container[str] | None = None,
    ) -> Iterator[Metadatum]:
        """The metadata in the files of a task, newest first.

        With `prefixes`, only from files whose names have one of these before the timestamp.
        """
        metadata, folder = self._sort_metadata(files, ids, prefixes), files.folder_version()
        for _, _, name in entries_before(metadata, before):
            if prefixes is None or name.rpartition("_")[0] in prefixes:
                metadatum = self._read_task_file(folder, name, ids, parse_metadatum_record)
                if metadatum is not None:
                    yield metadatum

    def _sort_metadata(
        self, files: TaskFiles, ids: Ids, prefixes: Container[str] | None
    ) -> list[DatedFile]:
        """The files with metadata of a task, oldest first.

        Undated ones must be read for that, and so are left out if they have none of the prefixes.
        """
        if not files.undated:
            return files.metadata
        metadata, folder = files.metadata.copy(), files.folder_version()
        for name in files.undated:
            if prefixes is None or name.rpartition("_")[0] in prefixes:
                metadatum = self._read_task_file(folder, name, ids, parse_metadatum_record)
                if metadatum is not None:
                    metadata.append((metadatum["ts_epoch"], metadatum["id"], name))
        metadata.sort()
        if prefixes is None:
            self._task_files.put(files.folder, files._replace(metadata=metadata, undated=[]))
        return metadata

    def _read_task_file(
        self,
        folder: FolderVersion,
        name: str,
        ids: Ids,
        parse: RecordParser[T],
        tags: RunTags | None = None,
    ) -> T | None:
        """The metadatum or artifact in a file of a task; with the tags, if given.

        The file is not looked at if it was read while its folder had the version that it has now.
        """
        path, version = f"{folder[0]}/{name}", folder[1]
        cached = self._records.get(path)
        vouched = None if cached is None else cached.folder_version
        if cached is not None and vouched is not None and vouched == version:
            record: T | None = cached.record
        else:
            record = self._read_record(path, (*ids, name), parse)
            self._records.modify(
                path,
                lambda c: c._replace(folder_version=version) if c.record is record else c,
            )
        return record if record is None or tags is None else self._with_tags(path, record, tags)

    def _with_tags(self, path: str, record: Any, tags: RunTags) -> Any:
        """A record with the tags of its run.

        It replaces the cached one, so that its JSON need not be made again.
        """
        if record["tags"] is tags["tags"] and record["system_tags"] is tags["system_tags"]:
            return record
        cached = self._records.modify(path, lambda c: c.with_fields(tags))
        return (cached and cached.record) or Record({**record, **tags})

    # -- metadata and artifacts of several tasks -------------------------------------------------

    def metadata_below(self, ids: Ids, before: SortKey | None = None) -> Iterator[Metadatum]:
        """The metadata of all tasks of a run or step, newest first."""
        index = self._get_index("metadata", ids, before, self._index_metadata)
        return self._read_index(index, before, parse_metadatum_record)

    def artifacts_below(self, ids: Ids, before: SortKey | None = None) -> Iterator[Artifact]:
        """The artifacts of all tasks of a run or step, or of one task, newest first.

        Of each task, these are the artifacts of the latest attempt that has any.
        """
        run = self._read_object(ids[:2], parse_run_record)
        if run is not None:
            index = self._get_index("artifacts", ids, before, self._index_artifacts)
            yield from self._read_index(index, before, parse_artifact_record, run_tags(run))

    def _get_index(
        self,
        kind: str,
        ids: Ids,
        before: SortKey | None,
        index_task: Callable[[Ids, TaskFiles], Iterable[IndexEntry]],
    ) -> RecordIndex:
        """The index of a list: the cached one if it is current, else a new one.

        It counts as current without a look for as long as PAGING_SECONDS says.
        """
        cache_key, now = "/".join((kind, *ids)), time.monotonic()
        cached = self._indexes.get(cache_key)
        if cached is not None:
            if before is not None and now - cached.verified_at < PAGING_SECONDS:
                return cached
            if are_unchanged(cached.folders):
                self._indexes.put(cache_key, cached._replace(verified_at=now))
                return cached
        folders: FolderVersions = []
        entries = [
            entry
            for task, files in self._walk_tasks(ids, folders)
            for entry in index_task(task, files)
        ]
        entries.sort()
        index = RecordIndex(now, folders, entries)
        self._indexes.put(cache_key, index)
        return index

    def _walk_tasks(self, ids: Ids, folders: FolderVersions) -> Iterator[tuple[Ids, TaskFiles]]:
        """The tasks of a run or step, or the task itself, with their files.

        Every folder that is looked at on the way is appended to `folders`.
        """
        if len(ids) == TASK_DEPTH:
            files = self._list_task_files(ids)
            folders.append(files.folder_version())
            yield ids, files
            return
        is_run = len(ids) == RUN_DEPTH
        listing = self._list_children(ids, parse_step_record if is_run else parse_task_record)
        folders.append((self._folder_path(ids), None if listing.unrecorded else listing.version))
        for key in listing.sort_keys:
            yield from self._walk_tasks((*ids, name_in_key(key)), folders)

    def _index_metadata(self, ids: Ids, files: TaskFiles) -> Iterator[IndexEntry]:
        folder = files.folder_version()
        for ts_epoch, identifier, name in self._sort_metadata(files, ids, None):
            yield ts_epoch, identifier, ids, folder, name

    def _index_artifacts(self, ids: Ids, files: TaskFiles) -> Iterator[IndexEntry]:
        folder = files.folder_version()
        for name in files.artifacts.get(files.latest_attempt(), ()):
            artifact = self._read_task_file(folder, name, ids, parse_artifact_record)
            if artifact is not None:
                yield *artifact_sort_key(artifact), ids, folder, name

    def _read_index(
        self,
        index: RecordIndex,
        before: SortKey | None,
        parse: RecordParser[T],
        tags: RunTags | None = None,
    ) -> Iterator[T]:
        """The records of an index, newest first; with the tags, if given."""
        for _, _, ids, folder, name in entries_before(index.entries, before):
            record = self._read_task_file(folder, name, ids, parse, tags)
            if record is not None:
                yield record

    # -- creating objects ------------------------------------------------------------------------

    def create_flow(self, ids: Ids, labels: Labels) -> Flow:
        """Create a flow. AlreadyExists if there is one of that name."""
        if ids[0].startswith(PROGRAM):
            raise NotStorable(f"{ids[0]!r} cannot be a flow: the name is the service's own.")
        with self._writing, writable_folder(self.folder) as parent:
            raw = self._new_record(ids, labels)
            return self._create_object(parent, ids, raw, parse_flow_record)

    def create_run(
        self, flow: Ids, run_id: str | None, labels: Labels, has_heartbeats: bool
    ) -> Run:
        """Create a run, with the id that the client brings or else with a new one.

        `has_heartbeats`: whether the client is going to send heartbeats, so that this is the first.
        NotFound if there is no such flow, AlreadyExists if there is such a run.
        """
        self._require(flow, parse_flow_record)
        with self._writing, writable_folder(self._folder_path(flow)) as parent:
            if run_id is None:
                name = self._make_run_folder(parent, flow)
            else:
                name = validate_client_id(run_id, "run")
            ids = (*flow, name)
            raw = self._new_record(ids, labels, has_heartbeats)
            return self._create_object(parent, ids, raw, parse_run_record, run_id is None)

    def create_step(self, ids: Ids, labels: Labels) -> Step:
        """Create a step.

        NotFound if there is no such run, AlreadyExists if there is such a step.
        """
        run = self._require(ids[:2], parse_run_record)
        with self._writing, writable_folder(self._folder_path(ids[:2])) as parent:
            raw = self._new_record(ids, labels)
            step = self._create_object(parent, ids, raw, parse_step_record)
        return {**step, **run_tags(run)}

    def create_task(
        self, step: Ids, task_id: str | None, labels: Labels, has_heartbeats: bool
    ) -> Task:
        """Create a task, with an id that the client brings or else the next number of its run.

        Otherwise this is like `create_run`. A first heartbeat counts for the run too.
        """
        run = self._require(step[:2], parse_run_record)
        self._require(step, parse_step_record)
        with self._writing, writable_folder(self._folder_path(step)) as parent:
            if task_id is None:
                name = self._make_task_folder(parent, step)
            else:
                name = validate_client_id(task_id, "task")
            ids = (*step, name)
            raw = self._new_record(ids, labels, has_heartbeats)
            task = self._create_object(parent, ids, raw, parse_task_record, task_id is None)
            if has_heartbeats:
                # If it cannot be recorded, the task has been created all the same.
                with contextlib.suppress(OSError, NotStorable):
                    self._record_heartbeat(step[:2], run)
        return {**task, **run_tags(run)}

    def _require(self, ids: Ids, parse: RecordParser[T]) -> T:
        """The record of an object. NotFound if there is none."""
        record = self._read_object(ids, parse)
        if record is None:
            raise NotFound(f"There is no {KINDS[len(ids) - 1]} {'/'.join(ids)}.")
        return record

    def _make_run_folder(self, parent: int, flow: Ids) -> str:
        """Make the folder of a new run, and return its name.

        That is the time in microseconds, or a later one if the flow has a run with a later one.
        """
        folder = self._folder_path(flow)
        if folder not in self._newest_runs:
            limit = 2 * time.time_ns() // 1000  # no clock has given a number above this
            numbers = (number for number in numeric_ids(list_folders(folder)) if number < limit)
            self._newest_runs[folder] = max(numbers, default=0)
        while True:
            name = str(self._run_timestamps.next(after=self._newest_runs[folder]))
            if make_folder(parent, name):
                return name

    def _make_task_folder(self, parent: int, step: Ids) -> str:
        """Make the folder of a new task, and return its name.

        That is the next number that no task has in any step of the run, whoever gave the others.
        """
        run = self._folder_path(step[:2])
        steps = self._list_step_folders(run)
        number = self._last_task_ids.get(run)
        if number is None:
            names = itertools.chain.from_iterable(list_folders(f"{run}/{name}") for name in steps)
            number = max(numeric_ids(names), default=0)
        other_steps = [f"{run}/{name}" for name in steps if name != step[2]]
        while True:
            number += 1
            if any(os.path.lexists(f"{other}/{number}") for other in other_steps):
                continue
            if make_folder(parent, str(number)):
                self._last_task_ids.put(run, number)
                return str(number)

    def _list_step_folders(self, run: str) -> list[str]:
        """The names of the folders in a run's folder.

        They are cached: to see that the folder is unchanged takes one system call instead of five.
        """
        version, names = self._step_folders.get(run, (None, []))
        status = os.stat(run)
        if version != file_version(status):
            version, names = settled_version(status), list_folders(run)
            self._step_folders.put(run, (version, names))
        return names

    def _new_record(self, ids: Ids, labels: Labels, has_heartbeats: bool = False) -> RawRecord:
        """What the file of a new object is to contain."""
        kind = KINDS[len(ids) - 1]
        raw: RawRecord = self._provider(ids[0])._object_to_json(kind, *ids[1:])
        now = time.time_ns() // 1_000_000
        if has_heartbeats:
            # Not in a file of its own as later ones: making one in a new folder takes 0.2 ms.
            raw["last_heartbeat_ts"] = now // 1000
        return add_labels(raw, labels, now)

    def _provider(self, flow: str) -> Any:
        """A LocalMetadataProvider, whose methods make records of a flow.

        It is made without its __init__, which wants the flow itself.
        """
        if self._provider_class is None:
            self.prepare_to_write()
        provider = object.__new__(self._provider_class)
        provider._flow_name = flow
        provider.sticky_tags = provider.sticky_sys_tags = frozenset()
        return provider

    def _create_object(
        self,
        parent: int,
        ids: Ids,
        raw: RawRecord,
        parse: RecordParser[T],
        has_new_folder: bool = False,
    ) -> T:
        """Write the record of a new object, and return it. AlreadyExists if there is one.

        `parent`: a descriptor of the folder in which the folder of the object is to be.
        `has_new_folder`: whether that has just been made, so that there cannot be a record in it.

        Otherwise it may be there without a record, as local mode's datastore can be the first to
        make it. A file that is no record, as a crash of the machine may leave one, is replaced.
        """
        name, path = ids[-1], self._self_path(ids)
        if not has_new_folder:
            has_new_folder = ensure_folder(parent, name)
            if not has_new_folder and self._read_object(ids, parse) is not None:
                raise AlreadyExists(f"There is already a {'/'.join(ids)}.")
            if os.path.isdir(path) and not os.path.islink(path):
                raise NotStorable(f"{path} is a folder, and no record can be put there.")
        meta = f"{name}/{META_DIR}"
        file = f"{meta}/{SELF_FILE}"
        try:
            ensure_folder(parent, meta)
            version = create_file(parent, file, raw) or replace_file(parent, file, raw)
        except OSError:
            if has_new_folder:
                remove_folder(parent, meta)
                remove_folder(parent, name)
            raise
        record = parse(ids, raw)
        # It is not read again, which could fail, as there may be no descriptor left.
        self._records.put(path, CachedRecord(version, Record(cast("dict[str, Any]", record))))
        return record

    # -- adding to tasks, and changing objects ---------------------------------------------------

    def create_metadata(self, ids: Ids, rows: Sequence[NewMetadatum]) -> int:
        """Add metadata to a task, or none if one fails, and return how many.

        NotFound if there is no such task. Each becomes a record, even if the field has one already.
        """
        self._require_task(ids)
        data = [SimpleNamespace(**row._asdict(), field=row.field_name, tags=()) for row in rows]
        raws = self._provider(ids[0])._metadata_to_json(*ids[1:], data)
        with self._writing, writable_folder(self._meta_path(ids)) as meta:
            while True:
                files: dict[str, RawRecord] = {}
                for row, raw in zip(rows, raws):
                    timestamp = self._metadatum_timestamps.next()
                    name = metadatum_file_name(row.field_name, timestamp)
                    files[name] = add_labels(raw, row.labels, timestamp // 1000)
                taken = create_files(meta, files)
                if not taken:
                    return len(files)
                # The clock has been set back since an earlier service wrote there: once more.
                remove_files(meta, files.keys() - taken)

    def create_artifacts(self, ids: Ids, rows: Sequence[NewArtifact]) -> int:
        """Add artifacts to a task, or none if one fails, and return how many of them are new.

        An artifact stays what it was: if the attempt has one of that name, the other is ignored.
        NotFound if there is no such task.
        """
        self._require_task(ids)
        arts = [SimpleNamespace(**row._asdict(), url=row.location, ds_root=None) for row in rows]
        raws = self._provider(ids[0])._artifacts_to_json(*ids[1:], None, arts)
        now = time.time_ns() // 1_000_000
        files: dict[str, RawRecord] = {}
        for row, raw in zip(rows, raws):
            # Local mode's names for two of these fields are not those of the API.
            raw.update(attempt_id=row.attempt_id, type=row.type, content_type=row.content_type)
            raw["location"] = row.location
            name = artifact_file_name(row.attempt_id, row.name)
            files.setdefault(name, add_labels(raw, row.labels, now))
        path = self._meta_path(ids)
        with self._writing, writable_folder(path) as meta:
            count = len(files)
            for name in create_files(meta, files):
                if self._read_record(f"{path}/{name}", (*ids, name), parse_artifact_record):
                    count -= 1
                else:
                    replace_file(meta, name, files[name])
        return count

    def heartbeat(self, ids: Ids) -> bool:
        """Record a heartbeat of a run, or of a task and its run; False if it does not exist."""
        if len(ids) == TASK_DEPTH and not self._has_beaten(ids[:2]):
            self.heartbeat(ids[:2])
        is_run = len(ids) == RUN_DEPTH
        record = self._read_object(ids, parse_run_record if is_run else parse_task_record)
        if record is None:
            return False
        self._record_heartbeat(ids, record)
        return True

    def _has_beaten(self, run: Ids) -> bool:
        """Whether a run has a heartbeat of this second, of its own or of one of its tasks.

        There may be many in a second, and a look at the run would be a tenth of what each takes.
        """
        known = self._records.get(self._self_path(run))
        record = None if known is None else known.record
        return record is not None and record["last_heartbeat_ts"] == int(time.time())

    def change_tags(self, ids: Ids, add: Iterable[str], remove: Iterable[str]) -> list[str]:
        """Remove tags from a run, then add others, and return the tags that it has then.

        SystemTagRemoval if one to remove is a system tag. A system tag to add is ignored.
        """
        with self._writing:
            self._require(ids, parse_run_record)
            with open(self._self_path(ids), "rb") as f:
                raw = json.loads(f.read())
            old_tags, system_tags = raw.get("tags") or [], set(raw.get("system_tags") or ())
            removed = set(remove)
            if refused := removed & system_tags:
                names = ", ".join(sorted(refused))
                raise SystemTagRemoval(f"System tags cannot be removed: {names}.")
            kept = (tag for tag in old_tags if tag not in removed)
            added = (tag for tag in add if tag not in system_tags)
            tags = list(dict.fromkeys((*kept, *added)))
            if tags != old_tags:
                with writable_folder(self._meta_path(ids)) as meta:
                    replace_file(meta, SELF_FILE, {**raw, "tags": tags})
        return tags

    def check_writable(self) -> None:
        """Raise OSError if no record could be written now."""
        name = temporary_name()
        with writable_folder(self.folder) as folder:
            try:
                write_file(folder, name, b"{}")
            finally:
                remove_files(folder, [name])

    def _require_task(self, ids: Ids) -> None:
        """Raise NotFound if there is no such task, or no step or run of it."""
        self._require(ids[:2], parse_run_record)
        self._require(ids[:3], parse_step_record)
        self._require(ids, parse_task_record)

    def _record_heartbeat(self, ids: Ids, record: BaseRun | Task) -> None:
        """Record that the run or task with this record is alive now."""
        now = int(time.time())
        if record["last_heartbeat_ts"] == now:
            return  # all tasks of a run count for it, and there may be many in a second
        with writable_folder(self._meta_path(ids)) as meta:
            try:
                os.utime(HEARTBEAT_FILE, (now, now), dir_fd=meta, follow_symlinks=False)
            except FileNotFoundError:
                flags = os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW
                os.close(os.open(HEARTBEAT_FILE, flags, 0o600, dir_fd=meta))
                # The mtime of a new file is some milliseconds old.
                os.utime(HEARTBEAT_FILE, (now, now), dir_fd=meta, follow_symlinks=False)
        self._records.modify(
            self._self_path(ids), lambda cached: cached.with_fields({"last_heartbeat_ts": now})
        )


# ==================================================================================================
# Datastore: the other files that Metaflow keeps in a root, and values read without unpickling
# ==================================================================================================
#
# Rules of this layer:
#
# - A file of a datastore is opened by a FileOpener and in no other way.
# - Nothing is trusted: paths come from clients, and contents from whoever wrote the file. Each read
#   has a limit, in bytes, lines, operations or depth.
# - Values are never unpickled, and neither numpy nor pandas is imported to show theirs.
# - What is missing or must not be read is a FileNotFoundError; what is too large is TooLarge; what
#   makes no sense is another ValueError.
#
# How it works: records say in which datastore an artifact, log or card is. A FileOpener walks there
# one folder at a time, and checks the owner of each on its descriptor (see the class). An artifact
# is a gzipped pickle. PickleReader goes through its operations, as unpickling would, but puts a
# stand-in wherever unpickling would call something: PickledObject for an object or a class, and
# PickledDict and PickledSet for collections that would hash their items. A few classes of the
# standard library, numpy and pandas are recognized by name and shown by what they hold. The text of
# a value is produced in pieces and cut off at a limit, for a small pickle can mean a huge value.

# -- files of the datastore ------------------------------------------------------------------------

LARGEST_LOG = 16 * 2**20
LARGEST_CARD = 64 * 2**20
LARGEST_VALUE = 16 * 2**20
LARGEST_GRAPH = 2 * 2**20

CARDS_DIR = "mf.cards"
SHA = "[0-9a-f]{40,64}"
ROOT_LOCATION = ":root:"
INCLUDED_FILE = "metaflow.includefile.IncludedFile"
LOCAL_URL = rf"(?s)local://(?P<root>/.*?/?{re.escape(DATASTORE_DIR)})/(?P<names>.+)"
"""The URL in the value of an IncludeFile, which says where its content is stored."""


DatastorePath = tuple[str, ...]
"""The root of a datastore, and the names that lead from there to a file or folder."""


class TooLarge(ValueError):
    """A file or value is larger than the limit for showing it."""


ROOT_USER = 0
FILE_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
PASSAGE_FLAGS = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
"""For the folders above the root, which this user may perhaps not list; only Linux has O_PATH."""
NOT_OPENABLE = frozenset(
    (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM)
)
"""The errors of open(2) for a link, a file in place of a folder, a pipe or socket, a path that is
too long, and what this user may not read. All are treated as a missing file."""

DATASTORE_DIRS = frozenset((DATASTORE_DIR, f"{DATASTORE_DIR}_spin"))
"""The names that Metaflow gives the folders of its local datastores."""


class FileOpener:
    """Opens the files of datastores, the paths of which come from clients.

    A client must not get at files through the service that it could not read itself. Therefore:

    - The path is walked one name at a time, each opened relative to the folder before (openat(2)),
      and all checks are made on the open descriptor. Nothing is gained by exchanging a file for a
      link between the check and the use.
    - Everything on the way must belong to the service's user, to root, or to the owner of the
      served root. Whatever belongs to anyone else is treated as missing.
    - A symbolic link to a file is never followed. A link to a folder is, since people keep data on
      another disk, provided that only the owner of the link or of the folder that holds it can
      have made it. If either is neither the service's user nor root, the target must be theirs.
    - A file with several hard links may be someone else's file under a new name. It is treated as
      missing unless only the service's user and root could have created that name.
    - Pipes and devices are treated as missing, and opening one never blocks.
    """

    def __init__(self, served: str) -> None:
        """`served`: the .metaflow folder that the service serves."""
        self._served = served

    def open_file(self, root: str, *names: str) -> io.BufferedReader:
        """Open a file of a local datastore; FileNotFoundError if there is none that may be read.

        `root`: the path of the datastore's .metaflow folder, as a client gave it.
        """
        check_datastore(root)
        return self.open_below(self.find_datastore(root), names, self._owners())

    def open_folder(self, root: str, *names: str) -> int:
        """Open a folder of a local datastore, as a descriptor; FileNotFoundError as for files."""
        check_datastore(root)
        return self._open_folder_below(self.find_datastore(root), names, self._owners())

    def stat_folder(self, root: str, *names: str) -> os.stat_result | None:
        """The status of a folder of a local datastore, or None if there is no such folder."""
        with contextlib.suppress(FileNotFoundError):
            folder = self.open_folder(root, *names)
            try:
                return os.fstat(folder)
            finally:
                os.close(folder)
        return None

    def open_below(
        self, folder: str, names: Sequence[str], owners: Collection[int]
    ) -> io.BufferedReader:
        """Open a file below any folder, where everything must belong to one of the owners."""
        parent = self._open_folder_below(folder, names[:-1], owners)
        try:
            check_openable(names[-1])
            file = open_entry(names[-1], os.O_RDONLY | FILE_FLAGS, parent)
            self._check_file(file, os.fstat(parent), owners)
            return open(file, "rb")
        finally:
            os.close(parent)

    def find_datastore(self, root: str) -> str:
        """Where a datastore is: if it is gone, perhaps as the project was moved, the served one.

        Records have its absolute path, and the names in it are unique.
        """
        is_gone = os.path.basename(root) == DATASTORE_DIR and not os.path.lexists(root)
        return self._served if is_gone else root

    def _owners(self) -> Collection[int]:
        served = stat_or_none(self._served)
        return {os.geteuid(), ROOT_USER, *([served.st_uid] if served else [])}

    def _check_file(self, file: int, parent: os.stat_result, owners: Collection[int]) -> None:
        """Close a descriptor and raise FileNotFoundError unless it is a file that may be read."""
        status = os.fstat(file)
        is_link_safe = is_trusted(parent.st_uid) and not is_writable_by_others(parent)
        is_safe = status.st_uid in owners and (status.st_nlink <= 1 or is_link_safe)
        if not stat.S_ISREG(status.st_mode) or not is_safe:
            os.close(file)
            raise no_such_file()

    def _open_folder_below(self, folder: str, names: Sequence[str], owners: Collection[int]) -> int:
        above, last = os.path.split(folder.rstrip("/"))
        descriptor = open_entry(above or "/", PASSAGE_FLAGS)
        for name in (last, *names):
            try:
                check_openable(name)
                below = self._open_subfolder(descriptor, name, owners)
            finally:
                os.close(descriptor)
            descriptor = below
        return descriptor

    def _open_subfolder(self, folder: int, name: str, owners: Collection[int]) -> int:
        """Open a folder within another, as a descriptor; a link is followed if it is safe."""
        try:
            below = open_entry(name, FOLDER_FLAGS | os.O_NOFOLLOW, folder)
            self._check_owner(below, owners)
            return below
        except FileNotFoundError:
            link = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if not stat.S_ISLNK(link.st_mode):
                raise
        holder = os.fstat(folder)
        if is_writable_by_others(holder):
            raise no_such_file()
        target = os.readlink(name, dir_fd=folder)
        below = open_entry(target, FOLDER_FLAGS, folder)
        makers = {uid for uid in (link.st_uid, holder.st_uid) if not is_trusted(uid)}
        self._check_owner(below, makers.intersection(owners) if makers else owners)
        return below

    def _check_owner(self, folder: int, owners: Collection[int]) -> None:
        """Close a descriptor and raise FileNotFoundError unless one of the owners owns it."""
        if os.fstat(folder).st_uid not in owners:
            os.close(folder)
            raise no_such_file()


def no_such_file() -> FileNotFoundError:
    """The error for everything that is missing or must not be read."""
    return FileNotFoundError(errno.ENOENT, "There is no such file that may be read")


def is_trusted(uid: int) -> bool:
    """Whether a user is the service's own or root."""
    return uid in (os.geteuid(), ROOT_USER)


def is_writable_by_others(folder: os.stat_result) -> bool:
    """Whether users other than its owner can create files in a folder.

    A group with the same number as the owner is taken for the owner's private group. Systems that
    have such groups usually create folders that are writable for the group.
    """
    is_group_private = folder.st_gid == folder.st_uid
    return bool(
        folder.st_mode & (stat.S_IWOTH if is_group_private else stat.S_IWOTH | stat.S_IWGRP)
    )


def check_datastore(root: str) -> None:
    """Raise FileNotFoundError unless a path can be that of a folder of Metaflow's."""
    if not os.path.isabs(root) or os.path.basename(root.rstrip("/")) not in DATASTORE_DIRS:
        raise no_such_file()


def check_openable(name: str) -> None:
    """Raise FileNotFoundError unless a name is a single name and not a path."""
    try:
        check_name(name)
    except NotStorable:
        raise no_such_file() from None


def open_entry(path: str, flags: int, folder: int | None = None) -> int:
    """Open a path, relative to a folder if one is given; FileNotFoundError if that cannot be."""
    try:
        return os.open(path, flags, dir_fd=folder)
    except (ValueError, UnicodeEncodeError):
        raise no_such_file() from None
    except OSError as error:
        if error.errno in NOT_OPENABLE:
            raise no_such_file() from None
        raise


def read_content(file: io.BufferedReader, limit: int, from_end: bool = False) -> bytes:
    """The content of a file; if it exceeds the limit, TooLarge or, `from_end`, its last lines."""
    size = os.fstat(file.fileno()).st_size
    if size > limit:
        if not from_end:
            raise TooLarge
        file.seek(size - limit)
        file.readline()
    return file.read(limit)


def read_json(file: io.BufferedReader, limit: int) -> Any:
    """The JSON in a file; TooLarge, or another ValueError if it is not JSON."""
    try:
        return json.loads(read_content(file, limit))
    except RecursionError:
        raise ValueError("It is nested too deeply.") from None


def decompress(blob: bytes, limit: int) -> bytes:
    """The content of a blob, gzipped or not; TooLarge if it exceeds the limit."""
    import zlib

    if not blob.startswith(b"\x1f\x8b"):
        return blob
    try:
        content = zlib.decompressobj(wbits=31).decompress(blob, limit + 1)
    except zlib.error as error:
        raise ValueError(f"It cannot be unpacked: {error}.") from None
    if len(content) > limit:
        raise TooLarge
    return content


# -- cards -----------------------------------------------------------------------------------------

CARD_ROOTS_FILE = f"{PROGRAM}.cards"
MOST_CARD_ROOTS = 100


def read_card_roots(folder: str) -> list[str]:
    """The other datastores that may hold cards of this one's runs; see `note_card_root`."""
    path = os.path.join(folder, CARD_ROOTS_FILE)
    try:
        # O_NONBLOCK: not to wait for a process that has the other end of a FIFO.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as f:
            lines = f.readlines()
    except OSError:
        return []
    noted: dict[str, None] = {}
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            roots = json.loads(line)
            for root in roots if isinstance(roots, list) else ():
                if isinstance(root, str):
                    noted.pop(root, None)
                    noted[root] = None
    return list(noted)[-MOST_CARD_ROOTS:]


def note_card_root(folder: str, here: str) -> None:
    """Write down in a datastore where a command that runs in the folder `here` puts its cards.

    Metaflow's card store ignores the configured root: it uses the nearest .metaflow above the
    working directory, or creates one there. If this cannot be written, the cards are not found.
    It is a line of its own, a list in JSON, so that several commands can add theirs at once.
    """
    root = os.path.join(nearest_project(here) or os.path.realpath(here), DATASTORE_DIR)
    if os.path.realpath(root) == os.path.realpath(folder) or root in read_card_roots(folder):
        return
    path = os.path.join(folder, CARD_ROOTS_FILE)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    with contextlib.suppress(OSError), open(os.open(path, flags, 0o600), "wb", buffering=0) as f:
        f.write(f"\n{json.dumps([root])}\n".encode())  # what stands before may have no end


# -- logs ------------------------------------------------------------------------------------------


class LogLine(TypedDict):
    row: int
    timestamp: int | None  # epoch milliseconds; None if the line has none
    line: str


LOG_SOURCES = ("runtime", "task")
LOG_STREAMS: Mapping[str, str] = {"out": "stdout", "err": "stderr"}
LOG_LINE = (
    rb"(?s)"
    rb"(?:\[!)?\[MFLOG\|0\|(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{6})?)Z\|[^|\]]*\|[^\]]*\](.*)"
)
"""A line as Metaflow's mflog writes it: the time in UTC, the source, a unique id, and the text."""

MOST_LOG_LINES = 200_000
"""How many lines of a file are shown: about as many as mflog writes into LARGEST_LOG bytes."""


def merge_logs(files: Iterable[bytes]) -> list[LogLine]:
    """The lines of the log files of a stream, merged in the order of their times.

    A line without a time stays behind the line before it in its file.
    """
    timed: list[tuple[float, int | None, str]] = []
    log_line = re.compile(LOG_LINE)
    for content in files:
        last_seconds = 0.0
        for line in content.rsplit(b"\n", MOST_LOG_LINES)[-MOST_LOG_LINES:]:
            match = log_line.fullmatch(line)
            seconds = parse_log_time(match.group(1).decode()) if match else None
            last_seconds = last_seconds if seconds is None else seconds
            if match or line:
                text = match.group(2) if match else line
                timestamp = None if seconds is None else int(seconds * 1000)
                timed.append((last_seconds, timestamp, text.decode("utf-8", "replace")))
    timed.sort(key=operator.itemgetter(0))
    return [
        {"row": row, "timestamp": timestamp, "line": line}
        for row, (_, timestamp, line) in enumerate(timed)
    ]


def log_weight(lines: Sequence[LogLine]) -> int:
    """Roughly how many bytes of memory the lines of a log take."""
    return sum(len(line["line"]) for line in lines) + 300 * (len(lines) + 1)


def parse_log_time(text: str) -> float | None:
    """The epoch seconds of a time in UTC, or None if there is no such time."""
    from datetime import datetime, timezone

    try:
        return datetime.fromisoformat(text).replace(tzinfo=timezone.utc).timestamp()
    except (ValueError, OverflowError):
        return None


# -- values of artifacts: reading pickles ----------------------------------------------------------


class PickledDict(list[Any]):
    """A dict in a pickle, as pairs: its keys are not hashed.

    To hash what a pickle contains could take for ever, or overflow the stack of the process.
    """

    def fields(self) -> dict[str, Any]:
        """Those of the first MOST_FIELDS items whose keys are text, as a dict."""
        return {key: value for key, value in self[:MOST_FIELDS] if isinstance(key, str)}


class PickledSet(list[Any]):
    """A set in a pickle, as a list, for the same reason."""


class PickledObject:
    """A stand-in for an object in a pickle, or for a class (`is_class`).

    `name`: of the class; `arguments`: those that the class would have been called with; `state`:
    what unpickling would then have passed to `__setstate__`.
    """

    def __init__(self, name: str, arguments: tuple[Any, ...] = (), is_class: bool = False) -> None:
        self.name = name[:LONGEST_CLASS_NAME]
        self.arguments = arguments
        self.is_class = is_class
        self.state: object = None

    def attributes(self) -> dict[str, Any]:
        """The attributes in its state, which is one dict, or a tuple of two if it has slots."""
        parts = self.state[:2] if isinstance(self.state, tuple) else (self.state,)
        fields = (part.fields().items() for part in parts if isinstance(part, PickledDict))
        return dict(itertools.chain.from_iterable(fields))


def make_pairs(items: list[Any]) -> PickledDict:
    """The pairs of a flat list in which keys and values alternate."""
    return PickledDict(zip(items[::2], items[1::2]))


MARK: Any = object()

PLAIN_TYPES = frozenset(
    ("None", "bool", "int", "int_or_bool", "float", "str", "bytes", "bytes_or_str", "bytearray")
)
"""The names that pickletools has for values that need no class."""

CONSTANTS: Mapping[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY_COLLECTIONS: Mapping[str, Callable[[], object]] = {
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": PickledDict,
    "EMPTY_SET": PickledSet,
}
MARKED_COLLECTIONS: Mapping[str, Callable[[list[Any]], object]] = {
    "LIST": list,
    "TUPLE": tuple,
    "DICT": make_pairs,
    "FROZENSET": PickledSet,
}
SHORT_TUPLES: Mapping[str, int] = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
IGNORED_OPERATIONS = frozenset(("PROTO", "FRAME", "STOP"))

LONGEST_CLASS_NAME = 500
MOST_FIELDS = 100  # that are read of an object, which may be in the value many times
LARGEST_PLAIN = 4_000_000  # values and characters
MOST_OPERATIONS = 200_000  # of a pickle, which take a fifth of a second


class PickleReader:
    """Reads the value in a pickle without unpickling it: nothing is imported or called.

    Time and memory are proportional to the length of the pickle, whatever it contains. A pickle can
    have the arguments of one call copied again and again, so what calls copy is counted.
    """

    # A subclass of pickle._Unpickler would be a fifth shorter. But it is private, allocates as much
    # as a BYTEARRAY8 claims to hold, and puts what EXT1 names into a cache of the whole process.

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._copied = 0

    def read(self, content: bytes) -> Any:
        """The value, made of plain types and stand-ins; ValueError if it is not a pickle."""
        import pickletools

        plain = {
            operation.name
            for operation in pickletools.opcodes
            if not operation.stack_before
            and any(kind.name in PLAIN_TYPES for kind in operation.stack_after)
        }
        try:
            for count, (operation, argument, _) in enumerate(pickletools.genops(content)):
                if count > MOST_OPERATIONS:
                    raise TooLarge("It has too many parts.")
                if operation.name in plain:
                    self._stack.append(CONSTANTS.get(operation.name, argument))
                else:
                    self._do(operation.name, argument)
            return self._stack.pop()
        except (LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"not a pickle: {error!r}") from None

    def _do(self, name: str, argument: Any) -> None:
        if name in EMPTY_COLLECTIONS:
            self._stack.append(EMPTY_COLLECTIONS[name]())
        elif name in MARKED_COLLECTIONS:
            self._stack.append(MARKED_COLLECTIONS[name](self._marked()))
        elif name in SHORT_TUPLES:
            self._stack[-SHORT_TUPLES[name] :] = [tuple(self._stack[-SHORT_TUPLES[name] :])]
        elif name not in IGNORED_OPERATIONS:
            # The name is one of pickletools' own, whatever the pickle contains.
            method = getattr(self, f"_{name.lower()}", None)
            if method is None:
                raise ValueError(f"{name} is not read")
            method(argument)

    def _marked(self) -> list[Any]:
        """Take from the stack what is above the last mark, and the mark with it."""
        at = len(self._stack) - 1
        while self._stack[at] is not MARK:
            at -= 1
            if at < 0:
                raise ValueError("no mark")
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    def _mark(self, _: Any) -> None:
        self._stack.append(MARK)

    def _pop(self, _: Any) -> None:
        self._stack.pop()

    def _pop_mark(self, _: Any) -> None:
        self._marked()

    def _dup(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def _put(self, number: Any) -> None:
        self._memo[int(number)] = self._stack[-1]

    _binput = _long_binput = _put

    def _memoize(self, _: Any) -> None:
        self._put(len(self._memo))

    def _get(self, number: Any) -> None:
        self._stack.append(self._memo[int(number)])

    _binget = _long_binget = _get

    def _append(self, _: Any) -> None:
        self._extend(list, [self._stack.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(list, self._marked())

    def _additems(self, _: Any) -> None:
        self._extend(PickledSet, self._marked())

    def _setitem(self, _: Any) -> None:
        self._extend(PickledDict, make_pairs([self._stack.pop(-2), self._stack.pop()]))

    def _setitems(self, _: Any) -> None:
        self._extend(PickledDict, make_pairs(self._marked()))

    def _extend(self, kind: type[list[Any]], items: list[Any]) -> None:
        """Add to the collection on top of the stack; one of another class is left as it is."""
        if type(self._stack[-1]) is kind:
            self._stack[-1].extend(items)

    def _global(self, argument: str) -> None:
        self._stack.append(PickledObject(argument.replace(" ", "."), is_class=True))

    def _stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        parts = [part[:LONGEST_CLASS_NAME] for part in (module, name) if isinstance(part, str)]
        self._stack.append(PickledObject(".".join(parts), is_class=True))

    def _reduce(self, _: Any) -> None:
        arguments, called = self._stack.pop(), self._stack.pop()
        result = represent_call(called, arguments)
        self._copied += copied_size(arguments, result)
        if self._copied > LARGEST_PLAIN:
            raise TooLarge("It is too large.")
        self._stack.append(result)

    _newobj = _reduce

    def _newobj_ex(self, _: Any) -> None:
        self._stack.pop()
        self._reduce(None)

    def _inst(self, argument: str) -> None:
        self._marked()
        self._stack.append(PickledObject(argument.replace(" ", ".")))

    def _obj(self, _: Any) -> None:
        self._stack.append(represent_call(self._marked()[0], ()))

    def _build(self, _: Any) -> None:
        state = self._stack.pop()
        if isinstance(self._stack[-1], PickledObject):
            self._stack[-1].state = state


def copied_size(arguments: object, result: object) -> int:
    """How many items and characters a call may have looked at or copied.

    The items of arguments that are merely referred to do not count: they may be large arrays.
    """
    if not isinstance(arguments, tuple):
        return 0
    is_reference = isinstance(result, PickledObject) and result.arguments is arguments
    sized = (str, bytes, bytearray, list, tuple)
    copied = () if is_reference else arguments
    return len(arguments) + sum(len(part) for part in copied if isinstance(part, sized))


def represent_call(called: object, arguments: object) -> object:
    """The value that stands for the result of a call in a pickle.

    Some types of the standard library and of numpy become plain values, all others a PickledObject.
    """
    name, parts = parse_call(called, arguments)
    if name in ("copyreg._reconstructor", "copyreg.__newobj__") and parts:
        name, parts = parse_call(parts[0], parts[1:] if name.endswith("__newobj__") else ())
    if name in ("builtins.set", "builtins.frozenset"):
        return PickledSet(parts[0]) if parts and isinstance(parts[0], list) else PickledSet()
    if name == "_codecs.encode" and parts and isinstance(parts[0], str):
        return parts[0].encode("latin-1", "replace")  # how bytes were pickled for Python 2
    if name == "builtins.bytes" and not parts:
        return b""
    if name in ("collections.OrderedDict", "collections.defaultdict", "collections.Counter"):
        return parts[0] if parts and isinstance(parts[0], PickledDict) else PickledDict()
    if name == "collections.deque":
        return []
    if name == "builtins.getattr" and are_of_types(parts, (PickledObject, str)):
        return PickledObject(f"{parts[0].name}.{parts[1][:100]}")  # a member of an enum
    if re.fullmatch(NUMPY_ARRAY, name):
        return PickledObject("numpy.ndarray", parts)
    if re.fullmatch(NUMPY_SCALAR, name) and len(parts) == 2:
        values = unpack_items(parts[0], parts[1], 1)
        return values[0] if values else PickledObject(f"numpy.{dtype_name(parts[0])}")
    text = format_known_object(name, parts)
    return PickledObject(name, parts) if text is None else text


def parse_call(called: object, arguments: object) -> tuple[str, tuple[Any, ...]]:
    """The name of what a pickle calls, as in Python 3, and the arguments."""
    if not isinstance(called, PickledObject):
        raise ValueError("it calls something that is not a class")
    name = called.name.replace("__builtin__.", "builtins.").replace("copy_reg.", "copyreg.")
    return name, arguments if isinstance(arguments, tuple) else ()


def format_known_object(name: str, parts: tuple[Any, ...]) -> str | None:
    """The text of an object of a well-known class, as `str` gives it; None for other classes."""
    if name.startswith("datetime.") and parts and isinstance(parts[0], (bytes, str)):
        return format_pickled_time(name, *parts[:2])
    if name == "datetime.timedelta" and are_of_types(parts, (int, int, int)):
        return format_pickled_timedelta(*parts)
    if re.fullmatch(PATH_CLASS, name) and all(isinstance(part, str) for part in parts):
        return os.path.join("", *parts)
    if name in ("decimal.Decimal", "fractions.Fraction") and len(parts) == 1:
        return parts[0] if isinstance(parts[0], str) else None
    return None


PATH_CLASS = r"pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path"
NUMPY_ARRAY = r"numpy\.(_?core)\.(multiarray\._reconstruct|numeric\._frombuffer)"
NUMPY_SCALAR = r"numpy\.(_?core)\.multiarray\.scalar"


def are_of_types(values: Sequence[object], types: Sequence[type]) -> bool:
    """Whether there is one value of each type, in their order."""
    return len(values) == len(types) and all(map(isinstance, values, types))


def format_pickled_timedelta(days: int, seconds: int, microseconds: int) -> str | None:
    """The text of a timedelta; None if there is no such timedelta."""
    import datetime

    try:
        return str(datetime.timedelta(days, seconds, microseconds))
    except OverflowError:
        return None


def format_pickled_time(name: str, state: bytes | str, zone: object = None) -> str | None:
    """The text of a date or time, by the bytes of its pickled state; None if they make none."""
    import datetime

    kinds: Mapping[str, Any] = {
        "datetime.datetime": datetime.datetime,
        "datetime.date": datetime.date,
        "datetime.time": datetime.time,
    }
    try:
        raw = state[:20] if isinstance(state, bytes) else state[:20].encode("latin-1")
        text = str(kinds[name](raw))
    except (LookupError, TypeError, ValueError):
        return None
    if not isinstance(zone, PickledObject):
        return text
    offset = zone.arguments[0] if zone.arguments else zone.name
    return (
        f"{text}+00:00" if offset == "0:00:00" else f"{text} {format_value(offset, LONGEST_CELL)}"
    )


# -- values of artifacts: their text ---------------------------------------------------------------

LONGEST_TEXT = 100_000
LONGEST_CELL = 100  # of a table
DEEPEST_TEXT = 50
MOST_ATTRIBUTES = 20
LONGEST_INTEGER = 4000  # bits; the decimal digits of longer ones take too long


def format_value(value: Any, longest: int = LONGEST_TEXT) -> str:
    """The text that `str` would give for the value, had it been unpickled.

    What exceeds the `longest` text is cut off.
    """
    if isinstance(value, str):
        return value[:longest]
    pieces: list[str] = []
    room = longest
    for piece in format_pieces(value, 0):
        pieces.append(piece[:room])
        room -= len(piece)
        if room <= 0:
            return "".join(pieces) + "..."
    return "".join(pieces)


BRACKETS: Mapping[type, tuple[str, str]] = {
    list: ("[", "]"),
    tuple: ("(", ")"),
    PickledSet: ("{", "}"),
}


def format_pieces(value: Any, depth: int) -> Iterator[str]:
    """The pieces of the text of a value. There may be far too many to ask for all of them."""
    if depth > DEEPEST_TEXT:
        yield "..."
    elif isinstance(value, PickledDict):
        yield "{"
        for index, (key, item) in enumerate(value):
            yield ", " if index else ""
            yield from format_pieces(key, depth + 1)
            yield ": "
            yield from format_pieces(item, depth + 1)
        yield "}"
    elif isinstance(value, PickledSet) and not value:
        yield "set()"
    elif type(value) in BRACKETS:
        opening, closing = BRACKETS[type(value)]
        yield opening
        for index, item in enumerate(value):
            yield ", " if index else ""
            yield from format_pieces(item, depth + 1)
        yield f",{closing}" if isinstance(value, tuple) and len(value) == 1 else closing
    elif isinstance(value, PickledObject):
        yield from format_object(value, depth)
    elif isinstance(value, (bytes, bytearray)) and len(value) > LONGEST_BYTES:
        yield describe_bytes(value)
    elif isinstance(value, int) and value.bit_length() > LONGEST_INTEGER:
        yield f"<integer of {value.bit_length()} bits>"
    else:
        yield repr(value[: LONGEST_TEXT + 1] if isinstance(value, (str, bytes)) else value)


def format_object(value: PickledObject, depth: int) -> Iterator[str]:
    """The pieces of the text of an object.

    An array or table is shown with its items, any other object by its class, arguments and
    attributes, if these are few.
    """
    table = parse_table(value)
    if table is not None:
        yield from format_table(table)
        return
    array = parse_array(value)
    if array is not None:
        yield from format_array(array, depth)
        return
    yield f"<class {value.name}" if value.is_class else f"<{value.name}"
    has_details = not value.name.startswith("pandas.")  # whose internals mean nothing to a user
    if has_details and 0 < len(value.arguments) <= MOST_ATTRIBUTES:
        yield "("
        for number, item in enumerate(value.arguments):
            yield ", " if number else ""
            yield from format_pieces(item, depth + 1)
        yield ")"
    attributes = value.attributes()
    if has_details and len(attributes) <= MOST_ATTRIBUTES:
        for name, item in attributes.items():
            yield f" {name[:100]}="
            yield from format_pieces(item, depth + 1)
    yield ">"


LONGEST_BYTES = 100  # of bytes that are shown whole

MAGIC_NUMBERS: Sequence[tuple[bytes, str]] = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"%PDF-", "application/pdf"),
    (b"PK\x03\x04", "application/zip"),
    (b"\x1f\x8b", "application/gzip"),
    (b"PAR1", "application/vnd.apache.parquet"),
)
"""The bytes that files of a type begin with, and the media type."""


def media_type(value: bytes | bytearray) -> str:
    """The media type of some content, by its first bytes."""
    if value[:4] == b"RIFF" and value[8:12] == b"WEBP":
        return "image/webp"
    kinds = (kind for beginning, kind in MAGIC_NUMBERS if value.startswith(beginning))
    return next(kinds, "application/octet-stream")


def describe_bytes(value: bytes | bytearray) -> str:
    """The length, media type and first bytes of content that is too long to show."""
    return f"<{len(value)} bytes, {media_type(value)}: {bytes(value[:16])!r}...>"


# -- values of artifacts: arrays and tables of numpy and pandas ------------------------------------

MOST_ITEMS_SHOWN = 100  # of an array that is shown whole
FIRST_ITEMS = 10  # that are shown of a larger one
FIRST_ROWS = 5  # of a table

NUMPY_FORMATS: Mapping[str, str] = {
    "b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I",
    "u8": "Q", "f2": "e", "f4": "f", "f8": "d",
}  # fmt: skip
"""The format characters of the module struct for numpy's types."""

NUMPY_NAMES = {"b": "bool", "i": "int", "u": "uint", "f": "float", "c": "complex", "O": "object"}


class Array(NamedTuple):
    """A numpy array, with as many items as are shown."""

    dtype: str
    shape: tuple[int, ...]
    items: list[Any] | None  # the first ones in row-major order; None if they cannot be read


class TableColumn(NamedTuple):
    """A column of a table, with the items of the first rows."""

    name: object
    dtype: str
    items: list[Any] | None


class Table(NamedTuple):
    """A DataFrame or Series of pandas."""

    kind: str
    rows: int
    columns: list[TableColumn]


def dtype_code(dtype: object) -> str | None:
    """The short name of a numpy type, such as f8; None for any other object."""
    if isinstance(dtype, PickledObject) and dtype.name == "numpy.dtype" and dtype.arguments:
        code = dtype.arguments[0]
        return code if isinstance(code, str) and 0 < len(code) < 20 else None
    return None


def dtype_name(dtype: object) -> str:
    """The name of a numpy type, such as float64; for another type, the name of its class."""
    code = dtype_code(dtype)
    if code is None:
        return dtype.name.rpartition(".")[2] if isinstance(dtype, PickledObject) else "unknown"
    if code == "b1" or code[0] == "O":
        return NUMPY_NAMES[code[0]]
    if code[0] in NUMPY_NAMES and code[1:].isdigit():
        return f"{NUMPY_NAMES[code[0]]}{8 * int(code[1:])}"
    return {"M": "datetime64", "m": "timedelta64", "U": "str", "S": "bytes"}.get(code[0], code)


def unpack_items(dtype: object, content: object, most: int) -> list[Any] | None:
    """The first items of an array by its type and content, or None if they cannot be read."""
    code = dtype_code(dtype)
    if code is None:
        return None
    if isinstance(content, list):
        return content[:most]  # of objects
    if not isinstance(content, (bytes, bytearray)):
        return None
    state = dtype.state if isinstance(dtype, PickledObject) else None
    order = ">" if isinstance(state, tuple) and len(state) > 1 and state[1] == ">" else "<"
    if code in NUMPY_FORMATS:
        size = int(code[1:])
        count = min(most, len(content) // size)
        return list(struct.unpack_from(f"{order}{count}{NUMPY_FORMATS[code]}", content))
    if code in ("c8", "c16"):
        count = min(most, len(content) // int(code[1:]))
        parts = struct.unpack_from(f"{order}{2 * count}{'f' if code == 'c8' else 'd'}", content)
        return [complex(*pair) for pair in zip(parts[::2], parts[1::2])]
    if code == "M8":
        count = min(most, len(content) // 8)
        unit = datetime64_unit(state)
        return [format_datetime64(n, unit) for n in struct.unpack_from(f"{order}{count}q", content)]
    if code[0] in "US" and code[1:].isdigit() and int(code[1:]) > 0:
        size = int(code[1:]) * (4 if code[0] == "U" else 1)
        encoding = ("utf-32-le" if order == "<" else "utf-32-be") if code[0] == "U" else "latin-1"
        whole = range(0, min(most * size, len(content) - size + 1), size)
        return [
            bytes(content[i : i + size]).decode(encoding, "replace").rstrip("\0") for i in whole
        ]
    return None


SECONDS_IN_UNITS = {
    "D": 86400.0,
    "h": 3600.0,
    "m": 60.0,
    "s": 1.0,
    "ms": 1e-3,
    "us": 1e-6,
    "ns": 1e-9,
}
NOT_A_TIME = -(2**63)


def datetime64_unit(state: Any) -> str:
    """The unit that a datetime64 counts, from the state of its type; empty if unknown."""
    try:
        return str(state[-1][-1][0], "ascii", "replace")
    except (LookupError, TypeError):
        return ""


def format_datetime64(count: int, unit: str) -> str:
    """The text of a datetime64; its bare number if the unit has no fixed length."""
    import datetime

    if count == NOT_A_TIME:
        return "NaT"
    if unit not in SECONDS_IN_UNITS:
        return f"{count} {unit}".strip()
    try:
        passed = datetime.timedelta(seconds=count * SECONDS_IN_UNITS[unit])
        return str(datetime.datetime(1970, 1, 1) + passed)
    except OverflowError:
        return f"{count} {unit}"


def parse_array(value: object, most: int = MOST_ITEMS_SHOWN) -> Array | None:
    """The numpy array that a value stands for, or None if it stands for something else."""
    if not isinstance(value, PickledObject) or value.is_class:
        return None
    if value.name != "numpy.ndarray" or len(value.arguments) < 3:
        return None
    if isinstance(value.state, tuple) and len(value.state) == 5:
        _, shape, dtype, is_fortran, content = value.state
    else:
        content, dtype, shape = value.arguments[:3]
        is_fortran = value.arguments[3:4] == ("F",)
    if not is_shape(shape):
        return None
    items = unpack_items(dtype, content, most)
    if items and is_fortran and len(shape) > 1:
        items = to_row_major(items, shape)
    return Array(dtype_name(dtype), shape, items)


def is_shape(shape: object) -> bool:
    """Whether an array of numpy can have a shape: of at most 64 dimensions, and so many items."""
    if not isinstance(shape, tuple) or len(shape) > 64:
        return False
    return all(isinstance(size, int) and 0 <= size < 2**63 for size in shape)


def to_row_major(items: list[Any], shape: tuple[int, ...]) -> list[Any] | None:
    """The items of a column-major array in row-major order; None unless all are given."""
    if len(items) != math.prod(shape):
        return None
    steps = list(itertools.accumulate(shape[:-1], operator.mul, initial=1))
    places = itertools.product(*map(range, shape))
    return [items[sum(map(operator.mul, place, steps))] for place in places]


def format_array(array: Array, depth: int) -> Iterator[str]:
    """The pieces of an array's text: nested lists if it is small, else type, shape, first items."""
    count = math.prod(array.shape)
    if array.items is not None and len(array.items) == count:
        yield "array("
        yield from format_pieces(reshape(array.items, array.shape), depth + 1)
        yield f", dtype={array.dtype})"
        return
    yield f"<array of {array.dtype}, shape {array.shape}"
    if array.items:
        yield ": "
        yield from format_pieces(array.items[:FIRST_ITEMS], depth + 1)
        yield "..."
    yield ">"


def reshape(items: list[Any], shape: tuple[int, ...]) -> Any:
    """Items in nested lists of a shape; the only item if there are no dimensions."""
    if not shape:
        return items[0]
    for size in shape[:0:-1]:
        items = [items[i : i + size] for i in range(0, len(items), size)] if size else []
    return items


def parse_table(value: PickledObject) -> Table | None:
    """The pandas table that an object stands for, or None if it stands for something else.

    A block manager of pandas holds the columns of each type together in a block, and the labels of
    columns and rows as axes.
    """
    kind = value.name.rpartition(".")[2]
    if not value.name.startswith("pandas.") or kind not in ("DataFrame", "Series"):
        return None
    manager = value.attributes().get("_mgr", value.attributes().get("_data"))
    if not isinstance(manager, PickledObject):
        return None
    try:
        blocks, axes = manager_parts(manager)
        rows = index_length(axes[-1])
        if kind == "Series":
            names: list[Any] = [value.attributes().get("_name")]
            found = block_columns(blocks, 1, rows)
        else:
            names = index_items(axes[0])
            found = block_columns(blocks, len(names), rows)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        return None
    unknown = ("unknown", None)
    columns = [TableColumn(name, *found.get(place, unknown)) for place, name in enumerate(names)]
    return Table(kind, rows, columns)


def manager_parts(manager: PickledObject) -> tuple[list[tuple[Any, Any]], Sequence[Any]]:
    """The blocks of a manager, each as its values and their columns' places, and the axes.

    Depending on the version and the kind of table, pandas has them as arguments or in the state.
    """
    if len(manager.arguments) == 2:
        blocks, axes = manager.arguments
        return [(block.arguments[0], block.arguments[1]) for block in blocks], axes
    versions = [part for part in cast(Any, manager.state) if isinstance(part, PickledDict) and part]
    inner = versions[-1][-1][1].fields()
    blocks = [block.fields() for block in inner["blocks"]]
    return [(block["values"], block["mgr_locs"]) for block in blocks], inner["axes"]


def block_columns(
    blocks: Iterable[tuple[Any, Any]], count: int, rows: int
) -> dict[int, tuple[str, list[Any] | None]]:
    """The types and first items of the columns, by their places in the table."""
    columns: dict[int, tuple[str, list[Any] | None]] = {}
    for values, placement in blocks:
        places = list(block_places(placement, count))
        dtype, items = block_items(values, rows * len(places))
        for number, place in enumerate(places):
            part = None if items is None else items[number * rows : number * rows + FIRST_ROWS]
            columns[place] = (dtype, part)
    return columns


def block_places(placement: object, count: int) -> Iterable[int]:
    """The places of a block's columns among all `count` columns, from a slice or an array."""
    if isinstance(placement, PickledObject) and placement.name.endswith("slice"):
        return range(*slice(*placement.arguments).indices(count))
    array = parse_array(placement, count)
    return array.items or () if array else ()


MOST_ITEMS_READ = 100_000
CODED_DTYPES = frozenset(("CategoricalDtype", "PeriodDtype", "SparseDtype"))
"""Types of pandas that store codes in place of the items themselves."""


def block_items(values: Any, count: int) -> tuple[str, list[Any] | None]:
    """The type of a block and its items, or None if they are not in a numpy array.

    The extension arrays of pandas hold one, in their state or arguments.
    """
    array = parse_array(values, min(count, MOST_ITEMS_READ))
    if array is not None:
        return array.dtype, array.items
    state = values.state if isinstance(values.state, tuple) else ()
    for part in (*state, *values.attributes().values(), *values.arguments):
        inner = parse_array(part, min(count, MOST_ITEMS_READ))
        if inner is not None:
            named = next(
                (p for p in state if isinstance(p, PickledObject) and "Dtype" in p.name), None
            )
            name = inner.dtype if named is None else dtype_name(named)
            return name, None if name in CODED_DTYPES else inner.items
    return values.name.rpartition(".")[2], None


def index_fields(index: Any) -> dict[str, Any]:
    """The named parts that an index was pickled with."""
    fields: dict[str, Any] = index.arguments[1].fields()
    return fields


def index_length(index: Any) -> int:
    """The number of labels in an index."""
    fields = index_fields(index)
    if "start" in fields:
        return len(range(fields["start"], fields["stop"], fields["step"]))
    array = parse_array(fields["codes"][0] if "codes" in fields else fields["data"])
    if array is not None:
        return array.shape[0]
    return len(index_items(index))


def index_items(index: Any) -> list[Any]:
    """The labels of an index; ValueError if they cannot be read."""
    fields = index_fields(index)
    if "start" in fields:
        return list(range(fields["start"], fields["stop"], fields["step"])[:MOST_ITEMS_READ])
    _, items = block_items(fields["data"], MOST_ITEMS_READ)
    if items is None:
        raise ValueError("the labels cannot be read")
    return items


def format_table(table: Table) -> Iterator[str]:
    """The pieces of a table's text: its size, its columns with their types, and its first rows."""
    yield f"{table.kind} of {table.rows} rows"
    if table.kind == "DataFrame":
        yield f" and {len(table.columns)} columns"
    for number, column in enumerate(table.columns):
        yield ", " if number else "\n"
        if table.kind == "DataFrame":
            yield f"{format_value(column.name, LONGEST_CELL)}: "
        yield column.dtype
    known = [column for column in table.columns if column.items is not None]
    for row in range(min(table.rows, FIRST_ROWS)):
        cells = (c.items[row] for c in known if c.items is not None and row < len(c.items))
        for number, cell in enumerate(cells):
            yield "  " if number else "\n"
            yield format_value(cell, LONGEST_CELL)
    if known and table.rows > FIRST_ROWS:
        yield "\n..."


def to_json(value: Any) -> Any:
    """A value that was read from a pickle, in the types of JSON.

    TooLarge if there is too much of it: a small pickle can hold the same text a million times.
    """
    room = LARGEST_PLAIN

    def plain(value: Any, depth: int) -> Any:
        nonlocal room
        room -= len(value) + 1 if isinstance(value, str) else 1
        if room < 0 or depth > DEEPEST_TEXT:
            raise TooLarge("It is too large.")
        if isinstance(value, PickledDict):
            return {plain(format_value(k), depth): plain(v, depth + 1) for k, v in value}
        if isinstance(value, (list, tuple)):
            return [plain(item, depth + 1) for item in value]
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, float) and math.isfinite(value):
            return value
        if isinstance(value, int) and value.bit_length() <= LONGEST_INTEGER:
            return value
        return plain(format_value(value), depth)

    return plain(value, 0)


# ==================================================================================================
# Queries: filters, orders, cursors, pages: pure functions over rows
# ==================================================================================================
#
# Rules of this layer:
#
# - Functions of a query and of rows (records, or rows of the model), and nothing else: no store, no
#   clock. Whoever has rows decides which of them to fetch or judge before they are filtered.
# - A parameter that makes no sense is a BadQuery, before any row is looked at. One that names no
#   column is ignored, as in the reference.
# - No query may take for ever: there is no operator whose time is not bounded, and a regular
#   expression that is not plainly cheap goes to a Search that can be interrupted.
#
# How it works: a Field tells the value of a column in a row, how the text of a parameter becomes an
# operand, and which operators apply. The tables of fields, one for each list of each API, say what
# can be filtered and ordered; to add a column is to add a line there. Only `_tags` is not among
# them: parse_tag_filters knows its operators. parse_filters makes predicates of parameters, all of
# which must hold; select_rows also sorts by `_order`.
#
# The lists of the metadata API have a fixed order, newest first, and pages with cursors. An Order
# has the sort key of such a list and names the fields that it needs. A cursor consists of these
# fields of the last record of a page. Decoded, it gives the sort key after which the next page
# starts, even if that record is gone by then.


class BadQuery(Exception):
    """A parameter that makes no sense; the sentence says why."""


Query = Sequence[tuple[str, str]]
"""The parameters of a request in their order; a name may occur several times."""

Predicate = Callable[[Any], bool]


def first_value(query: Query, name: str) -> str | None:
    """The first value of a parameter, or None if it is not given."""
    return next((value for key, value in query if key == name), None)


# -- filters: ?field:operator=value,value ----------------------------------------------------------

COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
LIKENESSES: Mapping[str, Callable[[str, str], bool]] = {
    "co": lambda text, part: part.lower() in text.lower(),
    "sw": lambda text, start: text.lower().startswith(start.lower()),
    "ew": lambda text, end: text.lower().endswith(end.lower()),
    "li": lambda text, pattern: is_like(text.lower(), pattern.lower()),
}
OPERATORS = frozenset((*COMPARISONS, *LIKENESSES, "is"))

STATUSES = ("running", "completed", "failed")
INTEGER = r"(?a)\s*[+-]?[0-9]{1,1000}\s*"


def is_like(text: str, pattern: str) -> bool:
    """SQL's LIKE: `%` is any text, `_` any character, a backslash takes the next one literally.

    It backtracks to the last `%` only, so the time is at most the product of the two lengths, which
    it would not be for a regular expression.
    """
    parts = re.findall(r"\\.|.", pattern, re.DOTALL)
    at = part = 0
    star, resume = -1, 0
    while at < len(text):
        if part < len(parts) and parts[part] == "%":
            star, resume = part, at
            part += 1
        elif part < len(parts) and parts[part] in ("_", text[at], "\\" + text[at]):
            at, part = at + 1, part + 1
        elif star >= 0:
            resume += 1
            at, part = resume, star + 1
        else:
            return False
    return all(rest == "%" for rest in parts[part:])


class Field(NamedTuple):
    """A column that rows can be filtered by."""

    value: Callable[[Any], Any]  # of the column in a row
    operand: Callable[[str, str], Any]  # its name and a parameter's text -> what values compare to
    operators: frozenset[str] = OPERATORS
    is_list: bool = True  # whether a comma separates alternatives


def parse_text(name: str, text: str) -> str:
    """The operand of a text column: the text of the parameter."""
    return text


def parse_integer(name: str, text: str) -> int:
    """The operand of a column of numbers."""
    if not re.fullmatch(INTEGER, text):
        raise BadQuery(f"invalid {name}: expected an integer, got {text!r}")
    return int(text)


def parse_epoch(name: str, text: str) -> int:
    """The operand of a column of times."""
    if not re.fullmatch(INTEGER, text):
        unit = "seconds" if name == "last_heartbeat_ts" else "milliseconds"
        raise BadQuery(f"invalid {name}: expected integer epoch {unit}, got {text!r}")
    return int(text)


def parse_id(name: str, text: str) -> IdSortKey:
    """The operand of a column of ids."""
    return id_sort_key(parse_integer(name, text))


def parse_status(name: str, text: str) -> str:
    """The operand of the status of runs."""
    if text not in STATUSES:
        raise BadQuery(f"unsupported status filter: {text}")
    return text


def parse_tag_list(name: str, text: str) -> object:
    """The operand of a column of tags, which is compared as a whole."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadQuery(f"invalid {name}: expected a JSON list, got {text!r}") from None


def string_id(identifier: Id) -> str | None:
    """An id that a client has chosen, which is a string; None for the number of a run or task."""
    return identifier if isinstance(identifier, str) else None


def parse_filters(query: Query, fields: Mapping[str, Field]) -> list[tuple[str, Predicate]]:
    """The conditions of a query, each with the name of its field; all of them must hold.

    Parameters that name none of the fields are ignored. BadQuery if a condition makes no sense.
    """
    conditions = []
    for parameter, value in query:
        name, _, asked = parameter.partition(":")
        if name in fields:
            conditions.append((name, parse_condition(name, fields[name], asked or "eq", value)))
    return conditions


def parse_condition(name: str, field: Field, asked: str, value: str) -> Predicate:
    """A condition on rows; a comma in its value separates alternatives."""
    if asked not in field.operators:
        raise BadQuery(f"unsupported operator {asked!r} for field {name!r}")
    alternatives = value.split(",") if field.is_list else [value]
    tests = [parse_alternative(name, field, asked, text) for text in alternatives]
    return lambda record: any(test(field.value(record)) for test in tests)


def parse_alternative(name: str, field: Field, asked: str, text: str) -> Predicate:
    """A condition on the value of a field. As in SQL, null fulfils no comparison but with null."""
    if text == "null":
        return (lambda value: value is not None) if asked == "ne" else (lambda value: value is None)
    if asked == "is":
        raise BadQuery(f"the operator 'is' of field {name!r} takes only null, not {text!r}")
    operand = field.operand(name, text)
    compare = COMPARISONS.get(asked) or LIKENESSES[asked]
    return lambda value: value is not None and compare(value, operand)


def parse_tag_filters(query: Query) -> list[Predicate]:
    """The conditions of `_tags` parameters, on the tags and system tags of a run together."""
    tests: list[Predicate] = []
    for parameter, value in query:
        name, _, asked = parameter.partition(":")
        if name == "_tags":
            if asked not in ("", "all", "any", "likeall", "likeany"):
                raise BadQuery(f"unsupported operator {asked!r} for field '_tags'")
            tests.append(make_tag_test(asked, value.split(",")))
    return tests


def make_tag_test(asked: str, wanted: list[str]) -> Predicate:
    """A condition on the tags of a run: it has all or any of them, or they occur in the text."""
    enough = any if asked.endswith("any") else all

    def test(run: Run) -> bool:
        tags = (run["tags"] or []) + (run["system_tags"] or [])
        among: list[str] | str = (
            json.dumps(tags, ensure_ascii=False) if asked.startswith("like") else tags
        )
        return enough(tag in among for tag in wanted)

    return test


def filter_records(records: Iterable[T], tests: Sequence[Predicate]) -> Iterable[T]:
    """The records that pass all tests."""
    return (r for r in records if all(test(r) for test in tests)) if tests else records


def regex_to_like(pair: tuple[str, str]) -> tuple[str, str]:
    """A parameter; the operator `re` is replaced by `li`, where `.*` becomes `%`."""
    name, separator, asked = pair[0].partition(":")
    if separator and asked == "re":
        parts = [re.sub(r"([%_\\])", r"\\\1", part) for part in re.split(r"\.\*+", pair[1])]
        return f"{name}:li", "%".join(parts) + "%"
    return pair


# -- the columns of both APIs ----------------------------------------------------------------------

ORDERED = frozenset((*COMPARISONS, "is"))
EQUAL = frozenset(("eq", "ne", "is"))

RUN_COLUMNS: Mapping[str, Field] = {
    "flow_id": Field(lambda run: run["flow_id"], parse_text),
    "run_number": Field(lambda run: id_sort_key(run["run_number"]), parse_id, ORDERED),
    "run_id": Field(lambda run: string_id(run["run_number"]), parse_text),
    "user_name": Field(lambda run: run["user_name"], parse_text),
    "user": Field(lambda run: run.get("user"), parse_text),
    "ts_epoch": Field(lambda run: run["ts_epoch"], parse_epoch, ORDERED),
    "last_heartbeat_ts": Field(lambda run: run["last_heartbeat_ts"], parse_epoch, ORDERED),
}
"""The columns of runs in both APIs."""

RUN_FIELDS: Mapping[str, Field] = {
    **RUN_COLUMNS,
    "tags": Field(lambda run: run["tags"], parse_tag_list, EQUAL, is_list=False),
    "system_tags": Field(lambda run: run["system_tags"], parse_tag_list, EQUAL, is_list=False),
    "status": Field(lambda run: run["status"], parse_status),
}
TASK_FIELDS: Mapping[str, Field] = {
    "task_id": Field(lambda task: id_sort_key(task["task_id"]), parse_id, ORDERED),
    "task_name": Field(lambda task: string_id(task["task_id"]), parse_text),
    "user_name": Field(lambda task: task["user_name"], parse_text),
    "ts_epoch": Field(lambda task: task["ts_epoch"], parse_epoch, ORDERED),
    "last_heartbeat_ts": Field(lambda task: task["last_heartbeat_ts"], parse_epoch, ORDERED),
}


def make_columns(texts: Iterable[str], numbers: Iterable[str]) -> dict[str, Field]:
    """Columns whose values are taken from the rows as they are."""
    return {
        **{name: Field(operator.itemgetter(name), parse_text) for name in texts},
        **{name: Field(operator.itemgetter(name), parse_integer, ORDERED) for name in numbers},
    }


TASK_ID = Field(lambda row: str(row["task_id"]), parse_text)

UI_RUN_COLUMNS: Mapping[str, Field] = {
    **RUN_COLUMNS,
    "run": Field(operator.itemgetter("run"), parse_text),
}
UI_JUDGED_COLUMNS: Mapping[str, Field] = make_columns(("status",), ("finished_at", "duration"))
"""Those columns of runs that are known only after the run has been judged."""

IN_TASKS = ("step_name", "task_name", "user_name")
"""The texts that the rows of tasks, and of what belongs to a task, have in common."""

UI_FLOW_COLUMNS: Mapping[str, Field] = make_columns(("flow_id", "user_name"), ("ts_epoch",))
UI_STEP_COLUMNS: Mapping[str, Field] = make_columns(
    ("step_name", "user_name"), ("ts_epoch", "duration")
)
UI_TASK_COLUMNS: Mapping[str, Field] = {
    **make_columns(
        (*IN_TASKS, "status"),
        ("attempt_id", "ts_epoch", "started_at", "finished_at", "duration"),
    ),
    "task_id": TASK_ID,
    "taskId": TASK_ID,  # the name that the official UI uses
}
UI_METADATA_COLUMNS: Mapping[str, Field] = {
    **make_columns(
        (*IN_TASKS, "field_name", "value", "type"),
        ("id", "attempt_id", "ts_epoch"),
    ),
    "task_id": TASK_ID,
}
UI_ARTIFACT_COLUMNS: Mapping[str, Field] = {
    **make_columns(
        (*IN_TASKS, "name", "location", "ds_type", "sha", "type", "content_type"),
        ("attempt_id", "ts_epoch"),
    ),
    "task_id": TASK_ID,
}


# -- orders of the UI: ?_order=-ts_epoch,step_name -------------------------------------------------

ColumnOrder = tuple[str, bool]
"""A column to order by, and whether the largest comes first."""


def select_rows(rows: Iterable[T], query: Query, fields: Mapping[str, Field]) -> list[T]:
    """The rows that pass the filters of a query, sorted by its `_order`."""
    found = list(filter_records(rows, [test for _, test in parse_filters(query, fields)]))
    sort_rows(found, parse_order(query, fields))
    return found


def parse_order(query: Query, known: Iterable[str]) -> list[ColumnOrder]:
    """The columns of `_order`, descending unless they have a plus; unknown ones are ignored."""
    order = []
    for part in (first_value(query, "_order") or "").split(","):
        name = part.lstrip("+- ")  # a plus in a URL arrives as a space
        if name in known:
            order.append((name, not part.startswith(("+", " "))))
    return order


def sort_rows(rows: list[Any], order: Sequence[ColumnOrder]) -> None:
    """Sort rows in place, as PostgreSQL does: null is larger than any value."""
    for name, is_descending in reversed(order):
        rows.sort(key=partial(null_last_key, name), reverse=is_descending)


def null_last_key(name: str, row: Mapping[str, Any]) -> tuple[bool, Any]:
    """A sort key for a column in which numbers, texts and null may occur."""
    value = row.get(name)
    return (value is None, id_sort_key(0 if value is None else value))


# -- pages: ?_limit=50&_cursor=... -----------------------------------------------------------------

DEFAULT_PAGE = 50
LARGEST_PAGE = 500


class Order(NamedTuple):
    """The order of a list, newest first.

    A cursor into the list is the base64 of a JSON object with the fields of the last record seen.
    """

    sort_key: Callable[[Any], SortKey]
    fields: Mapping[str, Callable[[object], object]]  # that the sort key needs, and their parsers


def parse_cursor_number(value: object) -> int | float:
    if isinstance(value, str) and re.fullmatch(INTEGER, value):
        return int(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return value
    raise ValueError


def parse_cursor_id(value: object) -> Id:
    return wire_id(value) if isinstance(value, str) else int(parse_cursor_number(value))


def parse_cursor_text(value: object) -> str:
    if isinstance(value, str):
        return value
    raise ValueError


FLOW_ORDER = Order(flow_sort_key, {"ts_epoch": parse_cursor_number, "flow_id": parse_cursor_text})
RUN_ORDER = Order(run_sort_key, {"ts_epoch": parse_cursor_number, "run_number": parse_cursor_id})
STEP_ORDER = Order(step_sort_key, {"ts_epoch": parse_cursor_number, "step_name": parse_cursor_text})
TASK_ORDER = Order(task_sort_key, {"ts_epoch": parse_cursor_number, "task_id": parse_cursor_id})
METADATA_ORDER = Order(
    metadatum_sort_key, {"ts_epoch": parse_cursor_number, "id": parse_cursor_number}
)
ARTIFACT_ORDER = Order(
    artifact_sort_key,
    {
        "ts_epoch": parse_cursor_number,
        "task_id": parse_cursor_id,
        "name": parse_cursor_text,
        "step_name": parse_cursor_text,
    },
)


def encode_cursor(order: Order, record: Mapping[str, Any]) -> str:
    """The cursor of the page that begins after a record."""
    fields = {name: record[name] for name in order.fields}
    return base64.b64encode(json.dumps(fields).encode()).decode()


def decode_cursor(order: Order, cursor: str) -> SortKey:
    """The sort key that a page begins after; BadQuery if it is no cursor into such a list.

    The field `step_name` may be missing, as it is in the cursors of the reference.
    """
    try:
        fields = json.loads(base64.b64decode(cursor, validate=True))
        fields = {"step_name": "", **fields}
        return order.sort_key({name: parse(fields[name]) for name, parse in order.fields.items()})
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        raise BadQuery("Invalid cursor") from None


def parse_limit(query: Query) -> int:
    """The number of records on a page."""
    text = first_value(query, "_limit")
    if not text:
        return DEFAULT_PAGE
    if not re.fullmatch(r"[0-9]{1,1000}", text) or int(text) < 1:
        raise BadQuery(f"_limit is a number from 1 to {LARGEST_PAGE}, not {text!r}.")
    return min(int(text), LARGEST_PAGE)


# -- regular expressions ---------------------------------------------------------------------------

REGEX_PIECE = (
    r"(?s)"
    r"\\."  # an escape
    r"|\[\^?\]?(?:\\.|\[:\w+:\]|[^]\\])*\]"  # a class
    r"|\(\?[A-Za-z]+\)|\(\?(?:<?[=!]|P?<\w+>|[A-Za-z]*:)"  # flags, the beginning of a group
    r"|."
)
CLASS_PIECE = r"(?s)\\.|\[:(\w+):\]|[\[&|~]"

NAMED_CLASSES = {
    "alnum": "a-zA-Z0-9",
    "alpha": "a-zA-Z",
    "blank": r" \t",
    "digit": "0-9",
    "lower": "a-z",
    "punct": r"!-/:-@\[-`{-~",
    "space": r"\s",
    "upper": "A-Z",
    "xdigit": "0-9a-fA-F",
}

ESCAPES = {r"\y": r"\b", r"\Y": r"\B", r"\m": r"\b(?=\w)", r"\M": r"\b(?<=\w)", r"\b": r"\x08"}


class Regex(NamedTuple):
    """A regular expression of Python's, and how it has to match."""

    pattern: str
    flags: int
    method: str  # "search" or "fullmatch"


LONGEST_PATTERN = 1000
WRAPPED = r"(?s)\^\(\?:(.*)\)\$"
"""Metaflow's client wraps patterns like this, so that a search is the full match of local mode."""


def candidate_regexes(pattern: str) -> list[Regex]:
    """What a pattern may mean, most likely first; the first that compiles is used.

    A pattern that Metaflow's client has wrapped is a full match in Python's syntax, as in local
    mode. Any other is a search in PostgreSQL's syntax, as in the reference.
    """
    if len(pattern) > LONGEST_PATTERN:
        raise BadQuery(f"A pattern has at most {LONGEST_PATTERN} characters.")
    wrapped = re.fullmatch(WRAPPED, pattern)
    candidates = [Regex(wrapped[1], 0, "fullmatch")] if wrapped else []
    with contextlib.suppress(KeyError):  # an unknown named class
        candidates.append(Regex(translate_postgres(pattern), int(re.DOTALL), "search"))
    return [*candidates, Regex(pattern, 0, "search")]


def translate_postgres(pattern: str) -> str:
    """A regular expression in PostgreSQL's syntax, in Python's; KeyError for an unknown class.

    The two differ in the meaning of `$` and of a few escapes, and in named classes. Also, `.` is
    any character in PostgreSQL, for which the caller sets a flag.
    """

    def translate(match: Match[str]) -> str:
        piece = match.group()
        if piece[0] == "[" and len(piece) > 1:
            return "[" + re.sub(CLASS_PIECE, translate_in_class, piece[1:])
        return r"\Z" if piece == "$" else ESCAPES.get(piece, piece)

    def translate_in_class(match: Match[str]) -> str:
        if match[1]:
            return NAMED_CLASSES[match[1]]
        return match[0] if match[0][0] == "\\" else "\\" + match[0]

    return re.sub(REGEX_PIECE, translate, pattern)


MOST_STEPS_IN_PLACE = 10**7
"""A search that takes at most so many steps of Python's matcher, some tenths of a second, is made
in this process, where nothing can interrupt it."""

Search = Callable[[Sequence[Regex], Collection[str]], "set[str]"]
"""Finds the texts that match the first candidate that compiles; BadQuery if none does."""


def search_in_place(candidates: Sequence[Regex], texts: Collection[str]) -> set[str]:
    """A Search in this process, which nothing can interrupt."""
    problem = ""
    for pattern, flags, method in candidates:
        try:
            return set(filter(getattr(re.compile(pattern, flags), method), texts))
        except (re.error, RecursionError, OverflowError) as error:
            problem = str(error)
    raise BadQuery(f"{candidates[-1].pattern!r} is not a regular expression: {problem}.")


def find_matches(pattern: str, texts: Collection[str], search: Search) -> set[str]:
    """The texts that match a pattern; BadQuery if it does not compile or takes too long.

    Python's matcher backtracks through all ways to divide a text among the repeats of a pattern.
    That can take for ever, so all but plainly cheap patterns go to `search`, which has a limit.
    """
    candidates = candidate_regexes(pattern)
    if is_cheap(candidates[0], texts):
        with contextlib.suppress(BadQuery):  # then the other candidates, which may not be cheap
            return search_in_place(candidates[:1], texts)
    return search(candidates, texts)


PLAIN_PIECE = r"(?as)\\[^\w]|\\[dDsSwWZ]|\[\^?\w+\]|[^\\()\[\]*+?{}]"
"""A piece of a pattern that matches a single character or none, in a single step."""

REPEAT = r"[*+?]|\{[0-9]{1,3}(?:,[0-9]{0,3})?\}"


def is_cheap(reading: Regex, texts: Iterable[str]) -> bool:
    """Whether a search is certain to be quick.

    That is so for literal text, simple classes, anchors, alternatives of these and a single repeat,
    in texts that are not too long.
    """
    plain_piece, repeat = re.compile(PLAIN_PIECE), re.compile(REPEAT)
    at = repeats = 0
    is_repeatable = False
    while at < len(reading.pattern):
        piece = plain_piece.match(reading.pattern, at)
        if piece is None:
            piece = repeat.match(reading.pattern, at) if is_repeatable and not repeats else None
            repeats += 1
        if piece is None:
            return False
        is_repeatable = piece.group() not in ("^", "$", "|", r"\Z") and not repeat.fullmatch(
            piece.group()
        )
        at = piece.end()
    pieces = reading.pattern.count("|") + 1 + len(reading.pattern) // 50
    steps: int = sum((len(text) + 1) ** (1 + repeats) for text in texts)
    return steps * pieces <= MOST_STEPS_IN_PLACE


# ==================================================================================================
# Model: runs, steps and attempts as a person means them: statuses, causes, times, logs, values
# ==================================================================================================
#
# Rules of this layer:
#
# - It only reads, and keeps nothing that could not be computed again. Any thread may use it.
# - What has become of a run, and why, is decided by Runs.judge alone, and what has become of an
#   attempt by Attempts alone. Both APIs, the page and the commands show what these say.
# - Rows are records with more columns. Times are epoch milliseconds, except that heartbeats are
#   epoch seconds.
#
# The pieces. Each is a class with one subject and at most one cache, and each uses only those above
# it in this list. A Model has one of each, which all read the same store; callers name the piece
# that they mean, as in model.runs.judge(row).
#
#     Artifacts  the artifacts of tasks and their values, and the parameters of runs
#     Logs       what the scheduler stores of a process: what it has written, and how it ended
#     Cards      the cards of tasks, and the files that hold them
#     Histories  what the records of a task say of it: its attempts, its origin, the loops around it
#     Graphs     the graph of a run's flow: how often tasks are tried, and which come before which
#     Causes     why an attempt or a run has failed
#     Attempts   the rows of attempts: the status of each, its times and its cause
#     Runs       the rows of runs, and the verdict on each
#
# Above them stand the rows, which all of them share, and below them what compares whole runs: a few
# functions of a Model. A RunFolders is made anew for each look at a run, and reads it only once.
#
# What a verdict rests on. Nobody records the end of a run, so it is inferred, in this order:
#
# 1. Completed, if the newest attempt of the newest task of the end step says that it went well.
# 2. Running, if an attempt of any task is running. It is, if neither its metadata, nor the artifact
#    _task_ok, nor the file that its scheduler leaves, nor a later attempt says that it has ended,
#    and its task still gives signs of life: heartbeats, or if it sends none, writing to files.
# 3. Failed, if a task has failed and will not be tried again: because of the decorators in the
#    flow's graph, or because its log says that the scheduler has given the run up. If no graph is
#    known, it is the end step that must have failed.
# 4. Failed, if the run gives no signs of life either: it has sent none for RUN_HEARTBEAT_CUTOFF
#    seconds, or its client never sends any. Otherwise it is running, between two tasks.
#
# Causes are found likewise: the attempt that failed first is to blame, and the artifact with its
# exception tells more than its stderr, which tells more than how its process ended.
#
# A verdict is cached, together with the versions of all records that it rests on. It is valid as
# long as the store says that these are unchanged, but that a run is running only for a second more:
# signs of life leave no trace in versions. Histories of tasks and causes are cached by version too,
# and graphs and logs by the identity of their files.

# -- rows: records with more columns ---------------------------------------------------------------

RUNNING, COMPLETED, FAILED = STATUSES
PENDING = "pending"

PARAMETERS_STEP = "_parameters"

TASK_HEARTBEAT_CUTOFF = 60
"""Seconds without a heartbeat after which a task is dead: it has missed six."""


if TYPE_CHECKING:  # as with records

    class Cause(TypedDict):
        """Why a run or an attempt failed."""

        kind: str  # one of CAUSE_KINDS
        pathspec: str  # of the task; of the run where no task is to blame
        step_name: str | None
        task_id: Id | None
        attempt_id: int | None
        attempts: int | None  # the most attempts that the task may have; None if unknown
        type: str | None  # the exception's
        message: str | None  # the exception's, or what killed the process
        file: str | None  # of the user's own code, as are the lines in it
        line: int | None
        summary: str  # all of this in a few words
        stderr: list[str]  # the last lines that the attempt has written there

    class RunRow(BaseRun):
        """A run. As in all rows, tags are never null, and `run_id` is an id that a client chose."""

        run_id: str | None
        run: str
        user: str | None  # the verified owner
        status: str  # "" until the run is judged; see Runs.judge
        finished_at: int | None
        duration: int | None
        cause: Cause | None
        origin_run_id: str | None  # of the run that it was resumed from

    class StepRow(Step):
        """A step; its duration is that of its tasks together."""

        run_id: str  # set even if it is a number, as in the backend of the official UI
        duration: int

    class AttemptRow(Task):
        """An attempt of a task. A task that has not been started has an attempt 0 all the same."""

        run_id: str | None
        task_name: str | None
        attempt_id: int
        status: str
        task_ok: None
        started_at: int | None
        finished_at: int | None
        duration: int
        cause: Cause | None  # set also if the status is completed: @catch has caught the exception
        foreach_label: str | None  # the values of the foreach loops around it
        origin_pathspec: str | None  # of the task that it was cloned from
        is_log_stored: bool  # whether its log is complete, or will never be stored

    class MetadatumRow(Metadatum):
        """A metadatum; its value is always text."""

        run_id: str | None
        task_name: str | None
        attempt_id: int | None

    class _ArtifactRow(Artifact):
        run_id: str | None
        task_name: str | None

    class DisplayError(TypedDict):
        """Why a value cannot be shown. The official UI has its own texts for some ids."""

        id: str
        detail: str
        traceback: None

    class ArtifactRow(_ArtifactRow, total=False):
        content: str
        content_kind: str  # the media type, if the value is bytes
        postprocess_error: DisplayError
        is_inherited: bool  # whether a task before has had the same


class SharedColumns(TypedDict):
    run_id: str | None
    tags: Tags
    system_tags: Tags


def shared_columns(record: Run | Step | Task | Metadatum | Artifact) -> SharedColumns:
    """The columns of rows that are alike for all kinds of objects, and differ from the records'."""
    return {
        "run_id": string_id(record["run_number"]),
        "tags": record["tags"] or [],
        "system_tags": record["system_tags"] or [],
    }


def run_row(run: Run) -> RunRow:
    """The row of a run, not judged yet."""
    return {
        **run,
        **shared_columns(run),
        "run": str(run["run_number"]),
        "user": run.get("user"),
        "status": "",
        "ts_epoch": run_sort_key(run)[0],  # local mode overwrites the record's with new tags
        "finished_at": None,
        "duration": None,
        "cause": None,
        "origin_run_id": None,
    }


def run_row_ids(row: RunRow) -> Ids:
    """The ids of the run."""
    return (row["flow_id"], row["run"])


def step_rows(store: Store, ids: Ids, tasks: Sequence[AttemptRow], now: float) -> list[StepRow]:
    """The steps of a run, oldest first; `tasks`: all attempts of the run's tasks."""
    rows: list[StepRow] = []
    for step in list(store.steps(ids))[::-1]:
        ends = [t["finished_at"] for t in tasks if t["step_name"] == step["step_name"]]
        end = None if None in ends else max(filter(None, ends), default=None)
        rows.append(
            {
                **step,
                **shared_columns(step),
                "run_number": wire_id(ids[1]),
                "run_id": ids[1],
                "duration": elapsed_ms(step["ts_epoch"], end, now),
            }
        )
    return rows


def step_version(store: Store, step: Ids) -> object:
    """An object that is equal as long as the records of a step's tasks are the same.

    None if one of them was changed so recently that another change could go unnoticed.
    """
    versions = [store.version(ids) for ids in (step, *store.task_ids(step))]
    return None if None in versions else tuple(versions)


def attempt_row_ids(row: AttemptRow) -> Ids:
    """The ids of the attempt's task."""
    return (row["flow_id"], str(row["run_number"]), row["step_name"], str(row["task_id"]))


def newest_attempts(attempts: Iterable[AttemptRow]) -> Collection[AttemptRow]:
    """The newest attempt of each task; `attempts`: in their order."""
    return {(row["step_name"], row["task_id"]): row for row in attempts}.values()


def value_text(metadatum: Metadatum) -> str:
    """The value of a metadatum as text; JSON if it is something else."""
    value: object = metadatum["value"]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def metadatum_attempt(metadatum: Metadatum) -> int | None:
    """The attempt that a metadatum belongs to, by its tag `attempt_id:N`; None if it has none."""
    for tag in metadatum["tags"] or ():
        match = re.fullmatch("attempt_id:([0-9]{1,5})", tag)
        if match:
            return int(match.group(1))
    return None


def metadatum_row(metadatum: Metadatum) -> MetadatumRow:
    """The row of a metadatum."""
    return {
        **metadatum,
        **shared_columns(metadatum),
        "task_name": string_id(metadatum["task_id"]),
        "attempt_id": metadatum_attempt(metadatum),
        "value": value_text(metadatum),
    }


def metadata_rows(store: Store, ids: Ids) -> list[MetadatumRow]:
    """The metadata of a task, sorted by name, and oldest first for each name."""
    rows = [metadatum_row(metadatum) for metadatum in store.metadata(ids)]
    return sorted(rows, key=lambda row: (row["field_name"], row["ts_epoch"], row["id"]))


def datastore_root(store: Store, ids: Ids, attempt: int | None) -> str:
    """The datastore of an attempt, according to its metadata, by default the store's folder.

    It is a path that a client sent, and must be used with a FileOpener only.
    """
    for metadatum in store.metadata(ids, fields=("ds-root",)):
        if attempt is None or metadatum_attempt(metadatum) in (attempt, None):
            return value_text(metadatum)
    return store.folder


def artifact_row(artifact: Artifact) -> ArtifactRow:
    """The row of an artifact, without its value."""
    task_name = string_id(artifact["task_id"])
    row: _ArtifactRow = {**artifact, **shared_columns(artifact), "task_name": task_name}
    return cast("ArtifactRow", row)


def elapsed_ms(begin: int, end: int | None, now: float) -> int:
    """The milliseconds from one time to another, or to now (in seconds) if that is None."""
    return max(0, (int(now * 1000) if end is None else end) - begin)


# -- artifacts and their values --------------------------------------------------------------------


def display_error(error: OSError | ValueError) -> DisplayError:
    """Why a value cannot be shown that could not be read."""
    kind, detail = "artifact-handle-failed", str(error)
    if isinstance(error, TooLarge):
        kind, detail = "artifact-too-large", f"It is larger than {LARGEST_VALUE} bytes."
    elif isinstance(error, OSError):
        detail = error.strerror or ""
    return {"id": kind, "detail": detail, "traceback": None}


class Artifacts:
    """The artifacts of tasks, with their values, and the parameters of runs."""

    def __init__(self, store: Store, files: FileOpener) -> None:
        self._store = store
        self._files = files

    def rows(self, ids: Ids, attempt: int | None) -> list[ArtifactRow]:
        """The artifacts of an attempt of a task, sorted by name, without values."""
        return sorted(
            (artifact_row(artifact) for artifact in self._store.artifacts(ids, attempt)),
            key=lambda row: row["name"],
        )

    def with_value(self, row: ArtifactRow) -> ArtifactRow:
        """Add to an artifact its value, or the reason why that cannot be shown."""
        try:
            value = self.value(row, LARGEST_VALUE)
            row["content"] = format_value(value)
            if isinstance(value, (bytes, bytearray)):
                row["content_kind"] = media_type(value)
        except (OSError, ValueError) as error:
            row["postprocess_error"] = display_error(error)
        return row

    def value(self, artifact: Artifact | ArtifactRow, limit: int) -> Any:
        """The value of an artifact, read without unpickling; OSError, TooLarge or ValueError."""
        with self.open_stored(artifact) as file:
            content = read_content(file, limit)
        value = PickleReader().read(decompress(content, limit))
        if isinstance(value, PickledObject) and value.name == INCLUDED_FILE:
            return self._included_text(value, limit)
        return value

    def _included_text(self, included: PickledObject, limit: int) -> Any:
        """The content of an IncludeFile, which is stored as a blob of its own.

        If that is not in a local datastore, the object that describes it is returned.
        """
        pairs = included.attributes().get("_descriptor")
        descriptor = pairs.fields() if isinstance(pairs, PickledDict) else {}
        url = descriptor.get("url")
        place = re.fullmatch(LOCAL_URL, url) if isinstance(url, str) else None
        if place is None:
            return included
        with self._files.open_file(place["root"], *place["names"].split("/")) as file:
            content = decompress(read_content(file, limit), limit)
        encoding = descriptor.get("encoding")
        if not descriptor.get("is_text", True):
            return content
        try:
            return content.decode(encoding if isinstance(encoding, str) else "utf-8", "replace")
        except LookupError:
            return content

    def open_stored(self, artifact: Artifact | ArtifactRow) -> io.BufferedReader:
        """Open the file of an artifact; FileNotFoundError, or ValueError if it is not local."""
        sha, location = artifact["sha"] or "", artifact["location"]
        if artifact["ds_type"] != "local" or not location.startswith(ROOT_LOCATION):
            raise ValueError("It is not stored on this machine.")
        if not re.fullmatch(SHA, sha):
            raise ValueError("It has no place in the datastore.")
        root = location.removeprefix(ROOT_LOCATION)
        try:
            return self._files.open_file(root, artifact["flow_id"], "data", sha[:2], sha)
        except FileNotFoundError as error:
            error.strerror = "It is not in the datastore any more"
            raise

    def parameters(self, ids: Ids) -> dict[str, object]:
        """The values of the parameters of a run, as far as they can be shown, sorted by name."""
        values: dict[str, object] = {}
        for task in self._store.task_ids((*ids, PARAMETERS_STEP)):
            for artifact in self._store.artifacts(task):
                name = artifact["name"]
                if not name.startswith("_") and name not in ("name", "script_name"):
                    with contextlib.suppress(OSError, ValueError):
                        values[name] = to_json(self.value(artifact, LARGEST_VALUE))
        return dict(sorted(values.items()))

    def mark_inherited(self, rows: Sequence[ArtifactRow], tasks_before: Iterable[Ids]) -> None:
        """Say of the artifacts of a task whether one of the tasks before it has had the same."""
        unknown = {row["name"]: row for row in rows}
        for row in rows:
            row["is_inherited"] = False
        for task in tasks_before:
            for name, row in list(unknown.items()):
                earlier = self._store.artifact(task, name)
                if earlier is not None and earlier["sha"] == row["sha"]:
                    unknown.pop(name)["is_inherited"] = True
            if not unknown:
                return


# -- logs, and how processes ended -----------------------------------------------------------------

LOGS_IN_MEMORY = 32 * 2**20  # bytes, about

STDERR_TAIL_BYTES = 64 * 2**10

STORING_SECONDS = 300
"""How long after an attempt's end its log is still expected."""


class ProcessEnd(NamedTuple):
    """How the process of an attempt ended, as recorded by its scheduler."""

    return_code: int | None
    is_by_scheduler: bool  # whether the scheduler killed it, having given the run up
    is_ok: bool
    moment: int  # epoch milliseconds

    def is_by_signal(self) -> bool:
        return self.return_code is not None and self.return_code < 0


class Logs:
    """What the scheduler stores of the process of an attempt: its log, and how it ended."""

    def __init__(self, store: Store, files: FileOpener) -> None:
        self._store = store
        self._files = files
        self._lines: Cache[list[LogLine]] = Cache(LOGS_IN_MEMORY, log_weight)

    def lines(self, ids: Ids, attempt: int, stream: str) -> list[LogLine]:
        """The lines that an attempt has written to stdout or stderr, oldest first.

        Metaflow stores them when the attempt has ended. Only the end of a huge log is read.
        """
        with self._open(ids, attempt, stream) as files:
            key = repr([file_version(os.fstat(file.fileno())) for file in files])
            lines = self._lines.get(key)
            if lines is None:
                contents = (read_content(file, LARGEST_LOG, from_end=True) for file in files)
                lines = merge_logs(contents)
                self._lines.put(key, lines)
        return lines

    def stderr_tail(self, ids: Ids, number: int) -> list[str]:
        """The last lines that an attempt has written to stderr."""
        contents = []
        with contextlib.suppress(OSError), self._open(ids, number, "stderr") as files:
            for file in files:
                contents.append(read_content(file, STDERR_TAIL_BYTES, from_end=True))
        return [line["line"] for line in merge_logs(contents)]

    def process_end(self, ids: Ids, number: int) -> ProcessEnd | None:
        """How the process of an attempt ended, or None if its scheduler has not recorded it."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            root = datastore_root(self._store, ids, number)
            with self._files.open_file(root, *ids, f"{number}.runtime") as file:
                moment = int(os.fstat(file.fileno()).st_mtime * 1000)
                record = read_json(file, LARGEST_VALUE)
            code = record.get("return_code")
            return ProcessEnd(
                code if isinstance(code, int) else None,
                bool(record.get("killed")),
                bool(record.get("success")) and self._is_done(root, ids, number),
                moment,
            )
        return None

    def _is_done(self, root: str, ids: Ids, number: int) -> bool:
        """Whether an attempt has stored all that it had to: its scheduler goes by the exit code,
        which is 0 also if the step left by os._exit."""
        with contextlib.suppress(OSError):
            self._files.open_file(root, *ids, f"{number}.DONE.lock").close()
            return True
        return False

    def stat_folder(self, ids: Ids, attempt: int | None) -> os.stat_result | None:
        """The status of the folder that all of this is stored in, or None if there is none."""
        return self._files.stat_folder(datastore_root(self._store, ids, attempt), *ids)

    def is_stored(self, row: AttemptRow, now: float) -> bool:
        """Whether the log of an attempt is complete, or will never be stored.

        The scheduler stores it some time after the attempt has ended.
        """
        if row["finished_at"] is None:
            return False
        if now * 1000 - row["finished_at"] > STORING_SECONDS * 1000:
            return True
        ids = attempt_row_ids(row)
        return not self._is_awaited(ids, row, now) or self._exists(ids, row["attempt_id"])

    def _is_awaited(self, ids: Ids, row: AttemptRow, now: float) -> bool:
        """Whether a log is expected in a datastore here, from a scheduler that is alive.

        The tasks of the scheduler have numbers. A task with a name was started by another, as
        @parallel does, and its output is in the log of that one.
        """
        if not isinstance(row["task_id"], int):
            return False
        run = self._store.run(ids[:2])
        heartbeat = None if run is None else run["last_heartbeat_ts"]
        if heartbeat is not None and now - heartbeat > TASK_HEARTBEAT_CUTOFF:
            return False
        kinds = self._store.metadata(ids, fields=("ds-type",))  # clones have no such metadatum
        return any(value_text(m) == "local" for m in kinds)

    def _exists(self, ids: Ids, attempt: int) -> bool:
        """Whether the log of an attempt is stored: its files exist even if nothing was written."""
        for stream in LOG_STREAMS.values():
            with self._open(ids, attempt, stream) as files:
                if not files:
                    return False
        return True

    @contextlib.contextmanager
    def _open(self, ids: Ids, attempt: int, stream: str) -> Iterator[Sequence[io.BufferedReader]]:
        """The files that hold a stream of an attempt, as far as they exist."""
        root = datastore_root(self._store, ids, attempt)
        with contextlib.ExitStack() as files:
            opened = []
            for source in LOG_SOURCES:
                with contextlib.suppress(FileNotFoundError):
                    file = self._files.open_file(root, *ids, f"{attempt}.{source}_{stream}.log")
                    opened.append(files.enter_context(file))
            yield opened


# -- cards -----------------------------------------------------------------------------------------


if TYPE_CHECKING:

    class Card(TypedDict):
        id: str | None
        type: str
        hash: str


class Cards:
    """The cards of tasks, and the files that hold them."""

    def __init__(self, store: Store, files: FileOpener) -> None:
        self._store = store
        self._files = files

    def of_task(self, ids: Ids) -> list[Card]:
        """The cards of a task."""
        return [card for card, _ in self.with_files(ids)]

    def count_missing(self, ids: Ids) -> int:
        """How many cards of a task its metadata mention, but no file is found for."""
        recorded = {m["field_name"] for m in self._store.metadata(ids) if m["type"] == "card-info"}
        return len(recorded - {card["hash"] for card in self.of_task(ids)})

    def html(self, ids: Ids, card_hash: str) -> bytes | None:
        """The HTML of a card, or None if there is no such card; TooLarge."""
        for card, place in self.with_files(ids):
            if card["hash"] == card_hash:
                with contextlib.suppress(FileNotFoundError), self._files.open_file(*place) as file:
                    return read_content(file, LARGEST_CARD)
        return None

    def data(self, ids: Ids, card_hash: str) -> tuple[Card, object] | None:
        """The current data of a card that its task updates, or None; OSError, ValueError."""
        for card, place in self.with_files(ids, "runtime", ".data.json"):
            if card["hash"] == card_hash:
                with self._files.open_file(*place) as file:
                    return card, read_json(file, LARGEST_CARD)
        return None

    def with_files(
        self, ids: Ids, kind: str = "cards", suffix: str = ".html"
    ) -> list[tuple[Card, DatastorePath]]:
        """The cards of a task and their files, from the first folder that has any.

        A file is called TYPE-HASH or TYPE-ID-HASH. The `kind` "cards" is what a card shows in the
        end, and "runtime" what its task updates before.
        """
        for place in self._folders(ids, kind):
            found: list[tuple[Card, DatastorePath]] = []
            for name in self._list_files(place):
                parts = name[: -len(suffix)].split("-")
                if name.endswith(suffix) and len(parts) in (2, 3):
                    card_id = parts[1] if len(parts) == 3 else None
                    card: Card = {"id": card_id, "type": parts[0], "hash": parts[-1]}
                    found.append((card, (*place, name)))
            if found:
                return found
        return []

    def stat_data_folders(self, ids: Ids) -> Iterator[os.stat_result | None]:
        """The statuses of the folders in which a task may update the data of its cards."""
        return itertools.starmap(self._files.stat_folder, self._folders(ids, "runtime"))

    def _folders(self, ids: Ids, kind: str) -> list[DatastorePath]:
        """The folders that may hold a task's cards; Metaflow before 2022 left the step out."""
        flow, run, step, task = ids
        own, others = self._store.folder, read_card_roots(self._store.folder)
        recorded = self._files.find_datastore(datastore_root(self._store, ids, None))
        roots = dict.fromkeys((recorded, own, *others))
        return [
            (root, CARDS_DIR, flow, "runs", run, *below, kind)
            for root in roots
            for below in (("steps", step, "tasks", task), ("tasks", task))
        ]

    def _list_files(self, place: DatastorePath) -> list[str]:
        """The sorted names of the files in a folder of a datastore; none if it does not exist."""
        with contextlib.suppress(FileNotFoundError):
            folder = self._files.open_folder(*place)
            try:
                with os.scandir(folder) as entries:
                    return sorted(e.name for e in entries if e.is_file(follow_symlinks=False))
            finally:
                os.close(folder)
        return []


# -- histories: what the records of a task say of it -----------------------------------------------

HISTORIES_IN_MEMORY = 4 * 2**20  # bytes, about: of 10,000 tasks

LARGEST_SHOWN_ATTEMPT = 99
"""Attempts with larger numbers are ignored: Metaflow never makes so many."""

MOST_ORIGINS = 20
"""Over how many resumed runs the foreach loops of a clone are traced back."""

ATTEMPT_FIELDS = ("attempt", "attempt-done", "attempt_ok")
FOREACH_FIELDS = ("foreach-stack", "origin-run-id", "origin-task-id")
HISTORY_FIELDS = (*ATTEMPT_FIELDS, *FOREACH_FIELDS, "end_step")

BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


class Attempt(NamedTuple):
    """What the records of a task say about one attempt."""

    started_at: int | None = None
    done_at: int | None = None
    is_ok: bool | None = None


class History(NamedTuple):
    """What the records of a task say about it."""

    attempts: list[Attempt]
    foreach_label: str | None
    origin_run_id: str | None  # of the run that its own was resumed from
    origin_pathspec: str | None  # of the task that it was cloned from
    end_step: str | None  # of the flow, as a task of PARAMETERS_STEP says
    graph: Artifact | None  # that holds the flow's graph, likewise


def attempts_from_metadata(metadata: Iterable[Metadatum], others: Iterable[int]) -> list[Attempt]:
    """All attempts of a task, from 0 to the newest.

    `others`: the numbers of attempts that exist, even if no metadata say so.
    """
    by_attempt: dict[int, list[Metadatum]] = {number: [] for number in others}
    for metadatum in metadata:
        text = value_text(metadatum)
        if metadatum["field_name"] == "attempt_ok":
            by_attempt.setdefault(metadatum_attempt(metadatum) or 0, []).append(metadatum)
        elif re.fullmatch("[0-9]{1,5}", text):
            by_attempt.setdefault(int(text), []).append(metadatum)
    last = max((number for number in by_attempt if number <= LARGEST_SHOWN_ATTEMPT), default=-1)
    return [attempt_from_metadata(by_attempt.get(number, ())) for number in range(last + 1)]


def attempt_from_metadata(metadata: Sequence[Metadatum]) -> Attempt:
    """An attempt: started at the first metadatum that says so, done at the last one, and successful
    if the newest `attempt_ok` says so."""
    started = [m["ts_epoch"] for m in metadata if m["field_name"] == "attempt"]
    done = [m["ts_epoch"] for m in metadata if m["field_name"] in ("attempt-done", "attempt_ok")]
    outcomes = [
        (metadatum_sort_key(m), BOOLEANS[value_text(m).lower()])
        for m in metadata
        if m["field_name"] == "attempt_ok" and value_text(m).lower() in BOOLEANS
    ]
    is_ok = max(outcomes)[1] if outcomes else None
    return Attempt(min(started, default=None), max(done, default=None), is_ok)


def newest_values(metadata: Sequence[Metadatum]) -> dict[str, object]:
    """The values of metadata, by their fields; `metadata`: newest first."""
    return {metadatum["field_name"]: metadatum["value"] for metadatum in reversed(metadata)}


def origin_of_clone(ids: Ids, metadata: Mapping[str, object]) -> Ids | None:
    """The task that a task was cloned from, by the values of its metadata.

    None if it is not a clone, or if its origin is not a possible task.
    """
    run, task = str(metadata.get("origin-run-id")), str(metadata.get("origin-task-id"))
    if "None" in (run, task):
        return None
    origin = (ids[0], run, ids[2], task)
    with contextlib.suppress(NotStorable):
        object_folder(origin)  # which checks the names
        return origin
    return None


def format_foreach_frames(frames: Sequence[str]) -> str | None:
    """The values of nested foreach loops, as a label; with their names if there are several."""
    if len(frames) == 1:
        return frames[0].partition("=")[2] or frames[0]
    return ", ".join(frames) or None


class Histories:
    """What the records of tasks say of them."""

    def __init__(self, store: Store, artifacts: Artifacts) -> None:
        self._store = store
        self._artifacts = artifacts
        # By pathspec, with the version of the task that they were read from.
        self._known: Cache[tuple[Version, History]] = Cache(HISTORIES_IN_MEMORY, lambda known: 400)

    def of_task(self, ids: Ids) -> History:
        """The history of a task."""
        return self.at(ids, self._store.version(ids))

    def at(self, ids: Ids, version: Version | None) -> History:
        """The history of a task whose records have this version."""
        key = "/".join(ids)
        known = self._known.get(key)
        if known is not None and known[0] == version:
            return known[1]
        history = self._read(ids)
        if version is not None:
            self._known.put(key, (version, history))
        return history

    def _read(self, ids: Ids) -> History:
        metadata = list(self._store.metadata(ids, fields=HISTORY_FIELDS))
        of_attempts = [m for m in metadata if m["field_name"] in ATTEMPT_FIELDS]
        attempts = attempts_from_metadata(of_attempts, self._store.attempts_with_artifacts(ids))
        for number, attempt in enumerate(attempts):
            if attempt.is_ok is None:
                attempts[number] = self._completed_by_artifact(ids, number, attempt)
        values = newest_values(metadata)
        origin_run = str(values.get("origin-run-id") or "None")
        origin = origin_of_clone(ids, values)
        return History(
            attempts,
            format_foreach_frames(self._foreach_frames(ids, values, MOST_ORIGINS)),
            None if origin_run == "None" else origin_run,
            "/".join(origin) if origin else None,
            next((value_text(m) for m in metadata if m["field_name"] == "end_step"), None),
            self._store.artifact(ids, "_graph_info") if ids[2] == PARAMETERS_STEP else None,
        )

    def _completed_by_artifact(self, ids: Ids, number: int, attempt: Attempt) -> Attempt:
        """An attempt, completed by the artifact _task_ok if no metadatum says how it ended."""
        artifact = self._store.artifact(ids, "_task_ok", number)
        if artifact is None:
            return attempt
        is_ok: bool | None = None
        with contextlib.suppress(OSError, ValueError):
            is_ok = bool(self._artifacts.value(artifact, LARGEST_VALUE))
        return attempt._replace(
            done_at=max(artifact["ts_epoch"], attempt.done_at or 0), is_ok=is_ok
        )

    def foreach_frames(self, ids: Ids, hops: int = MOST_ORIGINS) -> list[str]:
        """The foreach loops around a task, the outermost first, each as NAME=VALUE.

        A clone records none, and is in the same loops as its origin; `hops`: see MOST_ORIGINS.
        """
        metadata = self._store.metadata(ids, fields=FOREACH_FIELDS)
        return self._foreach_frames(ids, newest_values(list(metadata)), hops)

    def _foreach_frames(self, ids: Ids, values: Mapping[str, object], hops: int) -> list[str]:
        """The same, by the values of the task's metadata."""
        stack, origin = values.get("foreach-stack"), origin_of_clone(ids, values)
        if stack is None and hops > 0 and origin:
            return self.foreach_frames(origin, hops - 1)
        frames = stack if isinstance(stack, list) else [stack]
        return [frame for frame in frames if isinstance(frame, str)]


class RunFolders:
    """The steps and tasks of one run, for one verdict, which looks at each of them once.

    Steps that the run's folder does not list are not looked for: a verdict on a run without any
    takes 2 calls of stat(2), in place of 20.
    """

    def __init__(self, store: Store, histories: Histories, ids: Ids) -> None:
        self.ids = ids
        self.versions: dict[Ids, Version | None] = {}  # of the folders that were looked at
        self._store = store
        self._histories = histories
        self._known_histories: dict[Ids, History] = {}  # of the tasks that were looked at
        self.versions[ids], steps = store.list_below(ids)
        self.steps = dict.fromkeys(steps)  # oldest first
        self._tasks: dict[Ids, list[Ids]] = {}

    def tasks(self, step: str) -> list[Ids]:
        """The ids of the tasks of a step, oldest first."""
        ids = (*self.ids, step)
        if ids not in self._tasks:
            if ids in self.steps:
                self.versions[ids], self._tasks[ids] = self._store.list_below(ids)
            else:
                self._tasks[ids] = []
        return self._tasks[ids]

    def all_tasks(self) -> list[Ids]:
        """The ids of all tasks, by their steps, the oldest first."""
        return [task for step in self.steps for task in self.tasks(step[2])]

    def history(self, task: Ids) -> History:
        """The history of a task."""
        if task not in self._known_histories:
            self.versions[task] = self._store.version(task)
            self._known_histories[task] = self._histories.at(task, self.versions[task])
        return self._known_histories[task]

    def versions_of(self, objects: Iterable[Ids]) -> FolderVersions:
        """The folders of objects that were looked at, with their versions."""
        return [(self._store.versioned_folder(ids), self.versions[ids]) for ids in objects]


# -- graphs of flows -------------------------------------------------------------------------------

GRAPHS_IN_MEMORY = 8 * 2**20  # bytes, about

DEFAULT_START_STEP = "start"
DEFAULT_END_STEP = "end"

MAX_ATTEMPTS = 6
"""The most attempts that Metaflow allows (MAX_ATTEMPTS in its metaflow_config)."""

CATCH_ATTEMPTS = 3
"""How many attempts `@catch` adds (Metaflow's NUM_FALLBACK_RETRIES)."""


class Graph(TypedDict, total=False):
    """The parts of a flow's graph that are used here, as stored in the artifact _graph_info."""

    end_step: str
    steps: Mapping[str, Any]


def graph_weight(graph: Graph) -> int:
    """Roughly how many bytes of memory a graph takes."""
    return 1000 + 5 * len(json.dumps(graph))


def attempts_allowed(graph: Graph, step: str) -> int | None:
    """How many attempts a task of a step may have, by its decorators; None if these are unknown."""
    decorators = step_decorators(graph, step)
    if decorators is None:
        return None
    allowed = 1
    for decorator in decorators:
        if decorator.get("name") == "catch":
            allowed += CATCH_ATTEMPTS
        elif decorator.get("name") == "retry":
            with contextlib.suppress(LookupError, TypeError, ValueError, OverflowError):
                allowed += int(decorator["attributes"]["times"])  # text if it is the default
    return min(allowed, MAX_ATTEMPTS)


def has_catch(graph: Graph, step: str) -> bool:
    """Whether a step has the decorator @catch."""
    return any(decorator.get("name") == "catch" for decorator in step_decorators(graph, step) or ())


def step_decorators(graph: Graph, step: str) -> list[dict[str, Any]] | None:
    """The decorators of a step, or None if the graph does not have the step."""
    node = graph.get("steps", {}).get(step)
    if not isinstance(node, dict):
        return None
    decorators = node.get("decorators")
    return [d for d in decorators if isinstance(d, dict)] if isinstance(decorators, list) else []


def find_end_step(parameters: Iterable[History], graph: Graph) -> str:
    """The name of the end step of a run's flow, as far as the run says which it is."""
    names = (history.end_step for history in parameters if history.end_step is not None)
    return end_step_name(next(names, graph.get("end_step")))


def end_step_name(name: object) -> str:
    """The name of the end step as a client gave it, or the usual one if it cannot be a name."""
    with contextlib.suppress(NotStorable):
        if isinstance(name, str):
            check_name(name)
            return name
    return DEFAULT_END_STEP


def find_graph_artifact(parameters: Iterable[History]) -> Artifact | None:
    """The artifact that holds the graph of a run's flow; `parameters`: as for find_end_step."""
    return next((history.graph for history in parameters if history.graph is not None), None)


class Graphs:
    """The graphs of the flows of runs."""

    def __init__(self, store: Store, artifacts: Artifacts, histories: Histories) -> None:
        self._store = store
        self._artifacts = artifacts
        self._histories = histories
        # By their paths in the datastore; empty if it is not a graph that is stored there.
        self._graphs: Cache[Graph] = Cache(GRAPHS_IN_MEMORY, graph_weight)

    def of_run(self, ids: Ids) -> Graph | None:
        """The graph of the flow of a run, or None if the run has not stored it."""
        return self.read(self._parameters(ids))

    def read(self, parameters: Iterable[History]) -> Graph | None:
        """The same, by the histories of the tasks of PARAMETERS_STEP, one of which stores it."""
        artifact = find_graph_artifact(parameters)
        if artifact is None:
            return None
        key = f"{artifact['flow_id']}/{artifact['location']}/{artifact['sha']}"
        graph = self._graphs.get(key)
        if graph is None:
            try:
                value = to_json(self._artifacts.value(artifact, LARGEST_GRAPH))
            except OSError:
                return None  # it may still be written
            except ValueError:
                value = None
            is_graph = isinstance(value, dict) and isinstance(value.get("steps"), dict)
            graph = cast(Graph, value) if is_graph else {}
            self._graphs.put(key, graph)
        return graph or None

    def digest(self, ids: Ids) -> str | None:
        """The digest of the graph of the flow of a run, or None if the run has not stored it."""
        artifact = find_graph_artifact(self._parameters(ids))
        return None if artifact is None else artifact["sha"]

    def tasks_before(self, ids: Ids) -> Iterator[Ids]:
        """The tasks that a task may have followed: of the steps before its own, and where both are
        in the same loop, of the same turn of it."""
        run, step = ids[:2], ids[2]
        steps = (self.of_run(run) or {}).get("steps", {})
        nexts = {n: s.get("next") for n, s in steps.items() if isinstance(s, dict)}
        before = [
            name for name, names in nexts.items() if isinstance(names, list) and step in names
        ]
        frames = self._histories.foreach_frames(ids)
        for name in (PARAMETERS_STEP, *before):
            for task in self._store.task_ids((*run, name)):
                shared = zip(frames, self._histories.foreach_frames(task))
                if task != ids and all(one == other for one, other in shared):
                    yield task

    def _parameters(self, ids: Ids) -> Iterator[History]:
        """The histories of the tasks of PARAMETERS_STEP of a run; usually there is one."""
        return map(self._histories.of_task, self._store.task_ids((*ids, PARAMETERS_STEP)))


# -- causes ----------------------------------------------------------------------------------------

CAUSES_IN_MEMORY = 4 * 2**20  # bytes, about

RAISED, KILLED, TIMED_OUT = "raised", "killed", "timed out"
NEVER_STARTED, SCHEDULER_GONE = "never started", "scheduler gone"
CAUSE_KINDS = (RAISED, KILLED, TIMED_OUT, NEVER_STARTED, SCHEDULER_GONE)

CAUSE_STDERR_LINES = 20
LONGEST_CAUSE_LINE = 1000
LONGEST_MESSAGE = 4000
LONGEST_SUMMARY_MESSAGE = 120

UNCAUGHT_EXIT_CODE = 1
"""The exit code of Python after an exception that was not caught."""

SIGNAL_NAMES: Mapping[int, str] = {
    1: "SIGHUP",
    2: "SIGINT",
    3: "SIGQUIT",
    4: "SIGILL",
    6: "SIGABRT",
    8: "SIGFPE",
    9: "SIGKILL",
    11: "SIGSEGV",
    13: "SIGPIPE",
    14: "SIGALRM",
    15: "SIGTERM",
}
"""The signals that have the same number on all systems, for a run may be from another machine."""

TIMEOUT_TYPE = "metaflow.plugins.timeout_decorator.TimeoutException"
UNCAUGHT, CAUGHT = "_exception", "_catch_exception"
"""The artifacts in which Metaflow stores the exception that a step has raised, or else None."""

WRAPPER_TYPE = "metaflow.exception.MetaflowExceptionWrapper"

# These are compiled on first use, which takes up to 0.5 ms each: few commands need them.
TRACEBACK_START = r"(?:  \+ Exception Group )?Traceback \(most recent call last\):"
TRACEBACK_FRAME = r'(?:  \|   |  )File "(.+?)", line ([0-9]{1,9})(?:, in (.+))?'
TRACEBACK_END = r"(?:  \| )?([A-Za-z_][\w.]*)(?:: (.*))?"
FOREIGN_CODE = r"/(?:site|dist)-packages/|/lib(?:64)?/python[0-9.]+/|^<"
HEADLINE = r" {4}(\S.*):"
"""The first line of an error that Metaflow prints without a traceback (print_metaflow_exception in
its cli.py). The lines that follow are indented as well."""

METAFLOW_MAIN = "/metaflow/cli.py"
"""The file of the function in which Metaflow catches what nothing else has caught."""

TASK_FAILED = "Task failed."
"""The line that the scheduler writes into the log of a task that has failed."""

ENDED_BY_SCHEDULER = "[KILLED BY ORCHESTRATOR]"
"""The line that the scheduler writes into the logs of running tasks when it gives the run up."""

INTERRUPTED = "Aborted!"
"""The line that an interrupted task writes; its scheduler was then interrupted as well."""


class Raised(NamedTuple):
    """An exception, and the line of the user's own code that it came from."""

    type: str | None
    message: str | None
    file: str | None = None
    line: int | None = None
    functions: frozenset[str] = frozenset()  # all those in its traceback
    is_from_top: bool = False  # whether nothing that called it could have caught it


def parse_traceback(lines: Sequence[str]) -> Raised | None:
    """The exception of the last traceback in some lines, or None if there is no traceback."""
    starts = [at for at, line in enumerate(lines) if re.fullmatch(TRACEBACK_START, line)]
    if not starts:
        return None
    frames: list[tuple[str, int, str]] = []
    for line in lines[starts[-1] + 1 :]:
        frame, end = re.fullmatch(TRACEBACK_FRAME, line), re.fullmatch(TRACEBACK_END, line)
        if frame:
            frames.append((frame.group(1), int(frame.group(2)), frame.group(3) or ""))
        elif end:
            functions = frozenset(function for _, _, function in frames)
            file, _, function = frames[0] if frames else ("", 0, "")
            is_from_top = function == "<module>" or file.endswith(METAFLOW_MAIN)
            where = innermost_user_line(frames)
            return Raised(end.group(1), end.group(2), *where, functions, is_from_top)
    return None


def parse_last_words(lines: Sequence[str]) -> Raised | None:
    """The exception that has ended a process, by what the process has written to stderr.

    The last traceback may also be that of an exception that was caught and logged. Such a one
    counts if nothing was written after it: then the process was made to exit because of it.
    """
    raised = parse_traceback(lines)
    if raised is None or raised.is_from_top:
        return raised
    last = [line for line in lines if line.strip() and line != TASK_FAILED][-1]
    end = re.fullmatch(TRACEBACK_END, last)
    return raised if end and end.groups() == (raised.type, raised.message) else None


def innermost_user_line(frames: Sequence[tuple[str, int, str]]) -> tuple[str | None, int | None]:
    """The file and line of the innermost frame in the user's own code, or None for both.

    The frame at the end of the flow's file, which calls Metaflow, does not count.
    """
    tasks = [file for file, _, _ in frames if file.endswith("/metaflow/task.py")]
    metaflow = os.path.dirname(tasks[0]) + "/" if tasks else None
    for at in range(len(frames) - 1, -1, -1):
        file, line, function = frames[at]
        if re.search(FOREIGN_CODE, file) or (metaflow and file.startswith(metaflow)):
            continue
        if function == "<module>" and "/metaflow/" in "".join(f for f, _, _ in frames[at + 1 :]):
            continue
        return file, line
    return None, None


def parse_headline(lines: Sequence[str]) -> Raised | None:
    """The error that Metaflow itself has written to stderr, or None if there is none."""
    for at in range(len(lines) - 2, -1, -1):
        headline = re.fullmatch(HEADLINE, lines[at])
        if headline and lines[at + 1].startswith("    ") and lines[at + 1].strip():
            return Raised(None, f"{headline.group(1)}: {lines[at + 1].strip()}")
    return None


def parse_exception_wrapper(value: object) -> Raised | None:
    """The exception in the value of an artifact, or None if it is not a wrapper of one."""
    if not isinstance(value, PickledObject) or value.name != WRAPPER_TYPE:
        return None
    if not isinstance(value.state, PickledDict):
        return None
    fields = value.state.fields()
    kind, message, trace = (fields.get(name) for name in ("type", "exception", "stacktrace"))
    parsed = None
    if isinstance(trace, str):
        # The message is at its end, and may have lines that look like a traceback.
        parsed = parse_traceback(trace.removesuffix(f"{message}\n").splitlines())
    return (parsed or Raised(None, None))._replace(
        type=kind if isinstance(kind, str) else None,
        message=message if isinstance(message, str) else None,
    )


def describe_process_end(end: ProcessEnd | None) -> str:
    """How a process ended, in words; a shell or container reports signals as codes above 128."""
    if end is None or end.return_code is None:
        return "no sign of life any more"
    code = end.return_code
    name = SIGNAL_NAMES.get(-code if code < 0 else code - 128)
    words = f"signal {-code}" if code < 0 else f"exit code {code}"
    words += f" ({name})" if name else ""
    return f"{words} from the scheduler" if end.is_by_scheduler else words


def make_cause(
    kind: str,
    ids: Ids,
    raised: Raised,
    attempt: AttemptRow | None = None,
    allowed: int | None = None,
    stderr: Sequence[str] = (),
) -> Cause:
    """A cause with its summary.

    `ids`: of the task, or of the run if no task is to blame; `allowed`: how many attempts the task
    may have.
    """
    type_name = (raised.type or "").removeprefix("builtins.")
    cause: Cause = {
        "kind": kind,
        "pathspec": "/".join(ids),
        "step_name": attempt["step_name"] if attempt else None,
        "task_id": attempt["task_id"] if attempt else None,
        "attempt_id": attempt["attempt_id"] if attempt else None,
        "attempts": allowed,
        "type": type_name.removeprefix("__main__.") or None,
        "message": raised.message[:LONGEST_MESSAGE] if raised.message else None,
        "file": raised.file,
        "line": raised.line,
        "summary": "",
        "stderr": [line[:LONGEST_CAUSE_LINE] for line in stderr[-CAUSE_STDERR_LINES:]],
    }
    cause["summary"] = summarize_cause(cause)
    return cause


def summarize_cause(cause: Cause) -> str:
    """A cause in a few words."""
    name = "/".join(
        str(part) for part in (cause["step_name"], cause["task_id"]) if part is not None
    )
    message = " ".join((cause["message"] or "").split())
    if len(message) > LONGEST_SUMMARY_MESSAGE:
        message = message[: LONGEST_SUMMARY_MESSAGE - 3] + "..."
    where = f" in {name}" if name else ""
    if cause["file"] is not None:
        where += f" ({os.path.basename(cause['file'])}:{cause['line']})"
    if cause["kind"] == RAISED:
        kind = (cause["type"] or "").rpartition(".")[2]
        return (f"{kind}: {message}" if kind and message else kind or message) + where
    if cause["kind"] == KILLED:
        return f"killed{where}: {message}"
    return f"{cause['kind']}{where}" + (f": {message}" if message else "")


def cause_weight(cause: Cause | None) -> int:
    """Roughly how many bytes of memory a cause takes."""
    if cause is None:
        return 0
    return 1000 + len(cause["message"] or "") + sum(50 + len(line) for line in cause["stderr"])


def was_raised_in(raised: Raised, row: AttemptRow) -> bool:
    """Whether a caught exception was raised in an attempt: later steps inherit the artifact.

    If a process was killed too often, @catch runs its `fallback_step` in place of the step.
    """
    is_fallback = "fallback_step" in raised.functions and row["attempt_id"] > 0
    return is_fallback or row["step_name"] in raised.functions


def first_failure(
    tasks: Iterable[AttemptRow], graph: Graph, ended_with_scheduler: Callable[[AttemptRow], bool]
) -> AttemptRow | None:
    """The attempt that made its run fail: the first one that failed, or None if none did.

    An attempt that would have been repeated is blamed only if there is no other, and one that ended
    because the scheduler had given the run up (`ended_with_scheduler`) comes last of all.
    """

    def blame(task: AttemptRow) -> tuple[bool, bool, int]:
        # If the graph is unknown, the attempt counts as the last: it is to be blamed, not excused.
        allowed = attempts_allowed(graph, task["step_name"]) or 1
        return (
            ended_with_scheduler(task),
            task["attempt_id"] + 1 < allowed,
            task["finished_at"] or task["ts_epoch"],
        )

    failed = [task for task in newest_attempts(tasks) if task["status"] == FAILED]
    return min(failed, key=blame) if len(failed) > 1 else next(iter(failed), None)


class Causes:
    """Why attempts and runs have failed."""

    def __init__(
        self, store: Store, artifacts: Artifacts, logs: Logs, histories: Histories, graphs: Graphs
    ) -> None:
        self._store = store
        self._artifacts = artifacts
        self._logs = logs
        self._histories = histories
        self._graphs = graphs
        # By pathspec, attempt and status, with the versions of the task's records and of its files.
        self._known: Cache[tuple[Sequence[Version | None], Cause | None]] = Cache(
            CAUSES_IN_MEMORY, lambda known: 500 + cause_weight(known[1])
        )

    def of_run(self, row: RunRow, tasks: Sequence[AttemptRow], graph: Graph, now: float) -> Cause:
        """Why a run has failed; `tasks`: all attempts of the run's tasks."""
        ids = run_row_ids(row)
        failure = first_failure(tasks, graph, self.ended_with_scheduler)
        if failure is not None and not self._is_abandoned(failure, now):
            cause = self.of_attempt(failure, graph)
            if cause is not None:
                return cause
        has_started = any(task["step_name"] != PARAMETERS_STEP for task in tasks)
        message = "the run's own process ended without a word"
        if failure is not None:
            message += f" while {failure['step_name']}/{failure['task_id']} was running"
        return make_cause(
            SCHEDULER_GONE if has_started else NEVER_STARTED, ids, Raised(None, message)
        )

    def of_attempt(self, row: AttemptRow, graph: Graph) -> Cause | None:
        """Why an attempt has failed or would have failed without @catch; None if it succeeded."""
        ids, number = attempt_row_ids(row), row["attempt_id"]
        folder = self._logs.stat_folder(ids, number)
        versions = (self._store.version(ids), None if folder is None else settled_version(folder))
        key = f"{'/'.join(ids)}/{number}/{row['status']}"
        known = self._known.get(key)
        if known is not None and known[0] == versions:
            return known[1]
        cause = self._find(row, graph)
        if None not in versions:
            self._known.put(key, (versions, cause))
        return cause

    def add_to(self, ids: Ids, rows: Iterable[AttemptRow]) -> None:
        """Add the causes to those attempts of a run that failed or whose exception was caught."""
        graph: Graph | None = None
        for row in rows:
            if row["status"] in (FAILED, COMPLETED):
                graph = self._graphs.of_run(ids) or {} if graph is None else graph
                if row["status"] == FAILED or has_catch(graph, row["step_name"]):
                    row["cause"] = self.of_attempt(row, graph)

    def ended_with_scheduler(self, row: AttemptRow) -> bool:
        """Whether an attempt was still running when its scheduler gave the run up."""
        return ENDED_BY_SCHEDULER in self._logs.stderr_tail(attempt_row_ids(row), row["attempt_id"])

    def _is_abandoned(self, row: AttemptRow, now: float) -> bool:
        """Whether an attempt fell silent together with its scheduler, which recorded no end of it.

        A run whose id a client chose was started by an orchestrator, and has no scheduler.
        """
        ids, number = attempt_row_ids(row), row["attempt_id"]
        if isinstance(row["run_number"], str) or self._logs.process_end(ids, number) is not None:
            return False
        attempts = self._histories.of_task(ids).attempts
        if number < len(attempts) and attempts[number].done_at is not None:
            return False
        heartbeat = (self._store.run(ids[:2]) or row)["last_heartbeat_ts"]
        return heartbeat is None or now - heartbeat > TASK_HEARTBEAT_CUTOFF

    def _find(self, row: AttemptRow, graph: Graph) -> Cause | None:
        ids, number = attempt_row_ids(row), row["attempt_id"]
        is_caught = row["status"] == COMPLETED
        raised = self._read_exception(ids, number, CAUGHT if is_caught else UNCAUGHT)
        if is_caught and not (raised and was_raised_in(raised, row)):
            return None
        stderr, end = self._logs.stderr_tail(ids, number), self._logs.process_end(ids, number)
        if raised is None and end is not None and end.return_code == UNCAUGHT_EXIT_CODE:
            raised = parse_last_words(stderr) or parse_headline(stderr)
        if raised is None:
            has_started = row["started_at"] is not None or (end is not None and end.is_by_signal())
            kind = KILLED if has_started else NEVER_STARTED
            message = describe_process_end(end)
            is_interrupted = INTERRUPTED in stderr[-CAUSE_STDERR_LINES:]
            raised = Raised(None, f"interrupted, {message}" if is_interrupted else message)
        elif raised.type == TIMEOUT_TYPE:
            kind = TIMED_OUT
            raised = raised._replace(message=(raised.message or "").partition("\n")[0])
        else:
            kind = RAISED
        return make_cause(kind, ids, raised, row, attempts_allowed(graph, row["step_name"]), stderr)

    def _read_exception(self, ids: Ids, number: int, name: str) -> Raised | None:
        artifact = self._store.artifact(ids, name, number)
        if artifact is not None:
            with contextlib.suppress(OSError, ValueError):
                return parse_exception_wrapper(self._artifacts.value(artifact, LARGEST_VALUE))
        return None


# -- attempts --------------------------------------------------------------------------------------

TASK_SILENCE_CUTOFF = 3600
"""Seconds without any sign of life after which a task that sends no heartbeats counts as dead. It
may compute for long without writing anything, which must not be shown as a failure."""


def last_sign_of_life(record: BaseRun | Task, written: Iterable[os.stat_result | None]) -> int:
    """When a run or task last gave a sign of life, in epoch milliseconds.

    That is its heartbeat, or if it sends none, the last time that something was `written` to one of
    its folders.
    """
    heartbeat, created = record["last_heartbeat_ts"], record["ts_epoch"]
    if heartbeat is not None:
        return max(heartbeat * 1000, created)
    times = (int(status.st_mtime * 1000) for status in written if status is not None)
    return max([created, *times])


def stat_record_folders(store: Store, ids: Ids) -> Iterator[os.stat_result | None]:
    """The statuses of the folders in which the records of a run or task are."""
    own = "/".join((store.folder, *ids))
    return map(stat_or_none, (own, f"{own}/{META_DIR}"))


def attempt_status(
    attempts: Sequence[Attempt], number: int, created: int, silent_since: int | None
) -> tuple[str, int | None]:
    """The status of a single attempt, and when it finished.

    `created`: when the task was created; `silent_since`: since when it has given no sign of life,
    or None if it is alive, which concerns only its newest attempt.
    """
    attempt = attempts[number]
    begin = attempt.started_at or created
    if attempt.done_at is not None:
        status = FAILED if attempt.is_ok is False else COMPLETED
        return status, max(attempt.done_at, begin)
    if number + 1 < len(attempts):
        return FAILED, max(attempts[number + 1].started_at or begin, begin)
    if silent_since is not None:
        return FAILED, max(silent_since, begin)
    return RUNNING, None


class Attempts:
    """The rows of attempts: the status of each, its times and its cause."""

    def __init__(
        self, store: Store, logs: Logs, cards: Cards, histories: Histories, causes: Causes
    ) -> None:
        self._store = store
        self._logs = logs
        self._cards = cards
        self._histories = histories
        self._causes = causes

    def of_run(self, ids: Ids, now: float) -> list[AttemptRow]:
        """The attempts of all tasks of a run, oldest task first, with causes."""
        rows = self.without_details(RunFolders(self._store, self._histories, ids), now)
        return self._add_details(ids, rows, now)

    def of_task(self, ids: Ids, now: float) -> list[AttemptRow]:
        """The attempts of a task, newest first, with causes."""
        task = self._store.task(ids)
        rows = [] if task is None else self._rows(ids, task, self._histories.of_task(ids), now)
        return self._add_details(ids[:2], rows, now)[::-1]

    def without_details(self, folders: RunFolders, now: float) -> list[AttemptRow]:
        """The attempts of all tasks of a run, with what a verdict needs: no causes, no logs."""
        rows: list[AttemptRow] = []
        for task in self._store.read_tasks(folders.ids, folders.all_tasks()):
            ids = (*folders.ids, task["step_name"], str(task["task_id"]))
            rows += self._rows(ids, task, folders.history(ids), now)
        return rows

    def _add_details(self, ids: Ids, rows: list[AttemptRow], now: float) -> list[AttemptRow]:
        """Add what no verdict needs to attempts of a run: whether logs are stored, and causes."""
        for row in rows:
            row["is_log_stored"] = self._logs.is_stored(row, now)
        self._causes.add_to(ids, rows)
        return rows

    def _rows(self, ids: Ids, task: Task, history: History, now: float) -> list[AttemptRow]:
        attempts = self._add_unrecorded(ids, history.attempts or [Attempt()])
        silent_since = None
        if attempts[-1].done_at is None:
            silent_since = self._silent_since(ids, task, now)
        created = task["ts_epoch"]
        rows: list[AttemptRow] = []
        for number, attempt in enumerate(attempts):
            status, end = attempt_status(attempts, number, created, silent_since)
            is_begun = attempt.started_at is not None or task["last_heartbeat_ts"] is not None
            rows.append(
                {
                    **task,
                    **shared_columns(task),
                    "task_name": string_id(task["task_id"]),
                    "attempt_id": number,
                    "status": status if is_begun or status != RUNNING else PENDING,
                    "task_ok": None,
                    "started_at": attempt.started_at,
                    "finished_at": end,
                    "duration": elapsed_ms(attempt.started_at or created, end, now),
                    "cause": None,
                    "foreach_label": history.foreach_label,
                    "origin_pathspec": history.origin_pathspec,
                    "is_log_stored": False,
                }
            )
        return rows

    def _silent_since(self, ids: Ids, task: Task, now: float) -> int | None:
        """When a task gave its last sign of life, if it counts as dead; None while it is alive."""
        cutoff = TASK_SILENCE_CUTOFF if task["last_heartbeat_ts"] is None else TASK_HEARTBEAT_CUTOFF
        last_sign = last_sign_of_life(task, self._stat_folders(ids))
        return last_sign if now * 1000 - last_sign > cutoff * 1000 else None

    def _stat_folders(self, ids: Ids) -> Iterator[os.stat_result | None]:
        """The statuses of all folders that a task may write to while it runs."""
        yield from stat_record_folders(self._store, ids)
        yield from self._cards.stat_data_folders(ids)
        yield self._logs.stat_folder(ids, None)

    def _add_unrecorded(self, ids: Ids, attempts: Sequence[Attempt]) -> list[Attempt]:
        """Attempts, completed by what only their scheduler has recorded, in a file for each.

        A process that is killed cannot record its end, nor its start if it is killed early.
        """
        known = list(attempts)
        while not known[-1].is_ok and len(known) <= LARGEST_SHOWN_ATTEMPT:
            if known[-1].done_at is None:
                end = self._logs.process_end(ids, len(known) - 1)
                if end is None:
                    break
                known[-1] = known[-1]._replace(done_at=end.moment, is_ok=end.is_ok)
            elif self._logs.process_end(ids, len(known)) is None:
                break
            else:
                known.append(Attempt())
        return known


# -- runs and verdicts -----------------------------------------------------------------------------

VERDICTS_IN_MEMORY = 8 * 2**20  # bytes, about: on 10,000 runs

RUN_HEARTBEAT_CUTOFF = 360
"""Seconds without a heartbeat after which a run that has not ended counts as failed."""

RUNNING_SECONDS = 1.0
"""How long a run counts as running without another look at the signs of life of its tasks, if none
of its records has changed. A page of running runs with two tasks each then takes 1.6 ms, not 6."""


class Verdict(NamedTuple):
    """What has become of a run, with the versions of all records that this rests on."""

    status: str
    finished_at: int | None
    cause: Cause | None
    origin_run_id: str | None
    heartbeat: int | None
    folders: FolderVersions
    judged_at: float  # epoch seconds

    def weight(self) -> int:
        """About how many bytes it takes."""
        return 300 + 160 * len(self.folders) + cause_weight(self.cause)


def sends_heartbeats(system_tags: Tags) -> bool:
    """Whether a client with these system tags sends heartbeats, by its `metaflow_version:`.

    Missing system tags count as those of one that does.
    """
    if system_tags is None:
        return True
    prefix = "metaflow_version:"
    for tag in system_tags:
        if tag.startswith(prefix):
            return version_has_heartbeats(tag[len(prefix) :])
    return False


@lru_cache(maxsize=64)  # the tasks of a run all have the same, which takes 5 us to parse
def version_has_heartbeats(text: str) -> bool:
    """Whether clients of a version of Metaflow send heartbeats; true if it cannot be parsed."""
    match = re.match(r"(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?", text)
    if match is None:
        return True
    version = tuple(int(part or 0) for part in match.groups())
    return version >= (2, 2, 12) or (1, 14, 0) <= version < (2, 0, 0)


def cannot_go_on(
    tasks: Iterable[AttemptRow],
    graph: Graph,
    ended_with_scheduler: Callable[[AttemptRow], bool] = lambda task: False,
) -> bool:
    """Whether a run has failed for good: a task has used up its attempts, and no task is running.

    Like the scheduler, this waits for the siblings of a failed task. `ended_with_scheduler`: tells
    whether a failed attempt will not be repeated, although it could be.
    """
    newest = newest_attempts(tasks)
    if any(task["finished_at"] is None for task in newest):
        return False
    return any(
        task["attempt_id"] + 1 >= (attempts_allowed(graph, task["step_name"]) or math.inf)
        or ended_with_scheduler(task)
        for task in newest
        if task["status"] == FAILED
    )


def has_failed_end(tasks: Iterable[AttemptRow], end_step: str) -> bool:
    """Whether the end step has failed, by which a run is judged whose graph is unknown.

    Clients other than Metaflow store no graph. The reference judges all runs like this.
    """
    end = [task for task in tasks if task["step_name"] == end_step]
    return bool(end) and end[-1]["status"] == FAILED


def ended_without_heartbeats(run: RunRow, tasks: Iterable[AttemptRow]) -> bool:
    """Whether no task of a run is running, and its client is one that never sends heartbeats.

    Nothing more is then to be expected. Runs of local mode are not meant: by their system tags,
    their client sends heartbeats, and so they are judged by when their files were written.
    """
    if run["last_heartbeat_ts"] is not None or sends_heartbeats(run["system_tags"]):
        return False
    return all(task["finished_at"] is not None for task in tasks)


class Runs:
    """The rows of runs, and the verdict on each."""

    def __init__(
        self,
        store: Store,
        clock: Callable[[], float],
        histories: Histories,
        graphs: Graphs,
        causes: Causes,
        attempts: Attempts,
    ) -> None:
        self._store = store
        self._clock = clock
        self._histories = histories
        self._graphs = graphs
        self._causes = causes
        self._attempts = attempts
        self._verdicts: Cache[Verdict] = Cache(VERDICTS_IN_MEMORY, Verdict.weight)
        self._unfinished: dict[Ids, None] = {}  # the runs that were running when last judged
        self._last_end = 0  # of the others, in epoch milliseconds

    def newest_first(self, flow: str | None = None) -> Iterator[RunRow]:
        """The runs of a flow or of all flows, newest first, not judged yet."""
        import heapq

        names = [f["flow_id"] for f in self._store.flows()] if flow is None else [flow]
        flows = [self._store.runs((name,)) for name in names]
        merged = heapq.merge(*flows, key=run_sort_key, reverse=True)
        return map(run_row, merged)

    def get(self, ids: Ids) -> RunRow | None:
        """A run with its verdict, or None if there is no such run."""
        run = self._store.run(ids)
        return None if run is None else self.judge(run_row(run))

    def unfinished(self) -> list[RunRow]:
        """The runs that were running when they were last judged, not judged again."""
        rows = []
        for ids in list(self._unfinished):
            run = self._store.run(ids)
            if run is None:
                self._unfinished.pop(ids, None)
            else:
                rows.append(run_row(run))
        return rows

    def judge(self, row: RunRow) -> RunRow:
        """Fill in what has become of a run, unless that is done already, and return the row."""
        if not row["status"]:
            now = self._clock()
            verdict = self._verdict(row, now)
            row["status"], row["finished_at"] = verdict.status, verdict.finished_at
            row["duration"] = elapsed_ms(row["ts_epoch"], verdict.finished_at, now)
            row["cause"] = verdict.cause
            row["origin_run_id"] = verdict.origin_run_id
        return row

    def status(self, run: Run) -> str:
        """The status of a run: running, completed or failed."""
        ids, heartbeat = (run["flow_id"], str(run["run_number"])), run["last_heartbeat_ts"]
        known = self._known_verdict(ids, heartbeat, self._clock())
        return self.judge(run_row(run))["status"] if known is None else known.status

    def is_settled(self, row: RunRow) -> bool:
        """Whether a run has ended and nothing of it has changed for a while."""
        known = self._known_verdict(run_row_ids(row), row["last_heartbeat_ts"], self._clock())
        return known is not None and known.status != RUNNING

    def is_at_rest(self, seconds: float) -> bool:
        """Whether no run is running, and the last to end did so longer ago than that.

        Of the runs that have been judged.
        """
        return not self._unfinished and self._clock() * 1000 - self._last_end > seconds * 1000

    def version(self) -> object:
        """What changes when a flow or run comes or goes; None while that could go unnoticed."""
        flows = [(flow["flow_id"],) for flow in self._store.flows()]
        found = [self._store.version(ids) for ids in ((), *flows)]
        return None if None in found else found

    def resumed(self, flow: str) -> list[tuple[Ids, Ids]]:
        """The resumed runs of a flow, each with the run that it was resumed from.

        A run that has ended without taking over any task is left out.
        """
        found: list[tuple[Ids, Ids]] = []
        for run in self._store.runs((flow,)):
            ids = (flow, str(run["run_number"]))
            origin = self._origin_run_id(
                RunFolders(self._store, self._histories, ids), self._graphs.of_run(ids) or {}
            )
            if origin is not None and (self._has_clones(ids) or self.status(run) == RUNNING):
                found.append((ids, (flow, origin)))
        return found

    def _has_clones(self, ids: Ids) -> bool:
        """Whether a run has taken over a task from another run."""
        for step in self._store.steps(ids):
            for task in self._store.task_ids((*ids, step["step_name"])):
                if self._histories.of_task(task).origin_pathspec is not None:
                    return True
        return False

    def _known_verdict(self, ids: Ids, heartbeat: int | None, now: float) -> Verdict | None:
        """The cached verdict on a run, if all that it rests on is unchanged."""
        known = self._verdicts.get("/".join(ids))
        if known is None or known.heartbeat != heartbeat:
            return None
        if known.status == RUNNING and not 0 <= now - known.judged_at < RUNNING_SECONDS:
            return None
        return known if are_unchanged(known.folders) else None

    def _verdict(self, row: RunRow, now: float) -> Verdict:
        ids, heartbeat = run_row_ids(row), row["last_heartbeat_ts"]
        known = self._known_verdict(ids, heartbeat, now)
        if known is not None:
            return known
        verdict = self._make_verdict(row, RunFolders(self._store, self._histories, ids), now)
        self._remember(ids, verdict)
        return verdict

    def _remember(self, ids: Ids, verdict: Verdict) -> None:
        """Note whether a run has ended, and cache the verdict if it may be relied on."""
        if verdict.status == RUNNING:
            self._unfinished[ids] = None
        else:
            self._unfinished.pop(ids, None)
            self._last_end = max(self._last_end, verdict.finished_at or 0)
        if all(version is not None for _, version in verdict.folders):
            self._verdicts.put("/".join(ids), verdict)

    def _make_verdict(self, row: RunRow, folders: RunFolders, now: float) -> Verdict:
        first = [folders.history(task) for task in folders.tasks(PARAMETERS_STEP)]
        graph = self._graphs.read(first) or {}
        end_step = find_end_step(first, graph)
        completion = self._completion(folders, end_step)
        if completion is not None:
            finished_at, sources = completion
            status, cause = COMPLETED, None
        else:
            tasks = self._attempts.without_details(folders, now)
            sources = list(folders.versions)
            status, finished_at = self._judge_incomplete(row, tasks, graph, end_step, now)
            cause = self._causes.of_run(row, tasks, graph, now) if status == FAILED else None
        origin = self._origin_run_id(folders, graph)
        seen = folders.versions_of(sources)
        return Verdict(status, finished_at, cause, origin, row["last_heartbeat_ts"], seen, now)

    def _completion(
        self, folders: RunFolders, end_step: str
    ) -> tuple[int | None, Sequence[Ids]] | None:
        """When a run was completed, and the objects that say so; None if it is not completed."""
        for task in folders.tasks(end_step)[-1:]:
            attempts = folders.history(task).attempts
            if attempts and attempts[-1].is_ok:
                sources = (task[:-1], task)
                # Without parameters the run is a teller too: they would say what the end step is.
                has_parameters = bool(folders.tasks(PARAMETERS_STEP))
                return attempts[-1].done_at, sources if has_parameters else (folders.ids, *sources)
        return None

    def _judge_incomplete(
        self, row: RunRow, tasks: Sequence[AttemptRow], graph: Graph, end_step: str, now: float
    ) -> tuple[str, int | None]:
        """The status of a run that is not completed, and when it failed; `tasks`: all attempts."""
        if any(task["status"] == RUNNING for task in tasks):
            return RUNNING, None
        if cannot_go_on(tasks, graph, self._causes.ended_with_scheduler):
            return FAILED, max(task["finished_at"] or 0 for task in tasks)
        written = stat_record_folders(self._store, run_row_ids(row))
        signs = [task["finished_at"] or task["started_at"] or task["ts_epoch"] for task in tasks]
        last_sign = max([last_sign_of_life(row, written), *signs])
        is_over = ended_without_heartbeats(row, tasks) or (
            not graph and has_failed_end(tasks, end_step)
        )
        if is_over or now * 1000 - last_sign > RUN_HEARTBEAT_CUTOFF * 1000:
            return FAILED, last_sign
        return RUNNING, None

    def _origin_run_id(self, folders: RunFolders, graph: Graph) -> str | None:
        """The run that a run was resumed from, according to its first tasks."""
        step = graph.get("start_step")
        for name in (PARAMETERS_STEP, step if isinstance(step, str) else DEFAULT_START_STEP):
            for task in folders.tasks(name)[:1]:
                origin = folders.history(task).origin_run_id
                if origin is not None:
                    return origin
        return None


# -- the model -------------------------------------------------------------------------------------


class Model:
    """The runs of a store, with all that is known of them, piece by piece."""

    def __init__(
        self,
        store: Store,
        clock: Callable[[], float] = time.time,
        search: Search = search_in_place,
    ) -> None:
        """`clock`: returns epoch seconds; `search`: is called for patterns that may take long."""
        self.store = store
        self.files = FileOpener(store.folder)
        self.clock = clock
        self.search = search
        self.artifacts = Artifacts(store, self.files)
        self.logs = Logs(store, self.files)
        self.cards = Cards(store, self.files)
        self.histories = Histories(store, self.artifacts)
        self.graphs = Graphs(store, self.artifacts, self.histories)
        self.causes = Causes(store, self.artifacts, self.logs, self.histories, self.graphs)
        self.attempts = Attempts(store, self.logs, self.cards, self.histories, self.causes)
        self.runs = Runs(store, clock, self.histories, self.graphs, self.causes, self.attempts)


# -- comparing runs --------------------------------------------------------------------------------

MOST_COMPARED = 5
COMPARED_SECTIONS = ("parameters", "artifacts", "durations", "tags", "code")

MOST_RUNS_LOOKED_BACK = 100
"""How many earlier runs are searched for the last one that succeeded."""

LONGEST_COMPARED = 2000
"""The length up to which artifacts are compared by their text, and not by their digest."""

LEAST_DELAY_MS = 1000
"""Durations that differ by less are taken for equal."""

Facts = Mapping[str, Mapping[str, Any]]
"""What is compared of a run: for each section, the values by their names."""


if TYPE_CHECKING:

    class Difference(TypedDict):
        """One value that differs between the runs that are compared."""

        section: str  # one of COMPARED_SECTIONS
        name: str
        values: list[Any]  # one for each run, in their order; None for a run without it

    class Comparison(TypedDict):
        runs: list[RunRow]
        differences: list[Difference]


def is_different(section: str, values: Sequence[Any]) -> bool:
    """Whether values differ: durations by more than a second and a quarter of the longest, other
    values as JSON, in which 1 is not true."""
    if section == "durations" and None not in values:
        longest, shortest = max(values), min(values)
        return bool(longest - shortest > max(LEAST_DELAY_MS, longest / 4))
    return len({json.dumps(value, sort_keys=True) for value in values}) > 1


def compare_facts(facts: Sequence[Facts], has_equal: bool = False) -> list[Difference]:
    """The differences between the facts of several runs; `has_equal`: and what is equal."""
    differences: list[Difference] = []
    for section in COMPARED_SECTIONS:
        for name in sorted({name for of_run in facts for name in of_run[section]}):
            values = [of_run[section].get(name) for of_run in facts]
            if has_equal or is_different(section, values):
                differences.append({"section": section, "name": name, "values": values})
    return differences


def compare_runs(model: Model, runs: Sequence[Ids], has_equal: bool = False) -> Comparison | None:
    """What differs between runs; None if one does not exist. `has_equal`: add what is equal."""
    rows = [model.runs.get(ids) for ids in runs]
    if None in rows:
        return None
    found = cast("list[RunRow]", rows)
    facts = [run_facts(model, row) for row in found]
    return {"runs": found, "differences": compare_facts(facts, has_equal)}


def compare_with_last_success(model: Model, ids: Ids) -> Comparison | None:
    """What differs between a run and the last successful run of its flow before it.

    That run comes first. None if there is none.
    """
    run = model.store.run(ids)
    if run is None:
        return None
    earlier = model.store.runs(ids[:1], run_sort_key(run))
    rows = map(model.runs.judge, map(run_row, itertools.islice(earlier, MOST_RUNS_LOOKED_BACK)))
    last = next((row for row in rows if row["status"] == COMPLETED), None)
    return None if last is None else compare_runs(model, [run_row_ids(last), ids])


def run_facts(model: Model, row: RunRow) -> Facts:
    """What is compared of a run."""
    ids, now = run_row_ids(row), model.clock()
    parameters = model.artifacts.parameters(ids)
    folders = RunFolders(model.store, model.histories, ids)
    steps = step_rows(model.store, ids, model.attempts.without_details(folders, now), now)
    durations = {step["step_name"]: step["duration"] for step in steps}
    artifacts = last_artifacts(model, ids, durations)
    digests = {"graph": model.graphs.digest(ids), "package": package_digest(model.store, ids)}
    return {
        "parameters": parameters,
        "artifacts": {n: v for n, v in artifacts.items() if n not in parameters},
        "durations": {n: ms for n, ms in durations.items() if not n.startswith("_")},
        "tags": dict.fromkeys(row["tags"] or (), True),
        "code": {name: sha for name, sha in digests.items() if sha is not None},
    }


def last_artifacts(model: Model, ids: Ids, steps: Iterable[str]) -> dict[str, str]:
    """The last values of the artifacts of a run, by name; large ones by their digests.

    Steps with several tasks are left out, since each task has a value of its own.
    """
    last: dict[str, ArtifactRow] = {}
    for step in steps:
        tasks = model.store.task_ids((*ids, step))
        if len(tasks) == 1 and not step.startswith("_"):
            last.update((row["name"], row) for row in model.artifacts.rows(tasks[0], None))
    shown = {name: row for name, row in last.items() if name[:1] != "_" and name != "name"}
    return {name: compared_text(model.artifacts.with_value(row)) for name, row in shown.items()}


def compared_text(row: ArtifactRow) -> str:
    """The text by which an artifact with its value is compared with others."""
    content = row.get("content", "")
    is_small = 0 < len(content) <= LONGEST_COMPARED
    return content if is_small else f"sha {row['sha']}"


def package_digest(store: Store, ids: Ids) -> str | None:
    """The digest of the code package of a run, or None if it has none."""
    for step in store.steps(ids):
        for task in store.task_ids((*ids, step["step_name"]))[:1]:
            for metadatum in store.metadata(task, fields=("code-package",)):
                with contextlib.suppress(ValueError, LookupError, TypeError):
                    return str(json.loads(value_text(metadatum))["sha"])
    return None


# ==================================================================================================
# Retention: what refers to what, what it takes on the disk, and deleting what is not needed
# ==================================================================================================
#
# What refers to what. A run is the folder FLOW/RUN, with its cards in mf.cards/FLOW/runs/RUN. The
# values of its artifacts are blobs: files that are named after the digest of their content, and
# that the runs of a flow share. A blob is FLOW/data/AB/ABCD..., with a small ABCD..._meta beside
# it. That of an IncludeFile is data/FLOW/ABCD...: in the .metaflow or, if Metaflow was told its
# root, beside it. A blob is referred to by the *.data.json of an attempt, by the records of
# artifacts and metadata (a code package, a graph), and by the content of another blob (the value of
# an IncludeFile has the digest of its text). A blob is not unpickled: any 40 hexadecimal digits in
# its content count as a reference, so that none is missed. Blobs are read only if there is one to
# which no other file refers, and only those that are kept and large enough to hold a digest. A run
# from which a kept run was resumed is kept too, because Metaflow's client looks up there what the
# cloned tasks lack.
#
# What is locked: nothing. A run is deleted by one rename into the trash folder in the .metaflow,
# which no reader looks at; then its cards and files are removed. Several processes may remove the
# same file. No link is followed, and each folder is opened relative to the one above it
# (openat(2)), so that a link that is put there meanwhile cannot lead out of the root.
#
# What a crash leaves. Before the rename: the whole run. After it: a trash entry, perhaps cards, and
# perhaps a latest_run that names the run. The next clean-up finishes the deletion: the record of
# the run in its trash entry says which cards to remove, and is removed after them. Of a blob the
# content is removed before its _meta; the next clean-up removes a _meta without a content.
#
# When in doubt, a blob is kept: for a day after it was written; while a run of its flow is running;
# if anything of its flow is a link or cannot be read. Since Metaflow does not write a blob that
# exists, a new run may refer to a blob that was garbage before. But it makes its folder before it
# stores its first artifact. So before every few blobs are removed, the flow is checked for changes
# since its references were read; if a run was added, the rest is kept. What remains is a window of
# a tenth of a millisecond (a run takes ten of them from its folder to its first artifact); the blob
# of an IncludeFile, which Metaflow looks for a moment before it makes the run; and a run that is
# resumed from one that is being deleted.

TRASH_DIR = f"{PROGRAM}.trash"
YOUNG_SECONDS = 24 * 3600
"""How long a blob is kept in any case after it was written: Metaflow writes it before anything can
refer to it, and what refers to it may be recorded elsewhere, by a run that takes hours."""

SILENT_RUN_SECONDS = 24 * 3600
"""How long a run is kept in any case after it was written to, if it sends no heartbeats, so that it
may compute in silence, or has no record, so that it is recorded elsewhere."""

DIGEST_LENGTH = 40
DIGESTS = f"[0-9a-f]{{{DIGEST_LENGTH},}}"
BLOB_NAME = f"[0-9a-f]{{{DIGEST_LENGTH}}}"
BLOB_PREFIX = "[0-9a-f]{2}"
BLOB_META_END = "_meta"
DATA_FILE_END = ".data.json"
TRASH_ENTRY = f"{PROGRAM}-deleted-"
ENDED = (COMPLETED, FAILED)
BLOB_CHUNK = 2**20
BLOBS_AT_A_TIME = 16
"""How many blobs are removed, in a tenth of a millisecond, between two checks of their flow."""

FULL_DISK = frozenset((errno.ENOSPC, errno.EDQUOT))


class NotDeletable(StoreError):
    """Something cannot be deleted; the sentence says why."""


class Usage(NamedTuple):
    """A number of files, and the bytes that they and their folders take on the disk."""

    files: int = 0
    bytes: int = 0

    def plus(self, other: Usage) -> Usage:
        return Usage(self.files + other.files, self.bytes + other.bytes)


def total_usage(usages: Iterable[Usage]) -> Usage:
    files = size = 0
    for usage in usages:
        files += usage.files
        size += usage.bytes
    return Usage(files, size)


# -- folders, by their descriptors -----------------------------------------------------------------


@contextlib.contextmanager
def open_directory(name: str, above: int | None = None) -> Iterator[int]:
    """A descriptor of a folder for a `with` block.

    The name is relative to the folder `above`, if there is one; FileNotFoundError if it is a link.
    """
    flags = FOLDER_FLAGS if above is None else FOLDER_FLAGS | os.O_NOFOLLOW
    descriptor = open_entry(name, flags, above)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def open_path(path: DatastorePath) -> Iterator[int]:
    """The same for a longer path, of which only the first folder may be a link."""
    with contextlib.ExitStack() as above:
        folder = above.enter_context(open_directory(path[0]))
        for name in path[1:]:
            folder = above.enter_context(open_directory(name, folder))
        yield folder


def scan_folder(folder: int) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def is_real_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)


def stat_entry(folder: int, name: str) -> os.stat_result | None:
    """The status of a file, folder or link in an open folder; None if there is none."""
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def measure_entry(above: int, name: str) -> Usage:
    """The usage of a file, or of a folder with all that is in it; none if it does not exist."""
    status = stat_entry(above, name)
    if status is None:
        return Usage()
    size = status.st_blocks * 512
    if not stat.S_ISDIR(status.st_mode):
        return Usage(1, size)
    usage = Usage(0, size)
    with contextlib.suppress(FileNotFoundError), open_directory(name, above) as folder:
        for below in os.listdir(folder):
            usage = usage.plus(measure_entry(folder, below))
    return usage


def measure_path(path: DatastorePath) -> Usage:
    """The usage of the file or folder at a path."""
    with contextlib.suppress(FileNotFoundError), open_path(path[:-1]) as above:
        return measure_entry(above, path[-1])
    return Usage()


def remove_tree(above: int, name: str) -> None:
    """Remove a folder and all that is in it, as far as no other process has removed it."""
    with contextlib.suppress(FileNotFoundError), open_directory(name, above) as folder:
        for entry in scan_folder(folder):
            if is_real_folder(entry):
                remove_tree(folder, entry.name)
            else:
                remove_entry(folder, entry.name)
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(name, dir_fd=above)


def remove_path(path: DatastorePath) -> None:
    """The same for a path; an OSError names it, and not what is somewhere below it."""
    try:
        with contextlib.suppress(FileNotFoundError), open_path(path[:-1]) as above:
            remove_tree(above, path[-1])
    except OSError as error:
        raise OSError(error.errno, error.strerror, "/".join(path)) from None


def remove_entry(folder: int, name: str) -> bool:
    """Remove a file or link if there is one, and return whether there was."""
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        return False
    return True


def open_regular_file(folder: int, name: str) -> io.BufferedReader:
    """Open a file in an open folder; FileNotFoundError if it is missing or not a regular file."""
    descriptor = open_entry(name, os.O_RDONLY | FILE_FLAGS, folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise no_such_file()
    return open(descriptor, "rb")


def read_entry(folder: int, name: str) -> bytes:
    with open_regular_file(folder, name) as file:
        return file.read()


# -- references ------------------------------------------------------------------------------------


class Blob(NamedTuple):
    """The stored value of an artifact; its name is the digest of its content."""

    folder: DatastorePath
    digest: str


class Unreadable(Exception):
    """A file or folder that may hold references cannot be read."""


class Garbage(NamedTuple):
    """The blobs of a flow that may be removed."""

    flow: str
    state: object  # of the flow's folder, before it was read
    folders: dict[DatastorePath, dict[str, Usage]]  # by folder and digest
    doubt: str | None  # why blobs are kept although there may be no references to them

    def usage(self) -> Usage:
        return total_usage(usage for blobs in self.folders.values() for usage in blobs.values())

    def size(self) -> int:
        """The number of blobs."""
        return sum(map(len, self.folders.values()))

    def spare(self, digests: Iterable[str]) -> None:
        """Keep the blobs of some digests."""
        for name in digests:
            for blobs in self.folders.values():
                blobs.pop(name, None)


def find_digests(content: bytes) -> Iterator[str]:
    """Everything in a content that may be a digest: any 40 hexadecimal digits."""
    for digits in re.findall(DIGESTS, content.decode("latin-1")):
        for start in range(len(digits) - DIGEST_LENGTH + 1):
            yield digits[start : start + DIGEST_LENGTH]


def read_decompressed(content: io.BufferedReader) -> Iterator[bytes]:
    """The content of a blob in chunks, decompressed if it is compressed."""
    import zlib

    is_compressed = content.peek(2).startswith(b"\x1f\x8b")
    decompressor = zlib.decompressobj(wbits=31)
    while chunk := content.read(BLOB_CHUNK):
        if not is_compressed:
            yield chunk
        while is_compressed and chunk:
            yield decompressor.decompress(chunk, BLOB_CHUNK)
            chunk = decompressor.unconsumed_tail


def digests_in_blob(folder: int, name: str, wanted: set[str]) -> set[str]:
    """The wanted digests that are in a blob. Unreadable.

    Nothing else is kept: a megabyte of hexadecimal digits has a million possible digests in it.
    """
    import zlib

    found: set[str] = set()
    before = b""
    try:
        with open_regular_file(folder, name) as file:
            for chunk in read_decompressed(file):
                content = before + chunk
                found.update(wanted.intersection(find_digests(content)))
                before = content[1 - DIGEST_LENGTH :]
    except zlib.error as error:
        raise Unreadable(f"{name}: {error}") from None
    return found


def read_blobs(blobs: Iterable[Blob], wanted: set[str]) -> Iterator[tuple[Blob, set[str]]]:
    """Blobs with the wanted digests that are in them, without missing ones. Unreadable."""
    for path, in_folder in itertools.groupby(blobs, key=operator.attrgetter("folder")):
        try:
            with open_path(path) as folder:
                for blob in in_folder:
                    with contextlib.suppress(FileNotFoundError):
                        yield blob, digests_in_blob(folder, blob.digest, wanted)
        except OSError as error:
            raise Unreadable(f"{'/'.join(path)}: {error.strerror}") from None


def follow_references(
    blobs: Iterable[Blob], targets: Mapping[DatastorePath, Collection[str]]
) -> Iterator[tuple[Blob, set[str]]]:
    """The references in blobs to targets, and in the targets that are found to further ones.

    Yields each blob that refers to targets, with their digests. The targets are the digests of
    blobs, by the folder of these. Unreadable.
    """
    wanted = set[str]().union(*targets.values())
    unread, seen = list(blobs), set[str]()
    while unread:
        reached: set[str] = set()
        for blob, found in read_blobs(unread, wanted):
            if found:
                yield blob, found
                reached |= found
        unread = [
            Blob(path, name)
            for path, names in targets.items()
            for name in reached - seen
            if name in names
        ]
        seen |= reached


def read_referring_files(above: int, name: str, of_records: bool) -> Iterator[bytes]:
    """The contents of the files below a folder of a run that may refer to blobs.

    These are the *.data.json or, if `of_records`, the records. Unreadable if anything there is a
    link or cannot be read.
    """
    try:
        with open_directory(name, above) as folder:
            for entry in scan_folder(folder):
                if entry.is_symlink():
                    raise Unreadable(f"{entry.name} in {name} is a symbolic link")
                if is_real_folder(entry):
                    if of_records or entry.name != META_DIR:
                        yield from read_referring_files(folder, entry.name, of_records)
                elif name == META_DIR if of_records else entry.name.endswith(DATA_FILE_END):
                    yield read_entry(folder, entry.name)
    except OSError as error:
        raise Unreadable(f"{name} cannot be read: {error.strerror}") from None


def small_digests(content: bytes) -> Iterator[str]:
    """The digests in a *.data.json of values that are too small to hold a digest themselves."""
    with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
        data = json.loads(content)
        for name, value in data["objects"].items():
            if data["info"][name]["size"] < DIGEST_LENGTH:
                yield value


class FlowData:
    """The blobs of a flow, and the references of its runs to them, at one moment."""

    def __init__(self, datastore: str, flow: str) -> None:
        """`datastore`: the path of the .metaflow folder."""
        self.flow = flow
        self._path: DatastorePath = (datastore, flow)
        self.state = folder_state(datastore, flow)  # before anything in it is read
        self.folders: dict[DatastorePath, set[str]] = {}  # the digests of the blobs in each
        self.runs: dict[str, set[str]] = {}  # the digests to which each run refers
        self.small: set[str] = set()  # the digests of blobs that cannot hold one
        self.doubt: str | None = None  # why the references of its runs are not known
        self._list_all_blobs()
        for folder in (datastore, os.path.dirname(datastore)):
            self._list_blobs((folder, DATA_DIR, flow))
        try:
            self._read_runs()
        except Unreadable as error:
            self.doubt = str(error)

    def _list_all_blobs(self) -> None:
        path = (*self._path, DATA_DIR)
        with contextlib.suppress(FileNotFoundError), open_path(path) as folder:
            for name in os.listdir(folder):
                if re.fullmatch(BLOB_PREFIX, name):
                    self._list_blobs((*path, name), name)

    def _list_blobs(self, path: DatastorePath, prefix: str = "") -> None:
        with contextlib.suppress(FileNotFoundError), open_path(path) as folder:
            names = {name[:DIGEST_LENGTH] for name in os.listdir(folder)}  # a blob and its _meta
            self.folders[path] = {
                name for name in names if re.fullmatch(BLOB_NAME, name) and name.startswith(prefix)
            }

    def _read_runs(self) -> None:
        with contextlib.suppress(FileNotFoundError), open_path(self._path) as folder:
            for entry in scan_folder(folder):
                if entry.is_symlink():
                    raise Unreadable(f"{entry.name} is a symbolic link")
                if is_real_folder(entry) and entry.name not in (DATA_DIR, META_DIR):
                    self.runs[entry.name] = set()
                    for content in read_referring_files(folder, entry.name, of_records=False):
                        self.runs[entry.name].update(find_digests(content))
                        self.small.update(small_digests(content))

    def digests_in_records(self, runs: Iterable[str], wanted: set[str]) -> set[str]:
        """The wanted digests that are in the records of runs. Unreadable."""
        found: set[str] = set()
        with contextlib.suppress(FileNotFoundError), open_path(self._path) as folder:
            for run in runs:
                for content in read_referring_files(folder, run, of_records=True):
                    found.update(wanted.intersection(find_digests(content)))
        return found

    def large_blobs(self) -> Iterator[Blob]:
        """The blobs that may hold digests."""
        for path, digests in self.folders.items():
            for name in digests - self.small:
                yield Blob(path, name)


def folder_state(datastore: str, flow: str) -> object:
    """A value that changes whenever a run is added to a flow or removed from it."""
    status = stat_or_none(f"{datastore}/{flow}")
    return None if status is None else (status.st_ino, status.st_mtime_ns, status.st_nlink)


def measure_blobs(path: DatastorePath, digests: Iterable[str], before: float) -> dict[str, Usage]:
    """The usage of those blobs in a folder, each with its _meta, that were written before a time.

    `before`: epoch seconds. Blobs that do not exist are left out. All _meta are of the same size,
    and so only one of them is measured, which halves the time.
    """
    usages: dict[str, Usage] = {}
    with contextlib.suppress(FileNotFoundError), open_path(path) as folder:
        of_meta: Usage | None = None
        for name in digests:
            status, rest = stat_entry(folder, name), of_meta
            if status is None:  # a clean-up was killed after it had removed the content
                status, rest = stat_entry(folder, name + BLOB_META_END), Usage()
            if status is None or status.st_mtime > before or not stat.S_ISREG(status.st_mode):
                continue
            if rest is None:
                rest = of_meta = measure_entry(folder, name + BLOB_META_END)
            usages[name] = Usage(1 + rest.files, status.st_blocks * 512 + rest.bytes)
    return usages


def is_named_by_content(path: DatastorePath, name: str) -> bool:
    """Whether the name of a file is the digest of its content, which makes it a blob."""
    import hashlib
    import zlib

    sha = hashlib.sha1(usedforsecurity=False)
    try:
        with open_path(path) as folder, open_regular_file(folder, name) as file:
            for chunk in read_decompressed(file):
                sha.update(chunk)
    except (OSError, zlib.error):
        return False
    return sha.hexdigest() == name


# -- runs and blobs that may be deleted ------------------------------------------------------------


class Conditions(NamedTuple):
    """Which runs are to be deleted: those that meet all of these conditions."""

    flow: str | None = None
    before: float | None = None  # they started before this time, in epoch seconds
    keep_last: int | None = None  # they are not among so many newest runs of their flow
    statuses: Collection[str] = ENDED
    tags: Sequence[str] = ()  # they have all of these
    not_tags: Sequence[str] = ()  # they have none of these

    def are_given(self) -> bool:
        """Whether there is any condition besides the flow, which alone chooses no runs."""
        is_limited = self.before is not None or self.keep_last is not None
        return is_limited or set(self.statuses) != set(ENDED) or bool(self.tags or self.not_tags)


class FlowUsage(NamedTuple):
    """What a flow takes on the disk."""

    flow: str
    runs: int
    held: Usage
    unreferenced: Usage  # the part of it to which nothing refers


class RunUsage(NamedTuple):
    """What a run takes on the disk."""

    ids: Ids
    own: Usage  # its records, logs and cards
    data: Usage  # the blobs to which it refers
    only: Usage  # its own, and the blobs to which no other run refers


class Retention:
    """Measures what is in a root, finds what may be deleted, and deletes it."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._store = model.store
        self._folder = model.store.folder
        self._entries = itertools.count(time.time_ns())  # numbers for trash entries

    # -- what may be deleted -----------------------------------------------------------------------

    def reasons_to_stay(self, runs: Iterable[Ids]) -> dict[Ids, str]:
        """The reasons, as sentences, why some of these runs cannot be deleted, even together.

        NotFound if one does not exist.
        """
        going = dict.fromkeys(runs)
        reasons = {ids: reason for ids in going if (reason := self._reason_to_stay(ids))}
        resumed = [
            pair for flow in {i[0] for i in going} for pair in self._model.runs.resumed(flow)
        ]
        is_complete = False
        while not is_complete:
            is_complete = True
            for ids, origin in resumed:
                keeps_origin = origin in going and origin not in reasons
                if keeps_origin and (ids not in going or ids in reasons):
                    reasons[origin] = f"{'/'.join(ids)} was resumed from it and needs it."
                    is_complete = False
        return reasons

    def _reason_to_stay(self, ids: Ids) -> str | None:
        """Why a run cannot be deleted, whatever else is; None if it can."""
        row = self._model.runs.get(ids)
        reason = None if row is None else self._reason_by_row(row)
        # If another process has deleted it meanwhile, the row may be of a half-deleted run.
        if row is None or not self._has_folder(*ids):
            raise NotFound(f"There is no run {'/'.join(ids)}.")
        return reason

    def _reason_by_row(self, row: RunRow) -> str | None:
        """The same, according to the row of the run."""
        if row["status"] == RUNNING:
            return "It is running."
        if self._may_go_on(row):
            return "It may go on: nothing says that it has ended, and it was written to lately."
        if row["run"] == DATA_DIR:
            return "The artifacts of its flow are in the folder of its name."
        try:
            with open_path((self._folder, *run_row_ids(row))):
                return None
        except FileNotFoundError:
            return "It is behind a symbolic link."

    def _may_go_on(self, row: RunRow) -> bool:
        """Whether a run counts as failed only because nothing was written for some time.

        A run of a client without heartbeats, such as local mode's, does so before its first task,
        between tasks, and while a task computes for long.
        """
        cause, finished_at = row["cause"], row["finished_at"]
        if cause is None or cause["kind"] not in (NEVER_STARTED, SCHEDULER_GONE):
            return False
        silent_ms = self._model.clock() * 1000 - (finished_at or row["ts_epoch"])
        has_heartbeats = row["last_heartbeat_ts"] is not None
        cutoff = RUN_HEARTBEAT_CUTOFF if has_heartbeats else SILENT_RUN_SECONDS
        return silent_ms < cutoff * 1000

    def choose_runs(self, conditions: Conditions) -> Iterator[RunRow]:
        """The runs that meet the conditions, newest first; none that is running."""
        seen: dict[str, int] = {}
        for row in self._model.runs.newest_first(conditions.flow):
            seen[row["flow_id"]] = seen.get(row["flow_id"], 0) + 1
            tags = {*(row["tags"] or ()), *(row["system_tags"] or ())}
            if (
                seen[row["flow_id"]] > (conditions.keep_last or 0)
                and (conditions.before is None or row["ts_epoch"] < conditions.before * 1000)
                and tags.issuperset(conditions.tags)
                and tags.isdisjoint(conditions.not_tags)
                and self._model.runs.judge(row)["status"] in conditions.statuses
            ):
                yield row

    def find_garbage(
        self, without: Collection[Ids] = (), flow: str | None = None, keeps_recent: bool = True
    ) -> list[Garbage]:
        """The blobs of one flow, or of all, to which nothing refers `without` some of the runs.

        `keeps_recent`: young blobs, and those of flows with a running run, are not among them. What
        is in doubt is left out. Unreadable if a blob that is kept cannot be read.
        """
        flows = [FlowData(self._folder, name) for name in self.flow_folders()]
        found = [
            self._unreferenced_blobs(data, without, keeps_recent)
            for data in flows
            if flow in (None, data.flow)
        ]
        self._spare_referred_in_blobs(flows, found)
        return [garbage for garbage in found if garbage.size() or garbage.doubt]

    def _unreferenced_blobs(
        self, data: FlowData, without: Collection[Ids], keeps_recent: bool
    ) -> Garbage:
        """The blobs of a flow to which no file refers; other blobs may."""
        kept = [run for run in data.runs if (data.flow, run) not in without]
        referred = set[str]().union(*(data.runs[run] for run in kept))
        rest = {path: digests - referred for path, digests in data.folders.items()}
        doubt = data.doubt
        unsure = set[str]().union(*rest.values())
        if unsure and not doubt:
            try:
                referred = data.digests_in_records(kept, unsure)
            except Unreadable as error:
                doubt = str(error)
            if keeps_recent and self._may_be_written_to(data):
                doubt = "a run of it is running"
        if doubt:
            return Garbage(data.flow, data.state, {}, doubt)
        before = self._model.clock() - YOUNG_SECONDS if keeps_recent else math.inf
        folders = {
            path: measure_blobs(path, digests - referred, before) for path, digests in rest.items()
        }
        for path, blobs in folders.items():
            if path[0] != self._folder:  # outside the .metaflow, a name does not make a blob
                for name in [name for name in blobs if not is_named_by_content(path, name)]:
                    del blobs[name]
        return Garbage(data.flow, data.state, folders, None)

    def _may_be_written_to(self, data: FlowData) -> bool:
        """Whether a run of a flow is running, or may be and is recorded elsewhere."""
        for row in map(self._model.runs.judge, self._model.runs.newest_first(data.flow)):
            if row["status"] == RUNNING or self._may_go_on(row):
                return True
        before = self._model.clock() - SILENT_RUN_SECONDS
        unrecorded = (run for run in data.runs if self._store.run((data.flow, run)) is None)
        changed = (stat_or_none(f"{self._folder}/{data.flow}/{run}") for run in unrecorded)
        return any(status is not None and status.st_mtime > before for status in changed)

    def _spare_referred_in_blobs(self, flows: Iterable[FlowData], found: Sequence[Garbage]) -> None:
        """Keep the blobs to which blobs refer that are kept."""
        targets = {path: set(blobs) for garbage in found for path, blobs in garbage.folders.items()}
        if not any(targets.values()):
            return
        kept = (
            blob
            for data in flows
            for blob in data.large_blobs()
            if blob.digest not in targets.get(blob.folder, ())
        )
        for _, digests in follow_references(kept, targets):
            for garbage in found:
                garbage.spare(digests)

    def flow_folders(self) -> list[str]:
        """The names of all folders in the .metaflow that may be flows."""
        with open_directory(self._folder) as folder:
            names = [entry.name for entry in scan_folder(folder) if is_real_folder(entry)]
        return sorted(n for n in names if not n.startswith(PROGRAM) and n != CARDS_DIR)

    # -- deleting ----------------------------------------------------------------------------------

    def delete_runs(self, runs: Iterable[Ids]) -> Iterator[tuple[Ids, Usage]]:
        """Delete runs with their cards, one after the other, and yield what each has taken.

        NotFound, or NotDeletable, before any is deleted if one does not exist or cannot be deleted.
        """
        unique = list(dict.fromkeys(runs))
        for ids, reason in self.reasons_to_stay(unique).items():
            raise NotDeletable(f"{'/'.join(ids)} cannot be deleted. {reason}")
        # Newest first, so that a run is deleted before the older one from which it was resumed.
        for ids in sorted(unique, key=self._sort_key, reverse=True):
            with contextlib.suppress(NotFound):  # another process was faster
                changed = self._reason_to_stay(ids)
                if changed is not None:
                    raise NotDeletable(f"{'/'.join(ids)} cannot be deleted any more. {changed}")
                yield ids, self._delete_run(ids)

    def _sort_key(self, ids: Ids) -> SortKey:
        run = self._store.run(ids)
        return (0, id_sort_key(ids[1])) if run is None else run_sort_key(run)

    def _delete_run(self, ids: Ids) -> Usage:
        usage = self.measure_run(ids)
        trash = self._make_trash(ids[0])
        entry = f"{TRASH_ENTRY}{os.getpid()}-{next(self._entries)}"
        with open_path((self._folder, ids[0])) as flow, open_path(trash) as folder:
            try:
                os.rename(ids[1], entry, src_dir_fd=flow, dst_dir_fd=folder)
            except FileNotFoundError:
                raise NotFound(f"There is no run {'/'.join(ids)}.") from None
        self._set_latest_run(ids[0])
        self._finish_deletion(trash, entry)
        return usage

    def _make_trash(self, flow: str) -> DatastorePath:
        """Make the trash folder, and return its path.

        If that is impossible, as on a full disk, a folder that the flow has anyway serves instead,
        in which no reader looks for folders.
        """
        try:
            with open_directory(self._folder) as datastore:
                make_folder(datastore, TRASH_DIR)
            if os.access(f"{self._folder}/{TRASH_DIR}", os.W_OK):  # another user may have made it
                return (self._folder, TRASH_DIR)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
        return (self._folder, flow, META_DIR)

    def finish_deletions(self) -> list[str]:
        """Finish the deletions that are unfinished; returns, as sentences, what cannot be removed.

        That may be files which another user has written, as a container does; the rest goes on.
        """
        flows, failures = self.flow_folders(), []
        for trash in ((self._folder, TRASH_DIR), *((self._folder, f, META_DIR) for f in flows)):
            with contextlib.suppress(FileNotFoundError):
                with open_path(trash) as folder:
                    names = [n for n in os.listdir(folder) if n.startswith(TRASH_ENTRY)]
                for name in names:
                    try:
                        self._finish_deletion(trash, name)
                    except OSError as error:
                        failures.append(f"{error.filename} cannot be removed: {error.strerror}")
        for flow in flows:
            self._set_latest_run(flow)
        return failures

    def _finish_deletion(self, trash: DatastorePath, entry: str) -> None:
        """Remove the cards of a run that is in the trash, and then its trash entry."""
        ids = self._read_deleted_ids((*trash, entry))
        if ids is not None and not self._has_folder(*ids):
            for path in self._card_paths(ids):
                remove_path(path)
        remove_path((*trash, entry))

    def _read_deleted_ids(self, path: DatastorePath) -> Ids | None:
        """The ids of a run, from the record in its trash entry; None if there is none."""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, NotStorable):
            with open_path((*path, META_DIR)) as folder:
                record = json.loads(read_entry(folder, SELF_FILE))
            ids = (str(record["flow_id"]), str(record["run_number"]))
            object_folder(ids)  # which checks the names
            return ids
        return None

    def _card_paths(self, ids: Ids) -> list[DatastorePath]:
        """Where the cards of a run may be: here, and in other roots that have no such run."""
        others = [
            root
            for root in read_card_roots(self._folder)
            if self._model.files.stat_folder(root) and not os.path.lexists("/".join((root, *ids)))
        ]
        return [(root, CARDS_DIR, ids[0], "runs", ids[1]) for root in (self._folder, *others)]

    def _set_latest_run(self, flow: str) -> None:
        """Make `latest_run` name the newest run of a flow if it names one that does not exist.

        It is overwritten, as by Metaflow, which works on a full disk and does not change its owner.
        """
        with contextlib.suppress(FileNotFoundError), open_path((self._folder, flow)) as folder:
            if self._has_folder(flow, os.fsdecode(read_entry(folder, LATEST_RUN_FILE)).strip()):
                return
            newest = next(self._store.runs((flow,)), None)
            if newest is None:
                remove_entry(folder, LATEST_RUN_FILE)
                return
            content = str(newest["run_number"]).encode()
            descriptor = open_entry(LATEST_RUN_FILE, os.O_WRONLY | FILE_FLAGS, folder)
            with open(descriptor, "wb", buffering=0) as file:
                file.write(content)
                file.truncate(len(content))

    def _has_folder(self, *names: str) -> bool:
        """Whether the .metaflow has a folder of these names, which may not be valid names."""
        with contextlib.suppress(NotStorable):
            return os.path.lexists(self._folder + object_folder(names))
        return False

    def remove_garbage(self, garbage: Garbage) -> Iterator[Usage]:
        """Remove blobs, and yield what each has taken.

        Stops when a run has been added to the flow, or removed from it, since they were found.
        """
        for path, blobs in garbage.folders.items():
            with contextlib.suppress(FileNotFoundError), open_path(path) as folder:
                for number, (name, usage) in enumerate(blobs.items()):
                    is_due = number % BLOBS_AT_A_TIME == 0
                    if is_due and folder_state(self._folder, garbage.flow) != garbage.state:
                        return
                    remove_entry(folder, name)
                    remove_entry(folder, name + BLOB_META_END)
                    yield usage

    # -- measuring ---------------------------------------------------------------------------------

    def measure_all(self) -> Usage:
        """The usage of the whole .metaflow."""
        return measure_path(os.path.split(self._folder))

    def measure_run(self, ids: Ids) -> Usage:
        """The usage of a run with its cards, but without blobs."""
        return total_usage(map(measure_path, ((self._folder, *ids), *self._card_paths(ids))))

    def measure_flows(self, flows: Iterable[str]) -> Iterator[FlowUsage]:
        """The usage of flows, with all their runs, cards and blobs."""
        garbage = {found.flow: found.usage() for found in self.find_garbage(keeps_recent=False)}
        for flow in flows:
            runs = sum(1 for _ in self._store.runs((flow,)))
            paths = [(self._folder, *above, flow) for above in ((), (CARDS_DIR,), (DATA_DIR,))]
            held = total_usage(map(measure_path, paths))
            yield FlowUsage(flow, runs, held, garbage.get(flow, Usage()))

    def measure_runs(self, flow: str) -> Iterator[RunUsage]:
        """The usage of the runs of a flow, newest first. Unreadable."""
        data = FlowData(self._folder, flow)
        usages = [
            (name, usage)
            for path, digests in data.folders.items()
            for name, usage in measure_blobs(path, digests, math.inf).items()
        ]
        references = self._references(data)
        counts: dict[str, int] = {}
        for digests in references.values():
            for name in digests:
                counts[name] = counts.get(name, 0) + 1
        for run in self._store.runs((flow,)):
            ids = (flow, str(run["run_number"]))
            referred = references.get(ids[1], set())
            only = {name for name in referred if counts[name] == 1}
            own = self.measure_run(ids)
            data_held = total_usage(usage for name, usage in usages if name in referred)
            alone = total_usage(usage for name, usage in usages if name in only)
            yield RunUsage(ids, own, data_held, own.plus(alone))

    def _references(self, data: FlowData) -> dict[str, set[str]]:
        """The digests to which each run of a flow refers, directly or through blobs. Unreadable."""
        direct = set[str]().union(*data.runs.values())
        targets = {path: digests - direct for path, digests in data.folders.items()}
        if not any(targets.values()):
            return data.runs
        wanted = set[str]().union(*targets.values())
        referring = [blob for blob in data.large_blobs() if blob.digest in direct]
        edges = {blob.digest: found for blob, found in follow_references(referring, targets)}
        references = {}
        for run, digests in data.runs.items():
            reached = digests | data.digests_in_records([run], wanted)
            unread = list(reached)
            while unread:
                further = edges.get(unread.pop(), set()) - reached
                reached |= further
                unread += further
            references[run] = reached
        return references


# ==================================================================================================
# API: the route table: a method and a path, and a small handler over the store
# ==================================================================================================
#
# This layer knows nothing of sockets and processes. A Router is a table from method and path to a
# handler; a handler is declared by `route(method, template)` right above it, takes the model, the
# Request and the segments in the template's braces, and returns a Response. It may raise HttpError,
# BadQuery, StoreError and OSError, which `MetadataService.answer` turns into a status; a handler
# only catches one that has another status there. The body of an error is always
# `{"message": sentence}`.
#
# The answers are those of Metaflow's own service wherever that is sane, oddities included; where
# one is an oddity, a comment says so. Lists go through `paginate`, whatever they are of.


class HttpError(Exception):
    """A request that is refused: the status, one sentence, and further headers."""

    def __init__(self, status: int, sentence: str, headers: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(sentence)
        self.status = status
        self.headers = tuple(headers)


JSON_ESCAPE = rb"(?s)\\(?:u0000|.)"


def has_nul(body: bytes) -> bool:
    """Whether the JSON in a body contains a NUL character.

    It looks at one escape after the other, and so lets other threads run in between.
    """
    nul = b"\\u0000"
    return nul in body and any(escape[0] == nul for escape in re.finditer(JSON_ESCAPE, body))


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


STRICT_JSON = json.JSONDecoder(parse_constant=_no_constant)
"""Takes no NaN and no Infinity. json.loads would make such a decoder at each call, in 6 us."""

MOST_VALUES = 300_000
"""How many values the JSON of a request may have. So many take 50 ms to parse, in which no other
thread runs. An artifact has 20 of them, so this is five attempts of 3,000 artifacts each."""

JSON_MARK = rb'(?s)["\\\[{,](?:(?<=\\).)?'
"""An escape, the beginning or end of a string, or what precedes a value: one byte or two. A pattern
that matched whole strings would take quadratic time over strings without an end."""


def count_values(body: bytes) -> int:
    """How many values the JSON in a body has: an estimate, or more than MOST_VALUES if it has more.

    A body with few brackets and commas is not looked at any closer. In others, those in strings do
    not count; they are found one after the other, which lets other threads run in between.
    """
    rough = body.count(b",") + body.count(b"[") + body.count(b"{")
    if rough <= MOST_VALUES:
        return rough
    values, is_text = 0, False
    for mark in re.finditer(JSON_MARK, body):
        if mark[0] == b'"':
            is_text = not is_text
        elif not is_text and len(mark[0]) == 1:
            values += 1
            if values > MOST_VALUES:
                break
    return values


class Request(NamedTuple):
    """A request as a handler sees it."""

    method: str
    path: Sequence[str]  # the decoded segments
    query: Query
    body: bytes | None  # None if the client announced none
    headers: Mapping[str, str] = MappingProxyType({})  # by lower-case name
    port: int = 0  # of the service; the names of its cookies contain it

    def json(self) -> object:
        """The JSON in the body, whatever the Content-Type says."""
        if self.body is None:
            raise HttpError(
                411, "The request needs a body, and a Content-Length that announces it."
            )
        if count_values(self.body) > MOST_VALUES:
            raise HttpError(413, f"The body has more than {MOST_VALUES} values.")
        try:
            value = STRICT_JSON.decode(self.body.decode())
        except (ValueError, RecursionError) as error:
            raise HttpError(400, f"The body is not JSON: {error}.") from None
        if has_nul(self.body):
            raise HttpError(400, "The body has a NUL character in it.")
        return value

    def json_object(self) -> Mapping[str, object]:
        value = self.json()
        if not isinstance(value, dict):
            raise HttpError(400, "The body is not a JSON object.")
        return value

    def json_objects(self) -> Sequence[Mapping[str, object]]:
        value = self.json()
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise HttpError(400, "The body is not a JSON list of objects.")
        return value


class Response(NamedTuple):
    """An answer, as the server sends it."""

    content: bytes
    status: int = 200
    kind: str = "application/json"
    headers: Sequence[tuple[str, str]] = ()


class Duplex(Protocol):
    """A connection that has switched from HTTP to another protocol."""

    def receive(self, seconds: float) -> bytes | None:
        """The bytes that arrive in time: None if none do, b"" at the end of the stream."""

    def send(self, data: bytes, seconds: float) -> None:
        """Send all of the data. OSError if the peer takes none of it for so long."""


class Upgrade(NamedTuple):
    """An answer after which the connection speaks another protocol."""

    headers: Sequence[tuple[str, str]]
    run: Callable[[Duplex], None]  # speaks it, and returns when the connection is to be closed


def json_response(
    value: object, status: int = 200, headers: Sequence[tuple[str, str]] = ()
) -> Response:
    return Response(json.dumps(value).encode(), status, headers=headers)


def list_response(
    records: Iterable[Mapping[str, Any]], headers: Sequence[tuple[str, str]] = ()
) -> Response:
    return Response(serialize(records), headers=headers)


def text_response(text: str) -> Response:
    return Response(text.encode(), kind="text/plain; charset=utf-8")


def error_response(error: HttpError) -> Response:
    return json_response({"message": str(error)}, error.status, error.headers)


Handler = Callable[..., Any]
"""A function that answers the requests of a route."""


class Route(NamedTuple):
    """A path template with the handlers of its methods."""

    fixed_at: Callable[[Sequence[str]], object]  # picks the segments without braces from a path
    fixed: object  # what these have to be
    variables: Sequence[int]  # the places of the segments in braces
    methods: dict[str, Handler]


class Router:
    """A table of routes, keyed by the number of segments in their paths."""

    def __init__(self) -> None:
        self._routes: dict[int, dict[str, Route]] = {}  # by template

    def route(self, method: str, template: str) -> Callable[[Handler], Handler]:
        """A decorator that declares a handler. Segments in braces become its arguments, in order.

        If two templates match a path, the one that was declared first counts.
        """

        def declare(handler: Handler) -> Handler:
            path = template.split("/")[1:]
            fixed_at = operator.itemgetter(*(i for i, s in enumerate(path) if s[:1] != "{"))
            variables = [i for i, s in enumerate(path) if s[:1] == "{"]
            route = Route(fixed_at, fixed_at(path), variables, {})
            routes = self._routes.setdefault(len(path), {})
            routes.setdefault(template, route).methods[method] = handler
            return handler

        return declare

    def handler(self, method: str, path: Sequence[str]) -> tuple[Handler, list[str]]:
        """The handler of a request and its arguments; HttpError 404 or 405 if there is none."""
        for route in self._routes.get(len(path), {}).values():
            if route.fixed_at(path) == route.fixed and all(path):
                handler = route.methods.get("GET" if method == "HEAD" else method)
                if handler is None:
                    raise self._not_allowed(method, route)
                return handler, [path[i] for i in route.variables]
        raise HttpError(404, "There is nothing at this path.")

    def _not_allowed(self, method: str, route: Route) -> HttpError:
        allowed = ", ".join(sorted(route.methods) + ["HEAD"] * ("GET" in route.methods))
        sentence = f"The method {method} is not allowed for this path; allowed: {allowed}."
        return HttpError(405, sentence, [("Allow", allowed)])


# -- parsing of requests ---------------------------------------------------------------------------


def optional_text(item: Mapping[str, object], key: str, default: str | None) -> str | None:
    value = item.get(key, default)
    if value is not None and not isinstance(value, str):
        raise HttpError(400, f"{key} must be a string.")
    return value


def required_text(item: Mapping[str, object], key: str, default: str) -> str:
    value = optional_text(item, key, default)
    if value is None:
        raise HttpError(400, f"{key} must be a string.")
    return value


def parse_tags(item: Mapping[str, object], key: str) -> Tags:
    value = item.get(key)
    if value is not None and not is_text_list(value):
        raise HttpError(400, f"{key} must be a list of strings.")
    return cast(Tags, value)


def parse_labels(item: Mapping[str, object], default_user: str | None = None) -> Labels:
    return Labels(
        optional_text(item, "user_name", default_user),
        parse_tags(item, "tags"),
        parse_tags(item, "system_tags"),
    )


def parse_metadatum(item: Mapping[str, object]) -> NewMetadatum:
    value = item.get("value", " ")
    if isinstance(value, (bool, int, float)):
        value = json.dumps(value)
    if value is not None and not isinstance(value, str) and not is_text_list(value):
        raise HttpError(400, "value must be a string, a list of strings or null.")
    return NewMetadatum(
        required_text(item, "field_name", " "),
        cast(MetadatumValue, value),
        required_text(item, "type", " "),
        parse_labels(item),
    )


def parse_artifact(item: Mapping[str, object]) -> NewArtifact:
    attempt = item.get("attempt_id", 0)
    return NewArtifact(
        required_text(item, "name", " "),
        required_text(item, "location", " "),
        required_text(item, "ds_type", " "),
        optional_text(item, "sha", " "),
        optional_text(item, "type", " "),
        optional_text(item, "content_type", " "),
        attempt_number(str(attempt) if not isinstance(attempt, bool) else ""),
        parse_labels(item, " "),
    )


def attempt_number(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > LARGEST_ATTEMPT:
        raise HttpError(400, f"An attempt is a number from 0 to {LARGEST_ATTEMPT}.")
    return int(text)


def path_id(segment: str) -> str:
    """A run or task id in a path. Leading zeros of a number do not count."""
    if segment.isascii() and segment.isdigit():
        return segment.lstrip("0") or "0"
    return segment


def object_ids(*segments: str) -> Ids:
    """The ids of the object that a path names, by its segments from the flow down to the task."""
    return tuple(path_id(s) if depth in (1, 3) else s for depth, s in enumerate(segments))


# -- serializing of answers ------------------------------------------------------------------------


def json_or_404(record: Mapping[str, Any] | None, what: str) -> Response:
    if record is None:
        raise HttpError(404, f"There is no such {what}.")
    return json_response(record)


Records = Callable[[Optional[SortKey]], Iterable[Mapping[str, Any]]]


def paginate(
    model: Model, request: Request, order: Order, records: Records, filtered: bool = False
) -> Response:
    """A whole list, or a page of it if the request has `_limit`, `_cursor` or a filter.

    `records` makes the list, newest first, and begins after a sort key if it is given one.
    """

    def answer() -> Response:
        cursor = first_value(request.query, "_cursor")
        if cursor is None and first_value(request.query, "_limit") is None and not filtered:
            return list_response(records(None))  # JSON one by one: the cache may forget a record
        limit = parse_limit(request.query)
        place = decode_cursor(order, cursor) if cursor else None
        page = list(itertools.islice(records(place), limit + 1))
        headers = [("X-Limit", str(limit))]
        if len(page) > limit:
            page.pop()
            headers.append(("X-Next-Cursor", encode_cursor(order, page[-1])))
        return list_response(page, headers)

    return model.store.long_reads.read((*request.path, *request.query), answer)


# -- routes ----------------------------------------------------------------------------------------

METADATA_API = Router()
route = METADATA_API.route

FLOW = "/flows/{flow}"
RUN = FLOW + "/runs/{run}"
STEP = RUN + "/steps/{step}"
TASK = STEP + "/tasks/{task}"

HEARTBEAT_SECONDS = 10
"""How long a client should wait until its next heartbeat."""


@route("GET", "/ping")
def ping(model: Model, request: Request) -> Response:
    """Answer that the service is there. Clients read the version from a header of the answer."""
    return text_response("pong")


@route("GET", "/version")
def get_version(model: Model, request: Request) -> Response:
    """The version of the API."""
    return text_response(PROTOCOL_VERSION)


@route("GET", "/healthcheck")
def healthcheck(model: Model, request: Request) -> Response:
    """Whether records can be written."""
    try:
        model.store.check_writable()
    except OSError as error:
        raise HttpError(503, f"{model.store.folder} cannot be written: {error.strerror}.") from None
    return json_response({"status": "UP"})


@route("GET", "/flows")
def list_flows(model: Model, request: Request) -> Response:
    """All flows."""
    return paginate(model, request, FLOW_ORDER, model.store.flows)


@route("GET", FLOW)
def get_flow(model: Model, request: Request, flow: str) -> Response:
    """One flow."""
    return json_or_404(model.store.flow((flow,)), "flow")


@route("POST", FLOW)
def create_flow(model: Model, request: Request, flow: str) -> Response:
    """Make a flow."""
    return json_response(model.store.create_flow((flow,), parse_labels(request.json_object())))


@route("GET", FLOW + "/runs")
def list_runs(model: Model, request: Request, flow: str) -> Response:
    """The runs of a flow that pass the filters; with their status if a filter asks for it."""
    conditions = parse_filters(request.query, RUN_FIELDS)
    by_status = [test for name, test in conditions if name == "status"]
    by_record = [test for name, test in conditions if name != "status"]
    by_record += parse_tag_filters(request.query)

    def runs(before: SortKey | None) -> Iterable[Run]:
        found = filter_records(model.store.runs((flow,), before), by_record)
        if not by_status:
            return found
        return filter_records((with_status(model, run) for run in found), by_status)

    return paginate(model, request, RUN_ORDER, runs, filtered=bool(by_record or by_status))


def with_status(model: Model, run: Run) -> Run:
    """A run with its status, placed before the owner as the reference does."""
    judged: Run = {**run}
    owner = judged.pop("user", None)
    judged["status"] = model.runs.status(run)
    if owner is not None:
        judged["user"] = owner
    return judged


@route("GET", RUN)
def get_run(model: Model, request: Request, flow: str, run: str) -> Response:
    """One run."""
    return json_or_404(model.store.run(object_ids(flow, run)), "run")


@route("DELETE", RUN)
def delete_run(model: Model, request: Request, flow: str, run: str) -> Response:
    """Delete a run with its cards, and say what that took; the blobs go with the next `gc`."""
    for _, usage in Retention(model).delete_runs([object_ids(flow, run)]):
        return json_response({"runs": 1, **usage._asdict()})
    raise NotFound(f"There is no run {flow}/{run}.")


@route("POST", FLOW + "/run")
def create_run(model: Model, request: Request, flow: str) -> Response:
    """Make a run, with the id that the client sends or a new one."""
    body = request.json_object()
    labels = parse_labels(body)
    beats = sends_heartbeats(labels.system_tags)
    run = model.store.create_run((flow,), optional_text(body, "run_number", None), labels, beats)
    run.pop("user", None)  # as in the reference, only a GET says whether the owner is verified
    return json_response(run)


HEARTBEAT_RESPONSE = json_response(json.dumps({"wait_time_in_seconds": HEARTBEAT_SECONDS}))
"""JSON within a JSON string, as in the reference: clients decode it twice."""


@route("POST", RUN + "/heartbeat")
def run_heartbeat(model: Model, request: Request, flow: str, run: str) -> Response:
    """Record that a run is alive."""
    return record_heartbeat(model, object_ids(flow, run))


@route("PATCH", RUN + "/tag/mutate")
def mutate_tags(model: Model, request: Request, flow: str, run: str) -> Response:
    """Add tags to a run and remove others."""
    body = request.json_object()
    changes = {}
    for key in ("tags_to_add", "tags_to_remove"):
        tags = body.get(key, [])
        if not isinstance(tags, list):
            raise HttpError(400, f"{key} must be a list")
        if not all(isinstance(tag, str) for tag in tags):
            raise HttpError(400, "All tag values must be strings")
        changes[key] = tags
    tags = model.store.change_tags(
        object_ids(flow, run), add=changes["tags_to_add"], remove=changes["tags_to_remove"]
    )
    return json_response({"tags": tags})


@route("GET", RUN + "/metadata")
def list_run_metadata(model: Model, request: Request, flow: str, run: str) -> Response:
    """The metadata of all tasks of a run."""
    metadata = partial(model.store.metadata_below, object_ids(flow, run))
    return paginate(model, request, METADATA_ORDER, metadata)


@route("GET", RUN + "/artifacts")
def list_run_artifacts(model: Model, request: Request, flow: str, run: str) -> Response:
    """The artifacts of the latest attempt of each task of a run."""
    artifacts = partial(model.store.artifacts_below, object_ids(flow, run))
    return paginate(model, request, ARTIFACT_ORDER, artifacts)


@route("GET", RUN + "/steps")
def list_steps(model: Model, request: Request, flow: str, run: str) -> Response:
    """The steps of a run."""
    steps = partial(model.store.steps, object_ids(flow, run))
    return paginate(model, request, STEP_ORDER, steps)


@route("GET", STEP)
def get_step(model: Model, request: Request, flow: str, run: str, step: str) -> Response:
    """One step."""
    return json_or_404(model.store.step(object_ids(flow, run, step)), "step")


@route("POST", STEP + "/step")
def create_step(model: Model, request: Request, flow: str, run: str, step: str) -> Response:
    """Make a step."""
    labels = parse_labels(request.json_object(), default_user="")
    return json_response(model.store.create_step(object_ids(flow, run, step), labels))


@route("GET", STEP + "/artifacts")
def list_step_artifacts(model: Model, request: Request, flow: str, run: str, step: str) -> Response:
    """The artifacts of the latest attempt of each task of a step."""
    artifacts = partial(model.store.artifacts_below, object_ids(flow, run, step))
    return paginate(model, request, ARTIFACT_ORDER, artifacts)


@route("GET", STEP + "/tasks")
def list_tasks(model: Model, request: Request, flow: str, run: str, step: str) -> Response:
    """The tasks of a step that pass the filters."""
    tests = [test for _, test in parse_filters(request.query, TASK_FIELDS)]

    def tasks(before: SortKey | None) -> Iterable[Task]:
        return filter_records(model.store.tasks(object_ids(flow, run, step), before), tests)

    return paginate(model, request, TASK_ORDER, tasks, filtered=bool(tests))


@route("GET", STEP + "/filtered_tasks")
def filter_tasks(model: Model, request: Request, flow: str, run: str, step: str) -> Response:
    """The pathspecs of the tasks of a step with a metadatum of that name whose value matches."""
    field = first_value(request.query, "metadata_field_name")
    pattern = first_value(request.query, "pattern") or ""
    ids = object_ids(flow, run, step)
    values = model.store.long_reads.read(
        (*request.path, field), lambda: model.store.values_of_tasks(ids, field or None, value_text)
    )
    texts = {text for of_task in values.values() for text in of_task.texts}
    found = find_matches(pattern, texts, model.search)
    spec = "/".join(ids)
    return json_response(
        [f"{spec}/{t}" for t, v in values.items() if not found.isdisjoint(v.texts)]
    )


@route("GET", TASK)
def get_task(model: Model, request: Request, *task: str) -> Response:
    """One task."""
    return json_or_404(model.store.task(object_ids(*task)), "task")


@route("POST", STEP + "/task")
def create_task(model: Model, request: Request, flow: str, run: str, step: str) -> Response:
    """Make a task, with the id that the client sends or the next number."""
    body = request.json_object()
    labels = parse_labels(body)
    beats = sends_heartbeats(labels.system_tags)
    ids = object_ids(flow, run, step)
    task_id = optional_text(body, "task_id", None)
    return json_response(model.store.create_task(ids, task_id, labels, beats))


@route("POST", TASK + "/heartbeat")
def task_heartbeat(model: Model, request: Request, *task: str) -> Response:
    """Record that a task is alive, and so its run."""
    return record_heartbeat(model, object_ids(*task))


def record_heartbeat(model: Model, ids: Ids) -> Response:
    if not model.store.heartbeat(ids):
        raise HttpError(404, "There is no such run or task.")
    return HEARTBEAT_RESPONSE


@route("GET", TASK + "/metadata")
def list_metadata(model: Model, request: Request, *task: str) -> Response:
    """The metadata of all attempts of a task."""
    metadata = partial(model.store.metadata, object_ids(*task))
    return paginate(model, request, METADATA_ORDER, metadata)


@route("POST", TASK + "/metadata")
def create_metadata(model: Model, request: Request, *task: str) -> Response:
    """Add metadata to a task, or none if one fails."""
    rows = [parse_metadatum(item) for item in request.json_objects()]
    return json_response(
        {"metadata_created": create_rows(model.store.create_metadata, object_ids(*task), rows)}
    )


@route("GET", TASK + "/artifacts")
def list_artifacts(model: Model, request: Request, *task: str) -> Response:
    """The artifacts of the latest attempt of a task."""
    artifacts = partial(model.store.artifacts_below, object_ids(*task))
    return paginate(model, request, ARTIFACT_ORDER, artifacts)


@route("POST", TASK + "/artifact")
def create_artifacts(model: Model, request: Request, *task: str) -> Response:
    """Add artifacts to a task, or none if one fails. Those that it has already stay as they are."""
    rows = [parse_artifact(item) for item in request.json_objects()]
    return json_response(
        {"artifacts_created": create_rows(model.store.create_artifacts, object_ids(*task), rows)}
    )


def create_rows(add: Callable[[Ids, Any], int], ids: Ids, rows: Sequence[object]) -> int:
    """Add rows to a task. If there is no such task, the answer is 400, as in the reference."""
    try:
        return add(ids, rows)
    except NotFound:
        raise HttpError(400, "need to register run_id and task_id first") from None


@route("GET", TASK + "/artifacts/{name}")
def get_artifact(
    model: Model, request: Request, flow: str, run: str, step: str, task: str, name: str
) -> Response:
    """One artifact of the latest attempt of a task."""
    return json_or_404(model.store.artifact(object_ids(flow, run, step, task), name), "artifact")


@route("GET", TASK + "/artifacts/{name}/attempt/{attempt}")
def get_artifact_of_attempt(
    model: Model, request: Request, flow: str, run: str, step: str, task: str, name: str, n: str
) -> Response:
    """One artifact of an attempt of a task."""
    ids = object_ids(flow, run, step, task)
    return json_or_404(model.store.artifact(ids, name, parse_attempt_segment(n)), "artifact")


@route("GET", TASK + "/attempt/{attempt}/artifacts")
def list_artifacts_of_attempt(
    model: Model, request: Request, flow: str, run: str, step: str, task: str, n: str
) -> Response:
    """The artifacts of an attempt of a task."""
    artifacts = model.store.artifacts(object_ids(flow, run, step, task), parse_attempt_segment(n))

    def older(before: SortKey | None) -> Iterable[Artifact]:
        return (a for a in artifacts if before is None or artifact_sort_key(a) < before)

    return paginate(model, request, ARTIFACT_ORDER, older)


def parse_attempt_segment(segment: str) -> int:
    """An attempt in a path. One that is too large to exist is simply not found."""
    if not re.fullmatch("[0-9]{1,100}", segment):
        raise HttpError(400, "An attempt is a number.")
    return int(segment)


# -- dispatch --------------------------------------------------------------------------------------

STATUS_OF_STORE_ERRORS: Mapping[type, int] = {
    NotFound: 404,
    AlreadyExists: 409,
    NotDeletable: 409,
    NotStorable: 400,
    SystemTagRemoval: 422,
}
STATUS_OF_OS_ERRORS: Mapping[int | None, int] = {
    errno.ENOSPC: 507,
    errno.EDQUOT: 507,
    errno.EMFILE: 503,  # Metaflow's client tries again after a 503, and after nothing else
    errno.ENFILE: 503,
    errno.ENOENT: 503,  # a folder that was there a moment ago, or the whole root, is gone
    errno.ENOTDIR: 503,
    errno.ESTALE: 503,
}


class MetadataService:
    """Answers the requests of the metadata API from a store."""

    def __init__(self, store: Store, search: Search = search_in_place) -> None:
        self._model = Model(store, search=search)

    def is_public(self, method: str, path: Sequence[str]) -> bool:
        """Whether a request is answered without the key, if there is one."""
        return False

    def dispatch(self, request: Request) -> Response | Upgrade:
        """Let the handler of a request answer it; it may raise what this layer's head names."""
        handler, arguments = METADATA_API.handler(request.method, request.path)
        response: Response = handler(self._model, request, *arguments)
        return response

    def answer(self, request: Request) -> Response | Upgrade:
        """Answer a request, whatever it is; never raises what a client could cause."""
        try:
            return self.dispatch(request)
        except HttpError as error:
            return error_response(error)
        except BadQuery as error:
            return error_response(HttpError(400, str(error)))
        except StoreError as error:
            return error_response(HttpError(STATUS_OF_STORE_ERRORS[type(error)], str(error)))
        except OSError as error:
            logger().warning("%s /%s: %s", request.method, "/".join(request.path), error)
            status = STATUS_OF_OS_ERRORS.get(error.errno, 500)
            return error_response(
                HttpError(status, f"The records cannot be reached: {error.strerror}.")
            )
        except Exception:
            logger().exception("%s /%s", request.method, "/".join(request.path))
            return error_response(HttpError(500, "The service failed; its log says where."))


class BrokenService:
    """Answers every request with the reason why there is no service, so that the flow shows it."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def is_public(self, method: str, path: Sequence[str]) -> bool:
        return False

    def answer(self, request: Request) -> Response:
        return error_response(HttpError(500, self._reason))


# ==================================================================================================
# Access: who may ask: the key and the login, web pages, whose connection it is
# ==================================================================================================
#
# This layer only judges. Server puts its questions to every request, and refuses what fails before
# anything is read or written; which question comes when is said there. The UI API offers the login.
#
# Against whom. Another machine reaches only a service that has a key. Another user of this machine
# reaches the port as well: without a key the kernel is asked whose the other end of a connection
# is, where it can tell. A web page that the user visits could have the browser send requests here:
# these are known by their Host, Origin and Sec-Fetch-Site. Who has the key sends it as x-api-key;
# a browser cannot, and gets a cookie for it at the login. Keys cannot be guessed fast.

# -- the key, and the login ------------------------------------------------------------------------

SHORTEST_KEY = 16
"""How many characters a user's own key must have."""

GUESSES_A_SECOND = 5
"""How many wrong keys are answered, from all clients together. Clients that have the key never
wait: except at the login, only wrong keys count."""


class GuessLimit:
    """A token bucket: it allows so many guesses a second, and as many at once."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._tokens = rate
        self._filled_at = clock()
        self._lock = threading.Lock()  # guards both

    def allow(self) -> bool:
        """Whether one more guess is allowed now; if so, it counts."""
        with self._lock:
            now = self._clock()
            self._tokens = min(self._rate, self._tokens + (now - self._filled_at) * self._rate)
            self._filled_at = now
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True


class Credentials:
    """The key of a service, and the cookie that a browser gets for it.

    The value of the cookie is random, and its name contains the port: browsers send cookies to all
    ports of a host, and other services there must not learn the key.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._session = os.urandom(32).hex()
        self._guesses = GuessLimit(GUESSES_A_SECOND)

    def check(self, headers: Mapping[str, str], port: int) -> None:
        """Refuse, with HttpError, a request with neither the key nor the service's cookie."""
        if self.accepts(headers, port):
            return
        if "x-api-key" in headers and not self._guesses.allow():
            raise self._too_many_guesses()
        raise HttpError(401, "The request needs the service's key as its x-api-key header.")

    def accepts(self, headers: Mapping[str, str], port: int) -> bool:
        """Whether a request has the key in its header, or if it has no such header, the cookie."""
        given = headers.get("x-api-key")
        if given is not None:
            return is_same_secret(given, self.key)
        cookies = (part.strip().partition("=") for part in headers.get("cookie", "").split(";"))
        name = self._cookie_name(port)
        return any(n == name and is_same_secret(value, self._session) for n, _, value in cookies)

    def log_in(self, given: object, port: int) -> str:
        """A Set-Cookie header in exchange for the key; HttpError if it is not the key."""
        if not self._guesses.allow():
            raise self._too_many_guesses()
        if not isinstance(given, str) or not is_same_secret(given, self.key):
            raise HttpError(401, "This is not the key of the service.")
        return f"{self._cookie_name(port)}={self._session}; Path=/; HttpOnly; SameSite=Strict"

    def _cookie_name(self, port: int) -> str:
        return f"{PROGRAM}-{port}"

    def _too_many_guesses(self) -> HttpError:
        sentence = "Too many wrong keys were tried just now; try again in a second."
        return HttpError(429, sentence, [("Retry-After", "1")])


def is_same_secret(given: str, secret: str) -> bool:
    """Compare secrets, in a time that does not depend on where they differ."""
    import hmac

    return hmac.compare_digest(given.encode("utf-8", "replace"), secret.encode())


# -- requests of web pages ------------------------------------------------------------------------


class Access(NamedTuple):
    """Who may talk to the service."""

    host: str  # where it listens
    credentials: Credentials | None  # the key that every request must bring, if there is one

    def check(self, fields: Mapping[str, str]) -> None:
        """Refuse, with HttpError 403, a request that a foreign web page may have sent.

        A page that rebinds its own name to this machine's address (DNS rebinding) still sends that
        name as the Host. With a key any Host is accepted, since no foreign page has the key.
        """
        host, origin = fields.get("host"), fields.get("origin")
        if self.credentials is None and host is not None and not is_loopback_host(host):
            raise HttpError(403, "The Host header names another host.")
        if origin is None:
            # Browsers send no Origin with most GETs, but Sec-Fetch-Site says who made the request.
            is_foreign_page = fields.get("sec-fetch-site", "none") not in ("none", "same-origin")
        else:
            is_foreign_page = origin not in (f"http://{host}", f"https://{host}")
        if is_foreign_page:
            raise HttpError(403, "Requests from pages of another origin are not answered.")


HOST_HEADER = r"(?:\[([0-9a-f:.]+)\]|([0-9a-z.-]+))(?::([1-9][0-9]{0,4}))?"


@lru_cache(maxsize=64)  # all requests of a client have the same, which takes 4 us to parse
def is_loopback_host(header: str) -> bool:
    """Whether a Host header (RFC 9110, 7.2) is well-formed and names the loopback interface."""
    match = re.fullmatch(HOST_HEADER, header.lower())
    if match is None or int(match.group(3) or 0) > 65535:
        return False
    address, name = match.group(1, 2)
    return is_loopback(name) if address is None else address == "::1"


def is_address(host: str) -> bool:
    """Whether a host is an IP address and not a name."""
    import ipaddress

    try:
        ipaddress.ip_address(host)
        return True
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Whether a host is on the loopback interface."""
    return host in ("localhost", "::1") or (host.startswith("127.") and is_address(host))


# -- whose connection it is ------------------------------------------------------------------------

STRANGERS_ARE_REFUSED = (
    "This service is for the user who runs it; others of this machine need its key "
    "(it has one if it is started with --generate-key)."
)

INET_DIAG_REQUEST = struct.Struct("=IHHII BBBBI 2s2s16s16sI8s")
"""A netlink message header followed by an inet_diag_req_v2 (linux/inet_diag.h)."""

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
INET_DIAG_OWNER = struct.Struct("=II")  # uid and inode, at the end of an inet_diag_msg
INET_DIAG_OWNER_AT = 16 + 4 + 48 + 12
INET_DIAG_STATE_AT = 16 + 1
ANY_COOKIE = b"\xff" * 8
NO_INODE = 0
"""The inode of a socket that no process holds any more. The kernel then says that its uid is 0."""

CONNECTED_STATES = frozenset((1, 4, 5, 8, 9, 11))
"""The TCP states, as Linux numbers them, in which both ends know the connection, even if one has
closed its half. The states of a handshake and of a listening socket are not among them."""

OUT_OF_FILES = frozenset((errno.EMFILE, errno.ENFILE))


class SocketOwner(NamedTuple):
    """What the kernel says about a socket."""

    uid: int
    inode: int
    state: int


Endpoint = tuple[str, int]


def tells_owners(listener: socket.socket) -> bool:
    """Whether this kernel says who owns a socket, tried on a listening socket of our own.

    macOS and some sandboxes do not. It is found out once, and not per connection: a client could
    close its end at the moment of the question, to look as if the kernel could not tell.
    """
    if not sys.platform.startswith("linux"):
        return False
    ours = plain_endpoint(listener.getsockname())
    owner = find_socket_owner(ours, ("::" if ":" in ours[0] else "0.0.0.0", 0))
    return owner is not None and owner.inode == os.fstat(listener.fileno()).st_ino


def is_foreign(connection: socket.socket) -> bool:
    """Whether the kernel does not confirm that the peer is a process of our own user, or of root.

    OSError if the connection has ended, since another process may have its port by then.
    """
    ours = plain_endpoint(connection.getsockname())
    owner = find_socket_owner(plain_endpoint(connection.getpeername()), ours)
    connection.getpeername()  # fails if the connection has ended in the meantime
    if owner is None or owner.inode == NO_INODE or owner.state not in CONNECTED_STATES:
        return True
    return owner.uid not in (0, os.geteuid())


def plain_endpoint(address: Sequence[Any]) -> Endpoint:
    """The host and port of a socket's address, with an IPv4-mapped IPv6 address as plain IPv4."""
    host, port = address[:2]
    return (host[len("::ffff:") :] if host.startswith("::ffff:") and "." in host else host), port


def find_socket_owner(local: Endpoint, remote: Endpoint) -> SocketOwner | None:
    """Who owns the TCP socket with these two endpoints; None if the kernel does not know.

    Asking by netlink takes 0.03 to 0.09 ms, reading /proc 1.5 to 7 ms.
    """
    try:
        owner = ask_kernel_for_owner(local, remote)
    except OSError as error:
        if error.errno in OUT_OF_FILES:
            raise  # this says nothing about what the kernel knows
        owner = None
    return owner or read_owner_from_proc(local, remote)


def ask_kernel_for_owner(local: Endpoint, remote: Endpoint) -> SocketOwner | None:
    """The owner of a socket by NETLINK_SOCK_DIAG (sock_diag(7)); OSError if that does not exist."""
    family = socket.AF_INET6 if ":" in local[0] else socket.AF_INET
    hosts = (socket.inet_pton(family, host).ljust(16, b"\0") for host, _ in (local, remote))
    ports = (port.to_bytes(2, "big") for _, port in (local, remote))
    every_state = 0xFFFFFFFF
    request = INET_DIAG_REQUEST.pack(
        *(INET_DIAG_REQUEST.size, SOCK_DIAG_BY_FAMILY, 1, 0, 0),
        *(family, socket.IPPROTO_TCP, 0, 0, every_state),
        *(*ports, *hosts, 0, ANY_COOKIE),
    )
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(1)
        netlink.sendto(request, (0, 0))
        response = netlink.recv(8192)
    kind = int.from_bytes(response[4:6], sys.byteorder)
    if kind != SOCK_DIAG_BY_FAMILY or len(response) < INET_DIAG_OWNER_AT + INET_DIAG_OWNER.size:
        return None
    uid, inode = INET_DIAG_OWNER.unpack_from(response, INET_DIAG_OWNER_AT)
    return SocketOwner(uid, inode, response[INET_DIAG_STATE_AT])


def read_owner_from_proc(local: Endpoint, remote: Endpoint) -> SocketOwner | None:
    """The owner of a socket by /proc/net/tcp and tcp6 (proc(5))."""
    wanted = {
        (proc_endpoint(local, is_mapped), proc_endpoint(remote, is_mapped))
        for is_mapped in (False, True)
    }
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError), open(f"/proc/net/{name}", encoding="ascii") as f:
            for line in f:
                fields = line.split()
                if (fields[1], fields[2]) in wanted:
                    return SocketOwner(int(fields[7]), int(fields[9]), int(fields[3], 16))
    return None


def proc_endpoint(endpoint: Endpoint, is_mapped: bool) -> str:
    """An endpoint as /proc/net/tcp writes it: words of four bytes, in the machine's byte order."""
    host, port = endpoint
    if ":" in host:
        packed = socket.inet_pton(socket.AF_INET6, host)
    else:
        packed = b"\0" * 10 + b"\xff" * 2 if is_mapped else b""
        packed += socket.inet_pton(socket.AF_INET, host)
    words = (packed[i : i + 4] for i in range(0, len(packed), 4))
    address = "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)
    return f"{address}:{port:04X}"


# ==================================================================================================
# Page: the page of our own, one document that needs nothing but the UI API
# ==================================================================================================
#
# Rules of this layer:
#
# - The document is complete: styles, scripts and icons are in it, and its Content-Security-Policy
#   (see UI API) lets it load nothing else. It only talks to the service that it came from.
# - Whatever flows have recorded is text. Elements are only made by h() and draw(), which turn
#   strings into text nodes; no markup is ever parsed.
# - The address says all about what is shown: #/FLOW/RUN/STEP/TASK/ATTEMPT, or the filter, order and
#   columns of the list. A reload and a link show the same.
#
# How it works. When the address changes, route() replaces the view. A view is an AbortController:
# its requests and subscriptions end when it is aborted. It fetches what it shows, then subscribes
# to it, and keeps the rows that come over the page's only socket. After a frame, but at most five
# times a second, draw() makes new elements and patches what differs into those that are shown, so
# that focus, selection and scroll position stay. Logs and cards are not subscribed to: they are
# fetched again and again while the task may still write something.

PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Metaflow runs</title>
<link id="icon" rel="icon" href="data:,">
<style>
/* Colours and measures. The class of a status sets --c to its colour. */
:root {
  color-scheme: light dark;
  --bg: #f6f6f4;
  --card: #ffffff;
  --raised: #fbfbfa;
  --hover: #f1f3f9;
  --ink: #191b20;
  --dim: #5d646f;
  --line: #e5e5e0;
  --strong-line: #8b9099;
  --accent: #3651c5;
  --completed: #24935a;
  --failed: #d13438;
  --running: #2f6fe4;
  --idle: #868d97;
  --mark: #ffe58a;
  --shadow: 0 1px 2px rgb(0 0 0 / 4%), 0 8px 28px rgb(0 0 0 / 10%);
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  --edge: 1px solid var(--line);
  --side: 28px;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #121417;
    --card: #191c20;
    --raised: #1e2126;
    --hover: #22272f;
    --ink: #e7e9ec;
    --dim: #a0a7b1;
    --line: #2b2f36;
    --strong-line: #6c737e;
    --accent: #93abff;
    --completed: #4cc38a;
    --failed: #ff6b6f;
    --running: #6aa2ff;
    --idle: #8a919c;
    --mark: #6b5310;
    --shadow: 0 1px 2px rgb(0 0 0 / 30%), 0 8px 28px rgb(0 0 0 / 45%);
  }
}
.s-completed, [data-state="live"] { --c: var(--completed); }
.s-failed, [data-state="reconnecting"] { --c: var(--failed); }
.s-running { --c: var(--running); }
.s-pending, .s-unknown { --c: var(--idle); }

/* Elements. */
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body {
  margin: 0;
  background: var(--bg);
  color: var(--ink);
  font: 14px/1.5 var(--sans);
}
a { color: inherit; text-decoration: none; }
a:hover { text-decoration: underline; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 5px; }
main:focus { outline: none; }
main[aria-busy] { opacity: 0.5; transition: opacity 0.2s 0.3s; } /* The view before. */
::placeholder { color: var(--dim); opacity: 1; }
h1, h2, h3 { margin: 0; font-size: 13px; font-weight: 600; }
h1 { font-size: 20px; line-height: 1.3; letter-spacing: -0.01em; overflow-wrap: anywhere; }
p { margin: 0; }
input, button, select {
  font: inherit;
  color: inherit;
  background: var(--card);
  border: var(--edge);
  border-radius: 7px;
  padding: 4px 10px;
}
button, select, summary, [type="checkbox"] { cursor: pointer; }
button:hover, select:hover { background: var(--hover); }
[type="checkbox"] { accent-color: var(--accent); width: 15px; height: 15px; margin: 0; }
code, pre { font: 12.5px/1.55 var(--mono); margin: 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
table { width: 100%; border-collapse: collapse; }
th, td { padding: 8px 12px; text-align: left; vertical-align: top; border-bottom: var(--edge); }
th { font-size: 12px; font-weight: 500; color: var(--dim); }
th:first-child, td:first-child { padding-left: 18px; }
th:last-child, td:last-child { padding-right: 18px; }
tbody tr:last-child > * { border-bottom: 0; }
.dim { color: var(--dim); font-size: 12px; font-weight: 400; unicode-bidi: isolate; }
.number { white-space: nowrap; font-variant-numeric: tabular-nums; }
.hidden-text {
  position: absolute;
  width: 1px;
  height: 1px;
  overflow: hidden;
  clip-path: inset(50%);
}
.note { padding: 14px 18px; color: var(--dim); }
.link { color: var(--accent); }
.bare { border: 0; background: none; padding: 0 4px; color: var(--dim); font-size: 12px; }
.bare:hover { color: var(--accent); background: none; text-decoration: underline; }
.primary { background: var(--accent); border-color: var(--accent); color: var(--card); }
.primary:hover { background: color-mix(in srgb, var(--accent) 85%, var(--ink)); }
.danger { color: var(--failed); }

/* The header: breadcrumbs, the filter, other projects, whether the page is live. */
header {
  position: sticky;
  top: 0;
  z-index: 5;
  display: flex;
  align-items: center;
  gap: 10px 16px;
  padding: 9px var(--side);
  background: var(--card);
  border-bottom: var(--edge);
}
main { padding: 22px var(--side) 72px; }
#crumbs { flex: 1; display: flex; gap: 8px; min-width: 0; white-space: nowrap; }
#crumbs a { overflow: hidden; text-overflow: ellipsis; }
#crumbs a:first-child { flex: none; font-weight: 650; }
#crumbs a:nth-child(n + 4) { flex: none; max-width: 16ch; } /* A step and a task are short. */
#crumbs a + a::before { content: "/" / ""; color: var(--dim); margin-right: 8px; }
#live { color: var(--dim); font-size: 12px; white-space: nowrap; }
#live::before {
  content: "";
  display: inline-block;
  width: 8px;
  height: 8px;
  margin-right: 7px;
  border-radius: 50%;
  background: var(--c, var(--idle));
}
.search { position: relative; flex: 0 1 min(440px, 32vw); }
#filter { width: 100%; background: var(--bg); padding: 6px 12px; }
#suggestions {
  position: absolute;
  inset: calc(100% + 5px) 0 auto;
  max-height: 330px;
  overflow: auto;
  margin: 0;
  padding: 5px;
  list-style: none;
  background: var(--card);
  border: var(--edge);
  border-radius: 9px;
  box-shadow: var(--shadow);
}
#suggestions li {
  display: flex;
  justify-content: space-between;
  gap: 14px;
  padding: 4px 10px;
  border-radius: 6px;
  cursor: pointer;
  overflow-wrap: anywhere;
}
#suggestions li > :first-child { flex-shrink: 0; max-width: 100%; }
#suggestions [aria-selected="true"], #suggestions li:hover { background: var(--hover); }
.menu { position: relative; }
.menu > summary {
  list-style: none;
  padding: 4px 10px;
  border: var(--edge);
  border-radius: 7px;
  white-space: nowrap;
}
.menu > summary::-webkit-details-marker { display: none; }
.menu > summary:hover { background: var(--hover); }
.menu > summary::after { content: " \25be" / ""; color: var(--dim); }
.menu > div {
  position: absolute;
  right: 0;
  top: calc(100% + 5px);
  z-index: 6;
  min-width: 240px;
  max-width: min(460px, 92vw);
  padding: 5px;
  background: var(--card);
  border: var(--edge);
  border-radius: 9px;
  box-shadow: var(--shadow);
}
.menu > div > * {
  display: block;
  width: 100%;
  padding: 6px 10px;
  border: 0;
  border-radius: 6px;
  background: none;
  text-align: left;
}
.menu > div > :is(a, button, label):hover { background: var(--hover); text-decoration: none; }
.menu label [type="checkbox"] { margin-right: 9px; vertical-align: -2px; }

/* Statuses, tags, panels, facts. */
.badge {
  display: inline-block;
  white-space: nowrap;
  font-weight: 550;
  font-size: 12.5px;
  padding: 0 9px;
  border-radius: 99px;
  color: color-mix(in srgb, var(--c, var(--idle)) 62%, var(--ink));
  background: color-mix(in srgb, var(--c, var(--idle)) 13%, var(--card));
}
.badge::before {
  content: "";
  display: inline-block;
  width: 7px;
  height: 7px;
  margin-right: 6px;
  border-radius: 50%;
  background: var(--c, var(--idle));
}
.s-running.badge::before { animation: pulse 1.6s ease-in-out infinite; }
@keyframes pulse { 50% { opacity: 0.25; } }
.tags { display: flex; flex-wrap: wrap; gap: 4px; align-items: center; }
.tag {
  display: inline-flex;
  position: relative;
  z-index: 1;
  border: var(--edge);
  border-radius: 6px;
  background: var(--raised);
  color: var(--dim);
  font-size: 12px;
}
.tag > button { border: 0; background: none; padding: 0 7px; font-size: 12px; color: inherit; }
.tag > button:first-child {
  max-width: 220px;
  overflow: hidden;
  text-overflow: ellipsis;
  white-space: nowrap;
}
.tag > button:hover { color: var(--accent); }
.tag > button + button { padding-left: 0; }
.panel {
  margin: 0 0 18px;
  background: var(--card);
  border: var(--edge);
  border-radius: 11px;
  overflow: clip;
}
.title {
  display: flex;
  flex-wrap: wrap;
  align-items: center;
  gap: 6px 14px;
  min-height: 43px;
  padding: 6px 18px;
}
.title > h2, .title > h3 { margin-right: auto; }
.title input:not([type="checkbox"]), .title select { padding: 2px 9px; font-size: 13px; }
.title label { font-size: 13px; display: flex; align-items: center; gap: 6px; }
.panel > .title + * { border-top: var(--edge); }
details.panel > summary {
  padding: 10px 18px;
  font-size: 13px;
  font-weight: 600;
  list-style-position: inside;
}
details.panel > summary:hover { background: var(--hover); }
details.panel[open] > summary { border-bottom: var(--edge); }
summary h2 { display: inline; }
.facts { display: flex; flex-wrap: wrap; gap: 10px 34px; margin: 14px 0 20px; }
.facts > div { min-width: 0; }
.facts dt { color: var(--dim); font-size: 12px; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.head { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 12px; }
.head .space { flex: 1; }
.head h1 .dim { font-size: 14px; margin-left: 6px; }
#tags { margin: -6px 0 18px; }
#tags input { padding: 1px 8px; }
#tags > .tags:empty { display: none; }
#tags > .bare { padding-left: 0; }
.one-line {
  display: flex;
  gap: 10px;
  margin: 0 0 18px;
  padding: 7px 18px;
  border: 1px dashed var(--line);
  border-radius: 11px;
  color: var(--dim);
}
.one-line h2 { font-size: 13px; line-height: 1.6; }
.names td:first-child { width: 1%; white-space: nowrap; max-width: 340px; }
.names td:first-child code { overflow: hidden; text-overflow: ellipsis; }
.names td:nth-child(3), .names th:nth-child(3) { width: 1%; white-space: nowrap; }
.names pre { max-height: 260px; overflow: auto; }
.names img { display: block; max-width: 100%; max-height: 420px; }
.snippets {
  display: grid;
  grid-template-columns: auto 1fr auto;
  gap: 8px 16px;
  padding: 14px 18px;
}
.snippets > * { align-self: start; }

/* The cause of a failure. */
.cause {
  border-color: color-mix(in srgb, var(--failed) 45%, var(--line));
  border-left: 4px solid var(--failed);
}
.cause .title { background: color-mix(in srgb, var(--failed) 7%, var(--card)); }
.cause h2 {
  color: color-mix(in srgb, var(--failed) 70%, var(--ink));
  font-size: 14px;
  overflow-wrap: anywhere;
}
.cause .facts { margin: 0; padding: 11px 18px; }
.cause pre {
  display: flex;
  flex-direction: column-reverse; /* Stays scrolled to its end. */
  max-height: 300px;
  overflow: auto;
  padding: 11px 18px;
  border-top: var(--edge);
}

/* The list of runs. */
.toolbar { display: flex; flex-wrap: wrap; align-items: center; gap: 8px; margin: 0 0 14px; }
.toolbar h1 { margin-right: 12px; }
.toolbar .space { flex: 1; }
.chip[aria-pressed="true"] { border-color: var(--accent); color: var(--accent); }
.scrolled { overflow-x: auto; }
#runs td, #runs th { white-space: nowrap; vertical-align: middle; }
#runs thead th { padding: 4px 4px; }
#runs thead button { border: 0; background: none; color: inherit; padding: 3px 8px; }
#runs thead button:hover { color: var(--ink); background: var(--hover); }
#runs [aria-sort="ascending"] button::after { content: " \2191" / ""; }
#runs [aria-sort="descending"] button::after { content: " \2193" / ""; }
#runs tbody tr { position: relative; }
#runs tbody tr:not(.group):hover { background: var(--hover); }
#runs .nav::after { content: ""; position: absolute; inset: 0; }
#runs .nav:focus-visible { outline: none; }
#runs .nav:focus-visible::after { outline: 2px solid var(--accent); outline-offset: -2px; }
#runs .mark { width: 1%; padding-right: 0; padding-left: 12px; }
#runs thead th:first-child { padding-left: 17px; font-size: 0; }
#runs .no-project .project { display: none; }
#runs .mark label { position: relative; z-index: 1; display: flex; padding: 3px 5px; }
#runs thead th > span { padding: 3px 8px; }
#runs .flow-name { max-width: max(18vw, (100vw - 1100px) / 2); }
#runs .name { max-width: max(9vw, (100vw - 1100px) / 4); }
#runs :is(.flow-name, .name) { overflow: hidden; text-overflow: ellipsis; }
#runs .details { width: 100%; max-width: 0; min-width: 120px; }
#runs .value { max-width: 220px; overflow: hidden; text-overflow: ellipsis; }
#runs .details .tags { flex-wrap: nowrap; }
#runs .details .tag { min-width: 0; }
#runs .details .tags > .dim { flex: none; }
#runs .why {
  overflow: hidden;
  text-overflow: ellipsis;
  color: color-mix(in srgb, var(--failed) 75%, var(--ink));
}
#runs .group th { padding-top: 18px; background: var(--raised); color: var(--ink); }
#runs .group b { margin-right: 12px; font-size: 14px; }
#runs .flow { font-weight: 600; }
.more { display: block; margin: 16px auto; }
.narrow { display: none; }
#marked {
  position: fixed;
  inset: auto 0 18px;
  z-index: 5;
  display: flex;
  align-items: center;
  gap: 12px;
  width: max-content;
  max-width: 94vw;
  margin: 0 auto;
  padding: 9px 14px;
  background: var(--card);
  border: var(--edge);
  border-radius: 11px;
  box-shadow: var(--shadow);
}

/* The graph: the steps are elements, laid over a drawing of the edges. */
.graph { position: relative; overflow-x: auto; }
.graph > div { position: relative; margin: 0 auto; }
.graph svg { position: absolute; inset: 0; overflow: visible; pointer-events: none; }
.graph path { fill: none; stroke: var(--strong-line); stroke-width: 1.5px; }
.graph marker path { fill: var(--strong-line); stroke: none; }
.graph .back { stroke-dasharray: 4 3; }
.graph .not-taken { opacity: 0.45; }
.graph text { fill: var(--dim); font: 11px var(--sans); }
.graph text { paint-order: stroke; stroke: var(--card); stroke-width: 4px; } /* Over edges. */
.graph .hint {
  position: sticky;
  left: 0;
  width: max-content;
  padding: 0 18px 8px;
}
.node {
  position: absolute;
  display: block;
  overflow: hidden;
  padding: 5px 8px 4px;
  border: 1px solid var(--line);
  border-left: 4px solid var(--c, var(--idle));
  border-radius: 8px;
  background: var(--card);
  line-height: 1.35;
  white-space: nowrap;
}
.node > * { display: block; overflow: hidden; text-overflow: ellipsis; }
.node[href]:hover { background: var(--hover); text-decoration: none; }
.node.many {
  box-shadow: 3px 3px 0 -1px var(--card), 3px 3px 0 0 var(--strong-line),
    6px 6px 0 -1px var(--card), 6px 6px 0 0 var(--strong-line);
}
.node.unreached { border-style: dashed; background: var(--bg); color: var(--dim); }
.node.cloned {
  border-right-style: dashed;
  border-block-style: dashed;
  background: repeating-linear-gradient(-45deg, var(--card) 0 5px, var(--bg) 5px 10px);
}

/* The timeline: a row for each task, with a bar for each attempt. --from and --to are seconds since
   the start of the run. */
.timeline {
  --name: clamp(130px, 25vw, 280px);
  --time: 150px;
  position: relative;
  padding: 0 0 8px;
}
.row {
  display: grid;
  grid-template-columns: var(--name) 1fr var(--time);
  gap: 16px;
  padding: 3px 18px;
}
.row > :not(.lane) { min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.row > :last-child { text-align: right; }
.row.nav:hover { background: var(--hover); text-decoration: none; }
.row.nav:focus-visible { outline-offset: -2px; }
.row.nav { scroll-margin: 110px 0 60px; }
.step-head { font-weight: 600; padding-top: 8px; scroll-margin-top: 110px; }
.step-head > span:first-child { display: flex; gap: 6px; align-items: baseline; }
.step-head > span:first-child > .dim { overflow: hidden; text-overflow: ellipsis; }
.step-head .bare { flex: none; }
.step-head .bar { opacity: 0.4; top: 6px; height: 8px; }
.row > .under { padding-left: 16px; white-space: normal; overflow-wrap: anywhere; }
.lane { position: relative; min-height: 20px; }
.axis { padding-top: 6px; height: 30px; }
.grid { position: absolute; inset: 0; pointer-events: none; }
.grid > .row { height: 100%; }
.tick { position: absolute; inset-block: 0; border-left: 1px solid var(--line); }
.axis .tick { border: 0; transform: translateX(-50%); white-space: nowrap; }
.axis .tick:first-child { transform: none; }
.tick, .bar { left: calc(100% * var(--from) / var(--span)); }
.bar {
  position: absolute;
  top: 4px;
  height: 12px;
  width: calc(100% * (var(--to) - var(--from)) / var(--span));
  min-width: 3px;
  border-radius: 3px;
  background: var(--c, var(--idle));
}
.bar.cloned {
  background: repeating-linear-gradient(
    -45deg, var(--c) 0 4px, color-mix(in srgb, var(--c) 35%, var(--card)) 4px 8px
  );
}
.fold { margin: 4px 0 8px 34px; }

/* Attempts, logs and cards of a task. */
.attempts { display: flex; flex-wrap: wrap; gap: 8px; margin: 12px 0 0; }
.attempts a { padding: 4px 10px; border: var(--edge); border-radius: 8px; background: var(--card); }
.attempts [aria-current] { border-color: var(--accent); box-shadow: 0 0 0 1px var(--accent); }
.log {
  max-height: 480px;
  overflow: auto;
  overflow-anchor: none;
  padding: 8px 0;
  font: 12.5px/1.55 var(--mono);
}
.line { display: flex; gap: 14px; padding: 0 18px; }
.line:hover { background: var(--hover); }
.line > span { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 0; }
.line > a { color: var(--dim); flex: none; user-select: none; }
.line > a::before { content: attr(data-row); }
.line > a { min-width: 3.5ch; text-align: right; }
.line > time { color: var(--dim); flex: none; user-select: none; }
.line.hit { background: color-mix(in srgb, var(--mark) 45%, transparent); }
.line.target { background: var(--mark); }
.line.target > a, .line.target > time { color: var(--ink); }
.earlier { display: flex; justify-content: center; gap: 10px; padding: 4px 0 10px; }
.c0 { color: var(--dim); }
.c1 { color: color-mix(in srgb, #e03131 70%, var(--ink)); }
.c2 { color: color-mix(in srgb, #2f9e44 70%, var(--ink)); }
.c3 { color: color-mix(in srgb, #d9a300 62%, var(--ink)); }
.c4 { color: color-mix(in srgb, #3b73f0 72%, var(--ink)); }
.c5 { color: color-mix(in srgb, #b144d0 72%, var(--ink)); }
.c6 { color: color-mix(in srgb, #0c96a8 70%, var(--ink)); }
.bold { font-weight: 700; }
.card { position: relative; overflow: hidden; }
.card iframe {
  display: block;
  width: 100%;
  height: 1px;
  border: 0;
  opacity: 0;
  background: #fff;
  color-scheme: light;
}
.card iframe.ready { opacity: 1; }
.card iframe + iframe { position: absolute; inset: 0 0 auto; }

/* Differences between runs, the dialogs and the login. */
.differences { --name: 200px; --run: 215px; table-layout: fixed; }
.differences { min-width: calc(var(--name) + var(--runs) * var(--run)); }
.differences time { white-space: normal; }
.differences thead th:first-child { width: var(--name); }
.differences :is(td:first-child, a) { overflow-wrap: anywhere; }
.differences pre { max-height: 180px; overflow: auto; }
dialog {
  max-width: min(560px, 92vw);
  padding: 20px 24px;
  border: var(--edge);
  border-radius: 13px;
  background: var(--card);
  color: var(--ink);
  box-shadow: var(--shadow);
}
dialog::backdrop { background: rgb(0 0 0 / 40%); }
dialog h2 { font-size: 16px; margin-bottom: 10px; }
dialog .buttons { display: flex; justify-content: flex-end; gap: 10px; margin-top: 18px; }
dialog dl { display: grid; grid-template-columns: auto 1fr; gap: 6px 20px; margin: 0; }
dialog dd { margin: 0; }
kbd {
  padding: 1px 7px;
  border: var(--edge);
  border-bottom-width: 2px;
  border-radius: 5px;
  font: 12px var(--mono);
}
#login { max-width: 360px; margin: 12vh auto; padding: 26px; }
#login > * { display: block; width: 100%; margin: 0 0 12px; }

/* The list in a window that is too narrow for a table, and all of the page on a phone. */
@media (max-width: 1200px) {
  #runs .finished_at { display: none; }
}
@media (max-width: 1100px) {
  .narrow { display: inline-block; max-width: 132px; }
  #runs thead { display: none; }
  #runs :is(table, tbody) { display: block; }
  #runs tbody tr {
    display: flex;
    flex-wrap: wrap;
    align-items: center;
    gap: 3px 12px;
    padding: 10px 12px;
    border-bottom: var(--edge);
  }
  #runs tbody :is(td, th) { padding: 0; border: 0; background: none; }
  #runs td:empty { display: none; }
  #runs tbody .mark { width: auto; margin-left: -5px; padding: 0; }
  #runs :is(.flow-name, .name) { max-width: 100%; white-space: normal; overflow-wrap: anywhere; }
  #runs .flow-name { flex: 1 0 45%; }
  #runs .value::before { content: attr(data-name) " = "; color: var(--dim); }
  #runs tbody .group { background: var(--raised); }
  #runs .group th { white-space: normal; overflow-wrap: anywhere; }
  #runs .details { flex: 1 0 100%; width: 100%; max-width: 100%; }
  #runs .details .tags { flex-wrap: wrap; }
}
@media (max-width: 640px) {
  :root { --side: 14px; }
  header { flex-wrap: wrap; }
  #crumbs { order: -2; flex: 1 0 60%; flex-wrap: wrap; row-gap: 0; }
  #live { order: -1; }
  .search { flex: 1 1 200px; }
  .timeline { --time: 66px; }
  .differences { --name: 108px; --run: 132px; }
  .row { gap: 8px; padding-inline: 12px; }
  .tick:nth-child(even) { display: none; }
  .toolbar .space { display: none; }
  .title input:not([type="checkbox"]) { width: 130px; }
  .line > time, .step-head .bare, .row .number .dim { display: none; }
  .names td:first-child { width: 34%; white-space: normal; overflow-wrap: anywhere; }
  th, td { padding-inline: 10px; }
  th:first-child, td:first-child { padding-left: 14px; }
  .snippets { grid-template-columns: 1fr auto; }
  .snippets > .dim { grid-column: 1 / -1; }
}
@media (forced-colors: active) {
  .bar, .badge::before, #live::before { forced-color-adjust: none; }
}
@media (prefers-reduced-motion: reduce) {
  * { animation: none !important; }
}
</style>
<header>
  <nav id="crumbs" aria-label="Where you are"></nav>
  <div class="search">
    <input id="filter" type="search" role="combobox" aria-label="Filter runs" autocomplete="off"
      aria-controls="suggestions" aria-expanded="false" aria-autocomplete="list" spellcheck="false"
      placeholder="Filter: any text, status:failed, since:2d, -tag:nightly">
    <ul id="suggestions" role="listbox" aria-label="Suggestions" hidden></ul>
  </div>
  <details id="services" class="menu" hidden></details>
  <span id="live" role="status">connecting</span>
  <button id="help" aria-label="? Keyboard shortcuts">?</button>
</header>
<form id="login" class="panel" hidden>
  <h1>Log in</h1>
  <input id="key" type="password" aria-label="Key" autocomplete="current-password" required>
  <button class="primary">Log in</button>
  <p id="said" class="dim" role="alert">This service asks for its key once.</p>
</form>
<main id="main" tabindex="-1"></main>
<div id="marked" role="region" aria-label="Marked runs" hidden></div>
<script type="module">
// ---- Helpers: making the page, texts, and asking the service ----

const byId = (id) => document.getElementById(id);
const main = byId("main");
const filter = byId("filter");
const SVG = "http://www.w3.org/2000/svg";
const API = location.pathname.endsWith("/") ? location.pathname.slice(0, -1) : "";
const SOCKETS = location.origin.replace(/^http/, "ws") + API;

/** Makes an element. Strings among its children become text nodes, and never markup. */
function h(tag, props, ...children) {
  return furnish(document.createElement(tag), props, children);
}

/** Makes an element of a drawing. */
function draw(tag, props, ...children) {
  return furnish(document.createElementNS(SVG, tag), props, children);
}

function furnish(node, props, children) {
  for (const [name, value] of Object.entries(props || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function" || name === "checked") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

/** Gives a parent these children. Nodes that are in place are not moved: they would lose focus. */
function sync(parent, nodes) {
  const wanted = new Set(nodes);
  for (const child of [...parent.childNodes]) {
    if (!wanted.has(child)) child.remove();
  }
  let at = parent.firstChild;
  for (const node of nodes) {
    if (node === at) at = at.nextSibling;
    else parent.insertBefore(node, at);
  }
}

const HANDLERS = ["onclick", "onchange", "oninput", "onkeydown", "onsubmit"];
const KEPT = ["open", "title"]; // attributes that are set later: by the reader, and for a tooltip

/** Makes a node like a fresh one by changing only what differs; returns the node that is shown. */
function patch(node, fresh) {
  if (node.nodeName !== fresh.nodeName) {
    node.replaceWith(fresh);
    return fresh;
  }
  if (node.nodeType === Node.TEXT_NODE) {
    if (node.data !== fresh.data) node.data = fresh.data;
    return node;
  }
  for (const {name} of [...node.attributes]) {
    if (!fresh.hasAttribute(name) && !KEPT.includes(name)) node.removeAttribute(name);
  }
  for (const {name, value} of fresh.attributes) {
    if (node.getAttribute(name) !== value) node.setAttribute(name, value);
  }
  for (const handler of HANDLERS) node[handler] = fresh[handler];
  if (node.type === "checkbox") node.checked = fresh.checked;
  const children = [...node.childNodes];
  const others = [...fresh.childNodes];
  others.forEach((other, at) => {
    if (at < children.length) patch(children[at], other);
    else node.append(other);
  });
  children.slice(others.length).forEach((child) => child.remove());
  return node;
}

/** Replaces the children of an element by changing only what differs. */
function fill(node, ...children) {
  const fresh = node.cloneNode(false);
  for (const handler of HANDLERS) fresh[handler] = node[handler];
  fresh.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  patch(node, fresh);
}

const STATUSES = ["failed", "running", "pending", "completed"];
const colour = (status) => "s-" + (STATUSES.includes(status) ? status : "unknown");
const note = (...content) => h("p", {class: "note"}, ...content);
const code = (text) => h("code", null, text);
const badge = (status, text) =>
  h("span", {class: "badge " + colour(status)}, text || status || "unknown");
const titled = (title, ...more) => h("div", {class: "title"}, h("h2", null, title), ...more);
const panel = (id, title, ...body) =>
  h("section", {class: "panel", id, "aria-label": title}, ...body);
const folded = (id, title, ...body) =>
  h("details", {class: "panel", id}, h("summary", null, h("h2", null, title)), ...body);
const facts = (pairs) => h("dl", {class: "facts"}, pairs
  .filter((pair) => pair && pair[1])
  .map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value))));
const cell = (content, props) => h("td", props, content);
const tableOf = (className, heads, rows) => h("table", {class: className},
  h("thead", null, h("tr", null, heads.map((head) => h("th", {scope: "col"}, head)))),
  h("tbody", null, rows));
const wrapTable = (title, table) =>
  h("div", {class: "scrolled", tabindex: 0, role: "group", "aria-label": title}, table);

/** A section that has nothing to show, in one line. */
const emptyLine = (id, title, text) =>
  h("section", {class: "one-line", id, "aria-label": title}, h("h2", null, title), text);

/** Makes blocks that can be scrolled focusable, for the keyboard. */
function reachScrolled(root) {
  for (const node of root.querySelectorAll("pre")) {
    if (node.scrollHeight > node.clientHeight) node.tabIndex = 0;
  }
}

const grouped = (number) => number.toLocaleString("en");
const plural = (number, word) => `${grouped(number)} ${word}${number === 1 ? "" : "s"}`;

function duration(ms) {
  const seconds = Math.max(0, ms) / 1000;
  const minutes = Math.floor(seconds / 60);
  const hours = Math.floor(minutes / 60);
  if (seconds > 0 && seconds < 0.1) return `${Math.ceil(ms)} ms`;
  if (seconds < 10) return `${Math.round(seconds * 10) / 10} s`;
  if (minutes < 1) return `${Math.floor(seconds)} s`;
  if (hours < 1) return `${minutes}m ${Math.floor(seconds % 60)}s`;
  return hours < 48 ? `${hours}h ${minutes % 60}m` : `${Math.floor(hours / 24)} days`;
}

function ago(ms) {
  const past = Date.now() - ms;
  return past < 5000 ? "just now" : `${duration(past).replace(/ (?:\d+s|\d+m)$/, "")} ago`;
}

const DATE = {year: "numeric", month: "short", day: "numeric"};
const CLOCK = {hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23"};
const clock = (ms) => new Date(ms).toLocaleTimeString("en", CLOCK);
const day = (ms) => new Date(ms).toLocaleDateString("en", DATE);
const fullTime = (ms) =>
  new Date(ms).toLocaleString("en", {...DATE, ...CLOCK, timeZoneName: "short"});

/** A time, in short. The tooltip has its date and zone, and how long ago it was. */
function time(ms) {
  if (!ms) return h("span", {class: "dim"}, "\u2013");
  const isToday = day(ms) === day(Date.now());
  const text = isToday ? clock(ms) : day(ms).replace(/, \d+$/, "") + ", " + clock(ms).slice(0, 5);
  const iso = new Date(ms).toISOString();
  return h("time", {class: "number", datetime: iso, "data-ms": ms}, text);
}

/** A time with its date and zone, and how long ago it was. */
const longTime = (ms) => ms && h("time", {class: "number", "data-ms": ms}, fullTime(ms), " ",
  h("span", {class: "dim", "data-ago": ms}, ago(ms)));

/** The duration of a run or an attempt. While it is running, the page counts on. */
function elapsed(row) {
  const from = row.started_at || row.ts_epoch;
  const isRunning = row.status === "running";
  const to = isRunning ? Date.now() : row.finished_at;
  const ms = to ? to - from : row.duration;
  const isKnown = typeof ms === "number" && row.status !== "pending";
  return h("span", {class: "number", "data-since": isRunning && from},
    isKnown ? duration(ms) : "\u2013");
}

/** Copies text. Pages that are not served securely have no clipboard, but execCommand. */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = h("textarea", null, text);
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

function copyButton(text, name) {
  const button = h("button", {class: "bare", "aria-label": `Copy ${name}`}, "Copy");
  button.onclick = async () => {
    await copy(text);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  };
  return button;
}

const shellQuote = (text) =>
  /^[\w./:=@%+-]+$/.test(text) ? text : `'${text.replace(/'/g, "'\\''")}'`;

/** A panel with lines of code to copy; `snippets`: pairs of a name and the lines. */
function codePanel(snippets) {
  const lines = snippets.filter(Boolean).map(([name, text]) =>
    [h("span", {class: "dim"}, name), h("pre", null, text), copyButton(text, name)]);
  return folded("code", "Use it in code", h("div", {class: "snippets"}, lines));
}

/** Opens a dialog; resolves to the value of the button that closes it, or "" if none does. */
function openDialog(title, content, buttons) {
  const dialog = h("dialog", {"aria-label": title}, h("h2", null, title), content);
  const newButton = ([text, value, className]) =>
    h("button", {class: className, onclick: () => dialog.close(value)}, text);
  dialog.append(h("div", {class: "buttons"}, buttons.map(newButton)));
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.onclose = () => {
      dialog.remove();
      resolve(dialog.returnValue);
    };
  });
}

const tell = (title, content) => openDialog(title, content, [["Close", "", "primary"]]);

// Addresses: of the service, and of views of the page.

const path = (...segments) => segments.map((segment) => "/" + encodeURIComponent(segment)).join("");
const link = (...segments) => "#" + path(...segments);
const runPath = (flow, run) => path("flows", flow, "runs", run);

/** The address of the list, with a filter and other choices. */
function listLink(query, choices = {}) {
  const pairs = Object.entries({q: query, ...choices}).filter(([, value]) => value);
  return "#/" + (pairs.length ? "?" + new URLSearchParams(pairs) : "");
}

/** Sends a request; throws an error with a sentence if it is refused or not answered. */
async function request(url, options) {
  const answer = await fetch(API + url, options).catch((problem) => {
    throw problem.name === "AbortError" ? problem : new Error("The service does not answer.");
  });
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

/** Fetches JSON for the view that is shown; the request is aborted along with the view. */
async function get(url) {
  try {
    return (await request("/api" + url, {signal: view.signal})).json();
  } catch (problem) {
    if (problem.status === 401) askForKey();
    throw problem;
  }
}

async function refusal(answer) {
  const {message, detail} = await answer.json().catch(() => ({}));
  const text = message || detail || `The service answered ${answer.status}.`;
  return Object.assign(new Error(text), {status: answer.status});
}

/** Fetches JSON; if there is none at the URL, the data are `none`. */
async function getIfAny(url, none) {
  try {
    return await get(url);
  } catch (problem) {
    if (problem.status === 404) return {data: none};
    throw problem;
  }
}

/** Fetches all pages of a list. The host and prefix of links are ignored: proxies change them. */
async function getAll(url) {
  const rows = [];
  for (let next = url; next;) {
    const {data, links} = await getIfAny(next, []);
    rows.push(...data);
    const following = links && links.next && new URL(links.next, location.href);
    next = following && following.pathname.replace(/^.*?\/api\//, "/") + following.search;
  }
  return rows;
}

const change = (method, url, body) => request(url, {
  method,
  headers: {"Content-Type": "application/json"},
  body: body && JSON.stringify(body),
});

function askForKey() {
  view.abort();
  replaceMain(byId("login"));
  byId("login").hidden = false;
  byId("key").focus();
}

byId("login").onsubmit = async (event) => {
  event.preventDefault();
  try {
    await change("POST", "/api/login", {key: byId("key").value});
    location.reload();
  } catch (problem) {
    byId("said").textContent = problem.status === 401 ? "This key is wrong." : problem.message;
  }
};

// ---- Socket: one for the page; a subscription ends with the view that made it ----

const live = {
  socket: null,
  subscriptions: new Map(),
  made: 0,
  delay: 1000, // before it is opened again
  isLost: false,
  heard: 0,
  redraw: 0,
};

function say(message) {
  if (live.socket.readyState === WebSocket.OPEN) live.socket.send(JSON.stringify(message));
}

function showLive(state) {
  byId("live").dataset.state = byId("live").textContent = state;
}

const unthrottled = new MessageChannel();
unthrottled.port1.onmessage = drawNow;

/** Draws once for many frames. In a hidden tab, where browsers delay timers, it does without. */
function drawSoon() {
  if (live.redraw) return;
  live.redraw = document.hidden ? -1 : setTimeout(drawNow, 200);
  if (document.hidden) unthrottled.port2.postMessage(null);
}

function drawNow() {
  live.redraw = 0;
  view.draw();
}

function connect() {
  const socket = new WebSocket(SOCKETS + "/api/ws?exact=true");
  let isAnswered = true;
  let pinging = 0;
  live.socket = socket;
  /** Does not wait for the close of a socket that is silent, which can take a minute. */
  function lose() {
    clearInterval(pinging);
    socket.onclose = null;
    socket.close();
    live.isLost = true;
    showLive("reconnecting");
    setTimeout(connect, live.delay);
    live.delay = Math.min(live.delay * 1.5, 5000);
  }
  function ping() {
    if (!isAnswered) {
      lose();
      return;
    }
    isAnswered = false;
    socket.send("__ping__");
  }
  socket.onclose = lose;
  socket.onopen = () => {
    pinging = setInterval(ping, 5000);
    live.delay = 1000;
    showLive("live");
    for (const {announce, opened} of live.subscriptions.values()) {
      announce(Math.max(opened, live.heard));
    }
    if (byId("problem")) route();
    else if (live.isLost) view.catchUp().catch(() => {}); // if it is lost again, this is done again
    live.isLost = false;
  };
  socket.onmessage = ({data}) => {
    isAnswered = true;
    live.heard = Date.now();
    const frame = data === "__pong__" ? {} : JSON.parse(data);
    const subscription = live.subscriptions.get(frame.uuid);
    if (!subscription) return;
    if (frame.type === "DELETE") subscription.drop(frame.data);
    else subscription.keep(frame.data);
    drawSoon();
  };
}

/** Follows a resource. What has changed since the view was opened is sent again. */
function subscribe(owner, resource, keep, drop) {
  const uuid = "page-" + (live.made += 1);
  const announce = (since) =>
    say({type: "SUBSCRIBE", uuid, resource, since: Math.floor(since / 1000) - 2});
  live.subscriptions.set(uuid, {announce, keep, drop, opened: owner.opened});
  owner.signal.addEventListener("abort", () => {
    live.subscriptions.delete(uuid);
    say({type: "UNSUBSCRIBE", uuid});
  });
  if (live.socket) announce(owner.opened);
  else connect();
}

// The tab: an icon in the colour of the status, and the status in the title.

const SIGNS = {failed: "\u2715", running: "\u25b6", completed: "\u2713"};

function showInTab(status, title) {
  document.title = [SIGNS[status], title].filter(Boolean).join(" ");
  const style = getComputedStyle(document.documentElement);
  const fillColour = style.getPropertyValue(SIGNS[status] ? "--" + status : "--idle");
  const icon = `<svg xmlns="${SVG}" viewBox="0 0 16 16"><circle cx="8" cy="8" r="7" ` +
    `fill="${fillColour}"/></svg>`;
  const href = "data:image/svg+xml," + encodeURIComponent(icon);
  if (byId("icon").href !== href) byId("icon").href = href;
}

// ---- List: of all runs that are known, those that pass the filter ----

const runs = new Map(); // by flow and number: {run, row, parameters}
const runId = (run) => String(run.run || run.run_id || run.run_number);
const userOf = (run) => run.user || run.user_name || "";
const runKey = (run) => run.flow_id + "/" + runId(run);

/** The value of a system tag like project:NAME. */
function systemTag(run, name) {
  const tag = (run.system_tags || []).find((text) => text.startsWith(name + ":"));
  return tag ? tag.slice(name.length + 1) : "";
}

function keepRun(run) {
  const entry = runs.get(runKey(run)) || {parameters: null, row: null};
  noticeEnd(entry.run, run);
  runs.set(runKey(run), Object.assign(entry, {run, isStale: true}));
}

function forgetRun(key) {
  runs.delete(key);
  marked.delete(key);
}

/** A run that has ended while the tab was hidden; its title says so. */
const unseen = {run: null};

function noticeEnd(before, run) {
  const hasEnded = before && before.status === "running" && run.status !== "running";
  if (hasEnded && document.hidden) unseen.run = run;
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) return;
  unseen.run = null;
  drawNow();
  showServices();
});

// The filter: a term matches parts of values in any case, - excludes, commas mean alternatives.

const FIELDS = {
  status: (run) => [run.status],
  flow: (run) => [run.flow_id],
  user: (run) => [userOf(run)],
  tag: (run) => [...run.tags, ...(run.system_tags || [])],
  project: (run) => [systemTag(run, "project")],
  branch: (run) => [systemTag(run, "project_branch")],
  id: (run) => [runId(run)],
};
const ANY_FIELD = (run) => [run.status, run.flow_id, userOf(run), runId(run), ...run.tags,
  systemTag(run, "project"), systemTag(run, "project_branch")];
const MOMENTS = {
  since: (run, moment) => run.ts_epoch >= moment,
  before: (run, moment) => run.ts_epoch < moment,
};
const FIELD_NAMES = [...Object.keys(FIELDS), ...Object.keys(MOMENTS)];
const UNITS = {m: 6e4, min: 6e4, h: 36e5, d: 864e5, w: 6048e5};

/** Parses a time like 2h, yesterday or 2026-11-25; NaN if it is none. */
function parseMoment(text) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  const [, count, unit] = /^(\d+(?:\.\d+)?)\s*(min|[mhdw])$/i.exec(text) || [];
  if (unit) return Date.now() - count * UNITS[unit.toLowerCase()];
  if (text === "today") return midnight;
  if (text === "yesterday") return midnight - UNITS.d;
  return /^\d{4}-/.test(text) ? new Date(text.length === 10 ? text + "T00:00" : text) - 0 : NaN;
}

/** Parses a filter into terms, and a sentence about the part that makes no sense, if any. */
function parseFilter(text) {
  const terms = [];
  let problem = "";
  for (const word of text.match(/(?:"[^"]*"?|[^\s"])+/g) || []) {
    const [, minus, name, rest] = /^(-?)(?:([a-z_]+):)?(.*)$/is.exec(word);
    const field = name && name.toLowerCase();
    const values = (rest.match(/(?:"[^"]*"?|[^,"])+/g) || [])
      .map((value) => value.replace(/"/g, "").toLowerCase())
      .filter(Boolean);
    if (field && !FIELD_NAMES.includes(field)) {
      problem = `There is no field "${name}". There are ${FIELD_NAMES.join(", ")}; ` +
        "text in quotes may have a colon in it.";
    } else if (MOMENTS[field] && values.some((value) => Number.isNaN(parseMoment(value)))) {
      problem = `"${rest}" is no time: "${field}" takes 30min, 2h, 3d, 1w, today, yesterday or a ` +
        "date like 2026-11-25.";
    } else if (values.length) {
      terms.push({field, values, isExcluded: minus === "-"});
    }
  }
  return {terms, problem};
}

function matches(run, {field, values, isExcluded}) {
  const texts = MOMENTS[field] ? [] : (FIELDS[field] || ANY_FIELD)(run);
  const found = values.some((value) => MOMENTS[field]
    ? MOMENTS[field](run, parseMoment(value))
    : texts.some((text) => String(text).replace(/"/g, "").toLowerCase().includes(value)));
  return found !== isExcluded;
}

/** The parameters that have the service filter too, for those terms that it has rules for. */
function serverFilter(terms) {
  const asked = {};
  for (const {field, values: [value, other], isExcluded} of terms) {
    if (other || isExcluded) continue;
    if (field === "flow") asked["flow_id:co"] = value;
    if (field === "status" && STATUSES.includes(value)) asked.status = value;
    if (field === "since") asked["ts_epoch:ge"] = Math.floor(parseMoment(value));
    if (field === "before") asked["ts_epoch:lt"] = Math.floor(parseMoment(value));
  }
  return asked;
}

// Suggestions for the word that is being typed.

const suggestions = byId("suggestions");

const FIELD_HINTS = {
  status: "failed, running, completed",
  flow: "a flow's name",
  user: "who ran it",
  tag: "a tag",
  project: "of @project",
  branch: "of @project",
  id: "a run's id",
  since: "2h, 3d, 1w, today, 2026-11-25",
  before: "2h, 3d, 1w, today, 2026-11-25",
};

function suggestedWords(word) {
  const [, minus, name, rest] = /^(-?)(?:([a-z]+):)?(.*)$/is.exec(word);
  const typed = rest.replace(/"/g, "").toLowerCase();
  if (!name) {
    return FIELD_NAMES.filter((field) => field.startsWith(typed))
      .map((field) => ({text: `${minus}${field}:`, hint: FIELD_HINTS[field]}));
  }
  const field = FIELDS[name.toLowerCase()];
  const counts = new Map();
  for (const {run} of field ? runs.values() : []) {
    for (const value of new Set(field(run))) {
      if (value && String(value).toLowerCase().includes(typed)) {
        counts.set(value, (counts.get(value) || 0) + 1);
      }
    }
  }
  const quoted = (value) => /[\s,"]/.test(value) ? `"${value.replace(/"/g, "")}"` : value;
  return [...counts].sort(([, one], [, other]) => other - one).slice(0, 9)
    .filter(([value]) => value.toLowerCase() !== typed)
    .map(([value, count]) =>
      ({text: `${minus}${name}:${quoted(value)} `, hint: plural(count, "run")}));
}

function lastWord() {
  return /(?:"[^"]*"?|[^\s"])*$/.exec(filter.value.slice(0, filter.selectionStart))[0];
}

function suggest() {
  const words = document.activeElement === filter ? suggestedWords(lastWord()) : [];
  suggestions.replaceChildren(...words.map(({text, hint}, at) =>
    h("li", {
      role: "option",
      id: "suggestion-" + at,
      "aria-selected": "false",
      "data-text": text,
      onmousedown: (event) => {
        event.preventDefault();
        takeSuggestion(event.currentTarget);
      },
    }, h("span", null, text), h("span", {class: "dim"}, hint))));
  showSuggestions(words.length > 0);
}

function showSuggestions(isShown) {
  suggestions.hidden = !isShown;
  filter.setAttribute("aria-expanded", String(isShown));
  filter.removeAttribute("aria-activedescendant");
}

const chosenSuggestion = () =>
  suggestions.hidden ? null : suggestions.querySelector("[aria-selected=true]");

function chooseSuggestion(by) {
  const options = [...suggestions.children];
  const at = options.indexOf(chosenSuggestion()) + by;
  const chosen = options[(at + options.length) % options.length];
  options.forEach((option) => option.setAttribute("aria-selected", String(option === chosen)));
  filter.setAttribute("aria-activedescendant", chosen.id);
  chosen.scrollIntoView({block: "nearest"});
}

function takeSuggestion(option) {
  const word = lastWord();
  const before = filter.value.slice(0, filter.selectionStart - word.length) + option.dataset.text;
  filter.value = before + filter.value.slice(filter.selectionStart).trimStart();
  filter.setSelectionRange(before.length, before.length);
  searchNow();
  suggest();
}

// Columns: what the list shows of a run, and can be sorted by.

const COLUMNS = [
  {name: "status", title: "Status", of: (run) => run.status},
  {name: "flow_id", title: "Flow", of: (run) => run.flow_id.toLowerCase()},
  {name: "run_number", title: "Run", of: (run) => run.run_number},
  {name: "ts_epoch", title: "Started", of: (run) => run.ts_epoch},
  {name: "finished_at", title: "Finished", of: (run) => run.finished_at || Infinity},
  {name: "duration", title: "Duration", of: (run) => runningTime(run)},
  {name: "user", title: "User", of: (run) => userOf(run).toLowerCase()},
  {name: "project", title: "Project", of: (run) => projectOf(run)},
  {name: "details", title: "Cause and tags", of: (run) => run.tags.join(" ")},
];
const runningTime = (run) =>
  run.status === "running" ? Date.now() - run.ts_epoch : run.duration || 0;
const projectOf = (run) =>
  [systemTag(run, "project"), systemTag(run, "project_branch")].filter(Boolean).join(" / ");

/** The order, grouping and columns in the address of the list. */
function listChoices() {
  const choices = addressQuery();
  return {
    sort: choices.get("sort") || "",
    group: choices.get("group") || "",
    columns: choices.get("columns") || "",
  };
}

function chooseInList(choice) {
  location.hash = listLink(listed, {...listChoices(), ...choice});
}

const filterByTag = (name) => {
  location.hash = listLink(`tag:"${name}"`);
};

/** The first tags of a run, and the number of others. */
function shortTags(tags) {
  const shown = tags.slice(0, 3).map((name) => h("span", {class: "tag"},
    h("button", {title: "Only runs tagged " + name, onclick: () => filterByTag(name)}, name)));
  const rest = tags.slice(3);
  return h("div", {class: "tags"}, shown, rest.length
    ? h("span", {class: "dim", "data-tip": rest.join("\n")}, `+${rest.length}`) : null);
}

const marked = new Set(); // keys of the runs to compare

function markBox(run) {
  const key = runKey(run);
  const onchange = (event) => {
    if (event.target.checked) marked.add(key);
    else marked.delete(key);
    showMarked();
  };
  return h("label", null, h("input",
    {type: "checkbox", "aria-label": "Mark " + key, checked: marked.has(key), onchange}));
}

const MOST_COMPARED = 5;

function showMarked() {
  const isShown = marked.size > 0 && isList();
  const canCompare = marked.size >= 2 && marked.size <= MOST_COMPARED;
  byId("marked").hidden = !isShown;
  fill(byId("marked"),
    h("span", {role: "status"}, plural(marked.size, "run") + " marked" +
      (marked.size > MOST_COMPARED ? `, at most ${MOST_COMPARED} can be compared` : "")),
    h("button", {
      class: "primary",
      disabled: !canCompare,
      onclick: () => { location.hash = compareLink([...marked]); },
    }, "Compare"),
    h("button", {onclick: clearMarks}, "Clear"));
}

/** Removes the marks of runs that were deleted. Others may be marked that the filter excludes. */
async function checkMarks() {
  for (const key of [...marked].filter((one) => !runs.has(one))) {
    const {data} = await getIfAny(runPath(...key.split("/")), null);
    if (!data) marked.delete(key);
  }
  showMarked();
}

function clearMarks() {
  marked.clear();
  for (const entry of runs.values()) entry.isStale = true;
  view.draw();
}

function parameterCell(entry, name) {
  const known = entry.parameters && entry.parameters[name];
  const text = known ? JSON.stringify(known.value) : "";
  return cell(text ? code(text) : "", {class: "value", "data-name": name, "data-tip": text});
}

function runRow(entry, columns) {
  const {run} = entry;
  const id = runId(run);
  const opened = h("a", {
    class: "nav flow",
    href: link(run.flow_id, id),
    "aria-label": `${run.flow_id} ${id}: ${run.status}`,
  }, run.flow_id);
  const why = run.cause && run.cause.summary;
  return h("tr", {"data-status": run.status, "data-run": runKey(run)},
    cell(markBox(run), {class: "mark"}),
    cell(badge(run.status)),
    cell(opened, {class: "flow-name", "data-tip": run.flow_id}),
    cell(h("span", {class: "number"}, id)),
    cell(time(run.ts_epoch)),
    cell(time(run.finished_at), {class: "finished_at"}),
    cell(elapsed(run)),
    cell(userOf(run), {class: "name", "data-tip": userOf(run)}),
    cell(projectOf(run), {class: "name project", "data-tip": projectOf(run)}),
    columns.map((name) => parameterCell(entry, name)),
    cell([why ? h("div", {class: "why", "data-tip": why}, why) : null,
      run.tags.length ? shortTags(run.tags) : null], {class: "details"}));
}

function sortHead(column, sort) {
  const isSorted = sort.name === column.name;
  const other = isSorted && sort.isDescending ? "" : "-";
  const direction = sort.isDescending ? "descending" : "ascending";
  return h("th", {scope: "col", class: column.name, "aria-sort": isSorted ? direction : null},
    h("button", {onclick: () => chooseInList({sort: other + column.name})}, column.title));
}

function parseSort(text) {
  const name = text.replace(/^-/, "") || "ts_epoch";
  const column = COLUMNS.find((one) => one.name === name) || COLUMNS[3];
  return {name: column.name, of: column.of, isDescending: !text || text.startsWith("-")};
}

function compareRuns(sort) {
  const order = (one, other) => (one < other ? -1 : Number(one > other));
  return ({run: one}, {run: other}) =>
    (order(sort.of(one), sort.of(other)) || order(one.ts_epoch, other.ts_epoch)) *
    (sort.isDescending ? -1 : 1);
}

function flowHead(flow, entries, width) {
  const counts = STATUSES.map((status) =>
    [status, entries.filter(({run}) => run.status === status).length]);
  const told = counts.filter(([, count]) => count)
    .map(([status, count]) => `${grouped(count)} ${status}`);
  return h("tr", {class: "group"}, h("th", {colspan: width, scope: "colgroup"},
    h("b", null, flow), h("span", {class: "dim"}, told.join(", "))));
}

/** The menu that makes columns of parameters. */
function columnsMenu(chosen, known) {
  const choose = (name) => {
    const others = chosen.filter((other) => other !== name);
    const columns = others.length < chosen.length ? others : [...chosen, name];
    chooseInList({columns: columns.join(",")});
  };
  const boxes = known.map((name) => h("label", null,
    h("input", {type: "checkbox", checked: chosen.includes(name), onchange: () => choose(name)}),
    name));
  return [h("summary", null, "Columns"), h("div", null, boxes.length ? boxes
    : h("span", {class: "dim"}, "No parameters are known yet."))];
}

/** Fetches the parameters of runs that do not have them yet, four at a time. */
async function fetchParameters(entries) {
  const waiting = entries.filter((entry) => !entry.parameters);
  const work = async () => {
    for (let entry = waiting.shift(); entry; entry = waiting.shift()) {
      const {flow_id: flow} = entry.run;
      const {data} = await getIfAny(runPath(flow, runId(entry.run)) + "/parameters", {});
      Object.assign(entry, {parameters: data, isStale: true});
    }
  };
  await Promise.all([work(), work(), work(), work()]);
}

/** Groups entries by flow, and sorts the flows by name. */
function groupByFlow(entries) {
  const flows = new Map();
  for (const entry of entries) {
    const {flow_id: flow} = entry.run;
    flows.set(flow, [...(flows.get(flow) || []), entry]);
  }
  return [...flows].sort(([one], [other]) => one.localeCompare(other));
}

/** The list of runs with the order, grouping and columns of its address. */
class RunList {
  constructor(query) {
    const {terms, problem} = parseFilter(query);
    const choices = listChoices();
    const sort = parseSort(choices.sort);
    Object.assign(this, {query, terms, problem, choices, sort});
    this.columns = choices.columns.split(",").filter(Boolean);
    this.page = 0; // the last page that was loaded
    this.isLoaded = false;
    this.asked = {
      _limit: terms.length || choices.group ? 1000 : 100,
      _order: (sort.isDescending ? "-" : "+") + sort.name,
      ...serverFilter(terms),
    };
    this.heads = new Map(); // the rows above the runs of each flow, if they are grouped
    this.running = 0;
    this.newest = null;
    this.body = h("tbody");
    this.menu = h("details", {class: "menu", ontoggle: () => this.findColumns().catch(fail)});
    this.none = h("div");
    this.more = h("button", {class: "more", onclick: () => this.load().catch(fail)},
      "Load more runs");
    this.table = h("table", null, this.newHead(), this.body);
  }

  newHead() {
    return h("thead", null, h("tr", null,
      h("th", {scope: "col"}, "Mark"),
      COLUMNS.slice(0, -1).map((column) => sortHead(column, this.sort)),
      this.columns.map((name) => h("th", {scope: "col"}, h("span", null, name))),
      COLUMNS.slice(-1).map((column) => sortHead(column, this.sort))));
  }

  newToolbar() {
    const isGrouped = this.choices.group === "flow";
    const onchange = (event) => chooseInList({sort: event.target.value});
    const options = COLUMNS.map(({name, title}) => h("option",
      {value: "-" + name, selected: name === this.sort.name}, "By " + title.toLowerCase()));
    return h("div", {class: "toolbar"}, h("h1", null, "Runs"),
      h("div", {class: "tags", role: "group", "aria-label": "Status"},
        ["failed", "running", "completed"].map((status) => this.statusChip(status))),
      h("span", {class: "space"}),
      h("select", {class: "narrow", "aria-label": "Sort by", onchange}, options),
      h("button", {
        class: "chip",
        "aria-pressed": String(isGrouped),
        onclick: () => chooseInList({group: isGrouped ? "" : "flow"}),
      }, "Group by flow"),
      this.menu);
  }

  /** The button that turns a filter by a status on and off. */
  statusChip(status) {
    const isOnly = this.terms.some(({field, values, isExcluded}) =>
      field === "status" && !isExcluded && values.length === 1 && values[0] === status);
    const others = this.query.replace(/(?:^|\s)status:\S*/gi, "").trim();
    const query = isOnly ? others : `${others} status:${status}`.trim();
    return h("button", {
      class: "chip",
      "aria-pressed": String(isOnly),
      onclick: () => { location.hash = listLink(query, this.choices); },
    }, status);
  }

  rowOf(entry) {
    const isSame = entry.columns === this.choices.columns && !entry.isStale;
    if (entry.row && isSame) return entry.row;
    const fresh = runRow(entry, this.columns);
    entry.row = entry.row ? patch(entry.row, fresh) : fresh;
    Object.assign(entry, {isStale: false, columns: this.choices.columns});
    return entry.row;
  }

  groupOf(flow, entries) {
    const fresh = flowHead(flow, entries, 1 + COLUMNS.length + this.columns.length);
    const known = this.heads.get(flow);
    this.heads.set(flow, known ? patch(known, fresh) : fresh);
    return [this.heads.get(flow), ...entries.map((entry) => this.rowOf(entry))];
  }

  draw() {
    const shown = [...runs.values()]
      .filter(({run}) => this.terms.every((term) => matches(run, term)))
      .sort(compareRuns(this.sort));
    sync(this.body, this.choices.group
      ? groupByFlow(shown).flatMap(([flow, entries]) => this.groupOf(flow, entries))
      : shown.map((entry) => this.rowOf(entry)));
    const names = [...runs.values()].flatMap(({parameters}) => Object.keys(parameters || {}));
    const known = [...new Set([...this.columns, ...names])].sort();
    fill(this.menu, ...columnsMenu(this.columns, known));
    this.table.classList.toggle("no-project", !shown.some(({run}) => projectOf(run)));
    fill(this.none, ...this.emptyList(shown.length));
    showMarked();
    this.running = shown.filter(({run}) => run.status === "running").length;
    this.newest = shown.reduce((one, {run}) =>
      (one && one.ts_epoch > run.ts_epoch ? one : run), null);
    this.showTab();
  }

  /** What is said if the filter makes no sense, or if no run is shown. */
  emptyList(count) {
    if (this.problem) return [h("p", {class: "note danger", role: "alert"}, this.problem)];
    if (count) return [];
    if (!this.isLoaded) return [note("Loading \u2026")];
    if (this.terms.length) return [note("No run matches the filter.")];
    return [note("No runs yet. Start one: ", code("metaflow-local-service run python flow.py run"),
      " and it appears here.")];
  }

  showTab() {
    const {running, newest: last} = this;
    if (unseen.run) showInTab(unseen.run.status, `${unseen.run.status}: ${unseen.run.flow_id}`);
    else if (running) showInTab("running", `${running} running \u00b7 Metaflow runs`);
    else showInTab(last && last.status, "Metaflow runs");
  }

  /** Loads the first page, or as many as there are runs of from an earlier view of the list. */
  async open() {
    this.page = Math.ceil(runs.size / this.asked._limit) || 1;
    await this.catchUp();
  }

  async load() {
    this.more.hidden = true; // so that the observer sees it again when it is shown
    this.page += 1;
    await this.showPage(await this.fetchPage(this.page));
  }

  async showPage({data, pages}) {
    this.isLoaded = true;
    this.draw();
    this.more.hidden = !data.length || !pages || !pages.next;
    if (this.columns.length) {
      await fetchParameters([...runs.values()]);
      this.draw();
    }
  }

  async fetchPage(page) {
    const fetched = await get("/runs?" + new URLSearchParams({...this.asked, _page: page}));
    fetched.data.forEach(keepRun);
    return fetched;
  }

  /** Loads all pages anew, and keeps no others: they were deleted, or are not among these pages. */
  async catchUp() {
    const known = [...runs.keys()];
    const there = new Set();
    let fetched;
    for (let page = 1; page <= this.page; page += 1) {
      fetched = await this.fetchPage(page);
      fetched.data.forEach((run) => there.add(runKey(run)));
    }
    known.filter((key) => !there.has(key)).forEach((key) => runs.delete(key));
    await this.showPage(fetched);
    await checkMarks();
  }

  /** Finds the names of parameters, from the newest run of each flow. */
  async findColumns() {
    if (!this.menu.open) return;
    const flows = groupByFlow([...runs.values()].sort(compareRuns(parseSort(""))));
    await fetchParameters(flows.map(([, [entry]]) => entry));
    this.draw();
  }
}

async function listView(mine, query) {
  const list = new RunList(query);
  Object.assign(mine, {
    draw: () => list.draw(),
    showTab: () => list.showTab(),
    catchUp: () => list.catchUp(),
  });
  list.draw();
  const shown = panel("runs", "Runs", wrapTable("Runs", list.table), list.none);
  showNodes(list.newToolbar(), shown, list.more);
  await list.open();
  const scrolled = new IntersectionObserver((seen) => {
    if (seen.at(-1).isIntersecting) list.load().catch(fail);
  });
  scrolled.observe(list.more);
  mine.signal.addEventListener("abort", () => scrolled.disconnect());
  subscribe(mine, "/runs", keepRun, ({flow_id: flow, run}) => forgetRun(`${flow}/${run}`));
}

// ---- Run: its facts, why it failed, its graph, and a timeline with a bar for each attempt ----

const FOLDED = 12;
const TICKS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800,
  21600, 43200, 86400];
const newest = (task) => task.attempts.at(-1);
const taskId = (row) => String(row.task_name || row.task_id);
const isHidden = (row) => row.step_name.startsWith("_");
const pathspecLink = (pathspec) => link(...pathspec.split("/"));

/** Why a run or an attempt failed: the task, what was raised where, and the end of stderr. */
function causePanel(cause, isCaught) {
  if (!cause) return [];
  const headline = cause.type ? [cause.type, cause.message].filter(Boolean).join(": ")
    : cause.message ? `${capital(cause.kind)}: ${cause.message}` : cause.summary || cause.kind;
  const isOfTask = cause.task_id !== null && cause.task_id !== undefined;
  const attempt = Number.isInteger(cause.attempt_id) && `${cause.attempt_id} (from 0)` +
    (cause.attempts ? ` of ${cause.attempts}` : "");
  const opened = isOfTask && pathspecLink(cause.pathspec);
  const place = cause.file && (cause.line ? `${cause.file}:${cause.line}` : cause.file);
  const words = (cause.stderr || []).join("\n");
  return [h("section", {class: "panel cause", id: "cause", "aria-label": "Why it failed"},
    titled(headline, opened ? h("a", {class: "link", href: opened}, "Open the task") : null),
    facts([
      isOfTask ? ["Task", code(cause.pathspec)] : null,
      ["Attempt", attempt],
      ["Line", place && code(place)],
      ["What happened", isCaught ? `${cause.kind}, and caught` : cause.kind],
    ]),
    words ? h("pre", {tabindex: 0, "aria-label": "Last lines of standard error"}, words) : null)];
}

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

/** The tags of a run. A click filters the list by one; they can be removed, and added. */
function tagEditor(flow, id, changed) {
  const list = h("div", {class: "tags"});
  const field = h("input", {"aria-label": "New tag", placeholder: "New tag", size: 14});
  const said = h("span", {class: "danger", role: "alert"});
  const form = h("form", {hidden: true}, field);
  const opener = h("button", {class: "bare", onclick: () => openField(true)}, "Add a tag");
  const mutate = async (tags) => {
    said.textContent = "";
    try {
      await change("PATCH", `${runPath(flow, id)}/tag/mutate`, tags);
      await changed();
    } catch (problem) {
      said.textContent = problem.message;
    }
  };
  const openField = (isOpen) => {
    form.hidden = !isOpen;
    opener.hidden = isOpen;
    (isOpen ? field : opener).focus();
  };
  field.onkeydown = (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    openField(false);
  };
  form.onsubmit = (event) => {
    event.preventDefault();
    const name = field.value.trim();
    field.value = "";
    if (name) mutate({tags_to_add: [name]});
    else openField(false);
  };
  const show = (tags) => fill(list, tags.map((name) => h("span", {class: "tag"},
    h("button", {title: "Only runs tagged " + name, onclick: () => filterByTag(name)}, name),
    h("button", {
      "aria-label": "Remove the tag " + name,
      onclick: () => mutate({tags_to_remove: [name]}),
    }, "\u00d7"))));
  return {node: h("div", {class: "tags", id: "tags"}, list, opener, form, said), show};
}

async function deleteRun(flow, id, menu) {
  const text = `${flow}/${id} is deleted with its records, logs and cards, and at the next "gc" ` +
    "the artifacts that no other run has. This cannot be undone.";
  closeMenu(menu); // the focus returns there after the dialog
  const choices = [["Cancel", ""], ["Delete", "delete", "danger"]];
  if (!await openDialog("Delete this run?", h("p", null, text), choices)) return;
  try {
    await change("DELETE", runPath(flow, id));
    forgetRun(`${flow}/${id}`);
    location.hash = listHash;
  } catch (problem) {
    tell("The run was not deleted", h("p", null, problem.message));
  }
}

/** Replaces the view of a run that was deleted, from this page or elsewhere. */
function showDeleted(flow, id) {
  view.abort();
  view = newView();
  forgetRun(`${flow}/${id}`);
  showInTab("", `${flow}/${id}`);
  showNodes(h("h1", null, `${flow}/${id}`), panel("deleted", "Deleted", note(
    "This run was deleted. ", h("a", {class: "link", href: listHash}, "All runs"))));
}

/** Follows a run, and finds out if it was deleted while the connection was lost. */
function followRun(mine, flow, id, keep) {
  const drop = () => showDeleted(flow, id);
  subscribe(mine, runPath(flow, id), keep, drop);
  mine.catchUp = async () => {
    const {data} = await getIfAny(runPath(flow, id), null);
    if (!data && runs.has(`${flow}/${id}`)) drop();
  };
}

// The graph. The layer of a step is the length of the longest path to it, without back edges.

/** Sorts the steps topologically, and tells which edges go back. */
function orderSteps(steps, start) {
  const states = new Map();
  const back = new Set();
  const order = [];
  const visit = (name) => {
    states.set(name, "open");
    for (const next of [...(steps[name].next || [])].reverse()) {
      if (!steps[next]) continue;
      if (states.get(next) === "open") back.add(name + ">" + next);
      else if (!states.has(next)) visit(next);
    }
    states.set(name, "done");
    order.unshift(name);
  };
  for (const name of [start, ...Object.keys(steps)]) {
    if (steps[name] && !states.has(name)) visit(name);
  }
  return {order, isBack: (from, to) => back.has(from + ">" + to)};
}

/** The number of foreach splits around each step. */
function foreachDepths(steps) {
  const depths = new Map();
  const enter = (name, end, seen) => {
    if (name === end || seen.has(name) || !steps[name]) return;
    seen.add(name);
    depths.set(name, (depths.get(name) || 0) + 1);
    (steps[name].next || []).forEach((next) => enter(next, end, seen));
  };
  for (const {type, next, matching_join: end} of Object.values(steps)) {
    if (!/^split-(foreach|parallel)$/.test(type)) continue;
    const seen = new Set();
    (next || []).forEach((name) => enter(name, end, seen));
  }
  return depths;
}

/** Lays out a graph: nodes in layers, and edges as chains with a node in each layer. */
function layOut(graph) {
  const {steps} = graph;
  const start = [].concat(graph.graph_structure || []).find((item) => steps[item]) || "start";
  const {order, isBack} = orderSteps(steps, start);
  const depths = foreachDepths(steps);
  const nodes = new Map(order.map((name) => [name,
    {name, layer: 0, row: 0, before: [], depth: depths.get(name) || 0, info: steps[name]}]));
  const pairs = order.flatMap((from) => [...new Set(steps[from].next || [])]
    .filter((to) => nodes.has(to)).map((to) => [nodes.get(from), nodes.get(to)]));
  const forward = pairs.filter(([from, to]) => !isBack(from.name, to.name));
  for (const [from, to] of forward) to.layer = Math.max(to.layer, from.layer + 1);
  const layers = [];
  const put = (node) => (layers[node.layer] = layers[node.layer] || []).push(node);
  nodes.forEach(put);
  const edges = forward.map(([from, to]) => {
    const chain = [from];
    for (let layer = from.layer + 1; layer < to.layer; layer += 1) {
      chain.push({name: null, layer, row: 0, before: [chain.at(-1)]});
      put(chain.at(-1));
    }
    to.before.push(chain.at(-1));
    return [...chain, to];
  });
  for (const layer of layers) placeInLayer(layer);
  const loops = pairs.filter(([from, to]) => isBack(from.name, to.name));
  return {nodes, layers, edges, loops, order};
}

/** Gives the nodes of a layer rows around 0, in the order of the nodes that lead to them. */
function placeInLayer(layer) {
  const middle = ({before}) => before.reduce((sum, {row}) => sum + row, 0) / (before.length || 1);
  const middles = new Map(layer.map((node) => [node, middle(node)]));
  layer.sort((one, other) => middles.get(one) - middles.get(other));
  layer.forEach((node, at) => { node.row = at - (layer.length - 1) / 2; });
}

/** The values for which a switch goes to a step. */
function caseOf(from, to) {
  const cases = Object.entries(from.info.switch_cases || {});
  return cases.filter(([, step]) => step === to.name).map(([value]) => value).join(", ");
}

const ROW_HEIGHT = 74;
const NODE_HEIGHT = 48;
const EDGE_WIDTH = 36;
const COLUMN = {least: 140, most: 300};

function graphView(graph, newNode) {
  const {nodes, layers, edges, loops, order} = layOut(graph);
  const rows = nodes.size && layers.map((layer) => layer.length);
  const height = Math.max(...rows) * ROW_HEIGHT + 24 + (loops.length ? 20 : 0);
  const picture = draw("svg", {"aria-hidden": "true"});
  const boxes = new Map(order.map((name) => [name, newNode(name)]));
  const canvas = h("div", null, picture, ...boxes.values());
  const hint = h("div", {class: "hint dim", hidden: true}, "Scroll sideways for the rest \u2192");
  const box = h("div", {class: "graph", tabindex: 0, role: "group", "aria-label": "Graph"},
    canvas, hint);
  const middle = Math.max(...rows) * ROW_HEIGHT / 2 + 12;
  const place = (column) => (node) => ({
    x: 20 + node.layer * column,
    y: middle + node.row * ROW_HEIGHT,
  });
  function arrange() {
    const room = box.clientWidth - 40;
    const wide = (room + EDGE_WIDTH) / layers.length;
    const column = Math.min(COLUMN.most, Math.max(COLUMN.least, wide));
    const width = column - EDGE_WIDTH;
    const at = place(column);
    const total = layers.length * column - EDGE_WIDTH + 40;
    canvas.style = `width:${total}px;height:${height}px`;
    picture.setAttribute("viewBox", `0 0 ${total} ${height}`);
    for (const [name, node] of boxes) {
      const {x, y} = at(nodes.get(name));
      node.style = `left:${x}px;top:${y - NODE_HEIGHT / 2}px;width:${width}px;` +
        `height:${NODE_HEIGHT}px`;
    }
    const head = draw("marker", {id: "arrow", viewBox: "0 0 8 8", refX: 7, refY: 4,
      markerWidth: 7, markerHeight: 7, orient: "auto"}, draw("path", {d: "M0 0L8 4L0 8z"}));
    sync(picture, [head, ...edges.flatMap((chain) => drawEdge(chain, at, width)),
      ...loops.flatMap(([from, to]) => drawLoop(at(from), at(to), width, caseOf(from, to)))]);
    hint.hidden = total <= box.clientWidth + 1;
  }
  new ResizeObserver(arrange).observe(box);
  return {box, boxes, nodes, edges: picture, order};
}

function drawEdge(chain, at, width) {
  const points = chain.map(at);
  const line = points.slice(1).map((to, index) => {
    const from = points[index];
    const x = from.x + width;
    const end = index === points.length - 2 ? to.x - 2 : to.x;
    const middle = (x + end) / 2;
    const through = index === points.length - 2 ? "" : `H${to.x + width}`;
    return `C${middle} ${from.y} ${middle} ${to.y} ${end} ${to.y}${through}`;
  });
  const [first] = points;
  const last = points.at(-1);
  const label = caseOf(chain[0], chain.at(-1));
  const props = {"data-to": chain.at(-1).name, "marker-end": "url(#arrow)"};
  return [
    draw("path", {...props, d: `M${first.x + width} ${first.y}${line.join("")}`}),
    ...label ? [edgeLabel(label, last.x - 12, last.y + (last.y > first.y ? 16 : -8),
      {"data-to": chain.at(-1).name})] : [],
  ];
}

const edgeLabel = (label, x, y, props) =>
  draw("text", {...props, x, y, "text-anchor": "end"}, label);

function drawLoop(from, to, width, label) {
  const below = NODE_HEIGHT / 2;
  const depth = from.x === to.x ? 22 : 30;
  const start = from.x + width * 0.7;
  const end = to.x + width * 0.3;
  const bottom = Math.max(from.y, to.y) + below + depth;
  const line = draw("path", {
    class: "back",
    "marker-end": "url(#arrow)",
    d: `M${start} ${from.y + below}C${start} ${bottom} ${end} ${bottom} ${end} ${to.y + below + 2}`,
  });
  return [line, edgeLabel(label, end - 8, to.y + below + 16)];
}

/** Whether switches have gone past a step, or past all steps that lead to it. */
function wasNotTaken(name, nodes, steps, known = new Map()) {
  if (known.has(name)) return known.get(name);
  known.set(name, false);
  const isDone = (from) => [...steps.get(from).tasks.values()]
    .every((task) => newest(task).status === "completed");
  const isPassed = ({name: from, info}) => {
    if (!steps.has(from)) return wasNotTaken(from, nodes, steps, known);
    return info.type === "split-switch" && isDone(from) &&
      info.next.some((next) => next !== name && next !== from && steps.has(next));
  };
  const before = [...nodes.values()].filter(({info}) => (info.next || []).includes(name));
  const isTrue = before.length > 0 && before.every(isPassed);
  known.set(name, isTrue);
  return isTrue;
}

function summary({tasks}) {
  const all = [...tasks.values()].map(newest);
  const counts = {};
  for (const {status} of all) counts[status] = (counts[status] || 0) + 1;
  const status = STATUSES.find((name) => counts[name]);
  const others = STATUSES.filter((name) => counts[name] && name !== "completed")
    .map((name) => `${grouped(counts[name])} ${name}`);
  const isCloned = all.length > 0 && all.every((row) => row.origin_pathspec);
  return {status, all, counts, others, isCloned};
}

function stepTime({all}) {
  const starts = all.map(startOf);
  const ends = all.map((row) => (row.status === "running" ? Date.now() : row.finished_at || 0));
  return {from: Math.min(...starts), to: Math.max(...ends)};
}

/** The status and text of a step that has tasks. */
function nodeContent(name, step) {
  const told = summary(step);
  const {from, to} = stepTime(told);
  const took = told.isCloned ? "cloned" : duration(to - from);
  const isOne = told.all.length === 1;
  const status = isOne ? [told.status].filter((one) => one !== "completed") : told.others;
  const text = [...status, ...(isOne ? [] : [plural(told.all.length, "task")]), took];
  return {status: told.status, isCloned: told.isCloned, text: text.join(" \u00b7 ")};
}

/** The text of a step that has no tasks. */
function absence(name, run, nodes, steps) {
  if (run.status === "completed" || wasNotTaken(name, nodes, steps)) return "not taken";
  return run.status === "failed" ? "not reached" : "not started";
}

// The timeline.

const secondsInto = (run, ms) => Math.max(0, ms - run.ts_epoch) / 1000;

function taskRow(run, task, isSingle) {
  const last = newest(task);
  const tries = task.attempts.filter(Boolean).length;
  const hasBegun = (row) => row && (row.started_at || row.status === "running");
  const place = (row) => `--from:${secondsInto(run, startOf(row))};--to:` +
    (row.status === "running" ? "var(--now)"
      : secondsInto(run, row.finished_at || row.started_at));
  const bar = (row) => h("span", {
    class: `bar ${colour(row.status)}${row.origin_pathspec ? " cloned" : ""}`,
    style: place(row),
    title: `attempt ${row.attempt_id}: ${row.status}` +
      (row.origin_pathspec ? `, cloned from ${row.origin_pathspec}` : ""),
  });
  const id = taskId(last);
  const label = isSingle ? last.step_name : last.foreach_label || id;
  const shown = [label, isSingle || label === id ? "" : " " + id].join("");
  const more = [last.status, tries > 1 ? plural(tries, "attempt") : "",
    last.origin_pathspec ? "cloned" : ""].filter(Boolean).join(", ");
  return h("a", {
    class: "row nav",
    "data-status": last.status,
    "data-task": `${last.step_name}/${id}`,
    href: link(run.flow_id, runId(run), last.step_name, id),
    title: shown,
  },
  h("span", {class: isSingle ? "" : "under"}, label,
    shown === label ? null : h("span", {class: "dim"}, " " + id),
    h("span", {class: "hidden-text"}, `${isSingle ? "" : ` in ${last.step_name}`}: ${more}`)),
  h("span", {class: "lane"}, task.attempts.filter(hasBegun).map(bar)),
  h("span", {class: "number"}, tries > 1 ? h("span", {class: "dim"}, `${tries} tries `) : null,
    last.origin_pathspec ? h("span", {class: "dim"}, "cloned ") : null, elapsed(last)));
}

function stepHead(run, step) {
  const told = summary(step);
  const {from, to} = stepTime(told);
  const end = told.counts.running ? "var(--now)" : secondsInto(run, to);
  const counts = [plural(told.all.length, "task"), ...told.others].join(", ");
  const pathspec = `${run.flow_id}/${runId(run)}/${step.name}`;
  return h("div", {class: "row step-head", tabindex: -1},
    h("span", {title: `${step.name}: ${counts}`}, step.name, h("span", {class: "dim"}, counts),
      copyButton(pathspec, pathspec)),
    h("span", {class: "lane"}, h("span", {
      class: "bar " + colour(told.status),
      style: `--from:${secondsInto(run, from)};--to:${end}`,
    })),
    h("span", {class: "number", "data-since": told.counts.running && from},
      duration(to - from)));
}

const TASK_ORDERS = {
  begin: ["As they began", (one, other) => beginOf(one) - beginOf(other)],
  longest: ["Longest first", (one, other) => taskTime(other) - taskTime(one)],
  value: ["By value", (one, other) => labelOf(one).localeCompare(labelOf(other), "en",
    {numeric: true})],
};
const startOf = (row) => row.started_at || row.ts_epoch;
const beginOf = (task) => startOf(task.attempts.find(Boolean));
const labelOf = (task) => newest(task).foreach_label || taskId(newest(task));

function taskTime(task) {
  const {status, started_at: from, finished_at: to, ts_epoch: made} = newest(task);
  return (status === "running" ? Date.now() : to || made) - (from || made);
}

/** The controls of the timeline, and the state that they set. */
function timelineControls(flow, id, changed) {
  const state = {text: "", order: "begin", onlyFailed: false, found: null};
  const said = h("span", {class: "dim", role: "status"});
  let typed = 0;
  let asked = null;
  const searchTasks = () => {
    if (asked) asked.close();
    asked = null;
    state.found = null;
    said.textContent = "";
    const [, key, value] = /^(\w+):(.*)$/.exec(state.text) || [];
    if (key) {
      said.textContent = "Searching \u2026";
      asked = searchArtifacts(flow, id, key, value, ({matches: found = [], message}) => {
        state.found = new Set(found.map((task) => `${task.step_name}/${task.task_id}`));
        said.textContent = message || plural(found.length, "task");
        changed();
      });
    }
    changed();
  };
  const box = h("input", {
    type: "search",
    placeholder: "Value, id, or artifact:value",
    size: 26,
    "aria-label": "Search tasks by value, id, or artifact:value",
    oninput: (event) => {
      state.text = event.target.value.trim();
      clearTimeout(typed);
      typed = setTimeout(searchTasks, 250);
    },
  });
  const order = h("select", {
    "aria-label": "Order of tasks",
    onchange: (event) => {
      state.order = event.target.value;
      changed();
    },
  }, Object.entries(TASK_ORDERS).map(([value, [title]]) => h("option", {value}, title)));
  const failed = h("label", null, h("input", {
    type: "checkbox",
    onchange: (event) => {
      state.onlyFailed = event.target.checked;
      changed();
    },
  }), "Only failed");
  return {state, nodes: [said, box, order, failed]};
}

/** Searches the tasks that have an artifact or a foreach variable of this name and value. */
function searchArtifacts(flow, id, key, value, answer) {
  const query = new URLSearchParams({key, value, scope: "ARTIFACT,FOREACH_VARIABLE"});
  const socket = new WebSocket(`${SOCKETS}/api/search${runPath(flow, id)}?${query}`);
  socket.onmessage = ({data}) => {
    const {event} = JSON.parse(data);
    if (event.type === "result" || event.type === "error") answer(event);
  };
  return socket;
}

/** Whether a task is shown, by the state of the controls. */
function isShownTask(task, {text, onlyFailed, found}) {
  const last = newest(task);
  if (onlyFailed && !task.attempts.some((row) => row && row.status === "failed")) return false;
  if (!text) return true;
  const names = [last.step_name, last.foreach_label || "", taskId(last)];
  const isNamed = names.some((name) => name.toLowerCase().includes(text.toLowerCase()));
  return isNamed || (found !== null && found.has(`${last.step_name}/${last.task_id}`));
}

/** The rows of a step; of a long foreach, those of its first tasks and of the first failed ones. */
function stepRows(run, step, state, redraw) {
  const all = [...step.tasks.values()];
  const isSingle = all.length === 1;
  const wanted = all.filter((task) => isShownTask(task, state)).sort(TASK_ORDERS[state.order][1]);
  const isFailed = (task) => newest(task).status === "failed";
  const rest = wanted.slice(FOLDED);
  const shown = step.open ? wanted
    : [...wanted.slice(0, FOLDED), ...rest.filter(isFailed).slice(0, FOLDED)];
  for (const task of shown) {
    if (!task.isStale && task.isSingle === isSingle) continue;
    const fresh = taskRow(run, task, isSingle);
    task.row = task.row ? patch(task.row, fresh) : fresh;
    Object.assign(task, {isSingle, isStale: false});
  }
  if (!isSingle && wanted.length) patch(step.head, stepHead(run, step));
  step.fold.textContent = step.open ? "Show fewer" : `Show all ${grouped(wanted.length)}`;
  step.fold.onclick = () => {
    step.open = !step.open;
    redraw();
  };
  return [...(isSingle || !wanted.length ? [] : [step.head]), ...shown.map((task) => task.row),
    ...(rest.length ? [step.fold] : [])];
}

function newStep(name) {
  return {
    name,
    tasks: new Map(),
    node: h("div"),
    head: h("div"),
    fold: h("button", {class: "fold"}),
    open: false,
  };
}

/** The code that loads or resumes a run; `script`: the file of its flow, if it is known. */
function runSnippets(flow, id, script) {
  return [
    ["Pathspec", `${flow}/${id}`],
    ["Python", `from metaflow import Run\nrun = Run(${JSON.stringify(`${flow}/${id}`)})`],
    ["What it did", `metaflow-local-service show ${shellQuote(`${flow}/${id}`)}`],
    ["Its logs", `metaflow-local-service logs -f ${shellQuote(`${flow}/${id}`)}`],
    ["Go on from it", "metaflow-local-service run python " +
      `${shellQuote(script || "flow.py")} resume --origin-run-id ${shellQuote(id)}`],
  ];
}

function parametersPanel(parameters) {
  const named = Object.entries(parameters);
  if (!named.length) return [];
  const rows = named.map(([name, {value}]) =>
    h("tr", null, cell(code(name)), cell(h("pre", null, JSON.stringify(value)))));
  const table = wrapTable("Parameters", tableOf("names", ["Name", "Value"], rows));
  const isLong = named.length > 8 || JSON.stringify(parameters).length > 600;
  return [isLong ? folded("parameters", `Parameters (${named.length})`, table)
    : panel("parameters", "Parameters", titled("Parameters"), table)];
}

/** The page of a run. */
class RunPage {
  constructor(flow, id) {
    Object.assign(this, {flow, id});
    this.base = runPath(flow, id);
    this.run = {};
    this.steps = new Map();
    this.graph = null;
    this.end = 0; // of the tasks that have ended
    this.details = null; // set when they have been requested, which is done once
    this.script = null; // the file of the flow
    this.head = h("div", {id: "head"});
    this.why = h("div");
    this.parts = h("div");
    this.changes = h("div");
    this.use = h("div");
    this.rows = h("div");
    this.axis = h("span", {class: "lane"});
    this.grid = h("span", {class: "lane"});
    this.tags = tagEditor(flow, id, async () => this.keep((await get(this.base)).data));
    this.controls = timelineControls(flow, id, () => this.draw());
    this.lanes = h("div", {class: "timeline"},
      h("div", {class: "grid"}, h("div", {class: "row"}, h("span"), this.grid, h("span"))),
      h("div", {class: "row dim axis", "aria-hidden": "true"}, h("span"), this.axis, h("span")),
      this.rows);
    this.timeline = panel("timeline", "Timeline", titled("Timeline", ...this.controls.nodes),
      this.lanes);
  }

  nodes() {
    return [this.head, this.tags.node, this.why, this.changes, this.parts, this.timeline, this.use];
  }

  keep(row) {
    this.run = row;
    keepRun(row);
    this.draw();
  }

  keepTask(row) {
    if (row.finished_at || !isHidden(row)) {
      this.details = this.details || this.showDetails().catch(fail);
    }
    if (isHidden(row)) return;
    const step = this.steps.get(row.step_name) || newStep(row.step_name);
    const task = step.tasks.get(taskId(row)) || {attempts: [], row: null};
    this.steps.set(row.step_name, step);
    step.tasks.set(taskId(row), Object.assign(task, {isStale: true}));
    task.attempts[row.attempt_id || 0] = row;
    this.end = Math.max(this.end, row.finished_at || row.started_at || 0);
  }

  /** Fetches the graph and the parameters, which are there when the first task has begun. */
  async showDetails() {
    const [{data: graph}, {data: parameters}] = await Promise.all(
      [getIfAny(this.base + "/dag", {}), getIfAny(this.base + "/parameters", {})]);
    if (graph.steps) {
      this.graph = graphView(graph, (name) => h("a", {class: "node", "data-step": name}));
      this.parts.append(panel("dag", "Graph", titled("Graph"), this.graph.box));
    }
    this.parts.append(...parametersPanel(parameters));
    this.script = graph.file;
    this.drawCode();
    this.draw();
    const {data: found} = await getIfAny(this.base + "/changes", null);
    if (found) this.changes.replaceChildren(changesPanel(found));
  }

  drawCode() {
    this.use.replaceChildren(codePanel(runSnippets(this.flow, this.id, this.script)));
  }

  draw() {
    const {run} = this;
    this.drawHead();
    this.tags.node.hidden = this.timeline.hidden = !run.status;
    this.showTab();
    if (!run.status) return;
    this.tags.show(run.tags);
    fill(this.why, ...causePanel(run.cause));
    if (!this.use.firstChild) this.drawCode();
    if (this.graph) {
      for (const [name, node] of this.graph.boxes) this.drawNode(name, node);
    }
    this.drawRows();
    this.tick();
  }

  drawHead() {
    const {run, flow, id} = this;
    const menu = h("details", {class: "menu"}, h("summary", null, "More"), h("div", null,
      h("button", {
        class: "danger",
        onclick: ({target}) => deleteRun(flow, id, target.closest("details")),
      }, "Delete this run")));
    const known = run.status ? [badge(run.status), h("span", {class: "space"}),
      copyButton(`${flow}/${id}`, "pathspec"), menu] : [];
    this.head.dataset.status = run.status || "";
    fill(this.head, h("div", {class: "head"}, h("h1", null, `${flow}/${id}`), ...known),
      run.status ? facts([
        ["Started", longTime(run.ts_epoch)],
        ["Finished", longTime(run.finished_at)],
        ["Duration", elapsed(run)],
        ["User", userOf(run)],
        ["Project", systemTag(run, "project")],
        ["Branch", systemTag(run, "project_branch")],
        ["Resumed from", run.origin_run_id && h("a",
          {class: "link", href: link(flow, run.origin_run_id)}, run.origin_run_id)],
      ]) : note("It is not there. If it starts, it appears here."));
  }

  showTab() {
    showInTab(this.run.status, `${this.flow}/${this.id}`);
  }

  /** Draws a step. It links to its failed or only task, or else scrolls to its tasks below. */
  drawNode(name, node) {
    const step = this.steps.get(name);
    const {info, depth} = this.graph.nodes.get(name);
    const {status, isCloned, text} = step ? nodeContent(name, step)
      : {text: absence(name, this.run, this.graph.nodes, this.steps)};
    const tasks = step ? [...step.tasks.values()] : [];
    const target = tasks.find((task) => newest(task).status === "failed") || tasks[0];
    const classes = ["node", colour(status), depth > 0 && "many", isCloned && "cloned",
      !step && "unreached"];
    const toTimeline = (event) => {
      if (tasks.length < 2 || status === "failed") return;
      event.preventDefault();
      step.head.scrollIntoView({block: "start"});
      step.head.focus({preventScroll: true});
    };
    patch(node, h("a", {
      class: classes.filter(Boolean).join(" "),
      style: node.getAttribute("style"),
      "data-step": name,
      title: [`${name}: ${text}`, info.doc, depth > 0 ? "in a foreach" : ""]
        .filter(Boolean).join("\n"),
      href: target && link(this.flow, this.id, name, taskId(newest(target))),
      onclick: toTimeline,
    }, h("span", null, name), h("span", {class: "dim"}, text),
    status ? h("span", {class: "hidden-text"}, status) : null));
    for (const edge of this.graph.edges.querySelectorAll(`[data-to="${CSS.escape(name)}"]`)) {
      edge.classList.toggle("not-taken", text === "not taken");
    }
  }

  /** Draws the rows of the timeline, with the steps in the order of the graph. */
  drawRows() {
    const order = this.graph ? this.graph.order : [];
    const place = ({name}) => (order.includes(name) ? order.indexOf(name) : order.length);
    const steps = [...this.steps.values()].sort((one, other) => place(one) - place(other));
    const shown = steps.filter((step) => {
      const nodes = stepRows(this.run, step, this.controls.state, () => this.draw());
      sync(step.node, nodes);
      return nodes.length > 0;
    });
    const empty = note(steps.length ? "No task matches." : "No step has started yet.");
    sync(this.rows, shown.length ? shown.map(({node}) => node) : [empty]);
  }

  /** Draws the axis. If the run is running, it ends at the next tick, so that bars rarely move. */
  tick() {
    const {run} = this;
    const isRunning = run.status === "running";
    const last = isRunning ? Date.now() : Math.max(this.end, run.finished_at);
    const now = Math.max(100, last - run.ts_epoch) / 1000;
    const most = this.lanes.clientWidth > 900 ? 10 : 5;
    const tick = TICKS.find((size) => now / size <= most) || now / 5;
    const span = isRunning ? Math.ceil(now / tick) * tick : now * 1.01;
    const marks = Array.from({length: Math.ceil(span / tick - 0.3)}, (_, at) => at * tick);
    const newMark = (at, text) => h("span", {class: "tick", style: `--from:${at}`}, text);
    this.lanes.style = `--now:${now};--span:${span}`;
    const short = (at) => duration(at * 1000).replace(/(?<=[mh]) 0[sm]$/, "");
    fill(this.axis, marks.map((at) => newMark(at, short(at))));
    fill(this.grid, marks.map((at) => newMark(at, "")));
  }
}

async function runView(mine, flow, id) {
  const shown = new RunPage(flow, id);
  const query = "?_order=%2Bts_epoch&_limit=1000&postprocess=false";
  const {data: run} = await getIfAny(shown.base, null);
  if (run) shown.keep(run);
  (await getAll(shown.base + "/tasks" + query)).forEach((row) => shown.keepTask(row));
  showNodes(...shown.nodes());
  Object.assign(mine, {
    draw: () => shown.draw(),
    showTab: () => shown.showTab(),
    tick: () => shown.tick(),
  });
  shown.draw();
  followRun(mine, flow, id, (row) => shown.keep(row));
  subscribe(mine, shown.base + "/tasks", (row) => shown.keepTask(row));
}

// ---- Task: the logs, cards, artifacts and metadata of an attempt ----

const SETTLING = 10000; // if the service does not say whether the log is stored
const LONGEST_SETTLING = 600000;
const POLL = {first: 500, longest: 5000};
const LOG_PAGE = 1000;
const FEW_LINES = 200;

/** Whether an attempt is going on, has ended but may still store something, or is settled. */
function phase(row) {
  const {status, finished_at: end, is_log_stored: isStored} = row;
  if (!end && ["running", "pending"].includes(status)) return "going";
  const past = Date.now() - end;
  if (typeof isStored === "boolean") {
    return isStored || past > LONGEST_SETTLING ? "settled" : "ended";
  }
  return past > SETTLING ? "settled" : "ended";
}

const NOT_YET = {
  going: "Nothing yet. Metaflow stores what a task on this machine writes when the task ends.",
  ended: "Not stored yet. The task has ended; what it wrote comes when its process is gone.",
  settled: "Nothing was written.",
};

/** A part of the page of a task; `load` fetches its data and returns the node to show. */
function newPart(id, title, load) {
  const node = h("div", null, emptyLine(id, title, "Loading \u2026"));
  const show = (shown) => sync(node, [shown].flat());
  const unread = (problem) => show(emptyLine(id, title, "It cannot be read. " + problem.message));
  return {node, load: () => load().then(show, unread)};
}

/** A line as a terminal shows it: \r and \b move back, and colours become classes. */
function terminalNodes(line) {
  if (!/[\x1b\r\b\x07]/.test(line)) return [line];
  const cells = [];
  let style = "";
  let at = 0;
  for (const [token, codes, kind] of line.matchAll(TERMINAL_TOKENS)) {
    if (kind === "m") style = nextStyle(style, codes);
    else if (kind === "K") cells.length = Math.min(cells.length, at);
    else if (token === "\r") at = 0;
    else if (token === "\b") at = Math.max(0, at - 1);
    else if (!"\x1b\x07".includes(token[0])) cells[at++] = [token, style];
  }
  const nodes = [];
  for (let from = 0; from < cells.length;) {
    let to = from;
    while (to < cells.length && cellStyle(cells[to]) === cellStyle(cells[from])) to += 1;
    const text = cells.slice(from, to).map((one) => (one ? one[0] : " ")).join("");
    const className = cellStyle(cells[from]);
    nodes.push(className ? h("span", {class: className}, text) : text);
    from = to;
  }
  return nodes;
}

const TERMINAL_TOKENS =
  /\x1b\[([\d;?]*)([A-Za-z])|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b.?|[^]/gu;
const cellStyle = (one) => (one ? one[1] : "");

/** The classes of the text that follows a colour sequence with these codes. */
function nextStyle(style, codes) {
  let classes = new Set(style.split(" ").filter(Boolean));
  const numbers = codes.split(";").map(Number);
  while (numbers.length) {
    const number = numbers.shift();
    const isExtended = number === 38 || number === 48; // 48 is a background, which is not shown
    const shade = isExtended ? extendedShade(numbers) : number % 10;
    const isColour = number === 38 || (number >= 30 && number <= 37) ||
      (number >= 90 && number <= 97);
    if (number === 0) classes = new Set();
    if (number === 1) classes.add("bold");
    if (number === 22) classes.delete("bold");
    if (isColour || number === 39) {
      classes = new Set([...classes].filter((name) => name === "bold"));
    }
    if (isColour && shade < 7) classes.add("c" + shade);
  }
  return [...classes].join(" ");
}

/** Takes the colour that follows 38 or 48 from these codes; returns the basic one next to it. */
function extendedShade(numbers) {
  const index = numbers.shift() === 5 ? numbers.shift() : null;
  if (index !== null && index < 16) return index % 8;
  if (index > 231) return 7;
  const cube = index === null ? numbers.splice(0, 3)
    : [Math.floor((index - 16) / 36), Math.floor((index - 16) / 6) % 6, (index - 16) % 6];
  const middle = (Math.max(...cube) + Math.min(...cube)) / 2;
  const isGrey = Math.max(...cube) - Math.min(...cube) < Math.max(...cube) / 5;
  return isGrey ? 7 : cube.reduce((sum, part, at) => sum + (part > middle ? 1 << at : 0), 0);
}

/** A log of an attempt. Its pages are loaded from the last one backwards, and kept. */
class Log {
  constructor(stream, title, attempt) {
    const {base, number} = attempt;
    Object.assign(this, {stream, title, attempt});
    this.id = "log-" + stream;
    this.url = `${base}/logs/${stream}?attempt_id=${number}&_limit=${LOG_PAGE}`;
    this.lines = new Map(); // by row: {text, node}
    this.lowest = 0; // the first page that was loaded
    this.highest = 0;
    this.hits = [];
    this.hit = -1;
    this.isFirstLook = true;
    this.inner = h("div");
    this.box = h("div", {class: "log", tabindex: 0, role: "group", "aria-label": title},
      this.inner);
    this.count = h("span", {class: "dim", role: "status"});
    this.field = h("input", {
      type: "search",
      placeholder: "Search",
      "aria-label": `Search in ${title.toLowerCase()}`,
      oninput: () => this.showHits(),
      onkeydown: (event) => this.nextHit(event),
    });
    this.earlier = h("div", {class: "earlier"},
      h("button", {onclick: () => this.loadEarlier(1)}, "Load earlier lines"),
      h("button", {onclick: () => this.loadEarlier(this.lowest - 1)}, "Load all"));
    const download = h("a", {
      class: "link",
      href: `${API}/api${base}/logs/${stream}/download?attempt_id=${number}`,
      download: "",
      "aria-label": `Download ${title.toLowerCase()}`,
    }, "Download");
    this.node = panel(this.id, title, titled(title, this.count, this.field, download), this.box);
  }

  /** The row that the address names, if it is one of this log. */
  target() {
    const {line} = this.attempt;
    return line && line.stream === this.stream ? line.row : null;
  }

  keepLines(rows) {
    for (const row of rows) {
      const known = this.lines.get(row.row);
      if (known && known.text === row.line) continue;
      this.lines.set(row.row, {text: row.line, node: this.newLine(row)});
    }
  }

  newLine({row, timestamp, line}) {
    const href = `${this.attempt.address}?log=${this.stream}&line=${row + 1}`;
    return h("div", {class: row === this.target() ? "line target" : "line"},
      h("a", {href, "data-row": row + 1, "aria-label": `Line ${row + 1}`, tabindex: -1}),
      timestamp ? h("time", {"data-ms": timestamp}, clock(timestamp)) : null,
      h("span", null, ...terminalNodes(line)));
  }

  async loadPage(page) {
    const {data} = await getIfAny(`${this.url}&_order=%2Brow&_page=${page}`, []);
    this.keepLines(data);
  }

  async loadEarlier(pages) {
    const to = Math.max(1, this.lowest - pages);
    let problem = "";
    this.earlier.inert = true;
    try {
      for (; this.lowest > to; this.lowest -= 1) {
        this.count.textContent = `Loading, ${plural(this.lowest - to, "page")} to go`;
        await this.loadPage(this.lowest - 1);
      }
    } catch ({message}) {
      problem = message;
    }
    this.earlier.inert = false;
    const below = this.box.scrollHeight - this.box.scrollTop;
    this.draw();
    this.box.scrollTop = this.box.scrollHeight - below;
    if (problem) this.count.textContent = problem;
  }

  /** Loads new lines, and at first as many pages as FEW_LINES or the target need. */
  async load() {
    const {data, pages} = await getIfAny(`${this.url}&_order=-row&_page=1`, []);
    const last = (pages && pages.last) || 1;
    const {scrollHeight, scrollTop, clientHeight} = this.box;
    const isAtEnd = this.isFirstLook || scrollHeight - scrollTop - clientHeight < 40;
    this.keepLines(data);
    for (let page = this.highest; page && page < last; page += 1) await this.loadPage(page);
    this.lowest = this.lowest || last;
    this.highest = last;
    const row = this.target();
    const wanted = row === null ? last : Math.floor(row / LOG_PAGE) + 1;
    while (this.lowest > 1 && (this.lines.size < FEW_LINES || this.lowest > wanted)) {
      this.lowest -= 1;
      await this.loadPage(this.lowest);
    }
    this.draw();
    if (!this.lines.size) return emptyLine(this.id, this.title, NOT_YET[this.attempt.phase()]);
    requestAnimationFrame(() => this.settleScroll(isAtEnd));
    return this.node;
  }

  draw() {
    const sorted = [...this.lines].sort(([one], [other]) => one - other);
    const nodes = sorted.map(([, {node}]) => node);
    sync(this.inner, this.lowest > 1 ? [this.earlier, ...nodes] : nodes);
    this.showHits();
  }

  /** Scrolls at first to the line that the address names; later on to the end, if it was there. */
  settleScroll(isAtEnd) {
    const line = this.inner.querySelector(".target");
    if (this.isFirstLook && line) {
      this.node.scrollIntoView({block: "center"});
      this.showLine(line);
    } else if (isAtEnd) {
      this.box.scrollTop = this.box.scrollHeight;
    }
    this.isFirstLook = false;
  }

  showLine(node) {
    this.box.scrollTop = node.offsetTop - this.box.offsetTop - this.box.clientHeight / 2;
  }

  showHits() {
    const text = this.field.value.toLowerCase();
    const lines = [...this.inner.querySelectorAll(".line")];
    const isHit = (node) => text && node.lastChild.textContent.toLowerCase().includes(text);
    this.hits = lines.filter(isHit);
    this.hit = -1;
    const found = new Set(this.hits);
    for (const node of lines) node.classList.toggle("hit", found.has(node));
    const where = this.lowest > 1 ? " of those loaded" : "";
    this.count.textContent = text ? plural(this.hits.length, "line") + where : "";
  }

  /** Scrolls to the next hit, or with Shift to the one before. */
  nextHit(event) {
    const {length} = this.hits;
    if (event.key !== "Enter" || !length) return;
    event.preventDefault();
    this.hit = (this.hit + (event.shiftKey ? -1 : 1) + length) % length;
    this.count.textContent = `${this.hit + 1} of ${plural(length, "line")}`;
    for (const node of this.inner.querySelectorAll(".target")) node.classList.remove("target");
    this.hits[this.hit].classList.add("target");
    this.showLine(this.hits[this.hit]);
  }
}

function logPart(stream, title, attempt) {
  const shown = new Log(stream, title, attempt);
  return newPart(shown.id, title, () => shown.load());
}

// Cards. Without allow-same-origin their scripts do not run as this page, and cannot use the API.
// CARD_FOLLOWER, see UI API, sends the height of a card, and whether new data need a new frame.

const cards = new Set(); // all that are shown
const TALLEST_CARD = 20000;
const FRESH_CARD = 2000; // for so long a frame is not replaced: its data may still arrive
const SILENT_CARD = {height: 480, after: 3000}; // for a frame that does not send its height

addEventListener("message", ({data, source}) => {
  for (const card of cards) {
    const frame = [card.next, card.frame].find((one) => one && one.contentWindow === source);
    if (frame) card.hear(frame, data || {});
  }
});

class Card {
  constructor(base, {hash, type, id}, number) {
    this.url = `${API}/api${base}/cards/${encodeURIComponent(hash)}`;
    this.title = "Card " + [`${number}: ${type}`, id].filter(Boolean).join(" \u00b7 ");
    this.box = h("div", {class: "card"});
    this.frame = null; // that is shown
    this.next = null; // that replaces it once it is drawn, so that nothing flickers
    this.data = null;
    this.opened = 0;
    const opened = h("a", {class: "link", href: this.url, target: "_blank", rel: "noopener"},
      "Open in a new tab");
    this.node = panel(null, this.title, titled(this.title, opened), this.box);
    this.open();
  }

  open() {
    this.opened = Date.now();
    this.next = h("iframe", {
      sandbox: "allow-scripts",
      title: this.title,
      src: this.url + "?embed=true&follow=true",
      onload: ({target}) => setTimeout(() => this.showSilent(target), SILENT_CARD.after),
    });
    this.box.append(this.next);
  }

  show(frame, height) {
    if (frame === this.next) {
      if (this.frame) this.frame.remove();
      [this.frame, this.next] = [frame, null];
      this.tell();
    }
    frame.classList.add("ready");
    frame.style.height = `${Math.min(TALLEST_CARD, Math.ceil(height))}px`;
  }

  showSilent(frame) {
    if (!frame.classList.contains("ready")) this.show(frame, SILENT_CARD.height);
  }

  tell() {
    if (this.frame && this.data) this.frame.contentWindow.postMessage(this.data, "*");
  }

  hear(frame, {cardHeight, cardIsStale}) {
    if (typeof cardHeight === "number" && cardHeight > 0) this.show(frame, cardHeight);
    if (cardIsStale && !this.next && Date.now() - this.opened > FRESH_CARD) this.open();
  }
}

function cardPart(attempt, owner) {
  const known = new Map();
  const box = h("div", {id: "cards"});
  owner.signal.addEventListener("abort", () => known.forEach((card) => cards.delete(card)));
  return newPart("cards", "Cards", async () => {
    const {data, missing = 0} = await getIfAny(attempt.base + "/cards?data=true", []);
    for (const row of data) {
      const card = known.get(row.hash) || new Card(attempt.base, row, known.size + 1);
      known.set(row.hash, card);
      cards.add(card);
      card.data = row.data;
      card.tell();
    }
    if (!known.size) {
      const gone = `${plural(missing, "card")} recorded, but the files are not found.`;
      const isGone = missing && attempt.phase() === "settled";
      return emptyLine("cards", "Cards", isGone ? gone : noneOf(attempt));
    }
    sync(box, [...known.values()].map(({node}) => node)); // a frame that is moved is loaded anew
    return box;
  });
}

// Artifacts: those of the task itself, apart from those that it has inherited.

/** Shows the image in an artifact, as a data URL: the policy of the page allows no others. */
async function showImage(url, into) {
  const answer = await fetch(url, {signal: view.signal});
  if (!answer.ok) return;
  const reader = new FileReader();
  reader.onload = () => into.replaceChildren(h("img", {src: reader.result, alt: "Its picture"}));
  reader.readAsDataURL(await answer.blob());
}

function artifactRow(row, attempt) {
  const {content, postprocess_error: problem, content_kind: kind} = row;
  const text = problem ? `(${problem.detail || "cannot be shown"})` : String(content);
  const value = h("td", null, text ? h("pre", null, text) : h("span", {class: "dim"}, "Empty."));
  if (/^image\//.test(kind || "")) {
    const raw = `${API}/api${attempt.base}/artifacts/${encodeURIComponent(row.name)}/raw`;
    showImage(`${raw}?attempt_id=${attempt.number}`, value).catch(() => {});
  }
  const python = `Task(${JSON.stringify(attempt.pathspec)}).data.${row.name}`;
  return h("tr", null, cell(code(row.name)), value,
    cell(copyButton(python, `the Python that loads ${row.name}`)));
}

const noneOf = (attempt) => (attempt.phase() === "settled" ? "None." : "None yet.");

function artifactPart(attempt) {
  const {base, number} = attempt;
  const heads = ["Name", "Value", "Python"];
  const tableFor = (title, rows) =>
    wrapTable(title, tableOf("names", heads, rows.map((row) => artifactRow(row, attempt))));
  return newPart("artifacts", "Artifacts", async () => {
    const query = `/artifacts?_limit=50&postprocess=true&inherited=true&attempt_id=${number}`;
    const rows = (await getAll(base + query)).filter(({name}) => !name.startsWith("_"));
    if (!rows.length) return emptyLine("artifacts", "Artifacts", noneOf(attempt));
    const made = rows.filter((row) => !row.is_inherited);
    const old = rows.filter((row) => row.is_inherited);
    const shown = made.length
      ? panel("artifacts", "Artifacts", titled("Artifacts"), tableFor("Artifacts", made))
      : emptyLine("artifacts", "Artifacts", "None of its own.");
    const title = `Inherited artifacts (${old.length})`;
    return [shown, ...(old.length ? [folded("inherited", title, tableFor(title, old))] : [])];
  });
}

function metadataPart({base, number}) {
  return newPart("metadata", "Metadata", async () => {
    const url = `${base}/metadata?_limit=100&attempt_id`;
    const urls = [`${url}=${number}`, `${url}:is=null`];
    const rows = (await Promise.all(urls.map(getAll))).flat();
    const once = new Map(rows // Metaflow records some twice, and cards have many
      .filter(({type, field_name: name}) => !/^card-/.test(type) && !/^(_|card-)/.test(name))
      .map((row) => [`${row.field_name}=${row.value}`, row]));
    const shown = [...once.values()].map(({field_name: name, value}) =>
      h("tr", null, cell(code(name)), cell(h("pre", null, String(value)))));
    const title = `Metadata (${shown.length})`;
    return shown.length
      ? folded("metadata", title, wrapTable(title, tableOf("names", ["Name", "Value"], shown)))
      : emptyLine("metadata", "Metadata", "None.");
  });
}

function taskSnippets(pathspec, number) {
  return [
    ["Pathspec", pathspec],
    ["Python", "from metaflow import Task\n" +
      `task = Task(${JSON.stringify(pathspec)}, attempt=${number})`],
    ["Its logs", `metaflow-local-service logs -f ${shellQuote(pathspec)}`],
  ];
}

/** The page of a task, or rather of one of its attempts. */
class TaskPage {
  constructor(owner, ids, rows, chosen) {
    const [flow, id, step, task] = ids;
    Object.assign(this, {owner, ids, chosen});
    this.base = path("flows", flow, "runs", id, "steps", step, "tasks", task);
    this.pathspec = ids.join("/");
    this.rows = []; // by attempt
    rows.forEach((row) => this.keep(row));
    this.last = this.rows.length - 1;
    this.number = chosen === undefined ? this.last : Number(chosen);
    this.isThere = Boolean(this.row());
    this.address = link(...ids, this.number);
    this.line = lineInAddress();
    this.head = h("div", {id: "head"});
    this.why = h("div");
    this.moving = []; // the parts that are loaded again and again until the attempt is settled
    this.still = [];
    if (this.isThere) this.makeParts();
  }

  row() {
    return this.rows[this.number];
  }

  phase() {
    return phase(this.row());
  }

  keep(row) {
    this.rows[row.attempt_id || 0] = row;
  }

  /** Puts stderr first if it failed, and the cards, which may be tall, after the logs. */
  makeParts() {
    const logs = [logPart("out", "Standard output", this), logPart("err", "Standard error", this)];
    if (this.row().status === "failed") logs.reverse();
    this.moving = [...logs, cardPart(this, this.owner)];
    this.still = [artifactPart(this), metadataPart(this)];
  }

  nodes() {
    const use = this.isThere ? [codePanel(taskSnippets(this.pathspec, this.number))] : [];
    const parts = [...this.moving, ...this.still].map(({node}) => node);
    return [this.head, this.why, ...parts, ...use];
  }

  draw() {
    const hasMore = this.chosen === undefined && this.rows.length - 1 > this.last;
    if ((!this.isThere && this.row()) || hasMore) {
      route();
      return;
    }
    this.drawHead();
    this.showTab();
    this.owner.wake();
  }

  showTab() {
    const [flow, id, step, task] = this.ids;
    showInTab((this.row() || {}).status, `${step}/${task} \u00b7 ${flow}/${id}`);
  }

  drawHead() {
    const [, , step, task] = this.ids;
    const row = this.row() || {};
    const label = row.foreach_label && h("span", {class: "dim"}, row.foreach_label);
    const told = row.status ? [badge(row.status), h("span", {class: "space"}),
      copyButton(this.pathspec, "pathspec")] : [];
    this.head.dataset.status = row.status || "";
    fill(this.head,
      h("div", {class: "head"}, h("h1", null, `${step}/${task}`, label), ...told),
      this.attemptLinks(),
      row.status ? facts([
        ["Started", longTime(row.started_at || row.ts_epoch)],
        ["Finished", longTime(row.finished_at)],
        ["Duration", elapsed(row)],
        ["Cloned from", row.origin_pathspec && h("a",
          {class: "link", href: pathspecLink(row.origin_pathspec)}, row.origin_pathspec)],
      ]) : note("It is not there. If it starts, it appears here."));
    fill(this.why, ...causePanel(row.cause, row.status === "completed").map(causeAlone));
  }

  attemptLinks() {
    const choice = ({attempt_id: number, status}) => h("a", {
      href: link(...this.ids, number),
      "aria-current": number === this.number && "page",
    }, badge(status, `Attempt ${number}: ${status}`));
    if (this.rows.length < 2) return h("span");
    const choices = this.rows.filter(Boolean).map(choice);
    return h("nav", {class: "attempts", "aria-label": "Attempts"}, choices);
  }

  /** Loads the parts until the attempt is settled; the still ones only when its phase changes. */
  async follow() {
    let wait = POLL.first;
    for (let before = ""; this.isThere && !this.owner.signal.aborted;) {
      const now = this.phase();
      const due = now === before ? this.moving : [...this.moving, ...this.still];
      await Promise.all(due.map((part) => part.load()));
      reachScrolled(main);
      if (now === "settled") return;
      wait = now === before ? Math.min(wait + POLL.first, POLL.longest) : POLL.first;
      before = now;
      await new Promise((resolve) => {
        this.owner.wake = resolve;
        setTimeout(resolve, wait);
      });
    }
  }
}

async function taskView(mine, ids, chosen) {
  const [flow, id, step, task] = ids;
  const attempts = path("flows", flow, "runs", id, "steps", step, "tasks", task) + "/attempts";
  const {data} = await getIfAny(attempts + "?postprocess=true", []);
  const shown = new TaskPage(mine, ids, data, chosen);
  showNodes(...shown.nodes());
  Object.assign(mine, {draw: () => shown.draw(), showTab: () => shown.showTab()});
  shown.draw();
  shown.follow().catch(fail);
  followRun(mine, flow, id, keepRun);
  subscribe(mine, attempts, (row) => shown.keep(row));
}

/** The cause without what the page of the task itself shows anyway: a link to it, and stderr. */
function causeAlone(node) {
  node.querySelectorAll(".title a, pre").forEach((part) => part.remove());
  return node;
}

/** The line of a log that the address names. */
function lineInAddress() {
  const query = addressQuery();
  const row = Number(query.get("line")) - 1;
  return row >= 0 ? {stream: query.get("log") || "out", row} : null;
}

// ---- Compare: what differs between runs ----

const SECTIONS = {
  parameters: "Parameters",
  artifacts: "Artifacts",
  durations: "Durations by step",
  tags: "Tags",
  code: "Code",
};

const compareLink = (keys) =>
  "#/?" + new URLSearchParams(keys.map((key) => ["compare", key]));

function differenceValue(section, value) {
  if (value === null || value === undefined) return h("span", {class: "dim"}, "\u2013");
  if (section === "durations" && typeof value === "number") return duration(value);
  return h("pre", null, typeof value === "string" ? value : JSON.stringify(value));
}

/** A table of differences, with a column for each run. */
function differencesTable(compared, differences, title) {
  const heads = compared.map((run) => h("th", {scope: "col"},
    h("a", {class: "link", href: link(run.flow_id, runId(run))},
      run.flow_id + "/", h("wbr"), runId(run)), " ",
    badge(run.status), h("br"), longTime(run.ts_epoch)));
  const groups = Object.keys(SECTIONS).flatMap((section) => {
    const rows = differences.filter((one) => one.section === section);
    const head = h("tr", null, h("th", {colspan: compared.length + 1, scope: "colgroup"},
      SECTIONS[section]));
    return rows.length ? [head, ...rows.map(({name, values}) => h("tr", null, cell(code(name)),
      values.map((value) => cell(differenceValue(section, value)))))] : [];
  });
  return wrapTable(title, h("table", {class: "differences", style: `--runs:${compared.length}`},
    h("thead", null, h("tr", null, h("th", {scope: "col"}, "Name"), heads)),
    h("tbody", null, groups)));
}

/** The differences from the last run of the flow that succeeded. */
function changesPanel({runs: compared, differences}) {
  const [before] = compared;
  const count = differences.length ? plural(differences.length, "difference") : "no difference";
  const title = `Since the last success, ${runId(before)}: ${count}`;
  return differences.length
    ? folded("changes", title, differencesTable(compared, differences, title))
    : emptyLine("changes", "Since the last success", `Nothing differs from ${runKey(before)}.`);
}

async function compareView(mine, keys) {
  const body = h("div");
  const load = async (all) => {
    const query = new URLSearchParams(keys.map((key) => ["run", key]));
    if (all) query.set("all", "true");
    const {data: {runs: compared, differences}} = await get("/compare?" + query);
    body.replaceChildren(differences.length
      ? panel("compare", "Differences", differencesTable(compared, differences, "Differences"))
      : emptyLine("compare", "Differences", "Nothing differs."));
    reachScrolled(body);
  };
  const all = h("label", null, h("input", {
    type: "checkbox",
    onchange: (event) => load(event.target.checked).catch(fail),
  }), " What is the same, too");
  mine.showTab = () => showInTab("", "Compare runs");
  mine.showTab();
  await load(false);
  showNodes(h("div", {class: "toolbar"}, h("h1", null, "Compare runs"),
    h("span", {class: "space"}), all), body);
  if (!live.socket) connect();
}

// ---- Routing: which view is shown ----

let view = newView();
let here = "";
let listed = ""; // the filter of the list
let listHash = listLink(""); // the address of the list that was shown last
let typing = 0;

// The scroll positions of the entries in the history, for when one goes back or forward.
const scrolls = new Map();
let entry = 0;
history.scrollRestoration = "manual";

function enterHistory() {
  scrolls.set(entry, scrollY);
  if (!history.state) history.replaceState(Date.now(), "");
  entry = history.state;
}

/** A view, whose requests and subscriptions end when it is aborted. */
function newView() {
  const nothing = () => {};
  return Object.assign(new AbortController(),
    {opened: Date.now(), draw: nothing, tick: nothing, wake: nothing, showTab: nothing,
      catchUp: async () => {}});
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

const names = () => location.hash.slice(1).split("?")[0].split("/").filter(Boolean).map(decode);
const addressQuery = () => new URLSearchParams(location.hash.split("?")[1] || "");
const isList = () => names().length < 2 && !addressQuery().has("compare");

function fail(problem) {
  if (view.signal.aborted || problem.name === "AbortError") return;
  const again = h("button", {onclick: route}, "Try again"); // so does a new connection
  replaceMain(h("h1", null, "This cannot be shown"),
    panel("problem", "Problem", titled("Problem", again), note(problem.message)));
}

function openView(mine) {
  const [flow, id, step, task, attempt] = names();
  const compared = addressQuery().getAll("compare");
  if (compared.length) return compareView(mine, compared);
  if (!id) return listView(mine, listed);
  return task ? taskView(mine, [flow, id, step, task], attempt) : runView(mine, flow, id);
}

function showCrumbs() {
  const [flow, id, step, task] = names();
  const trail = [["Runs", isList() ? listLink("") : listHash], [flow, link(flow)],
    [id, link(flow, id)], [step, link(flow, id)], [task, link(flow, id, step, task)]];
  if (addressQuery().has("compare")) trail.push(["Compare", location.hash]);
  byId("crumbs").replaceChildren(...trail.filter(([name]) => name)
    .map(([name, href]) => h("a", {href}, name)));
}

async function route() {
  view.abort();
  enterHistory();
  const from = here;
  const mine = newView();
  const [flow] = names();
  view = mine;
  here = location.hash;
  if (isList()) {
    listed = flow ? `flow:"${flow}"` : addressQuery().get("q") || "";
    listHash = here || listLink("");
  }
  if (document.activeElement !== filter) filter.value = listed;
  document.title = names().join("/") || "Metaflow runs";
  byId("marked").hidden = true;
  showCrumbs();
  main.setAttribute("aria-busy", "true");
  await openView(mine).catch(fail);
  if (mine === view && !mine.signal.aborted) focusAfter(from);
}

/** Focuses the link to the view that was shown before, or else the top. */
function focusAfter(from) {
  if (document.activeElement === filter || main.querySelector(":focus")) return;
  const back = [...main.querySelectorAll("a.nav")]
    .find((item) => from === item.hash || from.startsWith(item.hash + "/"));
  if (back) {
    back.focus({preventScroll: scrolls.has(entry)});
    return;
  }
  main.focus({preventScroll: true});
}

function replaceMain(...nodes) {
  main.replaceChildren(...nodes);
  main.removeAttribute("aria-busy");
}

/** Shows a view, and scrolls to where it was, or to its top. */
function showNodes(...nodes) {
  replaceMain(...nodes);
  if (lineInAddress() || document.activeElement === filter) return;
  scrollTo(0, scrolls.get(entry) || 0);
}

function search(target) {
  if (isList()) {
    history.replaceState(null, "", target);
    route();
  } else {
    location.hash = target;
  }
}

function searchNow() {
  clearTimeout(typing);
  typing = setTimeout(() => search(listLink(filter.value.trim(), isList() ? listChoices() : {})),
    150);
}

filter.oninput = () => {
  searchNow();
  suggest();
};
filter.onfocus = suggest;
filter.onblur = () => showSuggestions(false);

/** Lists the other projects of this user that have a running service. */
async function showServices() {
  const answer = await fetch(API + "/api/services").catch(() => ({}));
  if (!answer.ok) return;
  const {data} = await answer.json();
  const name = (root) => root.replace(/\/+$/, "").split("/").at(-1) || "/";
  const mine = data.find((service) => service.is_this);
  byId("services").hidden = data.length < 2;
  fill(byId("services"), h("summary", null, mine ? name(mine.root) : "Projects"),
    h("div", null, data.map(({root, url, is_this: isThis}) => h("a",
      {href: isThis ? "#/" : url, "aria-current": isThis && "page", title: root},
      h("b", null, name(root)), " ", h("span", {class: "dim"}, isThis ? "this one" : root)))));
}

// ---- Keyboard, and the clocks ----

function move(by) {
  const items = [...main.querySelectorAll("a.nav")];
  if (!items.length) return true;
  const at = items.indexOf(document.activeElement);
  items[at < 0 ? 0 : Math.min(Math.max(at + by, 0), items.length - 1)].focus();
  return false;
}

function goUp() {
  const [flow, id, , task] = names();
  location.hash = task ? link(flow, id) : id || !isList() ? listHash : "#/";
}

function markFocused() {
  const row = document.activeElement.closest("#runs tr");
  if (row) row.querySelector("[type=checkbox]").click();
  return !row;
}

function compareMarked() {
  if (marked.size < 2 || marked.size > MOST_COMPARED) return true;
  location.hash = compareLink([...marked]);
  return false;
}

const SHORTCUTS = [
  [["/"], "Filter the runs"],
  [["j", "\u2193"], "Next run or task"],
  [["k", "\u2191"], "Previous run or task"],
  [["Enter"], "Open it"],
  [["x"], "Mark a run"],
  [["c"], "Compare the marked runs"],
  [["Esc"], "Go up"],
  [["?"], "This help"],
];

const showKeys = () => tell("Keyboard", h("dl", {id: "keys"}, SHORTCUTS.flatMap(([keys, text]) =>
  [h("dt", null, keys.flatMap((key) => [h("kbd", null, key), " "])), h("dd", null, text)])));
byId("help").onclick = showKeys;

const KEYS = {
  "/": () => filter.focus(),
  "?": showKeys,
  Escape: goUp,
  j: () => move(1),
  ArrowDown: () => move(1),
  k: () => move(-1),
  ArrowUp: () => move(-1),
  x: markFocused,
  c: compareMarked,
};

/** Handles a key in the filter; true if the browser is to do so. */
function filterKey(key) {
  const chosen = chosenSuggestion();
  if (key === "ArrowDown" || key === "ArrowUp") {
    if (suggestions.hidden) return move(1);
    return chooseSuggestion(key === "ArrowDown" ? 1 : chosen ? -1 : 0);
  }
  if ((key === "Enter" || key === "Tab") && chosen) return takeSuggestion(chosen);
  if (key === "Enter") return leaveFilter();
  if (key !== "Escape") return true;
  if (suggestions.hidden) filter.blur();
  return showSuggestions(false);
}

function closeMenu(menu) {
  menu.open = false;
  menu.querySelector("summary").focus();
}

function leaveFilter() {
  showSuggestions(false);
  move(1);
}

addEventListener("keydown", (event) => { // actions return true if the browser is to handle the key
  const {key, target} = event;
  const isScrolling = key.startsWith("Arrow") && target.matches(".log, pre, .scrolled, .graph");
  const isTyping = target.matches("input:not([type=checkbox]), select");
  if (event.ctrlKey || event.metaKey || event.altKey || isScrolling) return;
  if (document.querySelector("dialog[open]")) return;
  const menu = document.querySelector(".menu[open]");
  if (key === "Escape" && menu) {
    closeMenu(menu);
  } else if (target === filter) {
    if (filterKey(key) !== true) event.preventDefault();
  } else if (isTyping) {
    if (key === "Escape") target.blur();
  } else if (KEYS[key] && KEYS[key]() !== true) {
    event.preventDefault();
  }
});

addEventListener("click", ({target}) => { // a click elsewhere closes a menu
  for (const menu of document.querySelectorAll(".menu[open]")) {
    if (!menu.contains(target)) menu.open = false;
  }
});

/** Makes a tooltip when it is needed. In the list, the link of a row lies over all that it has. */
addEventListener("mousemove", ({target, clientX, clientY}) => {
  const isRow = target.matches("#runs .nav");
  const under = isRow ? document.elementsFromPoint(clientX, clientY).slice(1) : [target];
  const node = under.map((one) => one.closest("[data-ms], [data-tip]")).find(Boolean);
  const {ms, tip = ""} = node ? node.dataset : {};
  const text = ms ? `${fullTime(Number(ms))}, ${ago(ms)}` : tip;
  if (isRow) target.title = text;
  else if (node) node.title = text;
});

setInterval(() => {
  for (const node of document.querySelectorAll("[data-since]")) {
    node.textContent = duration(Date.now() - node.dataset.since);
  }
  for (const node of document.querySelectorAll("[data-ago]")) {
    node.textContent = ago(Number(node.dataset.ago));
  }
  if (document.querySelector("#timeline .s-running")) view.tick();
}, 1000);

matchMedia("(prefers-color-scheme: dark)").onchange = () => view.showTab();
addEventListener("hashchange", route);
route();
showServices();
</script>
"""


# ==================================================================================================
# UI API: the routes of the official UI's backend, and its sockets
# ==================================================================================================
#
# Rules of this layer:
#
# - Its routes only read. Paths and names of fields are those of the official UI's backend; what
#   only our own page uses has been added to them.
# - What has become of runs and tasks is for the model to say; columns, filters and orders stand in
#   Queries. As in the layer API, handlers raise what MetadataService.answer turns into a status.
# - In names and comments, a page is one that a browser shows; a page of a list is a ListPage.
#
# How it works. A Resource is a list or a single object. It is declared by @ui_resource above the
# function that reads its rows, and can then be fetched at its path below /api, and be followed over
# the socket /api/ws, with the same path without /api and the same query. What can only be fetched
# has a handler of its own, declared by @ui_route.
#
# Feed. Other processes write the files too, so changes have to be polled for. The thread of a
# socket has a Feed, which polls every POLL_SECONDS, and less often while nothing happens. It takes
# a Snapshot of the model, in which what several resources need is computed once, and asks one
# Subscription after the other what has changed. As long as the version of its resource is the same,
# no row is read. Otherwise a row with a new key is announced as INSERT, and one whose fingerprint
# differs from the one announced last as UPDATE. A poll that fails leaves a subscription as it was.
# A frame holds a whole row, so that no frame depends on another, and a subscription may be
# forgotten at any time: the page makes it anew, with the time up to which it knows everything as
# `since`.
#
# Order of ends. The official UI looks for a log only when it hears that the attempt has ended, and
# shows no more changes when it has heard that the run has. In the delaying snapshots of a feed, an
# attempt has therefore not ended before its log is stored, which is waited for LOG_WAIT_SECONDS at
# most, and a run not before RUN_END_DELAY_SECONDS after its attempts. In each poll, subscriptions
# to tasks come before those to steps, and these before those to runs. What is fetched is never
# delayed.
#
# Exact feeds. Our own page opens its socket with `exact=true`. Nothing is delayed then, so that it
# never takes back an end that it has fetched, and deletions are announced: a DELETE has the key of
# a run that does not exist any more, whatever the filters; one that is only too old to be polled is
# kept. The official UI would take such a frame for a change.
#
# Sockets. Only the thread of the connection (see Server) reads from and writes to a socket. Feeds
# share nothing but the model, and have no locks. Between polls the thread waits for messages. It
# closes the socket when the page does or breaks the protocol, when the page has been silent for
# SILENT_SECONDS or takes nothing for SEND_SECONDS, and when the service stops, which looks like the
# end of the stream. Then nothing remains: all that is known of a page is in its Feed.

# -- answers: envelopes, and pages of lists --------------------------------------------------------

HTML = "text/html; charset=utf-8"
UI_PAGE, LARGEST_UI_PAGE = 10, 1000


class Paging(NamedTuple):
    """Which page of a list a query asks for."""

    limit: int
    number: int  # from 1

    def place(self) -> slice:
        """The place of the page in the list."""
        return slice((self.number - 1) * self.limit, self.number * self.limit)


class ListPage(NamedTuple):
    """A page of a list; by default the whole list, on a single page."""

    rows: Sequence[Any]
    number: int = 1
    next: int | None = None
    last: int | None = None  # None if it is not known


def parse_paging(query: Query, default: int = UI_PAGE) -> Paging:
    """The page that `_limit` and `_page` ask for."""
    limit = parse_count(query, "_limit", default)
    return Paging(min(limit, LARGEST_UI_PAGE), parse_count(query, "_page", 1))


def parse_count(query: Query, name: str, default: int) -> int:
    """The value of a parameter that is a number, at least 1."""
    text = first_value(query, name)
    if text and not re.fullmatch("[0-9]{1,9}", text):
        raise BadQuery(f"{name} is a number, not {text!r}.")
    return max(1, int(text)) if text else default


def paginate_rows(query: Query, rows: Iterable[Any], groups: Container[str] = ()) -> ListPage:
    """The page of a list that a query asks for. Rows behind it are not read, unless in groups.

    `groups`: the columns that `_group` may name. A page then consists of groups of rows, in the
    order of their values in that column, and of each group its first `_group_limit` rows.
    """
    paging, group = parse_paging(query), first_value(query, "_group")
    groups_of_rows: Iterable[list[Any]] = ([row] for row in rows)
    if group is not None and group in groups:
        most = parse_count(query, "_group_limit", UI_PAGE)
        ordered = list(rows)
        sort_rows(ordered, [(group, False)])
        by_value = itertools.groupby(ordered, lambda row: row.get(group))
        groups_of_rows = (list(itertools.islice(equal, most)) for _, equal in by_value)
    place = paging.place()
    found = list(itertools.islice(groups_of_rows, place.start, place.stop + 1))
    shown = list(itertools.chain.from_iterable(found[: paging.limit]))
    return ListPage(shown, paging.number, paging.number + 1 if len(found) > paging.limit else None)


def single_page(query: Query, rows: list[Any]) -> ListPage:
    """The whole list as page 1. Others are empty, so that who counts pages finds an end."""
    number = parse_count(query, "_page", 1)
    return ListPage(rows if number == 1 else [], number)


def envelope_response(
    request: Request,
    data: object,
    status: int = 200,
    pages: Mapping[str, int | None] | None = None,
    extra: Mapping[str, object] = MappingProxyType({}),
) -> Response:
    """Data in the envelope of the UI's backend, with `extra` fields.

    `pages`: for a list, the numbers of other pages by their relation to this one. The official UI
    fetches `links.next` until that is null.
    """
    links = {
        relation: None if number is None else page_link(request, number)
        for relation, number in (pages or {}).items()
    }
    body: dict[str, object] = {
        **extra,
        "data": data,
        "status": status,
        "links": {**links, "self": page_link(request)},
        **({} if pages is None else {"pages": pages}),
        "query": dict(request.query),
    }
    return json_response(body, status)


def object_response(request: Request, found: object) -> Response:
    """A single object, or 404 if it is None."""
    return envelope_response(request, {} if found is None else found, 404 if found is None else 200)


def page_response(
    request: Request,
    page: ListPage,
    status: int = 200,
    extra: Mapping[str, object] = MappingProxyType({}),
) -> Response:
    """A page of a list, with links to other pages of it."""
    pages = {
        "self": page.number,
        "first": 1,
        "prev": max(1, page.number - 1),
        "next": page.next,
        "last": page.last,
    }
    return envelope_response(request, page.rows, status, pages, extra)


def page_link(request: Request, number: int | None = None) -> str:
    """The URL of a request, or of another page of the list that it is for.

    It has no host, because a proxy may have replaced the one that the browser knows.
    """
    query = [pair for pair in request.query if number is None or pair[0] != "_page"]
    if number is not None:
        query.append(("_page", str(number)))
    path = "/".join(urllib.parse.quote(segment, safe="") for segment in request.path)
    return f"/{path}?{urllib.parse.urlencode(query)}" if query else f"/{path}"


# -- snapshots: the model at one moment ------------------------------------------------------------

NEWEST_RUNS_WATCHED = 100

LOG_WAIT_SECONDS = 60.0
"""How long the end of an attempt is kept from subscribers because its log is not stored yet."""

RUN_END_DELAY_SECONDS = 3.0
"""How much later than those of its attempts the end of a run is announced. The official UI draws
once a second what it has heard, and nothing more after the end of the run."""

Row = TypeVar("Row", "RunRow", "AttemptRow")


def without_end(row: Row) -> Row:
    """A run or an attempt as it was before it ended."""
    return cast(Row, {**row, "status": RUNNING, "finished_at": None, "cause": None})


class Snapshot:
    """The model at one moment; what several resources need is computed once.

    A delaying snapshot tells of ends later, for subscribers: see "Order of ends" above.
    """

    def __init__(self, model: Model, last_running: dict[Ids, float] | None = None) -> None:
        """`last_running`: if given, the snapshot delays ends. It holds when each run was last shown
        as running, by the monotonic clock, and goes on from one such snapshot to the next."""
        self.model = model
        self.now = model.clock()
        self.delays_ends = last_running is not None
        self._last_running = {} if last_running is None else last_running
        self._runs: dict[Ids, RunRow | None] = {}
        self._tasks: dict[Ids, list[AttemptRow]] = {}

    def run(self, ids: Ids) -> RunRow | None:
        """A run, or None if there is no such run."""
        if ids not in self._runs:
            row = self.model.runs.get(ids)
            self._runs[ids] = None if row is None else self._delay_run_end(row)
        return self._runs[ids]

    def watched_runs(self) -> list[RunRow]:
        """The newest runs, and those that were running when they were last judged."""
        newest = itertools.islice(self.model.runs.newest_first(), NEWEST_RUNS_WATCHED)
        found = {run_row_ids(row): row for row in (*self.model.runs.unfinished(), *newest)}
        rows = {ids: self._delay_run_end(self.model.runs.judge(row)) for ids, row in found.items()}
        self._runs.update(rows)
        return list(rows.values())

    def tasks(self, ids: Ids) -> list[AttemptRow]:
        """The attempts of all tasks of a run, oldest task first."""
        if ids not in self._tasks:
            self._tasks[ids] = list(
                map(self._delay_attempt_end, self.model.attempts.of_run(ids, self.now))
            )
        return self._tasks[ids]

    def attempts(self, ids: Ids) -> list[AttemptRow]:
        """The attempts of a task, newest first."""
        return list(map(self._delay_attempt_end, self.model.attempts.of_task(ids, self.now)))

    def run_version(self, ids: Ids) -> object:
        """An object that is equal as long as nothing in a run changes; None while it may change."""
        row = self.run(ids)
        may_change = row is not None and (
            row["finished_at"] is None
            or not self.model.runs.is_settled(row)
            or self._awaits_logs(row)
        )
        return None if may_change else json.dumps(row)

    def _awaits_logs(self, row: RunRow) -> bool:
        """Whether a log of a run that has ended may still be stored."""
        tasks = self.tasks(run_row_ids(row)) if self._has_ended_within(STORING_SECONDS, row) else ()
        return not all(task["is_log_stored"] for task in tasks)

    def _delay_attempt_end(self, row: AttemptRow) -> AttemptRow:
        """An attempt, in a delaying snapshot without its end while its log is expected."""
        is_early = not row["is_log_stored"] and self._has_ended_within(LOG_WAIT_SECONDS, row)
        return without_end(row) if self.delays_ends and is_early else row

    def _delay_run_end(self, row: RunRow) -> RunRow:
        """A run, in a delaying snapshot without its end until a while after its attempts'."""
        if not self.delays_ends:
            return row
        ids, now = run_row_ids(row), time.monotonic()
        # The attempts are only read if the end of one may be delayed.
        tasks = self.tasks(ids) if self._has_ended_within(LOG_WAIT_SECONDS, row) else ()
        if row["finished_at"] is None or any(task["status"] == RUNNING for task in tasks):
            self._last_running[ids] = now
        is_early = now - self._last_running.get(ids, -math.inf) < RUN_END_DELAY_SECONDS
        return without_end(row) if is_early else row

    def _has_ended_within(self, seconds: float, row: RunRow | AttemptRow) -> bool:
        end = row["finished_at"]
        return end is not None and self.now * 1000 - end < seconds * 1000


# -- resources: what can be fetched and followed ---------------------------------------------------

UI_API = Router()
ui_route = UI_API.route

UI_RUN = "/api" + RUN
UI_TASK = "/api" + TASK

RESOURCES = Router()
"""The paths, without /api, that a page can subscribe to; their handlers return the Resource."""

Rows = Iterable[Mapping[str, Any]]
RowReader = Callable[[Snapshot, Query, Ids], Rows]
VersionReader = Callable[[Snapshot, Query, Ids], object]
KeyReader = Callable[[Snapshot, Query, Ids], Iterable[tuple[str, ...]]]


class Resource(NamedTuple):
    """A list or a single object. The functions take a snapshot, a query and the ids in the path."""

    read_rows: RowReader
    columns: Mapping[str, Field]  # by which a query filters and sorts the rows
    key: Sequence[str]  # the columns that identify a row; none for a single object
    version: VersionReader  # equal as long as the rows are the same; None if that is not known
    existing_keys: KeyReader  # of all rows, whatever the filters; none if no deletion is announced


def version_of_run(snapshot: Snapshot, query: Query, ids: Ids) -> object:
    """The version of the run in which an object is."""
    return snapshot.run_version(ids[:2])


def version_of_task(snapshot: Snapshot, query: Query, ids: Ids) -> object:
    """The version of the records of a task."""
    return snapshot.model.store.version(ids)


def ui_resource(
    template: str,
    columns: Mapping[str, Field] = MappingProxyType({}),
    key: Sequence[str] = (),
    version: VersionReader = lambda snapshot, query, ids: None,
    existing_keys: KeyReader = lambda snapshot, query, ids: (),
    is_paged: bool = False,
    is_fetched: bool = True,
) -> Callable[[RowReader], RowReader]:
    """Declare a resource by its path without /api, above the function that reads its rows.

    `is_paged`: whether a list is fetched in pages. Those that the official UI asks for are not,
    since it would fetch all pages anyway. `is_fetched`: False if a handler of its own does that.
    """

    def declare(read_rows: RowReader) -> RowReader:
        resource = Resource(read_rows, columns, key, version, existing_keys)

        def fetch(model: Model, request: Request, *names: str) -> Response:
            rows = read_rows(Snapshot(model), request.query, object_ids(*names))
            found = select_rows(rows, request.query, columns)
            if not key:
                return object_response(request, found[0] if found else None)
            query = request.query
            page = paginate_rows(query, found, columns) if is_paged else single_page(query, found)
            return page_response(request, page)

        if is_fetched:
            ui_route("GET", "/api" + template)(fetch)
        RESOURCES.route("GET", template)(lambda: resource)
        return read_rows

    return declare


# -- autocompletion: declared first, since "autocomplete" might be an id ---------------------------

MOST_RUNS_FOR_TAGS = 2000


def completions_response(request: Request, name: str, values: Iterable[str]) -> Response:
    """A page of the values that pass the filters on `name`, sorted, each of them once.

    The official UI only sends regular expressions (`re`) that are text with `.*` in it, and so they
    are read as such: no text that a person types into a box is invalid or takes for ever.
    """
    fields = {name: Field(lambda value: value, parse_text, is_list=False)}
    query = [regex_to_like(pair) for pair in request.query]
    found = filter_records(set(values), [test for _, test in parse_filters(query, fields)])
    return page_response(request, paginate_rows(request.query, sorted(found)))


@ui_route("GET", "/api/flows/autocomplete")
def ui_complete_flows(model: Model, request: Request) -> Response:
    """Names of flows."""
    flows = model.store.flows()
    return completions_response(request, "flow_id", (flow["flow_id"] for flow in flows))


@ui_route("GET", "/api" + FLOW + "/runs/autocomplete")
def ui_complete_runs(model: Model, request: Request, flow: str) -> Response:
    """Ids of the runs of a flow."""
    runs = model.store.runs((flow,))
    return completions_response(request, "run", (str(run["run_number"]) for run in runs))


@ui_route("GET", UI_RUN + "/steps/autocomplete")
def ui_complete_steps(model: Model, request: Request, *run: str) -> Response:
    """Names of the steps of a run."""
    steps = model.store.steps(object_ids(*run))
    return completions_response(request, "step_name", (step["step_name"] for step in steps))


@ui_route("GET", UI_RUN + "/artifacts/autocomplete")
def ui_complete_artifacts(model: Model, request: Request, *run: str) -> Response:
    """Names of the artifacts of a run."""
    artifacts = model.store.artifacts_below(object_ids(*run))
    return completions_response(request, "name", (artifact["name"] for artifact in artifacts))


@ui_route("GET", "/api/tags")
@ui_route("GET", "/api/tags/autocomplete")
def ui_complete_tags(model: Model, request: Request) -> Response:
    """Tags of the newest runs."""
    runs = itertools.islice(model.runs.newest_first(), MOST_RUNS_FOR_TAGS)
    tags = ((*(run["tags"] or ()), *(run["system_tags"] or ())) for run in runs)
    return completions_response(request, "tag", itertools.chain.from_iterable(tags))


# -- the service itself ----------------------------------------------------------------------------

FEATURES = ("RUN_GROUPS", "ARTIFACT_TABLE", "ARTIFACT_SEARCH", "FOREACH_VAR_SEARCH")
"""The features of the official UI that are off unless the backend enables them."""

LINKS = [
    {"href": "https://docs.metaflow.org/", "label": "Documentation"},
    {"href": "http://chat.metaflow.org/", "label": "Help"},
]


@ui_route("GET", "/api/features")
def ui_features(model: Model, request: Request) -> Response:
    """The features that the official UI is to offer."""
    return json_response({f"FEATURE_{name}": True for name in FEATURES})


@ui_route("GET", "/api/plugin")
def ui_plugins(model: Model, request: Request) -> Response:
    """No plugins. Anything but a list would break the official UI."""
    return json_response([])


@ui_route("GET", "/api/version")
def ui_version(model: Model, request: Request) -> Response:
    """The version of the API."""
    return text_response(PROTOCOL_VERSION)


@ui_route("GET", "/api/ping")
def ui_ping(model: Model, request: Request) -> Response:
    """Answer that the service is there."""
    return text_response("pong")


@ui_route("GET", "/api/status")
def ui_status(model: Model, request: Request) -> Response:
    """The state of the backend's cache. There is no such cache here."""
    return json_response({"cache": {}})


@ui_route("GET", "/api/config")
def ui_config(model: Model, request: Request) -> Response:
    """The settings of the deployment that the official UI may see: none."""
    return json_response({})


@ui_route("GET", "/api/links")
def ui_links(model: Model, request: Request) -> Response:
    """The links in the menu of the official UI."""
    return json_response(LINKS)


@ui_route("GET", "/api/notifications")
def ui_notifications(model: Model, request: Request) -> Response:
    """No announcements."""
    return json_response([])


# -- flows and runs --------------------------------------------------------------------------------

UI_RUN_GROUPS = ("flow_id", "user")
NEWEST_FIRST: ColumnOrder = ("ts_epoch", True)


@ui_route("GET", "/api/runs")
@ui_route("GET", "/api" + FLOW + "/runs")
def ui_list_runs(model: Model, request: Request, flow: str | None = None) -> Response:
    """A page of the runs of all flows or of one flow, or of groups of them."""
    order = parse_order(request.query, {*UI_RUN_COLUMNS, *UI_JUDGED_COLUMNS})
    runs = filter_runs(model, request.query, list_runs_since(model, request.query, flow))
    if order not in ([], [NEWEST_FIRST]):  # they come in this order; for another, all are read
        needs_verdict = any(name in UI_JUDGED_COLUMNS for name, _ in order)
        runs = [model.runs.judge(run) if needs_verdict else run for run in runs]
        sort_rows(runs, order)
    page = paginate_rows(request.query, runs, UI_RUN_GROUPS)
    return page_response(request, page._replace(rows=[model.runs.judge(run) for run in page.rows]))


def list_runs_since(model: Model, query: Query, flow: str | None) -> Iterator[RunRow]:
    """The runs of one flow or of all flows, newest first, back to the time `ts_epoch:ge`."""
    oldest = first_value(query, "ts_epoch:ge") or ""
    if not re.fullmatch(INTEGER, oldest):
        return model.runs.newest_first(flow)
    floor = int(oldest)
    return itertools.takewhile(lambda run: run["ts_epoch"] >= floor, model.runs.newest_first(flow))


def filter_runs(model: Model, query: Query, runs: Iterable[RunRow]) -> Iterable[RunRow]:
    """The runs that pass the filters of a query; they are judged only if a filter needs that."""
    plain = [test for _, test in parse_filters(query, UI_RUN_COLUMNS)] + parse_tag_filters(query)
    on_verdict = [test for _, test in parse_filters(query, UI_JUDGED_COLUMNS)]
    found = filter_records(runs, plain)
    return filter_records(map(model.runs.judge, found), on_verdict) if on_verdict else found


@ui_resource(
    "/runs",
    key=("flow_id", "run"),
    existing_keys=lambda snapshot, query, ids: snapshot.model.store.run_ids(),
    is_fetched=False,  # ui_list_runs does that
)
def read_watched_runs(snapshot: Snapshot, query: Query, ids: Ids) -> Rows:
    """The runs that may change: the newest and the unfinished ones, all of them judged.

    It is not what is fetched. That is a page of all runs, which `ui_list_runs` reads one by one and
    judges only as far as the page goes; a poll has to judge all that it reads, to see what changes.
    """
    return filter_runs(snapshot.model, query, snapshot.watched_runs())


@ui_resource("/flows", UI_FLOW_COLUMNS, key=("flow_id",), is_paged=True)
def read_flows(snapshot: Snapshot, query: Query, ids: Ids) -> Rows:
    """All flows."""
    return snapshot.model.store.flows()


@ui_resource(FLOW)
def read_flow(snapshot: Snapshot, query: Query, ids: Ids) -> Rows:
    """One flow."""
    found = snapshot.model.store.flow(ids)
    return [found] if found else []


@ui_resource(RUN, existing_keys=lambda snapshot, query, ids: [()] if snapshot.run(ids) else [])
def read_run(snapshot: Snapshot, query: Query, ids: Ids) -> Rows:
    """One run."""
    found = snapshot.run(ids)
    return [found] if found else []


@ui_resource(
    RUN + "/parameters",
    version=lambda snapshot, query, ids: step_version(
        snapshot.model.store, (*ids, PARAMETERS_STEP)
    ),
)
def read_parameters(snapshot: Snapshot, query: Query, ids: Ids) -> Rows:
    """The parameters of a run."""
    if not snapshot.model.store.task_ids((*ids, PARAMETERS_STEP)):
        return []
    values = snapshot.model.artifacts.parameters(ids)
    return [{name: {"value": value} for name, value in values.items()}]


# -- steps, tasks and what they have recorded ------------------------------------------------------


@ui_resource(RUN + "/steps", UI_STEP_COLUMNS, key=("step_name",), version=version_of_run)
def read_steps(snapshot: Snapshot, query: Query, ids: Ids) -> Rows:
    """The steps of a run."""
    return step_rows(snapshot.model.store, ids, snapshot.tasks(ids), snapshot.now)


@ui_resource(STEP, version=version_of_run)
def read_step(snapshot: Snapshot, query: Query, ids: Ids) -> Rows:
    """One step."""
    steps = step_rows(snapshot.model.store, ids[:2], snapshot.tasks(ids[:2]), snapshot.now)
    return [row for row in steps if row["step_name"] == ids[2]]


@ui_resource(
    RUN + "/tasks",
    UI_TASK_COLUMNS,
    key=("step_name", "task_id", "attempt_id"),
    version=version_of_run,
)
def read_tasks(snapshot: Snapshot, query: Query, ids: Ids) -> Rows:
    """All attempts of all tasks of a run."""
    return snapshot.tasks(ids)


@ui_resource(
    STEP + "/tasks",
    UI_TASK_COLUMNS,
    key=("task_id", "attempt_id"),
    version=version_of_run,
    is_paged=True,
)
def read_step_tasks(snapshot: Snapshot, query: Query, ids: Ids) -> Rows:
    """All attempts of all tasks of a step."""
    return [row for row in snapshot.tasks(ids[:2]) if row["step_name"] == ids[2]]


@ui_resource(TASK)
def read_task(snapshot: Snapshot, query: Query, ids: Ids) -> Rows:
    """The newest attempt of a task."""
    return snapshot.attempts(ids)[:1]


@ui_resource(TASK + "/attempts", UI_TASK_COLUMNS, key=("attempt_id",), version=version_of_run)
def read_attempts(snapshot: Snapshot, query: Query, ids: Ids) -> Rows:
    """The attempts of a task, newest first."""
    return snapshot.attempts(ids)


def version_of_metadata(snapshot: Snapshot, query: Query, ids: Ids) -> object:
    """The version of the metadata of a run, or of the step that a query asks for."""
    step = first_value(query, "step_name")
    return step_version(snapshot.model.store, (*ids, step)) if step else snapshot.run_version(ids)


@ui_resource(
    RUN + "/metadata", UI_METADATA_COLUMNS, key=("step_name", "id"), version=version_of_metadata
)
def read_run_metadata(snapshot: Snapshot, query: Query, ids: Ids) -> Rows:
    """The metadata of the tasks of a run. If a query asks for steps, only theirs are read."""
    store, asked = snapshot.model.store, first_value(query, "step_name")
    steps = asked.split(",") if asked else [step["step_name"] for step in store.steps(ids)]
    for task in itertools.chain.from_iterable(store.task_ids((*ids, step)) for step in steps):
        yield from metadata_rows(store, task)


@ui_resource(TASK + "/metadata", UI_METADATA_COLUMNS, key=("id",), version=version_of_task)
def read_metadata(snapshot: Snapshot, query: Query, ids: Ids) -> Rows:
    """The metadata of a task."""
    return metadata_rows(snapshot.model.store, ids)


@ui_resource(
    STEP + "/artifacts",
    UI_ARTIFACT_COLUMNS,
    key=("task_id", "name"),
    version=version_of_run,
    is_paged=True,
)
def read_step_artifacts(snapshot: Snapshot, query: Query, ids: Ids) -> Rows:
    """The artifacts of the latest attempt of each task of a step."""
    return map(artifact_row, snapshot.model.store.artifacts_below(ids))


@ui_resource(TASK + "/artifacts", key=("name", "attempt_id"), version=version_of_task)
def read_artifacts(snapshot: Snapshot, query: Query, ids: Ids) -> Rows:
    """The artifacts of an attempt of a task.

    They have their values if `postprocess=true`, and always for subscriptions of the official UI,
    which does not ask for them then, but shows them. With `inherited=true`, each says whether a
    task before has had the same.
    """
    model, rows = snapshot.model, snapshot.model.artifacts.rows(ids, parse_attempt(query))
    found = select_rows(rows, query, UI_ARTIFACT_COLUMNS)  # here, as the rest takes long
    if first_value(query, "inherited") == "true":
        model.artifacts.mark_inherited(found, model.graphs.tasks_before(ids))
    has_values = snapshot.delays_ends or first_value(query, "postprocess") == "true"
    return map(model.artifacts.with_value, found) if has_values else found


# -- what can only be fetched: images, comparisons, graphs, logs, cards ----------------------------


@ui_route("GET", UI_TASK + "/artifacts/{name}/raw")
def ui_artifact_image(model: Model, request: Request, *names: str) -> Response:
    """The bytes of an artifact that is an image."""
    *task, name = names
    artifact = model.store.artifact(object_ids(*task), name, parse_attempt(request.query))
    if artifact is None:
        raise HttpError(404, "There is no such artifact.")
    try:
        value = model.artifacts.value(artifact, LARGEST_VALUE)
    except ValueError as error:
        raise HttpError(404, f"It cannot be shown: {error}.") from None
    kind = media_type(value) if isinstance(value, (bytes, bytearray)) else ""
    if not kind.startswith("image/"):
        raise HttpError(404, "It is no image.")
    headers = [("X-Content-Type-Options", "nosniff"), ("Content-Security-Policy", "sandbox")]
    return Response(bytes(value), kind=kind, headers=headers)


@ui_route("GET", UI_RUN + "/artifacts")
def ui_run_artifacts(model: Model, request: Request, *run: str) -> Response:
    """A page of the artifacts of a run.

    The official UI only asks whether any is in a local datastore, to warn that it cannot read
    those. Here it can, so that question has no answer.
    """
    asks_for_local = first_value(request.query, "ds_type") == "local"
    rows = (
        () if asks_for_local else map(artifact_row, model.store.artifacts_below(object_ids(*run)))
    )
    found = select_rows(rows, request.query, UI_ARTIFACT_COLUMNS)
    return page_response(request, paginate_rows(request.query, found, UI_ARTIFACT_COLUMNS))


@ui_route("GET", "/api/compare")
def ui_compare(model: Model, request: Request) -> Response:
    """What differs between runs, each given as FLOW/RUN; with `all=true` also what is equal."""
    named_runs = [value for name, value in request.query if name == "run"]
    if not 2 <= len(named_runs) <= MOST_COMPARED or any(r.count("/") != 1 for r in named_runs):
        raise BadQuery(f"2 to {MOST_COMPARED} runs are compared, each as run=FLOW/RUN.")
    runs = [object_ids(*pathspec.split("/")) for pathspec in named_runs]
    for ids in runs:
        if model.store.run(ids) is None:
            raise HttpError(404, f"There is no run {'/'.join(ids)}.")
    has_equal = first_value(request.query, "all") == "true"
    return object_response(request, compare_runs(model, runs, has_equal))


@ui_route("GET", UI_RUN + "/changes")
def ui_changes(model: Model, request: Request, *run: str) -> Response:
    """What differs from the last run of the flow that succeeded, or null if none did."""
    return envelope_response(request, compare_with_last_success(model, object_ids(*run)))


@ui_route("GET", UI_RUN + "/dag")
def ui_dag(model: Model, request: Request, *run: str) -> Response:
    """The graph of the flow of a run."""
    return object_response(request, model.graphs.of_run(object_ids(*run)))


def parse_attempt(query: Query) -> int | None:
    """The attempt that `attempt_id` asks for, or None if it does not."""
    text = first_value(query, "attempt_id")
    return None if not text else parse_attempt_segment(text)


@ui_route("GET", UI_TASK + "/logs/{stream}")
def ui_log(model: Model, request: Request, *names: str) -> Response:
    """A page of a log. With `-row`, the last lines are on the first page, in reverse order."""
    found = find_log(model, request, *names)
    if found is None:
        return page_response(request, ListPage([]), status=404)
    _, lines = found
    paging = parse_paging(request.query, default=LARGEST_UI_PAGE)
    last = max(1, -(-len(lines) // paging.limit))
    is_descending = parse_order(request.query, ("row",)) != [("row", False)]
    # Pages are divided from the beginning of the log, so that they stay the same while it grows.
    number = last - paging.number + 1 if is_descending else paging.number
    shown = lines[Paging(paging.limit, number).place()] if 1 <= number <= last else []
    following = paging.number + 1 if paging.number < last else None
    rows = shown[::-1] if is_descending else shown
    return page_response(request, ListPage(rows, paging.number, following, last))


@ui_route("GET", UI_TASK + "/logs/{stream}/download")
def ui_log_download(model: Model, request: Request, *names: str) -> Response:
    """A log as a text file."""
    found = find_log(model, request, *names)
    if found is None:
        raise HttpError(404, "There is no such task.")
    attempt, lines = found
    *task, stream = names
    download_name = f"{LOG_STREAMS[stream]}_{'_'.join(object_ids(*task))}-{attempt}.txt"
    header = f"attachment; filename*=UTF-8''{urllib.parse.quote(download_name, safe='')}"
    return Response(
        "\n".join(line["line"] for line in lines).encode(),
        kind="text/plain; charset=utf-8",
        headers=[("Content-Disposition", header), ("X-Content-Type-Options", "nosniff")],
    )


def find_log(model: Model, request: Request, *names: str) -> tuple[int, list[LogLine]] | None:
    """The number of an attempt, by default the newest, and its log; None without such a task."""
    *task, stream = names
    if stream not in LOG_STREAMS:
        raise HttpError(404, "There is nothing at this path.")
    ids, attempt = object_ids(*task), parse_attempt(request.query)
    attempts = model.attempts.of_task(ids, model.clock())
    if not attempts:
        return None
    number = attempts[0]["attempt_id"] if attempt is None else attempt
    return number, model.logs.lines(ids, number, LOG_STREAMS[stream])


@ui_route("GET", UI_TASK + "/cards")
def ui_cards(model: Model, request: Request, *task: str) -> Response:
    """The cards of a task; with `data=true`, each with the data that it shows now, or null.

    `missing` is the number of cards that are recorded, but whose files are not found.
    """
    ids = object_ids(*task)
    rows: list[Mapping[str, object]] = [*model.cards.of_task(ids)]
    missing = {"missing": model.cards.count_missing(ids)}
    if first_value(request.query, "data") == "true":
        found = ((card, read_card_data(model, ids, str(card["hash"]))) for card in rows)
        rows = [{**card, "data": None if data is None else data[1]} for card, data in found]
    return page_response(request, ListPage(rows, last=1), extra=missing)


def read_card_data(model: Model, ids: Ids, card_hash: str) -> tuple[Card, object] | None:
    """A card and the data that it shows now; None if they cannot be read, or not be sent."""
    with contextlib.suppress(FileNotFoundError, ValueError, RecursionError):
        found = model.cards.data(ids, card_hash)
        json.dumps(found)  # what could be parsed may still be nested too deeply to be serialized
        return found
    return None


@ui_route("GET", UI_TASK + "/cards/{hash}")
def ui_card(model: Model, request: Request, *names: str) -> Response:
    """A card, as the flow has written it; with `follow=true`, it can be updated by our page."""
    *task, card_hash = names
    try:
        content = model.cards.html(object_ids(*task), card_hash)
    except TooLarge:
        raise HttpError(413, f"The card is larger than {LARGEST_CARD} bytes.") from None
    if content is None:
        return Response(b"<!doctype html><p>There is no such card, or not yet.", 404, HTML)
    follows = first_value(request.query, "follow") == "true"
    return Response(content + CARD_FOLLOWER if follows else content, kind=HTML)


CARD_FOLLOWER = b"""<script>
addEventListener("message", ({data, source}) => {
  if (source !== parent || typeof metaflow_card_update !== "function") return;
  if (data.reload_token === window.METAFLOW_RELOAD_TOKEN) metaflow_card_update(data.data);
  else parent.postMessage({cardIsStale: data.reload_token}, "*");
});
new ResizeObserver(() => {
  parent.postMessage({cardHeight: document.documentElement.scrollHeight}, "*");
}).observe(document.body);
</script>"""
"""A card in a sandbox cannot fetch anything. While the task runs, our page sends it the new data;
the card replies with its height, and with a message if the data are for a newer version of it."""


@ui_route("GET", UI_TASK + "/cards/{hash}/data")
def ui_card_data(model: Model, request: Request, *names: str) -> Response:
    """The data that a card shows now."""
    *task, card_hash = names
    found = read_card_data(model, object_ids(*task), card_hash)
    if found is None:
        return json_response({"error": "There are no data of such a card."}, 404)
    card, data = found
    return json_response({"data": data, "id": card["id"], "type": card["type"]})


# -- WebSocket (RFC 6455) --------------------------------------------------------------------------

TEXT_FRAME, BINARY_FRAME, CLOSE_FRAME, PING_FRAME, PONG_FRAME = 1, 2, 8, 9, 10
GOING_AWAY, PROTOCOL_ERROR, NOT_UTF8, OVER_LIMIT, MESSAGE_TOO_BIG = 1001, 1002, 1007, 1008, 1009
LARGEST_MESSAGE = 64 * 2**10


class BadFrame(Exception):
    """A client breaks the protocol or exceeds a limit; `code` says how, in the close frame."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def websocket_accept(key: str) -> str:
    """The value of Sec-WebSocket-Accept for a Sec-WebSocket-Key."""
    from hashlib import sha1

    magic = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    return base64.b64encode(sha1((key + magic).encode("latin-1")).digest()).decode()


def encode_frame(opcode: int, payload: bytes) -> bytes:
    """A frame of a server, which is a whole message and has no mask."""
    size = len(payload)
    if size < 126:
        head = bytes((0x80 | opcode, size))
    elif size < 2**16:
        head = bytes((0x80 | opcode, 126)) + size.to_bytes(2, "big")
    else:
        head = bytes((0x80 | opcode, 127)) + size.to_bytes(8, "big")
    return head + payload


class FrameDecoder:
    """Decodes the messages of a client, however they are divided into frames and packets."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._message = bytearray()  # the frames so far of a message that is not complete
        self._opcode = 0  # of that message; 0 if there is none

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """The opcodes and payloads of the messages that are complete now; BadFrame."""
        self._received += data
        messages: list[tuple[int, bytes]] = []
        while True:
            frame = self._next_frame()
            if frame is None:
                return messages
            is_final, opcode, payload = frame
            if opcode >= CLOSE_FRAME:
                messages.append((opcode, payload))
                continue
            if (opcode == 0) != (self._opcode != 0):
                raise BadFrame(PROTOCOL_ERROR)  # a message within another, or the rest of none
            self._opcode = self._opcode or opcode
            if len(self._message) + len(payload) > LARGEST_MESSAGE:
                raise BadFrame(MESSAGE_TOO_BIG)
            self._message += payload
            if is_final:
                messages.append((self._opcode, bytes(self._message)))
                self._message.clear()
                self._opcode = 0

    def _next_frame(self) -> tuple[bool, int, bytes] | None:
        """The FIN bit, opcode and payload of the next frame, or None until it is complete."""
        received = self._received
        if len(received) < 2:
            return None
        is_final, opcode, size = bool(received[0] & 0x80), received[0] & 0x0F, received[1] & 0x7F
        is_known = opcode in (0, TEXT_FRAME, BINARY_FRAME, CLOSE_FRAME, PING_FRAME, PONG_FRAME)
        if received[0] & 0x70 or not is_known or not received[1] & 0x80:
            raise BadFrame(PROTOCOL_ERROR)  # an extension, an unknown opcode, or no mask
        if opcode >= CLOSE_FRAME and (size > 125 or not is_final):
            raise BadFrame(PROTOCOL_ERROR)
        more = {126: 2, 127: 8}.get(size, 0)  # bytes of a longer size
        at = 2 + more
        if len(received) < at:
            return None
        if more:
            size = int.from_bytes(received[2:at], "big")
        if size > LARGEST_MESSAGE:
            raise BadFrame(MESSAGE_TOO_BIG)
        end = at + 4 + size
        if len(received) < end:
            return None
        mask, masked = bytes(received[at : at + 4]), bytes(received[at + 4 : end])
        del received[:end]
        return is_final, opcode, unmask(mask, masked)


def unmask(mask: bytes, masked: bytes) -> bytes:
    """A payload without its mask: one XOR of large integers, not a loop over its bytes."""
    size = len(masked)
    key = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(masked, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")


SEND_SECONDS = 10.0
"""How long a browser may take none of what it is sent."""


class WebSocket:
    """The server's end of a WebSocket. It must be used by one thread only."""

    def __init__(self, duplex: Duplex) -> None:
        self._duplex = duplex
        self._decoder = FrameDecoder()
        self._has_closed = False

    def send(self, message: object) -> None:
        """Send a string as it is, or anything else as JSON; OSError if the browser takes none."""
        text = message if isinstance(message, str) else json.dumps(message)
        self._send(TEXT_FRAME, text.encode())

    def receive(self, seconds: float) -> list[str] | None:
        """The text messages that arrive in time, or None after the last one; BadFrame, OSError.

        It returns as soon as there is anything, which need not be a whole message.
        """
        data = self._duplex.receive(seconds)
        if data is None:
            return []
        if not data:
            return None
        texts = []
        for opcode, payload in self._decoder.feed(data):
            if opcode == CLOSE_FRAME:
                self._close(payload[:2])
                return None
            if opcode == PING_FRAME:
                self._send(PONG_FRAME, payload)
            elif opcode == TEXT_FRAME:
                try:
                    texts.append(payload.decode())
                except UnicodeDecodeError:
                    raise BadFrame(NOT_UTF8) from None
        return texts

    def close(self, code: int) -> None:
        """Send a close frame, unless one was sent already or nobody takes it."""
        if not self._has_closed:
            with contextlib.suppress(OSError):
                self._close(code.to_bytes(2, "big"))

    def _close(self, reason: bytes) -> None:
        self._has_closed = True
        self._send(CLOSE_FRAME, reason)

    def _send(self, opcode: int, payload: bytes) -> None:
        self._duplex.send(encode_frame(opcode, payload), SEND_SECONDS)


def upgrade_to_websocket(request: Request, run: Callable[[WebSocket], None]) -> Upgrade:
    """Switch to a WebSocket, which is closed when `run` returns; HttpError if none is asked for."""
    headers = request.headers
    key, protocol = headers.get("sec-websocket-key", ""), headers.get("upgrade", "")
    if request.method != "GET" or protocol.lower() != "websocket" or len(key) != 24:
        raise HttpError(426, "This path is for WebSockets.", [("Upgrade", "websocket")])
    if headers.get("sec-websocket-version") != "13":
        raise HttpError(
            426, "The WebSocket has another version.", [("Sec-WebSocket-Version", "13")]
        )

    def run_and_close(duplex: Duplex) -> None:
        websocket = WebSocket(duplex)
        code = GOING_AWAY
        try:
            run(websocket)
        except BadFrame as error:
            code = error.code
        except OSError:
            return  # the browser is gone, or takes nothing any more
        websocket.close(code)

    response = [
        ("Upgrade", "websocket"),
        ("Connection", "Upgrade"),
        ("Sec-WebSocket-Accept", websocket_accept(key)),
    ]
    return Upgrade(response, run_and_close)


# -- subscriptions, and the feed of a page ---------------------------------------------------------

POLL_SECONDS, IDLE_POLL_SECONDS = 1.0, 3.0
"""How often subscriptions are polled, and how often if nothing was announced for IDLE_SECONDS."""

IDLE_SECONDS = 60.0

REST_POLL_SECONDS = 10.0
"""How often if no run is running. New and deleted runs are noticed every POLL_SECONDS even then."""

SILENT_SECONDS = 180.0
"""How long a page may be silent. It pings every 5 s, or in the background every minute."""

OVERLAP_SECONDS = 10.0
"""A subscription begins so long before it is made: the page has fetched the rows a little earlier,
and must not miss what has changed since."""

VERDICT_LAG_SECONDS = RUN_HEARTBEAT_CUTOFF + 60
"""How much later than at its own time an end may be noticed, if a run or task died in silence."""

FAR_FUTURE = 1e11
"""Epoch seconds that are not worth calculating with."""

MOST_SUBSCRIPTIONS = 2048
"""The official UI has one for each run of its list, which grows as one scrolls."""

Frame = Mapping[str, object]


class Subscription:
    """A resource that a page follows, and what the page knows of it."""

    def __init__(
        self, uuid: str, resource: str, since: float, tells_deletions: bool = False
    ) -> None:
        """`resource`: a path without /api, and a query; HttpError if there is no such resource.

        `since`: epoch seconds; the first poll announces rows that have changed after that.
        `tells_deletions`: whether deletions are announced as well.
        """
        path, _, query = resource.partition("?")
        segments = [urllib.parse.unquote(segment) for segment in path.split("/")[1:]]
        find_resource, names = RESOURCES.handler("GET", segments)
        self.uuid = uuid
        self.path = path
        self._resource: Resource = find_resource()
        self._query: Query = urllib.parse.parse_qsl(query, keep_blank_values=True)
        self._ids = object_ids(*names)
        self._since_ms = since * 1000
        self._tells_deletions = tells_deletions
        self._is_first_poll = True
        self._version: object = None  # of the resource at the last poll
        self._fingerprints: dict[tuple[Any, ...], int] = {}  # of rows as last announced, by key
        self._existing: set[tuple[str, ...]] = set()  # keys at the last poll

    def depth(self) -> tuple[int, bool]:
        """How deep in the tree its rows are: runs, then steps, then tasks."""
        return (self.path.count("/"), self.path.endswith("/tasks"))

    def poll(self, snapshot: Snapshot) -> list[Frame]:
        """The frames for what has changed since the last poll; BadQuery, StoreError, OSError.

        After an exception, the next poll returns what this one would have returned.
        """
        resource, arguments = self._resource, (snapshot, self._query, self._ids)
        version = resource.version(*arguments)
        if version is not None and version == self._version:
            return []
        rows = select_rows(resource.read_rows(*arguments), self._query, resource.columns)
        existing = set(resource.existing_keys(*arguments) if self._tells_deletions else ())
        # All is read now; only then may a row count as announced.
        frames = [*filter(None, map(self._announce, rows)), *self._announce_deletions(existing)]
        self._version = version
        self._is_first_poll = False
        return frames

    def _announce(self, row: Mapping[str, Any]) -> Frame | None:
        """The frame for a row, if it is new or has changed."""
        key = tuple(row[column] for column in self._resource.key)
        before, now = self._fingerprints.get(key), hash(row_fingerprint(row))
        self._fingerprints[key] = now
        if now == before or (self._is_first_poll and last_change_ms(row) < self._since_ms):
            return None
        is_new = before is None and key != ()  # a single object only changes
        return self._frame("INSERT" if is_new else "UPDATE", row)

    def _announce_deletions(self, existing: set[tuple[str, ...]]) -> list[Frame]:
        """The frames for the rows that existed at the last poll and do not exist now."""
        deleted, self._existing = self._existing - existing, existing
        for key in deleted:
            self._fingerprints.pop(key, None)
        return [self._frame("DELETE", dict(zip(self._resource.key, key))) for key in deleted]

    def _frame(self, kind: str, row: Mapping[str, object]) -> Frame:
        return {"type": kind, "uuid": self.uuid, "resource": self.path, "data": row}


def row_fingerprint(row: Mapping[str, Any]) -> str:
    """A row without what changes all the time: heartbeats, and durations that browsers count."""
    moving = ("last_heartbeat_ts", *(() if row.get("finished_at") else ("duration",)))
    return json.dumps({name: value for name, value in row.items() if name not in moving})


def last_change_ms(row: Mapping[str, Any]) -> float:
    """When a row last changed, in epoch milliseconds, or infinity if it does not say.

    The times need not be numbers: a row of parameters has the columns that a flow has chosen.
    """
    times = [row.get(name) for name in ("ts_epoch", "started_at", "finished_at")]
    return max((time for time in times if isinstance(time, int)), default=math.inf)


class Feed:
    """What a page is sent over its socket, all of it by one thread; see "Feed" above."""

    def __init__(self, model: Model, websocket: WebSocket, is_exact: bool) -> None:
        self._model = model
        self._websocket = websocket
        self._is_exact = is_exact
        self._subscriptions: dict[str, Subscription] = {}  # by uuid
        self._last_running: dict[Ids, float] | None = None if is_exact else {}  # see Snapshot
        self._snapshot = Snapshot(model, self._last_running)
        self._unpolled: list[Subscription] = []  # for the current snapshot; the last is the next
        self._next_poll = 0.0
        self._last_poll = 0.0
        self._runs_version: object = None  # at the last poll, if no run was running then
        self._last_announced = time.monotonic()

    def run(self) -> None:
        """Serve the page until it leaves or is silent for too long; OSError, BadFrame."""
        last_heard = time.monotonic()
        while True:
            messages = self._websocket.receive(self._receive_seconds())
            if messages is None:
                return
            for message in messages:
                self._handle_message(message)
            now = time.monotonic()
            if messages:
                last_heard = now
            elif now - last_heard > SILENT_SECONDS:
                return
            if self._unpolled:  # one at a time, so that pings are answered in between
                self._announce_changes(self._unpolled.pop())  # tasks first, and runs last
            elif self._subscriptions and now >= self._next_poll:
                self._begin_poll(now)

    def _begin_poll(self, now: float) -> None:
        """Have all subscriptions polled, or seldom if no run is running, and none is new or gone.

        To poll a hundred runs takes 6 ms, to see that none is new or gone takes 0.1 ms.
        """
        runs_version = None
        with contextlib.suppress(OSError):  # then the polls of the subscriptions say why
            if self._model.runs.is_at_rest(STORING_SECONDS):
                runs_version = self._model.runs.version()
        is_unchanged = runs_version is not None and runs_version == self._runs_version
        if is_unchanged and now - self._last_poll < REST_POLL_SECONDS:
            self._next_poll = now + POLL_SECONDS
            return
        self._runs_version, self._last_poll = runs_version, now
        is_idle = runs_version is None and now - self._last_announced > IDLE_SECONDS
        self._next_poll = now + (IDLE_POLL_SECONDS if is_idle else POLL_SECONDS)
        self._snapshot = Snapshot(self._model, self._last_running)
        self._unpolled = sorted(self._subscriptions.values(), key=Subscription.depth)

    def _receive_seconds(self) -> float:
        """How long to wait for messages."""
        if self._unpolled:
            return 0.0
        if not self._subscriptions:
            return SILENT_SECONDS / 2
        return max(0.0, self._next_poll - time.monotonic())

    def _handle_message(self, text: str) -> None:
        """Answer a ping, subscribe or unsubscribe; messages that make no sense are ignored."""
        if text == "__ping__":
            self._websocket.send("__pong__")
            return
        try:
            message = json.loads(text)
            kind, uuid = message["type"], message["uuid"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return
        if not isinstance(uuid, str) or len(uuid) > 100:
            return
        if kind == "UNSUBSCRIBE":
            self._subscriptions.pop(uuid, None)
        elif kind == "SUBSCRIBE":
            self._subscribe(uuid, message)

    def _subscribe(self, uuid: str, message: Mapping[str, object]) -> None:
        if len(self._subscriptions) >= MOST_SUBSCRIPTIONS:
            raise BadFrame(OVER_LIMIT)
        resource, since = message.get("resource"), message.get("since")
        if not isinstance(resource, str):
            return
        begin = self._model.clock() - OVERLAP_SECONDS
        if isinstance(since, (int, float)) and abs(since) < FAR_FUTURE:
            begin = min(begin, since - VERDICT_LAG_SECONDS)
        try:
            self._subscriptions[uuid] = Subscription(uuid, resource, begin, self._is_exact)
            self._next_poll, self._runs_version = 0.0, None
        except HttpError:
            logger().debug("a page subscribes to %r, which does not exist", resource)

    def _announce_changes(self, subscription: Subscription) -> None:
        """Poll a subscription, unless it was ended or replaced meanwhile, and send the frames."""
        if self._subscriptions.get(subscription.uuid) is not subscription:
            return
        try:
            frames = subscription.poll(self._snapshot)
        except (BadQuery, StoreError, HttpError) as error:  # as it would be the next time
            logger().debug("%s cannot be followed: %s", subscription.path, error)
            del self._subscriptions[subscription.uuid]
            return
        except OSError as error:
            logger().warning("%s cannot be read: %s", subscription.path, error)
            return
        for frame in frames:
            self._websocket.send(frame)
            self._last_announced = time.monotonic()


@ui_route("GET", "/api/ws")
def ui_feed(model: Model, request: Request) -> Upgrade:
    """The socket over which a page subscribes to resources."""
    is_exact = first_value(request.query, "exact") == "true"
    return upgrade_to_websocket(request, lambda websocket: Feed(model, websocket, is_exact).run())


# -- search in a run -------------------------------------------------------------------------------


@ui_route("GET", UI_RUN + "/search")
@ui_route("GET", "/api/search" + RUN)
def ui_search(model: Model, request: Request, *run: str) -> Upgrade:
    """A socket with a single message: the tasks that have an artifact or a foreach variable."""

    def search(websocket: WebSocket) -> None:
        event: Mapping[str, object]
        try:
            matches = [search_match(t) for t in find_tasks(model, object_ids(*run), request.query)]
            event = {"type": "result", "matches": matches}
        except (StoreError, OSError) as error:
            event = {"type": "error", "message": str(error), "id": "search-failed"}
        websocket.send({"event": event})

    return upgrade_to_websocket(request, search)


def search_match(task: Task) -> Mapping[str, object]:
    """A task in the form in which the official UI expects the results of a search."""
    return {
        "flow_id": task["flow_id"],
        "run_number": task["run_number"],
        "step_name": task["step_name"],
        "task_id": str(task["task_id"]),
        "searchable": True,
        "error": None,
    }


MOST_ENCODINGS = 3
"""How many times the official UI may have percent-encoded the value that is searched for."""


def find_tasks(model: Model, ids: Ids, query: Query) -> Iterator[Task]:
    """The tasks of a run that match `key` and `value` in one of the scopes of `scope`."""
    key, value = first_value(query, "key") or "", first_value(query, "value") or ""
    for _ in range(MOST_ENCODINGS):
        value = urllib.parse.unquote(value)
    scopes = (first_value(query, "scope") or "ARTIFACT").split(",")
    for step in model.store.steps(ids):
        for task in model.store.tasks((*ids, step["step_name"])):
            place = (*ids, step["step_name"], str(task["task_id"]))
            if ("ARTIFACT" in scopes and has_artifact(model, place, key, value)) or (
                "FOREACH_VARIABLE" in scopes and has_foreach_variable(model, place, key, value)
            ):
                yield task


def has_artifact(model: Model, ids: Ids, name: str, wanted: str) -> bool:
    """Whether a task's newest attempt has an artifact of this name, and the wanted value if any."""
    artifact = model.store.artifact(ids, name)
    if artifact is None or not wanted:
        return artifact is not None
    content = model.artifacts.with_value(artifact_row(artifact)).get("content")
    return content is not None and matches_value(content, wanted)


def has_foreach_variable(model: Model, ids: Ids, name: str, wanted: str) -> bool:
    """Whether a task is in a foreach over this variable, and at the wanted value if any."""
    variables = (frame.partition("=") for frame in model.histories.foreach_frames(ids))
    return any(n == name and (not wanted or matches_value(v, wanted)) for n, _, v in variables)


def matches_value(value: str, wanted: str) -> bool:
    """Whether a value contains a text, in upper or lower case, or is equal to a quoted one."""
    if len(wanted) > 1 and wanted[0] == wanted[-1] == '"':
        return value == wanted[1:-1]
    return wanted.lower() in value.lower()


# -- the service: both APIs, the page, and the files of the official UI ----------------------------

PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; frame-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
CARD_POLICY = "sandbox allow-scripts allow-popups"
"""Cards are written by flows. Their scripts must not act as our page, not even in their own tab."""

FRAMED_CARD_POLICY = (
    "connect-src 'none'; form-action 'none'; frame-src 'none'; worker-src 'none'; "
    "object-src 'none'; base-uri 'none'; frame-ancestors 'self'"
)
"""The official UI reads and updates the cards in its frames, for which these must be of the same
origin. Their scripts can then make the page around them read what that page can read."""

LARGEST_STATIC_FILE = 64 * 2**20
FOR_EVER = "public, max-age=31536000, immutable"
SERVICE_PATHS = frozenset(("api", "flows", "auth", "metadata"))
"""The first segments of paths that never belong to the official UI."""

READING_METHODS = ("GET", "HEAD")
ROOT_PATH, LOGIN_PATH, SERVICES_PATH = [""], ["api", "login"], ["api", "services"]


class ServiceRow(TypedDict):
    """A running service of this user."""

    root: str
    url: str
    is_this: bool


ListServices = Callable[[], "list[ServiceRow]"]


def metadata_path(path: Sequence[str]) -> Sequence[str]:
    """The path of the metadata API below /metadata or /api/metadata, or an empty one.

    The backend of the official UI offers the metadata API there too.
    """
    if path[0] == "metadata":
        return path[1:]
    return path[2:] if list(path[:2]) == ["api", "metadata"] else ()


class UiService(MetadataService):
    """Answers the requests of both APIs, and those for our page and the official UI."""

    def __init__(
        self,
        store: Store,
        ui_folder: str | None = None,
        credentials: Credentials | None = None,
        search: Search = search_in_place,
        list_services: ListServices = list,
    ) -> None:
        """`ui_folder`: a build of the official UI, to be served in place of our page;
        `credentials`: if requests need the key; `list_services`: lists this user's services."""
        super().__init__(store, search)
        self._list_services = list_services
        self._ui_folder = None if ui_folder is None else os.path.realpath(ui_folder)
        self._credentials = credentials

    def is_public(self, method: str, path: Sequence[str]) -> bool:
        """Whether a request is answered without the key: pages, which ask for it, and the login."""
        if method == "POST":
            return list(path) == LOGIN_PATH
        return method in READING_METHODS and self._is_page(path)

    def _is_page(self, path: Sequence[str]) -> bool:
        """Whether a path belongs to our page or to the official UI, and not to an API."""
        if list(path) == ROOT_PATH:
            return True
        if self._ui_folder is None or path[0] in SERVICE_PATHS:
            return False
        with contextlib.suppress(HttpError):
            METADATA_API.handler("GET", path)
            return False
        return True

    def dispatch(self, request: Request) -> Response | Upgrade:
        """Answer a request, or let the API that it is for do so; raises what handlers may raise."""
        is_reading, path = request.method in READING_METHODS, list(request.path)
        if is_reading and self._is_page(path):
            return self._page_response(request)
        if path == LOGIN_PATH:
            return self._log_in(request)
        if not is_reading:
            self._refuse_page_of_browser(request)
        if is_reading and path == SERVICES_PATH:
            return page_response(request, ListPage(self._list_services()))
        below_mount = metadata_path(path)
        if below_mount and not is_reading:
            allowed = [("Allow", "GET, HEAD")]
            raise HttpError(405, "Records are only read below this path.", allowed)
        if below_mount or path[0] != "api":
            return super().dispatch(request._replace(path=below_mount or path))
        handler, arguments = UI_API.handler(request.method, path)
        response: Response | Upgrade = handler(self._model, request, *arguments)
        if isinstance(response, Response) and response.kind == HTML:  # which is a card
            return response._replace(headers=(*response.headers, self._card_policy(request)))
        return response

    def _card_policy(self, request: Request) -> tuple[str, str]:
        """The header that says what the scripts of a card may do."""
        is_framed = request.headers.get("sec-fetch-dest") == "iframe"
        policy = FRAMED_CARD_POLICY if self._ui_folder and is_framed else CARD_POLICY
        return ("Content-Security-Policy", policy)

    def _refuse_page_of_browser(self, request: Request) -> None:
        """Refuse a write that a card in the official UI may have sent; that UI only reads."""
        if self._ui_folder and not {"origin", "sec-fetch-site"}.isdisjoint(request.headers):
            raise HttpError(403, "Beside the official UI, pages in a browser may only read.")

    def _log_in(self, request: Request) -> Response:
        """Set the cookie for the key in the body, since browsers cannot send it as a header."""
        if request.method != "POST":
            raise HttpError(405, "The method is not for this path.", [("Allow", "POST")])
        given = request.json_object().get("key")
        if self._credentials is None:
            return Response(b"", 204)
        cookie = self._credentials.log_in(given, request.port)
        return Response(b"", 204, headers=[("Set-Cookie", cookie)])

    def _page_response(self, request: Request) -> Response:
        """Our page or a file of the official UI. That cannot ask for the key, so ours does."""
        credentials = self._credentials
        needs_key = credentials and not credentials.accepts(request.headers, request.port)
        if self._ui_folder is None or (needs_key and request.path[0] != "static"):
            headers = [("Content-Security-Policy", PAGE_POLICY), ("Cache-Control", "no-cache")]
            return Response(PAGE.encode(), kind=HTML, headers=headers)
        return static_file_response(self._ui_folder, request.path)


def read_static_file(folder: str, names: Sequence[str]) -> bytes | None:
    """The content of a file in a build of the official UI, or None if there is no such file."""
    if not names:
        return None
    with contextlib.suppress(OSError, TooLarge):
        owners = {os.geteuid(), ROOT_USER, os.stat(folder).st_uid}
        with FileOpener(folder).open_below(folder, names, owners) as file:
            return read_content(file, LARGEST_STATIC_FILE)
    return None


def static_file_response(folder: str, path: Sequence[str]) -> Response:
    """A file of the official UI, or its index.html, whose scripts know what to show at a path."""
    import mimetypes

    is_static = path[0] == "static"  # where names contain a hash of the content
    names = [name for name in path if name]
    content = read_static_file(folder, names)
    if content is None and is_static:
        raise HttpError(404, "There is no such file.")
    if content is None:
        names = ["index.html"]
        content = read_static_file(folder, names)
    if content is None:
        raise HttpError(404, f"There is no UI in {folder}.")
    kind = mimetypes.guess_type(names[-1])[0] or "application/octet-stream"
    if kind.startswith("text/") or kind in ("application/javascript", "application/json"):
        kind += "; charset=utf-8"
    caching = FOR_EVER if is_static else "no-cache"
    headers = [("Cache-Control", caching), ("X-Content-Type-Options", "nosniff")]
    return Response(content, kind=kind, headers=headers)


# ==================================================================================================
# Server: HTTP itself: parsing, limits, errors as JSON, in-flight requests
# ==================================================================================================
#
# This layer knows nothing of records: it turns bytes into a Request, has a service answer it, and
# turns the Response into bytes. It stands on http.server and uses its seams as they are meant; what
# it replaces (the reading and writing of heads) says what that saves.
#
# Threads. One thread accepts connections (`Server.accept`), each connection has a thread of its own
# (`Connection`), and the thread that called `Server.serve` looks after them: every TICK_SECONDS it
# ends those that are overdue and asks whether the service is still wanted. Connections report what
# they are doing by the server's `note_...` methods; `Server._lock` guards what these keep.
#
# Deadlines. A connection may be silent for KEEP_ALIVE_SECONDS between two requests, and a request
# has REQUEST_SECONDS to arrive. A handler may take as long as it needs. Whoever reads an answer has
# REQUEST_SECONDS from the last progress. The thread of `serve` enforces these by shutting a socket
# down; the connection's own thread then fails to read or write, and closes it. No other thread ever
# closes a connection's socket, so that its descriptor cannot have become another file's.
#
# Who gets an answer. In this order: orders of our own commands, which prove with the nonce from the
# pidfile that they may give them; then everybody else, if the peer is our own user (without a key,
# on Linux), if Host and Origin are ours, and if the request brings the key (where there is one).
# Only then is the body read, and the request answered if the service still serves its root.

# -- limits ----------------------------------------------------------------------------------------

LARGEST_BODY = 32 * 2**20
"""In bytes. Metaflow sends all artifacts of an attempt in one body, at 470 bytes each."""

LARGEST_PUBLIC_BODY = 4 * 2**10
"""In bytes, of a request that is answered without the key: the login."""

MOST_CONNECTIONS = 512
MOST_PAGES = 128
MOST_PARAMETERS = 100
MOST_HEADERS = 100
LONGEST_HEADER = 65536  # as long as http.server lets a request line be

TOKEN = "[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rf"({TOKEN}) +(\S+) +HTTP/([0-9])\.([0-9])", re.ASCII)
HEADER_NAME = re.compile(TOKEN)

KEEP_ALIVE_SECONDS = 75.0
"""How long a connection may be silent between two requests."""

REQUEST_SECONDS = 30.0
"""How long a request may take to arrive, and an answer may wait for its reader to take some."""

SMALL_ANSWER = 2**16
"""In bytes. An answer up to this size is sent at once and does not count towards MOST_UNSENT."""

MOST_UNSENT = 128 * 2**20
"""How many bytes of answers may wait for their readers, in all."""

STALLED_SECONDS = 5.0
"""A reader without progress for so long is dropped when another answer needs the room."""

SEND_BUFFER = 2**17
"""How many bytes of an answer the kernel holds for each socket. Left alone, it would let this grow
to megabytes, and a reader at 40 kB a second would seem to make no progress for half a minute."""

SHUTDOWN_SECONDS = 10.0
"""How long requests in flight may go on when the service stops."""

TICK_SECONDS = 2.0
"""How often the server looks for overdue connections, and asks whether it is still wanted."""

# -- the server ------------------------------------------------------------------------------------

NONCE_HEADER = "x-local-service-nonce"
"""The header by which the sender of an order proves that it has read the pidfile."""


class Owner(Protocol):
    """The process that runs a server; the server asks it before it answers anything."""

    def refusal(self) -> str | None:
        """The reason why no request can be answered at present; None if all can."""

    def obey(self, order: str, fields: Mapping[str, str]) -> Mapping[str, object] | None:
        """Carry out an order and return what to tell its sender; None if the nonce is wrong."""


class Server(http.server.ThreadingHTTPServer):
    """Listens as soon as it is made, and answers from `serve` on, with a thread per connection."""

    request_queue_size = 128
    daemon_threads = True
    timeout = 0  # of `handle_request`, which is called when there is a connection

    def __init__(
        self, host: str, port: int, key: str | None, listener: socket.socket | None = None
    ) -> None:
        """Bind and listen, or take over a socket that listens already.

        OSError if the address cannot be had.
        """
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.access = Access(host, None if key is None else Credentials(key))
        self.service: MetadataService | BrokenService
        self.owner: Owner | None = None
        self.refuses_strangers = False  # whether other users get 403; set by `serve`
        self.is_closing = False
        self._acceptor: threading.Thread | None = None
        self.is_open = threading.Event()  # set once there is a service to answer requests
        self._connections: dict[Connection, float] = {}  # each with its deadline
        self._busy: set[Connection] = set()  # those in the middle of a request
        self._pages: set[Connection] = set()  # those that have been upgraded to a WebSocket
        self._unsent: dict[Connection, int] = {}  # bytes that wait for the reader of each
        self._lock = threading.Condition()  # guards these four and the time of the last request
        self._last_request = time.monotonic()
        self._wake_reader, self._wake_writer = os.pipe()  # ends `serve`
        os.set_blocking(self._wake_writer, False)
        self._end_reader, self._end_writer = os.pipe()  # ends the thread that accepts
        self._pipes = (self._wake_reader, self._wake_writer, self._end_reader, self._end_writer)
        super().__init__((host, port), Connection, bind_and_activate=listener is None)
        if listener is not None:
            self.socket.close()
            self.socket, self.server_address = listener, listener.getsockname()
        self.server_name, self.server_port = host, self.server_address[1]

    def server_bind(self) -> None:
        """Bind without http.server's look-up of the host's full name, which can take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # inherited
        socketserver.TCPServer.server_bind(self)

    def descriptors(self) -> tuple[int, ...]:
        """The file descriptors that a fork has to keep open."""
        return (self.fileno(), *self._pipes)

    @property
    def url(self) -> str:
        host = {"0.0.0.0": DEFAULT_HOST, "::": "::1"}.get(self.access.host, self.access.host)
        authority = f"[{host}]" if ":" in host else host
        return f"http://{authority}:{self.server_port}"

    # -- from start to stop ------------------------------------------------------------------------

    def accept(self) -> None:
        """Start to accept connections. Orders are obeyed at once; requests wait for `serve`."""
        self._acceptor = threading.Thread(target=self.serve_forever, daemon=True)
        self._acceptor.start()

    def serve(
        self,
        service: MetadataService | BrokenService,
        is_wanted: Callable[[float], bool],
        tick: float | None = None,
    ) -> None:
        """Answer requests until `stop` is called or `is_wanted` returns False; then call `finish`.

        `is_wanted` is called every `tick` seconds (TICK_SECONDS, if not given), with the seconds
        since the last request.
        """
        self.service = service
        self.refuses_strangers = self.access.credentials is None and tells_owners(self.socket)
        self._last_request = time.monotonic()
        self.is_open.set()
        if self._acceptor is None:
            self.accept()
        while not select.select([self._wake_reader], [], [], tick or TICK_SECONDS)[0]:
            self._close_overdue()
            if not is_wanted(self._idle_seconds()):
                break

    def finish(self) -> None:
        """Accept no more connections, and return once the requests in flight are answered."""
        self.is_closing = True
        self.shutdown()
        self.server_close()
        with self._lock:
            for connection in self._connections:
                if connection not in self._busy:
                    connection.cut_off()
            self._lock.wait_for(lambda: not self._busy, timeout=SHUTDOWN_SECONDS)

    def stop(self, *_: object) -> None:
        """Make `serve` return. May be called as a signal handler, and by another thread if that
        waits for `serve` before it calls `finish`."""
        if not self.is_closing:
            os.write(self._wake_writer, b"!")

    def stop_at_signals(self) -> None:
        """Make `serve` return at once after a signal that has a handler.

        Python calls the handler in the main thread, which may sleep on in `serve` if the system has
        delivered the signal to another thread.
        """
        signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)

    def service_or_refusal(self) -> MetadataService | BrokenService:
        """The service that answers requests; HttpError 503 if the owner refuses them."""
        refusal = self.owner.refusal() if self.owner is not None else None
        if refusal is not None:
            raise HttpError(503, refusal)
        return self.service

    def count_clients(self) -> int:
        """The number of connections that have sent a request, and not only orders."""
        with self._lock:
            return sum(connection.has_used_api for connection in self._connections)

    def _idle_seconds(self) -> float:
        with self._lock:
            if self._busy or self._pages:
                return 0.0
            return time.monotonic() - self._last_request

    def _close_overdue(self) -> None:
        now = time.monotonic()
        with self._lock:
            overdue = [c for c, deadline in self._connections.items() if deadline < now]
        for connection in overdue:
            connection.cut_off()

    # -- what connections report -------------------------------------------------------------------

    def note_waiting(self, connection: Connection) -> None:
        """The connection waits for its next request."""
        with self._lock:
            self._busy.discard(connection)
            self._connections[connection] = time.monotonic() + KEEP_ALIVE_SECONDS
            self._last_request = time.monotonic()
            if self.is_closing:
                self._lock.notify()

    def note_receiving(self, connection: Connection) -> None:
        """The connection has begun to receive a request."""
        with self._lock:
            self._busy.add(connection)
            self._connections[connection] = time.monotonic() + REQUEST_SECONDS

    def note_answering(self, connection: Connection) -> None:
        """The connection has received a request, and its handler has no deadline."""
        with self._lock:
            self._connections[connection] = math.inf

    def note_sending(self, connection: Connection) -> None:
        """The connection starts to send an answer."""
        with self._lock:
            self._connections[connection] = time.monotonic() + REQUEST_SECONDS

    def note_unsent(self, connection: Connection, size: int) -> bool:
        """The connection has `size` bytes left to send, and its reader has just made progress.

        False if that would exceed MOST_UNSENT together with what other readers have not taken yet.
        To make room, those that have made no progress for the longest time are dropped.
        """
        now = time.monotonic()
        dropped = []
        with self._lock:
            self._unsent.pop(connection, None)
            excess = sum(self._unsent.values()) + size - MOST_UNSENT
            for other in sorted(self._unsent, key=self._last_progress) if excess > 0 else ():
                if excess <= 0 or now - self._last_progress(other) < STALLED_SECONDS:
                    break
                excess -= self._unsent.pop(other)
                dropped.append(other)
            has_room = excess <= 0 or not self._unsent
            if has_room:
                self._unsent[connection] = size
                self._connections[connection] = now + REQUEST_SECONDS
        for other in dropped:
            other.drop()
        return has_room

    def _last_progress(self, connection: Connection) -> float:
        """When the reader of an answer last took some of it. The caller holds `_lock`."""
        return self._connections.get(connection, 0.0) - REQUEST_SECONDS

    def note_sent(self, connection: Connection) -> None:
        """The connection has sent all that it had to send, and has no deadline now."""
        with self._lock:
            self._unsent.pop(connection, None)
            self._connections[connection] = math.inf

    def note_upgraded(self, connection: Connection) -> None:
        """The connection becomes the WebSocket of an open page, which the service stays for.

        HttpError 503 if too many pages are open.
        """
        with self._lock:
            if len(self._pages) >= MOST_PAGES:
                raise HttpError(503, "Too many pages are open.")
            self._busy.discard(connection)
            self._pages.add(connection)
            if self.is_closing:
                connection.cut_off()
                self._lock.notify()

    def note_closed(self, connection: Connection) -> None:
        """The connection has ended."""
        with self._lock:
            self._busy.discard(connection)
            self._pages.discard(connection)
            self._unsent.pop(connection, None)
            self._connections.pop(connection, None)
            self._lock.notify()

    # -- seams of socketserver ---------------------------------------------------------------------

    def serve_forever(self, poll_interval: float = math.inf) -> None:
        """Accept connections until `shutdown`. Unlike socketserver's, this never wakes up to see
        whether that was called: a service that nobody asks would do so twice a second."""
        while self._end_reader not in select.select([self, self._end_reader], [], [])[0]:
            self.handle_request()

    def server_close(self) -> None:
        super().server_close()
        for descriptor in self._pipes:
            os.close(descriptor)

    def shutdown(self) -> None:
        """Return when no more connections are accepted."""
        os.write(self._end_writer, b"!")
        if self._acceptor is not None:
            self._acceptor.join()

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in OUT_OF_FILES:
                time.sleep(0.05)  # the connection stays in the backlog: do not spin on it
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._connections) < MOST_CONNECTIONS or self._drop_oldest_silent():
            super().process_request(request, client_address)
            return
        logger().warning("more than %d connections", MOST_CONNECTIONS)
        body = error_response(
            HttpError(503, "The service has too many connections; try again.")
        ).content
        request.setblocking(False)
        with contextlib.suppress(OSError):
            request.send(
                b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
                b"METADATA_SERVICE_VERSION: %s\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
                % (PROTOCOL_VERSION.encode(), len(body), body)
            )
        self.shutdown_request(request)

    def _drop_oldest_silent(self) -> bool:
        """Drop the oldest connection that has not used the API yet; False if there is none."""
        with self._lock:
            dropped = next((c for c in self._connections if not c.has_used_api), None)
            if dropped is not None:
                del self._connections[dropped]
        if dropped is not None:
            dropped.drop()
        return dropped is not None

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger().exception("a connection failed")


class Connection(http.server.BaseHTTPRequestHandler):
    """One connection and its requests, one after the other, on a thread of its own."""

    server: Server
    raw_requestline: bytes
    protocol_version = "HTTP/1.1"
    server_version = f"{PROGRAM}/{__version__}"
    disable_nagle_algorithm = True
    wbufsize = -1  # buffered, so that head and body of an answer leave in one packet
    # Without a timeout of the socket's own, which would cost two more system calls a request (a
    # poll before each recv and send, 8 us): the server ends connections that are overdue.
    timeout = None

    def setup(self) -> None:
        super().setup()
        self.has_used_api = False  # whether a request of it got past the checks of access
        self._is_stranger: bool | None = None  # None until it has been looked up
        self.server.note_waiting(self)

    def finish(self) -> None:
        try:
            super().finish()
        except OSError:
            pass  # the client has gone
        finally:
            self.server.note_closed(self)

    def drop(self) -> None:
        """End the connection from another thread, even in the middle of a request."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def cut_off(self) -> None:
        """End the connection from another thread; if it is idle, what it has sent still arrives."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(
                socket.SHUT_RDWR if self in self.server._busy else socket.SHUT_RD
            )

    def handle_one_request(self) -> None:
        try:
            if not cast(io.BufferedReader, self.rfile).peek(1):
                self.close_connection = True
                return
            self.server.note_receiving(self)
            super().handle_one_request()
            self.server.note_waiting(self)
        except OSError:
            self.close_connection = True  # the client is too slow, or has gone

    def respond(self) -> None:
        """Answer the request whose head has been read."""
        try:
            response: Response | Upgrade | None = self._obey()
            if response is None:
                self.server.is_open.wait()
                request = self._request()
                self.server.note_answering(self)
                response = self.server.service_or_refusal().answer(request)
            if isinstance(response, Upgrade):
                self.server.note_upgraded(self)
        except HttpError as error:
            self.close_connection = True  # because the rest of the request has not been read
            response = error_response(error)
        if isinstance(response, Upgrade):
            self._upgrade(response)
        else:
            self._send(response)

    def _obey(self) -> Response | None:
        """Carry out an order; None if the request is not one, or comes from another machine."""
        owner, peer = self.server.owner, self.client_address[0]
        if owner is None or NONCE_HEADER not in self.fields:
            return None
        if not is_loopback(peer) and peer != self.connection.getsockname()[0]:
            return None
        told = owner.obey(self.path.lstrip("/"), self.fields)
        if told is None:
            return None
        self.close_connection = True
        return json_response(told)

    def _upgrade(self, upgrade: Upgrade) -> None:
        """Switch protocols, run the new one to its end, and close the connection."""
        self.close_connection = True
        self._write_head(101, upgrade.headers)
        self.wfile.flush()
        upgrade.run(self)

    def receive(self, seconds: float) -> bytes | None:
        """The bytes that arrive in time: None if none do, b"" at the end of the stream."""
        self.connection.settimeout(seconds)
        try:
            data: bytes = self.connection.recv(2**16)
            return data
        except (socket.timeout, BlockingIOError):
            return None

    def send(self, data: bytes, seconds: float) -> None:
        """Send all of the data. OSError if the peer takes none of it for so long, or there are too
        many bytes waiting for other readers."""
        self.connection.settimeout(seconds)
        unsent = memoryview(data)
        while unsent:
            if not self.server.note_unsent(self, len(unsent)):
                raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
            unsent = unsent[self.connection.send(unsent) :]
        self.server.note_sent(self)

    do_GET = do_HEAD = do_POST = do_PATCH = do_PUT = do_DELETE = do_OPTIONS = do_TRACE = respond
    do_CONNECT = respond

    def _request(self) -> Request:
        """The request whose head has been read; HttpError if it may not be made, or is wrong."""
        target = self._origin_form()
        self._refuse_stranger()
        self.server.access.check(self.fields)
        segments, parameters = decode_target(target)
        is_public = self.server.service.is_public(self.command, segments)
        credentials, port = self.server.access.credentials, self.server.server_port
        if credentials is not None and not is_public:
            credentials.check(self.fields, port)
        body = self._body(LARGEST_PUBLIC_BODY if is_public else LARGEST_BODY)
        self.has_used_api = self.has_used_api or not is_public
        return Request(self.command, segments, parameters, body, self.fields, port)

    def _origin_form(self) -> str:
        """The target without a host; that of an absolute one replaces the header (RFC 9112, 3.2.2).

        HttpError if it is of another form.
        """
        target = self.path
        if target[:8].lower().startswith(("http://", "https://")):
            self.fields["host"], _, rest = target.partition("//")[2].partition("/")
            return f"/{rest}"
        if not target.startswith("/"):
            raise HttpError(400, "The path does not begin with a slash.")
        return target

    def _refuse_stranger(self) -> None:
        """Refuse, with HttpError 403, another user of this machine if there is no key."""
        if self._is_stranger is None:
            try:
                self._is_stranger = self.server.refuses_strangers and is_foreign(self.connection)
            except OSError as error:
                if error.errno not in OUT_OF_FILES:
                    raise
                raise HttpError(503, "The service has too many open files; try again.") from None
        if self._is_stranger:
            raise HttpError(403, STRANGERS_ARE_REFUSED)

    def _body(self, limit: int) -> bytes | None:
        """The body of the request; None if the headers announce none."""
        encoding, length = self.fields.get("transfer-encoding"), self.fields.get("content-length")
        if encoding is not None:
            if length is not None or encoding.lower() != "chunked":
                raise HttpError(
                    400, "The only Transfer-Encoding is chunked, without a Content-Length."
                )
            self._ask_for_body()
            return self._chunks(limit)
        if length is None:
            return None
        if not re.fullmatch("[0-9]{1,18}", length):
            raise HttpError(400, "Content-Length is not a number.")
        self._check_size(int(length), limit)
        self._ask_for_body()
        return self._exactly(int(length))

    def _ask_for_body(self) -> None:
        """Tell a client that waits for 100 Continue to send the body (RFC 9110, 10.1.1)."""
        if self.fields.get("expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
            self.wfile.flush()

    def _check_size(self, size: int, limit: int) -> None:
        if size > limit:
            raise HttpError(413, f"The body may have at most {limit} bytes.")

    def _exactly(self, size: int) -> bytes:
        content = self.rfile.read(size)
        if len(content) < size:
            raise HttpError(400, "The body ended too early.")
        return content

    def _chunks(self, limit: int) -> bytes:
        """A body in chunks (RFC 9112, 7.1); chunk extensions and trailers are ignored."""
        body = bytearray()
        while True:
            line = self.rfile.readline(1024)
            size = line.partition(b";")[0].strip()
            if not line.endswith(b"\n") or not re.fullmatch(b"[0-9a-fA-F]{1,16}", size):
                raise HttpError(400, "The body is not in proper chunks.")
            if int(size, 16) == 0:
                break
            self._check_size(len(body) + int(size, 16), limit)
            body += self._exactly(int(size, 16))
            if self.rfile.readline(3) not in (b"\r\n", b"\n"):
                raise HttpError(400, "The body is not in proper chunks.")
        for _ in range(100):
            if self.rfile.readline(1024) in (b"\r\n", b"\n", b""):
                return bytes(body)
        raise HttpError(431, "The body has too many trailers.")

    def _send(self, response: Response) -> None:
        has_content = self.command != "HEAD" and response.status != 204
        is_large = has_content and len(response.content) > SMALL_ANSWER
        if is_large and not self.server.note_unsent(self, len(response.content)):
            response = error_response(
                HttpError(503, "Too many answers wait for slow readers; try again.")
            )
            is_large = False
        self.server.note_sending(self)
        headers = [("METADATA_SERVICE_VERSION", PROTOCOL_VERSION), *response.headers]
        if response.status != 204:
            headers.append(("Content-Type", response.kind))
            headers.append(("Content-Length", str(len(response.content))))
        if self.close_connection or self.server.is_closing:
            self.close_connection = True
            headers.append(("Connection", "close"))
        self._write_head(response.status, headers)
        if is_large:
            self.wfile.flush()
            # Only with a timeout does each call of `send` return when some has been sent.
            self.send(response.content, KEEP_ALIVE_SECONDS)
            self.connection.settimeout(self.timeout)
        elif has_content:
            self.wfile.write(response.content)

    def _write_head(self, status: int, headers: Iterable[tuple[str, str]]) -> None:
        """Write the head of an answer, which takes 3 us; http.server's methods take 16."""
        self.log_request(status)
        lines = [
            f"{self.protocol_version} {status} {http.HTTPStatus(status).phrase}",
            f"Server: {self.server_version}",
            f"Date: {http_date(int(time.time()))}",
            *(f"{name}: {value}" for name, value in headers),
        ]
        self.wfile.write("\r\n".join((*lines, "", "")).encode("latin-1"))

    # -- seams of http.server ----------------------------------------------------------------------

    def parse_request(self) -> bool:
        """Read the head of a request; False if it has been refused.

        It replaces http.server's method, which reads headers with a mail parser: a heartbeat takes
        45 microseconds of CPU with this one and 100 with that one.
        """
        self.command, self.request_version = "", "HTTP/1.1"
        self.close_connection = True
        self.requestline = str(self.raw_requestline, "iso-8859-1").rstrip("\r\n")
        match = REQUEST_LINE.fullmatch(self.requestline)
        if match is None:
            self.send_error(400, "The request does not begin with a valid request line")
            return False
        self.command, self.path, major, minor = match.groups()
        if major != "1":
            self.send_error(505)
            return False
        try:
            self.fields = self._header_fields()
        except HttpError as error:
            self.send_error(error.status, str(error))
            return False
        connection = self.fields.get("connection", "").lower()
        self.close_connection = "close" in connection or (
            minor == "0" and "keep-alive" not in connection
        )
        return True

    def _header_fields(self) -> dict[str, str]:
        """The headers by lower-case name; several of one name are joined by commas."""
        fields: dict[str, str] = {}
        for _ in range(MOST_HEADERS + 1):
            line = self.rfile.readline(LONGEST_HEADER + 1)
            if line in (b"\r\n", b"\n"):
                return fields
            if len(line) > LONGEST_HEADER:
                raise HttpError(431, f"A header has at most {LONGEST_HEADER} bytes.")
            name, colon, value = line.decode("iso-8859-1").partition(":")
            if not colon or not HEADER_NAME.fullmatch(name):
                raise HttpError(400, "The request has a line among its headers that is not one.")
            name, value = name.lower(), value.strip()
            fields[name] = f"{fields[name]}, {value}" if name in fields else value
        raise HttpError(431, f"A request has at most {MOST_HEADERS} headers.")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse a request that http.server itself cannot parse."""
        self.close_connection = True
        sentence = message or http.HTTPStatus(code).phrase
        self._send(error_response(HttpError(code, f"{sentence.rstrip('.')}.")))

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        logger().debug('%s "%s" %s', self.client_address[0], self.requestline, code)

    def log_message(self, format: str, *args: object) -> None:
        logger().debug("%s %s", self.address_string(), format % args)


@lru_cache(maxsize=1)  # all answers of a second have the same, which takes 3 us to format
def http_date(seconds: int) -> str:
    """The value of a Date header (RFC 9110, 6.6.1)."""
    return email.utils.formatdate(seconds, usegmt=True)


def decode_target(target: str) -> tuple[list[str], Query]:
    """The segments of the path, and the parameters; HttpError if they cannot be decoded."""
    try:
        # It arrives decoded as Latin-1, and not all clients escape what is not ASCII.
        path, _, query = target.encode("latin-1").decode().partition("?")
        segments = path.split("/")[1:]
        if "%" in path:
            segments = [urllib.parse.unquote(segment, errors="strict") for segment in segments]
        parameters = urllib.parse.parse_qsl(
            query, keep_blank_values=True, errors="strict", max_num_fields=MOST_PARAMETERS
        )
    except UnicodeDecodeError:
        raise HttpError(400, "The path or its parameters are not valid UTF-8.") from None
    except ValueError:
        raise HttpError(400, f"There are more than {MOST_PARAMETERS} parameters.") from None
    return segments, parameters


# -- orders to another service ---------------------------------------------------------------------

ORDER_SECONDS = 5.0
"""How long a service may take to carry out an order."""


def send_order(
    address: tuple[str, int], nonce: str, order: str, waits: bool, **fields: object
) -> Mapping[str, Any]:
    """Send an order to the service at an address, and return its reply, or {} without `waits`.

    OSError if it is not there or refuses. The nonce proves to the service that we have read its
    pidfile, and that the service accepts it proves to us that it is the one that wrote the file.
    As HTTP/1.0 has it, whoever answers closes the connection.
    """
    headers = {NONCE_HEADER: nonce, **fields}
    lines = [f"POST /{order} HTTP/1.0", *(f"{name}: {value}" for name, value in headers.items())]
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family) as connection:
        connection.settimeout(ORDER_SECONDS)
        connection.connect(address)
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        if not waits:
            return {}
        with connection.makefile("rb") as f:
            head, _, body = f.read().partition(b"\r\n\r\n")
    try:
        told = json.loads(body) if b" 200 " in head.partition(b"\r\n")[0] else None
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise ConnectionRefusedError("another program answers there")
    return told


# ==================================================================================================
# Registry: which service runs where: pidfile locks and leases
# ==================================================================================================
#
# Rules of this layer:
#
# - A service is alive while its pidfile is locked. A pid, the name of a machine or an answer on a
#   port proves nothing.
# - A service serves the folder that it was started for, which is known by device and inode, and
#   only while its path leads there. If that does not settle it, the service is asked.
# - A service is told what to do by orders, which carry the nonce from its pidfile
#   (`Service.order`). A signal is the last resort; on Linux, only for a process that provably holds
#   the lock on the pidfile.
#
# Locks. All are flocks on private files in the root's .metaflow, and are released when the last
# process that has the file open ends, in whatever way. A process that needs several of them
# acquires them in this order, so that there are no deadlocks:
#
#     LEASE      shared     a command, for as long as it needs the service
#                exclusive  the service, when it has decided to end; a command that stops a service
#                           if nobody needs it. Neither waits for the lock
#     LOCK_FILE  shared     a command that looks for the service
#                exclusive  a command that starts a service, or removes the lease of a copied root;
#                           the service, when it later writes its pidfile
#     PIDFILE    exclusive  the service, all its life
#                shared     a command that tests whether the file is locked; it does not wait
#
# So a command that asks for the lease of a service that is ending gets it when the service is gone,
# and a command that holds LOCK_FILE never sees a service that has not registered itself yet. The
# holder of a lock may delete the file. Each process therefore compares the file that it has locked
# with the one at the path, and starts again if they differ.

PIDFILE = f"{PROGRAM}.pid"
LEASE = f"{PROGRAM}.lease"
LOCK_FILE = f"{PROGRAM}.lock"
LOG_FILE = f"{PROGRAM}.log"
PORT_FILE = f"{PROGRAM}.port"

LOCK_SECONDS = SHUTDOWN_SECONDS + 5
"""How long to wait for a lock: longer than a service takes to stop, which commands wait for."""

STOP_SECONDS = SHUTDOWN_SECONDS + 10
"""How long to wait for the end of a service that was told to stop."""

LEAVING_SECONDS = 1.0
"""How long to wait for the end of a service that cannot be told to stop, but may be stopping."""

# -- what a pidfile says ---------------------------------------------------------------------------


class Service(NamedTuple):
    """A running service, as its pidfile describes it."""

    pid: int
    host: str
    port: int
    url: str
    root: str  # the folder that has the .metaflow
    version: str
    started_at: int  # epoch seconds
    log: str | None  # the log file; None if it logs to a terminal
    machine: str
    ui_folder: str | None
    key: str | None
    is_stopping: bool = False
    nonce: str | None = None  # what an order must carry; None in versions that take no orders
    device: int = 0  # of the .metaflow that it serves
    inode: int = 0
    network: str = ""  # the id of the network namespace in which it listens
    idle_timeout: float | None = None  # None in versions that do not tell it

    @property
    def client_host(self) -> str:
        """The host that clients connect to, which differs from `host` if that is 0.0.0.0."""
        return urllib.parse.urlsplit(self.url).hostname or self.host

    def settings(self, user: Environment) -> dict[str, str]:
        """The variables to set in a user's environment for Metaflow to use the service.

        They include the root, so that the records, artifacts and logs of a flow stay together.
        """
        key = {} if self.key is None else {ENV_KEY: self.key}
        settings = {
            "METAFLOW_SERVICE_URL": self.url,
            "METAFLOW_DEFAULT_METADATA": "service",
            ENV_SYSROOT: self.root,
            **proxy_exceptions(self.client_host, user),
        }
        return {**settings, ENV_EXPORTED: describe_exports({**settings, **key}, user), **key}

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment with the settings, for a subprocess or Metaflow's Runner."""
        user = user_environment(os.environ)
        return {**user, **self.settings(user)}

    def __repr__(self) -> str:
        """Where the service is, without its key, since notebooks and logs keep what they show."""
        return f"<Service of {self.root} at {self.url}>"

    def public_fields(self) -> dict[str, object]:
        """The fields that others may see."""
        private = ("key", "is_stopping", "nonce", "device", "inode", "network")
        return {name: value for name, value in self._asdict().items() if name not in private}

    def order(self, order: str, waits: bool = True, **fields: object) -> Mapping[str, Any]:
        """Send the service an order (see `send_order`); OSError if it takes none."""
        if self.nonce is None:
            raise ConnectionRefusedError("it takes no orders")
        return send_order((self.client_host, self.port), self.nonce, order, waits, **fields)

    def serves(self, folder: str) -> bool:
        """Whether a .metaflow is the one that the service serves, by whatever path.

        It is if the service's own path leads to it and the service can be reached from here.
        Otherwise the folder may have been moved, or have another path where the service runs, and
        the service is asked.
        """
        status, own_status = stat_or_none(folder), stat_or_none(datastore_folder(self.root))
        if status is None:
            return False
        is_in_place = own_status is not None and os.path.samestat(own_status, status)
        if self.nonce is None:
            return is_in_place
        if not self.was_started_for(folder):
            return False
        if is_in_place and (self.machine, self.network) == (own_name(), namespace_id("net")):
            return True
        try:
            return bool(self.order("identify").get("serves"))
        except OSError:
            return False

    def was_started_for(self, folder: str) -> bool:
        """Whether the service was started for this .metaflow, which may have been moved since."""
        status = stat_or_none(folder)
        return status is not None and (self.device, self.inode) == (status.st_dev, status.st_ino)


def own_name() -> str:
    """The host name of this machine."""
    return os.uname().nodename.lower()


def namespace_id(kind: str) -> str:
    """The id of this process's namespace of a kind ("pid" or "net"); "-" if there are none."""
    status = stat_or_none(f"/proc/self/ns/{kind}")
    return str(status.st_ino) if status is not None else "-"


def read_pidfile(path: str) -> Service:
    """The service that a pidfile describes; ServiceError if it describes none."""
    with open(path, "rb") as f:
        return parse_pidfile(f.read().decode(errors="replace"), path)


def parse_pidfile(content: str, path: str) -> Service:
    """The service that the content of a pidfile describes; ServiceError if it describes none.

    The service may be of any version: fields that are missing get a default, unknown ones are
    ignored.
    """
    try:
        fields = json.loads(content)
        port, host = int(fields["port"]), fields.get("host", DEFAULT_HOST)
        defaults = {
            "host": host,
            "url": f"http://{host}:{port}",
            "root": os.path.dirname(os.path.dirname(path)),
            "version": "0",
            "started_at": 0,
            "log": None,
            "machine": own_name(),
            "ui_folder": None,
            "key": None,
        }
        known = {name: fields[name] for name in Service._fields if name in fields}
        return Service(**{**defaults, **known})
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ServiceError(f"{path} is locked, but does not say by which service.") from None


# -- files and locks -------------------------------------------------------------------------------


def datastore_folder(root: str) -> str:
    return os.path.join(root, DATASTORE_DIR)


def root_file(root: str, name: str) -> str:
    """The path of one of this program's files in a root."""
    return os.path.join(datastore_folder(root), name)


@contextlib.contextmanager
def made_datastore_folder(root: str) -> Iterator[None]:
    """Have a .metaflow in a root; one that was made for the block is removed if that fails.

    It stays if there is anything in it but a lease that nobody holds. ServiceError if it cannot be
    made.
    """
    folder = datastore_folder(root)
    is_new = not os.path.lexists(folder)
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError as error:
        raise ServiceError(f"{folder} cannot be made: {error.strerror}.") from None
    try:
        yield
    except BaseException:
        if is_new:
            remove_unheld_lease(root)
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        raise


def has_datastore_folder(root: str) -> bool:
    """Whether a root has a .metaflow; ServiceError if this user may not look into it."""
    folder = datastore_folder(root)
    try:
        # Its "." is found by those who may search it, which takes more than to list it.
        os.close(os.open(os.path.join(folder, os.curdir), os.O_RDONLY | os.O_DIRECTORY))
    except PermissionError as error:
        raise ServiceError(f"{folder} cannot be opened: {error.strerror}.") from None
    except OSError:
        return False
    return True


def open_datastore_folder(root: str) -> int:
    """Open the .metaflow of a root; ServiceError if that is impossible."""
    folder = datastore_folder(root)
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ServiceError(f"{folder} cannot be opened: {error.strerror}.") from None


def open_private_file(path: str, flags: int, folder: int | None = None) -> int:
    """Open a regular file of this user's, and make it private if others may read it.

    A relative path begins at `folder`, which is open. FileNotFoundError if there is no file and the
    flags do not create it. ServiceError if it belongs to another user, is not a regular file, or
    cannot be opened, for example as its folder has been removed.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for a process at its other end.
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o600, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.ENOENT and not flags & os.O_CREAT:
            raise
        reason = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise ServiceError(f"{path} cannot be opened: {reason}.") from None
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid():
            raise ServiceError(f"{path} belongs to another user.")
        if not stat.S_ISREG(status.st_mode):
            raise ServiceError(f"{path} is not a file.")
        if stat.S_IMODE(status.st_mode) & 0o077:
            os.fchmod(descriptor, 0o600)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class LockedFile:
    """An open file with a flock, which is released when no process has the file open any more."""

    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor

    @classmethod
    def acquire(cls, path: str, how: int, flags: int = os.O_RDWR | os.O_CREAT) -> LockedFile:
        """Open a private file (see `open_private_file`) and lock it (see `lock_descriptor`)."""
        while True:
            descriptor = open_private_file(path, flags)
            try:
                lock_descriptor(descriptor, path, how)
                status = stat_or_none(path)
                if status is not None and os.path.samestat(status, os.fstat(descriptor)):
                    return cls(path, descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # the process that had it locked has deleted it

    @classmethod
    def try_acquire(
        cls, path: str, how: int, flags: int = os.O_RDWR | os.O_CREAT
    ) -> LockedFile | None:
        """The same without waiting: None if another process has the file locked."""
        try:
            return cls.acquire(path, how | fcntl.LOCK_NB, flags)
        except BlockingIOError:
            return None

    def read(self) -> str:
        return os.pread(self.descriptor, os.fstat(self.descriptor).st_size, 0).decode()

    def write(self, text: str) -> None:
        content = text.encode()
        os.pwrite(self.descriptor, content, 0)
        os.ftruncate(self.descriptor, len(content))  # last, so that a failed write loses nothing

    def keep_on_exec(self) -> None:
        os.set_inheritable(self.descriptor, True)

    def release(self) -> None:
        os.close(self.descriptor)

    def __enter__(self) -> LockedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock_descriptor(descriptor: int, path: str, how: int) -> None:
    """Lock an open file as flock does; BlockingIOError if it is locked and `how` has LOCK_NB.

    ServiceError if the file system has no locks, as some network file systems, or if another
    process holds the lock for longer than LOCK_SECONDS, as any that can read the file may do.
    """
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        except BlockingIOError:
            if how & fcntl.LOCK_NB:
                raise
            if time.monotonic() > deadline:
                raise ServiceError(f"{path} is locked by another process.") from None
        except OSError as error:
            raise ServiceError(f"{path} cannot be locked: {error.strerror}.") from None
        time.sleep(0.002)


def is_hard_link(path: str) -> bool:
    """Whether a file has other names, perhaps in other folders. False if it cannot be reached."""
    try:
        return os.stat(path).st_nlink > 1
    except OSError:
        return False


# -- finding the service of a root -----------------------------------------------------------------


@contextlib.contextmanager
def registry_lock(root: str, how: int) -> Iterator[None]:
    """Hold the LOCK_FILE of a root: exclusively to start a service, shared to look for one.

    It is held for milliseconds, or for as long as a service takes to stop. The folder itself is not
    locked, because every user who can read it could do that too. The file is removed by the last
    exclusive holder, if there is no service then.
    """
    access = os.O_RDWR if how & fcntl.LOCK_EX else os.O_RDONLY
    lock = LockedFile.acquire(root_file(root, LOCK_FILE), how, access | os.O_CREAT)
    try:
        yield
    finally:
        if how & fcntl.LOCK_EX and not os.path.lexists(root_file(root, PIDFILE)):
            remove_file(lock.path)
        lock.release()


def find_service(root: str) -> Service | None:
    """The service of a root; None if none runs. Creates nothing if none has ever run."""
    if not (has_datastore_folder(root) and os.path.lexists(root_file(root, PIDFILE))):
        return None
    with registry_lock(root, fcntl.LOCK_SH):
        return running_service(root)


def running_service(root: str) -> Service | None:
    """The service of a root; None if none runs. The caller holds `registry_lock`.

    If the service is stopping, this waits until it is gone, and returns None. A service whose
    folder was moved to this root is told to stop, and waited for likewise.
    """
    folder, pidfile = datastore_folder(root), root_file(root, PIDFILE)
    if not is_locked(pidfile):
        return None
    try:
        service = read_pidfile(pidfile)
    except FileNotFoundError:
        return None  # it has ended since
    if not service.is_stopping and service.serves(folder):
        return service
    if is_hard_link(pidfile) and not service.was_started_for(folder):
        return None  # `cp -l` made this link: the service runs, but for the original folder
    is_ending = service.is_stopping or stop_moved_service(service, pidfile)
    if not wait_until_unlocked(pidfile, STOP_SECONDS if is_ending else LEAVING_SECONDS):
        raise ServiceError(
            f"The service of {service.root} holds {folder}, but cannot be reached from here."
        )
    return None


def is_locked(pidfile: str) -> bool:
    """Whether a process has a pidfile locked, and so is a service that is alive."""
    try:
        lock = LockedFile.try_acquire(pidfile, fcntl.LOCK_SH, os.O_RDONLY)
    except FileNotFoundError:
        return False
    if lock is None:
        return True
    lock.release()
    return False


def wait_until_unlocked(pidfile: str, seconds: float) -> bool:
    """Wait until no process has a pidfile locked; False if that takes more than some seconds."""
    deadline = time.monotonic() + seconds
    while is_locked(pidfile):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def acquire_lease(root: str) -> LockedFile:
    """A shared lock on the LEASE of a root, which keeps its service from ending when it is idle.

    If the service is stopping, this waits until it is gone. The caller makes the .metaflow.
    """
    path = root_file(root, LEASE)
    if is_hard_link(path):
        with registry_lock(root, fcntl.LOCK_EX):
            if is_hard_link(path) and running_service(root) is None:
                remove_file(path)  # it is the lease of another root, of which this is a copy
    return LockedFile.acquire(path, fcntl.LOCK_SH)


def remove_unheld_lease(root: str) -> None:
    """Remove the LEASE of a root, if there is one and no process holds it."""
    with contextlib.suppress(OSError, ServiceError):
        lease = LockedFile.try_acquire(root_file(root, LEASE), fcntl.LOCK_EX, os.O_RDWR)
        if lease is not None:
            remove_file(lease.path)
            lease.release()


# -- what a service is told ------------------------------------------------------------------------


def hold_service(service: Service, pid: int, waits: bool = False) -> None:
    """Have a service stay for as long as a process lives; this also restarts its idle time.

    Returns when the order is sent or, if it `waits`, when the service has received it.
    """
    with contextlib.suppress(OSError):
        service.order("hold", waits, pid=pid, namespace=namespace_id("pid"))


def stop_service(service: Service) -> None:
    """Tell a service to stop, and return when it is gone."""
    pidfile = root_file(service.root, PIDFILE)
    try:
        service.order("stop")
    except OSError:
        if not wait_until_unlocked(pidfile, LEAVING_SECONDS):
            stop_process(service, pidfile)
    if not wait_until_unlocked(pidfile, STOP_SECONDS):
        raise ServiceError(f"Process {service.pid} was told to stop, but still runs.")


def stop_moved_service(service: Service, pidfile: str) -> bool:
    """Tell a service to stop whose folder was moved to where the pidfile is now.

    Returns False if the service cannot be told, or was started for another folder.
    """
    if service.nonce is None:  # such a version does not notice by itself that its folder was moved
        stop_process(service, pidfile)
        return True
    if not service.was_started_for(os.path.dirname(pidfile)):
        return False
    try:
        service.order("stop")
    except OSError:
        return False
    return True


def stop_process(service: Service, pidfile: str) -> None:
    """Send SIGTERM to the process of a service, whose pidfile is locked.

    The pid alone may be that of another process, which has started since or is in another pid
    namespace. So on Linux the process has to be the one that holds the lock. ServiceError if the
    process is not the service, or the signal cannot be sent.
    """
    try:
        process = open_pidfd(service.pid)
        try:
            if os.path.isdir("/proc/self/fd") and not holds_lock(service.pid, pidfile):
                raise ServiceError(
                    f"The service of {service.root} does not answer, and process {service.pid} "
                    "is not it: it runs where it cannot be reached from here."
                )
            if process == NO_PIDFD:
                os.kill(service.pid, signal.SIGTERM)
            else:
                signal.pidfd_send_signal(process, signal.SIGTERM)
        finally:
            close_pidfd(process)
    except OSError as error:
        raise ServiceError(f"Process {service.pid} cannot be stopped: {error.strerror}.") from None


NO_PIDFD = -1


def open_pidfd(pid: int) -> int:
    """A descriptor of a process, or NO_PIDFD where the system has none; OSError without a process.

    Where Python offers them the kernel may still be too old, or a sandbox not allow them.
    """
    if not hasattr(os, "pidfd_open"):
        return NO_PIDFD
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise
        return NO_PIDFD


def close_pidfd(descriptor: int) -> None:
    if descriptor != NO_PIDFD:
        os.close(descriptor)


def holds_lock(pid: int, path: str) -> bool:
    """Whether a process has a file locked, according to Linux's /proc.

    If /proc does not list locks, it is enough that the process has the file open.
    """
    status = os.stat(path)
    lists_locks = os.path.exists("/proc/locks")
    for name in os.listdir(f"/proc/{pid}/fd"):
        opened = stat_or_none(f"/proc/{pid}/fd/{name}")
        if opened is not None and os.path.samestat(opened, status):
            with open(f"/proc/{pid}/fdinfo/{name}", encoding="ascii") as f:
                if "FLOCK" in f.read() or not lists_locks:
                    return True
    return False


# -- the services of a user ------------------------------------------------------------------------


class ServiceIndex:
    """A folder of links to the pidfiles of all roots, by which `--all` finds their services.

    Nothing else needs the links: if the folder cannot be written, only `--all` finds less.
    """

    def __init__(self, folder: str) -> None:
        """ServiceError if the folder belongs to another user."""
        self.folder = os.path.abspath(folder)  # because a daemon changes its current folder
        with contextlib.suppress(OSError):
            if os.stat(self.folder).st_uid != os.geteuid():
                raise ServiceError(f"{folder} belongs to another user.")

    def add(self, root: str) -> None:
        with contextlib.suppress(OSError):
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            os.symlink(root_file(root, PIDFILE), self._link(root))

    def remove(self, root: str) -> None:
        remove_file(self._link(root))

    def services(self, besides: str | None = None) -> list[Service]:
        """The running services of all roots but `besides`, sorted by root.

        Removes the links to services that do not run, and skips roots that cannot be read.
        """
        found = []
        for link in self._links():
            with contextlib.suppress(OSError, ServiceError):
                root = os.path.dirname(os.path.dirname(os.readlink(link)))
                if root == besides:
                    continue
                service = find_service(root)
                if service is None:
                    remove_file(link)
                else:
                    found.append(service)
        return sorted(found, key=lambda service: service.root)

    def has_dangling_link(self) -> bool:
        """Whether a pidfile is gone, perhaps with its folder, whose service has not removed the
        link: if it has not been killed, it is about to end."""
        return not all(map(os.path.exists, self._links()))

    def _links(self) -> list[str]:
        try:
            paths = [os.path.join(self.folder, name) for name in os.listdir(self.folder)]
        except OSError:
            return []
        return [path for path in paths if path.endswith(".pid") and os.path.islink(path)]

    def _link(self, root: str) -> str:
        return os.path.join(self.folder, f"{digest(os.fsencode(root), 8)}.pid")


# ==================================================================================================
# Daemon: becoming one: binding, the double fork, the log file, the idle stop
# ==================================================================================================
#
# How a service starts. The command that starts it locks the pidfile and listens (a `Claim`), forks
# twice, and returns when the daemon has registered itself. The daemon then replaces itself by a new
# interpreter, so that it shows no trace of the command (`exec_interpreter`); a `DaemonState` is all
# that it takes along. Requests wait in the socket's queue until Metaflow is imported; orders wait
# only until the new interpreter runs.
#
# What is left if the process is killed, or the machine stops:
#
#     before the pidfile is written        An empty pidfile that is not locked, so no service.
#     from then on until the exec is done  A pidfile that is not locked, so no service. The command
#                                          finds the port closed; the next one starts a service.
#     while it serves or ends              The same, and its link in the index. Every record that
#                                          was acknowledged, none in part (see the Store).
#     while a command holds the lease      Nothing: the lock ends with the command.
#
# When a service ends: when an order or a signal tells it to; when it has been idle, no process
# holds the lease, and none lives that it stays for; when its folder is gone or has another pidfile.
# It then removes its own files, but touches nothing in a folder that has taken its own's place.
#
# Threads. The main thread imports Metaflow and then stays in `Server.serve`. Orders are carried out
# in the threads of their connections, which may read everything but change only `_dependents`,
# which has a lock.

BROKEN_IDLE_TIMEOUT = 5.0
"""After so many idle seconds a service that could not import Metaflow ends, to make room for one
that can."""

RELEASE_SECONDS = 2 * TICK_SECONDS
"""How long to wait for a port that a service whose folder is gone may be about to release."""


class Options(NamedTuple):
    """What a service is started with."""

    root: str
    host: str  # empty: DEFAULT_HOST
    port: int  # 0: any free one
    idle_timeout: float  # seconds; 0: it never ends
    key: str | None
    generates_key: bool  # if there is none
    ui_folder: str | None  # a build of the official UI, to be shown in place of our page
    is_debug: bool  # whether every request is logged
    service_index: ServiceIndex

    def for_new_service(self) -> Options:
        """The same options, with what a new service gets where they leave that open."""
        key = self.key
        if key is None and self.generates_key:
            key = base64.urlsafe_b64encode(os.urandom(24)).decode()
        return self._replace(host=self.host or DEFAULT_HOST, key=key)


# -- starting a service ----------------------------------------------------------------------------


def ensure_service(options: Options) -> tuple[Service, bool]:
    """The service of the root, which is started if none runs, and whether it was.

    Returns when the service owns its root and accepts connections; it answers them once it has
    imported Metaflow. ServiceError if it cannot start, or runs with other options.
    """
    service = find_service(options.root)
    if service is None:
        with made_datastore_folder(options.root), registry_lock(options.root, fcntl.LOCK_EX):
            service = running_service(options.root)
            if service is None:
                return launch_daemon(options.for_new_service()), True
    wants_key = options.generates_key or options.key is not None
    conflicts = {
        f"on {service.host}": options.host not in ("", service.host),
        f"on port {service.port}": options.port not in (0, service.port),
        "without a key": wants_key and service.key is None,
        "with another key": options.key not in (None, service.key),
        "with another UI": options.ui_folder not in (None, service.ui_folder),
    }
    for conflict, applies in conflicts.items():
        if applies:
            raise ServiceError(f"The service of {service.root} runs already, {conflict}.")
    return service, False


def is_outdated(service: Service) -> bool:
    """Whether a service is of another version of this program, or of one that takes no orders."""
    return service.version != __version__ or service.nonce is None


def retire_outdated_service(root: str) -> None:
    """Stop the service of a root if it is outdated and nobody needs it; the next gets its port.

    It is needed if a command holds the lease (so call this before you acquire it) or if it says so
    itself. A service with a key, another address or a terminal was started on purpose, and is left
    to the user.
    """
    service = find_service(root)
    if service is None or not is_outdated(service):
        return
    if service.host != DEFAULT_HOST or service.key is not None or service.log is None:
        return
    lease = LockedFile.try_acquire(root_file(root, LEASE), fcntl.LOCK_EX)
    if lease is None:
        return
    with contextlib.suppress(ServiceError):
        if not is_needed(service):
            stop_service(service)
            save_port(root, service.port)
    lease.release()


def is_needed(service: Service) -> bool:
    """Whether a service says that it is needed, which services of early versions never do."""
    try:
        return bool(service.order("identify").get("is_needed"))
    except OSError:
        return False


def serve_in_foreground(options: Options) -> None:
    """Be the service of the root until it is stopped."""
    options = options.for_new_service()
    with made_datastore_folder(options.root), registry_lock(options.root, fcntl.LOCK_EX):
        service = running_service(options.root)
        if service is not None:
            raise ServiceError(f"The service of {service.root} runs already, at {service.url}.")
        claim = claim_root(options)
        daemon = Daemon(options, claim)
        register_service(options, claim, log_file=None)
    daemon.run(sys.stderr)


class Claim(NamedTuple):
    """What makes a process the service of a root. It survives a fork and an exec."""

    pidfile: LockedFile
    server: Server
    folder: int  # the open .metaflow, which is known by this whatever is at its path
    nonce: str  # what orders must carry

    def release(self) -> None:
        """Leave the claim to the process that has inherited it."""
        self.server.socket.close()
        os.close(self.folder)
        self.pidfile.release()


def claim_root(options: Options) -> Claim:
    """Listen, and lock the pidfile of the root. The caller holds `registry_lock` exclusively.

    ServiceError if that is impossible; then nothing is left of it.
    """
    if importlib.util.find_spec("metaflow") is None:
        raise ServiceError(f"Metaflow is not installed for {sys.executable}.")
    with contextlib.ExitStack() as undo:
        folder = open_datastore_folder(options.root)
        undo.callback(os.close, folder)
        try:
            server = open_server(options)
        except (OSError, TypeError) as error:  # TypeError: the host cannot be any host's name
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ServiceError(
                f"Cannot listen on {options.host} port {options.port}: {reason}."
            ) from None
        undo.callback(server.server_close)
        path = root_file(options.root, PIDFILE)
        remove_file(path)  # it is not locked, or is that of another root, of which this is a copy
        pidfile = LockedFile.acquire(path, fcntl.LOCK_EX)
        undo.pop_all()
    return Claim(pidfile, server, folder, nonce=os.urandom(16).hex())


def open_server(options: Options) -> Server:
    """A server on the wanted port; if any port will do, on the root's last one if that is free.

    OSError if the port is in use. If a service that is about to end may have it, this waits first.
    """
    if options.port == 0:
        with contextlib.suppress(OSError):
            return Server(options.host, last_port(options.root), options.key)
        return Server(options.host, 0, options.key)
    deadline = time.monotonic() + RELEASE_SECONDS
    while True:
        # A service closes its port before it removes its link, so the link is looked for first.
        may_be_released = options.service_index.has_dangling_link() and time.monotonic() < deadline
        try:
            return Server(options.host, options.port, options.key)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not may_be_released:
                raise
        time.sleep(0.05)


def last_port(root: str) -> int:
    """The port of the last service of a root; 0 if it is not known."""
    try:
        descriptor = open_private_file(root_file(root, PORT_FILE), os.O_RDONLY)
    except (OSError, ServiceError):
        return 0
    with open(descriptor, encoding="ascii") as f:
        try:
            return parse_port(f.read(10).strip())
        except (OSError, ValueError):
            return 0


def save_port(root: str, port: int) -> None:
    """Save the port for the next service of the root, which takes any if that is impossible."""
    with contextlib.suppress(OSError, ServiceError):
        path = root_file(root, PORT_FILE)
        with open(open_private_file(path, os.O_WRONLY | os.O_CREAT), "w", encoding="ascii") as f:
            f.truncate(0)
            f.write(str(port))


def register_service(options: Options, claim: Claim, log_file: str | None) -> None:
    """Write to the pidfile and the index that this process is the service of the root."""
    status, server = os.fstat(claim.folder), claim.server
    service = Service(
        pid=os.getpid(),
        host=options.host,
        port=server.server_port,
        url=server.url,
        root=options.root,
        version=__version__,
        started_at=int(time.time()),
        log=log_file,
        machine=own_name(),
        ui_folder=options.ui_folder,
        key=options.key,
        nonce=claim.nonce,
        device=status.st_dev,
        inode=status.st_ino,
        network=namespace_id("net"),
        idle_timeout=options.idle_timeout,
    )
    claim.pidfile.write(json.dumps(service._asdict()))
    save_port(options.root, server.server_port)
    options.service_index.add(options.root)


# -- becoming a daemon -----------------------------------------------------------------------------

INTERPRETER_OPTIONS = {
    "isolated": "-I",
    "ignore_environment": "-E",
    "no_user_site": "-s",
    "no_site": "-S",
    "dont_write_bytecode": "-B",
    "utf8_mode": "-Xutf8",
}
"""The flags of an interpreter that decide which modules it finds and how it reads them, and the
options of Python's command line that set them."""

MODULE_CODE = sys._getframe().f_code
"""The bytecode of this module, which a new interpreter executes. Python caches none of a file that
is run, or where it must not write, and to compile the module once more would take 0.2 s. The file
may be in a zip, or gone, and may have any name."""

MODULE_PROGRAM = """
import marshal, sys, types
sys.path[:] = [*filter(None, sys.path), *{path!a}]
module = sys.modules[{name!a}] = types.ModuleType({name!a})
with open({code}, "rb") as f:
    exec(marshal.loads(f.read()), vars(module))
module.{call}
"""
"""The program of a new interpreter; see `module_program`."""

RAISED_LIMITS = ("CPU", "FSIZE", "DATA", "AS", "RSS", "NOFILE", "NPROC", "MEMLOCK")
"""The limits that a user may have set for a command and that are not meant for a service. That of
the stack is not among them, because each thread takes as much memory as it allows."""

KEPT_VARIABLES = (
    "PYTHON.*|(METAFLOW|LC|LD|DYLD|XDG)_.*"
    "|HOME|LANG|LANGUAGE|LOGNAME|PATH|SUDO_USER|TMPDIR|TZ|USER|USERNAME|VIRTUAL_ENV"
)
"""The environment variables that Python and Metaflow may need in a service."""

USER_VARIABLES = ("SUDO_USER", "USERNAME", "USER")
"""Metaflow looks all these up for each record that it makes, where an empty one counts as missing.
To find that one is missing takes 5 us."""

SECRET_VARIABLES = frozenset((ENV_KEY, ENV_EXPORTED, "METAFLOW_SERVICE_HEADERS"))
"""Those of them that a service does not need and that hold keys."""

STOP_SIGNALS = frozenset((signal.SIGTERM, signal.SIGINT))


def launch_daemon(options: Options) -> Service:
    """Start a service in the background. The caller holds `registry_lock` exclusively."""
    claim = claim_root(options)
    path = claim.pidfile.path
    reader, writer = os.pipe()
    try:
        child = os.fork()
    except OSError as error:
        remove_file(path)
        claim.release()
        raise ServiceError(f"The service cannot start: {error.strerror}.") from None
    if child == 0:
        become_daemon(options, claim, writer)
    os.close(writer)
    with contextlib.suppress(ChildProcessError):  # raised if the user ignores SIGCHLD
        os.waitpid(child, 0)
    with open(reader, encoding="utf-8") as f:
        failure = f.read()  # returns when the daemon has closed its end
    content = claim.pidfile.read()
    claim.release()
    if failure or not content:
        remove_file(path)
        raise ServiceError(failure or "The service was killed before it could start.")
    return parse_pidfile(content, path)


def become_daemon(options: Options, claim: Claim, ready: int) -> NoReturn:
    """Run the service in a process that inherits nothing else from the one that started it.

    Closes the pipe `ready` when the service is registered, or writes to it why that failed.
    """
    try:
        os.setsid()
        if os.fork() > 0:
            os._exit(0)
        os.chdir("/")
        os.umask(0o077)
        reset_process()
        redirect_output(open_log(claim.folder))
        pidfile, server = claim.pidfile.descriptor, claim.server
        close_all_but({ready, pidfile, claim.folder, *server.descriptors()})
        register_service(options, claim, log_file=root_file(options.root, LOG_FILE))
    except BaseException as error:
        reason = getattr(error, "strerror", None) or error
        os.write(ready, f"The service cannot start: {reason}.".encode(errors="replace"))
        os._exit(1)
    os.close(ready)
    exec_interpreter(options, claim)
    run_daemon(options, claim)


class DaemonState(NamedTuple):
    """All that a daemon takes along into a new interpreter, in types that JSON has."""

    options: Mapping[str, Any]  # the `Options`, with the folder of the index in place of the index
    pidfile: int  # the descriptor of an open file, like the next two
    listener: int
    folder: int
    nonce: str

    @classmethod
    def capture(cls, options: Options, claim: Claim) -> DaemonState:
        """The state of a daemon with these options and this claim."""
        return cls(
            options={**options._asdict(), "service_index": options.service_index.folder},
            pidfile=claim.pidfile.descriptor,
            listener=claim.server.fileno(),
            folder=claim.folder,
            nonce=claim.nonce,
        )

    def restore(self) -> tuple[Options, Claim]:
        """The options and the claim of a daemon in this state."""
        service_index = ServiceIndex(self.options["service_index"])
        options = Options(**{**self.options, "service_index": service_index})
        pidfile = LockedFile(root_file(options.root, PIDFILE), self.pidfile)
        listener = socket.socket(fileno=self.listener)
        server = Server(options.host, options.port, options.key, listener)
        return options, Claim(pidfile, server, self.folder, self.nonce)

    def set_inheritable(self, is_inheritable: bool) -> None:
        """Have the open files stay open across an exec, or not."""
        for descriptor in (self.pidfile, self.listener, self.folder):
            os.set_inheritable(descriptor, is_inheritable)


def exec_interpreter(options: Options, claim: Claim) -> None:
    """Replace this process by a new interpreter that calls `resume_daemon`.

    Until then the process shows the command line and environment of the command that started it.
    The new ones hold nothing that others may not see: the state, which has the key and the nonce,
    goes through a pipe. Returns if there can be no new interpreter; then this one has to do.
    """
    import marshal
    import tempfile

    with contextlib.suppress(OSError, ValueError), tempfile.TemporaryFile() as code:
        marshal.dump(MODULE_CODE, code)
        code.seek(0)
        os.set_inheritable(code.fileno(), True)
        state = DaemonState.capture(options, claim)
        state.set_inheritable(True)
        program = module_program(code.fileno(), f"resume_daemon({json.dumps(state)!a})")
        redirect_input(program.encode())
        words = [*interpreter_command(), "-", PROGRAM, "--root", options.root]
        os.execv(sys.executable, words)
    close_input()


def resume_daemon(state: str) -> NoReturn:
    """Go on as the daemon whose state `exec_interpreter` has passed on as JSON."""
    close_input()
    daemon_state = DaemonState(*json.loads(state))
    daemon_state.set_inheritable(False)
    run_daemon(*daemon_state.restore())


def interpreter_command() -> list[str]:
    """The command line of an interpreter that finds the modules that this one finds."""
    flags = [option for flag, option in INTERPRETER_OPTIONS.items() if getattr(sys.flags, flag)]
    return [sys.executable, *flags]


def module_program(code: int, call: str) -> str:
    """A program that makes a call of this module; `code`: an open file that has MODULE_CODE.

    It finds Metaflow where this interpreter does, but only after the usual folders, lest a queue.py
    beside a script be taken for the standard library's.
    """
    path = [folder for folder in sys.path if isinstance(folder, str) and os.path.isabs(folder)]
    name = PROGRAM.replace("-", "_")
    return MODULE_PROGRAM.format(path=path, name=name, code=code, call=call)


def run_daemon(options: Options, claim: Claim) -> NoReturn:
    """Run the service, and end the process with it."""
    try:
        Daemon(options, claim).run(LogFile(claim.folder))
    except BaseException:
        logger().exception("the service failed")
        os._exit(1)
    os._exit(0)


def reset_process() -> None:
    """Give up the limits, signals and environment that this process has inherited.

    The signals that stop a service are blocked until there is a `Daemon` to handle them.
    """
    import resource

    for name in RAISED_LIMITS:
        limit = getattr(resource, f"RLIMIT_{name}", None)
        if limit is not None:
            hard = resource.getrlimit(limit)[1]
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(limit, (hard, hard))
    ignored_by_python = {signal.SIGPIPE, signal.SIGXFSZ}
    for number in signal.valid_signals() - ignored_by_python:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, STOP_SIGNALS)
    for variable in list(os.environ):
        if variable in SECRET_VARIABLES or not re.fullmatch(KEPT_VARIABLES, variable):
            del os.environ[variable]
    for variable in USER_VARIABLES:
        os.environ.setdefault(variable, "")


def close_all_but(descriptors: set[int]) -> None:
    """Close all files of this process but these and the standard streams."""
    for name in os.listdir("/dev/fd"):
        if int(name) > 2 and int(name) not in descriptors:
            with contextlib.suppress(OSError):
                os.close(int(name))


def redirect_output(output: int) -> None:
    """Make an open file stdout and stderr, and close stdin."""
    close_input()
    for number in (1, 2):
        os.dup2(output, number)
    if output > 2:
        os.close(output)


def redirect_input(content: bytes) -> None:
    """Make a pipe that has some content stdin; OSError if that is more than a pipe can hold."""
    reader, writer = os.pipe()
    try:
        os.set_blocking(writer, False)
        write_all(writer, content)
        os.dup2(reader, 0)
    finally:
        os.close(reader)
        os.close(writer)


def close_input() -> None:
    """Make /dev/null stdin."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    if null > 0:
        os.close(null)


# -- the log ---------------------------------------------------------------------------------------

LONGEST_LOG = 2**20
"""In bytes. A longer log is put aside, in place of the one that was put aside before."""


def open_log(folder: int) -> int:
    """Open the log in an open folder, or /dev/null if there cannot be a log of this user's."""
    with contextlib.suppress(OSError, ServiceError):
        return open_private_file(LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, folder)
    return os.open(os.devnull, os.O_WRONLY)


class LogFile(io.TextIOWrapper):
    """Writes to stderr, which is the log in a folder, and puts the log aside when it is too long.

    The folder is known by its descriptor, since another one may take its place.
    """

    def __init__(self, folder: int) -> None:
        binary = io.FileIO(2, "w", closefd=False)
        super().__init__(binary, "utf-8", "backslashreplace", write_through=True)
        self._folder = folder

    def write(self, text: str) -> int:
        if os.fstat(2).st_size > LONGEST_LOG:
            folders = {"src_dir_fd": self._folder, "dst_dir_fd": self._folder}
            with contextlib.suppress(OSError):  # if somebody has deleted it
                os.replace(LOG_FILE, f"{LOG_FILE}.1", **folders)
            redirect_output(open_log(self._folder))
        return super().write(text)


def log_to(stream: TextIO | None, layout: str) -> None:
    """Write what is logged to a stream, by default stderr, each message in one line."""
    import logging

    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter(layout))
    handler.addFilter(escape_message)
    logger().addHandler(handler)


def escape_message(record: logging.LogRecord) -> bool:
    """Escape a message that is logged. Tracebacks, which are our own, keep their lines."""
    record.msg, record.args = escape_controls(record.getMessage()), ()
    return True


def escape_controls(message: str) -> str:
    """Escape the characters in a message that a terminal takes for a command, or a reader for the
    beginning of another message."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", escape_character, message)


def escape_character(match: Match[str]) -> str:
    return match.group().encode("unicode_escape").decode()


# -- searches --------------------------------------------------------------------------------------

SEARCH_SECONDS = 5.0
"""How long a search for a pattern may take."""

MOST_SEARCHES = 2
"""How many searches run at the same time."""

SEARCH_PROGRAM = """
import json, re, sys
search = json.load(sys.stdin)
for pattern, flags, method in search["candidates"]:
    try:
        match = getattr(re.compile(pattern, flags), method)
        break
    except (re.error, RecursionError, OverflowError) as error:
        problem = str(error)
else:
    json.dump({"problem": problem}, sys.stdout)
    sys.exit()
json.dump({"found": [text for text in search["texts"] if match(text)]}, sys.stdout)
"""
"""The program of a search: it reads a pattern and texts, and writes which of them match."""


class PatternSearcher:
    """Searches for patterns in processes of their own, since only a process can be interrupted."""

    def __init__(self) -> None:
        self._slots = threading.BoundedSemaphore(MOST_SEARCHES)

    def search(self, candidates: Sequence[Regex], texts: Collection[str]) -> set[str]:
        """A Search; BadQuery if it takes too long."""
        with self._slots:
            outcome = self._run({"candidates": candidates, "texts": list(texts)})
        if "problem" in outcome:
            pattern = candidates[-1].pattern
            raise BadQuery(f"{pattern!r} is not a regular expression: {outcome['problem']}.")
        return set(outcome["found"])

    def _run(self, search: Mapping[str, object]) -> Mapping[str, Any]:
        import subprocess

        try:
            searcher = subprocess.run(
                [sys.executable, "-I", "-S", "-W", "ignore", "-c", SEARCH_PROGRAM],
                input=json.dumps(search).encode(),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=SEARCH_SECONDS,
            )
            outcome: Mapping[str, Any] = json.loads(searcher.stdout)
        except subprocess.TimeoutExpired:
            raise BadQuery(
                f"The pattern takes more than {SEARCH_SECONDS:g} s to search for."
            ) from None
        except ValueError:  # it was killed, or ran out of memory
            raise BadQuery("The pattern cannot be searched for.") from None
        return outcome


# -- the service while it runs ---------------------------------------------------------------------

IMPORT_TICK_SECONDS = 0.25
"""How often a service looks for its folder while it imports Metaflow."""

MISSING_SECONDS = 5.0
"""How long the folder of a service may be missing before it counts as gone."""

M_MMAP_THRESHOLD = -3
"""The parameter of glibc's mallopt(3) for the size from which a block of memory is mapped."""

MAPPED_SIZE = 4 * 2**20
"""In bytes: blocks of this size and larger ones are mapped."""


class Daemon:
    """The service of a root while it runs: what it owns, whom it stays for, and when it ends."""

    def __init__(self, options: Options, claim: Claim) -> None:
        """From here on the service handles the signals that stop it, even if they were blocked."""
        self._options = options
        self._pidfile, self._server, self._folder, self._nonce = claim
        self._path = datastore_folder(options.root)
        self._status = os.fstat(self._folder)
        self._lease: LockedFile | None = None
        self._idle_timeout = options.idle_timeout
        self._missing_since: float | None = None
        self._dependents: dict[int, int] = {}  # the pidfds of processes that it stays for
        self._dependents_lock = threading.Lock()
        self._server.owner = self
        for number in STOP_SIGNALS:
            signal.signal(number, self._stop)
        self._server.stop_at_signals()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def run(self, log: TextIO | None) -> None:
        """Import Metaflow, answer requests until the service is to end, and clean up."""
        return_large_blocks_at_once()
        log_to(log, "%(asctime)s %(levelname)s %(message)s")
        logger().setLevel("DEBUG" if self._options.is_debug else "INFO")
        logger().info("serving %s at %s", self._options.root, self._server.url)
        self._server.accept()
        threading.Thread(target=self._watch_while_importing, daemon=True).start()
        service = self._make_service()
        tick = min(TICK_SECONDS, self._idle_timeout or TICK_SECONDS)
        self._server.serve(service, self._is_wanted, tick)
        signal.set_wakeup_fd(-1)  # `finish` closes the descriptor that signals are written to
        self._announce_stop()
        self._server.finish()
        self._unregister()
        logger().info("stopped")

    # -- what its server asks ----------------------------------------------------------------------

    def refusal(self) -> str | None:
        """The reason to answer no request: the path of the folder leads elsewhere."""
        if self._is_in_place():
            return None
        return f"The service's folder {self._path} is not in its place any more."

    def obey(self, order: str, fields: Mapping[str, str]) -> Mapping[str, object] | None:
        """Carry out an order if its sender has read the pidfile; if not, return None."""
        if not is_same_secret(fields.get(NONCE_HEADER, ""), self._nonce):
            return None
        if order == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        elif order == "hold" and fields.get("namespace") == namespace_id("pid"):
            self._add_dependent(fields.get("pid", ""))
        return {"serves": self._is_in_place(), "is_needed": self._is_needed()}

    def _is_needed(self) -> bool:
        """Whether it never ends when idle, or has clients or dependents."""
        return (
            not self._options.idle_timeout
            or self._server.count_clients() > 0
            or self._has_dependent()
        )

    def _add_dependent(self, pid: str) -> None:
        """Stay for as long as a process lives."""
        if not re.fullmatch("[0-9]{1,9}", pid):
            return
        with self._dependents_lock, contextlib.suppress(OSError):
            self._forget_ended_dependents()  # one of them may have had this pid
            if int(pid) not in self._dependents:
                self._dependents[int(pid)] = open_pidfd(int(pid))

    def _has_dependent(self) -> bool:
        """Whether a process lives that it stays for."""
        with self._dependents_lock:
            self._forget_ended_dependents()
            return bool(self._dependents)

    def _forget_ended_dependents(self) -> None:
        """The caller holds the lock."""
        for pid, descriptor in list(self._dependents.items()):
            if not is_process_alive(pid, descriptor):
                del self._dependents[pid]
                close_pidfd(descriptor)

    # -- starting ----------------------------------------------------------------------------------

    def _make_service(self) -> MetadataService | BrokenService:
        """Import Metaflow and return what answers requests, even if that is only why it cannot."""
        try:
            store = Store(self._options.root)
            store.prepare_to_write()
            search, credentials = PatternSearcher().search, self._server.access.credentials
            ui_folder, list_services = self._options.ui_folder, self._list_services
            return UiService(store, ui_folder, credentials, search, list_services)
        except (Exception, SystemExit) as error:
            logger().exception("cannot start")
            self._idle_timeout = BROKEN_IDLE_TIMEOUT
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            return BrokenService(f"The service cannot start: {reason}.")

    def _watch_while_importing(self) -> None:
        """End if the folder goes before Metaflow is imported, which can take a minute."""
        while not self._server.is_open.wait(IMPORT_TICK_SECONDS):
            if self._is_gone():
                # Only the main thread stops the server, which it may have begun to close.
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def _list_services(self) -> list[ServiceRow]:
        """All running services of this user, sorted by root.

        This one does not look at its own pidfile: if it is stopping, it would wait for itself.
        """
        root = self._options.root
        own: ServiceRow = {"root": root, "url": self._server.url, "is_this": True}
        others: list[ServiceRow] = [
            {"root": service.root, "url": service.url, "is_this": False}
            for service in self._options.service_index.services(besides=root)
        ]
        return sorted([own, *others], key=lambda row: row["root"])

    # -- staying -----------------------------------------------------------------------------------

    def _is_wanted(self, idle_seconds: float) -> bool:
        """Whether to go on; if not, the service has acquired the lease, or has lost its root."""
        self._restore_pidfile()
        if self._is_gone() or not self._owns_pidfile():
            logger().warning("%s is not ours any more", self._path)
            return False
        is_idle = self._idle_timeout and idle_seconds >= self._idle_timeout
        if not is_idle or not self._is_in_place():
            return True
        return self._has_dependent() or not self._acquire_lease()

    def _is_in_place(self) -> bool:
        """Whether the path of the folder leads to the folder that is served."""
        try:
            return os.path.samestat(os.stat(self._path), self._status)
        except OSError:
            return False

    def _is_gone(self) -> bool:
        """Whether the folder was deleted or replaced, or has been missing for too long."""
        if self._is_in_place():
            self._missing_since = None
            return False
        now = time.monotonic()
        if self._missing_since is None:
            self._missing_since = now
        was_deleted = os.fstat(self._folder).st_nlink == 0
        is_replaced = os.path.isdir(self._path)
        return was_deleted or is_replaced or now - self._missing_since > MISSING_SECONDS

    def _owns_pidfile(self) -> bool:
        """Whether the folder that is served has the pidfile of this service, or none."""
        try:
            current = os.stat(PIDFILE, dir_fd=self._folder, follow_symlinks=False)
        except OSError:
            return True
        return os.path.samestat(current, os.fstat(self._pidfile.descriptor))

    def _owns_root(self) -> bool:
        """Whether this service may change what is at the path of its folder."""
        return self._is_in_place() and self._owns_pidfile()

    def _restore_pidfile(self) -> None:
        """Register again if somebody has deleted the pidfile.

        Otherwise the next command would start another service, and this one would end although
        there are commands that use it.
        """
        if os.path.lexists(self._pidfile.path) or not self._is_in_place():
            return
        suppressed = contextlib.suppress(OSError, ServiceError)
        with suppressed, registry_lock(self._options.root, fcntl.LOCK_EX):
            pidfile = LockedFile.try_acquire(self._pidfile.path, fcntl.LOCK_EX)
            if pidfile is None:
                return  # another service has been faster
            try:
                pidfile.write(self._pidfile.read())
            except OSError:  # the disk is full: no pidfile will do until the next tick
                remove_file(pidfile.path)
                pidfile.release()
                raise
            self._pidfile.release()
            self._pidfile = pidfile
            self._options.service_index.add(self._options.root)

    def _acquire_lease(self) -> bool:
        """Acquire the lease exclusively, unless a command has it; return whether that succeeded.

        Commands that come later then wait until this process has ended. True also if there is no
        lease any more, because the root is gone.
        """
        if self._lease is None:
            try:
                self._lease = LockedFile.try_acquire(
                    root_file(self._options.root, LEASE), fcntl.LOCK_EX
                )
            except (ServiceError, OSError):
                return True
        return self._lease is not None

    # -- ending ------------------------------------------------------------------------------------

    def _stop(self, *_: object) -> None:
        """End, at once if no request has been answered yet; also a signal handler."""
        if not self._server.is_open.is_set():
            self._server.socket.close()  # so that the port is free when the pidfile is gone
            self._unregister()
            os._exit(0)
        self._server.stop()

    def _announce_stop(self) -> None:
        """Write to the pidfile that the service is stopping, for commands to wait for its end.

        If the folder was moved, the command that has told it to stop waits already, and holds the
        lock.
        """
        if not self._owns_root():
            return
        suppressed = contextlib.suppress(OSError, ServiceError)  # if the pidfile is gone
        with suppressed, registry_lock(self._options.root, fcntl.LOCK_EX):
            service = read_pidfile(self._pidfile.path)
            self._pidfile.write(json.dumps(service._replace(is_stopping=True)._asdict()))

    def _unregister(self) -> None:
        """Remove the files of this service and its link, as far as they are its own.

        The pidfile is the last, since commands take its removal for the end of the service. The
        locks are released when the process ends.
        """
        owns_root = self._owns_root()
        if owns_root:
            if self._acquire_lease() and self._lease is not None:
                remove_file(self._lease.path)
            self._remove_lock_file()
        if self._owns_pidfile():
            if owns_root or not os.path.exists(root_file(self._options.root, PIDFILE)):
                self._options.service_index.remove(self._options.root)
            with contextlib.suppress(OSError):
                os.unlink(PIDFILE, dir_fd=self._folder)

    def _remove_lock_file(self) -> None:
        """Remove the LOCK_FILE, unless a command holds it while it waits for our end."""
        path = root_file(self._options.root, LOCK_FILE)
        with contextlib.suppress(OSError, ServiceError):
            lock = LockedFile.try_acquire(path, fcntl.LOCK_EX)
            if lock is not None:
                remove_file(lock.path)
                lock.release()


def is_process_alive(pid: int, descriptor: int) -> bool:
    """Whether a process lives, according to its pidfd or, if there is none, its pid."""
    if descriptor != NO_PIDFD:
        poll = select.poll()  # because `select` does not take large descriptors
        poll.register(descriptor, select.POLLIN)
        return not poll.poll(0)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def return_large_blocks_at_once() -> None:
    """Make glibc return the memory of a large answer to the system when the answer is sent.

    It would keep it, for each thread separately: 600 MB after 30 answers of 30 MB.
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_SIZE)


# -- requests to a service -------------------------------------------------------------------------


def wait_until_ready(service: Service) -> None:
    """Return when a service answers; ServiceError with the reason if it refuses.

    One that never will, because it could not import Metaflow, is stopped.
    """
    try:
        status, response = get_response(service, "/ping")
    except OSError as error:
        raise ServiceError(f"{service.url} does not answer: {error}.") from None
    if status == 500:
        stop_service(service)
    if status != 200:
        raise ServiceError(json.loads(response)["message"])


def get_response(service: Service, path: str) -> tuple[int, bytes]:
    """The status and the body of a service's answer to a GET; OSError if there is none."""
    connection = http.client.HTTPConnection(service.client_host, service.port, timeout=60)
    try:
        connection.request("GET", path, headers={"x-api-key": service.key} if service.key else {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


# ==================================================================================================
# Library: what Python calls: in notebooks, scripts and tests; fixtures for pytest
# ==================================================================================================
#
# Rules of this layer:
#
# - Only the names in `__all__` and the two fixtures are public.
# - A service is started by an interpreter of its own (`run_start_command`), because a process that
#   has threads, as every notebook's has, cannot safely fork and go on.
# - No state is kept in this process.
#
# How long a service stays. That of `ensure` and `use` stays for as long as this process lives,
# which the service watches. `running` holds the lease of its service, which is released at the end
# of its block, or when the process ends.

START_SECONDS = 60.0
"""How long an interpreter may take to start a service."""

ORPHAN_IDLE_TIMEOUT = 10.0
"""After so many idle seconds the service of a temporary root ends if its process was killed."""

FolderPath = Union[str, "os.PathLike[str]"]


def ensure(
    root: FolderPath | None = None,
    *,
    host: str | None = None,
    port: int | None = None,
    idle_timeout: float | None = None,
    ui_dir: FolderPath | None = None,
    generate_key: bool = False,
) -> Service:
    """The service of a root, started if none runs; it stays for as long as this process lives.

    The root is the folder that has the .metaflow, or gets one; if it is not given, the folder that
    Metaflow's local mode would use here. The options are those of `start`, and default to the
    environment variables. Returns when the service accepts connections; it answers them once it has
    imported Metaflow. ServiceError if it cannot start, or runs with other options.
    """
    folder = resolve_folder(root)
    options = command_line_options(host, port, idle_timeout, ui_dir, generate_key)
    # The lease keeps the service from ending before it knows this process.
    with made_datastore_folder(folder), acquire_lease(folder):
        service, is_new = ensure_in_subprocess(folder, options)
        hold_service(service, os.getpid(), waits=not is_new)
    mention_idle_timeout(service, idle_timeout)
    return service


def find(root: FolderPath | None = None) -> Service | None:
    """The service of a root (see `ensure`); None if none runs. Starts and creates nothing."""
    return find_service(resolve_folder(root))


def stop(root: FolderPath | None = None) -> None:
    """Stop the service of a root if one runs, and return when it is gone."""
    service = find(root)
    if service is not None:
        stop_service(service)


def use(root: FolderPath | None = None) -> Service:
    """Let Metaflow in this process use the service of a root (see `ensure`).

    Sets the environment and, if Metaflow has been imported already, its settings: from now on its
    client, `Runner` and every subprocess use the service. Says so on stderr if that changes the
    environment; in the tasks of a flow whose file calls this, it does not.
    """
    service = ensure(root)
    changes = environment_changes(service)
    before = change_environment(changes)
    note_cards_of_process(service)
    if changes:
        is_imported = "metaflow.metaflow_config" in sys.modules
        what = "the environment and the settings of" if is_imported else "the environment for"
        other = before.get("METAFLOW_SERVICE_URL")
        instead = f", in place of {other}" if other else ""
        print_notice(f"set {what} Metaflow: it uses {service.url} for {service.root}{instead}")
    return service


@contextlib.contextmanager
def using(service: Service) -> Iterator[None]:
    """Let Metaflow in this process use a service until the end of a `with` block."""
    before = change_environment(environment_changes(service))
    note_cards_of_process(service)
    try:
        yield
    finally:
        change_environment(before)


@contextlib.contextmanager
def running(
    root: FolderPath | None = None,
    *,
    host: str | None = None,
    port: int | None = None,
    idle_timeout: float | None = None,
    ui_dir: FolderPath | None = None,
    generate_key: bool = False,
) -> Iterator[Service]:
    """A service until the end of a `with` block, on a root or, by default, a temporary folder.

    The options are those of `ensure`. At the end of the block the service stops, unless it ran
    before or others hold its lease. If this process is killed, the service stops when it has been
    idle for its time-out, by default ten seconds if the root is temporary.
    """
    with contextlib.ExitStack() as stack:
        if root is None:
            folder = stack.enter_context(temporary_folder())
            idle_timeout = ORPHAN_IDLE_TIMEOUT if idle_timeout is None else idle_timeout
        else:
            folder = resolve_folder(root)
        options = command_line_options(host, port, idle_timeout, ui_dir, generate_key)
        stack.enter_context(made_datastore_folder(folder))
        with contextlib.ExitStack() as ending, acquire_lease(folder):
            if find_service(folder) is None:
                ending.callback(stop_unless_leased, folder)
            service = ensure_in_subprocess(folder, options)[0]
            mention_idle_timeout(service, idle_timeout)
            yield service


def resolve_folder(root: FolderPath | None) -> str:
    """The folder of a root that a caller has given, or of the default one, as a real path."""
    option = None if root is None else os.path.expanduser(root)
    here = "/" if option is not None and os.path.isabs(option) else current_folder()
    return root_folder(option, os.environ, here)


def note_cards_of_process(service: Service) -> None:
    """Note where Metaflow puts the cards of flows that this process runs under a service."""
    with contextlib.suppress(ServiceError):  # where there is no current folder, there are no cards
        note_card_root(datastore_folder(service.root), current_folder())


def current_folder() -> str:
    """The current folder; ServiceError if it was deleted."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise ServiceError("The current folder does not exist any more.") from None


def print_notice(sentence: str) -> None:
    """Print a line to stderr, which a process may lack, or be unable to write to."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"{PROGRAM}: {escape_controls(sentence)}", file=sys.stderr, flush=True)


def mention_idle_timeout(service: Service, wanted: float | None) -> None:
    """Say that a service that ran already keeps its idle time-out, if another one is wanted."""
    current = service.idle_timeout
    if current is not None and wanted not in (None, current):
        timeout = f"an idle time-out of {current:g} s" if current else "no idle time-out"
        print_notice(f"the service of {service.root} runs already, with {timeout}")


@contextlib.contextmanager
def temporary_folder() -> Iterator[str]:
    """The real path of a new folder, which is removed as far as possible after a `with` block.

    A process that was forked within the block leaves the folder to its parent.
    """
    import tempfile

    folder, owner = os.path.realpath(tempfile.mkdtemp(prefix="metaflow-")), os.getpid()
    try:
        yield folder
    finally:
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)


def command_line_options(
    host: str | None,
    port: int | None,
    idle_timeout: float | None,
    ui_dir: FolderPath | None,
    generate_key: bool,
) -> list[str]:
    """The options of `start` as words of a command line, without those that are None."""
    ui_folder = None if ui_dir is None else os.path.abspath(os.path.expanduser(ui_dir))
    given = {"--host": host, "--port": port, "--idle-timeout": idle_timeout, "--ui-dir": ui_folder}
    options = [f"{name}={value}" for name, value in given.items() if value is not None]
    return [*options, "--generate-key"] if generate_key else options


def ensure_in_subprocess(root: str, options: Sequence[str]) -> tuple[Service, bool]:
    """The service of a root, which another interpreter starts if none runs, and whether it did.

    The caller holds the lease. If there are options, the interpreter also checks that a service
    that runs already has them.
    """
    service = find_service(root)
    if service is not None and not options:
        return service, False
    run_start_command(root, options)
    started = find_service(root)
    if started is None:
        raise ServiceError(f"The service of {root} was started, but has ended.")
    return started, service is None


def run_start_command(root: str, options: Sequence[str]) -> None:
    """Start the service of a root in another interpreter; ServiceError if that fails.

    The error has the message of that interpreter. It uses neither the standard streams nor the
    current folder of this process, which may be closed or deleted.
    """
    import marshal
    import subprocess

    if getattr(sys, "frozen", False) or not sys.executable:
        raise ServiceError(
            "A service is started by a Python interpreter, and there is no such interpreter here: "
            f"start it with `{PROGRAM} start --root {root}`."
        )
    words = ["-c", module_program(0, "main()"), "url", "--root", root, *options]
    try:
        ended = subprocess.run(
            [*interpreter_command(), *words],
            cwd="/",
            input=marshal.dumps(MODULE_CODE),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=START_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise ServiceError(
            f"{sys.executable} has not started the service within {START_SECONDS:g} seconds."
        ) from None
    except (OSError, ValueError) as error:
        raise ServiceError(f"{sys.executable} cannot start the service: {error}.") from None
    if ended.returncode != 0:
        last_line = ended.stderr.decode(errors="replace").rstrip().rpartition("\n")[2]
        message = last_line.removeprefix(f"{PROGRAM}: ")
        raise ServiceError(
            message or f"{sys.executable} cannot start the service.", ended.returncode
        )


def stop_unless_leased(root: str) -> None:
    """Stop the service of a root, unless a process holds its lease or the root was deleted."""
    try:
        lease = LockedFile.try_acquire(root_file(root, LEASE), fcntl.LOCK_EX, os.O_RDWR)
    except FileNotFoundError:
        return  # the service has ended, or will see by itself that its folder was deleted
    if lease is None:
        return
    try:
        service = find_service(root)
        if service is not None:
            stop_service(service)
        remove_file(lease.path)
    finally:
        lease.release()


def environment_changes(service: Service) -> dict[str, str | None]:
    """The variables to change in this process's environment for Metaflow to use a service.

    A variable that was exported for another service, and is to be unset, is None.
    """
    current, wanted = dict(os.environ), service.environment
    names = current.keys() | wanted.keys()
    return {name: wanted.get(name) for name in names if wanted.get(name) != current.get(name)}


def change_environment(changes: Mapping[str, str | None]) -> dict[str, str | None]:
    """Set variables of this process, or unset those that are None; returns their old values.

    If Metaflow has been imported, its settings are made to follow.
    """
    before = {name: os.environ.get(name) for name in changes}
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    configuration = sys.modules.get("metaflow.metaflow_config")
    if configuration is not None:
        reload_settings(configuration)
    return before


def reload_settings(configuration: Any) -> None:
    """Give Metaflow's settings the values that they would get if it were imported now.

    All of its modules that have copies of a setting get the new value. `configuration` is the
    module metaflow.metaflow_config.
    """
    read: Callable[..., Any] = configuration.from_conf
    headers, key = configuration.SERVICE_HEADERS, read("SERVICE_AUTH_KEY")
    if headers.get("x-api-key") == configuration.SERVICE_AUTH_KEY:
        headers.pop("x-api-key", None)
    if key is not None:
        headers["x-api-key"] = key
    root, url = read("DATASTORE_SYSROOT_LOCAL"), read("SERVICE_URL")
    datatools = os.path.join(root, configuration.DATATOOLS_SUFFIX) if root else None
    settings = {
        "DEFAULT_METADATA": read("DEFAULT_METADATA", "local"),
        "SERVICE_URL": url,
        "SERVICE_INTERNAL_URL": read("SERVICE_INTERNAL_URL", url),
        "SERVICE_AUTH_KEY": key,
        "DATASTORE_SYSROOT_LOCAL": root,
        "DATATOOLS_LOCALROOT": read("DATATOOLS_LOCALROOT", datatools),
    }
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] in ("metaflow", "metaflow_extensions"):
            replace_attributes(module, settings)
    reset_metadata_providers(root)


def reset_metadata_providers(root: str | None) -> None:
    """Make Metaflow's client choose its metadata provider again, and that its root or service."""
    replace_attributes(sys.modules.get("metaflow.client.core"), {"current_metadata": False})
    unknown = {"_INFO": None, "_supports_attempt_gets": None, "_supports_tag_mutation": None}
    for provider in getattr(sys.modules.get("metaflow.plugins"), "METADATA_PROVIDERS", ()):
        replace_attributes(provider, unknown)
    local_storage = sys.modules.get("metaflow.plugins.datastores.local_storage")
    storage = getattr(local_storage, "LocalStorage", None)
    replace_attributes(storage, {"SYSROOT_VAR": root, "datastore_root": None})


def replace_attributes(owner: object, values: Mapping[str, object]) -> None:
    """Set attributes of a module or class, but only those that it has."""
    for name in values.keys() & getattr(owner, "__dict__", {}).keys():
        setattr(owner, name, values[name])


def pytest_configure(config: Any) -> None:
    """Give pytest the fixtures `metaflow_root` and `metaflow_service`.

    Pytest calls this if a conftest.py has `pytest_plugins = ["metaflow_local_service"]`.
    """
    from pathlib import Path

    import pytest

    def metaflow_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
        """The root of `metaflow_service`: a temporary folder per session and xdist worker."""
        folder = tmp_path_factory.mktemp("metaflow")
        yield folder
        shutil.rmtree(folder, ignore_errors=True)

    def metaflow_service(metaflow_root: Path) -> Iterator[Service]:
        """A service on `metaflow_root`, which Metaflow uses until the session ends."""
        with running(metaflow_root, idle_timeout=ORPHAN_IDLE_TIMEOUT) as service, using(service):
            yield service

    fixtures = ModuleType(f"{__name__} fixtures")
    for function in (metaflow_root, metaflow_service):
        setattr(fixtures, function.__name__, pytest.fixture(scope="session")(function))
    config.pluginmanager.register(fixtures)


# ==================================================================================================
# Commands: the command line
# ==================================================================================================
#
# A subcommand is a function `do_name`, declared by `subcommand` right above it; its docstring is
# its help. It prints its result to stdout and its remarks to stderr. For an error it raises
# ServiceError, which only `main` catches, to print one line to stderr and exit with its code.
#
# There are two kinds. Those that need a service (`run`, `start`, `url`, ...) have the options of
# one and go through the Daemon layer. Those that only look (`runs`, `show`, `logs`, ...) read the
# files through the model, without a service and without importing Metaflow.

Arguments = argparse.Namespace


class Command(NamedTuple):
    """A subcommand; the docstring of its function is its help."""

    function: Callable[[Arguments], None]
    example: str
    takes_service: bool  # whether it may start a service, and so has the options of one
    arguments: Sequence[tuple[str, Mapping[str, Any]]]


COMMANDS: dict[str, Command] = {}


def subcommand(
    example: str, *arguments: tuple[str, Mapping[str, Any]], takes_service: bool = False
) -> Callable[[Callable[[Arguments], None]], Callable[[Arguments], None]]:
    """Declare a function `do_name` as the subcommand `name`, with arguments for argparse."""

    def declare(function: Callable[[Arguments], None]) -> Callable[[Arguments], None]:
        name = function.__name__[len("do_") :]
        COMMANDS[name] = Command(function, example, takes_service, arguments)
        return function

    return declare


def resolve_root(arguments: Arguments) -> str:
    return root_folder(arguments.root, os.environ, current_folder())


def resolve_options(arguments: Arguments, idle_timeout: float = DEFAULT_IDLE_TIMEOUT) -> Options:
    """The options of a service: from the command line, and what it leaves out from the environment.

    ServiceError if they contradict each other.
    """

    def chosen(option: T | None, variable: str, convert: Callable[[str], T]) -> Any:
        return from_environment(os.environ, variable, convert) if option is None else option

    port = chosen(arguments.port, ENV_PORT, parse_port)
    timeout = chosen(arguments.idle_timeout, ENV_IDLE_TIMEOUT, parse_seconds)
    root = resolve_root(arguments)
    # A key that this program exported for the service of another root is not the user's own.
    is_of_root = os.environ.get(ENV_SYSROOT) == root
    user = os.environ if is_of_root else user_environment(os.environ)
    key = from_environment(user, ENV_KEY, parse_key)
    if key is not None and len(key) < SHORTEST_KEY:
        print_notice(
            f"the key in {ENV_KEY} has fewer than {SHORTEST_KEY} characters: easy to guess"
        )
    host = arguments.host or ""
    if key is None and not arguments.generate_key and host and not is_loopback(host):
        raise ServiceError(
            f"Listening on {host} needs a key: set {ENV_KEY}, or give --generate-key.", 2
        )
    return Options(
        root=root,
        host=host,
        port=port or 0,
        idle_timeout=idle_timeout if timeout is None else timeout,
        key=key,
        generates_key=arguments.generate_key,
        ui_folder=chosen(arguments.ui_dir, ENV_UI_DIR, parse_ui_folder),
        is_debug=is_debug(os.environ),
        service_index=ServiceIndex(home_folder(os.environ)),
    )


def obtain_service(arguments: Arguments) -> tuple[Service, bool]:
    """The service that the command line asks for, and whether it was started for that."""
    options = resolve_options(arguments)
    retire_outdated_service(options.root)
    return ensure_wanted_service(arguments, options)


@contextlib.contextmanager
def leased_service(arguments: Arguments) -> Iterator[tuple[Service, LockedFile]]:
    """The same service, with a lease that keeps it until a `with` block ends."""
    options = resolve_options(arguments)
    retire_outdated_service(options.root)
    with made_datastore_folder(options.root), acquire_lease(options.root) as lease:
        service, _ = ensure_wanted_service(arguments, options)
        yield service, lease


def ensure_wanted_service(arguments: Arguments, options: Options) -> tuple[Service, bool]:
    """See `ensure_service`; this also says what is not as wanted, but does no harm."""
    service, is_new = ensure_service(options)
    mention_version(service)
    mention_idle_timeout(service, arguments.idle_timeout)
    return service, is_new


def mention_version(service: Service) -> None:
    """Say if a service is outdated: it is in use then, or it would have been replaced."""
    if is_outdated(service):
        print_notice(
            f"the service at {service.url} is of another version, {service.version}, and goes on "
            f"since it is in use; `{PROGRAM} stop` ends it"
        )


def command_settings(arguments: Arguments, service: Service) -> dict[str, str]:
    """The variables to set for a command that uses the service."""
    user = user_environment(os.environ)
    here = current_folder()
    sysroot = configured_sysroot(user, here)
    if arguments.root and sysroot is not None and root_folder(None, user, here) != service.root:
        print_notice(f"--root overrides {ENV_SYSROOT}, which is {sysroot!r}")
    return service.settings(user)


def command_environment(arguments: Arguments, service: Service) -> dict[str, str]:
    """The environment of a command that uses the service."""
    return {**user_environment(os.environ), **command_settings(arguments, service)}


@subcommand(
    f"{PROGRAM} run python flow.py run --max-workers 8",
    ("command", {"nargs": argparse.REMAINDER, "metavar": "COMMAND [ARG ...]"}),
    takes_service=True,
)
def do_run(arguments: Arguments) -> None:
    """Run a command under the service.

    Starts the service of this root if none runs, and then becomes the command, with
    METAFLOW_SERVICE_URL and METAFLOW_DEFAULT_METADATA set. The service stays for as long as the
    command runs. Options stand before the command; everything after it is the command's own.

    Exits with the command's exit code; 127 if there is no such command, 126 if it cannot be
    executed.
    """
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        raise ServiceError(f"run needs a command; see {PROGRAM} run --help", exit_code=2)
    with leased_service(arguments) as (service, lease):
        hold_service(service, os.getpid())  # the command may close the lease, as sudo does
        lease.keep_on_exec()
        if shutil.which(command[0]):
            print_notice(f"runs are shown at {service.url} and by `{PROGRAM} show`")
        note_card_root(datastore_folder(service.root), current_folder())
        exec_command(command, command_environment(arguments, service))


def exec_command(command: Sequence[str], environment: Environment) -> NoReturn:
    """Replace this process by a command. ServiceError if it cannot be executed."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)  # Python ignores them, which a command would inherit
    try:
        os.execvpe(command[0], list(command), environment)
    except (FileNotFoundError, ValueError):  # ValueError if it is an empty word
        name = command[0] or "''"
        raise ServiceError(f"{name}: command not found", exit_code=127) from None
    except OSError as error:
        sentence = f"{command[0]} cannot be executed: {error.strerror}"
        raise ServiceError(sentence, exit_code=126) from None


@subcommand(f"{PROGRAM} start --port 8123 --idle-timeout 0", takes_service=True)
def do_start(arguments: Arguments) -> None:
    """Start the service in the background.

    Returns once it answers, and prints its URL and the settings for a shell. If one runs already,
    prints those of that one.
    """
    service, is_new = obtain_service(arguments)
    wait_until_ready(service)
    print(f"{'Started' if is_new else 'Running already'} at {service.url} for {service.root}")
    print_settings(arguments, service)
    print_notice(f"runs are shown at {service.url}")  # not to stdout, which a shell may read


def print_settings(arguments: Arguments, service: Service) -> None:
    """Print the settings as the commands of a shell."""
    import shlex

    user, settings = user_environment(os.environ), command_settings(arguments, service)
    for name in os.environ.keys() - user.keys() - settings.keys():
        print(f"unset {name}")  # it was exported for another service
    restored = {name: value for name, value in user.items() if os.environ.get(name) != value}
    for name, value in {**restored, **settings}.items():
        print(f"export {name}={shlex.quote(value)}")


@subcommand(f"{PROGRAM} serve --host 0.0.0.0 --port 8080 --generate-key", takes_service=True)
def do_serve(arguments: Arguments) -> None:
    """Run the service in the foreground.

    For containers, systemd and debugging: it logs to stderr, and runs until it is stopped, unless
    an idle time-out is given.
    """
    serve_in_foreground(resolve_options(arguments, idle_timeout=0))


NOT_RUNNING, UNKNOWN_STATUS = 3, 4
"""Exit codes of `status`, as the Linux Standard Base defines them for init scripts."""


@subcommand(
    f"{PROGRAM} status --json",
    ("--json", {"action": "store_true", "help": "print it as JSON"}),
    ("--all", {"action": "store_true", "help": "all services of this user"}),
)
def do_status(arguments: Arguments) -> None:
    """Show whether the service runs, and where.

    Exits with 3 if it does not, and with 4 if that is not known (the exit codes of init scripts).
    """
    try:
        services = chosen_services(arguments)
    except ServiceError as failure:
        failure.exit_code = UNKNOWN_STATUS
        raise
    if arguments.json:
        for service in services:
            hold_service(service, os.getpid())  # whoever reads this has time to use it
        shown = [service.public_fields() for service in services]
        print(json.dumps(shown if arguments.all else next(iter(shown), None), indent=2))
    else:
        print("\n\n".join(map(describe_service, services)) or no_service_message(arguments))
    if not services:
        raise SystemExit(NOT_RUNNING)


def chosen_services(arguments: Arguments) -> Sequence[Service]:
    """The services that a command is about: the one of the root, or all of this user."""
    if arguments.all:
        return ServiceIndex(home_folder(os.environ)).services()
    service = find_service(resolve_root(arguments))
    return [] if service is None else [service]


def describe_service(service: Service) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(service.started_at))
    return "\n".join(
        (
            f"url    {service.url}",
            f"pid    {service.pid}",
            f"port   {service.port}",
            f"root   {service.root}",
            f"since  {since}",
            f"log    {describe_log(service)}",
        )
    )


def describe_log(service: Service) -> str:
    """Where a service logs."""
    if service.log is None:
        return "on the terminal that it runs on"
    return service.log if os.path.isfile(service.log) else "none"


def no_service_message(arguments: Arguments) -> str:
    return "No service runs" + ("." if arguments.all else f" for {resolve_root(arguments)}.")


@subcommand(
    f'export METAFLOW_SERVICE_URL="$({PROGRAM} url)"',
    ("--no-start", {"action": "store_true", "help": "exit with 1 if no service runs"}),
    takes_service=True,
)
def do_url(arguments: Arguments) -> None:
    """Print the URL of the service, which is started if none runs."""
    if arguments.no_start:
        service = find_service(resolve_root(arguments))
        if service is None:
            raise ServiceError(f"No service runs for {resolve_root(arguments)}.")
    else:
        service, _ = obtain_service(arguments)
    hold_service(service, asking_process())
    host = service.client_host
    if has_proxy(host, service.port, os.environ):
        print_notice(f"a proxy is set that would get the requests for {host}: add it to no_proxy")
    print(service.url)


@subcommand(
    f"{PROGRAM} ui",
    ("--no-browser", {"action": "store_true", "help": "only print the URL"}),
    takes_service=True,
)
def do_ui(arguments: Arguments) -> None:
    """Open the page that shows runs.

    Starts the service if none runs, prints the URL of the page and opens it in a browser. The page
    of a service with a key asks for it once: `env` prints the key.
    """
    service, _ = obtain_service(arguments)
    wait_until_ready(service)
    hold_service(service, asking_process())
    print(service.url, flush=True)
    if not arguments.no_browser:
        import webbrowser

        if not webbrowser.open(service.url):
            raise ServiceError("There is no browser to open it in.")


SHELLS = frozenset(
    ("ash", "bash", "busybox", "csh", "dash", "fish", "ksh", "mksh", "sh", "tcsh", "zsh")
)


def asking_process() -> int:
    """The shell or the script that runs this command, for which the service stays.

    A command substitution runs in a copy of its shell, which ends with the substitution. So what
    counts is the first process above that has another command line than the copy's parent. This
    process counts if it was left alone, with the first process of all for its parent.
    """
    asking = os.getppid()
    if asking <= 1:
        return os.getpid()
    name, _, command_line = describe_process(asking)
    if name not in SHELLS:
        return asking
    while True:
        parent = describe_process(asking)[1]
        if not command_line or describe_process(parent)[2] != command_line:
            return asking
        asking = parent


def describe_process(pid: int) -> tuple[str, int, bytes]:
    """The name, the parent and the command line of a process; "", 0 and b"" if they are unknown."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            state = f.read()
        with open(f"/proc/{pid}/cmdline", "rb") as f:
            command_line = f.read()
        name = state[state.index(b"(") + 1 : state.rindex(b")")].decode(errors="replace")
        return name, int(state[state.rindex(b")") + 1 :].split()[1]), command_line
    except (OSError, ValueError, IndexError):
        return "", 0, b""


@subcommand(f'eval "$({PROGRAM} env)"', takes_service=True)
def do_env(arguments: Arguments) -> None:
    """Print the settings as `export` lines for a shell's eval; starts the service if none runs."""
    service, _ = obtain_service(arguments)
    hold_service(service, asking_process())
    if os.environ.get(ENV_SYSROOT) != service.root:
        print_notice(f"with these settings, flows of any folder are recorded in {service.root}")
    print_settings(arguments, service)


@subcommand(
    f"{PROGRAM} stop --all",
    ("--all", {"action": "store_true", "help": "all services of this user"}),
)
def do_stop(arguments: Arguments) -> None:
    """Stop the service.

    The service answers the requests that it has received and ends; the command returns when it has
    ended. It is no error if none runs.
    """
    services = chosen_services(arguments)
    for service in services:
        stop_service(service)
        print(f"Stopped {service.url} for {service.root}")
    if not services:
        print(no_service_message(arguments))


# -- what commands print ---------------------------------------------------------------------------

PROGRESS_SECONDS = 2.0
"""A command that takes longer than this shows how far it is, PROGRESS_RATE times a second."""
PROGRESS_RATE = 5

ESCAPE_SEQUENCE = r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])"
UNPRINTABLE = "[\x00-\x08\x0a-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"

STATUS_COLORS: Mapping[str, str] = {RUNNING: "33", COMPLETED: "32", FAILED: "31"}

SHORTEST_CELL = 8
LONGEST_SHOWN_VALUE = 200


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The items as they come; if that takes long, how many are done is shown on the terminal."""
    if not is_terminal(sys.stderr):
        yield from items
        return
    due = time.monotonic() + PROGRESS_SECONDS
    is_shown = False
    try:
        for done, item in enumerate(items, 1):
            yield item
            if time.monotonic() >= due:
                due, is_shown = time.monotonic() + 1 / PROGRESS_RATE, True
                of_total = f" of {total}" if total is not None else ""
                print(f"\r{done}{of_total} {what}\x1b[K", end="", file=sys.stderr, flush=True)
    finally:
        if is_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Text from a flow on one line, without what a terminal would take for a command.

    Characters that stdout cannot encode are written as escapes.
    """
    plain = re.sub(
        UNPRINTABLE, escape_character, re.sub(ESCAPE_SEQUENCE, "", text).replace("\t", "    ")
    )
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    return plain.encode(encoding, "backslashreplace").decode(encoding)


def text_width(text: str) -> int:
    """How many columns text takes on a terminal."""
    if text.isascii():
        return len(text)
    import unicodedata

    combining = sum(1 for character in text if unicodedata.combining(character))
    return len(text) - combining + sum(unicodedata.east_asian_width(c) in "WF" for c in text)


def shorten(text: str, width: int) -> str:
    """Text cut in the middle if it is wider than `width` columns, of which there are at least 2."""
    left, right, short = width // 2, width - 2 - width // 2, text
    while text_width(short) > width:
        short = f"{text[:left]}..{text[len(text) - right :]}"
        left, right = left - 1, max(0, right - 1)
    return short


def terminal_width() -> int | None:
    """The columns of the terminal; None if stdout is not one, and so nothing is to be cut."""
    return shutil.get_terminal_size().columns if is_terminal(sys.stdout) else None


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a standard stream, which may be closed, is a terminal."""
    return stream is not None and stream.isatty()


def colored(text: str, status: str) -> str:
    """Text in the colour of a status, if stdout is a terminal that should have colours."""
    if status not in STATUS_COLORS or not is_terminal(sys.stdout):
        return text
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{STATUS_COLORS[status]}m{text}\x1b[0m"


def print_table(
    titles: Sequence[str], rows: Iterable[Sequence[str]], cut: Container[str], indent: str = ""
) -> None:
    """Print rows under their titles, a status in its colour.

    If a terminal is too narrow, the columns in `cut` get narrower.
    """
    table = [titles, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(text_width, cells)) for cells in zip(*table)]
    room = terminal_width()
    while room is not None and len(indent) + sum(widths) + 2 * len(widths) - 2 > room:
        shrinking = [n for n, title in enumerate(titles) if title in cut]
        widest = max(shrinking, key=lambda n: widths[n], default=None)
        if widest is None or widths[widest] <= SHORTEST_CELL:
            break
        widths[widest] -= 1
    for row in table:
        cells = [shorten(cell, width) for cell, width in zip(row, widths)]
        padded = (
            colored(cell, cell) + " " * (width - text_width(cell))
            for cell, width in zip(cells, widths)
        )
        print((indent + "  ".join(padded)).rstrip())


def print_facts(
    facts: Iterable[tuple[str, str]], indent: str = "", whole: Container[str] = ()
) -> None:
    """Print names and values, one per line.

    On a terminal a value is cut at the end of its line, unless its name is in `whole`.
    """
    pairs = [(printable(name), printable(value)) for name, value in facts]
    longest = max((text_width(name) for name, _ in pairs), default=0)
    room = terminal_width()
    for name, value in pairs:
        start = f"{indent}{name}{' ' * (longest - text_width(name))}  "
        if room is not None and name not in whole:
            value = shorten(value, max(SHORTEST_CELL, room - text_width(start)))
        print((start + value).rstrip())


def print_json(value: object) -> None:
    """Print a value as JSON, on one line."""
    print(json.dumps(value))


def format_time(epoch_ms: int | None) -> str:
    """A date and time in the time zone of this machine; "-" if there is none."""
    if epoch_ms is None:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(epoch_ms / 1000))


def format_duration(milliseconds: int | None) -> str:
    """A duration in its two largest units; "-" if there is none."""
    if milliseconds is None:
        return "-"
    if milliseconds < 60_000:
        return f"{milliseconds / 1000:.1f}s"
    minutes, seconds = divmod(milliseconds // 1000, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}h"
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {seconds:02}s"


# -- resolving pathspecs ---------------------------------------------------------------------------

LATEST, LATEST_FAILED = "latest", "latest-failed"
MOST_CANDIDATES = 5


def open_model(arguments: Arguments) -> Model:
    """The model of the root, which reads its files: without a service, without Metaflow."""
    root = resolve_root(arguments)
    if not has_datastore_folder(root):
        raise ServiceError(f"Nothing is recorded in {root}: it has no {DATASTORE_DIR} folder.")
    log_to(sys.stderr, f"{PROGRAM}: %(message)s")  # such as a record that cannot be read
    return Model(Store(root))


def resolve_pathspec(model: Model, pathspec: str | None) -> Ids:
    """The ids of the run, step, task or artifact that a pathspec names.

    FLOW and FLOW/latest are the newest run of a flow, FLOW/latest-failed the newest one that
    failed. A unique prefix of a run id is enough, and a step without a run is one of the newest
    run. ServiceError with exit code 1 if there is no such thing, with exit code 2 if it is
    ambiguous or no pathspec.
    """
    parts = tuple(pathspec.strip("/").split("/")) if pathspec else (LATEST,)
    if not all(parts) or len(parts) > TASK_DEPTH + 1:
        raise ServiceError(f"{pathspec!r} is not a pathspec: FLOW/RUN/STEP/TASK", exit_code=2)
    try:
        run, below = resolve_run(model, parts)
        return resolve_below(model, run, below)
    except NotStorable as error:  # a name that no object can have
        raise ServiceError(str(error)) from None


def resolve_flow(model: Model, name: str | None) -> str | None:
    """The flow that an argument names; None without an argument. ServiceError if there is none."""
    if name is not None and not is_flow(model, name):
        raise ServiceError(f"There is no flow {name!r}.")
    return name and name.strip("/")


def is_flow(model: Model, pathspec: str) -> bool:
    """Whether a pathspec is the name of a flow."""
    with contextlib.suppress(NotStorable):  # a name that no flow can have
        return model.store.flow((pathspec.strip("/"),)) is not None
    return False


def resolve_run(model: Model, parts: Sequence[str]) -> tuple[Ids, Sequence[str]]:
    """The ids of the run that a pathspec is in, and the parts of the pathspec after it."""
    name, below = parts[0], parts[1:]
    if model.store.flow((name,)) is None:
        return choose_run(model, model.runs.newest_first(), parts, f"flow, run or step {name!r}")
    if not below:
        return choose_run(model, model.runs.newest_first(name), (LATEST,), f"run of {name}")
    what = f"run or step {below[0]!r} of {name}"
    return choose_run(model, model.runs.newest_first(name), below, what)


def choose_run(
    model: Model, runs: Iterable[RunRow], parts: Sequence[str], what: str
) -> tuple[Ids, Sequence[str]]:
    """The one of the runs (newest first) that the first part names, and the other parts."""
    newest_first = iter(runs)
    name, below = parts[0], parts[1:]
    if name == LATEST_FAILED:
        judged = track(map(model.runs.judge, newest_first), "runs read")
        newest_first = (row for row in judged if row["status"] == FAILED)
    newest = next(newest_first, None)
    if newest is None:
        raise ServiceError(f"There is no {'failed run' if name == LATEST_FAILED else what}.")
    if name in (LATEST, LATEST_FAILED):
        return run_row_ids(newest), below
    found = [row for row in itertools.chain((newest,), newest_first) if row["run"].startswith(name)]
    exact = [row for row in found if row["run"] == name]
    if found:
        return only_one(name, [run_row_ids(row) for row in exact or found]), below
    if model.store.step((*run_row_ids(newest), name)) is not None:
        return run_row_ids(newest), parts
    raise ServiceError(f"There is no {what}.")


def resolve_below(model: Model, run: Ids, parts: Sequence[str]) -> Ids:
    """The ids of what the parts name within a run."""
    if not parts:
        return run
    step = (*run, parts[0])
    if model.store.step(step) is None:
        raise ServiceError(f"There is no step {parts[0]!r} in {'/'.join(run)}.")
    if len(parts) == 1:
        return step
    task = (*step, parts[1])
    if model.store.task(task) is None:
        raise ServiceError(f"There is no task {parts[1]!r} in {'/'.join(step)}.")
    return (*task, *parts[2:])


def only_one(name: str, found: Sequence[Ids]) -> Ids:
    """The only one of those found; ServiceError that names the candidates if there are several."""
    if len(found) == 1:
        return found[0]
    named = [printable("/".join(ids)) for ids in found[:MOST_CANDIDATES]]
    more = len(found) - len(named)
    named += [f"{more} more"] if more > 0 else []
    raise ServiceError(f"{name} may be {', '.join(named[:-1])} or {named[-1]}.", exit_code=2)


def resolve_task(model: Model, pathspec: str | None) -> Ids:
    """The ids of the task or artifact that a pathspec names; a step with one task stands for it."""
    ids = resolve_pathspec(model, pathspec)
    if len(ids) >= TASK_DEPTH:
        return ids
    if len(ids) == RUN_DEPTH:
        raise ServiceError(f"{'/'.join(ids)} is a run: name a task of it.", exit_code=2)
    return only_one("/".join(ids), model.store.task_ids(ids) or [ids])


def tasks_below(model: Model, ids: Ids) -> list[Ids]:
    """The ids of the tasks of a run (in the order of its steps), of a step, or the task's own."""
    if len(ids) >= TASK_DEPTH:
        return [ids[:TASK_DEPTH]]
    steps = [ids]
    if len(ids) == RUN_DEPTH:
        names = [step["step_name"] for step in model.store.steps(ids)][::-1]
        steps = [(*ids, name) for name in names if name != PARAMETERS_STEP]
    return [task for step in steps for task in model.store.task_ids(step)]


# -- runs ------------------------------------------------------------------------------------------

DEFAULT_RUNS = 100
SECONDS_IN = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}

PATHSPEC = ("pathspec", {"nargs": "?", "metavar": "PATHSPEC"})
JSON_OPTION = ("--json", {"action": "store_true", "help": "print JSON"})
JSON_LINES_OPTION = ("--json", {"action": "store_true", "help": "print JSON, one object a line"})


def parse_age(text: str) -> float:
    """The epoch seconds of a time that is written as an age (90m, 12h, 7d) or as a date."""
    age = re.fullmatch("([0-9]{1,6})([smhdw])", text)
    if age:
        return time.time() - int(age.group(1)) * SECONDS_IN[age.group(2)]
    from datetime import datetime

    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"an age (90m, 12h, 7d) or a date, not {text!r}") from None


def parse_tag(text: str) -> str:
    """A tag. An empty one, such as an unset variable, would be a condition that all runs meet."""
    if not text:
        raise argparse.ArgumentTypeError("a tag is not empty")
    return text


TAG: Mapping[str, Any] = {"action": "append", "default": [], "type": parse_tag, "metavar": "TAG"}


def parse_lines(text: str) -> int:
    """A number of lines or rows, 0 or more."""
    if not re.fullmatch("[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"a number, not {text!r}")
    return int(text)


@subcommand(
    f"{PROGRAM} runs TrainFlow --status failed --since 7d",
    ("flow", {"nargs": "?", "metavar": "FLOW"}),
    ("--status", {"choices": STATUSES, "help": "only runs of this status"}),
    ("--tag", {**TAG, "help": "only runs with this tag"}),
    ("--user", {"help": "only runs of this user"}),
    ("--since", {"type": parse_age, "metavar": "AGE", "help": "only runs since 7d, 12h or a date"}),
    (
        "--limit",
        {"type": parse_lines, "default": DEFAULT_RUNS, "metavar": "N", "help": "0 is no limit"},
    ),
    JSON_LINES_OPTION,
)
def do_runs(arguments: Arguments) -> None:
    """List runs, newest first, and for failed ones the cause in a few words.

    Reads the files, without a service. `show RUN` shows all of one. With --json each line is a run
    as the UI API has it: flow_id, run, status, ts_epoch, duration, tags, cause and others.
    """
    model = open_model(arguments)
    arguments.flow = resolve_flow(model, arguments.flow)
    found = track(find_runs(model, arguments), "runs found")
    limit = arguments.limit or None
    rows = list(itertools.islice(found, limit))
    is_more = next(found, None) is not None
    if arguments.json:
        for row in rows:
            print_json(row)
    elif rows:
        print_table(RUN_TITLES, map(run_cells, rows), cut=("USER", "TAGS", "CAUSE"))
    if is_more:
        print_notice(f"these are the newest {limit}; --limit 0 lists all")


def find_runs(model: Model, arguments: Arguments) -> Iterator[RunRow]:
    """The runs that match the options, newest first, with their verdicts."""
    for row in model.runs.newest_first(arguments.flow):
        if arguments.since is not None and row["ts_epoch"] < arguments.since * 1000:
            return
        tags = {*(row["tags"] or ()), *(row["system_tags"] or ())}
        if (
            arguments.user in (None, row["user"], row["user_name"])
            and tags.issuperset(arguments.tag)
            and arguments.status in (None, model.runs.judge(row)["status"])
        ):
            yield model.runs.judge(row)


RUN_TITLES = ("STATUS", "RUN", "STARTED", "DURATION", "USER", "TAGS", "CAUSE")


def run_cells(row: RunRow) -> Sequence[str]:
    return (
        row["status"],
        "/".join(run_row_ids(row)),
        format_time(row["ts_epoch"]),
        format_duration(row["duration"]),
        row["user"] or row["user_name"] or "",
        " ".join(map(str, row["tags"] or ())),
        row["cause"]["summary"] if row["cause"] else "",
    )


# -- show ------------------------------------------------------------------------------------------


@subcommand(f"{PROGRAM} show TrainFlow/latest-failed", PATHSPEC, JSON_OPTION)
def do_show(arguments: Arguments) -> None:
    """Show what became of a run, a step or a task, and why it failed.

    PATHSPEC is FLOW/RUN/STEP/TASK or a part of it. FLOW and FLOW/latest are the newest run of the
    flow, FLOW/latest-failed is the newest one that failed. A unique prefix of a run id is enough;
    a step (or STEP/TASK) alone is one of the newest run. The default is the newest run.
    """
    model = open_model(arguments)
    ids = resolve_pathspec(model, arguments.pathspec)
    if len(ids) > TASK_DEPTH:
        raise ServiceError(f"{'/'.join(ids)} is not a task; see {PROGRAM} artifact", exit_code=2)
    show = {RUN_DEPTH: show_run, RUN_DEPTH + 1: show_step, TASK_DEPTH: show_task}[len(ids)]
    show(model, ids, arguments.json)


def show_run(model: Model, ids: Ids, as_json: bool) -> None:
    run = model.runs.get(ids)
    if run is None:
        raise ServiceError(f"There is no run {'/'.join(ids)}.")
    now = model.clock()
    tasks = model.attempts.of_run(ids, now)
    steps = [
        s for s in step_rows(model.store, ids, tasks, now) if s["step_name"] != PARAMETERS_STEP
    ]
    parameters = model.artifacts.parameters(ids)
    if as_json:
        counted = [{**s, "tasks": count_statuses(tasks, s["step_name"])} for s in steps]
        print_json({**run, "parameters": parameters, "steps": counted})
        return
    print_heading(ids, run["status"])
    print_facts(
        (
            ("started", format_time(run["ts_epoch"])),
            ("finished", format_time(run["finished_at"])),
            ("duration", format_duration(run["duration"])),
            ("user", run["user"] or run["user_name"] or ""),
            ("tags", " ".join(map(str, run["tags"] or ()))),
        )
    )
    if parameters:
        print("\nparameters")
        print_facts(((n, value_line(v)) for n, v in parameters.items()), indent="  ")
    if steps:
        print("\nsteps")
        print_table(STEP_TITLES, (step_cells(s, tasks) for s in steps), (), indent="  ")
    if run["cause"]:
        print_cause(run["cause"])


def value_line(value: object) -> str:
    """A value on one line, cut to LONGEST_SHOWN_VALUE columns."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return shorten(printable(text), LONGEST_SHOWN_VALUE)


def print_heading(ids: Ids, status: str) -> None:
    print(f"{printable('/'.join(ids))}  {colored(status, status)}")


def count_statuses(tasks: Iterable[AttemptRow], step: str) -> dict[str, int]:
    """How many tasks of a step have each status; the newest attempt of a task counts."""
    newest = {task["task_id"]: task["status"] for task in tasks if task["step_name"] == step}
    counts: dict[str, int] = {}
    for status in newest.values():
        counts[status] = counts.get(status, 0) + 1
    return counts


STEP_TITLES = ("STEP", "STARTED", "DURATION", "TASKS")


def step_cells(step: StepRow, tasks: Iterable[AttemptRow]) -> Sequence[str]:
    counts = count_statuses(tasks, step["step_name"])
    return (
        step["step_name"],
        format_time(step["ts_epoch"]),
        format_duration(step["duration"]),
        ", ".join(f"{count} {status}" for status, count in counts.items()),
    )


def print_cause(cause: Cause) -> None:
    """Print why something failed."""
    print(f"\n{colored('cause', FAILED)}  {printable(cause['summary'])}")
    facts = [("kind", cause["kind"]), ("message", cause["message"] or "")]
    if cause["type"]:
        facts.append(("exception", cause["type"]))
    if cause["attempt_id"] is not None:
        of_all = f" of {cause['attempts']}" if cause["attempts"] else ""
        facts.append(("task", cause["pathspec"]))
        facts.append(("attempt", f"{cause['attempt_id']} (from 0){of_all}"))
    if cause["file"]:
        facts.append(("line", f"{cause['file']}:{cause['line']}"))
    print_facts(facts, indent="  ", whole=("task", "line"))
    if cause["stderr"]:
        print("  the end of its stderr:")
        for line in cause["stderr"]:
            print(f"    {printable(line)}".rstrip())


def show_step(model: Model, ids: Ids, as_json: bool) -> None:
    now = model.clock()
    tasks = [t for t in model.attempts.of_run(ids[:2], now) if t["step_name"] == ids[2]]
    (step,) = (s for s in step_rows(model.store, ids[:2], tasks, now) if s["step_name"] == ids[2])
    if as_json:
        print_json({**step, "tasks": tasks})
        return
    print_heading(ids, ", ".join(f"{n} {s}" for s, n in count_statuses(tasks, ids[2]).items()))
    print_facts(
        (
            ("started", format_time(step["ts_epoch"])),
            ("duration", format_duration(step["duration"])),
        )
    )
    print("\ntasks")
    print_table(ATTEMPT_TITLES, map(attempt_cells, tasks), ("CAUSE",), indent="  ")


ATTEMPT_TITLES = ("TASK", "ATTEMPT", "STATUS", "STARTED", "DURATION", "CAUSE")


def attempt_cells(row: AttemptRow) -> Sequence[str]:
    caught = " (caught)" if row["cause"] and row["status"] == COMPLETED else ""
    return (
        str(row["task_id"]),
        str(row["attempt_id"]),
        row["status"],
        format_time(row["started_at"]),
        format_duration(row["duration"]),
        row["cause"]["summary"] + caught if row["cause"] else "",
    )


def show_task(model: Model, ids: Ids, as_json: bool) -> None:
    attempts = model.attempts.of_task(ids, model.clock())
    artifacts = [row for row in model.artifacts.rows(ids, None) if not row["name"].startswith("_")]
    valued = list(
        track(map(model.artifacts.with_value, artifacts), "artifacts read", len(artifacts))
    )
    metadata, cards = metadata_rows(model.store, ids), model.cards.with_files(ids)
    if as_json:
        files = [{**card, "path": os.path.join(*place)} for card, place in cards]
        print_json(
            {
                "pathspec": "/".join(ids),
                "attempts": attempts,
                "artifacts": valued,
                "metadata": metadata,
                "cards": files,
            }
        )
        return
    print_heading(ids, attempts[0]["status"])
    print("\nattempts")
    print_table(ATTEMPT_TITLES, map(attempt_cells, attempts[::-1]), ("CAUSE",), indent="  ")
    if valued:
        print("\nartifacts")
        print_facts(((row["name"], content_line(row)) for row in valued), indent="  ")
    print("\nmetadata")
    print_facts(((row["field_name"], value_line(row["value"])) for row in metadata), indent="  ")
    if cards:
        print("\ncards")
        paths = [(card["id"] or card["type"], os.path.join(*place)) for card, place in cards]
        print_facts(paths, indent="  ", whole=dict(paths))
    if attempts[0]["cause"]:
        print_cause(attempts[0]["cause"])


def content_line(row: ArtifactRow) -> str:
    """The value of an artifact on one line, or why it cannot be shown."""
    if "content" in row:
        return value_line(row["content"])
    return f"({row['postprocess_error']['detail']})"


# -- compare ---------------------------------------------------------------------------------------


@subcommand(
    f"{PROGRAM} compare TrainFlow/latest TrainFlow/latest-failed",
    ("pathspecs", {"nargs": "+", "metavar": "RUN"}),
    ("--all", {"action": "store_true", "help": "show also what does not differ"}),
    JSON_OPTION,
)
def do_compare(arguments: Arguments) -> None:
    """Show what differs between runs.

    RUN is a run, named as for `show`. A single one is compared with the last run of its flow before
    it that succeeded.
    """
    model = open_model(arguments)
    runs = [resolve_pathspec(model, pathspec) for pathspec in arguments.pathspecs]
    for ids in runs:
        if len(ids) != RUN_DEPTH:
            raise ServiceError(f"{'/'.join(ids)} is not a run.", exit_code=2)
    if len(runs) > MOST_COMPARED:
        raise ServiceError(f"At most {MOST_COMPARED} runs are compared.", exit_code=2)
    compared = (
        compare_runs(model, runs, arguments.all)
        if len(runs) > 1
        else compare_with_last_success(model, runs[0])
    )
    if compared is None:
        raise ServiceError(f"No run before {'/'.join(runs[0])} has succeeded.")
    if arguments.json:
        print_json(compared)
        return
    print_table(RUN_TITLES, map(run_cells, compared["runs"]), ("TAGS", "CAUSE"))
    print()
    titles = ("WHAT", *("/".join(run_row_ids(row)) for row in compared["runs"]))
    rows = [difference_cells(difference) for difference in compared["differences"]]
    if rows:
        print_table(titles, rows, titles[1:])
    else:
        print("Nothing differs.")


def difference_cells(difference: Difference) -> Sequence[str]:
    values = difference["values"]
    if difference["section"] == "durations":
        shown = [format_duration(value) for value in values]
    else:
        shown = ["" if value is None else value_line(value) for value in values]
    return (f"{difference['section']} {difference['name']}", *shown)


# -- logs ------------------------------------------------------------------------------------------

FOLLOW_SECONDS = 1.0


class TaskLine(NamedTuple):
    """A line of the log of an attempt."""

    task: Ids
    attempt: int
    stream: str
    line: LogLine


@subcommand(
    f"{PROGRAM} logs TrainFlow/latest/train --stderr -n 20",
    PATHSPEC,
    ("--stdout", {"action": "store_true", "help": "only stdout"}),
    ("--stderr", {"action": "store_true", "help": "only stderr"}),
    (
        "--attempt",
        {"type": parse_lines, "metavar": "N", "help": "of attempt N, from 0 (default: the newest)"},
    ),
    ("-n", {"type": parse_lines, "metavar": "LINES", "help": "only the last lines"}),
    ("-f", {"action": "store_true", "help": "follow: print what is added, until it ends"}),
    JSON_LINES_OPTION,
)
def do_logs(arguments: Arguments) -> None:
    """Print the log of a task, or of all tasks of a step or run, each line with its task.

    Metaflow stores the log of an attempt when the attempt has ended. PATHSPEC is as for `show`.
    """
    model = open_model(arguments)
    ids = resolve_pathspec(model, arguments.pathspec)
    is_task = len(ids) == TASK_DEPTH
    if len(ids) > TASK_DEPTH:
        raise ServiceError(f"{'/'.join(ids)} is not a task.", exit_code=2)
    if arguments.attempt is not None and is_task:
        require_attempt(model, ids, arguments.attempt)
    streams = [s for s in LOG_STREAMS.values() if getattr(arguments, s)]
    log_tail = LogTail(model, ids, arguments.attempt, streams or list(LOG_STREAMS.values()))
    may_grow = may_log_more(model, ids)
    lines = log_tail.new_lines()
    if arguments.n is not None:
        import collections

        lines = iter(collections.deque(lines, arguments.n))
    print_task_lines(lines, is_task, arguments.json)
    if may_grow and is_task and not arguments.f:
        print_notice(f"{'/'.join(ids)} is still running: its log is stored when it ends")
    while may_grow and arguments.f:
        print(end="", flush=True)
        time.sleep(FOLLOW_SECONDS)
        may_grow = may_log_more(model, ids)  # before the lines, so that none is missed at the end
        print_task_lines(log_tail.new_lines(), is_task, arguments.json)


def require_attempt(model: Model, task: Ids, asked: int) -> None:
    """ServiceError if a task has no such attempt."""
    count = len(model.attempts.of_task(task, model.clock()))
    if asked >= count:
        raise ServiceError(f"There is no attempt {asked} of {'/'.join(task)}: it has {count}.")


def may_log_more(model: Model, ids: Ids) -> bool:
    """Whether more may be added to the logs of a run, or of a step or task of it."""
    run = model.runs.get(ids[:2])
    attempts = [model.attempts.of_task(task, model.clock())[:1] for task in tasks_below(model, ids)]
    newest = list(itertools.chain.from_iterable(attempts))
    if any(awaits_log(row) for row in newest):
        return True
    if run is None or run["status"] != RUNNING:
        return False
    return len(ids) == RUN_DEPTH or any(row["finished_at"] is None for row in newest)


def awaits_log(row: AttemptRow) -> bool:
    """Whether an attempt has just ended, and the scheduler has yet to store its log."""
    return row["finished_at"] is not None and not row["is_log_stored"]


class LogTail:
    """Reads the logs of a run, a step or a task, each line once."""

    def __init__(self, model: Model, ids: Ids, attempt: int | None, streams: Sequence[str]) -> None:
        """`attempt`: None for the newest of each task. `streams`: "stdout", "stderr" or both."""
        self._model = model
        self._ids = ids
        self._attempt = attempt
        self._streams = streams
        self._lines_read: dict[tuple[Ids, int, str], int] = {}  # of a task's attempt's stream

    def new_lines(self) -> Iterator[TaskLine]:
        """The lines that have been added since the last call, task by task."""
        tasks = tasks_below(self._model, self._ids)
        for task in tasks if is_terminal(sys.stdout) else track(tasks, "logs read", len(tasks)):
            attempts = len(self._model.attempts.of_task(task, self._model.clock()))
            attempt = attempts - 1 if self._attempt is None else self._attempt
            if attempt < attempts:
                new = (self._new_lines_of(task, attempt, stream) for stream in self._streams)
                yield from merge_streams(itertools.chain.from_iterable(new))

    def _new_lines_of(self, task: Ids, attempt: int, stream: str) -> Iterator[TaskLine]:
        key = (task, attempt, stream)
        lines = self._model.logs.lines(task, attempt, stream)
        read, self._lines_read[key] = self._lines_read.get(key, 0), len(lines)
        return (TaskLine(task, attempt, stream, line) for line in lines[read:])


def merge_streams(lines: Iterable[TaskLine]) -> list[TaskLine]:
    """Lines of stdout and stderr by time; a line without a time follows the one before it."""
    timed: list[tuple[float, TaskLine]] = []
    at: dict[str, float] = {}
    for line in lines:
        at[line.stream] = line.line["timestamp"] or at.get(line.stream, 0)
        timed.append((at[line.stream], line))
    timed.sort(key=operator.itemgetter(0))
    return [line for _, line in timed]


def print_task_lines(lines: Iterable[TaskLine], is_task: bool, as_json: bool) -> None:
    """Print lines, each with its step and task unless all are of one task."""
    for task, attempt, stream, line in lines:
        if as_json:
            pathspec = "/".join(task)
            print_json({"pathspec": pathspec, "attempt_id": attempt, "stream": stream, **line})
        else:
            start = "" if is_task else f"[{printable('/'.join(task[2:]))}] "
            print(start + printable(line["line"]))


# -- artifacts and cards ---------------------------------------------------------------------------


@subcommand(
    f"{PROGRAM} artifact TrainFlow/latest/train/7/model --raw | gzip -d > model.pickle",
    PATHSPEC,
    ("--attempt", {"type": parse_lines, "metavar": "N", "help": "of attempt N, from 0"}),
    ("--raw", {"action": "store_true", "help": "write the stored bytes to stdout"}),
    JSON_LINES_OPTION,
)
def do_artifact(arguments: Arguments) -> None:
    """Print an artifact of a task, or all of them.

    PATHSPEC is a task, named as for `show`, with /NAME for one artifact of it. Values are read
    without unpickling, so that no code of a flow runs. --raw writes a gzipped pickle.
    """
    model = open_model(arguments)
    ids = resolve_task(model, arguments.pathspec)
    if arguments.attempt is not None:
        require_attempt(model, ids[:TASK_DEPTH], arguments.attempt)
    rows = model.artifacts.rows(ids[:TASK_DEPTH], arguments.attempt)
    if len(ids) == TASK_DEPTH:
        print_artifacts(model, [r for r in rows if not r["name"].startswith("_")], arguments)
        return
    row = next((r for r in rows if r["name"] == ids[TASK_DEPTH]), None)
    if row is None:
        raise ServiceError(f"There is no artifact {'/'.join(ids)}.")
    if arguments.raw:
        write_stored(model, row)
    elif arguments.json:
        print_json(valued_artifact(model, row))
    else:
        shown = model.artifacts.with_value(row)
        if "content" not in shown:
            raise ServiceError(f"{'/'.join(ids)}: {shown['postprocess_error']['detail']}")
        for line in shown["content"].split("\n"):
            print(printable(line))


def print_artifacts(model: Model, rows: Sequence[ArtifactRow], arguments: Arguments) -> None:
    if arguments.raw:
        raise ServiceError("--raw is for one artifact: PATHSPEC/NAME", exit_code=2)
    tracked = track(rows, "artifacts read", len(rows))
    if arguments.json:
        for row in tracked:
            print_json(valued_artifact(model, row))
    else:
        print_facts(
            [(row["name"], content_line(model.artifacts.with_value(row))) for row in tracked]
        )


def valued_artifact(model: Model, row: ArtifactRow) -> dict[str, object]:
    """An artifact with its value as text (`content`) and, if possible, as JSON (`value`)."""
    value: object = None
    with contextlib.suppress(OSError, ValueError):
        value = to_json(model.artifacts.value(row, LARGEST_VALUE))
    return {**model.artifacts.with_value(row), "value": value}


def write_stored(model: Model, row: ArtifactRow) -> None:
    """Write the file of an artifact to stdout."""
    try:
        with model.artifacts.open_stored(row) as f, open(1, "wb", closefd=False) as stdout:
            shutil.copyfileobj(f, stdout)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ServiceError(f"{row['name']}: {reason.rstrip('.')}.") from None


@subcommand(
    f"{PROGRAM} card TrainFlow/latest/train --open",
    PATHSPEC,
    ("--id", {"metavar": "ID", "help": "only the card with this id"}),
    ("--open", {"action": "store_true", "help": "open it in a browser"}),
    JSON_LINES_OPTION,
)
def do_card(arguments: Arguments) -> None:
    """Print the paths of the card files of a task, step or run, or open one in a browser.

    PATHSPEC is as for `show`.
    """
    model = open_model(arguments)
    ids = resolve_pathspec(model, arguments.pathspec)
    found = [
        (task, card, os.path.join(*place))
        for task in tasks_below(model, ids)
        for card, place in model.cards.with_files(task)
        if arguments.id in (None, card["id"])
    ]
    if not found:
        missing = sum(map(model.cards.count_missing, tasks_below(model, ids)))
        reason = f": {missing} recorded, but their files are not found" if missing else ""
        raise ServiceError(f"There is no such card in {'/'.join(ids)}{reason}.")
    if arguments.open and len(found) > 1:
        only_one("/".join(ids), [(*task, card["id"] or card["type"]) for task, card, _ in found])
    for task, card, path in found:
        if arguments.json:
            print_json({"pathspec": "/".join(task), **card, "path": path})
        else:
            print(printable(path) if is_terminal(sys.stdout) else path)
    if arguments.open:
        import webbrowser

        if not webbrowser.open(f"file://{urllib.parse.quote(found[0][2])}"):
            raise ServiceError("There is no browser to open it in.")


# -- du, rm and gc ---------------------------------------------------------------------------------

MOST_RUNS_LISTED = 20

DRY_RUN_OPTION = ("--dry-run", {"action": "store_true", "help": "only say what would be deleted"})
YES_OPTION = ("--yes", {"action": "store_true", "help": "do not ask"})


class Deletion(NamedTuple):
    """What is to be deleted, or has been."""

    runs: dict[Ids, Usage]
    kept: dict[Ids, str]  # runs that were meant too, but have to stay, with the reasons
    unreferenced: Usage

    def total(self) -> Usage:
        return total_usage((*self.runs.values(), self.unreferenced))


UNWRITABLE_OUTPUT = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF, errno.EFBIG, errno.EPIPE)
)
"""Errors of writing to stdout that are due to where it leads, and not to this program."""


@contextlib.contextmanager
def explained_failures() -> Iterator[None]:
    """Say in a sentence what cannot be measured or deleted."""
    try:
        yield
    except Unreadable as error:
        raise ServiceError(f"It cannot be told what refers to what: {error}.") from None
    except StoreError as error:
        raise ServiceError(str(error)) from None
    except OSError as error:
        if error.filename is None and error.errno in UNWRITABLE_OUTPUT:
            raise  # the output, of which `main` tells
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        raise ServiceError(f"It cannot go on: {where}{error.strerror}.") from None


@subcommand(
    f"{PROGRAM} du TrainFlow",
    ("pathspec", {"nargs": "?", "metavar": "FLOW|RUN"}),
    JSON_OPTION,
)
def do_du(arguments: Arguments) -> None:
    """Show what takes how much of the disk.

    Of each flow, with all its runs, and what of it nothing refers to, which `gc` deletes; of FLOW,
    of each of its runs: what is its own, the artifacts that it refers to, and what would go with
    it alone. Sizes are those on the disk, as `du` shows them, folders included.
    """
    model = open_model(arguments)
    retention = Retention(model)
    with explained_failures():
        if arguments.pathspec is None:
            show_flow_usages(model, retention, arguments.json)
        elif is_flow(model, arguments.pathspec):
            show_run_usages(retention, arguments.pathspec.strip("/"), None, arguments.json)
        else:
            run = resolve_only_run(model, arguments.pathspec)
            show_run_usages(retention, run[0], run, arguments.json)


def resolve_only_run(model: Model, pathspec: str) -> Ids:
    """The ids of the run that a pathspec means; nothing, such as an unset variable, means none."""
    ids = resolve_pathspec(model, pathspec) if pathspec else ()
    if len(ids) != RUN_DEPTH:
        raise ServiceError(f"{'/'.join(ids)!r} is no run.", exit_code=2)
    return ids


def show_flow_usages(model: Model, retention: Retention, as_json: bool) -> None:
    names = [name for name in retention.flow_folders() if model.store.flow((name,)) is not None]
    flows = list(track(retention.measure_flows(names), "flows measured", len(names)))
    total = retention.measure_all()
    runs = sum(flow.runs for flow in flows)
    unreferenced = total_usage(flow.unreferenced for flow in flows)
    if as_json:
        rows = [
            {
                "flow_id": flow.flow,
                "runs": flow.runs,
                **flow.held._asdict(),
                "unreferenced": flow.unreferenced._asdict(),
            }
            for flow in flows
        ]
        totals = {"runs": runs, **total._asdict(), "unreferenced": unreferenced._asdict()}
        print_json({**totals, "flows": rows})
        return
    cells = [
        (flow.flow, str(flow.runs), *usage_cells(flow.held), format_size(flow.unreferenced.bytes))
        for flow in flows
    ]
    cells.append(("all", str(runs), *usage_cells(total), format_size(unreferenced.bytes)))
    print_table(("FLOW", "RUNS", "FILES", "SIZE", "UNREFERENCED"), cells, cut=("FLOW",))


def show_run_usages(retention: Retention, flow: str, run: Ids | None, as_json: bool) -> None:
    usages = track(retention.measure_runs(flow), "runs measured")
    rows = [usage for usage in usages if run in (None, usage.ids)]
    if as_json:
        shown = [
            {
                "flow_id": flow,
                "run": row.ids[1],
                **row.own._asdict(),
                "data": row.data._asdict(),
                "only": row.only._asdict(),
            }
            for row in rows
        ]
        print_json({"flow_id": flow, "runs": shown} if run is None else shown[0])
        return
    cells = [
        (
            "/".join(row.ids),
            *usage_cells(row.own),
            format_size(row.data.bytes),
            format_size(row.only.bytes),
        )
        for row in rows
    ]
    print_table(("RUN", "FILES", "SIZE", "ARTIFACTS", "ONLY ITS OWN"), cells, cut=("RUN",))


def format_size(size: int) -> str:
    """A number of bytes, in the unit that leaves few digits."""
    if size < 1000:
        return f"{size} B"
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value >= 999.95:
            value, unit = value / 1000, larger
    return f"{value:.1f} {unit}"


def usage_cells(usage: Usage) -> Sequence[str]:
    return (f"{usage.files:,}", format_size(usage.bytes))


@subcommand(
    f"{PROGRAM} rm TrainFlow/1795448419531000 TrainFlow/latest-failed",
    ("pathspecs", {"nargs": "+", "metavar": "RUN"}),
    DRY_RUN_OPTION,
    YES_OPTION,
    JSON_OPTION,
)
def do_rm(arguments: Arguments) -> None:
    """Delete runs, each with its records, logs and cards.

    RUN is a run as for `show`, but a flow does not stand for its newest run. The artifacts to which
    nothing refers any more are deleted by `gc`. A run that is running stays, and so does one that
    another was resumed from, unless that goes too; then nothing is deleted at all.
    """
    model = open_model(arguments)
    retention = Retention(model)
    for pathspec in arguments.pathspecs:
        if is_flow(model, pathspec):
            raise ServiceError(
                f"{pathspec} is a flow: name a run of it, such as {pathspec}/latest, or delete all "
                f"with `gc --flow {pathspec} --keep-last 0`.",
                exit_code=2,
            )
    runs = [resolve_only_run(model, pathspec) for pathspec in arguments.pathspecs]
    with explained_failures():
        for ids, reason in retention.reasons_to_stay(runs).items():
            raise NotDeletable(f"{'/'.join(ids)} cannot be deleted. {reason}")
        plan = Deletion({ids: retention.measure_run(ids) for ids in runs}, {}, Usage())
    if agree(arguments, plan, model):
        done = Deletion(delete_tracked(retention, plan), {}, Usage())
        print_deletion(done, arguments.json)


@subcommand(
    f"{PROGRAM} gc --older-than 30d --keep-last 3 --status failed",
    (
        "--older-than",
        {"type": parse_age, "metavar": "AGE", "help": "runs begun more than 30d, 12h ago"},
    ),
    (
        "--keep-last",
        {"type": parse_lines, "metavar": "N", "help": "runs but for the newest N of each flow"},
    ),
    ("--status", {"choices": ENDED, "help": "runs of this status"}),
    ("--flow", {"metavar": "FLOW", "help": "nothing of other flows"}),
    ("--tag", {**TAG, "help": "runs with this tag"}),
    ("--not-tag", {**TAG, "help": "runs without this tag"}),
    DRY_RUN_OPTION,
    YES_OPTION,
    JSON_OPTION,
)
def do_gc(arguments: Arguments) -> None:
    """Delete the runs for which all conditions hold, and then what nothing refers to.

    Without a condition no run is deleted; --flow alone is not a condition. A running run is kept,
    and so is a run from which another one that is kept was resumed. What nothing refers to is kept
    for a day after it was written, and while a run of its flow is running.
    """
    model = open_model(arguments)
    retention = Retention(model)
    arguments.flow = resolve_flow(model, arguments.flow)
    with explained_failures():
        if not arguments.dry_run:
            for sentence in retention.finish_deletions():
                print_notice(sentence)
        chosen = choose_runs(retention, arguments)
        kept = retention.reasons_to_stay(chosen)
        going = [ids for ids in chosen if ids not in kept]
        garbage = retention.find_garbage(going, arguments.flow)
        unreferenced = total_usage(found.usage() for found in garbage)
        usages = {ids: retention.measure_run(ids) for ids in going}
        plan = Deletion(usages, kept, unreferenced)
    for found in garbage:
        if found.doubt:
            print_notice(f"no artifact of {found.flow} is deleted: {found.doubt}")
    if agree(arguments, plan, model):
        runs = delete_tracked(retention, plan)
        with explained_failures():
            if runs or not arguments.yes:
                garbage = retention.find_garbage(flow=arguments.flow)
            blobs = itertools.chain.from_iterable(map(retention.remove_garbage, garbage))
            total = sum(found.size() for found in garbage)
            removed = total_usage(track(blobs, "artifacts deleted", total))
        print_deletion(Deletion(runs, kept, removed), arguments.json)


def choose_runs(retention: Retention, arguments: Arguments) -> list[Ids]:
    """The runs that the options of `gc` name."""
    conditions = Conditions(
        arguments.flow,
        arguments.older_than,
        arguments.keep_last,
        (arguments.status,) if arguments.status else ENDED,
        arguments.tag,
        arguments.not_tag,
    )
    if not conditions.are_given():
        return []
    return [run_row_ids(row) for row in track(retention.choose_runs(conditions), "runs found")]


def agree(arguments: Arguments, plan: Deletion, model: Model) -> bool:
    """Say what is to be deleted, and whether it shall be: because of --yes, or of an answer.

    ServiceError where nobody can be asked, or where the answer is no.
    """
    is_anything = plan.total().files > 0 or bool(plan.runs)
    if arguments.dry_run or not (is_anything or arguments.json):
        if arguments.json:
            print_json({"dry_run": True, **deletion_json(plan)})
        else:
            print_plan(plan, model)
        return False
    if not arguments.json:
        print_plan(plan, model)
    if arguments.yes or not is_anything:
        return True
    print(end="", flush=True)
    if not (is_terminal(sys.stdin) and is_terminal(sys.stderr)):
        raise ServiceError("Nothing was deleted: without a terminal it takes --yes.", exit_code=2)
    print(f"Delete {describe_usage(plan.total())}? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ServiceError("Nothing was deleted.")
    return True


def print_plan(plan: Deletion, model: Model) -> None:
    """Show the runs that are to be deleted, and how much that and the rest is."""
    listed = list(itertools.islice(plan.runs.items(), MOST_RUNS_LISTED))
    rows = []
    for ids, usage in listed:
        row = model.runs.get(ids)
        started = "-" if row is None else format_time(row["ts_epoch"])
        rows.append(
            ("" if row is None else row["status"], "/".join(ids), started, *usage_cells(usage))
        )
    if rows:
        print_table(("STATUS", "RUN", "STARTED", "FILES", "SIZE"), rows, cut=("RUN",))
    if len(plan.runs) > len(listed):
        print(f"and {len(plan.runs) - len(listed)} more runs")
    for ids, reason in itertools.islice(plan.kept.items(), MOST_RUNS_LISTED):
        print(f"{printable('/'.join(ids))} stays. {printable(reason)}")
    if len(plan.kept) > MOST_RUNS_LISTED:
        print(f"and {len(plan.kept) - MOST_RUNS_LISTED} more runs stay")
    print_deletion(plan, False, "To delete")


def print_deletion(deletion: Deletion, as_json: bool, what: str = "Deleted") -> None:
    """Say how much is to be or was deleted."""
    if as_json:
        print_json({"dry_run": False, **deletion_json(deletion)})
        return
    parts = []
    if deletion.runs:
        of_runs = describe_usage(total_usage(deletion.runs.values()))
        parts.append(f"{count_runs(deletion.runs)} of {of_runs}")
    if deletion.unreferenced.files:
        parts.append(f"{describe_usage(deletion.unreferenced)} to which nothing refers")
    print(f"{what}: {', and '.join(parts) or 'nothing'}")


def count_runs(runs: Collection[Ids]) -> str:
    return f"{len(runs):,} run{'s' if len(runs) != 1 else ''}"


def describe_usage(usage: Usage) -> str:
    return f"{usage.files:,} file{'s' if usage.files != 1 else ''} ({format_size(usage.bytes)})"


def deletion_json(deletion: Deletion) -> dict[str, object]:
    return {
        "runs": [
            {"flow_id": ids[0], "run": ids[1], **usage._asdict()}
            for ids, usage in deletion.runs.items()
        ],
        "kept": [
            {"flow_id": ids[0], "run": ids[1], "reason": reason}
            for ids, reason in deletion.kept.items()
        ],
        "unreferenced": deletion.unreferenced._asdict(),
        **deletion.total()._asdict(),
    }


def delete_tracked(retention: Retention, plan: Deletion) -> dict[Ids, Usage]:
    """Delete the runs of a plan, and return those that are deleted with what they took."""
    with explained_failures():
        deleted = retention.delete_runs(plan.runs)
        return dict(track(deleted, "runs deleted", len(plan.runs)))


# -- demo ------------------------------------------------------------------------------------------

DEMO_FLOW = """\
from metaflow import FlowSpec, Parameter, current, step


class DemoFlow(FlowSpec):
    \"\"\"A branch, a foreach and a join of each.\"\"\"

    count = Parameter("count", default=3, help="how many numbers to square")

    @step
    def start(self):
        print("run", current.run_id, "with the tags", sorted(current.tags))
        self.numbers = list(range(1, self.count + 1))
        self.next(self.squares, self.names)

    @step
    def squares(self):
        self.next(self.square, foreach="numbers")

    @step
    def square(self):
        self.result = self.input**2
        self.next(self.add)

    @step
    def add(self, inputs):
        self.total = sum(i.result for i in inputs)
        self.next(self.join)

    @step
    def names(self):
        self.label = f"the squares of 1 to {self.count}"
        self.next(self.join)

    @step
    def join(self, inputs):
        self.summary = f"{inputs.names.label} add up to {inputs.add.total}"
        self.next(self.end)

    @step
    def end(self):
        print(self.summary)


if __name__ == "__main__":
    DemoFlow()
"""


@subcommand(
    f"{PROGRAM} demo",
    ("folder", {"nargs": "?", "default": "./metaflow-demo", "metavar": "DIR"}),
    takes_service=True,
)
def do_demo(arguments: Arguments) -> None:
    """Run a small flow under the service.

    Writes demo_flow.py into DIR (default ./metaflow-demo), runs it there with this Python, and
    prints what was recorded and what to try next.
    """
    import subprocess

    called = os.path.abspath(sys.argv[0])
    program = f"{sys.executable} {called}" if called.endswith(".py") else called
    folder = os.path.normpath(os.path.join(current_folder(), arguments.folder))
    flow = os.path.join(folder, "demo_flow.py")
    if arguments.root is not None:
        arguments.root = resolve_root(arguments)  # relative to here, not to the demo
    try:
        os.makedirs(folder, exist_ok=True)
        with open(flow, "w", encoding="utf-8") as f:
            f.write(DEMO_FLOW)
        os.chdir(folder)
    except OSError as error:
        raise ServiceError(f"{flow} cannot be written: {error.strerror}.") from None
    with leased_service(arguments) as (service, _):
        wait_until_ready(service)
        note_card_root(datastore_folder(service.root), folder)
        environment = command_environment(arguments, service)
        variables = ("METAFLOW_USER", "SUDO_USER", "USERNAME", "USER")
        if all(os.environ.get(name) in (None, "", "root") for name in variables):
            environment["METAFLOW_USER"] = "demo"  # Metaflow needs one; a fresh container has none
        ran = subprocess.run([sys.executable, flow, "run", "--tag", "demo"], env=environment)
        if ran.returncode != 0:
            raise ServiceError("The demo flow failed; its output is above.", ran.returncode)
        print_recorded(service, folder, program)


def print_recorded(service: Service, folder: str, program: str) -> None:
    """Print what the service has recorded of the newest run of the demo, and what to try next."""

    def ask_json(path: str) -> Any:
        return json.loads(get_response(service, f"/flows/DemoFlow/runs{path}")[1])

    run = ask_json("?_limit=1")[0]["run_number"]
    steps = [s["step_name"] for s in ask_json(f"/{run}/steps")[::-1] if s["step_name"][0] != "_"]
    tasks = sum(len(ask_json(f"/{run}/steps/{name}/tasks")) for name in steps)
    print(
        f"""
Recorded as DemoFlow/{run}: {tasks} tasks in the steps {", ".join(steps)}.
The service at {service.url} keeps it in {datastore_folder(service.root)},
where local mode reads it too.

Try next, in {folder}:
    {program} run {sys.executable} demo_flow.py run --count 10
    {program} run {sys.executable} demo_flow.py tag list --run-id {run}
    METAFLOW_DEFAULT_METADATA=local {sys.executable} demo_flow.py tag list --run-id {run}
    curl {service.url}/flows/DemoFlow/runs
    {program} status"""
    )


# -- the parser, and main --------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line."""

    def error(self, message: str) -> NoReturn:
        raise ServiceError(f"{message}; see {self.prog} --help", exit_code=2)


class VersionAction(argparse.Action):
    """Prints our version and Metaflow's; the latter takes time to find, so only on demand."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            nargs=0, help="print the version of this program and of Metaflow", **settings
        )

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib import metadata

        try:
            metaflow = f"Metaflow {metadata.version('metaflow')}"
        except metadata.PackageNotFoundError:
            metaflow = "Metaflow is not installed"
        print(f"{PROGRAM} {__version__} ({metaflow})")
        raise SystemExit(0)


def make_parser(words: Sequence[str]) -> Parser:
    """The parser of the command line, with only the subcommand that the first of `words` names.

    To declare all of them takes 10 ms, an eighth of what `url` takes in all. That is done only if
    no subcommand is named, for the help and for the message about a wrong one.
    """
    parser = Parser(
        prog=PROGRAM,
        description=(__doc__ or "").partition("\n")[0],
        epilog=f"Example: {PROGRAM} run python flow.py run",
    )
    parser.add_argument("--version", action=VersionAction)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    named = [name for name in words[:1] if name in COMMANDS]
    for name in named or COMMANDS:
        declared = COMMANDS[name]
        # Without docstrings (`python -OO`) there is little help, but every command works.
        lines = [line.strip() for line in (declared.function.__doc__ or name).splitlines()]
        subparser = subparsers.add_parser(
            name,
            help=lines[0],
            description="\n".join(lines),
            epilog=f"Example: {declared.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if named:
            add_arguments(subparser, declared)
    return parser


def add_arguments(parser: argparse.ArgumentParser, declared: Command) -> None:
    parser.set_defaults(function=declared.function)
    parser.add_argument(
        "--root",
        metavar="DIR",
        help="the folder that contains .metaflow, or will (default: the one that Metaflow's local "
        "mode would use here)",
    )
    if declared.takes_service:
        add_service_options(parser)
    for flag, settings in declared.arguments:
        parser.add_argument(flag, **settings)


def add_service_options(parser: argparse.ArgumentParser) -> None:
    def option(convert: Callable[[str], T]) -> Callable[[str], T]:
        def converted(text: str) -> T:
            try:
                return convert(text)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from None

        return converted

    parser.add_argument(
        "--host",
        help=f"the address to listen on (default: {DEFAULT_HOST}); any but loopback needs a key",
    )
    parser.add_argument(
        "--port",
        metavar="N",
        type=option(parse_port),
        help=f"the port to listen on; 0 means any free one (default: {ENV_PORT}, else 0)",
    )
    parser.add_argument(
        "--idle-timeout",
        metavar="SECONDS",
        type=option(parse_seconds),
        help="stop after so long without a request or a running command; 0 means never (default: "
        f"{ENV_IDLE_TIMEOUT}, else {DEFAULT_IDLE_TIMEOUT:.0f})",
    )
    parser.add_argument(
        "--ui-dir",
        metavar="DIR",
        type=option(parse_ui_folder),
        help="a build of the official Metaflow UI, to show instead of the page of this program "
        f"(default: {ENV_UI_DIR})",
    )
    parser.add_argument(
        "--generate-key",
        action="store_true",
        help=f"require a key for every request: the one in {ENV_KEY}, else a new one",
    )


def prepare_standard_streams() -> None:
    """Open those of stdin, stdout and stderr that are closed, lest another file get their number.

    The command that `run` becomes does not inherit them. What stdout cannot encode, perhaps since
    it is not valid text, is printed as `encode_as_path` has it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error(PROGRAM, encode_as_path)
        sys.stdout.reconfigure(errors=PROGRAM)


def encode_as_path(error: UnicodeError) -> tuple[bytes | str, int]:
    """Encode characters as they are in the paths of files or, if they cannot be, escape them.

    A handler for `codecs.register_error`.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    try:
        return os.fsencode(text), error.end
    except UnicodeEncodeError:
        return text.encode("ascii", "backslashreplace"), error.end


def main() -> NoReturn:
    """Run the command line; an error is one line on stderr and a non-zero exit code.

    The process ends without the interpreter's clean-up, which takes a fifth of what `url` takes.
    """
    prepare_standard_streams()
    try:
        exit_code = run_command_line(sys.argv[1:])
    except ServiceError as failure:
        print_notice(str(failure))
        exit_code = failure.exit_code
    except KeyboardInterrupt:
        exit_code = 130
    except BrokenPipeError:
        exit_code = 1
    except OSError as error:
        if error.filename is not None or error.errno not in UNWRITABLE_OUTPUT:
            raise
        print_notice(f"the output cannot be written: {error.strerror}")
        exit_code = 1
    os._exit(exit_code)


def run_command_line(words: Sequence[str]) -> int:
    """Run the subcommand that the words name, and return the exit code."""
    try:
        arguments = make_parser(words).parse_args(words)
        arguments.function(arguments)
    except SystemExit as end:  # also from argparse, which has printed its help by then
        return int(end.code or 0)
    finally:
        print(end="", flush=True)  # even before an error; sys.stdout is None where it was closed
    return 0


if __name__ == "__main__":
    main()
