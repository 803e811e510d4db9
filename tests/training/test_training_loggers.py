"""Figures on their way out: rows that are completed in place, counts for people, a bar that fits 80 columns."""

import io
import json

import pytest

from cairn.training.loggers import METRICS, FileLogger, ProgressLogger, drop_rows_after, read_rows, short

ROW = {"step": 12345, "tokens": 123_456_789, "loss": 12.345678, "tokens_per_second": 1_234_567.8, "seconds": 3.0}


def test_a_row_is_completed_in_place_and_read_whole_at_every_moment(tmp_path):
    logger = FileLogger(tmp_path)
    logger.row({"step": 1, "loss": 2.0})
    logger.row({"step": 2, "loss": 1.5}, awaits=True)
    assert list(read_rows(tmp_path / METRICS)) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}] and logger.awaits(2) and not logger.awaits(1)
    logger.observed(2, {"held-out/loss": 1.25})
    logger.row({"step": 3, "loss": 1.0}, awaits=True)
    logger.observed(3, {})
    logger.close()
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "held-out/loss": 1.25}, {"step": 3, "loss": 1.0}]


def test_a_row_that_waits_is_found_by_the_next_process(tmp_path):
    FileLogger(tmp_path).row({"step": 4}, awaits=True)
    drop_rows_after(tmp_path / METRICS, 4)
    again = FileLogger(tmp_path)
    assert again.awaits(4)
    again.observed(4, {"a/b": 1.0})
    assert list(read_rows(tmp_path / METRICS)) == [{"step": 4, "a/b": 1.0}]


@pytest.mark.parametrize(("count", "text"), [(0, "0"), (512, "512"), (5120, "5.12k"), (999_999, "1000k"), (1_234_567, "1.23M"), (3e9, "3B"), (0.5, "0.5")])
def test_counts_are_short_and_small_ones_show(count, text):
    assert short(count) == text


def test_the_bar_fits_80_columns(monkeypatch):
    from rich.console import Console

    logger = ProgressLogger(10**9, 0)
    logger._console = Console(file=io.StringIO(), width=80, force_terminal=True, highlight=False, color_system=None)
    logger.row(ROW)
    with logger._console.capture() as capture:
        logger._console.print(logger._progress.get_renderable())
    lines = [line for line in capture.get().splitlines() if line.strip()]
    assert len(lines) == 1 and len(lines[0].rstrip()) <= 80, lines
    assert "…" not in lines[0] and "step 12345" in lines[0] and "123M tokens" in lines[0] and "loss 12.346" in lines[0] and lines[0].count(":") >= 4
    logger.close()


def test_a_long_text_is_not_broken(capsys):
    logger = ProgressLogger(100, 0)
    logger.sample(1, 10, "a " * 60, "b" * 100)
    logger.close()
    assert "writes: '" + "a " * 60 + "b" * 100 + "'" in capsys.readouterr().err
