"""The JSON of a bundle as types: what each key holds, checked once when it is read.

Keys that are not named here may be there: a newer moeopt says more of a bundle, in the same schema. What a reader of
its own checks with a message of its own (structures, conditions, sizes, literals) is ``Any`` here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from moeopt.value_types import JsonValue

Count = Annotated[int, Meta(ge=0, le=1 << 62)]
Text = Annotated[str, Meta(max_length=1 << 20)]
Name = Annotated[str, Meta(max_length=4096)]


class Input(Struct):
    """One leaf of the arguments: a tensor, a number, or a value that never changes."""

    name: Name
    onnx: Name | UnsetType = UNSET
    dtype: Name | UnsetType = UNSET
    device: Name | UnsetType = UNSET
    shape: list[int | Name | None] | UnsetType = UNSET
    number: Literal["int", "float", "bool"] | UnsetType = UNSET
    constant: JsonValue = None


class Signature(Struct):
    """How a graph is called."""

    parameters: list[Name] = []
    inputs: list[Input] = []
    in_tree: JsonValue = None
    out_tree: JsonValue = None


class BlockRecord(Struct):
    """What a report said of one block."""

    name: Name
    status: Name
    kind: Name = ""
    reason: Text = ""
    lowering: Text = ""


class Router(Struct):
    score: Name
    top_k: Count
    num_experts: Count
    renormalize: bool = False
    dtype: Name | None = None


class NodeRecord(Struct):
    """A lowered block, as ``onnx_sites.describe`` writes it."""

    name: Name
    lowering: Name
    why: Text
    spec: Text
    router: Router | None
    experts: Count
    top_k: Count
    dtype: Name
    weights_dtype: Name
    bank_dtype: Name
    w_in: list[list[Count]]
    w_out: list[Count]
    b_in: list[bool | list[bool]]
    b_out: bool | list[bool]
    norm: bool | list[bool]
    x: Name | UnsetType = UNSET
    ids: Name | UnsetType = UNSET
    weights: Name | UnsetType = UNSET
    y: Name | UnsetType = UNSET
    probe: Count | None = None


class ProbeRecord(Struct):
    budget: float


class Form(Struct):
    """A lowered graph."""

    lowerings: dict[str, Any] = {}
    sites: list[NodeRecord] = []
    probes: list[ProbeRecord] = []
    facts: dict[str, float] = {}


class NativeRecord(Struct):
    """The graph of an ONNX Runtime bundle with moeopt's own operator: the blocks that it computes."""

    blocks: list[Name]
    nodes: Count = 0


class PlanRecord(Struct):
    """A plan of TensorRT."""

    product: Name
    version: Name
    sm: Count
    sha256: Name
    cuda: Count | None = None
    flags: list[Name] = []
    profiles: list[dict[str, list[list[Count]]]] = []
    inputs: JsonValue = None
    outputs: JsonValue = None
    layers: dict[str, Count] = {}
    activation_bytes: Count = 0
    weights_bytes: Count = 0


class GoldenRecord(Struct):
    """``distance`` has a reader of its own: ``golden.read_distance``."""

    runs: Count = 0
    distance: JsonValue = None
    why: Text = ""


class ManifestFile(Form):
    """``moeopt.json``. What is checked elsewhere, with a message of its own, is ``Any`` or not named."""

    versions: dict[str, Name] = {}
    source: dict[str, Name | None] = {}
    provider: Name | None = None
    runtimes: dict[str, Name] = {}
    signature: Signature | None = None
    dynamic: dict[str, Annotated[list[int | None], Meta(min_length=2, max_length=2)]] = {}
    blocks: list[BlockRecord] = []
    golden: GoldenRecord | None = None
    portable: JsonValue = None
    native: NativeRecord | None = None
    activations: Name | None = None
    variables: dict[str, Text] = {}
    tensorrt: JsonValue = None


class GraphNode(Struct):
    """One call of a torch graph."""

    op: JsonValue
    args: list[Any]
    out: Name
    kwargs: dict[str, Any] = {}


class GraphFile(Struct):
    """``graph.json``."""

    parameters: list[Name]
    in_tree: JsonValue
    out_tree: JsonValue
    inputs: list[Input]
    weights: dict[str, Name]
    nodes: list[GraphNode]
    outputs: list[Any]
    write_back: list[dict[str, Name]]
    sizes: JsonValue


class Output(Struct):
    onnx: Name | UnsetType = UNSET
    tensor: Count | UnsetType = UNSET
    constant: JsonValue = None


class CausalInput(Struct):
    input: Name
    dtype: Name


class CausalCache(Struct):
    input: Name
    output: Name
    dtype: Name
    heads: Count | UnsetType = UNSET
    size: Count | UnsetType = UNSET
    shape: list[Count] | UnsetType = UNSET


class CausalLogits(Struct):
    output: Name
    dtype: Name


class Causal(Struct):
    """How a causal language model is called, as ``causal_lm.export_causal_lm`` writes it."""

    inputs: dict[str, CausalInput]
    logits: CausalLogits
    cache: list[dict[str, CausalCache]]
    output_class: Annotated[list[Name], Meta(min_length=2, max_length=2)]
    use_cache: bool
    vocab_size: Count
    config: dict[str, Any]
    generation_config: dict[str, Any]
    parameters: list[Name] = []
    architecture: Name = ""
    model_type: Name = ""
    own_class: bool = False
    own_generation: list[Name] = []
    conditions: JsonValue = []
    condition_leaves: dict[Annotated[str, Meta(pattern="^[0-9]{1,9}$")], Name] = {}


class SignatureFile(Struct):
    """``signature.json``."""

    parameters: list[Name]
    in_tree: JsonValue
    out_tree: JsonValue
    inputs: list[Input]
    outputs: list[Output]
    sizes: JsonValue
    conditions: JsonValue = []
    causal_lm: Causal | None = None
