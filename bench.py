"""Speed and memory, beside the machine's limits and beside other libraries.

The table shows the medians of several rounds, and marks rows whose rounds differ a lot. The code for it is in `dev/`.
"""

if __name__ == "__main__":
    from show.start import run  # imported first, so that Ctrl-C during the slow imports below prints no traceback

import json as jsonlib  # main has a flag of that name
import tempfile
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics  # Python's help: about 465,000 characters of English and code

from dev import peers
from dev.machine import describe_machine
from dev.measures import UNSTEADY, engine_measures, measure_rows, other_measures
from sampling import check_count
from show.terminal import document_pieces, print_table

LIMITS = {
    "prefill": "prompt: 2 operations for each token and each weight of the blocks, at {operations:,.0f} GFLOP/s",
    "decode": "decode: reading all weights once for each token, at {bytes:,.1f} GB/s",
    "batch": "batch: reading all weights once for a token of each sequence, or the operations, whichever takes longer",
    "startup": 'start-up: python -c "import numpy"',
    "memory": "memory: the size of the weights",
    "tokenizer": "tokenizer: splitting the text into words",
}


def print_report(report: dict) -> None:
    """Print the model, the machine, a table with a line for each measure, and what its columns mean."""
    machine, model, rows, rivals = (report[name] for name in ("machine", "model", "rows", "peers"))
    print(f"{model['name']}: {model['n_weights'] / 1e6:,.1f} M weights")
    print(f"weights: {model['weights']}; tokenizer: {model['tokenizer']}")
    print(f"{machine['processor']}, {machine['n_cores']} cores, {machine['n_threads']} threads")
    print(", ".join(map(" ".join, machine["versions"].items())))
    print(f"rounds: {report['rounds']}; the table shows their medians\n")
    columns = {"measure": "s", "unit": "s", **dict.fromkeys(["limit", "here", "share", *rivals], ">s")}
    lines: list[list[str]] = []
    for row in rows:
        medians, ratios = row["medians"], row["ratios"]
        cells = {party: f"{median:,.0f}" if median >= 100 else f"{median:#.3g}" for party, median in medians.items()}
        cells |= {peer: f"{cells[peer]} ({ratios[peer]:.2f}x)" for peer in rivals if peer in cells}
        cells |= {"measure": row["name"], "unit": row["unit"], "share": f"{ratios['limit']:.0%}"}
        lines.append([*(cells.get(name, "-") for name in columns), "~" * bool(row["unsteady"])])
    print_table({**columns, "": "s"}, lines)
    print("\nshare: how much of the limit this project reaches. These are the limits:")
    for group, row in {row["group"]: row for row in rows}.items():
        rates = {name: row["medians"]["limit"] * amount / 1e9 for name, amount in row["cost"].items()}
        print(f"  {LIMITS[group].format(**rates)}")
    if batches := [row["medians"]["here"] for row in rows if row["group"] == "batch"]:
        print("batches, times the speed of the first:", ", ".join(f"{speed / batches[0]:.1f}" for speed in batches))
    if rivals:
        print("(2x): this project is twice as good as the other library")
    if any(row["unsteady"] for row in rows):
        print(f"~: rounds differ by a factor of {UNSTEADY} or more, so do not trust the row: another program ran")
    for remark in report["remarks"]:
        print(remark)


def split_names(names: str | None, known: Iterable[str], flag: str) -> list[str]:
    """The names in a list with commas. Raises ValueError for an unknown name."""
    found = {name.strip() for name in (names or "").split(",")} - {""}
    if unknown := found.difference(known):
        raise ValueError(f"{flag} takes {', '.join(known)}, or several with commas between them, not {min(unknown)!r}")
    return [name for name in known if name in found]


def main(
    model_size: str = "124M", models_dir: str | None = None, against: str | None = None, only: str | None = None,
    rounds: int = 5, text: str | None = None, json: bool = False,
) -> None:  # fmt: skip
    """Measure speed and memory, in turn with the machine's limits and with other libraries.

    --model_size 124M     124M, 355M, 774M, 1558M (random weights if not on disk), a name in models_dir, a directory
    --against NAMES       other libraries to measure too: transformers,llama_cpp,tiktoken
    --only NAMES          measure only some of these: prefill,decode,batch,startup,memory,tokenizer
    --rounds 5            how often each figure is measured; the table shows medians
    --text FILE           the text for the tokenizer, instead of Python's own help texts
    --json                print everything as JSON, with the figures of each round
    """
    check_count("rounds", rounds, least=1)
    rivals, groups = split_names(against, peers.PEERS, "against"), split_names(only, LIMITS, "only") or LIMITS
    report = {"machine": describe_machine(peers.check_installed(rivals)), "rounds": rounds, "peers": rivals}
    english = "\n".join(topics.values()) if text is None else "".join(document_pieces(text, errors="replace"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        model = peers.open_model(model_size, models_dir, Path(temporary))
        measures = [*engine_measures(model, rivals, Path(temporary)), *other_measures(model, rivals, english)]
        rows = list(measure_rows([measure for measure in measures if measure.group in groups], rounds))
    about = {"name": model_size, "weights": model.weights, "tokenizer": model.tokenizer, "n_weights": model.n_weights}
    report |= {"model": {**about, **model.hparams}, "rows": rows, "remarks": model.remarks}
    if json:
        print(jsonlib.dumps(report, indent=1))
    else:
        print_report(report)


if __name__ == "__main__":
    run(main)
