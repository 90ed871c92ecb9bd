"""Stand-ins for what `torch.cuda` has: streams, events, graphs and memory figures.

A graph records the operations of its capture and runs them again at a replay, into the very tensors
that the capture returned. Streams have no time of their own: all work is done when it is called.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch._dynamo  # while torch.cuda is as it expects
from torch.utils._python_dispatch import _disable_current_modes

from tests.cuda.calls import Calls
from tests.cuda.device import DEVICE, Arguments, Function, Keywords, tensors
from tests.cuda.operations import ATEN, Operations

TOTAL = 16 << 30
CAPABILITY = (8, 0)
MADE_EMPTY = {
    ATEN.empty.memory_format,
    ATEN.empty_strided.default,
    ATEN.empty_like.default,
    ATEN.new_empty.default,
    ATEN.new_empty_strided.default,
}
_numbers = itertools.count(1)


class Stream:
    """A stream, which has always done all of its work."""

    def __init__(self, device: object = None, priority: int = 0, **kwargs: object) -> None:
        self.device, self.priority = torch.device("cuda", 0), priority
        self.cuda_stream = self.stream_id = next(_numbers)

    def synchronize(self) -> None:
        DEVICE.wait("synchronize a stream")

    def query(self) -> bool:
        return True

    def wait_stream(self, stream: Stream) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def __enter__(self) -> Stream:
        _state.before.append(_state.stream)
        _state.stream = self
        return self

    def __exit__(self, *error: object) -> None:
        _state.stream = _state.before.pop()


class Event:
    """An event: the moment when it was recorded."""

    def __init__(self, enable_timing: bool = False, **kwargs: object) -> None:
        self.enable_timing = enable_timing
        self.at = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.at = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Waits for work that was under way before: overlap scheduling lives by it."""

    def elapsed_time(self, end: Event) -> float:
        return max(1e-3, 1e3 * (end.at - self.at))


DEFAULT = Stream()


class _State(threading.local):
    """The current stream of a thread, and those around it."""

    def __init__(self) -> None:
        self.stream = DEFAULT
        self.before: list[Stream] = []


_state, _pools = _State(), itertools.count(1)


class Graph:
    """A graph: its operations in the order of their capture, and where their results lie."""

    captures: ClassVar[int] = 0
    """Captures of this process."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.operations: list[Callable[[], object]] = []
        self.bytes = self.replays = 0

    def record(self, func: Function, args: Arguments, kwargs: Keywords, out: object) -> None:
        """Record an operation of the capture. A view needs none: what it shows is written."""
        inputs = {id(one.untyped_storage()) for one in tensors([args, list(kwargs.values())])}
        made = [one for one in tensors(out) if id(one.untyped_storage()) not in inputs]
        self.bytes += sum(one.untyped_storage().nbytes() for one in made)
        written = func._schema.is_mutable  # type: ignore[attr-defined]
        if func in MADE_EMPTY or not (made or written):
            return
        if not made:
            self.operations.append(functools.partial(func, *args, **kwargs))
            return
        with torch._C.DisableTorchFunction():
            static = [one.detach() for one in tensors(out)]  # what `squeeze_` would turn
        self.operations.append(lambda: _write(static, func(*args, **kwargs)))

    def launch(self, kernel: Callable[[], object]) -> None:
        """Record a kernel that torch does not dispatch."""
        self.operations.append(kernel)

    def replay(self) -> None:
        assert not DEVICE.busy and DEVICE.capturing is None
        self.replays += 1
        with busy():
            for operation in self.operations:
                operation()

    def capture_begin(self, pool: object = None, **kwargs: object) -> None:
        assert DEVICE.capturing is None
        DEVICE.capturing = self
        Graph.captures += 1

    def capture_end(self) -> None:
        DEVICE.capturing = None

    def reset(self) -> None:
        self.operations.clear()

    def pool(self) -> object:
        return None


def _write(static: object, new: object) -> None:
    """Write the results of a replay to where those of the capture lie."""
    for target, source in zip(tensors(static), tensors(new), strict=True):
        target.copy_(source)


@contextlib.contextmanager
def capture(
    cuda_graph: Graph, pool: object = None, stream: Stream | None = None, **kwargs: object
) -> Iterator[None]:
    """Record what is called inside; stands for `torch.cuda.graph`."""
    cuda_graph.capture_begin()
    try:
        yield
    finally:
        cuda_graph.capture_end()


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Let a kernel run: nothing sees its own calls of torch."""
    before, DEVICE.busy = DEVICE.busy, True
    try:
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            yield
    finally:
        DEVICE.busy = before


def kernel(run: Function) -> Function:
    """Return `run` as a kernel of the device: it may be captured, and may wait for nothing."""

    @functools.wraps(run)
    def launch(*args: Any, **kwargs: Any) -> Any:
        if DEVICE.busy:
            return run(*args, **kwargs)
        with busy():
            result = run(*args, **kwargs)
        operands = [*tensors(args), *tensors(list(kwargs.values()))]
        storages = {id(one.untyped_storage()) for one in operands}
        for made in tensors(result):
            made.untyped_storage().on_device = True  # type: ignore[attr-defined]
        if isinstance(DEVICE.capturing, Graph):
            fresh = any(id(one.untyped_storage()) not in storages for one in tensors(result))
            again = functools.partial(run, *args, **kwargs)
            DEVICE.capturing.launch((lambda: _write(result, again())) if fresh else again)
        return result

    return launch


def _stream(stream: Stream | None) -> contextlib.AbstractContextManager[object]:
    return stream or contextlib.nullcontext()


class _Context(contextlib.AbstractContextManager[None]):
    """Stands for `torch.cuda.device` and for pools of memory."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.id = (0, next(_numbers))

    def __exit__(self, *error: object) -> None: ...


def _properties(device: object = None) -> SimpleNamespace:
    major, minor = CAPABILITY
    return SimpleNamespace(
        name="simulated",
        major=major,
        minor=minor,
        total_memory=TOTAL,
        multi_processor_count=8,
        warp_size=32,
        max_threads_per_multi_processor=2048,
        shared_memory_per_block_optin=166912,
        shared_memory_per_multiprocessor=167936,
        regs_per_multiprocessor=65536,
        L2_cache_size=40 << 20,
        uuid="simulated",
        is_integrated=False,
        is_multi_gpu_board=False,
    )


def _nothing(*args: object, **kwargs: object) -> None: ...


def _with_gloo(function: Function) -> Function:
    """Let groups of processes talk through gloo, where NCCL needs a GPU."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if "nccl" in str(kwargs.get("backend")):
            kwargs["backend"] = "gloo"
        return function(*args, **(kwargs | {"device_id": None}))

    return call


def _enter() -> None:
    """Simulate the device in this thread from now on."""
    Operations().__enter__()  # type: ignore[no-untyped-call]
    Calls().__enter__()  # type: ignore[no-untyped-call]


def _simulated(run: Function) -> Function:
    """Return the body of a thread as one that simulates the device, too."""

    def simulate(thread: threading.Thread) -> None:
        _enter()
        run(thread)

    return simulate


def install() -> None:
    """Put the stand-ins into `torch.cuda`, and start the simulation in this thread."""
    counted = {"reserved_bytes.all.current": 0, "reserved_bytes.all.peak": 0}
    stand_ins: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: "simulated",
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_properties": _properties,
        "get_arch_list": lambda: ["sm_80"],
        "mem_get_info": lambda device=None: (TOTAL // 2, TOTAL),
        "memory_stats": lambda device=None: counted,
        "memory_snapshot": lambda *args, **kwargs: [],
        "synchronize": lambda device=None: DEVICE.wait("synchronize the device"),
        "Stream": Stream,
        "Event": Event,
        "ExternalStream": Stream,
        "CUDAGraph": Graph,
        "graph": capture,
        "graph_pool_handle": lambda: (0, next(_pools)),
        "is_current_stream_capturing": lambda: DEVICE.capturing is not None,
        "stream": _stream,
        "current_stream": lambda device=None: _state.stream,
        "default_stream": lambda device=None: _state.stream,
        "set_stream": lambda stream: setattr(_state, "stream", stream),
        "device": _Context,
        "MemPool": _Context,
        "use_mem_pool": _Context,
        "can_device_access_peer": lambda *args: False,
        "is_bf16_supported": lambda *args: True,
        "current_blas_handle": lambda: 0,
    }
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
        stand_ins[name] = lambda device=None: 0
    for name in (
        "set_device",
        "init",
        "_lazy_init",
        "empty_cache",
        "ipc_collect",
        "manual_seed",
        "manual_seed_all",
        "reset_peak_memory_stats",
    ):
        stand_ins[name] = _nothing
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    torch.Tensor.record_stream = _nothing  # type: ignore[method-assign]
    for name in ("init_process_group", "new_group"):
        setattr(torch.distributed, name, _with_gloo(getattr(torch.distributed, name)))
    threading.Thread.run = _simulated(threading.Thread.run)  # type: ignore[method-assign]
    _enter()
