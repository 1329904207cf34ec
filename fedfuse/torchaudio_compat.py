"""torchaudio also where its compiled extension cannot be loaded.

torchaudio's wheels on PyPI are linked to CUDA: beside a CPU build of torch its import raises
OSError. Resampling is pure torch, so a stand-in for the extension is enough for it. torchaudio.load
and save are never used here.
"""

from __future__ import annotations

import importlib
import sys
import threading
from types import ModuleType
from typing import Any

__all__ = ["load_torchaudio"]


_LOCK = threading.Lock()


def load_torchaudio() -> Any:
    """The torchaudio module, with its transforms and functional parts."""
    with _LOCK:
        return _load()


def _load() -> Any:
    try:
        torchaudio = importlib.import_module("torchaudio")
    except OSError:
        for name in [n for n in sys.modules if n.split(".")[0] == "torchaudio"]:
            del sys.modules[name]
        sys.modules["torchaudio._extension"] = _stand_in()
        torchaudio = importlib.import_module("torchaudio")
    importlib.import_module("torchaudio.transforms")
    importlib.import_module("torchaudio.functional")
    return torchaudio


def _stand_in() -> ModuleType:
    module: Any = ModuleType("torchaudio._extension")
    module.__path__ = []
    module._IS_TORCHAUDIO_EXT_AVAILABLE = False
    module._IS_ALIGN_AVAILABLE = False
    module._check_cuda_version = lambda: None
    module.fail_if_no_align = lambda function: function
    return module  # type: ignore[no-any-return]
