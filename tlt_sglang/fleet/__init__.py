"""Engines, trainers and a coordinator on a Ray cluster: `tlt fleet`.

    tlt fleet -> Manager (actor) -> Keeper (actor) of each member -> the member's own process

A member is what a user could start by hand on one machine: `launch_server`, `tlt sidecar`,
`tlt export`, `tlt coordinator`. `plan` says which members there are and with which command, purely;
a `keeper` runs one of them where Ray has placed it; the `manager` keeps all keepers there. Ray
starts a keeper again where it dies, so nothing here is lost with the program that has started it.
"""
