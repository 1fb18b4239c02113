// Rotary positions: pairs of a float32 head turned by their angles, in one pass over memory.
#include "parallel.h"
#include "span.h"

namespace fnml {
namespace {

namespace ffi = xla::ffi;

using Angles = ffi::Buffer<ffi::F32, 3>;  // [B or 1, T, D / 2]
using Heads = ffi::Buffer<ffi::F32, 4>;   // [B, T, H, D]

constexpr std::int64_t kPiece = 1 << 14;  // floats that are worth a piece of work

// Turn by the angles, or back by them: that is also how gradients go.
ffi::Error Rotate(ffi::ThreadPool pool, std::int64_t back, Heads x, Angles cos, Angles sin,
                  ffi::Result<Heads> out) {
  const std::int64_t T = x.dimensions()[1], H = x.dimensions()[2], half = x.dimensions()[3] / 2;
  const std::int64_t rows = x.dimensions()[0] * T, width = H * 2 * half;
  const std::int64_t angles = cos.dimensions()[0] * T;  // a multiple of T: rows take turns
  const std::int64_t share = std::max<std::int64_t>(1, kPiece / width);
  const float *xs = x.typed_data(), *all_cos = cos.typed_data(), *all_sin = sin.typed_data();
  const float sign = back ? -1.0f : 1.0f;
  float* outs = out->typed_data();
  parallel(pool, (rows + share - 1) / share, [&](std::int64_t piece) {
    for (std::int64_t row = piece * share; row < std::min(rows, (piece + 1) * share); ++row) {
      const float* c = all_cos + row % angles * half;
      const float* s = all_sin + row % angles * half;
      for (std::int64_t h = 0; h < H; ++h) {
        const float *low = xs + row * width + h * 2 * half, *high = low + half;
        float* at = outs + (low - xs);
        each_vector(half, [&](std::int64_t i, auto vector) {
          const Vec a = vector.load(low + i), b = vector.load(high + i);
          const Vec by = vector.load(c + i), across = vector.load(s + i) * sign;
          vector.store(at + i, a * by - b * across);
          vector.store(at + half + i, b * by + a * across);
        });
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace fnml

XLA_FFI_DEFINE_HANDLER_SYMBOL(fnml_rotate, fnml::Rotate,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<std::int64_t>("back")
                                  .Arg<fnml::Heads>()
                                  .Arg<fnml::Angles>()
                                  .Arg<fnml::Angles>()
                                  .Ret<fnml::Heads>());
