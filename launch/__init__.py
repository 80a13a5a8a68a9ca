"""The login node's tool, which needs Python alone."""

import data  # noqa: F401  lets Ctrl-C in the imports end a command without a traceback
