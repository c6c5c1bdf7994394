"""Weights, gradients and graphs of a distributed model: what is saved, loaded, trained, compiled and refused."""

import copy
import functools
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import moeopt
import moeopt.distributed
from tests.distributed.models import Layers, Stacked, optimised, tokens
from tests.distributed.ranks import run_ranks
from tests.distributed.test_distribute import FORMS, TIMEOUT, differs, of_zoo, rank_tokens

MODELS = {
    "separate": lambda: optimised(Layers, blocks=1),
    "stacked": lambda: optimised(Stacked),
    "along another axis": lambda: optimised(Stacked, axis=1),
    "stacks of any function": lambda: of_zoo("row_stacked_bank_with_norm"),
    "codes": lambda: optimised(Stacked, quantize="fp8", bias=True),
}
SCATTERED = {4: [[3], [1], [0], [1], [2]], 3: [[2], [0], [2], [1], [0, 1]]}
"""Of five experts: not the order of ``Shard``, and a copy."""


def changed(opt, by):
    """The same model with other weights, each changed alike on every rank."""
    opt = copy.deepcopy(opt)
    with torch.no_grad():
        for n, p in enumerate(opt.model.parameters()):
            p.mul_(1 + by / (n + 2)).add_(torch.linspace(-by, by, p.numel()).view(p.shape))
        for name, buffer in opt.model.named_buffers():
            if name.endswith("_codes"):  # each expert's with the next one's sign
                buffer.copy_(buffer.roll(1, 0).float().neg().to(buffer.dtype))
    return opt


def resharded(rank, size, folder):
    """{model: {step: "" or what differs}}: saved on two ranks, loaded on four, saved there and loaded on three."""
    groups = [dist.new_group(list(range(n))) for n in (2, 4, 3)]
    found = {}
    for name, build in MODELS.items():
        plain = build()
        trained = changed(plain, 0.05)
        (x,) = plain._call[0]
        step = found.setdefault(name, {})
        for turn, (n, group) in enumerate(zip((2, 4, 3), groups, strict=True)):
            dist.barrier()
            if rank >= n:
                continue
            placement = SCATTERED.get(n) if name in ("stacked", "along another axis", "codes") else None
            source = copy.deepcopy(plain) if turn else trained  # what is loaded goes into Parameters that both share
            d = moeopt.distribute(source, group, placement=placement, timeout=TIMEOUT, tokens="replicated")
            with torch.no_grad():
                if turn:
                    step[f"before {n}"] = differs(d(x), trained(x)) != ""
                    state = d.model.state_dict()
                    dcp.load(state, checkpoint_id=f"{folder}/{name}-{turn - 1}", process_group=group)
                    d.model.load_state_dict(state)
                step[f"on {n}"] = differs(d(x), trained(x))
                state = d.model.state_dict()
                step[f"shapes on {n}"] = {
                    k: (tuple(v.shape), isinstance(v, DTensor) and tuple(v.placements)) for k, v in state.items()
                }
                dcp.save(state, checkpoint_id=f"{folder}/{name}-{turn}", process_group=group)
        dist.barrier()
        if rank == 0:  # one process, the user's own model
            state = plain.model.state_dict()
            dcp.load(state, checkpoint_id=f"{folder}/{name}-2", no_dist=True)
            step["one process"] = [k for k, v in trained.model.state_dict().items() if not torch.equal(v, state[k])]
    return found


def test_checkpoints_go_from_two_ranks_to_four_to_three_and_to_one(tmp_path):
    seen = run_ranks(resharded, 4, str(tmp_path))
    for rank, found in enumerate(seen):
        for name in MODELS:
            step = found[name]
            for n in (2, 4, 3):
                assert rank >= n or step[f"on {n}"] == "", (rank, name, n, step[f"on {n}"])
                assert rank >= n or n == 2 or step[f"before {n}"], "the test must load other weights than it had"
    for name in MODELS:
        assert seen[0][name]["one process"] == [], name
    shapes = seen[0]["stacked"]
    for n in (2, 4, 3):
        assert shapes[f"shapes on {n}"]["w_in"] == ((5, 48, 16), (Shard(0),))
        assert seen[0]["along another axis"][f"shapes on {n}"]["w_out"] == ((16, 5, 24), (Shard(1),))


def trained(rank, size):
    """What differs in gradients and after a step, compiled code, and what is refused."""
    mesh, seen = DeviceMesh("cpu", list(range(size))), {}
    for name, build in MODELS.items():
        opt = build()
        (x,) = opt._call[0]
        flat = x.reshape(-1, x.shape[-1])
        weight = torch.linspace(-1, 1, flat.shape[-1])
        one, given = copy.deepcopy(opt), flat.clone().requires_grad_()
        (one(given.view(x.shape)) * weight).sum().backward()
        want = {n: p.grad for n, p in one.model.named_parameters()}
        for form, arguments in FORMS.items():
            alike = "tokens" in arguments
            if not alike and x.dim() != 2:
                continue
            dist.barrier()
            d = moeopt.distribute(copy.deepcopy(opt), mesh, timeout=TIMEOUT, **arguments)
            mine = slice(None) if alike else rank_tokens(flat, rank, size, "all on the last")
            part = flat[mine].clone().requires_grad_()
            (d(part.view(x.shape) if alike else part) * weight).sum().backward()
            wrong = {"x": differs(part.grad, given.grad[mine])}
            for key, p in d.model.named_parameters():
                grad = p.grad
                if isinstance(grad, DTensor):
                    grad = grad.full_tensor()
                elif not alike and "experts" not in key:  # the router: each rank has its own tokens' part
                    grad = torch.zeros_like(p) if grad is None else grad
                    dist.all_reduce(grad)
                wrong[key] = "no gradient" if grad is None else differs(grad, want[key])
            seen[name, form] = {key: what for key, what in wrong.items() if what}
            if form == "rows of all":
                torch.optim.SGD(d.model.parameters(), lr=0.1).step()
                torch.optim.SGD(one.model.parameters(), lr=0.1).step()
                with torch.no_grad():
                    seen[name, "step"] = differs(d(x), one(x))
    seen |= others(rank, mesh)
    return seen


def others(rank, mesh):
    """Compiled, copied, saved, loaded whole."""
    opt, seen = optimised(Stacked), {}
    d = moeopt.distribute(opt, mesh, timeout=TIMEOUT, tokens="replicated")
    with torch.no_grad():
        seen["compiled"] = differs(torch.compile(d.model, backend="eager")(tokens(6)), opt(tokens(6)))
        torch._dynamo.reset()
        seen["whole graph"] = raised(lambda: torch.compile(d.model, backend="eager", fullgraph=True)(tokens(6)))
        seen["copy"], seen["pickle"] = raised(lambda: copy.deepcopy(d)), raised(lambda: pickle.dumps(d))
        seen["model copy"], seen["save"] = raised(lambda: copy.deepcopy(d.model)), raised(lambda: d.save("nowhere"))
        seen["export"] = raised(lambda: torch.export.export(d.model, (tokens(6),)))
        seen["optimize"] = raised(lambda: moeopt.optimize(d.model, tokens(6)))
        seen["verify"] = raised(lambda: moeopt.verify(d, original=opt.model))
        other = changed(opt, 0.1)
        d.model.load_state_dict(other.model.state_dict())  # whole tensors: each rank takes its part
        seen["loaded whole"] = differs(d(tokens(6)), other(tokens(6)))
        short = {k: v[:4] if k.startswith("w_") else v for k, v in other.model.state_dict().items()}
        seen["another size"] = raised(lambda: d.model.load_state_dict(short))
        plain = optimised(Layers, blocks=1)
        apart = moeopt.distribute(plain, mesh, timeout=TIMEOUT, tokens="replicated")
        calls = {"optimize": moeopt.optimize, "explain": moeopt.explain, "profile": lambda m, x: moeopt.profile(m, [x])}
        for name, call in calls.items():
            seen[f"{name} separate experts"] = raised(functools.partial(call, apart.model, tokens(6)))
        seen["after that"] = differs(apart(tokens(6)), plain(tokens(6)), exact=True)
    copies = moeopt.distribute(opt, mesh, timeout=TIMEOUT, placement=[[0, 1], [0], [1], [1], [0]])
    seen["copies train"] = raised(lambda: copies(tokens(4)))
    return seen


def raised(call):
    with pytest.raises(Exception) as err:
        call()
    return f"{type(err.value).__name__}: {err.value}"


@pytest.fixture(scope="module")
def seen():
    return run_ranks(trained, 2)


@pytest.mark.parametrize("form", [*FORMS, "step"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_one_process(seen, name, form):
    for each in seen:
        assert not each.get((name, form))
    assert (name, form) in seen[0] or name == "stacks of any function"


def test_compiled_code_is_interrupted_at_the_experts(seen):
    for each in seen:
        assert each["compiled"] == ""
        assert (
            "experts that lie on several ranks are reached by collectives on sizes that each call decides"
            in (each["whole graph"])
        )


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("copy", "UsageError: a distributed model can be neither copied nor pickled"),
        ("model copy", "copy the optimised model before moeopt.distribute"),
        ("pickle", "torch.distributed.checkpoint saves and loads its state_dict"),
        ("save", "NotSaveableError: nowhere: a distributed model has no bundle"),
        ("export", "save or export the optimised model before moeopt.distribute"),
        ("optimize", "UsageError: w_in of Stacked is divided over processes already"),
        ("optimize separate experts", "UsageError: layers.0 of Layers is divided over processes already"),
        ("explain separate experts", "optimise it, and divide its experts with moeopt.distribute(optimized, mesh)"),
        ("profile separate experts", "UsageError: layers.0 of Layers is divided over processes already"),
        ("verify", "UsageError: a distributed model is verified when it is made"),
        ("another size", "size mismatch for w_in: it is (4, 48, 16), and the experts of all ranks are (5, 48, 16)"),
        ("copies train", "UsageError: Stacked: its placement has copies of experts"),
    ],
)
def test_what_a_distributed_model_cannot_do_is_refused(seen, what, words):
    for each in seen:
        assert words in each[what]


def test_what_was_refused_has_changed_nothing(seen):
    assert [each["after that"] for each in seen] == ["", ""]


def test_whole_tensors_are_loaded_in_parts(seen):
    assert [each["loaded whole"] for each in seen] == ["", ""]
