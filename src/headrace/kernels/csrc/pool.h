// One pool of threads for all kernels.
//
// The calling thread works too, and takes whatever no other thread has begun: a worker that the system has put aside (a
// neighbour on the same cores, a fork that left the workers behind) holds a call up by at most the one task it is in.
// Between calls workers spin for a moment, so that the next kernel of a step finds them awake, then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <limits>
#include <memory>
#include <vector>

namespace headrace {

class Pool {
   public:
    // The only pool. It is never destroyed: at exit the system takes its threads.
    static Pool& get();

    // Threads that work on a call, the caller's included. Waits for the call in hand: what it began with, it ends with.
    // Throws invalid_argument below 1, and runtime_error where the system starts no more; the pool is then what it was.
    void resize(int threads);
    // May change at any time: what is laid out by thread hands the number that it was made for to `run`.
    int threads() const { return threads_.load(std::memory_order_relaxed); }

    // Call function(index, thread) for every index below count, thread, below `most`, telling apart what runs at the same
    // time. Returns when all are done; then throws the first exception that one of them threw. A second call at the same
    // time, from another thread, works alone.
    template <class Function>
    void run(int64_t count, const Function& function, int64_t most = std::numeric_limits<int>::max()) {
        run_any(count, (int)most, [](const void* f, int64_t index, int thread) { (*(const Function*)f)(index, thread); }, &function);
    }

    // Memory that will probably be read next: workers fetch it into the caches while they have nothing to do.
    void expect(const void* data, int64_t bytes);

   private:
    using Call = void (*)(const void*, int64_t, int);
    using Flag = std::shared_ptr<std::atomic<bool>>;

    void start_workers(int threads);
    void dismiss_workers(int threads);
    void run_any(int64_t count, int most, Call call, const void* function);
    void take_tasks(uint32_t epoch, int thread);
    void keep_exception();
    void fetch_expected(uint32_t epoch);
    void work(int thread, uint32_t seen, const Flag& leave);

    std::atomic<int> threads_{1};
    std::vector<Flag> leaving_;
    // Held by the call in hand, and while the number of threads changes.
    std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
    // The call's first exception, and whether there is one.
    std::exception_ptr exception_;
    std::atomic_flag failed_ = ATOMIC_FLAG_INIT;
    // The call in hand. Written only while the cursor is closed, read again after a task has been taken from the cursor.
    std::atomic<Call> call_{nullptr};
    std::atomic<const void*> function_{nullptr};
    std::atomic<uint32_t> count_{0};
    std::atomic<int> most_{0};
    // The call's number above, the next index that nobody has taken below.
    alignas(64) std::atomic<uint64_t> cursor_{0};
    alignas(64) std::atomic<uint32_t> done_{0};
    alignas(64) std::atomic<uint32_t> epoch_{0};
    alignas(64) std::atomic<const char*> expected_{nullptr};
    std::atomic<const char*> expected_end_{nullptr};
};

}  // namespace headrace
