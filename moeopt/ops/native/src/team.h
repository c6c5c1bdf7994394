// The threads that PyTorch's OpenMP has already. They stay awake for some milliseconds after each of PyTorch's operations,
// so threads of our own beside them would share their cores.
#pragma once
#include <cstdint>

#include "pool.h"

// Whether there are such threads. None are where the process has no OpenMP, and in one that was forked from another that
// may have used it: there a call of it might wait for ever.
bool has_team();

// Runs body(context, i) on at most `threads` of them, the caller's among them, each with an i of its own below `threads`;
// returns when all are done. While they are at work for another caller, the caller is alone.
void run_team(int64_t threads, Body body, void *context);
