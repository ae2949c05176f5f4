"""Tests; `tests.golden` is also the command that checks a folder of golden numbers."""
