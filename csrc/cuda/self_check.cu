// The self-check of a kernel family: problems to the card, every plan, results back and compared.
#include <vector>

#include "../check/self_check.h"
#include "launch.h"
#include "self_check.h"
#include "tile_linear.h"
#include "tile_linear_sm90.h"

namespace patch_kernels::cuda {
namespace {

// A stream and memory of the check's own. On the user's stream it would wait for his work; were that the legacy stream,
// it would also fall in with every blocking stream, a captured one included. And memory of torch's allocator belongs to
// the order of the user's stream.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : end_(bytes) {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "self-check");
    const cudaError_t error = cudaMalloc(&base_, static_cast<size_t>(bytes));
    if (error != cudaSuccess) cudaStreamDestroy(stream_);
    check(error, "self-check");
  }
  ~Workspace() {
    cudaStreamSynchronize(stream_);  // an exception may have left kernels behind
    cudaFree(base_);
    cudaStreamDestroy(stream_);
  }
  Workspace(const Workspace&) = delete;

  cudaStream_t stream() const { return stream_; }
  int64_t used() const { return next_; }
  void give_back_to(int64_t used) { next_ = used; }
  void* take(int64_t bytes) {
    void* taken = static_cast<uint8_t*>(base_) + next_;
    next_ += (bytes + 255) / 256 * 256;
    if (next_ > end_) throw std::runtime_error("tile_linear: the self-check's workspace is too small");
    return taken;
  }
  template <class T>
  T* upload(const T* data, size_t count) {
    T* copy = static_cast<T*>(take(static_cast<int64_t>(count * sizeof(T))));
    check(cudaMemcpyAsync(copy, data, count * sizeof(T), cudaMemcpyHostToDevice, stream_), "self-check");
    return copy;
  }

 private:
  cudaStream_t stream_ = nullptr;
  void* base_ = nullptr;
  int64_t next_ = 0, end_;
};

constexpr int64_t kSelfCheckBytes = int64_t{48} << 20;  // x, two y and partial sums of the largest problem

// "" or what was wrong.
template <class Packed>
std::string run_self_check(const SelfCheck& self_check, Workspace& workspace) {
  constexpr DType dtype = Packed::kDType;
  const cudaStream_t stream = workspace.stream();
  using Problem = IntegerProblem<Element<Packed>>;
  Problem problem(self_check.sizes);
  problem.cut(self_check.layers);
  if (self_check.own_tokens) problem.send_tokens();
  workspace.give_back_to(0);
  typename Problem::Places on_card{workspace.upload(problem.x.data, problem.x.size),
                                   workspace.upload(problem.payload->data, problem.payload->size),
                                   workspace.upload(problem.bias.data(), problem.bias.size()),
                                   nullptr,
                                   {}};
  for (const auto& part : problem.parts) {
    on_card.words.push_back(workspace.upload(part.words.data(), part.words.size()));
  }
  const size_t y_bytes = problem.y.size * kValueBytes;
  uint16_t* y[2];  // of two launches, the second of which may overlap the first
  for (uint16_t*& each : y) each = static_cast<uint16_t*>(workspace.take(static_cast<int64_t>(y_bytes)));
  const int64_t used = workspace.used();
  for (LaunchPlan plan : self_check.plans) {
    workspace.give_back_to(used);
    on_card.y = y[0];
    auto* partials = static_cast<float*>(workspace.take(4 * gemm_partial_floats(problem.view(on_card), plan)));
    plan.overlaps_previous = true;
    problem.poison();
    for (uint16_t* each : y) {
      check(cudaMemcpyAsync(each, problem.y.data, y_bytes, cudaMemcpyHostToDevice, stream), "self-check");
    }
    for (uint16_t* each : y) {
      on_card.y = each;
      GemmProblem p = problem.view(on_card);
      p.cut_by_pair = self_check.cut_by_pair;
      run_gemm(p, plan, dtype, partials, stream);
    }
    std::string complaint;
    for (uint16_t* each : y) {
      check(cudaMemcpyAsync(problem.y.data, each, y_bytes, cudaMemcpyDeviceToHost, stream), "self-check");
      check(cudaStreamSynchronize(stream), "self-check");
      if (complaint.empty()) complaint = problem.complaint();
    }
    if (!complaint.empty()) {
      return std::string(Packed::kShortName) + ", " + std::to_string(plan.bn) + " tokens a CTA, " +
             std::to_string(plan.token_ctas) + "x" + std::to_string(plan.row_ctas) + "x" + std::to_string(plan.splits) +
             " CTAs, " + std::to_string(problem.tile_cols) + " tile columns, " + std::to_string(problem.parts.size()) +
             " layers: " + complaint;
    }
  }
  return "";
}

}  // namespace

CardCheck check_family(DeviceLimits& limits) {
  CardCheck result{false, ""};
  try {
    const RelaxedCapture relaxed;
    Workspace workspace(kSelfCheckBytes);
    result.ran = true;
    if (limits.family == Family::kSm90) {
      sm90_count_clusters(limits.clusters);
      limits.clusters_known = true;
    }
    result.complaint = family_complaint(limits);
    for_each_packed([&](auto packed) {
      for (const SelfCheck& self_check : self_checks(limits, decltype(packed)::kDType)) {
        if (result.complaint.empty()) result.complaint = run_self_check<decltype(packed)>(self_check, workspace);
      }
    });
  } catch (const std::exception& error) {
    result.complaint = error.what();
  }
  return result;
}

}  // namespace patch_kernels::cuda
