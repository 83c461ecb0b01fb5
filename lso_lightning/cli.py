"""`lso fit|validate|test|predict`: LightningCLI with a stable run directory and resumes that do what was asked."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
from jsonargparse import set_parsing_settings
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

import datamodules.ffhq
import datamodules.identity_pairs
import datamodules.start_images  # noqa: F401  (importing makes short class names resolve)
import lso_lightning.models  # noqa: F401
from callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from callbacks.command_line_wins import CommandLineWins
from callbacks.graceful_end import GracefulEnd
from callbacks.resume_position import ResumePosition
from lso_lightning.allocator import keep_freed_memory
from lso_lightning.checkpoint_io import AtomicCheckpointIO
from lso_lightning.command_line import near, resolve_configs
from lso_lightning.errors import UserError
from lso_lightning.launched_rank import rank_label
from lso_lightning.optimization import LatentSearch
from lso_lightning.run_directory import SaveRunConfig, prepare_fit, require_run_checkpoint, resolve_checkpoint

# what gloo and NCCL say when the process at the other end is gone
_PEER_GONE = re.compile(r"gloo.*(Connection closed by peer|Connection reset by peer)|ncclRemoteError", re.S)
TERMINATED = 143  # what shells report for SIGTERM
# Lightning's advice that is wrong for us: networks that only measure stay frozen ...
_FROZEN = r"Found \d+ module\(s\) in eval mode at the start of training"
# ... and that is wrong for a search: values are equal on all ranks, an epoch is one batch
_ON_PURPOSE = (
    r"It is recommended to use `self\.log\(.*sync_dist=True\)`",
    r"The number of training batches \(1\) is smaller than the logging interval",
)
# whose classes may be meant by a short name, by the option it was given to
_BASES = {"model": L.LightningModule, "data": L.LightningDataModule, "callbacks": L.Callback, "logger": Logger}


def known_classes(base: type) -> list[str]:
    """List the short names of the public classes that are derived from a base and loaded, Lightning's bases aside.

    Args:
        base: the base class.

    Returns:
        Sorted class names.
    """
    found: set[str] = set()
    todo: list[type] = [base]
    while todo:
        children: list[type] = todo.pop().__subclasses__()
        todo += children
        for child in children:
            if not child.__name__.startswith("_") and not child.__module__.startswith("lightning.pytorch.demos"):
                found.add(child.__name__)
    return sorted(found)


class Parser(LightningArgumentParser):
    """Explains a wrong name by the names that are known and the one that is close."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message without the fifty lines of usage, then exit with 2."""
        option = re.search(r"unrecognized arguments: (--[\w.]+)", message)
        parser = getattr(ex, "subcommand_parser", None) or self
        if option:
            message += near(option[1], re.findall(r"--[\w.]+", parser.format_usage()))
        wrong = re.search(r"Expected a dot import path string: (\w+)", message)
        if wrong:
            keys = re.findall(r"[\w.]+", message[: wrong.start()])
            section = next((part for key in keys for part in key.split(".") if part in _BASES), None)
            names = known_classes(_BASES[section] if section else nn.Module)
            message += f"\nThere is no class {wrong[1]!r}.{near(wrong[1], names)}"
            if section:
                message += f" Known here: {', '.join(names)}."
        if self.exit_on_error:
            usage = f"{parser.prog.replace(' [options]', '')} --help"
            where = f"[{label}] " if (label := rank_label()) else ""
            print(f"{where}lso: error: {_without_the_config(message)}\nall options: {usage}", file=sys.stderr)
            raise SystemExit(2)
        super().error(message, ex)


def _without_the_config(message: str) -> str:
    """What was wrong on one line, without the types that were tried and the whole configuration."""
    lines = re.sub(r"\n\s*Given value( type)?: [^\n]*", "", message).split("\n")
    noise = re.compile(
        r"\s*(- )?(Does not validate against any of the Union subtypes|Subtypes: .*|Errors:"
        r"|Expected a <class 'NoneType'>|Expected a path but \S+ either not accessible or invalid)$"
    )
    return " ".join(line.strip().removeprefix("- ") for line in lines if not noise.match(line))


class RunCLI(LightningCLI):
    """The command line of a run: one directory, config wins over checkpoint, two checkpoints always."""

    def __init__(self, args: list[str], held: ExitStack) -> None:
        """Run the command.

        Args:
            args: command line that begins with the command.
            held: what must be let go of when the command is over, however it ends.
        """
        self._held = held
        # one parser setting per subcommand: LightningCLI does not hand the main parser's down
        settings = {"parser_mode": "omegaconf+", "allow_abbrev": False}
        run_logger = {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            # empty name and version: events lie in the run directory itself, and a resume continues the same curve
            "init_args": {
                "save_dir": "${...default_root_dir}",
                "name": "",
                "version": "",
                "default_hp_metric": False,
            },
        }
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            parser_class=Parser,
            parser_kwargs={"prog": "lso", **settings, **{name: dict(settings) for name in self.subcommands()}},
            save_config_callback=SaveRunConfig,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_defaults={"default_root_dir": "runs/default", "logger": run_logger},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks that every run has; a config's own list of callbacks does not replace them."""
        parser.add_lightning_class_args(CommandLineWins, "command_line_wins")
        parser.add_lightning_class_args(ResumePosition, "resume_position")
        parser.add_lightning_class_args(GracefulEnd, "graceful_end")
        parser.add_lightning_class_args(BestCheckpoint, "best_checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and turn a wrong interpolation into one line.

        Raises:
            UserError: `${...}` names a key that does not exist.
        """
        try:
            self.config = parser.parse_args(args)
        except OmegaConfBaseException as error:
            raise UserError(_interpolation_message(error, args)) from error

    def _parse_ckpt_path(self) -> None:
        """Leave the config alone: Lightning would let the checkpoint's hyper-parameters override the command line."""

    def before_instantiate_classes(self) -> None:
        """Decide about run directory and checkpoint before a model is built."""
        config = self.config[self.subcommand]
        if self.subcommand == "fit":
            prepare_fit(config, self._held)
        elif config.ckpt_path is not None:
            path = resolve_checkpoint(Path(config.trainer.default_root_dir), config.ckpt_path)
            if path is None:
                raise UserError(f"--ckpt_path {config.ckpt_path}: nothing to {self.subcommand} with")
            require_run_checkpoint(path)
            config.ckpt_path = str(path)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        """Add our checkpoint files' reader and writer, unless the config brings one."""
        plugins = config.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        if config.get("enable_checkpointing") is False:
            callbacks = [one for one in callbacks if not isinstance(one, (BestCheckpoint, LastCheckpoint))]
        own = config.get("callbacks") or []
        own = list(own) if isinstance(own, (list, tuple)) else [own]
        if config.get("enable_progress_bar") is False:  # Lightning raises where a config brings a bar of its own
            own = [one for one in own if not isinstance(one, ProgressBar)]
        return super()._instantiate_trainer({**config, "plugins": plugins, "callbacks": own}, callbacks)

    def before_fit(self) -> None:
        """Keep quiet about what is done on purpose."""
        warnings.filterwarnings("ignore", message=_FROZEN)
        if isinstance(self.model, LatentSearch):
            for message in _ON_PURPOSE:
                warnings.filterwarnings("ignore", message=message)

    def after_fit(self) -> None:
        """Ask a module that has `failure(run directory)` whether its result is usable.

        Raises:
            UserError: it is not; the message is the module's.
        """
        failure = getattr(self.model, "failure", None)
        message = failure(Path(self.trainer.default_root_dir)) if callable(failure) else None
        if message is not None:
            raise UserError(message)


def _interpolation_message(error: OmegaConfBaseException, args: list[str]) -> str:
    """Name the key and the file of a `${...}` that cannot be resolved."""
    key = str(getattr(error, "full_key", None) or "?")
    key = key.split(".", 1)[1] if key.split(".")[0] in LightningCLI.subcommands() else key
    reason = str(error).splitlines()[0]
    leaf = re.escape(re.split(r"[.\[]", key)[-1].rstrip("]"))
    files = [arg for arg in args if arg.endswith((".yaml", ".yml")) and Path(arg).is_file()]
    holding = [name for name in files if re.search(rf"{leaf}\S*\s*:.*\$\{{", Path(name).read_text(encoding="utf-8"))]
    return (
        f"{key} in {', '.join(holding) or 'the command line'}: {reason}; write ${{section.key}} with a key that exists"
    )


def _no_adverts(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()


def quiet() -> None:
    """Stop advertisements for other products and deprecations inside Lightning; every other warning stays."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_adverts)  # adding twice is one filter
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning\.pytorch\.cli")


def _mistake(error: BaseException | None) -> UserError | None:
    """The mistake behind an exception: ours, or what Lightning says about a wrong combination of settings.

    One that a constructor raised is wrapped by jsonargparse in a ValueError that prints the whole config.
    """
    while error is not None:
        if isinstance(error, UserError):
            return error
        if isinstance(error, MisconfigurationException):
            return UserError(str(error))
        error = error.__cause__ or error.__context__
    return None


def main(argv: list[str]) -> None:
    """Run one of Lightning's commands.

    Args:
        argv: command line that begins with the command.

    Raises:
        UserError: a mistake that a person can mend.
        SystemExit: wrong usage (2), ended by SIGTERM (143), nothing left to do (0).
    """
    keep_freed_memory()
    args = resolve_configs(argv)
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    try:
        with warnings.catch_warnings(), ExitStack() as held:
            quiet()
            RunCLI(args, held)
    except SIGTERMException:
        raise SystemExit(TERMINATED) from None
    except ProcessExitedException as error:
        raise UserError(
            f"rank {error.error_index} died ({error.signal_name or f'exit code {error.exit_code}'}) and the others were"
            " ended; SIGKILL often means that memory ran out. Continue with --ckpt_path last"
        ) from error
    except ProcessRaisedException as error:  # its text is the traceback of the rank that failed
        name, _, message = str(error).strip().rpartition("\n")[2].partition(": ")
        if name != f"{UserError.__module__}.{UserError.__qualname__}":
            raise
        raise UserError(message if message.startswith("rank ") else f"rank {error.error_index}: {message}") from error
    except RuntimeError as error:
        if not _PEER_GONE.search(str(error)):
            raise
        raise UserError("another rank died: its message says why. Continue with --ckpt_path last") from error
    except (ValueError, MisconfigurationException) as error:
        if mistake := _mistake(error):
            raise mistake from error
        raise
    finally:
        set_parsing_settings(omegaconf_absolute_to_relative_paths=False)
