// Products of float32 matrices for the linear layer: x w + bias, grad w^T, x^T grad.
#include "buffers.h"
#include "panels.h"
#include "tiled.h"

namespace fnml {
namespace {

ffi::Error multiply(ffi::ThreadPool& pool, bool tiles, const tiled::Products& products) {
  // Of tiles a narrow product would use a part only.
  const auto narrow = [](const Problem& p) {
    return std::min(p.columns, p.depth) <= panels::kPanel;
  };
  const bool any = std::any_of(products.parts.begin(), products.parts.end(), narrow);
  if (any && products.parts.size() > 1 && !products.summed) {
    for (const Problem& p : products.parts) multiply(pool, tiles, {{p}});
    return ffi::Error::Success();
  }
  if (tiles && !any && tiled::multiply(pool, products)) return ffi::Error::Success();
  bool adds = false;
  for (Problem p : products.parts) {
    p.adds = adds;
    panels::multiply(pool, p);
    adds = products.summed;
  }
  return ffi::Error::Success();
}

ffi::Error unfit() { return ffi::Error::InvalidArgument("linear got shapes that do not fit"); }

// The operands or results from some place on, as matrices and vectors of floats.
template <typename Buffers>
auto matrix(const Buffers& all, std::size_t i) {
  return all.template get<Floats<2>>(i);
}
template <typename Buffers>
auto numbers(const Buffers& all, std::size_t i) {
  return all.template get<Floats<1>>(i);
}

// y [N, F] = x [N, D] w [D, F] + bias for each of some layers that read the same x. The operands
// are the kernels and then the biases, which may have no numbers.
ffi::Error Forward(ffi::ThreadPool pool, bool tiles, Floats<2> x, ffi::RemainingArgs operands,
                   ffi::RemainingRets results) {
  const std::int64_t N = x.dimensions()[0], D = x.dimensions()[1];
  const std::size_t layers = results.size();
  if (operands.size() != 2 * layers) return unfit();
  tiled::Products products;
  for (std::size_t i = 0; i < layers; ++i) {
    const auto w = matrix(operands, i);
    const auto bias = numbers(operands, layers + i);
    auto y = matrix(results, i);
    if (!w || !bias || !y) return unfit();
    const std::int64_t F = w->dimensions()[1];
    products.parts.push_back({N,
                              F,
                              D,
                              {x.typed_data(), D, 1},
                              {w->typed_data(), F, 1},
                              bias->element_count() ? bias->typed_data() : nullptr,
                              (*y)->typed_data(),
                              false,
                              nullptr});
  }
  return multiply(pool, tiles, products);
}

// grad_x [N, D] = the sum of grad [N, F] w^T over layers. The operands are the kernels and then the
// gradients of the results.
ffi::Error InputGradient(ffi::ThreadPool pool, bool tiles, ffi::RemainingArgs operands,
                         ffi::Result<Floats<2>> grad_x) {
  const std::int64_t N = grad_x->dimensions()[0], D = grad_x->dimensions()[1];
  const std::size_t layers = operands.size() / 2;
  tiled::Products products;
  products.summed = true;
  for (std::size_t i = 0; i < layers; ++i) {
    const auto w = matrix(operands, i), grad = matrix(operands, layers + i);
    if (!w || !grad) return unfit();
    const std::int64_t F = w->dimensions()[1];
    products.parts.push_back({N,
                              D,
                              F,
                              {grad->typed_data(), F, 1},
                              {w->typed_data(), 1, F},
                              nullptr,
                              grad_x->typed_data(),
                              false,
                              nullptr});
  }
  return multiply(pool, tiles, products);
}

// grad_w [D, F] = x^T grad for each of some layers, and grad_bias = the sum of grad's rows, unless
// it has no numbers. The results are the kernels' gradients and then the biases'.
ffi::Error KernelGradient(ffi::ThreadPool pool, bool tiles, Floats<2> x,
                          ffi::RemainingArgs operands, ffi::RemainingRets results) {
  const std::int64_t N = x.dimensions()[0], D = x.dimensions()[1];
  const std::size_t layers = operands.size();
  if (results.size() != 2 * layers) return unfit();
  tiled::Products products;
  for (std::size_t i = 0; i < layers; ++i) {
    const auto grad = matrix(operands, i);
    auto grad_w = matrix(results, i);
    auto grad_bias = numbers(results, layers + i);
    if (!grad || !grad_w || !grad_bias) return unfit();
    const std::int64_t F = grad->dimensions()[1];
    products.parts.push_back(
        {D,
         F,
         N,
         {x.typed_data(), 1, D},
         {grad->typed_data(), F, 1},
         nullptr,
         (*grad_w)->typed_data(),
         true,
         (*grad_bias)->element_count() ? (*grad_bias)->typed_data() : nullptr});
  }
  return multiply(pool, tiles, products);
}

}  // namespace
}  // namespace fnml

XLA_FFI_DEFINE_HANDLER_SYMBOL(fnml_linear_forward, fnml::Forward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<bool>("tiles")
                                  .Arg<fnml::Floats<2>>()
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(fnml_linear_input_gradient, fnml::InputGradient,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<bool>("tiles")
                                  .RemainingArgs()
                                  .Ret<fnml::Floats<2>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(fnml_linear_kernel_gradient, fnml::KernelGradient,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<bool>("tiles")
                                  .Arg<fnml::Floats<2>>()
                                  .RemainingArgs()
                                  .RemainingRets());
