// Threads of the emulated machines: how one of them fails, and how they wait for each other.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <stdexcept>

namespace patch_kernels::emulate {

class Failure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

inline void require(bool ok, const char* what) {
  if (!ok) throw Failure(what);
}

// Ends waits that nothing else will: those of threads whose partner failed, and deadlocks.
struct Watchdog {
  std::chrono::seconds patience{20};
  std::atomic<bool> stop{false};  // set by a thread that failed

  template <class F>
  void wait(std::unique_lock<std::mutex>& lock, std::condition_variable& condition, F is_done) const {
    const auto deadline = std::chrono::steady_clock::now() + patience;
    while (!is_done()) {
      require(!stop, "stopped because another thread failed");
      require(std::chrono::steady_clock::now() < deadline, "deadlock: a barrier was never completed");
      condition.wait_for(lock, std::chrono::milliseconds(20));
    }
  }
};

// A barrier among a fixed number of threads, any number of times.
class Rendezvous {
 public:
  explicit Rendezvous(int threads) : threads_(threads) {}

  // The last to come runs `alone` before the others go on.
  template <class F>
  void sync(const Watchdog& watchdog, F alone) {
    std::unique_lock<std::mutex> lock(mutex_);
    const int64_t round = round_;
    if (++arrived_ == threads_) {
      alone();
      arrived_ = 0;
      ++round_;
      condition_.notify_all();
    } else {
      watchdog.wait(lock, condition_, [&] { return round_ != round; });
    }
  }
  void sync(const Watchdog& watchdog) {
    sync(watchdog, [] {});
  }

 private:
  const int threads_;
  int arrived_ = 0;
  int64_t round_ = 0;
  std::mutex mutex_;
  std::condition_variable condition_;
};

}  // namespace patch_kernels::emulate
