"""Models of transformers that return a cache and generate nothing: an engine returns the cache too."""

import pytest
import torch

import moeopt
from moeopt.bundle import caches
from moeopt.bundle.tree import build, check_tree, encode_tree
from moeopt.errors import BundleError, NotSaveableError

transformers = pytest.importorskip("transformers")


def classifier(layers=1, **more):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, num_labels=3, pad_token_id=0, **more,
    )  # fmt: skip
    ids = torch.randint(3, 64, (2, 9))
    model = transformers.MixtralForSequenceClassification(config).eval()
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_an_engine_of_a_classifier_returns_its_cache(backend, tmp_path):
    layers = 2 if backend == "torch" else 1
    model, call = classifier(layers)
    engine = moeopt.optimize(model, call, backend=backend, verify="fast")
    engine.save(tmp_path / "bundle")
    loaded = moeopt.load(tmp_path / "bundle")
    ids = torch.randint(3, 64, (3, 5))
    for form in (engine, loaded):
        for one in (call, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
            with torch.no_grad():
                want, got = model(**one), form(**one)
            assert type(got) is type(want) and type(got.past_key_values) is transformers.DynamicCache
            torch.testing.assert_close(got.logits, want.logits)
            assert len(got.past_key_values.layers) == layers and got.past_key_values.get_seq_length() == len(
                one["input_ids"][0]
            )
            for mine, theirs in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
                torch.testing.assert_close(mine.keys, theirs.keys)
                torch.testing.assert_close(mine.values, theirs.values)
    assert moeopt.verify(tmp_path / "bundle").passed


def test_an_engine_that_misses_a_part_of_the_cache_is_not_equivalent(monkeypatch):
    model, call = classifier()
    whole = caches.rebuilt
    monkeypatch.setattr(caches, "rebuilt", lambda layers: whole([(k, torch.zeros_like(v)) for k, v in layers]))
    with pytest.raises(moeopt.errors.NotEquivalentError):
        moeopt.optimize(model, call, backend="onnxruntime", verify="fast")


@pytest.mark.parametrize("known", [False, True])
def test_a_cache_cut_to_a_window_is_refused_with_the_way_out(known):
    model, call = classifier(sliding_window=4)
    if known:  # to torch's trees, from the export of a language model before
        from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model

        register_cache_pytrees_for_model(model)
    with pytest.raises(NotSaveableError, match="its result holds a DynamicCache.*add use_cache=False to the example"):
        moeopt.optimize(model, call, backend="onnxruntime", verify="off")


def test_the_way_out_of_a_cache_cut_to_a_window():
    model, call = classifier(sliding_window=4)
    engine = moeopt.optimize(model, call | {"use_cache": False}, backend="onnxruntime", verify="off")
    with torch.no_grad():
        torch.testing.assert_close(engine(**call, use_cache=False).logits, model(**call).logits)


def test_a_damaged_cache_in_a_bundle_is_told():
    import torch.utils._pytree as pytree

    leaves, spec = pytree.tree_flatten(caches.KeyValues([(torch.zeros(1), torch.ones(1))]))
    tree = encode_tree(spec)
    assert check_tree(tree) == 2 and build(tree, iter(leaves)).layers[0].values.item() == 1
    tree["items"][0]["items"][0] = "*"
    with pytest.raises(BundleError, match="a pair of tensors for each layer"):
        build(tree, iter(leaves))
