// A number that changes when the values of tensors do. The operator is defined in
// pooling_ext/ops/winograd_weights.py.
#include <cstring>

#include "common/torch_api.h"

namespace pooling_ext {
namespace {

using MaybeTensor = std::optional<Tensor>;

constexpr uint64_t kMultiplier = 0x9E3779B97F4A7C15;  // odd, so that no difference is lost

inline uint64_t mixed(uint64_t state, uint64_t word) {
    state = (state ^ word) * kMultiplier;
    return state << 29 | state >> 35;  // what multiplication leaves in the high bits comes down
}

// Of bytes, in as many chains as a core's multiplier can be kept busy with.
uint64_t fingerprint_of(const char* bytes, int64_t size) {
    constexpr int kChains = 8;
    uint64_t state[kChains];
    for (int i = 0; i < kChains; ++i) state[i] = uint64_t(size) + uint64_t(i);
    int64_t at = 0;
    for (; at + kChains * 8 <= size; at += kChains * 8)
        for (int i = 0; i < kChains; ++i) {
            uint64_t word;
            std::memcpy(&word, bytes + at + i * 8, 8);
            state[i] = mixed(state[i], word);
        }
    uint64_t all = 0;
    for (const uint64_t chain : state) all = mixed(all, chain);
    for (; at < size; ++at) all = mixed(all, uint64_t(static_cast<unsigned char>(bytes[at])));
    return all;
}

uint64_t fingerprint_of(const Tensor& given) {
    const bool last = suggests_channels_last(given, given.dim() - 2);
    const Tensor x = dense(given, last);
    const int64_t size = x.numel() * int64_t(x.element_size());
    const char* const bytes = static_cast<const char*>(x.data_ptr());
    constexpr int64_t kPart = 1 << 18;
    const int64_t parts = (size + kPart - 1) / kPart;
    std::vector<uint64_t> found(size_t(parts), 0);
    const auto some = [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part)
            found[size_t(part)] =
                fingerprint_of(bytes + part * kPart, std::min(kPart, size - part * kPart));
    };
    if (parts == 1)
        some(0, 1);
    else
        parallel_for(0, parts, 1, some);
    uint64_t all = uint64_t(last);
    for (const uint64_t part : found) all = mixed(all, part);
    return all;
}

int64_t fingerprint(const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& mean,
                    const MaybeTensor& variance, const MaybeTensor& norm_weight,
                    const MaybeTensor& norm_bias) {
    uint64_t all = fingerprint_of(weight);
    for (const MaybeTensor* x : {&bias, &mean, &variance, &norm_weight, &norm_bias})
        all = mixed(all, *x ? fingerprint_of(**x) : 0);
    return int64_t(all);
}

}  // namespace
}  // namespace pooling_ext

STABLE_TORCH_LIBRARY_IMPL(pooling_ext, CPU, m) {
    m.impl("fingerprint", TORCH_BOX(&pooling_ext::fingerprint));
}
