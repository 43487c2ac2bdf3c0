"""The `turboquant` command line: subcommands that are imported when they run, and what becomes of their errors."""

import ast
import io
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution, entry_points, version
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from turboquant_core import interrupts
from turboquant_core.command_output import (
    FAILED,
    REFUSED,
    STDOUT,
    CommandError,
    check_outputs,
    how_to_install,
    json_alone,
    json_output,
    json_target,
    write_json,
)

COMMANDS_GROUP = "turboquant.commands"
EXTRA = "tools"
"""The extra of a package that brings what its subcommands need."""
PACKAGES = ("turboquant-core", "turboquant-hf", "turboquant-vllm")
TRACEBACK_VARIABLE = "TURBOQUANT_TRACEBACK"

# Of click, which typer brings with it or, in older versions, installs.
_UsageError: Any = typer.BadParameter.__base__


class InstalledCommand(TyperCommand):
    """A subcommand of an installed package, which is not imported before its arguments are read.

    Args:
        entry_point: Where it is; a function as typer takes it. Its module is imported without the packages around it,
            and imports within the function what takes seconds.
    """

    def __init__(self, entry_point: EntryPoint) -> None:
        super().__init__(entry_point.name, rich_markup_mode=None)
        self._entry_point = entry_point

    def get_short_help_str(self, limit: int = 45) -> str:
        """The line that `turboquant --help` shows."""
        self.help = _docstring(self._entry_point)
        return super().get_short_help_str(limit)

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context of the command itself, in which Ctrl-C raises KeyboardInterrupt.

        Raises:
            CommandError: If what it needs is not installed, whatever the arguments; help is shown all the same.
        """
        if (missing := self.missing()) and "--help" not in args:
            raise CommandError(missing)
        context = self._load().make_context(info_name, args, parent, **extra)
        context.with_resource(interrupts.raised())
        return context

    def unavailable(self, error: Exception) -> CommandError:
        """What is said when something cannot be imported, and what installs it."""
        said = f"{self.name} is not available: {error}"
        package = self._entry_point.dist
        extras = package.metadata.get_all("Provides-Extra", []) if package else []
        if package and EXTRA in extras and isinstance(error, ModuleNotFoundError):
            said += f". {how_to_install(package.name)}"
        return CommandError(said)

    def missing(self) -> str:
        """What the extra of the package names and is not installed, and what installs it; empty where nothing is."""
        package = self._entry_point.dist
        if package is None or not (names := _missing(package.requires or [])):
            return ""
        said = f"The commands of {package.name} need more than is installed: {', '.join(names)}."
        return f"{said} {how_to_install(package.name)}"

    def _load(self) -> Any:
        try:
            command = getattr(_module_alone(self._entry_point.module), self._entry_point.attr)
        except (ImportError, OSError) as error:
            raise self.unavailable(error) from error
        alone = typer.Typer(add_completion=False, rich_markup_mode=None)
        alone.command(self.name)(command)
        return typer.main.get_command(alone)


class Commands(TyperGroup):
    """The subcommands of every installed package; whatever they raise ends in one line and an exit status."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = {found.name: InstalledCommand(found) for found in entry_points(group=COMMANDS_GROUP)}

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Below the subcommands, what they need and is not installed."""
        installed: Any = self.commands.values()
        for missing in dict.fromkeys(command.missing() for command in installed):
            if missing:
                formatter.write(f"\n{missing}\n")

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The subcommand of that name."""
        if not self.commands:
            ctx.fail("No subcommand is installed: they come with turboquant-hf.")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            # Before typer sees it, which would leave without a word.
            raise CommandError.interrupted() from None
        except ImportError as error:
            subcommand: Any = self.commands[ctx.invoked_subcommand]
            raise subcommand.unavailable(error) from error

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **options: Any
    ) -> NoReturn:
        """Run the command line and end the process: with 0, 1, 2, or 130 after Ctrl-C."""
        arguments = list(sys.argv[1:] if args is None else args)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # Names of files need not be text.
                stream.reconfigure(errors="backslashreplace")
        alone = json_alone() if json_target(arguments) == STDOUT else nullcontext()
        try:
            with alone:
                _check_encodable(arguments)
                status = super().main(arguments, prog_name, **options | {"standalone_mode": False}) or 0
            sys.stdout.flush()
        except Exception as error:
            status = self._end(error, arguments)
        sys.exit(status)

    def _end(self, error: Exception, arguments: list[str]) -> int:
        """Say what is wrong, in JSON too where that is asked for; returns the exit status."""
        ended = _as_command_error(error)
        if os.environ.get(TRACEBACK_VARIABLE):
            traceback.print_exception(error)
        # The disk that is full may be the one that errors are written to.
        with suppress(OSError):
            if isinstance(error, _UsageError):
                error.show()
            elif not isinstance(error, BrokenPipeError):
                _print(ended)
        if (target := json_target(arguments)) is not None:
            name = next((argument for argument in arguments if argument in self.commands), "")
            with suppress(OSError, CommandError):
                # Not by force: what is there may be the very file that was refused.
                check_outputs([json_output(name, target)], {})
                write_json(name, {"error": str(ended)}, target)
        _discard_unwritten()
        return ended.status


def _missing(requirements: Sequence[str]) -> list[str]:
    """The names, among the requirements of a package, of those of its extra that are not installed in any version."""
    missing = []
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)
        if name and re.search(rf"extra\s*==\s*['\"]{EXTRA}['\"]", requirement):
            try:
                distribution(name[0])
            except PackageNotFoundError:
                missing.append(name[0])
    return missing


def _check_encodable(arguments: Sequence[str]) -> None:
    """Refuse what no process can be given, for it would fail wherever a file or model is looked for by it."""
    for argument in arguments:
        try:
            os.fsencode(argument)
        except UnicodeEncodeError:
            raise CommandError(f"the argument {argument!r} holds a character that no name can have") from None


def _as_command_error(error: Exception) -> CommandError:
    if isinstance(error, CommandError) and error.status == interrupts.INTERRUPTED:
        return error
    if interrupts.is_interrupt(error):
        return CommandError.interrupted()
    if isinstance(error, CommandError):
        return error
    if isinstance(error, _UsageError):
        return CommandError(error.format_message(), error.exit_code)
    if isinstance(error, MemoryError):
        return CommandError("there is not enough memory", REFUSED)
    if isinstance(error, OSError):
        return CommandError(str(error), REFUSED if isinstance(error, BrokenPipeError) else FAILED)
    said = str(error).strip().partition("\n")[0]
    return CommandError(
        f"{type(error).__name__}: {said}. This is an error in turboquant itself; please report it, with the "
        f"traceback that {TRACEBACK_VARIABLE}=1 shows.",
        REFUSED,
        "bug",
    )


def _print(error: CommandError) -> None:
    # A tenth of a second that `--help` does without.
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(
        Text.assemble((error.label and f"{error.label}: ", "bold red"), str(error)), soft_wrap=True
    )


def _discard_unwritten() -> None:
    """Let go of what cannot be written, or Python tries again when it ends and complains."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _docstring(entry_point: EntryPoint) -> str:
    """The docstring of a command, read from its source: to import it takes seconds."""
    *_, spec = _specs(entry_point.module)
    get_source = getattr(spec and spec.loader, "get_source", None)
    source = get_source(spec.name) if spec and get_source else None
    for node in ast.parse(source or "").body:
        if isinstance(node, ast.FunctionDef) and node.name == entry_point.attr:
            return ast.get_docstring(node) or ""
    return ""


def _module_alone(name: str) -> ModuleType:
    """A module, imported without the packages around it."""
    if name in sys.modules:
        return sys.modules[name]
    *_, spec = _specs(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _specs(module: str) -> Iterator[ModuleSpec | None]:
    """Where a module and the packages around it are, the outermost first; nothing is imported."""
    package, *rest = module.split(".")
    spec = find_spec(package)
    yield spec
    for name in rest:
        spec = PathFinder.find_spec(name, spec.submodule_search_locations) if spec else None
        yield spec


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="KV-cache compression for LLM inference. Subcommands come with turboquant-hf.",
)


def _print_version(value: bool) -> None:
    if value:
        for package in PACKAGES:
            with suppress(PackageNotFoundError):
                typer.echo(f"{package} {version(package)}")
        raise typer.Exit


@app.callback()
def turboquant(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the versions of the installed packages."
        ),
    ] = False,
) -> None:
    """KV-cache compression for LLM inference. Subcommands come with turboquant-hf."""
