// Products of float32 matrices for the linear layer: x w + bias, grad w^T, x^T grad.
#include "buffers.h"
#include "panels.h"
#include "tiled.h"

namespace fnml {
namespace {

ffi::Error multiply(ffi::ThreadPool& pool, bool tiles, const Problem& p) {
  if (!tiles || !tiled::multiply(pool, {{p}})) panels::multiply(pool, p);
  return ffi::Error::Success();
}

// y [N, F] = x [N, D] w [D, F] + bias, which may have no numbers.
ffi::Error Forward(ffi::ThreadPool pool, bool tiles, Floats<2> x, Floats<2> w, Floats<1> bias,
                   ffi::Result<Floats<2>> y) {
  const std::int64_t N = x.dimensions()[0], D = x.dimensions()[1], F = w.dimensions()[1];
  return multiply(pool, tiles,
                  {N,
                   F,
                   D,
                   {x.typed_data(), D, 1},
                   {w.typed_data(), F, 1},
                   bias.element_count() ? bias.typed_data() : nullptr,
                   y->typed_data(),
                   false,
                   nullptr});
}

// grad_x [N, D] = grad [N, F] w^T
ffi::Error InputGradient(ffi::ThreadPool pool, bool tiles, Floats<2> w, Floats<2> grad,
                         ffi::Result<Floats<2>> grad_x) {
  const std::int64_t N = grad.dimensions()[0], D = w.dimensions()[0], F = w.dimensions()[1];
  return multiply(pool, tiles,
                  {N,
                   D,
                   F,
                   {grad.typed_data(), F, 1},
                   {w.typed_data(), 1, F},
                   nullptr,
                   grad_x->typed_data(),
                   false,
                   nullptr});
}

// grad_w [D, F] = x^T grad, and grad_bias = the sum of grad's rows, unless it has no numbers.
ffi::Error KernelGradient(ffi::ThreadPool pool, bool tiles, Floats<2> x, Floats<2> grad,
                          ffi::Result<Floats<2>> grad_w, ffi::Result<Floats<1>> grad_bias) {
  const std::int64_t N = x.dimensions()[0], D = x.dimensions()[1], F = grad.dimensions()[1];
  return multiply(pool, tiles,
                  {D,
                   F,
                   N,
                   {x.typed_data(), 1, D},
                   {grad.typed_data(), F, 1},
                   nullptr,
                   grad_w->typed_data(),
                   true,
                   grad_bias->element_count() ? grad_bias->typed_data() : nullptr});
}

}  // namespace
}  // namespace fnml

XLA_FFI_DEFINE_HANDLER_SYMBOL(fnml_linear_forward, fnml::Forward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<bool>("tiles")
                                  .Arg<fnml::Floats<2>>()
                                  .Arg<fnml::Floats<2>>()
                                  .Arg<fnml::Floats<1>>()
                                  .Ret<fnml::Floats<2>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(fnml_linear_input_gradient, fnml::InputGradient,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<bool>("tiles")
                                  .Arg<fnml::Floats<2>>()
                                  .Arg<fnml::Floats<2>>()
                                  .Ret<fnml::Floats<2>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(fnml_linear_kernel_gradient, fnml::KernelGradient,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<bool>("tiles")
                                  .Arg<fnml::Floats<2>>()
                                  .Arg<fnml::Floats<2>>()
                                  .Ret<fnml::Floats<2>>()
                                  .Ret<fnml::Floats<1>>());
