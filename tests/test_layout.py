"""The rules of the tree: what stands at the top, which way imports go, which names and calls no module may have."""

import ast
import importlib.util
import json
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("losses", "recipes", "train", "eval", "data_pipeline")
TOP_LEVEL = {*PACKAGES, "tests", "launch", "pyproject.toml", "README.md", "LICENSE"}

# What eval and data_pipeline may use of train.
FROM_TRAIN = {
    f"train.{name}"
    for name in (
        "backbones",
        "fused",
        "teachers",
        "groups",
        "checkpoint",
        "lora_switch",
        "attached_loras",
        "clips",
        "files",
        "entry",
        "sampling",
        "parallel",
        "cost",
    )
}
# Modules of ours that a package may import, each with everything below it.
MAY_IMPORT = {
    "losses": set(),
    "recipes": set(),
    "train": {"losses", "recipes", "train"},
    "eval": {"losses", "recipes", "eval", *FROM_TRAIN},
    "data_pipeline": {
        *("losses", "recipes", "data_pipeline"),
        *("eval.judges", "eval.records", "eval.robots", "eval.sandbox", "eval.vlm"),
        *FROM_TRAIN,
        *("train.tools", "train.tracking"),  # of its benchmark
    },
}
# Entry files that others build on: gdpo is the base of the other trainers, and the loop ends with an export.
BASES = {"train.gdpo", "train.export"}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in FILES.items()}


def imports(tree):
    """Every module that a file imports, anywhere in it; `from a import b` counts as a.b where that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{ast.unparse(node)}: imports are absolute here"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in FILES else node.module


def within(module, roots):
    return any(module == root or module.startswith(root + ".") for root in roots)


def is_entry(tree):
    return any(isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in tree.body)


def test_the_top_level_holds_nothing_else():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: untracked files of an unpacked archive say nothing")
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    tracked = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    top = {name.split("/")[0] for name in tracked if name}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


def test_imports_go_one_way():
    ours = {
        (name, module)
        for name, tree in TREES.items()
        for module in imports(tree)
        if module.split(".")[0] in (*PACKAGES, "tests")
    }
    assert not {(name, module) for name, module in ours if not within(module, MAY_IMPORT[name.split(".")[0]])}


def circles():
    """Nodes of every folder that import each other in a ring: a folder is one node, a loose file one of its own."""
    edges: dict[str, dict[str, set[str]]] = {}  # folder -> node -> nodes that it imports
    for name, tree in TREES.items():
        own = name.split(".")
        if FILES[name].name == "__init__.py":
            own.append("__init__")
        for module in imports(tree):
            if module not in FILES:
                continue
            other = [*module.split("."), *(["__init__"] if FILES[module].name == "__init__.py" else [])]
            common = next(depth for depth in range(len(own) + 1) if own[: depth + 1] != other[: depth + 1])
            if 0 < common < min(len(own), len(other)):
                nodes = edges.setdefault(".".join(own[:common]), {})
                nodes.setdefault(own[common], set()).add(other[common])
    for folder, nodes in edges.items():
        try:
            TopologicalSorter(nodes).prepare()
        except CycleError as error:
            yield folder, error.args[1]


def test_no_folder_of_a_package_holds_a_circle_of_imports():
    assert not list(circles())


def test_entry_files_are_leaves():
    entries = {name for name, tree in TREES.items() if is_entry(tree)}
    assert entries >= BASES | {"train.sft"}
    imported = {(name, module) for name, tree in TREES.items() for module in imports(tree) if module in entries}
    assert not {pair for pair in imported if pair[1] not in BASES}
    assert all(name.startswith("train.") for name, _ in imported)


def test_the_rule_sees_every_way_to_import():
    tree = ast.parse("import train.gdpo as g\ndef f():\n  from train import loop, backbones\n  import eval.judges.x")
    assert set(imports(tree)) == {"train.gdpo", "train.loop", "train.backbones", "eval.judges.x"}
    assert within("train.backbones.base", FROM_TRAIN) and not within("train.backbones_old", FROM_TRAIN)


def test_no_module_hides_a_standard_or_installed_one(tmp_path):
    """A script's own folder is first on the path: train/logging.py would be what every library imports as logging."""
    names = {part for module in FILES for part in module.split(".")[1:]}
    # Isolated and elsewhere, so that only the standard library and installed packages are found.
    search = (
        "import importlib.util, json, sys\n"
        "print(json.dumps([name for name in json.load(sys.stdin) if importlib.util.find_spec(name)]))"
    )
    found = subprocess.run(
        [sys.executable, "-I", "-c", search],
        input=json.dumps(sorted(names | {"torch", "nosuchmodule"})),
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    hidden = set(json.loads(found.stdout)) | (names & sys.stdlib_module_names) | (names & set(PACKAGES))
    assert hidden == {"torch"}  # which shows that the search works


def test_modules_and_functions_fit_on_few_pages():
    lines = {name: path.read_text(encoding="utf-8").count("\n") for name, path in FILES.items()}
    assert not {name: count for name, count in lines.items() if count > 400}
    functions = {
        f"{name}.{node.name}": node.end_lineno - node.lineno + 1
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {name: count for name, count in functions.items() if count > 80}
    assert functions["train.loop.fit"] < 70  # which every reader of the project reads


def test_every_option_of_a_command_is_described():
    calls = [(name, node) for name, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.Call)]
    options = [(name, call) for name, call in calls if ast.unparse(call.func).endswith(".add_argument")]
    assert len(options) > 60  # else they are made in another way
    bare = [f"{name}: {ast.unparse(call)}" for name, call in options if "help" not in {k.arg for k in call.keywords}]
    assert not bare


def test_no_module_is_a_drawer():
    drawers = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert not {module for module in FILES if drawers & set(module.split("."))}


def test_temporary_names_are_made_in_one_place():
    """Elsewhere two processes could meet at one name, or follow a link that somebody planted there."""
    names = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith(".tmp")
    }
    assert names == {"train.files"}


def forbidden(tree):
    """Calls and imports that must stand nowhere, as (line, what)."""
    for node in ast.walk(tree):
        what = None
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.path", "torch.load"):
            what = ast.unparse(node)
        elif isinstance(node, ast.Call):
            for keyword in node.keywords:
                refused = keyword.arg in ("trust_remote_code", "allow_pickle")
                if refused and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False):
                    what = ast.unparse(keyword)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names}
            modules = {node.module} if isinstance(node, ast.ImportFrom) else names
            if {module.split(".")[0] for module in modules} & {"pickle", "cPickle", "dill", "cloudpickle", "joblib"}:
                what = ast.unparse(node)
            elif isinstance(node, ast.ImportFrom) and (node.module, *names) in (("sys", "path"), ("torch", "load")):
                what = ast.unparse(node)
        if what:
            yield node.lineno, what


def test_no_path_edits_no_pickle_no_foreign_code():
    assert not [(name, *found) for name, tree in TREES.items() for found in forbidden(tree)]


@pytest.mark.parametrize(
    "line",
    [
        "sys.path.insert(0, '.')",
        "sys.path += ['.']",
        "from sys import path",
        "import pickle",
        "from pickle import loads",
        "torch.load(file, weights_only=True)",
        "load = torch.load",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=flag)",
        "numpy.load(file, allow_pickle=True)",
    ],
)
def test_the_rule_sees_what_it_forbids(line):
    assert list(forbidden(ast.parse(line)))


def test_the_rule_lets_its_names_be_mentioned():
    text = "'never trust_remote_code=True, torch.load( or pickle'\nload(name, trust_remote_code=False)\nimport torch"
    assert not list(forbidden(ast.parse(text)))


def folders():
    """Every folder of the packages with a Python file in it or below it."""
    parents = {folder for path in FILES.values() for folder in path.parents}
    return sorted(folder for folder in parents if folder.is_relative_to(ROOT) and folder != ROOT)


def is_plain_table(tree):
    """A docstring, imports, and assignments of a dict: how a judge or benchmark is registered, one line each."""
    return all(
        isinstance(node, ast.Import | ast.ImportFrom)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        or (isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict | ast.DictComp))
        for node in tree.body
    ) and any(isinstance(node, ast.Assign | ast.AnnAssign) for node in tree.body)


def test_packages_have_an_empty_init_or_a_plain_table():
    inits = {str(folder.relative_to(ROOT)): folder / "__init__.py" for folder in folders()}
    assert not [name for name, init in inits.items() if not init.exists()]
    trees = {name: ast.parse(init.read_text(encoding="utf-8")) for name, init in inits.items()}
    others = {name for name, tree in trees.items() if tree.body and not is_plain_table(tree)}
    assert others <= {"recipes", "train/backbones", "eval/judges", "eval/benchmarks"}


def test_test_folders_are_no_packages_and_test_files_have_names_of_their_own():
    assert not list((ROOT / "tests").rglob("__init__.py"))
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_the_packages_are_those_of_this_checkout():
    """An installed copy found first would make every other test one of the copy."""
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None and Path(next(iter(spec.submodule_search_locations))) == ROOT / package
