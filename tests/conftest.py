"""What holds for all tests."""

from __future__ import annotations

import signal
import threading

# Where the suite runs in the background it ignores Ctrl-C, and so would every process that a test
# starts, also those that it stops by that signal.
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    and threading.current_thread() is threading.main_thread()
):
    signal.signal(signal.SIGINT, signal.default_int_handler)
