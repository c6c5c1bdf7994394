"""Files with every expert in them whose choice among these is the sample's: broken, and told so."""

import pytest
import torch

import moeopt
from moeopt.onnx_in.frozen_routing import frozen_routing, lone_experts
from moeopt.onnx_in.index import GraphIndex
from moeopt.onnx_in.read import read_onnx
from moeopt.onnx_in.regions import candidate_regions
from tests.onnx_in.hit_loops import E, frozen_choice
from tests.onnx_in.toys import run

UNREAD = (
    "the file is broken, unless the same functions are meant whatever is chosen (a confidence that scales them, "
    "weights by rank), which a file does not tell: nothing reads which experts the node '/TopK' (TopK) chooses. An "
)
SAID = {
    "ids": UNREAD,
    "one": UNREAD,
    "places": "(Gather) takes an expert from a constant place in the list of those that tokens chose, so that as many",
    "capacity": "the file is broken, unless that number is the model's own, which a file does not tell: the node "
    "'/TopK_1' (TopK) gives an expert a constant number of rows (6), those that weigh most for this expert, and leaves "
    "out the others that chose it, and the file stops where there are fewer rows. An export that traces a capacity",
    "table": f"nothing chooses or weighs among its {E} experts (the node '/experts.0/experts.0.0/Gemm' (Gemm) and its "
    "like) by what a token holds, so that each token gets all of them alike, or the weights of the sample",
}


@pytest.mark.parametrize("how", SAID)
def test_a_frozen_choice_is_told(how, tmp_path):
    path, x = frozen_choice(how, tmp_path / "m.onnx")
    found = moeopt.optimize(path, x, verify="off")
    (block,) = found.report.blocks
    assert (block.status, block.experts) == ("declined", 1 if how == "one" else E)
    assert SAID[how] in block.reason and "the sample that the model was traced with" in block.reason
    assert "export it again with a form of the experts that does not depend on the sample" in block.reason
    assert torch.equal(found(x), run(path, x=x)[0])


def test_a_capacity_of_a_file_in_one_size_is_no_fault_and_is_told(tmp_path):
    path, _ = frozen_choice("capacity", tmp_path / "m.onnx", free=False)
    (candidate,) = candidate_regions(GraphIndex(read_onnx(path).model.graph))
    said = frozen_routing(candidate)
    assert said.startswith("the node '/TopK_1' (TopK) gives an expert a constant number of rows (6)")
    assert said.endswith("so that a row's result depends on the other rows, and the op routes each row by itself")


@pytest.mark.parametrize("how", ["none", "groups", "theirs"])
def test_scores_that_choose_without_ids_of_their_own_are_read(how, tmp_path):
    path, _ = frozen_choice(how, tmp_path / "m.onnx")
    index = GraphIndex(read_onnx(path).model.graph)
    (candidate,) = found = list(candidate_regions(index))
    assert candidate.chains.experts == E
    assert not frozen_routing(candidate, found) and not list(lone_experts(index, found))


class TopScores(torch.nn.Module):
    """A classifier that gives its highest scores beside a dense network."""

    def __init__(self, how):
        super().__init__()
        nn = torch.nn
        self.how, self.classes, self.mlp = (
            how,
            nn.Linear(8, 6),
            nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)),
        )

    def forward(self, x):
        values = self.classes(x).topk(2, -1).values
        y = self.mlp(x)
        if self.how == "scaled":
            return y * values[..., :1].sigmoid()
        return (y, values) if self.how == "given" else y + values.mean(-1, keepdim=True)


@pytest.mark.parametrize("how", ["given", "added"])
def test_highest_scores_that_weigh_no_expert_are_no_frozen_choice(how, tmp_path):
    path = str(tmp_path / "m.onnx")
    torch.onnx.export(
        TopScores(how).eval(), (torch.randn(5, 8),), path, dynamo=False, input_names=["x"], opset_version=17
    )
    assert not moeopt.optimize(path, torch.randn(5, 8), verify="off").report.blocks


def test_a_network_that_is_scaled_by_its_highest_score_is_not_called_broken_without_an_unless(tmp_path):
    """It is what a frozen choice of one expert is, node by node."""
    path = str(tmp_path / "m.onnx")
    torch.onnx.export(
        TopScores("scaled").eval(), (torch.randn(5, 8),), path, dynamo=False, input_names=["x"], opset_version=17
    )
    (block,) = moeopt.optimize(path, torch.randn(5, 8), verify="off").report.blocks
    assert block.reason.startswith(UNREAD)
