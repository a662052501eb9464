"""The outside: HTTP, Ray Serve and the command line. The only package that faces a client or a terminal."""

import os

# PyTorch's OpenMP, once loaded, lets idle threads keep a core for milliseconds that another program could use. Shorter here, in
# commands and servers, unless the user has a word to say.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
