"""Command lines of experiments: a config file, any field overridden, one-sentence errors, no jax imported.

An experiment is a function of a config. `main` gives it a command line:

  python -m experiments.pretrain --config configs/pretrain/stdlib.py --model.num-layers 6

A config file is Python with a module-level `config`, an instance of the experiment's frozen dataclass. It may
import another config file and change it with `dataclasses.replace`. Every nested field is an option.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, TypeVar

from lmjax.config_files import format_config, load_config, suggest
from lmjax.errors import UserError
from lmjax.host_memory import keep_freed_memory

__all__ = ["Options", "format_config", "load_config", "main", "parse"]

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says beside the config.

    Attributes:
      run_dir: where the run writes, or None for the experiment's own choice.
      plan: print the plan (parameters, memory, FLOPs) and exit.
      config_path: the config file, or None.
    """

    run_dir: str | None = None
    plan: bool = False
    config_path: str | None = None


def main(
    experiment: Callable[[Config, Options], int | None],
    default: Config,
    *,
    plan: bool = False,
    argv: Sequence[str] | None = None,
) -> None:
    """Runs an experiment from the command line.

    Args:
      experiment: the function to run; an integer it returns is the exit status.
      default: the config where no file is given; its class is the one that config files must hold.
      plan: whether the experiment offers `--plan`.
      argv: the arguments, `sys.argv[1:]` if None.

    Exits with status 2 and one line, `error: ...`, on a `UserError`; with 130 on an interrupt.
    """
    try:
        config, options, print_config = parse(default, sys.argv[1:] if argv is None else argv, plan=plan)
        if print_config:
            print(format_config(config), end="")
            return
        if argv is None:
            keep_freed_memory()
        status = experiment(config, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # whoever read standard output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    if status:
        raise SystemExit(status)


def parse(default: Config, argv: Sequence[str], *, plan: bool = False) -> tuple[Config, Options, bool]:
    """Reads the config file that the arguments name, then the fields they override.

    Returns:
      The config, the other options, and whether `--print-config` was given.

    Raises:
      UserError: an unknown option (with the nearest known one), a value that does not fit its field, a config
        file that does not load.
    """
    import tyro

    path = _config_argument(argv)
    base: Any = default if path is None else load_config(path, type(default))
    flags: list[tuple[str, Any, Any]] = [
        ("config", _option(str | None, "A Python file whose `config` to start from.", "FILE"), None),
        ("run_dir", _option(str | None, "Where the run writes.", "DIR"), None),
        ("print_config", _option(bool, "Print the resolved config as a config file and exit."), False),
    ]
    if plan:
        text = "Print parameters, memory a device and FLOPs a token, and exit."
        flags.append(("plan", _option(bool, text), False))
    clash = sorted({name for name, _, _ in flags} & {field.name for field in dataclasses.fields(base)})
    if clash:
        raise TypeError(f"the field {clash[0]} of {type(base).__name__} has the name of a common option")
    settings = ("settings", Annotated[type(base), tyro.conf.arg(name="")], base)
    fields = [(name, kind, dataclasses.field(default=value)) for name, kind, value in (*flags, settings)]
    invocation = dataclasses.make_dataclass("Invocation", fields)
    with _one_sentence():
        parsed: Any
        parsed, unknown = tyro.cli(
            invocation,
            args=list(argv),
            prog=_program(),
            description=_description(type(base)),
            return_unknown_args=True,
            # A group that may be of several classes, or None, keeps the class it has.
            config=(tyro.conf.AvoidSubcommands,),
        )
    if unknown:
        raise UserError(_unknown_option(unknown, base, [name for name, _, _ in flags]))
    options = Options(parsed.run_dir, getattr(parsed, "plan", False), path)
    return parsed.settings, options, parsed.print_config


def _option(kind: Any, text: str, metavar: str | None = None) -> Any:
    """A common option; a switch has no `--no-` form."""
    import tyro

    argument = tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint="")
    return Annotated[kind, argument, *([tyro.conf.FlagCreatePairsOff] if kind is bool else [])]


def _program() -> str | None:
    """How this process was started, for the usage line."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec is not None else None


def _description(kind: type) -> str:
    """The first paragraph of the experiment, or of its config class."""
    script = getattr(sys.modules.get("__main__"), "__doc__", None)
    text = script or kind.__doc__ or ""
    return text.strip().split("\n\n")[0]


def _config_argument(argv: Sequence[str]) -> str | None:
    """The value of `--config`, which has to be known before the options are."""
    path = None
    for index, argument in enumerate(argv):
        if argument == "--config":
            if index + 1 == len(argv) or argv[index + 1].startswith("--"):
                raise UserError("--config needs a file, as in --config configs/pretrain/stdlib.py")
            path = argv[index + 1]
        elif argument.startswith("--config="):
            path = argument.removeprefix("--config=")
    return path


def _options(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every option of a config with its value, groups included."""
    for field in dataclasses.fields(config):
        if not field.init:
            continue
        name, value = prefix + field.name.replace("_", "-"), getattr(config, field.name)
        yield name, value
        if dataclasses.is_dataclass(value):
            yield from _options(value, name + ".")
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                if dataclasses.is_dataclass(item):
                    yield from _options(item, f"{name}.{index}.")


def _unknown_option(unknown: Sequence[str], config: Any, flags: Sequence[str]) -> str:
    options = dict(_options(config))
    given = next((argument for argument in unknown if argument.startswith("--")), None)
    if given is None:
        return f"{unknown[0]!r} belongs to no option; options are written --name value"
    name = given.removeprefix("--").split("=")[0].replace("_", "-")
    parts = name.split(".")
    for depth in range(1, len(parts)):
        group = ".".join(parts[:depth])
        if group in options and options[group] is None:
            return (
                f"{given} cannot be set because {group} is None here; give {group} a value in a config file"
            )
    leaves = [option for option, value in options.items() if not dataclasses.is_dataclass(value)]
    known = ["--" + option for option in [*leaves, *(flag.replace("_", "-") for flag in flags)]]
    return f"there is no option --{name}{suggest('--' + name, known, 'see --help')}"


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    """Turns the boxed message with which tyro ends the process into the sentence at its head.

    The sentence stands between the first two rules: the edge of the box or, where standard output is not UTF-8, dashes.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            yield
    except SystemExit as end:
        if not end.code:
            raise
        lines = [line.strip("│ ").strip() for line in box.getvalue().splitlines()]
        rules = [i for i, line in enumerate(lines) if line.startswith(("╭─", "──", "--"))] or [-1]
        last = rules[1] if len(rules) > 1 else len(lines)
        text = " ".join(line for line in lines[rules[0] + 1 : last] if line)
        raise UserError(text.removeprefix("Error parsing ").removeprefix("settings.")) from None
