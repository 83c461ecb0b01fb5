"""What a person types, made exact: configs found by name, classes loaded from a file, near-match hints."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from lso_lightning.errors import UserError

# the folder that a wheel installs beside this package; found by place, so that a user's own `configs` cannot shadow it
PACKAGED_CONFIGS = Path(__file__).resolve().parents[1] / "configs"

_FILE_CLASS = re.compile(r"^(?P<option>--?[^=\s]+?\+?=)?(?P<file>[^=]*\.py):(?P<name>[A-Za-z_]\w*)$")


def near(word: str, known: Iterable[str]) -> str:
    """Say which known word is close to a mistyped one.

    Args:
        word: what was typed.
        known: what could have been meant.

    Returns:
        `" Did you mean 'x'?"`, or an empty string when nothing is close.
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def packaged_configs() -> list[str]:
    """List the names of the shipped configs, e.g. `overlay/ddp.yaml`."""
    return sorted(path.relative_to(PACKAGED_CONFIGS).as_posix() for path in PACKAGED_CONFIGS.rglob("*.yaml"))


def find_config(name: str) -> Path:
    """Find a config by path or by its name in the shipped `configs`.

    Args:
        name: a path relative to the current folder, or a shipped name; `.yaml` may be left out.

    Returns:
        Absolute path of the file.

    Raises:
        UserError: nothing has that name.
    """
    for folder in (Path.cwd(), PACKAGED_CONFIGS):
        for candidate in (folder / name, folder / f"{name}.yaml"):
            if candidate.is_file():
                return candidate.resolve()
    shipped = packaged_configs()
    bare = name.removesuffix(".yaml") + ".yaml"
    hint = near(bare, shipped) or f" Shipped configs: {', '.join(shipped)}."
    raise UserError(f"--config {name}: no such file in {Path.cwd()} and no shipped config of that name.{hint}")


def resolve_configs(args: list[str]) -> list[str]:
    """Replace the value of each `--config` or `-c` by the file it means.

    Args:
        args: command line without the program's name.

    Returns:
        The same command line with absolute config paths. A value that is YAML text (`{`...) is left alone.
    """
    resolved: list[str] = []
    expects_value = False
    for arg in args:
        if expects_value and not arg.startswith("-"):
            arg = arg if arg.lstrip().startswith("{") else str(find_config(arg))
        elif arg.startswith(("--config=", "-c=")):
            option, value = arg.split("=", 1)
            arg = arg if value.lstrip().startswith("{") else f"{option}={find_config(value)}"
        expects_value = arg in ("--config", "-c")
        resolved.append(arg)
    return resolved


def load_class_file(file: Path, name: str) -> str:
    """Import a Python file as a module named by its stem and check that it holds a class.

    Args:
        file: the Python file.
        name: class that must be in it.

    Returns:
        Import path `stem.name`, valid for the rest of the process and for processes started with its `sys.path`.

    Raises:
        UserError: missing file, stem that is no module name or hides another module, missing class.
    """
    if not file.is_file():
        raise UserError(f"{file}:{name}: there is no file {file.resolve()}")
    file = file.resolve()
    stem = file.stem
    if not stem.isidentifier():
        raise UserError(f"{file}: {stem!r} cannot be a module name; rename the file to letters, digits and underscores")
    spec = importlib.util.find_spec(stem)
    if spec is not None and spec.origin is None and spec.submodule_search_locations is not None:
        spec = None  # a mere folder of that name, say one that `lso pack` wrote; Python prefers the file
    if spec is not None and (spec.origin is None or Path(spec.origin).resolve() != file):
        raise UserError(
            f"{file}: a module named {stem!r} exists already ({spec.origin or 'built in'}); rename the file"
        )
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
        importlib.invalidate_caches()
    module = importlib.import_module(stem)
    if not isinstance(getattr(module, name, None), type):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        hint = near(name, classes) or f" It has: {', '.join(classes) or 'no class'}."
        raise UserError(f"{file} has no class {name!r}.{hint}")
    return f"{stem}.{name}"


def resolve_class_files(args: list[str]) -> list[str]:
    """Replace each value `path/to/file.py:Class` by `file.Class`, after importing the file.

    Args:
        args: command line without the program's name.

    Returns:
        The same command line with import paths.
    """
    resolved = []
    for arg in args:
        match = _FILE_CLASS.match(arg)
        if match:
            arg = (match["option"] or "") + load_class_file(Path(match["file"]), match["name"])
        resolved.append(arg)
    return resolved
