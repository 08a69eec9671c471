// The activations that a convolution's epilogue may have.
#pragma once

namespace pooling_ext {

// In the order of pooling_ext.ops.depthwise_conv.ACTIVATIONS.
enum class Activation { None, Relu, Relu6, Silu, Hardswish, LeakyRelu, Gelu, Hardsigmoid };

}  // namespace pooling_ext
