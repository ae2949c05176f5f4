"""Requirements: the versions that were tested, and what may be missing."""

import pathlib
import re
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from configs.checks import ConfigError
from dssn_jax import commands
from dssn_jax.workdir import restore

ROOT = pathlib.Path(__file__).parents[1]


def required(file):
    lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-r")]


def test_the_lock_has_a_version_in_the_range_of_every_requirement():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert lines[0].startswith("# ") and all(re.fullmatch("[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines[1:])
    locked = {line.partition("==")[0].lower().replace("_", "-"): line.partition("==")[2] for line in lines[1:]}
    for requirement in required("requirements.txt") + required("requirements-dev.txt"):
        version = locked[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), f"{requirement}: {version} in requirements.lock; make lock"


def test_the_extra_for_buckets_is_what_the_tests_install():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extra,) = map(Requirement, project["optional-dependencies"]["gcs"])
    assert [str(each) for each in required("requirements-dev.txt") if each.name == extra.name] == [str(extra)]
    assert extra.name not in {each.name for each in required("requirements.txt")}


def test_a_bucket_without_its_package_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # As if it were not installed.
    message = 'gs://bucket/run is on a bucket, which needs gcsfs: pip install "dssn-jax[gcs]" or pip install gcsfs'
    assert commands.run(["--config=configs/shapes.py", "--workdir=gs://bucket/run"]) == 1
    assert capsys.readouterr().err == f"error: {message}\n"
    with pytest.raises(ConfigError, match=re.escape(message)):
        restore.restore("gs://bucket/run")
