// The command line of both emulators: loops over random cases, and planted faults by name.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "../check/self_check.h"

namespace patch_kernels::emulate {

inline int option(int argc, char** argv, const char* name, int otherwise) {
  for (int i = 2; i + 1 < argc; ++i) {
    if (!strcmp(argv[i], name)) return atoi(argv[i + 1]);
  }
  return otherwise;
}

// run_one(random) draws and runs one case; it returns "" or which case went wrong and how.
template <class F>
int run_cases(int cases, uint32_t seed, F run_one) {
  std::mt19937 random(seed);
  int failed = 0;
  for (int i = 0; i < cases; ++i) {
    const std::string complaint = run_one(random);
    if (complaint.empty()) continue;
    ++failed;
    printf("FAILED %s\n", complaint.c_str());
  }
  printf("%d passed, %d failed\n", cases - failed, failed);
  return failed != 0;
}

// "", or which case went wrong and how. describe(c) is the family's.
template <class Case>
std::string outcome(const Case& c, const std::string& complaint) {
  return complaint.empty() ? "" : describe(c) + ": " + complaint;
}

// A card as the emulators see it: room for every kernel, few multiprocessors.
inline DeviceLimits emulated_device(Family family) {
  DeviceLimits device{};
  device.family = family;
  device.sm_count = 8;
  device.smem_bytes = 227 << 10;
  return device;
}

// The problems and plans that a GPU is checked with: run_one(self_check, plan, dtype).
template <class F>
int run_self_checks(Family family, F run_one) {
  struct One {
    const SelfCheck* check;
    LaunchPlan plan;
    DType dtype;
  };
  std::deque<SelfCheck> checks;
  std::vector<One> all;
  for (const DType dtype : PackedDtypes::kDTypes) {
    for (SelfCheck& check : self_checks(emulated_device(family), dtype)) {
      checks.push_back(std::move(check));
      for (const LaunchPlan& plan : checks.back().plans) all.push_back({&checks.back(), plan, dtype});
    }
  }
  size_t next = 0;
  return run_cases(static_cast<int>(all.size()), 0, [&](std::mt19937&) {
    const One& one = all[next++];
    return run_one(*one.check, one.plan, one.dtype);
  });
}

using Loop = int (*)(int cases, uint32_t seed);

// The exit code. run_fault(name, planted) returns 0 if the error is noticed.
template <class Planted, class F>
int run_command(int argc, char** argv, const std::map<std::string, Loop>& loops,
                const std::map<std::string, Planted>& faults, F run_fault) {
  const std::string command = argc > 1 ? argv[1] : "";
  const auto loop = loops.find(command);
  if (loop != loops.end()) return loop->second(option(argc, argv, "--cases", 100), option(argc, argv, "--seed", 0));
  if (command == "fault" && argc > 2) {
    const auto fault = faults.find(argv[2]);
    if (fault != faults.end()) return run_fault(fault->first.c_str(), fault->second);
    printf("no fault named %s; `faults` lists them\n", argv[2]);
    return 2;
  }
  if (command == "faults") {
    for (const auto& fault : faults) printf("%s\n", fault.first.c_str());
    return 0;
  }
  printf("usage:");
  for (const auto& entry : loops) printf(" %s [--cases N] [--seed S] |", entry.first.c_str());
  printf(" fault NAME | faults\n");
  return 2;
}

}  // namespace patch_kernels::emulate
