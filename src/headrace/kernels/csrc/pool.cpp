#include "pool.h"

#include <pthread.h>

#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

namespace headrace {

namespace {

// About a tenth of a millisecond: longer than what Python does between two kernels, shorter than between two steps.
constexpr int SPINS = 4000;
// Bytes that a worker asks for before it looks again whether there is work.
constexpr int64_t FETCHED = 1024;
constexpr uint64_t CLOSED = 0xffffffff;

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

}  // namespace

Pool& Pool::get() {
    static Pool* pool = [] {
        // A call that another thread was in goes on in the parent alone.
        pthread_atfork(nullptr, nullptr, [] { get().busy_.clear(); });
        return new Pool;
    }();
    return *pool;
}

void Pool::resize(int threads) {
    if (threads < 1) throw std::invalid_argument("there must be 1 thread at least, not " + std::to_string(threads));
    while (busy_.test_and_set(std::memory_order_acquire)) std::this_thread::yield();
    std::string problem;
    try {
        dismiss_workers(threads);
        start_workers(threads);
        threads_.store(threads, std::memory_order_relaxed);
    } catch (const std::exception& error) {
        problem = "no more than " + std::to_string(leaving_.size() + 1) + " threads can be had: " + error.what();
        dismiss_workers(threads_);
    }
    busy_.clear(std::memory_order_release);
    if (!problem.empty()) throw std::runtime_error(problem);
}

void Pool::start_workers(int threads) {
    leaving_.reserve(threads);
    while ((int)leaving_.size() < threads - 1) {
        Flag leave = std::make_shared<std::atomic<bool>>(false);
        int thread = (int)leaving_.size() + 1;
        uint32_t seen = epoch_.load();
        std::thread([this, thread, seen, leave] { work(thread, seen, leave); }).detach();
        leaving_.push_back(leave);
    }
}

void Pool::dismiss_workers(int threads) {
    if ((int)leaving_.size() < threads) return;
    while ((int)leaving_.size() > threads - 1) {
        leaving_.back()->store(true);
        leaving_.pop_back();
    }
    // A number that is no call's wakes them.
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
}

void Pool::run_any(int64_t count, int most, Call call, const void* function) {
    if (count <= 1 || most <= 1 || threads() == 1 || busy_.test_and_set(std::memory_order_acquire)) {
        for (int64_t index = 0; index < count; index++) call(function, index, 0);
        return;
    }
    failed_.clear(std::memory_order_relaxed);
    uint32_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
    cursor_.store((uint64_t)epoch << 32 | CLOSED, std::memory_order_release);
    call_.store(call, std::memory_order_release);
    function_.store(function, std::memory_order_release);
    count_.store((uint32_t)count, std::memory_order_release);
    most_.store(most, std::memory_order_release);
    done_.store(0, std::memory_order_relaxed);
    cursor_.store((uint64_t)epoch << 32, std::memory_order_release);
    epoch_.store(epoch, std::memory_order_release);
    epoch_.notify_all();
    take_tasks(epoch, 0);
    for (int spin = 0; done_.load(std::memory_order_acquire) != (uint32_t)count; spin++) spin < SPINS ? pause() : std::this_thread::yield();
    std::exception_ptr exception = std::exchange(exception_, nullptr);
    busy_.clear(std::memory_order_release);
    if (exception) std::rethrow_exception(exception);
}

void Pool::take_tasks(uint32_t epoch, int thread) {
    uint64_t at = cursor_.load(std::memory_order_acquire);
    while (at >> 32 == epoch) {
        Call call = call_.load(std::memory_order_acquire);
        const void* function = function_.load(std::memory_order_acquire);
        uint32_t index = (uint32_t)at;
        if (index >= count_.load(std::memory_order_acquire) || thread >= most_.load(std::memory_order_acquire)) return;
        // The exchange fails if another call has begun since, so what was read above belongs to this one.
        if (!cursor_.compare_exchange_weak(at, at + 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
        try {
            call(function, index, thread);
        } catch (...) {
            keep_exception();
        }
        done_.fetch_add(1, std::memory_order_release);
        at = cursor_.load(std::memory_order_acquire);
    }
}

void Pool::keep_exception() {
    // Nobody else writes it before the call is done, and the caller reads it after.
    if (!failed_.test_and_set(std::memory_order_relaxed)) exception_ = std::current_exception();
}

void Pool::expect(const void* data, int64_t bytes) {
    expected_.store((const char*)data + bytes, std::memory_order_relaxed);
    expected_end_.store((const char*)data + bytes, std::memory_order_relaxed);
    expected_.store((const char*)data, std::memory_order_relaxed);
}

void Pool::fetch_expected(uint32_t epoch) {
    while (epoch_.load(std::memory_order_relaxed) == epoch) {
        if (expected_.load(std::memory_order_relaxed) >= expected_end_.load(std::memory_order_relaxed)) return;
        const char* at = expected_.fetch_add(FETCHED, std::memory_order_relaxed);
        // Asking for what is not there any more does no harm.
        for (int64_t i = 0; i < FETCHED; i += 64) __builtin_prefetch(at + i, 0, 2);
    }
}

void Pool::work(int thread, uint32_t seen, const Flag& leave) {
    while (true) {
        for (int spin = 0; spin < SPINS && epoch_.load(std::memory_order_acquire) == seen; spin++) pause();
        epoch_.wait(seen, std::memory_order_acquire);
        seen = epoch_.load(std::memory_order_acquire);
        // Looked at after the number: a call that began since this worker was told to leave has another one in its place.
        if (leave->load()) return;
        take_tasks(seen, thread);
        fetch_expected(seen);
    }
}

}  // namespace headrace
