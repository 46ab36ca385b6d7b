"""Files of contexts: what has one meaning is read, all else gets one line."""

import gzip
import io
import pickle
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from toy import LazyGaussians

from amortized.contexts import files
from amortized.contexts.files import FileRows, load_contexts, open_contexts
from amortized.contract import ProblemError

A = np.arange(18.0).reshape(6, 3) / 8  # exact in every float


class Masked(NamedTuple):
    value: torch.Tensor
    mask: torch.Tensor


class Nested(NamedTuple):
    inner: Masked
    label: torch.Tensor


TENSOR = torch.zeros(1, 3)
MASKED = Masked(torch.zeros(1, 3), torch.zeros(1, dtype=torch.bool))
NESTED = Nested(MASKED, torch.zeros(1, dtype=torch.int64))


def write(name, content):
    if isinstance(content, bytes):
        Path(name).write_bytes(content)
    elif name.endswith(".pt"):
        torch.save(content, name)
    elif name.endswith(".npz"):
        np.savez(name, **content)
    else:
        np.save(name, content)
    return name


def packed(name, content):
    return Path(write(name, content)).read_bytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.npy", A),
        ("big-endian.npy", A.astype(">f8")),
        ("half.npy", A.astype(">f2")),
        ("longdouble.npy", A.astype(np.longdouble)),
        ("fortran.npy", np.asfortranarray(A)),
        ("backwards.npy", np.ascontiguousarray(A[::-1])[::-1]),
        ("one.npz", {"arr_0": A}),
        ("UPPER.NPY", A),
        ("double.pt", torch.from_numpy(A)),
        ("bfloat16.pt", torch.from_numpy(A).bfloat16()),
        ("parameter.pt", torch.nn.Parameter(torch.from_numpy(A))),
        ("sparse.pt", torch.from_numpy(A).to_sparse()),
        ("one.pt", {"a": torch.from_numpy(A)}),
        ("list.pt", A.tolist()),
        ("plain.csv", b"\n".join(b",".join(b"%r" % x for x in row) for row in A.tolist())),
        (
            "names.csv",
            b"\xef\xbb\xbfx, y, z\r\n" + b"\r\n".join(b",".join(b'"%r"' % x for x in row) for row in A.tolist()),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tensor_is_read_from_every_form(name, content):
    if name == "UPPER.NPY":
        buffer = io.BytesIO()
        np.save(buffer, content)
        content = buffer.getvalue()
    found = load_contexts(write(name, content), TENSOR)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.from_numpy(A).float())
    found.add_(1)  # its own memory, and no gradient asked of it


def test_a_tensor_saved_on_a_gpu_is_read_without_one():
    torch.save(torch.from_numpy(A), "cpu.pt")
    with zipfile.ZipFile("cpu.pt") as before, zipfile.ZipFile("cuda.pt", "w") as after:
        for entry in before.namelist():  # the device's name in the pickle
            after.writestr(entry, before.read(entry).replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"))
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load("cuda.pt", weights_only=True)
    assert torch.equal(load_contexts("cuda.pt", TENSOR), torch.from_numpy(A).float())


def test_fields_are_read_by_their_names():
    mask = np.array([1, 0, 1, 1, 0, 0])
    record = np.zeros(6, [("mask", "?"), ("value", ">f4", 3)])
    record["value"], record["mask"] = A, mask
    for name, content in (
        ("fields.npz", {"mask": mask, "value": A}),
        ("fields.pt", {"mask": torch.from_numpy(mask), "value": torch.from_numpy(A)}),
        ("record.npy", record),
    ):
        found = load_contexts(write(name, content), MASKED)
        assert found.mask.tolist() == mask.astype(bool).tolist()
        assert torch.equal(found.value, torch.from_numpy(A).float())
    nested = {"inner.mask": mask, "inner.value": A, "label": np.arange(6.0)}
    found = load_contexts(write("nested.npz", nested), NESTED)
    assert found.label.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.label.dtype == torch.int64
    assert found.inner.mask.dtype == torch.bool


def test_a_column_of_a_table_is_a_vector_of_contexts():
    for content in (b"1\n2\n", b"strength\n1\n2", b"# a comment\n1\n\n2\n"):
        assert load_contexts(write("column.csv", content), torch.zeros(1)).tolist() == [1, 2]
        assert load_contexts("column.csv", torch.zeros(1, 1)).tolist() == [[1], [2]]


class Anything:
    pass


EXPECTED = "; expected a float32 tensor of shape (B, 3) in a .npy, .pt or .csv file"
REFUSED = [
    ("empty.npy", b"", "cannot be read: it is damaged, or holds other things than numbers"),
    ("half.npy", lambda: packed("whole.npy", A)[:-9], "cannot be read: it is damaged"),
    ("text.npy", b"1,2,3", "cannot be read: it is damaged"),
    ("half.npz", lambda: packed("whole.npz", {"a": A})[:-40], "cannot be read: it is damaged"),
    ("flipped.npz", lambda: flipped(packed("whole.npz", {"a": A})), "cannot be read: it is damaged"),
    ("half.pt", lambda: packed("whole.pt", torch.from_numpy(A))[:-40], "cannot be read: it is damaged"),
    ("text.pt", b"no archive", "cannot be read: it is damaged"),
    ("object.npy", np.array([[1, "x", None]] * 2, object), "or holds other things than numbers"),
    ("object.npz", {"a": np.array([[1, "x", None]] * 2, object)}, "or holds other things than numbers"),
    ("code.pt", Anything(), "or holds other things than numbers"),
    ("array.pt", A, "or holds other things than numbers"),
    ("words.npy", np.array([["a", "b", "c"]]), "holds other things than numbers (<U1)"),
    ("dates.npy", np.zeros((2, 3), "M8[s]"), "holds other things than numbers (datetime64[s])"),
    ("none.pt", {"a": None}, "holds other things than numbers in a (NoneType)"),
    ("ragged.pt", [[1.0, 2.0], [3.0]], "holds other things than numbers (list)"),
    ("graph.pt", [torch.ones(3, requires_grad=True)], "holds other things than numbers (list)"),
    ("complex.npy", A + 0j, "holds complex128 numbers, which float32 cannot"),
    ("record.npy", np.zeros(6, [("x", "f4"), ("y", "f4"), ("z", "f4")]), "has the fields x, y, z"),
    ("several.npz", {"x": A, "y": A}, "has the fields x, y"),
    ("nothing.pt", {}, "has the fields none"),
    ("one.npy", A[0], "has contexts of shape (3,)"),
    ("scalar.npy", np.array(1.0), "has contexts of shape ()"),
    ("wide.npy", np.zeros((6, 4)), "has contexts of shape (6, 4)"),
    ("none.npy", A[:0], "has no rows"),
    ("list.json", b"[]", "is no file of a kind that contexts are read from (.json)"),
    ("numbers.npy.gz", lambda: gzip.compress(packed("whole.npy", A)), "contexts are read from (.gz)"),
    ("contexts", b"", "contexts are read from (it has no suffix)"),
    ("wide.csv", b"1,2,3,4\n", "has contexts of shape (1, 4)"),
    (
        "words.csv",
        b"1,2,3\n4,five,6\n",
        "is no table of numbers: could not convert string 'five' to float64 at row 1, column 2",
    ),
    ("first.csv", b"1,2,x\n4,5,6\n", "is no table of numbers: could not convert string 'x'"),
    ("missing.csv", b"1,2,3\n4,,6\n", "is no table of numbers: could not convert string ''"),
    ("ragged.csv", b"1,2,3\n4,5\n", "is no table of numbers: the number of columns changed from 3 to 2 at row 2"),
    ("excel.csv", "1,2,3\n".encode("utf-16"), "is no table of numbers: 'utf-8' codec"),
    ("names.csv", b"x,y,z\n", "has no rows"),
    ("empty.csv", b"", "has no rows"),
]


def flipped(data):
    """One byte of the array is another one, so the archive's checksum does not hold."""
    return data[:200] + bytes([data[200] ^ 1]) + data[201:]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_all_else_is_refused_in_one_line(name, content, message):
    content = content() if callable(content) else content
    with pytest.raises(ProblemError) as error:
        load_contexts(write(name, content), TENSOR)
    line = str(error.value)
    assert line.startswith(name)
    assert message in line
    assert line.endswith(EXPECTED)
    assert "\n" not in line
    assert not any(word in line for word in ("pickle", "weights_only", "usecols"))


MASK = np.ones(6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"value": A[:3], "mask": MASK}, "has fields with different numbers of rows: value 3, mask 6"),
        ({"value": A, "msk": MASK}, "has the fields value, msk"),
        ({"value": A}, "has the fields value"),
        ({"value": A[:, :2], "mask": MASK}, "has contexts of shape (6, 2) in value"),
        ({"value": A, "mask": MASK / 2}, "holds 0.5 in mask, which bool cannot"),
        ({"value": A * 1j, "mask": MASK}, "holds complex128 numbers in value, which float32 cannot"),
        ({"value": A[:0], "mask": MASK[:0]}, "has no rows"),
    ],
)
def test_fields_that_do_not_fit_are_named(content, message):
    with pytest.raises(ProblemError) as error:
        load_contexts(write("fields.npz", content), MASKED)
    assert str(error.value) == (
        f"fields.npz {message}; expected the fields value (B, 3), mask (B) in a .npz file, or a dict of tensors in a .pt file"
    )
    with pytest.raises(ProblemError, match="lone.npy holds one array; expected the fields value"):
        load_contexts(write("lone.npy", A), MASKED)


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf, 300])
def test_numbers_that_a_type_cannot_hold_are_not_bent_into_it(value):
    np.save("labels.npy", np.array([1.0, value]))
    with pytest.raises(ProblemError, match=f"holds {value:g}.* which int8 cannot"):
        load_contexts("labels.npy", torch.zeros(1, dtype=torch.int8))
    np.save("large.npy", np.array([2**63], np.uint64))
    with pytest.raises(ProblemError, match="which int64 cannot"):
        load_contexts("large.npy", torch.zeros(1, dtype=torch.int64))


def test_contexts_of_a_file_beside_a_data_set_of_single_rows():
    np.save("points.npy", A)
    data = LazyGaussians(predict="points.npy")
    assert torch.equal(data.batch("predict", 0), torch.from_numpy(A).float())


ROWS = Masked(torch.from_numpy(A).float(), torch.arange(6) > 2)
RECORDS = np.zeros(6, [("value", "f8", 3), ("mask", "?")])
RECORDS["value"], RECORDS["mask"] = A, ROWS.mask


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.npz", {"mask": ROWS.mask.numpy(), "value": A.astype(">f8")}), ("records.npy", RECORDS)],
    ids=["npz", "npy"],
)
def test_a_large_file_is_mapped(name, content, monkeypatch):
    monkeypatch.setattr(files, "MEMORY", 0)
    rows = open_contexts(write(name, content), like=MASKED)
    assert isinstance(rows, FileRows)
    assert len(rows) == 6
    index = torch.tensor([4, 0, 4])
    for found in (rows, pickle.loads(pickle.dumps(rows))):
        assert all(map(torch.equal, found.take(index), (leaf[index] for leaf in ROWS)))
    assert all(map(torch.equal, rows[1], (leaf[1] for leaf in ROWS)))


def test_a_large_file_that_cannot_be_mapped_is_read_or_refused_as_a_small_one(monkeypatch):
    monkeypatch.setattr(files, "MEMORY", 0)
    np.savez_compressed("compressed.npz", value=A, mask=ROWS.mask)
    assert all(map(torch.equal, open_contexts("compressed.npz", like=MASKED), ROWS))
    assert torch.equal(open_contexts(write("a.csv", b"1,2,3"), like=TENSOR), torch.tensor([[1.0, 2.0, 3.0]]))
    for name, content in (("cut.npz", packed("a.npz", {"value": A})[:100]), ("other.npy", b"no array")):
        with pytest.raises(ProblemError, match=f"^{name} cannot be read: it is damaged"):
            open_contexts(write(name, content), like=TENSOR)
    with pytest.raises(ProblemError, match=r"wide.npy has contexts of shape \(6, 1, 3\); expected"):
        open_contexts(write("wide.npy", A[:, None]), like=TENSOR)
    rows = open_contexts(write("half.npz", {"value": A, "mask": A[:, 1]}), like=MASKED)
    with pytest.raises(ProblemError, match="half.npz holds 0.125 in mask, which bool cannot; expected the fields"):
        rows.take(torch.arange(2))
