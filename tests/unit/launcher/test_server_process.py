"""A child process and a server: ready, reachable, paused, and ended with all that it started."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from tlt_sglang.errors import EnvironmentProblem
from tlt_sglang.launcher import server_process
from tlt_sglang.launcher.child_process import ChildProcess, wait_for
from tlt_sglang.launcher.server_process import PORTS, ServerProcess, can_bind, free_port

SERVER = """
import http.server, json, os, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, status, body, kind="application/json"):
        self.send_response(status)
        self.send_header("content-type", kind)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path == "/environment":
            self.answer(200, json.dumps(dict(os.environ)).encode())
        elif self.path == "/health":
            self.answer(200, b"fine", "text/plain")
        else:
            self.answer(404, b"no such path")

    def do_POST(self):
        self.answer(200, self.rfile.read(int(self.headers["content-length"])))

    def log_message(self, *arguments):
        pass

port = int(sys.argv[sys.argv.index("--port") + 1])
print("listening", flush=True)
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); "
SLEEP = "import time; time.sleep(600)"
PARENT = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", {SLEEP!r}])
print(1, flush=True)
{SLEEP}
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerProcess]:
    monkeypatch.setenv("TLT_CONFIG", "{}")
    monkeypatch.setattr(server_process, "POLL_SECONDS", 0.02)
    program = (sys.executable, "-c", SERVER)
    log = tmp_path / "log"
    environment = {"COLOUR": "blue"}
    with ServerProcess([], log, program=program, environment=environment) as server:
        server.wait_ready(30)
        yield server
    assert server.processes() == [] and can_bind(server.port)


def test_answers_are_decoded(server: ServerProcess) -> None:
    assert server.get("/health") == "fine"
    assert server.post("/echo", {"a": [1]}) == {"a": [1]}
    assert server.post("/echo") == {}
    with pytest.raises(requests.HTTPError, match=r"^/nowhere: 404 no such path$"):
        server.get("/nowhere")
    assert server.log() == "listening\n"


def test_environment_is_added_and_the_settings_are_not_inherited(server: ServerProcess) -> None:
    environment = server.get("/environment")
    assert environment["COLOUR"] == "blue" and "TLT_CONFIG" not in environment


def test_stop_ends_descendants_that_the_program_leaves(tmp_path: Path) -> None:
    with ChildProcess("Parent", [sys.executable, "-c", PARENT], tmp_path / "log") as parent:
        assert wait_for(lambda: parent.log() == "1\n", 30)
        descendants = [pid for pid in parent.pids() if pid != parent.process.pid]
        assert len(descendants) == 1
        assert [process.pid for process in parent.stop(0.2)] == descendants
        assert wait_for(lambda: not parent.processes(), 5)
        assert parent.stop(0.2) == []


def test_a_server_that_has_ended_is_reported_with_its_log(server: ServerProcess) -> None:
    server.check_alive()
    server.process.kill()
    server.process.wait()
    with pytest.raises(EnvironmentProblem, match=r"(?s)^The server did not answer GET .*listening"):
        server.get("/health")
    with pytest.raises(EnvironmentProblem, match=r"^The server ended with status -9: listening$"):
        server.wait_ready(1)


def test_a_server_that_is_not_ready_in_time(tmp_path: Path) -> None:
    reports: list[float] = []
    program = (sys.executable, "-c", SLEEP)
    with ServerProcess([], tmp_path / "log", program=program, name="Sleeper") as server:
        server.started -= 11
        with pytest.raises(EnvironmentProblem, match=r"^Sleeper was not ready within 12 s: \(the"):
            server.wait_ready(12, reports.append)
    assert len(reports) == 1 and reports[0] > 11


def test_a_program_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    with ChildProcess("Child", [sys.executable, "-c", STUBBORN + SLEEP], tmp_path / "log") as child:
        assert wait_for(lambda: child.log() == "1\n", 30)
        assert [process.pid for process in child.stop(0.1)] == [child.process.pid]
    assert child.process.returncode == -9


def test_a_paused_program_can_be_resumed_and_stopped(tmp_path: Path) -> None:
    with ChildProcess("Child", [sys.executable, "-c", SLEEP], tmp_path / "log") as child:
        child.pause()
        assert wait_for(lambda: child.root.status() == psutil.STATUS_STOPPED, 10)
        child.resume()
        assert wait_for(lambda: child.root.status() != psutil.STATUS_STOPPED, 10)
        child.pause()
        started = time.monotonic()
        assert child.stop() == [] and time.monotonic() - started < 30


def test_wait_done(tmp_path: Path) -> None:
    def child(program: str) -> ChildProcess:
        return ChildProcess("Child", [sys.executable, "-c", program], tmp_path / "log")

    with child("print('fine')") as done:
        done.wait_done(30)
    with (
        child("import sys; sys.exit('broken')") as done,
        pytest.raises(EnvironmentProblem, match=r"^Child ended with status 1: broken$"),
    ):
        done.wait_done(30)
    with (
        child(SLEEP) as done,
        pytest.raises(EnvironmentProblem, match=r"^Child did not end within 0 s: \(the log is"),
    ):
        done.wait_done(0.1)


def test_pipes_are_closed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print(input())"]
    pipe = subprocess.PIPE
    with ChildProcess("Child", command, tmp_path / "log", stdin=pipe, stdout=pipe) as child:
        stdin, stdout = child.process.stdin, child.process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(b"hello\n")
        stdin.flush()
        assert stdout.readline() == b"hello\n"
    assert stdin.closed and stdout.closed


def test_a_free_port_is_below_those_of_outgoing_connections() -> None:
    port = free_port()
    assert PORTS[0] <= port <= PORTS[1]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
        listener.listen()
        assert not can_bind(port)
    assert can_bind(port)


def test_neither_sglang_nor_torch_is_imported() -> None:
    program = (
        "import sys, tlt_sglang.launcher.server_process; "
        "sys.exit(str({'sglang', 'torch'} & set(sys.modules)) if "
        "{'sglang', 'torch'} & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
