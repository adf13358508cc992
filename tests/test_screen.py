"""What a person sees of a run: plain lines without a terminal, a live view with one, and the picture."""

import re
import subprocess
import sys
import xml.etree.ElementTree

import pytest

from llmtrain.display import view
from llmtrain.screen import Screen

LINE = {"loss": 2.34567, "lr": 1e-3, "grad_norm": 0.75, "tokens_per_second": 12_345.0, "step_seconds": 0.5}


@pytest.fixture
def written(capsys, monkeypatch):
    """What has been written since the last call; standard output is a pipe."""
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    return lambda: capsys.readouterr().out


@pytest.fixture
def drawn(capsys, monkeypatch):
    """What has been written since the last call; standard output is a terminal."""
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)  # pytest changes the object
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return lambda: capsys.readouterr().out


# A whole run


def tell_a_run(screen):
    """Everything that a run tells, in order."""
    screen.table("llmtrain train", [("model", "gpt_nano, 1.06M parameters"), ("data", "[some] text")])
    screen.begin(20, 0)
    screen.measured(10, LINE, 20)
    screen.evaluated(10, {"val_loss": 2.5, "val_bits_per_byte": 1.25})
    screen.measured(20, LINE | {"loss": 1.5}, 20)
    screen.end()
    screen.text("a sample at temperature 0.7", "def main([x]):\n    return")
    screen.say("Saved.")
    screen.table("finished after 20 steps", [("validation", "2.5 nats/token")])
    screen.close()


def test_without_a_terminal_there_are_plain_lines(written, tmp_path):
    screen = Screen()
    screen.keep_log(tmp_path / "log.txt")
    tell_a_run(screen)
    out = written()
    assert out.splitlines() == [
        "llmtrain train",
        "  model          gpt_nano, 1.06M parameters",
        "  data           [some] text",
        "step 10/20  loss 2.3457  lr 1.00e-03  grad norm 0.750  12.3k tokens/s  5.0 s left",
        "step 10  validation: loss 2.5000  bits_per_byte 1.2500",
        "step 20/20  loss 1.5000  lr 1.00e-03  grad norm 0.750  12.3k tokens/s  0.0 s left",
        "a sample at temperature 0.7",
        "def main([x]):",
        "    return",
        "Saved.",
        "finished after 20 steps",
        "  validation     2.5 nats/token",
    ]
    assert (tmp_path / "log.txt").read_text() == out  # the log holds the same


def test_long_lines_are_not_broken_without_a_terminal(written):
    screen = Screen()
    screen.say("x" * 300)
    screen.table("title", [("name", "word " * 60)])
    assert [len(line) for line in written().splitlines()] == [300, 5, 2 + 14 + 1 + 300]


def test_on_a_terminal_the_view_is_drawn_and_the_log_stays_plain(drawn, tmp_path):
    screen = Screen()
    screen.keep_log(tmp_path / "log.txt")
    tell_a_run(screen)
    out = drawn()
    assert "\x1b[" in out and "╭" in out and "training" in out
    assert "1.5000" in out and "20/20 steps" in out and "validation" in out
    assert "def main([x]):" in out and "[some] text" in out
    log = (tmp_path / "log.txt").read_text()
    assert "\x1b" not in log and "╭" not in log
    assert "step 20/20  loss 1.5000" in log and "Saved." in log


def viewed(screen):
    console = screen._drawing.console
    with console.capture() as capture:
        console.print(view(screen.standing))
    return re.sub(r"\x1b\[[0-9;]*m", "", capture.get())


def test_the_view_keeps_what_was_measured(drawn):
    screen = Screen()
    screen.standing.flops_per_step, screen.standing.peak = 4e12, 16e12
    screen.begin(20, 0)
    assert "under way" in viewed(screen)
    screen.measured(10, LINE, 20)
    screen.evaluated(10, {"val_loss": 2.5})
    screen.measured(20, LINE | {"loss": 1.5}, 20)
    shown = viewed(screen)
    screen.end()
    assert "1.5000" in shown and "█▁" in shown  # the curve of both losses
    assert "1.000e-03" in shown and "12.3k tokens/s" in shown and "MFU 50.0%" in shown  # 4 TFLOP in 0.5 s of 16 TFLOP/s
    assert "loss 2.5000  (step 10)" in shown and "so far" in shown


def test_utilization_is_told_where_the_peak_is_known(written):
    screen = Screen()
    screen.standing.flops_per_step, screen.standing.peak = 4e12, 16e12
    screen.begin(20, 0)
    screen.measured(10, LINE, 20)
    assert "MFU 50.0%" in written()


def test_a_line_is_in_the_log_as_soon_as_it_is_told(written, tmp_path):
    screen = Screen()
    screen.keep_log(tmp_path / "log.txt")
    screen.say("one")
    assert (tmp_path / "log.txt").read_text() == "one\n"
    screen.close()
    again = Screen()
    again.keep_log(tmp_path / "log.txt")  # a resumed run goes on in the same file
    again.say("two")
    again.close()
    assert (tmp_path / "log.txt").read_text() == "one\ntwo\n"


def test_preparing_shows_a_bar_on_a_terminal(drawn):
    screen = Screen()
    screen.preparing("reading", 10, 100)
    screen.preparing("tokenizing", 50, 100)
    screen.prepared()
    screen.prepared()  # a second time does no harm
    screen.close()
    out = drawn()
    assert "tokenizing" in out and "50%" in out


def test_preparing_is_quiet_without_a_terminal_unless_it_takes_long(written, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("llmtrain.screen.time.monotonic", lambda: now[0])
    screen = Screen()
    for done in range(0, 101, 10):
        screen.preparing("reading", done * 10**6, 100 * 10**6)
        now[0] += 0.4
    assert written() == ""
    for done in range(0, 101, 10):
        screen.preparing("tokenizing", done * 10**6, 100 * 10**6)
        now[0] += 3.0
    lines = written().splitlines()
    assert lines == [f"tokenizing: {share}% of 100MB" for share in (20, 40, 60, 80, 100)]


# The picture


def test_the_picture_is_an_svg_of_the_screen(written, tmp_path):
    path = tmp_path / "new folder" / "screen.svg"
    screen = Screen(str(path))
    tell_a_run(screen)
    root = xml.etree.ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    shown = "".join(root.itertext()).replace("\xa0", " ")
    for part in ("llmtrain train", "gpt_nano", "1.5000", "20/20 steps", "validation", "def main([x]):", "Saved."):
        assert part in shown, part


def test_no_picture_is_written_unless_asked_for(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tell_a_run(Screen())
    assert list(tmp_path.iterdir()) == []


def test_a_picture_changes_nothing_in_a_pipe(written, tmp_path):
    tell_a_run(Screen(str(tmp_path / "screen.svg")))
    assert "\x1b" not in written()


# Without


def test_a_quiet_one_shows_nothing(drawn, tmp_path):
    screen = Screen(quiet=True)
    screen.keep_log(tmp_path / "log.txt")
    tell_a_run(screen)
    assert drawn() == "" and "Saved." in (tmp_path / "log.txt").read_text()


def test_what_draws_is_not_loaded_where_nothing_is_drawn():
    code = "from llmtrain.screen import Screen; import sys; Screen().say('x'); print('rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "x\nFalse\n"
