#include "base/threads.hpp"

#include <cstdint>
#include <system_error>
#include <thread>

#if __has_include(<pthread.h>)
#include <pthread.h>
#endif

namespace ppo_fast {

namespace {

// Threads that sleep until there is a job. They run until the process ends, so the pool is never
// destroyed.
class Pool {
 public:
  void run(const std::shared_ptr<Job>& job, int helpers) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      start(helpers);
      job_ = job;
      seats_ = helpers;
      ++jobs_;
    }
    waiting_.wake(helpers);
  }

 private:
  void start(int helpers) {
    try {
      for (; started_ < helpers; ++started_) std::thread([this] { help(); }).detach();
    } catch (const std::system_error&) {  // the system gives no more threads: fewer do the work
    }
  }

  void help() {
    for (std::uint64_t seen = 0;;) {
      waiting_.until([&] { return jobs_ != seen; });
      std::shared_ptr<Job> job;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        seen = jobs_;
        if (seats_ > 0) --seats_, job = job_;
      }
      if (job != nullptr) job->work();
    }
  }

  Waiting waiting_;
  std::mutex mutex_;  // guards what follows
  std::atomic<std::uint64_t> jobs_{0};
  std::shared_ptr<Job> job_;  // the newest
  int seats_ = 0;             // helpers that it still wants
  int started_ = 0;
};

std::atomic<Pool*> pool = [] {
#if __has_include(<pthread.h>)
  // A forked process has no threads but the one that forked.
  pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
#endif
  return new Pool;
}();

}  // namespace

void run(const std::shared_ptr<Job>& job, int threads) {
  if (threads > 1) pool.load()->run(job, threads - 1);
  job->work();
  job->wait();
}

}  // namespace ppo_fast
