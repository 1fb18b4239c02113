// Attention over float32 arrays, in tiles of scores that stay in the cache.
//
// Scores are kept transposed, keys by queries: then K and V are read as they lie, and the softmax
// over keys is arithmetic on whole vectors of queries. Dao 2023, arXiv:2307.08691.
#include <cmath>
#include <limits>
#include <vector>

#include "buffers.h"
#include "parallel.h"
#include "product.h"

namespace fnml {

namespace {

constexpr std::int64_t kPieces = 8;  // at least so many pieces of work, if there are tiles enough
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504f;

std::int64_t up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

struct Shape {
  std::int64_t B, T, S, H, K, D;
  std::int64_t left, right;  // how far a query sees, or a negative number for no bound
  float scale;

  std::int64_t first_key(std::int64_t query) const {
    return left < 0 ? 0 : std::max<std::int64_t>(0, query - left);
  }
  std::int64_t stop_key(std::int64_t query) const {
    return right < 0 ? S : std::min(S, query + right + 1);
  }
};

// Arithmetic on tiles of kQueries queries and at most kKeys keys, a multiple of the rows of a
// product's tiles.
template <int kQueries, int kKeys>
struct Tiles {
  static constexpr int kVectors = kQueries / kLanes;

  // Queries [start, start + kQueries) of one head, and the keys that any of them sees.
  struct Rows {
    std::int64_t start, count, first, stop;

    Rows(const Shape& shape, std::int64_t start)
        : start(start),
          count(std::min<std::int64_t>(kQueries, shape.T - start)),
          first(shape.first_key(start)),
          stop(std::max(first, shape.stop_key(start + count - 1))) {}

    // Keys of one tile: about the same for all of them.
    std::int64_t step() const {
      const std::int64_t keys = stop - first, tiles = std::max<std::int64_t>(1, up(keys, kKeys));
      return 12 * up(up(keys, tiles), 12);
    }
  };

  // Turn [count, D] rows into [D, kQueries], times a factor; missing rows are 0.
  static void turn(const float* x, std::int64_t row, std::int64_t count, std::int64_t D,
                   float factor, float* out) {
    for (std::int64_t i = 0; i < kQueries; i += kLanes)
      for (std::int64_t d = 0; d < D; d += kLanes) {
        Vec square[kLanes];
        for (int n = 0; n < kLanes; ++n)
          square[n] = i + n < count ? load(x + (i + n) * row + d) * factor : Vec{};
        transpose(square);
        for (int n = 0; n < kLanes; ++n) store(out + (d + n) * kQueries + i, square[n]);
      }
  }

  // Replace scores of keys that a query does not see by -inf.
  static void hide(const Shape& shape, std::int64_t query, std::int64_t key, std::int64_t keys,
                   float* scores) {
    for (std::int64_t j = 0; j < keys; ++j)
      for (int n = 0; n < kVectors; ++n) {
        const Ints ahead = iota() + static_cast<std::int32_t>(query + n * kLanes - key - j);
        Vec x = load(scores + j * kQueries + n * kLanes);
        if (shape.right >= 0)
          x = ahead < static_cast<std::int32_t>(-shape.right) ? splat(-kInfinity) : x;
        if (shape.left >= 0)
          x = ahead > static_cast<std::int32_t>(shape.left) ? splat(-kInfinity) : x;
        store(scores + j * kQueries + n * kLanes, x);
      }
  }

  static bool partly_hidden(const Shape& shape, const Rows& rows, std::int64_t key,
                            std::int64_t keys) {
    const bool right = shape.right >= 0 && key + keys > shape.stop_key(rows.start);
    return right || (shape.left >= 0 && key < shape.first_key(rows.start + rows.count - 1));
  }

  static void forward_rows(const Shape& shape, const Rows& rows, const float* q, const float* k,
                           const float* v, float* out, float* log, float* scratch) {
    const std::int64_t D = shape.D, key_row = shape.K * D, row = shape.H * D;
    float* turned = scratch;                  // [D, kQueries]
    float* scores = turned + D * kQueries;    // [kKeys, kQueries]
    float* sums = scores + kKeys * kQueries;  // [kQueries, D]
    turn(q, row, rows.count, D, shape.scale * kLog2E, turned);
    Vec top[kVectors], total[kVectors];
    for (int n = 0; n < kVectors; ++n) top[n] = splat(-kInfinity), total[n] = Vec{};
    bool begun = false;
    const std::int64_t step = rows.step();
    for (std::int64_t key = rows.first; key < rows.stop; key += step) {
      const std::int64_t keys = std::min(step, rows.stop - key);
      product(keys, kQueries, D, {k + key * key_row, key_row, 1}, turned, kQueries, scores,
              kQueries, false);
      if (partly_hidden(shape, rows, key, keys)) hide(shape, rows.start, key, keys, scores);
      alignas(64) float shrink[kQueries];
      for (int n = 0; n < kVectors; ++n) {
        Vec now = top[n];
        for (std::int64_t j = 0; j < keys; ++j)
          now = max(load(scores + j * kQueries + n * kLanes), now);
        const Vec level = now == -kInfinity ? Vec{} : now;
        Vec sum{};
        for (std::int64_t j = 0; j < keys; ++j) {
          float* at = scores + j * kQueries + n * kLanes;
          const Vec weight = exp2(load(at) - level);
          store(at, weight);
          sum += weight;
        }
        const Vec factor = exp2(top[n] - level);
        store(shrink + n * kLanes, factor);
        total[n] = total[n] * factor + sum;
        top[n] = now;
      }
      if (begun)
        for (std::int64_t i = 0; i < kQueries; ++i)
          for (std::int64_t d = 0; d < D; d += kLanes)
            store(sums + i * D + d, load(sums + i * D + d) * shrink[i]);
      product(kQueries, D, keys, {scores, 1, kQueries}, v + key * key_row, key_row, sums, D, begun);
      begun = true;
    }
    for (std::int64_t i = 0; i < rows.count; ++i) {
      const float all = total[i / kLanes][i % kLanes];
      const bool alone = all == 0.0f || !begun;
      const float share = alone ? 0.0f : 1.0f / all;
      for (std::int64_t d = 0; d < D; d += kLanes)
        store(out + i * row + d, alone ? Vec{} : load(sums + i * D + d) * share);
      log[i] = alone ? kInfinity : top[i / kLanes][i % kLanes] / kLog2E + std::log(all);
    }
  }

  static std::int64_t forward_scratch(std::int64_t D) { return kQueries * (2 * D + kKeys); }

  static void forward(ffi::ThreadPool& pool, const Shape& shape, const float* q, const float* k,
                      const float* v, float* out, float* log) {
    const std::int64_t tiles = up(shape.T, kQueries);
    parallel(pool, shape.B * shape.H * tiles, [&](std::int64_t piece) {
      thread_local std::vector<float> scratch;
      scratch.resize(forward_scratch(shape.D));
      // The long rows of causal attention first: the short ones even out the end.
      const std::int64_t head = piece % shape.H, b = piece / shape.H % shape.B;
      const std::int64_t tile = tiles - 1 - piece / (shape.H * shape.B);
      const Rows rows(shape, tile * kQueries);
      const std::int64_t query = ((b * shape.T + rows.start) * shape.H + head) * shape.D;
      const std::int64_t key = (b * shape.S * shape.K + head / (shape.H / shape.K)) * shape.D;
      forward_rows(shape, rows, q + query, k + key, v + key, out + query,
                   log + (b * shape.H + head) * shape.T + rows.start, scratch.data());
    });
  }

  // Add what one tile of queries gives to the gradients of its keys and values; write its own.
  static void backward_rows(const Shape& shape, const Rows& rows, const float* q, const float* k,
                            const float* v, const float* out, const float* log, const float* grad,
                            float* grad_q, float* grad_k, float* grad_v, std::int64_t grad_row,
                            float* scratch) {
    const std::int64_t D = shape.D, key_row = shape.K * D, row = shape.H * D;
    float* turned = scratch;                      // [D, kQueries]
    float* turned_grad = turned + D * kQueries;   // [D, kQueries]
    float* weights = turned_grad + D * kQueries;  // [kKeys, kQueries]
    float* slopes = weights + kKeys * kQueries;   // [kKeys, kQueries]
    float* sums = slopes + kKeys * kQueries;      // [kQueries, D]
    turn(q, row, rows.count, D, shape.scale * kLog2E, turned);
    turn(grad, row, rows.count, D, 1.0f, turned_grad);
    alignas(64) float level[kQueries], inner[kQueries];
    for (std::int64_t i = 0; i < kQueries; ++i) {
      // A row that is not there has no weights: its level is infinite.
      level[i] = i < rows.count ? log[i] * kLog2E : kInfinity;
      Vec dot{};
      if (i < rows.count)
        for (std::int64_t d = 0; d < D; d += kLanes)
          dot += load(out + i * row + d) * load(grad + i * row + d);
      inner[i] = sum(dot);
    }
    bool begun = false;
    const std::int64_t step = rows.step();
    for (std::int64_t key = rows.first; key < rows.stop; key += step) {
      const std::int64_t keys = std::min(step, rows.stop - key);
      const std::int64_t at = key * key_row;
      product(keys, kQueries, D, {k + at, key_row, 1}, turned, kQueries, weights, kQueries, false);
      if (partly_hidden(shape, rows, key, keys)) hide(shape, rows.start, key, keys, weights);
      product(keys, kQueries, D, {v + at, key_row, 1}, turned_grad, kQueries, slopes, kQueries,
              false);
      for (int n = 0; n < kVectors; ++n) {
        const Vec down = load(level + n * kLanes), own = load(inner + n * kLanes);
        for (std::int64_t j = 0; j < keys; ++j) {
          const std::int64_t x = j * kQueries + n * kLanes;
          const Vec weight = exp2(load(weights + x) - down);
          store(weights + x, weight);
          store(slopes + x, weight * (load(slopes + x) - own) * shape.scale);
        }
      }
      product(keys, D, rows.count, {weights, kQueries, 1}, grad, row, grad_v + key * grad_row,
              grad_row, true);
      product(keys, D, rows.count, {slopes, kQueries, 1}, q, row, grad_k + key * grad_row, grad_row,
              true);
      product(kQueries, D, keys, {slopes, 1, kQueries}, k + at, key_row, sums, D, begun);
      begun = true;
    }
    for (std::int64_t i = 0; i < rows.count; ++i)
      for (std::int64_t d = 0; d < D; d += kLanes)
        store(grad_q + i * row + d, begun ? load(sums + i * D + d) : Vec{});
  }

  static std::int64_t backward_scratch(std::int64_t D) { return kQueries * (3 * D + 2 * kKeys); }

  static void backward(ffi::ThreadPool& pool, const Shape& shape, const float* q, const float* k,
                       const float* v, const float* out, const float* log, const float* grad,
                       float* grad_q, float* grad_k, float* grad_v) {
    const std::int64_t B = shape.B, T = shape.T, S = shape.S, H = shape.H, K = shape.K, D = shape.D;
    const std::int64_t group = H / K, tiles = up(T, kQueries);
    // Heads are shared out in parts where they are few. How many parts depends on the shape alone.
    const std::int64_t parts =
        std::min(tiles, std::max<std::int64_t>(1, kPieces / std::max<std::int64_t>(1, B * K)));
    const std::int64_t part_size = S * D;
    std::vector<float> partial(2 * B * K * (parts - 1) * part_size);
    parallel(pool, B * K * parts, [&](std::int64_t piece) {
      thread_local std::vector<float> scratch;
      scratch.resize(backward_scratch(D));
      const std::int64_t part = piece % parts, n = piece / parts % K, b = piece / (parts * K);
      const std::int64_t key = (b * S * K + n) * D;
      // The first part adds to the results, the others to arrays of their own.
      float *to_k = grad_k + key, *to_v = grad_v + key;
      std::int64_t to_row = K * D;
      if (part) {
        to_k = partial.data() + 2 * ((b * K + n) * (parts - 1) + part - 1) * part_size;
        to_v = to_k + part_size;
        to_row = D;
      } else {
        for (std::int64_t s = 0; s < S; ++s)
          for (std::int64_t d = 0; d < D; d += kLanes) {
            store(to_k + s * to_row + d, Vec{});
            store(to_v + s * to_row + d, Vec{});
          }
      }
      for (std::int64_t head = n * group; head < (n + 1) * group; ++head)
        for (std::int64_t tile = part; tile < tiles; tile += parts) {
          const Rows rows(shape, tile * kQueries);
          const std::int64_t query = ((b * T + rows.start) * H + head) * D;
          backward_rows(shape, rows, q + query, k + key, v + key, out + query,
                        log + (b * H + head) * T + rows.start, grad + query, grad_q + query, to_k,
                        to_v, to_row, scratch.data());
        }
    });
    if (parts > 1)
      parallel(pool, B * K, [&](std::int64_t piece) {
        const std::int64_t n = piece % K, b = piece / K;
        for (std::int64_t part = 1; part < parts; ++part) {
          const float* from = partial.data() + 2 * (piece * (parts - 1) + part - 1) * part_size;
          for (std::int64_t s = 0; s < S; ++s)
            for (std::int64_t d = 0; d < D; d += kLanes) {
              float* to_k = grad_k + ((b * S + s) * K + n) * D + d;
              float* to_v = grad_v + ((b * S + s) * K + n) * D + d;
              store(to_k, load(to_k) + load(from + s * D + d));
              store(to_v, load(to_v) + load(from + part_size + s * D + d));
            }
        }
      });
  }
};

// Larger tiles read keys and values less often; smaller ones compute less in vain.
using Small = Tiles<64, 96>;
using Large = Tiles<128, 192>;
constexpr std::int64_t kLong = 1024;  // queries from which large tiles pay

Shape shape_of(Floats<4> q, Floats<4> k, float scale, std::int64_t left, std::int64_t right) {
  const auto queries = q.dimensions(), keys = k.dimensions();
  return {queries[0], queries[1], keys[1], queries[2], keys[2], queries[3], left, right, scale};
}

ffi::Error Forward(ffi::ThreadPool pool, float scale, std::int64_t left, std::int64_t right,
                   Floats<4> q, Floats<4> k, Floats<4> v, ffi::Result<Floats<4>> out,
                   ffi::Result<Floats<3>> log) {
  const Shape shape = shape_of(q, k, scale, left, right);
  const auto run = shape.T < kLong ? Small::forward : Large::forward;
  run(pool, shape, q.typed_data(), k.typed_data(), v.typed_data(), out->typed_data(),
      log->typed_data());
  return ffi::Error::Success();
}

ffi::Error Backward(ffi::ThreadPool pool, float scale, std::int64_t left, std::int64_t right,
                    Floats<4> q, Floats<4> k, Floats<4> v, Floats<4> out, Floats<3> log,
                    Floats<4> grad, ffi::Result<Floats<4>> grad_q, ffi::Result<Floats<4>> grad_k,
                    ffi::Result<Floats<4>> grad_v) {
  const Shape shape = shape_of(q, k, scale, left, right);
  const auto run = shape.T < kLong ? Small::backward : Large::backward;
  run(pool, shape, q.typed_data(), k.typed_data(), v.typed_data(), out.typed_data(),
      log.typed_data(), grad.typed_data(), grad_q->typed_data(), grad_k->typed_data(),
      grad_v->typed_data());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace fnml

XLA_FFI_DEFINE_HANDLER_SYMBOL(fnml_attention_forward, fnml::Forward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<float>("scale")
                                  .Attr<std::int64_t>("left")
                                  .Attr<std::int64_t>("right")
                                  .Arg<fnml::Floats<4>>()
                                  .Arg<fnml::Floats<4>>()
                                  .Arg<fnml::Floats<4>>()
                                  .Ret<fnml::Floats<4>>()
                                  .Ret<fnml::Floats<3>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(fnml_attention_backward, fnml::Backward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<float>("scale")
                                  .Attr<std::int64_t>("left")
                                  .Attr<std::int64_t>("right")
                                  .Arg<fnml::Floats<4>>()
                                  .Arg<fnml::Floats<4>>()
                                  .Arg<fnml::Floats<4>>()
                                  .Arg<fnml::Floats<4>>()
                                  .Arg<fnml::Floats<3>>()
                                  .Arg<fnml::Floats<4>>()
                                  .Ret<fnml::Floats<4>>()
                                  .Ret<fnml::Floats<4>>()
                                  .Ret<fnml::Floats<4>>());
