"""The command `sttm-kernels`: one room for every command, each with HELP, `add_arguments` and `run`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from sttm_kernels import __version__
from sttm_kernels.cli import bench, demo, evidence, flops, info, report, tune, verify
from sttm_kernels.console import InputError

COMMANDS = {
    "bench": bench,
    "demo": demo,
    "evidence": evidence,
    "flops": flops,
    "info": info,
    "report": report,
    "tune": tune,
    "verify": verify,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; `argv` without the program's name, default `sys.argv[1:]`.

    Returns:
        The exit code: 0, 2 for input that cannot be used (one message on stderr says what is wrong with it), 1 when
        whoever reads the output has gone, 130 when interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(prog="sttm-kernels", description="Token merging for video Transformers.")
    parser.add_argument("--version", action="version", version=f"sttm-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, room in COMMANDS.items():
        room.add_arguments(commands.add_parser(name, help=room.HELP, description=room.HELP))
    try:
        arguments = parser.parse_args(argv)
        code = COMMANDS[arguments.command].run(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except InputError as error:
        print(f"sttm-kernels: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
