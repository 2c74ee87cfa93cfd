"""The command line of every script: fire calls the function, text stays text, and an error is one line.

Left alone, fire reads an argument as Python or as a flag: the prompts `2019`, `[1, 2]` and `--hello` would arrive as a
number, a list and an error. So arguments are sorted here, by the function's own signature, before fire sees them.
"""

import difflib
import inspect
import os
import sys
import textwrap
from collections.abc import Callable
from inspect import Parameter
from typing import NoReturn

import fire

HELP = ("-h", "--help")


def run(main: Callable) -> None:
    """Call `main` with the arguments of the command line and end the process.

    The status is 0, 1 after one line on standard error for what the user can mend, 130 after Ctrl-C. Parameters of
    `main` without a default are its texts, in order; the others are flags, and its docstring is the help.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows ?
    try:
        try:
            arguments = sort_arguments(main, sys.argv[1:])
            texts = [name for name, p in parameters(main).items() if p.annotation in (str, str | None)]
            fire.Fire(fire.decorators.SetParseFn(str, *texts)(main), command=arguments)
            print(end="", flush=True)  # what a closed pipe has to say, it says here
        except KeyboardInterrupt:
            print(flush=True)
            sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains as it ends
        sys.exit(141)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        sys.exit(f"{script()}: {error or 'not enough memory'}")


def sort_arguments(main: Callable, argv: list[str]) -> list[str]:
    """Sort `argv` into `--name=value` for each parameter of `main` that it sets.

    What is not exactly a flag, `--flag` or `--flag=value`, is text, whatever it starts with. Prints the help and exits
    if asked to; exits with status 1 and the usage for a missing, surplus or unknown argument.
    """
    flags = {f"--{name}": parameter for name, parameter in parameters(main).items()}
    values, texts, rest = {}, [], list(argv)
    while rest:
        argument = rest.pop(0)
        flag, equals, value = argument.partition("=")
        if argument in HELP:
            print(textwrap.fill(usage(main), 100), inspect.getdoc(main), sep="\n\n", flush=True)
            sys.exit()
        elif flag not in flags:
            texts.append(argument)
        elif isinstance(flags[flag].default, bool):
            if value not in ("", "True", "False") or (equals and not value):
                refuse(main, f"{flag} is a switch and takes no value")
            values[flag] = value or "True"
        elif equals:
            values[flag] = value
        elif not rest or rest[0] in HELP or rest[0].partition("=")[0] in flags:
            refuse(main, f"{flag} needs a value")
        else:
            values[flag] = rest.pop(0)
    wanted = [flag for flag, p in flags.items() if p.default is Parameter.empty and flag not in values]
    if len(texts) < len(wanted):
        refuse(main, f"{wanted[len(texts)][2:].upper()} is missing")
    if len(texts) > len(wanted):
        refuse(main, surplus(texts[len(wanted) :], texts, flags))
    return [f"{flag}={value}" for flag, value in (values | dict(zip(wanted, texts, strict=True))).items()]


def surplus(extra: list[str], texts: list[str], flags: dict[str, Parameter]) -> str:
    """Say what is wrong with `texts`, of which there are more than asked for: a misspelt flag, or missing quotes."""
    for text in texts:
        if text.startswith("--"):
            name = text.partition("=")[0]
            near = [flag for flag in flags if flag.startswith(name)] or difflib.get_close_matches(name, flags)
            return f"unknown flag {name}" + (f": did you mean {near[0]}?" if near else "")
    return f"one argument too many, {extra[0]!r}: text of several words needs quotes around it"


def usage(main: Callable) -> str:
    """The usage line of `main`, with the defaults of its flags."""
    words = [f"usage: python {script()}"]
    for name, parameter in parameters(main).items():
        if parameter.default is Parameter.empty:
            words.append(name.upper())
        elif isinstance(parameter.default, bool):
            words.append(f"[--{name}]")
        else:
            words.append(f"[--{name} {parameter.default}]")
    return " ".join(words)


def refuse(main: Callable, problem: str) -> NoReturn:
    sys.exit(f"{script()}: {problem}\n{usage(main)}")


def parameters(main: Callable) -> dict[str, Parameter]:
    return dict(inspect.signature(main).parameters)


def script() -> str:
    return os.path.basename(sys.argv[0])
