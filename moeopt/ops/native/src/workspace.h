// Memory between the products of a call. What one call gives back the next one takes over: fresh pages cost a fault and zeros
// for each 4 KB, which came to an eighth of a call of 512 tokens and to a third of one of small experts.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t KEPT_BYTES = 0;  // each block ends where was asked for, and the sanitizer watches its ends
#else
constexpr int64_t KEPT_BYTES = 32 << 20;
#endif
constexpr int64_t LEAST_KEPT = 64 << 10;  // of a block: smaller ones are as quick from the allocator, which keeps them itself
constexpr int64_t MOST_SLACK = 2;         // a block serves requests down to this part of its size
constexpr int64_t HUGE_PAGE = 2 << 20;
constexpr int MOST_KEPT = 64;

struct Block {
  void *data = nullptr;
  int64_t bytes = 0;
};

Block fresh(int64_t bytes) {
  const bool huge = bytes >= 2 * HUGE_PAGE;  // one fault for each 2 MB, where the system has such pages
  const int64_t step = huge ? HUGE_PAGE : bytes >= LEAST_KEPT && KEPT_BYTES ? LEAST_KEPT : 64, all = (bytes + step - 1) / step * step;
  void *data = aligned_alloc(huge ? HUGE_PAGE : 64, all);
  if (!data) throw std::bad_alloc();
#if defined(__linux__)
  if (huge) madvise(data, all, MADV_HUGEPAGE);
#endif
  return {data, all};
}

class KeptBlocks {  // smallest first
 public:
  Block take(int64_t bytes) {
    if (bytes < LEAST_KEPT || busy.test_and_set(std::memory_order_acquire)) return {};
    Block found;
    Block *const end = blocks + count;
    Block *const at = std::find_if(blocks, end, [&](const Block &one) { return one.bytes >= bytes; });
    if (at != end && at->bytes / MOST_SLACK <= bytes) found = *at, remove(at);
    busy.clear(std::memory_order_release);
    return found;
  }

  // Whoever finds another thread here, or in a child of fork the state that such a thread left, frees his block.
  void give(Block block) {
    if (block.bytes < LEAST_KEPT || block.bytes > KEPT_BYTES || busy.test_and_set(std::memory_order_acquire)) return free(block.data);
    while (count && (count == MOST_KEPT || total + block.bytes > KEPT_BYTES)) free(blocks->data), remove(blocks);
    Block *const at = std::find_if(blocks, blocks + count, [&](const Block &one) { return one.bytes >= block.bytes; });
    std::copy_backward(at, blocks + count, blocks + count + 1);
    *at = block, count++, total += block.bytes;
    busy.clear(std::memory_order_release);
  }

 private:
  void remove(Block *at) {
    total -= at->bytes;
    std::copy(at + 1, blocks + count--, at);
  }

  std::atomic_flag busy = ATOMIC_FLAG_INIT;
  Block blocks[MOST_KEPT];
  int count = 0;
  int64_t total = 0;
} kept_blocks;

class Workspace {
 public:
  Workspace() = default;
  explicit Workspace(int64_t bytes) : block(kept_blocks.take(bytes)) {
    if (!block.data) block = fresh(std::max<int64_t>(bytes, 1));
  }
  Workspace(Workspace &&other) noexcept : block(other.block) { other.block = {}; }
  Workspace &operator=(Workspace &&other) noexcept {
    std::swap(block, other.block);
    return *this;
  }
  ~Workspace() {
    if (block.data) kept_blocks.give(block);
  }
  void *data() const { return block.data; }

 private:
  Block block;
};

}  // namespace
