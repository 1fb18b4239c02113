// Attention whose products run on matrix tiles: keys and values are packed once for all queries of
// a head, and everything that is summed over keys is kept turned, so that weights need no turning.
#pragma once

#include <atomic>

#include "packed.h"
#include "scores.h"

namespace fnml::tiled {

#if FNML_TILES

// Keys and queries whose scores are computed at once: with what they are computed from and packed
// into, they stay in the first cache.
constexpr int kKeys = kDepth;
constexpr int kStrip = kDepth;
constexpr std::int64_t kKept = 1 << 18;  // words of packed keys and values that are kept

// Keys and values of one head, packed kKeys at a time when they are wanted.
template <bool Backward>
class Packed {
 public:
  struct Block {
    Panels k, v;      // rows are keys; in the forward pass v is turned
    Panels k_turned;  // in the backward pass, times the scale
  };

  static std::int64_t block_words(std::int64_t D) {
    return words(kKeys, D) + (Backward ? words(kKeys, D) : 0) + words(D, kKeys);
  }
  static std::int64_t kept(const Shape& shape) {
    const std::int64_t all = blocks(shape.S, kKeys);
    return all * block_words(shape.D) <= kKept ? all : 1;
  }
  static std::int64_t scratch(const Shape& shape) { return kept(shape) * block_words(shape.D); }

  Packed(const Shape& shape, const float* k, const float* v, float* space, Vec& odd)
      : shape_(shape),
        k_(k),
        v_(v),
        space_(space),
        kept_(kept(shape)),
        held_(kept_, -1),
        odd_(odd) {}

  Block block(std::int64_t index) {
    const std::int64_t D = shape_.D, row = shape_.K * D, slot = kept_ == 1 ? 0 : index;
    Space space(space_ + slot * block_words(D));
    Block to;
    to.k = space.panels(kKeys, D);
    to.v = Backward ? space.panels(kKeys, D) : space.panels(D, kKeys);
    if (Backward) to.k_turned = space.panels(D, kKeys);
    if (std::exchange(held_[slot], index) == index) return to;
    const std::int64_t key = index * kKeys, keys = std::min<std::int64_t>(kKeys, shape_.S - key);
    const float *k = k_ + key * row, *v = v_ + key * row;
    pack_along<false>(k, row, keys, whole(keys), D, 1.0f, to.k, odd_);
    if (Backward) {
      pack_along<false>(v, row, keys, whole(keys), D, 1.0f, to.v, odd_);
      pack_across<true>(k, row, keys, D, shape_.scale, to.k_turned, odd_);
    } else {
      pack_across<true>(v, row, keys, D, 1.0f, to.v, odd_);
    }
    return to;
  }

 private:
  const Shape& shape_;
  const float *k_, *v_;
  float* space_;
  std::int64_t kept_;
  std::vector<std::int64_t> held_;
  Vec& odd_;
};

// 2 ** x for x below 127; the relative error is below 2e-7. Below -126 it is 0, and what comes of
// an infinity less another stays NaN.
inline Vec power(Vec x) {
  const Vec held = x < -126.0f ? splat(-126.0f) : x;
  const Vec shift = splat(12582912.0f), shifted = held + shift;  // as in exp2
  const Vec part = held - (shifted - shift);                     // in [-0.5, 0.5]
  Vec y = splat(1.3264727e-3f);  // the least largest relative error, and 1 at 0
  y = y * part + 9.6715130e-3f;
  y = y * part + 5.5507336e-2f;
  y = y * part + 2.4022242e-1f;
  y = y * part + 6.9314700e-1f;
  y = y * part + 1.0f;
  const Ints exponent = reinterpret_cast<Ints>(shifted) << 23;
  return x < -126.0f ? Vec{} : reinterpret_cast<Vec>(reinterpret_cast<Ints>(y) + exponent);
}

using Part = Scores<kStrip>;
using Strip = Part::Rows;

inline bool sees(const Strip& strip, std::int64_t key) {
  return strip.first < std::min(strip.stop, key + kKeys) && key < strip.stop;
}

// Scores [kKeys, kStrip] of keys that a query does not see, or that are not there, become -inf.
inline void hide(const Shape& shape, const Strip& strip, std::int64_t key, float* scores) {
  const std::int64_t there = std::min<std::int64_t>(kKeys, shape.S - key);
  Part::hide(shape, strip, key, there, scores);
  std::fill(scores + there * kStrip, scores + kKeys * kStrip, -kInfinity);
}

// Turn scores [kKeys, kStrip] into weights, packed as columns of queries.
inline void weigh(Part::Softmax& softmax, const float* scores, Panels weights, Vec& odd) {
  for (int n = 0; n < Part::kVectors; ++n) {
    const float* from = scores + n * kLanes;
    Vec now = softmax.top[n];
    for (int j = 0; j < kKeys; ++j) now = max(load(from + j * kStrip), now);
    const Vec level = now == -kInfinity ? Vec{} : now;
    Vec sum{};
    float* to = weights.from(n * kLanes).at;
#pragma GCC unroll 2
    for (int j = 0; j < kSide; ++j) {
      const float* at = from + j * kStrip;
      const Vec low = power(load(at) - level), high = power(load(at + kSide * kStrip) - level);
      sum += low + high;
      join(cut(low, odd), cut(high, odd), to + j * kSide);
    }
    const Vec factor = power(softmax.top[n] - level);
    store(softmax.shrink + n * kLanes, factor);
    softmax.total[n] = softmax.total[n] * factor + sum;
    softmax.top[n] = now;
  }
}

// Weights of one strip and slopes of its scores, packed as rows of keys and columns of queries.
struct Gradients {
  Panels by_key, slopes_by_key, slopes_by_query;
};

// Turn scores [kKeys, kStrip] and the gradients of weights into gradients.
inline void weigh(const Part::Slopes& softmax, const float* scores, const float* slopes,
                  Gradients to, Vec& odd) {
  Vec level[2], inner[2];
  for (int n = 0; n < 2; ++n) {
    level[n] = load(softmax.level + n * kLanes);
    inner[n] = load(softmax.inner + n * kLanes);
  }
  for (int j = 0; j < kSide; ++j) {
    Cut cuts[2][2];  // of slopes: of two keys, of two vectors of queries
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const int key = i * kSide + j;
      Cut weights[2];
#pragma GCC unroll 2
      for (int n = 0; n < 2; ++n) {
        const int at = key * kStrip + n * kLanes;
        const Vec weight = power(load(scores + at) - level[n]);
        weights[n] = cut(weight, odd);
        cuts[i][n] = cut(weight * (load(slopes + at) - inner[n]), odd);
      }
      join(weights[0], weights[1], to.by_key.from(key).at + j * kSide);
      join(cuts[i][0], cuts[i][1], to.slopes_by_key.from(key).at + j * kSide);
    }
#pragma GCC unroll 2
    for (int n = 0; n < 2; ++n)
      join(cuts[0][n], cuts[1][n], to.slopes_by_query.from(n * kLanes).at + j * kSide);
  }
}

// Where the rows of the i-th head of keys begin, counted through all batches, and those of the
// first of its heads of queries.
inline std::int64_t key_at(const Shape& shape, std::int64_t i) {
  return (i / shape.K * shape.S * shape.K + i % shape.K) * shape.D;
}
inline std::int64_t query_at(const Shape& shape, std::int64_t i) {
  return (i / shape.K * shape.T * shape.H + i % shape.K * (shape.H / shape.K)) * shape.D;
}

// kQueries: those that pass over keys and values while these stay packed.
template <int kQueries>
struct Attention {
  static constexpr int kStrips = kQueries / kStrip;
  using Rows = typename Scores<kQueries>::Rows;

  // Call work(block, key) for blocks of the keys that some query sees.
  template <typename Blocks, typename Work>
  static void each_block(const Rows& rows, Blocks& packed, const Work& work) {
    if (rows.first == rows.stop) return;  // the first may lie beyond the last key
    for (std::int64_t i = rows.first / kKeys; i * kKeys < rows.stop; ++i)
      work(packed.block(i), i * kKeys);
  }

  using ForwardKeys = Packed<false>;

  static std::int64_t forward_scratch(const Shape& shape) {
    const std::int64_t D = shape.D;
    return ForwardKeys::scratch(shape) + words(kQueries, D) + words(kStrip, kKeys) +
           kKeys * kStrip + kQueries * D;
  }

  static void forward_rows(const Shape& shape, const Rows& rows, const float* q,
                           ForwardKeys& packed, float* out, float* log, Space space, Ahead& ahead,
                           Vec& odd) {
    const std::int64_t D = shape.D, row = shape.H * D, strips = blocks(rows.count, kStrip);
    const Panels queries = space.panels(kQueries, D), weights = space.panels(kStrip, kKeys);
    float* scores = space.take(kKeys * kStrip);
    float* sums = space.take(kQueries * D);
    pack_along<true>(q, row, rows.count, strips * kStrip, D, shape.scale * kLog2E, queries, odd);
    Part::Softmax softmax[kStrips];
    bool begun[kStrips] = {};
    each_block(rows, packed, [&](auto block, std::int64_t key) {
      for (std::int64_t i = 0; i < strips; ++i) {
        const Strip strip(shape, rows.start + i * kStrip);
        if (!sees(strip, key)) continue;
        multiply(kKeys, kStrip, whole(D), block.k, queries.from(i * kStrip), scores, kStrip, false,
                 ahead);
        hide(shape, strip, key, scores);
        weigh(softmax[i], scores, weights, odd);
        float* to = sums + i * kStrip * D;
        if (begun[i])
          for (std::int64_t d = 0; d < D; ++d)
            for (int n = 0; n < kStrip; n += kLanes)
              store(to + d * kStrip + n, load(to + d * kStrip + n) * load(softmax[i].shrink + n));
        multiply(D, kStrip, kKeys, block.v, weights, to, kStrip, begun[i], ahead);
        begun[i] = true;
      }
    });
    for (std::int64_t i = 0; i < strips; ++i) {
      const std::int64_t start = i * kStrip;
      const std::int64_t count = std::min<std::int64_t>(kStrip, rows.count - start);
      float* from = sums + start * D;
      if (!begun[i]) std::memset(from, 0, 4 * D * kStrip);
      alignas(64) float share[kStrip] = {};
      for (std::int64_t n = 0; n < count; ++n)
        share[n] = softmax[i].share(n), log[start + n] = softmax[i].log(n);
      turn_back(from, kStrip, share, count, D, out + start * row, row);
    }
  }

  static bool forward(xla::ffi::ThreadPool& pool, const Shape& shape, const float* q,
                      const float* k, const float* v, float* out, float* log) {
    const std::int64_t T = shape.T, S = shape.S, H = shape.H, K = shape.K, D = shape.D;
    const std::int64_t group = H / K, tiles = up(T, kQueries), heads = shape.B * K;
    const std::int64_t threads = std::max<std::int64_t>(1, pool.num_threads());
    // As many pieces as keep all threads at work: each packs its keys and values.
    const std::int64_t parts = std::min(tiles, up(4 * threads, std::max<std::int64_t>(1, heads)));
    const std::int64_t run = heads_of_a_piece(shape, threads);
    std::atomic<bool> good{true};
    parallel(pool, up(heads, run) * parts, [&](std::int64_t piece) {
      const tiles::Registers registers;
      Vec odd{};
      const std::int64_t part = piece % parts, start = piece / parts * run;
      const std::int64_t stop = std::min(heads, start + run);
      for (std::int64_t i = start; i < stop; ++i) {
        const std::int64_t n = i % K, b = i / K, key = key_at(shape, i);
        Ahead ahead(D);
        if (i + 1 < stop) {
          const std::int64_t next_key = key_at(shape, i + 1), next = query_at(shape, i + 1);
          for (const float* x : {k, v}) ahead.read(x + next_key, K * D, S);
          ahead.read(q + next, H * D, T);
          ahead.write(out + next, H * D, T);
        }
        Space space(scratch(forward_scratch(shape)));
        ForwardKeys packed(shape, k + key, v + key, space.take(ForwardKeys::scratch(shape)), odd);
        for (std::int64_t head = n * group; head < (n + 1) * group; ++head)
          for (std::int64_t tile = part; tile < tiles; tile += parts) {
            const Rows rows(shape, tile * kQueries);
            const std::int64_t query = ((b * T + rows.start) * H + head) * D;
            forward_rows(shape, rows, q + query, packed, out + query,
                         log + (b * H + head) * T + rows.start, space, ahead, odd);
          }
      }
      if (sum(odd) != 0.0f) good.store(false, std::memory_order_relaxed);
    });
    return good.load(std::memory_order_relaxed);
  }

  using BackwardKeys = Packed<true>;

  static std::int64_t backward_scratch(const Shape& shape) {
    const std::int64_t D = shape.D;
    return BackwardKeys::scratch(shape) + 2 * whole(shape.S) * D + 2 * words(kQueries, D) +
           2 * words(D, kQueries) + 2 * words(kKeys, kQueries) + words(kStrip, kKeys) +
           2 * kKeys * kStrip + kQueries * D;
  }

  // Add what one tile of queries gives to the gradients of its keys and values; write its own.
  static void backward_rows(const Shape& shape, const Rows& rows, const float* q,
                            BackwardKeys& packed, const float* out, const float* log,
                            const float* grad, float* grad_q, float* to_k, float* to_v, Space space,
                            Ahead& ahead, Vec& odd) {
    const std::int64_t D = shape.D, row = shape.H * D, strips = blocks(rows.count, kStrip);
    const Panels turned_q = space.panels(kQueries, D), turned_grad = space.panels(kQueries, D);
    const Panels own_q = space.panels(D, kQueries), own_grad = space.panels(D, kQueries);
    const Panels by_key = space.panels(kKeys, kQueries),
                 slopes_by_key = space.panels(kKeys, kQueries);
    const Panels slopes_by_query = space.panels(kStrip, kKeys);
    float* scores = space.take(kKeys * kStrip);
    float* slopes = space.take(kKeys * kStrip);
    float* sums = space.take(kQueries * D);
    pack_along<true>(q, row, rows.count, strips * kStrip, D, shape.scale * kLog2E, turned_q, odd);
    pack_along<true>(grad, row, rows.count, strips * kStrip, D, 1.0f, turned_grad, odd);
    pack_across<false>(q, row, rows.count, D, shape.scale, own_q, odd);
    pack_across<false>(grad, row, rows.count, D, 1.0f, own_grad, odd);
    Part::Slopes softmax[kStrips];
    bool begun[kStrips] = {};
    for (std::int64_t i = 0; i < strips; ++i) {
      const std::int64_t start = i * kStrip;
      softmax[i].begin({shape, rows.start + start}, row, D, log + start, out + start * row,
                       grad + start * row);
    }
    each_block(rows, packed, [&](auto block, std::int64_t key) {
      std::int64_t first = 0, stop = 0;  // of the queries that see the block
      for (std::int64_t i = 0; i < strips; ++i) {
        const Strip strip(shape, rows.start + i * kStrip);
        if (!sees(strip, key)) continue;
        const std::int64_t query = i * kStrip;
        multiply(kKeys, kStrip, whole(D), block.k, turned_q.from(query), scores, kStrip, false,
                 ahead);
        hide(shape, strip, key, scores);
        multiply(kKeys, kStrip, whole(D), block.v, turned_grad.from(query), slopes, kStrip, false,
                 ahead);
        weigh(softmax[i], scores, slopes,
              {by_key.below(query), slopes_by_key.below(query), slopes_by_query}, odd);
        multiply(D, kStrip, kKeys, block.k_turned, slopes_by_query, sums + query * D, kStrip,
                 begun[i], ahead);
        begun[i] = true;
        if (stop == 0) first = query;
        stop = query + kStrip;
      }
      if (stop == 0) return;
      multiply(kKeys, D, stop - first, by_key.below(first), own_grad.below(first), to_v + key * D,
               D, true, ahead);
      multiply(kKeys, D, stop - first, slopes_by_key.below(first), own_q.below(first),
               to_k + key * D, D, true, ahead);
    });
    alignas(64) float share[kStrip];
    std::fill_n(share, kStrip, 1.0f);
    for (std::int64_t i = 0; i < strips; ++i) {
      const std::int64_t start = i * kStrip;
      const std::int64_t count = std::min<std::int64_t>(kStrip, rows.count - start);
      if (!begun[i]) std::memset(sums + start * D, 0, 4 * D * kStrip);
      turn_back(sums + start * D, kStrip, share, count, D, grad_q + start * row, row);
    }
  }

  static bool backward(xla::ffi::ThreadPool& pool, const Shape& shape, const float* q,
                       const float* k, const float* v, const float* out, const float* log,
                       const float* grad, float* grad_q, float* grad_k, float* grad_v) {
    const std::int64_t T = shape.T, S = shape.S, H = shape.H, K = shape.K, D = shape.D;
    const std::int64_t group = H / K, tiles = up(T, kQueries);
    std::atomic<bool> good{true};
    backward_parts(pool, shape, tiles, grad_k, grad_v,
                   [&](std::int64_t b, std::int64_t n, std::int64_t part, std::int64_t parts,
                       float* to_k, float* to_v, std::int64_t to_row, bool more) {
                     const tiles::Registers registers;
                     Vec odd{};
                     Space space(scratch(backward_scratch(shape)));
                     const std::int64_t key = (b * S * K + n) * D, size = whole(S) * D;
                     float *own_k = space.take(size), *own_v = space.take(size);
                     std::memset(own_k, 0, 4 * size);
                     std::memset(own_v, 0, 4 * size);
                     Ahead ahead(D);
                     if (more) {
                       const std::int64_t i = b * K + n + 1, next_key = key_at(shape, i);
                       const std::int64_t next = query_at(shape, i);
                       for (const float* x : {q, grad, out}) ahead.read(x + next, H * D, T);
                       for (const float* x : {k, v}) ahead.read(x + next_key, K * D, S);
                       ahead.write(grad_q + next, H * D, T);
                       for (float* x : {grad_k, grad_v}) ahead.write(x + next_key, K * D, S);
                     }
                     BackwardKeys packed(shape, k + key, v + key,
                                         space.take(BackwardKeys::scratch(shape)), odd);
                     for (std::int64_t head = n * group; head < (n + 1) * group; ++head)
                       for (std::int64_t tile = part; tile < tiles; tile += parts) {
                         const Rows rows(shape, tile * kQueries);
                         const std::int64_t query = ((b * T + rows.start) * H + head) * D;

                         backward_rows(shape, rows, q + query, packed, out + query,
                                       log + (b * H + head) * T + rows.start, grad + query,
                                       grad_q + query, own_k, own_v, space, ahead, odd);
                       }
                     for (std::int64_t s = 0; s < S; ++s) {
                       for (std::int64_t d = 0; d < D; d += kLanes) {
                         store(to_k + s * to_row + d, load(own_k + s * D + d));
                         store(to_v + s * to_row + d, load(own_v + s * D + d));
                       }
                     }
                     if (sum(odd) != 0.0f) good.store(false, std::memory_order_relaxed);
                   });
    return good.load(std::memory_order_relaxed);
  }
};

// Whether tiles win: with short rows and few queries, packing costs what the products save.
// Measured at 32 numbers a row faster, at 16 slower.
inline bool pays(const Shape& shape) {
  return shape.D >= 32 && shape.T >= 64 && shape.S >= 64 && tiles::allowed();
}

using Small = Attention<64>;
using Large = Attention<128>;

// Whether there are enough large tiles of queries for some threads.
inline bool many(const Shape& shape) { return shape.B * shape.K * up(shape.T, 128) >= 16; }

// Return whether the results were computed: if not, tiles do not pay or this process may not use
// them, or a number is not finite.
inline bool attend(xla::ffi::ThreadPool& pool, const Shape& shape, const float* q, const float* k,
                   const float* v, float* out, float* log) {
  if (!pays(shape)) return false;
  const auto run = many(shape) ? Large::forward : Small::forward;
  return run(pool, shape, q, k, v, out, log);
}

inline bool differentiate(xla::ffi::ThreadPool& pool, const Shape& shape, const float* q,
                          const float* k, const float* v, const float* out, const float* log,
                          const float* grad, float* grad_q, float* grad_k, float* grad_v) {
  if (!pays(shape)) return false;
  const auto run = many(shape) ? Large::backward : Small::backward;
  return run(pool, shape, q, k, v, out, log, grad, grad_q, grad_k, grad_v);
}

#else

template <typename... Operands>
bool attend(const Operands&...) {
  return false;
}

template <typename... Operands>
bool differentiate(const Operands&...) {
  return false;
}

#endif

}  // namespace fnml::tiled
