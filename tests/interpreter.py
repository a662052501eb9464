"""Import this, and Triton kernels run without a GPU: by Triton's own interpreter, element by element in numpy.

Triton's own library of kernels is defined when it is first imported, so that must be here. What tests start as processes of
their own does not inherit it.
"""

from __future__ import annotations

import os

import torch

NAME = "TRITON_INTERPRET"


def _begin() -> None:
    inherited = os.environ.get(NAME)
    os.environ[NAME] = "1"
    try:
        import triton
    except ImportError:
        return
    finally:
        if inherited is None:
            del os.environ[NAME]
    triton.knobs.runtime.interpret = True


if not torch.cuda.is_available():
    _begin()
