"""The command line of the scripts: text stays text, fire reads the flags, an error is one line.

Left alone, fire reads an argument as Python or as a flag: the prompts `2019`, `[1, 2]` and `--hello` would arrive as a
number, a list and an error. So texts are told from flags here, by the function's signature, and fire sees only flags.
"""

import contextlib
import difflib
import inspect
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable
from inspect import Parameter
from typing import NoReturn

import fire

from show.terminal import visible

HELP = ("-h", "--help")
SHARED_HELP = {  # of flags that most scripts have
    "--model_size": "124M     the model: a released one, a name in models_dir, a directory, or one of Hugging Face",
    "--models_dir": "models   where the models are",
}


def script() -> str:
    return os.path.basename(sys.argv[0])


def parameters(main: Callable) -> dict[str, Parameter]:
    return {f"--{name}": parameter for name, parameter in inspect.signature(main).parameters.items()}


def usage(main: Callable) -> str:
    """The usage line of `main`: its texts, and its flags with their defaults."""
    words = [f"usage: python {script()}"]
    for flag, p in parameters(main).items():
        value = p.default if p.default is not None else "TEXT" if p.annotation == str | None else "N"
        if p.default is Parameter.empty:
            words.append(flag[2:].upper() + " ..." * (p.kind is Parameter.VAR_POSITIONAL))
        else:
            words.append(f"[{flag}]" if isinstance(value, bool) else f"[{flag} {value}]")
    return " ".join(words)


def help_text(main: Callable) -> str:
    """The usage and the docstring of `main`, with the SHARED_HELP that it leaves out."""
    text = inspect.getdoc(main) or ""  # python -OO has none
    for flag, line in SHARED_HELP.items():
        if flag in usage(main) and f"{flag} " not in text:
            text += ("\n" if "\n--" in text else "\n\n") + f"{flag} {line}"
    return f"{textwrap.fill(usage(main), 100)}\n\n{text}"


def shortened(text: str) -> str:
    """`text` with … in the middle of words that nobody could read, and of all of it if that is too long."""
    text = re.sub(r"(\S{100})\S{100,}(\S{40})", r"\1…\2", text)
    return text if len(text) <= 2000 else f"{text[:1500]} … {text[-400:]}"


def refuse(main: Callable, problem: str) -> NoReturn:
    sys.exit(f"{script()}: {shortened(problem)}\n{usage(main)}")


def nearest(text: str, flags: Iterable[str]) -> str:
    """The one of `flags` that `text`, if it begins like one, may be meant to be, or nothing."""
    name = text.partition("=")[0]
    near = [flag for flag in flags if flag.startswith(name)] or difflib.get_close_matches(name, flags)
    return near[0] if near and name.startswith("--") and name != "--" else ""


def read_flags(main: Callable, argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """The values of the flags in `argv`, and the texts: all that is not exactly `--flag` or `--flag=value`."""
    flags, values, texts, rest = parameters(main), {}, [], list(argv)
    while rest:
        argument = rest.pop(0)
        flag, equals, value = argument.partition("=")
        if argument in HELP:
            print(help_text(main), flush=True)
            sys.exit()
        if flag not in flags:
            texts.append(argument)
            continue
        if isinstance(flags[flag].default, bool):
            if argument not in (flag, f"{flag}=True", f"{flag}=False"):
                refuse(main, f"{flag} is a switch and takes no value")
            value = value or "True"
        elif not equals:
            if not rest or rest[0] in HELP or rest[0].partition("=")[0] in flags:
                refuse(main, f"{flag} needs a value")
            value = rest.pop(0)
        values[flag] = value
    return values, texts


def sort_arguments(main: Callable, argv: list[str]) -> tuple[list[str], list[str]]:
    """Sort `argv` into the texts of `main`, in its order, and its flags, each as `--flag=value`.

    Parameters without a default are texts; `*texts` takes all that are left, at least one. What is wrong ends the run.
    """
    flags, (values, texts) = parameters(main), read_flags(main, argv)
    wanted = [flag for flag, parameter in flags.items() if parameter.default is Parameter.empty]
    missing = [flag for flag in wanted if flag not in values]
    if len(texts) < len(missing):
        refuse(main, f"{missing[len(texts)][2:].upper()} is missing")
    several = [flag for flag in missing if flags[flag].kind is Parameter.VAR_POSITIONAL]
    single = [flag for flag in missing if flag not in several]
    extra = texts[len(single) :]
    # A surplus text may be a misspelt flag, or the value of a misspelt flag before it.
    for text in extra if several else extra and texts:
        if (near := nearest(text, flags)) or (text.startswith("--") and not several):
            refuse(main, f"unknown flag {text.partition('=')[0]}" + (f": did you mean {near}?" if near else ""))
    if extra and not several:
        refuse(main, f"one argument too many, {extra[0]!r}: text of several words needs quotes around it")
    values |= dict(zip(single, texts, strict=False))
    texts = [values.pop(flag) for flag in wanted if flag in values] + extra
    return texts, [f"{flag}={value}" for flag, value in values.items()]


def choose(verbs: dict[str, Callable]) -> Callable:
    """The function of `verbs` that the first argument names, else that of the verb "", if there is one."""
    overview, verb = "usage, each with its own --help:", (sys.argv[1:] or [""])[0]
    for name, main in verbs.items():
        name = name or next(iter(parameters(main)))[2:].upper()
        does, *_ = (inspect.getdoc(main) or " ").splitlines()
        overview += f"\n    python {script()} {name:<12}{does}"
    near = difflib.get_close_matches(verb, filter(None, verbs))
    if verb in HELP:
        print(overview, end="\n\n" if "" in verbs else "\n", flush=True)
        if "" not in verbs:
            sys.exit()
    elif verb and verb in verbs:
        sys.argv[:2] = [f"{sys.argv[0]} {verb}"]  # from here on, the verb is part of the script's name
        return verbs[verb]
    elif "" not in verbs or (near and not os.path.exists(verb)):
        hint = f"did you mean {near[0]}?" if near else f"the first argument is one of {', '.join(verbs)}"
        problem = shortened(f"there is no {verb!r}" if verb else "what to do is missing")
        sys.exit(f"{script()}: {problem}: {hint}\n{overview}")
    return verbs[""]


def number(text: str) -> int | float | str | None:
    """`text` as a number, or None; what is neither stays text, for `main` to refuse."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return None if text == "None" else text


def call(main: Callable) -> None:
    """Call `main` with the command line's arguments; fire reads the flags."""
    texts, flags = sort_arguments(main, sys.argv[1:])
    parsers = {str: str, str | None: str, bool: "True".__eq__}
    parse = {flag[2:]: parsers.get(parameter.annotation, number) for flag, parameter in parameters(main).items()}
    fire.Fire(fire.decorators.SetParseFns(**parse)(lambda **values: main(*texts, **values)), command=flags)


def finish(status: int | str, last: str = "") -> NoReturn:
    """End the process; what standard output cannot take any more is dropped, or the interpreter would complain."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is ending already
    try:
        print(end=last, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def run(main: Callable | dict[str, Callable]) -> None:
    """Call `main`, or the function that the first argument names, and end the process: status 0, 1 or 130 (Ctrl-C)."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (it was closed before the start)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows ?
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as it is during the imports
            signal.signal(signal.SIGINT, signal.default_int_handler)
        call(choose(main) if isinstance(main, dict) else main)
        print(end="", flush=True)  # what a closed pipe or a full disk has to say, it says here
    except KeyboardInterrupt as error:
        finish(128 + (error.args or (signal.SIGINT,))[0], "\n")  # or another signal that is treated as Ctrl-C
    except BrokenPipeError:  # the reader of the pipe has seen enough
        finish(141)
    except (ValueError, OSError, ImportError, MemoryError, ArithmeticError) as error:
        finish(f"{script()}: {shortened(visible(' '.join(str(error).split()))) or 'not enough memory'}")
