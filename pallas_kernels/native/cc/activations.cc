// SwiGLU and GELU over float32 arrays of any shape, each direction in one pass over memory.
#include "parallel.h"
#include "span.h"

namespace fnml {
namespace {

namespace ffi = xla::ffi;

using Floats = ffi::Buffer<ffi::F32>;

constexpr std::int64_t kPiece = 1 << 14;  // floats; three arrays of it fit into a core's cache

// Call work(i, vector) for every vector of `count` floats, on all threads.
template <typename Work>
ffi::Error over(ffi::ThreadPool& pool, std::int64_t count, const Work& work) {
  parallel(pool, (count + kPiece - 1) / kPiece, [&](std::int64_t piece) {
    const std::int64_t start = piece * kPiece;
    each_vector(std::min(kPiece, count - start),
                [&](std::int64_t i, auto vector) { work(start + i, vector); });
  });
  return ffi::Error::Success();
}

ffi::Error SwigluForward(ffi::ThreadPool pool, Floats gate, Floats up, ffi::Result<Floats> out) {
  const float *gates = gate.typed_data(), *ups = up.typed_data();
  float* outs = out->typed_data();
  return over(pool, gate.element_count(), [=](std::int64_t i, auto vector) {
    const Vec x = vector.load(gates + i);
    vector.store(outs + i, x * sigmoid(x) * vector.load(ups + i));
  });
}

ffi::Error SwigluBackward(ffi::ThreadPool pool, Floats gate, Floats up, Floats grad,
                          ffi::Result<Floats> grad_gate, ffi::Result<Floats> grad_up) {
  const float *gates = gate.typed_data(), *ups = up.typed_data(), *grads = grad.typed_data();
  float *grad_gates = grad_gate->typed_data(), *grad_ups = grad_up->typed_data();
  return over(pool, gate.element_count(), [=](std::int64_t i, auto vector) {
    const Vec x = vector.load(gates + i), slope = vector.load(grads + i);
    const Vec share = sigmoid(x), value = x * share;
    vector.store(grad_gates + i, slope * vector.load(ups + i) * (share + value * (1.0f - share)));
    vector.store(grad_ups + i, slope * value);
  });
}

constexpr float kCubic = 0.044715f;
constexpr float kSteep = 1.59576912f;  // sqrt(8 / pi)

// The sigmoid that gelu multiplies x by.
inline Vec gelu_share(Vec x) { return sigmoid(kSteep * (x + kCubic * (x * x * x))); }

ffi::Error GeluForward(ffi::ThreadPool pool, Floats x, ffi::Result<Floats> out) {
  const float* xs = x.typed_data();
  float* outs = out->typed_data();
  return over(pool, x.element_count(), [=](std::int64_t i, auto vector) {
    const Vec at = vector.load(xs + i);
    vector.store(outs + i, at * gelu_share(at));
  });
}

ffi::Error GeluBackward(ffi::ThreadPool pool, Floats x, Floats grad, ffi::Result<Floats> grad_x) {
  const float *xs = x.typed_data(), *grads = grad.typed_data();
  float* outs = grad_x->typed_data();
  return over(pool, x.element_count(), [=](std::int64_t i, auto vector) {
    const Vec at = vector.load(xs + i), share = gelu_share(at);
    const Vec inner = kSteep * (1.0f + 3.0f * kCubic * (at * at));
    const Vec slope = share + at * share * (1.0f - share) * inner;
    vector.store(outs + i, vector.load(grads + i) * slope);
  });
}

}  // namespace
}  // namespace fnml

XLA_FFI_DEFINE_HANDLER_SYMBOL(fnml_swiglu_forward, fnml::SwigluForward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<fnml::Floats>()
                                  .Arg<fnml::Floats>()
                                  .Ret<fnml::Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(fnml_swiglu_backward, fnml::SwigluBackward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<fnml::Floats>()
                                  .Arg<fnml::Floats>()
                                  .Arg<fnml::Floats>()
                                  .Ret<fnml::Floats>()
                                  .Ret<fnml::Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    fnml_gelu_forward, fnml::GeluForward,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().Arg<fnml::Floats>().Ret<fnml::Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(fnml_gelu_backward, fnml::GeluBackward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<fnml::Floats>()
                                  .Arg<fnml::Floats>()
                                  .Ret<fnml::Floats>());
