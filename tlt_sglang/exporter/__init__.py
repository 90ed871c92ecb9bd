"""Harvest logs for trainers on other machines.

    engine -> harvest log -> exporter (`tlt export`) ~ network ~ RemoteReader -> feed of a sidecar

Engines and trainers share a store; each machine with engines runs one exporter. `service` is the
exporter and `remote` the reading end. Nobody waits for the other: what a trainer does not fetch in
time is overwritten in the log and counted.
"""
