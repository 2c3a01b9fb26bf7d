// row_sqnorm on the CPU: sqnorm[i] = sum_j x[i, j]^2, at the speed of reading x once.
//
// A unit of work is kPiece elements of one row. Within it, four vectors of sums run side by side in the accumulation
// type for at most kRun elements and then move on to float64: a plain float32 sum over millions of elements loses four
// digits, this one loses none that float32 can show.
#include "core/operands.h"
#include "core/reduce.h"
#include "core/storage.h"
#include "core/tiles.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace ghostgrad::cpu::GHOSTGRAD_ISA {
namespace {

constexpr int64_t kPiece = 1 << 15;
constexpr int64_t kRun = 1024;

template <class S>
double sum_of_squares(const S* x, int64_t length) {
  using A = core::accumulation_t<S>;
  constexpr int64_t kStep = kLanes<A>;
  double total = 0.0;
  for (int64_t first = 0; first < length; first += kRun) {
    const int64_t last = core::minimum(length, first + kRun);
    Vector<A> sums[4] = {};
    int64_t j = first;
    for (; j + 4 * kStep <= last; j += 4 * kStep) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const Vector<A> value = load(x + j + v * kStep);
        sums[v] += value * value;
      }
    }
    double sum = static_cast<double>(horizontal_sum<A>((sums[0] + sums[1]) + (sums[2] + sums[3])));
    for (; j < last; ++j) {
      const A value = core::to_accumulation(x[j]);
      sum += static_cast<double>(value * value);
    }
    total += sum;
  }
  return total;
}

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
