"""Every change that moeopt makes to the process: patches of torch, onnxscript, transformers, gc, warnings and loggers.

A patch is counted and locked: in force while a caller is inside, taken back by the last caller out (:mod:`.patch`).

    file          patch                    what is changed, and for whom
    collector     fewer_collections        the collector's threshold, all threads
    collector     no_collections           the collector off, all threads
    tracing       module_calls             nn.Module.__call__, one thread at a time
    tracing       size_questions           SymNode.bool_ and guard_int, the caller's thread
    tracing       size_answers             SymNode.bool_, the caller's thread
    tracing       general_ways             SymNode.guard_bool, the caller's thread
    tracing       free_lengths             the name len in globals of the model's code, the caller's thread
    tracing       idle_moves               nn.Module.to, the caller's thread
    tracing       no_export_dump           the print of torch.export, all threads
    tracing       no_results_kept          FakeTensorMode.__init__, the caller's thread
    decomposition tables_of_weights        torch.export's note of weights, all threads (the same notes, sooner)
    decomposition composites_listed_once   torch's look-up of its composite ops, all threads (the same ops, sooner)
    decomposition kernels_entered_plainly  OperatorBase.py_impl, all threads (the same kernels, sooner)
    decomposition quicker_decomposition    the three before it, and general_ways
    onnx_export   rules_by_their_last_op   onnxscript's pattern matcher, all threads (the same matches, sooner)
    onnx_export   one_registry             torch's table of ONNX translations, all threads (the same table, made once)
    onnx_export   no_idle_decomposition    torch's pass before ONNX, all threads (left out where every op has a
                                           translation)
    onnx_export   promotion_from_known_values
                                           torch's pass of type promotion, all threads (the same casts, sooner)
    onnx_export   quicker_export           the four before it, and quicker_decomposition
    onnx_export   after_decomposition      torch's preparation before ONNX, the caller's thread
    attention     sdpa_of                  transformers' attention function "sdpa", the caller's thread
    contiguity    untraced_contiguity      transformers' question whether tensors are contiguous, all threads (the same
                                           answers, sooner)
    load_report   kept_load_report         transformers' report of what it loaded, the caller's thread
    recurrent     recurrent_inputs_of_any_dtype
                                           nn.RNNBase.check_input, the caller's thread
    output        no_fake_tensor_errors    the logger of fake tensors, all threads
    output        no_warnings              warnings, the caller's thread
    output        quiet                    standard output and warnings, the caller's thread; loggers, all threads

Two more are built on :class:`Patch` beside the reasons for them: ``lower``'s exact rules of onnxscript, and the
translations that transformers' exporter is given.

Here a reader sees which private names of torch, onnxscript and transformers moeopt leans on.
"""

from moeopt.patches.attention import sdpa_of as sdpa_of
from moeopt.patches.collector import fewer_collections as fewer_collections
from moeopt.patches.collector import no_collections as no_collections
from moeopt.patches.contiguity import untraced_contiguity as untraced_contiguity
from moeopt.patches.decomposition import composites_listed_once as composites_listed_once
from moeopt.patches.decomposition import kernels_entered_plainly as kernels_entered_plainly
from moeopt.patches.decomposition import quicker_decomposition as quicker_decomposition
from moeopt.patches.decomposition import tables_of_weights as tables_of_weights
from moeopt.patches.load_report import kept_load_report as kept_load_report
from moeopt.patches.onnx_export import after_decomposition as after_decomposition
from moeopt.patches.onnx_export import no_idle_decomposition as no_idle_decomposition
from moeopt.patches.onnx_export import one_registry as one_registry
from moeopt.patches.onnx_export import promotion_from_known_values as promotion_from_known_values
from moeopt.patches.onnx_export import quicker_export as quicker_export
from moeopt.patches.onnx_export import rules_by_their_last_op as rules_by_their_last_op
from moeopt.patches.output import no_fake_tensor_errors as no_fake_tensor_errors
from moeopt.patches.output import no_warnings as no_warnings
from moeopt.patches.output import quiet as quiet
from moeopt.patches.patch import InForce as InForce
from moeopt.patches.patch import Patch as Patch
from moeopt.patches.patch import Undo as Undo
from moeopt.patches.patch import replace as replace
from moeopt.patches.recurrent import recurrent_inputs_of_any_dtype as recurrent_inputs_of_any_dtype
from moeopt.patches.tracing import free_lengths as free_lengths
from moeopt.patches.tracing import general_ways as general_ways
from moeopt.patches.tracing import idle_moves as idle_moves
from moeopt.patches.tracing import module_calls as module_calls
from moeopt.patches.tracing import no_export_dump as no_export_dump
from moeopt.patches.tracing import no_results_kept as no_results_kept
from moeopt.patches.tracing import one_trace as one_trace
from moeopt.patches.tracing import size_answers as size_answers
from moeopt.patches.tracing import size_questions as size_questions
from moeopt.patches.tracing import stands_for_builtin as stands_for_builtin
