// Convolution as a matrix product whose left matrix has a row for each pixel of the output, with
// the elements of its window, and is gathered tile by tile and never stored (implicit GEMM: Chetlur
// et al., "cuDNN: Efficient Primitives for Deep Learning", 2014). While one step's tiles are
// multiplied those of later ones are on their way to shared memory. What comes before the
// convolution in the network is done to the tiles there, what comes after to the result before it
// is stored.
#pragma once

#include "kernels/cuda/conv/conv_tile.cuh"
#include "kernels/cuda/conv/numbers.cuh"

namespace pooling_ext::cuda {

// A pixel of the output: where its window begins in the input, which may be outside the image.
struct alignas(16) Window {
    int64_t offset;
    int y, x;
};

// The tile of a block: down the rows of a group of tiles first, then to the next column, so that
// blocks that run at the same time share rows of both matrices in the L2 cache.
struct TilePosition {
    unsigned row, column;

    POOLING_EXT_DEVICE TilePosition(unsigned down, unsigned across) {
        constexpr unsigned kGroup = 8;
        const unsigned first = blockIdx.x / (kGroup * across) * kGroup;
        const unsigned height = down - first < kGroup ? down - first : kGroup;
        const unsigned within = blockIdx.x - first * across;
        row = first + within % height;
        column = within / height;
    }
};

template <class Tile>
POOLING_EXT_DEVICE void find_windows(const ConvJob& job, int64_t first, Window* windows) {
    const int plane = job.out_height * job.out_width;
    for (int r = threadIdx.x; r < Tile::kRows; r += Tile::kThreads) {
        Window window{0, -(1 << 30), 0};  // outside the image at every tap of the window
        if (first + r < job.pixels) {
            const int64_t image = (first + r) / plane;
            const int pixel = int(first + r - image * plane), row = pixel / job.out_width;
            window.y = row * job.stride_h - job.padding_h;
            window.x = (pixel - row * job.out_width) * job.stride_w - job.padding_w;
            window.offset = ((image * job.height + window.y) * job.width + window.x) * job.channels;
        }
        windows[r] = window;
    }
}

// Brings steps of both operands to shared memory, N elements at a time. A row of either is taps
// of a window by channels; the thread has the same elements of every kPass-th row.
template <class T, class Tile, int N>
class Gatherer {
  public:
    POOLING_EXT_DEVICE Gatherer(const ConvJob& job, const Window* windows, int first_feature)
        : job_(job),
          windows_(windows),
          elements_(job.kernel_h * job.kernel_w * job.channels),
          element_(int(threadIdx.x) % kAcross * N),
          row_(int(threadIdx.x) / kAcross),
          feature_(first_feature + row_) {
        const int tap = element_ / job.channels, step = Tile::kStep / job.channels;
        channel_ = normal_channel_ = element_ - tap * job.channels;
        y_ = tap / job.kernel_w;
        x_ = tap - y_ * job.kernel_w;
        step_channel_ = Tile::kStep - step * job.channels;
        step_y_ = step / job.kernel_w;
        step_x_ = step - step_y_ * job.kernel_w;
    }

    // Starts to copy the next step.
    POOLING_EXT_DEVICE void fetch(T* stage) {
        const bool any = element_ < elements_;
        const int down = y_ * job_.dilation_h, along = x_ * job_.dilation_w;
        const int64_t offset = (int64_t(down) * job_.width + along) * job_.channels + channel_;
        const T* const input = static_cast<const T*>(job_.input);
        T* to = stage + row_ * Tile::kStride + int(threadIdx.x) % kAcross * N;
#pragma unroll
        for (int i = 0; i < kInputRows; ++i) {
            const Window window = windows_[row_ + i * kPass];
            const bool inside = any && unsigned(window.y + down) < unsigned(job_.height) &&
                                unsigned(window.x + along) < unsigned(job_.width);
            inside_ = inside_ << 1 | unsigned(inside);
            copy_async<N>(to, inside ? input + window.offset + offset : input, inside);
            to += kPass * Tile::kStride;
        }
        to = stage + (Tile::kRows + row_) * Tile::kStride + int(threadIdx.x) % kAcross * N;
        const T* const weight = static_cast<const T*>(job_.weight);
        int64_t at = int64_t(feature_) * elements_ + element_;
#pragma unroll
        for (int i = 0; i < kWeightRows; ++i) {
            const bool exists = any && feature_ + i * kPass < job_.features;
            copy_async<N>(to, exists ? weight + at : weight, exists);
            at += int64_t(kPass) * elements_;
            to += kPass * Tile::kStride;
        }

        element_ += Tile::kStep;
        channel_ += step_channel_;
        x_ += step_x_;
        y_ += step_y_;
        if (channel_ >= job_.channels) {
            channel_ -= job_.channels;
            ++x_;
        }
        if (x_ >= job_.kernel_w) {
            x_ -= job_.kernel_w;
            ++y_;
        }
    }

    // Where there is nothing more to fetch.
    POOLING_EXT_DEVICE void skip() { inside_ <<= kInputRows; }

    // The prologue, of what this thread fetched kStages - 2 steps before the last: the batch norm
    // and ReLU, rounded as if they had been stored. NaN stays NaN.
    POOLING_EXT_DEVICE void normalize(T* stage) {
        const unsigned inside = unsigned(inside_ >> (kInputRows * (Tile::kStages - 2)));
        constexpr int kLoad = N < 4 ? N : 4;
        const float* const center = job_.affine + normal_channel_;
        const float *const scale = center + job_.channels, *const shift = scale + job_.channels;
        T* const first = stage + row_ * Tile::kStride + int(threadIdx.x) % kAcross * N;
#pragma unroll
        for (int part = 0; part < N; part += kLoad) {
            if (!(inside & ((1u << kInputRows) - 1))) break;
            const Vec<float, kLoad> c = load<kLoad>(center + part), s = load<kLoad>(scale + part),
                                    b = load<kLoad>(shift + part);
#pragma unroll
            for (int i = 0; i < kInputRows; ++i) {
                if (!(inside >> (kInputRows - 1 - i) & 1)) continue;
                T* const at = first + i * kPass * Tile::kStride + part;
                Vec<T, kLoad> x = vector<kLoad>(at);
#pragma unroll
                for (int e = 0; e < kLoad; ++e) {
                    float y = fmaf(widen(x.at[e]) - c.at[e], s.at[e], b.at[e]);
                    if (job_.prologue_relu && y < 0) y = 0;
                    x.at[e] = narrow<T>(y);
                }
                vector<kLoad>(at) = x;
            }
        }
        normal_channel_ += step_channel_;
        if (normal_channel_ >= job_.channels) normal_channel_ -= job_.channels;
    }

  private:
    static constexpr int kAcross = Tile::kStep / N;  // threads
    static constexpr int kPass = Tile::kThreads / kAcross;
    static constexpr int kInputRows = Tile::kRows / kPass, kWeightRows = Tile::kColumns / kPass;
    static_assert(Tile::kThreads % kAcross == 0 && kInputRows * (Tile::kStages - 1) <= 64 &&
                  kInputRows < 32);

    const ConvJob& job_;
    const Window* windows_;
    int elements_, element_, row_, feature_;
    int channel_, y_, x_, step_channel_, step_y_, step_x_;
    int normal_channel_;
    uint64_t inside_ = 0;  // whether what was fetched last was inside the image
};

// --- epilogue ------------------------------------------------------------------------------------

// Each column's mean and sum of squared deviations over the first `rows` of a part.
template <class T, class Tile>
POOLING_EXT_DEVICE void store_statistics(const ConvJob& job, const float* part, int rows,
                                         unsigned tile, int first_column, float* scratch) {
    using Wide = std::conditional_t<std::is_same_v<T, float>, double, float>;
    constexpr int kLanes = Tile::kThreads / Tile::kPart;
    const int column = threadIdx.x % Tile::kPart, lane = threadIdx.x / Tile::kPart;
    const auto together = [&](int which, float own) {
        float* const all = scratch + which * kLanes * Tile::kPart;
        all[threadIdx.x] = own;
        __syncthreads();
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kLanes; ++i) sum += all[i * Tile::kPart + column];
        return sum;
    };
    const float count = float(rows);
    float sum = 0;
    for (int r = lane; r < rows; r += kLanes) sum += part[r * Tile::kPartStride + column];
    // Deviations from a mean that is rounded, and then corrected for that.
    const float mean = together(0, sum) / count;
    float away = 0, squares = 0;
    for (int r = lane; r < rows; r += kLanes) {
        const float deviation = part[r * Tile::kPartStride + column] - mean;
        away += deviation;
        squares = fmaf(deviation, deviation, squares);
    }
    away = together(1, away);
    squares = together(2, squares);
    if (lane || first_column + column >= job.features) return;
    Wide* const to = static_cast<Wide*>(job.partials) + tile * (2 * int64_t(job.features)) +
                     first_column + column;
    store(to, {{Wide(mean) + Wide(away / count)}});
    store(to + job.features, {{Wide(squares - away * (away / count))}});
}

// N elements, or the first `some` of them one by one where the row is not of whole vectors.
template <class T, int N>
POOLING_EXT_DEVICE void load_row(const T* from, int some, bool vectors, Vec<T, N>& to) {
    if (vectors) {
        to = load<N>(from);
        return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i)
        if (i < some) to.at[i] = load(from + i).at[0];
}

template <class T, int N>
POOLING_EXT_DEVICE void store_row(T* to, int some, bool vectors, const Vec<T, N>& from) {
    if (vectors) return store<N>(to, from);
#pragma unroll
    for (int i = 0; i < N; ++i)
        if (i < some) store(to + i, {{from.at[i]}});
}

// Adds bias and residual to a part, applies ReLU and stores it.
template <class T, class Tile>
POOLING_EXT_DEVICE void store_part(const ConvJob& job, float* part, int64_t first_row, int rows,
                                   int first_column) {
    constexpr int N = kVector<T>, kAcross = Tile::kPart / N, kPass = Tile::kThreads / kAcross;
    const int within = int(threadIdx.x) % kAcross * N, column = first_column + within;
    const int some = job.features - column;
    if (some <= 0) return;
    float bias[N] = {};
    read(job.bias, column, some, bias);
    const int64_t own = first_row * job.features + column;
    const T* const residual = static_cast<const T*>(job.residual) + own;
    T* const output = static_cast<T*>(job.output) + own;
    // Several independent loads of a thread at a time.
    constexpr int kBatch = 4;
    for (int first = int(threadIdx.x) / kAcross; first < rows; first += kBatch * kPass) {
        Vec<T, N> y[kBatch] = {};
        if (job.residual) {
#pragma unroll
            for (int b = 0; b < kBatch; ++b) {
                const int r = first + b * kPass;
                if (r < rows)
                    load_row(residual + int64_t(r) * job.features, some, job.vectors_out, y[b]);
            }
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            const int r = first + b * kPass;
            if (r >= rows) break;
            float* const sums = part + r * Tile::kPartStride + within;
#pragma unroll
            for (int four = 0; four < N; four += 4) {
                Vec<float, 4> sum = vector<4>(sums + four);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int i = four + e;
                    float x = sum.at[e] + bias[i] + widen(y[b].at[i]);
                    if (job.relu && x < 0) x = 0;
                    y[b].at[i] = narrow<T>(x);
                    sum.at[e] = widen(y[b].at[i]);
                }
                if (job.partials) vector<4>(sums + four) = sum;
            }
            store_row(output + int64_t(r) * job.features, some, job.vectors_out, y[b]);
        }
    }
}

template <class T, class Tile, int kNumber = 0>
POOLING_EXT_DEVICE void finish(const ConvJob& job, const Product<T, Tile>& product, float* part,
                               const TilePosition& tile) {
    const int64_t first_row = int64_t(tile.row) * Tile::kRows, left = job.pixels - first_row;
    const int rows = left < Tile::kRows ? int(left) : Tile::kRows;
    const int first_column = int(tile.column) * Tile::kColumns + kNumber * Tile::kPart;
    __syncthreads();  // nobody reads any more what is there
    product.template put<kNumber>(part);
    __syncthreads();
    store_part<T, Tile>(job, part, first_row, rows, first_column);
    if (job.partials) {
        __syncthreads();
        store_statistics<T, Tile>(job, part, rows, tile.row, first_column,
                                  part + Tile::kRows * Tile::kPartStride);
    }
    if constexpr (kNumber + 1 < Tile::kParts)
        finish<T, Tile, kNumber + 1>(job, product, part, tile);
}

// --- the kernel ----------------------------------------------------------------------------------

template <class T, class Tile>
constexpr size_t shared_memory() {
    constexpr size_t kAhead = sizeof(T) * Tile::kStages * Tile::kStage;
    constexpr size_t kResult =
        sizeof(float) * (Tile::kRows * Tile::kPartStride + 3 * Tile::kThreads);
    return sizeof(Window) * Tile::kRows + (kAhead > kResult ? kAhead : kResult);
}

template <class T, int kTile, int N>
__global__ void __launch_bounds__(TileOf<T, kTile>::kThreads, 512 / TileOf<T, kTile>::kThreads)
    conv_kernel(ConvJob job) {
    using Tile = TileOf<T, kTile>;
    const TilePosition tile(unsigned(ceil_div(job.pixels, Tile::kRows)),
                            unsigned(ceil_div(job.features, Tile::kColumns)));
    Window* const windows = dynamic_shared<Window>();
    T* const stages = reinterpret_cast<T*>(windows + Tile::kRows);
    find_windows<Tile>(job, int64_t(tile.row) * Tile::kRows, windows);
    __syncthreads();

    Gatherer<T, Tile, N> gatherer(job, windows, int(tile.column) * Tile::kColumns);
    Product<T, Tile> product;
    const int steps = int(ceil_div(job.kernel_h * job.kernel_w * job.channels, Tile::kStep));
    constexpr int kAhead = Tile::kStages - 1;
#pragma unroll
    for (int step = 0; step < kAhead; ++step) {
        if (step < steps)
            gatherer.fetch(stages + step * Tile::kStage);
        else
            gatherer.skip();
        __pipeline_commit();
    }
    // As offsets, since the compiler follows those back to shared memory.
    int now = 0, next = kAhead * Tile::kStage;
    for (int step = 0; step < steps; ++step) {
        __pipeline_wait_prior(kAhead - 1);
        if (job.affine) gatherer.normalize(stages + now);
        __syncthreads();  // all of this step is there, and the one before it is not needed any more
        if (step + kAhead < steps)
            gatherer.fetch(stages + next);
        else
            gatherer.skip();
        __pipeline_commit();
        product.add(stages + now, stages + now + Tile::kRows * Tile::kStride);
        if ((now += Tile::kStage) == Tile::kStages * Tile::kStage) now = 0;
        if ((next += Tile::kStage) == Tile::kStages * Tile::kStage) next = 0;
    }
    finish<T, Tile>(job, product, reinterpret_cast<float*>(stages), tile);
}

template <class T, int kTile, int N>
void launch_tile(const ConvJob& job, Stream stream) {
    using Tile = TileOf<T, kTile>;
    const int64_t blocks =
        ceil_div(job.pixels, Tile::kRows) * ceil_div(job.features, Tile::kColumns);
    if (blocks > 0x7fffffff)
        throw std::runtime_error("pooling_ext: the convolution's output is too large");
    launch<conv_kernel<T, kTile, N>>(
        {{unsigned(blocks)}, {Tile::kThreads}, shared_memory<T, Tile>()}, stream, job);
}

template <class T, int kTile = 0>
void launch_conv(const ConvJob& job, Stream stream) {
    if constexpr (kTile + 1 < kConvTileCount) {
        if (job.tile != kTile || !job.vectors_in) return launch_conv<T, kTile + 1>(job, stream);
        launch_tile<T, kTile, kVector<T>>(job, stream);
    } else if (job.vectors_in) {
        launch_tile<T, kTile, kVector<T>>(job, stream);
    } else {
        launch_tile<T, kTile, 1>(job, stream);
    }
}

}  // namespace pooling_ext::cuda
