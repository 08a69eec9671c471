// The instruction sets the kernels are compiled for, and the one in use.
#pragma once

#include <string>
#include <vector>

namespace pooling_ext {

// Names of the compiled variants that this CPU can run, slowest first.
std::vector<std::string> available_isas();

// The one in use: the last of them, or POOLING_EXT_CPU_ISA. Throws std::invalid_argument if that
// names none of them.
const std::string& chosen_isa();

}  // namespace pooling_ext
