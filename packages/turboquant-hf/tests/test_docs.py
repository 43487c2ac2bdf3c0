"""The documentation as a reader follows it: its Python runs, and the commands that it names are there."""

import ast
import json
import re
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
import typer
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers import GenerationMixin, LlamaConfig, Qwen2Config
from typer.testing import CliRunner

from turboquant_hf._compat import CACHE_ARGUMENT
from turboquant_hf.tools.article import article
from turboquant_hf.tools.models import DEFAULT_HUB_ID

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("packages/*/README.md"))]
# Tokens of a text where a page says a few thousand, and of an answer where one says a hundred.
SCORED_TOKENS = 300
NEW_TOKENS = 8

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="docs are not in the source distribution")


def blocks(page, language):
    text = page.read_text(encoding="utf-8")
    return [match[1] for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]


def cells(notebook):
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


def python_of(cell):
    """A cell without its lines for IPython."""
    return re.sub(r"^[!%].*$", "pass", cell, flags=re.MULTILINE)


def commands(word):
    """What the documentation gives after a command's name: in blocks, in code within a line and in cells."""
    found = []
    named = re.compile(rf"(?:^[ !$]*|`){word} ([^`\n]+)", re.MULTILINE)
    for page in [*PAGES, *NOTEBOOKS]:
        text = page.read_text(encoding="utf-8") if page.suffix == ".md" else "\n".join(cells(page))
        for match in named.finditer(text.replace("\\\n", " ")):
            found.append(pytest.param(match[1], id=f"{page.relative_to(ROOT)}: {match[1][:40]}"))
    return found


def app_of(name):
    """A command of `turboquant` alone."""
    (entry_point,) = entry_points(group="turboquant.commands", name=name)
    app = typer.Typer()
    app.command()(entry_point.load())
    return app


@pytest.fixture
def run_page(capsys):
    """Runs the Python of a page from top to bottom in one namespace, and gives what it printed."""

    def run(page, namespace):
        for block in blocks(DOCS.parent / page, "python"):
            exec(compile(block, page, "exec"), namespace)
        return capsys.readouterr().out

    return run


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Makes the folder where the Hub's files of a model would be."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def make(name):
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(snapshot.name, encoding="utf-8")
        return snapshot

    return make


@pytest.fixture
def hub_model(smollm2, hub, tmp_path, monkeypatch):
    """Puts SmolLM2 where the Hub would have put it, and works in an empty folder."""
    snapshot = hub(DEFAULT_HUB_ID)
    smollm2.model.save_pretrained(snapshot)
    smollm2.tokenizer.save_pretrained(snapshot)
    monkeypatch.chdir(tmp_path)
    generate = GenerationMixin.generate

    def generate_few(*arguments, **options):
        return generate(*arguments, **options | {"max_new_tokens": NEW_TOKENS})

    monkeypatch.setattr(GenerationMixin, "generate", generate_few)


@pytest.mark.real_weights
def test_the_quick_start_runs_as_written(run_page, hub_model, smollm2):
    ids = smollm2.tokenizer(article(), return_tensors="pt")["input_ids"][:, :SCORED_TOKENS]
    for page in ("README.md", "docs/quickstart-hf.md"):
        namespace = {"input_ids": ids}
        printed = run_page(page, namespace)
        assert "At 8,192 tokens: 3." in printed
    assert Path("prefix.safetensors").is_file()
    printed = run_page("docs/which-preset.md", namespace)
    assert [line.split()[0] for line in printed.splitlines()] == ["reference", "tq4", "k6v4", "k8v4"]


def test_doctor_and_plan_print_what_is_shown_of_them(hub):
    llama = LlamaConfig(
        num_hidden_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
    )
    llama.save_pretrained(hub("meta-llama/Llama-3.1-8B"))
    qwen = hub("Qwen/Qwen2.5-Coder-1.5B")
    Qwen2Config(num_hidden_layers=28, hidden_size=1536, num_attention_heads=12, num_key_value_heads=2).save_pretrained(
        qwen
    )
    biases = {
        f"model.layers.{layer}.self_attn.k_proj.bias": torch.full((256,), 200.0 if layer in (0, 1, 7, 15) else 0.1)
        for layer in range(28)
    }
    save_file(biases, qwen / "model.safetensors")

    def without_sizes_of_biases(text):
        return re.sub(r"up to [\d.]+, they alone put an error of [\d.]+ nats", "", " ".join(text.split()))

    shown = blocks(DOCS / "before-you-deploy.md", "text")
    assert len(shown) == 2
    for block in shown:
        command, said = block.split("\n", 1)
        name, *arguments = command.removeprefix("$ turboquant ").split()
        outcome = CliRunner().invoke(app_of(name), arguments, env={"COLUMNS": "100"})
        assert outcome.exit_code == 0, outcome.output
        said = said.replace("past_key_values=", f"{CACHE_ARGUMENT}=")
        assert without_sizes_of_biases(outcome.stdout) == without_sizes_of_biases(said)


def test_the_quick_start_of_core_prints_what_it_says(run_page):
    page = "docs/quickstart-core.md"
    said = [
        match[1]
        for block in blocks(ROOT / page, "python")
        for match in re.finditer(r"^print\(.*\)  # (.*)", block, re.M)
    ]
    torch.manual_seed(0)
    printed = run_page(page, {}).splitlines()
    assert len(printed) == len(said) > 5
    for line, comment in zip(printed, said, strict=True):
        assert comment.startswith(re.sub(r"^tensor\((.*)\)$", r"\1", line))


@pytest.mark.parametrize("arguments", commands("turboquant"))
def test_commands_of_turboquant_have_the_options_that_are_named(arguments):
    name, *rest = arguments.split()
    known = {option for parameter in typer.main.get_command(app_of(name)).params for option in parameter.opts}
    options = {word.strip("[],.") for word in rest if word.strip("[").startswith("--")}
    assert options <= known


@pytest.mark.parametrize("arguments", commands("nox -s"))
def test_sessions_and_scripts_are_there(arguments):
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    sessions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list}
    named, _, rest = arguments.partition(" -- ")
    words = [re.sub(r"\(.*\)", "", word.strip('"')) for word in named.split()]
    assert set(words) <= sessions
    if words == ["bench"] and rest and not rest.startswith("SCRIPT"):
        assert (ROOT / "benchmarks" / rest.split()[0]).is_file()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_cells_are_python(notebook):
    for cell in cells(notebook):
        ast.parse(python_of(cell))


def test_the_notebook_for_vllm_serves_as_the_quick_start_does():
    tree = ast.parse(python_of("\n".join(cells(DOCS / "notebooks" / "vllm.ipynb"))))
    quick_start = (DOCS / "quickstart-vllm.md").read_text(encoding="utf-8")
    namespace = {"json": json, "MODEL": "MODEL"}
    for node in tree.body:
        if isinstance(node, ast.Assign) and node.targets[0].id in ("SETTINGS", "UNCOMPRESSED", "OPTIONS", "COMPRESSED"):
            exec(compile(ast.Module([node], []), "vllm.ipynb", "exec"), namespace)
    assert f"{namespace['COMPRESSED']}\n" in quick_start
    assert namespace["COMPRESSED"].startswith(f"{namespace['UNCOMPRESSED']} ")


@pytest.mark.parametrize("package", ["core", "hf", "vllm"])
def test_the_architecture_names_every_module(package):
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    source = ROOT / "packages" / f"turboquant-{package}" / "src" / f"turboquant_{package}"
    modules = {path.stem for path in source.iterdir() if path.suffix in ("", ".py") and not path.name.startswith("__")}
    assert [name for name in sorted(modules) if f"`{name}`" not in page] == []
