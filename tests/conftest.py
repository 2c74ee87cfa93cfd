"""The fixtures that several files share: a tiny model, the bundled one, a released one on a mirror."""

import os

import pytest
from hypothesis import settings

from encoder import read_encoder
from helpers.faulty_server import faulty_server
from helpers.models import BUNDLED, TINY, data_file, random_params, write_checkpoint, write_model
from helpers.processes import as_any_user, run_code
from store.params import checkpoint_name, flatten
from utils import load_encoder_hparams_and_params

settings.register_profile("noisy machines", deadline=None)
settings.load_profile("noisy machines")


@pytest.fixture(scope="session")
def tiny_params():
    return random_params(TINY)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tiny_params):
    """The path of a complete model directory; for reading only."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny", TINY, tiny_params)


@pytest.fixture(scope="session")
def tiny_encoder(tiny_model):
    return read_encoder(tiny_model)


@pytest.fixture(scope="session")
def tiny_tensors(tiny_params):
    """The tensors of `tiny_params` with the names and shapes of the released checkpoints."""
    return {
        name: array[None] if array.ndim == 2 and name.endswith("/w") else array
        for name, array in flatten(tiny_params, checkpoint_name).items()
    }


@pytest.fixture(scope="session")
def released(tmp_path_factory, tiny_tensors):
    """The path of a directory that a mirror serves: a small model in the released layout, under the name 124M."""
    return write_checkpoint(tmp_path_factory.mktemp("mirror") / "124M", tiny_tensors).parent


@pytest.fixture(scope="session")
def shakespeare():
    """The tokenizer, the hyperparameters and the weights of the bundled model."""
    return load_encoder_hparams_and_params(str(BUNDLED))


@pytest.fixture(scope="session")
def gpt2_encoder():
    """The released tokenizer, if its two files are available."""
    return read_encoder(data_file("gpt2/encoder.json").parent)


@pytest.fixture
def mirror(released, monkeypatch):
    """A server of `released`, named in GPT2_BASE_URL."""
    with faulty_server() as server:
        server.files = {f"/124M/{path.name}": path.read_bytes() for path in (released / "124M").iterdir()}
        monkeypatch.setenv("GPT2_BASE_URL", server.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


@pytest.fixture
def permissions(tmp_path_factory):
    """Skip a test whose children run with `as_any_user` if permissions do not restrict them."""
    directory = tmp_path_factory.mktemp("read-only")
    directory.chmod(0o555)
    code = "import os, sys; print(os.access(sys.argv[1], os.W_OK))"
    if os.name != "posix" or run_code(code, str(directory), preexec_fn=as_any_user) != "False\n":
        pytest.skip("file permissions do not restrict this user here")
