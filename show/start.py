"""What a script imports first, before all that is slow: Ctrl-C ends it without a traceback, and streams stay closed."""

import _signal  # signal itself takes 4 ms to import, in which Ctrl-C would have a traceback
import os

if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # until `cli.run`

import sys
import warnings
from collections.abc import Callable

# Where standard input, output or errors are closed, no file may get their numbers: what is printed would go into it.
while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
    os.set_inheritable(descriptor, True)
os.close(descriptor)


def run(main: Callable | dict[str, Callable]) -> None:
    """`cli.run`, imported late, and without the warnings of libraries beside its one line, unless Python has a -W."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    from show import cli

    cli.run(main)
