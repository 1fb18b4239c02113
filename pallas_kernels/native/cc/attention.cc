// Attention over float32 arrays, in tiles of scores that stay in the cache.
#include "attention_tiles.h"
#include "buffers.h"
#include "product.h"
#include "scores.h"

namespace fnml {

namespace {

// With products on vectors: at most kKeys keys at a time, a multiple of the rows of a product's
// tiles. Scores being transposed, K and V are read as they lie.
template <int kQueries, int kKeys>
struct Tiles {
  using Part = Scores<kQueries>;
  using Rows = typename Part::Rows;

  // Keys of one tile: about the same for all of them.
  static std::int64_t step(const Rows& rows) {
    const std::int64_t keys = rows.stop - rows.first;
    const std::int64_t tiles = std::max<std::int64_t>(1, up(keys, kKeys));
    return 12 * up(up(keys, tiles), 12);
  }

  static void forward_rows(const Shape& shape, const Rows& rows, const float* q, const float* k,
                           const float* v, float* out, float* log, float* scratch) {
    const std::int64_t D = shape.D, key_row = shape.K * D, row = shape.H * D;
    float* turned = scratch;                  // [D, kQueries]
    float* scores = turned + D * kQueries;    // [kKeys, kQueries]
    float* sums = scores + kKeys * kQueries;  // [kQueries, D]
    Part::turn(q, row, rows.count, D, shape.scale * kLog2E, turned);
    typename Part::Softmax softmax;
    bool begun = false;
    const std::int64_t step = Tiles::step(rows);
    for (std::int64_t key = rows.first; key < rows.stop; key += step) {
      const std::int64_t keys = std::min(step, rows.stop - key);
      product(keys, kQueries, D, {k + key * key_row, key_row, 1}, turned, kQueries, scores,
              kQueries, false);
      Part::hide(shape, rows, key, keys, scores);
      softmax.weigh(keys, scores);
      if (begun)
        for (std::int64_t i = 0; i < kQueries; ++i)
          for (std::int64_t d = 0; d < D; d += kLanes)
            store(sums + i * D + d, load(sums + i * D + d) * softmax.shrink[i]);
      product(kQueries, D, keys, {scores, 1, kQueries}, v + key * key_row, key_row, sums, D, begun);
      begun = true;
    }
    for (std::int64_t i = 0; i < rows.count; ++i) {
      const bool alone = softmax.alone(i);
      const float share = softmax.share(i);
      for (std::int64_t d = 0; d < D; d += kLanes)
        store(out + i * row + d, alone ? Vec{} : load(sums + i * D + d) * share);
      log[i] = softmax.log(i);
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
    Part::turn(q, row, rows.count, D, shape.scale * kLog2E, turned);
    Part::turn(grad, row, rows.count, D, 1.0f, turned_grad);
    const typename Part::Slopes softmax(rows, row, D, log, out, grad);
    bool begun = false;
    const std::int64_t step = Tiles::step(rows);
    for (std::int64_t key = rows.first; key < rows.stop; key += step) {
      const std::int64_t keys = std::min(step, rows.stop - key);
      const std::int64_t at = key * key_row;
      product(keys, kQueries, D, {k + at, key_row, 1}, turned, kQueries, weights, kQueries, false);
      Part::hide(shape, rows, key, keys, weights);
      product(keys, kQueries, D, {v + at, key_row, 1}, turned_grad, kQueries, slopes, kQueries,
              false);
      softmax.weigh(keys, shape.scale, weights, slopes);
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
    const std::int64_t T = shape.T, S = shape.S, H = shape.H, K = shape.K, D = shape.D;
    const std::int64_t group = H / K, tiles = up(T, kQueries);
    backward_parts(pool, shape, tiles, grad_k, grad_v,
                   [&](std::int64_t b, std::int64_t n, std::int64_t part, std::int64_t parts,
                       float* to_k, float* to_v, std::int64_t to_row, bool) {
                     thread_local std::vector<float> scratch;
                     scratch.resize(backward_scratch(D));
                     for (std::int64_t s = 0; s < S; ++s)
                       for (std::int64_t d = 0; d < D; d += kLanes) {
                         store(to_k + s * to_row + d, Vec{});
                         store(to_v + s * to_row + d, Vec{});
                       }
                     const std::int64_t key = (b * S * K + n) * D;
                     for (std::int64_t head = n * group; head < (n + 1) * group; ++head)
                       for (std::int64_t tile = part; tile < tiles; tile += parts) {
                         const Rows rows(shape, tile * kQueries);
                         const std::int64_t query = ((b * T + rows.start) * H + head) * D;
                         backward_rows(shape, rows, q + query, k + key, v + key, out + query,
                                       log + (b * H + head) * T + rows.start, grad + query,
                                       grad_q + query, to_k, to_v, to_row, scratch.data());
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

ffi::Error Forward(ffi::ThreadPool pool, bool tiles, float scale, std::int64_t left,
                   std::int64_t right, Floats<4> q, Floats<4> k, Floats<4> v,
                   ffi::Result<Floats<4>> out, ffi::Result<Floats<3>> log) {
  const Shape shape = shape_of(q, k, scale, left, right);
  if (tiles && tiled::attend(pool, shape, q.typed_data(), k.typed_data(), v.typed_data(),
                             out->typed_data(), log->typed_data()))
    return ffi::Error::Success();
  const auto run = shape.T < kLong ? Small::forward : Large::forward;
  run(pool, shape, q.typed_data(), k.typed_data(), v.typed_data(), out->typed_data(),
      log->typed_data());
  return ffi::Error::Success();
}

ffi::Error Backward(ffi::ThreadPool pool, bool tiles, float scale, std::int64_t left,
                    std::int64_t right, Floats<4> q, Floats<4> k, Floats<4> v, Floats<4> out,
                    Floats<3> log, Floats<4> grad, ffi::Result<Floats<4>> grad_q,
                    ffi::Result<Floats<4>> grad_k, ffi::Result<Floats<4>> grad_v) {
  const Shape shape = shape_of(q, k, scale, left, right);
  if (tiles &&
      tiled::differentiate(pool, shape, q.typed_data(), k.typed_data(), v.typed_data(),
                           out.typed_data(), log.typed_data(), grad.typed_data(),
                           grad_q->typed_data(), grad_k->typed_data(), grad_v->typed_data()))
    return ffi::Error::Success();
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
                                  .Attr<bool>("tiles")
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
                                  .Attr<bool>("tiles")
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
