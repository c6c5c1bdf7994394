// One call of the kernel on threads of the caller's choice.
#pragma once
#include <cstddef>

#include "moeopt_experts.h"

// f(user, i) for each i < total, on threads of the caller's; returns when all are done, false if none was begun
typedef bool (*ParallelFor)(void *threads, void (*f)(void *, size_t), size_t total, void *user);

// As moeopt_experts; on the kernel's own threads where `each` is null.
int64_t run_experts(const moeopt_call *call, ParallelFor each, void *threads);
