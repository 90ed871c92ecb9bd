"""`tlt`: one table of commands, from which dispatch and help come."""

from __future__ import annotations

import pytest

from tlt_sglang import __version__, cli


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_every_command_is_there(command: cli.Command) -> None:
    assert callable(command.load())


@pytest.mark.parametrize(
    "command", [c for c in cli.COMMANDS if c.name != "serve"], ids=lambda command: command.name
)
def test_every_command_explains_itself(
    command: cli.Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command.name, "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: tlt {command.name} ") and err == ""


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_the_commands(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([flag]) == 0
    out = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"  {command.name} " in out and command.help in out


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"tlt-sglang {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "problem"), [([], "a command is missing"), (["srve"], "unknown command 'srve'")]
)
def test_no_such_command(argv: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    assert capsys.readouterr().err.startswith(f"tlt: {problem}; choose from serve, check, ")


def test_a_wrong_flag_of_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--device", "abacus"]) == 2
    assert capsys.readouterr().err.startswith("tlt check: Bad flags: argument --device: invalid")
