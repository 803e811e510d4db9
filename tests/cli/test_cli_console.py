"""What commands print fits the terminal that shows it, and is plain elsewhere."""

import pytest

from cairn.cli import console

COLUMNS = ("checkpoint", "tokens", "task", "metric", "value", "stderr", "n", "chance")
ROW = ("step-00005000", 123_456_789, "held-out", "bits_per_byte", 1.23456, 0.001, 256, None)


@pytest.mark.parametrize("columns", [80, 60, 40, 20])
@pytest.mark.parametrize("rows", [[ROW], [ROW, ("/a/very/long/path/without/any/blank/in/it/at/all/step-00005000", *ROW[1:])]], ids=["short", "long"])
def test_a_table_fits_the_terminal_and_loses_nothing(monkeypatch, capsys, columns, rows):
    monkeypatch.setattr(console, "width", lambda: columns)
    console.table(COLUMNS, rows)
    said = capsys.readouterr().out
    whole = "".join(said.split())
    assert all("".join(str(row[0]).split()) in whole for row in rows) and "1.2346" in whole and "…" not in said
    assert all(len(line) <= columns for line in said.split("\n")) or all(len(line) <= columns or " " not in line.strip() for line in said.split("\n"))


def test_long_values_go_on_under_their_beginning(monkeypatch, capsys):
    monkeypatch.setattr(console, "width", lambda: 40)
    console.values({"digest": "a" * 10, "relation": "one two three four five six seven eight nine ten"})
    lines = capsys.readouterr().out.rstrip().split("\n")
    assert lines[0] == "digest    aaaaaaaaaa" and all(line.startswith(" " * 10) for line in lines[2:]) and all(len(line) <= 40 for line in lines)


def test_a_file_or_a_pipe_gets_plain_columns(capsys):
    console.table(("name", "what"), [("a", "[red]no markup[/red]"), ("longer", None)])
    assert capsys.readouterr().out == "name    what\n------  --------------------\na       [red]no markup[/red]\nlonger  -\n"


def test_json_says_numbers_of_numpy_and_what_is_not_finite():
    np = pytest.importorskip("numpy")
    assert console.plain({"a": np.int64(3), "b": np.float32(0.5), "c": float("nan"), "d": (1, {2}), "e": console.StateChoice.optimizer}) == {
        "a": 3, "b": 0.5, "c": None, "d": [1, [2]], "e": "optimizer"}  # fmt: skip
