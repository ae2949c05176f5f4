"""Checks that links, files, modules, keys, flags and equations that the documentation names exist."""

import functools
import importlib
import importlib.util
import pathlib
import re

import pytest

from configs import checks, defaults
from dssn_jax import commands

ROOT = pathlib.Path(__file__).parent.parent
PAGES = {
    str(page.relative_to(ROOT)): page.read_text()
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
}
FOLDERS = ("configs", "input_pipeline", "dssn_jax", "experiments", "benchmarks", "tests", "launch", "docs")
SOURCES = [
    file
    for folder in ("configs", "input_pipeline", "dssn_jax", "experiments", "benchmarks", "tests", "launch")
    for file in sorted((ROOT / folder).rglob("*.*"))
    if file.suffix in (".py", ".sh") and file != pathlib.Path(__file__)
]
# Files that docs/extending.md tells the reader to write.
TO_BE_WRITTEN = {"configs/NAME.py", "configs/pets.py", "dssn_jax/models/patches.py", "dssn_jax/models/pointwise.py"}
NAMES = ("dssn", "supervised")  # Replacements for NAME in other paths.
SECTIONS = "|".join(key for key, value in defaults.get_config().items() if hasattr(value, "keys"))


def anchor(heading: str) -> str:
    """Returns the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@functools.cache
def headings(page: pathlib.Path) -> set[str]:
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return {anchor(heading) for heading in re.findall(r"^#+ (.+)$", prose, re.M)}


def command_lines(text: str) -> list[str]:
    """Returns the commands of the indented blocks, continued lines joined and comments removed."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    commands_ = [re.sub(r"\s#.*", "", line.strip().removeprefix("$ ")) for line in lines if line.startswith("    ")]
    return [line for line in commands_ if line.startswith(("python ", "make "))]


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if re.match(r"https?:", target):
            continue
        path, _, fragment = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert not fragment or fragment in headings(file.resolve()), target


@pytest.mark.parametrize("page", PAGES)
def test_files_and_modules_exist(page):
    paths = re.findall(rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)})/[\w/.-]*\w)", PAGES[page])
    paths = {path.replace("NAME", name) for path in {*paths} - TO_BE_WRITTEN for name in NAMES}
    assert not {path for path in paths if not (ROOT / path).exists()}
    for module in re.findall(r"python -m ((?:experiments|benchmarks|tests)[\w.]*\w)", PAGES[page]):
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize("page", PAGES)
def test_configuration_keys_exist(page):
    text = PAGES[page]
    keys = re.findall(r"--config\.([\w.]*\w)", text.replace("--config.KEY", ""))
    keys += [key for line in command_lines(text) for key in re.findall(rf"[ ']((?:{SECTIONS})\.[\w.]+)=", line)]
    for code in re.findall(r"`([^`\n]+)`", text):
        keys += re.findall(rf"^((?:{SECTIONS})\.(?!py\b|check\b)[\w.]*\w)", code)  # method.py, method.check: code.
    checks.check_keys([f"--config.{key}=" for key in keys], defaults.get_config())  # Raises ConfigError.


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/extending.md"])
def test_config_arguments_exist(page, tmp_path):
    (tmp_path / "classes.txt").write_text("a\nb\n")
    for name, argument in re.findall(r"configs/(\w+)\.py:([\w=,./]+)", PAGES[page]):
        argument = re.sub(r"root=[^,]+", f"root={tmp_path}", argument)
        importlib.import_module(f"configs.{name}").get_config(argument)  # Raises ConfigError.


@pytest.mark.parametrize("page", PAGES)
def test_flags_belong_to_their_mode(page):
    for line in command_lines(PAGES[page]):
        if not line.startswith("python main.py --"):
            continue
        mode = (re.findall(r"--mode=(\w+)", line) or ["train"])[0]
        known = {*commands.MODES[mode].flags, "mode", "coordinator", "processes", "process"}
        flags = {flag.partition(".")[0] for flag in re.findall(r" --([\w.]+)", line)}
        assert {flag if flag in known else flag.removeprefix("no") for flag in flags} <= known, line


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_compile(page):
    for code in re.findall(r"```python\n(.*?)```", PAGES[page], re.S):
        if not code.startswith("# configs/methods.py, in") and "at the top of" not in code:  # Entries of a dictionary.
            compile(code, page, "exec")


def test_make_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for page in PAGES:
        for line in command_lines(PAGES[page]):
            assert not line.startswith("make ") or line.split()[1] in targets, (page, line)


def test_code_cites_documents_that_exist():
    equations = set(re.findall(r"\\tag\{(\d+)\}", PAGES["docs/method.md"]))
    for file in SOURCES:
        text = re.sub(r"\s+#?\s*", " ", file.read_text())
        for path in re.findall(r"(?<![\w/])(docs/[\w/.]*\w)", text):
            assert (ROOT / path).exists() or "*" in path, f"{file}: {path}"
        for page, heading in re.findall(r'(docs/\w+\.md), "([^"]+)"', text):
            assert anchor(heading) in headings(ROOT / page), f"{file}: {page}, {heading}"
        assert set(re.findall(r"docs/method\.md, Eq\. (\d+)", text)) <= equations, file


def test_code_names_modules_that_exist():
    for file in SOURCES:
        for module in re.findall(r"-m ((?:benchmarks|experiments|tests)\.\w+)", file.read_text()):
            assert importlib.util.find_spec(module), f"{file}: {module}"


def test_readme_lists_every_data_set():
    for file in (ROOT / "configs").glob("*.py"):
        if re.search(r"^def get_config\(argument", file.read_text(), re.M):
            assert f"| `configs/{file.name}` |" in PAGES["README.md"]


def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 140
