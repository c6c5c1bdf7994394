"""What is said of layers that were compared one by one."""

from moeopt.checkpoint.layer_checks import in_words
from moeopt.verification.model import EndToEnd


def test_layers_of_which_no_number_is_finite_count_as_not_compared():
    near, far = (EndToEnd(True, tokens=9, distance=d, budget=4e-7) for d in (1e-7, 3e-7))
    text = in_words({"layers.0": near, "layers.1": far, "layers.2": EndToEnd(True), "layers.3": EndToEnd(True)})
    assert text.startswith("2 layers with rewritten blocks were compared one by one")
    assert "the nearest to its budget is layers.1: distance at most 3.00e-07 (budget 4.00e-07); no activation" in text
    assert "no activation that reaches layers.2, layers.3 gives a finite number in the original" in text
    assert in_words({"layers.2": EndToEnd(True)}).startswith("no activation that reaches layers.2 gives")
    assert "no activation" not in in_words({"layers.0": near})
