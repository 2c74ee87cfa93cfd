"""The command line of the scripts: fire calls the function, text stays text, an error is one line; and text is printed.

Left alone, fire reads an argument as Python or as a flag: the prompts `2019`, `[1, 2]` and `--hello` would arrive as a
number, a list and an error. So arguments are sorted here, by the function's own signature, before fire sees them.
"""

import contextlib
import difflib
import inspect
import itertools
import json
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from inspect import Parameter
from pathlib import Path
from typing import NoReturn

import fire

from encoder import Encoder

HELP = ("-h", "--help")


def script() -> str:
    return os.path.basename(sys.argv[0])


def parameters(main: Callable) -> dict[str, Parameter]:
    return dict(inspect.signature(main).parameters)


def usage(main: Callable) -> str:
    """The usage line of `main`, with the defaults of its flags."""
    words = [f"usage: python {script()}"]
    for name, parameter in parameters(main).items():
        if parameter.default is Parameter.empty:
            words.append(name.upper() + (" ..." if parameter.annotation == list[str] else ""))
        elif isinstance(parameter.default, bool):
            words.append(f"[--{name}]")
        elif parameter.default is None:
            words.append(f"[--{name} {'TEXT' if parameter.annotation == str | None else 'N'}]")
        else:
            words.append(f"[--{name} {parameter.default}]")
    return " ".join(words)


def refuse(main: Callable, problem: str) -> NoReturn:
    sys.exit(f"{script()}: {problem}\n{usage(main)}")


def nearest(text: str, flags: Iterable[str]) -> str | None:
    """Of `flags` the one that `text`, if it looks like one, may be meant to be."""
    name = text.partition("=")[0]
    if not name.startswith("--") or name == "--":
        return None
    near = [flag for flag in flags if flag.startswith(name)] or difflib.get_close_matches(name, flags)
    return near[0] if near else None


def surplus(extra: list[str], texts: list[str], flags: dict[str, Parameter]) -> str:
    """Say what is wrong with `texts`, of which there are more than asked for: a misspelt flag, or missing quotes."""
    for text in texts:
        if text.startswith("--"):
            near = nearest(text, flags)
            return f"unknown flag {text.partition('=')[0]}" + (f": did you mean {near}?" if near else "")
    return f"one argument too many, {extra[0]!r}: text of several words needs quotes around it"


def sort_arguments(main: Callable, argv: list[str]) -> list[str]:
    """Sort `argv` into `--name=value` for each parameter of `main` that it sets.

    What is not exactly a flag, `--flag` or `--flag=value`, is text, whatever it starts with. A last parameter that is a
    list takes all texts that are left, at least one, and its value is JSON. Prints the help and exits if asked to;
    exits with status 1 and the usage for a missing, surplus or unknown argument.
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
    values |= {flag: json.dumps([value]) for flag, value in values.items() if flags[flag].annotation == list[str]}
    wanted = [flag for flag, p in flags.items() if p.default is Parameter.empty and flag not in values]
    if len(texts) < len(wanted):
        refuse(main, f"{wanted[len(texts)][2:].upper()} is missing")
    if wanted and flags[wanted[-1]].annotation == list[str]:
        several = texts[len(wanted) - 1 :]
        if misspelt := [text for text in several if nearest(text, flags)]:
            refuse(main, surplus(misspelt, misspelt, flags))
        texts[len(wanted) - 1 :] = [json.dumps(several)]
    if len(texts) > len(wanted):
        refuse(main, surplus(texts[len(wanted) :], texts, flags))
    return [f"{flag}={value}" for flag, value in (values | dict(zip(wanted, texts, strict=True))).items()]


def choose(verbs: dict[str, Callable]) -> Callable:
    """The function of `verbs` that the first argument names, which from then on is part of the script's name.

    If it names none, the function of the verb "", if there is one.
    """
    names = {verb: verb or next(iter(parameters(main))).upper() for verb, main in verbs.items()}
    lines = [f"    python {script()} {names[verb]:<12}{inspect.getdoc(verbs[verb]).splitlines()[0]}" for verb in verbs]
    overview = "\n".join(["usage, each with its own --help:", *lines])
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb in HELP:
        print(overview, flush=True)
        if "" in verbs:
            print()
            return verbs[""]
        sys.exit()
    if verb not in verbs or not verb:
        near = difflib.get_close_matches(verb, filter(None, verbs))
        if "" in verbs and (not near or os.path.exists(verb)):
            return verbs[""]
        hint = f"did you mean {near[0]}?" if near else f"the first argument is one of {', '.join(verbs)}"
        sys.exit(f"{script()}: {f'there is no {verb!r}' if verb else 'what to do is missing'}: {hint}\n{overview}")
    sys.argv[:2] = [f"{sys.argv[0]} {verb}"]
    return verbs[verb]


def number(text: str) -> int | float | str | None:
    """`text` as a number, or None; what is neither stays text, for `main` to refuse."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return None if text == "None" else text


def finish(status: int | str, last: str = "") -> NoReturn:
    """End the process; what standard output cannot take any more is dropped, or the interpreter would complain."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is ending already
    try:
        print(end=last, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def run(main: Callable | dict[str, Callable]) -> None:
    """Call `main`, or of several functions the one that is named first, with the command line, and end the process.

    The status is 0, 1 after one line on standard error for what the user can mend, 130 after Ctrl-C. Parameters of
    `main` without a default are its texts, in order; the others are flags, and its docstring is the help.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as gpt2.py has it during its imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before the start
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows ?
    try:
        call(choose(main) if isinstance(main, dict) else main)
        print(end="", flush=True)  # what a closed pipe or a full disk has to say, it says here
    except KeyboardInterrupt:
        finish(130, "\n")
    except BrokenPipeError:  # the reader of the pipe has seen enough
        finish(141)
    except (ValueError, OSError, ImportError, MemoryError, ArithmeticError) as error:
        finish(f"{script()}: {str(error) or 'not enough memory'}")


def call(main: Callable) -> None:
    """Call `main` with the command line's arguments, through fire."""
    kinds = {name: p.annotation for name, p in parameters(main).items() if p.annotation is not bool}
    kinds_of_text = {str: str, str | None: str, list[str]: json.loads}
    parsers = {name: kinds_of_text.get(kind, number) for name, kind in kinds.items()}
    fire.Fire(fire.decorators.SetParseFns(**parsers)(main), command=sort_arguments(main, sys.argv[1:]))


def read_standard_input(what: str) -> bytes:
    """All of standard input, which is to be `what`."""
    if sys.stdin is None:
        raise ValueError(f"there is no {what} to read: standard input is closed")
    return sys.stdin.buffer.read()


def read_document(path: str, errors: str = "strict") -> str:
    """The text in a file, or for `-` of standard input, its lines ending as Python's do.

    Raises ValueError for an empty one, UnicodeError, with the place, for one that is not UTF-8, if errors is "strict".
    """
    try:
        data = read_standard_input("text") if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise OSError(f"{path or 'a file without a name'} cannot be read: {error.strerror}") from error
    try:
        text = data.decode("utf-8", errors).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        place = f"byte {data[error.start]:#x} at offset {error.start:,}, in line {line:,}"
        raise UnicodeError(f"{path} is not a text in UTF-8 ({place}): convert it") from error
    if not text:
        raise ValueError(f"{path} is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def prompt_ids(prompt: str, encoder: Encoder) -> list[int]:
    """The token ids of a prompt: of `-` those of standard input, of an empty text the <|endoftext|> to start from."""
    if prompt == "-":
        prompt = read_standard_input("prompt").decode("utf-8", "replace")
    if not prompt and encoder.bos_id is None:
        raise ValueError("the prompt is empty, and this model has no <|endoftext|> to start from")
    return encoder.encode(prompt) or [encoder.bos_id]


def until(pieces: Iterable[str], stop: str) -> Iterator[str]:
    """Yield `pieces` of text up to `stop`, which may span several: what could be its beginning is held back.

    Of "to be o" before the stop text "or not", "o" waits until the next piece decides.
    """
    held = ""
    for piece in pieces:
        text, found, _ = (held + piece).partition(stop)
        if found:
            yield text
            return
        n_held = next(n for n in range(min(len(stop) - 1, len(text)), -1, -1) if text.endswith(stop[:n]))
        held = text[len(text) - n_held :]
        yield text[: len(text) - n_held]
    yield held


def print_samples(
    steps: Generator, encoder: Encoder, n_steps: int, n_samples: int, stop: str | None, eot_id: int | None
) -> None:
    """Print the text of each sample, the first as it is made, up to `stop` or `eot_id`.

    `steps` yields one id a sample, as `gpt2.stream` does, n_steps times at most. The speed, and progress where the text
    goes elsewhere, are shown on standard error if that is a terminal.
    """
    if sys.stderr.isatty() and not sys.stdout.isatty():
        from tqdm import tqdm  # late: most runs show the text itself

        steps = iter(tqdm(steps, total=n_steps, unit="token", leave=False))
    start, made = time.perf_counter(), []  # made: the steps so far, each with one id a sample

    def ids_of(sample: int) -> Iterator[int]:
        for n in itertools.count():
            if n == len(made):  # no other sample has come this far
                made.extend(itertools.islice(steps, 1))
            if n == len(made) or made[n][sample] == eot_id:
                return
            yield made[n][sample]

    for sample in range(n_samples):
        if sample > 0:
            print("-" * 40)
        pieces = encoder.decode_stream(ids_of(sample))
        for piece in until(pieces, stop) if stop else pieces:
            print(piece, end="", flush=True)
        print(flush=True)
    steps.close()  # and with it the bar
    if sys.stderr.isatty():
        n_tokens, seconds = len(made) * n_samples, time.perf_counter() - start
        print(f"{n_tokens} tokens in {seconds:.2f} s, {n_tokens / seconds:.1f} tokens/s", file=sys.stderr)
