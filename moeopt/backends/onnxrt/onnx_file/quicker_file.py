"""Regions of a file that are left as they are: ONNX Runtime runs the nodes that they have no slower than the new ones.

The new form saves experts that a token did not choose. Where experts are small, or the file runs the chosen alone
already, the sort of rows and the way back may cost more. So both forms of each kind of region are timed, at the numbers
of tokens that the engine is expected to see, on what flows into the region when the file runs in these sizes
(``ops.measured``: remembered). The new form must be the slower at none of these numbers, else the file's nodes stay.

Experts that are a function of a row have no operator of their own; their nodes are written for each of them. That must
be the faster of the two on the mean as well; where the two are as fast, rows decide: the new form is taken where it
multiplies fewer of them, and else the file's nodes stay. Where this machine may not be timed, and where the weights are
so many that it would take long, rows are counted alone: the new form is taken where it multiplies fewer of them, or as
many with fewer nodes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from moeopt.backends.onnxrt.build import build_onnx
from moeopt.backends.onnxrt.onnx_file.original import InnerValues
from moeopt.backends.onnxrt.onnx_file.parts import FilePart, FileParts, Values, widest_run
from moeopt.backends.onnxrt.onnx_file.region_file import described, only_region
from moeopt.backends.onnxrt.open_engine import opened_file
from moeopt.backends.onnxrt.plan import OrtPlan
from moeopt.backends.onnxrt.providers import runtime
from moeopt.backends.onnxrt.select import TOKENS
from moeopt.backends.onnxrt.session import GRAPH, NATIVE, Session
from moeopt.errors import MoeoptError
from moeopt.ir.row_function import RowFunction
from moeopt.onnx_in.ends import graph_inputs, tensor_type
from moeopt.onnx_in.feeds import GraphFeeds, in_tokens
from moeopt.onnx_in.read import OnnxFile
from moeopt.onnx_in.region_module import GraphRegions, feature_axis
from moeopt.ops.measured import TimedCall, Way, fastest
from moeopt.options import Options, measuring
from moeopt.pipeline.block import Rewrite
from moeopt.pipeline.block_reports import PipelineResult
from moeopt.pipeline.pays import work_of
from moeopt.untrusted import shown_line
from moeopt.value_types import OnnxModel, OrtObject

FILE, NEW = "file", "new"
ADVANTAGE = 1.05
"""By how much the other form must be the faster to be taken in place of the one that the counts say: a measurement on a
machine that does other things does not tell less, and a decision must not change with the clock."""
MOST = 64 << 20
"""Bytes of a region's weights up to which it is timed: in larger ones the products decide, whose rows are counted."""
AROUND = 30
"""Nodes of the new form beside those of the experts' function, as ``unrolled_function`` counts them."""
_STAYS = "left as it is: "
_LEFT = f"{_STAYS}its experts are a function of a row, which would run expert by expert on sorted rows, and "
TIMED = (
    _LEFT + "at {rows} rows a call, timed on this machine, ONNX Runtime runs the file's own nodes as fast or faster; "
    "if your calls have other numbers of rows, name them with tokens="
)
SLOWER = (
    "of {rows} rows a call, timed on this machine, ONNX Runtime runs the file's own nodes faster at {slower}; if your "
    "calls have other numbers of rows, name them with tokens="
)
_COUNTED = _LEFT + "that would multiply as many rows as the file's own nodes do; {why}"
_UNTIMED = (
    f"with MOEOPT_MEASURE=on both are timed where the weights are at most {MOST >> 20} MB, and the faster is taken"
)


class SlowerRegions:
    """Finds the rewritten regions that the file's own nodes compute as fast.

    Args:
        given: the file as it was given; ``file``: the same, its loops over experts written out.
        calls: inputs that it takes.
    """

    def __init__(
        self, given: OnnxFile, file: OnnxFile, parts: FileParts, calls: Sequence[GraphFeeds], options: Options,
        plan: OrtPlan,
    ) -> None:  # fmt: skip
        self._given, self._file, self._calls, self._options, self._plan = given, file, calls, options, plan
        self._declined, self._parts = parts.declined, {part.name: part for part in parts.parts}

    def leave(self, twin: nn.Module, outcome: PipelineResult) -> None:
        """Take them out of what the pipeline rewrote, each with its reason."""
        left = {
            name: reason
            for name, rewrite in outcome.rewrites.items()
            if name in self._parts and (reason := self._why(twin, self._parts[name], rewrite))
        }
        for name in left:
            del outcome.rewrites[name]
            self._declined[name] = self._parts[name].candidate, left[name]
        outcome.checks[:] = [check for check in outcome.checks if check.name not in left]
        outcome.blocks = [
            dataclasses.replace(b, status="declined", reason=left[b.name], lowering="")
            if b.name in left and b.status == "rewritten"
            else b
            for b in outcome.blocks
        ]

    def _why(self, twin: nn.Module, part: FilePart, rewrite: Rewrite) -> str:
        """Why a region stays as it is; "" where the new form is the faster."""
        regions = (only_region(file, part.region, part.runs[0]) for file in (self._given, self._file))
        old = next((one for one in regions if one is not None), None)
        small = _bytes_of(part) <= MOST
        function = _is_function(rewrite)
        if old is None or not small or not measuring():
            return "" if not function or _saves(rewrite, small) else _COUNTED.format(why=_UNTIMED)
        runs = self._runs(part)
        rows = [_rows(part, run) for run in runs]
        functions = [(one.spec.encode(), len(set(one.experts)), one.routing.per_token) for one in rewrite.found]
        question = (
            f"a region of an ONNX file, or its new form: {functions}, nodes {described(old)}, rows {rows}, "
            f"onnxruntime {runtime().__version__}"
        )
        self._options.say(f"timing {part.name} as it is in the file, and rewritten")
        ways = functools.cache(lambda: self._ways(twin, part, old, runs))
        try:
            counted = NEW if function and _saves(rewrite, small=False) else FILE
            if function and fastest(f"{question}, else {counted}", ways, counted, ADVANTAGE) != NEW:
                return TIMED.format(rows=_in_words(rows))
            slower = [count for number, count in enumerate(rows) if _is_slower(f"{question}: {count}", ways, number)]
        except MoeoptError as err:  # one of both stops where the region stands alone, or on these sizes
            why = f"the two could not be timed beside each other ({shown_line(err)[:200]})"
            return "" if not function or _saves(rewrite, small) else _COUNTED.format(why=why)
        if not slower:
            return ""
        said = SLOWER.format(rows=_in_words(rows), slower=_in_words(slower))
        return f"{_LEFT if function else _STAYS}{said}"

    def _runs(self, part: FilePart) -> list[Values]:
        """What flows into a region when the file runs in the sizes that count, each number of rows once."""
        dims = {v.name: tensor_type(self._file, v)[1] for v in graph_inputs(self._file.proto.graph)}
        inner = InnerValues(self._file, [v.name for v in part.region.entries])
        found: dict[int, Values] = {}
        for count in self._plan.tokens or TOKENS:
            near: dict[int, Values] = {}
            for feeds in in_tokens(self._calls[0], dims, count):
                with contextlib.suppress(MoeoptError):  # the file may not take these sizes
                    run = inner.run(feeds)
                    near.setdefault(_rows(part, run), run)
                if count in near:
                    break
            if near:
                rows = min(near, key=lambda n: abs(math.log(max(n, 1) / count)))
                found.setdefault(rows, near[rows])
        return list(found.values()) or list(part.runs)

    def _ways(
        self, twin: nn.Module, part: FilePart, old: OnnxModel, runs: Sequence[Values]
    ) -> Mapping[str, Sequence[TimedCall]]:
        """Calls of the region's own nodes, and of the new form."""
        own = {value.name: value.name for value in part.region.entries}
        forms = {FILE: (_session(old, self._given), own), NEW: self._rewritten(twin, part)}
        return {form: _calls(session, ends, runs) for form, (session, ends) in forms.items()}

    def _rewritten(self, twin: nn.Module, part: FilePart) -> tuple[Session, dict[str, str]]:
        """The new form alone; and for the name of each of its inputs that of the value in the file."""
        one = GraphRegions([(part.name, twin.get_submodule(part.name), range(len(part.entries)))]).eval()
        run, given = part.runs[widest_run([part])], self._plan
        plan = OrtPlan(given.provider, given.tokens, given.tune, given.portable, given.mapped, given.rounds)
        built = build_onnx(one, tuple(run[name] for name in part.entries), {}, plan, lambda said: None)
        engine = opened_file(built, self._options, NATIVE if built.native else GRAPH)
        ends = {
            entry["onnx"]: name
            for entry, name in zip(built.signature["inputs"], part.entries, strict=True)
            if "onnx" in entry
        }
        return engine.session, ends


def _is_slower(question: str, ways: Callable[[], Mapping[str, Sequence[TimedCall]]], number: int) -> bool:
    """Whether the file's own nodes are the faster in one of the calls that are timed."""

    def alone() -> Mapping[str, Way]:
        return {form: calls[number : number + 1] for form, calls in ways().items()}

    return fastest(question, alone, NEW, ADVANTAGE) == FILE


def _calls(session: Session, ends: Mapping[str, str], runs: Sequence[Values]) -> list[TimedCall]:
    feeds = [{inner: run[outer] for inner, outer in ends.items()} for run in runs]
    return [functools.partial(session.run, one) for one in feeds]


def _session(proto: OnnxModel, file: OnnxFile) -> Session:
    """The region's own nodes in a session like that of an engine, its weights packed where kernels do so."""

    def prepare(options: OrtObject) -> None:
        if file.directory is not None:
            folder = str(file.directory.resolve())
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)

    return Session(proto.SerializeToString(), prepare=prepare)


def _is_function(rewrite: Rewrite) -> bool:
    """Whether all of a block's experts are functions of a row that no kernel of their own runs."""
    coded = rewrite.program.block.coded
    return not coded and all(isinstance(one.spec, RowFunction) for one in rewrite.found)


def _saves(rewrite: Rewrite, small: bool) -> bool:
    """Whether the new form multiplies fewer rows, or as many of a ``small`` block with fewer nodes."""
    calls = rows = 0.0
    for one in rewrite.found:
        assert isinstance(one.spec, RowFunction), "other experts have operators"
        work = work_of(one, one.spec)
        calls += work.calls - AROUND - work.experts * len(one.spec.body.nodes)
        sites = max(1.0, len(one.tokens.token) / work.experts)  # products that each expert begins with
        rows += sum(map(len, one.tokens.token.values())) / sites - work.rows_grouped
    return rows > 0 or (rows == 0 and small and calls > 0)


def _rows(part: FilePart, run: Values) -> int:
    root = run[part.region.entries[0].name]
    return root.numel() // max(1, root.shape[feature_axis(part.candidate)])


def _in_words(numbers: Sequence[int]) -> str:
    """Each of a few numbers: "1, 4, 16 and 128"."""
    first, last = ", ".join(map(str, numbers[:-1])), str(numbers[-1])
    return f"{first} and {last}" if first else last


def _bytes_of(part: FilePart) -> int:
    held = {id(v): v for node in part.region.nodes for v in node.inputs if v is not None and v.is_initializer()}
    return sum(value.const_value.nbytes for value in held.values() if value.const_value is not None)
