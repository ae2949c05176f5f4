"""Messages are safe to show, whatever names they quote."""

import os
import pickle

from input_pipeline.errors import DataError, UserError, first_names, printable


def test_printable():
    assert printable("my image, \u9053\u8def.png") == "my image, \u9053\u8def.png"
    assert printable("\x1b[31m\r\n\x9b\u202e\0") == r"\x1b[31m\r\n\x9b\u202e\x00"
    assert printable(os.fsdecode(b"caf\xe9.png")) == r"caf\xe9.png"
    assert printable("\ud800") == r"\ud800"
    long = printable("a" * 600 + "b" * 600, 100)
    assert long == "a" * 50 + "[...]" + "b" * 50


def test_messages_are_printable():
    for error in (UserError("\x1b[2J\nline 2"), pickle.loads(pickle.dumps(DataError("\x1b[2J\nline 2")))):
        assert str(error) == "\\x1b[2J\nline 2"
    assert first_names(["a\nb.png", "c", "d", "e"]) == r"a\nb.png, c, d and 1 more"
