"""Each rule fires where the bits stay and nowhere else; graphs are written as text and run by ONNX Runtime."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from moeopt.lower.onnx.simplify import RULES, simplify

HEAD = '<ir_version: 9, opset_import: ["" : 20, "com.microsoft" : 1]>\n'
SIZES = "int64[1] one = {1}, int64[1] two = {2}, int64[1] m = {-1}, int64[1] six = {6}"


def graph(text):
    """The model of ``text``; B, S and P are free sizes."""
    model = onnx.parser.parse_model(HEAD + text)
    return onnx.shape_inference.infer_shapes(model)


def answers(model, seed=0):
    rng = np.random.default_rng(seed)
    session = ort.InferenceSession(model.SerializeToString())
    found = []
    for B, S in ((1, 1), (2, 3), (3, 1), (1, 4)):
        sizes = {"B": B, "S": S}
        feeds = {}
        for given in session.get_inputs():
            shape = [sizes.get(size, size) for size in given.shape]
            values = rng.standard_normal(shape).astype(np.float32)
            feeds[given.name] = values > 0 if given.type == "tensor(bool)" else values
            if given.type == "tensor(int64)":
                feeds[given.name] = rng.integers(0, 4, shape)
        found += session.run(None, feeds)
    return found


FIRES = {
    "constant_shape": f"""g (float[B,S,6] x) => (float[B,S,2,3] y) <{SIZES}> {{
        b = Shape<start=0, end=1>(x)
        s = Shape<start=1, end=2>(x)
        shape = Concat<axis=0>(b, s, two, m)
        y = Reshape<allowzero=1>(x, shape) }}""",
    "idle": """g (float[B,S,6] x) => (float[B,S,6] y) {
        shape = Shape(x)
        same = Expand(x, shape)
        y = Neg(same) }""",
    "expanded_for_where": """g (bool[B,1,6] c, float[B,S,6] x) => (float[B,S,6] y) <float zero = {0}> {
        shape = Shape(x)
        zeros = Expand(zero, shape)
        y = Where(c, x, zeros) }""",
    "twice_unsqueezed": """g (float[B,S] x) => (float[B,1,S,1,1] y) <int64[1] a = {1}, int64[2] b = {-1, 3}> {
        one = Unsqueeze(x, a)
        y = Unsqueeze(one, b) }""",
    "heads_turned_first": """g (float[B,S,4,8] x, int64[B,S] at, float[16,4] cos, float[16,4] sin) => (float[B,4,S,8] y)
        <int64[3] flat = {0, 0, -1}, int64[4] heads = {0, 0, 4, 8}> {
        one = Reshape(x, flat)
        two = com.microsoft.RotaryEmbedding<num_heads=4>(one, at, cos, sin)
        three = Reshape(two, heads)
        y = Transpose<perm=[0, 2, 1, 3]>(three) }""",
}


def named(proto):
    """The model with sizes that shape inference finds no names for, named as an export does."""
    model = ir.from_proto(proto)
    for node in model.graph:
        for value in node.outputs:
            if value.name in KNOWN:
                value.shape = ir.Shape(KNOWN[value.name])
    return model


KNOWN = {"same": ["B", "S", 6], "zeros": ["B", "S", 6]}


@pytest.mark.parametrize("rule", FIRES)
def test_a_rule_fires_to_the_same_bits(rule):
    proto = graph(FIRES[rule])
    model = named(proto)
    before = len(model.graph)
    assert simplify(model) == {rule: 1}
    assert len(model.graph) < before
    for want, got in zip(answers(proto), answers(ir.to_proto(model)), strict=True):
        np.testing.assert_array_equal(got, want)


RESHAPES = [
    ([-1, 6], [-1, 12], True), ([-1, 6], [-1, 3], False), ([-1, 6], [12], True), ([12], [3, 4], True),
    ([12], [-1, 4], False), ([-1, 6], [10], False), ([0, -1], [-1, 6], False), ([-1, 6], [0, -1], False),
    ([-1, 5], [12], False), ([-1], [4, 3], True),
]  # fmt: skip


@pytest.mark.parametrize(("one", "two", "fires"), RESHAPES)
def test_reshapes_become_one_only_where_the_second_fails_when_the_first_does(one, two, fires):
    """The first may be the model's own check of a size: it must not go where the second would take other sizes."""
    text = f"""g (float[N] x) => (float[{",".join("abc"[: len(two)])}] y)
        <int64[{len(one)}] a = {{{", ".join(map(str, one))}}}, int64[{len(two)}] b = {{{", ".join(map(str, two))}}}> {{
        between = Reshape(x, a)
        y = Reshape(between, b) }}"""
    proto = onnx.parser.parse_model(HEAD + text)
    model = ir.from_proto(proto)
    assert simplify(model) == ({"twice_reshaped": 1} if fires else {})
    session = ort.InferenceSession(proto.SerializeToString())
    simple = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    for size in (1, 3, 5, 6, 10, 12, 24):
        x = np.arange(size, dtype=np.float32)
        try:
            want = session.run(None, {"x": x})[0]
        except Exception:  # ONNX Runtime's own
            with pytest.raises(Exception, match="Reshape"):
                simple.run(None, {"x": x})
        else:
            np.testing.assert_array_equal(simple.run(None, {"x": x})[0], want)


TWINS = {
    "a size of another place": f"""g (float[B,S,6] x) => (float[S,B,2,3] y) <{SIZES}> {{
        b = Shape<start=0, end=1>(x)
        s = Shape<start=1, end=2>(x)
        shape = Concat<axis=0>(s, b, two, m)
        y = Reshape(x, shape) }}""",
    "a size of another tensor": f"""g (float[B,S,6] x, float[P,S] z) => (float[P,a,b] y) <{SIZES}> {{
        p = Shape<start=0, end=1>(z)
        shape = Concat<axis=0>(p, m, six)
        y = Reshape(x, shape) }}""",
    "a shape that may hold a zero": """g (float[B,S,6] x) => (float[B,S,6] y) <int64[2] rest = {0, 6}> {
        b = Shape<start=0, end=1>(x)
        shape = Concat<axis=0>(b, rest)
        y = Reshape(x, shape) }""",
    "an Expand that repeats": """g (float[B,1,6] x) => (float[B,2,6] y) <int64[3] shape = {1, 2, 1}> {
        y = Expand(x, shape) }""",
    "a result of the graph": """g (float[B,S,6] x) => (float[B,S,6] y) {
        shape = Shape(x)
        y = Expand(x, shape) }""",
    "rows that Where needs": """g (bool[B,1,6] c, float[B,S,6] x, float[1,1,6] v) => (float[B,S,6] y) {
        shape = Shape(x)
        rows = Expand(v, shape)
        y = Where(c, x, rows) }""",
    "another number of heads": """g (float[B,S,4,8] x, int64[B,S] at, float[16,8] cos, float[16,8] sin)
        => (float[B,4,S,8] y) <int64[3] flat = {0, 0, -1}, int64[4] heads = {0, 0, 4, 8}> {
        one = Reshape(x, flat)
        two = com.microsoft.RotaryEmbedding<num_heads=2>(one, at, cos, sin)
        three = Reshape(two, heads)
        y = Transpose<perm=[0, 2, 1, 3]>(three) }""",
    "numbers that something else reads": """g (float[B,S,4,8] x, int64[B,S] at, float[16,4] cos, float[16,4] sin)
        => (float[B,4,S,8] y, float[B,S,32] z) <int64[3] flat = {0, 0, -1}, int64[4] heads = {0, 0, 4, 8}> {
        one = Reshape(x, flat)
        two = com.microsoft.RotaryEmbedding<num_heads=4>(one, at, cos, sin)
        three = Reshape(two, heads)
        z = Neg(two)
        y = Transpose<perm=[0, 2, 1, 3]>(three) }""",
}


@pytest.mark.parametrize("text", TWINS.values(), ids=TWINS)
def test_what_would_be_another_graph_stays(text):
    model = named(graph(text))
    before = [n.op_type for n in model.graph]
    assert simplify(model) == {} and [n.op_type for n in model.graph] == before


def test_every_rule_is_tested():
    assert {rule.__name__ for rule in RULES} == {*FIRES, "twice_reshaped"}
