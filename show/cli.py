"""The command line of all scripts: texts and flags are told apart, fire reads the flags, and an error is one line.

Left alone, fire reads an argument as Python code or as a flag: the prompts `2019` and `[1, 2]` would become a number
and a list. So the signature of a script's function tells which arguments are texts, and fire sees only the flags.
"""

import dataclasses
import difflib
import importlib.metadata
import inspect
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable
from inspect import Parameter
from typing import NoReturn

import fire

from show import __version__
from show.terminal import visible

HELP, VERSION = ("-h", "--help"), ("-V", "--version")
SHORT_FLAGS = {"-n": "--n_tokens_to_generate", "-m": "--model_size", "-t": "--temperature", "-s": "--seed"}
LOOKS_LIKE_A_FLAG = re.compile(r"--[^\W\d_]\S*")
SHARED_HELP = {  # of flags that most scripts have
    "--model_size": "124M     the model: a released one, a name in models_dir, a directory, or one on Hugging Face",
    "--models_dir": "DIR      where models are kept",
}


def script() -> str:
    return os.path.basename(sys.argv[0])


def parameters(main: Callable) -> dict[str, Parameter]:
    """The parameters of `main` by their flags. `**settings: Settings` stands for the fields of Settings."""
    found = {}
    for name, parameter in inspect.signature(main).parameters.items():
        if parameter.kind is Parameter.VAR_KEYWORD:
            for field in dataclasses.fields(parameter.annotation):
                options = {"default": field.default, "annotation": field.type}
                found[f"--{field.name}"] = Parameter(field.name, Parameter.KEYWORD_ONLY, **options)
        else:
            found[f"--{name}"] = parameter
    return found


def described_flags(main: Callable) -> str:
    """The docstring of `main`, with the SHARED_HELP that it leaves out; python -OO has no docstrings."""
    text = inspect.getdoc(main) or ""
    for flag, line in SHARED_HELP.items():
        parameter = parameters(main).get(flag)
        if parameter and parameter.default is not Parameter.empty and f"\n{flag} " not in text:
            text += ("\n" if "\n--" in text else "\n\n") + f"{flag} {line}"
    return text


def usage(main: Callable) -> str:
    """The usage line of `main`: its texts, and its flags with their defaults or with what their values are."""
    words = [f"usage: python {script()}"]
    values = dict(re.findall(r"^(--\w+) (\S+)", described_flags(main), re.MULTILINE))
    for flag, p in parameters(main).items():
        if p.default is Parameter.empty:
            words.append(flag[2:].upper() + " ..." * (p.kind is Parameter.VAR_POSITIONAL))
        elif isinstance(p.default, bool):
            words.append(f"[{flag}]")
        else:
            words.append(f"[{flag} {values.get(flag, 'VALUE') if p.default is None else p.default}]")
    return " ".join(words)


def help_text(main: Callable) -> str:
    """The usage and the docstring of `main`, in which each flag that has a short name is shown with it."""
    short_names = {flag: short for short, flag in SHORT_FLAGS.items()}
    lines = []
    for line in described_flags(main).splitlines():
        short = short_names.get(line.split(" ")[0])
        lines.append(f"{short}, {line}" if short else f"    {line}" if line.startswith(("--", " ")) else line)
    return "\n".join([textwrap.fill(usage(main), 100), "", *lines])


def shortened(text: str) -> str:
    """`text` with … in the middle of very long words, and in the middle of the text if it is still too long."""
    text = re.sub(r"(\S{100})\S{100,}(\S{40})", r"\1…\2", text)
    return text if len(text) <= 2000 else f"{text[:1500]} … {text[-400:]}"


def refuse(problem: str, usage_text: str) -> NoReturn:
    """End the run with what is wrong with its arguments, and the exit status for wrong usage."""
    print(f"{script()}: {shortened(visible(problem))}\n{usage_text}", file=sys.stderr)
    sys.exit(2)


def answer_help_or_version(argument: str, help_text: str) -> None:
    """If `argument` asks for the help or the version, print it and end the run."""
    if argument in HELP + VERSION:
        python, numpy = sys.version.split()[0], importlib.metadata.version("numpy")
        version = f"gpt2-numpy {__version__} (Python {python}, NumPy {numpy})"
        print(help_text if argument in HELP else version, flush=True)
        sys.exit()


def flag_of(argument: str) -> str:
    """The flag that `argument` begins with, in full and with underscores; without its value."""
    name = argument.partition("=")[0]
    return f"--{name[2:].replace('-', '_')}" if name.startswith("--") else SHORT_FLAGS.get(name, name)


def refuse_unknown_flag(main: Callable, argument: str) -> NoReturn:
    """End the run; suggest the flag that `argument` may stand for, and how to pass it as text."""
    name, flags = argument.partition("=")[0], parameters(main)
    near = [flag for flag in flags if flag.startswith(flag_of(name))] or difflib.get_close_matches(flag_of(name), flags)
    texts = [flag for flag, parameter in flags.items() if parameter.default is Parameter.empty]
    hint = f": did you mean {near[0]}?" if near else "."
    as_text = f' To give it as text, write {texts[0]}="{argument}"' if texts else ""
    refuse(f"unknown flag {name}{hint}{as_text}", usage(main))


def read_value(main: Callable, flag: str, value: str) -> object:
    """The value of a flag, in the type of its parameter: text, a number or a switch. `None` means no value."""
    annotation = parameters(main)[flag].annotation
    kinds = getattr(annotation, "__args__", (annotation,))  # of int | None: int and None
    if bool in kinds:
        return value == "True"
    if str in kinds or (value == "None" and type(None) in kinds):
        return value if str in kinds else None
    try:
        return (int if int in kinds else float)(value)
    except ValueError:
        refuse(f"{flag} must be a {'whole ' * (int in kinds)}number, not {value!r}", usage(main))


def read_arguments(main: Callable, argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """The values of the flags in `argv`, and the texts: everything that does not look like a flag."""
    flags, values, texts, rest = parameters(main), {}, [], list(argv)

    def is_flag(argument: str) -> bool:
        return bool(argument in HELP + VERSION or flag_of(argument) in flags or LOOKS_LIKE_A_FLAG.fullmatch(argument))

    while rest:
        argument = rest.pop(0)
        flag, (_, equals, value) = flag_of(argument), argument.partition("=")
        answer_help_or_version(argument, help_text(main))
        if flag not in flags:
            if is_flag(argument):
                refuse_unknown_flag(main, argument)
            texts.append(argument)
            continue
        if isinstance(flags[flag].default, bool):
            if equals and value not in ("True", "False"):
                refuse(f"{flag} is a switch and takes no value", usage(main))
            value = value or "True"
        elif not equals:
            if not rest or is_flag(rest[0]):
                hint = f'; if {rest[0]} is its value, write {flag}="{rest[0]}"' if rest else ""
                refuse(f"{flag} needs a value{hint}", usage(main))
            value = rest.pop(0)
        read_value(main, flag, value)
        values[flag] = value
    return values, texts


def sort_arguments(main: Callable, argv: list[str]) -> tuple[list[str], list[str]]:
    """Sort `argv` into the texts of `main`, in its order, and its flags, each as `--flag=value`.

    Parameters without a default are texts. `*texts` takes all texts that are left, and at least one.
    """
    flags, (values, texts) = parameters(main), read_arguments(main, argv)
    wanted = [flag for flag, parameter in flags.items() if parameter.default is Parameter.empty]
    missing = [flag for flag in wanted if flag not in values]
    if len(texts) < len(missing):
        refuse(f"{missing[len(texts)][2:].upper()} is missing", usage(main))
    single = [flag for flag in missing if flags[flag].kind is not Parameter.VAR_POSITIONAL]
    extra = texts[len(single) :]
    if extra and single == missing:
        refuse(f"there is one argument too many, {extra[0]!r}: text of several words needs quotes", usage(main))
    values |= dict(zip(single, texts, strict=False))
    texts = [values.pop(flag) for flag in wanted if flag in values] + extra
    return texts, [f"{flag}={value}" for flag, value in values.items()]


def choose_verb(verbs: dict[str, Callable]) -> Callable:
    """The function of `verbs` that the first argument names, or else that of the verb "", if there is one."""
    overview, verb = "usage, each with its own --help:", (sys.argv[1:] or [""])[0]
    for name, main in verbs.items():
        name = name or next(iter(parameters(main)))[2:].upper()
        summary, *_ = (inspect.getdoc(main) or " ").splitlines()
        overview += f"\n    python {script()} {name:<12}{summary}"
    if verb and verb in verbs:
        sys.argv[:2] = [f"{sys.argv[0]} {verb}"]  # from here on, the verb is part of the script's name
        return verbs[verb]
    answer_help_or_version(verb, f"{overview}\n\n{help_text(verbs[''])}" if "" in verbs else overview)
    near = difflib.get_close_matches(verb, filter(None, verbs))
    if "" not in verbs or (near and not os.path.exists(verb)):
        hint = f"did you mean {near[0]}?" if near else f"the first argument is one of {', '.join(verbs)}"
        refuse(f"there is no {verb!r}: {hint}" if verb else f"the command is missing: {hint}", overview)
    return verbs[""]


def call(main: Callable) -> None:
    """Call `main` with the command line's arguments; fire reads the flags."""
    texts, flags = sort_arguments(main, sys.argv[1:])
    readers = {flag[2:]: lambda value, flag=flag: read_value(main, flag, value) for flag in parameters(main)}
    fire.Fire(fire.decorators.SetParseFns(**readers)(lambda **values: main(*texts, **values)), command=flags)


def finish(status: int | str, last: str = "") -> NoReturn:
    """End the process. Drop what standard output no longer accepts, or the interpreter would complain about it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process is ending already
    try:
        print(end=last, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def run(main: Callable | dict[str, Callable]) -> None:
    """Call `main`, or the function that the first argument names, and end the process.

    The exit status is 0, 1 for an error, 2 for wrong usage, or 128 + n after signal n, such as 130 after Ctrl-C.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (standard output was closed before the start)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows ?
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # show/start.py sets this for the time of the imports
            signal.signal(signal.SIGINT, signal.default_int_handler)
        call(choose_verb(main) if isinstance(main, dict) else main)
        print(end="", flush=True)  # here a closed pipe or a full disk raises its error
    except KeyboardInterrupt as error:
        finish(128 + (error.args or (signal.SIGINT,))[0], "\n")  # another signal may be treated as Ctrl-C
    except BrokenPipeError:  # the reader of the pipe has seen enough
        finish(141)
    except (ValueError, OSError, ImportError, MemoryError, ArithmeticError) as error:
        finish(f"{script()}: {shortened(visible(' '.join(str(error).split()))) or 'not enough memory'}")
