"""``moeopt.plan`` on published configs, on a profile, and on wrong arguments."""

import json

import pytest
import torch

import moeopt
from moeopt.planning.cache import numbers_of_a_token
from moeopt.profiling.result import MATRIX_UP_TO, layer_load
from moeopt.profiling.tally import Tally
from tests.toy_moe import build

transformers = pytest.importorskip("transformers")

DEEPSEEK_V3 = transformers.DeepseekV3Config()  # the class's defaults are the published model
QWEN3_235B = {
    "model_type": "qwen3_moe", "hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64,
    "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 1536, "num_experts": 128,
    "num_experts_per_tok": 8, "vocab_size": 151936,
}  # fmt: skip


@pytest.fixture(scope="module")
def deepseek():
    return moeopt.plan(DEEPSEEK_V3, devices=16, node=8, device="h100", dtype="fp8")


def test_deepseek_v3_in_fp8_needs_two_nodes(deepseek):
    """Checked by hand: 653.9 G parameters of 1 + 4/128^2 bytes over 16; 61 layers of 512 + 64 numbers of cache."""
    m = deepseek.memory
    assert m.experts == pytest.approx(653_908_770_816 * (1 + 4 / 128**2) / 16)
    assert m.cache_per_token == 61 * (512 + 64) * 2
    assert m.fits and m.fits_split and 400_000 < m.cache_tokens < 420_000
    assert not moeopt.plan(DEEPSEEK_V3, devices=8, device="h100", dtype="fp8").memory.fits_split


def test_bytes_that_are_sent(deepseek):
    t = deepseek.traffic
    assert (t.out, t.back) == (1, 2)
    assert t.rows == pytest.approx(8 * 15 / 16 * 7168 * 3)
    # 8 of 256 experts miss a device of 16 with C(240, 8) / C(256, 8) = 0.592
    assert t.copies_ranks == pytest.approx(6.12, abs=0.01) and t.ranks == pytest.approx(t.copies_ranks * 7168 * 3)
    assert t.nodes < t.ranks < t.rows and t.model == pytest.approx(58 * t.ranks)


def test_where_expert_parallelism_pays(deepseek):
    assert deepseek.expert_parallel_from == 512
    small, large = deepseek.decode[0], deepseek.decode[-1]
    assert not small.expert_wins and large.expert_wins
    assert large.tensor_sent > large.expert_sent


def test_qwen3_235b_in_bfloat16_fits_a_node_with_the_rest_split():
    m = moeopt.plan(QWEN3_235B, devices=8, device="h100").memory
    assert not m.fits and m.fits_split and m.cache_per_token == 94 * 2 * 4 * 128 * 2


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (transformers.JambaConfig(), 4),  # of 32: one of 8
        (transformers.JambaConfig().to_dict(), 4),
        (transformers.Qwen3NextConfig(), 12),  # of 48, the others linear attention
        (transformers.Qwen3NextConfig().to_dict(), 12),
        (transformers.GptOssConfig(), 36),  # windows count as if they kept all
        (transformers.Zamba2Config(), 9),  # hybrid: a state and attention
        ({"num_hidden_layers": 8, "attn_layer_indices": [1, 5], "num_attention_heads": 4, "head_dim": 16}, 2),
    ],
    ids=lambda v: type(v).__name__ if not isinstance(v, int) else str(v),
)
def test_only_layers_with_attention_keep_something_of_a_token(config, layers):
    fields = config if isinstance(config, dict) else config.to_dict()
    heads = fields.get("num_key_value_heads") or fields["num_attention_heads"]
    width = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    assert numbers_of_a_token(config) == layers * 2 * heads * width


def test_the_table_and_the_json(deepseek):
    text = str(deepseek)
    assert max(map(len, text.splitlines())) <= 120
    for words in (
        "16 x H100-SXM (2 nodes of 8), fp8",
        "a row a device, the least",
        "faster",
        "bounds: peaks of makers'",
    ):
        assert words in text
    data = json.loads(deepseek.to_json())
    assert data["expert_parallel_from"] == 512 and data["traffic"]["rows"] == deepseek.traffic.rows
    assert set(data) == {
        "schema", "name", "devices", "node", "device", "dtype", "experts", "top_k", "hidden", "inner", "moe_layers",
        "expert_params", "rest_params", "memory", "traffic", "decode", "placements", "notes", "expert_parallel_from",
    }  # fmt: skip


def profile_of(E, hot, tokens=4096):
    g = torch.Generator().manual_seed(0)
    popularity = torch.ones(E)
    popularity[hot] = E / 4
    tally = Tally("layers.0.mlp", E)
    ids = torch.multinomial(popularity.expand(tokens, E), 2, generator=g)
    tally.add(ids, torch.ones(tokens, 2))
    return moeopt.LoadProfile("toy", 1, (layer_load(tally),))


@pytest.mark.parametrize("E", (MATRIX_UP_TO, 128))
def test_a_measured_load_places_the_experts(E, tmp_path):
    config = {"model_type": "qwen3_moe", "num_experts": E, "num_experts_per_tok": 2, "num_hidden_layers": 1,
              "hidden_size": 64, "moe_intermediate_size": 32, "vocab_size": 64, "num_attention_heads": 2,
              "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
    profile = profile_of(E, hot=3)
    (placed,) = moeopt.plan(config, devices=16, load=profile).placements
    ways = placed.imbalance
    assert ways["contiguous"] > 2 and min(ways.values()) == pytest.approx(ways[placed.chosen], rel=0.01)
    assert "copies" in placed.chosen and len(placed.ranks[3]) > 1
    assert "by co-activation" in ways  # also above 64 experts
    file = tmp_path / "load.json"
    file.write_text(profile.to_json())
    assert moeopt.plan(config, devices=16, load=file).placements == [placed]


def test_the_pairs_of_many_experts_survive_the_json():
    from moeopt.planning.run import pairs_of

    layer = profile_of(70, hot=1).layers[0]
    again = pairs_of(json.loads(json.dumps(layer.to_dict())))
    want = torch.tensor(layer.together).double()
    want.fill_diagonal_(0)
    assert torch.equal(torch.from_numpy(again), want)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"devices": 0}, "devices=0 must be a whole number from 1 on"),
        ({"devices": True}, "devices=True must be a whole number from 1 on"),
        ({"devices": 12}, "devices=12 is no multiple of node=8: give the devices of whole nodes"),
        (
            {"devices": 8, "dtype": "int3"},
            "dtype='int3' is not known to plan; use one of float32, bfloat16",
        ),
        ({"devices": 8, "device": "H900"}, "device 'H900' is not known"),
        ({"devices": 8, "device": "cpu"}, "plan is for several GPUs: name one, such as device='H100-SXM'"),
        ({"devices": 8, "load": 3}, "load is a int without layers: give what moeopt.profile returned"),
        ({"devices": 8, "load": "nowhere.json"}, "load='nowhere.json' is no file: give what `moeopt profile --json`"),
    ],
)
def test_wrong_arguments_are_refused_before_the_model_is_built(arguments, words):
    with pytest.raises(moeopt.UsageError) as err:
        moeopt.plan("no such model", **arguments)
    assert words in str(err.value)


def test_a_load_of_another_model_is_refused():
    with pytest.raises(moeopt.UsageError, match="has 8 experts and the model .*: profile this model"):
        moeopt.plan(build(), devices=2, load=profile_of(8, hot=0))


def test_a_dense_model_has_nothing_to_place():
    with pytest.raises(moeopt.UsageError, match="Linear has no experts, so there is nothing to place"):
        moeopt.plan(torch.nn.Linear(4, 4), devices=2)


def test_experts_that_do_not_divide_evenly():
    """Of 256 experts on 24 devices some hold 11; on 512 each has one at most, and a token's 8 are on 8 of them."""
    plan = moeopt.plan(DEEPSEEK_V3, devices=24, dtype="fp8")
    assert plan.memory.experts == pytest.approx(plan.expert_params * (1 + 4 / 128**2) * 11 / 256)
    assert "experts, 11 of 256" in str(plan)
    plan = moeopt.plan(DEEPSEEK_V3, devices=512, dtype="fp8")
    assert plan.memory.experts == pytest.approx(plan.expert_params * (1 + 4 / 128**2) / 256)
    assert plan.traffic.copies_ranks == pytest.approx(plan.traffic.copies_rows)
    assert "a token reaches 8.00 of 512 devices" in str(plan)
