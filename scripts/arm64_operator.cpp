// Writes rows into a cache: ExecuTorch's operator llama::update_cache_with_indices for processors that cannot load the
// Linux package's own library of LLM operators, which is compiled for ARMv8.1.
#include <cstdint>
#include <cstring>

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>

namespace {

using executorch::aten::Tensor;
using executorch::runtime::KernelRuntimeContext;

// cache[b, indices[b, t]] = value[b, t]; cache [B, S, H, D], value [B, T, H, D], indices [B, T] int64, all contiguous.
Tensor& update_cache_with_indices_out(
    KernelRuntimeContext& context, const Tensor& value, Tensor& cache, int64_t, const Tensor& indices, Tensor& out) {
  const int64_t batches = value.size(0), rows = value.size(1), slots = cache.size(1);
  const size_t bytes = value.size(2) * value.size(3) * value.element_size();
  const auto* index = indices.const_data_ptr<int64_t>();
  const auto* source = static_cast<const char*>(value.const_data_ptr());
  auto* target = static_cast<char*>(cache.mutable_data_ptr());
  for (int64_t row = 0; row < batches * rows; ++row) {
    ET_KERNEL_CHECK(context, 0 <= index[row] && index[row] < slots, InvalidArgument, out);
    std::memcpy(target + (row / rows * slots + index[row]) * bytes, source + row * bytes, bytes);
  }
  return out;
}

EXECUTORCH_LIBRARY(llama, "update_cache_with_indices.out", update_cache_with_indices_out);

}  // namespace
