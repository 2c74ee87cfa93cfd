"""What a training saves beside its model, so that it can be resumed: settings, progress, weights and moments."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin, get_type_hints

import numpy as np

from store.params import count_params, param_shapes
from store.tables import check_hparams
from store.tensors import save_tensors, verify

VECTORS = ("weights", "m", "v")  # m and v are AdamW's moments
SHAPE = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")


@dataclass(frozen=True)
class Settings:
    """What a training is made with: the flags of the command line; saved with it, and kept when it is resumed."""

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
    """How far a training is: all that `--resume` needs but the vectors goes into a record beside them."""

    settings: Settings
    text: str  # its SHA-256
    vectors: dict[str, np.ndarray]  # VECTORS
    step: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_loss: float = math.inf
    saved_step: int = 0
    tables: dict[str, str] = field(default_factory=dict)  # SHA-256 of the files of tokenizer and hyperparameters
    rows: list[list] = field(default_factory=list)  # of the log, with COLUMNS
    losses: list[float] = field(default_factory=list)  # of the last steps


def save_state(path: Path, training: Training) -> None:
    """Write what `--resume` needs: the vectors of weights and moments, and a record of everything else."""
    training.saved_step = training.step
    record = {name: value for name, value in vars(training).items() if name not in ("vectors", "settings")}
    save_tensors(path, training.vectors, {"record": json.dumps({**record, "settings": asdict(training.settings)})})


def load_state(path: Path) -> Training:
    """What `save_state` has written; FileNotFoundError if it is not there, ValueError if it is damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"there is nothing to resume: {path} is missing")
    try:
        tensors, metadata = verify(path)
        record = json.loads(metadata["record"])
        settings = Settings(**check_types(Settings, record.get("settings"), "settings"))
        n_params = count_params(param_shapes(check_hparams(path, settings.hparams)))
        vectors = {name: np.array(tensors[name]) for name in VECTORS}  # copies, which can be written to
        if odd := [name for name, v in vectors.items() if (v.shape, v.dtype) != ((n_params,), np.float32)]:
            raise ValueError(f"{odd[0]} has not the {n_params:,} float32 numbers that the settings imply")
        training = Training(**check_types(Training, {**record, "settings": settings, "vectors": vectors}, "the record"))
        check_progress(training)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        problem = f"there is no {error}" if isinstance(error, KeyError) else str(error).removeprefix(f"{path} ")
        problem = repr(problem)[1:-1]  # in one line, whatever names it has
        raise ValueError(f"{path} is damaged ({problem}): train anew, with --overwrite") from error
    return training


def check_types(kind: type, found: object, source: str) -> dict:
    """`found`, if it has all fields of the dataclass `kind`, each of the type that is declared; else ValueError."""
    if not isinstance(found, dict):
        raise ValueError(f"{source} must be an object")
    hints = get_type_hints(kind)
    if odd := sorted(hints.keys() ^ found.keys()):
        raise ValueError(f"{odd[0][:80]} is {'missing' if odd[0] in hints else 'unknown'} in {source}")
    for name, hint in hints.items():
        parts = get_args(hint) if get_origin(hint) is UnionType else (hint,)
        types = {get_origin(part) or part for part in parts}
        if type(found[name]) not in types | ({int} if float in types else set()):
            raise ValueError(f"{name} is {repr(found[name])[:40]} in {source}")
    return found


def check_progress(training: Training) -> None:
    """Raise ValueError, with a name, unless the numbers of a record make sense."""

    def is_number(value: object) -> bool:
        return type(value) in (int, float) and math.isfinite(value)

    is_sound = {
        "step": training.step >= 0,
        "best_step": 0 <= training.best_step <= training.step,
        "best_loss": training.best_loss >= 0,
        "seconds": is_number(training.seconds) and training.seconds >= 0,
        "losses": all(map(is_number, training.losses)),
        "rows": all(
            type(row) is list and len(row) == 5 and is_number(row[0]) and is_number(row[2])
            and all(value is None or is_number(value) for value in row) for row in training.rows
        ),
        "tables": all(type(value) is str for value in training.tables.values()),
    }  # fmt: skip
    if odd := [name for name, sound in is_sound.items() if not sound]:
        raise ValueError(f"{odd[0]} is {repr(getattr(training, odd[0]))[:40]}, which makes no sense")
