// The weights that packed tensors stand for, in the layout that torch's layers want; bit-equal to the plain torch code.
//
// affine and nf4: rows of little-endian codes, channels fastest (kernels/packing.py), a float16 scale for each group.
// int8 and fp8: a byte for each weight in the weight's own shape, a float32 scale for each output channel.

#include "floats.h"

#include <vector>

#if defined(__BMI2__)
#include <immintrin.h>
#endif

namespace {

// 8 codes fill BITS whole bytes.
template <int BITS>
inline void unpack8(const uint8_t* from, uint8_t* codes) {
    uint64_t word = 0;
    std::memcpy(&word, from, BITS);
    constexpr uint64_t mask = (1u << BITS) - 1;
#if defined(__BMI2__)
    word = _pdep_u64(word, mask * 0x0101010101010101u);
    std::memcpy(codes, &word, 8);
#else
    for (int i = 0; i < 8; i++) codes[i] = uint8_t(word >> (i * BITS) & mask);
#endif
}

template <int BITS>
void unpack(const uint8_t* from, int64_t length, uint8_t* codes) {
    int64_t i = 0;
    for (; i + 8 <= length; i += 8, from += BITS) unpack8<BITS>(from, codes + i);
    if (i < length) {
        uint8_t rest[8] = {}, last[8];
        std::memcpy(rest, from, ((length - i) * BITS + 7) / 8);
        unpack8<BITS>(rest, last);
        std::memcpy(codes + i, last, length - i);
    }
}

using Unpack = void (*)(const uint8_t*, int64_t, uint8_t*);
const Unpack UNPACK[] = {nullptr,   nullptr,   unpack<2>, unpack<3>, unpack<4>,
                         unpack<5>, unpack<6>, unpack<7>, unpack<8>};

void decode(const uint8_t* codes, int64_t length, int zero, float scale, float* row) {
    for (int64_t i = 0; i < length; i++) row[i] = float(int(codes[i]) - zero) * scale;
}

void look_up(const uint8_t* codes, int64_t length, const float* levels, float scale, float* row) {
    int64_t i = 0;
#if defined(WIDE_VECTORS)
    __m512 table = _mm512_loadu_ps(levels), wide = _mm512_set1_ps(scale);
    for (; i + 16 <= length; i += 16) {
        __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
        _mm512_storeu_ps(row + i, _mm512_mul_ps(_mm512_permutexvar_ps(index, table), wide));
    }
#endif
    for (; i < length; i++) row[i] = levels[codes[i]] * scale;
}

// The butterflies of kernels/hadamard.py, in its order: half = 1, 2, 4, ...
template <int HALF>
void butterflies(float* run, int64_t size) {
    for (int64_t i = 0; i < size; i += 2 * HALF)
        for (int j = i; j < i + HALF; j++) {
            float first = run[j], second = run[j + HALF];
            run[j] = first + second;
            run[j + HALF] = first - second;
        }
}

void hadamard(float* run, int64_t size, float norm) {
    if (size > 1) butterflies<1>(run, size);
    if (size > 2) butterflies<2>(run, size);
    if (size > 4) butterflies<4>(run, size);
    if (size > 8) butterflies<8>(run, size);
    if (size > 16) butterflies<16>(run, size);
    if (size > 32) butterflies<32>(run, size);
    if (size > 64) butterflies<64>(run, size);
    for (int64_t i = 0; i < size; i++) run[i] *= norm;
}

// (taps, channels) -> (channels, taps)
template <int TAPS, class T>
void channels_first(const float* row, int64_t channels, int64_t taps, T* to) {
    if (TAPS) taps = TAPS;
    for (int64_t c = 0; c < channels; c++)
        for (int64_t t = 0; t < taps; t++) narrow(row[t * channels + c], to + c * taps + t);
}

template <class T>
void store_row(float* row, int64_t channels, int64_t taps, T* to, float* turned) {
    if (taps == 1) return narrow_row(row, channels, to);
    if (sizeof(T) == 2) {
        channels_first<0>(row, channels, taps, turned);
        return narrow_row(turned, channels * taps, to);
    }
    if (taps == 9) return channels_first<9>(row, channels, taps, to);
    channels_first<0>(row, channels, taps, to);
}

struct Packed {
    const uint8_t* codes;
    const Half* scale;
    const uint8_t* zero;   // null: 2^(bits-1)
    const float* levels;  // of nf4; null: affine
    int64_t bits, out, channels, taps, group, rotated;
    float norm;
};

template <class T>
void dequantize_groups(const Packed& p, T* to, int threads) {
    const int64_t length = p.channels * p.taps, groups = (length + p.group - 1) / p.group;
    const int64_t bytes = (length * p.bits + 7) / 8;
    PARALLEL_FOR(threads)
    for (int64_t n = 0; n < p.out; n++) {
        static thread_local std::vector<uint8_t> codes;
        static thread_local std::vector<float> rows;
        if (int64_t(codes.size()) < length) codes.resize(length);
        if (int64_t(rows.size()) < 2 * length) rows.resize(2 * length);
        UNPACK[p.bits](p.codes + n * bytes, length, codes.data());
        const bool direct = sizeof(T) == 4 && p.taps == 1;
        float* row = direct ? reinterpret_cast<float*>(to + n * length) : rows.data();
        for (int64_t g = 0; g < groups; g++) {
            const int64_t at = g * p.group, size = length - at < p.group ? length - at : p.group;
            const float scale = widen(p.scale[n * groups + g]);
            if (p.levels) {
                look_up(codes.data() + at, size, p.levels, scale, row + at);
            } else {
                const int zero = p.zero ? p.zero[n * groups + g] : 1 << (p.bits - 1);
                decode(codes.data() + at, size, zero, scale, row + at);
            }
            if (p.rotated) hadamard(row + at, size, p.norm);
        }
        if (!direct) store_row(row, p.channels, p.taps, to + n * length, rows.data() + length);
    }
}

template <class T>
void dequantize_bytes(const uint8_t* codes, const float* scale, const float* values, int64_t out, int64_t length, T* to,
                      int threads) {
    PARALLEL_FOR(threads)
    for (int64_t n = 0; n < out; n++) {
        constexpr int64_t piece = 512;
        float row[piece];
        for (int64_t at = 0; at < length; at += piece) {
            const int64_t size = length - at < piece ? length - at : piece;
            const uint8_t* from = codes + n * length + at;
            float* into = sizeof(T) == 4 ? reinterpret_cast<float*>(to + n * length + at) : row;
            if (values) {
                for (int64_t i = 0; i < size; i++) into[i] = values[from[i]] * scale[n];
            } else {
                for (int64_t i = 0; i < size; i++) into[i] = float(int8_t(from[i])) * scale[n];
            }
            if (sizeof(T) == 2) narrow_row(row, size, to + n * length + at);
        }
    }
}

}  // namespace

extern "C" {

// rotated: runs of `group` are rotated by a Hadamard matrix and multiplied by norm = group^-1/2.
void bitpolicy_dequantize_groups(const uint8_t* codes, const void* scale, const uint8_t* zero, const float* levels,
                                 int64_t bits, int64_t out, int64_t channels, int64_t taps, int64_t group,
                                 int64_t rotated, float norm, void* to, int dtype, int threads) {
    const Packed packed{codes, static_cast<const Half*>(scale), zero, levels, bits, out, channels, taps, group, rotated,
                        norm};
    if (dtype == FLOAT) dequantize_groups(packed, static_cast<float*>(to), threads);
    if (dtype == HALF) dequantize_groups(packed, static_cast<Half*>(to), threads);
    if (dtype == BFLOAT) dequantize_groups(packed, static_cast<Bfloat*>(to), threads);
}

// values: what each of the 256 bytes stands for; null: an int8.
void bitpolicy_dequantize_bytes(const uint8_t* codes, const float* scale, const float* values, int64_t out,
                                int64_t length, void* to, int dtype, int threads) {
    if (dtype == FLOAT) dequantize_bytes(codes, scale, values, out, length, static_cast<float*>(to), threads);
    if (dtype == HALF) dequantize_bytes(codes, scale, values, out, length, static_cast<Half*>(to), threads);
    if (dtype == BFLOAT) dequantize_bytes(codes, scale, values, out, length, static_cast<Bfloat*>(to), threads);
}
}
