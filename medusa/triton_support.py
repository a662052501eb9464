"""Whether Triton kernels can run here. Knows no kernel."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
from functools import cache

logger = logging.getLogger(__name__)


@cache
def has_triton() -> bool:
    """Triton can be imported (CUDA builds of torch bring it), and finds the C compiler that it builds launchers with."""
    try:
        importlib.import_module("triton.language")
    except ModuleNotFoundError:
        return False
    except (ImportError, OSError) as error:
        logger.warning("Triton is installed but cannot be imported, so slower code serves: %s", error)
        return False
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        logger.warning("Triton needs a C compiler and finds none, so slower code serves; install gcc or set CC")
        return False
    return True
