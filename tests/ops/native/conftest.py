"""The kernel with every instruction set that this machine runs; where no compiler is, these tests are skipped."""

import pytest
import torch

from moeopt.ops.native import build, library
from moeopt.ops.native.call import call


@pytest.fixture(scope="session")
def whole_library():
    """The path of a library with all instruction sets; from the cache where it has been built."""
    if build.find_compiler() is None:
        pytest.skip(f"the native kernel: {build.how_to_get_one()}")
    return build.build(build.all_isas())


class Kernel:
    """``kernel(*args)`` is the native result for one instruction set."""

    def __init__(self, path, isa):
        self.library = library.opened(path, isa)
        self.isa = isa

    def __call__(self, *args, threads=1):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.no_grad():
                return call(self.library.run, *args, self.library.bit)
        finally:
            torch.set_num_threads(before)


# avx512_vnni has the code of avx512 for floats and of avx512_bf16 for rows of 8 bits, with one test that these agree
@pytest.fixture(params=[isa for isa in build.ISAS if isa != "avx512_vnni"])
def kernel(request, whole_library):
    if request.param not in build.isas_here():
        pytest.skip(f"this CPU has no {request.param}")
    return Kernel(whole_library, request.param)


@pytest.fixture
def best(whole_library):
    """The kernel of the best instruction set."""
    return Kernel(whole_library, build.isas_here()[-1])
