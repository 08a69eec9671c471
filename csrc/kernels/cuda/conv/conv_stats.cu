// What goes before and comes after the convolutions that take statistics: coefficients of a batch
// norm, and a tensor's statistics out of its tiles'. Both are small beside the convolution.
#include "kernels/cuda/conv/numbers.cuh"

namespace pooling_ext::cuda {
namespace {

constexpr int kChannels = 32, kLanes = 8;  // of a block

// Chan, Golub and LeVeque's formula for all tiles of a part at once, about the first one's mean, in
// an order that depends on the tiles alone.
template <class T>
__global__ void __launch_bounds__(kChannels* kLanes) combine_kernel(CombineJob job) {
    __shared__ double aways[kLanes][kChannels], squares[kLanes][kChannels];
    const int blocks = int(ceil_div(job.channels, kChannels));
    const int64_t part = blockIdx.x / blocks;
    const int column = threadIdx.x % kChannels, lane = threadIdx.x / kChannels;
    const int channel = int(blockIdx.x % blocks) * kChannels + column;
    const bool exists = channel < job.channels && job.total > 0;
    const int64_t begin = part * kCombined;
    const int64_t end = begin + kCombined < job.tiles ? begin + kCombined : job.tiles;
    const T* const partials = static_cast<const T*>(job.partials) + channel;
    const int64_t row = 2 * int64_t(job.channels);

    const double first = exists ? double(load(partials + begin * row).at[0]) : 0.0;
    double away = 0, square = 0;
    for (int64_t tile = begin + lane; exists && tile < end; tile += kLanes) {
        const int64_t left = job.total - tile * job.unit;
        const double count = double(left < job.unit ? left : job.unit);
        const double apart = double(load(partials + tile * row).at[0]) - first;
        away += count * apart;
        square += double(load(partials + tile * row + job.channels).at[0]) + count * apart * apart;
    }
    aways[lane][column] = away;
    squares[lane][column] = square;
    __syncthreads();
    if (lane || channel >= job.channels) return;
    for (int other = 1; other < kLanes; ++other) {
        away += aways[other][column];
        square += squares[other][column];
    }
    double mean = 0, second = 0;
    if (exists) {
        const int64_t left = job.total - begin * job.unit, most = kCombined * job.unit;
        const double count = double(left < most ? left : most);
        mean = first + away / count;
        second = square - away * (away / count);
        if (second < 0) second = 0;
        if (job.parts() == 1) second /= count;
    }
    double* const to = job.output + part * row + channel;
    store(to, {{mean}});
    store(to + job.channels, {{second}});
}

__global__ void __launch_bounds__(kChannels* kLanes)
    affine_kernel(const double* stats, Numbers weight, Numbers bias, double eps, int channels,
                  float* affine) {
    const int channel = blockIdx.x * (kChannels * kLanes) + threadIdx.x;
    if (channel >= channels) return;
    const double mean = load(stats + channel).at[0];
    double factor[1] = {1.0}, offset[1] = {0.0};
    read(weight, channel, 1, factor);
    read(bias, channel, 1, offset);
    const double scale = factor[0] / sqrt(load(stats + channels + channel).at[0] + eps);
    // What the center's rounding leaves of the mean goes into the shift.
    const float center = float(mean);
    const double shift = (double(center) - mean) * scale + offset[0];
    store(affine + channel, {{center}});
    store(affine + channels + channel, {{float(scale)}});
    store(affine + 2 * channels + channel, {{float(shift)}});
}

}  // namespace

void combine_means(const CombineJob& job, StreamHandle stream) {
    const Grid grid{{unsigned(job.parts() * ceil_div(job.channels, kChannels))},
                    {kChannels * kLanes}};
    if (job.wide)
        launch<combine_kernel<double>>(grid, static_cast<Stream>(stream), job);
    else
        launch<combine_kernel<float>>(grid, static_cast<Stream>(stream), job);
}

void batch_norm_affine(const double* stats, Numbers weight, Numbers bias, double eps, int channels,
                       float* affine, StreamHandle stream) {
    const Grid grid{{unsigned(ceil_div(channels, kChannels * kLanes))}, {kChannels * kLanes}};
    launch<affine_kernel>(grid, static_cast<Stream>(stream), stats, weight, bias, eps, channels,
                          affine);
}

}  // namespace pooling_ext::cuda
