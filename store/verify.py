"""Compare a model's files with the digests that were written with them, and with the checksums of their checkpoint.

The comparison with a checkpoint is the work of a process of its own: python -m store.verify DIRECTORY WEIGHTS.
"""

import re
import sys
from pathlib import Path

import numpy as np

from store.checkpoint import CHECKPOINT_DATA, CHECKPOINT_INDEX, child, read_checkpoint, run_child
from store.files import digest, homes_of
from store.huggingface import CONFIG
from store.models import INT8_WEIGHTS, weight_files
from store.params import tensors_of
from store.tensors import DIGEST, map_tensors, verify

SHA256 = re.compile("[0-9a-f]{64}")


def verify_model(directory: Path) -> None:
    """Raise ValueError, with the file's name, if a file of the model in `directory` is not what was written.

    That is told by the SHA-256 in the metadata of the weights, of themselves and of the tables beside them; of a file
    in the cache of Hugging Face's hub, by its name there. Weights that were converted are compared with the checkpoint,
    if that is still there, and TensorFlow compares that with its checksums.
    """
    weights = weight_files(directory)
    quantized = [home / INT8_WEIGHTS for home in homes_of(directory) if (home / INT8_WEIGHTS).is_file()]
    for path in weights + quantized:
        expected = {}
        if SHA256.fullmatch(blob := path.resolve().name):
            expected = {path.name: blob}
        elif path.suffix == ".safetensors":
            _, expected = verify(path)
        elif path.name != CONFIG:
            raise ValueError(f"{path} cannot be verified: nothing tells what its bytes were")
        for file, sha256 in expected.items():
            is_digest = file != DIGEST and SHA256.fullmatch(sha256) and (directory / file).is_file()
            if is_digest and digest(directory / file).hex() != sha256:
                raise ValueError(f"{directory / file} is not the file that was there with {path.name}: get both again")
    if weights and (directory / CHECKPOINT_INDEX).is_file() and (directory / CHECKPOINT_DATA).is_file():
        run_child("store.verify", directory, weights[0], "compared")
    print(f"{directory}: verified", file=sys.stderr)


def compare(weights: Path) -> None:
    """Raise ValueError unless `weights` are those of the checkpoint in the current directory."""
    found = map_tensors(weights)[0]
    for name, tensor in tensors_of(read_checkpoint()[0]).items():
        if not np.array_equal(np.asarray(tensor), found[name]):  # of what asarray raises, array_equal says nothing
            raise ValueError(f"{weights}: {name} is not that of the checkpoint")


if __name__ == "__main__":
    child(compare)
