"""A Ray cluster on this machine whose nodes do not share memory, as those of several machines.

Each node is a raylet in a mount namespace with a /dev/shm of its own. The head is in the usual one.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
import ray
from ray.cluster_utils import Cluster

from tlt_sglang.launcher.child_process import wait_for

STORE_BYTES = 80 << 20
"""Ray's object store of a node, near the least that it takes."""
SECONDS = 60.0
STARTS = 3
"""Times that a node is started: a raylet gives up where its agent takes more than 15 s to start,
which happens on a busy machine."""
ENDING_SECONDS = 10.0


class Nodes:
    """The cluster; a context manager that ends it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.cluster = Cluster(shutdown_at_exit=False)
        self.cluster.add_node(num_cpus=0, object_store_memory=STORE_BYTES, include_dashboard=False)
        self.address: str = self.cluster.address
        self.head: str = self.cluster.head_node.node_id
        """The node of this process: it ends with that node's raylet, as Ray has it."""
        self.processes: list[subprocess.Popen[bytes]] = []
        ray.init(self.address, namespace="tlt", log_to_driver=False, logging_level="ERROR")

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            end_tree(process)
        ray.shutdown()
        self.cluster.shutdown()

    def add(self) -> str:
        """Add a node with one CPU and return its id."""
        before = self.alive()
        for _ in range(STARTS):
            log = self._folder / f"node-{len(self.processes)}.log"
            process = self._start_node(log)
            wait_for(partial(self._has_decided, process, before), SECONDS)
            if added := self.alive() - before:
                (node,) = added
                return node
        raise AssertionError(log.read_text())

    def _has_decided(self, process: subprocess.Popen[bytes], before: set[str]) -> bool:
        return process.poll() is not None or self.alive() > before

    def _start_node(self, log: Path) -> subprocess.Popen[bytes]:
        start = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
            *(f"--address={self.address}", "--num-cpus=1", "--disable-usage-stats"),
            f"--object-store-memory={STORE_BYTES}",
        ]
        script = f"mount -t tmpfs none /dev/shm && exec {shlex.join(start)}"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["unshare", "--map-root-user", "--mount", "sh", "-c", script],
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def alive(self) -> set[str]:
        """Return the ids of the nodes that live."""
        return {node["NodeID"] for node in ray.nodes() if node["Alive"]}

    def kill(self, node: str) -> None:
        """Kill the raylet of a node, as a machine that fails; what runs there has to end itself."""
        raylet = self.raylet(node)
        parent = raylet.parent()
        raylet.kill()
        for process in self.processes:
            if parent is not None and process.pid == parent.pid:
                process.wait(SECONDS)
        assert wait_for(lambda: node not in self.alive(), SECONDS)

    def raylet(self, node: str) -> psutil.Process:
        """Return the process of a node's raylet."""
        (raylet,) = (
            process
            for process in psutil.process_iter()
            if _is_raylet(process) and f"--node_id={node}" in " ".join(_command(process))
        )
        return raylet


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, unless it has ended: its number may be another's."""
    if process.poll() is not None:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        _, left = psutil.wait_procs(tree, timeout=20)
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def processes_of(words: str) -> list[psutil.Process]:
    """Return the processes with `words` in their command line, without this one and zombies."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                processes += [process] if words in " ".join(_command(process)) else []
    return processes


def end_those_left(words: str) -> list[str]:
    """Kill processes with `words` in their command line if they do not end; return these lines."""
    wait_for(lambda: not processes_of(words), ENDING_SECONDS)
    left = processes_of(words)
    commands = [" ".join(_command(process)) for process in left]
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return [command for command in commands if command]


def _is_raylet(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.name() == "raylet")
    return False


def _command(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        command: list[str] = process.cmdline()
        return command
    return []
