// Whether an output is written past the cache.
#pragma once

#include <cstdint>

namespace pooling_ext {

// What no cache holds is not to drive out the rest, nor to be read before it is written. `run`: the
// bytes that are written together, which must be whole lines.
inline bool goes_past_cache(const void* output, int64_t bytes, int64_t run) {
    constexpr int64_t kLeast = int64_t(32) << 20, kLine = 64;
    return bytes >= kLeast && run % kLine == 0 && uintptr_t(output) % kLine == 0;
}

}  // namespace pooling_ext
