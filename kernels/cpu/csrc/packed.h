// A weight in its storage layout: rows of little-endian codes, channels fastest, one float16 scale per group.
#pragma once

#include "floats.h"

struct Packed {
    const uint8_t* codes;
    const Half* scale;
    const uint8_t* zero;   // null: 2^(bits-1)
    const float* levels;  // for nf4; null: affine
    int64_t bits, out, channels, taps, group, rotated;
    float norm;

    int64_t length() const { return channels * taps; }
    int zero_of(int64_t at) const { return zero ? zero[at] : 1 << (bits - 1); }
#if defined(WIDE_VECTORS)
    bool halves() const { return bits == 4 && (group % 2 == 0 || group >= length()); }  // groups start at whole bytes

    __m512 weights(int64_t at) const {
        const __m512i codes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512 steps = _mm512_cvtepi32_ps(_mm512_sub_epi32(codes, _mm512_set1_epi32(levels ? 0 : zero_of(at))));
        const __m512 factor = _mm512_cvtph_ps(_mm256_set1_epi16(int16_t(scale[at].bits)));
        return _mm512_mul_ps(levels ? _mm512_loadu_ps(levels) : steps, factor);
    }
#else
    bool halves() const { return false; }
#endif
};
