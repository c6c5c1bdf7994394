// The tiles of a CPU with AMX: who may use them, and the instructions. Tests put a header of plain C++ in the place of all this.
#pragma once

enum TileUse { TILES_MAY_BE_USED = 0, NO_TILES = 1, TILES_REFUSED = 2 };  // see moeopt_tiles

#if defined(MOEOPT_TILE_UNIT)
#include MOEOPT_TILE_UNIT
#else

#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// GCC's intrinsics tell it neither that a tile is loaded from memory nor that all 64 bytes of a configuration are read, so it may
// store later, or never, what they shall find. This stands before them: whatever was written is in memory, at `at` too.
inline void memory_is_as_written(const void *at) { asm volatile("" ::"r"(at) : "memory"); }

#if defined(__linux__)
bool cpu_has_tiles() {
  unsigned a, b, c, d;
  constexpr unsigned XSAVE_IN_USE = 1u << 27, BF16 = 1u << 22, TILE = 1u << 24, STATES = 3u << 17;  // of its configuration and data
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & XSAVE_IN_USE)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & BF16) || !(d & TILE)) return false;
  unsigned kept, more;
  asm volatile("xgetbv" : "=a"(kept), "=d"(more) : "c"(0));
  if ((kept & STATES) != STATES) return false;
  // palette 1: eight tiles of 16 rows of 64 bytes
  return __get_cpuid_count(0x1d, 1, &a, &b, &c, &d) && b >> 16 >= 8 && (b & 0xffff) >= 64 && (c & 0xffff) >= 16;
}

// Linux keeps tiles for a process that has asked for them, all its threads and what is forked from it.
TileUse ask_for_tiles() {
  constexpr long GET = 0x1022, ASK = 0x1023, DATA = 18;  // ARCH_GET_XCOMP_PERM, ARCH_REQ_XCOMP_PERM, the state's number
  if (!cpu_has_tiles()) return NO_TILES;
  unsigned long given = 0;
  if (syscall(SYS_arch_prctl, ASK, DATA) || syscall(SYS_arch_prctl, GET, &given)) return TILES_REFUSED;
  return given >> DATA & 1 ? TILES_MAY_BE_USED : TILES_REFUSED;
}
#else
TileUse ask_for_tiles() { return NO_TILES; }
#endif

}  // namespace
#endif
