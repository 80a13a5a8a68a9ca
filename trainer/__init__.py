"""Training and sampling."""

import os

import data  # noqa: F401  lets Ctrl-C in the imports end a command without a traceback

# Torch's C++ warns with stack traces when a peer ends: what is wrong is said by the watchdog. Torch
# reads this when it is imported.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# Triton 3.9 warns in every process that its default will change: a * b + c rounded once.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
