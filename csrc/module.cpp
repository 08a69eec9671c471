// The Python module pooling_ext._C: facts of the build, the CPU's instruction set, and the
// geometry. It sees no tensor; the operators register themselves when the library is loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"

namespace py = pybind11;

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
}
