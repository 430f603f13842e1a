// The GEMM of a CUDA device: which kernel family it gets, whether that family was seen working there, and running it.
// No torch here: the binding brings memory and stream.
#pragma once

#include <string>
#include <vector>

#include "../gemm/problem.h"
#include "../ops.h"
#include "self_check.h"

namespace patch_kernels::cuda {

enum class GemmState {
  kUnchecked,  // no call yet, or the check could not run; see `reason`
  kWorks,      // the self-check's results were exact
  kDisabled,   // switched off, failed the self-check, or no kernel for this GPU; see `reason`
};

struct GemmStatus {
  Family family;
  GemmState state;
  std::string reason;  // why it is disabled, or why this is not the best family for the card
};

// Never synchronises and never launches.
GemmStatus gemm_status(int device);

// The device's limits, read once. Must not be called for the first time while a stream is being captured.
const DeviceLimits& device_limits(int device);

// The limits of a device whose family may be used on this stream, or null: unpack. The first call on a device runs the
// self-check: small integer problems through every kernel of the family, compared bit for bit; where one differs, the
// next family's. While this stream is captured nothing is checked, and an unchecked family is not used. From then on a
// call is one atomic load.
const DeviceLimits* usable_device(int device, void* stream);

// No better family than this one on a device, for a reason: another process has seen the better ones fail. Returns
// false where the device was checked before.
bool limit_family(int device, Family best, const std::string& reason);

// The self-check of one family, by a process that does nothing else: it does not touch the state above.
CardCheck check_card(int device, Family family);

// Whole numbers of the device on the host, once all before them on the stream is done. Throws while it is captured:
// what is decided by them could not be decided again when a graph is replayed.
std::vector<int64_t> read_on_host(const int64_t* numbers, int64_t count, void* stream, const char* op);
// The other way; the host's memory is free afterwards.
void write_on_device(const std::vector<int64_t>& numbers, int64_t* to, void* stream, const char* op);

// fp32 numbers of workspace that run_gemm needs; they need no initialisation.
int64_t gemm_partial_floats(const GemmProblem& problem, const LaunchPlan& plan);

// Launches a plan on a stream. Items and the shape of clusters are the plan's; layers are placed one after the other.
void run_gemm(GemmProblem problem, const LaunchPlan& plan, DType dtype, float* partials, void* stream);

}  // namespace patch_kernels::cuda
