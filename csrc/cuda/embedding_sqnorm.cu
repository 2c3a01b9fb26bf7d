// embedding_sqnorm on CUDA: sqnorm[i] = sum_v ||sum_{t: index[i, t] = v} b[i, t]||^2, bound by reading b once.
//
// First a block per sample sorts its positions by token, so that equal tokens lie in runs: pairs (token, position) in
// bitonic order, in shared memory up to kSorted = 2048 positions (24 KiB), in the workspace beyond, by the same code.
// It leaves the sorted positions, and at the start of each run its length.
//
// Then a block owns kPlaces = 64 places of a sample's sorted order and kColumns = 128 columns of b at a time. Each of
// its eight warps takes every eighth place; where a run starts the warp adds the run's rows, a lane four columns 32
// apart, neighbours reading neighbours, and squares the sums. At most kDepth = 256 rows are added in the accumulation
// type, then sums move on to float64. Squares are added in float64 over the block and thread 0 writes them: partial (B,
// pieces). A third kernel adds a sample's partials. No atomics: same inputs, same bits.
#include "core/storage.h"
#include "cuda/embedding_sqnorm.h"
#include "cuda/reduce.cuh"

namespace ghostgrad::cuda {
namespace {

constexpr int64_t kSorted = 2048;
constexpr int64_t kPlaces = 64, kColumns = 128;
constexpr int kPerLane = kColumns / 32;
constexpr int kDepth = 256;

int64_t column_tiles(const core::Picks& picks) { return core::ceil_div(picks.features, kColumns); }
int64_t pieces_of(const core::Picks& picks) { return core::ceil_div(picks.positions, kPlaces) * column_tiles(picks); }

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

template <class S>
__global__ void __launch_bounds__(kThreads)
    embedding_sqnorm_kernel(const core::Picks picks, int64_t pieces, int64_t column_tiles,
                            const int32_t* __restrict__ position,  // (B, T)
                            const int32_t* __restrict__ length,    // (B, T)
                            double* __restrict__ partial) {        // (B, pieces)
  using A = core::accumulation_t<S>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int64_t unit = blockIdx.x; unit < picks.batch * pieces; unit += gridDim.x) {
    const int64_t sample = unit / pieces, piece = unit % pieces;
    const int64_t first = piece / column_tiles * kPlaces, last = core::minimum(first + kPlaces, picks.positions);
    const int64_t column = piece % column_tiles * kColumns + lane;
    const S* b = static_cast<const S*>(picks.b) + sample * picks.b_batch_stride + column;
    const int32_t* rows = position + sample * picks.positions;
    double squares = 0.0;
    for (int64_t place = first + warp; place < last; place += kWarps) {
      const int32_t count = length[sample * picks.positions + place];
      if (count == 0) continue;
      double total[kPerLane] = {};
      for (int32_t done = 0; done < count; done += kDepth) {
        const int32_t depth = count - done < kDepth ? count - done : kDepth;
        A sums[kPerLane] = {};
#pragma unroll 4
        for (int32_t r = 0; r < depth; ++r) {
          const S* row = b + rows[place + done + r] * picks.b_position_stride;
#pragma unroll
          for (int v = 0; v < kPerLane; ++v) {
            if (column + 32 * v < picks.features) sums[v] += core::to_accumulation(row[32 * v]);
          }
        }
#pragma unroll
        for (int v = 0; v < kPerLane; ++v) total[v] += static_cast<double>(sums[v]);
      }
#pragma unroll
      for (int v = 0; v < kPerLane; ++v) squares += total[v] * total[v];
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
    GHOSTGRAD_TRY(launch(embedding_sqnorm_kernel<S>, Launch{grid_for(picks.batch * pieces), kThreads}, stream, picks,
                         pieces, column_tiles(picks), position, length, partial));
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
