// What ops ask of Python.
#pragma once

namespace ghostgrad {

// Whether PyTorch lets float32 products on a GPU round their operands to tf32, as its user has set it in
// torch.backends.cuda.matmul.fp32_precision and torch.backends.cudnn.conv.fp32_precision (and by the older allow_tf32).
// The stable ABI does not say. About a microsecond.
bool tf32_in_matmul();
bool tf32_in_conv();

}  // namespace ghostgrad
