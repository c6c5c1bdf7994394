"""Weights written one by one: a safetensors file that safetensors reads, every tensor of it aligned and mapped."""

import errno
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from moeopt.bundle.aligned import ALIGNMENT
from moeopt.bundle.manifest import write_bundle
from moeopt.bundle.weights_file import DTYPE_NAMES, WeightsFile, becomes_the_bundles, is_becoming_one, save_weights
from moeopt.full_disk import told


def sample(dtype, shape=(5, 3)):
    return torch.arange(1, 16).reshape(shape).to(dtype)


@pytest.mark.parametrize("dtype", list(DTYPE_NAMES), ids=str)
def test_every_dtype_comes_back_aligned(tmp_path, dtype):
    blocks = {"a": sample(dtype), "odd": sample(dtype)[0], "none": torch.empty(0, 4, dtype=dtype), "b": sample(dtype)}
    save_weights(blocks, tmp_path / "w")
    found = load_file(tmp_path / "w")
    assert {n for n in found if not n.startswith("moeopt.fill.")} == set(blocks)
    for name, tensor in blocks.items():
        assert found[name].dtype == dtype and torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))
    with safe_open(tmp_path / "w", "pt") as file:
        assert all(file.get_tensor(name).data_ptr() % ALIGNMENT == 0 for name in blocks)


def test_scalars_and_strides_and_dtypes_that_safetensors_has_no_name_for(tmp_path):
    wide = torch.complex(torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    save_weights({"one": torch.tensor(3.5), "turned": sample(torch.float32).t(), "wide": wide}, tmp_path / "w")
    found = load_file(tmp_path / "w")
    assert found["one"] == 3.5 and torch.equal(found["turned"], sample(torch.float32).t())
    assert found["wide"].dtype == torch.uint8 and torch.equal(found["wide"].view(torch.complex128), wide)


def test_what_is_written_as_it_is_made_is_not_written_again(tmp_path):
    file = WeightsFile(tmp_path / "begun", 4096, 4096)
    first, second = file.add(sample(torch.bfloat16)), file.add(sample(torch.int64))
    end = file.end
    with becomes_the_bundles(file):
        assert is_becoming_one()
        save_weights({"second": second, "first": first, "late": torch.ones(4)}, tmp_path / "w")
    assert not is_becoming_one()
    assert file.end == end + ALIGNMENT  # of late alone
    found = load_file(tmp_path / "w")
    assert torch.equal(found["first"], sample(torch.bfloat16)) and torch.equal(found["second"], sample(torch.int64))
    assert torch.equal(found["late"], torch.ones(4))
    assert torch.equal(first, sample(torch.bfloat16))  # the mapping stays
    file.close()


def test_two_blocks_of_the_same_bytes_are_both_there(tmp_path):
    file = WeightsFile(tmp_path / "begun", 4096, 4096)
    first = file.add(sample(torch.float32))
    file.finish({"a": first, "b": first[1:]})
    found = load_file(tmp_path / "begun")
    assert torch.equal(found["a"], first) and torch.equal(found["b"], first[1:])


def test_a_header_that_outgrows_its_room_moves_the_data(tmp_path):
    file = WeightsFile(tmp_path / "begun", 4096, 8)
    first = file.add(sample(torch.float32))
    file.finish({f"a rather long name {n}": first + n for n in range(20)} | {"first": first})
    found = load_file(tmp_path / "begun")
    assert torch.equal(found["first"], sample(torch.float32)) and torch.equal(first, found["first"])
    assert torch.equal(found["a rather long name 7"], first + 7) and found["first"].data_ptr() % ALIGNMENT == 0


def test_a_write_to_a_mapped_tensor_leaves_the_file_alone(tmp_path):
    file = WeightsFile(tmp_path / "begun", 4096, 4096)
    first = file.add(sample(torch.float32))
    first.zero_()
    assert torch.equal(file.restore(torch.float32, [5, 3], file.mapped.offset_of(first)), torch.zeros(5, 3))
    file.mapped.release()  # what was written in place is gone
    assert torch.equal(first, sample(torch.float32))


def test_more_than_the_room_is_refused(tmp_path):
    file = WeightsFile(tmp_path / "begun", 64, 64)
    with pytest.raises(ValueError, match="has room for .* bytes, and .* are needed"):
        file.add(torch.zeros(1000))


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS, errno.EACCES])
def test_another_refusal_gets_no_way_out_that_is_not_one(tmp_path, monkeypatch, code):
    file = WeightsFile(tmp_path / "begun", 4096, 4096)
    monkeypatch.setattr(os, "pwrite", lambda *given: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
    with pytest.raises(OSError, match=rf"^\[Errno {code}\] {os.strerror(code)}: '.*begun'$") as told:
        file.add(torch.ones(3))
    assert told.value.errno == code and told.value.filename == str(tmp_path / "begun")


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV])
def test_a_disk_whose_files_have_one_name_gets_a_copy(tmp_path, monkeypatch, code):
    file = WeightsFile(tmp_path / "begun", 4096, 4096)
    first = file.add(sample(torch.float32))
    monkeypatch.setattr(os, "link", lambda *given: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
    with becomes_the_bundles(file):
        save_weights({"first": first}, tmp_path / "w")
    assert torch.equal(load_file(tmp_path / "w")["first"], sample(torch.float32))
    assert (tmp_path / "begun").read_bytes() == (tmp_path / "w").read_bytes()
    file.close()


def test_the_header_is_json_without_gaps(tmp_path):
    save_weights({"a": torch.ones(3), "b": torch.ones(5, dtype=torch.int8)}, tmp_path / "w")
    blob = (tmp_path / "w").read_bytes()
    length = int.from_bytes(blob[:8], "little")
    spans = sorted(entry["data_offsets"] for entry in json.loads(blob[8 : 8 + length]).values())
    assert spans[0][0] == 0 and spans[-1][1] == len(blob) - 8 - length
    assert all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False)) and (8 + length) % ALIGNMENT == 0


@pytest.mark.parametrize(
    ("code", "way"),
    [(errno.ENOSPC, "free some space, and call again"), (errno.EFBIG, r"\(ulimit -f\), or take another")],
)
@pytest.mark.parametrize("step", ["begin", "add", "finish"])
def test_a_disk_that_takes_no_more_is_told_with_the_file_and_the_way_out(tmp_path, monkeypatch, step, code, way):
    def refuse(*given):
        raise OSError(code, os.strerror(code))

    if step != "begin":
        file = WeightsFile(tmp_path / "begun", 4096, 4096)
    monkeypatch.setattr(os, "ftruncate" if step == "begin" else "pwrite", refuse)
    calls = {
        "begin": lambda: WeightsFile(tmp_path / "begun", 4096, 4096),
        "add": lambda: file.add(torch.ones(3)),
        "finish": lambda: file.finish({"a": torch.ones(3)}),
    }
    with pytest.raises(OSError, match=rf"{os.strerror(code)}: .*{way}.*begun") as told:
        calls[step]()
    assert told.value.errno == code and told.value.filename == str(tmp_path / "begun")


def test_any_file_of_a_bundle_may_be_the_one_that_the_disk_does_not_take(tmp_path):
    def write(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a flush has it: without a file's name

    with pytest.raises(OSError, match=r"free some space, and call again: '.*b'") as said:
        write_bundle(tmp_path / "b", "torch", write, {})
    assert said.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match=r"directory: '.*absent'$"), told(tmp_path / "b"):
        (tmp_path / "absent").read_bytes()
