"""The data layer: packed shards in, batches of uint8 images out, in one exact order."""

import signal
import sys

# Ctrl-C during the imports of a command ends it silently; `exits.interruptible` handles it later.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
