// 3x3 kernels of 4 bits, (taps, channels) -> (channels, taps). Codes are transposed before they become floats, as bytes are a
// quarter of the work. A tap's scale and zero point are spread once over the 144 weights of sixteen channels.
#pragma once

#include "packed.h"

#if defined(WIDE_VECTORS) && defined(__AVX512VBMI__)
#define HAS_NINE_TAPS 1

namespace {

constexpr int64_t TAPS = 9, CHANNELS = 16, VECTORS = TAPS * CHANNELS / 16;

// Sixteen channels of one tap share a group and fill whole bytes.
inline bool suits_nine_taps(const Packed& p) {
    return p.taps == TAPS && p.bits == 4 && !p.rotated && p.channels % CHANNELS == 0 && p.group % CHANNELS == 0;
}

// The source of weight i = 9 channel + tap: byte 8 tap + channel / 2 of the nine taps' eight bytes, the high half if `high`.
struct Places {
    alignas(64) uint8_t byte[3][64] = {};
    alignas(64) int32_t tap[VECTORS][16];
    uint64_t high[3] = {};

    Places() {
        for (int i = 0; i < TAPS * CHANNELS; i++) {
            const int channel = i / TAPS;
            byte[i / 64][i % 64] = uint8_t(i % TAPS * 8 + channel / 2);
            high[i / 64] |= uint64_t(channel & 1) << i % 64;
            tap[i / 16][i % 16] = i % TAPS;
        }
    }
};

// Scales and zero points of the groups of some channels' nine taps, for each of their 144 weights.
struct NineGrids {
    __m512 scale[VECTORS], zero[VECTORS];

    ALWAYS_INLINE void set(const Packed& p, const Places& places, int64_t first_group, int64_t channel) {
        alignas(64) float scales[16] = {}, zeros[16] = {};
        for (int64_t t = 0; t < TAPS; t++) {
            const int64_t group = first_group + (t * p.channels + channel) / p.group;
            scales[t] = _cvtsh_ss(p.scale[group].bits);
            zeros[t] = float(p.zero_of(group));
        }
        const __m512 all_scales = _mm512_load_ps(scales), all_zeros = _mm512_load_ps(zeros);
        for (int v = 0; v < VECTORS; v++) {
            const __m512i taps = _mm512_load_si512(places.tap[v]);
            scale[v] = _mm512_permutexvar_ps(taps, all_scales);
            zero[v] = _mm512_permutexvar_ps(taps, all_zeros);
        }
    }
};

// Channels [from, end) of a row whose groups begin with `first_group`.
void decode_nine_taps(const Packed& p, const uint8_t* codes, int64_t first_group, int64_t from, int64_t end, float* to) {
    static const Places places;
    const bool aligned = p.channels % p.group == 0;  // group boundaries are at the same channels in all taps
    const int64_t line = p.channels / 2;
    const __m512i low = _mm512_set1_epi8(15);
    NineGrids grids;
    for (int64_t c = from; c < end; c += CHANNELS) {
        if (c == from || !aligned || c % p.group == 0) grids.set(p, places, first_group, c);
        const uint8_t* at = codes + c / 2;
        int64_t taps[TAPS];
        for (int t = 0; t < TAPS; t++) std::memcpy(taps + t, at + t * line, 8);
        const __m512i eight = _mm512_loadu_si512(taps);
        const __m512i ninth = _mm512_castsi128_si512(_mm_cvtsi64_si128(taps[8]));
#pragma GCC unroll 3
        for (int part = 0; part < 3; part++) {
            const __m512i pairs = _mm512_permutex2var_epi8(eight, _mm512_load_si512(places.byte[part]), ninth);
            const __m512i high = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), low);
            alignas(64) uint8_t one[64];
            _mm512_store_si512(one, _mm512_mask_mov_epi8(_mm512_and_si512(pairs, low), places.high[part], high));
#pragma GCC unroll 4
            for (int v = 4 * part; v < 4 * part + 4 && v < VECTORS; v++) {
                const __m128i sixteen = _mm_load_si128(reinterpret_cast<const __m128i*>(one) + v % 4);
                const __m512i code = _mm512_cvtepu8_epi32(sixteen);
                const __m512 step = p.levels ? _mm512_permutexvar_ps(code, _mm512_loadu_ps(p.levels))
                                             : _mm512_sub_ps(_mm512_cvtepi32_ps(code), grids.zero[v]);
                _mm512_storeu_ps(to + 16 * v, _mm512_mul_ps(step, grids.scale[v]));
            }
        }
        to += TAPS * CHANNELS;
    }
}

}  // namespace

#endif
