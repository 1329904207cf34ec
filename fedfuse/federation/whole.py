"""Becomes a program that ends whole: as soon as its main function does, or any thread by an error.

Flower's SuperNode does not: where the SuperLink answers 500, its process can stay and ask for
nothing any more, or give no sign of life, and nobody sees that another one is needed. Run as

    python -P -m fedfuse.federation.whole PROGRAM WORDS...
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
import traceback
from typing import NoReturn

__all__: list[str] = []


def _end(code: int) -> NoReturn:
    """Ends this process at once, whatever its other threads do."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _failed(what: threading.ExceptHookArgs) -> None:
    """A thread ended by an error."""
    threading.__excepthook__(what)
    if what.exc_type is not SystemExit:
        _end(1)


if __name__ == "__main__":
    del sys.argv[0]
    threading.excepthook = _failed
    status = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:  # None: the main function came back, for all that it should go on
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    _end(status)
