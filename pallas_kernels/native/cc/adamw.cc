// Adam and AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) over all arrays of a model, in one
// pass over memory.
#include <algorithm>
#include <cmath>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "buffers.h"
#include "parallel.h"
#include "span.h"

namespace fnml {

using Count = ffi::Buffer<ffi::S32, 0>;

namespace {

// Numbers of a piece of work: waking a thread takes longer than a piece half as large.
constexpr std::int64_t kPiece = 1 << 16;

struct Rule {
  float b1, rest1, b2, rest2, eps;     // rest: 1 - b
  float rate, mean_scale, square_scale;  // of this step
};

struct Array {
  const float* grad;
  float *param, *mean, *square;
  float decay;
  std::int64_t start, stop;  // among the numbers of all arrays
};

inline Vec root(Vec x) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xffff, x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// 1 / x, to a rounding: a division takes longer than all else here.
inline Vec inverse(Vec x) {
#if defined(__AVX512F__)
  const Vec near = _mm512_maskz_rcp14_ps(0xffff, x);
  // Newton's step would make NaN of infinity.
  return x > 1e30f ? Vec{} : near + near * (1.0f - x * near);
#else
  return 1.0f / x;
#endif
}

// Every number for itself, so that it does not matter where an array is cut.
void update(const Rule& rule, const Array& array, std::int64_t start, std::int64_t count) {
  const float* grads = array.grad + start;
  float *params = array.param + start, *means = array.mean + start, *squares = array.square + start;
  // In registers: what is written might be the rule, for all that the compiler knows.
  const Vec b1 = splat(rule.b1), rest1 = splat(rule.rest1), b2 = splat(rule.b2),
            rest2 = splat(rule.rest2), eps = splat(rule.eps), rate = splat(rule.rate),
            mean_scale = splat(rule.mean_scale), square_scale = splat(rule.square_scale),
            decay = splat(array.decay);
  each_vector(count, [=](std::int64_t i, auto lanes) {
    const Vec g = lanes.load(grads + i), p = lanes.load(params + i);
    const Vec m = b1 * lanes.load(means + i) + rest1 * g;
    const Vec s = b2 * lanes.load(squares + i) + rest2 * (g * g);
    const Vec move = m * mean_scale * inverse(root(s * square_scale) + eps);
    lanes.store(means + i, m);
    lanes.store(squares + i, s);
    lanes.store(params + i, p - rate * (move + decay * p));
  });
}

// Of `count` steps so far, this one included: the operands are the learning rate, the count, and for
// each array its gradient, parameters, and the means of its gradients and of their squares; the
// results are the last three, in the same memory.
ffi::Error AdamW(ffi::ThreadPool pool, Floats<0> rate, Count count,
                 ffi::RemainingArgs operands, ffi::RemainingRets results,
                 ffi::Span<const float> decay, double b1, double b2, double eps) {
  const std::size_t arrays = decay.size();
  if (operands.size() != 4 * arrays || results.size() != 3 * arrays)
    return ffi::Error::InvalidArgument("AdamW got other numbers of arrays and of decays");
  const double steps = *count.typed_data();
  const Rule rule{static_cast<float>(b1),
                  static_cast<float>(1 - b1),
                  static_cast<float>(b2),
                  static_cast<float>(1 - b2),
                  static_cast<float>(eps),
                  *rate.typed_data(),
                  static_cast<float>(1 / (1 - std::pow(b1, steps))),
                  static_cast<float>(1 / (1 - std::pow(b2, steps)))};
  std::vector<Array> all;
  std::int64_t total = 0;
  for (std::size_t i = 0; i < arrays; ++i) {
    const auto grad = operands.get<ffi::AnyBuffer>(4 * i);
    float* held[3];
    for (std::size_t k = 0; k < 3; ++k) {
      const auto from = operands.get<ffi::AnyBuffer>(4 * i + 1 + k);
      auto to = results.get<ffi::AnyBuffer>(3 * i + k);
      if (!grad || !from || !to || (*to)->untyped_data() != from->untyped_data() ||
          from->element_count() != grad->element_count())
        return ffi::Error::InvalidArgument("AdamW got an array that is not its result");
      held[k] = static_cast<float*>(from->untyped_data());
    }
    const std::int64_t size = grad->element_count();
    all.push_back({static_cast<const float*>(grad->untyped_data()), held[0], held[1], held[2],
                   decay.begin()[i], total, total + size});
    total += size;
  }
  parallel(pool, (total + kPiece - 1) / kPiece, [&](std::int64_t piece) {
    const std::int64_t start = piece * kPiece, stop = std::min(total, start + kPiece);
    for (const Array& array : all) {
      const std::int64_t from = std::max(start, array.start), to = std::min(stop, array.stop);
      if (from < to) update(rule, array, from - array.start, to - from);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace fnml

XLA_FFI_DEFINE_HANDLER_SYMBOL(fnml_adamw, fnml::AdamW,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<fnml::Floats<0>>()
                                  .Arg<fnml::Count>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<xla::ffi::Span<const float>>("decay")
                                  .Attr<double>("b1")
                                  .Attr<double>("b2")
                                  .Attr<double>("eps"));
