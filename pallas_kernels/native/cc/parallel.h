// Independent pieces of work on XLA's own threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace fnml {

// Run work(0), ..., work(pieces - 1), and return when all have run.
//
// The calling thread works too, and waits for nobody who has not begun: it may itself be one of
// the pool's threads, and the others may be busy with something that waits for this one.
template <typename Work>
void parallel(xla::ffi::ThreadPool& pool, std::int64_t pieces, const Work& work) {
  struct State {
    const Work* work;
    std::int64_t pieces;
    std::atomic<std::int64_t> next{0};
    std::atomic<std::int64_t> done{0};
    // Memory that has run out ends the process: others may still use what the caller owns.
    void help() noexcept {
      for (std::int64_t i; (i = next.fetch_add(1)) < pieces;) {
        (*work)(i);
        done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  auto state = std::make_shared<State>();
  state->work = &work;
  state->pieces = pieces;
  const std::int64_t helpers = std::min<std::int64_t>(pool.num_threads(), pieces) - 1;
  for (std::int64_t i = 0; i < helpers; ++i) pool.Schedule([state] { state->help(); });
  state->help();
  // A piece that another thread has begun is mostly short: waiting costs less than sleeping.
  for (int turn = 0; state->done.load(std::memory_order_acquire) < pieces; ++turn) {
    if (turn > 10000) std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

}  // namespace fnml
