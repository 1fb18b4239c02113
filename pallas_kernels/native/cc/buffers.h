// The arrays that XLA hands over.
#pragma once

#include "xla/ffi/api/ffi.h"

namespace fnml {

namespace ffi = xla::ffi;

template <int Rank>
using Floats = ffi::Buffer<ffi::F32, Rank>;

}  // namespace fnml
