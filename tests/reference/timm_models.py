"""Imports timm for tests, also where torchvision is missing: the encoders compared here use nothing of it."""

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types

import pytest


class _Placeholder(type):
    """A class whose attributes are their names."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Torchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds empty modules for torchvision and all below it; every name in them is a `_Placeholder`."""

    def find_spec(self, name, path=None, target=None):
        own = name.partition(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if own else None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: _placeholder(name)
        return module

    def exec_module(self, module):
        pass


def _placeholder(name: str) -> _Placeholder:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Placeholder(name, (), {})


def import_timm():
    """Returns the module timm, or skips the test that asks for it."""
    with contextlib.suppress(ImportError):
        import torchvision  # noqa: F401

        return pytest.importorskip("timm")
    finder = _Torchvision()
    sys.meta_path.append(finder)
    try:
        return pytest.importorskip("timm")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
