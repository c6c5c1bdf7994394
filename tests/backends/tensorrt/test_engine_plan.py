"""How many tokens the memory of a block's activations is planned for."""

import torch

from moeopt.backends.tensorrt.engine_plan import max_tokens_of
from moeopt.options import Options

X, IDS = torch.randn(2, 5, 8), torch.zeros(2, 9, dtype=torch.int64)


def test_four_times_each_size_of_the_example():
    assert max_tokens_of(((X,), {}), Options()) == 4 * 2 * 4 * 5
    assert max_tokens_of(((), {"input_ids": IDS}), Options()) == 4 * 2 * 4 * 9


def test_the_longest_size_is_at_least_the_most_tokens():
    assert max_tokens_of(((), {"input_ids": IDS}), Options(tokens=(1, 512))) == 4 * 2 * 512


def test_the_users_own_profile_is_taken():
    profile = {"x": ((1, 1, 8), (1, 64, 8), (3, 100, 8))}
    assert max_tokens_of(((X,), {}), Options(profile=profile)) == 300
    two = (profile, {"x": ((1, 1, 8), (1, 1, 8), (64, 16, 8))})
    assert max_tokens_of(((X,), {}), Options(profile=two)) == 1024


def test_a_call_without_features_or_ids_falls_back_to_the_default():
    assert max_tokens_of(((torch.tensor(3),), {}), Options()) == 128
