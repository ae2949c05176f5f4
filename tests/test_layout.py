"""The packages import one another in one direction, and what must be importable without JAX is."""

import ast
import graphlib
import importlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# From the bottom up: a module imports from its own floor or from those below it.
FLOORS = (
    ("input_pipeline",),
    ("configs",),
    ("sharding", "compiler", "distributed", "visualize"),
    ("models",),
    ("methods",),
    ("learner",),
    ("validate", "auto_config"),
    ("workdir",),
    ("weights", "evaluation", "prepare"),
    ("training",),
    ("report",),
    ("commands",),
    ("main",),
    ("experiments",),
    ("tests",),
    ("benchmarks",),
)
HEIGHT = {name: floor for floor, names in enumerate(FLOORS) for name in names}
PRODUCT = ("input_pipeline", "configs", "dssn_jax")


def modules(*folders: str) -> dict[str, pathlib.Path]:
    """Returns the modules in `folders` of the repository: dotted name -> file."""
    files = sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def package(module: str) -> str:
    """Returns the name in FLOORS that `module` belongs to; "dssn_jax" for the package's own __init__."""
    first, *rest = module.split(".")
    return rest[0] if first == "dssn_jax" and rest else first


def imports(file: pathlib.Path) -> set[str]:
    """Returns the dotted names that `file` imports, in functions too; `from a import b` counts as a.b."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def arrows() -> set[tuple[str, str]]:
    """Returns the pairs (module, imported name) of imports within the repository, between packages."""
    files = modules(*PRODUCT, "experiments", "benchmarks") | {"main": ROOT / "main.py"}
    ours = {*PRODUCT, "experiments", "benchmarks", "tests", "main"}
    pairs = {(module, name) for module, file in files.items() for name in imports(file) if name.split(".")[0] in ours}
    return {(module, name) for module, name in pairs if package(module) != package(name)}


def test_imports_run_down():
    upward = [
        f"{module} imports {name}"
        for module, name in sorted(arrows())
        if package(name) not in HEIGHT or HEIGHT[package(module)] < HEIGHT[package(name)]
    ]
    assert not upward, "\n".join(upward)


def test_packages_import_without_cycles():
    graph = {}
    for module, name in arrows():
        graph.setdefault(package(module), set()).add(package(name))
    graphlib.TopologicalSorter(graph).prepare()  # Raises CycleError with the cycle.


def test_networks_know_no_devices():
    names = {name for file in modules("dssn_jax/models").values() for name in imports(file)}
    assert not [
        name for name in names if name.startswith(("dssn_jax.sharding", "dssn_jax.distributed", "jax.sharding"))
    ]


def test_data_and_configurations_import_no_jax():
    for module, file in modules("input_pipeline", "configs").items():
        assert not {name.split(".")[0] for name in imports(file)} & {"jax", "jaxlib", "flax", "orbax"}, module
    code = f"import importlib, sys\nfor name in {list(modules('configs'))}: importlib.import_module(name)\n"
    code += "assert not {'jax', 'grain', 'orbax', 'tensorflow'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.slow
def test_a_run_imports_neither_pytorch_nor_a_client_of_an_object_store():
    """Even where they are installed: importing PyTorch takes as long as the rest of the start."""
    code = "import sys, dssn_jax.training.loop\nassert not {'torch', 'google.cloud.storage'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("module", modules(*PRODUCT))
def test_module_imports(module):
    importlib.import_module(module)


@pytest.mark.slow
def test_scripts_import():
    """In a process of their own: they set environment variables."""
    code = f"import importlib\nfor name in {list(modules('experiments', 'benchmarks'))}: importlib.import_module(name)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
