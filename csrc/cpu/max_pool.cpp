// Launchers of max pooling on the CPU. The operators are defined in pooling_ext/ops/max_pool.py.
#include "cpu/launch.h"

namespace pooling_ext {
namespace {

Tensor max_pool(const Tensor& input, Ints output_size, Ints kernel_size, Ints stride, Ints padding,
                Ints dilation) {
    Forward call(input, {output_size, kernel_size, stride, padding, dilation});
    return call.launch(kernels().max_pool(dtype_of(input), Places::None));
}

std::tuple<Tensor, Tensor> max_pool_places(const Tensor& input, Ints output_size, Ints kernel_size,
                                           Ints stride, Ints padding, Ints dilation, bool indices) {
    const Windows windows{output_size, kernel_size, stride, padding, dilation};
    Forward call(input, windows);
    // As places_dtype in max_pool.py says.
    constexpr int64_t kManyPlaces = int64_t(1) << 30;
    const int64_t window = call.job.p.window_places();
    STD_TORCH_CHECK(window < kManyPlaces || is_whole(call.job.p),
                    "pooling_ext: kernel_size must have fewer than 2**30 places");
    const Places kind = indices || window >= kManyPlaces ? Places::Index
                        : window <= kByteWindow          ? Places::Byte
                                                         : Places::Int32;
    const ScalarType dtype = kind == Places::Index  ? ScalarType::Long
                             : kind == Places::Byte ? ScalarType::Byte
                                                    : ScalarType::Int;
    Tensor places = empty(sizes_of(call.output), dtype, call.channels_last);
    call.job.places_out = places.data_ptr();
    return {call.launch(kernels().max_pool(dtype_of(input), kind)), places};
}

Places kind_of(const Tensor& places) {
    switch (places.scalar_type()) {
        case ScalarType::Byte:
            return Places::Byte;
        case ScalarType::Int:
            return Places::Int32;
        case ScalarType::Long:
            return Places::Index;
        default:
            STD_TORCH_CHECK(false, "pooling_ext: places must be uint8, int32 or int64");
    }
}

Tensor max_pool_backward(const Tensor& grad, const Tensor& places, Ints input_size,
                         Ints output_size, Ints kernel_size, Ints stride, Ints padding,
                         Ints dilation) {
    const Windows windows{output_size, kernel_size, stride, padding, dilation};
    const bool channels_last = suggests_channels_last(places, windows.rank());
    STD_TORCH_CHECK(
        sizes_of(grad) == sizes_of(places) && sizes_of(grad) == output_sizes(input_size, windows),
        "pooling_ext: grad and places must have the output's size");
    const Tensor dense_grad = dense(grad, channels_last);
    const Tensor dense_places = dense(places, channels_last);
    Tensor result = empty(input_size, grad.scalar_type(), channels_last);
    Job job;
    job.p = params_of(input_size, windows, channels_last);
    job.src = dense_grad.data_ptr();
    job.places_in = dense_places.data_ptr();
    job.dst = result.data_ptr();
    if (result.numel() > 0) {
        const DType dtype = dtype_of(grad);
        const Places kind = kind_of(places);
        plan_max_backward(job, dtype, kind);
        launch(kernels().max_pool_backward(dtype, kind), job, max_backward_rows(job));
    }
    return result;
}

// Where the winner of each output lies in its plane, from either kind of place; -1 for none.
class Decoder {
  public:
    Decoder(const PoolParams& p, const Tensor& places)
        : p_(p), kind_(kind_of(places)), data_(places.data_ptr()) {}

    int64_t operator()(int64_t i, int64_t od, int64_t oh, int64_t ow) const {
        if (kind_ == Places::Index) return static_cast<const int64_t*>(data_)[i];
        int64_t offset;
        if (kind_ == Places::Byte) {
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
    const Places kind_;
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

Tensor max_pool_gather(const Tensor& input, const Tensor& places, Ints output_size,
                       Ints kernel_size, Ints stride, Ints padding, Ints dilation) {
    const Windows windows{output_size, kernel_size, stride, padding, dilation};
    const bool channels_last = suggests_channels_last(places, windows.rank());
    const Tensor dense_input = dense(input, channels_last);
    const Tensor dense_places = dense(places, channels_last);
    const Ints sizes = output_sizes(sizes_of(input), windows);
    STD_TORCH_CHECK(sizes_of(places) == sizes, "pooling_ext: places must have the output's size");
    Tensor result = empty(sizes, input.scalar_type(), channels_last);
    if (result.numel() == 0) return result;
    const PoolParams p = params_of(sizes_of(input), windows, channels_last);
    const Decoder decode(p, dense_places);
    switch (dtype_of(input)) {
        case DType::Float64:
        case DType::Int64:
            gather<uint64_t>(p, decode, dense_input.data_ptr(), result.data_ptr());
            break;
        case DType::Float32:
        case DType::Int32:
            gather<uint32_t>(p, decode, dense_input.data_ptr(), result.data_ptr());
            break;
        case DType::Int8:
        case DType::UInt8:
            gather<uint8_t>(p, decode, dense_input.data_ptr(), result.data_ptr());
            break;
        default:
            gather<uint16_t>(p, decode, dense_input.data_ptr(), result.data_ptr());
    }
    return result;
}

}  // namespace
}  // namespace pooling_ext

STABLE_TORCH_LIBRARY_IMPL(pooling_ext, CPU, m) {
    m.impl("max_pool", TORCH_BOX(&pooling_ext::max_pool));
    m.impl("max_pool_places", TORCH_BOX(&pooling_ext::max_pool_places));
    m.impl("max_pool_backward", TORCH_BOX(&pooling_ext::max_pool_backward));
    m.impl("max_pool_gather", TORCH_BOX(&pooling_ext::max_pool_gather));
}
