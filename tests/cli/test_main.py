"""The command line as a whole: help, version, speed, and how it complains."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable

import pytest

from fedfuse import __version__
from fedfuse.cli import main
from tests.cli.stand_ins import Fake, Result

Run = Callable[..., Result]
HEAVY = ("torch", "flwr", "numpy", "matplotlib", "ray", "opacus", "rich")


@pytest.mark.parametrize(
    ("words", "example"),
    [
        (("--help",), "fedfuse simulate --epsilon 8"),
        (("simulate", "--help"), "fedfuse simulate --unit none"),
        (("predict", "--help"), "fedfuse predict runs/quickstart new.csv"),
        (("explain", "--help"), "fedfuse explain runs/quickstart"),
        (("export", "--help"), "fedfuse export runs/quickstart --int8"),
        (("data", "--help"), "check"),
        (("server", "--help"), "register"),
        (("server", "run", "--help"), "fedfuse server run srv"),
        (("data", "check", "--help"), "fedfuse data check clinic/manifest.csv"),
        (("data", "demo", "--help"), "fedfuse data demo demo"),
        (("doctor", "--help"), "fedfuse doctor"),
        (("models", "--help"), "fedfuse models --set model.dim=64"),
    ],
)
def test_each_command_has_help_with_an_example(
    run: Run, words: tuple[str, ...], example: str
) -> None:
    result = run(*words)
    assert result.code == 0
    assert example in result.out
    assert result.err == ""


def test_version_is_one_line(run: Run) -> None:
    assert run("--version") == Result(0, f"fedfuse {__version__}\n", "")


ENDS = """
import atexit, sys, threading, time
from fedfuse import cli

def late():
    time.sleep(0.3)
    print("a thread", flush=True)

def main():
    print("said")
    atexit.register(print, "at the end")
    if sys.argv[1] == "threads":
        threading.Thread(target=late).start()
    return 7

cli.main = main
cli.run()
"""


@pytest.mark.parametrize(
    ("word", "said"),
    [("alone", ["said", "at the end"]), ("threads", ["said", "a thread", "at the end"])],
)
def test_the_process_ends_when_all_is_said_and_written(word: str, said: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", ENDS, word], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split("\n")[:-1], done.stderr) == (7, said, "")


@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_version_and_help_load_nothing_heavy(flag: str) -> None:
    code = (
        "import sys\n"
        "from fedfuse.cli import main\n"
        f"code = main([{flag!r}])\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] 0"
    assert done.stderr == ""


def test_version_answers_at_once() -> None:
    def seconds() -> float:
        """Of processor time: a busy machine is no slow program."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ask = "import sys; from fedfuse.cli import main; sys.exit(main(['--version']))"
        subprocess.run([sys.executable, "-c", ask], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 0.3


@pytest.mark.parametrize(
    ("words", "code", "error", "hint"),
    [
        (("simulate", "--nodez", "3"), 2, "--nodez", "fedfuse simulate --help"),
        (("simulate", "--nodes", "x"), 2, "'x' is not a valid int", "fedfuse simulate --help"),
        (("simulate", "--unit", "planet"), 2, "'planet'", "fedfuse simulate --help"),
        (("simulate", "--engine", "mpi"), 2, "'mpi'", "fedfuse simulate --help"),
        (("simulate", "--epsilon", "0"), 2, "--epsilon 0", "--unit none"),
        (("simulate", "--epsilon", "None"), 2, "--epsilon None", "--unit none"),
        (("simulate", "--epsilon", "lots"), 2, "--epsilon lots", "--epsilon 8"),
        (("simulate", "--epsilon", "3", "--unit", "none"), 2, "unit none", "--unit record"),
        (("simulate", "--set", "rounds"), 2, "--set rounds", "train.rounds=5"),
        (("simulate", "--set", "train.roundz=3"), 3, "train.roundz", "rounds"),
        (("simulate", "--set", "nosuch.key=3"), 3, "nosuch", "train"),
        (("simulate", "--set", "train.rounds=many"), 3, "train.rounds = 'many'", ""),
        (("simulate", "--rounds", "0"), 3, "train.rounds = 0", ""),
        (("simulate", "--epsilon", "-2"), 3, "privacy.epsilon = -2", ""),
        (("simulate", "nosuch.toml"), 3, "nosuch.toml: no such file", "simulations/"),
        (("simulate", "--data", "nosuch.csv"), 4, "nosuch.csv: no such manifest", "--data"),
        (("simulate", "--data", "a.csv", "--demo-dir", "d"), 2, "--demo-dir", "leave one"),
        (("simulate", "--resume", "nosuch"), 8, "nosuch: no run is here", "config.toml"),
        (("simulate", "--resume", "r", "--rounds", "3"), 2, "--rounds", "--resume r"),
        (("simulate", "--resume", "r", "--set", "seed=3"), 2, "--set", "--resume r"),
        (("simulate", "--resume", "r", "s.toml"), 2, "SCENARIO.toml", "--resume r"),
        (("data", "check", "nosuch.csv"), 4, "nosuch.csv", ""),
        (("data", "check"), 2, "MANIFEST", "fedfuse data check --help"),
        (("nosuch",), 2, "nosuch", "fedfuse --help"),
    ],
)
def test_a_wrong_command_line_gives_one_clear_error(
    run: Run, federation: Fake, words: tuple[str, ...], code: int, error: str, hint: str
) -> None:
    result = run(*words)
    assert result.code == code
    assert result.out == ""
    first, *rest = result.err.rstrip("\n").split("\n")
    assert first.startswith("error: ")
    assert error in first
    assert all(line.startswith("hint: ") for line in rest)
    assert hint in "".join(rest)
    assert "Traceback" not in result.err
    assert federation.asked == []


def test_no_command_shows_the_help(run: Run) -> None:
    result = run()
    assert result.code == 2
    assert "Commands:" in result.err


def test_an_unexpected_exception_is_one_line_and_says_how_to_see_more(
    run: Run, federation: Fake
) -> None:
    federation.stop_with = ZeroDivisionError("a\nb")
    result = run("simulate", "--quiet")
    assert result.code == 1
    assert result.err == (
        "error: unexpected ZeroDivisionError: a b\n"
        "hint: set FEDFUSE_DEBUG=1 and run again to see where it comes from\n"
    )


def test_debug_shows_the_exception_itself(
    federation: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: pytest.TempPathFactory
) -> None:
    federation.stop_with = ZeroDivisionError("a")
    monkeypatch.setenv("FEDFUSE_DEBUG", "1")
    monkeypatch.chdir(str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        main(["simulate", "--quiet"])
