import pytest
from hypothesis import settings

from checkpoint import checkpoint_name
from encoder import Encoder
from faulty_server import faulty_server
from helpers import (
    BUNDLED,
    DATA_PLACES,
    TINY,
    has_permissions,
    random_params,
    tiny_tables,
    write_checkpoint,
    write_model,
)
from utils import flatten, load_encoder_hparams_and_params, read_encoder

settings.register_profile("noisy machines", deadline=None)
settings.load_profile("noisy machines")


@pytest.fixture(scope="session")
def tiny_params():
    return random_params(TINY)


@pytest.fixture(scope="session")
def tiny_encoder():
    return Encoder(*tiny_tables())


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tiny_params):
    """The path of a complete model directory; for reading only."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny", TINY, tiny_params)


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
    """The tokenizer, hyperparameters and weights of the bundled model."""
    return load_encoder_hparams_and_params(str(BUNDLED))


@pytest.fixture(scope="session")
def gpt2_encoder():
    """The released tokenizer, where its two files are at hand."""
    for place in DATA_PLACES:
        if (place / "encoder.json").is_file() and (place / "vocab.bpe").is_file():
            return read_encoder(place)
    pytest.skip("GPT-2's encoder.json and vocab.bpe are not here")


@pytest.fixture
def mirror(released, monkeypatch):
    """A server of `released`, named in GPT2_BASE_URL."""
    with faulty_server() as server:
        server.files = {f"/124M/{path.name}": path.read_bytes() for path in (released / "124M").iterdir()}
        monkeypatch.setenv("GPT2_BASE_URL", server.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


@pytest.fixture
def permissions():
    """For tests whose children run with `as_any_user`."""
    if not has_permissions():
        pytest.skip("here the permissions of files do not hold for this user")
