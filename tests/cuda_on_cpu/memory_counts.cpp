// Counts of the memory accesses of kernels.
#include "memory_counts.h"

#include <algorithm>
#include <cmath>
#include <list>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>

namespace cuda_on_cpu {
namespace {

constexpr size_t kSector = 32, kCache = 48 << 10;  // bytes

std::mutex mutex;  // of the counts
std::map<std::string, Counts> counts;

// The sectors that were used last.
class Cache {
  public:
    // Whether the sector is new.
    bool take(uintptr_t sector) {
        if (const auto found = where_.find(sector); found != where_.end()) {
            order_.splice(order_.begin(), order_, found->second);
            return false;
        }
        order_.push_front(sector);
        where_[sector] = order_.begin();
        if (order_.size() > kCache / kSector) {
            where_.erase(order_.back());
            order_.pop_back();
        }
        return true;
    }

  private:
    std::list<uintptr_t> order_;
    std::unordered_map<uintptr_t, std::list<uintptr_t>::iterator> where_;
};

}  // namespace

void Counts::add_block(const std::vector<Access>& accesses) {
    std::map<decltype(Access().instruction()), std::vector<const Access*>> instructions;
    for (const Access& access : accesses) {
        asked[access.writes] += access.bytes;
        instructions[access.instruction()].push_back(&access);
    }
    std::vector<const std::vector<const Access*>*> order;
    for (const auto& [key, lanes] : instructions) order.push_back(&lanes);
    const auto time = [](const std::vector<const Access*>* lanes) {
        return std::pair((*lanes)[0]->ordinal, (*lanes)[0]->warp);
    };
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return time(a) < time(b); });
    Cache caches[2];
    for (const auto* lanes : order) {
        std::vector<uintptr_t> sectors;
        for (const Access* access : *lanes)
            for (uintptr_t at = access->address / kSector;
                 at <= (access->address + access->bytes - 1) / kSector; ++at)
                sectors.push_back(at);
        std::sort(sectors.begin(), sectors.end());
        sectors.erase(std::unique(sectors.begin(), sectors.end()), sectors.end());
        const bool writes = (*lanes)[0]->writes;
        touched[writes] += sectors.size() * kSector;
        for (const uintptr_t sector : sectors)
            moved[writes] += caches[writes].take(sector) ? kSector : 0;
    }
}

void add_launch(const char* kernel, const Counts& seen, double share) {
    const std::lock_guard guard(mutex);
    Counts& total = counts[kernel];
    const auto add = [&](int64_t& to, int64_t value) { to += std::llround(share * value); };
    total.launches += 1;
    add(total.blocks, seen.blocks);
    add(total.threads, seen.threads);
    for (int i = 0; i < 2; ++i) {
        add(total.asked[i], seen.asked[i]);
        add(total.touched[i], seen.touched[i]);
        add(total.moved[i], seen.moved[i]);
    }
}

}  // namespace cuda_on_cpu

// A line for each kernel since the last call: its name, then its counts, between tabs.
CUDA_ON_CPU_EXPORTED const char* cuda_on_cpu_counts() {
    using namespace cuda_on_cpu;
    static std::string text;
    const std::lock_guard guard(mutex);
    text.clear();
    for (const auto& [name, c] : counts) {
        text += name;
        for (const int64_t value : {c.launches, c.blocks, c.threads, c.asked[0], c.asked[1],
                                    c.touched[0], c.touched[1], c.moved[0], c.moved[1]})
            text += "\t" + std::to_string(value);
        text += "\n";
    }
    counts.clear();
    return text.c_str();
}
