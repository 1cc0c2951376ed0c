"""The shape of the project: who imports whom, how long things are, and whether the documents tell the truth."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fewstep"
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))

MATHEMATICS = {"flow", "grids", "guidance", "solvers", "conditioning", "noise"}
BELOW = {"engine", "objectives", "models", "formats", "worlds", "data", "evaluate", "report"}
# Imports point down: each part may import itself, the mathematics, and what stands here.
MAY_IMPORT: dict[str, set[str]] = {
    **{name: set() for name in MATHEMATICS},
    "objectives": set(),
    "models": {"engine"},
    "formats": {"engine", "models"},
    "engine": set(),
    "worlds": {"engine"},
    "data": {"engine", "objectives", "worlds"},
    "evaluate": {"engine", "worlds"},
    "report": {"engine", "evaluate", "worlds"},
    "stages": BELOW,
    "serve": {"engine", "models", "formats", "worlds", "data", "evaluate", "report", "stages"},
    "study": {"engine", "worlds", "data", "evaluate", "report"},
    "recipes": {*BELOW, "stages", "serve", "study"},
    "commands": {*BELOW, "stages", "serve", "study", "recipes"},
    "cli": {"commands", "engine", "recipes"},
}
TORCH_ONLY = {*MATHEMATICS, "objectives"}
# Nothing is loaded by pickle (it runs code), and nothing reaches for the network by itself.
REFUSED = {"pickle", "dill", "joblib", "requests", "urllib", "http", "httpx", "socket", "wandb", "trackio"}

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_UPDATE_LINES = 400, 60, 80


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).with_suffix("").parts)


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full"
            whole = node.module or ""
            yield from (f"{whole}.{alias.name}" for alias in node.names) if whole == "fewstep" else [whole]


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{dotted(path)}.{node.name}", node


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function; its docstring does not count."""
    first, text = node.body[0], ast.get_docstring(node, clean=False)
    described = (first.end_lineno or 0) - first.lineno + 1 if text is not None else 0
    return (node.end_lineno or 0) - node.lineno + 1 - described


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_imports_point_down(path: Path) -> None:
    own = part(path)
    if own in ("__init__", "__main__"):
        return
    allowed = {own, *MATHEMATICS, *MAY_IMPORT[own], "__version__"}
    used = {name.split(".")[1] for name in imports(path) if name.startswith("fewstep.")}
    assert used <= allowed, f"{own} must not import {sorted(used - allowed)}"


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_outside_imports(path: Path) -> None:
    outside = {name.split(".")[0] for name in imports(path)} - {"fewstep"}
    assert not outside & REFUSED
    if part(path) in TORCH_ONLY:
        libraries = {"diffusers", "transformers", "numpy", "scipy", "PIL", "safetensors"}
        assert not outside & libraries, "the mathematics and the objectives need torch alone"


def test_torch_load_is_not_used() -> None:
    for path in FILES:
        assert "torch.load(" not in path.read_text(encoding="utf-8"), f"{path}: use safetensors"


@pytest.mark.parametrize("path", [*FILES, *TESTS], ids=dotted)
def test_files_and_functions_keep_their_budgets(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    for name, node in functions(path):
        lines = length(node)
        budget = MAX_UPDATE_LINES if node.name.endswith("update") else MAX_FUNCTION_LINES
        assert lines <= budget, f"{name} has {lines} lines, more than {budget}"


def members(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """What a module or class defines, by name."""
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
        elif isinstance(node, ast.Assign):
            found.update({t.id: node for t in node.targets if isinstance(t, ast.Name)})
    return found


def exists(name: str) -> bool:
    """Whether `grids.shift` or `objectives.distribution.Switches.delta` is defined in the package."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        path = PACKAGE.joinpath(*parts[:cut]).with_suffix(".py")
        if not path.is_file():
            continue
        body = tree(path).body
        for step in parts[cut:]:
            node = members(body).get(step)
            if node is None:
                return False
            body = node.body if isinstance(node, ast.ClassDef) else []
        return True
    return False


def ideas() -> list[dict[str, str]]:
    """Rows of the first table of PAPER.md, by column."""
    lines = (ROOT / "PAPER.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| idea"))
    heads = [cell.strip() for cell in lines[start].strip("|").split("|")]
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        assert len(cells) == len(heads), (
            f"PAPER.md: {len(cells)} cells instead of {len(heads)} (write bars as \\mid): {line}"
        )
        rows.append(dict(zip(heads, cells, strict=True)))
    return rows


# Where the settings of `--set a.b=value` are defined.
SETTINGS: dict[tuple[str, ...], tuple[str, ...]] = {
    (): ("recipes.pipeline.Distillation",),
    ("trajectory",): ("stages.trajectory.Config",),
    ("distribution",): ("stages.matching.Config", "objectives.distribution.Switches"),
    ("distribution", "adversary"): ("stages.adversary.Config",),
    ("distribution", "health"): ("engine.health.Config",),
    ("split",): ("stages.split.Config",),
    ("roles",): ("models.roles.Config",),
    ("merge",): ("stages.merge.Config",),
    ("teacher",): ("stages.teacher.Config",),
    ("evaluate",): ("stages.evaluate.Config",),
    ("encoders",): ("stages.encoders.Config",),
    ("gate",): ("stages.gate.Config",),
}


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_idea_in_the_paper_table_has_a_function_and_a_test_that_exist() -> None:
    rows = ideas()
    assert len(rows) >= 10
    for row in rows:
        assert code(row["function"]) and code(row["test"]), row["idea"]
        for name in code(row["function"]):
            assert exists(name), f"PAPER.md, {row['idea']}: fewstep has no {name}"
        for name in code(row["test"]):
            file, _, function = name.partition("::")
            path = ROOT / "tests" / f"{file}.py"
            assert path.is_file() and function in members(tree(path).body), (
                f"PAPER.md, {row['idea']}: no test {name}"
            )


def test_every_field_in_the_paper_table_exists() -> None:
    for row in ideas():
        for name in code(row["field"]):
            *owner, field = name.split(".")
            found = any(exists(f"{config}.{field}") for config in SETTINGS[tuple(owner)])
            assert found, f"PAPER.md, {row['idea']}: no setting {name}"


def tracked() -> set[str]:
    """Files under version control, or (in an unpacked archive) all files of the package and the tests."""
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
        return set(listed.stdout.splitlines())
    except (OSError, subprocess.CalledProcessError):
        return {
            p.relative_to(ROOT).as_posix() for top in ("fewstep", "tests") for p in (ROOT / top).rglob("*.py")
        }


def mapped() -> list[str]:
    """Paths of the map in README.md: the first word of each line of the block after the heading `Map`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## Map\n.*?```text\n(.*?)```", text, re.DOTALL)
    assert block, "README.md has no map"
    return [line.split()[0] for line in block.group(1).splitlines() if line.strip()]


def test_the_map_in_the_readme_is_true_and_whole() -> None:
    paths = mapped()
    assert len(paths) == len(set(paths))
    for path in paths:
        assert (ROOT / path).exists(), f"README.md: {path} does not exist"
    modules = {
        f
        for f in tracked()
        if f.startswith("fewstep/") and f.endswith(".py") and not f.endswith("__init__.py")
    }
    missing = sorted(modules - set(paths))
    assert not missing, f"README.md: the map lacks {missing}"


@pytest.mark.parametrize(
    "name", ["README.md", "PAPER.md", "CHANGELOG.md", "docs/LOG.md", "docs/bundled_teacher.md"]
    + [f"docs/{name}.md" for name in ("evaluation", "sidecars", "study", "inference", "serving", "deploy", "sd35")],
)
def test_links_to_files_lead_somewhere(name: str) -> None:
    document = ROOT / name
    for target in re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{name}: {target} does not exist"


def test_versions_are_pinned_for_what_is_required() -> None:
    def names(text: str) -> set[str]:
        return {name.lower() for name in re.findall(r'^\s*"?([A-Za-z0-9_-]+)(?:\[\w+\])?(?:>=|==)', text, re.MULTILINE)}

    required = names((ROOT / "pyproject.toml").read_text().split("[project.scripts]")[0]) - {"setuptools"}
    assert required == names((ROOT / "constraints.txt").read_text())


def test_sizes_of_the_bundled_teacher_are_as_documented() -> None:
    from fewstep.stages import autoencoder, teacher
    from fewstep.worlds.shapes.architecture import build

    pipe = build(teacher.Config().architecture, autoencoder.build(autoencoder.Config().channels), seed=0)
    networks = (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)
    sizes = [sum(p.numel() for p in network.parameters()) for network in networks]
    document = (ROOT / "docs/bundled_teacher.md").read_text(encoding="utf-8")
    for size in sizes:
        assert f"| {size:,} |" in document
    assert f"{sum(sizes) / 1e6:.1f} million weights" in document
