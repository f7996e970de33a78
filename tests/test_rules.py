"""The project's own rules: who may import whom, who may catch what, what must be explained."""

from __future__ import annotations

import ast
import importlib
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import load_task
from pipeline.config.section import Section
from pipeline.job_file import load_job

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")])
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
README = ROOT / "README.md"

LAYERS = [
    {"pipeline.errors", "pipeline.accounting", "pipeline.meter", "pipeline.wording"},
    {"pipeline.records"},
    {"pipeline.config"},
    {"pipeline.job_file", "pipeline.identity", "pipeline.counting", "pipeline.prices"},
    {
        "pipeline.ray_settings",
        "pipeline.signals",
        "pipeline.tokens",
        "pipeline.task",
        "pipeline.checks",
        "pipeline.imports",
        "pipeline.templates",
        "pipeline.schemas",
        "pipeline.conversations",
        "pipeline.tools",
        "pipeline.markup",
        "pipeline.segments",
        "pipeline.chunking",
        "pipeline.filesystems",
        "pipeline.storage",
        "pipeline.s3",
        "pipeline.parquet",
        "pipeline.receipt",
        "pipeline.plain_files",
    },
    {
        "pipeline.parts",
        "pipeline.merging",
        "pipeline.staging",
        "pipeline.batch_file",
        "pipeline.logs",
        "pipeline.reaper",
        "pipeline.attempts",
        "pipeline.lease",
        "pipeline.ledger",
        "pipeline.metrics",
    },
    {"pipeline.shards", "pipeline.model", "pipeline.engine", "jobs"},
    {"pipeline.plan", "pipeline.generate", "pipeline.schedule", "pipeline.repeats"},
    {"pipeline.lanes", "pipeline.retry"},
    {"pipeline.worker", "pipeline.source", "pipeline.publishing", "pipeline.progress"},
    {"pipeline.cluster", "pipeline.status", "pipeline.forecast"},
    {"pipeline.report"},
    {"pipeline.run"},
    {"pipeline.report.tables", "pipeline.verify", "pipeline.submit"},
    {"pipeline.cli"},
]
"""From the ground up: a module imports from its own layer and from those before it."""

ONLY_HERE = {
    "vllm": {"pipeline/engine/vllm.py"},
    "ray": {
        "pipeline/source.py",
        "pipeline/metrics.py",
        "pipeline/cluster.py",
        "pipeline/submit.py",
    },
    "torch": set(),
    "datasets": {"pipeline/staging.py"},
    "openai": {"pipeline/engine/http.py"},
    "s3fs": {"pipeline/s3.py"},
}
"""Heavy packages, each behind one door."""

NOT_FOR_JOBS = re.compile(
    r"(ray|vllm|torch|datasets|openai|fsspec|s3fs)(\.|$)"
    r"|pipeline\.(storage|s3|parquet|parts|merging|shards|plan|run|staging|source|worker|cluster|publishing|engine)(\.|$)"
)

CATCH_ALL = {
    "pipeline/cli.py:main",  # a bug: traceback and exit 1
    "pipeline/worker.py:_run_row",  # a bug in a task kind: that row's status
    "pipeline/report/reporter.py:_never_mind",  # a report that fails must not fail a run: the log
    "pipeline/forecast/sketch.py:_row",  # the same, where a plan tries a row
    "pipeline/tools.py:_outcome",  # a user's function may raise anything: the model is told
}
"""Where `except Exception` neither raises nor passes its error on."""


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports_of(path: Path) -> Iterator[str]:
    """Dotted names of all that `path` imports, inside functions too: `from a import b` is a.b."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(name: str) -> int | None:
    """Of a module, or of a name in one; None for other packages and for `pipeline` itself."""
    while name:
        for number, layer in enumerate(LAYERS):
            if name in layer:
                return number
        name = name.rpartition(".")[0]
    return None


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_imports_go_one_way(path: Path) -> None:
    if name_of(path) in ("pipeline", "pipeline.__main__"):
        return
    own = layer_of(name_of(path))
    assert own is not None, "give the module a place in LAYERS"
    upward = [name for name in imports_of(path) if (layer_of(name) or 0) > own]
    assert not upward


@pytest.mark.parametrize("package", ONLY_HERE)
def test_heavy_packages_have_one_door(package: str) -> None:
    importers = {
        label(path)
        for path in SOURCES
        if any(name.partition(".")[0] == package for name in imports_of(path))
    }
    assert importers == ONLY_HERE[package]


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=label)
def test_jobs_know_no_machinery(path: Path) -> None:
    assert not [name for name in imports_of(path) if NOT_FOR_JOBS.match(name)]


@pytest.mark.parametrize("path", sorted((ROOT / "pipeline").glob("*.py")), ids=label)
def test_machinery_names_no_task_kind(path: Path) -> None:
    """Neither imported nor a string of its own; kinds' names are common words otherwise. One is
    so common that reports need it: the prompt of any request."""
    kinds = [kind.stem for kind in (ROOT / "jobs").glob("[a-z]*.py") if kind.stem != "prompt"]
    imported = [name for name in imports_of(path) for kind in kinds if f"jobs.{kind}" in name]
    named = [
        f"line {token.start[0]}: {token.line.strip()}"
        for token in code_tokens(path)
        if token.type == tokenize.STRING and token.string.strip("\"'") in kinds
    ]
    assert not imported + named


def code_tokens(path: Path) -> Iterator[tokenize.TokenInfo]:
    """All tokens but comments and docstrings (any string that is a statement of its own)."""
    text = path.read_text(encoding="utf-8")
    docstrings = {
        node.lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_docstring = token.type == tokenize.STRING and token.start[0] in docstrings
        if token.type != tokenize.COMMENT and not is_docstring:
            yield token


def test_files_are_named_for_what_they_hold() -> None:
    empty_names = {"util", "utils", "helper", "helpers", "manager", "common", "misc"}
    assert not [label(path) for path in SOURCES if path.stem in empty_names]


def test_every_module_says_what_it_is() -> None:
    silent = [label(path) for path in SOURCES if not ast.get_docstring(tree_of(path))]
    assert not silent


def test_nobody_swallows_errors() -> None:
    places = {
        f"{label(path)}:{function}"
        for path in SOURCES
        for function, handler in handlers(tree_of(path))
        if catches_all(handler)
        and not any(isinstance(node, ast.Raise) for node in ast.walk(handler))
    }
    assert places == CATCH_ALL


def handlers(tree: ast.AST, function: str = "<module>") -> Iterator[tuple[str, ast.ExceptHandler]]:
    """Every `except`, with the name of the function that it stands in."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ExceptHandler):
            yield function, node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from handlers(node, node.name)
        else:
            yield from handlers(node, function)


def catches_all(handler: ast.ExceptHandler) -> bool:
    """True for `except:`, `except Exception`, `except BaseException`, alone or in a tuple."""
    if handler.type is None:
        return True
    names = {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)}
    return bool(names & {"Exception", "BaseException"})


def all_sections() -> list[type[Section]]:
    for path in SOURCES:
        if "Section" in path.read_text(encoding="utf-8") or path.parent.name == "jobs":
            importlib.import_module(name_of(path))

    def below(kind: type[Section]) -> Iterator[type[Section]]:
        for section in kind.__subclasses__():
            yield section
            yield from below(section)

    ours = {s for s in below(Section) if s.__module__.partition(".")[0] in ("pipeline", "jobs")}
    return sorted(ours, key=lambda section: section.__qualname__)


@pytest.mark.parametrize("section", all_sections(), ids=lambda section: section.__name__)
def test_every_key_is_explained(section: type[Section]) -> None:
    assert section.__doc__
    unexplained = [
        name
        for name, field in section.model_fields.items()
        if not field.description and name != "kind" and not is_section(field.annotation)
    ]
    assert not unexplained


def is_section(annotation: Any) -> bool:
    """A section explains itself; the key that holds it needn't."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_loads_and_says_what_it_is(path: Path) -> None:
    job = load_job(path)
    assert load_task(job, str(path)).kind == job.task["kind"]
    assert re.match(r"# \S.{20,}", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_holds_no_key_twice(path: Path) -> None:
    def check(node: yaml.Node | None) -> None:
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value]
            assert len(keys) == len(set(keys))
            for _, value in node.value:
                check(value)

    check(yaml.compose(path.read_text(encoding="utf-8")))


def test_there_are_configs() -> None:
    assert "demo.yaml" in {path.name for path in CONFIGS}


HEAVY = ("datasets", "pandas", "pyarrow", "ray", "torch", "transformers", "vllm")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip


def test_help_loads_nothing_heavy() -> None:
    code = f"""
import sys
from pipeline.cli import main
try:
    main(["--help"])
except SystemExit as end:
    assert not end.code
print("loaded:", [name for name in {HEAVY!r} if name in sys.modules])
"""
    assert run_python(code).stdout.splitlines()[-1] == "loaded: []"


def test_a_job_file_is_checked_without_ray_and_torch() -> None:
    code = """
import sys
from pathlib import Path
from jobs import load_task
from pipeline.job_file import load_job
load_task(load_job(Path("configs/demo.yaml")))
print("loaded:", [name for name in ("ray", "torch", "vllm", "datasets") if name in sys.modules])
"""
    assert run_python(code).stdout.strip() == "loaded: []"


def subcommands() -> list[str]:
    """As `axbatch --help` lists them."""
    out = run_python("from pipeline.cli import main; main(['--help'])").stdout
    listing = out.partition("COMMAND\n")[2].partition("\n\n")[0]
    return re.findall(r"^    ([a-z]+) ", listing, flags=re.MULTILINE)


def test_every_command_answers_help() -> None:
    commands = subcommands()
    assert {"validate", "plan", "run", "status", "verify", "submit"} <= set(commands)
    for command in commands:
        out = run_python(f"from pipeline.cli import main; main([{command!r}, '--help'])").stdout
        assert out.startswith(f"usage: axbatch {command}")
        assert "JOB.yaml" in out


@pytest.mark.skipif(not README.is_file(), reason="there is no README.md yet")
def test_every_path_in_the_readme_exists() -> None:
    paths = tree_paths(README.read_text(encoding="utf-8"))
    assert paths, "the README shows no annotated tree of the repository"
    assert not [path for path in paths if not (ROOT / path).exists()]


DRAWN = re.compile(r"([\s│├└─]*)([\w.*<>{}-][\w./*<>{}-]*)(?=\s|$)")
"""A line of a drawn tree: what stands before the name, and the name."""


def tree_paths(markdown: str) -> list[str]:
    """Paths in the drawn trees of the repository: code blocks with several lines that begin with
    a folder. Depth is where the name begins. Names with a wildcard, and output folders, are not
    the repository's."""
    paths: list[str] = []
    for block in re.findall(r"```\w*\n(.*?)```", markdown, re.DOTALL):
        lines = [entry for line in block.splitlines() if (entry := DRAWN.match(line))]
        folders = [entry for entry in lines if entry.group(2).endswith("/")]
        if len(folders) < 2 or lines[0].group(2).startswith("out/"):
            continue
        parents: list[tuple[int, str]] = []
        for entry in lines:
            depth, name = len(entry.group(1)), entry.group(2)
            while parents and parents[-1][0] >= depth:
                parents.pop()
            path = "".join(parent for _, parent in parents) + name
            if name.endswith("/"):
                parents.append((depth, name))
            if not re.search(r"[*<>{}]|^\.+$", name):
                paths.append(path.removeprefix("axbatch/"))
    return [path for path in paths if path]


def test_tree_paths() -> None:
    markdown = """
```
axbatch/
├── pipeline/       the machine
│   ├── cli.py      the command
│   └── engine/
│       └── vllm.py
└── Makefile
```
```yaml
name: x
```
```
jobs/       task kinds
  one.py    a kind
  <yours>.py
configs/    job files
```
"""
    assert tree_paths(markdown) == [
        "pipeline/", "pipeline/cli.py", "pipeline/engine/", "pipeline/engine/vllm.py", "Makefile",
        "jobs/", "jobs/one.py", "configs/",
    ]  # fmt: skip


@pytest.mark.parametrize("path", ["jobs/classify.py", "configs/classify-messages.yaml"])
def test_guide_shows_the_files_as_they_are(path: str) -> None:
    assert f"\n{(ROOT / path).read_text(encoding='utf-8').strip()}\n```" in README.read_text(
        "utf-8"
    )


def test_readme_shows_the_demos_job() -> None:
    shown = README.read_text("utf-8").partition("```yaml\n")[2].partition("```")[0]
    assert yaml.safe_load(shown) == yaml.safe_load((ROOT / "configs/demo.yaml").read_text("utf-8"))
