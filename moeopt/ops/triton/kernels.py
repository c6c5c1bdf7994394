"""The Triton kernels of the experts op.

Shape legend: T tokens, E experts, K chosen per token, R = T*K pairs (token, slot), H hidden, I intermediate, D out.

``decode_kernels``, few pairs:    ``gemv_in`` then ``gemv_out``; nothing is sorted, a pair reads its expert's weights.
``prefill_kernels``, many pairs:  ``sort_pairs``, ``tile_in``, ``tile_out``, then ``combine``: each expert's weights are
                                  read once a tile of rows.
``combine_kernels``:              each token's sum; ``combine_normed`` norms whole rows before it.

Weights are found through ``table``, (7, E) addresses: w_in, second w_in, w_out, their biases, the norm; 0 is absent.
No kernel adds floats in an order that depends on time, and none is told by the host how many rows an expert has.
"""

from triton.runtime.jit import JITFunction

from moeopt.ops.triton.combine_kernels import combine as combine
from moeopt.ops.triton.combine_kernels import combine_normed as combine_normed
from moeopt.ops.triton.decode_kernels import gemv_in as gemv_in
from moeopt.ops.triton.decode_kernels import gemv_out as gemv_out
from moeopt.ops.triton.decode_kernels import gemv_pair as gemv_pair
from moeopt.ops.triton.prefill_kernels import sort_pairs as sort_pairs
from moeopt.ops.triton.prefill_kernels import tile_in as tile_in
from moeopt.ops.triton.prefill_kernels import tile_out as tile_out

INTERPRETED = not isinstance(combine, JITFunction)
"""Whether Triton's interpreter runs the kernels in this process, and no compiler."""
