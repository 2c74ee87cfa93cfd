"""What a training run saves beside its model, so that the run can be resumed: settings, progress, weights, moments."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from store.params import count_params, param_shapes
from store.tables import check_hparams
from store.tensors import map_verified, save_tensors

VECTORS = ("weights", "m", "v")  # m and v are AdamW's moments
SHAPE = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")


@dataclass(frozen=True)
class Settings:
    """The flags of the command line. They are saved with a training run, and kept when it is resumed."""

    n_vocab: int = 1024
    n_ctx: int = 256
    n_embd: int = 192
    n_head: int = 4
    n_layer: int = 4
    dropout: float = 0.1
    batch_size: int = 16
    learning_rate: float = 1.5e-3
    max_steps: int | None = 1400
    minutes: float | None = None
    eval_every: int = 100
    seed: int = 0
    encoder: str | None = None
    init_from: str | None = None

    @property
    def hparams(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in SHAPE}


@dataclass
class Training:
    """A training run and its progress: all that `--resume` needs."""

    settings: Settings
    text: str  # its SHA-256
    vectors: dict[str, np.ndarray]  # VECTORS
    step: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_loss: float = math.inf
    saved_step: int = 0
    tables: dict[str, str] = field(default_factory=dict)  # SHA-256 of each tokenizer file and of hparams.json
    rows: list[list[float | None]] = field(default_factory=list)  # of the log: a value for each of its five columns
    losses: list[float] = field(default_factory=list)  # of the last steps


def save_state(path: Path, training: Training) -> None:
    """Write a training to one file: its vectors as tensors, and everything else as JSON in the metadata."""
    training.saved_step = training.step
    record = {**vars(training), "settings": asdict(training.settings)}
    save_tensors(path, record.pop("vectors"), {"record": json.dumps(record)})


def load_state(path: Path) -> Training:
    """Read what `save_state` wrote; OSError if that fails, ValueError if the file is damaged."""
    try:
        tensors, metadata = map_verified(path)
        record = json.loads(metadata["record"])
        settings = read_fields(Settings, record["settings"])
        n_params = count_params(param_shapes(check_hparams(path, settings.hparams)))
        vectors = {name: np.array(tensors[name]) for name in VECTORS}  # copies, which can be written to
        if odd := [name for name, v in vectors.items() if (v.shape, v.dtype) != ((n_params,), np.float32)]:
            raise ValueError(f"{odd[0]} does not have the {n_params:,} float32 numbers that the settings imply")
        training = read_fields(Training, {**record, "settings": settings, "vectors": vectors})
        rows_fit = all(len(row) == 5 and None not in (row[0], row[2]) for row in training.rows)
        times_fit = 0 <= training.best_step <= training.step and 0 <= training.seconds < math.inf
        if not (rows_fit and times_fit and training.best_loss >= 0):
            raise ValueError("step, best_step, best_loss, seconds and rows make no sense together")
        return training
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        problem = f"there is no {error}" if isinstance(error, KeyError) else str(error).removeprefix(f"{path} ")
        problem = problem.removeprefix("is damaged: ").partition("; delete it")[0]
        raise ValueError(f"{path} is damaged ({problem}): train again, with --overwrite") from error


def read_fields(kind: type, found: object) -> Any:
    """Make a dataclass from a JSON object; ValueError if an entry is missing, unknown or of another type."""
    hints = get_type_hints(kind)
    if not isinstance(found, dict) or found.keys() != hints.keys():
        raise ValueError(f"{kind.__name__.lower()} must have the entries {', '.join(hints)}, and no others")
    if odd := [name for name in hints if not has_type(found[name], hints[name])]:
        raise ValueError(f"{odd[0]} cannot be {repr(found[odd[0]])[:40]}")
    return kind(**found)


def has_type(value: Any, hint: Any) -> bool:
    """Whether `value` is of a type such as `int | None`, `list[float]` or `dict[str, str]`. NaN is not a float."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind is UnionType:
        return any(has_type(value, part) for part in parts)
    if kind is float:
        return type(value) in (int, float) and not math.isnan(value)
    items = value if type(value) is list else value.values() if type(value) is dict else ()
    return type(value) is kind and all(has_type(item, parts[-1]) for item in items)
