// The Python module pooling_ext._C: facts of the build, the CPU's instruction set, and the
// geometry. It sees no tensor; the operators register themselves when the library is loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels/cpu/conv/winograd_plan.h"
#include "kernels/cpu/isa.h"

namespace py = pybind11;

namespace pooling_ext {
namespace {

using Parts = std::vector<std::vector<int64_t>>;

WinogradShape square(int64_t batch, int64_t channels, int64_t features, int64_t side) {
    WinogradShape s;
    s.batch = batch, s.channels = channels, s.features = features;
    s.height = s.width = s.out_height = s.out_width = side;
    s.pad_top = s.pad_left = 1;
    return s;
}

// The tasks of a Winograd convolution in float32, for vectors of 16.
Parts winograd_tasks(int64_t batch, int64_t channels, int64_t features, int64_t side, bool stats,
                     int64_t workers) {
    const WinogradShape s = square(batch, channels, features, side);
    const WinogradMachine m;
    const WinogradGrid grid = winograd_grid(s, m, stats, workers);
    Parts parts;
    for (int64_t task = 0; task < grid.tasks(); ++task) {
        const WinogradShare share = grid.share(task, s, m);
        parts.push_back({share.first_tile, share.last_tile, share.first_vector, share.last_vector});
    }
    return parts;
}

// Those of a weight's gradient, with the split of the tiles that they belong to first.
Parts winograd_grad_tasks(int64_t batch, int64_t channels, int64_t features, int64_t side,
                          int64_t workers) {
    const WinogradShape s = square(batch, channels, features, side);
    const WinogradMachine m;
    const WinogradGradGrid grid = winograd_grad_grid(s, m, workers);
    Parts parts;
    for (int64_t i = 0; i < grid.regions(s); ++i)
        for (int64_t split = 0; split < grid.splits; ++split) {
            const WinogradRegion r = grid.region(i, s, m);
            parts.push_back({split, grid.first_tile(split, s), grid.first_tile(split + 1, s),
                             r.first_channel, r.last_channel, r.first_vector, r.last_vector});
        }
    return parts;
}

}  // namespace
}  // namespace pooling_ext

PYBIND11_MODULE(_C, m) {
    m.attr("compiler") =
#ifdef __clang__
        "clang " __clang_version__;
#else
        "gcc " __VERSION__;
#endif
    m.attr("torch_target") = POOLING_EXT_TORCH_TARGET;
    m.attr("build_torch") = POOLING_EXT_BUILD_TORCH;
    m.attr("isas") = pooling_ext::available_isas();
    m.attr("isa") = pooling_ext::chosen_isa();
    m.def("output_size", &pooling_ext::output_size, py::arg("size"), py::arg("kernel_size"),
          py::arg("stride"), py::arg("pad_before"), py::arg("pad_after"), py::arg("dilation"),
          py::arg("ceil_mode"), "Output size along one axis, as the kernels compute it.");
    m.def("winograd_tasks", &pooling_ext::winograd_tasks, py::arg("batch"), py::arg("channels"),
          py::arg("features"), py::arg("side"), py::arg("stats"), py::arg("workers"),
          "Each task's first and last tile, and first and last vector of output channels.");
    m.def("winograd_grad_tasks", &pooling_ext::winograd_grad_tasks, py::arg("batch"),
          py::arg("channels"), py::arg("features"), py::arg("side"), py::arg("workers"),
          "Each task's split, first and last tile, channel and vector of output channels.");
}
