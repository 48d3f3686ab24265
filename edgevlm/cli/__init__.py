"""The command line: `edgevlm VERB …`, one verb a module, loaded when it is called.

Answers go to stdout, everything else to stderr. Errors become one line and an exit code:
0 ok · 1 internal · 2 usage · 3 some of a batch failed · 4 unreadable image · 5 model missing,
offline or failing its checksum · 6 memory plan · 7 time budget · 130 interrupted.
"""

from __future__ import annotations

import sys
from importlib import import_module

import click

from edgevlm import __version__

_VERBS = (
    "describe",
    "ask",
    "chat",
    "detect",
    "point",
    "export",
    "info",
    "models",
    "cache",
    "verify",
    "doctor",
    "bench",
)


class _Verbs(click.Group):
    """Finds a verb's module by its name, so that `--help` imports next to nothing."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _VERBS:
            return None
        command: click.Command = import_module(f"edgevlm.cli.{name}").command
        return command


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="edgevlm %(version)s")
def cli() -> None:
    """Look at a picture with a model that runs on your own machine."""


def main() -> None:
    """Entry point of the `edgevlm` command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line; the exit code."""
    from edgevlm.errors import EdgeVLMError

    try:
        return cli.main(arguments, prog_name="edgevlm", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except EdgeVLMError as error:
        click.echo(f"edgevlm: {error}", err=True)
        return error.exit_code
    except SystemExit:  # click's way when the reader of stdout has gone: `edgevlm … | head -1`
        return 0
