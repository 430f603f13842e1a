// Benchmark peer: the 2:4 GEMM that CUTLASS builds for sm_90 out of the box (bf16, fp32 accumulation, 128x128x128 tile,
// automatic schedules), behind a C ABI that benchmarks/rivals/peer_cutlass.py loads. Not part of the product.
//
// The sparse operand must be A, so it computes y^T = W x^T: W is (rows x cols) row-major, x^T is (cols x tokens)
// column-major, and y^T column-major is y (tokens x rows) row-major. CUTLASS prunes by value: a kept weight must not
// be zero. All functions return 0 or the cutlass::Status that failed.
#include <cstdint>

#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/transform/device/transform_universal_adapter.hpp"
#include "cutlass/transform/kernel/sparse_gemm_compressor.hpp"
#include "cutlass/util/packed_stride.hpp"

namespace {
using Element = cutlass::bfloat16_t;
using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;
using Tile = cute::Shape<cute::_128, cute::_128, cute::_128>;
using Cluster = cute::Shape<cute::_1, cute::_2, cute::_1>;
using Problem = cute::Shape<int, int, int, int>;
constexpr int kAlignment = 8;  // elements of 16 bytes

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Tile, Cluster,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, ColumnMajor, kAlignment, Element, ColumnMajor,
    kAlignment, cutlass::epilogue::collective::EpilogueScheduleAuto>::CollectiveOp;

using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Element, RowMajor, kAlignment, Element, ColumnMajor,
    kAlignment, float, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
    cutlass::gemm::collective::KernelScheduleAuto>::CollectiveOp;

using Kernel = cutlass::gemm::kernel::GemmUniversal<Problem, Mainloop, Epilogue>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
using SparseConfig = typename Mainloop::SparseConfig;
using StrideA = cutlass::gemm::TagToStrideA_t<RowMajor>;
using CompressorSizes =
    cutlass::transform::kernel::StructuredSparseCompressorUtility<Problem, Element, RowMajor, SparseConfig>;
using Compressor =
    cutlass::transform::device::TransformUniversalAdapter<cutlass::transform::kernel::StructuredSparseCompressor<
        Problem, Element, RowMajor, SparseConfig, cutlass::arch::Sm90>>;

StrideA weight_stride(int rows, int cols) {
  return cutlass::make_cute_packed_stride(StrideA{}, cute::make_shape(rows, cols, 1));
}

typename Gemm::Arguments gemm_arguments(const void* values, const void* metadata, const void* x, void* y, int rows,
                                        int cols, int tokens) {
  const Problem problem{rows, tokens, cols, 1};
  const CompressorSizes sizes(problem, weight_stride(rows, cols));
  const auto x_stride = cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, cute::make_shape(tokens, cols, 1));
  const auto y_stride = cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, cute::make_shape(rows, tokens, 1));
  return {cutlass::gemm::GemmUniversalMode::kGemm,
          problem,
          {static_cast<const Element*>(values), sizes.fill_layoutA_from_compressor(), static_cast<const Element*>(x),
           x_stride, static_cast<const typename Mainloop::ElementE*>(metadata), sizes.fill_layoutE_from_compressor()},
          {{1.0f, 0.0f}, nullptr, {}, static_cast<Element*>(y), y_stride}};
}
}  // namespace

#define PEER_API extern "C" __attribute__((visibility("default")))

PEER_API void peer_sizes(int rows, int cols, int64_t* values_bytes, int64_t* metadata_bytes) {
  const CompressorSizes sizes(Problem{rows, 128, cols, 1}, weight_stride(rows, cols));
  *values_bytes = static_cast<int64_t>(sizes.get_compressed_tensor_A_bytes());
  *metadata_bytes = static_cast<int64_t>(sizes.get_tensor_E_bytes());
}

PEER_API int peer_compress(const void* weight, void* values, void* metadata, int rows, int cols, cudaStream_t stream) {
  const typename Compressor::Arguments arguments{
      Problem{rows, 128, cols, 1},
      {static_cast<const Element*>(weight), weight_stride(rows, cols), static_cast<Element*>(values),
       static_cast<typename Mainloop::ElementE*>(metadata)},
      {}};
  Compressor compressor;
  cutlass::Status status = compressor.can_implement(arguments);
  if (status == cutlass::Status::kSuccess) status = compressor.initialize(arguments, nullptr, stream);
  if (status == cutlass::Status::kSuccess) status = compressor.run(stream);
  return static_cast<int>(status);
}

PEER_API int64_t peer_workspace_bytes(int rows, int cols, int tokens) {
  return static_cast<int64_t>(
      Gemm::get_workspace_size(gemm_arguments(nullptr, nullptr, nullptr, nullptr, rows, cols, tokens)));
}

PEER_API int peer_run(const void* values, const void* metadata, const void* x, void* y, int rows, int cols, int tokens,
                      void* workspace, cudaStream_t stream) {
  const typename Gemm::Arguments arguments = gemm_arguments(values, metadata, x, y, rows, cols, tokens);
  Gemm gemm;
  cutlass::Status status = Gemm::can_implement(arguments);
  if (status == cutlass::Status::kSuccess) status = gemm.initialize(arguments, workspace, stream);
  if (status == cutlass::Status::kSuccess) status = gemm.run(stream);
  return static_cast<int>(status);
}
