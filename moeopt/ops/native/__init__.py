"""The fused experts kernel in C++: built where a compiler is, checked against the reference, else left alone."""
