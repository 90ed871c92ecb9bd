"""The coordinator's decisions, as a pure function: an event in, instructions out.

No clock and no I/O: time comes with the event, from the server's monotonic clock. What takes time
(silence, dwell, deadlines) is looked at only when time alone passes, after everything that was
heard, so that a server which was held up blames nobody for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tlt_sglang.coordinator import messages as say
from tlt_sglang.coordinator.world import Device, Marks, Member, Phase, Rules, World

MOST = 4096
"""Members, and devices: no more are taken in."""
KEPT = 256
"""Stops of which the time is kept."""
LEAVING = (Phase.STOPPING, Phase.RELEASING, Phase.KILLED)
"""A deadline is set."""


@dataclass(frozen=True, slots=True)
class Event:
    """A peer says something; or, without words, time passes."""

    at: float
    peer: str = ""
    said: say.Said | None = None


@dataclass(frozen=True, slots=True)
class Sent:
    """What is told to a peer."""

    peer: str
    told: say.Told


def step(world: World, event: Event, rules: Rules) -> tuple[World, list[Sent]]:
    """The world after `event`, and what to tell whom."""
    draft = _Draft(world, max(event.at, world.at), rules)
    if event.said is None:
        draft.pass_time()
    else:
        draft.hear(event.peer, event.said)
    return draft.settled(), draft.sent


def due(world: World, rules: Rules) -> float | None:
    """When time alone changes something; None: it does not."""
    times = [member.seen + rules.timeout for member in world.members.values()]
    for device in world.devices.values():
        if device.phase in LEAVING:
            times.append(device.deadline)
        elif device.phase is Phase.OFF and device.trainer and device.calm_since is not None:
            times.append(device.calm_since + rules.dwell)
    return min(times, default=None)


class _Draft:
    """A copy of a world that one event changes."""

    def __init__(self, world: World, at: float, rules: Rules) -> None:
        self.world, self.at, self.rules = world, at, rules
        self.members, self.devices = dict(world.members), dict(world.devices)
        self.everywhere, self.orders = world.everywhere, world.orders
        self.late, self.stops = world.late, world.stops
        self.touched: dict[str, None] = {}
        self.sent: list[Sent] = []

    def tell(self, peer: str, told: say.Told) -> None:
        self.sent.append(Sent(peer, told))

    def change(self, name: str, **changes: object) -> None:
        """Of a device, which comes into being when it is first spoken of."""
        self.devices[name] = replace(
            self.devices.get(name, Device(self.everywhere)),
            **changes,  # type: ignore[arg-type]
        )
        self.touched[name] = None

    def hear(self, peer: str, said: say.Said) -> None:
        if isinstance(said, say.Hello):
            return self.join(peer, said)
        member = self.members.get(peer)
        if isinstance(said, say.Bye):
            return self.forget(peer)
        if member is None:
            return self.tell(peer, say.Unknown())
        self.members[peer] = replace(member, seen=self.at)
        self.tell(peer, say.Pong())
        if isinstance(said, say.Signal) and member.role != "trainer":
            self.mark(peer, member, said)
        elif isinstance(said, say.Load) and member.role == "engine" and member.device:
            self.load(member.device, said)
        elif isinstance(said, say.Training) and member.role == "trainer" and member.device:
            self.training(member.device, said)

    def join(self, peer: str, hello: say.Hello) -> None:
        known = self.members.get(peer)
        if known and (known.name, known.role, known.device) != _who(hello):
            self.forget(peer)
            known = None
        reason = None if known else self.refusal(hello)
        if reason:
            return self.tell(peer, say.Refused(reason))
        self.members[peer] = Member(*_who(hello), self.at)
        self.tell(peer, say.Welcome(self.world.session, self.rules.timeout))
        if hello.device is None:
            return
        if not known and hello.role == "engine":
            self.change(hello.device, engine=peer)
        elif not known:
            self.change(hello.device, trainer=peer, holds=True)
        if hello.role == "trainer" and hello.active:
            self.training(hello.device, say.Training(0, True))

    def refusal(self, hello: say.Hello) -> str | None:
        if (hello.role == "stack") != (hello.device is None):
            return "An engine and a trainer name their device, and a stack none."
        if any(member.name == hello.name for member in self.members.values()):
            wait = f"or wait {self.rules.timeout:g} s if who bore it has ended"
            return f"The name {hello.name} is taken: choose another, {wait}."
        if any(
            (one.role, one.device) == (hello.role, hello.device)
            for one in self.members.values()
            if one.device
        ):
            return f"The device {hello.device} has one {hello.role} already: name another device."
        if len(self.members) >= MOST or (hello.device and not self.room(hello.device)):
            return f"There are {MOST} members or devices already: start another coordinator."
        return None

    def room(self, device: str) -> bool:
        return device in self.devices or len(self.devices) < MOST

    def forget(self, peer: str) -> None:
        member = self.members.pop(peer, None)
        for name, device in list(self.devices.items()):
            if device.asker == peer:
                self.change(name, asker=None)
        if member is None or member.device is None:
            return
        old = self.devices[member.device]
        if member.role == "engine":
            # What was said of the device, and its trainer, stay.
            self.devices[member.device] = Device(
                old.marks,
                old.asker,
                trainer=old.trainer,
                phase=old.phase,
                order=old.order,
                release=old.release,
                holds=old.holds,
                ordered=old.ordered,
                deadline=old.deadline,
            )
            self.touched[member.device] = None
        else:
            self.change(member.device, trainer=None, phase=Phase.OFF, order=0, holds=False)

    def mark(self, peer: str, member: Member, said: say.Signal) -> None:
        name = member.device or said.device
        device = said.what.startswith("device")
        yes = said.what in ("rollout_begins", "device_wanted")

        def marked(marks: Marks) -> Marks:
            return replace(marks, away=yes) if device else replace(marks, expected=yes)

        if name is None:
            self.everywhere = marked(self.everywhere)
        elif not self.room(name):
            return
        for one in list(self.devices) if name is None else [name]:
            self.change(one)
            marks = marked(self.devices[one].marks)
            asker = (peer if yes else None) if device else self.devices[one].asker
            self.change(one, marks=marks, asker=asker)

    def load(self, name: str, said: say.Load) -> None:
        self.change(
            name,
            reported=True,
            running=said.running,
            queued=said.queued,
            tokens_per_s=said.tokens_per_s,
        )
        marks = self.devices[name].marks
        if marks.expected and (said.running or said.queued):
            self.change(name, marks=replace(marks, expected=False))

    def training(self, name: str, said: say.Training) -> None:
        device = self.devices[name]
        if said.active and device.phase is Phase.OFF:
            # By leave of a coordinator that is no more.
            self.change(name, phase=Phase.ON, holds=True, calm_since=None)
        elif device.phase is Phase.OFF:
            return
        elif said.order != device.order:
            self.repeat(name)
        elif not said.active:
            if device.phase in (Phase.STOPPING, Phase.KILLED):
                self.stops = (*self.stops, self.at - device.ordered)[-KEPT:]
            holds = device.phase is Phase.ON or not device.release
            self.change(name, phase=Phase.OFF, holds=holds, calm_since=None)

    def pass_time(self) -> None:
        for peer, member in list(self.members.items()):
            if self.at >= member.seen + self.rules.timeout:
                self.forget(peer)
        for name in list(self.devices):
            device = self.quieted(name)
            if device.phase in LEAVING:
                if self.at >= device.deadline:
                    self.kill(name)
            elif (
                device.phase is Phase.OFF
                and device.trainer
                and device.calm_since is not None
                and self.at >= device.calm_since + self.rules.dwell
            ):
                self.order(name, phase=Phase.ON, holds=True, release=False)

    def settled(self) -> World:
        for name in list(self.touched):
            device = self.quieted(name)
            away = device.marks.away
            if device.phase is Phase.ON and device.calm_since is None:
                self.stop(name, Phase.STOPPING)
            elif away and device.holds and device.phase is Phase.OFF:
                self.stop(name, Phase.RELEASING)
            elif away and device.phase is Phase.STOPPING and not device.release:
                # A second order in the place of the first, whose deadline stays.
                self.order(name, release=True)
            elif away and device.asker and not device.holds:
                self.tell(device.asker, say.Freed(name))
                self.change(name, asker=None)
            if not device.engine and not device.trainer and device.marks == self.everywhere:
                del self.devices[name]
        return World(
            self.world.session,
            self.at,
            self.members,
            self.devices,
            self.everywhere,
            self.orders,
            self.late,
            self.stops,
        )

    def quieted(self, name: str) -> Device:
        device = self.devices[name]
        quiet = device.quiet(self.rules)
        if quiet != (device.calm_since is not None):
            self.change(name, calm_since=self.at if quiet else None)
        return self.devices[name]

    def stop(self, name: str, phase: Phase) -> None:
        self.order(
            name,
            phase=phase,
            release=self.devices[name].marks.away,
            ordered=self.at,
            deadline=self.at + self.rules.preempt,
        )

    def kill(self, name: str) -> None:
        self.late += self.devices[name].phase is not Phase.KILLED
        self.change(name, phase=Phase.KILLED, deadline=self.at + self.rules.preempt)
        self.repeat(name)

    def order(self, name: str, **changes: object) -> None:
        self.orders += 1
        self.change(name, order=self.orders, **changes)
        self.repeat(name)

    def repeat(self, name: str) -> None:
        """Tell the order that is in force."""
        device = self.devices[name]
        if device.trainer is None:
            return
        if device.phase is Phase.ON:
            return self.tell(device.trainer, say.Start(device.order))
        if device.phase in (Phase.STOPPING, Phase.RELEASING):
            left = max(0, round(1000 * (device.deadline - self.at)))
            return self.tell(device.trainer, say.Stop(device.order, left, device.release))
        killed = say.Kill(device.order, self.members[device.trainer].name, name)
        stacks = [peer for peer, one in self.members.items() if one.role == "stack"]
        for peer in (device.trainer, *stacks):
            self.tell(peer, killed)


def _who(hello: say.Hello) -> tuple[str, say.Role, str | None]:
    return hello.name, hello.role, hello.device
