"""Which tensors every path from the sources to the results passes, counted for all tensors at once."""

import random
from types import SimpleNamespace

import torch
from torch import fx

from moeopt.capture.replay import descendants, only_ways_out


def other_way(results, sources, target):
    """Whether a result depends on a source by a way that does not pass ``target``, searched for each target anew."""
    seen, stack = {target}, list(results)
    while stack:
        node = stack.pop()
        if node in sources:
            return True
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return False


def random_tape(r):
    graph, nodes = fx.Graph(), []
    for index in range(r.randint(3, 14)):
        operands = r.sample(nodes, min(len(nodes), r.choice([0, 1, 1, 2, 3])))
        nodes.append(graph.call_function(torch.add, tuple(operands)))
        nodes[-1].meta["index"] = index
    results = r.sample(nodes, r.randint(1, 2))
    return SimpleNamespace(nodes=nodes, results=lambda: results)


def test_it_is_what_a_search_from_each_tensor_finds():
    answers = []
    for seed in range(400):
        r = random.Random(seed)
        tape = random_tape(r)
        starts = set(r.sample(tape.nodes, r.randint(1, 3)))
        nodes = descendants(tape, starts)
        found = only_ways_out(tape, starts, nodes)
        for target in starts.union(nodes):
            answers.append(target in found)
            assert (target in found) != other_way(tape.results(), starts, target), (seed, target)
    assert 200 < sum(answers) < len(answers) - 200, "both answers, often"


def test_a_deep_tower_is_counted_without_end():
    """As many ways as 2**300: exact in whole numbers, and no float."""
    graph = fx.Graph()
    nodes = [graph.placeholder("x")]
    for _ in range(300):
        a = graph.call_function(torch.sin, (nodes[-1],))
        nodes += [a, graph.call_function(torch.add, (nodes[-1], a))]
    for index, node in enumerate(nodes):
        node.meta["index"] = index
    tape = SimpleNamespace(nodes=nodes, results=lambda: [nodes[-1]])
    found = only_ways_out(tape, nodes[:1], nodes[1:])
    assert found == set(nodes[2::2]), "each sum, and none of the sines"
