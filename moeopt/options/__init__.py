"""Everything a user may choose, in one frozen value; the only place that reads MOEOPT_* variables.

A field that is not given takes its environment variable where it has one, and its default otherwise:

    MOEOPT_VERIFY  verify  strict, fast or off
    MOEOPT_SEED    seed    an integer
    MOEOPT_FUEL    fuel    at most so many passes are applied, over all blocks, for bisecting
    MOEOPT_DUMP    dump    a folder for each block's graph, reading and program, before and after each pass
    MOEOPT_SKIP_PASSES     skip_passes     names of passes, with commas between
    MOEOPT_PRINT_PASSES    print_passes    1, or names of passes: what each did, a line on stderr and in the report

Choices of the whole process, which are no fields, for a call of the op has no ``Options``:

    MOEOPT_CACHE    the folder of what was measured and built here; else the user's cache directory
    MOEOPT_MEASURE  off: measure nothing on this machine, each choice has its safe default
    MOEOPT_NATIVE   off: do without the kernel in C++
    MOEOPT_NATIVE_ISA  the instruction set that it plays: generic, avx2, avx2_vnni,
                       avx512, avx512_vnni, avx512_bf16, amx_bf16 or neon
    MOEOPT_CXX      the compiler that builds it

``fields`` has the dataclass, ``checks`` what a field can take, ``quant_plan`` and ``loss_limits`` what ``quantize`` and
``limit`` can, ``environment`` every variable that is read.
"""

from moeopt.options.checks import check_device as check_device
from moeopt.options.environment import ALL_VARIABLES as ALL_VARIABLES
from moeopt.options.environment import ASKED_WITH as ASKED_WITH
from moeopt.options.environment import EVERY_VARIABLE as EVERY_VARIABLE
from moeopt.options.environment import ONE_VARIABLE as ONE_VARIABLE
from moeopt.options.environment import cache_directory as cache_directory
from moeopt.options.environment import check_variables as check_variables
from moeopt.options.environment import compiler_wanted as compiler_wanted
from moeopt.options.environment import cpu_limits as cpu_limits
from moeopt.options.environment import in_ci as in_ci
from moeopt.options.environment import inherited as inherited
from moeopt.options.environment import measuring as measuring
from moeopt.options.environment import native_isa as native_isa
from moeopt.options.environment import native_wanted as native_wanted
from moeopt.options.environment import variable_set as variable_set
from moeopt.options.environment import variables as variables
from moeopt.options.environment import variables_beginning as variables_beginning
from moeopt.options.fields import DenseMode as DenseMode
from moeopt.options.fields import Options as Options
from moeopt.options.fields import Verify as Verify
from moeopt.options.quant_plan import QuantPlan as QuantPlan
