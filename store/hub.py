"""Hugging Face's hub: models by name, downloaded into the cache that other programs share."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from store.checkpoint import is_offline
from store.huggingface import CONFIG, PYTORCH_WEIGHTS, SMALL_FILES, WEIGHT_FILES, check_pytorch, weight_files
from store.tensors import WEIGHTS

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def is_on_hub(name: str) -> bool:
    """Whether `name` is that of a model of Hugging Face, and not of a directory."""
    return bool(HUB_NAME.fullmatch(name)) and not Path(name).is_dir()


def fetch_model(name: str) -> Path:
    """The directory, in huggingface_hub's cache, of a model with all but its weights.

    The hub is asked even if the model is there: there may be a new version, or only a part is in the cache.
    """
    with hub_errors(name):
        if not (sys.stderr and sys.stderr.isatty()):
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars are for terminals only
        from huggingface_hub import snapshot_download

        directory = Path(snapshot_download(name, allow_patterns=SMALL_FILES, local_files_only=is_offline()))
    if not (directory / CONFIG).is_file():
        raise FileNotFoundError(f"{name} at Hugging Face is no model of transformers: it has no {CONFIG}")
    return directory


def fetch_weights(name: str, directory: Path) -> None:
    """Download the weights of `fetch_model(name)` into its `directory`, if they are not there."""
    paths = weight_files(directory)
    if paths and all(map(Path.is_file, paths)):
        return
    if is_offline():
        raise FileNotFoundError(f"there is no directory {name}; this run is offline, and the cache lacks its weights")
    with hub_errors(name):
        from huggingface_hub import HfApi, snapshot_download

        revision = directory.name  # the version that `fetch_model` has found
        there = HfApi().list_repo_files(name, revision=revision)
        file = next((file for file in WEIGHT_FILES if file in there), WEIGHTS)
        if file.startswith(PYTORCH_WEIGHTS):
            check_pytorch(directory / file)
        snapshot_download(name, revision=revision, allow_patterns=[file])
        snapshot_download(name, revision=revision, allow_patterns=[path.name for path in weight_files(directory)])


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line on why the model `name` was not downloaded."""
    try:
        yield
    except ImportError as error:
        if error.name != "huggingface_hub":
            raise
        raise ImportError(f"there is no directory {name}; to download it: pip install huggingface_hub") from error
    except Exception as error:  # of huggingface_hub, or of the HTTP library that its version uses
        if isinstance(error, FileNotFoundError):  # it is not in the cache; its cause is why it was not downloaded
            error = error.__cause__ or error
        reason = {
            "RepositoryNotFoundError": "there is none, or it is private: give a token that may read it in HF_TOKEN",
            "GatedRepoError": "accept its terms on its page there, and give a token in HF_TOKEN",
            "LocalEntryNotFoundError": "it is not in the cache, and this run is offline",
            "IncompleteSnapshotError": "parts of it are not in the cache, and this run is offline",
            "OfflineModeIsEnabled": "it is not in the cache, and this run is offline",
        }.get(type(error).__name__, " ".join(f"{type(error).__name__}: {error}".split())[:300])
        problem = f"there is no directory {name}, and no model of that name came from Hugging Face"
        raise OSError(f"{problem}: {reason}") from error
