"""The command line of `tlt fleet`."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tlt_sglang.config import command_line, flags
from tlt_sglang.config.setting import Setting
from tlt_sglang.config.settings import SETTINGS, Config
from tlt_sglang.coordinator.endpoints import make_keys
from tlt_sglang.errors import ConfigError, EnvironmentProblem, FlagError
from tlt_sglang.fleet.keeper import FleetStatus, describe
from tlt_sglang.fleet.plan import NAMESPACE, Plan, Size
from tlt_sglang.weights import files

if TYPE_CHECKING:
    import argparse

    from tlt_sglang.fleet.manager import Actor

LOOK_SECONDS = 1.0
STOP_SECONDS = 240.0
REACH_SECONDS = 5.0
ANSWER_SECONDS = 60.0
"""Time that Ray has to start a manager again."""


def main(argv: Sequence[str]) -> int:
    """Run the command; its exit status: 0 done, 1 a problem, 2 bad usage, 130 interrupted."""
    try:
        return command_line.run("fleet", _fleet, argv)
    except KeyboardInterrupt:
        return 130


def _parser() -> command_line.Parser:
    parser = command_line.Parser(
        "tlt fleet",
        "Run engines, trainers and a coordinator on a Ray cluster until interrupted. What follows "
        "-- are flags of the engines.",
    )
    flags.add_flag(parser, SETTINGS["store"])
    parser.add_argument("--model", metavar="MODEL", help="Model to serve, as every node names it")
    number = command_line.whole_number
    command_line.add_number(parser, "--engines", 1, "Number of engines", number)
    command_line.add_number(parser, "--trainers", 0, "Number of trainers", number)
    for kind in ("engine", "trainer"):
        parser.add_argument(
            f"--{kind}-cpus", type=float, default=1.0, metavar="N", help=f"CPUs of each {kind}"
        )
        parser.add_argument(
            f"--{kind}-gpus", type=float, default=0.0, metavar="N", help=f"GPUs of each {kind}"
        )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="Address of the Ray cluster (default: RAY_ADDRESS, or auto)",
    )
    parser.add_argument(
        "--local-nodes",
        type=command_line.positive_number,
        metavar="N",
        help="Start a Ray cluster of N nodes on this machine instead, to try it",
    )
    parser.add_argument("--name", default="tlt", metavar="NAME", help="Name of the fleet")
    parser.add_argument(
        "--detach", action="store_true", help="Leave the fleet running, once it is up"
    )
    parser.add_argument(
        "--no-admin-key",
        action="store_true",
        help="Let whoever reaches an engine change its weights and settings; by default that takes "
        "the key in STORE/fleet/keys/admin.key",
    )
    flags.add_flags(parser.add_argument_group("training"), _training_settings())
    parser.add_argument("--status", action="store_true", help="Print the members, and exit")
    parser.add_argument("--stop", action="store_true", help="End the fleet of the store, and exit")
    return parser


def _training_settings() -> list[Setting]:
    return [one for one in SETTINGS.values() if one.used_by == ("sidecar",)]


def _fleet(argv: Sequence[str]) -> None:
    parser = _parser()
    own, engine_flags = list(argv), list[str]()
    if "--" in own:
        at = own.index("--")
        own, engine_flags = own[:at], own[at + 1 :]
    if command_line.print_help(parser, own):
        return
    args = parser.parse_args(own)
    if args.tlt_store is None:
        raise FlagError("A fleet needs a store, a folder that all nodes see; give --tlt-store DIR.")
    store = Path(args.tlt_store).absolute()
    if args.status or args.stop:
        plan = Plan.read(store)
        if plan is None:
            raise ConfigError(f"No fleet was started with the store {store}; see --help.")
        with _connected(args.ray, None):
            if args.stop:
                _stop(plan)
            else:
                print(describe(_status(plan)))
        return
    _check(args)
    with _connected(args.ray, args.local_nodes):
        _run(_plan(args, store, tuple(engine_flags)), detach=args.detach)


def _check(args: argparse.Namespace) -> None:
    if args.engines and args.model is None:
        raise FlagError("Say which model the engines serve: --model MODEL; or give --engines 0.")
    if args.detach and args.local_nodes:
        raise FlagError("--detach has no effect with --local-nodes, which end with this program.")
    for name in ("engine_cpus", "engine_gpus", "trainer_cpus", "trainer_gpus"):
        if not 0 <= getattr(args, name) < 1e6:
            raise FlagError(f"--{name.replace('_', '-')} must be a number from 0 on.")


def _plan(args: argparse.Namespace, store: Path, engine_flags: tuple[str, ...]) -> Plan:
    own = {setting.name for setting in _training_settings()}
    chosen = {name: value for name, value in flags.flag_values(args).items() if name in own}
    return Plan(
        args.name,
        store,
        args.model if args.engines else None,
        args.engines,
        args.trainers,
        Size(args.engine_cpus, args.engine_gpus),
        Size(args.trainer_cpus, args.trainer_gpus),
        engine_flags,
        tuple(flags.to_flags(flags.with_flags(Config(), chosen), _training_settings())),
        protected=not args.no_admin_key,
    )


def _run(plan: Plan, *, detach: bool) -> None:
    """Start the fleet, or join the one that runs, and show its changes until interrupted."""
    _start(plan)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    shown = ""
    while not stopped.is_set():
        try:
            status = _status(plan, stopped)
        except NoAnswerError:
            continue
        if (text := describe(status)) != shown:
            print(text, flush=True)
            shown = text
            if status.is_up:
                print(f"tlt fleet: up; its files are in {plan.folder}", flush=True)
                if detach:
                    print("tlt fleet: end it with --stop", flush=True)
                    return
        stopped.wait(LOOK_SECONDS)
    print("tlt fleet: ending", file=sys.stderr, flush=True)
    _stop(plan)


@contextlib.contextmanager
def _connected(address: str | None, local_nodes: int | None) -> Iterator[None]:
    """Connect to a Ray cluster within, or to one that is started here."""
    try:
        import ray
        from ray.cluster_utils import Cluster
    except ImportError as error:
        raise EnvironmentProblem(
            "A fleet runs on Ray, which is not installed here: pip install 'tlt-sglang[fleet]'."
        ) from error
    cluster = None
    try:
        if local_nodes is not None:
            cluster = Cluster(shutdown_at_exit=True)
            for _ in range(local_nodes):
                cluster.add_node(
                    num_cpus=1, object_store_memory=LOCAL_STORE_BYTES, include_dashboard=False
                )
            address = cluster.address
        address = address or os.environ.get("RAY_ADDRESS") or "auto"
        _reach(address)
        ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise EnvironmentProblem(
            f"No Ray cluster could be reached ({str(error).splitlines()[0].rstrip('.')}); start "
            "one with ray start --head, or give --local-nodes 2."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
        if cluster is not None:
            cluster.shutdown()


def _reach(address: str) -> None:
    """Raise OSError where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "://" not in address:
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()


LOCAL_STORE_BYTES = 80 << 20
"""Ray's object store of a simulated node, near the least that it takes; a fleet does not use it."""


def _start(plan: Plan) -> None:
    """Start the fleet of this plan, if it does not run already. Raises ConfigError."""
    import ray
    from ray.exceptions import RayActorError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from tlt_sglang.fleet.manager import MANAGER, manager_class

    for other in filter(None, (Plan.read(plan.store), plan)):
        with contextlib.suppress(NotRunningError):  # left by a cluster that is gone
            _expect(plan, _status(other))
            _keep(plan)
            return
    files.check(plan.store)
    with files.usable(plan.store):
        plan.folder.mkdir(mode=0o700, exist_ok=True)
        if not plan.secret_key.exists():
            make_keys(plan.secret_key.parent)
        if not plan.admin_key.exists():
            key = secrets.token_hex(32)
            files.write_private(plan.engine_config, f"admin-api-key: {key}\n".encode())
            files.write_private(plan.admin_key, f"{key}\n".encode())
    here = ray.get_runtime_context().get_node_id()
    options = manager_class().options(
        name=plan.actor(MANAGER),
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        max_concurrency=4,
        num_cpus=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=True),
    )
    manager = options.remote(plan)
    try:
        ray.get(manager.status.remote())
    except RayActorError as error:
        reason = str(error).strip().splitlines()[-1]
        raise EnvironmentProblem(f"The manager of the fleet cannot start: {reason}.") from error
    _expect(plan, _status(plan))  # another program may have been faster
    _keep(plan)


def _keep(plan: Plan) -> None:
    """Write the plan where --status and --stop find it."""
    files.replace(plan.store, plan.file, plan.to_json())


def _expect(plan: Plan, status: FleetStatus) -> None:
    """Raise ConfigError where the fleet that runs is not that of `plan`."""
    if status.plan != plan:
        raise ConfigError(
            f"The fleet of {plan.store} runs with other settings; end it with --stop."
        )


class NotRunningError(ConfigError):
    """The fleet does not run."""


class NoAnswerError(EnvironmentProblem):
    """The manager of the fleet is being started again."""


def _manager(plan: Plan) -> Actor:
    import ray

    from tlt_sglang.fleet.manager import MANAGER

    try:
        return ray.get_actor(plan.actor(MANAGER), namespace=NAMESPACE)
    except ValueError as error:
        raise NotRunningError(
            f"The fleet {plan.name} of {plan.store} does not run on this cluster; start it with "
            "tlt fleet."
        ) from error


def _status(plan: Plan, stopped: threading.Event | None = None) -> FleetStatus:
    """Return the state of a fleet, waiting for its manager while Ray starts that again.

    Raises ConfigError where it does not run, has ended, or has another store, and NoAnswerError
    once `stopped` is set, or after ANSWER_SECONDS where it is not given.
    """
    import ray
    from ray.exceptions import RayActorError

    end = time.monotonic() + (ANSWER_SECONDS if stopped is None else float("inf"))
    stopped = stopped or threading.Event()
    while True:
        manager = _manager(plan)
        try:
            status: FleetStatus = ray.get(manager.status.remote())
        except RayActorError as error:
            if stopped.wait(LOOK_SECONDS) or time.monotonic() > end:
                raise NoAnswerError(
                    f"The manager of the fleet {plan.name} does not answer; try again."
                ) from error
            continue
        if status.plan.store != plan.store:
            raise ConfigError(
                f"The fleet {plan.name} of this cluster has the store {status.plan.store}; give "
                "this one another --name."
            )
        return status


def _stop(plan: Plan) -> None:
    import ray
    from ray.exceptions import RayActorError

    _status(plan)  # it is the fleet of this store
    manager = _manager(plan)
    with contextlib.suppress(RayActorError):
        ray.get(manager.stop.remote(), timeout=STOP_SECONDS)
    ray.kill(manager, no_restart=True)
    for path in (plan.file, *plan.owners.glob("*"), *plan.targets.glob("*.json")):
        path.unlink(missing_ok=True)  # keepers that nobody reaches end themselves then
