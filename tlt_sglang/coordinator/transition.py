"""The transition that one event causes: members, signals and reports, and the commands that follow.

A part of `states.step`; it reads no clock and sends nothing itself.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace

from tlt_sglang.coordinator import messages
from tlt_sglang.coordinator.world import (
    WITH_DEADLINE,
    Device,
    Marks,
    Member,
    Phase,
    Rules,
    World,
)

MAX_MEMBERS = 32768
"""The largest number of members, and of devices."""
MEMBER, DEVICE = "member", "device"


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message to be sent to a peer."""

    peer: str
    message: messages.CoordinatorMessage


class Transition:
    """The change of a world that one event causes."""

    def __init__(self, world: World, at: float, rules: Rules) -> None:
        world.at = self.at = max(at, world.at)
        self.world, self.rules = world, rules
        self.members, self.devices = world.members, world.devices
        self.touched: dict[str, None] = {}
        self.outgoing: list[Outgoing] = []

    def send(self, peer: str, message: messages.CoordinatorMessage) -> None:
        self.outgoing.append(Outgoing(peer, message))

    def change(self, name: str, **changes: object) -> None:
        """Change a device, which is created when it is first mentioned."""
        device = self.devices.get(name)
        if device is None:
            device = self.devices[name] = Device(self.world.default_marks)
        for field, value in changes.items():
            setattr(device, field, value)
        self.touched[name] = None

    def receive(self, peer: str, message: messages.MemberMessage) -> None:
        """Apply the message of a peer."""
        # Joining and leaving need no membership.
        if isinstance(message, messages.Hello):
            return self.join(peer, message)
        member = self.members.get(peer)
        if isinstance(message, messages.Bye):
            return self.remove(peer)
        if member is None:
            return self.send(peer, messages.Unknown())

        # Every other message of a member is a sign of life.
        member.last_contact = self.at
        self.send(peer, messages.Pong())

        # A message that does not belong to the member's role has no effect.
        if isinstance(message, messages.Signal) and member.role != "trainer":
            self.mark(peer, member, message)
        elif isinstance(message, messages.Load) and member.role == "engine" and member.device:
            self.load(member.device, message)
        elif isinstance(message, messages.Training) and member.role == "trainer" and member.device:
            self.training(member.device, message)

    def join(self, peer: str, hello: messages.Hello) -> None:
        """Add or renew a member, or refuse it with a reason."""
        # A peer that changes its identity leaves first.
        old = self.members.get(peer)
        if old and (old.name, old.role, old.device) != _identity(hello):
            self.remove(peer)
            old = None
        reason = None if old else self.refusal(hello)
        if reason:
            return self.send(peer, messages.Refused(reason))
        if old:
            old.last_contact = self.at
        else:
            self.admit(peer, Member(*_identity(hello), self.at, self.at + self.rules.timeout))
        self.send(peer, messages.Welcome(self.world.session, self.rules.timeout))

        # A new engine or trainer takes its place on the device.
        if hello.device is None:
            return
        if not old and hello.role == "engine":
            self.change(hello.device, engine=peer)
        elif not old:
            self.change(hello.device, trainer=peer, holds_memory=True)
        if hello.role == "trainer" and hello.active:
            self.training(hello.device, messages.Training(0, True))

    def admit(self, peer: str, member: Member) -> None:
        """Enter a new member everywhere."""
        self.members[peer] = member
        self.world.names[member.name] = peer
        if member.role == "stack":
            self.world.stacks[peer] = None
        heapq.heappush(self.world.timeouts, (member.check_at, MEMBER, peer))

    def refusal(self, hello: messages.Hello) -> str | None:
        """Return why a new member cannot join, or None if it can."""
        if (hello.role == "stack") != (hello.device is None):
            return "An engine and a trainer must name their device, and a stack must not."
        if hello.name in self.world.names:
            wait = f"or wait {self.rules.timeout:g} s if its owner has ended"
            return f"The name {hello.name} is taken: choose another, {wait}."
        device = self.devices.get(hello.device) if hello.device else None
        if device and (device.engine if hello.role == "engine" else device.trainer):
            return f"The device {hello.device} has one {hello.role} already: name another device."
        if len(self.members) >= MAX_MEMBERS or (hello.device and not self.room(hello.device)):
            return f"There are {MAX_MEMBERS} members or devices already: start another coordinator."
        return None

    def room(self, device: str) -> bool:
        """Return whether `device` exists or may be added."""
        return device in self.devices or len(self.devices) < MAX_MEMBERS

    def remove(self, peer: str) -> None:
        """Remove a member and take it off its device."""
        member = self.members.pop(peer, None)
        if member is None:
            return
        del self.world.names[member.name]
        # Only a stack claims devices that are not its own.
        for name in self.devices if member.role == "stack" else (member.device,):
            if name is not None and self.devices[name].claimant == peer:
                self.change(name, claimant=None)
        if member.device is None:
            del self.world.stacks[peer]
            return
        old = self.devices[member.device]
        if member.role == "engine":
            # The signals for the device and its trainer stay; everything of the engine goes.
            self.devices[member.device] = Device(
                old.marks,
                old.claimant,
                trainer=old.trainer,
                phase=old.phase,
                seq=old.seq,
                release=old.release,
                holds_memory=old.holds_memory,
                stop_sent_at=old.stop_sent_at,
                deadline=old.deadline,
            )
            self.touched[member.device] = None
        else:
            self.change(member.device, trainer=None, phase=Phase.OFF, seq=0, holds_memory=False)

    def mark(self, peer: str, member: Member, signal: messages.Signal) -> None:
        """Apply a signal to one device, or to all present and future ones."""
        name = member.device or signal.device
        is_claim = signal.kind in ("claim_device", "release_device")
        begins = signal.kind in ("rollout_begins", "claim_device")

        def updated(marks: Marks) -> Marks:
            if is_claim:
                return replace(marks, claimed=begins)
            return replace(marks, rollout_pending=begins)

        if name is None:
            self.world.default_marks = updated(self.world.default_marks)
        elif not self.room(name):
            return
        for one in list(self.devices) if name is None else [name]:
            self.change(one)
            marks = updated(self.devices[one].marks)
            claimant = (peer if begins else None) if is_claim else self.devices[one].claimant
            self.change(one, marks=marks, claimant=claimant)

    def load(self, name: str, load: messages.Load) -> None:
        """Take in an engine's load."""
        device = self.devices[name]
        last = (device.running, device.queued, device.tokens_per_s)
        same = device.reported and last == (load.running, load.queued, load.tokens_per_s)
        if same and not device.marks.rollout_pending:
            return
        self.change(
            name,
            reported=True,
            running=load.running,
            queued=load.queued,
            tokens_per_s=load.tokens_per_s,
        )
        if device.marks.rollout_pending and (load.running or load.queued):
            self.change(name, marks=replace(device.marks, rollout_pending=False))

    def training(self, name: str, report: messages.Training) -> None:
        """Take in a trainer's report; repeat its command if the report refers to an older one."""
        device = self.devices[name]
        if report.active and device.phase is Phase.OFF:
            # An earlier coordinator started it.
            self.change(name, phase=Phase.ON, holds_memory=True, calm_since=None)
        elif device.phase is Phase.OFF:
            return
        elif report.seq != device.seq:
            self.repeat(name)
        elif not report.active:
            if device.phase in (Phase.STOPPING, Phase.KILLED):
                self.world.stop_times.append(self.at - device.stop_sent_at)
            holds = device.phase is Phase.ON or not device.release
            self.change(name, phase=Phase.OFF, holds_memory=holds, calm_since=None)

    def pass_time(self) -> None:
        """Remove silent members, kill late trainers, and start trainers on quiet devices."""
        timeouts, devices = self.world.timeouts, []
        while timeouts and timeouts[0][0] <= self.at:
            time, kind, key = heapq.heappop(timeouts)
            if kind == MEMBER:
                self.check_silence(key, time)
            elif key in self.devices and self.devices[key].check_at == time:
                devices.append(key)
        # A silent member gets no command.
        for name in devices:
            if name in self.devices:
                self.check_device(name)

    def check_silence(self, peer: str, time: float) -> None:
        """Remove a member that was silent for too long, or look again when it might have been."""
        member = self.members.get(peer)
        if member is None or member.check_at != time:
            return
        end = member.last_contact + self.rules.timeout
        if self.at >= end:
            return self.remove(peer)
        member.check_at = end
        heapq.heappush(self.world.timeouts, (end, MEMBER, peer))

    def check_device(self, name: str) -> None:
        """Kill the trainer that is due to be killed, or start the one that is due to be started."""
        self.change(name, check_at=None)
        device = self.devices[name]
        due = device.due(self.rules)
        if due is None or self.at < due:
            return
        if device.phase in WITH_DEADLINE:
            self.kill(name)
        else:
            self.command(name, phase=Phase.ON, holds_memory=True, release=False)

    def finish(self) -> None:
        """Send the commands that follow from the changes, and set the timeouts of the devices."""
        for name in list(self.touched):
            device = self.update_calm(name)
            claimed = device.marks.claimed
            if device.phase is Phase.ON and device.calm_since is None:
                self.stop(name, Phase.STOPPING)
            elif claimed and device.holds_memory and device.phase is Phase.OFF:
                self.stop(name, Phase.RELEASING)
            elif claimed and device.phase is Phase.STOPPING and not device.release:
                # A second command replaces the first, whose deadline stays.
                self.command(name, release=True)
            elif claimed and device.claimant and not device.holds_memory:
                self.send(device.claimant, messages.Freed(name))
                self.change(name, claimant=None)
            unused = not device.engine and not device.trainer
            if unused and device.marks == self.world.default_marks:
                del self.devices[name]
            else:
                self.set_timeout(name)

    def set_timeout(self, name: str) -> None:
        """Have a device looked at when it is due, unless it is looked at before."""
        device = self.devices[name]
        due = device.due(self.rules)
        if due is not None and (device.check_at is None or due < device.check_at):
            device.check_at = due
            heapq.heappush(self.world.timeouts, (due, DEVICE, name))

    def update_calm(self, name: str) -> Device:
        """Set since when a device is quiet, and return the device."""
        device = self.devices[name]
        quiet = device.quiet(self.rules)
        if quiet != (device.calm_since is not None):
            self.change(name, calm_since=self.at if quiet else None)
        return self.devices[name]

    def stop(self, name: str, phase: Phase) -> None:
        """Command the trainer to stop, or to free its memory, before a deadline."""
        self.command(
            name,
            phase=phase,
            release=self.devices[name].marks.claimed,
            stop_sent_at=self.at,
            deadline=self.at + self.rules.preempt,
        )

    def kill(self, name: str) -> None:
        """Report a trainer that exceeded its deadline, and do so again after another one."""
        self.world.late += self.devices[name].phase is not Phase.KILLED
        self.change(name, phase=Phase.KILLED, deadline=self.at + self.rules.preempt)
        self.repeat(name)

    def command(self, name: str, **changes: object) -> None:
        """Change a device and send its trainer the command that follows, with a new number."""
        self.world.last_seq += 1
        self.change(name, seq=self.world.last_seq, **changes)
        self.repeat(name)

    def repeat(self, name: str) -> None:
        """Send the command that is in force."""
        device = self.devices[name]
        if device.trainer is None:
            return
        if device.phase is Phase.ON:
            return self.send(device.trainer, messages.Start(device.seq))
        if device.phase in (Phase.STOPPING, Phase.RELEASING):
            within_ms = max(0, round(1000 * (device.deadline - self.at)))
            return self.send(device.trainer, messages.Stop(device.seq, within_ms, device.release))
        kill = messages.Kill(device.seq, self.members[device.trainer].name, name)
        for peer in (device.trainer, *self.world.stacks):
            self.send(peer, kill)


def _identity(hello: messages.Hello) -> tuple[str, messages.Role, str | None]:
    return hello.name, hello.role, hello.device
