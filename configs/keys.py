"""Prints the page of all configuration keys: `python -m configs.keys > docs/keys.md`."""

from collections.abc import Iterator

from configs.defaults import KEYS
from configs.kinds import Key, Kind, Registered, Section

_INTRODUCTION = """\
# Configuration keys

Made by `python -m configs.keys > docs/keys.md` from [`configs/defaults.py`](../configs/defaults.py). Every key can be
set on the command line (`--config.data.crop=321`; a tuple as `--config.data.scale="(0.5, 1.5)"`); recipes and methods
(`configs/`) set some of them. A value that a key does not accept is refused before anything runs.
"""


def page() -> str:
    """Returns the page, in Markdown."""
    sections = [_INTRODUCTION]
    for path, section in _sections(KEYS):
        lines = [
            f"## {path or 'run'}",
            "",
            section.text,
            "",
            "| key | default | values | meaning |",
            "|---|---|---|---|",
        ]
        lines += [_row(name, key) for name, key in section.items() if not isinstance(key, Section)]
        sections.append("\n".join(lines) + "\n")
    return "\n".join(sections)


def _sections(section: Section, path: str = "") -> Iterator[tuple[str, Section]]:
    """Yields (dotted path, section), each before the sections in it."""
    yield path, section
    for name, key in section.items():
        if isinstance(key, Section):
            yield from _sections(key, f"{path}.{name}".lstrip("."))


def _row(name: str, key: Key) -> str:
    values = f"{_describe(key.kind)}; {key.unit}" if key.unit else _describe(key.kind)
    cells = (f"`{name}`", f"`{key.default!r}`", values, key.text)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _describe(kind: Kind) -> str:
    if isinstance(kind, Registered):
        return f"a name in `{kind.registry.replace(':', '.')}`: {', '.join(kind.names())}"
    return str(kind)


if __name__ == "__main__":
    print(page(), end="")
