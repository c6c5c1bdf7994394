"""What a streamed run takes of its own memory does not grow with the model; watched in a process of its own."""

import json
import sys
from pathlib import Path

import pytest

from tests import children

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("transformers 4 has no experts that are put together", allow_module_level=True)
if not Path("/proc/self/status").exists():
    pytest.skip("this system does not tell what memory is a process's own", allow_module_level=True)

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from moeopt.ir.weight_format import INT4_BLOCK32  # noqa: E402
from moeopt.ops import quantize  # noqa: E402
from tests.checkpoint.families import write  # noqa: E402

CHILD = (
    children.WATCHES_MEMORY
    + """
import json, sys
import moeopt, torch, transformers
import transformers.models.qwen3_moe.modeling_qwen3_moe
from moeopt.checkpoint.stream import streamed
from moeopt.options import Options

fields = {"verify": "fast", **json.loads(sys.argv[5])}
moeopt.optimize(sys.argv[3], **{**fields, "verify": "off"})  # every library is imported and has its buffers
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
limit = int(sys.argv[4])
if limit:
    import resource
    with open("/proc/self/status") as file:
        used = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + limit, used + limit))
made = moeopt.optimize(sys.argv[1], out=sys.argv[2] or None, **fields)
time.sleep(0.01)
found = {"peak": peak[0] - before, "left": anonymous() - before, "passed": made.certificate.passed}
print(json.dumps({**found, "notes": made.report.notes}))
"""
)
LAYERS = dict(hidden_size=512, moe_intermediate_size=1024, num_experts=16, intermediate_size=256)
LAYER = 16 * 3 * 512 * 1024 * 4
"""Bytes of one layer's experts."""
KEPT_BY_THE_KERNEL = 32 << 20
"""At most, as ``moeopt/ops/native/src/workspace.h`` says."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write("qwen3", tmp_path_factory.mktemp("tiny") / "model", num_hidden_layers=1)


def watched(model, out, tiny, limit=0, **fields):
    words = [sys.executable, "-c", CHILD, str(model), str(out), str(tiny), str(limit), json.dumps(fields)]
    done = children.run(words, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["passed"]
    return found


def test_streamed_into_a_bundle_a_model_takes_less_than_three_layers(tmp_path, tiny):
    """Its limit of data is below its weights: that counts private mappings, too, unless they cannot be written to."""
    model = write("qwen3", tmp_path / "model", shards=4, num_hidden_layers=5, **LAYERS)
    taken = watched(model, tmp_path / "b", tiny, limit=9 * LAYER // 2)
    assert taken["peak"] < 3 * LAYER  # two of weights, and what tracing and verifying take


def in_int4(path):
    """The experts of a directory in groups of 32, as compressed-tensors packs them."""
    tensors = {}
    for file in path.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if ".experts." not in name:
                tensors[name] = tensor
                continue
            held, name = quantize(tensor, INT4_BLOCK32), name.removesuffix(".weight")
            tensors[f"{name}.weight_packed"] = held.codes.contiguous().view(torch.int32)
            tensors |= {f"{name}.weight_scale": held.scales, f"{name}.weight_shape": torch.tensor(tensor.shape)}
        file.unlink()
    (path / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    words = json.loads((path / "config.json").read_text())
    weights = {"num_bits": 4, "group_size": 32}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}
    (path / "config.json").write_text(json.dumps(words | {"quantization_config": config}))
    return path


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return in_int4(write("qwen3", tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=4, **LAYERS))


def test_a_quantised_checkpoint_is_never_expanded_in_memory(deep, tmp_path):
    """Four layers of floats are pages of a scratch file while they are verified; what stays are pages of codes, and
    what the CPU kernel keeps for its next call."""
    small = in_int4(write("qwen3", tmp_path / "small", num_hidden_layers=1, hidden_size=64, moe_intermediate_size=64))
    found = watched(deep, "", small, quantize="checkpoint")
    assert found["peak"] < 3 * LAYER and found["left"] < LAYER // 4 + KEPT_BY_THE_KERNEL
    assert any("have the codes of the checkpoint" in note for note in found["notes"])


SPARSE = """
import json, sys
import moeopt, transformers
import transformers.models.qwen3_moe.modeling_qwen3_moe

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

moeopt.inspect(sys.argv[2], device="H100-SXM")
before = anonymous()
found = moeopt.inspect(sys.argv[1], device="H100-SXM")
print(json.dumps({"taken": anonymous() - before, "parameters": found.counts.all}))
"""


def test_inspecting_a_directory_reads_no_weight(tmp_path, tiny):
    """Its file claims 19 GB, and has no block on the disk beyond its header."""
    layers, experts, hidden, inner = 4, 128, 2048, 1536
    config = transformers.Qwen3MoeConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=inner, moe_intermediate_size=inner, head_dim=64,
        num_hidden_layers=layers, num_experts=experts, num_experts_per_tok=8, num_attention_heads=4,
        num_key_value_heads=2, architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    header, at = {}, 0
    for layer in range(layers):
        for expert in range(experts):
            for name, shape in (("gate", [inner, hidden]), ("up", [inner, hidden]), ("down", [hidden, inner])):
                size = 4 * inner * hidden
                entry = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
                header[f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"] = entry
                at += size
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    done = children.run([sys.executable, "-c", SPARSE, str(tmp_path), str(tiny)])
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["parameters"] * 4 > 19e9 and found["taken"] < 100_000_000
