// The threads that run the kernels.
//
// OpenMP's threads wait for one another after every loop, and spin meanwhile. Beside another busy
// process a thread may be stopped for milliseconds, while the others occupy the processors that it
// needs. Here a thread waits only for work that another thread has begun: a thread that comes late
// finds less to do, or nothing. A waiting thread spins for as long as others usually take, then
// sleeps.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <limits>
#include <memory>
#include <mutex>

namespace ppo_fast {

// Lets threads wait for a change that other threads make.
class Waiting {
 public:
  // Waits until ready() is true. It may read only atomics.
  template <typename Ready>
  void until(Ready ready) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 16; ++i) {
        if (ready()) return;
        relax();
      }
    } while (std::chrono::steady_clock::now() < end);
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleepers_;  // before ready() is called again: see wake
    changed_.wait(lock, ready);
    --sleepers_;
  }

  // Wakes up to `count` sleeping threads; to be called after the change.
  void wake(int count = std::numeric_limits<int>::max()) {
    if (sleepers_ == 0) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    for (int i = std::min<int>(count, sleepers_); i > 0; --i) changed_.notify_one();
  }

 private:
  static constexpr std::chrono::microseconds kSpin{50};

  static void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

// Work that several threads can do together. A job may outlive its caller: then no work is left,
// and work() must touch nothing but the job itself.
class Job {
 public:
  virtual ~Job() = default;
  virtual void work() = 0;  // does the work that no thread has begun yet
  virtual void wait() = 0;  // until all work that was begun has ended
};

// Does all of a job in this thread and in up to `threads` - 1 others, as they become free.
void run(const std::shared_ptr<Job>& job, int threads);

}  // namespace ppo_fast
