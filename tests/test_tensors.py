"""Safetensors files are mapped without a copy, written as the library reads them, and checked for lies."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from store.tensors import WEIGHTS, Lazy, map_tensors, map_verified, save_tensors, write_tensors


def tensor(start, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


def write(directory, header, data=bytes(32)):
    """Write a file with a header: an object, JSON, or bytes that begin with the header's length."""
    if not isinstance(header, bytes):
        text = header if isinstance(header, str) else json.dumps(header)
        header = len(text).to_bytes(8, "little") + text.encode()
    (directory / WEIGHTS).write_bytes(header + data)
    return directory / WEIGHTS


LIES = {
    "overlapping": {"a": tensor(0, 16), "b": tensor(8, 32)}, "a gap": {"a": tensor(0, 16), "b": tensor(20, 32)},
    "out of range": {"a": tensor(0, 64)}, "before the start": {"a": tensor(-4, 32)},
    "too few bytes for the shape": {"a": tensor(0, 32, [16])}, "a negative shape": {"a": tensor(0, 32, [-8])},
    "a shape that overflows": {"a": tensor(0, 32, [2**32, 2**32])}, "no shape": {"a": {"dtype": "F32"}},
    "a length beyond the file": bytes(7) + b"\x80{}", "no length": bytes(8) + b"{}",
    "too many bytes for the type": {"a": tensor(0, 32, dtype="F16")}, "no type": {"a": tensor(0, 32, dtype="pickle")},
    "another type": {"a": tensor(0, 32, [32], dtype="F8_E4M3")},
    "a name twice": json.dumps({"a": tensor(0, 32), "b": tensor(0, 32)}).replace('"b"', '"a"'),
    "nested": '{"a":' + "[" * 100_000, "not UTF-8": b"\2\0\0\0\0\0\0\0\xff\xfe", "not an object": [1, 2],
    "a list for an object": {"a": ["F32", [8], [0, 32]]},
    "an object for a type": {"a": tensor(0, 32, dtype={"F32": None})},
    "a name that clears the screen": {"\x1b[2J": tensor(0, 32)},
    "a name of two lines": {"a\nb": tensor(0, 32, [16], dtype="F16")},
    "an empty shape beyond NumPy's": {"a": tensor(0, 32), "b": tensor(32, 32, [0, 2**62])},
    "more dimensions than NumPy's": {"a": tensor(0, 32, [8] + [1] * 64)},
    "metadata of a wrong type": {"a": tensor(0, 32), "__metadata__": {"format": 1}},
    "metadata that are none": {"a": tensor(0, 32), "__metadata__": "pt"},
    "git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 548105171\n",
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(tmp_path, lie):
    path = write(tmp_path, LIES[lie])
    problem = "has not been downloaded yet: git lfs pull" if lie == "git lfs" else "cannot be used"
    with pytest.raises((ValueError, OSError), match=f"^{path} {problem}") as raised:
        map_tensors(path)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("tensors", [{"a": tensor(0, 32), "__metadata__": None}, {"a": tensor(0, 32) | {"more": 1}}])
def test_a_header_may_have_no_metadata_and_more_fields(tmp_path, tensors):
    found, metadata = map_tensors(write(tmp_path, tensors))
    assert (found["a"].tolist(), metadata) == ([0] * 8, {})


@pytest.mark.parametrize("offset", [0, 1, 2])
def test_mapped_arrays_are_read_only_even_if_copied(tmp_path, offset):
    header = json.dumps({"a": tensor(0, 8)}) + " " * offset
    array = map_tensors(write(tmp_path, header, np.array([1, 2], "<f4").tobytes()))[0]["a"]
    assert (array.tolist(), array.flags.aligned) == ([1, 2], True)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


def test_the_library_reads_a_written_file_and_its_data_begin_on_a_page(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.normal(size=(1000, 700)).astype(np.float32),  # more than a huge page
        "b": rng.integers(-128, 128, 5).astype(np.int8),
        "c": np.float32(3).reshape(()),
        "transposed": rng.normal(size=(3, 4)).astype(np.float32).T,
        "empty": np.zeros((0, 3), np.float32),
        "é": rng.normal(size=768).astype(np.float32),
        "lazy": Lazy((2, 5), lambda: np.ones((2, 5), np.float32)),
    }
    path = tmp_path / WEIGHTS
    save_tensors(path, tensors, {"made by": "a test"})
    found, (mapped, metadata) = load_file(path), map_tensors(path)
    assert metadata == map_verified(path)[1] == {"sha256": metadata["sha256"], "made by": "a test"}
    assert found.keys() == mapped.keys() == tensors.keys()
    for name, array in tensors.items():
        for other in (found[name], mapped[name]):
            assert (other.dtype, other.shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(other, np.asarray(array))
    assert int.from_bytes(path.read_bytes()[:8], "little") % 4096 == 4096 - 8
    assert list(tmp_path.iterdir()) == [path]


def test_a_removed_leftover_is_not_created_again(tmp_path):
    """A conversion may still run when its parent was killed and another process has removed its file."""
    with pytest.raises(FileNotFoundError):
        write_tensors(tmp_path / f"{WEIGHTS}.1.tmp", {"a": np.zeros(1, np.float32)}, {})
    assert not list(tmp_path.iterdir())
