// Dequantizes packed tensors into the memory layout of torch's layers; bit-equal to the plain torch code.
//
// affine and nf4: rows of little-endian codes, channels fastest (kernels/formats/packing.py), one float16 scale per group.
// int8 and fp8: one byte per weight in the weight's own shape, one float32 scale per output channel.

#include "nine_taps.h"

#include <vector>

#if defined(__AVX__) || defined(__BMI2__)
#include <immintrin.h>
#endif

namespace {

// 8 codes fill BITS whole bytes, the low ones of `word`.
template <int BITS>
inline void unpack8(uint64_t word, uint8_t* codes) {
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
    int64_t i = 0, bytes = (length * BITS + 7) / 8;
    for (; bytes >= 8; i += 8, from += BITS, bytes -= BITS) {
        uint64_t word;
        std::memcpy(&word, from, 8);
        unpack8<BITS>(word, codes + i);
    }
    for (; i < length; i += 8, from += BITS, bytes -= BITS) {
        uint64_t word = 0;
        std::memcpy(&word, from, bytes < BITS ? bytes : BITS);
        unpack8<BITS>(word, codes + i);
    }
}

using Unpack = void (*)(const uint8_t*, int64_t, uint8_t*);
const Unpack UNPACK[] = {nullptr,   nullptr,   unpack<2>, unpack<3>, unpack<4>,
                         unpack<5>, unpack<6>, unpack<7>, unpack<8>};

void decode(const uint8_t* codes, int64_t length, int zero, float scale, float* row) {
    int64_t i = 0;
#if defined(WIDE_VECTORS)
    __m512i middle = _mm512_set1_epi32(zero);
    __m512 wide = _mm512_set1_ps(scale);
    for (; i + 16 <= length; i += 16) {
        __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
        _mm512_storeu_ps(row + i, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(code, middle)), wide));
    }
#endif
    for (; i < length; i++) row[i] = float(int(codes[i]) - zero) * scale;
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

#if defined(WIDE_VECTORS)
// 4-bit weights, 16 at a time: a group has only 16 distinct weights, which fill one vector. Each byte is widened to eight and
// its high half moved to the upper four; the lowest four bits of each four are the index.
inline __m512 chosen(__m128i bytes, __m512 weights) {
    const __m512i pairs = _mm512_cvtepu8_epi64(bytes);
    return _mm512_permutexvar_ps(_mm512_or_si512(pairs, _mm512_slli_epi64(pairs, 28)), weights);
}

void decode_halves(const uint8_t* bytes, int64_t length, __m512 weights, float* row) {
    int64_t i = 0;
    for (; i + 16 <= length; i += 16, bytes += 8)
        _mm512_storeu_ps(row + i, chosen(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)), weights));
    if (i == length) return;
    uint64_t rest = 0;
    std::memcpy(&rest, bytes, (length - i + 1) / 2);
    _mm512_mask_storeu_ps(row + i, first_lanes(length - i), chosen(_mm_cvtsi64_si128(rest), weights));
}
#endif

// The butterflies of kernels/formats/hadamard.py, in the same order: half = 1, 2, 4, ...
template <int HALF>
void butterflies(float* run, int64_t size) {
    for (int64_t i = 0; i < size; i += 2 * HALF)
        for (int j = i; j < i + HALF; j++) {
            float first = run[j], second = run[j + HALF];
            run[j] = first + second;
            run[j + HALF] = first - second;
        }
}

#if defined(WIDE_VECTORS)
// Stages 1, 2, 4 and 8 on 16 values.
inline __m512 hadamard16(__m512 v) {
    __m512 p = _mm512_permute_ps(v, 0xb1);
    v = _mm512_mask_sub_ps(_mm512_add_ps(v, p), 0xaaaa, p, v);
    p = _mm512_permute_ps(v, 0x4e);
    v = _mm512_mask_sub_ps(_mm512_add_ps(v, p), 0xcccc, p, v);
    p = _mm512_shuffle_f32x4(v, v, 0xb1);
    v = _mm512_mask_sub_ps(_mm512_add_ps(v, p), 0xf0f0, p, v);
    p = _mm512_shuffle_f32x4(v, v, 0x4e);
    return _mm512_mask_sub_ps(_mm512_add_ps(v, p), 0xff00, p, v);
}
#endif

#if defined(WIDE_VECTORS)
template <int V>
void hadamard_in_registers(float* run, float norm) {
    __m512 v[V];
#pragma GCC unroll 8
    for (int i = 0; i < V; i++) v[i] = hadamard16(_mm512_loadu_ps(run + 16 * i));
#pragma GCC unroll 3
    for (int half = 1; half < V; half *= 2)
#pragma GCC unroll 8
        for (int i = 0; i < V; i++)
            if (!(i & half)) {
                __m512 first = v[i], second = v[i + half];
                v[i] = _mm512_add_ps(first, second);
                v[i + half] = _mm512_sub_ps(first, second);
            }
#pragma GCC unroll 8
    for (int i = 0; i < V; i++) _mm512_storeu_ps(run + 16 * i, _mm512_mul_ps(v[i], _mm512_set1_ps(norm)));
}
#endif

void hadamard(float* run, int64_t size, float norm) {
#if defined(WIDE_VECTORS)
    if (size == 32) return hadamard_in_registers<2>(run, norm);
    if (size == 64) return hadamard_in_registers<4>(run, norm);
    if (size == 128) return hadamard_in_registers<8>(run, norm);
#endif
    if (size > 1) butterflies<1>(run, size);
    if (size > 2) butterflies<2>(run, size);
    if (size > 4) butterflies<4>(run, size);
    if (size > 8) butterflies<8>(run, size);
    if (size > 16) butterflies<16>(run, size);
    if (size > 32) butterflies<32>(run, size);
    if (size > 64) butterflies<64>(run, size);
    for (int64_t i = 0; i < size; i++) run[i] *= norm;
}

#if defined(__AVX__)
// Transposes 8 rows of 8 floats, `from_step` apart, to rows `to_step` apart.
inline void turn8(const float* from, int64_t from_step, float* to, int64_t to_step) {
    __m256 row[8], pair[8], four[8];
    for (int i = 0; i < 8; i++) row[i] = _mm256_loadu_ps(from + i * from_step);
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            four[i + 2 * j] = _mm256_shuffle_ps(pair[i + j], pair[i + j + 2], 0x44);
            four[i + 2 * j + 1] = _mm256_shuffle_ps(pair[i + j], pair[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(to + i * to_step, _mm256_permute2f128_ps(four[i], four[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * to_step, _mm256_permute2f128_ps(four[i], four[i + 4], 0x31));
    }
}
#endif

// (taps, channels) -> (channels, taps)
void channels_first(const float* row, int64_t channels, int64_t taps, float* to) {
    int64_t c = 0;
#if defined(__AVX__)
    for (; c + 8 <= channels; c += 8) {
        int64_t t = 0;
        for (; t + 8 <= taps; t += 8) turn8(row + t * channels + c, channels, to + c * taps + t, taps);
        for (; t < taps; t++)
            for (int64_t i = c; i < c + 8; i++) to[i * taps + t] = row[t * channels + i];
    }
#endif
    for (; c < channels; c++)
        for (int64_t t = 0; t < taps; t++) to[c * taps + t] = row[t * channels + c];
}

void store_row(const float* row, int64_t channels, int64_t taps, float* to, float*) {
    channels_first(row, channels, taps, to);
}

template <class T>
void store_row(const float* row, int64_t channels, int64_t taps, T* to, float* turned) {
    if (taps > 1) channels_first(row, channels, taps, turned);
    narrow_row(taps > 1 ? turned : row, channels * taps, to);
}

// Codes [at, at + size) of row n, where `at` starts a group. `codes` are packed if they are half bytes.
void decode_groups(const Packed& p, const uint8_t* codes, int64_t n, int64_t groups, int64_t at, int64_t size,
                   float* to) {
    const bool halves = p.halves();
    for (int64_t end = at + size; at < end; at += p.group, to += p.group) {
        const int64_t group = n * groups + at / p.group, run = end - at < p.group ? end - at : p.group;
        if (halves) {
#if defined(WIDE_VECTORS)
            decode_halves(codes + at / 2, run, p.weights(group), to);
#endif
        } else if (p.levels) {
            look_up(codes + at, run, p.levels, widen(p.scale[group]), to);
        } else {
            decode(codes + at, run, p.zero_of(group), widen(p.scale[group]), to);
        }
        if (p.rotated) hadamard(to, run, p.norm);
    }
}

constexpr int64_t BLOCK = 256;  // channels transposed at once, so that all their taps stay in the L1 cache

template <class T>
void dequantize_groups(const Packed& p, T* to, int threads) {
    const int64_t length = p.length(), groups = (length + p.group - 1) / p.group;
    const int64_t bytes = (length * p.bits + 7) / 8;
    const bool in_blocks = p.taps > 1 && p.channels % p.group == 0 && p.group <= BLOCK && BLOCK % p.group == 0;
    const int64_t block = in_blocks ? BLOCK : p.channels;
    PARALLEL_FOR(threads)
    for (int64_t n = 0; n < p.out; n++) {
        static thread_local std::vector<uint8_t> unpacked;
        static thread_local std::vector<float> rows;
        const int64_t aligned = ((block > BLOCK ? block : BLOCK) * p.taps + 15) / 16 * 16;
        if (int64_t(rows.size()) < 2 * aligned + 16) rows.resize(2 * aligned + 16);
        float* row = rows.data() + (-uintptr_t(rows.data()) / 4 & 15);  // aligned to a cache line
        const uint8_t* codes = p.codes + n * bytes;
#if defined(HAS_NINE_TAPS)
        if (suits_nine_taps(p)) {
            if (sizeof(T) == 4) {
                decode_nine_taps(p, codes, n * groups, 0, p.channels, reinterpret_cast<float*>(to + n * length));
                continue;
            }
            for (int64_t c = 0; c < p.channels; c += BLOCK) {
                const int64_t end = p.channels - c < BLOCK ? p.channels : c + BLOCK;
                decode_nine_taps(p, codes, n * groups, c, end, row);
                narrow_row(row, (end - c) * p.taps, to + n * length + c * p.taps);
            }
            continue;
        }
#endif
        if (!p.halves()) {
            if (int64_t(unpacked.size()) < length + 8) unpacked.resize(length + 8);  // unpacked in eights
            UNPACK[p.bits](codes, length, unpacked.data());
            codes = unpacked.data();
        }
        if (sizeof(T) == 4 && p.taps == 1) {
            decode_groups(p, codes, n, groups, 0, length, reinterpret_cast<float*>(to + n * length));
            continue;
        }
        for (int64_t c = 0; c < p.channels; c += block) {
            const int64_t channels = p.channels - c < block ? p.channels - c : block;
            if (in_blocks)
                for (int64_t t = 0; t < p.taps; t++)
                    decode_groups(p, codes, n, groups, t * p.channels + c, channels, row + t * channels);
            else
                decode_groups(p, codes, n, groups, 0, length, row);
            store_row(row, channels, p.taps, to + n * length + c * p.taps, row + aligned);
        }
    }
}

#if defined(WIDE_VECTORS)
// float8 e4m3: as bits of a float32, exponent and mantissa give the value divided by 2^120.
inline __m512 float8(__m128i bytes) {
    const __m512i codes = _mm512_cvtepu8_epi32(bytes), rest = _mm512_and_si512(codes, _mm512_set1_epi32(0x7f));
    const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(codes, _mm512_set1_epi32(0x80)), 24);
    const __m512i bits = _mm512_or_si512(sign, _mm512_slli_epi32(rest, 20));
    const __m512 values = _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(0x1p120f));
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(rest, _mm512_set1_epi32(0x7f));
    return _mm512_mask_mov_ps(values, nan, _mm512_set1_ps(as_float(0x7fc00000)));
}
#endif

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
                int64_t i = 0;
#if defined(WIDE_VECTORS)
                for (; i + 16 <= size; i += 16) {
                    const __m512 value = float8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
                    _mm512_storeu_ps(into + i, _mm512_mul_ps(value, _mm512_set1_ps(scale[n])));
                }
#endif
                for (; i < size; i++) into[i] = values[from[i]] * scale[n];
            } else {
                for (int64_t i = 0; i < size; i++) into[i] = float(int8_t(from[i])) * scale[n];
            }
            if (sizeof(T) == 2) narrow_row(row, size, to + n * length + at);
        }
    }
}

}  // namespace

extern "C" {

// plan: bits, out, channels, taps, group, rotated, the bits of norm, dtype. If rotated, each group is multiplied by a Hadamard
// matrix and by norm = group^-1/2.
void bitpolicy_dequantize_groups(const int64_t* plan, const uint8_t* codes, const void* scale, const uint8_t* zero,
                                 const float* levels, void* to, int threads) {
    const Half* scales = static_cast<const Half*>(scale);
    const float norm = as_float(uint32_t(plan[6]));
    const Packed packed{codes, scales, zero, levels, plan[0], plan[1], plan[2], plan[3], plan[4], plan[5], norm};
    if (plan[7] == FLOAT) dequantize_groups(packed, static_cast<float*>(to), threads);
    if (plan[7] == HALF) dequantize_groups(packed, static_cast<Half*>(to), threads);
    if (plan[7] == BFLOAT) dequantize_groups(packed, static_cast<Bfloat*>(to), threads);
}

// values: the float8 value of each of the 256 bytes; null if the bytes are int8.
void bitpolicy_dequantize_bytes(const uint8_t* codes, const float* scale, const float* values, int64_t out,
                                int64_t length, void* to, int dtype, int threads) {
    if (dtype == FLOAT) dequantize_bytes(codes, scale, values, out, length, static_cast<float*>(to), threads);
    if (dtype == HALF) dequantize_bytes(codes, scale, values, out, length, static_cast<Half*>(to), threads);
    if (dtype == BFLOAT) dequantize_bytes(codes, scale, values, out, length, static_cast<Bfloat*>(to), threads);
}
}
