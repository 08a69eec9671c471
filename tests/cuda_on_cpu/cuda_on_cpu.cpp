// The threads of cuda_on_cpu.h.

// A checked longjmp refuses to leave one fiber's stack for another's.
#undef _FORTIFY_SOURCE

#include "cuda_on_cpu.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory_counts.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {
namespace {

struct Settings {
    uint64_t seed = 0;
    int64_t most = 0;  // if not 0: runs only about so many blocks of each launch
    bool counting = false;
} settings;

// --- fibers --------------------------------------------------------------------------------------

constexpr size_t kStack = 256 << 10;

// A stack that is left and entered again. Only the first entry takes a system call: swapcontext
// makes two each time, which took most of the tests' time. To AddressSanitizer longjmp means
// unwinding, so there swapcontext stays.
struct Stack {
    ucontext_t context;
    jmp_buf left;
    bool begun;
};

#ifndef __SANITIZE_ADDRESS__
void change(Stack& from, Stack& to) {
    if (_setjmp(from.left)) return;
    if (to.begun) _longjmp(to.left, 1);
    to.begun = true;
    setcontext(&to.context);
}
#endif

struct Fiber : Stack {
    std::unique_ptr<char[]> memory;
};

struct Copy {
    void* to;
    const void* from;
    size_t bytes;
};

struct Thread {
    uint3 index;
    Fiber* fiber = nullptr;
    unsigned exchanges = 0, accesses = 0;
    std::vector<std::vector<Copy>> copies;  // in groups, the last one open
    std::map<std::pair<unsigned, unsigned>, unsigned> occurrences;
};

struct Warp {
    unsigned arrived = 0;
    alignas(16) unsigned char values[2][16 * warpSize];
};

// Runs the blocks of an OS thread's launches.
class Machine {
  public:
    Machine() { pool_.reserve(1024); }

    void run(const char* kernel, dim3 grid, dim3 block, size_t shared,
             const std::function<void()>& function) {
        const unsigned threads = block.x * block.y * block.z;
        if (threads == 0 || threads > 1024 || grid.y > 65535 || grid.z > 65535 || grid.x == 0 ||
            grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || shared > (227 << 10))
            throw std::runtime_error(std::string("invalid configuration of ") + kernel);
        gridDim = grid;
        blockDim = block;
        function_ = &function;
        random_.seed(settings.seed);
        Counts seen;
        // One of every so many that follow each other, so that they are of all kinds.
        const int64_t all = int64_t(grid.x) * grid.y * grid.z;
        const int64_t every =
            settings.most && all > settings.most ? (all + settings.most - 1) / settings.most : 1;
        int64_t chosen = 0;
        int64_t number = 0;
        for (unsigned z = 0; z < grid.z; ++z)
            for (unsigned y = 0; y < grid.y; ++y)
                for (unsigned x = 0; x < grid.x; ++x) {
                    if (number % every == 0) chosen = number + int64_t(random_() % uint64_t(every));
                    if (number++ != chosen) continue;
                    blockIdx = {x, y, z};
                    // Of exactly this size, and never zero by luck.
                    shared_.reset(shared ? new (std::align_val_t(128)) char[shared] : nullptr);
                    if (shared) std::memset(shared_.get(), 0xff, shared);
                    run_block(threads, block, kernel);
                    seen.blocks += 1;
                    seen.threads += threads;
                    if (settings.counting) seen.add_block(accesses_);
                    accesses_.clear();
                }
        if (settings.counting)
            add_launch(kernel, seen, double(all) / std::max<int64_t>(seen.blocks, 1));
    }

    void* shared() { return shared_.get(); }

    void block_barrier() {
        at_barrier_.push_back(current_);
        wait();
    }

    const unsigned char* exchange(unsigned mask, const void* value, size_t bytes,
                                  const std::function<void(const unsigned char*)>& last) {
        const unsigned me = current_, lane = me % warpSize;
        Warp& warp = warps_[me / warpSize];
        const unsigned left = threads_.size() - me / warpSize * warpSize;
        if (left < warpSize) mask &= (1u << left) - 1;
        unsigned char* const values = warp.values[threads_[me].exchanges++ % 2];
        std::memcpy(values + 16 * lane, value, bytes);
        warp.arrived |= 1u << lane;
        if ((warp.arrived & mask) != mask) {
            ++in_warps_;
            wait();
            return values;
        }
        if (last) last(values);
        warp.arrived &= ~mask;
        for (unsigned other = 0; other < warpSize; ++other)
            if ((mask >> other & 1) && other != lane) {
                ready_.push_back(me - lane + other);
                --in_warps_;
            }
        return values;
    }

    void note(const void* address, size_t bytes, bool writes, const std::source_location& where) {
        if (!settings.counting) return;
        Thread& thread = threads_[current_];
        const unsigned occurrence = thread.occurrences[{where.line(), where.column()}]++;
        accesses_.push_back({current_ / warpSize, where.line(), where.column(), occurrence,
                             thread.accesses++, writes, reinterpret_cast<uintptr_t>(address),
                             bytes});
    }

    Thread& thread() { return threads_[current_]; }

  private:
    void run_block(unsigned count, dim3 block, const char* kernel) {
        threads_.assign(count, {});
        warps_.assign((count + warpSize - 1) / warpSize, {});
        order_.resize(count);
        for (unsigned i = 0; i < count; ++i) {
            threads_[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
            order_[i] = i;
        }
        std::shuffle(order_.begin(), order_.end(), random_);
        started_ = done_ = in_warps_ = 0;
        ready_.clear();
        at_barrier_.clear();
        while (done_ < count) {
            const bool start = started_ < count && (ready_.empty() || random_() % 4);
            if (start) {
                resume(take_fiber());
            } else if (!ready_.empty()) {
                std::swap(ready_[random_() % ready_.size()], ready_.back());
                current_ = ready_.back();
                ready_.pop_back();
                resume(threads_[current_].fiber);
            } else if (at_barrier_.size() == count) {
                ready_.swap(at_barrier_);
            } else {
                // The fibers that wait are never run again.
                idle_.clear();
                throw std::runtime_error(std::string(kernel) + ": of " + std::to_string(count) +
                                         " threads " + std::to_string(at_barrier_.size()) +
                                         " wait at a barrier, " + std::to_string(in_warps_) +
                                         " for lanes of their warp, and " + std::to_string(done_) +
                                         " have ended");
            }
        }
    }

    Fiber* take_fiber() {
        if (idle_.empty()) idle_.push_back(make_fiber());
        Fiber* const fiber = idle_.back();
        idle_.pop_back();
        return fiber;
    }

    Fiber* make_fiber() {
        pool_.push_back(std::make_unique<Fiber>());
        Fiber* fiber = pool_.back().get();
        fiber->begun = false;
        fiber->memory.reset(new char[kStack]);
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = fiber->memory.get();
        fiber->context.uc_stack.ss_size = kStack;
        fiber->context.uc_link = nullptr;
        makecontext(&fiber->context, &Machine::enter, 0);
        return fiber;
    }

    static void enter();

    void live() {
        finish_switch();
        for (;;) {
            Fiber* const self = fiber_;
            while (started_ < threads_.size()) {
                current_ = order_[started_++];
                threads_[current_].fiber = self;
                threadIdx = threads_[current_].index;
                (*function_)();
                ++done_;
            }
            idle_.push_back(self);
            leave();
        }
    }

    void wait() {
        const unsigned me = current_;
        leave();
        current_ = me;
        threadIdx = threads_[me].index;
    }

    void resume(Fiber* fiber) {
        fiber_ = fiber;
#ifdef __SANITIZE_ADDRESS__
        void* fake = nullptr;
        __sanitizer_start_switch_fiber(&fake, fiber->memory.get(), kStack);
        swapcontext(&main_.context, &fiber->context);
        __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
        change(main_, *fiber);
#endif
    }

    void leave() {
        Fiber* const self = fiber_;
#ifdef __SANITIZE_ADDRESS__
        void* fake = nullptr;
        __sanitizer_start_switch_fiber(&fake, main_stack_, main_size_);
        swapcontext(&self->context, &main_.context);
        __sanitizer_finish_switch_fiber(fake, &main_stack_, &main_size_);
#else
        change(*self, main_);
#endif
    }

    void finish_switch() {
#ifdef __SANITIZE_ADDRESS__
        __sanitizer_finish_switch_fiber(nullptr, &main_stack_, &main_size_);
#endif
    }

    struct Aligned {
        void operator()(char* memory) const { operator delete[](memory, std::align_val_t(128)); }
    };

    const std::function<void()>* function_ = nullptr;
    std::mt19937_64 random_;
    std::unique_ptr<char[], Aligned> shared_;
    std::vector<std::unique_ptr<Fiber>> pool_;
    std::vector<Fiber*> idle_;
    Stack main_{{}, {}, true};
    const void* main_stack_ = nullptr;
    size_t main_size_ = 0;
    Fiber* fiber_ = nullptr;  // that runs
    unsigned current_ = 0;    // the thread that runs
    std::vector<Thread> threads_;
    std::vector<Warp> warps_;
    std::vector<unsigned> order_, ready_, at_barrier_;
    unsigned started_ = 0, done_ = 0, in_warps_ = 0;
    std::vector<Access> accesses_;
};

thread_local Machine machine;

void Machine::enter() { machine.live(); }

}  // namespace

void run(const char* kernel, dim3 grid, dim3 block, size_t shared,
         const std::function<void()>& thread) {
    machine.run(kernel, grid, block, shared, thread);
}

void* dynamic_shared() { return machine.shared(); }

void block_barrier() { machine.block_barrier(); }

const unsigned char* warp_exchange(unsigned mask, const void* value, size_t bytes,
                                   const std::function<void(const unsigned char*)>& last) {
    return machine.exchange(mask, value, bytes, last);
}

void note_access(const void* address, size_t bytes, bool writes,
                 const std::source_location& where) {
    machine.note(address, bytes, writes, where);
}

void copy_later(void* to, const void* from, size_t bytes) {
    auto& groups = machine.thread().copies;
    if (groups.empty()) groups.emplace_back();
    groups.back().push_back({to, from, bytes});
}

void commit_copies() {
    auto& groups = machine.thread().copies;
    if (groups.empty()) groups.emplace_back();
    groups.emplace_back();
}

void wait_for_copies(unsigned groups_left) {
    auto& groups = machine.thread().copies;
    while (groups.size() > groups_left + 1) {
        for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
        groups.erase(groups.begin());
    }
}

}  // namespace cuda_on_cpu

// --- for the tests, through ctypes ---------------------------------------------------------------

// The seed of the order of threads; how many blocks of a launch are run, 0 for all; whether
// accesses are counted.
CUDA_ON_CPU_EXPORTED void cuda_on_cpu_set(uint64_t seed, int64_t most, bool counting) {
    cuda_on_cpu::settings = {seed, most, counting};
}
