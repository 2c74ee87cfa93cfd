"""What a training saves beside its model, so that it can be resumed: settings, progress, weights and moments."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from store.tensors import save_tensors

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
        with safe_open(path, framework="numpy") as file:
            vectors, record = {name: file.get_tensor(name) for name in VECTORS}, json.loads(file.metadata()["record"])
        record |= {"settings": Settings(**record["settings"]), "saved_step": record["step"]}
        return Training(**record, vectors=vectors)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): train anew, with --overwrite") from error
