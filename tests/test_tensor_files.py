"""safetensors files as streams: the same bytes as the library's, whole or in parts, with their checksum and no more memory."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from training import tensor_files
from training.tensor_files import (
    DTYPES,
    as_bytes,
    is_finite,
    pieces,
    read_header,
    read_into,
    write_streamed,
    write_tensors,
)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pieces of 64 bytes, so that small tensors are written and read in several."""
    monkeypatch.setattr(tensor_files, "PIECE_BYTES", 64)


def some_tensors() -> dict[str, torch.Tensor]:
    """Every dtype; a scalar, an empty one, rows longer than a piece, transposed and sliced ones, a name beyond ASCII."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(33, 20, generator=generator)
    return {
        **{f"of {name}": torch.randint(0, 2, (5, 7), generator=generator).to(dtype) for name, dtype in DTYPES.items()},
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "Gewicht é": matrix,
        "transposed": matrix.T,
        "every second": matrix[::2, 1::3],
        "three dimensions": torch.randn(3, 40, 2, generator=generator).bfloat16(),
    }


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits."""
    return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(as_bytes(tensor.contiguous()))


# ------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("metadata", (None, {"format": "pt"}))
def test_a_file_is_the_same_as_the_safetensors_library_writes_it_and_its_checksum_is_right(tmp_path, metadata):
    tensors = some_tensors()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", metadata=metadata)
    shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
    for options in (dict(tensors=tensors), dict(tensors=shapes, fetch=tensors.__getitem__)):
        written = write_tensors(tmp_path / "ours", metadata=metadata, **options)
        data = (tmp_path / "ours").read_bytes()
        assert data == (tmp_path / "theirs").read_bytes()
        assert (written.bytes, written.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_the_pieces_of_a_tensor_are_small_and_together_the_tensor():
    for tensor in some_tensors().values():
        found = list(pieces(tensor))
        row = 20 * 4  # of the widest matrix: the least that is split off it
        assert all(piece.numel() * piece.element_size() <= max(64, row) for piece in found)
        assert b"".join(map(bits, found)) == bits(tensor)


def test_streamed_tensors_fill_files_of_about_the_given_size(tmp_path):
    tensors = {f"t{number:02d}": torch.full((25,), float(number)) for number in range(10)}  # 100 bytes each
    heard = []
    files, total = write_streamed(tmp_path, iter(tensors.items()), 250, written=lambda *about: heard.append(about))
    assert total == 1000 and [len(names) for _, names in files] == [2] * 5
    assert [(path, names) for path, names, _ in heard] == files
    found = {name: tensor for path, _ in files for name, tensor in load_file(path).items()}
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in found)
    assert all(written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() for path, _, written in heard)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("wrong", (math.inf, -math.inf, math.nan))
@pytest.mark.parametrize("place", (0, 50, 99))
def test_one_number_that_is_not_finite_is_found_wherever_it_is(tmp_path, dtype, wrong, place):
    """Issue 10.9."""
    largest = torch.full((100,), torch.finfo(dtype).max, dtype=dtype)  # whose sum is not finite
    spoilt = largest.clone()
    spoilt[place] = wrong
    assert is_finite(largest) and is_finite(-largest) and not is_finite(spoilt)
    tensors = {"good": largest, "spoilt": spoilt, "not asked": spoilt, "whole numbers": torch.arange(3)}
    written = write_tensors(tmp_path / "file", tensors, must_be_finite=lambda name: name != "not asked")
    assert written.not_finite == ("spoilt",)


# ------------------------------------------------------------------------------------------- reading


def test_what_is_read_is_what_was_written_in_any_box_and_dtype(tmp_path):
    tensors = some_tensors()
    write_tensors(tmp_path / "file", tensors)
    headers = {stored.name: stored for stored in read_header(tmp_path / "file")}
    assert headers.keys() == tensors.keys()
    with open(tmp_path / "file", "rb", buffering=0) as file:
        for name, tensor in tensors.items():
            stored = headers[name]
            assert (stored.dtype, stored.shape) == (tensor.dtype, tuple(tensor.shape))
            ranges = [[(0, n), (n // 3, n - n // 4), (n - 1, n)] for n in tensor.shape if n] or [[]]
            for box in itertools.product(*ranges) if tensor.ndim and tensor.numel() else [()]:
                expected = tensor[tuple(slice(*pair) for pair in box)]
                target = torch.full_like(expected, 1, memory_format=torch.contiguous_format)
                read_into(file, stored, [begin for begin, _ in box] or [0] * tensor.ndim, target)
                assert same(target, expected), (name, box)
        matrix, into = tensors["Gewicht é"], torch.zeros(40, 33, dtype=torch.float64)
        read_into(file, headers["Gewicht é"], (0, 0), into.T[:, :20])  # a view that is not contiguous, of another dtype
        assert torch.equal(into[:20], matrix.T.double()) and not into[20:].any()


def header_of(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@pytest.mark.parametrize(
    "spoil",
    (
        lambda header: header["a"].update(data_offsets=[0, 8]),
        lambda header: header["a"].update(data_offsets=[-4, 12]),
        lambda header: header["b"].update(data_offsets=[400, 416]),
        lambda header: header["a"].update(shape=[2]),
        lambda header: header["a"].update(shape=[-2, -2]),
        lambda header: header["a"].update(dtype="F31"),
        lambda header: header["a"].pop("shape"),
        lambda header: header.update(a=3),
    ),
)
def test_a_header_that_cannot_be_true_is_an_error_and_nothing_is_read(tmp_path, spoil):
    path = tmp_path / "file"
    write_tensors(path, {"a": torch.ones(4), "b": torch.ones(4)})
    header, data = header_of(path)
    spoil(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    with pytest.raises(ValueError, match="header"):
        read_header(path)


@pytest.mark.parametrize("data", (b"", b"1234", struct.pack("<Q", 1 << 40) + b"{}", struct.pack("<Q", 2) + b"[]", bytes(100)))
def test_what_is_not_a_safetensors_file_is_a_value_error(tmp_path, data):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError):
        read_header(tmp_path / "file")


def test_a_file_that_became_shorter_is_a_value_error_and_not_a_crash(tmp_path):
    path = tmp_path / "file"
    write_tensors(path, {"a": torch.ones(100)})
    (stored,) = read_header(path)
    path.write_bytes(path.read_bytes()[:-100])
    with open(path, "rb", buffering=0) as file, pytest.raises(ValueError, match="ends within a"):
        read_into(file, stored, (0,), torch.zeros(100))
