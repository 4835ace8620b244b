"""A Ray cluster whose nodes are machines, as far as one machine can tell, and are cut off and killed.

Where this process may have namespaces (root, `unshare`, `ip`), each node has a host name and an address of its own on a
bridge that nothing else reaches, and all of it ends with this process. Elsewhere the nodes have addresses on loopback.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import boto3

from benchmarks.commands import free_port
from jobs.s3_server import s3_server
from raysseg import storage

_KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-of-32-characters-or-more!"}
_NAMESPACES = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
_BRIDGE = """
mount -t tmpfs tmpfs /run
ip link set lo up
ip link add nodes type bridge
ip addr add 10.77.0.1/24 dev nodes
ip link set nodes up
"""
_JOIN = """
ip netns add {name}
ip link add {name} type veth peer name eth0 netns {name}
ip -n {name} addr add {address}/24 dev eth0
ip -n {name} link set lo up
ip -n {name} link set eth0 up
ip link set {name} master nodes up
"""
_TRIAL = f"""
{_BRIDGE}
{_JOIN.format(name="node", address="10.77.0.2")}
ip netns exec node unshare --uts hostname node
mount --bind /etc/hosts /etc/hosts
"""
MARK = "BENCHMARK_NODE"
"""In the environment of all that runs on a node: its folder and name."""
_INSIDE = "BENCHMARK_NAMESPACES"  # set to "" where there are none
_MOST = 9
_START_S = 120


# --- the network --------------------------------------------------------------------------------------------------


def enter_namespaces() -> None:
    """Starts this program again in namespaces of its own, if it may have them; says so if not. To be called first."""
    if _INSIDE in os.environ:
        return
    if reason := _what_forbids():
        print(f"no network namespaces here, nodes have addresses on loopback: {reason}", file=sys.stderr)
        os.environ[_INSIDE] = ""
        return
    os.environ[_INSIDE] = "yes"
    os.execvp(_NAMESPACES[0], [*_NAMESPACES, sys.executable, *sys.orig_argv[1:]])


def _what_forbids() -> str:
    missing = [name for name in ("unshare", "ip", "hostname") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)}: not found"
    tried = subprocess.run([*_NAMESPACES, "sh", "-ec", _TRIAL], capture_output=True, text=True)
    return tried.stderr.strip() if tried.returncode else ""


@dataclass(frozen=True)
class Network:
    """Where nodes have their addresses.

    Attributes:
        is_real: whether they are those of machines: each in a namespace of its own.
        here: this process's.
    """

    is_real: bool
    here: str

    def name(self, number: int) -> str:
        """A node's host name, which all others know."""
        return f"node-{number}"

    def address(self, number: int) -> str:
        """A node's, from 2 on."""
        return f"{self.here.rsplit('.', 1)[0]}.{number}"

    def join(self, number: int) -> list[str]:
        """Takes a node in; returns what a command is preceded with that is to run there."""
        if not self.is_real:
            return []
        name = self.name(number)
        _shell(_JOIN.format(name=name, address=self.address(number)))
        enter = ["ip", "netns", "exec", name, "unshare", "--uts"]
        return [*enter, "sh", "-c", 'hostname "$0" && exec "$@"', name]

    def cut_off(self, number: int) -> None:
        """No packet goes to or comes from a node any more: there is no goodbye, as where a machine loses its power."""
        if self.is_real:
            _shell(f"ip link set {self.name(number)} down")


LOOPBACK = Network(False, "127.0.0.1")


def open_network(folder: Path) -> Network:
    """The network of this process, which enter_namespaces has prepared."""
    if not os.environ[_INSIDE]:
        return LOOPBACK
    _shell(_BRIDGE)
    network = Network(True, "10.77.0.1")
    known = [f"{network.address(number)} {network.name(number)}\n" for number in range(2, _MOST)]
    (folder / "hosts").write_text("".join(["127.0.0.1 localhost\n", *known]))
    _shell(f"mount --bind {folder}/hosts /etc/hosts")
    return network


def _shell(commands: str) -> None:
    subprocess.run(["sh", "-ec", commands], check=True)


# --- nodes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """A machine with a raylet.

    Attributes:
        number: by which its network knows it.
        address: its own.
        mark: that all its processes bear: its folder.
        log: what `ray start` says.
    """

    number: int
    address: str
    mark: str
    log: Path
    process: subprocess.Popen[bytes]


@dataclass
class Cluster:
    """A head without room for work, and nodes that come and go. It wants a token.

    Attributes:
        folder: for Ray's sockets and logs; a short path, as sockets have a limit.
        environment: of all nodes.
        head_options: of the head's `ray start`, beside those that it has anyway.
    """

    network: Network
    folder: Path
    environment: Mapping[str, str]
    head_options: Mapping[str, object] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    port: int = field(default_factory=free_port)
    dashboard: int = field(default_factory=free_port)

    @property
    def url(self) -> str:
        """The head's dashboard."""
        return f"http://{self.nodes[0].address}:{self.dashboard}"

    def add(self, num_cpus: int) -> Node:
        """Starts a node, the first one as the head; it is there when this returns."""
        number = 2 + len(self.nodes)
        mark = f"{self.folder}/{self.network.name(number)}"
        log = Path(f"{mark}.log")
        with log.open("w") as output:
            process = subprocess.Popen(
                [*self.network.join(number), *self._command(number, num_cpus, mark)],
                env=self._environment(mark),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.nodes.append(Node(number, self.network.address(number), mark, log, process))
        self._wait_for(self.nodes[-1])
        return self.nodes[-1]

    def _command(self, number: int, num_cpus: int, folder: str) -> list[str]:
        address = self.network.address(number)
        options: dict[str, object] = {"node-ip-address": address, "num-cpus": num_cpus, "object-store-memory": 2**28}
        options |= {"temp-dir": folder}  # its own: a node that comes clears what jobs have brought along
        options |= {"dashboard-agent-listen-port": free_port(), "min-worker-port": 0, "max-worker-port": 0}
        if self.nodes:
            where = [f"--address={self.nodes[0].address}:{self.port}"]
        else:
            options |= {"port": self.port, "dashboard-port": self.dashboard, "ray-client-server-port": free_port()}
            options |= self.head_options
            where = ["--head", f"--dashboard-host={address}", "--disable-usage-stats"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *where]
        return [*command, *(f"--{key}={value}" for key, value in options.items())]

    def _environment(self, mark: str) -> dict[str, str]:
        python = Path(sys.executable).parent
        return {
            **self.environment,
            "PATH": f"{self.folder}/bin:{python}:{self.environment['PATH']}",
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "SPT_NOENV": "1",  # else Ray's processes write their titles over their environment, and the mark is gone
            **TOKEN,
            MARK: mark,
        }

    def _wait_for(self, node: Node) -> None:
        deadline = time.monotonic() + _START_S
        while "Ray runtime started" not in node.log.read_text() or not self._answers():
            if node.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(node.log.read_text())
            time.sleep(0.2)

    def _answers(self) -> bool:
        with suppress(OSError):
            return bool(self.get("/api/version"))
        return False

    def get(self, path: str) -> Any:
        """What the dashboard says there."""
        headers = {"Authorization": f"Bearer {TOKEN['RAY_AUTH_TOKEN']}"}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=30) as answer:
            return json.load(answer)

    def at(self, address: str) -> Node:
        """The node with that address."""
        return next(node for node in self.nodes if node.address == address)

    def kill(self, node: Node) -> None:
        """Takes a node away: its raylet and all that this has started get SIGKILL."""
        kill_marked(node.mark)
        node.process.wait()


@contextmanager
def running(cluster: Cluster, num_cpus: int = 0) -> Iterator[Cluster]:
    """Starts the head, without room for work by default; all nodes end with the block."""
    try:
        cluster.add(num_cpus)
        yield cluster
    finally:
        for node in reversed(cluster.nodes):
            cluster.kill(node)


def kill_marked(mark: str) -> None:
    """SIGKILL for all processes that bear a mark, or one that begins so, until there are none."""
    wanted = f"{MARK}={mark}".encode()
    while found := [pid for pid in _pids() if any(one.startswith(wanted) for one in _environment_of(pid))]:
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _environment_of(pid: int) -> list[bytes]:
    with suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return []


# --- jobs ---------------------------------------------------------------------------------------------------------


class Ground(NamedTuple):
    """Where jobs are sent.

    Attributes:
        cluster: a head and two nodes.
        bucket: an empty one, s3://name.
        variables: that job files name: the bucket and the storage's endpoint; no node knows them by itself.
        folder: for what is local.
    """

    cluster: Cluster
    bucket: str
    variables: dict[str, str]
    folder: Path

    def submit(self, job: Path) -> tuple[list[str], dict[str, str]]:
        """What `python` is given to send a job and follow it, and what is added to the environment."""
        command = ["-m", "raysseg.cli", "submit", str(job), "--address", self.cluster.url, "--json"]
        return command, {"RAY_AUTH_TOKEN": TOKEN["RAY_AUTH_TOKEN"], **self.variables}

    def upload(self, folder: str) -> None:
        """Copies a folder to the bucket."""
        for path in (path for path in (self.folder / folder).rglob("*") if path.is_file()):
            storage.write_bytes(f"{self.bucket}/{path.relative_to(self.folder)}", path.read_bytes())

    def take_away(self, node: Node, *, silent: bool) -> float:
        """Kills a node, silently if nobody is to be told; when that was."""
        if silent:
            self.cluster.network.cut_off(node.number)
        at = time.time()
        self.cluster.kill(node)
        return at


@contextmanager
def ground(folder: Path, environment: Mapping[str, str]) -> Iterator[Ground]:
    """Storage and nodes of one CPU each, for the length of the block.

    Args:
        folder: see Cluster.
        environment: of the nodes, beside this process's.
    """
    own = {name: value for name, value in os.environ.items() if name not in storage.S3_ENVIRONMENT}
    network = open_network(folder)
    with (
        s3_server(host=network.here) as endpoint,
        running(Cluster(network, folder, {**own, **_KEYS, **environment})) as cluster,
    ):
        for _ in range(2):
            cluster.add(num_cpus=1)
        os.environ |= _KEYS
        storage.use_s3(endpoint, "us-east-1")
        boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="nodes")
        yield Ground(cluster, "s3://nodes", {"BUCKET": "s3://nodes", "S3": endpoint}, folder)


S3 = {"endpoint": "${S3}", "region": "us-east-1"}
"""What a job says of the storage."""
