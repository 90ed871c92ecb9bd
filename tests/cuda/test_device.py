"""The simulated device itself: graphs overwrite their outputs, and every wait has its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda.apart import apart


@apart
def test_a_graph_overwrites_its_outputs() -> None:
    """A view that is kept over a replay shows the new values; a copy does not."""
    import torch

    from tests.cuda import graphs

    graphs.install()
    x, weight = torch.ones(2, 3, device="cuda"), torch.ones(3, 4, device="cuda")
    table = torch.zeros(4, dtype=torch.int64, device="cuda")
    graph = graphs.Graph()
    with graphs.capture(graph):
        hidden = (x @ weight).relu()
        last = hidden[1:]
        table.copy_(last.squeeze(0).long().cumsum(0))
    graph.replay()
    kept, copied = last, last.clone()
    x.fill_(2)
    graph.replay()
    assert copied.cpu().tolist() == [[3.0] * 4]
    assert kept.cpu().tolist() == [[6.0] * 4]
    assert table.cpu().tolist() == [6, 12, 18, 24]
    assert graph.bytes > 0


@apart
def test_a_kernel_is_captured() -> None:
    """A replay launches again what torch does not dispatch: Triton's kernels, and ours."""
    import torch

    from tests.cuda import graphs

    graphs.install()
    double = graphs.kernel(lambda source, target: target.copy_(source * 2))
    x, y = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        double(x, y)
    x.fill_(5)
    graph.replay()
    assert y.cpu().tolist() == [10.0, 10.0]


@apart
def test_waits_are_recorded_with_their_places() -> None:
    import torch

    from tests.cuda import graphs
    from tests.cuda.device import DEVICE

    graphs.install()
    x = torch.arange(4, device="cuda")
    pinned = torch.empty(4, dtype=torch.int64, pin_memory=True)
    pinned.copy_(x, non_blocking=True)
    y = pinned.to("cuda", non_blocking=True) + 1
    assert (y.device, pinned.is_pinned(), DEVICE.waits) == (x.device, True, [])

    waiting = {
        "item": lambda: x[0].item(),
        "item, by a boolean": lambda: bool(x[0] > 1),
        "tolist": lambda: x.tolist(),
        "copy to the host": lambda: x.cpu(),
        "pageable copy to the device": lambda: torch.tensor([1], device="cuda"),
        "pageable copy to the device, of a tensor": lambda: torch.ones(2).to("cuda"),
        "pageable copy to the host": lambda: torch.empty(4).copy_(x, non_blocking=True),
        "index by a mask": lambda: x[x > 1],
        "nonzero": lambda: x.nonzero(),
        "repeat_interleave without output_size": lambda: torch.repeat_interleave(x),
        "synchronize the device": lambda: torch.cuda.synchronize(),
    }
    for what, call in waiting.items():
        DEVICE.waits.clear()
        call()  # type: ignore[no-untyped-call]
        (wait,) = DEVICE.waits
        assert wait.what == what.partition(",")[0]
        assert wait.file == "tests/cuda/test_device.py"
        assert f'"{what}": lambda' in Path(__file__).read_text().splitlines()[wait.line - 1]


@apart
def test_what_cuda_refuses() -> None:
    import torch

    from tests.cuda import graphs

    graphs.install()
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="on the same device"):
        x + torch.ones(3)
    with pytest.raises(TypeError, match="to numpy"):
        x.numpy()
    with (
        pytest.raises(RuntimeError, match="when stream is capturing"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        x.sum().item()
