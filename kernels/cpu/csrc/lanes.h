// Sixteen numbers in the vectors that the processor has: one of AVX-512, or several narrower ones into which the compiler
// splits the types below.
#pragma once

#include "floats.h"

namespace {

constexpr int64_t LANES = 16;

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Words __attribute__((vector_size(64)));

ALWAYS_INLINE Floats load(const float* from) {
    Floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

ALWAYS_INLINE Floats spread(float value) { return Floats{} + value; }

#if defined(WIDE_VECTORS)

ALWAYS_INLINE Floats spread(Half value) { return (Floats)_mm512_cvtph_ps(_mm256_set1_epi16(int16_t(value.bits))); }

ALWAYS_INLINE Words bytes(const uint8_t* from) {
    return (Words)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

ALWAYS_INLINE Words signed_bytes(const uint8_t* from) {
    return (Words)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

ALWAYS_INLINE Floats to_floats(Words values) { return (Floats)_mm512_cvtepi32_ps((__m512i)values); }

// table[the lowest four bits of index]
ALWAYS_INLINE Floats chosen(Words index, Floats table) {
    return (Floats)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
}

// sum + a b, rounded once
ALWAYS_INLINE void add_product(Floats a, Floats b, Floats& sum) {
    sum = (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
}

ALWAYS_INLINE float total(Floats values) { return _mm512_reduce_add_ps((__m512)values); }

#else

ALWAYS_INLINE Floats spread(Half value) { return spread(widen(value)); }

ALWAYS_INLINE Words bytes(const uint8_t* from) {
    Words values;
    for (int i = 0; i < LANES; i++) values[i] = from[i];
    return values;
}

ALWAYS_INLINE Words signed_bytes(const uint8_t* from) {
    Words values;
    for (int i = 0; i < LANES; i++) values[i] = int8_t(from[i]);
    return values;
}

ALWAYS_INLINE Floats to_floats(Words values) { return __builtin_convertvector(values, Floats); }

ALWAYS_INLINE Floats chosen(Words index, Floats table) {
    Floats values;
    for (int i = 0; i < LANES; i++) values[i] = table[index[i] & 15];
    return values;
}

ALWAYS_INLINE void add_product(Floats a, Floats b, Floats& sum) { sum += a * b; }

ALWAYS_INLINE float total(Floats values) {
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) values[i] += values[i + width];
    return values[0];
}

#endif

}  // namespace
