// row_sqnorm on the CPU: sqnorm[i] = sum_j x[i, j]^2, at the speed of reading x once.
//
// A unit of work is kPiece elements of one row, a float64 partial result; partials are added pairwise in a fixed order.
#include "core/operands.h"
#include "core/reduce.h"
#include "core/storage.h"
#include "core/tiles.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "cpu/squares.h"

namespace ghostgrad::cpu::GHOSTGRAD_ISA {
namespace {

constexpr int64_t kPiece = 1 << 15;

template <class S>
void run(const core::Rows& rows, void* sqnorm, ParallelFor parallel) {
  using A = core::accumulation_t<S>;
  const int64_t pieces = core::ceil_div(rows.length, kPiece);
  Scratch scratch(Scratch::room<double>(rows.batch * pieces));
  double* partial = scratch.take<double>(rows.batch * pieces);  // (B, pieces)
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit / pieces, first = unit % pieces * kPiece;
      const S* x = static_cast<const S*>(rows.x) + row * rows.batch_stride + first;
      partial[unit] = sum_of_squares(x, core::minimum(kPiece, rows.length - first));
    }
  };
  parallel(rows.batch * pieces, 16.0 * static_cast<double>(rows.batch) * static_cast<double>(rows.length), body);

  for (int64_t i = 0; i < rows.batch; ++i) {
    static_cast<A*>(sqnorm)[i] = static_cast<A>(core::pairwise_sum(partial + i * pieces, pieces, 1));
  }
}

}  // namespace

void row_sqnorm(const core::Rows& rows, void* sqnorm, ParallelFor parallel) {
  GHOSTGRAD_FOR_DTYPE(rows.dtype, run, rows, sqnorm, parallel)
}

}  // namespace ghostgrad::cpu::GHOSTGRAD_ISA
