// embedding_sqnorm on CUDA: sqnorm[i] = sum_v ||sum_{t: index[i, t] = v} b[i, t]||^2, bound by reading b once.
//
// First a block per sample sorts its positions by token, so that equal tokens lie in runs: pairs (token, position) in
// bitonic order, in shared memory up to kSorted = 2048 positions (24 KiB), in the workspace beyond, by the same code.
// It leaves the sorted positions, and at the start of each run its length.
//
// Then a block owns kPlaces = 64 places of a sample's sorted order and a tile of columns of b at a time: what a team of
// threads, up to a warp, reads as vectors of 16 bytes. The teams take turns at the places; where a run starts, a team
// adds the run's rows and squares the sums. It has four places in flight, since most runs are a single row. At most
// kDepth = 256 rows are added in the accumulation type, then sums move on to float64. Squares are added in float64 over
// the block and thread 0 writes them: partial (B, pieces). A third kernel adds a sample's partials. Where rows do not
// all begin at 16 bytes, a thread owns as many columns, one element each. No atomics: same inputs, same bits.
#include "core/storage.h"
#include "cuda/embedding_sqnorm.h"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace ghostgrad::cuda {
namespace {

constexpr int64_t kSorted = 2048;
constexpr int64_t kPlaces = 64;
constexpr int kDepth = 256;

// The cut of b's columns: teams of `lanes` threads, with a vector each.
struct Columns {
  int lanes;
  int64_t tiles;
};
Columns columns_of(const core::Picks& picks) {
  const int64_t bytes = element_bytes(picks.dtype), vectors = core::ceil_div(picks.features * bytes, 16);
  const int lanes = power_of_two(vectors, 32);
  return Columns{lanes, core::ceil_div(vectors, lanes)};
}
int64_t pieces_of(const core::Picks& picks) {
  return core::ceil_div(picks.positions, kPlaces) * columns_of(picks).tiles;
}

// The whole block sorts `count` pairs by token. A bitonic network all of whose comparisons point upwards: the first
// step of each merge compares mirror images. What lies past the end counts as larger than everything, so it stays there
// and needs no memory.
__device__ __forceinline__ void sort_pairs(int64_t* token, int32_t* position, uint32_t count) {
  for (uint32_t size = 2; size < 2 * count; size *= 2) {
    for (uint32_t step = size / 2; step > 0; step /= 2) {
      __syncthreads();
      for (uint32_t pair = threadIdx.x; 2 * pair < count + size; pair += kThreads) {
        const uint32_t low = 2 * pair - (pair & (step - 1));  // pairs lie `step` apart in stretches of 2 * step
        const uint32_t high = step == size / 2 ? low ^ (size - 1) : low + step;
        if (high >= count) continue;
        const int64_t x = token[low], y = token[high];
        if (x <= y) continue;
        token[low] = y;
        token[high] = x;
        const int32_t s = position[low];
        position[low] = position[high];
        position[high] = s;
      }
    }
  }
  __syncthreads();
}

// kShared: whether the pairs are sorted in shared memory.
template <bool kShared>
__global__ void __launch_bounds__(kThreads) sort_tokens(const core::Picks picks,
                                                        int64_t* __restrict__ token,     // (B, T), unless kShared
                                                        int32_t* __restrict__ position,  // (B, T) sorted by token
                                                        int32_t* __restrict__ length) {  // (B, T) of runs, 0 inside
  __shared__ int64_t shared_token[kShared ? kSorted : 1];
  __shared__ int32_t shared_position[kShared ? kSorted : 1];
  for (int64_t sample = blockIdx.x; sample < picks.batch; sample += gridDim.x) {
    const int64_t offset = sample * picks.positions;
    int64_t* tokens = kShared ? shared_token : token + offset;
    int32_t* positions = kShared ? shared_position : position + offset;
#pragma unroll 1  // unrolled, with the branch on the width of an index in it, it makes ptxas spill
    for (int64_t t = threadIdx.x; t < picks.positions; t += kThreads) {
      tokens[t] = picks.token(sample, t);
      positions[t] = static_cast<int32_t>(t);
    }
    sort_pairs(tokens, positions, static_cast<uint32_t>(picks.positions));
    for (int64_t place = threadIdx.x; place < picks.positions; place += kThreads) {
      const int64_t here = tokens[place];
      int64_t end = place;
      if (here >= 0 && (place == 0 || tokens[place - 1] != here)) {
        for (int64_t beyond = picks.positions; end < beyond;) {  // the first place of a larger token
          const int64_t middle = (end + beyond) / 2;
          if (tokens[middle] == here) {
            end = middle + 1;
          } else {
            beyond = middle;
          }
        }
      }
      length[offset + place] = static_cast<int32_t>(end - place);
      if (kShared) position[offset + place] = positions[place];
    }
    __syncthreads();  // shared memory is free for the next sample
  }
}

template <class S, bool kAligned>
__global__ void __launch_bounds__(kThreads, 1)
    embedding_sqnorm_kernel(const core::Picks picks, const Columns columns, int64_t pieces,
                            const int32_t* __restrict__ position,  // (B, T)
                            const int32_t* __restrict__ length,    // (B, T)
                            double* __restrict__ partial) {        // (B, pieces)
  using A = core::accumulation_t<S>;
  using Vector = Pack<S, kVector<S>>;
  constexpr int kAtOnce = 4;
  const int lanes = columns.lanes, teams = kThreads / lanes;
  const int team = static_cast<int>(threadIdx.x) / lanes, lane = static_cast<int>(threadIdx.x) % lanes;
  for (int64_t unit = blockIdx.x; unit < picks.batch * pieces; unit += gridDim.x) {
    const int64_t sample = quotient(unit, pieces), piece = unit - sample * pieces;
    const int64_t strip = quotient(piece, columns.tiles), first = strip * kPlaces;
    const int places = static_cast<int>(core::minimum(kPlaces, picks.positions - first));
    const int64_t column = (piece - strip * columns.tiles) * lanes * kVector<S> + lane * (kAligned ? kVector<S> : 1);
    const S* b = static_cast<const S*>(picks.b) + sample * picks.b_batch_stride;
    const int32_t* rows = position + sample * picks.positions + first;
    const int32_t* counts = length + sample * picks.positions + first;
    const auto read = [&](int32_t row) {
      const S* at = b + row * picks.b_position_stride + column;
      Vector vector{};
      if constexpr (kAligned) {
        if (column < picks.features) vector = load<kVector<S>>(at);
      } else {
#pragma unroll
        for (int e = 0; e < kVector<S>; ++e) {
          if (column + e * lanes < picks.features) vector.element[e] = at[e * lanes];
        }
      }
      return vector;
    };
    double squares = 0.0;
    for (int place = team; place < places; place += kAtOnce * teams) {
      int32_t count[kAtOnce], row[kAtOnce];
      Vector vectors[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int at = place + u * teams;
        count[u] = at < places ? counts[at] : 0;
        row[u] = at < places ? rows[at] : 0;
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) vectors[u] = count[u] > 0 ? read(row[u]) : Vector{};
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (count[u] == 0) continue;
        A sums[kVector<S>];
#pragma unroll
        for (int e = 0; e < kVector<S>; ++e) sums[e] = core::to_accumulation(vectors[u].element[e]);
        double total[kVector<S>] = {};
        for (int32_t from = 1; from < count[u]; from += kDepth) {
          const int32_t to = count[u] - from < kDepth ? count[u] : from + kDepth;
#pragma unroll 2
          for (int32_t r = from; r < to; ++r) {
            const Vector next = read(rows[place + u * teams + r]);
#pragma unroll
            for (int e = 0; e < kVector<S>; ++e) sums[e] += core::to_accumulation(next.element[e]);
          }
#pragma unroll
          for (int e = 0; e < kVector<S>; ++e) {
            total[e] += static_cast<double>(sums[e]);
            sums[e] = A(0);
          }
        }
#pragma unroll
        for (int e = 0; e < kVector<S>; ++e) {
          const double sum = total[e] + static_cast<double>(sums[e]);
          squares += sum * sum;
        }
      }
    }
    const double sum = block_sum(squares);
    if (threadIdx.x == 0) partial[unit] = sum;
  }
}

// The workspace: partial (B, pieces), then token (B, T) if it does not fit into shared memory, position and length.
int64_t tokens_kept(const core::Picks& picks) { return picks.positions > kSorted ? picks.batch * picks.positions : 0; }

template <class S>
cudaError_t run(const core::Picks& picks, void* sqnorm, void* workspace, cudaStream_t stream) {
  const int64_t pieces = pieces_of(picks);
  double* partial = static_cast<double*>(workspace);
  int64_t* token = reinterpret_cast<int64_t*>(partial + picks.batch * pieces);
  int32_t* position = reinterpret_cast<int32_t*>(token + tokens_kept(picks));
  int32_t* length = position + picks.batch * picks.positions;
  if (picks.batch * pieces > 0) {
    const int grid = grid_for(picks.batch);
    if (tokens_kept(picks) == 0) {
      GHOSTGRAD_TRY(launch(sort_tokens<true>, Launch{grid, kThreads}, stream, picks, token, position, length));
    } else {
      GHOSTGRAD_TRY(launch(sort_tokens<false>, Launch{grid, kThreads}, stream, picks, token, position, length));
    }
    const Launch shape{grid_for(picks.batch * pieces), kThreads};
    const int64_t strides = picks.b_batch_stride | picks.b_position_stride | picks.features;
    const auto kernel = (strides * static_cast<int64_t>(sizeof(S)) | address(picks.b)) % 16 == 0
                            ? embedding_sqnorm_kernel<S, true>
                            : embedding_sqnorm_kernel<S, false>;
    GHOSTGRAD_TRY(launch(kernel, shape, stream, picks, columns_of(picks), pieces, position, length, partial));
  }
  return launch_add_partials(partial, picks.batch, pieces, static_cast<core::accumulation_t<S>*>(sqnorm), stream);
}

}  // namespace

int64_t embedding_sqnorm_workspace(const core::Picks& picks) {
  return picks.batch * pieces_of(picks) * static_cast<int64_t>(sizeof(double)) +
         tokens_kept(picks) * static_cast<int64_t>(sizeof(int64_t)) +
         2 * picks.batch * picks.positions * static_cast<int64_t>(sizeof(int32_t));
}

cudaError_t launch_embedding_sqnorm(const core::Picks& picks, void* sqnorm, void* workspace, cudaStream_t stream) {
  GHOSTGRAD_FOR_DTYPE(picks.dtype, run, picks, sqnorm, workspace, stream)
  return cudaErrorInvalidValue;
}

}  // namespace ghostgrad::cuda
