"""The ground floor: errors become sentences and exit codes; numbers and tables read the same in all commands."""

from __future__ import annotations

import pytest

import command_line
from command_line import Failure, UsageError, duration, error_text, guarded, labelled, short, text_table
from data.token_dataset import DatasetError
from training.checkpoint import CheckpointError


@pytest.mark.parametrize(
    "error, code, said",
    [
        (UsageError("a is wrong.\nb is wrong."), 2, "x.py: a is wrong.\nx.py: b is wrong.\n"),
        (Failure("The disk is full."), 1, "x.py: The disk is full.\n"),
        (DatasetError("train.bin is missing."), 1, "x.py: train.bin is missing.\n"),
        (CheckpointError("It is damaged."), 1, "x.py: It is damaged.\n"),
        (OSError("No space left"), 1, "x.py: No space left\n"),
        (MemoryError(), 1, "x.py: " + command_line.OUT_OF_MEMORY + "\n"),
        (KeyError("n"), 1, "x.py: KeyError: 'n' (--debug shows where)\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_exception_becomes_its_sentence_and_exit_code(error, code, said, capsys):
    def job():
        raise error

    assert guarded("x.py", [], job) == code
    assert capsys.readouterr().err == said
    if isinstance(error, Exception):
        with pytest.raises(type(error)):
            guarded("x.py", ["--debug"], job)


def test_what_nobody_expected_keeps_its_type_and_what_is_expected_does_not():
    assert error_text(ZeroDivisionError("division by zero"), "") == "ZeroDivisionError: division by zero (--debug shows where)"
    assert error_text(DatasetError("no text"), "") == "no text"


def test_a_table_is_as_wide_as_its_cells_and_pads_no_line():
    lines = text_table(("name", "N", "about"), [("a", 12345, "x"), ("longer", 7, "a long text")], "lrl").split("\n")
    assert lines == [
        "name        N  about",
        "------  -----  -----",
        "a       12345  x",
        "longer      7  a long text",
    ]
    assert text_table(("k", "a", "b"), [("x", 10, 200)]).split("\n") == ["k   a    b", "-  --  ---", "x  10  200"]
    assert labelled([("model", "m"), ("", "second line")]) == "model      m\n           second line"


@pytest.mark.parametrize("number", [0.5, 1, 999, 1e3, 123456, 362_800, 1_294_159_104, 8.341e12, -2.5e6])
def test_a_short_number_is_the_number_to_four_digits(number):
    text = short(number)
    factor = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1], 1)
    assert float(text.rstrip("KMBT")) * factor == pytest.approx(number, rel=5e-4)
    assert len(text) <= 7 and short(None) == "–"


@pytest.mark.parametrize("seconds", [0, 45, 59, 61, 599, 601, 3599, 3601, 86399, 86401, 2e6])
def test_a_duration_is_the_time_to_two_digits(seconds):
    amount, unit = duration(seconds).split()
    size = {"s": 1, "min": 60, "h": 3600, "days": 86400}[unit]
    assert float(amount) * size == pytest.approx(seconds, rel=0.05, abs=0.5)
