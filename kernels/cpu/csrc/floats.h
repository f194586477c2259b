// Converts float32 to and from stored dtypes: float32, float16 (IEEE 754 binary16) and bfloat16, rounded to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(_OPENMP)
#define PARALLEL_FOR(threads) _Pragma("omp parallel for num_threads(threads) schedule(static) if (threads > 1)")
#else
#define PARALLEL_FOR(threads) (void)(threads);
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))  // so that vectors stay in registers

struct Half {
    uint16_t bits;
};
struct Bfloat {
    uint16_t bits;
};

enum Dtype { FLOAT = 0, HALF = 1, BFLOAT = 2 };

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float widen(float value) { return value; }

inline float widen(Bfloat value) { return as_float(uint32_t(value.bits) << 16); }

inline float widen(Half value) {
    uint32_t sign = uint32_t(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
    if (rest >= 0x7c00) return as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest >= 0x0400) return as_float(sign | ((rest << 13) + (112u << 23)));
    float magnitude = float(rest) * 0x1p-24f;  // subnormal
    return sign ? -magnitude : magnitude;
}

inline void narrow(float value, float* to) { *to = value; }

inline void narrow(float value, Bfloat* to) {
    uint32_t bits = as_bits(value);
    to->bits = value != value ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void narrow(float value, Half* to) {
    uint32_t bits = as_bits(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) {
        to->bits = uint16_t(sign | 0x7e00);
    } else if (rest >= 0x477ff000) {  // rounds to more than 65504
        to->bits = uint16_t(sign | 0x7c00);
    } else if (rest < 0x38800000) {  // subnormal: the float unit rounds at the position where 2^-24 is the last bit
        to->bits = uint16_t(sign | (as_bits(as_float(rest) + 0.5f) - as_bits(0.5f)));
    } else {
        to->bits = uint16_t(sign | (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13);
    }
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define WIDE_VECTORS 1

inline __mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xffff : __mmask16((1u << count) - 1); }

inline __m512 load16(const float* from, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, from); }

inline __m512 load16(const Half* from, __mmask16 lanes) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, from));
}

inline __m512 load16(const Bfloat* from, __mmask16 lanes) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from)), 16));
}

inline void store16(float* to, __m512 values, __mmask16 lanes) {
    if (lanes == 0xffff)
        _mm512_storeu_ps(to, values);
    else
        _mm512_mask_storeu_ps(to, lanes, values);
}

inline void store16(Half* to, __m512 values, __mmask16 lanes) {
    _mm256_mask_storeu_epi16(to, lanes, _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline void store16(Bfloat* to, __m512 values, __mmask16 lanes) {
    __m512i bits = _mm512_castps_si512(values);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i high = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    high = _mm512_mask_mov_epi32(high, nan, _mm512_set1_epi32(0x7fc0));
    _mm256_mask_storeu_epi16(to, lanes, _mm512_cvtepi32_epi16(high));
}
#endif

template <class T>
inline void narrow_row(const float* from, int64_t length, T* to) {
    int64_t i = 0;
#if defined(WIDE_VECTORS)
    for (; i < length; i += 16) store16(to + i, load16(from + i, first_lanes(length - i)), first_lanes(length - i));
#endif
    for (; i < length; i++) narrow(from[i], to + i);
}

template <class T>
inline void widen_row(const T* from, int64_t length, float* to) {
    int64_t i = 0;
#if defined(WIDE_VECTORS)
    for (; i < length; i += 16) store16(to + i, load16(from + i, first_lanes(length - i)), first_lanes(length - i));
#endif
    for (; i < length; i++) to[i] = widen(from[i]);
}
