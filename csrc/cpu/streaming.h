// Non-temporal stores: of results larger than the caches, which would otherwise be read from memory before
// they are written to it.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
#include <immintrin.h>
#endif

namespace imm {
namespace {

// Whether a row that begins here may be written by store_around_caches.
template <typename T>
bool aligned(const void* row) {
  return reinterpret_cast<uintptr_t>(row) % sizeof(at::vec::Vectorized<T>) == 0;
}

#if defined(CPU_CAPABILITY_AVX512)
inline void store_around_caches(const at::vec::Vectorized<float>& v, float* target) { _mm512_stream_ps(target, v); }
inline void store_around_caches(const at::vec::Vectorized<double>& v, double* target) { _mm512_stream_pd(target, v); }
inline void fence_stores() { _mm_sfence(); }
#elif defined(CPU_CAPABILITY_AVX2)
inline void store_around_caches(const at::vec::Vectorized<float>& v, float* target) { _mm256_stream_ps(target, v); }
inline void store_around_caches(const at::vec::Vectorized<double>& v, double* target) { _mm256_stream_pd(target, v); }
inline void fence_stores() { _mm_sfence(); }
#else
template <typename T>
void store_around_caches(const at::vec::Vectorized<T>& v, T* target) {
  v.store(target);
}
inline void fence_stores() {}
#endif

}  // namespace
}  // namespace imm
