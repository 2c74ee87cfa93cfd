"""Every script imports this module first: Ctrl-C then prints no traceback, and closed streams stay closed."""

import _signal  # importing signal itself takes 4 ms, in which Ctrl-C would print a traceback
import os

if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # until `cli.run` restores the handler

import sys
import warnings
from collections.abc import Callable

# If standard input, output or error is closed, no file may get its number, or prints would go into that file.
while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
    os.set_inheritable(descriptor, True)
os.close(descriptor)


def run(main: Callable | dict[str, Callable]) -> None:
    """`cli.run`, imported late. Warnings of libraries are hidden unless Python was started with -W."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    from show import cli

    cli.run(main)
