"""Every key has a kind; values that are not of it are refused with one line that names the key."""

import functools
import math
import operator
import pathlib

import pytest

from configs import defaults, keys, kinds
from configs.checks import ConfigError, check_values
from configs.kinds import Key, Registered, Section

ROOT = pathlib.Path(__file__).parent.parent.parent
ODD = (
    None, True, "", "²", "\x1b[31m", "\udcff", "x" * 10**6, b"x", -1, 2**70, 10**5000, -1e300, math.inf, -math.inf,
    math.nan, (), (1,), (1, 2, 3, 4), ("a", "b"), ("a", "a"), (2.0, 1.0), ((1, 2), 3), (math.nan, math.nan),
    (math.inf, math.inf), (("decoder/", math.inf),), (("decoder/",),), (None, None), ([], {}), tuple("abc") * 100000,
    {}, {"a": 1}, [1, 2], object(),
)  # fmt: skip


def all_keys(section: Section = defaults.KEYS, path: str = "") -> list[tuple[str, Key]]:
    """Returns (dotted path, key) of every key."""
    pairs = []
    for name, key in section.items():
        at = f"{path}.{name}".lstrip(".")
        pairs += all_keys(key, at) if isinstance(key, Section) else [(at, key)]
    return pairs


def configure(path: str, value) -> dict:
    """Returns valid defaults with any value at `path`; a dict, as ConfigDict would convert some or refuse them."""
    config = defaults.get_config().to_dict()
    config["data"]["classes"] = ("a", "b")
    *sections, name = path.split(".")
    functools.reduce(operator.getitem, sections, config)[name] = value
    return config


@pytest.mark.parametrize(("path", "key"), all_keys())
def test_odd_values_of_every_key_are_accepted_or_named(path, key):
    assert key.text and "\n" not in key.text
    assert path == "data.classes" or key.kind.accepts(key.default)
    refused = 0
    for value in ODD:
        if key.kind.accepts(value):
            continue
        refused += 1
        with pytest.raises(ConfigError) as error:
            check_values(configure(path, value))
        message = str(error.value)
        assert message.startswith(f"config.{path} is ") and "; expected " in message
        assert "\n" not in message and len(message) < 500
    assert refused > len(ODD) / 2


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("seed", -1, "an integer from 0 to"),
        ("seed", 2**70, "an integer from 0 to"),
        ("data.mean", (0.5, 0.5), "3 values, each a number from 0 to 1"),
        ("data.std", (0.5,), "3 values"),
        ("data.std", (0.5, 0.5, 0.0), "3 values"),
        ("data.scale", ("a", "b"), "(least, greatest)"),
        ("data.scale", (0.5, math.inf), "(least, greatest)"),
        ("data.crop", 2**70, "an integer from 0 to 2048"),
        ("views.cutmix_area", (2, 5), "each a number from 0 to 1"),
        ("views.cutmix_aspect", (0, 0), "each a number from 0.01"),
        ("views.blur_sigma", (1, 1e6), "each a number from 0 to 16"),
        ("views.mix_partner", "others", "did you mean 'other'?"),
        ("optimizer.momentum", 5.0, "a number from 0 to 0.9999"),
        ("optimizer.power", -1.0, "a number from 0 to 100"),
        ("optimizer.lr", math.nan, "a number from 0"),
        ("optimizer.lr_mults", (("decoder/", (10.0,)),), "(text without control characters, a number from 0"),
        ("data.classes", ("a", "a"), "names, distinct and not empty"),
        ("data.root", "http://x", "a path of this machine"),
        ("data.root", "gs://x", "a path of this machine"),
        ("data.workers", True, "an integer from 0 to 256"),
    ],
)
def test_values_of_the_first_edition_that_ended_in_a_traceback(path, value, expected):
    with pytest.raises(ConfigError) as error:
        check_values(configure(path, value))
    assert expected in str(error.value)


def test_sections_are_complete_and_hold_nothing_else():
    config = defaults.get_config()
    config.data.classes = ("a", "b")
    check_values(config)
    with config.unlocked(), pytest.raises(ConfigError, match="config.data.shapes.sise.*did you mean 'size'"):
        config.data.shapes.sise = 3
        check_values(config)
    del config.data.shapes.sise, config.data.shapes.size
    with pytest.raises(ConfigError, match="config.data.shapes.size is missing"):
        check_values(config)
    with (
        config.ignore_type(),
        pytest.raises(ConfigError, match="config.data is 3; expected a section with the keys so"),
    ):
        config.data = 3
        check_values(config)


def test_registries_exist_and_hold_the_defaults():
    registered = [(path, key) for path, key in all_keys() if isinstance(key.kind, Registered)]
    assert {"model.encoder", "method.selection", "optimizer.name", "eval.metric"} <= {path for path, _ in registered}
    for path, key in registered:
        assert key.default in key.kind.names(), path


def test_the_page_of_keys_is_current():
    """If not: python -m configs.keys > docs/keys.md."""
    assert (ROOT / "docs/keys.md").read_text() == keys.page()


def test_paths():
    path = kinds.Path(kinds.STORAGE)
    assert all(map(path.accepts, ("", "a/b", "/a b/ü", "gs://bucket/run", "a/b://c", "~/x")))
    assert not any(map(path.accepts, ("http://x", "a://b", "://x", "s3://x", "file:///x", "a\nb", "\x00")))
