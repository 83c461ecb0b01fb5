"""The command `lso`: prints help without heavy imports and hands each command to the code that does it."""

from __future__ import annotations

import errno
import importlib
import os
import re
import sys
from typing import NoReturn

from lso_lightning import __version__
from lso_lightning.command_line import near, resolve_class_files
from lso_lightning.errors import UserError
from lso_lightning.launched_rank import rank_label

# handled by Lightning, through cli.py
LIGHTNING = {
    "fit": "search in a latent space, or train a model, as a config says",
    "validate": "measure on the validation data",
    "test": "measure on the test data",
    "predict": "write a model's outputs",
}
# every other command is one typed function: name -> (module, function, help); its docstring documents its arguments
COMMANDS = {
    "render": ("lso_lightning.commands.render", "render", "turn a run directory into pictures and a report"),
    "edit": ("lso_lightning.commands.edit", "edit", "optimise your own photographs for a score"),
    "generate": ("lso_lightning.commands.generate", "generate", "make pictures from a text"),
    "pack": ("datamodules.pack", "pack", "turn images into shards at the training resolution"),
    "import-scorer": ("lso_lightning.commands.import_scorer", "import_scorer", "turn published weights into a scorer"),
    "score-images": ("datamodules.score_images", "score_images", "score images by an objective, for pack and searches"),
}
# commands whose last word is required and whose first may be missing, which argparse cannot tell apart:
# name -> (option that the first of two words stands for, usage)
TWO_WORDS = {
    "pack": ("source", "lso pack SOURCE OUT [options]\n       lso pack --synthetic COUNT OUT [options]"),
}
_FULL = {errno.ENOSPC, errno.EDQUOT}
# failures of the machine that a person can mend
_MENDABLE = _FULL | {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT}
INTERRUPTED = 130  # what shells report for Ctrl-C


def help_text() -> str:
    """Write the top-level help: one line a command."""
    lines = ["usage: lso COMMAND [options]", "", "Latent space optimisation of images.", "", "commands:"]
    helps = {**LIGHTNING, **{name: entry[2] for name, entry in COMMANDS.items()}}
    lines += [f"  {name:<13} {text}" for name, text in helps.items()]
    lines += ["", "  lso COMMAND --help   options of one command", "  lso --version        version", ""]
    lines += ["A config is found by its path or by its shipped name: lso fit --config NAME"]
    lines += ["A class of yours is named by its file:            lso fit --model my_model.py:MyModel"]
    return "\n".join(lines)


def run_function(command: str, args: list[str]) -> None:
    """Run one command of the table, parsed from its signature.

    Args:
        command: name in `COMMANDS`.
        args: what follows the name.
    """
    # jsonargparse costs a quarter of a second, which `lso --help` does not need
    from jsonargparse import auto_cli

    module, function, _ = COMMANDS[command]
    option, usage = TWO_WORDS.get(command, (None, None))
    auto_cli(
        getattr(importlib.import_module(module), function), args=with_options(args, option), prog=f"lso {command}",
        usage=usage, allow_abbrev=False,
    )  # fmt: skip


def with_options(args: list[str], first: str | None) -> list[str]:
    """Spell a command's options as its function does.

    Args:
        args: what follows the command's name; every option takes one value.
        first: option that the first of two plain words stands for.

    Returns:
        The same with `--max-bad` as `--max_bad`, and the first of two words as `--first=word`.
    """
    spelled = [re.sub(r"^--\w[\w.-]*", lambda match: "--" + match[0][2:].replace("-", "_"), arg) for arg in args]
    values = {i + 1 for i, arg in enumerate(spelled) if arg.startswith("--") and "=" not in arg}
    words = [i for i, arg in enumerate(spelled) if not arg.startswith("-") and i not in values]
    if first is not None and len(words) == 2:
        spelled[words[0]] = f"--{first}={spelled[words[0]]}"
    return spelled


def dispatch(args: list[str]) -> None:
    """Find the command and run it.

    Args:
        args: command line without the program's name.

    Raises:
        SystemExit: for help and version (0) and for an unknown command (2).
    """
    if not args or args[0] in ("-h", "--help"):
        print(help_text())
        return
    if args[0] == "--version":
        print(f"lso_lightning {__version__}")
        return
    command, rest = args[0], args[1:]
    if command not in LIGHTNING and command not in COMMANDS:
        known = [*LIGHTNING, *COMMANDS]
        print(
            f"lso: error: no command {command!r}.{near(command, known)} Commands: {', '.join(known)}", file=sys.stderr
        )
        raise SystemExit(2)
    # a console script, unlike `python -m`, does not look in the current folder; last, so that it shadows nothing
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    rest = resolve_class_files(rest)
    if command in LIGHTNING:
        from lso_lightning import cli

        cli.main([command, *rest])
    else:
        run_function(command, rest)


def fail(message: str, code: int = 1) -> NoReturn:
    """Print one line on the error stream and leave; ranks other than 0 say which they are.

    Args:
        message: what is wrong and what to do.
        code: exit code.

    Raises:
        SystemExit: always.
    """
    where = f"[{label}] " if (label := rank_label()) else ""
    print(f"{where}lso: error: {message}", file=sys.stderr)
    raise SystemExit(code)


def main(argv: list[str] | None = None) -> None:
    """Run `lso`.

    Args:
        argv: command line without the program's name; the process's own when not given.

    Raises:
        SystemExit: 1 for a mistake that a person can mend, 2 for wrong usage, 130 after Ctrl-C. Anything else that is
            raised is a bug and keeps its traceback.
    """
    args = sys.argv[1:] if argv is None else list(argv)
    try:
        dispatch(args)
    except UserError as error:
        fail(" ".join(str(error).split()))
    except OSError as error:
        if error.errno in _FULL:
            where = f"{error.filename}: " if error.filename else ""  # unknown to a write to a file that is open already
            what = "no space left on the device" if error.errno == errno.ENOSPC else "the disk quota is used up"
            again = "run the same command again"
            if args[0] in LIGHTNING:
                again = "continue with --ckpt_path last, what is committed is safe"
            fail(f"{where}{what} while writing; make room and {again}")
        if error.errno not in _MENDABLE or error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except SystemExit as leaving:
        # Lightning turns Ctrl-C into exit code 1 after shutting down
        if isinstance(leaving.__context__, KeyboardInterrupt):
            raise SystemExit(INTERRUPTED) from None
        raise


if __name__ == "__main__":
    main()
