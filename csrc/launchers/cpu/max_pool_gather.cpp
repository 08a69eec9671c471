// Reads the winners of max pooling on the CPU, which is no work that vectors would speed up.
#include "launchers/cpu/max_pool_gather.h"

#include "launchers/cpu/device.h"

namespace pooling_ext {
namespace {

// Where the winner of each output lies in its plane, from either kind of offset; -1 for none.
class Decoder {
  public:
    Decoder(const PoolParams& p, const void* offsets, Offsets kind)
        : p_(p), kind_(kind), data_(offsets) {}

    int64_t operator()(int64_t i, int64_t od, int64_t oh, int64_t ow) const {
        if (kind_ == Offsets::Index) return static_cast<const int64_t*>(data_)[i];
        int64_t offset;
        if (kind_ == Offsets::Byte) {
            offset = static_cast<const uint8_t*>(data_)[i];
            if (offset == kByteWindow) return -1;
        } else {
            offset = static_cast<const int32_t*>(data_)[i];
            if (offset < 0) return -1;
        }
        const int64_t kw = offset % p_.w.kernel, row = offset / p_.w.kernel;
        const int64_t d = p_.d.start(od) + row / p_.h.kernel * p_.d.dilation;
        const int64_t h = p_.h.start(oh) + row % p_.h.kernel * p_.h.dilation;
        return (d * p_.h.in + h) * p_.w.in + p_.w.start(ow) + kw * p_.w.dilation;
    }

  private:
    const PoolParams& p_;
    const Offsets kind_;
    const void* data_;
};

// Moves whole elements, so only their size matters.
template <class Element>
void gather(const PoolParams& p, const Decoder& decode, const void* from, void* to) {
    const auto* src = static_cast<const Element*>(from);
    auto* dst = static_cast<Element*>(to);
    const int64_t plane = p.d.in * p.h.in * p.in_row();
    parallel_for(0, p.out_rows(), 1 + 4096 / p.out_row(), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t oh = row % p.h.out, od = row / p.h.out % p.d.out;
            const Element* x = src + row / (p.h.out * p.d.out) * plane;
            int64_t i = row * p.out_row();
            for (int64_t ow = 0; ow < p.w.out; ++ow)
                for (int64_t c = 0; c < p.channels; ++c, ++i) {
                    const int64_t at = decode(i, od, oh, ow);
                    dst[i] = at >= 0 ? x[at * p.channels + c] : Element(0);
                }
        }
    });
}

}  // namespace

void gather_winners(const PoolJob& call, DType dtype, Offsets kind) {
    const Decoder decode(call.p, call.offsets_in, kind);
    switch (size_of(dtype)) {
        case 8:
            return gather<uint64_t>(call.p, decode, call.src, call.dst);
        case 4:
            return gather<uint32_t>(call.p, decode, call.src, call.dst);
        case 2:
            return gather<uint16_t>(call.p, decode, call.src, call.dst);
        default:
            return gather<uint8_t>(call.p, decode, call.src, call.dst);
    }
}

}  // namespace pooling_ext
