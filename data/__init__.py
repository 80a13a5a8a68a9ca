"""The data layer: packed shards in, batches of uint8 images out, in one exact order."""

import signal
import sys

# Ctrl-C in the imports of a command ends it without a traceback. `exits.interruptible` hears it.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
