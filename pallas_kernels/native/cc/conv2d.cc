// Convolution of float32 images and its two gradients, as matrix products from registers.
//
// Nothing is copied side by side in memory: a tile of outputs reads the images where they lie. Each
// output, and each of the kernel's positions, meets only what is inside the image, so that zeros
// around it cost nothing. With `winograd`, for kernels of three rows and a stride of 1, the rows
// are mixed first: half the products, and a few times the rounding.
#include "gather.h"
#include "parallel.h"
#include "winograd.h"

namespace fnml {

template <int Rank>
using Images = xla::ffi::Buffer<xla::ffi::F32, Rank>;

namespace {

namespace ffi = xla::ffi;

constexpr std::int64_t kPixels = 512;  // at least so many share a panel that is packed
constexpr std::int64_t kPieces = 16;   // of one result; more, if they would be large
constexpr std::int64_t kDepth = 96;    // pixels of a block of the kernel's gradient

// One convolution. Names are those of its forward pass: x [B, H, W, C], y [B, Y, X, F].
struct Shape {
  std::int64_t B, H, W, C, Y, X, F, h, w, stride, top, left;
};

template <typename Dimensions>
Shape shape_of(const Dimensions& x, const Dimensions& kernel, const Dimensions& y,
               std::int64_t stride, std::int64_t top, std::int64_t left) {
  return {x[0], x[1], x[2], x[3], y[1], y[2], y[3], kernel[0], kernel[1], stride, top, left};
}

// Rows of x that row i of y meets: i * stride - pad + slot.
Reach forward_reach(std::int64_t i, std::int64_t window, std::int64_t stride, std::int64_t pad,
                    std::int64_t size) {
  const std::int64_t start = i * stride - pad, first = std::max<std::int64_t>(0, start);
  return {first, first - start, std::max<std::int64_t>(0, std::min(size, start + window) - first)};
}

// Rows of y that meet row i of x. The slots of the window are counted from its end.
Reach backward_reach(std::int64_t i, std::int64_t window, std::int64_t stride, std::int64_t pad,
                     std::int64_t size) {
  const std::int64_t last = (i + pad) / stride, start = i + pad - (window - 1);
  const std::int64_t first = start <= 0 ? 0 : (start + stride - 1) / stride;
  const std::int64_t stop = std::min(size - 1, last) + 1;
  return {first, first * stride - start, std::max<std::int64_t>(0, stop - first)};
}

// Compute all of the result. pack(start, count, wide, panel) writes the panel of `count` features
// from `start`, its rows filled up to `wide` numbers. With Winograd's form, `top` is how far before
// its own row a row of the result begins to see.
template <typename Pack>
void gather_all(ffi::ThreadPool& pool, const Gather& gather, std::int64_t batch, std::int64_t depth,
                bool winograd, std::int64_t top, const Pack& pack, const float* source,
                float* out) {
  const std::int64_t rows = gather.rows.size(), width = gather.cols.size();
  const std::int64_t lines = batch * (winograd ? (rows + kStrip - 1) / kStrip : rows);
  const std::int64_t panels = (gather.features + kFeatures - 1) / kFeatures;
  const std::int64_t pixels = winograd ? kStrip * width : width;
  const std::int64_t strips = strips_together(width);
  std::int64_t together = std::max((kPixels + pixels - 1) / pixels, lines * panels / kPieces);
  if (winograd) together = up(together, strips);
  const std::int64_t groups = (lines + together - 1) / together;
  parallel(pool, panels * groups, [&](std::int64_t piece) {
    thread_local Scratch scratch;
    const std::int64_t start = piece / groups * kFeatures, first = piece % groups * together;
    const std::int64_t stop = std::min(lines, first + together);
    const std::int64_t count = std::min(kFeatures, gather.features - start);
    const std::int64_t wide = up(count, kLanes);
    float* panel = scratch.take(depth * wide);
    pack(start, count, wide, panel);
    if (winograd) {
      const Gather line{1, gather.width, gather.channels, wide, gather.window,
                        1, {{0, 0, 1}},  gather.cols};
      winograd_strips(line, gather.height, rows, top, first, stop, strips, panel, source,
                      out + start, gather.features, count);
    } else {
      gather_kinds(kinds(gather, first, stop), source, panel, out + start, count);
    }
  });
}

ffi::Error Forward(ffi::ThreadPool pool, std::int64_t stride, std::int64_t top, std::int64_t left,
                   std::int64_t winograd, Images<4> x, Images<4> kernel, ffi::Result<Images<4>> y) {
  const Shape s = shape_of(x.dimensions(), kernel.dimensions(), y->dimensions(), stride, top, left);
  Gather gather{s.H, s.W, s.C, s.F, s.w, 1, {}, {}};
  for (std::int64_t i = 0; i < s.Y; ++i)
    gather.rows.push_back(forward_reach(i, s.h, stride, top, s.H));
  for (std::int64_t j = 0; j < s.X; ++j)
    gather.cols.push_back(forward_reach(j, s.w, stride, left, s.W));
  const float* taps = kernel.typed_data();
  const std::int64_t depth = s.h * s.w * s.C;
  const auto pack = [&](std::int64_t start, std::int64_t count, std::int64_t wide, float* panel) {
    for (std::int64_t k = 0; k < depth; ++k) {
      std::memcpy(panel + k * wide, taps + k * s.F + start, count * sizeof(float));
      std::fill(panel + k * wide + count, panel + (k + 1) * wide, 0.0f);
    }
  };
  gather_all(pool, gather, s.B, depth, winograd, top, pack, x.typed_data(), y->typed_data());
  return ffi::Error::Success();
}

ffi::Error InputGradient(ffi::ThreadPool pool, std::int64_t stride, std::int64_t top,
                         std::int64_t left, std::int64_t winograd, Images<4> kernel, Images<4> grad,
                         ffi::Result<Images<4>> out) {
  const Shape s =
      shape_of(out->dimensions(), kernel.dimensions(), grad.dimensions(), stride, top, left);
  Gather gather{s.Y, s.X, s.F, s.C, s.w, stride, {}, {}};
  for (std::int64_t i = 0; i < s.H; ++i)
    gather.rows.push_back(backward_reach(i, s.h, stride, top, s.Y));
  for (std::int64_t j = 0; j < s.W; ++j)
    gather.cols.push_back(backward_reach(j, s.w, stride, left, s.X));
  const float* taps = kernel.typed_data();
  const std::int64_t slots = s.h * s.w;
  const auto pack = [&](std::int64_t start, std::int64_t count, std::int64_t wide, float* panel) {
    for (std::int64_t slot = 0; slot < slots; ++slot) {
      const float* from = taps + ((slots - 1 - slot) * s.C + start) * s.F;
      float* to = panel + slot * s.F * wide;
      // Squares of the transpose that fit into the first cache.
      for (std::int64_t f = 0; f < s.F; f += kLanes)
        for (std::int64_t c = 0; c < wide; ++c)
          for (std::int64_t k = f; k < std::min(s.F, f + kLanes); ++k)
            to[k * wide + c] = c < count ? from[c * s.F + k] : 0.0f;
    }
  };
  gather_all(pool, gather, s.B, slots * s.F, winograd, s.h - 1 - top, pack, grad.typed_data(),
             out->typed_data());
  return ffi::Error::Success();
}

// Add what pixels [first, stop) of y give to `count` features of the kernel's gradient.
void add_pixels(const Shape& s, std::int64_t first, std::int64_t stop, std::int64_t count,
                const float* x, const float* grad, float* sum, std::int64_t row) {
  thread_local Scratch scratch;
  thread_local std::vector<Meeting> meetings;
  const std::int64_t wide = up(count, kLanes);
  float* block = scratch.take(kDepth * wide);
  for (std::int64_t start = first; start < stop; start += kDepth) {
    const std::int64_t pixels = std::min(kDepth, stop - start);
    for (std::int64_t n = 0; n < pixels; ++n) {
      std::memcpy(block + n * wide, grad + (start + n) * s.F, count * sizeof(float));
      std::fill(block + n * wide + count, block + (n + 1) * wide, 0.0f);
    }
    for (std::int64_t tap = 0; tap < s.h * s.w; ++tap) {
      meetings.clear();
      std::int64_t line = start / s.X, j = start % s.X;
      for (std::int64_t n = 0; n < pixels; ++n) {
        const std::int64_t across = line % s.Y * s.stride - s.top + tap / s.w;
        const std::int64_t along = j * s.stride - s.left + tap % s.w;
        if (across >= 0 && across < s.H && along >= 0 && along < s.W)
          meetings.push_back({((line / s.Y * s.H + across) * s.W + along) * s.C, n * wide});
        if (++j == s.X) j = 0, ++line;
      }
      gather_meetings(x, s.C, meetings, block, count, sum + tap * s.C * row, row);
    }
  }
}

// Add what strips [first, stop) of y give to `count` features of the kernel's gradient.
void add_strips(const Shape& s, std::int64_t first, std::int64_t stop, std::int64_t count,
                const float* x, const float* grad, float* sum, std::int64_t row) {
  thread_local Scratch scratch;
  const std::int64_t wide = up(count, kLanes), strips = (s.Y + kStrip - 1) / kStrip;
  const std::int64_t together = strips_together(s.X), depth = s.w * s.C * wide;
  const std::int64_t mixed = up(together * s.W * s.C, 16), slopes = together * s.X * wide;
  float* sums = scratch.take(kTaps * (depth + mixed + slopes));
  float *from = sums + kTaps * depth, *block = from + kTaps * mixed;
  std::fill_n(sums, kTaps * depth, 0.0f);
  std::vector<std::vector<Meeting>> meetings(s.w);
  for (std::int64_t start = first; start < stop; start += together) {
    const std::int64_t many = std::min(together, stop - start);
    for (std::int64_t n = 0; n < many; ++n) {
      const std::int64_t image = (start + n) / strips, i = (start + n) % strips * kStrip;
      mix_rows(x + image * s.H * s.W * s.C, i - s.top, s.H, s.W * s.C, from + n * s.W * s.C, mixed);
      for (std::int64_t j = 0; j < s.X; ++j)
        for (std::int64_t f = 0; f < wide; f += kLanes) {
          Vec g[kStrip], slope[kTaps];
          for (int r = 0; r < kStrip; ++r)
            g[r] = i + r < s.Y
                       ? load_some(grad + ((image * s.Y + i + r) * s.X + j) * s.F + f, count - f)
                       : Vec{};
          mix_result_back(g, slope);
          for (int k = 0; k < kTaps; ++k)
            store(block + k * slopes + (n * s.X + j) * wide + f, slope[k]);
        }
    }
    for (std::int64_t tap = 0; tap < s.w; ++tap) {
      meetings[tap].clear();
      for (std::int64_t n = 0; n < many; ++n)
        for (std::int64_t j = 0; j < s.X; ++j) {
          const std::int64_t along = j - s.left + tap;
          if (along >= 0 && along < s.W)
            meetings[tap].push_back({(n * s.W + along) * s.C, (n * s.X + j) * wide});
        }
    }
    for (int k = 0; k < kTaps; ++k)
      for (std::int64_t tap = 0; tap < s.w; ++tap)
        gather_meetings(from + k * mixed, s.C, meetings[tap], block + k * slopes, wide,
                        sums + k * depth + tap * s.C * wide, wide);
  }
  for (std::int64_t n = 0; n < s.w * s.C; ++n)
    for (std::int64_t f = 0; f < wide; f += kLanes) {
      Vec products[kTaps], taps[3];
      for (int k = 0; k < kTaps; ++k) products[k] = load(sums + k * depth + n * wide + f);
      mix_kernel_back(products, taps);
      for (int p = 0; p < 3; ++p) store(sum + (p * s.w * s.C + n) * row + f, taps[p]);
    }
}

// The gradient is added up in parts, [P, h, w, C, F rounded up to 16], or, without any, in place.
ffi::Error KernelGradient(ffi::ThreadPool pool, std::int64_t stride, std::int64_t top,
                          std::int64_t left, std::int64_t winograd, Images<4> x, Images<4> grad,
                          ffi::Result<Images<4>> out, ffi::Result<Images<5>> partial) {
  const Shape s = shape_of(x.dimensions(), out->dimensions(), grad.dimensions(), stride, top, left);
  const auto dims = partial->dimensions();
  const std::int64_t panels = (s.F + kFeatures - 1) / kFeatures;
  const std::int64_t all = s.B * (winograd ? (s.Y + kStrip - 1) / kStrip : s.Y * s.X);
  const bool in_place = dims[0] == 0;
  const std::int64_t parts = in_place ? 1 : dims[0], row = in_place ? s.F : dims[4];
  const std::int64_t rows = s.h * s.w * s.C, size = rows * row;
  const std::int64_t share =
      up((all + parts - 1) / parts, winograd ? strips_together(s.X) : kDepth);
  float *result = out->typed_data(), *sums = in_place ? result : partial->typed_data();
  parallel(pool, parts * panels, [&](std::int64_t piece) {
    const std::int64_t part = piece / panels, start = piece % panels * kFeatures;
    const std::int64_t count = std::min(kFeatures, s.F - start);
    float* sum = sums + part * size + start;
    for (std::int64_t k = 0; k < rows; ++k) std::fill_n(sum + k * row, up(count, kLanes), 0.0f);
    const std::int64_t first = std::min(all, part * share), stop = std::min(all, first + share);
    const auto add = winograd ? add_strips : add_pixels;
    add(s, first, stop, count, x.typed_data(), grad.typed_data() + start, sum, row);
  });
  if (in_place) return ffi::Error::Success();
  const std::int64_t some = std::max<std::int64_t>(1, 65536 / (row * parts));
  parallel(pool, (rows + some - 1) / some, [&](std::int64_t piece) {
    for (std::int64_t k = piece * some; k < std::min(rows, (piece + 1) * some); ++k)
      for (std::int64_t f = 0; f < s.F; f += kLanes) {
        Vec total{};
        for (std::int64_t part = 0; part < parts; ++part)
          total += load(sums + part * size + k * row + f);
        store_row<1>(result + k * s.F + f, &total, std::min<std::int64_t>(kLanes, s.F - f));
      }
  });
  return ffi::Error::Success();
}

// What all three functions are told, and the two arrays that each reads.
auto bound() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Attr<std::int64_t>("stride")
      .Attr<std::int64_t>("top")
      .Attr<std::int64_t>("left")
      .Attr<std::int64_t>("winograd")
      .Arg<Images<4>>()
      .Arg<Images<4>>()
      .Ret<Images<4>>();
}

}  // namespace
}  // namespace fnml

XLA_FFI_DEFINE_HANDLER_SYMBOL(fnml_conv2d_forward, fnml::Forward, fnml::bound());
XLA_FFI_DEFINE_HANDLER_SYMBOL(fnml_conv2d_input_gradient, fnml::InputGradient, fnml::bound());
XLA_FFI_DEFINE_HANDLER_SYMBOL(fnml_conv2d_kernel_gradient, fnml::KernelGradient,
                              fnml::bound().Ret<fnml::Images<5>>());
