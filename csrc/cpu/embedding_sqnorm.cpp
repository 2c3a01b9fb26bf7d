// embedding_sqnorm on the CPU: sqnorm[i] = sum_v ||sum_{t: index[i, t] = v} b[i, t]||^2. Reads b once.
//
// A unit of work is one sample, or one of several parts of its tokens where the batch alone is too small to go round. A
// thread chains the positions of a sample token by token (Chains), once, and takes the tokens in the order in which
// they first appear, so that b is read almost in order: the rows of a token are added in a buffer of kRun elements that
// stays in the first cache, and the sum is squared. A token that stands alone, most of them in most texts, is squared
// where it lies. The result is a float64 partial, partials are added in a fixed order, and the cut into units does not
// depend on threads: neither do the bits.
//
// Summation: at most kDepth rows in a row are added in the accumulation type, then sums move on to float64. Memory
// beside the operands: 24 to 32 bytes per position of one sample and one buffer per thread.
#include "core/operands.h"
#include "core/reduce.h"
#include "core/storage.h"
#include "core/tiles.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "cpu/squares.h"

namespace ghostgrad::cpu::GHOSTGRAD_ISA {
namespace {

constexpr int64_t kDepth = 256;
// Pieces of work wanted, and how many elements of b one must be worth before a sample is cut up.
constexpr int64_t kUnits = 16;
constexpr int64_t kElementsPerUnit = 1 << 14;

// Spreads tokens evenly over 64 bits (the finaliser of MurmurHash3).
GHOSTGRAD_HD uint64_t hash_of(int64_t token) {
  uint64_t h = static_cast<uint64_t>(token);
  h = (h ^ (h >> 33)) * 0xff51afd7ed558ccdull;
  h = (h ^ (h >> 33)) * 0xc4ceb9fe1a85ec53ull;
  return h ^ (h >> 33);
}

// The positions of one sample's tokens: that of token r stands first at first(r), and after position t at next(t), in
// order of position. Found by a hash table that has at least two slots per position.
class Chains {
 public:
  explicit Chains(int64_t positions)
      : slots_(slots_for(positions)),
        scratch_(Scratch::room<int64_t>(positions) + 2 * Scratch::room<int32_t>(positions) +
                 Scratch::room<int32_t>(slots_)),
        token_(scratch_.take<int64_t>(positions)),
        first_(scratch_.take<int32_t>(positions)),
        next_(scratch_.take<int32_t>(positions)),
        last_(scratch_.take<int32_t>(slots_)) {}

  // Chains the positions of `sample` and returns how many different tokens it has.
  int64_t link(const core::Picks& picks, int64_t sample) {
    memset(last_, -1, static_cast<size_t>(slots_) * sizeof(int32_t));
    int64_t tokens = 0;
    for (int64_t t = 0; t < picks.positions; ++t) {
      const int64_t token = picks.token(sample, t);
      if (token < 0) continue;
      uint64_t slot = hash_of(token) & static_cast<uint64_t>(slots_ - 1);
      while (last_[slot] >= 0 && token_[last_[slot]] != token) slot = (slot + 1) & static_cast<uint64_t>(slots_ - 1);
      const int32_t here = static_cast<int32_t>(t);
      if (last_[slot] < 0) {
        first_[tokens++] = here;
      } else {
        next_[last_[slot]] = here;
      }
      token_[t] = token;
      next_[t] = -1;
      last_[slot] = here;
    }
    return tokens;
  }
  int64_t first(int64_t r) const { return first_[r]; }
  int64_t next(int64_t t) const { return next_[t]; }  // or -1

 private:
  static int64_t slots_for(int64_t positions) {
    int64_t slots = 2;
    while (slots < 2 * positions) slots *= 2;
    return slots;
  }
  int64_t slots_;
  Scratch scratch_;
  int64_t* token_;          // (T,)
  int32_t *first_, *next_;  // (T,)
  int32_t* last_;           // (slots,) the last position so far of the token in a slot, or -1
};

// to += from.
template <class S, class A>
GHOSTGRAD_HD void add(const S* from, int64_t length, A* to) {
  int64_t j = 0;
  for (; j + kLanes<A> <= length; j += kLanes<A>) {
    const Vector<A> sum = load(to + j) + load(from + j);
    memcpy(to + j, &sum, sizeof(sum));
  }
  for (; j < length; ++j) to[j] += core::to_accumulation(from[j]);
}

// Moves sums on to float64.
template <class A>
void flush(A* sums, int64_t length, double* total) {
  for (int64_t j = 0; j < length; ++j) {
    total[j] += static_cast<double>(sums[j]);
    sums[j] = A(0);
  }
}

// ||sum of the chained rows||^2 over `length` <= kRun columns.
template <class S, class A = core::accumulation_t<S>>
double squared_sum(const S* b, int64_t stride, const Chains& chains, int64_t t, int64_t length,
                   A* sums,          // (kRun,)
                   double* total) {  // (kRun,)
  memset(sums, 0, static_cast<size_t>(length) * sizeof(A));
  int64_t rows = 0;
  for (; t >= 0; t = chains.next(t)) {
    if (rows == kDepth) memset(total, 0, static_cast<size_t>(length) * sizeof(double));
    if (rows > 0 && rows % kDepth == 0) flush(sums, length, total);
    add(b + t * stride, length, sums);
    ++rows;
  }
  if (rows <= kDepth) return sum_of_squares(sums, length);
  flush(sums, length, total);
  return sum_of_squares(total, length);
}

template <class S>
void run(const core::Picks& picks, void* sqnorm, ParallelFor parallel) {
  using A = core::accumulation_t<S>;
  const int64_t parts = core::maximum(
      1, core::minimum(kUnits / core::maximum(picks.batch, 1), picks.positions * picks.features / kElementsPerUnit));
  Scratch scratch(Scratch::room<double>(picks.batch * parts));
  double* partial = scratch.take<double>(picks.batch * parts);  // (B, parts)
  auto body = [&](int64_t begin, int64_t end) {
    Chains chains(picks.positions);
    Scratch buffers(Scratch::room<A>(kRun) + Scratch::room<double>(kRun));
    A* sums = buffers.take<A>(kRun);
    double* total = buffers.take<double>(kRun);
    int64_t linked = -1, tokens = 0;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t sample = unit / parts, part = unit % parts;
      if (sample != linked) tokens = chains.link(picks, sample);
      linked = sample;
      const S* b = static_cast<const S*>(picks.b) + sample * picks.b_batch_stride;
      double squares = 0.0;
      for (int64_t r = tokens * part / parts; r < tokens * (part + 1) / parts; ++r) {
        const int64_t t = chains.first(r);
        if (chains.next(t) < 0) {
          squares += sum_of_squares(b + t * picks.b_position_stride, picks.features);
          continue;
        }
        for (int64_t first = 0; first < picks.features; first += kRun) {
          const int64_t length = core::minimum(kRun, picks.features - first);
          squares += squared_sum(b + first, picks.b_position_stride, chains, t, length, sums, total);
        }
      }
      partial[unit] = squares;
    }
  };
  const double operations = static_cast<double>(picks.batch) * static_cast<double>(picks.positions) *
                            static_cast<double>(32 + 16 * picks.features);
  parallel(picks.batch * parts, operations, body);

  for (int64_t i = 0; i < picks.batch; ++i) {
    static_cast<A*>(sqnorm)[i] = static_cast<A>(core::pairwise_sum(partial + i * parts, parts, 1));
  }
}

}  // namespace

void embedding_sqnorm(const core::Picks& picks, void* sqnorm, ParallelFor parallel) {
  GHOSTGRAD_FOR_DTYPE(picks.dtype, run, picks, sqnorm, parallel)
}

}  // namespace ghostgrad::cpu::GHOSTGRAD_ISA
