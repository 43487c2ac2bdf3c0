"""The command line itself, with commands of a package that is made for it."""

import json
import os
import signal
import subprocess
import sys
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution
from pathlib import Path
from textwrap import dedent

import pytest

from turboquant_core import __version__, cli, command_output, commands, interrupts

SOURCES = {
    "greet": """
        def greet(name: str, times: Annotated[int, typer.Option(help="How often.")] = 1) -> None:
            '''Say hello.'''
            for _ in range(times):
                typer.echo(f"hello {name}")
        """,
    "part": """
        def part(name: str) -> None:
            '''Say goodbye.'''
            typer.echo(f"goodbye {name}")
        """,
    "refuse": """
        def refuse(json_target: Annotated[str | None, typer.Option("--json")] = None) -> None:
            print("a library says something")
            raise CommandError("no\\nfor [/x] reasons", 1, "refused")
        """,
    "find": """
        def find(
            json_target: Annotated[str, typer.Option("--json")], number: Annotated[float, typer.Option()] = 1
        ) -> None:
            print("a library says something")
            write_json("find", {"number": number}, json_target)
        """,
    "crash": """
        def crash(how: str, json_target: Annotated[str | None, typer.Option("--json")] = None) -> None:
            if how == "pipe":
                raise BrokenPipeError(32, "Broken pipe")
            try:
                raise {"bug": KeyError("x"), "ctrl-c": KeyboardInterrupt(), "memory": MemoryError(),
                       "disk": OSError(28, "No space left on device")}.get(how, KeyboardInterrupt())
            except KeyboardInterrupt:
                if how == "ctrl-c":
                    raise
                # As packages do while they are imported.
                raise RuntimeError("cannot import it")
        """,
    "lacking": "import no_such_package",
    "late": """
        def late(number: int = 1) -> None:
            import no_such_package
        """,
    "slow": """
        if __import__("os").environ.get("WAIT") == "import":
            print("waiting", flush=True)
            try:
                __import__("time").sleep(60)
            except BaseException:
                raise ImportError("interrupted") from None

        def slow(json_target: Annotated[str | None, typer.Option("--json")] = None) -> None:
            sys.__stdout__.write("waiting\\n")
            sys.__stdout__.flush()
            __import__("time").sleep(60)
        """,
}
HEADER = """
import sys
from typing import Annotated
import typer
from turboquant_core.command_output import CommandError, write_json
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder with a package of commands whose import is noticed."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / "some_commands").mkdir()
    (folder / "some_commands" / "__init__.py").write_text("raise AssertionError('this takes seconds')")
    for name, source in SOURCES.items():
        (folder / "some_commands" / f"{name}.py").write_text(HEADER + dedent(source))
    return folder


@pytest.fixture
def run(monkeypatch, capsys, package):
    """Runs the command line with the given installed commands, by default all: exit status, output, errors."""
    monkeypatch.syspath_prepend(package)

    def run(*args, installed=tuple(SOURCES)):
        def entry_points(group):
            assert group == "turboquant.commands"
            return [EntryPoint(name, f"some_commands.{name}:{name}", group) for name in installed]

        monkeypatch.setattr(commands, "entry_points", entry_points)
        with pytest.raises(SystemExit) as exit_:
            commands.app(list(args), prog_name="turboquant")
        return exit_.value.code or 0, *capsys.readouterr()

    yield run
    for name in [name for name in sys.modules if name.startswith("some_commands")]:
        del sys.modules[name]


def imported():
    return {name.partition(".")[2] for name in sys.modules if name.startswith("some_commands.")}


def test_version_is_that_of_every_installed_package(run, monkeypatch):
    installed = {"turboquant-core": __version__, "turboquant-vllm": "2.0"}

    def version(package):
        if package not in installed:
            raise PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(commands, "version", version)
    assert run("--version") == (0, f"turboquant-core {__version__}\nturboquant-vllm 2.0\n", "")


def test_version_needs_no_command_and_runs_none(run):
    assert run("--version", "greet", "you")[1].startswith(f"turboquant-core {__version__}\n")
    assert imported() == set()


def test_no_arguments_show_the_help(run):
    _, output, errors = run()
    text = output + errors
    assert "turboquant [OPTIONS] COMMAND [ARGS]..." in text
    assert "--version" in text
    assert "greet" in text


def test_the_help_has_a_line_for_each_command_and_imports_none(run):
    lines = run("--help")[1].splitlines()
    for name, said in {"greet": "Say hello.", "part": "Say goodbye.", "lacking": ""}.items():
        assert [line.split() for line in lines if line.strip().startswith(name)] == [[name, *said.split()]]
    assert imported() == set()


def test_a_command_whose_package_is_gone_has_a_line_without_help(monkeypatch, capsys):
    gone = EntryPoint("gone", "no_such_package.module:function", "turboquant.commands")
    monkeypatch.setattr(commands, "entry_points", lambda group: [gone])
    for arguments, status in ((["--help"], 0), (["gone"], 2)):
        with pytest.raises(SystemExit) as exit_:
            commands.app(arguments)
        assert (exit_.value.code or 0) == status
    assert "gone is not available: No module named 'no_such_package.module'" in capsys.readouterr().err


def test_help_without_any_command_installed(run):
    status, output, _ = run("--help", installed=())
    assert status == 0
    assert "turboquant-hf" in output


def test_subcommands_are_those_of_the_installed_packages(run):
    assert run("greet", "you", "--times", "2") == (0, "hello you\nhello you\n", "")
    assert imported() == {"greet"}
    assert run("part", "you")[1] == "goodbye you\n"


def test_the_help_of_a_subcommand(run):
    status, output, _ = run("greet", "--help")
    assert status == 0
    assert "Usage: turboquant greet [OPTIONS]" in output
    assert "How often." in output


def test_a_single_subcommand_keeps_its_name(run):
    assert run("greet", "you", installed=["greet"])[1] == "hello you\n"


def test_an_unknown_subcommand_is_refused(run):
    status, _, errors = run("sing")
    assert status == 2
    assert "No such command 'sing'" in errors
    assert "Did you mean 'greet'" in run("gret")[2]
    assert json.loads(run("gret", "--json", "-")[1])["format"] == "turboquant --json"
    assert imported() == set()


def test_without_any_command_installed_the_package_that_brings_them_is_named(run):
    status, output, errors = run("doctor", "MODEL", "--json", "-", installed=())
    assert status == 2
    assert "they come with turboquant-hf" in errors
    assert "they come with turboquant-hf" in json.loads(output)["error"]
    assert run("--version", installed=())[2] == ""


def test_a_command_that_cannot_be_imported_is_named_and_does_not_stop_the_others(run):
    assert run("greet", "you")[:2] == (0, "hello you\n")
    status, _, errors = run("lacking")
    assert status == 2
    assert "lacking is not available: No module named 'no_such_package'" in errors


def test_an_error_is_one_line_in_words_and_in_json(run):
    assert run("refuse") == (1, "a library says something\n", "refused: no for [/x] reasons\n")
    status, output, errors = run("refuse", "--json", "-")
    assert (status, errors) == (1, "a library says something\nrefused: no for [/x] reasons\n")
    assert json.loads(output) == {"format": "turboquant refuse --json", "error": "no for [/x] reasons"}


def test_an_argument_that_no_process_can_be_given_is_refused(run):
    # A script may pass it. Bytes that are no text reach Python as other surrogates, which can be written.
    status, output, errors = run("greet", "\ud800", "--json", "-")
    assert (status, errors) == (2, "error: the argument '\\ud800' holds a character that no name can have\n")
    assert json.loads(output)["error"] in errors
    assert run("greet", "\udcff")[0] == 0


@pytest.mark.parametrize("arguments", [("greet", "--json=-"), ("refuse", "--json", "-", "--times", "x")])
def test_wrong_arguments_are_said_in_json_too(run, arguments):
    status, output, errors = run(*arguments)
    assert status == 2
    assert json.loads(output)["error"] in " ".join(errors.split())


@pytest.mark.parametrize(
    ("how", "status", "said"),
    [
        ("bug", 1, "bug: KeyError: 'x'. This is an error in turboquant itself"),
        ("disk", 2, "error: [Errno 28] No space left on device"),
        ("memory", 1, "error: there is not enough memory"),
        ("ctrl-c", 130, "interrupted"),
        ("ctrl-c made another error", 130, "interrupted"),
    ],
)
def test_whatever_is_raised_ends_in_one_line_and_a_status(run, monkeypatch, how, status, said):
    monkeypatch.delenv("TURBOQUANT_TRACEBACK", raising=False)
    found, output, errors = run("crash", how, "--json", "-")
    assert found == status
    assert errors.startswith(said)
    assert errors.count("\n") == 1
    assert errors.strip().endswith(json.loads(output)["error"])


def test_a_bug_shows_its_traceback_when_asked(run, monkeypatch):
    monkeypatch.setenv("TURBOQUANT_TRACEBACK", "1")
    status, _, errors = run("crash", "bug")
    assert status == 1
    assert "Traceback" in errors
    assert 'some_commands/crash.py", line' in errors


def test_a_reader_that_is_gone_is_no_error(run):
    assert run("crash", "pipe") == (1, "", "")


def test_json_is_alone_on_the_output_and_strict(run):
    status, output, errors = run("find", "--json", "-", "--number", "2")
    assert (status, errors) == (0, "a library says something\n")
    assert json.loads(output) == {"format": "turboquant find --json", "number": 2}
    status, output, errors = run("find", "--json", "-", "--number", "inf")
    assert status == 1
    assert json.loads(output)["error"] == "number is inf, which is no result"


def test_a_json_file_is_replaced_by_its_own_command_alone(run, tmp_path):
    path = tmp_path / "found.json"
    for number in ("1", "2"):
        assert run("find", "--json", str(path), "--number", number)[0] == 0
    assert json.loads(path.read_text())["number"] == 2
    assert run("find", "--json", str(path), "--number", "nan")[0] == 1
    assert json.loads(path.read_text())["error"] == "number is nan, which is no result"
    assert run("refuse", "--json", str(path))[0] == 1
    assert json.loads(path.read_text())["error"] == "number is nan, which is no result"


def check(path, marker="marker", inputs=None, **options):
    command_output.check_outputs([command_output.Output("--out", path, marker)], inputs or {}, **options)


def test_files_that_were_not_written_by_the_command_are_kept(tmp_path):
    path, output = tmp_path / "found.json", command_output.json_output("find", str(tmp_path / "found.json"))
    command_output.check_outputs([output], {})
    path.write_text("")
    command_output.check_outputs([output], {})
    for content, said in (("notes", "did not write it"), ('{"format": "turboquant plan --json"}', "--force")):
        path.write_text(content)
        with pytest.raises(command_output.CommandError, match=said):
            command_output.check_outputs([output], {})
        command_output.check_outputs([output], {}, force=True)
    command_output.write_json("find", {"number": 1}, str(path))
    command_output.check_outputs([output], {})


@pytest.mark.parametrize("name", ["none/x.json", ".", "x" * 300, "x\0y", "there/x"])
def test_what_cannot_be_written_is_refused_before_any_work(tmp_path, name):
    (tmp_path / "there").write_text("")
    with pytest.raises(command_output.CommandError) as refused:
        check(tmp_path / name)
    assert refused.value.status == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(command_output.CommandError, match="is read-only"):
        check(tmp_path / "x")


def test_outputs_are_no_inputs_and_not_each_other(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "text")
    inputs = {"--text": tmp_path / "text", "MODEL": None}
    check(tmp_path / "out", inputs=inputs)
    with pytest.raises(command_output.CommandError, match="--text and --out are the same file"):
        check(tmp_path / "link", inputs=inputs, force=True)
    outputs = [
        command_output.Output("--out", tmp_path / "out", None),
        command_output.json_output("find", str(tmp_path / "x" / ".." / "out")),
    ]
    (tmp_path / "x").mkdir()
    with pytest.raises(command_output.CommandError, match="--out and --json are the same file"):
        command_output.check_outputs(outputs, {})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["find", "--json", "-"]])
def test_an_output_that_is_full(start, arguments):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        process = start(arguments, stdout=full)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.splitlines()[-1] == "error: [Errno 28] No space left on device"


@pytest.fixture
def start(package, request):
    """Starts the command in a process of its own with the made package, by default one that requires nothing."""
    info = package / "some_commands-1.dist-info"
    info.mkdir(exist_ok=True)
    requires = "".join(f"Requires-Dist: {requirement}\n" for requirement in getattr(request, "param", ()))
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: some-commands\nVersion: 1\nProvides-Extra: tools\n{requires}"
    )
    lines = [f"{name} = some_commands.{name}:{name}" for name in SOURCES]
    (info / "entry_points.txt").write_text("\n".join(["[turboquant.commands]", *lines]))

    def start(arguments, folders=(), **options):
        path = os.pathsep.join([*folders, str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-c", "from turboquant_core.cli import main; main()", *arguments]
        environment = {**os.environ, "PYTHONPATH": path, **options.pop("env", {})}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        return subprocess.Popen(command, env=environment, **options)

    return start


@pytest.mark.parametrize("name", ["lacking", "late"])
def test_the_extra_that_brings_what_a_command_lacks_is_named(start, name):
    process = start([name])
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    said = "No module named 'no_such_package'. In the clone run"
    install = 'uv pip install ./packages/turboquant-core "./packages/some-commands[tools]"'
    assert errors == f"error: {name} is not available: {said} `{install}`.\n"


LACKING = [
    "no-such-package>=1; extra == 'tools'",
    "typer[all]>=0.1 ; extra == 'tools'",
    'no-other; python_version > "3" and extra == "tools"',
    "no-third; extra == 'others'",
]


@pytest.mark.parametrize("start", [LACKING], indirect=True)
@pytest.mark.parametrize("arguments", [["--help"], ["greet"], ["greet", "you"], ["greet", "you", "--times", "x"]])
def test_a_missing_extra_is_said_in_the_help_and_before_arguments(start, arguments):
    process = start(arguments)
    output, errors = process.communicate(timeout=60)
    said = "The commands of some-commands need more than is installed: no-such-package, no-other. In the clone run"
    if arguments == ["--help"]:
        assert process.returncode == 0
        assert said in output.splitlines()[-1]
    else:
        assert process.returncode == 2
        assert errors.startswith(f"error: {said} `uv pip install ")
        assert errors.count("\n") == 1


@pytest.mark.parametrize("start", [LACKING], indirect=True)
def test_the_help_of_a_command_needs_no_extra(start):
    process = start(["greet", "--help"])
    assert "How often." in process.communicate(timeout=60)[0]
    assert process.returncode == 0


def test_wrong_arguments_are_said_before_a_command_imports_what_it_needs(run):
    status, _, errors = run("late", "--number", "x")
    assert status == 2
    assert "Invalid value for '--number'" in errors


def test_without_the_extra_the_command_says_how_to_install_it(start, tmp_path):
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(name='typer')")
    process = start(["refuse"], [str(tmp_path)])
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    install = 'uv pip install ./packages/turboquant-core "./packages/turboquant-hf[tools]"'
    assert errors == f"error: turboquant needs typer, which is not installed. In the clone run `{install}`.\n"


@pytest.mark.parametrize("moment", ["typer", "import", "command"])
def test_ctrl_c_ends_it_without_a_traceback(start, moment, tmp_path):
    (tmp_path / "typer.py").write_text(dedent(SOURCES["slow"]).partition("def ")[0])
    folders = [str(tmp_path)] if moment == "typer" else []
    process = start(["slow"], folders, env={"WAIT": moment.replace("typer", "import")})
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors in ("", "interrupted\n")


def test_interrupted_it_says_so_in_json(start):
    process = start(["slow", "--json", "-"], env={"WAIT": "command"})
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.startswith("interrupted")
    assert json.loads(output)["error"] in errors


def test_a_script_that_imports_it_keeps_its_own_ctrl_c():
    # What is in the background of a shell may ignore Ctrl-C, and is to go on doing so.
    before = signal.getsignal(signal.SIGINT)
    assert before in (signal.default_int_handler, signal.SIG_IGN)
    with interrupts.raised():
        assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["docter"]])
def test_help_and_version_take_no_time(run_python, arguments):
    said = run_python(
        f"import sys, time; sys.argv[1:] = {arguments}; from turboquant_core.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(time.process_time(), *sys.modules)"
    )
    seconds, *modules = said.splitlines()[-1].split()
    assert float(seconds) < 1
    assert not {"torch", "transformers", "scipy", "numpy", "turboquant_hf"} & set(modules)


def test_little_is_imported_before_ctrl_c_is_seen_to(run_python):
    loaded = set(run_python("import sys, turboquant_core.cli; print(*sys.modules)").split())
    assert not {"typer", "rich", "email", "importlib.metadata", "turboquant_core.commands"} & loaded


def test_the_installed_script_is_this_command():
    scripts = distribution("turboquant-core").entry_points.select(group="console_scripts")
    assert [(script.name, script.load()) for script in scripts] == [("turboquant", cli.main)]
