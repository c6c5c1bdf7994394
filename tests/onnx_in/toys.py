"""Small language models with dense-form experts, and their exports by torch's two ONNX exporters."""

import torch
import torch.nn.functional as F
from torch import nn

V, H, I, E, K = 50, 24, 32, 6, 2


class DenseMoE(nn.Module):
    """Every expert runs on every token; a table of routing weights, mostly zeros, picks."""

    def __init__(self, form="bmm"):
        super().__init__()
        self.form = form
        self.gate = nn.Linear(H, E, bias=False)
        self.up = nn.Parameter(torch.randn(E, H, 2 * I) * H**-0.5)
        self.down = nn.Parameter(torch.randn(E, I, H) * I**-0.5)

    def table(self, rows):
        probs = F.softmax(self.gate(rows), -1)
        weights, ids = probs.topk(K, -1)
        return torch.zeros_like(probs).scatter(1, ids, weights / weights.sum(-1, keepdim=True))

    def forward(self, x):
        rows = x.reshape(-1, H)
        table = self.table(rows)
        if self.form == "loop":
            y = torch.zeros_like(rows)
            for e in range(E):
                gate, up = (rows @ self.up[e]).chunk(2, -1)
                y = y + table[:, e : e + 1] * ((F.silu(gate) * up) @ self.down[e])
        else:
            gate, up = torch.bmm(rows.unsqueeze(0).expand(E, -1, -1), self.up).chunk(2, -1)
            y = (torch.bmm(F.silu(gate) * up, self.down) * table.t().unsqueeze(-1)).sum(0)
        return y.view(x.shape)


class Layer(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.before, self.query, self.after, self.mlp = nn.LayerNorm(H), nn.Linear(H, H), nn.LayerNorm(H), mlp

    def forward(self, x):
        a = self.before(x)
        x = x + torch.softmax(self.query(a) @ a.transpose(1, 2), -1) @ a
        return x + self.mlp(self.after(x))


class DenseFFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(H, I), nn.Linear(I, H)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class ToyLM(nn.Module):
    """Embedding, layers, logits: (B, S) ids -> (B, S, V)."""

    def __init__(self, blocks):
        super().__init__()
        self.embed, self.head = nn.Embedding(V, H), nn.Linear(H, V, bias=False)
        self.layers = nn.ModuleList([Layer(block) for block in blocks])

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def toy_lm(form="bmm", layers=2):
    torch.manual_seed(0)
    if form == "plain":
        return ToyLM([DenseFFN() for _ in range(layers)]).eval()
    return ToyLM([DenseMoE(form) for _ in range(layers)]).eval()


def ids(batch=2, tokens=5, seed=0):
    return torch.randint(0, V, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def export(model, path, exporter="dynamo", inputs=None, opset=None, external=True):
    """The model as a file at ``path``, sizes of batch and sequence free; returns the path as text."""
    inputs = (ids(),) if inputs is None else inputs
    names = (
        ["input_ids"]
        if len(inputs) == 1 and not inputs[0].is_floating_point()
        else [f"in{n}" for n in range(len(inputs))]
    )
    if exporter == "dynamo":
        free = tuple({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for _ in inputs)
        torch.onnx.export(
            model, inputs, path, dynamo=True, dynamic_shapes=free, input_names=names, verbose=False,
            external_data=external, **({} if opset is None else {"opset_version": opset}),
        )  # fmt: skip
    else:
        free = {name: {0: "batch", 1: "tokens"} for name in names}
        torch.onnx.export(
            model, inputs, path, dynamo=False, input_names=names, dynamic_axes=free, opset_version=opset or 17
        )
    return str(path)


def run(path, **feeds):
    """What ONNX Runtime gives for a file, as torch tensors."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options)
    return [torch.from_numpy(y) for y in session.run(None, {name: value.numpy() for name, value in feeds.items()})]
