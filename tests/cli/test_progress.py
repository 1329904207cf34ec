"""The live view, drawn to a string, and the choice between the views."""

from __future__ import annotations

import io

from rich.console import Console

from fedfuse.cli.progress import LineView, LiveView, progress
from fedfuse.config import RunConfig
from fedfuse.federation.observer import Silent
from tests.cli.stand_ins import info_of, record_of

PRIVATE = RunConfig(name="clinics")
OPEN = RunConfig(name="clinics").with_values({"privacy.unit": "none"})


def shown(view: LiveView) -> str:
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    with console.capture() as capture:
        console.print(view)
    return capture.get()


def played(config: RunConfig) -> LiveView:
    view = LiveView()
    view.prepared(info_of(config, rounds=3))
    for number in (1, 2):
        view.round_started(number)
        view.node_finished(number, "alpha", None)
        view.node_finished(number, "beta", "OSError" if number == 2 else None)
        view.round_finished(record_of(config, number, 3))
    return view


def test_live_view_says_something_before_the_run_is_prepared() -> None:
    assert "preparing" in shown(LiveView())


def test_live_view_shows_rounds_nodes_metrics_and_epsilon() -> None:
    text = shown(played(PRIVATE))
    assert "clinics: 2 nodes" in text
    assert "2/3" in text
    assert "●✗  2 of 2 in round 2" in text
    assert text.index("loss") < text.index("accuracy")
    assert "0.4  from 0.2 after round 1" in text
    assert "epsilon 4.00 of 8" in text
    assert "NOT PRIVATE" not in text


def test_live_view_of_an_unprotected_run_says_not_private() -> None:
    text = shown(played(OPEN))
    assert "NOT PRIVATE" in text
    assert "epsilon" not in text


def test_a_stream_that_is_no_terminal_gets_lines() -> None:
    with progress(quiet=False, stream=io.StringIO()) as view:
        assert isinstance(view, LineView)


def test_quiet_shows_nothing() -> None:
    stream = io.StringIO()
    with progress(quiet=True, stream=stream) as view:
        assert isinstance(view, Silent)
        view.prepared(info_of(PRIVATE, rounds=3))
        view.round_finished(record_of(PRIVATE, 1, 3))
    assert stream.getvalue() == ""
