// Attention whose products run on matrix tiles: keys and values are packed once for all queries of
// a head, and everything that is summed over keys is kept turned, so that weights need no turning.
#pragma once

#include <atomic>

#include "packed.h"
#include "scores.h"

namespace fnml::tiled {

#if FNML_TILES

constexpr int kKeys = 64;                // that are gone through at once
constexpr std::int64_t kKept = 1 << 18;  // words of packed keys and values that are kept

// Keys and values of one head, packed kKeys at a time when they are wanted.
template <bool Backward>
class Packed {
 public:
  struct Block {
    Panels k, v;      // rows are keys; in the forward pass v is turned
    Panels k_turned;  // in the backward pass
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
    // An even number of panels, as products take keys.
    const auto rows = [&](const float* x, Panels panels) {
      pack<true>({x, row, 1}, keys, D, panels, odd_);
      if (blocks(keys, kSide) % 2)
        std::memset(panels.from(keys + kSide - 1).at, 0, 4 * panels.apart);
    };
    rows(k, to.k);
    if (Backward) {
      rows(v, to.v);
      pack<true>({k, 1, row}, D, keys, to.k_turned, odd_);
    } else {
      pack<true>({v, 1, row}, D, keys, to.v, odd_);
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

template <int kQueries>
struct Attention {
  using Part = Scores<kQueries>;
  using Rows = typename Part::Rows;

  // Call work(block, key, keys, skipped) for blocks of the keys that some query sees; `skipped` of
  // a block's come before.
  template <typename Blocks, typename Work>
  static void each_block(const Rows& rows, Blocks& packed, const Work& work) {
    if (rows.first == rows.stop) return;  // the first may lie beyond the last key
    for (std::int64_t i = rows.first / kKeys; i * kKeys < rows.stop; ++i) {
      const std::int64_t start = i * kKeys, first = std::max(rows.first, start);
      const std::int64_t skipped = (first - start) / tiles::kDepth * tiles::kDepth;
      const std::int64_t stop = std::min(rows.stop, start + kKeys);
      work(packed.block(i), start + skipped, stop - start - skipped, skipped);
    }
  }

  // Products take whole blocks of keys: those beyond the last have no weights.
  static void clear(std::int64_t keys, float* weights) {
    std::memset(weights + keys * kQueries, 0, 4 * (whole(keys) - keys) * kQueries);
  }

  using ForwardKeys = Packed<false>;

  static std::int64_t forward_scratch(const Shape& shape) {
    const std::int64_t D = shape.D;
    return ForwardKeys::scratch(shape) + words(kQueries, D) + words(kQueries, kKeys) +
           kQueries * (2 * whole(D) + kKeys);
  }

  static void forward_rows(const Shape& shape, const Rows& rows, const float* q,
                           ForwardKeys& packed, float* out, float* log, Space space, Vec& odd) {
    const std::int64_t D = shape.D, row = shape.H * D;
    const Panels queries = space.panels(kQueries, D), weights = space.panels(kQueries, kKeys);
    float* turned = space.take(whole(D) * kQueries);
    float* scores = space.take(kKeys * kQueries);
    float* sums = space.take(D * kQueries);
    Part::turn(q, row, rows.count, D, shape.scale * kLog2E, turned);
    std::memset(turned + D * kQueries, 0, 4 * (whole(D) - D) * kQueries);
    pack<false>({turned, 1, kQueries}, kQueries, whole(D), queries, odd);
    typename Part::Softmax softmax;
    bool begun = false;
    each_block(rows, packed,
               [&](auto block, std::int64_t key, std::int64_t keys, std::int64_t skipped) {
                 multiply(whole(keys), kQueries, whole(D), block.k.from(skipped), queries, scores,
                          kQueries, false);
                 Part::hide(shape, rows, key, keys, scores);
                 softmax.weigh(keys, scores);
                 clear(keys, scores);
                 pack<false>({scores, 1, kQueries}, kQueries, whole(keys), weights, odd);
                 if (begun)
                   for (std::int64_t d = 0; d < D; ++d)
                     for (std::int64_t i = 0; i < kQueries; i += kLanes)
                       store(sums + d * kQueries + i,
                             load(sums + d * kQueries + i) * load(softmax.shrink + i));
                 multiply(D, kQueries, whole(keys), block.v.below(skipped), weights, sums, kQueries,
                          begun);
                 begun = true;
               });
    if (!begun) std::memset(sums, 0, 4 * D * kQueries);
    alignas(64) float share[kQueries] = {};
    for (std::int64_t i = 0; i < rows.count; ++i)
      share[i] = softmax.share(i), log[i] = softmax.log(i);
    turn_back(sums, kQueries, share, rows.count, D, out, row);
  }

  static bool forward(xla::ffi::ThreadPool& pool, const Shape& shape, const float* q,
                      const float* k, const float* v, float* out, float* log) {
    const std::int64_t T = shape.T, S = shape.S, H = shape.H, K = shape.K, D = shape.D;
    const std::int64_t group = H / K, tiles = up(T, kQueries),
                       heads = std::max<std::int64_t>(1, shape.B * K);
    // As many pieces as keep all threads at work: each packs its keys and values.
    const std::int64_t parts =
        std::min(tiles, up(4 * std::max<std::int64_t>(1, pool.num_threads()), heads));
    std::atomic<bool> good{true};
    parallel(pool, shape.B * K * parts, [&](std::int64_t piece) {
      const tiles::Registers registers;
      Vec odd{};
      Space space(scratch(forward_scratch(shape)));
      const std::int64_t part = piece / heads, n = piece % K, b = piece % heads / K;
      const std::int64_t key = (b * S * K + n) * D;
      ForwardKeys packed(shape, k + key, v + key, space.take(ForwardKeys::scratch(shape)), odd);
      for (std::int64_t head = n * group; head < (n + 1) * group; ++head)
        for (std::int64_t tile = part; tile < tiles; tile += parts) {
          const Rows rows(shape, tile * kQueries);
          const std::int64_t query = ((b * T + rows.start) * H + head) * D;
          forward_rows(shape, rows, q + query, packed, out + query,
                       log + (b * H + head) * T + rows.start, space, odd);
        }
      if (sum(odd) != 0.0f) good.store(false, std::memory_order_relaxed);
    });
    return good.load(std::memory_order_relaxed);
  }

  using BackwardKeys = Packed<true>;

  static std::int64_t backward_scratch(const Shape& shape) {
    const std::int64_t D = shape.D;
    return BackwardKeys::scratch(shape) + 2 * whole(shape.S) * D + 2 * words(kQueries, D) +
           2 * words(D, kQueries) + 2 * words(kKeys, kQueries) + words(kQueries, kKeys) +
           kQueries * (whole(D) + D + 2 * kKeys);
  }

  // Add what one tile of queries gives to the gradients of its keys and values; write its own.
  static void backward_rows(const Shape& shape, const Rows& rows, const float* q,
                            BackwardKeys& packed, const float* out, const float* log,
                            const float* grad, float* grad_q, float* to_k, float* to_v, Space space,
                            Vec& odd) {
    const std::int64_t D = shape.D, row = shape.H * D, deep = whole(rows.count);
    const Panels turned_q = space.panels(kQueries, D), turned_grad = space.panels(kQueries, D);
    const Panels own_q = space.panels(D, kQueries), own_grad = space.panels(D, kQueries);
    const Panels by_key = space.panels(kKeys, kQueries),
                 slopes_by_key = space.panels(kKeys, kQueries);
    const Panels by_query = space.panels(kQueries, kKeys);
    float* turned = space.take(whole(D) * kQueries);
    float* weights = space.take(kKeys * kQueries);
    float* slopes = space.take(kKeys * kQueries);
    float* sums = space.take(D * kQueries);
    std::memset(turned + D * kQueries, 0, 4 * (whole(D) - D) * kQueries);
    Part::turn(q, row, rows.count, D, shape.scale * kLog2E, turned);
    pack<false>({turned, 1, kQueries}, kQueries, whole(D), turned_q, odd);
    Part::turn(grad, row, rows.count, D, 1.0f, turned);
    pack<false>({turned, 1, kQueries}, kQueries, whole(D), turned_grad, odd);
    pack<false>({q, 1, row}, D, rows.count, own_q, odd);
    pack<false>({grad, 1, row}, D, rows.count, own_grad, odd);
    const typename Part::Slopes softmax(rows, row, D, log, out, grad);
    bool begun = false;
    each_block(rows, packed,
               [&](auto block, std::int64_t key, std::int64_t keys, std::int64_t skipped) {
                 const std::int64_t all = whole(keys);
                 multiply(all, kQueries, whole(D), block.k.from(skipped), turned_q, weights,
                          kQueries, false);
                 Part::hide(shape, rows, key, keys, weights);
                 multiply(all, kQueries, whole(D), block.v.from(skipped), turned_grad, slopes,
                          kQueries, false);
                 softmax.weigh(keys, shape.scale, weights, slopes);
                 clear(keys, weights);
                 clear(keys, slopes);
                 pack<true>({weights, kQueries, 1}, all, deep, by_key, odd);
                 multiply(all, D, deep, by_key, own_grad, to_v + key * D, D, true);
                 pack<true>({slopes, kQueries, 1}, all, deep, slopes_by_key, odd);
                 multiply(all, D, deep, slopes_by_key, own_q, to_k + key * D, D, true);
                 pack<false>({slopes, 1, kQueries}, kQueries, all, by_query, odd);
                 multiply(D, kQueries, all, block.k_turned.below(skipped), by_query, sums, kQueries,
                          begun);
                 begun = true;
               });
    if (!begun) std::memset(sums, 0, 4 * D * kQueries);
    alignas(64) float share[kQueries];
    std::fill_n(share, kQueries, 1.0f);
    turn_back(sums, kQueries, share, rows.count, D, grad_q, row);
  }

  static bool backward(xla::ffi::ThreadPool& pool, const Shape& shape, const float* q,
                       const float* k, const float* v, const float* out, const float* log,
                       const float* grad, float* grad_q, float* grad_k, float* grad_v) {
    const std::int64_t T = shape.T, S = shape.S, H = shape.H, K = shape.K, D = shape.D;
    const std::int64_t group = H / K, tiles = up(T, kQueries);
    std::atomic<bool> good{true};
    backward_parts(pool, shape, tiles, grad_k, grad_v,
                   [&](std::int64_t b, std::int64_t n, std::int64_t part, std::int64_t parts,
                       float* to_k, float* to_v, std::int64_t to_row) {
                     const tiles::Registers registers;
                     Vec odd{};
                     Space space(scratch(backward_scratch(shape)));
                     const std::int64_t key = (b * S * K + n) * D, size = whole(S) * D;
                     float *own_k = space.take(size), *own_v = space.take(size);
                     std::memset(own_k, 0, 4 * size);
                     std::memset(own_v, 0, 4 * size);
                     BackwardKeys packed(shape, k + key, v + key,
                                         space.take(BackwardKeys::scratch(shape)), odd);
                     for (std::int64_t head = n * group; head < (n + 1) * group; ++head)
                       for (std::int64_t tile = part; tile < tiles; tile += parts) {
                         const Rows rows(shape, tile * kQueries);
                         const std::int64_t query = ((b * T + rows.start) * H + head) * D;

                         backward_rows(shape, rows, q + query, packed, out + query,
                                       log + (b * H + head) * T + rows.start, grad + query,
                                       grad_q + query, own_k, own_v, space, odd);
                       }
                     for (std::int64_t s = 0; s < S; ++s) {
                       std::memcpy(to_k + s * to_row, own_k + s * D, 4 * D);
                       std::memcpy(to_v + s * to_row, own_v + s * D, 4 * D);
                     }
                     if (sum(odd) != 0.0f) good.store(false, std::memory_order_relaxed);
                   });
    return good.load(std::memory_order_relaxed);
  }
};

// Whether tiles win: with short rows and few queries, packing costs what the products save.
// Measured at 32 numbers a row and 128 queries as fast as vectors, at 16 slower; at 48 and 64
// faster.
inline bool pays(const Shape& shape) {
  return shape.D >= 48 && shape.T >= kKeys && shape.S >= kKeys && tiles::allowed();
}

// Larger tiles of queries read keys and values less often; smaller ones compute less in vain.
using Small = Attention<64>;
using Large = Attention<128>;
constexpr std::int64_t kManyQueries = 1024;  // from which large tiles pay

// Return whether the results were computed: if not, tiles do not pay or this process may not use
// them, or a number is not finite.
inline bool attend(xla::ffi::ThreadPool& pool, const Shape& shape, const float* q, const float* k,
                   const float* v, float* out, float* log) {
  if (!pays(shape)) return false;
  const auto run = shape.T < kManyQueries ? Small::forward : Large::forward;
  return run(pool, shape, q, k, v, out, log);
}

inline bool differentiate(xla::ffi::ThreadPool& pool, const Shape& shape, const float* q,
                          const float* k, const float* v, const float* out, const float* log,
                          const float* grad, float* grad_q, float* grad_k, float* grad_v) {
  if (!pays(shape)) return false;
  const auto run = shape.T < kManyQueries ? Small::backward : Large::backward;
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
